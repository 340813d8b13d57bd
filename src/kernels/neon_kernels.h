/*
 * neon_kernels.h - the kernels for AArch64, one text for three tables: neon.c (every AArch64),
 * neon_dotprod.c (with SDOT) and neon_i8mm.c (with SMMLA and EOR3) include it.
 *
 * Decoding 256 weights (a group: 4 tiles of 4 rows of 16):
 *
 *     1. half_bits vectors: vector j has byte j of each of the 16 row blocks, block (row, tile)
 *        in lane 4 * row + tile. So all lanes want the same bits of their bytes
 *     2. index vectors: nibbles of the row's string of bits, or 5 bits of it, so placed that
 *        the window of every weight is 4 or 5 neighbouring ones. Those before a block are the
 *        last ones of the lane before
 *     3. the hash is linear, so it is the XOR of lookups (TBL), one for each index vector
 *     4. two lookups, one for each half of the hash, add up to the value 0..127 of one weight
 *        in each block
 *     5. the four tiles of a row are the four bytes of a 32-bit lane: SDOT adds their products
 *        with the activations of columns k, 16 + k, 32 + k, 48 + k
 *
 * Invariant: integer sums are exact in any order; the float kernels keep the 16 lanes of
 * docs/NUMERICS.md in four registers. Every result is compared with kernels/ref.c by memcmp.
 *
 * The file that includes this one defines KERNEL(name), KERNELS_NAME, MACS_PER_MICROSECOND and
 * LEVEL: BASELINE, DOTPROD or I8MM.
 */
#ifndef KERNELS_NEON_KERNELS_H
#define KERNELS_NEON_KERNELS_H

#include "code/code.h"
#include "format/container.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <arm_neon.h>

#define BASELINE 0
#define DOTPROD 1
#define I8MM 2

/* Functions whose first argument is a constant, of which nothing remains. */
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ---- The vocabulary of float_kernels.h --------------------------------- */

typedef struct f32x16 {
    float32x4_t a, b, c, d; /* lanes 0..3, 4..7, 8..11, 12..15 */
} f32x16;
typedef struct u32x16 {
    uint32x4_t a, b, c, d;
} u32x16;

static inline f32x16 v_load(const float *p) {
    return (f32x16){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
static inline f32x16 v_load_n(const float *p, uint32_t n) {
    float items[16] = {0};
    memcpy(items, p, n * sizeof *p);
    return v_load(items);
}
static inline void v_store(float *p, f32x16 x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
static inline void v_store_n(float *p, uint32_t n, f32x16 x) {
    float items[16];
    v_store(items, x);
    memcpy(p, items, n * sizeof *p);
}
static inline float32x4_t load_half4(const uint8_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
static inline f32x16 v_load_half(const uint8_t *p) {
    return (f32x16){load_half4(p), load_half4(p + 8), load_half4(p + 16), load_half4(p + 24)};
}
static inline f32x16 v_load_half_n(const uint8_t *p, uint32_t n) {
    uint8_t halves[32] = {0};
    memcpy(halves, p, (size_t)2 * n);
    return v_load_half(halves);
}

/* One operation on all four registers of x, or of x and y. */
#define EACH1(type, f, ...)                                                                        \
    ((type){f(x.a, ##__VA_ARGS__), f(x.b, ##__VA_ARGS__), f(x.c, ##__VA_ARGS__),                   \
            f(x.d, ##__VA_ARGS__)})
#define EACH2(type, f) ((type){f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)})
static inline f32x16 v_set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return (f32x16){v, v, v, v};
}
static inline f32x16 v_zero(void) {
    return v_set1(0.0f);
}
static inline f32x16 v_add(f32x16 x, f32x16 y) {
    return EACH2(f32x16, vaddq_f32);
}
static inline f32x16 v_sub(f32x16 x, f32x16 y) {
    return EACH2(f32x16, vsubq_f32);
}
static inline f32x16 v_mul(f32x16 x, f32x16 y) {
    return EACH2(f32x16, vmulq_f32);
}
static inline f32x16 v_div(f32x16 x, f32x16 y) {
    return EACH2(f32x16, vdivq_f32);
}
/* Not FMAX and FMIN, which return NaN if either operand is one. */
static inline float32x4_t greater(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}
static inline float32x4_t lesser(float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcltq_f32(x, y), x, y);
}
static inline f32x16 v_max(f32x16 x, f32x16 y) {
    return EACH2(f32x16, greater);
}
static inline f32x16 v_min(f32x16 x, f32x16 y) {
    return EACH2(f32x16, lesser);
}
static inline u32x16 v_bits(f32x16 x) {
    return EACH1(u32x16, vreinterpretq_u32_f32);
}
static inline f32x16 v_float(u32x16 x) {
    return EACH1(f32x16, vreinterpretq_f32_u32);
}
static inline u32x16 u_set1(uint32_t x) {
    const uint32x4_t v = vdupq_n_u32(x);
    return (u32x16){v, v, v, v};
}
static inline u32x16 u_add(u32x16 x, u32x16 y) {
    return EACH2(u32x16, vaddq_u32);
}
static inline u32x16 u_sub(u32x16 x, u32x16 y) {
    return EACH2(u32x16, vsubq_u32);
}
static inline u32x16 u_and(u32x16 x, u32x16 y) {
    return EACH2(u32x16, vandq_u32);
}
static inline uint32x4_t greater_signed(uint32x4_t x, uint32x4_t y) {
    return vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(x), vreinterpretq_s32_u32(y)));
}
static inline u32x16 u_max(u32x16 x, u32x16 y) {
    return EACH2(u32x16, greater_signed);
}
static inline u32x16 u_shift_left(u32x16 x, int n) {
    return EACH1(u32x16, vshlq_u32, vdupq_n_s32(n));
}
static inline u32x16 u_shift_right(u32x16 x, int n) {
    return EACH1(u32x16, vshlq_u32, vdupq_n_s32(-n));
}
static inline float32x4_t swap_halves(float32x4_t x) {
    return vextq_f32(x, x, 2);
}
static inline f32x16 v_swap1(f32x16 x) {
    return EACH1(f32x16, vrev64q_f32);
}
static inline f32x16 v_swap2(f32x16 x) {
    return EACH1(f32x16, swap_halves);
}
static inline f32x16 v_swap4(f32x16 x) {
    return (f32x16){x.b, x.a, x.d, x.c};
}
static inline f32x16 v_swap8(f32x16 x) {
    return (f32x16){x.c, x.d, x.a, x.b};
}

/* Signs changed where the mask has its top bit set. */
static inline float32x4_t flip(float32x4_t x, uint32x4_t mask) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), mask));
}
static inline f32x16 v_negate(f32x16 x) {
    return EACH1(f32x16, vnegq_f32);
}
static inline f32x16 v_flip1(f32x16 x) {
    const uint32x4_t mask = {0, 0x80000000u, 0, 0x80000000u};
    return EACH1(f32x16, flip, mask);
}
static inline f32x16 v_flip2(f32x16 x) {
    const uint32x4_t mask = {0, 0, 0x80000000u, 0x80000000u};
    return EACH1(f32x16, flip, mask);
}
static inline f32x16 v_flip4(f32x16 x) {
    return (f32x16){x.a, vnegq_f32(x.b), x.c, vnegq_f32(x.d)};
}
static inline f32x16 v_flip8(f32x16 x) {
    return (f32x16){x.a, x.b, vnegq_f32(x.c), vnegq_f32(x.d)};
}

