/*
 * bench_kernels.c - hepta bench kernels: matrix-vector products at every width, in one table.
 *
 * Every method computes y = W x for the same Gaussian W and x, from its own form of W. A few
 * distinct rows are coded and repeated until the matrix is as large as wanted: half a MiB, or eight
 * times the largest cache. Threads walk through their parts of it until a
 * quarter of a second is over. The error of y is against sums in double of the weights before
 * coding; it holds the rounding of weights and of activations.
 */
#include "cli/bench.h"
#include "cli/bench_baselines.h"

#include "base/base.h"
#include "code/code.h"
#include "format/container.h"
#include "kernels/kernels.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    DISTINCT_ROWS = 64, /* a multiple of BLOCK_ROWS */
    BLOCK_ROWS = 64,    /* rows of a product between two looks at the clock: enough for kernels that
                           work on several strips at once */
    HALF_BITS_INT8 = 16,
    CACHED_BYTES = 1 << 19,
    MAX_TOKENS = 512
};

typedef enum method_kind { METHOD_F32_LOOP, METHOD_BLAS, METHOD_INT4, METHOD_PACKED } method_kind;

typedef struct method {
    const char *name, *kernels;
    method_kind kind;
    uint32_t half_bits;   /* METHOD_PACKED */
    const kernels *table; /* METHOD_PACKED */
    int4_matvec int4;     /* METHOD_INT4 */
} method;

/* Inputs in all forms; weights of the distinct rows, and y as it should be. */
typedef struct problem {
    uint32_t n_rows, n_cols; /* of the matrix that milliseconds are given for */
    float *w;                /* (DISTINCT_ROWS, n_cols) */
    double *exact;           /* (DISTINCT_ROWS) */
    float *x;                /* (n_cols) */
    int8_t *q;               /* (n_cols) */
    activation *input;       /* (MAX_TOKENS) all of them x */
    int4_input *blocks;      /* (n_cols / 32) */
    uint8_t *code, *packed;  /* (DISTINCT_ROWS, bytes of a row) */
    float *scale;            /* (DISTINCT_ROWS) */
    size_t large_bytes;      /* of a matrix that no cache holds */
    double seconds;          /* that one measurement takes */
    int runs;
} problem;

/* A matrix in the form of one method: whole sets of the distinct rows. */
typedef struct layout {
    uint8_t *data;
    size_t n_rows, row_bytes, n_bytes;
    packed_matrix packed; /* METHOD_PACKED */
} layout;

/* ---- Preparation ------------------------------------------------------- */

static float draw_gauss(uint64_t *seed) {
    double u = ((double)(random_next(seed) >> 11) + 0.5) * 0x1p-53;
    double v = (double)(random_next(seed) >> 11) * 0x1p-53;
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static hepta_status prepare(problem *p, hepta_error *err) {
    const size_t n = p->n_cols;
    p->w = memory_alloc(DISTINCT_ROWS * n, sizeof *p->w);
    p->exact = memory_alloc(DISTINCT_ROWS, sizeof *p->exact);
    p->x = memory_alloc(n, sizeof *p->x);
    p->q = memory_alloc(n, 1);
    p->input = memory_alloc(MAX_TOKENS, sizeof *p->input);
    p->blocks = memory_alloc(n / INT4_ITEMS, sizeof *p->blocks);
    p->code = memory_alloc(DISTINCT_ROWS, n);
    p->packed = memory_alloc(DISTINCT_ROWS, n);
    p->scale = memory_alloc(DISTINCT_ROWS, sizeof *p->scale);
    if (p->w == NULL || p->exact == NULL || p->x == NULL || p->q == NULL || p->input == NULL ||
        p->blocks == NULL || p->code == NULL || p->packed == NULL || p->scale == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for rows of %zu weights", n);
    }
    uint64_t seed = 1;
    for (size_t i = 0; i < n; i++) {
        p->x[i] = draw_gauss(&seed);
    }
    for (size_t r = 0; r < DISTINCT_ROWS; r++) {
        for (size_t i = 0; i < n; i++) {
            float w = p->w[r * n + i] = draw_gauss(&seed);
            p->exact[r] += (double)w * (double)p->x[i];
        }
    }
    kernels_ref.quantize_activation(p->x, p->n_cols, p->q, &p->input[0].scale, &p->input[0].sum);
    p->input[0].q = p->q;
    for (int t = 1; t < MAX_TOKENS; t++) {
        p->input[t] = p->input[0];
    }
    int4_quantize_input(p->x, n, p->blocks);
    return HEPTA_OK;
}

static void problem_free(problem *p) {
    void *all[] = {p->w, p->exact, p->x, p->q, p->input, p->blocks, p->code, p->packed, p->scale};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        memory_free(all[i]);
    }
}

