/*
 * avx2.c - kernels for x86-64 with AVX2 and F16C; included by avxvnni.c, which has GFNI and
 * AVX-VNNI as well.
 *
 * A vector holds one byte of each of 8 rows x 4 blocks of a group: all its lanes have the same
 * place in a block, so that the windows of weight k lie alike in all of them. Decoding weight k
 * of the 32 blocks:
 *
 *     1. the hash is linear, so it is the XOR of lookups in tables of 16 (vpshufb), one for each of
 *        the four or five nibbles that the window touches. With GFNI: of affine transforms, one for
 *        each of its two or three bytes
 *     2. two lookups, one for each half of the hash, add up to the value 0..127
 *     3. vpmaddubsw and vpmaddwd multiply with the activations, four columns that all rows share;
 *        pairs of products stay below 2 * 127 * 127 < 2^15, so that nothing saturates. With
 * AVX-VNNI: vpdpbusd. A 32-bit lane is a row
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

#ifdef AVXVNNI
#define KERNEL(name) name##_avxvnni
#else
#define KERNEL(name) name##_avx2
#endif
#define FLOAT_BLOCK 2
#define Q8_QUERIES 1
#include "kernels/float_kernels.h"

/* ---- Decoding ---------------------------------------------------------- */

#define EACH_WEIGHT(X)                                                                             \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

/* The window of weight k begins at this bit of the block; 16 bits earlier, the block before. */
#define WINDOW_BEGIN(h, k) ((int)(k) / 2 * (h) + ((k) % 2 != 0 ? (h) : ((h) + 1) / 2) - 16)

/* The rate of values that have been decoded already: their planes are one for each weight. */
enum { VALUES = 15 };

/* What decoding one rate needs. */
typedef struct decoder {
    __m256i high, low;
#ifdef AVXVNNI
    uint64_t matrix[CODE_BLOCK][3]; /* hash of what weight k's window has of its three bytes */
#else
    uint8_t nibble[CODE_BLOCK][5][16]; /* hashes of what it has of its four or five nibbles */
#endif
} decoder;

static __m256i both_lanes(const uint8_t bytes[16]) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)bytes));
}

/* Hash of a bit of the window, 0 for those outside. */
static uint8_t hash_of_bit(const struct code_table *code, int bit) {
    return bit >= 0 && bit < CODE_WINDOW ? code_hash(code, 1u << bit) : 0;
}

#ifdef AVXVNNI
#define WINDOW_BYTE(h, k) ((WINDOW_BEGIN(h, k) + 16) / 8 - 2)
#define WINDOW_SHIFT(h, k) (WINDOW_BEGIN(h, k) - 8 * WINDOW_BYTE(h, k))

/* The matrix of vgf2p8affineqb for eight bits of a window: output bit i is the parity of the
 * input AND byte 7 - i of the matrix. */
static void fill_hash(const struct code_table *code, int k, decoder *d) {
    for (int byte = 0; byte < 3; byte++) {
        uint64_t matrix = 0;
        for (int i = 0; i < 8; i++) {
            for (int b = 0; b < 8; b++) {
                const int bit = 8 * byte + b - WINDOW_SHIFT(code->half_bits, k);
                matrix |= (uint64_t)(hash_of_bit(code, bit) >> i & 1) << (8 * (7 - i) + b);
            }
        }
        d->matrix[k][byte] = matrix;
    }
}

static ALWAYS_INLINE __m256i window_hash(const decoder *d, int h, int k, const __m256i *plane) {
#define HASH(i)                                                                                    \
    _mm256_gf2p8affine_epi64_epi8(p[i], _mm256_set1_epi64x((long long)d->matrix[k][i]), 0)
    const __m256i *p = plane + 2 + WINDOW_BYTE(h, k);
    const __m256i hash = _mm256_xor_si256(HASH(0), HASH(1));
    return WINDOW_SHIFT(h, k) == 0 ? hash : _mm256_xor_si256(hash, HASH(2));
#undef HASH
}
#else
#define WINDOW_NIBBLE(h, k) ((WINDOW_BEGIN(h, k) + 16) / 4) /* from 16 bits before the block on */
#define WINDOW_SHIFT(h, k) ((WINDOW_BEGIN(h, k) + 16) % 4)

