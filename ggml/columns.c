/* Copies matrices by columns, the layout of columns.h. */
#include "columns.h"

enum { BLOCK = 32 /* rows and columns that are turned round at a time: a cache line of halves */ };

size_t ggml_columns_size(enum ggml_type type, size_t rows, size_t cols) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    if (layout->bits == 8)
        return cols * ggml_codes_size(rows) + cols / 32 * ggml_code_scales_size(rows, layout->wide);
    if (type != GGML_TYPE_FP32 && type != GGML_TYPE_FP16) return 0;
    return cols * ggml_column_size(rows, type == GGML_TYPE_FP32);
}

/* At most BLOCK rows; the first one's place in the first column is `to`. */
GGML_INLINE void pack_rows(size_t size, size_t rows, size_t cols, size_t column_size,
                           const uint8_t * src, uint8_t * to) {
    uint8_t block[BLOCK][BLOCK * sizeof(float)] = {{0}};
    uint8_t column[BLOCK * sizeof(float)];
    for (size_t k0 = 0; k0 < cols; k0 += BLOCK) {
        const size_t n = cols - k0 < BLOCK ? cols - k0 : BLOCK;
        for (size_t r = 0; r < rows; r++) memcpy(block[r], src + (r * cols + k0) * size, n * size);
        for (size_t k = 0; k < n; k++) {
            for (size_t r = 0; r < BLOCK; r++) memcpy(column + r * size, block[r] + k * size, size);
            memcpy(to + ggml_column(cols, k0 + k) * column_size, column, BLOCK * size);
        }
    }
}

/* At most BLOCK rows of Q8_0 from row `first` on, a multiple of it; none of them exist beyond
 * `count`. */
GGML_INLINE void pack_codes(enum ggml_type type, size_t rows, size_t cols, const uint8_t * src,
                            uint8_t * dst, size_t first, size_t count) {
    const bool wide = ggml_layouts[type].wide;
    const size_t width = wide ? 4 : 2, size = ggml_codes_size(rows);
    uint8_t * scales = dst + cols * size + first * width;
    for (size_t k = 0; k < cols; k += 32, scales += ggml_code_scales_size(rows, wide)) {
        uint8_t codes[32][BLOCK];
        memset(codes, 128, sizeof codes);
        memset(scales, 0, BLOCK * width);
        for (size_t r = 0; r < count; r++) {
            const uint8_t * block = src + ggml_row_size(type, r * cols + k);
            memcpy(scales + r * width, block, width);
            for (size_t i = 0; i < 32; i++) codes[i][r] = block[width + i] ^ 128;
        }
        for (size_t i = 0; i < 32; i++)
            for (size_t r = 0; r < BLOCK; r += 4) /* four rows follow each other */
                memcpy(dst + (k + i) * size + first / 64 * 64 + ggml_code_place(first + r),
                       codes[i] + r, 4);
    }
}

void ggml_pack_columns(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last) {
    if (ggml_layouts[type].bits == 8) {
        const size_t end = last < rows ? last : (rows + 63) / 64 * 64; /* a piece is filled up */
        for (size_t row = first; row < end; row += BLOCK) {
            const size_t left = row < last ? last - row : 0;
            const uint8_t * from = (const uint8_t *)src + ggml_row_size(type, (row - first) * cols);
            pack_codes(type, rows, cols, from, dst, row, left < BLOCK ? left : BLOCK);
        }
        return;
    }
    const size_t column_size = ggml_column_size(rows, type == GGML_TYPE_FP32);
    for (size_t row = first; row < last; row += BLOCK) {
        const size_t count = last - row < BLOCK ? last - row : BLOCK;
        const uint8_t * from = (const uint8_t *)src + (row - first) * ggml_row_size(type, cols);
        uint8_t * to = (uint8_t *)dst + ggml_row_size(type, row);
        if (type == GGML_TYPE_FP16) {
            pack_rows(2, count, cols, column_size, from, to);
        } else {
            pack_rows(4, count, cols, column_size, from, to);
        }
    }
}
