/*
 * test_gpu.c - the kernels for GPUs, each compared with kernels/ref.c by memcmp, and whole models
 * with the CPU. The device is emulated (src/gpu/platform_emulated.h) unless HEPTA_TEST_DEVICE
 * names another backend, "cuda" say, whose kernels are the same source.
 */
#include "test.h"

#include "gpu/gpu.h"
#include "kernels/math.h"
#include "model/llama.h"
#include "tiny_model.h"

#include <math.h>
#include <stdlib.h>

/* ---- Helpers ----------------------------------------------------------- */

static const gpu_backend *backend(void) {
    static const gpu_backend *b;
    const char *name = getenv("HEPTA_TEST_DEVICE");
    hepta_error err;
    if (b == NULL) {
        CHECK_OK(gpu_backend_load(name != NULL ? name : "emulated", &b, &err));
    }
    return b;
}

static bool fast(void) {
    return getenv("HEPTA_FAST") != NULL;
}

/* Runs every test of a kernel twice: threads of a block in order, and from the last to the first,
 * which finds two that meet in memory. A real device knows no order. */
#define FOR_BOTH_ORDERS(i)                                                                         \
    for (int i = 0; i < (getenv("HEPTA_TEST_DEVICE") == NULL ? 2 : 1); i++)                        \
        if (setenv("HEPTA_EMULATED_ORDER", i == 0 ? "forward" : "reverse", 1) == 0)

static const struct code_table *const *code_tables(void) {
    static const struct code_table *tables[GPU_N_RATES];
    for (int i = 0; i < GPU_N_RATES; i++) {
        tables[i] = code_table_get(CODE_MIN_RATE + i);
    }
    return tables;
}

static void *room(size_t n) {
    void *p = calloc(n > 0 ? n : 1, 1);
    CHECK(p != NULL);
    return p;
}

static float *random_floats(size_t n, float scale) {
    float *x = room(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = test_random_gauss() * scale;
    }
    return x;
}

/* Zeros, a single large item, tiny ones, infinities and NaN, now and then. */
static void spoil(float *x, size_t n) {
    switch (test_random_below(12)) {
    case 0:
        memset(x, 0, n * sizeof *x);
        break;
    case 1:
        x[test_random_below((uint32_t)n)] = 1e15f;
        break;
    case 2:
        for (size_t i = 0; i < n; i++) {
            x[i] *= 0x1p-126f;
        }
        break;
    case 3:
        x[test_random_below((uint32_t)n)] = test_random() & 1 ? NAN : -INFINITY;
        break;
    default:
        break;
    }
}

static packed_matrix random_matrix(uint32_t half_bits, uint32_t n_rows, uint32_t n_cols) {
    const size_t n_codes = (size_t)((n_rows + 15) / 16 * 16) * (n_cols / 16) * half_bits;
    uint8_t *data = room(n_codes + 2 * (size_t)n_rows);
    for (size_t i = 0; i < n_codes; i++) {
        data[i] = (uint8_t)test_random();
    }
    for (size_t r = 0; r < n_rows; r++) {
        uint16_t scale = bfloat_from_float(0.01f + fabsf(test_random_float()));
        memcpy(data + n_codes + 2 * r, &scale, 2);
    }
    return (packed_matrix){half_bits, n_rows, n_cols, data, data + n_codes};
}

static void free_matrix(packed_matrix *m) {
    free((void *)(uintptr_t)m->codes);
}

/* Equal bits; any NaN is a NaN. */
static void check_floats(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (isnan(b[i]) ? !isnan(a[i]) : math_bits_f32(a[i]) != math_bits_f32(b[i])) {
            test_fail(__FILE__, __LINE__, "item %zu of %zu: %a, expected %a", i, n, (double)a[i],
                      (double)b[i]);
        }
    }
}

static const uint32_t rates[] = {4, 5, 6, 7, 8, 16};
enum { N_RATES = 6 };

/* ---- Kernels ----------------------------------------------------------- */

