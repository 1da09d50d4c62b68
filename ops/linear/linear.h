/* What the linear kernels share: arguments, the scratch for x, and the way from sums to outputs.
 *
 * x is quantized or widened once, into rows of scratch. Few rows then stream the weights once (`dot`); many rows share
 * weights packed into panels (`pack` and `tile`), a block of which stays in cache. integer.c and float.c have these. */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define WIDE 1 /* vectors of 16 words, and vpdpbusd */
#else
#define WIDE 0
#endif

enum {
    LANES = WIDE ? 16 : 8,      /* words in a vector */
    ROW_TILE = WIDE ? 12 : 6,   /* ROW_TILE x PANEL_COLUMNS sums live in registers */
    PANEL_COLUMNS = 2 * LANES,
    BLOCK_ROWS = 384,
    BLOCK_COLUMNS = 64,
    BLOCK_DEPTH = 256,          /* words of the depth, of which each holds one float, two int16 or four int8 */
    DOT_ROWS = 4,               /* rows of x that share a load of a weight */
    DOT_LIMIT = 16,             /* up to so many rows `dot` is faster */
    DOT_GRAIN = 32,             /* output channels that a thread takes at a time */
    SMALL = 1 << 18,            /* products below which a second thread costs more than it brings */
    SMALL_X = 1 << 14,          /* values of x, likewise */
};

typedef struct {
    /* addresses; 0 for what is absent */
    int64_t x, weight, output, bias, quant_bias, weight_scale, weight_zero, input_scale, input_offset;
    /* element types, and for the rest numbers */
    int64_t kind, weight_kind, scale_kind, bias_kind, rows, in_features, out_features, num_groups;
    int64_t scale_stride, threads;
    /* set in C: of each row of x its codes or floats, with zeros behind the last; its scale; the sum of its codes */
    char *scratch;
    int64_t stride;
    float *row_scale;
    int32_t *row_sum;
} LinearArguments;

typedef struct {
    int word_values, value_size; /* how x lies in scratch: values in a word of the depth, and bytes of each */
    void (*prepare)(const LinearArguments *a, int64_t row);
    /* sums[rows][DOT_GRAIN] of all rows, at most DOT_LIMIT, and the output channels `first` to `last` */
    void (*dot)(const LinearArguments *a, int64_t row, int64_t rows, int64_t first, int64_t last, void *sums);
    /* weights of PANEL_COLUMNS channels as words [depth][PANEL_COLUMNS]; start and depth count in values */
    void (*pack)(const LinearArguments *a, int64_t column, int64_t start, int64_t depth, void *panel);
    /* sums[ROW_TILE][BLOCK_COLUMNS] += x[ROW_TILE][depth] * panel; depth counts in words */
    void (*tile)(const char *x, int64_t stride, const void *panel, int64_t depth, void *sums);
    f32x8 (*total)(const LinearArguments *a, int64_t row, int64_t column, const void *sums);
} LinearKernel;

INLINE f32x8 load_up_to_8(const void *from, int64_t count, int kind) {
    return count >= 8 ? load_as_f32(from, kind) : load_few_as_f32(from, count, kind);
}

/* 8 elements of a kind that is known only now. */
static f32x8 load_any(int64_t address, int64_t index, int64_t count, int64_t kind) {
    const char *from = (const char *)address + index * kind_size((int)kind);
    switch (kind) {
    case KIND_FLOAT32: return load_up_to_8(from, count, KIND_FLOAT32);
    case KIND_BFLOAT16: return load_up_to_8(from, count, KIND_BFLOAT16);
    default: return load_up_to_8(from, count, KIND_FLOAT16);
    }
}

static void store_any(int64_t address, int64_t index, f32x8 x, int64_t count, int64_t kind) {
    char *to = (char *)address + index * kind_size((int)kind);
    switch (kind) {
    case KIND_FLOAT32: store_few_as(to, x, count, KIND_FLOAT32); break;
    case KIND_BFLOAT16: store_few_as(to, x, count, KIND_BFLOAT16); break;
    default: store_few_as(to, x, count, KIND_FLOAT16);
    }
}

/* A row of x as floats, `count` values from k on. */
INLINE f32x8 x_at(const LinearArguments *a, int64_t row, int64_t k) {
    return load_any(a->x, row * a->in_features + k, a->in_features - k, a->kind);
}

/* max|x| / largest of a row, at least SMALLEST_SCALE of ops/shared/codes.py; NaN if the row has one. */
static float dynamic_scale(const LinearArguments *a, int64_t row, float largest_code) {
    f32x8 largest = splat(0.0f);
    i32x8 is_nan = {0};
    for (int64_t k = 0; k < a->in_features; k += 8) {
        f32x8 x = x_at(a, row, k);
        is_nan |= x != x;
        largest = max_f32(largest, max_f32(x, -x));
    }
    for (int i = 0; i < 8; i++)
        if (is_nan[i]) return NAN;
    float scale = max_of(largest) / largest_code;
    return scale > 0x1p-23f ? scale : 0x1p-23f;
}

/* Whether weights are scaled as they are decoded, rather than sums. */
INLINE int scales_weights(const LinearArguments *a) { return a->num_groups > 1 || a->weight_zero; }

