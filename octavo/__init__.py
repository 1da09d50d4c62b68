"""Octavo: quantized KV caches, quantized attention and quantized linears for models of transformers.

from octavo import ConvertRequest, QuantizedCache, convert, prepare
"""

from typing import Any

from .common import PUBLIC, public_name

__all__ = sorted(PUBLIC)


def __getattr__(name: str) -> Any:
    return public_name(name, __name__)


def __dir__() -> list[str]:
    return __all__
