/*
 * gguf_write.c - writing .hepta files, and plain GGUF files by the same path.
 *
 * The header is built in memory with every checksum digit '0' and goes to the file first; then
 * the tensors' bytes stream through, hashed as they pass; at the end the digits are filled in, the
 * tensors' first and last of all the one over the header itself.
 *
 * Invariant: the file is a function of the arguments alone: keys come in a fixed order, padding
 * is zero, no time or name of this machine enters. Documented in docs/FORMAT.md.
 */
#include "format/private.h"

#include <string.h>

struct hepta_writer {
    file_writer *file;
    bool plain; /* GGUF: no keys of ours, no checksums */
    uint8_t *header;
    size_t header_size;
    size_t file_digits;   /* where in the header hepta.file.sha256's digits stand */
    size_t tensor_digits; /* ... and those of tensor 0; the others follow 8 + 64 bytes apart */
    size_t n_tensors, at; /* the tensor at hand */
    uint64_t *n_bytes;    /* (n_tensors) */
    uint64_t written;     /* of the tensor at hand */
    sha256 hash;          /* of the tensor at hand */
    arena memory;
    const char *path;
    const char **names; /* (n_tensors) */
    uint64_t journal;   /* where in a part file the journal begins; 0: no part file */
    uint64_t synced;    /* bytes that are on the disk */
};

/* The journal behind the data of a part file: what the file is to become, and what is there. */
typedef struct journal_head {
    uint8_t magic[32], identity[32], header[32]; /* header: its SHA-256, all digits '0' */
} journal_head;

static const uint8_t journal_magic[32] = "hepta part file 1";
static const uint64_t sync_step = 64 << 20;

/* ---- A growing buffer -------------------------------------------------- */

typedef struct buffer {
    uint8_t *data;
    size_t n, capacity;
    bool failed; /* memory ran out; everything after is ignored */
} buffer;

static void put(buffer *b, const void *data, uint64_t n) {
    uint64_t needed;
    if (b->failed || n == 0) {
        return;
    }
    if (add_overflows(b->n, n, &needed) || needed > SIZE_MAX / 4) {
        b->failed = true;
        return;
    }
    if (needed > b->capacity) {
        size_t capacity = needed < 65536 ? 65536 : (size_t)needed * 2;
        uint8_t *bigger = memory_resize(b->data, b->n, capacity, 1);
        if (bigger == NULL) {
            b->failed = true;
            return;
        }
        b->data = bigger;
        b->capacity = capacity;
    }
    memcpy(b->data + b->n, data, (size_t)n);
    b->n = (size_t)needed;
}

/* The low n bytes of v, little-endian. */
static void put_int(buffer *b, uint64_t v, uint64_t n) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(v >> 8 * i);
    }
    put(b, bytes, n);
}

static void put_string(buffer *b, const char *s, uint64_t n) {
    put_int(b, n, 8);
    put(b, s, n);
}

static void put_key(buffer *b, const char *key, kv_type type) {
    put_string(b, key, strlen(key));
    put_int(b, type, 4);
}

static void put_array_key(buffer *b, const char *key, kv_type item_type, uint64_t n) {
    put_key(b, key, KV_ARRAY);
    put_int(b, item_type, 4);
    put_int(b, n, 8);
}

static void put_zeros(buffer *b, size_t alignment) {
    static const uint8_t zeros[HEPTA_ALIGNMENT];
    put(b, zeros, round_up(b->n, alignment) - b->n);
}

static void put_zero_digits(buffer *b) {
    char digits[FORMAT_SHA256_HEX];
    memset(digits, '0', sizeof digits);
    put_string(b, digits, sizeof digits);
}

static void put_kv(buffer *b, const kv *k) {
    put_string(b, k->key.data, k->key.n);
    put_int(b, k->type, 4);
    switch (k->type) {
    case KV_STRING:
        put_string(b, k->v.s.data, k->v.s.n);
        break;
    case KV_ARRAY:
        put_int(b, k->item_type, 4);
        put_int(b, k->n_items, 8);
        if (k->item_type == KV_STRING) {
            for (uint64_t i = 0; i < k->n_items; i++) {
                kv_string s = kv_item_string(k, i);
                put_string(b, s.data, s.n);
            }
        } else {
            put(b, k->v.items, k->n_items * kv_type_size(k->item_type));
        }
        break;
    case KV_F32: {
        float f = (float)k->v.f;
        uint32_t bits;
        memcpy(&bits, &f, sizeof bits);
        put_int(b, bits, 4);
        break;
    }
    case KV_F64: {
        uint64_t bits;
        memcpy(&bits, &k->v.f, sizeof bits);
        put_int(b, bits, 8);
        break;
    }
    case KV_I8:
    case KV_I16:
    case KV_I32:
    case KV_I64:
        put_int(b, (uint64_t)k->v.i, kv_type_size(k->type));
        break;
    default: /* unsigned, bool */
        put_int(b, k->v.u, kv_type_size(k->type));
        break;
    }
}

