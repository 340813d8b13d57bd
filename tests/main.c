/*
 * main.c - the test runner: every TEST of every linked file, in a process of its own, so that a
 * crash is one failed test. Closing line: "N passed, N failed, N skipped".
 *
 * Usage: test [--list] [--only TEXT] [--seed N] [--no-fork]
 */
#include "test.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_FAIL = 1, EXIT_SKIP = 77, TIME_LIMIT = 900 };

static test_case *first, **last = &first;
static jmp_buf leave;
static uint64_t seed = 20260101, random_state;
static char tmp_root[256];

void test_register(test_case *t) {
    *last = t;
    last = &t->next;
}

static void print_message(const char *label, const char *format, va_list args) {
    printf("    %s", label);
    vprintf(format, args);
    printf("\n");
    fflush(stdout);
}

void test_fail(const char *file, int line, const char *format, ...) {
    va_list args;
    printf("    %s:%d: ", file, line);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
    longjmp(leave, EXIT_FAIL);
}

void test_skip(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_message("SKIP: ", format, args);
    va_end(args);
    longjmp(leave, EXIT_SKIP);
}

void test_note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_message("", format, args);
    va_end(args);
}

/* splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. */
uint64_t test_random(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t test_random_below(uint32_t n) {
    return (uint32_t)((test_random() >> 32) * n >> 32);
}

float test_random_float(void) {
    return (float)(test_random() >> 40) * 0x1p-23f - 1.0f;
}

float test_random_gauss(void) {
    double u = (double)((test_random() >> 11) + 1) * 0x1p-53;
    double v = (double)(test_random() >> 11) * 0x1p-53;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

const char *test_data(const char *relative) {
    static char path[4096];
    const char *root = getenv("HEPTA_DATA");
    snprintf(path, sizeof path, "%s/%s", root != NULL ? root : "../shared/data", relative);
    return access(path, R_OK) == 0 ? path : NULL;
}

const char *test_need_data(const char *relative) {
    const char *path = test_data(relative);
    if (path == NULL) {
        test_skip("test data %s is absent (set HEPTA_DATA)", relative);
    }
    return path;
}

const char *test_tmp_dir(void) {
    static char path[512];
    static unsigned count;
    snprintf(path, sizeof path, "%s/%d-%u", tmp_root, (int)getpid(), count++);
    if (mkdir(path, 0700) != 0) {
        test_fail(__FILE__, __LINE__, "cannot make %s: %s", path, strerror(errno));
    }
    return path;
}

int test_count_files(const char *dir) {
    DIR *d = opendir(dir);
    if (d == NULL) {
        test_fail(__FILE__, __LINE__, "cannot list %s: %s", dir, strerror(errno));
    }
    int n = 0;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        n += e->d_name[0] != '.';
    }
    closedir(d);
    return n;
}

static void remove_tmp_root(void) {
    pid_t pid = fork();
    if (pid == 0) {
        execlp("rm", "rm", "-rf", tmp_root, (char *)NULL);
        _exit(127);
    }
    waitpid(pid, NULL, 0);
}

static int run_here(const test_case *t) {
    random_state = seed;
    for (const char *c = t->name; *c != '\0'; c++) {
        random_state = random_state * 31 + (unsigned char)*c;
    }
    int code = setjmp(leave);
    if (code == 0) {
        t->run();
    }
    return code;
}

static int run_apart(const test_case *t) {
    pid_t pid = fork();
    if (pid < 0) {
        perror("fork");
        exit(2);
    }
    if (pid == 0) {
        alarm(TIME_LIMIT);
        exit(run_here(t)); /* exit, not _exit: lets leak checkers report */
    }
    int status;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    if (WIFSIGNALED(status)) {
        printf("    killed by signal %d (%s)\n", WTERMSIG(status), strsignal(WTERMSIG(status)));
        return EXIT_FAIL;
    }
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    const char *only = NULL;
    bool list = false, apart = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) {
            list = true;
        } else if (strcmp(argv[i], "--no-fork") == 0) {
            apart = false;
        } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoull(argv[++i], NULL, 0);
        } else {
            fprintf(stderr, "usage: %s [--list] [--only TEXT] [--seed N] [--no-fork]\n", argv[0]);
            return 2;
        }
    }
    const char *tmp = getenv("TMPDIR");
    snprintf(tmp_root, sizeof tmp_root, "%s/hepta-test-XXXXXX", tmp != NULL ? tmp : "/tmp");
    if (!list && mkdtemp(tmp_root) == NULL) {
        perror(tmp_root);
        return 2;
    }
    int n[3] = {0, 0, 0}; /* passed, failed, skipped */
    if (!list) {
        printf("seed %llu\n", (unsigned long long)seed);
    }
    for (const test_case *t = first; t != NULL; t = t->next) {
        if (only != NULL && strstr(t->name, only) == NULL) {
            continue;
        }
        if (list) {
            printf("%-48s %s\n", t->name, t->file);
            continue;
        }
        printf("%s\n", t->name);
        fflush(stdout);
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        int code = apart ? run_apart(t) : run_here(t);
        clock_gettime(CLOCK_MONOTONIC, &b);
        int outcome = code == 0 ? 0 : code == EXIT_SKIP ? 2 : 1;
        n[outcome]++;
        double s = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
        printf("    %s (%.2f s)\n", (const char *[]){"ok", "FAILED", "skipped"}[outcome], s);
        fflush(stdout);
    }
    if (list) {
        return 0;
    }
    remove_tmp_root();
    printf("%d passed, %d failed, %d skipped\n", n[0], n[1], n[2]);
    return n[1] > 0;
}
