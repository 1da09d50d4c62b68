/* linear_w8a8 and linear_w8a8_dynamic: int8 codes times int8 codes, exact in int32; README.md has the semantics.
 *
 * vpdpbusd takes unsigned times signed codes: weights get 128 added, and 128 times the sum of a row's codes is taken off
 * again. AVX2 widens codes to int16 for pmaddwd, exact for every code, -128 included. */

#if !WIDE && defined(__AVX2__)
typedef int16_t XCode;
enum { WORD_CODES = 2 };
#else
typedef int8_t XCode;
enum { WORD_CODES = 4 };
#endif

/* One row of x as codes, zeros behind the last; returns whether there is NaN, which has no code and becomes 0. */
static int round_to_codes(const LinearArguments *a, int64_t row, float scale, float offset) {
    XCode *codes = (XCode *)(a->scratch + row * a->stride);
    i32x8 sums = {0}, nans = {0};
    for (int64_t k = 0; k < a->in_features; k += 8) {
        f32x8 x = x_at(a, row, k) / splat(scale) + splat(offset);
        i32x8 is_number = x == x;
        i32x8 whole = __builtin_convertvector(round_to_code(select_f32(is_number, x, splat(0.0f))), i32x8);
        if (a->in_features - k < 8) /* what padding gets from the offset is no code */
            for (int64_t i = a->in_features - k; i < 8; i++) whole[i] = 0, is_number[i] = -1;
        sums += whole, nans |= ~is_number;
        for (int i = 0; i < 8; i++) codes[k + i] = (XCode)whole[i];
    }
    int64_t end = (a->in_features + 7) / 8 * 8;
    memset(codes + end, 0, (size_t)(a->stride - end * (int64_t)sizeof(XCode)));
    int32_t sum = 0, has_nan = 0;
    for (int i = 0; i < 8; i++) sum += sums[i], has_nan |= nans[i];
    a->row_sum[row] = sum;
    return has_nan;
}

static void prepare_static(const LinearArguments *a, int64_t row) {
    int has_nan = round_to_codes(a, row, *(const float *)a->input_scale, *(const float *)a->input_offset);
    a->row_scale[row] = has_nan ? NAN : 1.0f;
}

static void prepare_dynamic(const LinearArguments *a, int64_t row) {
    a->row_scale[row] = dynamic_scale(a, row, 127.0f);
    round_to_codes(a, row, a->row_scale[row], 0.0f);
}

/* 8 sums, of which those past the last channel have no meaning, with the bias that is in codes. */
static f32x8 integer_total(const LinearArguments *a, int64_t row, int64_t column, const void *sums) {
    u32x8 total;
    memcpy(&total, sums, 32);
    if (WIDE) total -= 128u * (uint32_t)a->row_sum[row];
    if (a->quant_bias) {
        int64_t left = a->out_features - column;
        u32x8 bias = {0};
        memcpy(&bias, (const int32_t *)a->quant_bias + column, left < 8 ? (size_t)(4 * left) : 32);
        total += bias;
    }
    return __builtin_convertvector((i32x8)total, f32x8);
}