/* ---- The header -------------------------------------------------------- */

/* Size of tensor t in the file; fails where a reader would refuse it. */
static hepta_status tensor_size(const char *path, const tensor *t, uint64_t *out,
                                hepta_error *err) {
    size_t length = strlen(t->name);
    bool named = length > 0 && length <= FORMAT_MAX_NAME;
    bool shaped = t->n_dims >= 1 && t->n_dims <= 4;
    for (uint32_t i = t->n_dims; shaped && i < 4; i++) {
        shaped = t->ne[i] == 1;
    }
    if (t->type == TENSOR_PACKED) {
        shaped =
            shaped && t->n_dims == 2 && tensor_packed_bytes(t->half_bits, t->ne[1], t->ne[0], out);
    } else {
        shaped = shaped && tensor_type_bytes(t->type, t->ne, out);
    }
    if (!named || !shaped) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%s: tensor \"%.80s\" of type %s, %u half bits, %u dimensions %" PRIu64
                         " x %" PRIu64 " cannot be written",
                         path_shown(path), t->name, tensor_type_name(t->type),
                         (unsigned)t->half_bits, (unsigned)t->n_dims, t->ne[0], t->ne[1]);
    }
    return HEPTA_OK;
}

static void put_tensor_tables(buffer *b, const tensor *tensors, size_t n, size_t *digits) {
    put_array_key(b, "hepta.tensor.names", KV_STRING, n);
    for (size_t i = 0; i < n; i++) {
        put_string(b, tensors[i].name, strlen(tensors[i].name));
    }
    put_array_key(b, "hepta.tensor.half_bits", KV_U8, n);
    for (size_t i = 0; i < n; i++) {
        put_int(b, tensors[i].type == TENSOR_PACKED ? tensors[i].half_bits : 0, 1);
    }
    put_array_key(b, "hepta.tensor.rows", KV_U64, n);
    for (size_t i = 0; i < n; i++) {
        put_int(b, tensors[i].ne[1] * tensors[i].ne[2] * tensors[i].ne[3], 8);
    }
    put_array_key(b, "hepta.tensor.cols", KV_U64, n);
    for (size_t i = 0; i < n; i++) {
        put_int(b, tensors[i].ne[0], 8);
    }
    put_array_key(b, "hepta.tensor.sha256", KV_STRING, n);
    *digits = b->n + 8;
    for (size_t i = 0; i < n; i++) {
        put_zero_digits(b);
    }
}

static void put_tensor_infos(buffer *b, const tensor *tensors, const uint64_t *n_bytes, size_t n) {
    uint64_t offset = 0;
    for (size_t i = 0; i < n; i++) {
        const tensor *t = &tensors[i];
        bool packed = t->type == TENSOR_PACKED;
        put_string(b, t->name, strlen(t->name));
        put_int(b, packed ? 1 : t->n_dims, 4);
        if (packed) {
            put_int(b, n_bytes[i], 8);
        }
        for (uint32_t d = 0; !packed && d < t->n_dims; d++) {
            put_int(b, t->ne[d], 8);
        }
        put_int(b, packed ? TENSOR_I8 : t->type, 4);
        put_int(b, offset, 8);
        offset = round_up(offset + n_bytes[i], HEPTA_ALIGNMENT);
    }
}

