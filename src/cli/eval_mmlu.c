/*
 * eval_mmlu.c - hepta eval mmlu: questions with four choices (Hendrycks et al. 2021, "Measuring
 * Massive Multitask Language Understanding", arXiv:2009.03300).
 *
 * Prompt and scoring are those of evaluate.py in github.com/hendrycks/test: a line that names the
 * subject, solved examples from the subject's dev file, the question; the answer is the letter
 * whose token " A" .. " D" is most likely after "Answer:", the first one at a tie. A prompt that
 * does not fit the context loses its last example, and again until it fits; if not even the
 * question fits alone, its beginning is dropped. Fields are taken as they are written in the files.
 */
#include "cli/cli.h"
#include "cli/csv.h"
#include "cli/evaluator.h"
#include "cli/score.h"

#include "base/base.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHOICES = 4, FIELDS = CHOICES + 2 }; /* question, choices, letter */

typedef struct settings {
    const char *data;
    evaluator_options model;
    uint32_t shots, limit, show;
    bool json, quiet, details;
} settings;

typedef struct subject {
    char name[256]; /* "abstract_algebra" */
    csv_table dev, test;
    char *dev_text, *test_text;
    size_t n_questions; /* to ask */
    size_t n_done, n_right;
} subject;

typedef struct mmlu {
    settings o;
    evaluator e;
    subject *subjects;
    size_t n_subjects, n_questions;
    size_t n_done, n_fewer, n_cropped; /* asked; with fewer examples; without their beginning */
    json_t *details;                   /* or NULL */
} mmlu;

/* ---- Files ------------------------------------------------------------- */

static hepta_status load_table(const char *path, char **text, csv_table *table, hepta_error *err) {
    size_t n = 0;
    hepta_status status = read_text(path, text, &n, err);
    char *end = status == HEPTA_OK ? realloc(*text, n + 1) : NULL;
    if (status == HEPTA_OK && end == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "%s: out of memory", path);
    }
    if (status == HEPTA_OK) {
        *text = end;
        status = csv_parse(path, *text, n, table, err);
    }
    for (size_t i = 0; status == HEPTA_OK && i < table->n; i++) {
        const csv_row *row = &table->rows[i];
        const char *answer = row->fields[row->n - 1];
        if (row->n != FIELDS || answer[0] < 'A' || answer[0] >= 'A' + CHOICES ||
            answer[1] != '\0') {
            status =
                error_set(err, HEPTA_ERROR_FORMAT,
                          "%s, line %zu: %zu fields, the last one \"%.20s\"; expected question, "
                          "four choices, and A, B, C or D",
                          path, row->line, row->n, answer);
        }
    }
    return status;
}

static bool join(char path[PATH_MAX], const char *folder, const char *name, const char *end) {
    return snprintf(path, PATH_MAX, "%s/%s%s", folder, name, end) < PATH_MAX;
}

/* Examples: `dev`/NAME_dev.csv, or beside the questions. */
static hepta_status load_examples(subject *s, const char *folder, uint32_t shots,
                                  hepta_error *err) {
    char path[PATH_MAX], beside[PATH_MAX], up[PATH_MAX];
    if (shots == 0) {
        return HEPTA_OK;
    }
    bool good = join(up, folder, "../dev", "") && join(path, up, s->name, "_dev.csv") &&
                join(beside, folder, s->name, "_dev.csv");
    if (!good) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "%.100s...: the path is too long", folder);
    }
    hepta_status status = load_table(file_exists(path) ? path : beside, &s->dev_text, &s->dev, err);
    if (status == HEPTA_OK && s->dev.n < shots) {
        status =
            error_set(err, HEPTA_ERROR_ARGUMENT, "%s: %zu examples, %u are asked for (--shots)",
                      file_exists(path) ? path : beside, s->dev.n, shots);
    }
    return status;
}

static const char test_end[] = "_test.csv";

/* The subject of a file's name, FOLDER/NAME_test.csv; false if it is no such name. */
static bool subject_name(const char *file, char *name, size_t room) {
    size_t n = strlen(file), m = sizeof test_end - 1;
    if (n <= m || n - m >= room || strcmp(file + n - m, test_end) != 0) {
        return false;
    }
    memcpy(name, file, n - m);
    name[n - m] = '\0';
    return true;
}

