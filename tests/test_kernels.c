/*
 * test_kernels.c - elementary functions against libm, the reference kernels against independent
 * computations, and every other kernel table against the reference by memcmp.
 *
 * Inputs and outputs lie against guard pages, so that a kernel that reads or writes past an end
 * is a crash. Shapes cover 0, 1, lane widths and one more or less, and large ones; values cover
 * zeros, one-hot, extremes, subnormals and random numbers.
 */
#include "test.h"

#include "code/code.h"
#include "format/container.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- Guarded memory ---------------------------------------------------- */

/* `n` bytes of which the last (or, with at_start, the first) touches an unmapped page. The test's
 * process ends soon: nothing is freed but by guard_reset. */
static struct {
    void *base;
    size_t size;
} guarded[64];
static size_t n_guarded;

static void *guard_alloc(size_t n, bool at_start) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (n + page - 1) / page * page + page;
    uint8_t *base =
        mmap(NULL, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base != MAP_FAILED && n_guarded < 64);
    mprotect(base, page, PROT_NONE);
    mprotect(base + page + body, page, PROT_NONE);
    guarded[n_guarded].base = base;
    guarded[n_guarded++].size = body + 2 * page;
    return at_start ? base + page : base + page + body - n;
}

static void guard_reset(void) {
    while (n_guarded > 0) {
        n_guarded--;
        munmap(guarded[n_guarded].base, guarded[n_guarded].size);
    }
}

/* A guarded copy. */
static void *guard_copy(const void *data, size_t n, bool at_start) {
    void *p = guard_alloc(n, at_start);
    memcpy(p, data, n);
    return p;
}

/* ---- Values ------------------------------------------------------------ */

enum { ZEROS, ONE_HOT, EXTREMES, SUBNORMALS, RANDOM, N_PATTERNS };

static void fill_floats(float *x, size_t n, int pattern) {
    size_t hot = n > 0 ? test_random_below((uint32_t)n) : 0;
    for (size_t i = 0; i < n; i++) {
        switch (pattern) {
        case ZEROS:
            x[i] = test_random() & 1 ? 0.0f : -0.0f;
            break;
        case ONE_HOT:
            x[i] = i == hot ? test_random_float() * 100.0f : 0.0f;
            break;
        case EXTREMES:
            x[i] = (test_random() & 1 ? 1e15f : -1e-15f) * test_random_float();
            break;
        case SUBNORMALS:
            x[i] = test_random_float() * 0x1p-127f;
            break;
        default:
            x[i] = test_random_gauss();
        }
    }
}

static void fill_i8(int8_t *q, size_t n, int pattern) {
    size_t hot = n > 0 ? test_random_below((uint32_t)n) : 0;
    for (size_t i = 0; i < n; i++) {
        switch (pattern) {
        case ZEROS:
            q[i] = 0;
            break;
        case ONE_HOT:
            q[i] = i == hot ? -127 : 0;
            break;
        case EXTREMES:
            q[i] = test_random() & 1 ? 127 : -127;
            break;
        default:
            q[i] = (int8_t)(test_random_below(255) - 127);
            break;
        }
    }
}

static uint16_t random_finite_half(void) {
    uint16_t h;
    do {
        h = (uint16_t)test_random();
    } while ((h & 0x7c00) == 0x7c00);
    return h;
}

#if defined(__x86_64__)
/* amx_model.c: the products of amx.c with AVX-512 alone. */
void matmul_packed_amx_model(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                             const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                             uint8_t *scratch);

static const kernels *amx_model(bool *supported) {
    static kernels model;
    for (size_t i = 0; kernels_get(i, supported) != &kernels_avx512; i++) {
    }
    model = kernels_avx512;
    model.name = "amx_model";
    model.matmul_packed = matmul_packed_amx_model;
    return &model;
}
#endif

/* Table i of this build, then amx_model; NULL past the last. */
static const kernels *table_get(size_t i, bool *supported) {
    const kernels *k = kernels_get(i, supported);
#if defined(__x86_64__)
    if (k == NULL && kernels_get(i - 1, supported) != NULL) {
        return amx_model(supported);
    }
#endif
    return k;
}

#define FOR_EACH_TABLE(k)                                                                          \
    bool supported_ = false;                                                                       \
    const kernels *k;                                                                              \
    for (size_t table_ = 1; (k = table_get(table_, &supported_)) != NULL; table_++)                \
        if (!supported_) {                                                                         \
            test_note("%s: not on this CPU", k->name);                                             \
        } else

static const uint32_t shapes[] = {0,   1,   2,   3,   7,   8,   9,   15,   16,
                                  17,  31,  32,  33,  63,  64,  65,  100,  127,
                                  128, 129, 172, 255, 256, 257, 688, 1000, 4096};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], MAX_N = 4096 };

/* ---- Elementary functions ---------------------------------------------- */

static double ulps(double got, double expected) {
    int exponent;
    (void)frexp(expected, &exponent);
    return fabs(got - expected) / ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
}

TEST(math_exp_f32) {
    double worst = 0.0;
    const uint32_t step = getenv("HEPTA_FAST") != NULL ? 65521 : 257;
    for (uint32_t u = 0; u < 0xff800000u - step; u += step) {
        float x = math_from_bits_f32(u);
        if (x < -104.0f || x > 88.72f) {
            continue;
        }
        double error = ulps((double)math_exp_f32(x), exp((double)x));
        worst = error > worst ? error : worst;
    }
    test_note("largest error %.3f ulp", worst);
    CHECK(worst < 1.1);
    CHECK(math_exp_f32(0.0f) == 1.0f && math_exp_f32(-0.0f) == 1.0f);
    CHECK(math_exp_f32(-104.5f) == 0.0f && math_exp_f32(-INFINITY) == 0.0f);
    CHECK(math_exp_f32(89.0f) == INFINITY && math_exp_f32(INFINITY) == INFINITY);
    CHECK(isnan(math_exp_f32(NAN)));
}

static double uniform(void) {
    return (double)(test_random() >> 11) * 0x1p-53;
}

static double relative(double got, long double expected) {
    return (double)fabsl(((long double)got - expected) / expected);
}

