"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them, of both versions."""

from typing import Any

from ....errors import OctavoError
from ....runtime.checkpoint.files import TensorHeader
from ...dialects.layouts.gptq import BITS, FIRST, PARTS, SECOND, bits_of, unpack_gptq
from ...dialects.layouts.words import words_of
from .weight import CodedLinear, CodedWeight, Read, mixed_order, sound_scale, sound_zero, weight_only_label


def read_gptq(
    where: str, config: dict[str, Any], headers: dict[str, TensorHeader], read: Read
) -> dict[str, CodedLinear]:
    """The linears in codes, by name; as of `read_awq`."""
    version = config.get("checkpoint_format") or FIRST
    if version not in (FIRST, SECOND) or config.get("is_marlin_format"):
        found = "marlin" if config.get("is_marlin_format") else version
        raise OctavoError(f"{where}: checkpoint_format is {found!r}; Octavo reads {FIRST!r} and {SECOND!r}")
    names = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    return {name: _linear(where, name, config, version, headers, read) for name in names}


def _in_features(name: str, config: dict[str, Any], headers: dict[str, TensorHeader]) -> int:
    """K, as `g_idx` says it, or else the bits that config.json states."""
    order = headers.get(f"{name}.g_idx")
    if order is not None:
        return order.shape[0] if len(order.shape) == 1 else 0
    bits = config.get("bits")
    return headers[f"{name}.qweight"].shape[0] * 32 // bits if bits in BITS else 0


def _linear(
    where: str, name: str, config: dict[str, Any], version: str, headers: dict[str, TensorHeader], read: Read
) -> CodedLinear:
    shapes = [headers[f"{name}.{part}"].shape if f"{name}.{part}" in headers else () for part in PARTS[:3]]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise OctavoError(f"{where}: {name} lacks one of {', '.join(PARTS[:3])}, or one is no matrix; copy it again")
    weight_shape, zeros, (groups, out_features) = shapes
    in_features = _in_features(name, config, headers)
    bits = bits_of(weight_shape, in_features) if in_features else 0
    fits = bits in BITS and weight_shape[1] == out_features and zeros == (groups, words_of(out_features, bits))
    if not fits:
        raise OctavoError(f"{where}: {name}: the shapes of {', '.join(PARTS)} do not go together; copy it again")
    parts = tuple(f"{name}.{part}" for part in PARTS if f"{name}.{part}" in headers)
    mixes = bool(config.get("desc_act")) and parts[-1].endswith(".g_idx")
    order = mixed_order(parts[-1], read(parts[-1]), groups) if mixes else None
    label, fault = weight_only_label(bits, in_features, groups, order)

    def weight(read: Read) -> CodedWeight:
        found = {part: read(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in headers}
        codes, zero, scale = unpack_gptq(found, bits, in_features, version)
        order = mixed_order(f"{name}.g_idx", found.get("g_idx"), groups)
        scale, zero = sound_scale(f"{name}.scales", scale), sound_zero(f"{name}.qzeros", zero, bits)
        return CodedWeight(codes, scale, zero, order)

    symmetric = bool(config.get("sym", True))
    return CodedLinear(label, fault, (out_features, in_features), (out_features, groups), parts, weight, symmetric)
