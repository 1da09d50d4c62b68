"""docs/formats.md out of what the writers state."""

import sys
from collections.abc import Sequence

from ..request import OWN_FORMAT
from .dialect import NAMES, PARSED, RUN, Engine
from .table import DIALECTS, OWN_ENGINES

COMMAND = "python -m octavo.common.convert.dialects.document > docs/formats.md"
_LEVELS = {
    RUN: "the engine itself loaded what is written here and generated from it",
    PARSED: "its own code read the config and took the names; nothing was generated",
    NAMES: "names, dtypes and shapes are those that its source or its documents state",
}


def _rows(engines: Sequence[Engine]) -> list[str]:
    lines = ["| engine | versions | tried | reads |", "|---|---|---|---|"]
    lines += [f"| {engine.name} | {engine.versions} | {engine.level} | {engine.reads} |" for engine in engines]
    beware = [f"Beware, {engine.name}: {engine.beware}." for engine in engines if engine.beware]
    return [*lines, *(part for line in beware for part in ("", line))]


def document() -> str:
    """The text of docs/formats.md."""
    lines = [
        "# Formats",
        "",
        f"Made by `{COMMAND}` out of what the writers in `common/convert/dialects/` state; a test holds it to that.",
        "",
        "A conversion writes any of these by `--format NAME`; a converted directory is written in another one by",
        "`python -m octavo.rewrite --model_path DIR --format NAME --save_directory OUT`, without calibrating again.",
        "With `--statistics FILE`, of `--save_statistics` of the conversion, and `--scheme NAME` the KV cache may be",
        "another one than the directory's. What a format cannot say is refused, with the nearest that works.",
        "",
        "How far an engine was tried:",
        "",
        *(f"* **{level}**: {meaning}" for level, meaning in _LEVELS.items()),
        "",
        f"## {OWN_FORMAT}",
        "",
        "What a conversion writes unless told otherwise: Ascend's description and tensors, and our modeling file.",
        "",
        *_rows(OWN_ENGINES),
    ]
    for dialect in DIALECTS.values():
        lines += ["", f"## {dialect.name}", "", f"It is {dialect.about}.", ""]
        lines += _rows(dialect.engines)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
