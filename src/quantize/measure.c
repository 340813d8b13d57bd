/*
 * measure.c - how much the error of each matrix changes what the model predicts.
 *
 * Quantization adds to the output y = W x of a matrix an error of variance
 * saved * mse * |w_r|^2 * |x|^2 / n in row r, mse being the relative squared error of the code: it
 * looks like noise. So noise of that form is put on the outputs of one matrix at a time, strong
 * enough to be seen and weak enough that the divergence of the predictions, which then grows with
 * its square, is in proportion to its variance.
 */
#include "quantize/measure.h"

#include "base/base.h"
#include "kernels/math.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { LEAST_TOKENS = 128, LEAST_GROUPS = 4 };

static const double noise_power = 0.01;

/* What is known of a matrix of the file. */
typedef struct subject {
    const tensor *t;
    double *row_norm; /* (n_rows) |w_r| */
    double weights;   /* sum of |w_r|^2 */
    double x2, y2;    /* sums of |x|^2 and |y|^2 over the tokens, where it is multiplied */
    double looked_up; /* sum of |y|^2 where it is looked up */
    size_t group;     /* number of the first subject that shares its pass */
} subject;

typedef struct study {
    const calibration_options *options;
    const hepta_model *model;
    hepta_session *session;
    uint32_t n; /* tokens */
    subject *subjects;
    size_t n_subjects;
    const subject *noisy; /* the first of the group that has noise; NULL: the sums are taken */
    bool look_up;         /* the noise is for where it is looked up */
    float *base, *logits; /* (n, n_vocab) */
    double *divergence;   /* (n) */
} study;

static double sum_of_squares(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    return sum;
}

/* A number of [-sqrt(3), sqrt(3)): variance 1; a function of i alone. */
static double noise(uint64_t i) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return ((double)(z >> 11) * 0x1p-53 - 0.5) * 3.4641016151377544;
}

static void take_sums(subject *u, const matrix *a, const float *x, const float *y, uint32_t n) {
    if (x == NULL) {
        u->looked_up = sum_of_squares(y, (size_t)n * a->n_cols);
    } else {
        u->x2 = sum_of_squares(x, (size_t)n * a->n_cols);
        u->y2 = sum_of_squares(y, (size_t)n * a->n_rows);
    }
}

static void add_noise(const study *s, const subject *u, const matrix *a, const float *x, float *y,
                      uint32_t n) {
    const uint32_t width = x == NULL ? a->n_cols : a->n_rows;
    const double power = noise_power * u->y2 / (u->weights * u->x2);
#pragma omp parallel for num_threads(s->options->threads) schedule(static)
    for (uint32_t t = 0; t < n; t++) {
        float *row = y + (size_t)t * width;
        const double level =
            x == NULL ? sqrt(noise_power * sum_of_squares(row, width) / width)
                      : sqrt(power * sum_of_squares(x + (size_t)t * a->n_cols, a->n_cols));
        for (uint32_t r = 0; r < width; r++) {
            const double deviation = x == NULL ? level : level * u->row_norm[r];
            row[r] += (float)(deviation * noise((uint64_t)t * width + r));
        }
    }
}

static void on_output(void *context, const matrix *a, const float *x, float *y, uint32_t n) {
    study *s = context;
    subject *u = s->subjects, *end = u + s->n_subjects;
    while (u < end && strcmp(u->t->name, a->source->name) != 0) {
        u++;
    }
    if (u == end) {
        return;
    }
    if (s->noisy == NULL) {
        take_sums(u, a, x, y, n);
    } else if (s->subjects + u->group == s->noisy && (x == NULL) == s->look_up) {
        add_noise(s, u, a, x, y, n);
    }
}

static double log_sum_exp(const float *x, uint32_t n) {
    float max = x[0];
    for (uint32_t i = 1; i < n; i++) {
        max = x[i] > max ? x[i] : max;
    }
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += (double)math_exp_f32(x[i] - max);
    }
    return (double)max + math_log_f64(sum);
}

