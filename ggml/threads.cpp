/* The thread pool: persistent threads that spin briefly for the next job and then sleep.
 *
 * A job is a number of pieces; whoever is free takes the next one from a counter. The caller works
 * too, and it waits for those threads only that have entered the job: one that the system has not
 * run yet finds the job closed and costs nothing, so too many threads are slow but not a disaster.
 *
 * A child process has no copies of its parent's threads and can't trust their locks. So all of this
 * lives in a crew that remembers in which process it was made; a child makes itself a new one. */
#include "ggml.h"
#include "once.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <intrin.h>
#else
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

// A waiting thread keeps its processor for so long, then offers it to others, then sleeps.
constexpr auto SPIN = std::chrono::microseconds(20);
constexpr auto YIELD = std::chrono::microseconds(100);

std::atomic<unsigned> forks{0};  // by how many forks this process is removed from the first one

void relax() {
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

// Waits until ready() holds: as long as it takes, or (then it returns false) until it is time to
// sleep.
template <class Ready> bool wait_awake(Ready ready, bool forever) {
    const auto start = Clock::now();
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            relax();
        }
        const auto waited = Clock::now() - start;
        if (waited > YIELD && !forever) return false;
        if (waited > SPIN) std::this_thread::yield();
    }
}

// The state of a job in one word: its number, whether it is open, and how many threads are inside.
constexpr uint64_t OPEN = uint64_t(1) << 31;
constexpr uint64_t INSIDE = OPEN - 1;
constexpr uint64_t NUMBER = uint64_t(1) << 32;

struct Job {
    ggml_work * work;
    void * arg;
    size_t n;
    size_t unit;
};

struct Worker {
    std::thread thread;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<bool> sleeping{false};

    // Empty as it is, the lock waits until a thread that is about to sleep can be woken.
    void rouse() {
        mutex.lock();
        mutex.unlock();
        wake.notify_one();
    }
};

struct Crew {
    const unsigned generation = forks;
    std::mutex mutex;
    std::condition_variable released;
    std::atomic<std::thread::id> owner{};  // from acquire to release; changes under the mutex
    std::vector<std::unique_ptr<Worker>> workers;
    Job job{};
    alignas(64) std::atomic<uint64_t> state{0};
    std::atomic<size_t> active{0};  // the first so many workers take part
    std::atomic<bool> stop{false};
    alignas(64) std::atomic<size_t> next{0};

    bool ours() const { return generation == forks; }
    bool taken() const { return owner != std::thread::id(); }
    ~Crew();
    bool add_worker();
    void live(Worker & self, size_t index);
    void take_pieces();
    void run(const Job & job);
};

Crew::~Crew() {
    stop = true;
    for (auto & worker : workers) {
        worker->rouse();
        worker->thread.join();
    }
}

// Starts one more thread; false if the system does not want to. Signals are left to the threads of
// the program; those that a fault of this very thread raises can't be.
bool Crew::add_worker() try {
    workers.push_back(std::make_unique<Worker>());
    struct Guard {  // the vector's growth must not remain if the thread did not start
        Crew * crew;
        ~Guard() {
            if (crew) crew->workers.pop_back();
        }
    } guard{this};
#if !defined(_WIN32)
    sigset_t blocked, previous;
    sigfillset(&blocked);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT})
        sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous);
    struct Restore {
        const sigset_t & mask;
        ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
    } restore{previous};
#endif
    Worker & worker = *workers.back();
    worker.thread = std::thread(&Crew::live, this, std::ref(worker), workers.size() - 1);
    guard.crew = nullptr;
    return true;
} catch (const std::exception &) {
    return false;
}

// Takes a thread's share of what is left, again and again: long pieces first, since memory is read
// best in one go (5 % of a token's time against 8 equal pieces for each thread), and short ones
// last, so that all threads end together.
void Crew::take_pieces() {
    size_t first = next;
    while (first < job.n) {
        const size_t units = (job.n - first) / (active + 1) / job.unit;
        const size_t last = std::min(job.n, first + std::max<size_t>(units, 1) * job.unit);
        if (!next.compare_exchange_weak(first, last)) continue;
        job.work(job.arg, first, last);
        first = next;
    }
}

