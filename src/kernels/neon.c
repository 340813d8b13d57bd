/*
 * neon.c - kernels for every AArch64: neon_kernels.h with widening products.
 */
#include "kernels/kernels.h"

#if defined(__aarch64__)

#define LEVEL BASELINE
#define KERNELS_NAME "neon"
#define KERNEL(name) name##_neon
#define MACS_PER_MICROSECOND 6000
#include "kernels/neon_kernels.h"

#else

typedef int kernels_neon_needs_aarch64; /* ISO C forbids an empty file */

#endif
