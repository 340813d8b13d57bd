/*
 * private.h - what the files of format/ share with each other and with nobody else.
 */
#ifndef FORMAT_PRIVATE_H
#define FORMAT_PRIVATE_H

#include "format/container.h"

#include <inttypes.h>

/* Limits on what a file may ask for; the largest models known have some 100 keys, 2000 tensors. */
enum {
    FORMAT_MAX_KVS = 65536,
    FORMAT_MAX_TENSORS = 65536,
    FORMAT_MAX_KEY = 65535, /* bytes; the GGUF specification's limit */
    FORMAT_MAX_NAME = 255,  /* bytes of a tensor's name; GGML allows 63 */
    FORMAT_MAX_LAYERS = 4096,
    FORMAT_SHA256_HEX = 64, /* digits of a SHA-256 */
    HEPTA_FILE_VERSION = 1,
    HEPTA_ALIGNMENT = 64 /* of tensor data in .hepta files */
};

/* For "%.*s": a string from a file, not longer than fits a message. */
#define SHOWN(n) ((int)((n) < 80 ? (n) : 80))

/* "a/b" in the container's memory; NULL when memory is short. */
char *format_join_path(container *c, const char *directory, const char *name);

/* Frees what the container holds, not the container. */
void container_clear(container *c);

/* Maps a file that stays mapped until container_close. */
hepta_status container_add_map(container *c, const char *path, file_map *out, hepta_error *err);

/* Appends a value as it is, nothing copied; a key that is there already is an error. */
hepta_status container_add_kv(container *c, const kv *value, hepta_error *err);

/* HEPTA_ERROR_FORMAT when the data of two tensors overlap. */
hepta_status container_check_overlap(const container *c, hepta_error *err);

const kv *container_find_n(const container *c, const char *key, uint64_t n);

/* Bytes of a scalar of this type; 0 for strings, arrays and unknown types. */
uint64_t kv_type_size(kv_type type);

/* Block of a GGML type: items and bytes; false if the type is unknown. */
bool tensor_type_block(uint32_t type, uint64_t *items, uint64_t *bytes);

/* True when s is the SHA-256 written as 64 lower-case hexadecimal digits, then in digest. */
bool format_parse_sha256(kv_string s, uint8_t digest[32]);

/* True for keys that the .hepta writer computes itself. */
bool hepta_key_is_computed(kv_string key);

/*
 * hepta.c: turns a GGUF container that holds hepta.* keys into a .hepta one, after checking its
 * header hash, its layout and its hepta.* keys. `infos_end` and `header_size`: bytes before the
 * first tensor, without and with the padding.
 */
hepta_status hepta_header_read(container *c, uint64_t infos_end, uint64_t header_size,
                               hepta_error *err);
/* The keys that the quantizer supplies are there: hepta.recipe, .bits, .rotation.seed. */
hepta_status hepta_check_required(const container *c, hepta_error *err);
bool hepta_keys_present(const container *c);

/*
 * The size that this file should have if it is a llama2.c one; 0 when its start is no such
 * header. Files with the magic number of version 1 get their own size.
 */
uint64_t llama2c_expected_size(const file_map *map);

#endif
