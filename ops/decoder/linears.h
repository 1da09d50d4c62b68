/* Linears of a layer over a block of rows, shared by the threads panel by panel. */

static PackedWeight packed_weight(const LayerLinear *linear) {
    return (PackedWeight){(const uint8_t *)linear->codes.data, (const void *)linear->scale.data,
                          (const void *)linear->zero.data, (const float *)linear->bias.data, linear->bits,
                          linear->scale.kind, linear->in_features, linear->out_features, linear->groups,
                          (const int32_t *)linear->quant_bias.data};
}

/* The rows that a linear reads, as they lie in the scratch. */
static QuantizedRows rows_for(const Work *work, const LayerLinear *linear) {
    QuantizedRows rows = work->quantized;
    rows.stride = packed_stride(linear->in_features), rows.groups = linear->groups;
    return rows;
}

/* A row as the linears that read it want it; they all want the same. */
static void take_row(const Work *work, const LayerLinear *linear, const float *x, int64_t row) {
    if (!linear->bits) return;
    QuantizedRows to = rows_for(work, linear);
    if (linear->input_scale.data)
        quantize_row_static(x, linear->in_features, *(const float *)linear->input_scale.data,
                            *(const float *)linear->input_offset.data, &to, row);
    else
        quantize_row(x, linear->in_features, linear->in_features / linear->groups, &to, row);
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

/* The outputs of linears in float among those of share_linears. */
static void share_floats(Work *work, const LayerLinear *linears[3], int64_t rows, const float *input, float *output,
                         int64_t stride) {
    for (int64_t i = 0, task = team_next(&work->team), begin = 0; i < 3; i++) {
        int64_t width = linears[i] ? linears[i]->out_features : 0, is_float = width && !linears[i]->bits;
        int64_t panels = is_float ? (width + PACKED_CHANNELS - 1) / PACKED_CHANNELS : 0;
        for (; task < begin + panels; task = team_next(&work->team)) {
            int64_t first = (task - begin) * PACKED_CHANNELS;
            float_product(linears[i], input, rows, first, smaller(first + PACKED_CHANNELS, width), output, stride);
        }
        begin += panels, output += width;
    }
    team_wait(&work->team);
}

/* Outputs of up to three linears side by side, of `rows` rows whose floats lie in `input`, and codes in `quantized`. */
static void share_linears(Work *work, const LayerLinear *linears[3], int64_t rows, const float *input, float *output,
                          int64_t stride) {
    PackedWeight weights[3];
    PackedProduct products[3];
    int64_t count = 0, floats = 0, column = 0;
    for (int i = 0; i < 3; i++) {
        const LayerLinear *linear = linears[i];
        if (!linear || !linear->codes.data) continue;
        if (linear->bits) {
            weights[count] = packed_weight(linear);
            products[count] = (PackedProduct){&weights[count], output + column, stride};
            count++;
        } else {
            floats++;
        }
        column += linear->out_features;
    }
    QuantizedRows x = rows_for(work, linears[0]);
    if (count) share_packed(products, count, &x, rows, &work->team);
    if (floats) share_floats(work, linears, rows, input, output, stride);
}
