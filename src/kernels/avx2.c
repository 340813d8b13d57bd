/*
 * avx2.c - kernels for x86-64 with AVX2 and F16C.
 *
 * Decoding 64 weights (a tile: 4 rows of 16):
 *
 *     1. two rows share a register, one per 128-bit lane: the last two bytes of the row's block in
 *        the tile before, then its block of this tile. A byte shuffle, a multiplication by a
 *        power of two and a shift cut out the newer and the older byte of each window
 *     2. the hash is linear, so it is the XOR of four lookups in tables of 16 (vpshufb), one per
 *        nibble of the window
 *     3. two lookups, one for each half of the hash, add up to the value 0..127
 *     4. vpmaddubsw and vpmaddwd multiply with the activations; pairs of products stay below
 *        2 * 127 * 127 < 2^15, so that nothing saturates
 *
 * Invariant: integer sums are exact in any order; the float kernels keep the 16 lanes of
 * docs/NUMERICS.md in two registers. Every result is compared with kernels/ref.c by memcmp.
 */
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "code/code.h"
#include "format/container.h"
#include "kernels/math.h"

#include <immintrin.h>

/* ---- The vocabulary of float_kernels.h --------------------------------- */

typedef struct f32x16 {
    __m256 a, b; /* lanes 0..7 and 8..15 */
} f32x16;
typedef struct u32x16 {
    __m256i a, b;
} u32x16;

/* All ones in the first n of 8 lanes, n <= 8. */
static inline __m256i first_lanes(uint32_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline uint32_t low_count(uint32_t n) {
    return n < 8 ? n : 8;
}
static inline uint32_t high_count(uint32_t n) {
    return n > 8 ? n - 8 : 0;
}

static inline f32x16 v_load(const float *p) {
    return (f32x16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
static inline f32x16 v_load_n(const float *p, uint32_t n) {
    return (f32x16){_mm256_maskload_ps(p, first_lanes(low_count(n))),
                    _mm256_maskload_ps(p + 8, first_lanes(high_count(n)))};
}
static inline void v_store(float *p, f32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline void v_store_n(float *p, uint32_t n, f32x16 x) {
    _mm256_maskstore_ps(p, first_lanes(low_count(n)), x.a);
    _mm256_maskstore_ps(p + 8, first_lanes(high_count(n)), x.b);
}
static inline f32x16 v_load_half(const uint8_t *p) {
    const __m128i *h = (const __m128i *)(const void *)p;
    return (f32x16){_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
static inline f32x16 v_load_half_n(const uint8_t *p, uint32_t n) {
    uint8_t halves[32] = {0};
    memcpy(halves, p, (size_t)2 * n);
    return v_load_half(halves);
}

#define BOTH(type, expression_a, expression_b) ((type){expression_a, expression_b})
static inline f32x16 v_set1(float x) {
    return BOTH(f32x16, _mm256_set1_ps(x), _mm256_set1_ps(x));
}
static inline f32x16 v_zero(void) {
    return BOTH(f32x16, _mm256_setzero_ps(), _mm256_setzero_ps());
}
static inline f32x16 v_add(f32x16 x, f32x16 y) {
    return BOTH(f32x16, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b));
}
static inline f32x16 v_sub(f32x16 x, f32x16 y) {
    return BOTH(f32x16, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b));
}
static inline f32x16 v_mul(f32x16 x, f32x16 y) {
    return BOTH(f32x16, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b));
}
static inline f32x16 v_div(f32x16 x, f32x16 y) {
    return BOTH(f32x16, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b));
}
static inline f32x16 v_max(f32x16 x, f32x16 y) {
    return BOTH(f32x16, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b));
}
static inline f32x16 v_min(f32x16 x, f32x16 y) {
    return BOTH(f32x16, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b));
}
static inline u32x16 v_bits(f32x16 x) {
    return BOTH(u32x16, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}
static inline f32x16 v_float(u32x16 x) {
    return BOTH(f32x16, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b));
}
static inline u32x16 u_set1(uint32_t x) {
    return BOTH(u32x16, _mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x));
}
static inline u32x16 u_add(u32x16 x, u32x16 y) {
    return BOTH(u32x16, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
static inline u32x16 u_sub(u32x16 x, u32x16 y) {
    return BOTH(u32x16, _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b));
}
static inline u32x16 u_and(u32x16 x, u32x16 y) {
    return BOTH(u32x16, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b));
}
static inline u32x16 u_max(u32x16 x, u32x16 y) {
    return BOTH(u32x16, _mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b));
}
static inline u32x16 u_shift_left(u32x16 x, int n) {
    return BOTH(u32x16, _mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n));
}
static inline u32x16 u_shift_right(u32x16 x, int n) {
    return BOTH(u32x16, _mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n));
}
static inline f32x16 v_swap1(f32x16 x) {
    return BOTH(f32x16, _mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1));
}
static inline f32x16 v_swap2(f32x16 x) {
    return BOTH(f32x16, _mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e));
}
static inline f32x16 v_swap4(f32x16 x) {
    return BOTH(f32x16, _mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1));
}
static inline f32x16 v_swap8(f32x16 x) {
    return BOTH(f32x16, x.b, x.a);
}

