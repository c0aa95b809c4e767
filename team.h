/* team.h: ggml's threads as objects. */
#ifndef RWKV_TEAM_H
#define RWKV_TEAM_H

#include "ggml/ggml.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

namespace rwkv {

constexpr unsigned max_threads = 1024;

inline unsigned default_threads() {
    return std::min(ggml_default_threads(), max_threads);
}

struct FreePool {
    void operator()(ggml_pool * pool) const { ggml_pool_free(pool); }
};
using Pool = std::unique_ptr<ggml_pool, FreePool>;

inline Pool create_pool() {
    Pool pool(ggml_pool_create());
    if (pool == nullptr) throw std::bad_alloc();
    return pool;
}

/* The threads of a call, its own one among them; one alone never waits for others. Meanwhile the
 * caller's floating-point environment gives way to that in which results are defined. */
class Team {
  public:
    /* while_waiting() is called now and then until others are done with the pool; it may throw. */
    template <class F>
    Team(const Pool & pool, unsigned n_threads, F while_waiting)
        : pool_(n_threads > 1 ? pool.get() : nullptr) {
        const unsigned patience = 10; /* ms */
        while (pool_ != nullptr &&
               (size_ = ggml_pool_try_acquire(pool_, n_threads, patience)) == 0) {
            while_waiting();
        }
        saved_ = ggml_fp_enter();
    }
    Team(const Pool & pool, unsigned n_threads) : Team(pool, n_threads, [] {}) {}
    ~Team() {
        if (pool_ != nullptr) ggml_pool_release(pool_);
        ggml_fp_leave(saved_);
    }
    Team(const Team &) = delete;
    Team & operator=(const Team &) = delete;

    size_t size() const { return size_; } /* the calling thread included */

    /* Calls f(first, last) for pieces of [0, n) that are multiples of `unit`; f throws nothing. */
    template <class F> void run(size_t n, size_t unit, F f) const {
        const auto work = [](void * arg, size_t first, size_t last) { (*(F *)arg)(first, last); };
        ggml_pool_run(pool_, work, &f, n, unit);
    }

  private:
    ggml_pool * pool_;
    size_t size_ = 1;
    uint64_t saved_;
};

/* The smallest number that any thread has found. */
class Least {
  public:
    static constexpr uint64_t none = std::numeric_limits<uint64_t>::max();
    void offer(uint64_t n) {
        uint64_t least = value_;
        while (n < least && !value_.compare_exchange_weak(least, n)) {}
    }
    uint64_t get() const { return value_; }

  private:
    std::atomic<uint64_t> value_{none};
};

}  // namespace rwkv

#endif
