/* Linears of a layer over a block of rows, shared by the threads panel by panel. */

static PackedWeight packed_weight(const LayerLinear *linear) {
    return (PackedWeight){(const uint8_t *)linear->codes.data, (const void *)linear->scale.data,
                          (const void *)linear->zero.data, (const float *)linear->bias.data, linear->bits,
                          linear->scale.kind, linear->in_features, linear->out_features, linear->groups,
                          (const int32_t *)linear->quant_bias.data};
}

/* A row as the linears that read it want it; they all want the same. */
static void take_row(const LayerLinear *linear, const float *x, QuantizedRows *to, int64_t row) {
    if (!linear->bits) return;
    if (linear->input_scale.data)
        quantize_row_static(x, linear->in_features, *(const float *)linear->input_scale.data,
                            *(const float *)linear->input_offset.data, to, row);
    else
        quantize_row(x, linear->in_features, linear->in_features / linear->groups, to, row);
}

/* How rows of a linear's input lie in the scratch. */
static void fit_rows(const LayerLinear *linear, QuantizedRows *rows) {
    rows->stride = packed_stride(linear->in_features), rows->groups = linear->groups;
}

/* Rows of floats times the rows `first` to `last` of a weight in float. */
static void float_product(const LayerLinear *linear, const float *x, int64_t rows, int64_t first, int64_t last,
                          float *output, int64_t stride) {
    int64_t width = linear->in_features, kind = linear->codes.kind;
    for (int64_t n = first; n < last; n++) {
        const char *weight = (const char *)linear->codes.data + n * width * kind_size((int)kind);
        for (int64_t m = 0; m < rows; m++) {
            float sum = dot_product(weight, x + m * width, width, (int)kind);
            output[m * stride + n] = sum + (linear->bias.data ? ((const float *)linear->bias.data)[n] : 0.0f);
        }
    }
}

/* Outputs of up to three linears side by side, of `rows` rows whose floats lie in `input`. No barrier behind it. */
static void share_linears(const Work *work, const LayerLinear *linears[3], int64_t rows, const float *input,
                          float *output, int64_t stride) {
    int64_t panels[3] = {0}, all = 0;
    for (int i = 0; i < 3; i++) {
        if (!linears[i] || !linears[i]->codes.data) continue;
        panels[i] = (linears[i]->out_features + PACKED_CHANNELS - 1) / PACKED_CHANNELS, all += panels[i];
    }
    Range mine = share_of(all);
    for (int i = 0; i < 3; i++) {
        int64_t from = clamped(mine.from, panels[i]), to = clamped(mine.to, panels[i]);
        const LayerLinear *linear = linears[i];
        if (from < to && linear->bits) {
            PackedWeight weight = packed_weight(linear);
            packed_product(&weight, &work->quantized, rows, from, to, output, stride);
        } else if (from < to) {
            float_product(linear, input, rows, PACKED_CHANNELS * from,
                          smaller(PACKED_CHANNELS * to, linear->out_features), output, stride);
        }
        mine.from -= panels[i], mine.to -= panels[i];
        if (panels[i]) output += linear->out_features;
    }
}
