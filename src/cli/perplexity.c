/*
 * perplexity.c - hepta perplexity: how well a model predicts a text, and how far its predictions
 * are from those of another model (--kl-from).
 *
 * Protocol: the whole text is encoded once, without BOS. Windows of `ctx` positions start every
 * `stride` tokens; where the model expects BOS, each window begins with it (and holds ctx - 1
 * tokens of the text). Every token is scored exactly once, in the first window that holds it, so
 * that all but the first `stride` are predicted from at least ctx - stride - 1 tokens before them.
 * perplexity = exp(mean of -ln p); its error bar is one standard error of that mean.
 *
 * The base model of --kl-from sees the same windows; or its logits were saved before (--kl-save),
 * as binary32, exactly as computed. docs/QUALITY.md defines the figures.
 */
#include "cli/cli.h"
#include "cli/score.h"

#include "base/base.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCORE_BATCH = 64 };

typedef struct settings {
    const char *model, *tokenizer, *text, *base, *save;
    uint32_t ctx, stride, limit;
    int threads;
    device_choice device;
    hepta_cache_type cache;
    bool json, quiet;
} settings;

/* What the text gave, token by token (n); the base's figures are NULL without a base. */
typedef struct scores {
    size_t n, room;
    double *nll, *base_nll, *kl; /* nats */
    bool *same_top;
} scores;

typedef struct scorer {
    settings o;
    hepta_model *model, *base;
    hepta_session *session, *base_session;
    file_map saved; /* the base's logits, instead of a base */
    file_writer *save;
    uint32_t n_vocab;
    float *logits, *base_logits; /* (SCORE_BATCH, n_vocab) */
    int32_t *tokens;             /* (n) the text */
    size_t n, n_bytes;
    int32_t bos; /* -1: none */
    scores s;
} scorer;

/* ---- Saved logits ------------------------------------------------------ */

/*
 * A file of logits: this header, then n_vocab binary32 for each scored token, little-endian. The
 * header says what they belong to, so that they are compared with nothing else.
 */
typedef struct saved_header {
    char magic[8];
    uint32_t version, n_vocab, ctx, stride;
    uint64_t n_scored;
    uint8_t tokens_sha256[32]; /* of BOS (-1: none) and the tokens as int32 */
} saved_header;

static const char saved_magic[8] = {'H', 'E', 'P', 'T', 'A', 'L', 'G', 'T'};

static size_t count_scored(const scorer *w) {
    return w->n - (w->bos >= 0 ? 0 : 1);
}

static saved_header make_header(const scorer *w) {
    saved_header h = {.version = 1,
                      .n_vocab = w->n_vocab,
                      .ctx = w->o.ctx,
                      .stride = w->o.stride,
                      .n_scored = count_scored(w)};
    memcpy(h.magic, saved_magic, sizeof h.magic);
    sha256 hash;
    sha256_start(&hash);
    sha256_update(&hash, &w->bos, sizeof w->bos);
    sha256_update(&hash, w->tokens, w->n * sizeof *w->tokens);
    sha256_finish(&hash, h.tokens_sha256);
    return h;
}

/* Maps BASE if it is a file of saved logits; ctx and stride that the user left open are theirs. */
static hepta_status open_saved(scorer *w, hepta_error *err) {
    file_map map;
    saved_header h;
    if (file_map_open(w->o.base, &map, NULL) != HEPTA_OK) {
        return HEPTA_OK; /* no regular file: opening it as a model tells more */
    }
    if (map.size < sizeof h || memcmp(map.data, saved_magic, sizeof saved_magic) != 0) {
        file_map_close(&map);
        return HEPTA_OK;
    }
    w->saved = map;
    memcpy(&h, map.data, sizeof h);
    if (h.version != 1) {
        return error_set(err, HEPTA_ERROR_UNSUPPORTED, "%s: version %u, expected 1", w->o.base,
                         h.version);
    }
    w->o.ctx = w->o.ctx == 0 ? h.ctx : w->o.ctx;
    w->o.stride = w->o.stride == 0 ? h.stride : w->o.stride;
    return HEPTA_OK;
}

