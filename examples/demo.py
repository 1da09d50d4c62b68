"""The whole way, on a real model: fetch SmolLM2-135M-Instruct, quantize it, load the result as remote code, compare.

python examples/demo.py [--directory .cache/demo]
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fetch_smollm2 import FetchError, default_directory, fetch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo import ConvertRequest, OctavoError, convert, kv_bytes_per_token, load_scheme
from octavo.common.command import aligned
from octavo.common.convert.calibration.texts import default_texts, hold_back, tokenize
from octavo.common.convert.measure.fidelity import compare
from octavo.common.convert.output.writer import stage_path
from octavo.common.runtime.checkpoint.ascend import DESCRIPTION_FILE

PROMPT = "Explain in two sentences why the sky is blue."
NEW_TOKENS = 60


def _answer(model: Any, tokenizer: Any) -> tuple[str, float]:
    """The model's greedy answer to the prompt, and tokens per second."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new) / (time.perf_counter() - started)


def _megabytes(directory: Path) -> str:
    return f"{sum(file.stat().st_size for file in directory.glob('*.safetensors')) / 1e6:.1f}"


def main() -> int:
    """Fetch, convert, load, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(".cache") / "demo", help="where the result goes")
    output = parser.parse_args().directory
    try:
        source = fetch(default_directory())
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if (output / DESCRIPTION_FILE).is_file():  # of the demo before; the conversion refuses any other directory
        shutil.rmtree(output)
    resume = stage_path(output).exists()
    try:
        report = convert(ConvertRequest(source, output, scheme="ascend-c8", anti_method="m3", resume=resume))
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.summary())

    tokenizer = AutoTokenizer.from_pretrained(output)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    samples = hold_back(tokenize(tokenizer, default_texts(), 2048, "input_ids", "attention_mask"))[1]
    progress = tqdm([sample["input_ids"] for sample in samples], desc="comparing", unit="text")
    fidelity = compare(lambda ids: plain(ids).logits, lambda ids: quantized(ids).logits, progress)

    (plain_text, plain_speed), (text, speed) = _answer(plain, tokenizer), _answer(quantized, tokenizer)
    print(f"\n{PROMPT}\n\nfloat:      {plain_text}\n\nquantized:  {text}\n")
    kv = [kv_bytes_per_token(plain.config, scheme, 4) for scheme in (load_scheme("float"), quantized.scheme)]
    rows = [
        ("", "float", "quantized"),
        ("weights, MB", _megabytes(source), _megabytes(output)),
        ("KV cache, bytes per token", str(kv[0]), str(kv[1])),
        ("perplexity", f"{fidelity.float_perplexity:.3f}", f"{fidelity.perplexity:.3f}"),
        ("KL(float || quantized), nats per token", "0", f"{fidelity.kl:.4f}"),
        ("tokens per second", f"{plain_speed:.1f}", f"{speed:.1f}"),
    ]
    print("\n".join(aligned(rows, texts=1)))
    print(f"\nSmolLM2-135M-Instruct, W8A8 and int8 KV cache; {fidelity.tokens} held-back tokens of text; ", end="")
    print(f"{torch.get_num_threads()} CPU threads")
    print(f"The quantized model is in {output}; load it anywhere with trust_remote_code=True.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
