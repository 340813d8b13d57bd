/*
 * forward.c - the transformer: from token ids to logits, for a chunk of tokens.
 *
 * Each step of the pass is a loop whose items (a token, a head of a token, some rows of a matrix)
 * the session's threads share; a step begins when the one before has ended. Which thread
 * computes which item has no influence on the item, and every token of a chunk depends on itself
 * and its sequence's cache alone; so the logits do not depend on threads, on chunks, or on the
 * order and the sequences of the tokens in a chunk.
 *
 * docs/MODEL.md sets the equations beside these functions.
 */
#include "kernels/math.h"
#include "model/llama.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

/* Rows that are converted to F32 at a time: each input is read once for all of them. */
enum { FLOAT_ROWS = 32 };

/* y (n - first, n_rows) = a x for tokens first .. n - 1 of the chunk; x (n, n_cols) is read if
 * the matrix is not packed. */
typedef struct product {
    const matrix *a;
    const float *x;
    float *y;
    uint32_t first;
    /* Items: n_large of large_rows each, then of small_rows each what is left of the matrix. */
    uint32_t n_large, large_rows, small_rows;
    size_t n_items;
} product;

/* A pass: what the items of the step at hand need to know. */
typedef struct forward {
    hepta_session *s;
    const hepta_model *m;
    const kernels *k;
    uint32_t n;     /* tokens of the chunk */
    uint32_t first; /* the step is for tokens first .. n-1 */
    uint32_t layer;
    const rotation *pack; /* the step's results are packed too, with this rotation; or NULL */
    bool add;             /* norm_token */
    const float *gain;    /* norm_token */
    product products[3];  /* product_rows */
    uint32_t n_parts;     /* attend_tile */
    uint32_t n_products;
    float *logits;
} forward;

uint32_t llama_width(const hepta_model *model) {
    const hepta_model_info *i = &model->info;
    uint32_t heads = i->n_head * i->head_dim;
    uint32_t width = i->n_embd > heads ? i->n_embd : heads;
    width = width > i->n_ff ? width : i->n_ff;
    return (uint32_t)round_up(width, 16);
}

/* Enough for pack_input (2 * width floats), embed_token (2 * width floats and
 * KERNELS_SCRATCH_BYTES), FLOAT_ROWS of an unquantized matrix and the rest, which use less. */
size_t llama_scratch_bytes(const hepta_model *model) {
    uint32_t width = llama_width(model);
    size_t vectors = (size_t)width * 2 * sizeof(float) + KERNELS_SCRATCH_BYTES(width);
    size_t rows = model->info.quantized ? 0 : (size_t)width * FLOAT_ROWS * sizeof(float);
    vectors = vectors > rows ? vectors : rows;
    size_t head = KERNELS_ATTENTION_SCRATCH_BYTES(model->info.head_dim);
    return (size_t)round_up(vectors > head ? vectors : head, 64);
}

static void *thread_scratch(const forward *f, int thread) {
    return f->s->scratch + (size_t)thread * f->s->scratch_bytes;
}

/* A step whose work is about that of `macs` multiplications in a matrix. Waking other threads and
 * moving data between cores takes microseconds: a small step is done by the caller alone. */
static bool worth_sharing(const forward *f, double macs) {
    enum { MICROSECONDS = 8 };
    return macs > (double)f->k->macs_per_microsecond * MICROSECONDS;
}

static void each(forward *f, size_t n, double macs, team_fn item) {
    if (worth_sharing(f, macs)) {
        team_each(f->s->team, n, item, f);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        item(f, i, 0);
    }
}

/* A step with an item per token, in which a token takes some 50 operations for each of n. */
static void each_token(forward *f, uint32_t n, team_fn item) {
    each(f, f->n - f->first, 50.0 * n * (f->n - f->first), item);
}

/* ---- Linear layers ----------------------------------------------------- */

/* Rotates and quantizes token t's input x for packed matrices of this width. */
static void pack_input(const forward *f, size_t t, const float *x, const rotation *r, int thread) {
    hepta_session *s = f->s;
    float *rotated = thread_scratch(f, thread);
    int8_t *q = s->quantized + t * s->width;
    memcpy(rotated, x, r->n * sizeof *x);
    f->k->rotate(r, rotated, rotated + s->width);
    activation *a = &s->activations[t];
    a->q = q;
    f->k->quantize_activation(rotated, r->n_padded, q, &a->scale, &a->sum);
}

