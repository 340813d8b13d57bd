/*
 * moments.h - second moments of a layer's inputs.
 */
#ifndef QUANTIZE_MOMENTS_H
#define QUANTIZE_MOMENTS_H

#include "kernels/kernels.h"

/* H (n, n): the sum of x x^T over n_tokens of the text, x the rotated and padded input. */
typedef struct moments {
    uint32_t n, n_tokens;
    const float *h;
    const rotation *rotation;
    const float *x; /* (n_tokens, rotation->n): the inputs as they are; NULL: gone */
} moments;

/*
 * h (n_padded, n_padded) = sum of weight_t x_t x_t^T over the rows of x (n_tokens, r->n), rotated;
 * `weight` (n_tokens) NULL: all 1. The same bits for any number of threads and instruction set.
 * Errors: HEPTA_ERROR_MEMORY.
 */
hepta_status moments_sum(const rotation *r, const float *x, const float *weight, uint32_t n_tokens,
                         const kernels *k, int threads, float *h, hepta_error *err);

#endif
