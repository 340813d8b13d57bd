/*
 * eval_humaneval.c - hepta eval humaneval: completions of HumanEval's Python functions (Chen et al.
 * 2021, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374).
 *
 * Writes one line {"task_id", "completion"} for each sample, which evaluate_functional_correctness
 * of github.com/openai/human-eval scores. Nothing is executed here. A completion ends before the
 * first of the paper's stop sequences, at the model's end of text, or with the context.
 */
#include "cli/cli.h"
#include "cli/evaluator.h"

#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct settings {
    const char *data, *out;
    evaluator_options model;
    uint32_t limit, n_predict, samples;
    hepta_sampler_options sampler;
    bool prompts, quiet;
} settings;

typedef struct task {
    char *id, *prompt;
} task;

typedef struct humaneval {
    settings o;
    evaluator e;
    task *tasks;
    size_t n_tasks, n_done, n_cut; /* samples written; those that the limits ended */
    file_writer *out;              /* NULL: standard output */
} humaneval;

static hepta_status add_task(void *context, json_t *line, size_t number, hepta_error *err) {
    humaneval *h = context;
    const char *id = json_string_value(json_object_get(line, "task_id"));
    const char *prompt = json_string_value(json_object_get(line, "prompt"));
    if (id == NULL || prompt == NULL) {
        return error_set(err, HEPTA_ERROR_FORMAT,
                         "%s, line %zu: expected \"task_id\" and \"prompt\"", h->o.data, number);
    }
    task *tasks = realloc(h->tasks, (h->n_tasks + 1) * sizeof *tasks);
    h->tasks = tasks != NULL ? tasks : h->tasks;
    task t = {strdup(id), strdup(prompt)};
    if (tasks == NULL || t.id == NULL || t.prompt == NULL) {
        free(t.id);
        free(t.prompt);
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu tasks", h->n_tasks);
    }
    tasks[h->n_tasks++] = t;
    return HEPTA_OK;
}

/* Writes {"task_id": id, KEY: text} as a line. */
static hepta_status write_line(humaneval *h, const char *id, const char *key, const char *text,
                               size_t n, hepta_error *err) {
    json_t *object = json_pack("{s:s, s:o}", "task_id", id, key, json_text(text, n));
    char *line = object != NULL ? json_dumps(object, JSON_COMPACT | JSON_ENSURE_ASCII) : NULL;
    json_decref(object);
    if (line == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a line");
    }
    hepta_status status = HEPTA_OK;
    if (h->out == NULL) {
        puts(line);
    } else {
        size_t length = strlen(line);
        line[length] = '\n'; /* over the NUL */
        status = file_writer_write(h->out, line, length + 1, err);
    }
    free(line);
    return status;
}

/* The text that is written token by token. */
typedef struct completion {
    char *text;
    size_t n, room;
} completion;

/* Where the first stop sequence begins, or c->n. */
static size_t find_stop(const completion *c) {
    static const char *const stops[] = {"\nclass", "\ndef", "\n#", "\nif", "\nprint"};
    size_t first = c->n;
    for (size_t i = 0; i < sizeof stops / sizeof stops[0]; i++) {
        const char *at = memmem(c->text, c->n, stops[i], strlen(stops[i]));
        if (at != NULL && (size_t)(at - c->text) < first) {
            first = (size_t)(at - c->text);
        }
    }
    return first;
}

static hepta_status append(const humaneval *h, completion *c, int32_t token, hepta_error *err) {
    size_t n = hepta_tokenizer_decode(h->e.tokenizer, token, false, false, NULL, 0);
    if (c->n + n > c->room) {
        size_t room = 2 * (c->n + n) + 1024;
        char *bigger = realloc(c->text, room);
        if (bigger == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a completion");
        }
        c->text = bigger;
        c->room = room;
    }
    c->n += hepta_tokenizer_decode(h->e.tokenizer, token, false, false, c->text + c->n, n);
    return HEPTA_OK;
}

