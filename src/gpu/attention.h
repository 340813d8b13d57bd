/*
 * attention.h - attention as docs/NUMERICS.md defines it: blocks of 64 positions, each with its own
 * maximum and sum, joined in the order of the blocks.
 *
 * A block of threads takes up to 16 queries that read the same keys and values: heads that share a
 * KV head, and neighbouring tokens of a sequence. With many queries it goes through the blocks of
 * positions and joins them as it goes; with few, each block of positions has a block of threads
 * (`split`), and `attention_join` joins what they leave, in the same order.
 *
 * A score's 16 lanes are one thread's: thread j % 64 has position j. A value's sum over positions
 * is one thread's, too.
 */
#ifndef GPU_ATTENTION_H
#define GPU_ATTENTION_H

#include "gpu/layers.h"

constexpr uint32_t ATTEND_THREADS = 256, ATTEND_QUERIES = 16;
constexpr uint32_t ATTEND_ITEMS = 2048; /* queries x head_dim, at most */
constexpr uint32_t ATTEND_POSITIONS = KERNELS_ATTENTION_BLOCK;
constexpr uint32_t ATTEND_CHUNK = 32, ATTEND_STRIDE = 33; /* of keys in shared memory at a time */
constexpr uint32_t ATTEND_SETS = ATTEND_THREADS / ATTEND_POSITIONS; /* queries scored at once */
constexpr uint32_t ATTEND_TURNS = ATTEND_QUERIES / ATTEND_SETS;

/* Tokens first .. end - 1 of the chunk, of one sequence. */
typedef struct attend_tile {
    uint32_t first, end;
} attend_tile;

typedef struct attend_parameters {
    dev_cache cache;
    const gpu_token *tokens;
    const attend_tile *tiles;
    uint32_t n_head, part_heads, n_parts; /* a group's heads go in parts of part_heads */
    const float *q;                       /* (n_tokens, n_head, head_dim) */
    const int8_t *q8;
    const float *q8_scale;
    float scale;
    float *out;     /* (n_tokens, n_head, head_dim) */
    float *partial; /* split: (n_tokens, n_head, n_blocks, head_dim + 2), the last two m and s */
    uint32_t n_blocks;
} attend_parameters;

/* What becomes of a query's running result when a block joins it. */
typedef struct attend_state {
    float max, sum, keep, join, unit;
    uint32_t n;   /* positions of the block that it attends to */
    bool special; /* Q8: the block's values are `unit`, not sums */
} attend_state;

/* Item d of a row of the cache, exactly. */
template <int TYPE>
GPU_FN float cache_value(const uint8_t *rows, size_t row, uint32_t row_bytes, uint32_t d) {
    const uint8_t *at = rows + row * row_bytes;
    return TYPE == HEPTA_CACHE_F32   ? ((const float *)at)[d]
           : TYPE == HEPTA_CACHE_F16 ? half_load(((const uint16_t *)at)[d])
                                     : (float)(int8_t)at[d];
}

/* M, S of a query joined with those of a block. */
GPU_FN void join_block(attend_state *s, bool first, float max, float sum) {
    if (first) {
        s->max = max, s->sum = sum;
        return;
    }
    const float new_max = max > s->max ? max : s->max;
    s->keep = math_exp_f32(s->max - new_max);
    s->join = math_exp_f32(max - new_max);
    s->max = new_max;
    s->sum = s->sum * s->keep + sum * s->join;
}

/*
 * BLOCK_X: split, the block of positions; BLOCK_Y: a KV head and a part of its group's heads;
 * BLOCK_Z: a tile.
 */
