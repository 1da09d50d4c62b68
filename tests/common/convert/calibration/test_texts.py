"""Calibration texts as token ids."""

import json
from pathlib import Path

import pytest

from octavo.common.convert.calibration.texts import default_texts, hold_back, read_calibration_file, tokenize
from octavo.common.errors import OctavoError

from ....support import TEXTS, tiny_tokenizer

NAMES = ("input_ids", "attention_mask")


def test_lines_are_plain_or_json(tmp_path: Path) -> None:
    lines = ["plain text", json.dumps({"id": 0, "inputs_pretokenized": "as in boolq\nwith a break"}), "[not] an object"]
    file = tmp_path / "texts"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_calibration_file(file) == ["plain text", "as in boolq\nwith a break", "[not] an object"]


def line(text: str) -> str:
    """A line of JSON as tools write it that escape nothing."""
    return json.dumps({"inputs_pretokenized": text}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (line("one\u2028half") + "\n" + line("two") + "\n", ["one\u2028half", "two"]),
        (line("one\u0085half") + "\n", ["one\u0085half"]),
        ("page one\x0cpage two\x0b\x1c\x1dend\nnext\n", ["page one\x0cpage two\x0b\x1c\x1dend", "next"]),
        ("old\rmac\n", ["old\rmac"]),
        ("\ufeff" + line("one") + "\r\n" + line("two") + "\r\n", ["one", "two"]),
        ("\ufeffone\r\ntwo\r\n\ufeffthree, joined on", ["one", "two", "three, joined on"]),
        ("  " + line("behind blanks"), ["behind blanks"]),
        ("one\ntwo\n\n\r\n", ["one", "two"]),
        ('["one", {"inputs_pretokenized": "two"}]', ["one", "two"]),
        ('\ufeff[\r\n  "one\\nhalf",\r\n  "two"\r\n]\r\n', ["one\nhalf", "two"]),
        ("[1] a footnote\n[2] another", ["[1] a footnote", "[2] another"]),
    ],
)
def test_only_line_feeds_end_lines_and_a_mark_is_no_text(content: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(content.encode())
    assert read_calibration_file(tmp_path / "texts") == texts


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("[]", "is empty"),
        ('["one", 2]', "item 2: holds no text"),
        ('["one", {"text": "two"}]', "item 2: no 'inputs_pretokenized'"),
        ('["one",\n "two"', "begins as a JSON array"),
        ("[\n{", "begins as a JSON array"),
        ('a\n{"inputs_pretokenized": "\\ud800"}', "line 2: holds half of a surrogate pair"),
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


def test_a_file_in_utf_16_without_a_mark_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_bytes("one\ntwo\n".encode("utf-16-le"))
    with pytest.raises(OctavoError, match="holds NUL, as a file in UTF-16 does"):
        read_calibration_file(file)
