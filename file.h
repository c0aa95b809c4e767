/* file.h: what the core needs of the operating system: reading, mapping and replacing files,
 * and pages of memory.
 *
 * Everything throws Error with the path and the system's reason. Paths are UTF-8 on Windows and any
 * bytes elsewhere. */
#ifndef RWKV_FILE_H
#define RWKV_FILE_H

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <string>

namespace rwkv {

/* A regular file, opened for reading. Its size is asked for once: what another process makes of the
 * file meanwhile shows as a short read, never as a different size. */
class InputFile {
  public:
    explicit InputFile(const char * path);
    ~InputFile();
    InputFile(const InputFile &) = delete;
    InputFile & operator=(const InputFile &) = delete;

    const char * path() const { return path_.c_str(); }
    uint64_t size() const { return size_; }
    void read(uint64_t offset, void * data, size_t n) const; /* all n bytes, or Error */

  private:
    friend class Mapping;
    std::string path_;
    int fd_;
    uint64_t size_;
};

/* A file's bytes as memory, read-only; the InputFile may go before. */
class Mapping {
  public:
    Mapping() = default;
    ~Mapping();
    Mapping(const Mapping &) = delete;
    Mapping & operator=(const Mapping &) = delete;

    void open(const InputFile & file);
    void prefault(uint64_t offset, uint64_t n) const; /* reads these bytes from disk now */
    const uint8_t * data() const { return data_; }

  private:
    const uint8_t * data_ = nullptr;
    uint64_t size_ = 0;
};

/* Asks for huge pages under memory that has not been written yet, where the system has them:
 * looking small ones up costs a decoding thread a quarter of its speed. */
void prefer_huge_pages(void * data, uint64_t n);

/* A file that appears, or replaces an older one, at commit() and complete, or not at all. Until
 * then its bytes go to `.NAME.PID-RANDOM.tmp` in the same folder, which the destructor removes;
 * what a killed process left there for the same target is removed by the next one. */
class OutputFile {
  public:
    /* Refuses to replace one of the files `sources`; NULL is none. */
    OutputFile(const char * path, std::initializer_list<const char *> sources);
    ~OutputFile();
    OutputFile(const OutputFile &) = delete;
    OutputFile & operator=(const OutputFile &) = delete;

    void write(const void * data, size_t n);
    void commit();

  private:
    std::string path_;
    std::filesystem::path target_, temporary_;
    int fd_ = -1;
};

}  // namespace rwkv

#endif