static void check_matmul(uint32_t rate, uint32_t n_rows, uint32_t n_cols, uint32_t n) {
    hepta_error err;
    packed_matrix m = random_matrix(rate, n_rows, n_cols);
    int8_t *q = room((size_t)n * n_cols);
    activation *x = room(n * sizeof *x);
    for (uint32_t t = 0; t < n; t++) {
        x[t] = (activation){q + (size_t)t * n_cols, 0.001f + fabsf(test_random_float()), 0};
        const bool extreme = test_random_below(4) == 0;
        for (uint32_t c = 0; c < n_cols; c++) {
            int8_t v = (int8_t)((int)test_random_below(255) - 127);
            v = extreme ? (int8_t)(v < 0 ? -127 : 127) : v;
            q[(size_t)t * n_cols + c] = v;
            x[t].sum += v;
        }
    }
    const size_t n_bytes = (size_t)n * n_rows * sizeof(float);
    float *y = room(n_bytes), *expected = room(n_bytes);
    uint8_t *scratch = room(KERNELS_SCRATCH_BYTES(n_cols));
    kernels_ref.matmul_packed(&m, 0, n_rows, x, n, expected, n_rows, scratch);
    CHECK_OK(backend()->checks->matmul(&m, code_tables(), x, n, y, &err));
    CHECK_MEM_EQ(y, expected, n_bytes);
    free(q), free(x), free(y), free(expected), free(scratch);
    free_matrix(&m);
}

TEST(gpu_matmul) {
    static const uint32_t rows[] = {1, 3, 8, 9, 15, 16, 17, 31, 32, 33, 40, 47, 48, 65, 130};
    static const uint32_t cols[] = {16, 32, 48, 64, 80, 96, 112, 128, 176, 256, 272, 688};
    static const uint32_t tokens[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 63, 64, 65, 150, 257};
    FOR_BOTH_ORDERS(order) {
        for (uint32_t rate = 0; rate < N_RATES; rate++) {
            for (uint32_t i = 0; i < 15; i++) {
                check_matmul(rates[rate], rows[test_random_below(fast() ? 12 : 15)],
                             cols[test_random_below(fast() ? 10 : 12)], tokens[i]);
            }
            check_matmul(rates[rate], 17, 4096, 1); /* threads take several groups each */
        }
    }
}

/* The widest matrix with extreme values: the int32 sum must not overflow. */
TEST(gpu_matmul_widest) {
    const uint32_t n = KERNELS_MAX_COLS;
    hepta_error err;
    packed_matrix m = random_matrix(16, 3, n);
    memset((void *)(uintptr_t)m.codes, 0x80, (size_t)16 * n);
    int8_t *q = room(n);
    memset(q, -127, n);
    activation x[33];
    for (int t = 0; t < 33; t++) {
        x[t] = (activation){q, 1.0f, -127 * (int32_t)n};
    }
    for (uint32_t tokens = 1; tokens <= (fast() ? 1 : 33); tokens += 32) {
        float y[33 * 3];
        CHECK_OK(backend()->checks->matmul(&m, code_tables(), x, tokens, y, &err));
        for (uint32_t i = 0; i < 3 * tokens; i++) {
            CHECK(y[i] == (float)(128 * 127 * (int64_t)n) *
                              bfloat_to_float(load_u16(m.scales + 2 * (i % 3))));
        }
    }
    free(q);
    free_matrix(&m);
}

static rotation *new_rotation(uint32_t n, uint64_t seed) {
    hepta_error err;
    rotation *r = NULL;
    CHECK_OK(rotation_create(n, seed, &r, &err));
    return r;
}

/* Powers of two, odd parts that fit registers and that do not, and vectors beyond shared memory. */
static const uint32_t widths[] = {
    1,   2,   3,   4,   7,   8,   9,    12,  16,   40,   64,   68,   72,   96,    100,   128,  172,
    256, 257, 344, 512, 688, 768, 1000, 704, 1032, 1536, 2048, 3584, 4096, 11008, 14336, 28672};
enum { N_WIDTHS = sizeof widths / sizeof widths[0] };

