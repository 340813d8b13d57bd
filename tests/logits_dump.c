/*
 * logits_dump.c - the logits of a token sequence as raw binary32, for comparisons with other
 * implementations (tests/compare_logits.py).
 *
 * Usage: logits_dump MODEL TOKENS OUT [THREADS [BATCH]]
 * TOKENS: little-endian int32 ids. OUT: (number of tokens, n_vocab) floats.
 */
#include "hepta.h"

#include <stdio.h>
#include <stdlib.h>

static int fail(const char *what) {
    fprintf(stderr, "logits_dump: %s\n", what);
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 4 || argc > 6) {
        return fail("usage: logits_dump MODEL TOKENS OUT [THREADS [BATCH]]");
    }
    FILE *f = fopen(argv[2], "rb");
    if (f == NULL) {
        return fail("cannot open the tokens");
    }
    static int32_t tokens[1 << 20];
    size_t n = fread(tokens, sizeof tokens[0], sizeof tokens / sizeof tokens[0], f);
    fclose(f);

    hepta_error err = {0};
    hepta_model *model = NULL;
    hepta_session *session = NULL;
    if (hepta_model_open(argv[1], &model, &err) != HEPTA_OK) {
        return fail(err.message);
    }
    hepta_model_info info;
    hepta_model_get_info(model, &info);
    hepta_session_options options = {.n_ctx = (uint32_t)n};
    options.threads = argc > 4 ? atoi(argv[4]) : 1;
    options.n_batch = argc > 5 ? (uint32_t)atoi(argv[5]) : 0;
    if (hepta_session_create(model, &options, &session, &err) != HEPTA_OK) {
        return fail(err.message);
    }
    float *logits = malloc(n * info.n_vocab * sizeof *logits);
    if (logits == NULL) {
        return fail("no memory for the logits");
    }
    if (hepta_session_eval(session, tokens, n, logits, true, &err) != HEPTA_OK) {
        return fail(err.message);
    }
    f = fopen(argv[3], "wb");
    if (f == NULL || fwrite(logits, sizeof *logits, n * info.n_vocab, f) != n * info.n_vocab ||
        fclose(f) != 0) {
        return fail("cannot write the logits");
    }
    free(logits);
    hepta_session_free(session);
    hepta_model_close(model);
    return 0;
}
