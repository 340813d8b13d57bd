/*
 * layers.h - what stands between the products: embedding, norm, SwiGLU, rotation, quantization of
 * activations, RoPE, and the cache. A block works on one token (or one head of it), whose vector
 * lies in shared memory, or in the device's memory if it is too long for that.
 *
 * Every float sum has the order of docs/NUMERICS.md: 16 lanes for the norm, one running sum per
 * output of a Hartley matrix; the butterflies of a Hadamard matrix are the same additions in
 * whatever order the pairs are taken.
 */
#ifndef GPU_LAYERS_H
#define GPU_LAYERS_H

#include "gpu/matmul.h"
#include "kernels/trig.h"

constexpr uint32_t TOKEN_THREADS = 1024, HEAD_THREADS = 128, HARTLEY_IN_REGISTERS = 8;

typedef struct dev_rotation {
    uint32_t n, m, pow2;
    const float *signs, *hartley;
    float hadamard_scale;
} dev_rotation;

/* Where item i of a vector lies, so that steps of 8 and 64 meet other banks. */
GPU_FN uint32_t spread(uint32_t i) {
    return i + i / 32;
}
static size_t spread_bytes(uint32_t n) {
    return ((size_t)n + n / 32) * sizeof(float);
}

/* ---- Rotation ---------------------------------------------------------- */

/* LOG steps of the Walsh-Hadamard transform, from pairs h apart on. */
template <int LOG> GPU_FN void butterflies(float *x, uint32_t n, uint32_t h, float scale) {
    enum { R = 1 << LOG };
    THREADS(t) {
        for (uint32_t u = t; u < n / R; u += BLOCK_THREADS) {
            const uint32_t first = u / h * h * R + u % h;
            float v[R];
            UNROLL
            for (uint32_t j = 0; j < R; j++) {
                v[j] = x[spread(first + j * h)];
            }
            UNROLL
            for (int s = 0; s < LOG; s++) {
                UNROLL
                for (int j = 0; j < R; j++) {
                    if ((j >> s & 1) == 0) {
                        const float a = v[j], b = v[j + (1 << s)];
                        v[j] = a + b;
                        v[j + (1 << s)] = a - b;
                    }
                }
            }
            UNROLL
            for (uint32_t j = 0; j < R; j++) {
                x[spread(first + j * h)] = v[j] * scale;
            }
        }
    }
}

/* x times (Hartley (x) Hadamard), x spread; where the result lies: x, or other (also spread). */
GPU_FN float *rotate_core(const dev_rotation *r, float *x, float *other) {
    uint32_t h = 1;
    for (; h * 8 <= r->pow2; h *= 8) {
        butterflies<3>(x, r->n, h, h * 8 == r->pow2 ? r->hadamard_scale : 1.0f);
    }
    if (h * 4 == r->pow2) {
        butterflies<2>(x, r->n, h, r->hadamard_scale);
    } else if (h * 2 == r->pow2) {
        butterflies<1>(x, r->n, h, r->hadamard_scale);
    }
    if (r->m == 1) {
        return x;
    }
    if (r->m <= HARTLEY_IN_REGISTERS) {
        THREADS(t) {
            for (uint32_t b = t; b < r->pow2; b += BLOCK_THREADS) {
                float in[HARTLEY_IN_REGISTERS];
                UNROLL
                for (uint32_t a = 0; a < HARTLEY_IN_REGISTERS; a++) {
                    in[a] = a < r->m ? x[spread(a * r->pow2 + b)] : 0.0f;
                }
                for (uint32_t c = 0; c < r->m; c++) {
                    float sum = 0.0f;
                    UNROLL
                    for (uint32_t a = 0; a < HARTLEY_IN_REGISTERS; a++) {
                        if (a < r->m) {
                            sum += r->hartley[a * r->m + c] * in[a];
                        }
                    }
                    x[spread(c * r->pow2 + b)] = sum;
                }
            }
        }
        return x;
    }
    THREADS(t) {
        for (uint32_t i = t; i < r->n; i += BLOCK_THREADS) {
            const uint32_t c = i / r->pow2, b = i % r->pow2;
            float sum = 0.0f;
            for (uint32_t a = 0; a < r->m; a++) {
                sum += r->hartley[(size_t)a * r->m + c] * x[spread(a * r->pow2 + b)];
            }
            other[spread(i)] = sum;
        }
    }
    return other;
}

