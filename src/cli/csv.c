/*
 * csv.c - comma-separated values (RFC 4180).
 */
#include "cli/csv.h"

#include "base/base.h"

#include <stdlib.h>
#include <string.h>

typedef struct parser {
    const char *name;
    char *at, *end;
    size_t line;
    csv_table table;
} parser;

static hepta_status fail(const parser *p, const char *what, hepta_error *err) {
    return error_set(err, HEPTA_ERROR_FORMAT, "%s, line %zu: %s", p->name, p->line, what);
}

static bool at_break(const parser *p) {
    return p->at == p->end || *p->at == '\n' ||
           (*p->at == '\r' && p->at + 1 < p->end && p->at[1] == '\n');
}

/* Reads a field; it is moved to its place without quotes and ends with NUL at *field_end. */
static hepta_status parse_field(parser *p, char **field, char **field_end, hepta_error *err) {
    char *out = p->at;
    *field = out;
    if (p->at < p->end && *p->at == '"') {
        for (p->at++;; p->at++) {
            if (p->at == p->end) {
                return fail(p, "a quoted field has no end", err);
            }
            if (*p->at == '"' && (p->at + 1 == p->end || p->at[1] != '"')) {
                break;
            }
            p->at += *p->at == '"';
            p->line += *p->at == '\n';
            *out++ = *p->at;
        }
        p->at++;
        if (!at_break(p) && *p->at != ',') {
            return fail(p, "text behind a closing quote", err);
        }
    } else {
        while (!at_break(p) && *p->at != ',') {
            *out++ = *p->at++;
        }
    }
    *field_end = out;
    return HEPTA_OK;
}

/* Makes room for one more item; n doubles at powers of two. */
static bool grow(void *array, size_t n, size_t size) {
    void **items = array;
    if ((n & (n - 1)) != 0) {
        return true;
    }
    void *bigger = realloc(*items, (n == 0 ? 1 : 2 * n) * size);
    if (bigger != NULL) {
        *items = bigger;
    }
    return bigger != NULL;
}

static hepta_status parse_row(parser *p, hepta_error *err) {
    csv_table *t = &p->table;
    if (!grow(&t->rows, t->n, sizeof *t->rows)) {
        return error_set(err, HEPTA_ERROR_MEMORY, "%s: out of memory", p->name);
    }
    csv_row *row = &t->rows[t->n++];
    *row = (csv_row){.line = p->line};
    for (;;) {
        char *field, *field_end;
        hepta_status status = parse_field(p, &field, &field_end, err);
        if (status != HEPTA_OK) {
            return status;
        }
        if (!grow(&row->fields, row->n, sizeof *row->fields)) {
            return error_set(err, HEPTA_ERROR_MEMORY, "%s: out of memory", p->name);
        }
        row->fields[row->n++] = field;
        bool more = p->at < p->end && *p->at == ',';
        if (!more) { /* over the line break, before NUL overwrites it */
            p->at += p->at < p->end && *p->at == '\r';
            p->line += p->at < p->end;
        }
        p->at += p->at < p->end;
        *field_end = '\0';
        if (!more) {
            return HEPTA_OK;
        }
    }
}

hepta_status csv_parse(const char *name, char *text, size_t n, csv_table *out, hepta_error *err) {
    parser p = {.name = name, .at = text, .end = text + n, .line = 1};
    hepta_status status = HEPTA_OK;
    if (memchr(text, '\0', n) != NULL) {
        status = error_set(err, HEPTA_ERROR_FORMAT, "%s: byte %zu is NUL: no CSV file", name,
                           (size_t)((char *)memchr(text, '\0', n) - text));
    }
    if (n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) {
        p.at += 3;
    }
    while (status == HEPTA_OK && p.at < p.end) {
        if (at_break(&p)) {
            p.at += *p.at == '\r' ? 2 : 1;
            p.line++;
        } else {
            status = parse_row(&p, err);
        }
    }
    if (status != HEPTA_OK) {
        csv_free(&p.table);
        return status;
    }
    *out = p.table;
    return HEPTA_OK;
}

void csv_free(csv_table *table) {
    for (size_t i = 0; i < table->n; i++) {
        free(table->rows[i].fields);
    }
    free(table->rows);
    *table = (csv_table){0};
}