/* Mean of KL(softmax(base) || softmax(logits)) with the noise at hand. */
static double divergence(study *s) {
    const uint32_t n_vocab = s->model->info.n_vocab;
    const llama_observer observer = {.output = on_output, .context = s};
    llama_observe(s->session, s->n, s->logits, &observer);
#pragma omp parallel for num_threads(s->options->threads) schedule(static)
    for (uint32_t t = 0; t < s->n; t++) {
        const float *x = s->base + (size_t)t * n_vocab, *y = s->logits + (size_t)t * n_vocab;
        const double lx = log_sum_exp(x, n_vocab), ly = log_sum_exp(y, n_vocab);
        double sum = 0;
        for (uint32_t i = 0; i < n_vocab; i++) {
            const double log_p = (double)x[i] - lx;
            sum += (double)math_exp_f32((float)log_p) * (log_p - ((double)y[i] - ly));
        }
        s->divergence[t] = sum;
    }
    double sum = 0;
    for (uint32_t t = 0; t < s->n; t++) {
        sum += s->divergence[t];
    }
    return sum > 0 ? sum / s->n : 0;
}

static hepta_status find_norms(study *s, hepta_error *err) {
    for (size_t i = 0; i < s->n_subjects; i++) {
        subject *u = &s->subjects[i];
        const uint32_t n_cols = (uint32_t)u->t->ne[0];
        float *row = memory_alloc(n_cols, sizeof *row);
        u->row_norm = memory_alloc((size_t)u->t->ne[1], sizeof *u->row_norm);
        if (row == NULL || u->row_norm == NULL) {
            memory_free(row);
            return error_set(err, HEPTA_ERROR_MEMORY, "no memory to measure %s", u->t->name);
        }
        for (uint64_t r = 0; r < u->t->ne[1]; r++) {
            kernels_tensor_row(s->model->kernels, u->t, r, row);
            const double w2 = sum_of_squares(row, n_cols);
            u->row_norm[r] = sqrt(w2);
            u->weights += w2;
        }
        memory_free(row);
    }
    return HEPTA_OK;
}

static double divergence_of(study *s, const subject *u, bool look_up) {
    s->noisy = u;
    s->look_up = look_up;
    const double d = divergence(s) / noise_power;
    s->noisy = NULL;
    return d;
}

/* The tensors of the group that begins with u, in terms of the measured: see measure.h. */
static void measure_group(study *s, const subject *u, const container *file, const double *saved,
                          double *sensitivity) {
    const bool tied = container_tensor(file, "output.weight") == NULL;
    const subject *end = s->subjects + s->n_subjects;
    uint32_t n_members = 0;
    for (const subject *v = u; v < end; v++) {
        n_members += s->subjects + v->group == u;
    }
    const double part = u->x2 > 0 ? divergence_of(s, u, false) / n_members : 0;
    for (const subject *v = u; v < end; v++) {
        const uint32_t place = calibration_place(v->t->name, s->model->info.n_layer, tied);
        if (s->subjects + v->group == u && place != UINT32_MAX && v->y2 > 0 && v->weights > 0) {
            sensitivity[v->t - file->tensors] +=
                part * saved[place] * v->weights * v->x2 / ((double)v->t->ne[0] * v->y2);
        }
    }
    if (u->looked_up > 0) {
        sensitivity[u->t - file->tensors] += divergence_of(s, u, true);
    }
}

/* Of blk.N.KIND: N, and KIND; NULL for other tensors. */
static const char *kind_of(const char *name, uint32_t *layer) {
    int end = 0;
    return sscanf(name, "blk.%u.%n", layer, &end) == 1 && end > 0 ? name + end : NULL;
}

/* Tensors of one kind in `span` layers share a pass; how many passes there are. */
static size_t share_passes(subject *subjects, size_t n, uint32_t span) {
    size_t n_groups = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t layer = 0, other = 0;
        const char *kind = kind_of(subjects[i].t->name, &layer);
        size_t first = kind != NULL ? 0 : i;
        for (; first < i; first++) {
            const char *its = kind_of(subjects[first].t->name, &other);
            if (its != NULL && strcmp(its, kind) == 0 && other / span == layer / span) {
                break;
            }
        }
        subjects[i].group = first;
        n_groups += first == i;
    }
    return n_groups;
}

