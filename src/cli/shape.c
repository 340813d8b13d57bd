/*
 * shape.c - the shapes of models (shape.h).
 */
#include "cli/shape.h"

#include "cli/cli.h"
#include "quantize/plan.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Shapes ------------------------------------------------------------ */

static const shape shapes[] = {
    {"tinyllama-1.1b", 32000, 2048, 22, 32, 4, 5632, 2048, 10000, 0},
    {"llama-2-7b", 32000, 4096, 32, 32, 32, 11008, 4096, 10000, 0},
    {"llama-2-13b", 32000, 5120, 40, 40, 40, 13824, 4096, 10000, 0},
    {"llama-2-70b", 32000, 8192, 80, 64, 8, 28672, 4096, 10000, 0},
    {"llama-3-8b", 128256, 4096, 32, 32, 8, 14336, 8192, 500000, 0},
    {"llama-3-70b", 128256, 8192, 80, 64, 8, 28672, 8192, 500000, 0},
    {"llama-3-405b", 128256, 16384, 126, 128, 8, 53248, 131072, 500000, 0},
    {"llama-3.2-1b", 128256, 2048, 16, 32, 8, 8192, 131072, 500000, 1},
    {"llama-3.2-3b", 128256, 3072, 28, 24, 8, 8192, 131072, 500000, 1},
};

enum { N_SHAPES = sizeof shapes / sizeof shapes[0], MIN_VOCAB = 259, MAX_LAYERS = 4096 };

/* The keys of --shape, and the range of each. */
static const struct {
    const char *key;
    size_t offset;
    uint32_t min, max;
} fields[] = {
    {"vocab", offsetof(shape, vocab), MIN_VOCAB, 1 << 24},
    {"width", offsetof(shape, width), 2, TENSOR_PACKED_MAX_COLS},
    {"layers", offsetof(shape, layers), 1, MAX_LAYERS},
    {"heads", offsetof(shape, heads), 1, TENSOR_PACKED_MAX_COLS},
    {"kv_heads", offsetof(shape, kv_heads), 1, TENSOR_PACKED_MAX_COLS},
    {"ff", offsetof(shape, ff), 1, TENSOR_PACKED_MAX_COLS},
    {"context", offsetof(shape, context), 1, INT32_MAX},
    {"rope_base", offsetof(shape, rope_base), 1, UINT32_MAX},
    {"tied", offsetof(shape, tied), 0, 1},
};

enum { N_FIELDS = sizeof fields / sizeof fields[0] };

static uint32_t *field_of(shape *s, size_t i) {
    return (uint32_t *)((char *)s + fields[i].offset);
}

static int unknown_shape(const char *name) {
    fprintf(stderr, "hepta: no shape %s; there are:", name);
    for (size_t i = 0; i < N_SHAPES; i++) {
        fprintf(stderr, " %s", shapes[i].name);
    }
    fprintf(stderr, "; or give --shape KEY=VALUE,...\n");
    return EXIT_USAGE;
}

/* Reads "width=256,layers=2,..." over *s. */
static int read_fields(const char *text, shape *s) {
    while (*text != '\0') {
        size_t n = strcspn(text, "=,"), i = 0;
        while (i < N_FIELDS && (strlen(fields[i].key) != n || memcmp(fields[i].key, text, n))) {
            i++;
        }
        char *end = NULL;
        bool digits = i < N_FIELDS && text[n] == '=' && text[n + 1] >= '0' && text[n + 1] <= '9';
        errno = 0;
        unsigned long long value = digits ? strtoull(text + n + 1, &end, 10) : 0;
        if (!digits || errno != 0 || (*end != ',' && *end != '\0')) {
            fprintf(stderr, "hepta: --shape ...%.40s: expected KEY=NUMBER,... with the keys", text);
            for (i = 0; i < N_FIELDS; i++) {
                fprintf(stderr, " %s", fields[i].key);
            }
            fputc('\n', stderr);
            return EXIT_USAGE;
        }
        if (value < fields[i].min || value > fields[i].max) {
            fprintf(stderr, "hepta: --shape %s=%llu: expected %u to %u\n", fields[i].key, value,
                    fields[i].min, fields[i].max);
            return EXIT_USAGE;
        }
        *field_of(s, i) = (uint32_t)value;
        text = *end == ',' ? end + 1 : end;
    }
    return EXIT_OK;
}

