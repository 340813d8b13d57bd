/*
 * test_format.c - GGUF and .hepta files: what is read, what is refused, what is written.
 *
 * Files are built here byte by byte, from the specifications and not with the writer under test,
 * except where the writer is the subject.
 */
#include "bytes.h"
#include "test.h"

#include "format/container.h"

/* ---- Small things ------------------------------------------------------ */

/* Opens; on failure checks that the message is there. */
static hepta_status open_path(const char *path, container **c, hepta_error *err) {
    *c = NULL;
    *err = (hepta_error){.status = HEPTA_OK};
    hepta_status status = container_open(path, NULL, c, err);
    if (status != HEPTA_OK) {
        CHECK(*c == NULL);
        CHECK_EQ_INT(err->status, status);
        CHECK(err->message[0] != '\0');
    }
    return status;
}

static void check_refused(const char *path, hepta_status expected, const char *message) {
    hepta_error err;
    container *c;
    hepta_status status = open_path(path, &c, &err);
    if (status != expected || strstr(err.message, message) == NULL) {
        test_fail(__FILE__, __LINE__, "%s: expected status %d and \"%s\", found %d and \"%s\"",
                  path, (int)expected, message, (int)status, err.message);
    }
}

static void check_string(const container *c, const char *key, const char *expected) {
    const kv *k = container_find(c, key);
    CHECK(k != NULL && k->type == KV_STRING);
    CHECK_EQ_INT(k->v.s.n, strlen(expected));
    CHECK_MEM_EQ(k->v.s.data, expected, strlen(expected));
}

/* ---- Types ------------------------------------------------------------- */

TEST(format_tensor_types) {
    static const struct {
        uint32_t type;
        const char *name;
        uint64_t items, bytes;
    } known[] = {
        {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},
        {3, "Q4_1", 32, 20},      {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},
        {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 36},      {10, "Q2_K", 256, 84},
        {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
        {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66},
        {17, "IQ2_XS", 256, 74},  {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},
        {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},  {22, "IQ2_S", 256, 82},
        {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
        {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},
        {29, "IQ1_M", 256, 56},   {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},
        {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},    {40, "NVFP4", 64, 36},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        uint64_t n = 0, ne[4] = {3 * known[i].items, 5, 1, 2};
        CHECK_EQ_STR(tensor_type_name(known[i].type), known[i].name);
        CHECK(tensor_type_bytes(known[i].type, ne, &n));
        CHECK_EQ_INT(n, 30 * known[i].bytes);
        ne[0]++;
        CHECK(tensor_type_bytes(known[i].type, ne, &n) == (known[i].items == 1));
    }
    static const uint32_t unknown[] = {4, 5, 31, 32, 33, 36, 37, 38, 42, 99, 1000, UINT32_MAX};
    const uint64_t one[4] = {256, 1, 1, 1};
    uint64_t n = 7;
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        CHECK(!tensor_type_bytes(unknown[i], one, &n));
        CHECK_EQ_STR(tensor_type_name(unknown[i]), unknown[i] == 1000 ? "packed" : "unknown");
    }
    static const uint64_t impossible[][4] = {
        {0, 1, 1, 1},
        {4, 0, 1, 1},
        {UINT64_MAX, 1, 1, 1},
        {1u << 31, 1u << 31, 4, 1},
        {(uint64_t)1 << 63, 2, 1, 1},
        {1, (uint64_t)1 << 32, (uint64_t)1 << 31, 1},
    };
    for (size_t i = 0; i < sizeof impossible / sizeof impossible[0]; i++) {
        CHECK(!tensor_type_bytes(0, impossible[i], &n));
    }
    CHECK_EQ_INT(n, 7);
}

TEST(format_packed_sizes) {
    static const struct {
        uint32_t half_bits;
        uint64_t rows, cols, bytes;
    } sizes[] = {
        {7, 4, 16, 16 * 7 + 32},
        {7, 1, 1, 16 * 7 + 32},
        {7, 17, 17, 32 * 14 + 64},
        {4, 16, 16, 16 * 4 + 32},
        {8, 4096, 4096, (uint64_t)4096 * 2048 + 8192},
        {16, 4, 16, 16 * 16 + 32},
        {7, UINT32_MAX - 15, 132096, (uint64_t)(UINT32_MAX - 15) * (132096 / 16 * 7 + 2)},
    };
    uint64_t n = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        CHECK(tensor_packed_bytes(sizes[i].half_bits, sizes[i].rows, sizes[i].cols, &n));
        CHECK_EQ_INT(n, sizes[i].bytes);
    }
    static const uint32_t bad_rates[] = {0, 1, 3, 9, 14, 15, 17, UINT32_MAX};
    for (size_t i = 0; i < sizeof bad_rates / sizeof bad_rates[0]; i++) {
        CHECK(!tensor_packed_bytes(bad_rates[i], 4, 16, &n));
    }
    CHECK(!tensor_packed_bytes(7, 0, 16, &n));
    CHECK(!tensor_packed_bytes(7, 4, 0, &n));
    CHECK(!tensor_packed_bytes(7, 4, 132097, &n));
    CHECK(!tensor_packed_bytes(7, UINT32_MAX - 14, 16, &n));
    CHECK(!tensor_packed_bytes(7, UINT64_MAX, UINT64_MAX, &n));
    /* The columns allowed keep int32 sums of the worst weights and activations in range. */
    CHECK((int64_t)128 * 127 * TENSOR_PACKED_MAX_COLS <= INT32_MAX);
}

