/*
 * platform_cuda.h - platform.h in CUDA C++ and HIP.
 *
 * HIP has CUDA's functions under its own names, which the macros below map; its warps may have 64
 * lanes (shuffles are told 32), its matrix instructions another layout, so that their tiles are dot
 * products of four bytes there, and there are no graphs.
 */
#ifndef GPU_PLATFORM_CUDA_H
#define GPU_PLATFORM_CUDA_H

#if defined(__HIPCC__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#define GPU_NAME "HIP"
#define GPU_BACKEND_NAME "hip"
#define cudaDeviceProp hipDeviceProp_t
#define cudaDriverGetVersion hipDriverGetVersion
#define cudaError_t hipError_t
#define cudaErrorInsufficientDriver hipErrorInsufficientDriver
#define cudaErrorMemoryAllocation hipErrorOutOfMemory
#define cudaEventCreateWithFlags hipEventCreateWithFlags
#define cudaEventDestroy hipEventDestroy
#define cudaEventDisableTiming hipEventDisableTiming
#define cudaEventRecord hipEventRecord
#define cudaEvent_t hipEvent_t
#define cudaFree hipFree
#define cudaFreeHost hipHostFree
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncAttributes hipFuncAttributes
#define cudaFuncGetAttributes hipFuncGetAttributes
#define cudaFuncSetAttribute hipFuncSetAttribute
#define cudaGetDeviceCount hipGetDeviceCount
#define cudaGetDeviceProperties hipGetDeviceProperties
#define cudaGetErrorName hipGetErrorName
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaHostAlloc hipHostMalloc
#define cudaHostAllocDefault hipHostMallocDefault
#define cudaLaunchKernel hipLaunchKernel
#define cudaMalloc hipMalloc
#define cudaMemGetInfo hipMemGetInfo
#define cudaMemcpyAsync hipMemcpyAsync
#define cudaMemcpyDefault hipMemcpyDefault
#define cudaSetDevice hipSetDevice
#define cudaStreamCreateWithFlags hipStreamCreateWithFlags
#define cudaStreamDestroy hipStreamDestroy
#define cudaStreamNonBlocking hipStreamNonBlocking
#define cudaStreamSynchronize hipStreamSynchronize
#define cudaStreamWaitEvent hipStreamWaitEvent
#define cudaStream_t hipStream_t
#define cudaSuccess hipSuccess
enum { GPU_HAS_MMA = 0, GPU_HAS_GRAPHS = 0 };
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GPU_NAME "CUDA"
#define GPU_BACKEND_NAME "cuda"
enum { GPU_HAS_MMA = 1, GPU_HAS_GRAPHS = 1 };
#endif

#define GPU_SWEEP_BYTES ((uint64_t)4 << 30)
#define GPU_TILE_ROUNDS 20000
#define MATH_INLINE static __host__ __device__ __forceinline__
#define GPU_FN static __device__ __forceinline__
#define GPU_AND_HOST_FN MATH_INLINE
#define GPU_KERNEL_OF(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) PRAGMA(unroll n)

#define BLOCK_X blockIdx.x
#define BLOCK_Y blockIdx.y
#define BLOCK_Z blockIdx.z
#define BLOCK_THREADS blockDim.x

