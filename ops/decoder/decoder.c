/* Decoder layers, all of a pass in one region of threads; ops/decoder/reference.py has the semantics. */

/* What the norm before attention or the MLP makes of states, as the linears behind it read it. */
static void normed_row(Work *work, const LayerNorms *norms, const Operand *weight, const LayerLinear *linear,
                       int64_t row, int64_t in_block) {
    float *to = work->input + in_block * work->hidden;
    norm_row(work->states + row * work->hidden, work->hidden, weight, norms->offset, norms->eps, to);
    take_row(work, linear, to, in_block);
}

/* Adds to the states of a row what attention or the MLP made. */
static void add_row(Work *work, const DecoderLayer *layer, const Operand *norm, int64_t row, int64_t in_block) {
    float *added = work->added + in_block * work->hidden, *states = work->states + row * work->hidden;
    float factor = (float)layer->residual_scale;
    if (norm->dims >= 0) norm_row(added, work->hidden, norm, layer->norms.offset, layer->norms.eps, added);
    for (int64_t d = 0; d < work->hidden; d++) states[d] += added[d] * factor;
}

/* q, k and v of a row: norms of heads, RoPE, rotations, and the queries of biases. */
static void finish_head(Work *work, const DecoderLayer *layer, int64_t row, int64_t head) {
    int64_t head_dim = layer->head_dim, heads = layer->heads, kv_heads = layer->kv_heads;
    float *x = work->projected + (row * (heads + 2 * kv_heads) + head) * head_dim;
    int is_query = head < heads, is_value = head >= heads + kv_heads;
    const Operand *norm = is_query ? &layer->norms.query : &layer->norms.key;
    if (is_value) {
        if (layer->rotate_value) hadamard_row(x, head_dim);
        return;
    }
    if (norm->dims >= 0) norm_row(x, head_dim, norm, layer->norms.offset, layer->norms.eps, x);
    if (layer->rotation.dims >= 0) {
        const Operand *table = &layer->rotation;
        int64_t position = ((const int64_t *)work->pass->positions.data)[row];
        rotate_head(x, (const float *)table->data + position * table->stride[2], table->size[3] / 2);
    }
    if (is_query && layer->biases.key.dims >= 0) {
        const LayerBiases *biases = &layer->biases;
        int64_t count = biases->columns.size[3], g = head / (heads / kv_heads);
        bias_queries(x, (const float *)biases->key.data + g * head_dim, (const int64_t *)biases->columns.data, count,
                     head_dim, work->biased + (row * heads + head) * count);
    }
    if (layer->rotate_key) hadamard_row(x, head_dim);
}

/* The norm before attention, the projections, and what is done to their heads. */
static void share_inputs(Work *work, const DecoderLayer *layer) {
    int64_t all_heads = layer->heads + 2 * layer->kv_heads, stride = all_heads * layer->head_dim;
    const LayerLinear *linears[3] = {&layer->linears.query, &layer->linears.key, &layer->linears.value};
    for (int64_t start = 0; start < work->rows; start += BLOCK_ROWS) {
        int64_t rows = smaller(BLOCK_ROWS, work->rows - start);
        for (int64_t row = share_from(rows); row < share_to(rows); row++)
            normed_row(work, &layer->norms, &layer->norms.attention, linears[0], start + row, row);
        team_wait(&work->team);
        share_linears(work, linears, rows, work->input, work->projected + start * stride, stride);
    }
    int64_t items = work->rows * all_heads;
    for (int64_t item = share_from(items); item < share_to(items); item++)
        finish_head(work, layer, item / all_heads, item % all_heads);
    team_wait(&work->team);
}

