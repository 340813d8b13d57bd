/*
 * test_sampler.c - the sampler: greedy ties, filters, frequencies, the same draws everywhere.
 */
#include "test.h"

#include "base/base.h"

#include <math.h>
#include <stdlib.h>

static hepta_sampler *new_sampler(hepta_sampler_options o, uint32_t n_vocab) {
    hepta_error err;
    hepta_sampler *s = NULL;
    CHECK_OK(hepta_sampler_create(&o, n_vocab, &s, &err));
    return s;
}

static int32_t draw_once(hepta_sampler_options o, const float *logits, uint32_t n) {
    hepta_sampler *s = new_sampler(o, n);
    int32_t token = hepta_sampler_draw(s, logits);
    hepta_sampler_free(s);
    return token;
}

TEST(sampler_greedy) {
    const hepta_sampler_options greedy = {.temperature = 0.0f, .top_p = 1.0f};
    CHECK_EQ_INT(draw_once(greedy, (float[]){1, 3, 2, 3}, 4), 1); /* tie: the lowest id */
    CHECK_EQ_INT(draw_once(greedy, (float[]){NAN, -5, -4}, 3), 2);
    CHECK_EQ_INT(draw_once(greedy, (float[]){NAN, -INFINITY, NAN}, 3), 0);
    CHECK_EQ_INT(draw_once(greedy, (float[]){1, INFINITY, INFINITY}, 3), 1);
    CHECK_EQ_INT(draw_once(greedy, (float[]){-0.0f, 0.0f}, 2), 0);
    const hepta_sampler_options top_1 = {.temperature = 5.0f, .top_k = 1, .top_p = 1.0f};
    CHECK_EQ_INT(draw_once(top_1, (float[]){1, 3, 2, 3}, 4), 1);
    const hepta_sampler_options top_p_0 = {.temperature = 5.0f, .top_p = 0.0f};
    CHECK_EQ_INT(draw_once(top_p_0, (float[]){1, 3, 2, 3}, 4), 1);
    const hepta_sampler_options min_p_1 = {.temperature = 1.0f, .top_p = 1.0f, .min_p = 1.0f};
    CHECK_EQ_INT(draw_once(min_p_1, (float[]){1, 2, 4, 3}, 4), 2);
    const hepta_sampler_options cold = {.temperature = 1e-38f, .top_p = 1.0f};
    CHECK_EQ_INT(draw_once(cold, (float[]){1, 2, 4, 3.999f}, 4), 2);
}

/* Numbers that are not finite never win, and never stop a draw. */
TEST(sampler_odd_logits) {
    for (int filters = 0; filters < 4; filters++) {
        hepta_sampler_options o = {.temperature = 1.0f, .top_p = 1.0f, .seed = 3};
        o.top_k = filters & 1 ? 3 : 0;
        o.top_p = filters & 2 ? 0.9f : 1.0f;
        hepta_sampler *s = new_sampler(o, 4);
        for (int i = 0; i < 100; i++) {
            CHECK_EQ_INT(hepta_sampler_draw(s, (float[]){NAN, 1.0f, -INFINITY, NAN}), 1);
            CHECK_EQ_INT(hepta_sampler_draw(s, (float[]){NAN, NAN, NAN, NAN}), 0);
            CHECK_EQ_INT(hepta_sampler_draw(s, (float[]){5, 1e30f, INFINITY, NAN}), 2);
            int32_t token = hepta_sampler_draw(s, (float[]){INFINITY, 1.0f, INFINITY, NAN});
            CHECK(token == 0 || token == 2);
            token = hepta_sampler_draw(s, (float[]){-3e38f, -3e38f, -3e38f, -INFINITY});
            CHECK(token >= 0 && token <= 2);
        }
        hepta_sampler_free(s);
    }
}

/* Frequencies follow softmax(logits / T) restricted to the kept tokens. */
static void check_frequencies(hepta_sampler_options o, const bool kept[8]) {
    enum { N = 200000 };
    static const float logits[8] = {0.5f, 2.0f, -1.0f, 2.0f, 1.0f, 0.0f, -3.0f, 1.5f};
    double p[8], sum = 0.0;
    int count[8] = {0};
    for (int i = 0; i < 8; i++) {
        p[i] = kept[i] ? exp((double)logits[i] / (double)o.temperature) : 0.0;
        sum += p[i];
    }
    hepta_sampler *s = new_sampler(o, 8);
    uint64_t allocations = memory_count();
    for (int i = 0; i < N; i++) {
        count[hepta_sampler_draw(s, logits)]++;
    }
    CHECK_EQ_INT(memory_count(), allocations);
    for (int i = 0; i < 8; i++) {
        double expected = N * p[i] / sum;
        if (fabs(count[i] - expected) > 5.0 * sqrt(expected)) {
            test_fail(__FILE__, __LINE__, "token %d drawn %d times, expected %.0f", i, count[i],
                      expected);
        }
    }
    hepta_sampler_free(s);
}

