/*
 * bench_code.c - hepta bench code: error and speed of the window code at every rate.
 *
 * Rows of fresh Gaussian weights are encoded and decoded by the reference decoder. The error is
 * the root mean square of weight - decoded weight over the standard deviation; no code of R bits
 * can get below 2^-R. The error is the same on every machine; the speeds are not.
 *
 * With a model: rows of its matrices, rotated, beside Gaussian rows of the same lengths.
 */
#include "cli/bench.h"

#include "base/base.h"
#include "code/code.h"
#include "quantize/plan.h"
#include "quantize/quantizer.h"

#include <math.h>
#include <stdio.h>
#include <time.h>

enum { ROW = 4096, GROUP = 16 };

/* Standard normal deviates by the Box-Muller transform. */
static double uniform(uint64_t *state) {
    return ((double)(random_next(state) >> 11) + 0.5) * 0x1p-53;
}

static void fill_gauss(float *x, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i += 2) {
        const double r = sqrt(-2.0 * log(uniform(&seed)));
        const double a = 6.283185307179586 * uniform(&seed);
        x[i] = (float)(r * cos(a));
        x[i + 1] = (float)(r * sin(a));
    }
}

static double processor_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct rate_result {
    double rmse;                     /* over sigma */
    double encode_rate, decode_rate; /* weights per second and core */
} rate_result;

typedef struct buffers {
    float *x, *scale;
    uint8_t *code, *v;
} buffers;

static void buffers_free(buffers *b) {
    memory_free(b->x);
    memory_free(b->scale);
    memory_free(b->code);
    memory_free(b->v);
}

static hepta_status measure(int half_bits, const buffers *b, size_t rows, int threads,
                            rate_result *out, hepta_error *err) {
    const struct code_table *t = code_table_get(half_bits);
    const size_t bytes = code_row_bytes(half_bits, ROW);
    const double unit = (double)t->unit;
    for (size_t r = 0; r < rows; r++) {
        b->scale[r] = 1.0f / t->unit;
    }
    const double start = processor_seconds();
    hepta_status status = code_encode_rows(t, b->x, b->scale, rows, ROW, b->code, bytes,
                                           (size_t)half_bits, threads, err);
    const double encoded = processor_seconds();
    if (status != HEPTA_OK) {
        return status;
    }
    double sum = 0.0, decoding = 0.0;
    for (size_t r = 0; r < rows; r++) {
        const double before = processor_seconds();
        code_decode_row(t, b->code + r * bytes, (size_t)half_bits, ROW, b->v);
        decoding += processor_seconds() - before;
        for (size_t k = 0; k < ROW; k++) {
            const double e = (double)b->x[r * ROW + k] - (b->v[k] - CODE_CENTRE) / unit;
            sum += e * e;
        }
    }
    const double n = (double)(rows * ROW);
    out->rmse = sqrt(sum / n);
    out->encode_rate = n / (encoded - start);
    out->decode_rate = n / decoding;
    return HEPTA_OK;
}

/* ---- A model's rows ---------------------------------------------------- */

/* Adds the squared errors of rows in units of each row's own mean square, which is its scale. */
static hepta_status add_errors(int half_bits, const buffers *b, size_t rows, size_t n, int threads,
                               double *error, hepta_error *err) {
    const struct code_table *t = code_table_get(half_bits);
    const size_t bytes = code_row_bytes(half_bits, n);
    for (size_t r = 0; r < rows; r++) {
        double sum = 0;
        for (size_t k = 0; k < n; k++) {
            sum += (double)b->x[r * n + k] * (double)b->x[r * n + k];
        }
        b->scale[r] = (float)sqrt(sum / (double)n) / t->unit;
    }
    const hepta_status status = code_encode_rows(t, b->x, b->scale, rows, n, b->code, bytes,
                                                 (size_t)half_bits, threads, err);
    for (size_t r = 0; r < rows && status == HEPTA_OK; r++) {
        const double sigma = (double)b->scale[r] * (double)t->unit;
        code_decode_row(t, b->code + r * bytes, (size_t)half_bits, n, b->v);
        for (size_t k = 0; k < n && sigma > 0; k++) {
            const double e =
                (double)b->x[r * n + k] / sigma - (b->v[k] - CODE_CENTRE) / (double)t->unit;
            *error += e * e;
        }
    }
    return status;
}

