/*
 * test_tiny_model.c - tiny_model.h, and a test that its files hold what was asked for.
 */
#include "test.h"

#include "tiny_model.h"

#include <stdlib.h>

/* ---- Keys -------------------------------------------------------------- */

static kv *set_key(tiny_model *m, const char *key, kv_type type) {
    tiny_remove_key(m, key);
    CHECK(m->n_kvs < TINY_MAX_KVS);
    kv *k = &m->kvs[m->n_kvs++];
    *k = (kv){.key = {key, strlen(key)}, .type = type};
    return k;
}

void tiny_set_u32(tiny_model *m, const char *key, uint32_t v) {
    set_key(m, key, KV_U32)->v.u = v;
}

void tiny_set_f32(tiny_model *m, const char *key, float v) {
    set_key(m, key, KV_F32)->v.f = (double)v;
}

void tiny_set_bool(tiny_model *m, const char *key, bool v) {
    set_key(m, key, KV_BOOL)->v.u = v;
}

void tiny_set_string(tiny_model *m, const char *key, const char *s) {
    set_key(m, key, KV_STRING)->v.s = (kv_string){s, strlen(s)};
}

void tiny_remove_key(tiny_model *m, const char *key) {
    for (size_t i = 0; i < m->n_kvs; i++) {
        if (m->kvs[i].key.n == strlen(key) && memcmp(m->kvs[i].key.data, key, strlen(key)) == 0) {
            m->kvs[i] = m->kvs[--m->n_kvs];
            return;
        }
    }
}

/* ---- Tensors ----------------------------------------------------------- */

tensor *tiny_tensor(tiny_model *m, const char *name) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        if (strcmp(m->names[i], name) == 0) {
            return &m->tensors[i];
        }
    }
    test_fail(__FILE__, __LINE__, "no tensor %s", name);
}

tensor *tiny_add_tensor(tiny_model *m, const char *name, uint32_t type, uint64_t n_cols,
                        uint64_t n_rows) {
    CHECK(m->n_tensors < TINY_MAX_TENSORS);
    tensor *t = &m->tensors[m->n_tensors];
    snprintf(m->names[m->n_tensors++], sizeof m->names[0], "%s", name);
    *t = (tensor){
        .type = type, .n_dims = n_rows > 0 ? 2 : 1, .ne = {n_cols, n_rows > 0 ? n_rows : 1, 1, 1}};
    return t;
}

void tiny_remove_tensor(tiny_model *m, const char *name) {
    size_t i = (size_t)(tiny_tensor(m, name) - m->tensors);
    for (m->n_tensors--; i < m->n_tensors; i++) {
        m->tensors[i] = m->tensors[i + 1];
        memcpy(m->names[i], m->names[i + 1], sizeof m->names[i]);
    }
}

void tiny_default(tiny_model *m, uint32_t type, uint32_t half_bits) {
    const bool blocks = type == TENSOR_Q8_0; /* of 32 columns */
    const uint32_t n_embd = blocks ? 64 : 40, n_ff = blocks ? 96 : 68, n_vocab = 50;
    memset(m, 0, sizeof *m);
    m->seed = test_random();
    tiny_set_string(m, "general.architecture", "llama");
    tiny_set_string(m, "general.name", "tiny");
    tiny_set_u32(m, "llama.context_length", 160);
    tiny_set_u32(m, "llama.embedding_length", n_embd);
    tiny_set_u32(m, "llama.block_count", 2);
    tiny_set_u32(m, "llama.feed_forward_length", n_ff);
    tiny_set_u32(m, "llama.attention.head_count", 4);
    tiny_set_u32(m, "llama.attention.head_count_kv", 2);
    tiny_set_f32(m, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    tiny_set_string(m, "hepta.recipe", "a test");
    tiny_set_f32(m, "hepta.bits", 3.5f);
    set_key(m, "hepta.rotation.seed", KV_U64)->v.u = 99;

    const struct {
        const char *name;
        uint32_t n_cols, n_rows;
    } parts[] = {{"attn_norm", n_embd, 0},        {"attn_q", n_embd, n_embd},
                 {"attn_k", n_embd, n_embd / 2},  {"attn_v", n_embd, n_embd / 2},
                 {"attn_output", n_embd, n_embd}, {"ffn_norm", n_embd, 0},
                 {"ffn_gate", n_embd, n_ff},      {"ffn_up", n_embd, n_ff},
                 {"ffn_down", n_ff, n_embd}};
    tiny_add_tensor(m, "token_embd.weight", type, n_embd, n_vocab);
    for (int layer = 0; layer < 2; layer++) {
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%d.%s.weight", layer, parts[i].name);
            tiny_add_tensor(m, name, parts[i].n_rows > 0 ? type : TENSOR_F32, parts[i].n_cols,
                            parts[i].n_rows);
        }
    }
    tiny_add_tensor(m, "output_norm.weight", TENSOR_F32, n_embd, 0);
    tiny_add_tensor(m, "output.weight", type, n_embd, n_vocab);
    for (size_t i = 0; i < m->n_tensors; i++) {
        m->tensors[i].half_bits = m->tensors[i].n_dims == 2 ? half_bits : 0;
    }
}

/* ---- Writing ----------------------------------------------------------- */

