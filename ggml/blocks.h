/* How a block of weights lies in a file: one table drives packing, unpacking, stripes and kernels.
 *
 * A block is, without padding and little-endian,
 *
 *     d        scale                                      float or half
 *     m        minimum, if the format has one             float or half
 *     index    outlier's place, if the format has one     uint16
 *     outlier  its value                                  half
 *     qh[4]    fifth bits, bit k belongs to weight k      if codes have 5 bits
 *     qs[]     codes: nibbles, or signed bytes            size / 2 or size bytes
 *
 * and means w = d * (q - zero), or w = d * q + m; an outlier replaces its weight. */
#ifndef GGML_BLOCKS_H
#define GGML_BLOCKS_H

#include "ggml.h"

struct ggml_layout {
    uint8_t size; /* weights per block; 0 for FP32, FP16 and BF16: no blocks */
    uint8_t bits; /* of a code: 4, 5 or 8 */
    uint8_t zero; /* the code that means 0; Q8_0's codes are signed */
    bool min;     /* has m */
    bool outlier; /* has index and outlier */
    bool wide;    /* d and m are floats, otherwise halves */
    bool split;   /* nibbles of byte j: weights j and j + size / 2; otherwise 2j and 2j + 1 */
};

static const struct ggml_layout ggml_layouts[GGML_TYPE_COUNT] = {
    [GGML_TYPE_Q4_0_V100] = {.size = 32, .bits = 4, .zero = 8, .wide = true},
    [GGML_TYPE_Q4_1_V100] = {.size = 32, .bits = 4, .min = true, .wide = true},
    [GGML_TYPE_Q4_1_O] = {.size = 32, .bits = 4, .min = true, .outlier = true},
    [GGML_TYPE_Q4_2] = {.size = 16, .bits = 4, .zero = 8},
    [GGML_TYPE_Q4_3] = {.size = 16, .bits = 4, .min = true},
    [GGML_TYPE_Q5_0_V100] = {.size = 32, .bits = 5, .zero = 16},
    [GGML_TYPE_Q5_1_V100] = {.size = 32, .bits = 5, .min = true},
    [GGML_TYPE_Q8_0_V100] = {.size = 32, .bits = 8, .wide = true},
    [GGML_TYPE_Q4_0] = {.size = 32, .bits = 4, .zero = 8, .split = true},
    [GGML_TYPE_Q4_1] = {.size = 32, .bits = 4, .min = true, .split = true},
    [GGML_TYPE_Q5_0] = {.size = 32, .bits = 5, .zero = 16, .split = true},
    [GGML_TYPE_Q5_1] = {.size = 32, .bits = 5, .min = true, .split = true},
    [GGML_TYPE_Q8_0] = {.size = 32, .bits = 8, .split = true},
};

#define GGML_NO_OUTLIER 0xFFFF

/* A block taken apart. */
struct ggml_block {
    uint8_t q[GGML_ROW_UNIT]; /* codes in the order of the weights; Q8_0: two's complement */
    float d;
    float m;
    float outlier;
    uint16_t index; /* as stored, or GGML_NO_OUTLIER */
};

/* Readers take the outlier's index modulo 32; only these two together mean that there is none. */
static inline bool ggml_block_has_outlier(const struct ggml_block * block) {
    return block->index != GGML_NO_OUTLIER || block->outlier != 0;
}

/* quantize.c: between the two forms; scales are rounded to what the layout holds. */
void ggml_block_pack(enum ggml_type type, const struct ggml_block * block, uint8_t * bytes);
void ggml_block_unpack(enum ggml_type type, const uint8_t * bytes, struct ggml_block * block);

/* quantize.c: size weights -> codes and scales, the rules of each format. */
typedef void ggml_encode(const float * x, struct ggml_block * block);
ggml_encode ggml_encode_q4_0_v100, ggml_encode_q4_1_v100, ggml_encode_q4_1_o, ggml_encode_q4_2,
    ggml_encode_q4_3, ggml_encode_q4_0, ggml_encode_q4_1, ggml_encode_q5_0, ggml_encode_q5_1,
    ggml_encode_q8_0;

#endif