template <int TYPE, bool SPLIT>
GPU_KERNEL_OF(ATTEND_THREADS, (SPLIT ? 1 : 2))
attend(attend_parameters p) {
    enum {
        Q8 = TYPE == HEPTA_CACHE_Q8,
        ITEMS = ATTEND_ITEMS / ATTEND_THREADS,
        AHEAD = SPLIT ? 32 : 8 /* values that a thread loads before it uses any */
    };
    NEXT_MAY_BEGIN();
    SHARED(uint32_t, query, ATTEND_ITEMS); /* floats, or bytes four a word */
    SHARED(uint32_t, keys, ATTEND_POSITIONS * ATTEND_STRIDE);
    SHARED(float, score, ATTEND_QUERIES *ATTEND_POSITIONS);
    SHARED(float, result, ATTEND_ITEMS);
    SHARED(float, part, ATTEND_QUERIES * 16);
    SHARED(uint32_t, part_bits, ATTEND_QUERIES * 16);
    SHARED(attend_state, state, ATTEND_QUERIES);
    PRIVATE(ATTEND_THREADS, float, lane, [ATTEND_TURNS][16]);
    PRIVATE(ATTEND_THREADS, int, dot, [ATTEND_TURNS]);
    const uint32_t dim = p.cache.head_dim, row_bytes = p.cache.row_bytes;
    const attend_tile tile = p.tiles[BLOCK_Z];
    const uint32_t group = p.n_head / p.cache.n_head_kv, head_kv = BLOCK_Y / p.n_parts;
    const uint32_t head_first = BLOCK_Y % p.n_parts * p.part_heads;
    const uint32_t heads = group - head_first < p.part_heads ? group - head_first : p.part_heads;
    const uint32_t n_queries = (tile.end - tile.first) * heads;
    const size_t rows = cache_row(&p.cache, p.tokens[tile.first].sequence, head_kv, 0);
    uint32_t n_pos = 0;
    for (uint32_t i = tile.first; i < tile.end; i++) {
        n_pos = p.tokens[i].position + 1 > n_pos ? p.tokens[i].position + 1 : n_pos;
    }
#define QUERY_TOKEN(i) (tile.first + (i) / heads)
#define QUERY_PLACE(i)                                                                             \
    ((size_t)QUERY_TOKEN(i) * p.n_head + head_kv * group + head_first + (i) % heads)
    const uint32_t n_blocks = (n_pos + ATTEND_POSITIONS - 1) / ATTEND_POSITIONS;
    const uint32_t block_first = SPLIT ? BLOCK_X : 0;
    const uint32_t block_end = SPLIT ? BLOCK_X + 1 : n_blocks;
    if (SPLIT && block_first < n_blocks) { /* most of it is of passes before */
        THREADS_ALONE(t) {
            const uint32_t first = block_first * ATTEND_POSITIONS, left = n_pos - first;
            const uint32_t n = (left < ATTEND_POSITIONS ? left : ATTEND_POSITIONS) * row_bytes;
            const size_t at = (rows + first) * row_bytes;
            for (uint32_t i = t * CACHE_LINE; i < n; i += BLOCK_THREADS * CACHE_LINE) {
                fetch_to_cache(p.cache.k + at + i);
                fetch_to_cache(p.cache.v + at + i);
            }
        }
    }
    AWAIT_KERNEL_BEFORE();
    if (block_first >= n_blocks) {
        return;
    }
    const uint32_t words = Q8 ? row_bytes / 4 : dim; /* of a query or a key */
    const bool same_item =
        ATTEND_THREADS % dim == 0; /* a thread's results are one item of values */
    THREADS(t) {
        for (uint32_t i = t; i < n_queries * words; i += BLOCK_THREADS) {
            const size_t place = QUERY_PLACE(i / words);
            query[i] = Q8 ? ((const uint32_t *)(p.q8 + place * row_bytes))[i % words]
                          : math_bits_f32(p.q[place * dim + i % words]);
        }
    }
    for (uint32_t b = block_first; b < block_end; b++) {
        const uint32_t begin = b * ATTEND_POSITIONS;
        THREADS(t) {
            if (t < n_queries) {
                const uint32_t to = p.tokens[QUERY_TOKEN(t)].position + 1;
                const uint32_t n = to > begin ? to - begin : 0;
                state[t].n = n < ATTEND_POSITIONS ? n : ATTEND_POSITIONS;
            }
            for (uint32_t i = 0; i < ATTEND_TURNS; i++) {
                dot[OWN(t)][i] = 0;
                for (int l = 0; l < 16; l++) {
                    lane[OWN(t)][i][l] = 0.0f;
                }
            }
        }
        for (uint32_t d0 = 0; d0 < words; d0 += ATTEND_CHUNK) {
            const uint32_t n = words - d0 < ATTEND_CHUNK ? words - d0 : ATTEND_CHUNK;
            THREADS(t) {
                enum { LOADS = ATTEND_POSITIONS * ATTEND_CHUNK / ATTEND_THREADS };
                uint32_t word[LOADS]; /* all of them before the first is stored */
                UNROLL
                for (uint32_t k = 0; k < LOADS; k++) {
                    const uint32_t i = t + k * ATTEND_THREADS;
                    const uint32_t j = i / ATTEND_CHUNK, d = i % ATTEND_CHUNK;
                    word[k] = 0;
                    if (begin + j < n_pos && d < n) {
                        const size_t row = rows + begin + j;
                        word[k] = Q8 ? ((const uint32_t *)(p.cache.k + row * row_bytes))[d0 + d]
                                     : math_bits_f32(
                                           cache_value<TYPE>(p.cache.k, row, row_bytes, d0 + d));
                    }
                }
                UNROLL
                for (uint32_t k = 0; k < LOADS; k++) {
                    const uint32_t i = t + k * ATTEND_THREADS;
                    keys[i / ATTEND_CHUNK * ATTEND_STRIDE + i % ATTEND_CHUNK] = word[k];
                }
            }
            THREADS(t) {
                const uint32_t j = t % ATTEND_POSITIONS, set = t / ATTEND_POSITIONS;
                UNROLL
                for (uint32_t i = 0; i < ATTEND_TURNS; i++) {
                    const uint32_t q = set + i * ATTEND_SETS;
                    if (q < n_queries && j < state[q].n) {
                        const uint32_t *x = query + q * words + d0, *y = keys + j * ATTEND_STRIDE;
                        if (Q8) {
                            for (uint32_t d = 0; d < n; d++) {
                                dot[OWN(t)][i] = dot4(x[d], y[d], dot[OWN(t)][i]);
                            }
                        } else {
                            UNROLL
                            for (uint32_t d = 0; d < ATTEND_CHUNK; d++) {
                                if (d < n) {
                                    lane[OWN(t)][i][d % 16] +=
                                        math_from_bits_f32(x[d]) * math_from_bits_f32(y[d]);
                                }
                            }
                        }
                    }
                }
            }
        }
        THREADS(t) {
            const uint32_t j = t % ATTEND_POSITIONS, set = t / ATTEND_POSITIONS;
            UNROLL
            for (uint32_t i = 0; i < ATTEND_TURNS; i++) {
                const uint32_t q = set + i * ATTEND_SETS;
                if (q < n_queries && j < state[q].n) {
                    score[q * ATTEND_POSITIONS + j] =
                        Q8 ? ((float)dot[OWN(t)][i] * p.cache.k_scale[rows + begin + j]) *
                                 p.q8_scale[QUERY_PLACE(q)]
                           : lanes_sum(lane[OWN(t)][i]) * p.scale;
                }
            }
        }
        /* From here on, thread t has lane t % 16 of query t / 16. */
        THREADS(t) {
            const uint32_t q = t / 16;
            if (q < n_queries) {
                float max = MINUS_INFINITY;
                for (uint32_t j = t % 16; j < state[q].n; j += 16) {
                    const float s = score[q * ATTEND_POSITIONS + j];
                    max = s > max ? s : max;
                }
                part[t] = max;
            }
        }
        THREADS(t) {
            const uint32_t q = t / 16;
            if (q < n_queries) {
                float max = MINUS_INFINITY, sum = 0.0f;
                for (uint32_t l = 0; l < 16; l++) {
                    max = part[q * 16 + l] > max ? part[q * 16 + l] : max;
                }
                uint32_t bits = 0;
                for (uint32_t j = t % 16; j < state[q].n; j += 16) {
                    float e = math_exp_f32(score[q * ATTEND_POSITIONS + j] - max);
                    sum += e;
                    if (Q8) {
                        e *= p.cache.v_scale[rows + begin + j];
                        const uint32_t u = math_bits_f32(e) & 0x7fffffffu;
                        bits = u > bits ? u : bits;
                    }
                    score[q * ATTEND_POSITIONS + j] = e;
                }
                lane[OWN(t)][0][0] = max;
                lane[OWN(t)][0][1] = sum;
                part_bits[t] = bits;
            }
        }
        THREADS(t) {
            if (t / 16 < n_queries) {
                part[t] = lane[OWN(t)][0][1];
            }
        }
        THREADS(t) {
            const uint32_t q = t / 16;
            if (q < n_queries) {
                uint32_t bits = 0;
                for (uint32_t l = 0; Q8 && l < 16; l++) {
                    bits = part_bits[q * 16 + l] > bits ? part_bits[q * 16 + l] : bits;
                }
                const float most = math_from_bits_f32(bits);
                const bool special = !(most >= KERNELS_TINY && most <= FLT_MAX);
                if (Q8 && !special) {
                    const float inverse = divide((float)KERNELS_WEIGHT_MAX, most);
                    for (uint32_t j = t % 16; j < state[q].n; j += 16) {
                        float *w = score + q * ATTEND_POSITIONS + j;
                        *w = math_round_f32(*w * inverse);
                    }
                }
                if (t % 16 == 0 && state[q].n > 0) {
                    attend_state *s = &state[q];
                    s->special = special;
                    s->unit = !special              ? divide(most, (float)KERNELS_WEIGHT_MAX)
                              : most < KERNELS_TINY ? 0.0f
                                                    : math_from_bits_f32(MATH_NAN_BITS);
                    join_block(s, SPLIT || b == 0, lane[OWN(t)][0][0], lanes_sum(part + q * 16));
                }
            }
        }
        THREADS(t) {
            float sum[ITEMS];
            int exact[ITEMS];
            uint32_t n_most = 0;
            UNROLL
            for (uint32_t i = 0; i < ITEMS; i++) {
                const uint32_t item = t + i * ATTEND_THREADS;
                sum[i] = 0.0f, exact[i] = 0;
                if (item < n_queries * dim) {
                    n_most = state[item / dim].n > n_most ? state[item / dim].n : n_most;
                }
            }
            for (uint32_t first = 0; first < n_most; first += AHEAD) {
                float values[AHEAD];
                UNROLL
                for (uint32_t k = 0; k < AHEAD; k++) {
                    const uint32_t j = first + k;
                    values[k] =
                        same_item && j < n_most
                            ? cache_value<TYPE>(p.cache.v, rows + begin + j, row_bytes, t % dim)
                            : 0.0f;
                }
                UNROLL
                for (uint32_t k = 0; k < AHEAD; k++) {
                    const uint32_t j = first + k;
                    UNROLL
                    for (uint32_t i = 0; i < ITEMS; i++) {
                        const uint32_t item = t + i * ATTEND_THREADS, q = item / dim;
                        if (item < n_queries * dim && j < state[q].n) {
                            const float w = score[q * ATTEND_POSITIONS + j];
                            const float value = same_item
                                                    ? values[k]
                                                    : cache_value<TYPE>(p.cache.v, rows + begin + j,
                                                                        row_bytes, item % dim);
                            if (Q8) {
                                exact[i] += state[q].special ? 0 : (int)w * (int)value;
                            } else {
                                sum[i] += w * value;
                            }
                        }
                    }
                }
            }
            UNROLL
            for (uint32_t i = 0; i < ITEMS; i++) {
                const uint32_t item = t + i * ATTEND_THREADS, q = item / dim, d = item % dim;
                if (item < n_queries * dim && state[q].n > 0) {
                    const attend_state *s = &state[q];
                    const float o = !Q8 ? sum[i] : s->special ? s->unit : (float)exact[i] * s->unit;
                    if (SPLIT) {
                        float *to = p.partial + (QUERY_PLACE(q) * p.n_blocks + b) * (dim + 2);
                        to[d] = o;
                        if (d == 0) {
                            to[dim] = s->max;
                            to[dim + 1] = s->sum;
                        }
                    } else {
                        result[item] = b == 0 ? o : result[item] * s->keep + o * s->join;
                    }
                }
            }
        }
    }
    if (!SPLIT) {
        THREADS_ALONE(t) {
            for (uint32_t item = t; item < n_queries * dim; item += BLOCK_THREADS) {
                const uint32_t q = item / dim;
                p.out[QUERY_PLACE(q) * dim + item % dim] =
                    result[item] * divide(1.0f, state[q].sum);
            }
        }
    }
#undef QUERY_TOKEN
#undef QUERY_PLACE
}