/* ---- Quantization ------------------------------------------------------ */

/* How a vector becomes int8: as quantize_activation() of ref.c. */
typedef struct quantizer {
    float inverse, scale;
    bool zero;
} quantizer;

GPU_FN quantizer quantizer_of(uint32_t amax_bits) {
    const float amax = math_from_bits_f32(amax_bits);
    if (!(amax >= KERNELS_TINY && amax <= FLT_MAX)) {
        const quantizer q = {0.0f, amax < KERNELS_TINY ? 0.0f : math_from_bits_f32(MATH_NAN_BITS),
                             true};
        return q;
    }
    const quantizer q = {divide(127.0f, amax), divide(amax, 127.0f), false};
    return q;
}

GPU_FN int quantize_one(const quantizer *q, float x) {
    return q->zero ? 0
                   : (int)(math_bits_f32(x * q->inverse + MATH_ROUND_F32) -
                           math_bits_f32(MATH_ROUND_F32));
}

/* The bits of the largest |x| of the block's n items; a NaN's are above all. */
GPU_FN uint32_t largest_bits(const float *x, uint32_t n, uint32_t *shared) {
    PRIVATE(TOKEN_THREADS, uint32_t, most, [1]);
    THREADS_ALONE(t) {
        uint32_t m = 0;
        for (uint32_t i = t; i < n; i += BLOCK_THREADS) {
            const uint32_t bits = math_bits_f32(x[spread(i)]) & 0x7fffffffu;
            m = bits > m ? bits : m;
        }
        most[OWN(t)][0] = m;
    }
    WARP_MAX(most, 0);
    THREADS(t) {
        if (t % 32 == 0) {
            shared[t / 32] = most[OWN(t)][0];
        }
    }
    uint32_t all = 0;
    for (uint32_t i = 0; i < BLOCK_THREADS / 32; i++) {
        all = shared[i] > all ? shared[i] : all;
    }
    return all;
}

/* ---- The input of packed layers ---------------------------------------- */

typedef struct prepare_parameters {
    gpu_prepare_mode mode;
    float *x;          /* (n_tokens, n) */
    const float *y;    /* (n_tokens, n); NORM: may be NULL */
    const float *gain; /* (n) */
    float eps;
    dev_rotation r;
    float *scratch; /* (n_tokens, 2, spread n): used if not in_shared, or if m is large */
    bool in_shared;
    int8_t *q; /* (n_tokens, q_stride) */
    uint32_t q_stride;
    float *scale; /* (n_tokens) */
    int *sum;
} prepare_parameters;

/* What a thread loads before it uses any of it: each would wait for the one before otherwise. */
constexpr uint32_t ITEMS_AHEAD = 8, LANE_AHEAD = 16;

/* Items i, i + BLOCK_THREADS, ... below n; zeros from there on, and if x is NULL. */
GPU_FN void load_items(const float *x, uint32_t n, uint32_t i, float *v) {
    UNROLL
    for (uint32_t k = 0; k < ITEMS_AHEAD; k++) {
        v[k] = x != NULL && i + k * BLOCK_THREADS < n ? x[i + k * BLOCK_THREADS] : 0.0f;
    }
}

/* Items i, i + 16, ... of a lane, i % 256 < 16; zeros from n on: a lane is never -0, so they change
 * nothing. */
GPU_FN void load_lane(const float *x, uint32_t n, uint32_t i, float *v) {
    const float *at = x + spread(i);
    if (i + 16 * (LANE_AHEAD - 1) < n) {
        UNROLL
        for (uint32_t k = 0; k < LANE_AHEAD; k++) {
            v[k] = at[16 * k + k / 2]; /* as spread() has it */
        }
        return;
    }
    UNROLL
    for (uint32_t k = 0; k < LANE_AHEAD; k++) {
        v[k] = i + 16 * k < n ? at[16 * k + k / 2] : 0.0f;
    }
}

