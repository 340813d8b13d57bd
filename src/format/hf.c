/*
 * hf.c - reading a Hugging Face model directory of the LLaMA family.
 *
 *     config.json                       what the model is
 *     model.safetensors, or             its tensors, in one file or in several
 *     model.safetensors.index.json      with a "weight_map" from tensor to file
 *     tokenizer.json | tokenizer.model | vocab.json + merges.txt
 *
 * Settings become GGUF keys and tensors get GGUF names. Query and key rows stay as they are,
 * which hepta.rope.interleaved = false records. RoPE scaling becomes rope_freqs.weight, one
 * divisor per frequency, as in GGUF files of Llama 3.1.
 *
 * Anything in the directory that would change results and is not understood is refused: other
 * architectures, biases, sliding windows, unknown tensors.
 *
 * Specification: huggingface/transformers, configuration_llama.py, configuration_mistral.py,
 * modeling_rope_utils.py (_compute_llama3_parameters, _compute_linear_scaling_rope_parameters).
 */
#include "format/private.h"

#ifndef HEPTA_ENGINE_ONLY

#include "format/hf_groups.h"
#include "format/safetensors.h"

#include <float.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_JSON = 100000000, MAX_SIZE = 1 << 24, MAX_SHARDS = 4096 };

/* What config.json says. */
typedef struct settings {
    uint32_t n_embd, n_ff, n_layer, n_head, n_head_kv, head_dim, n_vocab, n_ctx;
    double eps, theta;
    bool tied; /* the classifier is the embedding */
    enum { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 } rope;
    double rope_factor, rope_low, rope_high, rope_n_ctx;
    group_scheme groups;
} settings;

/* config.json while it is read: the first error sticks, later reads do nothing. */
typedef struct config {
    const json_t *root;
    const char *path; /* for messages */
    hepta_error *err;
    hepta_status status;
} config;

/* ---- JSON -------------------------------------------------------------- */

static hepta_status load_json(const char *path, json_t **out, hepta_error *err) {
    file_map map;
    hepta_status status = file_map_open(path, &map, err);
    if (status != HEPTA_OK) {
        return status;
    }
    const char *shown = path_shown(path);
    json_error_t json_error = {.text = "the file is empty"};
    json_t *root = NULL;
    if (map.size > MAX_JSON) {
        status = error_set(err, HEPTA_ERROR_FORMAT, "%s: %zu bytes; expected at most %d", shown,
                           map.size, (int)MAX_JSON);
        goto done;
    }
    if (map.size > 0) {
        root = json_loadb((const char *)map.data, map.size, JSON_REJECT_DUPLICATES, &json_error);
    }
    if (!json_is_object(root)) {
        status = error_set(err, HEPTA_ERROR_FORMAT, "%s: no JSON object: %s (line %d)", shown,
                           root == NULL ? json_error.text : "it is another value",
                           root == NULL ? json_error.line : 1);
        json_decref(root);
        goto done;
    }
    *out = root;
done:
    file_map_close(&map);
    return status;
}

