/*
 * report.h - what hepta report measures, tensor by tensor and input by input.
 */
#ifndef CLI_REPORT_H
#define CLI_REPORT_H

#include "cli/cli.h"
#include "model/llama.h"

/* Kinds of matrices: those of a layer, then those that stand alone. */
enum {
    KIND_Q,
    KIND_K,
    KIND_V,
    KIND_O,
    KIND_GATE,
    KIND_UP,
    KIND_DOWN,
    LAYER_KINDS,
    KIND_EMBEDDING = LAYER_KINDS,
    KIND_HEAD,
    KINDS
};
extern const char *const kind_names[KINDS];         /* "attn_q" */
extern const char *const input_names[LLAMA_INPUTS]; /* "attn_q, attn_k, attn_v" */

/* A matrix of the base and its counterpart. */
typedef struct report_matrix {
    const matrix *base, *quantized;
    uint32_t layer, kind;
    double bits;         /* of the quantized one, per weight */
    double share;        /* of its bytes in all tensors' */
    double error;        /* |W' - W| / |W|, Frobenius norm */
    double output_error; /* |W' x - W x| / |W x| over the text's tokens; NAN: not measured */
    double total_error;  /* the same with the int8 inputs of a packed matrix */
    double sum_base, sum_output, sum_total; /* squares, so far */
} report_matrix;

/* Values of one kind: an input of linear layers before or after rotation. */
typedef struct spread {
    double min, max, rms;
    double kurtosis; /* mean x^4 / (mean x^2)^2: 3 for Gaussian values */
    double peak;     /* mean over tokens of max |x| / RMS of the token */
    uint64_t n, n_tokens;
    double sum2, sum4, sum_peak; /* so far */
} spread;

enum { LAYER_INPUTS = 4 }; /* all but the head's */

typedef struct report_data {
    const char *base_path, *quantized_path, *text_path; /* text_path may be NULL */
    hepta_model *base, *quantized;
    report_matrix *matrices; /* (n_matrices) layer by layer, then embedding and head */
    size_t n_matrices;
    spread *inputs;  /* (n_inputs): input i of layer l at LAYER_INPUTS l + i, the head's last */
    spread *rotated; /* the same after rotation; n is 0 where the matrices are not packed */
    size_t n_inputs; /* 0 without a text */
    size_t n_tokens;
} report_data;

/* "blk.3.attn_q", or the name of the tensor where it has no layer. */
const char *matrix_name(const report_matrix *m);

/* report_html.c: one page with everything in it. */
hepta_status report_write_html(const report_data *r, const char *path, hepta_error *err);

#endif
