/*
 * plan.h - which rate each tensor gets, so that the whole file keeps its promised size.
 */
#ifndef QUANTIZE_PLAN_H
#define QUANTIZE_PLAN_H

#include "format/container.h"

enum { HALF_BITS_MIN = 4, HALF_BITS_MAX = 8, HALF_BITS_INT8 = 16 };

/* True for tensors that are packed: matrices. Vectors (norms, rope_freqs) stay in F32. */
bool plan_is_packed(const tensor *t);

/*
 * Sets half_bits[i] for the n tensors (0: stays F32) such that all tensors together, scales and
 * padding included, take at most `bits` per weight. At the lowest rate, 2, and at 8 every matrix
 * has just that rate and the row scales come on top. `bits` is 2, 2.5, 3, 3.5, 4 or 8. Fails when
 * a model is so small that the scales alone break the promise.
 */
hepta_status plan_rates(const tensor *tensors, size_t n, double bits, uint32_t *half_bits,
                        hepta_error *err);

#endif
