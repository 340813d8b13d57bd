/*
 * device_model.h - a model on a device: how matrices lie there, and which layers stay in host
 * memory.
 *
 * All of a layer's parts make one image: in the device's memory, or, for layers that are streamed,
 * in pinned host memory, from where they are copied to one of two slots of the device before each
 * use (forward.h). Rows are filled up to whole groups of 64 columns.
 */
#ifndef GPU_DEVICE_MODEL_H
#define GPU_DEVICE_MODEL_H

#include "gpu/attention.h"

constexpr uint32_t IMAGE_ALIGNMENT = 256, SLOTS = 2;

#define TRY(call)                                                                                  \
    do {                                                                                           \
        const hepta_status try_status_ = (call);                                                   \
        if (try_status_ != HEPTA_OK) {                                                             \
            return try_status_;                                                                    \
        }                                                                                          \
    } while (0)

/* Blocks of the device's memory that are freed together. */
typedef struct dev_blocks {
    void **list;
    size_t n, room;
    uint64_t bytes;
} dev_blocks;

static hepta_status blocks_add(dev_blocks *b, uint64_t n, void **out, hepta_error *err) {
    if (b->n == b->room) {
        const size_t room = b->room * 2 + 16;
        void **list = (void **)realloc(b->list, room * sizeof *list);
        if (list == NULL) {
            return fail(err, HEPTA_ERROR_MEMORY, "no memory for a list of %zu items", room);
        }
        b->list = list, b->room = room;
    }
    TRY(dev_alloc(out, n, err));
    b->list[b->n++] = *out;
    b->bytes += n;
    return HEPTA_OK;
}

static void blocks_free(dev_blocks *b) {
    while (b->n > 0) {
        dev_free(b->list[--b->n]);
    }
    free(b->list);
}

/* A copy of n bytes in the device's memory. */
static hepta_status blocks_copy(dev_blocks *b, const void *from, uint64_t n, void **out,
                                hepta_error *err) {
    TRY(blocks_add(b, n, out, err));
    TRY(dev_upload(*out, from, n, dev_stream(), err));
    return dev_wait(dev_stream(), err);
}

/* ---- Images ------------------------------------------------------------ */

typedef struct dev_layer {
    const float *attn_norm, *ffn_norm;
    dev_matrix wq, wk, wv, wo, gate, up, down;
} dev_layer;

/* A place in an image, for one part after the other; base may be NULL, to find the size. */
typedef struct image {
    uint8_t *base;
    uint64_t n;
} image;

static uint8_t *image_take(image *at, uint64_t n) {
    uint8_t *p = at->base != NULL ? at->base + at->n : NULL;
    at->n += (n + IMAGE_ALIGNMENT - 1) / IMAGE_ALIGNMENT * IMAGE_ALIGNMENT;
    return p;
}

static uint64_t code_bytes(uint32_t half_bits, uint32_t n_rows, uint32_t n_cols) {
    return (uint64_t)((n_rows + 15) / 16) * ((n_cols + GPU_GROUP - 1) / GPU_GROUP) *
           (16 * GPU_GROUP / 16 * half_bits);
}

static dev_matrix image_matrix(image *at, const packed_matrix *m) {
    dev_matrix w;
    w.half_bits = m->half_bits, w.n_rows = m->n_rows;
    w.n_groups = (m->n_cols + GPU_GROUP - 1) / GPU_GROUP;
    w.codes = image_take(at, code_bytes(m->half_bits, m->n_rows, m->n_cols));
    w.scales = image_take(at, (uint64_t)2 * ((m->n_rows + 15) / 16 * 16));
    return w;
}

/* The layer's parts in an image. */
static dev_layer image_layer(image *at, const gpu_model_source *s, const gpu_layer *l) {
    dev_layer d;
    d.attn_norm = (const float *)image_take(at, s->n_embd * sizeof(float));
    d.ffn_norm = (const float *)image_take(at, s->n_embd * sizeof(float));
    d.wq = image_matrix(at, &l->wq), d.wk = image_matrix(at, &l->wk);
    d.wv = image_matrix(at, &l->wv), d.wo = image_matrix(at, &l->wo);
    d.gate = image_matrix(at, &l->gate), d.up = image_matrix(at, &l->up);
    d.down = image_matrix(at, &l->down);
    return d;
}

/* Writes a matrix to its place w in a host image, which is zero. */
static void fill_matrix(const dev_matrix *w, const packed_matrix *m) {
    const uint32_t h = m->half_bits, n_blocks = m->n_cols / 16, ragged = n_blocks % 4;
    const uint64_t from_strip = (uint64_t)n_blocks * 16 * h,
                   to_strip = (uint64_t)w->n_groups * 64 * h;
    const uint64_t whole = (uint64_t)(n_blocks - ragged) * 16 * h;
    uint8_t *codes = (uint8_t *)(uintptr_t)w->codes, *scales = (uint8_t *)(uintptr_t)w->scales;
    for (uint32_t s = 0; s < (m->n_rows + 15) / 16; s++) {
        const uint8_t *from = m->codes + s * from_strip;
        uint8_t *to = codes + s * to_strip;
        memcpy(to, from, whole);
        for (uint32_t i = 0; i < h * 16 * ragged; i++) { /* plane, row, block */
            to[whole + i / (16 * ragged) * 64 + i / ragged % 16 * 4 + i % ragged] = from[whole + i];
        }
    }
    memcpy(scales, m->scales, (size_t)2 * m->n_rows);
}

