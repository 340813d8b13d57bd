/*
 * forward.h - a session on a device: caches, buffers, and the pass through the layers.
 *
 * The steps are those of model/forward.c, each a launch for all tokens of the chunk: some ten per
 * layer. Small chunks, whose launches would take longer than their work, are captured as a CUDA
 * graph for each shape (numbers of tokens and logits, blocks of positions up to a power of
 * two) and replayed: everything else that changes lies in memory.
 */
#ifndef GPU_FORWARD_H
#define GPU_FORWARD_H

#include "gpu/device_model.h"

constexpr uint32_t LOGIT_ROWS = 64;   /* of which logits are on the device at a time */
constexpr uint32_t GRAPH_TOKENS = 16; /* chunks up to this size are replayed */
constexpr uint32_t N_GRAPHS = 32;
constexpr uint32_t SPARE_BLOCKS = 1024; /* blocks of partial results beyond a context's */

/* What the launches of a chunk depend on. */
typedef struct chunk_shape {
    uint32_t n, n_logits, n_tiles, n_last_tiles, n_blocks;
} chunk_shape;

typedef struct captured {
    chunk_shape shape;
    bool ready;
    dev_graph graph;
} captured;

static void graph_free(captured *c) {
    if (c->ready) {
        dev_graph_free(c->graph);
    }
}

struct gpu_session {
    gpu_model *m;
    gpu_session_options o;
    dev_blocks blocks;
    dev_stream stream, copies;
    bool has_stream, has_copies;
    dev_event ready[SLOTS], unused[SLOTS];
    uint32_t n_events;
    captured graphs[N_GRAPHS];
    uint32_t n_graphs;

    dev_cache cache; /* of layer 0; those of the others follow */
    uint64_t layer_cache_bytes, layer_scales;
    gpu_token *tokens;               /* (T) */
    attend_tile *tiles, *last_tiles; /* (T); the last layer's */
    float *x, *h, *q, *k, *v, *attention, *gate, *up, *cosine, *sine;
    int8_t *q8;
    float *q8_scale;
    int8_t *input; /* (T, width), and their scales and sums */
    float *input_scale;
    int *input_sum;
    uint32_t width;
    float *scratch, *partial, *logits;
    uint64_t partial_blocks;
    dev_rotation of_head;
    uint8_t *staging; /* pinned: tokens, tiles, last tiles */
};

static void session_free(gpu_session *s) {
    if (s == NULL) {
        return;
    }
    dev_use(s->m->number);
    for (uint32_t i = 0; i < s->n_graphs; i++) {
        graph_free(&s->graphs[i]);
    }
    for (uint32_t i = 0; i < s->n_events; i++) {
        dev_event_free(i % 2 == 0 ? s->ready[i / 2] : s->unused[i / 2]);
    }
    if (s->has_stream) {
        dev_stream_free(s->stream);
    }
    if (s->has_copies) {
        dev_stream_free(s->copies);
    }
    dev_host_free(s->staging);
    blocks_free(&s->blocks);
    free(s);
}

static hepta_status session_streams(gpu_session *s, hepta_error *err) {
    TRY(dev_stream_create(&s->stream, err));
    s->has_stream = true;
    TRY(dev_stream_create(&s->copies, err));
    s->has_copies = true;
    for (; s->n_events < 2 * SLOTS; s->n_events++) {
        TRY(dev_event_create(
            s->n_events % 2 == 0 ? &s->ready[s->n_events / 2] : &s->unused[s->n_events / 2], err));
    }
    return HEPTA_OK;
}

static bool fits_shared(const gpu_model *m, uint32_t n) {
    return spread_bytes(n) + 1024 <= m->device.shared_bytes;
}

/* Whether a rotation's vectors need room outside of shared memory. */
static bool wants_scratch(const gpu_model *m, const dev_rotation *r) {
    return r->m > HARTLEY_IN_REGISTERS || !fits_shared(m, r->n);
}

