"""Which linears have the worst outliers, and stay in float for it."""

import torch
from tqdm import tqdm

from ..calibration.observe import InputObservers
from ..calibration.streams import Stream
from ..source.layerwise import LayerwiseModel
from ..weights.input_range import outlier_score

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
