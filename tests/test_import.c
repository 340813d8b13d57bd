/*
 * test_import.c - models of other programs: Hugging Face directories and llama2.c files.
 */
#include "bytes.h"
#include "test.h"

#include "format/container.h"

#include <math.h>
#include <sys/stat.h>

static const container_options no_tokenizer = {.no_tokenizer = true};

static void check_refused(const char *path, hepta_status expected, const char *message) {
    hepta_error err = {.message = ""};
    container *c = NULL;
    hepta_status status = container_open(path, &no_tokenizer, &c, &err);
    if (status != expected || c != NULL || strstr(err.message, message) == NULL) {
        test_fail(__FILE__, __LINE__, "%s: expected status %d and \"%s\", found %d and \"%s\"",
                  path, (int)expected, message, (int)status, err.message);
    }
}

static void check_u32(const container *c, const char *key, uint32_t expected) {
    hepta_error err;
    uint32_t v = 0;
    CHECK_OK(container_get_u32(c, key, &v, &err));
    if (v != expected) {
        test_fail(__FILE__, __LINE__, "%s is %u; expected %u", key, v, expected);
    }
}

static void check_f32(const container *c, const char *key, float expected) {
    hepta_error err;
    float v = 0;
    CHECK_OK(container_get_f32(c, key, &v, &err));
    CHECK(v == expected);
}

static const tensor *check_tensor(const container *c, const char *name, uint32_t type,
                                  uint32_t n_dims, uint64_t cols, uint64_t rows) {
    const tensor *t = container_tensor(c, name);
    if (t == NULL) {
        test_fail(__FILE__, __LINE__, "%s: no tensor %s", c->path, name);
    }
    CHECK_EQ_INT(t->type, type);
    CHECK_EQ_INT(t->n_dims, n_dims);
    CHECK_EQ_INT(t->ne[0], cols);
    CHECK_EQ_INT(t->ne[1], rows);
    CHECK_EQ_INT(t->ne[2] * t->ne[3], 1);
    CHECK_EQ_INT((uintptr_t)t->data % (type == TENSOR_F32 ? 4 : 2), 0);
    return t;
}

/* Every allocation of opening `path` made to fail in turn. */
static void check_failing_memory(const char *path) {
    hepta_error err;
    container *c = NULL;
    uint64_t k = 1;
    for (;; k++) {
        memory_fail_after(k);
        hepta_status status = container_open(path, &no_tokenizer, &c, &err);
        memory_fail_after(0);
        if (status == HEPTA_OK) {
            break;
        }
        CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
        CHECK(c == NULL && k < 1000);
    }
    container_close(c);
    test_note("%d allocations failed in turn", (int)(k - 1));
    CHECK(k > 3);
}

/* ---- llama2.c ---------------------------------------------------------- */

enum { DIM = 8, HIDDEN = 12, LAYERS = 2, HEADS = 2, KV_HEADS = 1, VOCAB = 10, CONTEXT = 6 };

static void put_header(bytes *b, int32_t vocab) {
    const int32_t v[7] = {DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab, CONTEXT};
    for (int i = 0; i < 7; i++) {
        bytes_put_int(b, (uint32_t)v[i], 4);
    }
}

/* n floats that count up from `first`. */
static void put_floats(bytes *b, uint32_t n, float first) {
    for (uint32_t i = 0; i < n; i++) {
        float f = first + (float)i;
        bytes_put(b, &f, 4);
    }
}

/* The first format; tensor k counts from 1000 k, stacked over the layers. */
static bytes legacy_file(bool shared) {
    const uint32_t n = LAYERS, kv_dim = DIM / 2;
    const uint32_t sizes[] = {VOCAB * DIM,      n * DIM,          n * DIM * DIM, n * kv_dim * DIM,
                              n * kv_dim * DIM, n * DIM * DIM,    n * DIM,       n * HIDDEN * DIM,
                              n * DIM * HIDDEN, n * HIDDEN * DIM, DIM,           2 * CONTEXT * 2,
                              VOCAB * DIM};
    bytes b = {NULL, 0, 0};
    put_header(&b, shared ? VOCAB : -VOCAB);
    for (uint32_t k = 0; k < (shared ? 12u : 13u); k++) {
        put_floats(&b, sizes[k], 1000 * (float)k);
    }
    return b;
}

static float first_of(const tensor *t) {
    float f;
    memcpy(&f, t->data, 4);
    return f;
}

