"""Linear layers on CUDA GPUs: Triton kernels behind the Python signatures of the references.

Activations that are quantized become codes in one kernel, and a second multiplies codes by codes; weight-only layers
take one kernel, which decodes tiles of weights in registers. No weight is ever in memory as float.
"""

from typing import NamedTuple

import torch

from ..shared.codes import CODE_RANGES, SMALLEST_SCALE
from ..shared.fallback import fell_back
from ..shared.operands import check_devices
from ..shared.triton_helpers import (
    FP8_CAPABILITY,
    codes_as_float,
    codes_as_half,
    cuda_description,
    e4m3_as_half,
    gpu_of,
    jit,
    on_device,
    raw_codes,
    strided,
    tl,
    to_code,
    triton_supports,
)
from .arguments import WEIGHT_BLOCK, check_fp8, check_w8a8, check_w8a8_dynamic, check_weight_only
from .reference import (
    linear_fp8_reference,
    linear_w8a8_dynamic_reference,
    linear_w8a8_reference,
    linear_weight_only_reference,
)

LINEAR_CUDA = cuda_description("codes times codes in the matrix units, a row of tiles for few tokens")
WEIGHT_ONLY_CUDA = cuda_description("weights decoded in registers, a row of tiles for few tokens")
LARGEST_ROW_BLOCK = 4096


