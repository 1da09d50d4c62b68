/* Linears of a layer over a block of rows, shared by the threads panel by panel. */

static PackedWeight packed_weight(const LayerLinear *linear) {
    return (PackedWeight){(const uint8_t *)linear->codes.data, (const void *)linear->scale.data,
                          (const void *)linear->zero.data, (const float *)linear->bias.data, linear->bits,
                          linear->scale.kind, linear->in_features, linear->out_features, linear->groups};
}

/* Codes of a row by a scale and an offset that are known. */
static void quantize_row_static(const float *x, const LayerLinear *linear, QuantizedRows *to, int64_t row) {
    float scale = *(const float *)linear->input_scale.data, offset = *(const float *)linear->input_offset.data;
    int64_t width = linear->in_features;
    int8_t *codes = to->codes + row * to->stride;
    int32_t sum = 0;
    int is_nan = 0;
    for (int64_t d = 0; d < width; d++) {
        float value = x[d] / scale + offset, code = rintf(value);
        code = code < -128.0f ? -128.0f : code > 127.0f ? 127.0f : code;
        is_nan |= value != value;
        codes[d] = (int8_t)(value == value ? code : 0.0f);
        sum += codes[d];
    }
    memset(codes + width, 0, (size_t)(to->stride - width));
    to->scale[row * to->groups] = is_nan ? NAN : 1.0f;
    to->sums[row * to->groups] = sum;
}

/* A row as the linears that read it want it; they all want the same. */
static void take_row(const LayerLinear *linear, const float *x, QuantizedRows *to, int64_t row) {
    if (!linear->bits) return;
    if (linear->input_scale.data) {
        quantize_row_static(x, linear, to, row);
        return;
    }
    quantize_row(x, linear->in_features, linear->in_features / linear->groups, to, row);
}

/* How rows of a linear's input lie in the scratch. */
static void fit_rows(const LayerLinear *linear, QuantizedRows *rows) {
    rows->stride = round_up(linear->in_features, 64), rows->groups = linear->groups;
}

/* Outputs of up to three linears side by side, of `rows` rows whose floats lie in `input`. No barrier behind it. */
static void share_linears(const Work *work, const LayerLinear *linears[3], int64_t rows, const float *input,
                          float *output, int64_t stride) {
    int64_t panels[3] = {0}, all = 0;
    for (int i = 0; i < 3; i++) {
        if (!linears[i] || !linears[i]->codes.data) continue;
        panels[i] = (linears[i]->out_features + 15) / 16, all += panels[i];
    }
    Range mine = share_of(all);
    for (int i = 0; i < 3; i++) {
        int64_t from = clamped(mine.from, panels[i]), to = clamped(mine.to, panels[i]);
        const LayerLinear *linear = linears[i];
        if (from < to && linear->bits) {
            PackedWeight weight = packed_weight(linear);
            packed_product(&weight, &work->quantized, rows, from, to, output, stride);
        } else if (from < to) {
            float_product((const void *)linear->codes.data, linear->codes.kind, (const float *)linear->bias.data,
                          linear->in_features, linear->out_features, input, rows, 16 * from,
                          smaller(16 * to, linear->out_features), output, stride);
        }
        mine.from -= panels[i], mine.to -= panels[i];
        if (panels[i]) output += linear->out_features;
    }
}