static void put_header(buffer *b, hepta_writer *w, const kv *kvs, size_t n_kvs,
                       const tensor *tensors) {
    const uint64_t n_own = w->plain ? 1 : 8;
    uint64_t n_kept = 0;
    for (size_t i = 0; i < n_kvs; i++) {
        n_kept += !hepta_key_is_computed(kvs[i].key);
    }
    put(b, "GGUF", 4);
    put_int(b, 3, 4);
    put_int(b, w->n_tensors, 8);
    put_int(b, n_kept + n_own, 8);
    if (!w->plain) {
        put_key(b, "hepta.version", KV_U32);
        put_int(b, HEPTA_FILE_VERSION, 4);
        put_key(b, "hepta.file.sha256", KV_STRING);
        w->file_digits = b->n + 8;
        put_zero_digits(b);
    }
    put_key(b, "general.alignment", KV_U32);
    put_int(b, HEPTA_ALIGNMENT, 4);
    for (size_t i = 0; i < n_kvs; i++) {
        if (!hepta_key_is_computed(kvs[i].key)) {
            put_kv(b, &kvs[i]);
        }
    }
    if (!w->plain) {
        put_tensor_tables(b, tensors, w->n_tensors, &w->tensor_digits);
    }
    put_tensor_infos(b, tensors, w->n_bytes, w->n_tensors);
    put_zeros(b, HEPTA_ALIGNMENT);
}

/* ---- The writer -------------------------------------------------------- */

static void writer_free(hepta_writer *w) {
    memory_free(w->header);
    arena_free(&w->memory);
    memory_free(w);
}

void hepta_writer_keep(hepta_writer *w) {
    if (w != NULL) {
        file_writer_keep(w->file);
        writer_free(w);
    }
}

void hepta_writer_discard(hepta_writer *w) {
    if (w != NULL) {
        file_writer_discard(w->file);
        writer_free(w);
    }
}

static hepta_status no_memory(const char *path, hepta_error *err) {
    return error_set(err, HEPTA_ERROR_MEMORY, "out of memory writing %s", path_shown(path));
}

/* Fills in what hepta_writer_write and _commit need to know of the tensors. */
static hepta_status list_tensors(hepta_writer *w, const char *path, const tensor *tensors, size_t n,
                                 hepta_error *err) {
    w->n_tensors = n;
    w->path = arena_copy_string(&w->memory, path, strlen(path));
    w->n_bytes = arena_alloc(&w->memory, n, sizeof *w->n_bytes);
    w->names = arena_alloc(&w->memory, n, sizeof *w->names);
    if (w->path == NULL || w->n_bytes == NULL || w->names == NULL) {
        return no_memory(path, err);
    }
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) {
        hepta_status status = tensor_size(path, &tensors[i], &w->n_bytes[i], err);
        if (status != HEPTA_OK) {
            return status;
        }
        if (add_overflows(total, w->n_bytes[i], &total) || total > INT64_MAX / 2) {
            return error_set(err, HEPTA_ERROR_ARGUMENT, "%s: the tensors are too large for a file",
                             path_shown(path));
        }
        w->names[i] = arena_copy_string(&w->memory, tensors[i].name, strlen(tensors[i].name));
        if (w->names[i] == NULL) {
            return no_memory(path, err);
        }
    }
    return HEPTA_OK;
}

/* No reader would take a file with two keys or tensors of one name, or without these keys. */
static hepta_status check_names(const char *path, const kv *kvs, size_t n_kvs,
                                const tensor *tensors, size_t n_tensors, bool plain,
                                hepta_error *err) {
    container names = {.path = path};
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; status == HEPTA_OK && i < n_kvs; i++) {
        status = container_add_kv(&names, &kvs[i], err);
    }
    for (size_t i = 0; status == HEPTA_OK && i < n_tensors; i++) {
        status = container_add_tensor(&names, &tensors[i], err);
    }
    if (status == HEPTA_OK && !plain) {
        status = hepta_check_required(&names, err);
    }
    container_clear(&names);
    if (status == HEPTA_ERROR_FORMAT) { /* of the arguments, not of a file */
        status = HEPTA_ERROR_ARGUMENT;
        if (err != NULL) {
            err->status = status;
        }
    }
    return status;
}

/* All but the file. */
static hepta_status writer_prepare(const char *path, bool plain, const kv *kvs, size_t n_kvs,
                                   const tensor *tensors, size_t n_tensors, hepta_writer **out,
                                   hepta_error *err) {
    hepta_writer *w = memory_alloc(1, sizeof *w);
    if (w == NULL) {
        return no_memory(path, err);
    }
    w->plain = plain;
    buffer b = {.data = NULL};
    hepta_status status = check_names(path, kvs, n_kvs, tensors, n_tensors, plain, err);
    if (status == HEPTA_OK) {
        status = list_tensors(w, path, tensors, n_tensors, err);
    }
    if (status == HEPTA_OK) {
        put_header(&b, w, kvs, n_kvs, tensors);
        w->header = b.data;
        w->header_size = b.n;
        status = b.failed ? no_memory(path, err) : HEPTA_OK;
    }
    if (status != HEPTA_OK) {
        hepta_writer_discard(w);
        return status;
    }
    sha256_start(&w->hash);
    *out = w;
    return HEPTA_OK;
}

