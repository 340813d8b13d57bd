/*
 * device.c - where a model computes: its first layers on a GPU, or all of it on the CPU
 * (hepta_model_use_device; docs/GPU.md).
 *
 * The logits have the same bits wherever the layers are, so that this is a choice of speed and
 * memory alone.
 */
#include "model/llama.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP = 64, ALIGNMENT = 256 }; /* of rows, of parts in the device's memory */

const char *hepta_model_device(const hepta_model *model) {
    return model->device[0] != '\0' ? model->device : "CPU";
}

/* "cuda:1" to "cuda" and 1. */
static hepta_status parse_device(const char *text, char *name, size_t n, int *number,
                                 hepta_error *err) {
    const size_t length = strcspn(text, ":");
    char *end = NULL;
    *number = 0;
    bool valid = length > 0 && length < n;
    for (size_t i = 0; i < length; i++) {
        valid = valid && islower((unsigned char)text[i]);
    }
    if (valid && text[length] == ':') {
        const unsigned long value = strtoul(text + length + 1, &end, 10);
        valid = isdigit((unsigned char)text[length + 1]) && *end == '\0' && value < 1024;
        *number = (int)value;
    }
    if (!valid) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "device \"%.40s\": expected cpu, auto, or cuda or cuda:N", text);
    }
    snprintf(name, n, "%.*s", (int)length, text);
    return HEPTA_OK;
}

/* ---- Sizes ------------------------------------------------------------- */

/* Bytes that a matrix takes on the device. */
static uint64_t matrix_bytes(const matrix *a) {
    const uint64_t rows = round_up(a->n_rows, PACKED_STRIP), cols = round_up(a->n_cols, GROUP);
    return round_up(rows * cols / 16 * a->packed.half_bits, ALIGNMENT) +
           round_up(2 * rows, ALIGNMENT);
}

enum { LAYER_MATRICES = 7 };
static void layer_matrices(const llama_layer *l, const matrix *out[LAYER_MATRICES]) {
    const matrix *all[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->gate, &l->up, &l->down};
    memcpy(out, all, sizeof all);
}

static uint64_t layer_bytes(const hepta_model *m, uint32_t layer) {
    const matrix *a[LAYER_MATRICES];
    uint64_t n = 2 * round_up((uint64_t)m->info.n_embd * sizeof(float), ALIGNMENT);
    layer_matrices(&m->layers[layer], a);
    for (int i = 0; i < LAYER_MATRICES; i++) {
        n += matrix_bytes(a[i]);
    }
    return n;
}

static bool is_packed(const hepta_model *m) {
    bool packed = m->embedding.type == TENSOR_PACKED && m->head.type == TENSOR_PACKED;
    for (uint32_t layer = 0; layer < m->info.n_layer && packed; layer++) {
        const matrix *a[LAYER_MATRICES];
        layer_matrices(&m->layers[layer], a);
        for (int i = 0; i < LAYER_MATRICES; i++) {
            packed = packed && a[i]->type == TENSOR_PACKED;
        }
    }
    return packed;
}

/* How many layers go to the device, and how many of them stay there. */
typedef struct share {
    uint32_t n_layer, n_resident;
} share;

static hepta_status divide_layers(const hepta_model *m, const hepta_device_options *o,
                                  const gpu_device_info *device, share *out, hepta_error *err) {
    const uint32_t all = m->info.n_layer;
    const uint32_t wanted = o->layers == 0 || o->layers > all ? all : o->layers;
    const double budget = o->memory > 0 ? o->memory : 0.9 * (double)device->memory_free;
    const bool tied = m->head.source == m->embedding.source;
    const uint64_t embedding = matrix_bytes(&m->embedding);
    const uint64_t head = tied ? 0 : matrix_bytes(&m->head);
    uint64_t layers = 0, largest = 0;
    for (uint32_t i = 0; i < wanted; i++) {
        const uint64_t n = layer_bytes(m, i);
        layers += n;
        largest = n > largest ? n : largest;
    }
    *out = (share){wanted, wanted};
    uint64_t needed = embedding + (wanted == all ? head : 0) + layers;
    while (out->n_resident > 0 && (double)needed > budget) {
        if (o->stream && out->n_resident == wanted) {
            needed += 2 * largest; /* the slots that layers are copied to */
        } else if (!o->stream && out->n_resident == all) {
            needed -= head; /* follows the last layer */
        }
        needed -= layer_bytes(m, --out->n_resident);
    }
    if (!o->stream) {
        out->n_layer = out->n_resident;
    }
    if (out->n_layer == 0 || (double)needed > budget) {
        return error_set(err, HEPTA_ERROR_MEMORY,
                         "%.2f GiB of the GPU's memory hold no layer of this model beside its "
                         "embedding; give it more with --gpu-mem",
                         budget / 0x1p30);
    }
    if (o->layers != 0 && o->memory <= 0 && !o->stream && out->n_layer < wanted) {
        return error_set(err, HEPTA_ERROR_MEMORY,
                         "%u layers do not fit the %.2f GiB that are free on the GPU: %u do",
                         wanted, budget / 0x1p30, out->n_layer);
    }
    return HEPTA_OK;
}

