"""What is quantized, and how: the numeric definition that everything else derives from.

Everywhere in this project a code stands for `x = (code - zero) * scale`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ops.shared.resources import resource
from ...errors import OctavoError, did_you_mean
from ..model_sizes import MOST_LAYERS
from ..strict_json import parse_json
from .preset_names import KV_CACHE_DTYPES, PRESETS
from .scheme_checks import check_scheme
from .tensor_codec import Codec, check_types

SMALLEST_STEP = 16
"""Tokens leave a float window so many at a time at least, so that a prompt is not cut into single queries."""
LONGEST_NAME = 100
CROP_ROOM = 64
"""How many of the newest tokens a cache can always forget again, unless it is told another number."""
_PARTS = ("key", "value", "query")


def _layers_of(text: str) -> range:
    """The layers that "3" or "0-1" names."""
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text) if isinstance(text, str) else None
    if found is None:
        raise OctavoError(f"scheme: layers {text!r} is no layer number and no range such as 0-1")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise OctavoError(f"scheme: layers {text!r} end before they begin")
    return range(first, last + 1)


@dataclass(frozen=True)
class Scheme:
    """The codecs of q, k and v, and what goes with them; a codec of None leaves a tensor in float.

    Attributes:
        name: name of the preset, or any name of your own.
        key, value: codecs of what the cache stores.
        query: codec of the queries; static per head or tensor, so that the attention itself runs in int8 or fp8.
        prefill: "codes": every query attends to what is stored, its own tokens included, so that logits do not depend
            on how a prompt is cut. "float": the first pass attends to the float k and v, as Ascend's runtime does.
        float_layers: decoder layers whose attention and cache stay in float; -1 is the last one of a model.
        layers: other schemes for some layers, by "3" or "0-1": name of a preset, or the fields that differ.
        sinks: tokens at the start of a sequence that stay in 16-bit floats; padding at the left counts as such.
        window: at least this many of the newest tokens stay in 16-bit floats (residual window).
        rotate_key: q and k are multiplied by a Hadamard matrix, which leaves q . k and spreads outlier channels.
        rotate_value: likewise v; the output is rotated back.
        smooth_key: k is stored less the mean of the first pass of each sequence, which no softmax notices; so codes
            depend on how long that pass is.
        center_key: k is stored less the mean that calibration found before RoPE, turned to each token's slot, which
            comes back exactly in attention.
        key_basis: k is stored, per KV head, in the basis that calibration found, and q is given that of its dual, which
            leaves q . k: "balanced" spreads the error over what queries ask for and keys hold (`bases.py`), "oscar"
            is the rotation of OSCAR by the queries' covariance; "" leaves channels as they are.
        value_basis: likewise v, "oscar" by the covariance of values that are attended to; the output is turned back.
        sharp_share: the part of the layers, one at least, whose K has wider codes: those that calibration found to need
            exact keys most where a text repeats itself (`sharpness.py`).
        sharp_dtype: the type of these wider codes: int3, int4 or int8.
        fold_bias: where the model allows, biases of k and v are left out of the cache and come back exactly in
            attention (`bias_fold.py`). Ascend's formats count them in.
        origin: which system the scheme comes from, and what it rests on.
    """

    name: str
    key: Codec | None = None
    value: Codec | None = None
    query: Codec | None = None
    prefill: str = "codes"
    float_layers: tuple[int, ...] = field(default=())
    layers: tuple[tuple[str, Any], ...] = field(default=())
    sinks: int = 0
    window: int = 0
    rotate_key: bool = False
    rotate_value: bool = False
    smooth_key: bool = False
    center_key: bool = False
    key_basis: str = ""
    value_basis: str = ""
    sharp_share: float = 0.0
    sharp_dtype: str = "int8"
    fold_bias: bool = True
    origin: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or len(self.name) > LONGEST_NAME:
            raise OctavoError(f"scheme: name {self.name!r} is no text of {LONGEST_NAME} characters at most")
        check_types(f"scheme {self.name}", self)
        for index in self.float_layers:
            if type(index) is not int or not -MOST_LAYERS <= index < MOST_LAYERS:
                raise OctavoError(f"scheme {self.name}: float_layers {index!r} is no layer number")
        check_scheme(self)
        for text, other in self.layers:
            _layers_of(text)
            if isinstance(other, str):
                if _preset(other).float_layers:
                    raise OctavoError(
                        f"scheme {self.name}: layers {text}: {other} leaves layers of its own in float; give its other "
                        "fields as an object"
                    )
            elif isinstance(other, dict) and not {"layers", "float_layers"} & other.keys():
                self._changed(other)
            else:
                raise OctavoError(
                    f"scheme {self.name}: layers {text}: a preset's name or an object of fields without layers of its "
                    f"own, not {other!r}"
                )

    def _some_codec(self, holds: Callable[[Codec], bool]) -> bool:
        """Whether something holds of a codec of any layer."""
        if any(codec is not None and holds(codec) for codec in (self.key, self.value, self.query)):
            return True
        return any(layer._some_codec(holds) for layer in self._others())

    @property
    def is_quantized(self) -> bool:
        """Whether the scheme quantizes anything."""
        return self._some_codec(lambda codec: True)

    @property
    def is_static(self) -> bool:
        """Whether the scheme needs a calibration."""
        return self.has_bases or bool(self.sharp_share) or self.has_ranges

    @property
    def has_ranges(self) -> bool:
        """Whether the calibration has to see all texts, for ranges of q, K or V, or for codebooks."""
        return self._some_codec(lambda codec: codec.is_calibrated)

    @property
    def has_bases(self) -> bool:
        """Whether the calibration has to find the mean of K, or bases."""
        own = self.center_key or bool(self.key_basis or self.value_basis)
        return own or any(layer.has_bases for layer in self._others())

    @property
    def has_codebooks(self) -> bool:
        """Whether the calibration has to fit codebooks."""
        return self._some_codec(lambda codec: codec.levels == "calibrated")

    @property
    def needs_whole(self) -> bool:
        """Whether the calibration needs the whole model in memory: for codebooks, bases or which layers are sharp."""
        return self.has_codebooks or self.has_bases or bool(self.sharp_share)

    @property
    def is_segmented(self) -> bool:
        """Whether some tokens are stored in float beside the codes: sinks, a window, groups of tokens not yet full."""
        return bool(self.sinks or self.window) or self.step(self.key) > 1 or self.step(self.value) > 1

    @property
    def layers_named(self) -> int:
        """How many layers a model must have for `layers` and `float_layers` to mean something."""
        floats = [index if index >= 0 else -1 - index for index in self.float_layers]
        return 1 + max([-1, *floats, *(_layers_of(text)[-1] for text, _ in self.layers)])

    @property
    def is_compileable(self) -> bool:
        """Whether single ops write and read what a layer stores, so that one graph serves every step."""
        layers = [self, *self._others()]
        codecs = [codec for layer in layers for codec in (layer.key, layer.value) if codec is not None]
        is_whole = not any(layer.is_segmented or layer.smooth_key or layer.center_key for layer in layers)
        return is_whole and all(codec.is_one_op for codec in codecs)

    def step(self, codec: Codec | None) -> int:
        """How many tokens become codes at a time; 1 where they do at once."""
        if codec is None:
            return 1
        return math.lcm(SMALLEST_STEP, codec.token_group) if self.window else codec.token_group

    def is_delayed(self, codec: Codec | None) -> bool:
        """Whether tokens become codes later than they come, so that a crop needs floats of tokens that are codes."""
        return codec is not None and (self.window > 0 or self.step(codec) > 1)

    def coded(self, codec: Codec | None, tokens: int) -> int:
        """How many of the first `tokens` tokens, the sinks not counted, are codes and no longer in a float window."""
        step = self.step(codec)
        return max(0, tokens - self.sinks - self.window) // step * step

    def _changed(self, fields: dict[str, Any]) -> "Scheme":
        return Scheme.from_dict({**self.to_dict(), "layers": {}, "float_layers": [], "sharp_share": 0.0, **fields})

    def _other(self, stated: str | dict[str, Any]) -> "Scheme":
        """What `layers` states of some layers."""
        return _preset(stated) if isinstance(stated, str) else self._changed(stated)

    def _others(self) -> list["Scheme"]:
        """What `layers` states of layers that are not float anyway."""
        floats = set(self.float_layers)
        return [self._other(stated) for text, stated in self.layers if not floats.issuperset(_layers_of(text))]

    def of_model(self, layers: int) -> "Scheme":
        """The same for a model of so many layers, of which none is counted from the end.

        Raises:
            OctavoError: it names a layer that the model has not.
        """
        if self.layers_named > layers:
            raise OctavoError(
                f"scheme {self.name}: names layers that only a model of {self.layers_named} or more has; this one has "
                f"{layers}"
            )
        if all(index >= 0 for index in self.float_layers):
            return self
        return dataclasses.replace(self, float_layers=tuple(sorted({index % layers for index in self.float_layers})))

    def of_layer(self, layer: int) -> "Scheme":
        """The scheme of one layer: this one, float where `float_layers` lists it, or what `layers` says of it.

        Raises:
            ValueError: some layers are counted from the end: ask the scheme that `of_model` gives. Calibration has not
                said yet which are sharp: ask what `settled` or `counted` gives.
        """
        if any(index < 0 for index in self.float_layers):
            raise ValueError(f"scheme {self.name}: float_layers {self.float_layers} are those of no model yet")
        if self.sharp_share:
            raise ValueError(f"scheme {self.name}: it is not known yet which layers are sharp")
        if layer in self.float_layers:
            return Scheme(name="float")
        for text, stated in self.layers:
            if layer in _layers_of(text):
                return self._other(stated)
        return self if not (self.layers or self.float_layers) else self._changed({})

    def sharp_layers(self, layers: int) -> int:
        """How many of so many layers have a K in wider codes."""
        return max(1, int(self.sharp_share * layers + 1e-6)) if self.sharp_share else 0

    def with_sharp(self, layers: Iterable[int]) -> "Scheme":
        """The same with the wider codes for K of these layers, stated as `layers`."""
        wider = self.key.widened(self.sharp_dtype).to_dict()
        stated = tuple((str(layer), {"key": wider}) for layer in sorted(layers))
        return dataclasses.replace(self, sharp_share=0.0, sharp_dtype="int8", layers=stated)

    def counted(self, layers: int, windows: Sequence[int | None] | None = None) -> "Scheme":
        """What takes the bits of this scheme in a model of so many layers, before calibration says which are sharp.

        Args:
            windows: of the layers, as `sliding_windows` gives them. Those that see all count as sharp first, so that
                a cache with other sharp layers is not larger.
        """
        resolved = self.of_model(layers)
        if not self.sharp_share:
            return resolved
        coded = [layer for layer in range(layers) if layer not in set(resolved.float_layers)]
        if windows is not None:
            coded.sort(key=lambda layer: windows[layer] is not None)
        return resolved.with_sharp(coded[: self.sharp_layers(layers)])

    def with_scales_of_one(self) -> "Scheme":
        """This scheme with 1 for every static scale, which needs no calibration.

        Raises:
            OctavoError: a codec whose codes are no fp8, or one with a codebook; static scales of single layers.
        """
        changed = {}
        for part in _PARTS:
            codec = getattr(self, part)
            if codec is not None and codec.is_calibrated:
                if not codec.dtype.startswith("fp8"):
                    raise OctavoError(
                        f"scheme {self.name}: scales of 1 make sense for fp8, and {part} is {codec.dtype}"
                    )
                changed[part] = dataclasses.replace(codec, granularity="tensor", fixed_scale=1.0)
        result = dataclasses.replace(self, **changed)
        if result.has_bases or result.sharp_share:
            what = "bases of K and V" if result.has_bases else "sharp layers"
            raise OctavoError(f"scheme {self.name}: the {what} come from texts; there are none of 1")
        if result.is_static:
            raise OctavoError(f"scheme {self.name}: 'layers' names static scales of its own; say 'fixed_scale' there")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in a preset file or under `octavo.scheme` in a config.json; defaults left out."""
        result: dict[str, Any] = {"name": self.name}
        for part in dataclasses.fields(self)[1:]:
            value = getattr(self, part.name)
            if value == part.default:
                continue
            is_codec = part.name in _PARTS
            result[part.name] = value.to_dict() if is_codec else dict(value) if part.name == "layers" else value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in result.items()}

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
        for part in _PARTS:
            try:
                codecs[part] = Codec(**data[part]) if data.get(part) is not None else None
            except TypeError as error:
                raise OctavoError(f"scheme {data['name']}: {part}: {error}") from None
        layers = data.get("layers", {})
        if not isinstance(layers, dict):
            raise OctavoError(f'scheme {data["name"]}: \'layers\' is an object such as {{"0-1": "int8-token"}}')
        floats = data.get("float_layers", [])
        if not isinstance(floats, (list, tuple)):
            raise OctavoError(f"scheme {data['name']}: 'float_layers' is a list of layer numbers, not {floats!r}")
        return cls(**{**data, **codecs, "layers": tuple(layers.items()), "float_layers": tuple(floats)})


