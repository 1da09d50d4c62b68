"""What quantizing each part of a model costs, and which parts stay in float for it."""

from collections.abc import Iterable

import torch
from tqdm import tqdm

from ...command import aligned
from ..calibration.observe import InputObservers
from ..calibration.streams import Stream
from ..pipeline import Cost
from ..source.layerwise import LayerwiseModel
from ..weights.input_range import outlier_score

ROWS_SHOWN = 10
MOST_SAMPLES = 5
"""Calibration texts that outliers are looked for in, as in msmodelslim."""


def worst_outliers(
    source: LayerwiseModel, linears: list[str], samples: list[dict[str, torch.Tensor]], level: int
) -> list[str]:
    """The `level` linears of decoder layers whose inputs have the largest `max|x| / rms`.

    Args:
        linears: names of those that can be chosen.
        samples: `[1, S]` ids and masks.
    """
    if not level:
        return []
    stream, scores = Stream.of(source, samples[:MOST_SAMPLES]), {}
    for index in tqdm(range(len(source)), desc="looking for outliers", unit="layer"):
        with torch.no_grad(), source.layer(index) as layer:
            names = [name for name in linears if name.startswith(f"{source.layer_name(index)}.")]
            observers = InputObservers({name: source.model.get_submodule(name) for name in names})
            stream.hidden = stream.through(layer, index)
            scores |= {name: outlier_score(found) for name, found in observers.inputs().items()}
    return sorted(scores, key=lambda name: -scores[name])[:level]


def costliest(costs: Iterable[Cost]) -> list[Cost]:
    """Costs, the largest first."""
    return sorted(costs, key=lambda cost: -cost.error)


def cost_table(costs: list[Cost], floats: Iterable[str]) -> str:
    """The parts that cost most, those that stay in float among them, as a table."""
    floats = set(floats)
    shown = costliest(costs)[: max(ROWS_SHOWN, len(floats))]
    caption = (
        f"The {len(shown)} of {len(costs)} parts that cost most: relative squared error of the output of their layer "
        "on held-back tokens, once the part is quantized; beside it, how large the outliers of its input are."
    )
    rows = [["part", "error of the layer's output", "outliers: max|x| / rms", ""]]
    for cost in shown:
        outliers = "-" if cost.outliers is None else f"{cost.outliers:.1f}"
        rows.append([cost.name, f"{cost.error:.2e}", outliers, "stays in float" if cost.name in floats else ""])
    return "\n".join([caption, *aligned(rows)])
