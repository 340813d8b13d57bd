/*
 * quantize.c - hepta quantize: the command around hepta_quantize.
 */
#include "cli/cli.h"

#include "format/container.h"
#include "quantize/schemes.h"

#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { NOT_GIVEN = -1 }; /* of --bits, which is never negative */

/* Says so where the input has been quantized before. */
static hepta_status warn_of_losses(const char *in, hepta_error *err) {
    const container_options options = {.no_tokenizer = true};
    container *c;
    hepta_status status = container_open(in, &options, &c, err);
    if (status != HEPTA_OK) {
        return status;
    }
    char types[256];
    if (c->kind != CONTAINER_HEPTA && container_source_types(c, types, sizeof types)) {
        fprintf(stderr,
                "hepta: %s was quantized before (%s): what that lost is lost; the original weights "
                "give a better model\n",
                in, types);
    }
    container_close(c);
    return HEPTA_OK;
}

/* --scheme: a baseline, written as F32. */
static int quantize_plainly(const char *in, const char *out, const hepta_quantize_options *options,
                            const scheme *plain, bool awq, progress *p) {
    hepta_error err;
    double bits;
    const scheme_options o = {.scheme = *plain,
                              .threads = options->threads,
                              .tokenizer_path = options->tokenizer_path,
                              .awq = awq,
                              .calibration_path = options->calibration_path,
                              .progress = progress_update,
                              .progress_context = p};
    hepta_status status = scheme_quantize_file(in, out, &o, &bits, &err);
    progress_finish(p);
    if (status != HEPTA_OK) {
        return report(&err);
    }
    printf("%s: %.3f bits per weight as quantized, written as F32 to be measured\n", out, bits);
    return EXIT_OK;
}

/* Names with commas between them. */
static bool parse_without(const char *names, unsigned *out) {
    static const struct {
        const char *name;
        unsigned part;
    } parts[] = {{"feedback", HEPTA_WITHOUT_FEEDBACK},
                 {"scales", HEPTA_WITHOUT_SCALES},
                 {"plan", HEPTA_WITHOUT_PLAN}};
    for (const char *p = names;; p++) {
        const size_t n = strcspn(p, ",");
        size_t i = 0;
        while (i < 3 && (strlen(parts[i].name) != n || memcmp(parts[i].name, p, n) != 0)) {
            i++;
        }
        if (i == 3) {
            return false;
        }
        *out |= parts[i].part;
        p += n;
        if (*p == '\0') {
            return true;
        }
    }
}

static bool parse_effort(const char *name, hepta_effort *out) {
    static const char *const names[] = {
        [HEPTA_EFFORT_GOOD] = "good", [HEPTA_EFFORT_FAST] = "fast", [HEPTA_EFFORT_BEST] = "best"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(names[i], name) == 0) {
            *out = (hepta_effort)i;
            return true;
        }
    }
    return false;
}

/* The scheme, where one is named; false, having said why, if options do not go together. */
static bool check_scheme(const char *name, scheme *plain, bool awq, const char *effort,
                         const hepta_quantize_options *o) {
    if (name == NULL) {
        if (plain->group != 0 || awq) {
            fprintf(stderr, "hepta: --%s goes with --scheme int4, int8 or pair\n",
                    awq ? "awq" : "group");
        }
        return plain->group == 0 && !awq;
    }
    if (!scheme_parse(name, &plain->kind)) {
        fprintf(stderr, "hepta: --scheme is int4, int8 or pair\n");
        return false;
    }
    const char *unused = o->bits != NOT_GIVEN                  ? "bits"
                         : o->plan_path != NULL                ? "plan"
                         : o->plan_out_path != NULL            ? "plan-out"
                         : effort != NULL                      ? "effort"
                         : o->without != 0                     ? "without"
                         : !awq && o->calibration_path != NULL ? "calibrate"
                                                               : NULL;
    if (unused != NULL) {
        fprintf(stderr, "hepta: --%s does not go with --scheme%s: %s\n", unused,
                awq || strcmp(unused, "calibrate") != 0 ? "" : " without --awq",
                strcmp(unused, "calibrate") == 0
                    ? "plain rounding looks at no text"
                    : "NAME and --group alone decide what a weight takes");
        return false;
    }
    return true;
}

