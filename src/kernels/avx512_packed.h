/*
 * avx512_packed.h - packed matrices in AVX-512, for avx512.c and amx.c: groups of weights decoded,
 * activations arranged to be multiplied with them, sums to floats.
 */
#ifndef KERNELS_AVX512_PACKED_H
#define KERNELS_AVX512_PACKED_H

#include "code/code.h"
#include "format/container.h"
#include "kernels/kernels.h"

#include <assert.h>
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#define EACH_WEIGHT(X)                                                                             \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

enum {
    PASS_TOKENS = 128,   /* whose activations are arranged together, at most */
    GROUP_BYTES = 64,    /* of a plane, and of a token's activations */
    TILE_BYTES = 1024,   /* of a group's weights */
    PREFETCH_GROUPS = 8, /* how far ahead codes are fetched; they are read once, in order */
};

static inline __mmask16 first_lanes(uint32_t n) {
    return (__mmask16)((1u << n) - 1);
}

/* ---- Decoding ---------------------------------------------------------- */

/*
 * A window lies in three bytes of the row at most, from byte WINDOW_BYTE of the block on: bits
 * WINDOW_SHIFT .. WINDOW_SHIFT + 15 of them.
 */
#define WINDOW_BEGIN(h, k) ((int)(k) / 2 * (h) + ((k) % 2 != 0 ? (h) : ((h) + 1) / 2) - 16)
#define WINDOW_BYTE(h, k) ((WINDOW_BEGIN(h, k) + 16) / 8 - 2)
#define WINDOW_SHIFT(h, k) (WINDOW_BEGIN(h, k) - 8 * WINDOW_BYTE(h, k))

/* What decoding one rate needs. */
typedef struct decoder {
    __m512i high, low;
    uint64_t matrix[CODE_BLOCK][3]; /* hash of what weight k's window has of its three bytes */
} decoder;

/* avx512.c. half_bits: 4..8, 16. */
const decoder *decoder_get_avx512(uint32_t half_bits);

/*
 * What the hash of weight k's window has of byte i of those that the window touches. As assembly:
 * gcc 12 keeps matrices or their addresses in general registers, from which a broadcast takes a
 * shuffle's time; from memory it takes none.
 */
static ALWAYS_INLINE __m512i hash_byte(const decoder *d, const int k, const int i, __m512i x) {
    __m512i hash;
    __asm__("vgf2p8affineqb $0, %c3(%2)%{1to8%}, %1, %0"
            : "=v"(hash)
            : "v"(x), "r"(d), "i"(offsetof(decoder, matrix) + 8 * (size_t)(3 * k + i)), "m"(*d));
    return hash;
}

/*
 * Values of weight k of each of a group's blocks; plane[j]: byte j - 2 of the blocks. Where 512-bit
 * operations have two ports, transforms and shifts share one, lookups have the other: hence
 * vpmultishiftqb, which goes with the lookups, for a shift.
 */
static ALWAYS_INLINE __m512i decode(const decoder *d, int h, int k, const __m512i *plane) {
    const __m512i *p = plane + 2 + WINDOW_BYTE(h, k);
    const __m512i hash =
        WINDOW_SHIFT(h, k) == 0 /* then the older byte is p[0] as it is */
            ? _mm512_xor_si512(p[0], hash_byte(d, k, 1, p[1]))
            : _mm512_ternarylogic_epi64(hash_byte(d, k, 0, p[0]), hash_byte(d, k, 1, p[1]),
                                        hash_byte(d, k, 2, p[2]), 0x96);
    const __m512i shift_by_2 = _mm512_set1_epi64(0x3a322a221a120a02);
    return _mm512_add_epi8(
        _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(shift_by_2, hash), d->high),
        _mm512_permutexvar_epi8(hash, d->low));
}

/* The last group of a row may have fewer than four blocks: puts zeros for those that lack. */
static inline void widen_group(const uint8_t *codes, uint32_t half_bits, uint32_t n_blocks,
                               uint8_t *out) {
    uint8_t from[64];
    for (uint32_t i = 0; i < 64; i++) {
        from[i] = (uint8_t)(i / PACKED_GROUP * n_blocks + i % PACKED_GROUP);
    }
    const __m512i index = _mm512_loadu_si512(from);
    const __mmask64 present = 0x1111111111111111u * ((1u << n_blocks) - 1);
    const __mmask64 read = ((__mmask64)1 << (PACKED_STRIP * n_blocks)) - 1;
    for (uint32_t j = 0; j < half_bits; j++, codes += (size_t)PACKED_STRIP * n_blocks) {
        __m512i plane = _mm512_maskz_loadu_epi8(read, codes);
        _mm512_storeu_si512(out + (size_t)64 * j,
                            _mm512_maskz_permutexvar_epi8(present, index, plane));
    }
}

