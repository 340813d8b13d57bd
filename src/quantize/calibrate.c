/*
 * calibrate.c - a text that goes through the unquantized model, layer by layer.
 *
 * All tokens are one chunk of a session: windows of the text are its sequences. So each layer sees
 * the whole text before the next one begins, and the moments of one input are all that is held.
 */
#include "quantize/calibrate.h"

#include "base/base.h"

#include <stdio.h>
#include <string.h>

enum { WINDOW = 512 };

struct calibration {
    hepta_model *model;
    hepta_session *session;
    uint32_t n; /* tokens */
    uint64_t seed;
    int threads;
    /* of a run: */
    calibration_wants wants;
    calibration_fn fn;
    void *context;
    hepta_status status;
    hepta_error *err;
};

/* ---- Tokens ------------------------------------------------------------ */

#ifndef HEPTA_ENGINE_ONLY
static hepta_status read_sample(char **text, size_t *n, hepta_error *err) {
    *n = 0;
    for (size_t i = 0; i < calibrate_sample_count; i++) {
        *n += strlen(calibrate_sample[i]);
    }
    *text = memory_alloc(*n + 1, 1);
    if (*text == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for the calibration text");
    }
    char *p = *text;
    for (size_t i = 0; i < calibrate_sample_count; i++) {
        const size_t length = strlen(calibrate_sample[i]);
        memcpy(p, calibrate_sample[i], length);
        p += length;
    }
    return HEPTA_OK;
}

/* At most this many bytes of a file are looked at: far more than the tokens wanted. */
enum { TEXT_MAX = 64 << 20 };

static hepta_status read_file(const char *path, char **text, size_t *n, hepta_error *err) {
    file_map map;
    hepta_status status = file_map_open(path, &map, err);
    if (status != HEPTA_OK) {
        return status;
    }
    *n = map.size < (size_t)TEXT_MAX ? map.size : (size_t)TEXT_MAX;
    *text = memory_alloc(*n + 1, 1);
    if (*text == NULL) {
        status = error_set(err, HEPTA_ERROR_MEMORY, "no memory for the text in %s", path);
    } else if (*n > 0) {
        memcpy(*text, map.data, *n);
    }
    file_map_close(&map);
    return status;
}

static hepta_status encode(const calibration_options *o, int32_t **tokens, size_t *n, int32_t *bos,
                           hepta_error *err) {
    hepta_tokenizer *t = NULL;
    char *text = NULL;
    size_t n_text = 0, n_bos = 0;
    hepta_status status = hepta_tokenizer_open(o->model, o->tokenizer, &t, err);
    if (status == HEPTA_OK) {
        status = o->text_path != NULL ? read_file(o->text_path, &text, &n_text, err)
                                      : read_sample(&text, &n_text, err);
    }
    *bos = -1;
    if (status == HEPTA_OK) {
        status = hepta_tokenizer_encode(t, "", 0, HEPTA_ENCODE_BOS, bos, 1, &n_bos, err);
    }
    if (status == HEPTA_OK) {
        *tokens = memory_alloc(n_text + 1, sizeof **tokens);
        if (*tokens == NULL) {
            status = error_set(err, HEPTA_ERROR_MEMORY, "no memory for the calibration text");
        } else {
            status = hepta_tokenizer_encode(t, text, n_text, 0, *tokens, n_text + 1, n, err);
        }
    }
    if (status == HEPTA_OK && *n < 2) {
        status = error_set(err, HEPTA_ERROR_ARGUMENT,
                           "%s: %zu tokens; calibration needs a text of two or more, better of "
                           "thousands",
                           o->text_path != NULL ? o->text_path : "the built-in text", *n);
    }
    memory_free(text);
    hepta_tokenizer_free(t);
    return status;
}

#else
static hepta_status encode(const calibration_options *o, int32_t **tokens, size_t *n, int32_t *bos,
                           hepta_error *err) {
    (void)tokens, (void)n, (void)bos;
    return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                     "%s: this build reads no text and cannot calibrate", o->model);
}
#endif

/* Windows spread evenly over the text become sequences of the session's chunk. */
static hepta_status open_session(calibration *c, const calibration_options *o,
                                 const int32_t *tokens, size_t n, int32_t bos, hepta_error *err) {
    const hepta_model_info *info = &c->model->info;
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= info->n_vocab) {
            return error_set(err, HEPTA_ERROR_FORMAT,
                             "%s: the tokenizer has tokens that the model lacks", o->model);
        }
    }
    const uint32_t n_bos = bos >= 0 ? 1 : 0;
    uint32_t window = info->n_ctx_train < WINDOW ? info->n_ctx_train : WINDOW;
    window = n + n_bos < window ? (uint32_t)n + n_bos : window;
    size_t n_windows = window > n_bos ? n / (window - n_bos) : 0;
    n_windows = n_windows * window > o->n_tokens ? o->n_tokens / window : n_windows;
    n_windows = n_windows > 0 ? n_windows : 1;
    const uint32_t n_chunk = (uint32_t)(n_windows * window);
    const hepta_session_options options = {.n_ctx = window,
                                           .n_sequences = (uint32_t)n_windows,
                                           .n_batch = n_chunk,
                                           .threads = o->threads};
    hepta_status status = llama_session_create(c->model, &options, true, &c->session, err);
    if (status != HEPTA_OK) {
        return status;
    }
    const size_t step = n / n_windows;
    for (uint32_t i = 0; i < n_chunk; i++) {
        const uint32_t w = i / window, at = i % window;
        c->session->chunk[i] = (gpu_token){
            .id = at < n_bos ? bos : tokens[w * step + at - n_bos], .sequence = w, .position = at};
    }
    c->n = n_chunk;
    return HEPTA_OK;
}

