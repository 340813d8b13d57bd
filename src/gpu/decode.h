/*
 * decode.h - weights from their codes, four at a time, in registers (docs/CODE.md).
 *
 * A word of a byte plane (docs/FORMAT.md) holds byte j of the four blocks of a row's group, so
 * that every operation on it serves four weights that are 16 columns apart. Weights 2p and 2p+1 of
 * the four blocks, a *pair*, come out as two words:
 *
 *     words[0] = (2p, block 0), (2p+1, block 0), (2p, block 1), (2p+1, block 1)
 *     words[1] = the same of blocks 2 and 3
 *
 * Activations lie in that order (q_place), and sums do not care. Values are v in 0..127: the
 * centre, 64, is taken off a row's sum at the end, times the sum of the activations.
 *
 * Lookups are byte permutes: a nibble selects one of 8 bytes, and one with its high bit set gives
 * 0, the sign of the tables' entries below 128. So the sum of a lookup in each half of a table,
 * the second with that bit turned, is the lookup in all 16.
 */
#ifndef GPU_DECODE_H
#define GPU_DECODE_H

#include "gpu/platform.h"

constexpr uint32_t GPU_GROUP = 64; /* columns decoded together; rows are whole groups */

/* Where column c of a row of activations lies. */
GPU_AND_HOST_FN unsigned q_place(unsigned c) {
    const unsigned k = c % 16, block = c / 16 % 4;
    return c / GPU_GROUP * GPU_GROUP + (k / 2 * 2 + block / 2) * 4 + block % 2 * 2 + k % 2;
}
/* The column that lies there. */
GPU_AND_HOST_FN unsigned q_column(unsigned place) {
    const unsigned word = place / 4 % 16, byte = place % 4;
    return place / GPU_GROUP * GPU_GROUP + (word % 2 * 2 + byte / 2) * 16 + word / 2 * 2 + byte % 2;
}

/* A rate's tables as kernels use them: in registers, ... */
typedef struct code_words {
    uint32_t low[4], high[4]; /* v = high[h >> 4] + low[h & 15] */
    uint32_t a[2], b[2], c;   /* A n = a[n & 7] ^ b[n >> 3 & 7] ^ c[n >> 6] */
} code_words;
/* ... and in memory. */
typedef struct code_lookups {
    code_words words;
    uint8_t newer[256]; /* A n */
    uint8_t value[256]; /* v by the hash */
} code_lookups;

static code_lookups code_lookups_of(const struct code_table *t) {
    code_lookups c;
    memcpy(c.words.low, t->low, 16), memcpy(c.words.high, t->high, 16);
    for (uint32_t n = 0; n < 256; n++) {
        c.newer[n] = code_hash(t, n << 8);
    }
    uint8_t a[8], b[8], last[4];
    for (uint32_t n = 0; n < 8; n++) {
        a[n] = c.newer[n], b[n] = c.newer[n << 3], last[n & 3] = c.newer[(n & 3) << 6];
    }
    memcpy(c.words.a, a, 8), memcpy(c.words.b, b, 8), memcpy(&c.words.c, last, 4);
    memcpy(c.value, t->value, 256);
    return c;
}

/* How many planes before the first one a window may begin in. */
enum { GPU_HALO = 2 };

/* The bytes at bit `start` of the row's string, start >= -16; planes[GPU_HALO + j] is plane j. */
GPU_FN uint32_t window_byte(const uint32_t *planes, int start) {
    const int j = (start + 16) / 8, r = start & 7; /* planes[j] holds bit `start` */
    if (r == 0) {
        return planes[j];
    }
    const uint32_t newer = (255u << (8 - r) & 255u) * 0x01010101u;
    return bit_select(newer, planes[j + 1] << (8 - r), planes[j] >> r);
}

template <int H> struct shifts {
    enum { left = 0, right = 0 };
}; /* no such form */
template <> struct shifts<6> {
    enum { left = 3, right = 3 };
};
template <> struct shifts<7> {
    enum { left = 2, right = 2 };
};
template <> struct shifts<8> {
    enum { left = 7, right = 3 };
};

/* The hash of four windows whose older and newer bytes are given: o ^ n ^ n << left ^ n >> right */
template <int H> GPU_FN uint32_t hash_by_shifts(uint32_t o, uint32_t n) {
    const int left = shifts<H>::left, right = shifts<H>::right;
    const uint32_t m = (255u << left & 255u) * 0x01010101u, k = (255u >> right) * 0x01010101u;
    return o ^ n ^ (n << left & m) ^ (n >> right & k);
}

