/*
 * test_team.c - loops shared by threads: every item once, everything visible after a loop.
 */
#include "test.h"

#include "model/team.h"

#include <fenv.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_ITEMS = 301 };

typedef struct work {
    unsigned char taken[MAX_ITEMS]; /* plain memory on purpose */
    unsigned values[MAX_ITEMS];
    atomic_int threads; /* bit t: thread t took an item */
    atomic_int modes;   /* bit m: rounding mode m was seen */
} work;

static void take(void *context, size_t item, int thread) {
    work *w = context;
    w->taken[item]++;
    w->values[item] = w->values[item] * 3 + (unsigned)item; /* what the loop before wrote */
    atomic_fetch_or(&w->threads, 1 << thread);
    atomic_fetch_or(&w->modes, fegetround() == FE_TONEAREST ? 1 : 2);
}

TEST(team_loops) {
    hepta_error err;
    work *w = calloc(1, sizeof *w);
    CHECK(w != NULL);
    for (int threads = 1; threads <= 5; threads++) {
        team *t = NULL;
        CHECK_OK(team_create(threads, &t, &err));
        CHECK_EQ_INT(team_size(t), threads);
        memset(w, 0, sizeof *w);
        unsigned expected[MAX_ITEMS] = {0};
        for (int loop = 0; loop < 3000; loop++) {
            size_t n = (size_t)loop % (MAX_ITEMS + 1);
            team_each(t, n, take, w);
            for (size_t i = 0; i < n; i++) {
                expected[i] = expected[i] * 3 + (unsigned)i;
                CHECK_EQ_INT(w->taken[i], 1);
                CHECK(w->values[i] == expected[i]);
                w->taken[i] = 0;
            }
        }
        CHECK((atomic_load(&w->threads) & ~((1 << threads) - 1)) == 0);
        CHECK_EQ_INT(atomic_load(&w->modes), 1);
        team_free(t);
    }
    free(w);
}

/* Threads that slept for a while take part again. */
TEST(team_wakes) {
    hepta_error err;
    team *t = NULL;
    work *w = calloc(1, sizeof *w);
    CHECK(w != NULL);
    CHECK_OK(team_create(3, &t, &err));
    for (int loop = 0; loop < 100; loop++) {
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
        memset(w, 0, sizeof *w);
        team_each(t, MAX_ITEMS, take, w);
        for (size_t i = 0; i < MAX_ITEMS; i++) {
            CHECK_EQ_INT(w->taken[i], 1);
        }
    }
    team_free(t);
    free(w);
}

TEST(team_without_work) {
    hepta_error err;
    for (int n = 1; n <= 8; n++) {
        team *t = NULL;
        CHECK_OK(team_create(n, &t, &err));
        team_each(t, 0, take, NULL);
        team_free(t);
    }
    team_free(NULL);
    for (uint64_t k = 1; k <= 2; k++) {
        team *t = NULL;
        memory_fail_after(k);
        CHECK_EQ_INT(team_create(3, &t, &err), HEPTA_ERROR_MEMORY);
        memory_fail_after(0);
        CHECK(t == NULL);
    }
}
