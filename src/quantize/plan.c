/*
 * plan.c - a greedy bit allocation.
 *
 * A tensor coded at R bits per weight has a relative squared error near 4^-R, and adds to the error
 * of the model in proportion to it, with a factor of its own: its sensitivity. Starting from the
 * lowest rate allowed, the tensor that saves the most error for each byte gets the next rate until
 * nothing fits. No rate is more than a bit below the target where the budget allows: at large
 * errors the proportion breaks down.
 *
 * Everything is exact integer or correctly rounded arithmetic in a fixed order: the same plan on
 * every machine. The measurements behind the factors: docs/QUALITY.md.
 */
#include "quantize/plan.h"

#include "base/base.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool plan_is_packed(const tensor *t) {
    return t->n_dims == 2;
}

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && memcmp(s + n - m, end, m) == 0;
}

/*
 * Weight of a tensor's relative error in the error of the logits, against a gate's: measured as the
 * KL divergence at 3 bits, one kind at a time, on the bundled model (docs/QUALITY.md). The matrix
 * that makes the logits stands out; `tied` when the embedding is that matrix.
 */
static double estimate(const char *name, bool tied) {
    static const struct {
        const char *end;
        double factor;
    } kinds[] = {
        {".attn_q.weight", 0.25},
        {".attn_k.weight", 0.35},
        {".attn_v.weight", 0.65},
        {".attn_output.weight", 0.65},
    };
    if (strcmp(name, "output.weight") == 0 || (tied && strcmp(name, "token_embd.weight") == 0)) {
        return 50;
    }
    if (strcmp(name, "token_embd.weight") == 0) {
        return 8;
    }
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (ends_with(name, kinds[i].end)) {
            return kinds[i].factor;
        }
    }
    return 1;
}

static uint64_t tensor_bytes(const tensor *t, uint32_t half_bits) {
    uint64_t n = 4 * tensor_n_weights(t);
    if (half_bits != 0) {
        (void)tensor_packed_bytes(half_bits, t->ne[1], t->ne[0], &n); /* checked at opening */
    }
    return n;
}

uint64_t plan_bytes(const tensor *tensors, size_t n, const uint32_t *half_bits) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += tensor_bytes(&tensors[i], half_bits[i]);
    }
    return sum;
}

static uint32_t next_rate(uint32_t half_bits) {
    return half_bits == HALF_BITS_MAX ? HALF_BITS_INT8 : half_bits + 1;
}

/* Relative squared error of a rate. */
static double code_error(uint32_t half_bits) {
    double error = 8e-5; /* int8 with one scale a row */
    if (half_bits <= HALF_BITS_MAX) {
        error = 1.14; /* of the trellis code over the bound, docs/CODE.md */
        for (uint32_t i = 0; i < half_bits; i++) {
            error *= 0.5;
        }
    }
    return error;
}

/* Every matrix at `rate`; the bytes of all. */
static uint64_t start_at(const tensor *tensors, size_t n, uint32_t rate, uint32_t *half_bits) {
    for (size_t i = 0; i < n; i++) {
        half_bits[i] = plan_is_packed(&tensors[i]) ? rate : 0;
    }
    return plan_bytes(tensors, n, half_bits);
}

/* What the next rate of a tensor saves for each byte. */
typedef struct step {
    double saving;
    size_t tensor;
} step;

static bool comes_first(const step *a, const step *b) {
    return a->saving > b->saving || (a->saving == b->saving && a->tensor < b->tensor);
}

/* Puts heap[at] to its place among the `n` items of which each comes before its two children. */
static void sift_down(step *heap, size_t n, size_t at) {
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && comes_first(&heap[child + 1], &heap[child]);
        if (!comes_first(&heap[child], &heap[at])) {
            return;
        }
        const step down = heap[at];
        heap[at] = heap[child];
        heap[child] = down;
    }
}

static uint64_t step_bytes(const tensor *t, uint32_t now) {
    return tensor_bytes(t, next_rate(now)) - tensor_bytes(t, now);
}

static double step_saving(const tensor *t, double factor, uint32_t now) {
    return factor * (code_error(now) - code_error(next_rate(now))) / (double)step_bytes(t, now);
}

