/*
 * beam.c - code words for rows of weights when an error can be made good by later weights.
 *
 * With e the errors of a row in units of v, weight k is coded towards
 *     x_k + sum over j < k of u_jk e_j
 * and a path's cost is the sum of d_k times the squared distance from that target: for H = U D U^T
 * this is the quadratic form e^T H e (code.h, code_feedback). The target depends on the path, so
 * the search of encode.c, which keeps 2^16 windows of 16 rows, will not do: here a row keeps the
 * `width` cheapest paths, each with the feedback that its own errors give to the weights ahead.
 * Paths that meet in a state are one from there on: the cheaper one.
 *
 * Weights are decided LAG blocks behind the newest: the paths that disagree with the best one there
 * are dropped. So errors of older blocks are common to all paths and reach the weights ahead as one
 * matrix product for ROWS rows (code_feedback.far).
 *
 * Floats are added in a fixed order, none fused; ties go to the first: the bytes do not depend on
 * the instruction set.
 */
#include "code/code.h"

#include "base/base.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { ROWS = 32, STATES_MAX = 1 << 14 };

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t int32x16 __attribute__((vector_size(64), aligned(4), may_alias));

/* The paths that end at a weight. */
typedef struct front {
    unsigned n;
    float *cost;      /* (capacity); infinite: dropped */
    uint16_t *window; /* (capacity) */
    float *ahead;     /* (capacity, CODE_BLOCK) feedback to the weights of the block */
} front;

/* The search of one row. */
typedef struct beam {
    front front;      /* before even weights */
    uint64_t *origin; /* (capacity) of the paths at the end of the last block: 16 bits each, their
                         numbers at the ends of the blocks, the newest lowest */
    float *later;     /* (capacity, lag - 1, CODE_BLOCK) feedback to the blocks behind the next */
    float reach;      /* the last limit above the least cost */
    unsigned decided; /* window of the last weight that was decided */
    uint16_t *choice; /* (history, capacity): at weight k, path p came from path `choice >> b` of
                         weight k - 1 by the symbol of b bits below */
} beam;

typedef struct searcher {
    const struct code_table *table;
    unsigned width, lag;
    size_t capacity;           /* paths */
    size_t history;            /* weights */
    uint8_t hash[256];         /* of the window's newer byte */
    float values[2][256 * 16]; /* parity, (hash of the bits that stay, new symbol): v - centre */
    uint16_t slot[STATES_MAX]; /* number of the path in a state, if that path is in this state */
    float *cost;               /* (capacity * 16) */
    uint32_t *picked;          /* (capacity + 16) */
    uint8_t *old_hash;         /* (capacity) */
    float *error;              /* (CODE_BLOCK, capacity) of the block */
    front odd;                 /* before odd weights */
    uint64_t *origin;          /* as in the beam, at the end of the block */
    float *later;
    beam beams[ROWS];
    void *memory;
} searcher;

/* The hash of the bits that stay in a window, without the new symbol. */
static inline unsigned hash_old(const searcher *s, unsigned bits) {
    return (bits & 255) ^ s->hash[bits >> 8];
}

/* The choices at weight i of the block at `at`. */
static inline uint16_t *choices_at(const searcher *s, const beam *w, size_t at, unsigned i) {
    return w->choice + (at % s->history + i) * s->capacity;
}

typedef void block_fn(searcher *s, beam *w, size_t at, const float *x, const float *plain,
                      const float *weight, const float *near);

#if defined(__x86_64__)
#include <immintrin.h>

#define BEAM_ISA avx512
#define BEAM_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
#define BEAM_AVX512
#include "code/beam_block.h"

#define BEAM_ISA avx2
#define BEAM_TARGET __attribute__((target("avx2")))
#include "code/beam_block.h"
#endif

#define BEAM_ISA generic
#define BEAM_TARGET
#include "code/beam_block.h"

static block_fn *block_variant(void) {
    const char *name = code_encode_variant_used();
#if defined(__x86_64__)
    if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return block_avx512;
    }
    if (strcmp(name, "generic") != 0) {
        return block_avx2;
    }
#endif
    (void)name;
    return block_generic;
}

static void fill_tables(searcher *s) {
    const struct code_table *t = s->table;
    for (unsigned byte = 0; byte < 256; byte++) {
        s->hash[byte] = code_hash(t, byte << 8);
    }
    for (int p = 0; p < 2; p++) {
        const int b = t->width[p];
        for (unsigned h = 0; h < 256; h++) {
            for (unsigned a = 0; a < 1u << b; a++) {
                const unsigned added = code_hash(t, a << (CODE_WINDOW - b));
                s->values[p][(h << b) + a] = (float)(t->value[h ^ added] - CODE_CENTRE);
            }
        }
    }
}

/* Takes the next n bytes of a block of memory, 64-byte aligned; counts only while *p is NULL. */
static void *carve(uint8_t **p, size_t *used, size_t n) {
    void *piece = *p != NULL ? *p + *used : NULL;
    *used += (n + 63) / 64 * 64;
    return piece;
}