/* ---- Ordinary GGUF files, written by hand ------------------------------ */

static void put_head(bytes *b, uint32_t version, uint64_t n_tensors, uint64_t n_kvs) {
    bytes_put_text(b, "GGUF");
    bytes_put_int(b, version, 4);
    bytes_put_int(b, n_tensors, 8);
    bytes_put_int(b, n_kvs, 8);
}

static void put_key(bytes *b, const char *key, uint32_t type) {
    bytes_put_string(b, key);
    bytes_put_int(b, type, 4);
}

static void put_u32_kv(bytes *b, const char *key, uint32_t v) {
    put_key(b, key, KV_U32);
    bytes_put_int(b, v, 4);
}

static void put_string_kv(bytes *b, const char *key, const char *v) {
    put_key(b, key, KV_STRING);
    bytes_put_string(b, v);
}

static void put_tensor(bytes *b, const char *name, uint32_t n_dims, const uint64_t *ne,
                       uint32_t type, uint64_t offset) {
    bytes_put_string(b, name);
    bytes_put_int(b, n_dims, 4);
    for (uint32_t i = 0; i < n_dims; i++) {
        bytes_put_int(b, ne[i], 8);
    }
    bytes_put_int(b, type, 4);
    bytes_put_int(b, offset, 8);
}

static uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static uint64_t double_bits(double f) {
    uint64_t u;
    memcpy(&u, &f, 8);
    return u;
}

