/*
 * feedback.c - from the second moments of a layer's inputs to the error feedback of its rows.
 *
 * The Cholesky factor L of the matrix with rows and columns reversed gives U and D:
 * U_jk = L_j'k' / L_k'k' and D_k = L_k'k'^2 with i' = n - 1 - i. It is computed by columns of
 * PANEL, left to right; what the columns before take away is a matrix product of the kernels, whose
 * bits do not depend on the machine. Rows are independent of each other.
 */
#include "quantize/feedback.h"

#include "base/base.h"

#include <math.h>
#include <string.h>

enum { PANEL = 64, ROWS = 64, DEPTH = 512 };

/*
 * Columns [j, j + n_panel) of rows from j on, less the products of the columns before, DEPTH of
 * them at a time.
 */
static void subtract_before(float *l, size_t n, size_t j, uint32_t n_panel, float *panel,
                            const kernels *k, int threads) {
    for (size_t first = 0; first < j; first += DEPTH) {
        const size_t depth = j - first < (size_t)DEPTH ? j - first : (size_t)DEPTH;
        for (size_t r = 0; r < n_panel; r++) {
            memcpy(panel + first * n_panel + r * depth, l + (j + r) * n + first,
                   depth * sizeof *panel);
        }
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = j; i < n; i += ROWS) {
        float y[ROWS * PANEL];
        const uint32_t rows = n - i < ROWS ? (uint32_t)(n - i) : ROWS;
        for (size_t first = 0; first < j; first += DEPTH) {
            const uint32_t depth = j - first < (size_t)DEPTH ? (uint32_t)(j - first) : DEPTH;
            k->matmul_f32(panel + first * n_panel, n_panel, depth, l + i * n + first, n, rows, y,
                          PANEL);
            for (size_t r = 0; r < rows; r++) {
                for (size_t c = 0; c < n_panel; c++) {
                    l[(i + r) * n + j + c] -= y[r * PANEL + c];
                }
            }
        }
    }
}

/* The rows of the panel at column j that its diagonal is in; `least` bounds that from below. */
static void factor_panel(float *l, size_t n, size_t j, size_t n_panel, double least) {
    for (size_t i = j; i < j + n_panel; i++) {
        for (size_t c = j; c <= i; c++) {
            double sum = (double)l[i * n + c];
            for (size_t x = j; x < c; x++) {
                sum -= (double)l[i * n + x] * (double)l[c * n + x];
            }
            l[i * n + c] =
                (float)(c < i ? sum / (double)l[c * n + c] : sqrt(sum > least ? sum : least));
        }
    }
}

/* A row below them; above (PANEL, PANEL): transposed. */
static void solve_row(float *row, size_t n_panel, const double *above) {
    double rest[PANEL];
    for (size_t c = 0; c < n_panel; c++) {
        rest[c] = (double)row[c];
    }
    for (size_t c = 0; c < n_panel; c++) {
        row[c] = (float)(rest[c] / above[c * PANEL + c]);
        for (size_t x = c + 1; x < n_panel; x++) {
            rest[x] -= (double)row[c] * above[c * PANEL + x];
        }
    }
}