static void fill_hash(const struct code_table *code, int k, decoder *d) {
    for (int n = 0; n < 5; n++) {
        d->nibble[k][n][0] = 0;
        for (int i = 1; i < 16; i++) {
            const int bit = 4 * n + __builtin_ctz((unsigned)i) - WINDOW_SHIFT(code->half_bits, k);
            d->nibble[k][n][i] = d->nibble[k][n][i & (i - 1)] ^ hash_of_bit(code, bit);
        }
    }
}

/* nibbles: of the planes, low and high ones in turn */
static ALWAYS_INLINE __m256i window_hash(const decoder *d, int h, int k, const __m256i *nibbles) {
#define HASH(i) _mm256_shuffle_epi8(both_lanes(d->nibble[k][i]), p[i])
    const __m256i *p = nibbles + WINDOW_NIBBLE(h, k);
    const __m256i hash =
        _mm256_xor_si256(_mm256_xor_si256(HASH(0), HASH(1)), _mm256_xor_si256(HASH(2), HASH(3)));
    return WINDOW_SHIFT(h, k) == 0 ? hash : _mm256_xor_si256(hash, HASH(4));
#undef HASH
}
#endif

static void decoder_fill(const struct code_table *code, decoder *d) {
    for (int k = 0; k < CODE_BLOCK; k++) {
        fill_hash(code, k, d);
    }
    d->high = both_lanes(code->high);
    d->low = both_lanes(code->low);
}

#include "kernels/decoders.h"

static ALWAYS_INLINE __m256i hash_value(const decoder *d, __m256i hash) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(hash, 4), nibble);
    return _mm256_add_epi8(_mm256_shuffle_epi8(d->high, high),
                           _mm256_shuffle_epi8(d->low, _mm256_and_si256(hash, nibble)));
}

/* Eight rows of a row's last group, if it has fewer than four blocks: zeros for those that lack. */
static void widen_group(const uint8_t *codes, uint32_t half_bits, uint32_t n_blocks, uint8_t *out) {
    uint8_t from[16];
    for (uint32_t i = 0; i < 16; i++) {
        const uint32_t block = i % PACKED_GROUP;
        from[i] = (uint8_t)(block < n_blocks ? i / PACKED_GROUP * n_blocks + block : 128);
    }
    const __m128i index = _mm_loadu_si128((const __m128i *)(const void *)from);
    const __m128i present = _mm256_castsi256_si128(first_lanes(n_blocks));
    for (uint32_t j = 0; j < half_bits; j++) {
        for (size_t rows = 0; rows < 8; rows += 4) {
            const int *p = (const int *)(const void *)(codes + rows * n_blocks);
            _mm_storeu_si128((__m128i *)(void *)(out + (size_t)64 * j + 4 * rows),
                             _mm_shuffle_epi8(_mm_maskload_epi32(p, present), index));
        }
        codes += (size_t)PACKED_STRIP * n_blocks;
    }
}

static inline __m256i load_v(const uint8_t *v) {
    return _mm256_loadu_si256((const __m256i *)(const void *)v);
}

/* sum + products of unsigned v (signed, if `i8`) with signed x, four blocks of a row in each lane;
 * x: 4 bytes that all lanes share */
static ALWAYS_INLINE __m256i add_products(__m256i sum, __m256i v, const uint8_t *x, bool i8) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    const __m256i xv = _mm256_set1_epi32(four);
#ifdef AVXVNNI
    (void)i8;
    return _mm256_dpbusd_avx_epi32(sum, v, xv);
#else
    __m256i pairs = i8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(xv, v))
                       : _mm256_maddubs_epi16(v, xv);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

/* ---- Products ---------------------------------------------------------- */

enum {
    MAX_TOKENS = 8,      /* of one pass over half a strip: their sums are in registers */
    PASS_TOKENS = 64,    /* whose activations are arranged together */
    GROUP_BYTES = 64,    /* of a plane, and of a token's activations */
    PREFETCH_GROUPS = 4, /* how far ahead codes are fetched; they are read once, in order */
#ifdef AVXVNNI
    I8_CENTRE = 128
#else
    I8_CENTRE = 0
#endif
};

