/*
 * avx512.c - kernels for x86-64 with AVX-512 F, BW, VL, DQ, VBMI, VBMI2, VNNI and GFNI.
 *
 * A vector holds one byte of each of a group's 64 blocks (16 rows x 4 blocks of 16 columns): all
 * its lanes have the same place in a block, so that the windows of weight k lie alike in all of
 * them. Decoding weight k of the 64 blocks:
 *
 *     1. an affine transform over GF(2) (vgf2p8affineqb) for each of the three bytes that the
 * window touches hashes what the window has of it, whatever the shift; a XOR of the three
 *     2. two lookups (vpermb), one for each half of the hash, add up to the value 0..127
 *     3. vpdpbusd multiplies with the activations of each token at once, four columns that all
 *        rows share, and adds up in int32: a lane is a row
 *
 * Invariant: integer sums are exact in any order; the float kernels keep the 16 lanes of
 * docs/NUMERICS.md in one register. Every result is compared with kernels/ref.c by memcmp.
 */
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx512_packed.h"
#include "kernels/math.h"

/* ---- The vocabulary of float_kernels.h --------------------------------- */

typedef __m512 f32x16;
typedef __m512i u32x16;

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

static void decoder_fill(const struct code_table *code, decoder *d) {
    for (int k = 0; k < CODE_BLOCK; k++) {
        for (int byte = 0; byte < 3; byte++) {
            uint8_t hash[8];
            for (int b = 0; b < 8; b++) {
                const int bit = 8 * byte + b - WINDOW_SHIFT(code->half_bits, k);
                hash[b] = bit >= 0 && bit < CODE_WINDOW ? code_hash(code, 1u << bit) : 0;
            }
            d->matrix[k][byte] = affine_matrix(hash);
        }
    }
    /* vpermb looks at six bits: the tables repeat for those that are not meant. */
    uint8_t high[64], low[64];
    for (int i = 0; i < 64; i++) {
        high[i] = code->high[i >> 2];
        low[i] = code->low[i & 15];
    }
    d->high = _mm512_loadu_si512(high);
    d->low = _mm512_loadu_si512(low);
}

#include "kernels/decoders.h"

const decoder *decoder_get_avx512(uint32_t half_bits) {
    return decoder_get(half_bits);
}

enum {
    MAX_TOKENS = 16, /* of one pass over a strip: their sums are in registers */
    X_STRIDE = 68,   /* from a token's 64 activations to the next one's: not 64, for a core
                        cannot load from the same place of two cache lines at once */
};

/*
 * sum + products of unsigned v with signed x, four blocks of a row in each lane; at x + offset, a
 * constant: 4 bytes that all lanes share. As assembly: gcc 12 copies every sum to another register
 * and back around the intrinsic, and would compute all the addresses ahead.
 */
static ALWAYS_INLINE __m512i add_products(__m512i sum, __m512i v, const uint8_t *x,
                                          const int offset) {
    __asm__("vpdpbusd %c3(%2)%{1to16%}, %1, %0"
            : "+v"(sum)
            : "v"(v), "r"(x), "i"(offset), "m"(*(const uint8_t(*)[MAX_TOKENS * X_STRIDE]) x));
    return sum;
}

/* ---- Products for few tokens, as they are decoded ----------------------- */

/* Strips that are decoded in turns, a group of each, for few tokens: a core reads memory faster in
 * several places than in one. */
enum { MAX_STREAMS = 4, STREAM_TOKENS = 4, FIRST_GROUPS = 4 };

typedef struct stream {
    const uint8_t *codes;
    __m512i before[2];        /* load_group */
    __m512i sums[MAX_TOKENS]; /* of a token: a lane for each row */
} stream;

/*
 * The sums of a strip in each stream for T tokens. x: groups of T x X_STRIDE bytes, activations in
 * the order of arrange().
 */
