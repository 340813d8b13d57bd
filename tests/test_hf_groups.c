/*
 * test_hf_groups.c - GPTQ and AWQ models in Hugging Face directories: layouts written by hand,
 * damage, and schemes that are refused.
 *
 * Comparisons with the packages themselves: tests/compare_dequantize.py.
 */
#include "bytes.h"
#include "test.h"

#include "format/container.h"
#include "kernels/kernels.h"
#include "quantize/schemes.h"

#include <math.h>

static const container_options no_tokenizer = {.no_tokenizer = true};

/* Width 32, 2 heads, feed-forward 64, 8 tokens, one layer; groups of 32 columns. */
enum {
    WIDTH = 32,
    FF = 64,
    TOKENS = 8,
    GROUP = 32,
    N_LINEAR = 7,
    MAX_PARTS = 3 + 2 + N_LINEAR * 5
};

static const struct {
    const char *hf, *gguf;
    uint32_t rows, cols;
} linear[N_LINEAR] = {
    {"self_attn.q_proj", "attn_q", WIDTH, WIDTH}, {"self_attn.k_proj", "attn_k", WIDTH, WIDTH},
    {"self_attn.v_proj", "attn_v", WIDTH, WIDTH}, {"self_attn.o_proj", "attn_output", WIDTH, WIDTH},
    {"mlp.gate_proj", "ffn_gate", FF, WIDTH},     {"mlp.up_proj", "ffn_up", FF, WIDTH},
    {"mlp.down_proj", "ffn_down", WIDTH, FF},
};

typedef struct part {
    char name[96];
    const char *dtype;
    uint32_t shape[2]; /* second 0: a vector of the first */
    bytes data;
    bool omit;
} part;

typedef struct model {
    part parts[MAX_PARTS];
    int n;
    float weights[N_LINEAR][FF * FF]; /* what the parts stand for */
    const char *quantization;         /* JSON */
} model;

static uint32_t dtype_bytes(const char *dtype) {
    return strcmp(dtype, "I32") == 0 || strcmp(dtype, "F32") == 0 ? 4 : 2;
}

static part *add_part(model *m, const char *name, const char *suffix, const char *dtype,
                      uint32_t first, uint32_t second) {
    CHECK(m->n < MAX_PARTS);
    part *p = &m->parts[m->n++];
    snprintf(p->name, sizeof p->name, "%s%s", name, suffix);
    p->dtype = dtype;
    p->shape[0] = first;
    p->shape[1] = second;
    for (uint32_t i = 0; i < first * (second > 0 ? second : 1) * dtype_bytes(dtype); i++) {
        bytes_put_int(&p->data, 0, 1);
    }
    return p;
}

static void fill_halves(part *p) {
    for (size_t i = 0; i < p->data.n; i += 2) {
        uint16_t h = half_from_float(0.125f + 0.05f * test_random_float());
        memcpy(p->data.data + i, &h, 2);
    }
}

/* Puts `bits` bits at bit `at` of a string of bits. */
static void put_bits(uint8_t *data, uint64_t at, uint32_t bits, uint32_t value) {
    for (uint32_t i = 0; i < bits; i++) {
        data[(at + i) / 8] |= (uint8_t)((value >> i & 1) << (at + i) % 8);
    }
}

/* Bit `at` of the string that words down column `column` of a table of `width` words make up. */
static void put_down(uint8_t *table, uint32_t width, uint32_t column, uint64_t at, uint32_t bits,
                     uint32_t value) {
    for (uint32_t i = 0; i < bits; i++) {
        uint64_t word = (at + i) / 32 * width + column;
        put_bits(table, word * 32 + (at + i) % 32, 1, value >> i & 1);
    }
}