/* The tree of v_sum: lanes l, l + 8 and l, l + 4; then l, l + 2 of two vectors; then l, l + 1. */
static inline float32x4_t sum_to4(f32x16 x) {
    return vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
}
static inline float32x4_t sum_to2(float32x4_t x, float32x4_t y) {
    return vaddq_f32(vcombine_f32(vget_low_f32(x), vget_low_f32(y)),
                     vcombine_f32(vget_high_f32(x), vget_high_f32(y)));
}
static inline float v_sum(f32x16 x) {
    float32x4_t four = sum_to4(x);
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
static inline float32x4_t sum_four(const f32x16 x[4]) {
    return vpaddq_f32(sum_to2(sum_to4(x[0]), sum_to4(x[1])), sum_to2(sum_to4(x[2]), sum_to4(x[3])));
}
static inline f32x16 v_sum16(const f32x16 x[16]) {
    return (f32x16){sum_four(x), sum_four(x + 4), sum_four(x + 8), sum_four(x + 12)};
}

/* The lanes are within -128..127. */
static inline void v_narrow(int8_t *p, uint32_t n, u32x16 x) {
    uint16x8_t low = vcombine_u16(vmovn_u32(x.a), vmovn_u32(x.b));
    uint16x8_t high = vcombine_u16(vmovn_u32(x.c), vmovn_u32(x.d));
    int8x16_t bytes = vreinterpretq_s8_u8(vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
    if (n == 16) {
        vst1q_s8(p, bytes);
    } else {
        int8_t all[16];
        vst1q_s8(all, bytes);
        memcpy(p, all, n);
    }
}

static inline f32x16 v_from_int(u32x16 x) {
    const uint32x4_t each[4] = {x.a, x.b, x.c, x.d};
    float32x4_t out[4];
    for (int i = 0; i < 4; i++) {
        out[i] = vcvtq_f32_s32(vreinterpretq_s32_u32(each[i]));
    }
    return (f32x16){out[0], out[1], out[2], out[3]};
}
static inline u32x16 i_dot4_start(int32_t total) {
    (void)total;
    return u_set1(0);
}
/* Four bytes of each of four lanes. None is -128, so that two products fit into 16 bits. */
static inline uint32x4_t dot4(uint32x4_t sum, const int8_t *bytes, int8x16_t x) {
    const int8x16_t v = vld1q_s8(bytes);
    int32x4_t s = vreinterpretq_s32_u32(sum);
#if LEVEL == BASELINE
    s = vpadalq_s16(s, vpaddq_s16(vmull_s8(vget_low_s8(v), vget_low_s8(x)), vmull_high_s8(v, x)));
#else
    s = vdotq_s32(s, v, x);
#endif
    return vreinterpretq_u32_s32(s);
}
static inline u32x16 i_dot4(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    int32_t word;
    memcpy(&word, four, sizeof word);
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(word));
    return (u32x16){dot4(sum.a, bytes, x), dot4(sum.b, bytes + 16, x), dot4(sum.c, bytes + 32, x),
                    dot4(sum.d, bytes + 48, x)};
}
static inline u32x16 i_dot4_small(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    return i_dot4(sum, bytes, four);
}

#define FLOAT_BLOCK 2
#define Q8_QUERIES 1
#include "kernels/float_kernels.h"

/* ---- Decoding: which bits the index vectors have ----------------------- */

/*
 * Index vector m, counted from the block's first, negative before it:
 *
 *     4, 6 and 8 half bits   nibble m of the row's string of bits
 *     5                      the 5 bits of pair m of weights
 *     7                      of the 8 bits before bit 7i + 7, i being a pair: m = 2i the lower
 *                            nibble, m = 2i + 1 the upper; for some weights 5 bits of them
 *
 * The window of weight k is in index vectors newest(k), newest(k) - 1, ...: n_taps of them. Where
 * it lies in them repeats after n_classes weights.
 */
enum { MAX_TAPS = 5, MAX_CLASSES = 4, MAX_INDEXES = 16, BEFORE = 4, GROUP_TILES = 4 };

INLINE int n_indexes(uint32_t half_bits) {
    return half_bits < 6 ? 8 : half_bits == 6 ? 12 : 16;
}
INLINE int n_classes(uint32_t half_bits) {
    return half_bits == 6 ? 4 : 2;
}
INLINE int newest(uint32_t half_bits, int k) {
    return half_bits < 6 ? k / 2 : half_bits == 6 ? (3 * k + 2) / 4 : k;
}
INLINE int n_taps(uint32_t half_bits, int k) {
    const bool fifth = (half_bits == 4 && k % 2 == 0) || (half_bits == 6 && k % 4 != 3) ||
                       (half_bits == 7 && k % 2 == 1);
    return fifth ? 5 : 4;
}
/* Whether a tap of weight k looks at 5 bits, not 4. */
INLINE bool is_wide(uint32_t half_bits, int k, int tap) {
    return half_bits == 5 || (half_bits == 7 && k % 2 == 0 && (tap == 0 || tap == 3));
}
INLINE int index_begin(uint32_t half_bits, int m, bool wide) {
    const int odd = m & 1;
    return half_bits == 5   ? 5 * m
           : half_bits == 7 ? (m - odd) / 2 * 7 - 1 + odd * (wide ? 3 : 4)
                            : 4 * m;
}

typedef struct decoder {
    uint8x16x2_t tap[MAX_CLASSES][MAX_TAPS]; /* hash of an index vector's part of the window */
    uint8x16_t high, low;                    /* step 4 */
    uint8x16_t order[2];                     /* step 1 */
} decoder;

/* Step 1's permutation of bytes, for each rate what load_bytes needs. */
static void fill_order(uint32_t half_bits, decoder *d) {
    uint8_t order[2][16] = {{0}};
    const uint32_t tile_bytes = 4 * half_bits;
    for (uint32_t lane = 0; lane < 16; lane++) {
        const uint32_t quarter = lane / 4, i = lane % 4;
        if (half_bits == 4) { /* to [row][tile] from [tile][row] */
            order[0][lane] = (uint8_t)(4 * i + quarter);
        } else if (half_bits % 2 == 0) { /* the same for one half of each block */
            order[0][lane] = (uint8_t)(8 * i + 2 * quarter);
            order[1][lane] = (uint8_t)(8 * i + 2 * quarter + 1);
        } else { /* to [byte][row]: of a tile's first and last 16 bytes */
            for (uint32_t part = 0; part < 2; part++) {
                const uint32_t j = 4 * part + quarter, byte = i * half_bits + j;
                order[part][lane] = (uint8_t)(byte < 16 ? byte : byte + 32 - tile_bytes);
            }
        }
    }
    d->order[0] = vld1q_u8(order[0]);
    d->order[1] = vld1q_u8(order[1]);
}

static void decoder_fill(uint32_t half_bits, decoder *d) {
    const struct code_table *code = code_table_get((int)half_bits);
    const int h = (int)half_bits;
    memset(d, 0, sizeof *d);
    for (int k = 0; k < n_classes(half_bits); k++) {
        const int begin = k / 2 * h + (k % 2 != 0 ? h : code->width[0]) - CODE_WINDOW;
        uint32_t missing = 0xffff; /* bits of the window that no tap has yet */
        for (int tap = 0; tap < n_taps(half_bits, k); tap++) {
            const bool wide = is_wide(half_bits, k, tap);
            const int bits = wide ? 5 : 4;
            const int first = index_begin(half_bits, newest(half_bits, k) - tap, wide) - begin;
            uint8_t hash[32] = {0};
            for (int i = 1; i < 1 << bits; i++) {
                const int bit = first + __builtin_ctz((unsigned)i);
                const bool mine = bit >= 0 && bit < CODE_WINDOW && (missing >> bit & 1) != 0;
                hash[i] = hash[i & (i - 1)] ^ (mine ? code_hash(code, 1u << bit) : 0);
            }
            for (int bit = first; bit < first + bits; bit++) {
                missing &= bit >= 0 ? ~(1u << bit) : ~0u;
            }
            d->tap[k][tap] = (uint8x16x2_t){{vld1q_u8(hash), vld1q_u8(hash + 16)}};
        }
        assert(missing == 0);
    }
    d->high = vld1q_u8(code->high);
    d->low = vld1q_u8(code->low);
    fill_order(half_bits, d);
}

/* ---- Decoding: steps 1 to 4 -------------------------------------------- */

/* Four tiles' [byte][row] to four bytes' [row][tile]. */
INLINE void join_tiles(const uint8x16_t tile[4], uint8x16_t out[4]) {
    const uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(tile[0], tile[1]));
    const uint16x8_t b = vreinterpretq_u16_u8(vzip1q_u8(tile[2], tile[3]));
    const uint16x8_t c = vreinterpretq_u16_u8(vzip2q_u8(tile[0], tile[1]));
    const uint16x8_t d = vreinterpretq_u16_u8(vzip2q_u8(tile[2], tile[3]));
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(a, b));
    out[1] = vreinterpretq_u8_u16(vzip2q_u16(a, b));
    out[2] = vreinterpretq_u8_u16(vzip1q_u16(c, d));
    out[3] = vreinterpretq_u8_u16(vzip2q_u16(c, d));
}

