"""What is quantized, and how: the numeric definition that everything else derives from.

Everywhere in this project a code stands for `x = (code - zero) * scale`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops.resources import resource
from .errors import OctavoError

CODE_DTYPES = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Types of codes, and the dtype of the tensors that hold them (`ops/codes.py`)."""
GRANULARITIES = ("channel", "head", "token")
PREFILLS = ("codes", "float")
PRESETS = ("ascend-c8", "ascend-fa", "float", "fp8-token", "int4-token", "int8-token")


@dataclass(frozen=True)
class Codec:
    """How one tensor of shape `[B, G, S, D]` is coded.

    Attributes:
        dtype: type of the codes: "int8", "int4", "fp8_e4m3" or "fp8_e5m2".
        granularity: what shares one scale: "channel" (a channel of a head), "head", or "token" (a token of a head).
        dynamic: scales come from each token itself (granularity "token"); otherwise they are static, from calibration.
        symmetric: zero is 0; otherwise each scale has a zero point beside it (dynamic integers only).
        group_size: channels of a token that share one scale (dynamic only); 0 is all of a head.
    """

    dtype: str = "int8"
    granularity: str = "channel"
    dynamic: bool = False
    symmetric: bool = True
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in CODE_DTYPES:
            raise OctavoError(f"codec: dtype {self.dtype!r} is none of {', '.join(CODE_DTYPES)}")
        if self.granularity not in GRANULARITIES:
            raise OctavoError(f"codec: granularity {self.granularity!r} is none of {', '.join(GRANULARITIES)}")
        if self.dynamic != (self.granularity == "token"):
            raise OctavoError("codec: scales per token are dynamic and all others static; change 'dynamic'")
        if not self.symmetric and (not self.dynamic or self.dtype.startswith("fp8")):
            raise OctavoError("codec: only dynamic int8 and int4 have zero points; leave 'symmetric' at true")
        if self.group_size < 0 or (self.group_size and not self.dynamic):
            raise OctavoError(
                "codec: 'group_size' is a number of channels that share a dynamic scale; 0 is a whole head"
            )

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the tensor that holds the codes."""
        return CODE_DTYPES[self.dtype]

    def stored_width(self, width: int) -> int:
        """Columns of the tensor that holds codes of `width` channels."""
        return width // 2 if self.dtype == "int4" else width

    def channel_groups(self, width: int) -> int:
        """Dynamic scales of one token and head of `width` channels.

        Raises:
            OctavoError: the group size does not divide the head.
        """
        if self.group_size and width % self.group_size:
            raise OctavoError(f"codec: groups of {self.group_size} channels do not divide a head of {width}")
        return width // self.group_size if self.group_size else 1

    def token_bytes(self, width: int) -> int:
        """Bytes of one token of one head of `width` channels, float32 scales and zeros of its own included."""
        parts = self.channel_groups(width) * (1 if self.symmetric else 2) if self.dynamic else 0
        return self.stored_width(width) + 4 * parts


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
        if self.query is not None:
            key_dtype = self.key.dtype if self.key else ""
            if self.query.dtype != (key_dtype if key_dtype.startswith("fp8") else "int8"):
                raise OctavoError(f"scheme {self.name}: q is quantized to the fp8 type of K, or else to int8")

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