/* A value that is there and not null, else NULL. */
static const json_t *get(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

static void refuse(config *f, hepta_status status, const char *key, const char *expected) {
    if (f->status != HEPTA_OK) {
        return;
    }
    const json_t *value = json_object_get(f->root, key);
    char *text = value != NULL ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    f->status = error_set(f->err, status, "%s: %s is %.60s; expected %s", f->path, key,
                          text != NULL ? text : "missing", expected);
    free(text);
}

/* An integer from 1 to 2^24; `fallback` when absent or null, 0: it must be there. */
static uint32_t read_size(config *f, const char *key, uint32_t fallback) {
    const json_t *value = get(f->root, key);
    if (value == NULL && fallback != 0) {
        return fallback;
    }
    json_int_t v = json_is_integer(value) ? json_integer_value(value) : 0;
    if (v < 1 || v > MAX_SIZE) {
        refuse(f, HEPTA_ERROR_FORMAT, key, "an integer from 1 to 16777216");
        return 1;
    }
    return (uint32_t)v;
}

/* A positive number from `object`, which is config.json's root or its RoPE section. */
static double read_positive(config *f, const json_t *object, const char *key, double fallback) {
    const json_t *value = get(object, key);
    if (value == NULL && fallback > 0) {
        return fallback;
    }
    double v = json_is_number(value) ? json_number_value(value) : 0;
    if (v >= FLT_MIN && v <= FLT_MAX) {
        return v;
    }
    if (f->status == HEPTA_OK) {
        f->status =
            error_set(f->err, HEPTA_ERROR_FORMAT, "%s: %s is %s; expected a positive number",
                      f->path, key, value == NULL ? "missing" : "another value");
    }
    return 1;
}

static bool read_bool(config *f, const char *key, bool fallback) {
    const json_t *value = get(f->root, key);
    if (value != NULL && !json_is_boolean(value)) {
        refuse(f, HEPTA_ERROR_FORMAT, key, "true or false");
    }
    return value != NULL ? json_is_true(value) : fallback;
}

/* ---- config.json ------------------------------------------------------- */

/* True for Mistral, false for LLaMA; anything else is refused. */
static bool read_architecture(config *f) {
    static const char supported[] =
        "\"llama\" (LlamaForCausalLM), or \"mistral\" (MistralForCausalLM) without sliding window";
    const char *type = json_string_value(json_object_get(f->root, "model_type"));
    bool mistral = type != NULL && strcmp(type, "mistral") == 0;
    if (!mistral && (type == NULL || strcmp(type, "llama") != 0)) {
        refuse(f, HEPTA_ERROR_UNSUPPORTED, "model_type", supported);
    }
    const json_t *architectures = get(f->root, "architectures");
    if (architectures != NULL) {
        const char *name = json_string_value(json_array_get(architectures, 0));
        const char *wanted = mistral ? "MistralForCausalLM" : "LlamaForCausalLM";
        if (name == NULL || strcmp(name, wanted) != 0) {
            refuse(f, HEPTA_ERROR_UNSUPPORTED, "architectures", supported);
        }
    }
    return mistral;
}

static void read_rope(config *f, settings *m) {
    const json_t *rope = get(f->root, "rope_parameters"); /* transformers 5 */
    if (rope == NULL) {
        rope = get(f->root, "rope_scaling"); /* before */
    }
    if (rope != NULL && !json_is_object(rope) && f->status == HEPTA_OK) {
        f->status = error_set(f->err, HEPTA_ERROR_FORMAT,
                              "%s: rope_parameters or rope_scaling is no object", f->path);
    }
    m->theta = read_positive(f, f->root, "rope_theta", 10000);
    m->theta = read_positive(f, rope, "rope_theta", m->theta);
    const json_t *type_value = get(rope, "rope_type");
    type_value = type_value != NULL ? type_value : get(rope, "type");
    const char *type = type_value != NULL ? json_string_value(type_value) : "default";
    if (rope == NULL || (type != NULL && strcmp(type, "default") == 0)) {
        m->rope = ROPE_PLAIN;
    } else if (type != NULL && strcmp(type, "linear") == 0) {
        m->rope = ROPE_LINEAR;
        m->rope_factor = read_positive(f, rope, "factor", 0);
    } else if (type != NULL && strcmp(type, "llama3") == 0) {
        m->rope = ROPE_LLAMA3;
        m->rope_factor = read_positive(f, rope, "factor", 0);
        m->rope_low = read_positive(f, rope, "low_freq_factor", 0);
        m->rope_high = read_positive(f, rope, "high_freq_factor", 0);
        m->rope_n_ctx = read_positive(f, rope, "original_max_position_embeddings", m->n_ctx);
        if (f->status == HEPTA_OK && !(m->rope_high > m->rope_low)) {
            f->status = error_set(f->err, HEPTA_ERROR_FORMAT,
                                  "%s: RoPE scaling: high_freq_factor %g is not above "
                                  "low_freq_factor %g",
                                  f->path, m->rope_high, m->rope_low);
        }
    } else if (f->status == HEPTA_OK) {
        f->status = error_set(f->err, HEPTA_ERROR_UNSUPPORTED,
                              "%s: RoPE scaling of type \"%.40s\"; supported are default, linear "
                              "and llama3",
                              f->path, type != NULL ? type : "?");
    }
    double part = read_positive(f, rope, "partial_rotary_factor", 1);
    part = read_positive(f, f->root, "partial_rotary_factor", part);
    if (f->status == HEPTA_OK && (part < 1 || part > 1 || !(m->theta > 1))) {
        f->status =
            error_set(f->err, HEPTA_ERROR_UNSUPPORTED,
                      "%s: rope_theta %g, partial_rotary_factor %g; supported are angles of "
                      "base above 1 on whole heads",
                      f->path, m->theta, part);
    }
}

/* Settings that would change the arithmetic. */
static void refuse_variants(config *f, bool mistral, settings *m) {
    if (read_bool(f, "attention_bias", false)) {
        refuse(f, HEPTA_ERROR_UNSUPPORTED, "attention_bias", "false: biases are not supported");
    }
    if (read_bool(f, "mlp_bias", false)) {
        refuse(f, HEPTA_ERROR_UNSUPPORTED, "mlp_bias", "false: biases are not supported");
    }
    const json_t *act = get(f->root, "hidden_act");
    if (act != NULL && (!json_is_string(act) || strcmp(json_string_value(act), "silu") != 0)) {
        refuse(f, HEPTA_ERROR_UNSUPPORTED, "hidden_act", "\"silu\"");
    }
    if (f->status == HEPTA_OK) {
        f->status =
            group_scheme_read(get(f->root, "quantization_config"), f->path, &m->groups, f->err);
    }
    if (mistral) { /* a window as long as the context is none; absent means 4096 */
        const json_t *window = json_object_get(f->root, "sliding_window");
        json_int_t n = window == NULL ? 4096 : json_integer_value(window);
        if (!json_is_null(window) && n < (json_int_t)m->n_ctx) {
            refuse(f, HEPTA_ERROR_UNSUPPORTED, "sliding_window",
                   "null: sliding windows (4096 when missing) are not supported");
        }
    }
}

static hepta_status read_config(const json_t *root, const char *path, settings *m,
                                hepta_error *err) {
    config f = {.root = root, .path = path_shown(path), .err = err};
    bool mistral = read_architecture(&f);
    m->n_embd = read_size(&f, "hidden_size", 0);
    m->n_ff = read_size(&f, "intermediate_size", 0);
    m->n_layer = read_size(&f, "num_hidden_layers", 0);
    m->n_head = read_size(&f, "num_attention_heads", 0);
    bool kv_missing = json_object_get(root, "num_key_value_heads") == NULL;
    m->n_head_kv = read_size(&f, "num_key_value_heads", mistral && kv_missing ? 8 : m->n_head);
    m->n_vocab = read_size(&f, "vocab_size", 0);
    m->n_ctx = read_size(&f, "max_position_embeddings", mistral ? 4096 * 32 : 2048);
    m->eps = read_positive(&f, root, "rms_norm_eps", 1e-6);
    m->tied = read_bool(&f, "tie_word_embeddings", false);
    bool divides = m->n_embd % m->n_head == 0;
    m->head_dim = read_size(&f, "head_dim", divides ? m->n_embd / m->n_head : 0);
    read_rope(&f, m);
    refuse_variants(&f, mistral, m);
    if (f.status == HEPTA_OK &&
        (m->n_layer > FORMAT_MAX_LAYERS || m->n_head % m->n_head_kv != 0 || m->head_dim % 2 != 0)) {
        f.status = error_set(err, HEPTA_ERROR_FORMAT,
                             "%s: %" PRIu32 " layers, %" PRIu32 " heads of %" PRIu32 ", %" PRIu32
                             " key/value heads; expected at most %d layers, an even head size, and "
                             "heads that are a multiple of the key/value heads",
                             f.path, m->n_layer, m->n_head, m->head_dim, m->n_head_kv,
                             (int)FORMAT_MAX_LAYERS);
    }
    return f.status;
}

/* ---- Metadata ---------------------------------------------------------- */

/* The model's own name for itself, without its owner's: config.json must not depend on the path. */
static hepta_status set_name(container *c, const json_t *root, hepta_error *err) {
    const char *name = json_string_value(json_object_get(root, "_name_or_path"));
    if (name == NULL) {
        return HEPTA_OK;
    }
    const char *slash = strrchr(name, '/');
    name = slash != NULL ? slash + 1 : name;
    return name[0] == '\0' ? HEPTA_OK
                           : container_set_string(c, "general.name", name, strlen(name), err);
}

static hepta_status set_metadata(container *c, const json_t *root, const settings *m,
                                 hepta_error *err) {
    const struct {
        const char *key;
        uint32_t value;
    } numbers[] = {
        {"llama.context_length", m->n_ctx},
        {"llama.embedding_length", m->n_embd},
        {"llama.block_count", m->n_layer},
        {"llama.feed_forward_length", m->n_ff},
        {"llama.attention.head_count", m->n_head},
        {"llama.attention.head_count_kv", m->n_head_kv},
        {"llama.rope.dimension_count", m->head_dim},
        {"llama.vocab_size", m->n_vocab},
        {"llama.attention.key_length", m->head_dim},   /* these two only ... */
        {"llama.attention.value_length", m->head_dim}, /* ... for unusual heads */
    };
    size_t n = sizeof numbers / sizeof numbers[0];
    n -= (uint64_t)m->head_dim * m->n_head == m->n_embd ? 2 : 0;
    hepta_status status = container_set_string(c, "general.architecture", "llama", 5, err);
    if (status == HEPTA_OK) {
        status = set_name(c, root, err);
    }
    for (size_t i = 0; status == HEPTA_OK && i < n; i++) {
        status = container_set_u32(c, numbers[i].key, numbers[i].value, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "llama.attention.layer_norm_rms_epsilon", (float)m->eps, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "llama.rope.freq_base", (float)m->theta, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_bool(c, "hepta.rope.interleaved", false, err);
    }
    return status;
}

/* ---- Weights ----------------------------------------------------------- */

typedef struct weights {
    safetensors *files;
    const char **file_names; /* (n_files) as in the index; NULL: one file */
    size_t n_files;
    json_t *weight_map; /* NULL: one file; belongs to the index */
    group_scheme groups;
} weights;

/* True when this tensor of file i counts: without an index all do. */
static bool counts(const weights *w, const char *name, size_t i) {
    const char *file_name = json_string_value(json_object_get(w->weight_map, name));
    return w->weight_map == NULL || (file_name != NULL && strcmp(w->file_names[i], file_name) == 0);
}

/* The tensor of this name, and the file it lies in; NULL if there is none. */
static safetensors_entry *find_weight(const weights *w, const char *name,
                                      const safetensors **file) {
    for (size_t i = 0; i < w->n_files; i++) {
        if (counts(w, name, i)) {
            *file = &w->files[i];
            return safetensors_find(&w->files[i], name);
        }
    }
    return NULL;
}

/* Opens the files that the index names, each once. */
static hepta_status open_shards(container *c, const char *directory, json_t *index, weights *w,
                                hepta_error *err) {
    const char *shown = path_shown(directory);
    w->weight_map = json_object_get(index, "weight_map");
    if (!json_is_object(w->weight_map) || json_object_size(w->weight_map) > FORMAT_MAX_TENSORS) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: model.safetensors.index.json has no \"weight_map\" object of at most "
                         "%d tensors",
                         shown, (int)FORMAT_MAX_TENSORS);
    }
    w->files = arena_alloc(&c->memory, MAX_SHARDS, sizeof *w->files);
    w->file_names = arena_alloc(&c->memory, MAX_SHARDS, sizeof *w->file_names);
    if (w->files == NULL || w->file_names == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", shown);
    }
    const char *name;
    json_t *value;
    json_object_foreach(w->weight_map, name, value) {
        const char *file = json_string_value(value);
        if (file == NULL || file[0] == '\0' || strchr(file, '/') != NULL) {
            return error_set(
                err, HEPTA_ERROR_FORMAT,
                "%s: model.safetensors.index.json: the file of tensor %.80s is no plain "
                "file name",
                shown, name);
        }
        size_t i = 0;
        while (i < w->n_files && strcmp(w->file_names[i], file) != 0) {
            i++;
        }
        if (i < w->n_files) {
            continue;
        }
        if (w->n_files == MAX_SHARDS) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED, "%s: more than %d weight files", shown,
                             (int)MAX_SHARDS);
        }
        char *path = format_join_path(c, directory, file);
        if (path == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", shown);
        }
        if (!file_exists(path)) {
            return error_set(
                err, HEPTA_ERROR_IO,
                "%s: file %.80s, which holds tensor %.80s, is missing; the download is "
                "incomplete",
                shown, file, name);
        }
        hepta_status status = safetensors_open(c, path, &w->files[i], err);
        if (status != HEPTA_OK) {
            return status;
        }
        w->file_names[w->n_files++] = file;
    }
    return HEPTA_OK;
}

