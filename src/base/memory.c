/*
 * memory.c - the allocator: aligned, zero-filled, checked for overflow, able to fail on demand.
 *
 * Blocks of 2 MiB and more are aligned to that, so that the kernel may back them with huge pages.
 */
#include "base/base.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20, ARENA_CHUNK = 64 << 10 };

static uint64_t n_allocations; /* updated atomically */
static uint64_t fail_at;       /* 0: never */

void memory_fail_after(uint64_t k) {
    uint64_t now = __atomic_load_n(&n_allocations, __ATOMIC_RELAXED);
    __atomic_store_n(&fail_at, k == 0 ? 0 : now + k, __ATOMIC_RELAXED);
}

uint64_t memory_count(void) {
    return __atomic_load_n(&n_allocations, __ATOMIC_RELAXED);
}

void *memory_alloc(size_t n, size_t size) {
    uint64_t count = __atomic_add_fetch(&n_allocations, 1, __ATOMIC_RELAXED);
    uint64_t bytes;
    if (mul_overflows(n, size, &bytes) || bytes > SIZE_MAX / 2 ||
        count == __atomic_load_n(&fail_at, __ATOMIC_RELAXED)) {
        return NULL;
    }
    bool huge = bytes >= HUGE_PAGE;
    size_t alignment = huge ? HUGE_PAGE : ALIGNMENT;
    size_t total = (size_t)round_up(bytes == 0 ? 1 : bytes, ALIGNMENT);
    uint8_t *raw = calloc(1, total + alignment + sizeof raw); /* big ones: untouched zero pages */
    if (raw == NULL) {
        return NULL;
    }
    uintptr_t at = (uintptr_t)raw + sizeof raw;
    uint8_t *p = raw + sizeof raw + (alignment - at % alignment) % alignment;
    memcpy(p - sizeof raw, &raw, sizeof raw); /* for memory_free */
    if (huge) {
        (void)madvise(p, total, MADV_HUGEPAGE); /* a hint; refusal does no harm */
    }
    return p;
}

void memory_use_sparsely(void *p, size_t n) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)p + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)p + n) / page * page;
    if (begin < end) {
        (void)madvise((void *)begin, end - begin, MADV_NOHUGEPAGE);
    }
}

void *memory_resize(void *p, size_t old_n, size_t new_n, size_t size) {
    void *q = memory_alloc(new_n, size);
    if (q != NULL && p != NULL) {
        memcpy(q, p, (old_n < new_n ? old_n : new_n) * size);
        memory_free(p);
    }
    return q;
}

void memory_free(void *p) {
    if (p != NULL) {
        uint8_t *raw;
        memcpy(&raw, (uint8_t *)p - sizeof raw, sizeof raw);
        free(raw);
    }
}

/* Chunks of ARENA_CHUNK bytes or of one big piece; new pieces come from the newest small chunk. */
struct arena_chunk {
    struct arena_chunk *next;
    size_t used, size;
    _Alignas(ALIGNMENT) uint8_t data[];
};

void *arena_alloc(arena *a, size_t n, size_t size) {
    uint64_t bytes;
    if (mul_overflows(n, size, &bytes) || bytes > SIZE_MAX / 4) {
        return NULL;
    }
    size_t need = (size_t)round_up(bytes == 0 ? 1 : bytes, 16);
    struct arena_chunk *c = a->chunks;
    if (c == NULL || c->size - c->used < need) {
        size_t room = need > ARENA_CHUNK / 4 ? need : ARENA_CHUNK;
        c = memory_alloc(1, sizeof *c + room);
        if (c == NULL) {
            return NULL;
        }
        c->size = room;
        if (room != ARENA_CHUNK && a->chunks != NULL) { /* keep filling the small one */
            c->next = a->chunks->next;
            a->chunks->next = c;
        } else {
            c->next = a->chunks;
            a->chunks = c;
        }
    }
    void *p = c->data + c->used;
    c->used += need;
    return p;
}

char *arena_copy_string(arena *a, const char *s, size_t n) {
    char *copy = n < SIZE_MAX ? arena_alloc(a, n + 1, 1) : NULL;
    if (copy != NULL && n > 0) {
        memcpy(copy, s, n);
    }
    return copy;
}

void arena_free(arena *a) {
    for (struct arena_chunk *c = a->chunks, *next; c != NULL; c = next) {
        next = c->next;
        memory_free(c);
    }
    a->chunks = NULL;
}
