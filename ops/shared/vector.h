/* What every CPU kernel shares: vectors of 8 floats and the loads that widen to them.
 *
 * Written in the vector extensions of GCC and Clang, so that the same source serves AVX2, NEON and anything else; AVX2
 * intrinsics stand only where compilers do not find the instruction. Prepended to each kernel's own source. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* Before loops of a few turns over arrays that must live in registers: GCC unrolls others too late for that. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef float f32x8_any __attribute__((vector_size(32), aligned(4), may_alias));

/* Element types of tensors, as cpu.py numbers them. */
enum {
    KIND_INT8 = 0,
    KIND_FLOAT32 = 1,
    KIND_BFLOAT16 = 2,
    KIND_FLOAT16 = 3,
    KIND_INT4 = 4, /* an element is a byte of two codes */
    KIND_FLOAT8_E4M3 = 5,
    KIND_FLOAT8_E5M2 = 6
};

INLINE f32x8 splat(float x) { return (f32x8){x, x, x, x, x, x, x, x}; }
INLINE f32x8 load_f32(const float *from) { return *(const f32x8_any *)from; }
INLINE void store_f32(float *to, f32x8 x) { *(f32x8_any *)to = x; }
INLINE f32x8 select_f32(i32x8 where, f32x8 yes, f32x8 no) {
    return (f32x8)(((i32x8)yes & where) | ((i32x8)no & ~where));
}
#ifdef __AVX2__
INLINE f32x8 max_f32(f32x8 a, f32x8 b) { return (f32x8)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f32x8 min_f32(f32x8 a, f32x8 b) { return (f32x8)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE f32x8 max_f32(f32x8 a, f32x8 b) { return select_f32(a > b, a, b); }
INLINE f32x8 min_f32(f32x8 a, f32x8 b) { return select_f32(a < b, a, b); }
#endif

INLINE float sum_of(f32x8 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE float max_of(f32x8 x) {
    float best = x[0];
    for (int i = 1; i < 8; i++) best = x[i] > best ? x[i] : best;
    return best;
}

INLINE int64_t kind_size(int kind) {
    return kind == KIND_FLOAT32 ? 4 : kind == KIND_BFLOAT16 || kind == KIND_FLOAT16 ? 2 : 1;
}

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    float value;
    if (rest >= 0x7c00) { /* Inf and NaN keep the largest exponent */
        uint32_t bits = 0x7f800000u | (rest & 0x3ff) << 13;
        memcpy(&value, &bits, 4);
    } else { /* 2^112 moves the exponent to float32's bias, subnormals included */
        uint32_t bits = rest << 13;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;
    }
    return sign ? -value : value;
}

#ifndef __F16C__
/* Not inline, which takes compilers long. */
static __attribute__((noinline, unused)) void halves_to_floats(const uint16_t halves[8], f32x8 *to) {
    for (int i = 0; i < 8; i++) (*to)[i] = half_to_float(halves[i]);
}
#endif

/* The bits of fp8 as those of float16: of e4m3fn 2^-8 of the value, so that the smaller bias fits, NaN as NaN. */
INLINE uint16_t fp8_to_half(uint8_t code, int kind) {
    uint32_t bits = code, magnitude = (bits & 0x7f) << 7;
    if (kind == KIND_FLOAT8_E5M2) return (uint16_t)(bits << 8);
    return (uint16_t)((bits & 0x80) << 8 | (magnitude == 0x3f80 ? 0x7fff : magnitude));
}

/* 8 fp8 codes as floats; `scaled` e4m3fn ones come as 2^-8 of their value, which saves a product. */
INLINE f32x8 load_fp8(const void *from, int kind, int scaled) {
    f32x8 x;
#ifdef __F16C__
    __m128i bytes = _mm_loadl_epi64(from);
    if (kind == KIND_FLOAT8_E5M2) return (f32x8)_mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
    __m128i halves = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16((short)0xbfff));
    __m128i largest = _mm_set1_epi16(0x3f80);
    halves = _mm_or_si128(halves, _mm_slli_epi16(_mm_cmpeq_epi16(_mm_and_si128(halves, largest), largest), 14));
    x = (f32x8)_mm256_cvtph_ps(halves);
#else
    uint16_t halves[8];
    for (int i = 0; i < 8; i++) halves[i] = fp8_to_half(((const uint8_t *)from)[i], kind);
    halves_to_floats(halves, &x);
    if (kind == KIND_FLOAT8_E5M2) return x;
#endif
    return scaled ? x : x * splat(256.0f);
}

/* 8 bytes of int4 codes: those in the low halves and those in the high halves. */
INLINE void load_int4(const void *from, f32x8 *low, f32x8 *high) {
#ifdef __AVX2__
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from)), offset = _mm256_set1_epi32(8);
    __m256i low_codes = _mm256_sub_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(15)), offset);
    *low = (f32x8)_mm256_cvtepi32_ps(low_codes);
    *high = (f32x8)_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bytes, 4), offset));
#else
    u8x8 bytes;
    memcpy(&bytes, from, 8);
    *low = __builtin_convertvector(bytes & 15, f32x8) - 8.0f;
    *high = __builtin_convertvector(bytes >> 4, f32x8) - 8.0f;
#endif
}

/* As load_int4 for `count` <= 8 bytes, -8 behind; reads nothing beyond them. */
INLINE void load_few_int4(const void *from, int64_t count, f32x8 *low, f32x8 *high) {
    unsigned char padded[8] = {0};
    memcpy(padded, from, (size_t)count);
    load_int4(padded, low, high);
}

/* 8 elements of one kind, int4 aside, as floats; `kind` is a constant wherever speed matters. */
INLINE f32x8 load_as_f32(const void *from, int kind) {
    if (kind == KIND_FLOAT32) return load_f32(from);
    if (kind == KIND_FLOAT8_E4M3 || kind == KIND_FLOAT8_E5M2) return load_fp8(from, kind, 0);
    if (kind == KIND_INT8) {
#ifdef __AVX2__
        return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from)));
#else
        int8_t codes[8];
        f32x8 x;
        memcpy(codes, from, 8);
        for (int i = 0; i < 8; i++) x[i] = codes[i];
        return x;
#endif
    }
    uint16_t halves[8];
    memcpy(halves, from, 16);
    if (kind == KIND_BFLOAT16) {
        i32x8 bits;
        for (int i = 0; i < 8; i++) bits[i] = (int32_t)((uint32_t)halves[i] << 16);
        return (f32x8)bits;
    }
#ifdef __F16C__
    return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128(from));
#else
    f32x8 x;
    halves_to_floats(halves, &x);
    return x;
#endif
}

/* The first `count` < 8 elements, zeros behind; reads nothing beyond them. */
INLINE f32x8 load_few_as_f32(const void *from, int64_t count, int kind) {
    unsigned char padded[32] = {0};
    memcpy(padded, from, (size_t)(count * kind_size(kind)));
    return load_as_f32(padded, kind);
}

/* clamp(round(x), -128, 127), halves to even, still as floats: adding 1.5 * 2^23 leaves no bit for a fraction. NaN
 * stays NaN. */
INLINE f32x8 round_to_code(f32x8 x) {
    x = max_f32(splat(-128.0f), min_f32(splat(127.0f), x));
    return (x + splat(12582912.0f)) - splat(12582912.0f);
}

/* Rows become columns. */
INLINE void transpose(f32x8 rows[8]) {
#ifdef __AVX2__
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = (f32x8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        rows[i + 4] = (f32x8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
#else
    f32x8 columns[8];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) columns[j][i] = rows[i][j];
    memcpy(rows, columns, sizeof columns);
#endif
}
