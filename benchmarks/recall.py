"""Measure which schemes still find a value by its key far back, and append the rows to `results/recall.csv`.

A row is a list of keys and values that fills a prompt, read once, and forty questions on it, each answered from the
cache that holds it: right if each token of the value is the likeliest behind those before it, which is what greedy
decoding writes, seen in one pass. Every scheme gets the same lists and questions, so that it can be compared with float
question by question. Rows that are there are not measured again, so that a run that was cut off goes on. The model runs
in bfloat16, its biases of k and v folded where the scheme allows.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, Row, append_rows, markdown, read_rows
from scoring import load_model, save_statistics
from tqdm import tqdm
from transformers import AutoTokenizer

from octavo.common.convert.output.bundle import commit
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, PRESETS, load_scheme
from octavo.evaluation.reading import Reader
from octavo.evaluation.recall import ROOM, Prompt, Score, key_values, largest
from octavo.generate import Speaker, with_scheme

FILE = RESULTS / "recall.csv"
COLUMNS = ("commit", "model", "scheme", "tokens", "list", "bits", "cache_bytes", "answers")
ASKED = 40
FLOAT = "float"


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["model"], row["scheme"], row["tokens"], row["list"]


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """A row for each list, length and scheme that has none yet, until the time is over."""
    done = {_key(row) for row in read_rows(FILE)}
    started, version, name = time.monotonic(), commit(), Path(flags.model_path).name
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
    plain = {
        folds: Speaker(load_model(flags.model_path, folds, torch.bfloat16), tokenizer, load_scheme(FLOAT), list)
        for folds in (True, False)
    }
    for number, tokens in itertools.product(range(flags.lists), flags.tokens):
        prompt = _prompt(tokenizer, tokens, number)
        for asked in tqdm(flags.scheme, desc=f"{tokens:,} tokens, list {number}", unit="scheme"):
            row = {"commit": version, "model": name, "scheme": asked, "tokens": str(tokens), "list": str(number)}
            if _key(row) in done:
                continue
            if time.monotonic() - started > flags.seconds:
                return
            scheme = load_scheme(asked)
            speaker = with_scheme(plain[scheme.fold_bias], asked, flags.statistics if scheme.is_static else None)
            found, nbytes = _answers(speaker, prompt)
            is_float = asked == FLOAT
            bits = 16.0 if is_float else kv_bits_per_element(speaker.model.config, scheme, tokens, CROP_ROOM)
            marks = "".join("-+"[is_right] for is_right in found)
            yield row | {"bits": f"{bits:.3f}", "cache_bytes": str(nbytes), "answers": marks}


def _prompt(tokenizer: Any, tokens: int, number: int) -> Prompt:
    size = largest(lambda size: key_values(size, random.Random(0)), tokenizer, tokens - ROOM)
    return key_values(size, random.Random(f"0 {number}"), ASKED)


@torch.inference_mode()
def _answers(speaker: Speaker, prompt: Prompt) -> tuple[list[bool], int]:
    """Whether each question is answered, and the bytes of the cache that holds the list."""
    reader = Reader(speaker)
    ids = reader.ids_of(prompt.text)
    reader.read(ids)
    nbytes, found = reader.cache.nbytes(), []
    for question, value in prompt.questions:
        asked, expected = (reader.ids_of(text, add_special_tokens=False) for text in (question, f" {value}"))
        logits = torch.cat(list(reader.logits(torch.cat((asked, expected[:-1])))))[-len(expected) :]
        found.append(torch.equal(logits.argmax(-1), expected))
        reader.forget(len(ids))
    return found, nbytes


def recall_table(model: str = "qwen2.5-coder-0.5b") -> str:
    """Each scheme by length: right answers of float's questions, with intervals, and those that float alone has."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    bits: dict[str, float] = {}
    for row in read_rows(FILE):
        if row["model"] == model:
            found.setdefault((row["scheme"], row["tokens"]), {})[row["list"]] = row["answers"]
            bits.setdefault(row["scheme"], float(row["bits"]))
    if not found:
        return "Recall is not measured yet."
    lengths = sorted({tokens for _, tokens in found}, key=int)
    heads = [head for tokens in lengths for head in (f"right at {int(tokens):,}", "95 % interval", "lost", "won")]
    rows = [("scheme", "bits", *heads)]
    for scheme in sorted(bits, key=lambda name: -bits[name]):
        cells = [cell for tokens in lengths for cell in _cells(found.get((scheme, tokens)), found.get((FLOAT, tokens)))]
        rows.append((f"`{scheme}`", f"{bits[scheme]:.2f}", *cells))
    return (
        f"{markdown(rows)}\n\n"
        f"{model} in bfloat16: lists that fill a prompt, and forty questions on each, answered greedily; Wilson's "
        "interval; empty where it is not measured. `lost` and `won`: questions that float alone answers, and that the "
        f"scheme alone does. Bits are those of the shorter prompt, with what is kept so that {CROP_ROOM} tokens can be "
        "cropped."
    )


def _cells(answered: dict[str, str] | None, plain: dict[str, str] | None) -> tuple[str, str, str, str]:
    """Right answers of how many, their interval, and what float alone answers, and what the scheme alone does."""
    if answered is None:
        return "", "", "", ""
    marks = "".join(answered.values())
    score = Score(marks.count("+"), len(marks))
    both = [number for number in answered if plain and number in plain]
    shared = [pair for number in both for pair in zip(plain[number], answered[number], strict=True)]
    lost, won = shared.count(("+", "-")), shared.count(("-", "+"))
    low, high = score.interval
    return f"{score.right}/{score.asked}", f"{100 * low:.0f} to {100 * high:.0f} %", str(lost), str(won)


def main() -> int:
    """Calibrate if there are no statistics yet; else measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="float checkpoint")
    parser.add_argument("--calib_file", type=Path, help="calibration texts, if there are no statistics yet")
    parser.add_argument("--statistics", required=True, type=Path, help="a calibration: read, or written if missing")
    parser.add_argument("--scheme", nargs="*", default=PRESETS, help="presets to measure; all if not given")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192], help="lengths of prompts")
    parser.add_argument("--lists", type=int, default=1, help="lists of each length, forty questions each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no list later than that")
    flags = parser.parse_args()
    if not flags.statistics.exists():
        save_statistics(flags.model_path, flags.calib_file, flags.statistics)
        return 0
    append_rows(FILE, COLUMNS, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
