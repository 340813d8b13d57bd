/*
 * container.h - one view of every model file: metadata and named tensors.
 *
 * Whatever a model comes in (GGUF or .hepta, a Hugging Face directory, llama2.c's .bin), opening
 * it gives a `container` in GGUF's vocabulary: metadata under GGUF's standard keys
 * (general.*, llama.*, tokenizer.ggml.*) and tensors under GGUF's names (token_embd.weight,
 * blk.0.attn_q.weight, ...), pointing into read-only mappings of the files. The importers
 * translate; nothing above this layer knows where a model came from.
 *
 * Invariant: every tensor's [data, data + n_bytes) lies inside a mapping of the container (or its
 * arena, for the few that are computed), n_bytes agrees with its type and shape, no dimension is 0
 * and data is aligned to the size of the type's items; names are unique; every string and array
 * lies in a mapping or the arena. Everything in a file is hostile until checked here.
 *
 * Documented in docs/FORMAT.md. The GGUF specification: github.com/ggml-org/ggml, docs/gguf.md.
 */
#ifndef FORMAT_CONTAINER_H
#define FORMAT_CONTAINER_H

#include "base/base.h"

/* ---- Metadata ---------------------------------------------------------- */

/* GGUF's value types, with GGUF's numbers. */
typedef enum kv_type {
    KV_U8 = 0,
    KV_I8,
    KV_U16,
    KV_I16,
    KV_U32,
    KV_I32,
    KV_F32,
    KV_BOOL,
    KV_STRING,
    KV_ARRAY,
    KV_U64,
    KV_I64,
    KV_F64
} kv_type;

typedef struct kv_string {
    const char *data; /* not NUL-terminated; may hold any bytes */
    uint64_t n;
} kv_string;

typedef struct kv {
    kv_string key;
    kv_type type;
    kv_type item_type; /* of an array */
    uint64_t n_items;  /* of an array */
    union {
        uint64_t u; /* KV_U*, KV_BOOL */
        int64_t i;  /* KV_I* */
        double f;   /* KV_F* */
        kv_string s;
        const void *items; /* little-endian scalars, unaligned; or kv_string[n_items] */
    } v;
} kv;

/* ---- Tensors ----------------------------------------------------------- */

/* GGML's tensor types, with GGML's numbers; only those that have a use here get a name. */
typedef enum tensor_type {
    TENSOR_F32 = 0,
    TENSOR_F16 = 1,
    TENSOR_Q4_0 = 2, /* blocks: see dequantize.c */
    TENSOR_Q4_1 = 3,
    TENSOR_Q5_0 = 6,
    TENSOR_Q5_1 = 7,
    TENSOR_Q8_0 = 8, /* blocks of 32: binary16 scale, 32 int8 */
    TENSOR_Q2_K = 10,
    TENSOR_Q3_K = 11,
    TENSOR_Q4_K = 12,
    TENSOR_Q5_K = 13,
    TENSOR_Q6_K = 14,
    TENSOR_IQ4_NL = 20,
    TENSOR_IQ4_XS = 23,
    TENSOR_I8 = 24,
    TENSOR_BF16 = 30,
    /* Only in .hepta files (stored there as TENSOR_I8 bytes and described by hepta.tensor.*): */
    TENSOR_PACKED = 1000, /* the trellis code of code/code.h or int8, see `half_bits` */
    /* Only in Hugging Face directories, see `groups`: */
    TENSOR_GPTQ = 1001,
    TENSOR_AWQ = 1002,
    TENSOR_LAST = TENSOR_AWQ
} tensor_type;

/*
 * The other parts of a GPTQ or AWQ matrix, whose `data` are the integers: weight = scale * (q -
 * zero), scale and zero of the group that the column belongs to. Layouts: hf_groups.c.
 */