/* BLOCK_X: a token. */
GPU_KERNEL_OF(TOKEN_THREADS, 1) prepare(prepare_parameters p) {
    NEXT_MAY_BEGIN();
    AWAIT_KERNEL_BEFORE();
    DYNAMIC(float, dynamic);
    SHARED(float, lane, 16);
    SHARED(uint32_t, most, TOKEN_THREADS / 32);
    SHARED(int, total, 1);
    PRIVATE(TOKEN_THREADS, int, sum, [1]);
    const uint32_t n = p.r.n, token = BLOCK_X;
    float *x = p.x + (size_t)token * n;
    const float *y = p.y == NULL ? NULL : p.y + (size_t)token * n;
    float *scratch = p.scratch + (size_t)token * 2 * spread(n);
    float *in = p.in_shared ? dynamic : scratch + spread(n);
    THREADS(t) {
        for (uint32_t first = t; first < n; first += ITEMS_AHEAD * BLOCK_THREADS) {
            float v[ITEMS_AHEAD], other[ITEMS_AHEAD], sign[ITEMS_AHEAD];
            load_items(x, n, first, v);
            load_items(y, n, first, other);
            load_items(p.mode == GPU_PREPARE_NORM ? NULL : p.r.signs, n, first, sign);
            UNROLL
            for (uint32_t k = 0; k < ITEMS_AHEAD; k++) {
                const uint32_t i = first + k * BLOCK_THREADS;
                if (i < n) {
                    if (p.mode == GPU_PREPARE_SWIGLU) {
                        v[k] = divide(v[k], 1.0f + math_exp_f32(-v[k])) * other[k];
                    }
                    if (p.mode != GPU_PREPARE_NORM) {
                        v[k] *= sign[k];
                    } else if (y != NULL) {
                        v[k] += other[k];
                        x[i] = v[k];
                    }
                    in[spread(i)] = v[k];
                }
            }
        }
        if (t == 0) {
            total[0] = 0;
        }
    }
    if (p.mode == GPU_PREPARE_NORM) {
        THREADS(t) {
            for (uint32_t l = t; l < 16; l += BLOCK_THREADS) {
                float s = 0.0f, v[LANE_AHEAD], next[LANE_AHEAD];
                load_lane(in, n, l, next);
                for (uint32_t i = l; i < n; i += 16 * LANE_AHEAD) {
                    UNROLL
                    for (uint32_t k = 0; k < LANE_AHEAD; k++) {
                        v[k] = next[k];
                    }
                    load_lane(in, n, i + 16 * LANE_AHEAD, next);
                    UNROLL
                    for (uint32_t k = 0; k < LANE_AHEAD; k++) {
                        s += v[k] * v[k];
                    }
                }
                lane[l] = s;
            }
        }
        const float mean = divide(lanes_sum(lane), (float)n);
        const float r = divide(1.0f, square_root(mean + p.eps));
        THREADS(t) {
            for (uint32_t first = t; first < n; first += ITEMS_AHEAD * BLOCK_THREADS) {
                float gain[ITEMS_AHEAD], sign[ITEMS_AHEAD];
                load_items(p.gain, n, first, gain);
                load_items(p.r.signs, n, first, sign);
                UNROLL
                for (uint32_t k = 0; k < ITEMS_AHEAD; k++) {
                    const uint32_t i = first + k * BLOCK_THREADS;
                    if (i < n) {
                        in[spread(i)] = ((in[spread(i)] * r) * gain[k]) * sign[k];
                    }
                }
            }
        }
    }
    const float *out = rotate_core(&p.r, in, scratch);
    const quantizer q = quantizer_of(largest_bits(out, n, most));
    THREADS_ALONE(t) {
        int s = 0;
        for (uint32_t i = t; i < p.q_stride / 4; i += BLOCK_THREADS) {
            uint32_t word = 0;
            UNROLL
            for (uint32_t b = 0; b < 4; b++) {
                const uint32_t column = q_column(4 * i + b);
                const int v = column < n ? quantize_one(&q, out[spread(column)]) : 0;
                s += v;
                word |= (uint32_t)(v & 255) << (8 * b);
            }
            ((uint32_t *)(p.q + (size_t)token * p.q_stride))[i] = word;
        }
        sum[OWN(t)][0] = s;
    }
    UNROLL
    for (unsigned mask = 1; mask < 32; mask *= 2) {
        WARP_SUM(sum, 0, mask);
    }
    THREADS(t) {
        if (t % 32 == 0) {
            shared_add(total, sum[OWN(t)][0]);
        }
    }
    THREADS_ALONE(t) {
        if (t == 0) {
            p.scale[token] = q.scale;
            p.sum[token] = total[0];
        }
    }
}