/* Spends what is left of the budget; heap (n): room. */
static void improve(const tensor *tensors, size_t n, const double *factor, uint64_t left,
                    uint32_t *half_bits, step *heap) {
    size_t n_steps = 0;
    for (size_t i = 0; i < n; i++) {
        if (half_bits[i] != 0 && half_bits[i] != HALF_BITS_INT8) {
            heap[n_steps++] = (step){step_saving(&tensors[i], factor[i], half_bits[i]), i};
        }
    }
    for (size_t i = n_steps / 2; i-- > 0;) {
        sift_down(heap, n_steps, i);
    }
    while (n_steps > 0 && heap[0].saving > 0) {
        const size_t i = heap[0].tensor;
        const uint64_t bytes = step_bytes(&tensors[i], half_bits[i]);
        const bool fits = bytes <= left;
        if (fits) {
            left -= bytes;
            half_bits[i] = next_rate(half_bits[i]);
        }
        if (fits && half_bits[i] != HALF_BITS_INT8) {
            heap[0].saving = step_saving(&tensors[i], factor[i], half_bits[i]);
        } else { /* what does not fit now never will */
            heap[0] = heap[--n_steps];
        }
        sift_down(heap, n_steps, 0);
    }
}

static hepta_status find_factors(const tensor *tensors, size_t n, const double *sensitivity,
                                 double **out, hepta_error *err) {
    double *factor = memory_alloc(n, sizeof *factor);
    if (factor == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a plan of %zu tensors", n);
    }
    bool tied = true;
    for (size_t i = 0; i < n; i++) {
        tied = tied && strcmp(tensors[i].name, "output.weight") != 0;
    }
    for (size_t i = 0; i < n; i++) {
        factor[i] = sensitivity != NULL ? sensitivity[i] : estimate(tensors[i].name, tied);
    }
    *out = factor;
    return HEPTA_OK;
}

hepta_status plan_rates(const tensor *tensors, size_t n, double bits, const double *sensitivity,
                        uint32_t *half_bits, hepta_error *err) {
    if (!(bits >= 2 && bits <= 8)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "%g bits per weight: expected 2 to 8", bits);
    }
    if (bits == 2 || bits == 8) {
        (void)start_at(tensors, n, (uint32_t)bits * 2, half_bits);
        return HEPTA_OK;
    }
    uint64_t n_weights = 0, used = 0;
    for (size_t i = 0; i < n; i++) {
        n_weights += tensor_n_weights(&tensors[i]);
    }
    const uint64_t budget = (uint64_t)((double)n_weights * bits / 8);
    uint32_t low = (uint32_t)(bits * 2) - 2;
    low = low < HALF_BITS_MIN ? HALF_BITS_MIN : low > HALF_BITS_MAX ? HALF_BITS_MAX : low;
    for (;; low--) {
        used = start_at(tensors, n, low, half_bits);
        if (used <= budget) {
            break;
        }
        if (low == HALF_BITS_MIN) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                             "the tensors are too small for %g bits per weight: at the lowest rate "
                             "they take %.3f with their scales; choose more bits, or 2, where the "
                             "scales come on top",
                             bits, (double)used * 8 / (double)n_weights);
        }
    }
    double *factor = NULL;
    step *heap = memory_alloc(n, sizeof *heap);
    if (heap == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a plan of %zu tensors", n);
    }
    hepta_status status = find_factors(tensors, n, sensitivity, &factor, err);
    if (status == HEPTA_OK) {
        improve(tensors, n, factor, budget - used, half_bits, heap);
    }
    memory_free(heap);
    memory_free(factor);
    return status;
}

/* ---- Plans as text ----------------------------------------------------- */

static hepta_status plan_error(const char *path, size_t line, hepta_error *err, const char *what,
                               const char *text, size_t n) {
    return error_set(err, HEPTA_ERROR_FORMAT, "%s, line %zu: %s: %.*s", path, line, what,
                     (int)(n < 80 ? n : 80), text);
}

/* Bits at p, up to a tab or the end of the line; 0 if they are no rate. */
static uint32_t parse_rate(const char *p, size_t n) {
    static const char *const names[] = {"2", "2.5", "3", "3.5", "4", "8"};
    static const uint32_t rates[] = {4, 5, 6, 7, 8, 16};
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++) {
        if (strlen(names[i]) == n && memcmp(names[i], p, n) == 0) {
            return rates[i];
        }
    }
    return 0;
}

