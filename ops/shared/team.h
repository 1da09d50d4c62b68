/* Threads that work through the parts of a call together and wait for one another between them.
 *
 * OpenMP's own barrier either sleeps or spins for milliseconds: the first costs more than most parts of a decode step
 * take, the second keeps a thread from running that somebody else's work has pushed aside. */
#include <stdatomic.h>
#ifdef _WIN32
#define give_way() ((void)0)
#else
#include <sched.h>
#define give_way() ((void)sched_yield())
#endif

enum { TEAM_TURNS = 4000 /* looks at the others before the processor is offered to somebody else */ };

/* All zeros at first. */
typedef struct {
    atomic_int arrived, phase;
    _Alignas(64) atomic_llong next; /* of things that are handed out one by one */
} Team;

INLINE int64_t thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

INLINE int64_t thread_count(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

INLINE void take_a_breath(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns when every thread of the region has come here. */
static void team_wait(Team *team) {
    int threads = (int)thread_count();
    int phase = atomic_load_explicit(&team->phase, memory_order_acquire);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int turn = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; turn++)
        if (turn < TEAM_TURNS)
            take_a_breath();
        else
            give_way();
}

/* The number of the next thing that nobody has taken since the team last waited. */
INLINE int64_t team_next(Team *team) { return atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed); }

/* The part of `count` things that is this thread's: from the first of the two on, up to the second. */
INLINE int64_t share_from(int64_t count) { return count * thread_number() / thread_count(); }
INLINE int64_t share_to(int64_t count) { return count * (thread_number() + 1) / thread_count(); }
