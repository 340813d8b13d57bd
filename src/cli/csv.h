/*
 * csv.h - comma-separated values as RFC 4180 defines them.
 *
 * Fields may be enclosed in double quotes and then hold commas, line breaks and doubled quotes;
 * records end with LF or CRLF. Beyond the RFC: a quote inside a field that does not begin with one
 * stands for itself, empty lines are skipped, and a UTF-8 byte order mark is dropped.
 */
#ifndef CLI_CSV_H
#define CLI_CSV_H

#include "hepta.h"

typedef struct csv_row {
    char **fields; /* (n) NUL-terminated, in the text given */
    size_t n;
    size_t line; /* where it begins, from 1 */
} csv_row;

typedef struct csv_table {
    csv_row *rows; /* (n) */
    size_t n;
} csv_table;

/*
 * Parses text[0, n), which the fields then point into: it is changed and must stay. text[n] must be
 * writable too. A NUL byte, an unclosed quote and text behind a closing quote are errors, which
 * name the line; `name` is for messages.
 */
hepta_status csv_parse(const char *name, char *text, size_t n, csv_table *out, hepta_error *err);
void csv_free(csv_table *table);

#endif
