/*
 * gpu_table.c - what scripts/test-gpu prints of one model: whether its logits on the GPU have the
 * CPU's bits, and how fast it is there.
 *
 * Usage: gpu_table DEVICE MODEL [--identity N] [--quick] [--memory GIB] [--stream] [--layers N]
 *        gpu_table DEVICE steps [--quick]
 *
 * `steps`: the device's ceilings, and the single steps of a layer of 8 B weights, alone, against
 * them
 * (--quick: of a small one). Otherwise
 * MODEL is a file, or the name of a shape: then the weights are random codes, made in memory, and
 * every layer has the same ones (the GPU still holds each). Lines are "name<TAB>value<TAB>unit".
 */
#include "model/llama.h"

#include "kernels/math.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct shape {
    const char *name;
    uint32_t n_vocab, n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff, n_ctx;
} shape;

static const shape shapes[] = {
    {"tinyllama-1.1b", 32000, 2048, 22, 32, 4, 64, 5632, 2304},
    {"llama-3-8b", 128256, 4096, 32, 32, 8, 128, 14336, 2304},
    {"llama-3-70b", 128256, 8192, 80, 64, 8, 128, 28672, 2304},
};

static hepta_error err;

static void check(hepta_status status, const char *what) {
    if (status != HEPTA_OK) {
        fprintf(stderr, "gpu_table: %s: %s\n", what, err.message);
        exit(1);
    }
}