static uint64_t next(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static float uniform(uint64_t *state) { /* in [-1, 1) */
    return (float)(next(state) >> 40) * 0x1p-23f - 1.0f;
}

/* Random weights of standard deviation 0.3 or so, norms around 1. */
static void fill_tensor(const tensor *t, uint64_t seed, uint8_t *data, uint64_t n_bytes) {
    uint64_t state = seed;
    for (const char *c = t->name; *c != '\0'; c++) {
        state = state * 31 + (unsigned char)*c;
    }
    const uint64_t n = t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
    if (t->type == TENSOR_PACKED) {
        uint64_t n_codes = n_bytes - 2 * round_up(t->ne[1], 16);
        for (uint64_t i = 0; i < n_codes; i++) {
            data[i] = (uint8_t)next(&state);
        }
        for (uint64_t r = 0; r < t->ne[1]; r++) {
            uint16_t scale = bfloat_from_float((t->half_bits == 16 ? 0.004f : 0.01f) *
                                               (1.0f + 0.5f * uniform(&state)));
            memcpy(data + n_codes + 2 * r, &scale, sizeof scale);
        }
        return;
    }
    for (uint64_t i = 0; i < n; i++) {
        float x = t->n_dims == 1 ? 1.0f + 0.2f * uniform(&state) : 0.5f * uniform(&state);
        uint16_t half = half_from_float(x), bfloat = bfloat_from_float(x);
        switch (t->type) {
        case TENSOR_F32:
            memcpy(data + 4 * i, &x, sizeof x);
            break;
        case TENSOR_F16:
            memcpy(data + 2 * i, &half, sizeof half);
            break;
        case TENSOR_BF16:
            memcpy(data + 2 * i, &bfloat, sizeof bfloat);
            break;
        case TENSOR_Q8_0:
            if (i % 32 == 0) {
                half = half_from_float(0.004f + 0.001f * uniform(&state));
                memcpy(data + i / 32 * 34, &half, sizeof half);
            }
            data[i / 32 * 34 + 2 + i % 32] = (uint8_t)next(&state);
            break;
        default:
            data[i] = (uint8_t)next(&state);
        }
    }
}

void tiny_write(const tiny_model *m, const char *path) {
    hepta_error err;
    hepta_writer *w = NULL;
    tensor tensors[TINY_MAX_TENSORS];
    memcpy(tensors, m->tensors, sizeof tensors);
    for (size_t i = 0; i < m->n_tensors; i++) {
        tensors[i].name = m->names[i];
    }
    CHECK_OK(hepta_writer_open(path, m->kvs, m->n_kvs, tensors, m->n_tensors, &w, &err));
    for (size_t i = 0; i < m->n_tensors; i++) {
        const tensor *t = &tensors[i];
        uint64_t n_bytes = 0;
        CHECK(t->type == TENSOR_PACKED
                  ? tensor_packed_bytes(t->half_bits, t->ne[1], t->ne[0], &n_bytes)
                  : tensor_type_bytes(t->type, t->ne, &n_bytes));
        uint8_t *data = malloc((size_t)n_bytes);
        CHECK(data != NULL);
        if (t->data != NULL) {
            memcpy(data, t->data, (size_t)n_bytes);
        } else {
            fill_tensor(t, m->seed, data, n_bytes);
        }
        CHECK_OK(hepta_writer_write(w, data, (size_t)n_bytes, &err));
        free(data);
    }
    CHECK_OK(hepta_writer_commit(w, &err));
}

TEST(tiny_model_file) {
    char path[1024];
    hepta_error err;
    tiny_model *m = calloc(1, sizeof *m);
    CHECK(m != NULL);
    tiny_default(m, TENSOR_PACKED, 7);
    snprintf(path, sizeof path, "%s/tiny.hepta", test_tmp_dir());
    tiny_write(m, path);
    hepta_model *model = NULL;
    CHECK_OK(hepta_model_open(path, &model, &err));
    hepta_model_info info;
    hepta_model_get_info(model, &info);
    CHECK_EQ_STR(info.architecture, "llama");
    CHECK_EQ_STR(info.name, "tiny");
    CHECK_EQ_INT(info.n_vocab, 50);
    CHECK_EQ_INT(info.n_embd, 40);
    CHECK_EQ_INT(info.n_ff, 68);
    CHECK_EQ_INT(info.head_dim, 10);
    CHECK_EQ_INT(info.n_head_kv, 2);
    CHECK_EQ_INT(info.n_ctx_train, 160);
    CHECK(info.quantized);
    const uint64_t per_layer = 40 * 40 * 3 + 40 * 68 * 3 + 80;
    CHECK_EQ_INT(info.n_weights, 2 * 50 * 40 + 2 * per_layer + 40);
    hepta_model_close(model);
    free(m);
}

/* A name longer than hepta_model_info has room for is cut between code points. */
TEST(model_name_is_cut_whole) {
    char path[1024], name[160];
    hepta_error err;
    snprintf(path, sizeof path, "%s/tiny.hepta", test_tmp_dir());
    for (size_t front = 0; front < 4; front++) {
        tiny_model *m = calloc(1, sizeof *m);
        CHECK(m != NULL);
        tiny_default(m, TENSOR_F32, 0);
        memset(name, 'x', front);
        for (size_t i = 0; i < 36; i++) {
            memcpy(name + front + 4 * i, "\xF0\x9F\xA6\x99", 5);
        }
        tiny_set_string(m, "general.name", name);
        tiny_write(m, path);
        hepta_model *model = NULL;
        hepta_model_info info;
        CHECK_OK(hepta_model_open(path, &model, &err));
        hepta_model_get_info(model, &info);
        const size_t n = strlen(info.name);
        CHECK_EQ_INT(n, front + 4 * ((sizeof info.name - 1 - front) / 4));
        CHECK_MEM_EQ(info.name, name, n);
        hepta_model_close(model);
        free(m);
    }
}
