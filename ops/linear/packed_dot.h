/* Products of codes for each instruction set: sums[rows][vectors] of PACKED_STEP input channels. Stands behind packed.h.
 *
 * A vector has the sums of PACKED_LANES output channels, a panel PACKED_PARTS of them. x is read in words of 4 codes. */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define PACKED_IS_512 1
enum { PACKED_LANES = 16, PACKED_TALL = 12 };
#define PACKED_WIDE(bits) 2 /* vectors of a tile of PACKED_TALL rows: its sums live in registers */
#else
#define PACKED_IS_512 0
#if defined(__AVX2__)
enum { PACKED_LANES = 8, PACKED_TALL = 6 };
#ifdef __AVXVNNI__
#define PACKED_WIDE(bits) 2
#else
#define PACKED_WIDE(bits) ((bits) == 4 ? 2 : 1)
#endif
#else
enum { PACKED_LANES = 4, PACKED_TALL = 4 };
#define PACKED_WIDE(bits) 4
#endif
#endif
enum { PACKED_PARTS = PACKED_CHANNELS / PACKED_LANES, PACKED_BYTES = 4 * PACKED_LANES };

typedef int32_t PackedSums __attribute__((vector_size(4 * PACKED_LANES)));
typedef uint32_t PackedWords __attribute__((vector_size(4 * PACKED_LANES)));
typedef float PackedFloats __attribute__((vector_size(4 * PACKED_LANES)));
typedef PackedWords PackedWordsAny __attribute__((aligned(1), may_alias));
typedef PackedFloats PackedFloatsAny __attribute__((aligned(4), may_alias));

/* The value that compilers know nothing of, so that they do not fuse or reorder what makes it and what takes it. */
#if defined(__AVX512F__)
#define PACKED_OPAQUE(x) __asm__("" : "+v"(x))
#elif defined(__AVX__)
#define PACKED_OPAQUE(x) __asm__("" : "+x"(x))
#elif defined(__ARM_NEON)
#define PACKED_OPAQUE(x) __asm__("" : "+w"(x))
#else
#define PACKED_OPAQUE(x) __asm__("" : "+m"(x))
#endif

INLINE PackedWords packed_load(const void *from) { return *(const PackedWordsAny *)from; }
INLINE uint32_t packed_word(const int8_t *from) {
    uint32_t word;
    memcpy(&word, from, 4);
    return word;
}

#if PACKED_IS_512 || defined(__AVXVNNI__)
/* sums += unsigned codes of weights times the signed ones of a word of x. */
INLINE PackedSums packed_multiply(PackedSums sums, PackedWords weights, uint32_t word) {
#if PACKED_IS_512
    return (PackedSums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32((int32_t)word));
#else
    return (PackedSums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, _mm256_set1_epi32((int32_t)word));
#endif
}
#elif !defined(__AVX2__) && defined(__ARM_NEON)
#include <arm_neon.h>
INLINE PackedSums packed_multiply(PackedSums sums, PackedWords weights, uint32_t word) {
    uint8x16_t w = (uint8x16_t)weights;
    int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(word));
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return (PackedSums)vusdotq_s32((int32x4_t)sums, w, x);
#else /* codes less 128 are signed: packed_offset knows */
    int8x16_t signed_w = (int8x16_t)w;
#ifdef __ARM_FEATURE_DOTPROD
    return (PackedSums)vdotq_s32((int32x4_t)sums, signed_w, x);
#else
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(signed_w), vget_low_s8(x)));
    int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(signed_w), vget_high_s8(x)));
    return (PackedSums)vaddq_s32((int32x4_t)sums, vpaddq_s32(low, high));
#endif
#endif
}
#if !defined(__ARM_FEATURE_MATMUL_INT8)
#define PACKED_SIGNED 1
#endif
#elif !defined(__AVX2__)
INLINE PackedSums packed_multiply(PackedSums sums, PackedWords weights, uint32_t word) {
    for (int j = 0; j < 4; j++)
        sums += (PackedSums)(weights >> (8 * j) & 255) * ((int32_t)(word << (24 - 8 * j)) >> 24);
    return sums;
}
#endif

#ifndef PACKED_SIGNED
#define PACKED_SIGNED 0
#endif

