/*
 * session.c - the KV caches of some sequences and the buffers of a pass (hepta_session_*).
 *
 * All memory is one block, sized and allocated when the session is created. The tokens of a call
 * are cut into chunks of n_batch, in which those whose logits are wanted come last; neither has
 * any influence on the result (forward.c).
 */
#include "model/llama.h"

#include <inttypes.h>

enum { DEFAULT_BATCH = 128, DEFAULT_GPU_BATCH = 512, PIECE_ALIGNMENT = 64, HEAD_ROTATION_SEED = 0 };

/* One piece of the block: where its pointer goes and how large it is. */
typedef struct piece {
    void **pointer;
    uint64_t n_items, item_bytes;
} piece;

/* Allocates all pieces in one block; false if their sum overflows or memory is short. */
static bool allocate(hepta_session *s, const piece *pieces, size_t n) {
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t bytes;
        if (mul_overflows(pieces[i].n_items, pieces[i].item_bytes, &bytes) ||
            bytes > SIZE_MAX / 2 ||
            add_overflows(total, round_up(bytes, PIECE_ALIGNMENT), &total) ||
            total > SIZE_MAX / 2) {
            return false;
        }
    }
    s->memory = memory_alloc((size_t)total, 1);
    if (s->memory == NULL) {
        return false;
    }
    s->memory_bytes = (size_t)total;
    uint8_t *p = s->memory;
    for (size_t i = 0; i < n; i++) {
        *pieces[i].pointer = p;
        p += round_up(pieces[i].n_items * pieces[i].item_bytes, PIECE_ALIGNMENT);
    }
    return true;
}

static bool allocate_buffers(hepta_session *s) {
    const hepta_model *m = s->model;
    const hepta_model_info *i = &m->info;
    const uint32_t n_layer = s->gpu != NULL ? i->n_layer - m->gpu_layers : i->n_layer;
    const uint64_t T = n_layer > 0 ? s->n_batch : 0, heads = (uint64_t)i->n_head * i->head_dim;
    const uint64_t heads_kv = (uint64_t)i->n_head_kv * i->head_dim;
    /* n_ctx, n_sequences, T < 2^31; head_dim, n_head_kv, n_layer < 2^18: products stay below 2^64
     */
    const uint64_t n_caches =
        (s->one_layer ? 1 : (uint64_t)n_layer) * i->n_head_kv * s->n_sequences;
    const uint64_t cache_bytes =
        round_up(kv_bytes(s->cache_type, i->head_dim, s->n_ctx), PIECE_ALIGNMENT);
    const uint64_t n_scales = s->cache_type == HEPTA_CACHE_Q8 ? round_up(s->n_ctx, KV_TILE) : 0;
    void *positions, *chunk, *tiles, *caches, *k_cache, *v_cache, *cache_scales, *x, *h, *q, *k, *v,
        *attention, *gate, *up, *cosine, *sine, *quantized, *activations, *scratch;
    const piece pieces[] = {
        {&positions, s->n_sequences, sizeof(uint32_t)},
        {&chunk, s->n_batch, sizeof(gpu_token)},
        {&tiles, T + 1, sizeof(uint32_t)},
        {&caches, n_caches, sizeof(kv_cache)},
        {&k_cache, n_caches, cache_bytes},
        {&v_cache, n_caches, cache_bytes},
        {&cache_scales, 2 * n_caches, n_scales * sizeof(float)},
        {&x, T * i->n_embd, sizeof(float)},
        {&h, T * i->n_embd, sizeof(float)},
        {&q, T * heads, sizeof(float)},
        {&k, T * heads_kv, sizeof(float)},
        {&v, T * heads_kv, sizeof(float)},
        {&attention, T * heads, sizeof(float)},
        {&gate, T * i->n_ff, sizeof(float)},
        {&up, T * i->n_ff, sizeof(float)},
        {&cosine, T * (m->n_rot / 2), sizeof(float)},
        {&sine, T * (m->n_rot / 2), sizeof(float)},
        {&quantized, i->quantized ? T * s->width : 0, sizeof(int8_t)},
        {&activations, i->quantized ? T : 0, sizeof(activation)},
        {&scratch, (uint64_t)team_size(s->team), s->scratch_bytes},
    };
    if (!allocate(s, pieces, sizeof pieces / sizeof pieces[0])) {
        return false;
    }
    s->positions = positions;
    s->chunk = chunk;
    s->tiles = tiles;
    s->caches = caches;
    s->k_cache = k_cache, s->v_cache = v_cache, s->cache_scales = cache_scales;
    memory_use_sparsely(k_cache, (size_t)((uint8_t *)x - (uint8_t *)k_cache));
    for (uint64_t c = 0; c < n_caches; c++) {
        s->caches[c] = (kv_cache){.type = s->cache_type,
                                  .k = (uint8_t *)k_cache + c * cache_bytes,
                                  .v = (uint8_t *)v_cache + c * cache_bytes,
                                  .k_scale = s->cache_scales + 2 * c * n_scales,
                                  .v_scale = s->cache_scales + (2 * c + 1) * n_scales};
    }
    s->x = x, s->h = h;
    s->q = q, s->k = k, s->v = v;
    s->attention = attention;
    s->gate = gate, s->up = up;
    s->rope_cos = cosine, s->rope_sin = sine;
    s->quantized = quantized;
    s->activations = activations;
    s->scratch = scratch;
    return true;
}

