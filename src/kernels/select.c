/*
 * select.c - which kernels run: the best table this CPU has, or the one HEPTA_KERNELS names.
 *
 * Invariant: every table gives the same bits, so that the choice is one of speed alone
 * (docs/NUMERICS.md).
 */
#include "format/container.h"
#include "kernels/kernels.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

bool kernels_agree(const kernels *a, const kernels *b) {
    enum { ROWS = 48, COLS = 80, TOKENS = 33 }; /* strips, a ragged group, a ragged tile */
    static const uint32_t rates[] = {7, 16};
    uint8_t codes[ROWS * COLS], scales[2 * ROWS];
    int8_t q[TOKENS][COLS];
    activation x[TOKENS];
    float y[2][TOKENS * ROWS];
    _Alignas(64) uint8_t scratch[KERNELS_SCRATCH_BYTES(COLS)];
    uint32_t state = 1;
#define NEXT() (state = state * 1664525u + 1013904223u, state >> 24)
    for (size_t i = 0; i < sizeof codes; i++) {
        codes[i] = (uint8_t)NEXT();
    }
    for (size_t r = 0; r < ROWS; r++) { /* 1, ... in bfloat16 */
        scales[2 * r] = (uint8_t)NEXT();
        scales[2 * r + 1] = 0x3f;
    }
    for (size_t t = 0; t < TOKENS; t++) {
        x[t] = (activation){.q = q[t], .scale = 1.0f / (float)(t + 1)};
        for (size_t c = 0; c < COLS; c++) {
            q[t][c] = (int8_t)((int)(NEXT() % 255) - 127);
            x[t].sum += q[t][c];
        }
    }
#undef NEXT
    for (size_t i = 0; i < sizeof rates / sizeof rates[0]; i++) {
        const packed_matrix w = {rates[i], ROWS, COLS, codes, scales};
        memset(y, 0, sizeof y);
        a->matmul_packed(&w, 0, ROWS, x, TOKENS, y[0], ROWS, scratch);
        b->matmul_packed(&w, 0, ROWS, x, TOKENS, y[1], ROWS, scratch);
        if (memcmp(y[0], y[1], sizeof y[0]) != 0) {
            return false;
        }
    }
    return true;
}

static const char lacks_instructions[] = "this CPU lacks the instructions";

static bool cpu_any(void) {
    return true;
}

#if defined(__x86_64__)
/* The compiler's checks include that the operating system saves the registers. */
static bool cpu_avx2(void) {
    unsigned eax, ebx, ecx = 0, edx;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 &&
           (ecx & bit_F16C) != 0;
}

static bool cpu_avxvnni(void) {
    unsigned eax, ebx, ecx, edx;
    return cpu_avx2() && __builtin_cpu_supports("gfni") &&
           __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & bit_AVXVNNI) != 0;
}

static bool cpu_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}

/* Linux gives tiles to processes that ask: all their threads have them from then on
 * (Documentation/arch/x86/xstate.rst). Other systems are not asked. */