/* One key of every type, one array of every type, two tensors. */
static bytes every_type(uint32_t version, uint32_t alignment) {
    bytes b = {NULL, 0, 0};
    put_head(&b, version, 2, 12 + 12 + 1);
    for (uint32_t array = 0; array < 2; array++) {
        for (uint32_t type = 0; type <= KV_F64; type++) {
            char key[32];
            if (type == KV_ARRAY) {
                continue;
            }
            snprintf(key, sizeof key, "%s.%u", array ? "array" : "scalar", type);
            put_key(&b, key, array ? KV_ARRAY : type);
            if (array) {
                bytes_put_int(&b, type, 4);
                bytes_put_int(&b, 3, 8);
            }
            for (uint64_t i = 0; i < (array ? 3 : 1); i++) {
                static const uint8_t size[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
                if (type == KV_STRING) {
                    bytes_put_string(&b, i == 1 ? "" : "text\xff");
                } else if (type == KV_F32) {
                    bytes_put_int(&b, float_bits(-1.5f * (float)(i + 1)), 4);
                } else if (type == KV_F64) {
                    bytes_put_int(&b, double_bits(-2.5 * (double)(i + 1)), 8);
                } else if (type == KV_BOOL) {
                    bytes_put_int(&b, i == 0, 1);
                } else { /* -(i + 1): the largest values of unsigned types */
                    bytes_put_int(&b, ~i, size[type]);
                }
            }
        }
    }
    put_u32_kv(&b, "general.alignment", alignment);
    put_tensor(&b, "matrix.weight", 2, (const uint64_t[]){3, 5}, 0, 0);
    uint64_t second = round_up(60, alignment);
    put_tensor(&b, "blocks", 3, (const uint64_t[]){64, 2, 3}, 8, second);
    bytes_pad(&b, alignment);
    size_t start = b.n;
    for (uint32_t i = 0; i < 15; i++) {
        bytes_put_int(&b, float_bits((float)i), 4);
    }
    while (b.n < start + second) {
        bytes_put_int(&b, 0, 1);
    }
    for (uint32_t i = 0; i < 2 * 6 * 34; i++) {
        bytes_put_int(&b, i % 34 < 2 ? 0x3c : i, 1);
    }
    return b;
}

static void check_every_type(const container *c) {
    static const uint64_t largest[] = {UINT8_MAX, 0, UINT16_MAX, 0, UINT32_MAX, 0,
                                       0,         1, 0,          0, UINT64_MAX};
    hepta_error err;
    for (uint32_t type = 0; type <= KV_F64; type++) {
        char key[32];
        if (type == KV_ARRAY) {
            continue;
        }
        snprintf(key, sizeof key, "scalar.%u", type);
        const kv *k = container_find(c, key);
        CHECK(k != NULL);
        CHECK_EQ_INT(k->type, type);
        snprintf(key, sizeof key, "array.%u", type);
        const kv *a = container_find(c, key);
        CHECK(a != NULL && a->type == KV_ARRAY);
        CHECK_EQ_INT(a->item_type, type);
        CHECK_EQ_INT(a->n_items, 3);
        if (type == KV_STRING) {
            CHECK(k->v.s.n == 5 && memcmp(k->v.s.data, "text\xff", 5) == 0);
            CHECK_EQ_INT(kv_item_string(a, 0).n, 5);
            CHECK_EQ_INT(kv_item_string(a, 1).n, 0);
            CHECK_EQ_INT(kv_item_string(a, 3).n, 0); /* past the end */
        } else if (type == KV_F32 || type == KV_F64) {
            double unit = type == KV_F32 ? -1.5 : -2.5;
            CHECK(k->v.f == unit);
            CHECK(kv_item_f64(a, 0) == unit && kv_item_f64(a, 2) == 3 * unit);
            CHECK_EQ_INT(kv_item_i64(a, 0), 0);
        } else if (type == KV_BOOL) {
            CHECK(k->v.u == 1 && kv_item_i64(a, 0) == 1 && kv_item_i64(a, 1) == 0);
        } else if (largest[type == KV_I64 ? 1 : type] != 0) {
            CHECK(k->v.u == largest[type]);
            CHECK((uint64_t)kv_item_i64(a, 2) == largest[type] - 2);
        } else {
            CHECK_EQ_INT(k->v.i, -1);
            CHECK_EQ_INT(kv_item_i64(a, 2), -3);
            CHECK(kv_item_f64(a, 1) == -2);
        }
        CHECK_EQ_INT(kv_item_i64(a, 3), 0);
    }
    const tensor *t = container_tensor(c, "matrix.weight");
    CHECK(t != NULL && t->type == TENSOR_F32 && t->n_dims == 2);
    CHECK(t->ne[0] == 3 && t->ne[1] == 5 && t->ne[2] == 1 && t->ne[3] == 1);
    CHECK_EQ_INT(t->n_bytes, 60);
    for (uint32_t i = 0; i < 15; i++) {
        CHECK_EQ_INT(load_u32(t->data + 4 * i), float_bits((float)i));
    }
    t = container_tensor(c, "blocks");
    CHECK(t != NULL && t->type == TENSOR_Q8_0 && t->n_dims == 3);
    CHECK_EQ_INT(tensor_n_weights(t), 64 * 6);
    CHECK_EQ_INT(t->n_bytes, 2 * 6 * 34);
    CHECK_EQ_INT(t->data[2], 2);
    CHECK(container_tensor(c, "absent") == NULL && container_find(c, "absent") == NULL);
    CHECK_OK(container_verify(c, NULL, NULL, &err));
}

TEST(format_gguf_every_type) {
    const char *path = bytes_path(test_tmp_dir(), "a.gguf");
    static const uint32_t alignments[] = {8, 24, 32, 64, 4096};
    for (uint32_t version = 2; version <= 3; version++) {
        for (size_t i = 0; i < sizeof alignments / sizeof alignments[0]; i++) {
            bytes b = every_type(version, alignments[i]);
            bytes_write_file(path, b.data, b.n);
            bytes_free(&b);
            hepta_error err;
            container *c;
            CHECK_OK(open_path(path, &c, &err));
            CHECK_EQ_INT(c->kind, CONTAINER_GGUF);
            CHECK_EQ_INT(c->version, version);
            CHECK_EQ_STR(c->path, path);
            CHECK_EQ_STR(c->tensors[0].file, path);
            check_every_type(c);
            container_close(c);
        }
    }
}

TEST(format_getters) {
    const char *path = bytes_path(test_tmp_dir(), "a.gguf");
    bytes b = every_type(3, 32);
    bytes_write_file(path, b.data, b.n);
    bytes_free(&b);
    hepta_error err;
    container *c;
    CHECK_OK(open_path(path, &c, &err));
    uint32_t u = 42;
    uint64_t u64 = 42;
    float f = 42;
    CHECK_OK(container_get_u32(c, "scalar.0", &u, &err));
    CHECK_EQ_INT(u, 255);
    CHECK_EQ_INT(container_get_u32(c, "scalar.1", &u, &err), HEPTA_ERROR_FORMAT);
    CHECK(strstr(err.message, "scalar.1 is -1") != NULL);
    CHECK_EQ_INT(container_get_u32(c, "scalar.10", &u, &err), HEPTA_ERROR_FORMAT);
    CHECK(strstr(err.message, "18446744073709551615") != NULL);
    CHECK_EQ_INT(container_get_u32(c, "scalar.8", &u, &err), HEPTA_ERROR_FORMAT);
    CHECK(strstr(err.message, "of type string; expected an integer") != NULL);
    CHECK_EQ_INT(container_get_u32(c, "absent", &u, &err), HEPTA_ERROR_FORMAT);
    CHECK(strstr(err.message, "key absent is missing") != NULL);
    CHECK_EQ_INT(container_get_u32_or(c, "scalar.6", 7, &u, &err), HEPTA_ERROR_FORMAT);
    CHECK_EQ_INT(u, 255); /* failed calls leave their output alone */
    CHECK_OK(container_get_u32_or(c, "absent", 7, &u, &err));
    CHECK_EQ_INT(u, 7);
    CHECK_OK(container_get_u64(c, "scalar.10", &u64, &err));
    CHECK(u64 == UINT64_MAX);
    CHECK_OK(container_get_f32(c, "scalar.12", &f, &err));
    CHECK(f == -2.5f);
    CHECK_OK(container_get_f32_or(c, "scalar.3", 0, &f, &err));
    CHECK(f == -1.0f);
    CHECK_OK(container_get_f32_or(c, "absent", 0.5f, &f, &err));
    CHECK(f == 0.5f);
    CHECK_EQ_INT(container_get_f32_or(c, "scalar.7", 0, &f, &err), HEPTA_ERROR_FORMAT);
    CHECK(container_get_bool_or(c, "scalar.7", false));
    CHECK(container_get_bool_or(c, "scalar.8", true) && !container_get_bool_or(c, "absent", false));
    CHECK_EQ_STR(container_get_string(c, "scalar.8"), "text\xff");
    CHECK(container_get_string(c, "scalar.0") == NULL && container_get_string(c, "absent") == NULL);
    container_close(c);
}

TEST(format_building) {
    const char *path = bytes_path(test_tmp_dir(), "a.gguf");
    bytes b = every_type(3, 32);
    bytes_write_file(path, b.data, b.n);
    bytes_free(&b);
    hepta_error err;
    container *c;
    CHECK_OK(open_path(path, &c, &err));
    size_t n = c->n_kvs;
    uint32_t u = 0;
    char key[32];
    for (uint32_t i = 0; i < 1000; i++) { /* through several growths of the tables */
        snprintf(key, sizeof key, "new.%u", i);
        CHECK_OK(container_set_u32(c, key, i, &err));
    }
    for (uint32_t i = 0; i < 1000; i += 2) {
        snprintf(key, sizeof key, "new.%u", i);
        container_remove(c, key);
        container_remove(c, key); /* what is not there is removed easily */
    }
    CHECK_EQ_INT(c->n_kvs, n + 500);
    for (uint32_t i = 0; i < 1000; i++) {
        snprintf(key, sizeof key, "new.%u", i);
        CHECK_OK(container_get_u32_or(c, key, UINT32_MAX, &u, &err));
        CHECK_EQ_INT(u, i % 2 == 0 ? UINT32_MAX : i);
    }
    CHECK_OK(container_set_string(c, "new.1", "now text", 8, &err)); /* replaces */
    CHECK_OK(container_set_bool(c, "scalar.0", true, &err));
    CHECK_OK(container_set_u64(c, "big", UINT64_MAX, &err));
    CHECK_OK(container_set_f32(c, "float", 0.25f, &err));
    CHECK_EQ_INT(c->n_kvs, n + 502);
    CHECK_EQ_STR(container_get_string(c, "new.1"), "now text");
    CHECK(container_get_bool_or(c, "scalar.0", false));
    char one[] = "one", two[] = "two";
    kv_string strings[3] = {{one, 3}, {NULL, 0}, {two, 3}};
    const uint8_t numbers[] = {1, 0, 255, 255};
    CHECK_OK(container_set_array(c, "strings", KV_STRING, strings, 3, &err));
    CHECK_OK(container_set_array(c, "numbers", KV_I16, numbers, 2, &err));
    CHECK_OK(container_set_array(c, "nothing", KV_F32, NULL, 0, &err));
    one[0] = two[0] = '?'; /* copies were made */
    const kv *k = container_find(c, "strings");
    CHECK(kv_item_string(k, 0).n == 3 && memcmp(kv_item_string(k, 0).data, "one", 3) == 0);
    CHECK(kv_item_string(k, 2).n == 3 && memcmp(kv_item_string(k, 2).data, "two", 3) == 0);
    CHECK_EQ_INT(kv_item_i64(container_find(c, "numbers"), 1), -1);
    CHECK_EQ_INT(container_find(c, "nothing")->n_items, 0);
    CHECK_EQ_INT(container_set_array(c, "bad", KV_ARRAY, numbers, 1, &err), HEPTA_ERROR_ARGUMENT);
    tensor t = {.name = "matrix.weight", .ne = {1, 1, 1, 1}, .file = path};
    CHECK_EQ_INT(container_add_tensor(c, &t, &err), HEPTA_ERROR_FORMAT);
    container_close(c);
}

TEST(format_gguf_vocabularies) {
    static const struct {
        const char *name, *architecture, *model;
        size_t n_kvs;
        uint64_t n_tokens, n_merges;
    } files[] = {
        {"llama-spm", "llama", "llama", 22, 32000, 0},
        {"phi-3", "phi3", "llama", 26, 32064, 0},
        {"gpt-2", "gpt2", "gpt2", 16, 50257, 50000},
        {"deepseek-llm", "llama", "gpt2", 23, 102400, 99757},
    };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        char relative[128];
        snprintf(relative, sizeof relative, "tokenizers/ggml-vocab/ggml-vocab-%s.gguf",
                 files[i].name);
        hepta_error err;
        container *c;
        CHECK_OK(open_path(test_need_data(relative), &c, &err));
        CHECK_EQ_INT(c->version, 3);
        CHECK_EQ_INT(c->n_tensors, 0);
        CHECK_EQ_INT(c->n_kvs, files[i].n_kvs);
        check_string(c, "general.architecture", files[i].architecture);
        check_string(c, "tokenizer.ggml.model", files[i].model);
        const kv *tokens = container_find(c, "tokenizer.ggml.tokens");
        CHECK_EQ_INT(tokens->n_items, files[i].n_tokens);
        const kv *types = container_find(c, "tokenizer.ggml.token_type");
        CHECK_EQ_INT(types->n_items, files[i].n_tokens);
        const kv *merges = container_find(c, "tokenizer.ggml.merges");
        CHECK((merges == NULL ? 0 : merges->n_items) == files[i].n_merges);
        CHECK_OK(container_verify(c, NULL, NULL, &err));
        if (i == 0) {
            kv_string s = kv_item_string(tokens, 2);
            CHECK(s.n == 4 && memcmp(s.data, "</s>", 4) == 0);
            CHECK_EQ_INT(kv_item_i64(types, 3), 6);
        }
        container_close(c);
    }
}

