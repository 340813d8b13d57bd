/*
 * platform_emulated.h - platform.h in plain C++: the threads of a block one after the other.
 *
 * HEPTA_EMULATED_ORDER=reverse runs the threads of each phase from the last to the first: a kernel
 * in which two threads of a phase meet in memory gives other bits then. HEPTA_EMULATED_FAULT makes
 * the device fail: see fault().
 */
#ifndef GPU_PLATFORM_EMULATED_H
#define GPU_PLATFORM_EMULATED_H

#define GPU_NAME "emulated GPU"
#define GPU_BACKEND_NAME "emulated"
#define GPU_SWEEP_BYTES ((uint64_t)1 << 20)
#define GPU_TILE_ROUNDS 2
enum { GPU_HAS_MMA = 1, GPU_HAS_GRAPHS = 0 };

#define MATH_INLINE static inline
#if defined(__SANITIZE_ADDRESS__) /* or the compiler takes minutes */
#define GPU_FN static __attribute__((noinline, unused))
#else
#define GPU_FN static inline
#endif
#define GPU_AND_HOST_FN static inline
#define GPU_KERNEL_OF(threads, blocks) static void

typedef struct emulated_block {
    unsigned threads, x, y, z;
    unsigned from, to; /* threads that run: all, or a warp */
    bool reverse;
    void *dynamic;
} emulated_block;
/* The model without a call: GCC 12's LeakSanitizer fails with the others here. */
static thread_local emulated_block block_now __attribute__((tls_model("initial-exec")));

#define BLOCK_X (block_now.x)
#define BLOCK_Y (block_now.y)
#define BLOCK_Z (block_now.z)
#define BLOCK_THREADS (block_now.threads)

GPU_FN unsigned thread_number(unsigned i) {
    return block_now.reverse ? block_now.to - 1 - i : block_now.from + i;
}
#define THREADS(t)                                                                                 \
    for (unsigned t##_i = 0, t;                                                                    \
         t##_i < block_now.to - block_now.from && (t = thread_number(t##_i), true); t##_i++)
#define THREADS_ALONE(t) THREADS(t)
/* From here on the threads of warp number i run, or, past the last, all. */
GPU_FN bool next_warp(unsigned i, unsigned *w) {
    const unsigned n = block_now.threads / 32;
    const bool more = i < n;
    *w = block_now.reverse ? n - 1 - i : i;
    block_now.from = more ? 32 * *w : 0;
    block_now.to = more ? 32 * *w + 32 : block_now.threads;
    return more;
}
#define WARPS(w) for (unsigned w##_i = 0, w = 0; next_warp(w##_i, &w); w##_i++)
#define NEXT_MAY_BEGIN() ((void)0)
#define AWAIT_KERNEL_BEFORE() ((void)0)
#define SHARED(type, name, n)                                                                      \
    type name[n];                                                                                  \
    memset((void *)name, 0xa5, sizeof name) /* what was not written is not zero by luck */
#define DYNAMIC(type, name) type *name = (type *)block_now.dynamic
#define PRIVATE(threads, type, name, dims) type name[threads] dims
#define OWN(t) (t)
#define UNROLL
#define UNROLL_BY(n)

template <class X> GPU_FN void warp_sum(X *x, int i, unsigned mask) {
    for (unsigned w = block_now.from; w < block_now.to; w += 32) {
        int before[32];
        for (unsigned l = 0; l < 32; l++) {
            before[l] = x[w + l][i];
        }
        for (unsigned l = 0; l < 32; l++) {
            x[w + l][i] += before[l ^ mask];
        }
    }
}
template <class X> GPU_FN void warp_max(X *x, int i) {
    for (unsigned w = block_now.from; w < block_now.to; w += 32) {
        uint32_t most = 0;
        for (unsigned l = 0; l < 32; l++) {
            most = x[w + l][i] > most ? x[w + l][i] : most;
        }
        for (unsigned l = 0; l < 32; l++) {
            x[w + l][i] = most;
        }
    }
}
#define WARP_SUM(name, i, mask) warp_sum(name, i, mask)
#define WARP_MAX(name, i) warp_max(name, i)

/* Shared memory; integers, no order. */
GPU_FN void shared_add(int *p, int x) {
    *p += x;
}

/* Global memory that nobody writes meanwhile; aligned. */
GPU_FN words4 load_words4(const void *p) {
    return *(const words4 *)p;
}
#define load_result4 load_words4
constexpr uint32_t CACHE_LINE = 128;
GPU_FN void fetch_to_cache(const void *) {}

/* To shared memory, 16 bytes; zeros if not `there`. */
GPU_FN void copy_ahead(void *to, const void *from, bool there) {
    if (there) {
        memcpy(to, from, 16);
    } else {
        memset(to, 0, 16);
    }
}
#define COPIES_END() ((void)0)
#define COPIES_AWAIT(n) ((void)0)

GPU_FN uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t s = selector >> (4 * i), byte = (uint8_t)(bytes >> (s % 8 * 8));
        const uint32_t sign = (byte >> 7) * 255; /* eight times */
        out |= ((s & 8) != 0 ? sign : byte) << (8 * i);
    }
    return out;
}

