/* The inner loops of attention in floats: for few query rows straight on the codes (`direct_*`), for many on tiles of
 * decoded values (`gemm_rows`); and the exponential. integer.h has those in whole numbers. */

/* One copy of a function: GCC makes more of them for constant arguments, and compiles for longer. */
#ifdef __clang__
#define OUTLINE static __attribute__((noinline))
#else
#define OUTLINE static __attribute__((noinline, noclone))
#endif

/* The widest vectors that the machine computes with at once. */
#ifdef __AVX512F__
enum { LANES = 16, ROW_STEP = 12, PANEL = 32, OUTPUT_VECTORS = 4 };
typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef float f32v_any __attribute__((vector_size(64), aligned(4), may_alias));
INLINE f32v max_lanes(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f32v select_lanes(i32v where, f32v yes, f32v no) {
    return (f32v)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)where), (__m512)no, (__m512)yes);
}
INLINE int all_true(i32v where) { return _mm512_movepi32_mask((__m512i)where) == 0xffff; }
INLINE float sum_of_lanes(f32v x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float max_of_lanes(f32v x) { return _mm512_reduce_max_ps((__m512)x); }
#else
enum { LANES = 8, ROW_STEP = 6, PANEL = 16, OUTPUT_VECTORS = 3 };
typedef f32x8 f32v;
typedef i32x8 i32v;
typedef uint32_t u32v __attribute__((vector_size(32)));
typedef f32x8_any f32v_any;
INLINE f32v max_lanes(f32v a, f32v b) { return max_f32(a, b); }
INLINE f32v select_lanes(i32v where, f32v yes, f32v no) { return select_f32(where, yes, no); }
INLINE int all_true(i32v where) {
    int32_t all = -1;
    for (int i = 0; i < LANES; i++) all &= where[i];
    return all != 0;
}
INLINE float sum_of_lanes(f32v x) { return sum_of(x); }
INLINE float max_of_lanes(f32v x) { return max_of(x); }
#endif
/* ROW_STEP rows times PANEL columns are the register tile of gemm_rows: all its sums, a row of b and one element of a
 * fit the registers. */
INLINE f32v all_lanes(float x) { return x - (f32v){0}; }
INLINE f32v load_lanes(const float *from) { return *(const f32v_any *)from; }
INLINE void store_lanes(float *to, f32v x) { *(f32v_any *)to = x; }
INLINE i32v lane_numbers(void) {
    i32v numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

/* Vectors of codes by load_codes: `codes[0]`, and for int4 in `codes[1]` those of the second half of the row. Codes of
 * e4m3fn come as 2^-8 of their value (E4M3_UNIT): that factor belongs to the other operand. */
#define E4M3_UNIT 256.0f
INLINE void load_codes(const void *from, int kind, f32v codes[2]) {
#ifdef __AVX512F__
    __m512 x;
    if (kind == KIND_FLOAT32) {
        x = _mm512_loadu_ps(from);
    } else if (kind == KIND_INT8) {
        x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
    } else if (kind == KIND_BFLOAT16) {
        x = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)), 16);
    } else if (kind == KIND_FLOAT16) {
        x = _mm512_cvtph_ps(_mm256_loadu_si256(from));
    } else if (kind == KIND_INT4) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from)), offset = _mm512_set1_epi32(8);
        x = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), offset));
        codes[1] = (f32v)_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(bytes, 4), offset));
    } else if (kind == KIND_FLOAT8_E5M2) {
        x = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(from)), 8));
    } else { /* as in load_fp8 */
        __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(from)), 7);
        __m256i largest = _mm256_set1_epi16(0x3f80);
        halves = _mm256_and_si256(halves, _mm256_set1_epi16((short)0xbfff));
        __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(halves, largest), largest);
        x = _mm512_cvtph_ps(_mm256_or_si256(halves, _mm256_slli_epi16(is_nan, 14)));
    }
    codes[0] = (f32v)x;
