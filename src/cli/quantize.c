/*
 * quantize.c - hepta quantize: the command around hepta_quantize.
 */
#include "cli/cli.h"

#include <stdio.h>
#include <sys/stat.h>

int cli_quantize(int argc, char **argv) {
    hepta_quantize_options options = {.bits = 3.5};
    const char *out = NULL, *in = NULL;
    bool quiet = false;
    const option_spec specs[] = {
        {"output", 'o', OPTION_STRING, &out, "FILE", "the .hepta file to write (needed)"},
        {"bits", 'b', OPTION_F64, &options.bits, "B",
         "bits per weight: 2, 2.5, 3, 3.5, 4 or 8 (default 3.5)"},
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
        .details =
            "IN is a GGUF file (F32, F16, BF16 or Q8_0), a Hugging Face directory (config.json,\n"
            "safetensors, tokenizer) or a llama2.c .bin. B is an upper limit for all tensors\n"
            "together, row scales included; at 2 and 8 bits the row scales come on top.",
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
    interrupt_catch();
    hepta_error err;
    hepta_model *model;
    if (hepta_model_open(in, &model, &err) != HEPTA_OK) { /* what cannot run is not worth hours */
        return report(&err);
    }
    hepta_model_close(model);
    progress p;
    progress_start(&p, "quantize", "weights");
    p.quiet = quiet;
    options.progress = progress_update;
    options.progress_context = &p;
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
    printf("%s: %.3f bits per weight, %llu weights, %.2f MB, %.1f s (%.2f M weights/s)\n", out,
           info.bits_per_weight, (unsigned long long)info.n_weights, (double)st.st_size / 1e6,
           seconds, (double)info.n_weights / seconds / 1e6);
    return EXIT_OK;
}