/*
 * model.safetensors where there is one, else the files of the index, which the caller frees.
 * Leaves w->n_files 0 when there are neither and that is `optional`.
 */
static hepta_status open_weights(container *c, const char *directory, bool optional, weights *w,
                                 json_t **index, hepta_error *err) {
    char *single = format_join_path(c, directory, "model.safetensors");
    char *index_path = format_join_path(c, directory, "model.safetensors.index.json");
    char *pickle = format_join_path(c, directory, "pytorch_model.bin");
    if (single == NULL || index_path == NULL || pickle == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s",
                         path_shown(directory));
    }
    if (file_exists(single)) {
        w->files = arena_alloc(&c->memory, 1, sizeof *w->files);
        if (w->files == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s",
                             path_shown(single));
        }
        w->n_files = 1;
        return safetensors_open(c, single, w->files, err);
    }
    if (!file_exists(index_path) && optional) {
        return HEPTA_OK;
    }
    if (!file_exists(index_path)) {
        return error_set(err, HEPTA_ERROR_IO,
                         "%s: neither model.safetensors nor model.safetensors.index.json is "
                         "there%s",
                         path_shown(directory),
                         file_exists(pickle) ? ", only pytorch_model.bin: convert the model to "
                                               "safetensors"
                                             : "");
    }
    hepta_status status = load_json(index_path, index, err);
    return status == HEPTA_OK ? open_shards(c, directory, *index, w, err) : status;
}

