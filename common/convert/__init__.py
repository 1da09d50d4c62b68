"""From a float checkpoint to a quantized one; nothing here travels with an output."""

from .api import convert, main

__all__ = ["convert", "main"]
