/* attention: softmax(q k^T) v over stored codes; README.md has the semantics and the folds.
 *
 * Rows are (query, head) pairs of one KV head: row m is query m / R of head g R + m % R, with R = H / G, so that all
 * that read the same codes stand together. A task is a block of rows over a chunk of keys; it runs a softmax block by
 * block of keys, and a second pass merges the chunks. */

enum { KEY_BLOCK = 192, MAX_ROWS = 192, DIRECT_ROWS = 8, GROUPED_ROWS = 64, MIN_CHUNK = 512 };
enum { LARGEST_COUNT = 1 << 29 }; /* of ops/attention/arguments.py: no sum of lengths, windows and positions wraps */

/* How the codes of K or V are multiplied: straight from memory, as whole numbers, or decoded into a tile of floats for
 * few rows or for many. */
enum { MODE_DIRECT = 0, MODE_INTEGER = 1, MODE_DECODED = 2, MODE_TILE = 3 };

/* How the scales and zeros of K or V vary: not along tokens and channels at once; so, but constant over groups of a
 * multiple of GROUP_STEP tokens; or over groups of a multiple of GROUP_STEP channels; in any other way,
 * or for so many rows that decoding a block once is quicker than digits for each group and row. */
enum { GROUPS_NONE = 0, GROUPS_TOKENS = 1, GROUPS_CHANNELS = 2, GROUPS_BOTH = 3, GROUP_STEP = 32 };

/* How the work is cut: constant over a call. Parts are those that decoding has not applied already. */
typedef struct {
    int64_t ratio, rows, block_rows, blocks, begin, end, chunk, chunks, padded, position_padded;
    int64_t high_shift; /* columns by which the high half of V's channels starts too far right in the output */
    int64_t align; /* a block starts at a multiple of it */
    int64_t key_span, value_span; /* channels of a group */
    int key_mode, value_mode, key_groups, value_groups, query_digits;
    float query_unit, weight_unit; /* factors of q and the weights that make up for the units of the codes */
    float factor;                  /* of scores, for units of log2 */
    Part key_scale, key_zero, value_scale, value_zero;
} Plan;

/* What a row carries through the blocks of keys. Scores are in units of log2. */
typedef struct {
    float factor;   /* of the products q . code: scaling, and all scales that do not vary along keys or channels */
    float constant; /* sum of q * key_zero, where a per-token scale keeps it from cancelling */
    float offset;   /* of all scores, where that sum cancels: what the log-sum-exp alone needs */
    float q_sum;    /* sum of q, for per-token zeros of K */
    float best, total;
    float weighted;       /* sum of weights * value_scale, where that is per token */
    float zeros;          /* sum of weights * value_scale * value_zero, where the zero is per token */
    int64_t front, limit; /* the row sees keys from `front` up to `limit`, masks aside */
} Row;

typedef struct {
    float *q, *folded;                           /* `folded` has the scales of one group of tokens in it */
    float *split_scale, *split_zero, *split_raw; /* of one block of keys: [groups of channels][KEY_BLOCK] */
    Digits *split_digits;                        /* [groups of channels][rows] */
    float *output, *scores, *keys, *values, *panels, *channel_scale, *channel_zero, *position_q, *positions;
    float key_scale[KEY_BLOCK], key_zero[KEY_BLOCK], value_scale[KEY_BLOCK], value_zero[KEY_BLOCK], bias[KEY_BLOCK];
    float shifts[MAX_ROWS], weights[2][INTEGER_ROWS * KEY_BLOCK];
    Row rows[MAX_ROWS];
    Digits key_digits[MAX_ROWS], weight_digits[MAX_ROWS];
} Scratch;

/* Keys of a block, relative to its first. */
typedef struct {
    int64_t from, to;
} Range;

INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

INLINE int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

INLINE float part_value(const Part *part, int64_t at) {
    if (part->kind == KIND_FLOAT32) return ((const float *)part->data)[at];
    return half_to_float(((const uint16_t *)part->data)[at]);
}

/* Where a sequence, a KV head and a token start in a part. */
INLINE int64_t part_start(const Part *part, int64_t b, int64_t g, int64_t token) {
    int64_t row = part->per_token ? (part->group == 1 ? token : token / part->group) : 0;
    return b * part->stride[0] + g * part->stride[1] + row * part->stride[2];
}

/* The part of one token for each channel, or `otherwise` if there is none. `to` has LANES floats behind the last. */
OUTLINE void load_channels(const Part *part, int64_t b, int64_t g, int64_t token, int64_t width, float otherwise,
                          float *to) {
    int64_t span = part->data ? part->span : width, start = part_start(part, b, g, token);
    for (int64_t d = 0, column = 0; d < width; d += span, column++) {
        if (span == 1 && part->stride[3] == 1 && d + 8 <= width) {
            const char *from = (const char *)part->data + (start + d) * kind_size((int)part->kind);
            store_f32(to + d, load_as_f32(from, part->kind == KIND_FLOAT32 ? KIND_FLOAT32 : KIND_FLOAT16));
            d += 7, column += 7;
            continue;
        }
        float x = part->data ? part_value(part, start + column * part->stride[3]) : otherwise;
        if (span == 1)
            to[d] = x;
        else
            for (int64_t i = d; i < d + span; i += LANES) store_lanes(to + i, all_lanes(x));
    }
}

/* Per-token values of one block of keys, zeros behind the last; nothing if the part does not vary along the keys. */
OUTLINE void load_tokens(const Part *part, int64_t b, int64_t g, int64_t start, int64_t keys, float *to) {
    if (!part->per_token) return;
    int64_t at = part_start(part, b, g, start), step = part->stride[2], j = 0;
    if (part->group == 1 && step == 1)
        for (; j + 8 <= keys; j += 8) {
            const char *from = (const char *)part->data + (at + j) * kind_size((int)part->kind);
            store_f32(to + j, load_as_f32(from, part->kind == KIND_FLOAT32 ? KIND_FLOAT32 : KIND_FLOAT16));
        }
    if (part->group == 1)
        for (; j < keys; j++) to[j] = part_value(part, at + j * step);
    for (; j < keys; j++) to[j] = part_value(part, part_start(part, b, g, start + j));
    memset(to + keys, 0, sizeof(float) * (size_t)(KEY_BLOCK - keys));
}

INLINE int64_t bounded(int64_t count) {
    return count < -LARGEST_COUNT ? -LARGEST_COUNT : count > LARGEST_COUNT ? LARGEST_COUNT : count;
}

