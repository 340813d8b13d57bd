/*
 * score.h - figures from logits: log-probabilities, divergences, means with their errors.
 *
 * Everything is binary64 and in a fixed order: the same logits give the same figures, whatever
 * the number of threads.
 */
#ifndef CLI_SCORE_H
#define CLI_SCORE_H

#include <stddef.h>
#include <stdint.h>

/* ln(sum of exp(x)); the log-probability of token i is x[i] - log_sum_exp(x). */
double log_sum_exp(const float *x, uint32_t n);

/* The token with the highest logit, ties to the lowest id. */
uint32_t top_token(const float *x, uint32_t n);

/* KL(p || q) in nats of the distributions whose logits are p and q; their log_sum_exp is known. */
double kl_divergence(const float *p, const float *q, uint32_t n, double p_lse, double q_lse);

/* A mean, and its standard error: the sample's standard deviation / sqrt(n); 0 when n < 2. */
typedef struct estimate {
    double value, error;
} estimate;
estimate mean_of(const double *x, size_t n);
estimate share_of(size_t hits, size_t n); /* of independent trials; n = 0: 0 */

/* x sorted in ascending order; between two values linearly: 0.5 is the median. n >= 1. */
void sort_ascending(double *x, size_t n);
double percentile(const double *x, size_t n, double share);

#endif
