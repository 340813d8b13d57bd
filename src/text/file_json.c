/*
 * file_json.c - reads Hugging Face's tokenizer.json, and the pair vocab.json and merges.txt.
 *
 * A tokenizer.json (github.com/huggingface/tokenizers) is a pipeline: added tokens, normalizer,
 * pre-tokenizer, model, post-processor. Of the many pipelines it can describe, two kinds are
 * LLaMA's and are read here; anything else is refused with the name of what is not known:
 *
 *   byte-level BPE    the pre-tokenizer ends in ByteLevel; its regular expressions are recognized
 *                     (pretokenize.c); the normalizer is nothing or NFC
 *   SentencePiece BPE spaces become U+2581 (a Replace normalizer or a Metaspace pre-tokenizer),
 *                     maybe with one put in front; bytes fall back to <0x00> ... <0xFF>
 */
#include "text/vocabulary.h"

#include <stdlib.h>
#include <string.h>

#define SPACE_MARK "\u2581"

enum { MAX_STEPS = 16 };

static hepta_status unknown_step(vocabulary *v, const char *what, const char *type) {
    return vocabulary_error(v, HEPTA_ERROR_UNSUPPORTED, "%s \"%.60s\" is not built in", what, type);
}

static const char *get_string(const json_t *object, const char *key) {
    const char *s = json_string_value(json_object_get(object, key));
    return s != NULL ? s : "";
}

static bool get_bool(const json_t *object, const char *key, bool fallback) {
    const json_t *value = json_object_get(object, key);
    return json_is_boolean(value) ? json_is_true(value) : fallback;
}

static kv_string string_of(const json_t *value) {
    return (kv_string){json_string_value(value), json_string_length(value)};
}

/* ---- Steps of a normalizer or pre-tokenizer ---------------------------- */

/* Lists the steps of a step that may be a Sequence; one level is all there is in practice. */
static hepta_status list_steps(vocabulary *v, const json_t *step, const char *children,
                               const json_t *steps[MAX_STEPS], size_t *n) {
    *n = 0;
    if (step == NULL || json_is_null(step)) {
        return HEPTA_OK;
    }
    if (strcmp(get_string(step, "type"), "Sequence") != 0) {
        steps[(*n)++] = step;
        return HEPTA_OK;
    }
    const json_t *list = json_object_get(step, children);
    if (json_array_size(list) > MAX_STEPS) {
        return vocabulary_error(v, HEPTA_ERROR_UNSUPPORTED, "%s has %zu steps; at most %d",
                                children, json_array_size(list), MAX_STEPS);
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        steps[(*n)++] = json_array_get(list, i);
    }
    return HEPTA_OK;
}

static const json_t *find_step(const json_t *const *steps, size_t n, const char *type) {
    for (size_t i = 0; i < n; i++) {
        if (strcmp(get_string(steps[i], "type"), type) == 0) {
            return steps[i];
        }
    }
    return NULL;
}

/* ---- Byte-level BPE ---------------------------------------------------- */

static hepta_status read_split(vocabulary *v, const json_t *step, const char **regex) {
    const char *behavior = get_string(step, "behavior");
    *regex = get_string(json_object_get(step, "pattern"), "Regex");
    /* Every expression known here matches all of the text, so that keeping what matches and
     * isolating what matches are the same. */
    bool isolated = strcmp(behavior, "Isolated") == 0 && !get_bool(step, "invert", false);
    bool kept = strcmp(behavior, "Removed") == 0 && get_bool(step, "invert", false);
    if (**regex == '\0' || !(isolated || kept)) {
        return unknown_step(v, "pre-tokenizer Split with the behavior", behavior);
    }
    return HEPTA_OK;
}