static void *room(size_t n) {
    void *p = aligned_alloc(64, (n + 63) / 64 * 64);
    if (p == NULL) {
        fprintf(stderr, "gpu_table: no memory for %zu bytes\n", n);
        exit(1);
    }
    return p;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t next_random(void) {
    static uint64_t state = 1;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

/* ---- Models of random weights ------------------------------------------ */

static const rotation *find_rotation(hepta_model *m, uint32_t n) {
    for (size_t i = 0; i < m->n_rotations; i++) {
        if (m->rotations[i]->n == n) {
            return m->rotations[i];
        }
    }
    check(rotation_create(n, 7, &m->rotations[m->n_rotations], &err), "rotation");
    return m->rotations[m->n_rotations++];
}

/* Random codes at 3.5 bits whose weights have a variance of 1 / n_cols. */
static matrix random_matrix(hepta_model *m, uint32_t n_rows, uint32_t n_cols) {
    matrix a = {.type = TENSOR_PACKED, .n_rows = n_rows, .n_cols = n_cols};
    uint64_t n_bytes = 0;
    if (!tensor_packed_bytes(7, n_rows, n_cols, &n_bytes)) {
        exit(1);
    }
    uint8_t *data = room((size_t)n_bytes + 8);
    for (uint64_t i = 0; i < n_bytes; i += 8) {
        const uint64_t x = next_random();
        memcpy(data + i, &x, 8);
    }
    const uint32_t padded = (uint32_t)round_up(n_cols, 16);
    uint8_t *scales = data + round_up(n_rows, PACKED_STRIP) * ((uint64_t)padded / 16 * 7);
    const uint16_t scale = bfloat_from_float(1.0f / (16.0f * sqrtf((float)n_cols)));
    for (uint32_t r = 0; r < n_rows; r++) {
        memcpy(scales + 2 * (size_t)r, &scale, 2);
    }
    a.packed = (packed_matrix){7, n_rows, padded, data, scales};
    a.rotation = find_rotation(m, n_cols);
    tensor *t = room(sizeof *t); /* tells matrices apart */
    a.source = t;
    return a;
}

static hepta_model *random_model(const shape *s) {
    hepta_model *m = memory_alloc(1, sizeof *m);
    if (m == NULL) {
        exit(1);
    }
    check(kernels_select(&m->kernels, &err), "kernels");
    hepta_model_info *i = &m->info;
    i->n_vocab = s->n_vocab, i->n_embd = s->n_embd, i->n_layer = s->n_layer, i->n_head = s->n_head;
    i->n_head_kv = s->n_head_kv, i->head_dim = s->head_dim, i->n_ff = s->n_ff;
    i->n_ctx_train = s->n_ctx, i->quantized = true;
    m->norm_eps = 1e-5f;
    m->n_rot = s->head_dim;
    m->rope_frequency = room(s->head_dim / 2 * sizeof(double));
    for (uint32_t k = 0; k < s->head_dim / 2; k++) {
        m->rope_frequency[k] = math_pow_f64(500000.0, -2.0 * (double)k / s->head_dim);
    }
    float *ones = room(s->n_embd * sizeof *ones);
    for (uint32_t k = 0; k < s->n_embd; k++) {
        ones[k] = 1.0f;
    }
    const uint32_t heads = s->n_head * s->head_dim, heads_kv = s->n_head_kv * s->head_dim;
    m->embedding = random_matrix(m, s->n_vocab, s->n_embd);
    m->head = random_matrix(m, s->n_vocab, s->n_embd);
    m->output_norm = ones;
    m->layers = room(s->n_layer * sizeof *m->layers);
    m->layers[0] = (llama_layer){.attn_norm = ones,
                                 .wq = random_matrix(m, heads, s->n_embd),
                                 .wk = random_matrix(m, heads_kv, s->n_embd),
                                 .wv = random_matrix(m, heads_kv, s->n_embd),
                                 .wo = random_matrix(m, s->n_embd, heads),
                                 .ffn_norm = ones,
                                 .gate = random_matrix(m, s->n_ff, s->n_embd),
                                 .up = random_matrix(m, s->n_ff, s->n_embd),
                                 .down = random_matrix(m, s->n_embd, s->n_ff)};
    for (uint32_t layer = 1; layer < s->n_layer; layer++) {
        m->layers[layer] = m->layers[0];
    }
    return m;
}

static double matrix_bytes(const matrix *a) {
    return (double)a->n_rows * a->packed.n_cols / 16 * a->packed.half_bits + 2.0 * a->n_rows;
}

/* Bytes of weights that a token reads. */
static double weight_bytes(const hepta_model *m) {
    double n = matrix_bytes(&m->head);
    for (uint32_t layer = 0; layer < m->info.n_layer; layer++) {
        const llama_layer *l = &m->layers[layer];
        const matrix *all[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down};
        for (int i = 0; i < 7; i++) {
            n += matrix_bytes(all[i]);
        }
    }
    return n;
}

/* Products with weights that a token takes, the head's left out. */
static double layer_products(const hepta_model *m) {
    const llama_layer *l = &m->layers[0];
    const matrix *all[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down};
    double n = 0;
    for (int i = 0; i < 7; i++) {
        n += (double)all[i]->n_rows * all[i]->n_cols;
    }
    return n * m->info.n_layer;
}

/* ---- Measurements ------------------------------------------------------ */

static void line(const char *name, double value, const char *unit) {
    printf("%s\t%.6g\t%s\n", name, value, unit);
    fflush(stdout);
}

static int32_t *random_tokens(uint32_t n, uint32_t n_vocab) {
    int32_t *tokens = room((size_t)n * sizeof *tokens);
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)(next_random() % n_vocab);
    }
    return tokens;
}

static hepta_session *new_session(const hepta_model *m, hepta_session_options o) {
    hepta_session *s = NULL;
    o.n_ctx = o.n_ctx != 0 ? o.n_ctx : m->info.n_ctx_train;
    check(hepta_session_create(m, &o, &s, &err), "session");
    return s;
}

/* Logits of n tokens: a prompt of three quarters in one call, then one by one. Returns how many
 * rows differ between the sessions. */
static uint32_t compare(hepta_session *a, hepta_session *b, const int32_t *tokens, uint32_t n) {
    const uint32_t n_vocab = a->model->info.n_vocab, n_prompt = n - n / 4;
    float *x = room((size_t)n_prompt * n_vocab * 4), *y = room((size_t)n_prompt * n_vocab * 4);
    uint32_t differ = 0;
    check(hepta_session_eval(a, tokens, n_prompt, x, true, &err), "CPU");
    check(hepta_session_eval(b, tokens, n_prompt, y, true, &err), "GPU");
    for (uint32_t i = 0; i < n_prompt; i++) {
        const size_t row = (size_t)i * n_vocab;
        differ += memcmp(x + row, y + row, (size_t)n_vocab * 4) != 0;
    }
    for (uint32_t i = n_prompt; i < n; i++) {
        check(hepta_session_eval(a, tokens + i, 1, x, false, &err), "CPU");
        check(hepta_session_eval(b, tokens + i, 1, y, false, &err), "GPU");
        differ += memcmp(x, y, (size_t)n_vocab * 4) != 0;
    }
    free(x), free(y);
    return differ;
}

