/*
 * ref.c - the scalar kernels: the specification of the forward pass.
 *
 * Plain C11 that any compiler and CPU with IEEE-754 arithmetic runs to the same bits: binary32
 * + - * / sqrt rounded to nearest even in the order written, int32 sums that cannot overflow,
 * no fma (so that a plain x86-64 build needs no emulation and vectorises), no libm functions.
 * The loops over 16 lanes, tokens and columns carry no dependence between their items, so that
 * compilers may vectorise them without changing a bit.
 *
 * Every other kernel table is compared with this one by memcmp (tests/test_kernels.c).
 * Documented in docs/NUMERICS.md.
 */
#include "code/code.h"
#include "format/container.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <assert.h>
#include <math.h>

/* ---- Reductions -------------------------------------------------------- */

/* Adds 16 lanes in the tree (l, l+8), (l, l+4), (l, l+2), (l, l+1). */
static inline float lanes_sum(float lane[KERNELS_LANES]) {
    for (int l = 0; l < 8; l++) {
        lane[l] += lane[l + 8];
    }
    for (int l = 0; l < 4; l++) {
        lane[l] += lane[l + 4];
    }
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

/* sum_i a[i] * b[i]: item i goes to lane i mod 16, each product rounded before it is added. */
static inline float dot_f32(const float *a, const float *b, size_t n) {
    float lane[KERNELS_LANES] = {0};
    size_t i = 0;
    for (; i + KERNELS_LANES <= n; i += KERNELS_LANES) {
        for (int l = 0; l < KERNELS_LANES; l++) {
            lane[l] += a[i + (size_t)l] * b[i + (size_t)l];
        }
    }
    if (i < n) {
        /* A ragged end, filled up with zeros: adding +0 changes no lane, for a lane that starts
         * at +0 is never -0. */
        float a_end[KERNELS_LANES] = {0}, b_end[KERNELS_LANES] = {0};
        memcpy(a_end, a + i, (n - i) * sizeof *a);
        memcpy(b_end, b + i, (n - i) * sizeof *b);
        for (int l = 0; l < KERNELS_LANES; l++) {
            lane[l] += a_end[l] * b_end[l];
        }
    }
    return lanes_sum(lane);
}

/* ---- Packed matrices --------------------------------------------------- */

/* These tables follow from code_table in 512 steps, far fewer than a call's weights. */
typedef struct window_tables {
    uint8_t newer[256]; /* hash of the window's newer byte; the older one is its own */
    int8_t weight[256]; /* value[hash] - 64 */
    uint32_t width0;    /* bits of an even weight */
} window_tables;

static void window_tables_fill(const struct code_table *code, window_tables *t) {
    for (unsigned i = 0; i < 256; i++) {
        t->newer[i] = code_hash(code, i << 8);
    }
    for (int h = 0; h < 256; h++) {
        t->weight[h] = (int8_t)(code->value[h] - CODE_CENTRE);
    }
    t->width0 = (uint32_t)code->width[0];
}

static inline int8_t window_weight(const window_tables *t, uint64_t window) {
    return t->weight[(window & 255) ^ t->newer[window >> 8 & 255]];
}

/*
 * Decodes one row. Weight k of a block ends at bit e of the block's 8 * half_bits; its window is
 * bits [e-16, e), which for e < 16 begins in the previous block. Inlined for each constant
 * half_bits.
 */
static inline void decode_row(const window_tables *t, uint32_t half_bits, const packed_matrix *m,
                              uint32_t row, int8_t *w) {
    uint64_t previous = 0; /* the last 16 bits of the previous block */
    for (uint32_t c = 0; c < m->n_cols; c += 16) {
        packed_place place = packed_block(half_bits, m->n_cols / 16, row, c / 16);
        const uint8_t *codes = m->codes + place.first;
        uint64_t bits = 0;
        for (uint32_t i = 0; i < half_bits; i++) {
            bits |= (uint64_t)codes[i * place.step] << (8 * i);
        }
        uint64_t joined = bits << 16 | previous;
        for (uint32_t pair = 0; pair < 8; pair++) {
            uint32_t e0 = pair * half_bits + t->width0, e1 = (pair + 1) * half_bits;
            uint64_t window0 = e0 < 16 ? joined >> e0 : bits >> (e0 - 16);
            uint64_t window1 = e1 < 16 ? joined >> e1 : bits >> (e1 - 16);
            w[c + 2 * pair] = window_weight(t, window0);
            w[c + 2 * pair + 1] = window_weight(t, window1);
        }
        previous = bits >> (8 * half_bits - 16) & 0xffff;
    }
}

/* One row to signed integers: v - 64, or the int8 weights themselves. */
static void unpack_row(const packed_matrix *m, const window_tables *t, uint32_t row, int8_t *w) {
    switch (m->half_bits) {
    case 4:
        decode_row(t, 4, m, row, w);
        break;
    case 5:
        decode_row(t, 5, m, row, w);
        break;
    case 6:
        decode_row(t, 6, m, row, w);
        break;
    case 7:
        decode_row(t, 7, m, row, w);
        break;
    case 8:
        decode_row(t, 8, m, row, w);
        break;
    default:
        for (uint32_t c = 0; c < m->n_cols; c++) {
            packed_place place = packed_block(16, m->n_cols / 16, row, c / 16);
            w[c] = (int8_t)m->codes[place.first + c % 16 * place.step];
        }
    }
}

/* |w| <= 128, |q| <= 127 and n <= KERNELS_MAX_COLS keep the sum inside int32. */
static inline int32_t dot_i8(const int8_t *w, const int8_t *q, uint32_t n) {
    int32_t sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (int16_t)w[i] * (int16_t)q[i];
    }
    return sum;
}

