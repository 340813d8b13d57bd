/*
 * half.c - IEEE binary16 and bfloat16, to and from binary32, in integer operations alone, so
 * that the result is the same on every machine. Rounding is to nearest, ties to even; NaN
 * stays NaN.
 */
#include "base/base.h"

#include <string.h>

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) {
        return float_of(sign | 0x7f800000 | fraction << 13);
    }
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24, exact */
        float magnitude = (float)fraction * 0x1p-24f;
        return float_of(sign | bits_of(magnitude));
    }
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

/* `u` without its low `shift` bits, rounded to nearest even. */
static uint32_t shift_round(uint32_t u, uint32_t shift) {
    uint32_t half = 1u << (shift - 1), odd = u >> shift & 1;
    return (u + half - 1 + odd) >> shift;
}

uint16_t half_from_float(float f) {
    uint32_t u = bits_of(f);
    uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00);
    }
    if (u >= 0x477ff000) { /* rounds to 65520 or more: infinity */
        return (uint16_t)(sign | 0x7c00);
    }
    if (u >= 0x38800000) { /* normal: rebias 127 to 15; a carry moves into the exponent */
        return (uint16_t)(sign | shift_round(u - (112u << 23), 13));
    }
    if (u < 0x33000000) { /* below half of the smallest subnormal */
        return (uint16_t)sign;
    }
    uint32_t fraction = (u & 0x7fffff) | 0x800000;
    return (uint16_t)(sign | shift_round(fraction, 126 - (u >> 23)));
}

float bfloat_to_float(uint16_t h) {
    return float_of((uint32_t)h << 16);
}

uint16_t bfloat_from_float(float f) {
    uint32_t u = bits_of(f);
    if ((u & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(u >> 16 | 0x40);
    }
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