TEST(sampler_frequencies) {
    /* probabilities at T = 1, in order: 1 and 3: .310 each, 7: .188, 4: .114, 0: .069, ... */
    const hepta_sampler_options plain = {.temperature = 1.0f, .top_p = 1.0f, .seed = 1};
    hepta_sampler_options o = plain;
    check_frequencies(o, (bool[]){1, 1, 1, 1, 1, 1, 1, 1});
    o.temperature = 0.5f;
    check_frequencies(o, (bool[]){1, 1, 1, 1, 1, 1, 1, 1});
    o = plain, o.top_k = 2;
    check_frequencies(o, (bool[]){0, 1, 0, 1, 0, 0, 0, 0});
    o.top_k = 3;
    check_frequencies(o, (bool[]){0, 1, 0, 1, 0, 0, 0, 1});
    o = plain, o.top_p = 0.7f;
    check_frequencies(o, (bool[]){0, 1, 0, 1, 0, 0, 0, 1});
    o.top_p = 0.29f;
    check_frequencies(o, (bool[]){0, 1, 0, 0, 0, 0, 0, 0});
    o.top_k = 3, o.top_p = 0.7f; /* .31 + .31 of the .808 that three tokens have */
    check_frequencies(o, (bool[]){0, 1, 0, 1, 0, 0, 0, 0});
    o = plain, o.min_p = 0.3f; /* of .310 */
    check_frequencies(o, (bool[]){0, 1, 0, 1, 1, 0, 0, 1});
    o.top_k = 8, o.top_p = 0.9999f;
    check_frequencies(o, (bool[]){0, 1, 0, 1, 1, 0, 0, 1});
}

TEST(sampler_large_vocabulary) {
    enum { N = 5000 };
    static float logits[N];
    for (int i = 0; i < N; i++) {
        logits[i] = test_random_gauss() * 2.0f;
    }
    /* top_k: only the k highest are ever drawn */
    hepta_sampler *s = new_sampler(
        (hepta_sampler_options){.temperature = 2.0f, .top_k = 40, .top_p = 1.0f, .seed = 9}, N);
    for (int i = 0; i < 2000; i++) {
        int32_t token = hepta_sampler_draw(s, logits);
        int above = 0;
        for (int j = 0; j < N; j++) {
            above += logits[j] > logits[token];
        }
        CHECK(above < 40);
    }
    hepta_sampler_free(s);
}

/* The drawn ids themselves are part of the contract: they never change. */
TEST(sampler_golden_sequence) {
    static const int32_t expected[16] = {3,  6,  20, 4,  26, 31, 31, 12,
                                         31, 28, 20, 25, 1,  25, 31, 23};
    float logits[32];
    for (int i = 0; i < 32; i++) {
        logits[i] = (float)((i * 7) % 11) * 0.25f;
    }
    hepta_sampler_options o = {.temperature = 0.8f, .top_k = 20, .top_p = 0.9f, .seed = 42};
    hepta_sampler *s = new_sampler(o, 32), *again = new_sampler(o, 32);
    for (int i = 0; i < 16; i++) {
        int32_t token = hepta_sampler_draw(s, logits);
        CHECK_EQ_INT(token, hepta_sampler_draw(again, logits));
        CHECK_EQ_INT(token, expected[i]);
    }
    hepta_sampler_free(s);
    hepta_sampler_free(again);
}

TEST(sampler_arguments) {
    static const hepta_sampler_options bad[] = {{.temperature = -1.0f, .top_p = 1.0f},
                                                {.temperature = NAN, .top_p = 1.0f},
                                                {.temperature = INFINITY},
                                                {.temperature = 1.0f, .top_p = 1.5f},
                                                {.temperature = 1.0f, .top_p = NAN},
                                                {.temperature = 1.0f, .min_p = -0.5f}};
    hepta_error err;
    hepta_sampler *s = NULL;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQ_INT(hepta_sampler_create(&bad[i], 8, &s, &err), HEPTA_ERROR_ARGUMENT);
    }
    CHECK_EQ_INT(hepta_sampler_create(NULL, 8, &s, &err), HEPTA_ERROR_ARGUMENT);
    const hepta_sampler_options good = {.temperature = 1.0f, .top_p = 1.0f};
    CHECK_EQ_INT(hepta_sampler_create(&good, 0, &s, &err), HEPTA_ERROR_ARGUMENT);
    for (uint64_t k = 1; k <= 4; k++) {
        memory_fail_after(k);
        CHECK_EQ_INT(hepta_sampler_create(&good, 8, &s, &err), HEPTA_ERROR_MEMORY);
    }
    memory_fail_after(0);
    CHECK(s == NULL);
    hepta_sampler_free(NULL);
}
