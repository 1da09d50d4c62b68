"""Conversions that are there for the time of measuring; one that was cut off goes on where it was."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.convert.api import converted
from ..common.convert.flags import parse_flags, request_of
from ..common.convert.output.writer import stage_path
from ..common.convert.source.config import chosen_architecture
from ..common.runtime.checkpoint.loading import CONFIG_FILE
from ..common.runtime.version import VERSION
from ..generate import Speaker
from ..place import converted_speaker, find_place

DIGITS = 16
FOLDER = "converted"
"""Where conversions lie in the directory of a comparison, until they are measured."""


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, in the order of their names."""
    return sorted(file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in weight_files(directory))


def model_digest(directory: Path) -> str:
    """What tells whether a checkpoint is as it was: of its config.json, and of sizes and times of its weight files."""
    found = hashlib.sha256((directory / CONFIG_FILE).read_bytes())
    for file in weight_files(directory):
        stat = file.stat()
        found.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:DIGITS]


@contextmanager
def conversion(
    preset: str, more: Sequence[str], definition: Mapping[str, Any], source: Path, device: str, work: Path
) -> Iterator[tuple[Speaker, int]]:
    """A model converted by a preset, and the bytes of its weight files; removed when it has been measured.

    Where that is cut off, what is finished stays for the next call that asks for the same of the same model.

    Args:
        more: flags beside the preset.
        definition: all that the conversion follows from but the model, as plain data.
        work: the directory of the comparison.

    Raises:
        OctavoError: the model cannot be converted so.
    """
    told = json.dumps([VERSION, model_digest(source), device, definition], sort_keys=True)
    place = work / FOLDER / hashlib.sha256(told.encode()).hexdigest()[:DIGITS]
    output = place / preset
    if not (output / CONFIG_FILE).is_file():
        architecture = chosen_architecture(source, None)
        words = ["--model_path", str(source), "--save_directory", str(output), "--preset", preset, *more]
        words += ["--device_type", device, *(["--resume"] if stage_path(output).exists() else [])]
        place.mkdir(parents=True, exist_ok=True)
        report = converted(request_of(parse_flags(architecture.name, words, architecture.decoder.head), architecture))
        print(report.summary(), file=sys.stderr)
    yield converted_speaker(find_place(str(output)), device), weight_bytes(output)
    shutil.rmtree(place)
    if not any(place.parent.iterdir()):
        place.parent.rmdir()