def _preset(name: Any) -> Scheme:
    """The scheme of the name of a preset, or of a `kv_cache_dtype` of vLLM."""
    known = KV_CACHE_DTYPES.get(name, name) if isinstance(name, str) else None
    if known not in PRESETS:
        nearest = did_you_mean(name, PRESETS)
        raise OctavoError(f"no scheme {name!r}{nearest or ';'} (there are {', '.join(PRESETS)}, or FILE.json)")
    return Scheme.from_dict(json.loads(resource(f"common/runtime/schemes/presets/{known}.json")))


def _read_scheme(file: Path) -> Scheme:
    """A scheme from a JSON file."""
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OctavoError(f"scheme {file}: is no JSON file that can be read ({error})") from None
    if not isinstance(data, dict) or "name" not in data:
        raise OctavoError(f"scheme {file}: holds no scheme, which is an object with at least a 'name'")
    return Scheme.from_dict(data)


def load_scheme(scheme: "str | Path | dict[str, Any] | Scheme") -> Scheme:
    """A scheme from the name of a preset, a `kv_cache_dtype` of vLLM or a JSON file, from plain data, or as it is.

    Raises:
        OctavoError: there is no scheme of that name; the message lists them. The file holds no scheme.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, dict):
        return Scheme.from_dict(scheme)
    if str(scheme).endswith(".json"):
        return _read_scheme(Path(scheme))
    return _preset(scheme)


def bits_per_element(scheme: Scheme, heads: int, width: int, length: int = 2048, crop_room: int = 0) -> float:
    """Bits that an element of K and V takes, everything counted, in sequences of `length` tokens.

    Codes, scales, zeros, outliers and codebooks; sinks and the float window in 16 bits, the window at its mean size.
    Means and bases (`center_key`, `key_basis`, `value_basis`) count as weights of the model, and not here.

    Args:
        heads, width: G and D.
        crop_room: of the cache; 0 counts what the scheme itself needs. Where tokens become codes later than they come,
            so many are kept in 16 bits beside their codes.
    """
    total = 0.0
    for codec in (scheme.key, scheme.value):
        if codec is None:
            total += 16.0
            continue
        floats = min(length, scheme.sinks + scheme.window + (scheme.step(codec) - 1) / 2)
        constants = codec.constant_bits(heads, width) / (length * heads * width)
        beside = min(crop_room, length - floats) if scheme.is_delayed(codec) else 0
        total += (16 * (floats + beside) + codec.token_bits(width) * (length - floats) / width) / length + constants
    return total / 2
