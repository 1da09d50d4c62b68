/* encode, encode_token and decode: rows of floats to rows of codes and back; README.md has the semantics.
 *
 * Codes equal the reference's exactly: the same float operations in the same order, none of them fused. A row of floats
 * in cache stands between loading, scaling and storing, so that each step knows one element type. */

enum {
    CODEC_GRAIN = 1 << 14, /* values below which a second thread costs more than it brings */
    ROWS_AT_A_TIME = 16,   /* consecutive tokens of a head */
    POSITION_OUT_OF_RANGE = 2,
};

/* Floats of one row; each has room for a multiple of 8. */
typedef struct {
    float *values, *scale, *zero;
    uint8_t *bytes;                  /* codes before they are packed */
    int64_t scale_index, zero_index; /* where `scale` and `zero` came from: rows that share them load them once */
    int64_t scale_shift, zero_shift; /* see shift_of */
    Table table;
    float borders[15];
} Buffers;

typedef struct {
    int64_t b, g, s, at; /* `at`: the token in storage */
} CodecRow;

/* The smallest and largest code, as code_range of ops/shared/codes.py. */
INLINE float largest_code(const CodecArguments *a) {
    switch (a->code_kind) {
    case KIND_INT8: return 127.0f;
    case KIND_INT4: return (float)((1 << (a->bits - 1)) - 1);
    default: return a->code_kind == KIND_FLOAT8_E4M3 ? 448.0f : 57344.0f;
    }
}
INLINE float smallest_code(const CodecArguments *a) {
    return a->code_kind == KIND_INT8 || a->code_kind == KIND_INT4 ? -1.0f - largest_code(a) : -largest_code(a);
}

INLINE char *element(int64_t address, int64_t index, int64_t kind) {
    return (char *)address + index * kind_size((int)kind);
}
INLINE int64_t index_of(const int64_t stride[3], int64_t b, int64_t g, int64_t s) {
    return b * stride[0] + g * stride[1] + s * stride[2];
}

INLINE void load_row_kind(const char *from, int64_t width, int kind, float *to) {
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) store_f32(to + d, load_as_f32(from + d * kind_size(kind), kind));
    if (d < width) store_f32(to + d, load_few_as_f32(from + d * kind_size(kind), width - d, kind));
}

/* A row of `width` elements of any kind but packed codes, as floats. */
static void load_row(const char *from, int64_t width, int64_t kind, float *to) {
    switch (kind) {
    case KIND_FLOAT32: load_row_kind(from, width, KIND_FLOAT32, to); break;
    case KIND_BFLOAT16: load_row_kind(from, width, KIND_BFLOAT16, to); break;
    case KIND_FLOAT16: load_row_kind(from, width, KIND_FLOAT16, to); break;
    case KIND_INT8: load_row_kind(from, width, KIND_INT8, to); break;
    case KIND_FLOAT8_E4M3: load_row_kind(from, width, KIND_FLOAT8_E4M3, to); break;
    default: load_row_kind(from, width, KIND_FLOAT8_E5M2, to);
    }
}

/* A row of x in float32. */
static void load_values(const CodecArguments *a, CodecRow row, Buffers *to) {
    load_row(element(a->x, index_of(a->x_stride, row.b, row.g, row.s), a->x_kind), a->shape[3], a->x_kind, to->values);
}

INLINE void fill(float *to, int64_t count, float value) {
    int64_t d = 0;
    for (; d + 8 <= count; d += 8) store_f32(to + d, splat(value));
    for (; d < count; d++) to[d] = value;
}

/* One number in float32 or float16. */
INLINE float load_number(const char *from, int64_t kind) {
    float value;
    uint16_t half;
    if (kind != KIND_FLOAT16) {
        memcpy(&value, from, 4);
        return value;
    }
    memcpy(&half, from, 2);
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    return half_to_float(half);
#endif
}

/* The scales or zeros of a token, one for each of `groups` groups of channels, as one for each channel. */
static void load_spread(int64_t address, int64_t index, int64_t stride, int64_t kind, int64_t groups, int64_t width,
                        float *to) {
    if (groups == width && stride == 1) {
        load_row(element(address, index, kind), width, kind, to);
        return;
    }
    for (int64_t group = 0, size = width / groups; group < groups; group++)
        fill(to + group * size, size, load_number(element(address, index + group * stride, kind), kind));
}

