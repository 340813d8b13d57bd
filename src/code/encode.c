/*
 * encode.c - the best code words for rows of weights: a Viterbi search over the bit-shift
 * trellis of the window code.
 *
 * The state after weight k is the last 16 - b bits of the row, b being the width of weight
 * k + 1. Weight k joins 2^16 windows: a window w leaves state w mod 2^(16 - b_k), and arrives
 * at state w >> b_(k+1). With m the bits that both states share, every m is a complete
 * bipartite graph: predecessors (m, o), o the bits that fall out, and new states (a, m), a the
 * new symbol, joined by hash(m) ^ hash(o) ^ hash(a).
 *
 * Sixteen rows are coded at once, one per lane. A cost is an int32 whose low four bits hold o
 * of the best predecessor: costs are multiples of 16, so min() over (cost | o) finds the least
 * cost and, among equals, the least o. All arithmetic after the conversion of the weights is on
 * integers, so every instruction set gives the same bits.
 *
 * Memory stays bounded whatever the length of the row: the o's of the last RING weights are
 * kept; when that is full the best path is followed back, its oldest EMIT symbols are written,
 * and the paths that do not agree with them are dropped (prune()). What this loses against a
 * search that keeps everything is too little to measure (docs/CODE.md).
 *
 * Ranges: an error counts at most LIMIT + 64 = 320 units of v, 20480 fixed-point steps, whose
 * square / 16 is below 2^24.7. Any state is reached from any other in 8 weights, so reached
 * costs stay within 2^27.7 of each other, and within 2^28.7 of zero while state 0, from which
 * they are counted, is not reached itself: far from UNREACHED, which in turn stays below 2^31.
 */
#include "code/code.h"

#include "base/base.h"

#include <math.h>
#include <string.h>

enum {
    LANES = 16,
    STATES_MAX = 1 << 14,
    LOOK_AHEAD = 256,
    EMIT = 192,
    RING = LOOK_AHEAD + EMIT,
    BACK_WORDS = 1 << 14, /* of one weight, all lanes */
    KEEP = 20,            /* squared errors at the rate's bound, see prune() */
    PARENTS = 1 << 17,    /* paths times weights there; some thousands are used */
    UNREACHED = 1 << 30,
    FRACTION = 64,    /* fixed-point steps per unit of v */
    ERROR_UNIT = 256, /* the cost of a squared error of one unit of v */
    LIMIT = 256       /* |x / scale| counts at most this many units */
};

/* Hashes, times 16, of the parts of a window at even and odd weights. */
typedef struct step_hash {
    uint32_t shared[1 << 12], dropped[16], added[16];
} step_hash;

typedef struct encoder {
    step_hash hash[2];
    int32_t distance[256 * LANES];       /* (hash, lane) */
    int32_t x[CODE_BLOCK * LANES];       /* (weight, lane), fixed point, plus centre */
    int32_t cost[2][STATES_MAX * LANES]; /* (state, lane) */
    int32_t back[RING][BACK_WORDS];      /* (word, lane), packed o's */
    uint8_t symbol[EMIT];
    /* Of prune(): */
    uint32_t n_kept[LANES];
    uint16_t kept[LANES][STATES_MAX + 1], front[STATES_MAX], slot[STATES_MAX], parent[PARENTS];
    uint8_t good[STATES_MAX];
} encoder;

/* Vectors are loaded and stored aligned; memory_alloc() gives 64 bytes. */
_Static_assert(offsetof(encoder, distance) % 64 == 0 && offsetof(encoder, x) % 64 == 0 &&
                   offsetof(encoder, cost) % 64 == 0 && offsetof(encoder, back) % 64 == 0,
               "alignment");

typedef void step_fn(const int32_t *cost, int32_t *next, const int32_t *distance,
                     const step_hash *hash, int32_t *back);

#if defined(__x86_64__)
#include <immintrin.h>

#define STEP_ISA avx512
#define STEP_TARGET __attribute__((target("avx512f")))
#define STEP_WIDTH 16
#define STEP_MIN(a, b) ((vec_avx512)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#include "code/encode_step.h"

#define STEP_ISA avx2
#define STEP_TARGET __attribute__((target("avx2")))
#define STEP_WIDTH 8
#define STEP_MIN(a, b) ((vec_avx2)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#include "code/encode_step.h"
#endif

#define STEP_ISA generic
#define STEP_TARGET
#define STEP_WIDTH 4
#if defined(__ARM_NEON)
#include <arm_neon.h>
#define STEP_MIN(a, b) ((vec_generic)vminq_s32((int32x4_t)(a), (int32x4_t)(b)))
#else
#define STEP_MIN(a, b) (((a) & ((a) < (b))) | ((b) & ~((a) < (b))))
#endif
#include "code/encode_step.h"

