/* attention: softmax(q k^T) v over stored codes; README.md has the semantics and the folds.
 *
 * Rows are (query, head) pairs of one KV head: row m is query m / R of head g R + m % R, with R = H / G, so that all
 * that read the same codes stand together. A task is a block of rows over a chunk of keys; it runs a softmax block by
 * block of keys, and a second pass merges the chunks. */

enum { KEY_BLOCK = 96, MAX_ROWS = 192, DIRECT_ROWS = 8, MIN_CHUNK = 512 };
enum { MASK_NONE = 0, MASK_BOOL = 1, MASK_FLOAT = 2 };

/* A scale or a zero point: 0 if there is none; `per_token` if it varies along the keys, and then not the channels. */
typedef struct {
    int64_t data, per_token, stride[4];
} Part;

typedef struct {
    int64_t query, key, value, output, query_scale, mask;
    int64_t batch, heads, queries, width, groups, keys;
    int64_t key_kind, value_kind, mask_kind, causal, threads;
    int64_t query_stride[3], key_stride[3], value_stride[3], mask_stride[4];
    Part key_scale, key_zero, value_scale, value_zero;
    double scaling;
} AttentionArguments;

/* How the work is cut: constant over a call. */
typedef struct {
    int64_t ratio, rows, block_rows, blocks, chunk, chunks, padded;
    int direct;
} Plan;

/* What a row carries through the blocks of keys. Scores are in units of log2. */
typedef struct {
    float factor;   /* of the products q . code: scaling, and all scales that do not vary along keys or channels */
    float constant; /* sum of q * key_zero, where a per-token scale keeps it from cancelling */
    float q_sum;    /* sum of q, for per-token zeros of K */
    float best, total;
    float weighted; /* sum of weights * value_scale, where that is per token */
    float zeros;    /* sum of weights * value_scale * value_zero, where the zero is per token */
    int64_t limit;  /* keys that the row sees, for a causal call */
} Row;

typedef struct {
    float *q, *scores, *keys, *values, *output;
    float key_scale[KEY_BLOCK], key_zero[KEY_BLOCK], value_scale[KEY_BLOCK], value_zero[KEY_BLOCK], bias[KEY_BLOCK];
    Row rows[MAX_ROWS];
} Scratch;

INLINE const float *part_at(const Part *part, int64_t b, int64_t g) {
    return (const float *)part->data + b * part->stride[0] + g * part->stride[1];
}

/* Per-token values of one block of keys, zeros behind the last; nothing if the part does not vary along the keys. */
static void load_tokens(const Part *part, int64_t b, int64_t g, int64_t start, int64_t keys, float *to) {
    if (!part->per_token) return;
    const float *from = part_at(part, b, g);
    for (int64_t j = 0; j < KEY_BLOCK; j++) to[j] = j < keys ? from[(start + j) * part->stride[2]] : 0.0f;
}

/* Rows `first` to `first + count` with every scale of K folded in that can be; zero-padded to `padded` columns. */
static void prepare_rows(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first,
                         int64_t count, Scratch *scratch) {
    const float *scale = a->key_scale.data && !a->key_scale.per_token ? part_at(&a->key_scale, b, g) : NULL;
    const float *zero = a->key_zero.data && !a->key_zero.per_token ? part_at(&a->key_zero, b, g) : NULL;
    int64_t scale_step = a->key_scale.stride[3], zero_step = a->key_zero.stride[3], padded = plan->padded;
    memset(scratch->q, 0, sizeof(float) * (size_t)(padded * ((count + ROW_STEP - 1) / ROW_STEP * ROW_STEP)));
    memset(scratch->output, 0, sizeof(float) * (size_t)(padded * ((count + ROW_STEP - 1) / ROW_STEP * ROW_STEP)));
    for (int64_t m = 0; m < count; m++) {
        int64_t query = (first + m) / plan->ratio, head = g * plan->ratio + (first + m) % plan->ratio;
        const float *from = (const float *)a->query + b * a->query_stride[0] + head * a->query_stride[1] +
                            query * a->query_stride[2];
        float *q = scratch->q + m * padded;
        Row row = {.best = -INFINITY, .factor = (float)(a->scaling * 1.4426950408889634), .limit = a->keys};
        if (a->query_scale) {
            float step = ((const float *)a->query_scale)[head];
            row.factor *= step;
            for (int64_t d = 0; d < a->width; d++) q[d] = round_to_code(splat(from[d] / step))[0];
        } else {
            memcpy(q, from, sizeof(float) * (size_t)a->width);
        }
        if (scale && scale_step)
            for (int64_t d = 0; d < a->width; d++) q[d] *= scale[d * scale_step];
        else if (scale)
            row.factor *= *scale; /* the products of quantized q and K stay whole numbers */
        for (int64_t d = 0; d < a->width; d++) {
            row.q_sum += q[d];
            if (zero && a->key_scale.per_token) row.constant += q[d] * zero[d * zero_step];
        }
        if (a->causal && !a->mask) {
            row.limit = a->keys - a->queries + query + 1;
            row.limit = row.limit < 0 ? 0 : row.limit;
        }
        scratch->rows[m] = row;
    }
}

