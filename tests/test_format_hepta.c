/*
 * test_format_hepta.c - .hepta files: written, read back, verified, damaged in every way; the
 * example of docs/FORMAT.md, byte for byte.
 */
#include "bytes.h"
#include "test.h"

#include "format/container.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ---- A small file ------------------------------------------------------ */

/* Three tensors: a packed matrix (5, 24) at 3.5 bits, an int8 one (4, 16), a norm of 24. */
enum { N_TENSORS = 3, N_KVS = 6 };

typedef struct sample {
    kv kvs[N_KVS];
    tensor tensors[N_TENSORS];
    uint8_t data[N_TENSORS][512];
    uint64_t n_bytes[N_TENSORS];
} sample;

static kv string_kv(const char *key, const char *value) {
    return (kv){.key = {key, strlen(key)}, .type = KV_STRING, .v.s = {value, strlen(value)}};
}

static void put_bf16(uint8_t *p, float f) {
    uint16_t h = bfloat_from_float(f);
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}

static void make_sample(sample *s) {
    static const kv_string tokens[] = {{"<s>", 3}, {"a", 1}, {"", 0}};
    static const uint8_t scores[] = {0, 0, 0x80, 0xbf, 0, 0, 0, 0x80, 1, 0, 0, 0};
    *s = (sample){
        .kvs = {string_kv("general.architecture", "llama"),
                string_kv("hepta.recipe", "by hand"),
                {.key = {"hepta.bits", 10}, .type = KV_F32, .v.f = 3.5},
                {.key = {"hepta.rotation.seed", 19}, .type = KV_U64, .v.u = 0x123456789abcdef0},
                {.key = {"tokens", 6},
                 .type = KV_ARRAY,
                 .item_type = KV_STRING,
                 .n_items = 3,
                 .v.items = tokens},
                {.key = {"scores", 6},
                 .type = KV_ARRAY,
                 .item_type = KV_F32,
                 .n_items = 3,
                 .v.items = scores}},
        .tensors =
            {{.name = "blk.0.attn_q.weight",
              .type = TENSOR_PACKED,
              .half_bits = 7,
              .n_dims = 2,
              .ne = {24, 5, 1, 1}},
             {.name = "token_embd.weight",
              .type = TENSOR_PACKED,
              .half_bits = 16,
              .n_dims = 2,
              .ne = {16, 4, 1, 1}},
             {.name = "output_norm.weight", .type = TENSOR_F32, .n_dims = 1, .ne = {24, 1, 1, 1}}},
        .n_bytes = {16 * 2 * 7 + 32, 16 * 16 + 32, 96},
    };
    for (uint32_t r = 0; r < 5; r++) { /* rows 5 to 15 are padding */
        for (uint32_t i = 0; i < 2 * 7; i++) {
            uint32_t block = i / 7, at = i % 7 * 32 + 2 * r + block;
            s->data[0][at] = (uint8_t)(r * 40 + i * 3 + 1);
        }
        put_bf16(&s->data[0][224 + 2 * r], 0.25f * (float)(r + 1));
    }
    for (uint32_t r = 0; r < 4; r++) {
        for (uint32_t i = 0; i < 16; i++) {
            s->data[1][16 * i + r] = (uint8_t)(r * 80 + i * 5);
        }
        put_bf16(&s->data[1][256 + 2 * r], 1.0f / (float)(r + 1));
    }
    for (uint32_t i = 0; i < 24; i++) {
        float f = 1.0f + 0.125f * (float)i;
        memcpy(&s->data[2][4 * i], &f, 4);
    }
}

static hepta_status try_write(const char *path, const sample *s, hepta_error *err) {
    hepta_writer *w = NULL;
    hepta_status status = hepta_writer_open(path, s->kvs, N_KVS, s->tensors, N_TENSORS, &w, err);
    for (int i = 0; status == HEPTA_OK && i < N_TENSORS; i++) {
        for (uint64_t at = 0; status == HEPTA_OK && at < s->n_bytes[i]; at += 50) { /* in pieces */
            uint64_t n = s->n_bytes[i] - at < 50 ? s->n_bytes[i] - at : 50;
            status = hepta_writer_write(w, s->data[i] + at, n, err);
        }
    }
    if (status != HEPTA_OK) {
        hepta_writer_discard(w);
        return status;
    }
    return hepta_writer_commit(w, err);
}

