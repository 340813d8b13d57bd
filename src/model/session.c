/*
 * session.c - the KV cache and the buffers of one sequence (hepta_session_*).
 *
 * All memory is one block, sized and allocated when the session is created. A prompt is cut into
 * chunks of n_batch tokens; the cut has no influence on the result (forward.c).
 */
#include "model/llama.h"

#include <inttypes.h>

enum { DEFAULT_BATCH = 64, PIECE_ALIGNMENT = 64 };

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
    const uint64_t T = s->n_batch, heads = (uint64_t)i->n_head * i->head_dim;
    const uint64_t heads_kv = (uint64_t)i->n_head_kv * i->head_dim;
    const uint64_t item = s->cache_type == HEPTA_CACHE_F16 ? sizeof(uint16_t) : sizeof(float);
    /* n_layer, n_ctx < 2^32; heads_kv < 2^18: the products stay below 2^64 with T < 2^31 */
    const uint64_t cache_rows = (uint64_t)i->n_layer * s->n_ctx;
    void *k_cache, *v_cache, *x, *h, *q, *k, *v, *attention, *gate, *up, *cosine, *sine, *quantized,
        *activations, *scratch;
    const piece pieces[] = {
        {&k_cache, cache_rows, heads_kv * item},
        {&v_cache, cache_rows, heads_kv * item},
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
    s->k_cache = k_cache, s->v_cache = v_cache;
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

hepta_status hepta_session_create(const hepta_model *model, const hepta_session_options *options,
                                  hepta_session **out, hepta_error *err) {
    static const hepta_session_options defaults = {0};
    if (model == NULL || out == NULL) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "hepta_session_create: model or out is NULL");
    }
    options = options != NULL ? options : &defaults;
    if (options->threads < 0 || options->threads > TEAM_MAX_THREADS) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "threads is %d, expected 0 to %d",
                         options->threads, TEAM_MAX_THREADS);
    }
    if (options->cache_type != HEPTA_CACHE_F32 && options->cache_type != HEPTA_CACHE_F16) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "cache_type is %d, expected 0 (F32) or 1 (F16)",
                         (int)options->cache_type);
    }
    if (options->n_ctx > INT32_MAX || options->n_batch > INT32_MAX) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "n_ctx is %u and n_batch %u, expected at most 2147483647", options->n_ctx,
                         options->n_batch);
    }
    hepta_session *s = memory_alloc(1, sizeof *s);
    if (s == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for a session");
    }
    s->model = model;
    s->n_ctx = options->n_ctx != 0 ? options->n_ctx : model->info.n_ctx_train;
    s->n_batch = options->n_batch != 0 ? options->n_batch : DEFAULT_BATCH;
    s->n_batch = s->n_batch < s->n_ctx ? s->n_batch : s->n_ctx;
    s->cache_type = options->cache_type;
    s->width = llama_width(model);
    s->scratch_bytes = llama_scratch_bytes(model);
    int threads = options->threads != 0 ? options->threads : threads_default();
    hepta_status status = team_create(threads, &s->team, err);
    if (status == HEPTA_OK && !allocate_buffers(s)) {
        status = error_set(err, HEPTA_ERROR_MEMORY,
                           "no memory for a session with a context of %u tokens", s->n_ctx);
    }
    if (status != HEPTA_OK) {
        hepta_session_free(s);
        return status;
    }
    *out = s;
    return HEPTA_OK;
}

void hepta_session_free(hepta_session *session) {
    if (session != NULL) {
        team_free(session->team);
        memory_free(session->memory);
        memory_free(session);
    }
}

hepta_status hepta_session_eval(hepta_session *session, const int32_t *tokens, size_t n,
                                float *logits, bool all, hepta_error *err) {
    hepta_session *s = session;
    const uint32_t n_vocab = s->model->info.n_vocab;
    if (tokens == NULL || n == 0) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "no tokens to evaluate");
    }
    if (n > s->n_ctx - s->position) {
        return error_set(err, HEPTA_ERROR_CONTEXT,
                         "%zu tokens after position %u do not fit the context of %u", n,
                         s->position, s->n_ctx);
    }
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= n_vocab) {
            return error_set(err, HEPTA_ERROR_ARGUMENT,
                             "token %zu of the call has the id %" PRId32 ", expected 0 to %u", i,
                             tokens[i], n_vocab - 1);
        }
    }
    for (size_t done = 0; done < n;) {
        uint32_t chunk = n - done < s->n_batch ? (uint32_t)(n - done) : s->n_batch;
        uint32_t n_logits = logits == NULL ? 0 : all ? chunk : (done + chunk == n) ? 1 : 0;
        llama_forward(s, tokens + done, chunk,
                      all && logits != NULL ? logits + done * n_vocab : logits, n_logits);
        s->position += chunk;
        done += chunk;
    }
    return HEPTA_OK;
}

void hepta_session_truncate(hepta_session *session, uint32_t n_keep) {
    if (n_keep < session->position) {
        session->position = n_keep;
    }
}

uint32_t hepta_session_position(const hepta_session *session) {
    return session->position;
}

uint32_t hepta_session_context(const hepta_session *session) {
    return session->n_ctx;
}

size_t hepta_session_memory(const hepta_session *session) {
    return sizeof *session + session->memory_bytes;
}