/* Some rows of one of the step's products, for tokens from f->first on. */
static void product_rows(void *context, size_t item, int thread) {
    const forward *f = context;
    const product *p = f->products;
    while (item >= p->n_items) {
        item -= p->n_items;
        p++;
    }
    const matrix *a = p->a;
    const uint32_t k = (uint32_t)item, n = f->n - p->first;
    const uint32_t small_begin = p->n_large * p->large_rows;
    const uint32_t begin =
        k < p->n_large ? k * p->large_rows : small_begin + (k - p->n_large) * p->small_rows;
    const uint32_t most = k < p->n_large ? p->large_rows : p->small_rows;
    const uint32_t end = a->n_rows - begin < most ? a->n_rows : begin + most;
    if (a->type == TENSOR_PACKED) {
        f->k->matmul_packed(&a->packed, begin, end, f->s->activations + p->first, n, p->y,
                            a->n_rows, thread_scratch(f, thread));
        return;
    }
    const float *x = p->x + (size_t)p->first * a->n_cols;
    const uint32_t room = (uint32_t)(f->s->scratch_bytes / sizeof(float) / a->n_cols);
    const uint32_t batch = room < FLOAT_ROWS ? room : FLOAT_ROWS;
    for (uint32_t r = begin; r < end; r += batch) {
        const uint32_t n_rows = end - r < batch ? end - r : batch;
        const float *rows = thread_scratch(f, thread);
        if (a->type == TENSOR_F32) {
            rows = (const float *)(const void *)a->source->data + (size_t)r * a->n_cols;
        }
        for (uint32_t i = 0; a->type != TENSOR_F32 && i < n_rows; i++) {
            float *row = thread_scratch(f, thread);
            kernels_tensor_row(f->k, a->source, r + i, row + (size_t)i * a->n_cols);
        }
        kernels_matmul_tiled(f->k, rows, n_rows, a->n_cols, x, a->n_cols, n, p->y + r, a->n_rows);
    }
}

/* Adds a product to the next step; y is the row of the first token. */
static void prepare(forward *f, const matrix *a, const float *x, float *y, uint32_t first) {
    f->products[f->n_products++] = (product){.a = a, .x = x, .y = y, .first = first};
}

/* The same for tokens from f->first on and y (n, n_rows). */
static void prepare_rows(forward *f, const matrix *a, const float *x, float *y) {
    prepare(f, a, x, y + (size_t)f->first * a->n_rows, f->first);
}

/*
 * Cuts a product into items of groups of 16 rows. An item begins with memory that nothing fetched
 * ahead, so a thread gets one large item of each product; a quarter of the step's last one is cut
 * into small items, for threads that are done while others are delayed.
 */
static void cut(product *p, uint32_t threads, bool last) {
    const uint32_t n_rows = p->a->n_rows, share = (n_rows + threads - 1) / threads;
    p->large_rows = (uint32_t)round_up(last ? share - share / 4 : share, 16);
    p->small_rows = (uint32_t)round_up(share / 16 < 64 ? 64 : share / 16, 16);
    p->n_large = threads;
    while ((uint64_t)p->n_large * p->large_rows > n_rows) {
        p->n_large--;
    }
    const uint32_t left = n_rows - p->n_large * p->large_rows;
    p->n_items = p->n_large + ((size_t)left + p->small_rows - 1) / p->small_rows;
}

/* The step of all prepared products. */
static void multiply(forward *f) {
    const uint32_t threads = (uint32_t)team_size(f->s->team);
    double macs = 0.0;
    size_t n_items = 0;
    for (uint32_t i = 0; i < f->n_products; i++) {
        const product *p = &f->products[i];
        macs += (double)p->a->n_rows * p->a->n_cols * (f->n - p->first);
    }
    for (uint32_t i = 0; i < f->n_products; i++) {
        cut(&f->products[i], worth_sharing(f, macs) ? threads : 1,
            threads > 1 && i + 1 == f->n_products);
        n_items += f->products[i].n_items;
    }
    each(f, n_items, macs, product_rows);
    const llama_observer *o = f->s->observer;
    for (uint32_t i = 0; i < f->n_products && o != NULL && o->output != NULL; i++) {
        const product *p = &f->products[i];
        o->output(o->context, p->a, p->x, p->y, f->n);
    }
    f->n_products = 0;
}

/* The rotation that the packed ones among these matrices want; NULL if none is packed. */
static const rotation *rotation_of(const matrix *a, const matrix *b, const matrix *c) {
    return a->rotation != NULL ? a->rotation : b->rotation != NULL ? b->rotation : c->rotation;
}