/* Codes the distinct rows with a scale for each, and puts them into strips (docs/FORMAT.md). */
static hepta_status pack_rows(problem *p, uint32_t half_bits, hepta_error *err) {
    const size_t n = p->n_cols, row_bytes = n / CODE_BLOCK * half_bits;
    const struct code_table *table = code_table_get((int)half_bits);
    hepta_status status = HEPTA_OK;
    for (size_t r = 0; r < DISTINCT_ROWS; r++) {
        const float *w = p->w + r * n;
        float largest = 0;
        for (size_t i = 0; i < n; i++) {
            largest = fabsf(w[i]) > largest ? fabsf(w[i]) : largest;
        }
        float scale = half_bits == HALF_BITS_INT8 ? largest / 127 : 1 / table->unit;
        p->scale[r] = bfloat_to_float(bfloat_from_float(scale));
        for (size_t i = 0; i < n && half_bits == HALF_BITS_INT8; i++) {
            float q = rintf(w[i] / p->scale[r]);
            p->code[r * n + i] = (uint8_t)(int8_t)(q > 127 ? 127 : q < -127 ? -127 : q);
        }
    }
    if (half_bits != HALF_BITS_INT8) {
        status = code_encode_rows(table, p->w, p->scale, DISTINCT_ROWS, n, p->code, row_bytes,
                                  half_bits, threads_default(), err);
    }
    for (size_t r = 0; r < DISTINCT_ROWS; r++) {
        packed_put_row(half_bits, n / CODE_BLOCK, r, p->code + r * row_bytes, p->packed);
    }
    return status;
}

static size_t method_row_bytes(const method *m, uint32_t n_cols) {
    switch (m->kind) {
    case METHOD_INT4:
        return n_cols / INT4_ITEMS * INT4_BYTES;
    case METHOD_PACKED:
        return n_cols / CODE_BLOCK * m->half_bits;
    default:
        return n_cols * sizeof(float);
    }
}

/* The method's form of the distinct rows, repeated up to about n_bytes, BLOCK_ROWS at least. */
static hepta_status lay_out(const problem *p, const method *m, size_t n_bytes, layout *out,
                            hepta_error *err) {
    const size_t row_bytes = method_row_bytes(m, p->n_cols), set = DISTINCT_ROWS * row_bytes;
    const size_t n_blocks = n_bytes / (BLOCK_ROWS * row_bytes);
    const size_t n_rows = (n_blocks > 0 ? n_blocks : 1) * BLOCK_ROWS;
    *out = (layout){.n_rows = n_rows, .row_bytes = row_bytes};
    out->n_bytes = n_rows * (row_bytes + 2);
    void *data =
        mmap(NULL, out->n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for a matrix of %zu MB",
                         out->n_bytes >> 20);
    }
    (void)madvise(data, out->n_bytes, MADV_HUGEPAGE);
    out->data = data;
    uint8_t *scales = out->data + n_rows * row_bytes;
    const size_t n_weights_bytes = n_rows * row_bytes,
                 first = n_rows < DISTINCT_ROWS ? n_weights_bytes : set;
    if (m->kind == METHOD_INT4) {
        int4_quantize(p->w, first / row_bytes * p->n_cols, out->data);
    } else {
        memcpy(out->data, m->kind == METHOD_PACKED ? (const void *)p->packed : p->w, first);
    }
    for (size_t at = set; at < n_weights_bytes; at += set) {
        memcpy(out->data + at, out->data, n_weights_bytes - at < set ? n_weights_bytes - at : set);
    }
    for (size_t r = 0; r < n_rows && m->kind == METHOD_PACKED; r++) {
        uint16_t s = bfloat_from_float(p->scale[r % DISTINCT_ROWS]);
        memcpy(scales + 2 * r, &s, 2);
    }
    out->packed = (packed_matrix){.half_bits = m->half_bits,
                                  .n_rows = (uint32_t)n_rows,
                                  .n_cols = p->n_cols,
                                  .codes = out->data,
                                  .scales = scales};
    return HEPTA_OK;
}

static void layout_free(layout *l) {
    if (l->data != NULL) {
        munmap(l->data, l->n_bytes);
    }
}

