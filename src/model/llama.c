/*
 * llama.c - opening a model: hyperparameters and tensors, checked before anything is computed.
 *
 * Every number comes from a file that may be damaged or hostile. Invariant: after
 * hepta_model_open succeeds, every matrix has the shape that the forward pass assumes, every
 * width is at most KERNELS_MAX_COLS, norm vectors and row scales are finite, and no tensor of the
 * file is left out of the computation silently.
 *
 * Documented in docs/MODEL.md.
 */
#include "model/llama.h"
#include "kernels/math.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "F32 matrices are used where the file is mapped: a little-endian machine is assumed"
#endif

/* What the checks pass around. */
typedef struct loader {
    hepta_model *model;
    container *file;
    uint64_t rotation_seed;
    size_t n_used; /* tensors that found their place */
    hepta_error *err;
} loader;

/* ---- Hyperparameters --------------------------------------------------- */

static hepta_status out_of_range(const loader *l, const char *key, uint64_t value, uint64_t min,
                                 uint64_t max) {
    return error_set(l->err, HEPTA_ERROR_FORMAT,
                     "%s: %s is %" PRIu64 ", expected %" PRIu64 " to %" PRIu64,
                     path_shown(l->file->path), key, value, min, max);
}

static hepta_status check_range(const loader *l, const char *key, uint64_t value, uint64_t min,
                                uint64_t max) {
    return value < min || value > max ? out_of_range(l, key, value, min, max) : HEPTA_OK;
}

static hepta_status get_u32(const loader *l, const char *key, uint32_t min, uint32_t max,
                            uint32_t *out) {
    hepta_status status = container_get_u32(l->file, key, out, l->err);
    return status != HEPTA_OK ? status : check_range(l, key, *out, min, max);
}

static hepta_status get_u32_or(const loader *l, const char *key, uint32_t fallback, uint32_t min,
                               uint32_t max, uint32_t *out) {
    hepta_status status = container_get_u32_or(l->file, key, fallback, out, l->err);
    return status != HEPTA_OK ? status : check_range(l, key, *out, min, max);
}

static hepta_status get_positive_f32_or(const loader *l, const char *key, float fallback,
                                        float *out) {
    hepta_status status = container_get_f32_or(l->file, key, fallback, out, l->err);
    if (status == HEPTA_OK && !(*out > 0.0f && *out <= FLT_MAX)) {
        return error_set(l->err, HEPTA_ERROR_FORMAT, "%s: %s is %g, expected a positive number",
                         path_shown(l->file->path), key, (double)*out);
    }
    return status;
}

/* Cut to size between code points. */
static void copy_name(const char *name, char *out, size_t size) {
    size_t n = strlen(name);
    if (n >= size) {
        n = size - 1;
        while (n > 0 && ((uint8_t)name[n] & 0xc0) == 0x80) {
            n--;
        }
    }
    memcpy(out, name, n);
    out[n] = '\0';
}

static hepta_status read_architecture(loader *l) {
    hepta_model_info *info = &l->model->info;
    const char *name = container_get_string(l->file, "general.architecture");
    if (name == NULL) {
        return error_set(l->err, HEPTA_ERROR_FORMAT, "%s: general.architecture is missing",
                         path_shown(l->file->path));
    }
    if (strcmp(name, "llama") != 0) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: architecture \"%.40s\" is not supported (only \"llama\")",
                         path_shown(l->file->path), name);
    }
    snprintf(info->architecture, sizeof info->architecture, "%s", name);
    name = container_get_string(l->file, "general.name");
    copy_name(name != NULL ? name : "", info->name, sizeof info->name);
    return HEPTA_OK;
}

