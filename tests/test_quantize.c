/*
 * test_quantize.c - the quantizer: sizes promised and kept, same bytes for any thread count,
 * nothing half-written, and what quantization costs in perplexity.
 */
#include "test.h"

#include "base/base.h"
#include "code/code.h"
#include "format/container.h"
#include "kernels/kernels.h"
#include "quantize/feedback.h"
#include "quantize/head.h"
#include "quantize/plan.h"
#include "quantize/quantizer.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

static const char stories[] = "models/stories260K.bin", stories_tokenizer[] = "models/tok512.bin";
static const char bundled_f16[] = "models/hepta-stories-7m-f16.gguf";
static const char bundled[] = "models/hepta-stories-7m.hepta";

/* Fewer cases, for sanitizers and emulators. */
static bool fast(void) {
    return getenv("HEPTA_FAST") != NULL;
}

/* Paths of the stories260K model and its tokenizer; skips when absent. */
static void need_stories(char model[512], char tokenizer[512]) {
    snprintf(model, 512, "%s", test_need_data(stories));
    snprintf(tokenizer, 512, "%s", test_need_data(stories_tokenizer));
}

/* ---- The plan ---------------------------------------------------------- */

typedef struct shape {
    const char *name;
    uint64_t dim, ff, kv, layers, vocab;
    bool tied;
} shape;

static const shape shapes[] = {
    {"bundled", 256, 768, 128, 8, 4096, true},
    {"TinyLlama 1.1B", 2048, 5632, 256, 22, 32000, false},
    {"Llama 2 7B", 4096, 11008, 4096, 32, 32000, false},
    {"Llama 3 8B", 4096, 14336, 1024, 32, 128256, false},
    {"Llama 2 70B", 8192, 28672, 1024, 80, 32000, false},
};

static size_t make_tensors(const shape *s, tensor *out, char (*names)[64]) {
    static const char *const kinds[] = {"attn_q",      "attn_k",    "attn_v",
                                        "attn_output", "ffn_gate",  "ffn_up",
                                        "ffn_down",    "attn_norm", "ffn_norm"};
    size_t n = 0;
    for (uint64_t l = 0; l < s->layers; l++) {
        uint64_t ne[9][2] = {{s->dim, s->dim}, {s->dim, s->kv}, {s->dim, s->kv},
                             {s->dim, s->dim}, {s->dim, s->ff}, {s->dim, s->ff},
                             {s->ff, s->dim},  {s->dim, 1},     {s->dim, 1}};
        for (int k = 0; k < 9; k++, n++) {
            snprintf(names[n], 64, "blk.%d.%s.weight", (int)l, kinds[k]);
            out[n] = (tensor){
                .name = names[n], .n_dims = k < 7 ? 2 : 1, .ne = {ne[k][0], ne[k][1], 1, 1}};
        }
    }
    out[n++] = (tensor){.name = "token_embd.weight", .n_dims = 2, .ne = {s->dim, s->vocab, 1, 1}};
    out[n++] = (tensor){.name = "output_norm.weight", .n_dims = 1, .ne = {s->dim, 1, 1, 1}};
    if (!s->tied) {
        out[n++] = (tensor){.name = "output.weight", .n_dims = 2, .ne = {s->dim, s->vocab, 1, 1}};
    }
    return n;
}

TEST(quantize_plan_keeps_its_promise) {
    static tensor tensors[1000];
    static char names[1000][64];
    uint32_t half_bits[1000];
    hepta_error err;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        size_t n = make_tensors(&shapes[i], tensors, names);
        static const double rates[] = {2.17, 2.5, 3, 3.14, 3.5, 4, 5, 6.6, 7.9};
        for (size_t r = shapes[i].dim < 1000; r < sizeof rates / sizeof rates[0]; r++) {
            CHECK_OK(plan_rates(tensors, n, rates[r], NULL, half_bits, &err));
            double bits = 0, weights = 0;
            for (size_t t = 0; t < n; t++) {
                uint64_t bytes = 4 * tensor_n_weights(&tensors[t]);
                if (half_bits[t] != 0) {
                    CHECK(tensor_packed_bytes(half_bits[t], tensors[t].ne[1], tensors[t].ne[0],
                                              &bytes));
                    CHECK(half_bits[t] / 2.0 >= fmin(floor(2 * rates[r]) / 2 - 1, 4));
                }
                bits += 8 * (double)bytes;
                weights += (double)tensor_n_weights(&tensors[t]);
            }
            test_note("%-14s %g bits asked, %.4f planned", shapes[i].name, rates[r],
                      bits / weights);
            CHECK(bits / weights <= rates[r]);
            CHECK(bits / weights >
                  rates[r] - 0.05 * fmax(1, rates[r] - 3)); /* little left unused */
            CHECK(bits == 8 * (double)plan_bytes(tensors, n, half_bits));
        }
    }
}