/*
 * The sums of rows first_row (0 or 8) .. + 7 of a strip for T tokens, one lane for each row. x:
 * groups of T x 64 activations in the order of arrange(). T = 0: the decoded values go to `values`
 * instead, planes of 64 bytes like the codes'.
 */
static ALWAYS_INLINE void dot_rows(const decoder *d, const int h, const int T, const uint8_t *codes,
                                   uint32_t n_blocks, uint32_t first_row, const uint8_t *x,
                                   __m256i *sums, uint8_t *values) {
    const int n_planes = h == VALUES ? 16 : h;
    /* One token has two sums, for a product waits for the one before. */
    const int n_sets = T == 1 ? 2 : 1;
    __m256i acc[MAX_TOKENS];
    for (int i = 0; i < MAX_TOKENS; i++) {
        acc[i] = _mm256_setzero_si256();
    }
    __m256i before[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    uint8_t wide[16 * GROUP_BYTES];
    for (uint32_t b = 0; b < n_blocks; b += PACKED_GROUP, x += (size_t)T * GROUP_BYTES) {
        const uint8_t *p = codes + (size_t)PACKED_GROUP * first_row;
        if (h != VALUES && n_blocks - b < PACKED_GROUP) {
            const uint32_t n = n_blocks - b;
            widen_group(codes + (size_t)n * first_row, (uint32_t)h, n, wide);
            p = wide;
        }
        __m256i plane[18], nibble[36];
#define LOAD(j)                                                                                    \
    if (j < n_planes) {                                                                            \
        plane[j + 2] = load_v(p + GROUP_BYTES * j);                                                \
        if (h != VALUES) {                                                                         \
            _mm_prefetch((const char *)p + GROUP_BYTES * (j + PREFETCH_GROUPS * n_planes),         \
                         _MM_HINT_T0);                                                             \
        }                                                                                          \
    }
        EACH_WEIGHT(LOAD)
#undef LOAD
        if (h < VALUES) { /* the last two bytes of the block before: one lane's next byte down */
            plane[0] = _mm256_or_si256(_mm256_slli_epi32(plane[h], 8), before[0]);
            plane[1] = _mm256_or_si256(_mm256_slli_epi32(plane[h + 1], 8), before[1]);
            before[0] = _mm256_srli_epi32(plane[h], 24);
            before[1] = _mm256_srli_epi32(plane[h + 1], 24);
#ifndef AVXVNNI
            const __m256i low = _mm256_set1_epi8(15);
#define SPLIT(j)                                                                                   \
    if (j < h + 2) {                                                                               \
        nibble[2 * j] = _mm256_and_si256(plane[j], low);                                           \
        nibble[2 * j + 1] = _mm256_and_si256(_mm256_srli_epi16(plane[j], 4), low);                 \
    }
            EACH_WEIGHT(SPLIT)
#undef SPLIT
#endif
        }
#ifdef AVXVNNI
        (void)nibble;
#define HASHED plane
#define UNSIGNED_I8(v) _mm256_xor_si256(v, _mm256_set1_epi8(-128))
#else
#define HASHED nibble
#define UNSIGNED_I8(v) (v)
#endif
#define TOKEN(t, k)                                                                                \
    if (t < T) {                                                                                   \
        const int i = t + T * (k % n_sets);                                                        \
        acc[i] = add_products(acc[i], v, x + GROUP_BYTES * t + 4 * k, h == 16);                    \
    }
#define WEIGHT(k)                                                                                  \
    {                                                                                              \
        const __m256i v = h == VALUES ? plane[k + 2]                                               \
                          : h == 16   ? UNSIGNED_I8(plane[k + 2])                                  \
                                      : hash_value(d, window_hash(d, h, k, HASHED));                 \
        if (T == 0) {                                                                              \
            _mm256_storeu_si256((__m256i *)(void *)(values + GROUP_BYTES * k), v);                 \
        }                                                                                          \
        TOKEN(0, k)                                                                                \
        TOKEN(1, k) TOKEN(2, k) TOKEN(3, k) TOKEN(4, k) TOKEN(5, k) TOKEN(6, k) TOKEN(7, k)        \
    }
        EACH_WEIGHT(WEIGHT)
#undef WEIGHT
#undef TOKEN
        codes += (size_t)GROUP_BYTES * (size_t)n_planes;
        values += T == 0 ? GROUP_BYTES * CODE_BLOCK : 0;
    }
    for (int t = 0; t < T; t++) {
        sums[t] = n_sets == 2 ? _mm256_add_epi32(acc[t], acc[t + 1]) : acc[t];
    }
}

typedef void dot_fn(const decoder *d, const uint8_t *codes, uint32_t n_blocks, uint32_t first_row,
                    const uint8_t *x, __m256i *sums);
typedef void values_fn(const decoder *d, const uint8_t *codes, uint32_t n_blocks,
                       uint32_t first_row, uint8_t *values);

#define DOT(h, T)                                                                                  \
    static void dot_##h##_##T(const decoder *d, const uint8_t *codes, uint32_t n_blocks,           \
                              uint32_t first_row, const uint8_t *x, __m256i *sums) {               \
        dot_rows(d, h, T, codes, n_blocks, first_row, x, sums, NULL);                              \
    }