/* A tensor that the model must have: rows 0 means a vector. */
typedef struct wanted {
    const char *hf, *gguf;
    uint64_t rows, cols;
} wanted;

static group_part find_part(const weights *w, const char *base, const char *suffix) {
    char name[112];
    group_part part = {.entry = NULL};
    snprintf(name, sizeof name, "%s.%s", base, suffix);
    part.entry = find_weight(w, name, &part.file);
    return part;
}

/* The matrix `hf`, "BASE.weight", out of quantized parts; *found false: there are none. */
static hepta_status add_grouped(container *c, const weights *w, const wanted *want, const char *hf,
                                const char *gguf, bool *found, hepta_error *err) {
    char base[96];
    snprintf(base, sizeof base, "%.*s", (int)(strlen(hf) - strlen(".weight")), hf);
    const group_parts parts = {.weights = find_part(w, base, "qweight"),
                               .zeros = find_part(w, base, "qzeros"),
                               .scales = find_part(w, base, "scales"),
                               .index = find_part(w, base, "g_idx"),
                               .bias = find_part(w, base, "bias")};
    *found = parts.weights.entry != NULL;
    if (!*found) {
        return HEPTA_OK;
    }
    if (w->groups.type == TENSOR_F32 || want->rows == 0) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %s.qweight is quantized, but config.json has no "
                         "quantization_config that says how",
                         path_shown(parts.weights.file->path), base);
    }
    return group_matrix_add(c, &w->groups, &parts, base, gguf, want->rows, want->cols, err);
}