/* ---- Hostile GGUF files ------------------------------------------------ */

/* Writes the file, checks that it is refused, frees it. */
static void refuse_bytes(bytes *b, hepta_status expected, const char *message) {
    static char path[1024];
    if (path[0] == '\0') {
        snprintf(path, sizeof path, "%s/hostile.gguf", test_tmp_dir());
    }
    bytes_write_file(path, b->data, b->n);
    check_refused(path, expected, message);
    bytes_free(b);
}

TEST(format_gguf_refuses_versions) {
    static const struct {
        uint32_t version;
        const char *message;
    } versions[] = {
        {0, "big-endian"}, {1, "version 1"}, {4, "version 4"}, {0x03000000, "big-endian"}};
    for (size_t i = 0; i < sizeof versions / sizeof versions[0]; i++) {
        bytes b = {NULL, 0, 0};
        put_head(&b, versions[i].version, 0, 0);
        refuse_bytes(&b, HEPTA_ERROR_UNSUPPORTED, versions[i].message);
    }
}

TEST(format_gguf_refuses_hostile_counts) {
    static const uint64_t counts[] = {1,         65536, 65537, (uint64_t)1 << 32, (uint64_t)1 << 63,
                                      UINT64_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        bytes b = {NULL, 0, 0};
        put_head(&b, 3, 0, counts[i]);
        refuse_bytes(&b, HEPTA_ERROR_FORMAT, "metadata keys");
        put_head(&b, 3, counts[i], 0);
        refuse_bytes(&b, HEPTA_ERROR_FORMAT, "tensors");
        put_head(&b, 3, 0, 1); /* key longer than the file, or than allowed */
        bytes_put_int(&b, counts[i] + 100, 8);
        bytes_put_text(&b, "key and some more bytes");
        refuse_bytes(&b, HEPTA_ERROR_FORMAT, "a metadata key at byte");
        put_head(&b, 3, 0, 1);
        put_key(&b, "k", KV_STRING);
        bytes_put_int(&b, counts[i], 8);
        refuse_bytes(&b, HEPTA_ERROR_FORMAT, "a metadata string at byte 45");
        for (uint32_t type = 0; type <= KV_F64; type++) {
            put_head(&b, 3, 0, 1);
            put_key(&b, "k", KV_ARRAY);
            bytes_put_int(&b, type, 4);
            bytes_put_int(&b, counts[i], 8);
            refuse_bytes(&b, type == KV_ARRAY ? HEPTA_ERROR_UNSUPPORTED : HEPTA_ERROR_FORMAT,
                         "key k at byte 37");
        }
        put_head(&b, 3, 0, 1); /* a string of an array that is longer than the file */
        put_key(&b, "k", KV_ARRAY);
        bytes_put_int(&b, KV_STRING, 4);
        bytes_put_int(&b, 1, 8);
        bytes_put_int(&b, counts[i], 8);
        refuse_bytes(&b, HEPTA_ERROR_FORMAT, "a string of an array");
    }
}