static hepta_status writer_open(const char *path, bool plain, const kv *kvs, size_t n_kvs,
                                const tensor *tensors, size_t n_tensors, hepta_writer **out,
                                hepta_error *err) {
    hepta_writer *w = NULL;
    hepta_status status = writer_prepare(path, plain, kvs, n_kvs, tensors, n_tensors, &w, err);
    if (status != HEPTA_OK) {
        return status;
    }
    status = file_writer_open(path, &w->file, err);
    if (status == HEPTA_OK) {
        status = file_writer_write(w->file, w->header, w->header_size, err);
    }
    if (status != HEPTA_OK) {
        hepta_writer_discard(w);
        return status;
    }
    *out = w;
    return HEPTA_OK;
}

/* The SHA-256 of n bytes of the part file at `offset`; false where it ends before. */
static bool hash_part(const file_writer *file, uint64_t offset, uint64_t n, uint8_t digest[32]) {
    uint8_t piece[16384];
    sha256 hash;
    sha256_start(&hash);
    for (uint64_t done = 0; done < n;) {
        const size_t k = n - done < sizeof piece ? (size_t)(n - done) : sizeof piece;
        if (file_writer_read(file, offset + done, piece, k) != k) {
            return false;
        }
        sha256_update(&hash, piece, k);
        done += k;
    }
    sha256_finish(&hash, digest);
    return true;
}

static void put_tensor_digest(hepta_writer *w, const uint8_t digest[32]) {
    char hex[FORMAT_SHA256_HEX + 1];
    sha256_hex(digest, hex);
    memcpy(w->header + w->tensor_digits + w->at * (8 + FORMAT_SHA256_HEX), hex, FORMAT_SHA256_HEX);
}

/* Goes over what the part file says it holds, as far as it is true. */
static uint64_t skip_finished(hepta_writer *w, size_t *n_done) {
    uint64_t offset = w->header_size;
    for (; w->at < w->n_tensors; w->at++) {
        uint8_t noted[32], found[32];
        const uint64_t entry = w->journal + sizeof(journal_head) + w->at * sizeof noted;
        if (file_writer_read(w->file, entry, noted, sizeof noted) != sizeof noted ||
            !hash_part(w->file, offset, w->n_bytes[w->at], found) ||
            memcmp(noted, found, sizeof noted) != 0) {
            break;
        }
        put_tensor_digest(w, found);
        offset = round_up(offset + w->n_bytes[w->at], HEPTA_ALIGNMENT);
    }
    *n_done = w->at;
    return offset;
}

hepta_status hepta_writer_resume(const char *path, const uint8_t identity[32], const kv *kvs,
                                 size_t n_kvs, const tensor *tensors, size_t n_tensors,
                                 hepta_writer **out, size_t *n_done, hepta_error *err) {
    hepta_writer *w = NULL;
    hepta_status status = writer_prepare(path, false, kvs, n_kvs, tensors, n_tensors, &w, err);
    if (status != HEPTA_OK) {
        return status;
    }
    w->journal = w->header_size;
    for (size_t i = 0; i < n_tensors; i++) {
        w->journal += round_up(w->n_bytes[i], HEPTA_ALIGNMENT);
    }
    journal_head head, there;
    sha256 hash;
    memcpy(head.magic, journal_magic, sizeof head.magic);
    memcpy(head.identity, identity, sizeof head.identity);
    sha256_start(&hash);
    sha256_update(&hash, w->header, w->header_size);
    sha256_finish(&hash, head.header);
    status = file_writer_open_part(path, &w->file, err);
    if (status != HEPTA_OK) {
        hepta_writer_discard(w);
        return status;
    }
    uint8_t byte;
    *n_done = 0;
    uint64_t offset = w->header_size;
    const bool fresh = file_writer_read(w->file, 0, &byte, 1) == 0;
    if (fresh) {
        /* the journal first: a file that has none is refused */
        status = file_writer_patch(w->file, w->journal, &head, sizeof head, err);
        if (status == HEPTA_OK) {
            status = file_writer_write(w->file, w->header, w->header_size, err);
        }
    } else if (file_writer_read(w->file, w->journal, &there, sizeof there) == sizeof there &&
               memcmp(&there, &head, sizeof head) == 0) {
        offset = skip_finished(w, n_done);
    } else {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "%s is part of a file from another model or with other options: remove "
                           "it, or repeat the command that it was begun with",
                           path_shown(file_writer_part(w->file)));
    }
    if (status == HEPTA_OK) {
        status = file_writer_go_on_at(w->file, offset, err);
    }
    if (status != HEPTA_OK && fresh) {
        hepta_writer_discard(w);
    } else if (status != HEPTA_OK) {
        hepta_writer_keep(w);
    } else {
        *out = w;
    }
    return status;
}

