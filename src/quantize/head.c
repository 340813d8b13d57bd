/*
 * head.c - weights of the head's inputs, by groups of its rows.
 *
 * A row of the head is most important where its token is possible but not sure. Rows are grouped by
 * the mean direction of the inputs where they are: k-means on the sphere, of FEATURES items of the
 * rotated inputs, which are as good as random projections. Two passes over the logits, TOKENS
 * inputs at a time: one for the directions, one for the weights of the groups.
 *
 * Invariant: sums run in the order of tokens or rows.
 */
#include "quantize/head.h"

#include "base/base.h"
#include "kernels/math.h"

#include <math.h>
#include <omp.h>
#include <string.h>

enum {
    GROUPS_MAX = 64,
    ROWS_PER_GROUP = 16, /* on average, at least */
    FEATURES = 64,
    ROUNDS = 12,
    TOKENS = 256,
    ROWS = 64,
    COLUMNS = 16,
    ALL_INPUTS = 128 /* so many inputs is the mean over all worth */
};

typedef struct study {
    const tensor *t;
    const moments *m;
    const kernels *k;
    int threads;
    uint32_t n_rows, n_cols, n_features, n_groups;
    float *p;          /* (n_rows, TOKENS): p (1 - p) of the tokens at hand */
    float *row;        /* (threads, ROWS, n_cols) */
    float *x;          /* (n_features, TOKENS): their rotated inputs */
    float *scratch;    /* (2, n_padded) */
    float *direction;  /* (n_rows, n_features) sums, then unit vectors */
    float *centre;     /* (n_groups, n_features) */
    float *likeness;   /* (n_rows, n_groups) */
    double *mass;      /* (n_rows) sums of p (1 - p) */
    double *far;       /* (n_rows) distance from the nearest centre */
    double *sum;       /* (n_groups, n_features) */
    uint32_t *group;   /* (n_rows) */
    head_groups *into; /* the second pass: adds up weights */
    head_poll *poll;
    void *context;
} study;