static hepta_status load_subject(mmlu *m, const char *folder, const char *name, hepta_error *err) {
    char path[PATH_MAX];
    subject *s = &m->subjects[m->n_subjects++];
    *s = (subject){0};
    snprintf(s->name, sizeof s->name, "%s", name);
    if (!join(path, folder, name, test_end)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "%.100s...: the path is too long", folder);
    }
    hepta_status status = load_table(path, &s->test_text, &s->test, err);
    if (status == HEPTA_OK) {
        status = load_examples(s, folder, m->o.shots, err);
    }
    s->n_questions = m->o.limit > 0 && m->o.limit < s->test.n ? m->o.limit : s->test.n;
    m->n_questions += s->n_questions;
    return status;
}

static int is_test_file(const struct dirent *entry) {
    char name[256];
    return subject_name(entry->d_name, name, sizeof name);
}

static int compare_names(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

static hepta_status load_folder(mmlu *m, const char *folder, hepta_error *err) {
    struct dirent **entries = NULL;
    int n = scandir(folder, &entries, is_test_file, compare_names);
    if (n < 0) {
        return error_set(err, HEPTA_ERROR_IO, "%s: cannot read: %s", folder, strerror(errno));
    }
    hepta_status status = HEPTA_OK;
    m->subjects = calloc((size_t)n + 1, sizeof *m->subjects);
    if (m->subjects == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %d subjects", n);
    } else if (n == 0) {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "%s: no files NAME_test.csv; expected the folder of MMLU with test/ and "
                           "dev/, or one such file",
                           folder);
    }
    for (int i = 0; i < n; i++) {
        char name[256];
        if (status == HEPTA_OK && subject_name(entries[i]->d_name, name, sizeof name)) {
            status = load_subject(m, folder, name, err);
        }
        free(entries[i]);
    }
    free(entries);
    return status;
}

static hepta_status load_file(mmlu *m, const char *path, hepta_error *err) {
    char folder[PATH_MAX] = ".", name[256];
    const char *slash = strrchr(path, '/');
    if (!subject_name(slash != NULL ? slash + 1 : path, name, sizeof name)) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "%s: expected a folder or a file NAME_test.csv",
                         path);
    }
    if (slash != NULL) {
        snprintf(folder, sizeof folder, "%.*s", (int)(slash - path) + (slash == path), path);
    }
    m->subjects = calloc(1, sizeof *m->subjects);
    if (m->subjects == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a subject");
    }
    return load_subject(m, folder, name, err);
}

static hepta_status load(mmlu *m, hepta_error *err) {
    char test[PATH_MAX];
    if (!file_is_directory(m->o.data)) {
        return load_file(m, m->o.data, err);
    }
    bool inside = join(test, m->o.data, "test", "") && file_is_directory(test);
    return load_folder(m, inside ? test : m->o.data, err);
}

/* ---- Prompts ----------------------------------------------------------- */

static void print_example(FILE *f, const csv_row *row, bool solved) {
    fputs(row->fields[0], f);
    for (int i = 0; i < CHOICES; i++) {
        fprintf(f, "\n%c. %s", 'A' + i, row->fields[1 + i]);
    }
    fputs("\nAnswer:", f);
    if (solved) {
        fprintf(f, " %s\n\n", row->fields[FIELDS - 1]);
    }
}

