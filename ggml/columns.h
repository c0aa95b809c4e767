/* A matrix by columns times a vector, those that meet a zero left out: what all instruction sets
 * share of it. In the copy the rows of a column lie side by side. Pieces of columns should be long,
 * 2 KiB or more: what lies behind a shorter one, hardware fetches in vain.
 *
 * FP32 and FP16: the columns come lane after lane of the sums that define the result (README.md): k
 * = 0, 16, 32, …, then 1, 17, 33, … So a lane's sum is one walk forward over what its x_k leave.
 * Left out are terms of ±0, as all weights are finite. They change nothing, except a sum that is
 * -0, which only underflow can make: whoever finds a result of -0 has to compute that row in full.
 *
 * Q8_0: codes come in the order of the columns, and after all of them the scales, as the file has
 * them, block by block. A block's sum of integers is exact, whichever of them are left out. */
#ifndef GGML_COLUMNS_H
#define GGML_COLUMNS_H

#include <string.h>

#include "kernels.h"

enum {
    GGML_COLUMN_UNIT = 64,  /* rows that a part of a matrix begins at a multiple of */
    GGML_COLUMN_ROWS = 1024 /* rows that are summed up at a time */
};

/* ---- FP32 and FP16 -------------------------------------------------------------------------- */

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

/* ---- Q8_0 ----------------------------------------------------------------------------------- */

/* In a column the codes of 64 rows are a piece, plus 128. Row 16q + 4l + i of it lies at 16l + 4q +
 * i: so, of four columns that are interleaved byte by byte within 16 bytes, a register of any width
 * has rows that follow each other in its lanes. */
GGML_INLINE size_t ggml_code_place(size_t row) {
    return row % 16 / 4 * 16 + row % 64 / 16 * 4 + row % 4;
}

/* Bytes from one column of codes to the next: an odd number of cache lines, or a block's columns
 * would meet in one set of the cache. */
GGML_INLINE size_t ggml_codes_size(size_t rows) {
    return ((rows + 63) / 64 | 1) * 64;
}

/* Bytes from one block's scales to the next one's. */
GGML_INLINE size_t ggml_code_scales_size(size_t rows, bool wide) {
    return (rows + 63) / 64 * 64 * (wide ? 4 : 2);
}

/* Of a block, the activations that are not zero, as if it had no others, and the columns that they
 * meet; n is filled up to a multiple of four with a column that meets zero. With GGML_A8 too, an
 * activation is 128 * hi + lo. */
struct ggml_nonzero_block {
    size_t n;
    const uint8_t * column[32];
    struct ggml_act act;
};

/* `column` is the block's first one, from a row on. */
GGML_INLINE void ggml_find_nonzero_block(const struct ggml_act * act, const uint8_t * column,
                                         size_t size, struct ggml_nonzero_block * found) {
    const struct ggml_act none = {.d = act->d, .sum = act->sum};
    size_t n = 0;
    found->act = none;
    for (int k = 0; k < 32; k++, column += size) {
        const int16_t a = act->a[ggml_slot(k)];
        if (a == 0) continue;
        found->column[n] = column;
        found->act.a[ggml_slot((int)n)] = a;
        found->act.hi[n] = (int8_t)((a + 64) >> 7);
        found->act.lo[n] = (int8_t)(a - found->act.hi[n] * 128);
        n++;
    }
    for (; n % 4 > 0; n++) found->column[n] = found->column[n - 1];
    found->n = n;
}

/* What an instruction set brings: sums[r] = fma(scale of r, float(sum over i < n of (code of r in
 * block->column[i] - 128) * a_i) * d, sums[r]) for `rows` rows, a multiple of 64. The next block's
 * columns and its scales, `ahead`, are read soon. */
typedef void ggml_add_codes(bool wide, const struct ggml_nonzero_block * block,
                            const struct ggml_nonzero_block * next, const uint8_t * scales,
                            const uint8_t * ahead, size_t rows, float * sums);

/* Rows [first, last), at most GGML_COLUMN_ROWS. */
GGML_INLINE void ggml_some_codes_times(bool wide, ggml_add_codes * add,
                                       const struct ggml_matrix * w, const struct ggml_act * act,
                                       float * y, size_t first, size_t last) {
    _Alignas(64) float sums[GGML_COLUMN_ROWS];
    struct ggml_nonzero_block blocks[2];
    const size_t rows = (last - first + 63) / 64 * 64, n = w->cols / 32;
    const size_t size = ggml_codes_size(w->rows), step = ggml_code_scales_size(w->rows, wide);
    const uint8_t * codes = (const uint8_t *)w->columns + first;
    const uint8_t * scales = (const uint8_t *)w->columns + w->cols * size + first * (wide ? 4 : 2);
    memset(sums, 0, rows * sizeof *sums);
    ggml_find_nonzero_block(act, codes, size, &blocks[0]);
    for (size_t b = 0; b < n; b++, scales += step) {
        struct ggml_nonzero_block * next = &blocks[(b + 1) % 2];
        next->n = 0;
        if (b + 1 < n)
            ggml_find_nonzero_block(act + b + 1, codes + (b + 1) * 32 * size, size, next);
        add(wide, &blocks[b % 2], next, scales, b + 1 < n ? scales + step : scales, rows, sums);
    }
    memcpy(y + first, sums, (last - first) * sizeof *y);
}

GGML_INLINE void ggml_codes_times(bool wide, ggml_add_codes * add, const struct ggml_matrix * w,
                                  const struct ggml_input * in, float * y, size_t first,
                                  size_t last) {
    const struct ggml_act * act = ggml_act_of(in, 0, 0);
    for (; last - first > GGML_COLUMN_ROWS; first += GGML_COLUMN_ROWS)
        ggml_some_codes_times(wide, add, w, act, y, first, first + GGML_COLUMN_ROWS);
    if (first < last) ggml_some_codes_times(wide, add, w, act, y, first, last);
}

/* ---- A level's entries ---------------------------------------------------------------------- */

/* Of a level that has add_columns. */
#define GGML_COLUMNS_INSTANCES                                                                     \
    static void sparse_FP32(const struct ggml_matrix * w, const struct ggml_input * in, float * y, \
                            size_t first, size_t last) {                                           \
        ggml_columns_times(true, add_columns, w, in->x, y, first, last);                           \
    }                                                                                              \
    static void sparse_FP16(const struct ggml_matrix * w, const struct ggml_input * in, float * y, \
                            size_t first, size_t last) {                                           \
        ggml_columns_times(false, add_columns, w, in->x, y, first, last);                          \
    }

#define GGML_COLUMNS_ENTRIES [GGML_TYPE_FP32] = sparse_FP32, [GGML_TYPE_FP16] = sparse_FP16

/* Of a level that has add_codes. */
#define GGML_CODES_INSTANCES                                                                       \
    static void sparse_Q8_0(const struct ggml_matrix * w, const struct ggml_input * in, float * y, \
                            size_t first, size_t last) {                                           \
        ggml_codes_times(false, add_codes, w, in, y, first, last);                                 \
    }                                                                                              \
    static void sparse_Q8_0_V100(const struct ggml_matrix * w, const struct ggml_input * in,       \
                                 float * y, size_t first, size_t last) {                           \
        ggml_codes_times(true, add_codes, w, in, y, first, last);                                  \
    }

#define GGML_CODES_ENTRIES [GGML_TYPE_Q8_0] = sparse_Q8_0, [GGML_TYPE_Q8_0_V100] = sparse_Q8_0_V100

#endif
