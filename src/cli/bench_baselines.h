/*
 * bench_baselines.h - what others do, for comparison: matrix-vector products with weights of 32, 8
 * and 4 bits. For `hepta bench kernels` only; nothing here is part of the engine.
 */
#ifndef CLI_BENCH_BASELINES_H
#define CLI_BENCH_BASELINES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* y[r] = sum_c w[r * n_cols + c] x[c], as the compiler leaves a plain loop: one sum, in order. */
void matvec_f32_loop(const float *w, size_t n_rows, size_t n_cols, const float *x, float *y);

/* The same by OpenBLAS (cblas_sgemv), loaded when first asked for; false: not installed. */
bool matvec_f32_blas(const float *w, size_t n_rows, size_t n_cols, const float *x, int threads,
                     float *y);
bool blas_load(void);

/*
 * INT4 with a scale for every 32 weights: w = scale * (q - 8), 16 bytes of two weights each
 * (weights i and i + 16 of the block) after a binary16 scale, 18 bytes in all (GGML's Q4_0).
 */
enum { INT4_ITEMS = 32, INT4_BYTES = 18 };
void int4_quantize(const float *w, size_t n, uint8_t *out); /* n: a multiple of 32 */

/* int8 activations in blocks of 32. */
typedef struct int4_input {
    int8_t q[INT4_ITEMS];
    int32_t offset[INT4_ITEMS / 4]; /* -8 times the sums of four */
    float scale;
} int4_input;
void int4_quantize_input(const float *x, size_t n, int4_input *out);

typedef void (*int4_matvec)(const uint8_t *w, size_t n_rows, size_t n_blocks, const int4_input *x,
                            float *y);
/* Kernel i and its name, from plain to best; NULL past the last. *supported: by this CPU. */
int4_matvec int4_kernel(size_t i, const char **name, bool *supported);

/*
 * Products of int8 that one core can add up in a second, in thousand millions: VPDPBUSD on
 * registers alone. 0 where the CPU has no such instruction, or this build does not know it.
 */
double int8_peak(void);

#endif
