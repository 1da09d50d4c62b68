"""`octavo search MODEL --out DIR`: bits per layer, K and V apart, under a budget of bits, memory, time or KL."""

from ..searching.searching import add_flags, run

__all__ = ["add_flags", "run"]
