/*
 * decode.c - the reference decoder of the window code (see code.h).
 *
 * Invariant: before weight k, `window` holds the 16 bits of the row that end where weight k
 * begins; nothing else is carried from weight to weight.
 */
#include "code/code.h"

void code_decode_row(const struct code_table *table, const uint8_t *bits, size_t block_stride,
                     size_t n, uint8_t *v) {
    uint32_t window = 0; /* bit 15 is the newest */
    for (size_t block = 0; block < n / CODE_BLOCK; block++) {
        const uint8_t *p = bits + block * block_stride;
        uint64_t queue = 0; /* bits of the block not yet used, the next one lowest */
        for (int i = 0; i < table->half_bits; i++) {
            queue |= (uint64_t)p[i] << (8 * i);
        }
        for (size_t i = 0; i < CODE_BLOCK; i++) {
            const int width = table->width[i & 1];
            const uint32_t symbol = (uint32_t)queue & ((1u << width) - 1);
            queue >>= width;
            window = window >> width | symbol << (CODE_WINDOW - width);
            *v++ = table->value[code_hash(table, window)];
        }
    }
}