/* The tensors of either format, given where in the file each kind stands. */
static void check_llama2c(const char *path, const int place[12], bool shared, uint32_t version) {
    static const struct {
        const char *name;
        uint64_t rows, cols; /* rows 0: a vector */
    } kinds[] = {
        {"token_embd", VOCAB, DIM},       {"blk.%d.attn_norm", 0, DIM},
        {"blk.%d.attn_q", DIM, DIM},      {"blk.%d.attn_k", DIM / 2, DIM},
        {"blk.%d.attn_v", DIM / 2, DIM},  {"blk.%d.attn_output", DIM, DIM},
        {"blk.%d.ffn_norm", 0, DIM},      {"blk.%d.ffn_gate", HIDDEN, DIM},
        {"blk.%d.ffn_down", DIM, HIDDEN}, {"blk.%d.ffn_up", HIDDEN, DIM},
        {"output_norm", 0, DIM},          {"output", VOCAB, DIM},
    };
    hepta_error err;
    container *c;
    CHECK_OK(container_open(path, NULL, &c, &err));
    CHECK_EQ_INT(c->kind, CONTAINER_LLAMA2C);
    CHECK_EQ_INT(c->version, version);
    CHECK_EQ_INT(c->n_tensors, (shared ? 2 : 3) + 9 * LAYERS);
    for (size_t k = 0; k < (shared ? 11u : 12u); k++) {
        bool stacked = strncmp(kinds[k].name, "blk", 3) == 0;
        for (int layer = 0; layer < (stacked ? LAYERS : 1); layer++) {
            char name[64];
            const char *rest = stacked ? kinds[k].name + 6 : kinds[k].name;
            if (stacked) {
                snprintf(name, sizeof name, "blk.%d%s.weight", layer, rest);
            } else {
                snprintf(name, sizeof name, "%s.weight", rest);
            }
            uint64_t rows = kinds[k].rows == 0 ? 1 : kinds[k].rows;
            const tensor *t =
                check_tensor(c, name, TENSOR_F32, kinds[k].rows == 0 ? 1 : 2, kinds[k].cols, rows);
            CHECK(first_of(t) ==
                  1000 * (float)place[k] + (float)layer * (float)(rows * kinds[k].cols));
        }
    }
    check_u32(c, "llama.embedding_length", DIM);
    check_u32(c, "llama.feed_forward_length", HIDDEN);
    check_u32(c, "llama.block_count", LAYERS);
    check_u32(c, "llama.attention.head_count", HEADS);
    check_u32(c, "llama.attention.head_count_kv", KV_HEADS);
    check_u32(c, "llama.context_length", CONTEXT);
    check_u32(c, "llama.vocab_size", VOCAB);
    check_u32(c, "llama.rope.dimension_count", DIM / HEADS);
    check_f32(c, "llama.rope.freq_base", 10000);
    check_f32(c, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    CHECK_EQ_STR(container_get_string(c, "general.architecture"), "llama");
    CHECK(container_find(c, "hepta.rope.interleaved") == NULL);
    CHECK_OK(container_verify(c, NULL, NULL, &err));
    container_close(c);
}

TEST(import_llama2c_first_format) {
    static const int place[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12};
    const char *path = bytes_path(test_tmp_dir(), "m.bin");
    for (int shared = 0; shared < 2; shared++) {
        bytes b = legacy_file(shared);
        bytes_write_file(path, b.data, b.n);
        check_llama2c(path, place, shared, 0);
        for (size_t n = b.n; n-- > 0;) { /* no length but the right one will do */
            hepta_error err;
            container *c = NULL;
            CHECK(truncate(path, (off_t)n) == 0);
            CHECK_EQ_INT(container_open(path, NULL, &c, &err), HEPTA_ERROR_FORMAT);
        }
        bytes_put_int(&b, 0, 4);
        bytes_write_file(path, b.data, b.n);
        check_refused(path, HEPTA_ERROR_FORMAT, "it should have");
        bytes_free(&b);
    }
}

static bytes version1_file(bool shared) {
    const uint32_t n = LAYERS, kv_dim = DIM / 2;
    const uint32_t sizes[] = {n * DIM,          n * DIM,          DIM,
                              VOCAB * DIM,      n * DIM * DIM,    n * kv_dim * DIM,
                              n * kv_dim * DIM, n * DIM * DIM,    n * HIDDEN * DIM,
                              n * DIM * HIDDEN, n * HIDDEN * DIM, VOCAB * DIM};
    bytes b = {NULL, 0, 0};
    bytes_put_int(&b, 0x616b3432, 4);
    bytes_put_int(&b, 1, 4);
    put_header(&b, VOCAB);
    bytes_put_int(&b, shared, 1);
    bytes_pad(&b, 256);
    for (uint32_t k = 0; k < (shared ? 11u : 12u); k++) {
        put_floats(&b, sizes[k], 1000 * (float)k);
    }
    return b;
}

TEST(import_llama2c_version_1) {
    static const int place[12] = {3, 0, 4, 5, 6, 7, 1, 8, 9, 10, 2, 11};
    const char *path = bytes_path(test_tmp_dir(), "m.bin");
    for (int shared = 0; shared < 2; shared++) {
        bytes b = version1_file(shared);
        bytes_write_file(path, b.data, b.n);
        check_llama2c(path, place, shared, 1);
        bytes_write_file(path, b.data, b.n - 4);
        check_refused(path, HEPTA_ERROR_FORMAT, "cut short");
        bytes_write_file(path, b.data, 100);
        check_refused(path, HEPTA_ERROR_FORMAT, "100 bytes long");
        b.data[36] ^= 1; /* the flag and the size disagree */
        bytes_write_file(path, b.data, b.n);
        check_refused(path, HEPTA_ERROR_FORMAT, "2 layers and 10 tokens takes");
        b.data[36] = 2;
        bytes_write_file(path, b.data, b.n);
        check_refused(path, HEPTA_ERROR_FORMAT, "damaged");
        memset(b.data + 8, 0xff, 4);
        bytes_write_file(path, b.data, b.n);
        check_refused(path, HEPTA_ERROR_FORMAT, "describes no possible model");
        b.data[4] = 2;
        bytes_write_file(path, b.data, b.n);
        check_refused(path, HEPTA_ERROR_UNSUPPORTED, "version 2 (int8 groups)");
        bytes_free(&b);
    }
}

TEST(import_llama2c_hostile_headers) {
    const char *path = bytes_path(test_tmp_dir(), "m.bin");
    static const int32_t headers[][7] = {
        {0, 12, 2, 2, 1, 10, 6},
        {8, -12, 2, 2, 1, 10, 6},
        {8, 12, 2, 3, 1, 10, 6},
        {8, 12, 2, 2, 3, 10, 6},
        {8, 12, 2, 8, 8, 10, 6},
        {8, 12, 5000, 2, 1, 10, 6},
        {8, 12, 2, 2, 1, INT32_MIN, 6},
        {1 << 24, 1 << 24, 4096, 1, 1, 1 << 24, 1 << 24},
        {INT32_MAX, INT32_MAX, INT32_MAX, 1, 1, INT32_MAX, INT32_MAX},
    };
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        bytes b = {NULL, 0, 0};
        for (int k = 0; k < 7; k++) {
            bytes_put_int(&b, (uint32_t)headers[i][k], 4);
        }
        put_floats(&b, 1000, 0);
        bytes_write_file(path, b.data, b.n);
        bytes_free(&b);
        check_refused(path, HEPTA_ERROR_FORMAT, "no known kind of model");
    }
}

