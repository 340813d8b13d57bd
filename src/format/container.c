/*
 * container.c - the container itself: names to entries, typed reading, building.
 *
 * Keys and tensors keep the order in which they came; two hash tables find them by name (FNV-1a,
 * linear probing, at most half full).
 *
 * Invariant: no name stands further than MAX_PROBE slots from where its hash puts it, so that names
 * chosen to collide cost no time: in half-full tables such clusters do not come about by chance.
 */
#include "format/private.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_PROBE = 512 };

/* ---- Names ------------------------------------------------------------- */

typedef kv_string (*name_of_fn)(const container *c, size_t i);

static kv_string kv_name(const container *c, size_t i) {
    return c->kvs[i].key;
}

static kv_string tensor_name(const container *c, size_t i) {
    return (kv_string){c->tensors[i].name, strlen(c->tensors[i].name)};
}

/* FNV-1a, 64 bits: www.isthe.com/chongo/tech/comp/fnv */
static uint64_t hash_name(kv_string s) {
    uint64_t h = 0xcbf29ce484222325u;
    for (uint64_t i = 0; i < s.n; i++) {
        h = (h ^ (uint8_t)s.data[i]) * 0x100000001b3u;
    }
    return h;
}

static bool same(kv_string a, kv_string b) {
    return a.n == b.n && (a.n == 0 || memcmp(a.data, b.data, (size_t)a.n) == 0);
}

/* The slot where `name` is, or the empty one where it belongs. */
static size_t index_probe(const container *c, const name_index *index, name_of_fn name_of,
                          kv_string name) {
    size_t at = (size_t)hash_name(name) & (index->n_slots - 1);
    while (index->slots[at] != 0 && !same(name_of(c, index->slots[at] - 1), name)) {
        at = (at + 1) & (index->n_slots - 1);
    }
    return at;
}

/* Number of the entry of this name, SIZE_MAX if there is none. */
static size_t index_find(const container *c, const name_index *index, name_of_fn name_of,
                         kv_string name) {
    if (index->n_slots == 0) {
        return SIZE_MAX;
    }
    uint32_t slot = index->slots[index_probe(c, index, name_of, name)];
    return slot == 0 ? SIZE_MAX : slot - 1;
}

static void index_fill(const container *c, name_index *index, name_of_fn name_of, size_t n) {
    memset(index->slots, 0, index->n_slots * sizeof *index->slots);
    for (size_t i = 0; i < n; i++) {
        index->slots[index_probe(c, index, name_of, name_of(c, i))] = (uint32_t)(i + 1);
    }
}

/* Makes room for entry number n, so that entering it cannot fail. */
static bool index_reserve(const container *c, name_index *index, name_of_fn name_of, size_t n) {
    if (2 * (n + 1) < index->n_slots) {
        return true;
    }
    name_index bigger = {.n_slots = index->n_slots == 0 ? 64 : 2 * index->n_slots};
    bigger.slots = memory_alloc(bigger.n_slots, sizeof *bigger.slots);
    if (bigger.slots == NULL) {
        return false;
    }
    index_fill(c, &bigger, name_of, n);
    memory_free(index->slots);
    *index = bigger;
    return true;
}

/* Enters number n, for which there is room; false if too many names collide with this one. */
static bool index_add(const container *c, name_index *index, name_of_fn name_of, size_t n) {
    kv_string name = name_of(c, n);
    size_t at = index_probe(c, index, name_of, name);
    if (((at - (size_t)hash_name(name)) & (index->n_slots - 1)) > MAX_PROBE) {
        return false;
    }
    index->slots[at] = (uint32_t)(n + 1);
    return true;
}

static hepta_status names_collide(const container *c, hepta_error *err) {
    return error_set(err, HEPTA_ERROR_FORMAT,
                     "%s: hundreds of names have the same hash; no model has that by chance",
                     path_shown(c->path));
}

/* Arrays grow when their length is 0 or a power of two from 16 on. */
static void *grow(void *items, size_t n, size_t size) {
    bool full = n == 0 || (n >= 16 && (n & (n - 1)) == 0);
    return full ? memory_resize(items, n, n == 0 ? 16 : 2 * n, size) : items;
}

