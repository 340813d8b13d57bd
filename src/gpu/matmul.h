/*
 * matmul.h - packed linear layers: y = ((float)(sum_c w_rc q_c) * row_scale_r) * x_scale.
 *
 * The sums are integers below 2^31, so that threads, warps and tensor cores may add in any order.
 * All products are tiles of the tensor cores, 16 rows x 32 columns times 32 columns x 8 tokens.
 * Lane 4g + i of a warp decodes a cell (decode.h): its four words of a weight are four of the rows
 * of a tile's left side, two for each of two tiles. Weights never see shared memory.
 *
 *   matvec      some tokens: memory is the limit, or decoding. A block is a strip of 16 rows or
 * two, whose columns its warps share. matmul      many tokens: a warp has 32 rows and 128 tokens,
 * whose activations the warps of a block share; codes and activations are copied to shared memory
 * ahead of their use.
 *
 * On the device rows are filled up to whole groups of 64 columns (upload_matrix in device_model.h);
 * what stands there meets activations that are zero.
 */
#ifndef GPU_MATMUL_H
#define GPU_MATMUL_H

#include "gpu/decode.h"

/* The activations of some tokens. */
typedef struct dev_input {
    const int8_t *q; /* (n_tokens, q_stride), columns as q_place() has them */
    const float *scale;
    const int *sum;
    uint32_t q_stride, n_tokens;
} dev_input;

constexpr uint32_t PRODUCTS = 3;

/* Up to three matrices that multiply the same input: y (n_tokens, n_rows) of each. */
typedef struct product_parameters {
    dev_matrix w[PRODUCTS];
    float *y[PRODUCTS];
    dev_input x;
    const code_lookups *codes; /* of the rates from CODE_MIN_RATE on */
} product_parameters;

GPU_FN float row_scale(const dev_matrix *w, uint32_t row) {
    const uint8_t *s = w->scales + (size_t)2 * row;
    return math_from_bits_f32((uint32_t)s[0] << 16 | (uint32_t)s[1] << 24);
}

/* Writes the result of a sum of v or int8 times q; a NaN gets the bits that logits want. */
GPU_FN void store_sum(const product_parameters *p, uint32_t which, uint32_t row, uint32_t token,
                      int sum) {
    const dev_matrix *w = &p->w[which];
    if (row < w->n_rows && token < p->x.n_tokens) {
        sum -= w->half_bits == 16 ? 0 : CODE_CENTRE * p->x.sum[token];
        const float y = ((float)sum * row_scale(w, row)) * p->x.scale[token];
        p->y[which][(size_t)token * w->n_rows + row] =
            y == y ? y : math_from_bits_f32(MATH_NAN_BITS);
    }
}

/* Which matrix block i of those with `rows` rows belongs to; i becomes its number in there. */
GPU_AND_HOST_FN uint32_t product_of(const product_parameters *p, uint32_t rows, uint32_t *i) {
    uint32_t which = 0;
    while (*i >= (p->w[which].n_rows + rows - 1) / rows) {
        *i -= (p->w[which++].n_rows + rows - 1) / rows;
    }
    return which;
}

template <int H> GPU_FN code_words tables_of(const product_parameters *p) {
    return p->codes[H < 16 ? H - CODE_MIN_RATE : 0].words;
}

/* Two weights' parts of a cell's four rows as left sides of tiles: a[m] has rows m and m + 2. */
GPU_FN void tile_rows(uint32_t (*a)[4], const uint32_t (*one)[4], const uint32_t (*two)[4],
                      int part) {
    UNROLL
    for (int m = 0; m < 2; m++) {
        a[m][0] = one[m][part], a[m][1] = one[m + 2][part];
        a[m][2] = two[m][part], a[m][3] = two[m + 2][part];
    }
}

