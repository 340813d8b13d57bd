/*
 * matmul.h - packed linear layers: y = ((float)(sum_c w_rc q_c) * row_scale_r) * x_scale.
 *
 * The sums are integers below 2^31, so that threads, warps and tensor cores may add in any order.
 *
 *   matvec<T>   T <= 16 tokens: memory is the limit, so each code is read once, 16 bytes a thread
 *               (four rows of a plane), decoded in registers, multiplied by dot products of four
 *               bytes with all tokens. A block is a strip of 16 rows, threads share its columns.
 *   matmul      more tokens: tiles of 64 rows are decoded to shared memory while the tile before
 *               is multiplied by the tensor cores, up to 256 tokens for each decoding.
 *
 * On the device rows are filled up to whole groups of 64 columns (upload_matrix in backend.cc);
 * what stands there meets activations that are zero.
 */
#ifndef GPU_MATMUL_H
#define GPU_MATMUL_H

#include "gpu/decode.h"

/* A matrix in the device's memory. */
typedef struct dev_matrix {
    const uint8_t *codes;  /* strips of 16 rows, whole groups of 64 columns */
    const uint8_t *scales; /* bfloat16 (n_rows rounded up to 16) */
    uint32_t half_bits, n_rows, n_groups;
} dev_matrix;

/* The activations of some tokens. */
typedef struct dev_input {
    const int8_t *q; /* (n_tokens, q_stride), columns as q_place() has them */
    const float *scale;
    const int *sum;
    uint32_t q_stride, n_tokens;
} dev_input;

GPU_FN float row_scale(const dev_matrix *w, uint32_t row) {
    const uint8_t *s = w->scales + (size_t)2 * row;
    return math_from_bits_f32((uint32_t)s[0] << 16 | (uint32_t)s[1] << 24);
}

/* The result of a sum of v or int8 times q; a NaN gets the bits that logits want. */
GPU_FN float scaled_sum(const dev_matrix *w, const dev_input *x, uint32_t row, uint32_t token,
                        int sum) {
    sum -= w->half_bits == 16 ? 0 : CODE_CENTRE * x->sum[token];
    const float y = ((float)sum * row_scale(w, row)) * x->scale[token];
    return y == y ? y : math_from_bits_f32(MATH_NAN_BITS);
}

/* ---- Few tokens -------------------------------------------------------- */

constexpr uint32_t MATVEC_THREADS = 256, MATVEC_PRODUCTS = 3;

/* Up to three matrices that multiply the same input: y (n_tokens, n_rows) of each. */
typedef struct matvec_parameters {
    dev_matrix w[MATVEC_PRODUCTS];
    float *y[MATVEC_PRODUCTS];
    dev_input x;
    const code_lookups *codes; /* of the rates from CODE_MIN_RATE on */
} matvec_parameters;

/* Adds the products of rows 4i .. 4i+3 of a strip's group g to sum, (4, T). */
template <int H, int T>
GPU_FN void matvec_group(const code_words *t, const dev_matrix *w, uint32_t strip, uint32_t g,
                         unsigned i, const dev_input *x, uint32_t token, int *sum) {
    const uint8_t *group = w->codes + ((uint64_t)strip * w->n_groups + g) * (64 * H) + 16 * i;
    uint32_t planes[4][GPU_HALO + H];
    UNROLL
    for (int j = 0; j < H; j++) {
        const words4 four = load_words4(group + 64 * j);
        for (int r = 0; r < 4; r++) {
            planes[r][GPU_HALO + j] = four.v[r];
        }
    }
    if (H != 16) {
        words4 before[GPU_HALO] = {};
        for (int j = 0; j < GPU_HALO && g > 0; j++) {
            before[j] = load_words4(group + 64 * (j - GPU_HALO));
        }
        UNROLL
        for (int r = 0; r < 4; r++) {
            const uint32_t one[GPU_HALO] = {before[0].v[r], before[1].v[r]};
            join_before<H>(planes[r], one);
        }
    }
    UNROLL
    for (int quarter = 0; quarter < 4; quarter++) {
        words4 q[T];
        UNROLL
        for (int k = 0; k < T; k++) {
            const uint32_t row = token + (uint32_t)k < x->n_tokens ? token + (uint32_t)k : token;
            q[k] = load_words4(x->q + (size_t)row * x->q_stride + g * 64 + 16 * quarter);
        }
        UNROLL
        for (int p = 0; p < 2; p++) {
            UNROLL
            for (int r = 0; r < 4; r++) {
                uint32_t words[2];
                decode_pair<H>(t, planes[r], 2 * quarter + p, words);
                UNROLL
                for (int k = 0; k < T; k++) {
                    sum[r * T + k] = dot4(words[0], q[k].v[2 * p], sum[r * T + k]);
                    sum[r * T + k] = dot4(words[1], q[k].v[2 * p + 1], sum[r * T + k]);
                }
            }
        }
    }
}

