/*
 * test_base.c - the base layer: hashes, half precision, memory, files.
 */
#include "test.h"

#include "base/base.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Vectors of FIPS 180-4's examples and the million-a one. */
TEST(base_sha256_vectors) {
    static const struct {
        const char *text, *hex;
    } vectors[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    };
    uint8_t digest[32];
    char hex[65];
    sha256 s;
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
        sha256_start(&s);
        sha256_update(&s, vectors[i].text, strlen(vectors[i].text));
        sha256_finish(&s, digest);
        sha256_hex(digest, hex);
        CHECK_EQ_STR(hex, vectors[i].hex);
    }
    sha256_start(&s);
    char a[997];
    memset(a, 'a', sizeof a);
    for (size_t left = 1000000; left > 0;) { /* pieces of odd sizes */
        size_t n = 1 + test_random_below(sizeof a);
        n = n < left ? n : left;
        sha256_update(&s, a, n);
        left -= n;
    }
    sha256_finish(&s, digest);
    sha256_hex(digest, hex);
    CHECK_EQ_STR(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/* Every binary16 value survives; values between are rounded to the nearest, ties to even. */
TEST(base_half_exhaustive) {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = half_to_float((uint16_t)h);
        if (isnan(f)) {
            CHECK((h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0);
            CHECK(isnan(half_to_float(half_from_float(f))));
            continue;
        }
        CHECK_EQ_INT(half_from_float(f), h);
        if ((h & 0x7fff) < 0x7bff) {
            float next = half_to_float((uint16_t)(h + 1));
            float middle = (float)(((double)f + (double)next) / 2);
            CHECK_EQ_INT(half_from_float(middle), (h & 1) == 0 ? h : h + 1);
            CHECK_EQ_INT(half_from_float(nextafterf(middle, f)), h);
            CHECK_EQ_INT(half_from_float(nextafterf(middle, next)), h + 1);
        }
    }
    CHECK_EQ_INT(half_from_float(65519.0f), 0x7bff);
    CHECK_EQ_INT(half_from_float(65520.0f), 0x7c00);
    CHECK_EQ_INT(half_from_float(-INFINITY), 0xfc00);
    CHECK_EQ_INT(half_from_float(0x1p-25f), 0);
    CHECK_EQ_INT(half_from_float(0x1.000002p-25f), 1);
}

TEST(base_bfloat_exhaustive) {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = bfloat_to_float((uint16_t)h);
        if (isnan(f)) {
            CHECK(isnan(bfloat_to_float(bfloat_from_float(f))));
            continue;
        }
        CHECK_EQ_INT(bfloat_from_float(f), h);
        if ((h & 0x7fff) < 0x7f7f) {
            uint32_t middle = h << 16 | 0x8000;
            float m;
            memcpy(&m, &middle, 4);
            CHECK_EQ_INT(bfloat_from_float(m), (h & 1) == 0 ? h : h + 1);
        }
    }
}

TEST(base_memory_overflow_and_failure) {
    CHECK(memory_alloc(SIZE_MAX / 2, 4) == NULL);
    CHECK(memory_alloc(SIZE_MAX, 1) == NULL);
    memory_fail_after(2);
    void *a = memory_alloc(1, 1), *b = memory_alloc(1, 1), *c = memory_alloc(1, 1);
    memory_fail_after(0);
    CHECK(a != NULL && b == NULL && c != NULL);
    CHECK((uintptr_t)a % 64 == 0);
    memory_free(a);
    memory_free(c);
    arena pieces = {NULL};
    for (size_t i = 1; i < 3000; i++) {
        uint8_t *p = arena_alloc(&pieces, i * 7 % 40000 + 1, 1);
        CHECK(p != NULL && (uintptr_t)p % 16 == 0 && p[0] == 0);
        memset(p, 255, i * 7 % 40000 + 1);
    }
    CHECK(arena_alloc(&pieces, SIZE_MAX / 2, 3) == NULL);
    arena_free(&pieces);
}

TEST(base_file_writer_is_all_or_nothing) {
    hepta_error err;
    char dir[512], path[600];
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    snprintf(path, sizeof path, "%s/file", dir);
    file_writer *w;
    CHECK_OK(file_writer_open(path, &w, &err));
    CHECK_OK(file_writer_write(w, "hello world", 11, &err));
    CHECK(!file_exists(path));
    CHECK_OK(file_writer_patch(w, 0, "J", 1, &err));
    CHECK_OK(file_writer_commit(w, &err));
    file_map map;
    CHECK_OK(file_map_open(path, &map, &err));
    CHECK_EQ_INT(map.size, 11);
    CHECK_MEM_EQ(map.data, "Jello world", 11);
    file_map_close(&map);
    CHECK_OK(file_writer_open(path, &w, &err)); /* an old file stays until the new one is whole */
    CHECK_OK(file_writer_write(w, "x", 1, &err));
    file_writer_discard(w);
    CHECK_OK(file_map_open(path, &map, &err));
    CHECK_EQ_INT(map.size, 11);
    file_map_close(&map);
    CHECK_EQ_INT(test_count_files(dir), 1);
}

/* Bytes of this process that are locked in memory. */
static long locked_bytes(void) {
    FILE *f = fopen("/proc/self/status", "r");
    char line[256];
    long kib = -1;
    while (f != NULL && fgets(line, sizeof line, f) != NULL && sscanf(line, "VmLck: %ld", &kib) < 1)
        ;
    if (f != NULL) {
        fclose(f);
    }
    return kib * 1024;
}

