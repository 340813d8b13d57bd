/*
 * file_tiktoken.c - reads tiktoken rank files, the form in which Llama 3's tokenizer is published.
 *
 * Each line is a token in base64 (RFC 4648) and its rank, which is its id: "IQ== 0". tiktoken
 * merges the neighbours whose concatenation has the lowest rank. As merge rules: every way of
 * cutting a token into two tokens is a rule; rules are ordered by the rank of what they make, then
 * by those of their parts (as Hugging Face's converter orders them, so both give the same ids).
 *
 * The file says neither how text is cut into words nor what the special tokens are. Both are known
 * for Llama 3 (meta-llama/llama-models, models/llama3/tokenizer.py), recognized by its number of
 * ranks.
 */
#include "text/vocabulary.h"
#include "text/utf8.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LLAMA3_RANKS = 128000, LLAMA3_SPECIAL = 256 };

static const char *const llama3_special[] = {
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
};

enum { N_LLAMA3_SPECIAL = sizeof llama3_special / sizeof *llama3_special };

/* ---- Lines ------------------------------------------------------------- */

static int base64_digit(uint8_t c) {
    return c >= 'A' && c <= 'Z'   ? c - 'A'
           : c >= 'a' && c <= 'z' ? c - 'a' + 26
           : c >= '0' && c <= '9' ? c - '0' + 52
           : c == '+'             ? 62
           : c == '/'             ? 63
                                  : -1;
}

/* Decodes n characters into at most n bytes; returns their number, 0 if they are no base64. */
static size_t base64_decode(const uint8_t *s, size_t n, uint8_t *out) {
    if (n == 0 || n % 4 != 0) {
        return 0;
    }
    size_t padding = s[n - 1] != '=' ? 0 : s[n - 2] != '=' ? 1 : 2, k = 0;
    for (size_t i = 0; i < n; i += 4) {
        uint32_t bits = 0;
        for (size_t j = 0; j < 4; j++) {
            int digit = i + j >= n - padding ? 0 : base64_digit(s[i + j]);
            if (digit < 0) {
                return 0;
            }
            bits = bits << 6 | (uint32_t)digit;
        }
        for (int shift = 16; shift >= 0; shift -= 8) {
            out[k++] = (uint8_t)(bits >> shift);
        }
    }
    return k - padding;
}

/* Splits "base64 rank"; false if the line is not like that. */
static bool parse_line(const uint8_t *line, size_t n, size_t *n_token, uint64_t *rank) {
    const uint8_t *space = n > 0 ? memchr(line, ' ', n) : NULL;
    if (space == NULL || space + 1 == line + n || (size_t)(line + n - space) > 9) {
        return false;
    }
    *n_token = (size_t)(space - line);
    *rank = 0;
    for (const uint8_t *p = space + 1; p < line + n; p++) {
        if (*p < '0' || *p > '9') {
            return false;
        }
        *rank = *rank * 10 + (uint64_t)(*p - '0');
    }
    return true;
}

/* ---- Merge rules ------------------------------------------------------- */

/* The bytes written in GPT-2's byte alphabet; at most 2 n bytes. */
static size_t write_byte_level(const uint8_t *bytes, size_t n, char *out) {
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        k += utf8_encode(bpe_code_point_of(bytes[i]), (uint8_t *)out + k);
    }
    return k;
}

typedef struct split {
    int32_t left, right;
} split;

static int compare_splits(const void *a, const void *b) {
    const split *s = a, *t = b;
    if (s->left != t->left) {
        return s->left < t->left ? -1 : 1;
    }
    return s->right < t->right ? -1 : s->right > t->right;
}

/* The rules that make one token. `splits` has room for one per byte. */
static hepta_status add_rules(vocabulary *v, const hepta_tokenizer *t, const token_info *k,
                              split *splits) {
    size_t n = 0;
    for (uint32_t cut = 1; cut < k->n; cut++) {
        int32_t left = tokenizer_find(t, k->text, cut);
        int32_t right = left == TOKEN_NONE ? left : tokenizer_find(t, k->text + cut, k->n - cut);
        if (right != TOKEN_NONE) {
            splits[n++] = (split){left, right};
        }
    }
    qsort(splits, n, sizeof *splits, compare_splits);
    for (size_t i = 0; i < n; i++) {
        kv_string left = v->tokens[splits[i].left], right = v->tokens[splits[i].right];
        char *rule = arena_alloc(&v->memory, (size_t)(left.n + right.n + 1), 1);
        if (rule == NULL) {
            return vocabulary_out_of_memory(v);
        }
        memcpy(rule, left.data, (size_t)left.n);
        rule[left.n] = ' ';
        memcpy(rule + left.n + 1, right.data, (size_t)right.n);
        hepta_status status = vocabulary_add_merge(v, (kv_string){rule, left.n + right.n + 1});
        if (status != HEPTA_OK) {
            return status;
        }
    }
    return HEPTA_OK;
}

/* ---- The file ---------------------------------------------------------- */