template <int H, int T>
GPU_FN void matvec_strip(const matvec_parameters *p, const dev_matrix *w, uint32_t strip,
                         uint32_t token, unsigned t, int *sum) {
    code_words words = {};
    if (H != 16) {
        words = p->codes[H != 16 ? H - CODE_MIN_RATE : 0].words;
    }
    for (uint32_t g = t / 4; g < w->n_groups; g += BLOCK_THREADS / 4) {
        matvec_group<H, T>(&words, w, strip, g, t % 4, &p->x, token, sum);
    }
}

/* BLOCK_X: a strip of one of the matrices; BLOCK_Y: T tokens. */
template <int T>
GPU_KERNEL_OF(MATVEC_THREADS, (T == 1   ? 3
                               : T == 2 ? 2
                                        : 1))
matvec(matvec_parameters p) {
    PRIVATE(MATVEC_THREADS, int, sum, [4 * T]);
    SHARED(int, total, 16 * T);
    uint32_t strip = BLOCK_X, which = 0;
    while (strip >= (p.w[which].n_rows + 15) / 16) {
        strip -= (p.w[which++].n_rows + 15) / 16;
    }
    const dev_matrix w = p.w[which];
    const uint32_t token = BLOCK_Y * T;
    THREADS(t) {
        for (unsigned i = t; i < 16 * T; i += BLOCK_THREADS) {
            total[i] = 0;
        }
        UNROLL
        for (int i = 0; i < 4 * T; i++) {
            sum[OWN(t)][i] = 0;
        }
        switch (w.half_bits) {
        case 4:
            matvec_strip<4, T>(&p, &w, strip, token, t, sum[OWN(t)]);
            break;
        case 5:
            matvec_strip<5, T>(&p, &w, strip, token, t, sum[OWN(t)]);
            break;
        case 6:
            matvec_strip<6, T>(&p, &w, strip, token, t, sum[OWN(t)]);
            break;
        case 7:
            matvec_strip<7, T>(&p, &w, strip, token, t, sum[OWN(t)]);
            break;
        case 8:
            matvec_strip<8, T>(&p, &w, strip, token, t, sum[OWN(t)]);
            break;
        default:
            matvec_strip<16, T>(&p, &w, strip, token, t, sum[OWN(t)]);
        }
    }
    UNROLL
    for (int i = 0; i < 4 * T; i++) { /* over the warp's groups */
        WARP_SUM(sum, i, 4);
        WARP_SUM(sum, i, 8);
        WARP_SUM(sum, i, 16);
    }
    THREADS(t) {
        if (t % 32 < 4) {
            UNROLL
            for (unsigned i = 0; i < 4 * T; i++) {
                shared_add(&total[t % 4 * 4 * T + i], sum[OWN(t)][i]);
            }
        }
    }
    THREADS_ALONE(t) {
        for (unsigned i = t; i < 16 * T; i += BLOCK_THREADS) {
            const uint32_t row = strip * 16 + i % 16, k = token + i / 16;
            if (row < w.n_rows && k < p.x.n_tokens) {
                p.y[which][(size_t)k * w.n_rows + row] =
                    scaled_sum(&w, &p.x, row, k, total[i % 16 * T + i / 16]);
            }
        }
    }
}

/* ---- Many tokens ------------------------------------------------------- */

constexpr uint32_t MATMUL_THREADS = 256, MATMUL_ROWS = 64;
constexpr uint32_t MATMUL_STRIDE = 80; /* bytes of a row in shared memory: eight meet in no bank */

