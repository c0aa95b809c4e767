/* The pool: every index exactly once, queues, forks, more threads than cores; the floating-point
 * environment. Meant to be run under ThreadSanitizer too. */
#if defined(__unix__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* setrlimit, usleep */
#endif
#include <fenv.h>
#include <float.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "ggml.h"

#if defined(__SANITIZE_THREAD__)
#define CAN_FORK false /* ThreadSanitizer refuses new threads in the child */
#else
#define CAN_FORK true
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CAN_FORK_BUSY false /* AddressSanitizer's own locks don't survive it */
#else
#define CAN_FORK_BUSY true
#endif

enum { MOST = 5000 };

struct count {
    atomic_int seen[MOST];
    size_t n, unit;
    atomic_int ragged;   /* pieces that do not begin or end at a multiple of unit */
    atomic_int abnormal; /* pieces computed in another floating-point environment */
};

static void count(void * arg, size_t first, size_t last) {
    struct count * c = arg;
    volatile float denormal = FLT_MIN;
    if (first % c->unit != 0 || (last % c->unit != 0 && last != c->n) || first >= last) c->ragged++;
    if (fegetround() != FE_TONEAREST || denormal / 2 == 0) c->abnormal++;
    for (size_t i = first; i < last; i++) c->seen[i]++;
}

/* One run of n by unit; true if every index was seen exactly once. */
static bool run_once(struct ggml_pool * pool, size_t n, size_t unit) {
    struct count * c = calloc(1, sizeof *c);
    c->n = n;
    c->unit = unit;
    ggml_pool_run(pool, count, c, n, unit);
    bool right = c->ragged == 0 && c->abnormal == 0;
    for (size_t i = 0; i < MOST; i++) right &= c->seen[i] == (i < n);
    free(c);
    return right;
}

static void test_coverage(void) {
    static const size_t ns[] = {0, 1, 15, 16, 17, 100, 257, 1000, MOST};
    static const size_t units[] = {1, 16, 64, 100000};
    for (unsigned threads = 1; threads <= 8; threads++) {
        struct ggml_pool * pool = ggml_pool_create();
        check(ggml_pool_acquire(pool, threads) == threads, "acquired %u threads", threads);
        for (size_t i = 0; i < sizeof ns / sizeof *ns; i++)
            for (size_t u = 0; u < sizeof units / sizeof *units; u++)
                check(run_once(pool, ns[i], units[u]), "%zu by %zu on %u threads", ns[i], units[u],
                      threads);
        ggml_pool_release(pool);
        ggml_pool_free(pool);
    }
    check(run_once(NULL, 100, 16), "no pool");
    ggml_pool_free(NULL);
}

/* More and fewer threads in turn, with pauses in which they fall asleep. */
static void test_changing_threads(void) {
    struct ggml_pool * pool = ggml_pool_create();
    bool right = true;
    for (int i = 0; i < 60; i++) {
        unsigned threads = 1 + random_below(8);
        right &= ggml_pool_acquire(pool, threads) == threads;
        for (int j = 0; j < 20; j++) right &= run_once(pool, 1 + random_below(MOST), 16);
        ggml_pool_release(pool);
        if (i % 4 == 0) usleep(1000);
    }
    check(right, "changing numbers of threads");
    ggml_pool_free(pool);
}

static void add_up(void * arg, size_t first, size_t last) {
    long * sums = arg;
    for (size_t i = first; i < last; i++) sums[i] += (long)i;
}

/* Tiny jobs, one right after another: nobody may be lost or enter twice. */
static void test_many_jobs(void) {
    enum { N = 64, JOBS = 20000 };
    struct ggml_pool * pool = ggml_pool_create();
    long sums[N] = {0};
    ggml_pool_acquire(pool, 3);
    for (int i = 0; i < JOBS; i++) ggml_pool_run(pool, add_up, sums, N, 1);
    ggml_pool_release(pool);
    bool right = true;
    for (long i = 0; i < N; i++) right &= sums[i] == i * JOBS;
    check(right, "%d jobs", JOBS);
    ggml_pool_free(pool);
}