/* ---- Measuring --------------------------------------------------------- */

/* Rows [begin, begin + n) times n_tokens inputs; BLAS is given threads of its own. */
static void multiply(const problem *p, const method *m, const layout *l, size_t begin, size_t n,
                     uint32_t n_tokens, int threads, float *y, uint8_t *scratch) {
    const uint8_t *rows = l->data + begin * l->row_bytes;
    const float *f32 = (const float *)(const void *)rows;
    switch (m->kind) {
    case METHOD_F32_LOOP:
        matvec_f32_loop(f32, n, p->n_cols, p->x, y);
        break;
    case METHOD_BLAS:
        (void)matvec_f32_blas(f32, n, p->n_cols, p->x, threads, y);
        break;
    case METHOD_INT4:
        m->int4(rows, n, p->n_cols / INT4_ITEMS, p->blocks, y);
        break;
    case METHOD_PACKED:
        m->table->matmul_packed(&l->packed, (uint32_t)begin, (uint32_t)(begin + n), p->input,
                                n_tokens, y - begin, l->n_rows, scratch);
        break;
    }
}

/* Root mean square of y - exact over that of exact. */
static double error_of(const problem *p, const method *m, const layout *l, float *y,
                       uint8_t *scratch) {
    double errors = 0, squares = 0;
    multiply(p, m, l, 0, DISTINCT_ROWS, 1, 1, y, scratch);
    for (size_t r = 0; r < DISTINCT_ROWS; r++) {
        double e = (double)y[r] - p->exact[r];
        errors += e * e;
        squares += p->exact[r] * p->exact[r];
    }
    return sqrt(errors / squares);
}

/*
 * Products per second: each thread goes through its part of the rows, again and again, until the
 * time is over. BLAS divides the work itself: one thread here, blocks of all rows.
 */
static double products_per_second(const problem *p, const method *m, const layout *l,
                                  uint32_t n_tokens, int threads) {
    const bool whole = m->kind == METHOD_BLAS;
    const int walkers = whole ? 1 : threads;
    const size_t step = whole ? l->n_rows : BLOCK_ROWS;
    const size_t n_blocks = l->n_rows / step;
    size_t rows = 0;
    bool failed = false;
    double started = 0;
#pragma omp parallel num_threads(walkers) reduction(+ : rows) reduction(|| : failed)
    {
        const size_t t = (size_t)omp_get_thread_num(), n = (size_t)omp_get_num_threads();
        const size_t first = n_blocks * t / n, last = n_blocks * (t + 1) / n;
        /* y is addressed by the row's number: room for all of them for every token */
        float *y = memory_alloc((size_t)n_tokens * l->n_rows, sizeof *y);
        uint8_t *scratch = memory_alloc(KERNELS_SCRATCH_BYTES(p->n_cols), 1);
        failed = y == NULL || scratch == NULL || first == last;
#pragma omp barrier
#pragma omp single
        started = clock_seconds();
        size_t b = first;
        do { /* once at least, however late this thread comes to run */
            if (failed) {
                break;
            }
            multiply(p, m, l, b * step, step, n_tokens, threads, y + b * step, scratch);
            rows += step;
            b = b + 1 < last ? b + 1 : first;
        } while (clock_seconds() - started < p->seconds);
        memory_free(y);
        memory_free(scratch);
    }
    return failed ? 0 : (double)rows * p->n_cols * n_tokens / (clock_seconds() - started);
}

/* The median of several runs, in thousand millions. */
static double measure(const problem *p, const method *m, const layout *l, uint32_t n_tokens,
                      int threads) {
    samples all = {.n = 0};
    for (int run = 0; run < p->runs && !interrupted(); run++) {
        samples_add(&all, products_per_second(p, m, l, n_tokens, threads) * 1e-9);
    }
    return samples_median(&all);
}

/* ---- The table --------------------------------------------------------- */

enum { MAX_METHODS = 64, N_BATCHES = 8 };

typedef struct line {
    const method *method;
    double bits, rmse;
    double cache_1, memory_1, memory_all; /* G weights/s */
} line;

typedef struct table {
    method methods[MAX_METHODS];
    size_t n_methods;
    line lines[MAX_METHODS];
    size_t n_lines;
    double bandwidth_1, bandwidth_all; /* GB/s */
    double int8_peak;                  /* G products/s of one core */
    int threads;
    bool json;
} table;

