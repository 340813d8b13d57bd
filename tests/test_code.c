/*
 * test_code.c - the window code: decoder against its definition for every window, encoder
 * against exhaustive search, error on fresh Gaussian data against the promised bars.
 */
#include "test.h"

#include "base/base.h"
#include "code/code.h"

#include <math.h>
#include <stdlib.h>

enum { N_RATES = CODE_MAX_RATE - CODE_MIN_RATE + 1 };

/* $HEPTA_FAST: less of the slow tests, for sanitizers and emulators. */
static bool fast(void) {
    return getenv("HEPTA_FAST") != NULL;
}

/* ---- The definition, bit by bit ---------------------------------------- */

/* Where the bits of weight k end. */
static size_t weight_end(const struct code_table *t, size_t k) {
    return k / 2 * (size_t)t->half_bits + (size_t)(k % 2 == 0 ? t->width[0] : t->half_bits);
}

/* Bit i of a row; zeros stand before it. */
static unsigned row_bit(const struct code_table *t, const uint8_t *bits, size_t stride,
                        ptrdiff_t i) {
    if (i < 0) {
        return 0;
    }
    const size_t per_block = 8 * (size_t)t->half_bits, at = (size_t)i;
    return bits[at / per_block * stride + at % per_block / 8] >> (at % 8) & 1;
}

static uint8_t value_of_window(const struct code_table *t, unsigned window) {
    unsigned hash = 0;
    for (int out = 0; out < 8; out++) {
        unsigned sum = window >> out & 1u;
        for (int j = 0; j < 8; j++) {
            sum += (window >> (8 + j) & 1u) * (t->column[j] >> out & 1u);
        }
        hash += (sum % 2) << out;
    }
    return (uint8_t)(t->high[hash / 16] + t->low[hash % 16]);
}

static uint8_t value_of_weight(const struct code_table *t, const uint8_t *bits, size_t stride,
                               size_t k) {
    unsigned window = 0;
    for (int j = 0; j < 16; j++) {
        window += row_bit(t, bits, stride, (ptrdiff_t)weight_end(t, k) - 16 + j) << j;
    }
    return value_of_window(t, window);
}

TEST(code_tables) {
    CHECK(code_table_get(3) == NULL && code_table_get(9) == NULL && code_table_get(-1) == NULL);
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        CHECK(t != NULL);
        CHECK_EQ_INT(t->half_bits, rate);
        CHECK_EQ_INT(t->width[0], (rate + 1) / 2);
        CHECK_EQ_INT(t->width[1], rate / 2);
        CHECK(t->unit > 10.0f && t->unit < 30.0f);
        for (int h = 0; h < 256; h++) {
            CHECK_EQ_INT(t->value[h], t->high[h / 16] + t->low[h % 16]);
            CHECK(t->value[h] <= 127);
        }
        CHECK_EQ_INT(code_row_bytes(rate, 4096), 4096 * rate / 16);
    }
}

/* At 3 bits and more A n is n ^ (n << a) ^ (n >> b). */
TEST(code_matrix_of_two_shifts) {
    static const int shifts[][3] = {{6, 3, 3}, {7, 2, 2}, {8, 7, 3}};
    for (size_t i = 0; i < sizeof shifts / sizeof shifts[0]; i++) {
        const struct code_table *t = code_table_get(shifts[i][0]);
        for (unsigned n = 0; n < 256; n++) {
            const unsigned an = n ^ n << shifts[i][1] ^ n >> shifts[i][2];
            CHECK_EQ_INT(code_hash(t, n << 8 | 0x35), (an & 255) ^ 0x35);
        }
    }
}

TEST(code_decode_every_window) {
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        uint8_t bits[CODE_MAX_RATE], v[CODE_BLOCK];
        for (size_t k = 14; k < 16; k++) { /* one even, one odd weight */
            const size_t first = weight_end(t, k) - 16;
            for (unsigned window = 0; window < 1u << 16; window++) {
                for (size_t i = 0; i < 8 * (size_t)rate; i++) {
                    const bool inside = i >= first && i < first + 16;
                    const size_t bit = inside ? window >> (i - first) & 1 : (i * 7 + window) & 1;
                    bits[i / 8] = (uint8_t)((i % 8 == 0 ? 0 : bits[i / 8]) | bit << (i % 8));
                }
                code_decode_row(t, bits, (size_t)rate, CODE_BLOCK, v);
                CHECK_EQ_INT(v[k], value_of_window(t, window));
            }
        }
    }
}

