/*
 * run.c - hepta run: writes text with a model.
 *
 * Text leaves in whole code points, and never the beginning of a stop string before it is clear
 * that it is not one. --digest hashes every logit computed, so that two runs can be compared
 * across machines, thread counts and kernels.
 */
#include "cli/cli.h"

#include "base/base.h"
#include "text/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Tokens of a prompt between two looks at interrupts. */
enum { PROMPT_BATCH = 64, GPU_PROMPT_BATCH = 512 };

typedef struct settings {
    const char *model, *tokenizer, *prompt, *file;
    uint32_t n_predict, ctx;
    int threads;
    hepta_cache_type cache;
    device_choice device;
    hepta_sampler_options sampler;
    string_list stop;
    bool lock, echo, special, stats, digest, json;
} settings;

/* ---- Output ------------------------------------------------------------ */

typedef struct output {
    const string_list *stop;
    char *text; /* everything generated so far */
    size_t n, room, n_shown;
    bool stream, stopped;
} output;

/* Shows text[n_shown, end). */
static void show(output *o, size_t end) {
    if (o->stream && end > o->n_shown) {
        fwrite(o->text + o->n_shown, 1, end - o->n_shown, stdout);
        fflush(stdout);
    }
    o->n_shown = end > o->n_shown ? end : o->n_shown;
}

/* Cuts the text where the first stop string begins; says how far it is safe to show it. */
static size_t safe_end(output *o) {
    size_t safe = o->n, cut = o->n;
    for (int i = 0; i < o->stop->n; i++) {
        const char *stop = o->stop->items[i];
        size_t m = strlen(stop);
        if (m == 0) {
            continue;
        }
        for (size_t at = o->n_shown; at < o->n; at++) {
            size_t k = o->n - at < m ? o->n - at : m;
            if (memcmp(o->text + at, stop, k) != 0) {
                continue;
            }
            if (k == m) {
                cut = at < cut ? at : cut;
                o->stopped = true;
            }
            safe = at < safe ? at : safe;
            break;
        }
    }
    o->n = cut;
    return safe;
}

/* Adds the bytes of a token, as many as they are; false when memory is short. */
static bool append(output *o, const hepta_tokenizer *t, int32_t token, bool first, bool special) {
    size_t n = hepta_tokenizer_decode(t, token, first, special, NULL, 0);
    if (o->n + n > o->room) {
        size_t room = (o->n + n) * 2 + 4096;
        char *bigger = realloc(o->text, room);
        if (bigger == NULL) {
            return false;
        }
        o->text = bigger;
        o->room = room;
    }
    o->n += hepta_tokenizer_decode(t, token, first, special, o->text + o->n, n);
    size_t end = safe_end(o);
    show(o, o->n_shown + utf8_complete(o->text + o->n_shown, end - o->n_shown));
    return true;
}

/* ---- Generation -------------------------------------------------------- */

typedef struct generation {
    const settings *settings;
    hepta_session *session;
    hepta_tokenizer *tokenizer;
    hepta_sampler *sampler;
    uint32_t n_vocab;
    size_t batch;
    float *logits; /* (batch, n_vocab) with --digest, else (1, n_vocab) */
    sha256 digest;
    output out;
    int32_t *tokens; /* generated */
    uint32_t n_tokens;
    size_t n_prompt;
    double prompt_seconds, decode_seconds;
    const char *reason;
} generation;

static hepta_status evaluate_prompt(generation *g, const int32_t *tokens, size_t n,
                                    hepta_error *err) {
    bool all = g->settings->digest;
    for (size_t at = 0; at < n && !interrupted();) {
        size_t k = n - at < g->batch ? n - at : g->batch;
        bool last = at + k == n;
        hepta_status status = hepta_session_eval(g->session, tokens + at, k,
                                                 all || last ? g->logits : NULL, all, err);
        if (status != HEPTA_OK) {
            return status;
        }
        if (all) {
            sha256_update(&g->digest, g->logits, k * g->n_vocab * sizeof(float));
            if (last) {
                memmove(g->logits, g->logits + (k - 1) * g->n_vocab, g->n_vocab * sizeof(float));
            }
        }
        at += k;
    }
    return HEPTA_OK;
}

