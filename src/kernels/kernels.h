/*
 * kernels.h - the arithmetic of the forward pass: one table of functions per instruction set.
 *
 * kernels/ref.c is the specification (docs/NUMERICS.md); every other table gives the same bits,
 * checked with memcmp. Kernels cannot fail; sizes are preconditions. A kernel works on the
 * part of its output that it is given, so that callers may cut the work into any pieces.
 *
 * Virtual lanes: a float reduction over n items keeps 16 partial sums, item i in lane i mod 16,
 * in order of i, then adds lanes in the tree (l, l+8), (l, l+4), (l, l+2), (l, l+1).
 */
#ifndef KERNELS_KERNELS_H
#define KERNELS_KERNELS_H

#include "base/base.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum {
    KERNELS_LANES = 16,           /* virtual lanes of a float reduction */
    KERNELS_ATTENTION_BLOCK = 64, /* positions whose softmax is formed together */
    KERNELS_MAX_QUERIES = 16,     /* of a call of attention */
    KERNELS_WEIGHT_MAX =
        16383, /* largest integer weight of a value in a Q8 cache: two 7-bit halves */
    KERNELS_MAX_COLS = 132096 /* 128 * 127 * n_cols < 2^31, n_cols a multiple of 16 */
};
/* for matmul_packed: 128 tokens' activations, 32 rows of weights */
#define KERNELS_SCRATCH_BYTES(n_cols) ((size_t)160 * ((n_cols) + 64))
#define KERNELS_TINY 0x1p-100f /* a token whose largest activation is below counts as zero */
/* for attention */
#define KERNELS_ATTENTION_SCRATCH_BYTES(head_dim)                                                  \
    ((size_t)4 * (4 * KERNELS_ATTENTION_BLOCK + 2 * (size_t)(head_dim)) +                          \
     KERNELS_MAX_QUERIES * KV_ROW(head_dim))

/*
 * H = (Hartley_m (x) Hadamard_2^p) D with n = m * 2^p, m odd, D signs from a seed: orthonormal.
 * After it, n is padded with zeros to a multiple of 16.
 */
typedef struct rotation {
    uint32_t n, n_padded;
    uint32_t m, pow2;     /* pow2 = 2^p */
    float *signs;         /* (n) +1 or -1 */
    float *hartley;       /* (m, m), NULL if m = 1 */
    float hadamard_scale; /* 1 / sqrt(2^p) */
} rotation;
hepta_status rotation_create(uint32_t n, uint64_t seed, rotation **out, hepta_error *err);
void rotation_free(rotation *r);

/* A packed matrix as it lies in the file (docs/FORMAT.md); n_cols padded to a multiple of 16. */
typedef struct packed_matrix {
    uint32_t half_bits;    /* 4..8: trellis code, weight = scale * (v - 64); 16: int8 */
    uint32_t n_rows;       /* rows stored are rounded up to a multiple of 16 */
    uint32_t n_cols;       /* multiple of 16 */
    const uint8_t *codes;  /* strips of 16 rows, groups of 64 columns, planes of bytes */
    const uint8_t *scales; /* bfloat16 (n_rows), little-endian */
} packed_matrix;

/* int8 activations of one token with one scale: x = q * scale. */
typedef struct activation {
    const int8_t *q; /* (n_cols), |q| <= 127 */
    float scale;
    int32_t sum; /* of q */
} activation;

/*
 * The cached keys and values of one KV head of one sequence. F32 and F16: rows of head_dim items,
 * one per position. Q8: int8 with a float scale per row, rows filled up with zeros to KV_ROW items
 * and laid out for dot products of four bytes: of keys, item d of position t is at
 * kv_key_index(t, d, KV_ROW), of values at kv_value_index; positions go up to a multiple of
 * KV_TILE, those past the end may hold anything.
 */
typedef struct kv_cache {
    hepta_cache_type type;
    void *k, *v;
    float *k_scale, *v_scale; /* Q8: one per position */
} kv_cache;
enum { KV_TILE = 16 };
#define KV_ROW(head_dim) (((size_t)(head_dim) + 15) / 16 * 16)

static inline size_t kv_key_index(size_t position, size_t d, size_t row) {
    return position / 16 * 16 * row + d / 4 * 64 + position % 16 * 4 + d % 4;
}
static inline size_t kv_value_index(size_t position, size_t d, size_t row) {
    return position / 4 * 4 * row + d * 4 + position % 4;
}

/* Bytes of k, and of v, for n positions. */
uint64_t kv_bytes(hepta_cache_type type, uint32_t head_dim, uint64_t n);

/* One head of one token. */
typedef struct attention_query {
    const float *q; /* (head_dim) */
    float *out;     /* (head_dim), does not overlap q */
    uint32_t n_pos; /* it attends to positions 0 .. n_pos - 1; n_pos >= 1 */
} attention_query;