/* Step 1: the bytes of the group at p, 16 * half_bits of them. */
INLINE void load_bytes(uint32_t half_bits, const decoder *d, const uint8_t *p, uint8x16_t byte[8]) {
    if (half_bits == 4) { /* bytes 0 of all blocks, bytes 1, ... */
        const uint8x16x4_t all = vld4q_u8(p);
        UNROLL for (int j = 0; j < 4; j++) {
            byte[j] = vqtbl1q_u8(all.val[j], d->order[0]);
        }
    } else if (half_bits == 6) { /* half blocks are three bytes */
        const uint8x16x3_t a = vld3q_u8(p), b = vld3q_u8(p + 48);
        UNROLL for (int j = 0; j < 3; j++) {
            const uint8x16x2_t both = {{a.val[j], b.val[j]}};
            byte[j] = vqtbl2q_u8(both, d->order[0]);
            byte[3 + j] = vqtbl2q_u8(both, d->order[1]);
        }
    } else if (half_bits == 8) { /* half blocks are four bytes */
        const uint8x16x4_t a = vld4q_u8(p), b = vld4q_u8(p + 64);
        UNROLL for (int j = 0; j < 4; j++) {
            const uint8x16x2_t both = {{a.val[j], b.val[j]}};
            byte[j] = vqtbl2q_u8(both, d->order[0]);
            byte[4 + j] = vqtbl2q_u8(both, d->order[1]);
        }
    } else {
        const size_t tile_bytes = (size_t)4 * half_bits;
        uint8x16_t begin[4], end[4], rest[4];
        UNROLL for (size_t t = 0; t < 4; t++) {
            const uint8_t *tile = p + t * tile_bytes;
            const uint8x16x2_t all = {{vld1q_u8(tile), vld1q_u8(tile + tile_bytes - 16)}};
            begin[t] = vqtbl2q_u8(all, d->order[0]);
            end[t] = vqtbl2q_u8(all, d->order[1]);
        }
        join_tiles(begin, byte);
        join_tiles(end, rest);
        UNROLL for (uint32_t j = 4; j < half_bits; j++) {
            byte[j] = rest[j - 4];
        }
    }
}

/* In each lane, what lies one tile earlier in the row; `before` is the group before. */
INLINE uint8x16_t tile_before(uint8x16_t before, uint8x16_t x) {
    const uint32x4_t last = vshrq_n_u32(vreinterpretq_u32_u8(before), 24);
    return vreinterpretq_u8_u32(vsliq_n_u32(last, vreinterpretq_u32_u8(x), 8));
}

