/*
 * gguf.c - reading GGUF, versions 2 and 3, little-endian; models in several files as one.
 *
 * A GGUF file is: magic, version, counts; metadata (key, type, value); tensor descriptions (name,
 * shape, type, offset); padding; tensor data. One cursor walks it from front to back; nothing is
 * read, and no memory asked for, before the bytes are known to be there.
 *
 * A model split into NAME-00001-of-0000N.gguf is opened through any of its files; metadata come
 * from the first, tensors from all, and the split.* keys are dropped.
 *
 * Specification: github.com/ggml-org/ggml, docs/gguf.md. Ours: docs/FORMAT.md.
 */
#include "format/private.h"

#include <stdio.h>
#include <string.h>

enum { DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 1 << 20, MIN_KV_BYTES = 13, MIN_TENSOR_BYTES = 33 };

/* ---- Cursor ------------------------------------------------------------ */

typedef struct cursor {
    container *c;      /* receives the tensors */
    container *meta;   /* receives the metadata */
    const char *path;  /* lives as long as c */
    const char *shown; /* in messages */
    const uint8_t *data;
    uint64_t size, at;
    hepta_error *err;
} cursor;

static uint64_t left(const cursor *cur) {
    return cur->size - cur->at;
}

/* The next n bytes; `what` they are, for the message when the file ends before. */
static hepta_status take(cursor *cur, uint64_t n, const char *what, const uint8_t **out) {
    if (n > left(cur)) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: the file ends too early: %s at byte %" PRIu64 " needs %" PRIu64
                         " bytes, %" PRIu64 " are left; the file is cut short or damaged",
                         cur->shown, what, cur->at, n, left(cur));
    }
    *out = cur->data + cur->at;
    cur->at += n;
    return HEPTA_OK;
}

static hepta_status take_u32(cursor *cur, const char *what, uint32_t *out) {
    const uint8_t *p;
    hepta_status status = take(cur, 4, what, &p);
    if (status == HEPTA_OK) {
        *out = load_u32(p);
    }
    return status;
}

static hepta_status take_u64(cursor *cur, const char *what, uint64_t *out) {
    const uint8_t *p;
    hepta_status status = take(cur, 8, what, &p);
    if (status == HEPTA_OK) {
        *out = load_u64(p);
    }
    return status;
}

static hepta_status take_string(cursor *cur, const char *what, uint64_t max, kv_string *out) {
    uint64_t at = cur->at, n;
    hepta_status status = take_u64(cur, what, &n);
    if (status != HEPTA_OK) {
        return status;
    }
    if (n > max) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: %s at byte %" PRIu64 " claims a length of %" PRIu64
                         " bytes; expected at most %" PRIu64,
                         cur->shown, what, at, n, max);
    }
    const uint8_t *p;
    status = take(cur, n, what, &p);
    if (status == HEPTA_OK) {
        *out = (kv_string){(const char *)p, n};
    }
    return status;
}

/* ---- Metadata ---------------------------------------------------------- */

static hepta_status bad_bool(cursor *cur, const kv *k, uint64_t at, uint8_t found) {
    return error_set(cur->err, HEPTA_ERROR_FORMAT,
                     "%s: key %.*s: the byte at %" PRIu64 " is %u; a bool is 0 or 1", cur->shown,
                     SHOWN(k->key.n), k->key.data, at, (unsigned)found);
}

/* A scalar of k->type at p into k->v. */
static hepta_status decode_scalar(cursor *cur, kv *k, const uint8_t *p) {
    uint64_t bits;
    uint32_t bits32;
    float f;
    switch (k->type) {
    case KV_BOOL:
        if (p[0] > 1) {
            return bad_bool(cur, k, cur->at - 1, p[0]);
        }
        k->v.u = p[0];
        break;
    case KV_U8:
        k->v.u = p[0];
        break;
    case KV_I8:
        k->v.i = (int8_t)p[0];
        break;
    case KV_U16:
        k->v.u = load_u16(p);
        break;
    case KV_I16:
        k->v.i = (int16_t)load_u16(p);
        break;
    case KV_U32:
        k->v.u = load_u32(p);
        break;
    case KV_I32:
        k->v.i = (int32_t)load_u32(p);
        break;
    case KV_U64:
        k->v.u = load_u64(p);
        break;
    case KV_I64:
        k->v.i = (int64_t)load_u64(p);
        break;
    case KV_F32:
        bits32 = load_u32(p);
        memcpy(&f, &bits32, sizeof f);
        k->v.f = (double)f;
        break;
    default: /* KV_F64 */
        bits = load_u64(p);
        memcpy(&k->v.f, &bits, sizeof k->v.f);
        break;
    }
    return HEPTA_OK;
}

