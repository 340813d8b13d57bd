/*
 * feedback.h - from the second moments of a layer's inputs to the error feedback of its rows.
 */
#ifndef QUANTIZE_FEEDBACK_H
#define QUANTIZE_FEEDBACK_H

#include "code/code.h"
#include "quantize/moments.h"

typedef struct feedback {
    code_feedback code;
    double mean;  /* of the diagonal of H */
    double saved; /* the mean of D over `mean`: what is left of an error that is white without */
    float *memory;
    const float **far;
} feedback;

/*
 * H + damping * mean * 1 = U D U^T; the fewer tokens H is made of, the more it is damped: what few
 * inputs say about directions is chance (docs/QUALITY.md). *out is NULL when H holds nothing to go
 * by (zeros, or numbers that overflowed). Same bits for any number of threads and instruction set.
 */
hepta_status feedback_create(const moments *m, unsigned lag, const kernels *k, int threads,
                             feedback **out, hepta_error *err);
void feedback_free(feedback *f);

#endif