/* The part of the session that is on the GPU. */
static hepta_status create_on_gpu(hepta_session *s, hepta_error *err) {
    const gpu_session_options options = {.n_ctx = s->n_ctx,
                                         .n_batch = s->n_batch,
                                         .n_sequences = s->n_sequences,
                                         .cache_type = s->cache_type,
                                         .of_head = s->head_rotation};
    const hepta_model *m = s->model;
    hepta_error why = {0};
    hepta_status status = m->gpu->session_create(m->gpu_model, &options, &s->gpu, &why);
    if (status == HEPTA_ERROR_MEMORY) {
        return error_set(
            err, status,
            "a session of %u sequences with a context of %u tokens on the GPU: %.200s; "
            "a shorter context, an 8-bit cache or fewer layers on the GPU take less",
            s->n_sequences, s->n_ctx, why.message);
    }
    return status == HEPTA_OK ? status : error_set(err, status, "%s", why.message);
}

hepta_status llama_session_create(const hepta_model *model, const hepta_session_options *options,
                                  bool one_layer, hepta_session **out, hepta_error *err) {
    static const hepta_session_options defaults = {0};
    if (model == NULL || out == NULL) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "hepta_session_create: model or out is NULL");
    }
    options = options != NULL ? options : &defaults;
    if (options->threads < 0 || options->threads > TEAM_MAX_THREADS) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "threads is %d, expected 0 to %d",
                         options->threads, TEAM_MAX_THREADS);
    }
    if ((unsigned)options->cache_type > HEPTA_CACHE_Q8) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "cache_type is %d, expected 0 (F32), 1 (F16) or 2 (Q8)",
                         (int)options->cache_type);
    }
    if (options->n_ctx > INT32_MAX || options->n_batch > INT32_MAX ||
        options->n_sequences > INT32_MAX) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "n_ctx is %u, n_sequences %u and n_batch %u, expected at most 2147483647",
                         options->n_ctx, options->n_sequences, options->n_batch);
    }
    hepta_session *s = memory_alloc(1, sizeof *s);
    if (s == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for a session");
    }
    s->model = model;
    s->n_ctx = options->n_ctx != 0 ? options->n_ctx : model->info.n_ctx_train;
    s->n_sequences = options->n_sequences != 0 ? options->n_sequences : 1;
    const bool on_gpu = model->gpu != NULL && !one_layer;
    s->n_batch = options->n_batch != 0 ? options->n_batch
                 : on_gpu              ? DEFAULT_GPU_BATCH
                                       : DEFAULT_BATCH;
    const uint64_t room = (uint64_t)s->n_sequences * s->n_ctx;
    s->n_batch = s->n_batch < room ? s->n_batch : (uint32_t)room;
    s->cache_type = options->cache_type;
    s->one_layer = one_layer;
    s->width = llama_width(model);
    s->scratch_bytes = llama_scratch_bytes(model);
    const bool idle = on_gpu && model->gpu_layers == model->info.n_layer;
    int threads = idle ? 1 : options->threads != 0 ? options->threads : threads_default();
    hepta_status status = team_create(threads, &s->team, err);
    if (status == HEPTA_OK && s->cache_type == HEPTA_CACHE_Q8) {
        status = rotation_create(model->info.head_dim, HEAD_ROTATION_SEED, &s->head_rotation, err);
    }
    if (status == HEPTA_OK && on_gpu) {
        status = create_on_gpu(s, err);
    }
    if (status == HEPTA_OK && !allocate_buffers(s)) {
        status = error_set(err, HEPTA_ERROR_MEMORY,
                           "no memory for a session of %u sequences with a context of %u tokens",
                           s->n_sequences, s->n_ctx);
    }
    if (status != HEPTA_OK) {
        hepta_session_free(s);
        return status;
    }
    *out = s;
    return HEPTA_OK;
}

