/*
 * util.c - reporting, progress, interrupts and input for the commands.
 */
#include "cli/cli.h"

#include "base/base.h"
#include "text/utf8.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* ---- Reporting --------------------------------------------------------- */

int report(const hepta_error *err) {
    fprintf(stderr, "hepta: %s\n", err->message);
    return err->status == HEPTA_ERROR_INTERRUPTED ? EXIT_INTERRUPTED : EXIT_FAILED;
}

int report_text(const char *format, ...) {
    va_list args;
    fputs("hepta: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return EXIT_FAILED;
}

double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void progress_start(progress *p, const char *title, const char *unit) {
    *p = (progress){.title = title,
                    .unit = unit,
                    .started = clock_seconds(),
                    .percent = -1,
                    .terminal = isatty(STDERR_FILENO) == 1};
}

/* "12.3 M" */
static void format_amount(double x, char *out, size_t n) {
    static const char *const prefix[] = {" ", " k", " M", " G", " T"};
    int i = 0;
    for (; x >= 1000 && i < 4; i++) {
        x /= 1000;
    }
    snprintf(out, n, "%.3g%s", x, prefix[i]);
}

/* Draws one line over the last one, cut to the terminal's width; names must not steer it. */
static void draw_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void draw_line(const char *format, ...) {
    char line[256];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    struct winsize size;
    bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    int width = known ? size.ws_col - 1 : 79;
    for (char *c = line; *c != '\0'; c++) {
        *c = (unsigned char)*c < 0x20 || *c == 0x7f ? '?' : *c;
    }
    fprintf(stderr, "\r\033[K%.*s", width, line);
}

bool progress_update(void *context, const char *what, uint64_t done, uint64_t total) {
    progress *p = context;
    if (p->quiet) {
        return !interrupted();
    }
    double now = clock_seconds(), elapsed = now - p->started;
    double share = total > 0 ? (double)done / (double)total : 0;
    int percent = (int)(share * 100);
    char rate[32], left[48] = "";
    format_amount(elapsed > 0 ? (double)done / elapsed : 0, rate, sizeof rate);
    if (done > 0 && elapsed > 0.5) {
        double seconds = elapsed / share - elapsed;
        snprintf(left, sizeof left, ", %d:%02d left", (int)(seconds / 60), (int)seconds % 60);
    }
    if (p->terminal) {
        if (now - p->drawn > 0.1 || done == total) {
            char bar[31];
            for (int i = 0; i < 30; i++) {
                bar[i] = i < percent * 30 / 100 ? '=' : ' ';
            }
            bar[30] = '\0';
            draw_line("%s [%s] %3d %% %s%s/s%s  %.32s", p->title, bar, percent, rate, p->unit, left,
                      what);
            p->drawn = now;
            p->shown = true;
        }
    } else if (percent >= p->percent + 10 || p->percent < 0) {
        fprintf(stderr, "%s %d %% (%s%s/s%s) %s\n", p->title, percent, rate, p->unit, left, what);
        p->percent = percent / 10 * 10;
    }
    return !interrupted();
}

void progress_finish(progress *p) {
    if (p->terminal && p->shown) {
        fprintf(stderr, "\r\033[K");
    }
}

int print_json(json_t *value) {
    if (value == NULL) {
        return report_text("no JSON of this result: a number is not finite, or memory is short");
    }
    int failed = json_dumpf(value, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    json_decref(value);
    if (failed != 0) {
        return report_text("cannot write JSON to standard output");
    }
    putchar('\n');
    return EXIT_OK;
}

json_t *json_text(const char *text, size_t n) {
    json_t *value = json_stringn(text, n);
    if (value != NULL) {
        return value;
    }
    char *clean = malloc(3 * n + 1);
    size_t m = clean != NULL ? utf8_display(text, n, clean) : 0;
    value = clean != NULL ? json_stringn(clean, m) : NULL;
    free(clean);
    return value;
}

json_t *json_name(const char *name) {
    return json_text(name, strlen(name));
}

/* ---- Devices ----------------------------------------------------------- */

hepta_status use_device(hepta_model *model, const device_choice *d, hepta_error *err) {
    const hepta_device_options options = {.device = d->name != NULL ? d->name : "cpu",
                                          .layers = d->layers,
                                          .memory = d->gib * 0x1p30,
                                          .stream = d->stream};
    hepta_status status = hepta_model_use_device(model, &options, err);
    if (status == HEPTA_OK && strncmp(options.device, "auto", 4) == 0) {
        fprintf(stderr, "hepta: device: %s\n", hepta_model_device(model));
    }
    return status;
}

/* ---- Interrupts -------------------------------------------------------- */

static volatile sig_atomic_t n_interrupts;

static void on_interrupt(int signal_number) {
    if (++n_interrupts > 1) {
        file_writer_discard_all_on_signal();
        _exit(128 + signal_number);
    }
}

/* Nobody reads on: away at once, as without a handler, but without unfinished files. */
static void on_broken_pipe(int signal_number) {
    file_writer_discard_all_on_signal();
    _exit(128 + signal_number);
}

void interrupt_catch(void) {
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART}, old;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    if (sigaction(SIGHUP, NULL, &old) == 0 && old.sa_handler != SIG_IGN) { /* as nohup asks */
        sigaction(SIGHUP, &action, NULL);
    }
    action.sa_handler = on_broken_pipe;
    if (sigaction(SIGPIPE, NULL, &old) == 0 && old.sa_handler != SIG_IGN) {
        sigaction(SIGPIPE, &action, NULL);
    }
}

bool interrupted(void) {
    return n_interrupts > 0;
}

/* ---- Input ------------------------------------------------------------- */

hepta_status read_text(const char *path, char **text, size_t *n, hepta_error *err) {
    bool standard_input = strcmp(path, "-") == 0;
    FILE *f = standard_input ? stdin : fopen(path, "rbe");
    if (f == NULL) {
        return error_set(err, HEPTA_ERROR_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    hepta_status status = HEPTA_OK;
    char *data = NULL;
    size_t used = 0, room = 0;
    for (;;) {
        if (used == room) {
            room = room == 0 ? 1 << 16 : room * 2;
            char *bigger = realloc(data, room);
            if (bigger == NULL) {
                status = error_set(err, HEPTA_ERROR_MEMORY, "%s: out of memory reading %zu bytes",
                                   path, room);
                break;
            }
            data = bigger;
        }
        size_t k = fread(data + used, 1, room - used, f);
        used += k;
        if (k == 0) {
            if (ferror(f)) {
                status =
                    error_set(err, HEPTA_ERROR_IO, "%s: cannot read: %s", path, strerror(errno));
            }
            break;
        }
    }
    if (!standard_input) {
        fclose(f);
    }
    if (status != HEPTA_OK) {
        free(data);
        return status;
    }
    *text = data;
    *n = used;
    return HEPTA_OK;
}

static bool is_blank(const char *text, size_t n) {
    for (; n > 0 && (*text == ' ' || *text == '\t' || *text == '\r'); n--) {
        text++;
    }
    return n == 0;
}

hepta_status read_json_lines(const char *path, size_t limit, json_line_fn add, void *context,
                             hepta_error *err) {
    char *text = NULL;
    size_t n = 0, number = 1, added = 0;
    hepta_status status = read_text(path, &text, &n, err);
    for (size_t at = 0; at < n && status == HEPTA_OK && (limit == 0 || added < limit); number++) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t k = end != NULL ? (size_t)(end - (text + at)) : n - at;
        if (!is_blank(text + at, k)) {
            json_error_t where;
            json_t *line = json_loadb(text + at, k, 0, &where);
            if (line == NULL) {
                status = error_set(err, HEPTA_ERROR_FORMAT, "%s, line %zu: no JSON: %s", path,
                                   number, where.text);
            } else {
                status = add(context, line, number, err);
            }
            json_decref(line);
            added++;
        }
        at += k + 1;
    }
    free(text);
    if (status == HEPTA_OK && added == 0) {
        status = error_set(err, HEPTA_ERROR_FORMAT, "%s: no lines", path);
    }
    return status;
}

const char *model_or_default(const char *given) {
    static char path[PATH_MAX];
    static const char name[] = "hepta-stories-7m.hepta";
    if (given != NULL) {
        return given;
    }
    const char *chosen = getenv("HEPTA_MODEL");
    if (chosen != NULL && chosen[0] != '\0') {
        return chosen;
    }
    static const char *const beside[] = {"../models", "../share/hepta", "."};
    char program[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n > 0) {
        program[n] = '\0';
        char *slash = strrchr(program, '/');
        if (slash != NULL) {
            *slash = '\0';
        }
        for (size_t i = 0; i < sizeof beside / sizeof beside[0]; i++) {
            if (snprintf(path, sizeof path, "%s/%s/%s", program, beside[i], name) < PATH_MAX &&
                access(path, R_OK) == 0) {
                return path;
            }
        }
    }
    snprintf(path, sizeof path, "%s/%s", HEPTA_DATA_DIR, name); /* from PREFIX, by the Makefile */
    if (access(path, R_OK) != 0) {
        report_text("no MODEL is named, and the bundled one is not where it was installed");
    }
    return path;
}

hepta_status encode_text(const hepta_tokenizer *t, const char *text, size_t n, unsigned flags,
                         int32_t **tokens, size_t *n_tokens, hepta_error *err) {
    size_t room = n / 2 + 16, used = 0;
    for (;;) {
        int32_t *ids = malloc(room * sizeof *ids);
        if (ids == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu tokens", room);
        }
        hepta_status status = hepta_tokenizer_encode(t, text, n, flags, ids, room, &used, err);
        if (status == HEPTA_OK && used <= room) {
            *tokens = ids;
            *n_tokens = used;
            return HEPTA_OK;
        }
        free(ids);
        if (status != HEPTA_OK) {
            return status;
        }
        room = used;
    }
}
