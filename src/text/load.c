/*
 * load.c - builds a tokenizer from a container's tokenizer.* keys.
 *
 * The vocabulary's strings become the bytes that stand in running text: U+2581 becomes a space in
 * SentencePiece pieces, GPT-2's byte alphabet becomes bytes in byte-level tokens, <0x0A> becomes
 * byte 10. Merge rules "a b" become triples of ids. Everything is checked here, once.
 *
 * Keys: the GGUF specification, "Tokenizer" (github.com/ggml-org/ggml, docs/gguf.md).
 */
#include "text/tokenizer.h"
#include "text/utf8.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

/* What is needed while loading only. */
typedef struct loader {
    hepta_tokenizer *t;
    const container *c;
    hepta_error *err;
} loader;

/* For "%.*s": a string from a file, not longer than fits a message. */
#define SHOWN(s) ((int)((s).n < 60 ? (s).n : 60)), (s).data

static hepta_status out_of_memory(const loader *l) {
    return error_set(l->err, HEPTA_ERROR_MEMORY, "out of memory reading the tokenizer of %s",
                     l->c->path);
}

/* The array under `key`, NULL if the key is absent. */
static hepta_status get_array(const loader *l, const char *key, bool strings, const kv **out) {
    const kv *k = container_find(l->c, key);
    *out = NULL;
    if (k == NULL) {
        return HEPTA_OK;
    }
    bool fits = k->type == KV_ARRAY && (k->n_items == 0 || (k->item_type == KV_STRING) == strings);
    if (!fits || k->item_type == KV_ARRAY) {
        return error_set(l->err, HEPTA_ERROR_FORMAT, "%s: key %s is not an array of %s", l->c->path,
                         key, strings ? "strings" : "numbers");
    }
    *out = k;
    return HEPTA_OK;
}

/* An array of numbers, one per token; NULL if the key is absent. */
static hepta_status get_per_token(const loader *l, const char *key, const kv **out) {
    hepta_status status = get_array(l, key, false, out);
    if (status == HEPTA_OK && *out != NULL && (*out)->n_items != l->t->n_tokens) {
        status = error_set(l->err, HEPTA_ERROR_FORMAT,
                           "%s: key %s has %" PRIu64 " items; expected one for each of %" PRIu32
                           " tokens",
                           l->c->path, key, (*out)->n_items, l->t->n_tokens);
    }
    return status;
}

static kv_string get_string(const loader *l, const char *key) {
    const kv *k = container_find(l->c, key);
    return k != NULL && k->type == KV_STRING ? k->v.s : (kv_string){"", 0};
}

static bool is(kv_string s, const char *text) {
    return s.n == strlen(text) && memcmp(s.data, text, s.n) == 0;
}

/* ---- Tokens ------------------------------------------------------------ */

static int hex_digit(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
}