typedef struct matmul_parameters {
    dev_matrix w;
    dev_input x;
    float *y; /* (n_tokens, n_rows) */
    const code_lookups *codes;
} matmul_parameters;

/* The planes that quarter Q of a group's columns needs: first .. last, of which those below 0 are
 * of the blocks before. */
template <int H, int Q> struct quarter_planes {
    enum {
        first = H == 16 ? 4 * Q : (2 * Q * H + (H + 1) / 2) / 8 - 2,
        last = H == 16 ? 4 * Q + 3 : ((2 * Q + 2) * H - 1) / 8
    };
};

/* What a thread has of a group before it decodes: planes, and planes of the group before. */
typedef struct raw_codes {
    uint32_t plane[4], before[GPU_HALO];
} raw_codes;

/* row: where the row's word of plane 0 of the group lies */
template <int H, int Q> GPU_FN void load_quarter(const uint8_t *row, bool first, raw_codes *raw) {
    typedef quarter_planes<H, Q> range;
    UNROLL
    for (int j = range::first; j <= range::last; j++) {
        raw->plane[j - range::first] = load_word(row + 64 * (j < 0 ? H + j : j));
    }
    if (range::first < 0) {
        UNROLL
        for (int j = 0; j < GPU_HALO; j++) {
            raw->before[j] = first ? 0 : load_word(row + 64 * (j - GPU_HALO));
        }
    }
}

/* Columns 16 * Q .. of the row as q_place() has them: four words. */
template <int H, int Q> GPU_FN words4 decode_quarter(const code_words *t, const raw_codes *raw) {
    typedef quarter_planes<H, Q> range;
    uint32_t planes[GPU_HALO + H + 1];
    UNROLL
    for (int j = range::first; j <= range::last; j++) {
        uint32_t word = raw->plane[j - range::first];
        if (j < 0) {
            word = funnel_left(raw->before[j & 1], word, 8);
        }
        planes[GPU_HALO + j] = word;
    }
    words4 out;
    decode_pair<H>(t, planes, 2 * Q, out.v);
    decode_pair<H>(t, planes, 2 * Q + 1, out.v + 2);
    return out;
}

template <int H>
GPU_FN void load_codes(const dev_matrix *w, uint32_t row, unsigned quarter, uint32_t g,
                       raw_codes *raw) {
    const uint8_t *at =
        w->codes + ((uint64_t)(row / 16) * w->n_groups + g) * (64 * H) + row % 16 * 4;
    switch (quarter) {
    case 0:
        load_quarter<H, 0>(at, g == 0, raw);
        break;
    case 1:
        load_quarter<H, 1>(at, g == 0, raw);
        break;
    case 2:
        load_quarter<H, 2>(at, g == 0, raw);
        break;
    default:
        load_quarter<H, 3>(at, g == 0, raw);
    }
}

template <int H>
GPU_FN words4 decode_codes(const code_words *t, unsigned quarter, const raw_codes *raw) {
    switch (quarter) {
    case 0:
        return decode_quarter<H, 0>(t, raw);
    case 1:
        return decode_quarter<H, 1>(t, raw);
    case 2:
        return decode_quarter<H, 2>(t, raw);
    default:
        return decode_quarter<H, 3>(t, raw);
    }
}

/* Tiles: 64 rows, 8 warps; WM warps share the rows, each has M tiles of 16 rows and N of 8
 * tokens. */
template <int M, int N, int WM> struct matmul_shape {
    enum {
        warps_n = MATMUL_THREADS / 32 / WM,
        tokens = warps_n * N * 8,
        pieces = tokens * 4 / MATMUL_THREADS, /* of 16 bytes, that a thread copies */
        buffer_bytes = (MATMUL_ROWS + tokens) * MATMUL_STRIDE,
        shared_bytes = 2 * buffer_bytes
    };
};

