/*
 * float_kernels.h - the float kernels over 16 lanes, written once for every instruction set.
 *
 * A file such as avx2.c defines KERNEL(name) and the vocabulary below, then includes this one.
 * The order of operations is that of kernels/ref.c (docs/NUMERICS.md); a vector holds what the
 * definition calls the 16 lanes, or 16 items that do not depend on each other.
 *
 *     f32x16          16 floats; u32x16 their bits
 *     v_load, v_store, v_load_n(p, n), v_store_n(p, n, x): n < 16 items, zeros beyond
 *     v_load_half, v_load_half_n: from binary16
 *     v_set1, v_zero, v_add, v_sub, v_mul, v_div, v_max(a, b) = a > b ? a : b, v_min
 *     v_sum           the tree of docs/NUMERICS.md
 *     v_sum16(x)      the same for 16 vectors: lane i of the result is v_sum(x[i])
 *     v_bits, v_float, u_set1, u_add, u_sub, u_and, u_max (signed), u_shift_left, u_shift_right
 *     v_swap1, v_swap2, v_swap4, v_swap8: lane l from lane l ^ 1, 2, 4, 8
 *     v_negate(x); v_flip1, v_flip2, v_flip4, v_flip8: the same in lanes that have this bit set
 *     FLOAT_BLOCK     this many rows times as many tokens have their sums in registers
 *     v_narrow(p, n, u): the low bytes of n <= 16 lanes of u to memory
 *     v_from_int      the lanes of a u32x16 as int32 to binary32, to nearest even
 *     i_dot4(sum, bytes, four): lane l of sum plus the products of the signed bytes 4l .. 4l + 3 of
 *                     64 with four signed ones, added up; i_dot4_start(total): where such sums
 *                     start whose fours add up to `total`; i_dot4_small: for fours of 0..127
 *     Q8_QUERIES      for this many queries the sums of 64 scores are in registers
 */
#ifndef KERNELS_FLOAT_KERNELS_H
#define KERNELS_FLOAT_KERNELS_H

#include <assert.h>
#include <math.h>

#ifndef Q8_QUERIES /* no integer dot products in this vocabulary: plain loops */
#define Q8_QUERIES 1
static inline u32x16 i_dot4_start(int32_t total) {
    (void)total;
    return u_set1(0);
}
static inline u32x16 i_dot4(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    int32_t lanes[16];
    memcpy(lanes, &sum, sizeof lanes);
    for (int l = 0; l < 16; l++) {
        for (int b = 0; b < 4; b++) {
            lanes[l] += bytes[4 * l + b] * four[b];
        }
    }
    memcpy(&sum, lanes, sizeof lanes);
    return sum;
}
static inline u32x16 i_dot4_small(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    return i_dot4(sum, bytes, four);
}
static inline f32x16 v_from_int(u32x16 x) {
    int32_t lanes[16];
    float each[16];
    memcpy(lanes, &x, sizeof lanes);
    for (int l = 0; l < 16; l++) {
        each[l] = (float)lanes[l];
    }
    return v_load(each);
}
#endif

/* ---- Reductions -------------------------------------------------------- */

static inline f32x16 dot_lanes(const float *a, const float *b, size_t n) {
    f32x16 lanes = v_zero();
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        lanes = v_add(lanes, v_mul(v_load(a + i), v_load(b + i)));
    }
    if (i < n) {
        uint32_t rest = (uint32_t)(n - i);
        lanes = v_add(lanes, v_mul(v_load_n(a + i, rest), v_load_n(b + i, rest)));
    }
    return lanes;
}

/* ---- F32 matrices ------------------------------------------------------ */

/* Adds the products of columns [i, i + 16) to R * T sums. */
#define MATMUL_ADD(R, T, LOAD)                                                                     \
    do {                                                                                           \
        f32x16 b[T];                                                                               \
        for (int t = 0; t < T; t++) {                                                              \
            b[t] = LOAD(x + (size_t)t * x_stride + i);                                             \
        }                                                                                          \
        for (int r = 0; r < R; r++) {                                                              \
            const f32x16 a = LOAD(w + (size_t)r * n + i);                                          \
            for (int t = 0; t < T; t++) {                                                          \
                sum[r][t] = v_add(sum[r][t], v_mul(a, b[t]));                                      \
            }                                                                                      \
        }                                                                                          \
    } while (0)
#define MATMUL_LOAD_REST(p) v_load_n(p, n - i)