typedef struct join_parameters {
    const gpu_token *tokens;
    uint32_t first, n_head, head_dim, n_blocks;
    const float *partial;
    float *out;
} join_parameters;

/* BLOCK_X: a token from `first` on; BLOCK_Y: a head. */
GPU_KERNEL_OF(HEAD_THREADS, 1) attention_join(join_parameters p) {
    enum { JOIN_AHEAD = 8 }; /* blocks that a thread loads before it joins any */
    NEXT_MAY_BEGIN();
    AWAIT_KERNEL_BEFORE();
    const uint32_t token = p.first + BLOCK_X, dim = p.head_dim;
    const uint32_t n = p.tokens[token].position / ATTEND_POSITIONS + 1;
    const size_t place = (size_t)token * p.n_head + BLOCK_Y;
    const float *block = p.partial + place * p.n_blocks * (dim + 2);
    THREADS_ALONE(t) {
        for (uint32_t d = t; d < dim; d += BLOCK_THREADS) {
            attend_state s = {};
            float out = 0.0f;
            for (uint32_t first = 0; first < n; first += JOIN_AHEAD) {
                float max[JOIN_AHEAD], sum[JOIN_AHEAD], value[JOIN_AHEAD];
                UNROLL
                for (uint32_t k = 0; k < JOIN_AHEAD; k++) {
                    const uint32_t b = first + k < n ? first + k : first;
                    const float *x = block + (size_t)b * (dim + 2);
                    max[k] = x[dim], sum[k] = x[dim + 1], value[k] = x[d];
                }
                UNROLL
                for (uint32_t k = 0; k < JOIN_AHEAD; k++) {
                    if (first + k < n) {
                        join_block(&s, first + k == 0, max[k], sum[k]);
                        out = first + k == 0 ? value[k] : out * s.keep + value[k] * s.join;
                    }
                }
            }
            p.out[place * dim + d] = out * divide(1.0f, s.sum);
        }
    }
}