static unsigned token_threads(uint32_t n) {
    const unsigned threads = (n / 8 + 31) / 32 * 32;
    return threads < 32 ? 32 : threads < TOKEN_THREADS ? threads : TOKEN_THREADS;
}

/* ---- Embedding --------------------------------------------------------- */

typedef struct embed_parameters {
    dev_matrix w;
    const code_lookups *codes;
    dev_rotation r;
    const gpu_token *tokens;
    float *x; /* (n_tokens, n) */
    float *scratch;
    bool in_shared;
} embed_parameters;

/* BLOCK_X: a token. Its row of the embedding, rotated back. */
GPU_KERNEL_OF(TOKEN_THREADS, 1) embed(embed_parameters p) {
    DYNAMIC(float, dynamic);
    const uint32_t n = p.r.n, token = BLOCK_X, row = (uint32_t)p.tokens[token].id;
    float *scratch = p.scratch + (size_t)token * 2 * spread(n);
    float *in = p.in_shared ? dynamic : scratch + spread(n);
    const code_lookups *codes =
        p.w.half_bits == 16 ? p.codes : p.codes + (p.w.half_bits - CODE_MIN_RATE);
    const float scale = row_scale(&p.w, row);
    THREADS(t) {
        for (uint32_t i = t; i < n; i += BLOCK_THREADS) {
            const int w = decode_one(codes, &p.w, row, i);
            in[spread(i)] = (float)w * scale;
        }
    }
    const float *out = rotate_core(&p.r, in, scratch);
    THREADS_ALONE(t) {
        for (uint32_t i = t; i < n; i += BLOCK_THREADS) {
            p.x[(size_t)token * n + i] = out[spread(i)] * p.r.signs[i];
        }
    }
}

typedef struct angle_parameters {
    const double *frequency; /* (n) */
    uint32_t n;
    const gpu_token *tokens;
    float *cosine, *sine; /* (n_tokens, n) */
} angle_parameters;

/* BLOCK_X: a token. Cosines and sines of RoPE for its position. */
GPU_KERNEL_OF(HEAD_THREADS, 1) angles(angle_parameters p) {
    const uint32_t token = BLOCK_X;
    const double position = (double)p.tokens[token].position;
    THREADS_ALONE(t) {
        for (uint32_t i = t; i < p.n; i += BLOCK_THREADS) {
            double sine, cosine;
            trig_sin_cos(position * p.frequency[i], &sine, &cosine);
            p.cosine[(size_t)token * p.n + i] = (float)cosine;
            p.sine[(size_t)token * p.n + i] = (float)sine;
        }
    }
}

/* ---- RoPE and the cache ------------------------------------------------ */

/* A layer's keys and values: rows of row_bytes, (n_sequences, n_head_kv, n_ctx). */
typedef struct dev_cache {
    hepta_cache_type type;
    uint32_t n_ctx, n_head_kv, head_dim, row_bytes;
    uint8_t *k, *v;
    float *k_scale, *v_scale; /* Q8: one per row */
} dev_cache;

GPU_FN size_t cache_row(const dev_cache *c, uint32_t sequence, uint32_t head, uint32_t position) {
    return ((size_t)sequence * c->n_head_kv + head) * c->n_ctx + position;
}

typedef struct rope_parameters {
    dev_cache cache;
    const gpu_token *tokens;
    uint32_t n_head, first; /* queries are for tokens from `first` on */
    float *q;               /* (n_tokens, n_head, head_dim) */
    const float *k, *v;     /* (n_tokens, n_head_kv, head_dim) */
    int8_t *q8;             /* Q8: (n_tokens, n_head, row_bytes) ... */
    float *q8_scale;        /* ... and their scales, times that of the scores */
    float score_scale;
    const float *cosine, *sine; /* (n_tokens, n_rot / 2) */
    uint32_t n_rot;
    bool interleaved;
    dev_rotation r; /* Q8: n is 0 if there is none */
} rope_parameters;

