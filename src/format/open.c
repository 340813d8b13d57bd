/*
 * open.c - recognizes what a path holds, by content, and opens it as a container.
 *
 *     directory                        Hugging Face model (config.json inside)
 *     "GGUF"                           GGUF, or .hepta when it holds hepta.* keys
 *     0x616b3432                       llama2.c, version 1
 *     seven plausible integers and     llama2.c, first format (it has no magic number)
 *     exactly the size they ask for
 *
 * Well-known files of other kinds are named in the error, with what to do.
 */
#include "format/private.h"

#include <string.h>

static const struct {
    const char *magic;
    size_t n;
    const char *what;
} strangers[] = {
    {"lmgg", 4, "a GGML file of 2023, before GGUF; convert the original model to GGUF"},
    {"fmgg", 4, "a GGMF file of 2023, before GGUF; convert the original model to GGUF"},
    {"tjgg", 4, "a GGJT file of 2023, before GGUF; convert the original model to GGUF"},
    {"algg", 4, "a GGLA adapter; only whole models are read"},
    {"PK\3\4", 4, "a zip archive, as PyTorch writes; convert the model to safetensors"},
    {"\200\002", 2, "a Python pickle; convert the model to safetensors"},
    {"{", 1, "a JSON file; to open a Hugging Face model give its directory"},
};

/* A safetensors file starts with the length of its JSON header and the header. */
static bool looks_like_safetensors(const file_map *map) {
    return map->size > 8 && load_u64(map->data) < map->size && map->data[8] == '{';
}

static hepta_status refuse_stranger(const char *path, const file_map *map, hepta_error *err) {
    path = path_shown(path);
    if (map->size < 4) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: %zu bytes long, too short for a model; expected a GGUF or .hepta "
                         "file, a Hugging Face directory or a llama2.c .bin",
                         path, map->size);
    }
    if (looks_like_safetensors(map)) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: is one safetensors file; give the directory that holds it and the "
                         "model's config.json",
                         path);
    }
    for (size_t i = 0; i < sizeof strangers / sizeof strangers[0]; i++) {
        if (memcmp(map->data, strangers[i].magic, strangers[i].n) == 0) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED, "%s: is %s", path, strangers[i].what);
        }
    }
    uint64_t llama2c_size = llama2c_expected_size(map);
    if (llama2c_size != 0) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: no known kind of model; as a llama2.c .bin, which it may be by its "
                         "header, it should have %" PRIu64 " bytes and has %zu: it is cut short",
                         path, llama2c_size, map->size);
    }
    return error_set(err, HEPTA_ERROR_FORMAT,
                     "%s: no known kind of model: it starts with the bytes %02x %02x %02x %02x; "
                     "expected a GGUF or .hepta file, a Hugging Face directory or a llama2.c .bin",
                     path, map->data[0], map->data[1], map->data[2], map->data[3]);
}

static hepta_status open_file(const char *path, const container_options *options, container *c,
                              hepta_error *err) {
    file_map map;
    hepta_status status = file_map_open(path, &map, err);
    if (status != HEPTA_OK) {
        return status;
    }
    if (map.size >= 4 && memcmp(map.data, "GGUF", 4) == 0) {
        status = gguf_open(path, options, c, err);
    } else if (llama2c_expected_size(&map) == map.size && map.size > 0) {
        status = llama2c_open(path, options, c, err);
    } else {
        status = refuse_stranger(path, &map, err);
    }
    file_map_close(&map);
    return status;
}

#ifdef HEPTA_ENGINE_ONLY
/* The full build has src/text/tokenizer_file.c. */
hepta_status tokenizer_file_read(const char *path, container *c, hepta_error *err) {
    (void)c;
    return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: this build of the engine alone reads no tokenizers", path_shown(path));
}
#endif

hepta_status container_open(const char *path, const container_options *options, container **out,
                            hepta_error *err) {
    const container_options defaults = {.tokenizer_path = NULL};
    options = options != NULL ? options : &defaults;
    container *c = memory_alloc(1, sizeof *c);
    char *own_path = c != NULL ? arena_copy_string(&c->memory, path, strlen(path)) : NULL;
    if (own_path == NULL) {
        memory_free(c);
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path_shown(path));
    }
    c->path = own_path;
    hepta_status status = file_is_directory(path) ? hf_open(own_path, options, c, err)
                                                  : open_file(own_path, options, c, err);
    if (status == HEPTA_OK && options->tokenizer_path != NULL && !options->no_tokenizer) {
        status = tokenizer_file_read(options->tokenizer_path, c, err);
    }
    if (status != HEPTA_OK) {
        container_close(c);
        return status;
    }
    *out = c;
    return HEPTA_OK;
}

void container_clear(container *c) {
    for (size_t i = 0; i < c->n_maps; i++) {
        file_map_close(&c->maps[i]);
    }
    memory_free(c->maps);
    memory_free(c->kvs);
    memory_free(c->tensors);
    memory_free(c->kv_index.slots);
    memory_free(c->tensor_index.slots);
    arena_free(&c->memory);
}

void container_close(container *c) {
    if (c != NULL) {
        container_clear(c);
        memory_free(c);
    }
}
