/*
 * tensor_dump.c - every weight of a model as raw binary32, for comparisons with other
 * implementations (tests/compare_dequantize.py, tests/compare_finetune.py).
 *
 * Usage: tensor_dump MODEL OUT
 * Prints one line "NAME ROWS COLUMNS" for each tensor, whose values follow each other in OUT. Of a
 * packed matrix these are the weights, rotation undone; before it come "NAME:scale", and
 * "NAME:integers", as they are stored, rotated and with the padding of the columns.
 */
#include "format/container.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>

static const kernels *k;
static FILE *out;

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "tensor_dump: %s\n", what);
    exit(1);
}

static void write_values(const float *x, size_t n) {
    if (fwrite(x, sizeof *x, n, out) != n) {
        fail("cannot write the values");
    }
}

static float *floats(size_t n) {
    float *x = malloc(n * sizeof *x);
    if (x == NULL) {
        fail("no memory");
    }
    return x;
}

static void dump_packed(const container *c, const tensor *t) {
    const uint32_t n_rows = (uint32_t)t->ne[1], n_cols = (uint32_t)t->ne[0];
    hepta_error err = {0};
    uint64_t seed;
    rotation *r;
    if (container_get_u64(c, "hepta.rotation.seed", &seed, &err) != HEPTA_OK ||
        rotation_create(n_cols, seed, &r, &err) != HEPTA_OK) {
        fail(err.message);
    }
    const uint64_t rows = round_up(n_rows, PACKED_STRIP);
    const uint8_t *scales = t->data + t->n_bytes - 2 * rows;
    packed_matrix w = {t->half_bits, n_rows, r->n_padded, t->data, scales};
    uint8_t *ones = malloc(2 * rows);
    float *scale = floats(n_rows), *y = floats(r->n_padded), *scratch = floats(r->n_padded);
    if (ones == NULL) {
        fail("no memory");
    }
    for (uint64_t i = 0; i < rows; i++) {
        ones[2 * i] = 0x80, ones[2 * i + 1] = 0x3f; /* 1 as bfloat16 */
    }
    for (uint32_t i = 0; i < n_rows; i++) {
        scale[i] = bfloat_to_float(load_u16(scales + (size_t)2 * i));
    }
    printf("%s:scale %u 1\n%s:integers %u %u\n", t->name, n_rows, t->name, n_rows, r->n_padded);
    write_values(scale, n_rows);
    for (int weights = 0; weights < 2; weights++) {
        w.scales = weights ? scales : ones;
        for (uint32_t i = 0; i < n_rows; i++) {
            k->unpack_row(&w, i, y, (uint8_t *)scratch);
            if (weights) {
                k->rotate_inverse(r, y, scratch);
            }
            write_values(y, weights ? n_cols : r->n_padded);
        }
    }
    printf("%s %u %u\n", t->name, n_rows, n_cols);
    free(ones);
    free(scale);
    free(y);
    free(scratch);
    rotation_free(r);
}

static void dump(const tensor *t) {
    const size_t n_cols = (size_t)t->ne[0], n_rows = (size_t)(t->ne[1] * t->ne[2] * t->ne[3]);
    if (!tensor_type_is_readable(t->type)) {
        fail("a tensor of a type without values");
    }
    float *row = floats(n_cols);
    printf("%s %zu %zu\n", t->name, n_rows, n_cols);
    for (size_t r = 0; r < n_rows; r++) {
        kernels_tensor_row(k, t, r, row);
        write_values(row, n_cols);
    }
    free(row);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fail("usage: tensor_dump MODEL OUT");
    }
    hepta_error err = {0};
    const container_options options = {.no_tokenizer = true};
    container *c;
    if (kernels_select(&k, &err) != HEPTA_OK ||
        container_open(argv[1], &options, &c, &err) != HEPTA_OK) {
        fail(err.message);
    }
    out = fopen(argv[2], "wb");
    if (out == NULL) {
        fail("cannot write the values");
    }
    for (size_t i = 0; i < c->n_tensors; i++) {
        const tensor *t = &c->tensors[i];
        if (t->type == TENSOR_PACKED) {
            dump_packed(c, t);
        } else {
            dump(t);
        }
    }
    container_close(c);
    if (fclose(out) != 0) {
        fail("cannot write the values");
    }
    return 0;
}
