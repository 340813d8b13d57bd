/*
 * trig.h - sin and cos in binary64 from + - * / alone: the part of math.c that src/gpu computes
 * too.
 *
 * The argument is reduced to a short interval around 0, where Taylor series are summed with
 * Horner's rule; they are long enough that their remainder is below 2^-57.
 */
#ifndef KERNELS_TRIG_H
#define KERNELS_TRIG_H

#include "kernels/math.h"

#include <stddef.h>

MATH_INLINE uint64_t trig_bits(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

MATH_INLINE double trig_from_bits(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Rounds |x| < 2^51 to the nearest integer, ties to even. */
#define TRIG_ROUND 0x1.8p52

MATH_INLINE double trig_horner(const double *c, size_t n, double x) {
    double p = c[n - 1];
    for (size_t i = n - 1; i-- > 0;) {
        p = p * x + c[i];
    }
    return p;
}

/* pi/2 cut into parts of 33 bits, so that small multiples of the leading ones are exact; the values
 * of fdlibm (Sun Microsystems, 1993). */
#define TRIG_PIO2_1 0x1.921fb54400000p0
#define TRIG_PIO2_2 0x1.0b4611a600000p-34
#define TRIG_PIO2_3 0x1.3198a2e037073p-69
#define TRIG_TWO_OVER_PI 0x1.45f306dc9c883p-1

/* |x| <= pi/4, a little more does no harm */
MATH_INLINE void trig_near_zero(double x, double *sine, double *cosine) {
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
    *sine = x * trig_horner(s, sizeof s / sizeof s[0], x2);
    *cosine = trig_horner(c, sizeof c / sizeof c[0], x2);
}

/* Turns sin and cos of r into those of r + quarter * pi/2. */
MATH_INLINE void trig_turn(uint64_t quarter, double s, double c, double *sine, double *cosine) {
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

MATH_INLINE void trig_sin_cos(double x, double *sine, double *cosine) {
    double z = x * TRIG_TWO_OVER_PI + TRIG_ROUND;
    double k = z - TRIG_ROUND;
    double r = ((x - k * TRIG_PIO2_1) - k * TRIG_PIO2_2) - k * TRIG_PIO2_3;
    double s, c;
    trig_near_zero(r, &s, &c);
    trig_turn(trig_bits(z) - trig_bits(TRIG_ROUND), s, c, sine, cosine);
}

#endif
