/*
 * schemes.c - plain scalar quantizers (schemes.h).
 *
 * With lo = min(x, 0), hi = max(x, 0) over a group and L = 2^bits - 1:
 *
 *     s = (hi - lo) / L, rounded up to binary16        z = rint(-lo / s)
 *     q = clamp(rint(x / s) + z, 0, L)                 D(q) = s (q - z)
 *
 * Then |x - D(q)| <= s / 2: docs/QUALITY.md. In binary64 the quotients of a binary32 number and
 * a binary16 one fall on the right side of every tie, and s (q - z) is exact in binary32, so that
 * the bound holds for the computed numbers too.
 */
#include "quantize/schemes.h"

#include "format/container.h"
#include "kernels/kernels.h"
#include "quantize/awq.h"

#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>

enum { SCALE_BITS = 16, ROWS_PER_THREAD = 64 };

static const char *const names[] = {
    [SCHEME_INT4] = "int4", [SCHEME_INT8] = "int8", [SCHEME_PAIR] = "pair"};

bool scheme_parse(const char *name, scheme_kind *out) {
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (scheme_kind)i;
            return true;
        }
    }
    return false;
}

/* ---- Rows -------------------------------------------------------------- */

/* The smallest binary16 number that is not below v >= 0; infinity above 65504. */
static float half_above(double v) {
    uint16_t h = half_from_float((float)v);
    while ((double)half_to_float(h) < v) {
        h++; /* the next one: v is not negative */
    }
    return half_to_float(h);
}

/* Every `stride`-th of n weights from x on. */
static bool quantize_group(float *x, uint32_t n, uint32_t stride, uint32_t bits, float *step) {
    const int levels = (1 << bits) - 1;
    double lo = 0, hi = 0;
    for (uint32_t i = 0; i < n; i += stride) {
        lo = (double)x[i] < lo ? (double)x[i] : lo;
        hi = (double)x[i] > hi ? (double)x[i] : hi;
    }
    const double s = (double)half_above((hi - lo) / levels);
    if (!isfinite(s)) {
        return false;
    }
    const double z = s > 0 ? rint(-lo / s) : 0;
    for (uint32_t i = 0; i < n; i += stride) {
        double q = s > 0 ? rint((double)x[i] / s) + z : 0;
        q = q < 0 ? 0 : q > levels ? levels : q;
        x[i] = (float)(s * (q - z));
        if (step != NULL) {
            step[i] = (float)s;
        }
    }
    return true;
}

static uint32_t group_size(const scheme *s, uint32_t n) {
    return s->group == 0 || s->group > n ? n : s->group;
}

bool scheme_quantize_row(const scheme *s, float *x, uint32_t n, float *step) {
    const uint32_t size = group_size(s, n);
    for (uint32_t first = 0, count; first < n; first += count) {
        count = n - first < size ? n - first : size;
        float *steps = step != NULL ? step + first : NULL;
        bool ok;
        if (s->kind == SCHEME_PAIR) {
            ok = quantize_group(x + first, count, 2, 4, steps) &&
                 (count < 2 ||
                  quantize_group(x + first + 1, count - 1, 2, 3, steps != NULL ? steps + 1 : NULL));
        } else {
            ok = quantize_group(x + first, count, 1, s->kind == SCHEME_INT4 ? 4 : 8, steps);
        }
        if (!ok) {
            return false;
        }
    }
    return true;
}

/* Of a group of n weights: its scale, its zero point, its integers. */
static uint64_t group_bits(uint64_t n, uint64_t bits) {
    return n > 0 ? SCALE_BITS + bits + n * bits : 0;
}

uint64_t scheme_row_bits(const scheme *s, uint32_t n) {
    const uint32_t size = group_size(s, n);
    uint64_t total = 0;
    for (uint32_t first = 0, count; first < n; first += count) {
        count = n - first < size ? n - first : size;
        total += s->kind == SCHEME_PAIR ? group_bits((count + 1) / 2, 4) + group_bits(count / 2, 3)
                                        : group_bits(count, s->kind == SCHEME_INT4 ? 4 : 8);
    }
    return total;
}

/* ---- Files ------------------------------------------------------------- */

