/*
 * test_text.c - tokenizers: published vectors, round trips, merging against a naive reference,
 * cost on hostile text, streaming. Reading tokenizer files is in test_text_files.c.
 */
#include "test.h"

#include "text/pretokenize.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

#include "text_util.h"

/* ---- UTF-8 ------------------------------------------------------------- */

TEST(utf8_every_code_point) {
    for (uint32_t c = 0; c <= 0x10FFFF; c++) {
        uint8_t bytes[4];
        uint32_t back = 0;
        bool surrogate = c >= 0xD800 && c <= 0xDFFF;
        size_t n = utf8_encode(c, bytes);
        CHECK_EQ_INT(utf8_decode(bytes, n, &back), surrogate ? 0 : n);
        if (surrogate) {
            continue;
        }
        CHECK_EQ_INT(back, c);
        for (size_t k = 0; k < n; k++) { /* every proper prefix is incomplete, not invalid */
            CHECK_EQ_INT(utf8_decode(bytes, k, &back), 0);
            CHECK_EQ_INT(utf8_complete((char *)bytes, k), 0);
        }
        CHECK_EQ_INT(utf8_complete((char *)bytes, n), n);
    }
}

TEST(utf8_invalid) {
    /* what is shown: the examples of the Unicode Standard, section 3.9, tables 3-8 to 3-11 */
    static const struct {
        const char *bytes, *shown;
    } cases[] = {
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", "????????A"},
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", "????????A"},
        {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", "?????A??B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", "????A"},
        {"a\xFE\xC3\xA9\xC3", "a?\xC3\xA9?"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char shown[64], expected[64];
        size_t n = utf8_display(cases[i].bytes, strlen(cases[i].bytes), shown), k = 0;
        for (const char *s = cases[i].shown; *s != '\0'; s++) {
            const char *one = *s == '?' ? "\xEF\xBF\xBD" : s;
            size_t m = *s == '?' ? 3 : 1;
            memcpy(expected + k, one, m);
            k += m;
        }
        CHECK_EQ_INT(n, k);
        CHECK_MEM_EQ(shown, expected, k);
        CHECK_EQ_INT(utf8_display(cases[i].bytes, strlen(cases[i].bytes), NULL), k);
    }
    CHECK_EQ_INT(utf8_complete("a\xE2\x82", 3), 1);
    CHECK_EQ_INT(utf8_complete("a\xE2\x28", 3), 3);    /* can never become valid */
    CHECK_EQ_INT(utf8_complete("\xF0\x80\x80", 3), 3); /* overlong: neither can this */
    CHECK_EQ_INT(utf8_complete("\x80\x80\x80\x80", 4), 4);
    CHECK_EQ_INT(utf8_complete("", 0), 0);
}

/* Text shown as it grows, as `hepta run` does: nothing is lost, of valid text every part is valid.
 */
TEST(utf8_complete_of_growing_text) {
    for (int round = 0; round < 300; round++) {
        uint8_t text[64];
        size_t n = 1 + test_random_below(60), shown = 0, used = 0;
        random_bytes(text, n, round % 3);
        while (used < n) {
            size_t k = 1 + test_random_below(5);
            used += k < n - used ? k : n - used;
            const char *next = (char *)text + shown;
            size_t m = utf8_complete(next, used - shown);
            CHECK(round % 3 != 1 || utf8_display(next, m, NULL) == m);
            shown += m;
            CHECK(used - shown <= 3);
        }
    }
}

/* ---- Words ------------------------------------------------------------- */

typedef struct words {
    char text[512]; /* the words with '|' between */
    size_t n;
} words;

static bool collect(void *context, const uint8_t *word, size_t n) {
    words *w = context;
    if (w->n > 0) {
        w->text[w->n++] = '|';
    }
    memcpy(w->text + w->n, word, n);
    w->n += n;
    w->text[w->n] = '\0';
    return true;
}

TEST(words_of_each_pattern) {
    static const struct {
        const char *name, *text, *words;
    } cases[] = {
        {"gpt-2", "Hello  world's 123 'LL!?\n\n x", "Hello| | world|'s| 123| '|LL|!?|\n\n| x"},
        {"gpt-2", "a \n ", "a| \n "},
        {"llama-bpe", "I'LL 12345\r\n\r\nx  y!!\n\nz", "I|'LL| |123|45|\r\n\r\n|x| | y|!!\n\n|z"},
        {"llama-bpe", "\tx#y \n  z", "\tx|#y| \n| | z"},
        {"llama-bpe", "'\xC5\xBFo it's", "'\xC5\xBF|o| it|'s"}, /* U+017F folds to s */
        {"qwen2", "a 12 b", "a| |1|2| b"},
        {"smollm", "a 12 b", "a| |1|2| b"},
        {"gpt-4o", "fooBARbaz's HTTPServer/\n1234", "foo|BARbaz's| HTTPServer|/\n|123|4"},
        {"tekken", "fooBARbaz's 12", "foo|BARbaz|'s| |1|2"},
        {"deepseek-llm", "foo 12\nb\xC3\xA9t\xC3\xA9!\xE4\xBD\xA0\xE5\xA5\xBD  ",
         "foo| |1|2|\n|b|\xC3\xA9|t|\xC3\xA9|!|\xE4\xBD\xA0\xE5\xA5\xBD|  "}, /* as published */
        {"deepseek-coder", "x = (1)", "x| =| (|1|)"},
        {"llama-bpe",
         "ab\xFF\xFE"
         "cd\xE2\x82",
         "ab|\xFF\xFE|cd|\xE2\x82"}, /* no UTF-8 */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const pretokenizer *p = pretokenizer_find(cases[i].name, strlen(cases[i].name));
        words w = {.n = 0};
        CHECK(p != NULL);
        CHECK(pretokenize(p->pattern, (const uint8_t *)cases[i].text, strlen(cases[i].text),
                          collect, &w));
        CHECK_EQ_STR(w.text, cases[i].words);
    }
}

typedef struct cover {
    const uint8_t *next;
    size_t left; /* words until `false` is returned */
} cover;

static bool follow(void *context, const uint8_t *word, size_t n) {
    cover *c = context;
    CHECK(word == c->next);
    CHECK(n > 0);
    c->next = word + n;
    return c->left-- > 0;
}

TEST(words_cover_any_bytes) {
    for (int pattern = PATTERN_GPT2; pattern <= PATTERN_DEEPSEEK_CODER; pattern++) {
        for (int round = 0; round < 200; round++) {
            uint8_t text[300];
            size_t n = test_random_below(sizeof text);
            random_bytes(text, n, round % 3);
            cover c = {text, SIZE_MAX};
            CHECK(pretokenize((pretokenizer_pattern)pattern, text, n, follow, &c));
            CHECK(c.next == text + n);
            c = (cover){text, 0};
            CHECK(pretokenize((pretokenizer_pattern)pattern, text, n, follow, &c) == (n == 0));
        }
    }
}

/* ---- Published vectors ------------------------------------------------- */

/*
 * llama.cpp's vectors: texts separated by a line __ggml_vocab_test__, and a line of ids for each,
 * made by the models' own tokenizers.
 */
static void check_vectors(const char *name, const char *tokenizer_path) {
    static const char separator[] = "\n__ggml_vocab_test__\n";
    char path[256];
    snprintf(path, sizeof path, "tokenizers/ggml-vocab/ggml-vocab-%s.gguf.inp", name);
    buffer in = read_whole(test_need_data(path));
    snprintf(path, sizeof path, "tokenizers/ggml-vocab/ggml-vocab-%s.gguf.out", name);
    buffer out = read_whole(test_need_data(path));
    hepta_tokenizer *t = open_tokenizer(tokenizer_path);
    const char *text = (char *)in.data, *line = (char *)out.data;
    int n_cases = 0;
    for (bool more = true; more; n_cases++) {
        const char *end = strstr(text, separator);
        more = end != NULL;
        size_t n = more ? (size_t)(end - text) : strlen(text) - 1; /* the file ends in \n */
        if (!more && (n == 0 || *line == '\0')) {
            break;
        }
        ids expected = parse_ids(&line);
        ids found = encode(t, text, n, 0);
        check_same_ids(&found, &expected, text, n);
        ids_free(&found);
        ids_free(&expected);
        text = more ? end + strlen(separator) : text;
    }
    CHECK_EQ_INT(n_cases, 46);
    hepta_tokenizer_free(t);
    buffer_free(&in);
    buffer_free(&out);
}

TEST(vectors_llama_spm) {
    check_vectors("llama-spm", "tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf");
}

TEST(vectors_llama_spm_from_sentencepiece) {
    check_vectors("llama-spm", "tokenizers/llama2_tokenizer.model");
}

TEST(vectors_phi3) {
    check_vectors("phi-3", "tokenizers/ggml-vocab/ggml-vocab-phi-3.gguf");
}

TEST(vectors_gpt2) {
    check_vectors("gpt-2", "tokenizers/ggml-vocab/ggml-vocab-gpt-2.gguf");
}

TEST(vectors_gpt2_from_vocab_and_merges) {
    check_vectors("gpt-2", "tokenizers/gpt2");
}

TEST(vectors_deepseek_llm) {
    check_vectors("deepseek-llm", "tokenizers/ggml-vocab/ggml-vocab-deepseek-llm.gguf");
}

TEST(vectors_llama_bpe_from_tiktoken) {
    check_vectors("llama-bpe", "tokenizers/llama3_tokenizer.model");
}

TEST(vectors_qwen2_from_vocab_and_merges) {
    check_vectors("qwen2", "tokenizers/qwen2.5");
}

/*
 * mistral-common's samples: a conversation's text as the tokenizer shows it, and its ids. Control
 * tokens ([INST] from version 2 on) stand in the text; what follows one is encoded on its own, so
 * it gets SentencePiece's space, which the text shows as U+2581; line breaks are shown as <0x0A>.
 */
static void check_mistral(const char *sample, int version, const hepta_tokenizer *t) {
    char path[256];
    snprintf(path, sizeof path, "tokenizers/mistral/samples/%s/text_v%d.txt", sample, version);
    buffer shown = read_whole(test_need_data(path));
    snprintf(path, sizeof path, "tokenizers/mistral/samples/%s/tokens_v%d.json", sample, version);
    buffer json = read_whole(test_need_data(path));
    char *text = malloc(shown.n + 1);
    size_t n = 0;
    bool after_control = false;
    for (size_t i = 0; i < shown.n;) {
        const char *s = (char *)shown.data + i;
        const char *end = *s == '<' || *s == '[' ? strchr(s, *s == '<' ? '>' : ']') : NULL;
        size_t m = end == NULL ? 0 : (size_t)(end - s + 1);
        int32_t id = m == 0 ? TOKEN_NONE : tokenizer_find_special(t, s, m);
        bool mark = strncmp(s, "\xE2\x96\x81", 3) == 0;
        if (id != TOKEN_NONE) {
            memcpy(text + n, s, m);
            n += m;
            i += m;
        } else if (strncmp(s, "<0x0A>", 6) == 0) {
            text[n++] = '\n';
            i += 6;
        } else if (mark || *s == ' ') {
            if (!after_control) {
                text[n++] = ' ';
            }
            i += mark ? 3 : 1;
        } else {
            text[n++] = *s;
            i++;
        }
        after_control = id != TOKEN_NONE;
    }
    while (n > 0 && text[n - 1] == '\n') {
        n--;
    }
    const char *list = strchr(strstr((char *)json.data, "\"tokens\""), '[') + 1;
    ids expected = parse_ids(&list);
    ids found = encode(t, text, n, HEPTA_ENCODE_SPECIAL);
    check_same_ids(&found, &expected, text, n);
    ids_free(&expected);
    ids_free(&found);
    free(text);
    buffer_free(&shown);
    buffer_free(&json);
}

TEST(vectors_mistral) {
    static const char *const samples[] = {
        "get_weather_full", "get_weather_no_history", "get_weather_no_system_prompt",
        "no_tools",         "parallel_calls",         "several_calls"};
    hepta_tokenizer *v1 = open_tokenizer("tokenizers/mistral/tokenizer.model.v1");
    hepta_tokenizer *v2 =
        open_tokenizer("tokenizers/mistral/mistral_instruct_tokenizer_240216.model.v2");
    hepta_tokenizer *v3 =
        open_tokenizer("tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3");
    check_mistral("no_tools", 1, v1);
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++) {
        check_mistral(samples[i], 2, v2);
        check_mistral(samples[i], 3, v3);
    }
    hepta_tokenizer_free(v1);
    hepta_tokenizer_free(v2);
    hepta_tokenizer_free(v3);
}

/* ---- Every tokenizer there is ------------------------------------------ */

static const char *const all_tokenizers[] = {
    "tokenizers/llama2_tokenizer.model",
    "tokenizers/llama2_tokenizer.bin",
    "tokenizers/llama3_tokenizer.model",
    "tokenizers/gpt2",
    "tokenizers/qwen2.5",
    "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3",
    "tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf",
    "tokenizers/ggml-vocab/ggml-vocab-phi-3.gguf",
    "tokenizers/ggml-vocab/ggml-vocab-gpt-2.gguf",
    "tokenizers/ggml-vocab/ggml-vocab-deepseek-llm.gguf",
    "models/tok512.bin",
    "models/babyllama-tok361/tok361.bin",
};

enum { N_TOKENIZERS = sizeof all_tokenizers / sizeof *all_tokenizers };

static buffer there_and_back(const hepta_tokenizer *t, const void *text, size_t n) {
    ids found = encode(t, text, n, 0);
    buffer back = decode(t, &found);
    ids_free(&found);
    return back;
}

static void check_round_trip(const hepta_tokenizer *t, const void *text, size_t n) {
    buffer back = there_and_back(t, text, n);
    if (t->nfc || t->lacks_bytes) { /* what comes back is normal, and stays as it is */
        buffer normal = back;
        back = there_and_back(t, normal.data, normal.n);
        CHECK_EQ_INT(back.n, normal.n);
        CHECK_MEM_EQ(back.data, normal.data, normal.n);
        buffer_free(&normal);
    } else {
        CHECK_EQ_INT(back.n, n);
        CHECK_MEM_EQ(back.data, text, n);
    }
    buffer_free(&back);
}

/* DeepSeek LLM has no tokens for the bytes that UTF-8 never uses. */
TEST(bytes_without_a_token_are_replaced) {
    hepta_tokenizer *t = open_tokenizer("tokenizers/ggml-vocab/ggml-vocab-deepseek-llm.gguf");
    buffer back = there_and_back(t,
                                 "a\xFF"
                                 "b\xC0\xE6\x88",
                                 6);
    CHECK_EQ_INT(back.n, 10);
    CHECK_MEM_EQ(back.data,
                 "a\xEF\xBF\xBD"
                 "b\xEF\xBF\xBD\xE6\x88",
                 10);
    buffer_free(&back);
    hepta_tokenizer_free(t);
}

TEST(round_trip_of_any_bytes) {
    int tried = 0;
    for (size_t i = 0; i < N_TOKENIZERS; i++) {
        if (test_data(all_tokenizers[i]) == NULL) {
            continue;
        }
        tried++;
        hepta_tokenizer *t = open_tokenizer(all_tokenizers[i]);
        uint8_t text[2000];
        for (int b = 0; b < 256; b++) {
            text[b] = (uint8_t)b;
            check_round_trip(t, &text[b], 1);
        }
        check_round_trip(t, text, 256);
        check_round_trip(t, "", 0);
        check_round_trip(t, "\0\0\0", 3);
        check_round_trip(t, "  \xF0\x9F\xA6 \xC3(\xED\xA0\x80)", 13);
        for (int round = 0; round < 100; round++) {
            size_t n = test_random_below(sizeof text);
            random_bytes(text, n, round % 3);
            check_round_trip(t, text, n);
        }
        hepta_tokenizer_free(t);
    }
    if (tried == 0) {
        SKIP("no tokenizers among the test data");
    }
    test_note("%d tokenizers", tried);
}

TEST(empty_text) {
    hepta_tokenizer *t = open_tokenizer("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf");
    ids none = encode(t, "", 0, HEPTA_ENCODE_SPECIAL);
    CHECK_EQ_INT(none.n, 0);
    ids bos = encode(t, NULL, 0, HEPTA_ENCODE_BOS);
    CHECK_EQ_INT(bos.n, 1);
    CHECK_EQ_INT(bos.items[0], 1);
    ids_free(&none);
    ids_free(&bos);
    hepta_tokenizer_free(t);
}

TEST(capacity_limits_what_is_written) {
    hepta_error err = {0};
    hepta_tokenizer *t = open_tokenizer("tokenizers/ggml-vocab/ggml-vocab-gpt-2.gguf");
    int32_t few[4] = {-7, -7, -7, -7};
    size_t n = 0;
    CHECK_OK(hepta_tokenizer_encode(t, "one two three", 13, 0, NULL, 0, &n, &err));
    CHECK_EQ_INT(n, 3);
    CHECK_OK(hepta_tokenizer_encode(t, "one two three", 13, 0, few, 2, &n, &err));
    CHECK_EQ_INT(n, 3);
    CHECK(few[0] >= 0 && few[1] >= 0 && few[2] == -7);
    char text[8] = "xxxxxxx";
    CHECK_EQ_INT(hepta_tokenizer_decode(t, few[1], false, false, text, 2), 4);
    CHECK_EQ_STR(text, " txxxxx");
    CHECK_EQ_INT(hepta_tokenizer_decode(t, -1, false, true, text, 8), 0);
    CHECK_EQ_INT(hepta_tokenizer_decode(t, 50257, false, true, text, 8), 0);
    hepta_tokenizer_free(t);
}

/* The same vocabulary in three formats. */
TEST(llama2_formats_agree) {
    hepta_tokenizer *a = open_tokenizer("tokenizers/llama2_tokenizer.model");
    hepta_tokenizer *b = open_tokenizer("tokenizers/llama2_tokenizer.bin");
    hepta_tokenizer *c = open_tokenizer("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf");
    buffer text = read_whole(test_need_data("text/wikitext-2/wiki.test.raw"));
    size_t n = text.n < 200000 ? text.n : 200000;
    ids x = encode(a, text.data, n, HEPTA_ENCODE_BOS),
        y = encode(b, text.data, n, HEPTA_ENCODE_BOS),
        z = encode(c, text.data, n, HEPTA_ENCODE_BOS);
    check_same_ids(&y, &x, "llama2.c", 8);
    check_same_ids(&z, &x, "gguf", 4);
    for (int32_t id = 0; id < 32000; id++) {
        char s[3][128];
        size_t k = hepta_tokenizer_decode(a, id, false, true, s[0], sizeof s[0]);
        CHECK_EQ_INT(hepta_tokenizer_decode(b, id, false, true, s[1], sizeof s[1]), k);
        CHECK_EQ_INT(hepta_tokenizer_decode(c, id, false, true, s[2], sizeof s[2]), k);
        CHECK_MEM_EQ(s[0], s[1], k);
        CHECK_MEM_EQ(s[0], s[2], k);
    }
    ids_free(&x);
    ids_free(&y);
    ids_free(&z);
    buffer_free(&text);
    hepta_tokenizer_free(a);
    hepta_tokenizer_free(b);
    hepta_tokenizer_free(c);
}

/* Decoding token by token gives the text, whose complete part grows by whole code points. */
TEST(streaming_equals_whole) {
    static const char text[] =
        " \xF0\x9F\xA6\x99 na\xC3\xAFve \xE6\x88\x91\xE6\x83\xB3 "
        "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x9A\x80 \xE1\x9E\x80\xE1\x9E\xB6";
    for (size_t i = 0; i < N_TOKENIZERS; i++) {
        if (test_data(all_tokenizers[i]) == NULL) {
            continue;
        }
        hepta_tokenizer *t = open_tokenizer(all_tokenizers[i]);
        ids found = encode(t, text, strlen(text), HEPTA_ENCODE_BOS);
        char all[256];
        size_t used = 0, shown = 0;
        bool first = true;
        for (size_t k = 0; k < found.n; k++) {
            used += hepta_tokenizer_decode(t, found.items[k], first, false, all + used,
                                           sizeof all - used);
            first = first && found.items[k] == hepta_tokenizer_bos(t);
            CHECK(used <= sizeof all);
            size_t m = utf8_complete(all + shown, used - shown);
            CHECK_EQ_INT(utf8_display(all + shown, m, NULL), m); /* valid as it stands */
            shown += m;
        }
        CHECK_EQ_INT(shown, used);
        CHECK_EQ_INT(used, strlen(text));
        CHECK_MEM_EQ(all, text, used);
        ids_free(&found);
        hepta_tokenizer_free(t);
    }
}

TEST(first_token_drops_one_space) {
    hepta_tokenizer *t = open_tokenizer("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf");
    ids found = encode(t, "Hello", 5, 0);
    char text[16];
    CHECK_EQ_INT(found.n, 1);
    CHECK_EQ_INT(hepta_tokenizer_decode(t, found.items[0], true, false, text, 16), 5);
    CHECK_EQ_INT(hepta_tokenizer_decode(t, found.items[0], false, false, text, 16), 6);
    CHECK_MEM_EQ(text, " Hello", 6);
    ids_free(&found);
    found = encode(t, "  x", 3, 0); /* two of its own, one in front */
    buffer back = decode(t, &found);
    CHECK_EQ_INT(back.n, 3);
    buffer_free(&back);
    ids_free(&found);
    hepta_tokenizer_free(t);
}

/* ---- Special tokens ---------------------------------------------------- */

TEST(special_tokens_of_llama3) {
    static const char text[] = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>";
    hepta_tokenizer *t = open_tokenizer("tokenizers/llama3_tokenizer.model");
    CHECK_EQ_INT(hepta_tokenizer_size(t), 128256);
    CHECK_EQ_INT(hepta_tokenizer_bos(t), 128000);
    static const struct {
        const char *name;
        int id;
    } known[] = {{"<|begin_of_text|>", 128000},
                 {"<|end_of_text|>", 128001},
                 {"<|start_header_id|>", 128006},
                 {"<|eom_id|>", 128008},
                 {"<|eot_id|>", 128009},
                 {"<|reserved_special_token_2|>", 128012},
                 {"<|reserved_special_token_245|>", 128255}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        CHECK_EQ_INT(tokenizer_find_special(t, known[i].name, strlen(known[i].name)), known[i].id);
    }
    CHECK(hepta_tokenizer_is_end(t, 128001) && hepta_tokenizer_is_end(t, 128008) &&
          hepta_tokenizer_is_end(t, 128009));
    CHECK(!hepta_tokenizer_is_end(t, 128000) && !hepta_tokenizer_is_end(t, -1) &&
          !hepta_tokenizer_is_end(t, 1 << 30));
    ids with = encode(t, text, strlen(text), HEPTA_ENCODE_SPECIAL | HEPTA_ENCODE_BOS);
    static const int32_t expected[] = {128000, 128006, 882, 128007, 271, 13347, 128009};
    CHECK_EQ_INT(with.n, 7);
    CHECK_MEM_EQ(with.items, expected, sizeof expected);
    ids without = encode(t, text, strlen(text), 0);
    for (size_t i = 0; i < without.n; i++) { /* as plain text, never a control token */
        CHECK(without.items[i] < 128000);
    }
    buffer back = decode(t, &without);
    CHECK_EQ_INT(back.n, strlen(text));
    buffer_free(&back);
    back = decode(t, &with); /* control tokens have no bytes of their own */
    CHECK_EQ_INT(back.n, strlen("user\n\nHi"));
    buffer_free(&back);
    ids_free(&with);
    ids_free(&without);
    hepta_tokenizer_free(t);
}

TEST(special_tokens_of_qwen) {
    hepta_tokenizer *t = open_tokenizer("tokenizers/qwen2.5");
    CHECK_EQ_INT(hepta_tokenizer_bos(t), -1);
    CHECK(hepta_tokenizer_is_end(t, 151645) && hepta_tokenizer_is_end(t, 151643));
    /* "</s>" is HTML there, an ordinary token */
    int32_t strike = tokenizer_find(t, (const uint8_t *)"</s>", 4);
    CHECK(strike >= 0 && !hepta_tokenizer_is_end(t, strike));
    /* <tool_call> is no control token: found without asking, and it has bytes */
    ids found = encode(t, "<tool_call>{}<|im_end|>", 23, 0);
    CHECK_EQ_INT(found.items[0], 151657);
    CHECK(found.items[found.n - 1] != 151645);
    buffer back = decode(t, &found);
    CHECK_EQ_INT(back.n, 23);
    buffer_free(&back);
    ids_free(&found);
    hepta_tokenizer_free(t);
}

/* Qwen2 brings text into normal form C, GPT-2 does not. */
TEST(normal_form_c) {
    static const char composed[] = "caf\xC3\xA9 \xEA\xB0\x80 \xE1\xBB\xAD";
    static const char decomposed[] = "cafe\xCC\x81 \xE1\x84\x80\xE1\x85\xA1 u\xCC\x9B\xCC\x89";
    hepta_tokenizer *t = open_tokenizer("tokenizers/qwen2.5");
    ids a = encode(t, composed, strlen(composed), 0);
    ids b = encode(t, decomposed, strlen(decomposed), 0);
    check_same_ids(&b, &a, decomposed, strlen(decomposed));
    ids_free(&a);
    ids_free(&b);
    /* invalid bytes between stay what they are */
    ids c = encode(t,
                   "e\xFF\xCC\x81"
                   "e\xCC\x81\xFF",
                   8, 0);
    buffer back = decode(t, &c);
    CHECK_EQ_INT(back.n, 7);
    CHECK_MEM_EQ(back.data, "e\xFF\xCC\x81\xC3\xA9\xFF", 7);
    buffer_free(&back);
    ids_free(&c);
    hepta_tokenizer_free(t);
    t = open_tokenizer("tokenizers/gpt2");
    check_round_trip(t, decomposed, strlen(decomposed));
    hepta_tokenizer_free(t);
}

/* ---- Merging against a naive reference --------------------------------- */

/* Repeatedly merges the best pair of the whole chain, the leftmost of equals. */
static size_t naive_merge(const hepta_tokenizer *t, const uint8_t *text, size_t n,
                          merge_lookup lookup, merge_symbol *chain) {
    for (size_t i = 0; i < n; i++) {
        chain[i] = (merge_symbol){(uint32_t)i, 1, 0, 0, tokenizer_find(t, text + i, 1)};
    }
    for (;;) {
        size_t best = SIZE_MAX;
        uint32_t best_priority = 0, priority;
        int32_t best_id = TOKEN_NONE, id;
        for (size_t i = 0; i + 1 < n; i++) {
            if (lookup(t, text, &chain[i], &chain[i + 1], &priority, &id) &&
                (best == SIZE_MAX || priority < best_priority)) {
                best = i;
                best_priority = priority;
                best_id = id;
            }
        }
        if (best == SIZE_MAX) {
            return n;
        }
        chain[best].n += chain[best + 1].n;
        chain[best].token = best_id;
        memmove(&chain[best + 1], &chain[best + 2], (n - best - 2) * sizeof *chain);
        n--;
    }
}

/* Any pair whose text is a token, by the token's score; as spm.c does. */
static bool lookup_by_text(const hepta_tokenizer *t, const uint8_t *text, const merge_symbol *left,
                           const merge_symbol *right, uint32_t *priority, int32_t *id) {
    int32_t found = tokenizer_find(t, text + left->start, left->n + right->n);
    if (found == TOKEN_NONE) {
        return false;
    }
    *priority = (uint32_t)(1000 - (int)t->scores[found]);
    *id = found;
    return true;
}

TEST(merging_equals_naive) {
    for (int round = 0; round < 60; round++) {
        /* random pieces over "ab " with few different scores, so that ties matter */
        tiny_vocabulary v = {.n = 0};
        tiny_add(&v, "<unk>", TOKEN_UNKNOWN, 0);
        tiny_add(&v, "a", TOKEN_NORMAL, 0);
        tiny_add(&v, "b", TOKEN_NORMAL, 0);
        tiny_add(&v, "c", TOKEN_NORMAL, 0);
        for (int i = 0; i < 40; i++) {
            char piece[8];
            uint32_t n = 2 + test_random_below(5);
            for (uint32_t k = 0; k < n; k++) {
                piece[k] = (char)('a' + test_random_below(3));
            }
            piece[n] = '\0';
            tiny_add(&v, piece, TOKEN_NORMAL, (float)test_random_below(6));
        }
        hepta_tokenizer *t = tiny_open(&v);
        for (int k = 0; k < 20; k++) {
            uint8_t text[80];
            merge_symbol chain[80];
            size_t n = 1 + test_random_below(79);
            for (size_t i = 0; i < n; i++) {
                text[i] = (uint8_t)('a' + test_random_below(3));
            }
            ids expected = {.n = naive_merge(t, text, n, lookup_by_text, chain)};
            expected.items = malloc(expected.n * sizeof *expected.items);
            for (size_t i = 0; i < expected.n; i++) {
                expected.items[i] = chain[i].token;
            }
            ids found = encode(t, text, n, 0);
            check_same_ids(&found, &expected, (char *)text, n);
            ids_free(&found);
            ids_free(&expected);
        }
        hepta_tokenizer_free(t);
        tiny_free(&v);
    }
}

/* ---- Cost -------------------------------------------------------------- */

/* The kinds of text that make naive tokenizers quadratic; NULL: spaces and a digit at the end. */
static const char *const hostile_texts[] = {
    " ",
    "a",
    NULL,
    "\n",
    "7",
    "\xCC\x81\xCC\xA3",
    "'",
    "#",
    "\xFF",
    "the quick brown fox ",
    "\xE6\x88\x91\xE6\x83\xB3",
    "aA",
};

enum { N_HOSTILE = sizeof hostile_texts / sizeof *hostile_texts };

static void fill_hostile(uint8_t *text, size_t n, size_t kind) {
    const char *unit = hostile_texts[kind] != NULL ? hostile_texts[kind] : " ";
    size_t m = strlen(unit);
    for (size_t j = 0; j < n; j++) {
        text[j] = (uint8_t)unit[j % m];
    }
    text[n - 1] = hostile_texts[kind] != NULL ? text[n - 1] : '1';
}

/* The number of steps is bounded; the time only as far as quadratic behaviour would take hours. */
TEST(cost_is_linear) {
    size_t big = getenv("HEPTA_FAST") != NULL ? 1 << 16 : 1 << 20;
    static const char *const tokenizers[] = {
        "tokenizers/llama2_tokenizer.model", "tokenizers/llama3_tokenizer.model",
        "tokenizers/qwen2.5", "tokenizers/ggml-vocab/ggml-vocab-deepseek-llm.gguf"};
    uint8_t *text = malloc(big);
    double slowest = 0;
    for (size_t i = 0; i < sizeof tokenizers / sizeof *tokenizers; i++) {
        hepta_tokenizer *t = open_tokenizer(tokenizers[i]);
        for (size_t k = 0; k < N_HOSTILE; k++) {
            size_t n = k < 3 ? big : big / 8;
            fill_hostile(text, n, k);
            encode_work w = {0};
            clock_t start = clock();
            CHECK(t->kind == TOKENIZER_SPM ? spm_encode(t, text, n, true, &w)
                                           : bpe_encode(t, text, n, &w));
            double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
            CHECK(w.merge.n_steps <= 12 * (uint64_t)n); /* 3 per byte, of which there may be 3 */
            CHECK(seconds < 120);
            slowest = seconds > slowest ? seconds : slowest;
            encode_work_free(&w);
        }
        hepta_tokenizer_free(t);
    }
    free(text);
    test_note("the slowest %zu bytes took %.2f s", big, slowest);
}

TEST(words_are_found_in_linear_time) {
    enum { N = 1 << 19 };
    uint8_t *text = malloc(N);
    for (int pattern = PATTERN_GPT2; pattern <= PATTERN_DEEPSEEK_CODER; pattern++) {
        for (size_t k = 0; k < N_HOSTILE; k++) {
            fill_hostile(text, N, k);
            cover c = {text, SIZE_MAX};
            clock_t start = clock();
            CHECK(pretokenize((pretokenizer_pattern)pattern, text, N, follow, &c));
            CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 120);
            CHECK(c.next == text + N);
        }
    }
    free(text);
}

/* ---- Against other implementations ------------------------------------- */

/* tests/compare_tokenizers.py: the same ids as sentencepiece and Hugging Face's tokenizers */
TEST(tokenizers_like_references) {
    const char *python = getenv("HEPTA_PYTHON"), *build = getenv("HEPTA_BUILD");
    if (python == NULL || build == NULL || *python == '\0') {
        SKIP("HEPTA_PYTHON and HEPTA_BUILD are not set");
    }
    char data[2048], command[8192];
    snprintf(data, sizeof data, "%s", test_need_data("tokenizers"));
    data[strlen(data) - strlen("/tokenizers")] = '\0';
    snprintf(command, sizeof command,
             "'%s' tests/compare_tokenizers.py --library '%s/libhepta.so' --data '%s'", python,
             build, data);
    fflush(stdout);
    int status = system(command);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    if (code == 77 || code == 126 || code == 127) {
        SKIP("%s is missing, or has no tokenizers package, or test data is absent", python);
    }
    CHECK_EQ_INT(code, 0);
}
