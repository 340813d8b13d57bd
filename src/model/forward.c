/*
 * forward.c - the transformer: from token ids to logits, for a chunk of tokens.
 *
 * The threads of a session run llama_forward's team functions together: each loop marked
 * `omp for` is shared among them and ends with a barrier unless it says `nowait`. Which thread
 * computes which item has no influence on the item, and every item of a chunk depends on its
 * own token and the cache alone; so the logits do not depend on threads, chunks or schedules.
 *
 * docs/MODEL.md sets the equations beside these functions.
 */
#include "kernels/math.h"
#include "model/llama.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

uint32_t llama_width(const hepta_model *model) {
    const hepta_model_info *i = &model->info;
    uint32_t heads = i->n_head * i->head_dim;
    uint32_t width = i->n_embd > heads ? i->n_embd : heads;
    width = width > i->n_ff ? width : i->n_ff;
    return (uint32_t)round_up(width, 16);
}

/* pack_input and embed_token use 3 * width floats, matmul the first 4 * width bytes. */
size_t llama_scratch_bytes(const hepta_model *model) {
    size_t vectors = (size_t)3 * llama_width(model);
    size_t heads = KERNELS_ATTENTION_BLOCK + (size_t)2 * model->info.head_dim;
    return (size_t)round_up((vectors > heads ? vectors : heads) * sizeof(float), 64);
}

static void *thread_scratch(const hepta_session *s) {
#ifdef _OPENMP
    return s->scratch + (size_t)omp_get_thread_num() * s->scratch_bytes;
#else
    return s->scratch;
#endif
}

/* ---- Linear layers ----------------------------------------------------- */

/* Rotates and quantizes token t's input x for packed matrices of this width. */
static void pack_input(hepta_session *s, uint32_t t, const float *x, const rotation *r) {
    const kernels *k = s->model->kernels;
    float *rotated = thread_scratch(s);
    int8_t *q = s->quantized + (size_t)t * s->width;
    memcpy(rotated, x, r->n * sizeof *x);
    k->rotate(r, rotated, rotated + s->width);
    activation *a = &s->activations[t];
    a->q = q;
    k->quantize_activation(rotated, r->n_padded, q, &a->scale, &a->sum);
}

/* Rows that a thread takes at once: some eight steps per thread, in whole strips. */
static uint32_t rows_per_step(const hepta_session *s, uint32_t n_rows) {
    if (s->threads == 1) {
        return n_rows;
    }
    uint32_t rows = (uint32_t)round_up(n_rows / (8 * (uint32_t)s->threads) + 1, 16);
    return rows < 32 ? 32 : rows;
}

/* Rows [begin, end) of y = W x for tokens [first, first + n); y holds their columns. */
static void matmul_rows(hepta_session *s, const matrix *w, uint32_t begin, uint32_t end,
                        const float *x, uint32_t first, uint32_t n, float *y, size_t y_stride) {
    const kernels *k = s->model->kernels;
    if (w->type == TENSOR_PACKED) {
        k->matmul_packed(&w->packed, begin, end, s->activations + first, n, y, y_stride,
                         thread_scratch(s));
        return;
    }
    x += (size_t)first * w->n_cols;
    const uint8_t *rows = w->source->data + begin * w->row_bytes;
    if (w->type == TENSOR_F32) {
        k->matmul_f32((const float *)(const void *)rows, end - begin, w->n_cols, x, w->n_cols, n,
                      y + begin, y_stride);
        return;
    }
    float *row = thread_scratch(s);
    for (uint32_t r = begin; r < end; r++, rows += w->row_bytes) {
        k->row_to_f32(w->type, rows, w->n_cols, row);
        k->matmul_f32(row, 1, w->n_cols, x, w->n_cols, n, y + r, y_stride);
    }
}

/* y = W x for n tokens; the caller's next barrier completes it. x (n, n_cols) serves float
 * matrices; packed ones read the session's activations, made from x by pack_input. */
static void matmul(hepta_session *s, const matrix *w, const float *x, uint32_t first, uint32_t n,
                   float *y) {
    const uint32_t step = rows_per_step(s, w->n_rows);
    const uint32_t n_steps = (w->n_rows + step - 1) / step;
#pragma omp for schedule(dynamic) nowait
    for (uint32_t i = 0; i < n_steps; i++) {
        uint32_t begin = i * step;
        uint32_t end = w->n_rows - begin < step ? w->n_rows : begin + step;
        matmul_rows(s, w, begin, end, x, first, n, y, w->n_rows);
    }
}