/* Writes on after e.next, the logits of the prompt; c is the text up to the stop. */
static hepta_status complete(humaneval *h, hepta_sampler *sampler, completion *c,
                             hepta_error *err) {
    const evaluator *e = &h->e;
    memcpy(e->logits, e->next, e->n_vocab * sizeof *e->logits);
    for (uint32_t i = 0; i < h->o.n_predict && !interrupted(); i++) {
        int32_t token = hepta_sampler_draw(sampler, e->logits);
        if (hepta_tokenizer_is_end(e->tokenizer, token)) {
            return HEPTA_OK;
        }
        hepta_status status = append(h, c, token, err);
        size_t stop = status == HEPTA_OK ? find_stop(c) : c->n;
        if (stop < c->n) {
            c->n = stop;
            return HEPTA_OK;
        }
        if (hepta_session_position(e->session, 0) == e->n_ctx) {
            break;
        }
        if (status == HEPTA_OK) {
            status = hepta_session_eval(e->session, &token, 1, e->logits, false, err);
        }
        if (status != HEPTA_OK) {
            return status;
        }
    }
    h->n_cut++;
    return HEPTA_OK;
}

/* All samples of a task. */
static hepta_status answer(humaneval *h, const task *t, size_t index, progress *p,
                           hepta_error *err) {
    question q;
    hepta_status status = question_encode(&h->e, t->prompt, NULL, 0, &q, err);
    if (status == HEPTA_OK && q.n_context >= h->e.n_ctx) {
        status = error_set(err, HEPTA_ERROR_CONTEXT,
                           "%s: the prompt has %zu tokens, the context holds %u; give a larger "
                           "--ctx",
                           t->id, q.n_context, h->e.n_ctx);
    }
    if (status == HEPTA_OK) {
        status = evaluator_score(&h->e, &q, NULL, err);
    }
    for (uint32_t i = 0; i < h->o.samples && status == HEPTA_OK; i++) {
        hepta_sampler *sampler = NULL;
        hepta_sampler_options options = h->o.sampler;
        options.seed += (uint64_t)index * h->o.samples + i;
        completion c = {0};
        hepta_session_truncate(h->e.session, 0, (uint32_t)q.n_context);
        status = hepta_sampler_create(&options, h->e.n_vocab, &sampler, err);
        if (status == HEPTA_OK) {
            status = complete(h, sampler, &c, err);
        }
        if (status == HEPTA_OK && !interrupted()) {
            status = write_line(h, t->id, "completion", c.text, c.n, err);
            h->n_done += status == HEPTA_OK;
        }
        free(c.text);
        hepta_sampler_free(sampler);
        if (!progress_update(p, t->id, h->n_done, (uint64_t)h->n_tasks * h->o.samples)) {
            break;
        }
    }
    question_free(&q);
    return status;
}

static hepta_status answer_all(humaneval *h, hepta_error *err) {
    hepta_status status = evaluator_open(&h->e, &h->o.model, err);
    progress p;
    progress_start(&p, "humaneval", "samples");
    p.quiet = h->o.quiet;
    for (size_t i = 0; i < h->n_tasks && status == HEPTA_OK && !interrupted(); i++) {
        status = answer(h, &h->tasks[i], i, &p, err);
    }
    progress_finish(&p);
    return status;
}

static hepta_status export_prompts(humaneval *h, hepta_error *err) {
    hepta_status status = HEPTA_OK;
    for (size_t i = 0; i < h->n_tasks && status == HEPTA_OK; i++) {
        const task *t = &h->tasks[i];
        status = write_line(h, t->id, "prompt", t->prompt, strlen(t->prompt), err);
    }
    return status;
}