TEST(quantize_plan_refuses_what_cannot_be) {
    tensor t = {.name = "blk.0.attn_q.weight", .n_dims = 2, .ne = {4, 3, 1, 1}};
    uint32_t half_bits;
    hepta_error err;
    CHECK_EQ_INT(plan_rates(&t, 1, 2.5, NULL, &half_bits, &err), HEPTA_ERROR_UNSUPPORTED);
    CHECK(strstr(err.message, "too small") != NULL);
    static const double bad[] = {0, 1.5, 1.999, 8.001, 8.5, 1e9, -3, 1e300, -INFINITY, NAN};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQ_INT(plan_rates(&t, 1, bad[i], NULL, &half_bits, &err), HEPTA_ERROR_ARGUMENT);
    }
}

TEST(quantize_plan_puts_big_models_in_their_memory) {
    static const struct {
        shape shape;
        double bits, gigabytes;
    } cases[] = {
        {{"Llama 2 70B", 8192, 28672, 1024, 80, 32000, false}, 2.17, 19},
        {{"Llama 2 70B", 8192, 28672, 1024, 80, 32000, false}, 3.5, 30.6},
        {{"Llama 3 405B", 16384, 53248, 1024, 126, 128256, false}, 3.5, 177.6},
    };
    static tensor tensors[1200];
    static char names[1200][64];
    uint32_t half_bits[1200];
    hepta_error err;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n = make_tensors(&cases[i].shape, tensors, names);
        CHECK_OK(plan_rates(tensors, n, cases[i].bits, NULL, half_bits, &err));
        const double bytes = (double)plan_bytes(tensors, n, half_bits);
        test_note("%s at %g bits: %.2f GB", cases[i].shape.name, cases[i].bits, bytes * 1e-9);
        CHECK(bytes <= cases[i].gigabytes * 1e9);
    }
}

TEST(quantize_plan_as_text) {
    hepta_error err;
    char path[600];
    snprintf(path, sizeof path, "%s/plan.tsv", test_tmp_dir());
    static tensor tensors[100];
    static char names[100][64];
    uint32_t half_bits[100], back[100];
    size_t n = make_tensors(&shapes[0], tensors, names);
    CHECK_OK(plan_rates(tensors, n, 3.5, NULL, half_bits, &err));
    CHECK_OK(plan_write(path, tensors, n, half_bits, NULL, &err));
    CHECK_OK(plan_read(path, tensors, n, back, &err));
    CHECK_MEM_EQ(back, half_bits, n * sizeof *back);

    tensor t[2] = {{.name = "a", .n_dims = 2, .ne = {64, 64, 1, 1}},
                   {.name = "norm", .n_dims = 1, .ne = {64, 1, 1, 1}}};
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"", "no rate for a"},
        {"a 3\n", "line 1: expected NAME"},
        {"# no\n\na\t3.25\n", "line 3: expected 2, 2.5"},
        {"a\t3\na\t3\n", "line 2: named twice"},
        {"a\t3\nb\t3\n", "line 2: the model has no such tensor: b"},
        {"norm\t3\n", "line 1: not a matrix"},
        {"a\t\n", "line 1: expected 2"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        FILE *f = fopen(path, "w");
        CHECK(f != NULL && fputs(bad[i].text, f) >= 0 && fclose(f) == 0);
        CHECK_EQ_INT(plan_read(path, t, 2, back, &err), HEPTA_ERROR_FORMAT);
        CHECK(strstr(err.message, bad[i].message) != NULL);
    }
    FILE *f = fopen(path, "w");
    CHECK(f != NULL && fputs("# x\r\n\r\na\t3.5\tmore\tcolumns\r\n", f) >= 0 && fclose(f) == 0);
    CHECK_OK(plan_read(path, t, 2, back, &err));
    CHECK_EQ_INT(back[0], 7);
    CHECK_EQ_INT(back[1], 0);
}

/* ---- Error feedback ---------------------------------------------------- */