#if WIDE
enum { CHUNK = 64 };
typedef __m512i Products;
#define ZERO_PRODUCTS _mm512_setzero_si512()
INLINE __m512i load_weights(const int8_t *from) {
    return _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128));
}
INLINE __m512i multiply_add(__m512i sums, const XCode *x, __m512i weights) {
    return _mm512_dpbusd_epi32(sums, weights, _mm512_loadu_si512(x));
}
/* Sums of unsigned weights may wrap on the way, _mm512_reduce_add_epi32 must not. */
INLINE int32_t sum_of_products(__m512i x) {
    u32x8 half = (u32x8)_mm512_castsi512_si256(x) + (u32x8)_mm512_extracti64x4_epi64(x, 1);
    uint32_t sum = 0;
    UNROLL for (int i = 0; i < 8; i++) sum += half[i];
    return (int32_t)sum;
}
#elif defined(__AVX2__)
enum { CHUNK = 16 };
typedef __m256i Products;
#define ZERO_PRODUCTS _mm256_setzero_si256()
INLINE __m256i load_weights(const int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
INLINE __m256i multiply_add(__m256i sums, const XCode *x, __m256i weights) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)x), weights));
}
INLINE int32_t sum_of_products(__m256i x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
#endif

/* `rows` rows of x times `columns` rows of the weight. */
#ifdef __AVX2__
INLINE void integer_dot_tile(const LinearArguments *a, int64_t row, int64_t column, const int rows, const int columns,
                             int32_t *output) {
    int64_t stride = a->stride, whole = a->in_features / CHUNK * CHUNK;
    const char *x = a->scratch + row * stride;
    const int8_t *w = (const int8_t *)a->weight + column * a->in_features;
    Products sums[8];
    UNROLL for (int i = 0; i < rows * columns; i++) sums[i] = ZERO_PRODUCTS;
    for (int64_t k = 0; k < whole; k += CHUNK)
        UNROLL for (int c = 0; c < columns; c++) {
            Products codes = load_weights(w + c * a->in_features + k);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r * columns + c] = multiply_add(sums[r * columns + c], (const XCode *)(x + r * stride) + k, codes);
        }
    if (whole < a->in_features)
        UNROLL for (int c = 0; c < columns; c++) {
            int8_t tail[CHUNK] = {0};
            memcpy(tail, w + c * a->in_features + whole, (size_t)(a->in_features - whole));
            UNROLL for (int r = 0; r < rows; r++)
                sums[r * columns + c] =
                    multiply_add(sums[r * columns + c], (const XCode *)(x + r * stride) + whole, load_weights(tail));
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) output[r * DOT_GRAIN + c] = sum_of_products(sums[r * columns + c]);
}
#else
/* In a form that compilers vectorise, on NEON with sdot. */
INLINE void integer_dot_tile(const LinearArguments *a, int64_t row, int64_t column, const int rows, const int columns,
                             int32_t *output) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            const XCode *x = (const XCode *)(a->scratch + (row + r) * a->stride);
            const int8_t *w = (const int8_t *)a->weight + (column + c) * a->in_features;
            int32_t sum = 0;
            for (int64_t k = 0; k < a->in_features; k++) sum += x[k] * w[k];
            output[r * DOT_GRAIN + c] = sum;
        }
}
#endif

static void integer_dot(const LinearArguments *a, int64_t row, int64_t rows, int64_t first, int64_t last, void *sums) {
    for (int64_t r = 0; r < rows;) {
        int32_t *output = (int32_t *)sums + r * DOT_GRAIN - first;
        int64_t column = first;
        if (rows - r >= DOT_ROWS) {
            for (; column + 2 <= last; column += 2) integer_dot_tile(a, row + r, column, 4, 2, output + column);
            for (; column < last; column++) integer_dot_tile(a, row + r, column, 4, 1, output + column);
            r += DOT_ROWS;
        } else {
            for (; column + 4 <= last; column += 4) integer_dot_tile(a, row + r, column, 1, 4, output + column);
            for (; column < last; column++) integer_dot_tile(a, row + r, column, 1, 1, output + column);
            r += 1;
        }
    }
}

#if WIDE
/* Rows become columns, in words. */
INLINE void transpose_words(__m512i rows[16]) {
    __m512i a[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    /* now rows[4 * i + j] has in its 4 quarters q the words 4 * q + j of the rows 4 * i to 4 * i + 3 */
    UNROLL for (int j = 0; j < 4; j++) {
        a[j] = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x44);
        a[j + 4] = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xee);
        a[j + 8] = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x44);
        a[j + 12] = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xee);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        rows[j] = _mm512_shuffle_i32x4(a[j], a[j + 8], 0x88);
        rows[j + 4] = _mm512_shuffle_i32x4(a[j], a[j + 8], 0xdd);
        rows[j + 8] = _mm512_shuffle_i32x4(a[j + 4], a[j + 12], 0x88);
        rows[j + 12] = _mm512_shuffle_i32x4(a[j + 4], a[j + 12], 0xdd);
    }
}

/* Weights plus 128, zeros as codes where there are none: [depth / 4][32 channels][4]. */
static void integer_pack(const LinearArguments *a, int64_t column, int64_t start, int64_t depth, void *panel) {
    for (int64_t k = 0; k < depth; k += CHUNK)
        for (int half = 0; half < 2; half++) {
            __m512i words[LANES];
            int64_t left = a->in_features - start - k;
            __mmask64 present = left >= CHUNK ? ~0ull : (1ull << left) - 1;
            for (int i = 0; i < LANES; i++) {
                int64_t n = column + LANES * half + i;
                const int8_t *from = (const int8_t *)a->weight + n * a->in_features + start + k;
                __m512i codes = n < a->out_features ? _mm512_maskz_loadu_epi8(present, from) : _mm512_setzero_si512();
                words[i] = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
            }
            transpose_words(words);
            for (int i = 0; i < LANES; i++)
                _mm512_storeu_si512((int32_t *)panel + (k / 4 + i) * PANEL_COLUMNS + LANES * half, words[i]);
        }
}