/* In a child process: without privileges and with a limit of `limit` bytes. */
static void lock_with_limit(const file_map *map, rlim_t limit, bool succeeds) {
    pid_t child = fork();
    if (child == 0) {
        hepta_error err = {0};
        bool ready = setrlimit(RLIMIT_MEMLOCK, &(struct rlimit){limit, limit}) == 0 &&
                     (geteuid() != 0 || setuid(65534) == 0);
        hepta_status status = file_map_lock(map, &err);
        bool right = succeeds ? status == HEPTA_OK && locked_bytes() >= (long)map->size
                              : status == HEPTA_ERROR_MEMORY && strstr(err.message, "ulimit -l");
        _exit(ready && right ? 0 : 1);
    }
    int code = -1;
    CHECK(child > 0 && waitpid(child, &code, 0) == child);
    CHECK_EQ_INT(code, 0);
}

/* clang and gcc say it differently */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER
#endif

TEST(base_file_map_lock) {
#ifdef ADDRESS_SANITIZER
    SKIP("AddressSanitizer makes mlock do nothing");
#endif
    char path[600];
    snprintf(path, sizeof path, "%s/file", test_tmp_dir());
    hepta_error err;
    file_writer *w;
    static const char page[4096] = {1};
    CHECK_OK(file_writer_open(path, &w, &err));
    for (int i = 0; i < 8; i++) {
        CHECK_OK(file_writer_write(w, page, sizeof page, &err));
    }
    CHECK_OK(file_writer_commit(w, &err));
    file_map map;
    CHECK_OK(file_map_open(path, &map, &err));
    struct rlimit now;
    CHECK(getrlimit(RLIMIT_MEMLOCK, &now) == 0);
    if (now.rlim_max >= 65536) {
        lock_with_limit(&map, 65536, true);
    }
    lock_with_limit(&map, 4096, false);
    file_map_close(&map);
    CHECK_OK(file_map_lock(&map, &err)); /* nothing to lock */
}

/* A link stays a link; the file it names is written, beside the old one first. */
TEST(base_file_writer_follows_links) {
    char inner[600], target[600], link[600], other[600], circle[600];
    const char *folder = test_tmp_dir();
    hepta_error err;
    file_writer *w;
    struct stat st;
    snprintf(inner, sizeof inner, "%s/inner", folder);
    snprintf(target, sizeof target, "%s/inner/file", folder);
    snprintf(link, sizeof link, "%s/link", folder);
    snprintf(other, sizeof other, "%s/other", folder);
    snprintf(circle, sizeof circle, "%s/circle", folder);
    CHECK(mkdir(inner, 0777) == 0);
    CHECK(symlink("inner/file", link) == 0); /* relative, of a file that is not there yet */
    CHECK(symlink(link, other) == 0);        /* absolute, of a link */
    static const char *const contents[] = {"one", "two"};
    const char *const paths[] = {link, other};
    for (int i = 0; i < 2; i++) {
        CHECK_OK(file_writer_open(paths[i], &w, &err));
        CHECK_OK(file_writer_write(w, contents[i], strlen(contents[i]), &err));
        CHECK_OK(file_writer_commit(w, &err));
        file_map map;
        CHECK_OK(file_map_open(target, &map, &err));
        CHECK_EQ_INT(map.size, strlen(contents[i]));
        CHECK_MEM_EQ(map.data, contents[i], map.size);
        file_map_close(&map);
        CHECK(lstat(link, &st) == 0 && S_ISLNK(st.st_mode));
        CHECK(lstat(other, &st) == 0 && S_ISLNK(st.st_mode));
    }
    CHECK(symlink("circle", circle) == 0);
    CHECK_EQ_INT(file_writer_open(circle, &w, &err), HEPTA_ERROR_IO);
    CHECK(strstr(err.message, "cannot follow the link") != NULL);
}

TEST(base_file_writer_reports_a_full_disk) {
    hepta_error err;
    char dir[512], path[600];
    snprintf(dir, sizeof dir, "%s", test_tmp_dir());
    snprintf(path, sizeof path, "%s/file", dir);
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit old, limit;
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    limit = old;
    limit.rlim_cur = 3 << 20;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    file_writer *w;
    CHECK_OK(file_writer_open(path, &w, &err));
    static uint8_t data[1 << 20];
    hepta_status status = HEPTA_OK;
    for (int i = 0; i < 8 && status == HEPTA_OK; i++) {
        status = file_writer_write(w, data, sizeof data, &err);
    }
    setrlimit(RLIMIT_FSIZE, &old);
    CHECK_EQ_INT(status, HEPTA_ERROR_IO);
    CHECK(strstr(err.message, path) != NULL && strstr(err.message, "nothing was kept") != NULL);
    file_writer_discard(w);
    CHECK_EQ_INT(test_count_files(dir), 0);
}

TEST(base_files_that_cannot_be_opened) {
    hepta_error err;
    file_map map;
    file_writer *w;
    CHECK_EQ_INT(file_map_open("/nonexistent/x", &map, &err), HEPTA_ERROR_IO);
    CHECK(strstr(err.message, "/nonexistent/x") != NULL);
    CHECK_EQ_INT(file_map_open("/", &map, &err), HEPTA_ERROR_IO);
    CHECK(strstr(err.message, "directory") != NULL);
    CHECK_EQ_INT(file_writer_open("/nonexistent/x", &w, &err), HEPTA_ERROR_IO);
    CHECK_EQ_INT(file_writer_open("/", &w, &err), HEPTA_ERROR_IO);
}

TEST(base_errors_are_one_line) {
    hepta_error err;
    error_fill(&err, HEPTA_ERROR_FORMAT, "a\nb\x1b[2J%s", "c");
    CHECK_EQ_STR(err.message, "a?b?[2Jc");
    for (int s = 0; s <= HEPTA_ERROR_INTERRUPTED; s++) {
        CHECK(strcmp(hepta_status_name((hepta_status)s), "unknown status") != 0);
    }
    CHECK(threads_default() >= 1);
}