/* What codes have more in products than they stand for. */
INLINE int32_t packed_offset(int bits) { return bits == 4 ? 8 : PACKED_SIGNED ? 0 : 128; }

/* The vectors v of a tile at a word of the panels: part v of the panel, or of the next one. */
INLINE const uint8_t *packed_at(const uint8_t *panel, int64_t panel_bytes, int v) {
    return panel + v / PACKED_PARTS * panel_bytes + v % PACKED_PARTS * PACKED_BYTES;
}

INLINE const int8_t *packed_row(const int8_t *x, int64_t stride, int row) {
    const int8_t *base = x + row / 4 * (4 * stride); /* few distances for addresses to be made of */
    return base + row % 4 * stride;
}

#if defined(__AVX2__) && !PACKED_IS_512 && !defined(__AVXVNNI__)
/* pmaddubsw adds pairs with saturation: exact for halves of codes, at most 8 * 2 * 15 * 128 over a step, in 16 bits. */
INLINE __m256i packed_widened(__m256i pairs, int unit) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16((short)unit)); }

INLINE void packed_step(const uint8_t *panel, int64_t panel_bytes, const int8_t *x, int64_t stride, const int rows,
                        const int vectors, const int bits, PackedSums *sums) {
    const __m256i half = _mm256_set1_epi8(15);
    __m256i low[12], high[12];
    UNROLL for (int i = 0; i < rows * vectors; i++) low[i] = high[i] = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < bits; i++) /* 4 or 8 times 32 bytes of a vector */
        UNROLL for (int v = 0; v < vectors; v++) {
            __m256i bytes = (__m256i)packed_load(packed_at(panel, panel_bytes, v) + 64 * i);
            __m256i lower = _mm256_and_si256(bytes, half), upper = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half);
            UNROLL for (int r = 0; r < rows; r++) {
                const int8_t *words = packed_row(x, stride, r) + (bits == 4 ? 8 * i : 4 * i);
                __m256i first = _mm256_set1_epi32((int32_t)packed_word(words)), second = first;
                if (bits == 4) second = _mm256_set1_epi32((int32_t)packed_word(words + 4));
                __m256i *one = low + r * vectors + v, *other = bits == 4 ? one : high + r * vectors + v;
                *one = _mm256_add_epi16(*one, _mm256_maddubs_epi16(lower, first));
                PACKED_OPAQUE(*one); /* or all products are made before they are added */
                *other = _mm256_add_epi16(*other, _mm256_maddubs_epi16(upper, second));
                PACKED_OPAQUE(*other);
            }
        }
    UNROLL for (int i = 0; i < rows * vectors; i++) {
        __m256i sum = packed_widened(low[i], 1);
        if (bits == 8) sum = _mm256_add_epi32(sum, packed_widened(high[i], 16));
        sums[i] += (PackedSums)sum;
    }
}
enum { PACKED_CHAINS = 1 };
#else
/* Sums that a vector of few rows is divided into, so that additions need not wait for each other. */
enum { PACKED_CHAINS = 4 };

INLINE void packed_step(const uint8_t *panel, int64_t panel_bytes, const int8_t *x, int64_t stride, const int rows,
                        const int vectors, const int bits, PackedSums *sums) {
    const int chains = rows * vectors < PACKED_CHAINS ? PACKED_CHAINS / (rows * vectors) : 1;
    UNROLL for (int i = 0; i < bits; i++)
        UNROLL for (int half = 0; half < 8 / bits; half++) {
            PackedWords weights[4];
            UNROLL for (int v = 0; v < vectors; v++) {
                const uint8_t *from = packed_at(panel, panel_bytes, v) + 64 * i;
                __asm__("" : "+r"(from)); /* high halves are loaded again: there is no register to keep them in */
                weights[v] = packed_load(from);
                if (bits == 4) weights[v] = (half ? weights[v] >> 4 : weights[v]) & 0x0f0f0f0f;
                if (bits == 8 && PACKED_SIGNED) weights[v] ^= 0x80808080;
            }
            int word = 8 / bits * i + half;
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < vectors; v++) {
                    PackedSums *sum = sums + (r * vectors + v) * chains + word % chains;
                    *sum = packed_multiply(*sum, weights[v], packed_word(packed_row(x, stride, r) + 4 * word));
                }
        }
}
#endif
