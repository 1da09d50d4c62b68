"""Axes of a plot: which numbers stand where, linear or by their logarithms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 5.0, 10.0)
FEW = 5
"""Ticks of an axis, about."""


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`.

    Attributes:
        label: what it says, with the unit.
        is_log: whether decades are as wide as each other.
        ticks: numbers that are written at it, and what is written.
    """

    label: str
    low: float
    high: float
    is_log: bool
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Where a value stands: 0 at the low end, 1 at the high one."""
        low, high, value = (math.log10(x) if self.is_log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)


def linear(label: str, values: Sequence[float], most: float | None = None) -> Axis:
    """An axis from 0 to a round number that no value exceeds, or to `most`."""
    top = max(*values, 0.0, most or 0.0) or 1.0
    raw = top / FEW
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in STEPS if factor * unit >= raw * (1 - 1e-9))
    count = math.ceil(top / step - 1e-9)
    high = most if most is not None else count * step
    ticks = tuple((index * step, f"{index * step:,.6g}") for index in range(count + 1) if index * step <= high + 1e-12)
    return Axis(label, 0.0, high, False, ticks)


def logarithmic(label: str, values: Sequence[float], at: Sequence[float] = ()) -> Axis:
    """An axis of positive values, with room at both ends.

    Args:
        at: where its ticks are, as far as there is room; those of decades, or of their parts, unless given.
    """
    low, high = min(values), max(values)
    room = (high / low) ** 0.06 if high > low else 2.0
    low, high = low / room, high * room
    found = [value for value in (at or _decades(low, high)) if low <= value <= high]
    return Axis(label, low, high, True, tuple((value, _short(value)) for value in found[:: -(-len(found) // 8) or 1]))


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if math.log10(high / low) > 2.5 else (1.0, 2.0, 5.0)
    return [factor * 10.0**power for power in range(first, last + 1) for factor in factors]


def _short(value: float) -> str:
    if value >= 1024 and value == int(value) and value % 1024 == 0:
        return f"{int(value) // 1024}k"
    return f"{value:,.6g}" if 1e-3 <= value < 1e6 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
