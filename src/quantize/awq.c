/*
 * awq.c - activation-aware scales of columns (awq.h).
 *
 * One pass of the calibration text through the unquantized model; an input X (tokens, n) gives
 * mean |x| and H = X^T X, and an error E of the matrices that it is multiplied with costs
 * |X E^T|^2 = sum over rows e of e^T H e.
 */
#include "quantize/awq.h"

#include "kernels/math.h"
#include "quantize/calibrate.h"

#include <math.h>
#include <omp.h>
#include <string.h>

enum { TOKENS = 16384, STEPS = 20, MAX_SHARED = 3, CHUNK = 16 };

struct awq {
    uint32_t n_layer;
    float **scales; /* (n_layer * LLAMA_INPUTS) of each input's columns, NULL: 1 */
    /* of the search: */
    const scheme_options *options;
    const hepta_model *model;
    int threads;
    hepta_status status;
    hepta_error *err;
};

/* What is known of an input, and memory to try scales with. */
typedef struct trial {
    uint32_t n, n_rows; /* columns; rows of all matrices together */
    const matrix *w[MAX_SHARED];
    size_t n_w;
    float *mean; /* (n) of |x| */
    float *h;    /* (n, n) */
    float *s;    /* (n) */
    double *row; /* (n_rows) cost of each row */
    float *e;    /* (threads, CHUNK, 2, n) */
} trial;

bool awq_quantize_row(const scheme *how, const float *s, float *x, uint32_t n) {
    for (uint32_t i = 0; s != NULL && i < n; i++) {
        x[i] *= s[i];
    }
    const bool fine = scheme_quantize_row(how, x, n, NULL);
    for (uint32_t i = 0; s != NULL && i < n; i++) {
        x[i] /= s[i];
    }
    return fine;
}

static hepta_status no_memory(awq *a) {
    return error_set(a->err, HEPTA_ERROR_MEMORY, "no memory to search scales of columns");
}

/* ---- An input ---------------------------------------------------------- */

/* Heads that share a value share its scale: v is divided by it once. */
static void share_values(const hepta_model_info *i, float *mean) {
    const uint32_t group = i->n_head / i->n_head_kv;
    for (uint32_t head = 0; head < i->n_head_kv; head++) {
        for (uint32_t d = 0; d < i->head_dim; d++) {
            float *first = mean + (size_t)head * group * i->head_dim + d, sum = 0;
            for (uint32_t g = 0; g < group; g++) {
                sum += first[(size_t)g * i->head_dim];
            }
            for (uint32_t g = 0; g < group; g++) {
                first[(size_t)g * i->head_dim] = sum / (float)group;
            }
        }
    }
}

/* mean |x| and H of x (n_tokens, n). */
static hepta_status take_input(awq *a, trial *t, const float *x, uint32_t n_tokens) {
    const size_t stride = (size_t)round_up(n_tokens, KERNELS_LANES);
    float *xt = memory_alloc(t->n * stride, sizeof *xt);
    if (xt == NULL) {
        return no_memory(a);
    }
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (uint32_t c = 0; c < t->n; c++) {
        double sum = 0;
        for (uint32_t i = 0; i < n_tokens; i++) {
            xt[c * stride + i] = x[(size_t)i * t->n + c];
            sum += fabs((double)xt[c * stride + i]);
        }
        t->mean[c] = (float)(sum / n_tokens);
    }
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (uint32_t c = 0; c < t->n; c += CHUNK) {
        const uint32_t n = t->n - c < CHUNK ? t->n - c : CHUNK;
        a->model->kernels->matmul_f32(xt + c * stride, n, (uint32_t)stride, xt, stride, t->n,
                                      t->h + c, t->n);
    }
    memory_free(xt);
    return HEPTA_OK;
}

