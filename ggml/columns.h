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
    GGML_COLUMNS = 512,    /* of a lane are searched for zeros at a time */
    GGML_COLUMNS_AHEAD = 4 /* are fetched before they are needed */
};

/* Columns that x is not zero for. */
struct ggml_nonzeros {
    uint32_t column[GGML_COLUMNS + GGML_COLUMNS_AHEAD];
    float x[GGML_COLUMNS];
    size_t n;
};

/* Looks at x_k with k = first, first + 16, … below last. */
GGML_INLINE void ggml_find_nonzeros(const float * x, size_t cols, size_t first, size_t last,
                                    struct ggml_nonzeros * found) {
    uint32_t column = (uint32_t)ggml_column(cols, first);
    size_t n = 0;
    for (size_t k = first; k < last; k += 16, column++) {
        found->column[n] = column;
        found->x[n] = x[k];
        n += x[k] != 0; /* NaN is not */
    }
    found->n = n;
    for (size_t i = 0; i < GGML_COLUMNS_AHEAD; i++) found->column[n + i] = 0;
}

/* What an instruction set brings: sums[r] = fma(columns[i][r], x[i], sums[r]) for i = 0 … n - 1, n
 * being 4 or 1, and `rows` rows, a multiple of 16; columns `ahead` are read soon. */
typedef void ggml_add_columns(bool wide, int n, const uint8_t * const * columns,
                              const uint8_t * const * ahead, const float * x, size_t rows,
                              float * sums);

enum { GGML_COLUMN_ROWS = 1024 /* rows that are summed up at a time */ };

/* Adds columns k ≡ lane (mod 16) to the sums of `rows` rows; `data` is the first row's place in the
 * first column. */
GGML_INLINE void ggml_add_lane(bool wide, ggml_add_columns * add, const struct ggml_matrix * w,
                               const uint8_t * data, const float * x, size_t lane, size_t rows,
                               float * sums) {
    const size_t column_size = ggml_column_size(w->rows, wide), reach = 16 * GGML_COLUMNS;
    struct ggml_nonzeros found;
    for (size_t k = lane; k < w->cols; k += reach) {
        ggml_find_nonzeros(x, w->cols, k, w->cols - k < reach ? w->cols : k + reach, &found);
        for (size_t i = 0, n; i < found.n; i += n) {
            const uint8_t *columns[4], *ahead[4];
            n = found.n - i >= 4 ? 4 : 1;
            for (size_t j = 0; j < n; j++) {
                columns[j] = data + found.column[i + j] * column_size;
                ahead[j] = data + found.column[i + j + GGML_COLUMNS_AHEAD] * column_size;
            }
            if (n == 4) {
                add(wide, 4, columns, ahead, found.x + i, rows, sums);
            } else {
                add(wide, 1, columns, ahead, found.x + i, rows, sums);
            }
        }
    }
}

/* Rows [first, last), at most so many. The lanes come in the order in which the tree at the end of
 * a sum takes them, 0 and 8, 4 and 12, …: so at most five wait. */
GGML_INLINE void ggml_some_rows_times(bool wide, ggml_add_columns * add,
                                      const struct ggml_matrix * w, const float * x, float * y,
                                      size_t first, size_t last) {
    _Alignas(64) float sums[5][GGML_COLUMN_ROWS];
    const size_t rows = (last - first + 15) / 16 * 16;
    const uint8_t * data = (const uint8_t *)w->columns + first * (wide ? 4 : 2);
    size_t waiting = 0;
    for (size_t i = 0; i < 16; i++) {
        const size_t lane = (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3;
        memset(sums[waiting], 0, rows * sizeof **sums);
        ggml_add_lane(wide, add, w, data, x, lane, rows, sums[waiting++]);
        for (size_t pairs = i; pairs & 1; pairs >>= 1) {
            waiting--;
            for (size_t r = 0; r < rows; r++) sums[waiting - 1][r] += sums[waiting][r];
        }
    }
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
