/*
 * test_text_files.c - reading tokenizer files: what each kind means, what is refused and how,
 * damaged files, failing allocations.
 */
#include "test.h"

#include "base/base.h"
#include "format/container.h"
#include "text/tokenizer.h"
#include "text/vocabulary.h"

#include <stdlib.h>
#include <sys/stat.h>

#include "text_util.h"

/* ---- Small files made here --------------------------------------------- */

static const char *write_file(const char *directory, const char *name, const void *data, size_t n) {
    static char path[1024];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    write_whole(path, data, n);
    return path;
}

static hepta_status open_path(const char *path, hepta_tokenizer **t, hepta_error *err) {
    *t = NULL;
    return hepta_tokenizer_open(NULL, path, t, err);
}

/* Opens a file of this text; it must succeed. */
static hepta_tokenizer *open_text(const char *name, const char *text) {
    hepta_tokenizer *t;
    hepta_error err = {0};
    CHECK_OK(open_path(write_file(test_tmp_dir(), name, text, strlen(text)), &t, &err));
    return t;
}

/* Opening must fail with this status and mention this. */
static void check_refused(const char *path, hepta_status status, const char *mention) {
    hepta_tokenizer *t;
    hepta_error err = {0};
    CHECK_EQ_INT(open_path(path, &t, &err), status);
    CHECK(t == NULL);
    if (strstr(err.message, mention) == NULL) {
        test_fail(__FILE__, __LINE__, "\"%s\" does not mention \"%s\"", err.message, mention);
    }
}

static void check_text_refused(const char *text, hepta_status status, const char *mention) {
    check_refused(write_file(test_tmp_dir(), "tokenizer.json", text, strlen(text)), status,
                  mention);
}

/* A small SentencePiece vocabulary with byte fallback: "ab" and "abc" merge. */
static void small_pieces(tiny_vocabulary *v) {
    *v = (tiny_vocabulary){.n = 0};
    tiny_add(v, "<unk>", TOKEN_UNKNOWN, 0);
    tiny_add(v, "<s>", TOKEN_CONTROL, 0);
    tiny_add(v, "</s>", TOKEN_CONTROL, 0);
    for (int b = 0; b < 256; b++) {
        char name[16];
        snprintf(name, sizeof name, "<0x%02X>", b);
        tiny_add(v, name, TOKEN_BYTE, 0);
    }
    static const char *const pieces[] = {"\u2581a", "ab", "abc", "\u2581", "a", "b", "c", "\u00E9"};
    for (int i = 0; i < 8; i++) {
        tiny_add(v, pieces[i], TOKEN_NORMAL, (float)-i);
    }
}

enum { SMALL_A = 259, SMALL_AB = 260, SMALL_SPACE = 262, SMALL_C = 265, SMALL_E = 266 };

/* The same as llama2.c's tokenizer.bin. */
static size_t small_llama2c(uint8_t *out) {
    tiny_vocabulary v;
    size_t n = 4;
    small_pieces(&v);
    memcpy(out, "\x06\0\0\0", 4);
    for (int i = 0; i < v.n; i++) {
        const char *s = i == 1 ? "\n<s>\n" : i == 2 ? "\n</s>\n" : v.pieces[i];
        bool space = strncmp(s, "\u2581", 3) == 0;
        uint32_t length = (uint32_t)(strlen(s) - (space ? 2 : 0));
        memcpy(out + n, &v.scores[i], 4);
        memcpy(out + n + 4, &length, 4);
        memcpy(out + n + 8, space ? " " : s, 1);
        memcpy(out + n + 9, s + (space ? 3 : 1), length - 1);
        n += 8 + length;
    }
    tiny_free(&v);
    return n;
}

static size_t small_protobuf(int model_type, uint8_t *out) {
    tiny_vocabulary v;
    small_pieces(&v);
    size_t n = tiny_protobuf(&v, model_type, out);
    tiny_free(&v);
    return n;
}