/* Tokens a second of n_sequences that each take `steps` tokens, the best of three. */
static double generation(const hepta_model *m, uint32_t n_sequences, uint32_t steps,
                         hepta_cache_type cache) {
    hepta_session *s = new_session(m, (hepta_session_options){.n_sequences = n_sequences,
                                                              .n_ctx = 2 * steps + 8,
                                                              .n_batch = 64,
                                                              .cache_type = cache});
    hepta_batch_token *batch = room(n_sequences * sizeof *batch);
    float *logits = room((size_t)n_sequences * m->info.n_vocab * 4);
    double best = 1e30;
    for (int run = 0; run < 4; run++) { /* the first is not counted */
        for (uint32_t i = 0; i < n_sequences; i++) {
            hepta_session_truncate(s, i, 0);
        }
        const double started = seconds();
        for (uint32_t step = 0; step < steps; step++) {
            for (uint32_t i = 0; i < n_sequences; i++) {
                batch[i] =
                    (hepta_batch_token){(int32_t)((step * 7 + i) % m->info.n_vocab), i, true};
            }
            check(hepta_session_eval_batch(s, batch, n_sequences, logits, &err), "generation");
        }
        const double took = seconds() - started;
        best = run > 0 && took < best ? took : best;
    }
    hepta_session_free(s);
    free(batch), free(logits);
    return (double)n_sequences * steps / best;
}

/* Seconds for a prompt of n tokens in chunks of n_batch, the best of two after the first. */
static double prompt(const hepta_model *m, uint32_t n, uint32_t n_batch, hepta_cache_type cache) {
    hepta_session *s = new_session(
        m, (hepta_session_options){.n_batch = n_batch, .n_ctx = n, .cache_type = cache});
    int32_t *tokens = random_tokens(n, m->info.n_vocab);
    float *logits = room((size_t)m->info.n_vocab * 4);
    double best = 1e30;
    for (int run = 0; run < 3; run++) {
        hepta_session_truncate(s, 0, 0);
        const double started = seconds();
        check(hepta_session_eval(s, tokens, n, logits, false, &err), "prompt");
        const double took = seconds() - started;
        best = run > 0 && took < best ? took : best;
    }
    hepta_session_free(s);
    free(tokens), free(logits);
    return best;
}

/* ---- Single steps ------------------------------------------------------ */

typedef struct ceilings {
    double read, copied, tiles;
} ceilings;

static const gpu_backend *open_backend(const char *device, int *number) {
    const gpu_backend *backend;
    char name[64];
    const char *colon = strchr(device, ':');
    *number = colon != NULL ? atoi(colon + 1) : 0;
    snprintf(name, sizeof name, "%.*s", colon != NULL ? (int)(colon - device) : 63, device);
    check(gpu_backend_load(name, &backend, &err), "device");
    return backend;
}

static ceilings find_ceilings(const gpu_backend *backend, int number) {
    ceilings c = {0, 0, 0};
    check(backend->bandwidth(number, &c.read, &c.copied, &err), "bandwidth");
    check(backend->checks->tile_rate(number, &c.tiles, &err), "tile rate");
    line("read ceiling", c.read * 1e-9, "GB/s");
    line("copy ceiling", c.copied * 1e-9, "GB/s");
    line("int8 tiles (mma.sync) from registers", c.tiles * 1e-12, "int8 TOPS");
    return c;
}