/* Squared errors of a model's rows and of Gaussian ones, n weights each. */
typedef struct sums {
    double model[CODE_MAX_RATE + 1], gauss[CODE_MAX_RATE + 1], n;
} sums;

/* About `share` of the rows of a matrix, spread evenly, at every rate; and Gaussian ones. */
static hepta_status add_matrix(const tensor *t, double share, int threads, uint64_t seed, sums *s,
                               hepta_error *err) {
    const kernels *k = NULL;
    rotation *r = NULL;
    size_t rows = (size_t)((double)t->ne[1] * share / GROUP + 1) * GROUP;
    rows = rows < t->ne[1] ? rows : (size_t)t->ne[1];
    hepta_status status = kernels_select(&k, err);
    if (status == HEPTA_OK) {
        status = rotation_create((uint32_t)t->ne[0], quantize_rotation_seed, &r, err);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    const size_t n = r->n_padded;
    float *scratch = memory_alloc(n, sizeof *scratch);
    buffers b = {
        .x = memory_alloc(rows * n, sizeof(float)),
        .scale = memory_alloc(rows, sizeof(float)),
        .code = memory_alloc(rows, code_row_bytes(CODE_MAX_RATE, n)),
        .v = memory_alloc(n, 1),
    };
    if (scratch == NULL || b.x == NULL || b.scale == NULL || b.code == NULL || b.v == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "no memory for %zu rows of %s", rows, t->name);
    }
    for (size_t i = 0; i < rows && status == HEPTA_OK; i++) {
        kernels_tensor_row(k, t, (uint64_t)i * t->ne[1] / rows, b.x + i * n);
        k->rotate(r, b.x + i * n, scratch);
    }
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE && status == HEPTA_OK; rate++) {
        status = add_errors(rate, &b, rows, n, threads, &s->model[rate], err);
    }
    if (status == HEPTA_OK) {
        fill_gauss(b.x, rows * n, seed);
    }
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE && status == HEPTA_OK; rate++) {
        status = add_errors(rate, &b, rows, n, threads, &s->gauss[rate], err);
    }
    s->n += (double)(rows * n);
    memory_free(scratch);
    buffers_free(&b);
    rotation_free(r);
    return status;
}

static hepta_status check_matrix(const container *c, const tensor *t, hepta_error *err) {
    if (c->kind == CONTAINER_HEPTA || !tensor_type_is_readable(t->type) || t->ne[0] == 0 ||
        t->ne[1] == 0 || t->ne[0] > TENSOR_PACKED_MAX_COLS) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: tensor %s of type %s: expected the original weights of a model",
                         t->file, t->name, tensor_type_name(t->type));
    }
    return HEPTA_OK;
}

static int bench_model_rows(const char *path, uint32_t weights, int threads, uint64_t seed,
                            bool json) {
    hepta_error err;
    container *c = NULL;
    const container_options options = {.tokenizer_path = NULL};
    hepta_status status = container_open(path, &options, &c, &err);
    if (status != HEPTA_OK) {
        return report(&err);
    }
    double total = 0;
    for (size_t i = 0; i < c->n_tensors && status == HEPTA_OK; i++) {
        const tensor *t = &c->tensors[i];
        if (plan_is_packed(t)) {
            total += (double)tensor_n_weights(t);
            status = check_matrix(c, t, &err);
        }
    }
    if (status == HEPTA_OK && !(total > 0)) {
        status = error_set(&err, HEPTA_ERROR_FORMAT, "%s: no matrices", path);
    }
    sums s = {.n = 0};
    for (size_t i = 0; i < c->n_tensors && status == HEPTA_OK; i++) {
        if (plan_is_packed(&c->tensors[i])) {
            status = add_matrix(&c->tensors[i], weights / total, threads, seed + i, &s, &err);
        }
    }
    container_close(c);
    if (status != HEPTA_OK) {
        return report(&err);
    }
    json_t *list = json_array();
    if (!json) {
        printf("bits   RMSE %%   Gaussian rows %%   ratio\n");
    }
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const double rmse = sqrt(s.model[rate] / s.n), gauss = sqrt(s.gauss[rate] / s.n);
        if (json) {
            json_array_append_new(list, json_pack("{s:f,s:f,s:f}", "bits", rate / 2.0, "rmse", rmse,
                                                  "gaussian_rmse", gauss));
        } else {
            printf("%4.1f   %6.2f   %15.2f   %5.3f\n", rate / 2.0, 100.0 * rmse, 100.0 * gauss,
                   rmse / gauss);
        }
    }
    if (json) {
        return print_json(json_pack("{s:s,s:o}", "model", path, "rates", list));
    }
    json_decref(list);
    return EXIT_OK;
}