static hepta_status out_of_memory(const container *c, const char *what, hepta_error *err) {
    return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s (%s)", path_shown(c->path),
                     what);
}

/* ---- Small things that importers share --------------------------------- */

char *format_join_path(container *c, const char *directory, const char *name) {
    size_t n = strlen(directory), m = strlen(name);
    while (n > 1 && directory[n - 1] == '/') {
        n--;
    }
    char *path = arena_alloc(&c->memory, n + m + 2, 1);
    if (path != NULL) {
        memcpy(path, directory, n);
        path[n] = '/';
        memcpy(path + n + 1, name, m + 1);
    }
    return path;
}

bool format_parse_sha256(kv_string s, uint8_t digest[32]) {
    if (s.n != FORMAT_SHA256_HEX) {
        return false;
    }
    uint8_t d[32] = {0};
    for (size_t i = 0; i < FORMAT_SHA256_HEX; i++) {
        char x = s.data[i];
        if (!((x >= '0' && x <= '9') || (x >= 'a' && x <= 'f'))) {
            return false;
        }
        int digit = x <= '9' ? x - '0' : x - 'a' + 10;
        d[i / 2] = (uint8_t)(d[i / 2] << 4 | digit);
    }
    memcpy(digest, d, sizeof d);
    return true;
}

hepta_status container_add_map(container *c, const char *path, file_map *out, hepta_error *err) {
    file_map *maps = grow(c->maps, c->n_maps, sizeof *maps);
    if (maps == NULL) {
        return out_of_memory(c, "list of files", err);
    }
    c->maps = maps;
    hepta_status status = file_map_open(path, &c->maps[c->n_maps], err);
    if (status == HEPTA_OK) {
        *out = c->maps[c->n_maps++];
    }
    return status;
}

/* ---- Reading ----------------------------------------------------------- */

const kv *container_find_n(const container *c, const char *key, uint64_t n) {
    size_t i = index_find(c, &c->kv_index, kv_name, (kv_string){key, n});
    return i == SIZE_MAX ? NULL : &c->kvs[i];
}

const kv *container_find(const container *c, const char *key) {
    return container_find_n(c, key, strlen(key));
}

const tensor *container_tensor(const container *c, const char *name) {
    size_t i = index_find(c, &c->tensor_index, tensor_name, (kv_string){name, strlen(name)});
    return i == SIZE_MAX ? NULL : &c->tensors[i];
}

static bool is_unsigned(kv_type t) {
    return t == KV_U8 || t == KV_U16 || t == KV_U32 || t == KV_U64;
}

static bool is_signed(kv_type t) {
    return t == KV_I8 || t == KV_I16 || t == KV_I32 || t == KV_I64;
}

static hepta_status key_missing(const container *c, const char *key, const char *wanted,
                                hepta_error *err) {
    return error_set(err, HEPTA_ERROR_FORMAT, "%s: key %s is missing; expected %s",
                     path_shown(c->path), key, wanted);
}

static hepta_status wrong_type(const container *c, const kv *k, const char *wanted,
                               hepta_error *err) {
    return error_set(err, HEPTA_ERROR_FORMAT, "%s: key %.*s is of type %s; expected %s",
                     path_shown(c->path), SHOWN(k->key.n), k->key.data, kv_type_name(k->type),
                     wanted);
}

static hepta_status read_unsigned(const container *c, const kv *k, uint64_t max, uint64_t *out,
                                  hepta_error *err) {
    if (is_signed(k->type) && k->v.i < 0) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: key %.*s is %" PRId64 "; expected 0 to %" PRIu64, path_shown(c->path),
                         SHOWN(k->key.n), k->key.data, k->v.i, max);
    }
    if (!is_signed(k->type) && !is_unsigned(k->type)) {
        return wrong_type(c, k, "an integer", err);
    }
    uint64_t v = is_signed(k->type) ? (uint64_t)k->v.i : k->v.u;
    if (v > max) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: key %.*s is %" PRIu64 "; expected 0 to %" PRIu64, path_shown(c->path),
                         SHOWN(k->key.n), k->key.data, v, max);
    }
    *out = v;
    return HEPTA_OK;
}

