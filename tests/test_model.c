/*
 * test_model.c - the forward pass: known texts from real models, the same bits whatever the
 * threads, chunks, cache, kernels and environment, packed against float weights, hostile files.
 */
#include "test.h"

#include "kernels/kernels.h"
#include "model/llama.h"
#include "tiny_model.h"

#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/wait.h>

enum { N_CACHES = HEPTA_CACHE_Q8 + 1 };

/* ---- Helpers ----------------------------------------------------------- */

static hepta_model *open_model(const char *path) {
    hepta_error err;
    hepta_model *m = NULL;
    CHECK_OK(hepta_model_open(path, &m, &err));
    return m;
}

static hepta_session *new_session(const hepta_model *m, uint32_t n_batch, int threads,
                                  hepta_cache_type cache_type) {
    hepta_error err;
    hepta_session *s = NULL;
    hepta_session_options o = {.n_batch = n_batch, .threads = threads, .cache_type = cache_type};
    CHECK_OK(hepta_session_create(m, &o, &s, &err));
    return s;
}

static float *new_floats(size_t n) {
    float *x = malloc(n * sizeof *x);
    CHECK(x != NULL);
    return x;
}

/* Token ids 1 .. n_vocab - 1 */
static void random_tokens(int32_t *tokens, size_t n, uint32_t n_vocab) {
    for (size_t i = 0; i < n; i++) {
        tokens[i] = (int32_t)(1 + test_random_below(n_vocab - 1));
    }
}

/* A tiny model's file of this test; the type is the matrices'. */
static const char *tiny_file(uint32_t type, uint32_t half_bits) {
    static char path[1024];
    tiny_model *m = calloc(1, sizeof *m);
    CHECK(m != NULL);
    tiny_default(m, type, half_bits);
    snprintf(path, sizeof path, "%s/tiny.hepta", test_tmp_dir());
    tiny_write(m, path);
    free(m);
    return path;
}

/* Logits of all tokens, (n, n_vocab), in calls of `call` tokens. */
static float *eval_all(const hepta_model *m, const int32_t *tokens, size_t n, uint32_t n_batch,
                       size_t call, int threads, hepta_cache_type cache_type) {
    hepta_error err;
    hepta_session *s = new_session(m, n_batch, threads, cache_type);
    uint32_t n_vocab = m->info.n_vocab;
    float *logits = new_floats(n * n_vocab);
    for (size_t done = 0; done < n; done += call) {
        size_t step = n - done < call ? n - done : call;
        CHECK_OK(hepta_session_eval(s, tokens + done, step, logits + done * n_vocab, true, &err));
    }
    CHECK_EQ_INT(hepta_session_position(s, 0), n);
    hepta_session_free(s);
    return logits;
}

/* |a - b| / |b| */
static double relative_difference(const float *a, const float *b, size_t n) {
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < n; i++) {
        difference += pow((double)a[i] - (double)b[i], 2);
        size += pow((double)b[i], 2);
    }
    return sqrt(difference / size);
}

/* ---- Real models ------------------------------------------------------- */

#ifndef HEPTA_ENGINE_ONLY /* needs tokenizers */

/* Greedy text after BOS, compared with llama2.c's own output. */
static void check_greedy(const char *model_name, const char *tokenizer_name,
                         const char *text_name) {
    static char model_path[4096], tokenizer_path[4096], expected[4096], text[8192];
    snprintf(model_path, sizeof model_path, "%s", test_need_data(model_name));
    snprintf(tokenizer_path, sizeof tokenizer_path, "%s", test_need_data(tokenizer_name));
    FILE *f = fopen(test_need_data(text_name), "rb");
    CHECK(f != NULL);
    size_t n_expected = fread(expected, 1, sizeof expected, f);
    fclose(f);
    while (n_expected > 0 && expected[n_expected - 1] == '\n') { /* the program's, not the text's */
        n_expected--;
    }

    hepta_error err;
    hepta_model *m = open_model(model_path);
    hepta_session *s = new_session(m, 0, 1, HEPTA_CACHE_F32);
    hepta_tokenizer *t = NULL;
    hepta_sampler *sampler = NULL;
    CHECK_OK(hepta_tokenizer_open(model_path, tokenizer_path, &t, &err));
    CHECK_OK(hepta_sampler_create(&(hepta_sampler_options){.temperature = 0.0f}, m->info.n_vocab,
                                  &sampler, &err));
    float *logits = new_floats(m->info.n_vocab);
    int32_t token = hepta_tokenizer_bos(t);
    size_t n_text = 0;
    uint64_t allocations = memory_count();
    for (int i = 0; i < 255 && n_text < n_expected; i++) {
        CHECK_OK(hepta_session_eval(s, &token, 1, logits, false, &err));
        token = hepta_sampler_draw(sampler, logits);
        n_text += hepta_tokenizer_decode(t, token, i == 0, false, text + n_text,
                                         sizeof text - 1 - n_text);
    }
    CHECK_EQ_INT(memory_count(), allocations);
    text[n_text] = expected[n_expected] = '\0';
    CHECK(n_text > n_expected / 2);
    expected[n_text < n_expected ? n_text : n_expected] = '\0';
    CHECK_EQ_STR(text, expected);
    test_note("%zu bytes of text are the same", n_text);
    free(logits);
    hepta_sampler_free(sampler);
    hepta_tokenizer_free(t);
    hepta_session_free(s);
    hepta_model_close(m);
}

TEST(model_stories260k_greedy) {
    check_greedy("models/stories260K.bin", "models/tok512.bin", "models/stories260K.greedy256.txt");
}

TEST(model_babyllama_greedy) {
    check_greedy("models/babyllama-tok361/model5000.bin", "models/babyllama-tok361/tok361.bin",
                 "models/babyllama-tok361/greedy256.txt");
}

#endif