/* Whole rows: the start, the seams of blocks, and blocks that do not touch in memory. */
TEST(code_decode_rows) {
    enum { N = 10 * CODE_BLOCK, STRIDE = 32 };
    uint8_t bits[N / CODE_BLOCK * STRIDE], v[N];
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        for (int round = 0; round < 20; round++) {
            for (size_t i = 0; i < sizeof bits; i++) {
                bits[i] = (uint8_t)test_random();
            }
            const size_t stride = round % 2 == 0 ? (size_t)rate : STRIDE;
            code_decode_row(t, bits, stride, N, v);
            for (size_t k = 0; k < N; k++) {
                CHECK_EQ_INT(v[k], value_of_weight(t, bits, stride, k));
            }
        }
    }
}

/*
 * The block worked by hand in docs/CODE.md. Its first weight: the own bits of 4d = 01001101b are
 * the lower four, 1101b; they stand at the top of the window, d000, with zeros of the time before
 * the row below. h = 00 ^ d0 ^ d0 << 2 ^ d0 >> 2 = a4, and v = high[a] + low[4] = 42 + 17 = 59.
 */
TEST(code_worked_example) {
    static const uint8_t bytes[] = {0x4d, 0x2a, 0x91, 0xc6, 0x08, 0x73, 0x5e};
    static const uint8_t want[CODE_BLOCK] = {59, 64, 62, 100, 90, 83, 55, 64,
                                             81, 42, 47, 78,  40, 61, 74, 47};
    uint8_t v[CODE_BLOCK];
    code_decode_row(code_table_get(7), bytes, sizeof bytes, CODE_BLOCK, v);
    CHECK_MEM_EQ(v, want, CODE_BLOCK);
}

/* ---- Exhaustive search ------------------------------------------------- */

/* The encoder's cost of value v at weight x = y * scale: sixteenths of squared 1/64 units, the
 * lowest four bits dropped. */
static int64_t cost_of(float y, int v) {
    const int64_t d = (int64_t)(y * 64.0f + (y < 0.0f ? -0.5f : 0.5f)) + 64 * 64 - 64 * v;
    return (d * d / 16) & ~(int64_t)15;
}

/* The least cost of any code word: every state before a weight, every symbol after it. */
static int64_t search_cost(const struct code_table *t, const float *y, size_t n) {
    static int64_t cost[1 << 16], next[1 << 16];
    static uint8_t value[2][1 << 16];
    for (size_t p = 0; p < 2; p++) {
        for (unsigned w = 0; w < 1u << 16; w++) {
            value[p][w] = value_of_window(t, w);
        }
    }
    const int64_t never = INT64_MAX / 2;
    for (size_t s = 0; s < 1u << 16; s++) {
        cost[s] = s == 0 ? 0 : never;
    }
    for (size_t k = 0; k < n; k++) {
        const int b = t->width[k % 2], d = t->width[1 - k % 2];
        int64_t at[128];
        for (int v = 0; v < 128; v++) {
            at[v] = cost_of(y[k], v);
        }
        for (size_t s = 0; s < 1u << (16 - d); s++) {
            next[s] = never;
        }
        for (unsigned s = 0; s < 1u << (16 - b); s++) {
            for (unsigned a = 0; a < 1u << b; a++) {
                const unsigned w = s | a << (16 - b);
                const int64_t c = cost[s] + at[value[k % 2][w]];
                if (c < next[w >> d]) {
                    next[w >> d] = c;
                }
            }
        }
        memcpy(cost, next, sizeof(int64_t) << (16 - d));
    }
    int64_t best = never;
    for (size_t s = 0; s < 1u << (16 - t->width[n % 2]); s++) {
        best = cost[s] < best ? cost[s] : best;
    }
    return best;
}

static int64_t decoded_cost(const struct code_table *t, const uint8_t *bits, const float *y,
                            size_t n) {
    uint8_t *v = malloc(n);
    int64_t sum = 0;
    CHECK(v != NULL);
    code_decode_row(t, bits, (size_t)t->half_bits, n, v);
    for (size_t k = 0; k < n; k++) {
        sum += cost_of(y[k], v[k]);
    }
    free(v);
    return sum;
}

