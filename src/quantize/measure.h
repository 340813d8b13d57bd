/*
 * measure.h - how much the error of each matrix changes what the model predicts.
 */
#ifndef QUANTIZE_MEASURE_H
#define QUANTIZE_MEASURE_H

#include "quantize/calibrate.h"

/* How much may be spent: at most n_tokens of the text, about `work` multiplications. */
typedef struct measure_budget {
    uint32_t n_tokens;
    double work;
} measure_budget;

/*
 * sensitivity[i] of the file's tensor i: the mean KL divergence of the next token from the
 * unquantized model's, per unit of the relative squared error of the code (about 4^-bits); 0 where
 * a tensor has no part in it. `saved` (n_layer * LLAMA_INPUTS + LLAMA_INPUTS): feedback.saved of
 * the inputs. Where a pass for each tensor is beyond the budget, neighbouring layers share one:
 * noise is on all their tensors of a kind, and each is taken to have an equal part in what it does.
 * The same for any number of threads and instruction set.
 */
hepta_status measure_sensitivity(const calibration_options *o, const container *file,
                                 const measure_budget *budget, const double *saved,
                                 double *sensitivity, hepta_progress_fn progress,
                                 void *progress_context, hepta_error *err);

/* Whether the budget is enough for anything better than guesses. */
hepta_status measure_pays(const container *file, const measure_budget *budget, bool *out,
                          hepta_error *err);

#endif
