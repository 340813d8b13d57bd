/*
 * timing.h - how long single steps take on a device, and what it could reach: for the table of
 * scripts/test-gpu (gpu_checks).
 */
#ifndef GPU_TIMING_H
#define GPU_TIMING_H

#include "gpu/checks.h"

/* ---- The rate of tiles ------------------------------------------------- */

typedef struct tiles_parameters {
    uint32_t *sink;
    uint32_t rounds;
} tiles_parameters;

constexpr uint32_t TILES_THREADS = 128, TILES_ROWS = 4, TILES_COLUMNS = 4;

/* Products of tiles from registers, 16 of them independent. */
GPU_KERNEL_OF(TILES_THREADS, 2) tiles(tiles_parameters p) {
    PRIVATE(TILES_THREADS, int, c, [TILES_ROWS][TILES_COLUMNS][4]);
    PRIVATE(TILES_THREADS, uint32_t, a, [TILES_ROWS][4]);
    PRIVATE(TILES_THREADS, uint32_t, b, [TILES_COLUMNS][2]);
    THREADS_ALONE(t) {
        UNROLL
        for (uint32_t i = 0; i < TILES_ROWS * TILES_COLUMNS * 4; i++) {
            c[OWN(t)][i / 4 / TILES_COLUMNS][i / 4 % TILES_COLUMNS][i % 4] = 0;
            a[OWN(t)][i / 4 % TILES_ROWS][i % 4] = 0x9e3779b9u * (t + 32 * i + BLOCK_X + 1);
            b[OWN(t)][i / 4 % TILES_COLUMNS][i % 2] = 0x85ebca6bu * (t + 32 * i + BLOCK_X + 1);
        }
    }
    for (uint32_t round = 0; round < p.rounds; round++) {
        UNROLL
        for (uint32_t i = 0; i < TILES_ROWS * TILES_COLUMNS; i++) {
            WARP_MMA(c, i / TILES_COLUMNS, i % TILES_COLUMNS, a, i / TILES_COLUMNS, b,
                     i % TILES_COLUMNS);
        }
    }
    THREADS_ALONE(t) {
        uint32_t all = 0;
        UNROLL
        for (uint32_t i = 0; i < TILES_ROWS * TILES_COLUMNS * 4; i++) {
            all ^= (uint32_t)c[OWN(t)][i / 4 / TILES_COLUMNS][i / 4 % TILES_COLUMNS][i % 4];
        }
        if (all == 0x5eed5eedu) { /* so that the products are not left out */
            p.sink[0] = all;
        }
    }
}

/* Multiplications and additions of int8 a second. */
static hepta_status tile_rate(int number, double *rate, hepta_error *err) {
    gpu_device_info d;
    dev_stream s;
    void *sink;
    TRY(dev_open(number, &d, err));
    TRY(dev_alloc(&sink, sizeof(uint32_t), err));
    hepta_status status = dev_stream_create(&s, err);
    if (status == HEPTA_OK) {
        const uint32_t n_blocks = (uint32_t)d.processors * 4;
        const tiles_parameters p = {(uint32_t *)sink, GPU_TILE_ROUNDS};
        double best = 1e30;
        for (int run = 0; run < 6 && status == HEPTA_OK; run++) {
            const double started = host_seconds();
            status = launch(s, grid{n_blocks, 1, 1}, TILES_THREADS, 0, tiles, p, err);
            status = status == HEPTA_OK ? dev_wait(s, err) : status;
            const double took = host_seconds() - started;
            best = took < best ? took : best;
        }
        *rate = 2.0 * 16 * 8 * 32 * TILES_ROWS * TILES_COLUMNS * GPU_TILE_ROUNDS *
                (TILES_THREADS / 32) * n_blocks / best;
        dev_stream_free(s);
    }
    dev_free(sink);
    return status;
}

/* ---- Steps ------------------------------------------------------------- */

constexpr uint32_t TIMED_STEPS = 32;
/* Matrices are taken in turns, until they are more than what caches hold. */
constexpr uint64_t TIMED_BYTES = GPU_SWEEP_BYTES / 16;

