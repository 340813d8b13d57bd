/*
 * hf_groups.c - matrices of GPTQ and AWQ models: integers in groups of columns that share a scale
 * and a zero point, weight = scale * (q - zero).
 *
 * With W (rows, cols), b bits and n groups, in the files' own shapes:
 *
 *     GPTQ: qweight I32 (cols b / 32, rows): down a column, the b-bit integers of one row of W,
 *           from the low bits of the first word on (3-bit ones straddle words)
 *           qzeros  I32 (n, rows b / 32), along a row likewise: zero - 1, or zero in "gptq_v2"
 *           scales  F16 (n, rows);  g_idx I32 (cols): the group of each column
 *     AWQ:  qweight I32 (cols, rows / 8): each word holds rows 8k + {0, 2, 4, 6, 1, 3, 5, 7}
 *           from the low bits on;  qzeros I32 (n, rows / 8) likewise;  scales F16 (n, rows)
 *
 * Nothing is converted here: the tensor points to its parts, and dequantize.c computes rows.
 *
 * Sources: AutoGPTQ 0.7.1, auto_gptq/nn_modules/qlinear/qlinear_cuda.py; GPTQModel's
 * checkpoint_format; AutoAWQ 0.2.9, awq/utils/packing_utils.py and awq/modules/linear/gemm.py.
 */
#include "format/private.h"

#ifndef HEPTA_ENGINE_ONLY

#include "format/hf_groups.h"

#include <string.h>
#include <strings.h>

/* ---- quantization_config ----------------------------------------------- */

/* The value of the first of two names that is there and not null. */
static const json_t *either(const json_t *config, const char *first, const char *second) {
    const json_t *value = json_object_get(config, first);
    value = value == NULL || json_is_null(value) ? json_object_get(config, second) : value;
    return json_is_null(value) ? NULL : value;
}

static const char *string_or(const json_t *value, const char *fallback) {
    return value == NULL ? fallback : json_is_string(value) ? json_string_value(value) : "?";
}

static hepta_status unsupported(const char *path, const char *key, const char *value,
                                const char *expected, hepta_error *err) {
    return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: quantization_config: %s is \"%.40s\"; supported: %s; or start from the "
                     "original weights",
                     path, key, value, expected);
}

static hepta_status read_sizes(const json_t *config, const char *path, group_scheme *out,
                               hepta_error *err) {
    bool awq = out->type == TENSOR_AWQ;
    const json_t *bits = either(config, "bits", "w_bit");
    const json_t *size = either(config, "group_size", "q_group_size");
    json_int_t b = json_integer_value(bits), n = json_integer_value(size);
    bool known = b == 4 || (!awq && (b == 2 || b == 3 || b == 8));
    if (!json_is_integer(bits) || !known) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: quantization_config: bits is %lld; supported: %s", path, (long long)b,
                         awq ? "4 (AWQ)" : "2, 3, 4 and 8 (GPTQ)");
    }
    if (!json_is_integer(size) || !(n == -1 || (n > 0 && n <= TENSOR_PACKED_MAX_COLS))) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: quantization_config: group_size is %lld; expected -1 (whole rows) or "
                         "1 to %d columns",
                         path, (long long)n, (int)TENSOR_PACKED_MAX_COLS);
    }
    out->bits = (uint32_t)b;
    out->size = n == -1 ? 0 : (uint32_t)n;
    return HEPTA_OK;
}

static hepta_status read_gptq(const json_t *config, const char *path, group_scheme *out,
                              hepta_error *err) {
    const char *format = string_or(either(config, "checkpoint_format", "format"), "gptq");
    const char *word = string_or(either(config, "pack_dtype", "pack_dtype"), "int32");
    bool v2 = strcmp(format, "gptq_v2") == 0;
    if (!v2 && strcmp(format, "gptq") != 0) {
        return unsupported(path, "checkpoint_format", format, "gptq, gptq_v2", err);
    }
    if (json_is_true(json_object_get(config, "is_marlin_format"))) {
        return unsupported(path, "is_marlin_format", "true", "false", err);
    }
    if (strcmp(word, "int32") != 0) {
        return unsupported(path, "pack_dtype", word, "int32", err);
    }
    if (json_object_size(json_object_get(config, "dynamic")) > 0) {
        return unsupported(path, "dynamic", "(rules for single matrices)", "none", err);
    }
    out->type = TENSOR_GPTQ;
    out->zero_offset = v2 ? 0 : 1;
    return read_sizes(config, path, out, err);
}

