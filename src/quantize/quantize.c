/*
 * quantize.c - any supported model to one .hepta file: rotate, scale, encode, write.
 *
 * Each row w of a matrix becomes  w' = H w  (kernels.h, rotation), so that  w' . (H x) = w . x,
 * and then symbols of the trellis code (code/code.h) or int8 with one bfloat16 scale. Rows are
 * independent; a few hundred at a time are in memory, whatever the size of the model.
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
#include "format/container.h"
#include "kernels/kernels.h"
#include "quantize/calibrate.h"
#include "quantize/measure.h"
#include "quantize/plan.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    ROWS_PER_THREAD = 64,
    MAX_THREADS = 4096,
    REFIT_ROWS = 32,
    PLAN_TOKENS = 4096,
    LEAST_TOKENS = 2048
};

/* What an effort means; docs/QUALITY.md has what each gives. */
typedef struct effort {
    uint32_t n_tokens;      /* of the calibration text, if one pass takes no more than */
    double work;            /* ... so many multiplications; else less, down to LEAST_TOKENS */
    unsigned width, lag;    /* of the beam */
    double stretch;         /* of the row scales that it starts from: found by trial */
    bool refits;            /* the row scales */
    measure_budget measure; /* of sensitivities */
} effort;

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

/* The seed of the rotation's signs: one for all files, so that results can be compared. */
static const uint64_t rotation_seed = 0x48657074613335u;

typedef struct quantizer {
    const container *in;
    uint32_t n_layer;
    calibration_options calibration;
    hepta_writer *out;
    const kernels *kernels;
    const hepta_quantize_options *options;
    int threads;
    uint64_t n_weights, n_done;
    const uint32_t *half_bits; /* of tensor i of the input */
    size_t *order;             /* numbers of the input's tensors in the order of the pass */
    uint32_t *place;           /* calibration_place() of tensor i */
    size_t n_written;          /* of `order` */
    const moments *moments;    /* of the input at hand; NULL: none */
    feedback *feedback;
    rotation *rotations[8]; /* by width; models have three or four widths */
    hepta_error *err;
} quantizer;

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
        hepta_status status = rotation_create(n, rotation_seed, &q->rotations[i], q->err);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    *out = q->rotations[i];
    return HEPTA_OK;
}

/* ---- Rows -------------------------------------------------------------- */

/* Bytes of one row of the source tensor. */
static uint64_t source_row_bytes(const tensor *t) {
    return t->ne[1] == 0 ? 0 : t->n_bytes / (t->ne[1] * t->ne[2] * t->ne[3]);
}

/* Number of the first element that is NaN or infinite; n if there is none. */
static uint32_t find_not_finite(const float *x, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return i;
        }
    }
    return n;
}

/* The bfloat16 scale for a root-mean-square of `rms` at `unit` code units per sigma. */
static float row_scale(double rms, double unit) {
    float scale = bfloat_to_float(bfloat_from_float((float)(rms / unit)));
    return isfinite(scale) ? scale : 0;
}

static double row_rms(const float *x, uint32_t n, uint32_t n_real) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    return sqrt(sum / n_real);
}

/*
 * The scale that makes scale * (v - 64) nearest to x in the least-squares sense, given the
 * codes v; `scale` itself when the codes are all centre.
 */
static float refit_scale(const float *x, const uint8_t *v, uint32_t n, float scale) {
    double xv = 0, vv = 0;
    for (uint32_t i = 0; i < n; i++) {
        double c = v[i] - CODE_CENTRE;
        xv += (double)x[i] * c;
        vv += c * c;
    }
    if (!(xv > 0) || !(vv > 0)) {
        return scale;
    }
    return row_scale(xv / vv, 1);
}

/*
 * The same for n <= REFIT_ROWS rows where an error counts as e^T H e. v: codes less centre, hv:
 * room for H v, both (n, n_cols).
 */
static void refit_scales(const float *x, const float *v, float *hv, uint32_t n, const moments *m,
                         const kernels *k, float *scale) {
    k->matmul_f32(m->h, m->n, m->n, v, m->n, n, hv, m->n);
    for (uint32_t r = 0; r < n; r++) {
        const size_t row = (size_t)r * m->n;
        double xhv = 0, vhv = 0;
        for (uint32_t i = 0; i < m->n; i++) {
            xhv += (double)x[row + i] * (double)hv[row + i];
            vhv += (double)v[row + i] * (double)hv[row + i];
        }
        if (xhv > 0 && vhv > 0) {
            scale[r] = row_scale(xhv / vhv, 1);
        }
    }
}