/* e^T H e of rows coded at 3.5 bits, relative to w^T H w; with the beam of `width`, or plainly. */
static double output_error(const moments *m, unsigned width, const float *x, size_t rows,
                           uint8_t *out) {
    hepta_error err;
    const struct code_table *table = code_table_get(7);
    const size_t n = m->n, row_bytes = code_row_bytes(7, n);
    float scale[64];
    for (size_t r = 0; r < rows; r++) {
        scale[r] = 1.0f / table->unit;
    }
    if (width == 0) {
        CHECK_OK(code_encode_rows(table, x, scale, rows, n, out, row_bytes, 7, 1, &err));
    } else {
        const kernels *k;
        feedback *f;
        CHECK_OK(kernels_select(&k, &err));
        CHECK_OK(feedback_create(m, 3, k, 1, &f, &err));
        CHECK(f != NULL);
        CHECK_OK(code_encode_feedback(table, &f->code, width, x, scale, rows, out, row_bytes, 7, 1,
                                      &err));
        feedback_free(f);
    }
    double error = 0, power = 0;
    uint8_t *v = calloc(n, 1);
    double *e = calloc(n, sizeof *e);
    CHECK(v != NULL && e != NULL);
    for (size_t r = 0; r < rows; r++) {
        code_decode_row(table, out + r * row_bytes, 7, n, v);
        for (size_t i = 0; i < n; i++) {
            e[i] = (double)x[r * n + i] - (double)scale[r] * (v[i] - CODE_CENTRE);
        }
        for (size_t i = 0; i < n; i++) {
            for (size_t j = 0; j < n; j++) {
                error += e[i] * (double)m->h[i * n + j] * e[j];
                power += (double)x[r * n + i] * (double)m->h[i * n + j] * (double)x[r * n + j];
            }
        }
    }
    free(v);
    free(e);
    return error / power;
}

/* Correlated inputs: feedback pays; with every instruction set, the same bytes. */
TEST(quantize_feedback_lowers_the_output_error) {
    enum { N = 256, ROWS = 20, TOKENS = 512 };
    static float h[N * N], white[N * N], x[ROWS * N], input[TOKENS * N];
    static uint8_t out[2][ROWS * N / 16 * 7];
    for (size_t i = 0; i < ROWS * N; i++) {
        x[i] = test_random_gauss();
    }
    for (size_t t = 0; t < TOKENS; t++) { /* neighbours resemble each other */
        float last = 0;
        for (size_t i = 0; i < N; i++) {
            last = 0.9f * last + test_random_gauss();
            input[t * N + i] = last;
        }
    }
    for (size_t i = 0; i < N; i++) {
        white[i * N + i] = 1;
        for (size_t j = 0; j < N; j++) {
            for (size_t t = 0; t < TOKENS; t++) {
                h[i * N + j] += input[t * N + i] * input[t * N + j];
            }
        }
    }
    const moments m = {.n = N, .n_tokens = 16 * N, .h = h},
                  w = {.n = N, .n_tokens = 16 * N, .h = white};
    const double plain = output_error(&m, 0, x, ROWS, out[0]);
    const double narrow = output_error(&m, 16, x, ROWS, out[0]);
    const double wide = output_error(&m, 256, x, ROWS, out[0]);
    test_note("relative output error: plain %.5f, beam of 16 %.5f, of 256 %.5f", plain, narrow,
              wide);
    CHECK(narrow < 0.45 * plain && wide < 0.9 * narrow);
    for (int i = 0; code_encode_variant(i) != NULL; i++) {
        CHECK(code_encode_force(code_encode_variant(i)));
        (void)output_error(&m, 256, x, ROWS, out[1]);
        CHECK_MEM_EQ(out[0], out[1], sizeof out[0]);
    }
    code_encode_force(NULL);
    /* Inputs without correlation: nothing to gain, and a wide beam is nearly the full search. */
    const double full = output_error(&w, 0, x, ROWS, out[0]);
    const double beam = output_error(&w, 1024, x, ROWS, out[0]);
    test_note("without correlation: full search %.5f, beam of 1024 %.5f", full, beam);
    CHECK(beam > 0.99 * full && beam < 1.08 * full);
}

