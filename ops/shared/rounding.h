/* Roundings to narrower types, exactly as PyTorch rounds: to nearest, halves to even. Stands behind vector.h. */

typedef uint32_t u32x8 __attribute__((vector_size(32)));

/* a * b rounded to float32: the barrier keeps compilers from fusing it with the sum that follows. */
INLINE f32x8 rounded_product(f32x8 a, f32x8 b) {
    f32x8 product = a * b;
#ifdef __AVX__
    __asm__("" : "+x"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

/* What differs between the two fp8 formats. Below the smallest normal number, adding `magic` rounds to a multiple of the
 * smallest one: that is its last place. */
typedef struct {
    float largest, smallest_normal, magic;
    int mantissa, bias;
} Fp8Format;

static const Fp8Format E4M3 = {448.0f, 0x1p-6f, 0x1p14f, 3, 7}, E5M2 = {57344.0f, 0x1p-14f, 0x1p7f, 2, 15};

INLINE u32x8 splat_bits(uint32_t x) { return (u32x8){x, x, x, x, x, x, x, x}; }

/* |x|, at most the largest number of the format; NaN stays NaN. */
INLINE f32x8 fp8_magnitude(f32x8 x, Fp8Format format) {
    return min_f32(splat(format.largest), (f32x8)((u32x8)x & splat_bits(0x7fffffff)));
}

/* Its bits with all that the mantissa has no room for rounded away, where it is a normal number. */
INLINE u32x8 fp8_rounded_bits(f32x8 magnitude, Fp8Format format) {
    u32x8 bits = (u32x8)magnitude;
    int dropped = 23 - format.mantissa;
    return bits + ((1u << (dropped - 1)) - 1) + ((bits >> dropped) & 1);
}

/* fp8 codes, one in the low byte of each lane. */
INLINE u32x8 to_fp8(f32x8 x, Fp8Format format) {
    f32x8 magnitude = fp8_magnitude(x, format), tiny = magnitude + splat(format.magic);
    u32x8 normal = (fp8_rounded_bits(magnitude, format) >> (23 - format.mantissa)) -
                   ((uint32_t)(127 - format.bias) << format.mantissa);
    u32x8 subnormal = (u32x8)tiny - (u32x8)splat(format.magic);
    u32x8 codes = (u32x8)select_f32(magnitude < splat(format.smallest_normal), (f32x8)subnormal, (f32x8)normal);
    codes = (u32x8)select_f32(magnitude != magnitude, (f32x8)splat_bits(0x7f), (f32x8)codes);
    return codes | (((u32x8)x >> 24) & 0x80);
}

/* x rounded to a number of the format, still as floats. */
INLINE f32x8 round_to_fp8(f32x8 x, Fp8Format format) {
    f32x8 magnitude = fp8_magnitude(x, format), tiny = (magnitude + splat(format.magic)) - splat(format.magic);
    f32x8 normal = (f32x8)((fp8_rounded_bits(magnitude, format) >> (23 - format.mantissa)) << (23 - format.mantissa));
    f32x8 rounded = select_f32(magnitude < splat(format.smallest_normal), tiny, normal);
    f32x8 with_sign = (f32x8)((u32x8)rounded | ((u32x8)x & splat_bits(0x80000000)));
    return select_f32(x != x, x, with_sign);
}

INLINE uint16_t float_to_half(float x) {
    uint32_t bits, magnitude;
    memcpy(&bits, &x, 4);
    magnitude = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and above */
    if (magnitude < 0x38800000) {                      /* subnormal: multiples of 2^-24, the last place of 0.5 */
        float value;
        memcpy(&value, &magnitude, 4);
        value += 0.5f;
        memcpy(&magnitude, &value, 4);
        return (uint16_t)(sign | (magnitude - 0x3f000000));
    }
    return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}

/* 8 floats as elements of a float kind. */
INLINE void store_as(void *to, f32x8 x, int kind) {
    uint16_t halves[8];
    if (kind == KIND_FLOAT32) {
        store_f32(to, x);
        return;
    }
    if (kind == KIND_BFLOAT16) {
        u32x8 bits = (u32x8)x;
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        bits = (u32x8)select_f32(x != x, (f32x8)splat_bits(0x7fc0), (f32x8)bits);
        for (int i = 0; i < 8; i++) halves[i] = (uint16_t)bits[i];
    } else {
#ifdef __F16C__
        _mm_storeu_si128((__m128i *)halves, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < 8; i++) halves[i] = float_to_half(x[i]);
#endif
    }
    memcpy(to, halves, 16);
}

/* The first `count` <= 8 of them. */
INLINE void store_few_as(void *to, f32x8 x, int64_t count, int kind) {
    if (count == 8) {
        store_as(to, x, kind);
        return;
    }
    char whole[32];
    store_as(whole, x, kind);
    memcpy(to, whole, (size_t)(count * kind_size(kind)));
}