hepta_status hepta_session_create(const hepta_model *model, const hepta_session_options *options,
                                  hepta_session **out, hepta_error *err) {
    return llama_session_create(model, options, false, out, err);
}

void hepta_session_free(hepta_session *session) {
    if (session != NULL) {
        if (session->gpu != NULL) {
            session->model->gpu->session_free(session->gpu);
        }
        team_free(session->team);
        rotation_free(session->head_rotation);
        memory_free(session->memory);
        memory_free(session);
    }
}

/* The tokens of a call: `batch`, or `ids` for sequence 0, of which logits are wanted from number
 * first_logits on. */
typedef struct call {
    const hepta_batch_token *batch;
    const int32_t *ids;
    size_t n, first_logits;
} call;

static hepta_batch_token token_of(const call *c, size_t i) {
    return c->batch != NULL ? c->batch[i] : (hepta_batch_token){c->ids[i], 0, i >= c->first_logits};
}

/* The error of sequence `sequence`, in which the call's tokens have no room. */
static hepta_status no_room(const hepta_session *s, const call *c, uint32_t sequence,
                            hepta_error *err) {
    size_t n = 0;
    for (size_t i = 0; i < c->n; i++) {
        n += token_of(c, i).sequence == sequence;
    }
    return error_set(err, HEPTA_ERROR_CONTEXT,
                     "%zu tokens after position %u of sequence %u do not fit the context of %u", n,
                     s->positions[sequence], sequence, s->n_ctx);
}

/* Whether the model knows the tokens and the sequences have room for them. */
static hepta_status check_call(hepta_session *s, const call *c, hepta_error *err) {
    const uint32_t n_vocab = s->model->info.n_vocab;
    for (size_t i = 0; i < c->n; i++) {
        hepta_batch_token t = token_of(c, i);
        if (t.token < 0 || (uint32_t)t.token >= n_vocab) {
            return error_set(err, HEPTA_ERROR_ARGUMENT,
                             "token %zu of the call has the id %" PRId32 ", expected 0 to %u", i,
                             t.token, n_vocab - 1);
        }
        if (t.sequence >= s->n_sequences) {
            return error_set(err, HEPTA_ERROR_ARGUMENT,
                             "token %zu of the call is for sequence %u, expected 0 to %u", i,
                             t.sequence, s->n_sequences - 1);
        }
    }
    /* Positions are counted up to see whether all have room, and down again. */
    size_t n = 0;
    while (n < c->n && s->positions[token_of(c, n).sequence] < s->n_ctx) {
        s->positions[token_of(c, n++).sequence]++;
    }
    for (size_t i = 0; i < n; i++) {
        s->positions[token_of(c, i).sequence]--;
    }
    return n == c->n ? HEPTA_OK : no_room(s, c, token_of(c, n).sequence, err);
}