static void add_method(table *t, method m) {
    if (t->n_methods < MAX_METHODS) {
        t->methods[t->n_methods++] = m;
    }
}

static void list_methods(table *t) {
    bool supported;
    const char *name;
    const kernels *k;
    int4_matvec int4;
    add_method(t, (method){.name = "FP32 loop", .kernels = "scalar", .kind = METHOD_F32_LOOP});
    if (blas_load()) {
        add_method(t, (method){.name = "FP32", .kernels = "OpenBLAS", .kind = METHOD_BLAS});
    }
    for (size_t i = 0; (int4 = int4_kernel(i, &name, &supported)) != NULL; i++) {
        if (supported) {
            add_method(t, (method){.name = "INT4, scale per 32",
                                   .kernels = name,
                                   .kind = METHOD_INT4,
                                   .int4 = int4});
        }
    }
    static const uint32_t rates[] = {HALF_BITS_INT8, 8, 7, 6, 5, 4};
    static const char *const names[] = {"INT8, scale per row", "Hepta 4", "Hepta 3.5", "Hepta 3",
                                        "Hepta 2.5",           "Hepta 2"};
    for (size_t r = 0; r < sizeof rates / sizeof rates[0]; r++) {
        for (size_t i = 0; (k = kernels_get(i, &supported)) != NULL; i++) {
            if (supported) {
                add_method(t, (method){.name = names[r],
                                       .kernels = k->name,
                                       .kind = METHOD_PACKED,
                                       .half_bits = rates[r],
                                       .table = k});
            }
        }
    }
}

static hepta_status measure_method(const problem *p, table *t, const method *m, hepta_error *err) {
    const size_t set = DISTINCT_ROWS * method_row_bytes(m, p->n_cols);
    layout small = {0}, large = {0};
    line *out = &t->lines[t->n_lines];
    hepta_status status = lay_out(p, m, CACHED_BYTES, &small, err);
    if (status == HEPTA_OK) {
        status = lay_out(p, m, p->large_bytes > set ? p->large_bytes : set, &large, err);
    }
    float *y = memory_alloc(DISTINCT_ROWS, sizeof *y);
    uint8_t *scratch = memory_alloc(KERNELS_SCRATCH_BYTES(p->n_cols), 1);
    if (status == HEPTA_OK && (y == NULL || scratch == NULL)) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory");
    }
    if (status == HEPTA_OK) {
        *out = (line){.method = m,
                      .bits = 8.0 * (double)(small.row_bytes + (m->kind == METHOD_PACKED ? 2 : 0)) /
                              p->n_cols,
                      .rmse = error_of(p, m, &large, y, scratch),
                      .cache_1 = measure(p, m, &small, 1, 1),
                      .memory_1 = measure(p, m, &large, 1, 1),
                      .memory_all = measure(p, m, &large, 1, t->threads)};
        t->n_lines++;
    }
    memory_free(y);
    memory_free(scratch);
    layout_free(&small);
    layout_free(&large);
    return status;
}

/* Milliseconds for the whole matrix at this many G weights/s. */
static double milliseconds(const problem *p, double speed) {
    return speed > 0 ? (double)p->n_rows * p->n_cols * 1e-6 / speed : 0;
}

static double gigabytes(const line *l, double speed) {
    return speed * l->bits / 8;
}

static void print_line(const problem *p, const table *t) {
    const line *l = &t->lines[t->n_lines - 1];
    double loop = t->lines[0].memory_1;
    printf("%-20s %-10s %6.3f %8.3f %9.2f %7.2f %7.2f %7.1f %9.2f %7.2f %7.1f %6.1f\n",
           l->method->name, l->method->kernels, l->bits, 100 * l->rmse,
           milliseconds(p, l->memory_1), l->cache_1, l->memory_1, l->memory_1 / loop,
           milliseconds(p, l->memory_all), l->memory_all, gigabytes(l, l->memory_all),
           100 * gigabytes(l, l->memory_all) / t->bandwidth_all);
    fflush(stdout);
}

static json_t *line_json(const problem *p, const table *t, const line *l) {
    return json_pack(
        "{s:s,s:s,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f}", "method", l->method->name, "kernels",
        l->method->kernels, "bits", l->bits, "rmse", l->rmse, "ms_1", milliseconds(p, l->memory_1),
        "ms_all", milliseconds(p, l->memory_all), "cache_gweights_1", l->cache_1,
        "memory_gweights_1", l->memory_1, "memory_gweights_all", l->memory_all, "speedup_1",
        l->memory_1 / t->lines[0].memory_1, "gb_per_second_all", gigabytes(l, l->memory_all),
        "bandwidth_share_all", gigabytes(l, l->memory_all) / t->bandwidth_all);
}