/* Tokens in use of one sequence, as the caller says: may exceed those stored. */
static int64_t length_of(const AttentionArguments *a, int64_t b) {
    if (!a->length) return a->keys;
    int64_t at = b * a->length_stride;
    return bounded(a->length_kind == KIND_INT32 ? ((const int32_t *)a->length)[at] : ((const int64_t *)a->length)[at]);
}

/* Keys that a query sees, masks aside. */
static Range keys_of(const AttentionArguments *a, int64_t b, int64_t query) {
    int64_t length = length_of(a, b), newest = length - a->queries + query;
    Range seen = {0, clamped(length, a->keys)};
    if (a->causal && !a->mask) {
        seen.to = clamped(newest + 1, seen.to);
        if (a->window) seen.from = clamped(newest - bounded(a->window) + 1, seen.to);
    }
    return seen;
}

/* One row of q, copied to `q` and quantized if that is asked for. */
static void load_query(const AttentionArguments *a, int64_t b, int64_t head, int64_t query, int64_t padded, float *q,
                       Row *row) {
    const float *from = (const float *)a->query + b * a->query_stride[0] + head * a->query_stride[1] +
                        query * a->query_stride[2];
    memcpy(q, from, sizeof(float) * (size_t)a->width);
    memset(q + a->width, 0, sizeof(float) * (size_t)(padded - a->width));
    if (!a->query_scale) return;
    float step = ((const float *)a->query_scale)[b * a->query_scale_stride[0] + head * a->query_scale_stride[1] +
                                                 query * a->query_scale_stride[2]];
    for (int64_t d = 0; d < padded; d += 8) store_f32(q + d, round_to_code(load_f32(q + d) / splat(step)));
    memset(q + a->width, 0, sizeof(float) * (size_t)(padded - a->width)); /* 0 / 0 is none */
    row->factor *= step;
}

/* One row of the query of scores by position, copied and padded. */
static void load_position_query(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t head, int64_t query,
                                float *to) {
    const Position *position = &a->position;
    const float *from = (const float *)position->query + b * position->query_stride[0] +
                        head * position->query_stride[1] + query * position->query_stride[2];
    memcpy(to, from, sizeof(float) * (size_t)position->width);
    memset(to + position->width, 0, sizeof(float) * (size_t)(plan->position_padded - position->width));
}

/* A row of q as digits in its place. */
static void query_to_digits(const AttentionArguments *a, const Plan *plan, float *q, Digits *digits) {
#if HAS_INTEGER
    int64_t quads = byte_quads(a->width, a->key.kind), half = a->width / 2, gap = 4 * quads - half;
    if (a->key.kind == KIND_INT4) {
        if (gap) { /* the high half starts at a quad of its own */
            memmove(q + half + gap, q + half, sizeof(float) * (size_t)half);
            memset(q + half, 0, sizeof(float) * (size_t)gap);
        }
        quads *= 2;
    }
    to_digits(q, round_up(4 * quads, 16), plan->query_digits == 1 ? 1.0f : 0.0f, offset_of(a->key.kind), digits);
#else
    (void)a, (void)plan, (void)q, (void)digits;
#endif
}

/* A row of q as digits in its place, with a step for each group of channels. */
static void query_to_split_digits(const AttentionArguments *a, const Plan *plan, float *q, Digits *digits) {
#if HAS_INTEGER
    for (int64_t d = 0; d < a->width; d += plan->key_span, digits += plan->block_rows) {
        f32v sum = {0};
        for (int64_t i = d; i < d + plan->key_span; i += LANES) sum += load_lanes(q + i);
        to_digits(q + d, plan->key_span, 0.0f, offset_of(a->key.kind), digits);
        digits->shift = sum_of_lanes(sum);
    }
#else
    (void)a, (void)plan, (void)q, (void)digits;
#endif
}

/* Rows `first` to `first + count` with every scale of K folded in that can be; zero-padded to `padded` columns. */
OUTLINE void prepare_rows(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first,
                         int64_t count, Scratch *scratch) {
    int64_t padded = plan->padded, whole = round_up(count, plan->rows > DIRECT_ROWS ? ROW_STEP : 1);
    int scaled = plan->key_scale.data && !plan->key_scale.per_token;
    int per_channel = scaled && plan->key_scale.span < a->width;
    int varies = (int)plan->key_scale.per_token;
    int constant = plan->key_zero.data && !plan->key_zero.per_token && (varies || a->lse);
    const float *scale = scratch->channel_scale, *zero = scratch->channel_zero;
    if (scaled) load_channels(&plan->key_scale, b, g, 0, a->width, 1.0f, scratch->channel_scale);
    if (constant) load_channels(&plan->key_zero, b, g, 0, a->width, 0.0f, scratch->channel_zero);
    memset(scratch->q + count * padded, 0, sizeof(float) * (size_t)(padded * (whole - count)));
    memset(scratch->output, 0, sizeof(float) * (size_t)(padded * whole));
    memset(scratch->position_q + count * plan->position_padded, 0,
           sizeof(float) * (size_t)(plan->position_padded * (whole - count)));
    for (int64_t m = 0; m < count; m++) {
        int64_t query = (first + m) / plan->ratio, head = g * plan->ratio + (first + m) % plan->ratio;
        float *q = scratch->q + m * padded;
        Range seen = keys_of(a, b, query);
        Row row = {.best = -INFINITY, .factor = plan->factor};
        row.front = seen.from, row.limit = seen.to;
        load_query(a, b, head, query, padded, q, &row);
        if (a->position.query)
            load_position_query(a, plan, b, head, query, scratch->position_q + m * plan->position_padded);
        if (scaled && !per_channel) row.factor *= *scale; /* the products of quantized q and K stay whole numbers */
        for (int64_t d = 0; per_channel && d < a->width; d++) q[d] *= scale[d];
        f32v sum = {0};
        for (int64_t d = 0; d < padded; d += LANES) sum += load_lanes(q + d);
        row.q_sum = sum_of_lanes(sum);
        float shift = 0.0f;
        for (int64_t d = 0; constant && d < a->width; d++) shift += q[d] * zero[d];
        row.constant = varies ? shift : 0.0f, row.offset = varies ? 0.0f : -shift * row.factor;
        if (plan->key_mode == MODE_INTEGER) {
            if (!(row.q_sum - row.q_sum == 0.0f)) row.factor = NAN; /* digits would hide what is no number */
            if (plan->key_groups == GROUPS_CHANNELS)
                query_to_split_digits(a, plan, q, scratch->split_digits + m);
            else if (!plan->key_groups)
                query_to_digits(a, plan, q, &scratch->key_digits[m]);
        }
        for (int64_t d = 0; plan->query_unit != 1.0f && d < padded; d++) q[d] *= plan->query_unit;
        scratch->rows[m] = row;
    }
}