#define THREADS_ALONE(t) for (unsigned t = threadIdx.x, t##_more = 1; t##_more != 0; t##_more = 0)
#define THREADS(t)                                                                                 \
    for (unsigned t = threadIdx.x, t##_more = 1; t##_more != 0; t##_more = 0, __syncthreads())
#define WARPS(w) for (unsigned w = threadIdx.x / 32, w##_more = 1; w##_more != 0; w##_more = 0)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define NEXT_MAY_BEGIN() asm volatile("griddepcontrol.launch_dependents;" ::: "memory")
#define AWAIT_KERNEL_BEFORE() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define NEXT_MAY_BEGIN() ((void)0)
#define AWAIT_KERNEL_BEFORE() ((void)0)
#endif
constexpr uint32_t CACHE_LINE = 128;
/* To the cache that all multiprocessors share; of use where kernels overlap. */
GPU_FN void fetch_to_cache(const void *p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
    (void)p;
#endif
}
#define SHARED(type, name, n) __shared__ type name[n]
#define DYNAMIC(type, name)                                                                        \
    extern __shared__ words4 dynamic_memory[];                                                     \
    type *name = (type *)dynamic_memory
#define PRIVATE(threads, type, name, dims) type name[1] dims
#define OWN(t) 0

#if defined(__HIPCC__)
#define SHUFFLE_XOR(x, mask) __shfl_xor(x, (int)(mask), 32)
#else
#define SHUFFLE_XOR(x, mask) __shfl_xor_sync(0xffffffffu, x, (int)(mask))
#endif
#define WARP_SUM(name, i, mask) name[0][i] += SHUFFLE_XOR(name[0][i], mask)
GPU_FN uint32_t warp_max(uint32_t x) {
    for (unsigned mask = 1; mask < 32; mask *= 2) {
        const uint32_t y = SHUFFLE_XOR(x, mask);
        x = y > x ? y : x;
    }
    return x;
}
#define WARP_MAX(name, i) name[0][i] = warp_max(name[0][i])

GPU_FN void shared_add(int *p, int x) {
    atomicAdd(p, x);
}

/* Weights. */
GPU_FN words4 load_words4(const void *p) {
    const uint4 x = __ldg((const uint4 *)p);
    return words4{{x.x, x.y, x.z, x.w}};
}
/* What a kernel before wrote, perhaps after this one began. */
GPU_FN words4 load_result4(const void *p) {
    const uint4 x = *(const uint4 *)p;
    return words4{{x.x, x.y, x.z, x.w}};
}
/* To shared memory, 16 bytes; zeros if not `there`. */
GPU_FN void copy_ahead(void *to, const void *from, bool there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(
                     (unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#else
    const words4 none = {};
    *(words4 *)to = there ? load_words4(from) : none;
#endif
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define COPIES_END() asm volatile("cp.async.commit_group;" ::: "memory")
#define COPIES_AWAIT(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")
#else
#define COPIES_END() ((void)0)
#define COPIES_AWAIT(n) ((void)0)
#endif

/* With the sign mode of PRMT: a selector of 8 + i gives the sign of byte i, eight times. */
GPU_FN uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__HIPCC__)
    /* Where the entries' signs are clear: bytes of selectors above 7 become 0. */
    const uint32_t s = selector & 0x7777u;
    const uint32_t keep = ~selector & 0x8888u;
    const uint32_t bytes = __builtin_amdgcn_perm(
        b, a, (s & 7) | (s << 4 & 0x700) | (s << 8 & 0x70000) | (s << 12 & 0x7000000));
    const uint32_t ones =
        (keep >> 3 & 1) | (keep << 1 & 0x100) | (keep << 5 & 0x10000) | (keep << 9 & 0x1000000);
    return bytes & (ones * 255u);
#else
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
#endif
}

/* x where a bit of mask is set, else y; the sum of three over GF(2). One instruction each, which
 * compilers tear apart when they see the formula. */
GPU_FN uint32_t bit_select(uint32_t mask, uint32_t x, uint32_t y) {
#if defined(__HIPCC__)
    return (x & mask) | (y & ~mask);
#else
    uint32_t z;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(z) : "r"(mask), "r"(x), "r"(y));
    return z;
#endif
}
GPU_FN uint32_t xor3(uint32_t x, uint32_t y, uint32_t z) {
#if defined(__HIPCC__)
    return x ^ y ^ z;
#else
    uint32_t sum;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
#endif
}

/*
 * The lower or upper 16 bits of x, its other bits any; and of their complement. As dot products, of
 * (lower, upper) with constants: those have a pipe of their own, while shifts and logic share that
 * of the permutes, which is the busiest.
 */
template <bool UPPER> GPU_FN uint32_t half_word(uint32_t x) {
#if defined(__HIPCC__)
    return UPPER ? x >> 16 : x;
#else
    return UPPER ? __dp2a_lo(x, 0x0100u, 0u) : x;
#endif
}
template <bool UPPER> GPU_FN uint32_t half_complement(uint32_t x) {
#if defined(__HIPCC__)
    return ~half_word<UPPER>(x);
#else
    int y;
    asm("dp2a.lo.u32.s32 %0, %1, %2, %3;"
        : "=r"(y)
        : "r"(x), "r"(UPPER ? 0xff00 : 0xff), "r"(0xffff));
    return (uint32_t)y;
#endif
}

GPU_FN int dot4(uint32_t a, uint32_t b, int c) {
#if defined(__HIPCC__)
    for (int i = 0; i < 4; i++) {
        c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
    }
    return c;
#else
    return __dp4a((int)a, (int)b, c);
#endif
}

/* PTX mma.m16n8k32 of int8: the fragments are described in platform_emulated.h. */
GPU_FN void warp_mma(int *c, const uint32_t *a, const uint32_t *b) {
#if defined(__HIPCC__)
    const int lane = (int)(threadIdx.x % 32), g = lane / 4;
    for (int k = 0; k < 4; k++) { /* what each of the four lanes of a row has */
        for (int r = 0; r < 4; r++) {
            const int from = lane % 4 * 8 + r % 2 * 4 + k; /* of column 2 (lane % 4) + r % 2 */
            for (int half = 0; half < 2; half++) {
                const uint32_t x = __shfl(a[r / 2 + 2 * half], 4 * g + k, 32);
                c[r] = dot4(x, __shfl(b[half], from, 32), c[r]);
            }
        }
    }
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    /* Turing has tiles of 8 x 16 and 16 x 8: four of them. */
    for (int half = 0; half < 2; half++) {
        for (int k = 0; k < 2; k++) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2 * half]), "+r"(c[2 * half + 1])
                : "r"(a[half + 2 * k]), "r"(b[k]));
        }
    }