/* The number as it is after storing it, in float32 or float16. */
INLINE float store_number(int64_t address, int64_t index, int64_t kind, float value) {
    char *to = element(address, index, kind);
    if (kind == KIND_FLOAT32) {
        memcpy(to, &value, 4);
        return value;
    }
    store_few_as(to, splat(value), 1, KIND_FLOAT16);
    return load_number(to, KIND_FLOAT16);
}

/* NaN in both if there is one. */
INLINE void find_extremes(const float *values, int64_t count, float *smallest, float *largest) {
    f32x8 low = splat(values[0]), high = low;
    i32x8 is_nan = low != low;
    for (int64_t d = 0; d < count; d += 8) {
        int64_t left = count - d;
        f32x8 x = load_f32(values + d);
        if (left < 8)
            for (int64_t i = left; i < 8; i++) x[i] = values[0];
        is_nan |= x != x;
        low = min_f32(low, x), high = max_f32(high, x);
    }
    *smallest = -max_of(-low), *largest = max_of(high);
    for (int i = 0; i < 8; i++)
        if (is_nan[i]) *smallest = *largest = NAN;
}

/* Scale and zero of each group of channels of a token, stored, and spread over the channels. */
static void choose_scales(const CodecArguments *a, CodecRow row, Buffers *at) {
    int64_t size = a->shape[3] / a->scale_groups;
    int64_t scale_index = index_of(a->scale_stride, row.b, row.g, row.at);
    int64_t zero_index = index_of(a->zero_stride, row.b, row.g, row.at);
    float low = smallest_code(a), high = largest_code(a);
    for (int64_t group = 0; group < a->scale_groups; group++) {
        float smallest, largest;
        find_extremes(at->values + group * size, size, &smallest, &largest);
        float magnitude = largest > -smallest ? largest : -smallest;
        float step = a->zero ? (largest - smallest) / (high - low) : magnitude / high;
        float least = a->zero && a->zero_kind == KIND_FLOAT16 ? magnitude * 0x1p-15f : 0; /* LARGEST_ZERO of codes.py */
        least = least < 0x1p-23f ? 0x1p-23f : least;
        step = step < least ? least : step; /* NaN stays */
        step = store_number(a->scale, scale_index + group * a->scale_stride[3], a->scale_kind, step);
        fill(at->scale + group * size, size, step);
        if (a->zero) {
            float offset = low - smallest / step;
            offset = store_number(a->zero, zero_index + group * a->zero_stride[3], a->zero_kind, offset);
            fill(at->zero + group * size, size, offset);
        }
    }
}

INLINE void store_bytes(uint8_t *to, i32x8 words) {
#ifdef __AVX2__
    const __m128i low_bytes = _mm_set_epi64x(-1, 0xffffffff0c080400);
    __m128i first = _mm_shuffle_epi8(_mm256_castsi256_si128((__m256i)words), low_bytes);
    __m128i second = _mm_shuffle_epi8(_mm256_extracti128_si256((__m256i)words, 1), low_bytes);
    _mm_storel_epi64((__m128i *)to, _mm_unpacklo_epi32(first, second));
#else
    for (int i = 0; i < 8; i++) to[i] = (uint8_t)words[i];
#endif
}

/* The values of a row by its scales and zeros, rounded, as bytes; those that are packed later as indices. */
INLINE void round_row(const CodecArguments *a, const Buffers *at, int kind) {
    const float *values = at->values, *scale = at->scale, *zero = a->zero ? at->zero : NULL, *borders = at->borders;
    int64_t width = a->shape[3], bits = a->bits;
    int has_levels = a->levels != 0;
    uint8_t *restrict bytes = at->bytes;
    for (int64_t d = 0; d < width; d += 8) {
        f32x8 x = load_f32(values + d) / load_f32(scale + d);
        if (zero) x += load_f32(zero + d);
        i32x8 codes;
        if (kind == KIND_INT8)
            codes = __builtin_convertvector(round_to_code(x), i32x8);
        else if (kind == KIND_INT4)
            codes = has_levels ? nearest_level(x, borders, bits) : nearest_code(x, bits);
        else
            codes = (i32x8)to_fp8(x, kind == KIND_FLOAT8_E4M3 ? E4M3 : E5M2);
        store_bytes(bytes + d, codes);
    }
}

