/* What the threads of a pass work in, and how they share it. Rows are tokens, one sequence after the other. */

enum { BLOCK_ROWS = 128, ENCODED_ROWS = 64, ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1 };

typedef int (*Encoder)(const CodecArguments *);

typedef struct {
    const DecoderPass *pass;
    int64_t batch, tokens, rows, hidden, threads;
    Encoder encode, encode_token; /* those of the codec's kernel */
    float *states;                /* [rows][hidden] */
    float *projected;             /* [rows][H * D and twice G * D] */
    float *attended;              /* [rows][H * D] */
    float *biased;                /* [rows][H][E]: queries of the scores that biases of k make */
    float *input;                 /* [BLOCK_ROWS][what the widest linear reads] */
    float *branch;                /* [BLOCK_ROWS][gate and up] */
    float *added;                 /* [BLOCK_ROWS][hidden] */
    QuantizedRows quantized;      /* room for BLOCK_ROWS of them */
    Attention attention;
    int attends; /* whether there is memory for it */
    Team team;
    atomic_int failed;
} Work;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