#endif
}
#define WARP_MMA(c, m, n, a, i, b, j) warp_mma(c[0][m][n], a[0][i], b[0][j])

/* __fdiv_rn, __fsqrt_rn: correctly rounded whatever the flags. */
GPU_FN float divide(float a, float b) {
    return __fdiv_rn(a, b);
}
GPU_FN float square_root(float a) {
    return __fsqrt_rn(a);
}
GPU_FN float half_load(uint16_t h) {
    return __half2float(__ushort_as_half(h));
}
GPU_FN uint16_t half_store(float x) {
    return __half_as_ushort(__float2half_rn(x));
}

/* ---- The device -------------------------------------------------------- */

typedef struct dev_stream {
    cudaStream_t stream;
    bool overlap; /* kernels may begin before the one before has ended: AWAIT_KERNEL_BEFORE() */
} dev_stream;
typedef cudaEvent_t dev_event;

static hepta_status dev_check(cudaError_t code, const char *what, hepta_error *err) {
    if (code == cudaSuccess) {
        return HEPTA_OK;
    }
    (void)cudaGetLastError(); /* what is not fatal is forgotten */
    if (code == cudaErrorMemoryAllocation) {
        return fail(err, HEPTA_ERROR_MEMORY, "%s: out of the GPU's memory", what);
    }
    return fail(err, HEPTA_ERROR_DEVICE,
                "%s: %s: %s; the GPU is lost to this program, start it again", what,
                cudaGetErrorName(code), cudaGetErrorString(code));
}

static void dev_use(int number) {
    (void)cudaSetDevice(number);
}

#if !defined(__HIPCC__)
static __global__ void empty_kernel() {} /* tells for what this was compiled */
#endif