static hepta_status add_weight(container *c, const weights *w, const wanted *want, const char *hf,
                               const char *gguf, hepta_error *err) {
    const safetensors *file = NULL;
    safetensors_entry *e = find_weight(w, hf, &file);
    if (e == NULL) {
        bool found;
        hepta_status status = add_grouped(c, w, want, hf, gguf, &found, err);
        if (found) {
            return status;
        }
        return error_set(err, HEPTA_ERROR_FORMAT, "%s: tensor %s is missing",
                         path_shown(file != NULL ? file->path : c->path), hf);
    }
    const char *shown = path_shown(file->path);
    uint64_t rows = want->rows == 0 ? 1 : want->rows;
    if (e->n_dims != (want->rows == 0 ? 1u : 2u) || e->ne[0] != want->cols || e->ne[1] != rows) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %s has %" PRIu32 " dimensions, [%" PRIu64 ", %" PRIu64
                         "]; config.json asks for [%" PRIu64 ", %" PRIu64 "]",
                         shown, hf, e->n_dims, e->ne[1], e->ne[0], rows, want->cols);
    }
    if (e->type == SAFETENSORS_OTHER) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: tensor %s is of type %s; supported are F32, F16 and BF16", shown, hf,
                         e->dtype);
    }
    e->used = true;
    const uint8_t *data = file->map.data + e->begin;
    uintptr_t item = e->type == TENSOR_F32 ? 4 : 2;
    if ((uintptr_t)data % item != 0) { /* headers of any length are allowed, and rare */
        uint8_t *copy = arena_alloc(&c->memory, (size_t)e->n_bytes, 1);
        if (copy == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory copying tensor %s of %s", hf,
                             shown);
        }
        memcpy(copy, data, (size_t)e->n_bytes);
        data = copy;
    }
    tensor t = {.name = gguf,
                .type = e->type,
                .n_dims = e->n_dims,
                .data = data,
                .n_bytes = e->n_bytes,
                .file = file->path,
                .offset = e->begin};
    memcpy(t.ne, e->ne, sizeof t.ne);
    return container_add_tensor(c, &t, err);
}