/* ---- Embedding and norms ----------------------------------------------- */

/* cosines and sines of RoPE for the token's position */
static void turn_token(void *context, size_t t, int thread) {
    const forward *f = context;
    hepta_session *s = f->s;
    const uint32_t half = f->m->n_rot / 2;
    const double position = (double)s->chunk[t].position;
    for (uint32_t i = 0; i < half; i++) {
        double sine, cosine;
        math_sin_cos_f64(position * f->m->rope_frequency[i], &sine, &cosine);
        s->rope_sin[t * half + i] = (float)sine;
        s->rope_cos[t * half + i] = (float)cosine;
    }
    (void)thread;
}

/* x = the token's row of the embedding matrix */
static void embed_token(void *context, size_t t, int thread) {
    const forward *f = context;
    hepta_session *s = f->s;
    const matrix *a = &f->m->embedding;
    const size_t token = (size_t)s->chunk[t].id;
    float *x = s->x + t * a->n_cols;
    if (a->type == TENSOR_PACKED) {
        float *rotated = thread_scratch(f, thread), *more = rotated + s->width;
        f->k->unpack_row(&a->packed, (uint32_t)token, rotated, (uint8_t *)(more + s->width));
        f->k->rotate_inverse(a->rotation, rotated, more);
        memcpy(x, rotated, a->n_cols * sizeof *x);
    } else {
        kernels_tensor_row(f->k, a->source, token, x);
    }
    turn_token(context, t, thread);
}

/* x += h if f->add; h = rmsnorm(x) * gain */
static void norm_token(void *context, size_t item, int thread) {
    const forward *f = context;
    const size_t t = f->first + item, n_embd = f->m->info.n_embd;
    float *x = f->s->x + t * n_embd, *h = f->s->h + t * n_embd;
    if (f->add) {
        f->k->add(x, h, (uint32_t)n_embd);
    }
    f->k->rmsnorm(x, f->gain, (uint32_t)n_embd, f->m->norm_eps, h);
    if (f->pack != NULL) {
        pack_input(f, t, h, f->pack, thread);
    }
}

static void norm_input(forward *f, bool add, const float *gain, const rotation *pack) {
    f->add = add;
    f->gain = gain;
    f->pack = pack;
    each_token(f, f->m->info.n_embd, norm_token);
}

/* ---- Attention --------------------------------------------------------- */

/* The cache of the layer's KV head in token t's sequence. */
static const kv_cache *cache_of(const forward *f, size_t t, uint32_t head) {
    const hepta_session *s = f->s;
    const size_t layer = s->one_layer ? 0 : f->layer - f->m->gpu_layers;
    const size_t plane = layer * s->n_sequences + s->chunk[t].sequence;
    return &s->caches[plane * f->m->info.n_head_kv + head];
}

/* RoPE on a query or a key; for a Q8 cache, the rotation that spreads its outliers. */
static void turn_head(const forward *f, size_t t, float *x, int thread) {
    const hepta_model *m = f->m;
    const hepta_session *s = f->s;
    const uint32_t half = m->n_rot / 2;
    f->k->rope(x, m->n_rot, m->rope_interleaved, s->rope_cos + t * half, s->rope_sin + t * half);
    const rotation *r = s->head_rotation;
    if (r != NULL) {
        float *padded = thread_scratch(f, thread);
        memcpy(padded, x, r->n * sizeof *x);
        f->k->rotate(r, padded, padded + r->n_padded);
        memcpy(x, padded, r->n * sizeof *x);
    }
}

/* RoPE turns the token's q (from f->first on) and k; k and v go to the cache. */
static void rope_token(void *context, size_t t, int thread) {
    const forward *f = context;
    const hepta_model_info *i = &f->m->info;
    hepta_session *s = f->s;
    const uint32_t dim = i->head_dim;
    float *q = s->q + t * i->n_head * dim;
    for (uint32_t head = 0; t >= f->first && head < i->n_head; head++) {
        turn_head(f, t, q + (size_t)head * dim, thread);
    }
    for (uint32_t head = 0; head < i->n_head_kv; head++) {
        float *k = s->k + (t * i->n_head_kv + head) * dim;
        float *v = s->v + (t * i->n_head_kv + head) * dim;
        turn_head(f, t, k, thread);
        kv_store(f->k, cache_of(f, t, head), dim, s->chunk[t].position, k, v,
                 thread_scratch(f, thread));
    }
}

