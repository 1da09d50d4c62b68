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
    source: LayerwiseModel, groups: list[tuple[str, ...]], samples: list[dict[str, torch.Tensor]], level: int
) -> list[str]:
    """The linears of decoder layers in the `level` groups whose inputs have the largest `max|x| / rms`.

    Args:
        groups: names of those that can be chosen, together with what shares their inputs.
        samples: `[1, S]` ids and masks.
    """
    if not level:
        return []
    stream, scores = Stream.of(source, samples[:MOST_SAMPLES]), {}
    for index in tqdm(range(len(source)), desc="looking for outliers", unit="layer"):
        with torch.no_grad(), source.layer(index) as layer:
            prefix = f"{source.layer_name(index)}."
            names = [name for group in groups for name in group if name.startswith(prefix)]
            observers = InputObservers({name: source.model.get_submodule(name) for name in names})
            stream.hidden = stream.through(layer, index)
            scores |= {name: outlier_score(found) for name, found in observers.inputs().items()}
    known = {group: [scores[name] for name in group if name in scores] for group in groups}  # not of all experts
    worst = sorted((group for group in known if known[group]), key=lambda group: -max(known[group]))[:level]
    return [name for group in worst for name in group]