/* The rotation that the packed ones among these matrices want; NULL if none is packed. */
static const rotation *rotation_of(const matrix *a, const matrix *b, const matrix *c) {
    return a->rotation != NULL ? a->rotation : b->rotation != NULL ? b->rotation : c->rotation;
}

/* ---- Sublayers --------------------------------------------------------- */

/* x = row `token` of the embedding matrix */
static void embed_token(hepta_session *s, int32_t token, float *x) {
    const kernels *k = s->model->kernels;
    const matrix *w = &s->model->embedding;
    if (w->type != TENSOR_PACKED) {
        k->row_to_f32(w->type, w->source->data + (size_t)token * w->row_bytes, w->n_cols, x);
        return;
    }
    float *rotated = thread_scratch(s);
    k->unpack_row(&w->packed, (uint32_t)token, rotated, (uint8_t *)(rotated + s->width));
    k->rotate_inverse(w->rotation, rotated, rotated + s->width);
    memcpy(x, rotated, w->n_cols * sizeof *x);
}

/* x = embeddings; the cosines and sines of RoPE for the tokens' positions */
static void start_chunk(hepta_session *s, const int32_t *tokens, uint32_t n) {
    const hepta_model *m = s->model;
    const uint32_t half = m->n_rot / 2;
#pragma omp for
    for (uint32_t t = 0; t < n; t++) {
        embed_token(s, tokens[t], s->x + (size_t)t * m->info.n_embd);
        for (uint32_t i = 0; i < half; i++) {
            double sine, cosine;
            math_sin_cos_f64((double)(s->position + t) * m->rope_frequency[i], &sine, &cosine);
            s->rope_sin[(size_t)t * half + i] = (float)sine;
            s->rope_cos[(size_t)t * half + i] = (float)cosine;
        }
    }
}

/* x += h if `add`; h = rmsnorm(x) * gain, packed too if a rotation is given */
static void norm_input(hepta_session *s, uint32_t first, uint32_t n, bool add, const float *gain,
                       const rotation *r) {
    const hepta_model *m = s->model;
    const uint32_t n_embd = m->info.n_embd;
#pragma omp for
    for (uint32_t t = first; t < first + n; t++) {
        float *x = s->x + (size_t)t * n_embd, *h = s->h + (size_t)t * n_embd;
        if (add) {
            m->kernels->add(x, h, n_embd);
        }
        m->kernels->rmsnorm(x, gain, n_embd, m->norm_eps, h);
        if (r != NULL) {
            pack_input(s, t, h, r);
        }
    }
}

/* Items of the cache before position 0 of a layer's KV head. */
static size_t cache_offset(const hepta_session *s, uint32_t layer, uint32_t head) {
    const hepta_model_info *i = &s->model->info;
    return ((size_t)layer * i->n_head_kv + head) * s->n_ctx * i->head_dim;
}

static void cache_store(const hepta_session *s, void *cache, size_t offset, const float *x) {
    const uint32_t n = s->model->info.head_dim;
    if (s->cache_type == HEPTA_CACHE_F32) {
        memcpy((float *)cache + offset, x, n * sizeof *x);
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        ((uint16_t *)cache)[offset + i] = half_from_float(x[i]);
    }
}

/* RoPE turns q and k; k and v go to the cache. */
static void rope_and_store(hepta_session *s, uint32_t layer, uint32_t n) {
    const hepta_model *m = s->model;
    const hepta_model_info *i = &m->info;
    const uint32_t dim = i->head_dim, half = m->n_rot / 2;
#pragma omp for
    for (uint32_t t = 0; t < n; t++) {
        const float *cosine = s->rope_cos + (size_t)t * half;
        const float *sine = s->rope_sin + (size_t)t * half;
        float *q = s->q + (size_t)t * i->n_head * dim;
        for (uint32_t head = 0; head < i->n_head; head++) {
            m->kernels->rope(q + (size_t)head * dim, m->n_rot, m->rope_interleaved, cosine, sine);
        }
        for (uint32_t head = 0; head < i->n_head_kv; head++) {
            float *k = s->k + ((size_t)t * i->n_head_kv + head) * dim;
            float *v = s->v + ((size_t)t * i->n_head_kv + head) * dim;
            size_t offset = cache_offset(s, layer, head) + ((size_t)s->position + t) * dim;
            m->kernels->rope(k, m->n_rot, m->rope_interleaved, cosine, sine);
            cache_store(s, s->k_cache, offset, k);
            cache_store(s, s->v_cache, offset, v);
        }
    }
}

