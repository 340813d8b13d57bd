/*
 * base.h - what every layer stands on: errors, memory, checked arithmetic, files.
 */
#ifndef BASE_BASE_H
#define BASE_BASE_H

#include "hepta.h"

#include <stdarg.h>

/* ---- Errors ------------------------------------------------------------ */

/*
 * error_set(err, status, format, ...) fills `err` (may be NULL) with a printf-style message and is
 * worth `status`; a macro, so that compilers see that the call they return from has failed.
 */
#define error_set(err, status, ...) (error_fill(err, status, __VA_ARGS__), (status))
void error_fill(hepta_error *err, hepta_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The last part of a path, at most 160 bytes: messages have room for more than the path. */
const char *path_shown(const char *path);

/* ---- Memory ------------------------------------------------------------ */

/*
 * One allocator for the whole library: 64-byte aligned, zero-filled. NULL when memory is short
 * or n * size overflows. memory_fail_after(k) makes the k-th allocation from now on fail
 * (k = 0: never), for tests; memory_count() counts allocations so far.
 */
void *memory_alloc(size_t n, size_t size) __attribute__((warn_unused_result));
void *memory_resize(void *p, size_t old_n, size_t new_n, size_t size)
    __attribute__((warn_unused_result)); /* on failure p stays valid */
void memory_free(void *p);
/* Asks for small pages in a block of which little may ever be touched, here and there. */
void memory_use_sparsely(void *p, size_t n);
void memory_fail_after(uint64_t k);
uint64_t memory_count(void);

/* Arena: many small pieces, freed at once. */
typedef struct arena {
    struct arena_chunk *chunks;
} arena;
void *arena_alloc(arena *a, size_t n, size_t size) __attribute__((warn_unused_result));
char *arena_copy_string(arena *a, const char *s, size_t n) __attribute__((warn_unused_result));
void arena_free(arena *a);

/* ---- Checked arithmetic: true on overflow, *out unchanged then --------- */

static inline bool add_overflows(uint64_t a, uint64_t b, uint64_t *out) {
    uint64_t r;
    if (__builtin_add_overflow(a, b, &r)) {
        return true;
    }
    *out = r;
    return false;
}

static inline bool mul_overflows(uint64_t a, uint64_t b, uint64_t *out) {
    uint64_t r;
    if (__builtin_mul_overflow(a, b, &r)) {
        return true;
    }
    *out = r;
    return false;
}

static inline uint64_t round_up(uint64_t n, uint64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* ---- Little-endian loads and stores ------------------------------------ */

static inline uint16_t load_u16(const void *p) {
    const uint8_t *b = (const uint8_t *)p; /* src/gpu is C++ */
    return (uint16_t)(b[0] | b[1] << 8);
}
static inline uint32_t load_u32(const void *p) {
    const uint8_t *b = (const uint8_t *)p;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}
static inline uint64_t load_u64(const void *p) {
    return (uint64_t)load_u32(p) | (uint64_t)load_u32((const uint8_t *)p + 4) << 32;
}

/* ---- Files ------------------------------------------------------------- */

typedef struct file_map {
    const uint8_t *data; /* NULL for an empty file */
    size_t size;
} file_map;

/* Maps a regular file read-only. Errors name the path. */
hepta_status file_map_open(const char *path, file_map *out, hepta_error *err);
void file_map_close(file_map *map);
/* Reads the whole file into memory and keeps it there until it is closed (mlock). */
hepta_status file_map_lock(const file_map *map, hepta_error *err);
bool file_is_directory(const char *path);
bool file_exists(const char *path);

/*
 * A file that appears under its final name only on success: written to PATH.tmp-XXXXXX in the
 * same directory, flushed to the disk, renamed. What is there already must be a regular file.
 * Write errors (a full disk) are reported with the path and the number of bytes.
 */
typedef struct file_writer file_writer;
hepta_status file_writer_open(const char *path, file_writer **out, hepta_error *err);
hepta_status file_writer_write(file_writer *w, const void *data, size_t n, hepta_error *err);
uint64_t file_writer_offset(const file_writer *w);
/* Overwrites bytes written before (a header patched at the end). */
hepta_status file_writer_patch(file_writer *w, uint64_t offset, const void *data, size_t n,
                               hepta_error *err);
/*
 * The same, but written to PATH.part, which stays when the process ends: opened as it is if it is
 * there, and locked. The caller finds out what it holds (file_writer_read gives the bytes read),
 * and where to go on; commit cuts it off there.
 */
hepta_status file_writer_open_part(const char *path, file_writer **out, hepta_error *err);
const char *file_writer_part(const file_writer *w); /* its name; NULL: no such file */
size_t file_writer_read(const file_writer *w, uint64_t offset, void *data, size_t n);
hepta_status file_writer_go_on_at(file_writer *w, uint64_t offset, hepta_error *err);
hepta_status file_writer_sync(file_writer *w, hepta_error *err); /* what is written, to the disk */
void file_writer_keep(file_writer *w);                           /* frees w, leaves the file */
hepta_status file_writer_commit(file_writer *w, hepta_error *err); /* frees w in any case */
void file_writer_discard(file_writer *w);                          /* w may be NULL */
/* Unlinks unfinished files of this process: async-signal-safe, for a Ctrl-C handler. */
void file_writer_discard_all_on_signal(void);

/* ---- SHA-256 (FIPS 180-4) ---------------------------------------------- */

typedef struct sha256 {
    uint32_t state[8];
    uint64_t length; /* bytes so far */
    uint8_t buffer[64];
} sha256;
void sha256_start(sha256 *s);
void sha256_update(sha256 *s, const void *data, size_t n);
void sha256_finish(sha256 *s, uint8_t digest[32]);
void sha256_hex(const uint8_t digest[32], char hex[65]);

/* ---- Half precision ---------------------------------------------------- */

float half_to_float(uint16_t h);     /* IEEE binary16, exact */
uint16_t half_from_float(float f);   /* round to nearest even */
float bfloat_to_float(uint16_t h);   /* bfloat16, exact */
uint16_t bfloat_from_float(float f); /* round to nearest even */

/* ---- Threads ----------------------------------------------------------- */

int threads_default(void); /* physical cores this process may use (affinity, cgroup quota) */

#endif