TEST(math_f64) {
    double exp_error = 0.0, log_error = 0.0, trig_error = 0.0, turn_error = 0.0;
    const int n = getenv("HEPTA_FAST") != NULL ? 5000 : 400000;
    for (int i = 0; i < n; i++) {
        double x = (uniform() - 0.5) * 1400.0, s, c;
        exp_error = fmax(exp_error, relative(math_exp_f64(x), expl((long double)x)));
        double y = i % 2 != 0 ? exp(x) : 0.5 + uniform();
        if (y != 1.0) {
            log_error = fmax(log_error, relative(math_log_f64(y), logl((long double)y)));
        }
        x = (uniform() - 0.5) * 2e6;
        math_sin_cos_f64(x, &s, &c);
        trig_error = fmax(trig_error, (double)fabsl((long double)s - sinl((long double)x)));
        trig_error = fmax(trig_error, (double)fabsl((long double)c - cosl((long double)x)));
        uint64_t m = 1 + test_random_below(100000), k = test_random_below((uint32_t)m);
        long double angle = 6.283185307179586476925287L * (long double)k / (long double)m;
        math_sin_cos_turn(k, m, &s, &c);
        turn_error = fmax(turn_error, (double)fabsl((long double)s - sinl(angle)));
        turn_error = fmax(turn_error, (double)fabsl((long double)c - cosl(angle)));
    }
    test_note("exp %.2g, log %.2g relative; sin and cos %.2g, of a turn %.2g absolute", exp_error,
              log_error, trig_error, turn_error);
    CHECK(exp_error < 4e-16 && log_error < 6e-16 && trig_error < 4e-16 && turn_error < 4e-16);
    CHECK(math_exp_f64(0.0) == 1.0 && math_log_f64(1.0) == 0.0);
    CHECK(math_exp_f64(-800.0) == 0.0 && math_exp_f64(800.0) == INFINITY);
    /* RoPE frequencies: base^(-2i/d) */
    for (int i = 0; i < 64; i++) {
        long double expected = powl(500000.0L, -2.0L * i / 128.0L);
        CHECK(relative(math_pow_f64(500000.0, -2.0 * i / 128.0), expected) < 4e-15);
    }
}

/* ---- Rotation ---------------------------------------------------------- */

TEST(rotation_is_orthonormal) {
    double worst_norm = 0.0, worst_inverse = 0.0;
    static float x[640], y[640], scratch[640];
    for (uint32_t n = 1; n <= 600; n++) {
        hepta_error err;
        rotation *r = NULL;
        CHECK_OK(rotation_create(n, n * 77, &r, &err));
        CHECK(r->n == n && r->m * r->pow2 == n && r->m % 2 == 1 && r->n_padded % 16 == 0);
        fill_floats(x, n, RANDOM);
        memcpy(y, x, sizeof x);
        kernels_ref.rotate(r, y, scratch);
        double before = 0.0, after = 0.0, difference = 0.0;
        for (uint32_t i = 0; i < n; i++) {
            before += (double)x[i] * (double)x[i];
            after += (double)y[i] * (double)y[i];
        }
        for (uint32_t i = n; i < r->n_padded; i++) {
            CHECK(y[i] == 0.0f);
        }
        kernels_ref.rotate_inverse(r, y, scratch);
        for (uint32_t i = 0; i < n; i++) {
            difference += pow((double)x[i] - (double)y[i], 2);
        }
        worst_norm = fmax(worst_norm, fabs(after / before - 1.0));
        worst_inverse = fmax(worst_inverse, sqrt(difference / before));
        rotation_free(r);
    }
    test_note("norm changes by %.2g, there and back differs by %.2g", worst_norm, worst_inverse);
    CHECK(worst_norm < 2e-6 && worst_inverse < 2e-6);
}

/* The columns of H, one by one, are orthonormal, and spread a one-hot over all outputs. */
TEST(rotation_of_unit_vectors) {
    static const uint32_t widths[] = {1, 2, 3, 12, 43, 64, 172};
    for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
        uint32_t n = widths[w];
        hepta_error err;
        rotation *r = NULL;
        CHECK_OK(rotation_create(n, 5, &r, &err));
        static float columns[176][176], scratch[176];
        for (uint32_t j = 0; j < n; j++) {
            memset(columns[j], 0, sizeof columns[j]);
            columns[j][j] = 1.0f;
            kernels_ref.rotate(r, columns[j], scratch);
            for (uint32_t i = 0; i <= j; i++) {
                double dot = 0.0;
                for (uint32_t c = 0; c < n; c++) {
                    CHECK(fabs((double)columns[j][c]) <= sqrt(2.0 / n) + 1e-6);
                    dot += (double)columns[i][c] * (double)columns[j][c];
                }
                CHECK(fabs(dot - (i == j)) < 1e-6);
            }
        }
        rotation_free(r);
    }
}

TEST(rotation_errors) {
    hepta_error err;
    rotation *r = NULL;
    CHECK_EQ_INT(rotation_create(0, 1, &r, &err), HEPTA_ERROR_UNSUPPORTED);
    CHECK_EQ_INT(rotation_create(KERNELS_MAX_COLS + 1, 1, &r, &err), HEPTA_ERROR_UNSUPPORTED);
    CHECK_EQ_INT(rotation_create(8193, 1, &r, &err), HEPTA_ERROR_UNSUPPORTED);
    CHECK(strstr(err.message, "8193") != NULL);
    for (uint64_t k = 1; k <= 3; k++) {
        memory_fail_after(k);
        CHECK_EQ_INT(rotation_create(12, 1, &r, &err), HEPTA_ERROR_MEMORY);
        memory_fail_after(0);
    }
    CHECK(r == NULL);
}

/* ---- The reference against independent computations -------------------- */

