"""Linear layers on CUDA GPUs: the Triton kernels of `cuda_kernels.py` behind the signatures of the references."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..shared.codes import CODE_RANGES, INT8_MAX, SMALLEST_SCALE
from ..shared.operands import check_devices
from ..shared.triton_helpers import FP8_CAPABILITY, Launch, by_plan, cuda_description, dense_part, gpu_of, power_of_two
from .arguments import WEIGHT_BLOCK, check_fp8, check_w8a8, check_w8a8_dynamic, check_weight_only
from .cuda_kernels import codes_linear_kernel, quantize_rows_kernel, token_linear_kernel, weight_only_kernel
from .reference import (
    linear_fp8_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)

LINEAR_CUDA = cuda_description("codes times codes in the matrix units; int8 of one token in one kernel without them")
WEIGHT_ONLY_CUDA = cuda_description("weights decoded in registers, a row of tiles for few tokens")
LARGEST_ROW_BLOCK = 4096
Plan = Callable[..., torch.Tensor]


class _Tiles(NamedTuple):
    """How a linear is cut: rows, output and input channels of a tile, warps, and tiles in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def _linear_tiles(rows: int, in_features: int, bits: int, capability: int) -> _Tiles:
    """Tiles for so many tokens: narrow ones for few, which are bound by the bandwidth of memory.

    Args:
        bits: of an element of x as it is multiplied.
    """
    has_room = capability in (80, 90, 100, 103)  # 163 KiB of shared memory and more; others have 99 KiB
    if rows <= 16:
        block_k_of_few = {8: 512, 16: 256, 32: 64}[bits]
        tiles = _Tiles(16, 32, block_k_of_few, 4, 4 if has_room else 3)  # of four warps on 16 columns some do the same
    elif rows <= 64 or bits == 32:
        tiles = _Tiles(64, 64, {8: 128, 16: 64, 32: 32}[bits], 4, 3)
    else:
        tiles = _Tiles(128, 128, 128 if bits == 8 else 64, 8, 3 if has_room else 2)
    return tiles._replace(block_k=min(tiles.block_k, max(32, 1 << (in_features - 1).bit_length())))


class _CudaRows(NamedTuple):
    """x `[..., K]` as rows `[M, K]`.

    Attributes:
        count: M.
        strides: of the rows.
        copies: whether x has to be copied for that.
    """

    count: int
    strides: tuple[int, int]
    copies: bool

    def of(self, x: torch.Tensor) -> tuple:
        """The rows of x as kernels take them."""
        return (x.reshape(self.count, -1) if self.copies else x, *self.strides)


def _cuda_rows(x: torch.Tensor) -> _CudaRows:
    rows = x.reshape(-1, x.shape[-1])
    return _CudaRows(rows.shape[0], rows.stride(), rows.data_ptr() != x.data_ptr())


def _empty(x: torch.Tensor, *unused: torch.Tensor | None) -> torch.Tensor:
    """Of a call of no tokens or no output channels."""
    return x.new_empty((*x.shape[:-1], unused[0].shape[0]))