/* The search used below, against all 2^17 or so words of four or five weights. */
TEST(code_search_is_exhaustive) {
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        const size_t n = rate == 8 ? 4 : rate == 4 ? 8 : 5, end = weight_end(t, n - 1);
        float y[8];
        for (size_t k = 0; k < n; k++) {
            y[k] = test_random_gauss() * t->unit;
        }
        int64_t best = INT64_MAX;
        for (unsigned word = 0; word < 1u << end; word++) {
            int64_t sum = 0;
            for (size_t k = 0; k < n; k++) {
                const unsigned known = word & ((1u << weight_end(t, k)) - 1);
                const uint64_t padded = (uint64_t)known << 16; /* zero bits before the row */
                const unsigned window = (unsigned)(padded >> weight_end(t, k)) & 0xffffu;
                sum += cost_of(y[k], value_of_window(t, window));
            }
            best = sum < best ? sum : best;
        }
        CHECK_EQ_INT(search_cost(t, y, n), best);
    }
}

/* Within the ring the encoder is exact: no word of the row costs less than its own. */
TEST(code_encode_is_optimal) {
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        static const size_t lengths[] = {16, 32, 48, 80, 160, 448};
        float x[448], y[448];
        uint8_t bits[448 / CODE_BLOCK * CODE_MAX_RATE];
        for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
            const size_t n = lengths[i];
            const float scale = 0.0371f;
            for (size_t k = 0; k < n; k++) {
                x[k] = test_random_gauss() * t->unit * scale * (i == 1 ? 5.0f : 1.0f);
                y[k] = x[k] * (1.0f / scale);
            }
            hepta_error err;
            CHECK_OK(code_encode_rows(t, x, &scale, 1, n, bits, code_row_bytes(rate, n),
                                      (size_t)rate, 1, &err));
            CHECK_EQ_INT(decoded_cost(t, bits, y, n), search_cost(t, y, n));
        }
    }
}

/* Beyond it, decisions are taken 192 weights late: what that costs. */
TEST(code_encode_long_rows) {
    enum { N = 3072 };
    const size_t n = fast() ? 1024 : N;
    static float x[N];
    static uint8_t bits[N / CODE_BLOCK * CODE_MAX_RATE];
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        const float scale = 1.0f;
        for (size_t k = 0; k < n; k++) {
            x[k] = test_random_gauss() * t->unit;
        }
        hepta_error err;
        CHECK_OK(code_encode_rows(t, x, &scale, 1, n, bits, code_row_bytes(rate, n), (size_t)rate,
                                  1, &err));
        const double cost = (double)decoded_cost(t, bits, x, n);
        const double best = (double)search_cost(t, x, n);
        test_note("%.1f bits: squared error %.4f %% above the full search", rate / 2.0,
                  100.0 * (cost / best - 1.0));
        CHECK(cost >= best && cost < 1.002 * best);
    }
}

/* ---- Shapes, threads, instruction sets --------------------------------- */

/* Every width 1..608, filled up with zeros to whole blocks: row r of a call has width n - r. */
TEST(code_encode_every_width) {
    enum { N = 608, STRIDE = 40, GUARD = 0xa5 };
    static float x[CODE_BLOCK * N];
    static uint8_t out[CODE_BLOCK * (N / CODE_BLOCK) * STRIDE], alone[N / CODE_BLOCK * STRIDE];
    uint8_t v[N];
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        for (size_t n = CODE_BLOCK; n <= N; n += fast() ? 9 * CODE_BLOCK : CODE_BLOCK) {
            float scale[CODE_BLOCK];
            for (size_t r = 0; r < CODE_BLOCK; r++) {
                scale[r] = 0.01f * (float)(r + 1);
                for (size_t k = 0; k < n; k++) {
                    x[r * n + k] = k + r < n ? test_random_gauss() * t->unit * scale[r] : 0.0f;
                }
            }
            const size_t row_stride = n / CODE_BLOCK * STRIDE;
            hepta_error err;
            memset(out, GUARD, sizeof out);
            CHECK_OK(
                code_encode_rows(t, x, scale, CODE_BLOCK, n, out, row_stride, STRIDE, 1, &err));
            for (size_t i = 0; i < sizeof out; i++) {
                const bool written = i < CODE_BLOCK * row_stride && i % STRIDE < (size_t)rate;
                CHECK(written || out[i] == GUARD);
            }
            double error = 0.0, power = 0.0;
            for (size_t r = 0; r < CODE_BLOCK; r++) {
                code_decode_row(t, out + r * row_stride, STRIDE, n, v);
                for (size_t k = 0; k < n; k++) {
                    const double y = (double)(x[r * n + k] / scale[r]), e = y - (v[k] - 64);
                    error += e * e;
                    power += y * y;
                }
            }
            /* The start of a row is coarse: 6 weights' worth of slack. */
            CHECK(error < power * (pow(2.0, -rate) * 1.6 + 0.3 * 6.0 / (double)n));
            if (n % 192 == 0) { /* a row's code depends on that row alone */
                CHECK_OK(code_encode_rows(t, x + 5 * n, scale + 5, 1, n, alone, row_stride, STRIDE,
                                          1, &err));
                for (size_t i = 0; i < row_stride; i++) {
                    CHECK(i % STRIDE >= (size_t)rate || alone[i] == out[5 * row_stride + i]);
                }
            }
        }
    }
}

