/*
 * tokenizer.h - inside of the tokenizers: vocabulary, special tokens, merging.
 *
 * A tokenizer is a vocabulary (bytes of each token), a set of special tokens that are found in the
 * text first, and a way of merging what lies between them: SentencePiece BPE (spm.c) or byte-level
 * BPE (bpe.c). It is built from a container's tokenizer.ggml.* keys and keeps nothing of it.
 *
 * Invariant: every id in here is below n_tokens (or TOKEN_NONE where that is allowed), and every
 * token's bytes lie in `memory`. Text never becomes a control token unless the caller asks for it:
 * control tokens are neither in `by_text` nor results of merge rules.
 *
 * docs/TOKENIZERS.md describes the kinds; the keys are those of the GGUF specification, with a few
 * of ours (TOKENIZER_KEY_*) for what GGUF has no word for.
 */
#ifndef TEXT_TOKENIZER_H
#define TEXT_TOKENIZER_H

#include "base/base.h"
#include "format/container.h"
#include "text/pretokenize.h"

/*
 * What a tokenizer.json can ask for and GGUF cannot say: where the space goes (a string, see
 * space_prefix), whether no merge crosses into a space, normal form C, words that are tokens taken
 * whole (booleans); tokens that swallow white space before or after them, and those that end a text
 * (arrays of ids).
 */
#define TOKENIZER_KEY_SPACE_PREFIX "tokenizer.hepta.space_prefix"
#define TOKENIZER_KEY_SPLIT_SPACES "tokenizer.hepta.split_spaces"
#define TOKENIZER_KEY_NFC "tokenizer.hepta.nfc"
#define TOKENIZER_KEY_IGNORE_MERGES "tokenizer.hepta.ignore_merges"
#define TOKENIZER_KEY_STRIP_LEFT "tokenizer.hepta.strip_left"
#define TOKENIZER_KEY_STRIP_RIGHT "tokenizer.hepta.strip_right"
#define TOKENIZER_KEY_END_IDS "tokenizer.hepta.end_token_ids"

/* GGUF's token types, with GGUF's numbers (which are SentencePiece's). */
typedef enum token_type {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN,
    TOKEN_CONTROL, /* found in text only on request; no bytes of its own */
    TOKEN_USER,    /* found in any text, before anything else */
    TOKEN_UNUSED,
    TOKEN_BYTE /* SentencePiece byte fallback: <0x0A> */
} token_type;

enum {
    TOKEN_NONE = -1,
    TOKENIZER_MAX_TOKENS = 1 << 24,
    TOKENIZER_MAX_TOKEN = 65535 /* bytes of one */
};

typedef struct token_info {
    const uint8_t *text; /* the bytes as they stand in running text */
    uint32_t n;
    uint8_t type; /* token_type */
    bool end;     /* ends a text */
    bool strip_left, strip_right;
} token_info;

typedef enum tokenizer_kind { TOKENIZER_SPM, TOKENIZER_BPE } tokenizer_kind;

/* Where SentencePiece puts a space in front of what it encodes. */
typedef enum space_prefix {
    PREFIX_NONE,
    PREFIX_SEGMENTS, /* each stretch of text that begins the text or follows a special token */
    PREFIX_ALWAYS,   /* the same, unless there is a space already */
    PREFIX_FIRST     /* the text's first stretch, unless there is a space already */
} space_prefix;

/* Two adjacent tokens that merge into one; the lowest rank goes first. */
typedef struct merge_rule {
    int32_t left, right, result; /* left is TOKEN_NONE in an empty slot */
    uint32_t rank;
} merge_rule;

/* A byte trie over the special tokens; node 0 is no node. */
typedef struct trie_node {
    uint32_t child, sibling;
    int32_t any;  /* special token that ends here, or TOKEN_NONE */
    int32_t user; /* the same, if it is of type TOKEN_USER */
    uint8_t byte;
} trie_node;

struct hepta_tokenizer {
    arena memory;
    tokenizer_kind kind;
    uint32_t n_tokens;
    token_info *tokens; /* (n_tokens) */
    float *scores;      /* (n_tokens), SPM without merges; else NULL */
    uint32_t *by_text;  /* hash table: id + 1 of the mergeable tokens, 0 empty */
    size_t n_by_text;   /* a power of two */
    uint32_t longest;   /* bytes of the longest mergeable token */
    merge_rule *merges; /* hash table by (left, right), or NULL */
    size_t n_merges;    /* slots, a power of two */
    uint64_t hash_seed;
    int32_t byte_tokens[256]; /* TOKEN_NONE: none */
    int32_t bos, eos, unknown;
    bool add_bos;
    space_prefix prefix;
    bool split_spaces, collapse_spaces; /* SPM */
    bool nfc, ignore_merges;            /* BPE */
    bool lacks_bytes;                   /* BPE: some bytes have no token, nor an unknown one */
    const pretokenizer *pre;            /* BPE */
    trie_node *trie;
    uint32_t n_trie, trie_root[256]; /* first byte -> node */
};