/*
 * Step 2. The index vectors from BEFORE before the block on; `last` is what they are made of: for
 * 5 half bits they themselves, else bytes with two of them each, the last one first.
 */
typedef struct indexes {
    uint8x16_t at[BEFORE + MAX_INDEXES];
    uint8x16_t wide[BEFORE + MAX_INDEXES]; /* 7 half bits: of 5 bits */
} indexes;
typedef struct previous {
    uint8x16_t last[3]; /* zeros at the start of a row */
} previous;

INLINE previous row_start(void) {
    const uint8x16_t zero = vdupq_n_u8(0);
    return (previous){{zero, zero, zero}};
}

/* The eight bits of a row from bit n of byte a on, b being the byte after it. */
#define BITS(a, b, n) vsliq_n_u8(vshrq_n_u8(a, n), b, 8 - (n))

/* 5 half bits: index vector i. */
INLINE uint8x16_t five_bits(int i, const uint8x16_t byte[8]) {
    const uint8x16_t lower = vdupq_n_u8(31);
    switch (i) {
    case 0:
        return vandq_u8(byte[0], lower);
    case 1:
        return vandq_u8(BITS(byte[0], byte[1], 5), lower);
    case 2:
        return vandq_u8(vshrq_n_u8(byte[1], 2), lower);
    case 3:
        return vandq_u8(BITS(byte[1], byte[2], 7), lower);
    case 4:
        return vandq_u8(BITS(byte[2], byte[3], 4), lower);
    case 5:
        return vandq_u8(vshrq_n_u8(byte[3], 1), lower);
    case 6:
        return vandq_u8(BITS(byte[3], byte[4], 6), lower);
    default:
        return vshrq_n_u8(byte[4], 3);
    }
}

/* The byte that has index vectors 2i and 2i + 1; `before` is the last one of the block before. */
INLINE uint8x16_t index_byte(uint32_t half_bits, int i, const uint8x16_t byte[8],
                             uint8x16_t before) {
    if (half_bits != 7) {
        return byte[i];
    }
    switch (i) {
    case 0:
        return BITS(before, byte[0], 7);
    case 1:
        return BITS(byte[0], byte[1], 6);
    case 2:
        return BITS(byte[1], byte[2], 5);
    case 3:
        return BITS(byte[2], byte[3], 4);
    case 4:
        return BITS(byte[3], byte[4], 3);
    case 5:
        return BITS(byte[4], byte[5], 2);
    case 6:
        return BITS(byte[5], byte[6], 1);
    default:
        return byte[6];
    }
}
/* The two index vectors of a byte. */
INLINE void split_byte(uint32_t half_bits, uint8x16_t byte, indexes *x, int at) {
    x->at[at] = vandq_u8(byte, vdupq_n_u8(15));
    x->at[at + 1] = vshrq_n_u8(byte, 4);
    if (half_bits == 7) {
        x->wide[at] = vandq_u8(byte, vdupq_n_u8(31));
        x->wide[at + 1] = vshrq_n_u8(byte, 3);
    }
}

/* Those of the block before, and what the next block needs. */
INLINE void indexes_before(uint32_t half_bits, const uint8x16_t byte[8], previous *before,
                           indexes *x, uint8x16_t *byte_before) {
    const int n = half_bits == 5 ? 3 : 2;
    uint8x16_t last[3];
    UNROLL for (int i = 0; i < n; i++) {
        const int own = n_indexes(half_bits) / (half_bits == 5 ? 1 : 2) - 1 - i;
        const uint8x16_t now =
            half_bits == 5 ? five_bits(own, byte) : index_byte(half_bits, own, byte, byte[0]);
        last[i] = tile_before(before->last[i], now);
        before->last[i] = now;
        if (half_bits == 5) {
            x->at[BEFORE - 1 - i] = last[i];
        } else {
            split_byte(half_bits, last[i], x, BEFORE - 2 - 2 * i);
        }
    }
    *byte_before = last[0];
}

/* Those that weights k .. k + 3 need beyond the ones before. */
INLINE void indexes_of(uint32_t half_bits, int k, const uint8x16_t byte[8], uint8x16_t byte_before,
                       indexes *x) {
    const int n = n_indexes(half_bits) / 4;
    UNROLL for (int m = k / 4 * n; m < k / 4 * n + n; m++) {
        if (half_bits == 5) {
            x->at[BEFORE + m] = five_bits(m, byte);
        } else if (m % 2 == 0) { /* the upper one perhaps early */
            split_byte(half_bits, index_byte(half_bits, m / 2, byte, byte_before), x, BEFORE + m);
        }
    }
}

INLINE uint8x16_t xor3(uint8x16_t a, uint8x16_t b, uint8x16_t c) {
#if LEVEL == I8MM
    return veor3q_u8(a, b, c);
#else
    return veorq_u8(veorq_u8(a, b), c);
#endif
}

/* Steps 3 and 4: weight k of all 16 blocks. */
INLINE uint8x16_t decode(uint32_t half_bits, const decoder *d, const indexes *x, int k) {
    const uint8x16x2_t *tap = d->tap[k % n_classes(half_bits)];
    const uint8x16_t *at = x->at + BEFORE + newest(half_bits, k);
    const uint8x16_t *wide = half_bits == 7 ? x->wide + BEFORE + newest(half_bits, k) : at;
#define TAP(i)                                                                                     \
    (is_wide(half_bits, k, i) ? vqtbl2q_u8(tap[i], wide[-(i)])                                     \
                              : vqtbl1q_u8(tap[i].val[0], at[-(i)]))
    uint8x16_t hash = xor3(TAP(0), TAP(1), TAP(2));
    hash = n_taps(half_bits, k) == 5 ? xor3(hash, TAP(3), TAP(4)) : veorq_u8(hash, TAP(3));
#undef TAP
    return vaddq_u8(vqtbl1q_u8(d->high, vshrq_n_u8(hash, 4)),
                    vqtbl1q_u8(d->low, vandq_u8(hash, vdupq_n_u8(15))));
}

/* ---- Products ---------------------------------------------------------- */

/* Sums of four rows, not all lanes added up yet. */
typedef struct sums {
    int32x4_t a, b;
} sums;

/* Adds the products of four columns' weights in lanes [row][tile] with the activations at x,
 * [column][tile]. */