/* tests/compare_logits.py: these models and random ones, against transformers in float32 */
TEST(model_like_transformers) {
    const char *python = getenv("HEPTA_PYTHON"), *build = getenv("HEPTA_BUILD");
    if (python == NULL || build == NULL || *python == '\0') {
        SKIP("HEPTA_PYTHON and HEPTA_BUILD are not set");
    }
    char stories[2048] = "", baby[2048] = "", command[8192];
    const char *path = test_data("models/stories260K.bin");
    snprintf(stories, sizeof stories, "%s", path != NULL ? path : "");
    path = test_data("models/babyllama-tok361/model5000.bin");
    snprintf(baby, sizeof baby, "%s", path != NULL ? path : "");
    snprintf(command, sizeof command,
             "'%s' tests/compare_logits.py %s %s models/hepta-stories-7m-f16.gguf --random "
             "--dump '%s/logits_dump'",
             python, stories, baby, build);
    fflush(stdout);
    int status = system(command);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or has no torch or no transformers", python);
    }
    CHECK_EQ_INT(code, 0);
}

/* ---- The same bits ----------------------------------------------------- */

/* All logits of one model, computed in every way there is. */
static void check_same_bits(const char *path, bool thorough) {
    thorough = thorough && getenv("HEPTA_FAST") == NULL;
    enum { N = 130 };
    int32_t tokens[N];
    bool supported;
    const kernels *k;
    float *expected[N_CACHES] = {NULL};
    size_t n_bytes = 0;
    for (size_t table = 0; (k = kernels_get(table, &supported)) != NULL; table++) {
        if (!supported) {
            continue;
        }
        setenv("HEPTA_KERNELS", k->name, 1);
        hepta_model *m = open_model(path);
        kernels eager = *k; /* shares even the smallest step among the threads */
        eager.macs_per_microsecond = 0;
        m->kernels = &eager;
        if (table == 0) {
            random_tokens(tokens, N, m->info.n_vocab);
            n_bytes = (size_t)N * m->info.n_vocab * sizeof(float);
            for (int cache = 0; cache < N_CACHES; cache++) {
                expected[cache] = eval_all(m, tokens, N, 1, 1, 1, (hepta_cache_type)cache);
            }
        }
        static const uint32_t chunks[] = {1, 7, 64, N};
        for (int cache = 0; cache < N_CACHES; cache++) {
            for (int threads = 1; threads <= 4; threads++) {
                for (size_t c = 0; c < 4; c++) {
                    if (!thorough && (size_t)threads != c + 1) {
                        continue;
                    }
                    /* The chunk is a call's length, or the session's batch within one call. */
                    bool calls = (threads + (int)c) % 2 == 0;
                    float *logits = eval_all(m, tokens, N, chunks[c], calls ? chunks[c] : N,
                                             threads, (hepta_cache_type)cache);
                    CHECK_MEM_EQ(logits, expected[cache], n_bytes);
                    free(logits);
                }
            }
        }
        hepta_model_close(m);
    }
    for (int cache = 1; cache < N_CACHES; cache++) { /* rounded */
        CHECK(memcmp(expected[cache - 1], expected[cache], n_bytes) != 0);
    }
    for (int cache = 0; cache < N_CACHES; cache++) {
        free(expected[cache]);
    }
}

TEST(model_same_bits_f32) {
    check_same_bits(test_need_data("models/stories260K.bin"), true);
}

TEST(model_same_bits_packed) {
    static const uint32_t rates[] = {4, 5, 6, 7, 8, 16};
    for (int i = 0; i < 6; i++) {
        check_same_bits(tiny_file(TENSOR_PACKED, rates[i]), rates[i] == 7);
    }
}

TEST(model_same_bits_other_types) {
    static const uint32_t types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16, TENSOR_Q8_0};
    for (int i = 0; i < 4; i++) {
        check_same_bits(tiny_file(types[i], 0), false);
    }
}

/* The bundled model's logits, the same on every architecture: the digest is that of ref on x86-64.
 */
TEST(model_bundled_digest) {
    enum { N = 48 };
    int32_t tokens[N];
    bool supported;
    const kernels *k;
    for (size_t table = 0; (k = kernels_get(table, &supported)) != NULL; table++) {
        if (!supported) {
            continue;
        }
        setenv("HEPTA_KERNELS", k->name, 1);
        hepta_model *m = open_model("models/hepta-stories-7m.hepta");
        for (uint32_t i = 0; i < N; i++) {
            tokens[i] = (int32_t)(1 + i * 2654435761u % (m->info.n_vocab - 1));
        }
        float *logits = eval_all(m, tokens, N, 16, N, 1, HEPTA_CACHE_F16);
        sha256 s;
        uint8_t digest[32];
        char hex[65];
        sha256_start(&s);
        sha256_update(&s, logits, (size_t)N * m->info.n_vocab * sizeof *logits);
        sha256_finish(&s, digest);
        sha256_hex(digest, hex);
        CHECK_EQ_STR(hex, "435bd489fab400d66a1164bf5502c11c1bc7e85d092506023824f8c0afb2a6e1");
        free(logits);
        hepta_model_close(m);
    }
}

/* Callers with another rounding mode or flush-to-zero get the same bits, and their mode back. */
TEST(model_environment) {
    enum { N = 20 };
    int32_t tokens[N];
    hepta_model *m = open_model(tiny_file(TENSOR_PACKED, 7));
    random_tokens(tokens, N, m->info.n_vocab);
    float *expected = eval_all(m, tokens, N, 0, N, 1, HEPTA_CACHE_F32);
    for (int threads = 1; threads <= 2; threads++) {
        CHECK(fesetround(FE_UPWARD) == 0);
        float *logits = eval_all(m, tokens, N, 0, N, threads, HEPTA_CACHE_F32);
        int mode = fegetround();
        fesetround(FE_TONEAREST);
        CHECK_EQ_INT(mode, FE_UPWARD);
        CHECK_MEM_EQ(logits, expected, N * m->info.n_vocab * sizeof(float));
        free(logits);
    }
    free(expected);
    hepta_model_close(m);
}

/* ---- Packed against float ---------------------------------------------- */