/* A n of two words of newer bytes, by three lookups of 3, 3 and 2 bits; nibbles as in a pair. */
GPU_FN void hash_by_lookups(const code_words *t, uint32_t *n0, uint32_t *n1) {
    const uint32_t x = *n0, y = *n1;
    const uint32_t a = (x & 0x07070707u) | (y << 4 & 0x70707070u);
    const uint32_t b = (x >> 3 & 0x07070707u) | (y << 1 & 0x70707070u);
    const uint32_t c = (x >> 6 & 0x03030303u) | (y >> 2 & 0x30303030u);
    const uint32_t h0 = byte_permute(t->a[0], t->a[1], a) ^ byte_permute(t->b[0], t->b[1], b) ^
                        byte_permute(t->c, 0, c);
    const uint32_t h1 = byte_permute(t->a[0], t->a[1], a >> 16) ^
                        byte_permute(t->b[0], t->b[1], b >> 16) ^ byte_permute(t->c, 0, c >> 16);
    *n0 = byte_permute(h0, h1, 0x6420);
    *n1 = byte_permute(h0, h1, 0x7531);
}

/* Sixteen-entry lookups of the four nibbles in the low half of `nibbles`. */
GPU_FN uint32_t lookup(const uint32_t *table, uint32_t nibbles) {
    return byte_permute(table[0], table[1], nibbles) +
           byte_permute(table[2], table[3], nibbles ^ 0x8888u);
}

/* Pair p of a row's group: planes[GPU_HALO + j] is plane j, those before it the end of the blocks
 * before. H is the rate in half bits, or 16 for int8. */
template <int H>
GPU_FN void decode_pair(const code_words *t, const uint32_t *planes, int p, uint32_t *words) {
    if (H == 16) {
        const uint32_t x = planes[GPU_HALO + 2 * p], y = planes[GPU_HALO + 2 * p + 1];
        words[0] = byte_permute(x, y, 0x5140);
        words[1] = byte_permute(x, y, 0x7362);
        return;
    }
    const int e0 = p * H + (H + 1) / 2, e1 = (p + 1) * H; /* where the weights end */
    const uint32_t o0 = window_byte(planes, e0 - 16), o1 = window_byte(planes, e1 - 16);
    uint32_t n0 = window_byte(planes, e0 - 8), n1 = window_byte(planes, e1 - 8);
    if (shifts<H>::left != 0) {
        n0 = hash_by_shifts<H>(o0, n0);
        n1 = hash_by_shifts<H>(o1, n1);
    } else {
        hash_by_lookups(t, &n0, &n1);
        n0 ^= o0;
        n1 ^= o1;
    }
    const uint32_t low = (n0 & 0x0f0f0f0fu) | (n1 << 4 & 0xf0f0f0f0u);
    const uint32_t high = (n0 >> 4 & 0x0f0f0f0fu) | (n1 & 0xf0f0f0f0u);
    words[0] = lookup(t->low, low) + lookup(t->high, high);
    words[1] = lookup(t->low, low >> 16) + lookup(t->high, high >> 16);
}

/* Planes before the first of a group: bytes H-2 and H-1 of the blocks before. before[j] is plane
 * H - GPU_HALO + j of the group before, or 0. */
template <int H> GPU_FN void join_before(uint32_t *planes, const uint32_t *before) {
    for (int j = 0; j < GPU_HALO; j++) {
        planes[j] = funnel_left(before[j], planes[H + j], 8);
    }
}

/* One weight, w = v - 64 or an int8, at column c of row r of a matrix on the device: rows of
 * `n_groups` groups. */
GPU_FN int decode_one(const code_lookups *t, unsigned half_bits, const uint8_t *codes,
                      uint32_t n_groups, uint32_t r, uint32_t c) {
    const uint64_t group_bytes = (uint64_t)16 * 4 * half_bits;
    const uint8_t *row = codes + r / 16 * n_groups * group_bytes + r % 16 * 4;
    const unsigned k = c % 16;
    if (half_bits == 16) {
        return (int8_t)row[c / GPU_GROUP * group_bytes + k * 64 + c / 16 % 4];
    }
    const unsigned e = k / 2 * half_bits + (k % 2 == 0 ? (half_bits + 1) / 2 : half_bits);
    /* The window's 16 bits lie in the last bytes up to bit e - 1 of the block, or in the block
     * before: byte i of the row is byte i % half_bits of block i / half_bits. */
    const int64_t last = (int64_t)(c / 16) * half_bits + (e - 1) / 8;
    uint32_t bits = 0;
    for (int i = 2; i >= 0; i--) {
        uint32_t byte = 0;
        if (last >= i) {
            const uint64_t at = (uint64_t)(last - i), block = at / half_bits;
            byte = row[block / 4 * group_bytes + at % half_bits * 64 + block % 4];
        }
        bits |= byte << (8 * (2 - i));
    }
    const uint32_t window = bits >> ((e - 1) % 8 + 1) & 0xffffu;
    return (int)t->value[(window & 255) ^ t->newer[window >> 8]] - CODE_CENTRE;
}

#endif
