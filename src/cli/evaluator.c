/*
 * evaluator.c - multiple choice by likelihood.
 */
#include "cli/evaluator.h"

#include "cli/score.h"

#include "base/base.h"

#include <stdlib.h>
#include <string.h>

enum { BATCH = 64 }; /* rows of logits held */

int evaluator_parse(const command_spec *spec, int argc, char **argv, const char **data,
                    evaluator_options *model) {
    const char *arguments[2] = {NULL, NULL};
    int code = options_parse(spec, argc, argv, arguments);
    if (code < 0) {
        *data = arguments[0];
        model->model = model_or_default(arguments[1]);
        interrupt_catch();
    }
    return code;
}

hepta_status evaluator_open(evaluator *e, const evaluator_options *o, hepta_error *err) {
    hepta_session_options session = {.n_ctx = o->ctx, .threads = o->threads};
    hepta_model_info info;
    size_t n_bos = 0;
    int32_t bos;
    hepta_status status = hepta_model_open(o->model, &e->model, err);
    if (status == HEPTA_OK) {
        status = use_device(e->model, &o->device, err);
    }
    if (status == HEPTA_OK) {
        status = hepta_tokenizer_open(o->model, o->tokenizer, &e->tokenizer, err);
    }
    if (status == HEPTA_OK) {
        status = hepta_session_create(e->model, &session, &e->session, err);
    }
    if (status == HEPTA_OK) {
        status =
            hepta_tokenizer_encode(e->tokenizer, "", 0, HEPTA_ENCODE_BOS, &bos, 1, &n_bos, err);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    hepta_model_get_info(e->model, &info);
    if (hepta_tokenizer_size(e->tokenizer) > info.n_vocab) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "the tokenizer has %u tokens, the model %u: they do not belong together",
                         hepta_tokenizer_size(e->tokenizer), info.n_vocab);
    }
    e->has_bos = n_bos > 0;
    e->n_vocab = info.n_vocab;
    e->n_ctx = hepta_session_context(e->session);
    e->logits = malloc((size_t)BATCH * e->n_vocab * sizeof *e->logits);
    e->next = malloc(e->n_vocab * sizeof *e->next);
    e->held = malloc(e->n_ctx * sizeof *e->held);
    if (e->logits == NULL || e->next == NULL || e->held == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for logits");
    }
    return HEPTA_OK;
}

void evaluator_close(evaluator *e) {
    hepta_session_free(e->session);
    hepta_tokenizer_free(e->tokenizer);
    hepta_model_close(e->model);
    free(e->logits);
    free(e->next);
    free(e->held);
}

/* The tokens that context + continuation has beyond the context's. */
static hepta_status encode_continuation(const evaluator *e, const char *context,
                                        const char *continuation, size_t n_context,
                                        struct continuation *out, hepta_error *err) {
    size_t a = strlen(context), b = strlen(continuation), n = 0;
    char *text = malloc(a + b + 1);
    int32_t *tokens = NULL;
    if (text == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu bytes", a + b);
    }
    memcpy(text, context, a);
    memcpy(text + a, continuation, b);
    hepta_status status =
        encode_text(e->tokenizer, text, a + b, HEPTA_ENCODE_BOS, &tokens, &n, err);
    free(text);
    if (status != HEPTA_OK) {
        return status;
    }
    if (n <= n_context) {
        free(tokens);
        return error_set(err, HEPTA_ERROR_ARGUMENT, "the choice \"%.60s\" adds no token",
                         continuation);
    }
    out->n = n - n_context;
    memmove(tokens, tokens + n_context, out->n * sizeof *tokens);
    out->tokens = tokens;
    return HEPTA_OK;
}

