"""Measure how far each scheme is from the float model, and append the rows to `results/quality.csv`.

Every query reads the stored codes. Static scales come from one calibration of the float model on `--calib_file`;
quantized checkpoints are scored as they load.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import append_rows
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.common.bundle import commit
from octavo.common.cache import QuantizedCache
from octavo.common.calibration import read_calibration_file, tokenize
from octavo.common.evaluate import Fidelity, compare, windows
from octavo.common.observe import calibrate
from octavo.common.scheme import load_scheme
from octavo.common.statistics import scales_of
from octavo.ops.library import NAMESPACE

SCHEMES = ("int8-token", "fp8-token", "int4-token", "ascend-c8", "ascend-fa")
COLUMNS = ("commit", "model", "what", "windows", "length", "kl", "perplexity", "float_perplexity", "top1")


def _row(version: str, model: str, what: str, samples: list[torch.Tensor], result: Fidelity) -> dict[str, str]:
    numbers = (f"{result.kl:.6f}", f"{result.perplexity:.4f}", f"{result.float_perplexity:.4f}", f"{result.top1:.4f}")
    values = (version, model, what, str(len(samples)), str(samples[0].shape[1]), *numbers)
    return dict(zip(COLUMNS, values, strict=True))


def measure(flags: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A row for each scheme on the stock model, and for each quantized checkpoint."""
    version = commit()  # before the results make the tree dirty
    model = AutoModelForCausalLM.from_pretrained(flags.model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
    ids = tokenizer(flags.eval_file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    samples = windows(ids, flags.length, flags.windows)
    texts = tokenize(tokenizer, read_calibration_file(flags.calib_file), 2048, "input_ids", "attention_mask")
    statistics = calibrate(model, [], tqdm(texts, desc="calibrating", unit="text"))
    with torch.inference_mode():
        expected = [model(sample).logits for sample in tqdm(samples, desc="float", unit="window")]
    model.set_attn_implementation(NAMESPACE)
    name = Path(flags.model_path).name
    for preset in SCHEMES:
        scheme = load_scheme(preset)
        scales = scales_of(scheme, statistics) if scheme.is_static else None
        floats = iter(expected)
        result = compare(
            lambda _, floats=floats: next(floats),
            lambda i, scheme=scheme, scales=scales: (
                model(i, past_key_values=QuantizedCache(model.config, scheme, scales=scales)).logits
            ),
            tqdm(samples, desc=preset, unit="window"),
        )
        yield _row(version, name, f"float weights + {preset}", samples, result)
    for directory in flags.checkpoint:
        quantized = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        floats = iter(expected)
        progress = tqdm(samples, desc=directory.name, unit="window")
        result = compare(lambda _, floats=floats: next(floats), lambda i, m=quantized: m(i).logits, progress)
        yield _row(version, name, directory.name, samples, result)


def main() -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="float checkpoint")
    parser.add_argument("--eval_file", required=True, type=Path, help="text to score on")
    parser.add_argument("--calib_file", required=True, type=Path, help="calibration texts")
    parser.add_argument(
        "--checkpoint", nargs="*", type=Path, default=[], help="quantized directories, named for the table"
    )
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    flags = parser.parse_args()
    append_rows("quality.csv", COLUMNS, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
