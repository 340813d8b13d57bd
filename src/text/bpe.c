/*
 * bpe.c - byte-level BPE, the tokenizer of GPT-2, Llama 3, Qwen2 and Mistral Nemo.
 *
 * The text (in Unicode normal form C where the tokenizer asks for it) is cut into words
 * (pretokenize.c). In each word every byte is a symbol, and neighbours merge by the rank of their
 * merge rule, lowest first, the leftmost first among equals. With `ignore_merges` a word that is a
 * token is taken as it is. A byte that has no token (some vocabularies leave out those that UTF-8
 * never uses) becomes the unknown token, or U+FFFD where there is none.
 *
 * Sources: Radford et al., "Language models are unsupervised multitask learners", 2019, section
 * 2.2, and its encoder.py for the byte alphabet; `ignore_merges`: Hugging Face tokenizers.
 */
#include "text/tokenizer.h"
#include "text/utf8.h"

#include <string.h>
#include <utf8proc.h>

/* ---- GPT-2's byte alphabet --------------------------------------------- */

/*
 * Vocabulary files write bytes as characters: printable Latin-1 stands for itself; the other 68
 * bytes, in ascending order, are U+0100, U+0101, ...
 */
static bool stands_for_itself(uint32_t byte) {
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

uint32_t bpe_code_point_of(uint8_t byte) {
    if (stands_for_itself(byte)) {
        return byte;
    }
    if (byte <= 0x20) {
        return 0x100u + byte;
    }
    return byte == 0xAD ? 0x143 : 0x121u + (byte - 0x7Fu); /* 7F..A0 follow 00..20 */
}

int bpe_byte_of(uint32_t c) {
    if (c < 0x100) {
        return stands_for_itself(c) ? (int)c : -1;
    }
    if (c <= 0x120) {
        return (int)(c - 0x100);
    }
    if (c <= 0x142) {
        return (int)(c - 0x121 + 0x7F);
    }
    return c == 0x143 ? 0xAD : -1;
}

/* ---- Normal form C ----------------------------------------------------- */

/*
 * UAX #15. Composition never crosses a code point below U+0300, a CJK ideograph or a Hangul
 * syllable from the left, so the text is normalized piece by piece between those. A piece longer
 * than any natural one is cut: sorting n combining marks takes n^2 steps.
 */
enum { NFC_MAX_PIECE = 1024 };

static bool starts_fresh(int32_t c) {
    return c < 0x300 || (c >= 0x3400 && c <= 0x9FFF) || (c >= 0xAC00 && c <= 0xD7A3);
}

/* Normalizes `n` code points in place; the array has room for three times as many. */
static size_t compose(int32_t *points, size_t n, uint8_t *scratch, uint8_t *out) {
    if (n == 1 && points[0] < 0x300) {
        return utf8_encode((uint32_t)points[0], out);
    }
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
        bytes += utf8_encode((uint32_t)points[i], scratch + bytes);
    }
    /* The longest canonical decomposition of one code point has four. */
    utf8proc_ssize_t k = utf8proc_decompose(scratch, (utf8proc_ssize_t)bytes, points,
                                            4 * NFC_MAX_PIECE, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (k < 0 || k > 4 * NFC_MAX_PIECE) { /* cannot happen: the input is valid and short */
        memcpy(out, scratch, bytes);
        return bytes;
    }
    k = utf8proc_normalize_utf32(points, k, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    size_t written = 0;
    for (utf8proc_ssize_t i = 0; i < k; i++) {
        written += utf8_encode((uint32_t)points[i], out + written);
    }
    return written;
}

/* True when the text is in normal form C for want of anything that could change. */
static bool is_plain(const uint8_t *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (text[i] >= 0xCC) { /* U+0300 is CC 80; invalid bytes above count as well */
            return false;
        }
    }
    return true;
}

/* A buffer for text of n bytes that may become three times as long. */
static uint8_t *make_room(size_t n) {
    return memory_alloc(3 * n + 16, 1);
}

static void keep_text(encode_work *w, uint8_t *text) {
    memory_free(w->text);
    w->text = text;
}

/*
 * Brings the text into w->text; invalid bytes stay as they are. In UTF-8, normal form C is at most
 * three times as long (UAX #15, "expansion factor").
 */
static bool normalize(const uint8_t *text, size_t n, encode_work *w, size_t *length) {
    uint8_t *out = make_room(n);
    if (out == NULL) {
        return false;
    }
    keep_text(w, out);
    if (w->code_points == NULL) {
        w->code_points = memory_alloc(4 * NFC_MAX_PIECE, sizeof *w->code_points);
        if (w->code_points == NULL) {
            return false;
        }
    }
    uint8_t scratch[4 * NFC_MAX_PIECE];
    size_t k = 0, points = 0;
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        size_t bytes = utf8_decode(text + i, n - i, &c);
        if (points > 0 && (bytes == 0 || points == NFC_MAX_PIECE || starts_fresh((int32_t)c))) {
            k += compose(w->code_points, points, scratch, out + k);
            points = 0;
        }
        if (bytes == 0) {
            out[k++] = text[i++];
        } else {
            w->code_points[points++] = (int32_t)c;
            i += bytes;
        }
    }
    if (points > 0) {
        k += compose(w->code_points, points, scratch, out + k);
    }
    *length = k;
    return true;
}

