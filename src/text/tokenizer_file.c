/*
 * tokenizer_file.c - reads a tokenizer file of any kind into a container's tokenizer.* keys.
 *
 * The kind is recognized by content:
 *   directory         tokenizer.json, or tokenizer.model, or one *vocab.json and one *merges.txt
 *   "GGUF"            another container: its tokenizer.* keys are copied
 *   '{'               tokenizer.json (has "model"), else vocab.json with merges.txt beside it
 *   text              tiktoken ranks
 *   u32 < 65536       llama2.c's tokenizer.bin (the length of its longest token)
 *   anything else     SentencePiece protobuf
 * For Hugging Face's files, configurations that lie beside them are read as well.
 */
#include "text/vocabulary.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

enum { MAX_PATH = 4096, LLAMA2C_MAX_LONGEST = 65536 };

/* Files and JSON trees that a vocabulary points into until it is stored. */
typedef struct sources {
    file_map maps[4];
    size_t n_maps;
    json_t *roots[4];
    size_t n_roots;
} sources;

static void sources_free(sources *s) {
    for (size_t i = 0; i < s->n_roots; i++) {
        json_decref(s->roots[i]);
    }
    for (size_t i = 0; i < s->n_maps; i++) {
        file_map_close(&s->maps[i]);
    }
}

static hepta_status open_source(vocabulary *v, sources *s, const char *path, file_map *out) {
    hepta_status status = file_map_open(path, &s->maps[s->n_maps], v->err);
    if (status == HEPTA_OK) {
        *out = s->maps[s->n_maps++];
    }
    return status;
}

static hepta_status parse_json(vocabulary *v, sources *s, const char *path, file_map file,
                               json_t **out) {
    json_error_t error;
    json_t *root = json_loadb((const char *)file.data, file.size, JSON_ALLOW_NUL, &error);
    if (root == NULL) {
        return error_set(v->err, HEPTA_ERROR_FORMAT, "%s: line %d: %s", path_shown(path),
                         error.line, error.text);
    }
    s->roots[s->n_roots++] = root;
    *out = root;
    return HEPTA_OK;
}

/* Parses a file if it is there; *out is NULL if it is not. */
static hepta_status open_json(vocabulary *v, sources *s, const char *path, json_t **out) {
    *out = NULL;
    if (!file_exists(path)) {
        return HEPTA_OK;
    }
    file_map file;
    hepta_status status = open_source(v, s, path, &file);
    return status == HEPTA_OK ? parse_json(v, s, path, file, out) : status;
}

/* ---- Directories ------------------------------------------------------- */

/* "directory/name"; false if that is too long. */
static bool join(char out[MAX_PATH], const char *directory, const char *name) {
    int n = snprintf(out, MAX_PATH, "%s/%s", directory, name);
    return n > 0 && n < MAX_PATH;
}

/* The directory that `path` lies in. */
static bool parent(char out[MAX_PATH], const char *path) {
    const char *slash = strrchr(path, '/');
    size_t n = slash == NULL ? 1 : slash == path ? 1 : (size_t)(slash - path);
    if (n >= MAX_PATH) {
        return false;
    }
    memcpy(out, slash == NULL ? "." : path, n);
    out[n] = '\0';
    return true;
}

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* Counts the files of a directory whose names end so; `out` is the path of the last. */
static size_t find_one(const char *directory, const char *end, char out[MAX_PATH]) {
    DIR *d = opendir(directory);
    char path[MAX_PATH];
    size_t n = 0;
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        if (ends_with(e->d_name, end) && join(path, directory, e->d_name)) {
            memcpy(out, path, sizeof path);
            n++;
        }
    }
    if (d != NULL) {
        closedir(d);
    }
    return n;
}

/* tokenizer_config.json and generation_config.json of a directory. */
static hepta_status read_configs(vocabulary *v, sources *s, const char *directory) {
    char path[MAX_PATH];
    json_t *root = NULL;
    hepta_status status = HEPTA_OK;
    if (join(path, directory, "tokenizer_config.json") &&
        (status = open_json(v, s, path, &root)) == HEPTA_OK && root != NULL) {
        status = tokenizer_config_read(v, root);
    }
    if (status == HEPTA_OK && join(path, directory, "generation_config.json") &&
        (status = open_json(v, s, path, &root)) == HEPTA_OK && root != NULL) {
        status = generation_config_read(v, root);
    }
    return status;
}

/* ---- Kinds ------------------------------------------------------------- */

static hepta_status read_pair(vocabulary *v, sources *s, const char *directory, json_t *root) {
    char path[MAX_PATH];
    size_t n = find_one(directory, "merges.txt", path);
    if (n != 1) {
        return vocabulary_error(
            v, n == 0 ? HEPTA_ERROR_IO : HEPTA_ERROR_ARGUMENT,
            "a vocabulary in JSON needs one merges.txt beside it; there are %zu", n);
    }
    file_map merges;
    hepta_status status = vocab_json_read(v, root);
    if (status == HEPTA_OK) {
        status = open_source(v, s, path, &merges);
    }
    if (status == HEPTA_OK) {
        status = merges_txt_read(v, merges.data, merges.size);
    }
    if (status == HEPTA_OK) {
        status = read_configs(v, s, directory);
    }
    if (status == HEPTA_OK && v->pre == NULL) {
        status = vocabulary_error(v, HEPTA_ERROR_UNSUPPORTED,
                                  "how text is cut into words is not known: tokenizer_config.json "
                                  "with its tokenizer_class is missing");
    }
    return status;
}

