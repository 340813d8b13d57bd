/*
 * quantize.c - any supported model to one .hepta file: rotate, scale, encode, write.
 *
 * Each row w of a matrix becomes  w' = H w  (kernels.h, rotation), so that  w' . (H x) = w . x,
 * and then symbols of the trellis code (code/code.h) or int8 with one bfloat16 scale. Rows are
 * independent; a few hundred at a time are in memory, and the codes of the output head.
 *
 * A text passes through the unquantized model (calibrate.h); when the inputs of a layer are known,
 * its matrices are coded such that the outputs for this text change least (feedback.h), and
 * written: tensors lie in the file in the order of the pass.
 *
 * Invariant: the output is a function of the input's weights and metadata and of the options
 * alone. Rows do not depend on their neighbours in a chunk, sums run in index order, and the
 * encoder is integer arithmetic (docs/NUMERICS.md).
 */
#include "base/base.h"
#include "code/code.h"
#include "quantize/feedback.h"
#include "quantize/head.h"
#include "quantize/plan.h"
#include "quantize/quantizer.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ROWS_PER_THREAD = 64, MAX_THREADS = 4096, PLAN_TOKENS = 4096, LEAST_TOKENS = 2048 };

static const effort efforts[] = {
    [HEPTA_EFFORT_GOOD] = {16384, 2e14, 128, 3, 1.06, true, {2048, 3e13}},
    [HEPTA_EFFORT_FAST] = {4096, 1.4e13, 32, 2, 1.06, false, {512, 1e12}},
    [HEPTA_EFFORT_BEST] = {32768, 1e300, 512, 4, 1.05, true, {2048, 1e300}},
};

/* The engine alone reads no text: rows are then rounded for themselves. */
#ifdef HEPTA_ENGINE_ONLY
static const bool calibrates = false;
#else
static const bool calibrates = true;
#endif

const uint64_t quantize_rotation_seed = 0x48657074613335u;

/* Tells the kernel that these pages of the input are no longer needed: memory stays bounded. */
static void release_pages(const uint8_t *data, uint64_t n) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)data + (uintptr_t)n) / page * page;
    if (begin < end) {
        (void)madvise((void *)begin, end - begin, MADV_DONTNEED);
    }
}

static hepta_status progress(quantizer *q, const char *what) {
    if (q->options->progress != NULL &&
        !q->options->progress(q->options->progress_context, what, q->n_done, q->n_weights)) {
        return error_set(q->err, HEPTA_ERROR_INTERRUPTED, "interrupted at %s", what);
    }
    return HEPTA_OK;
}