static struct ggml_pool * shared;
static int unguarded; /* written by whoever holds the pool */

static void * evaluate(void * arg) {
    unsigned threads = *(unsigned *)arg;
    bool right = true;
    for (int i = 0; i < 200; i++) {
        ggml_pool_acquire(shared, threads);
        unguarded++;
        right &= run_once(shared, 500, 16);
        ggml_pool_release(shared);
    }
    return right ? arg : NULL;
}

static void test_queue(void) {
    enum { CALLERS = 4 };
    pthread_t callers[CALLERS];
    unsigned threads[CALLERS] = {1, 2, 3, 8};
    shared = ggml_pool_create();
    unguarded = 0;
    for (int i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, evaluate, &threads[i]);
    for (int i = 0; i < CALLERS; i++) {
        void * right;
        pthread_join(callers[i], &right);
        check(right != NULL, "caller %d", i);
    }
    check(unguarded == CALLERS * 200, "one evaluation at a time");
    ggml_pool_free(shared);
}

static void * intrude(void * arg) { /* on a pool that another thread has acquired */
    bool right = run_once(shared, 1000, 16);
    ggml_pool_release(shared);
    return right && ggml_pool_try_acquire(shared, 3, 10) == 0 ? arg : NULL;
}

static void test_owner(void) {
    pthread_t stranger;
    void * right;
    shared = ggml_pool_create();
    check(ggml_pool_try_acquire(shared, 3, 0) == 3, "a free pool");
    pthread_create(&stranger, NULL, intrude, &unguarded);
    bool ours = true;
    for (int i = 0; i < 100; i++) ours &= run_once(shared, 1000, 16);
    pthread_join(stranger, &right);
    check(ours, "the owner's jobs");
    check(right != NULL, "who has not acquired the pool works alone and can't release it");
    ggml_pool_release(shared);
    check(ggml_pool_try_acquire(shared, 3, 0) == 3, "a released pool");
    ggml_pool_release(shared);
    ggml_pool_free(shared);
}