static void write_sample(const char *path, const sample *s) {
    hepta_error err;
    CHECK_OK(try_write(path, s, &err));
}

static void check_refused(const char *path, hepta_status expected, const char *message) {
    hepta_error err;
    container *c = NULL;
    hepta_status status = container_open(path, NULL, &c, &err);
    if (status != expected || c != NULL || strstr(err.message, message) == NULL) {
        test_fail(__FILE__, __LINE__, "%s: expected status %d and \"%s\", found %d and \"%s\"",
                  path, (int)expected, message, (int)status, status == HEPTA_OK ? "" : err.message);
    }
}

/* Opens a file that must open, verifies it, and checks the error; NULL: there is none. */
static void check_verify(const char *path, const char *message) {
    hepta_error err = {.message = ""};
    container *c;
    CHECK_OK(container_open(path, NULL, &c, &err));
    hepta_status status = container_verify(c, NULL, NULL, &err);
    container_close(c);
    if (message == NULL ? status != HEPTA_OK
                        : status != HEPTA_ERROR_FORMAT || strstr(err.message, message) == NULL) {
        test_fail(__FILE__, __LINE__, "verify: expected \"%s\", found %d and \"%s\"",
                  message == NULL ? "" : message, (int)status, err.message);
    }
}

/* ---- Writing and reading ----------------------------------------------- */

TEST(format_hepta_round_trip) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    CHECK_EQ_INT(test_count_files(directory), 1);
    hepta_error err;
    container *c;
    CHECK_OK(container_open(path, NULL, &c, &err));
    CHECK_EQ_INT(c->kind, CONTAINER_HEPTA);
    CHECK(c->version == 3 && c->hepta_version == 1);
    CHECK_EQ_INT(c->n_tensors, N_TENSORS);
    for (size_t i = 0; i < N_TENSORS; i++) {
        const tensor *t = &c->tensors[i], *e = &s.tensors[i];
        CHECK_EQ_STR(t->name, e->name);
        CHECK_EQ_INT(t->type, e->type);
        CHECK_EQ_INT(t->half_bits, e->half_bits);
        CHECK_EQ_INT(t->n_dims, e->n_dims);
        CHECK_MEM_EQ(t->ne, e->ne, sizeof t->ne);
        CHECK_EQ_INT(t->n_bytes, s.n_bytes[i]);
        CHECK_MEM_EQ(t->data, s.data[i], t->n_bytes);
        CHECK_EQ_INT((uintptr_t)t->data % 64, 0);
        uint8_t digest[32];
        sha256 hash;
        sha256_start(&hash);
        sha256_update(&hash, t->data, t->n_bytes);
        sha256_finish(&hash, digest);
        CHECK(t->has_sha256);
        CHECK_MEM_EQ(t->sha256, digest, 32);
    }
    for (size_t i = 0; i < N_KVS; i++) {
        const kv *e = &s.kvs[i], *k;
        char key[64];
        snprintf(key, sizeof key, "%.*s", (int)e->key.n, e->key.data);
        k = container_find(c, key);
        CHECK(k != NULL);
        CHECK_EQ_INT(k->type, e->type);
        CHECK_EQ_INT(k->n_items, e->n_items);
        if (e->type == KV_U64) {
            CHECK(k->v.u == e->v.u);
        } else if (e->type == KV_F32) {
            CHECK(k->v.f == e->v.f);
        } else if (e->type == KV_STRING) {
            CHECK(k->v.s.n == e->v.s.n);
            CHECK_MEM_EQ(k->v.s.data, e->v.s.data, e->v.s.n);
        } else if (e->item_type == KV_F32) {
            CHECK_MEM_EQ(k->v.items, e->v.items, 4 * e->n_items);
        }
    }
    CHECK_OK(container_verify(c, NULL, NULL, &err));
    /* What was read can be written again, computed keys and all, and gives the same bytes. */
    const char *again = bytes_path(directory, "b.hepta");
    hepta_writer *w;
    CHECK_OK(hepta_writer_open(again, c->kvs, c->n_kvs, c->tensors, c->n_tensors, &w, &err));
    for (size_t i = 0; i < N_TENSORS; i++) {
        CHECK_OK(hepta_writer_write(w, c->tensors[i].data, c->tensors[i].n_bytes, &err));
    }
    CHECK_OK(hepta_writer_commit(w, &err));
    container_close(c);
    bytes a = bytes_read_file(path), b = bytes_read_file(again);
    CHECK_EQ_INT(a.n, b.n);
    CHECK_EQ_INT(a.n % 64, 0);
    CHECK_MEM_EQ(a.data, b.data, a.n);
    bytes_free(&a);
    bytes_free(&b);
}

