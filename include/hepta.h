/*
 * hepta.h - public C API of Hepta, an inference engine for LLaMA-family models.
 *
 * Objects: a model (weights, mapped read-only), a session (KV caches of one or more
 * sequences, and scratch memory), a tokenizer, a sampler. Models are immutable after
 * opening and may be shared by any number of sessions and threads; a session,
 * sampler or tokenizer belongs to one thread at a time.
 *
 * Results: the logits are a function of the model file and the token ids alone.
 * They do not depend on the instruction set, the number of threads, the way a
 * prompt is cut into calls or the other sequences of a batch (docs/NUMERICS.md).
 *
 * Errors: functions that can fail return a hepta_status; when `err` is not NULL
 * it is filled with a one-line message that says what was expected, what was
 * found and where. A failed call leaves its outputs unchanged.
 */
#ifndef HEPTA_H
#define HEPTA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HEPTA_VERSION_MAJOR 0
#define HEPTA_VERSION_MINOR 1
#define HEPTA_VERSION_PATCH 0

#if defined(__GNUC__)
#define HEPTA_API __attribute__((visibility("default")))
#else
#define HEPTA_API
#endif

/* "0.1.0" */
HEPTA_API const char *hepta_version(void);

/* ---- Errors ------------------------------------------------------------ */

typedef enum hepta_status {
    HEPTA_OK = 0,
    HEPTA_ERROR_ARGUMENT,    /* a value passed by the caller is out of range */
    HEPTA_ERROR_IO,          /* the operating system refused: open, read, write, map */
    HEPTA_ERROR_FORMAT,      /* a file is damaged or not what it says it is */
    HEPTA_ERROR_UNSUPPORTED, /* a valid file or request that this build cannot serve */
    HEPTA_ERROR_MEMORY,      /* allocation failed */
    HEPTA_ERROR_CONTEXT,     /* more tokens than the session's context holds */
    HEPTA_ERROR_INTERRUPTED, /* a callback asked to stop */
    HEPTA_ERROR_DEVICE       /* no GPU, no driver for it, or it is lost */
} hepta_status;

typedef struct hepta_error {
    hepta_status status;
    char message[512]; /* UTF-8, no newline; empty when status is HEPTA_OK */
} hepta_error;

/* "format error", ... for a status */
HEPTA_API const char *hepta_status_name(hepta_status status);

/* ---- Model ------------------------------------------------------------- */

typedef struct hepta_model hepta_model;

typedef struct hepta_model_info {
    char architecture[32]; /* "llama" */
    char name[128];        /* general.name, or "" */
    uint32_t n_vocab;
    uint32_t n_embd; /* width of the residual stream */
    uint32_t n_layer;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_dim;
    uint32_t n_ff;          /* width of the feed-forward layer */
    uint32_t n_ctx_train;   /* context length the model was trained with */
    uint64_t n_weights;     /* weights in all tensors */
    double bits_per_weight; /* payload bits of all tensors / n_weights */
    bool quantized;         /* weights in the packed code (integer linear layers) */
} hepta_model_info;

/*
 * Opens a model of any supported input: a .hepta or GGUF file, a Hugging Face
 * directory, or a llama2.c .bin. Unquantized weights run in F32 arithmetic.
 * The file stays mapped until hepta_model_close.
 */
HEPTA_API hepta_status hepta_model_open(const char *path, hepta_model **out, hepta_error *err);
HEPTA_API void hepta_model_close(hepta_model *model);
/*
 * Reads all weights into memory and keeps them there (mlock) until the model is closed, so that no
 * token waits for a disk. HEPTA_ERROR_MEMORY when the limit on locked memory is too low.
 */
HEPTA_API hepta_status hepta_model_lock(hepta_model *model, hepta_error *err);
HEPTA_API void hepta_model_get_info(const hepta_model *model, hepta_model_info *info);

/* ---- Devices ----------------------------------------------------------- */

typedef struct hepta_device_options {
    const char *device; /* "cpu"; "cuda" or "cuda:1": a GPU; "auto": a GPU if one can take the
                           model, else the CPU */
    uint32_t layers; /* for the GPU, from the first on, the CPU computes the others; 0: what fits */
    double memory;   /* bytes of the GPU's memory for weights; 0: nine tenths of what is free */
    bool stream;     /* layers beyond that memory are copied to the GPU in every pass */
} hepta_device_options;