static uint32_t least(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

/* s->p: logits of inputs [first, first + n), row by row. */
static void find_logits(const study *s, uint32_t first, uint32_t n) {
#pragma omp parallel for num_threads(s->threads) schedule(dynamic)
    for (uint32_t r = 0; r < s->n_rows; r += ROWS) {
        const uint32_t rows = least(s->n_rows - r, ROWS);
        float *w = s->row + (size_t)omp_get_thread_num() * ROWS * s->n_cols;
        for (uint32_t i = 0; i < rows; i++) {
            kernels_tensor_row(s->k, s->t, r + i, w + (size_t)i * s->n_cols);
        }
        s->k->matmul_f32(s->m->x + (size_t)first * s->n_cols, n, s->n_cols, w, s->n_cols, rows,
                         s->p + (size_t)r * TOKENS, TOKENS);
    }
}

/* Columns [first, first + n), n <= COLUMNS, of s->p: from logits to p (1 - p). */
static void weigh_columns(const study *s, uint32_t first, uint32_t n) {
    float max[COLUMNS];
    double sum[COLUMNS] = {0};
    for (uint32_t c = 0; c < n; c++) {
        max[c] = s->p[first + c];
    }
    for (size_t r = 1; r < s->n_rows; r++) {
        for (uint32_t c = 0; c < n; c++) {
            const float z = s->p[r * TOKENS + first + c];
            max[c] = z > max[c] ? z : max[c];
        }
    }
    for (size_t r = 0; r < s->n_rows; r++) {
        for (uint32_t c = 0; c < n; c++) {
            float *z = &s->p[r * TOKENS + first + c];
            *z = math_exp_f32(*z - max[c]);
            sum[c] += (double)*z;
        }
    }
    for (size_t r = 0; r < s->n_rows; r++) {
        for (uint32_t c = 0; c < n; c++) {
            const double p = (double)s->p[r * TOKENS + first + c] / sum[c];
            s->p[r * TOKENS + first + c] = (float)(p * (1 - p));
        }
    }
}

/* Adds to the directions of the rows. */
static void add_directions(const study *s, uint32_t first, uint32_t n) {
    const rotation *rot = s->m->rotation;
    for (uint32_t i = 0; i < n; i++) {
        memcpy(s->scratch, s->m->x + (size_t)(first + i) * rot->n, rot->n * sizeof *s->scratch);
        s->k->rotate(rot, s->scratch, s->scratch + rot->n_padded);
        for (size_t c = 0; c < s->n_features; c++) {
            s->x[c * n + i] = s->scratch[c];
        }
    }
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (uint32_t i = 0; i < s->n_rows; i += ROWS) {
        float y[ROWS * FEATURES];
        const uint32_t rows = least(s->n_rows - i, ROWS);
        const float *p = s->p + (size_t)i * TOKENS;
        s->k->matmul_f32(s->x, s->n_features, n, p, TOKENS, rows, y, s->n_features);
        for (uint32_t c = 0; c < rows * s->n_features; c++) {
            s->direction[(size_t)i * s->n_features + c] += y[c];
        }
        for (size_t r = 0; r < rows; r++) {
            for (uint32_t c = 0; c < n; c++) {
                s->mass[i + r] += (double)p[r * TOKENS + c];
            }
        }
    }
}

/* Adds columns [first, first + n), n <= COLUMNS, of s->p to the groups' weights of inputs at `to`.
 */
static void add_weights(const study *s, uint32_t first, uint32_t n, uint32_t to) {
    for (size_t r = 0; r < s->n_rows; r++) {
        float *weight = s->into->weight + (size_t)s->group[r] * s->m->n_tokens + to;
        for (uint32_t c = 0; c < n; c++) {
            weight[c] += s->p[r * TOKENS + first + c];
        }
    }
}

/* One pass over the logits of all inputs; what poll says. */
static hepta_status pass(const study *s) {
    for (uint32_t first = 0; first < s->m->n_tokens; first += TOKENS) {
        const hepta_status status = s->poll != NULL ? s->poll(s->context) : HEPTA_OK;
        if (status != HEPTA_OK) {
            return status;
        }
        const uint32_t n = least(s->m->n_tokens - first, TOKENS);
        find_logits(s, first, n);
#pragma omp parallel for num_threads(s->threads) schedule(dynamic)
        for (uint32_t c = 0; c < n; c += COLUMNS) {
            weigh_columns(s, c, least(n - c, COLUMNS));
            if (s->into != NULL) {
                add_weights(s, c, least(n - c, COLUMNS), first + c);
            }
        }
        if (s->into == NULL) {
            add_directions(s, first, n);
        }
    }
    return HEPTA_OK;
}

/* ---- k-means ----------------------------------------------------------- */

static void make_unit(float *x, const double *from, uint32_t n) {
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += from[i] * from[i];
    }
    const double factor = sum > 0 ? 1 / sqrt(sum) : 0;
    for (uint32_t i = 0; i < n; i++) {
        x[i] = (float)(from[i] * factor);
    }
}

/* Likenesses of all rows to centres [first, first + n). */
static void compare(const study *s, uint32_t first, uint32_t n) {
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (uint32_t r = 0; r < s->n_rows; r += ROWS) {
        s->k->matmul_f32(s->centre + (size_t)first * s->n_features, n, s->n_features,
                         s->direction + (size_t)r * s->n_features, s->n_features,
                         least(s->n_rows - r, ROWS), s->likeness + (size_t)r * s->n_groups + first,
                         s->n_groups);
    }
}