/* The byte of "<0x0A>", or -1. */
static int parse_byte_token(kv_string s) {
    if (s.n != 6 || memcmp(s.data, "<0x", 3) != 0 || s.data[5] != '>') {
        return -1;
    }
    int high = hex_digit(s.data[3]), low = hex_digit(s.data[4]);
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

/* Replaces U+2581 by spaces; at most s.n bytes. */
static size_t decode_piece(kv_string s, uint8_t *out) {
    size_t k = 0;
    for (size_t i = 0; i < s.n;) {
        if (s.n - i >= 3 && memcmp(s.data + i, "\xE2\x96\x81", 3) == 0) {
            out[k++] = ' ';
            i += 3;
        } else {
            out[k++] = (uint8_t)s.data[i++];
        }
    }
    return k;
}

/* Reads GPT-2's byte alphabet; what is outside of it stays as it is. At most s.n bytes. */
static size_t decode_byte_level(kv_string s, uint8_t *out) {
    const uint8_t *bytes = (const uint8_t *)s.data;
    size_t k = 0;
    for (size_t i = 0; i < s.n;) {
        uint32_t c = 0;
        size_t n = utf8_decode(bytes + i, s.n - i, &c);
        int byte = n == 0 ? -1 : bpe_byte_of(c);
        n = n == 0 ? 1 : n;
        if (byte >= 0) {
            out[k++] = (uint8_t)byte;
        } else {
            memcpy(out + k, bytes + i, n);
            k += n;
        }
        i += n;
    }
    return k;
}

static size_t decode_token(tokenizer_kind kind, token_type type, kv_string s, uint8_t *out) {
    bool literal = type == TOKEN_CONTROL || type == TOKEN_UNKNOWN;
    if (kind == TOKENIZER_SPM && type == TOKEN_BYTE) {
        out[0] = (uint8_t)parse_byte_token(s);
        return 1;
    }
    if (kind == TOKENIZER_SPM && !literal) {
        return decode_piece(s, out);
    }
    if (kind == TOKENIZER_BPE && !literal && type != TOKEN_USER) {
        return decode_byte_level(s, out);
    }
    if (s.n > 0) {
        memcpy(out, s.data, s.n);
    }
    return s.n;
}

/* The type of a token where the file gives none. */
static token_type guess_type(const hepta_tokenizer *t, uint32_t i, kv_string s) {
    if ((int32_t)i == t->unknown) {
        return TOKEN_UNKNOWN;
    }
    if ((int32_t)i == t->bos || (int32_t)i == t->eos) {
        return TOKEN_CONTROL;
    }
    return t->kind == TOKENIZER_SPM && parse_byte_token(s) >= 0 ? TOKEN_BYTE : TOKEN_NORMAL;
}

static hepta_status load_tokens(loader *l, const kv *strings) {
    hepta_tokenizer *t = l->t;
    const kv *types;
    hepta_status status = get_per_token(l, "tokenizer.ggml.token_type", &types);
    if (status != HEPTA_OK) {
        return status;
    }
    uint64_t total = 0;
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        if (add_overflows(total, kv_item_string(strings, i).n + 1, &total)) {
            return out_of_memory(l);
        }
    }
    t->tokens = arena_alloc(&t->memory, t->n_tokens, sizeof *t->tokens);
    uint8_t *bytes = arena_alloc(&t->memory, (size_t)total, 1);
    if (t->tokens == NULL || bytes == NULL) {
        return out_of_memory(l);
    }
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        kv_string s = kv_item_string(strings, i);
        int64_t type = types != NULL ? kv_item_i64(types, i) : guess_type(t, i, s);
        if (type < TOKEN_NORMAL || type > TOKEN_BYTE) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: token %" PRIu32 " (\"%.*s\") has type %" PRId64
                             "; expected 1 to 6",
                             l->c->path, i, SHOWN(s), type);
        }
        if (t->kind == TOKENIZER_SPM && type == TOKEN_BYTE && parse_byte_token(s) < 0) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: byte token %" PRIu32 " is \"%.*s\"; expected <0x00> to <0xFF>",
                             l->c->path, i, SHOWN(s));
        }
        if (s.n > TOKENIZER_MAX_TOKEN) {
            return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                             "%s: token %" PRIu32 " has %" PRIu64 " bytes; at most %d", l->c->path,
                             i, s.n, TOKENIZER_MAX_TOKEN);
        }
        size_t n = decode_token(t->kind, (token_type)type, s, bytes);
        t->tokens[i] = (token_info){.text = bytes, .n = (uint32_t)n, .type = (uint8_t)type};
        bytes += n;
    }
    return HEPTA_OK;
}

/* May plain text become this token? */
static bool is_mergeable(const hepta_tokenizer *t, const token_info *k) {
    return k->n > 0 &&
           (k->type == TOKEN_NORMAL || k->type == TOKEN_USER ||
            (t->kind == TOKENIZER_BPE && (k->type == TOKEN_UNUSED || k->type == TOKEN_BYTE)));
}

/* Enters the tokens of one type, lowest ids first; the first of equal texts stays. */
static void enter_by_text(hepta_tokenizer *t, bool normal) {
    size_t mask = t->n_by_text - 1;
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        const token_info *k = &t->tokens[i];
        if (!is_mergeable(t, k) || (k->type == TOKEN_NORMAL) != normal ||
            tokenizer_find(t, k->text, k->n) != TOKEN_NONE) {
            continue;
        }
        size_t at = (size_t)tokenizer_hash(t, k->text, k->n) & mask;
        while (t->by_text[at] != 0) {
            at = (at + 1) & mask;
        }
        t->by_text[at] = i + 1;
    }
}

static size_t table_size(uint64_t n) {
    size_t size = 16;
    while (size < 2 * n) {
        size *= 2;
    }
    return size;
}

bool tokenizer_index(hepta_tokenizer *t) {
    t->hash_seed = (uint64_t)(uintptr_t)t * 0x9E3779B97F4A7C15u;
    t->n_by_text = table_size(t->n_tokens);
    t->by_text = memory_alloc(t->n_by_text, sizeof *t->by_text);
    if (t->by_text == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        if (is_mergeable(t, &t->tokens[i]) && t->tokens[i].n > t->longest) {
            t->longest = t->tokens[i].n;
        }
    }
    enter_by_text(t, true);
    enter_by_text(t, false);
    return true;
}