#define DOTS(h) DOT(h, 1) DOT(h, 2) DOT(h, 4) DOT(h, 8)
#define DECODE(h)                                                                                  \
    static void values_##h(const decoder *d, const uint8_t *codes, uint32_t n_blocks,              \
                           uint32_t first_row, uint8_t *values) {                                  \
        dot_rows(d, h, 0, codes, n_blocks, first_row, NULL, NULL, values);                         \
    }
/* clang-format off */
DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8) DOTS(15) DOTS(16)
DECODE(4) DECODE(5) DECODE(6) DECODE(7) DECODE(8)

static const uint32_t pass_sizes[] = {1, 2, 4, 8};
/* clang-format on */

#define ROW(h)                                                                                     \
    { dot_##h##_1, dot_##h##_2, dot_##h##_4, dot_##h##_8 }
static dot_fn *const dots[][4] = {ROW(4), ROW(5), ROW(6), ROW(7), ROW(8), ROW(15), ROW(16)};
#undef ROW
static values_fn *const decode_rows[] = {values_4, values_5, values_6, values_7, values_8};

static inline size_t rate_index(uint32_t half_bits) {
    return half_bits >= VALUES ? half_bits - 10 : half_bits - 4;
}

/* The smallest pass for n tokens, n >= 1. */
static size_t pass_index(uint32_t n) {
    size_t i = 0;
    while (pass_sizes[i] < n && pass_sizes[i] < MAX_TOKENS) {
        i++;
    }
    return i;
}

/*
 * One token's activations for products with groups: of each 64, four of one weight's number, then
 * four of the next: those of the group's blocks, zeros past the last. Groups lie `step` bytes
 * apart.
 */
static void arrange(const int8_t *q, uint32_t n_cols, uint8_t *out, size_t step) {
    for (uint32_t c = 0; c < n_cols; c += 64, out += step) {
        __m128i block[PACKED_GROUP];
        for (uint32_t b = 0; b < PACKED_GROUP; b++) {
            block[b] = c + 16 * b < n_cols
                           ? _mm_loadu_si128((const __m128i *)(const void *)(q + c + 16 * b))
                           : _mm_setzero_si128();
        }
        const __m128i ab0 = _mm_unpacklo_epi8(block[0], block[1]);
        const __m128i ab8 = _mm_unpackhi_epi8(block[0], block[1]);
        const __m128i cd0 = _mm_unpacklo_epi8(block[2], block[3]);
        const __m128i cd8 = _mm_unpackhi_epi8(block[2], block[3]);
        __m128i *o = (__m128i *)(void *)out;
        _mm_storeu_si128(o, _mm_unpacklo_epi16(ab0, cd0));
        _mm_storeu_si128(o + 1, _mm_unpackhi_epi16(ab0, cd0));
        _mm_storeu_si128(o + 2, _mm_unpacklo_epi16(ab8, cd8));
        _mm_storeu_si128(o + 3, _mm_unpackhi_epi16(ab8, cd8));
    }
}

/* Exact sums of n <= 8 rows for one token to floats. */
static inline void store_rows(const packed_matrix *w, uint32_t row, uint32_t n, const activation *x,
                              __m256i sums, float *y) {
    const uint32_t centre = w->half_bits == 16 ? I8_CENTRE : CODE_CENTRE;
    sums = _mm256_sub_epi32(sums, _mm256_set1_epi32((int32_t)(centre * (uint32_t)x->sum)));
    uint16_t bf16[8] = {0};
    memcpy(bf16, w->scales + (size_t)2 * row, 2 * (size_t)n);
    const __m256i scales = _mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)bf16)), 16);
    const __m256 out =
        _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_castsi256_ps(scales)),
                      _mm256_set1_ps(x->scale));
    if (n == 8) {
        _mm256_storeu_ps(y + row, out);
    } else {
        _mm256_maskstore_ps(y + row, first_lanes(n), out);
    }
}