typedef struct writer {
    const scheme_options *options;
    const kernels *kernels;
    container *in;
    hepta_writer *out;
    awq *awq; /* NULL: none */
    int threads;
    uint32_t n_head, n_head_kv;
    bool permute; /* query and key rows from Hugging Face's order to GGUF's */
    uint64_t done, total;
    hepta_error *err;
} writer;

/*
 * The row of t that becomes row r: GGUF wants the rows that RoPE turns together, i and i + half
 * of a head, as neighbours.
 */
static uint64_t source_row(const writer *w, const tensor *t, uint64_t r) {
    const bool query = strstr(t->name, ".attn_q.weight") != NULL;
    const bool key = strstr(t->name, ".attn_k.weight") != NULL;
    const uint64_t heads = query ? w->n_head : w->n_head_kv;
    if (!w->permute || !(query || key) || t->ne[1] % (2 * heads) != 0) {
        return r;
    }
    const uint64_t size = t->ne[1] / heads, i = r % size;
    return r - i + i / 2 + i % 2 * (size / 2);
}

enum { ROW_FINE, ROW_NOT_FINITE, ROW_TOO_WIDE };

/* Row r of the output. */
static int make_row(const writer *w, const tensor *t, uint64_t r, float *x) {
    const uint32_t n = (uint32_t)t->ne[0];
    kernels_tensor_row(w->kernels, t, source_row(w, t, r), x);
    for (uint32_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return ROW_NOT_FINITE;
        }
    }
    const float *s = w->awq != NULL ? awq_scales(w->awq, t->name) : NULL;
    bool fine = t->n_dims < 2 || awq_quantize_row(&w->options->scheme, s, x, n);
    return fine ? ROW_FINE : ROW_TOO_WIDE;
}

static hepta_status report(writer *w, const tensor *t) {
    const scheme_options *o = w->options;
    if (o->progress != NULL && !o->progress(o->progress_context, t->name, w->done, w->total)) {
        return error_set(w->err, HEPTA_ERROR_INTERRUPTED, "interrupted at %s; nothing was kept",
                         t->name);
    }
    return HEPTA_OK;
}

static hepta_status write_tensor(writer *w, const tensor *t) {
    const uint64_t n_rows = t->ne[1], n_cols = t->ne[0];
    const uint64_t most = (uint64_t)w->threads * ROWS_PER_THREAD;
    const uint64_t chunk = n_rows < most ? n_rows : most;
    hepta_status status = HEPTA_OK;
    float *x = memory_alloc((size_t)(chunk * n_cols), sizeof *x);
    if (x == NULL) {
        return error_set(w->err, HEPTA_ERROR_MEMORY, "out of memory quantizing %s", t->name);
    }
    for (uint64_t first = 0; status == HEPTA_OK && first < n_rows; first += chunk) {
        const uint64_t n = n_rows - first < chunk ? n_rows - first : chunk;
        uint64_t bad = UINT64_MAX; /* 4 * row + what is wrong */
#pragma omp parallel for num_threads(w->threads) schedule(static) reduction(min : bad)
        for (uint64_t i = 0; i < n; i++) {
            int found = make_row(w, t, first + i, x + i * n_cols);
            uint64_t at = 4 * (first + i) + (uint64_t)found;
            bad = found != ROW_FINE && at < bad ? at : bad;
        }
        if (bad != UINT64_MAX) {
            status = error_set(w->err, HEPTA_ERROR_FORMAT,
                               "%s: tensor %s, row %llu: %s; such weights cannot be quantized",
                               t->file, t->name, (unsigned long long)(bad / 4),
                               bad % 4 == ROW_TOO_WIDE ? "a range too wide for a binary16 scale"
                                                       : "NaN or infinity");
            break;
        }
        status = hepta_writer_write(w->out, x, (size_t)(n * n_cols) * sizeof *x, w->err);
        w->done += n * n_cols;
        status = status == HEPTA_OK ? report(w, t) : status;
    }
    memory_free(x);
    return status;
}

static hepta_status check_input(const container *c, const char *in_path, hepta_error *err) {
    if (c->kind == CONTAINER_HEPTA) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s is quantized already; quantize from the original weights", in_path);
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        if (!tensor_type_is_readable(t->type) || t->n_dims > 2 || t->ne[0] > UINT32_MAX) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: tensor %s has type %s and %u dimensions; expected a vector or "
                             "matrix of " TENSOR_READABLE_TYPES,
                             t->file, t->name, tensor_type_name(t->type), t->n_dims);
        }
    }
    return HEPTA_OK;
}