static void fill_layer(const dev_layer *d, const gpu_model_source *s, const gpu_layer *l) {
    memcpy((void *)(uintptr_t)d->attn_norm, l->attn_norm, s->n_embd * sizeof(float));
    memcpy((void *)(uintptr_t)d->ffn_norm, l->ffn_norm, s->n_embd * sizeof(float));
    fill_matrix(&d->wq, &l->wq), fill_matrix(&d->wk, &l->wk), fill_matrix(&d->wv, &l->wv);
    fill_matrix(&d->wo, &l->wo), fill_matrix(&d->gate, &l->gate), fill_matrix(&d->up, &l->up);
    fill_matrix(&d->down, &l->down);
}

/* Brings the codes of a matrix, which are on the device, in the order that kernels want (decode.h).
 */
static hepta_status arrange_matrix(const dev_matrix &w, hepta_error *err) {
    const uint32_t n_tiles = (w.n_groups + GPU_TILE - 1) / GPU_TILE;
    return launch(dev_stream(), grid{(w.n_rows + 15) / 16 * n_tiles, 1, 1}, ARRANGE_THREADS, 0,
                  arrange, w, err);
}

static hepta_status arrange_layer(const dev_layer &l, hepta_error *err) {
    const dev_matrix all[] = {l.wq, l.wk, l.wv, l.wo, l.gate, l.up, l.down};
    for (const dev_matrix &w : all) {
        TRY(arrange_matrix(w, err));
    }
    return dev_wait(dev_stream(), err);
}

/* A matrix alone, in device memory of its own. */
static hepta_status upload_matrix(dev_blocks *b, const packed_matrix *m, dev_matrix *out,
                                  hepta_error *err) {
    image size = {};
    image_matrix(&size, m);
    uint8_t *host = (uint8_t *)calloc(1, size.n);
    void *device;
    if (host == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for a matrix of %llu bytes",
                    (unsigned long long)size.n);
    }
    image at = {host, 0};
    const dev_matrix w = image_matrix(&at, m);
    fill_matrix(&w, m);
    hepta_status status = blocks_copy(b, host, size.n, &device, err);
    free(host);
    TRY(status);
    at.base = (uint8_t *)device, at.n = 0;
    *out = image_matrix(&at, m);
    TRY(arrange_matrix(*out, err));
    return dev_wait(dev_stream(), err);
}

static hepta_status upload_rotation(dev_blocks *b, const rotation *r, dev_rotation *out,
                                    hepta_error *err) {
    void *signs, *hartley = NULL;
    TRY(blocks_copy(b, r->signs, r->n * sizeof(float), &signs, err));
    if (r->m > 1) {
        TRY(blocks_copy(b, r->hartley, (uint64_t)r->m * r->m * sizeof(float), &hartley, err));
    }
    *out = {r->n, r->m, r->pow2, (const float *)signs, (const float *)hartley, r->hadamard_scale};
    return HEPTA_OK;
}

static hepta_status upload_codes(dev_blocks *b, const struct code_table *const *tables,
                                 const code_lookups **out, hepta_error *err) {
    code_lookups host[GPU_N_RATES];
    void *device;
    for (int i = 0; i < GPU_N_RATES; i++) {
        host[i] = code_lookups_of(tables[i]);
    }
    TRY(blocks_copy(b, host, sizeof host, &device, err));
    *out = (const code_lookups *)device;
    return HEPTA_OK;
}

/* ---- The model --------------------------------------------------------- */

struct gpu_model {
    gpu_device_info device;
    int number;
    gpu_model_source source; /* its pointers to host memory are not used */
    dev_blocks blocks;
    dev_layer *layers;    /* (n_layer) */
    uint8_t **images;     /* (n_layer) in pinned host memory; NULL: resident */
    uint64_t image_bytes; /* of the largest streamed layer */
    uint8_t *slots[SLOTS];
    dev_matrix embedding, head;
    const float *output_norm;
    const double *rope_frequency;
    dev_rotation of_embd, of_heads, of_ff;
    const code_lookups *codes;
};

static void model_free(gpu_model *m) {
    if (m != NULL) {
        dev_use(m->number);
        for (uint32_t i = 0; m->images != NULL && i < m->source.n_layer; i++) {
            dev_host_free(m->images[i]);
        }
        blocks_free(&m->blocks);
        free(m->layers);
        free(m->images);
        free(m);
    }
}

