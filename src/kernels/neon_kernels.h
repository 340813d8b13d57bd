/*
 * neon_kernels.h - the kernels for AArch64, one text for three tables: neon.c (every AArch64),
 * neon_dotprod.c (with SDOT) and neon_i8mm.c (with SMMLA and EOR3) include it.
 *
 * Decoding 256 weights (4 rows of a group, docs/FORMAT.md):
 *
 *     1. a vector of each plane has one byte of the 16 row blocks, that of block b of row r in lane
 *        4 * r + b. All lanes have the same bits of their strings in it
 *     2. for weight k of all 16 blocks, a shift right and a shift left that inserts cut out the
 * newer and the older byte of the window. What lies before a block is in the lane before
 *     3. the hash: the older byte XOR a matrix times the newer one, which is a carry-less product
 * and a shift at 3, 3.5 and 4 bits, else two lookups (TBL)
 *     4. two lookups, one for each half of the hash, add up to the value 0..127
 *     5. the four blocks of a row are the four bytes of a 32-bit lane: SDOT adds their products
 *        with the activations of columns k, 16 + k, 32 + k, 48 + k
 *
 * Invariant: integer sums are exact in any order; the float kernels keep the 16 lanes of
 * docs/NUMERICS.md in four registers. Every result is compared with kernels/ref.c by memcmp.
 *
 * The file that includes this one defines KERNEL(name), KERNELS_NAME, LEVEL (BASELINE, DOTPROD or
 * I8MM) and MACS_PER_MICROSECOND: 3 GHz, 2.5 instructions per cycle, divided by those for a weight.
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

/* ---- Decoding ---------------------------------------------------------- */

enum {
    GROUP_BYTES = PACKED_STRIP * PACKED_GROUP, /* of a plane */
    ROWS = 4,                                  /* of a vector */
    GROUP_COLS = CODE_BLOCK * PACKED_GROUP
};

typedef struct decoder {
    uint8x16_t newer_low, newer_high; /* step 3, by the nibbles of the newer byte */
    uint8x16_t high, low;             /* step 4 */
} decoder;

/* Rates of which the matrix is n ^ (n << left) ^ (n >> right): docs/CODE.md. */
INLINE bool has_shifts(uint32_t half_bits) {
    return half_bits >= 6;
}
INLINE int shift_left(uint32_t half_bits) {
    return half_bits == 6 ? 3 : half_bits == 7 ? 2 : 7;
}
INLINE int shift_right(uint32_t half_bits) {
    return half_bits == 7 ? 2 : 3;
}

static void decoder_fill(const struct code_table *code, decoder *d) {
    const uint32_t half_bits = (uint32_t)code->half_bits;
    uint8_t low[16], high[16];
    for (uint32_t i = 0; i < 16; i++) {
        low[i] = code_hash(code, i << 8);
        high[i] = code_hash(code, i << 12);
    }
    for (uint32_t n = 0; has_shifts(half_bits) && n < 256; n++) {
        assert(code_hash(code, n << 8) ==
               (uint8_t)(n ^ n << shift_left(half_bits) ^ n >> shift_right(half_bits)));
    }
    *d = (decoder){vld1q_u8(low), vld1q_u8(high), vld1q_u8(code->high), vld1q_u8(code->low)};
}

#include "kernels/decoders.h"

INLINE uint8x16_t xor3(uint8x16_t a, uint8x16_t b, uint8x16_t c) {
#if LEVEL == I8MM
    return veor3q_u8(a, b, c);
#else
    return veorq_u8(veorq_u8(a, b), c);
#endif
}

/* Eight bits of each block from bit `begin` on; the block starts with plane[2], two bytes of the
 * block before it precede. */
INLINE uint8x16_t eight_bits(const uint8x16_t *plane, int begin) {
    const uint8x16_t *p = plane + (begin + 16) / 8;
#define BITS(n)                                                                                    \
    case n:                                                                                        \
        return vsliq_n_u8(vshrq_n_u8(p[0], n), p[1], 8 - n);
    switch ((begin + 16) % 8) {
        BITS(1)
        BITS(2)
        BITS(3)
        BITS(4)
        BITS(5)
        BITS(6)
        BITS(7)
    default:
        return p[0];
    }
#undef BITS
}

