/* Which keys a query sees, masks aside. */

enum { LARGEST_COUNT = 1 << 29 }; /* of ops/attention/arguments.py: no sum of lengths, windows and positions wraps */

INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

INLINE int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

INLINE int64_t bounded(int64_t count) {
    return count < -LARGEST_COUNT ? -LARGEST_COUNT : count > LARGEST_COUNT ? LARGEST_COUNT : count;
}

/* Keys of a block, relative to its first. */
typedef struct {
    int64_t from, to;
} Range;

/* Tokens in use of one sequence from the first key on, as the caller says: may exceed those stored. */
static int64_t length_of(const AttentionArguments *a, int64_t b) {
    if (!a->length) return a->keys + a->behind;
    int64_t at = b * a->length_stride;
    int64_t length = a->length_kind == KIND_INT32 ? ((const int32_t *)a->length)[at] : ((const int64_t *)a->length)[at];
    return bounded(length) - a->before;
}

/* Keys that a query sees, masks aside. */
static Range keys_of(const AttentionArguments *a, int64_t b, int64_t query) {
    int64_t length = length_of(a, b), newest = length - a->queries + query;
    Range seen = {0, clamped(length, a->keys)};
    if (a->causal && !a->mask) {
        seen.to = clamped(newest + 1, seen.to);
        if (a->window) seen.from = clamped(newest - bounded(a->window) + 1, seen.to);
    }
    return seen;
}