/* Seconds of step(i), the best of some chains of TIMED_STEPS. */
template <class F> static hepta_status time_steps(check *c, const F &step, double *seconds) {
    dev_graph graph;
    *seconds = 1e30;
    const auto chain = [&]() {
        for (uint32_t i = 0; i < TIMED_STEPS; i++) {
            TRY(step(i));
        }
        return HEPTA_OK;
    };
    TRY(chain());
    TRY(dev_wait(c->stream, c->err));
    if (GPU_HAS_GRAPHS) {
        TRY(dev_capture_begin(c->stream, c->err));
        const hepta_status status = chain();
        TRY(dev_capture_end(c->stream, &graph, c->err));
        TRY(status);
    }
    hepta_status status = HEPTA_OK;
    for (int run = 0; run < 6 && status == HEPTA_OK; run++) {
        const double started = host_seconds();
        status = GPU_HAS_GRAPHS ? dev_graph_run(graph, c->stream, c->err) : chain();
        status = status == HEPTA_OK ? dev_wait(c->stream, c->err) : status;
        const double took = (host_seconds() - started) / TIMED_STEPS;
        *seconds = took < *seconds ? took : *seconds;
    }
    if (GPU_HAS_GRAPHS) {
        dev_graph_free(graph);
    }
    return status;
}

/* Random bytes on the device. */
static hepta_status random_bytes(check *c, uint64_t n, uint8_t **out) {
    const uint64_t words = (n + 7) / 8;
    uint64_t *host = (uint64_t *)malloc(words * 8), state = 1;
    if (host == NULL) {
        return fail(c->err, HEPTA_ERROR_MEMORY, "no memory for %llu bytes", (unsigned long long)n);
    }
    for (uint64_t i = 0; i < words; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        host[i] = state;
    }
    const hepta_status status = check_in(c, (const uint8_t *)host, words * 8, out);
    free(host);
    return status;
}

static hepta_status time_product(check *c, const gpu_timing *t,
                                 const struct code_table *const *tables, double *seconds) {
    dev_matrix w[TIMED_STEPS] = {};
    const code_lookups *codes;
    uint8_t *q, *scales;
    float *scale, *y;
    int *sum = NULL;
    TRY(upload_codes(&c->blocks, tables, &codes, c->err));
    const uint32_t n_groups = (t->n_cols + GPU_GROUP - 1) / GPU_GROUP;
    const uint32_t stride = n_groups * GPU_GROUP;
    const uint64_t bytes = code_bytes(t->half_bits, t->n_rows, t->n_cols);
    uint32_t n = 0;
    TRY(random_bytes(c, 2 * (uint64_t)(t->n_rows + 15), &scales));
    while (n < TIMED_STEPS && (n < 2 || n * bytes < TIMED_BYTES)) {
        uint8_t *data;
        if (n == 0) {
            TRY(random_bytes(c, bytes, &data));
        } else {
            TRY(check_room(c, bytes, &data));
            TRY(dev_copy(data, w[0].codes, bytes, c->stream, c->err));
        }
        w[n++] = {data, scales, t->half_bits, t->n_rows, n_groups};
    }
    TRY(random_bytes(c, (uint64_t)t->n_tokens * stride, &q));
    TRY(check_room(c, t->n_tokens, &scale));
    int *zeros = (int *)calloc(t->n_tokens, sizeof *zeros);
    const hepta_status status =
        zeros == NULL ? fail(c->err, HEPTA_ERROR_MEMORY, "no memory for %u sums", t->n_tokens)
                      : check_in(c, zeros, t->n_tokens, &sum);
    free(zeros);
    TRY(status);
    TRY(check_room(c, (uint64_t)t->n_tokens * t->n_rows, &y));
    const dev_input x = {(const int8_t *)q, scale, sum, stride, t->n_tokens};
    return time_steps(
        c,
        [&](uint32_t i) {
            return multiply(c->stream, c->device, &w[i % n], &y, 1, x, codes, c->err);
        },
        seconds);
}