typedef struct seen {
    uint64_t calls, done, total, stop_at;
} seen;

static bool note_progress(void *context, const char *what, uint64_t done, uint64_t total) {
    seen *s = context;
    bool ordered = what[0] != '\0' && done >= s->done && done <= total;
    *s = (seen){ordered ? s->calls + 1 : 1000, done, total, s->stop_at};
    return s->calls != s->stop_at;
}

TEST(format_hepta_verify_progress) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    hepta_error err;
    container *c;
    CHECK_OK(container_open(path, NULL, &c, &err));
    seen p = {0, 0, 0, 0};
    CHECK_OK(container_verify(c, note_progress, &p, &err));
    CHECK_EQ_INT(p.calls, N_TENSORS);
    CHECK(p.done == p.total && p.total == s.n_bytes[0] + s.n_bytes[1] + s.n_bytes[2]);
    p = (seen){0, 0, 0, 2};
    CHECK_EQ_INT(container_verify(c, note_progress, &p, &err), HEPTA_ERROR_INTERRUPTED);
    CHECK(strstr(err.message, "token_embd.weight") != NULL);
    container_close(c);
}

TEST(format_hepta_writer_refuses) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "a.hepta");
    hepta_error err;
    hepta_writer *w = NULL;
    sample s;
    make_sample(&s);
    CHECK_OK(hepta_writer_open(path, s.kvs, N_KVS, s.tensors, N_TENSORS, &w, &err));
    CHECK_OK(hepta_writer_write(w, s.data[0], 0, &err));
    CHECK_OK(hepta_writer_write(w, s.data[0], 100, &err));
    CHECK_EQ_INT(hepta_writer_write(w, s.data[0], 157, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(strstr(err.message, "blk.0.attn_q.weight") != NULL);
    CHECK_OK(hepta_writer_write(w, s.data[0], 156, &err));
    CHECK_EQ_INT(hepta_writer_commit(w, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(strstr(err.message, "token_embd.weight is incomplete: 0 of 288") != NULL);
    CHECK_EQ_INT(test_count_files(directory), 0);

    static const struct {
        const char *name;
        uint32_t type, half_bits, n_dims;
        uint64_t ne[4];
    } bad[] = {
        {"", TENSOR_F32, 0, 1, {4, 1, 1, 1}},
        {"t", TENSOR_F32, 0, 0, {4, 1, 1, 1}},
        {"t", TENSOR_F32, 0, 5, {4, 1, 1, 1}},
        {"t", TENSOR_F32, 0, 1, {4, 2, 1, 1}},
        {"t", TENSOR_F32, 0, 2, {4, 0, 1, 1}},
        {"t", 5, 0, 1, {4, 1, 1, 1}},
        {"t", TENSOR_Q8_0, 0, 1, {4, 1, 1, 1}},
        {"t", TENSOR_PACKED, 9, 2, {16, 4, 1, 1}},
        {"t", TENSOR_PACKED, 7, 1, {16, 1, 1, 1}},
        {"t", TENSOR_PACKED, 7, 2, {132097, 4, 1, 1}},
        {"token_embd.weight", TENSOR_F32, 0, 1, {4, 1, 1, 1}}, /* is there already */
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        make_sample(&s);
        s.tensors[2] = (tensor){.name = bad[i].name,
                                .type = bad[i].type,
                                .half_bits = bad[i].half_bits,
                                .n_dims = bad[i].n_dims};
        memcpy(s.tensors[2].ne, bad[i].ne, sizeof bad[i].ne);
        hepta_status status = hepta_writer_open(path, s.kvs, N_KVS, s.tensors, 3, &w, &err);
        CHECK_EQ_INT(status, HEPTA_ERROR_ARGUMENT);
        CHECK_EQ_INT(err.status, HEPTA_ERROR_ARGUMENT);
    }
    static const char *const required[] = {"hepta.recipe", "hepta.bits", "hepta.rotation.seed"};
    for (size_t i = 0; i < 3; i++) {
        make_sample(&s);
        s.kvs[1 + i].key = (kv_string){"other", 5};
        CHECK_EQ_INT(hepta_writer_open(path, s.kvs, N_KVS, s.tensors, 3, &w, &err),
                     HEPTA_ERROR_ARGUMENT);
        CHECK(strstr(err.message, required[i]) != NULL);
    }
    make_sample(&s);
    s.kvs[4].key = s.kvs[5].key;
    CHECK_EQ_INT(hepta_writer_open(path, s.kvs, N_KVS, s.tensors, 3, &w, &err),
                 HEPTA_ERROR_ARGUMENT);
    CHECK(strstr(err.message, "scores occurs twice") != NULL);
    CHECK_EQ_INT(test_count_files(directory), 0);
    hepta_writer_discard(NULL);
}

/* ---- Damage ------------------------------------------------------------ */

/* Where the data section of a file starts: its first tensor's offset. */
static size_t header_size_of(const char *path) {
    hepta_error err;
    container *c;
    CHECK_OK(container_open(path, NULL, &c, &err));
    size_t n = (size_t)c->tensors[0].offset;
    container_close(c);
    return n;
}

TEST(format_hepta_every_header_byte) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    size_t n = header_size_of(path);
    bytes b = bytes_read_file(path);
    FILE *f = fopen(path, "r+b");
    CHECK(f != NULL);
    setvbuf(f, NULL, _IONBF, 0);
    for (size_t i = 0; i < n; i++) {
        for (int k = 0; k < 10; k++) { /* each bit; all; another value */
            uint8_t mask = (uint8_t)(k < 8 ? 1 << k : k == 8 ? 0xff : 0);
            uint8_t byte =
                mask != 0 ? b.data[i] ^ mask : (uint8_t)(b.data[i] + 1 + test_random_below(255));
            CHECK(fseek(f, (long)i, SEEK_SET) == 0 && fwrite(&byte, 1, 1, f) == 1);
            hepta_error err = {.message = ""};
            container *c = NULL;
            hepta_status status = container_open(path, NULL, &c, &err);
            if (status == HEPTA_OK || c != NULL || err.message[0] == '\0') {
                test_fail(__FILE__, __LINE__, "byte %zu changed from %u to %u: status %d", i,
                          b.data[i], byte, (int)status);
            }
        }
        CHECK(fseek(f, (long)i, SEEK_SET) == 0 && fwrite(&b.data[i], 1, 1, f) == 1);
    }
    fclose(f);
    check_verify(path, NULL);
    test_note("%zu header bytes, 10 changes each, all refused", n);
    bytes_free(&b);
}

TEST(format_hepta_truncated_and_appended) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    bytes b = bytes_read_file(path);
    hepta_error err;
    container *c = NULL;
    for (size_t n = b.n; n-- > 0;) {
        CHECK(truncate(path, (off_t)n) == 0);
        CHECK(container_open(path, NULL, &c, &err) == HEPTA_ERROR_FORMAT && c == NULL);
    }
    bytes_write_file(path, b.data, b.n);
    check_verify(path, NULL);
    for (size_t extra = 1; extra <= 4096; extra *= 8) {
        CHECK(truncate(path, (off_t)(b.n + extra)) == 0);
        check_refused(path, HEPTA_ERROR_FORMAT, "something was appended");
    }
    bytes_free(&b);
}

TEST(format_hepta_damage_is_located) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    size_t start = header_size_of(path);
    bytes b = bytes_read_file(path);
    uint64_t offset = start;
    for (int i = 0; i < N_TENSORS; i++) {
        for (uint64_t at = 0; at < round_up(s.n_bytes[i], 64); at++) {
            char expected[256];
            if (at < s.n_bytes[i]) {
                snprintf(expected, sizeof expected, "tensor %s (%d bytes from byte %d on)",
                         s.tensors[i].name, (int)s.n_bytes[i], (int)offset);
            } else {
                snprintf(expected, sizeof expected,
                         "the padding after tensor %s is not zero: byte %d is", s.tensors[i].name,
                         (int)(offset + at));
            }
            b.data[offset + at] ^= (uint8_t)(1u << test_random_below(8));
            bytes_write_file(path, b.data, b.n);
            check_verify(path, expected);
            memcpy(b.data + offset + at, at < s.n_bytes[i] ? &s.data[i][at] : (const uint8_t[]){0},
                   1);
        }
        offset += round_up(s.n_bytes[i], 64);
    }
    bytes_write_file(path, b.data, b.n);
    check_verify(path, NULL);
    bytes_free(&b);
}

