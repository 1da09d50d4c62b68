"""What quantizing one part of a model alone costs."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...command import aligned
from ..units import grouped

ROWS_SHOWN = 10


@dataclass(frozen=True)
class Cost:
    """What quantizing one linear or attention alone costs, measured.

    Attributes:
        name: of the module.
        outliers: `max|x| / rms` of its input; None of an attention.
        error: mean over tokens of `|difference|^2 / |output|^2` at the output of its decoder layer.
    """

    name: str
    outliers: float | None
    error: float


def costliest(costs: Iterable[Cost]) -> list[Cost]:
    """Costs, the largest first."""
    return sorted(costs, key=lambda cost: -cost.error)


def costliest_units(costs: Iterable[Cost], units: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Names of what is quantized together, of each unit and else one by one, that of the largest errors first.

    Errors of a unit's parts count as independent ones, and add up.
    """
    errors = {cost.name: cost.error for cost in costs}
    return sorted(grouped(errors, units), key=lambda group: -sum(errors[name] for name in group))


def cost_table(costs: list[Cost], floats: Iterable[str], units: Iterable[tuple[str, ...]] = ()) -> str:
    """The parts that cost most, those that stay in float among them, as a table; those of a unit behind one another."""
    floats, by_name = set(floats), {cost.name: cost for cost in costs}
    ordered = [by_name[name] for group in costliest_units(costs, units) for name in group]
    shown = ordered[: max(ROWS_SHOWN, len(floats))]
    caption = (
        f"The {len(shown)} of {len(costs)} parts that cost most: relative squared error of the output of their layer "
        "on held-back tokens, once the part is quantized; beside it, how large the outliers of its input are."
    )
    rows = [["part", "error of the layer's output", "outliers: max|x| / rms", ""]]
    for cost in shown:
        outliers = "-" if cost.outliers is None else f"{cost.outliers:.1f}"
        rows.append([cost.name, f"{cost.error:.2e}", outliers, "stays in float" if cost.name in floats else ""])
    return "\n".join([caption, *aligned(rows)])


def relative_error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean over tokens of `|found - expected|^2 / |expected|^2`."""
    pairs = zip(expected, found, strict=True)
    ratios = [((b - a).square().sum(dim=-1) / a.square().sum(dim=-1).clamp_min(1e-30)).flatten() for a, b in pairs]
    return float(torch.cat(ratios).mean())
