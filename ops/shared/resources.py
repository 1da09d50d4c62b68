"""Texts that travel with the code, C sources and presets: read from the tree or, in a bundle, out of the file."""

from pathlib import Path

EMBEDDED: dict[str, str] = {}
"""Filled by the bundler: name to text."""


def resource(name: str) -> str:
    """The text of a file named relative to the root of the package, as `ops/attention/attention.c`."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    return (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