/* Values that checksums do not tell: the file was written like that. */
TEST(format_hepta_verify_values) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    static const struct {
        int tensor, at;
        uint16_t value;
        const char *message;
    } cases[] = {
        {0, 224 + 6, 0x7f80, "attn_q.weight: the scale of row 3"},
        {0, 224 + 6, 0xffc0, "attn_q.weight: the scale of row 3"},
        {0, 224 + 12, 0x3f80, "belongs to padding row 6 and is 128"},
        {0, 2 * 32 + 2 * 5, 0x0100, "belongs to padding row 5 and is 1"},
        {1, 256 + 2, 0x7f81, "token_embd.weight: the scale of row 1"},
        {2, 4 * 10 + 2, 0x7fc0, "output_norm.weight: weight 10"},
        {2, 4 * 10 + 2, 0xff80, "output_norm.weight: weight 10"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        sample s;
        make_sample(&s);
        s.data[cases[i].tensor][cases[i].at] = (uint8_t)cases[i].value;
        s.data[cases[i].tensor][cases[i].at + 1] = (uint8_t)(cases[i].value >> 8);
        write_sample(path, &s);
        check_verify(path, cases[i].message);
    }
}

/* ---- Headers with a right hash and wrong contents ---------------------- */

static size_t find_bytes(const bytes *b, const char *text) {
    size_t n = strlen(text);
    for (size_t i = 0; i + n <= b->n; i++) {
        if (memcmp(b->data + i, text, n) == 0) {
            return i;
        }
    }
    test_fail(__FILE__, __LINE__, "%s is not in the file", text);
}

