/*
 * synth.c - hepta synth: models of random weights in the shapes of known ones, for benchmarks; and
 * hepta plan: what a model of such a shape would take.
 *
 * Every bit string is a valid code of a packed matrix, and nearly every one is a valid block of
 * GGML's types: so weights are drawn as bits, and only scales are chosen, such that a weight has
 * a standard deviation of about 1 / sqrt(columns), as in a model before training. A buffer of a
 * few MB is all the memory taken. The file is a function of shape, type and seed.
 *
 * GGML's block layouts: github.com/ggml-org/ggml, src/ggml-common.h.
 */
#include "cli/cli.h"

#include "code/code.h"
#include "format/container.h"
#include "quantize/plan.h"

#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

/* ---- Shapes ------------------------------------------------------------ */

typedef struct shape {
    const char *name;
    uint32_t vocab, width, layers, heads, kv_heads, ff, context, rope_base, tied;
} shape;

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

/* The named shape, or none, changed by --shape; complete and possible. */
static int find_shape(const char *name, const char *changes, shape *s) {
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

/* ---- Types ------------------------------------------------------------- */

/*
 * A GGML block type whose bits may be random but for its binary16 scales. With the first scale
 * 1 (and the second `min_factor`) random bits give weights of standard deviation `deviation` and,
 * where there is a second scale, the one of the minima, mean 0.
 */
typedef struct block_type {
    const char *name;
    uint32_t type;
    uint8_t bytes; /* of a block */
    uint8_t scale_at;
    uint8_t min_at; /* 0: none */
    double deviation, min_factor;
} block_type;

static const block_type block_types[] = {
    {"q4_0", 2, 18, 0, 0, 4.6, 0},      {"q4_k", 12, 144, 0, 2, 256, 7.5},
    {"q5_k", 13, 176, 0, 2, 522, 15.5}, {"q2_k", 10, 84, 80, 82, 13.9, 1.5},
    {"q3_k", 11, 110, 108, 0, 43.3, 0}, {"q6_k", 14, 210, 208, 0, 1370, 0},
    {"iq4_nl", 20, 18, 0, 0, 67.4, 0},  {"iq4_xs", 23, 136, 0, 0, 1246, 0},
    {"iq3_xxs", 18, 98, 0, 0, 126, 0},  {"iq3_s", 21, 110, 0, 0, 147, 0},
};

/* Types of single numbers, and Q8_0, whose numbers are nearly normal, not random bits. */
static const struct {
    const char *name;
    uint32_t type;
} normal_types[] = {
    {"f32", TENSOR_F32}, {"f16", TENSOR_F16}, {"bf16", TENSOR_BF16}, {"q8_0", TENSOR_Q8_0}};

enum {
    N_BLOCK_TYPES = sizeof block_types / sizeof block_types[0],
    N_NORMAL_TYPES = sizeof normal_types / sizeof normal_types[0],
    Q8_0_ITEMS = 32,
    Q8_0_BYTES = Q8_0_ITEMS + 2
};

static const block_type *find_block_type(uint32_t type) {
    for (size_t i = 0; i < N_BLOCK_TYPES; i++) {
        if (block_types[i].type == type) {
            return &block_types[i];
        }
    }
    return NULL;
}

/* TENSOR_PACKED for "hepta". */
static int find_type(const char *name, uint32_t *type) {
    if (strcmp(name, "hepta") == 0) {
        *type = TENSOR_PACKED;
        return EXIT_OK;
    }
    for (size_t i = 0; i < N_NORMAL_TYPES; i++) {
        if (strcmp(normal_types[i].name, name) == 0) {
            *type = normal_types[i].type;
            return EXIT_OK;
        }
    }
    for (size_t i = 0; i < N_BLOCK_TYPES; i++) {
        if (strcmp(block_types[i].name, name) == 0) {
            *type = block_types[i].type;
            return EXIT_OK;
        }
    }
    fprintf(stderr, "hepta: --type %s: expected hepta", name);
    for (size_t i = 0; i < N_NORMAL_TYPES; i++) {
        fprintf(stderr, ", %s", normal_types[i].name);
    }
    for (size_t i = 0; i < N_BLOCK_TYPES; i++) {
        fprintf(stderr, ", %s", block_types[i].name);
    }
    fputc('\n', stderr);
    return EXIT_USAGE;
}

/* ---- Weights ----------------------------------------------------------- */

enum { BUFFER_BYTES = 1 << 20, NORMAL_STEPS = 4 * 255 + 1 };

typedef struct synth {
    hepta_writer *out;
    progress *progress;
    uint64_t n_done, n_bytes;
    uint8_t *buffer; /* (BUFFER_BYTES), and room for a block more */
    hepta_error *err;
} synth;

/*
 * A nearly normal integer of 0..1020, mean 510, standard deviation 147.8: four random bytes added
 * up (Irwin-Hall).
 */
static uint32_t draw_normal(uint64_t *seed) {
    uint64_t r = random_next(seed);
    r = (r & 0x00ff00ff00ff00ffu) + (r >> 8 & 0x00ff00ff00ff00ffu); /* four sums of two */
    return (uint32_t)((r + (r >> 16)) & 0x3ff); /* of which two are not needed */
}

static const double normal_mean = 510, normal_deviation = 147.8;

/* A row's or block's scale: within a quarter of `middle`. */
static float draw_scale(uint64_t *seed, double middle) {
    return (float)(middle * (0.75 + 0.5 * (double)(random_next(seed) >> 11) * 0x1p-53));
}

static void store_u16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static void fill_bits(uint8_t *p, size_t n, uint64_t *seed) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t r = random_next(seed);
        memcpy(p + i, &r, 8);
    }
    uint64_t r = random_next(seed);
    memcpy(p + i, &r, n - i);
}