hepta_status container_get_u64(const container *c, const char *key, uint64_t *out,
                               hepta_error *err) {
    const kv *k = container_find(c, key);
    return k == NULL ? key_missing(c, key, "an integer", err)
                     : read_unsigned(c, k, UINT64_MAX, out, err);
}

hepta_status container_get_u32(const container *c, const char *key, uint32_t *out,
                               hepta_error *err) {
    const kv *k = container_find(c, key);
    if (k == NULL) {
        return key_missing(c, key, "an integer", err);
    }
    uint64_t v = 0;
    hepta_status status = read_unsigned(c, k, UINT32_MAX, &v, err);
    if (status == HEPTA_OK) {
        *out = (uint32_t)v;
    }
    return status;
}

hepta_status container_get_u32_or(const container *c, const char *key, uint32_t fallback,
                                  uint32_t *out, hepta_error *err) {
    if (container_find(c, key) == NULL) {
        *out = fallback;
        return HEPTA_OK;
    }
    return container_get_u32(c, key, out, err);
}

hepta_status container_get_f32(const container *c, const char *key, float *out, hepta_error *err) {
    const kv *k = container_find(c, key);
    if (k == NULL) {
        return key_missing(c, key, "a number", err);
    }
    if (k->type == KV_F32 || k->type == KV_F64) {
        *out = (float)k->v.f;
    } else if (is_unsigned(k->type)) {
        *out = (float)k->v.u;
    } else if (is_signed(k->type)) {
        *out = (float)k->v.i;
    } else {
        return wrong_type(c, k, "a number", err);
    }
    return HEPTA_OK;
}

hepta_status container_get_f32_or(const container *c, const char *key, float fallback, float *out,
                                  hepta_error *err) {
    if (container_find(c, key) == NULL) {
        *out = fallback;
        return HEPTA_OK;
    }
    return container_get_f32(c, key, out, err);
}

bool container_get_bool_or(const container *c, const char *key, bool fallback) {
    const kv *k = container_find(c, key);
    return k != NULL && k->type == KV_BOOL ? k->v.u != 0 : fallback;
}

const char *container_get_string(container *c, const char *key) {
    const kv *k = container_find(c, key);
    if (k == NULL || k->type != KV_STRING) {
        return NULL;
    }
    return arena_copy_string(&c->memory, k->v.s.data, (size_t)k->v.s.n);
}

/* ---- Items of arrays --------------------------------------------------- */

static const uint8_t *item_at(const kv *array, uint64_t i) {
    uint64_t size = kv_type_size(array->item_type);
    if (array->type != KV_ARRAY || i >= array->n_items || size == 0) {
        return NULL;
    }
    return (const uint8_t *)array->v.items + i * size;
}

int64_t kv_item_i64(const kv *array, uint64_t i) {
    const uint8_t *p = item_at(array, i);
    if (p == NULL) {
        return 0;
    }
    switch (array->item_type) {
    case KV_U8:
    case KV_BOOL:
        return p[0];
    case KV_I8:
        return (int8_t)p[0];
    case KV_U16:
        return load_u16(p);
    case KV_I16:
        return (int16_t)load_u16(p);
    case KV_U32:
        return load_u32(p);
    case KV_I32:
        return (int32_t)load_u32(p);
    case KV_U64:
    case KV_I64:
        return (int64_t)load_u64(p);
    default:
        return 0;
    }
}

double kv_item_f64(const kv *array, uint64_t i) {
    const uint8_t *p = item_at(array, i);
    if (p == NULL) {
        return 0;
    }
    if (array->item_type == KV_F32) {
        uint32_t bits = load_u32(p);
        float f;
        memcpy(&f, &bits, sizeof f);
        return (double)f;
    }
    if (array->item_type == KV_F64) {
        uint64_t bits = load_u64(p);
        double d;
        memcpy(&d, &bits, sizeof d);
        return d;
    }
    return array->item_type == KV_U64 ? (double)load_u64(p) : (double)kv_item_i64(array, i);
}