static hepta_status read_shape(loader *l) {
    hepta_model_info *i = &l->model->info;
    uint32_t value_dim, n_expert;
    hepta_status status;
    if ((status = get_u32_or(l, "llama.expert_count", 0, 0, UINT32_MAX, &n_expert)) != HEPTA_OK ||
        (status = get_u32(l, "llama.context_length", 1, INT32_MAX, &i->n_ctx_train)) != HEPTA_OK ||
        (status = get_u32(l, "llama.embedding_length", 1, KERNELS_MAX_COLS, &i->n_embd)) !=
            HEPTA_OK ||
        (status = get_u32(l, "llama.block_count", 1, 65536, &i->n_layer)) != HEPTA_OK ||
        (status = get_u32(l, "llama.feed_forward_length", 1, KERNELS_MAX_COLS, &i->n_ff)) !=
            HEPTA_OK ||
        (status = get_u32(l, "llama.attention.head_count", 1, KERNELS_MAX_COLS, &i->n_head)) !=
            HEPTA_OK ||
        (status = get_u32_or(l, "llama.attention.head_count_kv", i->n_head, 1, i->n_head,
                             &i->n_head_kv)) != HEPTA_OK) {
        return status;
    }
    if (n_expert != 0) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: mixtures of experts are not supported (llama.expert_count %u)",
                         path_shown(l->file->path), n_expert);
    }
    if (i->n_head % i->n_head_kv != 0) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: llama.attention.head_count %u is no multiple of head_count_kv %u",
                         path_shown(l->file->path), i->n_head, i->n_head_kv);
    }
    if ((status = get_u32_or(l, "llama.attention.key_length", i->n_embd / i->n_head, 1,
                             KERNELS_MAX_COLS, &i->head_dim)) != HEPTA_OK ||
        (status = get_u32_or(l, "llama.attention.value_length", i->head_dim, 1, KERNELS_MAX_COLS,
                             &value_dim)) != HEPTA_OK) {
        return status;
    }
    if (value_dim != i->head_dim) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: heads with keys of %u and values of %u items",
                         path_shown(l->file->path), i->head_dim, value_dim);
    }
    if (container_find(l->file, "llama.attention.key_length") == NULL &&
        i->n_embd % i->n_head != 0) {
        return error_set(
            l->err, HEPTA_ERROR_FORMAT,
            "%s: llama.embedding_length %u is no multiple of llama.attention.head_count %u",
            path_shown(l->file->path), i->n_embd, i->n_head);
    }
    if ((uint64_t)i->n_head * i->head_dim > KERNELS_MAX_COLS) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: %u heads of %u items are more than the supported %d in all",
                         path_shown(l->file->path), i->n_head, i->head_dim, KERNELS_MAX_COLS);
    }
    return HEPTA_OK;
}

static hepta_status read_norm_eps(loader *l) {
    static const char key[] = "llama.attention.layer_norm_rms_epsilon";
    float *eps = &l->model->norm_eps;
    hepta_status status = container_get_f32(l->file, key, eps, l->err);
    if (status == HEPTA_OK && !(*eps > 0.0f && *eps <= 1.0f)) {
        return error_set(l->err, HEPTA_ERROR_FORMAT, "%s: %s is %g, expected above 0, up to 1",
                         path_shown(l->file->path), key, (double)*eps);
    }
    return status;
}

static const tensor *find_rope_factors(loader *l) {
    const tensor *t = container_tensor(l->file, "rope_freqs.weight");
    return t != NULL ? t : container_tensor(l->file, "blk.0.rope_freqs.weight");
}

static hepta_status load_vector(loader *l, const tensor *t, const char *name, uint32_t n,
                                const float **out);

/* frequency_i = base^(-2i / n_rot), divided by the linear factor and by rope_freqs.weight. */
static hepta_status read_rope(loader *l) {
    hepta_model *m = l->model;
    float base, factor;
    hepta_status status;
    if ((status = get_u32_or(l, "llama.rope.dimension_count", m->info.head_dim, 2, m->info.head_dim,
                             &m->n_rot)) != HEPTA_OK ||
        (status = get_positive_f32_or(l, "llama.rope.freq_base", 10000.0f, &base)) != HEPTA_OK ||
        (status = get_positive_f32_or(l, "llama.rope.scaling.factor", 1.0f, &factor)) != HEPTA_OK) {
        return status;
    }
    if (m->n_rot % 2 != 0) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: llama.rope.dimension_count is %u, expected an even number",
                         path_shown(l->file->path), m->n_rot);
    }
    const char *scaling = container_get_string(l->file, "llama.rope.scaling.type");
    if (scaling == NULL || strcmp(scaling, "none") == 0) {
        factor = 1.0f;
    } else if (strcmp(scaling, "linear") != 0) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: llama.rope.scaling.type \"%.40s\" is not supported (none, linear,"
                         " or rope_freqs.weight)",
                         path_shown(l->file->path), scaling);
    }
    m->rope_interleaved = container_get_bool_or(l->file, "hepta.rope.interleaved", true);

    uint32_t n = m->n_rot / 2;
    const float *divisor = NULL;
    const tensor *t = find_rope_factors(l);
    if (t != NULL && (status = load_vector(l, t, t->name, n, &divisor)) != HEPTA_OK) {
        return status;
    }
    m->rope_frequency = arena_alloc(&m->memory, n, sizeof *m->rope_frequency);
    if (m->rope_frequency == NULL) {
        return error_set(l->err, HEPTA_ERROR_MEMORY, "%s: no memory for %u frequencies",
                         path_shown(l->file->path), n);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (divisor != NULL && !(divisor[i] > 0.0f)) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: %s: item %u is %g, expected a positive number",
                             path_shown(l->file->path), t->name, i, (double)divisor[i]);
        }
        double frequency = math_pow_f64((double)base, -2.0 * (double)i / (double)m->n_rot);
        frequency /= (double)factor;
        m->rope_frequency[i] = divisor != NULL ? frequency / (double)divisor[i] : frequency;
    }
    return HEPTA_OK;
}

