"""Attention on CUDA GPUs: Triton kernels behind the Python signature of the reference.

One kernel attends, for decode and prefill alike. Its rows are the queries of all heads that share a KV head, so that
each tile of K and V is decoded once for them all. Where there are few rows the keys are split over more programs, and a
second kernel merges what those found. What does not vary along a sum is taken out of it, as README.md says; tiles of
codes are decoded in registers, and a width is worked at in two halves, which is how int4 rows are packed.

Nothing is read back from the device: the grid follows from the capacity, and programs share out the tokens in use.
"""

from typing import NamedTuple

import torch

from ..shared.codes import FP8_DTYPES
from ..shared.operands import broadcast_strides, part_strides
from ..shared.triton_helpers import (
    CODE_KINDS,
    FP8_CAPABILITY,
    codes_as_float,
    codes_as_half,
    cuda_description,
    gpu_of,
    jit,
    load_halves,
    on_device,
    power_of_two,
    raw_codes,
    strided,
    tl,
    to_code,
    triton_supports,
)
from .arguments import LARGEST_COUNT, check_attention
from .call import AttentionCall, Coded, PositionScores

ATTENTION_CUDA = cuda_description("codes decoded in registers, keys split over programs where queries are few")
LARGEST_WIDTH = 256
"""Of heads, and of rows of the table of scores by position."""
LOG2_E = 1.4426950408889634
MOST_SPLITS, FEWEST_KEYS = 128, 128
"""Of the split of keys over programs: how many parts at most, and how many keys a part has at least."""
MERGED_CHANNELS = 64


@jit()
def _bounded_count(count):
    """A length or position, between -2^29 and 2^29 (`LARGEST_COUNT`), so that sums fit 32 bits."""
    return tl.minimum(tl.maximum(count.to(tl.int64), -536870912), 536870912)


