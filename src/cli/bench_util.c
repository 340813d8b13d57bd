/*
 * bench_util.c - results, the machine and busy neighbours, for the benchmarks.
 */
#include "cli/bench.h"

#include "base/base.h"
#include "model/team.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Results ----------------------------------------------------------- */

void samples_add(samples *s, double value) {
    if (s->n == BENCH_MAX_RUNS) {
        return;
    }
    int i = s->n++;
    for (; i > 0 && s->value[i - 1] > value; i--) { /* kept sorted */
        s->value[i] = s->value[i - 1];
    }
    s->value[i] = value;
}

double samples_median(const samples *s) {
    return s->n == 0 ? 0 : (s->value[(s->n - 1) / 2] + s->value[s->n / 2]) / 2;
}

double samples_min(const samples *s) {
    return s->n == 0 ? 0 : s->value[0];
}

double samples_max(const samples *s) {
    return s->n == 0 ? 0 : s->value[s->n - 1];
}

void results_add(results *r, const char *test, uint32_t size, const char *unit, const samples *s) {
    if (r->n == BENCH_MAX_RESULTS) {
        return;
    }
    result *x = &r->list[r->n++];
    *x = (result){test,           unit,          size, (uint32_t)s->n, samples_median(s),
                  samples_min(s), samples_max(s)};
    if (!r->table) {
        return;
    }
    char of[16] = "";
    if (size > 0) {
        snprintf(of, sizeof of, "%u", size);
    }
    printf("%-16s %6s %12.4g %-9s", test, of, x->median, unit);
    if (s->n > 1) {
        printf(" %10.4g .. %.4g", x->min, x->max);
    }
    putchar('\n');
    fflush(stdout);
}

void results_add_value(results *r, const char *test, uint32_t size, const char *unit,
                       double value) {
    samples s = {.n = 0};
    samples_add(&s, value);
    results_add(r, test, size, unit, &s);
}

const result *results_find(const results *r, const char *test, uint32_t size) {
    for (size_t i = 0; i < r->n; i++) {
        if (strcmp(r->list[i].test, test) == 0 && r->list[i].size == size) {
            return &r->list[i];
        }
    }
    return NULL;
}

json_t *results_json(const results *r) {
    json_t *list = json_array();
    for (size_t i = 0; i < r->n; i++) {
        const result *x = &r->list[i];
        json_array_append_new(list,
                              json_pack("{s:s,s:I,s:s,s:f,s:f,s:f,s:I}", "test", x->test, "size",
                                        (json_int_t)x->size, "unit", x->unit, "median", x->median,
                                        "min", x->min, "max", x->max, "runs", (json_int_t)x->runs));
    }
    return list;
}

/* ---- This machine ------------------------------------------------------ */

/* The text after "key ... :" in a file of such lines; false: no such line. */
static bool find_line(const char *path, const char *key, char *out, size_t n) {
    char line[512];
    FILE *f = fopen(path, "re");
    bool found = false;
    while (f != NULL && !found && fgets(line, sizeof line, f) != NULL) {
        char *colon = strchr(line, ':');
        found = strncmp(line, key, strlen(key)) == 0 && colon != NULL;
        if (found) {
            colon += 1 + strspn(colon + 1, " \t");
            colon[strcspn(colon, "\n")] = '\0';
            snprintf(out, n, "%s", colon);
        }
    }
    if (f != NULL) {
        fclose(f);
    }
    return found;
}

void machine_cpu(char *out, size_t n) {
    if (!find_line("/proc/cpuinfo", "model name", out, n)) {
        snprintf(out, n, "unknown");
    }
}

/* Not sysconf: on some virtual machines it counts the caches of cores that others use. */
size_t machine_cache_bytes(void) {
    size_t largest = 0;
    for (int i = 0; i < 8; i++) {
        char path[80];
        unsigned long kilobytes = 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        FILE *f = fopen(path, "re");
        if (f != NULL && fscanf(f, "%luK", &kilobytes) == 1 && kilobytes << 10 > largest) {
            largest = (size_t)kilobytes << 10;
        }
        if (f != NULL) {
            fclose(f);
        }
    }
    return largest > 0 ? largest : (size_t)32 << 20;
}

static uint64_t status_bytes(const char *key) {
    char text[64];
    unsigned long long kilobytes = 0;
    bool found = find_line("/proc/self/status", key, text, sizeof text) &&
                 sscanf(text, "%llu kB", &kilobytes) == 1;
    return found ? 1024 * (uint64_t)kilobytes : 0;
}

