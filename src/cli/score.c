/*
 * score.c - figures from logits.
 */
#include "cli/score.h"

#include <math.h>
#include <stdlib.h>

double log_sum_exp(const float *x, uint32_t n) {
    double max = (double)x[0], sum = 0;
    for (uint32_t i = 1; i < n; i++) {
        max = (double)x[i] > max ? (double)x[i] : max;
    }
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)x[i] - max);
    }
    return max + log(sum);
}

uint32_t top_token(const float *x, uint32_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        best = x[i] > x[best] ? i : best;
    }
    return best;
}

double kl_divergence(const float *p, const float *q, uint32_t n, double p_lse, double q_lse) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        double log_p = (double)p[i] - p_lse;
        sum += exp(log_p) * (log_p - ((double)q[i] - q_lse));
    }
    return sum;
}

estimate mean_of(const double *x, size_t n) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i];
    }
    double mean = n > 0 ? sum / (double)n : 0;
    for (size_t i = 0; i < n; i++) {
        squares += (x[i] - mean) * (x[i] - mean);
    }
    return (estimate){mean, n > 1 ? sqrt(squares / (double)(n - 1) / (double)n) : 0};
}

estimate share_of(size_t hits, size_t n) {
    double share = n > 0 ? (double)hits / (double)n : 0;
    return (estimate){share, n > 1 ? sqrt(share * (1 - share) / (double)(n - 1)) : 0};
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void sort_ascending(double *x, size_t n) {
    qsort(x, n, sizeof *x, compare);
}

double percentile(const double *x, size_t n, double share) {
    double at = share * (double)(n - 1);
    size_t i = (size_t)at;
    return i + 1 < n ? x[i] + (at - (double)i) * (x[i + 1] - x[i]) : x[n - 1];
}