TEST(import_llama2c_trained_models) {
    static const struct {
        const char *relative;
        uint32_t dim, hidden, vocab, context;
    } models[] = {{"models/stories260K.bin", 64, 172, 512, 512},
                  {"models/babyllama-tok361/model5000.bin", 128, 352, 361, 256}};
    for (size_t i = 0; i < 2; i++) {
        const char *path = test_need_data(models[i].relative);
        hepta_error err;
        container *c;
        CHECK_OK(container_open(path, NULL, &c, &err));
        CHECK_EQ_INT(c->n_tensors, 2 + 9 * 5);
        check_u32(c, "llama.context_length", models[i].context);
        check_u32(c, "llama.attention.head_count_kv", 4);
        uint64_t dim = models[i].dim;
        check_tensor(c, "token_embd.weight", TENSOR_F32, 2, dim, models[i].vocab);
        check_tensor(c, "blk.4.ffn_down.weight", TENSOR_F32, 2, models[i].hidden, dim);
        const tensor *k = check_tensor(c, "blk.3.attn_k.weight", TENSOR_F32, 2, dim, dim / 2);
        const tensor *norm = check_tensor(c, "output_norm.weight", TENSOR_F32, 1, dim, 1);
        CHECK(fabsf(first_of(k)) < 10 && first_of(norm) > 0 && first_of(norm) < 100);
        CHECK_OK(container_verify(c, NULL, NULL, &err));
        container_close(c);
        check_failing_memory(path);
    }
}

/* ---- Hugging Face ------------------------------------------------------ */

/* A tiny model: width 8, 2 layers, 4 heads of 2 on 2 key/value heads, 12 tokens. */
static const char tiny_config[] = "\"architectures\": [\"LlamaForCausalLM\"], "
                                  "\"model_type\": \"llama\", \"hidden_size\": 8, "
                                  "\"intermediate_size\": 16, \"num_hidden_layers\": 2, "
                                  "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, "
                                  "\"vocab_size\": 12, \"max_position_embeddings\": 64, "
                                  "\"rms_norm_eps\": 1e-05, \"bos_token_id\": 1, "
                                  "\"eos_token_id\": [2, 7]";

static void write_config(const char *directory, const char *more) {
    bytes b = {NULL, 0, 0};
    bytes_put_text(&b, "{");
    bytes_put_text(&b, tiny_config);
    bytes_put_text(&b, more);
    bytes_put_text(&b, "}");
    bytes_write_file(bytes_path(directory, "config.json"), b.data, b.n);
    bytes_free(&b);
}

typedef struct hf_tensor {
    char name[80];
    int rows, cols; /* rows 0: a vector */
} hf_tensor;

enum { N_TINY = 3 + 2 * 9 };

static void tiny_tensors(hf_tensor t[N_TINY]) {
    static const hf_tensor layer[9] = {
        {"input_layernorm", 0, 8},  {"mlp.down_proj", 8, 16},   {"mlp.gate_proj", 16, 8},
        {"mlp.up_proj", 16, 8},     {"self_attn.k_proj", 4, 8}, {"self_attn.o_proj", 8, 8},
        {"self_attn.q_proj", 8, 8}, {"self_attn.v_proj", 4, 8}, {"post_attention_layernorm", 0, 8},
    };
    t[0] = (hf_tensor){"lm_head.weight", 12, 8};
    t[1] = (hf_tensor){"model.embed_tokens.weight", 12, 8};
    t[2] = (hf_tensor){"model.norm.weight", 0, 8};
    for (int i = 0; i < 2 * 9; i++) {
        t[3 + i] = layer[i % 9];
        snprintf(t[3 + i].name, sizeof t[0].name, "model.layers.%d.%s.weight", i / 9,
                 layer[i % 9].name);
    }
}

/* What to do differently when writing a file. */
typedef struct twist {
    const char *name;  /* of the tensor concerned */
    const char *dtype; /* NULL: `type` */
    const char *shape; /* NULL: the right one */
    long begin, end;   /* added to its offsets */
    bool omit;
    const char *extra; /* another entry, as JSON, for no data */
    size_t pad;        /* spaces after the header */
} twist;

static const twist straight = {.name = ""};

/* Tensors [first, last) in one file; every item of tensor k is 1 + k/8. */
static void write_safetensors(const char *path, const hf_tensor *t, int first, int last,
                              uint32_t type, const twist *w) {
    bytes header = {NULL, 0, 0}, data = {NULL, 0, 0};
    const char *dtype = type == TENSOR_F32 ? "F32" : type == TENSOR_F16 ? "F16" : "BF16";
    bytes_put_text(&header, "{\"__metadata__\": {\"format\": \"pt\"}");
    for (int k = first; k < last; k++) {
        bool twisted = strcmp(w->name, t[k].name) == 0;
        if (twisted && w->omit) {
            continue;
        }
        size_t begin = data.n;
        for (int i = 0; i < (t[k].rows == 0 ? 1 : t[k].rows) * t[k].cols; i++) {
            float f = 1 + (float)k / 8;
            if (type == TENSOR_F32) {
                bytes_put(&data, &f, 4);
            } else {
                bytes_put_int(&data, type == TENSOR_F16 ? half_from_float(f) : bfloat_from_float(f),
                              2);
            }
        }
        char entry[2560], shape[32];
        if (t[k].rows == 0) {
            snprintf(shape, sizeof shape, "[%d]", t[k].cols);
        } else {
            snprintf(shape, sizeof shape, "[%d, %d]", t[k].rows, t[k].cols);
        }
        snprintf(entry, sizeof entry,
                 ", \"%s\": {\"dtype\": \"%s\", \"shape\": %s, \"data_offsets\": [%ld, %ld]}",
                 t[k].name, twisted && w->dtype != NULL ? w->dtype : dtype,
                 twisted && w->shape != NULL ? w->shape : shape,
                 (long)begin + (twisted ? w->begin : 0), (long)data.n + (twisted ? w->end : 0));
        bytes_put_text(&header, entry);
    }
    bytes_put_text(&header, w->extra != NULL ? w->extra : "");
    bytes_put_text(&header, "}");
    for (size_t i = 0; i < w->pad; i++) {
        bytes_put_text(&header, " ");
    }
    bytes b = {NULL, 0, 0};
    bytes_put_int(&b, header.n, 8);
    bytes_put(&b, header.data, header.n);
    bytes_put(&b, data.data, data.n);
    bytes_write_file(path, b.data, b.n);
    bytes_free(&b);
    bytes_free(&header);
    bytes_free(&data);
}

