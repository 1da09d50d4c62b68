/* linear_w8a8: int8 activations times int8 weights, exact in int32; README.md has the semantics.
 *
 * Codes are widened to int16, and pmaddwd multiplies and adds pairs: exact for every code, -128 included. Few rows
 * stream the weights once (`dot_rows`); many rows share weights packed into panels (`gemm_block`). */

enum {
    DOT_ROWS = 4,    /* rows of x that share a load of a weight */
    DOT_LIMIT = 12,  /* up to so many rows dot_rows is faster */
    DOT_GRAIN = 32,  /* output channels that a thread takes at a time */
    SMALL = 1 << 19, /* products below which a second thread costs more than it brings */
    SMALL_X = 1 << 14, /* values of x, likewise */
    LANES = 16,
    ROW_TILE = 6,
    PANEL_COLUMNS = 16,
    BLOCK_ROWS = 384,
    BLOCK_COLUMNS = 64,
    BLOCK_DEPTH = 256,
};

typedef struct {
    int64_t x, weight, output, quant_bias, deq_scale, kind, rows, depth, columns, threads;
    double input_scale, input_offset;
    int16_t *codes;      /* of x: [rows + ROW_TILE - 1][code_stride], allocated here */
    int64_t code_stride; /* zeros behind the last code of a row */
} LinearArguments;

/* One row of x as int16 codes, zeros behind the last. */
INLINE void quantize_row(const LinearArguments *a, int64_t row, int kind) {
    const char *x = (const char *)a->x + row * a->depth * kind_size(kind);
    int16_t *codes = a->codes + row * a->code_stride;
    f32x8 scale = splat((float)a->input_scale), offset = splat((float)a->input_offset);
    int64_t k = 0;
    for (; k < a->depth; k += 8) {
        int64_t count = a->depth - k < 8 ? a->depth - k : 8;
        const char *from = x + k * kind_size(kind);
        f32x8 values = count == 8 ? load_as_f32(from, kind) : load_few_as_f32(from, count, kind);
        f32x8 rounded = round_to_code(values / scale + offset);
#ifdef __AVX2__
        __m256i whole = _mm256_cvttps_epi32((__m256)rounded);
        _mm_storeu_si128((__m128i *)(codes + k),
                         _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#else
        for (int i = 0; i < 8; i++) codes[k + i] = (int16_t)rounded[i];
#endif
    }
    for (k = a->depth; k < a->code_stride; k++) codes[k] = 0;
}

INLINE float dequantized(const LinearArguments *a, int32_t sum, int64_t column) {
    const int32_t *bias = (const int32_t *)a->quant_bias;
    const float *scale = (const float *)a->deq_scale;
    return (float)(int32_t)((uint32_t)sum + (uint32_t)bias[column]) * scale[column];
}

#ifdef __AVX2__
INLINE __m256i load_codes16(const int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
INLINE int32_t sum_of_lanes(__m256i x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

/* `rows` rows of x times `columns` rows of the weight. */
INLINE void dot_tile(const LinearArguments *a, int64_t row, int64_t column, const int rows, const int columns) {
    int64_t stride = a->code_stride, whole = a->depth / LANES * LANES;
    const int16_t *x = a->codes + row * stride;
    const int8_t *w = (const int8_t *)a->weight + column * a->depth;
    __m256i sums[8];
    UNROLL for (int i = 0; i < rows * columns; i++) sums[i] = _mm256_setzero_si256();
    for (int64_t k = 0; k < whole; k += LANES)
        UNROLL for (int c = 0; c < columns; c++) {
            __m256i codes = load_codes16(w + c * a->depth + k);
            UNROLL for (int r = 0; r < rows; r++) {
                __m256i values = _mm256_loadu_si256((const __m256i *)(x + r * stride + k));
                sums[r * columns + c] = _mm256_add_epi32(sums[r * columns + c], _mm256_madd_epi16(values, codes));
            }
        }
    if (whole < a->depth)
        UNROLL for (int c = 0; c < columns; c++) {
            int8_t tail[LANES] = {0};
            memcpy(tail, w + c * a->depth + whole, (size_t)(a->depth - whole));
            UNROLL for (int r = 0; r < rows; r++) {
                __m256i values = _mm256_loadu_si256((const __m256i *)(x + r * stride + whole));
                sums[r * columns + c] =
                    _mm256_add_epi32(sums[r * columns + c], _mm256_madd_epi16(values, load_codes16(tail)));
            }
        }
    float *output = (float *)a->output + row * a->columns + column;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++)
            output[r * a->columns + c] = dequantized(a, sum_of_lanes(sums[r * columns + c]), column + c);
}
#else
/* The same in a form that compilers vectorise. */
INLINE void dot_tile(const LinearArguments *a, int64_t row, int64_t column, const int rows, const int columns) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            const int16_t *x = a->codes + (row + r) * a->code_stride;
            const int8_t *w = (const int8_t *)a->weight + (column + c) * a->depth;
            int32_t sum = 0;
            for (int64_t k = 0; k < a->depth; k++) sum += x[k] * (int16_t)w[k];
            ((float *)a->output)[(row + r) * a->columns + column + c] = dequantized(a, sum, column + c);
        }
}
#endif