TEST(format_gguf_refuses_bad_metadata) {
    bytes b = {NULL, 0, 0};
    put_head(&b, 3, 0, 1);
    put_key(&b, "k", 13);
    bytes_put_int(&b, 0, 8);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "value type 13");
    put_head(&b, 3, 0, 1);
    put_key(&b, "k", KV_ARRAY);
    bytes_put_int(&b, 13, 4);
    bytes_put_int(&b, 0, 8);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "item type 13");
    put_head(&b, 3, 0, 1);
    put_key(&b, "k", KV_BOOL);
    bytes_put_int(&b, 2, 1);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "the byte at 37 is 2");
    put_head(&b, 3, 0, 1);
    put_key(&b, "k", KV_ARRAY);
    bytes_put_int(&b, KV_BOOL, 4);
    bytes_put_int(&b, 2, 8);
    bytes_put_int(&b, 0x0301, 2);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "the byte at 50 is 3");
    put_head(&b, 3, 0, 2);
    put_u32_kv(&b, "same", 1);
    put_string_kv(&b, "same", "2");
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "key same occurs twice");
    static const uint32_t alignments[] = {0, 1, 4, 7, 12, (1 << 20) + 8, UINT32_MAX - 7};
    for (size_t i = 0; i < sizeof alignments / sizeof alignments[0]; i++) {
        put_head(&b, 3, 0, 1);
        put_u32_kv(&b, "general.alignment", alignments[i]);
        refuse_bytes(&b, HEPTA_ERROR_FORMAT, "general.alignment");
    }
    put_head(&b, 3, 0, 1);
    put_string_kv(&b, "general.alignment", "32");
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "general.alignment");
}

/* A file of one tensor with this description and 64 bytes of data. */
static bytes one_tensor(const char *name, uint32_t n_dims, const uint64_t *ne, uint32_t type,
                        uint64_t offset) {
    bytes b = {NULL, 0, 0};
    put_head(&b, 3, 1, 0);
    put_tensor(&b, name, n_dims, ne, type, offset);
    bytes_pad(&b, 32);
    for (int i = 0; i < 64; i++) {
        bytes_put_int(&b, 0, 1);
    }
    return b;
}