/* A whole directory with one weight file. */
static void write_tiny(const char *directory, const char *more_config, uint32_t type,
                       const twist *w) {
    hf_tensor t[N_TINY];
    tiny_tensors(t);
    write_config(directory, more_config);
    write_safetensors(bytes_path(directory, "model.safetensors"), t, 0, N_TINY, type, w);
}

static float item_of(const tensor *t, uint64_t i) {
    if (t->type == TENSOR_F32) {
        float f;
        memcpy(&f, t->data + 4 * i, 4);
        return f;
    }
    uint16_t h = load_u16(t->data + 2 * i);
    return t->type == TENSOR_F16 ? half_to_float(h) : bfloat_to_float(h);
}

static void check_tiny(const char *directory, uint32_t type, bool tied) {
    static const struct {
        const char *gguf;
        int k; /* in tiny_tensors, of layer 0 */
        uint64_t rows, cols;
    } layer[] = {
        {"attn_norm", 3, 0, 8}, {"ffn_down", 4, 8, 16}, {"ffn_gate", 5, 16, 8},
        {"ffn_up", 6, 16, 8},   {"attn_k", 7, 4, 8},    {"attn_output", 8, 8, 8},
        {"attn_q", 9, 8, 8},    {"attn_v", 10, 4, 8},   {"ffn_norm", 11, 0, 8},
    };
    hepta_error err;
    container *c;
    CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
    CHECK_EQ_INT(c->kind, CONTAINER_HF);
    CHECK_EQ_INT(c->n_tensors, tied ? N_TINY - 1 : N_TINY);
    const tensor *t = check_tensor(c, "token_embd.weight", type, 2, 8, 12);
    CHECK(item_of(t, 95) == 1.125f);
    t = check_tensor(c, "output_norm.weight", type, 1, 8, 1);
    CHECK(item_of(t, 7) == 1.25f);
    CHECK((container_tensor(c, "output.weight") == NULL) == tied);
    for (int i = 0; i < 2 * 9; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%d.%s.weight", i / 9, layer[i % 9].gguf);
        uint64_t rows = layer[i % 9].rows;
        t = check_tensor(c, name, type, rows == 0 ? 1 : 2, layer[i % 9].cols, rows == 0 ? 1 : rows);
        CHECK(item_of(t, 0) == 1 + (float)(layer[i % 9].k + i / 9 * 9) / 8);
        CHECK(strstr(t->file, ".safetensors") != NULL);
    }
    check_u32(c, "llama.embedding_length", 8);
    check_u32(c, "llama.feed_forward_length", 16);
    check_u32(c, "llama.block_count", 2);
    check_u32(c, "llama.attention.head_count", 4);
    check_u32(c, "llama.attention.head_count_kv", 2);
    check_u32(c, "llama.context_length", 64);
    check_u32(c, "llama.vocab_size", 12);
    check_u32(c, "llama.rope.dimension_count", 2);
    check_u32(c, "general.file_type", type == TENSOR_F32 ? 0 : type == TENSOR_F16 ? 1 : 32);
    check_u32(c, "tokenizer.ggml.bos_token_id", 1);
    check_u32(c, "tokenizer.ggml.eos_token_id", 2);
    check_f32(c, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    check_f32(c, "llama.rope.freq_base", 10000);
    CHECK(!container_get_bool_or(c, "hepta.rope.interleaved", true));
    CHECK(container_find(c, "llama.attention.key_length") == NULL);
    CHECK_OK(container_verify(c, NULL, NULL, &err));
    container_close(c);
}

TEST(import_hf_types) {
    static const uint32_t types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16};
    const char *directory = test_tmp_dir();
    for (size_t i = 0; i < 3; i++) {
        write_tiny(directory, "", types[i], &straight);
        check_tiny(directory, types[i], false);
        for (size_t pad = 1; pad < 8; pad++) { /* data at every alignment */
            write_tiny(directory, "", types[i], &(twist){.name = "", .pad = pad});
            check_tiny(directory, types[i], false);
        }
    }
    write_tiny(directory, ", \"tie_word_embeddings\": true", TENSOR_BF16, &straight);
    check_tiny(directory, TENSOR_BF16, true); /* the file's own classifier is not used */
    write_tiny(directory, ", \"tie_word_embeddings\": true", TENSOR_BF16,
               &(twist){.name = "lm_head.weight", .omit = true});
    check_tiny(directory, TENSOR_BF16, true);
    check_failing_memory(directory);
}

TEST(import_hf_settings) {
    const char *directory = test_tmp_dir();
    hepta_error err;
    container *c;
    write_tiny(directory, ", \"_name_or_path\": \"someone/tiny-model\", \"rope_theta\": 500000.0",
               0, &straight);
    CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
    CHECK_EQ_STR(container_get_string(c, "general.name"), "tiny-model");
    check_f32(c, "llama.rope.freq_base", 500000);
    CHECK(container_tensor(c, "rope_freqs.weight") == NULL);
    container_close(c);
    write_tiny(directory,
               ", \"rope_parameters\": {\"rope_theta\": 123456, \"rope_type\": \"default\"}", 0,
               &straight);
    CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
    check_f32(c, "llama.rope.freq_base", 123456);
    container_close(c);
    /* Settings without weights are enough for a tokenizer. */
    CHECK(unlink(bytes_path(directory, "model.safetensors")) == 0);
    check_refused(directory, HEPTA_ERROR_IO, "neither model.safetensors nor");
    const container_options metadata = {.metadata_only = true, .no_tokenizer = true};
    CHECK_OK(container_open(directory, &metadata, &c, &err));
    CHECK_EQ_INT(c->n_tensors, 0);
    container_close(c);
    bytes_write_file(bytes_path(directory, "pytorch_model.bin"), "PK", 2);
    check_refused(directory, HEPTA_ERROR_IO, "only pytorch_model.bin");
}

