/*
 * eval_hellaswag.c - hepta eval hellaswag: which ending of a context is the likeliest (Zellers et
 * al. 2019, "HellaSwag", arXiv:1905.07830).
 *
 * DATA is JSON lines. The published ones (hellaswag_val.jsonl: activity_label, ctx_a, ctx_b,
 * endings, label) become text as in EleutherAI's lm-evaluation-harness (tasks/hellaswag/utils.py):
 * "LABEL: CTX_A CTX_B", ctx_b with its first letter in upper and the rest in lower case; brackets
 * left over from WikiHow removed. Other files give ctx, endings and label, used as they are. A
 * space stands between context and ending.
 *
 * acc: the ending with the largest sum of ln p; acc_norm: with the largest sum divided by the
 * ending's length in characters (code points, as the harness counts them; without the space).
 */
#include "cli/cli.h"
#include "cli/evaluator.h"
#include "cli/score.h"

#include "base/base.h"
#include "text/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { MAX_ENDINGS = 26 };

typedef struct settings {
    const char *data;
    evaluator_options model;
    uint32_t limit, show;
    bool json, quiet, details;
} settings;

typedef struct item {
    char *context;
    char *endings[MAX_ENDINGS]; /* a space in front */
    size_t n_endings, label;
} item;

typedef struct hellaswag {
    settings o;
    evaluator e;
    item *items;
    size_t n_items;
    size_t n_done, n_right, n_right_norm, n_cropped;
    json_t *details; /* or NULL */
} hellaswag;

/* ---- Text -------------------------------------------------------------- */

/* Replaces all occurrences of `from` by the shorter or equally long `to`. */
static void replace(char *text, const char *from, const char *to) {
    char *out = text;
    size_t n = strlen(from), m = strlen(to);
    for (const char *in = text; *in != '\0';) {
        if (strncmp(in, from, n) == 0) {
            memcpy(out, to, m);
            out += m;
            in += n;
        } else {
            *out++ = *in++;
        }
    }
    *out = '\0';
}

/* Removes "[...]", the shortest each, not across lines (the regular expression \[.*?\]). */
static void remove_brackets(char *text) {
    char *out = text;
    for (const char *in = text; *in != '\0';) {
        size_t n = *in == '[' ? strcspn(in, "]\n") : 0;
        if (n > 0 && in[n] == ']') {
            in += n + 1;
        } else {
            *out++ = *in++;
        }
    }
    *out = '\0';
}

/* White space as Python's str.strip sees it, as far as ASCII goes. */
static void strip(char *text) {
    static const char space[] = " \t\n\r\v\f\x1c\x1d\x1e\x1f";
    size_t n = strlen(text), begin = strspn(text, space);
    while (n > begin && strchr(space, text[n - 1]) != NULL) {
        n--;
    }
    memmove(text, text + begin, n - begin);
    text[n - begin] = '\0';
}

static void clean(char *text) {
    strip(text);
    replace(text, " [title]", ". ");
    remove_brackets(text);
    replace(text, "  ", " ");
}

/* The first letter in title case, the others in lower case; free(). */
static char *capitalize(const char *text) {
    size_t n = strlen(text), used = 0, at = 0;
    char *out = malloc(4 * n + 1);
    while (out != NULL && at < n) {
        uint32_t c;
        size_t k = utf8_decode((const uint8_t *)text + at, n - at, &c);
        if (k == 0) { /* jansson lets no invalid UTF-8 through */
            break;
        }
        c = (uint32_t)(at == 0 ? utf8proc_totitle((utf8proc_int32_t)c)
                               : utf8proc_tolower((utf8proc_int32_t)c));
        used += utf8_encode(c, (uint8_t *)out + used);
        at += k;
    }
    if (out != NULL) {
        out[used] = '\0';
    }
    return out;
}

static size_t count_characters(const char *text) {
    size_t n = 0;
    for (; *text != '\0'; text++) {
        n += ((unsigned char)*text & 0xC0) != 0x80;
    }
    return n;
}

/* ---- Items ------------------------------------------------------------- */

static void free_item(item *it) {
    free(it->context);
    for (size_t i = 0; i < it->n_endings; i++) {
        free(it->endings[i]);
    }
}

__attribute__((format(printf, 1, 2))) static char *format_text(const char *format, ...) {
    char *text = NULL;
    va_list args;
    va_start(args, format);
    int n = vasprintf(&text, format, args);
    va_end(args);
    return n < 0 ? NULL : text;
}

