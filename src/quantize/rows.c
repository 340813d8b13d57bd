/*
 * rows.c - rows of weights: rotated, scaled, coded.
 */
#include "quantize/quantizer.h"

#include "base/base.h"
#include "code/code.h"
#include "quantize/plan.h"

#include <math.h>
#include <omp.h>

enum { REFIT_ROWS = 32 };

uint32_t find_not_finite(const float *x, uint32_t n) {
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

hepta_status chunk_create(const quantizer *q, const char *name, uint32_t rows, uint32_t n_padded,
                          size_t row_bytes, chunk *c) {
    const size_t n_threads = (size_t)q->threads;
    *c = (chunk){
        .x = memory_alloc((size_t)rows * n_padded, sizeof(float)),
        .scale = memory_alloc(rows, sizeof(float)),
        .code = memory_alloc(rows, row_bytes),
        .v = memory_alloc(n_threads, n_padded),
        .scratch = memory_alloc(n_threads * n_padded, sizeof(float)),
    };
    if (c->x == NULL || c->scale == NULL || c->code == NULL || c->v == NULL || c->scratch == NULL) {
        return error_set(q->err, HEPTA_ERROR_MEMORY, "out of memory quantizing %s", name);
    }
    return HEPTA_OK;
}

void chunk_free(chunk *c) {
    memory_free(c->x);
    memory_free(c->scale);
    memory_free(c->code);
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

hepta_status load_rows(const quantizer *q, const tensor *t, const rotation *r, const uint32_t *rows,
                       uint64_t first, uint32_t n, chunk *c) {
    uint64_t bad = UINT64_MAX;   /* row * n + column of the first bad weight */
    uint64_t large = UINT64_MAX; /* the first row whose sums overflow */
#pragma omp parallel for num_threads(q->threads) schedule(static) reduction(min : bad, large)
    for (uint32_t i = 0; i < n; i++) {
        float *x = c->x + (size_t)i * r->n_padded;
        const uint64_t row = rows != NULL ? rows[i] : first + i;
        kernels_tensor_row(q->kernels, t, row, x);
        uint32_t column = find_not_finite(x, r->n);
        if (column < r->n) {
            uint64_t at = row * r->n + column;
            bad = at < bad ? at : bad;
            continue;
        }
        q->kernels->rotate(r, x, c->scratch + (size_t)omp_get_thread_num() * r->n_padded);
        if (find_not_finite(x, r->n_padded) < r->n_padded) {
            large = row < large ? row : large;
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

static hepta_status refit_chunk(const quantizer *q, const struct code_table *table, uint32_t n,
                                chunk *c, size_t row_bytes) {
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

hepta_status encode_rows(const quantizer *q, uint32_t half_bits, const rotation *r, uint32_t n,
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
    const effort *f = q->effort;
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