TEST(gpu_embed) {
    FOR_BOTH_ORDERS(order) {
        for (uint32_t i = 0; i < N_WIDTHS; i++) {
            hepta_error err;
            const uint32_t n = widths[i], row = test_random_below(20);
            rotation *r = new_rotation(n, i);
            packed_matrix m = random_matrix(rates[i % N_RATES], 20, r->n_padded);
            float *x = room(n * sizeof *x), *y = room(r->n_padded * sizeof *y);
            float *scratch = room(n * sizeof *scratch);
            uint8_t *bytes = room(r->n_padded);
            kernels_ref.unpack_row(&m, row, y, bytes);
            kernels_ref.rotate_inverse(r, y, scratch);
            CHECK_OK(backend()->checks->embed(&m, code_tables(), r, row, x, &err));
            CHECK_MEM_EQ(x, y, n * sizeof *x);
            free(x), free(y), free(scratch), free(bytes);
            free_matrix(&m);
            rotation_free(r);
        }
    }
}

TEST(gpu_angles) {
    static const uint32_t positions[] = {0, 1, 63, 511, 4095, 131071, 1000000};
    enum { N = 70 };
    for (int i = 0; i < 7; i++) {
        hepta_error err;
        double frequency[N];
        float cosine[N], sine[N];
        for (int k = 0; k < N; k++) {
            frequency[k] = math_pow_f64(500000.0, -2.0 * k / (2.0 * N));
        }
        CHECK_OK(backend()->checks->angles(frequency, N, positions[i], cosine, sine, &err));
        for (int k = 0; k < N; k++) {
            double s, c;
            math_sin_cos_f64((double)positions[i] * frequency[k], &s, &c);
            CHECK(math_bits_f32(cosine[k]) == math_bits_f32((float)c) &&
                  math_bits_f32(sine[k]) == math_bits_f32((float)s));
        }
    }
}

static void check_prepare(uint32_t n, gpu_prepare_mode mode) {
    hepta_error err;
    rotation *r = new_rotation(n, n + (uint32_t)mode);
    const uint32_t padded = r->n_padded;
    float *x = random_floats(n, 2.0f), *y = random_floats(n, 1.0f), *gain = random_floats(n, 1.0f);
    spoil(x, n);
    gpu_prepare_case c = {.mode = mode,
                          .x = room(n * sizeof *x),
                          .y = mode == GPU_PREPARE_NORM && n % 2 == 0 ? NULL : y,
                          .gain = gain,
                          .eps = 1e-5f,
                          .r = r,
                          .q = room(padded)};
    memcpy(c.x, x, n * sizeof *x);
    CHECK_OK(backend()->checks->prepare(&c, &err));
    float *expected = room(padded * sizeof *x), *scratch = room(n * sizeof *x), scale;
    int8_t *q = room(padded);
    int32_t sum;
    if (mode == GPU_PREPARE_NORM) {
        if (c.y != NULL) {
            kernels_ref.add(x, y, n);
        }
        check_floats(c.x, x, n);
        kernels_ref.rmsnorm(x, gain, n, 1e-5f, expected);
    } else {
        memcpy(expected, x, n * sizeof *x);
        if (mode == GPU_PREPARE_SWIGLU) {
            kernels_ref.swiglu(expected, y, n);
        }
    }
    kernels_ref.rotate(r, expected, scratch);
    kernels_ref.quantize_activation(expected, padded, q, &scale, &sum);
    CHECK_MEM_EQ(c.q, q, padded);
    CHECK_MEM_EQ(&c.scale, &scale, sizeof scale);
    CHECK_EQ_INT(c.sum, sum);
    free(x), free(y), free(gain), free(expected), free(scratch), free(q), free(c.x), free(c.q);
    rotation_free(r);
}

TEST(gpu_prepare) {
    FOR_BOTH_ORDERS(order) {
        for (uint32_t i = 0; i < N_WIDTHS; i++) {
            for (int round = 0; round < (widths[i] < 1024 ? 6 : 1); round++) {
                check_prepare(widths[i], GPU_PREPARE_PLAIN);
                check_prepare(widths[i], GPU_PREPARE_NORM);
                check_prepare(widths[i], GPU_PREPARE_SWIGLU);
            }
        }
    }
}