INLINE sums add_columns(sums s, const uint8x16_t v[4], const int8_t *x) {
    const int8x16_t v0 = vreinterpretq_s8_u8(v[0]), v1 = vreinterpretq_s8_u8(v[1]);
    const int8x16_t v2 = vreinterpretq_s8_u8(v[2]), v3 = vreinterpretq_s8_u8(v[3]);
#if LEVEL == BASELINE
    /* two products of at most 127 * 127 fit into 16 bits */
    int8x16_t x0, x1, x2, x3;
#define LOAD(i)                                                                                    \
    do {                                                                                           \
        int32_t word;                                                                              \
        memcpy(&word, x + 4 * (i), sizeof word);                                                   \
        x##i = vreinterpretq_s8_s32(vdupq_n_s32(word));                                            \
    } while (0)
    LOAD(0);
    LOAD(1);
    LOAD(2);
    LOAD(3);
#undef LOAD
    int16x8_t low = vmull_s8(vget_low_s8(v0), vget_low_s8(x0)), high = vmull_high_s8(v0, x0);
    low = vmlal_s8(low, vget_low_s8(v1), vget_low_s8(x1)), high = vmlal_high_s8(high, v1, x1);
    s.a = vpadalq_s16(s.a, low), s.b = vpadalq_s16(s.b, high);
    low = vmull_s8(vget_low_s8(v2), vget_low_s8(x2)), high = vmull_high_s8(v2, x2);
    low = vmlal_s8(low, vget_low_s8(v3), vget_low_s8(x3)), high = vmlal_high_s8(high, v3, x3);
    s.a = vpadalq_s16(s.a, low), s.b = vpadalq_s16(s.b, high);
#else
    const int8x16_t four = vld1q_s8(x);
    s.a = vdotq_laneq_s32(s.a, v0, four, 0);
    s.b = vdotq_laneq_s32(s.b, v1, four, 1);
    s.a = vdotq_laneq_s32(s.a, v2, four, 2);
    s.b = vdotq_laneq_s32(s.b, v3, four, 3);
#endif
    return s;
}
INLINE int32x4_t sums_of_columns(sums s) {
    return LEVEL == BASELINE ? vpaddq_s32(s.a, s.b) : vaddq_s32(s.a, s.b);
}

/* Adds the products of a row's 16 columns; any lane will do. |v| <= 128. */
INLINE int32x4_t add_row(int32x4_t sum, int8x16_t v, int8x16_t x) {
#if LEVEL == BASELINE
    return vpadalq_s16(sum, vmlal_high_s8(vmull_s8(vget_low_s8(v), vget_low_s8(x)), v, x));
#else
    return vdotq_s32(sum, v, x);
#endif
}
INLINE int32x4_t sums_of_rows(const int32x4_t row[4]) {
    return vpaddq_s32(vpaddq_s32(row[0], row[1]), vpaddq_s32(row[2], row[3]));
}

/* Exact sums of four rows for one token to floats in y, for the first n rows. */
static void store_rows(const packed_matrix *w, uint32_t row, uint32_t n, const activation *x,
                       int32x4_t sum, float *y) {
    const uint32_t centre = w->half_bits == 16 ? 0 : CODE_CENTRE;
    uint16_t scales[4] = {0};
    memcpy(scales, w->scales + (size_t)2 * row, n * sizeof *scales);
    const float32x4_t row_scale = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(scales), 16));
    sum = vsubq_s32(sum, vdupq_n_s32((int32_t)(centre * (uint32_t)x->sum)));
    const float32x4_t out = vmulq_n_f32(vmulq_f32(vcvtq_f32_s32(sum), row_scale), x->scale);
    if (n == 4) {
        vst1q_f32(y + row, out);
    } else {
        float all[4];
        vst1q_f32(all, out);
        memcpy(y + row, all, n * sizeof *all);
    }
}

/* Tiles left over after a strip's whole groups are read from a copy with zeros. */
enum { MAX_GROUP_BYTES = GROUP_TILES * 4 * CODE_MAX_RATE };

/* ---- One token --------------------------------------------------------- */

/* Keeps compilers from beginning with weights k + 4 .. before k .. k + 3 are done, for whose index
 * vectors there are no registers: the first byte they need comes after the sums. */
#define ORDER(half_bits, k, s, byte)                                                               \
    __asm__("" : "+w"((s).a), "+w"((s).b), "+w"((byte)[((k) + 7) * (int)(half_bits) / 16]))

/* Adds the products of n groups at p with activations x, [group][column mod 16][tile]. */
INLINE sums dot_groups(uint32_t half_bits, const decoder *d, const uint8_t *p, const int8_t *x,
                       size_t n, previous *before, sums s) {
    previous last = *before;
    for (const int8_t *end = x + n * 16 * GROUP_TILES; x != end; x += 16 * GROUP_TILES) {
        uint8x16_t byte[8], byte_before;
        indexes index;
        load_bytes(half_bits, d, p, byte);
        indexes_before(half_bits, byte, &last, &index, &byte_before);
        UNROLL for (int k = 0; k < 16; k += 4) {
            indexes_of(half_bits, k, byte, byte_before, &index);
            const uint8x16_t v[4] = {
                decode(half_bits, d, &index, k), decode(half_bits, d, &index, k + 1),
                decode(half_bits, d, &index, k + 2), decode(half_bits, d, &index, k + 3)};
            s = add_columns(s, v, x + 4 * k);
            if (k < 12) {
                ORDER(half_bits, k, s, byte);
            }
        }
        p += (size_t)16 * half_bits;
    }
    *before = last;
    return s;
}

/* Functions of their own, without calls, so that a loop has all registers for itself. */
#define DOT_GROUPS(half_bits)                                                                      \
    static __attribute__((noinline)) sums dot_groups_##half_bits(                                  \
        const decoder *d, const uint8_t *p, const int8_t *x, size_t n, previous *before, sums s) { \
        return dot_groups(half_bits, d, p, x, n, before, s);                                       \
    }
DOT_GROUPS(4)
DOT_GROUPS(5)
DOT_GROUPS(6)
DOT_GROUPS(7)
DOT_GROUPS(8)