static hepta_status rotation_for(quantizer *q, uint32_t n, rotation **out) {
    size_t n_slots = sizeof q->rotations / sizeof q->rotations[0], i = 0;
    while (i < n_slots && q->rotations[i] != NULL && q->rotations[i]->n != n) {
        i++;
    }
    if (i == n_slots) { /* more widths than slots: the last one gives way */
        rotation_free(q->rotations[--i]);
        q->rotations[i] = NULL;
    }
    if (q->rotations[i] == NULL) {
        hepta_status status = rotation_create(n, quantize_rotation_seed, &q->rotations[i], q->err);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    *out = q->rotations[i];
    return HEPTA_OK;
}

/* ---- Tensors ----------------------------------------------------------- */

/* Bytes of one row of the source tensor. */
static uint64_t source_row_bytes(const tensor *t) {
    return t->ne[1] == 0 ? 0 : t->n_bytes / (t->ne[1] * t->ne[2] * t->ne[3]);
}

static void put_scale(uint8_t *scales, uint64_t row, float scale) {
    const uint16_t s = bfloat_from_float(scale); /* exact: it came from one */
    scales[2 * row] = (uint8_t)s;
    scales[2 * row + 1] = (uint8_t)(s >> 8);
}

static hepta_status write_packed(quantizer *q, const tensor *t, uint32_t half_bits) {
    rotation *r = NULL;
    hepta_status status = rotation_for(q, (uint32_t)t->ne[0], &r);
    if (status != HEPTA_OK) {
        return status;
    }
    const uint64_t n_rows = t->ne[1], n_padded_rows = round_up(n_rows, PACKED_STRIP);
    const uint32_t chunk_rows = (uint32_t)q->threads * ROWS_PER_THREAD;
    const size_t row_bytes = (size_t)r->n_padded / CODE_BLOCK * half_bits;
    chunk c;
    status = chunk_create(q, t->name, chunk_rows, r->n_padded, row_bytes, &c);
    uint8_t *packed = memory_alloc(chunk_rows, row_bytes);
    uint8_t *scales = memory_alloc((size_t)n_padded_rows, 2);
    if (status == HEPTA_OK && (packed == NULL || scales == NULL)) {
        status = error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory quantizing %s", t->name);
    }
    for (uint64_t first = 0; first < n_rows && status == HEPTA_OK; first += chunk_rows) {
        uint32_t n = n_rows - first < chunk_rows ? (uint32_t)(n_rows - first) : chunk_rows;
        status = load_rows(q, t, r, NULL, first, n, &c);
        if (status == HEPTA_OK) {
            status = encode_rows(q, half_bits, r, n, &c, row_bytes);
        }
        if (status != HEPTA_OK) {
            break;
        }
        uint32_t n_strip_rows = (uint32_t)round_up(n, PACKED_STRIP);
        memset(c.code + n * row_bytes, 0, (n_strip_rows - n) * row_bytes);
        for (uint32_t i = 0; i < n_strip_rows; i++) {
            packed_put_row(half_bits, r->n_padded / CODE_BLOCK, i, c.code + i * row_bytes, packed);
        }
        for (uint32_t i = 0; i < n; i++) {
            put_scale(scales, first + i, c.scale[i]);
        }
        status = hepta_writer_write(q->out, packed, n_strip_rows * row_bytes, q->err);
        release_pages(t->data + first * source_row_bytes(t), n * source_row_bytes(t));
        q->n_done += (uint64_t)n * t->ne[0];
        status = status == HEPTA_OK ? progress(q, t->name) : status;
    }
    release_pages(t->data, t->n_bytes); /* GPTQ and AWQ rows lie across all of it */
    if (status == HEPTA_OK) {
        status = hepta_writer_write(q->out, scales, (size_t)n_padded_rows * 2, q->err);
    }
    chunk_free(&c);
    memory_free(packed);
    memory_free(scales);
    return status;
}

/* Rows of a group of the head, whose feedback q has, to their places. */
static hepta_status encode_group(quantizer *q, const tensor *t, uint32_t half_bits,
                                 const rotation *r, const uint32_t *rows, uint32_t n_rows, chunk *c,
                                 uint8_t *packed, uint8_t *scales) {
    const uint32_t chunk_rows = (uint32_t)q->threads * ROWS_PER_THREAD;
    const size_t n_blocks = r->n_padded / CODE_BLOCK, row_bytes = n_blocks * half_bits;
    hepta_status status = HEPTA_OK;
    for (uint32_t first = 0; first < n_rows && status == HEPTA_OK; first += chunk_rows) {
        const uint32_t n = n_rows - first < chunk_rows ? n_rows - first : chunk_rows;
        status = load_rows(q, t, r, rows + first, 0, n, c);
        if (status == HEPTA_OK) {
            status = encode_rows(q, half_bits, r, n, c, row_bytes);
        }
        for (uint32_t i = 0; i < n && status == HEPTA_OK; i++) {
            packed_put_row(half_bits, n_blocks, rows[first + i], c->code + i * row_bytes, packed);
            put_scale(scales, rows[first + i], c->scale[i]);
        }
        q->n_done += (uint64_t)n * t->ne[0];
        status = status == HEPTA_OK ? progress(q, t->name) : status;
    }
    return status;
}

static hepta_status poll_head(void *context) {
    return progress(context, "the output head");
}

/* The output head: groups of its rows with moments of their own. The whole tensor is in memory. */
static hepta_status write_head(quantizer *q, const tensor *t, uint32_t half_bits,
                               const moments *m) {
    const rotation *r = m->rotation;
    const size_t n_padded_rows = (size_t)round_up(t->ne[1], PACKED_STRIP);
    const size_t row_bytes = (size_t)r->n_padded / CODE_BLOCK * half_bits;
    head_groups *g = NULL;
    chunk c = {.x = NULL};
    uint8_t *packed = memory_alloc(n_padded_rows, row_bytes);
    uint8_t *scales = memory_alloc(n_padded_rows, 2);
    float *h = memory_alloc((size_t)m->n * m->n, sizeof *h);
    hepta_status status;
    if (packed == NULL || scales == NULL || h == NULL) {
        status = error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory quantizing %s", t->name);
        goto done;
    }
    status = head_groups_create(t, m, q->kernels, q->threads, poll_head, q, &g, q->err);
    if (status == HEPTA_OK) {
        status = chunk_create(q, t->name, (uint32_t)q->threads * ROWS_PER_THREAD, r->n_padded,
                              row_bytes, &c);
    }
    for (uint32_t i = 0; status == HEPTA_OK && i < g->n; i++) {
        moments own;
        status = progress(q, t->name);
        if (status == HEPTA_OK) {
            status = head_moments(g, i, m, q->kernels, q->threads, h, &own, q->err);
        }
        if (status == HEPTA_OK) {
            status =
                feedback_create(&own, q->effort->lag, q->kernels, q->threads, &q->feedback, q->err);
        }
        if (status == HEPTA_OK) {
            q->moments = &own;
            status = encode_group(q, t, half_bits, r, g->rows + g->first[i],
                                  g->first[i + 1] - g->first[i], &c, packed, scales);
        }
        q->moments = NULL;
        feedback_free(q->feedback);
        q->feedback = NULL;
    }
    if (status == HEPTA_OK) {
        status = hepta_writer_write(q->out, packed, n_padded_rows * row_bytes, q->err);
    }
    if (status == HEPTA_OK) {
        status = hepta_writer_write(q->out, scales, n_padded_rows * 2, q->err);
    }
    release_pages(t->data, t->n_bytes);
done:
    head_groups_free(g);
    chunk_free(&c);
    memory_free(packed);
    memory_free(scales);
    memory_free(h);
    return status;
}

static hepta_status write_f32(quantizer *q, const tensor *t) {
    uint64_t n = tensor_n_weights(t);
    float *x = memory_alloc((size_t)n, sizeof *x);
    if (x == NULL) {
        return error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory copying %s", t->name);
    }
    q->kernels->row_to_f32(t->type, t->data, (uint32_t)n, x);
    uint32_t bad = find_not_finite(x, (uint32_t)n);
    hepta_status status;
    if (bad < n) {
        status =
            error_set(q->err, HEPTA_ERROR_FORMAT, "%s: tensor %s has NaN or infinity at element %u",
                      t->file, t->name, bad);
    } else {
        status = hepta_writer_write(q->out, x, (size_t)n * sizeof *x, q->err);
    }
    memory_free(x);
    q->n_done += n;
    return status == HEPTA_OK ? progress(q, t->name) : status;
}

/* ---- The whole file ---------------------------------------------------- */

static hepta_status check_input(const container *c, const char *in_path, hepta_error *err) {
    if (c->kind == CONTAINER_HEPTA) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s is quantized already; quantize from the original weights", in_path);
    }
    if (container_find(c, "tokenizer.ggml.tokens") == NULL) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s comes without a tokenizer; name one with --tokenizer FILE", in_path);
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        if (!tensor_type_is_readable(t->type)) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: tensor %s has type %s; expected " TENSOR_READABLE_TYPES, t->file,
                             t->name, tensor_type_name(t->type));
        }
        bool is_vector = t->n_dims == 1 && t->ne[0] > 0 && t->ne[0] <= UINT32_MAX;
        bool is_matrix = t->n_dims == 2 && t->ne[0] > 0 && t->ne[1] > 0 && t->ne[1] <= UINT32_MAX;
        if (!is_vector && !(is_matrix && t->ne[0] <= TENSOR_PACKED_MAX_COLS)) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: tensor %s of %u dimensions (%llu, %llu): expected a vector or a "
                             "matrix of at most %d columns",
                             t->file, t->name, t->n_dims, (unsigned long long)t->ne[0],
                             (unsigned long long)t->ne[1], (int)TENSOR_PACKED_MAX_COLS);
        }
    }
    return HEPTA_OK;
}

