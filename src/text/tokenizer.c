/*
 * tokenizer.c - the tokenizer object: its public functions, special tokens and tables.
 *
 * Encoding: special tokens are found first, at each place the longest (a byte trie); the stretches
 * between them go to spm.c or bpe.c. load.c builds the object from a container.
 */
#include "text/tokenizer.h"
#include "text/utf8.h"

#include <string.h>

/* ---- Tables ------------------------------------------------------------ */

int32_t tokenizer_find(const hepta_tokenizer *t, const uint8_t *text, size_t n) {
    if (n == 0 || n > t->longest) {
        return TOKEN_NONE;
    }
    size_t mask = t->n_by_text - 1;
    for (size_t at = (size_t)tokenizer_hash(t, text, n) & mask;; at = (at + 1) & mask) {
        uint32_t slot = t->by_text[at];
        if (slot == 0) {
            return TOKEN_NONE;
        }
        const token_info *k = &t->tokens[slot - 1];
        if (k->n == n && memcmp(k->text, text, n) == 0) {
            return (int32_t)(slot - 1);
        }
    }
}

const merge_rule *tokenizer_find_merge(const hepta_tokenizer *t, int32_t left, int32_t right) {
    if (left == TOKEN_NONE || right == TOKEN_NONE || t->merges == NULL) {
        return NULL;
    }
    size_t mask = t->n_merges - 1;
    for (size_t at = (size_t)tokenizer_hash_pair(t, left, right) & mask;; at = (at + 1) & mask) {
        const merge_rule *rule = &t->merges[at];
        if (rule->left == TOKEN_NONE) {
            return NULL;
        }
        if (rule->left == left && rule->right == right) {
            return rule;
        }
    }
}

/*
 * Multiplicative hashing (Knuth, TAOCP 3, 6.4) with the high half folded down. The seed, different
 * in every run, makes collisions hard to prepare in a file; results do not depend on it.
 */
static uint64_t fold(uint64_t a, uint64_t odd) {
    a *= odd;
    return a ^ a >> 32;
}

enum { CHUNK = 8 };

uint64_t tokenizer_hash(const hepta_tokenizer *t, const uint8_t *text, size_t n) {
    uint64_t h = t->hash_seed ^ n;
    for (; n >= CHUNK; n -= CHUNK, text += CHUNK) {
        h = fold(h ^ load_u64(text), 0x9E3779B97F4A7C15u);
    }
    uint64_t tail = 0;
    for (size_t i = 0; i < n; i++) {
        tail |= (uint64_t)text[i] << 8 * i;
    }
    return fold(h ^ tail, 0xD1B54A32D192ED03u);
}

uint64_t tokenizer_hash_pair(const hepta_tokenizer *t, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    return fold(fold(t->hash_seed ^ pair, 0x9E3779B97F4A7C15u) ^ pair, 0xD1B54A32D192ED03u);
}

/* ---- Special tokens ---------------------------------------------------- */

/* The child of trie node `i` for a byte, or 0. */
static uint32_t trie_step(const hepta_tokenizer *t, uint32_t i, uint8_t byte) {
    uint32_t child = t->trie[i].child;
    while (child != 0 && t->trie[child].byte != byte) {
        child = t->trie[child].sibling;
    }
    return child;
}

/* The longest special token at the start of the text, or TOKEN_NONE. */
static int32_t special_at(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool control,
                          size_t *length) {
    int32_t best = TOKEN_NONE;
    uint32_t node = t->n_trie > 0 && n > 0 ? t->trie_root[text[0]] : 0;
    for (size_t i = 1; node != 0; i++) {
        int32_t id = control ? t->trie[node].any : t->trie[node].user;
        if (id != TOKEN_NONE) {
            best = id;
            *length = i;
        }
        node = i < n ? trie_step(t, node, text[i]) : 0;
    }
    return best;
}

int32_t tokenizer_find_special(const hepta_tokenizer *t, const char *text, size_t n) {
    size_t length = 0;
    int32_t id = special_at(t, (const uint8_t *)text, n, true, &length);
    return id != TOKEN_NONE && length == n ? id : TOKEN_NONE;
}

/* Start of the white space that ends at `end`, not before `from`. */
static size_t skip_back(const uint8_t *text, size_t from, size_t end) {
    while (end > from) {
        size_t start = end - 1;
        while (start > from && end - start < 4 && (text[start] & 0xC0) == 0x80) {
            start--;
        }
        uint32_t c;
        size_t k = utf8_decode(text + start, end - start, &c);
        if (k != end - start || !is_white_space(c)) {
            break;
        }
        end = start;
    }
    return end;
}

static size_t skip_forward(const uint8_t *text, size_t i, size_t n) {
    uint32_t c;
    size_t k;
    while ((k = utf8_decode(text + i, n - i, &c)) > 0 && is_white_space(c)) {
        i += k;
    }
    return i;
}

/* ---- Encoding ---------------------------------------------------------- */

