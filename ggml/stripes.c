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
    return (ggml_act_offset(cols) + 63) / 64 * 64;
}

size_t ggml_act_offset(size_t k) {
    return k / 32 * sizeof(struct ggml_act);
}

static void put_scale(uint8_t * to, size_t i, float value, bool wide) {
    uint16_t h = fp32_to_fp16(value);
    if (wide) {
        memcpy(to + i * sizeof value, &value, sizeof value);
    } else {
        memcpy(to + i * sizeof h, &h, sizeof h);
    }
}

/* Adds the codes of a block to lane `row`, four or eight at a time (little-endian, as the files).
 */
static void put_codes(const struct ggml_layout * layout, const struct ggml_stripe_block * at,
                      const uint8_t * q, int k0, int row, uint8_t * to) {
    uint32_t * qs = (uint32_t *)(void *)(to + at->qs) + row;
    if (layout->bits == 8) {
        for (int u = 0; u < 8; u++) memcpy(qs + u * GGML_STRIPE, q + 4 * u, 4);
        return;
    }
    for (int j = 0; j < layout->size / 8; j++) {
        uint32_t low, high;
        memcpy(&low, q + 8 * j, sizeof low);
        memcpy(&high, q + 8 * j + 4, sizeof high);
        qs[(k0 / 8 + j) * GGML_STRIPE] = (low & 0x0F0F0F0F) | (high & 0x0F0F0F0F) << 4;
    }
    if (layout->bits == 5) {
        uint32_t fifth = 0;
        for (int u = 0; u < 8; u++) {
            uint32_t codes;
            memcpy(&codes, q + 4 * u, sizeof codes);
            fifth |= (codes >> 4 & 0x01010101) << u;
        }
        memcpy(to + at->qh + (size_t)(4 * row), &fifth, sizeof fifth);
    }
}

/* Writes a file block that starts at weight k0 (0 or 16) of lane `row` into a stripe's block. */
static void put_block(const struct ggml_layout * layout, const struct ggml_stripe_block * at,
                      struct ggml_block * block, int k0, int row, uint8_t * to) {
    size_t scale = (size_t)(k0 / 16 * GGML_STRIPE + row);
    put_scale(to + at->d, scale, block->d, layout->wide);
    if (layout->min) put_scale(to + at->m, scale, block->m, layout->wide);
    if (layout->outlier) {
        uint16_t index = GGML_NO_OUTLIER;
        if (ggml_block_has_outlier(block)) {
            block->q[block->index] = 0;
            index = (uint16_t)ggml_slot(block->index);
        }
        memcpy(to + at->index + 2 * (size_t)row, &index, sizeof index);
        put_scale(to + at->outlier, (size_t)row, block->outlier, false);
    }
    put_codes(layout, at, block->q, k0, row, to);
}

bool ggml_pack_stripes(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last, size_t * bad_block) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const size_t block_bytes = ggml_type_traits(type)->block_bytes;
    const size_t blocks = cols / layout->size;
    const size_t stripe_size = ggml_stripe_size(type, cols);
    for (size_t stripe = first; stripe < last; stripe += GGML_STRIPE) {
        uint8_t * to = (uint8_t *)dst + stripe / GGML_STRIPE * stripe_size;
        memset(to, 0, stripe_size);
        for (size_t b = 0; b < blocks; b++) {
            const int k0 = (int)(b * layout->size % 32);
            uint8_t * stripe_block = to + b * layout->size / 32 * at.size;
            if (layout->outlier) memset(stripe_block + at.index, 0xFF, 2 * GGML_STRIPE);
            for (size_t row = stripe; row < stripe + GGML_STRIPE && row < rows; row++) {
                struct ggml_block block;
                const size_t number = row * blocks + b;
                ggml_block_unpack(type, (const uint8_t *)src + number * block_bytes, &block);
                if (layout->outlier && ggml_block_has_outlier(&block) && block.index >= 32) {
                    *bad_block = number;
                    return false;
                }
                put_block(layout, &at, &block, k0, (int)(row - stripe), stripe_block);
            }
        }
    }
    return true;
}