/* The four sums of a strip; the activations end in zeros. */
static int32x4_t dot_strip(uint32_t half_bits, const decoder *d, const uint8_t *strip,
                           const int8_t *x, size_t n_tiles) {
    static sums (*const dot[])(const decoder *, const uint8_t *, const int8_t *, size_t, previous *,
                               sums) = {[4] = dot_groups_4,
                                        [5] = dot_groups_5,
                                        [6] = dot_groups_6,
                                        [7] = dot_groups_7,
                                        [8] = dot_groups_8};
    const size_t groups = n_tiles / GROUP_TILES, tile_bytes = (size_t)4 * half_bits;
    const size_t whole = groups * GROUP_TILES;
    previous before = row_start();
    sums s = {vdupq_n_s32(0), vdupq_n_s32(0)};
    s = dot[half_bits](d, strip, x, groups, &before, s);
    if (whole < n_tiles) {
        uint8_t copy[MAX_GROUP_BYTES] = {0};
        memcpy(copy, strip + whole * tile_bytes, (n_tiles - whole) * tile_bytes);
        s = dot[half_bits](d, copy, x + 16 * whole, 1, &before, s);
    }
    return sums_of_columns(s);
}

/* The same of int8 weights; activations in their own order. */
static int32x4_t dot_strip_i8(const uint8_t *strip, const int8_t *x, size_t n_tiles) {
    int32x4_t row[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
    for (size_t i = 0; i < n_tiles; i++) {
        const int8x16_t xv = vld1q_s8(x + 16 * i);
        UNROLL for (size_t r = 0; r < 4; r++) {
            row[r] = add_row(row[r], vreinterpretq_s8_u8(vld1q_u8(strip + 64 * i + 16 * r)), xv);
        }
    }
    return sums_of_rows(row);
}

/* Activations to [group][column mod 16][tile], filled up with zeros. */
static void group_activations(const int8_t *q, size_t n_tiles, int8_t *out) {
    for (size_t i = 0; i < n_tiles; i += GROUP_TILES) {
        int8x16x4_t tile;
        for (size_t t = 0; t < GROUP_TILES; t++) {
            tile.val[t] = i + t < n_tiles ? vld1q_s8(q + 16 * (i + t)) : vdupq_n_s8(0);
        }
        vst4q_s8(out + 16 * i, tile);
    }
}

/*
 * These kernels want tiles of 4 rows x 16 columns, a row's block of half_bits bytes after the
 * other: copies four rows of the matrix to the end of scratch in that order.
 */
static const uint8_t *gather_strip(const packed_matrix *w, uint32_t row, uint8_t *scratch) {
    const uint32_t n_tiles = w->n_cols / 16;
    uint8_t *strip = scratch + (size_t)64 * w->n_cols, *out = strip;
    for (uint32_t b = 0; b < n_tiles; b++) {
        for (uint32_t r = row; r < row + 4; r++) {
            const packed_place place = packed_block(w->half_bits, n_tiles, r, b);
            for (uint32_t j = 0; j < w->half_bits; j++) {
                *out++ = w->codes[place.first + j * place.step];
            }
        }
    }
    return strip;
}

static void matvec(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                   const activation *x, float *y, uint8_t *scratch) {
    const size_t n_tiles = w->n_cols / 16;
    const int8_t *q = x->q;
    decoder d;
    if (w->half_bits != 16) {
        decoder_fill(w->half_bits, &d);
        group_activations(q, n_tiles, (int8_t *)scratch);
        q = (const int8_t *)scratch;
    }
    for (uint32_t r = row_begin; r < row_end; r += 4) {
        const uint8_t *strip = gather_strip(w, r, scratch);
        const int32x4_t sum = w->half_bits == 16 ? dot_strip_i8(strip, q, n_tiles)
                                                 : dot_strip(w->half_bits, &d, strip, q, n_tiles);
        store_rows(w, r, row_end - r < 4 ? row_end - r : 4, x, sum, y);
    }
}

/* ---- Several tokens ---------------------------------------------------- */

/*
 * A strip is decoded once, to 64 bytes for each tile, in the order that the products want:
 *
 *     BASELINE   row by row
 *     DOTPROD    four columns of four rows, four times
 *     I8MM       eight columns of two rows: rows 0 1 and 2 3, then the same of the other columns
 */

/* Transposes 4 x 4 words: rows to columns of four bytes, or back. */
INLINE void transpose_words(uint32x4_t w[4]) {
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(w[0], w[1]));
    const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(w[0], w[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(w[2], w[3]));
    const uint64x2_t e = vreinterpretq_u64_u32(vtrn2q_u32(w[2], w[3]));
    w[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    w[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, e));
    w[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    w[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, e));
}

/* A tile, four rows of 16 bytes, to the order above. */
INLINE void store_tile(uint32x4_t row[4], uint8_t *out) {
#if LEVEL == DOTPROD
    transpose_words(row);
#elif LEVEL == I8MM
    const uint64x2_t a = vreinterpretq_u64_u32(row[0]), b = vreinterpretq_u64_u32(row[1]);
    const uint64x2_t c = vreinterpretq_u64_u32(row[2]), e = vreinterpretq_u64_u32(row[3]);
    row[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, b));
    row[1] = vreinterpretq_u32_u64(vtrn1q_u64(c, e));
    row[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, b));
    row[3] = vreinterpretq_u32_u64(vtrn2q_u64(c, e));
#endif
    UNROLL for (int i = 0; i < 4; i++) {
        vst1q_u8(out + 16 * i, vreinterpretq_u8_u32(row[i]));
    }
}

/* Four columns in lanes [row][tile] to words of each tile: lane [row], columns from 4 * part on. */
INLINE void store_columns(const uint8x16_t v[4], uint8_t *out, int part) {
    const uint16x8_t a = vreinterpretq_u16_u8(vtrn1q_u8(v[0], v[1])); /* tiles 0 and 2 */
    const uint16x8_t b = vreinterpretq_u16_u8(vtrn1q_u8(v[2], v[3]));
    const uint16x8_t c = vreinterpretq_u16_u8(vtrn2q_u8(v[0], v[1])); /* tiles 1 and 3 */
    const uint16x8_t e = vreinterpretq_u16_u8(vtrn2q_u8(v[2], v[3]));
    vst1q_u8(out + 16 * part, vreinterpretq_u8_u16(vtrn1q_u16(a, b)));
    vst1q_u8(out + 64 + 16 * part, vreinterpretq_u8_u16(vtrn1q_u16(c, e)));
    vst1q_u8(out + 128 + 16 * part, vreinterpretq_u8_u16(vtrn2q_u16(a, b)));
    vst1q_u8(out + 192 + 16 * part, vreinterpretq_u8_u16(vtrn2q_u16(c, e)));
}

