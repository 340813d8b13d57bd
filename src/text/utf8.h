/*
 * utf8.h - UTF-8: decoding, cutting a byte stream between code points, showing invalid bytes.
 *
 * Tokens are bytes: a code point may span several of them, and a model may produce bytes that are
 * no UTF-8 at all. Text stays bytes everywhere; only a display turns invalid bytes into U+FFFD.
 *
 * Well-formed sequences are those of the Unicode Standard, table 3-7 (no surrogates, nothing above
 * U+10FFFF, no overlong forms). Invalid text is replaced "maximal subpart" by maximal subpart, as
 * the standard recommends (section 3.9) and as web browsers and Python do.
 */
#ifndef TEXT_UTF8_H
#define TEXT_UTF8_H

#include <stddef.h>
#include <stdint.h>

enum { UTF8_REPLACEMENT = 0xFFFD, UTF8_REPLACEMENT_BYTES = 3 };

/*
 * Bytes (1 to 4) of the well-formed sequence at the start of `s`, its code point in *code_point;
 * 0 when there is none (n is 0, the bytes are invalid or end too early).
 */
size_t utf8_decode(const uint8_t *s, size_t n, uint32_t *code_point);

/* Writes 1 to 4 bytes; `code_point` is at most 0x10FFFF and no surrogate. */
size_t utf8_encode(uint32_t code_point, uint8_t out[4]);

/*
 * How many of the `n` bytes can be shown now: all but a sequence at the end (at most 3 bytes) that
 * is well-formed so far and awaits more bytes. Bytes that can never become valid are not held back.
 */
size_t utf8_complete(const char *s, size_t n);

/*
 * Copies `n` bytes to `out`, with U+FFFD for what is not UTF-8; returns the number of bytes
 * written, at most 3 * n. `out` may be NULL, to measure.
 */
size_t utf8_display(const char *s, size_t n, char *out);

#endif
