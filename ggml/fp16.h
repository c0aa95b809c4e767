/* IEEE binary16 <-> binary32 in integer arithmetic: independent of rounding mode and of flags that
 * flush denormals. Static inline, so that every file has its own copy for its own instruction set.
 */
#ifndef GGML_FP16_H
#define GGML_FP16_H

#include <stdint.h>
#include <string.h>

/* Without a branch, so that compilers can do many at once. */
static inline float fp16_to_fp32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t magnitude = h & 0x7FFF;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    uint32_t special = normal + (112u << 23); /* infinity; NaN becomes quiet */
    special |= (uint32_t)(magnitude > 0x7C00) << 22;
    /* denormal or zero: a whole number of 2^-24, made exactly */
    float f = (float)(int32_t)magnitude * 5.9604644775390625e-8f;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    /* masks: where a condition chooses, gcc jumps around what is not chosen */
    const uint32_t is_denormal = 0 - (uint32_t)(magnitude < 0x0400);
    const uint32_t is_special = 0 - (uint32_t)(magnitude >= 0x7C00);
    bits = (bits & is_denormal) | (special & is_special) | (normal & ~(is_denormal | is_special));
    bits |= sign;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Rounded to nearest even; 65520 and more become infinity. */
static inline uint16_t fp32_to_fp16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    uint32_t h;
    if (bits > 0x7F800000) {
        h = 0x7E00 | (bits >> 13 & 0x3FF);
    } else if (bits >= 0x477FF000) {
        h = 0x7C00;
    } else if (bits >= 0x38800000) { /* a normal half */
        uint32_t shifted = bits - (112u << 23);
        h = (shifted + 0xFFF + (shifted >> 13 & 1)) >> 13;
    } else if (bits > 0x33000000) { /* a denormal half, more than half of the smallest */
        uint32_t shift = 126 - (bits >> 23);
        uint32_t mantissa = (bits & 0x7FFFFF) | 0x800000;
        uint32_t half = 1u << (shift - 1);
        h = (mantissa + half - 1 + (mantissa >> shift & 1)) >> shift;
    } else {
        h = 0;
    }
    return (uint16_t)(sign | h);
}

#endif