static double time_step(const gpu_backend *backend, const gpu_timing *t) {
    const struct code_table *tables[GPU_N_RATES];
    double took = 0;
    for (int i = 0; i < GPU_N_RATES; i++) {
        tables[i] = code_table_get(CODE_MIN_RATE + i);
    }
    check(backend->checks->time(t, tables, &took, &err), "step");
    return took;
}

/* The device's first GPU alone: timings are of device 0. */
static void steps(const char *device, bool quick) {
    int number;
    const gpu_backend *backend = open_backend(device, &number);
    const ceilings c = find_ceilings(backend, number);
    const uint32_t n_embd = quick ? 256 : 4096, n_ff = quick ? 896 : 14336,
                   n_pos = quick ? 100 : 1024;
    const struct {
        const char *name;
        uint32_t n_rows, n_cols;
    } products[] = {{"q, k, v", n_embd * 3 / 2, n_embd},
                    {"o", n_embd, n_embd},
                    {"gate, up", 2 * n_ff, n_embd},
                    {"down", n_embd, n_ff},
                    {"head", quick ? 512 : 128256, n_embd}};
    static const uint32_t tokens[] = {1, 2, 8, 16, 32, 64, 128, 512, 2048};
    char name[96];
    for (size_t i = 0; i < sizeof tokens / sizeof tokens[0] && !(quick && tokens[i] > 128); i++) {
        for (int p = 0; p < (tokens[i] > 64 ? 4 : 5); p++) {
            const gpu_timing t = {.what = GPU_TIMED_PRODUCT,
                                  .half_bits = 7,
                                  .n_rows = products[p].n_rows,
                                  .n_cols = products[p].n_cols,
                                  .n_tokens = tokens[i]};
            const double took = time_step(backend, &t), weights = (double)t.n_rows * t.n_cols;
            snprintf(name, sizeof name, "%s, %u tokens", products[p].name, t.n_tokens);
            line(name, took * 1e6, "us");
            if (tokens[i] <= 32) {
                line("    of the read ceiling", 100 * weights * 7 / 16 / took / c.read, "%");
            }
            if (tokens[i] >= 32) {
                line("    of the tiles' rate", 200 * weights * tokens[i] / took / c.tiles, "%");
            }
        }
    }
    rotation *of_embd, *of_ff;
    check(rotation_create(n_embd, 7, &of_embd, &err), "rotation");
    check(rotation_create(n_ff, 7, &of_ff, &err), "rotation");
    for (uint32_t n = 1; n <= (quick ? 16 : 2048); n = n == 16 ? 2048 : n * 16) {
        static const char *const modes[] = {"rotation", "norm, rotation", "SwiGLU, rotation"};
        for (int mode = 0; mode < 3; mode++) {
            const gpu_timing t = {.what = GPU_TIMED_PREPARE,
                                  .mode = (gpu_prepare_mode)mode,
                                  .r = mode == GPU_PREPARE_SWIGLU ? of_ff : of_embd,
                                  .n_tokens = n};
            snprintf(name, sizeof name, "%s of %u items, %u tokens", modes[mode], t.r->n, n);
            line(name, time_step(backend, &t) * 1e6, "us");
        }
        const gpu_timing t = {.what = GPU_TIMED_ATTENTION,
                              .n_head = 32,
                              .n_head_kv = 8,
                              .head_dim = quick ? 16 : 128,
                              .n_pos = n > n_pos ? n : n_pos,
                              .n_tokens = n};
        snprintf(name, sizeof name, "attention over %u positions, %u tokens", t.n_pos, n);
        line(name, time_step(backend, &t) * 1e6, "us");
    }
    rotation_free(of_embd);
    rotation_free(of_ff);
}

/* ---- Models ------------------------------------------------------------ */

/* The same model without its GPU. */
static hepta_model on_cpu(const hepta_model *m) {
    hepta_model cpu = *m;
    cpu.gpu = NULL, cpu.gpu_layers = 0;
    return cpu;
}