/* The saved logits must be of these very tokens in these windows. */
static hepta_status check_saved(const scorer *w, hepta_error *err) {
    const char *path = w->o.base;
    saved_header h, expected = make_header(w);
    memcpy(&h, w->saved.data, sizeof h);
    if (h.n_vocab != w->n_vocab || h.ctx != w->o.ctx || h.stride != w->o.stride ||
        h.n_scored != expected.n_scored) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%s holds logits of %llu tokens (vocabulary %u, ctx %u, stride %u); asked "
                         "for are %zu tokens (vocabulary %u, ctx %u, stride %u)",
                         path, (unsigned long long)h.n_scored, h.n_vocab, h.ctx, h.stride,
                         count_scored(w), w->n_vocab, w->o.ctx, w->o.stride);
    }
    if (memcmp(h.tokens_sha256, expected.tokens_sha256, sizeof h.tokens_sha256) != 0) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%s holds logits of another text, or of another tokenizer's tokens", path);
    }
    uint64_t bytes;
    if (mul_overflows(h.n_scored, (uint64_t)h.n_vocab * sizeof(float), &bytes) ||
        add_overflows(bytes, sizeof h, &bytes) || bytes != w->saved.size) {
        return error_set(err, HEPTA_ERROR_FORMAT, "%s: %zu bytes do not hold %llu x %u logits",
                         path, w->saved.size, (unsigned long long)h.n_scored, h.n_vocab);
    }
    return HEPTA_OK;
}

/* ---- Scoring ----------------------------------------------------------- */

/* Scores token `token` from the logits before it as entry i. */
static void score_token(scorer *w, size_t i, int32_t token, const float *logits,
                        const float *base) {
    const uint32_t n = w->n_vocab;
    double lse = log_sum_exp(logits, n);
    w->s.nll[i] = lse - (double)logits[token];
    if (base != NULL) {
        double base_lse = log_sum_exp(base, n);
        w->s.base_nll[i] = base_lse - (double)base[token];
        w->s.kl[i] = kl_divergence(base, logits, n, base_lse, lse);
        w->s.same_top[i] = top_token(base, n) == top_token(logits, n);
    }
}

static bool is_finite(const scores *s, size_t i) {
    return isfinite(s->nll[i]) &&
           (s->kl == NULL || (isfinite(s->kl[i]) && isfinite(s->base_nll[i])));
}

/* Logits of k positions from `at` on: the model's, and the base's if there is one. */
static hepta_status eval_both(scorer *w, const int32_t *tokens, size_t k, const float **base,
                              hepta_error *err) {
    hepta_status status = hepta_session_eval(w->session, tokens, k, w->logits, true, err);
    *base = NULL;
    if (status == HEPTA_OK && w->base_session != NULL) {
        status = hepta_session_eval(w->base_session, tokens, k, w->base_logits, true, err);
        *base = w->base_logits;
    } else if (w->saved.data != NULL) {
        *base = (const float *)(const void *)(w->saved.data + sizeof(saved_header)) +
                w->s.n * w->n_vocab;
    }
    if (status == HEPTA_OK && w->save != NULL) {
        status = file_writer_write(w->save, w->logits, k * w->n_vocab * sizeof *w->logits, err);
    }
    return status;
}

/*
 * Evaluates the window's n tokens from a fresh start; scores tokens [first, n), each from the
 * logits of the position before it.
 */
static hepta_status score_window(scorer *w, const int32_t *window, size_t n, size_t first,
                                 hepta_error *err) {
    hepta_status status = HEPTA_OK;
    hepta_session *const sessions[] = {w->session, w->base_session};
    size_t at = first - 1;
    for (size_t i = 0; i < 2 && sessions[i] != NULL; i++) {
        hepta_session_truncate(sessions[i], 0, 0);
        if (at > 0 && status == HEPTA_OK) {
            status = hepta_session_eval(sessions[i], window, at, NULL, false, err);
        }
    }
    while (status == HEPTA_OK && at < n - 1) {
        size_t k = n - 1 - at < SCORE_BATCH ? n - 1 - at : SCORE_BATCH;
        const float *base;
        status = eval_both(w, window + at, k, &base, err);
        if (status != HEPTA_OK) {
            break;
        }
#pragma omp parallel for num_threads(w->o.threads) schedule(static)
        for (size_t i = 0; i < k; i++) {
            score_token(w, w->s.n + i, window[at + 1 + i], w->logits + i * w->n_vocab,
                        base != NULL ? base + i * w->n_vocab : NULL);
        }
        for (size_t i = 0; i < k; i++) {
            if (!is_finite(&w->s, w->s.n + i)) {
                return error_set(err, HEPTA_ERROR_FORMAT,
                                 "the logits of token %zu are not finite: a damaged model?",
                                 w->s.n + i);
            }
        }
        w->s.n += k;
        at += k;
    }
    return status;
}

