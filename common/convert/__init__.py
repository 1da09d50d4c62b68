"""From a float checkpoint to a quantized one; nothing here travels with an output."""

from importlib import import_module
from typing import Any

PUBLIC = {"ConversionReport": "report", "ConvertRequest": "request", "convert": "api", "main": "api"}
"""Public names, and the modules that define them, each imported when a name is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(PUBLIC)