/* ---- Loading ----------------------------------------------------------- */

static hepta_status load(hepta_model *m, const gpu_backend *b, int number, share s,
                         hepta_error *err) {
    const hepta_model_info *i = &m->info;
    gpu_layer *layers = memory_alloc(s.n_layer, sizeof *layers);
    if (layers == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for %u layers", s.n_layer);
    }
    for (uint32_t layer = 0; layer < s.n_layer; layer++) {
        const llama_layer *l = &m->layers[layer];
        layers[layer] = (gpu_layer){.attn_norm = l->attn_norm,
                                    .ffn_norm = l->ffn_norm,
                                    .wq = l->wq.packed,
                                    .wk = l->wk.packed,
                                    .wv = l->wv.packed,
                                    .wo = l->wo.packed,
                                    .gate = l->gate.packed,
                                    .up = l->up.packed,
                                    .down = l->down.packed};
    }
    gpu_model_source source = {.n_vocab = i->n_vocab,
                               .n_embd = i->n_embd,
                               .n_head = i->n_head,
                               .n_head_kv = i->n_head_kv,
                               .head_dim = i->head_dim,
                               .n_ff = i->n_ff,
                               .n_layer = s.n_layer,
                               .n_resident = s.n_resident,
                               .whole = s.n_layer == i->n_layer,
                               .norm_eps = m->norm_eps,
                               .rope_interleaved = m->rope_interleaved,
                               .n_rot = m->n_rot,
                               .rope_frequency = m->rope_frequency,
                               .embedding = m->embedding.packed,
                               .head = m->head.packed,
                               .output_norm = m->output_norm,
                               .layers = layers,
                               .of_embd = m->embedding.rotation,
                               .of_heads = m->layers[0].wo.rotation,
                               .of_ff = m->layers[0].down.rotation};
    for (int rate = 0; rate < GPU_N_RATES; rate++) {
        source.codes[rate] = code_table_get(CODE_MIN_RATE + rate);
    }
    hepta_status status = b->model_load(number, &source, &m->gpu_model, err);
    memory_free(layers);
    return status;
}

static hepta_status use_gpu(hepta_model *m, const char *name, int number,
                            const hepta_device_options *o, hepta_error *err) {
    const gpu_backend *b;
    gpu_device_info device;
    share s;
    hepta_status status;
    if (!is_packed(m)) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "a GPU runs quantized models alone; make one with `hepta quantize`");
    }
    if ((status = gpu_backend_load(name, &b, err)) != HEPTA_OK ||
        (status = b->device_info(number, &device, err)) != HEPTA_OK ||
        (status = divide_layers(m, o, &device, &s, err)) != HEPTA_OK ||
        (status = load(m, b, number, s, err)) != HEPTA_OK) {
        return status;
    }
    m->gpu = b;
    m->gpu_number = number;
    m->gpu_layers = s.n_layer;
    m->gpu_resident = s.n_resident;
    int n = snprintf(m->device, sizeof m->device, "%.100s (%s:%d), %u of %u layers, %.2f GiB",
                     device.name, b->name, number, s.n_layer, m->info.n_layer,
                     (double)b->model_bytes(m->gpu_model) / 0x1p30);
    if (s.n_resident < s.n_layer) {
        snprintf(m->device + n, sizeof m->device - (size_t)n, ", %u streamed",
                 s.n_layer - s.n_resident);
    }
    return HEPTA_OK;
}

hepta_status hepta_model_use_device(hepta_model *model, const hepta_device_options *options,
                                    hepta_error *err) {
    static const char *const names[] = {"cuda", "hip"};
    char name[32];
    int number;
    hepta_error why = {0};
    if (model == NULL || options == NULL || options->device == NULL) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "hepta_model_use_device: model, options or device is NULL");
    }
    if (model->gpu != NULL) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "the model is on %s already", model->device);
    }
    hepta_status status = parse_device(options->device, name, sizeof name, &number, err);
    if (status != HEPTA_OK || strcmp(name, "cpu") == 0) {
        return status;
    }
    if (strcmp(name, "auto") != 0) {
        return use_gpu(model, name, number, options, err);
    }
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        hepta_error this = {0};
        if (use_gpu(model, names[i], number, options, &this) == HEPTA_OK) {
            return HEPTA_OK;
        }
        why = i == 0 ? this : why;
    }
    snprintf(model->device, sizeof model->device, "CPU (no GPU: %.200s)", why.message);
    return HEPTA_OK;
}