/* Sums of one row times scales, with the bias: the float operations of the reference in its order. */
static void finish(const LinearArguments *a, const LinearKernel *kernel, int64_t row, int64_t column, int64_t columns,
                   const char *sums) {
    f32x8 row_scale = splat(a->row_scale[row]);
    for (int64_t c = 0; c < columns; c += 8) {
        int64_t left = columns - c, count = left < 8 ? left : 8;
        f32x8 total = kernel->total(a, row, column + c, sums + 4 * c), scale = row_scale;
        if (!scales_weights(a)) {
            f32x8 of_columns = a->scale_stride ? load_any(a->weight_scale, column + c, left, a->scale_kind)
                                               : splat(load_any(a->weight_scale, 0, 1, a->scale_kind)[0]);
            scale = of_columns * row_scale;
        }
        total = rounded_product(total, scale);
        if (a->bias) total += load_any(a->bias, column + c, left, a->bias_kind);
        store_any(a->output, row * a->out_features + column + c, total, count, a->kind);
    }
}

typedef struct {
    char panels[4 * BLOCK_COLUMNS * BLOCK_DEPTH];
    char sums[4 * BLOCK_ROWS * BLOCK_COLUMNS];
} LinearScratch;

/* `rows` rows from `row` times up to BLOCK_COLUMNS output channels from `column`. */
static void gemm_block(const LinearArguments *a, const LinearKernel *kernel, int64_t row, int64_t rows, int64_t column,
                       LinearScratch *scratch) {
    int64_t columns = a->out_features - column < BLOCK_COLUMNS ? a->out_features - column : BLOCK_COLUMNS;
    int64_t unit = LANES * kernel->word_values, end = (a->in_features + unit - 1) / unit * unit;
    int64_t block_depth = BLOCK_DEPTH * kernel->word_values;
    memset(scratch->sums, 0, (size_t)(4 * BLOCK_COLUMNS * ((rows + ROW_TILE - 1) / ROW_TILE * ROW_TILE)));
    for (int64_t start = 0; start < end; start += block_depth) {
        int64_t depth = end - start < block_depth ? end - start : block_depth;
        const char *x = a->scratch + row * a->stride + start * kernel->value_size;
        for (int64_t c = 0; c < columns; c += PANEL_COLUMNS) {
            char *panel = scratch->panels + 4 * c * BLOCK_DEPTH;
            kernel->pack(a, column + c, start, depth, panel);
            for (int64_t r = 0; r < rows; r += ROW_TILE) /* past the last row lie values of no meaning */
                kernel->tile(x + r * a->stride, a->stride, panel, depth / kernel->word_values,
                             scratch->sums + 4 * (r * BLOCK_COLUMNS + c));
        }
    }
    for (int64_t r = 0; r < rows; r++)
        finish(a, kernel, row + r, column, columns, scratch->sums + 4 * r * BLOCK_COLUMNS);
}

/* All blocks of the output; 1 if there is no memory for scratch. */
static int gemm(const LinearArguments *a, const LinearKernel *kernel, int threads) {
    int64_t row_blocks = (a->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t column_blocks = (a->out_features + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    int64_t block_rows = ((a->rows + row_blocks - 1) / row_blocks + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    int failed = 0;
    (void)threads; /* unused where the compiler has no OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        LinearScratch *scratch = malloc(sizeof(LinearScratch));
        if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < row_blocks * column_blocks; block++) {
            int64_t row = block / column_blocks * block_rows, column = block % column_blocks * BLOCK_COLUMNS;
            int64_t rows = a->rows - row < block_rows ? a->rows - row : block_rows;
            if (scratch && rows > 0) gemm_block(a, kernel, row, rows, column, scratch);
        }
        free(scratch);
    }
    return failed;
}

static void dot_columns(const LinearArguments *a, const LinearKernel *kernel, int64_t first) {
    int64_t last = first + DOT_GRAIN < a->out_features ? first + DOT_GRAIN : a->out_features;
    char sums[4 * DOT_LIMIT * DOT_GRAIN];
    for (int64_t row = 0; row < a->rows; row += DOT_LIMIT) {
        int64_t rows = a->rows - row < DOT_LIMIT ? a->rows - row : DOT_LIMIT;
        kernel->dot(a, row, rows, first, last, sums);
        for (int64_t r = 0; r < rows; r++)
            finish(a, kernel, row + r, first, last - first, sums + 4 * r * DOT_GRAIN);
    }
}

/* Returns 0, or 1 if there is not enough memory. */
static int linear(const LinearArguments *given, const LinearKernel *kernel) {
    LinearArguments arguments, *a = &arguments;
    memcpy(a, given, offsetof(LinearArguments, scratch));
    int64_t padded_rows = a->rows + ROW_TILE - 1, bytes = a->in_features * kernel->value_size;
    /* an odd multiple of 64 bytes keeps the rows out of each other's cache sets; a unit of packing takes up to 64 values */
    a->stride = (bytes + 64 * kernel->value_size - 1) / 64 / kernel->value_size * 64 * kernel->value_size;
    if (a->rows > 1 && a->stride / 64 % 2 == 0) a->stride += 64;
    char *memory = malloc((size_t)(padded_rows * (a->stride + 8) + 64));
    if (!memory) return 1;
    a->scratch = memory + (64 - (uintptr_t)memory % 64) % 64;
    a->row_scale = (float *)(a->scratch + padded_rows * a->stride);
    a->row_sum = (int32_t *)(a->row_scale + padded_rows);
    int threads = a->rows * a->in_features * a->out_features < SMALL ? 1 : (int)a->threads, failed = 0;
    int preparing = a->rows * a->in_features < SMALL_X ? 1 : threads;
    (void)threads, (void)preparing;
#pragma omp parallel for num_threads(preparing) if (preparing > 1) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) kernel->prepare(a, row);
    if (a->rows > DOT_LIMIT && kernel->tile)
        failed = gemm(a, kernel, threads);
    else {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
        for (int64_t first = 0; first < a->out_features; first += DOT_GRAIN) dot_columns(a, kernel, first);
    }
    free(memory);
    return failed;
}
