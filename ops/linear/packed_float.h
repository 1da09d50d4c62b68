/* Products of a few rows with a weight in float as it lies in memory, [N][K], read once. Stands behind rounding.h. */

#if defined(__AVX512F__) && defined(__AVX512BW__)
enum { PACKED_FLOAT_LANES = 16 };
#else
enum { PACKED_FLOAT_LANES = 8 };
#endif
enum { PACKED_FLOAT_AHEAD = 1024 }; /* bytes of a row of the weight from those read to those fetched meanwhile */

typedef float PackedFloatLanes __attribute__((vector_size(4 * PACKED_FLOAT_LANES)));
typedef PackedFloatLanes PackedFloatLanesAny __attribute__((aligned(4), may_alias));

INLINE PackedFloatLanes packed_float_load(const char *from, const int kind) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    if (kind == KIND_FLOAT32) return *(const PackedFloatLanesAny *)from;
    __m256i halves = _mm256_loadu_si256((const __m256i *)from);
    if (kind == KIND_FLOAT16) return (PackedFloatLanes)_mm512_cvtph_ps(halves);
    return (PackedFloatLanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    return load_as_f32(from, kind);
#endif
}

/* The first `count` elements, zeros behind. */
INLINE PackedFloatLanes packed_float_few(const char *from, int64_t count, const int kind) {
    char padded[4 * PACKED_FLOAT_LANES] = {0};
    memcpy(padded, from, (size_t)(count * kind_size(kind)));
    return packed_float_load(padded, kind);
}

INLINE float packed_float_sum(PackedFloatLanes x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    return sum_of(x);
#endif
}

/* `rows` rows of x times `columns` rows of the weight: output[rows][stride]. */
INLINE void packed_float_tile(const char *weight, const int kind, const float *bias, int64_t in, const float *x,
                              const int rows, const int columns, float *output, int64_t stride) {
    const int size = kind == KIND_FLOAT32 ? 4 : 2, chains = rows * columns < 8 ? 2 : 1;
    PackedFloatLanes sums[16];
    int64_t whole = in / PACKED_FLOAT_LANES * PACKED_FLOAT_LANES, turn = 0;
    UNROLL for (int i = 0; i < rows * columns * chains; i++) sums[i] = (PackedFloatLanes){0};
    for (int64_t k = 0; k + 2 * PACKED_FLOAT_LANES <= whole; k += 2 * PACKED_FLOAT_LANES, turn = k)
        UNROLL for (int c = 0; c < columns; c++) {
            const char *from = weight + (c * in + k) * size;
            __builtin_prefetch(from + PACKED_FLOAT_AHEAD);
            if (2 * PACKED_FLOAT_LANES * size > 64) __builtin_prefetch(from + PACKED_FLOAT_AHEAD + 64);
            UNROLL for (int i = 0; i < 2; i++) {
                PackedFloatLanes w = packed_float_load(from + PACKED_FLOAT_LANES * size * i, kind);
                UNROLL for (int r = 0; r < rows; r++)
                    sums[(r * columns + c) * chains + i % chains] +=
                        w * *(const PackedFloatLanesAny *)(x + r * in + k + PACKED_FLOAT_LANES * i);
            }
        }
    for (int64_t k = turn; k < in; k += PACKED_FLOAT_LANES) {
        int64_t left = in - k < PACKED_FLOAT_LANES ? in - k : PACKED_FLOAT_LANES;
        UNROLL for (int c = 0; c < columns; c++) {
            PackedFloatLanes w = packed_float_few(weight + (c * in + k) * size, left, kind);
            UNROLL for (int r = 0; r < rows; r++)
                sums[(r * columns + c) * chains] +=
                    w * packed_float_few((const char *)(x + r * in + k), left, KIND_FLOAT32);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) {
            PackedFloatLanes sum = sums[(r * columns + c) * chains];
            if (chains == 2) sum += sums[(r * columns + c) * chains + 1];
            output[r * stride + c] = packed_float_sum(sum) + (bias ? bias[c] : 0.0f);
        }
}

/* The output channels `first` to `last`, some at a time; one row alone reads the weight in one stream. */
INLINE void packed_float_rows(const char *weight, const int kind, const float *bias, int64_t in, const float *x,
                              const int rows, int64_t first, int64_t last, float *output, int64_t stride) {
    const int columns = rows == 4 ? 2 : 4, size = kind == KIND_FLOAT32 ? 4 : 2;
    int64_t n = first;
    for (; n + columns <= last; n += columns)
        packed_float_tile(weight + n * in * size, kind, bias ? bias + n : NULL, in, x, rows, columns, output + n, stride);
    for (; n < last; n++)
        packed_float_tile(weight + n * in * size, kind, bias ? bias + n : NULL, in, x, rows, 1, output + n, stride);
}

INLINE void packed_float_kind(const char *weight, const int kind, const float *bias, int64_t in, const float *x,
                              int64_t rows, int64_t first, int64_t last, float *output, int64_t stride) {
    /* rows that follow find the weight of a few channels in cache */
    for (int64_t n = first, end; n < last; n = end) {
        end = n + 16 < last ? n + 16 : last;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            packed_float_rows(weight, kind, bias, in, x + r * in, 4, n, end, output + r * stride, stride);
        if (rows - r >= 2) {
            packed_float_rows(weight, kind, bias, in, x + r * in, 2, n, end, output + r * stride, stride);
            r += 2;
        }
        if (r < rows) packed_float_rows(weight, kind, bias, in, x + r * in, 1, n, end, output + r * stride, stride);
    }
}

/* output[m][n] = sum_k x[m][k] weight[n][k] + bias[n] for the output channels `first` to `last`, in float32.
 *
 * weight: [out][in] of `kind`, float32, bfloat16 or float16; bias: [out] or NULL; x: [rows][in]; meant for few rows. */
static __attribute__((unused)) void float_product(const void *weight, int64_t kind, const float *bias, int64_t in,
                                                  int64_t out, const float *x, int64_t rows, int64_t first, int64_t last,
                                                  float *output, int64_t stride) {
    (void)out;
    switch (kind) {
    case KIND_FLOAT32: packed_float_kind(weight, KIND_FLOAT32, bias, in, x, rows, first, last, output, stride); break;
    case KIND_BFLOAT16: packed_float_kind(weight, KIND_BFLOAT16, bias, in, x, rows, first, last, output, stride); break;
    default: packed_float_kind(weight, KIND_FLOAT16, bias, in, x, rows, first, last, output, stride);
    }
}

/* The same by all threads of a region that call it; the output is whole behind it. */
static __attribute__((unused)) void share_float(const void *weight, int64_t kind, const float *bias, int64_t in,
                                                int64_t out, const float *x, int64_t rows, float *output,
                                                int64_t stride) {
    int64_t grain = (1 << 16) / (in * kind_size((int)kind) + 1) / 16 * 16 + 16, tasks = (out + grain - 1) / grain;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * grain, last = first + grain < out ? first + grain : out;
        float_product(weight, kind, bias, in, out, x, rows, first, last, output, stride);
    }
}
