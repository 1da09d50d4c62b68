"""What a layer may store: codings of K and of V apart, and the pairs of them that go into one layer."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import OctavoError
from ..common.runtime.schemes.kv_scheme import Scheme

_SHARED = ("prefill", "sinks", "window", "fold_bias")
"""Fields of a scheme in which K and V of one layer are alike."""
_OWN = {
    "key": ("key", "rotate_key", "smooth_key", "center_key", "key_basis"),
    "value": ("value", "rotate_value", "value_basis"),
}
"""Fields that K or V has for itself."""


@dataclass(frozen=True)
class Side:
    """A coding of K or of V.

    Attributes:
        part: "key" or "value".
        scheme: that codes this part and leaves the other in float.
    """

    part: str
    scheme: Scheme

    @property
    def identity(self) -> str:
        """What tells it from others: part, and all but the name."""
        return f"{self.part} {identity_of(self.scheme)}"


@dataclass(frozen=True)
class Option:
    """What a layer may store.

    Attributes:
        key, value: numbers of the sides.
        scheme: of the layer.
    """

    key: int
    value: int
    scheme: Scheme


def fields_of(scheme: Scheme) -> dict[str, Any]:
    """The fields of a scheme as plain data, but for its name and where it comes from."""
    return {name: value for name, value in scheme.to_dict().items() if name not in ("name", "origin")}


def identity_of(scheme: Scheme) -> str:
    """All of a scheme but its name, as text."""
    return json.dumps(fields_of(scheme), sort_keys=True)


def _check(scheme: Scheme) -> None:
    """Raise an `OctavoError` if a scheme is none whose sides can be put into any layer."""
    reason = None
    if scheme.layers or scheme.float_layers:
        reason = "has layers of its own; name schemes that are the same in all"
    elif scheme.is_static:
        reason = "needs calibration; name schemes that do not (octavo schemes)"
    elif scheme.key is None or scheme.value is None:
        reason = "leaves K or V in float; name schemes that code both"
    if reason is not None:
        raise OctavoError(f"--schemes {scheme.name}: {reason}")


def _side(part: str, scheme: Scheme, window: int) -> Side:
    fields = {name: getattr(scheme, name) for name in (*_SHARED, *_OWN[part])}
    return Side(part, Scheme(**{**fields, "name": scheme.name, "window": window}))


def sides_of(schemes: Sequence[Scheme], windows: Sequence[int] = ()) -> list[Side]:
    """K of each scheme and V of each, with the float window of the scheme and with others; each once.

    Args:
        windows: newest tokens in float.

    Raises:
        OctavoError: a scheme needs calibration, has layers of its own, or leaves K or V in float.
    """
    found: dict[str, Side] = {}
    for part in _OWN:
        for scheme in schemes:
            _check(scheme)
            for window in sorted({scheme.window, *windows}):
                side = _side(part, scheme, window)
                found.setdefault(side.identity, side)
    return list(found.values())


def options_of(sides: Sequence[Side]) -> list[Option]:
    """The pairs of K and V that one layer can store; K and V share sinks and the float window."""
    numbered = list(enumerate(sides))
    found = []
    for key_number, key in numbered:
        for value_number, value in numbered:
            if (key.part, value.part) == ("key", "value"):
                scheme = _pair(key.scheme, value.scheme)
                if scheme is not None:
                    found.append(Option(key_number, value_number, scheme))
    return found


def _pair(key: Scheme, value: Scheme) -> Scheme | None:
    """The scheme of both; None where they do not go together."""
    if any(getattr(key, name) != getattr(value, name) for name in _SHARED):
        return None
    name = key.name if key.name == value.name else f"K {key.name}, V {value.name}"
    own = {field: getattr(value, field) for field in _OWN["value"]}
    try:
        return dataclasses.replace(key, name=f"{name}, window {key.window}", **own)
    except OctavoError:  # groups of tokens that do not fit into one another
        return None


def layered(name: str, origin: str, layers: Sequence[Scheme]) -> Scheme:
    """One scheme whose layers store what `layers` says; the commonest stands outside, others in runs of layers."""
    plain = [fields_of(layer) for layer in layers]
    base = max(layers, key=lambda layer: plain.count(fields_of(layer)))
    runs: list[tuple[int, int, Scheme]] = []
    for index, layer in enumerate(layers):
        if runs and fields_of(runs[-1][2]) == fields_of(layer):
            runs[-1] = (runs[-1][0], index, layer)
        else:
            runs.append((index, index, layer))
    others = {
        str(first) if first == last else f"{first}-{last}": changed
        for first, last, layer in runs
        if (changed := _changed(base, layer))
    }
    return Scheme.from_dict({**fields_of(base), "name": name, "origin": origin, "layers": others})


def _changed(base: Scheme, layer: Scheme) -> dict[str, Any]:
    """The fields in which a layer differs, defaults written out where the base has others."""
    defaults = {part.name: part.default for part in dataclasses.fields(Scheme)}
    ours, theirs = fields_of(base), fields_of(layer)
    return {
        field: theirs.get(field, defaults[field])
        for field in {**ours, **theirs}
        if ours.get(field, defaults[field]) != theirs.get(field, defaults[field])
    }