static void matmul_packed_ref(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                              const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                              uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % PACKED_STRIP == 0);
    window_tables tables;
    if (w->half_bits != 16) {
        window_tables_fill(code_table_get((int)w->half_bits), &tables);
    }
    int8_t *row = (int8_t *)scratch;
    for (uint32_t r = row_begin; r < row_end; r++) {
        unpack_row(w, &tables, r, row);
        float row_scale = bfloat_to_float(load_u16(w->scales + (size_t)2 * r));
        for (uint32_t t = 0; t < n_tokens; t++) {
            int32_t sum = dot_i8(row, x[t].q, w->n_cols);
            y[t * y_stride + r] = ((float)sum * row_scale) * x[t].scale;
        }
    }
}

static void unpack_row_ref(const packed_matrix *w, uint32_t row, float *y, uint8_t *scratch) {
    window_tables tables;
    if (w->half_bits != 16) {
        window_tables_fill(code_table_get((int)w->half_bits), &tables);
    }
    int8_t *v = (int8_t *)scratch;
    unpack_row(w, &tables, row, v);
    float row_scale = bfloat_to_float(load_u16(w->scales + (size_t)2 * row));
    for (uint32_t c = 0; c < w->n_cols; c++) {
        y[c] = (float)v[c] * row_scale;
    }
}

static void quantize_activation_ref(const float *x, uint32_t n, int8_t *q, float *scale,
                                    int32_t *sum) {
    /* For finite numbers the order of |x| is that of its bits; infinities and NaN are above. */
    uint32_t amax_bits = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits = math_bits_f32(x[i]) & 0x7fffffffu;
        amax_bits = bits > amax_bits ? bits : amax_bits;
    }
    float amax = math_from_bits_f32(amax_bits);
    if (!(amax >= KERNELS_TINY && amax <= FLT_MAX)) {
        memset(q, 0, n);
        *sum = 0;
        *scale = amax < KERNELS_TINY ? 0.0f : math_from_bits_f32(MATH_NAN_BITS);
        return;
    }
    float inverse = 127.0f / amax;
    int32_t total = 0;
    for (uint32_t i = 0; i < n; i++) {
        /* |x * inverse| <= 127.00001; the low bits of the rounded sum are the integer. */
        int32_t v = (int32_t)(math_bits_f32(x[i] * inverse + MATH_ROUND_F32) -
                              math_bits_f32(MATH_ROUND_F32));
        q[i] = (int8_t)v;
        total += v;
    }
    *scale = amax / 127.0f;
    *sum = total;
}

/* ---- F32 linear layers ------------------------------------------------- */

