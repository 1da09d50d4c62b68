/* What a call of the codec is, packed as ops/codec/cpu.py does. */
typedef struct {
    int64_t x, codes, scale, zero, position, levels; /* addresses; 0 for what is absent */
    int64_t x_kind, code_kind, bits, scale_kind, zero_kind;
    int64_t shape[4], capacity, scale_groups, zero_groups, token_group, threads;
    int64_t x_stride[3], codes_stride[3], scale_stride[4], zero_stride[4];
} CodecArguments;