/* A packed matrix in guarded memory: codes and scales end at an unmapped page. */
static packed_matrix random_packed(uint32_t half_bits, uint32_t n_rows, uint32_t n_cols,
                                   int pattern) {
    uint64_t n_bytes = 0;
    CHECK(tensor_packed_bytes(half_bits, n_rows, n_cols, &n_bytes));
    uint8_t *data = guard_alloc((size_t)n_bytes, false);
    size_t n_codes = (size_t)((n_rows + 15) / 16 * 16) * (n_cols / 16) * half_bits;
    for (size_t i = 0; i < n_codes; i++) {
        data[i] = pattern == ZEROS ? 0 : pattern == EXTREMES ? 0xff : (uint8_t)test_random();
        if (half_bits == 16) {
            data[i] = pattern == EXTREMES ? (uint8_t)(test_random() & 1 ? 127 : 129) : data[i];
            data[i] = data[i] == 128 ? 129 : data[i];
        }
    }
    for (size_t r = 0; r < n_rows; r++) {
        uint16_t scale = bfloat_from_float(0.01f + fabsf(test_random_float()));
        data[n_codes + 2 * r] = (uint8_t)scale;
        data[n_codes + 2 * r + 1] = (uint8_t)(scale >> 8);
    }
    return (packed_matrix){half_bits, n_rows, n_cols, data, data + n_codes};
}

/* Weight (r, c) by the code's own decoder; where bytes lie written a second time. */
static void decode_by_code(const packed_matrix *m, uint32_t r, int *w) {
    const size_t h = m->half_bits, n_blocks = m->n_cols / 16;
    const uint8_t *strip = m->codes + r / 16 * (16 * n_blocks * h);
    uint8_t *row = malloc(n_blocks * h), *v = malloc(m->n_cols);
    CHECK(row != NULL && v != NULL);
    for (size_t b = 0; b < n_blocks; b++) {
        const uint8_t *group = strip + b / 4 * (64 * h);
        size_t wide = b / 4 == n_blocks / 4 ? n_blocks % 4 : 4; /* blocks of this group */
        for (size_t j = 0; j < h; j++) {
            row[b * h + j] = group[j * 16 * wide + r % 16 * wide + b % 4];
        }
    }
    if (h != 16) {
        code_decode_row(code_table_get((int)h), row, h, m->n_cols, v);
    }
    for (uint32_t c = 0; c < m->n_cols; c++) {
        w[c] = h == 16 ? (int8_t)row[c] : v[c] - CODE_CENTRE;
    }
    free(row);
    free(v);
}

static activation random_activation(uint32_t n, int pattern) {
    int8_t *q = guard_alloc(n, false);
    fill_i8(q, n, pattern);
    activation a = {q, 0.001f + fabsf(test_random_float()), 0};
    for (uint32_t i = 0; i < n; i++) {
        a.sum += q[i];
    }
    return a;
}

static const uint32_t packed_rates[] = {4, 5, 6, 7, 8, 16};
enum { N_RATES = sizeof packed_rates / sizeof packed_rates[0] };

TEST(ref_matmul_packed) {
    for (size_t rate = 0; rate < N_RATES; rate++) {
        for (uint32_t n_cols = 16; n_cols <= 272; n_cols += 64) {
            packed_matrix m = random_packed(packed_rates[rate], 7, n_cols, RANDOM);
            activation x[2] = {random_activation(n_cols, RANDOM),
                               random_activation(n_cols, EXTREMES)};
            uint8_t *scratch = guard_alloc(KERNELS_SCRATCH_BYTES(n_cols), false);
            float y[2][8], row[272];
            kernels_ref.matmul_packed(&m, 0, 7, x, 2, y[0], 8, scratch);
            for (uint32_t r = 0; r < 7; r++) {
                int w[272];
                decode_by_code(&m, r, w);
                float scale = bfloat_to_float(load_u16(m.scales + (size_t)2 * r));
                kernels_ref.unpack_row(&m, r, row, scratch);
                for (int t = 0; t < 2; t++) {
                    int64_t sum = 0;
                    for (uint32_t c = 0; c < n_cols; c++) {
                        sum += w[c] * x[t].q[c];
                        CHECK(row[c] == (float)w[c] * scale);
                    }
                    CHECK(y[t][r] == ((float)sum * scale) * x[t].scale);
                }
            }
            guard_reset();
        }
    }
}

/* The widest matrix with extreme values: the int32 sum must not overflow. */
TEST(ref_matmul_packed_widest) {
    const uint32_t n = KERNELS_MAX_COLS;
    packed_matrix m = random_packed(16, 4, n, ZEROS);
    uint8_t *codes = guard_alloc((size_t)16 * n + 32, false);
    memset(codes, 0x80, (size_t)16 * n); /* -128: not written by the quantizer, but possible */
    memcpy(codes + (size_t)16 * n, m.scales, 8);
    m.codes = codes, m.scales = codes + (size_t)16 * n;
    int8_t *q = guard_alloc(n, false);
    memset(q, -127, n);
    activation x = {q, 1.0f, -127 * (int32_t)n};
    uint8_t *scratch = guard_alloc(KERNELS_SCRATCH_BYTES(n), false);
    float expected = (float)(128 * 127 * (int64_t)n) * bfloat_to_float(load_u16(m.scales));
    activation many[17];
    for (int t = 0; t < 17; t++) {
        many[t] = x;
    }
    bool supported;
    const kernels *k;
    for (size_t i = 0; (k = table_get(i, &supported)) != NULL; i++) {
        float y[17][4] = {{0}};
        if (supported) {
            k->matmul_packed(&m, 0, 4, &x, 1, y[0], 4, scratch);
            CHECK(y[0][0] == expected);
            k->matmul_packed(&m, 0, 4, many, 17, y[0], 4, scratch);
            CHECK(y[0][0] == expected && y[15][0] == expected && y[16][0] == expected);
        }
    }
}