/* x where a bit of mask is set, else y; the sum of three over GF(2). */
GPU_FN uint32_t bit_select(uint32_t mask, uint32_t x, uint32_t y) {
    return (x & mask) | (y & ~mask);
}
GPU_FN uint32_t xor3(uint32_t x, uint32_t y, uint32_t z) {
    return x ^ y ^ z;
}

/* The lower or upper 16 bits of x, its other bits any; and of their complement. */
template <bool UPPER> GPU_FN uint32_t half_word(uint32_t x) {
    return UPPER ? x >> 16 : x;
}
template <bool UPPER> GPU_FN uint32_t half_complement(uint32_t x) {
    return ~half_word<UPPER>(x);
}

GPU_FN int dot4(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 4; i++) {
        c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
    }
    return c;
}

/* PTX mma.m16n8k32 of int8: which lane holds what (PTX ISA, "Matrix Fragments for mma.m16n8k32").
 * Of lane l, with g = l / 4 and i = l % 4: a[0..3] are the bytes 4i .. 4i+3 of rows g, g+8, then
 * the same 16 columns on; b[0..1] those of column g; c[0..3] are (g, 2i), (g, 2i+1), (g+8, ...). */
template <class C, class A, class B>
GPU_FN void warp_mma(C *c, int m, int n, const A *a, int i, const B *b, int j) {
    for (unsigned w = block_now.from; w < block_now.to; w += 32) {
        int8_t x[16][32], y[8][32];
        for (unsigned l = 0; l < 32; l++) {
            const unsigned g = l / 4, k = l % 4 * 4;
            for (unsigned r = 0; r < 4; r++) {
                memcpy(&x[g + r % 2 * 8][r / 2 * 16 + k], &a[w + l][i][r], 4);
            }
            for (unsigned r = 0; r < 2; r++) {
                memcpy(&y[g][r * 16 + k], &b[w + l][j][r], 4);
            }
        }
        for (unsigned l = 0; l < 32; l++) {
            for (unsigned r = 0; r < 4; r++) {
                const int8_t *row = x[l / 4 + r / 2 * 8], *column = y[l % 4 * 2 + r % 2];
                int sum = 0;
                for (int k = 0; k < 32; k++) {
                    sum += row[k] * column[k];
                }
                c[w + l][m][n][r] += sum;
            }
        }
    }
}
#define WARP_MMA(c, m, n, a, i, b, j) warp_mma(c, m, n, a, i, b, j)

GPU_FN float divide(float a, float b) {
    return a / b;
}
GPU_FN float square_root(float a) {
    return __builtin_sqrtf(a);
}

/* As half_to_float and half_from_float of base/half.c. */
GPU_FN float half_load(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t bits = magnitude | 0x7f800000u;
    float x;
    if (magnitude < 0x0f800000u) {
        memcpy(&x, &magnitude, 4);
        x *= 0x1p112f;
        memcpy(&bits, &x, 4);
    }
    bits |= sign;
    memcpy(&x, &bits, 4);
    return x;
}
GPU_FN uint16_t half_store(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00);
    }
    if (magnitude >= 0x477ff000) {
        return (uint16_t)(sign | 0x7c00);
    }
    if (magnitude < 0x33000000) {
        return (uint16_t)sign;
    }
    const bool normal = magnitude >= 0x38800000;
    const uint32_t v = normal ? magnitude - (112u << 23) : (magnitude & 0x7fffff) | 0x800000;
    const uint32_t shift = normal ? 13 : 126 - (magnitude >> 23);
    return (uint16_t)(sign | (v + (1u << (shift - 1)) - 1 + (v >> shift & 1)) >> shift);
}

/* ---- The device -------------------------------------------------------- */

typedef int dev_stream;
typedef int dev_event;
typedef int dev_graph;

/*
 * HEPTA_EMULATED_FAULT, for tests: "driver" (there is none), "old" (too old a one), "none" (no
 * device), "memory=BYTES" (the device has this many), "lost=N" (it is gone at the Nth wait).
 */
static const char *fault(const char *name) {
    const char *what = getenv("HEPTA_EMULATED_FAULT");
    const size_t n = strlen(name);
    return what != NULL && strncmp(what, name, n) == 0 && (what[n] == '\0' || what[n] == '=')
               ? what + n + (what[n] == '=')
               : NULL;
}