static hepta_status read_awq(const json_t *config, const char *path, group_scheme *out,
                             hepta_error *err) {
    const char *version = string_or(json_object_get(config, "version"), "gemm");
    if (strcasecmp(version, "gemm") != 0) {
        return unsupported(path, "version", version, "gemm", err);
    }
    out->type = TENSOR_AWQ;
    return read_sizes(config, path, out, err);
}

hepta_status group_scheme_read(const json_t *config, const char *path, group_scheme *out,
                               hepta_error *err) {
    *out = (group_scheme){.type = TENSOR_F32};
    if (config == NULL) {
        return HEPTA_OK;
    }
    const char *method = string_or(json_object_get(config, "quant_method"), NULL);
    if (method == NULL && (json_is_true(json_object_get(config, "load_in_8bit")) ||
                           json_is_true(json_object_get(config, "load_in_4bit")))) {
        method = "bitsandbytes"; /* older files do not name it */
    }
    if (method != NULL && strcmp(method, "gptq") == 0) {
        return read_gptq(config, path, out, err);
    }
    if (method != NULL && strcmp(method, "awq") == 0) {
        return read_awq(config, path, out, err);
    }
    return unsupported(path, "quant_method", method != NULL ? method : "missing",
                       "gptq (2, 3, 4 or 8 bits) and awq (4 bits, gemm)", err);
}

/* ---- Tensors ----------------------------------------------------------- */

typedef struct builder {
    const group_scheme *scheme;
    const char *base;
    uint64_t rows, cols;
    hepta_error *err;
} builder;