/* Stores n items as a row of a cache; x spread. Q8: at q8, and its scale. */
GPU_FN void store_row(const dev_cache *c, const float *x, uint8_t *row, float *scale,
                      uint32_t *shared) {
    const uint32_t n = c->head_dim;
    if (c->type != HEPTA_CACHE_Q8) {
        THREADS(t) {
            for (uint32_t i = t; i < n; i += BLOCK_THREADS) {
                if (c->type == HEPTA_CACHE_F32) {
                    ((float *)row)[i] = x[spread(i)];
                } else {
                    ((uint16_t *)row)[i] = half_store(x[spread(i)]);
                }
            }
        }
        return;
    }
    const quantizer q = quantizer_of(largest_bits(x, n, shared));
    THREADS(t) {
        for (uint32_t i = t; i < c->row_bytes; i += BLOCK_THREADS) {
            row[i] = (uint8_t)(i < n ? quantize_one(&q, x[spread(i)]) : 0);
        }
        if (t == 0) {
            *scale = q.scale;
        }
    }
}

/* BLOCK_X: a token; BLOCK_Y: a head of its query, then a KV head. */
GPU_KERNEL_OF(HEAD_THREADS, 1) rope_and_store(rope_parameters p) {
    NEXT_MAY_BEGIN();
    AWAIT_KERNEL_BEFORE();
    SHARED(float, in, GPU_MAX_HEAD_DIM + GPU_MAX_HEAD_DIM / 32);
    SHARED(float, other, GPU_MAX_HEAD_DIM + GPU_MAX_HEAD_DIM / 32);
    SHARED(uint32_t, most, HEAD_THREADS / 32);
    const uint32_t token = BLOCK_X, dim = p.cache.head_dim, half = p.n_rot / 2;
    const bool query = BLOCK_Y < p.n_head;
    const uint32_t head = query ? BLOCK_Y : BLOCK_Y - p.n_head;
    if (query && token < p.first) {
        return;
    }
    const size_t at_q = (size_t)token * p.n_head + head;
    const size_t at_k = (size_t)token * p.cache.n_head_kv + head;
    const float *from = query ? p.q + at_q * dim : p.k + at_k * dim;
    THREADS(t) {
        for (uint32_t i = t; i < dim; i += BLOCK_THREADS) {
            in[spread(i)] = from[i];
        }
    }
    THREADS(t) {
        for (uint32_t i = t; i < half; i += BLOCK_THREADS) {
            const float cosine = p.cosine[(size_t)token * half + i];
            const float sine = p.sine[(size_t)token * half + i];
            float *a = in + spread(p.interleaved ? 2 * i : i);
            float *b = in + spread(p.interleaved ? 2 * i + 1 : i + half);
            const float a0 = *a, b0 = *b;
            *a = a0 * cosine - b0 * sine;
            *b = a0 * sine + b0 * cosine;
        }
    }
    float *x = in;
    if (p.r.n != 0) {
        THREADS(t) {
            for (uint32_t i = t; i < dim; i += BLOCK_THREADS) {
                in[spread(i)] *= p.r.signs[i];
            }
        }
        x = rotate_core(&p.r, in, other);
    }
    if (query) {
        if (p.cache.type == HEPTA_CACHE_Q8) {
            store_row(&p.cache, x, (uint8_t *)p.q8 + at_q * p.cache.row_bytes, p.q8_scale + at_q,
                      most);
            THREADS_ALONE(t) {
                if (t == 0) {
                    p.q8_scale[at_q] *= p.score_scale;
                }
            }
        } else {
            THREADS_ALONE(t) {
                for (uint32_t i = t; i < dim; i += BLOCK_THREADS) {
                    p.q[at_q * dim + i] = x[spread(i)];
                }
            }
        }
        return;
    }
    const size_t row =
        cache_row(&p.cache, p.tokens[token].sequence, head, p.tokens[token].position);
    store_row(&p.cache, x, p.cache.k + row * p.cache.row_bytes, p.cache.k_scale + row, most);
    THREADS(t) {
        for (uint32_t i = t; i < dim; i += BLOCK_THREADS) {
            in[spread(i)] = p.v[at_k * dim + i];
        }
    }
    store_row(&p.cache, in, p.cache.v + row * p.cache.row_bytes, p.cache.v_scale + row, most);
}

#endif
