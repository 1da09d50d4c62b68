typedef struct { const uint8_t *codes; const void *scale, *zero; const float *bias; int64_t bits, scale_kind, in_features, out_features, groups; } PackedWeight;
typedef struct { int8_t *codes; float *scale; int32_t *sums; int64_t stride, groups; } QuantizedRows;
static float pscale(const void *p, int64_t kind, int64_t at) { return kind == KIND_FLOAT32 ? ((const float *)p)[at] : half_to_float(((const uint16_t *)p)[at]); }
static void quantize_row(const float *x, int64_t in_features, int64_t group, QuantizedRows *to, int64_t row) {
    for (int64_t g = 0; g < in_features / group; g++) {
        float m = 0; int32_t sum = 0;
        for (int64_t k = 0; k < group; k++) m = fmaxf(m, fabsf(x[g * group + k]));
        float s = m / 127.0f; if (s < 0x1p-23f) s = 0x1p-23f;
        for (int64_t k = 0; k < group; k++) sum += to->codes[row * to->stride + g * group + k] = (int8_t)rintf(x[g * group + k] / s);
        to->scale[row * to->groups + g] = s, to->sums[row * to->groups + g] = sum;
    }
}
static void packed_product(const PackedWeight *w, const QuantizedRows *x, int64_t rows, int64_t first_panel, int64_t last_panel, float *output, int64_t output_stride) {
    int64_t K = w->in_features, group = K / w->groups;
    for (int64_t m = 0; m < rows; m++) for (int64_t n = 16 * first_panel; n < 16 * last_panel && n < w->out_features; n++) {
        float sum = 0;
        for (int64_t g = 0; g < w->groups; g++) {
            int32_t total = 0;
            for (int64_t k = g * group; k < (g + 1) * group; k++) {
                int c = w->bits == 8 ? w->codes[(n / 16) * K * 16 + (k / 4) * 64 + (n % 16) * 4 + k % 4] - 128
                    : (w->codes[(n / 16) * K * 8 + (k / 8) * 64 + (n % 16) * 4 + k % 4] >> (k / 4 % 2 * 4)) & 15;
                total += x->codes[m * x->stride + k] * c;
            }
            int64_t at = ((n / 16) * w->groups + g) * 16 + n % 16;
            float zero = w->zero ? pscale(w->zero, w->scale_kind, at) : 0;
            if (w->bits == 4) zero += 8;
            sum += ((float)total - zero * (float)x->sums[m * x->groups + g]) * x->scale[m * x->groups + g] * pscale(w->scale, w->scale_kind, at);
        }
        output[m * output_stride + n] = sum + (w->bias ? w->bias[n] : 0);
    }
}
static void float_product(const void *weight, int64_t kind, const float *bias, int64_t in, int64_t out, const float *x, int64_t rows, int64_t first, int64_t last, float *output, int64_t stride) {
    for (int64_t m = 0; m < rows; m++) for (int64_t n = first; n < last; n++) {
        f32x8 sum = {0};
        for (int64_t k = 0; k < in; k += 8) sum += load_as_f32((const char *)weight + (n * in + k) * kind_size((int)kind), (int)kind) * load_f32(x + m * in + k);
        output[m * stride + n] = sum_of(sum) + (bias ? bias[n] : 0);
    }
}