/* `part` is there, of this type and shape (rows 0: a vector). */
static hepta_status check_part(const builder *b, const group_part *part, const char *suffix,
                               const char *dtype, uint64_t rows, uint64_t cols) {
    const safetensors_entry *e = part->entry;
    if (e == NULL) {
        return error_set(b->err, HEPTA_ERROR_FORMAT,
                         "tensor %s.%s is missing beside %s.qweight: the download is incomplete",
                         b->base, suffix, b->base);
    }
    const char *shown = path_shown(part->file->path);
    if (strcmp(e->dtype, dtype) != 0) {
        return error_set(b->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: tensor %s.%s is of type %s; expected %s", shown, b->base, suffix,
                         e->dtype, dtype);
    }
    if (e->n_dims != (rows == 0 ? 1u : 2u) || e->ne[0] != cols || (rows > 0 && e->ne[1] != rows)) {
        return error_set(b->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %s.%s has %" PRIu32 " dimensions, [%" PRIu64 ", %" PRIu64
                         "]; %" PRIu64 " x %" PRIu64 " weights of %" PRIu32
                         " bits in groups of %" PRIu32 " (config.json) ask for [%" PRIu64
                         ", %" PRIu64 "]",
                         shown, b->base, suffix, e->n_dims, e->ne[1], e->ne[0], b->rows, b->cols,
                         b->scheme->bits, b->scheme->size, rows, cols);
    }
    part->entry->used = true;
    return HEPTA_OK;
}

static const uint8_t *data_of(const group_part *part) {
    return part->file->map.data + part->entry->begin;
}

/* Every item of g_idx names a group. */
static hepta_status check_index(const builder *b, const group_part *part, uint32_t n_groups) {
    hepta_status status = check_part(b, part, "g_idx", "I32", 0, b->cols);
    for (uint64_t i = 0; status == HEPTA_OK && i < b->cols; i++) {
        uint32_t group = load_u32(data_of(part) + 4 * i);
        if (group >= n_groups) {
            return error_set(b->err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %s.g_idx: item %" PRIu64 " is %" PRId32
                             "; expected 0 to %" PRIu32 ": the file is damaged",
                             path_shown(part->file->path), b->base, i, (int32_t)group,
                             n_groups - 1);
        }
    }
    return status;
}

/* Older programs write a bias of zeros for every matrix; any other would change results. */
static hepta_status check_bias(const builder *b, const group_part *part) {
    const safetensors_entry *e = part->entry;
    if (e == NULL) {
        return HEPTA_OK;
    }
    for (uint64_t i = 0; i < e->n_bytes; i++) {
        if (data_of(part)[i] != 0) {
            return error_set(b->err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: tensor %s.bias is not zero: biases are not supported",
                             path_shown(part->file->path), b->base);
        }
    }
    part->entry->used = true;
    return HEPTA_OK;
}

static hepta_status check_scales(const builder *b, const group_part *part, uint32_t n_groups) {
    const safetensors_entry *e = part->entry;
    if (e != NULL && e->type == SAFETENSORS_OTHER) {
        return error_set(b->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: tensor %s.scales is of type %s; supported are F16, BF16 and F32",
                         path_shown(part->file->path), b->base, e->dtype);
    }
    return check_part(b, part, "scales", e != NULL ? e->dtype : "", n_groups, b->rows);
}

hepta_status group_matrix_add(container *c, const group_scheme *s, const group_parts *parts,
                              const char *base, const char *gguf, uint64_t rows, uint64_t cols,
                              hepta_error *err) {
    const builder b = {.scheme = s, .base = base, .rows = rows, .cols = cols, .err = err};
    const bool awq = s->type == TENSOR_AWQ;
    const uint64_t size = s->size == 0 ? cols : s->size;
    const uint32_t n_groups = (uint32_t)((cols + size - 1) / size);
    if (rows * s->bits % 32 != 0 || (awq ? cols % size != 0 : cols * s->bits % 32 != 0)) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: %s of %" PRIu64 " x %" PRIu64 " weights cannot have %" PRIu32
                         " bits in groups of %" PRIu64 ": %s",
                         path_shown(c->path), base, rows, cols, s->bits, size,
                         awq ? "rows come in eights, columns in whole groups"
                             : "rows and columns come in whole words of 32 bits");
    }
    const uint64_t row_words = rows * s->bits / 32;
    hepta_status status =
        awq ? check_part(&b, &parts->weights, "qweight", "I32", cols, row_words)
            : check_part(&b, &parts->weights, "qweight", "I32", cols * s->bits / 32, rows);
    if (status == HEPTA_OK) {
        status = check_part(&b, &parts->zeros, "qzeros", "I32", n_groups, row_words);
    }
    if (status == HEPTA_OK) {
        status = check_scales(&b, &parts->scales, n_groups);
    }
    if (status == HEPTA_OK && parts->index.entry != NULL) {
        status = check_index(&b, &parts->index, n_groups);
    }
    if (status == HEPTA_OK) {
        status = check_bias(&b, &parts->bias);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    tensor_groups *g = arena_alloc(&c->memory, 1, sizeof *g);
    if (g == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path_shown(c->path));
    }
    *g = (tensor_groups){.bits = s->bits,
                         .size = (uint32_t)size,
                         .n_groups = n_groups,
                         .zero_offset = s->zero_offset,
                         .scale_type = parts->scales.entry->type,
                         .zeros = data_of(&parts->zeros),
                         .scales = data_of(&parts->scales),
                         .n_bytes = parts->zeros.entry->n_bytes + parts->scales.entry->n_bytes};
    if (parts->index.entry != NULL) {
        g->index = data_of(&parts->index);
        g->n_bytes += parts->index.entry->n_bytes;
    }
    const tensor t = {.name = gguf,
                      .type = s->type,
                      .n_dims = 2,
                      .ne = {cols, rows, 1, 1},
                      .data = data_of(&parts->weights),
                      .n_bytes = parts->weights.entry->n_bytes,
                      .file = parts->weights.file->path,
                      .offset = parts->weights.entry->begin,
                      .groups = g};
    return container_add_tensor(c, &t, err);
}

#endif