/* Attention's output of a row as `output` reads it. */
static void attended_row(Work *work, const DecoderLayer *layer, int64_t row, int64_t in_block) {
    int64_t head_dim = layer->head_dim, ratio = layer->heads / layer->kv_heads;
    float *x = work->attended + row * layer->heads * head_dim;
    for (int64_t head = 0; head < layer->heads; head++) {
        if (layer->rotate_value) hadamard_row(x + head * head_dim, head_dim);
        if (layer->biases.value.dims < 0) continue;
        const float *bias = (const float *)layer->biases.value.data + head / ratio * head_dim;
        for (int64_t d = 0; d < head_dim; d++) x[head * head_dim + d] += bias[d];
    }
    take_row(work, &layer->linears.output, x, in_block);
}

/* The projection behind attention, and the MLP, added to the states of a block of rows. */
static void share_block(Work *work, const DecoderLayer *layer, int64_t start, int64_t rows) {
    const LayerNorms *norms = &layer->norms;
    const LayerLinears *linears = &layer->linears;
    const LayerLinear *outputs[3] = {&linears->output}, *branches[3] = {&linears->gate, &linears->up},
                      *downs[3] = {&linears->down};
    int64_t from = share_from(rows), to = share_to(rows), inner = linears->down.in_features;
    for (int64_t row = from; row < to; row++) attended_row(work, layer, start + row, row);
    team_wait(&work->team);
    share_linears(work, outputs, rows, work->attended + start * layer->heads * layer->head_dim, work->added,
                  work->hidden);
    for (int64_t row = from; row < to; row++) {
        add_row(work, layer, &norms->attention_output, start + row, row);
        normed_row(work, norms, &norms->mlp, &linears->gate, start + row, row);
    }
    team_wait(&work->team);
    share_linears(work, branches, rows, work->input, work->branch, 2 * inner);
    for (int64_t row = from; row < to; row++) {
        float *gate = work->branch + row * 2 * inner, *into = work->input + row * inner;
        activate_row(gate, gate + inner, inner, layer->activation, into);
        take_row(work, &linears->down, into, row);
    }
    team_wait(&work->team);
    share_linears(work, downs, rows, work->input, work->added, work->hidden);
    for (int64_t row = from; row < to; row++) add_row(work, layer, &norms->mlp_output, start + row, row);
}

/* What comes behind attention; the states are whole behind it. */
static void share_outputs(Work *work, const DecoderLayer *layer) {
    for (int64_t start = 0; start < work->rows; start += BLOCK_ROWS)
        share_block(work, layer, start, smaller(BLOCK_ROWS, work->rows - start));
    team_wait(&work->team);
}

/* `first` tokens are forgotten by the layer's part of the cache. */
static void share_layer(Work *work, const DecoderLayer *layer, int64_t first) {
    share_inputs(work, layer);
    share_encoding(work, layer, first);
    if (thread_number() == 0) { /* behind the encoding: its plan reads the scales of V */
        AttentionArguments call = attention_call(work, layer, first);
        work->attention = begin_attention(&call);
        work->attends = !work->attention.failed; /* a thread that finds no scratch may say so before others look */
    }
    team_wait(&work->team);
    if (work->attends) share_attention(&work->attention, &work->team);
    if (thread_number() == 0) {
        if (work->attention.failed) work->failed = 1;
        end_attention(&work->attention);
    }
    share_outputs(work, layer);
}

