/* Blocks of many rows over int8 and int4 codes. Codes become tiles of bytes once for all rows of a block; WIDE_ROWS rows
 * at a time then go through scores, softmax and output, which leaves all of it in the nearest cache.
 *
 * Of q and the weights two digits of 8 bits are multiplied, one fewer than for few rows. The weights, unsigned and with
 * scales of V in them, are whole numbers, the largest of a row so far about LARGEST_WEIGHT. Keys whose weights have no
 * high digit in any row cost one product, keys whose weights round to 0 none. */

#if HAS_INTEGER
enum { LARGEST_WEIGHT = 65024 }; /* of 65535: room for what comes out a little above */
#define LARGEST_WEIGHT_LOG2 15.98868469f

/* Keys that the weights of WIDE_ROWS rows need multiplied, for each WIDE_STEP keys. */
enum { NO_DIGIT = 0, LOW_DIGIT = 1, BOTH_DIGITS = 2 };

/* What one block of keys does to scores and weights where nothing but causality, a window and scales per token has a
 * say: a score becomes that of the weight with the scale of V in it. */
typedef struct {
    float scale[KEY_BLOCK], level[KEY_BLOCK];     /* of a score and onto it: the scale of K, and log2 of that of V */
    float inverse[KEY_BLOCK];                     /* of the scale of V; 0 behind the last key */
    int plain;                                    /* 0: something else has a say too, and soften_row serves */
} WideKeys;

/* What WIDE_ROWS rows need while they go through a block. */
typedef struct {
    f32v largest[WIDE_ROWS];
    i32v used[KEY_BLOCK / WIDE_STEP]; /* the bits that are set in any weight */
    float factor[WIDE_ROWS], fade[WIDE_ROWS], step[WIDE_ROWS];
    float *scores[WIDE_ROWS];
} Wide;

/* Whether a part has a negative value for a token in use. */
static int has_negative(const AttentionArguments *a, const Part *part) {
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t g = 0; g < a->groups; g++)
            for (int64_t j = 0; j < clamped(length_of(a, b), a->keys); j++)
                if (part_value(part, part_start(part, b, g, j)) < 0.0f) return 1;
    return 0;
}

/* Many rows go this way if their sums fit 32 bits and weights are not negative. */
static void widen_plan(const AttentionArguments *a, Plan *plan) {
    if (plan->key_mode != MODE_INTEGER || plan->value_mode != MODE_INTEGER || plan->rows <= MAX_ROWS) return;
    if (plan->key_groups || plan->value_groups || a->width > 256) return;
    if (plan->value_scale.per_token && has_negative(a, &plan->value_scale)) return;
    plan->wide = 1;
    if (plan->query_digits == DIGITS) plan->query_digits = WIDE_DIGITS;
}

/* K as [panels of 32 keys][quads of channels][32][4] unsigned codes; returns the quads of a panel. */
static int64_t tile_keys(Rows key, int64_t keys, int64_t kind, uint8_t *tile) {
    int64_t quads = byte_quads(key.width, kind), packed = kind == KIND_INT4 ? quads : 0, all = quads + packed;
    for (int64_t j = 0; j < keys; j += WIDE_STEP, tile += all * 128) {
        Rows from = {key.data + j * key.stride, key.stride, key.width};
        interleave_keys(from, keys - j, tile + packed * 128, kind);
        for (int64_t at = 0; at < packed * 128; at += 64) {
            __m512i both = _mm512_loadu_si512(tile + packed * 128 + at);
            _mm512_storeu_si512(tile + at, low_codes(both));
            _mm512_storeu_si512(tile + packed * 128 + at, high_codes(both));
        }
    }
    return all;
}

