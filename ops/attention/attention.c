/* attention: softmax(q k^T) v over stored codes; README.md has the semantics and the folds.
 *
 * Rows are (query, head) pairs of one KV head: row m is query m / R of head g R + m % R, with R = H / G, so that all
 * that read the same codes stand together. A task is a block of rows over a chunk of keys; it runs a softmax block by
 * block of keys, and a second pass merges the chunks. */

/* The rows of one sequence and KV head from one token on; bytes of a row in `bytes`. */
static Rows rows_at(const Side *side, int64_t b, int64_t g, int64_t token, int64_t width) {
    int64_t size = side->bits ? 1 : kind_size((int)side->kind);
    int64_t at = b * side->stride[0] + g * side->stride[1] + token * side->stride[2];
    return (Rows){(const char *)side->data + at * size, side->stride[2] * size, width};
}

static int64_t row_bytes(const Side *side, int64_t width) {
    if (side->bits) return width * side->bits / 8;
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
        Rows this_value = {value.data, value.stride, value_bytes};
        key = unpacked_rows(&a->key, key, keys, scratch->unpacked_keys);
        load_tokens(&plan->key_scale, b, g, start, keys, scratch->key_scale);
        load_tokens(&plan->key_zero, b, g, start, keys, scratch->key_zero);
        load_tokens(&plan->value_scale, b, g, start, keys, scratch->value_scale);
        load_tokens(&plan->value_zero, b, g, start, keys, scratch->value_zero);
#if HAS_INTEGER
        if (plan->wide) {
            value = unpacked_rows(&a->value, value, keys, scratch->unpacked_values);
            wide_block(a, plan, key, value, b, g, first, count, start, keys, scratch);
            continue;
        }
#endif
        block_scores(a, plan, key, this_value, b, g, count, start, keys, scratch);
        if (a->position.query) position_scores(a, plan, b, count, start, keys, scratch);
        soften_rows(a, plan, b, g, first, count, start, keys, scratch);
        value = unpacked_rows(&a->value, value, keys, scratch->unpacked_values);
        block_output(a, plan, value, next_key, b, g, count, start, keys, scratch);
    }
}

/* x[d] -= factor * part, or x[d] *= part where `factor` is NULL, for a part that does not vary along the tokens. */
static void apply_channels(const Part *part, int64_t b, int64_t g, int64_t width, const float *factor, float *x) {
    int64_t start = part_start(part, b, g, 0), step = part->stride[3];
    if (part->span == 1 && step == 1 && part->kind == KIND_FLOAT32) {
        const float *values = (const float *)part->data + start;
        for (int64_t d = 0; d < width; d++) x[d] = factor ? x[d] - *factor * values[d] : x[d] * values[d];
        return;
    }
    for (int64_t d = 0; d < width; d += part->span, start += step) {
        float value = part_value(part, start);
        for (int64_t i = d; i < d + part->span; i++) x[i] = factor ? x[i] - *factor * value : x[i] * value;
    }
}

/* A row's sum of weighted values, from its sums and unscaled output; `to` may be where `output` is. */
OUTLINE void settle_row(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, const Row *row,
                       const float *output, float *to) {
    int64_t half = plan->high_shift ? a->width / 2 : a->width;
    float zeros = row->zeros, weighted = row->weighted;
    for (int64_t d = 0; d < half; d++) to[d] = output[d] - zeros;
    for (int64_t d = half; d < a->width; d++) to[d] = output[d + plan->high_shift] - zeros;
    if (plan->value_zero.data && !plan->value_zero.per_token)
        apply_channels(&plan->value_zero, b, g, a->width, &weighted, to);
    if (plan->value_scale.data && !plan->value_scale.per_token)
        apply_channels(&plan->value_scale, b, g, a->width, NULL, to);
}

