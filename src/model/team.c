/*
 * team.c - threads with shared loops and a barrier that spins briefly, then sleeps (see team.h).
 *
 * The barrier counts arrivals; the last one resets the count and the loop slots and advances the
 * generation, which releases the others. Invariant: a thread between two barriers knows the
 * generation, for it cannot advance without this thread.
 *
 * Sleeping: a waiter registers in `sleepers` before it looks at the generation for the last
 * time, the last arriver advances the generation before it looks at `sleepers`; both accesses
 * are sequentially consistent, so that at least one of them sees the other and no wake-up is
 * lost.
 */
#include "model/team.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

/* 10 to 40 microseconds on today's CPUs: longer than a barrier among running threads takes,
 * shorter than the time slice of a process that keeps one of them waiting. */
enum { SPINS = 1000 };

typedef struct member {
    team *team;
    int number;
    pthread_t thread;
} member;

struct team {
    int n;
    member *members; /* (n - 1) */
    team_fn fn;      /* written before a barrier, read after it; NULL: end */
    void *context;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    /* Apart from what is above, on lines of their own. */
    _Alignas(64) atomic_uint generation;
    atomic_int sleepers;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_size_t next[TEAM_SLOTS];
};

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

void team_barrier(team *t) {
    unsigned generation = atomic_load_explicit(&t->generation, memory_order_relaxed);
    if (atomic_fetch_add(&t->arrived, 1) + 1 == t->n) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        for (int i = 0; i < TEAM_SLOTS; i++) {
            atomic_store_explicit(&t->next[i], 0, memory_order_relaxed);
        }
        atomic_store(&t->generation, generation + 1);
        if (atomic_load(&t->sleepers) > 0) {
            pthread_mutex_lock(&t->mutex);
            pthread_cond_broadcast(&t->wake);
            pthread_mutex_unlock(&t->mutex);
        }
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&t->generation, memory_order_acquire) != generation) {
            return;
        }
        spin_pause();
    }
    pthread_mutex_lock(&t->mutex);
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->generation) == generation) {
        pthread_cond_wait(&t->wake, &t->mutex);
    }
    atomic_fetch_sub(&t->sleepers, 1);
    pthread_mutex_unlock(&t->mutex);
}

bool team_next(team *t, int slot, size_t n, size_t *item) {
    *item = atomic_fetch_add_explicit(&t->next[slot], 1, memory_order_relaxed);
    return *item < n;
}

int team_size(const team *t) {
    return t->n;
}

static void *member_main(void *arg) {
    const member *m = arg;
    team *t = m->team;
    pthread_mutex_lock(&t->mutex); /* until all have been started and t->n is known */
    pthread_mutex_unlock(&t->mutex);
    for (;;) {
        team_barrier(t); /* the call begins */
        if (t->fn == NULL) {
            return NULL;
        }
        t->fn(t->context, m->number);
        team_barrier(t); /* the call ends */
    }
}

void team_run(team *t, team_fn fn, void *context) {
    t->fn = fn;
    t->context = context;
    team_barrier(t);
    fn(context, 0);
    team_barrier(t);
}

void team_free(team *t) {
    if (t == NULL) {
        return;
    }
    t->fn = NULL;
    team_barrier(t);
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
    pthread_mutex_lock(&t->mutex);
    int code = 0;
    for (t->n = 1; t->n < n && code == 0; t->n += code == 0) {
        member *m = &members[t->n - 1];
        *m = (member){.team = t, .number = t->n};
        code = pthread_create(&m->thread, NULL, member_main, m);
    }
    pthread_mutex_unlock(&t->mutex);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code != 0) {
        team_free(t);
        return error_set(err, HEPTA_ERROR_MEMORY, "cannot start %d threads: %s", n, strerror(code));
    }
    *out = t;
    return HEPTA_OK;
}
