/*
 * llama.h - a LLaMA-family model in memory, and what a session keeps between tokens.
 *
 * A model is a view of its container: matrices stay where the file is mapped; only norm vectors
 * and the rotations' tables are copied. A session owns one block of memory that holds the KV
 * cache and all buffers of a forward pass.
 *
 * docs/MODEL.md maps the equations to the functions; docs/NUMERICS.md gives the exact order of
 * every operation.
 */
#ifndef MODEL_LLAMA_H
#define MODEL_LLAMA_H

#include "format/container.h"
#include "gpu/gpu.h"
#include "kernels/kernels.h"
#include "model/team.h"

/* A matrix W (n_rows, n_cols): y = W x. */
typedef struct matrix {
    const tensor *source;
    uint32_t type; /* tensor_type */
    uint32_t n_rows, n_cols;
    packed_matrix packed; /* TENSOR_PACKED: the rows are rotated by `rotation` */
    const rotation *rotation;
} matrix;

typedef struct llama_layer {
    const float *attn_norm; /* (n_embd) */
    matrix wq;              /* (n_head * head_dim, n_embd) */
    matrix wk, wv;          /* (n_head_kv * head_dim, n_embd) */
    matrix wo;              /* (n_embd, n_head * head_dim) */
    const float *ffn_norm;  /* (n_embd) */
    matrix gate, up;        /* (n_ff, n_embd) */
    matrix down;            /* (n_embd, n_ff) */
} llama_layer;

enum { LLAMA_MAX_ROTATIONS = 3 }; /* widths n_embd, n_head * head_dim, n_ff */

struct hepta_model {
    container *file;
    const kernels *kernels;
    hepta_model_info info;
    float norm_eps;
    bool rope_interleaved;    /* pairs (2i, 2i+1), else (i, i + n_rot/2) */
    uint32_t n_rot;           /* leading items of a head that RoPE turns */
    double *rope_frequency;   /* (n_rot / 2) radians per position */
    matrix embedding;         /* (n_vocab, n_embd) */
    llama_layer *layers;      /* (n_layer) */
    const float *output_norm; /* (n_embd) */
    matrix head;              /* (n_vocab, n_embd), the embedding if tied */
    rotation *rotations[LLAMA_MAX_ROTATIONS];
    size_t n_rotations;
    const gpu_backend *gpu; /* NULL: the CPU computes everything */
    gpu_model *gpu_model;
    int gpu_number;
    uint32_t gpu_layers;   /* the first layers, on the GPU */
    uint32_t gpu_resident; /* of these, the first that stay there; the others are streamed */
    char device[256];      /* hepta_model_device() */
    arena memory;
};

/* The inputs of a layer's linear layers, and the head's. */
typedef enum llama_input {
    LLAMA_ATTN_IN,  /* of attn_q, attn_k, attn_v */
    LLAMA_ATTN_OUT, /* of attn_output */
    LLAMA_FFN_IN,   /* of ffn_gate, ffn_up */
    LLAMA_FFN_OUT,  /* of ffn_down */
    LLAMA_HEAD_IN,  /* of output, or the embedding if tied; layer is n_layer */
    LLAMA_INPUTS
} llama_input;

/* What looks into a pass: each function may be NULL. n: the chunk's tokens. */
typedef struct llama_observer {
    /* x (n, width): an input of a layer's linear layers */
    void (*input)(void *context, uint32_t layer, llama_input input, const float *x, uint32_t n);
    /* y (n, n_rows) = a x, which may be changed; x (n, n_cols) is NULL where a is looked up */
    void (*output)(void *context, const matrix *a, const float *x, float *y, uint32_t n);
    void *context;
} llama_observer;

/*
 * The buffers of a session. T = n_batch tokens (0 for those that a GPU has, if it has all layers);
 * a row of a buffer is one token's vector, one after the other. `heads` = n_head * head_dim,
 * `heads_kv` = n_head_kv * head_dim.
 */
struct hepta_session {
    const hepta_model *model;
    uint32_t n_sequences, n_ctx, n_batch;
    team *team;
    hepta_cache_type cache_type;
    bool one_layer;   /* the layers share a cache: for llama_observe() */
    gpu_session *gpu; /* caches and buffers of the layers that are on a GPU; NULL: none are */
    void *memory;     /* everything below */
    size_t memory_bytes;

    uint32_t *positions;        /* (n_sequences) tokens in the cache */
    gpu_token *chunk;           /* (T) the tokens that a pass computes */
    uint32_t *tiles;            /* (T + 1) first tokens of the runs that share reads of the cache */
    kv_cache *caches;           /* (the CPU's layers, n_sequences, n_head_kv) */
    void *k_cache, *v_cache;    /* what they hold */
    float *cache_scales;        /* Q8: their scales */
    float *x;                   /* (T, n_embd) residual stream */
    float *h;                   /* (T, n_embd) normalised input, or a sublayer's output */
    float *q;                   /* (T, heads) */
    float *k, *v;               /* (T, heads_kv) */
    float *attention;           /* (T, heads) */
    float *gate, *up;           /* (T, n_ff) */
    float *rope_cos, *rope_sin; /* (T, n_rot / 2) */
    int8_t *quantized;          /* (T, width) rotated inputs of packed matrices; NULL: none */
    activation *activations;    /* (T) */
    rotation *head_rotation;    /* Q8: of queries and keys; NULL: none */
    uint8_t *scratch;           /* (threads, scratch_bytes) */
    size_t scratch_bytes;       /* per thread */
    uint32_t width;             /* of the widest input, padded to 16 */
    const llama_observer *observer; /* NULL but in llama_observe() */
};

/*
 * forward.c: computes the n <= n_batch tokens of s->chunk and stores their keys and values; logits
 * (n_logits, n_vocab) of the last n_logits of them. Of one sequence, a token's positions before
 * it are in the cache or in the chunk. The caller has checked ids and room: only a GPU can fail,
 * HEPTA_ERROR_DEVICE.
 */
hepta_status llama_forward(hepta_session *s, uint32_t n, uint32_t n_logits, float *logits,
                           hepta_error *err);

/* hepta_session_create(), with a cache that holds one layer alone if `one_layer`. */
hepta_status llama_session_create(const hepta_model *model, const hepta_session_options *options,
                                  bool one_layer, hepta_session **out, hepta_error *err);

/*
 * The same of an unquantized model with an observer. All tokens pass through all layers; their
 * logits (n, n_vocab), or none if `logits` is NULL.
 */
void llama_observe(hepta_session *s, uint32_t n, float *logits, const llama_observer *observer);

/* The widest input of a matrix, padded to 16, and the bytes of scratch memory a thread needs. */
uint32_t llama_width(const hepta_model *model);
size_t llama_scratch_bytes(const hepta_model *model);

#endif
