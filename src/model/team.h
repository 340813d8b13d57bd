/*
 * team.h - a few threads that share the items of a loop.
 *
 * team_each(t, n, fn, context) calls fn for items 0 .. n-1, in any order, on the caller's thread
 * and on those threads of the team that are free, and returns when all have been done. A thread
 * of the team that is not running, because other processes have its core, holds nobody up unless
 * it was stopped in the middle of an item.
 *
 * Why not OpenMP: its runtimes wait at the end of a loop until every thread has come there, and
 * spin for milliseconds meanwhile, which a library cannot change. That makes generation ten
 * times slower as soon as other processes want the same cores.
 */
#ifndef MODEL_TEAM_H
#define MODEL_TEAM_H

#include "base/base.h"

enum { TEAM_MAX_THREADS = 4096 };

typedef struct team team;
typedef void (*team_fn)(void *context, size_t item, int thread); /* thread: 0 is the caller's */

/*
 * Starts n - 1 threads, 1 <= n <= TEAM_MAX_THREADS. They take no signals, compute in the default
 * floating-point environment, and sleep when there is nothing to do.
 */
hepta_status team_create(int n, team **out, hepta_error *err);
void team_free(team *t); /* t may be NULL */

/* One call at a time. What the items write is visible after it. */
void team_each(team *t, size_t n, team_fn fn, void *context);

int team_size(const team *t);

#endif