/* RoPE, the cache's rotation, the cache and attention by the reference. */
static void attend_by_ref(const gpu_attention_case *c, float *out) {
    const uint32_t dim = c->head_dim, half = c->n_rot / 2, group = c->n_head / c->n_head_kv;
    const size_t n_bytes = (size_t)kv_bytes(c->type, dim, c->n_pos);
    float *x = room((dim + 32) * sizeof *x), *other = room((dim + 32) * sizeof *other);
    float *scratch = room(KERNELS_ATTENTION_SCRATCH_BYTES(dim));
    int8_t *row = room(KV_ROW(dim));
    for (uint32_t head = 0; head < c->n_head_kv; head++) {
        kv_cache cache = {.type = c->type,
                          .k = room(n_bytes),
                          .v = room(n_bytes),
                          .k_scale = room((c->n_pos + KV_TILE) * sizeof(float)),
                          .v_scale = room((c->n_pos + KV_TILE) * sizeof(float))};
#define TURN(from, position)                                                                       \
    memcpy(x, from, dim * sizeof *x);                                                              \
    kernels_ref.rope(x, c->n_rot, c->interleaved, c->cosine + (size_t)(position)*half,             \
                     c->sine + (size_t)(position)*half);                                           \
    if (c->r != NULL) {                                                                            \
        kernels_ref.rotate(c->r, x, other);                                                        \
    }
        for (uint32_t j = 0; j < c->n_pos; j++) {
            const size_t at = ((size_t)j * c->n_head_kv + head) * dim;
            TURN(c->k + at, j);
            kv_store(&kernels_ref, &cache, dim, j, x, c->v + at, row);
        }
        for (uint32_t t = 0; t < c->n_tokens; t++) {
            for (uint32_t g = 0; g < group; g++) {
                const size_t at = ((size_t)t * c->n_head + head * group + g) * dim;
                TURN(c->q + at, c->positions[t]);
                const attention_query query = {x, out + at, c->positions[t] + 1};
                kernels_ref.attention(&cache, dim, &query, 1, 1.0f / sqrtf((float)dim), scratch);
            }
        }
#undef TURN
        free(cache.k), free(cache.v), free(cache.k_scale), free(cache.v_scale);
    }
    free(x), free(other), free(scratch), free(row);
}

static void check_attention(hepta_cache_type type, uint32_t dim, uint32_t heads_kv, uint32_t group,
                            uint32_t n_pos, uint32_t n_tokens, bool split) {
    hepta_error err;
    const uint32_t n_rot = dim / 2 * 2, half = n_rot / 2;
    float *k = random_floats((size_t)n_pos * heads_kv * dim, 1.0f);
    float *v = random_floats((size_t)n_pos * heads_kv * dim, 1.0f);
    float *q = random_floats((size_t)n_tokens * heads_kv * group * dim, 3.0f);
    float *angle = random_floats((size_t)2 * n_pos * half, 1.0f);
    for (uint32_t j = 0; j < n_pos; j++) {
        if (test_random_below(40) == 0) {
            spoil(k + (size_t)j * heads_kv * dim, dim);
            spoil(v + (size_t)j * heads_kv * dim, dim);
        }
    }
    uint32_t *positions = room(n_tokens * sizeof *positions);
    for (uint32_t t = 0; t < n_tokens; t++) {
        positions[t] = t == 0 ? n_pos - 1 : test_random_below(n_pos);
    }
    const size_t n_out = (size_t)n_tokens * heads_kv * group * dim;
    rotation *r = type == HEPTA_CACHE_Q8 && test_random() & 1 ? new_rotation(dim, 0) : NULL;
    gpu_attention_case c = {.type = type,
                            .n_head = heads_kv * group,
                            .n_head_kv = heads_kv,
                            .head_dim = dim,
                            .n_pos = n_pos,
                            .n_tokens = n_tokens,
                            .interleaved = test_random() & 1,
                            .n_rot = n_rot,
                            .r = r,
                            .cosine = angle,
                            .sine = angle + (size_t)n_pos * half,
                            .k = k,
                            .v = v,
                            .q = q,
                            .positions = positions,
                            .split = split,
                            .out = room(n_out * sizeof(float))};
    float *expected = room(n_out * sizeof(float));
    attend_by_ref(&c, expected);
    CHECK_OK(backend()->checks->attention(&c, &err));
    check_floats(c.out, expected, n_out);
    free(k), free(v), free(q), free(angle), free(positions), free(c.out), free(expected);
    rotation_free(r);
}

