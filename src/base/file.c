/*
 * file.c - mapping input files and writing output files that are never seen half-written.
 *
 * A writer fills PATH.tmp-XXXXXX in the target's directory; commit flushes it to the disk,
 * renames it over PATH and flushes the directory. Names of unfinished files stand in a table
 * that a signal handler can walk without locks. A file that is to outlive its process is
 * PATH.part instead, in no table, locked against other writers.
 */
#include "base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

hepta_status file_map_open(const char *path, file_map *out, hepta_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* do not wait for a pipe's writer */
    if (fd < 0) {
        return error_set(err, HEPTA_ERROR_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    struct stat st;
    hepta_status status = HEPTA_OK;
    file_map map = {NULL, 0};
    if (fstat(fd, &st) != 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: cannot stat: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: is %s; a regular file is needed", path,
                           S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
    } else if ((uint64_t)st.st_size > SIZE_MAX / 2) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: too large to map", path);
    } else if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            status = error_set(err, HEPTA_ERROR_IO, "%s: cannot map %lld bytes: %s", path,
                               (long long)st.st_size, strerror(errno));
        } else {
            map = (file_map){p, (size_t)st.st_size};
        }
    }
    close(fd);
    if (status == HEPTA_OK) {
        *out = map;
    }
    return status;
}

void file_map_close(file_map *map) {
    if (map->data != NULL) {
        munmap((void *)(uintptr_t)map->data, map->size);
    }
    *map = (file_map){NULL, 0};
}

hepta_status file_map_lock(const file_map *map, hepta_error *err) {
    if (map->data == NULL || mlock(map->data, map->size) == 0) {
        return HEPTA_OK;
    }
    const int code = errno;
    struct rlimit limit;
    if ((code == ENOMEM || code == EPERM) && getrlimit(RLIMIT_MEMLOCK, &limit) == 0 &&
        limit.rlim_cur < map->size) {
        return error_set(err, HEPTA_ERROR_MEMORY,
                         "cannot lock %zu bytes in memory: this process may lock %llu; raise the "
                         "limit (ulimit -l) or do without locking",
                         map->size, (unsigned long long)limit.rlim_cur);
    }
    return error_set(err, HEPTA_ERROR_MEMORY, "cannot lock %zu bytes in memory: %s", map->size,
                     strerror(code));
}

bool file_is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

/* ---- Writer ------------------------------------------------------------ */

enum { MAX_UNFINISHED = 16, BUFFER_SIZE = 1 << 20 };

static char unfinished[MAX_UNFINISHED][PATH_MAX]; /* "" : free */
static int unfinished_used[MAX_UNFINISHED];

struct file_writer {
    char path[PATH_MAX]; /* links followed */
    int fd;
    int slot;        /* in `unfinished`, which holds the temporary name; -1: none */
    char *part;      /* the name of a file that outlives this process; NULL: none */
    uint64_t offset; /* bytes written, those in the buffer included */
    size_t n_buffer;
    uint8_t *buffer;
};

void file_writer_discard_all_on_signal(void) {
    for (int i = 0; i < MAX_UNFINISHED; i++) {
        if (__atomic_load_n(&unfinished_used[i], __ATOMIC_ACQUIRE) == 2) {
            unlink(unfinished[i]);
        }
    }
}

