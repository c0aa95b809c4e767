/* Copies matrices by columns, the layout of columns.h. */
#include "columns.h"

enum { BLOCK = 32 /* rows and columns that are turned round at a time: a cache line of halves */ };

size_t ggml_columns_size(enum ggml_type type, size_t rows, size_t cols) {
    if (type != GGML_TYPE_FP32 && type != GGML_TYPE_FP16) return 0;
    return ggml_row_size(type, cols) * ggml_tile_end(rows, rows);
}

/* Rows [first, last) of a tile, at most BLOCK of them; `to` is the first one's place in it. */
GGML_INLINE void pack_rows(size_t size, size_t rows, size_t cols, size_t width, const uint8_t * src,
                           uint8_t * to) {
    uint8_t block[BLOCK][BLOCK * sizeof(float)] = {{0}};
    uint8_t column[BLOCK * sizeof(float)];
    for (size_t k0 = 0; k0 < cols; k0 += BLOCK) {
        const size_t n = cols - k0 < BLOCK ? cols - k0 : BLOCK;
        for (size_t r = 0; r < rows; r++) memcpy(block[r], src + (r * cols + k0) * size, n * size);
        for (size_t k = 0; k < n; k++) {
            for (size_t r = 0; r < BLOCK; r++) memcpy(column + r * size, block[r] + k * size, size);
            memcpy(to + ggml_column(cols, k0 + k) * width * size, column, BLOCK * size);
        }
    }
}

void ggml_pack_columns(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last) {
    const size_t size = ggml_row_size(type, 1);
    for (size_t row = first; row < last; row += BLOCK) {
        const size_t tile = row / GGML_TILE * GGML_TILE, width = ggml_tile_end(rows, row) - tile;
        const size_t count = last - row < BLOCK ? last - row : BLOCK;
        const uint8_t * from = (const uint8_t *)src + row * cols * size;
        uint8_t * to = (uint8_t *)dst + (tile * cols + row - tile) * size;
        if (type == GGML_TYPE_FP16) {
            pack_rows(2, count, cols, width, from, to);
        } else {
            pack_rows(4, count, cols, width, from, to);
        }
    }
}