static hepta_status load_resident(gpu_model *m, const gpu_model_source *s, uint32_t i,
                                  hepta_error *err) {
    image size = {};
    image_layer(&size, s, &s->layers[i]);
    uint8_t *host = (uint8_t *)calloc(1, size.n);
    void *device;
    if (host == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for layer %u: %llu bytes", i,
                    (unsigned long long)size.n);
    }
    image at = {host, 0};
    const dev_layer there = image_layer(&at, s, &s->layers[i]);
    fill_layer(&there, s, &s->layers[i]);
    hepta_status status = blocks_copy(&m->blocks, host, size.n, &device, err);
    free(host);
    TRY(status);
    at.base = (uint8_t *)device, at.n = 0;
    m->layers[i] = image_layer(&at, s, &s->layers[i]);
    return arrange_layer(m->layers[i], err);
}

/* A streamed layer: its image in pinned memory, its parts in the slot that it will be copied to,
 * where it is arranged. */
static hepta_status load_streamed(gpu_model *m, const gpu_model_source *s, uint32_t i,
                                  hepta_error *err) {
    void *host;
    TRY(dev_host_alloc(&host, m->image_bytes, err));
    m->images[i] = (uint8_t *)host;
    memset(host, 0, m->image_bytes);
    image at = {m->images[i], 0};
    const dev_layer there = image_layer(&at, s, &s->layers[i]);
    fill_layer(&there, s, &s->layers[i]);
    uint8_t *slot = m->slots[i % SLOTS];
    at.base = slot, at.n = 0;
    m->layers[i] = image_layer(&at, s, &s->layers[i]);
    TRY(dev_upload(slot, host, m->image_bytes, dev_stream(), err));
    TRY(arrange_layer(m->layers[i], err));
    TRY(dev_download(host, slot, m->image_bytes, dev_stream(), err));
    return dev_wait(dev_stream(), err);
}

static hepta_status load_layers(gpu_model *m, const gpu_model_source *s, hepta_error *err) {
    m->layers = (dev_layer *)calloc(s->n_layer, sizeof *m->layers);
    m->images = (uint8_t **)calloc(s->n_layer, sizeof *m->images);
    if (m->layers == NULL || m->images == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for %u layers", s->n_layer);
    }
    for (uint32_t i = s->n_resident; i < s->n_layer; i++) {
        image size = {};
        image_layer(&size, s, &s->layers[i]);
        m->image_bytes = size.n > m->image_bytes ? size.n : m->image_bytes;
    }
    for (uint32_t i = 0; i < SLOTS && s->n_resident < s->n_layer; i++) {
        void *slot;
        TRY(blocks_add(&m->blocks, m->image_bytes, &slot, err));
        m->slots[i] = (uint8_t *)slot;
    }
    for (uint32_t i = 0; i < s->n_layer; i++) {
        TRY(i < s->n_resident ? load_resident(m, s, i, err) : load_streamed(m, s, i, err));
    }
    return HEPTA_OK;
}

static hepta_status load_parts(gpu_model *m, const gpu_model_source *s, hepta_error *err) {
    void *p;
    TRY(upload_codes(&m->blocks, s->codes, &m->codes, err));
    TRY(upload_rotation(&m->blocks, s->of_embd, &m->of_embd, err));
    TRY(upload_rotation(&m->blocks, s->of_heads, &m->of_heads, err));
    TRY(upload_rotation(&m->blocks, s->of_ff, &m->of_ff, err));
    TRY(blocks_copy(&m->blocks, s->rope_frequency, s->n_rot / 2 * sizeof(double), &p, err));
    m->rope_frequency = (const double *)p;
    TRY(upload_matrix(&m->blocks, &s->embedding, &m->embedding, err));
    if (s->whole) {
        TRY(blocks_copy(&m->blocks, s->output_norm, s->n_embd * sizeof(float), &p, err));
        m->output_norm = (const float *)p;
        m->head = m->embedding;
        if (s->head.codes != s->embedding.codes) {
            TRY(upload_matrix(&m->blocks, &s->head, &m->head, err));
        }
    }
    return load_layers(m, s, err);
}

static hepta_status model_load(int number, const gpu_model_source *s, gpu_model **out,
                               hepta_error *err) {
    if (s->head_dim > GPU_MAX_HEAD_DIM) {
        return fail(err, HEPTA_ERROR_UNSUPPORTED,
                    "heads of %u items: the GPU's kernels take up to %d", s->head_dim,
                    (int)GPU_MAX_HEAD_DIM);
    }
    gpu_model *m = (gpu_model *)calloc(1, sizeof *m);
    if (m == NULL) {
        return fail(err, HEPTA_ERROR_MEMORY, "no memory for a model on the GPU");
    }
    m->source = *s;
    m->number = number;
    hepta_status status = dev_open(number, &m->device, err);
    if (status == HEPTA_OK) {
        status = load_parts(m, s, err);
    }
    if (status != HEPTA_OK) {
        model_free(m);
        return status;
    }
    *out = m;
    return HEPTA_OK;
}

static uint64_t model_bytes(const gpu_model *m) {
    return m->blocks.bytes;
}

#endif
