/*
 * eval.c - hepta eval: finds the benchmark task and runs it.
 */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

int cli_eval(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } tasks[] = {
        {"mmlu", cli_eval_mmlu},
        {"hellaswag", cli_eval_hellaswag},
        {"humaneval", cli_eval_humaneval},
    };
    static const char usage[] =
        "Usage: hepta eval TASK DATA [MODEL] [options]\n\n"
        "  mmlu         questions with four choices, by the likelihood of the letter\n"
        "  hellaswag    endings of a context, by their likelihood\n"
        "  humaneval    completions of Python functions, for the published scorer\n\n"
        "Example:\n  hepta eval mmlu data/ model.hepta --shots 5\n";
    for (size_t i = 0; argc >= 2 && i < sizeof tasks / sizeof tasks[0]; i++) {
        if (strcmp(argv[1], tasks[i].name) == 0) {
            return tasks[i].run(argc - 1, argv + 1);
        }
    }
    bool help = argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0);
    fputs(usage, help ? stdout : stderr);
    return help ? EXIT_OK : EXIT_USAGE;
}