/* Steps 2 to 4: weight k of all 16 blocks; of int8 weights its plane. */
INLINE uint8x16_t decode(uint32_t half_bits, const decoder *d, const uint8x16_t *plane, int k) {
    if (half_bits == 16) {
        return plane[2 + k];
    }
    const int h = (int)half_bits, end = k / 2 * h + (k % 2 != 0 ? h : (h + 1) / 2);
    const uint8x16_t newer = eight_bits(plane, end - 8), older = eight_bits(plane, end - 16);
    const uint8x16_t nibble = vdupq_n_u8(15);
    uint8x16_t hash;
    if (has_shifts(half_bits)) {
        const poly8x16_t factor = vdupq_n_p8((poly8_t)(1 | 1 << shift_left(half_bits)));
        const uint8x16_t product =
            vreinterpretq_u8_p8(vmulq_p8(vreinterpretq_p8_u8(newer), factor));
        hash = xor3(older, product, half_bits == 7 ? vshrq_n_u8(newer, 2) : vshrq_n_u8(newer, 3));
    } else {
        hash = xor3(older, vqtbl1q_u8(d->newer_low, vandq_u8(newer, nibble)),
                    vqtbl1q_u8(d->newer_high, vshrq_n_u8(newer, 4)));
    }
    return vaddq_u8(vqtbl1q_u8(d->high, vshrq_n_u8(hash, 4)),
                    vqtbl1q_u8(d->low, vandq_u8(hash, nibble)));
}

/* Step 1, four rows of the group at p; `before` has the last two planes of the group before it. */
INLINE void load_planes(uint32_t half_bits, const uint8_t *p, const uint8_t *before,
                        uint8x16_t plane[2 + 16]) {
    UNROLL for (uint32_t j = 0; j < half_bits; j++) {
        plane[2 + j] = vld1q_u8(p + (size_t)GROUP_BYTES * j);
    }
    UNROLL for (uint32_t i = 0; i < 2 && half_bits != 16; i++) { /* one byte down in each row */
        const uint32x4_t own = vreinterpretq_u32_u8(plane[half_bits + i]);
        const uint32x4_t last = vreinterpretq_u32_u8(vld1q_u8(before + (size_t)GROUP_BYTES * i));
        plane[i] = vreinterpretq_u8_u32(vsliq_n_u32(vshrq_n_u32(last, 24), own, 8));
    }
}

static const uint8_t no_planes[2 * GROUP_BYTES]; /* before the first group */

/* A row's last group of n < 4 blocks, with zeros for those that lack. */
static void widen_group(const uint8_t *codes, uint32_t half_bits, size_t n, uint8_t *out) {
    memset(out, 0, (size_t)GROUP_BYTES * half_bits);
    for (size_t i = 0; i < (size_t)PACKED_STRIP * half_bits; i++) { /* plane and row */
        memcpy(out + PACKED_GROUP * i, codes + n * i, n);
    }
}

/* ---- Products ---------------------------------------------------------- */

/* Sums of four rows are one vector; of BASELINE two, not all lanes added up yet. */
enum { PARTS = LEVEL == BASELINE ? 2 : 1 };

/* Adds the products of two weights' vectors with the activations at x, four for each. */
INLINE void add_products(int32x4_t *s, uint8x16_t v0, uint8x16_t v1, const int8_t *x) {
    const int8x16_t w0 = vreinterpretq_s8_u8(v0), w1 = vreinterpretq_s8_u8(v1);
    int32_t word[2];
    memcpy(word, x, sizeof word);
    const int8x16_t x0 = vreinterpretq_s8_s32(vdupq_n_s32(word[0]));
    const int8x16_t x1 = vreinterpretq_s8_s32(vdupq_n_s32(word[1]));
    /* two products of at most 128 * 127 fit into 16 bits */
    int16x8_t low = vmull_s8(vget_low_s8(w0), vget_low_s8(x0)), high = vmull_high_s8(w0, x0);
    low = vmlal_s8(low, vget_low_s8(w1), vget_low_s8(x1)), high = vmlal_high_s8(high, w1, x1);
    s[0] = vpadalq_s16(s[0], low), s[1] = vpadalq_s16(s[1], high);
}

