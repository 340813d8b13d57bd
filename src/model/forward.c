/*
 * forward.c - the transformer: from token ids to logits, for a chunk of tokens.
 *
 * The threads of a session run the functions below together: team_next shares a loop's items
 * among them, and between two barriers each loop has a slot of its own. Which thread computes
 * which item has no influence on the item, and every token of a chunk depends on itself and the
 * cache alone; so the logits do not depend on threads, chunks or schedules.
 *
 * docs/MODEL.md sets the equations beside these functions.
 */
#include "kernels/math.h"
#include "model/llama.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

/* What one thread knows during a forward pass. */
typedef struct worker {
    hepta_session *s;
    const hepta_model *m;
    const kernels *k;
    uint32_t n;    /* tokens of the chunk */
    void *scratch; /* this thread's own */
} worker;

uint32_t llama_width(const hepta_model *model) {
    const hepta_model_info *i = &model->info;
    uint32_t heads = i->n_head * i->head_dim;
    uint32_t width = i->n_embd > heads ? i->n_embd : heads;
    width = width > i->n_ff ? width : i->n_ff;
    return (uint32_t)round_up(width, 16);
}

/* Enough for pack_input (2 * width floats), embed_token (2 * width floats and
 * KERNELS_SCRATCH_BYTES) and the rest, which use less. */
size_t llama_scratch_bytes(const hepta_model *model) {
    uint32_t width = llama_width(model);
    size_t vectors = (size_t)width * 2 * sizeof(float) + KERNELS_SCRATCH_BYTES(width);
    size_t head = (KERNELS_ATTENTION_BLOCK + (size_t)2 * model->info.head_dim) * sizeof(float);
    return (size_t)round_up(vectors > head ? vectors : head, 64);
}

static bool next(const worker *w, int slot, size_t n, size_t *item) {
    return team_next(w->s->team, slot, n, item);
}

static void barrier(const worker *w) {
    team_barrier(w->s->team);
}

/* ---- Linear layers ----------------------------------------------------- */

/* Rotates and quantizes token t's input x for packed matrices of this width. */
static void pack_input(const worker *w, size_t t, const float *x, const rotation *r) {
    hepta_session *s = w->s;
    float *rotated = w->scratch;
    int8_t *q = s->quantized + t * s->width;
    memcpy(rotated, x, r->n * sizeof *x);
    w->k->rotate(r, rotated, rotated + s->width);
    activation *a = &s->activations[t];
    a->q = q;
    w->k->quantize_activation(rotated, r->n_padded, q, &a->scale, &a->sum);
}

/* Rows [begin, end) of y = W x for tokens [first, first + n); y holds their vectors. */
static void matmul_rows(const worker *w, const matrix *a, uint32_t begin, uint32_t end,
                        const float *x, uint32_t first, uint32_t n, float *y) {
    if (a->type == TENSOR_PACKED) {
        w->k->matmul_packed(&a->packed, begin, end, w->s->activations + first, n, y, a->n_rows,
                            w->scratch);
        return;
    }
    x += (size_t)first * a->n_cols;
    const uint8_t *rows = a->source->data + begin * a->row_bytes;
    if (a->type == TENSOR_F32) {
        w->k->matmul_f32((const float *)(const void *)rows, end - begin, a->n_cols, x, a->n_cols, n,
                         y + begin, a->n_rows);
        return;
    }
    float *row = w->scratch;
    for (uint32_t r = begin; r < end; r++, rows += a->row_bytes) {
        w->k->row_to_f32(a->type, rows, a->n_cols, row);
        w->k->matmul_f32(row, 1, a->n_cols, x, a->n_cols, n, y + r, a->n_rows);
    }
}

/* Rows that a thread takes at once: some eight steps per thread, in whole groups of 16. */
static uint32_t rows_per_step(const worker *w, uint32_t n_rows) {
    uint32_t threads = (uint32_t)team_size(w->s->team);
    uint32_t rows = (uint32_t)round_up(n_rows / (8 * threads) + 1, 16);
    return threads == 1 ? n_rows : rows < 32 ? 32 : rows;
}

/*
 * y (n, n_rows) = A x for tokens [first, first + n); complete after the next barrier. A float
 * matrix reads x (n_cols items per token), a packed one the activations that pack_input made.
 */
static void matmul(const worker *w, int slot, const matrix *a, const float *x, uint32_t first,
                   uint32_t n, float *y) {
    const uint32_t step = rows_per_step(w, a->n_rows);
    for (size_t i; next(w, slot, (a->n_rows + (size_t)step - 1) / step, &i);) {
        uint32_t begin = (uint32_t)i * step;
        uint32_t end = a->n_rows - begin < step ? a->n_rows : begin + step;
        matmul_rows(w, a, begin, end, x, first, n, y);
    }
}

