/*
 * llama2.c - reading the float32 .bin files of github.com/karpathy/llama2.c, two layouts:
 *
 *     first format ("legacy"): seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
 *     vocab_size, seq_len), then the tensors. A negative vocab_size means that the classifier is a
 *     tensor of its own. Two tables of RoPE angles, unused here, stand before it.
 *
 *     version 1: magic number, version, the same integers, one byte "shared classifier", zeros up
 *     to byte 256, then the tensors in another order.
 *
 * A tensor holds all layers one after the other; (layer, rows, cols) below. The first format has
 * no magic number, so a file is taken for one only when its size is exactly what the header asks
 * for. Query and key rows are in interleaved (GGUF's) RoPE order.
 *
 * Specification: export.py of that repository (legacy_export, version1_export).
 */
#include "format/private.h"

#include <stdio.h>
#include <string.h>

enum {
    MAGIC = 0x616b3432, /* "ak42" */
    N_PARAMETERS = 7,
    LEGACY_HEADER = 4 * N_PARAMETERS,
    V1_HEADER = 256,
    SHARED_FLAG = 8 + 4 * N_PARAMETERS,
    MAX_PARAMETER = 1 << 24
};

typedef struct header {
    uint64_t dim, hidden, n_layers, n_heads, n_kv_heads, n_vocab, seq_len, kv_dim, head_dim;
    bool shared; /* the classifier is the embedding */
    bool legacy;
} header;

/* Reads the seven integers; false when no model has such numbers. */
static bool parse_header(const uint8_t *p, bool legacy, header *h) {
    uint64_t v[N_PARAMETERS];
    *h = (header){.legacy = legacy, .shared = true};
    for (int i = 0; i < N_PARAMETERS; i++) {
        int64_t x = (int32_t)load_u32(p + 4 * i);
        if (i == 5 && legacy && x < 0) {
            h->shared = false;
            x = -x;
        }
        if (x < 1 || x > MAX_PARAMETER) {
            return false;
        }
        v[i] = (uint64_t)x;
    }
    h->dim = v[0];
    h->hidden = v[1];
    h->n_layers = v[2];
    h->n_heads = v[3];
    h->n_kv_heads = v[4];
    h->n_vocab = v[5];
    h->seq_len = v[6];
    if (h->dim % h->n_heads != 0 || h->n_heads % h->n_kv_heads != 0 ||
        h->n_layers > FORMAT_MAX_LAYERS) {
        return false;
    }
    h->head_dim = h->dim / h->n_heads;
    h->kv_dim = h->head_dim * h->n_kv_heads;
    return h->head_dim % 2 == 0;
}

/* ---- Layout ------------------------------------------------------------ */

/* One stacked tensor; name NULL: skipped; %u: the layer. Norms are vectors. */
typedef struct stack {
    const char *name;
    uint64_t layers, rows, cols;
} stack;

enum { MAX_STACKS = 14 };

static size_t layout(const header *h, stack s[MAX_STACKS]) {
    uint64_t n = h->n_layers;
    const stack embd = {"token_embd.weight", 1, h->n_vocab, h->dim};
    const stack attn_norm = {"blk.%u.attn_norm.weight", n, 1, h->dim};
    const stack ffn_norm = {"blk.%u.ffn_norm.weight", n, 1, h->dim};
    const stack norm = {"output_norm.weight", 1, 1, h->dim};
    const stack attn[] = {{"blk.%u.attn_q.weight", n, h->dim, h->dim},
                          {"blk.%u.attn_k.weight", n, h->kv_dim, h->dim},
                          {"blk.%u.attn_v.weight", n, h->kv_dim, h->dim},
                          {"blk.%u.attn_output.weight", n, h->dim, h->dim}};
    const stack ffn[] = {{"blk.%u.ffn_gate.weight", n, h->hidden, h->dim},
                         {"blk.%u.ffn_down.weight", n, h->dim, h->hidden},
                         {"blk.%u.ffn_up.weight", n, h->hidden, h->dim}};
    const stack angles = {NULL, 1, h->seq_len, h->head_dim / 2};
    const stack classifier = {"output.weight", 1, h->n_vocab, h->dim};
    size_t k = 0;
    if (h->legacy) {
        s[k++] = embd;
        s[k++] = attn_norm;
    } else {
        s[k++] = attn_norm;
        s[k++] = ffn_norm;
        s[k++] = norm;
        s[k++] = embd;
    }
    for (int i = 0; i < 4; i++) {
        s[k++] = attn[i];
    }
    if (h->legacy) {
        s[k++] = ffn_norm;
    }
    for (int i = 0; i < 3; i++) {
        s[k++] = ffn[i];
    }
    if (h->legacy) {
        s[k++] = norm;
        s[k++] = angles; /* cosines */
        s[k++] = angles; /* sines */
    }
    if (!h->shared) {
        s[k++] = classifier;
    }
    return k;
}

/* Bytes of one layer of a stack. Factors are at most 2^24, 2^24 and 4. */
static uint64_t layer_bytes(const stack *s) {
    return s->rows * s->cols * 4;
}

/* The file size that a header asks for; UINT64_MAX if no file has it. */
static uint64_t file_size(const header *h) {
    stack s[MAX_STACKS];
    size_t n = layout(h, s);
    uint64_t total = h->legacy ? LEGACY_HEADER : V1_HEADER, bytes;
    for (size_t i = 0; i < n; i++) {
        if (mul_overflows(layer_bytes(&s[i]), s[i].layers, &bytes) ||
            add_overflows(total, bytes, &total)) {
            return UINT64_MAX;
        }
    }
    return total;
}

