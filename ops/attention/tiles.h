/* Products of a block of keys straight from memory, or from a tile into which its codes are decoded. */

/* Codes of one block as floats, with its scales and zeros where they are grouped both ways. */
OUTLINE void decode_block(const AttentionArguments *a, const Side *side, int grouped, Rows from, int64_t b, int64_t g,
                         int64_t start, int64_t keys, int64_t padded, Scratch *scratch, float *tile) {
    switch (side->kind) {
    case KIND_INT8: decode_rows_of(from, keys, padded, tile, KIND_INT8); break;
    case KIND_FLOAT32: decode_rows_of(from, keys, padded, tile, KIND_FLOAT32); break;
    case KIND_BFLOAT16: decode_rows_of(from, keys, padded, tile, KIND_BFLOAT16); break;
    case KIND_FLOAT16: decode_rows_of(from, keys, padded, tile, KIND_FLOAT16); break;
    case KIND_INT4: decode_rows_of(from, keys, padded, tile, KIND_INT4); break;
    case KIND_FLOAT8_E4M3: decode_rows_of(from, keys, padded, tile, KIND_FLOAT8_E4M3); break;
    default: decode_rows_of(from, keys, padded, tile, KIND_FLOAT8_E5M2);
    }
    if (!grouped) return;
    float *scale = scratch->channel_scale, *zero = scratch->channel_zero;
    for (int64_t j = 0; j < keys; j++) {
        int64_t token = start + j;
        if (!j || (side->scale.per_token && (token + side->scale.first) % side->scale.group == 0))
            load_channels(&side->scale, b, g, token, a->width, 1.0f, scale);
        if (!j || (side->zero.per_token && (token + side->zero.first) % side->zero.group == 0))
            load_channels(&side->zero, b, g, token, a->width, 0.0f, zero);
        float *row = tile + j * padded;
        for (int64_t d = 0; d < padded; d += LANES)
            store_lanes(row + d, (load_lanes(row + d) - load_lanes(zero + d)) * load_lanes(scale + d));
        for (int64_t d = a->width; d < padded; d++) row[d] = 0.0f;
    }
}

OUTLINE void direct_scores_any(const float *q, int64_t padded, int64_t rows, Rows key, int64_t keys, float *scores,
                              Rows ahead, int64_t kind) {
    switch (kind) {
#if !HAS_INTEGER
    case KIND_INT8: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_INT8); break;
    case KIND_INT4: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_INT4); break;
#endif
    case KIND_FLOAT32: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT32); break;
    case KIND_BFLOAT16: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_BFLOAT16); break;
    case KIND_FLOAT16: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT16); break;
    case KIND_FLOAT8_E4M3: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT8_E4M3); break;
    default: direct_scores(q, padded, rows, key, keys, scores, KEY_BLOCK, ahead, KIND_FLOAT8_E5M2);
    }
}

OUTLINE void direct_output_any(const float *weights, int64_t rows, Rows value, int64_t keys, float *to,
                              int64_t padded, int64_t kind) {
    switch (kind) {
#if !HAS_INTEGER
    case KIND_INT8: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_INT8); break;
    case KIND_INT4: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_INT4); break;
#endif
    case KIND_FLOAT32: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT32); break;
    case KIND_BFLOAT16: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_BFLOAT16); break;
    case KIND_FLOAT16: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT16); break;
    case KIND_FLOAT8_E4M3: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT8_E4M3); break;
    default: direct_output(weights, KEY_BLOCK, rows, value, keys, to, padded, KIND_FLOAT8_E5M2);
    }
}

#if HAS_INTEGER
/* How to fetch rows in a number of turns; nothing unless they lie side by side. */
static Ahead ahead_of(Rows next, int64_t keys, int64_t turns) {
    int64_t step = next.stride == next.width ? round_up(keys * next.width / turns, 64) : 0;
    return (Ahead){next.data, step < 128 ? step : 128};
}
#endif

/* scores[m][j] = q[m] . key[j] for one block of keys in panels, `depth` of `padded` columns, where m sees j. */
static void panel_scores(const float *q, int64_t padded, int64_t depth, const float *panels, float *scores,
                         int64_t count, int64_t start, int64_t keys, const Scratch *scratch) {
    for (int64_t j = 0; j < keys; j += PANEL)
        for (int64_t m = 0; m < count; m += ROW_STEP) {
            Range seen = seen_by(scratch, m, ROW_STEP, count, start, keys);
            if (j + PANEL > seen.from && j < seen.to)
                gemm_rows(q + m * padded, padded, panels + j * padded, PANEL, depth, scores + m * KEY_BLOCK + j,
                          KEY_BLOCK, 0);
        }
}
