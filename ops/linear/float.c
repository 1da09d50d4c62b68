/* linear_weight_only and linear_fp8: float activations times codes, summed in float32; README.md has the semantics.
 *
 * Weights become floats in registers, or in a panel that stays in cache and that many rows share. */

enum { STEP = 32, PARTS = STEP / LANES }; /* codes that are decoded together: a block of int4 */

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float LanesAny __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE Lanes load_lanes(const void *from) { return *(const LanesAny *)from; }
INLINE void store_lanes(void *to, Lanes x) { *(LanesAny *)to = x; }
INLINE int64_t code_bytes(int64_t codes, int kind) { return kind == KIND_INT4 ? codes / 2 : codes; }

#define E4M3_UNIT 256.0f /* decoded weights are this much smaller: float16 has exponents for them as they are */

enum { PLAIN, SCALED, AFFINE }; /* what decoding does to codes beside widening: nothing, scale, or take off a zero too */

/* What codes of a group have in common. */
typedef struct {
    Lanes scale, zero;
#if WIDE
    Lanes numbers; /* of int4: the value of each code */
#endif
} Group;

INLINE Lanes scaled_by(Lanes codes, const Group *group, int form) {
    if (form == AFFINE) codes -= group->zero;
    return form == PLAIN ? codes : codes * group->scale;
}

#if WIDE
INLINE float sum_of_lanes(Lanes x) { return _mm512_reduce_add_ps((__m512)x); }

INLINE Lanes broadcast_half(const uint16_t *from) {
    return (Lanes)_mm512_cvtph_ps(_mm256_set1_epi16((int16_t)*from));
}

INLINE void set_numbers(Group *group, int form) {
    group->numbers = (Lanes){-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    group->numbers = scaled_by(group->numbers, group, form);
}

/* STEP codes as floats. */
INLINE void decode_step(const uint8_t *from, int kind, const Group *group, int form, Lanes to[PARTS]) {
    if (kind == KIND_INT8) {
        UNROLL for (int i = 0; i < PARTS; i++) {
            __m128i codes = _mm_loadu_si128((const __m128i *)(from + LANES * i));
            to[i] = scaled_by((Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), group, form);
        }
    } else if (kind == KIND_INT4) { /* a lookup that reads the lowest 4 bits of an index */
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
        to[0] = (Lanes)_mm512_permutexvar_ps(bytes, (__m512)group->numbers);
        to[1] = (Lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), (__m512)group->numbers);
    } else { /* exponent and mantissa where float16 has them; NaN, the only code with 7 ones, gets its exponent */
        __m512i halves = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from)), 7);
        const __m512i nan = _mm512_set1_epi16(0x3f80);
        __mmask32 is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, nan), nan);
        halves = _mm512_and_si512(halves, _mm512_set1_epi16((int16_t)0xbfff));
        halves = _mm512_mask_blend_epi16(is_nan, halves, _mm512_set1_epi16(0x7f80));
        to[0] = (Lanes)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        to[1] = (Lanes)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
        UNROLL for (int i = 0; i < PARTS; i++) to[i] = scaled_by(to[i], group, form);
    }
}
#else
INLINE float sum_of_lanes(Lanes x) { return sum_of(x); }
INLINE Lanes broadcast_half(const uint16_t *from) {
#ifdef __F16C__
    return (Lanes)_mm256_cvtph_ps(_mm_set1_epi16((int16_t)*from));
#else
    return splat(half_to_float(*from));
#endif
}
INLINE void set_numbers(Group *group, int form) { (void)group, (void)form; }

INLINE void decode_step(const uint8_t *from, int kind, const Group *group, int form, Lanes to[PARTS]) {
    if (kind == KIND_INT4)
        UNROLL for (int i = 0; i < 2; i++) load_int4(from + LANES * i, to + i, to + 2 + i);
    else
        UNROLL for (int i = 0; i < PARTS; i++)
            to[i] = kind == KIND_INT8 ? load_as_f32(from + LANES * i, KIND_INT8) : load_fp8(from + LANES * i, kind, 1);
    UNROLL for (int i = 0; i < PARTS; i++) to[i] = scaled_by(to[i], group, form);
}
#endif

/* The scale or zero of a group of a column in every lane. */
INLINE Lanes broadcast_of_group(const LinearArguments *a, int64_t address, int64_t index) {
    if (a->scale_kind == KIND_FLOAT16) return broadcast_half((const uint16_t *)address + index);
    return ((const float *)address)[index] + (Lanes){0};
}

INLINE void load_group(const LinearArguments *a, int64_t column, int64_t group, int kind, int form, Group *to) {
    int64_t index = column * a->num_groups + group;
    if (form != PLAIN) to->scale = broadcast_of_group(a, a->weight_scale, index);
    if (form == AFFINE) to->zero = broadcast_of_group(a, a->weight_zero, index);
    if (kind == KIND_INT4) set_numbers(to, form);
}

