/* Pieces of a call whose tokens are not all codes: of each, K lies in one part, floats or codes, and V in one. */

enum { MOST_PIECES = 5 };

/* Floats or codes of K or V: the slots that they take. */
typedef struct {
    Side side;
    int64_t first, stop;
} Strip;

typedef struct {
    AttentionArguments arguments;
    Plan plan;
} Piece;

static Side side_of_floats(const Operand *floats) {
    Side side = {floats->data, floats->kind};
    memcpy(side.stride, floats->stride, sizeof side.stride);
    return side;
}

static void strips_of(const Coded *coded, const Operand *front, const Operand *tail, int64_t width, Strip strips[3]) {
    const Operand *floats[3] = {front, NULL, tail};
    for (int64_t i = 0, first = 0; i < 3; first = strips[i++].stop) {
        int64_t tokens = i == 1 ? coded->codes.size[2] : floats[i]->dims < 0 ? 0 : floats[i]->size[2];
        strips[i].first = first, strips[i].stop = first + tokens;
        if (tokens) strips[i].side = i == 1 ? side_of(coded, width) : side_of_floats(floats[i]);
    }
}

/* What a strip holds from a slot on. */
static Side side_from(const Strip *strip, int64_t slot) {
    Side side = strip->side;
    int64_t tokens = slot - strip->first, size = side.bits ? 1 : kind_size((int)side.kind);
    side.data += tokens * side.stride[2] * size;
    side.scale.first += tokens, side.zero.first += tokens;
    return side;
}

/* The strip of a slot; 0 to 2. */
static int strip_at(const Strip strips[3], int64_t slot) { return slot < strips[0].stop ? 0 : slot < strips[1].stop ? 1 : 2; }

/* The pieces of a call, in the order of its slots; returns how many. */
static int64_t cut_pieces(const AttentionCall *call, const AttentionArguments *whole, Piece pieces[MOST_PIECES]) {
    Strip key[3], value[3];
    const Ends *ends = &call->ends;
    int64_t count = 0, size = kind_size((int)whole->mask_kind);
    strips_of(&call->key, &ends->key_front, &ends->key_tail, whole->width, key);
    strips_of(&call->value, &ends->value_front, &ends->value_tail, whole->width, value);
    for (int64_t first = 0, stop; first < whole->keys; first = stop) {
        const Strip *of_key = &key[strip_at(key, first)], *of_value = &value[strip_at(value, first)];
        AttentionArguments *a = &pieces[count].arguments;
        stop = of_key->stop < of_value->stop ? of_key->stop : of_value->stop;
        *a = *whole;
        a->keys = stop - first, a->before = first, a->behind = whole->keys - stop;
        a->key = side_from(of_key, first), a->value = side_from(of_value, first);
        if (a->mask) a->mask += first * a->mask_stride[3] * size;
        if (first || stop < whole->keys) a->lse = 1; /* zeros of K do not cancel between pieces */
        pieces[count++].plan = plan_of(a);
    }
    return count;
}

/* Where a border between chunks, at a slot of the call, cuts a piece. */
static int64_t border_in(const Piece *piece, int64_t slot) {
    int64_t at = slot - piece->arguments.before, keys = piece->arguments.keys;
    return at <= 0 ? 0 : at >= keys ? keys : at / GROUP_STEP * GROUP_STEP;
}

/* Adds to the sums of a row and its output, both of settled pieces, what it found in another. */
static void gather_row(Row *sum, float *gathered, const Row *row, const float *output, int64_t padded) {
    float other = row->best + row->offset, best = other > sum->best ? other : sum->best;
    float shift = best == -INFINITY ? 0.0f : best;
    f32v old = all_lanes(exp2_of_one(sum->best - shift)), new = all_lanes(exp2_of_one(other - shift));
    sum->best = best, sum->total = sum->total * old[0] + row->total * new[0];
    sum->total += row->offset - row->offset; /* what is no number must not look like nothing seen */
    for (int64_t d = 0; d < padded; d += LANES)
        store_lanes(gathered + d, load_lanes(gathered + d) * old + load_lanes(output + d) * new);
}
