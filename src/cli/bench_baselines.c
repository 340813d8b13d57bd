/*
 * bench_baselines.c - matrix-vector products as others do them.
 */
#include "cli/bench_baselines.h"

#include "base/base.h"
#include "cli/cli.h"

#include <dlfcn.h>
#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* ---- 32 bits ----------------------------------------------------------- */

void matvec_f32_loop(const float *w, size_t n_rows, size_t n_cols, const float *x, float *y) {
    for (size_t r = 0; r < n_rows; r++) {
        float sum = 0;
        for (size_t c = 0; c < n_cols; c++) {
            sum += w[r * n_cols + c] * x[c];
        }
        y[r] = sum;
    }
}

typedef void (*sgemv_fn)(int order, int transpose, int m, int n, float alpha, const float *a,
                         int lda, const float *x, int incx, float beta, float *y, int incy);
typedef void (*set_threads_fn)(int n);

static struct {
    bool tried;
    sgemv_fn sgemv;
    set_threads_fn set_threads;
} blas;

bool blas_load(void) {
    if (!blas.tried) {
        blas.tried = true;
        void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
        if (library != NULL) { /* POSIX: dlsym's result may be a function */
            *(void **)&blas.sgemv = dlsym(library, "cblas_sgemv");
            *(void **)&blas.set_threads = dlsym(library, "openblas_set_num_threads");
        }
    }
    return blas.sgemv != NULL && blas.set_threads != NULL;
}

bool matvec_f32_blas(const float *w, size_t n_rows, size_t n_cols, const float *x, int threads,
                     float *y) {
    enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111 };
    if (!blas_load()) {
        return false;
    }
    blas.set_threads(threads);
    blas.sgemv(ROW_MAJOR, NO_TRANSPOSE, (int)n_rows, (int)n_cols, 1, w, (int)n_cols, x, 1, 0, y, 1);
    return true;
}

/* ---- 4 bits ------------------------------------------------------------ */

void int4_quantize(const float *w, size_t n, uint8_t *out) {
    for (size_t b = 0; b < n / INT4_ITEMS; b++, w += INT4_ITEMS, out += INT4_BYTES) {
        float extreme = 0;
        for (int i = 0; i < INT4_ITEMS; i++) {
            extreme = fabsf(w[i]) > fabsf(extreme) ? w[i] : extreme;
        }
        uint16_t half = half_from_float(extreme / -8); /* the extreme becomes q = 0 */
        float scale = half_to_float(half);
        uint8_t q[INT4_ITEMS];
        for (int i = 0; i < INT4_ITEMS; i++) {
            float v = scale != 0 ? rintf(w[i] / scale) + 8 : 8;
            q[i] = (uint8_t)(v < 0 ? 0 : v > 15 ? 15 : v);
        }
        memcpy(out, &half, 2);
        for (int i = 0; i < INT4_ITEMS / 2; i++) {
            out[2 + i] = (uint8_t)(q[i] | q[i + 16] << 4);
        }
    }
}

void int4_quantize_input(const float *x, size_t n, int4_input *out) {
    for (size_t b = 0; b < n / INT4_ITEMS; b++, x += INT4_ITEMS, out++) {
        float extreme = 0;
        for (int i = 0; i < INT4_ITEMS; i++) {
            extreme = fabsf(x[i]) > extreme ? fabsf(x[i]) : extreme;
        }
        out->scale = extreme / 127;
        memset(out->offset, 0, sizeof out->offset);
        for (int i = 0; i < INT4_ITEMS; i++) {
            out->q[i] = (int8_t)(extreme > 0 ? rintf(x[i] * (127 / extreme)) : 0);
            out->offset[i / 4] -= 8 * out->q[i];
        }
    }
}

