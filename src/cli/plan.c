/*
 * plan.c - hepta plan: what a model of a shape would take.
 */
#include "cli/cli.h"

#include "cli/shape.h"
#include "quantize/plan.h"

#include <inttypes.h>
#include <stdio.h>

/* The tensors of a model file, or of a shape. */
static hepta_status open_tensors(const char *name, const char *changes, container **out, int *code,
                                 hepta_error *err) {
    *code = EXIT_OK;
    if (name != NULL && (file_exists(name) || file_is_directory(name))) {
        return container_open(name, &(container_options){.no_tokenizer = true}, out, err);
    }
    shape s;
    *code = shape_find(name, changes, &s);
    if (*code != EXIT_OK) {
        return HEPTA_OK;
    }
    *out = memory_alloc(1, sizeof **out);
    if (*out == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory");
    }
    return shape_add_tensors(*out, &s, TENSOR_PACKED, err);
}

static void print_plan(const container *c, const uint32_t *half_bits) {
    static const uint32_t rates[] = {HALF_BITS_INT8, 8, 7, 6, 5, 4, 0};
    uint64_t total = 0;
    for (size_t r = 0; r < sizeof rates / sizeof rates[0]; r++) {
        uint64_t n = 0, weights = 0;
        for (size_t i = 0; i < c->n_tensors; i++) {
            if (half_bits[i] == rates[r]) {
                n++;
                weights += tensor_n_weights(&c->tensors[i]);
            }
        }
        total += weights;
        if (n > 0) {
            char what[24];
            snprintf(what, sizeof what, "%g bits", rates[r] / 2.0);
            printf("%-9s %6" PRIu64 " tensors %16" PRIu64 " weights\n",
                   rates[r] == 0 ? "F32" : what, n, weights);
        }
    }
    const uint64_t bytes = plan_bytes(c->tensors, c->n_tensors, half_bits);
    printf("%.4f bits per weight, %" PRIu64 " weights, %" PRIu64 " bytes (%.2f GB)\n",
           (double)bytes * 8 / (double)total, total, bytes, (double)bytes * 1e-9);
}

int cli_plan(int argc, char **argv) {
    const char *name = NULL, *changes = NULL, *in = NULL, *out = NULL;
    double bits = 3.5;
    const option_spec specs[] = {
        {"bits", 'b', OPTION_F64, &bits, "B",
         "bits per weight of the whole file, 2 to 8 (default 3.5)"},
        {"plan", 0, OPTION_STRING, &in, "FILE", "take the bits of each tensor from FILE"},
        {"output", 'o', OPTION_STRING, &out, "FILE", "write the plan to FILE"},
        {"shape", 0, OPTION_STRING, &changes, "K=N,...",
         "own dimensions, or changes to SHAPE: see hepta synth --help"},
        {0},
    };
    const command_spec spec = {
        .usage = "plan SHAPE|MODEL [options]",
        .summary = "Shows what a model takes at B bits per weight, without its weights.",
        .details =
            "`hepta synth list` lists the shapes. All tensors count, with their row scales;\n"
            "at just 2 and 8 bits the scales come on top. The rates are those of `quantize\n"
            "--effort fast`; good and best look at the weights, too. A plan is a line\n"
            "NAME, tab, BITS for each matrix, which `quantize --plan` takes.",
        .example = "hepta plan llama-2-70b --bits 2.17",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &name);
    if (code >= 0) {
        return code;
    }
    if (name == NULL && changes == NULL) {
        fprintf(stderr, "hepta: name a SHAPE, a model, or give --shape\n");
        return EXIT_USAGE;
    }
    hepta_error err;
    container *c = NULL;
    uint32_t *half_bits = NULL;
    hepta_status status = open_tensors(name, changes, &c, &code, &err);
    if (status == HEPTA_OK && code == EXIT_OK) {
        half_bits = memory_alloc(c->n_tensors, sizeof *half_bits);
        if (half_bits == NULL) {
            status = error_set(&err, HEPTA_ERROR_MEMORY, "out of memory");
        } else {
            status = in != NULL ? plan_read(in, c->tensors, c->n_tensors, half_bits, &err)
                                : plan_rates(c->tensors, c->n_tensors, bits, NULL, half_bits, &err);
        }
        if (status == HEPTA_OK && out != NULL) {
            status = plan_write(out, c->tensors, c->n_tensors, half_bits, NULL, &err);
        }
        if (status == HEPTA_OK) {
            print_plan(c, half_bits);
        }
    }
    memory_free(half_bits);
    container_close(c);
    return status != HEPTA_OK ? report(&err) : code;
}
