/*
 * tokenize.c - hepta tokenize: text to token ids and back.
 */
#include "cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The bytes of a token in memory of their own (free()); NULL when it is short. */
static char *piece_of(const hepta_tokenizer *t, int32_t id, bool first, bool special, size_t *n) {
    *n = hepta_tokenizer_decode(t, id, first, special, NULL, 0);
    char *piece = malloc(*n + 1);
    if (piece != NULL) {
        (void)hepta_tokenizer_decode(t, id, first, special, piece, *n);
    }
    return piece;
}

/* One line of --pieces: control characters are escaped. */
static void print_piece(int32_t id, const char *piece, size_t n) {
    printf("%7d  ", (int)id);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)piece[i];
        if (c < 0x20 || c == 0x7f || c == '\\') {
            printf("\\x%02x", c);
        } else {
            putchar(c);
        }
    }
    putchar('\n');
}

static int print_ids(const hepta_tokenizer *t, const int32_t *ids, size_t n, bool json,
                     bool pieces) {
    json_t *array = json ? json_array() : NULL;
    for (size_t i = 0; i < n; i++) {
        size_t k = 0;
        char *piece = pieces ? piece_of(t, ids[i], i == 0, true, &k) : NULL;
        if (pieces && piece == NULL) {
            json_decref(array);
            return report_text("out of memory for a token of %zu bytes", k);
        }
        if (json) {
            json_array_append_new(array, pieces ? json_pack("{s:i, s:o}", "id", (int)ids[i], "text",
                                                            json_text(piece, k))
                                                : json_integer(ids[i]));
        } else if (pieces) {
            print_piece(ids[i], piece, k);
        } else {
            printf("%s%d", i == 0 ? "" : " ", (int)ids[i]);
        }
        free(piece);
    }
    if (json) {
        return print_json(array);
    }
    if (!pieces) {
        putchar('\n');
    }
    return EXIT_OK;
}

/* Reads white-space separated ids and writes the bytes they stand for. */
static int decode_ids(const hepta_tokenizer *t, const char *text, size_t n, bool special) {
    char *copy = malloc(n + 1);
    if (copy == NULL) {
        return report_text("out of memory");
    }
    memcpy(copy, text, n);
    copy[n] = '\0';
    int code = EXIT_OK;
    bool first = true;
    for (char *p = copy;; first = false) {
        p += strspn(p, " \t\r\n,[]");
        if (p == copy + n) {
            break;
        }
        char *end;
        long id = strtol(p, &end, 10);
        if (end == p || id < 0 || id >= (long)hepta_tokenizer_size(t)) {
            code = report_text("at byte %zu: \"%.20s\" is no token id; expected 0 to %u",
                               (size_t)(p - copy), p, hepta_tokenizer_size(t) - 1);
            break;
        }
        size_t k;
        char *piece = piece_of(t, (int32_t)id, first, special, &k);
        if (piece == NULL) {
            code = report_text("out of memory for a token of %zu bytes", k);
            break;
        }
        fwrite(piece, 1, k, stdout);
        free(piece);
        p = end;
    }
    free(copy);
    return code;
}

int cli_tokenize(int argc, char **argv) {
    const char *model = NULL, *tokenizer_path = NULL, *prompt = NULL, *file = NULL;
    bool json = false, pieces = false, bos = false, special = false, decode = false;
    const option_spec specs[] = {
        {"prompt", 'p', OPTION_STRING, &prompt, "TEXT", "the text"},
        {"file", 'f', OPTION_STRING, &file, "FILE", "read the text from a file (default: stdin)"},
        {"tokenizer", 0, OPTION_STRING, &tokenizer_path, "FILE", "use this tokenizer"},
        {"pieces", 0, OPTION_FLAG, &pieces, NULL, "one token per line with its text"},
        {"bos", 0, OPTION_FLAG, &bos, NULL, "put BOS in front, as the model expects it"},
        {"special", 0, OPTION_FLAG, &special, NULL, "read control tokens in the text as tokens"},
        {"decode", 'd', OPTION_FLAG, &decode, NULL, "the input is token ids: print their text"},
        {"json", 0, OPTION_FLAG, &json, NULL, "print a JSON array"},
        {0},
    };
    const command_spec spec = {
        .usage = "tokenize [MODEL] [-p TEXT | -f FILE] [options]",
        .summary = "Turns text into the token ids of a model, or ids into text.",
        .details = "MODEL is any supported input, or a tokenizer file given with --tokenizer.",
        .example = "hepta tokenize model.hepta -p \"Hello world\" --pieces",
        .options = specs,
        .min_arguments = 0,
        .max_arguments = 1,
    };
    int code = options_parse(&spec, argc, argv, &model);
    if (code >= 0) {
        return code;
    }
    if (prompt != NULL && file != NULL) {
        fprintf(stderr, "hepta: give the text with -p or with -f, not both\n");
        return EXIT_USAGE;
    }
    if (decode && (json || pieces || bos)) {
        fprintf(stderr, "hepta: --decode prints text: leave out --json, --pieces and --bos\n");
        return EXIT_USAGE;
    }
    hepta_error err = {0};
    hepta_tokenizer *t = NULL;
    char *text = NULL;
    size_t n_text = 0, n = 0;
    int32_t *ids = NULL;
    if (model != NULL || tokenizer_path == NULL) {
        model = model_or_default(model);
    }
    if (hepta_tokenizer_open(model, tokenizer_path, &t, &err) != HEPTA_OK) {
        return report(&err);
    }
    if (prompt == NULL && read_text(file != NULL ? file : "-", &text, &n_text, &err) != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    const char *input = prompt != NULL ? prompt : text;
    n_text = prompt != NULL ? strlen(prompt) : n_text;
    if (decode) {
        code = decode_ids(t, input, n_text, special);
        goto done;
    }
    unsigned flags = (bos ? HEPTA_ENCODE_BOS : 0u) | (special ? HEPTA_ENCODE_SPECIAL : 0u);
    if (encode_text(t, input, n_text, flags, &ids, &n, &err) != HEPTA_OK) {
        code = report(&err);
        goto done;
    }
    code = print_ids(t, ids, n, json, pieces);
done:
    free(ids);
    free(text);
    hepta_tokenizer_free(t);
    return code;
}