/* A chunk of rows on its way from the source to the file. */
typedef struct chunk {
    float *x;        /* (rows, n_padded): rotated weights */
    float *scale;    /* (rows) */
    uint8_t *code;   /* (rows, row_bytes): row by row, as the encoder writes them */
    uint8_t *packed; /* (rows, row_bytes): strips of tiles, as they lie in the file */
    uint8_t *v;      /* (threads, n_padded) */
    float *scratch;  /* (threads, n_padded) */
} chunk;

static void chunk_free(chunk *c) {
    memory_free(c->x);
    memory_free(c->scale);
    memory_free(c->code);
    memory_free(c->packed);
    memory_free(c->v);
    memory_free(c->scratch);
}

static void encode_int8_row(const float *x, uint32_t n, uint8_t *out, float *scale) {
    float amax = 0;
    for (uint32_t i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        amax = a > amax ? a : amax;
    }
    float s = bfloat_to_float(bfloat_from_float(amax / 127.0f));
    *scale = s;
    for (uint32_t i = 0; i < n; i++) {
        float q = s > 0 ? rintf(x[i] / s) : 0; /* a scale rounded down may give 128 */
        q = q > 127 ? 127 : q < -127 ? -127 : q;
        out[i] = (uint8_t)(int8_t)q;
    }
}

/* Reads rows [first, first + n) of t, rotated, into c->x; fails where one is not finite. */
static hepta_status load_rows(quantizer *q, const tensor *t, const rotation *r, uint64_t first,
                              uint32_t n, chunk *c) {
    uint64_t bad = UINT64_MAX;   /* row * n + column of the first bad weight */
    uint64_t large = UINT64_MAX; /* the first row whose sums overflow */
#pragma omp parallel for num_threads(q->threads) schedule(static) reduction(min : bad, large)
    for (uint32_t i = 0; i < n; i++) {
        float *x = c->x + (size_t)i * r->n_padded;
        kernels_tensor_row(q->kernels, t, first + i, x);
        uint32_t column = find_not_finite(x, r->n);
        if (column < r->n) {
            uint64_t at = (first + i) * r->n + column;
            bad = at < bad ? at : bad;
            continue;
        }
        q->kernels->rotate(r, x, c->scratch + (size_t)omp_get_thread_num() * r->n_padded);
        if (find_not_finite(x, r->n_padded) < r->n_padded) {
            large = first + i < large ? first + i : large;
        }
    }
    if (bad != UINT64_MAX) {
        return error_set(q->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %s has NaN or infinity at row %llu, column %llu; such weights "
                         "cannot be quantized",
                         t->file, t->name, (unsigned long long)(bad / r->n),
                         (unsigned long long)(bad % r->n));
    }
    if (large != UINT64_MAX) {
        return error_set(q->err, HEPTA_ERROR_FORMAT,
                         "%s: tensor %s has weights near the limit of binary32 in row %llu; such "
                         "weights cannot be quantized",
                         t->file, t->name, (unsigned long long)large);
    }
    return HEPTA_OK;
}

static hepta_status refit_chunk(quantizer *q, const struct code_table *table, uint32_t n, chunk *c,
                                size_t row_bytes) {
    const uint32_t n_cols = q->moments->n;
    const size_t per_thread = (size_t)REFIT_ROWS * n_cols;
    float *room = memory_alloc((size_t)q->threads * 2 * per_thread, sizeof *room);
    if (room == NULL) {
        return error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory fitting scales");
    }
#pragma omp parallel for num_threads(q->threads) schedule(static)
    for (uint32_t first = 0; first < n; first += REFIT_ROWS) {
        const uint32_t rows = n - first < REFIT_ROWS ? n - first : REFIT_ROWS;
        const size_t thread = (size_t)omp_get_thread_num();
        float *v = room + thread * 2 * per_thread;
        uint8_t *codes = c->v + thread * n_cols;
        for (uint32_t r = 0; r < rows; r++) {
            code_decode_row(table, c->code + (first + r) * row_bytes, (size_t)table->half_bits,
                            n_cols, codes);
            for (uint32_t i = 0; i < n_cols; i++) {
                v[(size_t)r * n_cols + i] = (float)(codes[i] - CODE_CENTRE);
            }
        }
        refit_scales(c->x + (size_t)first * n_cols, v, v + per_thread, rows, q->moments, q->kernels,
                     c->scale + first);
    }
    memory_free(room);
    return HEPTA_OK;
}