static ALWAYS_INLINE void dot_strips(const decoder *d, const int h, const int T, stream *streams,
                                     uint32_t n_streams, uint32_t n_blocks, const uint8_t *x) {
    /* Few tokens have two sums each, for a product waits for the one before. */
    const int n_sets = T < 4 ? 2 : 1;
    for (uint32_t s = 0; s < n_streams; s++) {
        streams[s].before[0] = streams[s].before[1] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int i = 0; i < T * n_sets; i++) {
            streams[s].sums[i] = _mm512_setzero_si512();
        }
    }
    uint8_t wide[16 * GROUP_BYTES];
    for (uint32_t b = 0; b < n_blocks; b += PACKED_GROUP, x += (size_t)T * X_STRIDE) {
        for (stream *s = streams; s < streams + n_streams; s++) {
            __m512i plane[18], sums[MAX_TOKENS];
#pragma GCC unroll 16
            for (int i = 0; i < T * n_sets; i++) {
                sums[i] = s->sums[i];
            }
            const uint8_t *codes = load_group(h, s->codes, n_blocks - b, wide, s->before, plane);
#define TOKEN(t, k)                                                                                \
    if (t < T) {                                                                                   \
        const int i = t + T * (k % n_sets);                                                        \
        sums[i] = add_products(sums[i], v, x, X_STRIDE * t + 4 * k);                               \
    }
#define WEIGHT(k)                                                                                  \
    {                                                                                              \
        const __m512i v = group_weight(d, h, k, plane);                                            \
        TOKEN(0, k)                                                                                \
        TOKEN(1, k)                                                                                \
        TOKEN(2, k)                                                                                \
        TOKEN(3, k)                                                                                \
        TOKEN(4, k)                                                                                \
        TOKEN(5, k)                                                                                \
        TOKEN(6, k)                                                                                \
        TOKEN(7, k)                                                                                \
        TOKEN(8, k)                                                                                \
        TOKEN(9, k) TOKEN(10, k) TOKEN(11, k) TOKEN(12, k) TOKEN(13, k) TOKEN(14, k) TOKEN(15, k)  \
    }
            EACH_WEIGHT(WEIGHT)
#undef WEIGHT
#undef TOKEN
            s->codes = codes + (size_t)GROUP_BYTES * (size_t)h;
#pragma GCC unroll 16
            for (int i = 0; i < T * n_sets; i++) {
                s->sums[i] = sums[i];
            }
        }
    }
    for (stream *s = streams; n_sets == 2 && s < streams + n_streams; s++) {
        for (int t = 0; t < T; t++) {
            s->sums[t] = _mm512_add_epi32(s->sums[t], s->sums[t + T]);
        }
    }
}

typedef void dot_fn(const decoder *d, stream *streams, uint32_t n_streams, uint32_t n_blocks,
                    const uint8_t *x);

#define DOT(h, T)                                                                                  \
    static void dot_##h##_##T(const decoder *d, stream *streams, uint32_t n_streams,               \
                              uint32_t n_blocks, const uint8_t *x) {                               \
        dot_strips(d, h, T, streams, n_streams, n_blocks, x);                                      \
    }
#define DOTS(h) DOT(h, 1) DOT(h, 2) DOT(h, 4) DOT(h, 8) DOT(h, 12) DOT(h, 16)
/* clang-format off */
DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8) DOTS(16)

static const uint32_t pass_sizes[] = {1, 2, 4, 8, 12, 16};
/* clang-format on */