static void matmul_f32_ref(const float *w, uint32_t n_rows, uint32_t n_cols, const float *x,
                           size_t x_stride, uint32_t n_tokens, float *y, size_t y_stride) {
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t t = 0; t < n_tokens; t++) {
            y[t * y_stride + r] = dot_f32(w + (size_t)r * n_cols, x + t * x_stride, n_cols);
        }
    }
}

/* As half_to_float, without branches: exponent and fraction in place, rebased by 2^(127 - 15). */
static inline float half_value(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h); /* little-endian machines alone, see model/llama.c */
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t finite = math_bits_f32(math_from_bits_f32(magnitude) * 0x1p112f);
    uint32_t infinite = magnitude | 0x7f800000u; /* or NaN */
    return math_from_bits_f32(sign | (magnitude >= 0x0f800000u ? infinite : finite));
}

static void row_to_f32_ref(uint32_t type, const uint8_t *src, uint32_t n, float *dst) {
    switch (type) {
    case TENSOR_F32: /* little-endian, perhaps unaligned */
        for (uint32_t i = 0; i < n; i++) {
            dst[i] = math_from_bits_f32(load_u32(src + (size_t)4 * i));
        }
        break;
    case TENSOR_F16:
        for (uint32_t i = 0; i < n; i++) {
            dst[i] = half_value(src + (size_t)2 * i);
        }
        break;
    case TENSOR_BF16:
        for (uint32_t i = 0; i < n; i++) {
            dst[i] = math_from_bits_f32((uint32_t)load_u16(src + (size_t)2 * i) << 16);
        }
        break;
    case TENSOR_Q8_0: /* the product has at most 8 + 11 bits: exact */
        assert(n % 32 == 0);
        for (uint32_t i = 0; i < n; i += 32, src += 34) {
            float scale = half_to_float(load_u16(src));
            for (uint32_t j = 0; j < 32; j++) {
                dst[i + j] = scale * (float)(int8_t)src[2 + j];
            }
        }
        break;
    default:
        tensor_blocks_to_f32(type, src, n, dst);
        break;
    }
}

/* ---- The rest of the layer --------------------------------------------- */

static void rmsnorm_ref(const float *x, const float *gain, uint32_t n, float eps, float *y) {
    float mean = dot_f32(x, x, n) / (float)n;
    float r = 1.0f / sqrtf(mean + eps);
    for (uint32_t i = 0; i < n; i++) {
        y[i] = (x[i] * r) * gain[i];
    }
}

static void rope_ref(float *x, uint32_t n_rot, bool interleaved, const float *cosine,
                     const float *sine) {
    uint32_t half = n_rot / 2;
    size_t step = interleaved ? 2 : 1, offset = interleaved ? 1 : half;
    for (uint32_t i = 0; i < half; i++) {
        float *a = x + i * step, *b = a + offset;
        float a0 = *a, b0 = *b;
        *a = a0 * cosine[i] - b0 * sine[i];
        *b = a0 * sine[i] + b0 * cosine[i];
    }
}

static void swiglu_ref(float *gate, const float *up, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        gate[i] = (gate[i] / (1.0f + math_exp_f32(-gate[i]))) * up[i];
    }
}

static void add_ref(float *x, const float *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        x[i] += y[i];
    }
}

/* A query, and what has been joined of it so far: `out` holds the sum of values. */
typedef struct attention_state {
    const attention_query *query;
    const int8_t *q8; /* Q8: the query quantized ... */
    float q_scale;    /* ... and its scale, times that of the scores */
    float max, sum;
} attention_state;

/* A row of an F32 or F16 cache. */
static const float *cache_row(hepta_cache_type type, const void *rows, size_t position,
                              uint32_t head_dim, float *scratch) {
    if (type == HEPTA_CACHE_F32) {
        return (const float *)rows + position * head_dim;
    }
    const uint8_t *row = (const uint8_t *)rows + 2 * position * head_dim;
    row_to_f32_ref(TENSOR_F16, row, head_dim, scratch);
    return scratch;
}

static float score_f32(const attention_state *state, const kv_cache *cache, size_t position,
                       uint32_t head_dim, float scale, float *scratch) {
    const float *key = cache_row(cache->type, cache->k, position, head_dim, scratch);
    return dot_f32(state->query->q, key, head_dim) * scale;
}

