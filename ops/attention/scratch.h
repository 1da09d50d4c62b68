/* What a thread works in: a block of rows over the keys, one block after the other. */

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

/* Rows of q with a group's scales in them: theirs, their digits, and where this group and the next ones end. */
typedef struct {
    const float *q;
    const Digits *digits;
    const int64_t *stops;
} Folded;

typedef struct {
    float *q, *folded;   /* `folded` has the scales of a group of tokens in it, of each of a block where rows are few */
    Digits *fold_digits; /* of those, if they are several, and where in the block these groups end */
    int64_t fold_stops[MOST_FOLDS];
    float *split_scale, *split_zero, *split_raw; /* of one block of keys: [groups of channels][KEY_BLOCK] */
    Digits *split_digits;                        /* [groups of channels][rows] */
    float *gathered; /* of several pieces: output so far, in units of V; the sums that go with it in `gathered_rows` */
    char *unpacked_keys, *unpacked_values;
    float *output, *scores, *keys, *values, *panels, *channel_scale, *channel_zero, *position_q, *positions;
    float key_scale[KEY_BLOCK], key_zero[KEY_BLOCK], value_scale[KEY_BLOCK], value_zero[KEY_BLOCK], bias[KEY_BLOCK];
    float weights[2][INTEGER_ROWS * KEY_BLOCK];
    Row rows[MAX_ROWS], gathered_rows[MAX_ROWS];
    Digits key_digits[MAX_ROWS], weight_digits[MAX_ROWS];
} Scratch;

/* Floats of the tile that a mode decodes or interleaves into. */
static size_t tile_size(const Plan *plan, int mode, size_t padded) {
    if (plan->wide) return KEY_BLOCK * padded / sizeof(float);
    return mode == MODE_DIRECT ? 0 : mode == MODE_INTEGER ? TILE_COLUMNS * padded / 4 : KEY_BLOCK * padded;
}

/* Lays out what a plan needs behind `gathered`, whose `gathered_floats` stay; returns how many floats that takes, and
 * without a scratch does only that. */
static size_t lay_out(Scratch *scratch, const Plan *plan, size_t gathered_floats) {
    size_t rows = (size_t)plan->block_rows, padded = (size_t)plan->padded;
    size_t key_tile = tile_size(plan, plan->key_mode, padded);
    size_t value_tile = tile_size(plan, plan->value_mode, padded);
    size_t panels = plan->key_mode == MODE_TILE ? KEY_BLOCK * padded : 0;
    size_t position_padded = (size_t)plan->position_padded, position_tile = KEY_BLOCK * position_padded;
    if (key_tile < position_tile) key_tile = position_tile;
    if (plan->rows > DIRECT_ROWS && panels < position_tile) panels = position_tile;
    size_t position_rows = position_padded ? rows * (position_padded + KEY_BLOCK) : 0;
    size_t folded = (size_t)plan->folds * rows * padded, fold_digits = (size_t)plan->folds * rows;
    size_t splits = plan->key_span || plan->value_span ? padded / GROUP_STEP : 0;
    size_t unpacked[2] = {(size_t)(plan->key_row * KEY_BLOCK + 64) / 4, (size_t)(plan->value_row * KEY_BLOCK + 64) / 4};
    size_t floats = fold_digits * sizeof(Digits) / sizeof(float) + unpacked[0] + unpacked[1] + 2 * rows * padded + folded + rows * KEY_BLOCK + key_tile + value_tile + panels +
                    2 * (padded + LANES) + position_rows +
                    splits * (3 * KEY_BLOCK + rows * sizeof(Digits) / sizeof(float));
    if (!scratch) return floats + gathered_floats;
    scratch->gathered = (float *)(((uintptr_t)scratch + sizeof(Scratch) + 63) & ~(uintptr_t)63);
    scratch->q = scratch->gathered + gathered_floats;
    scratch->folded = scratch->q + rows * padded;
    scratch->fold_digits = (Digits *)(scratch->folded + folded);
    scratch->output = (float *)(scratch->fold_digits + fold_digits);
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
    scratch->unpacked_keys = (char *)(scratch->split_digits + splits * rows);
    scratch->unpacked_values = scratch->unpacked_keys + sizeof(float) * unpacked[0];
    memset(scratch->channel_scale, 0, sizeof(float) * 2 * (padded + LANES)); /* padding that is multiplied too */
    return floats + gathered_floats;
}

/* For `floats` of `lay_out`; NULL if there is not enough memory. */
static Scratch *new_scratch(size_t floats) { return malloc(sizeof(Scratch) + sizeof(float) * floats + 64); }

/* Rows that are multiplied together in a mode. */
INLINE int64_t row_step(int mode) { return mode == MODE_TILE ? ROW_STEP : INTEGER_ROWS; }

/* The keys of a block that rows m to m + step multiply: those that any of them sees, from a multiple of 32 on. */
static Range seen_by(const Scratch *scratch, int64_t m, int64_t step, int64_t count, int64_t start, int64_t keys) {
    int64_t last = m + step < count ? m + step - 1 : count - 1; /* later rows see from and up to later keys */
    Range seen = {scratch->rows[m].front - start, scratch->rows[last].limit - start};
    seen.from = clamped(seen.from, keys) / 32 * 32, seen.to = clamped(seen.to, keys);
    return seen;
}