TEST(format_gguf_refuses_bad_tensors) {
    static const uint64_t huge = (uint64_t)1 << 63;
    static const struct {
        uint32_t n_dims;
        uint64_t ne[5];
        uint32_t type;
        uint64_t offset;
        hepta_status status;
        const char *message;
    } cases[] = {
        {0, {0}, 0, 0, HEPTA_ERROR_FORMAT, "0 dimensions"},
        {5, {1, 1, 1, 1, 1}, 0, 0, HEPTA_ERROR_FORMAT, "5 dimensions"},
        {1, {0}, 0, 0, HEPTA_ERROR_FORMAT, "impossible shape"},
        {2, {4, 0}, 0, 0, HEPTA_ERROR_FORMAT, "impossible shape"},
        {2, {huge, 2}, 0, 0, HEPTA_ERROR_FORMAT, "impossible shape"},
        {4, {65536, 65536, 65536, 65536}, 24, 0, HEPTA_ERROR_FORMAT, "impossible shape"},
        {1, {33}, 8, 0, HEPTA_ERROR_FORMAT, "blocks of 32"},
        {1, {256}, 4, 0, HEPTA_ERROR_UNSUPPORTED, "unknown type 4"},
        {1, {256}, 1000, 0, HEPTA_ERROR_UNSUPPORTED, "unknown type 1000"},
        {1, {17}, 0, 0, HEPTA_ERROR_FORMAT, "takes 68 bytes"},
        {1, {16}, 0, 4, HEPTA_ERROR_FORMAT, "no multiple of the alignment"},
        {1, {9}, 0, 32, HEPTA_ERROR_FORMAT, "takes 36 bytes"},
        {1, {1}, 0, 64, HEPTA_ERROR_FORMAT, "takes 4 bytes"},
        {1, {1}, 0, huge, HEPTA_ERROR_FORMAT, "takes 4 bytes"},
        {1, {1}, 0, UINT64_MAX - 31, HEPTA_ERROR_FORMAT, "takes 4 bytes"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bytes b = one_tensor("t", cases[i].n_dims, cases[i].ne, cases[i].type, cases[i].offset);
        refuse_bytes(&b, cases[i].status, cases[i].message);
    }
    char long_name[300];
    memset(long_name, 'n', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = '\0';
    const uint64_t one = 1;
    bytes b = one_tensor(long_name, 1, &one, 0, 0);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "claims a length of 299 bytes");
    b = one_tensor("", 1, &one, 0, 0);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "empty or holds a zero byte");
    b = one_tensor("a?b", 1, &one, 0, 0);
    b.data[24 + 8 + 1] = 0;
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "empty or holds a zero byte");
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "same", 1, &one, 0, 0);
    put_tensor(&b, "same", 1, &one, 0, 32);
    bytes_pad(&b, 64);
    bytes_pad(&b, 512);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "tensor same occurs twice");
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "later", 1, (const uint64_t[]){8}, 0, 32);
    put_tensor(&b, "sooner", 1, (const uint64_t[]){9}, 0, 0);
    bytes_pad(&b, 512);
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "tensor later at byte 160 overlaps tensor sooner");
}

/* Names whose FNV-1a hashes agree in their low 18 bits: found by walking the hash backwards. */
static size_t colliding_names(char (*names)[8], size_t max) {
    enum { STATES = 1 << 18, PRIME = 0x1b3 };
    static uint16_t forward[STATES]; /* 1 + a two-letter prefix that leads to this state */
    uint32_t inverse = 1;
    for (int i = 0; i < 6; i++) { /* Newton's iteration modulo a power of two */
        inverse *= 2 - PRIME * inverse;
    }
    const uint32_t basis = 0x84222325u % STATES;
    for (uint32_t p = 0; p < 26 * 26; p++) {
        uint32_t h = ((basis ^ ('a' + p / 26)) * PRIME) % STATES;
        h = ((h ^ ('a' + p % 26)) * PRIME) % STATES;
        forward[h] = (uint16_t)(p + 1);
    }
    size_t n = 0;
    for (uint32_t s = 0; s < 26 * 26 * 26 * 26 && n < max; s++) {
        const uint32_t letters[4] = {s % 26, s / 26 % 26, s / 676 % 26, s / 17576};
        uint32_t h = 0;
        for (int i = 3; i >= 0; i--) {
            h = (h * inverse ^ ('a' + letters[i])) % STATES;
        }
        if (forward[h] != 0) {
            uint32_t p = forward[h] - 1u;
            snprintf(names[n++], 8, "%c%c%c%c%c%c", 'a' + (int)(p / 26), 'a' + (int)(p % 26),
                     'a' + (int)letters[0], 'a' + (int)letters[1], 'a' + (int)letters[2],
                     'a' + (int)letters[3]);
        }
    }
    return n;
}

TEST(format_gguf_refuses_colliding_names) {
    enum { MANY = 1000 };
    static char names[MANY][8];
    CHECK_EQ_INT(colliding_names(names, MANY), MANY);
    bytes b = {NULL, 0, 0};
    put_head(&b, 3, 0, MANY);
    for (uint32_t i = 0; i < MANY; i++) {
        put_u32_kv(&b, names[i], i);
    }
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "have the same hash");
    put_head(&b, 3, MANY, 0);
    for (uint32_t i = 0; i < MANY; i++) {
        put_tensor(&b, names[i], 1, (const uint64_t[]){1}, 24, 32 * i);
    }
    bytes_pad(&b, 32);
    for (uint32_t i = 0; i < 32 * MANY; i++) {
        bytes_put_int(&b, 0, 1);
    }
    refuse_bytes(&b, HEPTA_ERROR_FORMAT, "have the same hash");
}