static void store_codes(const CodecArguments *a, CodecRow row, Buffers *at) {
    int64_t width = a->shape[3];
    uint8_t *to = (uint8_t *)a->codes + index_of(a->codes_stride, row.b, row.g, row.at);
    switch (a->code_kind) {
    case KIND_INT8: round_row(a, at, KIND_INT8); break;
    case KIND_FLOAT8_E4M3: round_row(a, at, KIND_FLOAT8_E4M3); break;
    case KIND_FLOAT8_E5M2: round_row(a, at, KIND_FLOAT8_E5M2); break;
    default:
        round_row(a, at, KIND_INT4);
        pack_indices(at->bytes, width, a->bits, to);
        return;
    }
    memcpy(to, at->bytes, (size_t)width);
}

/* The row of scales and zeros that serves a token. */
INLINE int64_t token_of(const CodecArguments *a, CodecRow row) {
    return a->token_group == 1 ? row.s : row.s / a->token_group;
}

INLINE void load_scales(const CodecArguments *a, CodecRow row, Buffers *to) {
    int64_t width = a->shape[3], token = token_of(a, row);
    int64_t scale = index_of(a->scale_stride, row.b, row.g, token);
    int64_t zero = index_of(a->zero_stride, row.b, row.g, token);
    if (a->scale && scale != to->scale_index)
        load_spread(a->scale, scale, a->scale_stride[3], a->scale_kind, a->scale_groups, width, to->scale);
    if (a->zero && zero != to->zero_index)
        load_spread(a->zero, zero, a->zero_stride[3], a->zero_kind, a->zero_groups, width, to->zero);
    to->scale_index = scale, to->zero_index = zero;
}

static void encode_rows(const CodecArguments *a, CodecRow row, int64_t end, Buffers *at) {
    for (; row.s < end; row.s++, row.at++) {
        load_values(a, row, at);
        load_scales(a, row, at);
        store_codes(a, row, at);
    }
}

static void encode_token_rows(const CodecArguments *a, CodecRow row, int64_t end, Buffers *at) {
    for (; row.s < end; row.s++, row.at++) {
        load_values(a, row, at);
        choose_scales(a, row, at);
        store_codes(a, row, at);
    }
}

/* The scales or zeros of a token, one for each group, as floats: where they are, or copied. */
INLINE const float *load_groups(int64_t address, int64_t index, int64_t kind, int64_t groups, float *copy) {
    const char *from = element(address, index, kind);
    if (kind == KIND_FLOAT32) return (const float *)from;
    for (int64_t group = 0; group < groups; group++) copy[group] = load_number(from + 2 * group, kind);
    return copy;
}

/* Codes are `codes` here, too, and x the float32 output. */
INLINE void decode_packed_rows(const CodecArguments *a, CodecRow row, int64_t end, Buffers *at, int bits, int form) {
    Part zero = {a->zero ? at->zero : NULL, at->zero_shift}, scale = {a->scale ? at->scale : NULL, at->scale_shift};
    const uint8_t *from = (const uint8_t *)a->codes + index_of(a->codes_stride, row.b, row.g, row.s);
    float *to = (float *)a->x + index_of(a->x_stride, row.b, row.g, row.s);
    for (; row.s < end; row.s++, from += a->codes_stride[2], to += a->x_stride[2]) {
        int64_t token = token_of(a, row);
        if (form == SPREAD) load_scales(a, row, at);
        if (form == GROUPS && a->zero)
            zero.at = load_groups(a->zero, index_of(a->zero_stride, row.b, row.g, token), a->zero_kind, a->zero_groups,
                                  at->zero);
        if (form == GROUPS && a->scale)
            scale.at = load_groups(a->scale, index_of(a->scale_stride, row.b, row.g, token), a->scale_kind,
                                   a->scale_groups, at->scale);
        decode_packed((Decoding){at->table, zero, scale, to}, from, a->shape[3], bits, form);
    }
}

