/*
 * test.h - a small test framework: TEST(name) { ... } registers itself; the runner is
 * tests/main.c (--list, --only PATTERN, --seed N).
 *
 * A failed CHECK reports file, line and values and ends the test; SKIP ends it with a reason.
 */
#ifndef TEST_H
#define TEST_H

#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct test_case {
    const char *name, *file;
    void (*run)(void);
    struct test_case *next;
} test_case;

void test_register(test_case *t);
_Noreturn void test_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
_Noreturn void test_skip(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* A figure worth reading in the log: printed whatever the outcome. */
void test_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Reproducible random numbers: one stream per test, from the printed seed and the name. */
uint64_t test_random(void);
uint32_t test_random_below(uint32_t n);
float test_random_float(void); /* uniform in [-1, 1) */
float test_random_gauss(void);

/* Path of a file of the shared test data, or NULL if it is absent ($HEPTA_DATA or
 * ../shared/data). The result is valid until the next call of the same test. */
const char *test_data(const char *relative);
/* Like test_data, but skips the test when the file is absent. */
const char *test_need_data(const char *relative);
/* A fresh directory of this test run, removed at the end. */
const char *test_tmp_dir(void);
int test_count_files(const char *dir); /* without hidden ones */

#define TEST(name)                                                                                 \
    static void test_run_##name(void);                                                             \
    static test_case test_case_##name = {#name, __FILE__, test_run_##name, NULL};                  \
    __attribute__((constructor)) static void test_ctor_##name(void) {                              \
        test_register(&test_case_##name);                                                          \
    }                                                                                              \
    static void test_run_##name(void)

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            test_fail(__FILE__, __LINE__, "CHECK(%s)", #cond);                                     \
        }                                                                                          \
    } while (0)

#define CHECK_EQ_INT(a, b)                                                                         \
    do {                                                                                           \
        long long test_a_ = (long long)(a), test_b_ = (long long)(b);                              \
        if (test_a_ != test_b_) {                                                                  \
            test_fail(__FILE__, __LINE__, "%s == %s: %lld != %lld", #a, #b, test_a_, test_b_);     \
        }                                                                                          \
    } while (0)

#define CHECK_EQ_STR(a, b)                                                                         \
    do {                                                                                           \
        const char *test_a_ = (a), *test_b_ = (b);                                                 \
        if (strcmp(test_a_, test_b_) != 0) {                                                       \
            test_fail(__FILE__, __LINE__, "%s == %s: \"%s\" != \"%s\"", #a, #b, test_a_, test_b_); \
        }                                                                                          \
    } while (0)

#define CHECK_MEM_EQ(a, b, n)                                                                      \
    do {                                                                                           \
        const unsigned char *test_a_ = (const void *)(a), *test_b_ = (const void *)(b);            \
        for (size_t test_i_ = 0; test_i_ < (size_t)(n); test_i_++) {                               \
            if (test_a_[test_i_] != test_b_[test_i_]) {                                            \
                test_fail(__FILE__, __LINE__, "%s == %s: byte %zu of %zu: %02x != %02x", #a, #b,   \
                          test_i_, (size_t)(n), test_a_[test_i_], test_b_[test_i_]);               \
            }                                                                                      \
        }                                                                                          \
    } while (0)

/* Passes when `call` returns HEPTA_OK; needs `hepta_error err` in scope. */
#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        int test_s_ = (int)(call);                                                                 \
        if (test_s_ != 0) {                                                                        \
            test_fail(__FILE__, __LINE__, "%s: status %d: %s", #call, test_s_, err.message);       \
        }                                                                                          \
    } while (0)

#define SKIP(...) test_skip(__VA_ARGS__)

#endif