/* A byte-level tokenizer.json: 256 bytes, then "ab" 256, "abc" 257, " a" 258; added 259, 260. */
static char *small_json(const char *pipeline, const char *model) {
    size_t size = 16384, n = 0;
    char *json = malloc(size);
    n += (size_t)snprintf(json + n, size - n,
                          "{\"added_tokens\": [{\"id\": 259, \"content\": \"<|eot_id|>\", "
                          "\"special\": true}, {\"id\": 260, \"content\": \"<tool>\", \"special\": "
                          "false, \"lstrip\": true, \"rstrip\": true}], %s, \"model\": {%s, "
                          "\"vocab\": {",
                          pipeline, model);
    for (int b = 0; b < 256; b++) {
        n += (size_t)snprintf(json + n, size - n, "\"\\u%04x\": %d, ",
                              (unsigned)bpe_code_point_of((uint8_t)b), b);
    }
    snprintf(
        json + n, size - n,
        "\"ab\": 256, \"abc\": 257, \"\\u0120a\": 258}, \"merges\": [\"a b\", [\"ab\", \"c\"], "
        "\"\\u0120 a\"]}}");
    return json;
}

#define LLAMA3_SPLIT                                                                               \
    "\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", "       \
    "\"pattern\": {\"Regex\": "                                                                    \
    "\"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}| "       \
    "?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"}, "      \
    "\"behavior\": \"Isolated\", \"invert\": false}, {\"type\": \"ByteLevel\", "                   \
    "\"add_prefix_space\": false, \"use_regex\": false}]}"
#define GPT2_SPLIT "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}"

static void check_ids(const hepta_tokenizer *t, const char *text, unsigned flags, size_t n,
                      const int32_t *expected) {
    ids found = encode(t, text, strlen(text), flags);
    ids wanted = {(int32_t *)(uintptr_t)expected, n};
    check_same_ids(&found, &wanted, text, strlen(text));
    ids_free(&found);
}

#define CHECK_IDS(t, text, flags, ...)                                                             \
    do {                                                                                           \
        const int32_t test_ids_[] = {__VA_ARGS__};                                                 \
        check_ids(t, text, flags, sizeof test_ids_ / sizeof *test_ids_, test_ids_);                \
    } while (0)

/* ---- SentencePiece ----------------------------------------------------- */

TEST(sentencepiece_protobuf) {
    uint8_t data[16384];
    hepta_tokenizer *t;
    hepta_error err = {0};
    const char *dir = test_tmp_dir();
    size_t n = small_protobuf(2, data);
    CHECK_OK(open_path(write_file(dir, "m.model", data, n), &t, &err));
    CHECK_EQ_INT(hepta_tokenizer_size(t), 267);
    CHECK_IDS(t, "abc", HEPTA_ENCODE_BOS, 1, SMALL_A, 264, SMALL_C); /* "\u2581a" goes first */
    CHECK_IDS(t, "x\xC3\xA9\xFF", 0, SMALL_SPACE, 3 + 'x', SMALL_E, 3 + 0xFF);
    CHECK_IDS(t, "<s>c", 0, SMALL_SPACE, 3 + '<', 3 + 's', 3 + '>', SMALL_C);
    CHECK_IDS(t, "<s>c", HEPTA_ENCODE_SPECIAL, 1, SMALL_SPACE, SMALL_C);
    hepta_tokenizer_free(t);
    check_refused(write_file(dir, "u.model", data, small_protobuf(1, data)),
                  HEPTA_ERROR_UNSUPPORTED, "unigram");
}