static float score_q8(const attention_state *state, const kv_cache *cache, size_t position,
                      uint32_t head_dim) {
    const size_t row = KV_ROW(head_dim);
    int32_t sum = 0;
    for (size_t d = 0; d < row; d++) {
        sum += ((const int8_t *)cache->k)[kv_key_index(position, d, row)] * state->q8[d];
    }
    return ((float)sum * cache->k_scale[position]) * state->q_scale;
}

/* out_d = sum_j p_j v_jd for positions begin .. begin + n - 1 */
static void values_f32(const float *p, const kv_cache *cache, size_t begin, uint32_t n,
                       uint32_t head_dim, float *out, float *scratch) {
    for (uint32_t d = 0; d < head_dim; d++) {
        out[d] = 0.0f;
    }
    for (uint32_t j = 0; j < n; j++) {
        const float *value = cache_row(cache->type, cache->v, begin + j, head_dim, scratch);
        for (uint32_t d = 0; d < head_dim; d++) {
            out[d] += p[j] * value[d];
        }
    }
}

/* The same with weights p_j * v_scale_j rounded to integers of which the largest is
 * KERNELS_WEIGHT_MAX; exact sums. Overwrites p. */
static void values_q8(float *p, const kv_cache *cache, size_t begin, uint32_t n, uint32_t head_dim,
                      float *out) {
    uint32_t max_bits = 0; /* of numbers >= 0 the order is that of their bits; NaN is above */
    for (uint32_t j = 0; j < n; j++) {
        p[j] *= cache->v_scale[begin + j];
        uint32_t bits = math_bits_f32(p[j]) & 0x7fffffffu;
        max_bits = bits > max_bits ? bits : max_bits;
    }
    const float max = math_from_bits_f32(max_bits);
    if (!(max >= KERNELS_TINY && max <= FLT_MAX)) {
        for (uint32_t d = 0; d < head_dim; d++) {
            out[d] = max < KERNELS_TINY ? 0.0f : math_from_bits_f32(MATH_NAN_BITS);
        }
        return;
    }
    const float inverse = KERNELS_WEIGHT_MAX / max, unit = max / KERNELS_WEIGHT_MAX;
    const size_t row = KV_ROW(head_dim);
    for (uint32_t d = 0; d < head_dim; d++) {
        int32_t sum = 0; /* below 64 * 16383 * 127 < 2^27 */
        for (uint32_t j = 0; j < n; j++) {
            int32_t weight = (int32_t)math_round_f32(p[j] * inverse);
            sum += weight * ((const int8_t *)cache->v)[kv_value_index(begin + j, d, row)];
        }
        out[d] = (float)sum * unit;
    }
}

/* Scores, their maximum, exponentials, their sum and the weighted values of a block. */
static void attention_block(const attention_state *state, const kv_cache *cache, uint32_t begin,
                            uint32_t n, uint32_t head_dim, float scale, float *max, float *sum,
                            float *out, float *scratch) {
    float *score = scratch, *row = scratch + KERNELS_ATTENTION_BLOCK;
    const bool q8 = cache->type == HEPTA_CACHE_Q8;
    *max = -INFINITY;
    for (uint32_t j = 0; j < n; j++) {
        score[j] = q8 ? score_q8(state, cache, begin + j, head_dim)
                      : score_f32(state, cache, begin + j, head_dim, scale, row);
        *max = score[j] > *max ? score[j] : *max;
    }
    float lane[KERNELS_LANES] = {0};
    for (uint32_t j = 0; j < n; j++) {
        score[j] = math_exp_f32(score[j] - *max);
        lane[j % KERNELS_LANES] += score[j];
    }
    *sum = lanes_sum(lane);
    if (q8) {
        values_q8(score, cache, begin, n, head_dim, out);
    } else {
        values_f32(score, cache, begin, n, head_dim, out, row);
    }
}

