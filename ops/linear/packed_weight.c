/* pack_panels: codes as they are stored to the panels of packed.h. */

typedef struct {
    /* addresses: int8 [N][K], or with 4 bits uint8 [N][K / 2] in blocks of 32 codes; and panels */
    int64_t codes, panels;
    int64_t bits, in_features, out_features, threads;
} PackArguments;

/* A word of `count` <= 4 codes of int8, zeros behind. */
INLINE uint32_t packed_int8_word(const uint8_t *from, int64_t count) {
    uint8_t bytes[4] = {0};
    uint32_t word;
    for (int64_t i = 0; i < count; i++) bytes[i] = from[i] ^ 0x80;
    memcpy(&word, bytes, 4);
    return word;
}

/* A block of 32 codes of int4: byte i holds the codes i and i + 16; words of a panel those of k to k + 7. */
INLINE void packed_int4_words(const uint8_t *from, uint32_t to[4]) {
    const uint32_t low = 0x0f0f0f0fu;
    uint32_t words[4];
    memcpy(words, from, 16);
    for (int i = 0; i < 2; i++) {
        to[i] = (words[2 * i] & low) | (words[2 * i + 1] & low) << 4;
        to[i + 2] = (words[2 * i] >> 4 & low) | (words[2 * i + 1] & ~low);
    }
}

static void packed_channel_8(const uint8_t *from, int64_t in_features, uint32_t *to) {
    int64_t whole = in_features / 4, words = packed_depth(in_features) / 4;
    for (int64_t k = 0; k < whole; k++) to[k * PACKED_CHANNELS] = packed_int8_word(from + 4 * k, 4);
    for (int64_t k = whole; k < words; k++) {
        int64_t left = in_features - 4 * k;
        to[k * PACKED_CHANNELS] = packed_int8_word(from + 4 * k, left); /* none, if it is negative */
    }
}

static void packed_channel_4(const uint8_t *from, int64_t in_features, uint32_t *to) {
    for (int64_t block = 0; block < in_features / PACKED_STEP; block++) {
        uint32_t words[4];
        packed_int4_words(from + 16 * block, words);
        for (int i = 0; i < 4; i++) to[(4 * block + i) * PACKED_CHANNELS] = words[i];
    }
}

EXPORT int pack_panels(const PackArguments *given) {
    const PackArguments arguments = *given, *a = &arguments;
    int64_t words = packed_depth(a->in_features) * a->bits / 32, row_bytes = a->in_features * a->bits / 8;
    int64_t panels = (a->out_features + PACKED_CHANNELS - 1) / PACKED_CHANNELS;
    int threads = panels * words < SMALL ? 1 : (int)a->threads;
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t c = 0; c < PACKED_CHANNELS; c++) {
            int64_t n = panel * PACKED_CHANNELS + c;
            uint32_t *to = (uint32_t *)a->panels + panel * words * PACKED_CHANNELS + c;
            const uint8_t *from = (const uint8_t *)a->codes + n * row_bytes;
            if (n >= a->out_features)
                for (int64_t k = 0; k < words; k++) to[k * PACKED_CHANNELS] = 0;
            else if (a->bits == 8)
                packed_channel_8(from, a->in_features, to);
            else
                packed_channel_4(from, a->in_features, to);
        }
    return 0;
}
