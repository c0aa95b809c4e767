/* For the C tests: counted checks and reproducible random numbers. */
#ifndef CHECK_H
#define CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int passed, failed;

#if defined(__MINGW32__)
__attribute__((format(__MINGW_PRINTF_FORMAT, 2, 3)))
#elif defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static inline bool check(bool ok, const char * format, ...) {
    if (ok) {
        passed++;
        return true;
    }
    failed++;
    va_list arguments;
    va_start(arguments, format);
    printf("FAILED: ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    return false;
}

/* What main returns. */
static inline int finish(void) {
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

static uint64_t random_state = 0x9E3779B97F4A7C15;

/* xorshift64*, upper half */
static inline uint32_t random_bits(void) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 0x2545F4914F6CDD1D >> 32);
}

static inline uint32_t random_below(uint32_t n) {
    return (uint32_t)((uint64_t)random_bits() * n >> 32);
}

/* About normal: the sum of four uniform numbers, variance 1. */
static inline float random_normal(void) {
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += (float)random_below(1 << 20) / (1 << 19) - 1;
    return sum * 0.8660254f;
}

static inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* Any NaN equals any other; otherwise bit for bit. */
static inline bool same(float a, float b) {
    return bits_of(a) == bits_of(b) || (a != a && b != b);
}

#endif