/* The divisors of Llama 3.1 by the formula of its reference, in libm's arithmetic. */
TEST(import_hf_rope_scaling) {
    static const struct {
        int head_dim;
        double theta, factor, low, high, n_ctx;
    } cases[] = {{128, 500000, 8, 1, 4, 8192},
                 {64, 500000, 32, 1, 4, 8192},
                 {80, 10000, 4, 1, 2, 2048},
                 {6, 1e6, 8, 1, 4, 8192}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *directory = test_tmp_dir();
        char config[1024];
        int d = cases[i].head_dim, n_one = 0, n_factor = 0;
        for (int form = 0; form < 2; form++) {
            snprintf(config, sizeof config,
                     ", \"head_dim\": %d, \"rope_theta\": %g, \"%s\": {\"%s\": \"llama3\", "
                     "\"factor\": %g, \"low_freq_factor\": %g, \"high_freq_factor\": %g, "
                     "\"original_max_position_embeddings\": %g}",
                     d, cases[i].theta, form == 0 ? "rope_scaling" : "rope_parameters",
                     form == 0 ? "type" : "rope_type", cases[i].factor, cases[i].low, cases[i].high,
                     cases[i].n_ctx);
            hf_tensor t[N_TINY];
            tiny_tensors(t);
            for (int k = 3; k < N_TINY; k++) { /* heads of another size */
                bool q = strstr(t[k].name, "q_proj") != NULL,
                     o = strstr(t[k].name, "o_proj") != NULL;
                bool k_or_v =
                    strstr(t[k].name, "k_proj") != NULL || strstr(t[k].name, "v_proj") != NULL;
                t[k].rows = q ? 4 * d : k_or_v ? 2 * d : t[k].rows;
                t[k].cols = o ? 4 * d : t[k].cols;
            }
            write_config(directory, config);
            write_safetensors(bytes_path(directory, "model.safetensors"), t, 0, N_TINY, TENSOR_F32,
                              &straight);
            hepta_error err;
            container *c;
            CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
            check_u32(c, "llama.attention.key_length", (uint32_t)d);
            check_u32(c, "llama.attention.value_length", (uint32_t)d);
            check_u32(c, "llama.rope.dimension_count", (uint32_t)d);
            const tensor *f =
                check_tensor(c, "rope_freqs.weight", TENSOR_F32, 1, (uint64_t)d / 2, 1);
            for (int k = 0; k < d / 2; k++) {
                double length = 2 * acos(-1) * pow(cases[i].theta, 2.0 * k / d), expected;
                double low = cases[i].low, high = cases[i].high;
                double s = (cases[i].n_ctx / length - low) / (high - low);
                expected = s > 1   ? 1
                           : s < 0 ? cases[i].factor
                                   : 1 / ((1 - s) / cases[i].factor + s);
                CHECK(fabs((double)item_of(f, (uint64_t)k) / expected - 1) < 1e-7);
                n_one += expected == 1;
                n_factor += expected == cases[i].factor;
            }
            CHECK(n_one > 0 && n_factor > 0);
            CHECK_OK(container_verify(c, NULL, NULL, &err));
            container_close(c);
        }
    }
    const char *directory = test_tmp_dir();
    hepta_error err;
    container *c;
    write_tiny(directory, ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.5}", 0,
               &straight);
    CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
    CHECK(item_of(check_tensor(c, "rope_freqs.weight", TENSOR_F32, 1, 1, 1), 0) == 2.5f);
    container_close(c);
}