/* ---- Tensors ----------------------------------------------------------- */

static hepta_status find_tensor(loader *l, const char *name, const tensor **out) {
    *out = container_tensor(l->file, name);
    if (*out == NULL) {
        return error_set(l->err, HEPTA_ERROR_FORMAT, "%s: tensor %s is missing",
                         path_shown(l->file->path), name);
    }
    return HEPTA_OK;
}

static hepta_status wrong_shape(const loader *l, const tensor *t, uint32_t n_rows,
                                uint32_t n_cols) {
    char found[96], expected[32];
    snprintf(found, sizeof found, "%" PRIu64, t->ne[0]);
    for (uint32_t d = 1; d < t->n_dims && d < 4; d++) {
        size_t n = strlen(found);
        snprintf(found + n, sizeof found - n, " x %" PRIu64, t->ne[d]);
    }
    snprintf(expected, sizeof expected, n_rows > 0 ? "%u x %u" : "%u", n_cols, n_rows);
    return error_set(l->err, HEPTA_ERROR_FORMAT, "%s: tensor %.64s has the shape %s, expected %s",
                     path_shown(t->file), t->name, found, expected);
}

static hepta_status wrong_type(const loader *l, const tensor *t, const char *expected) {
    return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: tensor %.64s has the type %s (%u), expected %s", path_shown(t->file),
                     t->name, tensor_type_name(t->type), t->type, expected);
}

/* Copies a vector of n items as F32. */
static hepta_status load_vector(loader *l, const tensor *t, const char *name, uint32_t n,
                                const float **out) {
    hepta_status status = t == NULL ? find_tensor(l, name, &t) : HEPTA_OK;
    if (status != HEPTA_OK) {
        return status;
    }
    if (t->n_dims != 1 || t->ne[0] != n) {
        return wrong_shape(l, t, 0, n);
    }
    if (t->type != TENSOR_F32 && t->type != TENSOR_F16 && t->type != TENSOR_BF16) {
        return wrong_type(l, t, "F32, F16 or BF16");
    }
    float *v = arena_alloc(&l->model->memory, n, sizeof *v);
    if (v == NULL) {
        return error_set(l->err, HEPTA_ERROR_MEMORY, "%s: no memory for tensor %.64s",
                         path_shown(t->file), name);
    }
    l->model->kernels->row_to_f32(t->type, t->data, n, v);
    for (uint32_t i = 0; i < n; i++) {
        if (!isfinite(v[i])) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.64s: item %u is not a finite number",
                             path_shown(t->file), name, i);
        }
    }
    l->n_used++;
    *out = v;
    return HEPTA_OK;
}

static hepta_status find_rotation(loader *l, uint32_t n, const rotation **out) {
    hepta_model *m = l->model;
    for (size_t i = 0; i < m->n_rotations; i++) {
        if (m->rotations[i]->n == n) {
            *out = m->rotations[i];
            return HEPTA_OK;
        }
    }
    hepta_status status =
        rotation_create(n, l->rotation_seed, &m->rotations[m->n_rotations], l->err);
    if (status == HEPTA_OK) {
        *out = m->rotations[m->n_rotations++];
    }
    return status;
}

static hepta_status load_packed(loader *l, const tensor *t, matrix *out) {
    uint64_t n_bytes;
    if (!tensor_packed_bytes(t->half_bits, out->n_rows, out->n_cols, &n_bytes) ||
        n_bytes != t->n_bytes) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %.64s: %" PRIu64 " bytes do not fit %u/2 bits per weight",
                         path_shown(t->file), t->name, t->n_bytes, t->half_bits);
    }
    packed_matrix *p = &out->packed;
    p->half_bits = t->half_bits;
    p->n_rows = out->n_rows;
    p->n_cols = (uint32_t)round_up(out->n_cols, 16);
    p->codes = t->data;
    p->scales =
        t->data + round_up(out->n_rows, PACKED_STRIP) * ((uint64_t)p->n_cols / 16 * p->half_bits);
    for (uint32_t r = 0; r < p->n_rows; r++) {
        /* bfloat16: an exponent of all ones is an infinity or NaN */
        if ((load_u16(p->scales + (size_t)2 * r) & 0x7f80) == 0x7f80) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: tensor %.64s: the scale of row %u is not a finite number",
                             path_shown(t->file), t->name, r);
        }
    }
    return find_rotation(l, out->n_cols, &out->rotation);
}

