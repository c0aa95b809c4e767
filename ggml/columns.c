/* Copies matrices by columns, the layout of columns.h. */
#include "columns.h"

enum { BLOCK = 32 /* rows and columns that are turned round at a time: a cache line of halves */ };

size_t ggml_columns_size(enum ggml_type type, size_t rows, size_t cols) {
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

void ggml_pack_columns(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last) {
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