/* The matrices of the file and what is measured of them; 0 tokens: nothing is worth its while. */
static hepta_status find_subjects(const container *file, const measure_budget *budget, study *s,
                                  hepta_error *err) {
    s->subjects = memory_alloc(file->n_tensors, sizeof *s->subjects);
    if (s->subjects == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for %zu tensors", file->n_tensors);
    }
    double n_weights = 0;
    uint32_t n_layer = 0;
    for (size_t i = 0; i < file->n_tensors; i++) {
        if (file->tensors[i].n_dims == 2) {
            uint32_t layer = 0;
            s->subjects[s->n_subjects++].t = &file->tensors[i];
            n_weights += (double)tensor_n_weights(&file->tensors[i]);
            if (kind_of(file->tensors[i].name, &layer) != NULL && layer >= n_layer) {
                n_layer = layer + 1;
            }
        }
    }
    s->n = 0;
    for (uint32_t span = 1; span == 1 || (uint64_t)span * LEAST_GROUPS <= n_layer; span *= 2) {
        /* one more for the unquantized model, one for a tied head */
        const size_t passes = share_passes(s->subjects, s->n_subjects, span) + 2;
        for (uint32_t n = budget->n_tokens; n >= LEAST_TOKENS; n /= 2) {
            if (n_weights * (double)passes * n <= budget->work) {
                s->n = n;
                return HEPTA_OK;
            }
        }
    }
    return HEPTA_OK;
}

static void study_close(study *s) {
    for (size_t i = 0; i < s->n_subjects; i++) {
        memory_free(s->subjects[i].row_norm);
    }
    memory_free(s->subjects);
    memory_free(s->base);
    memory_free(s->logits);
    memory_free(s->divergence);
}

static hepta_status study_open(study *s, calibration **c, hepta_error *err) {
    calibration_options o = *s->options;
    o.n_tokens = s->n;
    hepta_status status = calibration_open(&o, c, err);
    if (status != HEPTA_OK) {
        return status;
    }
    s->session = calibration_session(*c, &s->n);
    s->model = s->session->model;
    const size_t n_logits = (size_t)s->n * s->model->info.n_vocab;
    s->base = memory_alloc(n_logits, sizeof *s->base);
    s->logits = memory_alloc(n_logits, sizeof *s->logits);
    s->divergence = memory_alloc(s->n, sizeof *s->divergence);
    if (s->base == NULL || s->logits == NULL || s->divergence == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for the logits of %u tokens", s->n);
    }
    return find_norms(s, err);
}

hepta_status measure_pays(const container *file, const measure_budget *budget, bool *out,
                          hepta_error *err) {
    study s = {.options = NULL};
    hepta_status status = find_subjects(file, budget, &s, err);
    *out = s.n > 0;
    study_close(&s);
    return status;
}

hepta_status measure_sensitivity(const calibration_options *o, const container *file,
                                 const measure_budget *budget, const double *saved,
                                 double *sensitivity, hepta_progress_fn progress,
                                 void *progress_context, hepta_error *err) {
    study s = {.options = o};
    calibration *c = NULL;
    hepta_status status = find_subjects(file, budget, &s, err);
    if (status == HEPTA_OK) {
        status = study_open(&s, &c, err);
    }
    if (status == HEPTA_OK) {
        const llama_observer observer = {.output = on_output, .context = &s};
        llama_observe(s.session, s.n, s.base, &observer);
    }
    memset(sensitivity, 0, file->n_tensors * sizeof *sensitivity);
    for (size_t i = 0; i < s.n_subjects && status == HEPTA_OK; i++) {
        if (s.subjects[i].group == i) {
            measure_group(&s, &s.subjects[i], file, saved, sensitivity);
        }
        if (progress != NULL &&
            !progress(progress_context, "measuring sensitivities", i + 1, s.n_subjects)) {
            status = error_set(err, HEPTA_ERROR_INTERRUPTED,
                               "interrupted measuring sensitivities; nothing was kept");
        }
    }
    study_close(&s);
    calibration_free(c);
    return status;
}