static bool tiles_permitted(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

/* NULL: nothing stands against it. */
static const char *amx_refused(void) {
    enum { AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25, TILE_STATE = 3 << 17 };
    unsigned eax, ebx, ecx, edx, enabled, high;
    if (!cpu_avx512() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 ||
        (edx & AMX_TILE) == 0 || (edx & AMX_INT8) == 0) {
        return lacks_instructions;
    }
    /* A CPU with AVX-512 in use has XGETBV: register 0 is what the system saves. */
    __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    /* These instructions have not yet run where they could be tested (docs/SPEED.md): a CPU on
     * which they give other products does without them. */
    if ((enabled & TILE_STATE) != TILE_STATE || !tiles_permitted()) {
        return "this CPU has the instructions, but the operating system does not give the tiles";
    }
    return kernels_agree(&kernels_amx, &kernels_avx512)
               ? NULL
               : "this CPU's tiles give other products than its AVX-512; please report it";
}

static bool cpu_amx(void) {
    return amx_refused() == NULL;
}
#elif defined(__aarch64__)
#if defined(__linux__)
static bool cpu_dotprod(void) {
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}

static bool cpu_i8mm(void) {
    return cpu_dotprod() && (getauxval(AT_HWCAP) & HWCAP_SHA3) != 0 &&
           (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
}
#else /* what the compiler was told */
static bool cpu_dotprod(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#else
    return false;
#endif
}

static bool cpu_i8mm(void) {
#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8) &&                        \
    defined(__ARM_FEATURE_SHA3)
    return true;
#else
    return false;
#endif
}
#endif
#endif

/* From plain to best. */
static const struct {
    const kernels *table;
    bool (*supported)(void);
} tables[] = {
    {&kernels_ref, cpu_any},
#if defined(__x86_64__)
    {&kernels_avx2, cpu_avx2},     {&kernels_avxvnni, cpu_avxvnni},
    {&kernels_avx512, cpu_avx512}, {&kernels_amx, cpu_amx},
#elif defined(__aarch64__)
    {&kernels_neon, cpu_any},
    {&kernels_neon_dotprod, cpu_dotprod},
    {&kernels_neon_i8mm, cpu_i8mm},
#endif
};

enum { N_TABLES = sizeof tables / sizeof tables[0] };

const kernels *kernels_get(size_t i, bool *supported) {
    if (i >= N_TABLES) {
        return NULL;
    }
    *supported = tables[i].supported();
    return tables[i].table;
}

/* Why this CPU does not run a table. */
static const char *refusal(const kernels *table) {
#if defined(__x86_64__)
    const char *reason = table == &kernels_amx ? amx_refused() : NULL;
    if (reason != NULL) {
        return reason;
    }
#else
    (void)table;
#endif
    return lacks_instructions;
}

hepta_status kernels_select(const kernels **out, hepta_error *err) {
    const char *wanted = getenv("HEPTA_KERNELS");
    char names[256] = "";
    for (size_t i = N_TABLES; i-- > 0;) {
        bool named = wanted != NULL && strcmp(wanted, tables[i].table->name) == 0;
        /* A table that is not asked for is not probed: that may run its instructions. */
        if (named || wanted == NULL || wanted[0] == '\0') {
            if (tables[i].supported()) {
                *out = tables[i].table;
                return HEPTA_OK;
            }
            if (named) {
                return error_set(err, HEPTA_ERROR_UNSUPPORTED, "HEPTA_KERNELS=%s: %s", wanted,
                                 refusal(tables[i].table));
            }
        }
        strcat(strcat(names, " "), tables[i].table->name);
    }
    return error_set(err, HEPTA_ERROR_ARGUMENT,
                     "HEPTA_KERNELS=%.64s: no such kernels in this build; it has:%s", wanted,
                     names);
}

void kernels_tensor_row(const kernels *k, const tensor *t, uint64_t row, float *dst) {
    if (t->groups != NULL) {
        tensor_groups_to_f32(t, row, dst);
        return;
    }
    const uint64_t row_bytes = t->n_bytes / (t->ne[1] * t->ne[2] * t->ne[3]);
    k->row_to_f32(t->type, t->data + row * row_bytes, (uint32_t)t->ne[0], dst);
}

void kernels_matmul_tiled(const kernels *k, const float *w, uint32_t n_rows, uint32_t n_cols,
                          const float *x, size_t x_stride, uint32_t n_tokens, float *y,
                          size_t y_stride) {
    enum { TILE = 65536, LEAST = 8 }; /* floats, vectors */
    uint32_t tile = TILE / (n_cols > 0 ? n_cols : 1) / LEAST * LEAST;
    tile = tile > LEAST ? tile : LEAST;
    for (uint32_t t = 0; t < n_tokens; t += tile) {
        const uint32_t n = n_tokens - t < tile ? n_tokens - t : tile;
        k->matmul_f32(w, n_rows, n_cols, x + t * x_stride, x_stride, n, y + t * y_stride, y_stride);
    }
}