/* V as [quads of keys][padded channels][4] signed codes; of int4 the high halves start at `high`. */
OUTLINE void tile_values(Rows value, int64_t keys, int64_t padded, int64_t kind, int8_t *tile) {
    int64_t bytes = kind == KIND_INT4 ? value.width / 2 : value.width, high = round_up(bytes, 16);
    int64_t columns = kind == KIND_INT4 ? high : padded;
    __m512i by_key = _mm512_setzero_si512(), eight = _mm512_set1_epi8(INT4_OFFSET);
    for (int i = 0; i < 64; i++) ((uint8_t *)&by_key)[i] = (uint8_t)(i % 4 * 16 + i / 4);
    for (int64_t j = 0; j < round_up(keys, WIDE_STEP); j += 4, tile += padded * 4) {
        const char *rows[4];
        for (int t = 0; t < 4; t++) rows[t] = value.data + (j + t < keys ? j + t : keys - 1) * value.stride;
        for (int64_t d = 0; d < columns; d += 16) {
            int64_t left = bytes - d;
            __m512i codes = left > 0 ? _mm512_permutexvar_epi8(by_key, four_rows(rows, d, left)) : _mm512_setzero_si512();
            if (kind == KIND_INT4) {
                _mm512_storeu_si512(tile + (high + d) * 4, _mm512_sub_epi8(high_codes(codes), eight));
                codes = _mm512_sub_epi8(low_codes(codes), eight);
            }
            _mm512_storeu_si512(tile + d * 4, codes);
        }
    }
}

/* scores[WIDE_ROWS][32] = factor * scale * (digits of q . a panel of K) + level; the largest of each row if all see it. */
INLINE void wide_scores_of(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                           const WideKeys *keys, int64_t j, const Digits *digits, Wide *wide, int seen,
                           const int count) {
    i32v sums[WIDE_ROWS][2][2];
    UNROLL for (int h = 0; h < WIDE_ROWS; h++)
        UNROLL for (int i = 0; i < count; i++)
            UNROLL for (int v = 0; v < 2; v++) sums[h][i][v] = (i32v)_mm512_set1_epi32(digits[h].offset[i]);
    for (int64_t k = 0; k < quads; k++) {
        __m512i b0 = _mm512_loadu_si512(tile + 128 * k), b1 = _mm512_loadu_si512(tile + 128 * k + 64);
        UNROLL for (int h = 0; h < WIDE_ROWS; h++)
            UNROLL for (int i = 0; i < count; i++) {
                __m512i digit = _mm512_set1_epi32(q[h * q_stride + 4 * k + i]);
                sums[h][i][0] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][0], b0, digit);
                sums[h][i][1] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][1], b1, digit);
            }
    }
    f32v scale[2] = {load_lanes(keys->scale + j), load_lanes(keys->scale + j + 16)};
    f32v level[2] = {load_lanes(keys->level + j), load_lanes(keys->level + j + 16)};
    UNROLL for (int h = 0; h < WIDE_ROWS; h++) {
        f32v x[2], factor = all_lanes(wide->factor[h]);
        UNROLL for (int v = 0; v < 2; v++) {
            i32v sum = count == 2 ? sums[h][0][v] + sums[h][1][v] * 256 : sums[h][0][v];
            x[v] = __builtin_convertvector(sum, f32v) * factor * scale[v] + level[v];
            store_lanes(scores + h * KEY_BLOCK + j + 16 * v, x[v]);
        }
        if (seen) wide->largest[h] = max_lanes(wide->largest[h], max_lanes(x[0], x[1]));
    }
}

OUTLINE void wide_scores(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                         const WideKeys *keys, int64_t j, const Digits *digits, Wide *wide, int seen, int count) {
    if (count == 1)
        wide_scores_of(q, q_stride, tile, quads, scores, keys, j, digits, wide, seen, 1);
    else
        wide_scores_of(q, q_stride, tile, quads, scores, keys, j, digits, wide, seen, 2);
}

/* 2^x for -126 <= x < 127, below that as of -126, within 3e-6 of it: a tenth of the step of the largest weights. */
INLINE f32v short_exp2_of(f32v x) {
    f32v magic = all_lanes(12582912.0f);
    x = max_lanes(all_lanes(-126.0f), x); /* in this order NaN stays */
    f32v shifted = x + magic, f = x - (shifted - magic);
    f32v p = all_lanes(9.570102207e-3f);
    p = p * f + all_lanes(5.591785908e-2f);
    p = p * f + all_lanes(2.402474433e-1f);
    p = p * f + all_lanes(6.931217909e-1f);
    p = p * f + all_lanes(9.999992847e-1f);
    return (f32v)((u32v)p + ((u32v)shifted << 23)); /* the low bits of `shifted` are the rounded x */
}