kv_string kv_item_string(const kv *array, uint64_t i) {
    if (array->type != KV_ARRAY || array->item_type != KV_STRING || i >= array->n_items) {
        return (kv_string){"", 0};
    }
    return ((const kv_string *)array->v.items)[i];
}

/* ---- Building ---------------------------------------------------------- */

hepta_status container_add_kv(container *c, const kv *value, hepta_error *err) {
    if (container_find_n(c, value->key.data, value->key.n) != NULL) {
        return error_set(err, HEPTA_ERROR_FORMAT, "%s: key %.*s occurs twice", path_shown(c->path),
                         SHOWN(value->key.n), value->key.data);
    }
    if (c->n_kvs >= FORMAT_MAX_KVS) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED, "%s: more than %d metadata keys",
                         path_shown(c->path), (int)FORMAT_MAX_KVS);
    }
    kv *kvs = grow(c->kvs, c->n_kvs, sizeof *kvs);
    if (kvs == NULL) {
        return out_of_memory(c, "metadata", err);
    }
    c->kvs = kvs;
    if (!index_reserve(c, &c->kv_index, kv_name, c->n_kvs)) {
        return out_of_memory(c, "metadata", err);
    }
    c->kvs[c->n_kvs] = *value;
    if (!index_add(c, &c->kv_index, kv_name, c->n_kvs)) {
        return names_collide(c, err);
    }
    c->n_kvs++;
    return HEPTA_OK;
}

/* Adds `value`, whose contents are the container's already, under a copy of `key`, or replaces. */
static hepta_status set_value(container *c, const char *key, kv value, hepta_error *err) {
    size_t n = strlen(key);
    size_t i = index_find(c, &c->kv_index, kv_name, (kv_string){key, n});
    if (i != SIZE_MAX) {
        value.key = c->kvs[i].key;
        c->kvs[i] = value;
        return HEPTA_OK;
    }
    value.key = (kv_string){arena_copy_string(&c->memory, key, n), n};
    return value.key.data == NULL ? out_of_memory(c, key, err) : container_add_kv(c, &value, err);
}

hepta_status container_set_u32(container *c, const char *key, uint32_t v, hepta_error *err) {
    return set_value(c, key, (kv){.type = KV_U32, .v.u = v}, err);
}

hepta_status container_set_u64(container *c, const char *key, uint64_t v, hepta_error *err) {
    return set_value(c, key, (kv){.type = KV_U64, .v.u = v}, err);
}

hepta_status container_set_f32(container *c, const char *key, float v, hepta_error *err) {
    return set_value(c, key, (kv){.type = KV_F32, .v.f = (double)v}, err);
}

hepta_status container_set_bool(container *c, const char *key, bool v, hepta_error *err) {
    return set_value(c, key, (kv){.type = KV_BOOL, .v.u = v}, err);
}

hepta_status container_set_string(container *c, const char *key, const char *s, size_t n,
                                  hepta_error *err) {
    char *copy = arena_copy_string(&c->memory, s, n);
    if (copy == NULL) {
        return out_of_memory(c, key, err);
    }
    return set_value(c, key, (kv){.type = KV_STRING, .v.s = {copy, n}}, err);
}

/* The strings' bytes go into one piece behind their descriptors. */
static const void *copy_strings(arena *memory, const kv_string *strings, uint64_t n) {
    uint64_t total = 0;
    for (uint64_t i = 0; i < n; i++) {
        if (add_overflows(total, strings[i].n, &total)) {
            return NULL;
        }
    }
    kv_string *copy = arena_alloc(memory, (size_t)n, sizeof *copy);
    char *bytes = arena_alloc(memory, (size_t)total, 1);
    if (copy == NULL || bytes == NULL) {
        return NULL;
    }
    for (uint64_t i = 0; i < n; i++) {
        copy[i] = (kv_string){bytes, strings[i].n};
        if (strings[i].n > 0) {
            memcpy(bytes, strings[i].data, (size_t)strings[i].n);
            bytes += strings[i].n;
        }
    }
    return copy;
}

