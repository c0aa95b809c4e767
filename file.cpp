#define _FILE_OFFSET_BITS 64

#include "file.h"

#include "rwkv_error.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <io.h>
#include <windows.h>
#else
#include <csignal>
#include <dirent.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

namespace rwkv {

// ---- The two families of systems ----------------------------------------------------------------

// Each function is the POSIX call that it is named after: results and errno likewise.
namespace os {

#ifdef _WIN32

static fs::path path(const std::string & text) {
    return fs::u8path(text);
}

static int open_input(const char * name) {
    return _wopen(path(name).c_str(), _O_RDONLY | _O_BINARY | _O_NOINHERIT);
}

static int create_new(const fs::path & name) {
    const int flags = _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT;
    return _wopen(name.c_str(), flags, _S_IREAD | _S_IWRITE);
}

// How much one call is asked for; the C library counts bytes in an unsigned int.
static unsigned piece(size_t n) {
    return (unsigned)std::min<size_t>(n, 1u << 30);
}

static long long pread(int fd, void * data, size_t n, uint64_t offset) {
    if (_lseeki64(fd, (long long)offset, SEEK_SET) < 0) return -1;
    return _read(fd, data, piece(n));
}

static long long write(int fd, const void * data, size_t n) {
    return _write(fd, data, piece(n));
}
static int fsync(int fd) {
    return _commit(fd);
}
static int close(int fd) {
    return _close(fd);
}
static void fsync_folder(const fs::path &) {}
static unsigned long process_id() {
    return GetCurrentProcessId();
}

static bool process_runs(unsigned long id) {
    const HANDLE process = OpenProcess(SYNCHRONIZE, FALSE, id);
    if (process == nullptr) return GetLastError() == ERROR_ACCESS_DENIED;
    const bool runs = WaitForSingleObject(process, 0) == WAIT_TIMEOUT;
    CloseHandle(process);
    return runs;
}

// A folder that can't be listed has no names.
template <class F> static void each_name(const fs::path & folder, F f) try {
    for (const auto & entry : fs::directory_iterator(folder)) f(entry.path().filename().u8string());
} catch (const fs::filesystem_error &) {}

static const void * map(int fd, uint64_t) {
    const HANDLE file = (HANDLE)_get_osfhandle(fd);
    const HANDLE section = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
    if (section == nullptr) return nullptr;
    const void * data = MapViewOfFile(section, FILE_MAP_READ, 0, 0, 0);
    CloseHandle(section);  // the view keeps it
    return data;
}

static void unmap(const void * data, uint64_t) {
    UnmapViewOfFile(data);
}

static bool is_regular(int fd, uint64_t & size) {
    struct _stat64 status;
    if (_fstat64(fd, &status) != 0 || (status.st_mode & _S_IFREG) == 0) return false;
    size = (uint64_t)status.st_size;
    return true;
}

#else

static fs::path path(const std::string & text) {
    return text;
}

// O_NONBLOCK: a FIFO without a writer must not keep us; it changes nothing for regular files.
static int open_input(const char * name) {
    return ::open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
}

static int create_new(const fs::path & name) {
    return ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
}

// Some systems refuse more than INT_MAX bytes at a time.
static size_t piece(size_t n) {
    return std::min<size_t>(n, 1u << 30);
}

static ssize_t pread(int fd, void * data, size_t n, uint64_t offset) {
    return ::pread(fd, data, piece(n), (off_t)offset);
}

static ssize_t write(int fd, const void * data, size_t n) {
    return ::write(fd, data, piece(n));
}
static int fsync(int fd) {
    return ::fsync(fd);
}
static int close(int fd) {
    return ::close(fd);
}

static void fsync_folder(const fs::path & folder) {
    const int fd = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    ::fsync(fd);  // some file systems can't do this to a folder; the file itself is safe already
    ::close(fd);
}

static unsigned long process_id() {
    return (unsigned long)getpid();
}
static bool process_runs(unsigned long id) {
    return kill((pid_t)id, 0) == 0 || errno != ESRCH;
}

// A folder that can't be listed has no names. (GNU's directory_iterator ends the process if memory
// runs out.)
template <class F> static void each_name(const fs::path & folder, F f) {
    const std::unique_ptr<DIR, int (*)(DIR *)> names(opendir(folder.c_str()), closedir);
    while (names != nullptr) {
        const dirent * entry = readdir(names.get());
        if (entry == nullptr) return;
        f(entry->d_name);
    }
}

static const void * map(int fd, uint64_t size) {
    if (size != (size_t)size) return nullptr;
    void * data = mmap(nullptr, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
    return data == MAP_FAILED ? nullptr : data;
}

static void unmap(const void * data, uint64_t size) {
    munmap((void *)data, (size_t)size);
}

static bool is_regular(int fd, uint64_t & size) {
    struct stat status;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return false;
    size = (uint64_t)status.st_size;
    return true;
}

#endif

}  // namespace os

[[noreturn]] static void fail_file(int detail, const std::string & path, const char * step) {
    const int reason = errno;
    fail(RWKV_ERROR_FILE | detail, "%s: %s: %s", path.c_str(), step, std::strerror(reason));
}

// ---- Reading ------------------------------------------------------------------------------------

InputFile::InputFile(const char * path) : path_(path), fd_(os::open_input(path)), size_(0) {
    if (fd_ < 0) fail_file(RWKV_ERROR_FILE_OPEN, path_, "cannot open for reading");
    if (os::is_regular(fd_, size_)) return;
    os::close(fd_);
    std::error_code ignored;
    const bool folder = fs::is_directory(os::path(path_), ignored);
    fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_STAT, "%s: %s", path,
         folder ? "is a folder, not a file" : "is not a regular file");
}

InputFile::~InputFile() {
    os::close(fd_);
}

void InputFile::read(uint64_t offset, void * data, size_t n) const {
    for (size_t done = 0; done < n;) {
        const auto got = os::pread(fd_, (char *)data + done, n - done, offset + done);
        if (got > 0) {
            done += (size_t)got;
        } else if (got == 0) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_READ,
                 "%s: ends at byte %llu now, but had %llu bytes when it was opened", path(),
                 (unsigned long long)(offset + done), (unsigned long long)size_);
        } else if (errno != EINTR) {
            fail_file(RWKV_ERROR_FILE_READ, path_, "cannot read");
        }
    }
}