/* The same of four weights. */
INLINE void add_products4(int32x4_t *s, const uint8x16_t v[4], const int8_t *x) {
#if LEVEL == BASELINE
    add_products(s, v[0], v[1], x);
    add_products(s, v[2], v[3], x + 8);
#else
    const int8x16_t four = vld1q_s8(x);
    s[0] = vdotq_laneq_s32(s[0], vreinterpretq_s8_u8(v[0]), four, 0);
    s[0] = vdotq_laneq_s32(s[0], vreinterpretq_s8_u8(v[1]), four, 1);
    s[0] = vdotq_laneq_s32(s[0], vreinterpretq_s8_u8(v[2]), four, 2);
    s[0] = vdotq_laneq_s32(s[0], vreinterpretq_s8_u8(v[3]), four, 3);
#endif
}
INLINE int32x4_t sums_of_rows(const int32x4_t *s) {
    return PARTS == 2 ? vpaddq_s32(s[0], s[PARTS - 1]) : s[0];
}

/* Exact sums of n <= 4 rows for one token to floats in y. */
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

/*
 * The activations of a group's 64 columns in the order of products: four of weight 0, those of
 * the blocks 0 to 3, then four of weight 1. Zeros past the last column.
 */
static inline void arrange_group(const int8_t *q, size_t n_blocks, int8_t *out) {
    int8x16x4_t block;
    for (size_t b = 0; b < PACKED_GROUP; b++) {
        block.val[b] = b < n_blocks ? vld1q_s8(q + CODE_BLOCK * b) : vdupq_n_s8(0);
    }
    vst4q_s8(out, block);
}

/* ---- One token --------------------------------------------------------- */

enum { QUARTERS = PACKED_STRIP / ROWS }; /* of a strip */

/* Adds the products of n groups of a strip at p with arranged activations. */
INLINE void dot_groups(uint32_t half_bits, const decoder *decoder_at, const uint8_t *p,
                       const uint8_t *before, const int8_t *x, size_t n,
                       int32x4_t s[QUARTERS][PARTS]) {
    const decoder d = *decoder_at;
    for (const int8_t *end = x + n * GROUP_COLS; x != end; x += GROUP_COLS) {
        for (size_t i = 0; i < QUARTERS; i++) {
            uint8x16_t plane[2 + 16];
            int32x4_t sum[PARTS];
            UNROLL for (int part = 0; part < PARTS; part++) {
                sum[part] = s[i][part];
            }
            load_planes(half_bits, p + 16 * i, before + 16 * i, plane);
            UNROLL for (int k = 0; k < 16; k += 4) {
                const uint8x16_t v[4] = {
                    decode(half_bits, &d, plane, k), decode(half_bits, &d, plane, k + 1),
                    decode(half_bits, &d, plane, k + 2), decode(half_bits, &d, plane, k + 3)};
                add_products4(sum, v, x + 4 * k);
                if (k < 12 && half_bits != 16) {
                    /* Compilers begin with later weights too early, and store what has no
                     * register: the byte that these need comes after the sums. */
                    __asm__("" : "+w"(sum[0]), "+w"(plane[2 + (k + 7) * (int)half_bits / 16]));
                }
            }
            UNROLL for (int part = 0; part < PARTS; part++) {
                s[i][part] = sum[part];
            }
        }
        before = p + (size_t)GROUP_BYTES * (half_bits - 2);
        p += (size_t)GROUP_BYTES * half_bits;
    }
}

/* The values of n groups: a plane for each weight. */
INLINE void decode_groups(uint32_t half_bits, const decoder *decoder_at, const uint8_t *p,
                          const uint8_t *before, size_t n, uint8_t *out) {
    const decoder d = *decoder_at;
    for (const uint8_t *end = out + n * CODE_BLOCK * GROUP_BYTES; out != end;
         out += CODE_BLOCK * GROUP_BYTES) {
        for (size_t i = 0; i < QUARTERS; i++) {
            uint8x16_t plane[2 + 16];
            load_planes(half_bits, p + 16 * i, before + 16 * i, plane);
            UNROLL for (int k = 0; k < 16; k++) {
                vst1q_u8(out + GROUP_BYTES * k + 16 * i, decode(half_bits, &d, plane, k));
            }
        }
        before = p + (size_t)GROUP_BYTES * (half_bits - 2);
        p += (size_t)GROUP_BYTES * half_bits;
    }
}

