/*
 * bench_model.c - hepta bench MODEL: what a user waits for, in numbers.
 *
 * Tokens are random, so that nothing depends on a tokenizer; speed does not depend on them. Every
 * measurement is repeated, and its median and range are reported. The memory bandwidth is measured
 * in the same run, as the limit of what generation can reach. Documented in docs/BENCHMARKS.md.
 */
#include "cli/bench.h"

#include "base/base.h"
#include "format/container.h"
#include "kernels/kernels.h"
#include "model/llama.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FIRST_PROMPT = 32, MAX_BATCHES = 16, MIN_STEPS = 4 };

typedef struct bench {
    const char *path, *kernels;
    hepta_cache_type cache;
    device_choice device;
    uint32_t prompt, generate, chunk;
    uint32_t batch[MAX_BATCHES];
    size_t n_batches;
    int threads, runs, busy;
    bool cold;
    hepta_model *model;
    hepta_model_info info;
    int32_t *tokens; /* random, as many as any test takes */
    float *logits;   /* of as many tokens as the largest batch */
    results results;
    hepta_error err;
} bench;

/* ---- Measurements: each returns false after an error, in b->err -------- */

static bool failed(bench *b, hepta_status status) {
    if (status == HEPTA_OK && interrupted()) {
        status = error_set(&b->err, HEPTA_ERROR_INTERRUPTED, "interrupted");
    }
    return status != HEPTA_OK;
}

static hepta_session_options session_options(const bench *b, uint32_t n_ctx, uint32_t sequences) {
    uint32_t chunk = b->chunk > 0 ? b->chunk : 0;
    if (sequences > 1 && chunk != 0 && chunk < sequences) {
        chunk = sequences;
    }
    return (hepta_session_options){.n_ctx = n_ctx,
                                   .n_batch = chunk,
                                   .threads = b->threads,
                                   .cache_type = b->cache,
                                   .n_sequences = sequences};
}

/* Seconds that `n` tokens at once take from an empty context, logits of the last one included. */
static bool time_prompt(bench *b, hepta_session *s, uint32_t n, double *seconds) {
    hepta_session_truncate(s, 0, 0);
    double started = clock_seconds();
    hepta_status status = hepta_session_eval(s, b->tokens, n, b->logits, false, &b->err);
    *seconds = clock_seconds() - started;
    return !failed(b, status);
}

/* Seconds that `n` tokens one by one take. */
static bool time_generation(bench *b, hepta_session *s, uint32_t n, double *seconds) {
    hepta_session_truncate(s, 0, 0);
    double started = clock_seconds();
    for (uint32_t i = 0; i < n; i++) {
        if (failed(b, hepta_session_eval(s, b->tokens + i, 1, b->logits, false, &b->err))) {
            return false;
        }
    }
    *seconds = clock_seconds() - started;
    return true;
}

typedef bool (*timing)(bench *b, hepta_session *s, uint32_t n, double *seconds);

/* Tokens a second, or milliseconds for all of them. */
static bool repeat(bench *b, hepta_session *s, timing measure, uint32_t n, const char *test,
                   bool milliseconds) {
    samples all = {.n = 0};
    for (int i = 0; i < b->runs; i++) {
        double seconds;
        if (!measure(b, s, n, &seconds)) {
            return false;
        }
        samples_add(&all, milliseconds ? seconds * 1e3 : n / seconds);
    }
    results_add(&b->results, test, n, milliseconds ? "ms" : "tokens/s", &all);
    return true;
}

/* `n` sequences that each take a token per step, all together. */
static bool bench_batch(bench *b, uint32_t n, uint32_t steps) {
    hepta_session *s = NULL;
    hepta_session_options options = session_options(b, steps, n);
    hepta_batch_token *batch = memory_alloc(n, sizeof *batch);
    if (batch == NULL) {
        (void)error_set(&b->err, HEPTA_ERROR_MEMORY, "out of memory for %u sequences", n);
        return false;
    }
    samples all = {.n = 0};
    bool ok = !failed(b, hepta_session_create(b->model, &options, &s, &b->err));
    for (int run = 0; run < b->runs && ok; run++) {
        for (uint32_t i = 0; i < n; i++) {
            hepta_session_truncate(s, i, 0);
        }
        double started = clock_seconds();
        for (uint32_t step = 0; step < steps && ok; step++) {
            for (uint32_t i = 0; i < n; i++) {
                batch[i] = (hepta_batch_token){b->tokens[step + i], i, true};
            }
            ok = !failed(b, hepta_session_eval_batch(s, batch, n, b->logits, &b->err));
        }
        samples_add(&all, (double)n * steps / (clock_seconds() - started));
    }
    if (ok) {
        results_add(&b->results, "batch", n, "tokens/s", &all);
    }
    hepta_session_free(s);
    memory_free(batch);
    return ok;
}

