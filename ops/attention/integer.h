/* The inner loops of attention in whole numbers, for int8 and int4 codes on machines that add products of bytes to 32
 * bits (AVX-512 VNNI), four times as many at once as of floats.
 *
 * The float operand, q or the weights of a block, becomes whole numbers of 24 bits by one step per row, and these three
 * signed digits of base 256. Sums of digits times codes are exact, so the result is as good as float32's. The codes are
 * offset to unsigned bytes; what that adds is known per row and taken off where the sums start. */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_INTEGER 1
#else
#define HAS_INTEGER 0
#endif
enum { INTEGER_ROWS = 4, TILE_COLUMNS = 32, DIGITS = 3, LARGEST_WHOLE = 0x7f7f00 };

/* What belongs to the digits of one row. */
typedef struct {
    int32_t offset[4]; /* where the sums of each digit start */
    float step;        /* value of a 1 */
    int32_t unused[3];
} Digits;

/* Quads of channels in rows of codes: int4 has those of the low halves first, then those of the high. */
INLINE int64_t channel_quads(int64_t width, int kind) {
    return kind == KIND_INT4 ? 2 * ((width / 2 + 3) / 4) : (width + 3) / 4;
}

#if HAS_INTEGER
/* Floats [count] become digits in their place: for each four floats 4 bytes of each digit, the lowest first, and 4
 * zeros. `count` is a multiple of 16; `step` 0 finds the one that uses all bits. */
static void to_digits(float *row, int64_t count, float step, int offset, Digits *digits) {
    const __m512i bias = _mm512_set1_epi32(0x808080), ones = _mm512_set1_epi8(1);
    const __m512i by_digit = _mm512_broadcast_i32x4(_mm_set_epi8(-1, -1, -1, -1, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    __m512i sums = _mm512_setzero_si512();
    if (step == 0.0f) {
        __m512 largest = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(row + i)));
        step = _mm512_reduce_max_ps(largest) / LARGEST_WHOLE;
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
    digits->step = step;
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

INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << count) - 1; }

/* Stores bytes of codes, unsigned; of int4 the low halves at `at` and the high ones at `high`. */
INLINE void store_unsigned(uint8_t *at, uint8_t *high, __m512i bytes, const int kind) {
    const __m512i low_bits = _mm512_set1_epi8(15);
    if (kind == KIND_INT8) {
        _mm512_storeu_si512(at, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
    } else {
        _mm512_storeu_si512(at, _mm512_and_si512(bytes, low_bits));
        _mm512_storeu_si512(high, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_bits));
    }
}

/* Codes of K as [keys / 32][quads of channels][32 keys] of 4 channels each; anything behind the last key. */
INLINE void interleave_keys_of(Rows from, int64_t keys, uint8_t *tile, const int kind) {
    int64_t bytes = kind == KIND_INT4 ? from.width / 2 : from.width, quads = channel_quads(from.width, kind);
    for (int64_t first = 0; first < keys; first += 16) {
        uint8_t *to = tile + (first / TILE_COLUMNS * quads * TILE_COLUMNS + first % TILE_COLUMNS) * 4;
        for (int64_t d = 0; d < bytes; d += 64) {
            __m512i rows[16];
            __mmask64 inside = first_bytes(bytes - d);
            UNROLL for (int t = 0; t < 16; t++) { /* behind the last key the last again, which nobody looks at */
                int64_t j = first + t < keys ? first + t : keys - 1;
                rows[t] = _mm512_maskz_loadu_epi8(inside, from.data + j * from.stride + d);
            }
            transpose_quads(rows);
            int64_t count = (bytes - d + 3) / 4;
            UNROLL for (int i = 0; i < 16; i++)
                if (i < count) {
                    uint8_t *at = to + (d / 4 + i) * TILE_COLUMNS * 4;
                    store_unsigned(at, at + quads / 2 * TILE_COLUMNS * 4, rows[i], kind);
                }
        }
    }
}

/* Codes of V as [channels / 32][quads of keys][32 channels] of 4 keys each, `depth` quads apart. Behind the last key
 * stand codes whose weights are 0. */