static hepta_status take_array(cursor *cur, kv *k) {
    uint32_t item_type;
    uint64_t at = cur->at;
    hepta_status status = take_u32(cur, "the item type of an array", &item_type);
    if (status == HEPTA_OK) {
        status = take_u64(cur, "the length of an array", &k->n_items);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    if (item_type == KV_ARRAY) {
        return error_set(cur->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: key %.*s at byte %" PRIu64 " is an array of arrays; only arrays of "
                         "numbers and strings are read",
                         cur->shown, SHOWN(k->key.n), k->key.data, at);
    }
    if (item_type > KV_F64) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: key %.*s: item type %" PRIu32 " at byte %" PRIu64
                         "; expected 0 to 12",
                         cur->shown, SHOWN(k->key.n), k->key.data, item_type, at);
    }
    k->item_type = (kv_type)item_type;
    uint64_t size = k->item_type == KV_STRING ? 8 : kv_type_size(k->item_type);
    if (k->n_items > left(cur) / size) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: key %.*s at byte %" PRIu64 " claims %" PRIu64
                         " items, more than the %" PRIu64
                         " bytes left hold; the file is cut short or damaged",
                         cur->shown, SHOWN(k->key.n), k->key.data, at, k->n_items, left(cur));
    }
    if (k->item_type != KV_STRING) {
        const uint8_t *items = NULL;
        status = take(cur, k->n_items * size, "an array", &items);
        k->v.items = items;
        for (uint64_t i = 0; status == HEPTA_OK && k->item_type == KV_BOOL && i < k->n_items; i++) {
            if (items[i] > 1) {
                status = bad_bool(cur, k, (uint64_t)(items + i - cur->data), items[i]);
            }
        }
        return status;
    }
    kv_string *strings = arena_alloc(&cur->meta->memory, (size_t)k->n_items, sizeof *strings);
    if (strings == NULL) {
        return error_set(cur->err, HEPTA_ERROR_MEMORY,
                         "%s: out of memory for key %.*s of %" PRIu64 " strings", cur->shown,
                         SHOWN(k->key.n), k->key.data, k->n_items);
    }
    for (uint64_t i = 0; i < k->n_items && status == HEPTA_OK; i++) {
        status = take_string(cur, "a string of an array", UINT64_MAX, &strings[i]);
    }
    k->v.items = strings;
    return status;
}

static hepta_status take_kv(cursor *cur) {
    kv k = {.type = KV_U8};
    uint32_t type;
    hepta_status status = take_string(cur, "a metadata key", FORMAT_MAX_KEY, &k.key);
    uint64_t at = cur->at;
    if (status == HEPTA_OK) {
        status = take_u32(cur, "the type of a metadata value", &type);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    if (type > KV_F64) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: key %.*s: value type %" PRIu32 " at byte %" PRIu64
                         "; expected 0 to 12",
                         cur->shown, SHOWN(k.key.n), k.key.data, type, at);
    }
    k.type = (kv_type)type;
    if (k.type == KV_STRING) {
        status = take_string(cur, "a metadata string", UINT64_MAX, &k.v.s);
    } else if (k.type == KV_ARRAY) {
        status = take_array(cur, &k);
    } else {
        const uint8_t *p;
        status = take(cur, kv_type_size(k.type), "a metadata value", &p);
        if (status == HEPTA_OK) {
            status = decode_scalar(cur, &k, p);
        }
    }
    return status == HEPTA_OK ? container_add_kv(cur->meta, &k, cur->err) : status;
}

static hepta_status read_alignment(cursor *cur, uint64_t *out) {
    const kv *k = container_find(cur->meta, "general.alignment");
    if (k == NULL) {
        *out = DEFAULT_ALIGNMENT;
        return HEPTA_OK;
    }
    if (k->type != KV_U32 || k->v.u == 0 || k->v.u % 8 != 0 || k->v.u > MAX_ALIGNMENT) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: general.alignment is of type %s and value %" PRIu64
                         "; expected a u32, a multiple of 8 up to %d",
                         cur->shown, kv_type_name(k->type), k->type == KV_U32 ? k->v.u : 0,
                         (int)MAX_ALIGNMENT);
    }
    *out = k->v.u;
    return HEPTA_OK;
}

/* ---- Tensors ----------------------------------------------------------- */