/* The same of weights k and k + 1, with the parts added up. */
template <int H>
GPU_FN void whole_rows(const code_words *t, const uint32_t *words, int k, uint32_t (*a)[4]) {
    uint32_t parts[2][4][4];
    UNROLL
    for (int i = 0; i < 2; i++) {
        decode_weight<H>(t, words, k + i, parts[i]);
        UNROLL
        for (int r = 0; r < 4; r++) {
            parts[i][r][0] += parts[i][r][1] + parts[i][r][2] + parts[i][r][3];
        }
    }
    tile_rows(a, parts[0], parts[1], 0);
}

/* ---- Some tokens ------------------------------------------------------- */

constexpr uint32_t MATVEC_THREADS = 256;

/*
 * N tiles of 8 tokens and 32 rows. Or HALVES: up to 4 tokens and 16 rows, with half of the lanes at
 * other columns than the others: of the tiles' 8 tokens the first four are those of the one half,
 * the others of the other, and results of rows of one half and tokens of the other are not used.
 */
template <int N, bool HALVES> struct matvec_shape {
    enum {
        rows = HALVES ? 16 : 32,
        tokens = HALVES ? 4 : 8 * N,
        groups = HALVES ? 8 : 4 /* that a warp takes at a time */
    };
};

/* The products of a block's rows from `strip` on; c[m][n]: (2, N) of the warp. */
template <int H, int N, bool HALVES, class C>
GPU_FN void matvec_rows(const product_parameters *p, const dev_matrix *w, uint32_t strip,
                        uint32_t token, C *c) {
    typedef matvec_shape<N, HALVES> shape;
    enum {
        /* Adding the parts of a value takes longer than multiplying them, but fewer registers. */
        PARTS = N == 1 && H >= 6 && H < 16 ? 4 : 1,
        ROUNDS = H < 16 ? 4 : 1,
        WORDS = GPU_HALO + 4 * H
    };
    PRIVATE(MATVEC_THREADS, code_cell, cell, [1]);
    PRIVATE(MATVEC_THREADS, uint32_t, words, [WORDS]);
    PRIVATE(MATVEC_THREADS, uint32_t, a, [PARTS * 2][4]);
    PRIVATE(MATVEC_THREADS, uint32_t, b, [2 * N][2]);
    const code_words tables = tables_of<H>(p);
    const uint32_t n_groups = w->n_groups, last_strip = (w->n_rows - 1) / 16;
    WARPS(warp) {
        for (uint32_t first = warp * shape::groups; first < n_groups;
             first += BLOCK_THREADS / 32 * shape::groups) {
#define LANE_GROUP(t) (first + t % 4 + (HALVES ? t / 16 % 2 * 4 : 0))
#define LANE_STRIP(t) (HALVES || strip == last_strip ? strip : strip + t / 16 % 2)
            THREADS_ALONE(t) {
                const uint32_t g = LANE_GROUP(t), i = t / 4 % 4, s = LANE_STRIP(t);
                const uint32_t group = g < n_groups ? g : 0;
                cell[OWN(t)][0] = cell_at(w, s, group, i);
                if (H < 16) {
                    load_cell<H>(cell[OWN(t)][0], cell_at(w, s, group > 0 ? group - 1 : 0, i),
                                 group == 0, words[OWN(t)]);
                }
            }
            UNROLL_BY(ROUNDS)
            for (int k = 0; k < 16; k += 4) {
                THREADS_ALONE(t) {
                    const uint32_t g = LANE_GROUP(t), lane = t % 32 / 4;
                    UNROLL
                    for (int n = 0; n < N; n++) {
                        const uint32_t wanted =
                            token + (HALVES ? lane % 4 : 8 * (uint32_t)n + lane);
                        const uint32_t row = wanted < p->x.n_tokens ? wanted : p->x.n_tokens - 1;
                        words4 q = {};
                        if (g < n_groups) {
                            q = load_result4(p->x.q + (size_t)row * p->x.q_stride + g * GPU_GROUP +
                                             4 * k);
                        }
                        b[OWN(t)][n][0] = q.v[0], b[OWN(t)][n][1] = q.v[1];
                        b[OWN(t)][N + n][0] = q.v[2], b[OWN(t)][N + n][1] = q.v[3];
                    }
                }
                UNROLL
                for (int pair = 0; pair < 2; pair++) {
                    THREADS_ALONE(t) {
                        const int weight = k + 2 * pair;
                        if (H == 16) {
                            uint32_t rows[2][4][4];
                            for (int j = 0; j < 2; j++) {
                                const words4 four = load_words4(cell[OWN(t)][0].chunk);
                                cell[OWN(t)][0].chunk += cell[OWN(t)][0].step;
                                for (int r = 0; r < 4; r++) {
                                    rows[j][r][0] = four.v[r];
                                }
                            }
                            tile_rows(a[OWN(t)], rows[0], rows[1], 0);
                        } else if (PARTS == 1) {
                            whole_rows<H>(&tables, words[OWN(t)], weight, a[OWN(t)]);
                        } else {
                            uint32_t parts[2][4][4];
                            for (int j = 0; j < 2; j++) {
                                decode_weight<H>(&tables, words[OWN(t)], weight + j, parts[j]);
                            }
                            UNROLL
                            for (int part = 0; part < PARTS; part++) {
                                tile_rows(a[OWN(t)] + 2 * part, parts[0], parts[1], part);
                            }
                        }
                    }
                    UNROLL
                    for (int part = 0; part < 2 * PARTS; part++) {
                        UNROLL
                        for (int n = 0; n < N; n++) {
                            WARP_MMA(c, part % 2, n, a, part, b, pair * N + n);
                        }
                    }
                }
            }
        }
    }
}

