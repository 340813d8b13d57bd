/*
 * rotation.c - the tables of the orthonormal rotation H = (Hartley_m (x) Hadamard_2^p) D.
 *
 * n = m * 2^p with m odd. D holds signs drawn from a seed; Hadamard_2^p is Sylvester's matrix of
 * order 2^p over sqrt(2^p); Hartley_m has the entries (cos + sin)(2 pi i j / m) / sqrt(m). Both
 * matrices are symmetric and their own inverses, so H^-1 = D (Hartley_m (x) Hadamard_2^p).
 * Hartley matrices exist for every order, therefore H exists for every n.
 *
 * Invariant: the tables depend on (n, seed) alone, to the last bit. The entries are computed in
 * binary64 by kernels/math.c from exactly reduced angles and rounded once to binary32; the signs
 * are bits of the splitmix64 sequence. How the rotation is applied: `rotate` in kernels/ref.c and
 * docs/NUMERICS.md, "Rotation".
 */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <math.h>

/* The Hartley table has m^2 entries; widths with a larger odd part are refused. */
#define ROTATION_MAX_ODD 8191

/* The generator of Vigna's splitmix64.c (public domain), prng.di.unimi.it. */
static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Sign i is bit i mod 64 of the (i / 64)-th number after the seed; a set bit means -1. */
static void fill_signs(uint32_t n, uint64_t seed, float *signs) {
    uint64_t word = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (i % 64 == 0) {
            word = splitmix64(&seed);
        }
        signs[i] = (word >> (i % 64) & 1) ? -1.0f : 1.0f;
    }
}

/* Entry (i, j) depends on i * j mod m alone: the first row but one holds all values. */
static void fill_hartley(uint32_t m, float *hartley) {
    double norm = 1.0 / sqrt((double)m);
    for (uint32_t j = 0; j < m; j++) {
        double s, c;
        math_sin_cos_turn(j, m, &s, &c);
        hartley[j] = (float)norm;
        hartley[m + j] = (float)((c + s) * norm);
    }
    for (uint32_t i = 2; i < m; i++) {
        uint32_t k = 0; /* i * j mod m */
        for (uint32_t j = 0; j < m; j++) {
            hartley[(size_t)i * m + j] = hartley[m + k];
            k += i;
            k -= k >= m ? m : 0;
        }
    }
}

hepta_status rotation_create(uint32_t n, uint64_t seed, rotation **out, hepta_error *err) {
    if (n == 0 || n > KERNELS_MAX_COLS) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED, "rotation: width %u is not in 1..%d", n,
                         KERNELS_MAX_COLS);
    }
    uint32_t pow2 = n & (~n + 1), m = n / pow2;
    if (m > ROTATION_MAX_ODD) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "rotation: width %u has the odd factor %u, more than the supported %u", n,
                         m, ROTATION_MAX_ODD);
    }
    rotation *r = memory_alloc(1, sizeof *r);
    if (r == NULL) {
        goto no_memory;
    }
    r->n = n;
    r->n_padded = (uint32_t)round_up(n, 16);
    r->m = m;
    r->pow2 = pow2;
    r->hadamard_scale = (float)(1.0 / sqrt((double)pow2));
    r->signs = memory_alloc(n, sizeof *r->signs);
    if (r->signs == NULL) {
        goto no_memory;
    }
    fill_signs(n, seed, r->signs);
    if (m > 1) {
        r->hartley = memory_alloc((size_t)m * m, sizeof *r->hartley);
        if (r->hartley == NULL) {
            goto no_memory;
        }
        fill_hartley(m, r->hartley);
    }
    *out = r;
    return HEPTA_OK;

no_memory:
    rotation_free(r);
    return error_set(err, HEPTA_ERROR_MEMORY, "rotation: no memory for width %u", n);
}

void rotation_free(rotation *r) {
    if (r != NULL) {
        memory_free(r->signs);
        memory_free(r->hartley);
        memory_free(r);
    }
}