/* ---- Launching --------------------------------------------------------- */

/* Queries that a block of threads takes. */
static uint32_t attend_queries(uint32_t head_dim) {
    const uint32_t n = ATTEND_ITEMS / head_dim;
    return n < ATTEND_QUERIES ? n : ATTEND_QUERIES;
}

/* Tokens of a tile of one sequence, at most. */
static uint32_t attend_tile_tokens(uint32_t group, uint32_t head_dim) {
    const uint32_t n = attend_queries(head_dim) / group;
    return n > 0 ? n : 1;
}

/* s: split; tokens from `first` to `n`; p.part_heads and p.n_parts are filled here. */
static hepta_status launch_attention(dev_stream stream, attend_parameters p, uint32_t n_tiles,
                                     bool split, uint32_t first, uint32_t n, hepta_error *err) {
    const uint32_t group = p.n_head / p.cache.n_head_kv;
    const uint32_t most = attend_queries(p.cache.head_dim);
    p.part_heads = group < most ? group : most;
    p.n_parts = (group + p.part_heads - 1) / p.part_heads;
    const grid blocks = {split ? p.n_blocks : 1, p.cache.n_head_kv * p.n_parts, n_tiles};
    static void (*const kernel[2][3])(attend_parameters) = {
        {attend<HEPTA_CACHE_F32, false>, attend<HEPTA_CACHE_F16, false>,
         attend<HEPTA_CACHE_Q8, false>},
        {attend<HEPTA_CACHE_F32, true>, attend<HEPTA_CACHE_F16, true>,
         attend<HEPTA_CACHE_Q8, true>}};
    hepta_status status =
        launch(stream, blocks, ATTEND_THREADS, 0, kernel[split][p.cache.type], p, err);
    if (status == HEPTA_OK && split) {
        const join_parameters j = {p.tokens,   first,     p.n_head, p.cache.head_dim,
                                   p.n_blocks, p.partial, p.out};
        status =
            launch(stream, grid{n - first, p.n_head, 1}, HEAD_THREADS, 0, attention_join, j, err);
    }
    return status;
}

#endif