TEST(ref_quantize_activation) {
    float x[32] = {0};
    int8_t q[32];
    float scale;
    int32_t sum;
    kernels_ref.quantize_activation(x, 32, q, &scale, &sum);
    CHECK(scale == 0.0f && sum == 0 && q[31] == 0);
    x[3] = -2.0f, x[4] = 1.0f, x[5] = 127.5f * 2.0f / 127.0f * 0.0f + 0.5f * 2.0f / 127.0f;
    x[6] = 1.5f * 2.0f / 127.0f;
    kernels_ref.quantize_activation(x, 32, q, &scale, &sum);
    CHECK(scale == 2.0f / 127.0f && q[3] == -127 && q[4] == 64); /* 63.5 to even */
    CHECK(q[5] == 0 && q[6] == 2);                               /* 0.5 and 1.5 to even */
    CHECK_EQ_INT(sum, -127 + 64 + 0 + 2);
    x[9] = 0x1p-140f, x[3] = x[4] = x[5] = x[6] = 0.0f; /* too small for 127 / amax */
    kernels_ref.quantize_activation(x, 32, q, &scale, &sum);
    CHECK(scale == 0.0f && q[9] == 0);
    x[9] = NAN, x[10] = INFINITY;
    kernels_ref.quantize_activation(x, 32, q, &scale, &sum);
    CHECK(isnan(scale) && sum == 0 && q[10] == 0);
}

/* Lanes and tree of docs/NUMERICS.md, written a second time. */
static float dot_by_definition(const float *a, const float *b, uint32_t n) {
    float lane[16] = {0};
    for (uint32_t i = 0; i < n; i++) {
        volatile float product = a[i] * b[i];
        lane[i % 16] = lane[i % 16] + product;
    }
    for (int width = 8; width >= 1; width /= 2) {
        for (int l = 0; l < width; l++) {
            lane[l] = lane[l] + lane[l + width];
        }
    }
    return lane[0];
}

TEST(ref_reductions) {
    static float a[MAX_N], b[MAX_N], y[MAX_N];
    for (size_t s = 0; s < N_SHAPES; s++) {
        uint32_t n = shapes[s];
        for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
            fill_floats(a, n, pattern);
            fill_floats(b, n, RANDOM);
            float got, expected = dot_by_definition(a, b, n);
            kernels_ref.matmul_f32(a, 1, n, b, n, 1, &got, 1);
            CHECK_MEM_EQ(&got, &expected, sizeof got);
            if (n > 0) {
                float r = 1.0f / sqrtf(dot_by_definition(a, a, n) / (float)n + 1e-5f);
                kernels_ref.rmsnorm(a, b, n, 1e-5f, y);
                for (uint32_t i = 0; i < n; i++) {
                    CHECK(y[i] == (a[i] * r) * b[i]);
                }
            }
        }
    }
}

TEST(ref_row_to_f32) {
    uint8_t src[65536 * 2];
    static float y[65536];
    for (uint32_t h = 0; h < 65536; h++) {
        src[2 * h] = (uint8_t)h;
        src[2 * h + 1] = (uint8_t)(h >> 8);
    }
    kernels_ref.row_to_f32(TENSOR_F16, src, 65536, y);
    for (uint32_t h = 0; h < 65536; h++) {
        float expected = half_to_float((uint16_t)h);
        CHECK(isnan(expected) ? isnan(y[h]) : math_bits_f32(y[h]) == math_bits_f32(expected));
    }
    kernels_ref.row_to_f32(TENSOR_BF16, src, 65536, y);
    for (uint32_t h = 0; h < 65536; h++) {
        CHECK_EQ_INT(math_bits_f32(y[h]), h << 16);
    }
    uint8_t q8[34] = {0x00, 0x3c + 4}; /* scale 2 */
    for (int i = 0; i < 32; i++) {
        q8[2 + i] = (uint8_t)(i * 8 - 128);
    }
    kernels_ref.row_to_f32(TENSOR_Q8_0, q8, 32, y);
    CHECK(y[0] == -256.0f && y[31] == 240.0f && y[16] == 0.0f);
}

/* One query; its scratch memory ends at an unmapped page. */
static void attend_one(const kernels *k, const kv_cache *cache, uint32_t dim, const float *q,
                       uint32_t n_pos, float scale, float *out) {
    float *scratch = guard_alloc(KERNELS_ATTENTION_SCRATCH_BYTES(dim), false);
    k->attention(cache, dim, &(attention_query){q, out, n_pos}, 1, scale, scratch);
}

/* A cache of n positions in guarded memory, stored one by one from random vectors. */
static kv_cache random_cache(hepta_cache_type type, uint32_t dim, uint32_t n, int pattern) {
    const size_t n_bytes = (size_t)kv_bytes(type, dim, n);
    const size_t n_scales = type == HEPTA_CACHE_Q8 ? (n + KV_TILE - 1) / KV_TILE * KV_TILE : 0;
    kv_cache cache = {.type = type,
                      .k = guard_alloc(n_bytes, pattern % 2 == 0),
                      .v = guard_alloc(n_bytes, false),
                      .k_scale = guard_alloc(n_scales * sizeof(float), false),
                      .v_scale = guard_alloc(n_scales * sizeof(float), false)};
    memset(cache.k, 0xff, n_bytes), memset(cache.v, 0xff, n_bytes);
    memset(cache.k_scale, 0xff, n_scales * sizeof(float)); /* NaN past the end */
    memset(cache.v_scale, 0xff, n_scales * sizeof(float));
    float *key = guard_alloc(dim * sizeof(float), false);
    float *value = guard_alloc(dim * sizeof(float), false);
    int8_t *scratch = guard_alloc(KV_ROW(dim), false);
    for (uint32_t j = 0; j < n; j++) {
        int each = pattern == N_PATTERNS ? (int)test_random_below(N_PATTERNS) : pattern;
        fill_floats(key, dim, each);
        fill_floats(value, dim,
                    test_random_below(4) == 0 ? (int)test_random_below(N_PATTERNS) : RANDOM);
        if (pattern == RANDOM && n % 2 == 0) { /* sharp attention */
            for (uint32_t d = 0; d < dim; d++) {
                key[d] *= 30.0f;
            }
        }
        if (type == HEPTA_CACHE_F16) { /* finite ones */
            for (uint32_t d = 0; d < dim; d++) {
                key[d] = fmodf(key[d], 60000.0f), value[d] = fmodf(value[d], 60000.0f);
            }
        }
        kv_store(&kernels_ref, &cache, dim, j, key, value, scratch);
    }
    return cache;
}