typedef struct tensor_groups {
    uint32_t bits;         /* 2, 3, 4 or 8 */
    uint32_t size;         /* columns of a group; the last may have fewer */
    uint32_t n_groups;     /* in a row */
    uint32_t zero_offset;  /* zero = what is stored + this */
    uint32_t scale_type;   /* TENSOR_F16, _BF16, _F32 */
    const uint8_t *zeros;  /* as the integers are stored */
    const uint8_t *scales; /* (n_groups, n_rows) */
    const uint8_t *index;  /* int32 (n_cols), the group of each column; NULL: column / size */
    uint64_t n_bytes;      /* of these parts */
} tensor_groups;

/*
 * A matrix (n_rows, n_cols) is stored row by row: y[r] = sum_c W[r][c] x[c]. GGUF lists ne[0] =
 * n_cols first; vectors have n_dims 1.
 */
typedef struct tensor {
    const char *name;
    uint32_t type;      /* tensor_type, or a GGML number without a name here */
    uint32_t half_bits; /* TENSOR_PACKED: twice the bits per weight: 4..8, or 16 for int8 */
    uint32_t n_dims;    /* 1..4, of the weights */
    uint64_t ne[4];     /* unused ones are 1 */
    const uint8_t *data;
    uint64_t n_bytes;
    const char *file;            /* path of the file it lies in, for messages */
    uint64_t offset;             /* of data in that file */
    const tensor_groups *groups; /* TENSOR_GPTQ, TENSOR_AWQ; else NULL */
    bool has_sha256;
    uint8_t sha256[32]; /* stored checksum (.hepta) */
} tensor;

/* Columns of a packed matrix, padded: 128 * 127 * 132096 < 2^31, so that int32 sums hold. */
enum { TENSOR_PACKED_MAX_COLS = 132096 };

typedef enum container_kind {
    CONTAINER_GGUF,
    CONTAINER_HEPTA, /* GGUF with hepta.* keys */
    CONTAINER_HF,    /* Hugging Face directory */
    CONTAINER_LLAMA2C
} container_kind;

/* Hash table by name, linear probing: slots hold 1 + the entry's number, 0 is empty. */
typedef struct name_index {
    uint32_t *slots;
    size_t n_slots; /* 0 or a power of two, more than twice the entries */
} name_index;

typedef struct container {
    container_kind kind;
    const char *path;
    uint32_t version;       /* GGUF version, llama2.c version, 0 */
    uint32_t hepta_version; /* .hepta: hepta.version */
    kv *kvs;
    size_t n_kvs;
    tensor *tensors;
    size_t n_tensors;
    /* private */
    file_map *maps;
    size_t n_maps;
    arena memory;
    name_index kv_index, tensor_index;
} container;

/* ---- Opening ----------------------------------------------------------- */

typedef struct container_options {
    const char *tokenizer_path; /* NULL, or a tokenizer that replaces the model's own */
    bool metadata_only;         /* a directory without any weights (settings, tokenizer) is fine */
    bool no_tokenizer;          /* do not read tokenizer files (the engine alone) */
} container_options;

/* Recognizes the kind by content (magic numbers, config.json), not by the file's name. */
hepta_status container_open(const char *path, const container_options *options, container **out,
                            hepta_error *err);
void container_close(container *c);

/*
 * Importers, used by container_open: each fills the empty container `c`, whose path is set.
 * options->tokenizer_path is container_open's business.
 */
hepta_status gguf_open(const char *path, const container_options *options, container *c,
                       hepta_error *err);
hepta_status llama2c_open(const char *path, const container_options *options, container *c,
                          hepta_error *err);
hepta_status hf_open(const char *path, const container_options *options, container *c,
                     hepta_error *err);
/* Reads a tokenizer file of any known kind into tokenizer.ggml.* keys, replacing those there. */
hepta_status tokenizer_file_read(const char *path, container *c, hepta_error *err);

/* ---- Reading ----------------------------------------------------------- */

const kv *container_find(const container *c, const char *key); /* NULL: absent */
const tensor *container_tensor(const container *c, const char *name);

/*
 * Typed getters: HEPTA_ERROR_FORMAT when the key is absent or of another type (any integer type
 * serves an unsigned getter if the value fits; any number serves f64). Variants with a fallback
 * fail only on a wrong type.
 */