typedef struct variant {
    const char *name;
    step_fn *const (*steps)[3]; /* [b - 2][d - 2] */
} variant;

static const variant variants[] = {
#if defined(__x86_64__)
    {"avx512", steps_avx512},
    {"avx2", steps_avx2},
#endif
    {"generic", steps_generic},
};

static const variant *forced; /* tests only */

static bool variant_runs(const variant *v) {
#if defined(__x86_64__)
    if (v->steps == steps_avx512) {
        return __builtin_cpu_supports("avx512f");
    }
    if (v->steps == steps_avx2) {
        return __builtin_cpu_supports("avx2");
    }
#endif
    return v->steps == steps_generic;
}

static const variant *variant_best(void) {
    const variant *v = variants;
    while (!variant_runs(v)) {
        v++; /* the last one runs everywhere */
    }
    return v;
}

const char *code_encode_variant(int i) {
    for (size_t k = 0; k < sizeof variants / sizeof variants[0]; k++) {
        if (variant_runs(&variants[k]) && i-- == 0) {
            return variants[k].name;
        }
    }
    return NULL;
}

const char *code_encode_variant_used(void) {
    return forced != NULL ? forced->name : variant_best()->name;
}

bool code_encode_force(const char *name) {
    if (name == NULL) {
        forced = NULL;
        return true;
    }
    for (size_t k = 0; k < sizeof variants / sizeof variants[0]; k++) {
        if (variant_runs(&variants[k]) && strcmp(variants[k].name, name) == 0) {
            forced = &variants[k];
            return true;
        }
    }
    return false;
}

size_t code_row_bytes(int half_bits, size_t n) {
    return n / CODE_BLOCK * (size_t)half_bits;
}

/* The hash, times LANES, of `bits` standing at window bits first, first + 1, ... */
static uint32_t hash_at(const struct code_table *t, int first, unsigned bits) {
    return (uint32_t)code_hash(t, bits << first) * LANES;
}

static void hash_prepare(encoder *e, const struct code_table *t) {
    for (int p = 0; p < 2; p++) {
        const int b = t->width[p], d = t->width[1 - p];
        for (unsigned m = 0; m < 1u << (16 - b - d); m++) {
            e->hash[p].shared[m] = hash_at(t, d, m);
        }
        for (unsigned o = 0; o < 1u << d; o++) {
            e->hash[p].dropped[o] = hash_at(t, 0, o);
        }
        for (unsigned a = 0; a < 1u << b; a++) {
            e->hash[p].added[a] = hash_at(t, 16 - b, a);
        }
    }
}

/* Weights k..k+15 of up to 16 rows as fixed-point values of v. */
static void load_block(encoder *e, const float *x, const float *inverse, size_t rows, size_t n,
                       size_t k) {
    for (size_t l = 0; l < LANES; l++) {
        for (size_t i = 0; i < CODE_BLOCK; i++) {
            float y = l < rows ? x[l * n + k + i] * inverse[l] : 0.0f;
            y = y > -(float)LIMIT ? y : -(float)LIMIT; /* NaN too */
            y = y < (float)LIMIT ? y : (float)LIMIT;
            y = y * (float)FRACTION + (y < 0.0f ? -0.5f : 0.5f);
            e->x[i * LANES + l] = (int32_t)y + CODE_CENTRE * FRACTION;
        }
    }
}

/* distance[h][lane] for weight i of the block, less the cost of state 0 if it is reached. */
static void fill_distance(encoder *e, const struct code_table *t, size_t i, const int32_t *cost) {
    int32_t x[LANES], base[LANES];
    for (int l = 0; l < LANES; l++) {
        x[l] = e->x[i * LANES + (size_t)l];
        base[l] = cost[l] < UNREACHED / 2 ? cost[l] & ~15 : 0;
    }
    for (int h = 0; h < 256; h++) {
        const int32_t v = t->value[h] * FRACTION;
        for (int l = 0; l < LANES; l++) {
            const int32_t d = x[l] - v;
            e->distance[h * LANES + l] = (((d * d) >> 4) & ~15) - base[l];
        }
    }
}

/* The state before weight k on the best path to `state` after it, in lane l. */
static inline unsigned step_back(const encoder *e, const struct code_table *t, size_t k,
                                 unsigned state, size_t l) {
    const int b = t->width[k & 1], d = t->width[1 - (k & 1)];
    const int shared = 16 - b - d, entry_log = d == 2 ? 1 : 2, per_word_log = 5 - entry_log;
    const unsigned a = state >> shared, m = state & ((1u << shared) - 1);
    const unsigned at = (m << b) + a;
    const uint32_t word = (uint32_t)e->back[k % RING][(at >> per_word_log) * LANES + l];
    const unsigned slot = (at & ((1u << per_word_log) - 1)) << entry_log;
    return (m << d) + (word >> slot & ((1u << d) - 1));
}