static hepta_status score_text(scorer *w, hepta_error *err) {
    const settings *o = &w->o;
    size_t n_bos = w->bos >= 0 ? 1 : 0, room = o->ctx - n_bos, n = w->n;
    int32_t *window = malloc((size_t)o->ctx * sizeof *window);
    if (window == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for a window of %u", o->ctx);
    }
    window[0] = w->bos;
    progress p;
    progress_start(&p, "perplexity", "tokens");
    p.quiet = o->quiet;
    hepta_status status = HEPTA_OK;
    size_t scored = n_bos > 0 ? 0 : 1; /* tokens of the text done with */
    double sum = 0;
    for (size_t start = 0; scored < n && status == HEPTA_OK; start += o->stride) {
        size_t k = n - start < room ? n - start : room, before = w->s.n;
        memcpy(window + n_bos, w->tokens + start, k * sizeof *window);
        status = score_window(w, window, k + n_bos, scored - start + n_bos, err);
        scored = start + k;
        for (size_t i = before; i < w->s.n; i++) {
            sum += w->s.nll[i];
        }
        char what[64];
        snprintf(what, sizeof what, "perplexity so far %.4f",
                 w->s.n > 0 ? exp(sum / (double)w->s.n) : 0);
        if (!progress_update(&p, what, scored, n) && status == HEPTA_OK) {
            status = error_set(err, HEPTA_ERROR_INTERRUPTED,
                               "interrupted after %zu of %zu tokens (%s)", scored, n, what);
        }
    }
    progress_finish(&p);
    free(window);
    return status;
}

/* ---- Result ------------------------------------------------------------ */

/* exp of a mean logarithm, with the error carried over to first order. */
static estimate exponential(estimate mean) {
    return (estimate){exp(mean.value), exp(mean.value) * mean.error};
}

typedef struct comparison {
    estimate base_nll, ratio; /* ratio: perplexity / the base's */
    estimate kl;
    double kl_median, kl_90, kl_95, kl_99, kl_999, kl_max;
    estimate same_top;
    estimate mean_change, rms_change; /* of the true token's probability */
} comparison;

/* Compares with the base; the arrays of `s` are used up. */
static comparison compare_scores(scores *s) {
    comparison c = {.base_nll = mean_of(s->base_nll, s->n), .kl = mean_of(s->kl, s->n)};
    size_t same = 0;
    for (size_t i = 0; i < s->n; i++) {
        same += s->same_top[i];
        double change = exp(-s->nll[i]) - exp(-s->base_nll[i]);
        s->base_nll[i] = s->nll[i] - s->base_nll[i];
        s->nll[i] = change;
    }
    c.same_top = share_of(same, s->n);
    c.ratio = exponential(mean_of(s->base_nll, s->n)); /* of differences: tokens are pairs */
    c.mean_change = mean_of(s->nll, s->n);
    for (size_t i = 0; i < s->n; i++) {
        s->nll[i] *= s->nll[i];
    }
    estimate squares = mean_of(s->nll, s->n);
    double rms = sqrt(squares.value);
    c.rms_change = (estimate){rms, rms > 0 ? squares.error / (2 * rms) : 0};
    sort_ascending(s->kl, s->n);
    c.kl_median = percentile(s->kl, s->n, 0.5);
    c.kl_90 = percentile(s->kl, s->n, 0.9);
    c.kl_95 = percentile(s->kl, s->n, 0.95);
    c.kl_99 = percentile(s->kl, s->n, 0.99);
    c.kl_999 = percentile(s->kl, s->n, 0.999);
    c.kl_max = s->kl[s->n - 1];
    return c;
}

static json_t *json_estimate(const char *name, estimate e) {
    return json_pack("{s:f, s:f}", name, e.value, "standard_error", e.error);
}

static json_t *json_comparison(const settings *o, const comparison *c) {
    estimate base = exponential(c->base_nll);
    return json_pack(
        "{s:{s:o, s:f, s:f, s:f}, s:o, s:{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}, s:o, s:o, s:o}",
        "base", "model", json_name(o->base), "mean_nll", c->base_nll.value, "perplexity",
        base.value, "standard_error", base.error, "perplexity_ratio",
        json_estimate("value", c->ratio), "kl", "mean", c->kl.value, "standard_error", c->kl.error,
        "median", c->kl_median, "p90", c->kl_90, "p95", c->kl_95, "p99", c->kl_99, "p99.9",
        c->kl_999, "max", c->kl_max, "same_top", json_estimate("share", c->same_top),
        "probability_rms_change", json_estimate("value", c->rms_change), "probability_mean_change",
        json_estimate("value", c->mean_change));
}