static hepta_status time_prepare(check *c, const gpu_timing *t, double *seconds) {
    const uint32_t n = t->r->n;
    prepare_parameters p = {};
    float *y, *gain;
    TRY(upload_rotation(&c->blocks, t->r, &p.r, c->err));
    TRY(check_room(c, (uint64_t)t->n_tokens * n, &p.x));
    TRY(check_room(c, (uint64_t)t->n_tokens * n, &y));
    TRY(check_room(c, n, &gain));
    p.mode = t->mode, p.y = y, p.gain = gain, p.eps = 1e-5f;
    p.q_stride = (n + GPU_GROUP - 1) / GPU_GROUP * GPU_GROUP;
    TRY(check_room(c, 2 * t->n_tokens * (uint64_t)spread_bytes(n) / sizeof(float), &p.scratch));
    TRY(check_room(c, (uint64_t)t->n_tokens * p.q_stride, &p.q));
    TRY(check_room(c, t->n_tokens, &p.scale));
    TRY(check_room(c, t->n_tokens, &p.sum));
    p.in_shared = spread_bytes(n) + 1024 <= c->device.shared_bytes;
    return time_steps(
        c,
        [&](uint32_t) {
            return launch(c->stream, grid{t->n_tokens, 1, 1}, token_threads(n),
                          p.in_shared ? spread_bytes(n) : 0, prepare, p, c->err);
        },
        seconds);
}

/* t->n_tokens tokens that follow each other, the last at position n_pos - 1, over an F16 cache. */
static hepta_status time_attention(check *c, const gpu_timing *t, double *seconds) {
    gpu_attention_case size = {};
    attend_parameters a = {};
    gpu_token *tokens = (gpu_token *)calloc(t->n_tokens, sizeof *tokens), *dev_tokens = NULL;
    attend_tile *tiles = (attend_tile *)calloc(t->n_tokens, sizeof *tiles), *dev_tiles = NULL;
    float *q, *out, *partial;
    uint32_t n_tiles = 0;
    hepta_status status = tokens == NULL || tiles == NULL
                              ? fail(c->err, HEPTA_ERROR_MEMORY, "no memory for a timing")
                              : HEPTA_OK;
    if (status == HEPTA_OK) {
        for (uint32_t i = 0; i < t->n_tokens; i++) {
            tokens[i].position = t->n_pos - t->n_tokens + i;
        }
        n_tiles = cut_tiles(tokens, 0, t->n_tokens,
                            attend_tile_tokens(t->n_head / t->n_head_kv, t->head_dim), tiles);
        status = check_in(c, tokens, t->n_tokens, &dev_tokens);
        status = status != HEPTA_OK ? status : check_in(c, tiles, n_tiles, &dev_tiles);
    }
    free(tokens), free(tiles);
    TRY(status);
    size.type = HEPTA_CACHE_F16, size.n_pos = t->n_pos;
    size.n_head_kv = t->n_head_kv, size.head_dim = t->head_dim;
    TRY(room_for_cache(c, &size, &a.cache));
    const uint64_t items = (uint64_t)t->n_tokens * t->n_head * t->head_dim;
    a.n_blocks = (t->n_pos + ATTEND_POSITIONS - 1) / ATTEND_POSITIONS;
    TRY(check_room(c, items, &q));
    TRY(check_room(c, items, &out));
    TRY(check_room(c, (uint64_t)t->n_tokens * t->n_head * a.n_blocks * (t->head_dim + 2),
                   &partial));
    a.tokens = dev_tokens, a.tiles = dev_tiles, a.n_head = t->n_head, a.q = q;
    a.scale = 1.0f, a.out = out, a.partial = partial;
    const bool split =
        a.n_blocks > 1 && (uint64_t)n_tiles * t->n_head_kv < 2 * (uint64_t)c->device.processors;
    return time_steps(
        c,
        [&](uint32_t) {
            return launch_attention(c->stream, a, n_tiles, split, 0, t->n_tokens, c->err);
        },
        seconds);
}

static hepta_status check_time(const gpu_timing *t, const struct code_table *const *codes,
                               double *seconds, hepta_error *err) {
    check c;
    TRY(check_begin(&c, err));
    return check_end(&c, t->what == GPU_TIMED_PRODUCT   ? time_product(&c, t, codes, seconds)
                         : t->what == GPU_TIMED_PREPARE ? time_prepare(&c, t, seconds)
                                                        : time_attention(&c, t, seconds));
}

#endif