/* STEP codes of a column as floats; zeros as codes behind the last, `left` of them on. */
INLINE void weights_at(const uint8_t *from, int64_t left, int kind, const Group *group, int form, Lanes to[PARTS]) {
    uint8_t tail[STEP] = {0};
    if (kind != KIND_INT4 && left < STEP) { /* of int4 there are whole blocks */
        memcpy(tail, from, (size_t)left);
        from = tail;
    }
    decode_step(from, kind, group, form, to);
}

/* A row of x as floats, zeros behind the last. */
static void widen_row(const LinearArguments *a, int64_t row) {
    float *to = (float *)(a->scratch + row * a->stride);
    for (int64_t k = 0; k < a->in_features; k += 8) store_f32(to + k, x_at(a, row, k));
    memset(to + a->in_features, 0, (size_t)(a->stride - 4 * a->in_features));
    a->row_scale[row] = 1.0f;
}

/* A row of x as e4m3 codes, which are floats here. */
static void round_row(const LinearArguments *a, int64_t row) {
    float *to = (float *)(a->scratch + row * a->stride);
    float scale = a->input_scale ? *(const float *)a->input_scale : dynamic_scale(a, row, 448.0f);
    for (int64_t k = 0; k < a->in_features; k += 8)
        store_f32(to + k, round_to_fp8(x_at(a, row, k) / splat(scale), E4M3) * splat(E4M3_UNIT));
    memset(to + a->in_features, 0, (size_t)(a->stride - 4 * a->in_features));
    a->row_scale[row] = scale;
}

static f32x8 float_total(const LinearArguments *a, int64_t row, int64_t column, const void *sums) {
    (void)a, (void)row, (void)column;
    return load_f32(sums);
}