/* R rows times T tokens, R * T sums in registers. */
#define MATMUL_BLOCK(NAME, R, T)                                                                   \
    static inline void matmul_##NAME(const float *w, uint32_t n, const float *x, size_t x_stride,  \
                                     float *y, size_t y_stride) {                                  \
        f32x16 sum[R][T];                                                                          \
        uint32_t i = 0;                                                                            \
        for (int r = 0; r < R; r++) {                                                              \
            for (int t = 0; t < T; t++) {                                                          \
                sum[r][t] = v_zero();                                                              \
            }                                                                                      \
        }                                                                                          \
        for (; n - i >= 16; i += 16) {                                                             \
            MATMUL_ADD(R, T, v_load);                                                              \
        }                                                                                          \
        if (i < n) {                                                                               \
            MATMUL_ADD(R, T, MATMUL_LOAD_REST);                                                    \
        }                                                                                          \
        for (int r = 0; r < R; r++) {                                                              \
            for (int t = 0; t < T; t++) {                                                          \
                y[(size_t)t * y_stride + (size_t)r] = v_sum(sum[r][t]);                            \
            }                                                                                      \
        }                                                                                          \
    }

MATMUL_BLOCK(many_many, FLOAT_BLOCK, FLOAT_BLOCK)
MATMUL_BLOCK(many_one, FLOAT_BLOCK, 1)
MATMUL_BLOCK(one_many, 1, FLOAT_BLOCK)
MATMUL_BLOCK(one_one, 1, 1)

static void KERNEL(matmul_f32)(const float *w, uint32_t n_rows, uint32_t n_cols, const float *x,
                               size_t x_stride, uint32_t n_tokens, float *y, size_t y_stride) {
    const uint32_t n = n_cols;
    uint32_t r = 0;
    for (; n_rows - r >= FLOAT_BLOCK; r += FLOAT_BLOCK) {
        const float *rows = w + (size_t)r * n;
        uint32_t t = 0;
        for (; n_tokens - t >= FLOAT_BLOCK; t += FLOAT_BLOCK) {
            matmul_many_many(rows, n, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
        }
        for (; t < n_tokens; t++) {
            matmul_many_one(rows, n, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
        }
    }
    for (; r < n_rows; r++) {
        const float *rows = w + (size_t)r * n;
        uint32_t t = 0;
        for (; n_tokens - t >= FLOAT_BLOCK; t += FLOAT_BLOCK) {
            matmul_one_many(rows, n, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
        }
        for (; t < n_tokens; t++) {
            matmul_one_one(rows, n, x + t * x_stride, x_stride, y + t * y_stride + r, y_stride);
        }
    }
}

static void KERNEL(row_to_f32)(uint32_t type, const uint8_t *src, uint32_t n, float *dst) {
    if (type != TENSOR_F16) {
        kernels_ref.row_to_f32(type, src, n, dst); /* copies, shifts, small products */
        return;
    }
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v_store(dst + i, v_load_half(src + (size_t)2 * i));
    }
    if (i < n) {
        v_store_n(dst + i, n - i, v_load_half_n(src + (size_t)2 * i, n - i));
    }
}

/* ---- Activations of packed matrices ------------------------------------ */

/* The largest lane, as signed numbers. */
static inline uint32_t max_lane(u32x16 x) {
    uint32_t max;
    x = u_max(x, v_bits(v_swap8(v_float(x))));
    x = u_max(x, v_bits(v_swap4(v_float(x))));
    x = u_max(x, v_bits(v_swap2(v_float(x))));
    x = u_max(x, v_bits(v_swap1(v_float(x))));
    memcpy(&max, &x, sizeof max);
    return max;
}

static void KERNEL(quantize_activation)(const float *x, uint32_t n, int8_t *q, float *scale,
                                        int32_t *sum) {
    const u32x16 magnitude = u_set1(0x7fffffffu);
    u32x16 max = u_set1(0);
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        max = u_max(max, u_and(v_bits(v_load(x + i)), magnitude));
    }
    if (i < n) {
        max = u_max(max, u_and(v_bits(v_load_n(x + i, n - i)), magnitude));
    }
    float amax = math_from_bits_f32(max_lane(max));
    if (!(amax >= KERNELS_TINY && amax <= FLT_MAX)) {
        memset(q, 0, n);
        *sum = 0;
        *scale = amax < KERNELS_TINY ? 0.0f : math_from_bits_f32(MATH_NAN_BITS);
        return;
    }
    const f32x16 inverse = v_set1(127.0f / amax), round = v_set1(MATH_ROUND_F32);
    u32x16 total = u_set1(0);
    for (i = 0; i < n; i += 16) {
        uint32_t count = n - i < 16 ? n - i : 16;
        f32x16 items = count == 16 ? v_load(x + i) : v_load_n(x + i, count);
        u32x16 v = u_sub(v_bits(v_add(v_mul(items, inverse), round)), v_bits(round));
        v_narrow(q + i, count, v);
        total = u_add(total, v); /* lanes past the end hold 0 */
    }
    uint32_t lanes[16], all = 0;
    memcpy(lanes, &total, sizeof lanes);
    for (int l = 0; l < 16; l++) {
        all += lanes[l];
    }
    *scale = amax / 127.0f;
    *sum = (int32_t)all;
}

/* ---- Elementwise ------------------------------------------------------- */

static inline f32x16 v_exp(f32x16 x) {
    const f32x16 round = v_set1(MATH_ROUND_F32);
    x = v_max(v_set1(MATH_EXP_MIN), x);
    x = v_min(v_set1(MATH_EXP_MAX), x);
    f32x16 z = v_add(v_mul(x, v_set1(MATH_EXP_LOG2E)), round);
    f32x16 k = v_sub(z, round);
    f32x16 r =
        v_sub(v_sub(x, v_mul(k, v_set1(MATH_EXP_LN2_HI))), v_mul(k, v_set1(MATH_EXP_LN2_LO)));
    f32x16 p = v_add(v_mul(v_set1(MATH_EXP_C6), r), v_set1(MATH_EXP_C5));
    p = v_add(v_mul(p, r), v_set1(MATH_EXP_C4));
    p = v_add(v_mul(p, r), v_set1(MATH_EXP_C3));
    p = v_add(v_mul(p, r), v_set1(MATH_EXP_C2));
    p = v_add(v_add(v_mul(p, v_mul(r, r)), r), v_set1(1.0f));
    u32x16 biased = u_add(u_sub(v_bits(z), v_bits(round)), u_set1(256));
    u32x16 half = u_shift_right(biased, 1), one = u_set1(1);
    u32x16 s1 = u_shift_left(u_sub(u_sub(biased, half), one), 23);
    u32x16 s2 = u_shift_left(u_sub(half, one), 23);
    return v_mul(v_mul(p, v_float(s1)), v_float(s2));
}

static void KERNEL(rmsnorm)(const float *x, const float *gain, uint32_t n, float eps, float *y) {
    float mean = v_sum(dot_lanes(x, x, n)) / (float)n;
    const f32x16 r = v_set1(1.0f / sqrtf(mean + eps));
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v_store(y + i, v_mul(v_mul(v_load(x + i), r), v_load(gain + i)));
    }
    if (i < n) {
        f32x16 last = v_mul(v_mul(v_load_n(x + i, n - i), r), v_load_n(gain + i, n - i));
        v_store_n(y + i, n - i, last);
    }
}

