/*
 * gpu.h - the device interface: what a backend for GPUs does for a session.
 *
 * A backend is a shared object of its own (libhepta-cuda.so, ...), so that one program works with
 * and without a GPU: gpu.c looks for it at run time, model/device.c puts a model's first layers on
 * its device, and model/session.c asks it for those layers of every chunk. Its results have the
 * bits of kernels/ref.c (docs/NUMERICS.md); docs/GPU.md describes how.
 *
 * This header is C and C++. A backend calls nothing of libhepta; it reads the structures of
 * kernels.h and code.h.
 */
#ifndef GPU_GPU_H
#define GPU_GPU_H

#include "code/code.h"
#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    GPU_INTERFACE = 2,      /* of this header: a backend with another number is not used */
    GPU_MAX_HEAD_DIM = 256, /* items of a head */
    GPU_N_RATES = CODE_MAX_RATE - CODE_MIN_RATE + 1
};

typedef struct gpu_device_info {
    char name[128];
    uint64_t memory, memory_free; /* bytes */
    uint32_t shared_bytes;        /* shared memory a block may have */
    int processors;
    bool overlaps; /* a kernel may begin before the one before has ended */
} gpu_device_info;

typedef struct gpu_layer {
    const float *attn_norm, *ffn_norm; /* (n_embd) */
    packed_matrix wq, wk, wv, wo, gate, up, down;
} gpu_layer;

/* A model in host memory, all of whose matrices are packed. Read while the model is loaded only. */
typedef struct gpu_model_source {
    uint32_t n_vocab, n_embd, n_head, n_head_kv, head_dim, n_ff;
    uint32_t n_layer;    /* layers for the device: the model's first ones */
    uint32_t n_resident; /* of them in the device's memory; the others stay in host memory and are
                            copied, two at a time, whenever they are needed */
    bool whole;          /* the model's last layer is among them: then the head is too */
    float norm_eps;
    bool rope_interleaved;
    uint32_t n_rot;
    const double *rope_frequency; /* (n_rot / 2) */
    packed_matrix embedding, head;
    const float *output_norm;                    /* (n_embd) */
    const gpu_layer *layers;                     /* (n_layer) */
    const rotation *of_embd, *of_heads, *of_ff;  /* of the inputs of n_embd, n_head * head_dim,
                                                    n_ff items */
    const struct code_table *codes[GPU_N_RATES]; /* from CODE_MIN_RATE on */
} gpu_model_source;

typedef struct gpu_session_options {
    uint32_t n_ctx, n_batch, n_sequences;
    hepta_cache_type cache_type;
    const rotation *of_head; /* of queries and keys of a Q8 cache; else NULL */
} gpu_session_options;

/* A token of the chunk that a pass computes. */
typedef struct gpu_token {
    int32_t id;
    uint32_t sequence, position;
} gpu_token;

typedef struct gpu_model gpu_model;
typedef struct gpu_session gpu_session;