#define ROW(h)                                                                                     \
    { dot_##h##_1, dot_##h##_2, dot_##h##_4, dot_##h##_8, dot_##h##_12, dot_##h##_16 }
static dot_fn *const dots[][6] = {ROW(4), ROW(5), ROW(6), ROW(7), ROW(8), ROW(16)};
#undef ROW

static inline size_t rate_index(uint32_t half_bits) {
    return half_bits == 16 ? 5 : half_bits - 4;
}

/* The smallest pass for n tokens, n >= 1. */
static size_t pass_index(uint32_t n) {
    size_t i = 0;
    while (pass_sizes[i] < n && pass_sizes[i] < MAX_TOKENS) {
        i++;
    }
    return i;
}

/* y for at most PASS_TOKENS tokens x, whose activations are arranged. */
typedef struct product {
    const packed_matrix *w;
    const decoder *d;
    const activation *x;
    const uint8_t *arranged;
    uint32_t n_tokens, row_end;
    float *y;
    size_t y_stride;
} product;

/* sums: of a strip, for each token. */
static void store_sums(const product *p, uint32_t row, const __m512i *sums) {
    const uint32_t n_rows = p->row_end - row < PACKED_STRIP ? p->row_end - row : PACKED_STRIP;
    for (uint32_t t = 0; t < p->n_tokens; t++) {
        store_rows(p->w, row, n_rows, &p->x[t], sums[t], p->y + t * p->y_stride);
    }
}

static const uint8_t *strip_codes(const packed_matrix *w, uint32_t row) {
    return w->codes + (size_t)row * (w->n_cols / CODE_BLOCK) * w->half_bits;
}

/* One strip of each of n_streams streams: rows from `row` on, from row + apart on, and so on. */
typedef void strips_fn(const product *p, uint32_t row, uint32_t apart, uint32_t n_streams);

static void few_strips(const product *p, uint32_t row, uint32_t apart, uint32_t n_streams) {
    stream streams[MAX_STREAMS];
    for (uint32_t s = 0; s < n_streams; s++) {
        streams[s].codes = strip_codes(p->w, row + s * apart);
    }
    dots[rate_index(p->w->half_bits)][pass_index(p->n_tokens)](
        p->d, streams, n_streams, p->w->n_cols / CODE_BLOCK, p->arranged);
    for (uint32_t s = 0; s < n_streams; s++) {
        store_sums(p, row + s * apart, streams[s].sums);
    }
}

static void arrange_few(const product *p, uint8_t *out) {
    for (uint32_t t = 0; t < p->n_tokens; t++) {
        arrange(p->x[t].q, p->w->n_cols, out + t * X_STRIDE,
                (size_t)pass_sizes[pass_index(p->n_tokens)] * X_STRIDE);
    }
}

/* ---- Products for more tokens ------------------------------------------- */

/*
 * Two strips are decoded a piece at a time, which is multiplied with eight tokens after eight (the
 * last ones may be four) while it is in the first-level cache. Activations lie in the order in
 * which they are read.
 */
enum {
    TILE_TOKENS = 8,
    TILE_STRIPS = 2,
    PIECE_GROUPS = 16,
    WIDE_COLS = 16384, /* from here on, PASS_TOKENS tokens exceed a second-level cache of 2 MiB */
};

/* sums of two strips and T tokens += products of n_groups groups; the second strip's weights lie
 * PIECE_GROUPS tiles after the first's. */
static ALWAYS_INLINE void add_tile(const int T, const uint8_t *weights, const uint8_t *x,
                                   uint32_t n_groups, __m512i *first, __m512i *second) {
    __m512i a[TILE_TOKENS], b[TILE_TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        a[t] = first[t], b[t] = second[t];
    }
    for (uint32_t g = 0; g < n_groups; g++, weights += TILE_BYTES, x += T * X_STRIDE) {
#define TOKEN(t, k)                                                                                \
    if (t < T) {                                                                                   \
        const __m512i q = four_bytes((const int8_t *)x + X_STRIDE * t + 4 * k);                    \
        a[t] = dot4(a[t], v, q);                                                                   \
        b[t] = dot4(b[t], w, q);                                                                   \
    }
#define WEIGHT(k)                                                                                  \
    {                                                                                              \
        const __m512i v = _mm512_load_si512(weights + GROUP_BYTES * k);                            \
        const __m512i w =                                                                          \
            _mm512_load_si512(weights + PIECE_GROUPS * TILE_BYTES + GROUP_BYTES * k);              \
        TOKEN(0, k)                                                                                \
        TOKEN(1, k) TOKEN(2, k) TOKEN(3, k) TOKEN(4, k) TOKEN(5, k) TOKEN(6, k) TOKEN(7, k)        \
    }
        EACH_WEIGHT(WEIGHT)
#undef WEIGHT
#undef TOKEN
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        first[t] = a[t], second[t] = b[t];
    }
}

/* Of the next tile, with so many tokens left. */
static uint32_t tile_tokens(uint32_t left) {
    return left > TILE_TOKENS / 2 ? TILE_TOKENS : TILE_TOKENS / 2;
}

/* Adds the next tile, with `left` tokens left. Returns where the activations of the one after lie.
 */
static const uint8_t *add_tokens(uint32_t left, const uint8_t *weights, const uint8_t *x,
                                 uint32_t n_groups, __m512i *first, __m512i *second) {
    const uint32_t n = tile_tokens(left);
    if (n == TILE_TOKENS) {
        add_tile(TILE_TOKENS, weights, x, n_groups, first, second);
    } else {
        add_tile(TILE_TOKENS / 2, weights, x, n_groups, first, second);
    }
    return x + (size_t)n_groups * n * X_STRIDE;
}

static ALWAYS_INLINE void tile_strips(const product *p, const int h, uint32_t row, uint32_t apart,
                                      uint32_t n_strips) {
    const uint32_t n_blocks = p->w->n_cols / CODE_BLOCK;
    const uint32_t n_groups = (n_blocks + PACKED_GROUP - 1) / PACKED_GROUP;
    _Alignas(64) uint8_t weights[TILE_STRIPS][PIECE_GROUPS * TILE_BYTES];
    __m512i sums[TILE_STRIPS][PASS_TOKENS], before[TILE_STRIPS][2];
    const uint8_t *codes[TILE_STRIPS], *x = p->arranged;
    for (uint32_t s = 0; s < TILE_STRIPS; s++) { /* without a second strip, the first again */
        codes[s] = strip_codes(p->w, row + (s < n_strips ? s * apart : 0));
        before[s][0] = before[s][1] = _mm512_setzero_si512();
        for (uint32_t t = 0; t < round_up(p->n_tokens, TILE_TOKENS); t++) {
            sums[s][t] = _mm512_setzero_si512();
        }
    }
    for (uint32_t g = 0; g < n_groups; g += PIECE_GROUPS) {
        const uint32_t n = n_groups - g < PIECE_GROUPS ? n_groups - g : PIECE_GROUPS;
        for (uint32_t s = 0; s < TILE_STRIPS; s++) {
            codes[s] = decode_groups(p->d, h, codes[s], n_blocks - PACKED_GROUP * g, n, before[s],
                                     weights[s]);
        }
        for (uint32_t t = 0; t < p->n_tokens; t += TILE_TOKENS) {
            x = add_tokens(p->n_tokens - t, weights[0], x, n, &sums[0][t], &sums[1][t]);
        }
    }
    for (uint32_t s = 0; s < n_strips; s++) {
        store_sums(p, row + s * apart, sums[s]);
    }
}

#define TILES(h)                                                                                   \
    static void tile_strips_##h(const product *p, uint32_t row, uint32_t apart, uint32_t n) {      \
        tile_strips(p, h, row, apart, n);                                                          \
    }