/* A random matrix, its parts and its weights; act_order: columns belong to groups at random. */
static void add_linear(model *m, int k, bool awq, uint32_t bits, bool v2, bool act_order) {
    static const uint32_t order[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* AWQ: rows in a word */
    const uint32_t rows = linear[k].rows, cols = linear[k].cols, n_groups = cols / GROUP;
    const uint32_t row_words = rows * bits / 32;
    char base[64];
    snprintf(base, sizeof base, "model.layers.0.%s", linear[k].hf);
    part *weights =
        add_part(m, base, ".qweight", "I32", awq ? cols : cols * bits / 32, awq ? row_words : rows);
    part *zeros = add_part(m, base, ".qzeros", "I32", n_groups, row_words);
    part *scales = add_part(m, base, ".scales", "F16", n_groups, rows);
    part *index = awq ? NULL : add_part(m, base, ".g_idx", "I32", cols, 0);
    part *bias = add_part(m, base, ".bias", "F16", rows, 0); /* zeros */
    bias->omit = k % 2 == 0;
    uint32_t zero[2][FF], group_of[FF];
    fill_halves(scales);
    for (uint32_t g = 0; g < n_groups; g++) {
        for (uint32_t r = 0; r < rows; r++) {
            uint32_t place = awq ? 0 : r, low = awq || v2 ? 0 : 1;
            for (uint32_t i = 0; awq && i < 8; i++) {
                place = order[i] == r % 8 ? r / 8 * 8 + i : place;
            }
            zero[g][r] = low + test_random_below(1u << bits);
            put_bits(zeros->data.data + (size_t)g * row_words * 4, (uint64_t)place * bits, bits,
                     zero[g][r] - low);
        }
    }
    for (uint32_t c = 0; c < cols; c++) {
        group_of[c] = act_order ? test_random_below(n_groups) : c / GROUP;
        if (index != NULL) {
            memcpy(index->data.data + 4 * c, &group_of[c], 4);
        }
        for (uint32_t r = 0; r < rows; r++) {
            uint32_t q = test_random_below(1u << bits), g = group_of[c], place = 0;
            if (awq) {
                for (uint32_t i = 0; i < 8; i++) {
                    place = order[i] == r % 8 ? r / 8 * 8 + i : place;
                }
                put_bits(weights->data.data + (size_t)c * row_words * 4, (uint64_t)place * bits,
                         bits, q);
            } else {
                put_down(weights->data.data, rows, r, (uint64_t)c * bits, bits, q);
            }
            float scale = half_to_float(load_u16(scales->data.data + 2 * (g * rows + r)));
            m->weights[k][r * cols + c] = scale * (float)((int)q - (int)zero[g][r]);
        }
    }
}

static void make_model(model *m, bool awq, uint32_t bits, bool v2, bool act_order) {
    static char text[256];
    memset(m, 0, sizeof *m);
    fill_halves(add_part(m, "model.embed_tokens", ".weight", "F16", TOKENS, WIDTH));
    fill_halves(add_part(m, "lm_head", ".weight", "F16", TOKENS, WIDTH));
    fill_halves(add_part(m, "model.norm", ".weight", "F16", WIDTH, 0));
    fill_halves(add_part(m, "model.layers.0.input_layernorm", ".weight", "F16", WIDTH, 0));
    fill_halves(add_part(m, "model.layers.0.post_attention_layernorm", ".weight", "F16", WIDTH, 0));
    for (int k = 0; k < N_LINEAR; k++) {
        add_linear(m, k, awq, bits, v2, act_order);
    }
    snprintf(text, sizeof text,
             "{\"quant_method\": \"%s\", \"bits\": %u, \"group_size\": %d, \"desc_act\": %s, "
             "\"checkpoint_format\": \"%s\", \"version\": \"GEMM\", \"zero_point\": true}",
             awq ? "awq" : "gptq", bits, GROUP, act_order ? "true" : "false",
             v2 ? "gptq_v2" : "gptq");
    m->quantization = text;
}

static void free_model(model *m) {
    for (int i = 0; i < m->n; i++) {
        bytes_free(&m->parts[i].data);
    }
}

static part *find(model *m, const char *name) {
    for (int i = 0; i < m->n; i++) {
        if (strcmp(m->parts[i].name, name) == 0) {
            return &m->parts[i];
        }
    }
    test_fail(__FILE__, __LINE__, "no part %s", name);
}

static bytes config_of(const model *m) {
    bytes b = {NULL, 0, 0};
    bytes_put_text(&b, "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 64,"
                       " \"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"vocab_size\": 8,"
                       " \"max_position_embeddings\": 16");
    if (m->quantization != NULL) {
        bytes_put_text(&b, ", \"quantization_config\": ");
        bytes_put_text(&b, m->quantization);
    }
    bytes_put_text(&b, "}");
    return b;
}

static bytes weights_of(const model *m) {
    bytes header = {NULL, 0, 0}, data = {NULL, 0, 0}, b = {NULL, 0, 0};
    for (int i = 0; i < m->n; i++) {
        const part *p = &m->parts[i];
        char entry[256], shape[32];
        if (p->omit) {
            continue;
        }
        snprintf(shape, sizeof shape, p->shape[1] > 0 ? "[%u, %u]" : "[%u]", p->shape[0],
                 p->shape[1]);
        snprintf(entry, sizeof entry,
                 "%s\"%s\": {\"dtype\": \"%s\", \"shape\": %s, \"data_offsets\": [%zu, %zu]}",
                 header.n == 0 ? "{" : ", ", p->name, p->dtype, shape, data.n, data.n + p->data.n);
        bytes_put_text(&header, entry);
        bytes_put(&data, p->data.data, p->data.n);
    }
    bytes_put_text(&header, "}");
    bytes_put_int(&b, header.n, 8);
    bytes_put(&b, header.data, header.n);
    bytes_put(&b, data.data, data.n);
    bytes_free(&header);
    bytes_free(&data);
    return b;
}

static void write_model(const model *m, const char *directory) {
    bytes config = config_of(m), weights = weights_of(m);
    bytes_write_file(bytes_path(directory, "config.json"), config.data, config.n);
    bytes_write_file(bytes_path(directory, "model.safetensors"), weights.data, weights.n);
    bytes_free(&config);
    bytes_free(&weights);
}

static model *new_model(bool awq, uint32_t bits, bool v2, bool act_order) {
    model *m = malloc(sizeof *m);
    CHECK(m != NULL);
    make_model(m, awq, bits, v2, act_order);
    return m;
}

static void drop_model(model *m) {
    free_model(m);
    free(m);
}

TEST(hf_groups_values) {
    const char *directory = test_tmp_dir();
    for (int variant = 0; variant < 20; variant++) {
        const bool awq = variant >= 16, v2 = variant % 2 == 1, act_order = variant / 2 % 2 == 1;
        const uint32_t bits = awq ? 4 : (uint32_t[]){2, 3, 4, 8}[variant / 4];
        model *m = new_model(awq, bits, v2, act_order && !awq);
        if (!awq && !act_order) { /* optional then */
            find(m, "model.layers.0.mlp.down_proj.g_idx")->omit = true;
        }
        write_model(m, directory);
        hepta_error err;
        container *c;
        CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
        CHECK_OK(container_verify(c, NULL, NULL, &err));
        for (int k = 0; k < N_LINEAR; k++) {
            char name[64];
            float row[FF];
            snprintf(name, sizeof name, "blk.0.%s.weight", linear[k].gguf);
            const tensor *t = container_tensor(c, name);
            CHECK(t != NULL && t->type == (awq ? TENSOR_AWQ : TENSOR_GPTQ) && t->n_dims == 2);
            CHECK_EQ_INT(t->ne[0], linear[k].cols);
            CHECK_EQ_INT(t->ne[1], linear[k].rows);
            CHECK_EQ_INT(tensor_stored_bytes(t),
                         t->n_bytes + t->groups->n_groups * linear[k].rows * (2 * 8 + bits) / 8 +
                             (t->groups->index != NULL ? linear[k].cols * 4 : 0));
            for (uint32_t r = 0; r < linear[k].rows; r++) {
                kernels_tensor_row(&kernels_ref, t, r, row);
                CHECK_MEM_EQ(row, m->weights[k] + r * linear[k].cols,
                             linear[k].cols * sizeof(float));
            }
        }
        container_close(c);
        hepta_model *opened;
        CHECK_OK(hepta_model_open(directory, &opened, &err));
        hepta_model_close(opened);
        drop_model(m);
    }
}

static void check_refused(const model *m, const char *directory, hepta_status expected,
                          const char *message) {
    hepta_error err = {.message = ""};
    container *c = NULL;
    write_model(m, directory);
    hepta_status status = container_open(directory, &no_tokenizer, &c, &err);
    if (status != expected || strstr(err.message, message) == NULL) {
        test_fail(__FILE__, __LINE__, "expected status %d and \"%s\", found %d and \"%s\"",
                  (int)expected, message, (int)status, err.message);
    }
}

TEST(hf_groups_refuses_tensors) {
    static const struct {
        bool awq;
        const char *name, *dtype; /* of o_proj; dtype NULL: as it is */
        uint32_t shape[2];        /* 0: as it is */
        int byte;                 /* this byte becomes 7; -1: none; -2: the tensor is missing */
        hepta_status status;
        const char *message;
    } cases[] = {
        {false, "qweight", "U32", {0}, -1, HEPTA_ERROR_UNSUPPORTED, "qweight is of type U32; exp"},
        {false, "qweight", NULL, {8, 16}, -1, HEPTA_ERROR_FORMAT, "ask for [4, 32]"},
        {false, "qweight", NULL, {32, 4}, -1, HEPTA_ERROR_FORMAT, "[32, 4]; 32 x 32 weights of 4"},
        {false, "qweight", NULL, {0}, -2, HEPTA_ERROR_FORMAT, "o_proj.weight is missing"},
        {false, "qzeros", NULL, {0}, -2, HEPTA_ERROR_FORMAT, "o_proj.qzeros is missing beside"},
        {false, "qzeros", NULL, {4, 1}, -1, HEPTA_ERROR_FORMAT, "ask for [1, 4]"},
        {false, "scales", NULL, {0}, -2, HEPTA_ERROR_FORMAT, "o_proj.scales is missing"},
        {false, "scales", "I16", {0}, -1, HEPTA_ERROR_UNSUPPORTED, "scales is of type I16; supp"},
        {false, "scales", NULL, {2, 16}, -1, HEPTA_ERROR_FORMAT, "ask for [1, 32]"},
        {false, "g_idx", NULL, {0}, 8, HEPTA_ERROR_FORMAT, "g_idx: item 2 is 7; expected 0 to 0"},
        {false, "g_idx", NULL, {0}, 127, HEPTA_ERROR_FORMAT, "g_idx: item 31 is 117440512; exp"},
        {false, "g_idx", "F32", {0}, -1, HEPTA_ERROR_UNSUPPORTED, "g_idx is of type F32"},
        {false, "g_idx", NULL, {4, 8}, -1, HEPTA_ERROR_FORMAT, "g_idx has 2 dimensions"},
        {false, "bias", NULL, {0}, 3, HEPTA_ERROR_UNSUPPORTED, "o_proj.bias is not zero"},
        {true, "qweight", NULL, {4, 32}, -1, HEPTA_ERROR_FORMAT, "ask for [32, 4]"},
        {true, "qzeros", "F16", {0}, -2, HEPTA_ERROR_FORMAT, "o_proj.qzeros is missing"},
        {true, "scales", "BOOL", {0}, -2, HEPTA_ERROR_FORMAT, "o_proj.scales is missing"},
    };
    const char *directory = test_tmp_dir();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        model *m = new_model(cases[i].awq, 4, false, false);
        char name[96];
        snprintf(name, sizeof name, "model.layers.0.self_attn.o_proj.%s", cases[i].name);
        part *p = find(m, name);
        p->dtype = cases[i].dtype != NULL ? cases[i].dtype : p->dtype;
        if (cases[i].shape[0] > 0) {
            memcpy(p->shape, cases[i].shape, sizeof p->shape);
        }
        p->omit = cases[i].byte == -2;
        if (cases[i].byte >= 0) {
            p->data.data[cases[i].byte] = 7;
        }
        check_refused(m, directory, cases[i].status, cases[i].message);
        drop_model(m);
    }
}