TEST(format_unknown_files) {
    static const struct {
        const char *data;
        size_t n;
        hepta_status status;
        const char *message;
    } files[] = {
        {"", 0, HEPTA_ERROR_FORMAT, "0 bytes long"},
        {"GGU", 3, HEPTA_ERROR_FORMAT, "3 bytes long"},
        {"GGUF", 4, HEPTA_ERROR_FORMAT, "the version at byte 4"},
        {"PK\3\4....", 8, HEPTA_ERROR_UNSUPPORTED, "zip archive"},
        {"\200\002}q", 4, HEPTA_ERROR_UNSUPPORTED, "pickle"},
        {"tjgg....", 8, HEPTA_ERROR_UNSUPPORTED, "GGJT"},
        {"{\"a\": 1}", 8, HEPTA_ERROR_UNSUPPORTED, "give its directory"},
        {"\3\0\0\0\0\0\0\0{ }....", 15, HEPTA_ERROR_UNSUPPORTED, "safetensors"},
        {"hello, world: thirty-two letters", 32, HEPTA_ERROR_FORMAT, "68 65 6c 6c"},
        {"\0\0\0\0", 4, HEPTA_ERROR_FORMAT, "00 00 00 00"},
    };
    const char *directory = test_tmp_dir();
    const char *path = bytes_path(directory, "file");
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        bytes_write_file(path, files[i].data, files[i].n);
        check_refused(path, files[i].status, files[i].message);
    }
#ifdef HEPTA_ENGINE_ONLY
    check_refused(directory, HEPTA_ERROR_UNSUPPORTED, "engine alone");
#else
    check_refused(directory, HEPTA_ERROR_FORMAT, "without config.json");
#endif
    check_refused(bytes_path(directory, "absent"), HEPTA_ERROR_IO, "absent");
}

/* ---- Truncation and random damage -------------------------------------- */

/* Shortens the file from its end on by `step` bytes at a time; each length must be refused. */
static void check_truncations(const char *path, size_t n, size_t step) {
    hepta_error err;
    container *c;
    CHECK_OK(open_path(path, &c, &err));
    container_close(c);
    for (size_t size = (n - 1) / step * step;; size -= step) {
        CHECK(truncate(path, (off_t)size) == 0);
        hepta_status status = open_path(path, &c, &err);
        if (status != HEPTA_ERROR_FORMAT && status != HEPTA_ERROR_UNSUPPORTED) {
            test_fail(__FILE__, __LINE__, "%s cut to %zu bytes: status %d", path, size,
                      (int)status);
        }
        if (size == 0) {
            break;
        }
    }
}

TEST(format_gguf_truncated_anywhere) {
    const char *path = bytes_path(test_tmp_dir(), "cut.gguf");
    bytes b = every_type(3, 32);
    bytes_write_file(path, b.data, b.n);
    check_truncations(path, b.n, 1);
    bytes_free(&b);
    b = bytes_read_file(test_need_data("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf"));
    bytes_write_file(path, b.data, b.n);
    check_truncations(path, b.n, 4096);
    bytes_free(&b);
}

/* Whatever a damaged file still opens as, all of it can be read. */
static uint64_t read_everything(const container *c) {
    uint64_t sum = 0;
    for (size_t i = 0; i < c->n_kvs; i++) {
        const kv *k = &c->kvs[i];
        for (uint64_t j = 0; k->type == KV_ARRAY && j < k->n_items; j++) {
            kv_string s = kv_item_string(k, j);
            sum += s.n > 0 ? (uint8_t)s.data[s.n - 1] : (uint64_t)kv_item_i64(k, j);
        }
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        for (uint64_t j = 0; j < t->n_bytes; j++) {
            sum += t->data[j];
        }
    }
    hepta_error err;
    return sum + (uint64_t)container_verify(c, NULL, NULL, &err);
}

TEST(format_gguf_random_damage) {
    const char *path = bytes_path(test_tmp_dir(), "damaged.gguf");
    bytes good = every_type(3, 32);
    int opened = 0;
    uint64_t sum = 0;
    for (int round = 0; round < 3000; round++) {
        bytes b = {NULL, 0, 0};
        bytes_put(&b, good.data, good.n);
        for (uint32_t i = test_random_below(4) + 1; i > 0; i--) {
            uint32_t at = test_random_below((uint32_t)b.n);
            b.data[at] =
                (uint8_t)(test_random_below(2) ? test_random() : 1u << test_random_below(8));
        }
        bytes_write_file(path, b.data, b.n);
        bytes_free(&b);
        hepta_error err;
        container *c;
        if (open_path(path, &c, &err) == HEPTA_OK) {
            opened++;
            sum += read_everything(c);
            container_close(c);
        }
    }
    test_note("%d of 3000 damaged files still open; sum of what they hold %llx", opened,
              (unsigned long long)sum);
    bytes_free(&good);
}

/* ---- Models in several files ------------------------------------------- */

