/*
 * math.h - the elementary functions of the forward pass, the same bits on every machine.
 *
 * Everything here is made of IEEE-754 + - * / in the order written, rounded to nearest even,
 * without fma, and of integer operations on the representation. No libm. Errors stated are
 * measured against correctly rounded results in tests/test_kernels.c.
 *
 * Documented in docs/NUMERICS.md, "Elementary functions".
 */
#ifndef KERNELS_MATH_H
#define KERNELS_MATH_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error                                                                                             \
    "Hepta needs float and double arithmetic without excess precision (on i386: -msse2 -mfpmath=sse)"
#endif
#ifdef __FAST_MATH__
#error "Hepta's results are bit-exact: build without -ffast-math"
#endif

#ifndef MATH_INLINE /* src/gpu: functions that kernels call */
#define MATH_INLINE static inline
#endif

#define MATH_NAN_BITS 0x7fc00000u /* the one NaN the engine writes */

MATH_INLINE uint32_t math_bits_f32(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

MATH_INLINE float math_from_bits_f32(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/*
 * Adding and subtracting 1.5 * 2^23 rounds |x| <= 2^22 to the nearest integer, ties to even: the
 * sum lies in [2^23, 2^24), where the spacing of binary32 is 1. Its low bits are that integer.
 */
#define MATH_ROUND_F32 0x1.8p23f

MATH_INLINE float math_round_f32(float x) {
    return (x + MATH_ROUND_F32) - MATH_ROUND_F32;
}

/*
 * e^x in binary32: error below 1.1 ulp where the result is normal; 0 below -104, infinity above
 * 89, gradual between them and the normal range. x = k ln 2 + r, |r| <= ln(2)/2, k an
 * integer; e^r by a polynomial of degree 6 that is minimax in relative error (3.1e-9).
 * The same operations, lane by lane, stand in the vector kernels.
 */
#define MATH_EXP_MIN (-104.0f)
#define MATH_EXP_MAX 89.0f
#define MATH_EXP_LOG2E 0x1.715476p0f /* 1 / ln 2 */
#define MATH_EXP_LN2_HI 0x1.63p-1f   /* 9 bits: k * LN2_HI is exact */
#define MATH_EXP_LN2_LO (-0x1.bd0106p-13f)
#define MATH_EXP_C2 0x1.fffffcp-2f
#define MATH_EXP_C3 0x1.555492p-3f
#define MATH_EXP_C4 0x1.5558f2p-5f
#define MATH_EXP_C5 0x1.123a2p-7f
#define MATH_EXP_C6 0x1.6a23dp-10f

MATH_INLINE float math_exp_f32(float x) {
    x = x < MATH_EXP_MIN ? MATH_EXP_MIN : x; /* NaN stays NaN */
    x = x > MATH_EXP_MAX ? MATH_EXP_MAX : x;
    float z = x * MATH_EXP_LOG2E + MATH_ROUND_F32;
    float k = z - MATH_ROUND_F32;
    float r = (x - k * MATH_EXP_LN2_HI) - k * MATH_EXP_LN2_LO;
    float p = MATH_EXP_C6;
    p = p * r + MATH_EXP_C5;
    p = p * r + MATH_EXP_C4;
    p = p * r + MATH_EXP_C3;
    p = p * r + MATH_EXP_C2;
    p = (p * (r * r) + r) + 1.0f;
    /* p * 2^k as (p * 2^(k - k/2)) * 2^(k/2): both powers are normal for -151 <= k <= 129. The
     * bias of 256 keeps the shift to non-negative numbers. */
    uint32_t biased = math_bits_f32(z) - math_bits_f32(MATH_ROUND_F32) + 256;
    uint32_t half = biased >> 1;
    float s1 = math_from_bits_f32((biased - half - 1) << 23);
    float s2 = math_from_bits_f32((half - 1) << 23);
    return (p * s1) * s2;
}

/*
 * binary64, for tables computed once (RoPE, rotations). Relative errors below 6e-16 (exp: for
 * |x| <= 700; log: for normal x > 0; cos and sin: absolute, for |x| <= 1e6).
 */
double math_exp_f64(double x);
double math_log_f64(double x);
double math_pow_f64(double base, double exponent); /* base > 0; error grows with |log result| */
void math_sin_cos_f64(double x, double *sine, double *cosine); /* trig.h */

/* sin and cos of k/m of a full turn; the reduction is exact. m >= 1. */
void math_sin_cos_turn(uint64_t k, uint64_t m, double *sine, double *cosine);

#endif