static int slot_take(void) {
    for (int i = 0; i < MAX_UNFINISHED; i++) {
        int expected = 0;
        if (__atomic_compare_exchange_n(&unfinished_used[i], &expected, 1, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            return i;
        }
    }
    return -1;
}

static void writer_free(file_writer *w) {
    if (w->fd >= 0) {
        close(w->fd);
    }
    if (w->slot >= 0) {
        __atomic_store_n(&unfinished_used[w->slot], 0, __ATOMIC_RELEASE);
    }
    memory_free(w->buffer);
    memory_free(w->part);
    memory_free(w);
}

/*
 * Replaces a path that ends in a symbolic link by what the link names, there or not: a rename
 * would put the file in the link's place. path: PATH_MAX bytes. False, with errno: it cannot be.
 */
static bool follow_links(char *path) {
    enum { MAX_LINKS = 40 }; /* Linux follows as many */
    char target[PATH_MAX], joined[2 * PATH_MAX];
    for (int i = 0; i < MAX_LINKS; i++) {
        const ssize_t n = readlink(path, target, sizeof target - 1);
        if (n < 0) {
            return true; /* no link, or no file yet; whatever else is wrong, creating will tell */
        }
        target[n] = '\0';
        const char *slash = strrchr(path, '/');
        const int front = target[0] == '/' || slash == NULL ? 0 : (int)(slash - path) + 1;
        if (snprintf(joined, sizeof joined, "%.*s%s", front, path, target) >= PATH_MAX) {
            errno = ENAMETOOLONG;
            return false;
        }
        memcpy(path, joined, strlen(joined) + 1);
    }
    errno = ELOOP;
    return false;
}

static hepta_status writer_create(const char *path, file_writer **out, hepta_error *err) {
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) { /* renaming would replace /dev/null */
        return error_set(err, HEPTA_ERROR_IO, "%s: is %s; name a file to write", path,
                         S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
    }
    file_writer *w = memory_alloc(1, sizeof *w);
    if (w == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path);
    }
    w->fd = -1;
    w->slot = -1;
    w->buffer = memory_alloc(BUFFER_SIZE, 1);
    hepta_status status = HEPTA_OK;
    if (w->buffer == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path);
    } else if (snprintf(w->path, PATH_MAX, "%s", path) >= PATH_MAX) {
        status = error_set(err, HEPTA_ERROR_IO, "path of %zu bytes is too long", strlen(path));
    } else if (!follow_links(w->path)) {
        status =
            error_set(err, HEPTA_ERROR_IO, "%s: cannot follow the link: %s", path, strerror(errno));
    }
    if (status != HEPTA_OK) {
        writer_free(w);
        return status;
    }
    *out = w;
    return HEPTA_OK;
}

hepta_status file_writer_open(const char *path, file_writer **out, hepta_error *err) {
    file_writer *w = NULL;
    hepta_status status = writer_create(path, &w, err);
    if (status != HEPTA_OK) {
        return status;
    }
    w->slot = slot_take();
    if (w->slot < 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: too many files being written at once", path);
        goto done;
    }
    char *temporary = unfinished[w->slot];
    if (snprintf(temporary, PATH_MAX, "%s.tmp-XXXXXX", w->path) >= PATH_MAX) {
        status = error_set(err, HEPTA_ERROR_IO, "path of %zu bytes is too long", strlen(path));
        goto done;
    }
    w->fd = mkstemp(temporary);
    if (w->fd < 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: cannot create: %s", path, strerror(errno));
        goto done;
    }
    __atomic_store_n(&unfinished_used[w->slot], 2, __ATOMIC_RELEASE);
    mode_t mask = umask(0);
    umask(mask);
    (void)fchmod(w->fd, 0666 & ~mask); /* mkstemp gives 0600 */
done:
    if (status != HEPTA_OK) {
        writer_free(w);
        return status;
    }
    *out = w;
    return HEPTA_OK;
}

hepta_status file_writer_open_part(const char *path, file_writer **out, hepta_error *err) {
    static const char suffix[] = ".part";
    file_writer *w = NULL;
    hepta_status status = writer_create(path, &w, err);
    if (status != HEPTA_OK) {
        return status;
    }
    const size_t n = strlen(w->path);
    w->part = memory_alloc(n + sizeof suffix, 1);
    if (w->part == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", path);
        goto done;
    }
    memcpy(w->part, w->path, n);
    memcpy(w->part + n, suffix, sizeof suffix);
    w->fd = open(w->part, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    struct stat st;
    if (w->fd < 0 || fstat(w->fd, &st) != 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: cannot open: %s", w->part, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: not a regular file; remove it", w->part);
    } else if (flock(w->fd, LOCK_EX | LOCK_NB) != 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: another process is writing it", w->part);
    }
done:
    if (status != HEPTA_OK) {
        writer_free(w);
        return status;
    }
    *out = w;
    return HEPTA_OK;
}

size_t file_writer_read(const file_writer *w, uint64_t offset, void *data, size_t n) {
    size_t done = 0;
    while (done < n) {
        const ssize_t k = pread(w->fd, (uint8_t *)data + done, n - done, (off_t)(offset + done));
        if (k <= 0 && !(k < 0 && errno == EINTR)) {
            break;
        }
        done += k > 0 ? (size_t)k : 0;
    }
    return done;
}

