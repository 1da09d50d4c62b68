/* The inner loops of attention in whole numbers, for int8 and int4 codes on machines that add products of bytes to 32
 * bits (AVX-512 VNNI and VBMI), four times as many at once as of floats.
 *
 * The float operand, q or the weights of a block, becomes whole numbers of 24 bits by one step per row, and these three
 * signed digits of base 256. Sums of digits times codes are exact, so the result is as good as float32's. The codes are
 * offset to unsigned bytes; what that adds is known per row and taken off where the sums start. */

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HAS_INTEGER 1
#else
#define HAS_INTEGER 0
#endif
enum { INTEGER_ROWS = 4, TILE_COLUMNS = 32, DIGITS = 3, INT8_OFFSET = 128, INT4_OFFSET = 8 };
enum { LARGEST_WHOLE = 0x7f7f00, LARGEST_PAIR = 0x7f7f }; /* of three digits and of two */
enum { WIDE_ROWS = 6, WIDE_STEP = 32, WIDE_DIGITS = 2 };  /* of wide.h */

/* What belongs to the digits of one row. */
typedef struct {
    int32_t offset[4]; /* where the sums of each digit start */
    float step;        /* value of a 1 */
    float shift;       /* taken off the scores; of a group of channels the sum of q, which zeros multiply */
    int32_t unused[2];
} Digits;

#if HAS_INTEGER
/* Floats [count] become digits in their place: for each four floats 4 bytes of each digit, the lowest first, and 4
 * zeros. `count` is a multiple of 16; `step` 0 finds the one that makes the largest `most`, LARGEST_WHOLE or _PAIR. */
OUTLINE void to_digits(float *row, int64_t count, float step, int most, int offset, Digits *digits) {
    const __m512i bias = _mm512_set1_epi32(most == LARGEST_PAIR ? 0x8080 : 0x808080), ones = _mm512_set1_epi8(1);
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_set_epi8(-1, -1, -1, -1, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    __m512i sums = _mm512_setzero_si512();
    if (step == 0.0f) {
        __m512 largest = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16)
            largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(row + i)));
        step = _mm512_reduce_max_ps(largest) / (float)most;
    }
    /* tiny values, of which no inverse is finite, are 0 */
    __m512 inverse = _mm512_set1_ps(step > 0x1p-126f ? 1.0f / step : 0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), inverse));
        whole = _mm512_xor_si512(_mm512_add_epi32(whole, bias), bias); /* carries make the digits signed */
        whole = _mm512_shuffle_epi8(whole, by_digit);
        sums = _mm512_dpbusd_epi32(sums, ones, whole);
        _mm512_storeu_si512(row + i, whole);
    }
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i *)digits->offset, _mm_mullo_epi32(total, _mm_set1_epi32(-offset)));
    digits->step = step, digits->shift = 0.0f;
}

INLINE int offset_of(int64_t kind) { return kind == KIND_INT8 ? INT8_OFFSET : INT4_OFFSET; }

/* 16 bytes of four rows, of which `left` are there, side by side. */
INLINE __m512i four_rows(const char *const rows[4], int64_t d, int64_t left) {
    __m128i parts[4];
    __mmask16 inside = (__mmask16)((1u << (left < 16 ? left : 16)) - 1);
    UNROLL for (int i = 0; i < 4; i++) parts[i] = left >= 16 ? _mm_loadu_si128((const __m128i *)(rows[i] + d))
                                                             : _mm_maskz_loadu_epi8(inside, rows[i] + d);
    __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(parts[0]), parts[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(x, parts[2], 2), parts[3], 3);
}

