/*
 * complete.c - the library in one page: opens a model, continues a prompt, greedily.
 *
 * Build: cc complete.c $(pkg-config --cflags --libs hepta) -o complete
 * Use:   ./complete model.hepta "Once upon a time"
 */
#include <hepta.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 512, N_PREDICT = 64 };

int main(int argc, char **argv) {
    hepta_error err = {0};
    hepta_model *model = NULL;
    hepta_tokenizer *tokenizer = NULL;
    hepta_session *session = NULL;
    hepta_sampler *sampler = NULL;
    hepta_sampler_options greedy = {.temperature = 0};
    hepta_session_options options = {.n_ctx = MAX_TOKENS};
    hepta_model_info info;
    int32_t tokens[MAX_TOKENS];
    float *logits = NULL;
    size_t n = 0;
    int code = 1;

    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT\n", argv[0]);
        return 2;
    }
    if (hepta_model_open(argv[1], &model, &err) != HEPTA_OK ||
        hepta_tokenizer_open(argv[1], NULL, &tokenizer, &err) != HEPTA_OK ||
        hepta_session_create(model, &options, &session, &err) != HEPTA_OK) {
        goto done;
    }
    hepta_model_get_info(model, &info);
    logits = malloc(info.n_vocab * sizeof *logits);
    if (logits == NULL || hepta_sampler_create(&greedy, info.n_vocab, &sampler, &err) != HEPTA_OK ||
        hepta_tokenizer_encode(tokenizer, argv[2], strlen(argv[2]), HEPTA_ENCODE_BOS, tokens,
                               MAX_TOKENS, &n, &err) != HEPTA_OK) {
        goto done;
    }
    if (n == 0 || n > MAX_TOKENS - N_PREDICT) {
        fprintf(stderr, "the prompt has %zu tokens; 1 to %d fit\n", n, MAX_TOKENS - N_PREDICT);
        goto done;
    }
    if (hepta_session_eval(session, tokens, n, logits, false, &err) != HEPTA_OK) {
        goto done;
    }
    for (int i = 0; i < N_PREDICT; i++) {
        int32_t token = hepta_sampler_draw(sampler, logits);
        char text[256];
        if (hepta_tokenizer_is_end(tokenizer, token)) {
            break;
        }
        size_t n_text = hepta_tokenizer_decode(tokenizer, token, false, false, text, sizeof text);
        fwrite(text, 1, n_text < sizeof text ? n_text : sizeof text, stdout);
        fflush(stdout);
        if (hepta_session_eval(session, &token, 1, logits, false, &err) != HEPTA_OK) {
            goto done;
        }
    }
    putchar('\n');
    code = 0;
done:
    if (err.message[0] != '\0') {
        fprintf(stderr, "%s: %s\n", hepta_status_name(err.status), err.message);
    }
    hepta_sampler_free(sampler);
    hepta_session_free(session);
    hepta_tokenizer_free(tokenizer);
    hepta_model_close(model);
    free(logits);
    return code;
}
