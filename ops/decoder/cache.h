/* What a layer does with its part of the cache: encoding the rows that come, and attention over all. */

/* The codec's arguments for `tokens` tokens from the first on of one head of one sequence. */
static CodecArguments codec_call(const Coded *side, const float *x, int64_t stride, int64_t at,
                                 int64_t b, int64_t g, int64_t tokens, int64_t head_dim, int is_dynamic) {
    const Operand *codes = &side->codes, *parts[2] = {&side->scale, &side->zero};
    CodecArguments a = {.x = (int64_t)x, .x_kind = KIND_FLOAT32, .code_kind = codes->kind, .bits = 4,
                        .scale_kind = KIND_FLOAT32, .zero_kind = KIND_FLOAT32, .scale_groups = 1, .zero_groups = 1,
                        .shape = {1, 1, tokens, head_dim}, .capacity = tokens, .token_group = 1, .threads = 1};
    a.codes = codes->data + (b * codes->stride[0] + g * codes->stride[1] + at * codes->stride[2]) *
                                kind_size((int)codes->kind);
    a.x_stride[2] = stride, a.codes_stride[2] = codes->stride[2];
    for (int i = 0; i < 2; i++) {
        const Operand *part = parts[i];
        if (part->dims < 0) continue;
        int64_t strides[4], row;
        broadcast_strides(part, 4, strides);
        row = b * strides[0] + g * strides[1] + (is_dynamic ? at * strides[2] : 0);
        *(i ? &a.zero : &a.scale) = part->data + row * kind_size((int)part->kind);
        *(i ? &a.zero_kind : &a.scale_kind) = part->kind;
        *(i ? &a.zero_groups : &a.scale_groups) = part->size[3];
        int64_t *to = i ? a.zero_stride : a.scale_stride;
        to[2] = is_dynamic ? strides[2] : 0, to[3] = strides[3];
    }
    return a;
}

/* Values as they are, where the storage holds floats. */
static void keep_rows(const Operand *codes, const float *x, int64_t stride, int64_t at, int64_t b, int64_t g,
                      int64_t tokens, int64_t head_dim) {
    for (int64_t t = 0; t < tokens; t++) {
        int64_t to = b * codes->stride[0] + g * codes->stride[1] + (at + t) * codes->stride[2];
        for (int64_t d = 0; d < head_dim; d += 8)
            store_few_as((char *)codes->data + (to + d) * kind_size((int)codes->kind), load_f32(x + t * stride + d),
                         smaller(8, head_dim - d), (int)codes->kind);
    }
}

/* Encodes this pass's k and v behind those that are stored. */
static void share_encoding(Work *work, const DecoderLayer *layer, int64_t first) {
    int64_t heads = layer->kv_heads, head_dim = layer->head_dim, q = layer->heads * head_dim, kv = heads * head_dim;
    int64_t stride = q + 2 * kv, blocks = (work->tokens + ENCODED_ROWS - 1) / ENCODED_ROWS;
    int64_t items = 2 * work->batch * heads * blocks;
    for (int64_t item = share_from(items); item < share_to(items); item++) {
        int64_t block = item % blocks, g = item / blocks % heads, b = item / blocks / heads % work->batch;
        int is_value = item / blocks / heads / work->batch == 1;
        const Coded *side = is_value ? &layer->value_codes : &layer->key_codes;
        int is_dynamic = (int)(is_value ? layer->is_value_dynamic : layer->is_key_dynamic);
        int64_t start = block * ENCODED_ROWS, tokens = smaller(ENCODED_ROWS, work->tokens - start);
        int64_t at = work->pass->stored - first + start;
        const float *x = work->projected + (b * work->tokens + start) * stride + q + is_value * kv + g * head_dim;
        if (side->scale.dims < 0) {
            keep_rows(&side->codes, x, stride, at, b, g, tokens, head_dim);
            continue;
        }
        CodecArguments call = codec_call(side, x, stride, at, b, g, tokens, head_dim, is_dynamic);
        if ((is_dynamic ? work->encode_token : work->encode)(&call)) work->failed = 1;
    }
    team_wait(&work->team);
}

/* Attention of this pass's queries to all that is stored then. */
static AttentionArguments attention_call(const Work *work, const DecoderLayer *layer, int64_t first) {
    const DecoderPass *pass = work->pass;
    int64_t head_dim = layer->head_dim, stride = (layer->heads + 2 * layer->kv_heads) * head_dim;
    const Operand *mask = layer->window ? &pass->windowed_mask : &pass->mask;
    AttentionArguments a = {
        .query = (int64_t)work->projected, .output = (int64_t)work->attended, .query_scale = layer->query_scale.data,
        .batch = work->batch, .heads = layer->heads, .queries = work->tokens, .width = head_dim,
        .groups = layer->kv_heads, .keys = pass->stored + work->tokens - first, .causal = 1, .window = layer->window,
        .threads = work->threads, .scaling = layer->scaling,
        .query_stride = {work->tokens * stride, head_dim, stride},
    };
    broadcast_strides(&layer->query_scale, 3, a.query_scale_stride);
    if (mask->dims >= 0) {
        broadcast_strides(mask, 4, a.mask_stride);
        a.mask = mask->data + first * a.mask_stride[3], a.mask_kind = mask->kind;
    }
    a.key = side_of(&layer->key_codes, head_dim), a.value = side_of(&layer->value_codes, head_dim);
    if (layer->biases.key.dims >= 0) {
        const Operand *table = &layer->biases.table;
        int64_t width = table->size[3];
        a.position = (Position){.query = (int64_t)work->biased, .table = table->data, .start = pass->bias_start.data,
                                .width = width, .rows = table->size[2], .row_stride = table->stride[2],
                                .start_stride = pass->bias_start.size[3] == 1 ? 0 : 1,
                                .query_stride = {work->tokens * layer->heads * width, width, layer->heads * width}};
    }
    return a;
}