TEST(import_hf_refuses_configs) {
    static const struct {
        const char *more; /* JSON that goes on after tiny_config */
        hepta_status status;
        const char *message;
    } cases[] = {
        {", \"attention_bias\": true", HEPTA_ERROR_UNSUPPORTED, "attention_bias is true"},
        {", \"mlp_bias\": true", HEPTA_ERROR_UNSUPPORTED, "mlp_bias is true"},
        {", \"mlp_bias\": 1", HEPTA_ERROR_FORMAT, "mlp_bias is 1; expected true or false"},
        {", \"hidden_act\": \"gelu\"", HEPTA_ERROR_UNSUPPORTED, "hidden_act is \"gelu\""},
        {", \"quantization_config\": {\"bits\": 4}", HEPTA_ERROR_UNSUPPORTED,
         "quant_method is \"missing\"; supported: gptq"},
        {", \"partial_rotary_factor\": 0.5", HEPTA_ERROR_UNSUPPORTED, "partial_rotary_factor 0.5"},
        {", \"rope_theta\": -1", HEPTA_ERROR_FORMAT, "rope_theta"},
        {", \"rope_theta\": 0.5", HEPTA_ERROR_UNSUPPORTED, "rope_theta 0.5"},
        {", \"rope_theta\": 1e300", HEPTA_ERROR_FORMAT, "rope_theta"},
        {", \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}", HEPTA_ERROR_UNSUPPORTED,
         "RoPE scaling of type \"yarn\"; supported are"},
        {", \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 4}", HEPTA_ERROR_FORMAT,
         "low_freq_factor is missing"},
        {", \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 4, \"low_freq_factor\": 4, "
         "\"high_freq_factor\": 4}",
         HEPTA_ERROR_FORMAT, "is not above"},
        {", \"rope_scaling\": \"yarn\"", HEPTA_ERROR_FORMAT, "is no object"},
        {", \"head_dim\": 3", HEPTA_ERROR_FORMAT, "even head size"},
        {", \"head_dim\": 0", HEPTA_ERROR_FORMAT, "head_dim is 0"},
        {", \"head_dim\": 99999999999", HEPTA_ERROR_FORMAT, "head_dim is 99999999999"},
        {", \"vocab_size\": 12", HEPTA_ERROR_FORMAT, "no JSON object"}, /* twice */
        {", \"x\"", HEPTA_ERROR_FORMAT, "no JSON object"},
    };
    const char *directory = test_tmp_dir();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_tiny(directory, cases[i].more, TENSOR_F32, &straight);
        check_refused(directory, cases[i].status, cases[i].message);
    }
    static const struct {
        const char *config;
        hepta_status status;
        const char *message;
    } whole[] = {
        {"", HEPTA_ERROR_FORMAT, "the file is empty"},
        {"[]", HEPTA_ERROR_FORMAT, "it is another value"},
        {"{}", HEPTA_ERROR_UNSUPPORTED, "model_type is missing; expected \"llama\""},
        {"{\"model_type\": \"qwen2\"}", HEPTA_ERROR_UNSUPPORTED,
         "model_type is \"qwen2\"; expected"},
        {"{\"model_type\": 7}", HEPTA_ERROR_UNSUPPORTED, "model_type is 7"},
        {"{\"model_type\": \"llama\", \"architectures\": [\"LlamaModel\"]}",
         HEPTA_ERROR_UNSUPPORTED, "architectures is [\"LlamaModel\"]"},
        {"{\"model_type\": \"llama\"}", HEPTA_ERROR_FORMAT, "hidden_size is missing"},
        {"{\"model_type\": \"llama\", \"hidden_size\": 1e3}", HEPTA_ERROR_FORMAT,
         "hidden_size is 1000"},
        {"{\"model_type\": \"llama\", \"hidden_size\": 123456789012345678901234567890}",
         HEPTA_ERROR_FORMAT, "no JSON object"},
    };
    for (size_t i = 0; i < sizeof whole / sizeof whole[0]; i++) {
        bytes_write_file(bytes_path(directory, "config.json"), whole[i].config,
                         strlen(whole[i].config));
        check_refused(directory, whole[i].status, whole[i].message);
    }
    bytes deep = {NULL, 0, 0};
    for (int i = 0; i < 100000; i++) {
        bytes_put_text(&deep, "{\"a\":");
    }
    bytes_write_file(bytes_path(directory, "config.json"), deep.data, deep.n);
    bytes_free(&deep);
    check_refused(directory, HEPTA_ERROR_FORMAT, "no JSON object");
}

TEST(import_hf_mistral) {
    static const struct {
        const char *more;
        const char *message; /* NULL: accepted */
    } cases[] = {
        {", \"sliding_window\": null", NULL},
        {", \"sliding_window\": 64", NULL}, /* as long as the context */
        {"", NULL},                         /* 4096 by default */
        {", \"sliding_window\": 63", "sliding_window is 63"},
    };
    const char *directory = test_tmp_dir();
    hepta_error err;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_tiny(directory, cases[i].more, TENSOR_BF16, &straight);
        bytes b = bytes_read_file(bytes_path(directory, "config.json")), m = {NULL, 0, 0};
        bytes_put_int(&b, 0, 1);
        const char *text = (const char *)b.data, *at = strstr(text, "Llama");
        bytes_put(&m, text, (size_t)(at - text));
        bytes_put_text(&m, "Mistral");
        at += 5;
        const char *type = strstr(at, "\"llama\"");
        bytes_put(&m, at, (size_t)(type - at));
        bytes_put_text(&m, "\"mistral\"");
        bytes_put_text(&m, type + 7);
        bytes_write_file(bytes_path(directory, "config.json"), m.data, m.n);
        bytes_free(&b);
        bytes_free(&m);
        if (cases[i].message == NULL) {
            container *c;
            CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
            CHECK_EQ_STR(container_get_string(c, "general.architecture"), "llama");
            container_close(c);
        } else {
            check_refused(directory, HEPTA_ERROR_UNSUPPORTED, cases[i].message);
        }
    }
}

