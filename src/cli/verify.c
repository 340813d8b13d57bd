/*
 * verify.c - hepta verify: the whole file, byte by byte.
 */
#include "cli/cli.h"

#include "format/container.h"

#include <stdio.h>

int cli_verify(int argc, char **argv) {
    const char *path = NULL;
    bool quiet = false;
    const option_spec specs[] = {
        {"quiet", 'q', OPTION_FLAG, &quiet, NULL, "print nothing but errors"},
        {0},
    };
    const command_spec spec = {
        .usage = "verify FILE [options]",
        .summary = "Checks a model file: structure, values, padding and every checksum.",
        .details =
            "The first damage found is named: tensor, file and byte offset. Formats without\n"
            "checksums (all but .hepta) are checked for structure and finite values.",
        .example = "hepta verify model.hepta",
        .options = specs,
        .min_arguments = 1,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &path);
    if (code >= 0) {
        return code;
    }
    interrupt_catch();
    hepta_error err;
    container *c = NULL;
    if (container_open(path, NULL, &c, &err) != HEPTA_OK) {
        return report(&err);
    }
    progress p;
    progress_start(&p, "verify", "B");
    p.quiet = quiet || !p.terminal;
    hepta_status status = container_verify(c, progress_update, &p, &err);
    progress_finish(&p);
    if (status != HEPTA_OK) {
        container_close(c);
        return report(&err);
    }
    if (!quiet) {
        printf("%s: good: %zu tensors, %s\n", path, c->n_tensors,
               c->kind == CONTAINER_HEPTA ? "every checksum right"
                                          : "structure and values (no checksums in this format)");
    }
    container_close(c);
    return EXIT_OK;
}
