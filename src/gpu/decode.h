/*
 * decode.h - weights from their codes, in registers (docs/CODE.md), and how codes lie on a device.
 *
 * A *cell* is 4 rows of 4 blocks: 64 columns. A thread decodes a whole cell, every operation on a
 * word serving several rows or blocks, and gets for each weight k = 0..15 of a block and each row a
 * word of four bytes, weight k of blocks 0..3. Activations lie in that order (q_place).
 *
 * A cell of h half bits is h chunks of 16 bytes. Cells of a strip of 16 rows and a *tile* of 4
 * groups of 64 columns lie together, chunk 0 of all of them first, so that neighbouring threads
 * read neighbouring chunks. A chunk of a cell is
 *
 *   of 3 to 4 bits     four words of *symbols*: word j of the cell has bits 2j and 2j + 1 of the
 *                      16 blocks, those of block b of row r at bit 16 (r / 2) + 4 b + 2 (r % 2)
 *   of 2 and 2.5 bits  byte j of the blocks (docs/FORMAT.md), a word for each row: blocks 0, 2,
 *                      1, 3
 *   of int8            weight j of the blocks, a word for each row
 *
 * Symbols, because hashes are sums of pairs of bits, each an operation of three inputs for 16
 * blocks wherever the pairs stand. At 3.5 bits, o ^ n ^ n << 2 ^ n >> 2, with the pairs of the
 * window, o0 .. o3 and n0 .. n3, the lower one first,
 *
 *     h0 = o0 ^ n0 ^ n1         h1 = o1 ^ n0 ^ n1 ^ n2
 *     h3 = o3 ^ n2 ^ n3         h2 = o2 ^ n1 ^ n2 ^ n3
 *
 * and as a nibble is only an index, (h0, h0 ^ h1) and (h3, h3 ^ h2) will do, for tables in another
 * order: h0 ^ h1 = o0 ^ o1 ^ n2 and h3 ^ h2 = o3 ^ o2 ^ n1. So each pair is one operation.
 * Windows that begin at an odd bit have pairs that straddle two symbols: the higher bit of one
 * word and the lower bit of the next, taken as they stand, the later bit first, which is one more
 * order of the tables. At 3 and 4 bits shifts by 3 and 7 mix pairs of both kinds, so that those
 * that straddle are brought in order.
 *
 * Lookups are byte permutes: a nibble selects one of 8 bytes, and one with its high bit set gives
 * 0, the sign of the tables' entries below 128. The lookup of a nibble in the first half of a table
 * and that of its complement in the second half, backwards, are two parts, of which one is 0.
 * A weight's value is the sum of four parts, v in 0..127: the centre, 64, is taken off a row's sum
 * at the end, times the sum of the activations.
 */
#ifndef GPU_DECODE_H
#define GPU_DECODE_H

#include "gpu/platform.h"

constexpr uint32_t GPU_GROUP = 64; /* columns; rows are whole groups */
constexpr uint32_t GPU_TILE = 4;   /* groups */
constexpr uint32_t GPU_CHUNK = 16; /* bytes */

/* Where column c of a row of activations lies, and the column that lies there. */
GPU_AND_HOST_FN unsigned q_place(unsigned c) {
    return c / GPU_GROUP * GPU_GROUP + c % 16 * 4 + c / 16 % 4;
}
GPU_AND_HOST_FN unsigned q_column(unsigned place) {
    return place / GPU_GROUP * GPU_GROUP + place % 4 * 16 + place / 4 % 16;
}

/* Whether codes of these half bits lie as symbols. */
GPU_AND_HOST_FN constexpr bool has_symbols(uint32_t half_bits) {
    return half_bits >= 6 && half_bits <= 8;
}

/* A matrix in the device's memory. */
typedef struct dev_matrix {
    const uint8_t *codes;  /* strips of 16 rows, tiles, chunks, cells */
    const uint8_t *scales; /* bfloat16 (n_rows rounded up to 16) */
    uint32_t half_bits, n_rows, n_groups;
} dev_matrix;

/* Where a cell's chunk 0 lies, and how far apart its chunks are. */
typedef struct code_cell {
    const uint8_t *chunk;
    uint32_t step;
} code_cell;

/* Rows 4i .. 4i + 3 of a strip's group g. */
GPU_FN code_cell cell_at(const dev_matrix *w, uint32_t strip, uint32_t g, uint32_t i) {
    const uint32_t tile = g / GPU_TILE * GPU_TILE, rest = w->n_groups - tile;
    const uint32_t n = rest < GPU_TILE ? rest : GPU_TILE;
    const uint64_t groups_before = (uint64_t)strip * w->n_groups + tile;
    const code_cell c = {w->codes + groups_before * (4 * GPU_CHUNK * w->half_bits) +
                             ((g - tile) * 4 + i) * GPU_CHUNK,
                         n * 4 * GPU_CHUNK};
    return c;
}

