"""What recall asks for: keys that are words of their own, all over the list; and what its tables say of the answers."""

import csv
import random
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ..support import REPOSITORY


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/recall_tables.py` with rows of its own."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    module = import_module("recall_tables")
    monkeypatch.setattr(module, "FILE", tmp_path / "recall.csv")
    return module


def test_keys_are_words_of_their_own(tables: ModuleType) -> None:
    words = ["\u0120" + "".join(pair) + "abcd" for pair in zip("abcdefghij" * 8, "k" * 40 + "l" * 40, strict=True)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*words, "\u0120Upper", "nospace")))}
    recall = import_module("recall")
    found = recall.words_of(SimpleNamespace(get_vocab=lambda: vocabulary))
    assert "Upper" not in found and "ospace" not in found
    prompt = recall.word_pairs(found, 20, random.Random(1), 10)
    lines = prompt.text.splitlines()[1:]
    keys = [line.split()[4] for line in lines]
    assert len(set(keys)) == 20 and all("\u0120" + key in vocabulary for key in keys)
    places = [keys.index(question.split()[-2]) for question, _ in prompt.questions]
    assert [place // 2 for place in places] == list(range(10)), "one of each two pairs, from the first to the last"
    assert all(lines[place].endswith(f" {value}.") for place, (_, value) in zip(places, prompt.questions, strict=True))


def record(file: Path, *rows: tuple[str, str, str, str]) -> None:
    """Write rows of (scheme, kind, list, answers)."""
    rest = {"model": "qwen2.5-coder-0.5b", "tokens": "1600", "bits": "4.7"}
    fields = ("scheme", "kind", "list", "answers")
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, (*rest, *fields))
        writer.writeheader()
        writer.writerows({**rest, **dict(zip(fields, row, strict=True))} for row in rows)


def test_answers_are_held_against_those_of_float(tables: ModuleType) -> None:
    assert "not measured" in tables.recall_table() and "not measured" in tables.recall_digest()
    record(
        tables.FILE,
        ("float", "words", "0", "+++++"),
        ("float", "words", "1", "++++-"),
        ("octavo-4", "words", "0", "+-+++"),
        ("octavo-4", "words", "1", "+++++"),
        ("octavo-4", "names", "0", "-----"),
    )
    lines = tables.recall_table().splitlines()
    assert "| `octavo-4` | 4.70 | 9/10 | 60 to 98 % | 1 | 1 |" in lines
    assert "| `octavo-4` | 4.70 | 0/5 | 0 to 43 % | 0 | 0 |" in lines, "of the other kind, without float's"
    assert "| `octavo-4` | 4.70 | 90 % (60 to 98) |" in tables.recall_digest().splitlines()
