/*
 * spm.c - SentencePiece BPE, the tokenizer of Llama 2, Mistral and Phi-3.
 *
 * Spaces are written U+2581 in SentencePiece's vocabularies; here both text and vocabulary hold
 * plain spaces (tokenizer.c translates the pieces, this file the text). Encoding: a space goes in
 * front, every code point becomes a symbol, and the two neighbours whose concatenation is the piece
 * with the highest score merge, the leftmost first, until none do. What is no piece in the end is
 * written as its bytes' tokens (byte fallback), or as the unknown token, neighbours as one.
 *
 * A vocabulary from a tokenizer.json has merge rules instead of scores; the rank of the rule
 * decides then.
 *
 * Sources: Kudo and Richardson, "SentencePiece", arXiv:1808.06226; Sennrich, Haddow and Birch,
 * "Neural machine translation of rare words with subword units", arXiv:1508.07909.
 *
 * Differences from SentencePiece: bytes that are not UTF-8 stay themselves (it replaces them by
 * U+FFFD), and pieces of type UNUSED are never made (it makes them and splits them again).
 */
#include "text/tokenizer.h"
#include "text/utf8.h"

#include <string.h>

static const uint8_t space_mark[3] = {0xE2, 0x96, 0x81}; /* U+2581 */

/*
 * Scores in ascending order as unsigned numbers, turned around: the highest score becomes the
 * lowest priority number. IEEE 754 floats of one sign order like their bits; NaN is refused on
 * loading.
 */
static uint32_t priority_of_score(float score) {
    uint32_t bits;
    score += 0.0f; /* -0 becomes +0: they are equal */
    memcpy(&bits, &score, sizeof bits);
    uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
    return ~ascending;
}

static bool lookup_score(const hepta_tokenizer *t, const uint8_t *text, const merge_symbol *left,
                         const merge_symbol *right, uint32_t *priority, int32_t *token) {
    uint32_t n = left->n + right->n;
    if (n > t->longest || (t->split_spaces && text[right->start] == ' ')) {
        return false;
    }
    int32_t id = tokenizer_find(t, text + left->start, n);
    if (id == TOKEN_NONE) {
        return false;
    }
    *priority = priority_of_score(t->scores[id]);
    *token = id;
    return true;
}

static bool lookup_rule(const hepta_tokenizer *t, const uint8_t *text, const merge_symbol *left,
                        const merge_symbol *right, uint32_t *priority, int32_t *token) {
    if (t->split_spaces && text[right->start] == ' ') {
        return false;
    }
    const merge_rule *rule = tokenizer_find_merge(t, left->token, right->token);
    if (rule == NULL) {
        return false;
    }
    *priority = rule->rank;
    *token = rule->result;
    return true;
}

/* Where does SentencePiece's leading space go? */
static bool wants_space(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool first) {
    bool has_space =
        n > 0 && (text[0] == ' ' || (n >= 3 && memcmp(text, space_mark, sizeof space_mark) == 0));
    switch (t->prefix) {
    case PREFIX_SEGMENTS:
        return true;
    case PREFIX_ALWAYS:
        return !has_space;
    case PREFIX_FIRST:
        return first && !has_space;
    default:
        return false;
    }
}

/* Copies the text into w->text as SentencePiece's normalizer does. */
static bool normalize(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool first,
                      encode_work *w, uint32_t *length) {
    uint8_t *out = memory_alloc(n + 1, 1);
    if (out == NULL) {
        return false;
    }
    memory_free(w->text);
    w->text = out;
    size_t k = 0, start = 0;
    if (wants_space(t, text, n, first)) {
        out[k++] = ' ';
        start = 1;
    }
    for (size_t i = 0; i < n;) {
        bool mark = n - i >= 3 && memcmp(text + i, space_mark, sizeof space_mark) == 0;
        uint8_t byte = mark ? ' ' : text[i];
        i += mark ? 3 : 1;
        if (byte == ' ' && t->collapse_spaces && (k == start || out[k - 1] == ' ')) {
            continue; /* leading and repeated spaces go */
        }
        out[k++] = byte;
    }
    while (t->collapse_spaces && k > start && out[k - 1] == ' ') {
        k--;
    }
    /* where spaces collapse, nothing but spaces is nothing */
    *length = t->collapse_spaces && k == start ? 0 : (uint32_t)k;
    return true;
}

/* Appends the tokens of a symbol that may be no token itself. */
static bool emit(const hepta_tokenizer *t, const uint8_t *text, const merge_symbol *s,
                 encode_work *w, bool *after_unknown) {
    if (s->token != TOKEN_NONE) {
        *after_unknown = false;
        return token_list_add(&w->ids, s->token);
    }
    int missing = 0;
    for (uint32_t i = 0; i < s->n; i++) {
        uint8_t byte = text[s->start + i];
        missing = t->byte_tokens[byte] == TOKEN_NONE ? byte + 1 : missing;
    }
    if (missing != 0) {
        if (t->unknown == TOKEN_NONE) {
            w->missing = missing;
            return false;
        }
        bool repeated = *after_unknown;
        *after_unknown = true;
        return repeated || token_list_add(&w->ids, t->unknown);
    }
    *after_unknown = false;
    for (uint32_t i = 0; i < s->n; i++) {
        if (!token_list_add(&w->ids, t->byte_tokens[text[s->start + i]])) {
            return false;
        }
    }
    return true;
}

bool spm_encode(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool first,
                encode_work *w) {
    uint32_t length;
    if (n == 0) {
        return true;
    }
    if (!normalize(t, text, n, first, w, &length)) {
        return false;
    }
    merger *m = &w->merge;
    m->n_symbols = 0;
    for (uint32_t i = 0; i < length;) {
        uint32_t code_point;
        size_t k = utf8_decode(w->text + i, length - i, &code_point);
        uint32_t bytes = k == 0 ? 1 : (uint32_t)k;
        if (!merger_add(m, i, bytes, tokenizer_find(t, w->text + i, bytes))) {
            return false;
        }
        i += bytes;
    }
    if (!merger_run(m, t, w->text, t->merges != NULL ? lookup_rule : lookup_score)) {
        return false;
    }
    bool after_unknown = false;
    for (uint32_t i = 0; m->n_symbols > 0 && i != MERGE_END; i = m->symbols[i].next) {
        if (!emit(t, w->text, &m->symbols[i], w, &after_unknown)) {
            return false;
        }
    }
    return true;
}