static hepta_status read_byte_level(vocabulary *v, const json_t *const *pre, size_t n_pre,
                                    const json_t *const *normalizers, size_t n_normalizers) {
    const char *regexes[2 * MAX_STEPS];
    size_t n = 0;
    for (size_t i = 0; i < n_pre; i++) {
        const char *type = get_string(pre[i], "type");
        hepta_status status = HEPTA_OK;
        if (strcmp(type, "Split") == 0) {
            status = read_split(v, pre[i], &regexes[n]);
            n++;
        } else if (strcmp(type, "Digits") == 0 && get_bool(pre[i], "individual_digits", false)) {
            regexes[n++] = PRETOKENIZER_DIGITS;
        } else if (strcmp(type, "ByteLevel") == 0 && !get_bool(pre[i], "add_prefix_space", true)) {
            if (get_bool(pre[i], "use_regex", true)) {
                regexes[n++] = pretokenizer_gpt2_regex();
            }
        } else {
            status = unknown_step(v, "pre-tokenizer", type);
        }
        if (status != HEPTA_OK) {
            return status;
        }
    }
    pretokenizer_pattern pattern;
    if (!pretokenizer_recognize(regexes, n, &pattern)) {
        return vocabulary_error(
            v, HEPTA_ERROR_UNSUPPORTED,
            "text is cut into words by %zu expression%s that are not built in; the "
            "first is \"%.120s\" (docs/TOKENIZERS.md lists those that are)",
            n, n == 1 ? "" : "s", n > 0 ? regexes[0] : "");
    }
    v->model = "gpt2";
    v->pre = pretokenizer_name(pattern);
    v->nfc = SETTING_FALSE;
    for (size_t i = 0; i < n_normalizers; i++) {
        const char *type = get_string(normalizers[i], "type");
        if (strcmp(type, "NFC") != 0) {
            return unknown_step(v, "normalizer", type);
        }
        v->nfc = SETTING_TRUE;
    }
    return HEPTA_OK;
}

/* ---- SentencePiece BPE ------------------------------------------------- */

/* Metaspace: spaces become U+2581, one is put in front, words may be cut before each. */
static hepta_status read_metaspace(vocabulary *v, const json_t *step) {
    if (strcmp(get_string(step, "replacement"), SPACE_MARK) != 0) {
        return unknown_step(v, "Metaspace with the replacement", get_string(step, "replacement"));
    }
    const char *scheme = get_string(step, "prepend_scheme");
    if (*scheme == '\0') { /* older files */
        scheme = get_bool(step, "add_prefix_space", true) ? "always" : "never";
    }
    if (strcmp(scheme, "always") != 0 && strcmp(scheme, "first") != 0 &&
        strcmp(scheme, "never") != 0) {
        return unknown_step(v, "Metaspace with the prepend_scheme", scheme);
    }
    v->space_prefix = strcmp(scheme, "never") == 0 ? "none" : scheme;
    v->split_spaces = setting_of(get_bool(step, "split", true));
    return HEPTA_OK;
}

static hepta_status read_spm_normalizer(vocabulary *v, const json_t *step) {
    const char *type = get_string(step, "type");
    const json_t *pattern = json_object_get(step, "pattern");
    if (strcmp(type, "Prepend") == 0 && strcmp(get_string(step, "prepend"), SPACE_MARK) == 0) {
        v->space_prefix = "segments";
        return HEPTA_OK;
    }
    if (strcmp(type, "Replace") == 0 && strcmp(get_string(pattern, "String"), " ") == 0 &&
        strcmp(get_string(step, "content"), SPACE_MARK) == 0) {
        return HEPTA_OK;
    }
    return unknown_step(v, "normalizer", type);
}

static hepta_status read_spm(vocabulary *v, const json_t *const *pre, size_t n_pre,
                             const json_t *const *normalizers, size_t n_normalizers) {
    v->model = "llama";
    v->pre = "default";
    v->space_prefix = "none";
    v->remove_extra_whitespaces = SETTING_FALSE;
    for (size_t i = 0; i < n_normalizers; i++) {
        hepta_status status = read_spm_normalizer(v, normalizers[i]);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    for (size_t i = 0; i < n_pre; i++) {
        const char *type = get_string(pre[i], "type");
        /* Splitting at spaces where the normalizer left none (Gemma). */
        bool idle = strcmp(type, "Split") == 0 && n_normalizers > 0 &&
                    strcmp(get_string(json_object_get(pre[i], "pattern"), "String"), " ") == 0;
        hepta_status status = HEPTA_OK;
        if (strcmp(type, "Metaspace") == 0) {
            status = read_metaspace(v, pre[i]);
        } else if (!idle) {
            status = unknown_step(v, "pre-tokenizer", type);
        }
        if (status != HEPTA_OK) {
            return status;
        }
    }
    v->add_space_prefix = setting_of(strcmp(v->space_prefix, "none") != 0);
    return HEPTA_OK;
}

static hepta_status read_pipeline(vocabulary *v, const json_t *root) {
    const json_t *pre[MAX_STEPS], *normalizers[MAX_STEPS];
    size_t n_pre, n_normalizers;
    hepta_status status =
        list_steps(v, json_object_get(root, "pre_tokenizer"), "pretokenizers", pre, &n_pre);
    if (status == HEPTA_OK) {
        status = list_steps(v, json_object_get(root, "normalizer"), "normalizers", normalizers,
                            &n_normalizers);
    }
    if (status != HEPTA_OK) {
        return status;
    }
    if (find_step(pre, n_pre, "ByteLevel") != NULL) {
        return read_byte_level(v, pre, n_pre, normalizers, n_normalizers);
    }
    if (find_step(pre, n_pre, "Metaspace") != NULL ||
        find_step(normalizers, n_normalizers, "Replace") != NULL) {
        return read_spm(v, pre, n_pre, normalizers, n_normalizers);
    }
    return vocabulary_error(
        v, HEPTA_ERROR_UNSUPPORTED,
        "neither byte-level BPE (a ByteLevel pre-tokenizer) nor SentencePiece BPE "
        "(Metaspace, or spaces replaced by U+2581)");
}

/* ---- Vocabulary and merge rules ---------------------------------------- */

static hepta_status read_vocab(vocabulary *v, json_t *vocab, bool byte_fallback) {
    if (json_object_size(vocab) == 0) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT, "the vocabulary is no object or empty");
    }
    v->expected = json_object_size(vocab);
    const char *key;
    json_t *id;
    json_object_foreach(vocab, key, id) {
        kv_string text = {key, strlen(key)};
        if (!json_is_integer(id) || json_integer_value(id) < 0) {
            return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                    "the vocabulary gives \"%.60s\" no id from 0 up", key);
        }
        token_type type =
            byte_fallback && vocabulary_is_byte_token(text) ? TOKEN_BYTE : TOKEN_NORMAL;
        hepta_status status = vocabulary_set(v, (uint64_t)json_integer_value(id), text, 0, type);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    return HEPTA_OK;
}