/* Reads the lines into tokens by rank; `bytes` has room for the whole file. */
static hepta_status read_lines(vocabulary *v, const uint8_t *data, size_t n, hepta_tokenizer *t,
                               uint8_t *bytes) {
    size_t line_number = 0;
    for (size_t i = 0; i < n;) {
        const uint8_t *end = memchr(data + i, '\n', n - i);
        size_t length = end == NULL ? n - i : (size_t)(end - (data + i));
        size_t next = i + length + 1;
        length -= length > 0 && data[i + length - 1] == '\r' ? 1 : 0;
        line_number++;
        if (length > 0) {
            size_t n_token, k = 0;
            uint64_t rank;
            if (parse_line(data + i, length, &n_token, &rank)) {
                k = base64_decode(data + i, n_token, bytes);
            }
            if (k == 0 || k > TOKENIZER_MAX_TOKEN) {
                return vocabulary_error(
                    v, HEPTA_ERROR_FORMAT,
                    "line %zu is no tiktoken rank: expected base64 of 1 to %d bytes, a space and "
                    "a number",
                    line_number, TOKENIZER_MAX_TOKEN);
            }
            if (rank >= LLAMA3_RANKS || t->tokens[rank].text != NULL) {
                return vocabulary_error(v, HEPTA_ERROR_UNSUPPORTED,
                                        "line %zu has rank %" PRIu64
                                        "; expected Llama 3's ranks, 0 to "
                                        "%d, once each",
                                        line_number, rank, LLAMA3_RANKS - 1);
            }
            t->tokens[rank] = (token_info){.text = bytes, .n = (uint32_t)k, .type = TOKEN_NORMAL};
            t->n_tokens++;
            bytes += k;
        }
        i = next;
    }
    if (t->n_tokens != LLAMA3_RANKS) {
        return vocabulary_error(v, HEPTA_ERROR_UNSUPPORTED,
                                "a tiktoken file of %" PRIu32
                                " ranks; only Llama 3's, of %d, is known "
                                "(name a tokenizer.json instead)",
                                t->n_tokens, LLAMA3_RANKS);
    }
    return HEPTA_OK;
}

static hepta_status add_special(vocabulary *v) {
    for (uint32_t i = 0; i < LLAMA3_SPECIAL; i++) {
        char name[48];
        if (i < N_LLAMA3_SPECIAL) {
            snprintf(name, sizeof name, "%s", llama3_special[i]);
        } else {
            snprintf(name, sizeof name, "<|reserved_special_token_%" PRIu32 "|>",
                     i - N_LLAMA3_SPECIAL + 2);
        }
        size_t n = strlen(name);
        char *copy = arena_copy_string(&v->memory, name, n);
        if (copy == NULL) {
            return vocabulary_out_of_memory(v);
        }
        hepta_status status =
            vocabulary_set(v, LLAMA3_RANKS + i, (kv_string){copy, n}, 0, TOKEN_CONTROL);
        if (status != HEPTA_OK) {
            return status;
        }
    }
    v->bos = LLAMA3_RANKS;
    v->eos = LLAMA3_RANKS + 1;
    v->padding = LLAMA3_RANKS + 4;
    v->add_bos = SETTING_TRUE;
    return HEPTA_OK;
}

hepta_status tiktoken_read(vocabulary *v, const uint8_t *data, size_t n) {
    hepta_status status;
    v->model = "gpt2";
    v->pre = "llama-bpe";
    v->has_merges = true;
    split *splits = NULL;
    hepta_tokenizer *t = memory_alloc(1, sizeof *t); /* for its table of texts */
    token_info *tokens = t != NULL ? arena_alloc(&t->memory, LLAMA3_RANKS, sizeof *tokens) : NULL;
    uint8_t *bytes = t != NULL ? arena_alloc(&t->memory, n + 4, 1) : NULL;
    if (tokens == NULL || bytes == NULL) {
        status = vocabulary_out_of_memory(v);
        goto done;
    }
    t->kind = TOKENIZER_BPE;
    t->tokens = tokens;
    if ((status = read_lines(v, data, n, t, bytes)) != HEPTA_OK) {
        goto done;
    }
    splits = tokenizer_index(t) ? memory_alloc(t->longest, sizeof *splits) : NULL;
    if (splits == NULL) {
        status = vocabulary_out_of_memory(v);
        goto done;
    }
    for (uint32_t i = 0; i < t->n_tokens && status == HEPTA_OK; i++) {
        char *text = arena_alloc(&v->memory, 2 * (size_t)tokens[i].n, 1);
        if (text == NULL) {
            status = vocabulary_out_of_memory(v);
            break;
        }
        kv_string s = {text, write_byte_level(tokens[i].text, tokens[i].n, text)};
        status = vocabulary_set(v, i, s, 0, TOKEN_NORMAL);
    }
    for (uint32_t i = 0; i < t->n_tokens && status == HEPTA_OK; i++) {
        status = add_rules(v, t, &tokens[i], splits);
    }
    if (status == HEPTA_OK) {
        status = add_special(v);
    }
done:
    memory_free(splits);
    hepta_tokenizer_free(t);
    return status;
}