#else
    if (kind == KIND_INT4)
        load_int4(from, &codes[0], &codes[1]);
    else
        codes[0] = kind == KIND_FLOAT8_E4M3 ? load_fp8(from, kind, 1) : load_as_f32(from, kind);
#endif
}

/* 2^x for x <= 0, within 2 ulp; 0 below 2^-126, so that -inf gives 0. Minimax polynomial of 2^f on [-1/2, 1/2]. */
INLINE f32v exp2_of(f32v x) {
    f32v bounded = max_lanes(x, all_lanes(-127.0f));
#ifdef __AVX512F__
    f32v whole = (f32v)_mm512_roundscale_ps((__m512)bounded, 8);
    f32v f = bounded - whole;
#else
    f32v shifted = bounded + all_lanes(12582912.0f);
    f32v f = bounded - (shifted - all_lanes(12582912.0f));
#endif
    f32v p = all_lanes(1.534581128e-4f);
    p = p * f + all_lanes(1.339993121e-3f);
    p = p * f + all_lanes(9.61848896e-3f);
    p = p * f + all_lanes(5.550328777e-2f);
    p = p * f + all_lanes(2.402264689e-1f);
    p = p * f + all_lanes(6.931472057e-1f);
    p = p * f + all_lanes(1.0f);
#ifdef __AVX512F__
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return (f32v)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
#else
    u32v exponent = (u32v)shifted << 23; /* the low bits of `shifted` are the rounded x; those of NaN may wrap */
    return select_lanes(x < all_lanes(-126.0f), all_lanes(0.0f), (f32v)((u32v)p + exponent));
#endif
}

INLINE float exp2_of_one(float x) { return exp2_of(all_lanes(x))[0]; }

/* Sums of the elements of four vectors. */
INLINE void sum_of_four(f32v a, f32v b, f32v c, f32v d, float to[4]) {
#ifdef __AVX512F__
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 two = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
#elif defined(__AVX2__)
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    to[0] = sum_of(a), to[1] = sum_of(b), to[2] = sum_of(c), to[3] = sum_of(d);
#endif
}

/* Rows of codes of one kind, `stride` bytes apart, of `width` values. */
typedef struct {
    const char *data;
    int64_t stride, width;
} Rows;

/* Where rows lie that are wanted next: fetched meanwhile, because the loops that read them walk in columns, which no
 * hardware foresees. */
INLINE void fetch_row(Rows rows, int64_t j, int64_t bytes) {
    for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(rows.data + j * rows.stride + d);
}

/* scores[h][j] = q[h] . key[j] for `heads` rows of q. `step` keys share each load of q and `heads` rows each widened
 * key; heads * step sums fit the registers. */
INLINE void direct_scores_of(const float *q, int64_t q_stride, Rows key, int64_t keys, float *scores,
                             int64_t scores_stride, Rows ahead, const int kind, const int heads, const int step) {
    const int halves = kind == KIND_INT4 ? 2 : 1;
    int64_t size = kind_size(kind), span = key.width / halves, j = 0;
    for (; j + step <= keys; j += step) {
        f32v sums[16] = {0};
        for (int t = 0; t < step; t++) fetch_row(ahead, j + t, ahead.width);
        for (int64_t d = 0; d < span; d += LANES) {
            f32v codes[4][2];
            UNROLL for (int t = 0; t < step; t++)
                load_codes(key.data + (j + t) * key.stride + d * size, kind, codes[t]);
            UNROLL for (int half = 0; half < halves; half++)
                UNROLL for (int h = 0; h < heads; h++)
                    UNROLL for (int t = 0; t < step; t++) sums[h * step + t] +=
                    load_lanes(q + h * q_stride + half * span + d) * codes[t][half];
        }
        UNROLL for (int t = 0; heads == 4 && t < step; t++) {
            float four[4];
            sum_of_four(sums[t], sums[step + t], sums[2 * step + t], sums[3 * step + t], four);
            UNROLL for (int h = 0; h < 4; h++) scores[h * scores_stride + j + t] = four[h];
        }
        UNROLL for (int h = 0; heads < 4 && h < heads; h++)
            sum_of_four(sums[4 * h], sums[4 * h + 1], sums[4 * h + 2], sums[4 * h + 3], scores + h * scores_stride + j);
    }
    for (; j < keys; j++) {
        f32v sums[4] = {0};
        for (int64_t d = 0; d < span; d += LANES) {
            f32v codes[2];
            load_codes(key.data + j * key.stride + d * size, kind, codes);
            UNROLL for (int half = 0; half < halves; half++)
                UNROLL for (int h = 0; h < heads; h++) sums[h] +=
                load_lanes(q + h * q_stride + half * span + d) * codes[half];
        }
        UNROLL for (int h = 0; h < heads; h++) scores[h * scores_stride + j] = sum_of_lanes(sums[h]);
    }
}

