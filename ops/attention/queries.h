/* Rows of q, with every scale of K folded in that can be. */

/* One row of q, copied to `q` and quantized if that is asked for. */
static void load_query(const AttentionArguments *a, int64_t b, int64_t head, int64_t query, int64_t padded, float *q,
                       Row *row) {
    const float *from = (const float *)a->query + b * a->query_stride[0] + head * a->query_stride[1] +
                        query * a->query_stride[2];
    memcpy(q, from, sizeof(float) * (size_t)a->width);
    memset(q + a->width, 0, sizeof(float) * (size_t)(padded - a->width));
    if (!a->query_scale) return;
    float step = ((const float *)a->query_scale)[b * a->query_scale_stride[0] + head * a->query_scale_stride[1] +
                                                 query * a->query_scale_stride[2]];
    for (int64_t d = 0; d < padded; d += 8) store_f32(q + d, round_to_code(load_f32(q + d) / splat(step)));
    memset(q + a->width, 0, sizeof(float) * (size_t)(padded - a->width)); /* 0 / 0 is none */
    row->factor *= step;
}

/* One row of the query of scores by position, copied and padded. */
static void load_position_query(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t head, int64_t query,
                                float *to) {
    const Position *position = &a->position;
    const float *from = (const float *)position->query + b * position->query_stride[0] +
                        head * position->query_stride[1] + query * position->query_stride[2];
    memcpy(to, from, sizeof(float) * (size_t)position->width);
    memset(to + position->width, 0, sizeof(float) * (size_t)(plan->position_padded - position->width));
}

/* The whole number that the largest value of a row of q becomes. */
INLINE int largest_of(const Plan *plan) { return plan->wide ? LARGEST_PAIR : LARGEST_WHOLE; }

/* A row of q as digits in its place, of a step, 0 for the finest. */
static void query_to_digits(const AttentionArguments *a, const Plan *plan, float *q, float step, Digits *digits) {
#if HAS_INTEGER
    int64_t quads = byte_quads(a->width, a->key.kind), half = a->width / 2, gap = 4 * quads - half;
    if (a->key.kind == KIND_INT4) {
        if (gap) { /* the high half starts at a quad of its own */
            memmove(q + half + gap, q + half, sizeof(float) * (size_t)half);
            memset(q + half, 0, sizeof(float) * (size_t)gap);
        }
        quads *= 2;
    }
    to_digits(q, round_up(4 * quads, 16), step, largest_of(plan), offset_of(a->key.kind), digits);
#else
    (void)a, (void)plan, (void)q, (void)step, (void)digits;
#endif
}

/* A row of q as digits in its place, with a step for each group of channels. */
static void query_to_split_digits(const AttentionArguments *a, const Plan *plan, float *q, Digits *digits) {
#if HAS_INTEGER
    for (int64_t d = 0; d < a->width; d += plan->key_span, digits += plan->block_rows) {
        f32v sum = {0};
        for (int64_t i = d; i < d + plan->key_span; i += LANES) sum += load_lanes(q + i);
        to_digits(q + d, plan->key_span, 0.0f, LARGEST_WHOLE, offset_of(a->key.kind), digits);
        digits->shift = sum_of_lanes(sum);
    }
#else
    (void)a, (void)plan, (void)q, (void)digits;
#endif
}

