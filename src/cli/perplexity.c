/*
 * perplexity.c - hepta perplexity: how well a model predicts a text.
 *
 * Protocol: the whole text is encoded once, without BOS. Windows of `ctx` positions start every
 * `stride` tokens; where the model expects BOS, each window begins with it (and holds ctx - 1
 * tokens of the text). Every token is scored exactly once, in the first window that holds it, so
 * that all but the first `stride` are predicted from at least ctx - stride - 1 tokens before them.
 * perplexity = exp(mean of -ln p); its error bar is one standard error of that mean.
 * Sums run in token order in binary64.
 */
#include "cli/cli.h"

#include "base/base.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCORE_BATCH = 64 };

typedef struct scorer {
    hepta_session *session;
    uint32_t n_vocab;
    float *logits; /* (SCORE_BATCH, n_vocab) */
    int threads;
    double sum, sum_squares;
    uint64_t n;
} scorer;

/* -ln of the softmax of `logits` at `token`. */
static double negative_log_likelihood(const float *logits, uint32_t n, int32_t token) {
    double max = (double)logits[0];
    for (uint32_t i = 1; i < n; i++) {
        max = (double)logits[i] > max ? (double)logits[i] : max;
    }
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)logits[i] - max);
    }
    return max + log(sum) - (double)logits[token];
}

/*
 * Evaluates the window's n tokens from a fresh start; scores tokens [first, n), each from the
 * logits of the position before it.
 */
static hepta_status score_window(scorer *s, const int32_t *window, size_t n, size_t first,
                                 hepta_error *err) {
    hepta_session_truncate(s->session, 0, 0);
    hepta_status status = HEPTA_OK;
    size_t at = first - 1;
    if (at > 0) {
        status = hepta_session_eval(s->session, window, at, NULL, false, err);
    }
    double nll[SCORE_BATCH];
    while (status == HEPTA_OK && at < n - 1) {
        size_t k = n - 1 - at < SCORE_BATCH ? n - 1 - at : SCORE_BATCH;
        status = hepta_session_eval(s->session, window + at, k, s->logits, true, err);
        if (status != HEPTA_OK) {
            break;
        }
#pragma omp parallel for num_threads(s->threads) schedule(static)
        for (size_t i = 0; i < k; i++) {
            nll[i] =
                negative_log_likelihood(s->logits + i * s->n_vocab, s->n_vocab, window[at + 1 + i]);
        }
        for (size_t i = 0; i < k; i++) {
            s->sum += nll[i];
            s->sum_squares += nll[i] * nll[i];
        }
        s->n += k;
        at += k;
    }
    return status;
}

static double standard_error(const scorer *s) {
    if (s->n < 2) {
        return 0;
    }
    double n = (double)s->n, mean = s->sum / n;
    double variance = (s->sum_squares - n * mean * mean) / (n - 1);
    return sqrt((variance > 0 ? variance : 0) / n);
}

typedef struct settings {
    const char *model, *tokenizer, *text;
    uint32_t ctx, stride, limit;
    int threads;
    bool json, quiet;
} settings;

static hepta_status score_text(scorer *s, const settings *o, const int32_t *tokens, size_t n,
                               int32_t bos, hepta_error *err) {
    size_t n_bos = bos >= 0 ? 1 : 0, room = o->ctx - n_bos;
    int32_t *window = malloc((size_t)o->ctx * sizeof *window);
    if (window == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a window of %u", o->ctx);
    }
    window[0] = bos;
    progress p;
    progress_start(&p, "perplexity", "tokens");
    p.quiet = o->quiet;
    hepta_status status = HEPTA_OK;
    size_t scored = n_bos > 0 ? 0 : 1; /* tokens of the text done with */
    for (size_t start = 0; scored < n && status == HEPTA_OK; start += o->stride) {
        size_t k = n - start < room ? n - start : room;
        memcpy(window + n_bos, tokens + start, k * sizeof *window);
        status = score_window(s, window, k + n_bos, scored - start + n_bos, err);
        scored = start + k;
        char what[64];
        snprintf(what, sizeof what, "perplexity so far %.4f",
                 s->n > 0 ? exp(s->sum / (double)s->n) : 0);
        if (!progress_update(&p, what, scored, n) && status == HEPTA_OK) {
            status = error_set(err, HEPTA_ERROR_INTERRUPTED,
                               "interrupted after %zu of %zu tokens (%s)", scored, n, what);
        }
    }
    progress_finish(&p);
    free(window);
    return status;
}

static int print_result(const scorer *s, const settings *o, size_t n_bytes) {
    double mean = s->sum / (double)s->n, error = standard_error(s);
    double perplexity = exp(mean);
    double bits_per_byte = n_bytes > 0 ? s->sum / log(2.0) / (double)n_bytes : 0;
    if (o->json) {
        return print_json(json_pack("{s:o, s:o, s:I, s:i, s:i, s:f, s:f, s:f, s:f}", "model",
                                    json_name(o->model), "text", json_name(o->text), "tokens",
                                    (json_int_t)s->n, "ctx", (int)o->ctx, "stride", (int)o->stride,
                                    "mean_nll", mean, "perplexity", perplexity, "standard_error",
                                    perplexity * error, "bits_per_byte", bits_per_byte));
    }
    printf("perplexity %.4f +- %.4f (%llu tokens, ctx %u, stride %u, %.4f nats/token, "
           "%.4f bits/byte)\n",
           perplexity, perplexity * error, (unsigned long long)s->n, o->ctx, o->stride, mean,
           bits_per_byte);
    return EXIT_OK;
}