int cli_quantize(int argc, char **argv) {
    hepta_quantize_options options = {.bits = NOT_GIVEN};
    const char *out = NULL, *in = NULL, *scheme_name = NULL;
    scheme plain = {.group = 0};
    const char *effort = NULL, *without = NULL;
    bool quiet = false, awq = false;
    const option_spec specs[] = {
        {"output", 'o', OPTION_STRING, &out, "FILE", "the .hepta file to write (needed)"},
        {"bits", 'b', OPTION_F64, &options.bits, "B",
         "bits per weight of the whole file, 2 to 8 (default 3.5)"},
        {"scheme", 0, OPTION_STRING, &scheme_name, "NAME",
         "int4, int8 or pair (4 and 3 bits in turn): a plain baseline, written as F32 to be "
         "measured; OUT is a GGUF file then"},
        {"group", 0, OPTION_U32, &plain.group, "N",
         "columns that share a scale and a zero point, with --scheme (default: whole rows)"},
        {"awq", 0, OPTION_FLAG, &awq, NULL,
         "with --scheme: scale columns by the size of their inputs on calibration text first"},
        {"plan", 0, OPTION_STRING, &options.plan_path, "FILE",
         "take the bits of each tensor from FILE (NAME, tab, BITS a line)"},
        {"plan-out", 0, OPTION_STRING, &options.plan_out_path, "FILE",
         "write the bits of each tensor to FILE"},
        {"effort", 0, OPTION_STRING, &effort, "E",
         "fast, good or best: time against quality (default good)"},
        {"without", 0, OPTION_STRING, &without, "PARTS",
         "leave out feedback, scales or plan (or several, with commas), to see what each is worth"},
        {"calibrate", 0, OPTION_STRING, &options.calibration_path, "FILE",
         "text like what the model will see (default: a built-in one)"},
        {"tokenizer", 0, OPTION_STRING, &options.tokenizer_path, "FILE",
         "tokenizer, where the model comes without one"},
        {"threads", 't', OPTION_INT, &options.threads, "N",
         "threads (default: physical cores); the result does not depend on it"},
        {"quiet", 'q', OPTION_FLAG, &quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "quantize IN -o OUT.hepta [options]",
        .summary = "Turns a model into one .hepta file that holds everything needed to run it.",
        .details = "IN is a GGUF file, a Hugging Face directory (config.json, safetensors, "
                   "tokenizer) or a\n"
                   "llama2.c .bin, best in F16, BF16 or F32: what another quantizer lost stays "
                   "lost. B is\n"
                   "an upper limit for all tensors together, row scales included; at 2 and 8 bits "
                   "the row\n"
                   "scales come on top.",
        .example = "hepta quantize Llama-3.2-1B/ -o llama-3.2-1b.hepta --bits 3.5",
        .options = specs,
        .min_arguments = 1,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &in);
    if (code >= 0) {
        return code;
    }
    if (out == NULL) {
        fprintf(stderr, "hepta: name the file to write with -o OUT.hepta\n");
        return EXIT_USAGE;
    }
    if (without != NULL && !parse_without(without, &options.without)) {
        fprintf(stderr, "hepta: --without %s: expected feedback, scales, plan\n", without);
        return EXIT_USAGE;
    }
    if (!check_scheme(scheme_name, &plain, awq, effort, &options)) {
        return EXIT_USAGE;
    }
    options.bits = options.bits == NOT_GIVEN ? 3.5 : options.bits;
    if (effort != NULL && !parse_effort(effort, &options.effort)) {
        fprintf(stderr, "hepta: --effort %s: expected fast, good or best\n", effort);
        return EXIT_USAGE;
    }
    interrupt_catch();
    hepta_error err;
    hepta_model *model;
    if (hepta_model_open(in, &model, &err) != HEPTA_OK) { /* what cannot run is not worth hours */
        return report(&err);
    }
    hepta_model_close(model);
    if (warn_of_losses(in, &err) != HEPTA_OK) {
        return report(&err);
    }
    progress p;
    progress_start(&p, "quantize", "weights");
    p.quiet = quiet;
    options.progress = progress_update;
    options.progress_context = &p;
    if (scheme_name != NULL) {
        return quantize_plainly(in, out, &options, &plain, awq, &p);
    }
    double started = clock_seconds();
    hepta_status status = hepta_quantize(in, out, &options, &err);
    progress_finish(&p);
    if (status != HEPTA_OK) {
        return report(&err);
    }
    if (hepta_model_open(out, &model, &err) != HEPTA_OK) {
        return report(&err);
    }
    hepta_model_info info;
    hepta_model_get_info(model, &info);
    hepta_model_close(model);
    struct stat st = {0};
    (void)stat(out, &st);
    double seconds = clock_seconds() - started;
    struct rusage usage = {0};
    (void)getrusage(RUSAGE_SELF, &usage);
    printf(
        "%s: %.3f bits per weight, %llu weights, %.2f MB, %.1f s (%.2f M weights/s), peak memory "
        "%.0f MB\n",
        out, info.bits_per_weight, (unsigned long long)info.n_weights, (double)st.st_size / 1e6,
        seconds, (double)info.n_weights / seconds / 1e6, (double)usage.ru_maxrss / 1e3);
    return EXIT_OK;
}