/* ---- Tables ------------------------------------------------------------ */

/* 16 entries of which the second 8 stand backwards. */
typedef struct nibble_table {
    uint32_t first[2], second[2];
} nibble_table;

/* A rate's tables as kernels use them: in registers, ... */
typedef struct code_words {
    nibble_table low[2],
        high[2];            /* v = high[h >> 4] + low[h & 15]; 3.5 bits: [1] for odd windows */
    uint32_t a[2], b[2], c; /* A n = a[n & 7] ^ b[n >> 3 & 7] ^ c[n >> 6] */
} code_words;
/* ... and in memory. */
typedef struct code_lookups {
    code_words words;
    uint8_t newer[256]; /* A n */
    uint8_t value[256]; /* v by the hash */
} code_lookups;

static nibble_table nibble_table_of(const uint8_t *entries) {
    nibble_table t;
    uint8_t second[8];
    for (uint32_t i = 0; i < 8; i++) {
        second[i] = entries[15 - i];
    }
    memcpy(t.first, entries, 8), memcpy(t.second, second, 8);
    return t;
}

/* The table for indices (p, p ^ q) of the nibble whose pair p is the higher one or the lower one
 * and q the other, with the bits of the pairs as they are or turned. */
static nibble_table pairs_table_of(const uint8_t *entries, bool higher, bool turned) {
    uint8_t sorted[16];
    for (uint32_t i = 0; i < 16; i++) {
        const uint32_t j = turned ? (i & 5) << 1 | (i >> 1 & 5) : i;
        const uint32_t p = j & 3, q = j >> 2 ^ p;
        sorted[i] = entries[higher ? p << 2 | q : q << 2 | p];
    }
    return nibble_table_of(sorted);
}