/* BLOCK_X: shape::rows rows of one of the matrices; BLOCK_Y: shape::tokens tokens. */
template <int N, bool HALVES>
GPU_KERNEL_OF(MATVEC_THREADS, (N == 1 ? 3 : 2))
matvec(product_parameters p) {
    typedef matvec_shape<N, HALVES> shape;
    enum { TOTALS = shape::rows * shape::tokens };
    PRIVATE(MATVEC_THREADS, int, c, [2][N][4]);
    SHARED(int, total, TOTALS);
    NEXT_MAY_BEGIN();
    uint32_t block = BLOCK_X;
    const uint32_t which = product_of(&p, shape::rows, &block), token = BLOCK_Y * shape::tokens;
    const uint32_t strip = block * (shape::rows / 16);
    const dev_matrix w = p.w[which];
    THREADS_ALONE(t) {
        const uint32_t bytes = w.n_groups * (4 * GPU_CHUNK * w.half_bits),
                       last = (w.n_rows - 1) / 16;
        const uint8_t *codes = w.codes + (uint64_t)strip * bytes;
        const uint32_t n = HALVES || strip == last ? bytes : 2 * bytes;
        for (uint32_t i = t * CACHE_LINE; i < n; i += BLOCK_THREADS * CACHE_LINE) {
            fetch_to_cache(codes + i);
        }
    }
    AWAIT_KERNEL_BEFORE();
    THREADS(t) {
        for (unsigned i = t; i < TOTALS; i += BLOCK_THREADS) {
            total[i] = 0;
        }
        UNROLL
        for (int i = 0; i < 2 * N * 4; i++) {
            c[OWN(t)][i / (N * 4)][i / 4 % N][i % 4] = 0;
        }
    }
    switch (w.half_bits) {
    case 4:
        matvec_rows<4, N, HALVES>(&p, &w, strip, token, c);
        break;
    case 5:
        matvec_rows<5, N, HALVES>(&p, &w, strip, token, c);
        break;
    case 6:
        matvec_rows<6, N, HALVES>(&p, &w, strip, token, c);
        break;
    case 7:
        matvec_rows<7, N, HALVES>(&p, &w, strip, token, c);
        break;
    case 8:
        matvec_rows<8, N, HALVES>(&p, &w, strip, token, c);
        break;
    default:
        matvec_rows<16, N, HALVES>(&p, &w, strip, token, c);
    }
    THREADS(t) {
        const unsigned g = t % 32 / 4, i = t % 4;
        if (!HALVES || i / 2 == g / 4) {
            UNROLL
            for (unsigned k = 0; k < 2 * N * 4; k++) {
                const unsigned m = k / (N * 4), n = k / 4 % N, r = k % 4;
                const unsigned row = (HALVES ? 0 : g / 4 * 16) + g % 4 * 4 + r / 2 * 2 + m;
                const unsigned of = 8 * n + (HALVES ? i % 2 * 2 : 2 * i) + r % 2;
                if (token + of < p.x.n_tokens) {
                    shared_add(&total[of * shape::rows + row], c[OWN(t)][m][n][r]);
                }
            }
        }
    }
    THREADS_ALONE(t) {
        for (unsigned i = t; i < TOTALS; i += BLOCK_THREADS) {
            store_sum(&p, which, strip * 16 + i % shape::rows, token + i / shape::rows, total[i]);
        }
    }
}