/* The context of a line; NULL if it has none of the fields, or memory is short. */
static char *read_context(json_t *line, bool published) {
    const char *ctx = json_string_value(json_object_get(line, "ctx"));
    if (!published) {
        return ctx != NULL ? strdup(ctx) : NULL;
    }
    const char *label = json_string_value(json_object_get(line, "activity_label"));
    const char *a = json_string_value(json_object_get(line, "ctx_a"));
    const char *b = json_string_value(json_object_get(line, "ctx_b"));
    char *end = label != NULL && a != NULL && b != NULL ? capitalize(b) : NULL;
    char *text = end != NULL ? format_text("%s: %s %s", label, a, end) : NULL;
    free(end);
    if (text != NULL) {
        clean(text);
    }
    return text;
}

/* 3 or "3"; false: neither, or no ending has this number. */
static bool read_label(const json_t *value, size_t n_endings, size_t *label) {
    const char *s = json_string_value(value);
    if (s != NULL ? s[0] < '0' || s[0] > '9' || s[1] != '\0' : !json_is_integer(value)) {
        return false;
    }
    json_int_t i = s != NULL ? s[0] - '0' : json_integer_value(value);
    *label = (size_t)i;
    return i >= 0 && (size_t)i < n_endings;
}

/* What is wrong with a line, or NULL. */
static const char *read_item(json_t *line, item *it) {
    bool published = json_object_get(line, "ctx_a") != NULL;
    json_t *endings = json_object_get(line, "endings");
    if (json_array_size(endings) < 2 || json_array_size(endings) > MAX_ENDINGS) {
        return "expected 2 to 26 \"endings\"";
    }
    it->context = read_context(line, published);
    if (it->context == NULL) {
        return "expected \"activity_label\", \"ctx_a\" and \"ctx_b\", or \"ctx\"";
    }
    for (size_t i = 0; i < json_array_size(endings); i++) {
        const char *s = json_string_value(json_array_get(endings, i));
        char *ending = s != NULL ? format_text(" %s", s) : NULL;
        if (ending == NULL) {
            return "an ending is no text";
        }
        if (published) {
            clean(ending + 1);
        }
        it->endings[it->n_endings++] = ending;
        if (ending[1] == '\0') {
            return "an ending is empty";
        }
    }
    if (!read_label(json_object_get(line, "label"), it->n_endings, &it->label)) {
        return "expected \"label\", the number of the right ending, from 0";
    }
    return NULL;
}

static hepta_status add_item(void *context, json_t *line, size_t number, hepta_error *err) {
    hellaswag *h = context;
    item *items = realloc(h->items, (h->n_items + 1) * sizeof *items);
    if (items == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu items", h->n_items);
    }
    h->items = items;
    item *it = &items[h->n_items++];
    *it = (item){0};
    const char *wrong = read_item(line, it);
    return wrong == NULL
               ? HEPTA_OK
               : error_set(err, HEPTA_ERROR_FORMAT, "%s, line %zu: %s", h->o.data, number, wrong);
}

/* ---- Asking ------------------------------------------------------------ */

static hepta_status ask(hellaswag *h, const item *it, hepta_error *err) {
    question q;
    double log_p[MAX_ENDINGS], per_character[MAX_ENDINGS];
    hepta_status status = question_encode(&h->e, it->context, (const char *const *)it->endings,
                                          it->n_endings, &q, err);
    if (status == HEPTA_OK) {
        h->n_cropped += question_length(&q) > h->e.n_ctx;
        if (!question_crop(&h->e, &q)) {
            status = error_set(err, HEPTA_ERROR_CONTEXT,
                               "item %zu: an ending does not fit the context of %u", h->n_done + 1,
                               h->e.n_ctx);
        }
    }
    if (status == HEPTA_OK) {
        status = evaluator_score(&h->e, &q, log_p, err);
    }
    question_free(&q);
    if (status == HEPTA_OK) {
        for (size_t i = 0; i < it->n_endings; i++) {
            per_character[i] = log_p[i] / (double)count_characters(it->endings[i] + 1);
        }
        append_details(h->details, "", it->label, log_p, it->n_endings);
        h->n_right += first_largest(log_p, it->n_endings) == it->label;
        h->n_right_norm += first_largest(per_character, it->n_endings) == it->label;
        h->n_done++;
    }
    return status;
}

static hepta_status ask_all(hellaswag *h, hepta_error *err) {
    progress p;
    progress_start(&p, "hellaswag", "items");
    p.quiet = h->o.quiet;
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; i < h->n_items && status == HEPTA_OK; i++) {
        status = ask(h, &h->items[i], err);
        if (!progress_update(&p, "", h->n_done, h->n_items)) {
            break;
        }
    }
    progress_finish(&p);
    return status;
}