/*
 * Chooses where sessions that are created afterwards compute; without it that is the CPU. Once for
 * a model, and it must be quantized. The logits do not depend on it. HEPTA_ERROR_DEVICE: there is
 * no such GPU, no driver or too old a one; HEPTA_ERROR_MEMORY. "auto" turns both into the CPU.
 */
HEPTA_API hepta_status hepta_model_use_device(hepta_model *model,
                                              const hepta_device_options *options,
                                              hepta_error *err);
/* What was chosen, with the GPU's name and share, or the reason why "auto" took the CPU. */
HEPTA_API const char *hepta_model_device(const hepta_model *model);

/* ---- Session ----------------------------------------------------------- */

typedef struct hepta_session hepta_session;

/* How keys and values are kept: as computed, rounded to binary16, or as int8 with one scale per
 * vector (attention is then integer arithmetic). */
typedef enum hepta_cache_type {
    HEPTA_CACHE_F32 = 0,
    HEPTA_CACHE_F16,
    HEPTA_CACHE_Q8
} hepta_cache_type;

typedef struct hepta_session_options {
    uint32_t n_ctx;   /* positions held of each sequence; 0: the model's training context */
    uint32_t n_batch; /* tokens processed together; 0: 128, on a GPU 512 */
    int threads;      /* 0: physical cores this process may use */
    hepta_cache_type cache_type;
    uint32_t n_sequences; /* independent sequences, numbered from 0; 0: one */
} hepta_session_options;

/* All memory is allocated here, nothing later. `options` may be NULL. */
HEPTA_API hepta_status hepta_session_create(const hepta_model *model,
                                            const hepta_session_options *options,
                                            hepta_session **out, hepta_error *err);
HEPTA_API void hepta_session_free(hepta_session *session);

/*
 * Appends `n` tokens (n >= 1) to sequence 0 and computes their logits.
 * `logits` is NULL, or receives n_vocab floats for the last token, or, when
 * `all` is true, n * n_vocab floats for every token. HEPTA_ERROR_CONTEXT, with
 * nothing changed, when the context cannot hold them.
 */
HEPTA_API hepta_status hepta_session_eval(hepta_session *session, const int32_t *tokens, size_t n,
                                          float *logits, bool all, hepta_error *err);

typedef struct hepta_batch_token {
    int32_t token;
    uint32_t sequence; /* 0 .. n_sequences - 1 */
    bool logits;       /* compute the logits after this token */
} hepta_batch_token;

/*
 * Appends each of `n` tokens (n >= 1) to its sequence, in the order given: prompts and single
 * steps of any sequences together, so that weights are read once for all. `logits` receives a row
 * of n_vocab floats for every token that wants one, in that order; it may be NULL if none does.
 * Each row has the bits that the sequence would give alone. On an error nothing has changed;
 * HEPTA_ERROR_CONTEXT when a sequence has no room for its tokens.
 */
HEPTA_API hepta_status hepta_session_eval_batch(hepta_session *session,
                                                const hepta_batch_token *tokens, size_t n,
                                                float *logits, hepta_error *err);

/* Forgets every position >= n_keep of a sequence (0 starts afresh). */
HEPTA_API void hepta_session_truncate(hepta_session *session, uint32_t sequence, uint32_t n_keep);
/* Tokens that the sequence holds. */
HEPTA_API uint32_t hepta_session_position(const hepta_session *session, uint32_t sequence);
HEPTA_API uint32_t hepta_session_context(const hepta_session *session);
/* Bytes held, those on a GPU included. */
HEPTA_API size_t hepta_session_memory(const hepta_session *session);

/* ---- Tokenizer --------------------------------------------------------- */

typedef struct hepta_tokenizer hepta_tokenizer;

/*
 * Opens the tokenizer that comes with `model_path` (any model input), or, when
 * `tokenizer_path` is not NULL, that file: tokenizer.json, a SentencePiece
 * .model, a tiktoken rank file, llama2.c's tokenizer.bin, a GGUF, or a
 * directory with vocab.json and merges.txt.
 */
HEPTA_API hepta_status hepta_tokenizer_open(const char *model_path, const char *tokenizer_path,
                                            hepta_tokenizer **out, hepta_error *err);
HEPTA_API void hepta_tokenizer_free(hepta_tokenizer *tokenizer);

enum {
    HEPTA_ENCODE_BOS = 1,    /* put BOS in front if this tokenizer's models expect it */
    HEPTA_ENCODE_SPECIAL = 2 /* read control tokens such as <|eot_id|> in the text as tokens */
};