/* Signs changed where the mask has its top bit set. */
static inline f32x16 flip(f32x16 x, __m256 mask_a, __m256 mask_b) {
    return BOTH(f32x16, _mm256_xor_ps(x.a, mask_a), _mm256_xor_ps(x.b, mask_b));
}
static inline f32x16 v_negate(f32x16 x) {
    const __m256 all = _mm256_set1_ps(-0.0f);
    return flip(x, all, all);
}
static inline f32x16 v_flip1(f32x16 x) {
    const __m256 mask = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    return flip(x, mask, mask);
}
static inline f32x16 v_flip2(f32x16 x) {
    const __m256 mask = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    return flip(x, mask, mask);
}
static inline f32x16 v_flip4(f32x16 x) {
    const __m256 mask = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    return flip(x, mask, mask);
}
static inline f32x16 v_flip8(f32x16 x) {
    return flip(x, _mm256_setzero_ps(), _mm256_set1_ps(-0.0f));
}

static inline float v_sum(f32x16 x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Vectors are halved and joined until each lane holds one sum: the tree of v_sum, lane by lane.
 */
static inline __m256 join4(f32x16 x, f32x16 y) {
    __m256 a = _mm256_add_ps(x.a, x.b), b = _mm256_add_ps(y.a, y.b);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
static inline __m256 sum8(const f32x16 x[8]) {
    __m256 a = join4(x[0], x[4]), b = join4(x[1], x[5]);
    __m256 c = join4(x[2], x[6]), d = join4(x[3], x[7]);
    __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(c, d, 0x44), _mm256_shuffle_ps(c, d, 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
}
static inline f32x16 v_sum16(const f32x16 x[16]) {
    return BOTH(f32x16, sum8(x), sum8(x + 8));
}

/* The lanes are within -128..127. */
static inline void v_narrow(int8_t *p, uint32_t n, u32x16 x) {
    __m256i words = _mm256_packs_epi32(x.a, x.b); /* 0..3, 8..11 | 4..7, 12..15 */
    words = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (n == 16) {
        _mm_storeu_si128((__m128i *)(void *)p, bytes);
    } else {
        int8_t all[16];
        _mm_storeu_si128((__m128i *)(void *)all, bytes);
        memcpy(p, all, n);
    }
}

static inline f32x16 v_from_int(u32x16 x) {
    return BOTH(f32x16, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b));
}
static inline u32x16 i_dot4_start(int32_t total) {
    (void)total;
    return u_set1(0);
}
static inline __m256i four_bytes(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm256_set1_epi32(bits);
}
static inline __m256i load_bytes(const int8_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
static inline __m256i add_pairs(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
/* No byte is -128, so that pairs of products stay below 2^15. */
static inline __m256i dot4_half(__m256i sum, __m256i bytes, __m256i four) {
    return add_pairs(sum,
                     _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(bytes, four)));
}
static inline u32x16 i_dot4(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    const __m256i x = four_bytes(four);
    return BOTH(u32x16, dot4_half(sum.a, load_bytes(bytes), x),
                dot4_half(sum.b, load_bytes(bytes + 32), x));
}
static inline u32x16 i_dot4_small(u32x16 sum, const int8_t *bytes, const int8_t *four) {
    const __m256i x = four_bytes(four);
    return BOTH(u32x16, add_pairs(sum.a, _mm256_maddubs_epi16(x, load_bytes(bytes))),
                add_pairs(sum.b, _mm256_maddubs_epi16(x, load_bytes(bytes + 32))));
}

#define KERNEL(name) name##_avx2
#define FLOAT_BLOCK 2
#define Q8_QUERIES 1
#include "kernels/float_kernels.h"

/* ---- Decoding ---------------------------------------------------------- */

/* How far ahead of the tile at hand the codes are fetched; they are read once, in order. */
enum { PREFETCH = 2048 };

typedef struct decoder {
    __m256i newer[2], older[2]; /* step 1, even and odd weights: bytes of the window's byte ... */
    __m256i multiplier[2];      /* ... and the power of two that moves it to the upper half */
    __m256i nibble[2][4];       /* step 2: hashes of a nibble, the oldest first */
    __m256i high, low;          /* step 3 */
    uint32_t half_bits;
} decoder;

static __m256i both_lanes(const uint8_t bytes[16]) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)bytes));
}

