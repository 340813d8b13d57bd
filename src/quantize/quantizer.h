/*
 * quantizer.h - the state of one run of hepta_quantize(), and the coding of its rows.
 */
#ifndef QUANTIZE_QUANTIZER_H
#define QUANTIZE_QUANTIZER_H

#include "format/container.h"
#include "kernels/kernels.h"
#include "quantize/calibrate.h"
#include "quantize/measure.h"

/* The seed of the rotation's signs: one for all files, so that results can be compared. */
extern const uint64_t quantize_rotation_seed;

/* What an effort means; docs/QUALITY.md has what each gives. */
typedef struct effort {
    uint32_t n_tokens;      /* of the calibration text, if one pass takes no more than */
    double work;            /* ... so many multiplications; else less, down to LEAST_TOKENS */
    unsigned width, lag;    /* of the beam */
    double stretch;         /* of the row scales that it starts from: found by trial */
    bool refits;            /* the row scales */
    measure_budget measure; /* of sensitivities */
} effort;

typedef struct quantizer {
    const container *in;
    uint32_t n_layer;
    calibration_options calibration;
    hepta_writer *out;
    const kernels *kernels;
    const hepta_quantize_options *options;
    const effort *effort; /* of the options */
    int threads;
    uint64_t n_weights, n_done;
    const uint32_t *half_bits; /* of tensor i of the input */
    size_t *order;             /* numbers of the input's tensors in the order of the pass */
    uint32_t *place;           /* calibration_place() of tensor i */
    size_t n_written;          /* of `order` */
    const moments *moments;    /* of the input at hand; NULL: none */
    feedback *feedback;
    rotation *rotations[8]; /* by width; models have three or four widths */
    hepta_error *err;
} quantizer;

/* A chunk of rows on its way from the source to the file. */
typedef struct chunk {
    float *x;       /* (rows, n_padded): rotated weights */
    float *scale;   /* (rows) */
    uint8_t *code;  /* (rows, row_bytes): row by row, as the encoder writes them */
    uint8_t *v;     /* (threads, n_padded) */
    float *scratch; /* (threads, n_padded) */
} chunk;

/* Room for `rows` rows of n_padded weights; HEPTA_ERROR_MEMORY. To be freed even then. */
hepta_status chunk_create(const quantizer *q, const char *name, uint32_t rows, uint32_t n_padded,
                          size_t row_bytes, chunk *c);
void chunk_free(chunk *c);

/* Number of the first element that is NaN or infinite; n if there is none. */
uint32_t find_not_finite(const float *x, uint32_t n);

/*
 * Reads n rows of t, rotated, into c->x: those that `rows` lists, or without it `first` and the
 * next. Fails where one is not finite.
 */
hepta_status load_rows(const quantizer *q, const tensor *t, const rotation *r, const uint32_t *rows,
                       uint64_t first, uint32_t n, chunk *c);

/* Codes and scales of the n rows in c->x: with q->feedback, or each for itself. */
hepta_status encode_rows(const quantizer *q, uint32_t half_bits, const rotation *r, uint32_t n,
                         chunk *c, size_t row_bytes);

/* resume.c: a digest of what decides the tensors of the output, beside its header. */
hepta_status resume_identity(const container *in, const hepta_quantize_options *options,
                             uint8_t digest[32], hepta_error *err);

#endif