static bool has_magic(const file_map *map) {
    return map->size >= 4 && load_u32(map->data) == MAGIC;
}

uint64_t llama2c_expected_size(const file_map *map) {
    header h;
    if (has_magic(map)) {
        return map->size; /* llama2c_open judges */
    }
    bool plausible = map->size >= LEGACY_HEADER && parse_header(map->data, true, &h);
    return plausible ? file_size(&h) : 0;
}

/* ---- Opening ----------------------------------------------------------- */

static hepta_status read_header(const file_map *map, const char *path, header *h,
                                hepta_error *err) {
    path = path_shown(path);
    bool legacy = !has_magic(map);
    if (!legacy && map->size >= 8 && load_u32(map->data + 4) != 1) {
        uint32_t version = load_u32(map->data + 4);
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: a llama2.c file of version %" PRIu32 "%s; versions 0 and 1 (float32) "
                         "are read: export the model again with --version 1",
                         path, version, version == 2 ? " (int8 groups)" : "");
    }
    size_t start = legacy ? 0 : 8;
    size_t header_size = legacy ? LEGACY_HEADER : V1_HEADER;
    if (map->size < header_size) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: %zu bytes long; the header of a llama2.c file has %zu: it is cut "
                         "short",
                         path, map->size, header_size);
    }
    if (!parse_header(map->data + start, legacy, h)) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: the header of this llama2.c file (bytes %zu to %zu) describes no "
                         "possible model",
                         path, start, start + LEGACY_HEADER);
    }
    uint8_t flag = legacy ? h->shared : map->data[SHARED_FLAG];
    h->shared = flag != 0;
    uint64_t expected = file_size(h);
    if (flag > 1 || map->size != expected) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s: a llama2.c model of width %" PRIu64 ", %" PRIu64
                         " layers and %" PRIu64 " tokens takes %" PRIu64
                         " bytes; the file has %zu: it is cut short or damaged",
                         path, h->dim, h->n_layers, h->n_vocab, expected, map->size);
    }
    return HEPTA_OK;
}

static hepta_status set_metadata(container *c, const header *h, hepta_error *err) {
    const struct {
        const char *key;
        uint64_t value;
    } numbers[] = {
        {"general.file_type", 0}, /* all F32 */
        {"llama.context_length", h->seq_len},
        {"llama.embedding_length", h->dim},
        {"llama.block_count", h->n_layers},
        {"llama.feed_forward_length", h->hidden},
        {"llama.attention.head_count", h->n_heads},
        {"llama.attention.head_count_kv", h->n_kv_heads},
        {"llama.rope.dimension_count", h->head_dim},
        {"llama.vocab_size", h->n_vocab},
    };
    hepta_status status = container_set_string(c, "general.architecture", "llama", 5, err);
    for (size_t i = 0; status == HEPTA_OK && i < sizeof numbers / sizeof numbers[0]; i++) {
        status = container_set_u32(c, numbers[i].key, (uint32_t)numbers[i].value, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "llama.attention.layer_norm_rms_epsilon", 1e-5f, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "llama.rope.freq_base", 10000.0f, err);
    }
    return status;
}

static hepta_status add_layer(container *c, const stack *s, uint64_t layer, uint64_t offset,
                              const uint8_t *data, hepta_error *err) {
    char name[FORMAT_MAX_NAME + 1];
    const char *number = strchr(s->name, '%');
    if (number == NULL) {
        snprintf(name, sizeof name, "%s", s->name);
    } else {
        snprintf(name, sizeof name, "%.*s%" PRIu64 "%s", (int)(number - s->name), s->name, layer,
                 number + 2);
    }
    tensor t = {.name = name,
                .type = TENSOR_F32,
                .n_dims = strstr(s->name, "norm") != NULL ? 1 : 2,
                .ne = {s->cols, s->rows, 1, 1},
                .data = data + offset,
                .n_bytes = layer_bytes(s),
                .file = c->path,
                .offset = offset};
    return container_add_tensor(c, &t, err);
}

hepta_status llama2c_open(const char *path, const container_options *options, container *c,
                          hepta_error *err) {
    (void)options; /* settings and tensors are one; there is no tokenizer to read */
    file_map map;
    header h;
    c->kind = CONTAINER_LLAMA2C;
    hepta_status status = container_add_map(c, path, &map, err);
    if (status == HEPTA_OK) {
        status = read_header(&map, path, &h, err);
    }
    if (status == HEPTA_OK) {
        c->version = h.legacy ? 0 : 1;
        status = set_metadata(c, &h, err);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    stack s[MAX_STACKS];
    size_t n = layout(&h, s);
    uint64_t offset = h.legacy ? LEGACY_HEADER : V1_HEADER;
    for (size_t i = 0; i < n; i++) {
        for (uint64_t layer = 0; layer < s[i].layers; layer++) {
            status =
                s[i].name != NULL ? add_layer(c, &s[i], layer, offset, map.data, err) : HEPTA_OK;
            if (status != HEPTA_OK) {
                return status;
            }
            offset += layer_bytes(&s[i]);
        }
    }
    return HEPTA_OK;
}
