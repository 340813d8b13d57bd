/*
 * safetensors.c - reading the header of a safetensors file.
 *
 *     u64      n, little-endian
 *     n bytes  JSON: {"name": {"dtype": "BF16", "shape": [r, c], "data_offsets": [b, e]}, ...,
 *              "__metadata__": {...}}
 *     data     offsets count from here; together they cover the rest of the file exactly
 *
 * Invariant: what comes out of here lies in the file and has the size that shape and dtype ask
 * for. The limits are those of the reference implementation (a header of at most 100 MB).
 *
 * Specification: github.com/huggingface/safetensors, README "Format".
 */
#include "format/safetensors.h"

#include "format/private.h"

#ifndef HEPTA_ENGINE_ONLY

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER = 100000000, LENGTH_SIZE = 8 };

static const struct {
    const char *name;
    uint32_t type;
    uint32_t bytes;
} dtypes[] = {
    {"F32", TENSOR_F32, 4},         {"F16", TENSOR_F16, 2},        {"BF16", TENSOR_BF16, 2},
    {"F64", SAFETENSORS_OTHER, 8},  {"I64", SAFETENSORS_OTHER, 8}, {"U64", SAFETENSORS_OTHER, 8},
    {"I32", SAFETENSORS_OTHER, 4},  {"U32", SAFETENSORS_OTHER, 4}, {"I16", SAFETENSORS_OTHER, 2},
    {"U16", SAFETENSORS_OTHER, 2},  {"I8", SAFETENSORS_OTHER, 1},  {"U8", SAFETENSORS_OTHER, 1},
    {"BOOL", SAFETENSORS_OTHER, 1},
};

typedef struct reader {
    container *c;
    const char *path; /* for messages */
    uint64_t data_start, data_size;
    hepta_error *err;
} reader;

static hepta_status bad_entry(const reader *r, const char *name, const char *what) {
    return error_set(r->err, HEPTA_ERROR_FORMAT, "%s: safetensors header: tensor %.80s: %s",
                     r->path, name, what);
}

/* An integer from 0 to 2^62. */
static bool read_size(const json_t *value, uint64_t *out) {
    if (!json_is_integer(value)) {
        return false;
    }
    json_int_t v = json_integer_value(value);
    if (v < 0 || v > (json_int_t)1 << 62) {
        return false;
    }
    *out = (uint64_t)v;
    return true;
}

/* The shape into e, reversed to GGUF's order, and the number of items. */
static hepta_status read_shape(const reader *r, const json_t *shape, safetensors_entry *e,
                               uint64_t *n_items) {
    if (!json_is_array(shape) || json_array_size(shape) > 64) {
        return bad_entry(r, e->name, "\"shape\" is no array of at most 64 sizes");
    }
    size_t n = json_array_size(shape);
    uint64_t total = 1;
    e->n_dims = (uint32_t)n;
    for (size_t i = 0; i < 4; i++) {
        e->ne[i] = 1;
    }
    for (size_t i = 0; i < n; i++) {
        uint64_t size;
        if (!read_size(json_array_get(shape, i), &size) || mul_overflows(total, size, &total)) {
            return bad_entry(r, e->name,
                             "\"shape\" holds something else than sizes, or too large "
                             "ones");
        }
        if (n <= 4) {
            e->ne[n - 1 - i] = size;
        }
    }
    *n_items = total;
    return HEPTA_OK;
}

static hepta_status read_dtype(const reader *r, const json_t *dtype, safetensors_entry *e,
                               uint64_t *item_bytes) {
    const char *s = json_string_value(dtype);
    if (s == NULL || s[0] == '\0' || strlen(s) >= sizeof e->dtype) {
        return bad_entry(r, e->name, "\"dtype\" is no short string");
    }
    memcpy(e->dtype, s, strlen(s) + 1);
    e->type = SAFETENSORS_OTHER;
    *item_bytes = 0; /* a type that came after this program: its size is not checked */
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(s, dtypes[i].name) == 0) {
            e->type = dtypes[i].type;
            *item_bytes = dtypes[i].bytes;
        }
    }
    return HEPTA_OK;
}

static hepta_status read_entry(const reader *r, const json_t *value, safetensors_entry *e) {
    uint64_t n_items = 0, item_bytes = 0, begin, end, expected;
    if (!json_is_object(value)) {
        return bad_entry(r, e->name, "expected an object");
    }
    hepta_status status = read_dtype(r, json_object_get(value, "dtype"), e, &item_bytes);
    if (status == HEPTA_OK) {
        status = read_shape(r, json_object_get(value, "shape"), e, &n_items);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    const json_t *offsets = json_object_get(value, "data_offsets");
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 ||
        !read_size(json_array_get(offsets, 0), &begin) ||
        !read_size(json_array_get(offsets, 1), &end)) {
        return bad_entry(r, e->name, "\"data_offsets\" is no pair of sizes");
    }
    if (begin > end || end > r->data_size) {
        return error_set(r->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s takes the bytes %" PRIu64 " to %" PRIu64
                         " of the data section, which has %" PRIu64 " (from byte %" PRIu64
                         " on): the file is cut short or damaged",
                         r->path, e->name, begin, end, r->data_size, r->data_start);
    }
    if (item_bytes != 0 &&
        (mul_overflows(n_items, item_bytes, &expected) || end - begin != expected)) {
        return error_set(r->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.80s of %" PRIu64 " items of type %s takes %" PRIu64
                         " bytes; expected %" PRIu64 " each",
                         r->path, e->name, n_items, e->dtype, end - begin, item_bytes);
    }
    e->begin = r->data_start + begin;
    e->n_bytes = end - begin;
    return HEPTA_OK;
}

