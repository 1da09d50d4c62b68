/* attention: softmax(q k^T) v over stored codes; README.md has the semantics and the folds.
 *
 * Rows are (query, head) pairs of one KV head: row m is query m / R of head g R + m % R, with R = H / G, so that all
 * that read the same codes stand together. A task is a block of rows over a chunk of keys; it runs a softmax block by
 * block of keys, and a second pass merges the chunks. */

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