/* Rows `first` to `first + count` with every scale of K folded in that can be; zero-padded to `padded` columns. */
OUTLINE void prepare_rows(const AttentionArguments *a, const Plan *plan, int64_t b, int64_t g, int64_t first,
                         int64_t count, Scratch *scratch) {
    int64_t padded = plan->padded, whole = round_up(count, plan->rows > DIRECT_ROWS ? ROW_STEP : 1);
    int scaled = plan->key_scale.data && !plan->key_scale.per_token;
    int per_channel = scaled && plan->key_scale.span < a->width;
    int varies = (int)plan->key_scale.per_token;
    int constant = plan->key_zero.data && !plan->key_zero.per_token && (varies || a->lse);
    const float *scale = scratch->channel_scale, *zero = scratch->channel_zero;
    if (scaled) load_channels(&plan->key_scale, b, g, 0, a->width, 1.0f, scratch->channel_scale);
    if (constant) load_channels(&plan->key_zero, b, g, 0, a->width, 0.0f, scratch->channel_zero);
    memset(scratch->q + count * padded, 0, sizeof(float) * (size_t)(padded * (whole - count)));
    memset(scratch->output, 0, sizeof(float) * (size_t)(padded * whole));
    memset(scratch->position_q + count * plan->position_padded, 0,
           sizeof(float) * (size_t)(plan->position_padded * (whole - count)));
    if (plan->wide) memset(scratch->key_digits + count, 0, sizeof(Digits) * (size_t)(whole - count));
    for (int64_t m = 0; m < count; m++) {
        int64_t query = (first + m) / plan->ratio, head = g * plan->ratio + (first + m) % plan->ratio;
        float *q = scratch->q + m * padded;
        Range seen = keys_of(a, b, query);
        Row row = {.best = -INFINITY, .factor = plan->factor};
        row.front = seen.from, row.limit = seen.to;
        load_query(a, b, head, query, padded, q, &row);
        if (a->position.query)
            load_position_query(a, plan, b, head, query, scratch->position_q + m * plan->position_padded);
        if (scaled && !per_channel) row.factor *= *scale; /* the products of quantized q and K stay whole numbers */
        for (int64_t d = 0; per_channel && d < a->width; d++) q[d] *= scale[d];
        f32v sum = {0};
        for (int64_t d = 0; d < padded; d += LANES) sum += load_lanes(q + d);
        row.q_sum = sum_of_lanes(sum);
        float shift = 0.0f;
        for (int64_t d = 0; constant && d < a->width; d++) shift += q[d] * zero[d];
        row.constant = varies ? shift : 0.0f, row.offset = varies ? 0.0f : -shift * row.factor;
        if (plan->key_mode == MODE_INTEGER) {
            if (!(row.q_sum - row.q_sum == 0.0f)) row.factor = NAN; /* digits would hide what is no number */
            if (plan->key_groups == GROUPS_CHANNELS)
                query_to_split_digits(a, plan, q, scratch->split_digits + m);
            else if (!plan->key_groups)
                query_to_digits(a, plan, q, plan->query_digits == 1 ? 1.0f : 0.0f, &scratch->key_digits[m]);
        }
        for (int64_t d = 0; plan->query_unit != 1.0f && d < padded; d++) q[d] *= plan->query_unit;
        scratch->rows[m] = row;
    }
}

/* The rows `first` to `stop` of q, in `folded`, with the scales of one group of tokens folded in, which are in
 * `channel_scale`; in `digits` the step that their largest value asks for, and as shift what zeros add to their scores,
 * NaN if a scale is no number, which digits would hide. */
OUTLINE void fold_rows(const Plan *plan, int64_t first, int64_t stop, const Scratch *scratch, float *folded,
                       Digits *digits) {
    int64_t padded = plan->padded;
    for (int64_t m = first; m < stop; m++) {
        f32v sum = {0}, shift = {0}, largest = {0};
        for (int64_t d = 0; d < padded; d += LANES) {
            f32v x = load_lanes(scratch->q + m * padded + d) * load_lanes(scratch->channel_scale + d);
            sum += x, shift += x * load_lanes(scratch->channel_zero + d);
            largest = max_lanes(largest, max_lanes(x, -x));
            store_lanes(folded + m * padded + d, x);
        }
        digits[m].step = max_of_lanes(largest) / (float)largest_of(plan);
        digits[m].shift = sum_of_lanes(shift + (sum - sum)) / plan->query_unit;
    }
}