/*
 * Encodes `n_text` bytes (any bytes, valid UTF-8 or not). On success *n_tokens is the number
 * of tokens; the first `capacity` of them are in `tokens`. Call with capacity 0 to measure.
 */
HEPTA_API hepta_status hepta_tokenizer_encode(const hepta_tokenizer *tokenizer, const char *text,
                                              size_t n_text, unsigned flags, int32_t *tokens,
                                              size_t capacity, size_t *n_tokens, hepta_error *err);

/*
 * The bytes of one token as they stand in running text, up to `capacity` of them in `text`;
 * returns their number. A code point may span several tokens: collect the bytes.
 * `first` is true for the first token of a text (a SentencePiece leading space is dropped).
 * Control tokens have no bytes unless `special` is true.
 */
HEPTA_API size_t hepta_tokenizer_decode(const hepta_tokenizer *tokenizer, int32_t token, bool first,
                                        bool special, char *text, size_t capacity);

HEPTA_API uint32_t hepta_tokenizer_size(const hepta_tokenizer *tokenizer);
HEPTA_API int32_t hepta_tokenizer_bos(const hepta_tokenizer *tokenizer); /* -1: none */
/* True for tokens that end a text: EOS, <|eot_id|>, ... */
HEPTA_API bool hepta_tokenizer_is_end(const hepta_tokenizer *tokenizer, int32_t token);

/* ---- Sampler ----------------------------------------------------------- */

typedef struct hepta_sampler hepta_sampler;

typedef struct hepta_sampler_options {
    float temperature; /* 0: greedy (the highest logit, ties to the lowest id) */
    uint32_t top_k;    /* keep the k most likely tokens; 0: all */
    float top_p;       /* keep the smallest set with at least this mass; 1: all */
    float min_p;       /* drop tokens below min_p times the most likely one; 0: none */
    uint64_t seed;
} hepta_sampler_options;

/* The same logits, options and number of earlier draws give the same token everywhere. */
HEPTA_API hepta_status hepta_sampler_create(const hepta_sampler_options *options, uint32_t n_vocab,
                                            hepta_sampler **out, hepta_error *err);
HEPTA_API void hepta_sampler_free(hepta_sampler *sampler);
HEPTA_API int32_t hepta_sampler_draw(hepta_sampler *sampler, const float *logits);

/* ---- Quantizer --------------------------------------------------------- */

/* Called now and then with work done so far; return false to stop (HEPTA_ERROR_INTERRUPTED). */
typedef bool (*hepta_progress_fn)(void *context, const char *what, uint64_t done, uint64_t total);

/* Time against quality: docs/QUALITY.md has figures. */
typedef enum hepta_effort {
    HEPTA_EFFORT_GOOD = 0,
    HEPTA_EFFORT_FAST,
    HEPTA_EFFORT_BEST
} hepta_effort;

/* Parts of the quantizer, to measure what each is worth. */
enum {
    HEPTA_WITHOUT_FEEDBACK = 1, /* each row is rounded for itself, by a full search */
    HEPTA_WITHOUT_SCALES = 2,   /* row scales stay as for the code alone */
    HEPTA_WITHOUT_PLAN = 4      /* bits by the kind of a matrix, nothing is measured */
};

typedef struct hepta_quantize_options {
    double bits;                /* 2 to 8: an upper limit for the whole file */
    int threads;                /* 0: as for sessions; the result does not depend on it */
    const char *tokenizer_path; /* NULL: the tokenizer that comes with the model */
    hepta_effort effort;
    unsigned without;             /* 0, or HEPTA_WITHOUT_... added up */
    const char *calibration_path; /* a text like those the model will see; NULL: a built-in one */
    const char *plan_path;        /* bits per tensor from this file, not `bits`; may be NULL */
    const char *plan_out_path;    /* write the plan here; may be NULL */
    hepta_progress_fn progress;   /* may be NULL */
    void *progress_context;
} hepta_quantize_options;

/*
 * Quantizes any supported input into one .hepta file. The file appears under its name only
 * when it is complete. What is done when the process is killed, interrupted by `progress` or the
 * disk is full stays in OUT_PATH.part, and the same call goes on there; a .part file of another
 * model or other options is an error. The same input and options give the same bytes on every
 * machine, in one go or in several.
 */
HEPTA_API hepta_status hepta_quantize(const char *in_path, const char *out_path,
                                      const hepta_quantize_options *options, hepta_error *err);

#ifdef __cplusplus
}
#endif
#endif
