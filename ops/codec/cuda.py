"""The codec on CUDA GPUs: Triton kernels behind the Python signatures of the references.

A program takes some rows of head_dim in two halves, which is how int4 codes are packed.
With 2 and 3 bits each half consists of the parts that lie behind each other in the bits of a byte. It divides and
rounds as the references do, without fused multiply-adds, so the codes are theirs, bit for bit.
"""

import torch

from ..shared.codes import LARGEST_ZERO, SMALLEST_SCALE, code_range
from ..shared.fallback import fell_back
from ..shared.operands import part_strides
from ..shared.triton_helpers import (
    CODE_KINDS,
    FP8_CAPABILITY,
    codes_as_float,
    cuda_description,
    gpu_of,
    jit,
    load_halves,
    on_device,
    power_of_two,
    raw_codes,
    round_half_even,
    strided,
    tl,
    to_code,
    triton_supports,
)
from .arguments import check_decode, check_encode, check_encode_token
from .reference import decode_reference, encode_reference, encode_token_reference

CODEC_CUDA = cuda_description("a pass over the values, with the append at `position` in it")
PARTS = {4: 1, 3: 4, 2: 2}
"""In how many parts kernels take half of the channels, by the bits of codes in uint8."""


@jit()
def _row_places(rows, groups, tokens):
    """Of rows `[R]` of `[B, G, S]`: sequence and head as int64, and token."""
    return (rows // tokens // groups).to(tl.int64), (rows // tokens % groups).to(tl.int64), rows % tokens


@jit()
def _float_halves(x, batch, group, token, inside, channels, WIDTH: tl.constexpr):
    """Both halves of rows of a float tensor, in float32."""
    pointer, batch_stride, group_stride, token_stride, channel_stride = x
    places = (batch * batch_stride + group * group_stride + token.to(tl.int64) * token_stride)[:, None]
    low, high = load_halves(
        pointer, places, channel_stride, inside[:, None], channels, WIDTH=WIDTH, KIND="float"
    )  # fmt: skip
    return low.to(tl.float32), high.to(tl.float32)


@jit()
def _part_values(part, batch, group, row, inside, channels, WIDTH: tl.constexpr):
    """A scale or zero of rows of codes at channels `[1, C]`, `[R, C]`; 1 where there is none."""
    pointer, batch_stride, group_stride, row_stride, channel_stride, channel_group = part
    places = (batch * batch_stride + group * group_stride + row.to(tl.int64) * row_stride)[:, None]
    columns = (channels // channel_group) * channel_stride
    return tl.load(pointer + places + columns, mask=inside[:, None] & (channels < WIDTH), other=1).to(tl.float32)


@jit()
def _written_token(position, token, capacity, inside):
    """The token of the storage to which a new one goes, and whether the storage has it."""
    token = token.to(tl.int64)
    start = tl.load(position).to(tl.int64) if position is not None else tl.zeros_like(token)
    return token + start, inside & (start >= -token) & (start < capacity - token)  # the sum may wrap


@jit()
def _half_channels(WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr):
    """Channels `[1, BLOCK_H]` of the first half of a row, part by part; what only fills a part is `WIDTH`."""
    lane = tl.arange(0, BLOCK_H)[None, :]
    if PARTS == 1:
        channels = lane
    else:
        SPAN: tl.constexpr = WIDTH // 2 // PARTS
        inside = lane % (BLOCK_H // PARTS)
        channels = tl.where(inside < SPAN, lane // (BLOCK_H // PARTS) * SPAN + inside, WIDTH)
    return channels


@jit()
def _load_indices(pointer, places, stride, inside, channels, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Both halves of rows of packed codes, as indices; of channels beyond the half anything."""
    is_low = inside & (channels < WIDTH // 2)
    if BITS == 4:
        both = tl.load(pointer + places + channels * stride, mask=is_low, other=0)
        low, high = both & 15, both >> 4
    else:
        QUARTER: tl.constexpr = WIDTH // 4
        fours = tl.load(pointer + places + channels % QUARTER * stride, mask=is_low, other=0)
        fours = fours.to(tl.int32) >> channels // QUARTER * 2
        low, high = fours & 3, (fours >> 4) & 3
    if BITS == 3:
        EIGHTH: tl.constexpr = WIDTH // 8
        eights = tl.load(pointer + places + (QUARTER + channels % EIGHTH) * stride, mask=is_low, other=0)
        eights = eights.to(tl.int32) >> channels // EIGHTH
        low, high = low | ((eights & 1) << 2), high | ((eights >> 2) & 4)
    return low, high


@jit()
def _values_of_indices(indices, levels, BITS: tl.constexpr):
    """The codes of indices, or their levels, in float32."""
    if levels is not None:
        values = tl.load(levels + indices.to(tl.int32))
    else:
        values = indices.to(tl.float32) - 2.0 ** (BITS - 1)
    return values


@jit()
def _nearest_index(x, levels, BITS: tl.constexpr):
    """The index of the level nearest to each value, the lower one of two as near, or without levels of the code."""
    if levels is not None:
        index = tl.zeros(x.shape, tl.int32)
        for border in tl.static_range(2**BITS - 1):
            middle = (tl.load(levels + border) + tl.load(levels + border + 1)) * 0.5
            index += tl.where(x <= middle, 0, 1)
    else:
        HALF_RANGE: tl.constexpr = 2.0 ** (BITS - 1)
        index = (round_half_even(tl.minimum(tl.maximum(x, -HALF_RANGE), HALF_RANGE - 1)) + HALF_RANGE).to(tl.int32)
    return index


@jit()
def _store_packed(places, stride, low, high, inside, channels, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Write the indices of both halves of rows, packed, from the addresses `places` `[R, 1]` on."""
    if BITS == 4:
        mask = inside & (channels < WIDTH // 2)
        tl.store(places + channels * stride, (low | (high << 4)).to(tl.uint8), mask=mask)
    else:
        ROWS: tl.constexpr = low.shape[0]
        LANES: tl.constexpr = low.shape[1]
        fours = ((low & 3) | ((high & 3) << 4)) << (channels // (WIDTH // 4) * 2)
        fours = tl.sum(tl.reshape(fours, [ROWS, 2, LANES // 2]), 1)
        quarter = tl.min(tl.reshape(channels, [2, LANES // 2]), 0)[None, :]
        tl.store(places + quarter * stride, fours.to(tl.uint8), mask=inside & (quarter < WIDTH // 4))
    if BITS == 3:
        eights = ((low >> 2) | ((high >> 2) << 4)) << (channels // (WIDTH // 8))
        eights = tl.sum(tl.reshape(eights, [ROWS, 4, LANES // 4]), 1)
        eighth = tl.min(tl.reshape(channels, [4, LANES // 4]), 0)[None, :]
        tl.store(places + (WIDTH // 4 + eighth) * stride, eights.to(tl.uint8), mask=inside & (eighth < WIDTH // 8))


@jit()
def _store_codes(
    codes, levels, low, high, batch, group, target, inside, channels,
    WIDTH: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Round both halves of rows, in units of codes, and write them."""
    HALF: tl.constexpr = (WIDTH + 1) // 2
    pointer, batch_stride, group_stride, token_stride, channel_stride = codes
    places = pointer + (batch * batch_stride + group * group_stride + target * token_stride)[:, None]
    inside = inside[:, None]
    if KIND == "int4":  # or of another number of bits
        low, high = _nearest_index(low, levels, BITS), _nearest_index(high, levels, BITS)
        _store_packed(places, channel_stride, low, high, inside, channels, WIDTH, BITS)
    else:
        tl.store(places + channels * channel_stride, to_code(low, KIND), mask=inside & (channels < HALF))
        second = channels + HALF
        tl.store(places + second * channel_stride, to_code(high, KIND), mask=inside & (second < WIDTH))


@jit("rows", "tokens", "capacity")
def encode_kernel(
    x, scale, zero, codes, levels, position, rows, groups, tokens, capacity,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of x as codes by static scales."""
    number = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = number < rows
    batch, group, token = _row_places(number, groups, tokens)
    channels = _half_channels(WIDTH, BLOCK_H, PARTS)
    low, high = _float_halves(x, batch, group, token, inside, channels, WIDTH)
    second = channels + (WIDTH + 1) // 2
    low = tl.div_rn(low, _part_values(scale, batch, group, token, inside, channels, WIDTH))
    high = tl.div_rn(high, _part_values(scale, batch, group, token, inside, second, WIDTH))
    if zero is not None:
        low += _part_values(zero, batch, group, token, inside, channels, WIDTH)
        high += _part_values(zero, batch, group, token, inside, second, WIDTH)
    target, inside = _written_token(position, token, capacity, inside)
    _store_codes(codes, levels, low, high, batch, group, target, inside, channels, WIDTH, KIND, BITS)


@jit("rows", "tokens", "capacity")
def encode_token_kernel(
    x, codes, scale, zero, position, rows, groups, tokens, capacity,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST_ZERO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of x as codes and their scales, one for each of `COLUMNS` groups of channels."""
    number = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = number < rows
    batch, group, token = _row_places(number, groups, tokens)
    target, is_written = _written_token(position, token, capacity, inside)
    channels = _half_channels(WIDTH, BLOCK_H, PARTS)
    second = channels + (WIDTH + 1) // 2
    low, high = _float_halves(x, batch, group, token, inside, channels, WIDTH)
    is_nan_low, is_nan_high = (low != low).to(tl.int32), (high != high).to(tl.int32)
    scale_pointer, scale_batch, scale_group, scale_token, scale_column = scale
    scale_places = scale_pointer + batch * scale_batch + group * scale_group + target * scale_token
    scale_type = scale_pointer.dtype.element_ty
    code_low, code_high = low, high
    for column in tl.static_range(COLUMNS):
        of_low = (channels // (WIDTH // COLUMNS) == column) & (channels < (WIDTH + 1) // 2)
        of_high = (second // (WIDTH // COLUMNS) == column) & (second < WIDTH)
        if zero is None:
            largest = tl.maximum(
                tl.max(tl.where(of_low, tl.abs(low), 0.0), 1), tl.max(tl.where(of_high, tl.abs(high), 0.0), 1)
            )
            step = tl.div_rn(largest, tl.full([BLOCK_R], HIGH, tl.float32))
        else:
            largest = tl.maximum(
                tl.max(tl.where(of_low, low, float("-inf")), 1), tl.max(tl.where(of_high, high, float("-inf")), 1)
            )
            smallest = tl.minimum(
                tl.min(tl.where(of_low, low, float("inf")), 1), tl.min(tl.where(of_high, high, float("inf")), 1)
            )
            step = tl.div_rn(largest - smallest, tl.full([BLOCK_R], HIGH - LOW, tl.float32))
            if zero[0].dtype.element_ty == tl.float16:
                step = tl.maximum(step, tl.maximum(tl.abs(smallest), tl.abs(largest)) * (1.0 / LARGEST_ZERO))
        step = tl.maximum(step, SMALLEST)
        nans = tl.max(tl.where(of_low, is_nan_low, 0), 1) + tl.max(tl.where(of_high, is_nan_high, 0), 1)
        step = tl.where(nans > 0, float("nan"), step).to(scale_type)
        tl.store(scale_places + column * scale_column, step, mask=is_written)
        step = step.to(tl.float32)
        column_low, column_high = tl.div_rn(low, step[:, None]), tl.div_rn(high, step[:, None])
        if zero is not None:
            zero_pointer, zero_batch, zero_group, zero_token, zero_column = zero
            zero_places = zero_pointer + batch * zero_batch + group * zero_group + target * zero_token
            offset = (LOW - tl.div_rn(smallest, step)).to(zero_pointer.dtype.element_ty)
            tl.store(zero_places + column * zero_column, offset, mask=is_written)
            column_low += offset.to(tl.float32)[:, None]
            column_high += offset.to(tl.float32)[:, None]
        code_low = tl.where(of_low, column_low, code_low)
        code_high = tl.where(of_high, column_high, code_high)
    _store_codes(codes, None, code_low, code_high, batch, group, target, is_written, channels, WIDTH, KIND, BITS)


@jit("rows", "tokens")
def decode_kernel(
    codes, scale, zero, levels, output, rows, groups, tokens,
    WIDTH: tl.constexpr, TOKEN_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of codes as float32 values."""
    HALF: tl.constexpr = (WIDTH + 1) // 2
    number = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = number < rows
    batch, group, token = _row_places(number, groups, tokens)
    channels = _half_channels(WIDTH, BLOCK_H, PARTS)
    second = channels + HALF
    pointer, batch_stride, group_stride, token_stride, channel_stride = codes
    places = (batch * batch_stride + group * group_stride + token.to(tl.int64) * token_stride)[:, None]
    if KIND == "int4":
        low, high = _load_indices(pointer, places, channel_stride, inside[:, None], channels, WIDTH, BITS)
        low, high = _values_of_indices(low, levels, BITS), _values_of_indices(high, levels, BITS)
    else:
        low, high = load_halves(pointer, places, channel_stride, inside[:, None], channels, WIDTH=WIDTH, KIND=KIND)
        low, high = codes_as_float(low, KIND, NATIVE), codes_as_float(high, KIND, NATIVE)
    if zero is not None:
        low -= _part_values(zero, batch, group, token // TOKEN_GROUP, inside, channels, WIDTH)
        high -= _part_values(zero, batch, group, token // TOKEN_GROUP, inside, second, WIDTH)
    if scale is not None:
        low *= _part_values(scale, batch, group, token // TOKEN_GROUP, inside, channels, WIDTH)
        high *= _part_values(scale, batch, group, token // TOKEN_GROUP, inside, second, WIDTH)
    places = output + number.to(tl.int64)[:, None] * WIDTH
    tl.store(places + channels, low, mask=inside[:, None] & (channels < HALF))
    tl.store(places + second, high, mask=inside[:, None] & (second < WIDTH))


def _codec_part(name: str, part: torch.Tensor | None, shape: tuple[int, ...], token_group: int) -> tuple | None:
    """A scale or zero of codes of shape `[B, G, S, D]` as `(pointer, strides of B, G, rows and columns, group)`.

    Raises:
        ValueError: it does not belong to them.
    """
    if part is None:
        return None
    _, columns, strides = part_strides(name, part, shape, token_group)
    return (part, *strides, shape[3] // columns)


def _channel_constants(codes: torch.Tensor, width: int, bits: int) -> dict[str, int]:
    """How a program takes half of `width` channels: lanes, parts, and the bits of codes in uint8."""
    if codes.dtype != torch.uint8:
        bits = 4
    parts = PARTS[bits]
    return {"BLOCK_H": parts * power_of_two(-(-width // (2 * parts))), "PARTS": parts, "BITS": bits}


def _rows_per_program(rows: int) -> tuple[int, int]:
    """Rows of head_dim and warps of a program: small ones where there are few rows, so that all start at once."""
    return (4, 1) if rows <= 4096 else (16, 4)


def encode_cuda(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codes: torch.Tensor,
    position: torch.Tensor | None = None,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> None:
    """`encode_reference` in Triton; tokens that would go beyond the storage are left out.

    Raises:
        ValueError: what does not go together, as the reference says.
        IndexError: more tokens than the storage has.
    """
    if fell_back("encode", "CUDA", triton_supports(x)):
        return encode_reference(x, scale, zero, codes, position, bits, levels)
    check_encode(x, scale, zero, codes, position, bits, levels)
    batch, groups, tokens, width = x.shape
    rows = batch * groups * tokens
    if x.numel() == 0:
        return None
    block, warps = _rows_per_program(rows)
    with on_device(x):
        encode_kernel[(-(-rows // block),)](
            strided(x), _codec_part("scale", scale, x.shape, 1),
            _codec_part("zero", zero, x.shape, 1), strided(raw_codes(codes)),
            None if levels is None else levels.contiguous(), position, rows, groups, tokens, codes.shape[2],
            WIDTH=width, BLOCK_R=block, KIND=CODE_KINDS[codes.dtype], **_channel_constants(codes, width, bits),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return None


def encode_token_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    bits: int = 4,
) -> None:
    """`encode_token_reference` in Triton; tokens that would go beyond the storage are left out.

    Raises:
        ValueError: what does not go together, as the reference says.
        IndexError: more tokens than the storage has.
    """
    if fell_back("encode_token", "CUDA", triton_supports(x)):
        return encode_token_reference(x, codes, scale, zero, position, bits)
    check_encode_token(x, codes, scale, zero, position, bits)
    batch, groups, tokens, width = x.shape
    rows = batch * groups * tokens
    if x.numel() == 0:
        return None
    low, high = code_range(codes.dtype, bits)
    block, warps = _rows_per_program(rows)
    with on_device(x):
        encode_token_kernel[(-(-rows // block),)](
            strided(x), strided(raw_codes(codes)), strided(scale),
            None if zero is None else strided(zero), position,
            rows, groups, tokens, codes.shape[2],
            WIDTH=width, COLUMNS=scale.shape[3], LOW=low, HIGH=high, SMALLEST=SMALLEST_SCALE,
            LARGEST_ZERO=LARGEST_ZERO, BLOCK_R=block, KIND=CODE_KINDS[codes.dtype],
            **_channel_constants(codes, width, bits), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return None


def decode_cuda(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    token_group: int = 1,
    bits: int = 4,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_reference` in Triton.

    Raises:
        ValueError: shapes that do not go together.
    """
    if fell_back("decode", "CUDA", triton_supports(codes)):
        return decode_reference(codes, scale, zero, token_group, bits, levels)
    shape = batch, groups, tokens, width = check_decode(codes, scale, zero, token_group, bits, levels)
    output = torch.empty(shape, dtype=torch.float32, device=codes.device)
    rows = batch * groups * tokens
    if output.numel() == 0:
        return output
    block, warps = _rows_per_program(rows)
    with on_device(codes):
        decode_kernel[(-(-rows // block),)](
            strided(raw_codes(codes)), _codec_part("scale", scale, shape, token_group),
            _codec_part("zero", zero, shape, token_group), None if levels is None else levels.contiguous(), output,
            rows, groups, tokens,
            WIDTH=width, TOKEN_GROUP=token_group, BLOCK_R=block, **_channel_constants(codes, width, bits),
            KIND=CODE_KINDS.get(codes.dtype, "float"), NATIVE=gpu_of(codes.device).capability >= FP8_CAPABILITY,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return output
