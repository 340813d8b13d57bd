/*
 * options.c - command lines: one table per command gives both the parser (getopt_long) and the
 * help text.
 */
#include "cli/cli.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPTIONS = 32, HELP_CODE = 1000, OPTION_CODE = 1001 };

static void print_help(const command_spec *spec) {
    printf("Usage: hepta %s\n\n%s\n", spec->usage, spec->summary);
    if (spec->details[0] != '\0') {
        printf("\n%s\n", spec->details);
    }
    printf("\nOptions:\n");
    for (const option_spec *o = spec->options; o->name != NULL; o++) {
        char left[64];
        char letter[8] = "    ";
        if (o->letter != 0) {
            snprintf(letter, sizeof letter, "-%c, ", o->letter);
        }
        snprintf(left, sizeof left, "%s--%s%s%s", letter, o->name, o->metavar != NULL ? " " : "",
                 o->metavar != NULL ? o->metavar : "");
        printf("  %-26s %s\n", left, o->help);
    }
    printf("  %-26s %s\n", "-h, --help", "show this text");
    printf("\nExample:\n  %s\n", spec->example);
    printf("\nExit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.\n");
}

static int usage_error(const command_spec *spec) {
    int n = (int)strcspn(spec->usage, " ");
    fprintf(stderr, "Usage: hepta %s\nTry: hepta %.*s --help\n", spec->usage, n, spec->usage);
    return EXIT_USAGE;
}

/* Reads a whole number of at most `max`; false if `s` is anything else. */
static bool parse_whole(const char *s, uint64_t max, uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (s[0] < '0' || s[0] > '9' || *end != '\0' || errno != 0 || v > max) {
        return false;
    }
    *out = v;
    return true;
}

static bool parse_number(const char *s, double *out) {
    char *end;
    errno = 0;
    double v = strtod(s, &end);
    if (end == s || *end != '\0' || errno == ERANGE || !isfinite(v) || v < 0) {
        return false;
    }
    *out = v;
    return true;
}

static const char *const cache_names[] = {
    [HEPTA_CACHE_F32] = "f32", [HEPTA_CACHE_F16] = "f16", [HEPTA_CACHE_Q8] = "q8"};

const char *cache_name(hepta_cache_type type) {
    return cache_names[type];
}

static bool store(const option_spec *o, const char *s) {
    uint64_t whole = 0;
    double number = 0;
    string_list *list;
    switch (o->type) {
    case OPTION_FLAG:
        *(bool *)o->value = true;
        return true;
    case OPTION_U32:
        if (!parse_whole(s, UINT32_MAX, &whole)) {
            break;
        }
        *(uint32_t *)o->value = (uint32_t)whole;
        return true;
    case OPTION_INT:
        if (!parse_whole(s, 4096, &whole)) {
            break;
        }
        *(int *)o->value = (int)whole;
        return true;
    case OPTION_U64:
        if (!parse_whole(s, UINT64_MAX, &whole)) {
            break;
        }
        *(uint64_t *)o->value = whole;
        return true;
    case OPTION_F32:
        if (!parse_number(s, &number)) {
            break;
        }
        *(float *)o->value = (float)number;
        return true;
    case OPTION_F64:
        if (!parse_number(s, &number)) {
            break;
        }
        *(double *)o->value = number;
        return true;
    case OPTION_STRING:
        *(const char **)o->value = s;
        return true;
    case OPTION_CACHE:
        for (int i = 0; i <= HEPTA_CACHE_Q8; i++) {
            if (strcmp(s, cache_names[i]) == 0) {
                *(hepta_cache_type *)o->value = (hepta_cache_type)i;
                return true;
            }
        }
        fprintf(stderr, "hepta: --%s %s: expected f32, f16 or q8\n", o->name, s);
        return false;
    case OPTION_LIST:
        list = o->value;
        if (list->n == (int)(sizeof list->items / sizeof list->items[0])) {
            fprintf(stderr, "hepta: --%s may be given %d times at most\n", o->name, list->n);
            return false;
        }
        list->items[list->n++] = s;
        return true;
    }
    fprintf(stderr, "hepta: --%s %s: expected a %s\n", o->name, s,
            o->type == OPTION_F32 || o->type == OPTION_F64 ? "number of at least 0"
                                                           : "whole number (and not too large)");
    return false;
}

int options_parse(const command_spec *spec, int argc, char **argv, const char **arguments) {
    struct option longs[MAX_OPTIONS + 2];
    char letters[2 * MAX_OPTIONS + 4] = "h";
    int n = 0;
    for (; spec->options[n].name != NULL && n < MAX_OPTIONS; n++) {
        const option_spec *o = &spec->options[n];
        longs[n] = (struct option){o->name, o->metavar != NULL ? required_argument : no_argument,
                                   NULL, OPTION_CODE + n};
        if (o->letter != 0) {
            size_t at = strlen(letters);
            letters[at] = o->letter;
            letters[at + 1] = o->metavar != NULL ? ':' : '\0';
            letters[at + 2] = '\0';
        }
    }
    longs[n] = (struct option){"help", no_argument, NULL, HELP_CODE};
    longs[n + 1] = (struct option){NULL, 0, NULL, 0};
    static char program[] = "hepta";
    argv[0] = program; /* the name in getopt's messages */
    optind = 1;
    for (int code; (code = getopt_long(argc, argv, letters, longs, NULL)) != -1;) {
        if (code == HELP_CODE || code == 'h') {
            print_help(spec);
            return EXIT_OK;
        }
        if (code == '?') {
            return usage_error(spec);
        }
        const option_spec *o = NULL;
        if (code >= OPTION_CODE) {
            o = &spec->options[code - OPTION_CODE];
        } else {
            for (o = spec->options; o->letter != code; o++) {
            }
        }
        if (!store(o, optarg)) {
            return usage_error(spec);
        }
    }
    int given = argc - optind;
    if (given < spec->min_arguments) {
        fprintf(stderr, "hepta: an argument is missing\n");
        return usage_error(spec);
    }
    if (given > spec->max_arguments) {
        fprintf(stderr, "hepta: unexpected argument %s\n", argv[optind + spec->max_arguments]);
        return usage_error(spec);
    }
    for (int i = 0; i < given; i++) {
        arguments[i] = argv[optind + i];
    }
    return -1;
}
