/* bfloat16, the upper half of a float, as matrix units take it: rounded to nearest even, denormals
 * zero. In integer arithmetic and static inline like fp16.h. */
#ifndef GGML_BF16_H
#define GGML_BF16_H

#include <stdint.h>
#include <string.h>

/* Without a branch, so that compilers can do many at once. */
static inline uint16_t fp32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
    rounded = magnitude > 0x7F800000 ? bits | 0x400000 : rounded; /* NaN becomes quiet */
    rounded = magnitude < 0x00800000 ? bits & 0x80000000 : rounded;
    return (uint16_t)(rounded >> 16);
}

/* The two numbers in a word. */
static inline float bf16_high(uint32_t word) {
    float f;
    word &= 0xFFFF0000;
    memcpy(&f, &word, sizeof f);
    return f;
}

static inline float bf16_low(uint32_t word) {
    return bf16_high(word << 16);
}

#endif
