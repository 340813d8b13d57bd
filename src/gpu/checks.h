/*
 * checks.h - each kernel alone, from and to host memory, for tests (gpu_checks).
 */
#ifndef GPU_CHECKS_H
#define GPU_CHECKS_H

#include "gpu/forward.h"

/* Memory of a check, and the device it is on. */
typedef struct check {
    dev_blocks blocks;
    gpu_device_info device;
    dev_stream stream;
    hepta_error *err;
} check;

static hepta_status check_begin(check *c, hepta_error *err) {
    *c = check();
    c->err = err;
    TRY(dev_open(0, &c->device, err));
    return dev_stream_create(&c->stream, err);
}

static hepta_status check_end(check *c, hepta_status status) {
    blocks_free(&c->blocks);
    dev_stream_free(c->stream);
    return status;
}

/* A copy on the device; NULL stays NULL. */
template <class T> static hepta_status check_in(check *c, const T *from, uint64_t n, T **out) {
    void *p = NULL;
    if (from != NULL) {
        TRY(blocks_copy(&c->blocks, from, n * sizeof(T), &p, c->err));
    }
    *out = (T *)p;
    return HEPTA_OK;
}
template <class T> static hepta_status check_room(check *c, uint64_t n, T **out) {
    void *p;
    TRY(blocks_add(&c->blocks, n * sizeof(T), &p, c->err));
    *out = (T *)p;
    return HEPTA_OK;
}
template <class T> static hepta_status check_out(check *c, T *to, const T *from, uint64_t n) {
    TRY(dev_download(to, from, n * sizeof(T), c->stream, c->err));
    return dev_wait(c->stream, c->err);
}

/* ---- Products ---------------------------------------------------------- */

static hepta_status run_matmul(check *c, const packed_matrix *m,
                               const struct code_table *const *tables, const activation *x,
                               uint32_t n, float *y) {
    dev_matrix w;
    const code_lookups *codes;
    TRY(upload_codes(&c->blocks, tables, &codes, c->err));
    TRY(upload_matrix(&c->blocks, m, &w, c->err));
    const uint32_t stride = w.n_groups * GPU_GROUP;
    int8_t *q = (int8_t *)calloc(n, stride), *dev_q = NULL;
    float *scale = (float *)calloc(n, sizeof *scale), *dev_scale = NULL, *dev_y = NULL;
    int *sum = (int *)calloc(n, sizeof *sum), *dev_sum = NULL;
    for (uint32_t t = 0; t < n && q != NULL && scale != NULL && sum != NULL; t++) {
        for (uint32_t i = 0; i < m->n_cols; i++) {
            q[(size_t)t * stride + q_place(i)] = x[t].q[i];
        }
        scale[t] = x[t].scale, sum[t] = x[t].sum;
    }
    hepta_status status = q == NULL || scale == NULL || sum == NULL
                              ? fail(c->err, HEPTA_ERROR_MEMORY, "no memory for a check")
                              : HEPTA_OK;
    status = status != HEPTA_OK ? status : check_in(c, q, (uint64_t)n * stride, &dev_q);
    status = status != HEPTA_OK ? status : check_in(c, scale, n, &dev_scale);
    status = status != HEPTA_OK ? status : check_in(c, sum, n, &dev_sum);
    status = status != HEPTA_OK ? status : check_room(c, (uint64_t)n * m->n_rows, &dev_y);
    free(q), free(scale), free(sum);
    TRY(status);
    const dev_input in = {dev_q, dev_scale, dev_sum, stride, n};
    c->device.processors = 1; /* small matrices take the kernel for many tokens, too */
    TRY(multiply(c->stream, c->device, &w, &dev_y, 1, in, codes, c->err));
    return check_out(c, y, dev_y, (uint64_t)n * m->n_rows);
}

static hepta_status check_matmul(const packed_matrix *w, const struct code_table *const *codes,
                                 const activation *x, uint32_t n_tokens, float *y,
                                 hepta_error *err) {
    check c;
    TRY(check_begin(&c, err));
    return check_end(&c, run_matmul(&c, w, codes, x, n_tokens, y));
}

/* ---- Vectors ----------------------------------------------------------- */

static hepta_status run_embed(check *c, const packed_matrix *w,
                              const struct code_table *const *tables, const rotation *r,
                              uint32_t row, float *x) {
    embed_parameters p = {};
    const gpu_token token = {(int32_t)row, 0, 0};
    gpu_token *tokens;
    TRY(upload_codes(&c->blocks, tables, &p.codes, c->err));
    TRY(upload_matrix(&c->blocks, w, &p.w, c->err));
    TRY(upload_rotation(&c->blocks, r, &p.r, c->err));
    TRY(check_in(c, &token, 1, &tokens));
    p.tokens = tokens;
    TRY(check_room(c, r->n, &p.x));
    TRY(check_room(c, 2 * spread_bytes(r->n) / sizeof(float), &p.scratch));
    p.in_shared = spread_bytes(r->n) + 1024 <= c->device.shared_bytes;
    TRY(launch(c->stream, grid{1, 1, 1}, token_threads(r->n), p.in_shared ? spread_bytes(r->n) : 0,
               embed, p, c->err));
    return check_out(c, x, p.x, r->n);
}