/* The input's metadata, with what was done to it; `permute`: see source_row. */
static hepta_status set_metadata(writer *w, double bits_per_weight, hepta_error *err) {
    static const char *const old[] = {"general.quantization_version", "hepta.rope.interleaved"};
    container *c = w->in;
    const scheme *s = &w->options->scheme;
    char text[64];
    w->permute = !container_get_bool_or(c, "hepta.rope.interleaved", true);
    for (size_t i = 0; i < sizeof old / sizeof old[0]; i++) {
        container_remove(c, old[i]);
    }
    const char *scaled = w->awq != NULL ? ", AWQ" : "";
    int n = s->group == 0 ? snprintf(text, sizeof text, "%s, whole rows%s", names[s->kind], scaled)
                          : snprintf(text, sizeof text, "%s, groups of %u%s", names[s->kind],
                                     s->group, scaled);
    hepta_status status = container_set_u32(c, "general.file_type", 0, err); /* all F32 */
    if (status == HEPTA_OK) {
        status = container_set_string(c, "fake_quantization.scheme", text, (size_t)n, err);
    }
    if (status == HEPTA_OK) {
        status =
            container_set_f32(c, "fake_quantization.bits_per_weight", (float)bits_per_weight, err);
    }
    if (status == HEPTA_OK && w->permute) {
        status = container_get_u32(c, "llama.attention.head_count", &w->n_head, err);
    }
    if (status == HEPTA_OK && w->permute) {
        status = container_get_u32(c, "llama.attention.head_count_kv", &w->n_head_kv, err);
    }
    return status;
}

/* The output's tensors into `out` (n_tensors), and the bits they would take. */
static uint64_t describe_output(const container *in, const scheme *s, tensor *out) {
    uint64_t bits = 0;
    for (size_t i = 0; i < in->n_tensors; i++) {
        const tensor *t = &in->tensors[i];
        out[i] = (tensor){.name = t->name, .type = TENSOR_F32, .n_dims = t->n_dims};
        memcpy(out[i].ne, t->ne, sizeof out[i].ne);
        bits += t->n_dims < 2 ? 32 * t->ne[0] : t->ne[1] * scheme_row_bits(s, (uint32_t)t->ne[0]);
    }
    return bits;
}

hepta_status scheme_quantize_file(const char *in_path, const char *out_path,
                                  const scheme_options *options, double *bits_per_weight,
                                  hepta_error *err) {
    scheme_options resolved = *options;
    resolved.threads = options->threads > 0 ? options->threads : threads_default();
    writer w = {.options = &resolved, .threads = resolved.threads, .err = err};
    const container_options open_options = {.tokenizer_path = options->tokenizer_path};
    tensor *described = NULL;
    hepta_status status = container_open(in_path, &open_options, &w.in, err);
    if (status == HEPTA_OK) {
        status = check_input(w.in, in_path, err);
    }
    if (status == HEPTA_OK) {
        status = kernels_select(&w.kernels, err);
    }
    if (status == HEPTA_OK && options->awq) {
        status = awq_search(in_path, &resolved, &w.awq, err);
    }
    if (status != HEPTA_OK) {
        goto done;
    }
    described = memory_alloc(w.in->n_tensors, sizeof *described);
    if (described == NULL) {
        status =
            error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu tensors", w.in->n_tensors);
        goto done;
    }
    for (size_t i = 0; i < w.in->n_tensors; i++) {
        w.total += tensor_n_weights(&w.in->tensors[i]);
    }
    *bits_per_weight = (double)describe_output(w.in, &options->scheme, described) / (double)w.total;
    status = set_metadata(&w, *bits_per_weight, err);
    if (status == HEPTA_OK) {
        status = gguf_writer_open(out_path, w.in->kvs, w.in->n_kvs, described, w.in->n_tensors,
                                  &w.out, err);
    }
    for (size_t i = 0; status == HEPTA_OK && i < w.in->n_tensors; i++) {
        status = write_tensor(&w, &w.in->tensors[i]);
    }
    if (status == HEPTA_OK) {
        hepta_writer *out = w.out;
        w.out = NULL;
        status = hepta_writer_commit(out, err);
    }
done:
    hepta_writer_discard(w.out);
    awq_free(w.awq);
    memory_free(described);
    container_close(w.in);
    return status;
}
