"""What all architectures share; the public names, each imported when it is first asked for.

`from octavo import NAME` and `from octavo.common import NAME` give the same objects.
"""

from importlib import import_module
from typing import Any

from .moved import serve_old_names

PUBLIC = {
    "OctavoError": "errors",
    "QuantizedCache": "runtime.cache.quantized_cache",
    "kv_bits_per_element": "runtime.cache.sizes",
    "kv_bytes_per_token": "runtime.cache.sizes",
    "prepare": "prepare",
    "Scheme": "runtime.schemes.kv_scheme",
    "PRESETS": "runtime.schemes.kv_scheme",
    "load_scheme": "runtime.schemes.kv_scheme",
    "Codec": "runtime.schemes.tensor_codec",
    "Statistics": "runtime.static_scales",
    "load_statistics": "runtime.static_scales",
    "convert": "convert.api",
    "diagnose": "doctor.diagnosis",
}
"""Public names, and the modules that define them."""


def public_name(name: str, asked: str) -> Any:
    """The object of a public name.

    Args:
        name: what is asked for.
        asked: the package that was asked, for the message.

    Raises:
        AttributeError: there is no such public name.
    """
    if name not in PUBLIC:
        raise AttributeError(f"module {asked!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __getattr__(name: str) -> Any:
    return public_name(name, __name__)


def __dir__() -> list[str]:
    return sorted(PUBLIC)


serve_old_names(__name__)