static inline f32x16 swiglu_lanes(f32x16 g, f32x16 u) {
    f32x16 denominator = v_add(v_set1(1.0f), v_exp(v_negate(g)));
    return v_mul(v_div(g, denominator), u);
}

static void KERNEL(swiglu)(float *gate, const float *up, uint32_t n) {
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v_store(gate + i, swiglu_lanes(v_load(gate + i), v_load(up + i)));
    }
    if (i < n) {
        f32x16 last = swiglu_lanes(v_load_n(gate + i, n - i), v_load_n(up + i, n - i));
        v_store_n(gate + i, n - i, last);
    }
}

static void KERNEL(add)(float *x, const float *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        x[i] += y[i];
    }
}

static void KERNEL(rope)(float *x, uint32_t n_rot, bool interleaved, const float *cosine,
                         const float *sine) {
    kernels_ref.rope(x, n_rot, interleaved, cosine, sine);
}

static void KERNEL(unpack_row)(const packed_matrix *w, uint32_t row, float *y, uint8_t *scratch) {
    kernels_ref.unpack_row(w, row, y, scratch);
}

/* ---- Attention --------------------------------------------------------- */

/* 16 items of a cache row from d on; n < 16 items unless `whole`. */
static ALWAYS_INLINE f32x16 load_cache(const uint8_t *row, size_t d, bool f16, bool whole,
                                       uint32_t n) {
    if (f16) {
        const uint8_t *p = row + 2 * d;
        return whole ? v_load_half(p) : v_load_half_n(p, n);
    }
    const float *p = (const float *)(const void *)row + d;
    return whole ? v_load(p) : v_load_n(p, n);
}

/* The lanes of q . k for four neighbouring positions, 4 or 1 of which are wanted. */
static ALWAYS_INLINE void attention_lanes(const float *q, const uint8_t *k, size_t row_bytes,
                                          bool f16, uint32_t head_dim, int positions,
                                          f32x16 *lanes) {
    for (int j = 0; j < positions; j++) {
        lanes[j] = v_zero();
    }
    uint32_t d = 0;
    for (; d + 16 <= head_dim; d += 16) {
        const f32x16 a = v_load(q + d);
        for (int j = 0; j < positions; j++) {
            f32x16 b = load_cache(k + (size_t)j * row_bytes, d, f16, true, 16);
            lanes[j] = v_add(lanes[j], v_mul(a, b));
        }
    }
    if (d < head_dim) {
        const uint32_t n = head_dim - d;
        const f32x16 a = v_load_n(q + d, n);
        for (int j = 0; j < positions; j++) {
            f32x16 b = load_cache(k + (size_t)j * row_bytes, d, f16, false, n);
            lanes[j] = v_add(lanes[j], v_mul(a, b));
        }
    }
}

