"""The linear ops on the CPU: `integer.c` and `float.c` behind the Python signatures of the references."""

import struct
from collections.abc import Callable

import torch

from ..shared.compile import CKernel
from ..shared.fallback import fell_back
from ..shared.operands import FLOAT_KINDS, KINDS
from .arguments import (
    WEIGHT_BLOCK,
    check_fp8,
    check_fp8_block,
    check_grouped,
    check_w8a8,
    check_w8a8_dynamic,
    check_weight_only,
)
from .reference import (
    fp8_by_group,
    linear_fp8_block_reference,
    linear_fp8_reference,
    linear_grouped_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
    quantize_by_group,
    scales_by_row,
)

PACKED_SOURCES = ("ops/linear/packed.h", "ops/linear/packed_dot.h", "ops/linear/packed_product.h")
"""C of packed linears, which kernels that multiply codes among other things include, behind rounding.h."""
LINEAR_KERNEL = CKernel(
    "linear",
    (
        "ops/shared/vector.h",
        "ops/shared/rounding.h",
        "ops/shared/team.h",
        "ops/linear/linear.h",
        "ops/linear/integer.c",
        "ops/linear/float.c",
        *PACKED_SOURCES,
        "ops/linear/packed_float.h",
        "ops/linear/packed_linear.c",
        "ops/linear/packed_weight.c",
    ),
    (
        "linear_w8a8",
        "linear_w8a8_dynamic",
        "linear_weight_only",
        "linear_fp8",
        "linear_packed",
        "linear_float",
        "pack_panels",
    ),
)
E4M3_UNIT = 256.0
"""By how much weights in e4m3 are smaller once float.c decoded them."""
_pack_linear = struct.Struct("19q").pack


def _run_linear(
    run: Callable[[bytes], int],
    x: torch.Tensor,
    weight: torch.Tensor,
    in_features: int,
    scale: torch.Tensor,
    num_groups: int = 1,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Describe checked arguments to C and run; see `LinearArguments` in linear.h.

    Raises:
        MemoryError: no room for the scratch.
    """
    shape, out_features, dtype = x.shape, weight.shape[0], x.dtype
    kind = FLOAT_KINDS.get(dtype)
    if kind is None:
        x, kind = x.float(), 1
    if not x.is_contiguous():
        x = x.contiguous()
    if not (weight.is_contiguous() and scale.is_contiguous()):
        weight, scale = weight.contiguous(), scale.contiguous()
    if zero is not None and not zero.is_contiguous():
        zero = zero.contiguous()
    if quant_bias is not None and not quant_bias.is_contiguous():
        quant_bias = quant_bias.contiguous()
    if bias is not None and (bias.dtype not in FLOAT_KINDS or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    output = x.new_empty((*shape[:-1], out_features))
    rows = output.numel() // out_features if out_features else 0
    if rows:
        failed = run(
            _pack_linear(
                x.data_ptr(),
                weight.data_ptr(),
                output.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if quant_bias is None else quant_bias.data_ptr(),
                scale.data_ptr(),
                0 if zero is None else zero.data_ptr(),
                0 if input_scale is None else input_scale.data_ptr(),
                0 if input_offset is None else input_offset.data_ptr(),
                kind,
                KINDS[weight.dtype],
                FLOAT_KINDS[scale.dtype],
                0 if bias is None else FLOAT_KINDS[bias.dtype],
                rows,
                in_features,
                out_features,
                num_groups,
                scale.numel() > 1,
                torch.get_num_threads(),
            )
        )
        if failed:
            raise MemoryError("a linear op on the CPU found no memory for its scratch")
    return output if output.dtype == dtype else output.to(dtype)


def linear_w8a8_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    run = LINEAR_KERNEL.load().get("linear_w8a8")
    if run is None:
        fell_back("linear_w8a8", "CPU", LINEAR_KERNEL.supports())
        return linear_w8a8_reference(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    _, in_features = check_w8a8(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    return _run_linear(run, x, weight, in_features, deq_scale, 1, None, None, quant_bias, input_scale, input_offset)


def linear_w8a8_dynamic_cpu(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_w8a8_dynamic_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    run = LINEAR_KERNEL.load().get("linear_w8a8_dynamic")
    if run is None:
        fell_back("linear_w8a8_dynamic", "CPU", LINEAR_KERNEL.supports())
        return linear_w8a8_dynamic_reference(x, weight, weight_scale, bias)
    _, in_features = check_w8a8_dynamic(x, weight, weight_scale, bias)
    return _run_linear(run, x, weight, in_features, weight_scale, bias=bias)


def linear_weight_only_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_weight_only_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together; groups that are no multiple of 32 channels.
        MemoryError: no room for the scratch of the threads.
    """
    run = LINEAR_KERNEL.load().get("linear_weight_only")
    if run is None:
        fell_back("linear_weight_only", "CPU", LINEAR_KERNEL.supports())
        return linear_weight_only_reference(x, weight, weight_scale, weight_zero, bias)
    _, in_features, num_groups = check_weight_only(x, weight, weight_scale, weight_zero, bias)
    if num_groups > 1 and in_features // num_groups % WEIGHT_BLOCK:
        raise ValueError(
            f"the C kernel takes groups of a multiple of {WEIGHT_BLOCK} channels, not {in_features // num_groups}"
        )
    if weight_scale.dtype not in (torch.float32, torch.float16):
        weight_scale = weight_scale.float()
    if weight_zero is not None and weight_zero.dtype != weight_scale.dtype:
        weight_scale, weight_zero = weight_scale.float(), weight_zero.float()
    return _run_linear(run, x, weight, in_features, weight_scale, num_groups, weight_zero, bias)


def linear_grouped_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """`linear_grouped_reference`, whose products are those of `linear_weight_only` in C.

    Raises:
        ValueError: as `linear_weight_only_cpu`, or a group that does not divide the weight's.
        MemoryError: no room for the scratch of the threads.
    """
    reason = LINEAR_KERNEL.supports()
    if reason is not None:
        fell_back("linear_grouped", "CPU", reason)
        return linear_grouped_reference(x, weight, weight_scale, weight_zero, bias, group)
    check_grouped(x, weight, weight_scale, weight_zero, bias, group)
    codes, scale = quantize_by_group(x, group)
    rows = codes.mul_(scale).view(x.shape)
    return linear_weight_only_cpu(rows, weight, weight_scale, weight_zero, bias).to(x.dtype)


def linear_fp8_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_fp8_reference` in C.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    run = LINEAR_KERNEL.load().get("linear_fp8")
    if run is None:
        fell_back("linear_fp8", "CPU", LINEAR_KERNEL.supports())
        return linear_fp8_reference(x, weight, weight_scale, input_scale, bias)
    _, in_features = check_fp8(x, weight, weight_scale, input_scale, bias)
    return _run_linear(run, x, weight, in_features, weight_scale, bias=bias, input_scale=input_scale)


def linear_fp8_block_cpu(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_fp8_block_reference`, whose products are those of `linear_weight_only` in C, of codes in e4m3.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        MemoryError: no room for the scratch of the threads.
    """
    run = LINEAR_KERNEL.load().get("linear_weight_only")
    if run is None:
        fell_back("linear_fp8_block", "CPU", LINEAR_KERNEL.supports())
        return linear_fp8_block_reference(x, weight, weight_scale, bias)
    out_features, in_features = check_fp8_block(x, weight, weight_scale, bias)
    scale = scales_by_row(weight_scale * E4M3_UNIT, out_features)
    output = _run_linear(run, fp8_by_group(x), weight, in_features, scale, scale.shape[1], bias=bias)
    return output.to(x.dtype)
