/*
 * math.c - exp, log, pow, sin and cos in binary64 from + - * / alone (see math.h).
 *
 * Each function reduces its argument to a short interval around 0 and sums a Taylor series with
 * Horner's rule; the series are long enough that their remainder is below 2^-57.
 */
#include "kernels/math.h"

#include <stddef.h>

static uint64_t bits_f64(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static double from_bits_f64(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Rounds |x| < 2^51 to the nearest integer, ties to even. */
#define ROUND_F64 0x1.8p52

static double horner(const double *c, size_t n, double x) {
    double p = c[n - 1];
    for (size_t i = n - 1; i-- > 0;) {
        p = p * x + c[i];
    }
    return p;
}

/* ln 2 and pi/2 cut into parts of 33 bits, so that small multiples of the leading ones are exact;
 * the values of fdlibm (Sun Microsystems, 1993). */
static const double LN2_HI = 0x1.62e42fee00000p-1, LN2_LO = 0x1.a39ef35793c76p-33;
static const double PIO2_1 = 0x1.921fb54400000p0, PIO2_2 = 0x1.0b4611a600000p-34,
                    PIO2_3 = 0x1.3198a2e037073p-69;
static const double PI_4 = 0x1.921fb54442d18p-1, TWO_OVER_PI = 0x1.45f306dc9c883p-1;

double math_exp_f64(double x) {
    /* 1/n! */
    static const double c[] = {1.0,
                               1.0,
                               1.0 / 2,
                               1.0 / 6,
                               1.0 / 24,
                               1.0 / 120,
                               1.0 / 720,
                               1.0 / 5040,
                               1.0 / 40320,
                               1.0 / 362880,
                               1.0 / 3628800,
                               1.0 / 39916800,
                               1.0 / 479001600,
                               1.0 / 6227020800};
    x = x < -746.0 ? -746.0 : x;
    x = x > 710.0 ? 710.0 : x;
    double z = x * 0x1.71547652b82fep0 + ROUND_F64;
    double k = z - ROUND_F64;
    double r = (x - k * LN2_HI) - k * LN2_LO;
    double p = horner(c, sizeof c / sizeof c[0], r);
    uint64_t biased = bits_f64(z) - bits_f64(ROUND_F64) + 2048;
    uint64_t half = biased >> 1;
    double s1 = from_bits_f64((biased - half - 1) << 52);
    double s2 = from_bits_f64((half - 1) << 52);
    return (p * s1) * s2;
}

double math_log_f64(double x) {
    /* log((1+s)/(1-s)) / 2s = 1 + s^2/3 + s^4/5 + ... */
    static const double c[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                               1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23};
    uint64_t u = bits_f64(x);
    /* m in [sqrt(1/2), sqrt(2)): the fraction, with the exponent that puts it there. */
    uint64_t shifted = u + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    double e = (double)((int64_t)(shifted >> 52) - 1023);
    double m = from_bits_f64((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    double s = (m - 1.0) / (m + 1.0);
    double log_m = (2.0 * s) * horner(c, sizeof c / sizeof c[0], s * s);
    return e * LN2_HI + (e * LN2_LO + log_m);
}

double math_pow_f64(double base, double exponent) {
    return math_exp_f64(exponent * math_log_f64(base));
}

/* |x| <= pi/4, a little more does no harm */
static void sin_cos_kernel(double x, double *sine, double *cosine) {
    static const double s[] = {1.0,
                               -1.0 / 6,
                               1.0 / 120,
                               -1.0 / 5040,
                               1.0 / 362880,
                               -1.0 / 39916800,
                               1.0 / 6227020800,
                               -1.0 / 1307674368000,
                               1.0 / 355687428096000};
    static const double c[] = {1.0,
                               -1.0 / 2,
                               1.0 / 24,
                               -1.0 / 720,
                               1.0 / 40320,
                               -1.0 / 3628800,
                               1.0 / 479001600,
                               -1.0 / 87178291200,
                               1.0 / 20922789888000,
                               -1.0 / 6402373705728000};
    double x2 = x * x;
    *sine = x * horner(s, sizeof s / sizeof s[0], x2);
    *cosine = horner(c, sizeof c / sizeof c[0], x2);
}

/* Turns sin and cos of r into those of r + quarter * pi/2. */
static void turn_quarters(uint64_t quarter, double s, double c, double *sine, double *cosine) {
    switch (quarter & 3) {
    case 0:
        *sine = s, *cosine = c;
        break;
    case 1:
        *sine = c, *cosine = -s;
        break;
    case 2:
        *sine = -s, *cosine = -c;
        break;
    default:
        *sine = -c, *cosine = s;
        break;
    }
}

void math_sin_cos_f64(double x, double *sine, double *cosine) {
    double z = x * TWO_OVER_PI + ROUND_F64;
    double k = z - ROUND_F64;
    double r = ((x - k * PIO2_1) - k * PIO2_2) - k * PIO2_3;
    double s, c;
    sin_cos_kernel(r, &s, &c);
    turn_quarters(bits_f64(z) - bits_f64(ROUND_F64), s, c, sine, cosine);
}

void math_sin_cos_turn(uint64_t k, uint64_t m, double *sine, double *cosine) {
    /* k/m of a turn = eighth * pi/4 + (rest/m) * pi/4, all integers: k < m <= 2^60. */
    k %= m;
    uint64_t eighth = 8 * k / m, rest = 8 * k % m;
    double s, c;
    if (eighth & 1) { /* the odd eighths count down from the next quarter */
        sin_cos_kernel(-PI_4 * ((double)(m - rest) / (double)m), &s, &c);
    } else {
        sin_cos_kernel(PI_4 * ((double)rest / (double)m), &s, &c);
    }
    turn_quarters((eighth + 1) >> 1, s, c, sine, cosine);
}
