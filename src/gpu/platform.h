/*
 * platform.h - what the kernels and the host code of src/gpu are written in: CUDA C++, HIP, or
 * plain C++ that emulates a thread block on the CPU.
 *
 * A kernel is a function of one struct of parameters. It is written in phases: the body of
 * THREADS(t) runs for every thread t of a block, and the next phase begins when all have ended. On
 * a GPU that is __syncthreads(); emulated, a loop over t. So a kernel cannot lack a barrier, and
 * what a thread keeps from one phase to the next stands in PRIVATE variables, registers on a GPU,
 * arrays over the threads here. Operations of a warp (WARP_*) stand between phases.
 *
 *   GPU_KERNEL_OF(threads, blocks) name(parameters p)
 *         a kernel for blocks of at most so many threads, with registers for so many of them
 *   BLOCK_X, BLOCK_Y, BLOCK_Z
 *   GPU_FN, GPU_AND_HOST_FN
 *         a function that kernels call; that the host calls, too
 *   THREADS(t) { }
 *         a phase, with a barrier behind it; no `return` or `break`
 *   THREADS_ALONE(t) { }
 *         without one: nothing it writes to memory is read before a barrier
 *   WARPS(w) { }
 *         what each warp does at its own pace: THREADS_ALONE of its own threads, and WARP_*
 *   NEXT_MAY_BEGIN(), AWAIT_KERNEL_BEFORE()
 *         kernels that overlap others have both, first of all: from the one on the next one's
 *         blocks may take their places; from the other on all that the kernels before wrote is
 *         there, and nobody reads any more what they read. In between only what no kernel
 *         writes, weights and tokens, may be read; anything may be fetched to the cache.
 *   SHARED(type, name, n), DYNAMIC(type, name)
 *         shared memory; the launch's
 *   PRIVATE(threads, type, name, dims)
 *         name[OWN(t)] is thread t's; threads: the most of a block
 *   WARP_SUM(name, i, mask)
 *         name[...][i] += that of lane ^ mask: integers, no order
 *   WARP_MAX(name, i)
 *         the largest of the warp, in all its lanes
 *   WARP_MMA(c, m, n, a, i, b, j)
 *         c[m][n] += a[i] b[j]: int8 tiles of 16 x 32 and 32 x 8
 *   copy_ahead(to, from, there), COPIES_END(), COPIES_AWAIT(n)
 *         copies to shared memory that arrive later; the end of a thread's set of them; waits
 *         until all but the last n sets of the thread are there
 *
 * Arithmetic: + - * / as written, none fused (--fmad=false), division and square root correctly
 * rounded, subnormals kept. docs/GPU.md, docs/NUMERICS.md.
 */
#ifndef GPU_PLATFORM_H
#define GPU_PLATFORM_H

#include "gpu/gpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Four words: the largest access of a thread. */
struct alignas(16) words4 {
    uint32_t v[4];
};

/* error_set() of base.h, which a backend cannot reach. */
static hepta_status fail(hepta_error *err, hepta_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static hepta_status fail(hepta_error *err, hepta_status status, const char *format, ...) {
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        err->status = status;
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return status;
}

static double host_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#if defined(__CUDACC__) || defined(__HIPCC__)
#include "gpu/platform_cuda.h"
#else
#include "gpu/platform_emulated.h"
#endif

/* ---- What all kernels use ---------------------------------------------- */

#include "kernels/math.h"

#define MINUS_INFINITY (-__builtin_huge_valf())

/* Adds 16 lanes in the tree (l, l+8), (l, l+4), (l, l+2), (l, l+1). */
GPU_FN float lanes_sum(const float *lane) {
    float s[8];
    for (int l = 0; l < 8; l++) {
        s[l] = lane[l] + lane[l + 8];
    }
    for (int l = 0; l < 4; l++) {
        s[l] = s[l] + s[l + 4];
    }
    return (s[0] + s[2]) + (s[1] + s[3]);
}

#endif