/* Makes the header's hash right again after a change, as a hostile writer would. */
static void seal(bytes *b, size_t header_size) {
    size_t digits = find_bytes(b, "hepta.file.sha256") + 17 + 4 + 8;
    memset(b->data + digits, '0', 64);
    sha256 s;
    uint8_t digest[32];
    char hex[65];
    sha256_start(&s);
    sha256_update(&s, b->data, header_size);
    sha256_finish(&s, digest);
    sha256_hex(digest, hex);
    memcpy(b->data + digits, hex, 64);
}

TEST(format_hepta_hostile_headers) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    size_t start = header_size_of(path);
    bytes good = bytes_read_file(path);
    static const struct {
        const char *key;
        size_t skip; /* from the key's end */
        uint8_t value;
        hepta_status status;
        const char *message;
    } cases[] = {
        {"hepta.version", 4, 2, HEPTA_ERROR_UNSUPPORTED, "hepta.version is 2"},
        {"hepta.version", 4, 0, HEPTA_ERROR_UNSUPPORTED, "hepta.version is 0"},
        {"hepta.version", 0, 5, HEPTA_ERROR_FORMAT, "no u32 hepta.version"},
        {"hepta.version", (size_t)-1, 'm', HEPTA_ERROR_FORMAT, "no u32 hepta.version"},
        {"GGUF", 0, 2, HEPTA_ERROR_FORMAT, "GGUF of version 3"},
        {"general.alignment", 4, 128, HEPTA_ERROR_FORMAT, ""},
        {"hepta.recipe", (size_t)-1, 'p', HEPTA_ERROR_FORMAT,
         "hepta.recipe of type string is missing"},
        {"hepta.tensor.names", 4 + 4 + 8 + 8, 'c', HEPTA_ERROR_FORMAT,
         "hepta.tensor.names has clk"},
        {"hepta.tensor.names", (size_t)-1, 'z', HEPTA_ERROR_FORMAT, "hepta.tensor.names is not"},
        {"hepta.tensor.half_bits", 4, KV_BOOL, HEPTA_ERROR_FORMAT, "is 7; a bool"},
        {"hepta.tensor.half_bits", 4, KV_I8, HEPTA_ERROR_FORMAT, "array of 3 items of type u8"},
        {"hepta.tensor.half_bits", 4 + 4 + 8, 9, HEPTA_ERROR_FORMAT, "weights of 9/2 bits"},
        {"hepta.tensor.half_bits", 4 + 4 + 8, 6, HEPTA_ERROR_FORMAT, "take 224 bytes of type I8"},
        {"hepta.tensor.half_bits", 4 + 4 + 8, 0, HEPTA_ERROR_FORMAT, "but the tables say"},
        {"hepta.tensor.half_bits", 4 + 4 + 8 + 2, 8, HEPTA_ERROR_FORMAT, "of type F32"},
        {"hepta.tensor.rows", 4 + 4 + 8, 17, HEPTA_ERROR_FORMAT, "17 rows of 24 weights"},
        {"hepta.tensor.rows", 4 + 4 + 8 + 16, 2, HEPTA_ERROR_FORMAT, "but the tables say 2 of 24"},
        {"hepta.tensor.rows", 4 + 4 + 8 + 7, 255, HEPTA_ERROR_FORMAT, "rows of 24 weights"},
        {"hepta.tensor.cols", 4 + 4 + 8, 33, HEPTA_ERROR_FORMAT, "5 rows of 33 weights"},
        {"hepta.tensor.cols", 4 + 4 + 8 + 2, 255, HEPTA_ERROR_FORMAT, "at most 132096 columns"},
        {"hepta.tensor.sha256", 4 + 4 + 8 + 8 + 5, 'A', HEPTA_ERROR_FORMAT,
         "64 hexadecimal digits"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bytes b = {NULL, 0, 0};
        bytes_put(&b, good.data, good.n);
        size_t at = find_bytes(&b, cases[i].key) + strlen(cases[i].key) + cases[i].skip;
        b.data[at] = cases[i].value;
        seal(&b, start);
        bytes_write_file(path, b.data, b.n);
        check_refused(path, cases[i].status, cases[i].message);
        bytes_free(&b);
    }
    /* Nonzero padding at the header's end; a tensor that is not where it should be. */
    bytes b = {NULL, 0, 0};
    bytes_put(&b, good.data, good.n);
    b.data[start - 1] = 1;
    seal(&b, start);
    bytes_write_file(path, b.data, b.n);
    check_refused(path, HEPTA_ERROR_FORMAT, "padding after the header, is 1");
    memcpy(b.data, good.data, good.n);
    size_t info = find_bytes(&b, "output_norm.weight"); /* in the table; the description follows */
    bytes rest = {b.data + info + 1, b.n - info - 1, 0};
    info += 1 + find_bytes(&rest, "output_norm.weight") + 18 + 4 + 8 + 4;
    CHECK_EQ_INT(load_u64(b.data + info), 576);
    b.data[info] = 128; /* 640 */
    bytes_put(&b, (const uint8_t[64]){0}, 64);
    seal(&b, start);
    bytes_write_file(path, b.data, b.n);
    check_refused(path, HEPTA_ERROR_FORMAT, "output_norm.weight starts at byte");
    bytes_free(&b);
    bytes_free(&good);
}