/* Logarithm of the number of channels that share a number, which then need not be spread over them; 0 if it must. */
static int64_t shift_of(int64_t address, int64_t stride, int64_t groups, int64_t width) {
    int64_t shift = 3;
    if (!address || groups == 1) return 62;
    while ((int64_t)1 << shift < width / groups) shift++;
    return stride == 1 && groups << shift == width ? shift : 0;
}

static void decode_row(const CodecArguments *a, CodecRow row, Buffers *at) {
    int64_t width = a->shape[3];
    load_row(element(a->codes, index_of(a->codes_stride, row.b, row.g, row.s), a->code_kind), width, a->code_kind,
             at->values);
    load_scales(a, row, at);
    float *to = (float *)a->x + index_of(a->x_stride, row.b, row.g, row.s);
    for (int64_t d = 0; d < width; d += 8) {
        f32x8 x = load_f32(at->values + d);
        if (a->zero) x -= load_f32(at->zero + d);
        if (a->scale) x *= load_f32(at->scale + d);
        store_few_as(to + d, x, width - d < 8 ? width - d : 8, KIND_FLOAT32);
    }
}

static void decode_rows(const CodecArguments *a, CodecRow row, int64_t end, Buffers *at) {
    if (a->code_kind != KIND_INT4) {
        for (; row.s < end; row.s++) decode_row(a, row, at);
        return;
    }
    int form = at->zero_shift && at->scale_shift && a->shape[3] % 64 == 0 ? GROUPS : SPREAD;
    switch (2 * a->bits + form) {
    case 2 * 2 + GROUPS: decode_packed_rows(a, row, end, at, 2, GROUPS); break;
    case 2 * 2 + SPREAD: decode_packed_rows(a, row, end, at, 2, SPREAD); break;
    case 2 * 3 + GROUPS: decode_packed_rows(a, row, end, at, 3, GROUPS); break;
    case 2 * 3 + SPREAD: decode_packed_rows(a, row, end, at, 3, SPREAD); break;
    case 2 * 4 + GROUPS: decode_packed_rows(a, row, end, at, 4, GROUPS); break;
    default: decode_packed_rows(a, row, end, at, 4, SPREAD);
    }
}

/* Returns 0, 1 without enough memory, or POSITION_OUT_OF_RANGE. */
static int each_row(const CodecArguments *a, void (*visit)(const CodecArguments *, CodecRow, int64_t, Buffers *)) {
    int64_t heads = a->shape[1], tokens = a->shape[2], rows = a->shape[0] * heads * tokens;
    int64_t turns = (tokens + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    const float *levels = (const float *)a->levels;
    int64_t position = a->position ? *(const int64_t *)a->position : 0, room = (a->shape[3] + 15) / 8 * 8;
    if (position < 0 || position > a->capacity - tokens) return POSITION_OUT_OF_RANGE;
    int threads = rows * a->shape[3] < 2 * CODEC_GRAIN ? 1 : (int)a->threads, failed = 0;
    (void)threads; /* unused where the compiler has no OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *memory = calloc((size_t)(4 * room), sizeof(float));
        if (!memory) failed = 1;
        Buffers at = {memory,
                      memory + room,
                      memory + 2 * room,
                      (uint8_t *)(memory + 3 * room),
                      -1,
                      -1,
                      shift_of(a->scale, a->scale_stride[3], a->scale_groups, a->shape[3]),
                      shift_of(a->zero, a->zero_stride[3], a->zero_groups, a->shape[3]),
                      {{0}, {0}},
                      {0}};
        if (a->code_kind == KIND_INT4) at.table = table_of(levels, a->bits);
        if (levels) find_borders(levels, a->bits, at.borders);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < a->shape[0] * heads * turns; index++) {
            int64_t first = index % turns * ROWS_AT_A_TIME, end = first + ROWS_AT_A_TIME;
            CodecRow row = {index / (heads * turns), index / turns % heads, first, first + position};
            if (memory) visit(a, row, end < tokens ? end : tokens, &at);
        }
        free(memory);
    }
    return failed;
}

EXPORT int encode(const CodecArguments *arguments) { return each_row(arguments, encode_rows); }
EXPORT int encode_token(const CodecArguments *arguments) { return each_row(arguments, encode_token_rows); }
EXPORT int decode(const CodecArguments *arguments) { return each_row(arguments, decode_rows); }
