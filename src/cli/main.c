/*
 * main.c - the hepta program: finds the command and runs it.
 */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"run", cli_run, "write text with a model"},
    {"quantize", cli_quantize, "turn a model into a .hepta file of 2 to 4 or 8 bits per weight"},
    {"plan", cli_plan, "show what a model takes at some bits per weight"},
    {"inspect", cli_inspect, "show what a model file holds"},
    {"verify", cli_verify, "check a model file: structure, values, checksums"},
    {"tokenize", cli_tokenize, "turn text into token ids and back"},
    {"perplexity", cli_perplexity, "measure how well a model predicts a text"},
    {"report", cli_report, "show what quantizing did to each tensor"},
    {"eval", cli_eval, "let a model answer the questions of a benchmark"},
    {"synth", cli_synth, "write a model of random weights, to measure speed with"},
    {"bench", cli_bench, "measure the speed of a model, of the kernels, of the code"},
};

static void print_usage(FILE *out) {
    fprintf(out,
            "Hepta %s: LLaMA-family models at 3.5 bits per weight, the same bits everywhere.\n\n"
            "Usage: hepta COMMAND [options]\n\nCommands:\n",
            hepta_version());
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        fprintf(out, "  %-12s %s\n", commands[i].name, commands[i].help);
    }
    fprintf(out, "\nEach command has --help. Try: hepta run -p \"Once upon a time\"\n");
}

/* What is still to be written may fail, and what was written may have: a full disk, say. */
static int finish(int code) {
    bool failed = fflush(stdout) != 0;
    if (code == EXIT_OK && (failed || ferror(stdout))) {
        return report_text("cannot write to standard output%s%s", failed ? ": " : "",
                           failed ? strerror(errno) : "");
    }
    return code;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_usage(stderr);
        return EXIT_USAGE;
    }
    const char *name = argv[1];
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(name, commands[i].name) == 0) {
            return finish(commands[i].run(argc - 1, argv + 1));
        }
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_usage(stdout);
        return finish(EXIT_OK);
    }
    if (strcmp(name, "--version") == 0) {
        printf("hepta %s\n", hepta_version());
        return finish(EXIT_OK);
    }
    fprintf(stderr, "hepta: unknown command %s\n", name);
    print_usage(stderr);
    return EXIT_USAGE;
}
