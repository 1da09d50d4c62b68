/* linear_packed and linear_float: rows of floats times a packed weight, or a float one; README.md has the semantics. */

typedef struct {
    /* addresses; 0 for what is absent */
    int64_t x, output, codes, scale, zero, bias, quant_bias, input_scale, input_offset;
    /* the element type of x and output, and numbers; `group` is that of x, 0 for a whole row */
    int64_t kind, bits, scale_kind, rows, in_features, out_features, groups, group, threads;
} PackedArguments;

/* `count` elements of a row as floats. */
static void packed_widen(int64_t address, int64_t index, int64_t count, int64_t kind, float *to) {
    for (int64_t k = 0; k < count; k += 8) store_few_as(to + k, load_any(address, index + k, count - k, kind),
                                                        count - k < 8 ? count - k : 8, KIND_FLOAT32);
}

static void packed_quantize(const PackedArguments *a, int64_t row, float *buffer, QuantizedRows *to) {
    const float *x = (const float *)a->x + row * a->in_features;
    if (a->kind != KIND_FLOAT32) packed_widen(a->x, row * a->in_features, a->in_features, a->kind, buffer), x = buffer;
    if (a->input_scale)
        quantize_row_static(x, a->in_features, *(const float *)a->input_scale, *(const float *)a->input_offset, to, row);
    else
        quantize_row(x, a->in_features, a->group, to, row);
}

/* All but the allocation of memory: `buffers` has a row for each thread, `output` all rows where they become narrower. */
static void packed_region(const PackedArguments *a, const PackedProduct *product, QuantizedRows *x, float *buffers) {
    int64_t values = a->rows * a->out_features;
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a->rows; row++) packed_quantize(a, row, buffers + thread * a->in_features, x);
    share_packed(product, 1, x, a->rows);
    if (a->kind == KIND_FLOAT32) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < values; i += 8) {
        int64_t count = values - i < 8 ? values - i : 8;
        store_any(a->output, i, load_any((int64_t)product->output, i, count, KIND_FLOAT32), count, a->kind);
    }
}

/* Returns 0, or 1 if there is not enough memory. */
EXPORT int linear_packed(const PackedArguments *given) {
    const PackedArguments arguments = *given, *a = &arguments;
    const PackedWeight weight = {(const uint8_t *)a->codes, (const void *)a->scale, (const void *)a->zero,
                                 (const float *)a->bias,    a->bits,                a->scale_kind,
                                 a->in_features,            a->out_features,        a->groups,
                                 (const int32_t *)a->quant_bias};
    int threads = a->rows * a->in_features * a->out_features < SMALL ? 1 : (int)a->threads;
    int narrow = a->kind != KIND_FLOAT32;
    int64_t codes_bytes = quantized_rows_bytes(a->rows, a->in_features, a->group);
    int64_t floats = narrow ? threads * a->in_features + a->rows * a->out_features : 0;
    char *memory = malloc((size_t)(codes_bytes + 4 * floats));
    if (!memory) return 1;
    float *buffers = (float *)memory;
    QuantizedRows x = quantized_rows_in(buffers + floats, a->rows, a->in_features, a->group);
    float *output = narrow ? buffers + threads * a->in_features : (float *)a->output;
    const PackedProduct product = {&weight, output, a->out_features};
#pragma omp parallel num_threads(threads) if (threads > 1)
    packed_region(a, &product, &x, buffers);
    free(memory);
    return 0;
}

typedef struct {
    /* addresses, and numbers; x, bias and output are float32, the weight is of `kind` */
    int64_t x, weight, bias, output, kind, rows, in_features, out_features, threads;
} FloatArguments;

EXPORT int linear_float(const FloatArguments *given) {
    const FloatArguments arguments = *given, *a = &arguments;
    int threads = a->rows * a->in_features * a->out_features < SMALL ? 1 : (int)a->threads;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    share_float((const void *)a->weight, a->kind, (const float *)a->bias, a->in_features, a->out_features,
                (const float *)a->x, a->rows, (float *)a->output, a->out_features);
    return 0;
}