/* Attention against a softmax in double over the keys and values that the cache holds. */
static void check_attention(const kv_cache *cache, uint32_t dim, const double *q, const double *k,
                            const double *v, uint32_t n, const float *out, double bound) {
    double score[300], max = -1e30, sum = 0.0, largest = 0.0;
    for (uint32_t j = 0; j < n; j++) {
        score[j] = 0.0;
        for (uint32_t d = 0; d < dim; d++) {
            score[j] += 0.5 * q[d] * k[j * dim + d];
            largest = fmax(largest, fabs(v[j * dim + d]));
        }
        max = fmax(max, score[j]);
    }
    for (uint32_t j = 0; j < n; j++) {
        sum += exp(score[j] - max);
    }
    for (uint32_t d = 0; d < dim; d++) {
        double expected = 0.0;
        for (uint32_t j = 0; j < n; j++) {
            expected += exp(score[j] - max) / sum * v[j * dim + d];
        }
        if (!(fabs((double)out[d] - expected) < bound * largest)) {
            test_fail(__FILE__, __LINE__, "cache type %d, %u positions of %u: %g, expected %g",
                      (int)cache->type, n, dim, (double)out[d], expected);
        }
    }
}

TEST(ref_attention) {
    static double q[24], k[300 * 24], v[300 * 24];
    static const uint32_t dims[] = {1, 6, 16, 24};
    for (int round = 0; round < 120; round++) {
        const uint32_t dim = dims[round % 4], n = 1 + test_random_below(300);
        const hepta_cache_type type = (hepta_cache_type)(round % 3);
        const kv_cache cache = random_cache(type, dim, n, RANDOM);
        float query[24], out[24], scale = 1.0f;
        int8_t q8[24];
        int32_t sum;
        fill_floats(query, dim, RANDOM);
        if (type == HEPTA_CACHE_Q8) {
            kernels_ref.quantize_activation(query, dim, q8, &scale, &sum);
        }
        for (uint32_t d = 0; d < dim; d++) {
            q[d] = type == HEPTA_CACHE_Q8 ? q8[d] * (double)scale : (double)query[d];
        }
        for (uint32_t j = 0; j < n; j++) {
            for (uint32_t d = 0; d < dim; d++) {
                const size_t i = (size_t)j * dim + d, row = KV_ROW(dim);
                switch (type) {
                case HEPTA_CACHE_F32:
                    k[i] = (double)((const float *)cache.k)[i];
                    v[i] = (double)((const float *)cache.v)[i];
                    break;
                case HEPTA_CACHE_F16:
                    k[i] = (double)half_to_float(((const uint16_t *)cache.k)[i]);
                    v[i] = (double)half_to_float(((const uint16_t *)cache.v)[i]);
                    break;
                default:
                    k[i] = ((const int8_t *)cache.k)[kv_key_index(j, d, row)] *
                           (double)cache.k_scale[j];
                    v[i] = ((const int8_t *)cache.v)[kv_value_index(j, d, row)] *
                           (double)cache.v_scale[j];
                }
            }
        }
        attend_one(&kernels_ref, &cache, dim, query, n, 0.5f, out);
        /* 8 bits: weights are rounded to 1/16383 of the largest, scores are some tens */
        check_attention(&cache, dim, q, k, v, n, out, type == HEPTA_CACHE_Q8 ? 1e-4 : 2e-5);
        guard_reset();
    }
}

/* Vectors are stored with an error of at most half a step of 1/127 of their largest item. */
TEST(kv_store_q8) {
    for (int round = 0; round < 200; round++) {
        enum { N = 40 };
        const uint32_t dim = 1 + test_random_below(130);
        const size_t row = KV_ROW(dim), n_bytes = (size_t)kv_bytes(HEPTA_CACHE_Q8, dim, N);
        CHECK_EQ_INT(n_bytes, 48 * row);
        float k_scale[N], v_scale[N];
        static float key[N][130], value[N][130];
        kv_cache cache = {.type = HEPTA_CACHE_Q8,
                          .k = guard_alloc(n_bytes, false),
                          .v = guard_alloc(n_bytes, false),
                          .k_scale = k_scale,
                          .v_scale = v_scale};
        for (size_t i = 0; i < N; i++) { /* in any order */
            size_t j = i * 7 % N;
            fill_floats(key[j], dim, RANDOM), fill_floats(value[j], dim, RANDOM);
            kv_store(&kernels_ref, &cache, dim, j, key[j], value[j], guard_alloc(row, false));
        }
        for (size_t j = 0; j < N; j++) {
            for (uint32_t d = 0; d < row; d++) {
                int8_t a = ((int8_t *)cache.k)[kv_key_index(j, d, row)];
                int8_t b = ((int8_t *)cache.v)[kv_value_index(j, d, row)];
                float x = d < dim ? key[j][d] : 0.0f, y = d < dim ? value[j][d] : 0.0f;
                CHECK(fabsf((float)a * k_scale[j] - x) <= 0.5001f * k_scale[j]);
                CHECK(fabsf((float)b * v_scale[j] - y) <= 0.5001f * v_scale[j]);
            }
        }
        guard_reset();
    }
}

/* Zeros, infinities and NaN in a Q8 cache. */
TEST(attention_q8_special_values) {
    enum { DIM = 20, N = 70 };
    bool supported;
    const kernels *t;
    for (size_t table = 0; (t = kernels_get(table, &supported)) != NULL; table++) {
        for (int what = 0; supported && what < 6; what++) {
            kv_cache cache = random_cache(HEPTA_CACHE_Q8, DIM, N, RANDOM);
            float q[DIM], key[DIM], value[DIM], out[DIM];
            int8_t *scratch = guard_alloc(KV_ROW(DIM), false);
            fill_floats(q, DIM, RANDOM);
            for (uint32_t j = 0; j < N; j++) {
                fill_floats(key, DIM, RANDOM);
                memset(value, 0, sizeof value);
                value[j % DIM] = what == 1 ? 0.0f : 1.0f;
                memset(key, 0, what == 2 ? sizeof key : 0);
                key[3] = what == 3 && j == 66 ? NAN : key[3];
                value[3] = what == 4 && j == 66 ? INFINITY : value[3];
                kv_store(t, &cache, DIM, j, key, value, scratch);
            }
            q[5] = what == 5 ? -INFINITY : q[5];
            attend_one(t, &cache, DIM, q, N, 0.5f, out);
            for (uint32_t d = 0; d < DIM; d++) {
                CHECK(what < 3 ? !isnan(out[d]) : isnan(out[d]));
                CHECK(what != 1 || math_bits_f32(out[d]) == 0);
                CHECK(what != 2 || fabsf(out[d] - (d < 10 ? 4.0f : 3.0f) / 70.0f) < 1e-5f);
            }
            guard_reset();
        }
    }
}