hepta_status container_set_array(container *c, const char *key, kv_type item_type,
                                 const void *items, uint64_t n, hepta_error *err) {
    const void *copy = NULL;
    uint64_t size = kv_type_size(item_type);
    if (item_type == KV_STRING) {
        copy = copy_strings(&c->memory, items, n);
    } else if (size == 0) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "key %s: an array cannot hold items of type %s",
                         key, kv_type_name(item_type));
    } else {
        void *bytes = arena_alloc(&c->memory, (size_t)n, (size_t)size);
        if (bytes != NULL && n > 0) {
            memcpy(bytes, items, (size_t)(n * size));
        }
        copy = bytes;
    }
    if (copy == NULL) {
        return out_of_memory(c, key, err);
    }
    kv value = {.type = KV_ARRAY, .item_type = item_type, .n_items = n, .v.items = copy};
    return set_value(c, key, value, err);
}

void container_remove(container *c, const char *key) {
    size_t i = index_find(c, &c->kv_index, kv_name, (kv_string){key, strlen(key)});
    if (i == SIZE_MAX) {
        return;
    }
    memmove(&c->kvs[i], &c->kvs[i + 1], (c->n_kvs - i - 1) * sizeof *c->kvs);
    c->n_kvs--;
    index_fill(c, &c->kv_index, kv_name, c->n_kvs);
}

hepta_status container_add_tensor(container *c, const tensor *t, hepta_error *err) {
    if (container_tensor(c, t->name) != NULL) {
        return error_set(err, HEPTA_ERROR_FORMAT, "%s: tensor %.80s occurs twice",
                         path_shown(c->path), t->name);
    }
    if (c->n_tensors >= FORMAT_MAX_TENSORS) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED, "%s: more than %d tensors",
                         path_shown(c->path), (int)FORMAT_MAX_TENSORS);
    }
    tensor *tensors = grow(c->tensors, c->n_tensors, sizeof *tensors);
    if (tensors == NULL) {
        return out_of_memory(c, "list of tensors", err);
    }
    c->tensors = tensors;
    const char *name = arena_copy_string(&c->memory, t->name, strlen(t->name));
    if (name == NULL || !index_reserve(c, &c->tensor_index, tensor_name, c->n_tensors)) {
        return out_of_memory(c, "list of tensors", err);
    }
    tensor *added = &c->tensors[c->n_tensors];
    *added = *t;
    added->name = name;
    if (!index_add(c, &c->tensor_index, tensor_name, c->n_tensors)) {
        return names_collide(c, err);
    }
    c->n_tensors++;
    return HEPTA_OK;
}

/* ---- Overlaps ---------------------------------------------------------- */

static int compare_by_data(const void *a, const void *b) {
    const tensor *s = *(const tensor *const *)a, *t = *(const tensor *const *)b;
    uintptr_t p = (uintptr_t)s->data, q = (uintptr_t)t->data;
    return p != q ? (p < q ? -1 : 1) : strcmp(s->name, t->name);
}

hepta_status container_check_overlap(const container *c, hepta_error *err) {
    if (c->n_tensors < 2) {
        return HEPTA_OK;
    }
    const tensor **order = memory_alloc(c->n_tensors, sizeof *order);
    if (order == NULL) {
        return out_of_memory(c, "list of tensors", err);
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        order[i] = &c->tensors[i];
    }
    qsort(order, c->n_tensors, sizeof *order, compare_by_data);
    hepta_status status = HEPTA_OK;
    for (size_t i = 1; i < c->n_tensors && status == HEPTA_OK; i++) {
        const tensor *s = order[i - 1], *t = order[i];
        if ((uint64_t)((uintptr_t)t->data - (uintptr_t)s->data) < s->n_bytes) {
            status =
                error_set(err, HEPTA_ERROR_FORMAT,
                          "%s: tensor %.80s at byte %" PRIu64 " overlaps tensor %.80s, which takes "
                          "bytes %" PRIu64 " to %" PRIu64,
                          path_shown(t->file), t->name, t->offset, s->name, s->offset,
                          s->offset + s->n_bytes);
        }
    }
    memory_free(order);
    return status;
}
