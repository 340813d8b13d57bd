/*
 * tiny_model.h - small random models written as files, for tests: every tensor type, any shape,
 * and ways to break them.
 */
#ifndef TINY_MODEL_H
#define TINY_MODEL_H

#include "format/container.h"

enum { TINY_MAX_KVS = 32, TINY_MAX_TENSORS = 48 };

/* What a file will hold: change it before tiny_write. */
typedef struct tiny_model {
    kv kvs[TINY_MAX_KVS];
    size_t n_kvs;
    tensor tensors[TINY_MAX_TENSORS];
    char names[TINY_MAX_TENSORS][64];
    size_t n_tensors;
    uint64_t seed; /* of the weights; a tensor's depend on its name too */
} tiny_model;

/* Vocabulary 50, width 40, 2 layers, 4 heads of 10 (2 KV heads), feed-forward 68, context 160;
 * matrices of this type (Q8_0: widths 64, 64 and 96). */
void tiny_default(tiny_model *m, uint32_t type, uint32_t half_bits);

void tiny_set_u32(tiny_model *m, const char *key, uint32_t v);
void tiny_set_f32(tiny_model *m, const char *key, float v);
void tiny_set_bool(tiny_model *m, const char *key, bool v);
void tiny_set_string(tiny_model *m, const char *key, const char *s);
void tiny_remove_key(tiny_model *m, const char *key);
tensor *tiny_tensor(tiny_model *m, const char *name);
tensor *tiny_add_tensor(tiny_model *m, const char *name, uint32_t type, uint64_t n_cols,
                        uint64_t n_rows); /* n_rows 0: a vector */
void tiny_remove_tensor(tiny_model *m, const char *name);

/* Writes the model; tensors whose `data` is set keep it, the others get random weights. */
void tiny_write(const tiny_model *m, const char *path);

#endif