/* One kernel each, from and to host memory, for tests: as the functions of `kernels`. */
typedef enum gpu_prepare_mode {
    GPU_PREPARE_PLAIN,
    GPU_PREPARE_NORM,
    GPU_PREPARE_SWIGLU
} gpu_prepare_mode;
typedef struct gpu_prepare_case {
    gpu_prepare_mode mode;
    float *x;          /* (n): PLAIN the input; NORM: x += y if y is given; SWIGLU: gate */
    const float *y;    /* (n): NORM: added to x, may be NULL; SWIGLU: up */
    const float *gain; /* (n): NORM */
    float eps;
    const rotation *r;
    int8_t *q; /* (n_padded) */
    float scale;
    int32_t sum;
} gpu_prepare_case;
typedef struct gpu_attention_case {
    hepta_cache_type type;
    uint32_t n_head, n_head_kv, head_dim, n_pos, n_tokens;
    bool interleaved;
    uint32_t n_rot;
    const rotation *r;          /* Q8: may be NULL */
    const float *cosine, *sine; /* (n_pos, n_rot / 2) */
    const float *k, *v;         /* (n_pos, n_head_kv, head_dim) */
    const float *q;             /* (n_tokens, n_head, head_dim) */
    const uint32_t *positions;  /* (n_tokens): of the queries, below n_pos */
    bool split;                 /* each block of positions in a block of threads of its own */
    float *out;                 /* (n_tokens, n_head, head_dim) */
} gpu_attention_case;
/* A step whose time is taken, in a chain of the same: over memory that caches do not hold. */
typedef enum gpu_timed { GPU_TIMED_PRODUCT, GPU_TIMED_PREPARE, GPU_TIMED_ATTENTION } gpu_timed;
typedef struct gpu_timing {
    gpu_timed what;
    uint32_t n_tokens;
    uint32_t half_bits, n_rows, n_cols;          /* PRODUCT */
    gpu_prepare_mode mode;                       /* PREPARE */
    const rotation *r;                           /* PREPARE */
    uint32_t n_head, n_head_kv, head_dim, n_pos; /* ATTENTION: F16, up to position n_pos - 1 */
} gpu_timing;
typedef struct gpu_checks {
    hepta_status (*matmul)(const packed_matrix *w, const struct code_table *const *codes,
                           const activation *x, uint32_t n_tokens, float *y, hepta_error *err);
    /* x (r->n): row `row` after the inverse rotation */
    hepta_status (*embed)(const packed_matrix *w, const struct code_table *const *codes,
                          const rotation *r, uint32_t row, float *x, hepta_error *err);
    hepta_status (*angles)(const double *frequency, uint32_t n, uint32_t position, float *cosine,
                           float *sine, hepta_error *err);
    hepta_status (*prepare)(gpu_prepare_case *c, hepta_error *err);
    hepta_status (*attention)(const gpu_attention_case *c, hepta_error *err);
    hepta_status (*time)(const gpu_timing *t, const struct code_table *const *codes,
                         double *seconds, hepta_error *err);
    /* Multiplications and additions of int8 a second that the tensor cores do from registers. */
    hepta_status (*tile_rate)(int number, double *rate, hepta_error *err);
} gpu_checks;

typedef struct gpu_backend {
    uint32_t interface;
    const char *name; /* "cuda", "hip", "emulated" */
    /* HEPTA_ERROR_DEVICE: no driver, too old a driver, no such device. */
    hepta_status (*device_info)(int number, gpu_device_info *out, hepta_error *err);
    /* HEPTA_ERROR_MEMORY, HEPTA_ERROR_UNSUPPORTED (heads larger than GPU_MAX_HEAD_DIM). */
    hepta_status (*model_load)(int number, const gpu_model_source *source, gpu_model **out,
                               hepta_error *err);
    void (*model_free)(gpu_model *m);            /* after its sessions; may be NULL */
    uint64_t (*model_bytes)(const gpu_model *m); /* of the device's memory */
    hepta_status (*session_create)(gpu_model *m, const gpu_session_options *o, gpu_session **out,
                                   hepta_error *err);
    void (*session_free)(gpu_session *s);
    uint64_t (*session_bytes)(const gpu_session *s);
    /*
     * As llama_forward(): n tokens through the device's layers, their keys and values kept. If the
     * model is whole, logits (n_logits, n_vocab) of the last n_logits of them; else x (n, n_embd),
     * the residual stream, and h (n, n_embd), the last layer's output, not yet added to it.
     * HEPTA_ERROR_DEVICE: the device is lost, and the session with it.
     */
    hepta_status (*forward)(gpu_session *s, const gpu_token *tokens, uint32_t n, uint32_t n_logits,
                            float *x, float *h, float *logits, hepta_error *err);
    /* Bytes a second that the device reads, and copies (read and written bytes together). */
    hepta_status (*bandwidth)(int number, double *read, double *copied, hepta_error *err);
    const gpu_checks *checks;
} gpu_backend;

/* The one symbol of a backend. */
#define GPU_BACKEND_SYMBOL "hepta_gpu_backend"
typedef const gpu_backend *(*gpu_backend_fn)(void);

/* ---- gpu.c: finding one ------------------------------------------------- */

/*
 * The backend of this name: lib/hepta-NAME.so... is looked for in $HEPTA_GPU_PATH, beside the
 * program or library, in ../lib, and where the system looks. It stays loaded.
 * HEPTA_ERROR_DEVICE: there is none, or it was built for another version.
 */
hepta_status gpu_backend_load(const char *name, const gpu_backend **out, hepta_error *err);

#ifdef __cplusplus
}
#endif
#endif