TEST(hf_groups_refuses_schemes) {
    static const struct {
        const char *json; /* NULL: none */
        hepta_status status;
        const char *message;
    } cases[] = {
        {NULL, HEPTA_ERROR_FORMAT, "is quantized, but config.json has no quantization_config"},
        {"{}", HEPTA_ERROR_UNSUPPORTED, "quant_method is \"missing\""},
        {"[]", HEPTA_ERROR_UNSUPPORTED, "quant_method is \"missing\""},
        {"{\"quant_method\": 3}", HEPTA_ERROR_UNSUPPORTED, "quant_method is \"?\""},
        {"{\"quant_method\": \"bitsandbytes\", \"load_in_4bit\": true}", HEPTA_ERROR_UNSUPPORTED,
         "quant_method is \"bitsandbytes\"; supported: gptq (2, 3, 4 or 8 bits) and awq"},
        {"{\"load_in_8bit\": true}", HEPTA_ERROR_UNSUPPORTED, "\"bitsandbytes\""},
        {"{\"quant_method\": \"fp8\"}", HEPTA_ERROR_UNSUPPORTED, "\"fp8\""},
        {"{\"quant_method\": \"compressed-tensors\"}", HEPTA_ERROR_UNSUPPORTED,
         "\"compressed-tensors\"; supported: gptq"},
        {"{\"quant_method\": \"gptq\", \"group_size\": 32}", HEPTA_ERROR_UNSUPPORTED, "bits is 0"},
        {"{\"quant_method\": \"gptq\", \"bits\": 5, \"group_size\": 32}", HEPTA_ERROR_UNSUPPORTED,
         "bits is 5; supported: 2, 3, 4 and 8 (GPTQ)"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4}", HEPTA_ERROR_FORMAT, "group_size is 0; exp"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": -2}", HEPTA_ERROR_FORMAT,
         "group_size is -2"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 9999999999}",
         HEPTA_ERROR_FORMAT, "group_size is 9999999999"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 16}", HEPTA_ERROR_FORMAT,
         "32 x 32 weights of 4 bits in groups of 16 (config.json) ask for [2, 4]"},
        {"{\"quant_method\": \"gptq\", \"bits\": 8, \"group_size\": 32}", HEPTA_ERROR_FORMAT,
         "weights of 8 bits in groups of 32 (config.json) ask for [8, 32]"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 32, \"checkpoint_format\": "
         "\"marlin\"}",
         HEPTA_ERROR_UNSUPPORTED, "checkpoint_format is \"marlin\"; supported: gptq, gptq_v2"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 32, \"is_marlin_format\": "
         "true}",
         HEPTA_ERROR_UNSUPPORTED, "is_marlin_format"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 32, \"pack_dtype\": "
         "\"int16\"}",
         HEPTA_ERROR_UNSUPPORTED, "pack_dtype is \"int16\""},
        {"{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 32, \"dynamic\": {\"x\": {}}}",
         HEPTA_ERROR_UNSUPPORTED, "dynamic is"},
        {"{\"quant_method\": \"awq\", \"bits\": 4, \"group_size\": 32, \"version\": \"gemv\"}",
         HEPTA_ERROR_UNSUPPORTED, "version is \"gemv\"; supported: gemm"},
        {"{\"quant_method\": \"awq\", \"bits\": 8, \"group_size\": 32}", HEPTA_ERROR_UNSUPPORTED,
         "bits is 8; supported: 4 (AWQ)"},
        {"{\"quant_method\": \"awq\", \"bits\": 4, \"group_size\": 24}", HEPTA_ERROR_FORMAT,
         "columns in whole groups"},
    };
    const char *directory = test_tmp_dir();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        model *m = new_model(false, 4, false, false);
        m->quantization = cases[i].json;
        check_refused(m, directory, cases[i].status, cases[i].message);
        drop_model(m);
    }
}