void Mapping::open(const InputFile & file) {
    data_ = (const uint8_t *)os::map(file.fd_, file.size_);
    size_ = file.size_;
    if (data_ == nullptr) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_ALLOC,
             "%s: cannot map %llu bytes into memory (mmap = false reads the file instead)",
             file.path(), (unsigned long long)size_);
    }
}

Mapping::~Mapping() {
    if (data_ != nullptr) os::unmap(data_, size_);
}

void Mapping::prefault(uint64_t offset, uint64_t n) const {
    const uint64_t page = 4096;  // the smallest there is
    for (uint64_t i = offset; i < offset + n; i += page) {
        (void)*(const volatile uint8_t *)(data_ + i);
    }
    if (n > 0) (void)*(const volatile uint8_t *)(data_ + offset + n - 1);
}

void prefer_huge_pages(void * data, uint64_t n) {
#if defined(__linux__)
    if (n < uint64_t(2) << 20) return;  // not even one
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = (uintptr_t)data / page * page;  // advice begins at one
    madvise((void *)first, (size_t)((uintptr_t)data - first + n), MADV_HUGEPAGE);
#else
    (void)data, (void)n;
#endif
}

// ---- Replacing ----------------------------------------------------------------------------------

// Is `name` a temporary of `target` (`.NAME.PID-RANDOM.tmp`) whose process is gone?
static bool is_stale(const std::string & name, const std::string & target) {
    const std::string prefix = "." + target + ".", suffix = ".tmp";
    if (name.size() < prefix.size() + suffix.size()) return false;
    if (name.compare(0, prefix.size(), prefix) != 0) return false;
    if (name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) return false;
    char * end;
    const unsigned long process = std::strtoul(name.c_str() + prefix.size(), &end, 10);
    return *end == '-' && process > 0 && !os::process_runs(process);
}

static void remove_stale(const fs::path & folder, const std::string & target) {
    os::each_name(folder, [&](const std::string & name) {
        std::error_code ignored;
        if (is_stale(name, target)) fs::remove(folder / os::path(name), ignored);
    });
}

static fs::path folder_of(const fs::path & file) {
    return file.has_parent_path() ? file.parent_path() : fs::path(".");
}

OutputFile::OutputFile(const char * path, std::initializer_list<const char *> sources)
    : path_(path), target_(os::path(path_)) {
    const fs::path folder = folder_of(target_);
    const std::string name = target_.filename().u8string();
    std::error_code ignored;
    for (const char * source : sources) {
        if (source == nullptr || !fs::equivalent(target_, os::path(source), ignored)) continue;
        fail(RWKV_ERROR_ARGS,
             "%s: is the same file as the input (choose another path for the output)", path);
    }
    const fs::file_status status = fs::status(target_, ignored);
    if (name.empty() || (fs::exists(status) && !fs::is_regular_file(status))) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_OPEN, "%s: is not the path of a regular file", path);
    }
    remove_stale(folder, name);

    std::random_device random;
    for (int attempt = 0; fd_ < 0 && attempt < 16; attempt++) {
        char suffix[64];
        snprintf(suffix, sizeof suffix, ".%lu-%08x.tmp", os::process_id(), random());
        temporary_ = folder / os::path("." + name + suffix);
        fd_ = os::create_new(temporary_);
        if (fd_ < 0 && errno != EEXIST) break;
    }
    if (fd_ < 0) fail_file(RWKV_ERROR_FILE_OPEN, path_, "cannot create a file beside it");
}

OutputFile::~OutputFile() {
    if (fd_ >= 0) os::close(fd_);
    std::error_code ignored;
    if (!temporary_.empty()) fs::remove(temporary_, ignored);
}

void OutputFile::write(const void * data, size_t n) {
    for (size_t done = 0; done < n;) {
        const auto put = os::write(fd_, (const char *)data + done, n - done);
        if (put > 0) {
            done += (size_t)put;
        } else if (put == 0 || errno != EINTR) {
            fail_file(RWKV_ERROR_FILE_WRITE, path_, "cannot write");
        }
    }
}

void OutputFile::commit() {
    if (os::fsync(fd_) != 0) fail_file(RWKV_ERROR_FILE_WRITE, path_, "cannot write to disk");
    const int closed = os::close(fd_);
    fd_ = -1;  // gone even where close() reports an error
    if (closed != 0) fail_file(RWKV_ERROR_FILE_WRITE, path_, "cannot close");
    std::error_code error;
    fs::rename(temporary_, target_, error);
    if (error) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_WRITE, "%s: cannot rename %s to it: %s",
             path_.c_str(), temporary_.u8string().c_str(), error.message().c_str());
    }
    temporary_.clear();
    os::fsync_folder(folder_of(target_));
}

}  // namespace rwkv