@jit()
def _channel_values(part, batch, group, channels, FORM: tl.constexpr, WIDTH: tl.constexpr):
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
def _token_values(part, batch, group, tokens, stored, TOKEN_GROUP: tl.constexpr):
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
def _decoded_half(
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
def _operand(codes, KIND: tl.constexpr, DOT: tl.constexpr, NATIVE: tl.constexpr):
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
def _product(left, right, DOT: tl.constexpr):
    """`left @ right` in float32; whole numbers of int8 codes stay exact, a row has at most 256."""
    if DOT == "int8":
        product = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
    elif DOT == "fp32":
        product = tl.dot(left, right, input_precision="tf32x3")
    else:
        product = tl.dot(left, right)
    return product


@jit()
def _query_operand(values, KIND: tl.constexpr, DOT: tl.constexpr):
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
def _table_rows(
    table, first, tokens, stored, BLOCK_E: tl.constexpr, POSITION_WIDTH: tl.constexpr
):  # fmt: skip
    """Rows of the table of scores by position at tokens `[N]`, those beyond its ends from there, in float32."""
    pointer, row_stride, channel_stride, last = table
    channels = tl.arange(0, BLOCK_E)[None, :]
    rows = tl.minimum(tl.maximum(first + tokens, 0), last)[:, None] * row_stride
    inside = stored[:, None] & (channels < POSITION_WIDTH)
    return tl.load(pointer + rows + channels * channel_stride, mask=inside, other=0).to(tl.float32)


@jit("queries", "keys", "window")
def attention_kernel(
    query, key, value, output, parts_lse, lse,
    key_scale, key_zero, value_scale, value_zero, query_scale, mask, length,
    position_query, position_table, position_start,
    groups, queries, keys, window, factor,
    RATIO: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    IS_SPLIT: tl.constexpr, KEY_KIND: tl.constexpr, VALUE_KIND: tl.constexpr, QUERY_KIND: tl.constexpr,
    KEY_DOT: tl.constexpr, VALUE_DOT: tl.constexpr, KEY_SCALE: tl.constexpr, KEY_ZERO: tl.constexpr,
    VALUE_SCALE: tl.constexpr, VALUE_ZERO: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, NATIVE: tl.constexpr,
    WANTS_LSE: tl.constexpr, POSITION_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Queries of all heads of one KV head, `BLOCK_M` rows of them, over one part of the keys.

    The forms of scales and zeros are "none", "head", "channel", "token", or "tile", which says that both scale and
    zero are applied to the tile, in the two layouts of `KEY_TILE` or `VALUE_TILE`. `factor` is that of the scores, for
    powers of two. `output` is `[B, Q, H, D]`; where `IS_SPLIT` it is float32 `[B, Q, H, splits, D]`, and `parts_lse`
    takes the logarithms, to base 2, of the sums of weights; otherwise `lse`, if there is one, natural ones. How many
    splits there are is no constant, for which the kernel would be compiled again and again as the cache grows.
    """
    HALF: tl.constexpr = (WIDTH + 1) // 2
    blocks = tl.cdiv(queries * RATIO, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks  # with causality the last ones have most to do
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(0) // blocks // groups).to(tl.int64)
    group = (tl.program_id(0) // blocks % groups).to(tl.int64)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < queries * RATIO
    number = rows // RATIO
    head = group * RATIO + rows % RATIO
    low = tl.arange(0, BLOCK_H)[None, :]
    high = low + HALF
    query_pointer, query_batch, query_head, query_token, query_channel = query
    query_rows = (batch * query_batch + head * query_head + number.to(tl.int64) * query_token)[:, None]
    q_low, q_high = load_halves(
        query_pointer, query_rows, query_channel, is_row[:, None], low, WIDTH=WIDTH, KIND="float"
    )
    row_factor = tl.full([BLOCK_M], 1.0, tl.float32) * factor
    if QUERY_KIND != "float":
        pointer, scale_batch, scale_head, scale_token, _ = query_scale
        place = batch * scale_batch + head * scale_head + number.to(tl.int64) * scale_token
        step = tl.load(pointer + place, mask=is_row, other=1.0).to(tl.float32)
        values_low = tl.div_rn(q_low.to(tl.float32), step[:, None])
        values_high = tl.div_rn(q_high.to(tl.float32), step[:, None])
        c_low, c_high = to_code(values_low, QUERY_KIND), to_code(values_high, QUERY_KIND)
        q_low, q_high = codes_as_float(c_low, QUERY_KIND, NATIVE), codes_as_float(c_high, QUERY_KIND, NATIVE)
        row_factor *= step
        if QUERY_KIND == "int8":  # whose codes have no NaN
            nans = (values_low != values_low).to(tl.int32) + (values_high != values_high).to(tl.int32)
            row_factor = tl.where(tl.max(nans, 1) > 0, float("nan"), row_factor)
    if KEY_SCALE == "head":
        pointer, scale_batch, scale_group, _, _, _ = key_scale
        row_factor *= tl.load(pointer + batch * scale_batch + group * scale_group).to(tl.float32)
    if KEY_SCALE == "channel":
        q_low = q_low.to(tl.float32) * _channel_values(key_scale, batch, group, low, KEY_SCALE, WIDTH)
        q_high = q_high.to(tl.float32) * _channel_values(key_scale, batch, group, high, KEY_SCALE, WIDTH)
    if KEY_DOT == "fp16" and (KEY_KIND != "float" or KEY_SCALE == "tile"):
        # By a power of two per row all queries fit float16, whose precision is that of bfloat16 or better.
        q_low, q_high = q_low.to(tl.float32), q_high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(q_low), 1), tl.max(tl.abs(q_high), 1))
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where(power == 0, 1.0, power)
        q_low, q_high = tl.div_rn(q_low, power[:, None]), tl.div_rn(q_high, power[:, None])
        row_factor *= power
    if KEY_DOT == "fp32":
        q_low, q_high = q_low.to(tl.float32), q_high.to(tl.float32)
    if KEY_DOT == "fp8":
        a_low, a_high = _query_operand(c_low, QUERY_KIND, KEY_DOT), _query_operand(c_high, QUERY_KIND, KEY_DOT)
    else:
        a_low, a_high = _query_operand(q_low, QUERY_KIND, KEY_DOT), _query_operand(q_high, QUERY_KIND, KEY_DOT)
    s_low, s_high = q_low, q_high  # what the zero points of K are multiplied by
    if KEY_DOT == "fp16" or KEY_DOT == "bf16":
        s_low, s_high = a_low.to(tl.float32), a_high.to(tl.float32)
    if KEY_ZERO == "token":
        query_sum = tl.sum(s_low, 1) + tl.sum(s_high, 1)
    elif (KEY_SCALE == "token" or WANTS_LSE) and (KEY_ZERO == "head" or KEY_ZERO == "channel"):
        query_sum = tl.sum(s_low * _channel_values(key_zero, batch, group, low, KEY_ZERO, WIDTH), 1)
        high_zero = tl.where(high < WIDTH, _channel_values(key_zero, batch, group, high, KEY_ZERO, WIDTH), 0.0)
        query_sum += tl.sum(s_high * high_zero, 1)

    if POSITION_WIDTH > 0:
        position_pointer, position_batch, position_head, position_token, position_channel = position_query
        start_pointer, start_batch = position_start
        places = (batch * position_batch + head * position_head + number.to(tl.int64) * position_token)[:, None]
        channels = tl.arange(0, BLOCK_E)[None, :]
        inside = is_row[:, None] & (channels < POSITION_WIDTH)
        loaded = tl.load(position_pointer + places + channels * position_channel, mask=inside, other=0)
        q_position = loaded.to(tl.float32)
        first_row = _bounded_count(tl.load(start_pointer + batch * start_batch))

    total = keys
    if length is not None:
        length_pointer, length_batch = length
        total = _bounded_count(tl.load(length_pointer + batch * length_batch)).to(tl.int32)
    valid = tl.minimum(total, keys)
    newest = total - queries + number
    first, last = 0, valid
    seen_from, seen_to = 0, valid  # keys that all rows see
    if CAUSAL:
        last_row = tl.minimum(block * BLOCK_M + BLOCK_M, queries * RATIO) - 1
        first_newest = total - queries + block * BLOCK_M // RATIO
        last_newest = total - queries + last_row // RATIO
        last, seen_to = tl.minimum(valid, last_newest + 1), tl.minimum(valid, first_newest + 1)
        if WINDOW:
            first = tl.maximum(first_newest - window + 1, 0) // BLOCK_N * BLOCK_N
            seen_from = last_newest - window + 1
    share = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), splits) * BLOCK_N
    first += split * share
    last = tl.minimum(last, first + share)

    key_pointer, key_batch, key_head, key_token, key_channel = key
    value_pointer, value_batch, value_head, value_token, value_channel = value
    key_pointer += batch * key_batch + group * key_head
    value_pointer += batch * value_batch + group * value_head
    offsets = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    zero_sum = tl.zeros([BLOCK_M], tl.float32)
    o_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    o_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_N):
        tokens = start + offsets
        stored = tokens < valid
        far = tl.cast(start, tl.int64)
        k_low, k_high = load_halves(
            key_pointer + far * key_token, offsets[:, None] * key_token, key_channel, stored[:, None], low,
            WIDTH=WIDTH, KIND=KEY_KIND,
        )  # fmt: skip
        v_low, v_high = load_halves(
            value_pointer + far * value_token, offsets[:, None] * value_token, value_channel, stored[:, None], low,
            WIDTH=WIDTH, KIND=VALUE_KIND,
        )  # fmt: skip
        if KEY_SCALE == "tile":
            k_low = _decoded_half(
                k_low, key_scale, key_zero, batch, group, start, tokens, stored, low,
                KEY_KIND, WIDTH, KEY_GROUP, KEY_TILE[0], KEY_TILE[1], NATIVE,
            )  # fmt: skip
            k_high = _decoded_half(
                k_high, key_scale, key_zero, batch, group, start, tokens, stored, high,
                KEY_KIND, WIDTH, KEY_GROUP, KEY_TILE[0], KEY_TILE[1], NATIVE,
            )  # fmt: skip
            k_low, k_high = _operand(k_low, "float", KEY_DOT, NATIVE), _operand(k_high, "float", KEY_DOT, NATIVE)
        else:
            k_low, k_high = _operand(k_low, KEY_KIND, KEY_DOT, NATIVE), _operand(k_high, KEY_KIND, KEY_DOT, NATIVE)
        scores = _product(a_low, tl.trans(k_low), KEY_DOT) + _product(a_high, tl.trans(k_high), KEY_DOT)
        if KEY_ZERO == "token":
            key_zeros = _token_values(key_zero, batch, group, tokens, stored, KEY_GROUP)
            scores -= query_sum[:, None] * key_zeros[None, :]
        elif KEY_SCALE == "token" and (KEY_ZERO == "head" or KEY_ZERO == "channel"):
            scores -= query_sum[:, None]
        scores *= row_factor[:, None]
        if KEY_SCALE == "token":
            scores *= _token_values(key_scale, batch, group, tokens, stored, KEY_GROUP)[None, :]
        if POSITION_WIDTH > 0:
            # Three products of TF32 keep 21 bits; all of float32 ("ieee") would do without the matrix units.
            table_rows = _table_rows(position_table, first_row, tokens, stored, BLOCK_E, POSITION_WIDTH)
            scores += _product(q_position, tl.trans(table_rows), "fp32") * factor

        if (start < seen_from) | (start + BLOCK_N > seen_to):
            visible = stored[None, :]
            if CAUSAL:
                visible = visible & (tokens[None, :] <= newest[:, None])
                if WINDOW:
                    visible = visible & (tokens[None, :] > newest[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        if MASK != "none":
            mask_pointer, mask_batch, mask_head, mask_token, mask_key = mask
            place = (batch * mask_batch + head * mask_head + number.to(tl.int64) * mask_token)[:, None]
            place += tokens.to(tl.int64)[None, :] * mask_key
            is_read = is_row[:, None] & stored[None, :]
            if MASK == "bool":
                visible = tl.load(mask_pointer + place, mask=is_read, other=0) != 0
                scores = tl.where(visible, scores, float("-inf"))
            else:
                scores += tl.load(mask_pointer + place, mask=is_read, other=0).to(tl.float32) * 1.4426950408889634

        new_best = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(best - shift)
        best = new_best
        peak = 1.0  # what the weights are divided by before they are rounded
        if VALUE_SCALE == "token":
            value_scales = _token_values(value_scale, batch, group, tokens, stored, VALUE_GROUP)
            if VALUE_DOT == "fp16" or VALUE_DOT == "fp8":
                peak = tl.max(tl.abs(value_scales), 0)
                peak = tl.where(peak == 0, 1.0, peak)
            scaled = weights * (value_scales / peak)[None, :]
        else:
            scaled = weights
        if VALUE_DOT == "fp8":
            peak *= 1 / 448
            p = (scaled * 448.0).to(tl.float8e4nv)
        elif VALUE_DOT == "fp32":
            p = scaled
        else:
            p = scaled.to(tl.float16 if VALUE_DOT == "fp16" else tl.bfloat16)
        if VALUE_DOT == "fp8" and VALUE_SCALE != "token":
            weights = p.to(tl.float32) * peak
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        if VALUE_SCALE == "tile":
            v_low = _decoded_half(
                v_low, value_scale, value_zero, batch, group, start, tokens, stored, low,
                VALUE_KIND, WIDTH, VALUE_GROUP, VALUE_TILE[0], VALUE_TILE[1], NATIVE,
            )  # fmt: skip
            v_high = _decoded_half(
                v_high, value_scale, value_zero, batch, group, start, tokens, stored, high,
                VALUE_KIND, WIDTH, VALUE_GROUP, VALUE_TILE[0], VALUE_TILE[1], NATIVE,
            )  # fmt: skip
            v_low, v_high = _operand(v_low, "float", VALUE_DOT, NATIVE), _operand(v_high, "float", VALUE_DOT, NATIVE)
        else:
            v_low = _operand(v_low, VALUE_KIND, VALUE_DOT, NATIVE)
            v_high = _operand(v_high, VALUE_KIND, VALUE_DOT, NATIVE)
        o_low = o_low * fade[:, None] + _product(p, v_low, VALUE_DOT) * peak
        o_high = o_high * fade[:, None] + _product(p, v_high, VALUE_DOT) * peak
        if VALUE_SCALE != "tile" and VALUE_ZERO != "none":
            rounded = p.to(tl.float32)
            if VALUE_ZERO == "token":
                rounded *= _token_values(value_zero, batch, group, tokens, stored, VALUE_GROUP)[None, :]
            zero_sum = zero_sum * fade + tl.sum(rounded, 1) * peak

    divisor = tl.where(weight_sum == 0, 1.0, weight_sum)
    if VALUE_SCALE != "tile" and VALUE_ZERO == "token":
        o_low -= zero_sum[:, None]
        o_high -= zero_sum[:, None]
    elif VALUE_SCALE != "tile" and VALUE_ZERO != "none":
        o_low -= zero_sum[:, None] * _channel_values(value_zero, batch, group, low, VALUE_ZERO, WIDTH)
        o_high -= zero_sum[:, None] * _channel_values(value_zero, batch, group, high, VALUE_ZERO, WIDTH)
    o_low, o_high = o_low / divisor[:, None], o_high / divisor[:, None]
    if VALUE_SCALE == "head" or VALUE_SCALE == "channel":
        o_low *= _channel_values(value_scale, batch, group, low, VALUE_SCALE, WIDTH)
        o_high *= _channel_values(value_scale, batch, group, high, VALUE_SCALE, WIDTH)
    place = (batch * queries + number) * (groups * RATIO) + head
    log_sum = tl.where(weight_sum == 0, float("-inf"), best + tl.log2(divisor))
    if WANTS_LSE and KEY_SCALE != "token" and (KEY_ZERO == "head" or KEY_ZERO == "channel"):
        log_sum -= query_sum * row_factor  # which all scores lack, and no weight needs
    if IS_SPLIT:
        place = place * splits + split
        tl.store(parts_lse + place, log_sum, mask=is_row)
    elif WANTS_LSE:
        tl.store(lse + (batch * groups * RATIO + head) * queries + number, log_sum * 0.6931471805599453, mask=is_row)
    place = output + place[:, None] * WIDTH
    kind = output.dtype.element_ty
    tl.store(place + low, o_low.to(kind), mask=is_row[:, None] & (low < HALF))
    tl.store(place + high, o_high.to(kind), mask=is_row[:, None] & (high < WIDTH))


@jit("count", "queries", "heads")
def merge_kernel(
    parts, parts_lse, output, lse, count, queries, heads,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WANTS_LSE: tl.constexpr,
):  # fmt: skip
    """One query of one head: what the parts of its keys gave, `[count, D]`, weighted by their sums."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    splits = tl.arange(0, BLOCK_S)
    logs = tl.load(parts_lse + row * count + splits, mask=splits < count, other=float("-inf"))
    best = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(best == float("-inf"), 0.0, best))
    inside = (splits < count)[:, None] & (channels < WIDTH)[None, :]
    places = (row * count + splits)[:, None] * WIDTH + channels[None, :]
    values = tl.load(parts + places, mask=inside, other=0)
    total = tl.sum(weights, 0)
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(output + row * WIDTH + channels, merged.to(output.dtype.element_ty), mask=channels < WIDTH)
    if WANTS_LSE and tl.program_id(1) == 0:
        log_sum = tl.where(total == 0, float("-inf"), best + tl.log2(total))
        place = (row // (queries * heads) * heads + row % heads) * queries + row // heads % queries
        tl.store(lse + place, log_sum * 0.6931471805599453)


class _Blocks(NamedTuple):
    """How the kernel cuts its work: rows and keys of a tile, warps, tiles in flight, and most registers of a thread."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def _blocks(rows: int, half: int, bits: int, capability: int) -> _Blocks:
    """Tiles whose operands fit the registers, and shared memory of the smallest GPU of a capability.

    Args:
        rows: queries of all heads of a KV head.
        half: half of head_dim, padded.
        bits: of an element of K or V as it is loaded, 32 where products are in float32.
    """
    has_room = capability in (80, 90, 100, 103)  # 163 KiB and more; others have 99 KiB
    if bits == 32:
        return _Blocks(min(64, power_of_two(rows, 16)), 32, 4, 2 if has_room and half <= 64 else 1)
    if rows <= 16:
        # So that four programs fit a multiprocessor: two, which is what the compiler makes of it, wait for each other.
        return _Blocks(16, 64 if half <= 64 else 32, 4, 3, 128 if bits == 8 else None)
    if rows <= 64 or half > 64 or capability < 90:
        is_small = half > 64 or (bits == 8 and capability < 90)  # there each warp holds all of a decoded tile
        return _Blocks(power_of_two(min(rows, 64)), 32 if is_small else 64, 4, 3 if has_room else 2)
    return _Blocks(128, 64, 8, 3 if has_room else 2)


def _with_positions(blocks: _Blocks, half: int, position_block: int, capability: int) -> _Blocks:
    """Tiles that leave room for rows of the table of scores by position, `position_block` wide in float32."""
    has_room = capability in (80, 90, 100, 103) and half + position_block <= 192
    return blocks._replace(
        rows=min(blocks.rows, max(16, 4096 // position_block)),
        keys=min(blocks.keys, 32),
        warps=4,
        stages=min(blocks.stages, 2 if has_room else 1),
        registers=None,
    )


class _Part(NamedTuple):
    """A scale or zero of codes.

    Attributes:
        form: "none", "head", "channel" or "token", for what it varies along, or "tile" for tokens and channels.
        rows, columns: of tokens and of channels.
        operand: as the kernel takes it, `(pointer, strides of B, G, rows and columns, channels per column)`.
    """

    form: str
    rows: int = 1
    columns: int = 1
    operand: tuple | None = None


def _part(name: str, part: torch.Tensor | None, shape: tuple[int, int, int, int], token_group: int) -> _Part:
    """A scale or zero of codes of shape `[B, G, S, D]`.

    Raises:
        ValueError: it does not belong to them.
    """
    if part is None:
        return _Part("none")
    rows, columns, strides = part_strides(name, part, shape, token_group)
    form = ("head" if columns == 1 else "channel") if rows == 1 else ("token" if columns == 1 else "tile")
    return _Part(form, rows, columns, (part, *strides, shape[3] // columns))


def _parts(name: str, side: Coded, shape: tuple[int, int, int, int]) -> tuple[_Part, _Part]:
    """Scale and zero of K or V, both applied to tiles where one of them has to be."""
    scale = _part(f"{name}_scale", side.scale, shape, side.group)
    zero = _part(f"{name}_zero", side.zero, shape, side.group)
    if "tile" in (scale.form, zero.form):
        return scale._replace(form="tile"), zero._replace(form="tile")
    return scale, zero


def _layout(part: _Part, width: int, half: int, token_group: int, block: int) -> int:
    """`LAYOUT` of `_tile_values` for a scale or zero, where a tile is `block` tokens by `half` channels, padded."""
    if part.rows == 1 or token_group % block == 0:
        return -1
    shared = half if part.columns == 1 else min(half, width // part.columns)
    return shared if part.columns == 1 or (width == 2 * half and shared >= 8 and half % shared == 0) else 0


def _tiles(
    blocks: _Blocks, parts: tuple[tuple[tuple[_Part, _Part], int], ...], width: int, half: int
) -> tuple[_Blocks, list[tuple[int, ...]]]:
    """The layouts of scales and zeros of K and of V on tiles, and tiles that are cut so that there is little of them.

    A tile stays within a group of tokens where groups are large enough.
    """
    for both, token_group in parts:
        if both[0].form == "tile" and max(part.rows for part in both) > 1 and token_group % 16 == 0:
            blocks = blocks._replace(
                keys=min(blocks.keys, token_group & -token_group), registers=blocks.registers and 168
            )
    layouts = [
        tuple(_layout(part, width, half, token_group, blocks.keys) if part.form == "tile" else -1 for part in both)
        for both, token_group in parts
    ]
    if 0 in layouts[0] + layouts[1]:  # fetched ahead they would not fit
        blocks = blocks._replace(keys=16, stages=1, registers=None)
    return blocks, layouts


def _position_operands(position: PositionScores) -> tuple[tuple[tuple | None, ...], int]:
    """Checked arguments of scores by position as the kernel takes them, and their width, 0 of none.

    Raises:
        ValueError: they are too wide.
    """
    query, table, start = position
    if query is None:
        return (None, None, None), 0
    rows, width = table.shape
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes scores by position up to {LARGEST_WIDTH} wide, not {width}")
    first = (start, start.stride(0) if start.shape[0] > 1 else 0)
    return (strided(query), (*strided(table), rows - 1), first), width


def _float_dot(values: torch.dtype, query: torch.dtype) -> str:
    """What float K or V is multiplied in: 16 bits where the query has the same, else float32."""
    if values == query and values in (torch.float16, torch.bfloat16):
        return "fp16" if values == torch.float16 else "bf16"
    return "fp32"


def _dots(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, quantized: str, scale: str, value_scale: str,
    native: bool, many: bool,
) -> tuple[str, str]:  # fmt: skip
    """The types in which q is multiplied by K, and the weights by V.

    Codes are exact in float16, so it serves all codes with queries of 16 bits; queries quantized to int8 are multiplied
    by integer codes as they are, and so with fp8, where the GPU can. The weights are rounded to fp8 only where that
    pays: with many queries that are in fp8 themselves.
    """
    folded = scale in ("none", "head", "token")
    kinds = [CODE_KINDS.get(codes.dtype, "float") for codes in (key, value)]
    if quantized == "int8" and kinds[0] in ("int8", "int4") and folded:
        key_dot = "int8"
    elif quantized in ("e4m3", "e5m2") and native and folded:
        key_dot = "fp8"
    elif query.dtype == torch.float32:
        key_dot = "fp32"
    elif kinds[0] == "float":
        is_plain = scale == "none" and quantized == "float"
        key_dot = _float_dot(key.dtype, query.dtype) if is_plain else "fp32"
    else:
        key_dot = "fp16"
    if key_dot == "fp8" and many and kinds[1] in ("e4m3", "e5m2") and value_scale != "tile":
        return key_dot, "fp8"
    if kinds[1] == "float" and value_scale != "tile":
        return key_dot, _float_dot(value.dtype, query.dtype)
    return key_dot, "fp32" if query.dtype == torch.float32 else "fp16"


def _splits(programs: int, keys: int, processors: int, are_small: bool) -> int:
    """Parts of the keys: as many as keep all multiprocessors busy, of a size that is worth it.

    No more than start at once, four on a multiprocessor where tiles are small: what is left over would run alone.
    """
    wanted = 4 * processors // programs if are_small or programs < processors else 1
    return max(1, min(wanted, -(-keys // FEWEST_KEYS), MOST_SPLITS))


def _attend_triton(call: AttentionCall, wants_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_lse_reference` in Triton; the log-sum-exp only if it is wanted.

    Any strides. With queries of 16 bits, products are of 16 bits and sums of 32; weights are rounded to 16 bits, and to
    e4m3 where queries are many and q, K and V all in fp8.

    Raises:
        ValueError: shapes that do not go together, or a head_dim or scores by position wider than 256.
    """
    shape = batch, groups, keys, width = check_attention(call)
    query, key, value, query_scale = call.query, call.key.codes, call.value.codes, call.query_scale
    mask, causal, length, window = call.visibility
    heads, queries = query.shape[1:3]
    window = min(window, LARGEST_COUNT)
    if width > LARGEST_WIDTH:
        raise ValueError(f"attention on CUDA takes a head_dim up to {LARGEST_WIDTH}, not {width}")
    position, position_width = _position_operands(call.position)
    output = query.new_empty((batch, queries, heads, width))
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device) if wants_lse else None
    if output.numel() == 0 or keys == 0:
        return output.zero_(), None if lse is None else lse.fill_(float("-inf"))
    key_parts, value_parts = _parts("key", call.key, shape), _parts("value", call.value, shape)
    gpu = gpu_of(query.device)
    quantized = "float"
    if query_scale is not None:
        quantized = CODE_KINDS[key.dtype if key.dtype in FP8_DTYPES else torch.int8]
        query_scale = (query_scale, *broadcast_strides(query_scale, (batch, heads, queries, 1)))
    native = gpu.capability >= FP8_CAPABILITY
    ratio = heads // groups
    rows = ratio * queries
    key_dot, value_dot = _dots(
        query, key, value, quantized, key_parts[0].form, value_parts[0].form, native, many=rows > 64
    )
    half = power_of_two((width + 1) // 2, 32 if key_dot in ("int8", "fp8") else 16)
    bits = max(32 if "fp32" in (key_dot, value_dot) else 0, *(8 * codes.element_size() for codes in (key, value)))
    blocks = _blocks(rows, half, bits, gpu.capability)
    position_block = power_of_two(position_width, 16)
    if position_width:
        blocks = _with_positions(blocks, half, position_block, gpu.capability)
    both = (key_parts, call.key.group), (value_parts, call.value.group)
    blocks, layouts = _tiles(blocks, both, width, half)
    programs = -(-rows // blocks.rows) * batch * groups
    splits = _splits(programs, keys, gpu.processors, blocks.rows == 16)
    parts, parts_lse = output, None
    if splits > 1:
        parts = torch.empty((*output.shape[:3], splits, width), dtype=torch.float32, device=query.device)
        parts_lse = torch.empty((*output.shape[:3], splits), dtype=torch.float32, device=query.device)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    if mask is not None:
        strides = broadcast_strides(mask, (batch, heads, queries, keys))
        mask = (mask.view(torch.uint8) if mask_kind == "bool" else mask, *strides)
    if length is not None:
        length = (length, length.stride(0) if length.shape[0] > 1 else 0)
    causal = causal and mask is None and (queries > 1 or window > 0)
    with on_device(query):
        attention_kernel[(programs, splits)](
            strided(query), strided(raw_codes(key)), strided(raw_codes(value)), parts, parts_lse, lse,
            key_parts[0].operand, key_parts[1].operand, value_parts[0].operand, value_parts[1].operand,
            query_scale, mask, length, *position,
            groups, queries, keys, window, call.scaling * LOG2_E,
            RATIO=ratio, WIDTH=width, BLOCK_M=blocks.rows, BLOCK_N=blocks.keys, BLOCK_H=half, IS_SPLIT=splits > 1,
            KEY_KIND=CODE_KINDS.get(key.dtype, "float"), VALUE_KIND=CODE_KINDS.get(value.dtype, "float"),
            QUERY_KIND=quantized, KEY_DOT=key_dot, VALUE_DOT=value_dot,
            KEY_SCALE=key_parts[0].form, KEY_ZERO=key_parts[1].form,
            VALUE_SCALE=value_parts[0].form, VALUE_ZERO=value_parts[1].form,
            KEY_GROUP=call.key.group, VALUE_GROUP=call.value.group, KEY_TILE=layouts[0], VALUE_TILE=layouts[1],
            CAUSAL=causal, WINDOW=causal and window > 0, MASK=mask_kind, NATIVE=native,
            WANTS_LSE=wants_lse, POSITION_WIDTH=position_width, BLOCK_E=position_block,
            num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(batch * queries * heads, -(-width // MERGED_CHANNELS))](
                parts, parts_lse, output, lse, splits, queries, heads,
                WIDTH=width, BLOCK_S=power_of_two(splits), BLOCK_C=MERGED_CHANNELS, WANTS_LSE=wants_lse,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return output, lse


def attention_cuda_supports(call: AttentionCall) -> str | None:
    """None, or why the kernels do not serve a call."""
    return triton_supports(call.query)


def attention_cuda(call: AttentionCall) -> torch.Tensor:
    """`attention_reference` in Triton."""
    return _attend_triton(call, False)[0]


def attention_lse_cuda(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_lse_reference` in Triton."""
    return _attend_triton(call, True)
