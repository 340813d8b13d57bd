/*
 * schemes.h - plain scalar quantizers, as baselines to measure the trellis code against.
 *
 * Weights are rounded to integers with a scale and a zero point for each group of columns and
 * written back as F32 ("fake quantization"): the file shows what the scheme does to a model, and
 * says how large it would be. The bound on the error is proved in docs/QUALITY.md.
 */
#ifndef QUANTIZE_SCHEMES_H
#define QUANTIZE_SCHEMES_H

#include "base/base.h"

/* int4, int8: that many bits each. pair: 4 bits in even columns, 3 in odd ones: 7 for two. */
typedef enum scheme_kind { SCHEME_INT4, SCHEME_INT8, SCHEME_PAIR } scheme_kind;

typedef struct scheme {
    scheme_kind kind;
    uint32_t group; /* columns that share a scale and a zero point; 0: the whole row */
} scheme;

/* False: no scheme of this name. */
bool scheme_parse(const char *name, scheme_kind *out);

/*
 * Replaces the n finite weights of a row by what the scheme makes of them. `step`: NULL, or
 * receives the scale of each weight's group, so that |x - result| <= step / 2. False, with x
 * partly changed: a range is too wide for a binary16 scale.
 */
bool scheme_quantize_row(const scheme *s, float *x, uint32_t n, float *step);

/* Bits that a row of n weights takes: integers, and a binary16 scale and a zero point per group. */
uint64_t scheme_row_bits(const scheme *s, uint32_t n);

typedef struct scheme_options {
    scheme scheme;
    int threads; /* 0: physical cores */
    const char *tokenizer_path;
    bool awq;                     /* scale columns by their inputs first: quantize/awq.h */
    const char *calibration_path; /* for awq: text, or NULL for the built-in one */
    hepta_progress_fn progress;   /* may be NULL */
    void *progress_context;
} scheme_options;

/*
 * Writes the model `in_path` as a GGUF file of F32 weights, matrices replaced by what the scheme
 * makes of them; *bits_per_weight: of the file that the scheme would need, vectors in F32.
 */
hepta_status scheme_quantize_file(const char *in_path, const char *out_path,
                                  const scheme_options *options, double *bits_per_weight,
                                  hepta_error *err);

#endif
