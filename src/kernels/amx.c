/*
 * amx.c - products of 16 tokens and more for x86-64 with AMX-TILE and AMX-INT8, beside what
 * avx512.c needs; everything else of the table, and fewer tokens, are avx512.c's.
 *
 * A tile is 16 rows of 64 bytes. TDPBSUD adds to a tile of 16 x 16 int32 the product of a tile of
 * signed bytes and one of unsigned bytes; four bytes of a row of the first meet four bytes of each
 * column of the second:
 *
 *     sums[m][n] += sum over k < 16, b < 4 of first[m][4 k + b] * second[k][4 n + b]
 *
 * With a group of 16 rows x 64 columns, weight k of each of its 64 blocks - what avx512.c has in
 * one vector - is row k of the second: n is the row, b the block. 16 tokens' activations of the
 * group, as arrange() puts them, are the first. Sums wrap around as everywhere: what is left after
 * the centre is taken off fits.
 *
 * Two strips are decoded to scratch, and multiplied with two tiles of tokens at a time: four tiles
 * of sums, two of activations, two of weights. Every tile keeps its full size: rows of tokens past
 * the last hold anything, and so do their sums, which nobody reads.
 */
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx512_packed.h"

/* ---- Tiles ------------------------------------------------------------- */

enum { TILE_ROWS = 16, N_TILES = 8 };

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

#ifndef AMX_KERNEL /* tests/amx_model.c has another name, and tiles of its own */
#define AMX_KERNEL(name) name##_amx

/* The numbers of tiles are literal. As assembly: the intrinsics of gcc 12 do not say that they read
 * or write memory. */
#define tile_configure(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(config)))
#define tile_release() __asm__ volatile("tilerelease")
#define tile_zero(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define tile_load(tile, p)                                                                         \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                                            \
                     :                                                                             \
                     : "r"(p), "r"((size_t)GROUP_BYTES)                                            \
                     : "memory")
#define tile_store(tile, p)                                                                        \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                                        \
                     :                                                                             \
                     : "r"(p), "r"((size_t)GROUP_BYTES)                                            \
                     : "memory")