/* 16 weights as digits: for each four 4 low digits, 4 high ones and 8 zeros. */
INLINE __m512i store_weights(float *to, f32v weights) {
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 13, 9, 5, 1, 12, 8, 4, 0));
    __m512i whole = _mm512_min_epu32(_mm512_cvtps_epi32((__m512)weights), _mm512_set1_epi32(65535));
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(whole, by_digit));
    return whole;
}

/* Scores that a row does not see become -inf, `inner` aside, which it does; returns the largest of the others. */
static f32v hide_scores(float *scores, Range computed, Range inner, Range seen) {
    f32v largest = all_lanes(-INFINITY);
    for (int64_t j = computed.from; j < computed.to; j += LANES) {
        if (j >= inner.from && j < inner.to) continue;
        i32v key = lane_numbers() + (int32_t)j;
        i32v inside = (i32v)(key >= (int32_t)seen.from) & (i32v)(key < (int32_t)seen.to);
        f32v s = select_lanes(inside, load_lanes(scores + j), all_lanes(-INFINITY));
        largest = max_lanes(largest, s);
        store_lanes(scores + j, s);
    }
    return largest;
}

/* One row's scores become digits of weights. Those of a row count in units of 2^best, by which the largest is about
 * LARGEST_WEIGHT; wide_scores has looked at `inner` for it. */
OUTLINE void wide_weights(Row *row, int h, Range computed, Range inner, Range seen, const WideKeys *keys, Wide *wide) {
    float *scores = wide->scores[h];
    if (seen.from >= seen.to) {
        memset(scores + computed.from, 0, sizeof(float) * (size_t)(computed.to - computed.from));
        return;
    }
    float largest = max_of_lanes(max_lanes(hide_scores(scores, computed, inner, seen), wide->largest[h]));
    float best = largest - LARGEST_WEIGHT_LOG2 > row->best ? largest - LARGEST_WEIGHT_LOG2 : row->best;
    f32v shift = all_lanes(best), total[2] = {0}, weighted[2] = {0};
    for (int64_t j = computed.from; j < computed.to; j += WIDE_STEP) {
        __m512i whole[2];
        UNROLL for (int v = 0; v < 2; v++) {
            f32v weight = short_exp2_of(load_lanes(scores + j + 16 * v) - shift);
            total[v] += weight * load_lanes(keys->inverse + j + 16 * v), weighted[v] += weight;
            whole[v] = store_weights(scores + j + 16 * v, weight);
        }
        wide->used[j / WIDE_STEP] |= (i32v)_mm512_or_si512(whole[0], whole[1]);
    }
    float fade = exp2_of_one(row->best - best);
    row->total = row->total * fade + sum_of_lanes(total[0] + total[1]);
    row->weighted = row->weighted * fade + sum_of_lanes(weighted[0] + weighted[1]);
    row->best = best, wide->fade[h] = fade;
    if (!(wide->factor[h] - wide->factor[h] == 0.0f)) row->total = NAN; /* of a query that digits cannot hold */
}

/* One row's weights, which soften_row has left, as digits; `computed` ends where they do. */
OUTLINE void split_wide_weights(int h, Range computed, Wide *wide) {
    float *weights = wide->scores[h];
    f32v largest = {0};
    for (int64_t j = computed.from; j < computed.to; j += LANES) largest = max_lanes(largest, load_lanes(weights + j));
    float step = max_of_lanes(largest) / LARGEST_WEIGHT;
    f32v inverse = all_lanes(step > 0x1p-126f ? 1.0f / step : 0.0f);
    for (int64_t j = computed.from; j < computed.to; j += LANES)
        wide->used[j / WIDE_STEP] |= (i32v)store_weights(weights + j, load_lanes(weights + j) * inverse);
    wide->step[h] = step;
}

/* sums[h][i][v] += 32 weights times 32 channels of V. */
INLINE void add_wide(i32v sums[WIDE_ROWS][2][2], const int32_t *weights, const int8_t *tile, int64_t stride,
                     const int count) {
    for (int64_t j = 0; j < WIDE_STEP; j += 4, tile += stride) {
        __m512i b0 = _mm512_loadu_si512(tile), b1 = _mm512_loadu_si512(tile + 64);
        UNROLL for (int h = 0; h < WIDE_ROWS; h++)
            UNROLL for (int i = 0; i < count; i++) {
                __m512i digit = _mm512_set1_epi32(weights[h * KEY_BLOCK + j + i]);
                sums[h][i][0] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][0], digit, b0);
                sums[h][i][1] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][1], digit, b1);
            }
    }
}