static hepta_status session_cache(gpu_session *s, hepta_error *err) {
    const gpu_model_source *i = &s->m->source;
    dev_cache *c = &s->cache;
    static const uint32_t item_bytes[] = {4, 2, 1};
    c->type = s->o.cache_type;
    c->n_ctx = s->o.n_ctx, c->n_head_kv = i->n_head_kv, c->head_dim = i->head_dim;
    c->row_bytes = c->type == HEPTA_CACHE_Q8 ? (uint32_t)KV_ROW(i->head_dim)
                                             : i->head_dim * item_bytes[c->type];
    const uint64_t rows = (uint64_t)s->o.n_sequences * c->n_head_kv * c->n_ctx;
    s->layer_cache_bytes = rows * c->row_bytes;
    s->layer_scales = c->type == HEPTA_CACHE_Q8 ? rows : 0;
    void *k, *v, *ks, *vs;
    TRY(blocks_add(&s->blocks, i->n_layer * s->layer_cache_bytes, &k, err));
    TRY(blocks_add(&s->blocks, i->n_layer * s->layer_cache_bytes, &v, err));
    TRY(blocks_add(&s->blocks, i->n_layer * s->layer_scales * sizeof(float), &ks, err));
    TRY(blocks_add(&s->blocks, i->n_layer * s->layer_scales * sizeof(float), &vs, err));
    c->k = (uint8_t *)k, c->v = (uint8_t *)v, c->k_scale = (float *)ks, c->v_scale = (float *)vs;
    return HEPTA_OK;
}

/* The cache of a layer. */
static dev_cache cache_of(const gpu_session *s, uint32_t layer) {
    dev_cache c = s->cache;
    c.k += layer * s->layer_cache_bytes, c.v += layer * s->layer_cache_bytes;
    c.k_scale += layer * s->layer_scales, c.v_scale += layer * s->layer_scales;
    return c;
}

static hepta_status session_buffers(gpu_session *s, hepta_error *err) {
    const gpu_model *m = s->m;
    const gpu_model_source *i = &m->source;
    const uint64_t T = s->o.n_batch, heads = (uint64_t)i->n_head * i->head_dim;
    const uint64_t heads_kv = (uint64_t)i->n_head_kv * i->head_dim, half = i->n_rot / 2;
    const bool q8 = s->o.cache_type == HEPTA_CACHE_Q8;
    uint32_t widest = i->n_embd > i->n_ff ? i->n_embd : i->n_ff;
    widest = widest > heads ? widest : (uint32_t)heads;
    s->width = (widest + GPU_GROUP - 1) / GPU_GROUP * GPU_GROUP;
    const bool scratch = wants_scratch(m, &m->of_embd) || wants_scratch(m, &m->of_heads) ||
                         wants_scratch(m, &m->of_ff);
    s->partial_blocks =
        2 * ((uint64_t)(s->o.n_ctx + ATTEND_POSITIONS - 1) / ATTEND_POSITIONS) + SPARE_BLOCKS;
    const struct {
        void *pointer;
        uint64_t n;
    } buffers[] = {
        {&s->tokens, T * sizeof(gpu_token)},
        {&s->tiles, T * sizeof(attend_tile)},
        {&s->last_tiles, T * sizeof(attend_tile)},
        {&s->x, T * i->n_embd * 4},
        {&s->h, T * i->n_embd * 4},
        {&s->q, T * heads * 4},
        {&s->k, T * heads_kv * 4},
        {&s->v, T * heads_kv * 4},
        {&s->attention, T * heads * 4},
        {&s->gate, T * i->n_ff * 4},
        {&s->up, T * i->n_ff * 4},
        {&s->cosine, T * half * 4},
        {&s->sine, T * half * 4},
        {&s->q8, q8 ? T * i->n_head * KV_ROW(i->head_dim) : 0},
        {&s->q8_scale, q8 ? T * i->n_head * 4 : 0},
        {&s->input, T * s->width},
        {&s->input_scale, T * 4},
        {&s->input_sum, T * 4},
        {&s->scratch, scratch ? T * 2 * spread_bytes(widest) : 0},
        {&s->partial, s->partial_blocks * i->n_head * (i->head_dim + 2) * 4},
        {&s->logits, i->whole ? (T < LOGIT_ROWS ? T : LOGIT_ROWS) * i->n_vocab * 4 : 0},
    };
    for (size_t b = 0; b < sizeof buffers / sizeof buffers[0]; b++) {
        void *p;
        TRY(blocks_add(&s->blocks, buffers[b].n, &p, err));
        memcpy(buffers[b].pointer, &p, sizeof p);
    }
    void *staging;
    TRY(dev_host_alloc(&staging, T * (sizeof(gpu_token) + 2 * sizeof(attend_tile)), err));
    s->staging = (uint8_t *)staging;
    if (s->o.of_head != NULL) {
        TRY(upload_rotation(&s->blocks, s->o.of_head, &s->of_head, err));
    }
    return HEPTA_OK;
}