int shape_find(const char *name, const char *changes, shape *s) {
    *s = (shape){.name = "synthetic", .rope_base = 10000};
    if (name != NULL) {
        size_t i = 0;
        while (i < N_SHAPES && strcmp(shapes[i].name, name) != 0) {
            i++;
        }
        if (i == N_SHAPES) {
            return unknown_shape(name);
        }
        *s = shapes[i];
    }
    if (changes != NULL && read_fields(changes, s) != EXIT_OK) {
        return EXIT_USAGE;
    }
    s->kv_heads = s->kv_heads == 0 ? s->heads : s->kv_heads;
    for (size_t i = 0; i < N_FIELDS; i++) {
        if (*field_of(s, i) < fields[i].min) {
            fprintf(stderr, "hepta: --shape lacks %s=...\n", fields[i].key);
            return EXIT_USAGE;
        }
    }
    if (s->width % s->heads != 0 || s->width / s->heads % 2 != 0 || s->heads % s->kv_heads != 0) {
        fprintf(stderr,
                "hepta: --shape: %u heads, %u of them for keys, do not divide a width of %u into "
                "heads of even size\n",
                s->heads, s->kv_heads, s->width);
        return EXIT_USAGE;
    }
    return EXIT_OK;
}

int shape_list(void) {
    printf("%-16s %8s %8s %6s %5s %8s %6s %8s %10s\n", "shape", "vocab", "width", "layers", "heads",
           "kv_heads", "ff", "context", "weights");
    for (size_t i = 0; i < N_SHAPES; i++) {
        const shape *s = &shapes[i];
        double width = s->width, keys = width / s->heads * s->kv_heads;
        double layer = 2 * width * width + 2 * width * keys + 3 * width * s->ff;
        double weights = layer * s->layers + width * s->vocab * (s->tied ? 1 : 2);
        printf("%-16s %8u %8u %6u %5u %8u %6u %8u %8.2f G\n", s->name, s->vocab, s->width,
               s->layers, s->heads, s->kv_heads, s->ff, s->context, weights * 1e-9);
    }
    return EXIT_OK;
}

/* ---- Metadata ---------------------------------------------------------- */

static hepta_status set_text(container *c, const char *key, const char *text, hepta_error *err) {
    return container_set_string(c, key, text, strlen(text), err);
}

static hepta_status set_hyperparameters(container *c, const shape *s, hepta_error *err) {
    const struct {
        const char *key;
        uint32_t value;
    } numbers[] = {
        {"llama.context_length", s->context},
        {"llama.embedding_length", s->width},
        {"llama.block_count", s->layers},
        {"llama.feed_forward_length", s->ff},
        {"llama.attention.head_count", s->heads},
        {"llama.attention.head_count_kv", s->kv_heads},
        {"llama.rope.dimension_count", s->width / s->heads},
        {"llama.vocab_size", s->vocab},
    };
    hepta_status status = set_text(c, "general.architecture", "llama", err);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0] && status == HEPTA_OK; i++) {
        status = container_set_u32(c, numbers[i].key, numbers[i].value, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "llama.attention.layer_norm_rms_epsilon", 1e-5f, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "llama.rope.freq_base", (float)s->rope_base, err);
    }
    return status;
}

/* A SentencePiece vocabulary: <unk>, <s>, </s>, the 256 bytes, then made-up words. */
static hepta_status set_tokenizer(container *c, uint32_t n_vocab, hepta_error *err) {
    enum { ROOM = 16, NORMAL = 1, UNKNOWN = 2, CONTROL = 3, BYTE = 6, FIRST_BYTE = 3 };
    static const char *const special[] = {"<unk>", "<s>", "</s>"};
    kv_string *tokens = memory_alloc(n_vocab, sizeof *tokens);
    char *text = memory_alloc(n_vocab, ROOM);
    float *scores = memory_alloc(n_vocab, sizeof *scores);
    int32_t *types = memory_alloc(n_vocab, sizeof *types);
    hepta_status status = HEPTA_OK;
    if (tokens == NULL || text == NULL || scores == NULL || types == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %u tokens", n_vocab);
        goto done;
    }
    for (uint32_t i = 0; i < n_vocab; i++) {
        char *name = text + (size_t)i * ROOM;
        bool byte = i >= FIRST_BYTE && i < FIRST_BYTE + 256;
        if (i < FIRST_BYTE) {
            snprintf(name, ROOM, "%s", special[i]);
        } else if (byte) {
            snprintf(name, ROOM, "<0x%02X>", i - FIRST_BYTE);
        } else {
            snprintf(name, ROOM, "\xE2\x96\x81w%u", i); /* U+2581: a space */
        }
        tokens[i] = (kv_string){name, strlen(name)};
        scores[i] = byte || i < FIRST_BYTE ? 0 : -(float)i;
        types[i] = i == 0 ? UNKNOWN : i < FIRST_BYTE ? CONTROL : byte ? BYTE : NORMAL;
    }
    status = set_text(c, "tokenizer.ggml.model", "llama", err);
    if (status == HEPTA_OK) {
        status = container_set_array(c, "tokenizer.ggml.tokens", KV_STRING, tokens, n_vocab, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_array(c, "tokenizer.ggml.scores", KV_F32, scores, n_vocab, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_array(c, "tokenizer.ggml.token_type", KV_I32, types, n_vocab, err);
    }
    static const char *const ids[] = {"tokenizer.ggml.unknown_token_id",
                                      "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"};
    for (uint32_t i = 0; i < 3 && status == HEPTA_OK; i++) {
        status = container_set_u32(c, ids[i], i, err);
    }
done:
    memory_free(tokens);
    memory_free(text);
    memory_free(scores);
    memory_free(types);
    return status;
}

/* The seed is the rotation's, too: any serves. */
static hepta_status set_packed_keys(container *c, double bits, uint64_t seed, hepta_error *err) {
    hepta_status status = set_text(c, "hepta.recipe", "hepta synth: random bits", err);
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "hepta.bits", (float)bits, err);
    }
    return status == HEPTA_OK ? container_set_u64(c, "hepta.rotation.seed", seed, err) : status;
}