static hepta_status read_json(vocabulary *v, sources *s, const char *path, file_map file) {
    char directory[MAX_PATH];
    json_t *root = NULL;
    if (!parent(directory, path)) {
        return vocabulary_error(v, HEPTA_ERROR_ARGUMENT, "the path is too long");
    }
    hepta_status status = parse_json(v, s, path, file, &root);
    if (status != HEPTA_OK) {
        return status;
    }
    if (!json_is_object(json_object_get(root, "model"))) {
        return read_pair(v, s, directory, root);
    }
    status = tokenizer_json_read(v, root);
    return status == HEPTA_OK ? read_configs(v, s, directory) : status;
}

static hepta_status read_spm(vocabulary *v, sources *s, const char *path, file_map file) {
    char directory[MAX_PATH];
    hepta_status status = spm_model_read(v, file.data, file.size);
    /* Only under Hugging Face's name: other models may lie beside each other. */
    if (status == HEPTA_OK && ends_with(path, "/tokenizer.model") && parent(directory, path)) {
        status = read_configs(v, s, directory);
    }
    return status;
}

/* Printable ASCII and line breaks at the start, as in a tiktoken file. */
static bool is_text(file_map file) {
    size_t n = file.size < 64 ? file.size : 64;
    for (size_t i = 0; i < n; i++) {
        uint8_t c = file.data[i];
        if (!(c == '\n' || c == '\r' || (c >= 0x20 && c < 0x7F))) {
            return false;
        }
    }
    return n > 0;
}

static hepta_status read_file(vocabulary *v, sources *s, const char *path) {
    file_map file;
    hepta_status status = open_source(v, s, path, &file);
    if (status != HEPTA_OK) {
        return status;
    }
    if (file.size == 0) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT, "a tokenizer file without a single byte");
    }
    size_t i = 0;
    while (i < file.size && i < 64 && strchr(" \t\r\n", file.data[i]) != NULL &&
           file.data[i] != '\0') {
        i++;
    }
    if (i < file.size && file.data[i] == '{') {
        return read_json(v, s, path, file);
    }
    if (is_text(file)) {
        return tiktoken_read(v, file.data, file.size);
    }
    if (file.size >= 4 && load_u32(file.data) <= LLAMA2C_MAX_LONGEST) {
        return llama2c_tokenizer_read(v, file.data, file.size);
    }
    return read_spm(v, s, path, file);
}

static hepta_status read_directory(vocabulary *v, sources *s, const char *directory) {
    char path[MAX_PATH];
    if ((join(path, directory, "tokenizer.json") && file_exists(path)) ||
        (join(path, directory, "tokenizer.model") && file_exists(path)) ||
        find_one(directory, "vocab.json", path) == 1) {
        return read_file(v, s, path);
    }
    return vocabulary_error(v, HEPTA_ERROR_IO,
                            "no tokenizer in this directory: looked for tokenizer.json, "
                            "tokenizer.model, or one vocab.json with merges.txt");
}

/* ---- Another container ------------------------------------------------- */

static hepta_status copy_value(container *c, const char *key, const kv *k, hepta_error *err) {
    switch (k->type) {
    case KV_STRING:
        return container_set_string(c, key, k->v.s.data, (size_t)k->v.s.n, err);
    case KV_ARRAY:
        return container_set_array(c, key, k->item_type, k->v.items, k->n_items, err);
    case KV_BOOL:
        return container_set_bool(c, key, k->v.u != 0, err);
    case KV_U8:
    case KV_U16:
    case KV_U32:
    case KV_U64:
        return container_set_u64(c, key, k->v.u, err);
    case KV_I8:
    case KV_I16:
    case KV_I32:
    case KV_I64: /* -1 stands for none */
        return k->v.i < 0 ? HEPTA_OK : container_set_u64(c, key, (uint64_t)k->v.i, err);
    default:
        return HEPTA_OK; /* no tokenizer key is a floating-point number */
    }
}

static hepta_status read_container(const char *path, container *c, hepta_error *err) {
    static const char prefix[] = "tokenizer.";
    container *other = NULL;
    const container_options options = {.metadata_only = true};
    hepta_status status = container_open(path, &options, &other, err);
    if (status != HEPTA_OK) {
        return status;
    }
    if (container_find(other, "tokenizer.ggml.tokens") == NULL) {
        status = error_set(err, HEPTA_ERROR_FORMAT, "%s: no tokenizer in this file", path);
        goto done;
    }
    vocabulary_remove_old(c);
    for (size_t i = 0; i < other->n_kvs && status == HEPTA_OK; i++) {
        char key[128];
        const kv *k = &other->kvs[i];
        if (k->key.n < sizeof key && k->key.n > strlen(prefix) &&
            memcmp(k->key.data, prefix, strlen(prefix)) == 0) {
            memcpy(key, k->key.data, (size_t)k->key.n);
            key[k->key.n] = '\0';
            status = copy_value(c, key, k, err);
        }
    }
done:
    container_close(other);
    return status;
}

static bool is_container(const char *path) {
    file_map file;
    if (file_map_open(path, &file, NULL) != HEPTA_OK) {
        return false;
    }
    bool yes = file.size >= 4 && memcmp(file.data, "GGUF", 4) == 0;
    file_map_close(&file);
    return yes;
}

hepta_status tokenizer_file_read(const char *path, container *c, hepta_error *err) {
    bool directory = file_is_directory(path);
    if (!directory && is_container(path)) {
        return read_container(path, c, err);
    }
    vocabulary v;
    sources s = {.n_maps = 0};
    vocabulary_init(&v, path, err);
    hepta_status status = directory ? read_directory(&v, &s, path) : read_file(&v, &s, path);
    if (status == HEPTA_OK) {
        status = vocabulary_store(&v, c);
    }
    vocabulary_free(&v);
    sources_free(&s);
    return status;
}