hepta_status container_get_u32(const container *c, const char *key, uint32_t *out,
                               hepta_error *err);
hepta_status container_get_u32_or(const container *c, const char *key, uint32_t fallback,
                                  uint32_t *out, hepta_error *err);
hepta_status container_get_u64(const container *c, const char *key, uint64_t *out,
                               hepta_error *err);
hepta_status container_get_f32(const container *c, const char *key, float *out, hepta_error *err);
hepta_status container_get_f32_or(const container *c, const char *key, float fallback, float *out,
                                  hepta_error *err);
/* The fallback, too, when the key is of another type. */
bool container_get_bool_or(const container *c, const char *key, bool fallback);
/* NULL when absent or no string; NUL-terminated copy owned by the container. */
const char *container_get_string(container *c, const char *key);

/* Items of arrays; 0 or an empty string when i is past the end or the array of another type. */
int64_t kv_item_i64(const kv *array, uint64_t i);      /* item of an integer or bool array */
double kv_item_f64(const kv *array, uint64_t i);       /* item of a number array */
kv_string kv_item_string(const kv *array, uint64_t i); /* item of a string array */

/*
 * Bytes that a tensor of this GGML type and shape takes; false: unknown type, a dimension of 0,
 * rows that are no whole number of blocks, or overflow.
 */
bool tensor_type_bytes(uint32_t type, const uint64_t ne[4], uint64_t *n_bytes);
/*
 * The same for TENSOR_PACKED: rows padded to 16, columns to 16, codes then bfloat16 row scales.
 * false: half_bits not in 4..8 or 16, no rows or columns, more than TENSOR_PACKED_MAX_COLS columns
 * or 2^32 - 16 rows.
 */
bool tensor_packed_bytes(uint32_t half_bits, uint64_t n_rows, uint64_t n_cols, uint64_t *n_bytes);

/*
 * Where a packed matrix has the block of columns 16 * block .. 16 * block + 15 of a row: its first
 * byte, and the distance to each next one of its half_bits bytes. n_blocks: of a row.
 */
enum { PACKED_STRIP = 16, PACKED_GROUP = 4 }; /* rows of a strip, blocks of a group */
typedef struct packed_place {
    uint64_t first, step;
} packed_place;
static inline packed_place packed_block(uint32_t half_bits, uint64_t n_blocks, uint64_t row,
                                        uint64_t block) {
    const uint64_t group = block / PACKED_GROUP * PACKED_GROUP;
    const uint64_t width = n_blocks - group < PACKED_GROUP ? n_blocks - group : PACKED_GROUP;
    const uint64_t strip = row / PACKED_STRIP * PACKED_STRIP * n_blocks * half_bits;
    return (packed_place){strip + group * PACKED_STRIP * half_bits + row % PACKED_STRIP * width +
                              (block - group),
                          PACKED_STRIP * width};
}
/* Puts a row, n_blocks times half_bits bytes, to its places in the matrix. */
void packed_put_row(uint32_t half_bits, uint64_t n_blocks, uint64_t row, const uint8_t *code,
                    uint8_t *matrix);
const char *tensor_type_name(uint32_t type); /* "F16", "Q4_K", ... or "unknown" */
const char *kv_type_name(kv_type type);      /* "u32", "string", ... or "unknown" */
uint64_t tensor_n_weights(const tensor *t);
uint64_t tensor_stored_bytes(const tensor *t); /* n_bytes, and those of t->groups */

/* ---- Values (dequantize.c) --------------------------------------------- */

/* True for types whose values can be had as F32, TENSOR_PACKED not among them. */
bool tensor_type_is_readable(uint32_t type);
#define TENSOR_READABLE_TYPES                                                                      \
    "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL or IQ4_XS"

/* True for the types that tensor_blocks_to_f32 converts: Q4_0 to Q5_1, Q2_K to Q6_K, IQ4_*. */
bool tensor_type_is_blocks(uint32_t type);
/*
 * How many tensors there are of each type, as in "3 x F32, 14 x Q4_K"; true when some have been
 * quantized before (any but F32, F16, BF16 and F64), so that weights were lost for good.
 */