INLINE void interleave_values_of(Rows from, int64_t keys, int64_t depth, uint8_t *tile, const int kind) {
    const __m512i spread = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    int64_t bytes = kind == KIND_INT4 ? from.width / 2 : from.width, vectors = (bytes + 15) / 16;
    for (int64_t first = 0; first < keys; first += 4)
        for (int64_t d = 0; d < bytes; d += 64) {
            __m512i rows[4], pairs[4];
            __mmask64 inside = first_bytes(bytes - d);
            UNROLL for (int t = 0; t < 4; t++) {
                int64_t j = first + t < keys ? first + t : keys - 1;
                rows[t] = _mm512_maskz_loadu_epi8(inside, from.data + j * from.stride + d);
                rows[t] = _mm512_permutexvar_epi32(spread, rows[t]);
            }
            pairs[0] = _mm512_unpacklo_epi8(rows[0], rows[1]), pairs[1] = _mm512_unpackhi_epi8(rows[0], rows[1]);
            pairs[2] = _mm512_unpacklo_epi8(rows[2], rows[3]), pairs[3] = _mm512_unpackhi_epi8(rows[2], rows[3]);
            rows[0] = _mm512_unpacklo_epi16(pairs[0], pairs[2]), rows[1] = _mm512_unpackhi_epi16(pairs[0], pairs[2]);
            rows[2] = _mm512_unpacklo_epi16(pairs[1], pairs[3]), rows[3] = _mm512_unpackhi_epi16(pairs[1], pairs[3]);
            UNROLL for (int i = 0; i < 4; i++) {
                int64_t low = d / 16 + i, high = vectors + low;
                if (low < vectors)
                    store_unsigned(tile + ((low / 2 * depth + first / 4) * 2 + low % 2) * 64,
                                   tile + ((high / 2 * depth + first / 4) * 2 + high % 2) * 64, rows[i], kind);
            }
        }
}

/* c[heads][32] = (or +=) a[heads][4 * depth] * b[4 * depth][32], a in digits and b unsigned codes. Memory at `ahead` is
 * fetched meanwhile, `fetched` bytes per turn. */
INLINE void integer_tile(const int32_t *a, int64_t a_stride, const uint8_t *b, int64_t depth, float *c,
                         int64_t c_stride, const Digits *digits, int accumulate, const char *ahead, int64_t fetched,
                         const int heads, const int count) {
    __m512i sums[INTEGER_ROWS][DIGITS][2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < count; i++)
            UNROLL for (int v = 0; v < 2; v++) sums[h][i][v] = _mm512_set1_epi32(digits[h].offset[i]);
    for (int64_t k = 0; k < depth; k++, b += 128, ahead += fetched) {
        __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
        __builtin_prefetch(ahead, 0, 2);
        if (fetched > 64) __builtin_prefetch(ahead + 64, 0, 2);
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int i = 0; i < count; i++) {
                __m512i digit = _mm512_set1_epi32(a[h * a_stride + 4 * k + i]);
                sums[h][i][0] = _mm512_dpbusd_epi32(sums[h][i][0], b0, digit);
                sums[h][i][1] = _mm512_dpbusd_epi32(sums[h][i][1], b1, digit);
            }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < 2; v++) {
            f32v x = (f32v)_mm512_cvtepi32_ps(sums[h][0][v]);
            if (count == DIGITS)
                x += (f32v)_mm512_cvtepi32_ps(sums[h][1][v]) * all_lanes(256.0f) +
                     (f32v)_mm512_cvtepi32_ps(sums[h][2][v]) * all_lanes(65536.0f);
            x *= all_lanes(digits[h].step);
            if (accumulate) x += load_lanes(c + h * c_stride + 16 * v);
            store_lanes(c + h * c_stride + 16 * v, x);
        }
}

/* The same for 1 to 4 rows and 1 or 3 digits. */
static void integer_rows(const int32_t *a, int64_t a_stride, const uint8_t *b, int64_t depth, float *c,
                         int64_t c_stride, const Digits *digits, int accumulate, const char *ahead, int64_t fetched,
                         int64_t heads, int count) {
#define INTEGER_CASE(rows, digits_used) \
    case 4 * rows + digits_used: \
        integer_tile(a, a_stride, b, depth, c, c_stride, digits, accumulate, ahead, fetched, rows, digits_used); \
        break;
    switch (4 * heads + count) {
        INTEGER_CASE(1, 1)
        INTEGER_CASE(2, 1)
        INTEGER_CASE(3, 1)
        INTEGER_CASE(4, 1)
        INTEGER_CASE(1, 3)
        INTEGER_CASE(2, 3)
        INTEGER_CASE(3, 3)
        INTEGER_CASE(4, 3)
    }
#undef INTEGER_CASE
}

static void interleave_keys(Rows from, int64_t keys, uint8_t *tile, int kind) {
    if (kind == KIND_INT8)
        interleave_keys_of(from, keys, tile, KIND_INT8);
    else
        interleave_keys_of(from, keys, tile, KIND_INT4);
}

static void interleave_values(Rows from, int64_t keys, int64_t depth, uint8_t *tile, int kind) {
    if (kind == KIND_INT8)
        interleave_values_of(from, keys, depth, tile, KIND_INT8);
    else
        interleave_values_of(from, keys, depth, tile, KIND_INT4);
}
#endif
