/* Codes of 2, 3 and 4 bits in bytes, as ops/shared/codes.py packs them. Stands behind rounding.h.
 *
 * An index is the code plus half the number of codes; a table says what each index stands for, whether these are whole
 * numbers or the levels of a codebook. */

/* The values of the indices 0 to 15; fewer are repeated. */
typedef struct {
    f32x8 low, high;
} Table;

static Table table_of(const float *levels, int64_t bits) {
    float values[16];
    int count = 1 << bits;
    for (int i = 0; i < 16; i++) values[i] = levels ? levels[i % count] : (float)(i % count - count / 2);
    return (Table){load_f32(values), load_f32(values + 8)};
}

/* What the low `bits` of each index stand for; the bits above may be anything. */
INLINE f32x8 look_up(Table table, i32x8 index, int bits) {
#ifdef __AVX2__
    __m256i at = (__m256i)index;
    if (bits == 2) return (f32x8)_mm256_permutevar_ps((__m256)table.low, at);
    if (bits == 3) return (f32x8)_mm256_permutevar8x32_ps((__m256)table.low, at);
#ifdef __AVX512VL__
    return (f32x8)_mm256_permutex2var_ps((__m256)table.low, at, (__m256)table.high);
#else
    __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, at);
    __m256 high = _mm256_permutevar8x32_ps((__m256)table.high, at);
    return (f32x8)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
#endif
#else
    float values[16];
    f32x8 x;
    store_f32(values, table.low), store_f32(values + 8, table.high);
    for (int i = 0; i < 8; i++) x[i] = values[index[i] & ((1 << bits) - 1)];
    return x;
#endif
}

/* The first `count` <= 8 bytes, each in a lane; reads nothing beyond them. */
INLINE i32x8 load_bytes(const uint8_t *from, int64_t count) {
    uint8_t bytes[8] = {0};
    memcpy(bytes, from, (size_t)count);
#ifdef __AVX2__
    return (i32x8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
#else
    return (i32x8){bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]};
#endif
}

enum { GROUPS, SPREAD };

/* A scale or zero of a row; `at` NULL if there is none. SPREAD: one for each channel, with room for 7 more. GROUPS: one
 * for each 2^shift channels, at least 8. */
typedef struct {
    const float *at;
    int64_t shift;
} Part;

/* What indices become, (table[index] - zero) * scale, and where they go. */
typedef struct {
    Table table;
    Part zero, scale;
    float *to;
} Decoding;

/* The part at the channels d to d + 8. */
INLINE f32x8 load_part(Part part, int64_t d, int form) {
    return form == SPREAD ? load_f32(part.at + d) : splat(part.at[d >> part.shift]);
}

INLINE void decode_indices(Decoding a, int64_t d, i32x8 index, int64_t count, int bits, int form) {
    f32x8 x = look_up(a.table, index, bits);
    if (a.zero.at) x -= load_part(a.zero, d, form);
    if (a.scale.at) x *= load_part(a.scale, d, form);
    store_few_as(a.to + d, x, count, KIND_FLOAT32);
}

/* Number of parts of a row that lie behind each other in the bits of the same bytes. */
INLINE int parts_of(int bits) { return bits == 3 ? 8 : 8 / bits; }

/* The channels of which byte i to i + count of each part hold bits, `count` <= 8. */
INLINE void decode_bytes(Decoding a, const uint8_t *from, int64_t span, int64_t i, int64_t count, int bits, int form) {
    i32x8 even = load_bytes(from + i, count);
    if (bits != 3) {
        UNROLL
        for (int part = 0; part < parts_of(bits); part++)
            decode_indices(a, part * span + i, even >> (part * bits), count, bits, form);
        return;
    }
    i32x8 odd = load_bytes(from + span + i, count), top = load_bytes(from + 2 * span + i, count) << 2;
    UNROLL
    for (int part = 0; part < 8; part++) {
        i32x8 low = (part % 2 ? odd : even) >> (part / 2 * 2);
        decode_indices(a, part * span + i, (low & 3) | ((top >> part) & ~3), count, 3, form);
    }
}

INLINE void decode_packed(Decoding a, const uint8_t *from, int64_t width, int bits, int form) {
    int64_t span = width / parts_of(bits), i = 0;
    for (; i + 8 <= span; i += 8) decode_bytes(a, from, span, i, 8, bits, form);
    if (i < span) decode_bytes(a, from, span, i, span - i, bits, form);
}

/* A row of indices as bytes that hold as many as they can. */
static void pack_indices(const uint8_t *restrict indices, int64_t width, int64_t bits, uint8_t *restrict to) {
    int64_t half = width / 2, quarter = width / 4, eighth = width / 8;
    if (bits == 4) {
        for (int64_t i = 0; i < half; i++) to[i] = (uint8_t)(indices[i] | indices[half + i] << 4);
        return;
    }
    for (int64_t i = 0; i < quarter; i++) {
        const uint8_t *from = indices + i;
        to[i] = (uint8_t)((from[0] & 3) | (from[quarter] & 3) << 2 | (from[half] & 3) << 4 |
                          (from[half + quarter] & 3) << 6);
    }
    for (int64_t i = 0; bits == 3 && i < eighth; i++) {
        int byte = 0;
        UNROLL
        for (int part = 0; part < 8; part++) byte |= (indices[part * eighth + i] >> 2) << part;
        to[quarter + i] = (uint8_t)byte;
    }
}

/* Between which values a codebook's levels are the nearest: 2^bits - 1 middles of neighbours. */
static void find_borders(const float *levels, int64_t bits, float *to) {
    for (int64_t i = 0; i + 1 < 1 << bits; i++) to[i] = (levels[i] + levels[i + 1]) * 0.5f;
}

/* The index of the nearest level, the lower one of two as near; NaN takes the last. */
INLINE i32x8 nearest_level(f32x8 x, const float *borders, int64_t bits) {
    i32x8 index = {0};
    for (int64_t i = 0; i + 1 < 1 << bits; i++) index -= ~(x <= splat(borders[i]));
    return index;
}

/* The index of the nearest whole code, halves to even. */
INLINE i32x8 nearest_code(f32x8 x, int64_t bits) {
    f32x8 half = splat((float)(1 << (bits - 1))), last = half - 1.0f;
    return __builtin_convertvector(round_to_code(max_f32(-half, min_f32(last, x))) + half, i32x8);
}