/* Each head of each token attends to its own and all earlier positions. */
static void attend(hepta_session *s, uint32_t layer, uint32_t n) {
    const hepta_model *m = s->model;
    const hepta_model_info *i = &m->info;
    const uint32_t dim = i->head_dim, group = i->n_head / i->n_head_kv;
    const bool f16 = s->cache_type == HEPTA_CACHE_F16;
    const size_t item = f16 ? sizeof(uint16_t) : sizeof(float);
    const float scale = 1.0f / sqrtf((float)dim);
    const size_t n_pairs = (size_t)n * i->n_head;
#pragma omp for schedule(dynamic)
    for (size_t pair = 0; pair < n_pairs; pair++) {
        uint32_t t = (uint32_t)(pair / i->n_head), head = (uint32_t)(pair % i->n_head);
        size_t offset = cache_offset(s, layer, head / group) * item;
        m->kernels->attention(s->q + pair * dim, (const uint8_t *)s->k_cache + offset,
                              (const uint8_t *)s->v_cache + offset, dim, f16, s->position + t + 1,
                              dim, scale, s->attention + pair * dim, thread_scratch(s));
    }
}

/* Packs n tokens' vectors of r->n items each; nothing to do for float matrices. */
static void pack_inputs(hepta_session *s, const float *x, uint32_t n, const rotation *r) {
    if (r == NULL) {
        return;
    }
#pragma omp for
    for (uint32_t t = 0; t < n; t++) {
        pack_input(s, t, x + (size_t)t * r->n, r);
    }
}

/* gate = silu(gate) * up */
static void activate(hepta_session *s, uint32_t n, const rotation *r) {
    const uint32_t n_ff = s->model->info.n_ff;
#pragma omp for
    for (uint32_t t = 0; t < n; t++) {
        float *gate = s->gate + (size_t)t * n_ff;
        s->model->kernels->swiglu(gate, s->up + (size_t)t * n_ff, n_ff);
        if (r != NULL) {
            pack_input(s, t, gate, r);
        }
    }
}

/* One transformer block on the residual stream s->x. On entry s->h is the output of the previous
 * block's feed-forward layer, not yet added; on return, of this one's. */
static void layer_forward(hepta_session *s, uint32_t layer, uint32_t n) {
    const llama_layer *l = &s->model->layers[layer];
    norm_input(s, 0, n, layer > 0, l->attn_norm, rotation_of(&l->wq, &l->wk, &l->wv));
    matmul(s, &l->wq, s->h, 0, n, s->q);
    matmul(s, &l->wk, s->h, 0, n, s->k);
    matmul(s, &l->wv, s->h, 0, n, s->v);
#pragma omp barrier
    rope_and_store(s, layer, n);
    attend(s, layer, n);
    pack_inputs(s, s->attention, n, l->wo.rotation);
    matmul(s, &l->wo, s->attention, 0, n, s->h);
#pragma omp barrier
    norm_input(s, 0, n, true, l->ffn_norm, rotation_of(&l->gate, &l->up, &l->up));
    matmul(s, &l->gate, s->h, 0, n, s->gate);
    matmul(s, &l->up, s->h, 0, n, s->up);
#pragma omp barrier
    activate(s, n, l->down.rotation);
    matmul(s, &l->down, s->gate, 0, n, s->h);
#pragma omp barrier
}

/* Logits of tokens [first, first + n). NaN, which only overflow can bring, gets one bit pattern. */
static void head_forward(hepta_session *s, uint32_t first, uint32_t n, float *logits) {
    const hepta_model *m = s->model;
    norm_input(s, first, n, true, m->output_norm, m->head.rotation);
    matmul(s, &m->head, s->h, first, n, logits);
#pragma omp barrier
#pragma omp for
    for (uint32_t t = 0; t < n; t++) {
        float *row = logits + (size_t)t * m->info.n_vocab;
        for (uint32_t i = 0; i < m->info.n_vocab; i++) {
            row[i] = row[i] == row[i] ? row[i] : math_from_bits_f32(MATH_NAN_BITS);
        }
    }
}

void llama_forward(hepta_session *s, const int32_t *tokens, uint32_t n, float *logits,
                   uint32_t n_logits) {
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
        /* Callers may have changed the rounding mode or set flush-to-zero (libraries built with
         * -ffast-math do when they are loaded): compute in the default environment. */
        fenv_t environment;
        fegetenv(&environment);
        fesetenv(FE_DFL_ENV);
        start_chunk(s, tokens, n);
        for (uint32_t layer = 0; layer < s->model->info.n_layer; layer++) {
            layer_forward(s, layer, n);
        }
        if (n_logits > 0) {
            head_forward(s, n - n_logits, n_logits, logits);
        }
        fesetenv(&environment);
    }
}
