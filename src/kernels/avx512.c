/*
 * avx512.c - kernels for x86-64 with AVX-512 F, BW, VL, DQ, VBMI, VNNI and GFNI.
 *
 * Decoding 64 weights (a tile: 4 rows of 16) takes some ten instructions. In the 128-bit lane of
 * a row the weights stand in the order 0 2 4 .. 14, 1 3 5 .. 15, so that each group of 8 bytes
 * has one parity:
 *
 *     1. a byte permutation brings the bits around each group's windows into its 8 bytes, and
 *        multishift cuts out the newer byte of every window; a second pair the older byte
 *     2. two affine transforms over GF(2) (vgf2p8affineqb), one per byte of the window, and an
 *        XOR make the hash: it is linear
 *     3. two lookups (vpermb), one for each half of the hash, add up to the value 0..127
 *     4. vpdpbusd multiplies with the activations and adds up in int32
 *
 * Invariant: integer sums are exact in any order; the float kernels keep the 16 lanes of
 * docs/NUMERICS.md in one register. Every result is compared with kernels/ref.c by memcmp.
 */
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "code/code.h"
#include "format/container.h"
#include "kernels/math.h"

#include <immintrin.h>

/* ---- The vocabulary of float_kernels.h --------------------------------- */

typedef __m512 f32x16;
typedef __m512i u32x16;