/* Functions without calls, so that their loops have all registers for themselves. */
#define GROUPS(h)                                                                                  \
    static __attribute__((noinline)) void dot_groups_##h(const decoder *d, const uint8_t *p,       \
                                                         const uint8_t *before, const int8_t *x,   \
                                                         size_t n, int32x4_t(*s)[PARTS]) {         \
        dot_groups(h, d, p, before, x, n, s);                                                      \
    }                                                                                              \
    static __attribute__((noinline)) void decode_groups_##h(                                       \
        const decoder *d, const uint8_t *p, const uint8_t *before, size_t n, uint8_t *out) {       \
        decode_groups(h, d, p, before, n, out);                                                    \
    }
GROUPS(4)
GROUPS(5)
GROUPS(6)
GROUPS(7)
GROUPS(8)
GROUPS(16)
static const struct {
    void (*dot)(const decoder *, const uint8_t *, const uint8_t *, const int8_t *, size_t,
                int32x4_t (*)[PARTS]);
    void (*decode)(const decoder *, const uint8_t *, const uint8_t *, size_t, uint8_t *);
} rates[] = {[4] = {dot_groups_4, decode_groups_4}, [5] = {dot_groups_5, decode_groups_5},
             [6] = {dot_groups_6, decode_groups_6}, [7] = {dot_groups_7, decode_groups_7},
             [8] = {dot_groups_8, decode_groups_8}, [16] = {dot_groups_16, decode_groups_16}};

/* The groups of a strip: `whole` with four blocks each, and one widened if blocks are left. */
typedef struct strip {
    const uint8_t *codes, *before_last;
    size_t whole, rest; /* groups, blocks */
    uint8_t last[16 * GROUP_BYTES];
} strip;

static void strip_start(const packed_matrix *w, uint32_t row, strip *s) {
    const size_t n_blocks = w->n_cols / CODE_BLOCK,
                 group_bytes = (size_t)GROUP_BYTES * w->half_bits;
    s->codes = w->codes + row / PACKED_STRIP * (PACKED_STRIP * n_blocks * w->half_bits);
    s->whole = n_blocks / PACKED_GROUP, s->rest = n_blocks % PACKED_GROUP;
    const uint8_t *end = s->codes + s->whole * group_bytes;
    s->before_last = s->whole > 0 ? end - 2 * GROUP_BYTES : no_planes;
    if (s->rest > 0) {
        widen_group(end, w->half_bits, s->rest, s->last);
    }
}

static void matvec(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                   const activation *x, float *y, int8_t *scratch) {
    const uint32_t h = w->half_bits;
    const decoder *d = decoder_get(h);
    for (uint32_t c = 0; c < w->n_cols; c += GROUP_COLS) {
        arrange_group(x->q + c, (w->n_cols - c) / CODE_BLOCK, scratch + c);
    }
    for (uint32_t r = row_begin; r < row_end; r += PACKED_STRIP) {
        strip s;
        int32x4_t sum[QUARTERS][PARTS];
        memset(sum, 0, sizeof sum);
        strip_start(w, r, &s);
        rates[h].dot(d, s.codes, no_planes, scratch, s.whole, sum);
        if (s.rest > 0) {
            rates[h].dot(d, s.last, s.before_last, scratch + s.whole * GROUP_COLS, 1, sum);
        }
        for (uint32_t i = 0; i < QUARTERS && r + ROWS * i < row_end; i++) {
            const uint32_t row = r + ROWS * i, n = row_end - row < ROWS ? row_end - row : ROWS;
            store_rows(w, row, n, x, sums_of_rows(sum[i]), y);
        }
    }
}

/* ---- Several tokens ---------------------------------------------------- */

/*
 * A strip is decoded once, then multiplied with PASS_TOKENS tokens: two quarters of it, eight rows,
 * with MAX_TOKENS at a time, so that the sums are in registers.
 */
enum {
    PASS_TOKENS = 64,
    MAX_TOKENS = LEVEL == BASELINE ? 4 : 8,
    SETS = 2, /* quarters */
    VALUE_BYTES = CODE_BLOCK * GROUP_BYTES,
    PAIR = LEVEL == I8MM ? 2 : 1 /* tokens whose activations are mixed, eight by eight */
};