static void carve_front(const searcher *s, front *f, uint8_t **memory, size_t *used) {
    f->cost = carve(memory, used, s->capacity * sizeof *f->cost);
    f->window = carve(memory, used, s->capacity * sizeof *f->window);
    f->ahead = carve(memory, used, s->capacity * CODE_BLOCK * sizeof *f->ahead);
}

static void carve_all(searcher *s, uint8_t *memory, size_t *used) {
    const size_t capacity = s->capacity, n_later = capacity * (s->lag - 1) * CODE_BLOCK;
    s->cost = carve(&memory, used, capacity * 16 * sizeof *s->cost);
    s->picked = carve(&memory, used, (capacity + 16) * sizeof *s->picked);
    s->old_hash = carve(&memory, used, capacity);
    s->error = carve(&memory, used, CODE_BLOCK * s->capacity * sizeof *s->error);
    s->origin = carve(&memory, used, capacity * sizeof *s->origin);
    s->later = carve(&memory, used, n_later * sizeof *s->later);
    carve_front(s, &s->odd, &memory, used);
    for (int r = 0; r < ROWS; r++) {
        beam *w = &s->beams[r];
        carve_front(s, &w->front, &memory, used);
        w->origin = carve(&memory, used, capacity * sizeof *w->origin);
        w->later = carve(&memory, used, n_later * sizeof *w->later);
        w->choice = carve(&memory, used, s->history * s->capacity * sizeof *w->choice);
    }
}

static searcher *searcher_create(const struct code_table *t, unsigned lag, unsigned width) {
    searcher *s = memory_alloc(1, sizeof *s);
    if (s == NULL) {
        return NULL;
    }
    s->table = t;
    s->width = width;
    s->capacity = ((size_t)width + width / 4 + 31) / 16 * 16;
    s->lag = lag;
    s->history = (size_t)(lag + 1) * CODE_BLOCK;
    fill_tables(s);
    size_t bytes = 0;
    carve_all(s, NULL, &bytes);
    s->memory = memory_alloc(bytes, 1);
    if (s->memory == NULL) {
        memory_free(s);
        return NULL;
    }
    bytes = 0;
    carve_all(s, s->memory, &bytes);
    return s;
}

static void searcher_free(searcher *s) {
    if (s != NULL) {
        memory_free(s->memory);
        memory_free(s);
    }
}

static void beam_start(const searcher *s, beam *w) {
    front *f = &w->front;
    f->n = 1;
    f->cost[0] = 0;
    f->window[0] = 0;
    memset(f->ahead, 0, CODE_BLOCK * sizeof *f->ahead);
    memset(w->later, 0, (size_t)(s->lag - 1) * CODE_BLOCK * sizeof *w->later);
    w->origin[0] = 0;
    w->reach = s->table->unit * s->table->unit;
    w->decided = 0;
}

static unsigned best_path(const front *f) {
    unsigned best = 0;
    for (unsigned j = 1; j < f->n; j++) {
        best = f->cost[j] < f->cost[best] ? j : best;
    }
    return best;
}

/* Symbols of a block on the path that is number `path` at its end; the number before it. */
static unsigned trace(const searcher *s, const beam *w, size_t block, unsigned path,
                      uint8_t symbol[CODE_BLOCK]) {
    for (unsigned i = CODE_BLOCK; i-- > 0;) {
        const int b = s->table->width[i & 1];
        const unsigned choice = choices_at(s, w, block * CODE_BLOCK, i)[path];
        symbol[i] = (uint8_t)(choice & ((1u << b) - 1));
        path = choice >> b;
    }
    return path;
}

/* Writes the symbols of a block and the errors they leave. */
static void decide(const searcher *s, beam *w, const uint8_t symbol[CODE_BLOCK], const float *x,
                   float *error, uint8_t *out) {
    uint64_t bits = 0;
    int filled = 0;
    for (unsigned i = 0; i < CODE_BLOCK; i++) {
        const unsigned p = i & 1, old = w->decided >> s->table->width[p];
        const int b = s->table->width[p];
        error[i] = x[i] - s->values[p][(hash_old(s, old) << b) + symbol[i]];
        w->decided = old | (unsigned)symbol[i] << (CODE_WINDOW - b);
        bits |= (uint64_t)symbol[i] << filled;
        filled += b;
    }
    for (int i = 0; i < s->table->half_bits; i++) {
        out[i] = (uint8_t)(bits >> (8 * i));
    }
}

/* After a block: drops the paths that were not `origin` lag blocks ago. */
static void agree(searcher *s, beam *w, unsigned origin) {
    const unsigned shift = 16 * (s->lag - 1);
    uint64_t *const free_origin = w->origin;
    float *const free_later = w->later;
    for (unsigned j = 0; j < w->front.n; j++) {
        if ((s->origin[j] >> shift & 0xffff) != origin) {
            w->front.cost[j] = INFINITY;
        }
        s->origin[j] = s->origin[j] << 16 | j;
    }
    w->origin = s->origin;
    w->later = s->later;
    s->origin = free_origin;
    s->later = free_later;
}