/* The metadata of the input without what describes its old form, and the recipe of the new. */
static hepta_status set_metadata(container *c, const hepta_quantize_options *o,
                                 const uint32_t *half_bits, hepta_error *err) {
    static const char *const old[] = {"general.file_type", "general.quantization_version",
                                      "general.alignment", "split.no",
                                      "split.count",       "split.tensors.count"};
    for (size_t i = 0; i < sizeof old / sizeof old[0]; i++) {
        container_remove(c, old[i]);
    }
    int count[HALF_BITS_INT8 + 1] = {0};
    for (size_t i = 0; i < c->n_tensors; i++) {
        count[half_bits[i]]++;
    }
    char recipe[256];
    int n = snprintf(recipe, sizeof recipe, "hepta %s: rotation, %s", hepta_version(),
                     calibrates ? "error feedback, row scales fitted to it;"
                                : "rms scale per row refitted once;");
    for (uint32_t h = HALF_BITS_INT8; h >= HALF_BITS_MIN; h--) {
        if (count[h] > 0) {
            n += snprintf(recipe + n, sizeof recipe - (size_t)n, " %d x %g bits,", count[h],
                          h / 2.0);
        }
    }
    n += snprintf(recipe + n, sizeof recipe - (size_t)n, " %d x F32", count[0]);
    hepta_status status = container_set_string(c, "hepta.recipe", recipe, (size_t)n, err);
    double bits = o->bits;
    if (o->plan_path != NULL) { /* what it comes to */
        uint64_t n_weights = 0;
        for (size_t i = 0; i < c->n_tensors; i++) {
            n_weights += tensor_n_weights(&c->tensors[i]);
        }
        bits = (double)plan_bytes(c->tensors, c->n_tensors, half_bits) * 8 / (double)n_weights;
    }
    if (status == HEPTA_OK) {
        status = container_set_f32(c, "hepta.bits", (float)bits, err);
    }
    if (status == HEPTA_OK) {
        status = container_set_u64(c, "hepta.rotation.seed", quantize_rotation_seed, err);
    }
    char types[256];
    if (status == HEPTA_OK && container_source_types(c, types, sizeof types)) {
        status = container_set_string(c, "hepta.source.type", types, strlen(types), err);
    }
    return status;
}