static hepta_status session_create(gpu_model *m, const gpu_session_options *o, gpu_session **out,
                                   hepta_error *err) {
    gpu_session *s = (gpu_session *)calloc(1, sizeof *s);
    if (s == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for a session on the GPU");
    }
    s->m = m, s->o = *o;
    dev_use(m->number);
    hepta_status status = session_streams(s, err);
    if (status == HEPTA_OK) {
        status = session_cache(s, err);
    }
    if (status == HEPTA_OK) {
        status = session_buffers(s, err);
    }
    if (status != HEPTA_OK) {
        session_free(s);
        return status;
    }
    *out = s;
    return HEPTA_OK;
}

static uint64_t session_bytes(const gpu_session *s) {
    return s->blocks.bytes;
}

/* ---- Steps ------------------------------------------------------------- */

/* A pass through the device's layers. */
typedef struct pass {
    gpu_session *s;
    chunk_shape shape;
    uint32_t first; /* the step is for tokens first .. n - 1 */
    hepta_error *err;
} pass;

/* The input of the next products: of tokens `first` to n, in rows 0 and on. */
static hepta_status prepare_input(const pass *f, gpu_prepare_mode mode, float *x, const float *y,
                                  const float *gain, const dev_rotation *r) {
    gpu_session *s = f->s;
    const size_t at = (size_t)f->first * r->n;
    prepare_parameters p = {};
    p.mode = mode, p.x = x + at, p.y = y == NULL ? NULL : y + at, p.gain = gain;
    p.eps = s->m->source.norm_eps, p.r = *r;
    p.scratch = s->scratch, p.in_shared = fits_shared(s->m, r->n);
    p.q = s->input, p.q_stride = (r->n + GPU_GROUP - 1) / GPU_GROUP * GPU_GROUP;
    p.scale = s->input_scale, p.sum = s->input_sum;
    return launch(s->stream, grid{f->shape.n - f->first, 1, 1}, token_threads(r->n),
                  p.in_shared ? spread_bytes(r->n) : 0, prepare, p, f->err);
}

/* Products with the prepared input, of its rows from `skip` on: y[i] is the first such row's. */
static hepta_status products(const pass *f, const dev_matrix *w, float *const *y, int n,
                             uint32_t n_inputs, uint32_t skip) {
    const gpu_session *s = f->s;
    const uint32_t stride = w->n_groups * GPU_GROUP;
    const dev_input x = {s->input + (size_t)skip * stride, s->input_scale + skip,
                         s->input_sum + skip, stride, n_inputs - skip};
    return multiply(s->stream, s->m->device, w, y, n, x, s->m->codes, f->err);
}