/* Each centre is the row that those before it leave the most error. */
static void start_centres(const study *s) {
    for (uint32_t r = 0; r < s->n_rows; r++) {
        s->far[r] = 2;
    }
    for (uint32_t j = 0; j < s->n_groups; j++) {
        uint32_t best = 0;
        double most = -1;
        for (uint32_t r = 0; r < s->n_rows; r++) {
            const double error = s->far[r] * s->far[r] * s->mass[r];
            if (error > most) {
                most = error;
                best = r;
            }
        }
        memcpy(s->centre + (size_t)j * s->n_features, s->direction + (size_t)best * s->n_features,
               s->n_features * sizeof *s->centre);
        compare(s, j, 1);
        for (size_t r = 0; r < s->n_rows; r++) {
            const double far = 1 - (double)s->likeness[r * s->n_groups + j];
            s->far[r] = far < s->far[r] ? far : s->far[r];
        }
    }
}

static void assign(const study *s) {
    compare(s, 0, s->n_groups);
    for (size_t r = 0; r < s->n_rows; r++) {
        const float *likeness = s->likeness + r * s->n_groups;
        uint32_t best = 0;
        for (uint32_t j = 1; j < s->n_groups; j++) {
            best = likeness[j] > likeness[best] ? j : best;
        }
        s->group[r] = best;
    }
}

static void move_centres(const study *s) {
    memset(s->sum, 0, (size_t)s->n_groups * s->n_features * sizeof *s->sum);
    for (size_t r = 0; r < s->n_rows; r++) {
        double *sum = s->sum + (size_t)s->group[r] * s->n_features;
        for (uint32_t c = 0; c < s->n_features; c++) {
            sum[c] += s->mass[r] * (double)s->direction[r * s->n_features + c];
        }
    }
    for (size_t j = 0; j < s->n_groups; j++) {
        make_unit(s->centre + j * s->n_features, s->sum + j * s->n_features, s->n_features);
    }
}

static void find_groups(const study *s) {
    double direction[FEATURES];
    for (size_t r = 0; r < s->n_rows; r++) {
        for (uint32_t c = 0; c < s->n_features; c++) {
            direction[c] = (double)s->direction[r * s->n_features + c];
        }
        make_unit(s->direction + r * s->n_features, direction, s->n_features);
    }
    start_centres(s);
    assign(s);
    for (int i = 1; i < ROUNDS; i++) {
        move_centres(s);
        assign(s);
    }
}

/* Rows by group; empty groups are left out, and s->group has the numbers of the others. */
static void list_rows(const study *s, head_groups *g) {
    uint32_t at = 0;
    for (uint32_t j = 0; j < s->n_groups; j++) {
        const uint32_t before = at;
        for (uint32_t r = 0; r < s->n_rows; r++) {
            if (s->group[r] == j) {
                g->rows[at++] = r;
            }
        }
        if (at > before) {
            g->first[g->n++] = before;
        }
    }
    g->first[g->n] = at;
    for (uint32_t i = 0; i < g->n; i++) {
        for (uint32_t k = g->first[i]; k < g->first[i + 1]; k++) {
            s->group[g->rows[k]] = i;
        }
    }
}

/* ---- Groups ------------------------------------------------------------ */

static bool study_open(study *s) {
    const size_t n_rows = s->n_rows, n_groups = s->n_groups, n_features = s->n_features;
    s->p = memory_alloc(n_rows * TOKENS, sizeof *s->p);
    s->row = memory_alloc((size_t)s->threads * ROWS * s->n_cols, sizeof *s->row);
    s->x = memory_alloc(n_features * TOKENS, sizeof *s->x);
    s->scratch = memory_alloc((size_t)2 * s->m->n, sizeof *s->scratch);
    s->direction = memory_alloc(n_rows * n_features, sizeof *s->direction);
    s->centre = memory_alloc(n_groups * n_features, sizeof *s->centre);
    s->likeness = memory_alloc(n_rows * n_groups, sizeof *s->likeness);
    s->mass = memory_alloc(n_rows, sizeof *s->mass);
    s->far = memory_alloc(n_rows, sizeof *s->far);
    s->sum = memory_alloc(n_groups * n_features, sizeof *s->sum);
    s->group = memory_alloc(n_rows, sizeof *s->group);
    return s->p != NULL && s->row != NULL && s->x != NULL && s->scratch != NULL &&
           s->direction != NULL && s->centre != NULL && s->likeness != NULL && s->mass != NULL &&
           s->far != NULL && s->sum != NULL && s->group != NULL;
}