hepta_status hepta_writer_open(const char *path, const kv *kvs, size_t n_kvs, const tensor *tensors,
                               size_t n_tensors, hepta_writer **out, hepta_error *err) {
    return writer_open(path, false, kvs, n_kvs, tensors, n_tensors, out, err);
}

hepta_status gguf_writer_open(const char *path, const kv *kvs, size_t n_kvs, const tensor *tensors,
                              size_t n_tensors, hepta_writer **out, hepta_error *err) {
    return writer_open(path, true, kvs, n_kvs, tensors, n_tensors, out, err);
}

/* All bytes of the tensor at hand are written: digits, padding, next tensor. */
static hepta_status finish_tensor(hepta_writer *w, hepta_error *err) {
    static const uint8_t zeros[HEPTA_ALIGNMENT];
    const uint64_t offset = file_writer_offset(w->file);
    hepta_status status = file_writer_write(
        w->file, zeros, (size_t)(round_up(offset, HEPTA_ALIGNMENT) - offset), err);
    if (!w->plain) {
        uint8_t digest[32];
        sha256_finish(&w->hash, digest);
        put_tensor_digest(w, digest);
        sha256_start(&w->hash);
        if (w->journal != 0 && status == HEPTA_OK) {
            const uint64_t entry = w->journal + sizeof(journal_head) + w->at * sizeof digest;
            status = file_writer_patch(w->file, entry, digest, sizeof digest, err);
        }
    }
    if (w->journal != 0 && status == HEPTA_OK && offset - w->synced >= sync_step) {
        status = file_writer_sync(w->file, err);
        w->synced = offset;
    }
    w->at++;
    w->written = 0;
    return status;
}

hepta_status hepta_writer_write(hepta_writer *w, const void *data, size_t n, hepta_error *err) {
    if (n == 0) {
        return HEPTA_OK;
    }
    if (w->at == w->n_tensors || n > w->n_bytes[w->at] - w->written) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%s: %zu bytes more than tensor %.80s has room for (%" PRIu64
                         " bytes, %" PRIu64 " written)",
                         path_shown(w->path), n,
                         w->at < w->n_tensors ? w->names[w->at] : "(none left)",
                         w->at < w->n_tensors ? w->n_bytes[w->at] : 0, w->written);
    }
    hepta_status status = file_writer_write(w->file, data, n, err);
    if (status != HEPTA_OK) {
        return status;
    }
    if (!w->plain) {
        sha256_update(&w->hash, data, n);
    }
    w->written += n;
    return w->written == w->n_bytes[w->at] ? finish_tensor(w, err) : HEPTA_OK;
}

hepta_status hepta_writer_commit(hepta_writer *w, hepta_error *err) {
    hepta_status status = HEPTA_OK;
    if (w->at < w->n_tensors) {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "%s: tensor %.80s is incomplete: %" PRIu64 " of %" PRIu64 " bytes",
                           path_shown(w->path), w->names[w->at], w->written, w->n_bytes[w->at]);
    }
    if (status == HEPTA_OK && !w->plain) {
        sha256 s;
        uint8_t digest[32];
        char hex[FORMAT_SHA256_HEX + 1];
        sha256_start(&s);
        sha256_update(&s, w->header, w->header_size);
        sha256_finish(&s, digest);
        sha256_hex(digest, hex);
        memcpy(w->header + w->file_digits, hex, FORMAT_SHA256_HEX);
        status = file_writer_patch(w->file, 0, w->header, w->header_size, err);
    }
    if (status == HEPTA_OK) {
        file_writer *file = w->file;
        w->file = NULL;
        status = file_writer_commit(file, err);
    }
    hepta_writer_discard(w);
    return status;
}