static hepta_status load_matrix(loader *l, const char *name, uint32_t n_rows, uint32_t n_cols,
                                matrix *out) {
    const tensor *t;
    hepta_status status = find_tensor(l, name, &t);
    if (status != HEPTA_OK) {
        return status;
    }
    if (t->n_dims != 2 || t->ne[0] != n_cols || t->ne[1] != n_rows) {
        return wrong_shape(l, t, n_rows, n_cols);
    }
    *out = (matrix){.source = t, .type = t->type, .n_rows = n_rows, .n_cols = n_cols};
    l->n_used++;
    if (t->type == TENSOR_PACKED) {
        return load_packed(l, t, out);
    }
    if (!tensor_type_is_readable(t->type)) {
        return wrong_type(l, t,
                          TENSOR_READABLE_TYPES "; get the model in one of these types, best in "
                                                "F16 or BF16");
    }
    return HEPTA_OK;
}

static hepta_status load_layer(loader *l, uint32_t layer, llama_layer *out) {
    const hepta_model_info *i = &l->model->info;
    const uint32_t heads = i->n_head * i->head_dim, heads_kv = i->n_head_kv * i->head_dim;
    const struct {
        const char *name;
        matrix *matrix; /* NULL: a norm */
        const float **vector;
        uint32_t n_rows, n_cols;
    } parts[] = {
        {"attn_norm", NULL, &out->attn_norm, 0, i->n_embd},
        {"attn_q", &out->wq, NULL, heads, i->n_embd},
        {"attn_k", &out->wk, NULL, heads_kv, i->n_embd},
        {"attn_v", &out->wv, NULL, heads_kv, i->n_embd},
        {"attn_output", &out->wo, NULL, i->n_embd, heads},
        {"ffn_norm", NULL, &out->ffn_norm, 0, i->n_embd},
        {"ffn_gate", &out->gate, NULL, i->n_ff, i->n_embd},
        {"ffn_up", &out->up, NULL, i->n_ff, i->n_embd},
        {"ffn_down", &out->down, NULL, i->n_embd, i->n_ff},
    };
    for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%u.%s.weight", layer, parts[p].name);
        hepta_status status =
            parts[p].matrix != NULL
                ? load_matrix(l, name, parts[p].n_rows, parts[p].n_cols, parts[p].matrix)
                : load_vector(l, NULL, name, parts[p].n_cols, parts[p].vector);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    return HEPTA_OK;
}

/* A tensor without a place (a bias, an extra norm) would make every result wrong: refuse it. */
static hepta_status check_all_used(const loader *l) {
    static const char *const known[] = {"token_embd", "output_norm", "output", "rope_freqs"};
    static const char *const parts[] = {"attn_norm",   "attn_q",    "attn_k",   "attn_v",
                                        "attn_output", "ffn_norm",  "ffn_gate", "ffn_up",
                                        "ffn_down",    "rope_freqs"};
    if (l->n_used == l->file->n_tensors) {
        return HEPTA_OK;
    }
    for (size_t i = 0; i < l->file->n_tensors; i++) {
        const tensor *t = &l->file->tensors[i];
        char expected[64];
        bool found = false;
        unsigned layer = 0;
        for (size_t j = 0; j < sizeof known / sizeof known[0] && !found; j++) {
            snprintf(expected, sizeof expected, "%s.weight", known[j]);
            found = strcmp(t->name, expected) == 0;
        }
        bool in_layer = sscanf(t->name, "blk.%5u.", &layer) == 1 && layer < l->model->info.n_layer;
        for (size_t j = 0; j < sizeof parts / sizeof parts[0] && !found && in_layer; j++) {
            snprintf(expected, sizeof expected, "blk.%u.%s.weight", layer, parts[j]);
            found = strcmp(t->name, expected) == 0;
        }
        if (!found) {
            return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: tensor %.64s has no place in the llama architecture",
                             path_shown(t->file), t->name);
        }
    }
    return HEPTA_OK;
}

