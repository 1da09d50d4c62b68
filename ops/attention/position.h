/* Scores by position. */

/* The rows of the table of one block of keys: where they lie, or, beyond its ends or if they want padding, a copy. */
static Rows position_rows(const AttentionArguments *a, int64_t b, int64_t start, int64_t keys, int64_t padded,
                          float *tile) {
    const Position *position = &a->position;
    int64_t first = bounded(((const int64_t *)position->start)[b * position->start_stride]) + a->before + start;
    const float *table = (const float *)position->table;
    if (first >= 0 && first <= position->rows - keys && position->width == padded && position->row_stride == padded)
        return (Rows){(const char *)(table + first * padded), padded * 4, padded};
    for (int64_t j = 0; j < keys; j++) {
        int64_t row = clamped(first + j, position->rows - 1);
        memcpy(tile + j * padded, table + row * position->row_stride, sizeof(float) * (size_t)position->width);
        memset(tile + j * padded + position->width, 0, sizeof(float) * (size_t)(padded - position->width));
    }
    return (Rows){(const char *)tile, padded * 4, padded};
}

/* positions[m][j] = position_q[m] . table[position_start + j] for one block of keys. The tiles of K are free by now. */
OUTLINE void position_scores(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t count, int64_t start,
                            int64_t keys, Scratch *scratch) {
    int64_t padded = plan->position_padded;
    Rows rows = position_rows(a, b, start, keys, padded, scratch->keys), nothing = {rows.data, 0, 0};
    if (plan->rows <= DIRECT_ROWS) {
        direct_scores_any(scratch->position_q, padded, count, rows, keys, scratch->positions, nothing, KIND_FLOAT32);
        return;
    }
    transpose_keys((const float *)rows.data, keys, padded, scratch->panels);
    panel_scores(scratch->position_q, padded, a->position.width, scratch->panels, scratch->positions, count, start,
                 keys, scratch);
}
