"""Tiles of K and V in the registers of a GPU: codes, their scales and zeros, and products of them."""

from ..shared.triton_helpers import codes_as_float, codes_as_half, jit, tl


@jit()
def bounded_count(count):
    """A length or position, between -2^29 and 2^29 (`LARGEST_COUNT`), so that sums fit 32 bits."""
    return tl.minimum(tl.maximum(count.to(tl.int64), -536870912), 536870912)


@jit()
def channel_values(part, batch, group, channels, FORM: tl.constexpr, WIDTH: tl.constexpr):
    """A scale or zero that does not vary along tokens, at channels `[1, C]`."""
    pointer, batch_stride, group_stride, _, channel_stride, channel_group = part
    start = pointer + batch * batch_stride + group * group_stride
    if FORM == "head":
        values = tl.load(start).to(tl.float32) + tl.zeros_like(channels).to(tl.float32)
    else:
        columns = channels // channel_group
        values = tl.load(start + columns * channel_stride, mask=channels < WIDTH, other=0).to(tl.float32)
    return values


@jit()
def token_values(part, batch, group, tokens, stored, TOKEN_GROUP: tl.constexpr):
    """A scale or zero per token, or per group of tokens, at tokens `[N]`."""
    pointer, batch_stride, group_stride, row_stride, _, _ = part
    start = pointer + batch * batch_stride + group * group_stride
    return tl.load(start + (tokens // TOKEN_GROUP).to(tl.int64) * row_stride, mask=stored, other=0).to(tl.float32)


@jit()
def _tile_values(
    part, batch, group, start, tokens, stored, channels, LAYOUT: tl.constexpr, WIDTH: tl.constexpr,
    TOKEN_GROUP: tl.constexpr,
):  # fmt: skip
    """A scale or zero of any form at tokens `[N]`, from `start` on, and channels `[1, C]`.

    LAYOUT says how many values that takes: -1, all tokens share a row of scales; 0, one for each code; otherwise the
    number of consecutive channels that share one.
    """
    pointer, batch_stride, group_stride, row_stride, channel_stride, channel_group = part
    pointer += batch * batch_stride + group * group_stride
    rows = (tokens // TOKEN_GROUP).to(tl.int64)[:, None] * row_stride
    BLOCK_H: tl.constexpr = channels.shape[1]
    BLOCK_N: tl.constexpr = tokens.shape[0]
    if LAYOUT == -1:
        row = tl.cast(start // TOKEN_GROUP, tl.int64) * row_stride
        columns = (channels // channel_group) * channel_stride
        values = tl.load(pointer + row + columns, mask=channels < WIDTH, other=0)
    elif LAYOUT == 0:
        columns = (channels // channel_group) * channel_stride
        values = tl.load(pointer + rows + columns, mask=stored[:, None] & (channels < WIDTH), other=0)
    else:
        COLUMNS: tl.constexpr = BLOCK_H // LAYOUT
        columns = (tl.min(channels, 1)[:, None] // channel_group + tl.arange(0, COLUMNS)[None, :]) * channel_stride
        values = tl.load(pointer + rows + columns, mask=stored[:, None], other=0)
        if COLUMNS > 1:
            spread = tl.broadcast_to(values[:, :, None], [BLOCK_N, COLUMNS, LAYOUT])
            values = tl.reshape(spread, [BLOCK_N, BLOCK_H])
    return values.to(tl.float32)


@jit()
def decoded_half(
    codes, scale, zero, batch, group, start, tokens, stored, channels,
    KIND: tl.constexpr, WIDTH: tl.constexpr, TOKEN_GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """A tile of codes as values, float32; `SCALE` and `ZERO` are layouts."""
    values = codes_as_float(codes, KIND, NATIVE)
    if zero is not None:
        values -= _tile_values(zero, batch, group, start, tokens, stored, channels, ZERO, WIDTH, TOKEN_GROUP)
    if scale is not None:
        values *= _tile_values(scale, batch, group, start, tokens, stored, channels, SCALE, WIDTH, TOKEN_GROUP)
    return values


@jit()
def tile_operand(codes, KIND: tl.constexpr, DOT: tl.constexpr, NATIVE: tl.constexpr):
    """A tile of codes, or of float values, as an operand of a matrix product in `DOT`."""
    if DOT == "int8":
        operand = codes.to(tl.int8) - 8 if KIND == "int4" else codes
    elif DOT == "fp8":
        operand = codes.to(tl.float8e4nv if KIND == "e4m3" else tl.float8e5, bitcast=True)
    elif DOT == "bf16":
        operand = codes.to(tl.bfloat16)
    elif KIND == "float":
        operand = codes.to(tl.float32 if DOT == "fp32" else tl.float16)
    else:
        operand = codes_as_half(codes, KIND, NATIVE)
        if DOT == "fp32":
            operand = operand.to(tl.float32)
    return operand


@jit()
def tile_product(left, right, DOT: tl.constexpr):
    """`left @ right` in float32; whole numbers of int8 codes stay exact, a row has at most 256."""
    if DOT == "int8":
        product = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
    elif DOT == "fp32":
        product = tl.dot(left, right, input_precision="tf32x3")
    else:
        product = tl.dot(left, right)
    return product


@jit()
def query_operand(values, KIND: tl.constexpr, DOT: tl.constexpr):
    """Half of the queries as an operand; for fp8, `values` are codes as bytes."""
    if DOT == "fp8":
        operand = values.to(tl.float8e4nv if KIND == "e4m3" else tl.float8e5, bitcast=True)
    elif DOT == "int8":
        operand = values.to(tl.int8)
    elif DOT == "bf16":
        operand = values.to(tl.bfloat16)
    elif DOT == "fp16":
        operand = values.to(tl.float16)
    else:
        operand = values
    return operand


@jit()
def table_rows(
    table, first, tokens, stored, BLOCK_E: tl.constexpr, POSITION_WIDTH: tl.constexpr
):  # fmt: skip
    """Rows of the table of scores by position at tokens `[N]`, those beyond its ends from there, in float32."""
    pointer, row_stride, channel_stride, last = table
    channels = tl.arange(0, BLOCK_E)[None, :]
    rows = tl.minimum(tl.maximum(first + tokens, 0), last)[:, None] * row_stride
    inside = stored[:, None] & (channels < POSITION_WIDTH)
    return tl.load(pointer + rows + channels * channel_stride, mask=inside, other=0).to(tl.float32)