static hepta_status check_embed(const packed_matrix *w, const struct code_table *const *codes,
                                const rotation *r, uint32_t row, float *x, hepta_error *err) {
    check c;
    TRY(check_begin(&c, err));
    return check_end(&c, run_embed(&c, w, codes, r, row, x));
}

static hepta_status run_angles(check *c, const double *frequency, uint32_t n, uint32_t position,
                               float *cosine, float *sine) {
    angle_parameters p = {};
    const gpu_token token = {0, 0, position};
    double *f;
    gpu_token *tokens;
    TRY(check_in(c, frequency, n, &f));
    TRY(check_in(c, &token, 1, &tokens));
    TRY(check_room(c, n, &p.cosine));
    TRY(check_room(c, n, &p.sine));
    p.frequency = f, p.n = n, p.tokens = tokens;
    TRY(launch(c->stream, grid{1, 1, 1}, 64, 0, angles, p, c->err));
    TRY(check_out(c, cosine, p.cosine, n));
    return check_out(c, sine, p.sine, n);
}

static hepta_status check_angles(const double *frequency, uint32_t n, uint32_t position,
                                 float *cosine, float *sine, hepta_error *err) {
    check c;
    TRY(check_begin(&c, err));
    return check_end(&c, run_angles(&c, frequency, n, position, cosine, sine));
}

static hepta_status run_prepare(check *c, gpu_prepare_case *t) {
    const uint32_t n = t->r->n;
    prepare_parameters p = {};
    float *y, *gain;
    TRY(upload_rotation(&c->blocks, t->r, &p.r, c->err));
    TRY(check_in(c, t->x, n, &p.x));
    TRY(check_in(c, t->y, n, &y));
    TRY(check_in(c, t->gain, n, &gain));
    p.mode = t->mode, p.y = y, p.gain = gain, p.eps = t->eps;
    p.q_stride = (n + GPU_GROUP - 1) / GPU_GROUP * GPU_GROUP;
    TRY(check_room(c, 2 * spread_bytes(n) / sizeof(float), &p.scratch));
    TRY(check_room(c, p.q_stride, &p.q));
    TRY(check_room(c, 1, &p.scale));
    TRY(check_room(c, 1, &p.sum));
    p.in_shared = spread_bytes(n) + 1024 <= c->device.shared_bytes;
    TRY(launch(c->stream, grid{1, 1, 1}, token_threads(n), p.in_shared ? spread_bytes(n) : 0,
               prepare, p, c->err));
    int8_t *q = (int8_t *)calloc(1, p.q_stride);
    if (q == NULL) {
        return fail(c->err, HEPTA_ERROR_MEMORY, "no memory for a check");
    }
    hepta_status status = check_out(c, q, p.q, p.q_stride);
    for (uint32_t i = 0; i < t->r->n_padded; i++) {
        t->q[i] = q[q_place(i)];
    }
    free(q);
    TRY(status);
    TRY(check_out(c, t->x, p.x, n));
    TRY(check_out(c, &t->scale, p.scale, 1));
    return check_out(c, &t->sum, p.sum, 1);
}

static hepta_status check_prepare(gpu_prepare_case *t, hepta_error *err) {
    check c;
    TRY(check_begin(&c, err));
    return check_end(&c, run_prepare(&c, t));
}

/* ---- Attention --------------------------------------------------------- */

static hepta_status room_for_cache(check *c, const gpu_attention_case *t, dev_cache *cache) {
    const uint64_t rows = (uint64_t)t->n_head_kv * t->n_pos;
    cache->type = t->type;
    cache->n_ctx = t->n_pos, cache->n_head_kv = t->n_head_kv, cache->head_dim = t->head_dim;
    cache->row_bytes = t->type == HEPTA_CACHE_Q8    ? (uint32_t)KV_ROW(t->head_dim)
                       : t->type == HEPTA_CACHE_F16 ? 2 * t->head_dim
                                                    : 4 * t->head_dim;
    TRY(check_room(c, rows * cache->row_bytes, &cache->k));
    TRY(check_room(c, rows * cache->row_bytes, &cache->v));
    TRY(check_room(c, rows, &cache->k_scale));
    return check_room(c, rows, &cache->v_scale);
}