static void print_comparison(const settings *o, const comparison *c) {
    estimate base = exponential(c->base_nll);
    printf("base %.4f +- %.4f (%s), ratio %.5f +- %.5f\n", base.value, base.error, o->base,
           c->ratio.value, c->ratio.error);
    printf("KL divergence %.6f +- %.6f nats; median %.6f, 90 %% %.6f, 95 %% %.6f, 99 %% %.6f, "
           "99.9 %% %.6f, max %.6f\n",
           c->kl.value, c->kl.error, c->kl_median, c->kl_90, c->kl_95, c->kl_99, c->kl_999,
           c->kl_max);
    printf("same top token %.3f +- %.3f %%\n", 100 * c->same_top.value, 100 * c->same_top.error);
    printf("probability of the true token: RMS change %.3f +- %.3f %%, mean change "
           "%+.3f +- %.3f %%\n",
           100 * c->rms_change.value, 100 * c->rms_change.error, 100 * c->mean_change.value,
           100 * c->mean_change.error);
}

static int print_result(scorer *w) {
    const settings *o = &w->o;
    estimate mean = mean_of(w->s.nll, w->s.n), perplexity = exponential(mean);
    double bits = mean.value * (double)w->s.n / log(2.0);
    double bits_per_byte = w->n_bytes > 0 ? bits / (double)w->n_bytes : 0;
    bool compare = w->s.kl != NULL;
    comparison c = {0};
    if (compare) {
        c = compare_scores(&w->s);
    }
    if (o->json) {
        json_t *result = json_pack(
            "{s:o, s:o, s:I, s:i, s:i, s:f, s:f, s:f, s:f}", "model", json_name(o->model), "text",
            json_name(o->text), "tokens", (json_int_t)w->s.n, "ctx", (int)o->ctx, "stride",
            (int)o->stride, "mean_nll", mean.value, "perplexity", perplexity.value,
            "standard_error", perplexity.error, "bits_per_byte", bits_per_byte);
        if (compare && json_object_update_new(result, json_comparison(o, &c)) != 0) {
            json_decref(result);
            result = NULL;
        }
        return print_json(result);
    }
    printf("perplexity %.4f +- %.4f (%zu tokens, ctx %u, stride %u, %.4f nats/token, "
           "%.4f bits/byte)\n",
           perplexity.value, perplexity.error, w->s.n, o->ctx, o->stride, mean.value,
           bits_per_byte);
    if (compare) {
        print_comparison(o, &c);
    }
    return EXIT_OK;
}

/* ---- Setting up -------------------------------------------------------- */

/* Bytes of text that the n tokens stand for, those before `scored` left out. */
static size_t count_bytes(const hepta_tokenizer *t, const int32_t *tokens, size_t scored,
                          size_t n) {
    size_t n_bytes = 0;
    for (size_t i = scored; i < n; i++) {
        n_bytes += hepta_tokenizer_decode(t, tokens[i], i == 0, true, NULL, 0);
    }
    return n_bytes;
}

static hepta_status encode_with_bos(const hepta_tokenizer *t, const char *text, size_t n_text,
                                    int32_t **tokens, size_t *n, int32_t *bos, hepta_error *err) {
    size_t n_bos = 0;
    *bos = -1;
    hepta_status status = hepta_tokenizer_encode(t, "", 0, HEPTA_ENCODE_BOS, bos, 1, &n_bos, err);
    return status != HEPTA_OK ? status : encode_text(t, text, n_text, 0, tokens, n, err);
}

/* A base that has a tokenizer must read the text as the model does. */
static hepta_status check_base_tokens(const scorer *w, const char *text, size_t n_text,
                                      size_t n_tokens, hepta_error *err) {
    hepta_tokenizer *t = NULL;
    if (hepta_tokenizer_open(w->o.base, NULL, &t, NULL) != HEPTA_OK) {
        return HEPTA_OK; /* a base without one */
    }
    int32_t *tokens = NULL, bos;
    size_t n = 0;
    hepta_status status = encode_with_bos(t, text, n_text, &tokens, &n, &bos, err);
    if (status == HEPTA_OK &&
        (bos != w->bos || n != n_tokens || memcmp(tokens, w->tokens, n * sizeof *tokens) != 0)) {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "%s and %s turn the text into different tokens: their predictions "
                           "cannot be compared",
                           w->o.model, w->o.base);
    }
    free(tokens);
    hepta_tokenizer_free(t);
    return status;
}

