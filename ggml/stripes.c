/* Repacks matrices from rows of blocks into stripes (kernels.h), the layout they are evaluated
 * from. */
#include <string.h>

#include "bf16.h"
#include "fp16.h"
#include "kernels.h"

size_t ggml_stripe_size(enum ggml_type type, size_t cols) {
    if (type == GGML_TYPE_FP32 || type == GGML_TYPE_FP16) return 0;
    if (type == GGML_TYPE_BF16) return (cols + 31) / 32 * GGML_BF16_BLOCK;
    return (cols / 32 * ggml_stripe_block(type).size + 63) / 64 * 64;
}

size_t ggml_stripes_size(enum ggml_type type, size_t rows, size_t cols) {
    return (rows + GGML_STRIPE - 1) / GGML_STRIPE * ggml_stripe_size(type, cols);
}

size_t ggml_act_size(size_t cols) {
    return ((cols + 31) / 32 * sizeof(struct ggml_act) + 63) / 64 * 64;
}

/* Copies a field of 2 or 4 bytes from the blocks of `rows` rows, `stride` bytes apart, to lanes of
 * their own; returns where the next field begins. */
static const uint8_t * copy_field(const uint8_t * from, size_t stride, size_t rows, size_t size,
                                  uint8_t * to) {
    if (size == 4) {
        for (size_t row = 0; row < rows; row++) memcpy(to + 4 * row, from + row * stride, 4);
    } else {
        for (size_t row = 0; row < rows; row++) memcpy(to + 2 * row, from + row * stride, 2);
    }
    return from + size;
}

/* Exchanges the bits under the mask with those `distance` places above them. */
static uint32_t exchange(uint32_t x, int distance, uint32_t mask) {
    const uint32_t differences = (x ^ x >> distance) & mask;
    return x ^ differences ^ differences << distance;
}

/* The nibbles of 32 weights, four words of each row: from the file's order (0, 1, 2, …; split: 0,
 * 16, 1, 17, …) to that of stripes (0, 4, 1, 5, 2, 6, 3, 7, 8, …). Compilers do several rows at
 * once, here and below. */
static void order_nibbles(bool split, uint32_t qs[4][GGML_STRIPE]) {
    const uint32_t low = 0x0F0F0F0F, high = 0xF0F0F0F0;
    for (int row = 0; row < GGML_STRIPE; row++) {
        const uint32_t w[4] = {qs[0][row], qs[1][row], qs[2][row], qs[3][row]};
        if (split) {
            qs[0][row] = (w[0] & low) | (w[1] << 4 & high);
            qs[1][row] = (w[2] & low) | (w[3] << 4 & high);
            qs[2][row] = (w[0] >> 4 & low) | (w[1] & high);
            qs[3][row] = (w[2] >> 4 & low) | (w[3] & high);
        } else {
            for (int j = 0; j < 4; j++)
                qs[j][row] = exchange(exchange(w[j], 8, 0x0000FF00), 4, 0x00F000F0);
        }
    }
}

/* Bit k goes to 8 * (k % 4) + k / 4: the five digits of a place are rotated by two, pair by pair.
 */
static void order_fifth_bits(uint32_t qh[GGML_STRIPE]) {
    for (int row = 0; row < GGML_STRIPE; row++) {
        const uint32_t x = exchange(exchange(qh[row], 14, 0x0000CCCC), 7, 0x00AA00AA);
        qh[row] = exchange(exchange(x, 2, 0x0C0C0C0C), 1, 0x22222222);
    }
}

/* From a column to its slot, and the codes of outliers to 0. Returns the first row whose index is
 * none that a writer makes, or `rows`. */
static size_t order_outliers(size_t rows, uint16_t index[GGML_STRIPE],
                             const uint16_t outlier[GGML_STRIPE], uint32_t qs[4][GGML_STRIPE]) {
    for (size_t row = 0; row < rows; row++) {
        const int k = index[row];
        if (k == GGML_NO_OUTLIER && (outlier[row] & 0x7FFF) == 0) continue; /* 0 or -0 */
        if (k >= 32) return row;
        qs[k / 8][row] &= ~(15u << (8 * (k % 4) + k % 8 / 4 * 4));
        index[row] = (uint16_t)ggml_slot(k);
    }
    return rows;
}