static void fill_int8(uint8_t *p, size_t n, uint64_t *seed) {
    for (size_t i = 0; i < n; i++) {
        p[i] = (uint8_t)(int8_t)(((int)draw_normal(seed) - (int)normal_mean) / 4);
    }
}

/* In these, n is a whole number of blocks. */
static void fill_blocks(const block_type *b, uint8_t *p, size_t n, double deviation,
                        uint64_t *seed) {
    fill_bits(p, n, seed);
    for (size_t at = 0; at < n; at += b->bytes) {
        float scale = draw_scale(seed, deviation / b->deviation);
        store_u16(p + at + b->scale_at, half_from_float(scale));
        if (b->min_at != 0) {
            store_u16(p + at + b->min_at, half_from_float(scale * (float)b->min_factor));
        }
    }
}

static void fill_q8_0(uint8_t *p, size_t n, double deviation, uint64_t *seed) {
    for (size_t at = 0; at < n; at += Q8_0_BYTES) {
        store_u16(p + at, half_from_float(draw_scale(seed, deviation / (normal_deviation / 4))));
        fill_int8(p + at + 2, Q8_0_ITEMS, seed);
    }
}

/* The numbers that draw_normal can give, in the type's form. */
static void fill_numbers(uint32_t type, uint8_t *p, size_t n, double mean, double deviation,
                         uint64_t *seed) {
    static uint32_t table[NORMAL_STEPS];
    for (uint32_t i = 0; i < NORMAL_STEPS; i++) {
        float x = (float)(mean + ((double)i - normal_mean) * deviation / normal_deviation);
        memcpy(&table[i], &x, 4);
        table[i] = type == TENSOR_F16    ? half_from_float(x)
                   : type == TENSOR_BF16 ? bfloat_from_float(x)
                                         : table[i];
    }
    size_t size = type == TENSOR_F32 ? 4 : 2;
    for (size_t at = 0; at + size <= n; at += size) {
        memcpy(p + at, &table[draw_normal(seed)], size); /* little-endian, as all of Hepta is */
    }
}

/* The next n bytes of tensor t: whole blocks. */
static void fill(const tensor *t, uint8_t *p, size_t n, uint64_t *seed) {
    double deviation = 1 / sqrt((double)t->ne[0]);
    const block_type *b = find_block_type(t->type);
    if (t->n_dims == 1) { /* norms */
        fill_numbers(TENSOR_F32, p, n, 1, 0.1, seed);
    } else if (t->type == TENSOR_PACKED && t->half_bits == HALF_BITS_INT8) {
        fill_int8(p, n, seed);
    } else if (t->type == TENSOR_PACKED) {
        fill_bits(p, n, seed);
    } else if (b != NULL) {
        fill_blocks(b, p, n, deviation, seed);
    } else if (t->type == TENSOR_Q8_0) {
        fill_q8_0(p, n, deviation, seed);
    } else {
        fill_numbers(t->type, p, n, 0, deviation, seed);
    }
}

/* Scales of the rows from `row` on; those of padding rows are 0. */
static void fill_row_scales(const tensor *t, uint64_t row, uint8_t *p, size_t n, uint64_t *seed) {
    double unit = t->half_bits == HALF_BITS_INT8 ? normal_deviation / 4
                                                 : (double)code_table_get((int)t->half_bits)->unit;
    double middle = 1 / (unit * sqrt((double)t->ne[0]));
    for (size_t at = 0; at < n; at += 2, row++) {
        store_u16(p + at, row < t->ne[1] ? bfloat_from_float(draw_scale(seed, middle)) : 0);
    }
}