/*
 * In the lane of a row, byte 2 + i is byte i of the row's block, bytes 0 and 1 end the block
 * before. The newer byte of weight i of a parity begins at bit begin = end - 8 of the block, in
 * bytes first = floor(begin / 8) and the next; the older byte lies one byte earlier.
 */
static void fill_step1(const struct code_table *code, int odd, decoder *d) {
    uint8_t newer[16], older[16];
    uint16_t multiplier[8];
    for (int i = 0; i < 8; i++) {
        int begin = i * code->half_bits + code->width[0] + odd * code->width[1] - 8;
        int first = (begin + 8) / 8 - 1; /* begin >= -8 */
        newer[2 * i] = (uint8_t)(2 + first);
        newer[2 * i + 1] = (uint8_t)(3 + first);
        older[2 * i] = (uint8_t)(1 + first);
        older[2 * i + 1] = (uint8_t)(2 + first);
        multiplier[i] = (uint16_t)(256 >> (begin - 8 * first));
    }
    d->newer[odd] = both_lanes(newer);
    d->older[odd] = both_lanes(older);
    d->multiplier[odd] = both_lanes((const uint8_t *)multiplier);
}

static void decoder_fill(uint32_t half_bits, decoder *d) {
    memset(d, 0, sizeof *d);
    d->half_bits = half_bits;
    if (half_bits == 16) {
        return; /* int8 needs no decoding */
    }
    const struct code_table *code = code_table_get((int)half_bits);
    for (int odd = 0; odd < 2; odd++) {
        fill_step1(code, odd, d);
        for (int n = 0; n < 4; n++) {
            uint8_t hash[16] = {0};
            for (int i = 1; i < 16; i++) {
                hash[i] = code_hash(code, (unsigned)i << (4 * n));
            }
            d->nibble[odd][n] = both_lanes(hash);
        }
    }
    d->high = both_lanes(code->high);
    d->low = both_lanes(code->low);
}

/* Step 1's source for rows r and r + 1 of the tile at p. */
static inline __m256i load_rows(const uint8_t *p, uint32_t half_bits, uint32_t r) {
    const uint8_t *block = p + r * half_bits - 2, *before = p + r * half_bits - 3 * half_bits - 2;
#define LOAD(q) _mm_loadu_si128((const __m128i *)(const void *)(q))
    __m256i now =
        _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD(block)), LOAD(block + half_bits), 1);
    __m256i last =
        _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD(before)), LOAD(before + half_bits), 1);
    return _mm256_blend_epi16(now, last, 0x01);
}

/* One byte of the windows of four rows: lane 0 has rows 0 and 2, lane 1 rows 1 and 3. */
static inline __m256i window_byte(__m256i rows01, __m256i rows23, __m256i bytes,
                                  __m256i multiplier) {
    __m256i a = _mm256_mullo_epi16(_mm256_shuffle_epi8(rows01, bytes), multiplier);
    __m256i b = _mm256_mullo_epi16(_mm256_shuffle_epi8(rows23, bytes), multiplier);
    return _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
}

static inline __m256i window_hash(const decoder *d, int odd, __m256i newer, __m256i older) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i h0 = _mm256_shuffle_epi8(d->nibble[odd][0], _mm256_and_si256(older, low));
    __m256i h1 =
        _mm256_shuffle_epi8(d->nibble[odd][1], _mm256_and_si256(_mm256_srli_epi16(older, 4), low));
    __m256i h2 = _mm256_shuffle_epi8(d->nibble[odd][2], _mm256_and_si256(newer, low));
    __m256i h3 =
        _mm256_shuffle_epi8(d->nibble[odd][3], _mm256_and_si256(_mm256_srli_epi16(newer, 4), low));
    return _mm256_xor_si256(_mm256_xor_si256(h0, h1), _mm256_xor_si256(h2, h3));
}

