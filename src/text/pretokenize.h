/*
 * pretokenize.h - cutting text into words before byte-level BPE merges them.
 *
 * Tokenizers publish these cuts as regular expressions (quoted in pretokenize.c). Here each one is
 * a hand-written matcher: the same cuts, in time linear in the text whatever it holds, on any
 * bytes. Bytes that are not UTF-8 become words of their own.
 *
 * docs/TOKENIZERS.md lists the names and where the expressions were published.
 */
#ifndef TEXT_PRETOKENIZE_H
#define TEXT_PRETOKENIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum pretokenizer_pattern {
    PATTERN_GPT2,
    PATTERN_LLAMA3,
    PATTERN_QWEN2,
    PATTERN_O200K,  /* GPT-4o, Llama 4 */
    PATTERN_TEKKEN, /* Mistral Nemo */
    PATTERN_DIGITS_GPT2,
    PATTERN_DEEPSEEK_LLM,
    PATTERN_DEEPSEEK_CODER
} pretokenizer_pattern;

typedef struct pretokenizer {
    const char *name; /* tokenizer.ggml.pre */
    pretokenizer_pattern pattern;
    bool ignore_merges; /* a word that is a token is taken whole */
    bool nfc;           /* text is brought into Unicode normal form C first */
    bool add_bos;       /* where the model does not say */
} pretokenizer;

/* By its tokenizer.ggml.pre name (aliases included); NULL: unknown. */
const pretokenizer *pretokenizer_find(const char *name, size_t n);

/* The main name of a pattern; its other properties may be set beside it. */
const char *pretokenizer_name(pretokenizer_pattern pattern);

/* "gpt-2, llama-bpe, ..." into `out`, at most `size` bytes with the NUL. */
void pretokenizer_list(char *out, size_t size);

/*
 * Recognizes the published regular expressions of a tokenizer.json, applied one after the other;
 * individual digits count as PRETOKENIZER_DIGITS. False: unknown.
 */
bool pretokenizer_recognize(const char *const *regexes, size_t n, pretokenizer_pattern *pattern);
#define PRETOKENIZER_DIGITS "\\p{N}"
const char *pretokenizer_gpt2_regex(void);

/* Gets the words in order; together they are the whole text. False stops the cutting. */
typedef bool (*word_fn)(void *context, const uint8_t *word, size_t n);

/* False if `emit` returned false. */
bool pretokenize(pretokenizer_pattern pattern, const uint8_t *text, size_t n, word_fn emit,
                 void *context);

/* Unicode White_Space. */
bool is_white_space(uint32_t code_point);

#endif