const char *file_writer_part(const file_writer *w) {
    return w->part;
}

static hepta_status write_at(file_writer *w, uint64_t offset, const uint8_t *data, size_t n,
                             hepta_error *err) {
    while (n > 0) {
        ssize_t k = pwrite(w->fd, data, n, (off_t)offset);
        if (k < 0 && errno == EINTR) {
            continue;
        }
        if (k <= 0) {
            return error_set(err, HEPTA_ERROR_IO, "%s: cannot write at byte %llu: %s%s", w->path,
                             (unsigned long long)offset, k < 0 ? strerror(errno) : "no progress",
                             w->part != NULL ? "" : "; nothing was kept");
        }
        data += k;
        offset += (uint64_t)k;
        n -= (size_t)k;
    }
    return HEPTA_OK;
}

static hepta_status flush(file_writer *w, hepta_error *err) {
    hepta_status status = write_at(w, w->offset - w->n_buffer, w->buffer, w->n_buffer, err);
    if (status == HEPTA_OK) {
        w->n_buffer = 0;
    }
    return status;
}

hepta_status file_writer_write(file_writer *w, const void *data, size_t n, hepta_error *err) {
    const uint8_t *p = data;
    while (n > 0) {
        size_t k = BUFFER_SIZE - w->n_buffer;
        k = k < n ? k : n;
        memcpy(w->buffer + w->n_buffer, p, k);
        w->n_buffer += k;
        w->offset += k;
        p += k;
        n -= k;
        if (w->n_buffer == BUFFER_SIZE) {
            hepta_status status = flush(w, err);
            if (status != HEPTA_OK) {
                return status;
            }
        }
    }
    return HEPTA_OK;
}

uint64_t file_writer_offset(const file_writer *w) {
    return w->offset;
}

hepta_status file_writer_go_on_at(file_writer *w, uint64_t offset, hepta_error *err) {
    hepta_status status = flush(w, err);
    w->offset = offset;
    return status;
}

hepta_status file_writer_sync(file_writer *w, hepta_error *err) {
    hepta_status status = flush(w, err);
    if (status == HEPTA_OK && fsync(w->fd) != 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: cannot flush to the disk: %s", w->path,
                           strerror(errno));
    }
    return status;
}

void file_writer_keep(file_writer *w) {
    if (w != NULL) {
        writer_free(w);
    }
}

hepta_status file_writer_patch(file_writer *w, uint64_t offset, const void *data, size_t n,
                               hepta_error *err) {
    hepta_status status = flush(w, err);
    return status == HEPTA_OK ? write_at(w, offset, data, n, err) : status;
}

static const char *temporary_name(const file_writer *w) {
    return w->part != NULL ? w->part : unfinished[w->slot];
}

void file_writer_discard(file_writer *w) {
    if (w != NULL) {
        unlink(temporary_name(w));
        writer_free(w);
    }
}

/* The rename lasts only when the directory is on the disk too; failure here is not the file's. */
static void sync_directory_of(const char *path) {
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        (void)fsync(fd);
        close(fd);
    }
}

hepta_status file_writer_commit(file_writer *w, hepta_error *err) {
    hepta_status status = flush(w, err);
    if (status == HEPTA_OK && w->part != NULL && ftruncate(w->fd, (off_t)w->offset) != 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: cannot cut to size: %s; nothing was kept",
                           w->part, strerror(errno));
    }
    if (status == HEPTA_OK && fsync(w->fd) != 0) {
        status =
            error_set(err, HEPTA_ERROR_IO, "%s: cannot flush to the disk: %s; nothing was kept",
                      w->path, strerror(errno));
    }
    if (status == HEPTA_OK) {
        int fd = w->fd;
        w->fd = -1;
        if (close(fd) != 0) {
            status = error_set(err, HEPTA_ERROR_IO, "%s: cannot close: %s; nothing was kept",
                               w->path, strerror(errno));
        }
    }
    if (status == HEPTA_OK && rename(temporary_name(w), w->path) != 0) {
        status = error_set(err, HEPTA_ERROR_IO, "%s: cannot rename into place: %s", w->path,
                           strerror(errno));
    }
    if (status != HEPTA_OK) {
        file_writer_discard(w);
        return status;
    }
    sync_directory_of(w->path);
    writer_free(w);
    return HEPTA_OK;
}
