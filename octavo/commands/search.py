"""`octavo search MODEL --out DIR`: bits per layer, K and V apart, under a budget of bits, of memory or of KL."""

from ..searching.searching import add_flags, run

__all__ = ["add_flags", "run"]
