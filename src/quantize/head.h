/*
 * head.h - groups of rows of the output head that matter for the same inputs.
 */
#ifndef QUANTIZE_HEAD_H
#define QUANTIZE_HEAD_H

#include "format/container.h"
#include "quantize/moments.h"

typedef struct head_groups {
    uint32_t n;      /* groups, none of them empty */
    uint32_t *first; /* (n + 1) of group i in `rows` */
    uint32_t *rows;  /* (n_rows) group by group, rising within */
    float *weight;   /* (n, n_tokens) of the inputs */
} head_groups;

/*
 * Groups the rows of the matrix t that makes the logits; m: all its inputs. To second order the
 * divergence of the predictions is half the sum of p_tr (1 - p_tr) (error_r . x_t)^2 over tokens t
 * and rows r, but for products of different rows' errors: so the inputs of a group are weighted by
 * the sum of p (1 - p) over its rows. The same for any number of threads and instruction set.
 * poll, which may be NULL, is called now and then; what it returns ends the work unless HEPTA_OK.
 * Other errors: HEPTA_ERROR_MEMORY.
 */
typedef hepta_status head_poll(void *context);
hepta_status head_groups_create(const tensor *t, const moments *m, const kernels *k, int threads,
                                head_poll *poll, void *context, head_groups **out,
                                hepta_error *err);
void head_groups_free(head_groups *g);

/*
 * The moments of group i, mean of its weighted inputs and of all (m), the latter as much as few
 * inputs in the former call for; h (n, n): room for them. out->n_tokens: of as many inputs of equal
 * weight.
 */
hepta_status head_moments(const head_groups *g, uint32_t i, const moments *m, const kernels *k,
                          int threads, float *h, moments *out, hepta_error *err);

#endif