/* clang-format off */
TILES(4) TILES(5) TILES(6) TILES(7) TILES(8) TILES(16)
static strips_fn *const tiles[] = {tile_strips_4, tile_strips_5, tile_strips_6,
                                   tile_strips_7, tile_strips_8, tile_strips_16};
/* clang-format on */

static void arrange_tiles(const product *p, uint8_t *out) {
    const uint32_t n_cols = p->w->n_cols, piece = 64 * PIECE_GROUPS;
    for (uint32_t c = 0; c < n_cols; c += piece) {
        const uint32_t n = n_cols - c < piece ? n_cols - c : piece, n_groups = (n + 63) / 64;
        for (uint32_t t = 0; t < p->n_tokens; t += TILE_TOKENS) {
            const uint32_t left = p->n_tokens - t;
            const uint32_t n_tile = tile_tokens(left);
            for (uint32_t i = 0; i < n_tile && i < left; i++) {
                arrange(p->x[t + i].q + c, n, out + i * X_STRIDE, (size_t)n_tile * X_STRIDE);
            }
            out += (size_t)n_groups * n_tile * X_STRIDE;
        }
    }
}

/* ---- Both -------------------------------------------------------------- */

/* Fetches the first codes of each stream, of which nothing came ahead. */
static void fetch_streams(const product *p, uint32_t row, uint32_t apart, uint32_t n_streams) {
    for (uint32_t i = 0; i < FIRST_GROUPS * p->w->half_bits; i++) {
        for (uint32_t s = 0; s < n_streams; s++) {
            _mm_prefetch((const char *)strip_codes(p->w, row + s * apart) + (size_t)GROUP_BYTES * i,
                         _MM_HINT_T0);
        }
    }
}