/* Makes tokens begin .. begin + n - 1 of the call the session's chunk, those whose logits are
 * wanted last; returns the number of those. */
static uint32_t fill_chunk(hepta_session *s, const call *c, size_t begin, uint32_t n) {
    uint32_t n_logits = 0;
    for (uint32_t i = 0; i < n; i++) {
        n_logits += token_of(c, begin + i).logits;
    }
    gpu_token *plain = s->chunk, *wanted = s->chunk + (n - n_logits);
    for (uint32_t i = 0; i < n; i++) {
        hepta_batch_token t = token_of(c, begin + i);
        gpu_token **next = t.logits ? &wanted : &plain;
        *(*next)++ = (gpu_token){t.token, t.sequence, s->positions[t.sequence]++};
    }
    return n_logits;
}

static hepta_status eval(hepta_session *s, const call *c, float *logits, hepta_error *err) {
    hepta_status status = check_call(s, c, err);
    for (size_t done = 0; status == HEPTA_OK && done < c->n;) {
        uint32_t n = c->n - done < s->n_batch ? (uint32_t)(c->n - done) : s->n_batch;
        uint32_t n_logits = fill_chunk(s, c, done, n);
        status = llama_forward(s, n, n_logits, logits, err);
        if (n_logits > 0) {
            logits += (size_t)n_logits * s->model->info.n_vocab;
        }
        done += n;
        for (size_t i = 0; i < done && status != HEPTA_OK; i++) {
            s->positions[token_of(c, i).sequence]--;
        }
    }
    return status;
}

hepta_status hepta_session_eval(hepta_session *session, const int32_t *tokens, size_t n,
                                float *logits, bool all, hepta_error *err) {
    if (tokens == NULL || n == 0) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "no tokens to evaluate");
    }
    const call c = {.ids = tokens, .n = n, .first_logits = logits == NULL ? n : all ? 0 : n - 1};
    return eval(session, &c, logits, err);
}

hepta_status hepta_session_eval_batch(hepta_session *session, const hepta_batch_token *tokens,
                                      size_t n, float *logits, hepta_error *err) {
    if (tokens == NULL || n == 0) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "no tokens to evaluate");
    }
    for (size_t i = 0; i < n && logits == NULL; i++) {
        if (tokens[i].logits) {
            return error_set(err, HEPTA_ERROR_ARGUMENT,
                             "token %zu of the call wants logits, but there is no place for them",
                             i);
        }
    }
    return eval(session, &(call){.batch = tokens, .n = n}, logits, err);
}

void hepta_session_truncate(hepta_session *session, uint32_t sequence, uint32_t n_keep) {
    if (sequence < session->n_sequences && n_keep < session->positions[sequence]) {
        session->positions[sequence] = n_keep;
    }
}

uint32_t hepta_session_position(const hepta_session *session, uint32_t sequence) {
    return sequence < session->n_sequences ? session->positions[sequence] : 0;
}

uint32_t hepta_session_context(const hepta_session *session) {
    return session->n_ctx;
}

size_t hepta_session_memory(const hepta_session *session) {
    const rotation *r = session->head_rotation;
    size_t tables = r == NULL ? 0 : sizeof *r + ((r->m > 1 ? (size_t)r->m * r->m : 0) + r->n) * 4;
    const size_t on_gpu =
        session->gpu != NULL ? (size_t)session->model->gpu->session_bytes(session->gpu) : 0;
    return sizeof *session + session->memory_bytes + tables + on_gpu;
}
