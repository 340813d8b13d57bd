/*
 * pretokenize.c - cutting text into words, one hand-written matcher per published expression.
 *
 * The expressions, as tokenizers publish them:
 *
 *   GPT-2 (encoder.py):
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *   Llama 3 (llama-models, tokenizer.py); Qwen2 is the same with \p{N} instead of \p{N}{1,3}:
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*
 *     |\s*[\r\n]+|\s+(?!\S)|\s+
 *   o200k (tiktoken), with U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] and W = [\p{Ll}\p{Lm}\p{Lo}\p{M}];
 *   Tekken is the same without the contractions and with \p{N}:
 *     [^\r\n\p{L}\p{N}]?U*W+(?i:'s|'t|'re|'ve|'m|'ll|'d)?
 *     |[^\r\n\p{L}\p{N}]?U+W*(?i:'s|'t|'re|'ve|'m|'ll|'d)?
 *     |\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *   DeepSeek: several expressions, each applied to the pieces the one before left.
 *
 * Each matcher tries the alternatives in order at one position, as a backtracking engine would,
 * and returns where the word ends. Where backtracking could happen its outcome is computed
 * instead, so every code point is looked at a bounded number of times:
 *   - an optional prefix: with it, then without it;
 *   - \s*[\r\n]+ ends after the last line break of the run of white space;
 *   - \s+(?!\S) is the run of white space less its last character, unless the text ends there;
 *   - U*W+ without a W after the U's gives back U's until one is also a W.
 *
 * Invariant: words are not empty, follow each other without gaps and cover the text.
 */
#include "text/pretokenize.h"
#include "text/utf8.h"

#include <string.h>
#include <utf8proc.h>

/* ---- Classes of code points -------------------------------------------- */

enum {
    CLASS_L = 1,      /* \p{L} */
    CLASS_N = 2,      /* \p{N} */
    CLASS_SPACE = 4,  /* \s */
    CLASS_BREAK = 8,  /* [\r\n], also CLASS_SPACE */
    CLASS_UPPER = 16, /* U above */
    CLASS_LOWER = 32, /* W above */
    CLASS_P = 64,     /* \p{P} */
    CLASS_OTHER = 128 /* [^\s\p{L}\p{N}] */
};

bool is_white_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

static unsigned class_of(uint32_t c) {
    if (is_white_space(c)) {
        return c == '\r' || c == '\n' ? CLASS_SPACE | CLASS_BREAK : CLASS_SPACE;
    }
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LT:
        return CLASS_L | CLASS_UPPER;
    case UTF8PROC_CATEGORY_LL:
        return CLASS_L | CLASS_LOWER;
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return CLASS_L | CLASS_UPPER | CLASS_LOWER;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
        return CLASS_OTHER | CLASS_UPPER | CLASS_LOWER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return CLASS_N;
    case UTF8PROC_CATEGORY_PC:
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO:
        return CLASS_OTHER | CLASS_P;
    default:
        return CLASS_OTHER;
    }
}

/* ---- Reading ----------------------------------------------------------- */

/* Well-formed UTF-8 to be cut. */
typedef struct view {
    const uint8_t *s;
    size_t n;
} view;

/* Class of the code point at `i`, which ends at *next; 0 at the end of the text. */
static unsigned class_at(view v, size_t i, size_t *next) {
    uint32_t c = 0;
    *next = i + utf8_decode(v.s + i, v.n - i, &c);
    return *next == i ? 0 : class_of(c);
}

/* End of the run of code points from `i` on, at most `limit`, that have a class in `mask`. */
static size_t run(view v, size_t i, unsigned mask, size_t limit) {
    size_t next;
    while (limit-- > 0 && (class_at(v, i, &next) & mask) != 0) {
        i = next;
    }
    return i;
}

/* ---- Alternatives; each returns the end of its match at `i`, or `i` ------ */

static bool letter_is(uint8_t byte, char lower, bool any_case) {
    return byte == (uint8_t)lower || (any_case && byte == (uint8_t)(lower - 'a' + 'A'));
}

