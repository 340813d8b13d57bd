/*
 * error.c - filling hepta_error once, where the error arises.
 */
#include "base/base.h"

#include <stdio.h>
#include <string.h>

const char *hepta_version(void) {
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
    return TEXT(HEPTA_VERSION_MAJOR) "." TEXT(HEPTA_VERSION_MINOR) "." TEXT(HEPTA_VERSION_PATCH);
}

const char *hepta_status_name(hepta_status status) {
    switch (status) {
    case HEPTA_OK:
        return "ok";
    case HEPTA_ERROR_ARGUMENT:
        return "invalid argument";
    case HEPTA_ERROR_IO:
        return "input/output error";
    case HEPTA_ERROR_FORMAT:
        return "format error";
    case HEPTA_ERROR_UNSUPPORTED:
        return "not supported";
    case HEPTA_ERROR_MEMORY:
        return "out of memory";
    case HEPTA_ERROR_CONTEXT:
        return "context full";
    case HEPTA_ERROR_INTERRUPTED:
        return "interrupted";
    case HEPTA_ERROR_DEVICE:
        return "device error";
    }
    return "unknown status";
}

void error_fill(hepta_error *err, hepta_status status, const char *format, ...) {
    if (err != NULL) {
        err->status = status;
        va_list args;
        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
        for (char *c = err->message; *c != '\0'; c++) { /* names come from files: one line only */
            if ((unsigned char)*c < 0x20 || *c == 0x7f) {
                *c = '?';
            }
        }
    }
}

const char *path_shown(const char *path) {
    enum { SHOWN_BYTES = 160 };
    const size_t n = strlen(path);
    return n > SHOWN_BYTES ? path + (n - SHOWN_BYTES) : path;
}