/* sums += products of a tile of signed and one of unsigned bytes */
#define tile_dot(sums, first, second)                                                              \
    __asm__ volatile("tdpbsud %%tmm" #second ", %%tmm" #first ", %%tmm" #sums : :)
#endif

static void configure_tiles(void) {
    tile_config config = {.palette = 1};
    for (int i = 0; i < N_TILES; i++) {
        config.row_bytes[i] = GROUP_BYTES;
        config.rows[i] = TILE_ROWS;
    }
    tile_configure(&config);
}

/* ---- Products ---------------------------------------------------------- */

/* A strip's weights, group after group. */
static void decode_strip(const decoder *d, uint32_t half_bits, const uint8_t *codes,
                         uint32_t n_blocks, uint8_t *out) {
    const uint32_t n_groups = (n_blocks + PACKED_GROUP - 1) / PACKED_GROUP;
    __m512i before[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#define RATE(h)                                                                                    \
    case h:                                                                                        \
        decode_groups(d, h, codes, n_blocks, n_groups, before, out);                               \
        break;
    switch (half_bits) { RATE(4) RATE(5) RATE(6) RATE(7) RATE(8) RATE(16) }
#undef RATE
}

/*
 * Sums of one or two strips and 16 or 32 tokens over n groups. Second strips and second 16 tokens
 * lie n tiles after the first. sums: of tokens and rows, the second tokens' second, the second
 * strip's third and fourth.
 */
static void multiply(const uint8_t *weights, bool two_strips, const uint8_t *x, bool more_tokens,
                     size_t n, int32_t sums[4][TILE_ROWS][PACKED_STRIP]) {
    const size_t second = n * TILE_BYTES;
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (const uint8_t *end = x + second; x < end; x += TILE_BYTES, weights += TILE_BYTES) {
        tile_load(4, x);
        tile_load(6, weights);
        tile_dot(0, 4, 6);
        if (more_tokens) {
            tile_load(5, x + second);
            tile_dot(1, 5, 6);
        }
        if (two_strips) {
            tile_load(7, weights + second);
            tile_dot(2, 4, 7);
            if (more_tokens) {
                tile_dot(3, 5, 7);
            }
        }
    }
    tile_store(0, sums[0]);
    tile_store(1, sums[1]);
    tile_store(2, sums[2]);
    tile_store(3, sums[3]);
}

static inline uint32_t at_most(uint32_t n, uint32_t most) {
    return n < most ? n : most;
}

/* At most PASS_TOKENS tokens: their activations are arranged in scratch, before two strips. */
static void matmul_tokens(const packed_matrix *w, const decoder *d, uint32_t row_begin,
                          uint32_t row_end, const activation *x, uint32_t n_tokens, float *y,
                          size_t y_stride, uint8_t *scratch) {
    const uint32_t n_blocks = w->n_cols / CODE_BLOCK;
    const size_t n_groups = (n_blocks + PACKED_GROUP - 1) / PACKED_GROUP;
    const size_t strip_bytes = (size_t)PACKED_STRIP * n_blocks * w->half_bits;
    uint8_t *weights = scratch + PASS_TOKENS * n_groups * GROUP_BYTES;
    int32_t sums[4][TILE_ROWS][PACKED_STRIP];
    for (uint32_t t = 0; t < n_tokens; t++) {
        arrange(x[t].q, w->n_cols,
                scratch + t / TILE_ROWS * n_groups * TILE_BYTES + t % TILE_ROWS * GROUP_BYTES,
                TILE_BYTES);
    }
    for (uint32_t r = row_begin; r < row_end; r += 2 * PACKED_STRIP) {
        const uint32_t n_rows = at_most(row_end - r, 2 * PACKED_STRIP);
        for (uint32_t i = 0; i < n_rows; i += PACKED_STRIP) {
            decode_strip(d, w->half_bits, w->codes + (r + i) / PACKED_STRIP * strip_bytes, n_blocks,
                         weights + i * n_groups * GROUP_BYTES);
        }
        for (uint32_t first = 0; first < n_tokens; first += 2 * TILE_ROWS) {
            const uint32_t n = at_most(n_tokens - first, 2 * TILE_ROWS);
            multiply(weights, n_rows > PACKED_STRIP, scratch + first * n_groups * GROUP_BYTES,
                     n > TILE_ROWS, n_groups, sums);
            for (uint32_t i = 0; i < n_rows; i += PACKED_STRIP) {
                for (uint32_t t = 0; t < n; t++) {
                    const int32_t *rows =
                        sums[2 * (i / PACKED_STRIP) + t / TILE_ROWS][t % TILE_ROWS];
                    store_rows(w, r + i, at_most(n_rows - i, PACKED_STRIP), &x[first + t],
                               _mm512_loadu_si512(rows), y + (first + t) * y_stride);
                }
            }
        }
    }
}

void AMX_KERNEL(matmul_packed)(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                               const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                               uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % PACKED_STRIP == 0);
    if (n_tokens >= TILE_ROWS) {
        const decoder *d = decoder_get_avx512(w->half_bits);
        configure_tiles();
        while (n_tokens >= TILE_ROWS) {
            const uint32_t n = at_most(n_tokens, PASS_TOKENS);
            matmul_tokens(w, d, row_begin, row_end, x, n, y, y_stride, scratch);
            x += n, y += n * y_stride, n_tokens -= n;
        }
        tile_release();
    }
    if (n_tokens > 0) {
        kernels_avx512.matmul_packed(w, row_begin, row_end, x, n_tokens, y, y_stride, scratch);
    }
}

#else

typedef int kernels_amx_needs_x86_64; /* ISO C forbids an empty file */

#endif
