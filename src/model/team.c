/*
 * team.c - threads that take items of a loop while they run, and sleep when idle (see team.h).
 *
 * A loop is published by storing its number of items in `untaken`. A thread takes an item by
 * counting it down, and counts down `undone` when the item has been done; the caller takes items
 * too and returns when `undone` is 0.
 *
 * Invariant: fn, context and n are written only while undone = 0, and read only by a thread that
 * holds an item, so while undone > 0. The store to `untaken` publishes them, and everything
 * written before the loop; the last count of `undone` publishes what the items wrote.
 *
 * Sleeping: a thread registers in `sleepers` before it looks at `untaken` for the last time, the
 * caller stores `untaken` before it looks at `sleepers`; both accesses are sequentially
 * consistent, so that one of them sees the other and no wake-up is lost.
 */
#include "model/team.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

/* Idle threads look for work this often before they sleep: some 50 microseconds. */
enum { SPINS = 2000 };

typedef struct member {
    team *team;
    int number;
    pthread_t thread;
} member;

struct team {
    int n;
    member *members; /* (n - 1) */
    team_fn fn;
    void *context;
    size_t n_items;
    bool ended; /* under the mutex */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    _Alignas(64) atomic_size_t untaken;
    atomic_int sleepers;
    _Alignas(64) atomic_size_t undone;
};

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Takes an item and does it; false if there was none. */
static bool do_item(team *t, int thread) {
    size_t left = atomic_load_explicit(&t->untaken, memory_order_relaxed);
    do {
        if (left == 0) {
            return false;
        }
    } while (!atomic_compare_exchange_weak_explicit(&t->untaken, &left, left - 1,
                                                    memory_order_acquire, memory_order_relaxed));
    t->fn(t->context, t->n_items - left, thread);
    atomic_fetch_sub_explicit(&t->undone, 1, memory_order_release);
    return true;
}

/* Sleeps until there are items; false at the team's end. */
static bool sleep_until_work(team *t) {
    pthread_mutex_lock(&t->mutex);
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->untaken) == 0 && !t->ended) {
        pthread_cond_wait(&t->wake, &t->mutex);
    }
    atomic_fetch_sub(&t->sleepers, 1);
    bool more = !t->ended;
    pthread_mutex_unlock(&t->mutex);
    return more;
}

static void *member_main(void *arg) {
    const member *m = arg;
    fesetenv(FE_DFL_ENV);
    do {
        for (int idle = 0; idle < SPINS; idle++) {
            if (do_item(m->team, m->number)) {
                idle = 0;
            } else {
                spin_pause();
            }
        }
    } while (sleep_until_work(m->team));
    return NULL;
}

void team_each(team *t, size_t n, team_fn fn, void *context) {
    if (t->n == 1 || n <= 1) {
        for (size_t i = 0; i < n; i++) {
            fn(context, i, 0);
        }
        return;
    }
    t->fn = fn;
    t->context = context;
    t->n_items = n;
    atomic_store_explicit(&t->undone, n, memory_order_relaxed);
    atomic_store(&t->untaken, n);
    if (atomic_load(&t->sleepers) > 0) {
        pthread_mutex_lock(&t->mutex);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->mutex);
    }
    while (do_item(t, 0)) {
    }
    while (atomic_load_explicit(&t->undone, memory_order_acquire) > 0) {
        spin_pause();
    }
}

int team_size(const team *t) {
    return t->n;
}

void team_free(team *t) {
    if (t == NULL) {
        return;
    }
    pthread_mutex_lock(&t->mutex);
    t->ended = true;
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->mutex);
    for (int i = 0; i < t->n - 1; i++) {
        pthread_join(t->members[i].thread, NULL);
    }
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->mutex);
    memory_free(t->members);
    memory_free(t);
}

hepta_status team_create(int n, team **out, hepta_error *err) {
    team *t = memory_alloc(1, sizeof *t);
    member *members = memory_alloc((size_t)n, sizeof *members);
    if (t == NULL || members == NULL) {
        memory_free(t);
        memory_free(members);
        return error_set(err, HEPTA_ERROR_MEMORY, "no memory for a team of %d threads", n);
    }
    t->members = members;
    pthread_mutex_init(&t->mutex, NULL);
    pthread_cond_init(&t->wake, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int code = 0;
    for (t->n = 1; t->n < n && code == 0; t->n += code == 0) {
        member *m = &members[t->n - 1];
        *m = (member){.team = t, .number = t->n};
        code = pthread_create(&m->thread, NULL, member_main, m);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) {
        team_free(t);
        return error_set(err, HEPTA_ERROR_MEMORY, "cannot start %d threads: %s", n, strerror(code));
    }
    *out = t;
    return HEPTA_OK;
}