/* BLOCK_X: 64 rows; BLOCK_Y: shape::tokens tokens. */
template <int H, int M, int N, int WM>
GPU_KERNEL_OF(MATMUL_THREADS, 2)
matmul(matmul_parameters p) {
    typedef matmul_shape<M, N, WM> shape;
    DYNAMIC(uint8_t, shared);
    PRIVATE(MATMUL_THREADS, int, c, [M][N][4]);
    PRIVATE(MATMUL_THREADS, uint32_t, a, [M][4]);
    PRIVATE(MATMUL_THREADS, uint32_t, b, [N][2]);
    PRIVATE(MATMUL_THREADS, raw_codes, raw, [1]);
    PRIVATE(MATMUL_THREADS, words4, q, [shape::pieces]);
    const uint32_t row_first = BLOCK_X * MATMUL_ROWS, token_first = BLOCK_Y * shape::tokens;
    const uint32_t n_groups = p.w.n_groups, row_last = (p.w.n_rows + 15) / 16 * 16 - 1;
    code_words words = {};
    if (H != 16) {
        words = p.codes[H != 16 ? H - CODE_MIN_RATE : 0].words;
    }
    THREADS_ALONE(t) {
        UNROLL
        for (int i = 0; i < M * N * 4; i++) {
            c[OWN(t)][i / (N * 4)][i / 4 % N][i % 4] = 0;
        }
    }
    /* In round g, group g goes to registers, then group g - 1 is multiplied, then group g is
     * decoded to the other half of shared memory. */
    for (uint32_t g = 0; g <= n_groups; g++) {
        uint8_t *next = shared + (g & 1) * shape::buffer_bytes;
        const uint8_t *now = shared + (~g & 1) * shape::buffer_bytes;
        if (g < n_groups) {
            THREADS_ALONE(t) {
                const uint32_t row = row_first + t % MATMUL_ROWS;
                load_codes<H>(&p.w, row < row_last ? row : row_last, t / MATMUL_ROWS, g,
                              raw[OWN(t)]);
                UNROLL
                for (unsigned i = 0; i < shape::pieces; i++) {
                    const unsigned piece = t + i * MATMUL_THREADS;
                    uint32_t token = token_first + piece / 4;
                    token = token < p.x.n_tokens ? token : p.x.n_tokens - 1;
                    q[OWN(t)][i] =
                        load_words4(p.x.q + (size_t)token * p.x.q_stride + g * 64 + piece % 4 * 16);
                }
            }
        }
        for (unsigned step = 0; step < 2 && g > 0; step++) {
            THREADS_ALONE(t) {
                const unsigned warp = t / 32, row = t % 32 / 4, k = step * 32 + t % 4 * 4;
                const uint8_t *x = now + (warp % WM * M * 16 + row) * MATMUL_STRIDE + k;
                const uint8_t *y =
                    now + (MATMUL_ROWS + warp / WM * N * 8 + row) * MATMUL_STRIDE + k;
                UNROLL
                for (unsigned m = 0; m < M; m++) {
                    for (unsigned r = 0; r < 4; r++) {
                        a[OWN(t)][m][r] =
                            shared_word(x + (m * 16 + r % 2 * 8) * MATMUL_STRIDE + r / 2 * 16);
                    }
                }
                UNROLL
                for (unsigned n = 0; n < N; n++) {
                    for (unsigned r = 0; r < 2; r++) {
                        b[OWN(t)][n][r] = shared_word(y + n * 8 * MATMUL_STRIDE + r * 16);
                    }
                }
            }
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int n = 0; n < N; n++) {
                    WARP_MMA(c, a, b, m, n);
                }
            }
        }
        THREADS(t) {
            if (g < n_groups) {
                const unsigned row = t % MATMUL_ROWS, quarter = t / MATMUL_ROWS;
                *(words4 *)(next + row * MATMUL_STRIDE + quarter * 16) =
                    decode_codes<H>(&words, quarter, raw[OWN(t)]);
                UNROLL
                for (unsigned i = 0; i < shape::pieces; i++) {
                    const unsigned piece = t + i * MATMUL_THREADS;
                    *(words4 *)(next + (MATMUL_ROWS + piece / 4) * MATMUL_STRIDE + piece % 4 * 16) =
                        q[OWN(t)][i];
                }
            }
        }
    }
    THREADS_ALONE(t) {
        const unsigned warp = t / 32, g = t % 32 / 4, i = t % 4;
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int n = 0; n < N; n++) {
                UNROLL
                for (unsigned r = 0; r < 4; r++) {
                    const uint32_t row =
                        row_first + (warp % WM * M + (unsigned)m) * 16 + g + r / 2 * 8;
                    const uint32_t token =
                        token_first + (warp / WM * N + (unsigned)n) * 8 + 2 * i + r % 2;
                    if (row < p.w.n_rows && token < p.x.n_tokens) {
                        p.y[(size_t)token * p.w.n_rows + row] =
                            scaled_sum(&p.w, &p.x, row, token, c[OWN(t)][m][n][r]);
                    }
                }
            }
        }
    }
}