/* ---- Many tokens ------------------------------------------------------- */

constexpr uint32_t MATMUL_THREADS = 128, MATMUL_WARPS = MATMUL_THREADS / 32;
constexpr uint32_t MATMUL_ROWS = 32 * MATMUL_WARPS, MATMUL_N = 16, MATMUL_TOKENS = 8 * MATMUL_N;
constexpr uint32_t MATMUL_STAGES = 4;
/* A stage: a quarter of a tile's columns, those of 4 weights of each block, of all tokens. */
constexpr uint32_t MATMUL_STAGE_BYTES = MATMUL_TOKENS * 4 * GPU_TILE * 4;

/* Bytes of the cells of a block's tile, of which there are two. */
GPU_AND_HOST_FN uint32_t matmul_tile_bytes(uint32_t half_bits) {
    return half_bits * MATMUL_THREADS * GPU_CHUNK;
}
GPU_AND_HOST_FN uint32_t matmul_shared_bytes(uint32_t half_bits) {
    return MATMUL_STAGES * MATMUL_STAGE_BYTES + 2 * matmul_tile_bytes(half_bits);
}

/* Words of the lane's cell that weights 4Q .. 4Q + 3 need; tile: the block's chunks, before: those
 * of the tile before, NULL if there is none. */
template <int H, int Q>
GPU_FN void load_quarter(const uint8_t *tile, const uint8_t *before, unsigned t, uint32_t *words) {
    enum {
        begin = H == 16 ? 64 * Q : 2 * Q * H + (H + 1) / 2 - 16, /* bits */
        end = H == 16 ? 64 * Q + 64 : (2 * Q + 2) * H,
        size = H == 16 ? 16 : 8, /* bits of a block in a chunk */
        first = begin < 0 ? 0 : begin / size,
        last = (end - 1) / size
    };
    UNROLL
    for (unsigned j = first; j <= last; j++) {
        memcpy(words + GPU_HALO + 4 * j, tile + (j * MATMUL_THREADS + t) * GPU_CHUNK, GPU_CHUNK);
    }
    if (Q == 0 && H < 16) {
        UNROLL
        for (unsigned j = 0; j < 2; j++) {
            const uint8_t *chunk = tile + (H - 2 + j) * MATMUL_THREADS * GPU_CHUNK;
            const words4 here = *(const words4 *)(chunk + t * GPU_CHUNK);
            words4 one = {};
            if (t % 4 != 0) {
                one = *(const words4 *)(chunk + (t - 1) * GPU_CHUNK);
            } else if (before != NULL) {
                one = *(const words4 *)(before + (chunk - tile) + (t + 3) * GPU_CHUNK);
            }
            for (unsigned r = 0; r < 4; r++) {
                words[4 * j + r] = blocks_before<H>(here.v[r], one.v[r]);
            }
        }
    }
}