/* 's|'t|'re|'ve|'m|'ll|'d; ignoring case, U+017F folds to s. */
static size_t contraction(view v, size_t i, bool any_case) {
    size_t n = v.n - i;
    const uint8_t *s = v.s + i;
    if (n < 2 || s[0] != '\'') {
        return i;
    }
    if (letter_is(s[1], 's', any_case) || letter_is(s[1], 't', any_case) ||
        letter_is(s[1], 'm', any_case) || letter_is(s[1], 'd', any_case)) {
        return i + 2;
    }
    if (n >= 3) {
        if (any_case && s[1] == 0xC5 && s[2] == 0xBF) {
            return i + 3;
        }
        bool e = letter_is(s[2], 'e', any_case);
        if ((letter_is(s[1], 'r', any_case) && e) || (letter_is(s[1], 'v', any_case) && e) ||
            (letter_is(s[1], 'l', any_case) && letter_is(s[2], 'l', any_case))) {
            return i + 3;
        }
    }
    return i;
}

/* " ?X+" for a class X without spaces */
static size_t space_then(view v, size_t i, unsigned mask) {
    size_t start = i < v.n && v.s[i] == ' ' ? i + 1 : i;
    size_t end = run(v, start, mask, SIZE_MAX);
    return end == start ? i : end;
}

/* "\s*[\r\n]+" */
static size_t line_breaks(view v, size_t i) {
    size_t end = i, next;
    for (size_t at = i;; at = next) {
        unsigned class = class_at(v, at, &next);
        if ((class & CLASS_SPACE) == 0) {
            return end;
        }
        if ((class & CLASS_BREAK) != 0) {
            end = next;
        }
    }
}

/* "\s+(?!\S)|\s+" */
static size_t white_space(view v, size_t i) {
    size_t last = i, end = i, next;
    while ((class_at(v, end, &next) & CLASS_SPACE) != 0) {
        last = end;
        end = next;
    }
    return end == v.n || last == i ? end : last;
}

/* " ?[^\s\p{L}\p{N}]+[\r\n]*", with [\r\n/]* if `slash` */
static size_t symbols(view v, size_t i, bool slash) {
    size_t end = space_then(v, i, CLASS_OTHER);
    while (end > i && end < v.n &&
           (v.s[end] == '\r' || v.s[end] == '\n' || (slash && v.s[end] == '/'))) {
        end++;
    }
    return end;
}

/* The end of the optional prefix [^\r\n\p{L}\p{N}]? */
static size_t prefix(view v, size_t i) {
    size_t next;
    unsigned class = class_at(v, i, &next);
    return class != 0 && (class & (CLASS_BREAK | CLASS_L | CLASS_N)) == 0 ? next : i;
}

/* "U*W+" */
static size_t upper_lower(view v, size_t i) {
    size_t both = i, end = i, next;
    for (unsigned class; ((class = class_at(v, end, &next)) & CLASS_UPPER) != 0;) {
        end = next;
        both = (class & CLASS_LOWER) != 0 ? end : both;
    }
    size_t lower = run(v, end, CLASS_LOWER, SIZE_MAX);
    return lower > end ? lower : both;
}

/* The two alternatives of o200k that match words of letters, without their contractions. */
static size_t cased_word(view v, size_t i) {
    size_t start = prefix(v, i), end;
    if (start > i && (end = upper_lower(v, start)) > start) {
        return end;
    }
    if ((end = upper_lower(v, i)) > i) {
        return end;
    }
    /* No W follows or is among the U's now, so "U+W*" is just the U's. */
    end = run(v, start, CLASS_UPPER, SIZE_MAX);
    return end > start ? end : run(v, i, CLASS_UPPER, SIZE_MAX);
}

/* ---- One expression ---------------------------------------------------- */

/* Each returns the end of the word that begins at `i` < n; always more than `i`. */
typedef size_t (*word_end_fn)(view v, size_t i);

static size_t word_gpt2(view v, size_t i) {
    size_t end;
    if ((end = contraction(v, i, false)) > i || (end = space_then(v, i, CLASS_L)) > i ||
        (end = space_then(v, i, CLASS_N)) > i || (end = space_then(v, i, CLASS_OTHER)) > i) {
        return end;
    }
    return white_space(v, i);
}