TEST(import_hf_refuses_tensors) {
    static const char q[] = "model.layers.1.self_attn.q_proj.weight";
    static const struct {
        twist w;
        hepta_status status;
        const char *message;
    } cases[] = {
        {{.name = q, .omit = true}, HEPTA_ERROR_FORMAT, "q_proj.weight is missing"},
        {{.name = q, .dtype = "I32"}, HEPTA_ERROR_UNSUPPORTED, "q_proj.weight is of type I32"},
        {{.name = q, .dtype = "F8_E4M3"}, HEPTA_ERROR_UNSUPPORTED, "is of type F8_E4M3; supported"},
        {{.name = q, .dtype = "F64"}, HEPTA_ERROR_FORMAT, "takes 256 bytes; expected 8 each"},
        {{.name = q, .dtype = "a type with a long name"}, HEPTA_ERROR_FORMAT, "\"dtype\""},
        {{.name = q, .shape = "[4, 16]"},
         HEPTA_ERROR_FORMAT,
         "[4, 16]; config.json asks for [8, 8]"},
        {{.name = q, .shape = "[64]"}, HEPTA_ERROR_FORMAT, "1 dimensions"},
        {{.name = q, .shape = "[8, 8, 1]"}, HEPTA_ERROR_FORMAT, "3 dimensions"},
        {{.name = q, .shape = "[1, 1, 1, 1, 8, 8]"}, HEPTA_ERROR_FORMAT, "6 dimensions"},
        {{.name = q, .shape = "[8, 9]"}, HEPTA_ERROR_FORMAT, "72 items of type F32"},
        {{.name = q, .shape = "[-8, -8]"}, HEPTA_ERROR_FORMAT, "\"shape\""},
        {{.name = q, .shape = "[8.0, 8]"}, HEPTA_ERROR_FORMAT, "\"shape\""},
        {{.name = q, .shape = "8"}, HEPTA_ERROR_FORMAT, "\"shape\""},
        {{.name = q, .shape = "[4294967296, 4294967296]"}, HEPTA_ERROR_FORMAT, "\"shape\""},
        {{.name = q, .begin = 4, .end = 4}, HEPTA_ERROR_FORMAT, "gap"},
        {{.name = q, .begin = -4, .end = -4}, HEPTA_ERROR_FORMAT, "overlap"},
        {{.name = q, .begin = -100000, .end = -100000}, HEPTA_ERROR_FORMAT, "\"data_offsets\""},
        {{.name = q, .begin = 1000000, .end = 1000000}, HEPTA_ERROR_FORMAT, "of the data section"},
        {{.name = q, .begin = 300}, HEPTA_ERROR_FORMAT, "of the data section"},
        {{.name = q, .end = 4}, HEPTA_ERROR_FORMAT, "expected 4 each"},
        {{.name = "",
          .extra = ", \"model.layers.0.self_attn.q_proj.bias\": {\"dtype\": \"F32\", "
                   "\"shape\": [0], \"data_offsets\": [0, 0]}"},
         HEPTA_ERROR_UNSUPPORTED,
         "q_proj.bias has no place"},
        {{.name = "", .extra = ", \"lm_head.weight\": {}"}, HEPTA_ERROR_FORMAT, "duplicate"},
        {{.name = "", .extra = ", \"x\": 1"}, HEPTA_ERROR_FORMAT, "tensor x: expected an object"},
        {{.name = "", .extra = ", \"x\": {\"dtype\": \"F32\", \"shape\": []}"},
         HEPTA_ERROR_FORMAT,
         "\"data_offsets\""},
    };
    const char *directory = test_tmp_dir();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_tiny(directory, "", TENSOR_F32, &cases[i].w);
        check_refused(directory, cases[i].status, cases[i].message);
    }
    write_tiny(directory, "", TENSOR_F32,
               &(twist){.name = "",
                        .extra = ", \"model.layers.0.self_attn.rotary_emb.inv_freq\": "
                                 "{\"dtype\": \"F32\", \"shape\": [0], "
                                 "\"data_offsets\": [0, 0]}"});
    check_tiny(directory, TENSOR_F32, false);
}

TEST(import_hf_damaged_headers) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "model.safetensors");
    write_tiny(directory, "", TENSOR_F16, &straight);
    bytes good = bytes_read_file(path);
    char file[1024];
    snprintf(file, sizeof file, "%s", path);
    static const uint64_t lengths[] = {
        0, 1, 100000001, (uint64_t)1 << 40, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7};
    hepta_error err;
    container *c = NULL;
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        bytes b = {NULL, 0, 0};
        bytes_put_int(&b, lengths[i], 8);
        bytes_put(&b, good.data + 8, good.n - 8);
        bytes_write_file(file, b.data, b.n);
        bytes_free(&b);
        check_refused(directory, HEPTA_ERROR_FORMAT, "model.safetensors");
    }
    bytes_put_int(&good, 0, 1);
    bytes_write_file(file, good.data, good.n);
    check_refused(directory, HEPTA_ERROR_FORMAT, "something was appended");
    for (size_t n = good.n - 1; n-- > 0;) {
        CHECK(truncate(file, (off_t)n) == 0);
        CHECK_EQ_INT(container_open(directory, &no_tokenizer, &c, &err), HEPTA_ERROR_FORMAT);
    }
    int opened = 0;
    for (int round = 0; round < 1000; round++) {
        bytes b = {NULL, 0, 0};
        bytes_put(&b, good.data, good.n - 1);
        for (uint32_t i = test_random_below(3) + 1; i > 0; i--) {
            b.data[8 + test_random_below((uint32_t)load_u64(b.data))] =
                (uint8_t) " 0123456789{}[]:,\"abF"[test_random_below(21)];
        }
        bytes_write_file(file, b.data, b.n);
        bytes_free(&b);
        if (container_open(directory, &no_tokenizer, &c, &err) == HEPTA_OK) {
            opened++;
            CHECK_OK(container_verify(c, NULL, NULL, &err));
            container_close(c);
        }
    }
    test_note("%d of 1000 files with damaged headers still open", opened);
    bytes_free(&good);
}

/* ---- Hugging Face, several files --------------------------------------- */

static void write_index(const char *directory, const hf_tensor *t, int split, const char *second) {
    bytes b = {NULL, 0, 0};
    bytes_put_text(&b, "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {");
    for (int k = 0; k < N_TINY; k++) {
        char line[512];
        snprintf(line, sizeof line, "%s\"%s\": \"%s\"", k == 0 ? "" : ", ", t[k].name,
                 k < split ? "model-00001-of-00002.safetensors" : second);
        bytes_put_text(&b, line);
    }
    bytes_put_text(&b, "}}");
    bytes_write_file(bytes_path(directory, "model.safetensors.index.json"), b.data, b.n);
    bytes_free(&b);
}