bool memory_use_read(memory_use *out) {
    *out = (memory_use){.file = status_bytes("RssFile"),
                        .own = status_bytes("RssAnon") + status_bytes("RssShmem"),
                        .peak = status_bytes("VmHWM")};
    return out->peak > 0;
}

/* ---- Read bandwidth ---------------------------------------------------- */

enum { STEP_BYTES = 256 };

/* 64 bytes as the compiler likes to load them: one instruction, two, or four. */
typedef uint64_t wide __attribute__((vector_size(64), may_alias));

#define READ_BODY                                                                                  \
    wide a = {0}, b = a, c = a, d = a;                                                             \
    for (size_t i = 0; i < n; i += STEP_BYTES) {                                                   \
        const wide *w = (const wide *)(const void *)(p + i);                                       \
        a ^= w[0];                                                                                 \
        b ^= w[1];                                                                                 \
        c ^= w[2];                                                                                 \
        d ^= w[3];                                                                                 \
    }                                                                                              \
    a ^= b ^ c ^ d;                                                                                \
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];

typedef uint64_t (*read_fn)(const uint8_t *p, size_t n);

static uint64_t read_plain(const uint8_t *p, size_t n) {
    READ_BODY
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static uint64_t read_avx2(const uint8_t *p, size_t n) {
    READ_BODY
}
__attribute__((target("avx512f"))) static uint64_t read_avx512(const uint8_t *p, size_t n) {
    READ_BODY
}
#endif

static read_fn choose_read(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        return read_avx512;
    }
    if (__builtin_cpu_supports("avx2")) {
        return read_avx2;
    }
#endif
    return read_plain;
}

typedef struct reading {
    const uint8_t *data;
    size_t n_bytes, piece;
    read_fn read;
    uint64_t sum; /* of all, so that nothing is left out */
} reading;

static void read_piece(void *context, size_t item, int thread) {
    (void)thread;
    reading *r = context;
    size_t at = item * r->piece, n = r->n_bytes - at < r->piece ? r->n_bytes - at : r->piece;
    uint64_t sum = r->read(r->data + at, n);
    __atomic_fetch_xor(&r->sum, sum, __ATOMIC_RELAXED);
}

samples machine_read_bandwidth(int threads) {
    enum { PASSES = 7, MB = 1 << 20 };
    size_t n = 8 * machine_cache_bytes();
    n = n < (size_t)256 * MB ? (size_t)256 * MB : n > (size_t)2048 * MB ? (size_t)2048 * MB : n;
    n = n / MB * MB;
    void *data = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    team *readers = NULL;
    samples all = {.n = 0};
    if (data != MAP_FAILED && team_create(threads, &readers, NULL) == HEPTA_OK) {
        (void)madvise(data, n, MADV_HUGEPAGE);
        memset(data, 1, n);
        reading r = {.data = data, .n_bytes = n, .piece = MB, .read = choose_read()};
        for (int pass = 0; pass < PASSES && !interrupted(); pass++) {
            double started = clock_seconds();
            team_each(readers, n / MB, read_piece, &r);
            samples_add(&all, (double)n * 1e-9 / (clock_seconds() - started));
        }
        all.n = r.sum == 0 ? all.n : 0; /* an even number of equal words: always 0 */
    }
    team_free(readers);
    if (data != MAP_FAILED) {
        munmap(data, n);
    }
    return all;
}

/* ---- Neighbours -------------------------------------------------------- */

static void compute_forever(pid_t parent) {
    signal(SIGINT, SIG_IGN); /* the parent ends it */
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)setsid();
    volatile uint64_t x = 1;
    while (getppid() == parent) {
        for (int i = 0; i < 1 << 20; i++) {
            x = x * 6364136223846793005u + 1;
        }
    }
    _exit(0);
}

hepta_status neighbours_start(neighbours *b, int n, hepta_error *err) {
    enum { MAX = sizeof b->pid / sizeof b->pid[0] };
    *b = (neighbours){.n = 0};
    if (n > MAX) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "%d busy neighbours: at most %d", n, (int)MAX);
    }
    pid_t parent = getpid();
    fflush(stdout);
    for (; b->n < n; b->n++) {
        pid_t pid = fork();
        if (pid == 0) {
            compute_forever(parent);
        }
        if (pid < 0) {
            neighbours_stop(b);
            return error_set(err, HEPTA_ERROR_IO, "cannot start a busy neighbour: %s",
                             strerror(errno));
        }
        b->pid[b->n] = pid;
    }
    return HEPTA_OK;
}

void neighbours_stop(neighbours *b) {
    for (; b->n > 0; b->n--) {
        kill(b->pid[b->n - 1], SIGKILL);
        (void)waitpid(b->pid[b->n - 1], NULL, 0);
    }
}