/* `rows` rows of x times `columns` rows of the weight. */
INLINE void float_dot_tile(const LinearArguments *a, int64_t row, int64_t column, const int rows, const int columns,
                           int kind, int form, float *output) {
    const int chains = rows == 1 ? 2 : 1; /* sums of a tile, so that additions need not wait for each other */
    int64_t stride = a->stride, row_bytes = code_bytes(a->in_features, kind);
    int64_t group_size = a->in_features / a->num_groups;
    const char *x = a->scratch + row * stride;
    const uint8_t *w = (const uint8_t *)a->weight + column * row_bytes;
    Group groups[4];
    Lanes sums[8];
    UNROLL for (int i = 0; i < rows * columns * chains; i++) sums[i] = (Lanes){0};
    for (int64_t group = 0, k = 0; group < a->num_groups; group++) {
        UNROLL for (int c = 0; c < columns; c++) load_group(a, column + c, group, kind, form, groups + c);
        for (int64_t end = (group + 1) * group_size; k < end; k += STEP)
            UNROLL for (int c = 0; c < columns; c++) {
                Lanes values[PARTS];
                weights_at(w + c * row_bytes + code_bytes(k, kind), end - k, kind, groups + c, form, values);
                UNROLL for (int i = 0; i < PARTS; i++)
                    UNROLL for (int r = 0; r < rows; r++)
                        sums[(r * columns + c) * chains + i % chains] +=
                            load_lanes(x + r * stride + 4 * (k + LANES * i)) * values[i];
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) {
            Lanes sum = sums[(r * columns + c) * chains];
            if (chains == 2) sum += sums[(r * columns + c) * chains + 1];
            output[r * DOT_GRAIN + c] = sum_of_lanes(sum);
        }
}

INLINE void float_dot_kind(const LinearArguments *a, int64_t row, int64_t rows, int64_t first, int64_t last,
                           float *sums, int kind, int form) {
    int64_t r = 0, even = first + (last - first) / 2 * 2, whole = first + (last - first) / 4 * 4;
    for (; rows - r >= DOT_ROWS; r += DOT_ROWS)
        for (int64_t column = first; column < even; column += 2)
            float_dot_tile(a, row + r, column, 4, 2, kind, form, sums + r * DOT_GRAIN + column - first);
    for (int64_t single = 0; single < rows; single++) { /* what the tiles above left: the last rows, or a last column */
        int64_t column = single < r ? even : first;
        for (; column < whole; column += 4)
            float_dot_tile(a, row + single, column, 1, 4, kind, form, sums + single * DOT_GRAIN + column - first);
        for (; column < last; column++)
            float_dot_tile(a, row + single, column, 1, 1, kind, form, sums + single * DOT_GRAIN + column - first);
    }
}

INLINE int form_of(const LinearArguments *a) { return a->weight_zero ? AFFINE : a->num_groups > 1 ? SCALED : PLAIN; }

static void float_dot(const LinearArguments *a, int64_t row, int64_t rows, int64_t first, int64_t last, void *sums) {
    switch (a->weight_kind << 2 | form_of(a)) {
    case KIND_INT8 << 2 | PLAIN: float_dot_kind(a, row, rows, first, last, sums, KIND_INT8, PLAIN); break;
    case KIND_INT8 << 2 | SCALED: float_dot_kind(a, row, rows, first, last, sums, KIND_INT8, SCALED); break;
    case KIND_INT8 << 2 | AFFINE: float_dot_kind(a, row, rows, first, last, sums, KIND_INT8, AFFINE); break;
    case KIND_INT4 << 2 | PLAIN: float_dot_kind(a, row, rows, first, last, sums, KIND_INT4, PLAIN); break;
    case KIND_INT4 << 2 | SCALED: float_dot_kind(a, row, rows, first, last, sums, KIND_INT4, SCALED); break;
    case KIND_INT4 << 2 | AFFINE: float_dot_kind(a, row, rows, first, last, sums, KIND_INT4, AFFINE); break;
    case KIND_FLOAT8_E4M3 << 2 | SCALED: float_dot_kind(a, row, rows, first, last, sums, KIND_FLOAT8_E4M3, SCALED); break;
    default: float_dot_kind(a, row, rows, first, last, sums, KIND_FLOAT8_E4M3, PLAIN);
    }
}

INLINE void transpose_lanes(Lanes rows[LANES]) {
#if WIDE
    transpose_words((__m512i *)rows);
#else
    transpose(rows);
#endif
}

/* LANES columns of the panel from k on, STEP deep or what is left of it. */
INLINE void float_pack_step(const LinearArguments *a, int64_t column, int64_t k, int64_t depth, int kind, int form,
                            float *panel) {
    Lanes values[PARTS][LANES];
    for (int i = 0; i < LANES; i++) {
        Lanes of_column[PARTS] = {0};
        int64_t n = column + i;
        if (n < a->out_features) {
            Group group;
            load_group(a, n, k / (a->in_features / a->num_groups), kind, form, &group);
            const uint8_t *from = (const uint8_t *)a->weight + code_bytes(n * a->in_features + k, kind);
            weights_at(from, a->in_features - k, kind, &group, form, of_column);
        }
        UNROLL for (int part = 0; part < PARTS; part++) values[part][i] = of_column[part];
    }
    for (int part = 0; part < PARTS && part * LANES < depth; part++) {
        transpose_lanes(values[part]);
        for (int i = 0; i < LANES; i++) store_lanes(panel + (part * LANES + i) * PANEL_COLUMNS, values[part][i]);
    }
}

static void float_pack(const LinearArguments *a, int64_t column, int64_t start, int64_t depth, void *panel) {
    int form = form_of(a);
    for (int64_t k = 0; k < depth; k += STEP)
        for (int half = 0; half < 2; half++) {
            int64_t first = column + LANES * half;
            float *to = (float *)panel + k * PANEL_COLUMNS + LANES * half;
            switch (a->weight_kind) {
            case KIND_INT8: float_pack_step(a, first, start + k, depth - k, KIND_INT8, form, to); break;
            case KIND_INT4: float_pack_step(a, first, start + k, depth - k, KIND_INT4, form, to); break;
            default: float_pack_step(a, first, start + k, depth - k, KIND_FLOAT8_E4M3, form, to);
            }
        }
}

static void float_tile(const char *x, int64_t stride, const void *panel, int64_t depth, void *sums_at) {
    Lanes sums[ROW_TILE][2];
    float *to = sums_at;
    const float *w = panel;
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++) sums[r][v] = load_lanes(to + r * BLOCK_COLUMNS + LANES * v);
    for (int64_t k = 0; k < depth; k++) {
        Lanes w0 = load_lanes(w + k * PANEL_COLUMNS), w1 = load_lanes(w + k * PANEL_COLUMNS + LANES);
        UNROLL for (int r = 0; r < ROW_TILE; r++) {
            float value = *(const float *)(x + r * stride + 4 * k);
            sums[r][0] += value * w0;
            sums[r][1] += value * w1;
        }
    }
    UNROLL for (int r = 0; r < ROW_TILE; r++)
        UNROLL for (int v = 0; v < 2; v++) store_lanes(to + r * BLOCK_COLUMNS + LANES * v, sums[r][v]);
}

static const LinearKernel WEIGHT_ONLY = {1, 4, widen_row, float_dot, float_pack, float_tile, float_total},
                          FP8 = {1, 4, round_row, float_dot, float_pack, float_tile, float_total};

EXPORT int linear_weight_only(const LinearArguments *arguments) { return linear(arguments, &WEIGHT_ONLY); }
EXPORT int linear_fp8(const LinearArguments *arguments) { return linear(arguments, &FP8); }
