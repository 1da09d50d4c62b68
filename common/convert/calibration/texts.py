"""Texts to calibrate on, as token ids."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ....ops.shared.resources import resource
from ...errors import OctavoError, first_line
from ..spelling import named

TEXT_KEY = "inputs_pretokenized"
_MARK = "\ufeff"
"""The byte order mark, which begins a file of some tools, and a line where such files were joined."""
_ARRAY = re.compile(r'\s*\[\s*(["{]|\]?\s*$)')
"""How a JSON array of texts or objects begins; a plain text in brackets does not."""
LONGEST_SAMPLE = 2048
"""Tokens of a text that are read."""
HELD_BACK_SHARE = 8
MOST_HELD_BACK = 6


def _text_of(entry: Any, where: str) -> str:
    """The text of a line or of an item: itself, or what an object has under `inputs_pretokenized`."""
    if isinstance(entry, dict):
        if TEXT_KEY not in entry:
            raise OctavoError(f"{where}: no {TEXT_KEY!r}; mend or remove it")
        entry = entry[TEXT_KEY]
    if not isinstance(entry, str) or not entry.strip():
        raise OctavoError(f"{where}: holds no text; mend or remove it")
    if "\0" in entry:
        raise OctavoError(f"{where}: holds NUL, as a file in UTF-16 does; save it in UTF-8")
    try:
        entry.encode()
    except UnicodeEncodeError:
        raise OctavoError(f"{where}: holds half of a surrogate pair; mend or remove it") from None
    return entry


def _entry_of_line(line: str, where: str) -> Any:
    """A line itself, or the object that it holds."""
    if not line.lstrip().startswith("{"):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{where}: no valid JSON ({error}); mend or remove the line") from None


def _lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n or \r\n and nowhere else; empty ones at the end are none."""
    lines = [line.removeprefix(_MARK).removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _array(text: str, where: str) -> list[Any] | None:
    """The items of a file that is one JSON array; None if it is none."""
    text = text.removeprefix(_MARK)
    if not _ARRAY.match(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{where}: begins as a JSON array and is none ({error}); mend it") from None


def read_calibration_file(file: str | Path) -> list[str]:
    """The texts of a calibration file: one per line, or the items of one JSON array.

    Raises:
        OctavoError: the file cannot be read or holds no texts; a line or item is empty or broken, with its number.
    """
    where = f"{named('calibration')} {file}"
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OctavoError(f"{where}: cannot be read ({error})") from None
    items = _array(text, where)
    if items is not None:
        entries = [(item, f"{where}, item {number}") for number, item in enumerate(items, 1)]
    else:
        numbered = [(line, f"{where}, line {number}") for number, line in enumerate(_lines(text), 1)]
        entries = [(_entry_of_line(line, place), place) for line, place in numbered]
    if not entries:
        raise OctavoError(f"{where}: is empty; give a file with a text on each line")
    return [_text_of(entry, place) for entry, place in entries]


def default_texts() -> list[str]:
    """The small calibration text that comes with this project."""
    return _lines(resource("common/convert/calibration/calibration.txt"))


def tokenize(
    tokenizer: Any, texts: Sequence[str], longest: int, ids_name: str, mask_name: str
) -> list[dict[str, torch.Tensor]]:
    """One sample per text, cut to `longest` tokens: `[1, S]` ids and mask, as the model takes them.

    Args:
        ids_name, mask_name: the tokenizer's names of what the model takes as `input_ids` and `attention_mask`.

    Raises:
        OctavoError: a text that has no token; a name that the tokenizer does not return.
    """
    samples = []
    for number, text in enumerate(texts, 1):
        try:
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
        except (TypeError, ValueError) as error:  # what tokenizer_config.json says is seen first here
            raise OctavoError(
                f"the tokenizer does not encode calibration text {number} ({first_line(error)}): mend "
                "tokenizer_config.json"
            ) from None
        for field, name in (("input_ids_name", ids_name), ("attention_mask_name", mask_name)):
            if name not in encoded:
                raise OctavoError(f"{named(field)} {name}: the tokenizer returns {', '.join(encoded)}")
        if not tokenizer(text, add_special_tokens=False)[ids_name]:
            raise OctavoError(
                f"calibration text {number} ({text[:20]!r}) is shorter than a token; lengthen or remove it"
            )
        samples.append({"input_ids": encoded[ids_name].long(), "attention_mask": encoded[mask_name]})
    return samples


def hold_back(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    """Samples to calibrate on, and the last few that only the final comparison sees (all, if there is only one)."""
    count = min(MOST_HELD_BACK, max(1, len(samples) // HELD_BACK_SHARE))
    return (samples[:-count], samples[-count:]) if len(samples) > 1 else (samples, samples)