TEST(gpu_attention) {
    static const uint32_t dims[] = {1,  2,  6,  8,  12, 15, 16,  17,  24,
                                    32, 40, 64, 72, 80, 96, 128, 129, 256};
    static const uint32_t positions[] = {1,  2,  7,  15,  16,  17,  50, 63,
                                         64, 65, 80, 127, 128, 129, 300};
    static const uint32_t groups[] = {1, 2, 3, 4, 8, 20};
    FOR_BOTH_ORDERS(order) {
        for (uint32_t round = 0; round < (fast() ? 120 : 360); round++) {
            check_attention((hepta_cache_type)(round % 3), dims[test_random_below(18)],
                            1 + test_random_below(2), groups[test_random_below(6)],
                            positions[test_random_below(15)], 1 + test_random_below(5),
                            round % 2 == 0);
        }
    }
}

/* The table of scripts/test-gpu: every step it times runs. */
TEST(gpu_timings) {
    hepta_error err;
    double rate = 0.0;
    rotation *r = new_rotation(96, 3);
    const gpu_timing timings[] = {
        {.what = GPU_TIMED_PRODUCT, .half_bits = 7, .n_rows = 40, .n_cols = 80, .n_tokens = 1},
        {.what = GPU_TIMED_PRODUCT, .half_bits = 7, .n_rows = 40, .n_cols = 80, .n_tokens = 70},
        {.what = GPU_TIMED_PREPARE, .mode = GPU_PREPARE_NORM, .r = r, .n_tokens = 2},
        {.what = GPU_TIMED_PREPARE, .mode = GPU_PREPARE_SWIGLU, .r = r, .n_tokens = 1},
        {.what = GPU_TIMED_ATTENTION,
         .n_head = 4,
         .n_head_kv = 2,
         .head_dim = 16,
         .n_pos = 70,
         .n_tokens = 2},
    };
    for (size_t i = 0; i < sizeof timings / sizeof timings[0]; i++) {
        double seconds = -1.0;
        CHECK_OK(backend()->checks->time(&timings[i], code_tables(), &seconds, &err));
        CHECK(seconds > 0.0 && seconds < 10.0);
    }
    CHECK_OK(backend()->checks->tile_rate(0, &rate, &err));
    CHECK(rate > 0.0);
    rotation_free(r);
}

/* ---- Whole models ------------------------------------------------------ */

#define BUNDLED "models/hepta-stories-7m.hepta"

typedef struct device_case {
    uint32_t layers;
    double memory;
    bool stream;
} device_case;

static const char *device_name(void) {
    const char *name = getenv("HEPTA_TEST_DEVICE");
    return name != NULL ? name : "emulated";
}

static hepta_model *open_on(const char *path, const device_case *c) {
    hepta_error err;
    hepta_model *m = NULL;
    CHECK_OK(hepta_model_open(path, &m, &err));
    if (c != NULL) {
        const hepta_device_options o = {
            .device = device_name(), .layers = c->layers, .memory = c->memory, .stream = c->stream};
        CHECK_OK(hepta_model_use_device(m, &o, &err));
    }
    return m;
}

/* Logits of all tokens (n, n_vocab): a prompt in chunks, then one by one, of one sequence. */
static float *logits_of(const hepta_model *m, const int32_t *tokens, uint32_t n, uint32_t n_prompt,
                        uint32_t n_batch, hepta_cache_type cache) {
    hepta_error err;
    const uint32_t n_vocab = m->info.n_vocab;
    hepta_session *s = NULL;
    float *logits = room((size_t)n * n_vocab * sizeof *logits);
    CHECK_OK(hepta_session_create(
        m, &(hepta_session_options){.n_batch = n_batch, .threads = 1, .cache_type = cache}, &s,
        &err));
    CHECK_OK(hepta_session_eval(s, tokens, n_prompt, logits, true, &err));
    for (uint32_t i = n_prompt; i < n; i++) {
        CHECK_OK(hepta_session_eval(s, tokens + i, 1, logits + (size_t)i * n_vocab, false, &err));
    }
    hepta_session_free(s);
    return logits;
}

