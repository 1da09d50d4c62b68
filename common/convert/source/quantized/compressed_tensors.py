"""Checkpoints of compressed-tensors: int8 weights and inputs, packed integers of 2 to 8 bits, and fp8."""

import re
from dataclasses import dataclass
from typing import Any

from .....ops.linear.arguments import FP8_BLOCK_SIZE
from ....errors import OctavoError
from ....runtime.checkpoint.files import TensorHeader
from ....runtime.schemes.linear_scheme import FP8, FP8_BLOCK, FP8_DYNAMIC, W8A8, W8A8_DYNAMIC
from ...dialects.layouts.compressed_tensors import unpack_signed, unpack_zero_points
from ...dialects.layouts.words import words_of
from .fp8 import block_fault, fp8_scales
from .weight import CodedLinear, CodedWeight, Read, mixed_order, sound_scale, sound_zero, weight_only_label

_KINDS = {
    ("int", "token", True): W8A8_DYNAMIC,
    ("int", "tensor", False): W8A8,
    ("float", "token", True): FP8_DYNAMIC,
    ("float", "tensor", False): FP8,
}
"""The kind of linear by type, strategy and dynamic of 8-bit inputs."""
_BLOCK_INPUTS = {
    "type": "float", "num_bits": 8, "strategy": "group", "dynamic": True, "group_size": FP8_BLOCK_SIZE,
}  # fmt: skip
"""What is said of inputs beside weights in blocks."""
_CLASS = "Linear"
_PLAIN_DTYPES = {"I8": "int", "F8_E4M3": "float"}


@dataclass(frozen=True)
class _Group:
    """One of `config_groups`: what it is for, and `weights` and `input_activations`, {} where inputs stay in float."""

    targets: tuple[str, ...]
    weights: dict[str, Any]
    inputs: dict[str, Any]

    def names(self, linear: str) -> bool:
        """Whether it is for a linear by its name."""
        patterns = (target.removeprefix("re:") for target in self.targets if target.startswith("re:"))
        return linear in self.targets or any(re.match(pattern, linear) for pattern in patterns)


def read_compressed_tensors(
    where: str, config: dict[str, Any], headers: dict[str, TensorHeader], read: Read
) -> dict[str, CodedLinear]:
    """The linears in codes, by name; as of `read_awq`."""
    _check(where, config)
    groups = [
        _Group(tuple(group.get("targets") or ()), group["weights"], group.get("input_activations") or {})
        for group in (config.get("config_groups") or {}).values()
        if group.get("weights")
    ]
    found = {}
    for name, header in headers.items():
        linear, _, part = name.rpartition(".")
        if part == "weight_packed":
            found[linear] = _packed(where, linear, _group_of(where, linear, groups), headers, read)
        elif part == "weight" and header.dtype in _PLAIN_DTYPES:
            found[linear] = _plain(where, linear, _group_of(where, linear, groups), headers)
    return found


def _check(where: str, config: dict[str, Any]) -> None:
    """Raise an `OctavoError` if a checkpoint is more than linears in codes."""
    sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        raise OctavoError(f"{where}: sparsity_config has format {sparsity!r}; Octavo reads dense weights only")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise OctavoError(f"{where}: transform_config rotates inputs while the model runs, which Octavo does not do")
    status = config.get("quantization_status") or "compressed"
    if status != "compressed":
        raise OctavoError(f"{where}: quantization_status is {status!r}; save it compressed, so that weights are codes")
    for name, group in (config.get("config_groups") or {}).items():
        if group.get("output_activations"):
            raise OctavoError(f"{where}: {name} quantizes outputs of linears, which no kind of linear here does")


def _group_of(where: str, name: str, groups: list[_Group]) -> _Group:
    """The group of a linear: the first that names it, or else that is for all."""
    for fits in (lambda group: group.names(name), lambda group: _CLASS in group.targets):
        for group in groups:
            if fits(group):
                return group
    raise OctavoError(f"{where}: none of config_groups is for {name}, which is in codes; copy the checkpoint again")