/* The rows of a packed tensor, rotated back, as F32. */
static void unpack_tensor(const matrix *w, float *out) {
    float *row = new_floats(2 * (size_t)w->packed.n_cols);
    float *scratch = new_floats(2 * (size_t)w->packed.n_cols);
    for (uint32_t r = 0; r < w->n_rows; r++) {
        kernels_ref.unpack_row(&w->packed, r, row, (uint8_t *)scratch);
        kernels_ref.rotate_inverse(w->rotation, row, scratch);
        memcpy(out + (size_t)r * w->n_cols, row, w->n_cols * sizeof *row);
    }
    free(row);
    free(scratch);
}

/* A packed model and the F32 model of the same weights differ by the int8 activations alone. */
TEST(model_packed_like_float) {
    enum { N = 60 };
    char packed_path[1024], float_path[1024];
    snprintf(packed_path, sizeof packed_path, "%s", tiny_file(TENSOR_PACKED, 7));
    hepta_model *packed = open_model(packed_path);
    CHECK(packed->info.quantized);
    CHECK_EQ_INT(packed->n_rotations, 2); /* n_embd = heads */

    tiny_model *t = calloc(1, sizeof *t);
    CHECK(t != NULL);
    tiny_default(t, TENSOR_F32, 0);
    for (size_t i = 0; i < packed->file->n_tensors; i++) {
        const tensor *source = &packed->file->tensors[i];
        tensor *target = tiny_tensor(t, source->name);
        if (source->type != TENSOR_PACKED) {
            target->data = source->data;
            continue;
        }
        float *weights = new_floats(target->ne[0] * target->ne[1]);
        matrix w = packed->embedding;
        for (uint32_t l = 0; l < packed->info.n_layer; l++) {
            const llama_layer *y = &packed->layers[l];
            const matrix *all[] = {&y->wq, &y->wk, &y->wv, &y->wo, &y->gate, &y->up, &y->down};
            for (int j = 0; j < 7; j++) {
                w = all[j]->source == source ? *all[j] : w;
            }
        }
        w = packed->head.source == source ? packed->head : w;
        CHECK(w.source == source);
        unpack_tensor(&w, weights);
        target->data = (const uint8_t *)weights;
    }
    snprintf(float_path, sizeof float_path, "%s/float.hepta", test_tmp_dir());
    tiny_write(t, float_path);
    hepta_model *plain = open_model(float_path);
    CHECK(!plain->info.quantized);
    for (size_t i = 0; i < t->n_tensors; i++) { /* matrices are ours, vectors lie in the file */
        if (t->tensors[i].n_dims == 2) {
            free((void *)(uintptr_t)t->tensors[i].data);
        }
    }

    int32_t tokens[N];
    random_tokens(tokens, N, packed->info.n_vocab);
    float *a = eval_all(packed, tokens, N, 0, N, 1, HEPTA_CACHE_F32);
    float *b = eval_all(plain, tokens, N, 0, N, 1, HEPTA_CACHE_F32);
    double difference = relative_difference(a, b, (size_t)N * packed->info.n_vocab);
    test_note("relative difference %.4f", difference);
    CHECK(difference < 0.05);
    free(a);
    free(b);
    free(t);
    hepta_model_close(packed);
    hepta_model_close(plain);
}

/* ---- Types of cache ---------------------------------------------------- */

/* On the bundled model rounding keys and values changes little. Keys of wrong positions or a
 * rotation of queries alone would change the logits beyond recognition. */
TEST(model_cache_types) {
    enum { N = 200 };
    static const double bound[N_CACHES] = {0.0, 0.0002, 0.005};
    int32_t tokens[N];
    hepta_model *m = open_model("models/hepta-stories-7m-f16.gguf");
    random_tokens(tokens, N, m->info.n_vocab);
    float *exact = NULL;
    for (int cache = 0; cache < N_CACHES; cache++) {
        float *logits = eval_all(m, tokens, N, 0, N, 1, (hepta_cache_type)cache);
        exact = cache == 0 ? logits : exact;
        double difference = relative_difference(logits, exact, (size_t)N * m->info.n_vocab);
        test_note("cache type %d: relative difference %.6f", cache, difference);
        CHECK(difference <= bound[cache]);
        CHECK(cache == 0 || difference > bound[cache] / 100.0);
        if (cache != 0) {
            free(logits);
        }
    }
    free(exact);
    hepta_model_close(m);
}

/* The bytes of caches: 2 layers, 2 KV heads of 10 items, 3 sequences, 150 positions. */
TEST(session_cache_memory) {
    hepta_error err;
    hepta_model *m = open_model(tiny_file(TENSOR_F32, 0));
    size_t memory[N_CACHES];
    for (int cache = 0; cache < N_CACHES; cache++) {
        hepta_session *s = NULL;
        hepta_session_options o = {
            .n_ctx = 150, .n_sequences = 3, .threads = 1, .cache_type = (hepta_cache_type)cache};
        CHECK_OK(hepta_session_create(m, &o, &s, &err));
        memory[cache] = hepta_session_memory(s);
        hepta_session_free(s);
    }
    enum { HEADS = 2 * 2 * 3 };
    CHECK_EQ_INT(memory[0] - memory[1], 2 * HEADS * (6016 - 3008)); /* pieces of 64 bytes */
    /* Q8: rows of 16 for 160 positions, scales, and the rotation's tables */
    size_t q8 = 2 * HEADS * (160 * 16 + 160 * 4);
    size_t difference = memory[2] - memory[1] - (q8 - 2 * HEADS * 3008);
    CHECK(difference > 0 && difference < 512);
    hepta_model_close(m);
}

static size_t resident_bytes(void) {
    FILE *f = fopen("/proc/self/statm", "r");
    unsigned long pages = 0;
    CHECK(f != NULL && fscanf(f, "%*u %lu", &pages) == 1);
    fclose(f);
    return pages * (size_t)sysconf(_SC_PAGESIZE);
}