static hepta_status take_tensor_name(cursor *cur, char name[FORMAT_MAX_NAME + 1]) {
    kv_string s;
    uint64_t at = cur->at;
    hepta_status status = take_string(cur, "the name of a tensor", FORMAT_MAX_NAME, &s);
    if (status != HEPTA_OK) {
        return status;
    }
    if (s.n == 0 || memchr(s.data, '\0', (size_t)s.n) != NULL) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: the tensor name at byte %" PRIu64 " is empty or holds a zero byte",
                         cur->shown, at);
    }
    memcpy(name, s.data, (size_t)s.n);
    name[s.n] = '\0';
    return HEPTA_OK;
}

static hepta_status take_shape(cursor *cur, tensor *t) {
    hepta_status status = take_u32(cur, "the number of dimensions of a tensor", &t->n_dims);
    if (status != HEPTA_OK) {
        return status;
    }
    if (t->n_dims < 1 || t->n_dims > 4) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s at byte %" PRIu64 " has %" PRIu32
                         " dimensions; expected 1 to 4",
                         cur->shown, t->name, cur->at - 4, t->n_dims);
    }
    for (uint32_t i = 0; i < 4; i++) {
        t->ne[i] = 1;
        if (i < t->n_dims && status == HEPTA_OK) {
            status = take_u64(cur, "a dimension of a tensor", &t->ne[i]);
        }
    }
    return status;
}

/* A tensor description; t->offset counts from the start of the data section as yet. */
static hepta_status take_tensor(cursor *cur, uint64_t alignment) {
    char name[FORMAT_MAX_NAME + 1];
    tensor t = {.name = name, .file = cur->path};
    uint64_t at = cur->at;
    hepta_status status = take_tensor_name(cur, name);
    if (status == HEPTA_OK) {
        status = take_shape(cur, &t);
    }
    if (status == HEPTA_OK) {
        status = take_u32(cur, "the type of a tensor", &t.type);
    }
    if (status == HEPTA_OK) {
        status = take_u64(cur, "the offset of a tensor", &t.offset);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    uint64_t items, bytes;
    if (!tensor_type_block(t.type, &items, &bytes)) {
        return error_set(cur->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: tensor %.80s at byte %" PRIu64 " has the unknown type %" PRIu32
                         "; this program may be older than the file",
                         cur->shown, name, at, t.type);
    }
    if (!tensor_type_bytes(t.type, t.ne, &t.n_bytes)) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s at byte %" PRIu64 " has the impossible shape %" PRIu64
                         " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
                         " for type %s (blocks of %" PRIu64 ")",
                         cur->shown, name, at, t.ne[0], t.ne[1], t.ne[2], t.ne[3],
                         tensor_type_name(t.type), items);
    }
    if (t.offset % alignment != 0) {
        return error_set(cur->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s at byte %" PRIu64 " has the offset %" PRIu64
                         ", no multiple of the alignment %" PRIu64,
                         cur->shown, name, at, t.offset, alignment);
    }
    return container_add_tensor(cur->c, &t, cur->err);
}

/* Turns offsets into places in the mapping, for the tensors from number `first` on. */
static hepta_status place_tensors(cursor *cur, size_t first, uint64_t data_start) {
    for (size_t i = first; i < cur->c->n_tensors; i++) {
        tensor *t = &cur->c->tensors[i];
        uint64_t end;
        if (add_overflows(t->offset, data_start, &t->offset) ||
            add_overflows(t->offset, t->n_bytes, &end) || end > cur->size) {
            return error_set(cur->err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.80s takes %" PRIu64 " bytes from byte %" PRIu64
                             " on, but the file has %" PRIu64 "; it is cut short or damaged",
                             cur->shown, t->name, t->n_bytes, t->offset, cur->size);
        }
        t->data = cur->data + t->offset;
    }
    return HEPTA_OK;
}

/* ---- One file ---------------------------------------------------------- */

