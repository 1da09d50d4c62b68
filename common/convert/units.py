"""Linears that engines load as one, which are in codes together or not at all: q, k and v; gate and up; experts."""

from collections.abc import Iterable

from .source.layerwise import LayerwiseModel


def units_of(source: LayerwiseModel) -> list[tuple[str, ...]]:
    """Names of the linears of each unit that has several, layer by layer; those of a layer's experts are one."""
    units = []
    for index in range(len(source)):
        experts = source.experts_in(index)
        mlps = source.facts.mlps(experts)
        inner = [part for mlp in mlps for part in (*mlp.inputs, mlp.down)] if experts else mlps[0].inputs
        parts = source.facts.attention.inputs, inner
        units += [tuple(f"{source.layer_name(index)}.{part}" for part in unit) for unit in parts]
    return [unit for unit in units if len(unit) > 1]


def grouped(names: Iterable[str], units: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Names in the order in which they come, each with those of its unit that are among them."""
    unit_of = {name: unit for unit in units for name in unit}
    names = list(names)
    known = set(names)
    groups = (tuple(part for part in unit_of.get(name, (name,)) if part in known) for name in names)
    return list(dict.fromkeys(groups))