/* A row's finished output and log-sum-exp, from sums and unscaled output. */
OUTLINE void finish_row(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t m, const Row *row,
                       const float *output) {
    int64_t query = m / plan->ratio, head = g * plan->ratio + m % plan->ratio;
    float *to = (float *)a->output + ((b * a->queries + query) * a->heads + head) * a->width;
    float inverse = row->total == 0.0f ? 0.0f : 1.0f / row->total;
    settle_row(a, plan, b, g, row, output, to);
    for (int64_t d = 0; d < a->width; d++) to[d] *= inverse;
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

/* What the threads of a region share of a call: how it is cut, and, where keys are cut in chunks, what each leaves. Of
 * several `pieces`, `plan` is of settled rows. */
typedef struct {
    AttentionArguments arguments;
    Plan plan;
    Piece *pieces; /* NULL if `arguments` are all */
    int64_t num_pieces;
    size_t scratch_floats, gathered_floats;
    int64_t pairs, tasks, rows;
    Row *part_rows;
    float *part_outputs;
    atomic_int failed; /* whichever thread finds no memory */
} Attention;

/* Before the region. What it leaves in `failed` is 1 if there is not enough memory. */
static Attention begin_attention(const AttentionArguments *arguments) {
    Attention all = {.arguments = *arguments, .plan = plan_of(arguments)};
    const Plan *plan = &all.plan;
#if HAS_INTEGER
    widen_plan(&all.arguments, &all.plan);
#endif
    all.scratch_floats = lay_out(NULL, plan, 0);
    all.pairs = arguments->batch * arguments->groups, all.rows = all.pairs * plan->rows;
    all.tasks = all.pairs * plan->blocks * plan->chunks;
    if (plan->chunks > 1) {
        all.part_rows = malloc(sizeof(Row) * (size_t)(all.rows * plan->chunks));
        all.part_outputs = malloc(sizeof(float) * (size_t)(all.rows * plan->chunks * plan->padded));
        all.failed = !all.part_rows || !all.part_outputs;
    }
    return all;
}

/* begin_attention of keys that lie in pieces. */
static Attention begin_pieces(const AttentionArguments *arguments, const Piece *pieces, int64_t count) {
    AttentionArguments whole = *arguments;
    whole.key = whole.value = (Side){.kind = KIND_FLOAT32}; /* what settled rows are made of */
    Attention all = begin_attention(&whole);
    all.pieces = malloc(sizeof(Piece) * (size_t)count), all.num_pieces = count;
    all.gathered_floats = (size_t)(all.plan.block_rows * all.plan.padded);
    all.scratch_floats += all.gathered_floats;
    if (!all.pieces) all.failed = 1;
    for (int64_t i = 0; i < count && all.pieces; i++) {
        all.pieces[i] = pieces[i];
#if HAS_INTEGER
        widen_plan(&all.pieces[i].arguments, &all.pieces[i].plan);
#endif
        size_t floats = lay_out(NULL, &all.pieces[i].plan, all.gathered_floats);
        if (floats > all.scratch_floats) all.scratch_floats = floats;
    }
    return all;
}

static void end_attention(Attention *all) {
    free(all->pieces);
    free(all->part_rows);
    free(all->part_outputs);
}

/* Attention of rows to chunk `c`, piece by piece, gathered. */
static void attend_pieces(const Attention *all, int64_t pair, int64_t c, int64_t first, int64_t count,
                          Scratch *scratch) {
    int64_t b = pair / all->arguments.groups, g = pair % all->arguments.groups, padded = all->plan.padded;
    for (int64_t m = 0; m < count; m++) scratch->gathered_rows[m] = (Row){.best = -INFINITY};
    memset(scratch->gathered, 0, sizeof(float) * all->gathered_floats);
    for (int64_t i = 0; i < all->num_pieces; i++) {
        const Piece *piece = &all->pieces[i];
        int64_t start = c ? border_in(piece, all->plan.begin + c * all->plan.chunk) : 0, stop = piece->arguments.keys;
        if (c + 1 < all->plan.chunks) stop = border_in(piece, all->plan.begin + (c + 1) * all->plan.chunk);
        if (start >= stop) continue;
        lay_out(scratch, &piece->plan, all->gathered_floats);
        attend(&piece->arguments, &piece->plan, b, g, first, count, start, stop, scratch);
        for (int64_t m = 0; m < count; m++) {
            float *output = scratch->output + m * padded;
            settle_row(&piece->arguments, &piece->plan, b, g, &scratch->rows[m], output, output);
            gather_row(&scratch->gathered_rows[m], scratch->gathered + m * padded, &scratch->rows[m], output, padded);
        }
    }
}

static void attend_task(Attention *all, int64_t task, Scratch *scratch) {
    const AttentionArguments *a = &all->arguments;
    const Plan *plan = &all->plan;
    int64_t pair = task % all->pairs, c = task / all->pairs % plan->chunks;
    int64_t first = (plan->blocks - 1 - task / all->pairs / plan->chunks) * plan->block_rows; /* longest first */
    int64_t count = plan->rows - first < plan->block_rows ? plan->rows - first : plan->block_rows;
    int64_t start = plan->begin + c * plan->chunk;
    int64_t stop = start + plan->chunk < plan->end ? start + plan->chunk : plan->end;
    if (count <= 0) return;
    if (all->pieces)
        attend_pieces(all, pair, c, first, count, scratch);
    else
        attend(a, plan, pair / a->groups, pair % a->groups, first, count, start, stop, scratch);
    const Row *rows = all->pieces ? scratch->gathered_rows : scratch->rows;
    const float *outputs = all->pieces ? scratch->gathered : scratch->output;
    for (int64_t m = 0; m < count; m++) {
        const float *output = outputs + m * plan->padded;
        int64_t at = c * all->rows + pair * plan->rows + first + m;
        if (plan->chunks == 1) {
            finish_row(a, plan, pair / a->groups, pair % a->groups, first + m, &rows[m], output);
            continue;
        }
        all->part_rows[at] = rows[m];
        memcpy(all->part_outputs + at * plan->padded, output, sizeof(float) * (size_t)plan->padded);
    }
}

/* Called by each thread of a region; the output is whole behind it. */
OUTLINE void share_attention(Attention *all, Team *team) {
    const AttentionArguments *a = &all->arguments;
    const Plan *plan = &all->plan;
    Scratch *scratch = new_scratch(all->scratch_floats);
    if (scratch)
        lay_out(scratch, plan, all->gathered_floats);
    else
        all->failed = 1;
    for (int64_t task; (task = team_next(team)) < all->tasks;)
        if (scratch) attend_task(all, task, scratch);
    free(scratch);
    team_wait(team);
    if (plan->chunks == 1) return;
    for (int64_t row = share_from(all->rows); row < share_to(all->rows); row++) {
        int64_t pair = row / plan->rows;
        float *output = all->part_outputs + row * plan->padded;
        merge_row(plan, all->part_rows + row, output, all->rows, all->rows * plan->padded);
        finish_row(a, plan, pair / a->groups, pair % a->groups, row % plan->rows, all->part_rows + row, output);
    }
    team_wait(team);
}

/* Returns 0, or 1 if there is not enough memory, or 2 if there is nothing to do or the arguments do not go together. */
EXPORT int attention(const PackedAttentionCall *packed) {
    if (!goes_together(&packed->call)) return 2;
    const AttentionArguments arguments = arguments_of(packed);
    Piece pieces[MOST_PIECES];
    int64_t count = has_ends(&packed->call.ends) ? cut_pieces(&packed->call, &arguments, pieces) : 0;
    Attention all = count > 1 ? begin_pieces(&arguments, pieces, count)
                              : begin_attention(count ? &pieces[0].arguments : &arguments);
    Team team = {0};
    if (!all.failed) {
#pragma omp parallel num_threads((int)arguments.threads) if (arguments.threads > 1)
        share_attention(&all, &team);
    }
    end_attention(&all);
    return all.failed;
}