static void random_ids(int32_t *tokens, uint32_t n, uint32_t n_vocab) {
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)test_random_below(n_vocab);
    }
}

static const char *tiny_path(uint32_t half_bits, bool interleaved) {
    static char path[1024];
    tiny_model *t = room(sizeof *t);
    tiny_default(t, TENSOR_PACKED, half_bits);
    tiny_set_bool(t, "hepta.rope.interleaved", interleaved);
    snprintf(path, sizeof path, "%s/tiny.hepta", test_tmp_dir());
    tiny_write(t, path);
    free(t);
    return path;
}

/* All rates and caches, on the GPU alone and together with the CPU: the bits of the CPU. */
TEST(gpu_tiny_models) {
    enum { MOST = 140 };
    const uint32_t n = fast() ? 80 : MOST, n_prompt = fast() ? 70 : 100;
    for (uint32_t rate = 0; rate < N_RATES; rate++) {
        const char *path = tiny_path(rates[rate], rate % 2 == 0);
        int32_t tokens[MOST];
        hepta_model *cpu = open_on(path, NULL);
        random_ids(tokens, n, 50);
        for (uint32_t i = 0; i < (fast() ? 3 : 6); i++) {
            const hepta_cache_type cache = (hepta_cache_type)(i % 3);
            hepta_model *m = open_on(path, &(device_case){.layers = i % 2});
            CHECK_EQ_INT(m->gpu_layers, i % 2 == 0 ? 2 : 1);
            float *expected = logits_of(cpu, tokens, n, n_prompt, 33, cache);
            float *logits = logits_of(m, tokens, n, n_prompt, i % 2 == 0 ? 70 : 7, cache);
            CHECK_MEM_EQ(logits, expected, sizeof(float) * 50 * n);
            free(logits), free(expected);
            hepta_model_close(m);
        }
        hepta_model_close(cpu);
    }
}

/* Several sequences, prompts and single tokens together, some of whose logits are wanted. */
TEST(gpu_batches) {
    enum { SEQUENCES = 5, STEPS = 12, MOST = 30 };
    for (uint32_t round = 0; round < 6; round++) {
        const char *path = tiny_path(7, true);
        const device_case c = {.layers = round % 2};
        hepta_error err;
        hepta_model *models[2] = {open_on(path, NULL), open_on(path, &c)};
        hepta_session *s[2] = {NULL, NULL};
        const hepta_session_options o = {.n_ctx = 160,
                                         .n_batch = round < 3 ? 64 : 9,
                                         .threads = 1,
                                         .n_sequences = SEQUENCES,
                                         .cache_type = (hepta_cache_type)(round % 3)};
        for (int i = 0; i < 2; i++) {
            CHECK_OK(hepta_session_create(models[i], &o, &s[i], &err));
        }
        for (int step = 0; step < STEPS; step++) {
            hepta_batch_token batch[MOST];
            const uint32_t n = 1 + test_random_below(MOST);
            static float logits[2][MOST * 50];
            for (uint32_t i = 0; i < n; i++) {
                batch[i] =
                    (hepta_batch_token){(int32_t)test_random_below(50),
                                        test_random_below(SEQUENCES), test_random_below(2) != 0};
            }
            memset(logits, 0, sizeof logits);
            for (int i = 0; i < 2; i++) {
                CHECK_OK(hepta_session_eval_batch(s[i], batch, n, logits[i], &err));
            }
            CHECK_MEM_EQ(logits[1], logits[0], sizeof logits[0]);
            if (step % 4 == 3) {
                for (int i = 0; i < 2; i++) {
                    hepta_session_truncate(s[i], (uint32_t)step % SEQUENCES, 3);
                }
            }
        }
        for (int i = 0; i < 2; i++) {
            hepta_session_free(s[i]);
            hepta_model_close(models[i]);
        }
    }
}

