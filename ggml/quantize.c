/* The definition of each quantized format: from weights to codes and scales, and how these are
 * packed.
 *
 * Each rule is that of its own time, April 2023 for version 100 (May for Q5_0, Q5_1 and Q8_0, which
 * came then) and version 101's for the rest; files are compared byte by byte, so the order of float
 * operations matters and none may be fused. 1/d is taken from the float scale even where a half is
 * stored. Of equal weights the first is the minimum, maximum or largest; -0 equals 0.
 *
 * Where a rule leaves C (1/d is infinite because |d| < 2^-128, d overflows, a weight is not finite)
 * the code is clamped into its range, and NaN becomes the lowest. */
#include <math.h>

#include "blocks.h"
#include "fp16.h"

/* ---- Rules ---------------------------------------------------------------------------------- */

static uint8_t code(float value, int low, int high) {
    int q = value > (float)low ? (value < (float)high ? (int)value : high) : low;
    return (uint8_t)q;
}

/* Rounded to nearest, halves away from zero: what roundf does, without a call for each weight. */
static uint8_t nearest_code(float value, int low, int high) {
    float clamped = value > (float)low ? (value < (float)high ? value : (float)high) : (float)low;
    int q = (int)clamped;
    float rest = clamped - (float)q;
    return (uint8_t)(q + (rest >= 0.5f) - (rest <= -0.5f));
}

static float reciprocal(float d) {
    return d != 0 ? 1 / d : 0;
}

/* The weight of largest magnitude, sign kept; +0 if all are zero. */
static float largest(const float * x, int n) {
    float top = 0;
    for (int k = 0; k < n; k++)
        if (fabsf(x[k]) > fabsf(top)) top = x[k];
    return top;
}

static const struct ggml_block no_outlier = {.index = GGML_NO_OUTLIER};

/* Q4_0 of version 101 (half = 8) and Q5_0 (16): the largest weight gets code 0, exactly. */
static void encode_signed(const float * x, int half, struct ggml_block * block) {
    *block = no_outlier;
    block->d = largest(x, 32) / (float)-half;
    float id = reciprocal(block->d);
    for (int k = 0; k < 32; k++)
        block->q[k] = code(x[k] * id + ((float)half + 0.5f), 0, 2 * half - 1);
}

/* Equal steps from the minimum to the maximum of the weights other than `skip` (n skips none). */
static void encode_min(const float * x, int n, int levels, bool round, int skip,
                       struct ggml_block * block) {
    int first = skip == 0 ? 1 : 0;
    float min = x[first], max = x[first];
    for (int k = first; k < n; k++) {
        if (k == skip) continue;
        if (x[k] < min) min = x[k];
        if (x[k] > max) max = x[k];
    }
    block->d = (max - min) / (float)levels;
    block->m = min;
    float id = reciprocal(block->d);
    for (int k = 0; k < n; k++) {
        float steps = (x[k] - min) * id;
        block->q[k] = round ? nearest_code(steps, 0, levels) : code(steps + 0.5f, 0, levels);
    }
}

void ggml_encode_q4_0_v100(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    block->d = fabsf(largest(x, 32)) / 7;
    float id = reciprocal(block->d);
    for (int k = 0; k < 32; k++) block->q[k] = (uint8_t)(nearest_code(x[k] * id, -8, 7) + 8);
}

void ggml_encode_q4_0(const float * x, struct ggml_block * block) {
    encode_signed(x, 8, block);
}

void ggml_encode_q5_0(const float * x, struct ggml_block * block) {
    encode_signed(x, 16, block);
}

void ggml_encode_q4_1_v100(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    encode_min(x, 32, 15, true, 32, block);
}

void ggml_encode_q4_1(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    encode_min(x, 32, 15, false, 32, block);
}

void ggml_encode_q4_3(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    encode_min(x, 16, 15, false, 16, block);
}

void ggml_encode_q5_1(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    encode_min(x, 32, 31, false, 32, block);
}

/* The first weight of largest magnitude is kept apart; a block of zeros has none. */
void ggml_encode_q4_1_o(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    int index = 32;
    for (int k = 0; k < 32; k++) {
        if (fabsf(x[k]) > fabsf(block->outlier)) {
            block->outlier = x[k];
            index = k;
        }
    }
    encode_min(x, 32, 15, true, index, block);
    if (index < 32) {
        block->index = (uint16_t)index;
        block->q[index] = 0;
    }
}

void ggml_encode_q8_0(const float * x, struct ggml_block * block) {
    *block = no_outlier;
    block->d = fabsf(largest(x, 32)) / 127;
    float id = reciprocal(block->d);
    for (int k = 0; k < 32; k++) block->q[k] = nearest_code(x[k] * id, -128, 127);
}

/* The nearest level in -8..7, ties to even; adding 1.5 * 2^23 leaves no room for a fraction. */
static float level(float value) {
    float nearest = (value + 12582912.0f) - 12582912.0f;
    return nearest > -8 ? (nearest < 7 ? nearest : 7) : -8;
}

