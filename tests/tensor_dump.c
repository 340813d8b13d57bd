/*
 * tensor_dump.c - every weight of a model as raw binary32, for comparisons with other
 * implementations (tests/compare_dequantize.py).
 *
 * Usage: tensor_dump MODEL OUT
 * Prints one line "NAME ROWS COLUMNS" for each tensor, whose values follow each other in OUT.
 */
#include "format/container.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>

static int fail(const char *what) {
    fprintf(stderr, "tensor_dump: %s\n", what);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        return fail("usage: tensor_dump MODEL OUT");
    }
    hepta_error err = {0};
    const container_options options = {.no_tokenizer = true};
    const kernels *k;
    container *c;
    if (kernels_select(&k, &err) != HEPTA_OK ||
        container_open(argv[1], &options, &c, &err) != HEPTA_OK) {
        return fail(err.message);
    }
    FILE *f = fopen(argv[2], "wb");
    if (f == NULL) {
        return fail("cannot write the values");
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        size_t n_cols = (size_t)t->ne[0], n_rows = (size_t)(t->ne[1] * t->ne[2] * t->ne[3]);
        float *row = malloc(n_cols * sizeof *row);
        if (!tensor_type_is_readable(t->type) || row == NULL) {
            return fail("a tensor of a type without values, or no memory");
        }
        printf("%s %zu %zu\n", t->name, n_rows, n_cols);
        for (size_t r = 0; r < n_rows; r++) {
            kernels_tensor_row(k, t, r, row);
            if (fwrite(row, sizeof *row, n_cols, f) != n_cols) {
                return fail("cannot write the values");
            }
        }
        free(row);
    }
    container_close(c);
    return fclose(f) == 0 ? 0 : fail("cannot write the values");
}
