/*
 * encode_step.h - one step of the Viterbi search of encode.c, for one instruction set.
 *
 * No include guard: encode.c includes it once per set, with
 *     STEP_ISA      suffix of the functions, and of the table steps_<isa>
 *     STEP_TARGET   function attributes
 *     STEP_WIDTH    lanes of a vector: 4, 8 or 16
 *     STEP_MIN      elementwise minimum of two vectors of int32
 * The arithmetic is the same in all of them.
 */

#define STEP_PASTE_(a, b) a##_##b
#define STEP_PASTE(a, b) STEP_PASTE_(a, b)
#define STEP_VEC STEP_PASTE(vec, STEP_ISA)
#define STEP_UVEC STEP_PASTE(uvec, STEP_ISA)
#define STEP_BODY STEP_PASTE(step_body, STEP_ISA)

typedef int32_t STEP_VEC __attribute__((vector_size(STEP_WIDTH * 4), may_alias));
typedef uint32_t STEP_UVEC __attribute__((vector_size(STEP_WIDTH * 4), may_alias));

/* One weight: b new bits, d bits fall out. */
STEP_TARGET static inline __attribute__((always_inline)) void
STEP_BODY(int b, int d, const int32_t *restrict cost, int32_t *restrict next,
          const int32_t *restrict distance, const step_hash *restrict hash,
          int32_t *restrict back) {
    const int shared = 16 - b - d, entry = d == 2 ? 2 : 4, per_word = 32 / entry;
    const int parts = LANES / STEP_WIDTH;
    STEP_VEC word[LANES / STEP_WIDTH];
    for (int p = 0; p < parts; p++) {
        word[p] = (STEP_VEC){0};
    }
    for (int m = 0; m < 1 << shared; m++) {
        uint32_t base[16];
        for (int o = 0; o < 1 << d; o++) {
            base[o] = hash->shared[m] ^ hash->dropped[o];
        }
        const int filled = (m << b) % per_word;
        for (int p = 0; p < parts; p++) {
            STEP_VEC from[16];
            for (int o = 0; o < 1 << d; o++) {
                const int32_t *c = cost + ((m << d) + o) * LANES + p * STEP_WIDTH;
                from[o] = (*(const STEP_VEC *)c & ~15) | o;
            }
            STEP_VEC w = word[p];
            for (int a = 0; a < 1 << b; a++) {
                const int32_t *dist = distance + p * STEP_WIDTH;
                const uint32_t added = hash->added[a];
                STEP_VEC best = from[0] + *(const STEP_VEC *)(dist + (base[0] ^ added));
                for (int o = 1; o < 1 << d; o++) {
                    const STEP_VEC c = from[o] + *(const STEP_VEC *)(dist + (base[o] ^ added));
                    best = STEP_MIN(best, c);
                }
                *(STEP_VEC *)(next + ((a << shared) + m) * LANES + p * STEP_WIDTH) = best;
                /* The first entry of a word ends up lowest: shift in from the top. */
                w = (STEP_VEC)((STEP_UVEC)w >> entry | (STEP_UVEC)best << (32 - entry));
                if ((filled + a + 1) % per_word == 0) {
                    *(STEP_VEC *)(back + ((m << b) + a) / per_word * LANES + p * STEP_WIDTH) = w;
                }
            }
            word[p] = w;
        }
    }
}

#define STEP_DEFINE(b, d)                                                                          \
    STEP_TARGET static void STEP_PASTE(step_##b##d, STEP_ISA)(                                     \
        const int32_t *cost, int32_t *next, const int32_t *distance, const step_hash *hash,        \
        int32_t *back) {                                                                           \
        STEP_BODY(b, d, cost, next, distance, hash, back);                                         \
    }
STEP_DEFINE(2, 2)
STEP_DEFINE(3, 2)
STEP_DEFINE(2, 3)
STEP_DEFINE(3, 3)
STEP_DEFINE(4, 3)
STEP_DEFINE(3, 4)
STEP_DEFINE(4, 4)

static step_fn *const STEP_PASTE(steps, STEP_ISA)[3][3] = {
    /* [b - 2][d - 2] */
    {STEP_PASTE(step_22, STEP_ISA), STEP_PASTE(step_23, STEP_ISA), NULL},
    {STEP_PASTE(step_32, STEP_ISA), STEP_PASTE(step_33, STEP_ISA), STEP_PASTE(step_34, STEP_ISA)},
    {NULL, STEP_PASTE(step_43, STEP_ISA), STEP_PASTE(step_44, STEP_ISA)},
};

#undef STEP_DEFINE
#undef STEP_BODY
#undef STEP_UVEC
#undef STEP_VEC
#undef STEP_PASTE
#undef STEP_PASTE_
#undef STEP_MIN
#undef STEP_WIDTH
#undef STEP_TARGET
#undef STEP_ISA
