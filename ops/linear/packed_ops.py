"""The ops over packed weights: `packed_cpu.py` behind flat arguments, which a graph can hold.

`linear_packed` is `linear_grouped` and, with one group, `linear_w8a8_dynamic` of a weight in panels;
`linear_w8a8_packed` is `linear_w8a8`. Panels are for the CPU alone.
"""

import torch

from ..shared.registry import define_op, implement
from .cpu import LINEAR_KERNEL
from .packed import Packed, unpack
from .packed_cpu import linear_packed_cpu, linear_packed_reference, linear_w8a8_packed_cpu
from .reference import linear_w8a8_reference


def _linear_packed_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
    group: int,
) -> torch.Tensor:
    """`linear_packed_reference` of a `Packed` of these parts."""
    return linear_packed_reference(x, Packed(codes, scale, zero, bits, out_features, in_features), bias, group)


def _linear_packed_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
    group: int,
) -> torch.Tensor:
    return linear_packed_cpu(x, Packed(codes, scale, zero, bits, out_features, in_features), bias, group)


def _linear_w8a8_packed_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    deq_scale: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    in_features: int,
    out_features: int,
) -> torch.Tensor:
    """`linear_w8a8_reference` of a weight in panels, and `deq_scale` in them, too."""
    weight, scale, _ = unpack(Packed(codes, deq_scale, None, 8, out_features, in_features))
    return linear_w8a8_reference(x, weight, input_scale, input_offset, quant_bias, scale.view(-1))


def _linear_w8a8_packed_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    deq_scale: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    in_features: int,
    out_features: int,
) -> torch.Tensor:
    packed = Packed(codes, deq_scale, None, 8, out_features, in_features)
    return linear_w8a8_packed_cpu(x, packed, input_scale, input_offset, quant_bias)


def _packed_fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], others[-2]))  # out_features, before the group


def _w8a8_packed_fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], others[-1]))  # out_features


linear_packed = define_op("linear_packed", _linear_packed_reference, _packed_fake)
linear_w8a8_packed = define_op("linear_w8a8_packed", _linear_w8a8_packed_reference, _w8a8_packed_fake)
implement("linear_packed", "CPU", _linear_packed_cpu, LINEAR_KERNEL.description)
implement("linear_w8a8_packed", "CPU", _linear_w8a8_packed_cpu, LINEAR_KERNEL.description)


def run_packed(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, group: int) -> torch.Tensor:
    """`x W^T + bias` of an x `[..., K]` that is quantized to int8 per row and `group` channels, and a packed W."""
    sizes = packed.bits, packed.in_features, packed.out_features
    return linear_packed(x, packed.codes, packed.scale, packed.zero, bias, *sizes, group)


def run_packed_w8a8(
    x: torch.Tensor,
    packed: Packed,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8` of a packed weight whose scale is `deq_scale`."""
    sizes = packed.in_features, packed.out_features
    return linear_w8a8_packed(x, packed.codes, packed.scale, input_scale, input_offset, quant_bias, *sizes)