/* ---- Choosing ---------------------------------------------------------- */

template <int H, int M, int N, int WM>
static hepta_status launch_tiles(dev_stream s, const matmul_parameters &p, hepta_error *err) {
    typedef matmul_shape<M, N, WM> shape;
    const grid blocks = {(p.w.n_rows + MATMUL_ROWS - 1) / MATMUL_ROWS,
                         (p.x.n_tokens + shape::tokens - 1) / shape::tokens, 1};
    return launch(s, blocks, MATMUL_THREADS, shape::shared_bytes, matmul<H, M, N, WM>, p, err);
}

template <int H>
static hepta_status launch_matmul(dev_stream s, const matmul_parameters &p, hepta_error *err) {
    return p.x.n_tokens <= 64 ? launch_tiles<H, 2, 2, 2>(s, p, err)
                              : launch_tiles<H, 4, 4, 1>(s, p, err);
}

template <int T>
static hepta_status launch_matvec(dev_stream s, const matvec_parameters &p, hepta_error *err) {
    unsigned n_strips = 0, n_groups = 1;
    for (uint32_t i = 0; i < MATVEC_PRODUCTS; i++) {
        n_strips += (p.w[i].n_rows + 15) / 16;
        n_groups = p.w[i].n_groups > n_groups ? p.w[i].n_groups : n_groups;
    }
    unsigned threads = (4 * n_groups + 31) / 32 * 32;
    threads = threads < MATVEC_THREADS ? threads : MATVEC_THREADS;
    const grid blocks = {n_strips, (p.x.n_tokens + T - 1) / T, 1};
    return launch(s, blocks, threads, 0, matvec<T>, p, err);
}

/* Tokens up to which codes are decoded once for each dot product's lane, not for a tile; without
 * tensor cores always. */
constexpr uint32_t MATVEC_MOST_TOKENS = 32;

/* y[i] = w[i] x for n <= MATVEC_PRODUCTS matrices of equal width. */
static hepta_status multiply(dev_stream s, const dev_matrix *w, float *const *y, int n,
                             const dev_input &x, const code_lookups *codes, hepta_error *err) {
    if (x.n_tokens <= MATVEC_MOST_TOKENS || !GPU_HAS_MMA) {
        matvec_parameters p = {};
        p.x = x, p.codes = codes;
        for (int i = 0; i < n; i++) {
            p.w[i] = w[i], p.y[i] = y[i];
        }
        return x.n_tokens == 1   ? launch_matvec<1>(s, p, err)
               : x.n_tokens == 2 ? launch_matvec<2>(s, p, err)
               : x.n_tokens <= 4 ? launch_matvec<4>(s, p, err)
               : x.n_tokens <= 8 ? launch_matvec<8>(s, p, err)
                                 : launch_matvec<16>(s, p, err);
    }
    hepta_status status = HEPTA_OK;
    for (int i = 0; i < n && status == HEPTA_OK; i++) {
        const matmul_parameters p = {w[i], x, y[i], codes};
        switch (w[i].half_bits) {
        case 4:
            status = launch_matmul<4>(s, p, err);
            break;
        case 5:
            status = launch_matmul<5>(s, p, err);
            break;
        case 6:
            status = launch_matmul<6>(s, p, err);
            break;
        case 7:
            status = launch_matmul<7>(s, p, err);
            break;
        case 8:
            status = launch_matmul<8>(s, p, err);
            break;
        default:
            status = launch_matmul<16>(s, p, err);
        }
    }
    return status;
}

#endif