TEST(import_hf_several_files) {
    static const char first[] = "model-00001-of-00002.safetensors";
    static const char second[] = "model-00002-of-00002.safetensors";
    const char *directory = test_tmp_dir();
    hf_tensor t[N_TINY];
    tiny_tensors(t);
    write_config(directory, "");
    write_index(directory, t, 9, second);
    write_safetensors(bytes_path(directory, first), t, 0, 9, TENSOR_BF16, &straight);
    check_refused(directory, HEPTA_ERROR_IO, "file model-00002-of-00002.safetensors, which holds");
    write_safetensors(bytes_path(directory, second), t, 9, N_TINY, TENSOR_BF16, &straight);
    check_tiny(directory, TENSOR_BF16, false);
    check_failing_memory(directory);
    /* Tensors that the index puts elsewhere do not count; the index decides. */
    write_safetensors(bytes_path(directory, second), t, 0, N_TINY, TENSOR_BF16, &straight);
    check_tiny(directory, TENSOR_BF16, false);
    write_index(directory, t, 10, second);
    check_refused(directory, HEPTA_ERROR_FORMAT, "q_proj.weight is missing");
    write_index(directory, t, 9, "../elsewhere.safetensors");
    check_refused(directory, HEPTA_ERROR_FORMAT, "no plain file name");
    static const char *const indices[] = {"",
                                          "{}",
                                          "{\"weight_map\": []}",
                                          "{\"weight_map\": {}}",
                                          "{\"weight_map\": {\"lm_head.weight\": 1}}",
                                          "{\"weight_map\": {\"lm_head.weight\": \"\"}}"};
    for (size_t i = 0; i < sizeof indices / sizeof indices[0]; i++) {
        bytes_write_file(bytes_path(directory, "model.safetensors.index.json"), indices[i],
                         strlen(indices[i]));
        check_refused(directory, HEPTA_ERROR_FORMAT, "");
    }
    /* As in transformers, one whole file goes before the index. */
    write_safetensors(bytes_path(directory, "model.safetensors"), t, 0, N_TINY, TENSOR_F32,
                      &straight);
    check_tiny(directory, TENSOR_F32, false);
}

static uint64_t tokens_of(const char *path, const container_options *options) {
    hepta_error err;
    container *c;
    CHECK_OK(container_open(path, options, &c, &err));
    const kv *tokens = container_find(c, "tokenizer.ggml.tokens");
    uint64_t n = tokens != NULL ? tokens->n_items : 0;
    container_close(c);
    return n;
}

/* A copy of a data file in the directory. */
static void place_file(const char *directory, const char *name, const char *relative) {
    bytes b = bytes_read_file(test_need_data(relative));
    bytes_write_file(bytes_path(directory, name), b.data, b.n);
    bytes_free(&b);
}

TEST(import_hf_finds_the_tokenizer) {
    const char *directory = test_tmp_dir();
    char bin[1024], model[1024];
    snprintf(bin, sizeof bin, "%s/m.bin", directory);
    snprintf(model, sizeof model, "%s/tokenizer.model", directory);
    const container_options named = {.tokenizer_path = model};
    const container_options skipped = {.tokenizer_path = model, .no_tokenizer = true};
    write_tiny(directory, "", TENSOR_F32, &straight);
    CHECK_EQ_INT(tokens_of(directory, NULL), 0); /* none is no error */
    place_file(directory, "vocab.json", "tokenizers/qwen2.5/vocab.json");
    place_file(directory, "merges.txt", "tokenizers/qwen2.5/merges.txt");
    place_file(directory, "tokenizer_config.json", "tokenizers/qwen2.5/tokenizer_config.json");
    CHECK(tokens_of(directory, NULL) > 150000);
    CHECK(unlink(bytes_path(directory, "tokenizer_config.json")) == 0);
    place_file(directory, "tokenizer.model", "tokenizers/llama2_tokenizer.model");
    CHECK_EQ_INT(tokens_of(directory, NULL), 32000);
    CHECK_EQ_INT(tokens_of(directory, &named), 32000);
    CHECK_EQ_INT(tokens_of(directory, &no_tokenizer), 0);
    CHECK_EQ_INT(tokens_of(directory, &skipped), 0);
    bytes b = legacy_file(true);
    bytes_write_file(bin, b.data, b.n);
    bytes_free(&b);
    CHECK_EQ_INT(tokens_of(bin, NULL), 0);
    CHECK_EQ_INT(tokens_of(bin, &named), 32000);
}

/* A model written by transformers itself, and Llama 3 scaling as it computes it. */
TEST(import_hf_written_by_transformers) {
    const char *python = getenv("HEPTA_PYTHON");
    if (python == NULL) {
        SKIP("HEPTA_PYTHON is not set to a Python with transformers");
    }
    const char *directory = test_tmp_dir();
    char command[4096];
    snprintf(command, sizeof command,
             "'%s' -c '\n"
             "import sys, torch, transformers as t\n"
             "torch.manual_seed(1)\n"
             "c = t.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,\n"
             "    num_attention_heads=2, num_key_value_heads=1, vocab_size=40,\n"
             "    max_position_embeddings=16384, rope_theta=500000.0, rope_scaling=dict(\n"
             "        rope_type=\"llama3\", factor=8.0, low_freq_factor=1.0,\n"
             "        high_freq_factor=4.0, original_max_position_embeddings=8192))\n"
             "m = t.LlamaForCausalLM(c)\n"
             "r = m.model.rotary_emb.inv_freq.clone()\n"
             "m.to(torch.bfloat16).save_pretrained(sys.argv[1])\n"
             "p = 500000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)\n"
             "w = m.model.layers[0].mlp.down_proj.weight.float()\n"
             "open(sys.argv[1] + \"/expected\", \"wb\").write(\n"
             "    (p / r).float().numpy().tobytes() + w[0].detach().numpy().tobytes())\n"
             "' '%s' 2>/dev/null",
             python, directory);
    if (system(command) != 0) {
        SKIP("%s has no transformers package", python);
    }
    hepta_error err;
    container *c;
    CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
    bytes expected = bytes_read_file(bytes_path(directory, "expected"));
    CHECK_EQ_INT(expected.n, (8 + 48) * 4);
    const tensor *f = check_tensor(c, "rope_freqs.weight", TENSOR_F32, 1, 8, 1);
    const tensor *w = check_tensor(c, "blk.0.ffn_down.weight", TENSOR_BF16, 2, 48, 32);
    for (uint64_t i = 0; i < 8 + 48; i++) {
        float e;
        memcpy(&e, expected.data + 4 * i, 4);
        if (i < 8) {
            CHECK(fabsf(item_of(f, i) / e - 1) < 2e-6f); /* theirs is binary32 throughout */
        } else {
            CHECK(item_of(w, i - 8) == e);
        }
    }
    check_f32(c, "llama.rope.freq_base", 500000);
    bytes_free(&expected);
    container_close(c);
}