static void measure(const hepta_model *m, uint32_t identity, bool quick) {
    const double bytes = weight_bytes(m);
    const ceilings c = find_ceilings(m->gpu, m->gpu_number);
    line("weights read by a token", bytes * 1e-9, "GB");
    line("GPU memory of weights", (double)m->gpu->model_bytes(m->gpu_model) * 1e-9, "GB");
    const hepta_model cpu = on_cpu(m);
    static const hepta_cache_type types[] = {HEPTA_CACHE_F32, HEPTA_CACHE_F16, HEPTA_CACHE_Q8};
    static const char *const names[] = {"F32", "F16", "Q8"};
    for (int i = 0; i < 3 && identity > 0; i++) {
        const hepta_session_options o = {.cache_type = types[i], .n_ctx = identity};
        hepta_session *a = new_session(&cpu, o), *b = new_session(m, o);
        const uint32_t n = i == 1 ? identity : identity / 4;
        int32_t *tokens = random_tokens(n, m->info.n_vocab);
        char name[64];
        snprintf(name, sizeof name, "rows of logits that differ, %s cache, of %u", names[i], n);
        line(name, compare(a, b, tokens, n), "");
        hepta_session_free(a);
        hepta_session_free(b);
        free(tokens);
    }
    const uint32_t steps = m->gpu_resident < m->gpu_layers ? 4 : quick ? 16 : 64;
    const double one = generation(m, 1, steps, HEPTA_CACHE_F16);
    line("generation, 1 sequence", one, "tokens/s");
    line("share of the read ceiling", 100 * one * bytes / c.read, "%");
    if (quick) {
        return;
    }
    line("generation, 1 sequence, Q8 cache", generation(m, 1, steps, HEPTA_CACHE_Q8), "tokens/s");
    for (uint32_t n = 2; n <= 64; n *= 2) {
        char name[64];
        snprintf(name, sizeof name, "generation, %u sequences", n);
        line(name, generation(m, n, 32, HEPTA_CACHE_F16), "tokens/s");
    }
    const uint32_t n = m->info.n_ctx_train < 2048 ? m->info.n_ctx_train : 2048;
    for (int i = 1; i < 3; i++) {
        char name[64];
        const double took = prompt(m, n, n, types[i]);
        snprintf(name, sizeof name, "prompt of %u, %s cache", n, names[i]);
        line(name, n / took, "tokens/s");
        snprintf(name, sizeof name, "its products, %s cache", names[i]);
        line(name, 2e-12 * layer_products(m) * n / took, "int8 TOPS");
        line("    of the tiles' rate", 200 * layer_products(m) * n / took / c.tiles, "%");
    }
}

int main(int argc, char **argv) {
    uint32_t identity = 0;
    bool quick = false;
    hepta_device_options o = {.device = argc > 2 ? argv[1] : "cuda"};
    hepta_model *m = NULL;
    for (int i = 3; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "0";
        if (strcmp(argv[i], "--identity") == 0) {
            identity = (uint32_t)strtoul(value, NULL, 10), i++;
        } else if (strcmp(argv[i], "--memory") == 0) {
            o.memory = strtod(value, NULL) * 0x1p30, i++;
        } else if (strcmp(argv[i], "--layers") == 0) {
            o.layers = (uint32_t)strtoul(value, NULL, 10), i++;
        } else if (strcmp(argv[i], "--stream") == 0) {
            o.stream = true;
        } else if (strcmp(argv[i], "--quick") == 0) {
            quick = true;
        } else {
            argc = 0;
        }
    }
    if (argc < 3) {
        fprintf(stderr,
                "usage: %s DEVICE MODEL [--identity N] [--quick] [--memory GIB] [--stream]"
                " [--layers N]\n",
                argv[0]);
        return 2;
    }
    if (strcmp(argv[2], "steps") == 0) {
        steps(argv[1], quick);
        return 0;
    }
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (strcmp(argv[2], shapes[i].name) == 0) {
            m = random_model(&shapes[i]);
        }
    }
    if (m == NULL) {
        check(hepta_model_open(argv[2], &m, &err), argv[2]);
    }
    const double started = seconds();
    check(hepta_model_use_device(m, &o, &err), "device");
    printf("device\t%s\t\n", hepta_model_device(m));
    line("loading", seconds() - started, "s");
    measure(m, identity, quick);
    return 0;
}