INLINE void unpack_groups(uint32_t half_bits, const decoder *d, const uint8_t *p, size_t n,
                          previous *before, uint8_t *out) {
    previous last = *before;
    for (const uint8_t *end = out + n * 64 * GROUP_TILES; out != end; out += 64 * GROUP_TILES) {
        uint8x16_t byte[8], byte_before;
        indexes index;
        load_bytes(half_bits, d, p, byte);
        indexes_before(half_bits, byte, &last, &index, &byte_before);
        UNROLL for (int k = 0; k < 16; k += 4) {
            indexes_of(half_bits, k, byte, byte_before, &index);
            const uint8x16_t v[4] = {
                decode(half_bits, d, &index, k), decode(half_bits, d, &index, k + 1),
                decode(half_bits, d, &index, k + 2), decode(half_bits, d, &index, k + 3)};
            store_columns(v, out, k / 4);
        }
        if (LEVEL != DOTPROD) {
            for (size_t t = 0; t < GROUP_TILES; t++) {
                uint32x4_t word[4];
                UNROLL for (size_t j = 0; j < 4; j++) {
                    word[j] = vreinterpretq_u32_u8(vld1q_u8(out + 64 * t + 16 * j));
                }
                transpose_words(word);
                store_tile(word, out + 64 * t);
            }
        }
        p += (size_t)16 * half_bits;
    }
    *before = last;
}

#define UNPACK_GROUPS(half_bits)                                                                   \
    static __attribute__((noinline)) void unpack_groups_##half_bits(                               \
        const decoder *d, const uint8_t *p, size_t n, previous *before, uint8_t *out) {            \
        unpack_groups(half_bits, d, p, n, before, out);                                            \
    }
UNPACK_GROUPS(4)
UNPACK_GROUPS(5)
UNPACK_GROUPS(6)
UNPACK_GROUPS(7)
UNPACK_GROUPS(8)

static void unpack_strip_i8(const uint8_t *strip, size_t n_tiles, uint8_t *out) {
    for (size_t i = 0; i < n_tiles; i++) {
        uint32x4_t row[4];
        for (size_t r = 0; r < 4; r++) {
            row[r] = vreinterpretq_u32_u8(vld1q_u8(strip + 64 * i + 16 * r));
        }
        store_tile(row, out + 64 * i);
    }
}

static void unpack_strip(uint32_t half_bits, const decoder *d, const uint8_t *strip, size_t n_tiles,
                         uint8_t *out) {
    static void (*const unpack[])(const decoder *, const uint8_t *, size_t, previous *,
                                  uint8_t *) = {[4] = unpack_groups_4,
                                                [5] = unpack_groups_5,
                                                [6] = unpack_groups_6,
                                                [7] = unpack_groups_7,
                                                [8] = unpack_groups_8};
    if (half_bits == 16) {
        unpack_strip_i8(strip, n_tiles, out);
        return;
    }
    const size_t groups = n_tiles / GROUP_TILES, tile_bytes = (size_t)4 * half_bits;
    const size_t whole = groups * GROUP_TILES;
    previous before = row_start();
    unpack[half_bits](d, strip, groups, &before, out);
    if (whole < n_tiles) {
        uint8_t copy[MAX_GROUP_BYTES] = {0}, last[64 * GROUP_TILES];
        memcpy(copy, strip + whole * tile_bytes, (n_tiles - whole) * tile_bytes);
        unpack[half_bits](d, copy, 1, &before, last);
        memcpy(out + 64 * whole, last, (n_tiles - whole) * 64);
    }
}

/* One strip (BASELINE) or two against four or eight tokens: STRIPS * TOKENS accumulators. */
enum { STRIPS = LEVEL == BASELINE ? 1 : 2, MAX_TOKENS = LEVEL == BASELINE ? 4 : 8 };

INLINE int8x16_t load_values(const uint8_t *p) {
    return vreinterpretq_s8_u8(vld1q_u8(p));
}

#if LEVEL == BASELINE

INLINE void dot_block(int tokens, const uint8_t *const v[STRIPS], const int8_t *const x[MAX_TOKENS],
                      size_t n_tiles, int32x4_t sum[STRIPS][MAX_TOKENS]) {
    int32x4_t row[MAX_TOKENS][4];
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int r = 0; r < 4; r++) {
            row[t][r] = vdupq_n_s32(0);
        }
    }
    for (size_t i = 0; i < n_tiles; i++) {
        const uint8_t *p = v[0] + 64 * i;
        const int8x16_t v0 = load_values(p), v1 = load_values(p + 16);
        const int8x16_t v2 = load_values(p + 32), v3 = load_values(p + 48);
        UNROLL for (int t = 0; t < tokens; t++) {
            const int8x16_t xv = vld1q_s8(x[t] + 16 * i);
            row[t][0] = add_row(row[t][0], v0, xv);
            row[t][1] = add_row(row[t][1], v1, xv);
            row[t][2] = add_row(row[t][2], v2, xv);
            row[t][3] = add_row(row[t][3], v3, xv);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        sum[0][t] = sums_of_rows(row[t]);
    }
}

#elif LEVEL == DOTPROD