/* A long context costs memory as it fills, not at its first token: 12 caches of 4.2 MB here. */
TEST(session_long_context_is_sparse) {
    hepta_error err;
    hepta_model *m = open_model(tiny_file(TENSOR_F32, 0));
    hepta_session *s = NULL;
    hepta_session_options o = {.n_ctx = 105000, .n_sequences = 3, .threads = 1};
    CHECK_OK(hepta_session_create(m, &o, &s, &err));
    CHECK(hepta_session_memory(s) > 50 << 20);
    size_t before = resident_bytes();
    const int32_t token = 1;
    CHECK_OK(hepta_session_eval(s, &token, 1, NULL, false, &err));
    CHECK(resident_bytes() < before + (4 << 20));
    hepta_session_free(s);
    hepta_model_close(m);
}

/* ---- RoPE -------------------------------------------------------------- */

static float *eval_tiny(const tiny_model *t, const int32_t *tokens, size_t n) {
    char path[1024];
    snprintf(path, sizeof path, "%s/rope.hepta", test_tmp_dir());
    tiny_write(t, path);
    hepta_model *m = open_model(path);
    float *logits = eval_all(m, tokens, n, 0, n, 1, HEPTA_CACHE_F32);
    hepta_model_close(m);
    return logits;
}

/* Half-split pairs with the rows of q and k reordered compute what interleaved pairs do. */
TEST(model_rope_layouts) {
    enum { N = 40, DIM = 10 };
    tiny_model *t = calloc(1, sizeof *t);
    CHECK(t != NULL);
    int32_t tokens[N];
    random_tokens(tokens, N, 50);
    tiny_default(t, TENSOR_F32, 0);
    static float source[2][2][40 * 40], target[2][2][40 * 40];
    for (int l = 0; l < 2; l++) {
        for (int which = 0; which < 2; which++) { /* q: 4 heads, k: 2 */
            char name[64];
            snprintf(name, sizeof name, "blk.%d.attn_%c.weight", l, "qk"[which]);
            for (size_t i = 0; i < 40 * 40; i++) {
                source[l][which][i] = 0.3f * test_random_gauss();
            }
            for (uint32_t row = 0; row < (which == 0 ? 40 : 20); row++) {
                uint32_t head = row / DIM, d = row % DIM;
                uint32_t to = head * DIM + d / 2 + (d % 2) * (DIM / 2);
                memcpy(&target[l][which][to * 40], &source[l][which][row * 40], 40 * sizeof(float));
            }
            tiny_tensor(t, name)->data = (const uint8_t *)source[l][which];
        }
    }
    float *a = eval_tiny(t, tokens, N);
    tiny_set_bool(t, "hepta.rope.interleaved", false);
    for (int l = 0; l < 2; l++) {
        for (int which = 0; which < 2; which++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.attn_%c.weight", l, "qk"[which]);
            tiny_tensor(t, name)->data = (const uint8_t *)target[l][which];
        }
    }
    float *b = eval_tiny(t, tokens, N);
    for (size_t i = 0; i < N * 50; i++) {
        CHECK(fabsf(a[i] - b[i]) < 2e-4f * (1.0f + fabsf(a[i])));
    }
    free(a);
    free(b);
    free(t);
}

TEST(model_rope_scaling) {
    enum { N = 40 };
    tiny_model *t = calloc(1, sizeof *t);
    CHECK(t != NULL);
    int32_t tokens[N];
    random_tokens(tokens, N, 50);
    const size_t n_bytes = N * 50 * sizeof(float);
    static const float ones[5] = {1, 1, 1, 1, 1}, twos[5] = {2, 2, 2, 2, 2};

    tiny_default(t, TENSOR_F32, 0);
    float *plain = eval_tiny(t, tokens, N);
    tensor *factors = tiny_add_tensor(t, "rope_freqs.weight", TENSOR_F32, 5, 0);
    factors->data = (const uint8_t *)ones;
    float *with_ones = eval_tiny(t, tokens, N);
    CHECK_MEM_EQ(plain, with_ones, n_bytes);
    factors->data = (const uint8_t *)twos;
    float *with_twos = eval_tiny(t, tokens, N);
    CHECK(memcmp(plain, with_twos, n_bytes) != 0);
    tiny_remove_tensor(t, "rope_freqs.weight");
    tiny_set_string(t, "llama.rope.scaling.type", "linear");
    tiny_set_f32(t, "llama.rope.scaling.factor", 2.0f);
    float *linear = eval_tiny(t, tokens, N);
    CHECK_MEM_EQ(linear, with_twos, n_bytes);
    tiny_set_string(t, "llama.rope.scaling.type", "none");
    float *none = eval_tiny(t, tokens, N);
    CHECK_MEM_EQ(none, plain, n_bytes);
    free(plain), free(with_ones), free(with_twos), free(linear), free(none);
    free(t);
}

/* ---- Sessions ---------------------------------------------------------- */