static bool encode_stretch(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool first,
                           encode_work *w) {
    if (n == 0) {
        return true;
    }
    return t->kind == TOKENIZER_SPM ? spm_encode(t, text, n, first, w) : bpe_encode(t, text, n, w);
}

static bool encode_text(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool control,
                        encode_work *w) {
    size_t from = 0; /* of the text not yet encoded */
    for (size_t i = 0; i < n;) {
        size_t length = 0;
        int32_t id = special_at(t, text + i, n - i, control, &length);
        if (id == TOKEN_NONE) {
            i++;
            continue;
        }
        size_t end = t->tokens[id].strip_left ? skip_back(text, from, i) : i;
        if (!encode_stretch(t, text + from, end - from, from == 0, w) ||
            !token_list_add(&w->ids, id)) {
            return false;
        }
        i += length;
        from = i = t->tokens[id].strip_right ? skip_forward(text, i, n) : i;
    }
    return encode_stretch(t, text + from, n - from, from == 0, w);
}

hepta_status hepta_tokenizer_encode(const hepta_tokenizer *t, const char *text, size_t n_text,
                                    unsigned flags, int32_t *tokens, size_t capacity,
                                    size_t *n_tokens, hepta_error *err) {
    if (n_text > TOKENIZER_MAX_TEXT) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%zu bytes of text to encode; at most %d at a time", n_text,
                         TOKENIZER_MAX_TEXT);
    }
    encode_work w = {0};
    hepta_status status = HEPTA_OK;
    text = n_text > 0 ? text : "";
    bool ok = true;
    if ((flags & HEPTA_ENCODE_BOS) != 0 && t->add_bos) {
        ok = token_list_add(&w.ids, t->bos);
    }
    ok = ok &&
         encode_text(t, (const uint8_t *)text, n_text, (flags & HEPTA_ENCODE_SPECIAL) != 0, &w);
    if (!ok && w.missing != 0) {
        status = error_set(err, HEPTA_ERROR_UNSUPPORTED,
                           "the vocabulary has no token for byte 0x%02X and no unknown token",
                           (unsigned)(w.missing - 1));
    } else if (!ok) {
        status =
            error_set(err, HEPTA_ERROR_MEMORY, "out of memory encoding %zu bytes of text", n_text);
    } else {
        size_t n = w.ids.n < capacity ? w.ids.n : capacity;
        if (n > 0) {
            memcpy(tokens, w.ids.ids, n * sizeof *tokens);
        }
        *n_tokens = w.ids.n;
    }
    encode_work_free(&w);
    return status;
}

/* ---- Decoding ---------------------------------------------------------- */

size_t hepta_tokenizer_decode(const hepta_tokenizer *t, int32_t id, bool first, bool special,
                              char *text, size_t capacity) {
    if (id < 0 || (uint32_t)id >= t->n_tokens) {
        return 0;
    }
    const token_info *k = &t->tokens[id];
    if ((k->type == TOKEN_CONTROL || k->type == TOKEN_UNKNOWN) && !special) {
        return 0;
    }
    const uint8_t *bytes = k->text;
    size_t n = k->n;
    if (first && k->type == TOKEN_NORMAL && t->prefix != PREFIX_NONE && n > 0 && bytes[0] == ' ') {
        bytes++;
        n--;
    }
    size_t copied = n < capacity ? n : capacity;
    if (copied > 0) {
        memcpy(text, bytes, copied);
    }
    return n;
}

uint32_t hepta_tokenizer_size(const hepta_tokenizer *t) {
    return t->n_tokens;
}

int32_t hepta_tokenizer_bos(const hepta_tokenizer *t) {
    return t->bos;
}

bool hepta_tokenizer_is_end(const hepta_tokenizer *t, int32_t id) {
    return id >= 0 && (uint32_t)id < t->n_tokens && t->tokens[id].end;
}

/* ---- Opening ----------------------------------------------------------- */

hepta_status hepta_tokenizer_open(const char *model_path, const char *tokenizer_path,
                                  hepta_tokenizer **out, hepta_error *err) {
    container *c = NULL;
    hepta_status status = HEPTA_OK;
    if (tokenizer_path == NULL) {
        if (model_path == NULL) {
            return error_set(err, HEPTA_ERROR_ARGUMENT, "neither a model nor a tokenizer is named");
        }
        const container_options options = {.metadata_only = true};
        status = container_open(model_path, &options, &c, err);
    } else {
        /* An empty container that the tokenizer's keys go into. */
        c = memory_alloc(1, sizeof *c);
        if (c == NULL) {
            return error_set(err, HEPTA_ERROR_MEMORY, "out of memory opening %s", tokenizer_path);
        }
        c->path = tokenizer_path;
        status = tokenizer_file_read(tokenizer_path, c, err);
    }
    if (status == HEPTA_OK) {
        status = tokenizer_from_container(c, out, err);
    }
    container_close(c);
    return status;
}

void hepta_tokenizer_free(hepta_tokenizer *t) {
    if (t == NULL) {
        return;
    }
    memory_free(t->by_text);
    memory_free(t->merges);
    memory_free(t->trie);
    arena_free(&t->memory);
    memory_free(t);
}
