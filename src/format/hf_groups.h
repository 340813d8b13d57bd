/*
 * hf_groups.h - matrices of GPTQ and AWQ models in Hugging Face directories.
 */
#ifndef FORMAT_HF_GROUPS_H
#define FORMAT_HF_GROUPS_H

#include "format/safetensors.h"

#include <jansson.h>

/* What config.json's quantization_config says. */
typedef struct group_scheme {
    uint32_t type; /* TENSOR_GPTQ, TENSOR_AWQ; TENSOR_F32: not quantized */
    uint32_t bits;
    uint32_t size; /* columns of a group; 0: a whole row */
    uint32_t zero_offset;
} group_scheme;

/* `config`: quantization_config, NULL if there is none. `path`: of config.json, for messages. */
hepta_status group_scheme_read(const json_t *config, const char *path, group_scheme *out,
                               hepta_error *err);

/* One tensor of a directory; entry NULL: there is none. */
typedef struct group_part {
    safetensors_entry *entry;
    const safetensors *file;
} group_part;

/* BASE.qweight, BASE.qzeros, BASE.scales, BASE.g_idx (GPTQ), BASE.bias */
typedef struct group_parts {
    group_part weights, zeros, scales, index, bias;
} group_parts;

/* Adds the matrix (rows, cols) that these parts make up under the name `gguf`. */
hepta_status group_matrix_add(container *c, const group_scheme *s, const group_parts *parts,
                              const char *base, const char *gguf, uint64_t rows, uint64_t cols,
                              hepta_error *err);

#endif
