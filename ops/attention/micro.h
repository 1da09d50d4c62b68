/* The inner loops of attention. One pair for few query rows, straight on the codes (`direct_*`); one pair for many, on
 * tiles decoded once into floats (`decode_*`, `gemm_rows`); and the exponential. */

enum { ROW_STEP = 6, PANEL = 16 }; /* rows and columns of the register tile of gemm_rows: 12 sums, 2 columns, 1 row */

/* 2^x for x <= 0, within 2 ulp; 0 below 2^-126, so that -inf gives 0. Minimax polynomial of 2^f on [-1/2, 1/2]. */
INLINE f32x8 exp2_of(f32x8 x) {
    f32x8 bounded = max_f32(x, splat(-127.0f));
    f32x8 shifted = bounded + splat(12582912.0f);
    f32x8 f = bounded - (shifted - splat(12582912.0f));
    f32x8 p = splat(1.534581128e-4f);
    p = p * f + splat(1.339993121e-3f);
    p = p * f + splat(9.61848896e-3f);
    p = p * f + splat(5.550328777e-2f);
    p = p * f + splat(2.402264689e-1f);
    p = p * f + splat(6.931472057e-1f);
    p = p * f + splat(1.0f);
    i32x8 exponent = (i32x8)shifted << 23; /* the low bits of `shifted` are the rounded x */
    return select_f32(x < splat(-126.0f), splat(0.0f), (f32x8)((i32x8)p + exponent));
}

/* Sums of the elements of four vectors. */
INLINE void sum_of_four(f32x8 a, f32x8 b, f32x8 c, f32x8 d, float to[4]) {
#ifdef __AVX2__
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    to[0] = sum_of(a), to[1] = sum_of(b), to[2] = sum_of(c), to[3] = sum_of(d);
#endif
}

/* scores[h][j] = q[h] . key[j] for `heads` rows of q and `keys` rows of codes. `step` keys share each load of q and
 * `heads` rows each widened key; heads * step sums fit the registers. The rows of V, at `ahead`, are fetched meanwhile,
 * because direct_output walks them in columns, which no hardware foresees. */
INLINE void direct_scores_of(const float *q, int64_t width, const char *key, int64_t key_stride, int64_t keys,
                             float *scores, int64_t scores_stride, const char *ahead, int64_t ahead_stride, int kind,
                             const int heads, const int step) {
    int64_t size = kind_size(kind), j = 0;
    for (; j + step <= keys; j += step) {
        f32x8 sums[16] = {0};
        for (int t = 0; t < step; t++)
            for (int64_t d = 0; d < width * size; d += 64) __builtin_prefetch(ahead + (j + t) * ahead_stride + d);
        for (int64_t d = 0; d < width; d += 8) {
            f32x8 codes[4];
            UNROLL for (int t = 0; t < step; t++) codes[t] = load_as_f32(key + ((j + t) * key_stride + d) * size, kind);
            UNROLL for (int h = 0; h < heads; h++)
                UNROLL for (int t = 0; t < step; t++) sums[h * step + t] += load_f32(q + h * width + d) * codes[t];
        }
        UNROLL for (int t = 0; heads == 4 && t < step; t++) {
            float four[4];
            sum_of_four(sums[t], sums[step + t], sums[2 * step + t], sums[3 * step + t], four);
            UNROLL for (int h = 0; h < 4; h++) scores[h * scores_stride + j + t] = four[h];
        }
        UNROLL for (int h = 0; heads < 4 && h < heads; h++)
            sum_of_four(sums[4 * h], sums[4 * h + 1], sums[4 * h + 2], sums[4 * h + 3], scores + h * scores_stride + j);
    }
    for (; j < keys; j++)
        UNROLL for (int h = 0; h < heads; h++) {
            f32x8 sum = {0};
            for (int64_t d = 0; d < width; d += 8)
                sum += load_f32(q + h * width + d) * load_as_f32(key + (j * key_stride + d) * size, kind);
            scores[h * scores_stride + j] = sum_of(sum);
        }
}

/* output[h][d] += sum_j weights[h][j] * value[j][d], from channel `d` on, `vectors` * 8 at a time while they fit;
 * returns the first channel left. */
INLINE int64_t direct_output_of(const float *weights, int64_t weights_stride, const char *value, int64_t value_stride,
                                int64_t keys, float *output, int64_t width, int64_t d, int kind, const int heads,
                                const int vectors) {
    int64_t size = kind_size(kind);
    for (; d + 8 * vectors <= width; d += 8 * vectors) {
        f32x8 sums[16];
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++) sums[h * vectors + v] = load_f32(output + h * width + d + 8 * v);
        for (int64_t j = 0; j < keys; j++) {
            f32x8 codes[8];
            UNROLL for (int v = 0; v < vectors; v++)
                codes[v] = load_as_f32(value + (j * value_stride + d + 8 * v) * size, kind);
            UNROLL for (int h = 0; h < heads; h++)
                UNROLL for (int v = 0; v < vectors; v++)
                    sums[h * vectors + v] += splat(weights[h * weights_stride + j]) * codes[v];
        }
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++) store_f32(output + h * width + d + 8 * v, sums[h * vectors + v]);
    }
    return d;
}