static hepta_status build_tables(loader *l) {
    hepta_tokenizer *t = l->t;
    if (!tokenizer_index(t)) {
        return out_of_memory(l);
    }
    for (int b = 0; b < 256; b++) {
        uint8_t byte = (uint8_t)b;
        t->byte_tokens[b] = t->kind == TOKENIZER_BPE ? tokenizer_find(t, &byte, 1) : TOKEN_NONE;
        t->lacks_bytes = t->lacks_bytes || (t->kind == TOKENIZER_BPE && t->unknown == TOKEN_NONE &&
                                            t->byte_tokens[b] == TOKEN_NONE);
    }
    for (uint32_t i = 0; t->kind == TOKENIZER_SPM && i < t->n_tokens; i++) {
        const token_info *k = &t->tokens[i];
        if (k->type == TOKEN_BYTE && t->byte_tokens[k->text[0]] == TOKEN_NONE) {
            t->byte_tokens[k->text[0]] = (int32_t)i;
        }
    }
    return HEPTA_OK;
}

/* ---- Scores and merge rules -------------------------------------------- */

static hepta_status load_scores(loader *l) {
    hepta_tokenizer *t = l->t;
    const kv *scores;
    hepta_status status = get_per_token(l, "tokenizer.ggml.scores", &scores);
    if (status != HEPTA_OK || scores == NULL) {
        return status;
    }
    t->scores = arena_alloc(&t->memory, t->n_tokens, sizeof *t->scores);
    if (t->scores == NULL) {
        return out_of_memory(l);
    }
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        double score = kv_item_f64(scores, i);
        if (isnan(score)) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: the score of token %" PRIu32 " is not a number", l->c->path, i);
        }
        t->scores[i] = (float)fmax(fmin(score, (double)FLT_MAX), -(double)FLT_MAX);
    }
    return HEPTA_OK;
}

/* Token of an encoded string; `bytes` has room for it. */
static int32_t find_encoded(const hepta_tokenizer *t, kv_string s, uint8_t *bytes, size_t *n) {
    *n = decode_token(t->kind, TOKEN_NORMAL, s, bytes);
    return tokenizer_find(t, bytes, *n);
}

static hepta_status load_merge(loader *l, uint32_t rank, kv_string s, uint8_t *bytes) {
    hepta_tokenizer *t = l->t;
    /* "a b", where a is not empty: the separator is not the first character. */
    const char *space = s.n > 1 ? memchr(s.data + 1, ' ', (size_t)s.n - 1) : NULL;
    if (space == NULL || space + 1 == s.data + s.n) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: merge rule %" PRIu32 " is \"%.*s\"; expected two tokens with a space "
                         "between",
                         l->c->path, rank, SHOWN(s));
    }
    size_t n_left, n_right;
    uint64_t split = (uint64_t)(space - s.data);
    int32_t left = find_encoded(t, (kv_string){s.data, split}, bytes, &n_left);
    int32_t right =
        find_encoded(t, (kv_string){space + 1, s.n - split - 1}, bytes + n_left, &n_right);
    int32_t result = tokenizer_find(t, bytes, n_left + n_right);
    if (left == TOKEN_NONE || right == TOKEN_NONE || result == TOKEN_NONE) {
        /* A rule about a control token: plain text never becomes one. */
        if (tokenizer_find_special(t, (const char *)bytes, n_left + n_right) != TOKEN_NONE) {
            return HEPTA_OK;
        }
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: merge rule %" PRIu32 " (\"%.*s\") names or makes a token that is not "
                         "in the vocabulary",
                         l->c->path, rank, SHOWN(s));
    }
    size_t mask = t->n_merges - 1;
    size_t at = (size_t)tokenizer_hash_pair(t, left, right) & mask;
    while (t->merges[at].left != TOKEN_NONE) {
        if (t->merges[at].left == left && t->merges[at].right == right) {
            return HEPTA_OK; /* given twice: the first counts */
        }
        at = (at + 1) & mask;
    }
    t->merges[at] = (merge_rule){left, right, result, rank};
    return HEPTA_OK;
}