TEST(ref_rope_and_swiglu) {
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8];
    const float c[2] = {0.0f, 1.0f}, s[2] = {1.0f, 0.0f}; /* a quarter turn, and none */
    memcpy(y, x, sizeof x);
    kernels_ref.rope(y, 4, true, c, s);
    CHECK(y[0] == -2 && y[1] == 1 && y[2] == 3 && y[3] == 4 && y[4] == 5);
    memcpy(y, x, sizeof x);
    kernels_ref.rope(y, 4, false, c, s);
    CHECK(y[0] == -3 && y[2] == 1 && y[1] == 2 && y[3] == 4 && y[4] == 5);
    float gate[3] = {0.0f, 3.0f, -200.0f}, up[3] = {2.0f, 2.0f, 2.0f};
    kernels_ref.swiglu(gate, up, 3);
    CHECK(gate[0] == 0.0f && fabs((double)gate[1] - 6.0 / (1.0 + exp(-3.0))) < 1e-6);
    CHECK(gate[2] == 0.0f);
}

/* ---- Every table against the reference --------------------------------- */

TEST(tables_matmul_packed) {
    enum { MAX_TOKENS = 150 };
    static const uint32_t rows[] = {1, 3, 8, 9, 15, 16, 17, 31, 32, 33, 40, 47, 48, 65};
    static const uint32_t cols[] = {16,  32,  48,  64,  80,  96,   112,
                                    128, 176, 256, 272, 688, 1040, 4096};
    static const uint32_t many[] = {63, 64, 65, 80, 127, 128, 129, 150};
    static activation x[MAX_TOKENS];
    FOR_EACH_TABLE(k) {
        for (int round = 0; round < 720; round++) {
            uint32_t n_rows = rows[test_random_below(14)], n_cols = cols[test_random_below(14)];
            uint32_t n_tokens =
                round % 12 == 0 ? many[test_random_below(8)] : 1 + (uint32_t)round % 40;
            uint32_t rate = packed_rates[test_random_below(N_RATES)];
            uint32_t begin = test_random_below((n_rows + 15) / 16) * 16;
            uint32_t end = begin + 1 + test_random_below(n_rows - begin);
            packed_matrix m =
                random_packed(rate, n_rows, n_cols, round % 5 < 2 ? round % 5 : RANDOM);
            int8_t *q = guard_alloc((size_t)n_tokens * n_cols, round % 3 == 0);
            for (uint32_t t = 0; t < n_tokens; t++) {
                x[t] = (activation){q + (size_t)t * n_cols, 0.001f + fabsf(test_random_float()), 0};
                fill_i8(q + (size_t)t * n_cols, n_cols, (round + (int)t) % 7);
                for (uint32_t c = 0; c < n_cols; c++) {
                    x[t].sum += x[t].q[c];
                }
            }
            uint8_t *scratch = guard_alloc(KERNELS_SCRATCH_BYTES(n_cols), false);
            float *y = guard_alloc((size_t)n_tokens * n_rows * sizeof(float), round % 2 == 0);
            float *expected = guard_alloc((size_t)n_tokens * n_rows * sizeof(float), false);
            kernels_ref.matmul_packed(&m, begin, end, x, n_tokens, expected, n_rows, scratch);
            k->matmul_packed(&m, begin, end, x, n_tokens, y, n_rows, scratch);
            CHECK_MEM_EQ(y, expected, (size_t)n_tokens * n_rows * sizeof(float));
            float *row = guard_alloc(n_cols * sizeof(float), false);
            float *expected_row = guard_alloc(n_cols * sizeof(float), false);
            kernels_ref.unpack_row(&m, end - 1, expected_row, scratch);
            k->unpack_row(&m, end - 1, row, scratch);
            CHECK_MEM_EQ(row, expected_row, n_cols * sizeof(float));
            guard_reset();
        }
    }
}

TEST(tables_quantize_activation) {
    FOR_EACH_TABLE(k) {
        for (size_t s = 0; s < N_SHAPES; s++) {
            for (int pattern = 0; pattern <= N_PATTERNS; pattern++) {
                uint32_t n = shapes[s];
                float *x = guard_alloc(n * sizeof *x, pattern % 2 == 0);
                fill_floats(x, n, pattern);
                if (pattern == N_PATTERNS && n > 0) {
                    x[test_random_below(n)] = test_random() & 1 ? NAN : -INFINITY;
                }
                int8_t *q[2] = {guard_alloc(n, false), guard_alloc(n, false)};
                float scale[2];
                int32_t sum[2];
                kernels_ref.quantize_activation(x, n, q[0], &scale[0], &sum[0]);
                k->quantize_activation(x, n, q[1], &scale[1], &sum[1]);
                CHECK_MEM_EQ(q[0], q[1], n);
                CHECK_MEM_EQ(&scale[0], &scale[1], sizeof scale[0]);
                CHECK_EQ_INT(sum[0], sum[1]);
                guard_reset();
            }
        }
    }
}

TEST(tables_matmul_f32) {
    static const uint32_t rows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9}, tokens[] = {1, 2, 3, 4, 5, 9};
    FOR_EACH_TABLE(k) {
        for (int round = 0; round < 300; round++) {
            uint32_t n_rows = rows[test_random_below(9)], n_tokens = tokens[test_random_below(6)];
            uint32_t n = shapes[test_random_below(N_SHAPES)];
            float *w = guard_alloc((size_t)n_rows * n * sizeof *w, false);
            float *x = guard_alloc((size_t)n_tokens * n * sizeof *x, round % 2 == 0);
            fill_floats(w, (size_t)n_rows * n, round % N_PATTERNS);
            fill_floats(x, (size_t)n_tokens * n, round % 3 == 0 ? EXTREMES : RANDOM);
            size_t n_y = (size_t)n_tokens * n_rows * sizeof(float);
            float *y[2] = {guard_alloc(n_y, false), guard_alloc(n_y, false)};
            kernels_ref.matmul_f32(w, n_rows, n, x, n, n_tokens, y[0], n_rows);
            k->matmul_f32(w, n_rows, n, x, n, n_tokens, y[1], n_rows);
            CHECK_MEM_EQ(y[0], y[1], n_y);
            guard_reset();
        }
    }
}

