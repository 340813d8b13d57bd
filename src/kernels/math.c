/*
 * math.c - exp, log, pow, sin and cos in binary64 from + - * / alone (see math.h).
 *
 * Each function reduces its argument to a short interval around 0 and sums a Taylor series with
 * Horner's rule; the series are long enough that their remainder is below 2^-57.
 */
#include "kernels/math.h"
#include "kernels/trig.h"

/* ln 2 cut into parts of 33 bits, so that small multiples of the leading one are exact; the values
 * of fdlibm (Sun Microsystems, 1993). */
static const double LN2_HI = 0x1.62e42fee00000p-1, LN2_LO = 0x1.a39ef35793c76p-33;
static const double PI_4 = 0x1.921fb54442d18p-1;

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
    double z = x * 0x1.71547652b82fep0 + TRIG_ROUND;
    double k = z - TRIG_ROUND;
    double r = (x - k * LN2_HI) - k * LN2_LO;
    double p = trig_horner(c, sizeof c / sizeof c[0], r);
    uint64_t biased = trig_bits(z) - trig_bits(TRIG_ROUND) + 2048;
    uint64_t half = biased >> 1;
    double s1 = trig_from_bits((biased - half - 1) << 52);
    double s2 = trig_from_bits((half - 1) << 52);
    return (p * s1) * s2;
}

double math_log_f64(double x) {
    /* log((1+s)/(1-s)) / 2s = 1 + s^2/3 + s^4/5 + ... */
    static const double c[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                               1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23};
    uint64_t u = trig_bits(x);
    /* m in [sqrt(1/2), sqrt(2)): the fraction, with the exponent that puts it there. */
    uint64_t shifted = u + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    double e = (double)((int64_t)(shifted >> 52) - 1023);
    double m = trig_from_bits((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    double s = (m - 1.0) / (m + 1.0);
    double log_m = (2.0 * s) * trig_horner(c, sizeof c / sizeof c[0], s * s);
    return e * LN2_HI + (e * LN2_LO + log_m);
}

double math_pow_f64(double base, double exponent) {
    return math_exp_f64(exponent * math_log_f64(base));
}

void math_sin_cos_f64(double x, double *sine, double *cosine) {
    trig_sin_cos(x, sine, cosine);
}

void math_sin_cos_turn(uint64_t k, uint64_t m, double *sine, double *cosine) {
    /* k/m of a turn = eighth * pi/4 + (rest/m) * pi/4, all integers: k < m <= 2^60. */
    k %= m;
    uint64_t eighth = 8 * k / m, rest = 8 * k % m;
    double s, c;
    if (eighth & 1) { /* the odd eighths count down from the next quarter */
        trig_near_zero(-PI_4 * ((double)(m - rest) / (double)m), &s, &c);
    } else {
        trig_near_zero(PI_4 * ((double)rest / (double)m), &s, &c);
    }
    trig_turn((eighth + 1) >> 1, s, c, sine, cosine);
}
