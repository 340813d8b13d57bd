/*
 * neon_i8mm.c - kernels for AArch64 with FEAT_DotProd, FEAT_I8MM (SMMLA) and FEAT_SHA3 (EOR3):
 * neon_kernels.h.
 */
#include "kernels/kernels.h"

#if defined(__aarch64__)

#define LEVEL I8MM
#define KERNELS_NAME "neon_i8mm"
#define KERNEL(name) name##_neon_i8mm
#define MACS_PER_MICROSECOND 8000
#include "kernels/neon_kernels.h"

#else

typedef int kernels_neon_i8mm_needs_aarch64; /* ISO C forbids an empty file */

#endif