static inline __mmask16 first_lanes(uint32_t n) {
    return (__mmask16)((1u << n) - 1);
}
static inline f32x16 v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline f32x16 v_load_n(const float *p, uint32_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
static inline void v_store(float *p, f32x16 x) {
    _mm512_storeu_ps(p, x);
}
static inline void v_store_n(float *p, uint32_t n, f32x16 x) {
    _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
static inline f32x16 v_load_half(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline f32x16 v_load_half_n(const uint8_t *p, uint32_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
static inline f32x16 v_set1(float x) {
    return _mm512_set1_ps(x);
}
static inline f32x16 v_zero(void) {
    return _mm512_setzero_ps();
}
static inline f32x16 v_add(f32x16 a, f32x16 b) {
    return _mm512_add_ps(a, b);
}
static inline f32x16 v_sub(f32x16 a, f32x16 b) {
    return _mm512_sub_ps(a, b);
}
static inline f32x16 v_mul(f32x16 a, f32x16 b) {
    return _mm512_mul_ps(a, b);
}
static inline f32x16 v_div(f32x16 a, f32x16 b) {
    return _mm512_div_ps(a, b);
}
static inline f32x16 v_max(f32x16 a, f32x16 b) {
    return _mm512_max_ps(a, b);
}
static inline f32x16 v_min(f32x16 a, f32x16 b) {
    return _mm512_min_ps(a, b);
}
static inline u32x16 v_bits(f32x16 x) {
    return _mm512_castps_si512(x);
}
static inline f32x16 v_float(u32x16 x) {
    return _mm512_castsi512_ps(x);
}
static inline u32x16 u_set1(uint32_t x) {
    return _mm512_set1_epi32((int)x);
}
static inline u32x16 u_add(u32x16 a, u32x16 b) {
    return _mm512_add_epi32(a, b);
}
static inline u32x16 u_sub(u32x16 a, u32x16 b) {
    return _mm512_sub_epi32(a, b);
}
static inline u32x16 u_and(u32x16 a, u32x16 b) {
    return _mm512_and_si512(a, b);
}
static inline u32x16 u_max(u32x16 a, u32x16 b) {
    return _mm512_max_epi32(a, b);
}
#define u_shift_left(a, n) _mm512_slli_epi32(a, n)
#define u_shift_right(a, n) _mm512_srli_epi32(a, n)
#define v_swap1(x) _mm512_permute_ps(x, 0xb1)
#define v_swap2(x) _mm512_permute_ps(x, 0x4e)
#define v_swap4(x) _mm512_shuffle_f32x4(x, x, 0xb1)
#define v_swap8(x) _mm512_shuffle_f32x4(x, x, 0x4e)

static inline f32x16 flip(f32x16 x, __mmask16 lanes) {
    __m512i bits = _mm512_castps_si512(x);
    return _mm512_castsi512_ps(
        _mm512_mask_xor_epi32(bits, lanes, bits, _mm512_set1_epi32(INT32_MIN)));
}
#define v_negate(x) flip(x, 0xffff)
#define v_flip1(x) flip(x, 0xaaaa)
#define v_flip2(x) flip(x, 0xcccc)
#define v_flip4(x) flip(x, 0xf0f0)
#define v_flip8(x) flip(x, 0xff00)

static inline float v_sum(f32x16 x) {
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* Vectors are halved and joined until each lane holds one sum: the tree of v_sum, lane by lane. */
static inline f32x16 join8(f32x16 a, f32x16 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
static inline f32x16 join4(f32x16 a, f32x16 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
/* The vectors of items i, i + 4, i + 8, i + 12, in the 128-bit lanes of one. */
static inline f32x16 join_every_fourth(const f32x16 *x) {
    return join4(join8(x[0], x[4]), join8(x[8], x[12]));
}
static inline f32x16 v_sum16(const f32x16 x[16]) {
    const f32x16 a = join_every_fourth(x), b = join_every_fourth(x + 1);
    const f32x16 c = join_every_fourth(x + 2), d = join_every_fourth(x + 3);
    const f32x16 ab = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const f32x16 cd = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x44), _mm512_shuffle_ps(c, d, 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
}

static inline void v_narrow(int8_t *p, uint32_t n, u32x16 x) {
    _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtepi32_epi8(x));
}

static inline f32x16 v_from_int(u32x16 x) {
    return _mm512_cvtepi32_ps(x);
}
/* vpdpbusd wants one unsigned operand: i_dot4 adds 128 to the bytes, which the start takes back. */
static inline u32x16 i_dot4_start(int32_t total) {
    return _mm512_set1_epi32(-128 * total);
}
static inline __m512i four_bytes(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm512_set1_epi32(bits);
}
/* As assembly: gcc 12 copies and spills the sums of the intrinsic. */
static inline u32x16 dot4(u32x16 sum, __m512i positive, __m512i any) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(positive), "v"(any));
    return sum;
}
static inline u32x16 i_dot4(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    __m512i b = _mm512_xor_si512(_mm512_loadu_si512(bytes), _mm512_set1_epi8(-128));
    return dot4(sum, b, four_bytes(four));
}
static inline u32x16 i_dot4_small(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    return dot4(sum, four_bytes(four), _mm512_loadu_si512(bytes));
}

#define KERNEL(name) name##_avx512
#define FLOAT_BLOCK 4
#define Q8_QUERIES 4
#include "kernels/float_kernels.h"

/* ---- Decoding ---------------------------------------------------------- */

/* What decoding one rate needs; in registers during a loop. */
typedef struct decoder {
    __m512i newer_bytes, newer_shifts;  /* step 1, the newer byte of the windows */
    __m512i older_bytes, older_shifts;  /* step 1, the older byte */
    __m512i newer_matrix, older_matrix; /* step 2 */
    __m512i high, low;                  /* step 3 */
    __mmask64 first, later;             /* bytes of a load that exist, at a row's start and later */
    uint32_t tile_bytes;
} decoder;

/*
 * Step 1 for the byte of the window that begins `before` bits ahead of a weight's end. A load
 * starts one tile early: row r's block of the tile before lies at r * half_bits, its block of the
 * tile at hand at (4 + r) * half_bits. For every group: which bytes of the load, from the one
 * with the first bit on, and where in them the eight pieces start.
 */
static void fill_step1(const struct code_table *code, int before, __m512i *bytes_out,
                       __m512i *shifts_out) {
    const int half_bits = code->half_bits;
    uint8_t bytes[64], shifts[64];
    for (int at = 0; at < 64; at++) {
        const int row = at / 16, odd = at / 8 % 2, i = at % 8;
        const int begin = code->width[0] + odd * code->width[1] - before; /* of piece 0 */
        const int first = (begin + 16) / 8 - 2;                           /* begin >= -16 */
        const int byte = first + i;
        bytes[at] =
            (uint8_t)(byte < 0 ? (row + 1) * half_bits + byte : (4 + row) * half_bits + byte);
        shifts[at] = (uint8_t)(begin - 8 * first + half_bits * i);
    }
    *bytes_out = _mm512_loadu_si512(bytes);
    *shifts_out = _mm512_loadu_si512(shifts);
}

/*
 * At 4 bits the pieces of even weights straddle nine bytes. There the window of weight 2i is the
 * high half of byte i-2, byte i-1 and the low half of byte i; that of 2i+1 bytes i-1 and i. Step 1
 * joins byte i and, for even weights, the high half of byte i-2.
 */
static void fill_step1_4bit(__m512i *newest, __m512i *middle, __m512i *oldest) {
    uint8_t bytes[3][64];
    for (int at = 0; at < 64; at++) {
        for (int back = 0; back < 3; back++) {
            const int row = at / 16, byte = at % 8 - back;
            bytes[back][at] = (uint8_t)((byte < 0 ? (row + 1) * 8 : (4 + row) * 8) + byte);
        }
    }
    *newest = _mm512_loadu_si512(bytes[0]);
    *middle = _mm512_loadu_si512(bytes[1]);
    *oldest = _mm512_loadu_si512(bytes[2]);
}

/*
 * The matrix of vgf2p8affineqb for eight bits whose hashes are given: output bit i is the parity
 * of the input AND byte 7 - i of the matrix.
 */
static uint64_t affine_matrix(const uint8_t hash[8]) {
    uint64_t matrix = 0;
    for (int i = 0; i < 8; i++) {
        uint64_t row = 0;
        for (int b = 0; b < 8; b++) {
            row |= (uint64_t)(hash[b] >> i & 1) << b;
        }
        matrix |= row << (8 * (7 - i));
    }
    return matrix;
}

/* Groups alternate between even and odd weights. */
static __m512i both_matrices(const uint8_t even[8], const uint8_t odd[8]) {
    const long long e = (long long)affine_matrix(even), o = (long long)affine_matrix(odd);
    return _mm512_set_epi64(o, e, o, e, o, e, o, e);
}

static decoder decoder_make(uint32_t half_bits) {
    decoder d;
    memset(&d, 0, sizeof d);
    if (half_bits == 16) {
        return d; /* int8 needs no decoding */
    }
    const struct code_table *code = code_table_get((int)half_bits);
    uint8_t column[16];
    for (int j = 0; j < 16; j++) {
        column[j] = code_hash(code, 1u << j);
    }
    if (half_bits == 8) {
        uint8_t even[8];
        memcpy(even, column + 12, 4);
        memcpy(even + 4, column, 4);
        fill_step1_4bit(&d.newer_bytes, &d.older_bytes, &d.newer_shifts);
        d.newer_matrix = both_matrices(even, column + 8);
        d.older_matrix = both_matrices(column + 4, column);
        d.older_shifts = _mm512_maskz_set1_epi8(0x00ff00ff00ff00ff, (char)0xf0); /* even groups */
    } else {
        fill_step1(code, 8, &d.newer_bytes, &d.newer_shifts);
        fill_step1(code, 16, &d.older_bytes, &d.older_shifts);
        d.newer_matrix = both_matrices(column + 8, column + 8);
        d.older_matrix = both_matrices(column, column);
    }
    /* vpermb looks at six bits: the tables repeat for those that are not meant. */
    uint8_t high[64], low[64];
    for (int i = 0; i < 64; i++) {
        high[i] = code->high[i >> 2];
        low[i] = code->low[i & 15];
    }
    d.high = _mm512_loadu_si512(high);
    d.low = _mm512_loadu_si512(low);
    d.tile_bytes = 4 * half_bits;
    d.later = half_bits == 8 ? ~(__mmask64)0 : ((__mmask64)1 << (8 * half_bits)) - 1;
    d.first = d.later & ~(((__mmask64)1 << (4 * half_bits)) - 1);
    return d;
}

/* Steps 1 to 3: the values of a tile; `raw` is loaded from one tile before it. */
static inline __m512i decode_tile(const decoder *d, bool four_bits, __m512i raw) {
    __m512i newer, older;
    if (four_bits) {
        newer = _mm512_ternarylogic_epi32(d->older_shifts,
                                          _mm512_permutexvar_epi8(d->newer_shifts, raw),
                                          _mm512_permutexvar_epi8(d->newer_bytes, raw), 0xca);
        older = _mm512_permutexvar_epi8(d->older_bytes, raw);
    } else {
        newer = _mm512_multishift_epi64_epi8(d->newer_shifts,
                                             _mm512_permutexvar_epi8(d->newer_bytes, raw));
        older = _mm512_multishift_epi64_epi8(d->older_shifts,
                                             _mm512_permutexvar_epi8(d->older_bytes, raw));
    }
    __m512i hash = _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(newer, d->newer_matrix, 0),
                                    _mm512_gf2p8affine_epi64_epi8(older, d->older_matrix, 0));
    return _mm512_add_epi8(_mm512_permutexvar_epi8(_mm512_srli_epi16(hash, 2), d->high),
                           _mm512_permutexvar_epi8(hash, d->low));
}

/* Loads a tile of int8 weights as unsigned numbers, 128 more. */
static inline __m512i load_i8(const uint8_t *tile) {
    return _mm512_xor_si512(_mm512_loadu_si512(tile), _mm512_set1_epi8(-128));
}

/* Within 16 bytes: 0 2 4 .. 14, 1 3 .. 15 from the natural order, and back. */
static inline __m512i to_split_order(__m512i x) {
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1,
                                                                       3, 5, 7, 9, 11, 13, 15)));
}
static inline __m512i to_natural_order(__m512i x) {
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4,
                                                                       12, 5, 13, 6, 14, 7, 15)));
}

