// The definitions here come before those of the C and C++ libraries when the dynamic linker looks
// for them, so that librwkv, too, is served by these. Linux only.
#include "fault_injection.h"

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstddef>
#include <cstdlib>
#include <new>

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

static std::atomic<int> armed{FAULT_NONE};
static std::atomic<long> calls_left{0};
static std::atomic<size_t> aligned_bytes{0};

void fault_arm(fault kind, long nth) {
    calls_left = nth;
    armed = kind;
}

bool fault_disarm() {
    armed = FAULT_NONE;
    return calls_left <= 0;
}

bool fault_throw(void *, uint64_t, uint64_t) {
    throw 1;
}

size_t fault_aligned_bytes() {
    return aligned_bytes;
}

static bool fails(fault kind) {
    return armed == kind && --calls_left == 0;
}

static void * take(size_t n, size_t alignment) noexcept {
    void * p = nullptr;
    if (fails(FAULT_NEW) || posix_memalign(&p, alignment, n) != 0) return nullptr;
    if (alignment > alignof(max_align_t) && n >= 1024) aligned_bytes += n;
    return p;
}

static void * take_or_throw(size_t n, size_t alignment) {
    void * p = take(n, alignment);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}

using Align = std::align_val_t;
constexpr size_t PLAIN = alignof(max_align_t);

void * operator new(size_t n) {
    return take_or_throw(n, PLAIN);
}
void * operator new(size_t n, Align a) {
    return take_or_throw(n, (size_t)a);
}
void * operator new(size_t n, const std::nothrow_t &) noexcept {
    return take(n, PLAIN);
}
void * operator new(size_t n, Align a, const std::nothrow_t &) noexcept {
    return take(n, (size_t)a);
}
void operator delete(void * p) noexcept {
    std::free(p);
}
void operator delete(void * p, size_t) noexcept {
    std::free(p);
}
void operator delete(void * p, std::align_val_t) noexcept {
    std::free(p);
}
void operator delete(void * p, size_t, std::align_val_t) noexcept {
    std::free(p);
}

extern "C" {

ssize_t pread64(int fd, void * data, size_t n, off64_t offset) {
    if (fails(FAULT_READ)) return errno = EIO, -1;
    return syscall(SYS_pread64, fd, data, n, offset);
}

ssize_t write(int fd, const void * data, size_t n) {
    if (fails(FAULT_WRITE)) return errno = ENOSPC, -1;
    return syscall(SYS_write, fd, data, n);
}

int fsync(int fd) {
    if (fails(FAULT_FSYNC)) return errno = EIO, -1;
    return (int)syscall(SYS_fsync, fd);
}

int close(int fd) {
    const int closed = (int)syscall(SYS_close, fd);
    if (fails(FAULT_CLOSE)) return errno = EIO, -1;
    return closed;
}

int rename(const char * from, const char * to) noexcept {
    if (fails(FAULT_RENAME)) return errno = EACCES, -1;
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
}