@jit()
def quantize_rows_kernel(
    x, codes, row_scale, input_scale, input_offset, depth,
    LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A row of x as codes: by `input_scale` a part of it, or all of it by the scale that it finds and writes.

    By `input_scale` and with `row_scale` it writes a scale of 1, or of NaN where the row has one.
    """
    pointer, row_stride, column_stride = x
    row = tl.program_id(0).to(tl.int64)
    pointer += row * row_stride
    codes += row * depth
    columns = tl.arange(0, BLOCK)
    nans = tl.zeros([BLOCK], tl.int32)
    if input_scale is not None:
        for start in range(tl.program_id(1) * BLOCK, depth, tl.num_programs(1) * BLOCK):
            inside = start + columns < depth
            values = tl.load(pointer + (start + columns) * column_stride, mask=inside, other=0).to(tl.float32)
            values = tl.div_rn(values, tl.zeros_like(values) + tl.load(input_scale).to(tl.float32))
            if input_offset is not None:
                values += tl.load(input_offset).to(tl.float32)
            tl.store(codes + start + columns, to_code(values, KIND), mask=inside)
            nans += (inside & (values != values)).to(tl.int32)
        if row_scale is not None:
            tl.store(row_scale + row, tl.where(tl.max(nans, 0) > 0, float("nan"), 1.0))
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, depth, BLOCK):
            inside = start + columns < depth
            values = tl.load(pointer + (start + columns) * column_stride, mask=inside, other=0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
            nans += (values != values).to(tl.int32)
        step = tl.div_rn(tl.max(largest, 0), tl.full([], HIGH, tl.float32))
        step = tl.where(tl.max(nans, 0) > 0, float("nan"), tl.maximum(step, SMALLEST))
        tl.store(row_scale + row, step)
        for start in range(0, depth, BLOCK):
            inside = start + columns < depth
            values = tl.load(pointer + (start + columns) * column_stride, mask=inside, other=0).to(tl.float32)
            values = tl.div_rn(values, tl.zeros_like(values) + step)
            tl.store(codes + start + columns, to_code(values, KIND), mask=inside)


@jit()
def _output_tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and column of a program's tile; tiles that share weights run beside each other."""
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = tl.program_id(0) // (8 * column_blocks)
    in_band = tl.minimum(row_blocks - band * 8, 8)
    place = tl.program_id(0) % (8 * column_blocks)
    return (band * 8 + place % in_band) * BLOCK_M, (place // in_band) * BLOCK_N


@jit()
def _store_tile(output, values, bias, row, column, rows, columns):
    """Write a tile of `[M, N]` with the bias added."""
    if bias is not None:
        values += tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)[None, :]
    places = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(output + places, values.to(output.dtype.element_ty), mask=inside)


@jit("rows")
def codes_linear_kernel(
    codes, weight, output, row_scale, column_scale, quant_bias, bias, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of codes `[M, K]` times codes `[N, K]`; `DOT` is "int8", "fp8", or "fp16" for fp8 where units lack it.

    `row_scale` is `(pointer, stride)` or None, `column_scale` `(pointer, stride)`, `quant_bias` int32 `[N]` or None.
    """
    first_row, first_column = _output_tile(rows, columns, BLOCK_M, BLOCK_N)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    weight_pointer, weight_row, weight_column = weight
    k = tl.arange(0, BLOCK_K)
    codes += first_row.to(tl.int64) * depth
    weight_pointer += first_column.to(tl.int64) * weight_row
    a_places = tl.arange(0, BLOCK_M)[:, None] * depth + k[None, :]
    b_places = tl.arange(0, BLOCK_N)[:, None] * weight_row + (k * weight_column)[None, :]
    is_row, is_column = (row < rows)[:, None], (column < columns)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if DOT == "int8" else tl.float32)
    for start in range(0, depth, BLOCK_K):
        if IS_EVEN:
            a = tl.load(codes + a_places, mask=is_row, other=0)
            b = tl.load(weight_pointer + b_places, mask=is_column, other=0)
        else:
            a = tl.load(codes + a_places, mask=is_row & (start + k < depth)[None, :], other=0)
            b = tl.load(weight_pointer + b_places, mask=is_column & (start + k < depth)[None, :], other=0)
        codes += BLOCK_K
        weight_pointer += BLOCK_K * weight_column
        if DOT == "int8":
            total = tl.dot(a, tl.trans(b), acc=total, out_dtype=tl.int32)
        elif DOT == "fp8":  # the units add up few bits: the sum over blocks is taken outside of them
            a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
            total += tl.dot(a, tl.trans(b))
        else:
            total = tl.dot(e4m3_as_half(a, False), tl.trans(e4m3_as_half(b, False)), acc=total)
    if quant_bias is not None:
        total += tl.load(quant_bias + column, mask=column < columns, other=0)[None, :]
    scale_pointer, scale_stride = column_scale
    scale = tl.load(scale_pointer + column * scale_stride, mask=column < columns, other=0)[None, :]
    if row_scale is not None:
        row_pointer, row_stride = row_scale
        scale = tl.load(row_pointer + row * row_stride, mask=row < rows, other=0)[:, None] * scale
    _store_tile(output, total.to(tl.float32) * scale, bias, row, column, rows, columns)


@jit()
def _weight_product(x, weight, total, KIND: tl.constexpr, DOT: tl.constexpr):
    """`total + x @ weight.T` where weights are codes, exact in every type of x; of int4, `code + 8` in uint8."""
    if DOT == "fp32":
        values = codes_as_float(weight, KIND, False)
        total = tl.dot(x.to(tl.float32), tl.trans(values), acc=total, input_precision="tf32x3")
    else:
        if x.dtype == tl.float16:
            values = codes_as_half(weight, KIND, False)
        elif KIND == "int4":  # as bits of 128 + code + 8
            values = (weight.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True).to(tl.float32) - 136.0
            values = values.to(tl.bfloat16)
        else:
            values = weight.to(tl.bfloat16)
        total = tl.dot(x, tl.trans(values), acc=total)
    return total


@jit("rows")
def weight_only_kernel(
    x, weight, scale, zero, output, bias, rows, columns, depth, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr, IS_INT4: tl.constexpr,
    IS_GROUPED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of float `[M, K]` times codes `[N, K]`, whose scale and zero are applied to the sums of a block.

    Of int4, bytes hold codes that are half of `PACKED` apart, and x is taken in two parts to match.
    """
    first_row, first_column = _output_tile(rows, columns, BLOCK_M, BLOCK_N)
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    x_pointer, x_row, x_column = x
    weight_pointer, weight_row, weight_column = weight
    scale_pointer, scale_row, scale_column = scale
    BYTES: tl.constexpr = BLOCK_K // 2 if IS_INT4 else BLOCK_K
    byte = tl.arange(0, BYTES)
    k = byte // (PACKED // 2) * PACKED + byte % (PACKED // 2) if IS_INT4 else byte
    is_row, is_column = (row < rows)[:, None], (column < columns)[:, None]
    x_pointer += first_row.to(tl.int64) * x_row
    weight_pointer += first_column.to(tl.int64) * weight_row
    x_places = tl.arange(0, BLOCK_M)[:, None] * x_row + (k * x_column)[None, :]
    places = tl.arange(0, BLOCK_N)[:, None] * weight_row + (byte * weight_column)[None, :]
    scale_places = scale_pointer + column.to(tl.int64) * scale_row
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = is_row if IS_EVEN else is_row & (start + k < depth)[None, :]
        is_weight = is_column if IS_EVEN else is_column & (start + k < depth)[None, :]
        codes = tl.load(weight_pointer + places, mask=is_weight, other=0)
        values = tl.load(x_pointer + x_places, mask=inside, other=0)
        block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if IS_GROUPED else total
        block_sum = tl.zeros([BLOCK_M], tl.float32) if IS_GROUPED else x_sum
        if zero is not None:
            block_sum += tl.sum(values.to(tl.float32), 1)
        if IS_INT4:
            second = start + k + PACKED // 2
            inside = is_row if IS_EVEN else is_row & (second < depth)[None, :]
            others = tl.load(x_pointer + PACKED // 2 * x_column + x_places, mask=inside, other=0)
            if zero is not None:
                block_sum += tl.sum(others.to(tl.float32), 1)
            block = _weight_product(values, codes & 15, block, "int4", DOT)
            block = _weight_product(others, codes >> 4, block, "int4", DOT)
        else:
            block = _weight_product(values, codes, block, "int8", DOT)
        x_pointer += BLOCK_K * x_column
        weight_pointer += BYTES * weight_column
        if IS_GROUPED:
            index = tl.cast(start // group, tl.int64)
            if zero is not None:
                zero_pointer, zero_row, zero_column = zero
                zero_places = zero_pointer + column.to(tl.int64) * zero_row + index * zero_column
                block -= block_sum[:, None] * tl.load(zero_places, mask=column < columns, other=0).to(tl.float32)
            steps = tl.load(scale_places + index * scale_column, mask=column < columns, other=0).to(tl.float32)
            total += block * steps[None, :]
        else:
            total = block
            x_sum = block_sum
    if not IS_GROUPED:
        if zero is not None:
            zero_pointer, zero_row, zero_column = zero
            zeros = tl.load(zero_pointer + column.to(tl.int64) * zero_row, mask=column < columns, other=0)
            total -= x_sum[:, None] * zeros.to(tl.float32)[None, :]
        total *= tl.load(scale_places, mask=column < columns, other=0).to(tl.float32)[None, :]
    _store_tile(output, total, bias, row, column, rows, columns)


class _Tiles(NamedTuple):
    """How a linear is cut: rows, columns and depth of a tile, warps, and tiles in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _linear_tiles(rows: int, depth: int, bits: int, capability: int) -> _Tiles:
    """Tiles for so many tokens: narrow ones for few, which are bound by the bandwidth of memory.

    Args:
        bits: of an element of x as it is multiplied.
    """
    has_room = capability in (80, 90, 100, 103)  # 163 KiB of shared memory and more; others have 99 KiB
    if rows <= 16:
        depth_of_few = {8: 512, 16: 256, 32: 64}[bits]
        tiles = _Tiles(16, 32, depth_of_few, 4, 4 if has_room else 3)  # of four warps on 16 columns some do the same
    elif rows <= 64 or bits == 32:
        tiles = _Tiles(64, 64, {8: 128, 16: 64, 32: 32}[bits], 4, 3)
    else:
        tiles = _Tiles(128, 128, 128 if bits == 8 else 64, 8, 3 if has_room else 2)
    return tiles._replace(depth=min(tiles.depth, max(32, 1 << (depth - 1).bit_length())))


def _contiguous(part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part.contiguous()


def _quantized_rows(
    rows: torch.Tensor, dtype: torch.dtype, kind: str, scale: torch.Tensor | None, offset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes `[M, K]`, fp8 as bytes, and float32 scales `[M]`: those found, or 1 and NaN where `scale` is that of codes.

    Codes in fp8 have a NaN of their own, and by `scale` no scales.
    """
    is_fp8 = dtype != torch.int8
    count, depth = rows.shape
    codes = torch.empty((count, depth), dtype=torch.uint8 if is_fp8 else torch.int8, device=rows.device)
    is_whole = scale is None or not is_fp8  # a program takes a row
    found = torch.empty((count,), dtype=torch.float32, device=rows.device) if is_whole else None
    block = min(LARGEST_ROW_BLOCK if is_whole else 1024, max(128, 1 << (depth - 1).bit_length()))
    low, high = CODE_RANGES[dtype]
    quantize_rows_kernel[(count, 1 if is_whole else -(-depth // block))](
        strided(rows), codes, found, scale, offset, depth,
        LOW=low, HIGH=high, SMALLEST=SMALLEST_SCALE, BLOCK=block, KIND=kind,
        num_warps=8 if block > 1024 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, found


def _multiplied(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor,
    row_scale: tuple | None,
    column_scale: tuple,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    dot: str,
) -> torch.Tensor:
    """Codes times codes, scaled, in the shape and dtype that belong to x."""
    rows, depth = codes.shape
    columns = weight.shape[0]
    output = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    tiles = _linear_tiles(rows, depth, 16 if dot == "fp16" else 8, gpu_of(x.device).capability)
    codes_linear_kernel[(-(-rows // tiles.rows) * -(-columns // tiles.columns),)](
        codes, strided(raw_codes(weight)), output, row_scale, column_scale, quant_bias, bias, rows, columns, depth,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, IS_EVEN=depth % tiles.depth == 0, DOT=dot,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return output


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
    if fell_back("linear_w8a8", "CUDA", triton_supports(x)):
        return linear_w8a8_reference(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    check_devices(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    columns, depth = check_w8a8(x, weight, input_scale, input_offset, quant_bias, deq_scale)
    rows, quant_bias, deq_scale = x.reshape(-1, depth), quant_bias.contiguous(), deq_scale.contiguous()
    if rows.shape[0] == 0 or columns == 0:
        return x.new_empty((*x.shape[:-1], columns))
    with on_device(x):
        codes, scale = _quantized_rows(rows, torch.int8, "int8", input_scale, input_offset)
        return _multiplied(x, codes, weight, (scale, 1), (deq_scale, 1), quant_bias, None, "int8")


def linear_w8a8_dynamic_cuda(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_w8a8_dynamic_reference` in Triton, bit for bit.

    Raises:
        ValueError: shapes that do not go together.
    """
    if fell_back("linear_w8a8_dynamic", "CUDA", triton_supports(x)):
        return linear_w8a8_dynamic_reference(x, weight, weight_scale, bias)
    check_devices(x, weight, weight_scale, bias)
    columns, depth = check_w8a8_dynamic(x, weight, weight_scale, bias)
    rows, weight_scale, bias = x.reshape(-1, depth), weight_scale.contiguous(), _contiguous(bias)
    if rows.shape[0] == 0 or columns == 0:
        return x.new_empty((*x.shape[:-1], columns))
    with on_device(x):
        codes, scale = _quantized_rows(rows, torch.int8, "int8", None, None)
        return _multiplied(x, codes, weight, (scale, 1), (weight_scale, 1), None, bias, "int8")


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
    if fell_back("linear_fp8", "CUDA", triton_supports(x)):
        return linear_fp8_reference(x, weight, weight_scale, input_scale, bias)
    check_devices(x, weight, weight_scale, input_scale, bias)
    columns, depth = check_fp8(x, weight, weight_scale, input_scale, bias)
    rows, bias = x.reshape(-1, depth), _contiguous(bias)
    if rows.shape[0] == 0 or columns == 0:
        return x.new_empty((*x.shape[:-1], columns))
    dot = "fp8" if gpu_of(x.device).capability >= FP8_CAPABILITY else "fp16"
    with on_device(x):
        codes, scale = _quantized_rows(rows, torch.float8_e4m3fn, "e4m3", input_scale, None)
        row_scale = (scale, 1) if input_scale is None else (input_scale, 0)
        column_scale = (weight_scale, weight_scale.stride(0) if weight_scale.shape[0] == columns else 0)
        return _multiplied(x, codes, weight, row_scale, column_scale, None, bias, dot)


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
    if fell_back("linear_weight_only", "CUDA", triton_supports(x)):
        return linear_weight_only_reference(x, weight, weight_scale, weight_zero, bias)
    check_devices(x, weight, weight_scale, weight_zero, bias)
    columns, depth, groups = check_weight_only(x, weight, weight_scale, weight_zero, bias)
    rows, bias = x.reshape(-1, depth), _contiguous(bias)
    smallest = WEIGHT_BLOCK if weight.dtype == torch.uint8 else 16
    if groups > 1 and depth // groups % smallest:
        raise ValueError(f"linear_weight_only on CUDA takes groups of a multiple of {smallest}, not {depth // groups}")
    output = x.new_empty((*x.shape[:-1], columns))
    if output.numel() == 0:
        return output
    dot = "fp32" if x.dtype == torch.float32 else "own"
    group = depth // groups
    tiles = _linear_tiles(
        rows.shape[0], depth, 32 if dot == "fp32" else 16, gpu_of(x.device).capability
    )  # fmt: skip
    if groups > 1:  # a tile stays within a group, and has a sum for it beside the whole sum
        block = min(tiles.depth, group & -group)
        stages = min(tiles.stages * (tiles.depth // block), 8)  # as many bytes in flight
        tiles = tiles._replace(depth=block, columns=min(tiles.columns, 64), stages=stages)
    with on_device(x):
        weight_only_kernel[(-(-rows.shape[0] // tiles.rows) * -(-columns // tiles.columns),)](
            strided(rows), strided(weight), strided(weight_scale),
            None if weight_zero is None else strided(weight_zero), output, bias, rows.shape[0], columns, depth, group,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, IS_EVEN=depth % tiles.depth == 0,
            IS_INT4=weight.dtype == torch.uint8, IS_GROUPED=groups > 1, PACKED=WEIGHT_BLOCK, DOT=dot,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return output
