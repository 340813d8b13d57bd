/*
 * text_util.h - helpers of the tokenizer tests: files, id lists, tiny tokenizers made on the spot.
 */
#ifndef TEXT_UTIL_H
#define TEXT_UTIL_H

#include "hepta.h"

#include <stddef.h>
#include <stdint.h>

typedef struct buffer {
    uint8_t *data; /* NUL-terminated beyond n */
    size_t n;
} buffer;

buffer read_whole(const char *path);
void write_whole(const char *path, const void *data, size_t n);
void buffer_free(buffer *b);

typedef struct ids {
    int32_t *items;
    size_t n;
} ids;

/* The numbers up to the end of the line or list; *text moves behind it. */
ids parse_ids(const char **text);
void ids_free(ids *list);
void check_same_ids(const ids *found, const ids *expected, const char *text, size_t n);

/* Opens test data; skips the test where it is absent. */
hepta_tokenizer *open_tokenizer(const char *relative);
ids encode(const hepta_tokenizer *t, const void *text, size_t n, unsigned flags);
/* What a program prints: `first` up to the first bytes, no control tokens. */
buffer decode(const hepta_tokenizer *t, const ids *list);

/* kind 0: any bytes; 1: mostly short UTF-8 of many scripts; 2: letters, spaces, line breaks. */
void random_bytes(uint8_t *out, size_t n, int kind);

/* A SentencePiece vocabulary made of a few pieces. */
enum { TINY_MAX = 400 };
typedef struct tiny_vocabulary {
    char *pieces[TINY_MAX];
    int types[TINY_MAX];
    float scores[TINY_MAX];
    int n;
} tiny_vocabulary;

void tiny_add(tiny_vocabulary *v, const char *piece, int type, float score);
hepta_tokenizer *tiny_open(const tiny_vocabulary *v); /* no space prefix, no BOS */
void tiny_free(tiny_vocabulary *v);
/* The same as a SentencePiece protobuf of a given model type, into `out`; returns its size. */
size_t tiny_protobuf(const tiny_vocabulary *v, int model_type, uint8_t *out);

#endif