static inline __m256i hash_value(const decoder *d, __m256i hash) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(hash, 4), nibble);
    return _mm256_add_epi8(_mm256_shuffle_epi8(d->high, high),
                           _mm256_shuffle_epi8(d->low, _mm256_and_si256(hash, nibble)));
}

/* Steps 1 to 3. Reads up to 10 bytes past the tile and most of the tile before it. */
static inline void decode_tile(const decoder *d, const uint8_t *p, __m256i *rows01,
                               __m256i *rows23) {
    const __m256i source01 = load_rows(p, d->half_bits, 0),
                  source23 = load_rows(p, d->half_bits, 2);
    __m256i value[2];
    for (int odd = 0; odd < 2; odd++) {
        __m256i newer = window_byte(source01, source23, d->newer[odd], d->multiplier[odd]);
        __m256i older = window_byte(source01, source23, d->older[odd], d->multiplier[odd]);
        value[odd] = hash_value(d, window_hash(d, odd, newer, older));
    }
    *rows01 = _mm256_unpacklo_epi8(value[0], value[1]);
    *rows23 = _mm256_unpackhi_epi8(value[0], value[1]);
}

static inline void decode_to(const decoder *d, const uint8_t *tile, uint8_t *out) {
    __m256i rows01, rows23;
    decode_tile(d, tile, &rows01, &rows23);
    _mm256_storeu_si256((__m256i *)(void *)out, rows01);
    _mm256_storeu_si256((__m256i *)(void *)(out + 32), rows23);
}

/*
 * Decodes a whole strip, 64 bytes per tile: the four rows' 16 weights. The first and the last tile
 * pass through a buffer: zeros stand before the row, and nothing past it may be read.
 */
static void unpack_strip(const packed_matrix *w, const decoder *d, uint32_t row, uint8_t *out) {
    const size_t n_tiles = w->n_cols / 16, tile_bytes = (size_t)4 * w->half_bits;
    const uint8_t *p = w->codes + row / 4 * n_tiles * tile_bytes;
    if (w->half_bits == 16) {
        memcpy(out, p, n_tiles * 64);
        return;
    }
    uint8_t edge[32 + 32 + 16] = {0};
    memcpy(edge + tile_bytes, p, tile_bytes);
    decode_to(d, edge + tile_bytes, out);
    for (size_t i = 1; i + 1 < n_tiles; i++) {
        _mm_prefetch((const char *)p + i * tile_bytes + PREFETCH, _MM_HINT_T0);
        decode_to(d, p + i * tile_bytes, out + 64 * i);
    }
    if (n_tiles > 1) {
        memcpy(edge, p + (n_tiles - 2) * tile_bytes, 2 * tile_bytes);
        decode_to(d, edge + tile_bytes, out + 64 * (n_tiles - 1));
    }
}

/* ---- Products ---------------------------------------------------------- */

/* sum + products of unsigned v (or signed, if `i8`) with x, four neighbours in each lane */
static inline __m256i add_products(__m256i sum, __m256i v, __m256i x, bool i8) {
    __m256i pairs = i8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v))
                       : _mm256_maddubs_epi16(v, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static inline __m256i load_x(const int8_t *x) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)x));
}

static inline __m256i load_v(const uint8_t *v) {
    return _mm256_loadu_si256((const __m256i *)(const void *)v);
}