/* Copies what it needs of `c`, which may be closed then. */
hepta_status tokenizer_from_container(const container *c, hepta_tokenizer **out, hepta_error *err);

uint64_t tokenizer_hash(const hepta_tokenizer *t, const uint8_t *text, size_t n);
uint64_t tokenizer_hash_pair(const hepta_tokenizer *t, int32_t left, int32_t right);

/* Fills by_text from `tokens`, `n_tokens` and `kind`. False when memory is short. */
bool tokenizer_index(hepta_tokenizer *t);

/* The mergeable token of exactly these bytes, or TOKEN_NONE. */
int32_t tokenizer_find(const hepta_tokenizer *t, const uint8_t *text, size_t n);
/* The rule that merges these two tokens, or NULL. */
const merge_rule *tokenizer_find_merge(const hepta_tokenizer *t, int32_t left, int32_t right);
/* The special token of exactly this text (control or user-defined), or TOKEN_NONE. */
int32_t tokenizer_find_special(const hepta_tokenizer *t, const char *text, size_t n);

/* ---- A growing list of ids --------------------------------------------- */

typedef struct token_list {
    int32_t *ids;
    size_t n, room;
} token_list;

/* False when memory is short. */
bool token_list_add(token_list *list, int32_t id);

/* ---- Merging (merge.c) ------------------------------------------------- */

/*
 * Bottom-up merging of a chain of symbols, shared by both kinds: of all adjacent pairs that may
 * merge, the one with the lowest priority number goes first, the leftmost of equals; O(n log n).
 * The arrays are kept from one call to the next.
 */
typedef struct merge_symbol {
    uint32_t start, n;   /* bytes of the text; n is 0 once merged into its left neighbour */
    uint32_t prev, next; /* MERGE_END: none */
    int32_t token;       /* TOKEN_NONE: not in the vocabulary */
} merge_symbol;

#define MERGE_END UINT32_MAX

typedef struct merge_candidate {
    uint64_t key;   /* priority << 32 | left symbol */
    uint32_t right; /* symbol */
    uint32_t n;     /* bytes of both: tells a candidate that is out of date */
    int32_t token;  /* what they become */
} merge_candidate;

typedef struct merger {
    merge_symbol *symbols;
    size_t n_symbols, symbol_room;
    merge_candidate *heap;
    size_t n_heap, heap_room;
    uint64_t n_steps; /* pairs looked at so far, for tests that check complexity */
} merger;

/* May these neighbours merge? If so their priority and what they become. */
typedef bool (*merge_lookup)(const hepta_tokenizer *t, const uint8_t *text,
                             const merge_symbol *left, const merge_symbol *right,
                             uint32_t *priority, int32_t *token);

/* Appends a symbol to the chain of m->symbols. False when memory is short. */
bool merger_add(merger *m, uint32_t start, uint32_t n, int32_t token);
/* Merges all that merges. False when memory is short. */
bool merger_run(merger *m, const hepta_tokenizer *t, const uint8_t *text, merge_lookup lookup);
void merger_free(merger *m);

/* ---- The two kinds ----------------------------------------------------- */

/* Scratch memory of one encoding. */
typedef struct encode_work {
    merger merge;
    uint8_t *text;        /* a normalized copy of the stretch at hand */
    int32_t *code_points; /* for normal form C */
    token_list ids;
    int missing; /* 1 + a byte that no token stands for, 0: none */
} encode_work;

/*
 * Encode a stretch of text between special tokens, n <= TOKENIZER_MAX_TEXT, appending to
 * w->ids. `first` is true at the very beginning of the text. False when w->missing is set or
 * memory is short.
 */
bool spm_encode(const hepta_tokenizer *t, const uint8_t *text, size_t n, bool first,
                encode_work *w);
bool bpe_encode(const hepta_tokenizer *t, const uint8_t *text, size_t n, encode_work *w);

enum { TOKENIZER_MAX_TEXT = 1 << 30 };

void encode_work_free(encode_work *w);

/* The byte that a character of GPT-2's byte alphabet stands for, or -1. */
int bpe_byte_of(uint32_t code_point);
/* The code point that stands for a byte. */
uint32_t bpe_code_point_of(uint8_t byte);

#endif