static hepta_status dev_open(int number, gpu_device_info *out, hepta_error *err) {
    int n = 0, driver = 0;
    cudaError_t code = cudaGetDeviceCount(&n);
    if (code == cudaErrorInsufficientDriver) {
        (void)cudaGetLastError();
        (void)cudaDriverGetVersion(&driver);
        return driver == 0
                   ? fail(err, HEPTA_ERROR_DEVICE, "no driver of a GPU for %s is installed",
                          GPU_NAME)
                   : fail(err, HEPTA_ERROR_DEVICE,
                          "the GPU's driver is too old: it is for %s %d.%d, and this was built "
                          "with a later one; update the driver",
                          GPU_NAME, driver / 1000, driver % 1000 / 10);
    }
    if (code != cudaSuccess || number >= n) {
        (void)cudaGetLastError();
        return fail(err, HEPTA_ERROR_DEVICE, "there is no GPU %d for %s: the machine has %d%s%s",
                    number, GPU_NAME, n, code != cudaSuccess ? ", " : "",
                    code != cudaSuccess ? cudaGetErrorString(code) : "");
    }
    cudaDeviceProp p;
    size_t free_bytes = 0, all = 0;
    hepta_status status = dev_check(cudaGetDeviceProperties(&p, number), "the GPU", err);
    status = status != HEPTA_OK ? status : dev_check(cudaSetDevice(number), "the GPU", err);
    status =
        status != HEPTA_OK ? status : dev_check(cudaMemGetInfo(&free_bytes, &all), "the GPU", err);
    if (status != HEPTA_OK) {
        return status;
    }
    *out = gpu_device_info();
    snprintf(out->name, sizeof out->name, "%s", p.name);
    out->memory = all, out->memory_free = free_bytes;
#if defined(__HIPCC__)
    out->shared_bytes = (uint32_t)p.sharedMemPerBlock;
#else
    out->shared_bytes = (uint32_t)p.sharedMemPerBlockOptin;
    if (p.major * 10 + p.minor < 75) {
        return fail(err, HEPTA_ERROR_DEVICE,
                    "%s has compute capability %d.%d, and 7.5 is the least", p.name, p.major,
                    p.minor);
    }
#endif
    out->processors = p.multiProcessorCount;
    (void)cudaDriverGetVersion(&driver);
#if !defined(__HIPCC__)
    /* From sm_90 on, if the code is, which waits; in graphs that are captured since CUDA 12.3. */
    cudaFuncAttributes built = {};
    out->overlaps = p.major >= 9 && driver >= 12030 &&
                    cudaFuncGetAttributes(&built, (const void *)empty_kernel) == cudaSuccess &&
                    built.ptxVersion >= 90;
#endif
    return HEPTA_OK;
}

static hepta_status dev_alloc(void **p, uint64_t n, hepta_error *err) {
    const cudaError_t code = cudaMalloc(p, n > 0 ? n : 1);
    if (code == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, all = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&free_bytes, &all);
        return fail(err, HEPTA_ERROR_MEMORY,
                    "the GPU has no memory for %.2f GiB: %.2f of %.2f GiB are free",
                    (double)n / 0x1p30, (double)free_bytes / 0x1p30, (double)all / 0x1p30);
    }
    return dev_check(code, "memory of the GPU", err);
}
static void dev_free(void *p) {
    (void)cudaFree(p);
}

static hepta_status dev_host_alloc(void **p, uint64_t n, hepta_error *err) {
    return dev_check(cudaHostAlloc(p, n > 0 ? n : 1, cudaHostAllocDefault),
                     "pinned memory of the host", err);
}
static void dev_host_free(void *p) {
    if (p != NULL) {
        (void)cudaFreeHost(p);
    }
}

static hepta_status dev_copy(void *to, const void *from, uint64_t n, dev_stream s,
                             hepta_error *err) {
    return n == 0 ? HEPTA_OK
                  : dev_check(cudaMemcpyAsync(to, from, n, cudaMemcpyDefault, s.stream),
                              "copying to or from the GPU", err);
}
#define dev_upload dev_copy
#define dev_download dev_copy

static hepta_status dev_wait(dev_stream s, hepta_error *err) {
    return dev_check(cudaStreamSynchronize(s.stream), "computing on the GPU", err);
}

