"""A scheme that was found beside uniform ones of no more bits, on text that the choice has not seen."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..common.convert.measure.fidelity import Fidelity
from ..common.errors import OctavoError
from ..common.runtime.cache.quantized_cache import QuantizedCache
from ..common.runtime.schemes.kv_scheme import PRESETS, Scheme, load_scheme
from ..evaluation.text import compare_on_text
from ..generate import Speaker
from ..wording import COMPARED
from .sides import identity_of
from .store import Store
from .targets import Costs

FEW = 2
"""Presets, and schemes of the search's own options, that are measured beside what was found."""
FOUND = "searched"


@dataclass(frozen=True)
class Row:
    """A scheme and what it loses.

    Attributes:
        name: of the scheme.
        bits: of an element of K and V.
        predicted: KL as the sum over its layers; None of schemes that are no choice of the search.
        fidelity: on held-out text.
        is_preset: whether it has a name of its own.
        is_uniform: whether all layers store the same.
    """

    name: str
    bits: float
    predicted: float | None
    fidelity: Fidelity
    is_preset: bool = False
    is_uniform: bool = True


def uniform_presets(costs: Costs, bits: float) -> list[Scheme]:
    """The presets of the most bits that are no more than `bits`, of those that need no calibration.

    What is there to be compared with is left out: much of it has its bits from layers in float.
    """
    found = []
    for scheme in map(load_scheme, (name for name in PRESETS if name not in COMPARED)):
        try:
            fits = scheme.is_quantized and not scheme.is_static and costs.bits(scheme) <= bits
        except OctavoError:  # groups that its heads do not fill
            continue
        if fits:
            found.append(scheme)
    return sorted(found, key=costs.bits)[-FEW:]


def uniform_choices(costs: Costs, bits: float, seconds: float | None = None) -> list[int]:
    """The options that lose least if every layer takes them, of no more than `bits`, or instead no more time."""
    layers = len(costs.losses)

    def fits(index: int) -> bool:
        if seconds is not None:
            return costs.predicted_seconds([index] * layers) <= seconds
        return costs.bits(costs.options[index].scheme) <= bits

    fit = filter(fits, range(len(costs.options)))
    return sorted(fit, key=lambda index: costs.predicted([index] * layers))[:FEW]


def rows_of(
    costs: Costs, chosen: Sequence[int], bits: float, reference: Speaker, samples: Sequence[torch.Tensor],
    store: Store, seconds: float | None = None,
) -> list[Row]:  # fmt: skip
    """What was found, first, and uniform schemes of no more than `bits`.

    Args:
        seconds: of a decode step: then schemes that take no more, instead, and no presets, which were not timed.
        reference: the float model.
        samples: windows of held-out token ids `[S]`.
        store: of what was measured before.
    """
    entries: dict[str, tuple[Scheme, str, float | None]] = {}
    for index in uniform_choices(costs, bits, seconds):
        scheme = costs.options[index].scheme
        entries[identity_of(scheme)] = scheme, scheme.name, costs.predicted([index] * len(costs.losses))
    presets = {identity_of(scheme): scheme for scheme in (uniform_presets(costs, bits) if seconds is None else ())}
    for identity, scheme in presets.items():
        _, _, predicted = entries.get(identity, (scheme, scheme.name, None))
        entries[identity] = scheme, scheme.name, predicted
    found = costs.scheme(chosen)
    entries[identity_of(found)] = found, FOUND, costs.predicted(chosen)
    rows = []
    for identity, (scheme, name, predicted) in entries.items():
        measured = store.figure("held out", identity, partial(_measured, reference, scheme, samples))
        is_uniform = not (scheme.layers or scheme.float_layers)
        rows.append(Row(name, costs.bits(scheme), predicted, Fidelity(**measured), identity in presets, is_uniform))
    return sorted(rows, key=lambda row: (row.name != FOUND, row.fidelity.kl))


def _measured(reference: Speaker, scheme: Scheme, samples: Sequence[torch.Tensor]) -> Mapping[str, float | int]:
    cache = partial(QuantizedCache, reference.model.config, scheme)
    other = dataclasses.replace(reference, scheme=scheme, new_cache=cache)
    return dataclasses.asdict(compare_on_text(reference, {FOUND: other}, samples)[FOUND])