/* ---- Several tokens at once -------------------------------------------- */

static const uint32_t batches[N_BATCHES] = {1, 2, 4, 8, 16, 32, 64, MAX_TOKENS};

/* G products a second of one core, weights in its cache, for so many tokens. */
static hepta_status measure_batches(const problem *p, const method *m, double out[N_BATCHES],
                                    hepta_error *err) {
    layout l = {0};
    hepta_status status = lay_out(p, m, CACHED_BYTES, &l, err);
    for (int i = 0; i < N_BATCHES && status == HEPTA_OK; i++) {
        out[i] = measure(p, m, &l, batches[i], 1);
    }
    layout_free(&l);
    return status;
}

static hepta_status bench_batches(problem *p, const table *t, json_t *list, hepta_error *err) {
    if (!t->json) {
        printf("\nG products/s of one core, weights in cache, by tokens at once");
        if (t->int8_peak > 0) {
            printf(" (VPDPBUSD on registers: %.0f)", t->int8_peak);
        }
        printf("\n\n%-20s %-10s", "", "kernels");
        for (int i = 0; i < N_BATCHES; i++) {
            printf(" %7u", batches[i]);
        }
        putchar('\n');
    }
    hepta_status status = HEPTA_OK;
    uint32_t packed = 0; /* half bits of what p->packed holds */
    for (size_t i = 0; i < t->n_methods && status == HEPTA_OK && !interrupted(); i++) {
        const method *m = &t->methods[i];
        double speed[N_BATCHES] = {0};
        if (m->kind != METHOD_PACKED || (m->half_bits != 7 && m->half_bits != HALF_BITS_INT8)) {
            continue;
        }
        status = packed != m->half_bits ? pack_rows(p, m->half_bits, err) : HEPTA_OK;
        packed = m->half_bits;
        status = status == HEPTA_OK ? measure_batches(p, m, speed, err) : status;
        json_t *values = json_array();
        for (int k = 0; k < N_BATCHES; k++) {
            json_array_append_new(
                values, json_pack("{s:i,s:f}", "tokens", (int)batches[k], "gproducts", speed[k]));
        }
        json_array_append_new(list, json_pack("{s:s,s:s,s:o}", "method", m->name, "kernels",
                                              m->kernels, "speeds", values));
        if (!t->json) {
            printf("%-20s %-10s", m->name, m->kernels);
            for (int k = 0; k < N_BATCHES; k++) {
                printf(" %7.2f", speed[k]);
            }
            putchar('\n');
            fflush(stdout);
        }
    }
    return status;
}

/* ---- The command ------------------------------------------------------- */

static void print_head(const problem *p, const table *t) {
    char cpu[128];
    machine_cpu(cpu, sizeof cpu);
    printf("y = W x, W of %u x %u; %s; read bandwidth %.1f GB/s with 1 thread, %.1f with %d\n\n",
           p->n_rows, p->n_cols, cpu, t->bandwidth_1, t->bandwidth_all, t->threads);
    printf("%-20s %-10s %6s %8s | %s %24s | %d thread%s, from memory\n", "", "", "", "RMSE of",
           "1 thread", "G weights/s", t->threads, t->threads == 1 ? "" : "s");
    printf("%-20s %-10s %6s %8s %9s %7s %7s %7s %9s %7s %7s %6s\n", "weights", "kernels", "bits",
           "y, %", "ms", "cache", "memory", "x loop", "ms", "Gw/s", "GB/s", "% bw");
}

static hepta_status bench_methods(problem *p, table *t, hepta_error *err) {
    uint32_t packed = 0;
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; i < t->n_methods && status == HEPTA_OK && !interrupted(); i++) {
        const method *m = &t->methods[i];
        if (m->kind == METHOD_PACKED && m->half_bits != packed) {
            packed = m->half_bits;
            status = pack_rows(p, packed, err);
        }
        status = status == HEPTA_OK ? measure_method(p, t, m, err) : status;
        if (status == HEPTA_OK && !t->json && !interrupted()) {
            print_line(p, t);
        }
    }
    return status;
}

