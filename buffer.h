/* buffer.h: memory for weights and vectors. */
#ifndef RWKV_BUFFER_H
#define RWKV_BUFFER_H

#include "file.h"
#include "rwkv_error.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

namespace rwkv {

/* Memory that is not initialised, at a multiple of 64 bytes. */
class Buffer {
  public:
    void allocate(uint64_t n, const char * what) {
        data_.reset();
        size_ = 0;
        try {
            if (n > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
            data_.reset((uint8_t *)operator new((size_t)n, std::align_val_t{64}));
        } catch (const std::bad_alloc &) {
            fail(RWKV_ERROR_MODEL | RWKV_ERROR_ALLOC, "out of memory: %s needs %llu bytes", what,
                 (unsigned long long)n);
        }
        size_ = n;
        prefer_huge_pages(data_.get(), n);
    }
    uint8_t * data() const { return data_.get(); }
    uint64_t size() const { return size_; }

  private:
    struct Free {
        void operator()(uint8_t * p) const { operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    uint64_t size_ = 0;
};

}  // namespace rwkv

#endif