/* The bundled model: a prompt, then tokens one by one. */
static void check_bundled(hepta_model *cpu, const device_case *c, uint32_t n, uint32_t n_prompt,
                          hepta_cache_type cache) {
    static int32_t tokens[256];
    const uint32_t n_vocab = cpu->info.n_vocab;
    hepta_model *m = open_on(BUNDLED, c);
    random_ids(tokens, n, n_vocab);
    float *expected = logits_of(cpu, tokens, n, n_prompt, 64, cache);
    float *logits = logits_of(m, tokens, n, n_prompt, 0, cache);
    CHECK_MEM_EQ(logits, expected, sizeof(float) * n_vocab * n);
    free(logits), free(expected);
    hepta_model_close(m);
}

TEST(gpu_bundled_model) {
    hepta_model *cpu = open_on(BUNDLED, NULL);
    check_bundled(cpu, &(device_case){.layers = 0}, fast() ? 22 : 256, fast() ? 18 : 230,
                  HEPTA_CACHE_F16);
    check_bundled(cpu, &(device_case){.layers = 3}, fast() ? 8 : 24, fast() ? 5 : 20,
                  HEPTA_CACHE_Q8);
    hepta_model_close(cpu);
}

/* Less and less of the device's memory: fewer layers there, or more of them streamed. */
TEST(gpu_memory) {
    hepta_model *cpu = open_on(BUNDLED, NULL),
                *whole = open_on(BUNDLED, &(device_case){.layers = 0});
    const double bytes = (double)whole->gpu->model_bytes(whole->gpu_model);
    uint32_t before[2] = {8, 8};
    hepta_model_close(whole);
    for (int tenths = 9; tenths >= 6; tenths -= 3) {
        for (int stream = 0; stream < 2; stream++) {
            const device_case c = {.memory = bytes * tenths / 10, .stream = stream == 1};
            hepta_model *m = open_on(BUNDLED, &c);
            test_note("%d tenths: %s", tenths, hepta_model_device(m));
            CHECK((double)m->gpu->model_bytes(m->gpu_model) <= c.memory + 65536.0);
            const char *streamed = strstr(hepta_model_device(m), " streamed");
            const uint32_t resident =
                stream == 0 ? m->gpu_layers : 8 - (uint32_t)(streamed[-1] - '0');
            CHECK(m->gpu_layers == (stream == 1 ? 8 : resident) && resident < before[stream]);
            before[stream] = resident;
            hepta_model_close(m);
            check_bundled(cpu, &c, 3, 2, HEPTA_CACHE_F16);
        }
    }
    hepta_model_close(cpu);
}

/* ---- Errors ------------------------------------------------------------ */

static hepta_status try_device(const char *path, const hepta_device_options *o, hepta_error *why) {
    hepta_error err;
    hepta_model *m = NULL;
    CHECK_OK(hepta_model_open(path, &m, &err));
    const hepta_status status = hepta_model_use_device(m, o, why);
    CHECK(status == HEPTA_OK || m->gpu == NULL);
    hepta_model_close(m);
    return status;
}

/* Faults that the emulated device has when it is told to. */
static void need_emulation(void) {
    if (getenv("HEPTA_TEST_DEVICE") != NULL) {
        SKIP("only the emulated device can be made to fail");
    }
}

