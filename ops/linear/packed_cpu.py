"""Linears over packed weights on the CPU: `packed_linear.c` behind Python signatures."""

import struct

import torch

from ..shared.codes import INT8_MAX, dynamic_scale, expand_scale, from_codes
from ..shared.fallback import fell_back
from ..shared.operands import FLOAT_KINDS
from .arguments import LARGEST_IN_FEATURES, WEIGHT_BLOCK
from .cpu import LINEAR_KERNEL
from .packed import Packed, unpack
from .reference import linear_w8a8_reference

_pack_arguments = struct.Struct("18q").pack
_pack_float = struct.Struct("9q").pack


def linear_packed_reference(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, group: int = 0
) -> torch.Tensor:
    """`x W^T + bias` with x quantized to int8 per row and group, `scale = max|x| / 127`, and W packed.

    `sum_g s_x[m, g] * s_w[n, g] * sum_k code_x * (code_w - zero[n, g]) + bias[n]`

    Args:
        x: `[..., K]`, any float dtype.
        packed: a weight `[N, K]`.
        bias: `[N]`, any float dtype, or None.
        group: input channels of x that share a scale, which divide those of the weight; 0: as many as of the
            weight.

    Returns:
        `[..., N]`, of the dtype of `x`; NaN for a row of x in which there is one.

    Raises:
        ValueError: shapes that do not go together.
    """
    group = _checked_group(x, packed, group)
    codes, scale, zero = unpack(packed)
    grouped = x.float().reshape(-1, packed.in_features // group, group)
    x_scale = dynamic_scale(grouped.abs().amax(dim=-1, keepdim=True), INT8_MAX)
    rows = ((grouped / x_scale).round().clamp(-128, 127) * x_scale).view(-1, packed.in_features)
    weight = from_codes(codes, WEIGHT_BLOCK, torch.float32)
    if zero is not None:
        weight = weight - expand_scale(zero.float(), *weight.shape)
    output = rows @ (weight * expand_scale(scale.float(), *weight.shape)).T
    output = output if bias is None else output + bias.float()
    return output.to(x.dtype).view(*x.shape[:-1], packed.out_features)


def _checked_group(x: torch.Tensor, packed: Packed, group: int) -> int:
    """Channels of x that share a scale; raises ValueError as `linear_packed_reference` does."""
    in_features = packed.in_features
    group = group or in_features // packed.num_groups
    if x.shape[-1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} does not belong to a packed weight of {in_features} input channels")
    if group < in_features and (group % WEIGHT_BLOCK or in_features % group):
        raise ValueError(
            f"groups of x are a multiple of {WEIGHT_BLOCK} channels that divides {in_features}, not {group}"
        )
    if in_features // packed.num_groups % group:
        raise ValueError(f"a group of x, {group} channels, does not divide one of the weight")
    if group > LARGEST_IN_FEATURES:
        raise ValueError(f"sums of up to {LARGEST_IN_FEATURES} products are exact, and a group has {group}")
    return group


def linear_packed_cpu(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, group: int = 0
) -> torch.Tensor:
    """`linear_packed_reference` in C. With one group, bit for bit `linear_w8a8_dynamic_reference`.

    Raises:
        ValueError: shapes that do not go together.
        MemoryError: no room for the codes of x.
    """
    if LINEAR_KERNEL.supports():
        fell_back("linear_packed", "CPU", LINEAR_KERNEL.supports())
        return linear_packed_reference(x, packed, bias, group)
    group = _checked_group(x, packed, group)
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if bias is not None and bias.shape != (packed.out_features,):
        raise ValueError(f"bias {tuple(bias.shape)} does not belong to {packed.out_features} output channels")
    return _run_packed(x, packed, bias, None, None, None, group)


def linear_w8a8_packed_cpu(
    x: torch.Tensor,
    packed: Packed,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` over a packed weight, bit for bit; the scale of `packed` is `deq_scale`.

    Raises:
        ValueError: shapes that do not go together.
        MemoryError: no room for the codes of x.
    """
    if LINEAR_KERNEL.supports():
        fell_back("linear_w8a8", "CPU", LINEAR_KERNEL.supports())
        codes, scale, _ = unpack(packed)
        return linear_w8a8_reference(x, codes, input_scale, input_offset, quant_bias, scale.view(-1))
    group = _checked_group(x, packed, 0)
    if quant_bias.dtype != torch.int32 or quant_bias.shape != (packed.out_features,):
        raise ValueError(f"quant_bias must be int32 [{packed.out_features}], not {tuple(quant_bias.shape)}")
    return _run_packed(x, packed, None, quant_bias.contiguous(), input_scale, input_offset, group)


def _run_packed(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_offset: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """Describe checked arguments to C and run; see `PackedArguments` in packed_linear.c."""
    dtype, kind = x.dtype, FLOAT_KINDS.get(x.dtype)
    if kind is None:
        x, kind = x.float(), FLOAT_KINDS[torch.float32]
    if not x.is_contiguous():
        x = x.contiguous()
    output = x.new_empty((*x.shape[:-1], packed.out_features))
    rows = output.numel() // packed.out_features if packed.out_features else 0
    if rows:
        failed = LINEAR_KERNEL.load()["linear_packed"](
            _pack_arguments(
                x.data_ptr(),
                output.data_ptr(),
                packed.codes.data_ptr(),
                packed.scale.data_ptr(),
                0 if packed.zero is None else packed.zero.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if quant_bias is None else quant_bias.data_ptr(),
                0 if input_scale is None else input_scale.data_ptr(),
                0 if input_offset is None else input_offset.data_ptr(),
                kind,
                packed.bits,
                FLOAT_KINDS[packed.scale.dtype],
                rows,
                packed.in_features,
                packed.out_features,
                packed.num_groups,
                group,
                torch.get_num_threads(),
            )
        )
        if failed:
            raise MemoryError("a linear on the CPU found no memory for the codes of x")
    return output if output.dtype == dtype else output.to(dtype)


def linear_float_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + bias` in float32 with a weight in float, which is read once: for few rows, at most 8 or so.

    Args:
        x: float32 `[..., K]`.
        weight: float32, bfloat16 or float16 `[N, K]`.
        bias: `[N]`, any float dtype, or None.

    Returns:
        float32 `[..., N]`.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    if x.dtype != torch.float32 or weight.dtype not in FLOAT_KINDS or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} in {x.dtype} does not belong to {weight.dtype} {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not belong to {weight.shape[0]} output channels")
    run = LINEAR_KERNEL.load().get("linear_float")
    if run is None:
        fell_back("linear_float", "CPU", LINEAR_KERNEL.supports())
        return torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out_features, in_features = weight.shape
    output = x.new_empty((*x.shape[:-1], out_features))
    rows = output.numel() // out_features if out_features else 0
    if rows:
        bias_at, kind = 0 if bias is None else bias.data_ptr(), FLOAT_KINDS[weight.dtype]
        addresses = (x.data_ptr(), weight.data_ptr(), bias_at, output.data_ptr())
        run(_pack_float(*addresses, kind, rows, in_features, out_features, torch.get_num_threads()))
    return output