/* At most PASS_TOKENS tokens: their activations are arranged in scratch, 8 tokens after 8. Rows
 * that are wanted in several passes are decoded once, to the rest of scratch. */
static void matmul_tokens(const packed_matrix *w, const decoder *d, uint32_t row_begin,
                          uint32_t row_end, const activation *x, uint32_t n_tokens, float *y,
                          size_t y_stride, uint8_t *scratch) {
    const uint32_t n_blocks = w->n_cols / CODE_BLOCK;
    const size_t n_groups = (n_blocks + PACKED_GROUP - 1) / PACKED_GROUP;
    const size_t strip_bytes = (size_t)PACKED_STRIP * n_blocks * w->half_bits;
    uint8_t *values = scratch + PASS_TOKENS * n_groups * GROUP_BYTES;
    const bool twice = n_tokens > MAX_TOKENS && w->half_bits != 16;
    dot_fn *const *dot = dots[rate_index(twice ? VALUES : w->half_bits)];
    for (uint32_t t = 0; t < n_tokens; t++) {
        const uint32_t first = t / MAX_TOKENS * MAX_TOKENS;
        const size_t step = (size_t)pass_sizes[pass_index(n_tokens - first)] * GROUP_BYTES;
        arrange(x[t].q, w->n_cols, scratch + (first * n_groups + (t - first)) * GROUP_BYTES, step);
    }
    for (uint32_t r = row_begin; r < row_end; r += 8) {
        const uint32_t n_rows = row_end - r < 8 ? row_end - r : 8, first_row = r % PACKED_STRIP;
        const uint8_t *codes = w->codes + r / PACKED_STRIP * strip_bytes;
        if (twice) {
            decode_rows[rate_index(w->half_bits)](d, codes, n_blocks, first_row,
                                                  values + PACKED_GROUP * first_row);
            codes = values;
        }
        for (uint32_t first = 0; first < n_tokens; first += MAX_TOKENS) {
            const uint32_t n = n_tokens - first < MAX_TOKENS ? n_tokens - first : MAX_TOKENS;
            __m256i sums[MAX_TOKENS];
            dot[pass_index(n)](d, codes, n_blocks, first_row,
                               scratch + first * n_groups * GROUP_BYTES, sums);
            for (uint32_t t = first; t < first + n; t++) {
                store_rows(w, r, n_rows, &x[t], sums[t - first], y + t * y_stride);
            }
        }
    }
}

static void KERNEL(matmul_packed)(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                                  const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                                  uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % PACKED_STRIP == 0);
    const decoder *d = decoder_get(w->half_bits);
    for (uint32_t t = 0; t < n_tokens; t += PASS_TOKENS) {
        matmul_tokens(w, d, row_begin, row_end, x + t,
                      n_tokens - t < PASS_TOKENS ? n_tokens - t : PASS_TOKENS, y + t * y_stride,
                      y_stride, scratch);
    }
}

#ifdef AVXVNNI
const kernels kernels_avxvnni = {
    .name = "avxvnni",
    .macs_per_microsecond = 40000,
#else
const kernels kernels_avx2 = {
    .name = "avx2",
    .macs_per_microsecond = 20000,
#endif
    .matmul_packed = KERNEL(matmul_packed),
    FLOAT_KERNELS,
};

#else

typedef int kernels_avx2_needs_x86_64; /* ISO C forbids an empty file */

#endif
