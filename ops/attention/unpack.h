/* Indices of 2, 3 and 4 bits of one block of keys become int8 codes, or the levels of a codebook as floats. */

/* The indices of one row of any width, as bytes; ops/shared/codes.py says how they lie. */
static void unpack_any(const uint8_t *from, int64_t width, int64_t bits, uint8_t *to) {
    int64_t field = bits == 4 ? 4 : 2, bytes = width * field / 8, mask = (1 << field) - 1;
    for (int64_t k = 0; k < 8 / field; k++)
        for (int64_t i = 0; i < bytes; i++) to[k * bytes + i] = (uint8_t)(from[i] >> k * field & mask);
    for (int64_t k = 0; bits == 3 && k < 8; k++)
        for (int64_t i = 0; i < width / 8; i++) to[k * (width / 8) + i] |= (uint8_t)((from[bytes + i] >> k & 1) << 2);
}

#ifdef __AVX512BW__
/* Fields of 1, 2 or 4 bits of a row that takes `bytes`, 8, 16, 32 or a multiple of 64 of them: 64 from number 64 c on. */
INLINE __m512i fields_of(const uint8_t *from, const int64_t bytes, const int field, const int64_t c) {
    const int64_t lanes = bytes >= 64 ? 8 : bytes / 8, k = 64 * c / bytes; /* lanes of 64 bits that share a shift */
    __m512i x, shift = _mm512_set_epi64((k + 7 / lanes) * field, (k + 6 / lanes) * field, (k + 5 / lanes) * field,
                                        (k + 4 / lanes) * field, (k + 3 / lanes) * field, (k + 2 / lanes) * field,
                                        (k + 1 / lanes) * field, k * field);
    if (bytes == 8) {
        int64_t all;
        memcpy(&all, from, 8);
        x = _mm512_set1_epi64(all);
    } else if (bytes == 16) {
        x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from));
    } else if (bytes == 32) {
        x = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from));
    } else {
        x = _mm512_loadu_si512(from + 64 * c % bytes);
    }
    return _mm512_and_si512(_mm512_srlv_epi64(x, shift), _mm512_set1_epi8((char)((1 << field) - 1)));
}

INLINE void unpack_rows_of(Rows from, int64_t keys, const float *levels, char *to, const int64_t width,
                           const int bits) {
    float padded[16] = {0};
    if (levels) memcpy(padded, levels, sizeof(float) << bits);
    const __m512 table = _mm512_loadu_ps(padded);
    const __m512i offset = _mm512_set1_epi8((char)(1 << (bits - 1)));
    for (int64_t j = 0; j < keys; j++) {
        const uint8_t *row = (const uint8_t *)from.data + j * from.stride;
        UNROLL for (int64_t c = 0; c < width / 64; c++) {
            const int field = bits == 4 ? 4 : 2;
            __m512i x = fields_of(row, width * field / 8, field, c);
            if (bits == 3)
                x = _mm512_or_si512(x, _mm512_slli_epi16(fields_of(row + width / 4, width / 8, 1, c), 2));
            if (!levels) {
                _mm512_storeu_si512(to + j * width + 64 * c, _mm512_sub_epi8(x, offset));
                continue;
            }
            __m128i quarters[4] = {_mm512_castsi512_si128(x), _mm512_extracti32x4_epi32(x, 1),
                                   _mm512_extracti32x4_epi32(x, 2), _mm512_extracti32x4_epi32(x, 3)};
            UNROLL for (int i = 0; i < 4; i++)
                _mm512_storeu_ps((float *)to + j * width + 64 * c + 16 * i,
                                 _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(quarters[i]), table));
        }
    }
}

INLINE void unpack_rows_by_bits(Rows from, int64_t keys, int64_t bits, const float *levels, char *to,
                                const int64_t width) {
    if (bits == 2)
        unpack_rows_of(from, keys, levels, to, width, 2);
    else if (bits == 3)
        unpack_rows_of(from, keys, levels, to, width, 3);
    else
        unpack_rows_of(from, keys, levels, to, width, 4);
}
#endif

/* The rows of a block as they are multiplied: unpacked to `to`, or where they lie. */
OUTLINE Rows unpacked_rows(const Side *side, Rows from, int64_t keys, char *to) {
    if (!side->bits) return from;
    const float *levels = (const float *)side->levels;
    Rows rows = {to, from.width * kind_size((int)side->kind), from.width};
#ifdef __AVX512BW__
    switch (from.width) {
    case 64: unpack_rows_by_bits(from, keys, side->bits, levels, to, 64); return rows;
    case 128: unpack_rows_by_bits(from, keys, side->bits, levels, to, 128); return rows;
    case 256: unpack_rows_by_bits(from, keys, side->bits, levels, to, 256); return rows;
    }
#endif
    for (int64_t j = 0; j < keys; j++, to += rows.stride) {
        const uint8_t *row = (const uint8_t *)from.data + j * from.stride;
        uint8_t *indices = (uint8_t *)to + (levels ? 3 * from.width : 0); /* levels are written from below */
        unpack_any(row, from.width, side->bits, indices);
        if (levels)
            for (int64_t d = 0; d < from.width; d++) ((float *)to)[d] = levels[indices[d]];
        else
            for (int64_t d = 0; d < from.width; d++) ((int8_t *)to)[d] = (int8_t)(indices[d] - (1 << (side->bits - 1)));
    }
    return rows;
}