TEST(tables_row_to_f32) {
    static const uint32_t types[] = {TENSOR_F32,  TENSOR_F16,  TENSOR_BF16,  TENSOR_Q8_0,
                                     TENSOR_Q4_0, TENSOR_Q3_K, TENSOR_IQ4_XS};
    static const uint32_t items[] = {1, 1, 1, 32, 32, 256, 256};
    static const uint32_t bytes[] = {4, 2, 2, 34, 18, 110, 136};
    FOR_EACH_TABLE(k) {
        for (size_t s = 0; s < N_SHAPES; s++) {
            for (int type = 0; type < 7; type++) {
                uint32_t n = shapes[s] / items[type] * items[type];
                size_t n_bytes = (size_t)(n / items[type]) * bytes[type];
                uint8_t *src = guard_alloc(n_bytes, s % 2 == 0);
                for (size_t i = 0; i + 1 < n_bytes; i += 2) {
                    uint16_t h = random_finite_half();
                    if (type != 1 && (h & 0x7f80) == 0x7f80) {
                        h = 0;
                    }
                    memcpy(src + i, &h, 2);
                }
                float *y[2] = {guard_alloc(n * 4, false), guard_alloc(n * 4, false)};
                kernels_ref.row_to_f32(types[type], src, n, y[0]);
                k->row_to_f32(types[type], src, n, y[1]);
                CHECK_MEM_EQ(y[0], y[1], n * 4);
                guard_reset();
            }
        }
    }
}

TEST(tables_elementwise) {
    FOR_EACH_TABLE(k) {
        for (size_t s = 0; s < N_SHAPES; s++) {
            for (int pattern = 0; pattern < N_PATTERNS; pattern++) {
                uint32_t n = shapes[s];
                size_t n_bytes = n * sizeof(float);
                float *a = guard_alloc(n_bytes, pattern % 2 == 0), *b = guard_alloc(n_bytes, false);
                fill_floats(a, n, pattern);
                fill_floats(b, n, RANDOM);
                if (pattern == EXTREMES) {
                    for (uint32_t i = 0; i < n; i++) { /* the whole range of exp */
                        a[i] = test_random_float() * 120.0f;
                    }
                }
                float *y[2] = {guard_alloc(n_bytes, false), guard_alloc(n_bytes, false)};
                if (n > 0) {
                    kernels_ref.rmsnorm(a, b, n, 1e-5f, y[0]);
                    k->rmsnorm(a, b, n, 1e-5f, y[1]);
                    CHECK_MEM_EQ(y[0], y[1], n_bytes);
                }
                memcpy(y[0], a, n_bytes), memcpy(y[1], a, n_bytes);
                kernels_ref.swiglu(y[0], b, n);
                k->swiglu(y[1], b, n);
                CHECK_MEM_EQ(y[0], y[1], n_bytes);
                memcpy(y[0], a, n_bytes), memcpy(y[1], a, n_bytes);
                kernels_ref.add(y[0], b, n);
                k->add(y[1], b, n);
                CHECK_MEM_EQ(y[0], y[1], n_bytes);
                memcpy(y[0], a, n_bytes), memcpy(y[1], a, n_bytes);
                uint32_t n_rot = n / 2 * 2;
                kernels_ref.rope(y[0], n_rot, s % 2 == 0, b, b + n / 2);
                k->rope(y[1], n_rot, s % 2 == 0, b, b + n / 2);
                CHECK_MEM_EQ(y[0], y[1], n_bytes);
                guard_reset();
            }
        }
    }
}

TEST(tables_attention) {
    static const uint32_t dims[] = {1,  2,  6,  8,  12, 15, 16,  17,  24,
                                    32, 40, 64, 72, 80, 96, 128, 129, 256};
    static const uint32_t positions[] = {1,  2,  7,  15,  16,  17,  50, 63,
                                         64, 65, 80, 127, 128, 129, 300};
    FOR_EACH_TABLE(k) {
        for (int round = 0; round < 900; round++) {
            uint32_t dim = dims[test_random_below(18)], n = positions[test_random_below(15)];
            hepta_cache_type type = (hepta_cache_type)(round % 3);
            kv_cache cache = random_cache(type, dim, n, round / 3 % (N_PATTERNS + 1));
            uint32_t n_queries = round % 5 < 2 ? 1 : 1 + test_random_below(KERNELS_MAX_QUERIES);
            attention_query queries[2][KERNELS_MAX_QUERIES];
            const size_t n_bytes = dim * sizeof(float);
            float *q = guard_alloc(n_queries * n_bytes, round % 4 < 2);
            float *out[2] = {guard_alloc(n_queries * n_bytes, false),
                             guard_alloc(n_queries * n_bytes, round % 4 >= 2)};
            for (uint32_t i = 0; i < n_queries; i++) {
                int pattern =
                    test_random_below(4) != 0 ? RANDOM : (int)test_random_below(N_PATTERNS);
                fill_floats(q + i * dim, dim, pattern);
                uint32_t n_pos = i == 0 ? n : 1 + test_random_below(n);
                for (int y = 0; y < 2; y++) {
                    queries[y][i] = (attention_query){q + i * dim, out[y] + i * dim, n_pos};
                }
            }
            float *scratch = guard_alloc(KERNELS_ATTENTION_SCRATCH_BYTES(dim), false);
            kernels_ref.attention(&cache, dim, queries[0], n_queries, 0.3f, scratch);
            k->attention(&cache, dim, queries[1], n_queries, 0.3f, scratch);
            for (size_t i = 0; i < n_queries * dim; i++) { /* any NaN is a NaN */
                CHECK(isnan(out[0][i]) ? isnan(out[1][i])
                                       : math_bits_f32(out[0][i]) == math_bits_f32(out[1][i]));
            }
            guard_reset();
        }
    }
}