static void cholesky(float *l, size_t n, double least, float *panel, const kernels *k,
                     int threads) {
    for (size_t j = 0; j < n; j += PANEL) {
        const size_t n_panel = n - j < PANEL ? n - j : PANEL;
        subtract_before(l, n, j, (uint32_t)n_panel, panel, k, threads);
        factor_panel(l, n, j, n_panel, least);
        double above[PANEL * PANEL];
        for (size_t c = 0; c < n_panel; c++) {
            for (size_t x = c; x < n_panel; x++) {
                above[c * PANEL + x] = (double)l[(j + x) * n + j + c];
            }
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (size_t i = j + n_panel; i < n; i++) {
            solve_row(l + i * n + j, n_panel, above);
        }
    }
}

static double mean_of_diagonal(const moments *m) {
    double sum = 0;
    for (size_t i = 0; i < m->n; i++) {
        sum += (double)m->h[i * m->n + i];
    }
    return sum / m->n;
}

/* U_jk from the factor of the reversed matrix. */
static float upper(const float *l, size_t n, size_t j, size_t k) {
    return l[(n - 1 - j) * n + n - 1 - k] / l[(n - 1 - k) * n + n - 1 - k];
}

/* U_jk of the weights k of block b with the weights j < known: (CODE_BLOCK, known). */
static void fill_far(const float *l, size_t n, size_t b, size_t known, float *far) {
    for (size_t j = 0; j < known; j++) {
        for (size_t i = 0; i < CODE_BLOCK; i++) {
            far[i * known + j] = upper(l, n, j, b * CODE_BLOCK + i);
        }
    }
}

static void fill(feedback *f, const float *l, size_t n, unsigned lag, float *memory, int threads) {
    const size_t ahead = (lag + 1) * (size_t)CODE_BLOCK;
    float *weight = memory, *near = weight + n, *far = near + n * ahead;
    double sum = 0;
    for (size_t k = 0; k < n; k++) {
        const double root = (double)l[k * n + k];
        sum += root * root;
        weight[n - 1 - k] = (float)(root * root / f->mean);
    }
    f->saved = sum / (double)n / f->mean;
    for (size_t j = 0; j < n; j++) {
        const size_t first = j / CODE_BLOCK * CODE_BLOCK;
        for (size_t i = 0; i < ahead; i++) {
            near[j * ahead + i] = first + i > j && first + i < n ? upper(l, n, j, first + i) : 0.0f;
        }
    }
    for (size_t b = lag + 1; b < n / CODE_BLOCK; b++) {
        f->far[b] = far;
        far += (b - lag) * CODE_BLOCK * CODE_BLOCK;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t b = lag + 1; b < n / CODE_BLOCK; b++) {
        fill_far(l, n, b, (b - lag) * CODE_BLOCK, memory + (f->far[b] - memory));
    }
    f->code.weight = weight;
    f->code.near = near;
    f->code.far = f->far;
}

hepta_status feedback_create(const moments *m, unsigned lag, const kernels *k, int threads,
                             feedback **out, hepta_error *err) {
    const size_t n = m->n, n_blocks = n / CODE_BLOCK;
    const double mean = mean_of_diagonal(m);
    const double damping = 0.003 + 0.2 * (double)n / m->n_tokens;
    *out = NULL;
    if (!(mean > 0 && mean < (double)INFINITY)) {
        return HEPTA_OK;
    }
    size_t n_far = 0;
    for (size_t b = lag + 1; b < n_blocks; b++) {
        n_far += (b - lag) * CODE_BLOCK * CODE_BLOCK;
    }
    feedback *f = memory_alloc(1, sizeof *f);
    float *l = memory_alloc(n * n, sizeof *l), *panel = memory_alloc(n * PANEL, sizeof *panel);
    if (f != NULL) {
        f->memory = memory_alloc(n + n * (lag + 1) * CODE_BLOCK + n_far, sizeof *f->memory);
        f->far = memory_alloc(n_blocks, sizeof *f->far);
    }
    hepta_status status = HEPTA_OK;
    if (l == NULL || panel == NULL || f == NULL || f->memory == NULL || f->far == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "no memory for the moments of %zu inputs", n);
        feedback_free(f);
        goto done;
    }
    for (size_t i = 0; i < n * n; i++) {
        l[i] = m->h[n * n - 1 - i];
    }
    for (size_t i = 0; i < n; i++) {
        l[i * n + i] = (float)((double)l[i * n + i] + damping * mean);
    }
    cholesky(l, n, 0.5 * damping * mean, panel, k, threads);
    f->mean = mean;
    f->code = (code_feedback){.n = n, .lag = lag, .matmul = k->matmul_f32};
    fill(f, l, n, lag, f->memory, threads);
    *out = f;
done:
    memory_free(l);
    memory_free(panel);
    return status;
}

void feedback_free(feedback *f) {
    if (f != NULL) {
        memory_free(f->memory);
        memory_free(f->far);
        memory_free(f);
    }
}
