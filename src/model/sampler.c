/*
 * sampler.c - draws a token from logits, the same one on every machine.
 *
 * With temperature T and M the largest logit, token i has the weight
 *
 *     w_i = floor(2^40 * exp((logit_i - M) / T))
 *
 * by the engine's own exp. Weights are integers, so that their sums have no order and the draw is
 * exact: a random integer below the sum picks the token. Filters keep, in this order and among
 * tokens with w_i > 0, the top_k highest logits (ties: lowest ids), of these the shortest run
 * from the highest whose weight reaches top_p of theirs, and of these the tokens with
 * w_i >= min_p * 2^40.
 *
 * Invariant: the weight of the highest logit is 2^40, so that the sum is never 0, and a sum over
 * 2^23 tokens fits 64 bits. NaN and -infinity never win while another logit exists.
 *
 * Documented in docs/NUMERICS.md, "Sampling".
 */
#include "base/base.h"
#include "kernels/math.h"

#include <math.h>

enum { MAX_VOCAB = 1 << 23 };
#define WEIGHT_ONE 0x1p40f

struct hepta_sampler {
    hepta_sampler_options options;
    uint32_t n_vocab;
    uint64_t state[4]; /* of xoshiro256** */
    uint64_t *weight;  /* (n_vocab) by token id */
    uint32_t *heap;    /* (n_vocab) token ids, the best first among what is left */
    uint32_t *chosen;  /* (n_vocab) token ids, best first */
};

/* ---- Random numbers ---------------------------------------------------- */

/* xoshiro256** 1.0, Blackman and Vigna (public domain), prng.di.unimi.it. */
static uint64_t rotate_left(uint64_t x, int k) {
    return x << k | x >> (64 - k);
}

static uint64_t random_next(uint64_t s[4]) {
    uint64_t result = rotate_left(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

/* As its authors advise, the state comes from splitmix64. */
static void random_seed(uint64_t s[4], uint64_t seed) {
    for (int i = 0; i < 4; i++) {
        uint64_t z = (seed += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        s[i] = z ^ (z >> 31);
    }
}

/* floor(x * n / 2^64): uniform below n up to n / 2^64 */
static uint64_t scale_random(uint64_t x, uint64_t n) {
    uint64_t x0 = x & 0xffffffffu, x1 = x >> 32, n0 = n & 0xffffffffu, n1 = n >> 32;
    uint64_t middle = x1 * n0 + (x0 * n0 >> 32);
    uint64_t low_middle = (middle & 0xffffffffu) + x0 * n1;
    return x1 * n1 + (middle >> 32) + (low_middle >> 32);
}

/* ---- Order of candidates ----------------------------------------------- */

/* NaN counts as the lowest logit. */
static inline float rank_value(float logit) {
    return logit == logit ? logit : -INFINITY;
}

/* Higher logits first, then lower ids. */
static inline bool comes_before(const float *logits, uint32_t a, uint32_t b) {
    float x = rank_value(logits[a]), y = rank_value(logits[b]);
    return x > y || (x == y && a < b);
}

/* Restores the heap below `i`: every parent comes before its children. */
static void heap_sift(const float *logits, uint32_t *heap, uint32_t n, uint32_t i) {
    uint32_t id = heap[i];
    while (2 * i + 1 < n) {
        uint32_t child = 2 * i + 1;
        if (child + 1 < n && comes_before(logits, heap[child + 1], heap[child])) {
            child++;
        }
        if (!comes_before(logits, heap[child], id)) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = id;
}

static int32_t highest(const float *logits, uint32_t n) {
    float value = rank_value(logits[0]);
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        if (logits[i] > value) { /* false for NaN */
            value = logits[i];
            best = i;
        }
    }
    return (int32_t)best;
}

/* ---- Drawing ----------------------------------------------------------- */

static void fill_weights(hepta_sampler *s, const float *logits, float max) {
    max = max > FLT_MAX ? FLT_MAX : max;
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        float logit = rank_value(logits[i]);
        logit = logit > FLT_MAX ? FLT_MAX : logit;
        float p = math_exp_f32((logit - max) / s->options.temperature);
        s->weight[i] = (uint64_t)(p * WEIGHT_ONE);
    }
}

/*
 * Puts the kept tokens into s->chosen, best first, and returns their number: of those with
 * weight, at most k, and no more than reach top_p of the weight of these k.
 */
static uint32_t choose(hepta_sampler *s, const float *logits, uint32_t k) {
    uint32_t n = 0, n_chosen = 0;
    uint64_t total = 0, sum = 0;
    for (uint32_t i = 0; i < s->n_vocab; i++) {
        if (s->weight[i] > 0) {
            s->heap[n++] = i;
            total += s->weight[i];
        }
    }
    for (uint32_t i = n / 2; i-- > 0;) {
        heap_sift(logits, s->heap, n, i);
    }
    /* With all tokens as candidates the mass is known at once; with k it is that of the k best. */
    const double top_p = (double)s->options.top_p;
    const bool all = k >= n;
    while (n_chosen < k && n > 0 &&
           !(all && n_chosen > 0 && (double)sum >= top_p * (double)total)) {
        s->chosen[n_chosen] = s->heap[0];
        sum += s->weight[s->heap[0]];
        n_chosen++;
        s->heap[0] = s->heap[--n];
        heap_sift(logits, s->heap, n, 0);
    }
    if (!all) {
        uint64_t prefix = 0;
        uint32_t keep = 0;
        while (keep < n_chosen && (keep == 0 || (double)prefix < top_p * (double)sum)) {
            prefix += s->weight[s->chosen[keep++]];
        }
        n_chosen = keep;
    }
    return n_chosen;
}

int32_t hepta_sampler_draw(hepta_sampler *sampler, const float *logits) {
    hepta_sampler *s = sampler;
    const hepta_sampler_options *o = &s->options;
    const int32_t best = highest(logits, s->n_vocab);
    const float max = rank_value(logits[best]);
    if (o->temperature == 0.0f || o->top_k == 1 || max == -INFINITY) {
        return best;
    }
    fill_weights(s, logits, max);
    uint32_t k = o->top_k == 0 || o->top_k > s->n_vocab ? s->n_vocab : o->top_k;
    bool ordered = k < s->n_vocab || o->top_p < 1.0f;
    uint32_t n = ordered ? choose(s, logits, k) : s->n_vocab;
    const double min_weight = (double)o->min_p * (double)WEIGHT_ONE;
    uint64_t total = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t *weight = &s->weight[ordered ? s->chosen[i] : i];
        *weight = (double)*weight >= min_weight ? *weight : 0;
        total += *weight;
    }
    uint64_t r = scale_random(random_next(s->state), total);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t id = ordered ? s->chosen[i] : i;
        if (r < s->weight[id]) {
            return (int32_t)id;
        }
        r -= s->weight[id];
    }
    return best; /* not reached: r < total */
}