static size_t word_llama3(view v, size_t i, size_t max_digits) {
    size_t end = contraction(v, i, true), start = prefix(v, i);
    if (end > i) {
        return end;
    }
    if ((end = run(v, start, CLASS_L, SIZE_MAX)) > start) {
        return end;
    }
    if ((end = run(v, i, CLASS_N, max_digits)) > i || (end = symbols(v, i, false)) > i ||
        (end = line_breaks(v, i)) > i) {
        return end;
    }
    return white_space(v, i);
}

static size_t word_llama3_3(view v, size_t i) {
    return word_llama3(v, i, 3);
}

static size_t word_qwen2(view v, size_t i) {
    return word_llama3(v, i, 1);
}

static size_t word_cased(view v, size_t i, size_t max_digits, bool contractions) {
    size_t end = cased_word(v, i);
    if (end > i) {
        return contractions ? contraction(v, end, true) : end;
    }
    if ((end = run(v, i, CLASS_N, max_digits)) > i || (end = symbols(v, i, true)) > i ||
        (end = line_breaks(v, i)) > i) {
        return end;
    }
    return white_space(v, i);
}

static size_t word_o200k(view v, size_t i) {
    return word_cased(v, i, 3, true);
}

static size_t word_tekken(view v, size_t i) {
    return word_cased(v, i, 1, false);
}

/* ---- Several expressions in turn --------------------------------------- */

/*
 * A stage isolates its matches: each becomes a piece, and so does the text between them. It finds
 * the first match at or after `i`; false: none.
 */
typedef bool (*find_fn)(view v, size_t i, size_t *start, size_t *end);

/* The first code point from `i` on of which `is` is true, with what follows it if `many`, and
 * with one character of white space before it if `space`. */
static bool find_class(view v, size_t i, bool (*is)(uint32_t), bool space, bool many, size_t *start,
                       size_t *end) {
    size_t before = SIZE_MAX; /* start of the white space that ends at i */
    while (i < v.n) {
        uint32_t c;
        size_t k = utf8_decode(v.s + i, v.n - i, &c);
        if (is(c)) {
            *start = before != SIZE_MAX ? before : i;
            do {
                i += k;
                k = utf8_decode(v.s + i, v.n - i, &c);
            } while (many && k > 0 && is(c));
            *end = i;
            return true;
        }
        before = space && is_white_space(c) ? i : SIZE_MAX;
        i += k;
    }
    return false;
}

static bool is_break(uint32_t c) {
    return c == '\r' || c == '\n';
}

static bool is_number(uint32_t c) {
    return class_of(c) == CLASS_N;
}

static bool is_letter(uint32_t c) {
    return (class_of(c) & CLASS_L) != 0;
}

static bool is_punctuation(uint32_t c) {
    return (class_of(c) & CLASS_P) != 0;
}

/* [U+4E00-U+9FA5 U+0800-U+4E00 U+AC00-U+D7FF] */
static bool is_asian(uint32_t c) {
    return (c >= 0x800 && c <= 0x9FA5) || (c >= 0xAC00 && c <= 0xD7FF);
}

/* [!-/:-~, the same full-width, U+2018-U+201F, U+3000-U+3002] */
static bool is_deepseek_symbol(uint32_t c) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '~') || (c >= 0xFF01 && c <= 0xFF0F) ||
           (c >= 0xFF1A && c <= 0xFF5E) || (c >= 0x2018 && c <= 0x201F) ||
           (c >= 0x3000 && c <= 0x3002);
}