int cli_bench_code(int argc, char **argv) {
    bool json = false;
    uint32_t weights = 4 * GROUP * ROW;
    int threads = 1;
    uint64_t seed = 1;
    const option_spec options[] = {
        {"json", 0, OPTION_FLAG, &json, NULL, "print JSON"},
        {"threads", 't', OPTION_INT, &threads, "N", "threads of the encoder (default 1)"},
        {"weights", 'n', OPTION_U32, &weights, "N",
         "weights per rate, rounded up to 16 rows of 4096 (default 262144)"},
        {"seed", 's', OPTION_U64, &seed, "N", "seed of the weights (default 1)"},
        {NULL, 0, OPTION_FLAG, NULL, NULL, NULL},
    };
    const command_spec spec = {
        .usage = "bench code [MODEL] [options]",
        .summary =
            "Measures the code on Gaussian weights: error, and speed of encoder and decoder.",
        .details =
            "RMSE is relative to the standard deviation; the bound is 2^-bits. Speeds are per\n"
            "core; the decoder is the scalar reference, not the kernels. With an unquantized "
            "MODEL:\n"
            "the error on rows of its matrices, rotated, beside Gaussian rows of those lengths.",
        .example = "hepta bench code --threads 2 --json",
        .options = options,
        .max_arguments = 1,
    };
    const char *model = NULL;
    const int exit_code = options_parse(&spec, argc, argv, &model);
    if (exit_code >= 0) {
        return exit_code;
    }
    threads = threads < 1 ? 1 : threads;
    if (model != NULL) {
        return bench_model_rows(model, weights, threads, seed, json);
    }
    const size_t groups = (weights == 0 ? 0 : (weights - 1) / (GROUP * ROW)) + 1;
    const size_t rows = groups * GROUP;
    hepta_error err = {0};
    buffers b = {
        .x = memory_alloc(rows * ROW, sizeof(float)),
        .scale = memory_alloc(rows, sizeof(float)),
        .code = memory_alloc(rows, code_row_bytes(CODE_MAX_RATE, ROW)),
        .v = memory_alloc(ROW, 1),
    };
    hepta_status status = HEPTA_OK;
    json_t *list = json_array();
    if (b.x == NULL || b.scale == NULL || b.code == NULL || b.v == NULL || list == NULL) {
        status = error_set(&err, HEPTA_ERROR_MEMORY, "no memory for %zu weights", rows * ROW);
    } else {
        fill_gauss(b.x, rows * ROW, seed);
        if (!json) {
            printf("%zu Gaussian weights a rate, %d thread%s\n\n", rows * ROW, threads,
                   threads == 1 ? "" : "s");
            printf("bits   RMSE %%   bound %%   encode M/s/core   decode M/s/core (reference)\n");
        }
    }
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE && status == HEPTA_OK; rate++) {
        rate_result r;
        status = measure(rate, &b, rows, threads, &r, &err);
        if (status != HEPTA_OK) {
            break;
        }
        const double bits = rate / 2.0, bound = pow(2.0, -bits);
        if (json) {
            json_array_append_new(
                list, json_pack("{s:f,s:f,s:f,s:f,s:f}", "bits", bits, "rmse", r.rmse, "bound",
                                bound, "encode_weights_per_core_second", r.encode_rate,
                                "decode_reference_weights_per_core_second", r.decode_rate));
        } else {
            printf("%4.1f   %6.2f   %7.2f   %15.2f   %27.1f\n", bits, 100.0 * r.rmse, 100.0 * bound,
                   r.encode_rate * 1e-6, r.decode_rate * 1e-6);
            fflush(stdout);
        }
    }
    int code = EXIT_OK;
    if (status != HEPTA_OK) {
        code = report(&err);
        json_decref(list);
    } else if (json) {
        code = print_json(json_pack("{s:I,s:i,s:I,s:o}", "weights", (json_int_t)(rows * ROW),
                                    "threads", threads, "seed", (json_int_t)seed, "rates", list));
    } else {
        json_decref(list);
    }
    buffers_free(&b);
    return code;
}
