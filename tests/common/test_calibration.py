"""Calibration texts as token ids."""

import json
from pathlib import Path

import pytest

from octavo.common.calibration import default_texts, hold_back, read_calibration_file, tokenize
from octavo.common.errors import OctavoError

from ..support import TEXTS, tiny_tokenizer

NAMES = ("input_ids", "attention_mask")


def test_lines_are_plain_or_json(tmp_path: Path) -> None:
    lines = ["plain text", json.dumps({"id": 0, "inputs_pretokenized": "as in boolq\nwith a break"}), "[not] an object"]
    file = tmp_path / "texts"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_calibration_file(file) == ["plain text", "as in boolq\nwith a break", "[not] an object"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is empty"),
        ("a\n\nb", "line 2: holds no text"),
        ('a\n{"inputs_pretokenized": ', "line 2: no valid JSON"),
        ('{"text": "a"}', "line 1: no 'inputs_pretokenized'"),
        ('{"inputs_pretokenized": null}', "line 1: holds no text"),
    ],
)
def test_bad_files(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text(content)
    with pytest.raises(OctavoError, match=part):
        read_calibration_file(tmp_path / "texts")


def test_samples_are_cut_to_the_longest() -> None:
    samples = tokenize(tiny_tokenizer(), TEXTS, 10, *NAMES)
    assert len(samples) == len(TEXTS)
    for text, sample in zip(TEXTS, samples, strict=True):
        assert sample["input_ids"].tolist() == [tiny_tokenizer()(text)["input_ids"][:10]]
        assert sample["attention_mask"].shape == sample["input_ids"].shape


def test_a_text_without_tokens_is_named() -> None:
    with pytest.raises(OctavoError, match=r"text 2 .*shorter than a token"):
        tokenize(tiny_tokenizer(), ["a", ""], 10, *NAMES)


def test_a_name_that_the_tokenizer_does_not_return() -> None:
    with pytest.raises(OctavoError, match="--input_ids_name ids"):
        tokenize(tiny_tokenizer(), ["a"], 10, "ids", "attention_mask")


@pytest.mark.parametrize(
    ("count", "kept", "held"), [(1, 1, 1), (2, 1, 1), (8, 7, 1), (16, 14, 2), (50, 44, 6), (400, 394, 6)]
)
def test_the_last_texts_are_held_back(count: int, kept: int, held: int) -> None:
    samples = list(range(count))
    calibrating, comparing = hold_back(samples)
    assert (len(calibrating), len(comparing)) == (kept, held)
    assert comparing == samples[-held:]


def test_the_text_that_comes_along() -> None:
    texts = default_texts()
    assert len(texts) > 1 and all(text.strip() for text in texts)
