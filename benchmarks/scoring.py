"""A float model, the windows of a text that others are scored on, and the scores."""

import argparse
import math
from pathlib import Path

import torch
from rows import Row
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from octavo.common.convert.calibration.texts import read_calibration_file, tokenize
from octavo.common.convert.calibration.whole import calibrate_whole
from octavo.common.convert.measure.fidelity import LogitsOf, windows
from octavo.common.runtime.schemes.kv_scheme import PRESETS, load_scheme
from octavo.common.stock_model import prepare
from octavo.evaluation.text import Kept, compare_reads, whole
from octavo.ops.shared.registry import NAMESPACE


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is scored, and on what."""
    parser.add_argument("--model_path", required=True, help="float checkpoint")
    parser.add_argument("--eval_file", required=True, type=Path, help="text to score on")
    parser.add_argument("--windows", type=int, default=4, help="windows of the text, spread evenly")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")


def load_float(model_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_path)


def load_model(model_path: str, folds_bias: bool, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """A model whose attention reads codes, its biases of k and v folded or not."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval().to(device)
    if folds_bias:
        return prepare(model)
    model.set_attn_implementation(NAMESPACE)
    return model


def save_statistics(model_path: str, calib_file: Path, statistics: Path) -> None:
    """Calibrate the float model for all static schemes."""
    model, tokenizer = load_float(model_path)
    texts = tokenize(tokenizer, read_calibration_file(calib_file), 2048, "input_ids", "attention_mask")
    calibrate_whole(model, texts, map(load_scheme, PRESETS)).save(statistics)


def read_windows(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """The windows to score on, token ids `[1, length]` each."""
    ids = tokenizer(flags.eval_file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    return windows(ids, flags.length, flags.windows)


class Reference:
    """Windows of a text, and the logits of the float model on them, computed at once: the model may change later."""

    def __init__(self, model: PreTrainedModel, samples: list[torch.Tensor]) -> None:
        self.samples = samples
        self._expected = Kept(whole(lambda ids: model(ids).logits), most=math.inf)
        for sample in tqdm(samples, desc="float", unit="window"):
            list(self._expected(sample[0]))

    def score(self, what: str, logits_of: LogitsOf) -> Row:
        """How far a model, `[1, S]` ids to `[1, S, vocabulary]` logits, is from the float one."""
        windows_read = [sample[0] for sample in self.samples]
        found = compare_reads(self._expected, {what: whole(logits_of)}, windows_read, what=what)[what]
        return {
            "windows": str(len(self.samples)),
            "length": str(self.samples[0].shape[1]),
            "kl": f"{found.kl:.6f}",
            "perplexity": f"{found.perplexity:.4f}",
            "float_perplexity": f"{found.float_perplexity:.4f}",
            "top1": f"{found.top1:.4f}",
        }
