/*
 * sensitivity.c - how much each kind of tensor adds to the error of the logits.
 *
 * For every kind of tensor, quantizes the model with that kind at 3 bits and everything else at 8,
 * and prints the mean Kullback-Leibler divergence of the next-token distribution from the
 * unquantized model's. The factors in src/quantize/plan.c come from here (docs/QUALITY.md).
 *
 * Build and use: make build/sensitivity; build/sensitivity MODEL TEXT [WINDOWS]
 *
 * This program brings its own plan_rates, so that the library's is not linked.
 */
#include "base/base.h"
#include "quantize/plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CTX = 512 };

static const char
    *chosen; /* a name, or its end behind a layer's number, that gets chosen_half_bits */
static uint32_t chosen_half_bits, other_half_bits;

bool plan_is_packed(const tensor *t) {
    return t->n_dims == 2;
}

hepta_status plan_rates(const tensor *tensors, size_t n, double bits, uint32_t *half_bits,
                        hepta_error *err) {
    (void)bits;
    (void)err;
    for (size_t i = 0; i < n; i++) {
        const char *name = tensors[i].name;
        bool is_chosen =
            strcmp(name, chosen) == 0 || (chosen[0] == '.' && strstr(name, chosen) != NULL);
        half_bits[i] = !plan_is_packed(&tensors[i]) ? 0
                       : is_chosen                  ? chosen_half_bits
                                                    : other_half_bits;
    }
    return HEPTA_OK;
}

static void check(hepta_status status, const hepta_error *err) {
    if (status != HEPTA_OK) {
        fprintf(stderr, "sensitivity: %s\n", err->message);
        exit(1);
    }
}

static void *allocate(size_t n, size_t size) {
    void *p = calloc(n, size);
    if (p == NULL) {
        fprintf(stderr, "sensitivity: out of memory\n");
        exit(1);
    }
    return p;
}

/* Logits (n_windows, CTX, n_vocab) of windows of CTX tokens. */
static float *compute_logits(const char *path, const int32_t *windows, size_t n_windows,
                             hepta_model_info *info) {
    hepta_error err;
    hepta_model *model;
    hepta_session *session;
    hepta_session_options options = {.n_ctx = CTX};
    check(hepta_model_open(path, &model, &err), &err);
    check(hepta_session_create(model, &options, &session, &err), &err);
    hepta_model_get_info(model, info);
    float *logits = allocate(n_windows * CTX * info->n_vocab, sizeof *logits);
    for (size_t w = 0; w < n_windows; w++) {
        hepta_session_truncate(session, 0, 0);
        check(hepta_session_eval(session, windows + w * CTX, CTX, logits + w * CTX * info->n_vocab,
                                 true, &err),
              &err);
    }
    hepta_session_free(session);
    hepta_model_close(model);
    return logits;
}

static double log_sum_exp(const float *x, uint32_t n) {
    double max = (double)x[0], sum = 0;
    for (uint32_t i = 1; i < n; i++) {
        max = fmax(max, (double)x[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)x[i] - max);
    }
    return max + log(sum);
}

/* Mean over the rows of KL(softmax(a) || softmax(b)). */
static double mean_divergence(const float *a, const float *b, size_t n_rows, uint32_t n) {
    double sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (size_t r = 0; r < n_rows; r++) {
        const float *x = a + r * n, *y = b + r * n;
        double lx = log_sum_exp(x, n), ly = log_sum_exp(y, n);
        for (uint32_t i = 0; i < n; i++) {
            double log_p = (double)x[i] - lx;
            sum += exp(log_p) * (log_p - ((double)y[i] - ly));
        }
    }
    return sum / (double)n_rows;
}

static void measure(const char *model, const char *scratch, const int32_t *windows,
                    size_t n_windows, const float *base, const char *what) {
    hepta_error err;
    hepta_model_info info;
    hepta_quantize_options options = {.bits = 8};
    check(hepta_quantize(model, scratch, &options, &err), &err);
    float *logits = compute_logits(scratch, windows, n_windows, &info);
    printf("%-22s %8.3f %12.6f\n", what, info.bits_per_weight,
           mean_divergence(base, logits, n_windows * CTX, info.n_vocab));
    fflush(stdout);
    free(logits);
}

int main(int argc, char **argv) {
    static const char *const kinds[] = {
        "token_embd.weight", "output.weight",  ".attn_q.weight",
        ".attn_k.weight",    ".attn_v.weight", ".attn_output.weight",
        ".ffn_gate.weight",  ".ffn_up.weight", ".ffn_down.weight",
    };
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL TEXT [WINDOWS]\n", argv[0]);
        return 2;
    }
    size_t n_windows = argc > 3 ? (size_t)atoi(argv[3]) : 8, n = 0;
    hepta_error err;
    hepta_tokenizer *tokenizer;
    file_map text;
    check(hepta_tokenizer_open(argv[1], NULL, &tokenizer, &err), &err);
    check(file_map_open(argv[2], &text, &err), &err);
    int32_t *tokens = allocate(text.size + 1, sizeof *tokens);
    check(hepta_tokenizer_encode(tokenizer, (const char *)text.data, text.size, 0, tokens,
                                 text.size + 1, &n, &err),
          &err);
    if (n_windows == 0 || n / n_windows < CTX) {
        fprintf(stderr, "sensitivity: %zu tokens are too few for %zu windows\n", n, n_windows);
        return 1;
    }
    int32_t *windows = allocate(n_windows * CTX, sizeof *windows);
    for (size_t w = 0; w < n_windows; w++) { /* spread over the text, each from a BOS */
        windows[w * CTX] = hepta_tokenizer_bos(tokenizer);
        memcpy(windows + w * CTX + 1, tokens + w * (n / n_windows), (CTX - 1) * sizeof *windows);
    }
    char scratch[] = "/tmp/hepta-sensitivity-XXXXXX";
    int fd = mkstemp(scratch);
    if (fd < 0) {
        perror(scratch);
        return 1;
    }
    close(fd);
    hepta_model_info info;
    float *base = compute_logits(argv[1], windows, n_windows, &info);
    printf("%-22s %8s %12s\n", "3 bits, the rest 8", "bits/w", "mean KL");
    chosen_half_bits = 6;
    other_half_bits = HALF_BITS_INT8;
    chosen = "";
    measure(argv[1], scratch, windows, n_windows, base, "none");
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        chosen = kinds[k];
        measure(argv[1], scratch, windows, n_windows, base, kinds[k]);
    }
    unlink(scratch);
    free(base);
    free(windows);
    free(tokens);
    file_map_close(&text);
    hepta_tokenizer_free(tokenizer);
    return 0;
}