/* Bytes of scratch that `count` layers need; where each part of it begins is set if there is memory. */
static int64_t lay_out_pass(Work *work, const PackedDecoderLayer *layers, int64_t count, char *memory) {
    int64_t projected = 0, attended = 0, biased = 0, input = work->hidden, branch = 0, codes = 0, groups = 0;
    for (int64_t i = 0; i < count; i++) {
        const DecoderLayer *layer = &layers[i].call;
        const LayerLinear *linears[4] = {&layer->linears.query, &layer->linears.output, &layer->linears.gate, &layer->linears.down};
        projected = larger(projected, (layer->heads + 2 * layer->kv_heads) * layer->head_dim);
        attended = larger(attended, layer->heads * layer->head_dim);
        if (layer->biases.key.dims >= 0) biased = larger(biased, layer->heads * layer->biases.columns.size[3]);
        branch = larger(branch, 2 * layer->linears.down.in_features), input = larger(input, layer->linears.down.in_features);
        for (int j = 0; j < 4; j++) {
            codes = larger(codes, packed_stride(linears[j]->in_features));
            groups = larger(groups, linears[j]->groups);
        }
    }
    int64_t rows = smaller(work->rows, BLOCK_ROWS), used = 0;
    struct {
        void *at;
        int64_t bytes;
    } parts[] = {{&work->projected, work->projected ? 0 : 4 * work->rows * projected},
                 {&work->attended, work->attended ? 0 : 4 * work->rows * attended},
                 {&work->biased, 4 * work->rows * biased},
                 {&work->input, 4 * rows * input},
                 {&work->branch, 4 * rows * branch},
                 {&work->added, 4 * rows * work->hidden},
                 {&work->quantized.codes, rows * codes},
                 {&work->quantized.scale, 4 * rows * groups},
                 {&work->quantized.sums, 4 * rows * groups}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char *at = memory + used;
        if (memory && parts[i].bytes) memcpy(parts[i].at, &at, sizeof at);
        used += round_up(parts[i].bytes, 64) + 64; /* vectors may reach behind the last */
    }
    return used;
}

/* A pass, its scratch in `memory`, which is to be freed; 0 if there is none. */
static Work begin_pass(const PackedDecoderPass *packed, const PackedDecoderLayer *layers, int64_t count,
                       char **memory) {
    const Operand *hidden = &packed->call.hidden;
    Work work = {.pass = &packed->call, .batch = hidden->size[1], .tokens = hidden->size[2], .hidden = hidden->size[3],
                 .threads = packed->threads, .states = (float *)hidden->data,
                 .projected = (float *)packed->projected, .attended = (float *)packed->attended,
                 .encode = (Encoder)packed->encode, .encode_token = (Encoder)packed->encode_token};
    work.rows = work.batch * work.tokens;
    *memory = malloc((size_t)lay_out_pass(&work, layers, count, NULL) + 64);
    if (*memory) lay_out_pass(&work, layers, count, (char *)round_up((int64_t)*memory, 64));
    return work;
}

/* The norm behind the last layer, if there is one. */
static void share_last_norm(Work *work) {
    const DecoderPass *pass = work->pass;
    if (pass->norm.dims < 0) return;
    for (int64_t row = share_from(work->rows); row < share_to(work->rows); row++) {
        float *states = work->states + row * work->hidden;
        norm_row(states, work->hidden, &pass->norm, pass->norm_offset, pass->norm_eps, states);
    }
}

/* All layers. Returns 0, or 1 if there is not enough memory. */
EXPORT int decoder_layers(const PackedDecoderPass *packed) {
    const PackedDecoderLayer *layers = (const PackedDecoderLayer *)packed->layers;
    char *memory;
    Work work = begin_pass(packed, layers, packed->count, &memory);
    if (!memory) return 1;
#pragma omp parallel num_threads((int)work.threads) if (work.threads > 1)
    {
        for (int64_t i = 0; i < packed->count; i++) share_layer(&work, &layers[i].call, layers[i].first);
        share_last_norm(&work);
    }
    free(memory);
    return work.failed;
}

/* What comes between the attention of a layer, which is given, and that of the next, which somebody else computes from
 * what is left in `projected`: the outputs of the first of two layers and the inputs of the second, or one of them. */
EXPORT int decoder_between(const PackedDecoderPass *packed) {
    const PackedDecoderLayer *layers = (const PackedDecoderLayer *)packed->layers;
    char *memory;
    Work work = begin_pass(packed, layers, packed->count, &memory);
    if (!memory) return 1;
#pragma omp parallel num_threads((int)work.threads) if (work.threads > 1)
    {
        if (packed->attended) share_outputs(&work, &layers[0].call);
        if (packed->projected)
            share_inputs(&work, &layers[packed->count - 1].call);
        else
            share_last_norm(&work);
    }
    free(memory);
    return work.failed;
}
