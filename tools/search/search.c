/*
 * search.c - finds the tables of the window code (src/code/tables.c).
 *
 * A candidate is a linear hash (8 columns of 8 bits for the newer byte of the window), a form for
 * the map from hash to value, and the unit: code units per standard deviation. The search:
 *
 *   1. draws STARTS hashes, fits the values to each (Lloyd iterations: encode Gaussian rows,
 *      move every value to the mean of the weights it stands for, round to integers), and
 *      keeps the best;
 *   2. climbs from it: changes a column, a bit, a pair of columns, a value or the unit, and
 *      keeps the change if it lowers the mean squared error. Candidate and incumbent code the
 *      same chunks of rows, one chunk after another, and a candidate that is clearly worse
 *      is given up early. Every accepted change draws new chunks, so that nothing is fitted
 *      to one sample.
 *
 * Build and use: docs/CODE.md.
 */
#include "code/code.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROWS = 16, WIDTH = 1024, CHUNK = ROWS * WIDTH, POOL = 12, FEATURES = 3, PARAMS = 256 };

/* ---- Random numbers ---------------------------------------------------- */

static uint64_t random_state;

static uint64_t random_next(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static unsigned random_below(unsigned n) {
    return (unsigned)((random_next() >> 32) * n >> 32);
}

static double random_uniform(void) {
    return ((double)(random_next() >> 11) + 0.5) * 0x1p-53;
}

static void random_gauss(float *x, size_t n) { /* n even */
    for (size_t i = 0; i < n; i += 2) {
        const double r = sqrt(-2.0 * log(random_uniform()));
        const double a = 6.283185307179586 * random_uniform();
        x[i] = (float)(r * cos(a));
        x[i + 1] = (float)(r * sin(a));
    }
}

static double quantile(double p) { /* of the normal distribution, by bisection */
    double low = -9.0, high = 9.0;
    for (int i = 0; i < 60; i++) {
        const double mid = (low + high) / 2;
        *(0.5 * erfc(-mid / sqrt(2.0)) < p ? &low : &high) = mid;
    }
    return (low + high) / 2;
}

/* ---- Forms: value[h] = 64 + sign(h) * sum of a few parameters ---------- */

typedef struct form {
    const char *name;
    int params;
    bool sum; /* of several tables */
} form;

static const form forms[] = {
    {"free", 256, false},     /* T[h] */
    {"nibbles", 32, true},    /* A[h >> 4] + B[h & 15] */
    {"overlap3", 48, true},   /* A[h >> 4] + B[h & 15] + C[h >> 2 & 15] */
    {"overlap64", 128, true}, /* A[h >> 2] + B[h & 63] */
    {"mirror", 128, false},   /* T[h ^ 128] = -T[h] */
    {"signed", 24, false},    /* +-(A[h >> 4 & 7] + B[h & 15]) */
    {"xor3", 48, true},       /* A[h >> 4] + B[h & 15] + C[(h >> 4) ^ (h & 15)] */
};
enum { FREE, NIBBLES, OVERLAP3, OVERLAP64, MIRROR, SIGNED, XOR3 };

static int features(int f, int h, int out[FEATURES], int *sign) {
    *sign = 1;
    switch (f) {
    case NIBBLES:
        out[0] = h >> 4, out[1] = 16 + (h & 15);
        return 2;
    case OVERLAP3:
        out[0] = h >> 4, out[1] = 16 + (h & 15), out[2] = 32 + (h >> 2 & 15);
        return 3;
    case OVERLAP64:
        out[0] = h >> 2, out[1] = 64 + (h & 63);
        return 2;
    case MIRROR:
        *sign = h & 128 ? -1 : 1;
        out[0] = h & 127;
        return 1;
    case SIGNED:
        *sign = h & 128 ? -1 : 1;
        out[0] = h >> 4 & 7, out[1] = 8 + (h & 15);
        return 2;
    case XOR3:
        out[0] = h >> 4, out[1] = 16 + (h & 15), out[2] = 32 + ((h >> 4) ^ (h & 15));
        return 3;
    default:
        out[0] = h;
        return 1;
    }
}

/* ---- Candidates -------------------------------------------------------- */

typedef struct candidate {
    struct code_table table;
    int form;
    int param[PARAMS];
} candidate;

/* False if a value left 0..127 and was clamped. */
static bool values_from_params(candidate *c) {
    bool fits = true;
    for (int h = 0; h < 256; h++) {
        int at[FEATURES], sign, sum = 0;
        const int n = features(c->form, h, at, &sign);
        for (int i = 0; i < n; i++) {
            sum += c->param[at[i]];
        }
        const int v = CODE_CENTRE + sign * sum;
        c->table.value[h] = (uint8_t)(v < 0 ? 0 : v > 127 ? 127 : v);
        fits = fits && v >= 0 && v <= 127;
    }
    return fits;
}

/* Least squares of the parameters to weighted targets, by coordinate descent; the last sweeps
 * round each parameter, so that the others make up for its rounding. */
static void fit(candidate *c, const double *target, const double *weight) {
    double param[PARAMS];
    int at[256][FEATURES], sign[256], count = 0;
    for (int h = 0; h < 256; h++) {
        count = features(c->form, h, at[h], &sign[h]);
    }
    const int params = forms[c->form].params;
    for (int i = 0; i < params; i++) {
        param[i] = c->param[i];
    }
    const int smooth = count == 1 ? 1 : 40;
    for (int sweep = 0; sweep < smooth + 6; sweep++) {
        for (int first = 0; first < params;) {
            /* Parameters of one table are independent: do a table at a time. */
            const int feature = count == 1 ? 0 : first == 0 ? 0 : first == at[0][1] ? 1 : 2;
            double num[PARAMS] = {0}, den[PARAMS] = {0};
            int last = first;
            for (int h = 0; h < 256; h++) {
                double rest = (double)sign[h] * target[h];
                for (int i = 0; i < count; i++) {
                    rest -= i == feature ? 0.0 : param[at[h][i]];
                }
                num[at[h][feature]] += weight[h] * rest;
                den[at[h][feature]] += weight[h];
                last = at[h][feature] > last ? at[h][feature] : last;
            }
            for (int i = first; i <= last; i++) {
                if (den[i] > 0.0) {
                    param[i] = num[i] / den[i];
                }
                if (sweep >= smooth) {
                    param[i] = rint(param[i]);
                }
            }
            first = last + 1;
        }
    }
    for (int i = 0; i < params; i++) {
        c->param[i] = (int)rint(param[i]);
    }
    values_from_params(c);
}

/* ---- Evaluation -------------------------------------------------------- */

typedef struct statistics {
    double sum[256], count[256];
} statistics;

/* Mean squared error, in units of the variance, on a chunk of unit Gaussian rows. */
static double evaluate(const candidate *c, const float *gauss, size_t rows, size_t width,
                       statistics *s) {
    static uint8_t out[CHUNK];
    static float x[CHUNK], scale[ROWS];
    const struct code_table *t = &c->table;
    for (size_t i = 0; i < rows * width; i++) {
        x[i] = gauss[i] * t->unit;
    }
    for (size_t r = 0; r < rows; r++) {
        scale[r] = 1.0f;
    }
    const size_t bytes = code_row_bytes(t->half_bits, width);
    if (code_encode_rows(t, x, scale, rows, width, out, bytes, (size_t)t->half_bits, 1, NULL) !=
        HEPTA_OK) {
        abort();
    }
    uint8_t newer[256];
    for (unsigned i = 0; i < 256; i++) {
        newer[i] = code_hash(t, i << 8);
    }
    double total = 0.0;
    for (size_t r = 0; r < rows; r++) {
        unsigned window = 0;
        size_t bit = 0;
        for (size_t k = 0; k < width; k++) {
            const int p = (int)(k & 1);
            for (int i = 0; i < t->width[p]; i++, bit++) {
                const unsigned b = out[r * bytes + bit / 8] >> (bit % 8) & 1;
                window = window >> 1 | b << 15;
            }
            const uint8_t h = (uint8_t)((window & 255) ^ newer[window >> 8]);
            const double y = (double)x[r * width + k];
            const double e = y - (double)(t->value[h] - CODE_CENTRE);
            total += e * e;
            if (s != NULL) {
                s->sum[h] += y;
                s->count[h] += 1.0;
            }
        }
    }
    return total / ((double)(rows * width) * (double)t->unit * (double)t->unit);
}

static void refit(candidate *c, const statistics *s) {
    double target[256], weight[256];
    for (int h = 0; h < 256; h++) {
        /* A prior of one weight at the present value keeps unused hashes where they are. */
        const double now = c->table.value[h] - CODE_CENTRE;
        weight[h] = s->count[h] + 1.0;
        target[h] = (s->sum[h] + now) / weight[h];
    }
    fit(c, target, weight);
}

static double percent(double mse) {
    return 100.0 * sqrt(mse);
}

static int shifts[2]; /* {0, 0}: the columns are searched too */

/* ---- Starts ------------------------------------------------------------ */

/* Random columns; `structured` makes the symbols that enter reach different values of the upper
 * hash bits. With `shifts` the hash of the newer byte n is n ^ (n << a) ^ (n >> b). */
static void draw_columns(candidate *c, bool structured) {
    struct code_table *t = &c->table;
    const int b = t->width[0];
    for (int j = 0; j < 8; j++) {
        const unsigned n = 1u << j;
        t->column[j] =
            (uint8_t)(shifts[0] > 0 ? n ^ n << shifts[0] ^ n >> shifts[1] : random_next());
    }
    for (int j = 0; structured && shifts[0] == 0 && j < b; j++) { /* newest: identity up there */
        t->column[8 - b + j] =
            (uint8_t)((1u << (8 - b + j)) | (random_next() & ((1u << (8 - b)) - 1)));
    }
}

static int compare_ints(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

static int compare_bytes(const void *a, const void *b) {
    return *(const uint8_t *)a - *(const uint8_t *)b;
}

static double mismatch(const candidate *c, const double *target) {
    uint8_t v[256];
    memcpy(v, c->table.value, sizeof v);
    qsort(v, 256, 1, compare_bytes);
    double sum = 0.0;
    for (int i = 0; i < 256; i++) {
        const double d = v[i] - CODE_CENTRE - target[i];
        sum += d * d;
    }
    return sum / 256;
}

/* Random tables whose sums, sorted, come near the targets (annealing). The code is as good as
 * this distribution, whichever hash gets which value. */
static void match_quantiles(candidate *c, const double *target) {
    enum { STEPS = 30000 };
    const unsigned params = (unsigned)forms[c->form].params;
    for (unsigned i = 0; i < params; i++) {
        const double q = quantile(random_uniform()) * 0.7;
        c->param[i] = (int)rint(q * (double)c->table.unit);
    }
    values_from_params(c);
    double now = mismatch(c, target);
    for (int step = 0; step < STEPS; step++) {
        candidate next = *c;
        next.param[random_below(params)] += (int)random_below(7) - 3;
        values_from_params(&next);
        const double then = mismatch(&next, target), heat = 0.1 * (1.0 - (double)step / STEPS);
        if (then < now || random_uniform() < exp((now - then) / (heat + 1e-9))) {
            *c = next;
            now = then;
        }
    }
}

static void draw_values(candidate *c) {
    double target[256], weight[256];
    for (int h = 0; h < 256; h++) {
        const double q = c->form == MIRROR || c->form == SIGNED
                             ? (h & 128 ? -1.0 : 1.0) * quantile(0.5 + ((h & 127) + 0.5) / 256.0)
                             : quantile((h + 0.5) / 256.0);
        /* Fitted tables have longer tails than the quantiles. */
        target[h] = q * (1.0 + 0.0012 * q * q * q * q) * (double)c->table.unit;
        weight[h] = 1.0;
    }
    memset(c->param, 0, sizeof c->param);
    if (!forms[c->form].sum) {
        fit(c, target, weight);
        return;
    }
    match_quantiles(c, target);
}

/* ---- Files ------------------------------------------------------------- */

static void save(const candidate *c, const char *path, double mse) {
    FILE *f = fopen(path, "w");
    if (f == NULL) {
        perror(path);
        exit(1);
    }
    fprintf(f, "rate %d form %d unit %.4f rmse %.4f\n", c->table.half_bits, c->form,
            (double)c->table.unit, percent(mse));
    for (int j = 0; j < 8; j++) {
        fprintf(f, "%d%c", c->table.column[j], j == 7 ? '\n' : ' ');
    }
    for (int i = 0; i < forms[c->form].params; i++) {
        fprintf(f, "%d%c", c->param[i], i % 16 == 15 ? '\n' : ' ');
    }
    fprintf(f, "\n");
    fclose(f);
}

static void set_rate(struct code_table *t, int half_bits) {
    t->half_bits = half_bits;
    t->width[0] = (half_bits + 1) / 2;
    t->width[1] = half_bits / 2;
}

static bool load(candidate *c, const char *path) {
    memset(c, 0, sizeof *c);
    FILE *f = fopen(path, "r");
    int rate, n = 0;
    double unit;
    if (f == NULL || fscanf(f, "rate %d form %d unit %lf rmse %*f", &rate, &c->form, &unit) != 3) {
        return false;
    }
    set_rate(&c->table, rate);
    c->table.unit = (float)unit;
    for (int i = 0; i < 8; i++) {
        int v;
        n += fscanf(f, "%d", &v) == 1;
        c->table.column[i] = (uint8_t)v;
    }
    for (int i = 0; i < forms[c->form].params; i++) {
        n += fscanf(f, "%d", &c->param[i]) == 1;
    }
    fclose(f);
    values_from_params(c);
    return n == 8 + forms[c->form].params;
}

/* ---- Search ------------------------------------------------------------ */

static float pool[POOL][CHUNK];
static double pool_mse[POOL]; /* of the incumbent */
static statistics pool_stats;

static double refill(const candidate *c) {
    memset(&pool_stats, 0, sizeof pool_stats);
    double total = 0.0;
    for (int i = 0; i < POOL; i++) {
        random_gauss(pool[i], CHUNK);
        pool_mse[i] = evaluate(c, pool[i], ROWS, WIDTH, &pool_stats);
        total += pool_mse[i];
    }
    return total / POOL;
}

static void mutate(candidate *c, const candidate *from) {
    *c = *from;
    uint8_t *column = c->table.column;
    const unsigned j = random_below(8), i = (j + 1 + random_below(7)) % 8;
    const unsigned what = shifts[0] > 0 ? 64 + random_below(36) : random_below(100);
    if (what < 34) {
        column[j] ^= (uint8_t)(1u << random_below(8));
    } else if (what < 48) {
        column[j] = (uint8_t)random_next();
    } else if (what < 54) {
        const uint8_t swap = column[j];
        column[j] = column[i];
        column[i] = swap;
    } else if (what < 60) {
        column[j] ^= column[i];
    } else if (what < 64) {
        column[j] ^= (uint8_t)random_next();
        column[i] ^= (uint8_t)(1u << random_below(8));
    } else if (what < 67) {
        c->table.unit *= (float)(1.0 + 0.04 * (random_uniform() - 0.5));
    } else {
        const unsigned params = (unsigned)forms[c->form].params;
        const unsigned a = random_below(params), b = random_below(params);
        if (what < 92) {
            c->param[a] += (int)random_below(7) - 3;
        } else {
            const int swap = c->param[a];
            c->param[a] = c->param[b];
            c->param[b] = swap;
        }
    }
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double multi_start(candidate *best, int rate, int form_id, double unit, int starts,
                          int iterations, double abandon) {
    static float gauss[CHUNK];
    random_gauss(gauss, CHUNK);
    double best_mse = 1e9, sum[2] = {0.0, 0.0};
    for (int s = 0; s < starts; s++) {
        candidate c = {.form = form_id};
        set_rate(&c.table, rate);
        c.table.unit = (float)unit;
        draw_columns(&c, s & 1);
        draw_values(&c);
        if (form_id == NIBBLES && (s & 1) != 0) { /* so that the upper bits mean much */
            qsort(c.param, 16, sizeof c.param[0], compare_ints);
            qsort(c.param + 16, 16, sizeof c.param[0], compare_ints);
            values_from_params(&c);
        }
        double mse = 1e9;
        for (int i = 0; i < iterations; i++) {
            statistics st = {{0}, {0}};
            mse = evaluate(&c, gauss, ROWS, WIDTH, &st);
            if (mse < best_mse) {
                best_mse = mse;
                *best = c;
            }
            if (mse > abandon * best_mse) {
                break;
            }
            refit(&c, &st);
        }
        sum[s & 1] += percent(mse);
    }
    printf("starts %d: mean %.3f random, %.3f structured; best %.3f (in sample)\n", starts,
           sum[0] / (starts / 2), sum[1] / (starts / 2), percent(best_mse));
    return best_mse;
}

static void climb(candidate *best, double limit, const char *path) {
    const double begin = seconds();
    double best_mse = refill(best), next_log = 0.0;
    long tried = 0, accepted = 0;
    while (seconds() - begin < limit) {
        candidate c;
        mutate(&c, best);
        if (random_below(4) == 0) {
            refit(&c, &pool_stats); /* of the incumbent: right for all but the changed column */
        }
        if (!values_from_params(&c)) {
            continue;
        }
        double diff = 0.0;
        statistics st = {{0}, {0}};
        int n = 0;
        bool give_up = false;
        while (n < POOL && !give_up) {
            const double d = evaluate(&c, pool[n], ROWS, WIDTH, &st) / pool_mse[n] - 1.0;
            diff += d;
            n++;
            /* The difference of two tables varies by 0.4 to 0.8 % from chunk to chunk. */
            give_up = diff / n > 0.004 / sqrt(n);
        }
        tried++;
        if (!give_up && diff < -0.001 * POOL) {
            candidate fitted = c;
            refit(&fitted, &st);
            *best = c;
            best_mse = refill(best);
            if (memcmp(fitted.param, c.param, sizeof c.param) != 0 && values_from_params(&fitted)) {
                double total = 0.0; /* fitted values stand if they are better on new chunks */
                for (int k = 0; k < POOL; k++) {
                    total += evaluate(&fitted, pool[k], ROWS, WIDTH, NULL);
                }
                if (total / POOL < best_mse) {
                    *best = fitted;
                    best_mse = refill(best);
                }
            }
            accepted++;
            save(best, path, best_mse);
        }
        if (seconds() - begin > next_log) {
            printf("%6.0f s tried %ld accepted %ld rmse %.3f unit %.2f\n", seconds() - begin, tried,
                   accepted, percent(best_mse), (double)best->table.unit);
            fflush(stdout);
            next_log += 30.0;
        }
    }
    save(best, path, best_mse);
}

/* RMSE on fresh rows of `width` weights. */
static double judge(const candidate *c, size_t width, size_t weights, uint64_t seed) {
    static float gauss[CHUNK];
    random_state = seed;
    double total = 0.0;
    size_t done = 0;
    const size_t rows = CHUNK / width < ROWS ? CHUNK / width : ROWS;
    while (done < weights) {
        random_gauss(gauss, rows * width);
        total += evaluate(c, gauss, rows, width, NULL) * (double)(rows * width);
        done += rows * width;
    }
    return percent(total / (double)done);
}

/* Writes tables.c from five table files, 2 to 4 bits. */
static int emit(char **paths) {
    printf("/*\n * tables.c - the tables of the window code, one per rate (see code.h).\n *\n"
           " * Generated by search emit tools/search/tables/rate*.txt (docs/CODE.md). "
           "docs/QUALITY.md\n"
           " * tells how they were found.\n"
           " */\n#include \"code/code.h\"\n\nstatic const struct code_table tables[] = {\n");
    for (int rate = CODE_MIN_RATE; rate <= CODE_MAX_RATE; rate++) {
        candidate c;
        if (!load(&c, paths[rate - CODE_MIN_RATE]) || c.table.half_bits != rate) {
            fprintf(stderr, "%s: not a table of rate %d\n", paths[rate - CODE_MIN_RATE], rate);
            return 1;
        }
        const struct code_table *t = &c.table;
        printf("    {\n        .half_bits = %d,\n        .width = {%d, %d},\n        .column = {",
               rate, t->width[0], t->width[1]);
        for (int j = 0; j < 8; j++) {
            printf("0x%02x%s", t->column[j], j == 7 ? "},\n" : ", ");
        }
        if (c.form != NIBBLES || !values_from_params(&c)) {
            fprintf(stderr, "%s: not a sum of two nibble tables in 0..127\n",
                    paths[rate - CODE_MIN_RATE]);
            return 1;
        }
        int least = c.param[16]; /* of the low table: becomes 0 */
        for (int i = 17; i < 32; i++) {
            least = c.param[i] < least ? c.param[i] : least;
        }
        for (int i = 0; i < 32; i++) {
            printf("%s%d%s",
                   i == 0    ? "        .high = {"
                   : i == 16 ? "        .low = {"
                             : "",
                   i < 16 ? c.param[i] + CODE_CENTRE + least : c.param[i] - least,
                   i % 16 == 15 ? "},\n" : ", ");
        }
        printf("        .value =\n            {\n");
        for (int h = 0; h < 256; h++) {
            printf("%s%3d,%s", h % 16 == 0 ? "                " : "", t->value[h],
                   h % 16 == 15 ? "\n" : " ");
        }
        printf("            },\n        .unit = %.4ff,\n    },\n", (double)t->unit);
    }
    printf("};\n\nconst struct code_table *code_table_get(int half_bits) {\n"
           "    const bool known = half_bits >= CODE_MIN_RATE && half_bits <= CODE_MAX_RATE;\n"
           "    return known ? &tables[half_bits - CODE_MIN_RATE] : NULL;\n}\n");
    return 0;
}

static int usage(void) {
    fputs("usage: search find RATE FORM SEED SECONDS STARTS UNIT FILE [A B]   RATE in half bits\n"
          "       search forms RATE SEED STARTS UNIT\n"
          "       search climb SEED SECONDS FROM FILE [A B]\n"
          "       search judge SEED WEIGHTS WIDTH FILE...\n"
          "       search emit FILE... > src/code/tables.c\n"
          "forms:",
          stderr);
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        fprintf(stderr, " %zu %s", i, forms[i].name);
    }
    fputs("\n", stderr);
    return 2;
}

int main(int argc, char **argv) {
    candidate c;
    const bool find = argc >= 2 && strcmp(argv[1], "find") == 0;
    const bool climbing = argc >= 2 && strcmp(argv[1], "climb") == 0;
    const int required = find ? 9 : 6;
    if ((find || climbing) && argc == required + 2) {
        shifts[0] = atoi(argv[required]), shifts[1] = atoi(argv[required + 1]);
    }
    if (find && (argc == required || shifts[0] > 0)) {
        const int rate = atoi(argv[2]), form_id = atoi(argv[3]);
        random_state = strtoull(argv[4], NULL, 10);
        printf("find rate %d form %s seed %s\n", rate, forms[form_id].name, argv[4]);
        multi_start(&c, rate, form_id, atof(argv[7]), atoi(argv[6]), 4, 1.15);
        climb(&c, atof(argv[5]), argv[8]);
        return 0;
    }
    if (argc == 6 && strcmp(argv[1], "forms") == 0) {
        const int rate = atoi(argv[2]);
        for (int f = 0; f < (int)(sizeof forms / sizeof forms[0]); f++) {
            random_state = strtoull(argv[3], NULL, 10);
            printf("rate %d form %-10s ", rate, forms[f].name);
            multi_start(&c, rate, f, atof(argv[5]), atoi(argv[4]), 8, 1e9);
        }
        return 0;
    }
    if (climbing && (argc == required || shifts[0] > 0) && load(&c, argv[4])) {
        random_state = strtoull(argv[2], NULL, 10);
        climb(&c, atof(argv[3]), argv[5]);
        return 0;
    }
    if (argc > 5 && strcmp(argv[1], "judge") == 0) {
        const size_t weights = strtoull(argv[3], NULL, 10), width = strtoull(argv[4], NULL, 10);
        if (width == 0 || width % CODE_BLOCK != 0 || width > CHUNK) {
            return usage();
        }
        for (int i = 5; i < argc; i++) {
            if (!load(&c, argv[i])) {
                fprintf(stderr, "%s: not a table\n", argv[i]);
                return 1;
            }
            printf("%s: rate %d form %s unit %.2f: rmse %.3f\n", argv[i], c.table.half_bits,
                   forms[c.form].name, (double)c.table.unit,
                   judge(&c, width, weights, strtoull(argv[2], NULL, 10)));
        }
        return 0;
    }
    if (argc == 7 && strcmp(argv[1], "emit") == 0) {
        return emit(argv + 2);
    }
    return usage();
}