/* The rows `first` to `stop` of q with the scales of one group of tokens folded in, which are in `channel_scale`; in
 * `shifts` what its zeros add to their scores, NaN if a scale is no number, which digits would hide. */
OUTLINE void fold_rows(const Plan *plan, int64_t first, int64_t stop, Scratch *scratch) {
    int64_t padded = plan->padded;
    for (int64_t m = first; m < stop; m++) {
        f32v sum = {0}, shift = {0};
        for (int64_t d = 0; d < padded; d += LANES) {
            f32v x = load_lanes(scratch->q + m * padded + d) * load_lanes(scratch->channel_scale + d);
            sum += x, shift += x * load_lanes(scratch->channel_zero + d);
            store_lanes(scratch->folded + m * padded + d, x);
        }
        scratch->shifts[m] = sum_of_lanes(shift + (sum - sum)) / plan->query_unit;
    }
}

/* Additive mask of one row and block of keys, in units of log2. */
OUTLINE void load_bias(const AttentionArguments *a, int64_t b, int64_t head, int64_t query, int64_t start, int64_t keys,
                      float *bias) {
    int64_t at = b * a->mask_stride[0] + head * a->mask_stride[1] + query * a->mask_stride[2], step = a->mask_stride[3];
    if (a->mask_kind == KIND_BOOL) {
        const uint8_t *seen = (const uint8_t *)a->mask + at + start * step;
        for (int64_t j = 0; j < keys; j++) bias[j] = seen[j * step] ? 0.0f : -INFINITY;
    } else {
        const float *added = (const float *)a->mask + at + start * step;
        for (int64_t j = 0; j < keys; j++) { /* the lowest float, which masks too, must not become -inf */
            float x = added[j * step], scaled = x * 1.44269504f;
            bias[j] = x > -INFINITY && scaled < -FLT_MAX ? -FLT_MAX : scaled;
        }
    }
}

/* One row's products of a block of keys, those in `computed`, become weights, 0 outside of `seen`; the row's sums and
 * its output so far are brought up to date. `bias` and `positions`, products by position, may be NULL. */
OUTLINE void soften_row(const Plan *plan, Row *row, float *scores, Range computed, Range seen, const Scratch *scratch,
                       const float *bias, const float *positions, float *output) {
    f32v largest = all_lanes(-INFINITY), factor = all_lanes(row->factor);
    i32v sound = (i32v)(largest <= largest); /* all true, until a score is NaN or +inf */
    int scaled_keys = plan->key_scale.per_token, shifted = plan->key_zero.per_token || row->constant != 0.0f;
    for (int64_t j = computed.from; j < computed.to; j += LANES) {
        f32v s = load_lanes(scores + j);
        if (shifted) s -= all_lanes(row->constant) + load_lanes(scratch->key_zero + j) * all_lanes(row->q_sum);
        s *= factor;
        if (scaled_keys) s *= load_lanes(scratch->key_scale + j);
        if (positions) s += load_lanes(positions + j) * all_lanes(plan->factor);
        if (bias) s += load_lanes(bias + j);
        if (j < seen.from || j + LANES > seen.to) {
            i32v key = lane_numbers() + (int32_t)j;
            s = select_lanes((i32v)(key >= (int32_t)seen.from) & (i32v)(key < (int32_t)seen.to), s,
                             all_lanes(-INFINITY));
        }
        largest = max_lanes(largest, s);
        sound &= (i32v)(s <= all_lanes(FLT_MAX));
        store_lanes(scores + j, s);
    }
    float best = max_of_lanes(largest) > row->best ? max_of_lanes(largest) : row->best;
    float shift = best == -INFINITY ? 0.0f : best, fade = exp2_of_one(row->best - shift);
    f32v total = {0}, weighted = {0}, zeros = {0};
    int scaled = plan->value_scale.per_token, shifted_values = plan->value_zero.per_token;
    for (int64_t j = computed.from; j < computed.to; j += LANES) {
        f32v weight = exp2_of(load_lanes(scores + j) - all_lanes(shift));
        total += weight;
        if (scaled) {
            weight *= load_lanes(scratch->value_scale + j);
            weighted += weight;
        }
        if (shifted_values) zeros += weight * load_lanes(scratch->value_zero + j);
        store_lanes(scores + j, weight * all_lanes(plan->weight_unit));
    }
    float block_weighted = sum_of_lanes(scaled ? weighted : total);
    row->total = row->total * fade + sum_of_lanes(total);
    row->weighted = row->weighted * fade + block_weighted;
    row->zeros = row->zeros * fade + sum_of_lanes(zeros);
    if (!all_true(sound)) row->total = NAN; /* max and exp2 would hide it */
    if (plan->value_mode == MODE_INTEGER && !(block_weighted - block_weighted == 0.0f)) row->total = NAN;
    if (best != row->best)
        for (int64_t d = 0; d < plan->padded; d += LANES)
            store_lanes(output + d, load_lanes(output + d) * all_lanes(fade));
    row->best = best;
}

/* Rows that are multiplied together in a mode. */
INLINE int64_t row_step(int mode) { return mode == MODE_TILE ? ROW_STEP : INTEGER_ROWS; }

/* The keys of a block that rows m to m + step multiply: those that any of them sees, from a multiple of 32 on. */
static Range seen_by(const Scratch *scratch, int64_t m, int64_t step, int64_t count, int64_t start, int64_t keys) {
    int64_t last = m + step < count ? m + step - 1 : count - 1; /* later rows see from and up to later keys */
    Range seen = {scratch->rows[m].front - start, scratch->rows[last].limit - start};
    seen.from = clamped(seen.from, keys) / 32 * 32, seen.to = clamped(seen.to, keys);
    return seen;
}