/* "a b", or in newer files ["a", "b"]. */
static hepta_status read_merge(vocabulary *v, size_t i, const json_t *rule) {
    if (json_is_string(rule)) {
        return vocabulary_add_merge(v, string_of(rule));
    }
    kv_string a = string_of(json_array_get(rule, 0)), b = string_of(json_array_get(rule, 1));
    if (json_array_size(rule) != 2 || a.n == 0 || b.n == 0 ||
        memchr(a.data, ' ', (size_t)a.n) != NULL) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT, "merge rule %zu is no pair of tokens", i);
    }
    char *joined = arena_alloc(&v->memory, (size_t)(a.n + b.n + 1), 1);
    if (joined == NULL) {
        return vocabulary_out_of_memory(v);
    }
    memcpy(joined, a.data, (size_t)a.n);
    joined[a.n] = ' ';
    memcpy(joined + a.n + 1, b.data, (size_t)b.n);
    return vocabulary_add_merge(v, (kv_string){joined, a.n + b.n + 1});
}

static hepta_status read_model(vocabulary *v, const json_t *model) {
    const char *type = get_string(model, "type");
    const json_t *merges = json_object_get(model, "merges");
    if (*type != '\0' ? strcmp(type, "BPE") != 0 : !json_is_array(merges)) {
        return unknown_step(v, "model of type", *type == '\0' ? "(none given)" : type);
    }
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < 2; i++) {
        if (*get_string(model, affixes[i]) != '\0') {
            return unknown_step(v, affixes[i], get_string(model, affixes[i]));
        }
    }
    hepta_status status =
        read_vocab(v, json_object_get(model, "vocab"), get_bool(model, "byte_fallback", false));
    v->has_merges = true;
    for (size_t i = 0; status == HEPTA_OK && i < json_array_size(merges); i++) {
        status = read_merge(v, i, json_array_get(merges, i));
    }
    if (status != HEPTA_OK) {
        return status;
    }
    v->ignore_merges = setting_of(get_bool(model, "ignore_merges", false));
    const char *unknown = get_string(model, "unk_token");
    if (*unknown != '\0') {
        v->unknown = vocabulary_find(v, unknown, strlen(unknown));
        if (v->unknown >= 0) {
            v->types[v->unknown] = TOKEN_UNKNOWN;
        }
    }
    return HEPTA_OK;
}

/* ---- Added tokens ------------------------------------------------------ */

static hepta_status read_added_token(vocabulary *v, int64_t id, const json_t *token) {
    const json_t *content = json_object_get(token, "content");
    if (!json_is_string(content) || id < 0) {
        return vocabulary_error(v, HEPTA_ERROR_FORMAT, "an added token without id or content");
    }
    token_type type = get_bool(token, "special", false) ? TOKEN_CONTROL : TOKEN_USER;
    if (id == v->unknown) {
        type = TOKEN_UNKNOWN;
    }
    hepta_status status = vocabulary_set(v, (uint64_t)id, string_of(content), 0, type);
    if (status == HEPTA_OK && get_bool(token, "lstrip", false)) {
        status = vocabulary_add_id(v, &v->strip_left, (uint32_t)id);
    }
    if (status == HEPTA_OK && get_bool(token, "rstrip", false)) {
        status = vocabulary_add_id(v, &v->strip_right, (uint32_t)id);
    }
    return status;
}