static int compare_begin(const void *a, const void *b) {
    const safetensors_entry *s = a, *t = b;
    if (s->begin != t->begin) {
        return s->begin < t->begin ? -1 : 1;
    }
    return s->n_bytes != t->n_bytes ? (s->n_bytes < t->n_bytes ? -1 : 1) : strcmp(s->name, t->name);
}

static int compare_name(const void *a, const void *b) {
    const safetensors_entry *s = a, *t = b;
    return strcmp(s->name, t->name);
}

/* The tensors cover the data section: no overlap, no gap, nothing behind. */
static hepta_status check_coverage(const reader *r, safetensors *s) {
    qsort(s->entries, s->n_entries, sizeof *s->entries, compare_begin);
    uint64_t at = r->data_start;
    for (size_t i = 0; i < s->n_entries; i++) {
        const safetensors_entry *e = &s->entries[i];
        if (e->begin != at) {
            return error_set(r->err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.80s starts at byte %" PRIu64 "; the tensor before it "
                             "ends at %" PRIu64 ": %s",
                             r->path, e->name, e->begin, at,
                             e->begin < at ? "they overlap" : "there is a gap");
        }
        at = e->begin + e->n_bytes;
    }
    if (at != r->data_start + r->data_size) {
        return error_set(r->err, HEPTA_ERROR_FORMAT,
                         "%s: the tensors end at byte %" PRIu64 ", the file at %" PRIu64
                         ": something was appended",
                         r->path, at, r->data_start + r->data_size);
    }
    qsort(s->entries, s->n_entries, sizeof *s->entries, compare_name);
    return HEPTA_OK;
}

static hepta_status read_entries(const reader *r, json_t *root, safetensors *s) {
    size_t n = json_object_size(root);
    if (n > FORMAT_MAX_TENSORS) {
        return error_set(r->err, HEPTA_ERROR_UNSUPPORTED, "%s: more than %d tensors", r->path,
                         (int)FORMAT_MAX_TENSORS);
    }
    s->entries = arena_alloc(&r->c->memory, n, sizeof *s->entries);
    if (s->entries == NULL) {
        return error_set(r->err, HEPTA_ERROR_MEMORY, "out of memory opening %s", r->path);
    }
    const char *name;
    json_t *value;
    json_object_foreach(root, name, value) {
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        safetensors_entry *e = &s->entries[s->n_entries];
        e->name = arena_copy_string(&r->c->memory, name, strlen(name));
        if (e->name == NULL) {
            return error_set(r->err, HEPTA_ERROR_MEMORY, "out of memory opening %s", r->path);
        }
        hepta_status status = read_entry(r, value, e);
        if (status != HEPTA_OK) {
            return status;
        }
        s->n_entries++;
    }
    return check_coverage(r, s);
}

hepta_status safetensors_open(container *c, const char *path, safetensors *out, hepta_error *err) {
    safetensors s = {.path = path};
    hepta_status status = container_add_map(c, path, &s.map, err);
    if (status != HEPTA_OK) {
        return status;
    }
    reader r = {.c = c, .path = path_shown(path), .err = err};
    uint64_t length = s.map.size >= LENGTH_SIZE ? load_u64(s.map.data) : 0;
    if (s.map.size < LENGTH_SIZE || length > s.map.size - LENGTH_SIZE || length > MAX_HEADER) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: no whole safetensors file: %zu bytes, of which the header claims "
                         "%" PRIu64 " (at most %d); it is cut short or damaged",
                         r.path, s.map.size, length, (int)MAX_HEADER);
    }
    r.data_start = LENGTH_SIZE + length;
    r.data_size = s.map.size - r.data_start;
    json_error_t json_error;
    json_t *root = json_loadb((const char *)s.map.data + LENGTH_SIZE, (size_t)length,
                              JSON_REJECT_DUPLICATES, &json_error);
    if (!json_is_object(root)) {
        status = error_set(err, HEPTA_ERROR_FORMAT,
                           "%s: the header is no JSON object: %s (byte %d of the file)", r.path,
                           root == NULL ? json_error.text : "it is another value",
                           root == NULL ? json_error.position + LENGTH_SIZE : LENGTH_SIZE);
    } else {
        status = read_entries(&r, root, &s);
    }
    json_decref(root);
    if (status == HEPTA_OK) {
        *out = s;
    }
    return status;
}

safetensors_entry *safetensors_find(const safetensors *s, const char *name) {
    safetensors_entry wanted = {.name = name};
    if (s->n_entries == 0) {
        return NULL;
    }
    return bsearch(&wanted, s->entries, s->n_entries, sizeof wanted, compare_name);
}

#else

hepta_status safetensors_open(container *c, const char *path, safetensors *out, hepta_error *err) {
    (void)c;
    (void)out;
    return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: this build of the engine alone reads no safetensors files",
                     path_shown(path));
}

safetensors_entry *safetensors_find(const safetensors *s, const char *name) {
    (void)s;
    (void)name;
    return NULL;
}

#endif