/* Refuses tensors that no rule of this file explains. */
static hepta_status check_leftovers(const weights *w, bool tied, hepta_error *err) {
    for (size_t i = 0; i < w->n_files; i++) {
        for (size_t j = 0; j < w->files[i].n_entries; j++) {
            const safetensors_entry *e = &w->files[i].entries[j];
            if (e->used || !counts(w, e->name, i) ||
                strstr(e->name, ".rotary_emb.inv_freq") != NULL ||
                (tied && strcmp(e->name, "lm_head.weight") == 0)) {
                continue;
            }
            return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: tensor %.80s has no place in the model that config.json "
                             "describes",
                             path_shown(w->files[i].path), e->name);
        }
    }
    return HEPTA_OK;
}

static hepta_status add_weights(container *c, const weights *w, const settings *m,
                                hepta_error *err) {
    uint64_t q = (uint64_t)m->n_head * m->head_dim;
    uint64_t k_rows = (uint64_t)m->n_head_kv * m->head_dim;
    const wanted embedding = {"model.embed_tokens.weight", "token_embd.weight", m->n_vocab,
                              m->n_embd};
    const wanted layer[] = {
        {"input_layernorm.weight", "attn_norm.weight", 0, m->n_embd},
        {"self_attn.q_proj.weight", "attn_q.weight", q, m->n_embd},
        {"self_attn.k_proj.weight", "attn_k.weight", k_rows, m->n_embd},
        {"self_attn.v_proj.weight", "attn_v.weight", k_rows, m->n_embd},
        {"self_attn.o_proj.weight", "attn_output.weight", m->n_embd, q},
        {"post_attention_layernorm.weight", "ffn_norm.weight", 0, m->n_embd},
        {"mlp.gate_proj.weight", "ffn_gate.weight", m->n_ff, m->n_embd},
        {"mlp.up_proj.weight", "ffn_up.weight", m->n_ff, m->n_embd},
        {"mlp.down_proj.weight", "ffn_down.weight", m->n_embd, m->n_ff},
    };
    const wanted end[] = {{"model.norm.weight", "output_norm.weight", 0, m->n_embd},
                          {"lm_head.weight", "output.weight", m->n_vocab, m->n_embd}};
    hepta_status status = add_weight(c, w, &embedding, embedding.hf, embedding.gguf, err);
    for (uint32_t i = 0; i < m->n_layer; i++) {
        for (size_t k = 0; status == HEPTA_OK && k < sizeof layer / sizeof layer[0]; k++) {
            char hf[96], gguf[64];
            snprintf(hf, sizeof hf, "model.layers.%" PRIu32 ".%s", i, layer[k].hf);
            snprintf(gguf, sizeof gguf, "blk.%" PRIu32 ".%s", i, layer[k].gguf);
            status = add_weight(c, w, &layer[k], hf, gguf, err);
        }
    }
    for (size_t k = 0; status == HEPTA_OK && k < (m->tied ? 1u : 2u); k++) {
        status = add_weight(c, w, &end[k], end[k].hf, end[k].gguf, err);
    }
    if (status == HEPTA_OK) {
        status = check_leftovers(w, m->tied, err);
    }
    return status;
}