static hepta_status embed_tokens(const pass *f) {
    gpu_session *s = f->s;
    const gpu_model *m = s->m;
    embed_parameters p = {};
    p.w = m->embedding, p.codes = m->codes, p.r = m->of_embd, p.tokens = s->tokens, p.x = s->x;
    p.scratch = s->scratch, p.in_shared = fits_shared(m, m->of_embd.n);
    TRY(launch(s->stream, grid{f->shape.n, 1, 1}, token_threads(p.r.n),
               p.in_shared ? spread_bytes(p.r.n) : 0, embed, p, f->err));
    const angle_parameters a = {m->rope_frequency, m->source.n_rot / 2, s->tokens, s->cosine,
                                s->sine};
    return launch(s->stream, grid{f->shape.n, 1, 1}, 64, 0, angles, a, f->err);
}

static hepta_status project(const pass *f, uint32_t layer, const dev_layer *l) {
    gpu_session *s = f->s;
    const gpu_model_source *i = &s->m->source;
    const uint32_t n = f->shape.n;
    pass all = *f;
    all.first = 0;
    TRY(prepare_input(&all, GPU_PREPARE_NORM, s->x, layer > 0 ? s->h : NULL, l->attn_norm,
                      &s->m->of_embd));
    const dev_matrix w[] = {l->wk, l->wv, l->wq};
    float *const y[] = {s->k, s->v, s->q + (size_t)f->first * l->wq.n_rows};
    TRY(products(f, w, y, f->first == 0 ? 3 : 2, n, 0));
    if (f->first > 0 && f->first < n) {
        TRY(products(f, w + 2, y + 2, 1, n, f->first));
    }
    rope_parameters p = {};
    p.cache = cache_of(s, layer), p.tokens = s->tokens;
    p.n_head = i->n_head, p.first = f->first;
    p.q = s->q, p.k = s->k, p.v = s->v, p.q8 = s->q8, p.q8_scale = s->q8_scale;
    p.score_scale = 1.0f / __builtin_sqrtf((float)i->head_dim);
    p.cosine = s->cosine, p.sine = s->sine, p.n_rot = i->n_rot, p.interleaved = i->rope_interleaved;
    p.r = s->of_head;
    return launch(s->stream, grid{n, i->n_head + i->n_head_kv, 1}, HEAD_THREADS, 0, rope_and_store,
                  p, f->err);
}

static hepta_status attention_step(const pass *f, uint32_t layer, bool last) {
    gpu_session *s = f->s;
    const gpu_model_source *i = &s->m->source;
    const chunk_shape *c = &f->shape;
    attend_parameters p = {};
    p.cache = cache_of(s, layer), p.tokens = s->tokens;
    p.tiles = last ? s->last_tiles : s->tiles;
    p.n_head = i->n_head, p.q = s->q, p.q8 = s->q8, p.q8_scale = s->q8_scale;
    p.scale = 1.0f / __builtin_sqrtf((float)i->head_dim);
    p.out = s->attention, p.partial = s->partial, p.n_blocks = c->n_blocks;
    const uint32_t n_tiles = last ? c->n_last_tiles : c->n_tiles;
    const bool split = c->n_blocks > 1 && (uint64_t)c->n * c->n_blocks <= s->partial_blocks &&
                       (uint64_t)n_tiles * i->n_head_kv < 2 * (uint64_t)s->m->device.processors;
    return launch_attention(s->stream, p, n_tiles, split, f->first, c->n, f->err);
}

/* One layer; on entry s->h is the output of the layer before, not yet added; on return, this one's.
 */
static hepta_status layer_step(const pass *f, uint32_t layer, bool last) {
    gpu_session *s = f->s;
    const gpu_model *m = s->m;
    const dev_layer *l = &m->layers[layer];
    const uint32_t n = f->shape.n - f->first;
    TRY(project(f, layer, l));
    if (n == 0) {
        return HEPTA_OK;
    }
    float *const h[] = {s->h + (size_t)f->first * m->source.n_embd};
    TRY(attention_step(f, layer, last));
    TRY(prepare_input(f, GPU_PREPARE_PLAIN, s->attention, NULL, NULL, &m->of_heads));
    TRY(products(f, &l->wo, h, 1, n, 0));
    TRY(prepare_input(f, GPU_PREPARE_NORM, s->x, s->h, l->ffn_norm, &m->of_embd));
    const dev_matrix w[] = {l->gate, l->up};
    const size_t at = (size_t)f->first * m->source.n_ff;
    float *const y[] = {s->gate + at, s->up + at};
    TRY(products(f, w, y, 2, n, 0));
    TRY(prepare_input(f, GPU_PREPARE_SWIGLU, s->gate, s->up, NULL, &m->of_ff));
    return products(f, &l->down, h, 1, n, 0);
}

