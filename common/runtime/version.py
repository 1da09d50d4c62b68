"""Which version of Octavo this is, and which one wrote a directory."""

import re
from typing import Any

from ..errors import OctavoError

VERSION = "0.1.0"
"""As in pyproject.toml; config.json has it, under `octavo`, as that of what wrote the code beside it."""
REFRESH = "python -m octavo.refresh"
"""The command that puts code of today into a directory."""
RECIPE_KEYS = ("scheme", "cpu_activations", "version")
"""What stands under `octavo` in a config.json that is written."""


def _number(version: Any) -> tuple[int, ...] | None:
    """The number of a version, which those of its releases come in the order of; None if it is none."""
    found = re.match(r"\d+(\.\d+)*(?=$|[.+-]?[a-z])", version) if isinstance(version, str) else None
    return None if found is None else tuple(map(int, found[0].split(".")))


def check_version(where: str, recipe: dict[str, Any], known: tuple[str, ...] = RECIPE_KEYS) -> None:
    """Raise an `OctavoError` if a directory is of a newer version than this, or says of itself what this does not know.

    Args:
        where: the directory, for the message.
        recipe: what its config.json holds under `octavo`; the first directories name no version.
        known: entries that there may be.
    """
    version = recipe.get("version", VERSION)
    number = _number(version)
    if number is None:
        raise OctavoError(f"{where}: octavo.version in config.json is {version!r}, which is no version; convert again")
    if number > _number(VERSION):
        raise OctavoError(
            f"{where}: was written by Octavo {version}, and this is {VERSION}; install that version, or load the "
            "directory with its own code (trust_remote_code=True)"
        )
    for name in recipe:
        if name not in known:
            raise OctavoError(
                f"{where}: octavo.{name} in config.json is unknown to Octavo {VERSION}, which wrote this code; install "
                f"the version that wrote it, and run {REFRESH} {where} there"
            )
