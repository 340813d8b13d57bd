/*
 * hepta.c - reading the .hepta layer of a GGUF file.
 *
 * A .hepta file is a GGUF version 3 file whose hepta.tensor.* arrays say, tensor by tensor, what
 * ordinary GGUF tools see as bytes (I8): packed matrices, with their shapes and checksums.
 *
 * Invariant: hepta.file.sha256 covers every byte before the first tensor, with the digits of this
 * very value taken as '0'. It is checked here, at opening, before anything else in the header is
 * believed; and since the header holds every tensor's hash, it stands for the whole file. A key
 * that starts with "hepta." makes a file a .hepta file, so that damage to one key cannot turn it
 * into an ordinary GGUF.
 *
 * Documented in docs/FORMAT.md.
 */
#include "format/private.h"

#include <string.h>

static bool starts_with(kv_string s, const char *prefix) {
    size_t n = strlen(prefix);
    return s.n >= n && memcmp(s.data, prefix, n) == 0;
}

static bool equals(kv_string s, const char *text) {
    return s.n == strlen(text) && memcmp(s.data, text, (size_t)s.n) == 0;
}

bool hepta_keys_present(const container *c) {
    for (size_t i = 0; i < c->n_kvs; i++) {
        if (starts_with(c->kvs[i].key, "hepta.")) {
            return true;
        }
    }
    return false;
}

bool hepta_key_is_computed(kv_string key) {
    return equals(key, "general.alignment") || equals(key, "hepta.version") ||
           equals(key, "hepta.file.sha256") || starts_with(key, "hepta.tensor.") ||
           starts_with(key, "split.");
}

static hepta_status check_version(container *c, hepta_error *err) {
    const kv *k = container_find(c, "hepta.version");
    if (k == NULL || k->type != KV_U32) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: has keys of a .hepta file, but no u32 hepta.version: it is damaged",
                         path_shown(c->path));
    }
    if (k->v.u != HEPTA_FILE_VERSION) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: hepta.version is %" PRIu64 "; this program reads version %d: it is "
                         "older than the file, or the file is damaged",
                         path_shown(c->path), k->v.u, (int)HEPTA_FILE_VERSION);
    }
    c->hepta_version = HEPTA_FILE_VERSION;
    return HEPTA_OK;
}

static hepta_status check_header_hash(const container *c, uint64_t header_size, hepta_error *err) {
    const char *path = path_shown(c->path);
    const kv *k = container_find(c, "hepta.file.sha256");
    uint8_t stored[32], found[32];
    if (k == NULL || k->type != KV_STRING || !format_parse_sha256(k->v.s, stored)) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: hepta.file.sha256 is missing or not 64 hexadecimal digits: the file "
                         "is damaged",
                         path);
    }
    const uint8_t *data = c->maps[0].data, *digits = (const uint8_t *)k->v.s.data;
    if (header_size > c->maps[0].size) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: the header takes %" PRIu64
                         " bytes, the file has %zu; it is cut short",
                         path, header_size, c->maps[0].size);
    }
    char zeros[FORMAT_SHA256_HEX];
    memset(zeros, '0', sizeof zeros);
    size_t before = (size_t)(digits - data), after = before + sizeof zeros;
    sha256 s;
    sha256_start(&s);
    sha256_update(&s, data, before);
    sha256_update(&s, zeros, sizeof zeros);
    sha256_update(&s, data + after, (size_t)header_size - after);
    sha256_finish(&s, found);
    if (memcmp(stored, found, sizeof found) != 0) {
        char hex[2][FORMAT_SHA256_HEX + 1];
        sha256_hex(stored, hex[0]);
        sha256_hex(found, hex[1]);
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: the header (bytes 0 to %" PRIu64
                         ") has SHA-256 %.12s..., it should be "
                         "%.12s...: the file is damaged; get it again",
                         path, header_size, hex[1], hex[0]);
    }
    return HEPTA_OK;
}

/* ---- The tables -------------------------------------------------------- */

typedef struct tensor_tables {
    const kv *names, *half_bits, *rows, *cols, *sha256;
} tensor_tables;

static hepta_status find_table(const container *c, const char *key, kv_type type, const kv **out,
                               hepta_error *err) {
    const kv *k = container_find(c, key);
    if (k == NULL || k->type != KV_ARRAY || k->item_type != type || k->n_items != c->n_tensors) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: %s is not an array of %zu items of type %s, one per tensor",
                         path_shown(c->path), key, c->n_tensors, kv_type_name(type));
    }
    *out = k;
    return HEPTA_OK;
}

static hepta_status find_tables(const container *c, tensor_tables *t, hepta_error *err) {
    hepta_status status = find_table(c, "hepta.tensor.names", KV_STRING, &t->names, err);
    if (status == HEPTA_OK) {
        status = find_table(c, "hepta.tensor.half_bits", KV_U8, &t->half_bits, err);
    }
    if (status == HEPTA_OK) {
        status = find_table(c, "hepta.tensor.rows", KV_U64, &t->rows, err);
    }
    if (status == HEPTA_OK) {
        status = find_table(c, "hepta.tensor.cols", KV_U64, &t->cols, err);
    }
    if (status == HEPTA_OK) {
        status = find_table(c, "hepta.tensor.sha256", KV_STRING, &t->sha256, err);
    }
    return status;
}

