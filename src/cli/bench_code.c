/*
 * bench_code.c - hepta bench code: error and speed of the window code at every rate.
 *
 * Rows of fresh Gaussian weights are encoded and decoded by the reference decoder. The error is
 * the root mean square of weight - decoded weight over the standard deviation; no code of R bits
 * can get below 2^-R. The error is the same on every machine; the speeds are not.
 */
#include "cli/bench.h"

#include "base/base.h"
#include "code/code.h"

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
        .usage = "bench code [options]",
        .summary =
            "Measures the code on Gaussian weights: error, and speed of encoder and decoder.",
        .details =
            "RMSE is relative to the standard deviation; the bound is 2^-bits. Speeds are per\n"
            "core; the decoder is the scalar reference, not the kernels.",
        .example = "hepta bench code --threads 2 --json",
        .options = options,
    };
    const int exit_code = options_parse(&spec, argc, argv, NULL);
    if (exit_code >= 0) {
        return exit_code;
    }
    threads = threads < 1 ? 1 : threads;
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
    memory_free(b.x);
    memory_free(b.scale);
    memory_free(b.code);
    memory_free(b.v);
    return code;
}