/* The text before the answer, in memory of its own (free()). */
static char *make_prompt(const subject *s, size_t i, uint32_t shots) {
    char *text = NULL;
    size_t n;
    FILE *f = open_memstream(&text, &n);
    if (f == NULL) {
        return NULL;
    }
    /* every word of the subject follows a space: there are two after "about", as published */
    fputs("The following are multiple choice questions (with answers) about  ", f);
    for (const char *c = s->name; *c != '\0'; c++) {
        fputc(*c == '_' ? ' ' : *c, f);
    }
    fputs(".\n\n", f);
    for (uint32_t k = 0; k < shots; k++) {
        print_example(f, &s->dev.rows[k], true);
    }
    print_example(f, &s->test.rows[i], false);
    if (fclose(f) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* Encodes a question with as many examples as fit. */
static hepta_status prepare(mmlu *m, const subject *s, size_t i, question *q, hepta_error *err) {
    static const char *const letters[CHOICES] = {" A", " B", " C", " D"};
    *q = (question){0};
    for (uint32_t shots = m->o.shots;; shots--) {
        char *prompt = make_prompt(s, i, shots);
        if (prompt == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a prompt");
        }
        question_free(q);
        hepta_status status = question_encode(&m->e, prompt, letters, CHOICES, q, err);
        free(prompt);
        bool fits = status == HEPTA_OK && question_length(q) <= m->e.n_ctx;
        if (status != HEPTA_OK || fits || shots == 0) {
            m->n_fewer += shots < m->o.shots;
            m->n_cropped += status == HEPTA_OK && !fits;
            return status;
        }
    }
}

static hepta_status ask(mmlu *m, subject *s, size_t i, hepta_error *err) {
    question q;
    double log_p[CHOICES];
    hepta_status status = prepare(m, s, i, &q, err);
    if (status == HEPTA_OK && !question_crop(&m->e, &q)) {
        status = error_set(err, HEPTA_ERROR_CONTEXT,
                           "a context of %u is too short for any question", m->e.n_ctx);
    }
    if (status == HEPTA_OK) {
        status = evaluator_score(&m->e, &q, log_p, err);
    }
    if (status == HEPTA_OK) {
        size_t label = (size_t)(s->test.rows[i].fields[FIELDS - 1][0] - 'A');
        append_details(m->details, s->name, label, log_p, CHOICES);
        s->n_right += first_largest(log_p, CHOICES) == label;
        s->n_done++;
        m->n_done++;
    }
    question_free(&q);
    return status;
}

/* All questions; Ctrl-C ends it early, which is no error. */
static hepta_status ask_all(mmlu *m, hepta_error *err) {
    progress p;
    progress_start(&p, "mmlu", "questions");
    p.quiet = m->o.quiet;
    hepta_status status = HEPTA_OK;
    bool go = true;
    for (size_t k = 0; k < m->n_subjects && go; k++) {
        subject *s = &m->subjects[k];
        for (size_t i = 0; i < s->n_questions && go; i++) {
            status = ask(m, s, i, err);
            go = status == HEPTA_OK && progress_update(&p, s->name, m->n_done, m->n_questions);
        }
    }
    progress_finish(&p);
    return status;
}

/* ---- Result ------------------------------------------------------------ */

/* Over all questions, and the mean of the subjects' accuracies, of those that were asked. */
static void average(const mmlu *m, estimate *micro, estimate *macro) {
    size_t right = 0, n = 0;
    double variance = 0, sum = 0;
    for (size_t k = 0; k < m->n_subjects; k++) {
        const subject *s = &m->subjects[k];
        if (s->n_done > 0) {
            estimate e = share_of(s->n_right, s->n_done);
            sum += e.value;
            variance += e.error * e.error;
            right += s->n_right;
            n++;
        }
    }
    *micro = share_of(right, m->n_done);
    *macro = (estimate){n > 0 ? sum / (double)n : 0, n > 0 ? sqrt(variance) / (double)n : 0};
}

static int print_as_json(const mmlu *m, estimate micro, estimate macro) {
    json_t *subjects = json_object();
    for (size_t k = 0; k < m->n_subjects; k++) {
        const subject *s = &m->subjects[k];
        estimate e = share_of(s->n_right, s->n_done);
        json_t *name = json_name(s->name);
        if (s->n_done > 0 && name != NULL) {
            json_object_set_new(subjects, json_string_value(name),
                                json_pack("{s:I, s:f, s:f}", "questions", (json_int_t)s->n_done,
                                          "accuracy", e.value, "standard_error", e.error));
        }
        json_decref(name);
    }
    return print_json(json_pack(
        "{s:s, s:o, s:o, s:i, s:i, s:b, s:I, s:I, s:{s:f, s:f}, s:{s:f, s:f}, s:I, s:I, s:o, s:o*}",
        "task", "mmlu", "model", json_name(m->o.model.model), "data", json_name(m->o.data), "ctx",
        (int)m->e.n_ctx, "shots", (int)m->o.shots, "complete", m->n_done == m->n_questions,
        "questions", (json_int_t)m->n_done, "questions_asked_for", (json_int_t)m->n_questions,
        "micro", "accuracy", micro.value, "standard_error", micro.error, "macro", "accuracy",
        macro.value, "standard_error", macro.error, "fewer_shots", (json_int_t)m->n_fewer,
        "truncated", (json_int_t)m->n_cropped, "subjects", subjects, "details",
        json_incref(m->details)));
}

static int print_result(const mmlu *m) {
    estimate micro, macro;
    average(m, &micro, &macro);
    if (m->o.json || m->o.details) {
        return print_as_json(m, micro, macro);
    }
    for (size_t k = 0; k < m->n_subjects; k++) {
        const subject *s = &m->subjects[k];
        estimate e = share_of(s->n_right, s->n_done);
        if (s->n_done > 0) {
            printf("%-40s %5.1f %% +- %4.1f  (%zu of %zu)\n", s->name, 100 * e.value, 100 * e.error,
                   s->n_right, s->n_done);
        }
    }
    printf("%-40s %5.2f %% +- %.2f  (%zu questions, %u examples each)\n",
           "micro average (questions)", 100 * micro.value, 100 * micro.error, m->n_done,
           m->o.shots);
    printf("%-40s %5.2f %% +- %.2f\n", "macro average (subjects)", 100 * macro.value,
           100 * macro.error);
    if (m->n_fewer > 0) {
        printf("the context of %u tokens held fewer examples for %zu questions; %zu of them lost "
               "their beginning\n",
               m->e.n_ctx, m->n_fewer, m->n_cropped);
    }
    return EXIT_OK;
}

static int show_prompt(const mmlu *m, size_t n) {
    for (size_t k = 0; k < m->n_subjects; k++) {
        const subject *s = &m->subjects[k];
        if (n <= s->n_questions) {
            char *prompt = make_prompt(s, n - 1, m->o.shots);
            if (prompt == NULL) {
                return report_text("out of memory for a prompt");
            }
            fputs(prompt, stdout);
            free(prompt);
            return EXIT_OK;
        }
        n -= s->n_questions;
    }
    return report_text("--show: there are %zu questions", m->n_questions);
}

static int run(mmlu *m) {
    hepta_error err = {0};
    if (load(m, &err) != HEPTA_OK) {
        return report(&err);
    }
    if (m->o.show > 0) {
        return show_prompt(m, m->o.show);
    }
    if (m->n_questions == 0) {
        return report_text("%s: no questions", m->o.data);
    }
    if (evaluator_open(&m->e, &m->o.model, &err) != HEPTA_OK || ask_all(m, &err) != HEPTA_OK) {
        return report(&err);
    }
    int code = print_result(m);
    if (m->n_done < m->n_questions) {
        report_text("interrupted after %zu of %zu questions", m->n_done, m->n_questions);
        return EXIT_INTERRUPTED;
    }
    return code;
}

int cli_eval_mmlu(int argc, char **argv) {
    mmlu m = {.o = {.shots = 5}};
    settings *o = &m.o;
    const option_spec specs[] = {
        {"shots", 0, OPTION_U32, &o->shots, "N", "solved examples before the question (default 5)"},
        {"limit", 0, OPTION_U32, &o->limit, "N", "the first N questions of each subject only"},
        {"show", 0, OPTION_U32, &o->show, "N", "print the prompt of question N and leave"},
        {"ctx", 'c', OPTION_U32, &o->model.ctx, "N",
         "context length (default: the training context)"},
        {"tokenizer", 0, OPTION_STRING, &o->model.tokenizer, "FILE",
         "tokenizer, where the model comes without one"},
        {"threads", 't', OPTION_INT, &o->model.threads, "N", "threads (default: physical cores)"},
        DEVICE_OPTIONS(o->model.device),
        {"json", 0, OPTION_FLAG, &o->json, NULL, "print the result as JSON"},
        {"details", 0, OPTION_FLAG, &o->details, NULL,
         "as JSON, with the log-likelihood of every choice"},
        {"quiet", 'q', OPTION_FLAG, &o->quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "eval mmlu DATA [MODEL] [options]",
        .summary = "Asks the questions of MMLU and prints the share of right answers.",
        .details =
            "DATA is the published folder (test/NAME_test.csv, dev/NAME_dev.csv), a folder of\n"
            "such files, or one NAME_test.csv. Prompts are those of the paper; the answer is\n"
            "the likeliest of the letters A to D. Where a prompt does not fit the context,\n"
            "examples are left out, and the result says how often.",
        .example = "hepta eval mmlu data/ model.hepta --shots 5",
        .options = specs,
        .min_arguments = 1,
        .max_arguments = 2,
    };
    int code = evaluator_parse(&spec, argc, argv, &o->data, &o->model);
    if (code >= 0) {
        return code;
    }
    m.details = o->details ? json_array() : NULL;
    code = run(&m);
    json_decref(m.details);
    evaluator_close(&m.e);
    for (size_t k = 0; k < m.n_subjects; k++) {
        csv_free(&m.subjects[k].dev);
        csv_free(&m.subjects[k].test);
        free(m.subjects[k].dev_text);
        free(m.subjects[k].test_text);
    }
    free(m.subjects);
    return code;
}
