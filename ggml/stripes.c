/* Repacks matrices from rows of blocks into stripes (kernels.h), the layout they are evaluated
 * from. */
#include <string.h>

#include "fp16.h"
#include "kernels.h"

size_t ggml_stripe_size(enum ggml_type type, size_t cols) {
    return (cols / 32 * ggml_stripe_block(type).size + 63) / 64 * 64;
}

size_t ggml_stripes_size(enum ggml_type type, size_t rows, size_t cols) {
    return (rows + GGML_STRIPE - 1) / GGML_STRIPE * ggml_stripe_size(type, cols);
}

size_t ggml_act_size(size_t cols) {
    return (cols / 32 * sizeof(struct ggml_act) + 63) / 64 * 64;
}

static void put_scale(uint8_t * to, size_t i, float value, bool wide) {
    uint16_t h = fp32_to_fp16(value);
    if (wide) {
        memcpy(to + i * sizeof value, &value, sizeof value);
    } else {
        memcpy(to + i * sizeof h, &h, sizeof h);
    }
}

/* Writes a file block that starts at weight k0 (0 or 16) of lane `row` into a stripe's block. */
GGML_INLINE void put_block(enum ggml_type type, struct ggml_block * block, int k0, int row,
                           uint8_t * to) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    size_t scale = (size_t)(k0 / 16 * GGML_STRIPE + row);
    put_scale(to + at.d, scale, block->d, layout->wide);
    if (layout->min) put_scale(to + at.m, scale, block->m, layout->wide);
    if (layout->outlier) {
        uint16_t index = GGML_NO_OUTLIER;
        if (ggml_block_has_outlier(block)) {
            block->q[block->index] = 0;
            index = (uint16_t)ggml_slot(block->index);
        }
        memcpy(to + at.index + 2 * (size_t)row, &index, sizeof index);
        put_scale(to + at.outlier, (size_t)row, block->outlier, false);
    }
    uint8_t * qs = to + at.qs + 4 * row;
    for (int i = 0; i < layout->size; i++) {
        int k = k0 + i;
        int q = block->q[i];
        if (layout->bits == 8) {
            qs[k / 4 * 64 + k % 4] = (uint8_t)q;
        } else {
            qs[k / 8 * 64 + k % 4] |= (uint8_t)((q & 15) << k % 8 / 4 * 4);
        }
        if (layout->bits == 5) to[at.qh + (size_t)(4 * row + k % 4)] |= (uint8_t)(q >> 4 << k / 4);
    }
}

GGML_INLINE bool pack(enum ggml_type type, size_t rows, size_t cols, const uint8_t * src,
                      uint8_t * dst, size_t first, size_t last, size_t * bad_block) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    size_t block_bytes = ggml_type_traits(type)->block_bytes;
    size_t blocks = cols / layout->size;
    size_t stripe_size = ggml_stripe_size(type, cols);
    for (size_t stripe = first; stripe < last; stripe += GGML_STRIPE) {
        uint8_t * to = dst + stripe / GGML_STRIPE * stripe_size;
        memset(to, 0, stripe_size);
        for (size_t b = 0; b < blocks; b++) {
            int k0 = (int)(b * layout->size % 32);
            uint8_t * stripe_block = to + b * layout->size / 32 * at.size;
            if (layout->outlier && rows - stripe < GGML_STRIPE)
                memset(stripe_block + at.index, 0xFF, 2 * GGML_STRIPE);
            for (size_t row = stripe; row < stripe + GGML_STRIPE && row < rows; row++) {
                struct ggml_block block;
                size_t number = row * blocks + b;
                ggml_block_unpack(type, src + number * block_bytes, &block);
                if (layout->outlier && ggml_block_has_outlier(&block) && block.index >= 32) {
                    *bad_block = number;
                    return false;
                }
                put_block(type, &block, k0, (int)(row - stripe), stripe_block);
            }
        }
    }
    return true;
}

bool ggml_pack_stripes(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last, size_t * bad_block) {
    return pack(type, rows, cols, src, dst, first, last, bad_block);
}