static json_t *table_json(const problem *p, const table *t, json_t *batch_list) {
    char cpu[128];
    machine_cpu(cpu, sizeof cpu);
    json_t *lines = json_array();
    for (size_t i = 0; i < t->n_lines; i++) {
        json_array_append_new(lines, line_json(p, t, &t->lines[i]));
    }
    return json_pack("{s:s,s:I,s:I,s:i,s:b,s:f,s:f,s:f,s:o,s:o}", "cpu", cpu, "rows",
                     (json_int_t)p->n_rows, "cols", (json_int_t)p->n_cols, "threads", t->threads,
                     "openblas", (int)blas_load(), "read_bandwidth_1", t->bandwidth_1,
                     "read_bandwidth_all", t->bandwidth_all, "int8_peak_1", t->int8_peak, "methods",
                     lines, "batches", batch_list);
}

int cli_bench_kernels(int argc, char **argv) {
    problem p = {.n_rows = 4096, .n_cols = 11008, .runs = 3};
    uint32_t per_run = 200, megabytes = 0;
    static table t;
    const option_spec specs[] = {
        {"rows", 0, OPTION_U32, &p.n_rows, "N", "rows that ms are given for (default 4096)"},
        {"cols", 0, OPTION_U32, &p.n_cols, "N",
         "columns, a multiple of 32 (default 11008, as in Llama-2 7B)"},
        {"threads", 't', OPTION_INT, &t.threads, "N", "threads (default: physical cores)"},
        {"runs", 'r', OPTION_INT, &p.runs, "N", "runs of each measurement (default 3)"},
        {"milliseconds", 0, OPTION_U32, &per_run, "N", "length of a run (default 200)"},
        {"megabytes", 0, OPTION_U32, &megabytes, "N",
         "size of the matrices read from memory (default: 8 times the largest cache)"},
        {"json", 0, OPTION_FLAG, &t.json, NULL, "print JSON"},
        {0},
    };
    const command_spec spec = {
        .usage = "bench kernels [options]",
        .summary = "Measures matrix-vector products: FP32, OpenBLAS, INT8, INT4, Hepta's rates.",
        .details = "Weights and inputs are Gaussian. Columns and fields: docs/BENCHMARKS.md.",
        .example = "hepta bench kernels --rows 4096 --cols 4096 --json",
        .options = specs,
    };
    int code = options_parse(&spec, argc, argv, NULL);
    if (code >= 0) {
        return code;
    }
    if (p.n_rows == 0 || p.n_cols == 0 || p.n_cols % INT4_ITEMS != 0 || p.n_cols > 65536) {
        fprintf(stderr, "hepta: --rows above 0 and --cols a multiple of %d up to 65536, please\n",
                (int)INT4_ITEMS);
        return EXIT_USAGE;
    }
    if (p.runs < 1 || p.runs > BENCH_MAX_RUNS || per_run < 1 || per_run > 60000) {
        fprintf(stderr, "hepta: --runs 1 to %d, --milliseconds 1 to 60000, please\n",
                (int)BENCH_MAX_RUNS);
        return EXIT_USAGE;
    }
    hepta_error err;
    p.large_bytes = megabytes > 0 ? (size_t)megabytes << 20 : 8 * machine_cache_bytes();
    p.seconds = per_run * 1e-3;
    t.threads = t.threads > 0 ? t.threads : threads_default();
    interrupt_catch();
    list_methods(&t);
    t.int8_peak = int8_peak();
    samples one = machine_read_bandwidth(1), all = machine_read_bandwidth(t.threads);
    t.bandwidth_1 = samples_median(&one);
    t.bandwidth_all = samples_median(&all);
    json_t *batch_list = json_array();
    hepta_status status = prepare(&p, &err);
    if (status == HEPTA_OK && !t.json) {
        print_head(&p, &t);
    }
    if (status == HEPTA_OK) {
        status = bench_methods(&p, &t, &err);
    }
    if (status == HEPTA_OK && !t.json && !blas_load()) {
        printf("OpenBLAS is not installed (Debian: apt install libopenblas0-pthread)\n");
    }
    if (status == HEPTA_OK) {
        status = bench_batches(&p, &t, batch_list, &err);
    }
    if (status == HEPTA_OK && interrupted()) {
        status = error_set(&err, HEPTA_ERROR_INTERRUPTED, "interrupted");
    }
    if (status == HEPTA_OK && t.json) {
        code = print_json(table_json(&p, &t, json_incref(batch_list)));
    } else {
        code = status == HEPTA_OK ? EXIT_OK : report(&err);
    }
    json_decref(batch_list);
    problem_free(&p);
    return code;
}
