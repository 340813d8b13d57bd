/*
 * measure.h - how much the error of each matrix changes what the model predicts.
 */
#ifndef QUANTIZE_MEASURE_H
#define QUANTIZE_MEASURE_H

#include "quantize/calibrate.h"

/*
 * sensitivity[i] of the file's tensor i: the mean KL divergence of the next token from the
 * unquantized model's, per unit of the relative squared error of the code (about 4^-bits); 0 where
 * a tensor has no part in it. `saved` (n_layer * LLAMA_INPUTS + LLAMA_INPUTS): feedback.saved of
 * the inputs. The same for any number of threads and instruction set.
 */
hepta_status measure_sensitivity(const calibration_options *o, const container *file,
                                 const double *saved, double *sensitivity,
                                 hepta_progress_fn progress, void *progress_context,
                                 hepta_error *err);

/* About how many multiplications that takes. */
double measure_work(const container *file);

#endif