TEST(session_context_and_truncate) {
    enum { N = 160 };
    hepta_error err;
    hepta_model *m = open_model(tiny_file(TENSOR_PACKED, 7));
    CHECK_EQ_INT(m->info.n_ctx_train, N);
    int32_t tokens[N + 1];
    random_tokens(tokens, N + 1, m->info.n_vocab);
    float *expected = eval_all(m, tokens, N, 0, N, 1, HEPTA_CACHE_F32);
    const size_t n_vocab = m->info.n_vocab, n_bytes = n_vocab * sizeof(float);

    hepta_session *s = new_session(m, 32, 1, HEPTA_CACHE_F32);
    CHECK_EQ_INT(hepta_session_context(s), N);
    CHECK(hepta_session_memory(s) > (size_t)2 * 2 * N * 20 * sizeof(float));
    float *logits = new_floats(n_vocab);
    memset(logits, 0x55, n_bytes);
    uint64_t allocations = memory_count();
    CHECK_EQ_INT(hepta_session_eval(s, tokens, N + 1, logits, false, &err), HEPTA_ERROR_CONTEXT);
    CHECK(strstr(err.message, "161") != NULL && strstr(err.message, "160") != NULL);
    CHECK_EQ_INT(hepta_session_position(s, 0), 0);
    CHECK(((unsigned char *)logits)[0] == 0x55);
    CHECK_OK(hepta_session_eval(s, tokens, N, logits, false, &err));
    CHECK_MEM_EQ(logits, expected + (N - 1) * n_vocab, n_bytes);
    CHECK_EQ_INT(hepta_session_eval(s, tokens, 1, logits, false, &err), HEPTA_ERROR_CONTEXT);

    /* Back to 70 tokens: what was computed after them must not matter. */
    hepta_session_truncate(s, 0, 200);
    CHECK_EQ_INT(hepta_session_position(s, 0), N);
    hepta_session_truncate(s, 0, 70);
    CHECK_OK(hepta_session_eval(s, tokens + 100, 9, NULL, false, &err));
    hepta_session_truncate(s, 0, 70);
    CHECK_OK(hepta_session_eval(s, tokens + 70, 30, logits, false, &err));
    CHECK_MEM_EQ(logits, expected + 99 * n_vocab, n_bytes);
    hepta_session_truncate(s, 0, 0);
    CHECK_OK(hepta_session_eval(s, tokens, 1, logits, false, &err));
    CHECK_MEM_EQ(logits, expected, n_bytes);
    CHECK_EQ_INT(memory_count(), allocations);

    hepta_session_free(s);

    /* A cache full of NaN is as good as a fresh one. */
    for (int cache = 0; cache < N_CACHES; cache++) {
        s = new_session(m, 32, 1, (hepta_cache_type)cache);
        float *fresh = new_floats(n_vocab);
        CHECK_OK(hepta_session_eval(s, tokens, 150, fresh, false, &err));
        hepta_session_truncate(s, 0, 0);
        for (int c = 0; c < 2 * 2; c++) {
            const size_t bytes = (size_t)kv_bytes((hepta_cache_type)cache, 10, N);
            memset(s->caches[c].k, 0xff, bytes);
            memset(s->caches[c].v, 0xff, bytes);
            if (cache == HEPTA_CACHE_Q8) {
                memset(s->caches[c].k_scale, 0xff, N * sizeof(float));
                memset(s->caches[c].v_scale, 0xff, N * sizeof(float));
            }
        }
        CHECK_OK(hepta_session_eval(s, tokens, 150, logits, false, &err));
        CHECK_MEM_EQ(logits, fresh, n_bytes);
        free(fresh);
        hepta_session_free(s);
    }
    free(logits);
    free(expected);
    hepta_model_close(m);
}

/* Texts of several lengths, and their logits in sessions of their own: (lengths[i], n_vocab). */
enum { MAX_TEXTS = 32, MAX_TEXT = 90 };
typedef struct texts {
    int32_t tokens[MAX_TEXTS][MAX_TEXT];
    uint32_t lengths[MAX_TEXTS];
    float *logits[MAX_TEXTS];
} texts;

static void texts_fill(texts *x, const hepta_model *m, hepta_cache_type cache_type) {
    for (int i = 0; i < MAX_TEXTS; i++) {
        x->lengths[i] = 1 + test_random_below(i % 4 == 0 ? MAX_TEXT : 20);
        random_tokens(x->tokens[i], x->lengths[i], m->info.n_vocab);
        x->logits[i] = eval_all(m, x->tokens[i], x->lengths[i], 1, 1, 1, cache_type);
    }
}

static void texts_free(texts *x) {
    for (int i = 0; i < MAX_TEXTS; i++) {
        free(x->logits[i]);
    }
}

/* Adds up to 30 tokens to a batch: one token or some of sequences drawn at random. */
static size_t draw_batch(const texts *x, uint32_t n_sequences, uint32_t *done,
                         hepta_batch_token *batch) {
    size_t n = 0, most = 1 + test_random_below(30);
    uint32_t want = test_random_below(3); /* logits of none, half, all */
    for (int tries = 0; tries < 100 && n < most; tries++) {
        uint32_t i = test_random_below(n_sequences);
        uint32_t some = test_random_below(2) != 0 ? 1 : 1 + test_random_below(20);
        for (; some > 0 && n < most && done[i] < x->lengths[i]; some--) {
            bool logits = want == 2 || (want == 1 && test_random_below(2) != 0);
            batch[n++] = (hepta_batch_token){x->tokens[i][done[i]++], i, logits};
        }
    }
    return n;
}

/* All texts through one session, in batches drawn at random, a few of them set back on the way:
 * every row has the bits of the text alone. */
static void check_batches(const hepta_model *m, const texts *x,
                          const hepta_session_options *options) {
    hepta_error err;
    hepta_session *s = NULL;
    const size_t n_vocab = m->info.n_vocab;
    CHECK_OK(hepta_session_create(m, options, &s, &err));
    float *logits = new_floats(30 * n_vocab);
    uint32_t done[MAX_TEXTS] = {0};
    hepta_batch_token batch[30];
    const uint64_t allocations = memory_count();
    for (size_t n; (n = draw_batch(x, options->n_sequences, done, batch)) > 0;) {
        uint32_t at[MAX_TEXTS];
        for (uint32_t i = 0; i < options->n_sequences; i++) {
            at[i] = hepta_session_position(s, i);
        }
        CHECK_OK(hepta_session_eval_batch(s, batch, n, logits, &err));
        size_t row = 0;
        for (size_t i = 0; i < n; i++) {
            uint32_t sequence = batch[i].sequence, position = at[sequence]++;
            if (batch[i].logits) {
                CHECK_MEM_EQ(logits + row * n_vocab, x->logits[sequence] + position * n_vocab,
                             n_vocab * sizeof(float));
                row++;
            }
        }
        uint32_t back = test_random_below(options->n_sequences);
        CHECK_EQ_INT(hepta_session_position(s, back), done[back]);
        if (test_random_below(8) == 0) {
            done[back] = test_random_below(done[back] + 1);
            hepta_session_truncate(s, back, done[back]);
        }
    }
    CHECK_EQ_INT(memory_count(), allocations);
    free(logits);
    hepta_session_free(s);
}