/* Rows that fill up the last strip (docs/FORMAT.md) are zeros; p: bytes [at, at + n). */
static void clear_padding_rows(const tensor *t, uint64_t at, uint8_t *p, size_t n) {
    const uint64_t n_blocks = round_up(t->ne[0], 16) / 16;
    for (uint64_t row = t->ne[1]; row % PACKED_STRIP != 0; row++) {
        for (uint64_t b = 0; b < n_blocks; b++) {
            packed_place place = packed_block(t->half_bits, n_blocks, row, b);
            for (uint64_t i = 0; i < t->half_bits; i++) {
                uint64_t byte = place.first + i * place.step;
                if (byte >= at && byte - at < n) {
                    p[byte - at] = 0;
                }
            }
        }
    }
}

static hepta_status write_piece(synth *s, const tensor *t, size_t n) {
    hepta_status status = hepta_writer_write(s->out, s->buffer, n, s->err);
    s->n_done += n;
    if (status == HEPTA_OK && !progress_update(s->progress, t->name, s->n_done, s->n_bytes)) {
        status = error_set(s->err, HEPTA_ERROR_INTERRUPTED, "interrupted at %s; nothing was kept",
                           t->name);
    }
    return status;
}

/* A tensor's weights depend on the seed and its name alone. */
static uint64_t tensor_seed(uint64_t seed, const char *name) {
    for (; *name != '\0'; name++) {
        seed = (seed ^ (unsigned char)*name) * 0x100000001b3u; /* FNV-1a */
    }
    return random_next(&seed);
}