def _packed(where: str, name: str, group: _Group, headers: dict[str, TensorHeader], read: Read) -> CodedLinear:
    packed, scale = (headers[part].shape if part in headers else () for part in _names(name, "_packed", "_scale"))
    shape = read(f"{name}.weight_shape").tolist() if f"{name}.weight_shape" in headers else []
    bits = group.weights.get("num_bits")
    if len(shape) != 2 or not isinstance(bits, int) or packed != (shape[0], words_of(shape[1], bits)):
        raise OctavoError(f"{where}: {name}.weight_packed is not {bits} bits of the {shape} of weight_shape")
    out_features, in_features = shape
    if scale not in ((out_features, scale[-1] if scale else 0), (1,)):
        raise OctavoError(f"{where}: {name}.weight_scale is {list(scale)}, and not of {out_features} rows")
    groups = scale[1] if len(scale) == 2 else 1
    parts = tuple(
        part for part in _names(name, "_packed", "_scale", "_zero_point", "_shape", "_g_idx") if part in headers
    )
    order_name, zero_name = f"{name}.weight_g_idx", f"{name}.weight_zero_point"
    order = mixed_order(order_name, read(order_name) if order_name in parts else None, groups)
    label, fault = weight_only_label(bits, in_features, groups, order)
    if group.inputs:
        label, fault = None, "has packed weights and quantized inputs"

    def weight(read: Read) -> CodedWeight:
        codes = unpack_signed(read(f"{name}.weight_packed"), bits, in_features)
        found = sound_scale(f"{name}.weight_scale", read(f"{name}.weight_scale"))
        zero = unpack_zero_points(read(zero_name), bits, out_features) if zero_name in parts else None
        order = mixed_order(order_name, read(order_name) if order_name in parts else None, groups)
        return CodedWeight(
            codes,
            found.view(-1, groups).expand(out_features, groups),
            None if zero is None else sound_zero(zero_name, zero, bits),
            order,
        )

    symmetric = zero_name not in parts
    return CodedLinear(label, fault, (out_features, in_features), (out_features, groups), parts, weight, symmetric)


def _names(name: str, *ends: str) -> list[str]:
    return [f"{name}.weight{end}" for end in ends]


def _plain_fault(group: _Group, kind: str, in_features: int) -> str:
    """Why no kind of linear holds weights of a byte each, or nothing."""
    weights, inputs = group.weights, group.inputs
    if weights.get("strategy") == "block":
        fault = block_fault(weights.get("block_structure") or [], in_features)
        if kind != "float" or any(inputs.get(field) != value for field, value in _BLOCK_INPUTS.items()):
            fault = fault or f"is in blocks, and no fp8 with dynamic inputs in groups of {FP8_BLOCK_SIZE}"
        return fault
    if kind == "float" and not inputs:
        return "is fp8 with inputs in float"
    if inputs:
        found = inputs.get("type"), inputs.get("strategy"), inputs.get("dynamic")
        if inputs.get("num_bits") != 8 or found not in _KINDS or found[0] != kind:
            return f"has inputs in {found[0]} of {inputs.get('num_bits')} bits, {found[1]}, dynamic {found[2]}"
        if weights.get("strategy") not in ("channel", "tensor") or not weights.get("symmetric", True):
            return "has quantized inputs and weights in groups or with zero points"
        if inputs["dynamic"] and not inputs.get("symmetric", True):
            return "has dynamic inputs with zero points"
    return ""


def _plain(where: str, name: str, group: _Group, headers: dict[str, TensorHeader]) -> CodedLinear:
    weight_name, scale_name, zero_name = _names(name, "", "_scale", "_zero_point")
    header, kind = headers[weight_name], _PLAIN_DTYPES[headers[weight_name].dtype]
    if len(header.shape) != 2 or scale_name not in headers:
        raise OctavoError(f"{where}: {name} has no weight_scale, or is no matrix; copy the checkpoint again")
    (out_features, in_features), scale = header.shape, headers[scale_name].shape
    fault = _plain_fault(group, kind, in_features)
    block = None
    if group.weights.get("strategy") == "block":
        block, scales = tuple(group.weights.get("block_structure") or ()), scale
        if len(block) != 2 or scale != tuple(-(-size // step) for size, step in zip(header.shape, block, strict=True)):
            raise OctavoError(f"{where}: {scale_name} is {list(scale)}, which blocks of {list(block)} do not make")
    elif len(scale) == 2 and scale[0] == out_features and scale[1] > 1:
        scales = scale
    else:
        scales = fp8_scales(where, scale_name, headers, out_features)
    label: str | None = None
    if not fault and block is not None:
        label = FP8_BLOCK
    elif not fault and group.inputs:
        label = _KINDS[group.inputs["type"], group.inputs["strategy"], group.inputs["dynamic"]]
    elif not fault:
        label, fault = weight_only_label(8, in_features, scales[1])
    inputs = [f"{name}.input_{part}" for part in ("scale", "zero_point")]
    parts = tuple(part for part in (weight_name, scale_name, zero_name, *inputs) if part in headers)
    if label in (W8A8, FP8) and inputs[0] not in parts:
        raise OctavoError(f"{where}: {name} has static inputs and no input_scale; copy the checkpoint again")
    if label is not None and kind == "int":
        scales = out_features, scales[1]

    def weight(read: Read) -> CodedWeight:
        found = sound_scale(scale_name, read(scale_name)).view(-1, scales[1]).expand(scales)
        zero = sound_zero(zero_name, read(zero_name), 8) if kind == "int" and zero_name in parts else None
        of_input = [read(part).float().view(1) if part in parts else None for part in inputs]
        zero = None if zero is None else zero.view(-1, scales[1]).expand(scales)
        return CodedWeight(read(weight_name), found, zero, None, block, *of_input)

    return CodedLinear(label, fault, (out_features, in_features), scales, parts, weight, zero_name not in parts)
