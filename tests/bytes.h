/*
 * bytes.h - for tests: building files byte by byte, and damaging them.
 */
#ifndef TEST_BYTES_H
#define TEST_BYTES_H

#include "test.h"

#include <stdlib.h>
#include <unistd.h>

typedef struct bytes {
    uint8_t *data;
    size_t n, capacity;
} bytes;

static inline void bytes_put(bytes *b, const void *data, size_t n) {
    if (b->n + n > b->capacity) {
        b->capacity = 2 * (b->n + n) + 256;
        b->data = realloc(b->data, b->capacity);
        CHECK(b->data != NULL);
    }
    if (n > 0) {
        memcpy(b->data + b->n, data, n);
    }
    b->n += n;
}

/* The low n bytes of v, little-endian. */
static inline void bytes_put_int(bytes *b, uint64_t v, size_t n) {
    uint8_t le[8];
    for (int i = 0; i < 8; i++) {
        le[i] = (uint8_t)(v >> 8 * i);
    }
    bytes_put(b, le, n);
}

static inline void bytes_put_text(bytes *b, const char *s) {
    bytes_put(b, s, strlen(s));
}

/* A GGUF string: length and bytes. */
static inline void bytes_put_string(bytes *b, const char *s) {
    bytes_put_int(b, strlen(s), 8);
    bytes_put_text(b, s);
}

static inline void bytes_pad(bytes *b, size_t multiple) {
    while (b->n % multiple != 0) {
        bytes_put_int(b, 0, 1);
    }
}

static inline void bytes_free(bytes *b) {
    free(b->data);
    *b = (bytes){NULL, 0, 0};
}

static inline void bytes_write_file(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL);
    bool ok = fwrite(data, 1, n, f) == n;
    CHECK(fclose(f) == 0 && ok);
}

static inline bytes bytes_read_file(const char *path) {
    bytes b = {NULL, 0, 0};
    uint8_t chunk[65536];
    FILE *f = fopen(path, "rb");
    if (f == NULL) {
        test_fail(__FILE__, __LINE__, "cannot read %s", path);
    }
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, f)) > 0;) {
        bytes_put(&b, chunk, n);
    }
    fclose(f);
    return b;
}

/* "DIRECTORY/NAME"; valid until 64 calls later. */
static inline const char *bytes_path(const char *directory, const char *name) {
    static char paths[64][1024];
    static unsigned next;
    char *path = paths[next++ % 64];
    snprintf(path, 1024, "%s/%s", directory, name);
    return path;
}

#endif