/* ---- What a token reads ------------------------------------------------ */

/* Bytes of weights that one generated token reads: every matrix, and one row of the embedding. */
static bool weight_bytes_per_token(bench *b, double *out) {
    container *c = NULL;
    const container_options options = {.no_tokenizer = true};
    if (failed(b, container_open(b->path, &options, &c, &b->err))) {
        return false;
    }
    bool tied = container_tensor(c, "output.weight") == NULL;
    *out = 0;
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        bool lookup = !tied && strcmp(t->name, "token_embd.weight") == 0;
        *out += (double)t->n_bytes / (lookup ? (double)t->ne[1] : 1);
    }
    container_close(c);
    return true;
}

/* Bytes of keys and values that a token reads, on average over `n` tokens from the first on. */
static double cache_bytes_per_token(const bench *b, uint32_t n) {
    const double dim = b->info.head_dim;
    const double vector[] = {
        [HEPTA_CACHE_F32] = 4 * dim, [HEPTA_CACHE_F16] = 2 * dim, [HEPTA_CACHE_Q8] = dim + 4};
    return 2.0 * b->info.n_layer * b->info.n_head_kv * vector[b->cache] * (n + 1) / 2;
}

/* ---- Files ------------------------------------------------------------- */

/* Percent of a file's pages that are in memory already; -1: not known (a directory, say). */
static double cached_percent(const char *path) {
    file_map map;
    if (file_map_open(path, &map, NULL) != HEPTA_OK) {
        return -1;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = (map.size + page - 1) / page, in = 0;
    unsigned char *pages = n > 0 ? memory_alloc(n, 1) : NULL;
    bool known = pages != NULL && mincore((void *)(uintptr_t)map.data, map.size, pages) == 0;
    for (size_t i = 0; i < n && known; i++) {
        in += pages[i] & 1;
    }
    memory_free(pages);
    file_map_close(&map);
    return known ? 100.0 * (double)in / (double)n : -1;
}

/* Asks the system to forget the file's pages; it may keep some. */
static hepta_status drop_from_memory(const char *path, hepta_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return error_set(err, HEPTA_ERROR_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    (void)fdatasync(fd);
    int code = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    return code == 0 ? HEPTA_OK
                     : error_set(err, HEPTA_ERROR_IO, "%s: --cold: %s", path, strerror(code));
}

/* ---- The whole run ----------------------------------------------------- */

static bool bench_load(bench *b) {
    if (b->cold && failed(b, drop_from_memory(b->path, &b->err))) {
        return false;
    }
    double cached = cached_percent(b->path), started = clock_seconds();
    if (failed(b, hepta_model_open(b->path, &b->model, &b->err))) {
        return false;
    }
    double opened = clock_seconds() - started;
    started = clock_seconds();
    if (failed(b, use_device(b->model, &b->device, &b->err))) {
        return false;
    }
    double loaded = clock_seconds() - started;
    const char *device = hepta_model_device(b->model);
    hepta_model_get_info(b->model, &b->info);
    if (b->results.table) {
        char cpu[128];
        machine_cpu(cpu, sizeof cpu);
        printf(
            "%s: %.3g G weights, %.3f bits per weight\n%s\n%s kernels, %d thread%s, %s cache, %s\n",
            b->path, (double)b->info.n_weights * 1e-9, b->info.bits_per_weight, device, b->kernels,
            b->threads, b->threads == 1 ? "" : "s", cache_name(b->cache), cpu);
        printf("\n%-16s %6s %12s %-9s %10s .. max of %d\n", "test", "size", "median", "", "min",
               b->runs);
    }
    if (cached >= 0) {
        results_add_value(&b->results, "file_in_memory", 0, "%", cached);
    }
    results_add_value(&b->results, "open", 0, "ms", opened * 1e3);
    if (b->model->gpu != NULL) {
        results_add_value(&b->results, "to_device", 0, "ms", loaded * 1e3);
    }
    return true;
}

static bool make_tokens(bench *b) {
    uint32_t n = b->prompt > b->generate ? b->prompt : b->generate, rows = 1;
    for (size_t i = 0; i < b->n_batches; i++) {
        rows = b->batch[i] > rows ? b->batch[i] : rows;
    }
    n += FIRST_PROMPT + MIN_STEPS + rows;
    uint64_t seed = 1;
    b->tokens = memory_alloc(n, sizeof *b->tokens);
    b->logits = memory_alloc((size_t)rows * b->info.n_vocab, sizeof *b->logits);
    if (b->tokens == NULL || b->logits == NULL) {
        (void)error_set(&b->err, HEPTA_ERROR_MEMORY, "out of memory for %u tokens", n);
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        b->tokens[i] = (int32_t)(random_next(&seed) % b->info.n_vocab);
    }
    return true;
}

static bool bench_busy(bench *b, hepta_session *s) {
    neighbours others;
    if (failed(b, neighbours_start(&others, b->busy, &b->err))) {
        return false;
    }
    bool ok =
        (b->prompt == 0 || repeat(b, s, time_prompt, b->prompt, "prompt_busy", false)) &&
        (b->generate == 0 || repeat(b, s, time_generation, b->generate, "generation_busy", false));
    neighbours_stop(&others);
    return ok;
}

/* One sequence: the first pass over the weights, latency, prompt, generation, with neighbours. */
static bool bench_one_sequence(bench *b) {
    uint32_t n_ctx = b->prompt > b->generate ? b->prompt : b->generate;
    hepta_session_options options =
        session_options(b, n_ctx > FIRST_PROMPT ? n_ctx : FIRST_PROMPT, 1);
    hepta_session *s = NULL;
    double started = clock_seconds(), seconds;
    bool ok = !failed(b, hepta_session_create(b->model, &options, &s, &b->err));
    if (ok) {
        results_add_value(&b->results, "session", 0, "ms", (clock_seconds() - started) * 1e3);
        ok = time_generation(b, s, 1, &seconds);
    }
    if (ok) {
        results_add_value(&b->results, "first_pass", 1, "ms", seconds * 1e3);
    }
    ok = ok && repeat(b, s, time_prompt, FIRST_PROMPT, "first_token", true) &&
         (b->prompt == 0 || repeat(b, s, time_prompt, b->prompt, "prompt", false)) &&
         (b->generate == 0 || repeat(b, s, time_generation, b->generate, "generation", false)) &&
         (b->busy == 0 || bench_busy(b, s));
    memory_use use;
    if (ok && memory_use_read(&use)) {
        results_add_value(&b->results, "memory_peak", 0, "MB", (double)use.peak * 1e-6);
        results_add_value(&b->results, "memory_file", 0, "MB", (double)use.file * 1e-6);
        results_add_value(&b->results, "memory_own", 0, "MB", (double)use.own * 1e-6);
    }
    hepta_session_free(s);
    return ok;
}

/* Bytes a second that the machine reads, or the GPU if the model is there; in GB/s. */
static bool read_bandwidth(bench *b, double *out) {
    const hepta_model *m = b->model;
    double copied;
    if (m->gpu != NULL) {
        if (failed(b, m->gpu->bandwidth(m->gpu_number, out, &copied, &b->err))) {
            return false;
        }
        *out *= 1e-9;
        results_add_value(&b->results, "gpu_read_bandwidth", 0, "GB/s", *out);
        results_add_value(&b->results, "gpu_copy_bandwidth", 0, "GB/s", copied * 1e-9);
        return true;
    }
    if (b->threads > 1) {
        samples one = machine_read_bandwidth(1);
        results_add(&b->results, "read_bandwidth", 1, "GB/s", &one);
    }
    samples bandwidth = machine_read_bandwidth(b->threads);
    results_add(&b->results, "read_bandwidth", (uint32_t)b->threads, "GB/s", &bandwidth);
    *out = bandwidth.n > 0 ? samples_median(&bandwidth) : 0;
    return true;
}

/* Reading speed, and how much of it generation made use of. */
static bool bench_bandwidth(bench *b) {
    double weights, bandwidth;
    if (!weight_bytes_per_token(b, &weights) || !read_bandwidth(b, &bandwidth)) {
        return false;
    }
    double cache = cache_bytes_per_token(b, b->generate);
    results_add_value(&b->results, "weights_read", 1, "MB", weights * 1e-6);
    results_add_value(&b->results, "cache_read", 1, "MB", cache * 1e-6);
    const result *speed = results_find(&b->results, "generation", b->generate);
    if (speed != NULL && bandwidth > 0 &&
        (b->model->gpu == NULL || b->model->gpu_resident == b->info.n_layer)) {
        results_add_value(&b->results, "bandwidth_used", 0, "%",
                          100 * (weights + cache) * 1e-9 * speed->median / bandwidth);
    }
    return !failed(b, HEPTA_OK);
}

static bool bench_all(bench *b) {
    uint32_t steps = b->generate / 8 < MIN_STEPS ? MIN_STEPS : b->generate / 8;
    if (!bench_load(b) || !make_tokens(b) || !bench_one_sequence(b)) {
        return false;
    }
    for (size_t i = 0; i < b->n_batches; i++) {
        if (!bench_batch(b, b->batch[i], steps)) {
            return false;
        }
    }
    return bench_bandwidth(b);
}

/* ---- Output ------------------------------------------------------------ */

static int print_bench_json(const bench *b) {
    char cpu[128];
    machine_cpu(cpu, sizeof cpu);
    return print_json(json_pack("{s:o,s:s,s:s,s:s,s:s,s:i,s:s,s:I,s:f,s:o}", "model",
                                json_name(b->path), "cpu", cpu, "device",
                                hepta_model_device(b->model), "version", hepta_version(), "kernels",
                                b->kernels, "threads", b->threads, "cache", cache_name(b->cache),
                                "weights", (json_int_t)b->info.n_weights, "bits_per_weight",
                                b->info.bits_per_weight, "results", results_json(&b->results)));
}

/* Quoted as RFC 4180 has it. */
static void print_csv_text(const char *s) {
    putchar('"');
    for (; *s != '\0'; s++) {
        if (*s == '"') {
            putchar('"');
        }
        putchar(*s);
    }
    putchar('"');
}

static int print_bench_csv(const bench *b) {
    char cpu[128];
    machine_cpu(cpu, sizeof cpu);
    printf("model,kernels,threads,cache,test,size,unit,median,min,max,runs,cpu\n");
    for (size_t i = 0; i < b->results.n; i++) {
        const result *x = &b->results.list[i];
        print_csv_text(b->path);
        printf(",%s,%d,%s,%s,%u,%s,%.9g,%.9g,%.9g,%u,", b->kernels, b->threads,
               cache_name(b->cache), x->test, x->size, x->unit, x->median, x->min, x->max, x->runs);
        print_csv_text(cpu);
        putchar('\n');
    }
    return EXIT_OK;
}

static void print_summary(const bench *b) {
    char group[8] = "";
    FILE *f = fopen("/proc/sys/kernel/sched_autogroup_enabled", "re");
    if (f != NULL) {
        bool read = fgets(group, sizeof group, f) != NULL;
        group[read ? strcspn(group, "\n") : 0] = '\0';
        fclose(f);
    }
    if (b->busy > 0) {
        printf("\n%d busy neighbour%s, each in its own session (sched_autogroup_enabled: %s)\n",
               b->busy, b->busy == 1 ? "" : "s", group[0] != '\0' ? group : "unknown");
    }
}

/* ---- The command ------------------------------------------------------- */

/* "1,2,4" or "0" for none. */
static bool read_batches(const char *text, bench *b) {
    b->n_batches = 0;
    if (strcmp(text, "0") == 0) {
        return true;
    }
    for (;;) {
        char *end;
        unsigned long n = *text >= '0' && *text <= '9' ? strtoul(text, &end, 10) : 0;
        if (n < 1 || n > 4096 || b->n_batches == MAX_BATCHES || (*end != ',' && *end != '\0')) {
            fprintf(stderr,
                    "hepta: --batch: expected 0, or up to %d numbers of 1 to 4096 with commas\n",
                    (int)MAX_BATCHES);
            return false;
        }
        b->batch[b->n_batches++] = (uint32_t)n;
        if (*end == '\0') {
            return true;
        }
        text = end + 1;
    }
}

static int check_options(const bench *b, bool json, bool csv) {
    if (json && csv) {
        fprintf(stderr, "hepta: give --json or --csv, not both\n");
    } else if (b->runs < 1 || b->runs > BENCH_MAX_RUNS) {
        fprintf(stderr, "hepta: --runs %d: expected 1 to %d\n", b->runs, (int)BENCH_MAX_RUNS);
    } else if (b->prompt > 1 << 24 || b->generate > 1 << 24) {
        fprintf(stderr, "hepta: -p and -n: at most %d tokens\n", 1 << 24);
    } else {
        return -1;
    }
    return EXIT_USAGE;
}

int cli_bench_model(int argc, char **argv) {
    bench b = {.prompt = 512, .generate = 128, .runs = 5};
    const char *batches = "1,2,4,8,16,32";
    bool json = false, csv = false;
    const option_spec specs[] = {
        {"prompt", 'p', OPTION_U32, &b.prompt, "N", "tokens of the prompt (default 512; 0: none)"},
        {"generate", 'n', OPTION_U32, &b.generate, "N",
         "tokens generated one by one (default 128; 0: none)"},
        {"batch", 0, OPTION_STRING, &batches, "N,...",
         "sequences that generate together (default 1,2,4,8,16,32; 0: none)"},
        {"runs", 'r', OPTION_INT, &b.runs, "N", "runs of each test (default 5)"},
        {"threads", 't', OPTION_INT, &b.threads, "N", "threads (default: physical cores)"},
        {"cache", 0, OPTION_CACHE, &b.cache, "TYPE", "KV cache: f32 (default), f16 or q8"},
        DEVICE_OPTIONS(b.device),
        {"chunk", 0, OPTION_U32, &b.chunk, "N",
         "tokens processed together (default: the engine's)"},
        {"busy", 0, OPTION_INT, &b.busy, "N", "measure again beside N processes that compute"},
        {"cold", 0, OPTION_FLAG, &b.cold, NULL, "drop the file from memory before opening it"},
        {"json", 0, OPTION_FLAG, &json, NULL, "print JSON"},
        {"csv", 0, OPTION_FLAG, &csv, NULL, "print CSV"},
        {0},
    };
    const command_spec spec = {
        .usage = "bench [MODEL] [options]",
        .summary = "Measures a model: loading, first token, prompt, generation, batches, memory.",
        .details =
            "MODEL defaults to the bundled one. Medians and ranges; docs/BENCHMARKS.md\n"
            "explains every line and the fields of --json and --csv.\n"
            "\n"
            "  hepta bench code      error and speed of the code at every rate\n"
            "  hepta bench kernels   matrix-vector products: scalar, BLAS, int8, int4, Hepta",
        .example = "hepta bench model.hepta -p 512 -n 128 --runs 5 --json",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &b.path);
    if (code >= 0 || (code = check_options(&b, json, csv)) >= 0) {
        return code;
    }
    if (!read_batches(batches, &b)) {
        return EXIT_USAGE;
    }
    b.path = model_or_default(b.path);
    const kernels *chosen;
    if (kernels_select(&chosen, &b.err) != HEPTA_OK) {
        return report(&b.err);
    }
    b.kernels = chosen->name;
    b.threads = b.threads > 0 ? b.threads : threads_default();
    b.results.table = !json && !csv;
    interrupt_catch();
    if (!bench_all(&b)) {
        code = report(&b.err);
    } else if (json) {
        code = print_bench_json(&b);
    } else if (csv) {
        code = print_bench_csv(&b);
    } else {
        print_summary(&b);
        code = EXIT_OK;
    }
    memory_free(b.tokens);
    memory_free(b.logits);
    hepta_model_close(b.model);
    return code;
}