static hepta_status load_merges(loader *l, const kv *merges) {
    hepta_tokenizer *t = l->t;
    if (merges->n_items > UINT32_MAX / 4) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED, "%s: %" PRIu64 " merge rules", l->c->path,
                         merges->n_items);
    }
    uint64_t longest = 0;
    for (uint64_t i = 0; i < merges->n_items; i++) {
        uint64_t n = kv_item_string(merges, i).n;
        longest = n > longest ? n : longest;
    }
    hepta_status status = HEPTA_OK;
    t->n_merges = table_size(merges->n_items);
    t->merges = memory_alloc(t->n_merges, sizeof *t->merges);
    uint8_t *bytes = memory_alloc((size_t)longest + 1, 1);
    if (t->merges == NULL || bytes == NULL) {
        status = out_of_memory(l);
        goto done;
    }
    for (size_t i = 0; i < t->n_merges; i++) {
        t->merges[i].left = TOKEN_NONE;
    }
    for (uint32_t i = 0; i < merges->n_items && status == HEPTA_OK; i++) {
        status = load_merge(l, i, kv_item_string(merges, i), bytes);
    }
done:
    memory_free(bytes);
    return status;
}

/* ---- Special tokens ---------------------------------------------------- */

/* An id key; `fallback` or TOKEN_NONE if it is absent. -1 and 2^32 - 1 are written for "none". */
static hepta_status get_id(const loader *l, const char *key, int32_t fallback, int32_t *out) {
    const kv *k = container_find(l->c, key);
    if (k == NULL) {
        *out = fallback >= 0 && (uint32_t)fallback < l->t->n_tokens ? fallback : TOKEN_NONE;
        return HEPTA_OK;
    }
    bool is_signed =
        k->type == KV_I8 || k->type == KV_I16 || k->type == KV_I32 || k->type == KV_I64;
    uint32_t id;
    if (is_signed && k->v.i < 0) {
        id = UINT32_MAX;
    } else {
        hepta_status status = container_get_u32(l->c, key, &id, l->err);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    if (id != UINT32_MAX && id >= l->t->n_tokens) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: key %s is %" PRIu32 "; the vocabulary has %" PRIu32 " tokens",
                         l->c->path, key, id, l->t->n_tokens);
    }
    *out = id == UINT32_MAX ? TOKEN_NONE : (int32_t)id;
    return HEPTA_OK;
}

static hepta_status load_special_ids(loader *l) {
    hepta_tokenizer *t = l->t;
    bool spm = t->kind == TOKENIZER_SPM; /* whose models leave these ids out */
    hepta_status status = get_id(l, "tokenizer.ggml.bos_token_id", spm ? 1 : TOKEN_NONE, &t->bos);
    if (status == HEPTA_OK) {
        status = get_id(l, "tokenizer.ggml.eos_token_id", spm ? 2 : TOKEN_NONE, &t->eos);
    }
    if (status == HEPTA_OK) {
        status = get_id(l, "tokenizer.ggml.unknown_token_id", spm ? 0 : TOKEN_NONE, &t->unknown);
    }
    return status;
}

/* Tokens that end a text or a turn in models of the LLaMA family and their relatives. */
static const char *const end_names[] = {
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>",
    "<|im_end|>", "<|end|>",    "<end_of_turn>",   "<|end_of_turn|>",
    "</s>",       "<EOT>",      "<|eot|>",         "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
};

static hepta_status load_end_tokens(loader *l) {
    hepta_tokenizer *t = l->t;
    if (t->eos != TOKEN_NONE) {
        t->tokens[t->eos].end = true;
    }
    static const char *const keys[] = {"tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int32_t id;
        hepta_status status = get_id(l, keys[i], TOKEN_NONE, &id);
        if (status != HEPTA_OK) {
            return status;
        }
        if (id != TOKEN_NONE) {
            t->tokens[id].end = true;
        }
    }
    for (size_t i = 0; i < sizeof end_names / sizeof *end_names; i++) {
        size_t n = strlen(end_names[i]);
        int32_t id = tokenizer_find_special(t, end_names[i], n);
        if (id == TOKEN_NONE && end_names[i][1] == '|') {
            /* Some files give these the type of ordinary tokens; not so "</s>", which is HTML. */
            id = tokenizer_find(t, (const uint8_t *)end_names[i], n);
        }
        if (id != TOKEN_NONE) {
            t->tokens[id].end = true;
        }
    }
    return HEPTA_OK;
}

typedef enum id_flag { FLAG_END, FLAG_STRIP_LEFT, FLAG_STRIP_RIGHT } id_flag;