static hepta_status open_base(scorer *w, const char *text, size_t n_text, hepta_error *err) {
    if (w->saved.data != NULL) {
        return HEPTA_OK; /* checked when all settings are known */
    }
    hepta_status status = hepta_model_open(w->o.base, &w->base, err);
    if (status != HEPTA_OK) {
        return status;
    }
    hepta_model_info info;
    hepta_model_get_info(w->base, &info);
    if (info.n_vocab != w->n_vocab) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%s has a vocabulary of %u tokens, %s of %u: their predictions cannot be "
                         "compared",
                         w->o.model, w->n_vocab, w->o.base, info.n_vocab);
    }
    return check_base_tokens(w, text, n_text, w->n, err);
}

/* Opens the models and encodes the text. */
static hepta_status open_all(scorer *w, hepta_error *err) {
    settings *o = &w->o;
    hepta_tokenizer *tokenizer = NULL;
    char *text = NULL;
    size_t n_text = 0;
    hepta_model_info info = {0};
    hepta_status status = hepta_model_open(o->model, &w->model, err);
    if (status == HEPTA_OK) {
        status = use_device(w->model, &o->device, err);
    }
    if (status == HEPTA_OK) {
        hepta_model_get_info(w->model, &info);
        w->n_vocab = info.n_vocab;
        status = hepta_tokenizer_open(o->model, o->tokenizer, &tokenizer, err);
    }
    if (status == HEPTA_OK && hepta_tokenizer_size(tokenizer) > info.n_vocab) {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "the tokenizer has %u tokens, the model %u: they do not belong together",
                           hepta_tokenizer_size(tokenizer), info.n_vocab);
    }
    if (status == HEPTA_OK) {
        status = read_text(o->text, &text, &n_text, err);
    }
    if (status == HEPTA_OK) {
        status = encode_with_bos(tokenizer, text, n_text, &w->tokens, &w->n, &w->bos, err);
    }
    if (status == HEPTA_OK && o->base != NULL) {
        status = open_saved(w, err);
    }
    if (status == HEPTA_OK && o->base != NULL) {
        status = open_base(w, text, n_text, err);
    }
    if (status == HEPTA_OK) {
        o->ctx = o->ctx == 0 ? info.n_ctx_train : o->ctx;
        o->stride = o->stride == 0 ? (o->ctx + 1) / 2 : o->stride;
        w->n = o->limit > 0 && w->n > o->limit ? o->limit : w->n;
        w->n_bytes = count_bytes(tokenizer, w->tokens, w->bos >= 0 ? 0 : 1, w->n);
    }
    free(text);
    hepta_tokenizer_free(tokenizer);
    return status;
}

static hepta_status check_settings(const scorer *w, hepta_error *err) {
    const settings *o = &w->o;
    if (w->n < 2) {
        return error_set(err, HEPTA_ERROR_ARGUMENT, "%s: %zu tokens; perplexity needs two or more",
                         o->text, w->n);
    }
    /* the first token of a window is BOS, or comes from the window before: it is not scored */
    if (o->ctx < 3 || o->stride > o->ctx - 1) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "--ctx %u --stride %u: expected a context of 3 or more and a stride below "
                         "it",
                         o->ctx, o->stride);
    }
    return w->saved.data != NULL ? check_saved(w, err) : HEPTA_OK;
}

static hepta_status allocate(scorer *w, hepta_error *err) {
    const size_t n = count_scored(w), n_logits = (size_t)SCORE_BATCH * w->n_vocab;
    bool compare = w->o.base != NULL;
    w->logits = malloc(n_logits * sizeof *w->logits);
    w->s.nll = malloc(n * sizeof *w->s.nll);
    bool good = w->logits != NULL && w->s.nll != NULL;
    if (compare) {
        w->base_logits = malloc(n_logits * sizeof *w->base_logits);
        w->s.base_nll = malloc(n * sizeof *w->s.base_nll);
        w->s.kl = malloc(n * sizeof *w->s.kl);
        w->s.same_top = malloc(n * sizeof *w->s.same_top);
        good = good && w->base_logits != NULL && w->s.base_nll != NULL && w->s.kl != NULL &&
               w->s.same_top != NULL;
    }
    return good ? HEPTA_OK
                : error_set(err, HEPTA_ERROR_MEMORY, "out of memory for the scores of %zu tokens",
                            n);
}

