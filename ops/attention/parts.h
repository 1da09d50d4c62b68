/* Scales and zeros as floats. */

INLINE float part_value(const Part *part, int64_t at) {
    if (part->kind == KIND_FLOAT32) return ((const float *)part->data)[at];
    return half_to_float(((const uint16_t *)part->data)[at]);
}

/* Where a sequence, a KV head and a token start in a part. */
INLINE int64_t part_start(const Part *part, int64_t b, int64_t g, int64_t token) {
    token += part->first;
    int64_t row = part->per_token ? (part->group == 1 ? token : token / part->group) : 0;
    return b * part->stride[0] + g * part->stride[1] + row * part->stride[2];
}

/* The part of one token for each channel, or `otherwise` if there is none. `to` has LANES floats behind the last. */
OUTLINE void load_channels(const Part *part, int64_t b, int64_t g, int64_t token, int64_t width, float otherwise,
                          float *to) {
    int64_t span = part->data ? part->span : width, start = part_start(part, b, g, token), d = 0;
    if (part->data && span == 1 && part->stride[3] == 1) {
        const char *from = (const char *)part->data + start * kind_size((int)part->kind);
        if (part->kind == KIND_FLOAT32)
            for (; d + 8 <= width; d += 8) store_f32(to + d, load_f32((const float *)from + d));
        else
            for (; d + 8 <= width; d += 8) store_f32(to + d, load_as_f32(from + 2 * d, KIND_FLOAT16));
    }
    for (int64_t column = d / span; d < width; d += span, column++) {
        float x = part->data ? part_value(part, start + column * part->stride[3]) : otherwise;
        if (span == 1)
            to[d] = x;
        else
            for (int64_t i = d; i < d + span; i += LANES) store_lanes(to + i, all_lanes(x));
    }
}

/* Per-token values of one block of keys, zeros behind the last; nothing if the part does not vary along the keys. */
OUTLINE void load_tokens(const Part *part, int64_t b, int64_t g, int64_t start, int64_t keys, float *to) {
    if (!part->per_token) return;
    int64_t at = part_start(part, b, g, start), step = part->stride[2], j = 0;
    if (part->group == 1 && step == 1)
        for (; j + 8 <= keys; j += 8) {
            const char *from = (const char *)part->data + (at + j) * kind_size((int)part->kind);
            store_f32(to + j, load_as_f32(from, part->kind == KIND_FLOAT32 ? KIND_FLOAT32 : KIND_FLOAT16));
        }
    if (part->group == 1)
        for (; j < keys; j++) to[j] = part_value(part, at + j * step);
    for (; j < keys; j++) to[j] = part_value(part, part_start(part, b, g, start + j));
    memset(to + keys, 0, sizeof(float) * (size_t)(KEY_BLOCK - keys));
}
