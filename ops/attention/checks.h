/* Whether the shapes of a call go together, by what ops/attention/arguments.py says, which is asked again where they do
 * not: it knows the words for it, and what to return for a call that is empty. */

enum { LARGEST_HEAD_DIM = 1 << 16 }; /* of arguments.py */

static int broadcasts(const Operand *operand, int64_t b, int64_t h, int64_t q, int64_t s) {
    const int64_t *size = operand->size;
    return operand->dims < 0 || ((size[0] == 1 || size[0] == b) && (size[1] == 1 || size[1] == h) &&
                                 (size[2] == 1 || size[2] == q) && (size[3] == 1 || size[3] == s));
}

static int is_index(const Operand *operand, int64_t batch) {
    return operand->dims < 0 || (operand->dims == 1 && (operand->size[3] == 1 || operand->size[3] == batch));
}

/* Of a scale or zero of codes of shape [B, G, S, width]. */
static int is_part(const Operand *operand, const int64_t codes[4], int64_t group, int64_t width) {
    if (operand->dims < 0) return 1;
    int64_t rows = operand->size[2], columns = operand->size[3];
    if (columns < 1 || width % columns || (rows != 1 && rows != (codes[2] ? (codes[2] - 1) / group + 1 : 0))) return 0;
    return broadcasts(operand, codes[0], codes[1], rows, columns);
}

static int is_coded(const Coded *coded, const int64_t query[4]) {
    const Operand *codes = &coded->codes;
    int64_t width = codes->size[3], step = coded->bits == 3 ? 8 : coded->bits == 4 ? 2 : 4; /* WIDTH_STEPS of codes.py */
    if (codes->kind == KIND_INT4) {
        width = codes->size[3] * 8 / (coded->bits ? coded->bits : 1);
        if (coded->bits < 2 || coded->bits > 4 || width % step || width * coded->bits != codes->size[3] * 8) return 0;
    }
    if (coded->levels.dims >= 0 && (codes->kind != KIND_INT4 || coded->levels.dims != 1 ||
                                    coded->levels.size[3] != (int64_t)1 << coded->bits))
        return 0;
    return codes->dims == 4 && codes->size[0] == query[0] && width == query[3] && coded->group >= 1 &&
           is_part(&coded->scale, codes->size, coded->group, width) &&
           is_part(&coded->zero, codes->size, coded->group, width);
}

/* Tokens of K or V, those in float counted in. */
static int64_t tokens_of(const Coded *coded, const Operand *front, const Operand *tail) {
    int64_t tokens = coded->codes.size[2];
    if (front->dims >= 0) tokens += front->size[2];
    return tail->dims >= 0 ? tokens + tail->size[2] : tokens;
}

/* Of tokens in float beside those codes. */
static int is_end(const Operand *floats, const int64_t codes[4], int64_t width) {
    const int64_t *size = floats->size;
    return floats->dims < 0 || (floats->dims == 4 && size[0] == codes[0] && size[1] == codes[1] && size[3] == width);
}

static int has_ends(const Ends *ends) {
    return ends->key_front.dims >= 0 || ends->key_tail.dims >= 0 || ends->value_front.dims >= 0 ||
           ends->value_tail.dims >= 0;
}

static int are_ends(const AttentionCall *call, int64_t width) {
    const Ends *ends = &call->ends;
    const int64_t *key = call->key.codes.size, *value = call->value.codes.size;
    return !has_ends(ends) ||
           (call->query_scale.dims < 0 && is_end(&ends->key_front, key, width) && is_end(&ends->key_tail, key, width) &&
            is_end(&ends->value_front, value, width) && is_end(&ends->value_tail, value, width));
}

static int are_position_scores(const PositionScores *scores, const int64_t query[4]) {
    const int64_t *rows = scores->query.size;
    if (scores->query.dims < 0 && scores->table.dims < 0 && scores->start.dims < 0) return 1;
    return scores->query.dims == 4 && scores->table.dims == 2 && scores->start.dims == 1 && rows[0] == query[0] &&
           rows[1] == query[1] && rows[2] == query[2] && rows[3] > 0 && scores->table.size[3] == rows[3] &&
           scores->table.size[2] > 0 && is_index(&scores->start, query[0]);
}

/* 0 also of a call without queries or keys. */
static int goes_together(const AttentionCall *call) {
    const int64_t *query = call->query.size, *key = call->key.codes.size, *value = call->value.codes.size;
    int64_t keys = tokens_of(&call->key, &call->ends.key_front, &call->ends.key_tail);
    if (call->query.dims != 4 || query[0] < 1 || query[1] < 1 || query[2] < 1 || query[3] < 1) return 0;
    if (query[3] > LARGEST_HEAD_DIM || key[1] < 1 || keys < 1 || query[1] % key[1]) return 0;
    if (keys != tokens_of(&call->value, &call->ends.value_front, &call->ends.value_tail)) return 0;
    if (key[1] != value[1] || call->visibility.window < 0 || !are_ends(call, query[3])) return 0;
    return is_coded(&call->key, query) && is_coded(&call->value, query) &&
           broadcasts(&call->query_scale, query[0], query[1], query[2], 1) &&
           broadcasts(&call->visibility.mask, query[0], query[1], query[2], keys) &&
           is_index(&call->visibility.length, query[0]) && are_position_scores(&call->position, query);
}