/* Columns become rows, of 16 by 16 numbers of 32 bits. */
INLINE void transpose_quads(__m512i rows[16]) {
    __m512i a[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) { /* rows[4 r + i]: columns i, 4 + i, 8 + i, 12 + i of rows 4 r to 4 r + 3 */
        __m512i even_low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
        __m512i even_high = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
        __m512i odd_high = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
        a[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        a[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        a[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    UNROLL for (int i = 0; i < 16; i++) rows[i] = a[i];
}

/* Quads of bytes in rows of K; those of int4 are two quads of channels. */
INLINE int64_t byte_quads(int64_t width, int64_t kind) { return ((kind == KIND_INT4 ? width / 2 : width) + 3) / 4; }

/* Up to 32 rows of K as [quads of bytes][32 keys] of 4 bytes each, int8 offset to unsigned. */
OUTLINE void interleave_keys(Rows from, int64_t keys, uint8_t *tile, int64_t kind) {
    const __m512i offset = _mm512_set1_epi8(kind == KIND_INT8 ? -128 : 0);
    int64_t bytes = kind == KIND_INT4 ? from.width / 2 : from.width;
    for (int64_t first = 0; first < TILE_COLUMNS; first += 16)
        for (int64_t d = 0; d < bytes; d += 64) {
            __m512i rows[16];
            int64_t left = bytes - d;
            __mmask64 inside = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
            UNROLL for (int t = 0; t < 16; t++) { /* behind the last key the last again, which nobody looks at */
                int64_t j = first + t < keys ? first + t : keys - 1;
                rows[t] = _mm512_maskz_loadu_epi8(inside, from.data + j * from.stride + d);
            }
            transpose_quads(rows);
            UNROLL for (int i = 0; i < 16; i++)
                if (4 * i < left)
                    _mm512_storeu_si512(tile + ((d / 4 + i) * TILE_COLUMNS + first) * 4,
                                        _mm512_xor_si512(rows[i], offset));
        }
}

/* The int4 codes in the low and in the high halves of bytes, unsigned. */
INLINE __m512i low_codes(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
INLINE __m512i high_codes(__m512i bytes) { return low_codes(_mm512_srli_epi16(bytes, 4)); }

/* Sums of three digits, or of one, as floats. */
INLINE f32v value_of_sums(const i32v sums[DIGITS][2], int v, float step, const int count) {
    f32v x = __builtin_convertvector(sums[0][v], f32v);
    if (count == DIGITS)
        x += __builtin_convertvector(sums[1][v], f32v) * all_lanes(256.0f) +
             __builtin_convertvector(sums[2][v], f32v) * all_lanes(65536.0f);
    return x * all_lanes(step);
}

/* sums[h][i][v] += 4 digits times 4 codes in each lane, for the digits at `a`. */
INLINE void add_quads(i32v sums[INTEGER_ROWS][DIGITS][2], const int32_t *a, int64_t a_stride, __m512i b0, __m512i b1,
                      const int heads, const int count) {
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < count; i++) {
            __m512i digit = _mm512_set1_epi32(a[h * a_stride + i]);
            sums[h][i][0] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][0], b0, digit);
            sums[h][i][1] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][1], b1, digit);
        }
}

/* add_quads of three digits, with others for the second vector. */
INLINE void add_split_quads(i32v sums[INTEGER_ROWS][DIGITS][2], const int32_t *a0, const int32_t *a1, int64_t stride,
                            __m512i b0, __m512i b1, const int heads) {
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < DIGITS; i++) {
            __m512i low = _mm512_set1_epi32(a0[h * stride + i]), high = _mm512_set1_epi32(a1[h * stride + i]);
            sums[h][i][0] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][0], b0, low);
            sums[h][i][1] = (i32v)_mm512_dpbusd_epi32((__m512i)sums[h][i][1], b1, high);
        }
}

/* Memory to fetch while sums are added up: `step` bytes, 64 or 128, per turn. */
typedef struct {
    const char *data;
    int64_t step;
} Ahead;

INLINE void fetch_ahead(Ahead *ahead) {
    __builtin_prefetch(ahead->data, 0, 2);
    __builtin_prefetch(ahead->data + ahead->step / 2, 0, 2);
    ahead->data += ahead->step;
}

/* scores[heads][32] = digits of q times a tile of K of so many quads of bytes. The sums are vectors of 32-bit numbers,
 * because GCC 12 copies and spills them as __m512i. */