TEST(format_hepta_random_damage) {
    const char *path = bytes_path(test_tmp_dir(), "a.hepta");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    size_t start = header_size_of(path);
    bytes good = bytes_read_file(path);
    int opened = 0;
    for (int round = 0; round < 1000; round++) {
        bytes b = {NULL, 0, 0};
        bytes_put(&b, good.data, good.n);
        for (uint32_t i = test_random_below(3) + 1; i > 0; i--) {
            b.data[160 + test_random_below((uint32_t)start - 160)] = (uint8_t)test_random();
        }
        seal(&b, start);
        bytes_write_file(path, b.data, b.n);
        bytes_free(&b);
        hepta_error err;
        container *c;
        if (container_open(path, NULL, &c, &err) == HEPTA_OK) {
            opened++;
            (void)container_verify(c, NULL, NULL, &err);
            container_close(c);
        }
    }
    test_note("%d of 1000 files with forged headers still open", opened);
    bytes_free(&good);
}

/* ---- Resources --------------------------------------------------------- */

TEST(format_hepta_failing_memory) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "a.hepta");
    hepta_error err;
    sample s;
    make_sample(&s);
    uint64_t k = 1;
    for (;; k++) {
        memory_fail_after(k);
        hepta_status status = try_write(path, &s, &err);
        memory_fail_after(0);
        if (status == HEPTA_OK) {
            break;
        }
        CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
        CHECK_EQ_INT(test_count_files(directory), 0);
        CHECK(k < 1000);
    }
    CHECK(k > 3);
    test_note("%d allocations of the writer failed in turn", (int)(k - 1));
    for (k = 1;; k++) {
        container *c = NULL;
        memory_fail_after(k);
        hepta_status status = container_open(path, NULL, &c, &err);
        memory_fail_after(0);
        if (status == HEPTA_OK) {
            container_close(c);
            break;
        }
        CHECK_EQ_INT(status, HEPTA_ERROR_MEMORY);
        CHECK(c == NULL && k < 1000);
    }
    test_note("%d allocations of the reader failed in turn", (int)(k - 1));
}

