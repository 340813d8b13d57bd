/*
 * safetensors.h - the table of contents of one safetensors file.
 */
#ifndef FORMAT_SAFETENSORS_H
#define FORMAT_SAFETENSORS_H

#include "format/container.h"

typedef struct safetensors_entry {
    const char *name;
    char dtype[16];          /* "F32", "BF16", ... as in the file */
    uint32_t type;           /* tensor_type of F32, F16, BF16; SAFETENSORS_OTHER else */
    uint32_t n_dims;         /* 0: a scalar; more than 4: not for us, ne is not filled */
    uint64_t ne[4];          /* GGUF's order: ne[0] is the last dimension of the file's shape */
    uint64_t begin, n_bytes; /* in the file */
    bool used;               /* free for the caller */
} safetensors_entry;

enum { SAFETENSORS_OTHER = 0xffff };

typedef struct safetensors {
    const char *path;
    file_map map;               /* owned by the container */
    safetensors_entry *entries; /* sorted by name */
    size_t n_entries;
} safetensors;

/*
 * Maps the file into c and reads its header. Checked: the header's length, JSON, offsets that
 * cover the data section without gaps or overlaps, sizes that agree with shape and dtype. The
 * result lives as long as c. HEPTA_ERROR_UNSUPPORTED in an engine-only build.
 */
hepta_status safetensors_open(container *c, const char *path, safetensors *out, hepta_error *err);

/* NULL if there is no such tensor. */
safetensors_entry *safetensors_find(const safetensors *s, const char *name);

#endif
