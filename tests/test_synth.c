/*
 * test_synth.c - hepta synth: every type is a file that opens and, where Hepta computes with it,
 * gives sane logits; the same seed gives the same bytes; failures leave nothing.
 */
#include "command.h"
#include "hepta.h"

#include <math.h>

static const char small[] = "vocab=300,width=256,layers=2,heads=4,kv_heads=2,ff=512,context=64";

/* Logits of a model of random weights: finite, neither all alike nor huge. */
static void check_logits(const char *path) {
    hepta_error err;
    hepta_model *m;
    hepta_session *s;
    hepta_model_info info;
    static float logits[300];
    static const int32_t tokens[] = {1, 17, 299, 4};
    CHECK_OK(hepta_model_open(path, &m, &err));
    hepta_model_get_info(m, &info);
    CHECK_EQ_INT(info.n_vocab, 300);
    CHECK_EQ_INT(info.n_layer, 2);
    CHECK_OK(hepta_session_create(m, NULL, &s, &err));
    CHECK_OK(hepta_session_eval(s, tokens, 4, logits, false, &err));
    double sum = 0, squares = 0;
    for (int i = 0; i < 300; i++) {
        CHECK(isfinite(logits[i]));
        sum += (double)logits[i];
        squares += (double)logits[i] * (double)logits[i];
    }
    double deviation = sqrt(squares / 300 - sum / 300 * (sum / 300));
    CHECK(deviation > 0.5 && deviation < 2); /* weights of deviation 1 / sqrt(columns) */
    hepta_session_free(s);
    hepta_model_close(m);
}

TEST(synth_types_open_and_run) {
    char path[600];
    snprintf(path, sizeof path, "%s/m", test_tmp_dir());
    static const struct {
        const char *type;
        bool runs;
    } types[] = {{"hepta", true},   {"f32", true},    {"f16", true},     {"bf16", true},
                 {"q8_0", true},    {"q4_0", false},  {"q2_k", false},   {"q3_k", false},
                 {"q4_k", false},   {"q5_k", false},  {"q6_k", false},   {"iq4_nl", false},
                 {"iq4_xs", false}, {"iq3_s", false}, {"iq3_xxs", false}};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        CHECK_RUN(0, "hepta synth --shape %s --type %s -o %s", small, types[i].type, path);
        CHECK_RUN(0, "hepta verify -q %s", path);
        CHECK_RUN(0, "hepta tokenize %s -p 'any text'", path);
        if (types[i].runs) {
            check_logits(path);
        }
    }
    static const char *const bits[] = {"2", "2.5", "3", "4", "8"};
    for (size_t i = 0; i < sizeof bits / sizeof bits[0]; i++) {
        CHECK_RUN(0, "hepta synth --shape %s -b %s -q -o %s", small, bits[i], path);
        check_logits(path);
    }
    CHECK_RUN(0, "hepta synth --shape %s,tied=1 -b 4 -q -o %s", small, path);
    check_logits(path);
    CHECK_RUN(0, "hepta run %s -p Hello -n 3", path);
}

/* Widths that are no multiple of anything work where the type allows them. */
TEST(synth_odd_shapes) {
    char path[600];
    snprintf(path, sizeof path, "%s/m", test_tmp_dir());
    static const char odd[] = "vocab=261,width=66,layers=1,heads=3,kv_heads=1,ff=101,context=9";
    CHECK_RUN(0, "hepta synth --shape %s -b 4 -q -o %s && hepta verify -q %s", odd, path, path);
    CHECK_RUN(0, "hepta run %s -p a -n 3", path);
    CHECK_RUN(1, "hepta synth --shape %s --type q4_0 -q -o %s", odd, path);
    CHECK_SAYS("no whole number of blocks of Q4_0");
}

TEST(synth_is_a_function_of_its_seed) {
    const char *dir = test_tmp_dir();
    static const char *const types[] = {"hepta", "q8_0", "q4_k"};
    for (size_t i = 0; i < 3; i++) {
        CHECK_RUN(0,
                  "cd_to=%s; for s in 7 7 8; do n=$((n + 1)); "
                  "hepta synth --shape %s --type %s --seed $s -q -o $cd_to/$n || exit 1; done; "
                  "cmp $cd_to/1 $cd_to/2 && ! cmp -s $cd_to/1 $cd_to/3",
                  dir, small, types[i]);
    }
}

TEST(synth_refuses) {
    const char *dir = test_tmp_dir();
    CHECK_RUN(0, "hepta synth list");
    CHECK_SAYS("llama-2-7b");
    CHECK_RUN(2, "hepta synth");
    CHECK_RUN(2, "hepta synth llama-2-7b");
    CHECK_SAYS("-o FILE");
    CHECK_RUN(2, "hepta synth llama-9-1b -o %s/x", dir);
    CHECK_SAYS("no shape llama-9-1b; there are: tinyllama-1.1b");
    CHECK_RUN(2, "hepta synth llama-2-7b --type q9 -o %s/x", dir);
    CHECK_SAYS("q4_0");
    CHECK_RUN(1, "hepta synth --shape %s -b 9 -o %s/x", small, dir);
    CHECK_SAYS("2 to 8");
    static const char *const bad[] = {"width=64",      "%s,heads=7",
                                      "%s,heads=256",  "%s,vocab=10",
                                      "%s,colour=3",   "%s,layers=",
                                      "%s,layers=x",   "%s,layers=-1",
                                      "%s,kv_heads=3", "%s,layers=99999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char shape[256];
        if (strncmp(bad[i], "%s", 2) == 0) {
            snprintf(shape, sizeof shape, "%s%s", small, bad[i] + 2);
        } else {
            snprintf(shape, sizeof shape, "%s", bad[i]);
        }
        CHECK_RUN(2, "hepta synth --shape %s -o %s/x", shape, dir);
        CHECK_SAYS("--shape");
    }
    CHECK_RUN(1, "hepta synth --shape %s -o %s/absent/x", small, dir);
    CHECK_RUN(1, "hepta synth --shape %s -o %s", small, dir);
    CHECK_RUN(1, "hepta synth llama-3-405b --shape layers=4096 --type f32 -o %s/x", dir);
    CHECK_SAYS("has room for");
    CHECK_RUN(0, "trap '' XFSZ; ulimit -f 64; hepta synth --shape %s -q -o %s/x; test $? = 1",
              small, dir);
    CHECK_SAYS("cannot write at byte");
    CHECK_RUN(0, "ls %s", dir);
    CHECK_EQ_STR(output, "");
}

/* Ctrl-C: exit code 130, no file. */
TEST(synth_interrupt_leaves_nothing) {
    const char *dir = test_tmp_dir();
    CHECK_RUN(130,
              "${HEPTA_BUILD:-build}/hepta synth tinyllama-1.1b --type q8_0 -q -o %s/x & pid=$!; "
              "while ! ls %s | grep -q tmp; do sleep 0.01; done; kill -TERM $pid; wait $pid",
              dir, dir);
    CHECK_RUN(0, "ls %s", dir);
    CHECK_EQ_STR(output, "");
}