static hepta_status write_tensor(synth *s, const tensor *t, uint64_t seed) {
    const block_type *b = find_block_type(t->type);
    uint64_t block = b != NULL ? b->bytes : t->type == TENSOR_Q8_0 ? Q8_0_BYTES : 4;
    uint64_t n_scales = t->type == TENSOR_PACKED ? 2 * round_up(t->ne[1], PACKED_STRIP) : 0;
    uint64_t n_weights = t->n_bytes - n_scales, piece = BUFFER_BYTES / block * block;
    hepta_status status = HEPTA_OK;
    for (uint64_t done = 0; done < n_weights && status == HEPTA_OK; done += piece) {
        size_t n = (size_t)(n_weights - done < piece ? n_weights - done : piece);
        fill(t, s->buffer, n, &seed);
        if (t->type == TENSOR_PACKED) {
            clear_padding_rows(t, done, s->buffer, n);
        }
        status = write_piece(s, t, n);
    }
    for (uint64_t done = 0; done < n_scales && status == HEPTA_OK; done += BUFFER_BYTES) {
        size_t n = (size_t)(n_scales - done < BUFFER_BYTES ? n_scales - done : BUFFER_BYTES);
        fill_row_scales(t, done / 2, s->buffer, n, &seed);
        status = write_piece(s, t, n);
    }
    return status;
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

static hepta_status add_tensors(container *c, const shape *s, uint32_t type, hepta_error *err) {
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

static hepta_status describe(container *c, const shape *s, uint32_t type, double bits,
                             uint64_t seed, hepta_error *err) {
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
        status = add_tensors(c, s, type, err);
    }
    return status == HEPTA_OK && type == TENSOR_PACKED ? set_rates(c, bits, err) : status;
}

/* ---- The command ------------------------------------------------------- */

/* The header is small beside the tensors; what it may take is added on top. */
static hepta_status check_room(const char *path, uint64_t n_bytes, hepta_error *err) {
    enum { HEADER_ROOM = 16 << 20 };
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    const char *directory = dirname(copy);
    struct statvfs st;
    if (statvfs(directory, &st) != 0) {
        return error_set(err, HEPTA_ERROR_IO, "%s: %s", directory, strerror(errno));
    }
    uint64_t unit = st.f_frsize, room = st.f_bavail;
    if (mul_overflows(room, unit, &room)) {
        room = UINT64_MAX;
    }
    if (n_bytes > room - (room < HEADER_ROOM ? room : HEADER_ROOM)) {
        return error_set(err, HEPTA_ERROR_IO,
                         "%s takes %.2f GB, and %s has room for %.2f GB: nothing was written", path,
                         (double)n_bytes * 1e-9, directory, (double)room * 1e-9);
    }
    return HEPTA_OK;
}

static hepta_status write_model(const container *c, const char *path, uint64_t seed, progress *p,
                                hepta_error *err) {
    synth s = {.progress = p, .err = err};
    for (size_t i = 0; i < c->n_tensors; i++) {
        s.n_bytes += c->tensors[i].n_bytes;
    }
    s.buffer = memory_alloc(BUFFER_BYTES, 1);
    if (s.buffer == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory");
    }
    hepta_status status = check_room(path, s.n_bytes, err);
    if (status == HEPTA_OK) {
        bool packed = container_find(c, "hepta.bits") != NULL;
        status = (packed ? hepta_writer_open : gguf_writer_open)(path, c->kvs, c->n_kvs, c->tensors,
                                                                 c->n_tensors, &s.out, err);
    }
    for (size_t i = 0; i < c->n_tensors && status == HEPTA_OK; i++) {
        status = write_tensor(&s, &c->tensors[i], tensor_seed(seed, c->tensors[i].name));
    }
    if (status == HEPTA_OK) {
        status = hepta_writer_commit(s.out, err);
    } else {
        hepta_writer_discard(s.out);
    }
    memory_free(s.buffer);
    return status;
}

static int list_shapes(void) {
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

int cli_synth(int argc, char **argv) {
    const char *out = NULL, *type_name = "hepta", *changes = NULL, *name = NULL;
    double bits = 3.5;
    uint64_t seed = 1;
    bool quiet = false;
    const option_spec specs[] = {
        {"output", 'o', OPTION_STRING, &out, "FILE", "the file to write (needed)"},
        {"type", 0, OPTION_STRING, &type_name, "T",
         "hepta (default), f32, f16, bf16, q8_0, q4_0, q2_k, q3_k, q4_k, q5_k, q6_k,"},
        {"bits", 'b', OPTION_F64, &bits, "B",
         "hepta: bits per weight of the whole file, 2 to 8 (default 3.5)"},
        {"shape", 0, OPTION_STRING, &changes, "K=N,...",
         "own dimensions, or changes to SHAPE: vocab, width, layers, heads, kv_heads,"},
        {"seed", 's', OPTION_U64, &seed, "N", "seed of the weights (default 1)"},
        {"quiet", 'q', OPTION_FLAG, &quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "synth [SHAPE] -o FILE [options]",
        .summary = "Writes a model of random weights in the shape of a known one.",
        .details =
            "`hepta synth list` lists the shapes. --type also takes iq4_nl, iq4_xs, iq3_s and\n"
            "iq3_xxs; all matrices get that one type. --shape also takes ff, context, rope_base\n"
            "and tied (0 or 1). Types other than hepta give GGUF files, for comparisons.\n"
            "Shape, type and seed decide every byte.",
        .example = "hepta synth llama-2-7b -o /tmp/7b.hepta && hepta bench /tmp/7b.hepta",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &name);
    if (code >= 0) {
        return code;
    }
    if (name != NULL && strcmp(name, "list") == 0) {
        return list_shapes();
    }
    shape s;
    uint32_t type;
    if (name == NULL && changes == NULL) {
        fprintf(stderr, "hepta: name a SHAPE or give --shape; `hepta synth list` lists them\n");
        return EXIT_USAGE;
    }
    if (find_shape(name, changes, &s) != EXIT_OK || find_type(type_name, &type) != EXIT_OK) {
        return EXIT_USAGE;
    }
    if (out == NULL) {
        fprintf(stderr, "hepta: name the file to write with -o FILE\n");
        return EXIT_USAGE;
    }
    interrupt_catch();
    hepta_error err;
    progress p;
    progress_start(&p, "synth", "B");
    p.quiet = quiet;
    container *c = memory_alloc(1, sizeof *c);
    if (c == NULL) {
        return report_text("out of memory");
    }
    c->path = out;
    hepta_status status = describe(c, &s, type, bits, seed, &err);
    if (status == HEPTA_OK) {
        status = write_model(c, out, seed, &p, &err);
        progress_finish(&p);
    }
    if (status == HEPTA_OK) {
        uint64_t weights = 0, bytes = 0;
        for (size_t i = 0; i < c->n_tensors; i++) {
            weights += tensor_n_weights(&c->tensors[i]);
            bytes += c->tensors[i].n_bytes;
        }
        printf("%s: %s, %" PRIu64 " weights, %.3f bits per weight, %.2f GB, %.1f s\n", out, s.name,
               weights, (double)bytes * 8 / (double)weights, (double)bytes * 1e-9,
               clock_seconds() - p.started);
    }
    container_close(c);
    return status == HEPTA_OK ? EXIT_OK : report(&err);
}

/* ---- hepta plan -------------------------------------------------------- */

/* The tensors of a model file, or of a shape. */
static hepta_status open_tensors(const char *name, const char *changes, container **out, int *code,
                                 hepta_error *err) {
    *code = EXIT_OK;
    if (name != NULL && (file_exists(name) || file_is_directory(name))) {
        return container_open(name, &(container_options){.no_tokenizer = true}, out, err);
    }
    shape s;
    *code = find_shape(name, changes, &s);
    if (*code != EXIT_OK) {
        return HEPTA_OK;
    }
    *out = memory_alloc(1, sizeof **out);
    if (*out == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory");
    }
    return add_tensors(*out, &s, TENSOR_PACKED, err);
}

static void print_plan(const container *c, const uint32_t *half_bits) {
    static const uint32_t rates[] = {HALF_BITS_INT8, 8, 7, 6, 5, 4, 0};
    uint64_t total = 0;
    for (size_t r = 0; r < sizeof rates / sizeof rates[0]; r++) {
        uint64_t n = 0, weights = 0;
        for (size_t i = 0; i < c->n_tensors; i++) {
            if (half_bits[i] == rates[r]) {
                n++;
                weights += tensor_n_weights(&c->tensors[i]);
            }
        }
        total += weights;
        if (n > 0) {
            char what[24];
            snprintf(what, sizeof what, "%g bits", rates[r] / 2.0);
            printf("%-9s %6" PRIu64 " tensors %16" PRIu64 " weights\n",
                   rates[r] == 0 ? "F32" : what, n, weights);
        }
    }
    const uint64_t bytes = plan_bytes(c->tensors, c->n_tensors, half_bits);
    printf("%.4f bits per weight, %" PRIu64 " weights, %" PRIu64 " bytes (%.2f GB)\n",
           (double)bytes * 8 / (double)total, total, bytes, (double)bytes * 1e-9);
}

int cli_plan(int argc, char **argv) {
    const char *name = NULL, *changes = NULL, *in = NULL, *out = NULL;
    double bits = 3.5;
    const option_spec specs[] = {
        {"bits", 'b', OPTION_F64, &bits, "B",
         "bits per weight of the whole file, 2 to 8 (default 3.5)"},
        {"plan", 0, OPTION_STRING, &in, "FILE", "take the bits of each tensor from FILE"},
        {"output", 'o', OPTION_STRING, &out, "FILE", "write the plan to FILE"},
        {"shape", 0, OPTION_STRING, &changes, "K=N,...",
         "own dimensions, or changes to SHAPE: see hepta synth --help"},
        {0},
    };
    const command_spec spec = {
        .usage = "plan SHAPE|MODEL [options]",
        .summary = "Shows what a model takes at B bits per weight, without its weights.",
        .details =
            "`hepta synth list` lists the shapes. All tensors count, with their row scales;\n"
            "at just 2 and 8 bits the scales come on top. The rates are those of `quantize\n"
            "--effort fast`; good and best look at the weights, too. A plan is a line\n"
            "NAME, tab, BITS for each matrix, which `quantize --plan` takes.",
        .example = "hepta plan llama-2-70b --bits 2.17",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &name);
    if (code >= 0) {
        return code;
    }
    if (name == NULL && changes == NULL) {
        fprintf(stderr, "hepta: name a SHAPE, a model, or give --shape\n");
        return EXIT_USAGE;
    }
    hepta_error err;
    container *c = NULL;
    uint32_t *half_bits = NULL;
    hepta_status status = open_tensors(name, changes, &c, &code, &err);
    if (status == HEPTA_OK && code == EXIT_OK) {
        half_bits = memory_alloc(c->n_tensors, sizeof *half_bits);
        if (half_bits == NULL) {
            status = error_set(&err, HEPTA_ERROR_MEMORY, "out of memory");
        } else {
            status = in != NULL ? plan_read(in, c->tensors, c->n_tensors, half_bits, &err)
                                : plan_rates(c->tensors, c->n_tensors, bits, NULL, half_bits, &err);
        }
        if (status == HEPTA_OK && out != NULL) {
            status = plan_write(out, c->tensors, c->n_tensors, half_bits, NULL, &err);
        }
        if (status == HEPTA_OK) {
            print_plan(c, half_bits);
        }
    }
    memory_free(half_bits);
    container_close(c);
    return status != HEPTA_OK ? report(&err) : code;
}
