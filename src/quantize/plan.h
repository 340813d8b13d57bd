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
 * padding included, take at most `bits` per weight, which is 2 to 8. At just 2 and 8 every matrix
 * has that rate and the row scales come on top. `sensitivity` (n): what a tensor's relative squared
 * error adds to the error of the model (measure.h); NULL: estimates for each kind of tensor. Fails
 * when the scales alone break the promise.
 */
hepta_status plan_rates(const tensor *tensors, size_t n, double bits, const double *sensitivity,
                        uint32_t *half_bits, hepta_error *err);

/* Bytes of all tensors at these rates. */
uint64_t plan_bytes(const tensor *tensors, size_t n, const uint32_t *half_bits);

/*
 * A plan as text: a line NAME <tab> BITS for each matrix, bits being 2, 2.5, 3, 3.5, 4 or 8; more
 * columns are ignored, and so are lines that start with #. Reading fails with the line's number
 * where a plan does not fit the tensors.
 */
hepta_status plan_read(const char *path, const tensor *tensors, size_t n, uint32_t *half_bits,
                       hepta_error *err);
hepta_status plan_write(const char *path, const tensor *tensors, size_t n,
                        const uint32_t *half_bits, const double *sensitivity, hepta_error *err);

#endif
