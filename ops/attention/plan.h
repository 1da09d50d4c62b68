/* How a call is cut into tasks, and how K and V are multiplied in it; README.md says why. */

enum { KEY_BLOCK = 192, MAX_ROWS = 192, DIRECT_ROWS = 8, GROUPED_ROWS = 64, MIN_CHUNK = 512 };
enum { MOST_FOLDS = 7 }; /* groups of 32 tokens that a block meets */

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
    int64_t key_row, value_row;   /* bytes of a row that is unpacked first; 0 if none is */
    int64_t folds; /* groups of tokens for which q is kept with their scales in it */
    int key_mode, value_mode, key_groups, value_groups, query_digits;
    int wide; /* rows go through wide.h */
    float query_unit, weight_unit; /* factors of q and the weights that make up for the units of the codes */
    float factor;                  /* of scores, for units of log2 */
    Part key_scale, key_zero, value_scale, value_zero;
} Plan;

/* Whether a scale or zero varies along tokens and channels, so that it must be applied to each code. */
static int is_grouped(const Side *side, int64_t width) {
    return (side->scale.per_token && side->scale.span < width) || (side->zero.per_token && side->zero.span < width);
}

/* Whether each row of a part is that of whole steps of tokens. */
static int is_stepped(const Part *part) {
    return !part->per_token || (part->group % GROUP_STEP == 0 && part->first % GROUP_STEP == 0);
}

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
    if (a->key.bits) plan.key_row = a->width * kind_size((int)a->key.kind);
    if (a->value.bits) plan.value_row = a->width * kind_size((int)a->value.kind);
    if (plan.key_groups == GROUPS_TOKENS)
        plan.folds = plan.rows <= DIRECT_ROWS && plan.key_mode == MODE_INTEGER ? MOST_FOLDS : 1;
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