/* Bytes of text that the n tokens stand for, those before `scored` left out. */
static size_t count_bytes(const hepta_tokenizer *t, const int32_t *tokens, size_t scored,
                          size_t n) {
    size_t n_bytes = 0;
    for (size_t i = scored; i < n; i++) {
        n_bytes += hepta_tokenizer_decode(t, tokens[i], i == 0, true, NULL, 0);
    }
    return n_bytes;
}

static int measure(settings *o) {
    hepta_error err = {0};
    hepta_model *model = NULL;
    hepta_tokenizer *tokenizer = NULL;
    char *text = NULL;
    int32_t *tokens = NULL;
    size_t n_text = 0, n_tokens = 0;
    scorer s = {0};
    int code = EXIT_FAILED;
    hepta_model_info info;
    if (hepta_model_open(o->model, &model, &err) != HEPTA_OK ||
        hepta_tokenizer_open(o->model, o->tokenizer, &tokenizer, &err) != HEPTA_OK ||
        read_text(o->text, &text, &n_text, &err) != HEPTA_OK ||
        encode_text(tokenizer, text, n_text, 0, &tokens, &n_tokens, &err) != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    hepta_model_get_info(model, &info);
    if (hepta_tokenizer_size(tokenizer) > info.n_vocab) {
        code = report_text("the tokenizer has %u tokens, the model %u: they do not belong together",
                           hepta_tokenizer_size(tokenizer), info.n_vocab);
        goto done;
    }
    o->ctx = o->ctx == 0 ? info.n_ctx_train : o->ctx;
    o->stride = o->stride == 0 ? (o->ctx + 1) / 2 : o->stride;
    if (o->limit > 0 && n_tokens > o->limit) {
        n_tokens = o->limit;
    }
    int32_t bos = -1;
    size_t n_bos = 0;
    if (hepta_tokenizer_encode(tokenizer, "", 0, HEPTA_ENCODE_BOS, &bos, 1, &n_bos, &err) !=
        HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    if (n_tokens < 2) {
        code = report_text("%s: %zu tokens; perplexity needs two or more", o->text, n_tokens);
        goto done;
    }
    /* the first token of a window is BOS, or comes from the window before: it is not scored */
    if (o->ctx < 3 || o->stride > o->ctx - 1) {
        code = report_text("--ctx %u --stride %u: expected a context of 3 or more and a stride "
                           "below it",
                           o->ctx, o->stride);
        goto done;
    }
    s.n_vocab = info.n_vocab;
    s.threads = o->threads > 0 ? o->threads : threads_default();
    s.logits = malloc((size_t)SCORE_BATCH * info.n_vocab * sizeof(float));
    if (s.logits == NULL) {
        code = report_text("out of memory for logits");
        goto done;
    }
    hepta_session_options session = {.n_ctx = o->ctx, .threads = o->threads};
    if (hepta_session_create(model, &session, &s.session, &err) != HEPTA_OK ||
        score_text(&s, o, tokens, n_tokens, bos, &err) != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    code = print_result(&s, o, count_bytes(tokenizer, tokens, bos >= 0 ? 0 : 1, n_tokens));
done:
    hepta_session_free(s.session);
    free(s.logits);
    free(tokens);
    free(text);
    hepta_tokenizer_free(tokenizer);
    hepta_model_close(model);
    return code;
}

int cli_perplexity(int argc, char **argv) {
    settings o = {0};
    const option_spec specs[] = {
        {"file", 'f', OPTION_STRING, &o.text, "TEXT", "the text to predict, - for stdin (needed)"},
        {"ctx", 'c', OPTION_U32, &o.ctx, "N", "window length (default: the training context)"},
        {"stride", 0, OPTION_U32, &o.stride, "N", "from window to window (default: half of ctx)"},
        {"limit", 0, OPTION_U32, &o.limit, "N", "use the first N tokens only"},
        {"tokenizer", 0, OPTION_STRING, &o.tokenizer, "FILE",
         "tokenizer, where the model comes without one"},
        {"threads", 't', OPTION_INT, &o.threads, "N", "threads (default: physical cores)"},
        {"json", 0, OPTION_FLAG, &o.json, NULL, "print the result as JSON"},
        {"quiet", 'q', OPTION_FLAG, &o.quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "perplexity [MODEL] -f TEXT [options]",
        .summary = "Measures how well a model predicts a text: exp(mean negative log-likelihood).",
        .details =
            "MODEL is any supported input; unquantized ones run in F32. Each token is scored\n"
            "once; windows overlap by ctx - stride tokens. +- is one standard error.",
        .example = "hepta perplexity model.hepta -f wiki.test.raw --ctx 512",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &o.model);
    if (code >= 0) {
        return code;
    }
    if (o.text == NULL) {
        fprintf(stderr, "hepta: name a text with -f FILE (- for standard input)\n");
        return EXIT_USAGE;
    }
    o.model = model_or_default(o.model);
    interrupt_catch();
    return measure(&o);
}