/* GGUF's number for "mostly this type", from the embedding. */
static hepta_status set_file_type(container *c, hepta_error *err) {
    const tensor *t = container_tensor(c, "token_embd.weight");
    uint32_t file_type = t->type == TENSOR_F32 ? 0 : t->type == TENSOR_F16 ? 1 : 32;
    return container_set_u32(c, "general.file_type", file_type, err);
}

/* ---- RoPE scaling ------------------------------------------------------ */

static double power(double base, uint32_t n) {
    double result = 1;
    for (; n > 0; n >>= 1, base *= base) {
        result = (n & 1) != 0 ? result * base : result;
    }
    return result;
}

/*
 * The n-th root of x > 1 by bisection: only + and *, so the same on every machine, where libm's
 * pow is not.
 */
static double root_of(double x, uint32_t n) {
    double low = 1, high = x;
    for (;;) {
        double middle = low + (high - low) * 0.5;
        if (!(middle > low && middle < high)) {
            return low;
        }
        if (power(middle, n) <= x) {
            low = middle;
        } else {
            high = middle;
        }
    }
}

/* What divides the frequency with this wavelength (in positions). */
static double rope_divisor(const settings *m, double wavelength) {
    if (m->rope == ROPE_LINEAR || wavelength > m->rope_n_ctx / m->rope_low) {
        return m->rope_factor;
    }
    if (wavelength < m->rope_n_ctx / m->rope_high) {
        return 1;
    }
    double smooth = (m->rope_n_ctx / wavelength - m->rope_low) / (m->rope_high - m->rope_low);
    return 1 / ((1 - smooth) / m->rope_factor + smooth);
}