/* Additive mask of one row and block of keys, in units of log2. */
static void load_bias(const AttentionArguments *a, int64_t b, int64_t head, int64_t query, int64_t start, int64_t keys,
                      float *bias) {
    int64_t at = b * a->mask_stride[0] + head * a->mask_stride[1] + query * a->mask_stride[2], step = a->mask_stride[3];
    if (a->mask_kind == MASK_BOOL) {
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

/* One row's products of a block of keys become weights; the row's sums and its output so far are brought up to date. */
INLINE void soften_row(const AttentionArguments *a, Row *row, float *scores, int64_t keys, int64_t columns,
                       const Scratch *scratch, const float *bias, float *output, int64_t padded) {
    f32x8 largest = splat(-INFINITY), factor = splat(row->factor);
    __typeof__(largest <= factor) sound = largest <= largest; /* all true, until a score is NaN or +inf */
    int tokens = a->key_scale.per_token || a->key_zero.per_token;
    for (int64_t j = 0; j < columns; j += 8) {
        f32x8 s = load_f32(scores + j) * factor;
        if (tokens) {
            f32x8 off = splat(row->constant) + load_f32(scratch->key_zero + j) * splat(row->q_sum);
            s = (load_f32(scores + j) - off) * factor * load_f32(scratch->key_scale + j);
        }
        if (bias) s += load_f32(bias + j);
        if (j + 8 > keys)
            for (int64_t i = keys > j ? keys - j : 0; i < 8; i++) s[i] = -INFINITY;
        largest = max_f32(largest, s);
        sound &= s <= splat(FLT_MAX);
        store_f32(scores + j, s);
    }
    float best = max_of(largest) > row->best ? max_of(largest) : row->best;
    float shift = best == -INFINITY ? 0.0f : best, fade = exp2_of(splat(row->best - shift))[0];
    f32x8 total = splat(0.0f), weighted = splat(0.0f), zeros = splat(0.0f);
    int scaled = a->value_scale.per_token || a->value_zero.per_token;
    for (int64_t j = 0; j < columns; j += 8) {
        f32x8 weight = exp2_of(load_f32(scores + j) - splat(shift));
        total += weight;
        if (scaled) {
            weight *= load_f32(scratch->value_scale + j);
            weighted += weight;
            zeros += weight * load_f32(scratch->value_zero + j);
        }
        store_f32(scores + j, weight);
    }
    row->total = row->total * fade + sum_of(total);
    for (int i = 0; i < 8; i++)
        if (!sound[i]) row->total = NAN; /* max and exp2 would hide it */
    row->weighted = row->weighted * fade + sum_of(scaled ? weighted : total);
    row->zeros = row->zeros * fade + sum_of(zeros);
    if (best != row->best)
        for (int64_t d = 0; d < padded; d += 8) store_f32(output + d, load_f32(output + d) * splat(fade));
    row->best = best;
}

/* Keys of a block that any of the rows m to m + ROW_STEP sees: such a group multiplies no more than these. */
static int64_t seen_by(const Scratch *scratch, int64_t m, int64_t count, int64_t start, int64_t keys) {
    int64_t last = m + ROW_STEP - 1 < count ? m + ROW_STEP - 1 : count - 1; /* later rows see more */
    int64_t seen = scratch->rows[last].limit - start;
    return seen < 0 ? 0 : seen > keys ? keys : seen;
}

static void tile_scores(const Scratch *scratch, int64_t count, int64_t start, int64_t keys, int64_t width,
                        int64_t padded) {
    for (int64_t j = 0; j < keys; j += PANEL)
        for (int64_t m = 0; m < count; m += ROW_STEP)
            if (j < seen_by(scratch, m, count, start, keys))
                gemm_rows(scratch->q + m * padded, padded, scratch->keys + j * padded, width,
                          scratch->scores + m * KEY_BLOCK + j, KEY_BLOCK, 0);
}

static void tile_output(const Scratch *scratch, int64_t count, int64_t start, int64_t keys, int64_t padded) {
    for (int64_t d = 0; d < padded; d += PANEL)
        for (int64_t m = 0; m < count; m += ROW_STEP) {
            int64_t seen = seen_by(scratch, m, count, start, keys);
            if (seen)
                gemm_rows(scratch->scores + m * KEY_BLOCK, KEY_BLOCK, scratch->values + d * KEY_BLOCK, seen,
                          scratch->output + m * padded + d, padded, 1);
        }
}

/* Attention of `count` rows to the keys `start` to `stop`, left unfinished in the scratch: sums and unscaled output. */
INLINE void attend(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first, int64_t count,
                   int64_t start, int64_t stop, Scratch *scratch, int key_kind, int value_kind) {
    const char *key = (const char *)a->key + (b * a->key_stride[0] + g * a->key_stride[1]) * kind_size(key_kind);
    const char *value =
        (const char *)a->value + (b * a->value_stride[0] + g * a->value_stride[1]) * kind_size(value_kind);
    int64_t padded = plan->padded, key_step = a->key_stride[2], value_step = a->value_stride[2];
    prepare_rows(a, plan, b, g, first, count, scratch);
    if (stop > scratch->rows[count - 1].limit) stop = scratch->rows[count - 1].limit;
    for (int64_t j = 0; j < KEY_BLOCK; j++) {
        scratch->key_scale[j] = scratch->value_scale[j] = 1.0f;
        scratch->key_zero[j] = scratch->value_zero[j] = 0.0f;
    }
    for (; start < stop; start += KEY_BLOCK) {
        int64_t keys = stop - start < KEY_BLOCK ? stop - start : KEY_BLOCK;
        const char *k = key + start * key_step * kind_size(key_kind);
        const char *v = value + start * value_step * kind_size(value_kind);
        load_tokens(&a->key_scale, b, g, start, keys, scratch->key_scale);
        load_tokens(&a->key_zero, b, g, start, keys, scratch->key_zero);
        load_tokens(&a->value_scale, b, g, start, keys, scratch->value_scale);
        load_tokens(&a->value_zero, b, g, start, keys, scratch->value_zero);
        if (plan->direct) {
            direct_scores(scratch->q, count, padded, k, key_step, keys, scratch->scores, KEY_BLOCK, v,
                          value_step * kind_size(value_kind), key_kind);
        } else {
            decode_keys(k, key_step, keys, a->width, padded, scratch->keys, key_kind);
            decode_values(v, value_step, keys, a->width, padded, KEY_BLOCK, scratch->values, value_kind);
            tile_scores(scratch, count, start, keys, a->width, padded);
        }
        for (int64_t m = 0; m < count; m++) {
            Row *row = &scratch->rows[m];
            int64_t seen = row->limit - start, query = (first + m) / plan->ratio;
            seen = seen < 0 ? 0 : seen > keys ? keys : seen;
            int64_t computed = plan->direct ? keys : seen_by(scratch, m / ROW_STEP * ROW_STEP, count, start, keys);
            if (!computed) continue;
            if (a->mask)
                load_bias(a, b, g * plan->ratio + (first + m) % plan->ratio, query, start, keys, scratch->bias);
            soften_row(a, row, scratch->scores + m * KEY_BLOCK, seen, (computed + 7) / 8 * 8, scratch,
                       a->mask ? scratch->bias : NULL, scratch->output + m * padded, padded);
        }
        if (plan->direct)
            direct_output(scratch->scores, count, KEY_BLOCK, v, value_step, keys, scratch->output, padded, value_kind);
        else
            tile_output(scratch, count, start, keys, padded);
    }
}

/* One copy of the loops for each pair of element types that caches hold; others read K and V of the same type. */
static void attend_any(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first,
                       int64_t count, int64_t start, int64_t stop, Scratch *scratch) {
    switch (a->key_kind * 4 + a->value_kind) {
    case KIND_INT8 * 4 + KIND_INT8:
        attend(a, plan, b, g, first, count, start, stop, scratch, KIND_INT8, KIND_INT8);
        break;
    case KIND_FLOAT32 * 4 + KIND_FLOAT32:
        attend(a, plan, b, g, first, count, start, stop, scratch, KIND_FLOAT32, KIND_FLOAT32);
        break;
    case KIND_BFLOAT16 * 4 + KIND_BFLOAT16:
        attend(a, plan, b, g, first, count, start, stop, scratch, KIND_BFLOAT16, KIND_BFLOAT16);
        break;
    default: attend(a, plan, b, g, first, count, start, stop, scratch, (int)a->key_kind, (int)a->value_kind);
    }
}

/* The rows' finished output, from sums and unscaled output. */
static void finish_row(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t m, const Row *row,
                       const float *output) {
    const float *scale = a->value_scale.data && !a->value_scale.per_token ? part_at(&a->value_scale, b, g) : NULL;
    const float *zero = a->value_zero.data && !a->value_zero.per_token ? part_at(&a->value_zero, b, g) : NULL;
    int64_t query = m / plan->ratio, head = g * plan->ratio + m % plan->ratio;
    float *to = (float *)a->output + ((b * a->queries + query) * a->heads + head) * a->width;
    float inverse = row->total == 0.0f ? 0.0f : 1.0f / row->total;
    for (int64_t d = 0; d < a->width; d++) {
        float x = output[d] - row->zeros;
        if (zero) x -= row->weighted * zero[d * a->value_zero.stride[3]];
        if (scale) x *= scale[d * a->value_scale.stride[3]];
        to[d] = x * inverse;
    }
}

/* The chunks of one row become one. `rows` and `outputs` are those of the first chunk, the next lie `rows_step` and
 * `outputs_step` further. */
static void merge_row(const Plan *plan, Row *rows, float *outputs, int64_t rows_step, int64_t outputs_step) {
    float best = -INFINITY;
    for (int64_t c = 0; c < plan->chunks; c++) best = rows[c * rows_step].best > best ? rows[c * rows_step].best : best;
    Row merged = {.best = best};
    float shift = best == -INFINITY ? 0.0f : best;
    for (int64_t c = 0; c < plan->chunks; c++) {
        Row row = rows[c * rows_step];
        float fade = exp2_of(splat(row.best - shift))[0];
        merged.total += row.total * fade;
        merged.weighted += row.weighted * fade;
        merged.zeros += row.zeros * fade;
        for (int64_t d = 0; d < plan->padded; d++)
            outputs[d] = (c ? outputs[d] : 0.0f) + outputs[c * outputs_step + d] * fade;
    }
    rows[0] = merged;
}

static Plan plan_of(const AttentionArguments *a) {
    Plan plan = {.ratio = a->heads / a->groups};
    plan.rows = plan.ratio * a->queries;
    plan.padded = (a->width + PANEL - 1) / PANEL * PANEL;
    plan.direct = plan.rows <= DIRECT_ROWS && plan.padded == a->width;
    plan.blocks = (plan.rows + MAX_ROWS - 1) / MAX_ROWS;
    plan.block_rows = ((plan.rows + plan.blocks - 1) / plan.blocks + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    int64_t tasks = a->batch * a->groups * plan.blocks;
    int64_t wanted = (8 * a->threads + tasks - 1) / tasks, most = (a->keys + MIN_CHUNK - 1) / MIN_CHUNK;
    plan.chunks = a->threads == 1 ? 1 : wanted < most ? wanted : most;
    plan.chunks = plan.chunks < 1 ? 1 : plan.chunks;
    plan.chunk = ((a->keys + plan.chunks - 1) / plan.chunks + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    plan.chunks = plan.chunk ? (a->keys + plan.chunk - 1) / plan.chunk : 1;
    return plan;
}

static Scratch *new_scratch(const Plan *plan) {
    size_t rows = (size_t)plan->block_rows, padded = (size_t)plan->padded;
    size_t tiles = plan->direct ? 0 : KEY_BLOCK * padded;
    size_t floats = 2 * rows * padded + rows * KEY_BLOCK + 2 * tiles;
    char *memory = malloc(sizeof(Scratch) + sizeof(float) * floats + 64);
    if (!memory) return NULL;
    Scratch *scratch = (Scratch *)memory;
    scratch->q = (float *)(((uintptr_t)memory + sizeof(Scratch) + 63) & ~(uintptr_t)63);
    scratch->output = scratch->q + rows * padded;
    scratch->scores = scratch->output + rows * padded;
    scratch->keys = scratch->scores + rows * KEY_BLOCK;
    scratch->values = scratch->keys + tiles;
    return scratch;
}

/* Returns 0, or 1 if there is not enough memory. */
EXPORT int attention(const AttentionArguments *a) {
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
                int64_t start = c * plan.chunk, stop = start + plan.chunk < a->keys ? start + plan.chunk : a->keys;
                if (!scratch || count <= 0) continue;
                attend_any(a, &plan, pair / a->groups, pair % a->groups, first, count, start, stop, scratch);
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