/* output[h][d] += sum_j weights[h][j] * value[j][d], from channel `d` on, `vectors` vectors of codes at a time while
 * they fit; returns the first channel left. */
INLINE int64_t direct_output_of(const float *weights, int64_t weights_stride, Rows value, int64_t keys, float *output,
                                int64_t output_stride, int64_t d, const int kind, const int heads, const int vectors) {
    const int halves = kind == KIND_INT4 ? 2 : 1;
    int64_t size = kind_size(kind), span = value.width / halves;
    for (; d + LANES * vectors <= span; d += LANES * vectors) {
        f32v sums[4][4][2];
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++)
                UNROLL for (int half = 0; half < halves; half++) sums[h][v][half] =
                load_lanes(output + h * output_stride + half * span + d + LANES * v);
        for (int64_t j = 0; j < keys; j++) {
            f32v codes[4][2];
            UNROLL for (int v = 0; v < vectors; v++)
                load_codes(value.data + j * value.stride + (d + LANES * v) * size, kind, codes[v]);
            UNROLL for (int h = 0; h < heads; h++)
                UNROLL for (int v = 0; v < vectors; v++)
                    UNROLL for (int half = 0; half < halves; half++) sums[h][v][half] +=
                    all_lanes(weights[h * weights_stride + j]) * codes[v][half];
        }
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++)
                UNROLL for (int half = 0; half < halves; half++)
                    store_lanes(output + h * output_stride + half * span + d + LANES * v, sums[h][v][half]);
    }
    return d;
}

/* Both of the above for any number of rows, in groups of up to four; a function per kind. */
INLINE void direct_scores(const float *q, int64_t q_stride, int64_t rows, Rows key, int64_t keys, float *scores,
                          int64_t stride, Rows ahead, const int kind) {
    for (int64_t taken; rows > 0; rows -= taken, q += taken * q_stride, scores += taken * stride) {
        taken = rows >= 4 ? 4 : rows;
        switch (taken) {
        case 4:
            direct_scores_of(q, q_stride, key, keys, scores, stride, ahead, kind, 4, LANES == 16 ? 4 : 3);
            break;
        case 3: direct_scores_of(q, q_stride, key, keys, scores, stride, ahead, kind, 3, 4); break;
        case 2: direct_scores_of(q, q_stride, key, keys, scores, stride, ahead, kind, 2, 4); break;
        default: direct_scores_of(q, q_stride, key, keys, scores, stride, ahead, kind, 1, 4);
        }
    }
}