TEST(gpu_errors) {
    hepta_error err;
    need_emulation();
    const char *path = tiny_path(7, true);
    static const struct {
        const char *fault, *device, *says;
        hepta_status status;
    } cases[] = {
        {"driver", "emulated", "no driver", HEPTA_ERROR_DEVICE},
        {"old", "emulated", "too old", HEPTA_ERROR_DEVICE},
        {"none", "emulated", "the machine has 0", HEPTA_ERROR_DEVICE},
        {"", "emulated:7", "no emulated GPU 7", HEPTA_ERROR_DEVICE},
        {"memory=1000", "emulated", "hold no layer", HEPTA_ERROR_MEMORY},
        {"", "abacus", "libhepta-abacus.so is not there", HEPTA_ERROR_DEVICE},
        {"", "emulated:x", "cuda:N", HEPTA_ERROR_ARGUMENT},
        {"", "Emulated", "cuda:N", HEPTA_ERROR_ARGUMENT},
        {"", "", "cuda:N", HEPTA_ERROR_ARGUMENT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        setenv("HEPTA_EMULATED_FAULT", cases[i].fault, 1);
        const hepta_device_options o = {.device = cases[i].device};
        CHECK_EQ_INT(try_device(path, &o, &err), cases[i].status);
        if (strstr(err.message, cases[i].says) == NULL) {
            test_fail(__FILE__, __LINE__, "\"%s\" lacks \"%s\"", err.message, cases[i].says);
        }
    }
    unsetenv("HEPTA_EMULATED_FAULT");
    CHECK_OK(try_device(path, &(hepta_device_options){.device = "cpu"}, &err));
    hepta_model *m = NULL;
    setenv("HEPTA_GPU_PATH", "/nonexistent", 1);
    CHECK_OK(hepta_model_open(path, &m, &err));
    CHECK_OK(hepta_model_use_device(m, &(hepta_device_options){.device = "auto"}, &err));
    CHECK(strncmp(hepta_model_device(m), "CPU (no GPU: libhepta-cuda.so", 29) == 0);
    hepta_model_close(m);
    unsetenv("HEPTA_GPU_PATH");
    CHECK_OK(try_device(path, &(hepta_device_options){.device = "emulated:1"}, &err));
    tiny_model *t = room(sizeof *t);
    tiny_default(t, TENSOR_F32, 0);
    char plain[1024];
    snprintf(plain, sizeof plain, "%s/plain.gguf", test_tmp_dir());
    tiny_write(t, plain);
    free(t);
    CHECK_EQ_INT(try_device(plain, &(hepta_device_options){.device = "emulated"}, &err),
                 HEPTA_ERROR_UNSUPPORTED);
}

/* Wherever the device's memory ends while a model is loaded and a session made: an error, no leak.
 */
TEST(gpu_out_of_memory) {
    hepta_error err;
    need_emulation();
    const char *path = tiny_path(7, true);
    const hepta_device_options o = {.device = "emulated", .memory = 1e9};
    const hepta_session_options so = {.n_ctx = 16, .n_batch = 4, .threads = 1};
    int n[3] = {0, 0, 0};
    for (uint64_t bytes = 0; bytes < 1600000; bytes += bytes / 16 + 500) {
        char fault[64];
        hepta_model *m = NULL;
        hepta_session *s = NULL;
        snprintf(fault, sizeof fault, "memory=%llu", (unsigned long long)bytes);
        CHECK_OK(hepta_model_open(path, &m, &err));
        setenv("HEPTA_EMULATED_FAULT", fault, 1);
        hepta_status status = hepta_model_use_device(m, &o, &err);
        n[0] += status != HEPTA_OK;
        if (status == HEPTA_OK) {
            status = hepta_session_create(m, &so, &s, &err);
            n[status == HEPTA_OK ? 2 : 1]++;
        }
        CHECK(status == HEPTA_OK || status == HEPTA_ERROR_MEMORY);
        hepta_session_free(s);
        hepta_model_close(m);
    }
    CHECK(n[0] > 10 && n[1] > 10 && n[2] > 1);
}

/* A device that is lost in the middle: an error, and the session's positions as they were. */
TEST(gpu_lost) {
    hepta_error err;
    need_emulation();
    hepta_session *s = NULL;
    hepta_model *m = open_on(tiny_path(7, true), &(device_case){.layers = 1});
    static float logits[50];
    const int32_t tokens[5] = {1, 2, 3, 4, 5};
    CHECK_OK(
        hepta_session_create(m, &(hepta_session_options){.n_batch = 2, .threads = 1}, &s, &err));
    CHECK_OK(hepta_session_eval(s, tokens, 3, logits, false, &err));
    setenv("HEPTA_EMULATED_FAULT", "lost=2", 1); /* in the call's second chunk */
    CHECK_EQ_INT(hepta_session_eval(s, tokens, 5, logits, false, &err), HEPTA_ERROR_DEVICE);
    CHECK(strstr(err.message, "lost") != NULL);
    CHECK_EQ_INT(hepta_session_position(s, 0), 3);
    unsetenv("HEPTA_EMULATED_FAULT");
    hepta_session_free(s);
    hepta_model_close(m);
}