INLINE void dot_block(int tokens, const uint8_t *const v[STRIPS], const int8_t *const x[MAX_TOKENS],
                      size_t n_tiles, int32x4_t sum[STRIPS][MAX_TOKENS]) {
    int32x4_t acc[STRIPS][MAX_TOKENS];
    UNROLL for (int t = 0; t < tokens; t++) {
        acc[0][t] = acc[1][t] = vdupq_n_s32(0);
    }
    for (size_t i = 0; i < n_tiles; i++) {
        const uint8_t *p = v[0] + 64 * i, *q = v[1] + 64 * i;
        const int8x16_t a0 = load_values(p), a1 = load_values(p + 16);
        const int8x16_t a2 = load_values(p + 32), a3 = load_values(p + 48);
        const int8x16_t b0 = load_values(q), b1 = load_values(q + 16);
        const int8x16_t b2 = load_values(q + 32), b3 = load_values(q + 48);
        UNROLL for (int t = 0; t < tokens; t++) {
            const int8x16_t xv = vld1q_s8(x[t] + 16 * i);
            acc[0][t] = vdotq_laneq_s32(acc[0][t], a0, xv, 0);
            acc[1][t] = vdotq_laneq_s32(acc[1][t], b0, xv, 0);
            acc[0][t] = vdotq_laneq_s32(acc[0][t], a1, xv, 1);
            acc[1][t] = vdotq_laneq_s32(acc[1][t], b1, xv, 1);
            acc[0][t] = vdotq_laneq_s32(acc[0][t], a2, xv, 2);
            acc[1][t] = vdotq_laneq_s32(acc[1][t], b2, xv, 2);
            acc[0][t] = vdotq_laneq_s32(acc[0][t], a3, xv, 3);
            acc[1][t] = vdotq_laneq_s32(acc[1][t], b3, xv, 3);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        sum[0][t] = acc[0][t], sum[1][t] = acc[1][t];
    }
}

#else

INLINE void dot_block(int tokens, const uint8_t *const v[STRIPS], const int8_t *const x[MAX_TOKENS],
                      size_t n_tiles, int32x4_t sum[STRIPS][MAX_TOKENS]) {
    int32x4_t acc[4][MAX_TOKENS / 2]; /* two rows of two tokens */
    UNROLL for (int t = 0; t < tokens / 2; t++) {
        acc[0][t] = acc[1][t] = acc[2][t] = acc[3][t] = vdupq_n_s32(0);
    }
    for (size_t i = 0; i < n_tiles; i++) {
        const uint8_t *p = v[0] + 64 * i, *q = v[1] + 64 * i;
        const int8x16_t a0 = load_values(p), a1 = load_values(p + 16);
        const int8x16_t b0 = load_values(q), b1 = load_values(q + 16);
        const int8x16_t a2 = load_values(p + 32), a3 = load_values(p + 48);
        const int8x16_t b2 = load_values(q + 32), b3 = load_values(q + 48);
        UNROLL for (int t = 0; t < tokens / 2; t++) {
            const int64x2_t x0 = vreinterpretq_s64_s8(vld1q_s8(x[2 * t] + 16 * i));
            const int64x2_t x1 = vreinterpretq_s64_s8(vld1q_s8(x[2 * t + 1] + 16 * i));
            const int8x16_t first = vreinterpretq_s8_s64(vtrn1q_s64(x0, x1));
            const int8x16_t second = vreinterpretq_s8_s64(vtrn2q_s64(x0, x1));
            acc[0][t] = vmmlaq_s32(acc[0][t], a0, first);
            acc[1][t] = vmmlaq_s32(acc[1][t], a1, first);
            acc[2][t] = vmmlaq_s32(acc[2][t], b0, first);
            acc[3][t] = vmmlaq_s32(acc[3][t], b1, first);
            acc[0][t] = vmmlaq_s32(acc[0][t], a2, second);
            acc[1][t] = vmmlaq_s32(acc[1][t], a3, second);
            acc[2][t] = vmmlaq_s32(acc[2][t], b2, second);
            acc[3][t] = vmmlaq_s32(acc[3][t], b3, second);
        }
    }
    UNROLL for (int t = 0; t < tokens / 2; t++) {
        UNROLL for (int s = 0; s < STRIPS; s++) {
            sum[s][2 * t] = vuzp1q_s32(acc[2 * s][t], acc[2 * s + 1][t]);
            sum[s][2 * t + 1] = vuzp2q_s32(acc[2 * s][t], acc[2 * s + 1][t]);
        }
    }
}

#endif

#define DOT_BLOCK(tokens)                                                                          \
    static __attribute__((noinline)) void dot_block_##tokens(                                      \
        const uint8_t *const v[STRIPS], const int8_t *const x[MAX_TOKENS], size_t n_tiles,         \
        int32x4_t sum[STRIPS][MAX_TOKENS]) {                                                       \
        dot_block(tokens, v, x, n_tiles, sum);                                                     \
    }
DOT_BLOCK(2)
DOT_BLOCK(4)
#if LEVEL != BASELINE
DOT_BLOCK(8)
#else
#define dot_block_8 dot_block_4 /* never wanted */
#endif

static void KERNEL(matmul_packed)(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                                  const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                                  uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % 4 == 0);
    if (n_tokens == 1) {
        matvec(w, row_begin, row_end, x, y, scratch);
        return;
    }
    const size_t n_tiles = w->n_cols / 16;
    decoder d;
    if (w->half_bits != 16) {
        decoder_fill(w->half_bits, &d);
    }
    for (uint32_t r = row_begin; r < row_end; r += 4 * STRIPS) {
        const uint32_t n_strips = row_end - r > 4 ? STRIPS : 1;
        const uint8_t *values[STRIPS];
        for (uint32_t s = 0; s < STRIPS; s++) { /* the strip past the last repeats it */
            const uint32_t own = s < n_strips ? s : n_strips - 1;
            values[s] = scratch + own * 64 * n_tiles;
            if (s == own) {
                unpack_strip(w->half_bits, &d, gather_strip(w, r + 4 * s, scratch), n_tiles,
                             scratch + s * 64 * n_tiles);
            }
        }
        for (uint32_t t = 0; t < n_tokens; t += MAX_TOKENS) {
            const uint32_t n = n_tokens - t < MAX_TOKENS ? n_tokens - t : MAX_TOKENS;
            const int8_t *q[MAX_TOKENS];
            for (uint32_t i = 0; i < MAX_TOKENS; i++) { /* tokens past the last repeat it */
                q[i] = x[t + (i < n ? i : n - 1)].q;
            }
            int32x4_t sum[STRIPS][MAX_TOKENS];
            (n <= 2 ? dot_block_2 : n <= 4 ? dot_block_4 : dot_block_8)(values, q, n_tiles, sum);
            for (uint32_t s = 0; s < n_strips; s++) {
                const uint32_t row = r + 4 * s, n_rows = row_end - row < 4 ? row_end - row : 4;
                for (uint32_t i = 0; i < n; i++) {
                    store_rows(w, row, n_rows, &x[t + i], sum[s][i], y + (t + i) * y_stride);
                }
            }
        }
    }
}

const kernels KERNEL(kernels) = {
    .name = KERNELS_NAME,
    .macs_per_microsecond = MACS_PER_MICROSECOND,
    .matmul_packed = KERNEL(matmul_packed),
    .unpack_row = KERNEL(unpack_row),
    .quantize_activation = KERNEL(quantize_activation),
    .matmul_f32 = KERNEL(matmul_f32),
    .row_to_f32 = KERNEL(row_to_f32),
    .rmsnorm = KERNEL(rmsnorm),
    .rope = KERNEL(rope),
    .swiglu = KERNEL(swiglu),
    .add = KERNEL(add),
    .attention = KERNEL(attention),
    .rotate = KERNEL(rotate),
    .rotate_inverse = KERNEL(rotate_inverse),
};

#endif