/* Copies a streamed layer to its slot as soon as the layer there is done with. */
static hepta_status stream_layer(const pass *f, uint32_t layer) {
    gpu_session *s = f->s;
    const uint32_t slot = layer % SLOTS;
    TRY(dev_event_await(s->unused[slot], s->copies, f->err));
    TRY(dev_upload(s->m->slots[slot], s->m->images[layer], s->m->image_bytes, s->copies, f->err));
    return dev_event_record(s->ready[slot], s->copies, f->err);
}

static hepta_status every_layer(pass *f) {
    gpu_session *s = f->s;
    const gpu_model_source *i = &s->m->source;
    if (i->n_resident < i->n_layer) {
        TRY(stream_layer(f, i->n_resident));
    }
    for (uint32_t layer = 0; layer < i->n_layer; layer++) {
        const bool last = i->whole && layer + 1 == i->n_layer;
        const bool streamed = layer >= i->n_resident;
        const uint32_t slot = layer % SLOTS;
        f->first = last ? f->shape.n - f->shape.n_logits : 0;
        if (streamed && layer + 1 < i->n_layer) {
            TRY(stream_layer(f, layer + 1));
        }
        if (streamed) {
            TRY(dev_event_await(s->ready[slot], s->stream, f->err));
        }
        TRY(layer_step(f, layer, last));
        if (streamed) {
            TRY(dev_event_record(s->unused[slot], s->stream, f->err));
        }
    }
    if (i->whole && f->shape.n_logits > 0) {
        TRY(prepare_input(f, GPU_PREPARE_NORM, s->x, s->h, s->m->output_norm, &s->m->of_embd));
    }
    return HEPTA_OK;
}

/* Kernels overlap between kernels only, not where copies are awaited. */
static hepta_status all_layers(pass *f) {
    gpu_session *s = f->s;
    const gpu_model_source *i = &s->m->source;
    TRY(embed_tokens(f));
    s->stream = dev_overlapping(s->stream, s->m->device.overlaps && i->n_resident == i->n_layer);
    const hepta_status status = every_layer(f);
    s->stream = dev_overlapping(s->stream, false);
    return status;
}

/* Logits of up to LOGIT_ROWS tokens, from number `first` of those that want them. */
static hepta_status head_step(const pass *f, uint32_t first, uint32_t end) {
    float *const y[] = {f->s->logits};
    return products(f, &f->s->m->head, y, 1, end, first);
}

/* ---- The whole --------------------------------------------------------- */

/* Cuts tokens first .. n - 1 into tiles of one sequence and at most `most` tokens. */
static uint32_t cut_tiles(const gpu_token *tokens, uint32_t first, uint32_t n, uint32_t most,
                          attend_tile *tiles) {
    uint32_t n_tiles = 0;
    for (uint32_t t = first; t < n; t++) {
        if (t == first || t - tiles[n_tiles - 1].first == most ||
            tokens[t].sequence != tokens[t - 1].sequence) {
            tiles[n_tiles++].first = t;
        }
        tiles[n_tiles - 1].end = t + 1;
    }
    return n_tiles;
}

