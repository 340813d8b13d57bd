/*
 * command.h - running the program in tests: $HEPTA_BUILD/hepta (default build/hepta) through the
 * shell.
 */
#ifndef COMMAND_H
#define COMMAND_H

#include "test.h"

#include <stdarg.h>
#include <stdlib.h>
#include <sys/wait.h>

enum { MAX_OUTPUT = 1 << 20 };

static char output[MAX_OUTPUT + 1];

/* Runs a shell command line; "hepta" in front is the program. Output: both streams. */
static int run(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int run(const char *format, ...) {
    char command[8192];
    const char *build = getenv("HEPTA_BUILD");
    int at = snprintf(command, sizeof command, "exec 2>&1; hepta() { %s/hepta \"$@\"; }; ",
                      build != NULL ? build : "build");
    va_list args;
    va_start(args, format);
    vsnprintf(command + at, sizeof command - (size_t)at, format, args);
    va_end(args);
    FILE *p = popen(command, "r");
    CHECK(p != NULL);
    size_t n = fread(output, 1, MAX_OUTPUT, p);
    output[n] = '\0';
    int status = pclose(p);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define CHECK_RUN(code, ...)                                                                       \
    do {                                                                                           \
        int test_code_ = run(__VA_ARGS__);                                                         \
        if (test_code_ != (code)) {                                                                \
            test_fail(__FILE__, __LINE__, "exit code %d, expected %d; output: %.1500s",            \
                      test_code_, (code), output);                                                 \
        }                                                                                          \
    } while (0)

#define CHECK_SAYS(text)                                                                           \
    do {                                                                                           \
        if (strstr(output, (text)) == NULL) {                                                      \
            test_fail(__FILE__, __LINE__, "output lacks \"%s\": %.1500s", (text), output);         \
        }                                                                                          \
    } while (0)

#endif