static hepta_status load_tensors(loader *l) {
    hepta_model *m = l->model;
    const tensor *embedding;
    hepta_status status = find_tensor(l, "token_embd.weight", &embedding);
    if (status != HEPTA_OK) {
        return status;
    }
    uint64_t n_vocab = embedding->n_dims == 2 ? embedding->ne[1] : 0;
    if (n_vocab < 1 || n_vocab > INT32_MAX) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor token_embd.weight has %" PRIu64
                         " rows, expected 1 to 2147483647",
                         path_shown(embedding->file), n_vocab);
    }
    m->info.n_vocab = (uint32_t)n_vocab;
    if ((status = load_matrix(l, "token_embd.weight", m->info.n_vocab, m->info.n_embd,
                              &m->embedding)) != HEPTA_OK ||
        (status = load_vector(l, NULL, "output_norm.weight", m->info.n_embd, &m->output_norm)) !=
            HEPTA_OK) {
        return status;
    }
    m->head = m->embedding;
    if (container_tensor(l->file, "output.weight") != NULL &&
        (status = load_matrix(l, "output.weight", m->info.n_vocab, m->info.n_embd, &m->head)) !=
            HEPTA_OK) {
        return status;
    }
    if (m->info.n_layer > l->file->n_tensors) { /* before memory is asked for them */
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: llama.block_count is %u, but the file has only %zu tensors",
                         path_shown(l->file->path), m->info.n_layer, l->file->n_tensors);
    }
    m->layers = arena_alloc(&m->memory, m->info.n_layer, sizeof *m->layers);
    if (m->layers == NULL) {
        return error_set(l->err, HEPTA_ERROR_MEMORY, "%s: no memory for %u layers",
                         path_shown(l->file->path), m->info.n_layer);
    }
    for (uint32_t i = 0; i < m->info.n_layer; i++) {
        if ((status = load_layer(l, i, &m->layers[i])) != HEPTA_OK) {
            return status;
        }
    }
    return check_all_used(l);
}

static void sum_sizes(hepta_model *m) {
    double bits = 0.0;
    for (size_t i = 0; i < m->file->n_tensors; i++) {
        const tensor *t = &m->file->tensors[i];
        m->info.n_weights += tensor_n_weights(t);
        bits += 8.0 * (double)tensor_stored_bytes(t);
        m->info.quantized |= t->type == TENSOR_PACKED;
    }
    m->info.bits_per_weight = bits / (double)m->info.n_weights;
}

/* ---- Public API -------------------------------------------------------- */

hepta_status hepta_model_open(const char *path, hepta_model **out, hepta_error *err) {
    if (path == NULL || out == NULL) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "hepta_model_open: path or out is NULL");
    }
    hepta_model *m = memory_alloc(1, sizeof *m);
    if (m == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "%s: no memory for a model", path_shown(path));
    }
    loader l = {.model = m, .err = err};
    const container_options options = {.no_tokenizer = true};
    hepta_status status;
    if ((status = kernels_select(&m->kernels, err)) != HEPTA_OK ||
        (status = container_open(path, &options, &m->file, err)) != HEPTA_OK) {
        goto done;
    }
    l.file = m->file;
    if (container_find(m->file, "hepta.rotation.seed") != NULL &&
        (status = container_get_u64(m->file, "hepta.rotation.seed", &l.rotation_seed, err)) !=
            HEPTA_OK) {
        goto done;
    }
    if ((status = read_architecture(&l)) != HEPTA_OK || (status = read_shape(&l)) != HEPTA_OK ||
        (status = read_norm_eps(&l)) != HEPTA_OK || (status = read_rope(&l)) != HEPTA_OK ||
        (status = load_tensors(&l)) != HEPTA_OK) {
        goto done;
    }
    sum_sizes(m);
    *out = m;
    m = NULL;
done:
    hepta_model_close(m);
    return status;
}

hepta_status hepta_model_lock(hepta_model *model, hepta_error *err) {
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; i < model->file->n_maps && status == HEPTA_OK; i++) {
        status = file_map_lock(&model->file->maps[i], err);
    }
    return status;
}

void hepta_model_close(hepta_model *model) {
    if (model != NULL) {
        if (model->gpu != NULL) {
            model->gpu->model_free(model->gpu_model);
        }
        for (size_t i = 0; i < model->n_rotations; i++) {
            rotation_free(model->rotations[i]);
        }
        arena_free(&model->memory);
        container_close(model->file);
        memory_free(model);
    }
}

void hepta_model_get_info(const hepta_model *model, hepta_model_info *info) {
    *info = model->info;
}
