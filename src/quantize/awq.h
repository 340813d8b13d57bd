/*
 * awq.h - activation-aware scales of columns (AWQ), for the plain schemes.
 *
 * Lin et al. 2023, arXiv:2306.00978: W diag(s) is quantized in place of W, and what comes before
 * it is divided by s, so that columns whose inputs are large are rounded more finely. s =
 * (mean |x|)^alpha, alpha being the one of 0, 1/20, ..., 19/20 that changes the outputs least on
 * calibration text. Nothing has to be stored: attn_norm takes the scales of attn_q, attn_k and
 * attn_v, which share them; ffn_norm those of ffn_gate and ffn_up; the rows of ffn_up those of
 * ffn_down; the rows of attn_v those of attn_output, which the heads that share a value share.
 * Embedding and head stay as they are. The paper's clipping of weights is not done.
 */
#ifndef QUANTIZE_AWQ_H
#define QUANTIZE_AWQ_H

#include "quantize/schemes.h"

typedef struct awq awq;

/* o->calibration_path: NULL for the built-in text. Same scales for any number of threads. */
hepta_status awq_search(const char *model, const scheme_options *o, awq **out, hepta_error *err);
void awq_free(awq *a);

/* The scales (columns) of a matrix of the model; NULL: none. */
const float *awq_scales(const awq *a, const char *name);

/* scheme_quantize_row() of x * s, divided by s again; s: NULL for 1. */
bool awq_quantize_row(const scheme *how, const float *s, float *x, uint32_t n);

#endif