/* What each tensor of `in` becomes in the output, in the order of the pass. */
static void describe_output(const quantizer *q, tensor *out) {
    for (size_t i = 0; i < q->in->n_tensors; i++) {
        const tensor *t = &q->in->tensors[q->order[i]];
        const uint32_t half_bits = q->half_bits[q->order[i]];
        out[i] = (tensor){.name = t->name,
                          .type = half_bits != 0 ? TENSOR_PACKED : TENSOR_F32,
                          .half_bits = half_bits,
                          .n_dims = t->n_dims};
        memcpy(out[i].ne, t->ne, sizeof out[i].ne);
        if (half_bits != 0) {
            (void)tensor_packed_bytes(half_bits, t->ne[1], t->ne[0], &out[i].n_bytes);
        } else {
            out[i].n_bytes = 4 * tensor_n_weights(t);
        }
    }
}

/* First the tensors that the pass does not multiply with, as they come, then the others. */
static void find_order(quantizer *q) {
    const container *in = q->in;
    const kv *count = container_find(in, "llama.block_count");
    q->n_layer = count != NULL ? (uint32_t)count->v.u : 0;
    const bool tied = container_tensor(in, "output.weight") == NULL;
    size_t n = 0;
    for (size_t i = 0; i < in->n_tensors; i++) {
        const tensor *t = &in->tensors[i];
        q->place[i] = plan_is_packed(t) ? calibration_place(t->name, q->n_layer, tied) : UINT32_MAX;
        if (q->place[i] == UINT32_MAX) {
            q->order[n++] = i;
        }
    }
    const size_t first = n; /* insertion sort: models name their layers in order */
    for (size_t i = 0; i < in->n_tensors; i++) {
        if (q->place[i] != UINT32_MAX) {
            size_t at = n++;
            for (; at > first && q->place[q->order[at - 1]] > q->place[i]; at--) {
                q->order[at] = q->order[at - 1];
            }
            q->order[at] = i;
        }
    }
}

