/*
 * shape.h - the shapes of models, known by name or given by numbers: their metadata and tensors
 * without any weights.
 */
#ifndef CLI_SHAPE_H
#define CLI_SHAPE_H

#include "format/container.h"

typedef struct shape {
    const char *name;
    uint32_t vocab, width, layers, heads, kv_heads, ff, context, rope_base, tied;
} shape;

/* The named shape, or none, changed by --shape; complete and possible. An exit code, told why. */
int shape_find(const char *name, const char *changes, shape *s);

/* Prints the shapes known by name; an exit code. */
int shape_list(void);

/* Adds the tensors; matrices of this type, TENSOR_PACKED for rates that are still to be chosen. */
hepta_status shape_add_tensors(container *c, const shape *s, uint32_t type, hepta_error *err);

/* Metadata with a tokenizer, and tensors, whose rates are those of the quantizer if packed. */
hepta_status shape_describe(container *c, const shape *s, uint32_t type, double bits, uint64_t seed,
                            hepta_error *err);

#endif
