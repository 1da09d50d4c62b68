"""Texts to calibrate on, as token ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..ops.resources import resource
from .errors import OctavoError

TEXT_KEY = "inputs_pretokenized"
HELD_BACK_SHARE = 8
MOST_HELD_BACK = 6


def _text_of_line(line: str, where: str) -> str:
    """The text of one line: under `inputs_pretokenized` if the line is a JSON object, else the line itself."""
    if line.startswith("{"):
        try:
            line = json.loads(line)[TEXT_KEY]
        except ValueError as error:
            raise OctavoError(f"{where}: no valid JSON ({error}); mend or remove the line") from None
        except KeyError:
            raise OctavoError(f"{where}: no {TEXT_KEY!r}; mend or remove the line") from None
    if not isinstance(line, str) or not line.strip():
        raise OctavoError(f"{where}: holds no text; mend or remove the line")
    return line


def read_calibration_file(file: str | Path) -> list[str]:
    """The texts of a calibration file, one per line.

    Raises:
        OctavoError: the file cannot be read or holds no lines; a line is empty or broken, with its number.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OctavoError(f"--calib_file {file}: cannot be read ({error})") from None
    if not lines:
        raise OctavoError(f"--calib_file {file}: is empty; give a file with a text on each line")
    return [_text_of_line(line, f"--calib_file {file}, line {number}") for number, line in enumerate(lines, 1)]


def default_texts() -> list[str]:
    """The small calibration text that comes with this project."""
    return resource("common/calibration.txt").splitlines()


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
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
        for flag, name in (("--input_ids_name", ids_name), ("--attention_mask_name", mask_name)):
            if name not in encoded:
                raise OctavoError(f"{flag} {name}: the tokenizer returns {', '.join(encoded)}")
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