/* ---- Tensors ----------------------------------------------------------- */

static hepta_status add_tensor(container *c, const char *name, uint32_t type, uint64_t n_cols,
                               uint64_t n_rows, hepta_error *err) {
    tensor t = {.name = name,
                .type = n_rows > 0 ? type : TENSOR_F32,
                .n_dims = n_rows > 0 ? 2 : 1,
                .ne = {n_cols, n_rows > 0 ? n_rows : 1, 1, 1}};
    /* A packed tensor's size waits for its rate. */
    if (t.type != TENSOR_PACKED && !tensor_type_bytes(t.type, t.ne, &t.n_bytes)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%s has rows of %" PRIu64 " weights, no whole number of blocks of %s",
                         name, n_cols, tensor_type_name(t.type));
    }
    return container_add_tensor(c, &t, err);
}

hepta_status shape_add_tensors(container *c, const shape *s, uint32_t type, hepta_error *err) {
    const uint64_t width = s->width, keys = width / s->heads * s->kv_heads;
    const struct {
        const char *name;
        uint64_t n_cols, n_rows; /* rows 0: a vector */
    } parts[] = {
        {"attn_norm", width, 0},    {"attn_q", width, width},      {"attn_k", width, keys},
        {"attn_v", width, keys},    {"attn_output", width, width}, {"ffn_norm", width, 0},
        {"ffn_gate", width, s->ff}, {"ffn_up", width, s->ff},      {"ffn_down", s->ff, width},
    };
    hepta_status status = add_tensor(c, "token_embd.weight", type, width, s->vocab, err);
    for (uint32_t layer = 0; layer < s->layers; layer++) {
        for (size_t p = 0; p < sizeof parts / sizeof parts[0] && status == HEPTA_OK; p++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%u.%s.weight", layer, parts[p].name);
            status = add_tensor(c, name, type, parts[p].n_cols, parts[p].n_rows, err);
        }
    }
    if (status == HEPTA_OK) {
        status = add_tensor(c, "output_norm.weight", type, width, 0, err);
    }
    if (status == HEPTA_OK && !s->tied) {
        status = add_tensor(c, "output.weight", type, width, s->vocab, err);
    }
    return status;
}

/* Rates as the quantizer would choose them, so that the file is laid out as a real one. */
static hepta_status set_rates(container *c, double bits, hepta_error *err) {
    uint32_t *half_bits = memory_alloc(c->n_tensors, sizeof *half_bits);
    if (half_bits == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu tensors", c->n_tensors);
    }
    hepta_status status = plan_rates(c->tensors, c->n_tensors, bits, NULL, half_bits, err);
    for (size_t i = 0; i < c->n_tensors && status == HEPTA_OK; i++) {
        tensor *t = &c->tensors[i];
        t->half_bits = half_bits[i];
        if (half_bits[i] != 0) {
            (void)tensor_packed_bytes(half_bits[i], t->ne[1], t->ne[0], &t->n_bytes);
        }
    }
    memory_free(half_bits);
    return status;
}

hepta_status shape_describe(container *c, const shape *s, uint32_t type, double bits, uint64_t seed,
                            hepta_error *err) {
    hepta_status status = set_hyperparameters(c, s, err);
    if (status == HEPTA_OK) {
        status = set_text(c, "general.name", s->name, err);
    }
    if (status == HEPTA_OK && type == TENSOR_PACKED) {
        status = set_packed_keys(c, bits, seed, err);
    }
    if (status == HEPTA_OK) {
        status = set_tokenizer(c, s->vocab, err);
    }
    if (status == HEPTA_OK) {
        status = shape_add_tensors(c, s, type, err);
    }
    return status == HEPTA_OK && type == TENSOR_PACKED ? set_rates(c, bits, err) : status;
}