/* The rotation that the packed ones among these matrices want; NULL if none is packed. */
static const rotation *rotation_of(const matrix *a, const matrix *b, const matrix *c) {
    return a->rotation != NULL ? a->rotation : b->rotation != NULL ? b->rotation : c->rotation;
}

/* ---- Embedding and norms ----------------------------------------------- */

/* x = row `token` of the embedding matrix */
static void embed_token(const worker *w, int32_t token, float *x) {
    const matrix *a = &w->m->embedding;
    if (a->type != TENSOR_PACKED) {
        w->k->row_to_f32(a->type, a->source->data + (size_t)token * a->row_bytes, a->n_cols, x);
        return;
    }
    float *rotated = w->scratch, *more = rotated + w->s->width;
    w->k->unpack_row(&a->packed, (uint32_t)token, rotated, (uint8_t *)more);
    w->k->rotate_inverse(a->rotation, rotated, more);
    memcpy(x, rotated, a->n_cols * sizeof *x);
}

/* x = embeddings; the cosines and sines of RoPE for the tokens' positions */
static void start_chunk(const worker *w, const int32_t *tokens) {
    hepta_session *s = w->s;
    const uint32_t half = w->m->n_rot / 2;
    for (size_t t; next(w, 0, w->n, &t);) {
        embed_token(w, tokens[t], s->x + t * w->m->info.n_embd);
        for (uint32_t i = 0; i < half; i++) {
            double sine, cosine, position = (double)(s->position + t);
            math_sin_cos_f64(position * w->m->rope_frequency[i], &sine, &cosine);
            s->rope_sin[t * half + i] = (float)sine;
            s->rope_cos[t * half + i] = (float)cosine;
        }
    }
    barrier(w);
}

/* For tokens from `first` on: x += h if `add`; h = rmsnorm(x) * gain, packed too for `r`. */
static void norm_input(const worker *w, uint32_t first, bool add, const float *gain,
                       const rotation *r) {
    const uint32_t n_embd = w->m->info.n_embd;
    for (size_t i; next(w, 0, w->n - first, &i);) {
        size_t t = first + i;
        float *x = w->s->x + t * n_embd, *h = w->s->h + t * n_embd;
        if (add) {
            w->k->add(x, h, n_embd);
        }
        w->k->rmsnorm(x, gain, n_embd, w->m->norm_eps, h);
        if (r != NULL) {
            pack_input(w, t, h, r);
        }
    }
    barrier(w);
}

/* ---- Attention --------------------------------------------------------- */

/* Items of the cache before position 0 of a layer's KV head. */
static size_t cache_offset(const worker *w, uint32_t layer, uint32_t head) {
    const hepta_model_info *i = &w->m->info;
    return ((size_t)layer * i->n_head_kv + head) * w->s->n_ctx * i->head_dim;
}

static void cache_store(const worker *w, void *cache, size_t offset, const float *x) {
    const uint32_t n = w->m->info.head_dim;
    if (w->s->cache_type == HEPTA_CACHE_F32) {
        memcpy((float *)cache + offset, x, n * sizeof *x);
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        ((uint16_t *)cache)[offset + i] = half_from_float(x[i]);
    }
}

/* RoPE turns q and k; k and v go to the cache. */
static void rope_and_store(const worker *w, uint32_t layer) {
    hepta_session *s = w->s;
    const hepta_model *m = w->m;
    const hepta_model_info *i = &m->info;
    const uint32_t dim = i->head_dim, half = m->n_rot / 2;
    for (size_t t; next(w, 0, w->n, &t);) {
        const float *cosine = s->rope_cos + t * half, *sine = s->rope_sin + t * half;
        float *q = s->q + t * i->n_head * dim;
        for (uint32_t head = 0; head < i->n_head; head++) {
            w->k->rope(q + (size_t)head * dim, m->n_rot, m->rope_interleaved, cosine, sine);
        }
        for (uint32_t head = 0; head < i->n_head_kv; head++) {
            float *k = s->k + (t * i->n_head_kv + head) * dim;
            float *v = s->v + (t * i->n_head_kv + head) * dim;
            size_t offset = cache_offset(w, layer, head) + (s->position + t) * dim;
            w->k->rope(k, m->n_rot, m->rope_interleaved, cosine, sine);
            cache_store(w, s->k_cache, offset, k);
            cache_store(w, s->v_cache, offset, v);
        }
    }
    barrier(w);
}