static hepta_status read_line(const char *path, size_t number, const char *line, size_t length,
                              const tensor *tensors, size_t n, uint32_t *half_bits,
                              hepta_error *err) {
    while (length > 0 && (line[length - 1] == '\r' || line[length - 1] == ' ')) {
        length--;
    }
    if (length == 0 || line[0] == '#') {
        return HEPTA_OK;
    }
    const char *tab = memchr(line, '\t', length);
    if (tab == NULL) {
        return plan_error(path, number, err, "expected NAME, a tab, BITS", line, length);
    }
    const size_t n_name = (size_t)(tab - line), left = length - n_name - 1;
    const char *end = memchr(tab + 1, '\t', left);
    const uint32_t rate = parse_rate(tab + 1, end != NULL ? (size_t)(end - tab - 1) : left);
    if (rate == 0) {
        return plan_error(path, number, err, "expected 2, 2.5, 3, 3.5, 4 or 8 bits", line, length);
    }
    for (size_t i = 0; i < n; i++) {
        if (strlen(tensors[i].name) != n_name || memcmp(tensors[i].name, line, n_name) != 0) {
            continue;
        }
        if (!plan_is_packed(&tensors[i])) {
            return plan_error(path, number, err, "not a matrix", line, n_name);
        }
        if (half_bits[i] != 0) {
            return plan_error(path, number, err, "named twice", line, n_name);
        }
        half_bits[i] = rate;
        return HEPTA_OK;
    }
    return plan_error(path, number, err, "the model has no such tensor", line, n_name);
}

hepta_status plan_read(const char *path, const tensor *tensors, size_t n, uint32_t *half_bits,
                       hepta_error *err) {
    file_map map;
    hepta_status status = file_map_open(path, &map, err);
    if (status != HEPTA_OK) {
        return status;
    }
    memset(half_bits, 0, n * sizeof *half_bits);
    const char *text = (const char *)map.data;
    size_t number = 1;
    for (size_t at = 0; at < map.size && status == HEPTA_OK; number++) {
        const char *end = memchr(text + at, '\n', map.size - at);
        const size_t length = end != NULL ? (size_t)(end - text) - at : map.size - at;
        status = read_line(path, number, text + at, length, tensors, n, half_bits, err);
        at += length + 1;
    }
    file_map_close(&map);
    for (size_t i = 0; i < n && status == HEPTA_OK; i++) {
        if (plan_is_packed(&tensors[i]) && half_bits[i] == 0) {
            status =
                error_set(err, HEPTA_ERROR_FORMAT, "%s: no rate for %s", path, tensors[i].name);
        }
    }
    return status;
}

hepta_status plan_write(const char *path, const tensor *tensors, size_t n,
                        const uint32_t *half_bits, const double *sensitivity, hepta_error *err) {
    file_writer *w = NULL;
    hepta_status status = file_writer_open(path, &w, err);
    char line[512];
    uint64_t n_weights = 0;
    for (size_t i = 0; i < n; i++) {
        n_weights += tensor_n_weights(&tensors[i]);
    }
    const uint64_t bytes = plan_bytes(tensors, n, half_bits);
    int length = snprintf(
        line, sizeof line,
        "# %.4f bits per weight, %" PRIu64 " bytes of tensors\n# tensor\tbits%s\n",
        (double)bytes * 8 / (double)n_weights, bytes, sensitivity != NULL ? "\tsensitivity" : "");
    for (size_t i = 0; i <= n && status == HEPTA_OK; i++) {
        status = file_writer_write(w, line, (size_t)length, err);
        if (i == n || half_bits[i] == 0) {
            length = 0;
            continue;
        }
        length = snprintf(line, sizeof line, "%s\t%g", tensors[i].name, half_bits[i] / 2.0);
        if (sensitivity != NULL) {
            length +=
                snprintf(line + length, sizeof line - (size_t)length, "\t%.4g", sensitivity[i]);
        }
        line[length++] = '\n';
    }
    if (status == HEPTA_OK) {
        return file_writer_commit(w, err);
    }
    file_writer_discard(w);
    return status;
}