static int64_t id_in(const json_t *object, const char *key) {
    const json_t *id = json_object_get(object, key);
    return json_is_integer(id) ? json_integer_value(id) : -1;
}

static hepta_status read_added_tokens(vocabulary *v, const json_t *list) {
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *token = json_array_get(list, i);
        hepta_status status = read_added_token(v, id_in(token, "id"), token);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    return HEPTA_OK;
}

/* ---- Post-processor: what is put around a text ------------------------- */

/* The id that a template's item stands for, -1 if it is the text itself. */
static int64_t template_id(const vocabulary *v, const json_t *item) {
    const char *name = get_string(json_object_get(item, "SpecialToken"), "id");
    return *name == '\0' ? -1 : vocabulary_find(v, name, strlen(name));
}

static hepta_status read_post_processor(vocabulary *v, const json_t *root) {
    const json_t *steps[MAX_STEPS];
    size_t n;
    hepta_status status =
        list_steps(v, json_object_get(root, "post_processor"), "processors", steps, &n);
    if (status != HEPTA_OK) {
        return status;
    }
    const json_t *single = json_object_get(find_step(steps, n, "TemplateProcessing"), "single");
    size_t items = json_array_size(single);
    int64_t before = items > 0 ? template_id(v, json_array_get(single, 0)) : -1;
    int64_t after = items > 1 ? template_id(v, json_array_get(single, items - 1)) : -1;
    v->add_bos = setting_of(before >= 0);
    v->add_eos = setting_of(after >= 0);
    v->bos = before >= 0 ? before : v->bos;
    v->eos = after >= 0 ? after : v->eos;
    return HEPTA_OK;
}

/* Where nothing names BOS and EOS, those that every tokenizer of the family calls the same. */
static void guess_ids(vocabulary *v) {
    static const char *const bos[] = {"<|begin_of_text|>", "<s>"};
    static const char *const eos[] = {"<|end_of_text|>", "</s>", "<|endoftext|>"};
    for (size_t i = 0; i < sizeof bos / sizeof *bos && v->bos < 0; i++) {
        v->bos = vocabulary_find(v, bos[i], strlen(bos[i]));
    }
    for (size_t i = 0; i < sizeof eos / sizeof *eos && v->eos < 0; i++) {
        v->eos = vocabulary_find(v, eos[i], strlen(eos[i]));
    }
}

hepta_status tokenizer_json_read(vocabulary *v, json_t *root) {
    hepta_status status = read_pipeline(v, root);
    if (status == HEPTA_OK) {
        status = read_model(v, json_object_get(root, "model"));
    }
    if (status == HEPTA_OK) {
        status = read_added_tokens(v, json_object_get(root, "added_tokens"));
    }
    if (status == HEPTA_OK) {
        status = read_post_processor(v, root);
    }
    if (status == HEPTA_OK) {
        guess_ids(v);
    }
    return status;
}

/* ---- vocab.json and merges.txt ----------------------------------------- */

hepta_status vocab_json_read(vocabulary *v, json_t *root) {
    static const char end_of_text[] = "<|endoftext|>";
    v->model = "gpt2";
    hepta_status status = read_vocab(v, root, false);
    int64_t id = status == HEPTA_OK ? vocabulary_find(v, end_of_text, strlen(end_of_text)) : -1;
    if (id >= 0) { /* GPT-2 */
        v->pre = "gpt-2";
        v->types[id] = TOKEN_CONTROL;
        v->bos = v->eos = id;
    }
    return status;
}

hepta_status merges_txt_read(vocabulary *v, const uint8_t *data, size_t n) {
    v->has_merges = true;
    for (size_t i = 0; i < n;) {
        const uint8_t *end = memchr(data + i, '\n', n - i);
        size_t length = end == NULL ? n - i : (size_t)(end - (data + i));
        const char *line = (const char *)data + i;
        bool header = i == 0 && length >= 8 && memcmp(line, "#version", 8) == 0;
        i += length + 1;
        length -= length > 0 && line[length - 1] == '\r' ? 1 : 0;
        if (length > 0 && !header) {
            hepta_status status = vocabulary_add_merge(v, (kv_string){line, length});
            if (status != HEPTA_OK) {
                return status;
            }
        }
    }
    return HEPTA_OK;
}