/* mean^alpha over the geometric mean of its largest and smallest; false: not to be used. */
static bool make_scales(const trial *t, int step, float *s) {
    float low = INFINITY, high = 0;
    for (uint32_t c = 0; c < t->n; c++) {
        const double mean = fmax((double)t->mean[c], 1e-8);
        s[c] = (float)math_pow_f64(mean, (double)step / STEPS);
        low = s[c] < low ? s[c] : low;
        high = s[c] > high ? s[c] : high;
    }
    const float middle = sqrtf(low) * sqrtf(high);
    for (uint32_t c = 0; c < t->n; c++) {
        s[c] /= middle;
    }
    return isfinite(middle) && middle > 0;
}

/* The cost of rows first .. first + n - 1 of a matrix; infinite where a row cannot be quantized. */
static void try_rows(const awq *a, const trial *t, const matrix *w, uint32_t first, uint32_t n,
                     float *e, double *cost) {
    const kernels *k = a->model->kernels;
    float *he = e + (size_t)CHUNK * t->n;
    bool fine = true;
    for (uint32_t i = 0; i < n; i++) {
        float *row = e + (size_t)i * t->n, *original = he;
        kernels_tensor_row(k, w->source, first + i, original);
        memcpy(row, original, t->n * sizeof *row);
        fine = awq_quantize_row(&a->options->scheme, t->s, row, t->n) && fine;
        for (uint32_t c = 0; c < t->n; c++) {
            row[c] -= original[c];
        }
    }
    k->matmul_f32(t->h, t->n, t->n, e, t->n, n, he, t->n);
    for (uint32_t i = 0; i < n; i++) {
        cost[i] = 0;
        for (uint32_t c = 0; c < t->n; c++) {
            cost[i] += (double)e[(size_t)i * t->n + c] * (double)he[(size_t)i * t->n + c];
        }
        cost[i] = fine ? cost[i] : (double)INFINITY;
    }
}

static double cost_of(const awq *a, const trial *t) {
    uint32_t at = 0;
    for (size_t i = 0; i < t->n_w; i++) {
        const matrix *w = t->w[i];
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
        for (uint32_t r = 0; r < w->n_rows; r += CHUNK) {
            float *e = t->e + (size_t)omp_get_thread_num() * 2 * CHUNK * t->n;
            try_rows(a, t, w, r, w->n_rows - r < CHUNK ? w->n_rows - r : CHUNK, e, t->row + at + r);
        }
        at += w->n_rows;
    }
    double sum = 0;
    for (uint32_t r = 0; r < t->n_rows; r++) {
        sum += t->row[r];
    }
    return sum;
}

static hepta_status search(awq *a, trial *t, float **out) {
    float *best = memory_alloc(t->n, sizeof *best);
    if (best == NULL) {
        return no_memory(a);
    }
    double least = INFINITY;
    for (int step = 0; step < STEPS; step++) {
        const double cost = make_scales(t, step, t->s) ? cost_of(a, t) : (double)INFINITY;
        if (cost < least) {
            least = cost;
            memcpy(best, t->s, t->n * sizeof *best);
        }
    }
    if (!(least < (double)INFINITY)) { /* writing the file will tell why */
        memory_free(best);
        best = NULL;
    }
    *out = best;
    return HEPTA_OK;
}

static void find_matrices(const hepta_model *m, uint32_t layer, llama_input input, trial *t) {
    const llama_layer *l = &m->layers[layer];
    const matrix *const all[][MAX_SHARED] = {[LLAMA_ATTN_IN] = {&l->wq, &l->wk, &l->wv},
                                             [LLAMA_ATTN_OUT] = {&l->wo},
                                             [LLAMA_FFN_IN] = {&l->gate, &l->up},
                                             [LLAMA_FFN_OUT] = {&l->down}};
    for (size_t i = 0; i < MAX_SHARED && all[input][i] != NULL; i++) {
        t->w[t->n_w++] = all[input][i];
        t->n_rows += all[input][i]->n_rows;
    }
    t->n = t->w[0]->n_cols;
}