/* Runs body in a child; true if it returned true within ten seconds. */
static bool in_child(bool (*body)(struct ggml_pool *), struct ggml_pool * pool) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        _exit(body(pool) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static bool use_pool(struct ggml_pool * pool) {
    if (ggml_pool_acquire(pool, 3) != 3) return false;
    bool right = run_once(pool, 1000, 16) && run_once(pool, 1000, 16);
    ggml_pool_release(pool);
    return right;
}

static bool use_twice_and_free(struct ggml_pool * pool) {
    bool right = use_pool(pool) && use_pool(pool) && in_child(use_pool, pool);
    ggml_pool_free(pool);
    return right;
}

static bool free_at_once(struct ggml_pool * pool) {
    ggml_pool_free(pool);
    return true;
}

static bool go_on(struct ggml_pool * pool) { /* acquired by the parent */
    bool right = run_once(pool, 1000, 16);
    ggml_pool_release(pool);
    return right && use_pool(pool);
}

static void test_fork(void) {
    struct ggml_pool * pool = ggml_pool_create();
    check(in_child(use_pool, pool), "fork before any thread");
    check(use_pool(pool), "the parent");
    check(in_child(use_twice_and_free, pool), "fork while threads spin");
    usleep(20000);
    check(in_child(use_twice_and_free, pool), "fork while threads sleep");
    check(in_child(free_at_once, pool), "free in the child");
    ggml_pool_acquire(pool, 3);
    check(run_once(pool, 1000, 16), "the parent, acquired");
    check(in_child(go_on, pool), "fork in the middle of an evaluation");
    check(run_once(pool, 1000, 16), "the parent after that");
    ggml_pool_release(pool);
    check(use_pool(pool), "the parent at the end");
    ggml_pool_free(pool);
}

static void test_fork_while_busy(void) {
    unsigned threads = 3;
    pthread_t caller;
    shared = ggml_pool_create();
    pthread_create(&caller, NULL, evaluate, &threads);
    bool right = true;
    for (int i = 0; i < 20; i++) right &= in_child(use_pool, shared);
    check(right, "forks while another thread evaluates");
    void * parent_right;
    pthread_join(caller, &parent_right);
    check(parent_right != NULL, "the parent's evaluations");
    ggml_pool_free(shared);
}

static bool use_pool_without_threads(struct ggml_pool * pool) {
    struct rlimit none = {1, 1};
    setrlimit(RLIMIT_NPROC, &none);
    if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) return true;
    unsigned threads = ggml_pool_acquire(pool, 4);
    bool right = threads < 4 && run_once(pool, 1000, 16);
    ggml_pool_release(pool);
    return right;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void work_a_while(void * arg, size_t first, size_t last) {
    volatile float * x = arg;
    for (size_t i = first; i < last; i++)
        for (int j = 0; j < 300; j++) x[i] = x[i] * 0.99f + 1;
}

/* Many times more threads than cores must not be many times slower. */
static void test_oversubscription(void) {
    enum { N = 256, RUNS = 100 };
    static float x[N];
    double seconds[2];
    static const unsigned threads[2] = {1, 16};
    for (int i = 0; i < 2; i++) {
        struct ggml_pool * pool = ggml_pool_create();
        ggml_pool_acquire(pool, threads[i]);
        double start = now();
        for (int run = 0; run < RUNS; run++) ggml_pool_run(pool, work_a_while, x, N, 1);
        seconds[i] = now() - start;
        ggml_pool_release(pool);
        ggml_pool_free(pool);
    }
    printf("oversubscription: 1 thread %.1f ms, 16 threads %.1f ms\n", seconds[0] * 1e3,
           seconds[1] * 1e3);
    check(seconds[1] < 10 * seconds[0] + 1, "16 threads took %g s, one took %g s", seconds[1],
          seconds[0]);
}

static void test_fp_environment(void) {
    /* volatile: operations may not move past the calls that change the environment */
    volatile float one = 1, three = 3;
    volatile float nearest = one / three;
    fesetround(FE_DOWNWARD);
    volatile float downward = one / three;
    uint64_t saved = ggml_fp_enter();
    volatile float entered = one / three;
    /* jobs do not inherit what their caller has set */
    struct ggml_pool * pool = ggml_pool_create();
    ggml_pool_acquire(pool, 3);
    check(run_once(pool, 1000, 16), "jobs in the default environment");
    ggml_pool_release(pool);
    ggml_pool_free(pool);
    ggml_fp_leave(saved);
    check(fegetround() == FE_DOWNWARD && one / three == downward && downward != nearest,
          "the caller's rounding mode is back");
    check(entered == nearest, "round to nearest inside");
    fesetround(FE_TONEAREST);
#if defined(__x86_64__)
    volatile float smallest = FLT_MIN;
    unsigned control = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(control | 0x8040); /* flush to zero, denormals are zero */
    saved = ggml_fp_enter();
    volatile float half = smallest / 2;
    ggml_fp_leave(saved);
    volatile float flushed = smallest / 2;
    __builtin_ia32_ldmxcsr(control);
    check(half > 0, "denormals are kept inside");
    check(flushed == 0, "the caller's flushing is back");
#endif
}

int main(void) {
    unsigned cores = ggml_default_threads();
    printf("%u threads by default\n", cores);
    check(cores >= 1 && cores <= 4096, "default of %u threads", cores);
    test_coverage();
    test_changing_threads();
    test_many_jobs();
    test_queue();
    test_owner();
    test_fp_environment();
    if (CAN_FORK && !getenv("TEST_WITHOUT_FORK")) {
        struct ggml_pool * pool = ggml_pool_create();
        test_fork();
        if (CAN_FORK_BUSY) test_fork_while_busy();
        check(in_child(use_pool_without_threads, pool), "no more threads to be had");
        ggml_pool_free(pool);
    }
    test_oversubscription();
    return finish();
}
