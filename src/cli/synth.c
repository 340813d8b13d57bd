/*
 * synth.c - hepta synth: models of random weights in the shapes of known ones, for benchmarks.
 *
 * Every bit string is a valid code of a packed matrix, and nearly every one is a valid block of
 * GGML's types: so weights are drawn as bits, and only scales are chosen, such that a weight has
 * a standard deviation of about 1 / sqrt(columns), as in a model before training. A buffer of a
 * few MB is all the memory taken. The file is a function of shape, type and seed.
 *
 * GGML's block layouts: github.com/ggml-org/ggml, src/ggml-common.h.
 */
#include "cli/cli.h"

#include "cli/shape.h"
#include "code/code.h"
#include "quantize/plan.h"

#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>

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
        return shape_list();
    }
    shape s;
    uint32_t type;
    if (name == NULL && changes == NULL) {
        fprintf(stderr, "hepta: name a SHAPE or give --shape; `hepta synth list` lists them\n");
        return EXIT_USAGE;
    }
    if (shape_find(name, changes, &s) != EXIT_OK || find_type(type_name, &type) != EXIT_OK) {
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
    hepta_status status = shape_describe(c, &s, type, bits, seed, &err);
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
