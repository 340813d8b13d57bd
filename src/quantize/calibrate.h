/*
 * calibrate.h - a text that goes through the unquantized model, layer by layer.
 */
#ifndef QUANTIZE_CALIBRATE_H
#define QUANTIZE_CALIBRATE_H

#include "model/llama.h"
#include "quantize/feedback.h"

/* The built-in text, src/quantize/sample.c. */
extern const char *const calibrate_sample[];
extern const size_t calibrate_sample_count;

typedef struct calibration calibration;

typedef struct calibration_options {
    const char *model, *tokenizer; /* paths; tokenizer may be NULL */
    const char *text_path;         /* NULL: the built-in text */
    uint32_t n_tokens;             /* at most so many, spread over the text */
    uint64_t rotation_seed;
    int threads;
} calibration_options;

hepta_status calibration_open(const calibration_options *o, calibration **out, hepta_error *err);
void calibration_free(calibration *c);
/* The session; its chunk is the n_tokens of the text. */
hepta_session *calibration_session(const calibration *c, uint32_t *n_tokens);

/* Called with the moments of each input of each layer, then of the head (layer n_layer). */
typedef hepta_status (*calibration_fn)(void *context, uint32_t layer, llama_input input,
                                       const moments *m);

/* Whether the moments of an input are wanted. */
typedef bool (*calibration_wants)(void *context, uint32_t layer, llama_input input);

/*
 * One pass of all tokens; `fn` is called as soon as an input is known and its moments are then
 * forgotten. Stops with the first status that is not HEPTA_OK.
 */
hepta_status calibration_run(calibration *c, calibration_wants wants, calibration_fn fn,
                             void *context, hepta_error *err);

/*
 * The place of a matrix in the pass: layer * LLAMA_INPUTS + input of the inputs it is multiplied
 * with; UINT32_MAX for one that is only looked up. `tied`: the embedding is also the head.
 */
uint32_t calibration_place(const char *tensor, uint32_t n_layer, bool tied);

#endif