/* Rows 0 1 and 2 3 of a strip in the 128-bit lanes of two accumulators: their four sums. */
static inline __m128i sum_rows(__m256i rows01, __m256i rows23) {
    __m256i halves = _mm256_hadd_epi32(rows01, rows23); /* 0 0 2 2 | 1 1 3 3 */
    __m256i sums = _mm256_hadd_epi32(halves, halves);   /* 0 2 0 2 | 1 3 1 3 */
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

/* Exact sums of four rows for one token to floats in y, for the first n rows. */
static void store_rows(const packed_matrix *w, uint32_t row, uint32_t n, const activation *x,
                       __m128i sums, float *y) {
    const uint32_t centre = w->half_bits == 16 ? 0 : CODE_CENTRE;
    int32_t exact[4];
    sums = _mm_sub_epi32(sums, _mm_set1_epi32((int32_t)(centre * (uint32_t)x->sum)));
    _mm_storeu_si128((__m128i *)(void *)exact, sums);
    for (uint32_t i = 0; i < n; i++) {
        float row_scale =
            math_from_bits_f32((uint32_t)load_u16(w->scales + (size_t)2 * (row + i)) << 16);
        y[row + i] = ((float)exact[i] * row_scale) * x->scale;
    }
}

/* One decoded strip against one token, or four. */
static inline void dot_strip(const uint8_t *v, const int8_t *x, uint32_t n_cols, bool i8,
                             __m128i *sums) {
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t c = 0; c < n_cols; c += 16) {
        const __m256i xv = load_x(x + c);
        a = add_products(a, load_v(v + 4 * c), xv, i8);
        b = add_products(b, load_v(v + 4 * c + 32), xv, i8);
    }
    *sums = sum_rows(a, b);
}

static inline void dot_strip4(const uint8_t *v, const int8_t *const x[4], uint32_t n_cols, bool i8,
                              __m128i sums[4]) {
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0;
    __m256i b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (size_t c = 0; c < n_cols; c += 16) {
        const __m256i va = load_v(v + 4 * c), vb = load_v(v + 4 * c + 32);
        const __m256i x0 = load_x(x[0] + c), x1 = load_x(x[1] + c);
        a0 = add_products(a0, va, x0, i8);
        b0 = add_products(b0, vb, x0, i8);
        a1 = add_products(a1, va, x1, i8);
        b1 = add_products(b1, vb, x1, i8);
        const __m256i x2 = load_x(x[2] + c), x3 = load_x(x[3] + c);
        a2 = add_products(a2, va, x2, i8);
        b2 = add_products(b2, vb, x2, i8);
        a3 = add_products(a3, va, x3, i8);
        b3 = add_products(b3, vb, x3, i8);
    }
    sums[0] = sum_rows(a0, b0);
    sums[1] = sum_rows(a1, b1);
    sums[2] = sum_rows(a2, b2);
    sums[3] = sum_rows(a3, b3);
}

static void matmul_packed_avx2(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                               const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                               uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % 4 == 0);
    const bool i8 = w->half_bits == 16;
    decoder d;
    decoder_fill(w->half_bits, &d);
    for (uint32_t r = row_begin; r < row_end; r += 4) {
        const uint32_t n = row_end - r < 4 ? row_end - r : 4;
        unpack_strip(w, &d, r, scratch);
        uint32_t t = 0;
        for (; n_tokens - t >= 4; t += 4) {
            const int8_t *q[4] = {x[t].q, x[t + 1].q, x[t + 2].q, x[t + 3].q};
            __m128i sums[4];
            if (i8) {
                dot_strip4(scratch, q, w->n_cols, true, sums);
            } else {
                dot_strip4(scratch, q, w->n_cols, false, sums);
            }
            for (uint32_t i = 0; i < 4; i++) {
                store_rows(w, r, n, &x[t + i], sums[i], y + (t + i) * y_stride);
            }
        }
        for (; t < n_tokens; t++) {
            __m128i sums;
            if (i8) {
                dot_strip(scratch, x[t].q, w->n_cols, true, &sums);
            } else {
                dot_strip(scratch, x[t].q, w->n_cols, false, &sums);
            }
            store_rows(w, r, n, &x[t], sums, y + t * y_stride);
        }
    }
}

const kernels kernels_avx2 = {
    .name = "avx2",
    .macs_per_microsecond = 10000,
    .matmul_packed = matmul_packed_avx2,
    .unpack_row = unpack_row_avx2,
    .quantize_activation = quantize_activation_avx2,
    .matmul_f32 = matmul_f32_avx2,
    .row_to_f32 = row_to_f32_avx2,
    .rmsnorm = rmsnorm_avx2,
    .rope = rope_avx2,
    .swiglu = swiglu_avx2,
    .add = add_avx2,
    .attention = attention_avx2,
    .rotate = rotate_avx2,
    .rotate_inverse = rotate_inverse_avx2,
};

#else

typedef int kernels_avx2_needs_x86_64; /* ISO C forbids an empty file */

#endif