static void int4_plain(const uint8_t *w, size_t n_rows, size_t n_blocks, const int4_input *x,
                       float *y) {
    for (size_t r = 0; r < n_rows; r++) {
        float sum = 0;
        for (size_t b = 0; b < n_blocks; b++, w += INT4_BYTES) {
            int32_t dot = 0;
            for (int i = 0; i < INT4_ITEMS / 2; i++) {
                dot += ((w[2 + i] & 15) - 8) * x[b].q[i] + ((w[2 + i] >> 4) - 8) * x[b].q[i + 16];
            }
            sum += half_to_float(load_u16(w)) * x[b].scale * (float)dot;
        }
        y[r] = sum;
    }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) static float add_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

__attribute__((target("avx2,fma,f16c"))) static void
int4_avx2(const uint8_t *w, size_t n_rows, size_t n_blocks, const int4_input *x, float *y) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (size_t r = 0; r < n_rows; r++) {
        __m256 sum = _mm256_setzero_ps();
        for (size_t b = 0; b < n_blocks; b++, w += INT4_BYTES) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(w + 2));
            __m256i q = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), low);
            __m256i in = _mm256_loadu_si256((const __m256i *)(const void *)x[b].q);
            __m256i dot = _mm256_madd_epi16(_mm256_maddubs_epi16(q, in), ones);
            dot = _mm256_add_epi32(dot,
                                   _mm256_loadu_si256((const __m256i *)(const void *)x[b].offset));
            __m256 scale = _mm256_set1_ps(_cvtsh_ss(load_u16(w)) * x[b].scale);
            sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum);
        }
        y[r] = add_lanes(sum);
    }
}

#define AVX512_VNNI "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"
__attribute__((target(AVX512_VNNI))) static void
int4_vnni(const uint8_t *w, size_t n_rows, size_t n_blocks, const int4_input *x, float *y) {
    const __m256i low = _mm256_set1_epi8(15);
    for (size_t r = 0; r < n_rows; r++) {
        __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (size_t b = 0; b < n_blocks; b++, w += INT4_BYTES) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(w + 2));
            __m256i q = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), low);
            __m256i in = _mm256_loadu_si256((const __m256i *)(const void *)x[b].q);
            __m256i dot = _mm256_loadu_si256((const __m256i *)(const void *)x[b].offset);
            dot = _mm256_dpbusd_epi32(dot, q, in);
            __m256 scale = _mm256_set1_ps(_cvtsh_ss(load_u16(w)) * x[b].scale);
            sum[b & 1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum[b & 1]);
        }
        y[r] = add_lanes(_mm256_add_ps(sum[0], sum[1]));
    }
}

static bool has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_vnni(void) {
    return has_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#endif

double int8_peak(void) {
#if defined(__x86_64__)
    enum { ROUNDS = 1 << 20, PER_ROUND = 12, PRODUCTS = 64, PASSES = 8 };
    double best = 0;
    for (int pass = 0; pass < PASSES && has_vnni(); pass++) {
        double started = clock_seconds();
        for (int i = 0; i < ROUNDS; i++) { /* the sums are of no use: nothing may be left out */
            __asm__ volatile("vpdpbusd %%zmm30, %%zmm31, %%zmm0\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm1\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm2\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm3\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm4\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm5\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm6\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm7\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm8\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm9\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm10\n\t"
                             "vpdpbusd %%zmm30, %%zmm31, %%zmm11"
                             :
                             :
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                               "xmm8", "xmm9", "xmm10", "xmm11");
        }
        double speed = 1e-9 * ROUNDS * PER_ROUND * PRODUCTS / (clock_seconds() - started);
        best = speed > best ? speed : best;
    }
    return best;
#else
    return 0;
#endif
}

static bool has_any(void) {
    return true;
}

int4_matvec int4_kernel(size_t i, const char **name, bool *supported) {
    static const struct {
        const char *name;
        int4_matvec run;
        bool (*supported)(void);
    } all[] = {
        {"plain C", int4_plain, has_any},
#if defined(__x86_64__)
        {"avx2", int4_avx2, has_avx2},
        {"avx512vnni", int4_vnni, has_vnni},
#endif
    };
    if (i >= sizeof all / sizeof all[0]) {
        return NULL;
    }
    *name = all[i].name;
    *supported = all[i].supported();
    return all[i].run;
}