hepta_status calibration_open(const calibration_options *o, calibration **out, hepta_error *err) {
    int32_t *tokens = NULL, bos;
    size_t n = 0;
    calibration *c = memory_alloc(1, sizeof *c);
    if (c == NULL) {
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for a calibration");
    }
    c->seed = o->rotation_seed;
    c->threads = o->threads;
    hepta_status status = hepta_model_open(o->model, &c->model, err);
    if (status == HEPTA_OK) {
        status = encode(o, &tokens, &n, &bos, err);
    }
    if (status == HEPTA_OK) {
        status = open_session(c, o, tokens, n, bos, err);
    }
    memory_free(tokens);
    if (status != HEPTA_OK) {
        calibration_free(c);
        return status;
    }
    *out = c;
    return HEPTA_OK;
}

void calibration_free(calibration *c) {
    if (c != NULL) {
        hepta_session_free(c->session);
        hepta_model_close(c->model);
        memory_free(c);
    }
}

hepta_session *calibration_session(const calibration *c, uint32_t *n_tokens) {
    *n_tokens = c->n;
    return c->session;
}

/* ---- Moments ----------------------------------------------------------- */

static uint32_t input_width(const hepta_model_info *i, llama_input input) {
    return input == LLAMA_ATTN_OUT  ? i->n_head * i->head_dim
           : input == LLAMA_FFN_OUT ? i->n_ff
                                    : i->n_embd;
}

static hepta_status add_input(calibration *c, uint32_t layer, llama_input input, const float *x) {
    rotation *r = NULL;
    hepta_status status = rotation_create(input_width(&c->model->info, input), c->seed, &r, c->err);
    if (status != HEPTA_OK) {
        return status;
    }
    const uint32_t n = r->n_padded;
    float *h = memory_alloc((size_t)n * n, sizeof *h);
    if (h == NULL) {
        status = error_set(c->err, HEPTA_ERROR_MEMORY, "no memory for the moments of %u inputs", n);
    } else {
        status = moments_sum(r, x, NULL, c->n, c->model->kernels, c->threads, h, c->err);
    }
    if (status == HEPTA_OK) {
        const moments m = {.n = n, .n_tokens = c->n, .h = h, .rotation = r, .x = x};
        status = c->fn(c->context, layer, input, &m);
    }
    memory_free(h);
    rotation_free(r);
    return status;
}

static void on_input(void *context, uint32_t layer, llama_input input, const float *x, uint32_t n) {
    calibration *c = context;
    (void)n;
    if (c->status == HEPTA_OK && c->wants(c->context, layer, input)) {
        c->status = add_input(c, layer, input, x);
    }
}

hepta_status calibration_run(calibration *c, calibration_wants wants, calibration_fn fn,
                             void *context, hepta_error *err) {
    c->wants = wants;
    c->fn = fn;
    c->context = context;
    c->status = HEPTA_OK;
    c->err = err;
    const llama_observer observer = {.input = on_input, .context = c};
    llama_observe(c->session, c->n, NULL, &observer);
    return c->status;
}

uint32_t calibration_place(const char *name, uint32_t n_layer, bool tied) {
    static const struct {
        const char *kind;
        llama_input input;
    } kinds[] = {
        {"attn_q.weight", LLAMA_ATTN_IN},   {"attn_k.weight", LLAMA_ATTN_IN},
        {"attn_v.weight", LLAMA_ATTN_IN},   {"attn_output.weight", LLAMA_ATTN_OUT},
        {"ffn_gate.weight", LLAMA_FFN_IN},  {"ffn_up.weight", LLAMA_FFN_IN},
        {"ffn_down.weight", LLAMA_FFN_OUT},
    };
    uint32_t layer = 0;
    int end = 0;
    if (sscanf(name, "blk.%u.%n", &layer, &end) == 1 && end > 0 && layer < n_layer) {
        for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
            if (strcmp(name + end, kinds[i].kind) == 0) {
                return layer * LLAMA_INPUTS + kinds[i].input;
            }
        }
    }
    const bool head = strcmp(name, tied ? "token_embd.weight" : "output.weight") == 0;
    return head ? n_layer * LLAMA_INPUTS + LLAMA_HEAD_IN : UINT32_MAX;
}
