/*
 * code.h - the window code: 2, 2.5, 3, 3.5 or 4 bits per weight to integers 0..127.
 *
 * A row of weights is a string of bits. Weight k owns the bits [e_k - b_k, e_k), b_k being
 * width[k & 1], and its value depends on the 16 bits that end at e_k (zero bits stand before
 * the row):
 *
 *     h_k = older byte of the window XOR A * newer byte      A an 8 x 8 matrix over GF(2)
 *     v_k = high[h_k >> 4] + low[h_k & 15]                   0..127
 *     weight = scale_row * (v_k - 64)
 *
 * Invariant: decoding is a pure function of those 16 bits, so any block can be decoded on its
 * own, and every decoder, on any machine, gives the same integers. docs/CODE.md defines the
 * code and works an example by hand.
 */
#ifndef CODE_CODE_H
#define CODE_CODE_H

#include "hepta.h"

enum {
    CODE_BLOCK = 16,   /* weights per block: half_bits bytes of one row */
    CODE_CENTRE = 64,  /* the value that stands for weight 0 */
    CODE_WINDOW = 16,  /* bits that decide one value */
    CODE_MIN_RATE = 4, /* half bits per weight */
    CODE_MAX_RATE = 8
};

struct code_table {
    int half_bits;     /* 4..8: twice the bits per weight */
    int width[2];      /* bits owned by even and odd weights */
    uint8_t column[8]; /* of A: the hash of bit 8 + j of the window, bit 15 being the newest */
    uint8_t high[16];  /* v = high[hash >> 4] + low[hash & 15], 0..127 */
    uint8_t low[16];
    uint8_t value[256]; /* the same as one table: v = value[hash] */
    float unit; /* v units per standard deviation of Gaussian weights: scale = sigma / unit */
};

/* The table of a rate, NULL if half_bits is not in 4..8. */
const struct code_table *code_table_get(int half_bits);

/* The hash of a window, bit 15 being the newest. */
static inline uint8_t code_hash(const struct code_table *table, uint32_t window) {
    uint32_t hash = window & 255;
    for (int j = 0; j < 8; j++) {
        hash ^= window >> (8 + j) & 1 ? table->column[j] : 0u;
    }
    return (uint8_t)hash;
}

/* Bytes of a row of n weights, n a multiple of 16. */
size_t code_row_bytes(int half_bits, size_t n);

/*
 * Decodes one row of n weights (a multiple of 16) whose block b is at bits + b * block_stride:
 * v[0..n) receives 0..127. The reference for every decode kernel.
 */
void code_decode_row(const struct code_table *table, const uint8_t *bits, size_t block_stride,
                     size_t n, uint8_t *v);

/*
 * Encodes `rows` rows of n floats (row-major, n a multiple of 16): row r, block b goes to
 * out + r * row_stride + b * block_stride. Weight k of row r is read back as
 * scale[r] * (v - 64); the encoder minimises the sum of squared differences over the row.
 * A scale that is not positive and finite codes the row as zeros; values beyond 256 scales
 * (and infinities) count as 256, NaN as -256: callers reject them. `threads` <= 0 means 1.
 * The output does not depend on the instruction set or the number of threads.
 * Errors: HEPTA_ERROR_ARGUMENT for a ragged n, HEPTA_ERROR_MEMORY (about 31 MiB a thread).
 */
hepta_status code_encode_rows(const struct code_table *table, const float *x, const float *scale,
                              size_t rows, size_t n, uint8_t *out, size_t row_stride,
                              size_t block_stride, int threads, hepta_error *err);

enum { CODE_LAG_MAX = 4, CODE_WIDTH_MAX = 2048 };

/*
 * What a row's errors cost and how weights make good for the errors before them: e^T H e, where
 * H (n, n) = U D U^T with U unit upper triangular, is the sum over k of
 * D_k (e_k + sum over j < k of U_jk e_j)^2.
 */
typedef struct code_feedback {
    size_t n;            /* weights of a row, a multiple of 16 */
    unsigned lag;        /* blocks of 16 that are undecided behind the newest */
    const float *weight; /* (n) D */
    const float *near;   /* (n, 16 * (lag + 1)): U_jk of j with the weights k of its own block and
                            the next, 0 where k <= j */
    const float *const *far; /* (n / 16): of block b > lag, (16, 16 * (b - lag)): U_jk of its
                                weights k with j in the blocks before b - lag */
    /* kernels->matmul_f32 */
    void (*matmul)(const float *w, uint32_t n_rows, uint32_t n_cols, const float *x,
                   size_t x_stride, uint32_t n_tokens, float *y, size_t y_stride);
} code_feedback;

/*
 * As code_encode_rows(), minimising e^T H e with a beam of about `width` paths (1 to 2048): the
 * wider, the better and slower.
 */
hepta_status code_encode_feedback(const struct code_table *table, const code_feedback *m,
                                  unsigned width, const float *x, const float *scale, size_t rows,
                                  uint8_t *out, size_t row_stride, size_t block_stride, int threads,
                                  hepta_error *err);

/*
 * For tests: the variants of the encoder this machine can run ("generic" is always one).
 * code_encode_variant(i) is NULL past the last; code_encode_force(NULL) returns to the best.
 */
const char *code_encode_variant(int i);
bool code_encode_force(const char *name);
const char *code_encode_variant_used(void);

#endif