/* Q4_2 tries eight scales of either sign and keeps the one that fits best in least squares. */
void ggml_encode_q4_2(const float * x, struct ggml_block * block) {
    static const float candidates[] = {8.7f, 8.3f, 8.1f, 7.8f, 7.3f, 7.0f, 6.3f, 5.7f};
    float amax = fabsf(largest(x, 16));
    float best = 0, best_scale = 0;
    for (size_t c = 0; c < sizeof candidates / sizeof *candidates; c++) {
        float scale = candidates[c] / amax;
        float plus = 0, minus = 0;   /* sums of x * level */
        float plus2 = 0, minus2 = 0; /* sums of level squared, at most 16 * 64: exact */
        for (int k = 0; k < 16; k++) {
            float l = level(x[k] * scale);
            plus += x[k] * l;
            plus2 += l * l;
            l = level(-(x[k] * scale));
            minus += x[k] * l;
            minus2 += l * l;
        }
        bool positive = plus * plus * minus2 > minus * minus * plus2;
        float top = positive ? plus * plus : minus * minus;
        float sum2 = positive ? plus2 : minus2;
        if (top > best * sum2) {
            best = top / sum2;
            best_scale = positive ? scale : -scale;
        }
    }
    *block = no_outlier;
    if (best_scale == 0) { /* zeros, or so small that their squares vanish */
        block->d = 1;
        memset(block->q, 8, 16);
        return;
    }
    float sum = 0, sum2 = 0;
    for (int k = 0; k < 16; k++) {
        float l = level(x[k] * best_scale);
        sum += x[k] * l;
        sum2 += l * l;
        block->q[k] = (uint8_t)(l + 8);
    }
    block->d = sum / sum2;
}

/* ---- Bytes ---------------------------------------------------------------------------------- */

static uint8_t * put_scale(uint8_t * to, float value, bool wide) {
    uint16_t h = fp32_to_fp16(value);
    if (wide) {
        memcpy(to, &value, sizeof value);
    } else {
        memcpy(to, &h, sizeof h);
    }
    return to + (wide ? sizeof value : sizeof h);
}

static const uint8_t * get_scale(const uint8_t * from, float * value, bool wide) {
    if (wide) {
        memcpy(value, from, sizeof *value);
        return from + sizeof *value;
    }
    uint16_t h;
    memcpy(&h, from, sizeof h);
    *value = fp16_to_fp32(h);
    return from + sizeof h;
}

void ggml_block_pack(enum ggml_type type, const struct ggml_block * block, uint8_t * bytes) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const uint8_t * q = block->q;
    bytes = put_scale(bytes, block->d, layout->wide);
    if (layout->min) bytes = put_scale(bytes, block->m, layout->wide);
    if (layout->outlier) {
        memcpy(bytes, &block->index, sizeof block->index);
        bytes = put_scale(bytes + sizeof block->index, block->outlier, false);
    }
    if (layout->bits == 8) {
        memcpy(bytes, q, layout->size);
        return;
    }
    if (layout->bits == 5) {
        memset(bytes, 0, 4);
        for (int k = 0; k < 32; k++) bytes[k / 8] |= (uint8_t)(q[k] >> 4 << k % 8);
        bytes += 4;
    }
    for (int j = 0; j < layout->size / 2; j++) {
        int low = q[layout->split ? j : 2 * j];
        int high = q[layout->split ? j + 16 : 2 * j + 1];
        bytes[j] = (uint8_t)((low & 15) | (high & 15) << 4);
    }
}

/* Loading a model calls this for each block: two plain loops, which compilers turn into vectors. */
static void unpack_nibbles(const uint8_t * bytes, const struct ggml_layout * layout, uint8_t * q) {
    uint8_t qs[16] = {0};
    memcpy(qs, bytes, layout->size / 2u);
    if (layout->split) { /* blocks of 32 only */
        for (int j = 0; j < 16; j++) q[j] = qs[j] & 15;
        for (int j = 0; j < 16; j++) q[j + 16] = qs[j] >> 4;
    } else {
        uint8_t pairs[32];
        for (int j = 0; j < 16; j++) {
            pairs[2 * j] = qs[j] & 15;
            pairs[2 * j + 1] = qs[j] >> 4;
        }
        memcpy(q, pairs, sizeof pairs);
    }
}

/* Adds the fifth bits, eight codes at a time: each bit of a byte is brought into a byte of its own.
 */
static void unpack_fifth(const uint8_t * qh, uint8_t * q) {
    for (int i = 0; i < 4; i++) {
        uint64_t codes;
        uint64_t bits = qh[i] * 0x0101010101010101u & 0x8040201008040201u;
        bits = (bits + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
        memcpy(&codes, q + 8 * i, sizeof codes);
        codes |= bits << 4;
        memcpy(q + 8 * i, &codes, sizeof codes);
    }
}

void ggml_block_unpack(enum ggml_type type, const uint8_t * bytes, struct ggml_block * block) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    *block = no_outlier;
    bytes = get_scale(bytes, &block->d, layout->wide);
    if (layout->min) bytes = get_scale(bytes, &block->m, layout->wide);
    if (layout->outlier) {
        memcpy(&block->index, bytes, sizeof block->index);
        bytes = get_scale(bytes + sizeof block->index, &block->outlier, false);
    }
    if (layout->bits == 8) {
        memcpy(block->q, bytes, layout->size);
    } else if (layout->bits == 5) {
        unpack_nibbles(bytes + 4, layout, block->q);
        unpack_fifth(bytes, block->q);
    } else {
        unpack_nibbles(bytes, layout, block->q);
    }
}