/* A disk that is full after `limit` bytes; returns the status of writing 3 MiB. */
static hepta_status write_with_limit(const char *path, rlim_t limit, hepta_error *err) {
    sample s;
    make_sample(&s);
    s.tensors[2].ne[0] = 3 << 18;
    static float ones[3 << 18];
    for (size_t i = 0; i < sizeof ones / sizeof ones[0]; i++) {
        ones[i] = 1;
    }
    struct rlimit old, small;
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    signal(SIGXFSZ, SIG_IGN);
    small = (struct rlimit){limit < old.rlim_max ? limit : old.rlim_max, old.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    hepta_writer *w = NULL;
    hepta_status status = hepta_writer_open(path, s.kvs, N_KVS, s.tensors, 3, &w, err);
    for (int i = 0; status == HEPTA_OK && i < N_TENSORS; i++) {
        const void *data = i == 2 ? (const void *)ones : s.data[i];
        status = hepta_writer_write(w, data, i == 2 ? sizeof ones : s.n_bytes[i], err);
    }
    if (status == HEPTA_OK) {
        status = hepta_writer_commit(w, err);
    } else {
        hepta_writer_discard(w);
    }
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    return status;
}

TEST(format_hepta_full_disk) {
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "a.hepta");
    static const rlim_t limits[] = {0, 100, 1 << 20, 2 << 20, (3 << 20) + 1000};
    hepta_error err;
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        CHECK_EQ_INT(write_with_limit(path, limits[i], &err), HEPTA_ERROR_IO);
        CHECK(strstr(err.message, "a.hepta") != NULL);
        CHECK_EQ_INT(test_count_files(directory), 0);
    }
    bytes_write_file(path, "precious", 8); /* what was there before stays */
    CHECK_EQ_INT(write_with_limit(path, 1 << 20, &err), HEPTA_ERROR_IO);
    bytes b = bytes_read_file(path);
    CHECK(b.n == 8 && test_count_files(directory) == 1);
    bytes_free(&b);
    CHECK_OK(write_with_limit(path, 8 << 20, &err));
    check_verify(path, NULL);
}

/* ---- Others' tools, and the documentation ------------------------------ */

