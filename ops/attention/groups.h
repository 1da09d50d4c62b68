/* Products of codes whose scales vary along tokens and channels, but are shared by groups of many of either. */

/* The scales and zeros of K of the group of `token`, and where it ends. */
static int64_t load_group(const AttentionArguments *a, int64_t b, int64_t g, int64_t token, Scratch *scratch) {
    const Part *scale = &a->key.scale, *zero = &a->key.zero;
    const Part *part = scale->per_token ? scale : zero;
    load_channels(scale, b, g, token, a->width, 1.0f, scratch->channel_scale);
    load_channels(zero, b, g, token, a->width, 0.0f, scratch->channel_zero);
    return (token + part->first) / part->group * part->group + part->group - part->first;
}

/* block_scores of few rows straight on the codes, where groups of tokens have scales per channel. */
static void folded_scores(const AttentionArguments *a, const Plan *plan, Rows key, Rows next, int64_t b, int64_t g,
                          int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    for (int64_t j = 0, stop; j < keys; j = stop) {
        stop = clamped(load_group(a, b, g, start + j, scratch) - start, keys);
        fold_rows(plan, 0, count, scratch, scratch->folded, scratch->key_digits);
        Rows from = {key.data + j * key.stride, key.stride, key.width};
        Rows ahead = {next.data + j * next.stride, next.stride, next.width};
        direct_scores_any(scratch->folded, plan->padded, count, from, stop - j, scratch->scores + j, ahead,
                          a->key.kind);
        for (int64_t m = 0; m < count; m++)
            for (int64_t t = j; t < stop; t++) scratch->scores[m * KEY_BLOCK + t] -= scratch->key_digits[m].shift;
    }
}

#if HAS_INTEGER
/* Rows of q for one group of tokens as digits. */
INLINE void fold_to_digits(const AttentionArguments *a, const Plan *plan, int64_t first, int64_t last,
                           const Scratch *scratch, float *folded, Digits *digits) {
    fold_rows(plan, first, last, scratch, folded, digits);
    for (int64_t row = first; row < last; row++) {
        float shift = digits[row].shift;
        query_to_digits(a, plan, folded + row * plan->padded, digits[row].step, &digits[row]);
        digits[row].shift = shift;
    }
}

/* The digits of q for the group of tokens at key j of a block, of rows that see any of it; returns where it ends. Of few
 * rows, those for all groups of a block are made with its first, since each waits long for its largest value. */
static int64_t fold_digits(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t count,
                           int64_t start, int64_t j, int64_t keys, Folded *now, Scratch *scratch) {
    if (plan->folds > 1) {
        int64_t size = plan->block_rows * plan->padded;
        if (!j) {
            for (int64_t i = 0, t = 0; t < keys; i++) {
                t = load_group(a, b, g, start + t, scratch) - start, scratch->fold_stops[i] = t;
                fold_to_digits(a, plan, 0, count, scratch, scratch->folded + i * size,
                               scratch->fold_digits + i * plan->block_rows);
            }
            *now = (Folded){scratch->folded, scratch->fold_digits, scratch->fold_stops};
            return now->stops[0];
        }
        now->q += size, now->digits += plan->block_rows;
        return *++now->stops;
    }
    *now = (Folded){scratch->folded, scratch->key_digits, NULL};
    int64_t stop = load_group(a, b, g, start + j, scratch) - start;
    for (int64_t m = 0; m < count; m += INTEGER_ROWS) {
        Range seen = seen_by(scratch, m, INTEGER_ROWS, count, start, keys);
        int64_t last = m + INTEGER_ROWS < count ? m + INTEGER_ROWS : count;
        if (seen.from >= stop || seen.to <= j) continue;
        fold_to_digits(a, plan, m, last, scratch, scratch->folded, scratch->key_digits);
    }
    return stop;
}

/* Every second of `count` floats to one place, the others to another; up to 31 behind the last are read and written. */
INLINE void halve(const float *from, int64_t count, float *even, float *odd) {
    __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    for (int64_t i = 0; i < count; i += 32) {
        __m512 a = _mm512_loadu_ps(from + i), b = _mm512_loadu_ps(from + i + 16);
        _mm512_storeu_ps(even + i / 2, _mm512_permutex2var_ps(a, evens, b));
        _mm512_storeu_ps(odd + i / 2, _mm512_permutex2var_ps(a, odds, b));
    }
}