/* Rows of a head that four kinds of inputs call for: a group each, weighted by p (1 - p). */
TEST(quantize_head_groups_rows_by_their_inputs) {
    enum { N = 64, ROWS = 64, TOKENS = 600, KINDS = 4 };
    static float direction[KINDS * N], w[ROWS * N], x[TOKENS * N], h[N * N], own[N * N];
    hepta_error err;
    const kernels *k;
    rotation *r;
    CHECK_OK(kernels_select(&k, &err));
    CHECK_OK(rotation_create(N, 1, &r, &err));
    for (size_t i = 0; i < KINDS * N; i++) {
        direction[i] = test_random_gauss();
    }
    for (size_t i = 0; i < ROWS * N; i++) {
        w[i] = 0.1f * direction[i % (KINDS * N)] + 0.05f * test_random_gauss();
    }
    for (size_t i = 0; i < TOKENS * N; i++) {
        x[i] = direction[i % (KINDS * N)] + 0.3f * test_random_gauss();
    }
    const tensor t = {.name = "head",
                      .type = TENSOR_F32,
                      .n_dims = 2,
                      .ne = {N, ROWS, 1, 1},
                      .n_bytes = sizeof w,
                      .data = (const uint8_t *)w};
    const moments m = {.n = N, .n_tokens = TOKENS, .h = h, .rotation = r, .x = x};
    head_groups *g, *same;
    CHECK_OK(moments_sum(r, x, NULL, TOKENS, k, 1, h, &err));
    CHECK_OK(head_groups_create(&t, &m, k, 1, NULL, NULL, &g, &err));
    CHECK_OK(head_groups_create(&t, &m, k, 3, NULL, NULL, &same, &err));
    CHECK_EQ_INT(g->n, KINDS);
    for (uint32_t i = 0; i < g->n; i++) {
        CHECK_EQ_INT(g->first[i + 1] - g->first[i], ROWS / KINDS);
        for (uint32_t j = g->first[i]; j < g->first[i + 1]; j++) {
            CHECK_EQ_INT(g->rows[j] % KINDS, g->rows[g->first[i]] % KINDS);
        }
    }
    CHECK_MEM_EQ(g->rows, same->rows, ROWS * sizeof *g->rows);
    CHECK_MEM_EQ(g->weight, same->weight, (size_t)g->n * TOKENS * sizeof *g->weight);
    for (size_t i = 0; i < TOKENS; i++) {
        double e[ROWS], sum = 0, weight[KINDS] = {0};
        for (size_t row = 0; row < ROWS; row++) {
            double z = 0;
            for (size_t c = 0; c < N; c++) {
                z += (double)w[row * N + c] * (double)x[i * N + c];
            }
            sum += e[row] = exp(z);
        }
        for (size_t row = 0; row < ROWS; row++) {
            weight[row % KINDS] += e[row] / sum * (1 - e[row] / sum);
        }
        for (uint32_t j = 0; j < g->n; j++) {
            const double expected = weight[g->rows[g->first[j]] % KINDS];
            CHECK(fabs((double)g->weight[j * TOKENS + i] - expected) < 1e-4 * expected + 1e-7);
        }
    }
    moments group;
    CHECK_OK(head_moments(g, 0, &m, k, 1, own, &group, &err));
    double trace = 0, all = 0; /* of inputs of one size */
    for (size_t i = 0; i < N; i++) {
        trace += (double)own[i * N + i];
        all += (double)h[i * N + i] / TOKENS;
    }
    CHECK(fabs(trace / all - 1) < 0.2 && group.n_tokens > 0 && group.n_tokens <= TOKENS);
    head_groups_free(g);
    head_groups_free(same);
    rotation_free(r);
}

/* ---- Files ------------------------------------------------------------- */

static void quantize_stories(const char *out, double bits, int threads) {
    char model[512], tokenizer[512];
    need_stories(model, tokenizer);
    hepta_error err;
    hepta_quantize_options o = {.bits = bits, .threads = threads, .tokenizer_path = tokenizer};
    o.effort = fast() ? HEPTA_EFFORT_FAST : HEPTA_EFFORT_GOOD;
    CHECK_OK(hepta_quantize(model, out, &o, &err));
}

TEST(quantize_same_bytes_for_any_thread_count) {
    hepta_error err;
    char dir[512], path[2][600];
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    static const double rates[] = {3.5, 8, 2, 4};
    for (size_t r = 0; r < (fast() ? 1 : 4); r++) {
        for (int threads = 1; threads <= 4; threads += fast() ? 2 : 1) {
            char *p = path[threads > 1];
            snprintf(p, 600, "%s/%d.hepta", dir, threads > 1);
            quantize_stories(p, rates[r], threads);
            file_map a, b;
            CHECK_OK(file_map_open(path[0], &a, &err));
            CHECK_OK(file_map_open(p, &b, &err));
            CHECK_EQ_INT(a.size, b.size);
            CHECK_MEM_EQ(a.data, b.data, a.size);
            file_map_close(&a);
            file_map_close(&b);
        }
    }
}