static unsigned state_count(const struct code_table *t, size_t k) {
    return 1u << (16 - t->width[k & 1]); /* before weight k */
}

/* The cheapest state of every lane, the lowest among equals. */
static void best_states(const int32_t *cost, unsigned states, unsigned best[LANES]) {
    int32_t least[LANES], at[LANES];
    for (int l = 0; l < LANES; l++) {
        least[l] = INT32_MAX;
        at[l] = 0;
    }
    for (unsigned s = 0; s < states; s++) {
        for (int l = 0; l < LANES; l++) {
            const int32_t c = cost[s * LANES + (unsigned)l] & ~15;
            at[l] = c < least[l] ? (int32_t)s : at[l];
            least[l] = c < least[l] ? c : least[l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        best[l] = (unsigned)at[l];
    }
}

/*
 * Follows lane l back from `state` before weight `end`, leaves the symbols of weights
 * [start, stop), stop - start <= EMIT, in e->symbol and returns the state before weight stop.
 */
static unsigned trace_back(encoder *e, const struct code_table *t, unsigned state, size_t l,
                           size_t start, size_t stop, size_t end) {
    unsigned decided = state;
    for (size_t k = end; k-- > start;) {
        if (k + 1 == stop) {
            decided = state;
        }
        if (k < stop) {
            e->symbol[k - start] = (uint8_t)(state >> (16 - t->width[0] - t->width[1]));
        }
        state = step_back(e, t, k, state, l);
    }
    return decided;
}

/*
 * The states that cost less than KEEP squared errors above their lane's best go to e->kept;
 * the others become unreached: the best path of a whole row hardly ever runs through one.
 * Costs are counted from the best one.
 */
static void keep_near_best(encoder *e, const struct code_table *t, int32_t *cost, unsigned states,
                           const unsigned best[LANES]) {
    const int32_t limit =
        (int32_t)(t->unit * t->unit * (float)(KEEP * ERROR_UNIT / (1 << t->half_bits)));
    int32_t base[LANES];
    for (unsigned l = 0; l < LANES; l++) {
        base[l] = cost[best[l] * LANES + l] & ~15;
        e->n_kept[l] = 0;
    }
    for (unsigned s = 0; s < states; s++) {
        for (unsigned l = 0; l < LANES; l++) {
            const int32_t c = cost[s * LANES + l] - base[l];
            const bool keep = c < limit;
            e->kept[l][e->n_kept[l]] = (uint16_t)s;
            e->n_kept[l] += keep;
            cost[s * LANES + l] = keep ? c : UNREACHED;
        }
    }
}

/*
 * Makes lane l keep its word: of the kept states before weight `end`, those whose best path does
 * not lead through state `decided` before weight `stop` become unreached. Follows all of them
 * back together. They merge fast; should they not, the best path alone is kept.
 */
static void prune(encoder *e, const struct code_table *t, int32_t *cost, unsigned best, size_t l,
                  unsigned decided, size_t stop, size_t end) {
    const unsigned kept = e->n_kept[l];
    memcpy(e->front, e->kept[l], kept * sizeof e->front[0]);
    size_t level_end[LOOK_AHEAD]; /* in e->parent */
    unsigned count = kept, used = 0, levels = 0;
    bool fits = true;
    for (size_t k = end; k-- > stop && fits;) {
        unsigned next = 0;
        for (unsigned i = 0; i < count; i++) {
            const unsigned s = step_back(e, t, k, e->front[i], l);
            if (e->slot[s] == 0) {
                e->front[next++] = (uint16_t)s; /* next <= i + 1: read already */
                e->slot[s] = (uint16_t)next;
            }
            e->parent[used++] = (uint16_t)(e->slot[s] - 1);
        }
        for (unsigned i = 0; i < next; i++) {
            e->slot[e->front[i]] = 0;
        }
        level_end[levels++] = used;
        count = next;
        fits = used + count <= PARENTS;
    }
    /* good[i]: path i of the level leads through `decided`; from the oldest level up. */
    for (unsigned i = 0; i < count; i++) {
        e->good[i] = fits && e->front[i] == decided;
    }
    while (levels-- > 0) {
        const size_t first = levels == 0 ? 0 : level_end[levels - 1];
        for (size_t i = level_end[levels]; i-- > first;) {
            e->good[i - first] = e->good[e->parent[i]]; /* parent[i] <= i - first */
        }
    }
    for (unsigned i = 0; i < kept; i++) {
        if (!e->good[i] && e->kept[l][i] != best) {
            cost[e->kept[l][i] * LANES + l] = UNREACHED;
        }
    }
}

/* Packs symbols of weights [start, start + count), whole blocks, LSB first. */
static void write_blocks(const encoder *e, const struct code_table *t, size_t start, size_t count,
                         uint8_t *out, size_t block_stride) {
    for (size_t k = 0; k < count; k += CODE_BLOCK) {
        uint64_t bits = 0;
        int filled = 0;
        for (size_t i = 0; i < CODE_BLOCK; i++) {
            bits |= (uint64_t)e->symbol[k + i] << filled;
            filled += t->width[i & 1];
        }
        uint8_t *p = out + (start + k) / CODE_BLOCK * block_stride;
        for (int i = 0; i < t->half_bits; i++) {
            p[i] = (uint8_t)(bits >> (8 * i));
        }
    }
}

/* Codes up to 16 rows. */
static void encode_group(encoder *e, const struct code_table *t, const variant *v, const float *x,
                         const float *scale, size_t rows, size_t n, uint8_t *out, size_t row_stride,
                         size_t block_stride) {
    float inverse[LANES];
    for (size_t l = 0; l < rows; l++) {
        inverse[l] = scale[l] > 0.0f && scale[l] < INFINITY ? 1.0f / scale[l] : 0.0f;
        inverse[l] = inverse[l] < INFINITY ? inverse[l] : 0.0f;
    }
    int32_t *cost = e->cost[0], *next = e->cost[1];
    for (size_t s = 0; s < STATES_MAX; s++) {
        for (size_t l = 0; l < LANES; l++) {
            cost[s * LANES + l] = s == 0 ? 0 : UNREACHED;
        }
    }
    size_t written = 0;
    for (size_t k = 0; k < n; k++) {
        if (k % CODE_BLOCK == 0) {
            load_block(e, x, inverse, rows, n, k);
        }
        fill_distance(e, t, k % CODE_BLOCK, cost);
        const int b = t->width[k & 1], d = t->width[1 - (k & 1)];
        v->steps[b - 2][d - 2](cost, next, e->distance, &e->hash[k & 1], e->back[k % RING]);
        int32_t *swap = cost;
        cost = next;
        next = swap;
        const bool last = k + 1 == n;
        while (k + 1 - written == RING || (last && written < n)) {
            const size_t left = n - written, count = left < EMIT ? left : EMIT;
            unsigned best[LANES];
            best_states(cost, state_count(t, k + 1), best);
            if (!last) {
                keep_near_best(e, t, cost, state_count(t, k + 1), best);
            }
            for (size_t l = 0; l < rows; l++) {
                const unsigned decided =
                    trace_back(e, t, best[l], l, written, written + count, k + 1);
                write_blocks(e, t, written, count, out + l * row_stride, block_stride);
                if (!last) {
                    prune(e, t, cost, best[l], l, decided, written + count, k + 1);
                }
            }
            written += count;
        }
    }
}

hepta_status code_encode_rows(const struct code_table *table, const float *x, const float *scale,
                              size_t rows, size_t n, uint8_t *out, size_t row_stride,
                              size_t block_stride, int threads, hepta_error *err) {
    if (n % CODE_BLOCK != 0) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "code: a row has %zu weights, expected a multiple of %d", n, CODE_BLOCK);
    }
    const size_t groups = (rows + LANES - 1) / LANES;
    const variant *v = forced != NULL ? forced : variant_best();
    int short_of_memory = 0;
#pragma omp parallel num_threads(threads > 1 ? threads : 1)
    {
        encoder *e = memory_alloc(1, sizeof *e);
        if (e == NULL) {
#pragma omp atomic write
            short_of_memory = 1;
        } else {
            hash_prepare(e, table);
        }
#pragma omp barrier
        if (!short_of_memory) {
#pragma omp for schedule(dynamic, 1)
            for (size_t g = 0; g < groups; g++) {
                const size_t r = g * LANES;
                encode_group(e, table, v, x + r * n, scale + r, rows - r < LANES ? rows - r : LANES,
                             n, out + r * row_stride, row_stride, block_stride);
            }
        }
        memory_free(e);
    }
    if (short_of_memory) {
        return error_set(err, HEPTA_ERROR_MEMORY, "code: no memory for %d encoders of %zu bytes",
                         threads > 1 ? threads : 1, sizeof(encoder));
    }
    return HEPTA_OK;
}