static code_lookups code_lookups_of(const struct code_table *t) {
    code_lookups c;
    for (int odd = 0; odd < 2; odd++) {
        c.words.low[odd] =
            t->half_bits == 7 ? pairs_table_of(t->low, false, odd == 1) : nibble_table_of(t->low);
        c.words.high[odd] =
            t->half_bits == 7 ? pairs_table_of(t->high, true, odd == 1) : nibble_table_of(t->high);
    }
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

/* The four parts of four values whose nibbles are in the lower or upper halves of low and high. */
template <bool UPPER>
GPU_FN void lookup(const nibble_table *low, const nibble_table *high, uint32_t l, uint32_t h,
                   uint32_t *parts) {
    parts[0] = byte_permute(low->first[0], low->first[1], half_word<UPPER>(l));
    parts[1] = byte_permute(low->second[0], low->second[1], half_complement<UPPER>(l));
    parts[2] = byte_permute(high->first[0], high->first[1], half_word<UPPER>(h));
    parts[3] = byte_permute(high->second[0], high->second[1], half_complement<UPPER>(h));
}

/* ---- Cells ------------------------------------------------------------- */

/* Words before a cell's first: two chunks, in which the blocks are those before. */
constexpr int GPU_HALO = 8;

/* Words of a chunk whose blocks are one further: `before` is of the group before, or 0. */
template <int H> GPU_FN uint32_t blocks_before(uint32_t word, uint32_t before) {
    return has_symbols(H)
               ? bit_select(0xfff0fff0u, word << 4, before >> 12)
               : byte_permute(word, before, 0x1027); /* blocks 3, 1, 0, 2 at 0, 2, 1, 3 */
}

/* The words of a cell of a code; `before` is the same cell of the group before; first: there is
 * none. */
template <int H>
GPU_FN void load_cell(const code_cell &c, const code_cell &before, bool first, uint32_t *words) {
    UNROLL
    for (int j = 0; j < H; j++) {
        const words4 four = load_words4(c.chunk + (size_t)c.step * (unsigned)j);
        for (int r = 0; r < 4; r++) {
            words[GPU_HALO + 4 * j + r] = four.v[r];
        }
    }
    UNROLL
    for (int j = 0; j < 2; j++) {
        words4 four = {};
        if (!first) {
            four = load_words4(before.chunk + (size_t)before.step * (unsigned)(H - 2 + j));
        }
        for (int r = 0; r < 4; r++) {
            words[4 * j + r] = blocks_before<H>(words[GPU_HALO + 4 * (H - 2 + j) + r], four.v[r]);
        }
    }
}

/* Bits `start` and the next of the 16 blocks, start >= -16; at odd ones the later bit first. */
GPU_FN uint32_t turned_pair(const uint32_t *words, int start) {
    const uint32_t *w = words + (start + 16) / 2;
    return start % 2 == 0 ? w[0] : bit_select(0xaaaaaaaau, w[0], w[1]);
}
/* The same, in order. */
GPU_FN uint32_t pair(const uint32_t *words, int start) {
    const uint32_t *w = words + (start + 16) / 2;
    return start % 2 == 0 ? w[0] : bit_select(0x55555555u, w[0] >> 1, w[1] << 1);
}

/* The pairs that the nibbles of the hash are looked up by, from symbols. */
typedef struct hash_pairs {
    uint32_t low[2], high[2];
} hash_pairs;

template <int H> GPU_FN hash_pairs hash_by_pairs(const uint32_t *words, int start) {
    hash_pairs h;
    if (H == 7) { /* o ^ n ^ n << 2 ^ n >> 2 */
        uint32_t s[8];
        UNROLL
        for (int i = 0; i < 8; i++) {
            s[i] = turned_pair(words, start + 2 * i);
        }
        h.low[0] = xor3(s[0], s[4], s[5]), h.low[1] = xor3(s[0], s[1], s[6]);
        h.high[0] = xor3(s[3], s[6], s[7]), h.high[1] = xor3(s[2], s[3], s[5]);
        return h;
    }
    /* o ^ n ^ n << 3 ^ n >> 3, or o ^ n ^ n << 7 ^ n >> 3 */
    const uint32_t first = pair(words, start + 7) & 0xaaaaaaaau; /* bit 0 of n, as a higher bit */
    const uint32_t n3 = pair(words, start + 14), last = n3 >> 1 & 0x55555555u;
    const uint32_t middle = pair(words, start + 11);
    h.low[0] = xor3(pair(words, start), pair(words, start + 8), middle);
    h.low[1] = xor3(pair(words, start + 2), pair(words, start + 10), pair(words, start + 13));
    h.high[0] = xor3(pair(words, start + 4), pair(words, start + 12), last);
    h.high[1] = pair(words, start + 6) ^ n3;
    if (H == 8) {
        h.high[1] ^= first;
    } else {
        h.low[1] ^= first;
        h.high[0] ^= pair(words, start + 9);
        h.high[1] ^= middle;
    }
    return h;
}

/* 2 and 2.5 bits: byte j of the row's blocks and on, from bit `start` >= -16; words of one row are
 * 4 apart. */
GPU_FN uint32_t window_byte(const uint32_t *words, int start) {
    const int j = (start + 16) / 8, r = start & 7;
    const uint32_t here = words[4 * j];
    if (r == 0) {
        return here;
    }
    const uint32_t newer = (255u << (8 - r) & 255u) * 0x01010101u;
    return bit_select(newer, words[4 * j + 4] << (8 - r), here >> r);
}

/* The hash of four windows whose older and newer bytes are given. */
GPU_FN uint32_t hash_by_lookups(const code_words *t, uint32_t o, uint32_t n) {
    /* Lookups of 3, 3 and 2 bits; the selectors have bytes 0, 2, 1, 3. */
    const uint32_t a = (n & 0x0707u) | (n >> 12 & 0x7070u);
    const uint32_t b = (n >> 3 & 0x0707u) | (n >> 15 & 0x7070u);
    const uint32_t c = (n >> 6 & 0x0303u) | (n >> 18 & 0x3030u);
    const uint32_t h = byte_permute(t->a[0], t->a[1], a) ^ byte_permute(t->b[0], t->b[1], b) ^
                       byte_permute(t->c, 0, c);
    return o ^ byte_permute(h, 0, 0x3120);
}

/* Weight k of the cell's blocks: row r's value is the sum of parts[r][0..3]. H: not int8. */
template <int H>
GPU_FN void decode_weight(const code_words *t, const uint32_t *words, int k, uint32_t (*parts)[4]) {
    const int end = k / 2 * H + (k % 2 == 0 ? (H + 1) / 2 : H);
    if (has_symbols(H)) {
        const int odd = H == 7 ? end % 2 : 0;
        const nibble_table *low = &t->low[odd], *high = &t->high[odd];
        const hash_pairs x = hash_by_pairs<H>(words, end - 16);
        const uint32_t m = 0x33333333u;
        const uint32_t l = bit_select(m, x.low[0], x.low[1] << 2);
        const uint32_t h = bit_select(m, x.high[0], x.high[1] << 2);
        lookup<false>(low, high, l, h, parts[0]);
        lookup<true>(low, high, l, h, parts[2]);
        const uint32_t l_odd = bit_select(m, x.low[0] >> 2, x.low[1]);
        const uint32_t h_odd = bit_select(m, x.high[0] >> 2, x.high[1]);
        lookup<false>(low, high, l_odd, h_odd, parts[1]);
        lookup<true>(low, high, l_odd, h_odd, parts[3]);
    }
    UNROLL
    for (int r = 0; r < 4 && !has_symbols(H); r++) {
        const uint32_t x =
            hash_by_lookups(t, window_byte(words + r, end - 16), window_byte(words + r, end - 8));
        lookup<false>(&t->low[0], &t->high[0], bit_select(0x0f0fu, x, x >> 12),
                      bit_select(0x0f0fu, x >> 4, x >> 16), parts[r]);
    }
}

/* One weight, w = v - 64 or an int8, at column c of row r. */
GPU_FN int decode_one(const code_lookups *t, const dev_matrix *w, uint32_t r, uint32_t c) {
    const uint32_t h = w->half_bits, k = c % 16, row = r % 4;
    if (h == 16) {
        const code_cell cell = cell_at(w, r / 16, c / GPU_GROUP, r % 16 / 4);
        return (int8_t)cell.chunk[(size_t)k * cell.step + 4 * row + c / 16 % 4];
    }
    /* The last pieces, of 2 or 8 bits, up to bit end - 1 of the block hold the window. */
    const uint32_t size = has_symbols(h) ? 2 : 8, n = 8 * h / size; /* pieces of a block */
    const uint32_t end = k / 2 * h + (k % 2 == 0 ? (h + 1) / 2 : h);
    const int64_t last = (int64_t)(c / 16) * n + (end - 1) / size;
    uint32_t bits = 0;
    for (uint32_t i = 0; i <= 16 / size; i++) {
        const int64_t at = last - 16 / size + i;
        uint32_t piece = 0;
        if (at >= 0) {
            const uint32_t block = (uint32_t)((uint64_t)at / n), j = (uint32_t)((uint64_t)at % n);
            const code_cell cell = cell_at(w, r / 16, block / 4, r % 16 / 4);
            const uint32_t b = block % 4;
            if (has_symbols(h)) {
                const uint32_t bit = row % 2 * 2 + b * 4 + row / 2 * 16;
                const uint8_t *word = cell.chunk + (size_t)(j / 4) * cell.step + j % 4 * 4;
                piece = word[bit / 8] >> bit % 8 & 3;
            } else {
                piece = cell.chunk[(size_t)j * cell.step + 4 * row + b % 2 * 2 + b / 2];
            }
        }
        bits |= piece << (size * i);
    }
    const uint32_t window = bits >> ((end - 1) % size + 1) & 0xffffu;
    return (int)t->value[(window & 255) ^ t->newer[window >> 8]] - CODE_CENTRE;
}

/* ---- Arranging --------------------------------------------------------- */

constexpr uint32_t ARRANGE_THREADS = 4 * 4 * GPU_TILE; /* one for each word of a tile's chunk */

/* The four bytes' lowest pairs of bits, 4 bits apart. */
GPU_FN uint32_t gather_pairs(uint32_t x) {
    x &= 0x03030303u;
    x = (x | x >> 4) & 0x00330033u;
    return (x | x >> 8) & 0x3333u;
}

/* BLOCK_X: a tile of a strip, whose groups lie as in a file and then as described above. */
GPU_KERNEL_OF(ARRANGE_THREADS, 1) arrange(dev_matrix w) {
    enum { MOST = 16 };
    PRIVATE(ARRANGE_THREADS, uint32_t, words, [MOST]);
    const uint32_t h = w.half_bits, n_tiles = (w.n_groups + GPU_TILE - 1) / GPU_TILE;
    const uint32_t strip = BLOCK_X / n_tiles, tile = BLOCK_X % n_tiles * GPU_TILE;
    THREADS(t) {
        const uint32_t group = tile + t / 16, row = t % 16;
        const uint64_t at = ((uint64_t)strip * w.n_groups + group) * h * 64;
        UNROLL
        for (uint32_t j = 0; j < MOST; j++) {
            uint32_t word = 0;
            if (group < w.n_groups && j < h) {
                const uint32_t *rows = (const uint32_t *)(w.codes + at + 64 * j) + row / 4 * 4;
                if (has_symbols(h)) {
                    for (uint32_t r = 0; r < 4; r++) {
                        word |= gather_pairs(rows[r] >> row % 4 * 2) << (r / 2 * 16 + r % 2 * 2);
                    }
                } else {
                    word = h == 16 ? rows[row % 4] : byte_permute(rows[row % 4], 0, 0x3120);
                }
            }
            words[OWN(t)][j] = word;
        }
    }
    THREADS(t) {
        const uint32_t group = tile + t / 16, row = t % 16;
        UNROLL
        for (uint32_t j = 0; j < MOST; j++) {
            if (group < w.n_groups && j < h) {
                const code_cell c = cell_at(&w, strip, group, row / 4);
                ((uint32_t *)(uintptr_t)(c.chunk + (size_t)j * c.step))[row % 4] = words[OWN(t)][j];
            }
        }
    }
}

#endif