static uint64_t emulated_used, emulated_waits;

static uint64_t emulated_memory(void) {
    const char *limit = fault("memory");
    return limit != NULL ? strtoull(limit, NULL, 10) : (uint64_t)64 << 30;
}

static hepta_status dev_open(int number, gpu_device_info *out, hepta_error *err) {
    if (fault("driver") != NULL) {
        return fail(err, HEPTA_ERROR_DEVICE, "no driver of the emulated GPU");
    }
    if (fault("old") != NULL) {
        return fail(err, HEPTA_ERROR_DEVICE, "the driver of the emulated GPU is too old");
    }
    const int n = fault("none") != NULL ? 0 : 2;
    if (number >= n) {
        return fail(err, HEPTA_ERROR_DEVICE, "there is no emulated GPU %d: the machine has %d",
                    number, n);
    }
    *out = gpu_device_info();
    snprintf(out->name, sizeof out->name, "%s %d", GPU_NAME, number);
    out->memory = emulated_memory();
    out->memory_free = out->memory - emulated_used;
    out->shared_bytes = 100 << 10;
    out->processors = 2;
    return HEPTA_OK;
}

static hepta_status dev_alloc(void **p, uint64_t n, hepta_error *err) {
    *p = NULL;
    if (n > emulated_memory() - emulated_used ||
        posix_memalign(p, 256, (size_t)(n > 0 ? n : 1) + 256) != 0) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for %llu bytes", (unsigned long long)n);
    }
    memcpy(*p, &n, sizeof n);
    *p = (uint8_t *)*p + 256;
    memset(*p, 0xa5, (size_t)n); /* what was not written is not zero by luck */
    emulated_used += n;
    return HEPTA_OK;
}

static void dev_free(void *p) {
    if (p != NULL) {
        uint64_t n;
        p = (uint8_t *)p - 256;
        memcpy(&n, p, sizeof n);
        emulated_used -= n;
        free(p);
    }
}

static hepta_status dev_host_alloc(void **p, uint64_t n, hepta_error *err) {
    if ((*p = calloc(1, (size_t)(n > 0 ? n : 1))) == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no host memory for %llu bytes",
                    (unsigned long long)n);
    }
    return HEPTA_OK;
}
static void dev_host_free(void *p) {
    free(p);
}

static hepta_status dev_copy(void *to, const void *from, uint64_t n, dev_stream, hepta_error *) {
    if (n > 0) {
        memcpy(to, from, (size_t)n);
    }
    return HEPTA_OK;
}
#define dev_upload dev_copy
#define dev_download dev_copy

static hepta_status dev_wait(dev_stream, hepta_error *err) {
    const char *when = fault("lost");
    if (when != NULL && ++emulated_waits >= strtoull(when, NULL, 10)) {
        return fail(err, HEPTA_ERROR_DEVICE, "%s: the device is lost; start the program again",
                    GPU_NAME);
    }
    return HEPTA_OK;
}

static hepta_status dev_stream_create(dev_stream *s, hepta_error *) {
    *s = 0;
    return HEPTA_OK;
}
static void dev_stream_free(dev_stream) {}
static dev_stream dev_overlapping(dev_stream s, bool) {
    return s;
}
static hepta_status dev_event_create(dev_event *e, hepta_error *) {
    *e = 0;
    return HEPTA_OK;
}
static void dev_event_free(dev_event) {}
static hepta_status dev_event_record(dev_event, dev_stream, hepta_error *) {
    return HEPTA_OK;
}
static hepta_status dev_event_await(dev_event, dev_stream, hepta_error *) {
    return HEPTA_OK;
}
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
static void dev_use(int) {}

typedef struct grid {
    unsigned x, y, z;
} grid;

template <class P>
static hepta_status launch(dev_stream, grid blocks, unsigned threads, size_t dynamic_bytes,
                           void (*kernel)(P), const P &p, hepta_error *err) {
    void *dynamic = malloc(dynamic_bytes + 1); /* of its own: a sanitizer sees what leaves it */
    if (dynamic == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for an emulated block");
    }
    const char *order = getenv("HEPTA_EMULATED_ORDER");
    block_now.threads = block_now.to = threads;
    block_now.from = 0;
    block_now.reverse = order != NULL && strcmp(order, "reverse") == 0;
    block_now.dynamic = dynamic;
    for (block_now.z = 0; block_now.z < blocks.z; block_now.z++) {
        for (block_now.y = 0; block_now.y < blocks.y; block_now.y++) {
            for (block_now.x = 0; block_now.x < blocks.x; block_now.x++) {
                kernel(p);
            }
        }
    }
    free(dynamic);
    return HEPTA_OK;
}

#endif