// A worker's life. It enters each job at most once.
void Crew::live(Worker & self, size_t index) {
    uint64_t done = 0;
    auto wanted = [&] {
        const uint64_t now = state;
        return stop || ((now & OPEN) && now / NUMBER != done && index < active);
    };
    for (;;) {
        if (!wait_awake(wanted, false)) {
            std::unique_lock<std::mutex> lock(self.mutex);
            self.sleeping = true;  // from here on, whoever opens a job will notice
            self.wake.wait(lock, wanted);
            self.sleeping = false;
        }
        if (stop) return;
        uint64_t now = state;
        while (now & OPEN && !state.compare_exchange_weak(now, now + 1)) {}
        if (!(now & OPEN)) continue;
        done = now / NUMBER;
        const uint64_t saved = ggml_fp_enter();
        take_pieces();
        ggml_fp_leave(saved);
        state.fetch_sub(1);
    }
}

void Crew::run(const Job & new_job) {
    job = new_job;
    next = 0;
    state = (state / NUMBER + 1) * NUMBER | OPEN;
    for (size_t i = 0; i < active; i++) {
        Worker & worker = *workers[i];
        if (worker.sleeping) worker.rouse();
    }
    take_pieces();
    state.fetch_and(~OPEN);
    wait_awake([this] { return (state & INSIDE) == 0; }, true);
}

}  // namespace

struct ggml_pool {
    std::atomic<Crew *> crew{nullptr};
};

// The crew of this process, made if need be; NULL if there is no memory for one.
static Crew * own_crew(ggml_pool * pool) {
    Crew * crew = pool->crew;
    if (crew && crew->ours()) return crew;
    Crew * fresh = new (std::nothrow) Crew;
    if (!fresh) return nullptr;
    if (pool->crew.compare_exchange_strong(crew, fresh)) return fresh;
    delete fresh;
    return crew;
}

void ggml_once(void (*init)(void)) {
    static std::once_flag once;
    std::call_once(once, init);
}

ggml_pool * ggml_pool_create(void) {
#if !defined(_WIN32)
    static const bool counting_forks = pthread_atfork(nullptr, nullptr, [] { forks++; }) == 0;
    (void)counting_forks;
#endif
    std::unique_ptr<ggml_pool> pool(new (std::nothrow) ggml_pool);
    return pool && own_crew(pool.get()) ? pool.release() : nullptr;
}

void ggml_pool_free(ggml_pool * pool) {
    if (!pool) return;
    Crew * crew = pool->crew;
    if (crew && crew->ours()) delete crew;  // a parent's crew can't be taken apart: it is left
    delete pool;
}

unsigned ggml_pool_try_acquire(ggml_pool * pool, unsigned n_threads, unsigned patience) {
    Crew * crew = own_crew(pool);
    if (!crew) return 1;
    {
        std::unique_lock<std::mutex> lock(crew->mutex);
        const auto is_free = [crew] { return !crew->taken(); };
        if (!crew->released.wait_for(lock, std::chrono::milliseconds(patience), is_free)) return 0;
        crew->owner = std::this_thread::get_id();
    }
    while (crew->workers.size() + 1 < n_threads && crew->add_worker()) {}
    const size_t active = std::min<size_t>(crew->workers.size(), n_threads > 0 ? n_threads - 1 : 0);
    crew->active = active;
    return unsigned(active + 1);
}

unsigned ggml_pool_acquire(ggml_pool * pool, unsigned n_threads) {
    for (;;) {
        const unsigned n = ggml_pool_try_acquire(pool, n_threads, 1000);
        if (n > 0) return n;
    }
}

// The crew that this thread has acquired in this process, or NULL.
static Crew * acquired_crew(ggml_pool * pool) {
    Crew * crew = pool ? pool->crew.load() : nullptr;
    return crew && crew->ours() && crew->owner == std::this_thread::get_id() ? crew : nullptr;
}

void ggml_pool_release(ggml_pool * pool) {
    Crew * crew = acquired_crew(pool);
    if (!crew) return;
    crew->active = 0;
    {
        std::lock_guard<std::mutex> lock(crew->mutex);
        crew->owner = std::thread::id();
    }
    crew->released.notify_one();
}

void ggml_pool_run(ggml_pool * pool, ggml_work * work, void * arg, size_t n, size_t unit) {
    if (n == 0) return;
    Crew * crew = acquired_crew(pool);
    if (!crew || crew->active == 0 || n <= unit) {
        work(arg, 0, n);
        return;
    }
    crew->run({work, arg, n, unit});
}
