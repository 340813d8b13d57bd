/*
 * bench.h - what the benchmarks share: repeated measurements, their three forms of output, and
 * what this machine is and can.
 */
#ifndef CLI_BENCH_H
#define CLI_BENCH_H

#include "cli/cli.h"

#include <stdio.h>
#include <sys/types.h>

int cli_bench_model(int argc, char **argv);
int cli_bench_code(int argc, char **argv);
int cli_bench_kernels(int argc, char **argv);

/* ---- Results ----------------------------------------------------------- */

enum { BENCH_MAX_RUNS = 64, BENCH_MAX_RESULTS = 256 };

/* Values of repeated runs of one measurement. */
typedef struct samples {
    double value[BENCH_MAX_RUNS];
    int n;
} samples;
void samples_add(samples *s, double value);
double samples_median(const samples *s);
double samples_min(const samples *s);
double samples_max(const samples *s);

/*
 * One line of results. `test` says what was measured ("prompt"), `size` on how much (512 tokens;
 * 0: not applicable), `unit` what the values are.
 */
typedef struct result {
    const char *test, *unit;
    uint32_t size, runs;
    double median, min, max;
} result;

/* Results in the order they were measured; a table's lines are printed as they come. */
typedef struct results {
    result list[BENCH_MAX_RESULTS];
    size_t n;
    bool table;
} results;
void results_add(results *r, const char *test, uint32_t size, const char *unit, const samples *s);
void results_add_value(results *r, const char *test, uint32_t size, const char *unit, double value);
const result *results_find(const results *r, const char *test, uint32_t size); /* NULL: none */
json_t *results_json(const results *r);

/* ---- This machine ------------------------------------------------------ */

/* "AMD EPYC 9654", as the operating system names it, or "unknown". */
void machine_cpu(char *out, size_t n);
/* Bytes of the largest cache; 32 MiB when the operating system does not say. */
size_t machine_cache_bytes(void);

/* Bytes of this process in memory. */
typedef struct memory_use {
    uint64_t file; /* pages of mapped files */
    uint64_t own;  /* everything else */
    uint64_t peak; /* of both together, so far */
} memory_use;
bool memory_use_read(memory_use *out); /* false: no /proc here */

/*
 * GB/s at which `threads` threads read a buffer at least eight times as big as the largest cache,
 * on huge pages where the system has them, in several passes. No samples when memory or threads are
 * short.
 */
samples machine_read_bandwidth(int threads);

/* ---- Neighbours -------------------------------------------------------- */

/*
 * Processes that compute without end, each in a session of its own: Linux shares the CPU between
 * sessions first where sched_autogroup_enabled is 1. They die with this process.
 */
typedef struct neighbours {
    pid_t pid[64];
    int n;
} neighbours;
hepta_status neighbours_start(neighbours *b, int n, hepta_error *err);
void neighbours_stop(neighbours *b);

#endif
