/* rwkv_error.h: the one exception of this library; it never leaves it (see guard() in rwkv.cpp). */
#ifndef RWKV_ERROR_H
#define RWKV_ERROR_H

#include <cstdarg>
#include <cstdio>

#ifdef __GNUC__
#define RWKV_LIKE_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define RWKV_LIKE_PRINTF(text, first)
#endif

/* Holds its text itself: to report that memory ran out takes no memory. */
struct Error {
    int flags; /* enum rwkv_error_flags: one category | one detail */
    char text[2048];
};

RWKV_LIKE_PRINTF(2, 3)
[[noreturn]] inline void fail(int flags, const char * format, ...) {
    Error error{flags, ""};
    va_list args;
    va_start(args, format);
    vsnprintf(error.text, sizeof error.text, format, args);
    va_end(args);
    throw error;
}

#endif