/* The left sides of weights 4Q .. 4Q + 3: a[2 i + m] has 4Q + 2i, 4Q + 2i + 1 of rows m, m + 2. */
template <int H, int Q>
GPU_FN void decode_quarter(const code_words *t, const uint32_t *words, uint32_t (*a)[4]) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        if (H == 16) {
            UNROLL
            for (int r = 0; r < 4; r++) {
                const uint32_t *w = words + GPU_HALO + 4 * (4 * Q + 2 * i);
                a[2 * i + r % 2][r / 2] = w[r];
                a[2 * i + r % 2][r / 2 + 2] = w[r + 4];
            }
        } else {
            whole_rows<H>(t, words, 4 * Q + 2 * i, a + 2 * i);
        }
    }
}

/* BLOCK_X: 128 rows of one of the matrices, BLOCK_Y: 128 tokens. */
template <int H> GPU_KERNEL_OF(MATMUL_THREADS, 2) matmul(product_parameters p) {
    DYNAMIC(uint8_t, shared);
    PRIVATE(MATMUL_THREADS, int, c, [2][MATMUL_N][4]);
    PRIVATE(MATMUL_THREADS, uint32_t, words, [GPU_HALO + 4 * H]);
    PRIVATE(MATMUL_THREADS, uint32_t, a, [4][4]);
    PRIVATE(MATMUL_THREADS, uint32_t, b, [2][2]);
    NEXT_MAY_BEGIN();
    AWAIT_KERNEL_BEFORE();
    uint32_t block = BLOCK_X;
    const uint32_t which = product_of(&p, MATMUL_ROWS, &block);
    const dev_matrix w = p.w[which];
    const uint32_t token = BLOCK_Y * MATMUL_TOKENS, first_strip = block * (MATMUL_ROWS / 16);
    const uint32_t n_groups = w.n_groups, n_tiles = (n_groups + GPU_TILE - 1) / GPU_TILE;
    const uint32_t last_strip = (w.n_rows - 1) / 16;
    uint8_t *cells = shared + MATMUL_STAGES * MATMUL_STAGE_BYTES;
    const code_words tables = tables_of<H>(&p);
#define TILE_CELLS(tile) (cells + ((tile)&1) * matmul_tile_bytes(H))
/* What thread t copies of a tile's cells: its own. */
#define COPY_CELLS(tile)                                                                           \
    do {                                                                                           \
        const uint32_t g = (tile)*GPU_TILE + t % 4, s = first_strip + t / 16;                      \
        const code_cell cell = cell_at(&w, s < last_strip ? s : last_strip,                        \
                                       g < n_groups ? g : n_groups - 1, t / 4 % 4);                \
        UNROLL                                                                                     \
        for (unsigned j = 0; j < H; j++) {                                                         \
            copy_ahead(TILE_CELLS(tile) + (j * MATMUL_THREADS + t) * GPU_CHUNK,                    \
                       cell.chunk + (size_t)cell.step * j, true);                                  \
        }                                                                                          \
    } while (0)
/* And of a stage of activations: those of a group, of every 32nd token. */
#define COPY_STAGE(step)                                                                           \
    do {                                                                                           \
        const bool inside = (step) / 4 * GPU_TILE + t % 4 < n_groups;                              \
        const int8_t *from = p.x.q + (size_t)(token + t / 4) * p.x.q_stride + t % 4 * GPU_GROUP +  \
                             (step) / 4 * (GPU_TILE * GPU_GROUP) + (step) % 4 * 16;                \
        uint8_t *to = shared + (step) % MATMUL_STAGES * MATMUL_STAGE_BYTES + t * 16;               \
        UNROLL                                                                                     \
        for (unsigned j = 0; j < MATMUL_TOKENS; j += MATMUL_THREADS / 4) {                         \
            copy_ahead(to + j * 64, from + (size_t)j * p.x.q_stride,                               \
                       inside && token + t / 4 + j < p.x.n_tokens);                                \
        }                                                                                          \
    } while (0)
    THREADS_ALONE(t) {
        UNROLL
        for (unsigned i = 0; i < 2 * MATMUL_N * 4; i++) {
            c[OWN(t)][i / (MATMUL_N * 4)][i / 4 % MATMUL_N][i % 4] = 0;
        }
        COPY_CELLS(0);
        for (uint32_t step = 0; step < MATMUL_STAGES - 1; step++) {
            COPY_STAGE(step);
            COPIES_END();
        }
    }
    for (uint32_t tile = 0; tile < n_tiles; tile++) {
        UNROLL
        for (int quarter = 0; quarter < 4; quarter++) {
            const uint32_t step = tile * 4 + (uint32_t)quarter;
            THREADS(t) {
                (void)t;
                COPIES_AWAIT(MATMUL_STAGES - 2);
            }
            THREADS_ALONE(t) {
                const uint8_t *before = tile > 0 ? TILE_CELLS(tile - 1) : NULL;
                switch (quarter) {
                case 0:
                    load_quarter<H, 0>(TILE_CELLS(tile), before, t, words[OWN(t)]);
                    decode_quarter<H, 0>(&tables, words[OWN(t)], a[OWN(t)]);
                    break;
                case 1:
                    load_quarter<H, 1>(TILE_CELLS(tile), before, t, words[OWN(t)]);
                    decode_quarter<H, 1>(&tables, words[OWN(t)], a[OWN(t)]);
                    break;
                case 2:
                    load_quarter<H, 2>(TILE_CELLS(tile), before, t, words[OWN(t)]);
                    decode_quarter<H, 2>(&tables, words[OWN(t)], a[OWN(t)]);
                    break;
                default:
                    load_quarter<H, 3>(TILE_CELLS(tile), before, t, words[OWN(t)]);
                    decode_quarter<H, 3>(&tables, words[OWN(t)], a[OWN(t)]);
                }
            }
            /* The stage and, of the second quarter on, the cells that all threads are done with. */
            THREADS_ALONE(t) {
                COPY_STAGE(step + MATMUL_STAGES - 1);
                if (quarter == 1 && tile + 1 < n_tiles) {
                    COPY_CELLS(tile + 1);
                }
                COPIES_END();
            }
            UNROLL
            for (int n = 0; n < (int)MATMUL_N; n++) {
                THREADS_ALONE(t) {
                    const words4 q =
                        *(const words4 *)(shared + step % MATMUL_STAGES * MATMUL_STAGE_BYTES +
                                          (unsigned)n * 512 + t % 32 * 16);
                    b[OWN(t)][0][0] = q.v[0], b[OWN(t)][0][1] = q.v[1];
                    b[OWN(t)][1][0] = q.v[2], b[OWN(t)][1][1] = q.v[3];
                }
                UNROLL
                for (int i = 0; i < 4; i++) {
                    WARP_MMA(c, i % 2, n, a, i, b, i / 2);
                }
            }
        }
    }
    THREADS_ALONE(t) {
        const unsigned g = t % 32 / 4, i = t % 4;
        UNROLL
        for (unsigned k = 0; k < 2 * MATMUL_N * 4; k++) {
            const unsigned m = k / (MATMUL_N * 4), n = k / 4 % MATMUL_N, r = k % 4;
            store_sum(&p, which, (first_strip + t / 16) * 16 + g % 4 * 4 + r / 2 * 2 + m,
                      token + 8 * n + 2 * i + r % 2, c[OWN(t)][m][n][r]);
        }
    }
#undef TILE_CELLS
#undef COPY_CELLS
#undef COPY_STAGE
}

