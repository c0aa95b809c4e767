/* rwkv_error.h: the one exception of this library, and its texts; it never leaves the library (see
 * guard() in rwkv.cpp). */
#ifndef RWKV_ERROR_H
#define RWKV_ERROR_H

#include "rwkv.h"

#include <cstdarg>
#include <cstdio>
#include <string>

#if defined(__MINGW32__)
#define RWKV_LIKE_PRINTF(text, first) __attribute__((format(__MINGW_PRINTF_FORMAT, text, first)))
#elif defined(__GNUC__)
#define RWKV_LIKE_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define RWKV_LIKE_PRINTF(text, first)
#endif

namespace rwkv {

/* Holds its text itself: to report that memory ran out takes no memory. */
struct Error {
    int flags; /* enum rwkv_error_flags: one category | one detail */
    char text[2048];
};

[[noreturn]] RWKV_LIKE_PRINTF(2, 3) inline void fail(int flags, const char * format, ...) {
    Error error{flags, ""};
    va_list args;
    va_start(args, format);
    vsnprintf(error.text, sizeof error.text, format, args);
    va_end(args);
    throw error;
}

inline void need(bool given, const char * what) {
    if (!given) fail(RWKV_ERROR_ARGS, "%s is NULL", what);
}

RWKV_LIKE_PRINTF(1, 2) inline std::string text(const char * format, ...) {
    char buffer[sizeof Error::text];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    return buffer;
}

/* Bytes of a file as they may be shown on a terminal. */
inline std::string escaped(const std::string & bytes) {
    std::string result;
    for (const char c : bytes) {
        const bool plain = c >= ' ' && c <= '~' && c != '\\' && c != '\'';
        result += plain ? std::string(1, c) : text("\\x%02x", (unsigned char)c);
    }
    return result;
}

}  // namespace rwkv

#endif
