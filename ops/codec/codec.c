/* encode and encode_token: rows of floats to rows of int8 codes; README.md has the semantics.
 *
 * Codes equal the reference's exactly: a true division, then halves to even. */

enum { CODEC_GRAIN = 1 << 14 }; /* values below which a second thread costs more than it brings */

typedef struct {
    int64_t x, codes, scale, zero, kind, shape[4], threads;
    int64_t x_stride[3], codes_stride[3], scale_stride[4], zero_stride[4];
} EncodeArguments;

INLINE void store_codes(int8_t *to, f32x8 rounded, int64_t count) {
    int8_t codes[8];
#ifdef __AVX2__
    const __m128i low_bytes = _mm_set_epi64x(-1, 0xffffffff0c080400);
    __m256i whole = _mm256_cvttps_epi32((__m256)rounded);
    __m128i first = _mm_shuffle_epi8(_mm256_castsi256_si128(whole), low_bytes);
    __m128i second = _mm_shuffle_epi8(_mm256_extracti128_si256(whole, 1), low_bytes);
    _mm_storel_epi64((__m128i *)codes, _mm_unpacklo_epi32(first, second));
#else
    i32x8 whole = __builtin_convertvector(rounded, i32x8);
    for (int i = 0; i < 8; i++) codes[i] = (int8_t)whole[i];
#endif
    if (count == 8) { /* a constant size, so one store and no call */
        memcpy(to, codes, 8);
        return;
    }
    memcpy(to, codes, (size_t)count);
}

/* 8 (or, at the end of a row, `count`) scales or zeros, of which there may be one for the whole row. */
INLINE f32x8 row_part(const float *row, int64_t stride, int64_t d, int64_t count) {
    if (!stride) return splat(*row);
    return count == 8 ? load_f32(row + d) : load_few_as_f32(row + d, count, KIND_FLOAT32);
}

INLINE f32x8 values_at(const char *x, int64_t d, int64_t count, int kind) {
    const char *from = x + d * kind_size(kind);
    return count == 8 ? load_as_f32(from, kind) : load_few_as_f32(from, count, kind);
}

INLINE void encode_row(const EncodeArguments *a, const char *x, int8_t *codes, const float *scale, const float *zero,
                       int kind) {
    for (int64_t d = 0; d < a->shape[3]; d += 8) {
        int64_t count = a->shape[3] - d < 8 ? a->shape[3] - d : 8;
        f32x8 scaled = values_at(x, d, count, kind) / row_part(scale, a->scale_stride[3], d, count);
        if (zero) scaled += row_part(zero, a->zero_stride[3], d, count);
        store_codes(codes + d, round_to_code(scaled), count);
    }
}

INLINE void encode_token_row(const EncodeArguments *a, const char *x, int8_t *codes, float *scale, int kind) {
    int64_t width = a->shape[3];
    f32x8 largest = splat(0.0f);
    for (int64_t d = 0; d < width; d += 8) {
        f32x8 values = values_at(x, d, width - d < 8 ? width - d : 8, kind);
        largest = max_f32(largest, max_f32(values, -values));
    }
    float step = max_of(largest) / 127.0f;
    *scale = step > 0x1p-23f ? step : 0x1p-23f;
    for (int64_t d = 0; d < width; d += 8) {
        int64_t count = width - d < 8 ? width - d : 8;
        store_codes(codes + d, round_to_code(values_at(x, d, count, kind) / splat(*scale)), count);
    }
}

INLINE void encode_rows(const EncodeArguments *a, int per_token, int kind) {
    int64_t heads = a->shape[1], tokens = a->shape[2], rows = a->shape[0] * heads * tokens;
    int threads = rows * a->shape[3] < 2 * CODEC_GRAIN ? 1 : (int)a->threads;
    (void)threads; /* unused where the compiler has no OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t b = row / (heads * tokens), g = row / tokens % heads, s = row % tokens;
        const char *x = (const char *)a->x +
                        (b * a->x_stride[0] + g * a->x_stride[1] + s * a->x_stride[2]) * kind_size(kind);
        int8_t *codes =
            (int8_t *)a->codes + b * a->codes_stride[0] + g * a->codes_stride[1] + s * a->codes_stride[2];
        float *scale =
            (float *)a->scale + b * a->scale_stride[0] + g * a->scale_stride[1] + s * a->scale_stride[2];
        const float *zero =
            a->zero ? (const float *)a->zero + b * a->zero_stride[0] + g * a->zero_stride[1] + s * a->zero_stride[2]
                    : NULL;
        if (per_token)
            encode_token_row(a, x, codes, scale, kind);
        else
            encode_row(a, x, codes, scale, zero, kind);
    }
}

/* One copy of the loops for each element type. */
INLINE int encode_any(const EncodeArguments *a, int per_token) {
    switch (a->kind) {
    case KIND_FLOAT32: encode_rows(a, per_token, KIND_FLOAT32); break;
    case KIND_BFLOAT16: encode_rows(a, per_token, KIND_BFLOAT16); break;
    case KIND_FLOAT16: encode_rows(a, per_token, KIND_FLOAT16); break;
    default: return 1;
    }
    return 0;
}

EXPORT int encode(const EncodeArguments *arguments) { return encode_any(arguments, 0); }
EXPORT int encode_token(const EncodeArguments *arguments) { return encode_any(arguments, 1); }