static void integer_tile(const char *x, int64_t stride, const void *panel, int64_t depth, void *sums_at) {
    __m512i sums[ROW_TILE][2];
    int32_t *to = sums_at;
    const int32_t *w = panel;
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++) sums[r][v] = _mm512_loadu_si512(to + r * BLOCK_COLUMNS + LANES * v);
    for (int64_t k = 0; k < depth; k++) {
        __m512i w0 = _mm512_loadu_si512(w + k * PANEL_COLUMNS), w1 = _mm512_loadu_si512(w + k * PANEL_COLUMNS + LANES);
        UNROLL for (int r = 0; r < ROW_TILE; r++) {
            int32_t word;
            memcpy(&word, x + r * stride + 4 * k, 4);
            __m512i codes = _mm512_set1_epi32(word);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, codes);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, codes);
        }
    }
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++) _mm512_storeu_si512(to + r * BLOCK_COLUMNS + LANES * v, sums[r][v]);
}
#elif defined(__AVX2__)
/* Weights as int16 [depth / 2][16 channels][2], zeros where there are none. */
static void integer_pack(const LinearArguments *a, int64_t column, int64_t start, int64_t depth, void *panel) {
    for (int64_t k = 0; k < depth; k += CHUNK)
        for (int half = 0; half < 2; half++) {
            __m128i rows[8], a1[8], a2[8];
            for (int i = 0; i < 8; i++) {
                int64_t n = column + 8 * half + i, count = a->in_features - start - k;
                const int8_t *from = (const int8_t *)a->weight + n * a->in_features + start + k;
                int8_t tail[CHUNK] = {0};
                if (n < a->out_features && count < CHUNK) memcpy(tail, from, (size_t)count);
                rows[i] = n < a->out_features && count >= CHUNK ? _mm_loadu_si128((const __m128i *)from)
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
                int16_t *to = (int16_t *)panel + (k / 2 + 2 * j) * 2 * PANEL_COLUMNS + 16 * half;
                __m128i one = _mm_unpacklo_epi64(a2[j], a2[j + 4]), two = _mm_unpackhi_epi64(a2[j], a2[j + 4]);
                _mm256_storeu_si256((__m256i *)to, _mm256_cvtepi8_epi16(one));
                _mm256_storeu_si256((__m256i *)(to + 2 * PANEL_COLUMNS), _mm256_cvtepi8_epi16(two));
            }
        }
}

static void integer_tile(const char *x, int64_t stride, const void *panel, int64_t depth, void *sums_at) {
    __m256i sums[ROW_TILE][2];
    int32_t *to = sums_at;
    const int32_t *w = panel;
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++)
            sums[r][v] = _mm256_loadu_si256((const __m256i *)(to + r * BLOCK_COLUMNS + 8 * v));
    for (int64_t k = 0; k < depth; k++) {
        __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + k * PANEL_COLUMNS));
        __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + k * PANEL_COLUMNS + 8));
        UNROLL for (int r = 0; r < ROW_TILE; r++) {
            int32_t pair;
            memcpy(&pair, x + r * stride + 4 * k, 4);
            __m256i pairs = _mm256_set1_epi32(pair);
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pairs, w0));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pairs, w1));
        }
    }
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++)
            _mm256_storeu_si256((__m256i *)(to + r * BLOCK_COLUMNS + 8 * v), sums[r][v]);
}
#else
#define integer_pack NULL
#define integer_tile NULL
#endif

static const LinearKernel W8A8 = {WORD_CODES,  sizeof(XCode), prepare_static, integer_dot, integer_pack, integer_tile,
                                  integer_total},
                          W8A8_DYNAMIC = {WORD_CODES,   sizeof(XCode), prepare_dynamic, integer_dot,
                                          integer_pack, integer_tile,  integer_total};

EXPORT int linear_w8a8(const LinearArguments *arguments) { return linear(arguments, &W8A8); }
EXPORT int linear_w8a8_dynamic(const LinearArguments *arguments) { return linear(arguments, &W8A8_DYNAMIC); }
