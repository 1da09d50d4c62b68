"""What a directory or hub id that somebody names is: a conversion of Octavo, or a model as others wrote it."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters import find_adapter, put_adapter
from .common.command import OneLineParser
from .common.convert.output.naming import beside
from .common.convert.source.checkpoint import PATTERNS, check_device, find_source
from .common.convert.source.config import chosen_architecture
from .common.errors import OctavoError
from .common.runtime.checkpoint.ascend import DESCRIPTION_FILE
from .common.runtime.checkpoint.files import read_json
from .common.runtime.checkpoint.loading import CONFIG_FILE, CONFIG_KEY
from .generate import Speaker, load_converted, load_stock


@dataclass(frozen=True)
class Place:
    """A checkpoint on the disk.

    Attributes:
        directory: where it lies; of a hub id, in transformers' cache.
        settings: its config.json.
    """

    directory: Path
    settings: dict[str, Any]

    @property
    def is_converted(self) -> bool:
        """Whether Octavo's own classes load it: a conversion wrote it, or Ascend's tool did."""
        return CONFIG_KEY in self.settings or (self.directory / DESCRIPTION_FILE).is_file()

    @property
    def coded_by(self) -> str | None:
        """How another tool quantized it, as its config.json says: "awq", "gptq", ...; None if none did."""
        found = self.settings.get("quantization_config")
        return str(found.get("quant_method")) if isinstance(found, dict) else None


def find_place(model_path: str, with_code: bool = False, with_weights: bool = True) -> Place:
    """A checkpoint by its directory or hub id, fetched if need be, as transformers' offline switches allow.

    Args:
        with_code: whether to fetch code that comes with it, too.
        with_weights: whether to fetch more than its JSON.

    Raises:
        OctavoError: there is none, or it has no config.json that can be read.
    """
    directory = find_source(model_path, with_code, PATTERNS if with_weights else ("*.json",))
    if not (directory / CONFIG_FILE).is_file():
        raise OctavoError(f"{model_path}: holds no {CONFIG_FILE}, so it is no checkpoint; give one that has it")
    return Place(directory, read_json(directory / CONFIG_FILE))


def usual_output(model_path: str, suffix: str) -> Path:
    """Where what is made of a model goes unless it is said: beside a directory, or, of a hub id, where one stands."""
    return beside(Path(model_path) if Path(model_path).is_dir() else Path(model_path.rpartition("/")[2]), suffix)


def rewrite_command(model_path: str, directory: str | Path, format_name: str, suffix: str) -> str:
    """The command that writes a converted model in another format.

    Args:
        directory: where it lies, which the command takes in the place of a hub id.
        suffix: of the directory that is written.
    """
    source, output = model_path if Path(model_path).is_dir() else str(directory), usual_output(model_path, suffix)
    return shlex.join(["octavo", "rewrite", source, "--format", format_name, "--save_directory", str(output)])


def add_model_flags(parser: OneLineParser) -> None:
    """Let a parser take a model that is to run."""
    parser.add_place("MODEL", "directory that `octavo convert` wrote; or any model, with --scheme")
    about = "store the KV cache of a model that was not converted so: a scheme of `octavo schemes`, or a JSON file"
    parser.add_argument("--scheme", help=about)
    about = "what --save_statistics wrote, for schemes that need calibration"
    parser.add_argument("--statistics", type=Path, metavar="FILE", help=about)
    about = "LoRA adapter that runs beside the model: a directory that PEFT wrote, or hub id"
    parser.add_argument("--adapter", metavar="DIR", help=about)


def speaker_of(flags: argparse.Namespace) -> Speaker:
    """The model of the flags, ready to speak.

    Raises:
        OctavoError: there is none, or it was not converted and there is no scheme, or it was and there is one; its
            adapter is none for it.
    """
    adapter = None if flags.adapter is None else find_adapter(flags.adapter)  # before what takes long
    speaker = _plain_speaker(flags)
    if adapter is not None:
        put_adapter(speaker.model, flags.adapter, adapter)
    return speaker


def _plain_speaker(flags: argparse.Namespace) -> Speaker:
    """Without an adapter."""
    check_device(flags.device_type)
    place = find_place(flags.model_path)
    quoted = shlex.quote(flags.model_path)
    if place.is_converted:
        if flags.scheme is not None or flags.statistics is not None:
            given = "--statistics" if flags.scheme is None else f"--scheme {flags.scheme}"
            raise OctavoError(f"{given}: {flags.model_path} is converted and has a scheme of its own; leave it out")
        return converted_speaker(place, flags.device_type)
    if flags.scheme is None:
        raise OctavoError(
            f"{flags.model_path}: is not converted; octavo convert {quoted} does that, and --scheme int8-token runs it "
            "as it is, with a quantized KV cache (octavo schemes lists the others)"
        )
    return load_stock(place.directory, flags.scheme, flags.statistics, flags.device_type)


def converted_speaker(place: Place, device: str) -> Speaker:
    """A converted directory, of whatever architecture, ready to speak.

    Raises:
        OctavoError: it is of none that is served, or is damaged.
    """
    return load_converted(chosen_architecture(place.directory, None), place.directory, device)