static hepta_status generate(generation *g, hepta_error *err) {
    uint32_t room = hepta_session_context(g->session) - hepta_session_position(g->session, 0);
    g->reason = "length";
    while (g->n_tokens < g->settings->n_predict) {
        if (interrupted()) {
            g->reason = "interrupted";
            break;
        }
        int32_t token = hepta_sampler_draw(g->sampler, g->logits);
        if (hepta_tokenizer_is_end(g->tokenizer, token)) {
            g->reason = "end";
            break;
        }
        bool first = g->n_prompt == 0 && g->n_tokens == 0;
        g->tokens[g->n_tokens++] = token;
        if (!append(&g->out, g->tokenizer, token, first, g->settings->special)) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory for the text");
        }
        if (g->out.stopped) {
            g->reason = "stop";
            break;
        }
        if (g->n_tokens == g->settings->n_predict) {
            break;
        }
        if (room-- == 0) {
            g->reason = "context";
            break;
        }
        hepta_status status = hepta_session_eval(g->session, &token, 1, g->logits, false, err);
        if (status != HEPTA_OK) {
            return status;
        }
        if (g->settings->digest) {
            sha256_update(&g->digest, g->logits, g->n_vocab * sizeof(float));
        }
    }
    show(&g->out, g->out.n);
    return HEPTA_OK;
}

static double rate(double n, double seconds) {
    return seconds > 0 ? n / seconds : 0;
}

static int print_outcome(generation *g, size_t n_prompt_tokens) {
    const settings *s = g->settings;
    const bool whole = s->digest && !interrupted();
    char hex[65] = "";
    if (whole) {
        uint8_t digest[32];
        sha256_finish(&g->digest, digest);
        sha256_hex(digest, hex);
    }
    /* the first generated token comes from the prompt's logits */
    double n_decoded = g->n_tokens > 0 ? g->n_tokens - 1 : 0;
    double prompt_rate = rate((double)n_prompt_tokens, g->prompt_seconds);
    double decode_rate = rate(n_decoded, g->decode_seconds);
    if (s->json) {
        json_t *ids = json_array();
        for (uint32_t i = 0; i < g->n_tokens; i++) {
            json_array_append_new(ids, json_integer(g->tokens[i]));
        }
        json_t *json =
            json_pack("{s:o, s:o, s:o, s:s, s:i, s:i}", "model", json_name(s->model), "text",
                      json_text(g->out.text, g->out.n), "tokens", ids, "finish_reason", g->reason,
                      "prompt_tokens", (int)n_prompt_tokens, "generated_tokens", (int)g->n_tokens);
        if (whole) {
            json_object_set_new(json, "logits_sha256", json_string(hex));
        }
        if (s->stats) {
            json_object_set_new(json, "prompt_tokens_per_second", json_real(prompt_rate));
            json_object_set_new(json, "tokens_per_second", json_real(decode_rate));
            json_object_set_new(json, "session_bytes",
                                json_integer((json_int_t)hepta_session_memory(g->session)));
        }
        return print_json(json);
    }
    if (g->out.n == 0 || g->out.text[g->out.n - 1] != '\n') {
        putchar('\n');
    }
    if (whole) {
        printf("logits sha256 %s\n", hex);
    } else if (s->digest) {
        fflush(stdout);
        fprintf(stderr, "hepta: interrupted: no digest, which would be of a part of the run\n");
    }
    if (s->stats) {
        fflush(stdout); /* the text comes first */
        fprintf(stderr,
                "prompt %zu tokens, %.1f tokens/s; generated %u tokens, %.1f tokens/s; "
                "stopped: %s; session %.1f MB\n",
                n_prompt_tokens, prompt_rate, g->n_tokens, decode_rate, g->reason,
                (double)hepta_session_memory(g->session) / 1e6);
    }
    return EXIT_OK;
}

/* ---- The command ------------------------------------------------------- */