/* The letters that DeepSeek LLM's expression lists. */
static const uint32_t deepseek_letters[][2] = {
    {0x41, 0x5A},       {0x61, 0x7A},       {0xB5, 0xB5},       {0xC0, 0xD6},
    {0xD8, 0xF6},       {0xF8, 0x1BA},      {0x1BC, 0x1BF},     {0x1C4, 0x293},
    {0x295, 0x2AF},     {0x370, 0x373},     {0x376, 0x376},     {0x377, 0x377},
    {0x37B, 0x37D},     {0x37F, 0x37F},     {0x386, 0x386},     {0x388, 0x38A},
    {0x38C, 0x38C},     {0x38E, 0x3A1},     {0x3A3, 0x3F5},     {0x3F7, 0x481},
    {0x48A, 0x52F},     {0x531, 0x556},     {0x10A0, 0x10C5},   {0x13A0, 0x13F5},
    {0x13F8, 0x13FD},   {0x1C90, 0x1CBA},   {0x1CBD, 0x1CBF},   {0x1D00, 0x1D2B},
    {0x1D6B, 0x1D77},   {0x1D79, 0x1D9A},   {0x1E00, 0x1F15},   {0x1F18, 0x1F1D},
    {0x1F20, 0x1F45},   {0x1F48, 0x1F4D},   {0x1F50, 0x1F57},   {0x1F59, 0x1F59},
    {0x1F5B, 0x1F5B},   {0x1F5D, 0x1F5D},   {0x1F5F, 0x1F7D},   {0x1F80, 0x1FB4},
    {0x1FB6, 0x1FBC},   {0x1FBE, 0x1FBE},   {0x1FC2, 0x1FC4},   {0x1FC6, 0x1FCC},
    {0x1FD0, 0x1FD3},   {0x1FD6, 0x1FDB},   {0x1FE0, 0x1FEC},   {0x1FF2, 0x1FF4},
    {0x1FF6, 0x1FFC},   {0x2102, 0x2102},   {0x2107, 0x2107},   {0x210A, 0x2113},
    {0x2115, 0x2115},   {0x2119, 0x211D},   {0x2124, 0x2124},   {0x2126, 0x2126},
    {0x2128, 0x2128},   {0x212A, 0x212D},   {0x212F, 0x2134},   {0x2139, 0x2139},
    {0x213C, 0x213F},   {0x2145, 0x2149},   {0x214E, 0x214E},   {0x2183, 0x2183},
    {0x2184, 0x2184},   {0x2C00, 0x2C7B},   {0x2C7E, 0x2CE4},   {0x2CEB, 0x2CEE},
    {0x2CF2, 0x2CF2},   {0x2CF3, 0x2CF3},   {0xA640, 0xA66D},   {0xA680, 0xA69B},
    {0xA722, 0xA76F},   {0xA771, 0xA787},   {0xA78B, 0xA78E},   {0xAB70, 0xABBF},
    {0xFB00, 0xFB06},   {0xFB13, 0xFB17},   {0xFF21, 0xFF3A},   {0xFF41, 0xFF5A},
    {0x10400, 0x1044F}, {0x104B0, 0x104D3}, {0x104D8, 0x104FB}, {0x10C80, 0x10CB2},
    {0x10CC0, 0x10CF2}, {0x118A0, 0x118DF}, {0x1E900, 0x1E943},
};

static bool is_deepseek_letter(uint32_t c) {
    size_t low = 0, high = sizeof deepseek_letters / sizeof *deepseek_letters;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (c > deepseek_letters[middle][1]) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < sizeof deepseek_letters / sizeof *deepseek_letters &&
           c >= deepseek_letters[low][0];
}

static bool find_break(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_break, false, false, start, end);
}

static bool find_number(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_number, false, false, start, end);
}

static bool find_letters(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_letter, true, true, start, end);
}

static bool find_punctuation(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_punctuation, true, true, start, end);
}

static bool find_asian(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_asian, false, true, start, end);
}

static bool find_deepseek_letters(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_deepseek_letter, true, true, start, end);
}

static bool find_deepseek_symbols(view v, size_t i, size_t *start, size_t *end) {
    return find_class(v, i, is_deepseek_symbol, true, true, start, end);
}

/* "\s+$" */
static bool find_trailing_space(view v, size_t i, size_t *start, size_t *end) {
    size_t from = SIZE_MAX;
    while (i < v.n) {
        uint32_t c;
        size_t k = utf8_decode(v.s + i, v.n - i, &c);
        if (!is_white_space(c)) {
            from = SIZE_MAX;
        } else if (from == SIZE_MAX) {
            from = i;
        }
        i += k;
    }
    *start = from;
    *end = v.n;
    return from != SIZE_MAX;
}

/* GPT-2's expression matches everywhere. */
static bool find_gpt2(view v, size_t i, size_t *start, size_t *end) {
    if (i >= v.n) {
        return false;
    }
    *start = i;
    *end = word_gpt2(v, i);
    return true;
}