/* ---- Configurations that lie beside a tokenizer ------------------------ */

/* The text of a token given as a string or as an added token's object; NULL: none. */
static const json_t *token_text(const json_t *config, const char *key) {
    const json_t *token = json_object_get(config, key);
    const json_t *text = json_is_object(token) ? json_object_get(token, "content") : token;
    return json_is_string(text) ? text : NULL;
}

static hepta_status read_named_id(vocabulary *v, const json_t *config, const char *key,
                                  int64_t *id) {
    const json_t *text = token_text(config, key);
    if (text != NULL) {
        kv_string s = string_of(text);
        *id = vocabulary_find(v, s.data, (size_t)s.n);
        if (*id < 0) {
            return vocabulary_error(v, HEPTA_ERROR_FORMAT,
                                    "tokenizer_config.json: %s is \"%.60s\", which is no token",
                                    key, s.data);
        }
    } else if (json_is_null(json_object_get(config, key)) && json_object_get(config, key) != NULL) {
        *id = -1;
    }
    return HEPTA_OK;
}

/* A template, or a list of named ones, of which "default" counts. */
static void read_chat_template(vocabulary *v, const json_t *config) {
    const json_t *value = json_object_get(config, "chat_template");
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *named = json_array_get(value, i);
        if (strcmp(get_string(named, "name"), "default") == 0) {
            value = json_object_get(named, "template");
            break;
        }
    }
    if (json_is_string(value)) {
        v->chat_template = string_of(value);
    }
}

static hepta_status read_class(vocabulary *v, const json_t *config) {
    static const struct {
        const char *class, *pre;
    } known[] = {
        {"GPT2Tokenizer", "gpt-2"},
        {"GPT2TokenizerFast", "gpt-2"},
        {"Qwen2Tokenizer", "qwen2"},
        {"Qwen2TokenizerFast", "qwen2"},
    };
    const char *class = get_string(config, "tokenizer_class");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(class, known[i].class) == 0) {
            v->pre = known[i].pre;
            return HEPTA_OK;
        }
    }
    return unknown_step(v, "without tokenizer.json, the tokenizer_class", class);
}

hepta_status tokenizer_config_read(vocabulary *v, const json_t *root) {
    hepta_status status = HEPTA_OK;
    const char *key;
    json_t *token;
    json_object_foreach(json_object_get(root, "added_tokens_decoder"), key, token) {
        size_t digits = strspn(key, "0123456789");
        int64_t id = digits > 0 && digits < 10 && key[digits] == '\0' ? strtoll(key, NULL, 10) : -1;
        bool known = id >= 0 && (size_t)id < v->n && v->tokens[id].data != NULL;
        /* What tokenizer.json said counts; a .model or vocab.json knows nothing of these. */
        if (!known || v->types[id] == TOKEN_NORMAL) {
            status = read_added_token(v, id, token);
        }
        if (status != HEPTA_OK) {
            return status;
        }
    }
    if (v->model != NULL && strcmp(v->model, "gpt2") == 0 && v->pre == NULL) {
        status = read_class(v, root);
    }
    if (status != HEPTA_OK || (status = read_named_id(v, root, "bos_token", &v->bos)) != HEPTA_OK ||
        (status = read_named_id(v, root, "eos_token", &v->eos)) != HEPTA_OK) {
        return status;
    }
    if (json_is_boolean(json_object_get(root, "add_bos_token"))) {
        v->add_bos = setting_of(get_bool(root, "add_bos_token", false));
    }
    if (json_is_boolean(json_object_get(root, "add_eos_token"))) {
        v->add_eos = setting_of(get_bool(root, "add_eos_token", false));
    }
    read_chat_template(v, root);
    return HEPTA_OK;
}

hepta_status generation_config_read(vocabulary *v, const json_t *root) {
    const json_t *eos = json_object_get(root, "eos_token_id");
    size_t n = json_is_array(eos) ? json_array_size(eos) : 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *item = json_is_array(eos) ? json_array_get(eos, i) : eos;
        int64_t id = json_is_integer(item) ? json_integer_value(item) : -1;
        if (id < 0 || id >= (int64_t)v->n) {
            continue; /* null, or a row of the embedding that is no token */
        }
        v->eos = v->eos < 0 ? id : v->eos;
        hepta_status status = vocabulary_add_id(v, &v->end_ids, (uint32_t)id);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    int64_t bos = id_in(root, "bos_token_id");
    if (v->bos < 0 && bos >= 0 && bos < (int64_t)v->n && v->add_bos == SETTING_TRUE) {
        v->bos = bos;
    }
    return HEPTA_OK;
}