static int run_prompt(generation *g, const char *prompt, size_t n_text) {
    const settings *s = g->settings;
    hepta_error err = {0};
    int32_t *tokens = NULL;
    size_t n = 0;
    int code = EXIT_FAILED;
    unsigned flags = HEPTA_ENCODE_BOS | (s->special ? HEPTA_ENCODE_SPECIAL : 0u);
    if (encode_text(g->tokenizer, prompt, n_text, flags, &tokens, &n, &err) != HEPTA_OK) {
        return report(&err);
    }
    uint32_t ctx = hepta_session_context(g->session);
    if (n == 0) {
        code = report_text("this model has no BOS token to start an empty prompt from; "
                           "give a prompt with -p");
        goto done;
    }
    if (n > ctx) {
        code = report_text("the prompt has %zu tokens, the context holds %u; shorten it or give a "
                           "larger --ctx",
                           n, ctx);
        goto done;
    }
    g->n_prompt = n_text;
    uint32_t most = ctx - (uint32_t)n + 1;
    g->tokens = malloc((s->n_predict < most ? s->n_predict : most) * sizeof *g->tokens + 1);
    if (g->tokens == NULL) {
        code = report_text("out of memory for %u tokens", s->n_predict);
        goto done;
    }
    if (s->echo && !s->json) {
        fwrite(prompt, 1, n_text, stdout);
        fflush(stdout);
    }
    double start = clock_seconds();
    hepta_status status = evaluate_prompt(g, tokens, n, &err);
    double middle = clock_seconds();
    if (status == HEPTA_OK) {
        status = generate(g, &err);
    }
    g->prompt_seconds = middle - start;
    g->decode_seconds = clock_seconds() - middle;
    if (status != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    code = print_outcome(g, n);
    if (code == EXIT_OK && interrupted()) {
        code = EXIT_INTERRUPTED;
    }
done:
    free(tokens);
    return code;
}

static int run_model(const settings *s, const char *prompt, size_t n_text) {
    hepta_error err = {0};
    hepta_model *model = NULL;
    generation g = {.settings = s, .out = {.stop = &s->stop, .stream = !s->json}};
    int code = EXIT_FAILED;
    hepta_session_options session = {
        .n_ctx = s->ctx, .threads = s->threads, .cache_type = s->cache};
    if (hepta_model_open(s->model, &model, &err) != HEPTA_OK ||
        (s->lock && hepta_model_lock(model, &err) != HEPTA_OK) ||
        use_device(model, &s->device, &err) != HEPTA_OK ||
        hepta_tokenizer_open(s->model, s->tokenizer, &g.tokenizer, &err) != HEPTA_OK ||
        hepta_session_create(model, &session, &g.session, &err) != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    hepta_model_info info;
    hepta_model_get_info(model, &info);
    g.n_vocab = info.n_vocab;
    if (hepta_tokenizer_size(g.tokenizer) > info.n_vocab) {
        code = report_text("the tokenizer has %u tokens, the model %u: they do not belong together",
                           hepta_tokenizer_size(g.tokenizer), info.n_vocab);
        goto done;
    }
    if (hepta_sampler_create(&s->sampler, info.n_vocab, &g.sampler, &err) != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    const bool on_gpu = strncmp(hepta_model_device(model), "CPU", 3) != 0;
    g.batch = on_gpu && !s->digest ? GPU_PROMPT_BATCH : PROMPT_BATCH;
    g.logits = malloc((s->digest ? g.batch : 1) * g.n_vocab * sizeof(float));
    if (g.logits == NULL) {
        code = report_text("out of memory for logits");
        goto done;
    }
    sha256_start(&g.digest);
    code = run_prompt(&g, prompt, n_text);
done:
    free(g.logits);
    free(g.tokens);
    free(g.out.text);
    hepta_sampler_free(g.sampler);
    hepta_session_free(g.session);
    hepta_tokenizer_free(g.tokenizer);
    hepta_model_close(model);
    return code;
}

int cli_run(int argc, char **argv) {
    settings s = {.n_predict = 256,
                  .sampler = {.temperature = 0.8f, .top_k = 0, .top_p = 0.95f, .min_p = 0}};
    const option_spec specs[] = {
        {"prompt", 'p', OPTION_STRING, &s.prompt, "TEXT",
         "the text to go on from; \"\" starts afresh"},
        {"file", 'f', OPTION_STRING, &s.file, "FILE", "read the prompt from a file, - for stdin"},
        {"predict", 'n', OPTION_U32, &s.n_predict, "N", "tokens to write at most (default 256)"},
        {"temp", 0, OPTION_F32, &s.sampler.temperature, "T",
         "temperature (default 0.8); 0: greedy"},
        {"top-k", 0, OPTION_U32, &s.sampler.top_k, "K",
         "keep the K likeliest tokens (default 0: all)"},
        {"top-p", 0, OPTION_F32, &s.sampler.top_p, "P",
         "keep this much probability (default 0.95)"},
        {"min-p", 0, OPTION_F32, &s.sampler.min_p, "P",
         "drop tokens below P times the likeliest (default 0)"},
        {"seed", 0, OPTION_U64, &s.sampler.seed, "N", "random seed (default 0)"},
        {"ctx", 'c', OPTION_U32, &s.ctx, "N", "context length (default: the training context)"},
        {"cache", 0, OPTION_CACHE, &s.cache, "TYPE", "KV cache: f32 (default), f16 or q8"},
        {"stop", 0, OPTION_LIST, &s.stop, "TEXT", "stop before this text (may be repeated)"},
        {"threads", 't', OPTION_INT, &s.threads, "N", "threads (default: physical cores)"},
        DEVICE_OPTIONS(s.device),
        {"tokenizer", 0, OPTION_STRING, &s.tokenizer, "FILE",
         "tokenizer, where the model comes without one"},
        {"mlock", 0, OPTION_FLAG, &s.lock, NULL, "keep the whole model in memory"},
        {"special", 0, OPTION_FLAG, &s.special, NULL,
         "read control tokens in the prompt, show those written"},
        {"echo", 0, OPTION_FLAG, &s.echo, NULL, "print the prompt in front"},
        {"stats", 0, OPTION_FLAG, &s.stats, NULL, "print tokens/s for prompt and generation"},
        {"digest", 0, OPTION_FLAG, &s.digest, NULL, "print the SHA-256 of all logits computed"},
        {"json", 0, OPTION_FLAG, &s.json, NULL, "print one JSON object at the end"},
        {0},
    };
    const command_spec spec = {
        .usage = "run [MODEL] -p PROMPT [options]",
        .summary = "Writes text with a model. Same model, prompt, options and seed: same text.",
        .details =
            "MODEL is a .hepta file or any input of quantize, which then runs unquantized in\n"
            "F32; without it, the bundled story model. Without -p or -f the prompt is read\n"
            "from standard input.",
        .example = "hepta run -p \"Once upon a time\" --temp 0.7 --seed 7 --stats",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &s.model);
    if (code >= 0) {
        return code;
    }
    if (s.prompt != NULL && s.file != NULL) {
        fprintf(stderr, "hepta: give the prompt with -p or with -f, not both\n");
        return EXIT_USAGE;
    }
    if (s.prompt == NULL && s.file == NULL && isatty(STDIN_FILENO)) {
        fprintf(stderr,
                "hepta: give a prompt: hepta run -p \"Once upon a time\", or a file with -f, "
                "or text on standard input\n");
        return EXIT_USAGE;
    }
    s.model = model_or_default(s.model);
    hepta_error err = {0};
    char *text = NULL;
    size_t n = 0;
    if (s.prompt == NULL && read_text(s.file != NULL ? s.file : "-", &text, &n, &err) != HEPTA_OK) {
        return report(&err);
    }
    interrupt_catch();
    code =
        run_model(&s, s.prompt != NULL ? s.prompt : text, s.prompt != NULL ? strlen(s.prompt) : n);
    free(text);
    return code;
}