def _quantizing(
    rows: _CudaRows, in_features: int, dtype: torch.dtype, kind: str, is_dynamic: bool
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """What makes of x, a scale and an offset codes `[M, K]`, fp8 as bytes, and float32 scales `[M]`.

    The scales are those found, or 1 and NaN where a scale is given; codes in fp8 have a NaN of their own, and by a
    given scale no scales.
    """
    is_fp8 = dtype != torch.int8
    is_whole = is_dynamic or not is_fp8  # a program takes a row
    block = min(LARGEST_ROW_BLOCK if is_whole else 1024, power_of_two(in_features, 128))
    low, high = CODE_RANGES[dtype]
    constants = {"LOW": low, "HIGH": high, "SMALLEST": SMALLEST_SCALE, "BLOCK": block, "KIND": kind}
    grid = rows.count, 1 if is_whole else -(-in_features // block)
    launch = Launch(quantize_rows_kernel, grid, constants, num_warps=8 if block > 1024 else 4, enable_fp_fusion=False)
    shape, stored = (rows.count, in_features), torch.uint8 if is_fp8 else torch.int8

    def run(
        x: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        codes = torch.empty(shape, dtype=stored, device=x.device)
        found = torch.empty(shape[:1], dtype=torch.float32, device=x.device) if is_whole else None
        launch(rows.of(x), codes, found, scale, offset, in_features)
        return codes, found

    return run


def _multiplying(x: torch.Tensor, weight: torch.Tensor, rows: int, dot: str) -> Plan:
    """What makes of x, its codes, a weight and scales the product, in the shape and dtype that belong to x."""
    out_features, in_features = weight.shape
    tiles = _linear_tiles(rows, in_features, 16 if dot == "fp16" else 8, gpu_of(x.device).capability)
    constants = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
                 "IS_EVEN": in_features % tiles.block_k == 0, "DOT": dot}  # fmt: skip
    launch = Launch(
        codes_linear_kernel, (-(-rows // tiles.block_m) * -(-out_features // tiles.block_n),), constants,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    shape, strides, dtype = (*x.shape[:-1], out_features), weight.stride(), x.dtype

    def run(
        codes: torch.Tensor,
        weight: torch.Tensor,
        row_scale: tuple | None,
        column_scale: tuple,
        quant_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        output = torch.empty(shape, dtype=dtype, device=codes.device)
        launch(
            codes, (weight, *strides), output, row_scale, column_scale, quant_bias, bias,
            rows, out_features, in_features,
        )  # fmt: skip
        return output

    return run


def _of_one_token(x: torch.Tensor, weight: torch.Tensor, rows: _CudaRows) -> Plan:
    """What makes of one token and a weight in int8 their product, in one kernel."""
    out_features, in_features = weight.shape
    block_n, block_k = 16, min(1024, power_of_two(in_features, 128))  # the fastest of eight on an H100
    constants = {"HIGH": float(INT8_MAX), "SMALLEST": SMALLEST_SCALE, "BLOCK_N": block_n, "BLOCK_K": block_k}
    launch = Launch(token_linear_kernel, (-(-out_features // block_n),), constants, num_warps=4, enable_fp_fusion=False)
    shape, strides, dtype = (*x.shape[:-1], out_features), weight.stride(), x.dtype

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        offset: torch.Tensor | None,
        column_scale: torch.Tensor,
        quant_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        output = torch.empty(shape, dtype=dtype, device=x.device)
        launch(
            rows.of(x), (weight, *strides), output, scale, offset, column_scale.contiguous(),
            dense_part(quant_bias), dense_part(bias), out_features, in_features,
        )  # fmt: skip
        return output

    return run


def _plan_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> Plan:
    check_devices(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    out_features, in_features = check_w8a8(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    if x.numel() == 0 or out_features == 0:
        return _empty
    rows = _cuda_rows(x)
    if rows.count == 1:
        of_one = _of_one_token(x, weight, rows)
        return lambda x, weight, scale, offset, bias, deq: of_one(x, weight, scale, offset, deq, bias, None)
    quantize = _quantizing(rows, in_features, torch.int8, "int8", False)
    multiply = _multiplying(x, weight, rows.count, "int8")

    def run(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, quant_bias: torch.Tensor,
        deq_scale: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        codes, found = quantize(x, scale, offset)
        return multiply(codes, weight, (found, 1), (deq_scale.contiguous(), 1), quant_bias.contiguous(), None)

    return run


def _plan_w8a8_dynamic(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> Plan:
    check_devices(x, weight, weight_scale, bias)
    out_features, in_features = check_w8a8_dynamic(x, weight, weight_scale, bias)
    if x.numel() == 0 or out_features == 0:
        return _empty
    rows = _cuda_rows(x)
    if rows.count == 1:
        of_one = _of_one_token(x, weight, rows)
        return lambda x, weight, scale, bias: of_one(x, weight, None, None, scale, None, bias)
    quantize = _quantizing(rows, in_features, torch.int8, "int8", True)
    multiply = _multiplying(x, weight, rows.count, "int8")

    def run(
        x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        codes, found = quantize(x, None, None)
        return multiply(codes, weight, (found, 1), (weight_scale.contiguous(), 1), None, dense_part(bias))

    return run


def _plan_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Plan:
    check_devices(x, weight, weight_scale, input_scale, bias)
    out_features, in_features = check_fp8(x, weight, weight_scale, input_scale, bias)
    if x.numel() == 0 or out_features == 0:
        return _empty
    rows, is_dynamic = _cuda_rows(x), input_scale is None
    quantize = _quantizing(rows, in_features, torch.float8_e4m3fn, "e4m3", is_dynamic)
    dot = "fp8" if gpu_of(x.device).capability >= FP8_CAPABILITY else "fp16"
    multiply = _multiplying(x, weight, rows.count, dot)
    scale_stride = weight_scale.stride(0) if weight_scale.shape[0] == out_features else 0

    def run(
        x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        codes, found = quantize(x, input_scale, None)
        row_scale = (found, 1) if is_dynamic else (input_scale, 0)
        return multiply(codes, weight, row_scale, (weight_scale, scale_stride), None, dense_part(bias))

    return run


def _weight_only_tiles(x: torch.Tensor, rows: int, in_features: int, num_groups: int, dot: str) -> _Tiles:
    tiles = _linear_tiles(rows, in_features, 32 if dot == "fp32" else 16, gpu_of(x.device).capability)
    if num_groups > 1:  # a tile stays within a group, and has a sum for it beside the whole sum
        group_size = in_features // num_groups
        block = min(tiles.block_k, group_size & -group_size)
        stages = min(tiles.stages * (tiles.block_k // block), 8)  # as many bytes in flight
        tiles = tiles._replace(block_k=block, block_n=min(tiles.block_n, 64), stages=stages)
    return tiles


def _plan_weight_only(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Plan:
    check_devices(x, weight, weight_scale, weight_zero, bias)
    out_features, in_features, num_groups = check_weight_only(x, weight, weight_scale, weight_zero, bias)
    group_size, is_int4 = in_features // num_groups, weight.dtype == torch.uint8
    smallest = WEIGHT_BLOCK if is_int4 else 16
    if num_groups > 1 and group_size % smallest:
        raise ValueError(f"linear_weight_only on CUDA takes groups of a multiple of {smallest}, not {group_size}")
    if x.numel() == 0 or out_features == 0:
        return _empty
    rows, dot = _cuda_rows(x), "fp32" if x.dtype == torch.float32 else "own"
    count = rows.count
    tiles = _weight_only_tiles(x, count, in_features, num_groups, dot)
    constants = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
                 "IS_EVEN": in_features % tiles.block_k == 0, "IS_INT4": is_int4, "IS_GROUPED": num_groups > 1,
                 "PACKED": WEIGHT_BLOCK, "DOT": dot}  # fmt: skip
    launch = Launch(
        weight_only_kernel, (-(-count // tiles.block_m) * -(-out_features // tiles.block_n),), constants,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
    )  # fmt: skip
    shape, dtype, strides, scale_strides = (
        (*x.shape[:-1], out_features), x.dtype, weight.stride(), weight_scale.stride()
    )  # fmt: skip
    zero_strides = None if weight_zero is None else weight_zero.stride()

    def run(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        output = torch.empty(shape, dtype=dtype, device=x.device)
        launch(
            rows.of(x), (weight, *strides), (scale, *scale_strides), None if zero is None else (zero, *zero_strides),
            output, dense_part(bias), count, out_features, in_features, group_size,
        )  # fmt: skip
        return output

    return run


def linear_w8a8_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """`linear_w8a8_reference` in Triton, bit for bit.

    Raises:
        ValueError: shapes that do not go together.
    """
    arguments = x, weight, input_scale, input_offset, quant_bias, deq_scale
    return by_plan("linear_w8a8", linear_w8a8_reference, _plan_w8a8, arguments)


def linear_w8a8_dynamic_cuda(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_w8a8_dynamic_reference` in Triton, bit for bit.

    Raises:
        ValueError: shapes that do not go together.
    """
    arguments = x, weight, weight_scale, bias
    return by_plan("linear_w8a8_dynamic", linear_w8a8_dynamic_reference, _plan_w8a8_dynamic, arguments)


def linear_fp8_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_fp8_reference` in Triton; before Ada, codes become float16 in registers, which holds each exactly.

    Raises:
        ValueError: shapes that do not go together, or a weight that is not e4m3.
    """
    return by_plan("linear_fp8", linear_fp8_reference, _plan_fp8, (x, weight, weight_scale, input_scale, bias))


def linear_weight_only_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_weight_only_reference` in Triton: x in its own 16 bits, or in float32 as three products of TF32.

    Raises:
        ValueError: shapes that do not go together, or groups that are no multiple of 16 (int8) or 32 (int4).
    """
    arguments = x, weight, weight_scale, weight_zero, bias
    return by_plan("linear_weight_only", linear_weight_only_reference, _plan_weight_only, arguments)