hepta_status question_encode(const evaluator *e, const char *context,
                             const char *const *continuations, size_t n, question *q,
                             hepta_error *err) {
    *q = (question){.choices = calloc(n + 1, sizeof *q->choices), .n_choices = n};
    if (q->choices == NULL) {
        q->n_choices = 0;
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for %zu choices", n);
    }
    hepta_status status = encode_text(e->tokenizer, context, strlen(context), HEPTA_ENCODE_BOS,
                                      &q->context, &q->n_context, err);
    if (status == HEPTA_OK && q->n_context == 0) {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "an empty context, and this model has no BOS token to start from");
    }
    for (size_t i = 0; i < n && status == HEPTA_OK; i++) {
        status =
            encode_continuation(e, context, continuations[i], q->n_context, &q->choices[i], err);
    }
    return status;
}

void question_free(question *q) {
    for (size_t i = 0; i < q->n_choices; i++) {
        free(q->choices[i].tokens);
    }
    free(q->choices);
    free(q->context);
    *q = (question){0};
}

size_t question_length(const question *q) {
    size_t longest = 1;
    for (size_t i = 0; i < q->n_choices; i++) {
        longest = q->choices[i].n > longest ? q->choices[i].n : longest;
    }
    return q->n_context + longest - 1; /* nothing follows the last token */
}

bool question_crop(const evaluator *e, question *q) {
    size_t length = question_length(q), first = e->has_bos ? 1 : 0;
    if (length <= e->n_ctx) {
        return true;
    }
    size_t drop = length - e->n_ctx;
    if (drop + first >= q->n_context) { /* a token of the context must stay, beside BOS */
        return false;
    }
    q->n_context -= drop;
    memmove(q->context + first, q->context + first + drop,
            (q->n_context - first) * sizeof *q->context);
    return true;
}

/* Brings the session to hold the context, and its last logits to e->next. */
static hepta_status eval_context(evaluator *e, const question *q, hepta_error *err) {
    size_t k = 0;
    while (k < e->n_held && k + 1 < q->n_context && e->held[k] == q->context[k]) {
        k++;
    }
    hepta_session_truncate(e->session, 0, (uint32_t)k);
    e->n_held = 0; /* unless all goes well */
    hepta_status status =
        hepta_session_eval(e->session, q->context + k, q->n_context - k, e->next, false, err);
    if (status == HEPTA_OK) {
        memcpy(e->held, q->context, q->n_context * sizeof *e->held);
        e->n_held = q->n_context;
        e->n_tokens += q->n_context - k;
        e->n_reused += k;
    }
    return status;
}

hepta_status evaluator_score(evaluator *e, const question *q, double *log_p, hepta_error *err) {
    hepta_status status = eval_context(e, q, err);
    if (status != HEPTA_OK) {
        return status;
    }
    double next_lse = log_sum_exp(e->next, e->n_vocab);
    for (size_t i = 0; i < q->n_choices; i++) {
        const struct continuation *c = &q->choices[i];
        log_p[i] = (double)e->next[c->tokens[0]] - next_lse;
        for (size_t at = 0; at + 1 < c->n;) {
            size_t k = c->n - 1 - at < BATCH ? c->n - 1 - at : BATCH;
            status = hepta_session_eval(e->session, c->tokens + at, k, e->logits, true, err);
            if (status != HEPTA_OK) {
                return status;
            }
            for (size_t j = 0; j < k; j++) {
                const float *row = e->logits + j * e->n_vocab;
                log_p[i] += (double)row[c->tokens[at + j + 1]] - log_sum_exp(row, e->n_vocab);
            }
            at += k;
            e->n_tokens += k;
        }
        hepta_session_truncate(e->session, 0, (uint32_t)q->n_context);
    }
    return HEPTA_OK;
}

void append_details(json_t *details, const char *name, size_t label, const double *log_p,
                    size_t n) {
    if (details == NULL) {
        return;
    }
    json_t *values = json_array();
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(values, json_real(log_p[i]));
    }
    json_array_append_new(details, json_pack("{s:o, s:i, s:o}", "name", json_name(name), "label",
                                             (int)label, "log_p", values));
}

size_t first_largest(const double *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++) {
        best = x[i] > x[best] ? i : best;
    }
    return best;
}