static void attend_ref(attention_state *state, const kv_cache *cache, uint32_t head_dim,
                       float scale, float *scratch) {
    const uint32_t n_pos = state->query->n_pos;
    float *out = state->query->out, *block_out = scratch;
    scratch += head_dim;
    uint32_t n = n_pos < KERNELS_ATTENTION_BLOCK ? n_pos : KERNELS_ATTENTION_BLOCK;
    attention_block(state, cache, 0, n, head_dim, scale, &state->max, &state->sum, out, scratch);
    for (uint32_t begin = n; begin < n_pos; begin += n) {
        n = n_pos - begin < KERNELS_ATTENTION_BLOCK ? n_pos - begin : KERNELS_ATTENTION_BLOCK;
        float block_max, block_sum;
        attention_block(state, cache, begin, n, head_dim, scale, &block_max, &block_sum, block_out,
                        scratch);
        float new_max = block_max > state->max ? block_max : state->max;
        float keep = math_exp_f32(state->max - new_max), join = math_exp_f32(block_max - new_max);
        state->max = new_max;
        state->sum = state->sum * keep + block_sum * join;
        for (uint32_t d = 0; d < head_dim; d++) {
            out[d] = out[d] * keep + block_out[d] * join;
        }
    }
    float inverse = 1.0f / state->sum;
    for (uint32_t d = 0; d < head_dim; d++) {
        out[d] *= inverse;
    }
}

static void attention_ref(const kv_cache *cache, uint32_t head_dim, const attention_query *queries,
                          uint32_t n_queries, float scale, float *scratch) {
    int8_t *q8 = (int8_t *)(scratch + 4 * KERNELS_ATTENTION_BLOCK + 2 * (size_t)head_dim);
    assert(n_queries <= KERNELS_MAX_QUERIES);
    for (uint32_t i = 0; i < n_queries; i++) {
        attention_state state = {.query = &queries[i], .q8 = q8};
        if (cache->type == HEPTA_CACHE_Q8) {
            int32_t sum;
            memset(q8, 0, KV_ROW(head_dim));
            quantize_activation_ref(queries[i].q, head_dim, q8, &state.q_scale, &sum);
            state.q_scale *= scale;
        }
        attend_ref(&state, cache, head_dim, scale, scratch);
    }
}

/* ---- Rotation ---------------------------------------------------------- */

/*
 * x := (Hartley_m (x) Hadamard_2^p) x, item (a, b) at a * 2^p + b: the fast Walsh-Hadamard
 * transform of each of the m parts, from neighbours to far pairs, a scale, then for every output
 * the sum over a in ascending order.
 */
static void rotate_core(const rotation *r, float *x, float *scratch) {
    for (uint32_t h = 1; h < r->pow2; h *= 2) {
        for (uint32_t i = 0; i < r->n; i += 2 * h) {
            for (uint32_t j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
    for (uint32_t i = 0; i < r->n; i++) {
        x[i] *= r->hadamard_scale;
    }
    if (r->m == 1) {
        return;
    }
    memset(scratch, 0, r->n * sizeof *scratch);
    for (uint32_t a = 0; a < r->m; a++) {
        const float *in = x + (size_t)a * r->pow2, *hartley = r->hartley + (size_t)a * r->m;
        for (uint32_t c = 0; c < r->m; c++) {
            float *out = scratch + (size_t)c * r->pow2;
            for (uint32_t b = 0; b < r->pow2; b++) {
                out[b] += hartley[c] * in[b];
            }
        }
    }
    memcpy(x, scratch, r->n * sizeof *x);
}

static void rotate_ref(const rotation *r, float *x, float *scratch) {
    for (uint32_t i = 0; i < r->n; i++) {
        x[i] *= r->signs[i];
    }
    rotate_core(r, x, scratch);
    for (uint32_t i = r->n; i < r->n_padded; i++) {
        x[i] = 0.0f;
    }
}

static void rotate_inverse_ref(const rotation *r, float *x, float *scratch) {
    rotate_core(r, x, scratch);
    for (uint32_t i = 0; i < r->n; i++) {
        x[i] *= r->signs[i];
    }
}

const kernels kernels_ref = {
    .name = "ref",
    .macs_per_microsecond = 1500,
    .matmul_packed = matmul_packed_ref,
    .unpack_row = unpack_row_ref,
    .quantize_activation = quantize_activation_ref,
    .matmul_f32 = matmul_f32_ref,
    .row_to_f32 = row_to_f32_ref,
    .rmsnorm = rmsnorm_ref,
    .rope = rope_ref,
    .swiglu = swiglu_ref,
    .add = add_ref,
    .attention = attention_ref,
    .rotate = rotate_ref,
    .rotate_inverse = rotate_inverse_ref,
};