/* output[WIDE_ROWS][32] = fade * output + step * (weights . V). */
OUTLINE void wide_output(const int32_t *weights, const int8_t *tile, int64_t padded, Range keys, const uint8_t *digits,
                         float *output, const Wide *wide) {
    i32v sums[WIDE_ROWS][2][2];
    UNROLL for (int h = 0; h < WIDE_ROWS; h++)
        UNROLL for (int i = 0; i < 2; i++)
            UNROLL for (int v = 0; v < 2; v++) sums[h][i][v] = (i32v){0};
    for (int64_t j = keys.from; j < keys.to; j += WIDE_STEP) {
        if (digits[j / WIDE_STEP] == BOTH_DIGITS)
            add_wide(sums, weights + j, tile + j * padded, padded * 4, 2);
        else if (digits[j / WIDE_STEP] == LOW_DIGIT)
            add_wide(sums, weights + j, tile + j * padded, padded * 4, 1);
    }
    UNROLL for (int h = 0; h < WIDE_ROWS; h++) {
        f32v fade = all_lanes(wide->fade[h]), step = all_lanes(wide->step[h]);
        UNROLL for (int v = 0; v < 2; v++) {
            float *to = output + h * padded + 16 * v;
            f32v x = __builtin_convertvector(sums[h][0][v] + sums[h][1][v] * 256, f32v);
            store_lanes(to, load_lanes(to) * fade + x * step);
        }
    }
}

/* log2 of positive normal numbers, within 1e-7 of it or of 1. */
INLINE f32v log2_of(f32v x) {
    f32v m = (f32v)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    f32v exponent = (f32v)_mm512_getexp_ps((__m512)(x / m)), one = all_lanes(1.0f);
    f32v t = (m - one) / (m + one), square = t * t; /* 2 artanh(t) = ln m */
    f32v series = square * all_lanes(2.0f / 9 * 1.44269504f) + all_lanes(2.0f / 7 * 1.44269504f);
    series = series * square + all_lanes(2.0f / 5 * 1.44269504f);
    series = series * square + all_lanes(2.0f / 3 * 1.44269504f);
    return exponent + t * (series * square + all_lanes(2.0f * 1.44269504f));
}

/* A scale that is no number, or of V none that has a logarithm, is left to soften_row. */
static void load_wide_keys(const AttentionArguments *a, const Plan *plan, const Scratch *scratch, int64_t keys,
                           WideKeys *to) {
    f32v odd = {0}, one = all_lanes(1.0f);
    for (int64_t j = 0; j < KEY_BLOCK; j += LANES) {
        i32v used = (i32v)(lane_numbers() < (int32_t)(keys - j));
        f32v scale = select_lanes(used, load_lanes(scratch->key_scale + j), one);
        f32v value = select_lanes(used, load_lanes(scratch->value_scale + j), one);
        f32v bounded = max_lanes(value, all_lanes(0x1p-100f));
        odd += (value - value) + (scale - scale) + (bounded - value);
        store_lanes(to->scale + j, scale), store_lanes(to->level + j, log2_of(bounded));
        store_lanes(to->inverse + j, one / bounded);
    }
    to->plain = sum_of_lanes(odd) == 0.0f && !a->mask && !a->position.query && !plan->key_zero.per_token &&
                !plan->value_zero.per_token && !(plan->key_scale.per_token && plan->key_zero.data);
    for (int64_t j = 0; !to->plain && j < KEY_BLOCK; j += LANES)
        store_lanes(to->scale + j, one), store_lanes(to->level + j, all_lanes(0.0f));
}

/* What WIDE_ROWS rows start a block with; returns the keys that all of them see. */
static Range begin_wide(int64_t m, int64_t count, int64_t start, int64_t keys, int plain, Scratch *scratch,
                        Wide *wide) {
    int64_t last = m + WIDE_ROWS < count ? m + WIDE_ROWS - 1 : count - 1;
    memset(wide->used, 0, sizeof wide->used);
    for (int h = 0; h < WIDE_ROWS; h++) {
        wide->largest[h] = all_lanes(-INFINITY), wide->scores[h] = scratch->scores + h * KEY_BLOCK;
        wide->step[h] = wide->fade[h] = 1.0f;
        wide->factor[h] = scratch->key_digits[m + h].step * (plain ? scratch->rows[m + h].factor : 1.0f);
    }
    return (Range){round_up(clamped(scratch->rows[last].front - start, keys), WIDE_STEP),
                   clamped(scratch->rows[m].limit - start, keys) / WIDE_STEP * WIDE_STEP};
}