static hepta_status load_flags(loader *l, const char *key, id_flag flag) {
    const kv *ids;
    hepta_status status = get_array(l, key, false, &ids);
    for (uint64_t i = 0; status == HEPTA_OK && ids != NULL && i < ids->n_items; i++) {
        int64_t id = kv_item_i64(ids, i);
        if (id < 0 || id >= l->t->n_tokens) {
            return error_set(l->err, HEPTA_ERROR_FORMAT,
                             "%s: key %s lists %" PRId64 "; the vocabulary has %" PRIu32 " tokens",
                             l->c->path, key, id, l->t->n_tokens);
        }
        token_info *k = &l->t->tokens[id];
        *(flag == FLAG_END          ? &k->end
          : flag == FLAG_STRIP_LEFT ? &k->strip_left
                                    : &k->strip_right) = true;
    }
    return status;
}

static bool is_special(const token_info *k) {
    return k->n > 0 &&
           (k->type == TOKEN_CONTROL || k->type == TOKEN_USER || k->type == TOKEN_UNKNOWN);
}

/* The child of `parent` (0: the root) for this byte, made if need be; there is room. */
static uint32_t trie_child(hepta_tokenizer *t, uint32_t parent, uint8_t byte) {
    uint32_t *link = parent == 0 ? &t->trie_root[byte] : &t->trie[parent].child;
    while (*link != 0 && t->trie[*link].byte != byte) {
        link = &t->trie[*link].sibling;
    }
    if (*link == 0) {
        *link = t->n_trie;
        t->trie[t->n_trie++] = (trie_node){0, 0, TOKEN_NONE, TOKEN_NONE, byte};
    }
    return *link;
}

static hepta_status build_trie(loader *l) {
    hepta_tokenizer *t = l->t;
    uint64_t nodes = 1;
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        nodes += is_special(&t->tokens[i]) ? t->tokens[i].n : 0;
    }
    t->trie = nodes < UINT32_MAX ? memory_alloc((size_t)nodes, sizeof *t->trie) : NULL;
    if (t->trie == NULL) {
        return out_of_memory(l);
    }
    t->n_trie = 1;
    for (uint32_t i = 0; i < t->n_tokens; i++) {
        const token_info *k = &t->tokens[i];
        if (!is_special(k)) {
            continue;
        }
        uint32_t node = 0;
        for (uint32_t j = 0; j < k->n; j++) {
            node = trie_child(t, node, k->text[j]);
        }
        trie_node *end = &t->trie[node];
        end->any = end->any == TOKEN_NONE ? (int32_t)i : end->any;
        if (k->type == TOKEN_USER && end->user == TOKEN_NONE) {
            end->user = (int32_t)i;
        }
    }
    return HEPTA_OK;
}

/* ---- Settings ---------------------------------------------------------- */

static hepta_status load_space_prefix(loader *l) {
    hepta_tokenizer *t = l->t;
    kv_string s = get_string(l, TOKENIZER_KEY_SPACE_PREFIX);
    if (!container_get_bool_or(l->c, "tokenizer.ggml.add_space_prefix", true) || is(s, "none")) {
        t->prefix = PREFIX_NONE;
    } else if (s.n == 0 || is(s, "segments")) {
        t->prefix = PREFIX_SEGMENTS;
    } else if (is(s, "always")) {
        t->prefix = PREFIX_ALWAYS;
    } else if (is(s, "first")) {
        t->prefix = PREFIX_FIRST;
    } else {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: key %s is \"%.*s\"; expected none, segments, always or first",
                         l->c->path, TOKENIZER_KEY_SPACE_PREFIX, SHOWN(s));
    }
    t->split_spaces = container_get_bool_or(l->c, TOKENIZER_KEY_SPLIT_SPACES, false);
    t->collapse_spaces =
        container_get_bool_or(l->c, "tokenizer.ggml.remove_extra_whitespaces", false);
    return HEPTA_OK;
}

static hepta_status load_pretokenizer(loader *l) {
    hepta_tokenizer *t = l->t;
    kv_string name = get_string(l, "tokenizer.ggml.pre");
    t->pre = name.n == 0 ? pretokenizer_find("default", 7)
                         : pretokenizer_find(name.data, (size_t)name.n);
    if (t->pre == NULL) {
        char known[320];
        pretokenizer_list(known, sizeof known);
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s: tokenizer.ggml.pre is \"%.*s\", a way of cutting text that is not "
                         "built in (known: %s); name another tokenizer file",
                         l->c->path, SHOWN(name), known);
    }
    t->nfc = container_get_bool_or(l->c, TOKENIZER_KEY_NFC, t->pre->nfc);
    t->ignore_merges =
        container_get_bool_or(l->c, TOKENIZER_KEY_IGNORE_MERGES, t->pre->ignore_merges);
    return HEPTA_OK;
}