/* Writes the next tensors of the order that have their place at `place`. */
static hepta_status write_place(quantizer *q, uint32_t place) {
    hepta_status status = HEPTA_OK;
    while (status == HEPTA_OK && q->n_written < q->in->n_tensors &&
           q->place[q->order[q->n_written]] == place) {
        const size_t i = q->order[q->n_written];
        const tensor *t = &q->in->tensors[i];
        status = q->half_bits[i] != 0 ? write_packed(q, t, q->half_bits[i]) : write_f32(q, t);
        q->n_written += status == HEPTA_OK;
    }
    return status;
}

static hepta_status on_moments(void *context, uint32_t layer, llama_input input, const moments *m) {
    quantizer *q = context;
    const effort *f = q->effort;
    const uint32_t place = layer * LLAMA_INPUTS + (uint32_t)input;
    const size_t next = q->order[q->n_written];
    hepta_status status;
    if (input == LLAMA_HEAD_IN && q->half_bits[next] != HALF_BITS_INT8) {
        status = write_head(q, &q->in->tensors[next], q->half_bits[next], m);
        q->n_written += status == HEPTA_OK;
        return status;
    }
    status = feedback_create(m, f->lag, q->kernels, q->threads, &q->feedback, q->err);
    if (status == HEPTA_OK) {
        q->moments = m;
        status = write_place(q, place);
    }
    feedback_free(q->feedback);
    q->feedback = NULL;
    q->moments = NULL;
    return status;
}

/* Of the calibration text. */
static uint32_t tokens_of(const quantizer *q) {
    const effort *f = q->effort;
    const double n = f->work / (double)q->n_weights;
    return n >= f->n_tokens ? f->n_tokens : n > LEAST_TOKENS ? (uint32_t)n : LEAST_TOKENS;
}

static bool wants_moments(void *context, uint32_t layer, llama_input input) {
    const quantizer *q = context;
    const uint32_t place = layer * LLAMA_INPUTS + (uint32_t)input;
    return q->n_written < q->in->n_tensors && q->place[q->order[q->n_written]] == place;
}

static hepta_status calibrated_pass(quantizer *q, uint32_t n_tokens, calibration_wants wants,
                                    calibration_fn fn, void *context) {
    calibration_options o = q->calibration;
    o.n_tokens = n_tokens;
    calibration *c = NULL;
    hepta_status status = calibration_open(&o, &c, q->err);
    if (status == HEPTA_OK) {
        status = calibration_run(c, wants, fn, context, q->err);
    }
    calibration_free(c);
    return status;
}