TEST(llama2c_equals_protobuf) {
    uint8_t data[16384];
    hepta_tokenizer *a, *b;
    hepta_error err = {0};
    const char *dir = test_tmp_dir();
    size_t n = small_protobuf(2, data);
    CHECK_OK(open_path(write_file(dir, "m.model", data, n), &a, &err));
    n = small_llama2c(data);
    CHECK_OK(open_path(write_file(dir, "tokenizer.bin", data, n), &b, &err));
    for (int round = 0; round < 200; round++) {
        uint8_t text[60];
        size_t k = test_random_below(sizeof text);
        for (size_t i = 0; i < k; i++) {
            text[i] = (uint8_t) " abcx\xC3"[test_random_below(6)];
        }
        ids x = encode(a, text, k, HEPTA_ENCODE_BOS), y = encode(b, text, k, HEPTA_ENCODE_BOS);
        check_same_ids(&x, &y, (char *)text, k);
        ids_free(&x);
        ids_free(&y);
    }
    hepta_tokenizer_free(a);
    hepta_tokenizer_free(b);
}

/* Without byte tokens what is unknown is one unknown token, however long. */
TEST(unknown_pieces_are_fused) {
    tiny_vocabulary v = {.n = 0};
    tiny_add(&v, "<unk>", TOKEN_UNKNOWN, 0);
    tiny_add(&v, "a", TOKEN_NORMAL, 0);
    hepta_tokenizer *t = tiny_open(&v);
    CHECK_IDS(t,
              "xyza\xC3\xA9\xFF"
              "a",
              0, 0, 1, 0, 1);
    hepta_tokenizer_free(t);
    tiny_free(&v);
}

/* ---- tokenizer.json ---------------------------------------------------- */

TEST(json_byte_level) {
    char *json = small_json(LLAMA3_SPLIT, "\"type\": \"BPE\", \"ignore_merges\": true");
    hepta_tokenizer *t = open_text("tokenizer.json", json);
    CHECK_EQ_STR(t->pre->name, "llama-bpe");
    CHECK(t->ignore_merges && !t->nfc && !t->add_bos);
    CHECK_IDS(t, "abc aab", 0, 257, 258, 256);
    CHECK_IDS(t, "abc<|eot_id|>", HEPTA_ENCODE_SPECIAL, 257, 259);
    CHECK(hepta_tokenizer_is_end(t, 259) && !hepta_tokenizer_is_end(t, 260));
    CHECK_IDS(t, "abc \n<tool>  abc", 0, 257, 260, 257); /* strips on both sides */
    CHECK_IDS(t, "<tool><tool>", 0, 260, 260);
    hepta_tokenizer_free(t);
    free(json);
    json = small_json(GPT2_SPLIT ", \"normalizer\": {\"type\": \"NFC\"}", "\"type\": \"BPE\"");
    t = open_text("tokenizer.json", json);
    CHECK_EQ_STR(t->pre->name, "gpt-2");
    CHECK(!t->ignore_merges && t->nfc);
    hepta_tokenizer_free(t);
    free(json);
}

TEST(json_refusals_name_what_is_unknown) {
    static const struct {
        const char *pipeline, *model, *mention;
        hepta_status status;
    } cases[] = {
        {GPT2_SPLIT, "\"type\": \"Unigram\"", "Unigram", HEPTA_ERROR_UNSUPPORTED},
        {GPT2_SPLIT, "\"type\": \"BPE\", \"end_of_word_suffix\": \"</w>\"", "</w>",
         HEPTA_ERROR_UNSUPPORTED},
        {GPT2_SPLIT ", \"normalizer\": {\"type\": \"Lowercase\"}", "\"type\": \"BPE\"", "Lowercase",
         HEPTA_ERROR_UNSUPPORTED},
        {"\"pre_tokenizer\": {\"type\": \"Whitespace\"}", "\"type\": \"BPE\"", "byte-level",
         HEPTA_ERROR_UNSUPPORTED},
        {"\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", "
         "\"pattern\": {\"Regex\": \"[aeiou]+\"}, \"behavior\": \"Isolated\"}, {\"type\": "
         "\"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}]}",
         "\"type\": \"BPE\"", "[aeiou]+", HEPTA_ERROR_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *json = small_json(cases[i].pipeline, cases[i].model);
        check_text_refused(json, cases[i].status, cases[i].mention);
        free(json);
    }
    check_text_refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}, " GPT2_SPLIT
                       "}",
                       HEPTA_ERROR_FORMAT, "empty");
    check_text_refused(
        "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}, " GPT2_SPLIT "}",
        HEPTA_ERROR_FORMAT, "\"a\"");
    check_text_refused("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 9999999}, \"merges\": "
                       "[]}, " GPT2_SPLIT "}",
                       HEPTA_ERROR_FORMAT, "9999999");
    check_text_refused(
        "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": "
        "[]}, " GPT2_SPLIT "}",
        HEPTA_ERROR_FORMAT, "both");
    check_text_refused(
        "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]"
        "}, " GPT2_SPLIT "}",
        HEPTA_ERROR_FORMAT, "\"a b\"");
    check_text_refused("{\"model\": ", HEPTA_ERROR_FORMAT, "line 1");
}