INLINE void direct_output(const float *weights, int64_t stride, int64_t rows, Rows value, int64_t keys, float *output,
                          int64_t output_stride, const int kind) {
    const int vectors = kind == KIND_INT4 ? OUTPUT_VECTORS / 2 : OUTPUT_VECTORS;
    for (int64_t taken; rows > 0; rows -= taken, weights += taken * stride, output += taken * output_stride) {
        int64_t d = 0;
        taken = rows >= 4 ? 4 : rows;
        switch (taken) {
        case 4:
            if (vectors > 1)
                d = direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 4, vectors);
            direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 4, 1);
            break;
        case 3:
            if (vectors > 1)
                d = direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 3, vectors);
            direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 3, 1);
            break;
        case 2:
            d = direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 2, 4);
            direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 2, 1);
            break;
        default:
            d = direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 1, 4);
            direct_output_of(weights, stride, value, keys, output, output_stride, d, kind, 1, 1);
        }
    }
}

/* Codes as floats [keys][padded], zeros behind `width`. */
INLINE void decode_rows_of(Rows from, int64_t keys, int64_t padded, float *tile, const int kind) {
    int64_t span = kind == KIND_INT4 ? from.width / 2 : from.width, size = kind_size(kind);
    for (int64_t j = 0; j < keys; j++) {
        const char *row = from.data + j * from.stride;
        float *to = tile + j * padded;
        int64_t d = 0;
        for (; d + LANES <= span; d += LANES) {
            f32v codes[2];
            load_codes(row + d * size, kind, codes);
            if (kind == KIND_FLOAT8_E4M3) codes[0] *= all_lanes(E4M3_UNIT);
            store_lanes(to + d, codes[0]);
            if (kind == KIND_INT4) store_lanes(to + span + d, codes[1]);
        }
        for (; d < span; d += 8) {
            int64_t count = span - d < 8 ? span - d : 8;
            f32x8 low, high;
            if (kind == KIND_INT4) {
                load_few_int4(row + d, count, &low, &high);
                for (int64_t i = 0; i < count; i++) to[d + i] = low[i], to[span + d + i] = high[i];
            } else {
                store_f32(to + d, count == 8 ? load_as_f32(row + d * size, kind)
                                             : load_few_as_f32(row + d * size, count, kind));
            }
        }
        for (d = from.width; d < padded; d++) to[d] = 0.0f;
    }
}

/* Floats [keys][padded] as panels [keys / PANEL][padded][PANEL], so that gemm_rows reads K transposed; zeros beyond the
 * last key. */
OUTLINE void transpose_keys(const float *tile, int64_t keys, int64_t padded, float *panels) {
    for (int64_t first = 0; first < (keys + PANEL - 1) / PANEL * PANEL; first += 8) {
        float *panel = panels + first / PANEL * PANEL * padded + first % PANEL;
        for (int64_t d = 0; d < padded; d += 8) {
            f32x8 rows[8];
            for (int t = 0; t < 8; t++)
                rows[t] = first + t < keys ? load_f32(tile + (first + t) * padded + d) : splat(0.0f);
            transpose(rows);
            for (int i = 0; i < 8; i++) store_f32(panel + (d + i) * PANEL, rows[i]);
        }
    }
}

/* c[ROW_STEP][PANEL] = (or +=) a[ROW_STEP][depth] * b[depth][PANEL]. */
OUTLINE void gemm_rows(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, float *c,
                      int64_t c_stride, int accumulate) {
    f32v sums[ROW_STEP][2];
    UNROLL for (int r = 0; r < ROW_STEP; r++)
        UNROLL for (int v = 0; v < 2; v++)
            sums[r][v] = accumulate ? load_lanes(c + r * c_stride + LANES * v) : all_lanes(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        f32v b0 = load_lanes(b + k * b_stride), b1 = load_lanes(b + k * b_stride + LANES);
        UNROLL for (int r = 0; r < ROW_STEP; r++) {
            f32v one = all_lanes(a[r * a_stride + k]);
            sums[r][0] += one * b0;
            sums[r][1] += one * b1;
        }
    }
    UNROLL for (int r = 0; r < ROW_STEP; r++)
        UNROLL for (int v = 0; v < 2; v++) store_lanes(c + r * c_stride + LANES * v, sums[r][v]);
}
