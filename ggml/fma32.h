/* a * b + c rounded once to float: by hardware where every CPU of the architecture has it,
 * otherwise without it and without a branch. */
#ifndef GGML_FMA32_H
#define GGML_FMA32_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

_Static_assert(FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16,
               "float operations must round to float (on x86: use -mfpmath=sse)");

#ifdef __ARM_FEATURE_FMA

static inline float fma32(float a, float b, float c) {
    return fmaf(a, b, c);
}

static inline void fma32_lanes(const float a[16], const float b[16], float acc[16]) {
    for (int j = 0; j < 16; j++) acc[j] = fmaf(a[j], b[j], acc[j]);
}

#else

/* The product of two floats is exact in double. Their sum with c is rounded to odd: if double
 * cannot hold it, the last bit is set, so that the final rounding to float sees that something
 * follows. */
static inline float fma32(float a, float b, float c) {
    double product = (double)a * b;
    double sum = product + c;
    double c_part = sum - product;
    double error =
        (product - (sum - c_part)) + (c - c_part); /* exact; NaN if anything overflowed */
    uint64_t sum_bits, error_bits;
    memcpy(&sum_bits, &sum, sizeof sum);
    memcpy(&error_bits, &error, sizeof error);
    /* an even sum that is inexact moves one step towards the true value */
    uint64_t step = (0 - ((sum_bits ^ error_bits) >> 63)) | 1;
    uint64_t inexact = (uint64_t)(error > 0) | (uint64_t)(error < 0);
    sum_bits += (0 - (inexact & ~sum_bits)) & step;
    memcpy(&sum, &sum_bits, sizeof sum);
    return (float)sum;
}

/* acc = a * b + acc in 16 lanes, in vectors if the compiler has any. Rounding to double and again
 * to float goes wrong only where the double is the middle of two floats (of the bits that float has
 * not, the first is set and no other), or less than the smallest normal float. That is rare. */
static inline void fma32_lanes(const float a[16], const float b[16], float acc[16]) {
    double sum[16];
    uint64_t bits[16], rare = 0; /* in bit 63, where the differences are negative */
    for (int j = 0; j < 16; j++) sum[j] = (double)a[j] * b[j] + acc[j];
    memcpy(bits, sum, sizeof bits);
    for (int j = 0; j < 16; j++) {
        rare |= ((bits[j] ^ 0x10000000) & 0x1FFFFFFF) - 1;
        rare |= (bits[j] & 0x7FFFFFFFFFFFFFFF) - 0x3810000000000000;
    }
    if (rare >> 63) {
        for (int j = 0; j < 16; j++) acc[j] = fma32(a[j], b[j], acc[j]);
    } else {
        for (int j = 0; j < 16; j++) acc[j] = (float)sum[j];
    }
}

#endif

#endif