static void study_close(study *s) {
    memory_free(s->p);
    memory_free(s->row);
    memory_free(s->x);
    memory_free(s->scratch);
    memory_free(s->direction);
    memory_free(s->centre);
    memory_free(s->likeness);
    memory_free(s->mass);
    memory_free(s->far);
    memory_free(s->sum);
    memory_free(s->group);
}

hepta_status head_groups_create(const tensor *t, const moments *m, const kernels *k, int threads,
                                head_poll *poll, void *context, head_groups **out,
                                hepta_error *err) {
    study s = {.t = t, .m = m, .k = k, .threads = threads, .poll = poll, .context = context};
    s.n_rows = (uint32_t)t->ne[1];
    s.n_cols = (uint32_t)t->ne[0];
    s.n_features = least(m->n, FEATURES);
    s.n_groups = least((s.n_rows + ROWS_PER_GROUP - 1) / ROWS_PER_GROUP, GROUPS_MAX);
    *out = NULL;
    head_groups *g = memory_alloc(1, sizeof *g);
    if (g != NULL) {
        g->first = memory_alloc((size_t)s.n_groups + 1, sizeof *g->first);
        g->rows = memory_alloc(s.n_rows, sizeof *g->rows);
        g->weight = memory_alloc((size_t)s.n_groups * m->n_tokens, sizeof *g->weight);
    }
    const bool fits = study_open(&s);
    hepta_status status = HEPTA_OK;
    if (!fits || g == NULL || g->first == NULL || g->rows == NULL || g->weight == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "no memory for the groups of %u rows of %s",
                           s.n_rows, t->name);
        goto done;
    }
    status = pass(&s);
    if (status == HEPTA_OK) {
        find_groups(&s);
        list_rows(&s, g);
        s.into = g;
        status = pass(&s);
    }
done:
    if (status == HEPTA_OK) {
        *out = g;
    } else {
        head_groups_free(g);
    }
    study_close(&s);
    return status;
}

void head_groups_free(head_groups *g) {
    if (g != NULL) {
        memory_free(g->first);
        memory_free(g->rows);
        memory_free(g->weight);
        memory_free(g);
    }
}

hepta_status head_moments(const head_groups *g, uint32_t i, const moments *m, const kernels *k,
                          int threads, float *h, moments *out, hepta_error *err) {
    const float *weight = g->weight + (size_t)i * m->n_tokens;
    double sum = 0, squares = 0;
    for (uint32_t t = 0; t < m->n_tokens; t++) {
        sum += (double)weight[t];
        squares += (double)weight[t] * (double)weight[t];
    }
    hepta_status status = moments_sum(m->rotation, m->x, weight, m->n_tokens, k, threads, h, err);
    if (status != HEPTA_OK) {
        return status;
    }
    const double n_own = squares > 0 ? sum * sum / squares : 0; /* inputs of equal weight */
    const double part = n_own / (n_own + ALL_INPUTS);
    const double own = sum > 0 ? part / sum : 0, all = (1 - part) / m->n_tokens;
    for (size_t x = 0; x < (size_t)m->n * m->n; x++) {
        h[x] = (float)(own * (double)h[x] + all * (double)m->h[x]);
    }
    *out = *m;
    out->h = h;
    out->n_tokens = (uint32_t)(part * n_own + (1 - part) * m->n_tokens);
    out->n_tokens = out->n_tokens > 0 ? out->n_tokens : 1;
    return HEPTA_OK;
}