bool ggml_pack_stripes(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last, size_t * bad_block) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const size_t block_size = ggml_type_traits(type)->block_bytes;
    const size_t row_size = ggml_row_size(type, cols), stripe_size = ggml_stripe_size(type, cols);
    const size_t scale = layout->wide ? 4 : 2, parts = 32u / layout->size;
    const size_t words = (size_t)layout->size * (layout->bits == 8 ? 8 : 4) / 32;
    for (; first < last; first += GGML_STRIPE) {
        const uint8_t * from = (const uint8_t *)src + first * row_size;
        uint8_t * block = (uint8_t *)dst + first / GGML_STRIPE * stripe_size;
        uint8_t * end = block + stripe_size;
        const size_t present = rows - first < GGML_STRIPE ? rows - first : GGML_STRIPE;
        for (size_t k = 0; k < cols; k += 32, block += at.size) {
            uint32_t (*qs)[GGML_STRIPE] = (uint32_t (*)[GGML_STRIPE])(void *)(block + at.qs);
            uint16_t * index = (uint16_t *)(void *)(block + at.index);
            if (present < GGML_STRIPE) memset(block, 0, at.size);
            if (layout->outlier) memset(index, 0xFF, 2 * GGML_STRIPE);
            for (size_t part = 0; part < parts; part++, from += block_size) {
                const size_t lanes = part * scale * GGML_STRIPE;
                const uint8_t * field = from;
#define COPY(SIZE, TO) field = copy_field(field, row_size, present, SIZE, TO)
                COPY(scale, block + at.d + lanes);
                if (layout->min) COPY(scale, block + at.m + lanes);
                if (layout->outlier) COPY(2, block + at.index);
                if (layout->outlier) COPY(2, block + at.outlier);
                if (layout->bits == 5) COPY(4, block + at.qh);
                for (size_t j = 0; j < words; j++) COPY(4, (uint8_t *)qs[part * words + j]);
#undef COPY
            }
            if (layout->bits < 8) order_nibbles(layout->split, qs);
            if (layout->bits == 5) order_fifth_bits((uint32_t *)(void *)(block + at.qh));
            if (!layout->outlier) continue;
            const size_t bad = order_outliers(
                present, index, (const uint16_t *)(const void *)(block + at.outlier), qs);
            if (bad == present) continue;
            *bad_block = ((first + bad) * cols + k) / 32;
            return false;
        }
        memset(block, 0, (size_t)(end - block));
    }
    return true;
}

/* Up to 32 weights of a row as words of bf16; zeros after them. */
GGML_INLINE void round_weights(enum ggml_type type, const uint8_t * from, size_t n,
                               uint32_t words[GGML_BF16_WORDS]) {
    float x[32] = {0};
    uint16_t rounded[32];
    if (type == GGML_TYPE_FP32) {
        memcpy(x, from, n * sizeof *x);
    } else {
        uint16_t h[32] = {0};
        memcpy(h, from, n * sizeof *h);
        for (int k = 0; k < 32; k++) x[k] = fp16_to_fp32(h[k]);
    }
    for (int k = 0; k < 32; k++) rounded[k] = fp32_to_bf16(x[k]);
    for (int p = 0; p < GGML_BF16_WORDS; p++) {
        const int column = ggml_bf16_column(p);
        words[p] = (uint32_t)rounded[column] << 16 | rounded[column + 2];
    }
}

/* The same of up to 16 rows, side by side. */
GGML_INLINE void pack_bf16_block(enum ggml_type type, const uint8_t * from, size_t row_size,
                                 size_t rows, size_t n, uint32_t (*words)[GGML_STRIPE]) {
    uint32_t of_row[GGML_STRIPE][GGML_BF16_WORDS] = {{0}};
    for (size_t row = 0; row < rows; row++)
        round_weights(type, from + row * row_size, n, of_row[row]);
    for (int p = 0; p < GGML_BF16_WORDS; p++)
        for (int row = 0; row < GGML_STRIPE; row++) words[p][row] = of_row[row][p];
}

GGML_INLINE void pack_bf16(enum ggml_type type, size_t rows, size_t cols, const uint8_t * src,
                           uint8_t * dst, size_t first, size_t last) {
    const size_t row_size = ggml_row_size(type, cols), step = ggml_row_size(type, 32);
    for (; first < last; first += GGML_STRIPE) {
        const uint8_t * from = src + first * row_size;
        uint8_t * to = dst + first / GGML_STRIPE * ggml_stripe_size(GGML_TYPE_BF16, cols);
        const size_t present = rows - first < GGML_STRIPE ? rows - first : GGML_STRIPE;
        size_t left = cols;
        for (; left >= 32; left -= 32, from += step, to += GGML_BF16_BLOCK)
            pack_bf16_block(type, from, row_size, present, 32, (void *)to);
        if (left > 0) pack_bf16_block(type, from, row_size, present, left, (void *)to);
    }
}

void ggml_pack_bf16(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                    size_t first, size_t last) {
    if (type == GGML_TYPE_FP16) {
        pack_bf16(GGML_TYPE_FP16, rows, cols, src, dst, first, last);
    } else {
        pack_bf16(GGML_TYPE_FP32, rows, cols, src, dst, first, last);
    }
}
