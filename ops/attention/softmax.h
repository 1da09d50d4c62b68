/* Scores become weights, one block of keys after the other. */

/* Additive mask of one row and block of keys, in units of log2. */
OUTLINE void load_bias(const AttentionArguments *a, int64_t b, int64_t head, int64_t query, int64_t start, int64_t keys,
                      float *bias) {
    int64_t at = b * a->mask_stride[0] + head * a->mask_stride[1] + query * a->mask_stride[2], step = a->mask_stride[3];
    if (a->mask_kind == KIND_BOOL) {
        const uint8_t *seen = (const uint8_t *)a->mask + at + start * step;
        for (int64_t j = 0; j < keys; j++) bias[j] = seen[j * step] ? 0.0f : -INFINITY;
    } else {
        const float *added = (const float *)a->mask + at + start * step;
        for (int64_t j = 0; j < keys; j++) { /* the lowest float, which masks too, must not become -inf */
            float x = added[j * step], scaled = x * 1.44269504f;
            bias[j] = x > -INFINITY && scaled < -FLT_MAX ? -FLT_MAX : scaled;
        }
    }
}

/* One row's products of a block of keys, those in `computed`, become weights, 0 outside of `seen`; the row's sums and
 * its output so far are brought up to date. `bias` and `positions`, products by position, may be NULL. */
OUTLINE void soften_row(const Plan *plan, Row *row, float *scores, Range computed, Range seen, const Scratch *scratch,
                       const float *bias, const float *positions, float *output) {
    f32v largest = all_lanes(-INFINITY), factor = all_lanes(row->factor);
    i32v sound = (i32v)(largest <= largest); /* all true, until a score is NaN or +inf */
    int scaled_keys = plan->key_scale.per_token, shifted = plan->key_zero.per_token || row->constant != 0.0f;
    for (int64_t j = computed.from; j < computed.to; j += LANES) {
        f32v s = load_lanes(scores + j);
        if (shifted) s -= all_lanes(row->constant) + load_lanes(scratch->key_zero + j) * all_lanes(row->q_sum);
        s *= factor;
        if (scaled_keys) s *= load_lanes(scratch->key_scale + j);
        if (positions) s += load_lanes(positions + j) * all_lanes(plan->factor);
        if (bias) s += load_lanes(bias + j);
        if (j < seen.from || j + LANES > seen.to) {
            i32v key = lane_numbers() + (int32_t)j;
            s = select_lanes((i32v)(key >= (int32_t)seen.from) & (i32v)(key < (int32_t)seen.to), s,
                             all_lanes(-INFINITY));
        }
        largest = max_lanes(largest, s);
        sound &= (i32v)(s <= all_lanes(FLT_MAX));
        store_lanes(scores + j, s);
    }
    float best = max_of_lanes(largest) > row->best ? max_of_lanes(largest) : row->best;
    float shift = best == -INFINITY ? 0.0f : best, fade = exp2_of_one(row->best - shift);
    f32v total = {0}, weighted = {0}, zeros = {0};
    int scaled = plan->value_scale.per_token, shifted_values = plan->value_zero.per_token;
    for (int64_t j = computed.from; j < computed.to; j += LANES) {
        f32v weight = exp2_of(load_lanes(scores + j) - all_lanes(shift));
        total += weight;
        if (scaled) {
            weight *= load_lanes(scratch->value_scale + j);
            weighted += weight;
        }
        if (shifted_values) zeros += weight * load_lanes(scratch->value_zero + j);
        store_lanes(scores + j, weight * all_lanes(plan->weight_unit));
    }
    float block_weighted = sum_of_lanes(scaled ? weighted : total);
    row->total = row->total * fade + sum_of_lanes(total);
    row->weighted = row->weighted * fade + block_weighted;
    row->zeros = row->zeros * fade + sum_of_lanes(zeros);
    if (!all_true(sound)) row->total = NAN; /* max and exp2 would hide it */
    if (plan->value_mode == MODE_INTEGER && !(block_weighted - block_weighted == 0.0f)) row->total = NAN;
    if (best != row->best)
        for (int64_t d = 0; d < plan->padded; d += LANES)
            store_lanes(output + d, load_lanes(output + d) * all_lanes(fade));
    row->best = best;
}

/* The products of one block of keys become weights, for each row the keys that both stages of its group multiply. */
OUTLINE void soften_rows(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first,
                        int64_t count, int64_t start, int64_t keys, Scratch *scratch) {
    int by_group = plan->rows > DIRECT_ROWS;
    for (int64_t m = 0; m < count; m++) {
        Row *row = &scratch->rows[m];
        float *scores = scratch->scores + m * KEY_BLOCK;
        int64_t query = (first + m) / plan->ratio, head = g * plan->ratio + (first + m) % plan->ratio;
        Range seen = {clamped(row->front - start, keys), clamped(row->limit - start, keys)};
        Range computed = {0, keys};
        if (by_group) {
            int64_t steps[2] = {row_step(plan->key_mode), row_step(plan->value_mode)};
            Range other = seen_by(scratch, m / steps[0] * steps[0], steps[0], count, start, keys);
            computed = seen_by(scratch, m / steps[1] * steps[1], steps[1], count, start, keys);
            computed.from = other.from < computed.from ? other.from : computed.from;
            computed.to = other.to > computed.to ? other.to : computed.to;
        }
        if (computed.from >= computed.to) continue;
        computed.to = round_up(computed.to, LANES);
        if (a->mask) load_bias(a, b, head, query, start, keys, scratch->bias);
        soften_row(plan, row, scores, computed, seen, scratch, a->mask ? scratch->bias : NULL,
                   a->position.query ? scratch->positions + m * KEY_BLOCK : NULL, scratch->output + m * plan->padded);
#if HAS_INTEGER
        if (plan->value_mode == MODE_INTEGER && !plan->value_groups)
            to_digits(scores + computed.from, computed.to - computed.from, 0.0f, LARGEST_WHOLE,
                      offset_of(a->value.kind), &scratch->weight_digits[m]);
#endif
    }
}