static int print_result(const hellaswag *h) {
    estimate acc = share_of(h->n_right, h->n_done), norm = share_of(h->n_right_norm, h->n_done);
    if (h->o.json || h->o.details) {
        return print_json(json_pack(
            "{s:s, s:o, s:o, s:i, s:b, s:I, s:I, s:{s:f, s:f}, s:{s:f, s:f}, s:I, s:o*}", "task",
            "hellaswag", "model", json_name(h->o.model.model), "data", json_name(h->o.data), "ctx",
            (int)h->e.n_ctx, "complete", h->n_done == h->n_items, "items", (json_int_t)h->n_done,
            "items_asked_for", (json_int_t)h->n_items, "acc", "accuracy", acc.value,
            "standard_error", acc.error, "acc_norm", "accuracy", norm.value, "standard_error",
            norm.error, "truncated", (json_int_t)h->n_cropped, "details", json_incref(h->details)));
    }
    printf("acc      %6.2f %% +- %.2f  (%zu items)\n", 100 * acc.value, 100 * acc.error, h->n_done);
    printf("acc_norm %6.2f %% +- %.2f  (per character)\n", 100 * norm.value, 100 * norm.error);
    if (h->n_cropped > 0) {
        printf("the context of %u tokens held %zu items only without their beginning\n", h->e.n_ctx,
               h->n_cropped);
    }
    return EXIT_OK;
}

static int show_item(const hellaswag *h, size_t n) {
    if (n > h->n_items) {
        return report_text("--show: there are %zu items", h->n_items);
    }
    const item *it = &h->items[n - 1];
    for (size_t i = 0; i < it->n_endings; i++) {
        printf("%s%s%s\n", it->context, it->endings[i], i == it->label ? " <- right" : "");
    }
    return EXIT_OK;
}

static int run(hellaswag *h) {
    hepta_error err = {0};
    if (read_json_lines(h->o.data, h->o.limit, add_item, h, &err) != HEPTA_OK) {
        return report(&err);
    }
    if (h->o.show > 0) {
        return show_item(h, h->o.show);
    }
    if (evaluator_open(&h->e, &h->o.model, &err) != HEPTA_OK || ask_all(h, &err) != HEPTA_OK) {
        return report(&err);
    }
    int code = print_result(h);
    if (h->n_done < h->n_items) {
        report_text("interrupted after %zu of %zu items", h->n_done, h->n_items);
        return EXIT_INTERRUPTED;
    }
    return code;
}

int cli_eval_hellaswag(int argc, char **argv) {
    hellaswag h = {0};
    settings *o = &h.o;
    const option_spec specs[] = {
        {"limit", 0, OPTION_U32, &o->limit, "N", "the first N items only"},
        {"show", 0, OPTION_U32, &o->show, "N", "print item N as the model sees it and leave"},
        {"ctx", 'c', OPTION_U32, &o->model.ctx, "N",
         "context length (default: the training context)"},
        {"tokenizer", 0, OPTION_STRING, &o->model.tokenizer, "FILE",
         "tokenizer, where the model comes without one"},
        {"threads", 't', OPTION_INT, &o->model.threads, "N", "threads (default: physical cores)"},
        DEVICE_OPTIONS(o->model.device),
        {"json", 0, OPTION_FLAG, &o->json, NULL, "print the result as JSON"},
        {"details", 0, OPTION_FLAG, &o->details, NULL,
         "as JSON, with the log-likelihood of every ending"},
        {"quiet", 'q', OPTION_FLAG, &o->quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "eval hellaswag DATA [MODEL] [options]",
        .summary = "Lets a model choose between endings of a context, by likelihood.",
        .details =
            "DATA is hellaswag_val.jsonl as published, or any JSON lines with \"ctx\",\n"
            "\"endings\" (2 to 26) and \"label\" (the right one, from 0). acc_norm divides an\n"
            "ending's log-likelihood by its length in characters, as lm-evaluation-harness does.",
        .example = "hepta eval hellaswag hellaswag_val.jsonl model.hepta --limit 1000",
        .options = specs,
        .min_arguments = 1,
        .max_arguments = 2,
    };
    int code = evaluator_parse(&spec, argc, argv, &o->data, &o->model);
    if (code >= 0) {
        return code;
    }
    h.details = o->details ? json_array() : NULL;
    code = run(&h);
    json_decref(h.details);
    evaluator_close(&h.e);
    for (size_t i = 0; i < h.n_items; i++) {
        free_item(&h.items[i]);
    }
    free(h.items);
    return code;
}
