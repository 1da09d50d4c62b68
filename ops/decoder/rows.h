/* Rows of floats: norms, activations, rotations. */

/* A weight of a norm as floats, eight at a time. */
INLINE f32x8 norm_weight(const Operand *weight, int64_t d) {
    return load_as_f32((const char *)weight->data + d * kind_size((int)weight->kind), (int)weight->kind);
}

/* x / sqrt(mean(x^2) + eps) * (offset + weight), in place or not. */
static void norm_row(const float *x, int64_t width, const Operand *weight, double offset, double eps, float *to) {
    f32x8 squares = {0}, more = {0};
    int64_t d = 0;
    float sum, inverse;
    for (; d + 16 <= width; d += 16) {
        f32x8 a = load_f32(x + d), b = load_f32(x + d + 8);
        squares += a * a, more += b * b;
    }
    sum = sum_of(squares + more);
    for (; d < width; d++) sum += x[d] * x[d];
    inverse = 1.0f / sqrtf(sum / (float)width + (float)eps);
    for (d = 0; d + 8 <= width; d += 8)
        store_f32(to + d, load_f32(x + d) * splat(inverse) * (splat((float)offset) + norm_weight(weight, d)));
    if (d == width) return;
    f32x8 last = load_few_as_f32((const char *)weight->data + d * kind_size((int)weight->kind), width - d,
                                 (int)weight->kind);
    for (int64_t i = 0; d < width; d++, i++) to[d] = x[d] * inverse * ((float)offset + last[i]);
}

/* e^x of floats that need no care: what leaves the range of float32 becomes 0 or its largest power of 2. */
INLINE f32x8 exp_of(f32x8 x) {
    f32x8 scaled = max_f32(min_f32(x * splat(1.44269504f), splat(127.0f)), splat(-126.0f));
    f32x8 shifted = scaled + splat(12582912.0f), whole = shifted - splat(12582912.0f); /* 1.5 * 2^23 rounds */
    f32x8 rest = max_f32(min_f32(x, splat(88.0296919f)), splat(-87.3365448f)) - whole * splat(0.693145752f);
    rest -= whole * splat(1.42860677e-6f);
    f32x8 y = splat(1.9875691500e-4f);
    y = y * rest + splat(1.3981999507e-3f), y = y * rest + splat(8.3334519073e-3f);
    y = y * rest + splat(4.1665795894e-2f), y = y * rest + splat(1.6666665459e-1f);
    y = y * rest + splat(5.0000001201e-1f), y = y * rest * rest + rest + splat(1.0f);
    i32x8 power = __builtin_convertvector(whole, i32x8);
    return (f32x8)((i32x8)y + power * (1 << 23));
}

INLINE f32x8 activated(f32x8 x, int64_t activation) {
    f32x8 inner = x;
    if (activation == ACTIVATION_GELU_TANH) inner = splat(1.59576912f) * (x + splat(0.044715f) * x * x * x);
    f32x8 result = x / (splat(1.0f) + exp_of(-inner)); /* x (1 + tanh(z)) / 2 = x / (1 + e^-2z) */
    return select_f32(x != x, x, result);
}

/* gate becomes act(gate) * up; rows have room for a multiple of 8. */
static void activate_row(const float *gate, const float *up, int64_t width, int64_t activation, float *to) {
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) store_f32(to + d, activated(load_f32(gate + d), activation) * load_f32(up + d));
    for (; d < width; d++) to[d] = activated(splat(gate[d]), activation)[0] * up[d];
}

/* A head turned by RoPE: `angles` are cos and then sin of `pairs` pairs, channel d with d + pairs. */
static void rotate_head(float *x, const float *angles, int64_t pairs) {
    const float *cos = angles, *sin = angles + pairs;
    float *second = x + pairs;
    int64_t d = 0;
    for (; d + 8 <= pairs; d += 8) {
        f32x8 a = load_f32(x + d), b = load_f32(second + d), c = load_f32(cos + d), s = load_f32(sin + d);
        store_f32(x + d, a * c - b * s), store_f32(second + d, b * c + a * s);
    }
    for (; d < pairs; d++) {
        float a = x[d], b = second[d];
        x[d] = a * cos[d] - b * sin[d], second[d] = b * cos[d] + a * sin[d];
    }
}

/* Times the orthonormal Hadamard matrix, in blocks of the largest power of two that divides the width. */
static void hadamard_row(float *x, int64_t width) {
    int64_t block = width & -width;
    float factor = 1.0f / sqrtf((float)block);
    for (int64_t size = 1; size < block; size *= 2)
        for (int64_t start = 0; start < width; start += 2 * size)
            for (int64_t d = start; d < start + size; d++) {
                float a = x[d], b = x[d + size];
                x[d] = a + b, x[d + size] = a - b;
            }
    for (int64_t d = 0; d < width; d++) x[d] *= factor;
}

/* What the bias of k adds to scores, by cos and sin of the chosen pairs: see ops/decoder/reference.py. */
static void bias_queries(const float *query, const float *bias, const int64_t *columns, int64_t count, int64_t head_dim,
                         float *to) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < count; i++) {
        int64_t d = columns[i] % half;
        float q1 = query[d], q2 = query[d + half], b1 = bias[d], b2 = bias[d + half];
        to[i] = columns[i] < half ? q1 * b1 + q2 * b2 : q2 * b1 - q1 * b2;
    }
}