/* Each part that can be left out makes a difference, and none breaks the promised size. */
TEST(quantize_without_a_part) {
    static const unsigned parts[] = {0, HEPTA_WITHOUT_FEEDBACK, HEPTA_WITHOUT_SCALES,
                                     HEPTA_WITHOUT_PLAN};
    enum { N = sizeof parts / sizeof parts[0] };
    hepta_error err;
    char dir[512], path[N][600], model[512], tokenizer[512];
    need_stories(model, tokenizer);
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    for (size_t i = 0; i < N; i++) {
        const hepta_quantize_options o = {.bits = 3.5,
                                          .effort = HEPTA_EFFORT_FAST,
                                          .without = parts[i],
                                          .tokenizer_path = tokenizer};
        snprintf(path[i], sizeof path[i], "%s/%zu.hepta", dir, i);
        CHECK_OK(hepta_quantize(model, path[i], &o, &err));
        hepta_model *m;
        hepta_model_info info;
        CHECK_OK(hepta_model_open(path[i], &m, &err));
        hepta_model_get_info(m, &info);
        hepta_model_close(m);
        CHECK(info.bits_per_weight > 3.3 && info.bits_per_weight <= 3.5);
        for (size_t k = 0; k < i; k++) {
            file_map a, b;
            CHECK_OK(file_map_open(path[i], &a, &err));
            CHECK_OK(file_map_open(path[k], &b, &err));
            CHECK(a.size != b.size || memcmp(a.data, b.data, a.size) != 0);
            file_map_close(&a);
            file_map_close(&b);
        }
    }
}

TEST(quantize_files_verify_and_keep_their_size) {
    hepta_error err;
    char path[600];
    snprintf(path, sizeof path, "%s/m.hepta", test_tmp_dir());
    static const double rates[] = {3.5, 2.5, 2, 4, 8, 3};
    for (size_t r = 0; r < 6; r++) {
        if (rates[r] == 2.5 || (fast() && r % 2 != 0)) {
            continue; /* stories260K's rows are too short for a promise of 2.5 bits */
        }
        quantize_stories(path, rates[r], 2);
        container *c;
        CHECK_OK(container_open(path, NULL, &c, &err));
        CHECK_OK(container_verify(c, NULL, NULL, &err));
        double bits = 0, weights = 0;
        for (size_t i = 0; i < c->n_tensors; i++) {
            bits += 8 * (double)c->tensors[i].n_bytes;
            weights += (double)tensor_n_weights(&c->tensors[i]);
        }
        container_close(c);
        test_note("stories260K at %g bits: %.3f bits per weight", rates[r], bits / weights);
        CHECK(rates[r] == 2 || rates[r] == 8 || bits / weights <= rates[r]);
        hepta_model *m;
        CHECK_OK(hepta_model_open(path, &m, &err));
        hepta_model_info info;
        hepta_model_get_info(m, &info);
        CHECK(info.quantized && fabs(info.bits_per_weight - bits / weights) < 1e-9);
        hepta_model_close(m);
    }
    hepta_quantize_options o = {.bits = 3.5};
    CHECK_EQ_INT(hepta_quantize(path, "/tmp/never.hepta", &o, &err), HEPTA_ERROR_UNSUPPORTED);
    CHECK(strstr(err.message, "quantized already") != NULL);
}

/* The weights read back from a file are near the originals: the code's error, not a bug's. */
TEST(quantize_weights_read_back) {
    hepta_error err;
    char path[600], model[512], tokenizer[512];
    need_stories(model, tokenizer);
    snprintf(path, sizeof path, "%s/m.hepta", test_tmp_dir());
    quantize_stories(path, 4, 2);
    container *a, *b;
    container_options options = {.no_tokenizer = true};
    CHECK_OK(container_open(model, &options, &a, &err));
    CHECK_OK(container_open(path, NULL, &b, &err));
    const kv *seed = container_find(b, "hepta.rotation.seed");
    CHECK(seed != NULL);
    const tensor *original = container_tensor(a, "blk.1.ffn_down.weight");
    const tensor *packed = container_tensor(b, "blk.1.ffn_down.weight");
    CHECK(original != NULL && packed != NULL && packed->type == TENSOR_PACKED);
    uint32_t n = (uint32_t)original->ne[0]; /* 172: odd part 43, padded to 176 */
    rotation *r;
    CHECK_OK(rotation_create(n, seed->v.u, &r, &err));
    const struct code_table *table = code_table_get((int)packed->half_bits);
    size_t block = packed->half_bits, n_padded = r->n_padded;
    CHECK(original->ne[1] % 16 == 0);
    const uint8_t *scales = packed->data + original->ne[1] * n_padded / 16 * block;
    float x[176], scratch[176];
    uint8_t v[176];
    double error = 0, power = 0;
    for (uint64_t row = 0; row < original->ne[1]; row++) {
        uint8_t codes[176 / 16 * 8];
        for (size_t block_number = 0; block_number < n_padded / 16; block_number++) {
            packed_place place = packed_block(packed->half_bits, n_padded / 16, row, block_number);
            for (size_t i = 0; i < block; i++) {
                codes[block_number * block + i] = packed->data[place.first + i * place.step];
            }
        }
        code_decode_row(table, codes, block, n_padded, v);
        float scale = bfloat_to_float(load_u16(scales + 2 * row));
        for (size_t i = 0; i < n_padded; i++) {
            x[i] = scale * (float)(v[i] - CODE_CENTRE);
        }
        kernels_ref.rotate_inverse(r, x, scratch);
        const float *w = (const float *)(const void *)(original->data) + row * n;
        for (uint32_t i = 0; i < n; i++) {
            error += ((double)x[i] - (double)w[i]) * ((double)x[i] - (double)w[i]);
            power += (double)w[i] * (double)w[i];
        }
    }
    double relative = sqrt(error / power);
    test_note("blk.1.ffn_down of stories260K at %g bits: RMSE %.2f %%", packed->half_bits / 2.0,
              100 * relative);
    /* Error feedback lets the weights err more so that the outputs err less. */
    CHECK(relative < 2 * pow(2, -(double)packed->half_bits / 2.0));
    rotation_free(r);
    container_close(a);
    container_close(b);
}