static hepta_status add_input(awq *a, uint32_t layer, llama_input input, const float *x,
                              uint32_t n_tokens) {
    const scheme_options *o = a->options;
    const uint32_t place = layer * LLAMA_INPUTS + input;
    if (o->progress != NULL && !o->progress(o->progress_context, "searching scales of columns",
                                            place, a->n_layer * LLAMA_INPUTS)) {
        return error_set(a->err, HEPTA_ERROR_INTERRUPTED,
                         "interrupted searching scales of columns; nothing was kept");
    }
    trial t = {0};
    find_matrices(a->model, layer, input, &t);
    t.mean = memory_alloc(t.n, sizeof *t.mean);
    t.h = memory_alloc((size_t)t.n * t.n, sizeof *t.h);
    t.s = memory_alloc(t.n, sizeof *t.s);
    t.row = memory_alloc(t.n_rows, sizeof *t.row);
    t.e = memory_alloc((size_t)a->threads * 2 * CHUNK * t.n, sizeof *t.e);
    hepta_status status = HEPTA_OK;
    if (t.mean == NULL || t.h == NULL || t.s == NULL || t.row == NULL || t.e == NULL) {
        status = no_memory(a);
    } else {
        status = take_input(a, &t, x, n_tokens);
    }
    if (status == HEPTA_OK && input == LLAMA_ATTN_OUT) {
        share_values(&a->model->info, t.mean);
    }
    if (status == HEPTA_OK) {
        status = search(a, &t, &a->scales[place]);
    }
    memory_free(t.mean);
    memory_free(t.h);
    memory_free(t.s);
    memory_free(t.row);
    memory_free(t.e);
    return status;
}

/* ---- The model --------------------------------------------------------- */

static void on_input(void *context, uint32_t layer, llama_input input, const float *x, uint32_t n) {
    awq *a = context;
    if (a->status == HEPTA_OK && input != LLAMA_HEAD_IN) {
        a->status = add_input(a, layer, input, x, n);
    }
}

hepta_status awq_search(const char *model, const scheme_options *o, awq **out, hepta_error *err) {
    const calibration_options options = {.model = model,
                                         .tokenizer = o->tokenizer_path,
                                         .text_path = o->calibration_path,
                                         .n_tokens = TOKENS,
                                         .threads = o->threads};
    calibration *c = NULL;
    awq *a = memory_alloc(1, sizeof *a);
    if (a == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory to search scales of columns");
    }
    hepta_status status = calibration_open(&options, &c, err);
    if (status == HEPTA_OK) {
        uint32_t n_tokens;
        hepta_session *session = calibration_session(c, &n_tokens);
        a->options = o;
        a->model = session->model;
        a->n_layer = session->model->info.n_layer;
        a->threads = o->threads;
        a->err = err;
        a->scales = memory_alloc((size_t)a->n_layer * LLAMA_INPUTS, sizeof *a->scales);
        a->status = a->scales != NULL ? HEPTA_OK : no_memory(a);
        if (a->status == HEPTA_OK) {
            const llama_observer observer = {.input = on_input, .context = a};
            llama_observe(session, n_tokens, NULL, &observer);
        }
        status = a->status;
    }
    calibration_free(c);
    if (status != HEPTA_OK) {
        awq_free(a);
        return status;
    }
    *out = a;
    return HEPTA_OK;
}

void awq_free(awq *a) {
    if (a != NULL) {
        for (uint32_t i = 0; a->scales != NULL && i < a->n_layer * LLAMA_INPUTS; i++) {
            memory_free(a->scales[i]);
        }
        memory_free(a->scales);
        memory_free(a);
    }
}

const float *awq_scales(const awq *a, const char *name) {
    const uint32_t place = calibration_place(name, a->n_layer, true);
    return place < a->n_layer * LLAMA_INPUTS ? a->scales[place] : NULL;
}