static int run(humaneval *h) {
    hepta_error err = {0};
    hepta_status status = read_json_lines(h->o.data, h->o.limit, add_task, h, &err);
    if (status == HEPTA_OK && h->o.out != NULL) {
        status = file_writer_open(h->o.out, &h->out, &err);
    }
    if (status == HEPTA_OK) {
        status = h->o.prompts ? export_prompts(h, &err) : answer_all(h, &err);
    }
    if (status == HEPTA_OK && h->out != NULL) { /* what is done stays, also after Ctrl-C */
        file_writer *out = h->out;
        h->out = NULL;
        status = file_writer_commit(out, &err);
    }
    if (status != HEPTA_OK) {
        return report(&err);
    }
    if (h->o.prompts) {
        return EXIT_OK;
    }
    size_t asked = h->n_tasks * h->o.samples;
    if (h->n_done < asked) {
        report_text("interrupted: %zu of %zu samples were written", h->n_done, asked);
        return EXIT_INTERRUPTED;
    }
    if (!h->o.quiet) {
        fprintf(stderr,
                "hepta: %zu samples, %zu of them cut at %u tokens or the end of the context; score "
                "them with: evaluate_functional_correctness %s\n",
                h->n_done, h->n_cut, h->o.n_predict, h->o.out != NULL ? h->o.out : "FILE");
    }
    return EXIT_OK;
}

int cli_eval_humaneval(int argc, char **argv) {
    humaneval h = {.o = {.n_predict = 512, .samples = 1, .sampler = {.top_p = 0.95f}}};
    settings *o = &h.o;
    const option_spec specs[] = {
        {"output", 'o', OPTION_STRING, &o->out, "FILE",
         "the JSON lines to write (default: standard output)"},
        {"predict", 'n', OPTION_U32, &o->n_predict, "N", "tokens to write at most (default 512)"},
        {"temp", 0, OPTION_F32, &o->sampler.temperature, "T",
         "temperature (default 0: greedy; the paper: 0.2 for one sample, 0.8 for 100)"},
        {"top-p", 0, OPTION_F32, &o->sampler.top_p, "P",
         "keep this much probability (default 0.95, as the paper)"},
        {"samples", 0, OPTION_U32, &o->samples, "N", "samples of each task (default 1)"},
        {"seed", 0, OPTION_U64, &o->sampler.seed, "N",
         "random seed of the first sample, each one's is one more (default 0)"},
        {"limit", 0, OPTION_U32, &o->limit, "N", "the first N tasks only"},
        {"prompts", 0, OPTION_FLAG, &o->prompts, NULL,
         "write the prompts instead, for another program to complete"},
        {"ctx", 'c', OPTION_U32, &o->model.ctx, "N",
         "context length (default: the training context)"},
        {"tokenizer", 0, OPTION_STRING, &o->model.tokenizer, "FILE",
         "tokenizer, where the model comes without one"},
        {"threads", 't', OPTION_INT, &o->model.threads, "N", "threads (default: physical cores)"},
        DEVICE_OPTIONS(o->model.device),
        {"quiet", 'q', OPTION_FLAG, &o->quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "eval humaneval DATA [MODEL] [options]",
        .summary =
            "Completes the functions of HumanEval; the published scorer runs and judges them.",
        .details =
            "DATA is HumanEval.jsonl (gunzip it first). Each line of the output holds task_id and\n"
            "completion, up to the paper's stop sequences. No code is executed here.",
        .example = "hepta eval humaneval HumanEval.jsonl model.hepta -o samples.jsonl",
        .options = specs,
        .min_arguments = 1,
        .max_arguments = 2,
    };
    int code = evaluator_parse(&spec, argc, argv, &o->data, &o->model);
    if (code >= 0) {
        return code;
    }
    if (o->samples == 0) {
        fprintf(stderr, "hepta: --samples 0: expected 1 or more\n");
        return EXIT_USAGE;
    }
    code = run(&h);
    file_writer_discard(h.out);
    evaluator_close(&h.e);
    for (size_t i = 0; i < h.n_tasks; i++) {
        free(h.tasks[i].id);
        free(h.tasks[i].prompt);
    }
    free(h.tasks);
    return code;
}