/* The scores of row `m`, which wide_scores has left, become digits of its weights. */
static void wide_row(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first, int64_t m,
                     int64_t start, int64_t keys, Range computed, Range inner, const WideKeys *wide_keys,
                     Scratch *scratch, Wide *wide) {
    Row *row = &scratch->rows[m];
    int h = (int)(m % WIDE_ROWS);
    Range seen = {clamped(row->front - start, keys), clamped(row->limit - start, keys)};
    if (wide_keys->plain) {
        wide_weights(row, h, computed, inner, seen, wide_keys, wide);
        return;
    }
    int64_t query = (first + m) / plan->ratio, head = g * plan->ratio + (first + m) % plan->ratio;
    if (a->mask) load_bias(a, b, head, query, start, keys, scratch->bias);
    soften_row(plan, row, wide->scores[h], computed, seen, scratch, a->mask ? scratch->bias : NULL,
               a->position.query ? scratch->positions + m * KEY_BLOCK : NULL, scratch->output + m * plan->padded);
    split_wide_weights(h, computed, wide);
}

/* Which digits each WIDE_STEP keys have in the weights of any row. */
static void find_digits(const Wide *wide, Range computed, uint8_t *digits) {
    for (int64_t i = computed.from / WIDE_STEP; i < computed.to / WIDE_STEP; i++) {
        __m512i used = (__m512i)wide->used[i];
        int high = _mm512_test_epi32_mask(used, _mm512_set1_epi32(~255)) != 0;
        digits[i] = high ? BOTH_DIGITS : _mm512_test_epi32_mask(used, used) ? LOW_DIGIT : NO_DIGIT;
    }
}

/* One block of keys for all rows, from scores to output. */
OUTLINE void wide_block(const AttentionArguments *a, const Plan *plan, Rows key, Rows value, int64_t b, int64_t g,
                        int64_t first, int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t padded = plan->padded;
    uint8_t *key_tile = (uint8_t *)scratch->keys;
    int8_t *value_tile = (int8_t *)scratch->values;
    WideKeys wide_keys;
    load_wide_keys(a, plan, scratch, keys, &wide_keys);
    if (a->position.query) position_scores(a, plan, b, count, start, keys, scratch);
    int64_t quads = tile_keys(key, keys, a->key.kind, key_tile);
    tile_values(value, keys, padded, a->value.kind, value_tile);
    for (int64_t m = 0; m < count; m += WIDE_ROWS) {
        Wide wide;
        uint8_t digits[KEY_BLOCK / WIDE_STEP];
        Range computed = seen_by(scratch, m, WIDE_ROWS, count, start, keys);
        if (computed.from >= computed.to) continue;
        computed.to = round_up(computed.to, WIDE_STEP);
        Range inner = begin_wide(m, count, start, keys, wide_keys.plain, scratch, &wide);
        for (int64_t j = computed.from; j < computed.to; j += WIDE_STEP)
            wide_scores((const int32_t *)scratch->q + m * padded, padded, key_tile + j * quads * 4, quads,
                        scratch->scores, &wide_keys, j, scratch->key_digits + m, &wide,
                        j >= inner.from && j < inner.to, plan->query_digits);
        for (int h = 0; h < WIDE_ROWS; h++)
            if (m + h < count)
                wide_row(a, plan, b, g, first, m + h, start, keys, computed, inner, &wide_keys, scratch, &wide);
            else
                memset(wide.scores[h] + computed.from, 0, sizeof(float) * (size_t)(computed.to - computed.from));
        find_digits(&wide, computed, digits);
        for (int64_t d = 0; d < padded; d += 32)
            wide_output((const int32_t *)scratch->scores, value_tile + d * 4, padded, computed, digits,
                        scratch->output + m * padded + d, &wide);
    }
}
#endif
