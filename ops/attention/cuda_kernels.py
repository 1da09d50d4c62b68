"""The Triton kernels of attention.

One kernel attends, for decode and prefill alike. Its rows are the queries of all heads that share a KV head, so that
each tile of K and V is decoded once for them all. Where there are few rows the keys are split over more programs, and a
second kernel merges what those found. What does not vary along a sum is taken out of it, as README.md says; tiles of
codes are decoded in registers, and a width is worked at in two halves, which is how int4 rows are packed.
"""

from ..shared.triton_helpers import codes_as_float, jit, load_halves, tl, to_code
from .cuda_tiles import (
    bounded_count,
    channel_values,
    decoded_half,
    query_operand,
    table_rows,
    tile_operand,
    tile_product,
    token_values,
)


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
        q_low = q_low.to(tl.float32) * channel_values(key_scale, batch, group, low, KEY_SCALE, WIDTH)
        q_high = q_high.to(tl.float32) * channel_values(key_scale, batch, group, high, KEY_SCALE, WIDTH)
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
        a_low, a_high = query_operand(c_low, QUERY_KIND, KEY_DOT), query_operand(c_high, QUERY_KIND, KEY_DOT)
    else:
        a_low, a_high = query_operand(q_low, QUERY_KIND, KEY_DOT), query_operand(q_high, QUERY_KIND, KEY_DOT)
    s_low, s_high = q_low, q_high  # what the zero points of K are multiplied by
    if KEY_DOT == "fp16" or KEY_DOT == "bf16":
        s_low, s_high = a_low.to(tl.float32), a_high.to(tl.float32)
    if KEY_ZERO == "token":
        query_sum = tl.sum(s_low, 1) + tl.sum(s_high, 1)
    elif (KEY_SCALE == "token" or WANTS_LSE) and (KEY_ZERO == "head" or KEY_ZERO == "channel"):
        query_sum = tl.sum(s_low * channel_values(key_zero, batch, group, low, KEY_ZERO, WIDTH), 1)
        high_zero = tl.where(high < WIDTH, channel_values(key_zero, batch, group, high, KEY_ZERO, WIDTH), 0.0)
        query_sum += tl.sum(s_high * high_zero, 1)

    if POSITION_WIDTH > 0:
        position_pointer, position_batch, position_head, position_token, position_channel = position_query
        start_pointer, start_batch = position_start
        places = (batch * position_batch + head * position_head + number.to(tl.int64) * position_token)[:, None]
        channels = tl.arange(0, BLOCK_E)[None, :]
        inside = is_row[:, None] & (channels < POSITION_WIDTH)
        loaded = tl.load(position_pointer + places + channels * position_channel, mask=inside, other=0)
        q_position = loaded.to(tl.float32)
        first_row = bounded_count(tl.load(start_pointer + batch * start_batch))

    total = keys
    if length is not None:
        length_pointer, length_batch = length
        total = bounded_count(tl.load(length_pointer + batch * length_batch)).to(tl.int32)
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
            k_low = decoded_half(
                k_low, key_scale, key_zero, batch, group, start, tokens, stored, low,
                KEY_KIND, WIDTH, KEY_GROUP, KEY_TILE[0], KEY_TILE[1], NATIVE,
            )  # fmt: skip
            k_high = decoded_half(
                k_high, key_scale, key_zero, batch, group, start, tokens, stored, high,
                KEY_KIND, WIDTH, KEY_GROUP, KEY_TILE[0], KEY_TILE[1], NATIVE,
            )  # fmt: skip
            k_low, k_high = (
                tile_operand(k_low, "float", KEY_DOT, NATIVE),
                tile_operand(k_high, "float", KEY_DOT, NATIVE),
            )
        else:
            k_low, k_high = (
                tile_operand(k_low, KEY_KIND, KEY_DOT, NATIVE),
                tile_operand(k_high, KEY_KIND, KEY_DOT, NATIVE),
            )
        scores = tile_product(a_low, tl.trans(k_low), KEY_DOT) + tile_product(a_high, tl.trans(k_high), KEY_DOT)
        if KEY_ZERO == "token":
            key_zeros = token_values(key_zero, batch, group, tokens, stored, KEY_GROUP)
            scores -= query_sum[:, None] * key_zeros[None, :]
        elif KEY_SCALE == "token" and (KEY_ZERO == "head" or KEY_ZERO == "channel"):
            scores -= query_sum[:, None]
        scores *= row_factor[:, None]
        if KEY_SCALE == "token":
            scores *= token_values(key_scale, batch, group, tokens, stored, KEY_GROUP)[None, :]
        if POSITION_WIDTH > 0:
            # Three products of TF32 keep 21 bits; all of float32 ("ieee") would do without the matrix units.
            rows_of_table = table_rows(position_table, first_row, tokens, stored, BLOCK_E, POSITION_WIDTH)
            scores += tile_product(q_position, tl.trans(rows_of_table), "fp32") * factor

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
            value_scales = token_values(value_scale, batch, group, tokens, stored, VALUE_GROUP)
            if VALUE_DOT == "fp16":
                peak = tl.max(tl.abs(value_scales), 0)
                peak = tl.where(peak == 0, 1.0, peak)
            scaled = weights * (value_scales / peak)[None, :]
        else:
            scaled = weights
        p = scaled
        if VALUE_DOT != "fp32":
            p = scaled.to(tl.float16 if VALUE_DOT == "fp16" else tl.bfloat16)
        weight_sum = weight_sum * fade + tl.sum(weights, 1)
        if VALUE_SCALE == "tile":
            v_low = decoded_half(
                v_low, value_scale, value_zero, batch, group, start, tokens, stored, low,
                VALUE_KIND, WIDTH, VALUE_GROUP, VALUE_TILE[0], VALUE_TILE[1], NATIVE,
            )  # fmt: skip
            v_high = decoded_half(
                v_high, value_scale, value_zero, batch, group, start, tokens, stored, high,
                VALUE_KIND, WIDTH, VALUE_GROUP, VALUE_TILE[0], VALUE_TILE[1], NATIVE,
            )  # fmt: skip
            v_low, v_high = (
                tile_operand(v_low, "float", VALUE_DOT, NATIVE),
                tile_operand(v_high, "float", VALUE_DOT, NATIVE),
            )
        else:
            v_low = tile_operand(v_low, VALUE_KIND, VALUE_DOT, NATIVE)
            v_high = tile_operand(v_high, VALUE_KIND, VALUE_DOT, NATIVE)
        o_low = o_low * fade[:, None] + tile_product(p, v_low, VALUE_DOT) * peak
        o_high = o_high * fade[:, None] + tile_product(p, v_high, VALUE_DOT) * peak
        if VALUE_SCALE != "tile" and VALUE_ZERO != "none":
            rounded = p.to(tl.float32)
            if VALUE_ZERO == "token":
                rounded *= token_values(value_zero, batch, group, tokens, stored, VALUE_GROUP)[None, :]
            zero_sum = zero_sum * fade + tl.sum(rounded, 1) * peak

    divisor = tl.where(weight_sum == 0, 1.0, weight_sum)
    if VALUE_SCALE != "tile" and VALUE_ZERO == "token":
        o_low -= zero_sum[:, None]
        o_high -= zero_sum[:, None]
    elif VALUE_SCALE != "tile" and VALUE_ZERO != "none":
        o_low -= zero_sum[:, None] * channel_values(value_zero, batch, group, low, VALUE_ZERO, WIDTH)
        o_high -= zero_sum[:, None] * channel_values(value_zero, batch, group, high, VALUE_ZERO, WIDTH)
    o_low, o_high = o_low / divisor[:, None], o_high / divisor[:, None]
    if VALUE_SCALE == "head" or VALUE_SCALE == "channel":
        o_low *= channel_values(value_scale, batch, group, low, VALUE_SCALE, WIDTH)
        o_high *= channel_values(value_scale, batch, group, high, VALUE_SCALE, WIDTH)
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
