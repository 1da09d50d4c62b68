/* Linears over packed weights: rows of x as int8 codes times codes of 8 or 4 bits, whole-number sums, scales per group.
 *
 * Weights lie in panels of 16 output channels, in the order in which they are read. 8 bits, [N/16][K/4][16][4] bytes:
 * code + 128. 4 bits, [N/16][K/8][16][4] bytes: code + 8, in the low halves those of k to k + 3, in the high halves those
 * of k + 4 to k + 7. N is padded to whole panels, K to a multiple of 32. Scales and zeros: [N/16][groups][16].
 * Stands behind rounding.h; all names begin with packed, or are those below. */

enum { PACKED_CHANNELS = 16, PACKED_STEP = 32 /* input channels that are multiplied together: the smallest group */ };

typedef struct {
    const uint8_t *codes;
    const void *scale, *zero;  /* zero: in units of codes, NULL if symmetric */
    const float *bias;         /* [N], or NULL */
    int64_t bits, scale_kind, in_features, out_features, groups;
    const int32_t *quant_bias; /* [N]: joins the sums of codes where there is one group, or NULL */
} PackedWeight;

typedef struct {
    int8_t *codes;   /* [M][stride], zeros behind the last */
    float *scale;    /* [M][groups] */
    int32_t *sums;   /* [M][groups], of codes */
    int64_t stride, groups;
} QuantizedRows;

INLINE int64_t packed_depth(int64_t in_features) {
    return (in_features + PACKED_STEP - 1) / PACKED_STEP * PACKED_STEP;
}

/* An odd multiple of 64 bytes keeps rows out of each other's cache sets. */
INLINE int64_t packed_stride(int64_t in_features) { return ((in_features + 63) / 64 | 1) * 64; }

/* The number of groups of x; a group of 0, or beyond the last channel, is a whole row. */
INLINE int64_t packed_groups(int64_t in_features, int64_t group) {
    return group <= 0 || group >= in_features ? 1 : in_features / group;
}

/* Bytes of memory that `rows` quantized rows take, with room to align them. */
static int64_t quantized_rows_bytes(int64_t rows, int64_t in_features, int64_t group) {
    return rows * (packed_stride(in_features) + 8 * packed_groups(in_features, group)) + 64;
}

/* Rows that lie in such memory. */
static QuantizedRows quantized_rows_in(void *memory, int64_t rows, int64_t in_features, int64_t group) {
    QuantizedRows x = {.stride = packed_stride(in_features), .groups = packed_groups(in_features, group)};
    x.codes = (int8_t *)(((uintptr_t)memory + 63) / 64 * 64);
    x.scale = (float *)(x.codes + rows * x.stride);
    x.sums = (int32_t *)(x.scale + rows * x.groups);
    return x;
}

/* max|x| / 127, at least SMALLEST_SCALE of ops/shared/codes.py; NaN if there is one. */
static float packed_scale_of(const float *x, int64_t count) {
    f32x8 largest = splat(0.0f);
    i32x8 is_nan = {0};
    for (int64_t k = 0; k < count; k += 8) {
        f32x8 values = count - k >= 8 ? load_f32(x + k) : load_few_as_f32(x + k, count - k, KIND_FLOAT32);
        is_nan |= values != values;
        largest = max_f32(largest, max_f32(values, -values));
    }
    for (int i = 0; i < 8; i++)
        if (is_nan[i]) return NAN;
    float scale = max_of(largest) / 127.0f;
    return scale > 0x1p-23f ? scale : 0x1p-23f;
}

/* The codes of `count` values, NaN as 0, and their sum; returns whether there is NaN. */
INLINE int packed_codes_of(const float *x, int64_t count, float scale, float offset, int8_t *codes, int32_t *sum) {
    i32x8 sums = {0}, nans = {0};
    for (int64_t k = 0; k < count; k += 8) {
        int64_t left = count - k;
        f32x8 values = left >= 8 ? load_f32(x + k) : load_few_as_f32(x + k, left, KIND_FLOAT32);
        values = values / splat(scale) + splat(offset);
        i32x8 is_number = values == values;
        i32x8 whole = __builtin_convertvector(round_to_code(select_f32(is_number, values, splat(0.0f))), i32x8);
        if (left < 8)
            for (int64_t i = left; i < 8; i++) whole[i] = 0, is_number[i] = -1;
        sums += whole, nans |= ~is_number;
        typedef int8_t Codes __attribute__((vector_size(8)));
        Codes bytes = __builtin_convertvector(whole, Codes);
        memcpy(codes + k, &bytes, left < 8 ? (size_t)left : 8);
    }
    int32_t has_nan = 0;
    *sum = 0;
    for (int i = 0; i < 8; i++) *sum += sums[i], has_nan |= nans[i];
    return has_nan;
}

/* A row of x [in_features] as codes: x = code * scale, scale = max|x| / 127 of each group. NaN makes its scale NaN. */
static void quantize_row(const float *x, int64_t in_features, int64_t group, QuantizedRows *to, int64_t row) {
    int64_t width = packed_groups(in_features, group) == 1 ? in_features : group;
    int8_t *codes = to->codes + row * to->stride;
    for (int64_t g = 0; g < to->groups; g++) {
        float scale = packed_scale_of(x + g * width, width);
        to->scale[row * to->groups + g] = scale;
        packed_codes_of(x + g * width, width, scale, 0.0f, codes + g * width, to->sums + row * to->groups + g);
    }
    memset(codes + in_features, 0, (size_t)(to->stride - in_features));
}

/* The same with a given scale and zero, of which the products' scale takes care: x's own is 1, NaN if there is NaN. */
static __attribute__((unused)) void quantize_row_static(const float *x, int64_t in_features, float scale, float offset,
                                                        QuantizedRows *to, int64_t row) {
    int8_t *codes = to->codes + row * to->stride;
    int has_nan = packed_codes_of(x, in_features, scale, offset, codes, to->sums + row);
    to->scale[row] = has_nan ? NAN : 1.0f;
    memset(codes + in_features, 0, (size_t)(to->stride - in_features));
}
