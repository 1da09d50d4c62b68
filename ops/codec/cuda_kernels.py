"""Triton kernels of the codec.

A program takes some rows of head_dim in two halves, which is how int4 codes are packed. With 2 and 3 bits each half
consists of the parts that lie behind each other in the bits of a byte. It divides and rounds as the references do,
without fused multiply-adds, so the codes are theirs, bit for bit.
"""

from ..shared.triton_helpers import codes_as_float, jit, load_halves, round_half_even, tl, to_code


@jit()
def _row_places(rows, kv_heads, tokens):
    """Of rows `[R]` of `[B, G, S]`: sequence and head as int64, and token."""
    return (rows // tokens // kv_heads).to(tl.int64), (rows // tokens % kv_heads).to(tl.int64), rows % tokens


@jit()
def _float_halves(x, batch, kv_head, token, inside, channels, HEAD_DIM: tl.constexpr):
    """Both halves of rows of a float tensor, in float32."""
    pointer, batch_stride, head_stride, token_stride, channel_stride = x
    places = (batch * batch_stride + kv_head * head_stride + token.to(tl.int64) * token_stride)[:, None]
    low, high = load_halves(
        pointer, places, channel_stride, inside[:, None], channels, WIDTH=HEAD_DIM, KIND="float"
    )  # fmt: skip
    return low.to(tl.float32), high.to(tl.float32)


@jit()
def _part_values(part, batch, kv_head, row, inside, channels, HEAD_DIM: tl.constexpr):
    """A scale or zero of rows of codes at channels `[1, C]`, `[R, C]`; 1 where there is none."""
    pointer, batch_stride, head_stride, row_stride, channel_stride, group_size = part
    places = (batch * batch_stride + kv_head * head_stride + row.to(tl.int64) * row_stride)[:, None]
    offsets = (channels // group_size) * channel_stride
    return tl.load(pointer + places + offsets, mask=inside[:, None] & (channels < HEAD_DIM), other=1).to(tl.float32)


@jit()
def _written_token(position, token, capacity, inside):
    """The token of the storage to which a new one goes, and whether the storage has it."""
    token = token.to(tl.int64)
    start = tl.load(position).to(tl.int64) if position is not None else tl.zeros_like(token)
    return token + start, inside & (start >= -token) & (start < capacity - token)  # the sum may wrap


@jit()
def _half_channels(HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, PARTS: tl.constexpr):
    """Channels `[1, BLOCK_H]` of the first half of a row, part by part; what only fills a part is `HEAD_DIM`."""
    lane = tl.arange(0, BLOCK_H)[None, :]
    if PARTS == 1:
        channels = lane
    else:
        SPAN: tl.constexpr = HEAD_DIM // 2 // PARTS
        inside = lane % (BLOCK_H // PARTS)
        channels = tl.where(inside < SPAN, lane // (BLOCK_H // PARTS) * SPAN + inside, HEAD_DIM)
    return channels


@jit()
def _load_indices(pointer, places, stride, inside, channels, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Both halves of rows of packed codes, as indices; of channels beyond the half anything."""
    is_low = inside & (channels < HEAD_DIM // 2)
    if BITS == 4:
        both = tl.load(pointer + places + channels * stride, mask=is_low, other=0)
        low, high = both & 15, both >> 4
    else:
        QUARTER: tl.constexpr = HEAD_DIM // 4
        fours = tl.load(pointer + places + channels % QUARTER * stride, mask=is_low, other=0)
        fours = fours.to(tl.int32) >> channels // QUARTER * 2
        low, high = fours & 3, (fours >> 4) & 3
    if BITS == 3:
        EIGHTH: tl.constexpr = HEAD_DIM // 8
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
def _store_packed(places, stride, low, high, inside, channels, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Write the indices of both halves of rows, packed, from the addresses `places` `[R, 1]` on."""
    if BITS == 4:
        mask = inside & (channels < HEAD_DIM // 2)
        tl.store(places + channels * stride, (low | (high << 4)).to(tl.uint8), mask=mask)
    else:
        ROWS: tl.constexpr = low.shape[0]
        LANES: tl.constexpr = low.shape[1]
        fours = ((low & 3) | ((high & 3) << 4)) << (channels // (HEAD_DIM // 4) * 2)
        fours = tl.sum(tl.reshape(fours, [ROWS, 2, LANES // 2]), 1)
        quarter = tl.min(tl.reshape(channels, [2, LANES // 2]), 0)[None, :]
        tl.store(places + quarter * stride, fours.to(tl.uint8), mask=inside & (quarter < HEAD_DIM // 4))
    if BITS == 3:
        eights = ((low >> 2) | ((high >> 2) << 4)) << (channels // (HEAD_DIM // 8))
        eights = tl.sum(tl.reshape(eights, [ROWS, 4, LANES // 4]), 1)
        eighth = tl.min(tl.reshape(channels, [4, LANES // 4]), 0)[None, :]
        tl.store(
            places + (HEAD_DIM // 4 + eighth) * stride, eights.to(tl.uint8), mask=inside & (eighth < HEAD_DIM // 8)
        )


@jit()
def _store_codes(
    codes, levels, low, high, batch, kv_head, target, inside, channels,
    HEAD_DIM: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Round both halves of rows, in units of codes, and write them."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    pointer, batch_stride, head_stride, token_stride, channel_stride = codes
    places = pointer + (batch * batch_stride + kv_head * head_stride + target * token_stride)[:, None]
    inside = inside[:, None]
    if KIND == "int4":  # or of another number of bits
        low, high = _nearest_index(low, levels, BITS), _nearest_index(high, levels, BITS)
        _store_packed(places, channel_stride, low, high, inside, channels, HEAD_DIM, BITS)
    else:
        tl.store(places + channels * channel_stride, to_code(low, KIND), mask=inside & (channels < HALF))
        second = channels + HALF
        tl.store(places + second * channel_stride, to_code(high, KIND), mask=inside & (second < HEAD_DIM))


@jit("rows", "tokens", "capacity")
def encode_kernel(
    x, scale, zero, codes, levels, position, rows, kv_heads, tokens, capacity,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of x as codes by static scales."""
    number = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = number < rows
    batch, kv_head, token = _row_places(number, kv_heads, tokens)
    channels = _half_channels(HEAD_DIM, BLOCK_H, PARTS)
    low, high = _float_halves(x, batch, kv_head, token, inside, channels, HEAD_DIM)
    second = channels + (HEAD_DIM + 1) // 2
    low = tl.div_rn(low, _part_values(scale, batch, kv_head, token, inside, channels, HEAD_DIM))
    high = tl.div_rn(high, _part_values(scale, batch, kv_head, token, inside, second, HEAD_DIM))
    if zero is not None:
        low += _part_values(zero, batch, kv_head, token, inside, channels, HEAD_DIM)
        high += _part_values(zero, batch, kv_head, token, inside, second, HEAD_DIM)
    target, inside = _written_token(position, token, capacity, inside)
    _store_codes(codes, levels, low, high, batch, kv_head, target, inside, channels, HEAD_DIM, KIND, BITS)


@jit("rows", "tokens", "capacity")
def encode_token_kernel(
    x, codes, scale, zero, position, rows, kv_heads, tokens, capacity,
    HEAD_DIM: tl.constexpr, NUM_GROUPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST_ZERO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of x as codes and their scales, one for each of `NUM_GROUPS` groups of channels."""
    number = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = number < rows
    batch, kv_head, token = _row_places(number, kv_heads, tokens)
    target, is_written = _written_token(position, token, capacity, inside)
    channels = _half_channels(HEAD_DIM, BLOCK_H, PARTS)
    second = channels + (HEAD_DIM + 1) // 2
    low, high = _float_halves(x, batch, kv_head, token, inside, channels, HEAD_DIM)
    is_nan_low, is_nan_high = (low != low).to(tl.int32), (high != high).to(tl.int32)
    scale_pointer, scale_batch, scale_head, scale_token, scale_group_stride = scale
    scale_places = scale_pointer + batch * scale_batch + kv_head * scale_head + target * scale_token
    scale_type = scale_pointer.dtype.element_ty
    code_low, code_high = low, high
    for group in tl.static_range(NUM_GROUPS):
        of_low = (channels // (HEAD_DIM // NUM_GROUPS) == group) & (channels < (HEAD_DIM + 1) // 2)
        of_high = (second // (HEAD_DIM // NUM_GROUPS) == group) & (second < HEAD_DIM)
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
        tl.store(scale_places + group * scale_group_stride, step, mask=is_written)
        step = step.to(tl.float32)
        group_low, group_high = tl.div_rn(low, step[:, None]), tl.div_rn(high, step[:, None])
        if zero is not None:
            zero_pointer, zero_batch, zero_head, zero_token, zero_group_stride = zero
            zero_places = zero_pointer + batch * zero_batch + kv_head * zero_head + target * zero_token
            offset = (LOW - tl.div_rn(smallest, step)).to(zero_pointer.dtype.element_ty)
            tl.store(zero_places + group * zero_group_stride, offset, mask=is_written)
            group_low += offset.to(tl.float32)[:, None]
            group_high += offset.to(tl.float32)[:, None]
        code_low = tl.where(of_low, group_low, code_low)
        code_high = tl.where(of_high, group_high, code_high)
    _store_codes(codes, None, code_low, code_high, batch, kv_head, target, is_written, channels, HEAD_DIM, KIND, BITS)


@jit("rows", "tokens")
def decode_kernel(
    codes, scale, zero, levels, output, rows, kv_heads, tokens,
    HEAD_DIM: tl.constexpr, TOKEN_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`BLOCK_R` rows of codes as float32 values."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    number = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = number < rows
    batch, kv_head, token = _row_places(number, kv_heads, tokens)
    channels = _half_channels(HEAD_DIM, BLOCK_H, PARTS)
    second = channels + HALF
    pointer, batch_stride, head_stride, token_stride, channel_stride = codes
    places = (batch * batch_stride + kv_head * head_stride + token.to(tl.int64) * token_stride)[:, None]
    if KIND == "int4":
        low, high = _load_indices(pointer, places, channel_stride, inside[:, None], channels, HEAD_DIM, BITS)
        low, high = _values_of_indices(low, levels, BITS), _values_of_indices(high, levels, BITS)
    else:
        low, high = load_halves(pointer, places, channel_stride, inside[:, None], channels, WIDTH=HEAD_DIM, KIND=KIND)
        low, high = codes_as_float(low, KIND, NATIVE), codes_as_float(high, KIND, NATIVE)
    if zero is not None:
        low -= _part_values(zero, batch, kv_head, token // TOKEN_GROUP, inside, channels, HEAD_DIM)
        high -= _part_values(zero, batch, kv_head, token // TOKEN_GROUP, inside, second, HEAD_DIM)
    if scale is not None:
        low *= _part_values(scale, batch, kv_head, token // TOKEN_GROUP, inside, channels, HEAD_DIM)
        high *= _part_values(scale, batch, kv_head, token // TOKEN_GROUP, inside, second, HEAD_DIM)
    places = output + number.to(tl.int64)[:, None] * HEAD_DIM
    tl.store(places + channels, low, mask=inside[:, None] & (channels < HALF))
    tl.store(places + second, high, mask=inside[:, None] & (second < HEAD_DIM))
