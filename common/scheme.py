"""What is quantized, and how: the numeric definition that everything else derives from.

Everywhere in this project a code stands for `x = (code - zero) * scale`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..ops.resources import resource
from .errors import OctavoError

GRANULARITIES = ("channel", "head", "token")
PREFILLS = ("codes", "float")
PRESETS = ("ascend-c8", "ascend-fa", "float", "int8-token")


@dataclass(frozen=True)
class Codec:
    """How one tensor of shape `[B, G, S, D]` is coded; symmetric, so that zero is 0.

    Attributes:
        dtype: type of the codes; "int8".
        granularity: what shares one scale: "channel" (a channel of a head), "head", or "token" (a token of a head).
        dynamic: scales come from each token itself (granularity "token"); otherwise they are static, from calibration.
    """

    dtype: str = "int8"
    granularity: str = "channel"
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "int8":
            raise OctavoError(f"codec: dtype {self.dtype!r} is not supported; use 'int8'")
        if self.granularity not in GRANULARITIES:
            raise OctavoError(f"codec: granularity {self.granularity!r} is none of {', '.join(GRANULARITIES)}")
        if self.dynamic != (self.granularity == "token"):
            raise OctavoError("codec: scales per token are dynamic and all others static; change 'dynamic'")


@dataclass(frozen=True)
class Scheme:
    """The codecs of q, k and v; None leaves a tensor in float.

    Attributes:
        name: name of the preset, or any name of your own.
        key, value: codecs of what the cache stores.
        query: codec of the queries; static per head, so that the attention itself runs in int8.
        prefill: "codes": every query attends to what is stored, its own tokens included, so that logits do not depend
            on how a prompt is cut. "float": the first pass attends to the float k and v, as Ascend's runtime does.
        float_layers: decoder layers whose attention and cache stay in float.
        origin: which system the scheme comes from.
    """

    name: str
    key: Codec | None = None
    value: Codec | None = None
    query: Codec | None = None
    prefill: str = "codes"
    float_layers: tuple[int, ...] = field(default=())
    origin: str = ""

    def __post_init__(self) -> None:
        if self.prefill not in PREFILLS:
            raise OctavoError(f"scheme {self.name}: prefill {self.prefill!r} is none of {', '.join(PREFILLS)}")
        if self.query is not None and self.query.granularity != "head":
            raise OctavoError(f"scheme {self.name}: q is quantized per head with static scales, or not at all")

    @property
    def is_static(self) -> bool:
        """Whether the scheme needs scales from a calibration."""
        return any(codec is not None and not codec.dynamic for codec in (self.key, self.value, self.query))

    def of_layer(self, layer: int) -> "Scheme":
        """The scheme of one layer: this one, or float where the layer is listed in `float_layers`."""
        return Scheme(name="float") if layer in self.float_layers else self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in a preset file or under `octavo.scheme` in a config.json."""
        return {**dataclasses.asdict(self), "float_layers": list(self.float_layers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """The inverse of `to_dict`.

        Raises:
            OctavoError: an unknown field or an unsupported value, named.
        """
        if not isinstance(data, dict) or "name" not in data:
            raise OctavoError("scheme: expected an object with at least a 'name'")
        unknown = set(data) - {part.name for part in dataclasses.fields(cls)}
        if unknown:
            raise OctavoError(f"scheme {data['name']}: unknown field {sorted(unknown)[0]!r}")
        codecs = {}
        for part in ("key", "value", "query"):
            try:
                codecs[part] = Codec(**data[part]) if data.get(part) is not None else None
            except TypeError as error:
                raise OctavoError(f"scheme {data['name']}: {part}: {error}") from None
        return cls(**{**data, **codecs, "float_layers": tuple(data.get("float_layers", ()))})


def load_scheme(scheme: "str | dict[str, Any] | Scheme") -> Scheme:
    """A scheme from the name of a preset, from plain data, or as it is.

    Raises:
        OctavoError: the name is no preset; the message lists them.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, dict):
        return Scheme.from_dict(scheme)
    if scheme not in PRESETS:
        raise OctavoError(f"scheme {scheme!r} is no preset; choose one of {', '.join(PRESETS)}")
    return Scheme.from_dict(json.loads(resource(f"common/presets/{scheme}.json")))