static hepta_status dev_stream_create(dev_stream *s, hepta_error *err) {
    s->overlap = false;
    return dev_check(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking),
                     "a stream of the GPU", err);
}
static void dev_stream_free(dev_stream s) {
    (void)cudaStreamDestroy(s.stream);
}
static dev_stream dev_overlapping(dev_stream s, bool on) {
    s.overlap = on;
    return s;
}
static hepta_status dev_event_create(dev_event *e, hepta_error *err) {
    return dev_check(cudaEventCreateWithFlags(e, cudaEventDisableTiming), "an event of the GPU",
                     err);
}
static void dev_event_free(dev_event e) {
    (void)cudaEventDestroy(e);
}
static hepta_status dev_event_record(dev_event e, dev_stream s, hepta_error *err) {
    return dev_check(cudaEventRecord(e, s.stream), "an event of the GPU", err);
}
static hepta_status dev_event_await(dev_event e, dev_stream s, hepta_error *err) {
    return dev_check(cudaStreamWaitEvent(s.stream, e, 0), "an event of the GPU", err);
}

#if defined(__HIPCC__)
typedef int dev_graph;
static hepta_status dev_capture_begin(dev_stream, hepta_error *) {
    return HEPTA_OK;
}
static hepta_status dev_capture_end(dev_stream, dev_graph *, hepta_error *) {
    return HEPTA_OK;
}
static hepta_status dev_graph_run(dev_graph, dev_stream, hepta_error *) {
    return HEPTA_OK;
}
static void dev_graph_free(dev_graph) {}
#else
typedef cudaGraphExec_t dev_graph;
static hepta_status dev_capture_begin(dev_stream s, hepta_error *err) {
    return dev_check(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal),
                     "capturing a graph", err);
}
static hepta_status dev_capture_end(dev_stream s, dev_graph *out, hepta_error *err) {
    cudaGraph_t graph;
    hepta_status status =
        dev_check(cudaStreamEndCapture(s.stream, &graph), "capturing a graph", err);
    if (status == HEPTA_OK) {
        status = dev_check(cudaGraphInstantiate(out, graph, 0), "making a graph", err);
        (void)cudaGraphDestroy(graph);
    }
    return status;
}
static hepta_status dev_graph_run(dev_graph g, dev_stream s, hepta_error *err) {
    return dev_check(cudaGraphLaunch(g, s.stream), "launching a graph", err);
}
static void dev_graph_free(dev_graph g) {
    (void)cudaGraphExecDestroy(g);
}
#endif

typedef struct grid {
    unsigned x, y, z;
} grid;

template <class P>
static hepta_status launch(dev_stream s, grid blocks, unsigned threads, size_t dynamic_bytes,
                           void (*kernel)(P), const P &p, hepta_error *err) {
    if (dynamic_bytes > 47 << 10) { /* 48 KiB with what a kernel has of fixed size */
        cudaFuncAttributes now;
        cudaError_t code = cudaFuncGetAttributes(&now, (const void *)kernel);
        if (code == cudaSuccess && now.maxDynamicSharedSizeBytes < (int)dynamic_bytes) {
            code = cudaFuncSetAttribute((const void *)kernel,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)dynamic_bytes);
        }
        const hepta_status status = dev_check(code, "shared memory of a kernel", err);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    void *parameters[] = {(void *)(uintptr_t)&p};
    const dim3 n_blocks(blocks.x, blocks.y, blocks.z);
#if !defined(__HIPCC__)
    if (s.overlap) {
        cudaLaunchAttribute overlap = {};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = n_blocks, config.blockDim = dim3(threads);
        config.dynamicSmemBytes = dynamic_bytes, config.stream = s.stream;
        config.attrs = &overlap, config.numAttrs = 1;
        return dev_check(cudaLaunchKernelExC(&config, (const void *)kernel, parameters),
                         "launching a kernel", err);
    }
#endif
    return dev_check(cudaLaunchKernel((const void *)kernel, n_blocks, dim3(threads), parameters,
                                      dynamic_bytes, s.stream),
                     "launching a kernel", err);
}

#endif