TEST(session_batch_same_bits) {
    static const uint32_t sequences[] = {1, 2, 3, 8, 17, MAX_TEXTS}, batches[] = {1, 7, 64};
    const uint32_t types[] = {TENSOR_PACKED, TENSOR_F32};
    for (int type = 0; type < 2; type++) {
        const char *path = tiny_file(types[type], types[type] == TENSOR_PACKED ? 7 : 0);
        for (int cache = 0; cache < N_CACHES; cache++) {
            setenv("HEPTA_KERNELS", "ref", 1);
            hepta_model *m = open_model(path);
            static texts x;
            texts_fill(&x, m, (hepta_cache_type)cache);
            bool supported;
            const kernels *k;
            for (size_t table = 0; (k = kernels_get(table, &supported)) != NULL; table++) {
                kernels eager = *k; /* shares even the smallest step among the threads */
                eager.macs_per_microsecond = 0;
                m->kernels = &eager;
                for (int i = 0; supported && i < 6; i++) {
                    check_batches(m, &x,
                                  &(hepta_session_options){.n_ctx = MAX_TEXT,
                                                           .n_sequences = sequences[i],
                                                           .n_batch = batches[i % 3],
                                                           .threads = 1 + (i + (int)table) % 3,
                                                           .cache_type = (hepta_cache_type)cache});
                }
            }
            texts_free(&x);
            hepta_model_close(m);
        }
    }
}