INLINE void integer_scores_of(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                              int64_t stride, const Digits *digits, Ahead ahead, const int kind, const int heads,
                              const int count) {
    i32v sums[INTEGER_ROWS][DIGITS][2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < count; i++)
            UNROLL for (int v = 0; v < 2; v++) sums[h][i][v] = (i32v)_mm512_set1_epi32(digits[h].offset[i]);
    for (int64_t k = 0; k < quads; k++) {
        __m512i b0 = _mm512_loadu_si512(tile + 128 * k), b1 = _mm512_loadu_si512(tile + 128 * k + 64);
        fetch_ahead(&ahead);
        if (kind == KIND_INT8) {
            add_quads(sums, q + 4 * k, q_stride, b0, b1, heads, count);
        } else {
            add_quads(sums, q + 4 * k, q_stride, low_codes(b0), low_codes(b1), heads, count);
            add_quads(sums, q + 4 * (quads + k), q_stride, high_codes(b0), high_codes(b1), heads, count);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < 2; v++)
            store_lanes(scores + h * stride + 16 * v,
                        value_of_sums(sums[h], v, digits[h].step, count) - all_lanes(digits[h].shift));
}

/* Which codes of a tile of K are multiplied. */
enum { CODES_BYTES = 0, CODES_LOW = 1, CODES_HIGH = 2 };

/* scores[heads][32] = (or, if not `first`, +=) scale * (q . codes - zero * sum of q) of one group of channels. */
INLINE void split_scores_of(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                            int64_t stride, const Digits *digits, const float *scale, const float *zero, Ahead ahead,
                            int first, const int codes, const int heads) {
    i32v sums[INTEGER_ROWS][DIGITS][2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < DIGITS; i++)
            UNROLL for (int v = 0; v < 2; v++) sums[h][i][v] = (i32v)_mm512_set1_epi32(digits[h].offset[i]);
    for (int64_t k = 0; k < quads; k++) {
        __m512i b0 = _mm512_loadu_si512(tile + 128 * k), b1 = _mm512_loadu_si512(tile + 128 * k + 64);
        fetch_ahead(&ahead);
        if (codes == CODES_LOW) b0 = low_codes(b0), b1 = low_codes(b1);
        if (codes == CODES_HIGH) b0 = high_codes(b0), b1 = high_codes(b1);
        add_quads(sums, q + 4 * k, q_stride, b0, b1, heads, DIGITS);
    }
    UNROLL for (int v = 0; v < 2; v++) {
        f32v s = load_lanes(scale + 16 * v), z = load_lanes(zero + 16 * v);
        s += (s - s) + (z - z); /* what is infinite must not look like a masked key */
        UNROLL for (int h = 0; h < heads; h++) {
            float *to = scores + h * stride + 16 * v;
            f32v x = value_of_sums(sums[h], v, digits[h].step, DIGITS) - z * all_lanes(digits[h].shift);
            store_lanes(to, first ? x * s : load_lanes(to) + x * s);
        }
    }
}

/* Digits of weights for the high halves of bytes, where these have scales of their own; `weights` 0 if not. */
typedef struct {
    const int32_t *weights;
    const Digits *digits;
} High;

/* output[heads][2][16] += digits of weights [heads][keys] times V: of int8 32 channels, of int4 16 channels of the low
 * half and at `high` those of the high half; both from byte d of each row on. Behind the last key weights are 0. */
INLINE void integer_output_of(const int32_t *weights, int64_t weights_stride, Rows value, int64_t d, int64_t keys,
                              float *output, int64_t high, int64_t stride, const Digits *digits, High other,
                              Ahead ahead, const int kind, const int heads, const int split) {
    const __m512i sign = _mm512_set1_epi8(-128);
    int64_t left = (kind == KIND_INT4 ? value.width / 2 : value.width) - d;
    __m512i by_key[2];
    for (int i = 0; i < 64; i++) { /* byte i: channel i / 4 of row i % 4, of rows of 16 or 32 bytes */
        ((uint8_t *)&by_key[0])[i] = (uint8_t)(i % 4 * (kind == KIND_INT4 ? 16 : 32) + i / 4);
        ((uint8_t *)&by_key[1])[i] = (uint8_t)(i % 4 * 32 + i / 4 + 16);
    }
    __mmask32 inside = left >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1;
    i32v sums[INTEGER_ROWS][DIGITS][2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < DIGITS; i++)
            UNROLL for (int v = 0; v < 2; v++) sums[h][i][v] =
            (i32v)_mm512_set1_epi32((split && v ? other.digits : digits)[h].offset[i]);
    for (int64_t j = 0; j < keys; j += 4) {
        const char *rows[4];
        __m512i b0, b1;
        UNROLL for (int t = 0; t < 4; t++)
            rows[t] = value.data + d + (j + t < keys ? j + t : keys - 1) * value.stride;
        fetch_ahead(&ahead);
        if (kind == KIND_INT8) {
            __m512i x[2];
            UNROLL for (int i = 0; i < 2; i++) x[i] =
                _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(inside, rows[2 * i])),
                                   _mm256_maskz_loadu_epi8(inside, rows[2 * i + 1]), 1);
            b0 = _mm512_xor_si512(_mm512_permutex2var_epi8(x[0], by_key[0], x[1]), sign);
            b1 = _mm512_xor_si512(_mm512_permutex2var_epi8(x[0], by_key[1], x[1]), sign);
        } else {
            __m512i both = _mm512_permutexvar_epi8(by_key[0], four_rows(rows, 0, left));
            b0 = low_codes(both), b1 = high_codes(both);
        }
        if (split)
            add_split_quads(sums, weights + j, other.weights + j, weights_stride, b0, b1, heads);
        else
            add_quads(sums, weights + j, weights_stride, b0, b1, heads, DIGITS);
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < 2; v++) {
            float *to = output + h * stride + v * high;
            float step = (split && v ? other.digits : digits)[h].step;
            store_lanes(to, load_lanes(to) + value_of_sums(sums[h], v, step, DIGITS));
        }
}

