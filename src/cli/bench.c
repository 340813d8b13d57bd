/*
 * bench.c - hepta bench: finds the benchmark and runs it.
 */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

int cli_bench(int argc, char **argv) {
    static const char usage[] = "Usage: hepta bench code [options]\n\n"
                                "  code    error and speed of the trellis code at every rate\n\n"
                                "Example:\n  hepta bench code --json\n";
    if (argc >= 2 && strcmp(argv[1], "code") == 0) {
        return cli_bench_code(argc - 1, argv + 1);
    }
    bool help = argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0);
    fputs(usage, help ? stdout : stderr);
    return help ? EXIT_OK : EXIT_USAGE;
}
