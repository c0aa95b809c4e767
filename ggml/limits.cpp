/* How fast this machine reads and multiplies: what the speed of kernels is a share of. */
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t STEP = 4096;                       // bytes: 4 streams of 1024
constexpr size_t MULTIPLY_ADDS = 1024 * 12 * 4096;  // of a thread: some milliseconds
constexpr unsigned PARTS = 8;                       // of a thread's share: the shortest piece
constexpr size_t HUGE_PAGE = size_t(2) << 20;
constexpr auto LONG_ENOUGH = std::chrono::milliseconds(10);

struct Free {
    void operator()(uint8_t * p) const { operator delete(p, std::align_val_t{HUGE_PAGE}); }
};

// Memory in huge pages where the system has them: looking up small ones costs some percent.
std::unique_ptr<uint8_t, Free> allocate(size_t n) {
    std::unique_ptr<uint8_t, Free> memory(
        (uint8_t *)operator new(n, std::align_val_t{HUGE_PAGE}, std::nothrow));
    if (memory == nullptr) return memory;
#if defined(__linux__)
    madvise(memory.get(), n, MADV_HUGEPAGE);
#endif
    std::memset(memory.get(), 1, n);  // before the first write, all pages are the same one
    return memory;
}

// How often f() runs in a second. A first time, which warms up caches and threads, is left out.
template <class F> double rate(F f) {
    f();
    const auto start = Clock::now();
    Clock::duration taken;
    int count = 0;
    do {
        f();
        count++;
        taken = Clock::now() - start;
    } while (taken < LONG_ENOUGH);
    return count / std::chrono::duration<double>(taken).count();
}

struct Meter {
    const ggml_kernels & kernels;
    ggml_pool * pool;
    unsigned n_threads;
    std::atomic<uint64_t> sink{0};

    // Calls f(first, last) for pieces of [0, n); what it returns is used for nothing.
    template <class F> void spread(size_t n, F f) {
        const auto work = [&](size_t first, size_t last) { sink += (uint64_t)f(first, last); };
        using Work = decltype(work);
        ggml_pool_run(
            pool, [](void * arg, size_t first, size_t last) { (*(Work *)arg)(first, last); },
            (void *)&work, n, 1);
    }

    // Bytes per second.
    double read(const uint8_t * data, size_t steps, size_t streams, size_t ahead) {
        const double passes = rate([&] {
            spread(steps, [&](size_t first, size_t last) {
                return kernels.read(data + first * STEP, (last - first) * STEP, streams, ahead);
            });
        });
        return passes * (double)(steps * STEP);
    }

    // Operations per second, the best of several trials.
    template <class Kernel> double multiply(Kernel kernel) {
        double best = 0;
        for (int trial = 0; trial < 5; trial++) {
            const double passes = rate([&] {
                spread(PARTS * n_threads, [&](size_t first, size_t last) {
                    return kernel((last - first) * (MULTIPLY_ADDS / PARTS));
                });
            });
            best = std::max(best, passes * 2 * (double)MULTIPLY_ADDS * n_threads);
        }
        return best;
    }
};

}  // namespace

bool ggml_measure(const ggml_kernels * kernels, unsigned n_threads, uint64_t n_bytes,
                  ggml_limits * limits) {
    if (n_bytes > SIZE_MAX / 2) return false;
    const size_t steps = std::max<size_t>((size_t)n_bytes / STEP, 1);
    const auto memory = allocate(steps * STEP);
    ggml_pool * pool = ggml_pool_create();
    if (memory == nullptr || pool == nullptr) {
        ggml_pool_free(pool);
        return false;
    }
    Meter meter = {*kernels, pool, ggml_pool_acquire(pool, n_threads)};
    limits->read = 0;
    for (const size_t streams : {1, 2, 4}) {
        for (const size_t ahead : {0, 1024, 4096}) {
            limits->read = std::max(limits->read, meter.read(memory.get(), steps, streams, ahead));
        }
    }
    limits->fp32 = meter.multiply(kernels->fma);
    limits->int8 = meter.multiply(kernels->dot);
    ggml_pool_release(pool);
    ggml_pool_free(pool);
    return true;
}
