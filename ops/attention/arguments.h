/* The arguments of a call as the kernel reads them, from the call as Python packs it: `PackedAttentionCall`, whose
 * declaration is generated from ops/attention/call.py and stands before this. */

/* A scale or a zero point: `data` 0 if there is none. `per_token` if it varies along the keys, then `group` keys share
 * a row; `span` channels share a column. */
typedef struct {
    int64_t data, kind, per_token, group, span, stride[4];
    int64_t first; /* the token of the part that belongs to the first of the call */
} Part;

/* K or V. Strides count elements. Where `bits` is not 0, uint8 holds indices of so many bits that are unpacked to `kind`:
 * int8 codes, or of a codebook `levels`, floats. */
typedef struct {
    int64_t data, kind, stride[3];
    Part scale, zero;
    int64_t bits, levels;
} Side;

/* Scores by position: `query` . row `start` + key of `table`, which has `rows` of them; `query` 0 if there are none. */
typedef struct {
    int64_t query, table, start, width, rows, row_stride, start_stride, query_stride[3];
} Position;

typedef struct {
    int64_t query, output, query_scale, mask, length;
    int64_t batch, heads, queries, width, groups, keys;
    int64_t before, behind; /* tokens of the call that come before and behind these keys */
    int64_t mask_kind, length_kind, length_stride, causal, window, threads;
    int64_t query_stride[3], query_scale_stride[3], mask_stride[4];
    Side key, value;
    int64_t lse; /* 0 if it is not wanted */
    Position position;
    double scaling;
} AttentionArguments;

/* Strides by which an operand is read as if it were expanded. */
static void broadcast_strides(const Operand *operand, int count, int64_t *stride) {
    for (int i = 0; i < count; i++) stride[i] = operand->size[i] == 1 ? 0 : operand->stride[i];
}

static Part part_of(const Operand *operand, int64_t group, int64_t width) {
    Part part = {operand->data, operand->kind};
    if (operand->dims < 0) return part;
    part.per_token = operand->size[2] != 1, part.group = group, part.span = width / operand->size[3];
    broadcast_strides(operand, 4, part.stride);
    return part;
}

static Side side_of(const Coded *coded, int64_t width) {
    Side side = {coded->codes.data, coded->codes.kind};
    memcpy(side.stride, coded->codes.stride, sizeof side.stride);
    side.scale = part_of(&coded->scale, coded->group, width), side.zero = part_of(&coded->zero, coded->group, width);
    if (side.kind == KIND_INT4 && (coded->bits != 4 || coded->levels.data)) {
        side.bits = coded->bits, side.levels = coded->levels.data;
        side.kind = side.levels ? KIND_FLOAT32 : KIND_INT8;
    }
    return side;
}

static Position position_of(const PositionScores *scores) {
    Position position = {scores->query.data, scores->table.data, scores->start.data};
    position.width = scores->table.size[3], position.rows = scores->table.size[2];
    position.row_stride = scores->table.stride[2];
    position.start_stride = scores->start.size[3] == 1 ? 0 : scores->start.stride[3];
    memcpy(position.query_stride, scores->query.stride, sizeof position.query_stride);
    return position;
}

static AttentionArguments arguments_of(const PackedAttentionCall *packed) {
    const AttentionCall *call = &packed->call;
    const Visibility *visibility = &call->visibility;
    AttentionArguments a = {
        .query = call->query.data, .output = packed->output, .lse = packed->lse, .threads = packed->threads,
        .query_scale = call->query_scale.data, .mask = visibility->mask.data, .length = visibility->length.data,
        .batch = call->query.size[0], .heads = call->query.size[1], .queries = call->query.size[2],
        .width = call->query.size[3], .groups = call->key.codes.size[1],
        .keys = tokens_of(&call->key, &call->ends.key_front, &call->ends.key_tail),
        .mask_kind = visibility->mask.kind, .length_kind = visibility->length.kind,
        .causal = visibility->causal, .window = visibility->window, .scaling = call->scaling,
    };
    memcpy(a.query_stride, call->query.stride, sizeof a.query_stride);
    broadcast_strides(&call->query_scale, 3, a.query_scale_stride);
    broadcast_strides(&visibility->mask, 4, a.mask_stride);
    a.length_stride = visibility->length.size[3] == 1 ? 0 : visibility->length.stride[3];
    a.key = side_of(&call->key, a.width), a.value = side_of(&call->value, a.width);
    a.position = position_of(&call->position);
    return a;
}
