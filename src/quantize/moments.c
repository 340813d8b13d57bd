/*
 * moments.c - sums of x x^T over the inputs of a layer.
 *
 * TOKENS inputs at a time become columns; the products of their rows are added to one half of H,
 * which is mirrored at the end. Each item is a sum in the order of the tokens.
 */
#include "quantize/moments.h"

#include "base/base.h"

#include <math.h>
#include <omp.h>
#include <string.h>

enum { TOKENS = 1024, ROWS = 64 };

/* xt (n_padded, TOKENS): n rotated inputs times the roots of their weights, one column each. */
static void turn(const rotation *r, const float *x, const float *weight, uint32_t n,
                 const kernels *k, int threads, float *xt, float *scratch) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (uint32_t t = 0; t < (uint32_t)TOKENS; t++) {
        float *row = scratch + (size_t)omp_get_thread_num() * 2 * r->n_padded;
        if (t < n) {
            memcpy(row, x + (size_t)t * r->n, r->n * sizeof *row);
            k->rotate(r, row, row + r->n_padded);
        } else {
            memset(row, 0, r->n_padded * sizeof *row);
        }
        const float root = weight == NULL || t >= n ? 1.0f : sqrtf(weight[t]);
        for (size_t i = 0; i < r->n_padded; i++) {
            xt[i * TOKENS + t] = row[i] * root;
        }
    }
}

/* The products of columns [first, first + ROWS) of xt with all that are not before them. */
static void add_products(const kernels *k, const float *xt, uint32_t first, uint32_t n, float *h) {
    float y[ROWS * ROWS];
    const uint32_t n_cols = n - first < (uint32_t)ROWS ? n - first : (uint32_t)ROWS;
    for (uint32_t i = first; i < n; i += ROWS) {
        const uint32_t n_rows = n - i < (uint32_t)ROWS ? n - i : (uint32_t)ROWS;
        k->matmul_f32(xt + (size_t)first * TOKENS, n_cols, TOKENS, xt + (size_t)i * TOKENS, TOKENS,
                      n_rows, y, ROWS);
        for (uint32_t a = 0; a < n_rows; a++) {
            float *row = h + (size_t)(i + a) * n + first;
            for (uint32_t b = 0; b < n_cols; b++) {
                row[b] += y[a * ROWS + b];
            }
        }
    }
}

/* Rows [first, first + ROWS) of h: their upper half from the columns below. */
static void mirror(float *h, uint32_t n, uint32_t first) {
    const uint32_t end = n - first < (uint32_t)ROWS ? n : first + ROWS;
    for (uint32_t k = first + 1; k < n; k++) {
        for (uint32_t i = first; i < end && i < k; i++) {
            h[(size_t)i * n + k] = h[(size_t)k * n + i];
        }
    }
}

hepta_status moments_sum(const rotation *r, const float *x, const float *weight, uint32_t n_tokens,
                         const kernels *k, int threads, float *h, hepta_error *err) {
    const uint32_t n = r->n_padded;
    float *xt = memory_alloc((size_t)n * TOKENS, sizeof *xt);
    float *scratch = memory_alloc((size_t)threads * 2 * n, sizeof *scratch);
    hepta_status status = HEPTA_OK;
    if (xt == NULL || scratch == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "no memory for the moments of %u inputs", n);
        goto done;
    }
    memset(h, 0, (size_t)n * n * sizeof *h);
    for (uint32_t first = 0; first < n_tokens; first += TOKENS) {
        const uint32_t count =
            n_tokens - first < (uint32_t)TOKENS ? n_tokens - first : (uint32_t)TOKENS;
        turn(r, x + (size_t)first * r->n, weight != NULL ? weight + first : NULL, count, k, threads,
             xt, scratch);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (uint32_t i = 0; i < n; i += ROWS) {
            add_products(k, xt, i, n, h);
        }
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (uint32_t i = 0; i < n; i += ROWS) {
        mirror(h, n, i);
    }
done:
    memory_free(xt);
    memory_free(scratch);
    return status;
}
