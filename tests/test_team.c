/*
 * test_team.c - shared loops and barriers: every item once, everything visible after a barrier.
 */
#include "test.h"

#include "model/team.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { N_ITEMS = 301, N_PHASES = 200 };

typedef struct work {
    team *team;
    int n;
    unsigned char taken[2][N_ITEMS]; /* by the loop at hand; plain memory on purpose */
    unsigned sums[N_PHASES];
    atomic_int seen;
} work;

static void count_items(void *context, int thread) {
    work *w = context;
    for (int phase = 0; phase < N_PHASES; phase++) {
        for (int slot = 0; slot < 2; slot++) {
            for (size_t i; team_next(w->team, slot, N_ITEMS, &i);) {
                w->taken[slot][i]++;
            }
        }
        team_barrier(w->team);
        for (size_t i; team_next(w->team, 3, 1, &i);) { /* one thread adds up what all did */
            for (int j = 0; j < N_ITEMS; j++) {
                w->sums[phase] += (unsigned)w->taken[0][j] * 1000 + w->taken[1][j];
                w->taken[0][j] = w->taken[1][j] = 0;
            }
        }
        team_barrier(w->team);
    }
    atomic_fetch_add(&w->seen, 1 << (4 * thread));
}

TEST(team_loops) {
    hepta_error err;
    work *w = calloc(1, sizeof *w);
    CHECK(w != NULL);
    for (w->n = 1; w->n <= 5; w->n++) {
        CHECK_OK(team_create(w->n, &w->team, &err));
        CHECK_EQ_INT(team_size(w->team), w->n);
        for (int call = 0; call < 3; call++) {
            memset(w->sums, 0, sizeof w->sums);
            atomic_store(&w->seen, 0);
            team_run(w->team, count_items, w);
            for (int phase = 0; phase < N_PHASES; phase++) {
                CHECK_EQ_INT(w->sums[phase], N_ITEMS * 1001);
            }
            CHECK_EQ_INT(atomic_load(&w->seen), 0x11111 & ((1 << (4 * w->n)) - 1));
        }
        team_free(w->team);
    }
    free(w);
}

TEST(team_without_work) {
    hepta_error err;
    for (int n = 1; n <= 8; n++) {
        team *t = NULL;
        CHECK_OK(team_create(n, &t, &err));
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