TEST(code_encode_same_bytes) {
    enum { ROWS = 19, N = 464 }; /* more than the encoder's ring */
    static float x[ROWS * N], scale[ROWS];
    static uint8_t want[ROWS * N], got[ROWS * N];
    for (size_t i = 0; i < ROWS * N; i++) {
        x[i] = test_random_gauss();
    }
    for (size_t r = 0; r < ROWS; r++) {
        scale[r] = 1.0f / (16.0f + (float)r / 8.0f);
    }
    memset(x + 3 * N, 0, N * sizeof x[0]); /* ties everywhere */
    for (size_t k = 0; k < N; k++) {
        x[4 * N + k] = 0.5f;
    }
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        const size_t bytes = code_row_bytes(rate, N);
        hepta_error err;
        CHECK(code_encode_force("generic"));
        CHECK_OK(code_encode_rows(t, x, scale, ROWS, N, want, bytes, (size_t)rate, 2, &err));
        const char *name;
        for (int i = 0; (name = code_encode_variant(i)) != NULL; i++) {
            if (strcmp(name, "generic") == 0) {
                continue;
            }
            CHECK(code_encode_force(name));
            for (int threads = 1; threads <= 4; threads += fast() ? 3 : 1) {
                memset(got, 0, sizeof got);
                CHECK_OK(code_encode_rows(t, x, scale, ROWS, N, got, bytes, (size_t)rate, threads,
                                          &err));
                CHECK_MEM_EQ(got, want, ROWS * bytes);
            }
        }
        CHECK(code_encode_force(NULL));
    }
    CHECK(!code_encode_force("abacus"));
}

TEST(code_encode_extremes) {
    enum { N = 464, ROWS = 12 };
    static float x[ROWS * N];
    static uint8_t out[ROWS * N];
    uint8_t v[ROWS][N];
    float scale[ROWS];
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        int least = 127, most = 0;
        for (int h = 0; h < 256; h++) {
            least = t->value[h] < least ? t->value[h] : least;
            most = t->value[h] > most ? t->value[h] : most;
        }
        for (size_t r = 0; r < ROWS; r++) {
            scale[r] = 1.0f;
            for (size_t k = 0; k < N; k++) {
                const float sign = k % 3 == 0 ? -1.0f : 1.0f;
                const float kinds[ROWS] = {0.0f,
                                           0.0f,
                                           1e30f,
                                           -1e30f,
                                           sign * INFINITY,
                                           NAN,
                                           k == 200 ? 60.0f : 0.0f,
                                           1e-40f,
                                           sign * 1e38f,
                                           3.0f,
                                           3.0f,
                                           3.0f};
                x[r * N + k] = kinds[r];
            }
        }
        scale[0] = 0.0f;
        scale[7] = 1e-40f;
        scale[9] = INFINITY;
        scale[10] = NAN;
        scale[11] = -1.0f;
        hepta_error err;
        const size_t bytes = code_row_bytes(rate, N);
        CHECK_OK(code_encode_rows(t, x, scale, ROWS, N, out, bytes, (size_t)rate, 1, &err));
        for (size_t r = 0; r < ROWS; r++) {
            code_decode_row(t, out + r * bytes, (size_t)rate, N, v[r]);
        }
        /* No usable scale: as zeros. */
        CHECK_MEM_EQ(out, out + bytes, bytes);
        CHECK_MEM_EQ(out, out + 9 * bytes, bytes);
        CHECK_MEM_EQ(out, out + 10 * bytes, bytes);
        CHECK_MEM_EQ(out, out + 11 * bytes, bytes);
        double high = 0.0, low = 0.0, nan = 0.0, zero = 0.0, hot = 0.0;
        for (size_t k = 0; k < N; k++) {
            high += v[2][k] - 64;
            low += v[3][k] - 64;
            nan += v[5][k] - 64;
            zero += fabs(v[0][k] - 64.0);
            hot += fabs(v[6][k] - 64.0);
        }
        /* Far beyond the range, the code does what it can: mostly the outer values. */
        CHECK(high / N > 0.3 * (most - 64) && low / N < 0.3 * (least - 64));
        CHECK(nan == low);
        CHECK(zero / N < (double)t->unit * pow(2.0, -rate / 2.0));
        CHECK(v[6][200] > 64 + 0.5 * (most - 64));
        CHECK(hot < zero + 12.0 * (double)t->unit);
    }
}

