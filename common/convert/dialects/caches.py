"""What the formats can say of a KV cache: of which kind a scheme is, by the codecs of its layers."""

from ...runtime.schemes.kv_scheme import Scheme, load_scheme
from ...runtime.schemes.tensor_codec import Codec
from .form import Form

FLOAT, ONLINE = "float", "online"
FP8_TENSOR, FP8_HEAD, FP8_CHANNEL = "fp8 tensor", "fp8 head", "fp8 channel"
INT8_TENSOR, INT8_CHANNEL = "int8 tensor", "int8 channel"
INT4_TENSOR, INT4_CHANNEL = "int4 tensor", "int4 channel"
_STATIC = {
    ("fp8_e4m3", "tensor"): FP8_TENSOR,
    ("fp8_e4m3", "head"): FP8_HEAD,
    ("fp8_e4m3", "channel"): FP8_CHANNEL,
    ("int8", "tensor"): INT8_TENSOR,
    ("int8", "channel"): INT8_CHANNEL,
    ("int4", "tensor"): INT4_TENSOR,
    ("int4", "channel"): INT4_CHANNEL,
}


def quantized_layers(form: Form) -> list[Scheme]:
    """The schemes of the layers whose cache is quantized."""
    return [scheme for scheme in form.schemes() if scheme.key is not None or scheme.value is not None]


def _is_plain(codec: Codec | None) -> bool:
    """Whether a static codec is a symmetric one of uniform levels."""
    return codec is not None and codec.symmetric and not (codec.dynamic or codec.outliers or codec.before_rope)


def kind_of(form: Form, online: dict[str, str] | None = None) -> str | None:
    """How the cache of a form is quantized, if a format may say it; None where none can.

    Args:
        online: presets whose codes an engine makes by itself, by its own names of them.

    Returns:
        `FLOAT`, one of the static kinds, or `ONLINE`; of rotated, smoothed and segmented caches only the first.
    """
    layers = quantized_layers(form)
    if not layers:
        return FLOAT
    first = layers[0]
    if any((scheme.key, scheme.value, scheme.query) != (first.key, first.value, first.query) for scheme in layers):
        return None
    if online_name(first, online or {}) is not None:
        return ONLINE
    is_changed = first.is_segmented or first.rotate_key or first.rotate_value or first.smooth_key or first.has_bases
    if is_changed or first.key != first.value or not _is_plain(first.key):
        return None
    if first.query is not None and (first.query.dtype, first.query.granularity) != (
        first.key.dtype,
        first.key.granularity,
    ):
        return None
    return _STATIC.get((first.key.dtype, first.key.granularity))


def online_name(scheme: Scheme, online: dict[str, str]) -> str | None:
    """What an engine calls the way in which a layer's codes are made, if it makes them by itself."""
    for preset, name in online.items():
        other = load_scheme(preset)
        parts = ("key", "value", "query", "sinks", "window", "rotate_key", "rotate_value", "smooth_key",
                 "center_key", "key_basis", "value_basis")  # fmt: skip
        if all(getattr(scheme, part) == getattr(other, part) for part in parts):
            return name
    return None


def why_not(form: Form, says: str, instead: str) -> str:
    """A refusal of a cache that a format cannot say.

    Args:
        says: what it can.
        instead: arguments of the command that give such a cache.
    """
    return f"scheme {form.scheme.name}: the format says {says} alone; {instead}"


def static_scheme(form: Form, scheme: str) -> str:
    """The arguments of the command that give a cache of static scales."""
    return f"--scheme {scheme}" if form.calibrates else f"--scheme {scheme} --statistics FILE"


def leaves_biases_out(form: Form) -> str:
    """A refusal of static scales that leave biases out, as `Form.folds` says it."""
    return (
        f"scheme {form.scheme.name}: its scales are of K and V without the biases of their projections, which engines "
        "count in; give --statistics FILE, to derive them with the biases"
    )