/*
 * The heads of a group read the same keys and values, as do neighbouring tokens of a sequence: an
 * item is the queries of up to KERNELS_MAX_QUERIES such heads and tokens. A group is cut into
 * parts where there would be too few items for the threads.
 */
static void attend_tile(void *context, size_t item, int thread) {
    const forward *f = context;
    const hepta_session *s = f->s;
    const hepta_model_info *i = &f->m->info;
    const uint32_t dim = i->head_dim, group = i->n_head / i->n_head_kv;
    const uint32_t part = (uint32_t)(item % f->n_parts);
    const uint32_t head_kv = (uint32_t)(item / f->n_parts % i->n_head_kv);
    const uint32_t *tile = s->tiles + item / f->n_parts / i->n_head_kv;
    const uint32_t head_begin = head_kv * group + part * group / f->n_parts;
    const uint32_t head_end = head_kv * group + (part + 1) * group / f->n_parts;
    attention_query queries[KERNELS_MAX_QUERIES];
    uint32_t n = 0;
    for (uint32_t t = tile[0]; t < tile[1]; t++) {
        for (uint32_t head = head_begin; head < head_end; head++) {
            const size_t offset = ((size_t)t * i->n_head + head) * dim;
            queries[n++] =
                (attention_query){s->q + offset, s->attention + offset, s->chunk[t].position + 1};
        }
    }
    f->k->attention(cache_of(f, tile[0], head_kv), dim, queries, n, 1.0f / sqrtf((float)dim),
                    thread_scratch(f, thread));
}

/* s->attention for tokens from f->first on. */
static void attend(forward *f) {
    hepta_session *s = f->s;
    const hepta_model_info *i = &f->m->info;
    const uint32_t group = i->n_head / i->n_head_kv, threads = (uint32_t)team_size(s->team);
    f->n_parts = (group + KERNELS_MAX_QUERIES - 1) / KERNELS_MAX_QUERIES;
    const uint32_t most = group < KERNELS_MAX_QUERIES ? KERNELS_MAX_QUERIES / group : 1;
    double positions = 0.0;
    size_t n_tiles = 0;
    for (uint32_t t = f->first; t < f->n; t++) {
        if (t == f->first || t - s->tiles[n_tiles - 1] == most ||
            s->chunk[t].sequence != s->chunk[t - 1].sequence) {
            s->tiles[n_tiles++] = t;
        }
        positions += s->chunk[t].position + 1.0;
    }
    s->tiles[n_tiles] = f->n;
    while (f->n_parts < group && n_tiles * i->n_head_kv * f->n_parts < 2 * (size_t)threads) {
        f->n_parts = 2 * f->n_parts < group ? 2 * f->n_parts : group;
    }
    each(f, n_tiles * i->n_head_kv * f->n_parts, 4.0 * i->n_head * i->head_dim * positions,
         attend_tile);
}

static void pack_attention(void *context, size_t item, int thread) {
    const forward *f = context;
    const size_t t = f->first + item;
    pack_input(f, t, f->s->attention + t * f->pack->n, f->pack, thread);
}

/* ---- Feed-forward ------------------------------------------------------ */

/* gate = silu(gate) * up */
static void activate_token(void *context, size_t item, int thread) {
    const forward *f = context;
    const size_t t = f->first + item;
    const uint32_t n_ff = f->m->info.n_ff;
    float *gate = f->s->gate + t * n_ff;
    f->k->swiglu(gate, f->s->up + t * n_ff, n_ff);
    if (f->pack != NULL) {
        pack_input(f, t, gate, f->pack, thread);
    }
}

/* ---- The whole --------------------------------------------------------- */

static void observe(const forward *f, llama_input input, const float *x) {
    const llama_observer *o = f->s->observer;
    if (o != NULL && o->input != NULL) {
        o->input(o->context, f->layer, input, x, f->n);
    }
}

/* Keys and values of all tokens to the cache; s->q for tokens from f->first on. */
static void project(forward *f) {
    hepta_session *s = f->s;
    const hepta_model_info *i = &f->m->info;
    const llama_layer *l = &f->m->layers[f->layer];
    const uint32_t first = f->first;
    f->first = 0;
    norm_input(f, f->layer > 0, l->attn_norm, rotation_of(&l->wq, &l->wk, &l->wv));
    observe(f, LLAMA_ATTN_IN, s->h);
    prepare(f, &l->wk, s->h, s->k, 0);
    prepare(f, &l->wv, s->h, s->v, 0);
    if (first < f->n) {
        prepare(f, &l->wq, s->h, s->q + (size_t)first * l->wq.n_rows, first);
    }
    multiply(f);
    f->first = first;
    each(f, f->n, 50.0 * i->n_head * i->head_dim * f->n, rope_token);
}