/* ---- Choosing ---------------------------------------------------------- */

static uint32_t product_blocks(const product_parameters &p, uint32_t rows) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < PRODUCTS; i++) {
        n += (p.w[i].n_rows + rows - 1) / rows;
    }
    return n;
}

template <int N, bool HALVES>
static hepta_status launch_matvec(dev_stream s, const product_parameters &p, hepta_error *err) {
    typedef matvec_shape<N, HALVES> shape;
    const uint32_t warps = (p.w[0].n_groups + shape::groups - 1) / shape::groups;
    const uint32_t threads = 32 * warps < MATVEC_THREADS ? 32 * warps : MATVEC_THREADS;
    const grid blocks = {product_blocks(p, shape::rows),
                         (p.x.n_tokens + shape::tokens - 1) / shape::tokens, 1};
    return launch(s, blocks, threads, 0, matvec<N, HALVES>, p, err);
}

template <int H>
static hepta_status launch_matmul(dev_stream s, const product_parameters &p, hepta_error *err) {
    const grid blocks = {product_blocks(p, MATMUL_ROWS),
                         (p.x.n_tokens + MATMUL_TOKENS - 1) / MATMUL_TOKENS, 1};
    return launch(s, blocks, MATMUL_THREADS, matmul_shared_bytes(H), matmul<H>, p, err);
}