static hepta_status measure(scorer *w, hepta_error *err) {
    hepta_status status = open_all(w, err);
    if (status == HEPTA_OK) {
        status = check_settings(w, err);
    }
    if (status == HEPTA_OK) {
        status = allocate(w, err);
    }
    hepta_session_options session = {
        .n_ctx = w->o.ctx, .threads = w->o.threads, .cache_type = w->o.cache};
    w->o.threads = w->o.threads > 0 ? w->o.threads : threads_default();
    if (status == HEPTA_OK) {
        status = hepta_session_create(w->model, &session, &w->session, err);
    }
    session.cache_type = HEPTA_CACHE_F32; /* the base's */
    if (status == HEPTA_OK && w->base != NULL) {
        status = hepta_session_create(w->base, &session, &w->base_session, err);
    }
    if (status == HEPTA_OK && w->o.save != NULL) {
        saved_header header = make_header(w);
        status = file_writer_open(w->o.save, &w->save, err);
        if (status == HEPTA_OK) {
            status = file_writer_write(w->save, &header, sizeof header, err);
        }
    }
    if (status == HEPTA_OK) {
        status = score_text(w, err);
    }
    if (status == HEPTA_OK && w->save != NULL) {
        file_writer *save = w->save;
        w->save = NULL;
        status = file_writer_commit(save, err);
    }
    return status;
}

static void close_all(scorer *w) {
    file_writer_discard(w->save);
    hepta_session_free(w->session);
    hepta_session_free(w->base_session);
    hepta_model_close(w->model);
    hepta_model_close(w->base);
    file_map_close(&w->saved);
    free(w->logits);
    free(w->base_logits);
    free(w->tokens);
    free(w->s.nll);
    free(w->s.base_nll);
    free(w->s.kl);
    free(w->s.same_top);
}

int cli_perplexity(int argc, char **argv) {
    scorer w = {0};
    settings *o = &w.o;
    const option_spec specs[] = {
        {"file", 'f', OPTION_STRING, &o->text, "TEXT", "the text to predict, - for stdin (needed)"},
        {"kl-from", 0, OPTION_STRING, &o->base, "BASE",
         "compare with BASE: an unquantized model, or logits saved by --kl-save"},
        {"kl-save", 0, OPTION_STRING, &o->save, "FILE",
         "save MODEL's logits (4 x vocabulary bytes for each token)"},
        {"ctx", 'c', OPTION_U32, &o->ctx, "N", "window length (default: the training context)"},
        {"stride", 0, OPTION_U32, &o->stride, "N", "from window to window (default: half of ctx)"},
        {"limit", 0, OPTION_U32, &o->limit, "N", "use the first N tokens only"},
        {"tokenizer", 0, OPTION_STRING, &o->tokenizer, "FILE",
         "tokenizer, where the model comes without one"},
        {"cache", 0, OPTION_CACHE, &o->cache, "TYPE", "KV cache: f32 (default), f16 or q8"},
        {"threads", 't', OPTION_INT, &o->threads, "N", "threads (default: physical cores)"},
        DEVICE_OPTIONS(o->device),
        {"json", 0, OPTION_FLAG, &o->json, NULL, "print the result as JSON"},
        {"quiet", 'q', OPTION_FLAG, &o->quiet, NULL, "no progress"},
        {0},
    };
    const command_spec spec = {
        .usage = "perplexity [MODEL] -f TEXT [options]",
        .summary = "Measures how well a model predicts a text: exp(mean negative log-likelihood).",
        .details =
            "MODEL is any supported input; unquantized ones run in F32. Each token is scored\n"
            "once; windows overlap by ctx - stride tokens. +- is one standard error.\n\n"
            "With --kl-from the predictions of MODEL are compared with those of BASE, token by\n"
            "token: Kullback-Leibler divergence KL(BASE || MODEL) of the next token's\n"
            "distribution, share of tokens with the same most likely token, change of the true\n"
            "token's probability, ratio of the perplexities.",
        .example = "hepta perplexity model.hepta -f wiki.test.raw --ctx 512 --kl-from model.gguf",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &o->model);
    if (code >= 0) {
        return code;
    }
    if (o->text == NULL) {
        fprintf(stderr, "hepta: name a text with -f FILE (- for standard input)\n");
        return EXIT_USAGE;
    }
    o->model = model_or_default(o->model);
    interrupt_catch();
    hepta_error err = {0};
    code = measure(&w, &err) == HEPTA_OK ? print_result(&w) : report(&err);
    close_all(&w);
    return code;
}
