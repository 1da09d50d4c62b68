"""Measure what schemes lose at length, on prose and on prose that repeats itself, and append to `results/length.csv`.

A window of `--tokens` tokens is read, and the predictions of its last 1,024 are scored against the float model; and
once more the same 1,024 where they end `--short` tokens. Of the two texts one is prose as it stands. In the other the
last 1,024 tokens are passages copied word for word from 2,000 to 6,000 tokens back, which the short context does not
hold: copying needs sharp attention far back, and coarse keys blur it. What stands before is the same, and read once.

Logits of float are kept in `--cache`, and rows that are there are not measured again, so that a run that was cut off
goes on. The model runs in float32, its biases of k and v folded where the scheme allows.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from length_tables import FILE, PROSE, REPEATS, key_of
from quality import scheme_of
from rows import Row, append_rows, read_rows
from scoring import load_model, save_statistics
from transformers import AutoTokenizer

from octavo.common.convert.measure.fidelity import Comparison, windows
from octavo.common.convert.output.bundle import commit
from octavo.common.runtime.cache.quantized_cache import QuantizedCache
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from octavo.evaluation.reading import Reader
from octavo.generate import Speaker
from octavo.machine import device_name

COLUMNS = ("commit", "model", "what", "text", "window", "context", "bits", "kl", "perplexity", "float_perplexity",
           "top1", "tokens", "machine")  # fmt: skip
LAST = 1024
"""Tokens whose predictions are scored."""
PASSAGE = 128
NEAREST, FARTHEST = 2000, 6000
"""How far back the passages stand that are copied."""
PLACES = 8
"""Windows that are spread over a text, of which the first are measured."""
FLOAT = "float"


def repeating(ids: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """A window `[S]` whose last tokens are passages of its own, each from farther back than the one before it.

    Args:
        starts: where sentences begin: so does a passage, if one does nearby.
    """
    result, first = ids.clone(), len(ids) - LAST
    step = (FARTHEST - NEAREST - PASSAGE) * PASSAGE // LAST
    for number, place in enumerate(range(first, len(ids), PASSAGE)):
        wanted = max(0, place - NEAREST - PASSAGE - number * step)
        source = next((start for start in starts if wanted <= start < wanted + PASSAGE), wanted)
        result[place : place + PASSAGE] = ids[source : source + PASSAGE]
    return result


def sentence_starts(ids: torch.Tensor, tokenizer: Any) -> list[int]:
    """Where sentences begin in ids `[S]`: behind a full stop or the end of a line."""
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    return [index + 1 for index, text in enumerate(texts) if text.endswith((".", "\n"))]


def texts_of(ids: torch.Tensor, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Both texts of a window `[S]`."""
    return {PROSE: ids, REPEATS: repeating(ids, sentence_starts(ids, tokenizer))}


@torch.inference_mode()
def last_logits(speaker: Speaker, texts: dict[str, torch.Tensor], context: int) -> dict[str, torch.Tensor]:
    """Logits `[LAST, V]` of the predictions of the last tokens of texts, each behind `context` tokens in all."""
    shared = next(iter(texts.values()))[-context:-LAST]
    reader, found = Reader(speaker), {}
    before = reader.read(shared)[None]
    for name, ids in texts.items():
        own = copy.copy(reader)
        own.cache = copy.deepcopy(reader.cache)
        found[name] = torch.cat([before, *own.logits(ids[-LAST:-1])])
    return found


class Measured:
    """A float model, in both forms, and its logits."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._model_of = cache(lambda folds: load_model(flags.model_path, folds, torch.float32, flags.device))
        self.tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
        text = flags.eval_file.read_text(encoding="utf-8")
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        self.windows = [window[0].to(flags.device) for window in windows(ids, flags.tokens, PLACES)[: flags.windows]]

    def speaker(self, scheme: Scheme) -> Speaker:
        """What reads through a cache of a scheme."""
        model, statistics = self._model_of(scheme.fold_bias), self._flags.statistics if scheme.is_static else None
        return Speaker(model, self.tokenizer, scheme, lambda: QuantizedCache(model.config, scheme, statistics))

    def expected(self, number: int, context: int, texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The logits of float, kept on disk."""
        model, device = Path(self._flags.model_path).name, torch.device(self._flags.device).type
        parts = model, self._flags.eval_file.stem, self._flags.tokens, number, context, device
        name = f"{'-'.join(map(str, parts))}.pt"
        file = self._flags.cache / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            found = last_logits(self.speaker(load_scheme(FLOAT)), texts, context)
            torch.save({text: logits.cpu() for text, logits in found.items()}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        return torch.load(file, mmap=True)


def _score(expected: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> Row:
    comparison = Comparison()
    for start in range(0, LAST, 256):
        part = slice(start, start + 256)
        comparison.add(expected[part], found[part], targets[part])
    score = comparison.fidelity()
    return {
        "kl": f"{score.kl:.6f}",
        "perplexity": f"{score.perplexity:.4f}",
        "float_perplexity": f"{score.float_perplexity:.4f}",
        "top1": f"{score.top1:.4f}",
    }


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """A row for each window, scheme, context and text that has none yet, until the time is over."""
    done = {(*key_of(row), row["machine"]) for row in read_rows(FILE)}
    started, version, name, measured = time.monotonic(), commit(), Path(flags.model_path).name, Measured(flags)
    machine = device_name(torch.device(flags.device))
    for number, ids in enumerate(measured.windows):
        texts = texts_of(ids, measured.tokenizer)
        for what in flags.scheme:
            scheme = scheme_of(what)
            for context in (flags.short, flags.tokens):
                facts = {"commit": version, "model": name, "what": what, "window": str(number), "context": str(context)}
                facts |= {"tokens": str(flags.tokens), "machine": machine}
                if all((*key_of(facts | {"text": text}), machine) in done for text in texts):
                    continue
                if time.monotonic() - started > flags.seconds:
                    return
                bits = kv_bits_per_element(measured.speaker(scheme).model.config, scheme, context)
                expected = measured.expected(number, context, texts)
                found = last_logits(measured.speaker(scheme), texts, context)
                for text, logits in found.items():
                    row = facts | {"text": text, "bits": f"{bits:.3f}"}
                    yield row | _score(expected[text], logits, texts[text][-LAST:])


def main() -> int:
    """Calibrate if there are no statistics yet; else measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="float checkpoint")
    parser.add_argument("--eval_file", required=True, type=Path, help="text to score on")
    parser.add_argument("--calib_file", type=Path, help="calibration texts, if there are no statistics yet")
    parser.add_argument("--statistics", required=True, type=Path, help="a calibration: read, or written if missing")
    parser.add_argument("--cache", type=Path, default=Path(".cache/length"), help="directory for float's logits")
    parser.add_argument("--scheme", nargs="*", default=PRESETS, help="presets, or 'NAME, K alone'; all if not given")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--short", type=int, default=2048, help="the shorter context of the same last tokens")
    parser.add_argument("--windows", type=int, default=1, help="windows of the text, 8 at most")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no pass later than that")
    flags = parser.parse_args()
    if not flags.statistics.exists():
        save_statistics(flags.model_path, flags.calib_file, flags.statistics)
        return 0
    append_rows(FILE, COLUMNS, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
