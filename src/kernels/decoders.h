/*
 * decoders.h - the decoders of all rates, filled once: filling one takes as long as decoding some
 * hundred thousand weights. Include where `decoder` and
 *
 *     static void decoder_fill(const struct code_table *code, decoder *d);
 *
 * are defined; each instruction set has its own.
 */
#include <pthread.h>

static decoder decoders[CODE_MAX_RATE + 1]; /* [0]: of int8, which needs no decoding */
static pthread_once_t decoders_filled = PTHREAD_ONCE_INIT;

static void decoders_fill(void) {
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        decoder_fill(code_table_get(rate), &decoders[rate]);
    }
}

/* half_bits: 4..8, 16. */
static const decoder *decoder_get(uint32_t half_bits) {
    pthread_once(&decoders_filled, decoders_fill);
    return &decoders[half_bits == 16 ? 0 : half_bits];
}