/* sum + products of unsigned v with signed x, four neighbours in each lane */
static inline __m512i add_products(__m512i sum, __m512i v, __m512i x) {
#if defined(__clang__)
    return _mm512_dpbusd_epi32(sum, v, x);
#else /* gcc 12 copies every sum to another register before and back after the intrinsic */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(v), "v"(x));
    return sum;
#endif
}

/* ---- From sums to floats ----------------------------------------------- */

/* Each 128-bit lane of an accumulator holds four partial sums of a row. The result has the four
 * rows of a in its lane 0, those of b, c and d in lanes 1, 2 and 3. */
static inline __m512i sum_rows(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i rows = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), rows);
}

/* Scales of rows [row, row + n), n <= 16, as floats. */
static inline __m512 load_scales(const packed_matrix *w, uint32_t row, uint32_t n) {
    __m256i bf16 = _mm256_maskz_loadu_epi16(first_lanes(n), w->scales + (size_t)2 * row);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

/* ---- One token --------------------------------------------------------- */

/* How far ahead of the tile at hand the codes are fetched; they are read once, in order. */
enum { PREFETCH = 3072 };

/* One strip against one token in split order: the four sums of each row. */
static inline __m512i dot_strip(const decoder *d, bool four_bits, const uint8_t *p, const int8_t *x,
                                uint32_t n_tiles) {
    const size_t step = d->tile_bytes;
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0;
#define TILE(sum, i, mask)                                                                         \
    sum = add_products(                                                                            \
        sum,                                                                                       \
        decode_tile(d, four_bits, _mm512_maskz_loadu_epi8(mask, p + (i)*step - d->tile_bytes)),    \
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)(x + 16 * (i)))))
    TILE(a0, 0, d->first);
    uint32_t left = n_tiles - 1;
    p += step, x += 16;
    for (; left >= 4; left -= 4, p += 4 * step, x += 64) {
        _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
        _mm_prefetch((const char *)p + PREFETCH + 64, _MM_HINT_T0);
        TILE(a0, 0, d->later);
        TILE(a1, 1, d->later);
        TILE(a2, 2, d->later);
        TILE(a3, 3, d->later);
    }
    for (; left > 0; left--, p += step, x += 16) {
        TILE(a0, 0, d->later);
    }