static const find_fn stages_digits_gpt2[] = {find_number, find_gpt2, NULL};
static const find_fn stages_deepseek_llm[] = {find_break,
                                              find_deepseek_letters,
                                              find_deepseek_symbols,
                                              find_trailing_space,
                                              find_asian,
                                              find_number,
                                              NULL};
static const find_fn stages_deepseek_coder[] = {find_break, find_letters, find_punctuation,
                                                find_asian, find_number,  NULL};

/* As deep as there are stages. */
static bool cut_stages(const find_fn *stage, view v, word_fn emit, void *context) {
    if (*stage == NULL) {
        return emit(context, v.s, v.n);
    }
    for (size_t i = 0, start, end; i < v.n; i = end) {
        bool found = (*stage)(v, i, &start, &end);
        if (!found) {
            start = end = v.n;
        }
        if (start > i && !cut_stages(stage + 1, (view){v.s + i, start - i}, emit, context)) {
            return false;
        }
        if (found && !cut_stages(stage + 1, (view){v.s + start, end - start}, emit, context)) {
            return false;
        }
    }
    return true;
}

/* ---- Names ------------------------------------------------------------- */

#define GPT2_REGEX                                                                                 \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define LLAMA3_REGEX(digits)                                                                       \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits                           \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define CASED_REGEX(contraction, digits)                                                           \
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*"                                  \
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+" contraction                                                   \
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"                                 \
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*" contraction "|" digits                                        \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define ASIAN_REGEX "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"

typedef struct pattern_info {
    word_end_fn word_end;  /* one expression, which matches everywhere, or */
    const find_fn *stages; /* several */
    const char *regexes[8];
} pattern_info;

/* By pretokenizer_pattern. "...*" in an expression stands for anything: DeepSeek's list of
 * letters is published both as it was meant and damaged by normalization (U+212A as K). */
