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

/* Outputs of up to three linears side by side, of `rows` rows whose floats lie in `input`, and codes in `quantized`. */
static void share_linears(Work *work, const LayerLinear *linears[3], int64_t rows, const float *input, float *output,
                          int64_t stride) {
    PackedWeight weights[3];
    PackedProduct products[3];
    QuantizedRows x = rows_for(work, linears[0]);
    int64_t count = 0;
    for (int i = 0; i < 3; output += linears[i] ? linears[i]->out_features : 0, i++) {
        const LayerLinear *linear = linears[i];
        if (!linear || !linear->codes.data) continue;
        if (linear->bits) {
            weights[count] = packed_weight(linear);
            products[count] = (PackedProduct){&weights[count], output, stride};
            count++;
        } else {
            share_float((const void *)linear->codes.data, linear->codes.kind, (const float *)linear->bias.data,
                        linear->in_features, linear->out_features, input, rows, output, stride, &work->team);
        }
    }
    if (count) share_packed(products, count, &x, rows, &work->team);
}