bool container_source_types(const container *c, char *out, size_t n);

/* Row `row` of a TENSOR_GPTQ or TENSOR_AWQ matrix as F32, (ne[0]). */
void tensor_groups_to_f32(const tensor *t, uint64_t row, float *dst);
/* n weights, whole blocks of such a type, to F32 as the type's definition has it. */
void tensor_blocks_to_f32(uint32_t type, const uint8_t *src, uint64_t n, float *dst);

/* ---- Building (importers, quantizer) ----------------------------------- */

/* Adds or replaces. Strings and arrays are copied into the container's arena. */
hepta_status container_set_u32(container *c, const char *key, uint32_t v, hepta_error *err);
hepta_status container_set_u64(container *c, const char *key, uint64_t v, hepta_error *err);
hepta_status container_set_f32(container *c, const char *key, float v, hepta_error *err);
hepta_status container_set_bool(container *c, const char *key, bool v, hepta_error *err);
hepta_status container_set_string(container *c, const char *key, const char *s, size_t n,
                                  hepta_error *err);
/* `items`: little-endian scalars of the type, or kv_string[n]. */
hepta_status container_set_array(container *c, const char *key, kv_type item_type,
                                 const void *items, uint64_t n, hepta_error *err);
void container_remove(container *c, const char *key);
/* Copies the name; data and file stay the caller's and must outlive the container. */
hepta_status container_add_tensor(container *c, const tensor *t, hepta_error *err);

/* ---- Writing GGUF and .hepta ------------------------------------------- */

/*
 * Streams a .hepta file: the header is laid out from the tensor list at the start (names, types,
 * shapes known; data not yet), then the tensors' bytes are appended in order, then the checksums
 * are patched into the header and the file is committed.
 *
 * The writer adds hepta.version, hepta.tensor.*, hepta.file.sha256 and general.alignment itself
 * and leaves out such keys, and split.*, among `kvs`, where hepta.recipe (string), hepta.bits
 * (f32) and hepta.rotation.seed (u64) must stand. Nothing is kept of `kvs` and `tensors`.
 */
typedef struct hepta_writer hepta_writer;
hepta_status hepta_writer_open(const char *path, const kv *kvs, size_t n_kvs, const tensor *tensors,
                               size_t n_tensors, hepta_writer **out, hepta_error *err);
/* The same for a plain GGUF file: no TENSOR_PACKED, no hepta.* keys, no checksums. */
hepta_status gguf_writer_open(const char *path, const kv *kvs, size_t n_kvs, const tensor *tensors,
                              size_t n_tensors, hepta_writer **out, hepta_error *err);
/*
 * The same, in the file PATH.part, which outlives the process: if it is there, the first *n_done
 * tensors are in it (their checksums were verified), and writing goes on with the next. `identity`:
 * a digest of all that decides the tensors' bytes and is not in the header; a file with another
 * identity or header is an error and left alone. The finished file is the same either way.
 */
hepta_status hepta_writer_resume(const char *path, const uint8_t identity[32], const kv *kvs,
                                 size_t n_kvs, const tensor *tensors, size_t n_tensors,
                                 hepta_writer **out, size_t *n_done, hepta_error *err);
void hepta_writer_keep(hepta_writer *w); /* frees w, leaves PATH.part; w may be NULL */
/*
 * Appends n bytes of the tensor at hand; tensors follow each other as listed, and a call does
 * not reach from one into the next. After an error only hepta_writer_discard makes sense.
 */
hepta_status hepta_writer_write(hepta_writer *w, const void *data, size_t n, hepta_error *err);
hepta_status hepta_writer_commit(hepta_writer *w, hepta_error *err); /* frees w in any case */
void hepta_writer_discard(hepta_writer *w);                          /* w may be NULL */

/*
 * Checks a whole file: structure, value ranges (finite scales, norms), padding, every checksum.
 * The first damage found is the error: tensor name and file offset. `progress` may be NULL.
 */
hepta_status container_verify(const container *c, hepta_progress_fn progress, void *context,
                              hepta_error *err);

#endif