/* Copies the text with U+FFFD for bytes without a token. */
static bool replace_missing(const hepta_tokenizer *t, const uint8_t *text, size_t n, encode_work *w,
                            size_t *length) {
    uint8_t *out = make_room(n);
    if (out == NULL) {
        return false;
    }
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        if (t->byte_tokens[text[i]] != TOKEN_NONE) {
            out[k++] = text[i];
        } else {
            k += utf8_encode(UTF8_REPLACEMENT, out + k);
        }
    }
    keep_text(w, out);
    *length = k;
    return true;
}

/* ---- Words ------------------------------------------------------------- */

typedef struct word_context {
    const hepta_tokenizer *t;
    encode_work *w;
} word_context;

static bool lookup(const hepta_tokenizer *t, const uint8_t *text, const merge_symbol *left,
                   const merge_symbol *right, uint32_t *priority, int32_t *token) {
    (void)text;
    const merge_rule *rule = tokenizer_find_merge(t, left->token, right->token);
    if (rule == NULL) {
        return false;
    }
    *priority = rule->rank;
    *token = rule->result;
    return true;
}

static bool encode_word(void *context, const uint8_t *word, size_t n) {
    const word_context *c = context;
    const hepta_tokenizer *t = c->t;
    if (t->ignore_merges && n <= t->longest) {
        int32_t id = tokenizer_find(t, word, n);
        if (id != TOKEN_NONE) {
            return token_list_add(&c->w->ids, id);
        }
    }
    merger *m = &c->w->merge;
    m->n_symbols = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (!merger_add(m, i, 1, t->byte_tokens[word[i]])) {
            return false;
        }
    }
    if (!merger_run(m, t, word, lookup)) {
        return false;
    }
    for (uint32_t i = 0; m->n_symbols > 0 && i != MERGE_END; i = m->symbols[i].next) {
        int32_t id = m->symbols[i].token != TOKEN_NONE ? m->symbols[i].token : t->unknown;
        if (id == TOKEN_NONE) {
            c->w->missing = word[m->symbols[i].start] + 1;
            return false;
        }
        if (!token_list_add(&c->w->ids, id)) {
            return false;
        }
    }
    return true;
}

bool bpe_encode(const hepta_tokenizer *t, const uint8_t *text, size_t n, encode_work *w) {
    if (t->nfc && !is_plain(text, n)) {
        if (!normalize(text, n, w, &n)) {
            return false;
        }
        text = w->text;
    }
    if (t->lacks_bytes) {
        if (!replace_missing(t, text, n, w, &n)) {
            return false;
        }
        text = w->text;
    }
    word_context c = {t, w};
    return pretokenize(t->pre->pattern, text, n, encode_word, &c);
}