static hepta_status check_version(cursor *cur, uint32_t version) {
    if (version == 2 || version == 3) {
        return HEPTA_OK;
    }
    if (version == 1) {
        return error_set(cur->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: GGUF version 1 (of August 2023) is not read, versions 2 and 3 are; "
                         "convert the original model again",
                         cur->shown);
    }
    if ((version & 0xffff) == 0) {
        return error_set(cur->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: a big-endian GGUF; only little-endian files are read (convert it "
                         "with gguf-convert-endian)",
                         cur->shown);
    }
    return error_set(cur->err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: GGUF version %" PRIu32 "; versions 2 and 3 are read", cur->shown,
                     version);
}

static hepta_status check_count(cursor *cur, const char *what, uint64_t n, uint64_t max,
                                uint64_t min_bytes) {
    if (n <= max && n <= left(cur) / min_bytes) {
        return HEPTA_OK;
    }
    return error_set(cur->err, HEPTA_ERROR_FORMAT,
                     "%s: the header claims %" PRIu64 " %s; expected at most %" PRIu64
                     ", of %" PRIu64 " bytes or more each in the %" PRIu64
                     " that follow; the file is cut short or damaged",
                     cur->shown, n, what, max, min_bytes, left(cur));
}

/* Magic number, version, counts. */
static hepta_status take_start(cursor *cur, uint64_t *n_tensors, uint64_t *n_kvs) {
    const uint8_t *magic;
    hepta_status status = take(cur, 4, "the magic number", &magic);
    if (status == HEPTA_OK && memcmp(magic, "GGUF", 4) != 0) {
        status = error_set(cur->err, HEPTA_ERROR_FORMAT,
                           "%s: expected a GGUF file, found the bytes %02x %02x %02x %02x at its "
                           "start",
                           cur->shown, magic[0], magic[1], magic[2], magic[3]);
    }
    if (status == HEPTA_OK) {
        status = take_u32(cur, "the version", &cur->meta->version);
    }
    if (status == HEPTA_OK) {
        status = check_version(cur, cur->meta->version);
    }
    if (status == HEPTA_OK) {
        status = take_u64(cur, "the number of tensors", n_tensors);
    }
    if (status == HEPTA_OK) {
        status = take_u64(cur, "the number of metadata keys", n_kvs);
    }
    if (status == HEPTA_OK) {
        status = check_count(cur, "tensors", *n_tensors, FORMAT_MAX_TENSORS, MIN_TENSOR_BYTES);
    }
    if (status == HEPTA_OK) {
        status = check_count(cur, "metadata keys", *n_kvs, FORMAT_MAX_KVS, MIN_KV_BYTES);
    }
    return status;
}

/* Bytes before the data section, without and with padding. */
typedef struct extent {
    uint64_t used, padded;
} extent;

/*
 * Reads one file: mapping and tensors go to c, metadata to meta (the same for the first or only
 * file).
 */
static hepta_status read_file(const char *path, container *c, container *meta, extent *header,
                              hepta_error *err) {
    file_map map;
    hepta_status status = container_add_map(c, path, &map, err);
    if (status != HEPTA_OK) {
        return status;
    }
    cursor cur = {.c = c,
                  .meta = meta,
                  .path = path,
                  .shown = path_shown(path),
                  .data = map.data,
                  .size = map.size,
                  .err = err};
    uint64_t n_tensors = 0, n_kvs = 0, alignment = 0;
    size_t first = c->n_tensors;
    status = take_start(&cur, &n_tensors, &n_kvs);
    for (uint64_t i = 0; status == HEPTA_OK && i < n_kvs; i++) {
        status = take_kv(&cur);
    }
    if (status == HEPTA_OK) {
        status = read_alignment(&cur, &alignment);
    }
    for (uint64_t i = 0; status == HEPTA_OK && i < n_tensors; i++) {
        status = take_tensor(&cur, alignment);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    *header = (extent){cur.at, round_up(cur.at, alignment)};
    return place_tensors(&cur, first, header->padded);
}

/* ---- Several files ----------------------------------------------------- */

enum { SUFFIX_LENGTH = 20 }; /* of "-00001-of-00003.gguf" */

/* The path of file `number` (from 1) of `count`, given that of another; NULL: no memory. */
static char *shard_path(container *c, const char *path, uint32_t number, uint32_t count) {
    char suffix[SUFFIX_LENGTH + 32];
    snprintf(suffix, sizeof suffix, "-%05" PRIu32 "-of-%05" PRIu32 ".gguf", number, count);
    size_t n = strlen(path);
    char *result = arena_copy_string(&c->memory, path, n);
    if (result != NULL) {
        memcpy(result + n - SUFFIX_LENGTH, suffix, SUFFIX_LENGTH);
    }
    return result;
}

/* True when the path ends like that of one file of several. */
static bool parse_shard_path(const char *path, uint32_t *number, uint32_t *count) {
    static const char pattern[] = "-ddddd-of-ddddd.gguf";
    size_t n = strlen(path);
    if (n < SUFFIX_LENGTH) {
        return false;
    }
    uint32_t values[2] = {0, 0};
    const char *s = path + n - SUFFIX_LENGTH;
    for (size_t i = 0; i < SUFFIX_LENGTH; i++) {
        bool digit = s[i] >= '0' && s[i] <= '9';
        if (pattern[i] == 'd' ? !digit : s[i] != pattern[i]) {
            return false;
        }
        if (pattern[i] == 'd') {
            uint32_t *v = &values[i > 6];
            *v = *v * 10 + (uint32_t)(s[i] - '0');
        }
    }
    *number = values[0];
    *count = values[1];
    return true;
}

typedef struct split_info {
    uint32_t number, count, n_tensors; /* number from 0 */
} split_info;

static hepta_status read_split(const container *meta, split_info *s, hepta_error *err) {
    hepta_status status = container_get_u32_or(meta, "split.count", 1, &s->count, err);
    if (status == HEPTA_OK) {
        status = container_get_u32_or(meta, "split.no", 0, &s->number, err);
    }
    if (status == HEPTA_OK) {
        status = container_get_u32_or(meta, "split.tensors.count", UINT32_MAX, &s->n_tensors, err);
    }
    return status;
}

static hepta_status add_shard(container *c, const char *path, const split_info *expected,
                              hepta_error *err) {
    const char *shown = path_shown(path);
    if (!file_exists(path)) {
        return error_set(err, HEPTA_ERROR_IO,
                         "%s: file %" PRIu32 " of the %" PRIu32
                         " of this model is missing; put all of them into one directory",
                         shown, expected->number + 1, expected->count);
    }
    container meta = {.path = path};
    extent header;
    split_info found = {0, 0, 0};
    hepta_status status = read_file(path, c, &meta, &header, err);
    if (status == HEPTA_OK) {
        status = read_split(&meta, &found, err);
    }
    if (status == HEPTA_OK &&
        (found.number != expected->number || found.count != expected->count)) {
        status =
            error_set(err, HEPTA_ERROR_FORMAT,
                      "%s: says that it is file %" PRIu32 " of %" PRIu32 "; its name says %" PRIu32
                      " of %" PRIu32,
                      shown, found.number + 1, found.count, expected->number + 1, expected->count);
    }
    container_clear(&meta);
    return status;
}

/* The first file, at `path`, is read; adds the tensors of the others. */
static hepta_status add_other_shards(container *c, const char *path, const split_info *first,
                                     hepta_error *err) {
    const char *shown = path_shown(path);
    uint32_t number = 0, count = 0;
    if (!parse_shard_path(path, &number, &count) || number != first->number + 1 ||
        count != first->count || number != 1) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: is file %" PRIu32 " of %" PRIu32
                         " by its metadata; expected a name that ends in -00001-of-%05" PRIu32
                         ".gguf: keep the files' original names",
                         shown, first->number + 1, first->count, first->count);
    }
    for (uint32_t i = 1; i < first->count; i++) {
        const char *other = shard_path(c, path, i + 1, first->count);
        if (other == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", shown);
        }
        split_info expected = {.number = i, .count = first->count};
        hepta_status status = add_shard(c, other, &expected, err);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    if (first->n_tensors != UINT32_MAX && c->n_tensors != first->n_tensors) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: the %" PRIu32 " files hold %zu tensors; split.tensors.count says "
                         "%" PRIu32,
                         shown, first->count, c->n_tensors, first->n_tensors);
    }
    return HEPTA_OK;
}

hepta_status gguf_open(const char *path, const container_options *options, container *c,
                       hepta_error *err) {
    (void)options; /* a file without tensors is as good as any here */
    c->kind = CONTAINER_GGUF;
    uint32_t number, count;
    if (parse_shard_path(path, &number, &count) && number > 1 && number <= count) {
        path = shard_path(c, path, 1, count);
    } else {
        path = arena_copy_string(&c->memory, path, strlen(path));
    }
    if (path == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path_shown(c->path));
    }
    extent header = {0, 0};
    hepta_status status = read_file(path, c, c, &header, err);
    if (status != HEPTA_OK) {
        return status;
    }
    if (hepta_keys_present(c)) {
        return hepta_header_read(c, header.used, header.padded, err);
    }
    split_info split = {0, 0, 0};
    status = read_split(c, &split, err);
    if (status == HEPTA_OK && split.count > 1) {
        status = add_other_shards(c, path, &split, err);
    }
    container_remove(c, "split.no");
    container_remove(c, "split.count");
    container_remove(c, "split.tensors.count");
    return status == HEPTA_OK ? container_check_overlap(c, err) : status;
}