/* The pipelines in which Hugging Face writes SentencePiece tokenizers. */
TEST(json_sentencepiece) {
    static const char rest[] =
        "\"model\": {\"type\": \"BPE\", \"unk_token\": \"<unk>\", \"byte_fallback\": true, "
        "\"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"</s>\": 2, \"\u2581\": 3, \"a\": 4, \"\u2581a\": "
        "5, "
        "\"\u2581\u2581\": 6, \"<0x62>\": 7}, \"merges\": [\"\u2581 a\", \"\u2581 \u2581\"]}, "
        "\"added_tokens\": [{\"id\": 0, \"content\": \"<unk>\", \"special\": true}, {\"id\": 1, "
        "\"content\": \"<s>\", \"special\": true}], \"post_processor\": {\"type\": "
        "\"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<s>\"}}, "
        "{\"Sequence\": "
        "{\"id\": \"A\"}}]}}";
    static const struct {
        const char *pipeline;
        int n_plain, n_spaced, n_later;
        int32_t plain[4], spaced[4], later[4]; /* "a", "  a", "<s>a" */
    } cases[] = {
        {"\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", "
         "\"prepend\": \"\u2581\"}, {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, "
         "\"content\": \"\u2581\"}]}",
         1,
         2,
         2,
         {5},
         {6, 5},
         {1, 5}},
        {"\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"\u2581\", "
         "\"prepend_scheme\": \"first\", \"split\": false}",
         1,
         2,
         2,
         {5},
         {3, 5},
         {1, 4}},
        {"\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"\u2581\", "
         "\"add_prefix_space\": true}",
         1,
         2,
         2,
         {5},
         {3, 5},
         {1, 5}},
        {"\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": "
         "\"\u2581\"}",
         1,
         2,
         2,
         {4},
         {3, 5},
         {1, 4}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char json[2048];
        snprintf(json, sizeof json, "{%s, %s", cases[i].pipeline, rest);
        hepta_tokenizer *t = open_text("tokenizer.json", json);
        CHECK(t->add_bos && t->bos == 1 && t->eos == 2 && t->unknown == 0);
        check_ids(t, "a", 0, (size_t)cases[i].n_plain, cases[i].plain);
        check_ids(t, "  a", 0, (size_t)cases[i].n_spaced, cases[i].spaced);
        check_ids(t, "<s>a", HEPTA_ENCODE_SPECIAL, (size_t)cases[i].n_later, cases[i].later);
        hepta_tokenizer_free(t);
    }
}

TEST(json_with_configurations_beside) {
    const char *dir = test_tmp_dir();
    char *json = small_json(GPT2_SPLIT, "\"type\": \"BPE\"");
    static const char config[] =
        "{\"bos_token\": {\"content\": \"<|bos|>\"}, \"eos_token\": \"abc\", \"add_bos_token\": "
        "true, \"added_tokens_decoder\": {\"300\": {\"content\": \"<|bos|>\", \"special\": true}}, "
        "\"chat_template\": [{\"name\": \"tool\", \"template\": \"T\"}, {\"name\": \"default\", "
        "\"template\": \"D\"}]}";
    static const char generation[] = "{\"eos_token_id\": [259, 258, 100000]}";
    write_file(dir, "tokenizer.json", json, strlen(json));
    write_file(dir, "tokenizer_config.json", config, strlen(config));
    write_file(dir, "generation_config.json", generation, strlen(generation));
    container *c = memory_alloc(1, sizeof *c);
    hepta_tokenizer *t = NULL;
    hepta_error err = {0};
    c->path = "test";
    CHECK_OK(tokenizer_file_read(dir, c, &err));
    CHECK_EQ_STR(container_get_string(c, "tokenizer.chat_template"), "D");
    CHECK_OK(tokenizer_from_container(c, &t, &err));
    CHECK_EQ_INT(hepta_tokenizer_size(t), 301);
    CHECK_EQ_INT(hepta_tokenizer_bos(t), 300);
    CHECK(t->add_bos && hepta_tokenizer_is_end(t, 257) && hepta_tokenizer_is_end(t, 258));
    CHECK_EQ_INT(hepta_tokenizer_decode(t, 280, false, false, NULL, 0), 8); /* a gap: "[PAD280]" */
    hepta_tokenizer_free(t);
    container_close(c);
    free(json);
}

/* ---- The others -------------------------------------------------------- */

TEST(directories_and_pairs) {
    hepta_tokenizer *t;
    hepta_error err = {0};
    char *json = small_json(GPT2_SPLIT, "\"type\": \"BPE\"");
    const char *vocab = strstr(json, "\"vocab\": ") + 9;
    size_t n = (size_t)(strstr(vocab, "}") - vocab);
    char *text = malloc(n + 64);
    memcpy(text, vocab, n);
    n += (size_t)sprintf(text + n, ", \"<|endoftext|>\": 259}");
    const char *dir = test_tmp_dir();
    check_refused(dir, HEPTA_ERROR_IO, "tokenizer.json");
    check_refused(write_file(dir, "my_vocab.json", text, n), HEPTA_ERROR_IO, "merges.txt");
    static const char merges[] = "#version: 0.2\na b\nab c\r\n\xC4\xA0 a\n";
    write_file(dir, "my_merges.txt", merges, strlen(merges));
    CHECK_OK(open_path(dir, &t, &err));
    CHECK_IDS(t, "abc aab", 0, 257, 258, 256);
    CHECK(hepta_tokenizer_is_end(t, 259) && hepta_tokenizer_bos(t) == 259);
    hepta_tokenizer_free(t);
    write_file(dir, "other_merges.txt", merges, strlen(merges));
    check_refused(dir, HEPTA_ERROR_ARGUMENT, "there are 2");
    free(text);
    free(json);
}

TEST(other_refusals) {
    const char *dir = test_tmp_dir();
    char path[1100];
    snprintf(path, sizeof path, "%s/missing", dir);
    check_refused(path, HEPTA_ERROR_IO, "missing");
    check_refused(write_file(dir, "empty", "", 0), HEPTA_ERROR_FORMAT, "without a single byte");
    check_refused(write_file(dir, "ranks", "IQ== 0\nIg== 1\n", 14), HEPTA_ERROR_UNSUPPORTED,
                  "2 ranks");
    check_refused(write_file(dir, "ranks", "IQ== 0\nIg== 0\n", 14), HEPTA_ERROR_UNSUPPORTED,
                  "line 2");
    check_refused(write_file(dir, "text", "hello world\n", 12), HEPTA_ERROR_FORMAT, "line 1");
    hepta_error err = {0};
    hepta_tokenizer *t = NULL;
    CHECK_EQ_INT(hepta_tokenizer_open(NULL, NULL, &t, &err), HEPTA_ERROR_ARGUMENT);
    hepta_tokenizer_free(NULL);
}

/* A container whose keys are wrong in one respect each. */
TEST(container_refusals) {
    static const struct {
        const char *model, *pre, *mention;
        int n_types, type;
        uint32_t bos;
        bool scores, merges;
    } cases[] = {
        {"bert", "", "bert", 3, 1, 0, true, true},
        {"gpt2", "falcon", "\"falcon\"", 3, 1, 0, true, true},
        {"gpt2", "gpt-2", "merge rules", 3, 1, 0, true, false},
        {"llama", "", "scores", 3, 1, 0, false, false},
        {"llama", "", "2 items", 2, 1, 0, true, false},
        {"llama", "", "type 9", 3, 9, 0, true, false},
        {"llama", "", "<0x00>", 3, TOKEN_BYTE, 0, true, false},
        {"llama", "", "bos_token_id is 3", 3, 1, 3, true, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        static const kv_string tokens[] = {{"a", 1}, {"b", 1}, {"ab", 2}};
        static const kv_string merges[] = {{"a b", 3}};
        static const float scores[3] = {0};
        int32_t types[] = {cases[i].type, 1, 1};
        container *c = memory_alloc(1, sizeof *c);
        hepta_tokenizer *t = NULL;
        hepta_error err = {0};
        c->path = "test";
        CHECK_OK(container_set_string(c, "tokenizer.ggml.model", cases[i].model,
                                      strlen(cases[i].model), &err));
        CHECK_OK(container_set_string(c, "tokenizer.ggml.pre", cases[i].pre, strlen(cases[i].pre),
                                      &err));
        CHECK_OK(container_set_array(c, "tokenizer.ggml.tokens", KV_STRING, tokens, 3, &err));
        CHECK_OK(container_set_array(c, "tokenizer.ggml.token_type", KV_I32, types,
                                     (uint64_t)cases[i].n_types, &err));
        CHECK_OK(container_set_u32(c, "tokenizer.ggml.bos_token_id", cases[i].bos, &err));
        if (cases[i].scores) {
            CHECK_OK(container_set_array(c, "tokenizer.ggml.scores", KV_F32, scores, 3, &err));
        }
        if (cases[i].merges) {
            CHECK_OK(container_set_array(c, "tokenizer.ggml.merges", KV_STRING, merges, 1, &err));
        }
        CHECK(tokenizer_from_container(c, &t, &err) != HEPTA_OK);
        CHECK(t == NULL);
        if (strstr(err.message, cases[i].mention) == NULL) {
            test_fail(__FILE__, __LINE__, "\"%s\" does not mention \"%s\"", err.message,
                      cases[i].mention);
        }
        container_close(c);
    }
}

/* A byte that no token stands for, with neither byte tokens nor an unknown one. */
TEST(encode_failure_leaves_outputs) {
    tiny_vocabulary v = {.n = 0};
    tiny_add(&v, "a", TOKEN_NORMAL, 0);
    tiny_add(&v, "b", TOKEN_NORMAL, 0);
    hepta_tokenizer *t = tiny_open(&v);
    t->unknown = TOKEN_NONE;
    int32_t out[4] = {-5, -5, -5, -5};
    size_t n = 77;
    hepta_error err = {0};
    CHECK_EQ_INT(hepta_tokenizer_encode(t, "abz", 3, 0, out, 4, &n, &err), HEPTA_ERROR_UNSUPPORTED);
    CHECK(strstr(err.message, "0x7A") != NULL);
    CHECK(n == 77 && out[0] == -5);
    hepta_tokenizer_free(t);
    tiny_free(&v);
}

/* ---- Damage ------------------------------------------------------------ */

/* Opens a damaged file: any answer will do, but none of the memory checkers may complain. */
static void try_damaged(const char *path, const void *data, size_t n, int *opened) {
    static const char text[] = "a\xC3\xA9<s>\xFF  abc";
    hepta_tokenizer *t;
    hepta_error err = {0};
    write_whole(path, data, n);
    if (open_path(path, &t, &err) == HEPTA_OK) {
        int32_t found[64];
        size_t k = 0;
        if (hepta_tokenizer_encode(t, text, strlen(text), 3, found, 64, &k, &err) == HEPTA_OK) {
            for (size_t i = 0; i < k && i < 64; i++) {
                char piece[32];
                hepta_tokenizer_decode(t, found[i], i == 0, true, piece, sizeof piece);
            }
        }
        hepta_tokenizer_free(t);
        ++*opened;
    } else {
        CHECK(err.status != HEPTA_OK && err.message[0] != '\0');
    }
}

static void check_damage(const char *name, const uint8_t *data, size_t n, int rounds) {
    char path[1100];
    uint8_t *copy = malloc(n + 1);
    int opened = 0;
    snprintf(path, sizeof path, "%s/%s", test_tmp_dir(), name);
    for (int i = 0; i < rounds; i++) {
        size_t cut = i < 40 ? (size_t)i : (size_t)(test_random() % n);
        try_damaged(path, data, cut < n ? cut : n, &opened);
    }
    for (int i = 0; i < rounds; i++) {
        memcpy(copy, data, n);
        for (uint32_t k = 1 + test_random_below(4); k > 0; k--) {
            size_t at = (size_t)(test_random() % (i % 2 == 0 || n < 400 ? n : 400));
            copy[at] ^= (uint8_t)(1u << test_random_below(8));
        }
        try_damaged(path, copy, n, &opened);
    }
    test_note("%s: %d of %d damaged files opened", name, opened, 2 * rounds);
    free(copy);
}

TEST(damaged_sentencepiece) {
    uint8_t data[16384];
    check_damage("m.model", data, small_protobuf(2, data), 400);
}

TEST(damaged_llama2c) {
    uint8_t data[16384];
    check_damage("tokenizer.bin", data, small_llama2c(data), 400);
}

TEST(damaged_json) {
    char *json = small_json(LLAMA3_SPLIT, "\"type\": \"BPE\", \"ignore_merges\": true");
    check_damage("tokenizer.json", (uint8_t *)json, strlen(json), 300);
    free(json);
}

TEST(damaged_tiktoken) {
    buffer b = read_whole(test_need_data("tokenizers/llama3_tokenizer.model"));
    check_damage("tokenizer.model", b.data, b.n, 12);
    buffer_free(&b);
}

TEST(damaged_gguf) {
    buffer b = read_whole(test_need_data("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf"));
    check_damage("vocab.gguf", b.data, b.n, 60);
    buffer_free(&b);
}

/* ---- Failing allocations ----------------------------------------------- */

/* Lets every allocation of opening and encoding fail in turn. */
static void check_allocation_failures(const char *name, const void *data, size_t n) {
    const char *path = write_file(test_tmp_dir(), name, data, n);
    uint64_t k = 1;
    for (bool done = false; !done; k++) {
        hepta_tokenizer *t = NULL;
        hepta_error err = {0};
        int32_t found[64];
        size_t n_found = 99;
        memory_fail_after(k);
        hepta_status status = hepta_tokenizer_open(NULL, path, &t, &err);
        if (status == HEPTA_OK) {
            status =
                hepta_tokenizer_encode(t, "abc e\xCC\x81 abc", 11, 3, found, 64, &n_found, &err);
            done = status == HEPTA_OK;
            CHECK(done == (n_found != 99));
        } else {
            CHECK(t == NULL);
        }
        memory_fail_after(0);
        CHECK(done || status == HEPTA_ERROR_MEMORY);
        hepta_tokenizer_free(t);
    }
    CHECK(k > 8);
    test_note("%s: %d allocations", name, (int)k - 2);
}

TEST(allocation_failures) {
    uint8_t data[16384];
    check_allocation_failures("m.model", data, small_protobuf(2, data));
    check_allocation_failures("tokenizer.bin", data, small_llama2c(data));
    char *json =
        small_json(GPT2_SPLIT ", \"normalizer\": {\"type\": \"NFC\"}", "\"type\": \"BPE\"");
    check_allocation_failures("tokenizer.json", json, strlen(json));
    free(json);
}