/* All rows, a few at a time, for the output channels `first` to `last`. */
INLINE void dot_rows(const LinearArguments *a, int64_t first, int64_t last) {
    for (int64_t row = 0; row < a->rows;) {
        int64_t left = a->rows - row, column = first;
        if (left >= DOT_ROWS) {
            for (; column + 2 <= last; column += 2) dot_tile(a, row, column, 4, 2);
            for (; column < last; column++) dot_tile(a, row, column, 4, 1);
            row += DOT_ROWS;
        } else {
            for (; column + 4 <= last; column += 4) dot_tile(a, row, column, 1, 4);
            for (; column < last; column++) dot_tile(a, row, column, 1, 1);
            row += 1;
        }
    }
}

#ifdef __AVX2__
/* Weights [16 channels][depth] of one panel as int16 [depth / 2][16][2], zeros where there are none. */
static void pack_panel(const LinearArguments *a, int64_t column, int64_t start, int64_t depth, int16_t *panel) {
    for (int64_t k = 0; k < depth; k += LANES)
        for (int half = 0; half < 2; half++) {
            __m128i rows[8], a1[8], a2[8];
            for (int i = 0; i < 8; i++) {
                int64_t n = column + 8 * half + i, count = a->depth - start - k;
                const int8_t *from = (const int8_t *)a->weight + n * a->depth + start + k;
                int8_t tail[LANES] = {0};
                if (n < a->columns && count < LANES) memcpy(tail, from, (size_t)count);
                rows[i] = n < a->columns && count >= LANES ? _mm_loadu_si128((const __m128i *)from)
                                                           : _mm_loadu_si128((const __m128i *)tail);
            }
            for (int i = 0; i < 8; i += 2) { /* transposed in units of two codes */
                a1[i] = _mm_unpacklo_epi16(rows[i], rows[i + 1]);
                a1[i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    a2[i + 2 * j] = _mm_unpacklo_epi32(a1[i + j], a1[i + j + 2]);
                    a2[i + 2 * j + 1] = _mm_unpackhi_epi32(a1[i + j], a1[i + j + 2]);
                }
            for (int j = 0; j < 4; j++) {
                int16_t *to = panel + (k / 2 + 2 * j) * 2 * PANEL_COLUMNS + 16 * half;
                __m128i one = _mm_unpacklo_epi64(a2[j], a2[j + 4]), two = _mm_unpackhi_epi64(a2[j], a2[j + 4]);
                _mm256_storeu_si256((__m256i *)to, _mm256_cvtepi8_epi16(one));
                _mm256_storeu_si256((__m256i *)(to + 2 * PANEL_COLUMNS), _mm256_cvtepi8_epi16(two));
            }
        }
}

/* sums[6][16] += x[6][depth] * panel. Not static: what GCC 12 learns of the callers makes it spill the sums. */
void gemm_tile(const int16_t *x, int64_t stride, const int16_t *panel, int64_t depth, int32_t *sums_at);
void gemm_tile(const int16_t *x, int64_t stride, const int16_t *panel, int64_t depth, int32_t *sums_at) {
    __m256i sums[ROW_TILE][2];
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++)
            sums[r][v] = _mm256_loadu_si256((const __m256i *)(sums_at + r * BLOCK_COLUMNS + 8 * v));
    for (int64_t k = 0; k < depth; k += 2) {
        __m256i w0 = _mm256_loadu_si256((const __m256i *)(panel + k * PANEL_COLUMNS));
        __m256i w1 = _mm256_loadu_si256((const __m256i *)(panel + k * PANEL_COLUMNS + 16));
        UNROLL for (int r = 0; r < ROW_TILE; r++) {
            int32_t pair;
            memcpy(&pair, x + r * stride + k, 4);
            __m256i pairs = _mm256_set1_epi32(pair);
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pairs, w0));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pairs, w1));
        }
    }
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++)
            _mm256_storeu_si256((__m256i *)(sums_at + r * BLOCK_COLUMNS + 8 * v), sums[r][v]);
}

