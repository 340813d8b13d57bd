/*
 * bench.c - hepta bench: finds the benchmark and runs it.
 */
#include "cli/bench.h"

#include <string.h>

int cli_bench(int argc, char **argv) {
    if (argc >= 2 && strcmp(argv[1], "code") == 0) {
        return cli_bench_code(argc - 1, argv + 1);
    }
    if (argc >= 2 && strcmp(argv[1], "kernels") == 0) {
        return cli_bench_kernels(argc - 1, argv + 1);
    }
    return cli_bench_model(argc, argv);
}
