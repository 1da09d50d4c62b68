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
typedef float f32x8_any __attribute__((vector_size(32), aligned(4), may_alias));

/* Element types of tensors, as cpu.py numbers them. */
enum { KIND_INT8 = 0, KIND_FLOAT32 = 1, KIND_BFLOAT16 = 2, KIND_FLOAT16 = 3 };

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

INLINE int64_t kind_size(int kind) { return kind == KIND_INT8 ? 1 : kind == KIND_FLOAT32 ? 4 : 2; }

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

/* 8 elements of one kind as floats; `kind` is a constant wherever speed matters. */
INLINE f32x8 load_as_f32(const void *from, int kind) {
    if (kind == KIND_FLOAT32) return load_f32(from);
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
    for (int i = 0; i < 8; i++) x[i] = half_to_float(halves[i]);
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