static void matmul_tokens(const product *p, uint32_t row_begin, uint8_t *scratch) {
    const bool few = p->n_tokens <= MAX_TOKENS;
    strips_fn *const strips = few ? few_strips : tiles[rate_index(p->w->half_bits)];
    const uint32_t n_strips = (p->row_end - row_begin + PACKED_STRIP - 1) / PACKED_STRIP;
    const uint32_t n_streams = !few ? TILE_STRIPS : p->n_tokens > STREAM_TOKENS ? 1 : MAX_STREAMS;
    const uint32_t n_turns = n_strips / n_streams; /* with a strip of each stream */
    const uint32_t apart = PACKED_STRIP * n_turns;
    if (n_turns > 0) {
        fetch_streams(p, row_begin, apart, n_streams);
    }
    (few ? arrange_few : arrange_tiles)(p, scratch);
    for (uint32_t turn = 0; turn < n_turns; turn++) {
        strips(p, row_begin + PACKED_STRIP * turn, apart, n_streams);
    }
    if (n_strips > n_turns * n_streams) {
        strips(p, row_begin + apart * n_streams, PACKED_STRIP, n_strips - n_turns * n_streams);
    }
}

static void matmul_packed_avx512(const packed_matrix *w, uint32_t row_begin, uint32_t row_end,
                                 const activation *x, uint32_t n_tokens, float *y, size_t y_stride,
                                 uint8_t *scratch) {
    assert(w->n_cols % 16 == 0 && w->n_cols <= KERNELS_MAX_COLS && row_begin % PACKED_STRIP == 0);
    product p = {.w = w,
                 .d = decoder_get_avx512(w->half_bits),
                 .arranged = scratch,
                 .row_end = row_end,
                 .y_stride = y_stride};
    const uint32_t most = w->n_cols > WIDE_COLS ? PASS_TOKENS / 2 : PASS_TOKENS;
    for (uint32_t t = 0; t < n_tokens; t += most) {
        p.x = x + t;
        p.y = y + t * y_stride;
        p.n_tokens = n_tokens - t < most ? n_tokens - t : most;
        matmul_tokens(&p, row_begin, scratch);
    }
}

#define TABLE(isa)                                                                                 \
    {                                                                                              \
        .name = #isa, .macs_per_microsecond = 60000, .matmul_packed = matmul_packed_##isa,         \
        FLOAT_KERNELS                                                                              \
    }

const kernels kernels_avx512 = TABLE(avx512);
const kernels kernels_amx = TABLE(amx);

#else

typedef int kernels_avx512_needs_x86_64; /* ISO C forbids an empty file */

#endif