static hepta_status load_model(loader *l) {
    kv_string model = get_string(l, "tokenizer.ggml.model");
    if (is(model, "llama")) {
        l->t->kind = TOKENIZER_SPM;
    } else if (is(model, "gpt2")) {
        l->t->kind = TOKENIZER_BPE;
    } else {
        return error_set(l->err, model.n == 0 ? HEPTA_ERROR_FORMAT : HEPTA_ERROR_UNSUPPORTED,
                         "%s: tokenizer.ggml.model is \"%.*s\"; expected \"llama\" (SentencePiece "
                         "BPE) or \"gpt2\" (byte-level BPE)",
                         l->c->path, SHOWN(model));
    }
    return HEPTA_OK;
}

static hepta_status load(loader *l) {
    hepta_tokenizer *t = l->t;
    const kv *strings, *merges;
    hepta_status status = get_array(l, "tokenizer.ggml.tokens", true, &strings);
    if (status != HEPTA_OK) {
        return status;
    }
    if (strings == NULL) {
        return error_set(l->err, HEPTA_ERROR_UNSUPPORTED,
                         "%s comes without a tokenizer; name one (--tokenizer FILE)", l->c->path);
    }
    if (strings->n_items == 0 || strings->n_items > TOKENIZER_MAX_TOKENS) {
        return error_set(l->err, HEPTA_ERROR_FORMAT,
                         "%s: a vocabulary of %" PRIu64 " tokens; expected 1 to %d", l->c->path,
                         strings->n_items, TOKENIZER_MAX_TOKENS);
    }
    t->n_tokens = (uint32_t)strings->n_items;
    if ((status = load_model(l)) != HEPTA_OK || (status = load_special_ids(l)) != HEPTA_OK ||
        (status = load_tokens(l, strings)) != HEPTA_OK || (status = build_tables(l)) != HEPTA_OK ||
        (status = build_trie(l)) != HEPTA_OK || (status = load_end_tokens(l)) != HEPTA_OK ||
        (status = load_flags(l, TOKENIZER_KEY_END_IDS, FLAG_END)) != HEPTA_OK ||
        (status = load_flags(l, TOKENIZER_KEY_STRIP_LEFT, FLAG_STRIP_LEFT)) != HEPTA_OK ||
        (status = load_flags(l, TOKENIZER_KEY_STRIP_RIGHT, FLAG_STRIP_RIGHT)) != HEPTA_OK ||
        (status = load_scores(l)) != HEPTA_OK ||
        (status = get_array(l, "tokenizer.ggml.merges", true, &merges)) != HEPTA_OK) {
        return status;
    }
    if (t->kind == TOKENIZER_SPM) {
        status = load_space_prefix(l);
        if (status == HEPTA_OK && t->scores == NULL && merges == NULL) {
            status = error_set(l->err, HEPTA_ERROR_FORMAT,
                               "%s: the tokenizer has neither scores nor merge rules", l->c->path);
        }
    } else {
        status = load_pretokenizer(l);
        if (status == HEPTA_OK && merges == NULL) {
            status = error_set(l->err, HEPTA_ERROR_FORMAT, "%s: the tokenizer has no merge rules",
                               l->c->path);
        }
    }
    bool uses_merges = t->kind == TOKENIZER_BPE || t->scores == NULL;
    if (status == HEPTA_OK && uses_merges && merges != NULL) {
        status = load_merges(l, merges);
    }
    bool add_bos = t->kind == TOKENIZER_SPM || (t->pre != NULL && t->pre->add_bos);
    t->add_bos = t->bos != TOKEN_NONE &&
                 container_get_bool_or(l->c, "tokenizer.ggml.add_bos_token", add_bos);
    return status;
}

hepta_status tokenizer_from_container(const container *c, hepta_tokenizer **out, hepta_error *err) {
    loader l = {memory_alloc(1, sizeof *l.t), c, err};
    if (l.t == NULL) {
        return out_of_memory(&l);
    }
    hepta_status status = load(&l);
    if (status != HEPTA_OK) {
        hepta_tokenizer_free(l.t);
        return status;
    }
    *out = l.t;
    return HEPTA_OK;
}