/* Both for 1 to 4 rows. A single digit is quick enough to multiply rows that nobody looks at. */
INLINE void integer_scores_any(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                               int64_t stride, const Digits *digits, Ahead ahead, const int kind, int64_t heads,
                               int count) {
    switch (count == 1 ? 0 : heads) {
    case 0: integer_scores_of(q, q_stride, tile, quads, scores, stride, digits, ahead, kind, 4, 1); break;
    case 1: integer_scores_of(q, q_stride, tile, quads, scores, stride, digits, ahead, kind, 1, DIGITS); break;
    case 2: integer_scores_of(q, q_stride, tile, quads, scores, stride, digits, ahead, kind, 2, DIGITS); break;
    case 3: integer_scores_of(q, q_stride, tile, quads, scores, stride, digits, ahead, kind, 3, DIGITS); break;
    default: integer_scores_of(q, q_stride, tile, quads, scores, stride, digits, ahead, kind, 4, DIGITS);
    }
}

OUTLINE void integer_scores(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                            int64_t stride, const Digits *digits, Ahead ahead, int64_t kind, int64_t heads, int count) {
    if (kind == KIND_INT8)
        integer_scores_any(q, q_stride, tile, quads, scores, stride, digits, ahead, KIND_INT8, heads, count);
    else
        integer_scores_any(q, q_stride, tile, quads, scores, stride, digits, ahead, KIND_INT4, heads, count);
}

INLINE void split_scores_rows(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                              int64_t stride, const Digits *digits, const float *scale, const float *zero, Ahead ahead,
                              int first, const int codes, int64_t heads) {
    switch (heads) {
    case 1:
        split_scores_of(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first, codes, 1);
        break;
    case 2:
        split_scores_of(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first, codes, 2);
        break;
    case 3:
        split_scores_of(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first, codes, 3);
        break;
    default: split_scores_of(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first, codes, 4);
    }
}

OUTLINE void split_scores_any(const int32_t *q, int64_t q_stride, const uint8_t *tile, int64_t quads, float *scores,
                             int64_t stride, const Digits *digits, const float *scale, const float *zero, Ahead ahead,
                             int first, int codes, int64_t heads) {
    if (codes == CODES_BYTES)
        split_scores_rows(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first,
                          CODES_BYTES, heads);
    else if (codes == CODES_LOW)
        split_scores_rows(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first,
                          CODES_LOW, heads);
    else
        split_scores_rows(q, q_stride, tile, quads, scores, stride, digits, scale, zero, ahead, first,
                          CODES_HIGH, heads);
}

INLINE void integer_output_any(const int32_t *weights, int64_t step, Rows value, int64_t d, int64_t keys, float *to,
                               int64_t high, int64_t stride, const Digits *digits, High other, Ahead ahead,
                               const int kind, int64_t heads, const int split) {
    switch (heads) {
    case 1:
        integer_output_of(weights, step, value, d, keys, to, high, stride, digits, other, ahead, kind, 1, split);
        break;
    case 2:
        integer_output_of(weights, step, value, d, keys, to, high, stride, digits, other, ahead, kind, 2, split);
        break;
    case 3:
        integer_output_of(weights, step, value, d, keys, to, high, stride, digits, other, ahead, kind, 3, split);
        break;
    default: integer_output_of(weights, step, value, d, keys, to, high, stride, digits, other, ahead, kind, 4, split);
    }
}

OUTLINE void integer_output(const int32_t *weights, int64_t step, Rows value, int64_t d, int64_t keys, float *to,
                            int64_t high, int64_t stride, const Digits *digits, High other, Ahead ahead, int64_t kind,
                            int64_t heads) {
    if (kind == KIND_INT8)
        integer_output_any(weights, step, value, d, keys, to, high, stride, digits, other, ahead, KIND_INT8, heads, 0);
    else if (other.weights)
        integer_output_any(weights, step, value, d, keys, to, high, stride, digits, other, ahead, KIND_INT4, heads, 1);
    else
        integer_output_any(weights, step, value, d, keys, to, high, stride, digits, other, ahead, KIND_INT4, heads, 0);
}
#endif