static hepta_status write_tensors(quantizer *q) {
    hepta_status status = write_place(q, UINT32_MAX);
    const bool looks = calibrates && (q->options->without & HEPTA_WITHOUT_FEEDBACK) == 0;
    while (!looks && status == HEPTA_OK && q->n_written < q->in->n_tensors) {
        status = write_place(q, q->place[q->order[q->n_written]]);
    }
    if (!looks) {
        return status;
    }
    return status == HEPTA_OK ? calibrated_pass(q, tokens_of(q), wants_moments, on_moments, q)
                              : status;
}

/* ---- Rates ------------------------------------------------------------- */

typedef struct savings {
    quantizer *q;
    double *saved; /* by place */
} savings;

static bool wants_saving(void *context, uint32_t layer, llama_input input) {
    (void)context, (void)layer, (void)input;
    return true;
}

static hepta_status note_saving(void *context, uint32_t layer, llama_input input,
                                const moments *m) {
    savings *s = context;
    quantizer *q = s->q;
    feedback *f = NULL;
    hepta_status status = feedback_create(m, 1, q->kernels, q->threads, &f, q->err);
    s->saved[layer * LLAMA_INPUTS + (uint32_t)input] = f != NULL ? f->saved : 1;
    feedback_free(f);
    return status;
}

/* sensitivity (n_tensors): see measure.h */
static hepta_status measure(quantizer *q, double *sensitivity) {
    const size_t n_places = ((size_t)q->n_layer + 1) * LLAMA_INPUTS;
    const uint32_t n_tokens = tokens_of(q),
                   plan_tokens = n_tokens < PLAN_TOKENS ? n_tokens : PLAN_TOKENS;
    savings s = {.q = q, .saved = memory_alloc(n_places, sizeof *s.saved)};
    if (s.saved == NULL) {
        return error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory for %u layers", q->n_layer);
    }
    hepta_status status = calibrated_pass(q, plan_tokens, wants_saving, note_saving, &s);
    if (status == HEPTA_OK) {
        status =
            measure_sensitivity(&q->calibration, q->in, &q->effort->measure, s.saved, sensitivity,
                                q->options->progress, q->options->progress_context, q->err);
    }
    memory_free(s.saved);
    return status;
}

/* The rate of every tensor: from a plan, or for the bits asked for. */
static hepta_status find_rates(quantizer *q, uint32_t *half_bits) {
    const hepta_quantize_options *o = q->options;
    const container *in = q->in;
    double *sensitivity = NULL;
    hepta_status status = HEPTA_OK;
    if (o->plan_path != NULL) {
        status = plan_read(o->plan_path, in->tensors, in->n_tensors, half_bits, q->err);
    } else {
        bool pays = false;
        if (calibrates && (o->without & HEPTA_WITHOUT_PLAN) == 0 && o->bits > 2 && o->bits < 8) {
            status = measure_pays(in, &q->effort->measure, &pays, q->err);
        }
        if (pays) {
            sensitivity = memory_alloc(in->n_tensors, sizeof *sensitivity);
            if (sensitivity == NULL) {
                status = error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory for a plan");
            } else {
                status = measure(q, sensitivity);
            }
        }
        if (status == HEPTA_OK) {
            status =
                plan_rates(in->tensors, in->n_tensors, o->bits, sensitivity, half_bits, q->err);
        }
    }
    if (status == HEPTA_OK && o->plan_out_path != NULL) {
        status = plan_write(o->plan_out_path, in->tensors, in->n_tensors, half_bits, sensitivity,
                            q->err);
    }
    memory_free(sensitivity);
    return status;
}

/* ---- Going on ---------------------------------------------------------- */

static hepta_status open_output(quantizer *q, const char *path, const tensor *described) {
    uint8_t identity[32];
    hepta_status status = resume_identity(q->in, q->options, identity, q->err);
    if (status == HEPTA_OK) {
        status = hepta_writer_resume(path, identity, q->in->kvs, q->in->n_kvs, described,
                                     q->in->n_tensors, &q->out, &q->n_written, q->err);
    }
    for (size_t i = 0; status == HEPTA_OK && i < q->n_written; i++) {
        q->n_done += tensor_n_weights(&q->in->tensors[q->order[i]]);
    }
    return status;
}