#undef TILE
    return _mm512_add_epi32(_mm512_add_epi32(a0, a1), _mm512_add_epi32(a2, a3));
}

static inline __m512i dot_strip_i8(const uint8_t *p, const int8_t *x, uint32_t n_tiles) {
    __m512i a0 = _mm512_setzero_si512(), a1 = a0;
    for (size_t i = 0; i < n_tiles; i++) {
        const __m512i xv =
            _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)(x + 16 * i)));
        _mm_prefetch((const char *)p + 64 * i + PREFETCH, _MM_HINT_T0);
        if (i % 2 == 0) {
            a0 = add_products(a0, load_i8(p + 64 * i), xv);
        } else {
            a1 = add_products(a1, load_i8(p + 64 * i), xv);
        }
    }
    return _mm512_add_epi32(a0, a1);
}

static void matvec(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                   const activation *x, float *y, uint8_t *scratch) {
    const uint32_t n_tiles = w->n_cols / 16, half_bits = w->half_bits;
    const size_t strip_bytes = (size_t)n_tiles * 4 * half_bits;
    const int8_t *q = x->q;
    const decoder d = decoder_make(half_bits);
    if (half_bits != 16) {
        for (uint32_t i = 0; i < n_tiles; i++) {
            __m128i v = _mm_loadu_si128((const __m128i *)(const void *)(q + (size_t)16 * i));
            _mm_storeu_si128((__m128i *)(void *)(scratch + (size_t)16 * i),
                             _mm512_castsi512_si128(to_split_order(_mm512_castsi128_si512(v))));
        }
        q = (const int8_t *)scratch;
    }
    const int32_t centre = half_bits == 16 ? 128 : CODE_CENTRE;
    const __m512i offset = _mm512_mullo_epi32(_mm512_set1_epi32(centre), _mm512_set1_epi32(x->sum));
    for (uint32_t r = row_begin; r < row_end; r += 16) {
        const uint32_t n = row_end - r < 16 ? row_end - r : 16;
        __m512i strip[4];
        for (uint32_t s = 0; s < 4; s++) {
            const uint8_t *p = w->codes + (r / 4 + s) * strip_bytes;
            strip[s] = 4 * s >= n        ? _mm512_setzero_si512()
                       : half_bits == 16 ? dot_strip_i8(p, q, n_tiles)
                       : half_bits == 8  ? dot_strip(&d, true, p, q, n_tiles)
                                         : dot_strip(&d, false, p, q, n_tiles);
        }
        __m512i sums = sum_rows(strip[0], strip[1], strip[2], strip[3]);
        __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, offset));
        v_store_n(y + r, n, v_mul(v_mul(sum, load_scales(w, r, n)), _mm512_set1_ps(x->scale)));
    }
}