typedef struct kernels {
    const char *name;
    uint32_t macs_per_microsecond; /* products with packed weights, about: to plan threads */

    /* ---- integer linear layers ---- */

    /* y[t * y_stride + r] = (float)(sum_c w_rc q_tc) * row_scale_r * x_scale_t for rows
     * [row_begin, row_end) (row_begin a multiple of 16) and n_tokens tokens.
     * scratch: KERNELS_SCRATCH_BYTES(n_cols). */
    void (*matmul_packed)(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                          const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                          uint8_t *scratch);

    /* y[c] = row_scale_r * w_rc: one row as floats (embeddings). scratch: n_cols bytes. */
    void (*unpack_row)(const packed_matrix *w, uint32_t row, float *y, uint8_t *scratch);
    /* q = rint(x * (127 / amax)), ties to even; *scale = amax / 127. amax < KERNELS_TINY: all
     * zero; a NaN or an infinity among x: q zero, scale NaN. */
    void (*quantize_activation)(const float *x, uint32_t n, int8_t *q, float *scale, int32_t *sum);

    /* ---- F32 linear layers (unquantized models) ---- */

    /* y[t * y_stride + r] = dot of row r with x_t in virtual lanes; w is F32 rows. */
    void (*matmul_f32)(const float *w, uint32_t n_rows, uint32_t n_cols, const float *x,
                       size_t x_stride, uint32_t n_tokens, float *y, size_t y_stride);
    /* Any type of tensor_type_is_readable to F32, as its definition has it: exact for F32, F16,
     * BF16 and Q8_0, rounded products and sums for the others (format/dequantize.c). */
    void (*row_to_f32)(uint32_t type, const uint8_t *src, uint32_t n, float *dst);

    /* ---- the rest of the layer ---- */

    /* y = x * (1 / sqrt(mean(x^2) + eps)) * gain */
    void (*rmsnorm)(const float *x, const float *gain, uint32_t n, float eps, float *y);
    /* Rotates the n_rot / 2 pairs (x[2i], x[2i+1]) if interleaved, else (x[i], x[i + n_rot/2]),
     * of one head by the angle whose cos and sin are given per pair. */
    void (*rope)(float *x, uint32_t n_rot, bool interleaved, const float *cosine,
                 const float *sine);
    /* gate[i] = silu(gate[i]) * up[i] */
    void (*swiglu)(float *gate, const float *up, uint32_t n);
    void (*add)(float *x, const float *y, uint32_t n); /* x += y */
    /* Up to KERNELS_MAX_QUERIES queries of one KV head: see docs/NUMERICS.md, attention.
     * scratch: KERNELS_ATTENTION_SCRATCH_BYTES(head_dim). */
    void (*attention)(const kv_cache *cache, uint32_t head_dim, const attention_query *queries,
                      uint32_t n_queries, float scale, float *scratch);

    /* Orthonormal rotation of x (n) in place, padded with zeros to n_padded; and its inverse,
     * which reads and writes n. scratch: n floats. */
    void (*rotate)(const rotation *r, float *x, float *scratch);
    void (*rotate_inverse)(const rotation *r, float *x, float *scratch);
} kernels;

/* Row `row` of a tensor of any type of tensor_type_is_readable, as F32: (ne[0]). */
struct tensor;
void kernels_tensor_row(const kernels *k, const struct tensor *t, uint64_t row, float *dst);

/* k->matmul_f32() of many vectors, so few at a time that they stay in a cache for all rows. */
void kernels_matmul_tiled(const kernels *k, const float *w, uint32_t n_rows, uint32_t n_cols,
                          const float *x, size_t x_stride, uint32_t n_tokens, float *y,
                          size_t y_stride);

extern const kernels kernels_ref;
#if defined(__x86_64__)
extern const kernels kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_amx;
#elif defined(__aarch64__)
extern const kernels kernels_neon, kernels_neon_dotprod, kernels_neon_i8mm;
#endif

/* Stores the key and the value of a position. scratch: KV_ROW(head_dim) bytes. */
void kv_store(const kernels *k, const kv_cache *cache, uint32_t head_dim, size_t position,
              const float *key, const float *value, int8_t *scratch);

/* Table i of this build, from plain to best, and whether this CPU runs it; NULL past the last. */
const kernels *kernels_get(size_t i, bool *supported);

/* Both tables, which this CPU must support, give the same bits of a few small products. */
bool kernels_agree(const kernels *a, const kernels *b);

/* The best table this CPU supports; HEPTA_KERNELS=name forces one. Fails, saying why, when the
 * name is unknown or the CPU lacks it. */
hepta_status kernels_select(const kernels **out, hepta_error *err);

#endif