static void write_shard(const char *directory, const char *name, uint32_t number, uint32_t count,
                        uint32_t n_total, const char *tensor_name) {
    bytes b = {NULL, 0, 0};
    put_head(&b, 3, 1, number == 0 ? 4 : 3);
    put_key(&b, "split.no", KV_U16);
    bytes_put_int(&b, number, 2);
    put_key(&b, "split.count", KV_U16);
    bytes_put_int(&b, count, 2);
    put_key(&b, "split.tensors.count", KV_I32);
    bytes_put_int(&b, n_total, 4);
    if (number == 0) {
        put_string_kv(&b, "general.architecture", "llama");
    }
    put_tensor(&b, tensor_name, 1, (const uint64_t[]){4}, 0, 0);
    bytes_pad(&b, 32);
    for (uint32_t i = 0; i < 4; i++) {
        bytes_put_int(&b, float_bits((float)(number * 10 + i)), 4);
    }
    bytes_write_file(bytes_path(directory, name), b.data, b.n);
    bytes_free(&b);
}

static const char *const shard_names[] = {"m-00001-of-00003.gguf", "m-00002-of-00003.gguf",
                                          "m-00003-of-00003.gguf"};

static void write_shards(const char *directory) {
    write_shard(directory, shard_names[0], 0, 3, 3, "first");
    write_shard(directory, shard_names[1], 1, 3, 3, "second");
    write_shard(directory, shard_names[2], 2, 3, 3, "third");
}

TEST(format_gguf_several_files) {
    const char *directory = test_tmp_dir();
    write_shards(directory);
    for (int i = 0; i < 3; i++) {
        hepta_error err;
        container *c;
        CHECK_OK(open_path(bytes_path(directory, shard_names[i]), &c, &err));
        CHECK_EQ_INT(c->n_tensors, 3);
        CHECK_EQ_INT(c->n_kvs, 1); /* split.* is gone: this is one container */
        check_string(c, "general.architecture", "llama");
        CHECK_EQ_STR(c->tensors[2].name, "third");
        CHECK(strstr(container_tensor(c, "second")->file, shard_names[1]) != NULL);
        for (uint32_t t = 0; t < 3; t++) {
            CHECK_EQ_INT(load_u32(c->tensors[t].data + 4), float_bits((float)(t * 10 + 1)));
        }
        CHECK_OK(container_verify(c, NULL, NULL, &err));
        container_close(c);
    }
}

TEST(format_gguf_several_files_refused) {
    const char *directory = test_tmp_dir();
    write_shards(directory);
    char first[1024];
    snprintf(first, sizeof first, "%s", bytes_path(directory, shard_names[0]));
    write_shard(directory, shard_names[1], 2, 3, 3, "second");
    check_refused(first, HEPTA_ERROR_FORMAT, "says that it is file 3 of 3; its name says 2 of 3");
    write_shard(directory, shard_names[1], 1, 4, 3, "second");
    check_refused(first, HEPTA_ERROR_FORMAT, "says that it is file 2 of 4; its name says 2 of 3");
    write_shard(directory, shard_names[1], 1, 3, 3, "first");
    check_refused(first, HEPTA_ERROR_FORMAT, "tensor first occurs twice");
    CHECK(truncate(bytes_path(directory, shard_names[1]), 100) == 0);
    check_refused(first, HEPTA_ERROR_FORMAT, shard_names[1]);
    CHECK(unlink(bytes_path(directory, shard_names[1])) == 0);
    check_refused(first, HEPTA_ERROR_IO, "m-00002-of-00003.gguf: file 2 of the 3");
    write_shard(directory, shard_names[1], 1, 3, 3, "second");
    write_shard(directory, shard_names[0], 0, 3, 4, "first");
    check_refused(first, HEPTA_ERROR_FORMAT, "hold 3 tensors; split.tensors.count says 4");
    write_shard(directory, shard_names[0], 1, 3, 3, "first");
    check_refused(first, HEPTA_ERROR_FORMAT, "keep the files' original names");
    write_shard(directory, "renamed.gguf", 0, 3, 3, "first");
    check_refused(bytes_path(directory, "renamed.gguf"), HEPTA_ERROR_FORMAT,
                  "-00001-of-00003.gguf");
}

/* ---- Memory ------------------------------------------------------------ */

/* Makes each allocation of opening the file fail in turn. */
static void check_failing_memory(const char *path) {
    hepta_error err;
    container *c;
    uint64_t k = 1;
    for (;; k++) {
        c = NULL;
        memory_fail_after(k);
        hepta_status status = container_open(path, NULL, &c, &err);
        memory_fail_after(0);
        if (status == HEPTA_OK) {
            break;
        }
        CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
        CHECK(c == NULL && strstr(err.message, "out of memory") != NULL);
        CHECK(k < 100000);
    }
    container_close(c);
    test_note("%d allocations failed in turn", (int)(k - 1));
    CHECK(k > 3);
}

TEST(format_gguf_failing_memory) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "a.gguf");
    bytes b = every_type(3, 32);
    bytes_write_file(path, b.data, b.n);
    bytes_free(&b);
    check_failing_memory(path);
    write_shards(directory);
    check_failing_memory(bytes_path(directory, shard_names[1]));
    b = (bytes){NULL, 0, 0};
    put_head(&b, 3, 100, 100);
    char name[32];
    for (uint32_t i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "key.%u", i);
        put_u32_kv(&b, name, i);
    }
    for (uint32_t i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "tensor.%u", i);
        put_tensor(&b, name, 1, (const uint64_t[]){1}, 0, 32 * i);
    }
    bytes_pad(&b, 32);
    for (uint32_t i = 0; i < 100 * 32; i++) {
        bytes_put_int(&b, 0, 1);
    }
    bytes_write_file(path, b.data, b.n);
    bytes_free(&b);
    check_failing_memory(path);
}