/* Activations of n tokens, PAIR by PAIR; the last one again where it has no partner. */
static void arrange_tokens(const activation *x, uint32_t n, uint32_t n_cols, int8_t *out) {
    for (uint32_t t = 0; t < n; t += PAIR) {
        for (uint32_t c = 0; c < n_cols; c += GROUP_COLS, out += PAIR * GROUP_COLS) {
            const size_t n_blocks = (n_cols - c) / CODE_BLOCK;
            if (PAIR == 1) {
                arrange_group(x[t].q + c, n_blocks, out);
                continue;
            }
            int8_t one[2][GROUP_COLS];
            arrange_group(x[t].q + c, n_blocks, one[0]);
            arrange_group(x[t + 1 < n ? t + 1 : t].q + c, n_blocks, one[1]);
            for (size_t i = 0; i < GROUP_COLS; i += 8) {
                memcpy(out + 2 * i, one[0] + i, 8);
                memcpy(out + 2 * i + 8, one[1] + i, 8);
            }
        }
    }
}

/* The sums of two quarters whose values are at v. x: each PAIR's activations. */
INLINE void dot_block(const int tokens, const uint8_t *v, const int8_t *const *x, size_t n_groups,
                      int32x4_t sum[SETS][MAX_TOKENS]) {
#if LEVEL == I8MM
    int32x4_t acc[4][MAX_TOKENS / 2]; /* two rows of two tokens */
    UNROLL for (int t = 0; t < MAX_TOKENS / 2; t++) {
        if (2 * t < tokens) {
            acc[0][t] = acc[1][t] = acc[2][t] = acc[3][t] = vdupq_n_s32(0);
        }
    }
    for (size_t i = 0; i < n_groups * 8; i++, v += 2 * GROUP_BYTES) { /* two weights */
        int8x16_t w[4];
        UNROLL for (int s = 0; s < SETS; s++) { /* eight columns of two rows */
            const int32x4_t v0 = vreinterpretq_s32_u8(vld1q_u8(v + 16 * s));
            const int32x4_t v1 = vreinterpretq_s32_u8(vld1q_u8(v + 16 * s + GROUP_BYTES));
            w[2 * s] = vreinterpretq_s8_s32(vzip1q_s32(v0, v1));
            w[2 * s + 1] = vreinterpretq_s8_s32(vzip2q_s32(v0, v1));
        }
        UNROLL for (int t = 0; t < MAX_TOKENS / 2; t++) {
            if (2 * t < tokens) {
                const int8x16_t two = vld1q_s8(x[t] + 16 * i);
                acc[0][t] = vmmlaq_s32(acc[0][t], w[0], two);
                acc[1][t] = vmmlaq_s32(acc[1][t], w[1], two);
                acc[2][t] = vmmlaq_s32(acc[2][t], w[2], two);
                acc[3][t] = vmmlaq_s32(acc[3][t], w[3], two);
            }
        }
    }
    UNROLL for (int t = 0; t < MAX_TOKENS / 2; t++) {
        if (2 * t < tokens) {
            UNROLL for (int s = 0; s < SETS; s++) {
                sum[s][2 * t] = vuzp1q_s32(acc[2 * s][t], acc[2 * s + 1][t]);
                sum[s][2 * t + 1] = vuzp2q_s32(acc[2 * s][t], acc[2 * s + 1][t]);
            }
        }
    }
#else
    int32x4_t acc[SETS][MAX_TOKENS][PARTS];
    UNROLL for (int t = 0; t < MAX_TOKENS; t++) {
        if (t < tokens) {
            UNROLL for (int part = 0; part < PARTS; part++) {
                acc[0][t][part] = acc[1][t][part] = vdupq_n_s32(0);
            }
        }
    }
    enum { STEP = LEVEL == BASELINE ? 2 : 4 }; /* weights */
    for (size_t i = 0; i < n_groups * CODE_BLOCK; i += STEP, v += STEP * GROUP_BYTES) {
        uint8x16_t w[SETS][4];
        UNROLL for (int j = 0; j < STEP; j++) {
            w[0][j] = vld1q_u8(v + GROUP_BYTES * j);
            w[1][j] = vld1q_u8(v + GROUP_BYTES * j + 16);
        }
        UNROLL for (int t = 0; t < MAX_TOKENS; t++) {
            if (t < tokens) {
#if LEVEL == BASELINE
                add_products(acc[0][t], w[0][0], w[0][1], x[t] + 4 * i);
                add_products(acc[1][t], w[1][0], w[1][1], x[t] + 4 * i);
#else
                add_products4(acc[0][t], w[0], x[t] + 4 * i);
                add_products4(acc[1][t], w[1], x[t] + 4 * i);
#endif
            }
        }
    }
    UNROLL for (int t = 0; t < MAX_TOKENS; t++) {
        if (t < tokens) {
            sum[0][t] = sums_of_rows(acc[0][t]), sum[1][t] = sums_of_rows(acc[1][t]);
        }
    }
#endif
}