/*
 * Loads the next group of a strip, with n_blocks left in the row, and returns where it lies: there,
 * or widened. plane[j]: byte j - 2 of each block; before: of the group before, zeros at first;
 * wide: room for 16 planes.
 */
static ALWAYS_INLINE const uint8_t *load_group(const int h, const uint8_t *codes, uint32_t n_blocks,
                                               uint8_t *wide, __m512i before[2],
                                               __m512i plane[18]) {
    if (n_blocks < PACKED_GROUP) {
        widen_group(codes, (uint32_t)h, n_blocks, wide);
        codes = wide;
    }
#define LOAD(j)                                                                                    \
    if (j < h) {                                                                                   \
        plane[j + 2] = _mm512_loadu_si512(codes + GROUP_BYTES * j);                                \
        _mm_prefetch((const char *)codes + GROUP_BYTES * (j + PREFETCH_GROUPS * h), _MM_HINT_T0);  \
    }
    EACH_WEIGHT(LOAD)
#undef LOAD
    if (h != 16) { /* the last two bytes of the block before: one lane's next byte down */
        plane[0] = _mm512_shldi_epi32(plane[h], before[0], 8);
        plane[1] = _mm512_shldi_epi32(plane[h + 1], before[1], 8);
        before[0] = plane[h], before[1] = plane[h + 1];
    }
    return codes;
}

/* Weight k of each block of a group that load_group loaded: v, or q + 128 of int8. */
static ALWAYS_INLINE __m512i group_weight(const decoder *d, int h, int k, const __m512i *plane) {
    return h == 16 ? _mm512_xor_si512(plane[k + 2], _mm512_set1_epi8(-128))
                   : decode(d, h, k, plane);
}

/* n_groups groups of a strip, with n_blocks left in its row: a tile of 16 x 64 bytes each, row k
 * weight k of the group's blocks. Returns where the next group lies. */
static ALWAYS_INLINE const uint8_t *decode_groups(const decoder *d, const int h,
                                                  const uint8_t *codes, uint32_t n_blocks,
                                                  uint32_t n_groups, __m512i before[2],
                                                  uint8_t *out) {
    uint8_t wide[16 * GROUP_BYTES];
    __m512i last[2] = {before[0], before[1]};
    for (uint32_t g = 0; g < n_groups; g++, n_blocks -= PACKED_GROUP, out += TILE_BYTES) {
        __m512i plane[18];
        codes = load_group(h, codes, n_blocks, wide, last, plane);
#define WEIGHT(k) _mm512_storeu_si512(out + GROUP_BYTES * k, group_weight(d, h, k, plane));
        EACH_WEIGHT(WEIGHT)
#undef WEIGHT
        codes += (size_t)GROUP_BYTES * (size_t)h;
    }
    before[0] = last[0], before[1] = last[1];
    return codes;
}

/* ---- Activations and results ------------------------------------------- */

/*
 * One token's activations for products with groups: of each 64, four of one weight's number, then
 * four of the next: those of the group's blocks, zeros past the last. Groups lie `step` bytes
 * apart.
 */
static inline void arrange(const int8_t *q, uint32_t n_cols, uint8_t *out, size_t step) {
    uint8_t from[64];
    for (uint32_t i = 0; i < 64; i++) {
        from[i] = (uint8_t)(i % PACKED_GROUP * CODE_BLOCK + i / PACKED_GROUP);
    }
    const __m512i index = _mm512_loadu_si512(from);
    for (uint32_t c = 0; c < n_cols; c += 64, out += step) {
        const __mmask64 present =
            n_cols - c >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (n_cols - c)) - 1;
        _mm512_storeu_si512(
            out, _mm512_permutexvar_epi8(index, _mm512_maskz_loadu_epi8(present, q + c)));
    }
}

/* Scales of rows [row, row + n), n <= 16, as floats. */
static inline __m512 load_scales(const packed_matrix *w, uint32_t row, uint32_t n) {
    __m256i bf16 = _mm256_maskz_loadu_epi16(first_lanes(n), w->scales + (size_t)2 * row);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

/* Exact sums of n rows for one token to floats. */
static inline void store_rows(const packed_matrix *w, uint32_t row, uint32_t n, const activation *x,
                              __m512i sums, float *y) {
    const uint32_t centre = w->half_bits == 16 ? 128 : CODE_CENTRE;
    sums = _mm512_sub_epi32(sums, _mm512_set1_epi32((int32_t)(centre * (uint32_t)x->sum)));
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), load_scales(w, row, n));
    _mm512_mask_storeu_ps(y + row, first_lanes(n), _mm512_mul_ps(scaled, _mm512_set1_ps(x->scale)));
}

/* amx.c: matmul_packed of kernels_amx. */
void matmul_packed_amx(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                       const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                       uint8_t *scratch);

#endif