/* Codes of one block as floats, with its scales and zeros where they are grouped both ways. */
OUTLINE void decode_block(const AttentionArguments *a, const Side *side, int grouped, Rows from, int64_t b, int64_t g,
                         int64_t start, int64_t keys, int64_t padded, Scratch *scratch, float *tile) {
    switch (side->kind) {
    case KIND_INT8: decode_rows_of(from, keys, padded, tile, KIND_INT8); break;
    case KIND_FLOAT32: decode_rows_of(from, keys, padded, tile, KIND_FLOAT32); break;
    case KIND_BFLOAT16: decode_rows_of(from, keys, padded, tile, KIND_BFLOAT16); break;
    case KIND_FLOAT16: decode_rows_of(from, keys, padded, tile, KIND_FLOAT16); break;
    case KIND_INT4: decode_rows_of(from, keys, padded, tile, KIND_INT4); break;
    case KIND_FLOAT8_E4M3: decode_rows_of(from, keys, padded, tile, KIND_FLOAT8_E4M3); break;
    default: decode_rows_of(from, keys, padded, tile, KIND_FLOAT8_E5M2);
    }
    if (!grouped) return;
    float *scale = scratch->channel_scale, *zero = scratch->channel_zero;
    for (int64_t j = 0; j < keys; j++) {
        int64_t token = start + j;
        if (!j || (side->scale.per_token && token % side->scale.group == 0))
            load_channels(&side->scale, b, g, token, a->width, 1.0f, scale);
        if (!j || (side->zero.per_token && token % side->zero.group == 0))
            load_channels(&side->zero, b, g, token, a->width, 0.0f, zero);
        float *row = tile + j * padded;
        for (int64_t d = 0; d < padded; d += LANES)
            store_lanes(row + d, (load_lanes(row + d) - load_lanes(zero + d)) * load_lanes(scale + d));
        for (int64_t d = a->width; d < padded; d++) row[d] = 0.0f;
    }
}

OUTLINE void direct_scores_any(const float *q, int64_t padded, int64_t rows, Rows key, int64_t keys, float *scores,
                              Rows ahead, int64_t kind) {
    switch (kind) {
#if !HAS_INTEGER
    case KIND_INT8: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_INT8); break;
    case KIND_INT4: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_INT4); break;
#endif
    case KIND_FLOAT32: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT32); break;
    case KIND_BFLOAT16: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_BFLOAT16); break;
    case KIND_FLOAT16: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT16); break;
    case KIND_FLOAT8_E4M3: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT8_E4M3); break;
    default: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT8_E5M2);
    }
}

OUTLINE void direct_output_any(const float *weights, int64_t rows, Rows value, int64_t keys, float *to,
                              int64_t padded, int64_t kind) {
    switch (kind) {
#if !HAS_INTEGER
    case KIND_INT8: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_INT8); break;
    case KIND_INT4: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_INT4); break;
#endif
    case KIND_FLOAT32: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT32); break;
    case KIND_BFLOAT16: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_BFLOAT16); break;
    case KIND_FLOAT16: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT16); break;
    case KIND_FLOAT8_E4M3: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT8_E4M3); break;
    default: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT8_E5M2);
    }
}

#if HAS_INTEGER
/* How to fetch rows in a number of turns; nothing unless they lie side by side. */
static Ahead ahead_of(Rows next, int64_t keys, int64_t turns) {
    int64_t step = next.stride == next.width ? round_up(keys * next.width / turns, 64) : 0;
    return (Ahead){next.data, step < 128 ? step : 128};
}
#endif

/* scores[m][j] = q[m] . key[j] for one block of keys in panels, `depth` of `padded` columns, where m sees j. */
static void panel_scores(const float *q, int64_t padded, int64_t depth, const float *panels, float *scores,
                         int64_t count, int64_t start, int64_t keys, const Scratch *scratch) {
    for (int64_t j = 0; j < keys; j += PANEL)
        for (int64_t m = 0; m < count; m += ROW_STEP) {
            Range seen = seen_by(scratch, m, ROW_STEP, count, start, keys);
            if (j + PANEL > seen.from && j < seen.to)
                gemm_rows(q + m * padded, padded, panels + j * padded, PANEL, depth, scores + m * KEY_BLOCK + j,
                          KEY_BLOCK, 0);
        }
}

/* The rows of the table of one block of keys: where they lie, or, beyond its ends or if they want padding, a copy. */
static Rows position_rows(const AttentionArguments *a, int64_t b, int64_t start, int64_t keys, int64_t padded,
                          float *tile) {
    const Position *position = &a->position;
    int64_t first = bounded(((const int64_t *)position->start)[b * position->start_stride]) + start;
    const float *table = (const float *)position->table;
    if (first >= 0 && first <= position->rows - keys && position->width == padded && position->row_stride == padded)
        return (Rows){(const char *)(table + first * padded), padded * 4, padded};
    for (int64_t j = 0; j < keys; j++) {
        int64_t row = clamped(first + j, position->rows - 1);
        memcpy(tile + j * padded, table + row * position->row_stride, sizeof(float) * (size_t)position->width);
        memset(tile + j * padded + position->width, 0, sizeof(float) * (size_t)(padded - position->width));
    }
    return (Rows){(const char *)tile, padded * 4, padded};
}

/* positions[m][j] = position_q[m] . table[position_start + j] for one block of keys. The tiles of K are free by now. */
OUTLINE void position_scores(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t count, int64_t start,
                            int64_t keys, Scratch *scratch) {
    int64_t padded = plan->position_padded;
    Rows rows = position_rows(a, b, start, keys, padded, scratch->keys), nothing = {rows.data, 0, 0};
    if (plan->rows <= DIRECT_ROWS) {
        direct_scores_any(scratch->position_q, padded, count, rows, keys, scratch->positions, nothing, KIND_FLOAT32);
        return;
    }
    transpose_keys((const float *)rows.data, keys, padded, scratch->panels);
    panel_scores(scratch->position_q, padded, a->position.width, scratch->panels, scratch->positions, count, start,
                 keys, scratch);
}

/* The scales and zeros of K of the group of `token`, and where it ends. */
static int64_t load_group(const AttentionArguments *a, int64_t b, int64_t g, int64_t token, Scratch *scratch) {
    const Part *scale = &a->key.scale, *zero = &a->key.zero;
    int64_t group = scale->per_token ? scale->group : zero->group;
    load_channels(scale, b, g, token, a->width, 1.0f, scratch->channel_scale);
    load_channels(zero, b, g, token, a->width, 0.0f, scratch->channel_zero);
    return token / group * group + group;
}