TEST(format_hepta_listed_by_gguf_tools) {
    const char *python = getenv("HEPTA_PYTHON");
    if (python == NULL) {
        SKIP("HEPTA_PYTHON is not set to a Python with the gguf package");
    }
    char command[4096];
    snprintf(command, sizeof command, "'%s' -c 'import gguf' 2>/dev/null", python);
    if (system(command) != 0) {
        SKIP("%s has no gguf package", python);
    }
    const char *directory = test_tmp_dir(), *path = bytes_path(directory, "a.hepta");
    const char *list = bytes_path(directory, "list.txt");
    sample s;
    make_sample(&s);
    write_sample(path, &s);
    snprintf(command, sizeof command,
             "'%s' -c 'import sys, gguf\n"
             "r = gguf.GGUFReader(sys.argv[1])\n"
             "print(r.get_field(\"general.architecture\").contents())\n"
             "print(r.get_field(\"hepta.rotation.seed\").contents())\n"
             "print(r.get_field(\"hepta.tensor.half_bits\").contents())\n"
             "print(r.get_field(\"hepta.tensor.names\").contents()[1])\n"
             "for t in r.tensors:\n"
             "    print(t.name, t.tensor_type.name, list(map(int, t.shape)), t.n_bytes,\n"
             "          bytes(t.data.tobytes())[:3].hex())' '%s' > '%s'",
             python, path, list);
    CHECK_EQ_INT(system(command), 0);
    bytes b = bytes_read_file(list);
    bytes_put_int(&b, 0, 1);
    CHECK_EQ_STR((const char *)b.data, "llama\n"
                                       "1311768467463790320\n"
                                       "[7, 16, 0]\n"
                                       "token_embd.weight\n"
                                       "blk.0.attn_q.weight I8 [256] 256 011629\n"
                                       "token_embd.weight I8 [288] 288 0050a0\n"
                                       "output_norm.weight F32 [24] 96 000080\n");
    bytes_free(&b);
}

/* The bytes of the hex dump in docs/FORMAT.md: lines "00000010  47 47 ...  |GG..|". */
static bytes read_hex_dump(const char *path) {
    bytes b = {NULL, 0, 0};
    FILE *f = fopen(path, "r");
    CHECK(f != NULL);
    char line[512];
    while (fgets(line, sizeof line, f) != NULL) {
        unsigned offset, byte;
        int at = 0, n;
        if (sscanf(line, "%8x  %n", &offset, &at) != 1 || at != 10 || strlen(line) < 60) {
            continue;
        }
        if (offset != b.n) {
            test_fail(__FILE__, __LINE__, "%s: the dump goes on at %08x; expected %08x", path,
                      offset, (unsigned)b.n);
        }
        for (int i = 0; i < 16 && sscanf(line + at, "%2x%n", &byte, &n) == 1; i++, at += n) {
            bytes_put_int(&b, byte, 1);
        }
    }
    fclose(f);
    return b;
}

/* The model described in docs/FORMAT.md, "A worked example". */
static void write_documented_example(const char *path) {
    const kv kvs[] = {string_kv("general.architecture", "llama"),
                      string_kv("hepta.recipe", "an example"),
                      {.key = {"hepta.bits", 10}, .type = KV_F32, .v.f = 3.5},
                      {.key = {"hepta.rotation.seed", 19}, .type = KV_U64, .v.u = 7}};
    const tensor tensors[] = {
        {.name = "w", .type = TENSOR_PACKED, .half_bits = 7, .n_dims = 2, .ne = {16, 3, 1, 1}},
        {.name = "norm", .type = TENSOR_F32, .n_dims = 1, .ne = {2, 1, 1, 1}}};
    uint8_t w[16 * 7 + 32] = {0}, norm[8];
    for (uint8_t r = 0; r < 3; r++) {
        for (uint8_t i = 0; i < 7; i++) {
            w[16 * i + r] = (uint8_t)((r + 1) * 16 + i);
        }
        put_bf16(w + 112 + 2 * r, 0.5f * (float)(r + 1));
    }
    memcpy(norm, (const float[]){1.0f, 2.0f}, 8);
    hepta_error err;
    hepta_writer *out;
    CHECK_OK(hepta_writer_open(path, kvs, 4, tensors, 2, &out, &err));
    CHECK_OK(hepta_writer_write(out, w, sizeof w, &err));
    CHECK_OK(hepta_writer_write(out, norm, sizeof norm, &err));
    CHECK_OK(hepta_writer_commit(out, &err));
}

TEST(format_documented_example) {
    static const char doc[] = "docs/FORMAT.md";
    if (access(doc, R_OK) != 0) {
        SKIP("%s is not here: run the tests from the source directory", doc);
    }
    const char *path = bytes_path(test_tmp_dir(), "example.hepta");
    write_documented_example(path);
    bytes expected = read_hex_dump(doc), found = bytes_read_file(path);
    CHECK_EQ_INT(found.n, expected.n);
    CHECK_MEM_EQ(found.data, expected.data, found.n);
    bytes_free(&found);
    bytes_write_file(path, expected.data, expected.n);
    bytes_free(&expected);
    check_verify(path, NULL);
}
