/* A matrix by columns times a vector, those that meet a zero left out: what all instruction sets
 * share of it.
 *
 * In the copy the rows of a column lie side by side; the columns come lane after lane of the sums
 * that define the result (README.md): k = 0, 16, 32, …, then 1, 17, 33, … So a lane's sum is one
 * walk forward over what its x_k leave. Pieces of columns should be long, 2 KiB or more: what
 * lies behind a shorter one, hardware fetches in vain.
 *
 * Left out are terms of ±0, as all weights are finite. They change nothing, except a sum that is
 * -0, which only underflow can make: whoever finds a result of -0 has to compute that row in full.
 */
#ifndef GGML_COLUMNS_H
#define GGML_COLUMNS_H

#include <string.h>

#include "kernels.h"

/* Bytes from one column to the next: rows are filled up to 32. */
GGML_INLINE size_t ggml_column_size(size_t rows, bool wide) {
    return (rows + 31) / 32 * 32 * (wide ? 4 : 2);
}

/* The place of column k among all. */
GGML_INLINE size_t ggml_column(size_t cols, size_t k) {
    const size_t lane = k % 16, longer = cols % 16; /* the first lanes have a column more */
    return lane * (cols / 16) + (lane < longer ? lane : longer) + k / 16;
}

enum {
    GGML_COLUMNS = 2048,   /* are searched for zeros at a time */
    GGML_COLUMNS_AHEAD = 4 /* are fetched before they are needed */
};

/* The columns that x is not zero for, lane by lane. */
struct ggml_nonzeros {
    uint32_t column[GGML_COLUMNS + GGML_COLUMNS_AHEAD];
    float x[GGML_COLUMNS];
    size_t end[16]; /* of lane j's */
};

/* Looks at x_k with k in [first, last). */
GGML_INLINE void ggml_find_nonzeros(const float * x, size_t cols, size_t first, size_t last,
                                    struct ggml_nonzeros * found) {
    size_t n = 0;
    for (size_t lane = 0; lane < 16; lane++) {
        uint32_t column = (uint32_t)ggml_column(cols, first + lane);
        for (size_t k = first + lane; k < last; k += 16, column++) {
            found->column[n] = column;
            found->x[n] = x[k];
            n += x[k] != 0; /* NaN is not */
        }
        found->end[lane] = n;
    }
    for (size_t i = 0; i < GGML_COLUMNS_AHEAD; i++) found->column[n + i] = 0;
}

/* What an instruction set brings: sums[r] = fma(columns[i][r], x[i], sums[r]) for i = 0 … n - 1, n
 * being 4 or 1, and `rows` rows, a multiple of 16; columns `ahead` are read soon. */
typedef void ggml_add_columns(bool wide, int n, const uint8_t * const * columns,
                              const uint8_t * const * ahead, const float * x, size_t rows,
                              float * sums);

enum { GGML_COLUMN_ROWS = 1024 /* rows that are summed up at a time */ };

/* Rows [first, last), at most so many. */
GGML_INLINE void ggml_some_rows_times(bool wide, ggml_add_columns * add,
                                      const struct ggml_matrix * w, const float * x, float * y,
                                      size_t first, size_t last) {
    _Alignas(64) float sums[16][GGML_COLUMN_ROWS];
    struct ggml_nonzeros found;
    const size_t rows = (last - first + 15) / 16 * 16;
    const size_t column_size = ggml_column_size(w->rows, wide);
    const uint8_t * data = (const uint8_t *)w->columns + first * (wide ? 4 : 2);
    for (int lane = 0; lane < 16; lane++) memset(sums[lane], 0, rows * sizeof **sums);
    for (size_t k = 0; k < w->cols; k += GGML_COLUMNS) {
        const size_t left = w->cols - k;
        ggml_find_nonzeros(x, w->cols, k, k + (left < GGML_COLUMNS ? left : GGML_COLUMNS), &found);
        size_t i = 0;
        for (int lane = 0; lane < 16; lane++) {
            while (i < found.end[lane]) {
                const uint8_t *columns[4], *ahead[4];
                const size_t n = found.end[lane] - i >= 4 ? 4 : 1;
                for (size_t j = 0; j < n; j++) {
                    columns[j] = data + found.column[i + j] * column_size;
                    ahead[j] = data + found.column[i + j + GGML_COLUMNS_AHEAD] * column_size;
                }
                if (n == 4) {
                    add(wide, 4, columns, ahead, found.x + i, rows, sums[lane]);
                } else {
                    add(wide, 1, columns, ahead, found.x + i, rows, sums[lane]);
                }
                i += n;
            }
        }
    }
    for (int width = 8; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++)
            for (size_t r = 0; r < rows; r++) sums[lane][r] += sums[lane + width][r];
    memcpy(y + first, sums[0], (last - first) * sizeof *y);
}

GGML_INLINE void ggml_columns_times(bool wide, ggml_add_columns * add, const struct ggml_matrix * w,
                                    const float * x, float * y, size_t first, size_t last) {
    for (; last - first > GGML_COLUMN_ROWS; first += GGML_COLUMN_ROWS)
        ggml_some_rows_times(wide, add, w, x, y, first, first + GGML_COLUMN_ROWS);
    if (first < last) ggml_some_rows_times(wide, add, w, x, y, first, last);
}

/* The entries of a level that has add_columns. */
#define GGML_COLUMNS_INSTANCES                                                                     \
    static void sparse_FP32(const struct ggml_matrix * w, const float * x, float * y,              \
                            size_t first, size_t last) {                                           \
        ggml_columns_times(true, add_columns, w, x, y, first, last);                               \
    }                                                                                              \
    static void sparse_FP16(const struct ggml_matrix * w, const float * x, float * y,              \
                            size_t first, size_t last) {                                           \
        ggml_columns_times(false, add_columns, w, x, y, first, last);                              \
    }

#endif
