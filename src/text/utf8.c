/*
 * utf8.c - UTF-8 decoding and streaming, see utf8.h.
 *
 * All functions rest on one: sequence_scan says how many bytes at the start of a string are a
 * well-formed sequence, or a prefix of one.
 */
#include "text/utf8.h"

#include <string.h>

/*
 * Reads the sequence that begins at s[0] (n >= 1). Returns the number of bytes that belong
 * together: a whole sequence, or the longest prefix of one (its maximal subpart), or one byte that
 * begins none. *wanted is the number of bytes that the first byte calls for, 0 if it begins none.
 * Table 3-7 of the Unicode Standard: only the second byte has a range that depends on the first.
 */
static size_t sequence_scan(const uint8_t *s, size_t n, size_t *wanted) {
    uint8_t first = s[0], low = 0x80, high = 0xBF;
    size_t length;
    if (first < 0x80) {
        length = 1;
    } else if (first >= 0xC2 && first <= 0xDF) {
        length = 2;
    } else if (first >= 0xE0 && first <= 0xEF) {
        length = 3;
        low = first == 0xE0 ? 0xA0 : low;
        high = first == 0xED ? 0x9F : high;
    } else if (first >= 0xF0 && first <= 0xF4) {
        length = 4;
        low = first == 0xF0 ? 0x90 : low;
        high = first == 0xF4 ? 0x8F : high;
    } else {
        *wanted = 0;
        return 1;
    }
    *wanted = length;
    size_t k = 1;
    while (k < length && k < n && s[k] >= low && s[k] <= high) {
        low = 0x80;
        high = 0xBF;
        k++;
    }
    return k;
}

size_t utf8_decode(const uint8_t *s, size_t n, uint32_t *code_point) {
    if (n == 0) {
        return 0;
    }
    size_t wanted;
    size_t k = sequence_scan(s, n, &wanted);
    if (k != wanted) {
        return 0;
    }
    uint32_t c = s[0];
    switch (k) {
    case 2:
        c &= 0x1F;
        break;
    case 3:
        c &= 0x0F;
        break;
    case 4:
        c &= 0x07;
        break;
    default:
        break;
    }
    for (size_t i = 1; i < k; i++) {
        c = c << 6 | (s[i] & 0x3Fu);
    }
    *code_point = c;
    return k;
}

size_t utf8_encode(uint32_t c, uint8_t out[4]) {
    if (c < 0x80) {
        out[0] = (uint8_t)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (uint8_t)(0xC0 | c >> 6);
        out[1] = (uint8_t)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (uint8_t)(0xE0 | c >> 12);
        out[1] = (uint8_t)(0x80 | (c >> 6 & 0x3F));
        out[2] = (uint8_t)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (uint8_t)(0xF0 | c >> 18);
    out[1] = (uint8_t)(0x80 | (c >> 12 & 0x3F));
    out[2] = (uint8_t)(0x80 | (c >> 6 & 0x3F));
    out[3] = (uint8_t)(0x80 | (c & 0x3F));
    return 4;
}

size_t utf8_complete(const char *s, size_t n) {
    const uint8_t *bytes = (const uint8_t *)s;
    /* An unfinished sequence has at most 3 bytes; look for its first one from the end. */
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        if ((bytes[n - back] & 0xC0) == 0x80) {
            continue; /* a continuation byte begins nothing */
        }
        size_t wanted;
        size_t k = sequence_scan(bytes + n - back, back, &wanted);
        return k == back && k < wanted ? n - back : n;
    }
    return n;
}

size_t utf8_display(const char *s, size_t n, char *out) {
    const uint8_t *bytes = (const uint8_t *)s;
    size_t written = 0;
    for (size_t i = 0; i < n;) {
        size_t wanted;
        size_t k = sequence_scan(bytes + i, n - i, &wanted);
        if (out != NULL) {
            memcpy(out + written, k == wanted ? s + i : "\xEF\xBF\xBD",
                   k == wanted ? k : UTF8_REPLACEMENT_BYTES);
        }
        written += k == wanted ? k : UTF8_REPLACEMENT_BYTES;
        i += k;
    }
    return written;
}