hepta_status hepta_sampler_create(const hepta_sampler_options *options, uint32_t n_vocab,
                                  hepta_sampler **out, hepta_error *err) {
    if (options == NULL || out == NULL || n_vocab == 0 || n_vocab > MAX_VOCAB) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "sampler: options or out is NULL, or %u tokens are not in 1..%d", n_vocab,
                         MAX_VOCAB);
    }
    if (!(options->temperature >= 0.0f && options->temperature <= FLT_MAX)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "temperature is %g, expected 0 or more",
                         (double)options->temperature);
    }
    if (!(options->top_p >= 0.0f && options->top_p <= 1.0f)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "top_p is %g, expected 0 to 1",
                         (double)options->top_p);
    }
    if (!(options->min_p >= 0.0f && options->min_p <= 1.0f)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "min_p is %g, expected 0 to 1",
                         (double)options->min_p);
    }
    hepta_sampler *s = memory_alloc(1, sizeof *s);
    if (s == NULL) {
        goto no_memory;
    }
    s->options = *options;
    s->n_vocab = n_vocab;
    random_seed(s->state, options->seed);
    s->weight = memory_alloc(n_vocab, sizeof *s->weight);
    s->heap = memory_alloc(n_vocab, sizeof *s->heap);
    s->chosen = memory_alloc(n_vocab, sizeof *s->chosen);
    if (s->weight == NULL || s->heap == NULL || s->chosen == NULL) {
        goto no_memory;
    }
    *out = s;
    return HEPTA_OK;

no_memory:
    hepta_sampler_free(s);
    return error_set(err, HEPTA_ERROR_MEMORY, "no memory for a sampler of %u tokens", n_vocab);
}

void hepta_sampler_free(hepta_sampler *sampler) {
    if (sampler != NULL) {
        memory_free(sampler->weight);
        memory_free(sampler->heap);
        memory_free(sampler->chosen);
        memory_free(sampler);
    }
}