/* RoPE, the cache's rotation and the cache for n tokens; q is NULL, or the tokens' queries. */
static hepta_status run_rope(check *c, const gpu_attention_case *t, rope_parameters p,
                             const uint32_t *positions, uint32_t n, float *q) {
    const uint32_t half = t->n_rot / 2;
    const uint64_t items = (uint64_t)t->n_pos * t->n_head_kv * t->head_dim;
    gpu_token *tokens = (gpu_token *)calloc(n, sizeof *tokens), *dev_tokens = NULL;
    float *angle = (float *)calloc(2 * (size_t)n * half + 1, sizeof *angle), *dev_angle = NULL;
    float *k = NULL, *v = NULL;
    if (tokens == NULL || angle == NULL) {
        free(tokens), free(angle);
        return fail(c->err, HEPTA_ERROR_MEMORY, "no memory for a check");
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t position = positions == NULL ? i : positions[i];
        tokens[i].position = position;
        memcpy(angle + (size_t)i * half, t->cosine + (size_t)position * half, half * 4);
        memcpy(angle + (size_t)(n + i) * half, t->sine + (size_t)position * half, half * 4);
    }
    hepta_status status = check_in(c, tokens, n, &dev_tokens);
    status =
        status != HEPTA_OK ? status : check_in(c, angle, 2 * (uint64_t)n * half + 1, &dev_angle);
    free(tokens), free(angle);
    TRY(status);
    TRY(check_in(c, t->k, items, &k));
    TRY(check_in(c, t->v, items, &v));
    p.tokens = dev_tokens, p.q = q, p.k = k, p.v = v;
    p.cosine = dev_angle, p.sine = dev_angle + (size_t)n * half;
    p.n_rot = t->n_rot, p.interleaved = t->interleaved;
    p.first = q == NULL ? n : 0;
    const grid blocks = {n, q == NULL ? t->n_head + t->n_head_kv : t->n_head, 1};
    return launch(c->stream, blocks, HEAD_THREADS, 0, rope_and_store, p, c->err);
}

static hepta_status run_attention(check *c, const gpu_attention_case *t) {
    const uint32_t n = t->n_tokens, group = t->n_head / t->n_head_kv;
    const uint64_t items = (uint64_t)n * t->n_head * t->head_dim;
    rope_parameters p = {};
    attend_parameters a = {};
    float *q, *out, *partial;
    gpu_token *tokens = (gpu_token *)calloc(n, sizeof *tokens), *dev_tokens = NULL;
    attend_tile *tiles = (attend_tile *)calloc(n, sizeof *tiles), *dev_tiles = NULL;
    hepta_status status = tokens == NULL || tiles == NULL
                              ? fail(c->err, HEPTA_ERROR_MEMORY, "no memory for a check")
                              : HEPTA_OK;
    uint32_t n_tiles = 0;
    if (status == HEPTA_OK) {
        for (uint32_t i = 0; i < n; i++) {
            tokens[i].position = t->positions[i];
        }
        n_tiles = cut_tiles(tokens, 0, n, attend_tile_tokens(group, t->head_dim), tiles);
        status = check_in(c, tokens, n, &dev_tokens);
        status = status != HEPTA_OK ? status : check_in(c, tiles, n_tiles, &dev_tiles);
    }
    free(tokens), free(tiles);
    TRY(status);
    TRY(room_for_cache(c, t, &p.cache));
    TRY(check_in(c, t->q, items, &q));
    TRY(check_room(c, (uint64_t)n * t->n_head * KV_ROW(t->head_dim), &p.q8));
    TRY(check_room(c, (uint64_t)n * t->n_head, &p.q8_scale));
    p.n_head = t->n_head;
    p.score_scale = 1.0f / __builtin_sqrtf((float)t->head_dim);
    if (t->r != NULL) {
        TRY(upload_rotation(&c->blocks, t->r, &p.r, c->err));
    }
    TRY(run_rope(c, t, p, NULL, t->n_pos, NULL));
    TRY(run_rope(c, t, p, t->positions, n, q));
    a.n_blocks = (t->n_pos + ATTEND_POSITIONS - 1) / ATTEND_POSITIONS;
    TRY(check_room(c, items, &out));
    TRY(check_room(c, (uint64_t)n * t->n_head * a.n_blocks * (t->head_dim + 2), &partial));
    a.cache = p.cache, a.tokens = dev_tokens, a.tiles = dev_tiles, a.n_head = t->n_head;
    a.q = q, a.q8 = p.q8, a.q8_scale = p.q8_scale, a.scale = p.score_scale;
    a.out = out, a.partial = partial;
    TRY(launch_attention(c->stream, a, n_tiles, t->split, 0, n, c->err));
    return check_out(c, t->out, out, items);
}

static hepta_status check_attention(const gpu_attention_case *t, hepta_error *err) {
    check c;
    TRY(check_begin(&c, err));
    return check_end(&c, run_attention(&c, t));
}

#endif
