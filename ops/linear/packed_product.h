/* Products of quantized rows and packed weights, in tiles whose sums live in registers. Stands behind packed_dot.h. */

enum {
    PACKED_GROUPED_SUMS = 16, /* a tile of more vectors has no registers for totals of groups beside its sums */
    PACKED_FEW = 8,          /* up to so many rows a panel is read once, tiles are one panel wide */
    PACKED_AHEAD = 4096,     /* bytes from the one read to the one that is fetched meanwhile */
    PACKED_X_BYTES = 1 << 19, /* of codes of x that stay in cache while the panels pass */
    PACKED_GRAIN = 1 << 16   /* bytes of weights that a thread takes at a time, at least, where rows are few */
};

/* 16 numbers of a group of a panel, `part` a multiple of PACKED_LANES among them. */
INLINE PackedFloats packed_numbers(const void *from, int64_t kind, int64_t index) {
    if (kind != KIND_FLOAT16) return *(const PackedFloatsAny *)((const float *)from + index);
    const uint16_t *halves = (const uint16_t *)from + index;
#if defined(__AVX512F__)
    if (PACKED_LANES == 16) return (PackedFloats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
#endif
    float values[PACKED_LANES < 8 ? 8 : PACKED_LANES];
    PackedFloats numbers;
    uint16_t eight[8] = {0};
    for (int i = 0; i < PACKED_LANES; i += 8) {
        memcpy(eight, halves + i, PACKED_LANES < 8 ? 2 * PACKED_LANES : 16);
        store_f32(values + i, load_as_f32(eight, KIND_FLOAT16));
    }
    memcpy(&numbers, values, sizeof numbers);
    return numbers;
}

INLINE PackedFloats packed_as_floats(PackedWords sums) {
    return __builtin_convertvector((PackedSums)sums, PackedFloats);
}

/* The sum of codes of a row in every lane, as it lies in memory. */
INLINE PackedWords packed_sum_of_x(const int32_t *at) {
    PackedWords sum = (PackedWords){0} + (uint32_t)*at;
    PACKED_OPAQUE(sum);
    return sum;
}

/* Sums of unsigned codes as those of the codes themselves; the sums of a vector may be in several chains. */
INLINE PackedWords packed_sum(const PackedSums *sums, const int chains, const int bits, PackedWords sum_of_x) {
    PackedWords sum = (PackedWords)sums[0];
    UNROLL for (int i = 1; i < chains; i++) sum += (PackedWords)sums[i];
    return sum - sum_of_x * (uint32_t)packed_offset(bits);
}

/* Where the numbers of a part of a panel, or of the next one, lie. */
INLINE int64_t packed_index(const PackedWeight *w, int64_t panel, int part, int64_t group) {
    int64_t of_panel = panel + part / PACKED_PARTS;
    return (of_panel * w->groups + group) * PACKED_CHANNELS + part % PACKED_PARTS * PACKED_LANES;
}

/* Sums of the only group times scales: the float operations of linear_w8a8 and linear_w8a8_dynamic in their order. */
INLINE void packed_scale_sums(const PackedWeight *w, const QuantizedRows *x, int64_t row, int64_t panel, int first_part,
                              const int rows, const int vectors, const int bits, const PackedSums *sums,
                              const int chains, PackedFloats *totals) {
    UNROLL for (int v = 0; v < vectors; v++) {
        int64_t index = packed_index(w, panel, first_part + v, 0);
        int64_t channel = panel * PACKED_CHANNELS + (first_part + v) * PACKED_LANES, left = w->out_features - channel;
        PackedFloats scale = packed_numbers(w->scale, w->scale_kind, index), zero = {0};
        PackedWords quant_bias = {0};
        if (w->zero) zero = packed_numbers(w->zero, w->scale_kind, index);
        if (w->quant_bias && left > 0)
            memcpy(&quant_bias, w->quant_bias + channel, 4 * (size_t)(left < PACKED_LANES ? left : PACKED_LANES));
        UNROLL for (int r = 0; r < rows; r++) {
            PackedWords sum_of_x = packed_sum_of_x(x->sums + row + r);
            PackedWords sum = packed_sum(sums + (r * vectors + v) * chains, chains, bits, sum_of_x) + quant_bias;
            PackedFloats value = packed_as_floats(sum);
            if (w->zero) value -= zero * packed_as_floats(sum_of_x);
            value *= scale * x->scale[row + r];
            PACKED_OPAQUE(value); /* rounded before the bias joins it */
            totals[r * vectors + v] = value;
        }
    }
}

/* Sums of a group times its scales, added to totals. */
INLINE void packed_add_group(const PackedWeight *w, const QuantizedRows *x, int64_t row, int64_t panel, int64_t group,
                             int first_part, const int rows, const int vectors, const int bits, const int affine,
                             const PackedSums *sums, const int chains, PackedFloats *totals) {
    int64_t of_weight = w->groups == x->groups ? group : group * w->groups / x->groups;
    PackedFloats scale[4], zero[4];
    UNROLL for (int v = 0; v < vectors; v++) {
        int64_t index = packed_index(w, panel, first_part + v, of_weight);
        scale[v] = packed_numbers(w->scale, w->scale_kind, index);
        if (affine) zero[v] = packed_numbers(w->zero, w->scale_kind, index);
    }
    const float *x_scale = x->scale + row * x->groups + group;
    const int32_t *x_sum = x->sums + row * x->groups + group;
    UNROLL for (int r = 0; r < rows; r++) {
        PackedWords sum_of_x = packed_sum_of_x(x_sum + r * x->groups);
        UNROLL for (int v = 0; v < vectors; v++) {
            int at = r * vectors + v;
            PackedFloats value = packed_as_floats(packed_sum(sums + at * chains, chains, bits, sum_of_x));
            if (affine) value -= zero[v] * packed_as_floats(sum_of_x);
            totals[at] += value * x_scale[r * x->groups] * scale[v];
        }
    }
}

/* The last channels of the output, fewer than a vector has, or none. */
static __attribute__((noinline)) void packed_store_few(const PackedWeight *w, const float *values, int64_t channel,
                                                       float *to) {
    for (int64_t c = 0; c < w->out_features - channel; c++)
        to[channel + c] = w->bias ? values[c] + w->bias[channel + c] : values[c];
}

/* A vector of the output with its bias. */
INLINE void packed_store(const PackedWeight *w, PackedFloats total, int64_t channel, float *to) {
    float values[PACKED_LANES];
    if (w->out_features - channel < PACKED_LANES) {
        memcpy(values, &total, sizeof values);
        packed_store_few(w, values, channel, to);
        return;
    }
    if (w->bias) total += *(const PackedFloatsAny *)(w->bias + channel);
    *(PackedFloatsAny *)(to + channel) = total;
}

/* The output of `rows` rows and `panels` panels; output[0] is of row 0. */
INLINE void packed_tile(const PackedWeight *w, const QuantizedRows *x, int64_t row, int64_t panel, const int rows,
                        const int panels, const int wide, const int bits, float *output, int64_t stride) {
    const int vectors = wide < panels * PACKED_PARTS ? wide : panels * PACKED_PARTS;
    const int chains = rows * vectors < PACKED_CHAINS ? PACKED_CHAINS / (rows * vectors) : 1;
    int64_t depth = packed_depth(w->in_features), panel_bytes = depth * PACKED_CHANNELS * bits / 8;
    int64_t steps = depth / PACKED_STEP / x->groups;
    const int8_t *codes = x->codes + row * x->stride;
    for (int first = 0; first < panels * PACKED_PARTS; first += vectors) {
        const uint8_t *weights = packed_at(w->codes + panel * panel_bytes, panel_bytes, first);
        PackedFloats totals[24];
        UNROLL for (int i = 0; i < rows * vectors; i++) totals[i] = (PackedFloats){0};
        for (int64_t group = 0, k = 0; group < x->groups; group++) {
            PackedSums sums[24];
            UNROLL for (int i = 0; i < rows * vectors * chains; i++) sums[i] = (PackedSums){0};
            for (int64_t end = k + steps; k < end; k++) {
                const uint8_t *from = weights + k * (PACKED_STEP * PACKED_CHANNELS / 8) * bits;
                if (rows * panels <= PACKED_FEW)
                    UNROLL for (int i = 0; i < bits; i++) __builtin_prefetch(from + PACKED_AHEAD + 64 * i);
                packed_step(from, panel_bytes, codes + k * PACKED_STEP, x->stride, rows, vectors, bits, sums);
            }
            if (rows * vectors > PACKED_GROUPED_SUMS || x->groups == 1)
                packed_scale_sums(w, x, row, panel, first, rows, vectors, bits, sums, chains, totals);
            else if (w->zero)
                packed_add_group(w, x, row, panel, group, first, rows, vectors, bits, 1, sums, chains, totals);
            else
                packed_add_group(w, x, row, panel, group, first, rows, vectors, bits, 0, sums, chains, totals);
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                packed_store(w, totals[r * vectors + v], panel * PACKED_CHANNELS + (first + v) * PACKED_LANES,
                             output + (row + r) * stride);
    }
}

#define PACKED_TILE(rows, panels, bits)                                                                             \
    static __attribute__((noinline)) void packed_tile_##rows##_##panels##_##bits(                                   \
        const PackedWeight *w, const QuantizedRows *x, int64_t row, int64_t panel, float *output, int64_t stride) { \
        packed_tile(w, x, row, panel, rows, panels, rows < 4 ? 4 : PACKED_WIDE(bits), bits, output, stride);        \
    }
#define PACKED_TILES(rows, panels) PACKED_TILE(rows, panels, 8) PACKED_TILE(rows, panels, 4)

typedef struct {
    int64_t rows;
    void (*of_8_bits)(const PackedWeight *, const QuantizedRows *, int64_t, int64_t, float *, int64_t);
    void (*of_4_bits)(const PackedWeight *, const QuantizedRows *, int64_t, int64_t, float *, int64_t);
} PackedTile;
#define PACKED_ENTRY(rows, panels) {rows, packed_tile_##rows##_##panels##_8, packed_tile_##rows##_##panels##_4}

PACKED_TILES(1, 1)
PACKED_TILES(2, 1)
PACKED_TILES(4, 1)
#if defined(__AVX2__)
#if PACKED_IS_512
PACKED_TILES(8, 1)
PACKED_TILES(6, 2)
PACKED_TILES(12, 2)
static const PackedTile PACKED_SINGLE[] = {PACKED_ENTRY(8, 1), PACKED_ENTRY(4, 1), PACKED_ENTRY(2, 1), PACKED_ENTRY(1, 1)};
static const PackedTile PACKED_DOUBLE[] = {PACKED_ENTRY(12, 2), PACKED_ENTRY(6, 2)};
enum { PACKED_DOUBLES = sizeof PACKED_DOUBLE / sizeof *PACKED_DOUBLE };
#define PACKED_PAIRS 1
#else
PACKED_TILES(6, 1)
static const PackedTile PACKED_SINGLE[] = {PACKED_ENTRY(6, 1), PACKED_ENTRY(4, 1), PACKED_ENTRY(2, 1), PACKED_ENTRY(1, 1)};
#endif
#else
static const PackedTile PACKED_SINGLE[] = {PACKED_ENTRY(4, 1), PACKED_ENTRY(2, 1), PACKED_ENTRY(1, 1)};
#endif
enum { PACKED_SINGLES = sizeof PACKED_SINGLE / sizeof *PACKED_SINGLE };

/* The tile that takes `rows` rows with the fewest products; tiles may overlap, so it is no higher than they. */
static const PackedTile *packed_choice(const PackedTile *tiles, int count, int64_t rows) {
    const PackedTile *best = NULL;
    int64_t least = INT64_MAX;
    for (int i = 0; i < count; i++) {
        int64_t computed = (rows + tiles[i].rows - 1) / tiles[i].rows * tiles[i].rows;
        if (tiles[i].rows <= rows && computed < least) best = tiles + i, least = computed;
    }
    return best;
}

static void packed_rows(const PackedWeight *w, const QuantizedRows *x, const PackedTile *tile, int64_t row, int64_t rows,
                        int64_t panel, float *output, int64_t stride) {
    for (int64_t r = 0; r < rows; r += tile->rows) {
        int64_t at = row + (r + tile->rows <= rows ? r : rows - tile->rows);
        (w->bits == 4 ? tile->of_4_bits : tile->of_8_bits)(w, x, at, panel, output, stride);
    }
}

/* output[m][n] = sum_g s_x[m][g] s_w[n][g] sum_k x (w - zero) + bias for the output channels of the panels `first` to
 * `last` and the rows `row` to `row + rows`; output[0] is of row 0. */
static void packed_block(const PackedWeight *w, const QuantizedRows *x, int64_t row, int64_t rows, int64_t first,
                         int64_t last, float *output, int64_t stride) {
    const PackedTile *single = packed_choice(PACKED_SINGLE, PACKED_SINGLES, rows);
    int64_t panel = first;
#ifdef PACKED_PAIRS
    int grouped = x->groups > 1; /* not the tile of 12 rows */
    const PackedTile *pair = packed_choice(PACKED_DOUBLE + grouped, PACKED_DOUBLES - grouped, rows);
    if (rows > PACKED_FEW)
        for (; panel + 2 <= last; panel += 2) packed_rows(w, x, pair, row, rows, panel, output, stride);
#endif
    for (; panel < last; panel++) packed_rows(w, x, single, row, rows, panel, output, stride);
}

/* Rows of x that stay in cache while the panels pass: the same number in each block. */
static int64_t packed_block_rows(const QuantizedRows *x, int64_t rows) {
    int64_t most = PACKED_X_BYTES / x->stride > PACKED_TALL ? PACKED_X_BYTES / x->stride : PACKED_TALL;
    int64_t blocks = (rows + most - 1) / most, each = blocks ? (rows + blocks - 1) / blocks : 1;
    return (each + PACKED_TALL - 1) / PACKED_TALL * PACKED_TALL;
}

INLINE int64_t packed_panels(const PackedWeight *w) { return (w->out_features + PACKED_CHANNELS - 1) / PACKED_CHANNELS; }

/* As packed_block for all rows. */
static __attribute__((unused)) void packed_product(const PackedWeight *w, const QuantizedRows *x, int64_t rows,
                                                   int64_t first_panel, int64_t last_panel, float *output,
                                                   int64_t output_stride) {
    int64_t height = packed_block_rows(x, rows);
    for (int64_t row = 0; row < rows; row += height)
        packed_block(w, x, row, rows - row < height ? rows - row : height, first_panel, last_panel, output,
                     output_stride);
}

/* One of several products of the same rows. */
typedef struct {
    const PackedWeight *weight;
    float *output;
    int64_t stride;
} PackedProduct;

/* Panels that a thread takes at a time: few enough for threads to end together, and no less than 32 KB. */
static int64_t packed_grain(const PackedWeight *w, int64_t rows) {
    int64_t panel_bytes = packed_depth(w->in_features) * PACKED_CHANNELS * w->bits / 8;
    int64_t grain = rows > PACKED_FEW ? 2 : (PACKED_GRAIN + panel_bytes - 1) / panel_bytes;
    return grain;
}

/* Products of the same rows, called by each thread of a region; the outputs are whole behind it. */
static __attribute__((unused)) void share_packed(const PackedProduct *products, int64_t count, const QuantizedRows *x,
                                                 int64_t rows, Team *team) {
    int64_t height = packed_block_rows(x, rows), blocks = height ? (rows + height - 1) / height : 0, tasks = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t grain = packed_grain(products[i].weight, rows);
        tasks += (packed_panels(products[i].weight) + grain - 1) / grain;
    }
    for (int64_t task; (task = team_next(team)) < blocks * tasks;) {
        int64_t row = task / tasks * height, at = task % tasks, i = 0, grain, chunks;
        for (;; i++, at -= chunks) {
            grain = packed_grain(products[i].weight, rows);
            chunks = (packed_panels(products[i].weight) + grain - 1) / grain;
            if (at < chunks) break;
        }
        int64_t panels = packed_panels(products[i].weight), last = (at + 1) * grain < panels ? (at + 1) * grain : panels;
        packed_block(products[i].weight, x, row, rows - row < height ? rows - row : height, at * grain, last,
                     products[i].output, products[i].stride);
    }
    team_wait(team);
}