/* block_scores of few rows straight on the codes, where groups of tokens have scales per channel. */
static void folded_scores(const AttentionArguments *a, const Plan *plan, Rows key, Rows next, int64_t b, int64_t g,
                          int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    for (int64_t j = 0, stop; j < keys; j = stop) {
        stop = clamped(load_group(a, b, g, start + j, scratch) - start, keys);
        fold_rows(plan, 0, count, scratch);
        Rows from = {key.data + j * key.stride, key.stride, key.width};
        Rows ahead = {next.data + j * next.stride, next.stride, next.width};
        direct_scores_any(scratch->folded, plan->padded, count, from, stop - j, scratch->scores + j, ahead,
                          a->key.kind);
        for (int64_t m = 0; m < count; m++)
            for (int64_t t = j; t < stop; t++) scratch->scores[m * KEY_BLOCK + t] -= scratch->shifts[m];
    }
}

#if HAS_INTEGER
/* The digits of q for the group of tokens at key j of a block, of rows that see any of it; returns where it ends. */
static int64_t fold_digits(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t count,
                           int64_t start, int64_t j, int64_t keys, Scratch *scratch) {
    int64_t stop = load_group(a, b, g, start + j, scratch) - start;
    for (int64_t m = 0; m < count; m += INTEGER_ROWS) {
        Range seen = seen_by(scratch, m, INTEGER_ROWS, count, start, keys);
        int64_t last = m + INTEGER_ROWS < count ? m + INTEGER_ROWS : count;
        if (seen.from >= stop || seen.to <= j) continue;
        fold_rows(plan, m, last, scratch);
        for (int64_t row = m; row < last; row++) {
            query_to_digits(a, plan, scratch->folded + row * plan->padded, &scratch->key_digits[row]);
            scratch->key_digits[row].shift = scratch->shifts[row];
        }
    }
    return stop;
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
    f32v sum = {0}, zeros = {0};
    for (int64_t j = 0; j < count; j += LANES) {
        f32v x = load_lanes(weights + j) * load_lanes(scale + j);
        sum += x, zeros += x * load_lanes(zero + j);
        store_lanes(to + j, x);
    }
    float shift = sum_of_lanes(zeros + (sum - sum));
    if (!(shift - shift == 0.0f)) row->total = NAN;
    for (int64_t d = 0; d < span; d += LANES) store_lanes(output + d, load_lanes(output + d) - all_lanes(shift));
    to_digits(to, count, 0.0f, offset, digits);
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

/* scores[m][j] = q[m] . key[j] for one block of keys; `next`, the rows of V, is fetched meanwhile. */
OUTLINE void block_scores(const AttentionArguments *a, const Plan *plan, Rows key, Rows next, int64_t b, int64_t g,
                         int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t padded = plan->padded;
    if (plan->key_mode == MODE_DIRECT && plan->key_groups) {
        folded_scores(a, plan, key, next, b, g, count, start, keys, scratch);
        return;
    }
    if (plan->key_mode == MODE_DIRECT) {
        direct_scores_any(scratch->q, padded, count, key, keys, scratch->scores, next, a->key.kind);
        return;
    }
#if HAS_INTEGER
    if (plan->key_groups == GROUPS_CHANNELS) {
        split_scores(a, plan, key, next, b, g, count, start, keys, scratch);
        return;
    }
    if (plan->key_mode == MODE_INTEGER) {
        int64_t step = row_step(MODE_INTEGER), quads = byte_quads(a->width, a->key.kind);
        int64_t tiles = (keys + TILE_COLUMNS - 1) / TILE_COLUMNS;
        int64_t folded_to = plan->key_groups ? 0 : keys;
        const float *q = plan->key_groups ? scratch->folded : scratch->q;
        Ahead ahead = ahead_of(next, keys, tiles * quads), nothing = {(const char *)scratch->keys, 0};
        for (int64_t j = 0; j < keys; j += TILE_COLUMNS, ahead.data += ahead.step * quads) {
            Rows from = {key.data + j * key.stride, key.stride, key.width};
            if (j >= folded_to) folded_to = fold_digits(a, plan, b, g, count, start, j, keys, scratch);
            interleave_keys(from, keys - j, (uint8_t *)scratch->keys, a->key.kind);
            for (int64_t m = 0; m < count; m += step) {
                Range seen = seen_by(scratch, m, step, count, start, keys);
                if (j >= seen.from && j < seen.to)
                    integer_scores((const int32_t *)q + m * padded, padded, (const uint8_t *)scratch->keys,
                                   quads, scratch->scores + m * KEY_BLOCK + j, KEY_BLOCK, scratch->key_digits + m,
                                   m ? nothing : ahead, a->key.kind, count - m < step ? count - m : step,
                                   plan->query_digits);
            }
        }
        return;
    }
#endif
    decode_block(a, &a->key, plan->key_groups, key, b, g, start, keys, padded, scratch,
                 scratch->keys);
    if (plan->key_mode == MODE_DECODED) {
        Rows tile = {(const char *)scratch->keys, padded * 4, padded};
        direct_scores_any(scratch->q, padded, count, tile, keys, scratch->scores, next, KIND_FLOAT32);
        return;
    }
    transpose_keys(scratch->keys, keys, padded, scratch->panels);
    panel_scores(scratch->q, padded, a->width, scratch->panels, scratch->scores, count, start, keys, scratch);
}

/* output[m] += sum_j weights[m][j] value[j] for one block of keys; `next`, the rows of K that follow, is fetched. */
OUTLINE void block_output(const AttentionArguments *a, const Plan *plan, Rows value, Rows next, int64_t b, int64_t g,
                         int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t padded = plan->padded, step = row_step(plan->value_mode);
    if (plan->value_mode == MODE_DIRECT) {
        direct_output_any(scratch->scores, count, value, keys, scratch->output, padded, a->value.kind);
        return;
    }
#if HAS_INTEGER
    if (plan->value_groups == GROUPS_CHANNELS) {
        split_output(a, plan, value, next, b, g, count, start, keys, scratch);
        return;
    }
    if (plan->value_mode == MODE_INTEGER) {
        int is_int4 = a->value.kind == KIND_INT4;
        int64_t bytes = is_int4 ? a->width / 2 : a->width, columns = is_int4 ? 16 : TILE_COLUMNS;
        int64_t high = is_int4 ? round_up(bytes, 16) : 16, turns = (keys + 3) / 4;
        Ahead ahead = ahead_of(next, keys, (bytes + columns - 1) / columns * turns);
        Ahead nothing = {(const char *)scratch->scores, 0};
        for (int64_t d = 0; d < bytes; d += columns, ahead.data += ahead.step * turns)
            for (int64_t m = 0; m < count; m += step) {
                Range seen = seen_by(scratch, m, step, count, start, keys);
                Rows from = {value.data + seen.from * value.stride, value.stride, value.width};
                if (seen.from < seen.to)
                    integer_output((const int32_t *)scratch->scores + m * KEY_BLOCK + seen.from, KEY_BLOCK, from, d,
                                   seen.to - seen.from, scratch->output + m * padded + d, high, padded,
                                   scratch->weight_digits + m, (High){0}, m ? nothing : ahead, a->value.kind,
                                   count - m < step ? count - m : step);
            }
        return;
    }
#endif
    (void)next;
    decode_block(a, &a->value, plan->value_groups, value, b, g, start, keys, padded,
                 scratch, scratch->values);
    if (plan->value_mode == MODE_DECODED) {
        Rows tile = {(const char *)scratch->values, padded * 4, padded};
        direct_output_any(scratch->scores, count, tile, keys, scratch->output, padded, KIND_FLOAT32);
        return;
    }
    for (int64_t d = 0; d < padded; d += PANEL)
        for (int64_t m = 0; m < count; m += step) {
            Range seen = seen_by(scratch, m, step, count, start, keys);
            if (seen.from < seen.to)
                gemm_rows(scratch->scores + m * KEY_BLOCK + seen.from, KEY_BLOCK,
                          scratch->values + seen.from * padded + d, padded, seen.to - seen.from,
                          scratch->output + m * padded + d, padded, 1);
        }
}

/* The products of one block of keys become weights, for each row the keys that both stages of its group multiply. */
OUTLINE void soften_rows(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first,
                        int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int by_group = plan->rows > DIRECT_ROWS;
    for (int64_t m = 0; m < count; m++) {
        Row *row = &scratch->rows[m];
        float *scores = scratch->scores + m * KEY_BLOCK;
        int64_t query = (first + m) / plan->ratio, head = g * plan->ratio + (first + m) % plan->ratio;
        Range seen = {clamped(row->front - start, keys), clamped(row->limit - start, keys)};
        Range computed = {0, keys};
        if (by_group) {
            int64_t steps[2] = {row_step(plan->key_mode), row_step(plan->value_mode)};
            Range other = seen_by(scratch, m / steps[0] * steps[0], steps[0], count, start, keys);
            computed = seen_by(scratch, m / steps[1] * steps[1], steps[1], count, start, keys);
            computed.from = other.from < computed.from ? other.from : computed.from;
            computed.to = other.to > computed.to ? other.to : computed.to;
        }
        if (computed.from >= computed.to) continue;
        computed.to = round_up(computed.to, LANES);
        if (a->mask) load_bias(a, b, head, query, start, keys, scratch->bias);
        soften_row(plan, row, scores, computed, seen, scratch, a->mask ? scratch->bias : NULL,
                   a->position.query ? scratch->positions + m * KEY_BLOCK : NULL, scratch->output + m * plan->padded);
#if HAS_INTEGER
        if (plan->value_mode == MODE_INTEGER && !plan->value_groups)
            to_digits(scores + computed.from, computed.to - computed.from, 0.0f, offset_of(a->value.kind),
                      &scratch->weight_digits[m]);
#endif
    }
}

/* The rows of one sequence and KV head from one token on; bytes of a row in `bytes`. */
static Rows rows_at(const Side *side, int64_t b, int64_t g, int64_t token, int64_t width) {
    int64_t size = kind_size((int)side->kind);
    int64_t at = b * side->stride[0] + g * side->stride[1] + token * side->stride[2];
    return (Rows){(const char *)side->data + at * size, side->stride[2] * size, width};
}

static int64_t row_bytes(const Side *side, int64_t width) {
    return side->kind == KIND_INT4 ? width / 2 : width * kind_size((int)side->kind);
}

/* Attention of `count` rows to the keys `start` to `stop`, left unfinished in the scratch: sums and unscaled output. */
OUTLINE void attend(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first, int64_t count,
                   int64_t start, int64_t stop, Scratch *scratch) {
    int64_t key_bytes = row_bytes(&a->key, a->width), value_bytes = row_bytes(&a->value, a->width);
    int64_t begin = start;
    prepare_rows(a, plan, b, g, first, count, scratch);
    if (start < scratch->rows[0].front) start = scratch->rows[0].front / plan->align * plan->align;
    if (start < begin) start = begin;
    if (stop > scratch->rows[count - 1].limit) stop = scratch->rows[count - 1].limit;
    for (int64_t j = 0; j < KEY_BLOCK; j++) {
        scratch->key_scale[j] = scratch->value_scale[j] = 1.0f;
        scratch->key_zero[j] = scratch->value_zero[j] = 0.0f;
    }
    for (; start < stop; start += KEY_BLOCK) {
        int64_t keys = stop - start < KEY_BLOCK ? stop - start : KEY_BLOCK;
        Rows key = rows_at(&a->key, b, g, start, a->width), value = rows_at(&a->value, b, g, start, a->width);
        Rows next_key = {key.data + keys * key.stride, key.stride, key_bytes};
        load_tokens(&plan->key_scale, b, g, start, keys, scratch->key_scale);
        load_tokens(&plan->key_zero, b, g, start, keys, scratch->key_zero);
        load_tokens(&plan->value_scale, b, g, start, keys, scratch->value_scale);
        load_tokens(&plan->value_zero, b, g, start, keys, scratch->value_zero);
        block_scores(a, plan, key, (Rows){value.data, value.stride, value_bytes}, b, g, count, start, keys, scratch);
        if (a->position.query) position_scores(a, plan, b, count, start, keys, scratch);
        soften_rows(a, plan, b, g, first, count, start, keys, scratch);
        block_output(a, plan, value, next_key, b, g, count, start, keys, scratch);
    }
}

/* A row's finished output and log-sum-exp, from sums and unscaled output. */
OUTLINE void finish_row(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t m, const Row *row,
                       const float *output) {
    const Part *scale = plan->value_scale.data && !plan->value_scale.per_token ? &plan->value_scale : NULL;
    const Part *zero = plan->value_zero.data && !plan->value_zero.per_token ? &plan->value_zero : NULL;
    int64_t query = m / plan->ratio, head = g * plan->ratio + m % plan->ratio;
    int64_t scale_start = scale ? part_start(scale, b, g, 0) : 0, zero_start = zero ? part_start(zero, b, g, 0) : 0;
    float *to = (float *)a->output + ((b * a->queries + query) * a->heads + head) * a->width;
    float inverse = row->total == 0.0f ? 0.0f : 1.0f / row->total;
    for (int64_t d = 0; d < a->width; d++) {
        float x = output[d < a->width / 2 ? d : d + plan->high_shift] - row->zeros;
        if (zero) x -= row->weighted * part_value(zero, zero_start + d / zero->span * zero->stride[3]);
        if (scale) x *= part_value(scale, scale_start + d / scale->span * scale->stride[3]);
        to[d] = x * inverse;
    }
    if (a->lse) { /* of no key -inf, since the logarithm of 0 is */
        double bits = (double)row->best + log2((double)row->total) + row->offset;
        ((float *)a->lse)[(b * a->heads + head) * a->queries + query] = (float)(bits * 0.6931471805599453);
    }
}

/* The chunks of one row become one. `rows` and `outputs` are those of the first chunk, the next lie `rows_step` and
 * `outputs_step` further. */
OUTLINE void merge_row(const Plan *plan, Row *rows, float *outputs, int64_t rows_step, int64_t outputs_step) {
    float best = -INFINITY;
    for (int64_t c = 0; c < plan->chunks; c++) best = rows[c * rows_step].best > best ? rows[c * rows_step].best : best;
    Row merged = {.best = best, .offset = rows->offset};
    float shift = best == -INFINITY ? 0.0f : best;
    for (int64_t c = 0; c < plan->chunks; c++) {
        Row row = rows[c * rows_step];
        float fade = exp2_of_one(row.best - shift);
        merged.total += row.total * fade;
        merged.weighted += row.weighted * fade;
        merged.zeros += row.zeros * fade;
        for (int64_t d = 0; d < plan->padded; d++)
            outputs[d] = (c ? outputs[d] : 0.0f) + outputs[c * outputs_step + d] * fade;
    }
    rows[0] = merged;
}

/* Whether a scale or zero varies along tokens and channels, so that it must be applied to each code. */
static int is_grouped(const Side *side, int64_t width) {
    return (side->scale.per_token && side->scale.span < width) || (side->zero.per_token && side->zero.span < width);
}

/* Whether each row of a part is that of whole steps of tokens. */
static int is_stepped(const Part *part) { return !part->per_token || part->group % GROUP_STEP == 0; }

/* Channels that share scale and zero, if they are a multiple of GROUP_STEP and the halves of rows of int4 are whole
 * groups; else 0. */
static int64_t span_of(const Side *side, int64_t width) {
    int64_t scale = side->scale.data ? side->scale.span : width, zero = side->zero.data ? side->zero.span : width;
    int64_t span = scale < zero ? scale : zero, row = side->kind == KIND_INT4 ? width / 2 : width;
    return span % GROUP_STEP == 0 && row % span == 0 && scale % span == 0 && zero % span == 0 ? span : 0;
}

static int is_whole(const Side *side) { return HAS_INTEGER && (side->kind == KIND_INT8 || side->kind == KIND_INT4); }

/* How the scales and zeros of one side vary, as far as a kernel makes use of it. */
static int groups_of(const Side *side, int is_key, int64_t width, int64_t rows) {
    if (!is_grouped(side, width)) return GROUPS_NONE;
    if (rows > (is_whole(side) ? GROUPED_ROWS : DIRECT_ROWS)) return GROUPS_BOTH;
    if (is_key && is_stepped(&side->scale) && is_stepped(&side->zero)) return GROUPS_TOKENS;
    return is_whole(side) && span_of(side, width) ? GROUPS_CHANNELS : GROUPS_BOTH;
}

/* How one side is multiplied. */
static int mode_of(const Side *side, int groups, int64_t width, int64_t rows) {
    if (is_whole(side) && groups != GROUPS_BOTH) return MODE_INTEGER;
    if (rows > DIRECT_ROWS) return MODE_TILE;
    return groups == GROUPS_BOTH || width % (side->kind == KIND_INT4 ? 2 * LANES : LANES) ? MODE_DECODED : MODE_DIRECT;
}

static Plan plan_of(const AttentionArguments *a) {
    Plan plan = {.ratio = a->heads / a->groups, .begin = a->keys, .query_unit = 1.0f, .weight_unit = 1.0f};
    plan.rows = plan.ratio * a->queries;
    plan.padded = round_up(a->width, PANEL), plan.position_padded = round_up(a->position.width, LANES);
    plan.factor = (float)(a->scaling * 1.4426950408889634);
    plan.key_groups = groups_of(&a->key, 1, a->width, plan.rows);
    plan.value_groups = groups_of(&a->value, 0, a->width, plan.rows);
    plan.key_mode = mode_of(&a->key, plan.key_groups, a->width, plan.rows);
    plan.value_mode = mode_of(&a->value, plan.value_groups, a->width, plan.rows);
    if (plan.key_groups == GROUPS_CHANNELS) plan.key_span = span_of(&a->key, a->width);
    if (plan.value_groups == GROUPS_CHANNELS) plan.value_span = span_of(&a->value, a->width);
    plan.align = plan.key_groups == GROUPS_TOKENS ? GROUP_STEP : 1;
    if (!plan.key_groups) plan.key_scale = a->key.scale, plan.key_zero = a->key.zero;
    if (!plan.value_groups) plan.value_scale = a->value.scale, plan.value_zero = a->value.zero;
    int per_channel = plan.key_scale.data && !plan.key_scale.per_token && plan.key_scale.span < a->width;
    plan.query_digits = a->query_scale && !per_channel && !plan.key_groups ? 1 : DIGITS;
    if (a->key.kind == KIND_FLOAT8_E4M3 && plan.key_mode == MODE_DIRECT) plan.query_unit = E4M3_UNIT;
    if (a->value.kind == KIND_FLOAT8_E4M3 && plan.value_mode == MODE_DIRECT) plan.weight_unit = E4M3_UNIT;
    if (a->value.kind == KIND_INT4 && plan.value_mode == MODE_INTEGER)
        plan.high_shift = round_up(a->width / 2, 16) - a->width / 2;
    for (int64_t b = 0; b < a->batch; b++) {
        Range first = keys_of(a, b, 0), last = keys_of(a, b, a->queries - 1);
        plan.begin = first.from < plan.begin ? first.from : plan.begin;
        plan.end = last.to > plan.end ? last.to : plan.end;
    }
    plan.begin = plan.begin / plan.align * plan.align;
    int64_t keys = plan.end > plan.begin ? plan.end - plan.begin : 0;
    plan.blocks = (plan.rows + MAX_ROWS - 1) / MAX_ROWS;
    plan.block_rows = round_up((plan.rows + plan.blocks - 1) / plan.blocks, ROW_STEP);
    int64_t tasks = a->batch * a->groups * plan.blocks;
    int64_t wanted = (8 * a->threads + tasks - 1) / tasks, most = (keys + MIN_CHUNK - 1) / MIN_CHUNK;
    plan.chunks = a->threads == 1 ? 1 : wanted < most ? wanted : most;
    plan.chunks = plan.chunks < 1 ? 1 : plan.chunks;
    plan.chunk = round_up((keys + plan.chunks - 1) / plan.chunks, KEY_BLOCK);
    plan.chunks = plan.chunk ? (keys + plan.chunk - 1) / plan.chunk : 1;
    return plan;
}

/* Floats of the tile that a mode decodes or interleaves into. */
static size_t tile_size(int mode, size_t padded) {
    return mode == MODE_DIRECT ? 0 : mode == MODE_INTEGER ? TILE_COLUMNS * padded / 4 : KEY_BLOCK * padded;
}

static Scratch *new_scratch(const Plan *plan) {
    size_t rows = (size_t)plan->block_rows, padded = (size_t)plan->padded;
    size_t key_tile = tile_size(plan->key_mode, padded), value_tile = tile_size(plan->value_mode, padded);
    size_t panels = plan->key_mode == MODE_TILE ? KEY_BLOCK * padded : 0;
    size_t position_padded = (size_t)plan->position_padded, position_tile = KEY_BLOCK * position_padded;
    if (key_tile < position_tile) key_tile = position_tile;
    if (plan->rows > DIRECT_ROWS && panels < position_tile) panels = position_tile;
    size_t position_rows = position_padded ? rows * (position_padded + KEY_BLOCK) : 0;
    size_t folded = plan->key_groups == GROUPS_TOKENS ? rows * padded : 0;
    size_t splits = plan->key_span || plan->value_span ? padded / GROUP_STEP : 0;
    size_t floats = 2 * rows * padded + folded + rows * KEY_BLOCK + key_tile + value_tile + panels +
                    2 * (padded + LANES) + position_rows +
                    splits * (3 * KEY_BLOCK + rows * sizeof(Digits) / sizeof(float));
    char *memory = malloc(sizeof(Scratch) + sizeof(float) * floats + 64);
    if (!memory) return NULL;
    Scratch *scratch = (Scratch *)memory;
    scratch->q = (float *)(((uintptr_t)memory + sizeof(Scratch) + 63) & ~(uintptr_t)63);
    scratch->folded = scratch->q + rows * padded;
    scratch->output = scratch->folded + folded;
    scratch->scores = scratch->output + rows * padded;
    scratch->keys = scratch->scores + rows * KEY_BLOCK;
    scratch->values = scratch->keys + key_tile;
    scratch->panels = scratch->values + value_tile;
    scratch->channel_scale = scratch->panels + panels;
    scratch->channel_zero = scratch->channel_scale + padded + LANES;
    scratch->position_q = scratch->channel_zero + padded + LANES;
    scratch->positions = scratch->position_q + rows * position_padded;
    scratch->split_scale = scratch->position_q + position_rows;
    scratch->split_zero = scratch->split_scale + splits * KEY_BLOCK;
    scratch->split_raw = scratch->split_zero + splits * KEY_BLOCK;
    scratch->split_digits = (Digits *)(scratch->split_raw + splits * KEY_BLOCK);
    memset(scratch->channel_scale, 0, sizeof(float) * 2 * (padded + LANES)); /* padding that is multiplied too */
    return scratch;
}

/* Returns 0, or 1 if there is not enough memory, or 2 if there is nothing to do or the arguments do not go together. */
EXPORT int attention(const PackedAttentionCall *packed) {
    if (!goes_together(&packed->call)) return 2;
    const AttentionArguments arguments = arguments_of(packed), *a = &arguments;
    Plan plan = plan_of(a);
    int64_t pairs = a->batch * a->groups, tasks = pairs * plan.blocks * plan.chunks, rows = pairs * plan.rows;
    Row *part_rows = NULL;
    float *part_outputs = NULL;
    int failed = 0;
    if (plan.chunks > 1) {
        part_rows = malloc(sizeof(Row) * (size_t)(rows * plan.chunks));
        part_outputs = malloc(sizeof(float) * (size_t)(rows * plan.chunks * plan.padded));
        failed = !part_rows || !part_outputs;
    }
    if (!failed) {
#pragma omp parallel num_threads((int)a->threads) if (a->threads > 1)
        {
            Scratch *scratch = new_scratch(&plan);
            if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; task++) {
                int64_t pair = task % pairs, c = task / pairs % plan.chunks;
                int64_t first = (plan.blocks - 1 - task / pairs / plan.chunks) * plan.block_rows; /* longest first */
                int64_t count = plan.rows - first < plan.block_rows ? plan.rows - first : plan.block_rows;
                int64_t start = plan.begin + c * plan.chunk;
                int64_t stop = start + plan.chunk < plan.end ? start + plan.chunk : plan.end;
                if (!scratch || count <= 0) continue;
                attend(a, &plan, pair / a->groups, pair % a->groups, first, count, start, stop, scratch);
                for (int64_t m = 0; m < count; m++) {
                    const float *output = scratch->output + m * plan.padded;
                    int64_t at = c * rows + pair * plan.rows + first + m;
                    if (plan.chunks == 1) {
                        finish_row(a, &plan, pair / a->groups, pair % a->groups, first + m, &scratch->rows[m], output);
                        continue;
                    }
                    part_rows[at] = scratch->rows[m];
                    memcpy(part_outputs + at * plan.padded, output, sizeof(float) * (size_t)plan.padded);
                }
            }
            if (plan.chunks > 1) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows; row++) {
                    int64_t pair = row / plan.rows;
                    float *output = part_outputs + row * plan.padded;
                    merge_row(&plan, part_rows + row, output, rows, rows * plan.padded);
                    finish_row(a, &plan, pair / a->groups, pair % a->groups, row % plan.rows, part_rows + row, output);
                }
            }
            free(scratch);
        }
    }
    free(part_rows);
    free(part_outputs);
    return failed;
}