/* ---- Several tokens ---------------------------------------------------- */

/* A strip's values in natural order, 64 bytes per tile, as unsigned numbers. */
static void unpack_strip(const packed_matrix *w, const decoder *d, uint32_t row, uint8_t *out) {
    const uint32_t n_tiles = w->n_cols / 16;
    const uint8_t *p = w->codes + (size_t)(row / 4) * n_tiles * 4 * w->half_bits;
    if (w->half_bits == 16) {
        for (size_t i = 0; i < n_tiles; i++) {
            _mm512_storeu_si512(out + 64 * i, load_i8(p + 64 * i));
        }
        return;
    }
    for (uint32_t i = 0; i < n_tiles; i++, p += d->tile_bytes, out += 64) {
        __m512i raw = _mm512_maskz_loadu_epi8(i == 0 ? d->first : d->later, p - d->tile_bytes);
        __m512i v = w->half_bits == 8 ? decode_tile(d, true, raw) : decode_tile(d, false, raw);
        _mm512_storeu_si512(out, to_natural_order(v));
    }
}

/*
 * Two strips against four or eight tokens. The sums are named one by one, for arrays of registers
 * end up in memory. sums[s][i]: rows of strip s, lane l for token 4 * i + l.
 */
#define TOKEN(t)                                                                                   \
    do {                                                                                           \
        const __m512i xv = _mm512_broadcast_i32x4(                                                 \
            _mm_loadu_si128((const __m128i *)(const void *)(x[t] + 16 * i)));                      \
        a##t = add_products(a##t, w0, xv);                                                         \
        b##t = add_products(b##t, w1, xv);                                                         \
    } while (0)

static void dot_block4(const uint8_t *v0, const uint8_t *v1, const int8_t *const x[8],
                       uint32_t n_tiles, __m512i sums[2][2]) {
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0;
    __m512i b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (size_t i = 0; i < n_tiles; i++) {
        const __m512i w0 = _mm512_loadu_si512(v0 + 64 * i), w1 = _mm512_loadu_si512(v1 + 64 * i);
        TOKEN(0);
        TOKEN(1);
        TOKEN(2);
        TOKEN(3);
    }
    sums[0][0] = sum_rows(a0, a1, a2, a3);
    sums[1][0] = sum_rows(b0, b1, b2, b3);
}