/* Both of the above for any number of rows, in groups of up to four. */
INLINE void direct_scores(const float *q, int64_t rows, int64_t width, const char *key, int64_t key_stride,
                          int64_t keys, float *scores, int64_t stride, const char *ahead, int64_t ahead_stride,
                          int kind) {
    while (rows > 0) {
        int64_t taken = rows >= 4 ? 4 : rows;
        switch (taken) {
        case 4:
            direct_scores_of(q, width, key, key_stride, keys, scores, stride, ahead, ahead_stride, kind, 4, 3);
            break;
        case 3:
            direct_scores_of(q, width, key, key_stride, keys, scores, stride, ahead, ahead_stride, kind, 3, 4);
            break;
        case 2:
            direct_scores_of(q, width, key, key_stride, keys, scores, stride, ahead, ahead_stride, kind, 2, 4);
            break;
        default: direct_scores_of(q, width, key, key_stride, keys, scores, stride, ahead, ahead_stride, kind, 1, 4);
        }
        rows -= taken, q += taken * width, scores += taken * stride;
    }
}

INLINE void direct_output(const float *weights, int64_t rows, int64_t stride, const char *value, int64_t value_stride,
                          int64_t keys, float *output, int64_t width, int kind) {
    while (rows > 0) {
        int64_t taken = rows >= 4 ? 4 : rows, d = 0;
        switch (taken) {
        case 4:
            d = direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 4, 3);
            direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 4, 1);
            break;
        case 3:
            d = direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 3, 3);
            direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 3, 1);
            break;
        case 2:
            d = direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 2, 4);
            direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 2, 2);
            break;
        default:
            d = direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 1, 8);
            direct_output_of(weights, stride, value, value_stride, keys, output, width, d, kind, 1, 2);
        }
        rows -= taken, weights += taken * stride, output += taken * width;
    }
}

/* Codes [keys][width] as float panels [key / 16][width][16], so that gemm_rows reads K transposed. Keys beyond the last
 * are zeros. `width` is padded with zeros to `padded`. */
INLINE void decode_keys(const char *key, int64_t key_stride, int64_t keys, int64_t width, int64_t padded, float *tile,
                        int kind) {
    int64_t size = kind_size(kind);
    for (int64_t first = 0; first < keys; first += 8) {
        float *panel = tile + first / PANEL * PANEL * padded + first % PANEL;
        for (int64_t d = 0; d < padded; d += 8) {
            f32x8 rows[8];
            for (int t = 0; t < 8; t++) {
                const char *from = key + ((first + t) * key_stride + d) * size;
                if (first + t >= keys || d >= width)
                    rows[t] = splat(0.0f);
                else
                    rows[t] = d + 8 <= width ? load_as_f32(from, kind) : load_few_as_f32(from, width - d, kind);
            }
            transpose(rows);
            for (int i = 0; i < 8; i++) store_f32(panel + (d + i) * PANEL, rows[i]);
        }
    }
    int64_t end = (keys + 7) / 8 * 8;
    if (end % PANEL)
        for (int64_t d = 0; d < padded; d++)
            store_f32(tile + end / PANEL * PANEL * padded + d * PANEL + end % PANEL, splat(0.0f));
}

/* Codes [keys][width] as float panels [width / 16][keys][16], `depth` keys apart. */
INLINE void decode_values(const char *value, int64_t value_stride, int64_t keys, int64_t width, int64_t padded,
                          int64_t depth, float *tile, int kind) {
    int64_t size = kind_size(kind);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < padded; d += 8) {
            const char *from = value + (j * value_stride + d) * size;
            f32x8 codes = splat(0.0f);
            if (d < width) codes = d + 8 <= width ? load_as_f32(from, kind) : load_few_as_f32(from, width - d, kind);
            store_f32(tile + (d / PANEL * depth + j) * PANEL + d % PANEL, codes);
        }
}

/* c[6][16] = (or +=) a[6][depth] * b[depth][16]. */
INLINE void gemm_rows(const float *a, int64_t a_stride, const float *b, int64_t depth, float *c, int64_t c_stride,
                      const int accumulate) {
    f32x8 sums[ROW_STEP][2];
    UNROLL for (int r = 0; r < ROW_STEP; r++)
        UNROLL for (int v = 0; v < 2; v++) sums[r][v] = accumulate ? load_f32(c + r * c_stride + 8 * v) : splat(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        f32x8 b0 = load_f32(b + k * PANEL), b1 = load_f32(b + k * PANEL + 8);
        UNROLL for (int r = 0; r < ROW_STEP; r++) {
            f32x8 one = splat(a[r * a_stride + k]);
            sums[r][0] += one * b0;
            sums[r][1] += one * b1;
        }
    }
    UNROLL for (int r = 0; r < ROW_STEP; r++)
        UNROLL for (int v = 0; v < 2; v++) store_f32(c + r * c_stride + 8 * v, sums[r][v]);
}