/* score[j] = (q . k_j) * scale */
static ALWAYS_INLINE void attention_scores(const float *q, const uint8_t *k, size_t row_bytes,
                                           bool f16, uint32_t n_pos, uint32_t head_dim, float scale,
                                           float *score) {
    uint32_t j = 0;
    for (; j + 16 <= n_pos; j += 16) {
        f32x16 lanes[16];
        for (int i = 0; i < 16; i += 4) {
            attention_lanes(q, k + (j + (size_t)i) * row_bytes, row_bytes, f16, head_dim, 4,
                            lanes + i);
        }
        v_store(score + j, v_mul(v_sum16(lanes), v_set1(scale)));
    }
    if (j < n_pos) {
        f32x16 lanes[16];
        for (uint32_t i = 0; i < 16; i++) {
            lanes[i] = v_zero();
            if (i < n_pos - j) {
                attention_lanes(q, k + (j + i) * row_bytes, row_bytes, f16, head_dim, 1, lanes + i);
            }
        }
        v_store_n(score + j, n_pos - j, v_mul(v_sum16(lanes), v_set1(scale)));
    }
}

/* out[d ..] = sum_j p_j v_jd, j in order, for four vectors or one, the latter of n <= 16 items. */
static ALWAYS_INLINE void attention_values4(const float *p, const uint8_t *v, size_t row_bytes,
                                            bool f16, uint32_t n_pos, uint32_t d, float *out) {
    f32x16 sum0 = v_zero(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (uint32_t j = 0; j < n_pos; j++, v += row_bytes) {
        const f32x16 weight = v_set1(p[j]);
        sum0 = v_add(sum0, v_mul(weight, load_cache(v, d, f16, true, 16)));
        sum1 = v_add(sum1, v_mul(weight, load_cache(v, d + 16, f16, true, 16)));
        sum2 = v_add(sum2, v_mul(weight, load_cache(v, d + 32, f16, true, 16)));
        sum3 = v_add(sum3, v_mul(weight, load_cache(v, d + 48, f16, true, 16)));
    }
    v_store(out + d, sum0);
    v_store(out + d + 16, sum1);
    v_store(out + d + 32, sum2);
    v_store(out + d + 48, sum3);
}

static ALWAYS_INLINE void attention_values1(const float *p, const uint8_t *v, size_t row_bytes,
                                            bool f16, uint32_t n_pos, uint32_t d, uint32_t n,
                                            float *out) {
    f32x16 sum = v_zero();
    for (uint32_t j = 0; j < n_pos; j++, v += row_bytes) {
        sum = v_add(sum, v_mul(v_set1(p[j]), load_cache(v, d, f16, n >= 16, n)));
    }
    if (n >= 16) {
        v_store(out + d, sum);
    } else {
        v_store_n(out + d, n, sum);
    }
}

/* p = exp(score - max) in place, and the sum, of a block */
static inline void attention_softmax(float *score, uint32_t n, float *max, float *sum) {
    float block_max = -INFINITY;
    uint32_t j = 0;
    if (n >= 16) {
        f32x16 highest = v_set1(-INFINITY);
        for (; j + 16 <= n; j += 16) {
            highest = v_max(v_load(score + j), highest); /* NaN is passed over, as below */
        }
        highest = v_max(highest, v_swap8(highest));
        highest = v_max(highest, v_swap4(highest));
        highest = v_max(highest, v_swap2(highest));
        highest = v_max(highest, v_swap1(highest));
        memcpy(&block_max, &highest, sizeof block_max);
    }
    for (; j < n; j++) {
        block_max = score[j] > block_max ? score[j] : block_max;
    }
    const f32x16 shift = v_set1(block_max);
    f32x16 lanes = v_zero();
    j = 0;
    for (; j + 16 <= n; j += 16) {
        f32x16 p = v_exp(v_sub(v_load(score + j), shift));
        lanes = v_add(lanes, p);
        v_store(score + j, p);
    }
    if (j < n) {
        /* Lanes past the end must add nothing: they pass through memory that is cut there. */
        v_store_n(score + j, n - j, v_exp(v_sub(v_load_n(score + j, n - j), shift)));
        lanes = v_add(lanes, v_load_n(score + j, n - j));
    }
    *max = block_max;
    *sum = v_sum(lanes);
}

static ALWAYS_INLINE void attention_block(const float *q, const uint8_t *k, const uint8_t *v,
                                          size_t row_bytes, bool f16, uint32_t n, uint32_t head_dim,
                                          float scale, float *max, float *sum, float *out,
                                          float *score) {
    attention_scores(q, k, row_bytes, f16, n, head_dim, scale, score);
    attention_softmax(score, n, max, sum);
    uint32_t d = 0;
    for (; head_dim - d >= 64; d += 64) {
        attention_values4(score, v, row_bytes, f16, n, d, out);
    }
    for (; d < head_dim; d += 16) {
        attention_values1(score, v, row_bytes, f16, n, d, head_dim - d, out);
    }
}

/* Joins a block to those before it. */
static inline void join_block(float block_max, float block_sum, const float *block_out,
                              uint32_t head_dim, float *max, float *sum, float *out) {
    float new_max = block_max > *max ? block_max : *max;
    float keep = math_exp_f32(*max - new_max), join = math_exp_f32(block_max - new_max);
    *max = new_max;
    *sum = *sum * keep + block_sum * join;
    for (uint32_t d = 0; d < head_dim; d++) {
        out[d] = out[d] * keep + block_out[d] * join;
    }
}

static inline void finish_queries(const attention_query *queries, uint32_t n_queries,
                                  uint32_t head_dim, const float *sum) {
    for (uint32_t i = 0; i < n_queries; i++) {
        const float inverse = 1.0f / sum[i];
        for (uint32_t d = 0; d < head_dim; d++) {
            queries[i].out[d] *= inverse;
        }
    }
}

/* All queries pass over a block of the cache before the next one, which stays in near caches. */
static ALWAYS_INLINE void attention_any(const kv_cache *cache, size_t row_bytes, bool f16,
                                        uint32_t head_dim, const attention_query *queries,
                                        uint32_t n_queries, float scale, float *scratch) {
    float *block_out = scratch, *score = scratch + head_dim;
    float max[KERNELS_MAX_QUERIES], sum[KERNELS_MAX_QUERIES];
    uint32_t n_pos = 0;
    for (uint32_t i = 0; i < n_queries; i++) {
        n_pos = queries[i].n_pos > n_pos ? queries[i].n_pos : n_pos;
    }
    for (uint32_t begin = 0; begin < n_pos; begin += KERNELS_ATTENTION_BLOCK) {
        const uint8_t *k = (const uint8_t *)cache->k + begin * row_bytes;
        const uint8_t *v = (const uint8_t *)cache->v + begin * row_bytes;
        for (uint32_t i = 0; i < n_queries; i++) {
            const attention_query *query = &queries[i];
            if (begin >= query->n_pos) {
                continue;
            }
            uint32_t n = query->n_pos - begin;
            n = n < KERNELS_ATTENTION_BLOCK ? n : KERNELS_ATTENTION_BLOCK;
            if (begin == 0) {
                attention_block(query->q, k, v, row_bytes, f16, n, head_dim, scale, &max[i],
                                &sum[i], query->out, score);
                continue;
            }
            float block_max, block_sum;
            attention_block(query->q, k, v, row_bytes, f16, n, head_dim, scale, &block_max,
                            &block_sum, block_out, score);
            join_block(block_max, block_sum, block_out, head_dim, &max[i], &sum[i], query->out);
        }
    }
    finish_queries(queries, n_queries, head_dim, sum);
}

/* ---- Attention with a Q8 cache ------------------------------------------ */

/* A query in integers. */
typedef struct q8_query {
    const int8_t *q; /* (row) */
    int32_t sum;
    float scale; /* of q, times that of scores */
} q8_query;

/* score[i][j] of `n_queries` <= Q8_QUERIES queries and `n_tiles` <= 4 tiles of 16 positions. */
static inline void q8_scores(const q8_query *queries, int n_queries, const int8_t *k, size_t row,
                             const float *k_scale, int n_tiles,
                             float score[][KERNELS_ATTENTION_BLOCK]) {
    u32x16 sum[Q8_QUERIES][4];
    for (int i = 0; i < n_queries; i++) {
        for (int t = 0; t < n_tiles; t++) {
            sum[i][t] = i_dot4_start(queries[i].sum);
        }
    }
    for (size_t d = 0; d < row; d += 4) {
        for (int t = 0; t < n_tiles; t++) {
            for (int i = 0; i < n_queries; i++) {
                sum[i][t] = i_dot4(sum[i][t], k + (size_t)t * 16 * row + 16 * d, queries[i].q + d);
            }
        }
    }
    for (int i = 0; i < n_queries; i++) {
        for (int t = 0; t < n_tiles; t++) {
            f32x16 x = v_mul(v_from_int(sum[i][t]), v_load(k_scale + 16 * t));
            v_store(score[i] + 16 * t, v_mul(x, v_set1(queries[i].scale)));
        }
    }
}

/* Scores of a block of n positions; those of the last tile past n are meaningless. */
static inline void q8_block_scores(const q8_query *queries, int n_queries, const int8_t *k,
                                   size_t row, const float *k_scale, uint32_t n,
                                   float score[][KERNELS_ATTENTION_BLOCK]) {
    if (n > 48) {
        q8_scores(queries, n_queries, k, row, k_scale, 4, score);
        return;
    }
    for (uint32_t j = 0; j < n; j += 16) {
        float tile[Q8_QUERIES][KERNELS_ATTENTION_BLOCK];
        q8_scores(queries, n_queries, k + j * row, row, k_scale + j, 1, tile);
        for (int i = 0; i < n_queries; i++) {
            memcpy(score[i] + j, tile[i], 16 * sizeof(float));
        }
    }
}

/* The weights of values in integers, in halves of 7 bits; returns their unit, or 0 or NaN if the
 * block's values are that. */
static inline float q8_weights(const float *p, const float *v_scale, uint32_t n, int8_t *high,
                               int8_t *low) {
    f32x16 weight[4];
    u32x16 max = u_set1(0);
    for (uint32_t j = 0; j < n; j += 16) {
        const uint32_t count = n - j;
        f32x16 w = count >= 16 ? v_mul(v_load(p + j), v_load(v_scale + j))
                               : v_mul(v_load_n(p + j, count), v_load_n(v_scale + j, count));
        max = u_max(max, u_and(v_bits(w), u_set1(0x7fffffffu)));
        weight[j / 16] = w;
    }
    const float largest = math_from_bits_f32(max_lane(max));
    if (!(largest >= KERNELS_TINY && largest <= FLT_MAX)) {
        return largest < KERNELS_TINY ? 0.0f : math_from_bits_f32(MATH_NAN_BITS);
    }
    const f32x16 inverse = v_set1(KERNELS_WEIGHT_MAX / largest), round = v_set1(MATH_ROUND_F32);
    for (uint32_t j = 0; j < n; j += 16) {
        u32x16 u = u_sub(v_bits(v_add(v_mul(weight[j / 16], inverse), round)), v_bits(round));
        v_narrow(high + j, 16, u_shift_right(u, 7));
        v_narrow(low + j, 16, u_and(u, u_set1(127)));
    }
    return largest / KERNELS_WEIGHT_MAX;
}

/* out[d ..] for n_vectors <= 4 vectors, of which the last may have `rest` < 16 items. */
static inline void q8_values(const int8_t *high, const int8_t *low, float unit, const int8_t *v,
                             size_t row, uint32_t n, int n_vectors, uint32_t rest, float *out) {
    u32x16 sum_high[4], sum_low[4];
    for (int i = 0; i < n_vectors; i++) {
        sum_high[i] = sum_low[i] = u_set1(0);
    }
    for (uint32_t j = 0; j < n; j += 4) {
        for (int i = 0; i < n_vectors; i++) {
            const int8_t *bytes = v + j * row + (size_t)64 * (size_t)i;
            sum_high[i] = i_dot4_small(sum_high[i], bytes, high + j);
            sum_low[i] = i_dot4_small(sum_low[i], bytes, low + j);
        }
    }
    for (int i = 0; i < n_vectors; i++) {
        u32x16 sum = u_add(u_shift_left(sum_high[i], 7), sum_low[i]);
        f32x16 x = v_mul(v_from_int(sum), v_set1(unit));
        if (rest == 0 || i + 1 < n_vectors) {
            v_store(out + 16 * i, x);
        } else {
            v_store_n(out + 16 * i, rest, x);
        }
    }
}

static inline void q8_block_values(const float *p, const float *v_scale, const int8_t *v,
                                   uint32_t n, uint32_t head_dim, float *out) {
    int8_t high[KERNELS_ATTENTION_BLOCK], low[KERNELS_ATTENTION_BLOCK];
    const size_t row = KV_ROW(head_dim);
    const float unit = q8_weights(p, v_scale, n, high, low);
    if (!(unit > 0.0f)) {
        for (uint32_t d = 0; d < head_dim; d++) {
            out[d] = unit;
        }
        return;
    }
    uint32_t d = 0;
    for (; head_dim - d >= 64; d += 64) {
        q8_values(high, low, unit, v + 4 * d, row, n, 4, 0, out + d);
    }
    for (; d < head_dim; d += 16) {
        uint32_t rest = head_dim - d < 16 ? head_dim - d : 0;
        q8_values(high, low, unit, v + 4 * d, row, n, 1, rest, out + d);
    }
}

static void attention_q8(const kv_cache *cache, uint32_t head_dim, const attention_query *queries,
                         uint32_t n_queries, float scale, float *scratch) {
    const size_t row = KV_ROW(head_dim);
    float *block_out = scratch;
    float(*score)[KERNELS_ATTENTION_BLOCK] =
        (float(*)[KERNELS_ATTENTION_BLOCK])(void *)(scratch + head_dim);
    int8_t *q8 = (int8_t *)(scratch + 4 * KERNELS_ATTENTION_BLOCK + 2 * (size_t)head_dim);
    q8_query integers[KERNELS_MAX_QUERIES];
    float max[KERNELS_MAX_QUERIES], sum[KERNELS_MAX_QUERIES];
    uint32_t n_pos = 0;
    for (uint32_t i = 0; i < n_queries; i++, q8 += row) {
        n_pos = queries[i].n_pos > n_pos ? queries[i].n_pos : n_pos;
        memset(q8 + head_dim, 0, row - head_dim);
        integers[i].q = q8;
        KERNEL(quantize_activation)
        (queries[i].q, head_dim, q8, &integers[i].scale, &integers[i].sum);
        integers[i].scale *= scale;
    }
    for (uint32_t begin = 0; begin < n_pos; begin += KERNELS_ATTENTION_BLOCK) {
        const int8_t *k = (const int8_t *)cache->k + begin * row;
        const int8_t *v = (const int8_t *)cache->v + begin * row;
        const uint32_t here =
            n_pos - begin < KERNELS_ATTENTION_BLOCK ? n_pos - begin : KERNELS_ATTENTION_BLOCK;
        for (uint32_t i = 0; i < n_queries;) {
            const uint32_t together = n_queries - i >= Q8_QUERIES ? Q8_QUERIES : 1;
            if (together == 1) {
                q8_block_scores(integers + i, 1, k, row, cache->k_scale + begin, here, score);
            } else {
                q8_block_scores(integers + i, Q8_QUERIES, k, row, cache->k_scale + begin, here,
                                score);
            }
            for (uint32_t a = 0; a < together; a++, i++) {
                if (begin >= queries[i].n_pos) {
                    continue;
                }
                const uint32_t left = queries[i].n_pos - begin, n = left < here ? left : here;
                float block_max, block_sum;
                float *out = begin == 0 ? queries[i].out : block_out;
                attention_softmax(score[a], n, &block_max, &block_sum);
                q8_block_values(score[a], cache->v_scale + begin, v, n, head_dim, out);
                if (begin == 0) {
                    max[i] = block_max, sum[i] = block_sum;
                } else {
                    join_block(block_max, block_sum, block_out, head_dim, &max[i], &sum[i],
                               queries[i].out);
                }
            }
        }
    }
    finish_queries(queries, n_queries, head_dim, sum);
}

static void KERNEL(attention)(const kv_cache *cache, uint32_t head_dim,
                              const attention_query *queries, uint32_t n_queries, float scale,
                              float *scratch) {
    assert(n_queries <= KERNELS_MAX_QUERIES);
    const size_t n = head_dim;
    switch (cache->type) {
    case HEPTA_CACHE_F32:
        attention_any(cache, 4 * n, false, head_dim, queries, n_queries, scale, scratch);
        break;
    case HEPTA_CACHE_F16:
        attention_any(cache, 2 * n, true, head_dim, queries, n_queries, scale, scratch);
        break;
    default:
        attention_q8(cache, head_dim, queries, n_queries, scale, scratch);
    }
}

/* ---- Rotation ---------------------------------------------------------- */

/* The butterflies of distance 1, 2, 4, 8 that lie within a vector: (a, b) -> (a + b, a - b). */
static inline f32x16 hadamard_lanes(f32x16 x, uint32_t pow2) {
    if (pow2 > 1) {
        x = v_add(v_swap1(x), v_flip1(x));
    }
    if (pow2 > 2) {
        x = v_add(v_swap2(x), v_flip2(x));
    }
    if (pow2 > 4) {
        x = v_add(v_swap4(x), v_flip4(x));
    }
    if (pow2 > 8) {
        x = v_add(v_swap8(x), v_flip8(x));
    }
    return x;
}

static inline void butterfly(float *x, uint32_t h) {
    f32x16 a = v_load(x), b = v_load(x + h);
    v_store(x, v_add(a, b));
    v_store(x + h, v_sub(a, b));
}

/* Two steps of the transform at once: distances h and 2h. */
static inline void butterfly_twice(float *x, uint32_t h) {
    f32x16 a = v_load(x), b = v_load(x + h), c = v_load(x + 2 * h), d = v_load(x + 3 * h);
    f32x16 e = v_add(a, b), f = v_sub(a, b), g = v_add(c, d), k = v_sub(c, d);
    v_store(x, v_add(e, g));
    v_store(x + h, v_add(f, k));
    v_store(x + 2 * h, v_sub(e, g));
    v_store(x + 3 * h, v_sub(f, k));
}

static void hadamard(const rotation *r, float *x) {
    uint32_t i = 0;
    for (; i + 16 <= r->n; i += 16) {
        v_store(x + i, hadamard_lanes(v_load(x + i), r->pow2));
    }
    if (i < r->n) {
        v_store_n(x + i, r->n - i, hadamard_lanes(v_load_n(x + i, r->n - i), r->pow2));
    }
    uint32_t h = 16;
    for (; 4 * h <= r->pow2; h *= 4) {
        for (i = 0; i < r->n; i += 4 * h) {
            for (uint32_t j = i; j < i + h; j += 16) {
                butterfly_twice(x + j, h);
            }
        }
    }
    if (h < r->pow2) {
        for (i = 0; i < r->n; i += 2 * h) {
            for (uint32_t j = i; j < i + h; j += 16) {
                butterfly(x + j, h);
            }
        }
    }
}

/* Outputs c .. c + rows - 1 of the Hartley step, 16 columns from b on. */
static inline void hartley_block(const rotation *r, const float *x, uint32_t c, uint32_t b,
                                 int rows, float *out) {
    f32x16 sum[8];
    for (int i = 0; i < rows; i++) {
        sum[i] = v_zero();
    }
    for (uint32_t a = 0; a < r->m; a++) {
        const float *h = r->hartley + (size_t)a * r->m + c;
        f32x16 in = v_load(x + (size_t)a * r->pow2 + b);
        for (int i = 0; i < rows; i++) {
            sum[i] = v_add(sum[i], v_mul(v_set1(h[i]), in));
        }
    }
    for (int i = 0; i < rows; i++) {
        v_store(out + (size_t)(c + (uint32_t)i) * r->pow2 + b, sum[i]);
    }
}

static void hartley(const rotation *r, const float *x, float *out) {
    for (uint32_t b = 0; b < r->pow2; b += 16) {
        uint32_t c = 0;
        for (; r->m - c >= 8; c += 8) {
            hartley_block(r, x, c, b, 8, out);
        }
        for (; r->m - c >= 2; c += 2) {
            hartley_block(r, x, c, b, 2, out);
        }
        hartley_block(r, x, c, b, 1, out); /* m is odd */
    }
}

static void rotate_core(const rotation *r, float *x, float *scratch) {
    hadamard(r, x);
    for (uint32_t i = 0; i < r->n; i++) {
        x[i] *= r->hadamard_scale;
    }
    if (r->m == 1) {
        return;
    }
    if (r->pow2 >= 16) {
        hartley(r, x, scratch);
    } else { /* odd widths of small models */
        memset(scratch, 0, r->n * sizeof *scratch);
        for (uint32_t a = 0; a < r->m; a++) {
            const float *in = x + (size_t)a * r->pow2, *h = r->hartley + (size_t)a * r->m;
            for (uint32_t c = 0; c < r->m; c++) {
                for (uint32_t b = 0; b < r->pow2; b++) {
                    scratch[(size_t)c * r->pow2 + b] += h[c] * in[b];
                }
            }
        }
    }
    memcpy(x, scratch, r->n * sizeof *x);
}

static void KERNEL(rotate)(const rotation *r, float *x, float *scratch) {
    for (uint32_t i = 0; i < r->n; i++) {
        x[i] *= r->signs[i];
    }
    rotate_core(r, x, scratch);
    for (uint32_t i = r->n; i < r->n_padded; i++) {
        x[i] = 0.0f;
    }
}

static void KERNEL(rotate_inverse)(const rotation *r, float *x, float *scratch) {
    rotate_core(r, x, scratch);
    for (uint32_t i = 0; i < r->n; i++) {
        x[i] *= r->signs[i];
    }
}

/* What this text gives a table of kernels. */
#define FLOAT_KERNELS                                                                              \
    .unpack_row = KERNEL(unpack_row), .quantize_activation = KERNEL(quantize_activation),          \
    .matmul_f32 = KERNEL(matmul_f32), .row_to_f32 = KERNEL(row_to_f32),                            \
    .rmsnorm = KERNEL(rmsnorm), .rope = KERNEL(rope), .swiglu = KERNEL(swiglu),                    \
    .add = KERNEL(add), .attention = KERNEL(attention), .rotate = KERNEL(rotate),                  \
    .rotate_inverse = KERNEL(rotate_inverse)

#endif