/* Floats of 2 or 4 groups in turn become [groups][KEY_BLOCK]; `from` is used up. */
static void separate(float *from, int64_t count, int64_t groups, float *to) {
    if (groups == 2) {
        halve(from, count, to, to + KEY_BLOCK);
        return;
    }
    float *twos = to, *others = to + 2 * KEY_BLOCK;
    halve(from, count, twos, others);
    halve(twos, count / 2, from, from + 2 * KEY_BLOCK);
    halve(others, count / 2, from + KEY_BLOCK, from + 3 * KEY_BLOCK);
    memcpy(to, from, sizeof(float) * 4 * KEY_BLOCK);
}

/* A scale or zero of one block of keys as [groups of `span` channels][KEY_BLOCK]; 0 behind the last key. */
OUTLINE void load_split(const Part *part, int64_t b, int64_t g, int64_t start, int64_t keys, int64_t span,
                       int64_t groups, float otherwise, float *raw, float *to) {
    int64_t at = part_start(part, b, g, start), count = keys * groups, i = 0;
    int dense = part->data && part->per_token && part->group == 1 && part->span == span && part->stride[3] == 1 &&
                part->stride[2] == groups;
    for (; dense && i + 8 <= count; i += 8) {
        const char *from = (const char *)part->data + (at + i) * kind_size((int)part->kind);
        store_f32(raw + i, load_as_f32(from, part->kind == KIND_FLOAT32 ? KIND_FLOAT32 : KIND_FLOAT16));
    }
    for (; dense && i < count; i++) raw[i] = part_value(part, at + i);
    if (dense && (groups == 2 || groups == 4)) {
        separate(raw, count, groups, to);
        for (int64_t w = 0; w < groups; w++) memset(to + w * KEY_BLOCK + keys, 0, sizeof(float) * (size_t)(KEY_BLOCK - keys));
        return;
    }
    for (int64_t w = 0; w < groups; w++, to += KEY_BLOCK) {
        for (int64_t j = 0; dense && j < keys; j++) to[j] = raw[j * groups + w];
        for (int64_t j = 0; !dense && j < keys; j++)
            to[j] = part->data ? part_value(part, part_start(part, b, g, start + j) +
                                                      w * span / part->span * part->stride[3])
                               : otherwise;
        memset(to + keys, 0, sizeof(float) * (size_t)(KEY_BLOCK - keys));
    }
}

/* Scales and zeros of one block of K or V by groups of channels; returns how many groups there are. */
static int64_t load_splits(const AttentionArguments *a, const Side *side, int64_t b, int64_t g, int64_t start,
                           int64_t keys, int64_t span, Scratch *scratch) {
    int64_t groups = a->width / span;
    load_split(&side->scale, b, g, start, keys, span, groups, 1.0f, scratch->split_raw, scratch->split_scale);
    load_split(&side->zero, b, g, start, keys, span, groups, 0.0f, scratch->split_raw, scratch->split_zero);
    return groups;
}

/* block_scores in whole numbers where groups of channels have scales per token: a sum for each. */
OUTLINE void split_scores(const AttentionArguments *a, const Plan *plan, Rows key, Rows next, int64_t b, int64_t g,
                         int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t groups = load_splits(a, &a->key, b, g, start, keys, plan->key_span, scratch), quads = plan->key_span / 4;
    int64_t whole = a->key.kind == KIND_INT4 ? groups / 2 : groups; /* the bytes of the next ones are the same */
    int64_t turns = groups * quads, tiles = (keys + TILE_COLUMNS - 1) / TILE_COLUMNS;
    Ahead ahead = ahead_of(next, keys, tiles * turns);
    for (int64_t j = 0; j < keys; j += TILE_COLUMNS) {
        Rows from = {key.data + j * key.stride, key.stride, key.width};
        interleave_keys(from, keys - j, (uint8_t *)scratch->keys, a->key.kind);
        for (int64_t m = 0; m < count; m += INTEGER_ROWS) {
            Range seen = seen_by(scratch, m, INTEGER_ROWS, count, start, keys);
            if (j < seen.from || j >= seen.to) continue;
            for (int64_t w = 0; w < groups; w++) {
                const uint8_t *tile = (const uint8_t *)scratch->keys + w % whole * quads * 4 * TILE_COLUMNS;
                int codes = a->key.kind == KIND_INT8 ? CODES_BYTES : w < whole ? CODES_LOW : CODES_HIGH;
                Ahead fetched = {ahead.data + w * quads * ahead.step, ahead.step};
                split_scores_any((const int32_t *)scratch->q + m * plan->padded + w * plan->key_span, plan->padded,
                                 tile, quads, scratch->scores + m * KEY_BLOCK + j, KEY_BLOCK,
                                 scratch->split_digits + w * plan->block_rows + m,
                                 scratch->split_scale + w * KEY_BLOCK + j, scratch->split_zero + w * KEY_BLOCK + j,
                                 m ? (Ahead){key.data, 0} : fetched, !w, codes,
                                 count - m < INTEGER_ROWS ? count - m : INTEGER_ROWS);
            }
        }
        ahead.data += ahead.step * turns;
    }
}