static hepta_status add_rope_freqs(container *c, const settings *m, const char *config_path,
                                   hepta_error *err) {
    if (m->rope == ROPE_PLAIN) {
        return HEPTA_OK;
    }
    uint32_t n = m->head_dim / 2;
    uint8_t *data = arena_alloc(&c->memory, n, sizeof(float));
    if (data == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path_shown(c->path));
    }
    /* Frequency i is theta^(-i / n); its wavelength 2 pi theta^(i / n). */
    double step = root_of(m->theta, n), full_turn = 6.283185307179586;
    for (uint32_t i = 0; i < n; i++) {
        float divisor = (float)rope_divisor(m, full_turn * power(step, i));
        memcpy(data + i * sizeof divisor, &divisor, sizeof divisor);
    }
    tensor t = {.name = "rope_freqs.weight",
                .type = TENSOR_F32,
                .n_dims = 1,
                .ne = {n, 1, 1, 1},
                .data = data,
                .n_bytes = n * sizeof(float),
                .file = config_path};
    return container_add_tensor(c, &t, err);
}

/* ---- Tokenizer --------------------------------------------------------- */

static hepta_status read_tokenizer(container *c, const char *directory, hepta_error *err) {
    static const char *const names[] = {"tokenizer.json", "tokenizer.model", "vocab.json"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char *path = format_join_path(c, directory, names[i]);
        if (path == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s",
                             path_shown(directory));
        }
        if (file_exists(path)) { /* vocab.json has merges.txt beside it: the directory is meant */
            return tokenizer_file_read(i == 2 ? directory : path, c, err);
        }
    }
    return HEPTA_OK; /* token ids alone serve too */
}

/* BOS and EOS from config.json where the tokenizer's files did not say. */
static hepta_status set_token_id(container *c, const json_t *root, const char *hf, const char *key,
                                 hepta_error *err) {
    const json_t *value = json_object_get(root, hf);
    value = json_is_array(value) ? json_array_get(value, 0) : value;
    json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id > MAX_SIZE || container_find(c, key) != NULL) {
        return HEPTA_OK;
    }
    return container_set_u32(c, key, (uint32_t)id, err);
}

/* ---- Opening ----------------------------------------------------------- */

hepta_status hf_open(const char *path, const container_options *options, container *c,
                     hepta_error *err) {
    json_t *root = NULL, *index = NULL;
    settings m = {.n_embd = 0};
    weights w = {.files = NULL};
    c->kind = CONTAINER_HF;
    char *config_path = format_join_path(c, path, "config.json");
    if (config_path == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path_shown(path));
    }
    if (!file_exists(config_path)) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: a directory without config.json; expected a Hugging Face model",
                         path_shown(path));
    }
    hepta_status status = load_json(config_path, &root, err);
    if (status == HEPTA_OK) {
        status = read_config(root, config_path, &m, err);
    }
    if (status == HEPTA_OK) {
        status = set_metadata(c, root, &m, err);
    }
    if (status == HEPTA_OK) {
        status = open_weights(c, path, options->metadata_only, &w, &index, err);
    }
    w.groups = m.groups;
    if (status == HEPTA_OK && (w.n_files > 0 || !options->metadata_only)) {
        status = add_weights(c, &w, &m, err);
        status = status == HEPTA_OK ? set_file_type(c, err) : status;
        status = status == HEPTA_OK ? add_rope_freqs(c, &m, config_path, err) : status;
    }
    if (status == HEPTA_OK && !options->no_tokenizer && options->tokenizer_path == NULL) {
        status = read_tokenizer(c, path, err);
    }
    if (status == HEPTA_OK) {
        status = set_token_id(c, root, "bos_token_id", "tokenizer.ggml.bos_token_id", err);
    }
    if (status == HEPTA_OK) {
        status = set_token_id(c, root, "eos_token_id", "tokenizer.ggml.eos_token_id", err);
    }
    json_decref(index);
    json_decref(root);
    return status;
}

#else

hepta_status hf_open(const char *path, const container_options *options, container *c,
                     hepta_error *err) {
    (void)options;
    (void)c;
    return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: this build of the engine alone reads no Hugging Face directories; "
                     "quantize the model to a .hepta file with a full build",
                     path_shown(path));
}

#endif