/* Each head of each token attends to its own and all earlier positions. */
static void attend(const worker *w, uint32_t layer) {
    hepta_session *s = w->s;
    const hepta_model_info *i = &w->m->info;
    const uint32_t dim = i->head_dim, group = i->n_head / i->n_head_kv;
    const bool f16 = s->cache_type == HEPTA_CACHE_F16;
    const size_t item = f16 ? sizeof(uint16_t) : sizeof(float);
    const float scale = 1.0f / sqrtf((float)dim);
    for (size_t pair; next(w, 0, (size_t)w->n * i->n_head, &pair);) {
        uint32_t t = (uint32_t)(pair / i->n_head), head = (uint32_t)(pair % i->n_head);
        size_t offset = cache_offset(w, layer, head / group) * item;
        w->k->attention(s->q + pair * dim, (const uint8_t *)s->k_cache + offset,
                        (const uint8_t *)s->v_cache + offset, dim, f16, s->position + t + 1, dim,
                        scale, s->attention + pair * dim, w->scratch);
    }
    barrier(w);
}

/* Packs the attention's output for the output matrix, if that is packed. */
static void pack_attention(const worker *w, const rotation *r) {
    if (r == NULL) {
        return;
    }
    for (size_t t; next(w, 0, w->n, &t);) {
        pack_input(w, t, w->s->attention + t * r->n, r);
    }
    barrier(w);
}

/* ---- Feed-forward ------------------------------------------------------ */

/* gate = silu(gate) * up, packed too for `r` */
static void activate(const worker *w, const rotation *r) {
    const uint32_t n_ff = w->m->info.n_ff;
    for (size_t t; next(w, 0, w->n, &t);) {
        float *gate = w->s->gate + t * n_ff;
        w->k->swiglu(gate, w->s->up + t * n_ff, n_ff);
        if (r != NULL) {
            pack_input(w, t, gate, r);
        }
    }
    barrier(w);
}

/* ---- The whole --------------------------------------------------------- */

/*
 * One transformer block on the residual stream s->x. On entry s->h is the output of the block
 * before, not yet added; on return it is this block's.
 */
static void layer_forward(const worker *w, uint32_t layer) {
    hepta_session *s = w->s;
    const llama_layer *l = &w->m->layers[layer];
    norm_input(w, 0, layer > 0, l->attn_norm, rotation_of(&l->wq, &l->wk, &l->wv));
    matmul(w, 0, &l->wq, s->h, 0, w->n, s->q);
    matmul(w, 1, &l->wk, s->h, 0, w->n, s->k);
    matmul(w, 2, &l->wv, s->h, 0, w->n, s->v);
    barrier(w);
    rope_and_store(w, layer);
    attend(w, layer);
    pack_attention(w, l->wo.rotation);
    matmul(w, 0, &l->wo, s->attention, 0, w->n, s->h);
    barrier(w);
    norm_input(w, 0, true, l->ffn_norm, rotation_of(&l->gate, &l->up, &l->up));
    matmul(w, 0, &l->gate, s->h, 0, w->n, s->gate);
    matmul(w, 1, &l->up, s->h, 0, w->n, s->up);
    barrier(w);
    activate(w, l->down.rotation);
    matmul(w, 0, &l->down, s->gate, 0, w->n, s->h);
    barrier(w);
}

/* Logits of the tokens from `first` on. NaN, which only overflow can bring, gets one form. */
static void head_forward(const worker *w, uint32_t first, float *logits) {
    const uint32_t n = w->n - first, n_vocab = w->m->info.n_vocab;
    norm_input(w, first, true, w->m->output_norm, w->m->head.rotation);
    matmul(w, 0, &w->m->head, w->s->h, first, n, logits);
    barrier(w);
    for (size_t t; next(w, 0, n, &t);) {
        float *row = logits + t * n_vocab;
        for (uint32_t i = 0; i < n_vocab; i++) {
            row[i] = row[i] == row[i] ? row[i] : math_from_bits_f32(MATH_NAN_BITS);
        }
    }
}

typedef struct forward_call {
    hepta_session *s;
    const int32_t *tokens;
    uint32_t n, n_logits;
    float *logits;
} forward_call;

static void forward_thread(void *context, int thread) {
    const forward_call *call = context;
    hepta_session *s = call->s;
    const worker w = {s, s->model, s->model->kernels, call->n,
                      s->scratch + (size_t)thread * s->scratch_bytes};
    /* The caller may have changed the rounding mode or set flush-to-zero (libraries built with
     * -ffast-math do so when they are loaded): compute in the default environment. */
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    start_chunk(&w, call->tokens);
    for (uint32_t layer = 0; layer < s->model->info.n_layer; layer++) {
        layer_forward(&w, layer);
    }
    if (call->n_logits > 0) {
        head_forward(&w, call->n - call->n_logits, call->logits);
    }
    fesetenv(&environment);
}

void llama_forward(hepta_session *s, const int32_t *tokens, uint32_t n, float *logits,
                   uint32_t n_logits) {
    forward_call call = {s, tokens, n, n_logits, logits};
    team_run(s->team, forward_thread, &call);
}
