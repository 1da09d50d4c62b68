/* Scores and output of one block of keys, each in its mode. */

/* scores[m][j] = q[m] . key[j] for one block of keys; `next`, the rows of V, is fetched meanwhile. */
OUTLINE void block_scores(const AttentionArguments *a, const Plan *plan, Rows key, Rows next, int64_t b, int64_t g,
                         int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t padded = plan->padded;
    if (plan->key_mode == MODE_DIRECT && plan->key_groups) {
        folded_scores(a, plan, key, next, b, g, count, start, keys, scratch);
        return;
    }
    if (plan->key_mode == MODE_DIRECT) {
        direct_scores_any(scratch->q, padded, count, key, keys, scratch->scores, next, a->key.kind);
        return;
    }
#if HAS_INTEGER
    if (plan->key_groups == GROUPS_CHANNELS) {
        split_scores(a, plan, key, next, b, g, count, start, keys, scratch);
        return;
    }
    if (plan->key_mode == MODE_INTEGER) {
        int64_t step = row_step(MODE_INTEGER), quads = byte_quads(a->width, a->key.kind);
        int64_t tiles = (keys + TILE_COLUMNS - 1) / TILE_COLUMNS;
        int64_t folded_to = plan->key_groups ? 0 : keys;
        Folded now = {scratch->q, scratch->key_digits, NULL};
        Ahead ahead = ahead_of(next, keys, tiles * quads), nothing = {(const char *)scratch->keys, 0};
        for (int64_t j = 0; j < keys; j += TILE_COLUMNS, ahead.data += ahead.step * quads) {
            Rows from = {key.data + j * key.stride, key.stride, key.width};
            if (j >= folded_to) folded_to = fold_digits(a, plan, b, g, count, start, j, keys, &now, scratch);
            interleave_keys(from, keys - j, (uint8_t *)scratch->keys, a->key.kind);
            for (int64_t m = 0; m < count; m += step) {
                Range seen = seen_by(scratch, m, step, count, start, keys);
                if (j >= seen.from && j < seen.to)
                    integer_scores((const int32_t *)now.q + m * padded, padded, (const uint8_t *)scratch->keys,
                                   quads, scratch->scores + m * KEY_BLOCK + j, KEY_BLOCK, now.digits + m,
                                   m ? nothing : ahead, a->key.kind, count - m < step ? count - m : step,
                                   plan->query_digits);
            }
        }
        return;
    }
#endif
    decode_block(a, &a->key, plan->key_groups, key, b, g, start, keys, padded, scratch,
                 scratch->keys);
    if (plan->key_mode == MODE_DECODED) {
        Rows tile = {(const char *)scratch->keys, padded * 4, padded};
        direct_scores_any(scratch->q, padded, count, tile, keys, scratch->scores, next, KIND_FLOAT32);
        return;
    }
    transpose_keys(scratch->keys, keys, padded, scratch->panels);
    panel_scores(scratch->q, padded, a->width, scratch->panels, scratch->scores, count, start, keys, scratch);
}

/* output[m] += sum_j weights[m][j] value[j] for one block of keys; `next`, the rows of K that follow, is fetched. */
OUTLINE void block_output(const AttentionArguments *a, const Plan *plan, Rows value, Rows next, int64_t b, int64_t g,
                         int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int64_t padded = plan->padded, step = row_step(plan->value_mode);
    if (plan->value_mode == MODE_DIRECT) {
        direct_output_any(scratch->scores, count, value, keys, scratch->output, padded, a->value.kind);
        return;
    }
#if HAS_INTEGER
    if (plan->value_groups == GROUPS_CHANNELS) {
        split_output(a, plan, value, next, b, g, count, start, keys, scratch);
        return;
    }
    if (plan->value_mode == MODE_INTEGER) {
        int is_int4 = a->value.kind == KIND_INT4;
        int64_t bytes = is_int4 ? a->width / 2 : a->width, columns = is_int4 ? 16 : TILE_COLUMNS;
        int64_t high = is_int4 ? round_up(bytes, 16) : 16, turns = (keys + 3) / 4;
        Ahead ahead = ahead_of(next, keys, (bytes + columns - 1) / columns * turns);
        Ahead nothing = {(const char *)scratch->scores, 0};
        for (int64_t d = 0; d < bytes; d += columns, ahead.data += ahead.step * turns)
            for (int64_t m = 0; m < count; m += step) {
                Range seen = seen_by(scratch, m, step, count, start, keys);
                Rows from = {value.data + seen.from * value.stride, value.stride, value.width};
                if (seen.from < seen.to)
                    integer_output((const int32_t *)scratch->scores + m * KEY_BLOCK + seen.from, KEY_BLOCK, from, d,
                                   seen.to - seen.from, scratch->output + m * padded + d, high, padded,
                                   scratch->weight_digits + m, (High){0}, m ? nothing : ahead, a->value.kind,
                                   count - m < step ? count - m : step);
            }
        return;
    }
#endif
    (void)next;
    decode_block(a, &a->value, plan->value_groups, value, b, g, start, keys, padded,
                 scratch, scratch->values);
    if (plan->value_mode == MODE_DECODED) {
        Rows tile = {(const char *)scratch->values, padded * 4, padded};
        direct_output_any(scratch->scores, count, tile, keys, scratch->output, padded, KIND_FLOAT32);
        return;
    }
    for (int64_t d = 0; d < padded; d += PANEL)
        for (int64_t m = 0; m < count; m += step) {
            Range seen = seen_by(scratch, m, step, count, start, keys);
            if (seen.from < seen.to)
                gemm_rows(scratch->scores + m * KEY_BLOCK + seen.from, KEY_BLOCK,
                          scratch->values + seen.from * padded + d, padded, seen.to - seen.from,
                          scratch->output + m * padded + d, padded, 1);
        }
}