static const pattern_info patterns[] = {
    [PATTERN_GPT2] = {word_gpt2, NULL, {GPT2_REGEX}},
    [PATTERN_LLAMA3] = {word_llama3_3, NULL, {LLAMA3_REGEX("\\p{N}{1,3}")}},
    [PATTERN_QWEN2] = {word_qwen2, NULL, {LLAMA3_REGEX("\\p{N}")}},
    [PATTERN_O200K] = {word_o200k,
                       NULL,
                       {CASED_REGEX("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "\\p{N}{1,3}")}},
    [PATTERN_TEKKEN] = {word_tekken, NULL, {CASED_REGEX("", "\\p{N}")}},
    [PATTERN_DIGITS_GPT2] = {NULL, stages_digits_gpt2, {PRETOKENIZER_DIGITS, GPT2_REGEX}},
    [PATTERN_DEEPSEEK_LLM] = {NULL,
                              stages_deepseek_llm,
                              {"[\r\n]",
                               "\\s?[A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA...*]+",
                               "\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
                               "\\s+$", ASIAN_REGEX, PRETOKENIZER_DIGITS}},
    [PATTERN_DEEPSEEK_CODER] = {NULL,
                                stages_deepseek_coder,
                                {"[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", ASIAN_REGEX,
                                 PRETOKENIZER_DIGITS}},
};

/* The first name of equal properties is the one that pretokenizer_name gives. */
static const pretokenizer pretokenizers[] = {
    {"gpt-2", PATTERN_GPT2, false, false, false},
    {"llama-bpe", PATTERN_LLAMA3, true, false, true},
    {"qwen2", PATTERN_QWEN2, false, true, false},
    {"smollm", PATTERN_DIGITS_GPT2, false, false, false},
    {"tekken", PATTERN_TEKKEN, true, false, true},
    {"gpt-4o", PATTERN_O200K, false, false, false},
    {"deepseek-llm", PATTERN_DEEPSEEK_LLM, false, false, false},
    {"deepseek-coder", PATTERN_DEEPSEEK_CODER, false, false, false},
    {"dbrx", PATTERN_LLAMA3, false, false, false},
    {"stablelm2", PATTERN_QWEN2, false, false, false},
    {"default", PATTERN_GPT2, false, false, false},
    {"llama3", PATTERN_LLAMA3, true, false, true},
    {"llama-v3", PATTERN_LLAMA3, true, false, true},
    {"smaug-bpe", PATTERN_LLAMA3, false, false, false},
    {"deepseek-r1-qwen", PATTERN_QWEN2, false, true, false},
    {"llama4", PATTERN_O200K, false, false, false},
    {"starcoder", PATTERN_DIGITS_GPT2, false, false, false},
    {"refact", PATTERN_DIGITS_GPT2, false, false, false},
    {"command-r", PATTERN_DIGITS_GPT2, false, true, false},
    {"phi-2", PATTERN_GPT2, false, false, false},
    {"olmo", PATTERN_GPT2, false, false, false},
};

enum { N_PRETOKENIZERS = sizeof pretokenizers / sizeof *pretokenizers };

const pretokenizer *pretokenizer_find(const char *name, size_t n) {
    for (size_t i = 0; i < N_PRETOKENIZERS; i++) {
        if (strlen(pretokenizers[i].name) == n && memcmp(pretokenizers[i].name, name, n) == 0) {
            return &pretokenizers[i];
        }
    }
    return NULL;
}

const char *pretokenizer_name(pretokenizer_pattern pattern) {
    for (size_t i = 0; i < N_PRETOKENIZERS; i++) {
        if (pretokenizers[i].pattern == pattern) {
            return pretokenizers[i].name;
        }
    }
    return NULL;
}

void pretokenizer_list(char *out, size_t size) {
    size_t used = 0;
    out[0] = '\0';
    for (size_t i = 0; i < N_PRETOKENIZERS; i++) {
        const char *name = pretokenizers[i].name;
        size_t n = strlen(name);
        if (used + n + 3 > size) {
            return;
        }
        if (used > 0) {
            memcpy(out + used, ", ", 2);
            used += 2;
        }
        memcpy(out + used, name, n + 1);
        used += n;
    }
}

/* Is `regex` the `known` one? "...*" in `known` stands for any text. */
static bool same_regex(const char *regex, const char *known) {
    const char *gap = strstr(known, "...*");
    if (gap == NULL) {
        return strcmp(regex, known) == 0;
    }
    size_t before = (size_t)(gap - known), n = strlen(regex), after = strlen(gap + 4);
    return n >= before + after && memcmp(regex, known, before) == 0 &&
           memcmp(regex + n - after, gap + 4, after) == 0;
}

bool pretokenizer_recognize(const char *const *regexes, size_t n, pretokenizer_pattern *pattern) {
    for (size_t p = 0; p < sizeof patterns / sizeof *patterns; p++) {
        size_t i = 0;
        while (i < n && patterns[p].regexes[i] != NULL &&
               same_regex(regexes[i], patterns[p].regexes[i])) {
            i++;
        }
        if (i == n && patterns[p].regexes[i] == NULL) {
            *pattern = (pretokenizer_pattern)p;
            return true;
        }
    }
    return false;
}

const char *pretokenizer_gpt2_regex(void) {
    return GPT2_REGEX;
}

/* ---- All of a text ----------------------------------------------------- */

/* A stretch of well-formed UTF-8. */
static bool cut_valid(const pattern_info *p, view v, word_fn emit, void *context) {
    if (p->stages != NULL) {
        return cut_stages(p->stages, v, emit, context);
    }
    for (size_t i = 0, end; i < v.n; i = end) {
        end = p->word_end(v, i);
        if (!emit(context, v.s + i, end - i)) {
            return false;
        }
    }
    return true;
}

bool pretokenize(pretokenizer_pattern pattern, const uint8_t *text, size_t n, word_fn emit,
                 void *context) {
    for (size_t i = 0; i < n;) {
        uint32_t c;
        size_t start = i, k;
        while ((k = utf8_decode(text + i, n - i, &c)) > 0) {
            i += k;
        }
        if (i > start &&
            !cut_valid(&patterns[pattern], (view){text + start, i - start}, emit, context)) {
            return false;
        }
        start = i;
        while (i < n && utf8_decode(text + i, n - i, &c) == 0) {
            i++;
        }
        if (i > start && !emit(context, text + start, i - start)) {
            return false;
        }
    }
    return true;
}