/* matmul, if there is work for half of the processors and room in their shared memory; else *done
 * stays false. */
template <bool TENSOR_CORES>
static hepta_status try_matmul(dev_stream s, const gpu_device_info &device,
                               const product_parameters &p, bool *done, hepta_error *err) {
    const uint64_t tokens = (p.x.n_tokens + MATMUL_TOKENS - 1) / MATMUL_TOKENS;
    *done = TENSOR_CORES && p.x.n_tokens > MATMUL_TOKENS / 2 &&
            2 * tokens * product_blocks(p, MATMUL_ROWS) >= (uint64_t)device.processors &&
            matmul_shared_bytes(p.w[0].half_bits) <= device.shared_bytes;
    if constexpr (TENSOR_CORES) {
        if (*done) {
            switch (p.w[0].half_bits) {
            case 4:
                return launch_matmul<4>(s, p, err);
            case 5:
                return launch_matmul<5>(s, p, err);
            case 6:
                return launch_matmul<6>(s, p, err);
            case 7:
                return launch_matmul<7>(s, p, err);
            case 8:
                return launch_matmul<8>(s, p, err);
            default:
                return launch_matmul<16>(s, p, err);
            }
        }
    }
    return HEPTA_OK;
}

/* y[i] = w[i] x for n <= PRODUCTS matrices of equal width. */
static hepta_status multiply(dev_stream s, const gpu_device_info &device, const dev_matrix *w,
                             float *const *y, int n, const dev_input &x, const code_lookups *codes,
                             hepta_error *err) {
    product_parameters p = {};
    bool same = true, done = false;
    p.x = x, p.codes = codes;
    for (int i = 0; i < n; i++) {
        p.w[i] = w[i], p.y[i] = y[i];
        same = same && w[i].half_bits == w[0].half_bits;
    }
    if (same) {
        const hepta_status status = try_matmul<GPU_HAS_MMA>(s, device, p, &done, err);
        if (status != HEPTA_OK || done) {
            return status;
        }
    } else if (x.n_tokens > MATMUL_TOKENS / 2) {
        hepta_status status = HEPTA_OK;
        for (int i = 0; i < n && status == HEPTA_OK; i++) {
            status = multiply(s, device, w + i, y + i, 1, x, codes, err);
        }
        return status;
    }
    return x.n_tokens <= 4    ? launch_matvec<1, true>(s, p, err)
           : x.n_tokens <= 8  ? launch_matvec<1, false>(s, p, err)
           : x.n_tokens <= 16 ? launch_matvec<2, false>(s, p, err)
                              : launch_matvec<4, false>(s, p, err);
}

#endif