/* Weights of one row with the scales of one group of channels in them, as digits; what its zeros add to the output is
 * taken off. Digits would hide a scale that is no number. */
OUTLINE void split_weights(const float *weights, const float *scale, const float *zero, int64_t count, int64_t span,
                          int offset, float *to, float *output, Row *row, Digits *digits) {
    f32v sum = {0}, zeros = {0}, largest = {0};
    for (int64_t j = 0; j < count; j += LANES) {
        f32v x = load_lanes(weights + j) * load_lanes(scale + j);
        sum += x, zeros += x * load_lanes(zero + j), largest = max_lanes(largest, max_lanes(x, -x));
        store_lanes(to + j, x);
    }
    float shift = sum_of_lanes(zeros + (sum - sum));
    if (!(shift - shift == 0.0f)) row->total = NAN;
    for (int64_t d = 0; d < span; d += LANES) store_lanes(output + d, load_lanes(output + d) - all_lanes(shift));
    to_digits(to, count, max_of_lanes(largest) / LARGEST_WHOLE, LARGEST_WHOLE, offset, digits);
}

/* block_output in whole numbers where groups of channels have scales per token: digits of the weights for each. */
OUTLINE void split_output(const AttentionArguments *a, const Plan *plan, Rows value, Rows next, int64_t b, int64_t g,
                         int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t span = plan->value_span, groups = load_splits(a, &a->value, b, g, start, keys, span, scratch);
    int is_int4 = a->value.kind == KIND_INT4, offset = offset_of(a->value.kind);
    int64_t halves = is_int4 ? 2 : 1, whole = groups / halves, bytes = whole * span;
    int64_t columns = is_int4 ? 16 : TILE_COLUMNS, turns = (keys + 3) / 4;
    Ahead ahead = ahead_of(next, keys, bytes / columns * turns);
    for (int64_t w = 0; w < whole; w++)
        for (int64_t m = 0; m < count; m += INTEGER_ROWS) {
            Range seen = seen_by(scratch, m, INTEGER_ROWS, count, start, keys);
            int64_t rows = count - m < INTEGER_ROWS ? count - m : INTEGER_ROWS;
            int64_t used = round_up(seen.to - seen.from, LANES);
            Digits digits[2][INTEGER_ROWS];
            if (seen.from >= seen.to) continue;
            for (int64_t half = 0; half < halves; half++)
                for (int64_t h = 0; h < rows; h++) {
                    int64_t at = (w + half * whole) * KEY_BLOCK + seen.from;
                    split_weights(scratch->scores + (m + h) * KEY_BLOCK + seen.from, scratch->split_scale + at,
                                  scratch->split_zero + at, used, span, offset,
                                  scratch->weights[half] + h * KEY_BLOCK,
                                  scratch->output + (m + h) * plan->padded + (w + half * whole) * span,
                                  &scratch->rows[m + h], &digits[half][h]);
                }
            Rows from = {value.data + seen.from * value.stride, value.stride, value.width};
            High high = {(const int32_t *)scratch->weights[1], digits[1]}, none = {0};
            for (int64_t d = w * span; d < (w + 1) * span; d += columns) {
                Ahead fetched = {ahead.data + d / columns * turns * ahead.step, ahead.step};
                integer_output((const int32_t *)scratch->weights[0], KEY_BLOCK, from, d, seen.to - seen.from,
                               scratch->output + m * plan->padded + d, is_int4 ? bytes : 16, plan->padded, digits[0],
                               is_int4 ? high : none, m ? (Ahead){value.data, 0} : fetched, a->value.kind, rows);
            }
        }
}
#endif