TEST(hf_groups_verify) {
    const char *directory = test_tmp_dir();
    hepta_error err;
    container *c;
    model *m = new_model(false, 4, false, false);
    find(m, "model.layers.0.mlp.down_proj.scales")->data.data[2 * (WIDTH + 5) + 1] = 0x7c;
    write_model(m, directory);
    CHECK_OK(container_open(directory, &no_tokenizer, &c, &err));
    CHECK_EQ_INT(container_verify(c, NULL, NULL, &err), HEPTA_ERROR_FORMAT);
    CHECK(strstr(err.message, "the scale of row 5, group 1") != NULL);
    container_close(c);
    drop_model(m);
}

/* Random damage: every file opens, and all its rows can be read, or is refused with a message. */
TEST(hf_groups_damaged) {
    const char *directory = test_tmp_dir();
    const char *config_path = bytes_path(directory, "config.json");
    const char *weights_path = bytes_path(directory, "model.safetensors");
    const char *rounds_text = getenv("HEPTA_FUZZ_ROUNDS");
    const int rounds = rounds_text != NULL ? atoi(rounds_text) : 400;
    int n_opened = 0;
    for (int i = 0; i < rounds; i++) {
        model *m = new_model(i % 3 == 0, i % 3 == 0 ? 4 : (uint32_t[]){2, 3, 4, 8}[i % 4], i % 2,
                             i % 5 == 0);
        bytes files[2] = {config_of(m), weights_of(m)};
        drop_model(m);
        bytes *b = &files[test_random_below(4) > 0];
        uint32_t header = b == &files[0] ? (uint32_t)b->n : (uint32_t)load_u64(b->data) + 8;
        for (uint32_t n = 1 + test_random_below(3); n > 0; n--) {
            uint32_t at = test_random_below(i % 2 == 0 ? header : (uint32_t)b->n);
            while (i % 4 == 0 && at + 1 < header && (b->data[at] < '0' || b->data[at] > '9')) {
                at++;
            }
            bool digit = b->data[at] >= '0' && b->data[at] <= '9';
            b->data[at] = digit ? (uint8_t)('0' + test_random_below(10)) : (uint8_t)test_random();
        }
        if (test_random_below(8) == 0) {
            b->n = test_random_below((uint32_t)b->n);
        }
        bytes_write_file(config_path, files[0].data, files[0].n);
        bytes_write_file(weights_path, files[1].data, files[1].n);
        bytes_free(&files[0]);
        bytes_free(&files[1]);
        hepta_error err = {.message = ""};
        container *c = NULL;
        if (container_open(directory, &no_tokenizer, &c, &err) != HEPTA_OK) {
            CHECK(c == NULL && err.message[0] != '\0');
            continue;
        }
        n_opened++;
        (void)container_verify(c, NULL, NULL, &err);
        for (size_t k = 0; k < c->n_tensors; k++) {
            const tensor *t = &c->tensors[k];
            float *row = malloc((size_t)t->ne[0] * sizeof *row);
            CHECK(row != NULL);
            for (uint64_t r = 0; r < t->ne[1]; r++) {
                kernels_tensor_row(&kernels_ref, t, r, row);
            }
            free(row);
        }
        container_close(c);
    }
    test_note("%d of %d damaged models opened", n_opened, rounds);
    CHECK(n_opened > rounds / 20);
}

