/*
 * team.h - a few threads that compute together: shared loops and barriers, no work queue.
 *
 * A team of n has the caller's thread as number 0 and n - 1 threads of its own, which sleep
 * between calls. team_run lets all of them run one function; inside it team_next hands out the
 * items of a loop and team_barrier waits for everyone.
 *
 * Why not OpenMP: its runtimes spin at barriers for a millisecond or more and cannot be told
 * otherwise by a library, which makes generation ten times slower as soon as other processes
 * want the same cores. Here a thread spins for some microseconds, then sleeps.
 */
#ifndef MODEL_TEAM_H
#define MODEL_TEAM_H

#include "base/base.h"

/* Shared loops that may run between two barriers, each with a slot of its own. */
enum { TEAM_SLOTS = 4, TEAM_MAX_THREADS = 4096 };

typedef struct team team;
typedef void (*team_fn)(void *context, int thread);

/* Starts n - 1 threads, 1 <= n <= TEAM_MAX_THREADS. They take no signals. */
hepta_status team_create(int n, team **out, hepta_error *err);
void team_free(team *t); /* t may be NULL */

/* Runs fn(context, thread) on threads 0 .. n-1 and returns when all have; one call at a time. */
void team_run(team *t, team_fn fn, void *context);

/* Within fn: takes an item of the loop over 0 .. n-1 that uses this slot; false when none is
 * left. The next barrier makes the slot free again. */
bool team_next(team *t, int slot, size_t n, size_t *item);

/* Within fn: returns when all threads have come here; what they wrote is visible after it. */
void team_barrier(team *t);

int team_size(const team *t);

#endif
