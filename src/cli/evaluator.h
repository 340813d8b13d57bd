/*
 * evaluator.h - multiple choice by likelihood: which of several continuations of a text a model
 * finds most likely.
 *
 * A continuation's tokens are those that the text with it has beyond those of the text alone, as in
 * EleutherAI's lm-evaluation-harness. Tokens that a question shares with the one before it are not
 * evaluated again, nor is the context for each of its continuations.
 */
#ifndef CLI_EVALUATOR_H
#define CLI_EVALUATOR_H

#include "cli/cli.h"

#include <jansson.h>

typedef struct evaluator {
    hepta_model *model;
    hepta_tokenizer *tokenizer;
    hepta_session *session;
    uint32_t n_vocab, n_ctx;
    bool has_bos;  /* texts begin with BOS */
    float *logits; /* rows of n_vocab */
    float *next;   /* (n_vocab) logits after the context */
    int32_t *held; /* (n_held) tokens in the session */
    size_t n_held;
    uint64_t n_tokens, n_reused; /* evaluated, and spared */
} evaluator;

/* What is common to commands that use one. */
typedef struct evaluator_options {
    const char *model, *tokenizer; /* tokenizer may be NULL */
    uint32_t ctx;                  /* 0: the training context */
    int threads;
    device_choice device;
} evaluator_options;

/* Parses the arguments DATA [MODEL] and the options: the exit code, or below 0 to go on, catching
 * interrupts from then on. */
int evaluator_parse(const command_spec *spec, int argc, char **argv, const char **data,
                    evaluator_options *model);

/* `e` is to be closed in any case. */
hepta_status evaluator_open(evaluator *e, const evaluator_options *o, hepta_error *err);
void evaluator_close(evaluator *e);

/* A context and its continuations as tokens. */
typedef struct question {
    int32_t *context; /* (n_context) begins with BOS where the model expects it */
    size_t n_context;
    struct continuation {
        int32_t *tokens;
        size_t n;
    } * choices; /* (n_choices) */
    size_t n_choices;
} question;

/* Fails if a continuation adds no token. `q` is to be freed in any case. */
hepta_status question_encode(const evaluator *e, const char *context,
                             const char *const *continuations, size_t n, question *q,
                             hepta_error *err);
void question_free(question *q);

/* Positions that scoring takes: compare with e->n_ctx. */
size_t question_length(const question *q);

/* Drops the oldest tokens of the context (not BOS) so that it fits; false: it cannot. */
bool question_crop(const evaluator *e, question *q);

/* log_p[i] = sum of ln p of the tokens of continuation i. The question must fit. */
hepta_status evaluator_score(evaluator *e, const question *q, double *log_p, hepta_error *err);

/* For --details: appends {"name", "label", "log_p": [...]} to `details`, which may be NULL. */
void append_details(json_t *details, const char *name, size_t label, const double *log_p, size_t n);

/* The first of the n largest values. */
size_t first_largest(const double *x, size_t n);

#endif
