/*
 * neon_dotprod.c - kernels for AArch64 with FEAT_DotProd (SDOT): neon_kernels.h.
 */
#include "kernels/kernels.h"

#if defined(__aarch64__)

#define LEVEL DOTPROD
#define KERNELS_NAME "neon_dotprod"
#define KERNEL(name) name##_neon_dotprod
#define MACS_PER_MICROSECOND 8000
#include "kernels/neon_kernels.h"

#else

typedef int kernels_neon_dotprod_needs_aarch64; /* ISO C forbids an empty file */

#endif
