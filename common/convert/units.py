"""Linears that engines load as one, which are in codes together or not at all: q, k and v; gate and up."""

from collections.abc import Iterable

from .source.layerwise import LayerwiseModel


def units_of(source: LayerwiseModel) -> list[tuple[str, ...]]:
    """Names of the linears of each unit that has several, layer by layer."""
    units = []
    for index in range(len(source)):
        facts = (source.facts.attention, *source.facts.mlps(source.experts_in(index)))
        units += [tuple(f"{source.layer_name(index)}.{part}" for part in fact.inputs) for fact in facts]
    return [unit for unit in units if len(unit) > 1]


def grouped(names: Iterable[str], units: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Names in the order in which they come, each with those of its unit that are among them."""
    unit_of = {name: unit for unit in units for name in unit}
    names = list(names)
    known = set(names)
    groups = (tuple(part for part in unit_of.get(name, (name,)) if part in known) for name in names)
    return list(dict.fromkeys(groups))