/* ---- Bad weather ------------------------------------------------------- */

static bool stop_after_some(void *context, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    (void)total;
    return done < *(uint64_t *)context;
}

/* The files of two paths are equal; the first one is removed. */
static bool same_and_removed(const char *a, const char *b) {
    char command[2000];
    snprintf(command, sizeof command, "cmp %s %s && rm %s", a, b, a);
    return system(command) == 0;
}

/* Changes a byte of a file. */
static void damage(const char *path, long at) {
    FILE *f = fopen(path, "r+");
    CHECK(f != NULL && fseek(f, at, SEEK_SET) == 0);
    const int c = fgetc(f);
    CHECK(c != EOF && fseek(f, at, SEEK_SET) == 0 && fputc(c ^ 1, f) != EOF && fclose(f) == 0);
}

/* Stopped at many places, with and without damage to what was kept: the same file in the end. */
TEST(quantize_goes_on_after_an_interrupt) {
    hepta_error err;
    char dir[512], path[600], part[620], whole[600], model[512], tokenizer[512];
    need_stories(model, tokenizer);
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    snprintf(path, sizeof path, "%s/m.hepta", dir);
    snprintf(part, sizeof part, "%s.part", path);
    snprintf(whole, sizeof whole, "%s/whole.hepta", dir);
    uint64_t limit = 0;
    hepta_quantize_options o = {.bits = 2, /* rates need no measuring */
                                .effort = HEPTA_EFFORT_FAST,
                                .tokenizer_path = tokenizer,
                                .progress_context = &limit};
    CHECK_OK(hepta_quantize(model, whole, &o, &err));
    o.progress = stop_after_some;
    CHECK_EQ_INT(hepta_quantize(model, path, &o, &err), HEPTA_ERROR_INTERRUPTED);
    CHECK_EQ_INT(test_count_files(dir), 1); /* not one tensor was done */
    for (limit = 20000; limit < 250000; limit += 60000) {
        CHECK_EQ_INT(hepta_quantize(model, path, &o, &err), HEPTA_ERROR_INTERRUPTED);
        CHECK(strstr(err.message, "m.hepta.part keeps what is done") != NULL);
        CHECK(access(part, R_OK) == 0 && access(path, F_OK) != 0);
    }
    o.progress = NULL;
    CHECK_OK(hepta_quantize(model, path, &o, &err));
    CHECK(same_and_removed(path, whole));
    CHECK_EQ_INT(test_count_files(dir), 1);

    /* Damaged data are made anew; a part of something else is refused and left alone. */
    o.progress = stop_after_some;
    limit = 200000;
    CHECK_EQ_INT(hepta_quantize(model, path, &o, &err), HEPTA_ERROR_INTERRUPTED);
    o.progress = NULL;
    damage(part, 40000);
    o.effort = HEPTA_EFFORT_GOOD;
    CHECK_EQ_INT(hepta_quantize(model, path, &o, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(strstr(err.message, "m.hepta.part is part of a file from another model") != NULL);
    o.effort = HEPTA_EFFORT_FAST;
    o.bits = 8;
    CHECK_EQ_INT(hepta_quantize(model, path, &o, &err), HEPTA_ERROR_ARGUMENT);
    o.bits = 2;
    CHECK_OK(hepta_quantize(model, path, &o, &err));
    CHECK(same_and_removed(path, whole));
    CHECK_EQ_INT(test_count_files(dir), 1);
}

TEST(quantize_disk_full) {
    hepta_error err;
    char dir[512], path[600], model[512], tokenizer[512];
    need_stories(model, tokenizer);
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    snprintf(path, sizeof path, "%s/m.hepta", dir);
    hepta_quantize_options o = {
        .bits = 2, .effort = HEPTA_EFFORT_FAST, .tokenizer_path = tokenizer};
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limits;
    CHECK(getrlimit(RLIMIT_FSIZE, &limits) == 0);
    limits.rlim_cur = 50000;
    CHECK(setrlimit(RLIMIT_FSIZE, &limits) == 0); /* a disk that fills up */
    CHECK_EQ_INT(hepta_quantize(model, path, &o, &err), HEPTA_ERROR_IO);
    limits.rlim_cur = RLIM_INFINITY;
    setrlimit(RLIMIT_FSIZE, &limits);
    CHECK_EQ_INT(test_count_files(dir), 0);
}

TEST(quantize_refuses_nan_and_infinity) {
    hepta_error err;
    char dir[512], path[600], bad[600], model[512], tokenizer[512];
    need_stories(model, tokenizer);
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    snprintf(path, sizeof path, "%s/m.hepta", dir);
    snprintf(bad, sizeof bad, "%s/bad.bin", dir);
    file_map map;
    CHECK_OK(file_map_open(model, &map, &err));
    uint8_t *copy = malloc(map.size);
    CHECK(copy != NULL);
    /* NaN, -infinity, and finite values whose sum is not */
    static const uint8_t values[3][4] = {
        {0, 0, 0xc0, 0x7f}, {0, 0, 0x80, 0xff}, {0xff, 0xff, 0x7f, 0x7f}};
    for (int i = 0; i < 3; i++) {
        memcpy(copy, map.data, map.size);
        for (int k = 0; k < (i < 2 ? 1 : 40); k++) {
            memcpy(copy + 28 + 4 * (64 * 3 + 5 + k), values[i], 4); /* token 3, dimension 5 on */
        }
        FILE *f = fopen(bad, "wb");
        CHECK(f != NULL && fwrite(copy, 1, map.size, f) == map.size && fclose(f) == 0);
        hepta_quantize_options o = {.bits = 8, .tokenizer_path = tokenizer};
        CHECK_EQ_INT(hepta_quantize(bad, path, &o, &err), HEPTA_ERROR_FORMAT);
        CHECK(strstr(err.message, "token_embd.weight") != NULL);
        CHECK(strstr(err.message, i < 2 ? "row 3, column 5" : "row 3;") != NULL);
        CHECK_EQ_INT(test_count_files(dir), 1);
    }
    free(copy);
    file_map_close(&map);
}

TEST(quantize_refuses_wrong_arguments) {
    hepta_error err;
    hepta_quantize_options o = {.bits = 3.5};
    CHECK_EQ_INT(hepta_quantize(NULL, "x", &o, &err), HEPTA_ERROR_ARGUMENT);
    CHECK_EQ_INT(hepta_quantize("x", NULL, &o, &err), HEPTA_ERROR_ARGUMENT);
    CHECK_EQ_INT(hepta_quantize("x", "y", NULL, &err), HEPTA_ERROR_ARGUMENT);
    o.threads = -1;
    CHECK_EQ_INT(hepta_quantize("x", "y", &o, &err), HEPTA_ERROR_ARGUMENT);
    o.threads = 1 << 30;
    CHECK_EQ_INT(hepta_quantize("x", "y", &o, &err), HEPTA_ERROR_ARGUMENT);
}

TEST(quantize_survives_failing_allocations) {
    hepta_error err;
    char dir[512], path[600], model[512], tokenizer[512];
    need_stories(model, tokenizer);
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    snprintf(path, sizeof path, "%s/m.hepta", dir);
    hepta_quantize_options o = {.bits = 2, .threads = 1, .tokenizer_path = tokenizer};
    o.effort = fast() ? HEPTA_EFFORT_FAST : HEPTA_EFFORT_GOOD;
    uint64_t before = memory_count();
    CHECK_OK(hepta_quantize(model, path, &o, &err));
    uint64_t n = memory_count() - before;
    remove(path);
    uint64_t step = n / (fast() ? 8 : 40) + 1, dense = fast() ? 8 : 60;
    for (uint64_t k = 1; k <= n; k += k < dense ? 1 : step) {
        memory_fail_after(k);
        hepta_status status = hepta_quantize(model, path, &o, &err);
        memory_fail_after(0);
        CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
        CHECK_EQ_INT(test_count_files(dir), 0);
    }
    test_note("%d allocations in one quantization", (int)n);
}

TEST(quantize_chunk_without_memory) {
    hepta_error err;
    const quantizer q = {.threads = 2, .err = &err};
    chunk c;
    for (uint64_t k = 1; k <= 5; k++) {
        memory_fail_after(k);
        hepta_status status = chunk_create(&q, "w", 64, 256, 112, &c);
        memory_fail_after(0);
        CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
        chunk_free(&c);
    }
    CHECK_OK(chunk_create(&q, "w", 64, 256, 112, &c));
    chunk_free(&c);
}

/* ---- Quality ----------------------------------------------------------- */

/* Mean negative log-likelihood of tokens 1.. of windows of `ctx` tokens, each from a BOS. */
static double mean_nll(const char *model, const char *tokenizer, const char *text_path,
                       size_t limit, uint32_t ctx) {
    hepta_error err;
    hepta_model *m;
    hepta_tokenizer *t;
    hepta_session *s;
    CHECK_OK(hepta_model_open(model, &m, &err));
    CHECK_OK(hepta_tokenizer_open(model, tokenizer, &t, &err));
    hepta_session_options options = {.n_ctx = ctx};
    CHECK_OK(hepta_session_create(m, &options, &s, &err));
    hepta_model_info info;
    hepta_model_get_info(m, &info);
    file_map text;
    CHECK_OK(file_map_open(text_path, &text, &err));
    size_t n_text = text.size < limit ? text.size : limit, n = 0;
    int32_t *tokens = calloc(n_text + 1, sizeof *tokens), *window = calloc(ctx, sizeof *window);
    float *logits = calloc((size_t)ctx * info.n_vocab, sizeof *logits);
    CHECK(tokens != NULL && window != NULL && logits != NULL);
    CHECK_OK(hepta_tokenizer_encode(t, (const char *)text.data, n_text, 0, tokens, n_text + 1, &n,
                                    &err));
    window[0] = hepta_tokenizer_bos(t);
    double sum = 0;
    size_t count = 0;
    for (size_t at = 0; at + ctx - 1 <= n; at += ctx - 1) {
        memcpy(window + 1, tokens + at, (ctx - 1) * sizeof *window);
        hepta_session_truncate(s, 0, 0);
        CHECK_OK(hepta_session_eval(s, window, ctx, logits, true, &err));
        for (uint32_t i = 0; i + 1 < ctx; i++, count++) {
            const float *l = logits + (size_t)i * info.n_vocab;
            double z = 0, max = (double)l[0];
            for (uint32_t j = 1; j < info.n_vocab; j++) {
                max = fmax(max, (double)l[j]);
            }
            for (uint32_t j = 0; j < info.n_vocab; j++) {
                z += exp((double)l[j] - max);
            }
            sum += max + log(z) - (double)l[window[i + 1]];
        }
    }
    CHECK(count > 0);
    free(tokens);
    free(window);
    free(logits);
    file_map_close(&text);
    hepta_session_free(s);
    hepta_tokenizer_free(t);
    hepta_model_close(m);
    return sum / (double)count;
}

TEST(quantize_perplexity_stories260K) {
    char model[512], tokenizer[512], text[512], path[600];
    need_stories(model, tokenizer);
    snprintf(text, sizeof text, "%s", test_need_data("text/tinystories_v1_train_first2MiB.txt"));
    snprintf(path, sizeof path, "%s/m.hepta", test_tmp_dir());
    size_t limit = fast() ? 30000 : 100000;
    double f32 = mean_nll(model, tokenizer, text, limit, 256);
    static const double rates[] = {3, 3.5, 4, 8};
    double previous = 1e9;
    for (size_t i = fast() ? 2 : 0; i < 4; i++) {
        quantize_stories(path, rates[i], 2);
        double q = mean_nll(path, NULL, text, limit, 256);
        test_note("stories260K: perplexity F32 %.3f, %g bits %.3f (%+.2f %%)", exp(f32), rates[i],
                  exp(q), 100 * expm1(q - f32));
        CHECK(q < previous);
        previous = q;
    }
    CHECK(previous - f32 < 0.005); /* 8 bits: all but the same */
}

TEST(quantize_perplexity_bundled_model) {
    if (!file_exists(bundled) || !file_exists(bundled_f16)) {
        SKIP("%s or %s is absent", bundled, bundled_f16);
    }
    const char *text = test_need_data("corpus/test.txt");
    size_t limit = fast() ? 10000 : 60000;
    double f32 = mean_nll(bundled_f16, NULL, text, limit, 512);
    double q = mean_nll(bundled, NULL, text, limit, 512);
    test_note("bundled model on held-out text: perplexity F16 %.3f, 3.5 bits %.3f (%+.2f %%)",
              exp(f32), exp(q), 100 * expm1(q - f32));
    CHECK(q - f32 < 0.06); /* the project's bar is 4 %; this text sample is small */
}