static hepta_status upload_chunk(pass *f, const gpu_token *tokens) {
    gpu_session *s = f->s;
    const gpu_model_source *i = &s->m->source;
    const uint32_t n = f->shape.n, T = s->o.n_batch;
    const uint32_t most = attend_tile_tokens(i->n_head / i->n_head_kv, i->head_dim);
    gpu_token *t = (gpu_token *)(void *)s->staging;
    attend_tile *tiles = (attend_tile *)(void *)(t + T), *last = tiles + T;
    memcpy(t, tokens, n * sizeof *t);
    f->shape.n_tiles = cut_tiles(t, 0, n, most, tiles);
    f->shape.n_last_tiles = cut_tiles(t, n - f->shape.n_logits, n, most, last);
    uint32_t blocks = 1, needed = 1;
    for (uint32_t k = 0; k < n; k++) {
        const uint32_t b = t[k].position / ATTEND_POSITIONS + 1;
        needed = b > needed ? b : needed;
    }
    while (blocks < needed) {
        blocks *= 2;
    }
    f->shape.n_blocks = blocks;
    TRY(dev_upload(s->tokens, t, n * sizeof *t, s->stream, f->err));
    TRY(dev_upload(s->tiles, tiles, f->shape.n_tiles * sizeof *tiles, s->stream, f->err));
    return dev_upload(s->last_tiles, last, f->shape.n_last_tiles * sizeof *last, s->stream, f->err);
}

/* Makes a graph of the pass's launches. */
static hepta_status capture(pass *f, dev_graph *out) {
    TRY(dev_capture_begin(f->s->stream, f->err));
    const hepta_status status = all_layers(f);
    const hepta_status ended =
        dev_capture_end(f->s->stream, out, status == HEPTA_OK ? f->err : NULL);
    if (status != HEPTA_OK && ended == HEPTA_OK) {
        dev_graph_free(*out);
    }
    return status != HEPTA_OK ? status : ended;
}

/* The launches of the pass: one by one where a shape is new, which also loads the kernels, and as a
 * graph that is captured the second time. */
static hepta_status run_layers(pass *f) {
    gpu_session *s = f->s;
    const gpu_model_source *i = &s->m->source;
    if (!GPU_HAS_GRAPHS || f->shape.n > GRAPH_TOKENS || i->n_resident < i->n_layer) {
        return all_layers(f);
    }
    for (uint32_t g = 0; g < s->n_graphs; g++) {
        captured *c = &s->graphs[g];
        if (memcmp(&c->shape, &f->shape, sizeof f->shape) == 0) {
            if (!c->ready) {
                TRY(capture(f, &c->graph));
                c->ready = true;
            }
            return dev_graph_run(c->graph, s->stream, f->err);
        }
    }
    if (s->n_graphs == N_GRAPHS) {
        graph_free(&s->graphs[0]);
        memmove(s->graphs, s->graphs + 1, --s->n_graphs * sizeof s->graphs[0]);
    }
    s->graphs[s->n_graphs].shape = f->shape;
    s->graphs[s->n_graphs++].ready = false;
    return all_layers(f);
}

static hepta_status forward(gpu_session *s, const gpu_token *tokens, uint32_t n, uint32_t n_logits,
                            float *x, float *h, float *logits, hepta_error *err) {
    const gpu_model_source *i = &s->m->source;
    pass f = {s, {n, i->whole ? n_logits : 0, 0, 0, 0}, 0, err};
    dev_use(s->m->number);
    TRY(upload_chunk(&f, tokens));
    TRY(run_layers(&f));
    if (!i->whole) {
        TRY(dev_download(x, s->x, (uint64_t)n * i->n_embd * 4, s->stream, err));
        TRY(dev_download(h, s->h, (uint64_t)n * i->n_embd * 4, s->stream, err));
    }
    for (uint32_t first = 0; i->whole && first < n_logits; first += LOGIT_ROWS) {
        const uint32_t end = n_logits - first < LOGIT_ROWS ? n_logits : first + LOGIT_ROWS;
        TRY(head_step(&f, first, end));
        TRY(dev_download(logits + (size_t)first * i->n_vocab, s->logits,
                         (uint64_t)(end - first) * i->n_vocab * 4, s->stream, err));
    }
    return dev_wait(s->stream, err);
}

#endif