TEST(session_batch_errors) {
    hepta_error err;
    hepta_model *m = open_model(tiny_file(TENSOR_PACKED, 7));
    hepta_session *s = NULL, *plain = NULL;
    hepta_session_options o = {.n_ctx = 4, .n_sequences = 3, .n_batch = 2, .threads = 1};
    CHECK_OK(hepta_session_create(m, &o, &s, &err));
    o.n_sequences = 0;
    CHECK_OK(hepta_session_create(m, &o, &plain, &err));
    CHECK(hepta_session_memory(s) >= hepta_session_memory(plain) + (size_t)2 * 2 * 2 * 4 * 80);
    hepta_session_free(plain);
    const hepta_batch_token good[] = {{1, 0, true}, {2, 2, false}, {3, 2, true}, {4, 0, false}};
    hepta_batch_token bad[10];
    float logits[10 * 50], expected[2 * 50], again[2 * 50];
    const size_t n_bytes = sizeof expected;
    CHECK_OK(hepta_session_eval_batch(s, good, 4, expected, &err));
    memset(logits, 0x55, sizeof logits);
    for (int round = 0; round < 5; round++) {
        size_t n = 4;
        memcpy(bad, good, sizeof good);
        hepta_status status = HEPTA_ERROR_ARGUMENT;
        const char *text = "";
        switch (round) {
        case 0:
            bad[3].token = 50, text = "token 3 of the call has the id 50";
            break;
        case 1:
            bad[3].sequence = 3, text = "token 3 of the call is for sequence 3, expected 0 to 2";
            break;
        case 2: /* two after the two it has, in two chunks, and one more */
            n = 6, bad[4] = bad[5] = (hepta_batch_token){1, 2, true};
            bad[4].sequence = 1;
            bad[3].sequence = 2;
            status = HEPTA_ERROR_CONTEXT;
            text = "4 tokens after position 2 of sequence 2 do not fit the context of 4";
            break;
        case 3:
            n = 0, text = "no tokens";
            break;
        default:
            CHECK_EQ_INT(hepta_session_eval_batch(s, bad, 4, NULL, &err), status);
            CHECK(strstr(err.message, "token 0") != NULL);
            continue;
        }
        CHECK_EQ_INT(hepta_session_eval_batch(s, bad, n, logits, &err), status);
        CHECK(strstr(err.message, text) != NULL);
        CHECK_EQ_INT(((unsigned char *)logits)[0], 0x55);
        for (uint32_t i = 0; i < 3; i++) {
            CHECK_EQ_INT(hepta_session_position(s, i), i == 1 ? 0 : 2);
        }
    }
    CHECK_EQ_INT(hepta_session_eval_batch(s, NULL, 1, logits, NULL), HEPTA_ERROR_ARGUMENT);
    hepta_session_truncate(s, 0, 0), hepta_session_truncate(s, 2, 0);
    hepta_session_truncate(s, 3, 0); /* none: no effect */
    CHECK_EQ_INT(hepta_session_position(s, 3), 0);
    CHECK_OK(hepta_session_eval_batch(s, good, 4, again, &err));
    CHECK_MEM_EQ(again, expected, n_bytes);
    hepta_session_free(s);
    s = NULL;
    o = (hepta_session_options){.n_sequences = INT32_MAX, .n_ctx = INT32_MAX};
    CHECK_EQ_INT(hepta_session_create(m, &o, &s, &err), HEPTA_ERROR_MEMORY);
    o.n_sequences = UINT32_MAX;
    CHECK_EQ_INT(hepta_session_create(m, &o, &s, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(s == NULL);
    hepta_model_close(m);
}

TEST(session_arguments) {
    hepta_error err;
    hepta_model *m = open_model(tiny_file(TENSOR_F32, 0));
    hepta_session *s = new_session(m, 0, 1, HEPTA_CACHE_F32);
    int32_t tokens[3] = {1, 50, 2};
    float logits[50];
    CHECK_EQ_INT(hepta_session_eval(s, tokens, 3, logits, false, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(strstr(err.message, "50") != NULL && strstr(err.message, "49") != NULL);
    tokens[1] = -7;
    CHECK_EQ_INT(hepta_session_eval(s, tokens, 3, logits, false, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(strstr(err.message, "-7") != NULL);
    CHECK_EQ_INT(hepta_session_eval(s, tokens, 0, logits, false, NULL), HEPTA_ERROR_ARGUMENT);
    CHECK_EQ_INT(hepta_session_eval(s, NULL, 1, logits, false, NULL), HEPTA_ERROR_ARGUMENT);
    CHECK_EQ_INT(hepta_session_position(s, 0), 0);

    hepta_session *other = NULL;
    hepta_session_options o = {.threads = -1};
    CHECK_EQ_INT(hepta_session_create(m, &o, &other, &err), HEPTA_ERROR_ARGUMENT);
    o = (hepta_session_options){.cache_type = (hepta_cache_type)7};
    CHECK_EQ_INT(hepta_session_create(m, &o, &other, &err), HEPTA_ERROR_ARGUMENT);
    o = (hepta_session_options){.n_ctx = UINT32_MAX};
    CHECK_EQ_INT(hepta_session_create(m, &o, &other, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(other == NULL);
    CHECK_OK(hepta_session_create(m, NULL, &other, &err));
    CHECK_EQ_INT(hepta_session_context(other), 160);
    hepta_session_free(other);
    hepta_session_free(NULL);
    hepta_session_free(s);
    hepta_model_close(m);
    hepta_model_close(NULL);
}

/* Every allocation made to fail in turn: an error, and nothing leaks. */
TEST(model_allocation_failures) {
    const char *path = tiny_file(TENSOR_PACKED, 7);
    uint64_t k = 0;
    hepta_status status;
    do {
        hepta_error err = {0};
        hepta_model *m = NULL;
        hepta_session *s = NULL;
        hepta_sampler *sampler = NULL;
        memory_fail_after(++k);
        status = hepta_model_open(path, &m, &err);
        if (status == HEPTA_OK) {
            status = hepta_session_create(
                m, &(hepta_session_options){.threads = 2, .cache_type = HEPTA_CACHE_Q8}, &s, &err);
        }
        if (status == HEPTA_OK) {
            status = hepta_sampler_create(&(hepta_sampler_options){.temperature = 1.0f}, 50,
                                          &sampler, &err);
        }
        memory_fail_after(0);
        if (status != HEPTA_OK) {
            CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
            CHECK_EQ_INT(err.status, HEPTA_ERROR_MEMORY);
            CHECK(err.message[0] != '\0');
        } else {
            CHECK(err.message[0] == '\0'); /* no failure on the way was passed over */
        }
        hepta_sampler_free(sampler);
        hepta_session_free(s);
        hepta_model_close(m);
    } while (status != HEPTA_OK);
    test_note("%llu allocations", (unsigned long long)k - 1);
    CHECK(k > 10);
}

/* ---- Hostile and unsupported files ------------------------------------- */

/* Expects that the model does not open, with this status and a message that has `text` in it. */
static void check_refused(const tiny_model *t, hepta_status expected, const char *text) {
    char path[1024];
    hepta_error err = {0};
    hepta_model *m = NULL;
    snprintf(path, sizeof path, "%s/bad.hepta", test_tmp_dir());
    tiny_write(t, path);
    hepta_status status = hepta_model_open(path, &m, &err);
    if (status != expected || strstr(err.message, text) == NULL || m != NULL) {
        test_fail(__FILE__, __LINE__, "expected status %d and \"%s\", got %d: %s", (int)expected,
                  text, (int)status, err.message);
    }
    CHECK(strstr(err.message, "bad.hepta") != NULL);
}

TEST(model_hostile_metadata) {
    static const struct {
        const char *key;
        uint32_t value;
        hepta_status status;
        const char *text;
    } cases[] = {
        {"llama.attention.head_count", 0, HEPTA_ERROR_FORMAT, "head_count"},
        {"llama.attention.head_count", 3, HEPTA_ERROR_FORMAT, "head_count"},
        {"llama.attention.head_count", 0xffffffff, HEPTA_ERROR_FORMAT, "head_count"},
        {"llama.attention.head_count_kv", 0, HEPTA_ERROR_FORMAT, "head_count_kv"},
        {"llama.attention.head_count_kv", 3, HEPTA_ERROR_FORMAT, "head_count_kv"},
        {"llama.attention.head_count_kv", 8, HEPTA_ERROR_FORMAT, "head_count_kv"},
        {"llama.attention.key_length", 0, HEPTA_ERROR_FORMAT, "key_length"},
        {"llama.attention.key_length", 100000, HEPTA_ERROR_UNSUPPORTED, "100000"},
        {"llama.attention.value_length", 12, HEPTA_ERROR_UNSUPPORTED, "12"},
        {"llama.embedding_length", 0, HEPTA_ERROR_FORMAT, "embedding_length"},
        {"llama.embedding_length", 48, HEPTA_ERROR_FORMAT, "token_embd.weight"},
        {"llama.embedding_length", 0x80000000, HEPTA_ERROR_FORMAT, "embedding_length"},
        {"llama.block_count", 0, HEPTA_ERROR_FORMAT, "block_count"},
        {"llama.block_count", 3, HEPTA_ERROR_FORMAT, "blk.2."},
        {"llama.block_count", 60000, HEPTA_ERROR_FORMAT, "block_count"},
        {"llama.block_count", 1, HEPTA_ERROR_UNSUPPORTED, "blk.1."},
        {"llama.feed_forward_length", 0, HEPTA_ERROR_FORMAT, "feed_forward_length"},
        {"llama.feed_forward_length", 64, HEPTA_ERROR_FORMAT, "ffn_gate"},
        {"llama.feed_forward_length", 4000000000, HEPTA_ERROR_FORMAT, "feed_forward_length"},
        {"llama.context_length", 0, HEPTA_ERROR_FORMAT, "context_length"},
        {"llama.rope.dimension_count", 3, HEPTA_ERROR_FORMAT, "dimension_count"},
        {"llama.rope.dimension_count", 0, HEPTA_ERROR_FORMAT, "dimension_count"},
        {"llama.rope.dimension_count", 12, HEPTA_ERROR_FORMAT, "dimension_count"},
        {"llama.expert_count", 8, HEPTA_ERROR_UNSUPPORTED, "expert"},
    };
    tiny_model *t = calloc(1, sizeof *t);
    CHECK(t != NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tiny_default(t, i % 2 == 0 ? TENSOR_F32 : TENSOR_PACKED, i % 2 == 0 ? 0 : 7);
        tiny_set_u32(t, cases[i].key, cases[i].value);
        check_refused(t, cases[i].status, cases[i].text);
    }
    static const char *const required[] = {"general.architecture",
                                           "llama.context_length",
                                           "llama.embedding_length",
                                           "llama.block_count",
                                           "llama.feed_forward_length",
                                           "llama.attention.head_count",
                                           "llama.attention.layer_norm_rms_epsilon"};
    for (size_t i = 0; i < sizeof required / sizeof required[0]; i++) {
        tiny_default(t, TENSOR_F32, 0);
        tiny_remove_key(t, required[i]);
        check_refused(t, HEPTA_ERROR_FORMAT, required[i]);
        tiny_set_bool(t, required[i], true); /* of a wrong type */
        check_refused(t, HEPTA_ERROR_FORMAT, required[i]);
    }
    static const float bad[] = {0.0f, -1.0f, NAN, INFINITY};
    static const char *const positive[] = {"llama.attention.layer_norm_rms_epsilon",
                                           "llama.rope.freq_base", "llama.rope.scaling.factor"};
    for (size_t i = 0; i < 12; i++) {
        tiny_default(t, TENSOR_F32, 0);
        tiny_set_string(t, "llama.rope.scaling.type", "linear");
        tiny_set_f32(t, positive[i / 4], bad[i % 4]);
        check_refused(t, HEPTA_ERROR_FORMAT, positive[i / 4]);
    }
    tiny_default(t, TENSOR_F32, 0);
    tiny_set_string(t, "llama.rope.scaling.type", "yarn");
    check_refused(t, HEPTA_ERROR_UNSUPPORTED, "yarn");
    tiny_default(t, TENSOR_F32, 0);
    tiny_set_string(t, "general.architecture", "falcon");
    check_refused(t, HEPTA_ERROR_UNSUPPORTED, "falcon");
    free(t);
}

TEST(model_hostile_tensors) {
    static const char *const names[] = {
        "token_embd.weight",        "output_norm.weight",    "blk.1.attn_norm.weight",
        "blk.0.attn_q.weight",      "blk.1.attn_k.weight",   "blk.0.attn_v.weight",
        "blk.0.attn_output.weight", "blk.0.ffn_norm.weight", "blk.1.ffn_gate.weight",
        "blk.0.ffn_up.weight",      "blk.1.ffn_down.weight"};
    tiny_model *t = calloc(1, sizeof *t);
    CHECK(t != NULL);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        tiny_default(t, TENSOR_F32, 0);
        tiny_remove_tensor(t, names[i]);
        check_refused(t, HEPTA_ERROR_FORMAT, names[i]);
        tiny_default(t, TENSOR_F32, 0);
        tiny_tensor(t, names[i])->ne[0] += 16;
        check_refused(t, HEPTA_ERROR_FORMAT, names[i]);
        tiny_default(t, TENSOR_F32, 0);
        tiny_tensor(t, names[i])->n_dims = 3;
        tiny_tensor(t, names[i])->ne[2] = 2;
        check_refused(t, HEPTA_ERROR_FORMAT, names[i]);
        tiny_default(t, TENSOR_F32, 0);
        tiny_tensor(t, names[i])->type = TENSOR_I8;
        check_refused(t, HEPTA_ERROR_UNSUPPORTED, names[i]);
    }
    tiny_default(t, TENSOR_F32, 0);
    tiny_tensor(t, "output.weight")->ne[1] = 49;
    check_refused(t, HEPTA_ERROR_FORMAT, "output.weight");
    /* A tensor that this architecture does not know must not be ignored. */
    tiny_default(t, TENSOR_F32, 0);
    tiny_add_tensor(t, "blk.0.attn_q.bias", TENSOR_F32, 40, 0);
    check_refused(t, HEPTA_ERROR_UNSUPPORTED, "attn_q.bias");
    /* Numbers that are not finite */
    static float norm[40];
    tiny_default(t, TENSOR_F32, 0);
    norm[39] = NAN;
    tiny_tensor(t, "blk.1.ffn_norm.weight")->data = (const uint8_t *)norm;
    check_refused(t, HEPTA_ERROR_FORMAT, "blk.1.ffn_norm.weight");
    static uint8_t packed[7 * 5 / 2 * 48 * 40];
    tiny_default(t, TENSOR_PACKED, 7);
    tensor *k = tiny_tensor(t, "blk.1.attn_k.weight"); /* 20 rows of 40: 48 columns stored */
    packed[32 * 3 * 7 + 2 * 19] = 0x80, packed[32 * 3 * 7 + 2 * 19 + 1] = 0x7f;
    k->data = packed;
    check_refused(t, HEPTA_ERROR_FORMAT, "row 19");
    static const float factors[5] = {1, 1, -1, 1, 1};
    tiny_default(t, TENSOR_F32, 0);
    tiny_add_tensor(t, "rope_freqs.weight", TENSOR_F32, 5, 0)->data = (const uint8_t *)factors;
    check_refused(t, HEPTA_ERROR_FORMAT, "rope_freqs.weight");
    free(t);
}

TEST(model_open_errors) {
    hepta_error err;
    hepta_model *m = NULL;
    CHECK_EQ_INT(hepta_model_open("/nonexistent/model", &m, &err), HEPTA_ERROR_IO);
    CHECK_EQ_INT(hepta_model_open(NULL, &m, &err), HEPTA_ERROR_ARGUMENT);
    setenv("HEPTA_KERNELS", "abacus", 1);
    CHECK_EQ_INT(hepta_model_open(tiny_file(TENSOR_F32, 0), &m, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(m == NULL);
}

/* Without output.weight the head is the embedding. */
TEST(model_tied_head) {
    enum { N = 5 };
    tiny_model *t = calloc(1, sizeof *t);
    CHECK(t != NULL);
    int32_t tokens[N] = {1, 2, 3, 4, 5};
    tiny_default(t, TENSOR_F32, 0);
    static float weights[50 * 40];
    for (size_t i = 0; i < 50 * 40; i++) {
        weights[i] = test_random_gauss();
    }
    tiny_tensor(t, "token_embd.weight")->data = (const uint8_t *)weights;
    tiny_tensor(t, "output.weight")->data = (const uint8_t *)weights;
    float *a = eval_tiny(t, tokens, N);
    tiny_remove_tensor(t, "output.weight");
    float *b = eval_tiny(t, tokens, N);
    CHECK_MEM_EQ(a, b, N * 50 * sizeof(float));
    free(a);
    free(b);
    free(t);
}