TEST(code_encode_errors) {
    const struct code_table *t = code_table_get(7);
    static float x[64 * 32], scale[64];
    uint8_t out[64 * 14], before[64 * 14];
    hepta_error err = {0};
    memset(out, 0x5a, sizeof out);
    memcpy(before, out, sizeof out);
    CHECK_EQ_INT(code_encode_rows(t, x, scale, 64, 31, out, 14, 7, 1, &err), HEPTA_ERROR_ARGUMENT);
    CHECK(err.message[0] != '\0');
    for (int threads = 1; threads <= 2; threads++) {
        memory_fail_after(1);
        CHECK_EQ_INT(code_encode_rows(t, x, scale, 64, 32, out, 14, 7, threads, &err),
                     HEPTA_ERROR_MEMORY);
        memory_fail_after(0);
        CHECK_MEM_EQ(out, before, sizeof out);
    }
    CHECK_OK(code_encode_rows(t, x, scale, 0, 32, out, 14, 7, 1, &err));
    CHECK_OK(code_encode_rows(t, x, scale, 64, 0, out, 0, 7, 1, &err));
    CHECK_MEM_EQ(out, before, sizeof out);
}

/* ---- Quality ----------------------------------------------------------- */

TEST(code_error_bars) {
    enum { ROWS = 16, N = 4096 };
    const size_t n = fast() ? 1024 : N; /* the promise is tested on the full length */
    const double slack = fast() ? 1.03 : 1.0;
    static const double bars[N_RATES] = {27.5, 19.6, 13.8, 9.75, 7.0}; /* % of sigma */
    static float x[ROWS * N], scale[ROWS];
    static uint8_t out[ROWS * N], v[N];
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        const struct code_table *t = code_table_get(rate);
        const size_t bytes = code_row_bytes(rate, n);
        for (size_t i = 0; i < ROWS * n; i++) {
            x[i] = test_random_gauss();
        }
        for (size_t r = 0; r < ROWS; r++) {
            scale[r] = 1.0f / t->unit;
        }
        hepta_error err;
        CHECK_OK(code_encode_rows(t, x, scale, ROWS, n, out, bytes, (size_t)rate, 2, &err));
        double sum = 0.0;
        for (size_t r = 0; r < ROWS; r++) {
            code_decode_row(t, out + r * bytes, (size_t)rate, n, v);
            for (size_t k = 0; k < n; k++) {
                const double e = (double)x[r * n + k] - (v[k] - 64) / (double)t->unit;
                sum += e * e;
            }
        }
        const double percent = 100.0 * sqrt(sum / (double)(ROWS * n));
        test_note("%.1f bits: RMSE %.2f %% of sigma, bar %.2f %%, bound %.2f %%", rate / 2.0,
                  percent, bars[rate - CODE_MIN_RATE], 100.0 * pow(2.0, -rate / 2.0));
        CHECK(percent <= slack * bars[rate - CODE_MIN_RATE]);
    }
}