typedef struct {
    int16_t panels[BLOCK_COLUMNS * BLOCK_DEPTH];
    int32_t sums[BLOCK_ROWS * BLOCK_COLUMNS];
} GemmScratch;

/* `rows` rows from `row` times up to BLOCK_COLUMNS output channels from `column`. */
static void gemm_block(const LinearArguments *a, int64_t row, int64_t rows, int64_t column, GemmScratch *scratch) {
    int64_t columns = a->columns - column < BLOCK_COLUMNS ? a->columns - column : BLOCK_COLUMNS;
    int64_t stride = a->code_stride, end = (a->depth + LANES - 1) / LANES * LANES;
    const int16_t *x = a->codes + row * stride;
    memset(scratch->sums, 0, sizeof scratch->sums);
    for (int64_t start = 0; start < end; start += BLOCK_DEPTH) {
        int64_t depth = end - start < BLOCK_DEPTH ? end - start : BLOCK_DEPTH;
        for (int64_t c = 0; c < columns; c += PANEL_COLUMNS) {
            int16_t *panel = scratch->panels + c * BLOCK_DEPTH;
            pack_panel(a, column + c, start, depth, panel);
            for (int64_t r = 0; r < rows; r += ROW_TILE) /* past the last row lie codes of no meaning */
                gemm_tile(x + r * stride + start, stride, panel, depth, scratch->sums + r * BLOCK_COLUMNS + c);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            ((float *)a->output)[(row + r) * a->columns + column + c] =
                dequantized(a, scratch->sums[r * BLOCK_COLUMNS + c], column + c);
}
#endif

/* Returns 0, or 1 if there is not enough memory. `codes` and `code_stride` of the arguments are set here. */
EXPORT int linear_w8a8(const LinearArguments *given) {
    LinearArguments arguments, *a = &arguments;
    memcpy(a, given, offsetof(LinearArguments, codes));
    /* an odd multiple of 64 bytes keeps the rows out of each other's cache sets */
    a->code_stride = (a->depth + 31) / 32 * 32 + (a->rows > 1 && (a->depth + 31) / 32 % 2 == 0 ? 32 : 0);
    a->codes = malloc(sizeof(int16_t) * (size_t)((a->rows + ROW_TILE - 1) * a->code_stride));
    if (!a->codes) return 1;
    int threads = a->rows * a->depth * a->columns < SMALL ? 1 : (int)a->threads, failed = 0;
    int quantizing = a->rows * a->depth < SMALL_X ? 1 : threads;
    (void)threads, (void)quantizing; /* unused where the compiler has no OpenMP */
#pragma omp parallel for num_threads(quantizing) if (quantizing > 1) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) switch (a->kind) {
        case KIND_FLOAT32: quantize_row(a, row, KIND_FLOAT32); break;
        case KIND_BFLOAT16: quantize_row(a, row, KIND_BFLOAT16); break;
        default: quantize_row(a, row, KIND_FLOAT16);
        }
#ifdef __AVX2__
    if (a->rows > DOT_LIMIT) {
        int64_t row_blocks = (a->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        int64_t column_blocks = (a->columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
        int64_t block_rows = ((a->rows + row_blocks - 1) / row_blocks + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            GemmScratch *scratch = malloc(sizeof(GemmScratch));
            if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
            for (int64_t block = 0; block < row_blocks * column_blocks; block++) {
                int64_t row = block / column_blocks * block_rows, column = block % column_blocks * BLOCK_COLUMNS;
                int64_t rows = a->rows - row < block_rows ? a->rows - row : block_rows;
                if (scratch && rows > 0) gemm_block(a, row, rows, column, scratch);
            }
            free(scratch);
        }
        free(a->codes);
        return failed;
    }
#endif
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (int64_t first = 0; first < a->columns; first += DOT_GRAIN)
        dot_rows(a, first, first + DOT_GRAIN < a->columns ? first + DOT_GRAIN : a->columns);
    free(a->codes);
    return failed;
}
