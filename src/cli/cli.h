/*
 * cli.h - what the commands of the program share: options, progress, interrupts, input text.
 */
#ifndef CLI_CLI_H
#define CLI_CLI_H

#include "hepta.h"

#include <jansson.h>

/* Exit codes, the same for every command. */
enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

/* ---- Commands: argv[0] is the command's name --------------------------- */

/* They return the exit code; main checks afterwards that standard output was written. */
int cli_run(int argc, char **argv);
int cli_quantize(int argc, char **argv);
int cli_inspect(int argc, char **argv);
int cli_tokenize(int argc, char **argv);
int cli_perplexity(int argc, char **argv);
int cli_verify(int argc, char **argv);
int cli_synth(int argc, char **argv);
int cli_plan(int argc, char **argv);
int cli_bench(int argc, char **argv);
int cli_report(int argc, char **argv);
int cli_eval(int argc, char **argv);
int cli_eval_mmlu(int argc, char **argv);
int cli_eval_hellaswag(int argc, char **argv);
int cli_eval_humaneval(int argc, char **argv);

/* ---- Options ----------------------------------------------------------- */

typedef enum option_type {
    OPTION_FLAG,   /* bool */
    OPTION_U32,    /* uint32_t */
    OPTION_INT,    /* int, >= 0 */
    OPTION_U64,    /* uint64_t */
    OPTION_F32,    /* float, >= 0 */
    OPTION_F64,    /* double, >= 0 */
    OPTION_STRING, /* const char * */
    OPTION_CACHE,  /* hepta_cache_type, by name */
    OPTION_LIST    /* string_list: may be given several times */
} option_type;

typedef struct string_list {
    const char *items[16];
    int n;
} string_list;

typedef struct option_spec {
    const char *name; /* "bits" for --bits */
    char letter;      /* 0: none */
    option_type type;
    void *value;
    const char *metavar; /* NULL for flags */
    const char *help;
} option_spec;

typedef struct command_spec {
    const char *usage;   /* "quantize IN -o OUT.hepta [options]" */
    const char *summary; /* one line */
    const char *details; /* more lines, or "" */
    const char *example;
    const option_spec *options; /* ends with a NULL name; --help is added */
    int min_arguments, max_arguments;
} command_spec;

/*
 * Parses argv into the options' values; positional arguments (at most max_arguments) go to
 * `arguments`. Returns -1 to go on, or an exit code (after --help or a usage error, reported).
 */
int options_parse(const command_spec *spec, int argc, char **argv, const char **arguments);

const char *cache_name(hepta_cache_type type); /* "f32", "f16", "q8" */

/* Where a command's model computes: NULL is "cpu". */
typedef struct device_choice {
    const char *name;
    uint32_t layers;
    double gib;
    bool stream;
} device_choice;

#define DEVICE_OPTIONS(d)                                                                            \
    {"device", 0, OPTION_STRING, &(d).name, "NAME", "cpu (default), cuda, cuda:N, or auto"},         \
        {"gpu-layers", 0,   OPTION_U32,                                                              \
         &(d).layers,  "N", "layers for the GPU; the CPU computes the others (default: what fits)"}, \
        {"gpu-mem", 0,     OPTION_F64,                                                               \
         &(d).gib,  "GIB", "memory of the GPU for weights (default: nine tenths of what is free)"},  \
    {                                                                                                \
        "gpu-stream", 0, OPTION_FLAG, &(d).stream, NULL,                                             \
            "copy layers that do not fit to the GPU in every pass"                                   \
    }

/* hepta_model_use_device(); says on standard error when "auto" came to the CPU. */
hepta_status use_device(hepta_model *model, const device_choice *d, hepta_error *err);

/* ---- Reporting --------------------------------------------------------- */

/* Prints "hepta: message" and returns the exit code that goes with the status. */
int report(const hepta_error *err);
int report_text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/*
 * A bar with rate and time left on a terminal, plain lines otherwise; on standard error. Nothing
 * when `quiet`. Its update function also stops the work on Ctrl-C.
 */
typedef struct progress {
    const char *title, *unit; /* "quantize", "weights" */
    double started, drawn;
    int percent; /* last one printed */
    bool terminal, shown, quiet;
} progress;
void progress_start(progress *p, const char *title, const char *unit);
bool progress_update(void *p, const char *what, uint64_t done,
                     uint64_t total); /* hepta_progress_fn */
void progress_finish(progress *p);

double clock_seconds(void);

/* splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. */
static inline uint64_t random_next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Prints a JSON value (NULL: it could not be made) to standard output and frees it. */
int print_json(json_t *value);
/* A JSON string of bytes that may not be UTF-8 (then U+FFFD stands for the bad bytes). */
json_t *json_text(const char *text, size_t n);
/* The same for names and paths. */
json_t *json_name(const char *name);

/* ---- Interrupts -------------------------------------------------------- */

/*
 * Ctrl-C, SIGTERM, SIGHUP: the first sets a flag, a second one removes unfinished files and leaves
 * at once, as a broken pipe does.
 */
void interrupt_catch(void);
bool interrupted(void);

/* ---- Input ------------------------------------------------------------- */

/* A whole file ("-": standard input) into memory of its own (free()). */
hepta_status read_text(const char *path, char **text, size_t *n, hepta_error *err);

/*
 * JSON lines: calls `add` with each line that is not blank, at most `limit` of them (0: all), and
 * its number from 1. Stops at the first error; no line at all is one.
 */
typedef hepta_status (*json_line_fn)(void *context, json_t *line, size_t number, hepta_error *err);
hepta_status read_json_lines(const char *path, size_t limit, json_line_fn add, void *context,
                             hepta_error *err);

/* The model given, or the bundled one: $HEPTA_MODEL, beside the program, or installed. */
const char *model_or_default(const char *given);

/* Encodes into memory of its own (free()). */
hepta_status encode_text(const hepta_tokenizer *t, const char *text, size_t n, unsigned flags,
                         int32_t **tokens, size_t *n_tokens, hepta_error *err);

#endif