/* A group of up to ROWS rows, and where it goes. */
typedef struct group {
    const float *x, *scale;
    size_t rows;
    uint8_t *out;
    size_t row_stride, block_stride;
    float *y, *error; /* (ROWS, n): x in units of v; errors decided so far */
} group;

/* Block b of row r, and the decision on the block lag before it; at the end, on all. */
static void search_block(searcher *s, const code_feedback *m, block_fn *block, const group *g,
                         size_t r, size_t b, const float *far) {
    beam *w = &s->beams[r];
    const float *plain = g->y + r * m->n + b * CODE_BLOCK;
    float target[CODE_BLOCK];
    for (unsigned i = 0; i < CODE_BLOCK; i++) {
        target[i] = plain[i] + far[i];
    }
    block(s, w, b * CODE_BLOCK, target, plain, m->weight + b * CODE_BLOCK,
          m->near + b * CODE_BLOCK * (s->lag + 1) * CODE_BLOCK);
    unsigned path = best_path(&w->front);
    size_t first = b >= s->lag ? b - s->lag : 0, end = b >= s->lag ? first + 1 : 0;
    if ((b + 1) * CODE_BLOCK == m->n) {
        end = b + 1;
    } else {
        path = s->origin[path] >> (16 * (s->lag - 1)) & 0xffff;
        agree(s, w, path);
    }
    uint8_t symbol[CODE_LAG_MAX + 1][CODE_BLOCK];
    for (size_t k = end; k-- > first;) {
        path = trace(s, w, k, path, symbol[k - first]);
    }
    for (size_t k = first; k < end; k++) {
        const size_t at = r * m->n + k * CODE_BLOCK;
        decide(s, w, symbol[k - first], g->y + at, g->error + at,
               g->out + r * g->row_stride + k * g->block_stride);
    }
}

static void search_group(searcher *s, const code_feedback *m, block_fn *block, const group *g) {
    for (size_t r = 0; r < g->rows; r++) {
        const float scale = g->scale[r];
        float inverse = scale > 0.0f && scale < INFINITY ? 1.0f / scale : 0.0f;
        inverse = inverse < INFINITY ? inverse : 0.0f;
        for (size_t k = 0; k < m->n; k++) {
            g->y[r * m->n + k] = g->x[r * m->n + k] * inverse;
        }
        beam_start(s, &s->beams[r]);
    }
    for (size_t b = 0; b < m->n / CODE_BLOCK; b++) {
        float far[ROWS * CODE_BLOCK] = {0};
        if (b > s->lag) {
            m->matmul(m->far[b], CODE_BLOCK, (uint32_t)((b - s->lag) * CODE_BLOCK), g->error, m->n,
                      (uint32_t)g->rows, far, CODE_BLOCK);
        }
        for (size_t r = 0; r < g->rows; r++) {
            search_block(s, m, block, g, r, b, far + r * CODE_BLOCK);
        }
    }
}

hepta_status code_encode_feedback(const struct code_table *table, const code_feedback *m,
                                  unsigned width, const float *x, const float *scale, size_t rows,
                                  uint8_t *out, size_t row_stride, size_t block_stride, int threads,
                                  hepta_error *err) {
    if (m->n % CODE_BLOCK != 0 || width < 1 || width > CODE_WIDTH_MAX || m->lag < 1 ||
        m->lag > CODE_LAG_MAX) {
        return error_set(
            err, HEPTA_ERROR_ARGUMENT,
            "code: rows of %zu weights, a beam of %u, a lag of %u: expected a multiple "
            "of %d, 1 to %d, 1 to %d",
            m->n, width, m->lag, CODE_BLOCK, CODE_WIDTH_MAX, CODE_LAG_MAX);
    }
    const size_t n = m->n, groups = (rows + ROWS - 1) / ROWS;
    block_fn *const block = block_variant();
    int short_of_memory = 0;
#pragma omp parallel num_threads(threads > 1 ? threads : 1)
    {
        searcher *s = searcher_create(table, m->lag, width);
        float *y = memory_alloc(2 * ROWS * n, sizeof *y);
        if (s == NULL || y == NULL) {
#pragma omp atomic write
            short_of_memory = 1;
        }
#pragma omp barrier
        if (!short_of_memory) {
#pragma omp for schedule(dynamic, 1)
            for (size_t i = 0; i < groups; i++) {
                const size_t r = i * ROWS;
                const group g = {.x = x + r * n,
                                 .scale = scale + r,
                                 .rows = rows - r < ROWS ? rows - r : ROWS,
                                 .out = out + r * row_stride,
                                 .row_stride = row_stride,
                                 .block_stride = block_stride,
                                 .y = y,
                                 .error = y + ROWS * n};
                search_group(s, m, block, &g);
            }
        }
        searcher_free(s);
        memory_free(y);
    }
    if (short_of_memory) {
        return error_set(err, HEPTA_ERROR_MEMORY, "code: no memory for %d searches of %u paths",
                         threads > 1 ? threads : 1, width);
    }
    return HEPTA_OK;
}