/*
 * One transformer block on the residual stream s->x, for tokens from f->first on; the others
 * only leave their keys and values. On entry s->h is the output of the block before, not yet
 * added; on return it is this block's.
 */
static void layer_forward(forward *f) {
    hepta_session *s = f->s;
    const hepta_model_info *i = &f->m->info;
    const llama_layer *l = &f->m->layers[f->layer];
    const uint32_t heads = i->n_head * i->head_dim;

    project(f);
    if (f->first == f->n) {
        return;
    }
    attend(f);
    if (l->wo.rotation != NULL) {
        f->pack = l->wo.rotation;
        each_token(f, heads, pack_attention);
    }
    observe(f, LLAMA_ATTN_OUT, s->attention);
    prepare_rows(f, &l->wo, s->attention, s->h);
    multiply(f);

    norm_input(f, true, l->ffn_norm, rotation_of(&l->gate, &l->up, &l->up));
    observe(f, LLAMA_FFN_IN, s->h);
    prepare_rows(f, &l->gate, s->h, s->gate);
    prepare_rows(f, &l->up, s->h, s->up);
    multiply(f);
    f->pack = l->down.rotation;
    each_token(f, i->n_ff, activate_token);
    observe(f, LLAMA_FFN_OUT, s->gate);
    prepare_rows(f, &l->down, s->gate, s->h);
    multiply(f);
}

/* NaN, which only overflow can bring, gets one bit pattern. */
static void canonical_logits(void *context, size_t t, int thread) {
    const forward *f = context;
    const uint32_t n_vocab = f->m->info.n_vocab;
    float *row = f->logits + t * n_vocab;
    for (uint32_t i = 0; i < n_vocab; i++) {
        row[i] = row[i] == row[i] ? row[i] : math_from_bits_f32(MATH_NAN_BITS);
    }
    (void)thread;
}

/* Logits of the tokens from f->first on. */
static void head_forward(forward *f) {
    norm_input(f, true, f->m->output_norm, f->m->head.rotation);
    prepare(f, &f->m->head, f->s->h, f->logits, f->first);
    multiply(f);
    each_token(f, f->m->info.n_vocab / 50, canonical_logits);
}

/* The layers from `first` on; those before it have left s->x and s->h. */
static void pass(hepta_session *s, uint32_t first, uint32_t n, uint32_t n_logits, float *logits) {
    forward f = {.s = s, .m = s->model, .k = s->model->kernels, .n = n, .logits = logits};
    const uint32_t n_layer = f.m->info.n_layer;
    const llama_observer *o = s->observer;
    /* The caller may have changed the rounding mode or set flush-to-zero (libraries built with
     * -ffast-math do so when they are loaded): compute in the default environment, as the team's
     * own threads do. */
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    each_token(&f, f.m->info.n_embd, first == 0 ? embed_token : turn_token);
    if (o != NULL && o->output != NULL) {
        o->output(o->context, &f.m->embedding, NULL, s->x, n);
    }
    for (f.layer = first; f.layer < n_layer; f.layer++) {
        f.first = o != NULL || f.layer + 1 < n_layer ? 0 : n - n_logits;
        layer_forward(&f);
    }
    if (n_logits > 0) {
        head_forward(&f);
    } else if (o != NULL) {
        norm_input(&f, true, f.m->output_norm, NULL);
        observe(&f, LLAMA_HEAD_IN, s->h);
    }
    fesetenv(&environment);
}

hepta_status llama_forward(hepta_session *s, uint32_t n, uint32_t n_logits, float *logits,
                           hepta_error *err) {
    const hepta_model *m = s->model;
    if (s->gpu != NULL) {
        hepta_status status =
            m->gpu->forward(s->gpu, s->chunk, n, n_logits, s->x, s->h, logits, err);
        if (status != HEPTA_OK || m->gpu_layers == m->info.n_layer) {
            return status;
        }
    }
    pass(s, s->gpu != NULL ? m->gpu_layers : 0, n, n_logits, logits);
    return HEPTA_OK;
}

void llama_observe(hepta_session *s, uint32_t n, float *logits, const llama_observer *observer) {
    s->observer = observer;
    pass(s, 0, n, logits != NULL ? n : 0, logits);
    s->observer = NULL;
}