static hepta_status encode_rows(quantizer *q, uint32_t half_bits, const rotation *r, uint32_t n,
                                chunk *c, size_t row_bytes) {
    if (half_bits == HALF_BITS_INT8) {
#pragma omp parallel for num_threads(q->threads) schedule(static)
        for (uint32_t i = 0; i < n; i++) {
            encode_int8_row(c->x + (size_t)i * r->n_padded, r->n_padded, c->code + i * row_bytes,
                            &c->scale[i]);
        }
        return HEPTA_OK;
    }
    const struct code_table *table = code_table_get((int)half_bits);
    const effort *f = &efforts[q->options->effort];
    const bool fits = (q->options->without & HEPTA_WITHOUT_SCALES) == 0;
    const double stretch = q->feedback != NULL && fits ? f->stretch : 1;
#pragma omp parallel for num_threads(q->threads) schedule(static)
    for (uint32_t i = 0; i < n; i++) {
        double rms = stretch * row_rms(c->x + (size_t)i * r->n_padded, r->n_padded, r->n);
        c->scale[i] = row_scale(rms, (double)table->unit);
    }
    hepta_status status =
        q->feedback != NULL
            ? code_encode_feedback(table, &q->feedback->code, f->width, c->x, c->scale, n, c->code,
                                   row_bytes, half_bits, q->threads, q->err)
            : code_encode_rows(table, c->x, c->scale, n, r->n_padded, c->code, row_bytes, half_bits,
                               q->threads, q->err);
    if (status != HEPTA_OK) {
        return status;
    }
    if (q->feedback != NULL || !fits) {
        return q->feedback != NULL && f->refits && fits ? refit_chunk(q, table, n, c, row_bytes)
                                                        : HEPTA_OK;
    }
#pragma omp parallel for num_threads(q->threads) schedule(static)
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *v = c->v + (size_t)omp_get_thread_num() * r->n_padded;
        code_decode_row(table, c->code + i * row_bytes, half_bits, r->n_padded, v);
        c->scale[i] = refit_scale(c->x + (size_t)i * r->n_padded, v, r->n, c->scale[i]);
    }
    return HEPTA_OK;
}

/* ---- Tensors ----------------------------------------------------------- */