static void dot_block8(const uint8_t *v0, const uint8_t *v1, const int8_t *const x[8],
                       uint32_t n_tiles, __m512i sums[2][2]) {
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0;
    __m512i b0 = a0, b1 = a0, b2 = a0, b3 = a0, b4 = a0, b5 = a0, b6 = a0, a7 = a0, b7 = a0;
    for (size_t i = 0; i < n_tiles; i++) {
        const __m512i w0 = _mm512_loadu_si512(v0 + 64 * i), w1 = _mm512_loadu_si512(v1 + 64 * i);
        TOKEN(0);
        TOKEN(1);
        TOKEN(2);
        TOKEN(3);
        TOKEN(4);
        TOKEN(5);
        TOKEN(6);
        TOKEN(7);
    }
    sums[0][0] = sum_rows(a0, a1, a2, a3);
    sums[0][1] = sum_rows(a4, a5, a6, a7);
    sums[1][0] = sum_rows(b0, b1, b2, b3);
    sums[1][1] = sum_rows(b4, b5, b6, b7);
}

/* Exact sums of four rows for n_tokens <= 8 tokens to floats in y. */
static void store_block(const packed_matrix *w, uint32_t row, uint32_t n_rows, const activation *x,
                        uint32_t n_tokens, const __m512i sums[2], float *y, size_t y_stride) {
    const uint32_t centre = w->half_bits == 16 ? 128 : CODE_CENTRE;
    const __m128 row_scale = _mm512_castps512_ps128(load_scales(w, row, n_rows));
    int32_t exact[32];
    memcpy(exact, sums, sizeof exact);
    for (uint32_t t = 0; t < n_tokens; t++) {
        __m128i sum = _mm_loadu_si128((const __m128i *)(const void *)(exact + 4 * t));
        sum = _mm_sub_epi32(sum, _mm_set1_epi32((int32_t)(centre * (uint32_t)x[t].sum)));
        __m128 out =
            _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(sum), row_scale), _mm_set1_ps(x[t].scale));
        _mm_mask_storeu_ps(y + t * y_stride + row, (__mmask8)first_lanes(n_rows), out);
    }
}

static void matmul_packed_avx512(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                                 const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                                 uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % 4 == 0);
    if (n_tokens == 1) {
        matvec(w, row_begin, row_end, x, y, scratch);
        return;
    }
    uint8_t *values[2] = {scratch, scratch + (size_t)4 * w->n_cols};
    const decoder d = decoder_make(w->half_bits);
    for (uint32_t r = row_begin; r < row_end; r += 8) {
        const uint32_t n_strips = row_end - r > 4 ? 2 : 1;
        for (uint32_t s = 0; s < n_strips; s++) {
            unpack_strip(w, &d, r + 4 * s, values[s]);
        }
        for (uint32_t t = 0; t < n_tokens; t += 8) {
            const uint32_t n = n_tokens - t < 8 ? n_tokens - t : 8;
            const int8_t *q[8];
            for (uint32_t i = 0; i < 8; i++) { /* tokens past the last repeat it */
                q[i] = x[t + (i < n ? i : n - 1)].q;
            }
            __m512i sums[2][2];
            (n > 4 ? dot_block8 : dot_block4)(values[0], values[n_strips - 1], q, w->n_cols / 16,
                                              sums);
            for (uint32_t s = 0; s < n_strips; s++) {
                const uint32_t row = r + 4 * s, n_rows = row_end - row < 4 ? row_end - row : 4;
                store_block(w, row, n_rows, x + t, n, sums[s], y + t * y_stride, y_stride);
            }
        }
    }
}

const kernels kernels_avx512 = {
    .name = "avx512",
    .macs_per_microsecond = 60000,
    .matmul_packed = matmul_packed_avx512,
    .unpack_row = unpack_row_avx512,
    .quantize_activation = quantize_activation_avx512,
    .matmul_f32 = matmul_f32_avx512,
    .row_to_f32 = row_to_f32_avx512,
    .rmsnorm = rmsnorm_avx512,
    .rope = rope_avx512,
    .swiglu = swiglu_avx512,
    .add = add_avx512,
    .attention = attention_avx512,
    .rotate = rotate_avx512,
    .rotate_inverse = rotate_inverse_avx512,
};

#else

typedef int kernels_avx512_needs_x86_64; /* ISO C forbids an empty file */

#endif