TEST(tables_rotate) {
    static const uint32_t large[] = {704, 1000, 1024, 2048, 4096, 5632, 11008, 14336};
    FOR_EACH_TABLE(k) {
        for (uint32_t i = 1; i < 600 + 8; i++) {
            uint32_t n = i < 600 ? i : large[i - 600];
            hepta_error err;
            rotation *r = NULL;
            CHECK_OK(rotation_create(n, i, &r, &err));
            size_t n_bytes = r->n_padded * sizeof(float);
            float *x = guard_alloc(n_bytes, false);
            fill_floats(x, r->n_padded, i % 7 == 0 ? ONE_HOT : RANDOM);
            float *y = guard_copy(x, n_bytes, i % 2 == 0);
            float *scratch = guard_alloc(n * sizeof(float), false);
            kernels_ref.rotate(r, x, scratch);
            k->rotate(r, y, scratch);
            CHECK_MEM_EQ(x, y, n_bytes);
            kernels_ref.rotate_inverse(r, x, scratch);
            k->rotate_inverse(r, y, scratch);
            CHECK_MEM_EQ(x, y, n_bytes);
            rotation_free(r);
            guard_reset();
        }
    }
}

/* ---- The same bits from every compiler and machine --------------------- */

static float plain_float(uint32_t i) { /* in [-2, 2), from integers alone */
    uint32_t h = i * 2654435761u;
    h = (h ^ (h >> 15)) * 2246822519u;
    h ^= h >> 13;
    return (float)(int32_t)(h >> 8) * 0x1p-22f - 2.0f;
}

TEST(ref_golden_digest) {
    enum { N = 1032 };
    static float x[N + 8], y[N + 8], scratch[2 * N];
    static int8_t q[N + 8];
    sha256 s;
    sha256_start(&s);
    hepta_error err;
    rotation *r = NULL;
    CHECK_OK(rotation_create(N, 12345, &r, &err)); /* 129 * 8 */
    for (uint32_t i = 0; i < N; i++) {
        x[i] = plain_float(i), y[i] = plain_float(i + N);
    }
    kernels_ref.rotate(r, x, scratch);
    sha256_update(&s, x, sizeof x);
    float scale;
    int32_t sum;
    kernels_ref.quantize_activation(x, r->n_padded, q, &scale, &sum);
    sha256_update(&s, q, sizeof q);
    sha256_update(&s, &scale, sizeof scale);
    kernels_ref.rotate_inverse(r, x, scratch);
    kernels_ref.rmsnorm(x, y, N, 1e-5f, x);
    kernels_ref.swiglu(x, y, N);
    sha256_update(&s, x, sizeof x);
    float out[8];
    attend_one(&kernels_ref, &(kv_cache){.type = HEPTA_CACHE_F32, .k = x, .v = y}, 8, x, 129, 0.7f,
               out);
    sha256_update(&s, out, sizeof out);
    kv_cache cache = random_cache(HEPTA_CACHE_Q8, 8, 129, ZEROS);
    for (uint32_t j = 0; j < 129; j++) {
        kv_store(&kernels_ref, &cache, 8, j, x + 8 * j, y + 8 * j, q);
    }
    attend_one(&kernels_ref, &cache, 8, x, 129, 0.7f, out);
    sha256_update(&s, out, sizeof out);
    guard_reset();
    for (uint32_t i = 0; i < 64; i++) {
        double sine, cosine, angle = 1000.5 * i * math_pow_f64(10000.0, -2.0 * i / 128.0);
        math_sin_cos_f64(angle, &sine, &cosine);
        float pair[2] = {(float)sine, (float)cosine};
        sha256_update(&s, pair, sizeof pair);
    }
    rotation_free(r);
    uint8_t digest[32];
    char hex[65];
    sha256_finish(&s, digest);
    sha256_hex(digest, hex);
    CHECK_EQ_STR(hex, "933e597c247cbfd78c51152a2a3a274f58c0e30263a58b8d5e3e133bcc35d6b6");
}

/* ---- Choice of a table ------------------------------------------------- */

/* One product of the last token is a little off. */
static void matmul_wrong(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                         const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                         uint8_t *scratch) {
    kernels_ref.matmul_packed(w, row_begin, row_end, x, n_tokens, y, y_stride, scratch);
    float *last = &y[(n_tokens - 1) * y_stride + row_end - 1];
    *last = nextafterf(*last, INFINITY);
}

TEST(kernels_agreement) {
    bool supported;
    const kernels *k;
    for (size_t i = 0; (k = kernels_get(i, &supported)) != NULL; i++) {
        CHECK(!supported || kernels_agree(k, &kernels_ref));
    }
    kernels wrong = kernels_ref;
    wrong.matmul_packed = matmul_wrong;
    CHECK(!kernels_agree(&wrong, &kernels_ref));
}

TEST(kernels_select) {
    const kernels *k = NULL;
    hepta_error err;
    unsetenv("HEPTA_KERNELS");
    CHECK_OK(kernels_select(&k, &err));
    test_note("this CPU runs %s", k->name);
    setenv("HEPTA_KERNELS", "ref", 1);
    CHECK_OK(kernels_select(&k, &err));
    CHECK(k == &kernels_ref);
    setenv("HEPTA_KERNELS", "", 1);
    CHECK_OK(kernels_select(&k, &err));
    setenv("HEPTA_KERNELS", "abacus", 1);
    k = NULL;
    CHECK_EQ_INT(kernels_select(&k, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(k == NULL && strstr(err.message, "abacus") != NULL && strstr(err.message, "ref") != NULL);
    bool supported;
    for (size_t i = 0; (k = kernels_get(i, &supported)) != NULL; i++) {
        const kernels *chosen = NULL;
        setenv("HEPTA_KERNELS", k->name, 1);
        hepta_status status = kernels_select(&chosen, &err);
        CHECK_EQ_INT(status, supported ? HEPTA_OK : HEPTA_ERROR_UNSUPPORTED);
        CHECK(!supported || chosen == k);
    }
}
