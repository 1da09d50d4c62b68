"""Measure which schemes still find a value by its key far back, and append the rows to `results/recall.csv`.

A row is a list of keys and values that fills a prompt, read once, and fifty questions on it, each answered from the
cache that holds it: right if each token of the value is the likeliest behind those before it, which is what greedy
decoding writes, seen in one pass. Two kinds of lists: in `words` each key is a word of its own, which float finds again
nearly always; in `names` keys share their words (of forty questions each). Every scheme gets the same lists and
questions, so that it can be compared with float question by question. Rows that are there are not measured again, so
that a run that was cut off goes on. The model runs in bfloat16, its biases of k and v folded where the scheme allows.
"""

import argparse
import itertools
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recall_tables import FILE, FLOAT, key_of
from rows import Row, append_rows, read_rows
from scoring import load_model, save_statistics
from tqdm import tqdm
from transformers import AutoTokenizer

from octavo.common.convert.output.bundle import commit
from octavo.common.runtime.cache.sizes import kv_bits_per_element
from octavo.common.runtime.schemes.kv_scheme import CROP_ROOM, PRESETS, load_scheme
from octavo.evaluation.reading import Reader
from octavo.evaluation.recall import ROOM, Prompt, key_values, largest
from octavo.generate import Speaker, with_scheme
from octavo.machine import device_name

COLUMNS = ("commit", "model", "scheme", "tokens", "list", "bits", "cache_bytes", "answers", "kind", "machine")
ASKED = {"words": 50, "names": 40}
"""Questions on a list, by its kind."""
WORD, WORDS = re.compile("Ġ[a-z]{5,9}"), 3000
"""Tokens that are words, and how many of those that come first in a vocabulary are keys."""


def words_of(tokenizer: Any) -> list[str]:
    """Words that are one token behind a space, those first that come first in the vocabulary."""
    spaced = sorted((number, token[1:]) for token, number in tokenizer.get_vocab().items() if WORD.fullmatch(token))
    return [word for _, word in spaced]


def word_pairs(words: Sequence[str], size: int, chance: random.Random, asked: int) -> Prompt:
    """A list of so many pairs, each key a word of its own; the keys that are asked for lie all over it."""
    size = min(size, len(words))
    keys = chance.sample(words[: max(WORDS, size)], size)
    pairs = [(key, f"{chance.randrange(100_000):05}") for key in keys]
    lines = "".join(f"The number of the {key} is {value}.\n" for key, value in pairs)
    asked = min(asked, size)
    found = [pairs[int((index + chance.random()) * size / asked)] for index in range(asked)]
    questions = tuple((f"\nAgain, the number of the {key} is", value) for key, value in found)
    return Prompt(f"Here is a list of numbers.\n{lines}", questions)


def measure(flags: argparse.Namespace) -> Iterator[Row]:
    """A row for each list, length and scheme that has none yet, until the time is over."""
    done = {(*key_of(row), row["machine"]) for row in read_rows(FILE)}
    started, version, name = time.monotonic(), commit(), Path(flags.model_path).name
    machine = device_name(torch.device(flags.device))
    tokenizer = AutoTokenizer.from_pretrained(flags.model_path)

    @cache
    def plain(folds_bias: bool) -> Speaker:
        model = load_model(flags.model_path, folds_bias, torch.bfloat16, flags.device)
        return Speaker(model, tokenizer, load_scheme(FLOAT), list)

    for number, tokens in itertools.product(range(flags.lists), flags.tokens):
        prompt = _prompt(tokenizer, flags.kind, tokens, number)
        for asked in tqdm(flags.scheme, desc=f"{tokens:,} tokens, list {number}", unit="scheme"):
            row = {"commit": version, "model": name, "scheme": asked, "kind": flags.kind, "machine": machine}
            row |= {"tokens": str(tokens), "list": str(number)}
            if (*key_of(row), machine) in done:
                continue
            if time.monotonic() - started > flags.seconds:
                return
            scheme = load_scheme(asked)
            speaker = with_scheme(plain(scheme.fold_bias), asked, flags.statistics if scheme.is_static else None)
            found, nbytes = _answers(speaker, prompt)
            is_float = asked == FLOAT
            bits = 16.0 if is_float else kv_bits_per_element(speaker.model.config, scheme, tokens, CROP_ROOM)
            marks = "".join("-+"[is_right] for is_right in found)
            yield row | {"bits": f"{bits:.3f}", "cache_bytes": str(nbytes), "answers": marks}


def _prompt(tokenizer: Any, kind: str, tokens: int, number: int) -> Prompt:
    words, asked = words_of(tokenizer), ASKED[kind]

    def make(size: int, chance: random.Random) -> Prompt:
        return word_pairs(words, size, chance, asked) if kind == "words" else key_values(size, chance, asked)

    size = largest(lambda size: make(size, random.Random(0)), tokenizer, tokens - ROOM)
    return make(size, random.Random(f"0 {number}"))


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


def main() -> int:
    """Calibrate if there are no statistics yet; else measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="float checkpoint")
    parser.add_argument("--calib_file", type=Path, help="calibration texts, if there are no statistics yet")
    parser.add_argument("--statistics", required=True, type=Path, help="a calibration: read, or written if missing")
    parser.add_argument("--scheme", nargs="*", default=PRESETS, help="presets to measure; all if not given")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1600, 4096, 8192], help="lengths of prompts")
    parser.add_argument("--kind", choices=list(ASKED), default="words", help="of lists")
    parser.add_argument("--lists", type=int, default=2, help="lists of each length")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no list later than that")
    flags = parser.parse_args()
    if not flags.statistics.exists():
        save_statistics(flags.model_path, flags.calib_file, flags.statistics)
        return 0
    append_rows(FILE, COLUMNS, measure(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main())