/* All logits of a model, for the ids 0 to 7. */
static void eval(const char *path, float logits[TOKENS * TOKENS]) {
    static const int32_t tokens[TOKENS] = {0, 1, 2, 3, 4, 5, 6, 7};
    hepta_error err;
    hepta_model *m;
    hepta_session *s;
    CHECK_OK(hepta_model_open(path, &m, &err));
    CHECK_OK(hepta_session_create(m, &(hepta_session_options){.threads = 1}, &s, &err));
    CHECK_OK(hepta_session_eval(s, tokens, TOKENS, logits, true, &err));
    hepta_session_free(s);
    hepta_model_close(m);
}

/* A baseline in GGUF: query and key rows change their order, and the model stays the same. */
TEST(hf_groups_to_plain_scheme) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "m.gguf");
    float expected[TOKENS * TOKENS], found[TOKENS * TOKENS];
    double error = 0, size = 0, bits;
    hepta_error err;
    model *m = new_model(false, 4, false, true);
    write_model(m, directory);
    drop_model(m);
    const scheme_options options = {.scheme = {SCHEME_INT8, 8}};
    CHECK_OK(scheme_quantize_file(directory, path, &options, &bits, &err));
    eval(directory, expected);
    eval(path, found);
    for (int i = 0; i < TOKENS * TOKENS; i++) {
        error += pow((double)found[i] - (double)expected[i], 2);
        size += pow((double)expected[i], 2);
    }
    test_note("logits differ by %.3f %% (RMS)", 100 * sqrt(error / size));
    CHECK(size > 0 && sqrt(error / size) < 0.03);
}