static hepta_status write_packed(quantizer *q, const tensor *t, uint32_t half_bits) {
    rotation *r = NULL;
    hepta_status status = rotation_for(q, (uint32_t)t->ne[0], &r);
    if (status != HEPTA_OK) {
        return status;
    }
    uint64_t n_rows = t->ne[1], n_padded_rows = round_up(n_rows, PACKED_STRIP);
    size_t n_threads = (size_t)q->threads;
    uint32_t chunk_rows = (uint32_t)(n_threads * ROWS_PER_THREAD);
    size_t row_bytes = (size_t)r->n_padded / CODE_BLOCK * half_bits;
    chunk c = {
        .x = memory_alloc((size_t)chunk_rows * r->n_padded, sizeof(float)),
        .scale = memory_alloc(chunk_rows, sizeof(float)),
        .code = memory_alloc(chunk_rows, row_bytes),
        .packed = memory_alloc(chunk_rows, row_bytes),
        .v = memory_alloc(n_threads, r->n_padded),
        .scratch = memory_alloc(n_threads * r->n_padded, sizeof(float)),
    };
    uint8_t *scales = memory_alloc((size_t)n_padded_rows, 2);
    if (c.x == NULL || c.scale == NULL || c.code == NULL || c.packed == NULL || c.v == NULL ||
        c.scratch == NULL || scales == NULL) {
        status = error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory quantizing %s", t->name);
        goto done;
    }
    for (uint64_t first = 0; first < n_rows; first += chunk_rows) {
        uint32_t n = n_rows - first < chunk_rows ? (uint32_t)(n_rows - first) : chunk_rows;
        status = load_rows(q, t, r, first, n, &c);
        if (status == HEPTA_OK) {
            status = encode_rows(q, half_bits, r, n, &c, row_bytes);
        }
        if (status != HEPTA_OK) {
            goto done;
        }
        for (uint32_t i = 0; i < n; i++) {
            uint16_t s = bfloat_from_float(c.scale[i]); /* exact: it came from one */
            scales[2 * (first + i)] = (uint8_t)s;
            scales[2 * (first + i) + 1] = (uint8_t)(s >> 8);
        }
        uint32_t n_strip_rows = (uint32_t)round_up(n, PACKED_STRIP);
        memset(c.code + n * row_bytes, 0, (n_strip_rows - n) * row_bytes);
        for (uint32_t i = 0; i < n_strip_rows; i++) {
            packed_put_row(half_bits, r->n_padded / CODE_BLOCK, i, c.code + i * row_bytes,
                           c.packed);
        }
        status = hepta_writer_write(q->out, c.packed, n_strip_rows * row_bytes, q->err);
        if (status != HEPTA_OK) {
            goto done;
        }
        release_pages(t->data + first * source_row_bytes(t), n * source_row_bytes(t));
        q->n_done += (uint64_t)n * t->ne[0];
        status = progress(q, t->name);
        if (status != HEPTA_OK) {
            goto done;
        }
    }
    release_pages(t->data, t->n_bytes); /* GPTQ and AWQ rows lie across all of it */
    status = hepta_writer_write(q->out, scales, (size_t)n_padded_rows * 2, q->err);
done:
    chunk_free(&c);
    memory_free(scales);
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
        status = container_set_u64(c, "hepta.rotation.seed", rotation_seed, err);
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
    const effort *f = &efforts[q->options->effort];
    const uint32_t place = layer * LLAMA_INPUTS + (uint32_t)input;
    hepta_status status = feedback_create(m, f->lag, q->kernels, q->threads, &q->feedback, q->err);
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
    const effort *f = &efforts[q->options->effort];
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
        status = measure_sensitivity(&q->calibration, q->in, &efforts[q->options->effort].measure,
                                     s.saved, sensitivity, q->options->progress,
                                     q->options->progress_context, q->err);
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
            status = measure_pays(in, &efforts[o->effort].measure, &pays, q->err);
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

static void hash_number(sha256 *hash, uint64_t x) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(x >> (8 * i));
    }
    sha256_update(hash, bytes, sizeof bytes);
}

/* PIECES of the weights of each tensor, spread evenly: other weights differ nearly everywhere. */
static void hash_weights(sha256 *hash, const container *in) {
    enum { PIECES = 64, PIECE = 64 };
    for (size_t i = 0; i < in->n_tensors; i++) {
        const tensor *t = &in->tensors[i];
        hash_number(hash, t->type);
        hash_number(hash, t->n_bytes);
        for (uint64_t k = 0; k < PIECES && t->data != NULL; k++) {
            const uint64_t at = (t->n_bytes > PIECE ? t->n_bytes - PIECE : 0) / (PIECES - 1) * k;
            sha256_update(hash, t->data + at, t->n_bytes < PIECE ? (size_t)t->n_bytes : PIECE);
        }
    }
}

/* A digest of what decides the tensors of the output, beside its header. */
static hepta_status find_identity(const quantizer *q, uint8_t digest[32]) {
    sha256 hash;
    sha256_start(&hash);
    hash_number(&hash, (uint64_t)q->options->effort << 32 | q->options->without);
    hash_weights(&hash, q->in);
    if (q->options->calibration_path != NULL) {
        file_map map;
        hepta_status status = file_map_open(q->options->calibration_path, &map, q->err);
        if (status != HEPTA_OK) {
            return status;
        }
        sha256_update(&hash, map.data, map.size);
        file_map_close(&map);
    }
    sha256_finish(&hash, digest);
    return HEPTA_OK;
}

static hepta_status open_output(quantizer *q, const char *path, const tensor *described) {
    uint8_t identity[32];
    hepta_status status = find_identity(q, identity);
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
    q.half_bits = half_bits;
    q.calibration = (calibration_options){.model = in_path,
                                          .tokenizer = options->tokenizer_path,
                                          .text_path = options->calibration_path,
                                          .rotation_seed = rotation_seed,
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
