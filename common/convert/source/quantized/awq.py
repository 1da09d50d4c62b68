"""AWQ checkpoints, as AutoAWQ writes them ("gemm")."""

from typing import Any

from ....errors import OctavoError
from ....runtime.checkpoint.files import TensorHeader
from ...dialects.layouts.awq import BITS, PARTS, unpack_awq
from .weight import CodedLinear, CodedWeight, Read, sound_scale, sound_zero, weight_only_label


def read_awq(
    where: str, config: dict[str, Any], headers: dict[str, TensorHeader], read: Read
) -> dict[str, CodedLinear]:
    """The linears in codes, by name.

    Args:
        where: the config.json, for messages.
        config: `quantization_config`.
        headers: of all tensors.
        read: reads one of them.

    Raises:
        OctavoError: another version of the layout, or tensors that do not go together.
    """
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", BITS))
    if version != "gemm" or bits != BITS:
        raise OctavoError(f"{where}: awq in version {version!r} and {bits} bits; Octavo reads 'gemm' and {BITS} bits")
    names = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    return {name: _linear(where, name, not config.get("zero_point", True), headers) for name in names}


def _linear(where: str, name: str, symmetric: bool, headers: dict[str, TensorHeader]) -> CodedLinear:
    parts = tuple(f"{name}.{part}" for part in PARTS)
    shapes = [headers[part].shape if part in headers else () for part in parts]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise OctavoError(f"{where}: {name} lacks one of {', '.join(PARTS)}, or one is no matrix; copy it again")
    (in_features, words), zeros, (groups, out_features) = shapes
    if zeros != (groups, words) or out_features != words * 8:
        raise OctavoError(f"{where}: {name}.{PARTS[0]}, {PARTS[1]} and {PARTS[2]} do not go together; copy it again")
    label, fault = weight_only_label(BITS, in_features, groups)

    def weight(read: Read) -> CodedWeight:
        codes, zero, scale = unpack_awq({part: read(f"{name}.{part}") for part in PARTS})
        return CodedWeight(codes, sound_scale(parts[2], scale), sound_zero(parts[1], zero, BITS))

    return CodedLinear(label, fault, (out_features, in_features), (out_features, groups), parts, weight, symmetric)
