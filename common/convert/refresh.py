"""Code of today for a directory that an older version converted, whose weights stay as they are."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture, check_model_type, load_architecture, stated_architectures
from ..command import OneLineParser, run_script
from ..errors import OctavoError
from ..runtime.checkpoint.ascend import LAYOUT_KEYS
from ..runtime.checkpoint.files import read_json
from ..runtime.checkpoint.loading import CONFIG_KEY, NATIVE_LOAD_HINT, describe_checkpoint, read_config
from ..runtime.schemes.linear_scheme import W8A8
from ..runtime.version import RECIPE_KEYS, REFRESH, VERSION, check_version
from .output.bundle import put_file, write_bundle
from .output.config import for_older_readers
from .output.writer import json_text
from .targets import engine_dtype

_UNNAMED = "a version that gave no number"


def _architecture_of(directory: Path, config: dict[str, Any]) -> Architecture:
    """The architecture of a directory of Octavo.

    Raises:
        OctavoError: it is somebody else's, or of a newer version.
    """
    file, recipe, model_type = directory / "config.json", config.get(CONFIG_KEY), config.get("model_type")
    if not isinstance(recipe, dict) or "scheme" not in recipe or "auto_map" not in config:
        raise OctavoError(
            f"{directory}: was not converted by Octavo ({file.name} has no {CONFIG_KEY!r} with a scheme, or no "
            "auto_map); only such directories have code to refresh"
        )
    check_version(str(directory), recipe, RECIPE_KEYS + LAYOUT_KEYS)
    known = stated_architectures()
    if model_type not in known:
        raise OctavoError(f"{file}: model_type is {model_type!r}, and the zoo has none for it ({', '.join(known)})")
    architecture = load_architecture(known[model_type])
    check_model_type(file, model_type, architecture, f"models/{architecture.name} serves", "take {}")
    return architecture


def _layout_of(directory: Path, architecture: Architecture) -> dict[str, Any]:
    """What the files of a directory say of its linears, see `linear_layout`.

    Raises:
        OctavoError: files are missing or damaged, or say what is unknown here.
    """
    tied, config = architecture.model_class._tied_weights_keys or (), read_config(str(directory), {})
    try:
        describe_checkpoint(config, str(directory), tied, {})
    except OctavoError as error:
        raise error if str(directory) in str(error) else OctavoError(f"{directory}: {error}") from None
    return getattr(config, CONFIG_KEY)


def _scales_are_for(layout: dict[str, Any], otherwise: torch.dtype) -> torch.dtype:
    """The dtype of models in which engines read the scales of static int8 linears, see `deq_scale_dtype`.

    Args:
        otherwise: where there are none.
    """
    if W8A8 not in layout["quantized_linears"].values():
        return otherwise
    return torch.float16 if layout["deq_scale"] == "I64" else torch.bfloat16


def _refreshed(config: dict[str, Any], architecture: Architecture, scales_are_for: torch.dtype) -> dict[str, Any]:
    """A config.json that goes with the code of today."""
    recipe = {name: value for name, value in config[CONFIG_KEY].items() if name not in LAYOUT_KEYS}
    refreshed = {
        **config,
        "architectures": [architecture.model_class.__name__],
        "auto_map": architecture.auto_map,
        CONFIG_KEY: {**recipe, "version": VERSION},
        "transformers_weights": NATIVE_LOAD_HINT,
    }
    return {**refreshed, **for_older_readers(refreshed, scales_are_for)}


def refresh(directory: Path) -> Iterator[str]:
    """Put the code of this version into a converted directory, in the place of that which is there.

    Weights, their description and all other files stay as they are. Each file is replaced at once and in such an order
    that the directory works whenever the process is stopped: with the older code, or with this.

    Args:
        directory: a converted one, of this version or an older one.

    Yields:
        A line on each file that may have changed: what it was, and what it is.

    Raises:
        OctavoError: the directory is somebody else's, of a newer version, incomplete or damaged, or says of itself what
            this version does not know.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise OctavoError(f"{directory}: has no config.json, and so is no converted directory; name one")
    config = read_json(file)
    architecture = _architecture_of(directory, config)
    layout, runs_in = _layout_of(directory, architecture), engine_dtype(config, "")
    scales_are_for = _scales_are_for(layout, runs_in)
    yield from write_bundle(architecture, directory)
    refreshed = _refreshed(config, architecture, scales_are_for)
    was = config[CONFIG_KEY].get("version", _UNNAMED)
    if refreshed != config:
        put_file(file, json_text(refreshed))
    added = ", ".join(name for name in refreshed if name not in config)
    before = f"of {was} before{added and ', without '}{added}"
    yield f"{file}: Octavo {VERSION}; {'as it was' if refreshed == config else before}"
    if scales_are_for != runs_in:
        theirs, ours = (str(dtype).removeprefix("torch.") for dtype in (runs_in, scales_are_for))
        yield (
            f"deq_scale is {layout['deq_scale']}, as engines on Ascend read it of a model in {ours}, and dtype "
            f"{config.get('dtype')} makes vLLM run it in {theirs}: give it --dtype {ours}, or convert the model again"
        )
    yield "weights and all other files are untouched"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the directory."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="a converted directory")


def run(flags: argparse.Namespace) -> None:
    """Refresh the directory that the flags name, and print what became of each file.

    Raises:
        OctavoError: see `refresh`.
    """
    for line in refresh(flags.directory):
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Put code of this version into a directory that an older one converted; weights stay as they are."""
    parser = OneLineParser(prog=REFRESH, description=main.__doc__, allow_abbrev=False)
    add_flags(parser)
    flags = parser.parse_args(argv)
    return run_script(lambda _: run(flags), argv)


if __name__ == "__main__":
    sys.exit(main())