#define DOT_BLOCK(tokens)                                                                          \
    static __attribute__((noinline)) void dot_block_##tokens(                                      \
        const uint8_t *v, const int8_t *const *x, size_t n_groups,                                 \
        int32x4_t sum[SETS][MAX_TOKENS]) {                                                         \
        dot_block(tokens, v, x, n_groups, sum);                                                    \
    }
DOT_BLOCK(2)
DOT_BLOCK(4)
#if LEVEL != BASELINE
DOT_BLOCK(8)
#endif

/* Rows [row, row_end) of one strip, whose values are at v, for n <= PASS_TOKENS tokens. */
static void dot_strip(const packed_matrix *w, uint32_t row, uint32_t row_end, const uint8_t *v,
                      const activation *x, uint32_t n, const int8_t *arranged, float *y,
                      size_t y_stride) {
    const size_t n_groups = (w->n_cols + GROUP_COLS - 1) / GROUP_COLS;
    for (; row < row_end; row += SETS * ROWS, v += SETS * 16) {
        for (uint32_t t = 0; t < n; t += MAX_TOKENS) {
            const uint32_t tokens = n - t < MAX_TOKENS ? n - t : MAX_TOKENS;
            const int8_t *q[MAX_TOKENS];
            for (uint32_t i = 0; i < MAX_TOKENS; i += PAIR) { /* past the last: it again */
                const uint32_t own = t + (i < tokens ? i : (tokens - 1) / PAIR * PAIR);
                q[i / PAIR] = arranged + own * n_groups * GROUP_COLS;
            }
            int32x4_t sum[SETS][MAX_TOKENS];
#if LEVEL != BASELINE
            if (tokens > 4) {
                dot_block_8(v, q, n_groups, sum);
            } else
#endif
                (tokens > 2 ? dot_block_4 : dot_block_2)(v, q, n_groups, sum);
            for (uint32_t s = 0; s < SETS && row + ROWS * s < row_end; s++) {
                const uint32_t r = row + ROWS * s, n_rows = row_end - r < ROWS ? row_end - r : ROWS;
                for (uint32_t i = 0; i < tokens; i++) {
                    store_rows(w, r, n_rows, &x[t + i], sum[s][i], y + (t + i) * y_stride);
                }
            }
        }
    }
}

static void KERNEL(matmul_packed)(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                                  const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                                  uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % PACKED_STRIP == 0);
    if (n_tokens == 1) {
        matvec(w, row_begin, row_end, x, y, (int8_t *)scratch);
        return;
    }
    const size_t n_groups = (w->n_cols + GROUP_COLS - 1) / GROUP_COLS;
    int8_t *arranged = (int8_t *)scratch + n_groups * VALUE_BYTES;
    const decoder *d = decoder_get(w->half_bits);
    for (uint32_t t = 0; t < n_tokens; t += PASS_TOKENS) {
        const uint32_t n = n_tokens - t < PASS_TOKENS ? n_tokens - t : PASS_TOKENS;
        arrange_tokens(x + t, n, w->n_cols, arranged);
        for (uint32_t r = row_begin; r < row_end; r += PACKED_STRIP) {
            strip s;
            strip_start(w, r, &s);
            rates[w->half_bits].decode(d, s.codes, no_planes, s.whole, scratch);
            if (s.rest > 0) {
                rates[w->half_bits].decode(d, s.last, s.before_last, 1,
                                           scratch + s.whole * VALUE_BYTES);
            }
            dot_strip(w, r, row_end - r < PACKED_STRIP ? row_end : r + PACKED_STRIP, scratch, x + t,
                      n, arranged, y + t * y_stride, y_stride);
        }
    }
}

const kernels KERNEL(kernels) = {
    .name = KERNELS_NAME,
    .macs_per_microsecond = MACS_PER_MICROSECOND,
    .matmul_packed = KERNEL(matmul_packed),
    FLOAT_KERNELS,
};

#endif
