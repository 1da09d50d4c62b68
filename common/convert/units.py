"""Linears that engines load as one, which are in codes together or not at all: q, k and v; gate and up; experts."""

from collections.abc import Iterable

from ..runtime.decoder import Decoder
from .source.layerwise import LayerwiseModel


def units_of_layer(layer: str, decoder: Decoder, experts: int = 0) -> list[tuple[str, ...]]:
    """Names of the linears of each unit that has several, of a layer with so many experts, all of which are one."""
    mlps = decoder.mlps(experts)
    inner = [part for mlp in mlps for part in (*mlp.inputs, mlp.down)] if experts else mlps[0].inputs
    units = (decoder.attention.inputs, inner)
    return [tuple(f"{layer}.{part}" for part in unit) for unit in units if len(unit) > 1]


def units_of(source: LayerwiseModel) -> list[tuple[str, ...]]:
    """The units of all layers of a model."""
    layers = ((source.layer_name(index), source.experts_in(index)) for index in range(len(source)))
    return [unit for layer, experts in layers for unit in units_of_layer(layer, source.facts, experts)]


def grouped(names: Iterable[str], units: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Names in the order in which they come, each with those of its unit that are among them."""
    unit_of = {name: unit for unit in units for name in unit}
    names = list(names)
    known = set(names)
    groups = (tuple(part for part in unit_of.get(name, (name,)) if part in known) for name in names)
    return list(dict.fromkeys(groups))