/* An interrupt or a full disk leaves whole tensors that are worth keeping, other errors do not. */
static void close_unfinished(quantizer *q, const char *path, hepta_status status) {
    const bool keeps = status == HEPTA_ERROR_INTERRUPTED || status == HEPTA_ERROR_IO;
    if (q->out == NULL || !keeps || q->n_written == 0) {
        hepta_writer_discard(q->out);
        return;
    }
    hepta_writer_keep(q->out);
    const hepta_error before = q->err != NULL ? *q->err : (hepta_error){.status = status};
    error_fill(q->err, status, "%s; %s.part keeps what is done: the same command goes on there",
               before.message, path);
}

hepta_status hepta_quantize(const char *in_path, const char *out_path,
                            const hepta_quantize_options *options, hepta_error *err) {
    if (in_path == NULL || out_path == NULL || options == NULL) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "hepta_quantize: in_path, out_path or options is NULL");
    }
    if (options->threads < 0 || options->threads > MAX_THREADS) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "threads is %d, expected 0 to %d",
                         options->threads, (int)MAX_THREADS);
    }
    if (options->effort < 0 || (size_t)options->effort >= sizeof efforts / sizeof efforts[0]) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "effort is %d, expected 0 to %d",
                         (int)options->effort, (int)(sizeof efforts / sizeof efforts[0]) - 1);
    }
    container *in = NULL;
    uint32_t *half_bits = NULL;
    tensor *described = NULL;
    quantizer q = {.options = options, .err = err, .kernels = NULL};
    q.threads = options->threads > 0 ? options->threads : threads_default();
    container_options open_options = {.tokenizer_path = options->tokenizer_path};
    hepta_status status = container_open(in_path, &open_options, &in, err);
    if (status == HEPTA_OK) {
        status = check_input(in, in_path, err);
    }
    if (status == HEPTA_OK) {
        status = kernels_select(&q.kernels, err);
    }
    if (status != HEPTA_OK) {
        goto done;
    }
    half_bits = memory_alloc(in->n_tensors, sizeof *half_bits);
    described = memory_alloc(in->n_tensors, sizeof *described);
    q.order = memory_alloc(in->n_tensors, sizeof *q.order);
    q.place = memory_alloc(in->n_tensors, sizeof *q.place);
    if (half_bits == NULL || described == NULL || q.order == NULL || q.place == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu tensors", in->n_tensors);
        goto done;
    }
    q.in = in;
    q.effort = &efforts[options->effort];
    q.half_bits = half_bits;
    q.calibration = (calibration_options){.model = in_path,
                                          .tokenizer = options->tokenizer_path,
                                          .text_path = options->calibration_path,
                                          .rotation_seed = quantize_rotation_seed,
                                          .threads = q.threads};
    for (size_t i = 0; i < in->n_tensors; i++) {
        q.n_weights += tensor_n_weights(&in->tensors[i]);
    }
    find_order(&q);
    status = find_rates(&q, half_bits);
    if (status == HEPTA_OK) {
        status = set_metadata(in, options, half_bits, err);
    }
    if (status != HEPTA_OK) {
        goto done;
    }
    describe_output(&q, described);
    status = open_output(&q, out_path, described);
    if (status != HEPTA_OK) {
        goto done;
    }
    status = write_tensors(&q);
    if (status == HEPTA_OK) {
        hepta_writer *w = q.out;
        q.out = NULL;
        status = hepta_writer_commit(w, err);
    }
done:
    close_unfinished(&q, out_path, status);
    for (size_t i = 0; i < sizeof q.rotations / sizeof q.rotations[0]; i++) {
        rotation_free(q.rotations[i]);
    }
    memory_free(q.order);
    memory_free(q.place);
    memory_free(described);
    memory_free(half_bits);
    container_close(in);
    return status;
}