hepta_status hepta_check_required(const container *c, hepta_error *err) {
    static const struct {
        const char *key;
        kv_type type;
    } required[] = {
        {"hepta.recipe", KV_STRING}, {"hepta.bits", KV_F32}, {"hepta.rotation.seed", KV_U64}};
    for (size_t i = 0; i < sizeof required / sizeof required[0]; i++) {
        const kv *k = container_find(c, required[i].key);
        if (k == NULL || k->type != required[i].type) {
            return error_set(err, HEPTA_ERROR_FORMAT, "%s: key %s of type %s is missing",
                             path_shown(c->path), required[i].key, kv_type_name(required[i].type));
        }
    }
    return HEPTA_OK;
}

/* Gives tensor i the shape and checksum that the tables have for it. */
static hepta_status describe_tensor(container *c, const tensor_tables *tables, size_t i,
                                    hepta_error *err) {
    tensor *t = &c->tensors[i];
    const char *path = path_shown(c->path);
    uint64_t half_bits = (uint64_t)kv_item_i64(tables->half_bits, i);
    uint64_t rows = (uint64_t)kv_item_i64(tables->rows, i);
    uint64_t cols = (uint64_t)kv_item_i64(tables->cols, i);
    if (!equals(kv_item_string(tables->names, i), t->name)) {
        kv_string name = kv_item_string(tables->names, i);
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %zu is %.80s, but hepta.tensor.names has %.*s", path, i,
                         t->name, SHOWN(name.n), name.data);
    }
    t->has_sha256 = format_parse_sha256(kv_item_string(tables->sha256, i), t->sha256);
    if (!t->has_sha256) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s: its hepta.tensor.sha256 is not 64 hexadecimal digits",
                         path, t->name);
    }
    if (half_bits == 0) {
        if (cols != t->ne[0] || rows != t->ne[1] * t->ne[2] * t->ne[3]) {
            return error_set(err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.80s has %" PRIu64 " rows of %" PRIu64
                             ", but the tables say %" PRIu64 " of %" PRIu64,
                             path, t->name, t->ne[1] * t->ne[2] * t->ne[3], t->ne[0], rows, cols);
        }
        return HEPTA_OK;
    }
    uint64_t n_bytes = 0;
    if (!tensor_packed_bytes((uint32_t)half_bits, rows, cols, &n_bytes)) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s: %" PRIu64 " rows of %" PRIu64 " weights of %" PRIu64
                         "/2 bits; expected 4 to 8 or 16 half bits and at most %d columns",
                         path, t->name, rows, cols, half_bits, (int)TENSOR_PACKED_MAX_COLS);
    }
    if (t->type != TENSOR_I8 || t->n_dims != 1 || t->n_bytes != n_bytes) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s: %" PRIu64 " rows of %" PRIu64 " weights of %" PRIu64
                         "/2 bits take %" PRIu64 " bytes of type I8; found %" PRIu64 " of type %s",
                         path, t->name, rows, cols, half_bits, n_bytes, t->n_bytes,
                         tensor_type_name(t->type));
    }
    t->type = TENSOR_PACKED;
    t->half_bits = (uint32_t)half_bits;
    t->n_dims = 2;
    t->ne[0] = cols;
    t->ne[1] = rows;
    return HEPTA_OK;
}

/* Tensors follow each other in order, each padded to the alignment, to the end of the file. */
static hepta_status check_layout(const container *c, uint64_t header_size, hepta_error *err) {
    const char *path = path_shown(c->path);
    uint64_t expected = header_size;
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        if (t->offset != expected) {
            return error_set(err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.80s starts at byte %" PRIu64 "; expected %" PRIu64, path,
                             t->name, t->offset, expected);
        }
        expected = round_up(t->offset + t->n_bytes, HEPTA_ALIGNMENT);
    }
    if (c->maps[0].size != expected) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: the file has %zu bytes; expected %" PRIu64 ": it is cut short, or "
                         "something was appended",
                         path, c->maps[0].size, expected);
    }
    return HEPTA_OK;
}

static hepta_status check_padding(const container *c, uint64_t begin, uint64_t end,
                                  hepta_error *err) {
    for (uint64_t i = begin; i < end; i++) {
        if (c->maps[0].data[i] != 0) {
            return error_set(err, HEPTA_ERROR_FORMAT,
                             "%s: byte %" PRIu64 ", padding after the header, is %u; expected 0",
                             path_shown(c->path), i, (unsigned)c->maps[0].data[i]);
        }
    }
    return HEPTA_OK;
}

hepta_status hepta_header_read(container *c, uint64_t infos_end, uint64_t header_size,
                               hepta_error *err) {
    c->kind = CONTAINER_HEPTA;
    tensor_tables tables;
    hepta_status status = check_version(c, err);
    if (status == HEPTA_OK) {
        status = check_header_hash(c, header_size, err);
    }
    const kv *alignment = container_find(c, "general.alignment");
    if (status == HEPTA_OK &&
        (c->version != 3 || alignment == NULL || alignment->v.u != HEPTA_ALIGNMENT)) {
        status = error_set(err, HEPTA_ERROR_FORMAT,
                           "%s: a .hepta file is a GGUF of version 3 with general.alignment %d",
                           path_shown(c->path), (int)HEPTA_ALIGNMENT);
    }
    if (status == HEPTA_OK) {
        status = hepta_check_required(c, err);
    }
    if (status == HEPTA_OK) {
        status = check_padding(c, infos_end, header_size, err);
    }
    if (status == HEPTA_OK) {
        status = check_layout(c, header_size, err);
    }
    if (status == HEPTA_OK) {
        status = find_tables(c, &tables, err);
    }
    for (size_t i = 0; status == HEPTA_OK && i < c->n_tensors; i++) {
        status = describe_tensor(c, &tables, i, err);
    }
    return status;
}
