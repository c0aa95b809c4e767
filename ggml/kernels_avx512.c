/* The arithmetic in AVX-512 with VNNI. A stripe's 16 rows are one register; integers are multiplied
 * as bytes (vpdpbusd: unsigned codes, signed activations), in one pass over an activation's high
 * and one over its low part; GGML_A8 has no low part. */
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "columns.h"
#include "cpu.h"
#include "kernels.h"
#include "stripes_avx512.h"

/* Of a quantized matrix, a tile of stripes × vectors is computed at once, with all its sums in
 * registers. Reading two stripes side by side and prefetching so many bytes ahead is what brings
 * one vector to the limit of memory. Zen 4, one thread, Q4_0, GB/s of 31 at most: 1024 ahead, one
 * stripe 24.1, two 26.4, four 25.4; two stripes (the other core busy), 512 ahead 23.3, 1024 24.0,
 * 2048 27.1, 4096 22.3. */
enum { STRIPES = 2, VECTORS = 8, AHEAD = 2048 };

/* ---- Quantized matrices --------------------------------------------------------------------- */

GGML_INLINE __m512i broadcast_four(const int8_t * from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
}

/* A tile: stripes that begin at rows `row` and, if there are two, `row` + `step`, times vectors [t,
 * t + n) of the input; those past its end are computed but not stored. `stripes` and n are
 * constants. */
GGML_INLINE void tile_times(enum ggml_type type, enum ggml_activations activations, int stripes,
                            int n, const struct ggml_matrix * w, const struct ggml_input * in,
                            size_t t, float * y, size_t ldy, size_t row, size_t step, size_t last) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const int parts = 32 / layout->size, units = layout->size / 4;
    const int zero = layout->bits == 8 ? 128 : layout->zero;
    const size_t stripe_size = ggml_stripe_size(type, w->cols);
    const uint8_t * block[STRIPES];
    const struct ggml_act * act[VECTORS];
    const float * x[VECTORS];
    __m512 acc[STRIPES][VECTORS];
    for (int i = 0; i < n; i++) {
        const size_t vector = t + (size_t)i < in->n ? t + (size_t)i : in->n - 1;
        act[i] = ggml_act_of(in, vector, ggml_act_size(w->cols));
        x[i] = in->x + vector * in->ldx;
        for (int s = 0; s < stripes; s++) acc[s][i] = _mm512_setzero_ps();
    }
    for (int s = 0; s < stripes; s++)
        block[s] = (const uint8_t *)w->data + (row + (size_t)s * step) / GGML_STRIPE * stripe_size;
    for (size_t k = 0; k < w->cols; k += 32) {
        __m512i qh[STRIPES];
        for (int s = 0; s < stripes; s++) {
            for (size_t line = 0; line < at.size; line += 64)
                _mm_prefetch((const char *)block[s] + AHEAD + line, _MM_HINT_T0);
            if (layout->bits == 5) qh[s] = _mm512_loadu_si512(block[s] + at.qh);
        }
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            const size_t scale = (size_t)part * GGML_STRIPE * (layout->wide ? 4 : 2);
            __m512i hi[STRIPES][VECTORS], lo[STRIPES][VECTORS];
            for (int i = 0; i < n; i++) {
                const int32_t sum = parts == 2 ? act[i]->sum_half[part] : act[i]->sum;
                for (int s = 0; s < stripes; s++) {
                    hi[s][i] = _mm512_set1_epi32(activations == GGML_A8 ? -zero * sum : 0);
                    lo[s][i] = _mm512_set1_epi32(activations == GGML_A8 ? 0 : -zero * sum);
                }
            }
#pragma GCC unroll 8
            for (int u = part * units; u < (part + 1) * units; u++) {
                __m512i codes[STRIPES];
                for (int s = 0; s < stripes; s++)
                    codes[s] = load_codes(layout, block[s] + at.qs, qh[s], u);
                for (int i = 0; i < n; i++) {
                    for (int s = 0; s < stripes; s++) {
                        hi[s][i] = _mm512_dpbusd_epi32(hi[s][i], codes[s],
                                                       broadcast_four(act[i]->hi + 4 * u));
                        if (activations == GGML_A8) continue;
                        lo[s][i] = _mm512_dpbusd_epi32(lo[s][i], codes[s],
                                                       broadcast_four(act[i]->lo + 4 * u));
                    }
                }
            }
            for (int s = 0; s < stripes; s++) {
                const __m512 d = load_scales(block[s] + at.d + scale, layout->wide);
                __m512 m = _mm512_setzero_ps();
                struct outliers outliers;
                if (layout->min) m = load_scales(block[s] + at.m + scale, layout->wide);
                if (layout->outlier) outliers = load_outliers(block[s], &at);
                for (int i = 0; i < n; i++) {
                    __m512i sum = hi[s][i];
                    if (activations == GGML_A16)
                        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), lo[s][i]);
                    const __m512 product =
                        _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(act[i]->d));
                    acc[s][i] = _mm512_fmadd_ps(d, product, acc[s][i]);
                    if (!layout->min) continue;
                    const float a = parts == 2 ? act[i]->s_half[part] : act[i]->s;
                    acc[s][i] = _mm512_fmadd_ps(m, _mm512_set1_ps(a), acc[s][i]);
                    if (layout->outlier)
                        acc[s][i] = add_outliers(&outliers, x[i] + k, act[i], m, acc[s][i]);
                }
            }
        }
        for (int i = 0; i < n; i++) act[i]++;
        for (int s = 0; s < stripes; s++) block[s] += at.size;
    }
    for (int s = 0; s < stripes; s++, row += step) {
        const __mmask16 rows = (__mmask16)(last - row < 16 ? (1u << (last - row)) - 1 : 0xFFFF);
        for (int i = 0; i < n && t + (size_t)i < in->n; i++)
            _mm512_mask_storeu_ps(y + (t + (size_t)i) * ldy + row, rows, acc[s][i]);
    }
}

/* Rows [first, last) times vectors [t, t + n), as tiles; two stripes of a tile come from the two
 * halves of the rows, so that each half is read as a stream. */
GGML_INLINE void stripes_times(enum ggml_type type, enum ggml_activations activations, int stripes,
                               int n, const struct ggml_matrix * w, const struct ggml_input * in,
                               size_t t, float * y, size_t ldy, size_t first, size_t last) {
    const size_t count = (last - first + GGML_STRIPE - 1) / GGML_STRIPE;
    const size_t step = count / (size_t)stripes * GGML_STRIPE,
                 rest = first + step * (size_t)stripes;
    for (size_t row = first; row < first + step; row += GGML_STRIPE)
        tile_times(type, activations, stripes, n, w, in, t, y, ldy, row, step, last);
    for (size_t row = rest; row < last; row += GGML_STRIPE)
        tile_times(type, activations, 1, n, w, in, t, y, ldy, row, 0, last);
}

GGML_INLINE void matmul_stripes(enum ggml_type type, enum ggml_activations activations,
                                const struct ggml_matrix * w, const struct ggml_input * in,
                                float * y, size_t ldy, size_t first, size_t last) {
    for (size_t t = 0; t < in->n; t += VECTORS) {
        switch (in->n - t) {
        case 1:
            stripes_times(type, activations, 2, 1, w, in, t, y, ldy, first, last);
            break;
        case 2:
            stripes_times(type, activations, 2, 2, w, in, t, y, ldy, first, last);
            break;
        case 3:
        case 4:
            stripes_times(type, activations, 2, 4, w, in, t, y, ldy, first, last);
            break;
        case 5:
        case 6:
            stripes_times(type, activations, 1, 6, w, in, t, y, ldy, first, last);
            break;
        default:
            stripes_times(type, activations, 1, VECTORS, w, in, t, y, ldy, first, last);
        }
    }
}

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        if (in->activations == GGML_A8) {                                                          \
            matmul_stripes(GGML_TYPE_##TYPE, GGML_A8, w, in, y, ldy, first, last);                 \
        } else {                                                                                   \
            matmul_stripes(GGML_TYPE_##TYPE, GGML_A16, w, in, y, ldy, first, last);                \
        }                                                                                          \
    }

GGML_QUANTIZED(INSTANCE)

/* Bytes of four registers side by side: a register's lane has four of one row. */
GGML_INLINE void interleave(const __m512i from[4], __m512i to[4]) {
    const __m512i low[2] = {_mm512_unpacklo_epi8(from[0], from[1]),
                            _mm512_unpacklo_epi8(from[2], from[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi8(from[0], from[1]),
                             _mm512_unpackhi_epi8(from[2], from[3])};
    to[0] = _mm512_unpacklo_epi16(low[0], low[1]);
    to[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    to[2] = _mm512_unpacklo_epi16(high[0], high[1]);
    to[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

GGML_INLINE void add_codes(bool wide, const struct ggml_nonzero_block * block,
                           const struct ggml_nonzero_block * next, const uint8_t * scales,
                           const uint8_t * ahead, size_t rows, float * sums) {
    const __m512 d = _mm512_set1_ps(block->act.d);
    const size_t width = wide ? 4 : 2;
    for (size_t r = 0; r < rows; r += 64) {
        for (size_t i = 0; i < next->n; i++)
            _mm_prefetch((const char *)next->column[i] + r, _MM_HINT_T0);
        for (size_t line = 0; line < 64 * width; line += 64)
            _mm_prefetch((const char *)ahead + r * width + line, _MM_HINT_T0);
        __m512i hi[4], lo[4];
        for (int q = 0; q < 4; q++) {
            hi[q] = _mm512_setzero_si512();
            lo[q] = _mm512_set1_epi32(-128 * block->act.sum);
        }
        for (size_t i = 0; i < block->n; i += 4) {
            const __m512i a_hi = broadcast_four(block->act.hi + i);
            const __m512i a_lo = broadcast_four(block->act.lo + i);
            __m512i columns[4], codes[4];
            for (int j = 0; j < 4; j++)
                columns[j] = _mm512_loadu_si512(block->column[i + (size_t)j] + r);
            interleave(columns, codes);
            for (int q = 0; q < 4; q++) {
                hi[q] = _mm512_dpbusd_epi32(hi[q], codes[q], a_hi);
                lo[q] = _mm512_dpbusd_epi32(lo[q], codes[q], a_lo);
            }
        }
        for (size_t q = 0; q < 4; q++) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[q], 7), lo[q]);
            const __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), d);
            float * to = sums + r + 16 * q;
            const __m512 scale = load_scales(scales + (r + 16 * q) * width, wide);
            _mm512_store_ps(to, _mm512_fmadd_ps(scale, t, _mm512_load_ps(to)));
        }
    }
}

GGML_CODES_INSTANCES

/* ---- FP32 and FP16 matrices ----------------------------------------------------------------- */

/* The first n lanes of 16, all if n is more. */
GGML_INLINE __mmask16 lanes(size_t n) {
    return (__mmask16)(n < 16 ? (1u << n) - 1 : 0xFFFF);
}

GGML_INLINE __m512 load(const float * from, size_t n) {
    return _mm512_maskz_loadu_ps(lanes(n), from);
}

GGML_INLINE void store(float * to, size_t n, __m512 value) {
    _mm512_mask_storeu_ps(to, lanes(n), value);
}

/* The tree at the end of a sum over 16 lanes. */
GGML_INLINE float sum_lanes(__m512 v) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Weights [k, k + 16) of a row, of which n exist. The others are -0: times 0 that leaves a sum as
 * it is, even the sign of its zero. */
GGML_INLINE __m512 load_weights(const uint8_t * row, size_t k, size_t n, bool wide) {
    if (wide)
        return _mm512_mask_loadu_ps(_mm512_set1_ps(-0.0f), lanes(n),
                                    (const float *)(const void *)row + k);
    const __m256i none = _mm256_set1_epi16(INT16_MIN);
    return _mm512_cvtph_ps(_mm256_mask_loadu_epi16(none, lanes(n), row + 2 * k));
}

/* One vector is as fast as memory: threads read STREAMS places side by side, a few cache lines of
 * each in turn. (FP16, one thread, share of the reading rate: 8 adjacent rows 60 %, as they meet in
 * one set of the cache; 2 distant places 83 %, 4 88 %, 6 89 %, 8 80 %; 6 in turns of 256 bytes
 * 94 %, of 512 81 to 84 %. Prefetching gains nothing then.) */
enum { STREAMS = 6, TURN = 128 /* weights */ };

/* n rows, a constant, that lie `distance` rows apart. */
GGML_INLINE void streams_times(bool wide, int n, const struct ggml_matrix * w, const float * x,
                               float * y, size_t row, size_t distance) {
    const size_t row_size = w->cols * (wide ? 4 : 2);
    const uint8_t * data = (const uint8_t *)w->data + row * row_size;
    __m512 acc[STREAMS];
    for (int s = 0; s < n; s++) acc[s] = _mm512_setzero_ps();
    size_t k = 0;
    for (; w->cols - k >= TURN; k += TURN) {
#pragma GCC unroll 8
        for (int s = 0; s < n; s++) {
            const uint8_t * from = data + (size_t)s * distance * row_size;
#pragma GCC unroll 8
            for (size_t j = 0; j < TURN; j += 16)
                acc[s] = _mm512_fmadd_ps(load_weights(from, k + j, 16, wide),
                                         _mm512_loadu_ps(x + k + j), acc[s]);
        }
    }
    for (; k < w->cols; k += 16) {
        const size_t rest = w->cols - k;
        const __m512 xs = load(x + k, rest);
#pragma GCC unroll 8
        for (int s = 0; s < n; s++) {
            const __m512 weights =
                load_weights(data + (size_t)s * distance * row_size, k, rest, wide);
            acc[s] = _mm512_fmadd_ps(weights, xs, acc[s]);
        }
    }
    for (int s = 0; s < n; s++) y[row + (size_t)s * distance] = sum_lanes(acc[s]);
}

GGML_INLINE void matmul_vector(bool wide, const struct ggml_matrix * w, const float * x, float * y,
                               size_t first, size_t last) {
    const size_t part = (last - first) / STREAMS;
    size_t row = first;
    for (; row < first + part; row++) streams_times(wide, STREAMS, w, x, y, row, part);
    for (row += part * (STREAMS - 1); row < last; row++) streams_times(wide, 1, w, x, y, row, 0);
}

/* Several vectors: as fast as the units multiply. A tile is TILE rows × up to GROUP vectors, all
 * sums in registers; the rows come from TILE places, each next row prefetched. The vectors lie in a
 * panel of DEPTH columns, interleaved in the order of use: rows of a power of two would meet in one
 * set of the cache. From panel to panel, the sums of BLOCK rows wait in memory. (8 vectors, FP16:
 * without the panel and prefetching 57 % of the peak; without `keep` 78 % of what it is.) */
enum { TILE = 3, GROUP = 8, DEPTH = 2048, BLOCK = 48 };

/* Columns [k, k + depth) of n vectors from t on, for each 16 of them n times 16; 0 past the end. */
GGML_INLINE void fill_panel(int n, const struct ggml_input * in, size_t t, size_t k, size_t depth,
                            float * panel) {
    for (int i = 0; i < n; i++) {
        const float * x = in->x + (t + (size_t)i) * in->ldx + k;
        for (size_t j = 0; j < depth; j += 16)
            _mm512_store_ps(panel + j * (size_t)n + 16 * i, load(x + j, depth - j));
    }
}

/* A register that the compiler must not turn into three loads from memory. */
GGML_INLINE __m512 keep(__m512 v) {
#if defined(__GNUC__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

/* acc += 16 columns of a tile, of which `left` exist; rows and n are constants. */
GGML_INLINE void float_tile_step(bool wide, int rows, int n, const uint8_t * w, size_t distance,
                                 size_t k, size_t left, const float * panel,
                                 __m512 acc[TILE][GROUP]) {
    __m512 weights[TILE];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
        weights[r] = load_weights(w + (size_t)r * distance, k, left, wide);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        const __m512 x = keep(_mm512_load_ps(panel + 16 * i));
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++) acc[r][i] = _mm512_fmadd_ps(weights[r], x, acc[r][i]);
    }
}

/* Adds a panel's columns to the sums of a tile: rows at w, `distance` bytes apart. */
GGML_INLINE void float_tile_times(bool wide, int rows, int n, const uint8_t * w, size_t distance,
                                  size_t row_size, size_t depth, const float * panel,
                                  __m512 (*sums)[GROUP], size_t part) {
    __m512 acc[TILE][GROUP];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) acc[r][i] = sums[(size_t)r * part][i];
    size_t k = 0;
    for (; depth - k >= 16; k += 16, panel += 16 * n) {
        const uint8_t * next = w + row_size + k * (wide ? 4 : 2);
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++)
            _mm_prefetch((const char *)next + (size_t)r * distance, _MM_HINT_T1);
        float_tile_step(wide, rows, n, w, distance, k, 16, panel, acc);
    }
    if (k < depth) float_tile_step(wide, rows, n, w, distance, k, depth - k, panel, acc);
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) sums[(size_t)r * part][i] = acc[r][i];
}

/* Rows [first, last), at most BLOCK, times n vectors from t on, n a constant; panel and sums are
 * memory for it. */
GGML_INLINE void float_block_times(bool wide, int n, const struct ggml_matrix * w,
                                   const struct ggml_input * in, size_t t, float * y, size_t ldy,
                                   size_t first, size_t last, float * panel,
                                   __m512 (*sums)[GROUP]) {
    const size_t rows = last - first, part = rows / TILE, row_size = w->cols * (wide ? 4 : 2);
    for (size_t r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_ps();
    for (size_t k = 0; k < w->cols; k += DEPTH) {
        const size_t depth = w->cols - k < DEPTH ? w->cols - k : DEPTH;
        const uint8_t * data = (const uint8_t *)w->data + first * row_size + k * (wide ? 4 : 2);
        fill_panel(n, in, t, k, depth, panel);
        for (size_t r = 0; r < part; r++)
            float_tile_times(wide, TILE, n, data + r * row_size, part * row_size, row_size, depth,
                             panel, sums + r, part);
        for (size_t r = part * TILE; r < rows; r++)
            float_tile_times(wide, 1, n, data + r * row_size, 0, row_size, depth, panel, sums + r,
                             0);
    }
    for (size_t r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) y[(t + (size_t)i) * ldy + first + r] = sum_lanes(sums[r][i]);
}

/* Rows in blocks that stay in the cache while all vectors pass, in groups of about the same size,
 * so that no odd number is much slower. */
GGML_INLINE void matmul_rows(bool wide, const struct ggml_matrix * w, const struct ggml_input * in,
                             float * y, size_t ldy, size_t first, size_t last) {
    _Alignas(64) float panel[DEPTH * GROUP];
    __m512 sums[BLOCK][GROUP];
    const size_t block = ggml_cached_rows(in->n, GROUP, w->cols * (wide ? 4 : 2), TILE, BLOCK);
    for (size_t row = first; row < last; row += block) {
        const size_t end = last - row < block ? last : row + block;
        size_t n;
        for (size_t t = 0; t < in->n; t += n) {
            const size_t left = in->n - t, groups = (left + GROUP - 1) / GROUP;
            n = (left + groups - 1) / groups;
            switch (n) {
#define GROUP_OF(N)                                                                                \
    case N:                                                                                        \
        float_block_times(wide, N, w, in, t, y, ldy, row, end, panel, sums);                       \
        break
                GROUP_OF(2);
                GROUP_OF(3);
                GROUP_OF(4);
                GROUP_OF(5);
                GROUP_OF(6);
                GROUP_OF(7);
                GROUP_OF(8);
#undef GROUP_OF
            }
        }
    }
}

GGML_INLINE void matmul_floats(bool wide, const struct ggml_matrix * w,
                               const struct ggml_input * in, float * y, size_t ldy, size_t first,
                               size_t last) {
    if (in->n == 1) {
        matmul_vector(wide, w, in->x, y, first, last);
    } else {
        matmul_rows(wide, w, in, y, ldy, first, last);
    }
}

static void matmul_FP32(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    matmul_floats(true, w, in, y, ldy, first, last);
}

static void matmul_FP16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    matmul_floats(false, w, in, y, ldy, first, last);
}

/* Rows 32 at a time: a cache line of halves, two of floats. */
GGML_INLINE void add_columns(bool wide, int n, const uint8_t * const * columns,
                             const uint8_t * const * ahead, const float * x, size_t rows,
                             float * sums) {
    __m512 xs[4];
    for (int i = 0; i < n; i++) xs[i] = _mm512_set1_ps(x[i]);
    for (size_t r = 0; r < rows; r += 16) {
        __m512 acc = _mm512_load_ps(sums + r);
        for (int i = 0; i < n; i++) {
            if (wide || r % 32 == 0)
                _mm_prefetch((const char *)ahead[i] + r * (wide ? 4 : 2), _MM_HINT_T0);
            acc = _mm512_fmadd_ps(load_weights(columns[i], r, 16, wide), xs[i], acc);
        }
        _mm512_store_ps(sums + r, acc);
    }
}

GGML_COLUMNS_INSTANCES

/* ---- Low-rank products ---------------------------------------------------------------------- */

static void add_low_rank(const struct ggml_low_rank * w, const struct ggml_input * h, float * y,
                         size_t ldy, size_t first, size_t last) {
    for (size_t row = first; row < last; row += 16) {
        const float * b = w->b + row * w->rank;
        for (size_t i = 0; i < w->rank; i++)
            _mm_prefetch((const char *)(b + i * 16) + AHEAD, _MM_HINT_T0);
        for (size_t t = 0; t < h->n; t++) {
            const float * x = h->x + t * h->ldx;
            __m512 acc = load(y + t * ldy + row, last - row);
            for (size_t i = 0; i < w->rank; i++)
                acc = _mm512_fmadd_ps(_mm512_load_ps(b + i * 16), _mm512_set1_ps(x[i]), acc);
            store(y + t * ldy + row, last - row, acc);
        }
    }
}

/* ---- Vectors -------------------------------------------------------------------------------- */

static void quantize_act(enum ggml_activations activations, size_t n, const float * x,
                         uint8_t * out) {
    const float steps = ggml_act_steps(activations);
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const __m256i slots = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0,
                                           1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    for (size_t b = 0; b < n / 32; b++, x += 32, out += sizeof(struct ggml_act)) {
        struct ggml_act * act = (struct ggml_act *)(void *)out;
        const __m512 v[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
        /* the bits of magnitudes are ordered like them */
        int32_t top = _mm512_reduce_max_epi32(
            _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(v[0]), magnitude),
                             _mm512_and_si512(_mm512_castps_si512(v[1]), magnitude)));
        float amax;
        memcpy(&amax, &top, sizeof amax);
        float d = top < 0x7F800000 ? amax / steps : amax - amax;
        if (d < FLT_MIN) d = 0;
        const __m512 id = _mm512_set1_ps(d > 0 ? 1 / d : 0);
        for (int i = 0; i < 2; i++) {
            __m512i a = _mm512_setzero_si512();
            if (d > 0) a = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], id));
            __m512i hi = a, lo = _mm512_setzero_si512();
            if (activations == GGML_A16) {
                hi = _mm512_srai_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(64)), 7);
                lo = _mm512_sub_epi32(a, _mm512_slli_epi32(hi, 7));
            }
            _mm256_store_si256((__m256i *)(void *)act->a + i,
                               _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(a), slots));
            _mm_store_si128((__m128i *)(void *)act->hi + i, _mm512_cvtepi32_epi8(hi));
            _mm_store_si128((__m128i *)(void *)act->lo + i, _mm512_cvtepi32_epi8(lo));
            act->sum_half[i] = _mm512_reduce_add_epi32(a);
            act->s_half[i] = d * (float)act->sum_half[i];
        }
        act->d = d;
        act->sum = act->sum_half[0] + act->sum_half[1];
        act->s = d * (float)act->sum;
        act->unused = 0;
    }
}

GGML_INLINE __m512 exp16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    __m512 t = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(89)), _mm512_set1_ps(-104));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(t, _mm512_mul_ps(n, _mm512_set1_ps(0.693359375f)));
    r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(-2.12194440e-4f)));
    static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                         1.6666665459e-1f, 5.0000001201e-1f};
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++)
        p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(coefficients[i]));
    __m512 y = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r), one);
    __m512i exponent = _mm512_cvtps_epi32(n), bias = _mm512_set1_epi32(127);
    __m512i half = _mm512_srai_epi32(exponent, 1), rest = _mm512_sub_epi32(exponent, half);
    y = _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), 23)));
    y = _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), 23)));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), y, x);
}

GGML_INLINE __m512 sigmoid16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    __m512 negated = _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(negated)));
}

/* The sum of x_k, or of (x_k - mean) squared; lanes past the end stay as they are. */
GGML_INLINE float sum_terms(size_t n, const float * x, float mean, bool squared) {
    __m512 acc = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        __m512 term = load(x + i, n - i);
        if (squared) {
            term = _mm512_sub_ps(term, _mm512_set1_ps(mean));
            term = _mm512_mul_ps(term, term);
        }
        acc = _mm512_mask_add_ps(acc, lanes(n - i), acc, term);
    }
    return sum_lanes(acc);
}

static void layer_norm(size_t n, const float * x, const float * w, const float * b, float * y) {
    float mean = sum_terms(n, x, 0, false) / (float)n;
    float var = sum_terms(n, x, mean, true) / (float)n;
    __m128 root = _mm_sqrt_ss(_mm_set_ss(var + 1e-5f));
    __m512 means = _mm512_set1_ps(mean), r = _mm512_set1_ps(1 / _mm_cvtss_f32(root));
    for (size_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(x + i, n - i), means), r);
        v = _mm512_mul_ps(v, load(w + i, n - i));
        store(y + i, n - i, _mm512_add_ps(v, load(b + i, n - i)));
    }
}

static void lerp(size_t n, const float * x, const float * prev, const float * mix, float * y) {
    for (size_t i = 0; i < n; i += 16) {
        __m512 m = load(mix + i, n - i);
        __m512 now = _mm512_mul_ps(load(x + i, n - i), m);
        __m512 before = _mm512_mul_ps(load(prev + i, n - i), _mm512_sub_ps(_mm512_set1_ps(1), m));
        store(y + i, n - i, _mm512_add_ps(now, before));
    }
}

static void exp_vector(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 16) store(y + i, n - i, exp16(load(x + i, n - i)));
}

static void relu2(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 16) {
        __m512 z = _mm512_max_ps(_mm512_setzero_ps(), load(x + i, n - i)); /* NaN stays NaN */
        store(y + i, n - i, _mm512_mul_ps(z, z));
    }
}

static void add(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 16)
        store(y + i, n - i, _mm512_add_ps(load(y + i, n - i), load(x + i, n - i)));
}

static void sigmoid_mul(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 16)
        store(y + i, n - i, _mm512_mul_ps(sigmoid16(load(r + i, n - i)), load(x + i, n - i)));
}

static void sigmoid_mul_add(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 16) {
        __m512 gated = _mm512_mul_ps(sigmoid16(load(r + i, n - i)), load(x + i, n - i));
        store(y + i, n - i, _mm512_add_ps(load(y + i, n - i), gated));
    }
}

static void wkv(size_t n, const float * u, const float * w, const float * k, const float * v,
                float * aa, float * bb, float * pp, float * y) {
    for (size_t i = 0; i < n; i += 16) {
        const size_t rest = n - i;
        __m512 key = load(k + i, rest), value = load(v + i, rest), p = load(pp + i, rest);
        __m512 a = load(aa + i, rest), b = load(bb + i, rest);
        __m512 ww = _mm512_add_ps(load(u + i, rest), key);
        __m512 q = _mm512_max_ps(p, ww);
        __m512 e1 = exp16(_mm512_sub_ps(p, q)), e2 = exp16(_mm512_sub_ps(ww, q));
        __m512 numerator = _mm512_add_ps(_mm512_mul_ps(e1, a), _mm512_mul_ps(e2, value));
        __m512 denominator = _mm512_add_ps(_mm512_mul_ps(e1, b), e2);
        ww = _mm512_add_ps(p, load(w + i, rest));
        q = _mm512_max_ps(ww, key);
        e1 = exp16(_mm512_sub_ps(ww, q));
        e2 = exp16(_mm512_sub_ps(key, q));
        store(aa + i, rest, _mm512_add_ps(_mm512_mul_ps(e1, a), _mm512_mul_ps(e2, value)));
        store(bb + i, rest, _mm512_add_ps(_mm512_mul_ps(e1, b), e2));
        store(pp + i, rest, q);
        store(y + i, rest, _mm512_div_ps(numerator, denominator));
    }
}

/* `count` registers of columns, the last of them perhaps in part. */
GGML_INLINE void attend(size_t count, size_t d, size_t n, const float * q, const float * k,
                        const float * v, float scale, float * m, size_t ldm, float * y) {
    __m512 value[4], acc[4];
    for (size_t j = 0; j < count; j++) {
        value[j] = load(v + 16 * j, n - 16 * j);
        acc[j] = _mm512_setzero_ps();
    }
    for (size_t i = 0; i < d; i++, m += ldm) {
        const __m512 qi = _mm512_set1_ps(q[i]), ki = _mm512_set1_ps(k[i]);
        for (size_t j = 0; j < count; j++) {
            __m512 row = load(m + 16 * j, n - 16 * j);
            row = _mm512_add_ps(row, _mm512_mul_ps(ki, value[j]));
            store(m + 16 * j, n - 16 * j, row);
            acc[j] = _mm512_add_ps(acc[j], _mm512_mul_ps(qi, row));
        }
    }
    for (size_t j = 0; j < count; j++) {
        __m512 sum = load(y + 16 * j, n - 16 * j);
        store(y + 16 * j, n - 16 * j,
              _mm512_add_ps(sum, _mm512_mul_ps(acc[j], _mm512_set1_ps(scale))));
    }
}

static void linear_attention(size_t d, size_t n, const float * q, const float * k, const float * v,
                             float scale, float * m, size_t ldm, float * y) {
    size_t c = 0;
    for (; n - c >= 64; c += 64) attend(4, d, 64, q, k, v + c, scale, m + c, ldm, y + c);
    for (; c < n; c += 16) attend(1, d, n - c, q, k, v + c, scale, m + c, ldm, y + c);
}

/* ---- Limits --------------------------------------------------------------------------------- */

GGML_INLINE uint64_t read_streams(const uint8_t * data, size_t n, size_t streams, size_t ahead) {
    const size_t part = n / streams;
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (size_t i = 0; i < part; i += 128) {
        for (size_t s = 0; s < streams; s++) {
            const uint8_t * p = data + s * part + i;
            for (size_t j = 0; j < 2; j++) {
                if (ahead) _mm_prefetch((const char *)p + ahead + 64 * j, _MM_HINT_T0);
                sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + 64 * j));
            }
        }
    }
    uint64_t
        words[8]; /* unsigned: the reducing intrinsic adds as signed numbers, and may overflow */
    _mm512_storeu_si512(words, _mm512_add_epi64(sum[0], sum[1]));
    for (int j = 1; j < 8; j++) words[0] += words[j];
    return words[0];
}

static uint64_t read_all(const uint8_t * data, size_t n, size_t streams, size_t ahead) {
    switch (streams) {
    case 4:
        return read_streams(data, n, 4, ahead);
    case 2:
        return read_streams(data, n, 2, ahead);
    default:
        return read_streams(data, n, 1, ahead);
    }
}

enum { CHAINS = 12 }; /* sums that don't wait for each other: enough to keep the units busy */

static float fma_all(size_t n) {
    __m512 sum[CHAINS], x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1);
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_set1_ps((float)j);
    for (size_t i = 0; i < n; i += CHAINS * 16) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_fmadd_ps(sum[j], x, y);
    }
    for (int j = 1; j < CHAINS; j++) sum[0] = _mm512_add_ps(sum[0], sum[j]);
    return _mm512_cvtss_f32(sum[0]);
}

static int32_t dot_all(size_t n) {
    __m512i sum[CHAINS], x = _mm512_set1_epi8(3);
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_set1_epi32(j);
    for (size_t i = 0; i < n; i += CHAINS * 64) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) sum[j] = _mm512_dpbusd_epi32(sum[j], x, x);
    }
    for (int j = 1; j < CHAINS; j++) sum[0] = _mm512_add_epi32(sum[0], sum[j]);
    return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum[0]));
}

const struct ggml_kernels ggml_kernels_avx512 = {
    .isa = "avx512",
    .needs = CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C | CPU_AVX512F | CPU_AVX512BW | CPU_AVX512DQ |
             CPU_AVX512VL | CPU_AVX512VNNI,
    .quantize_act = quantize_act,
    .matmul =
        {
            [GGML_TYPE_FP32] = matmul_FP32,
            [GGML_TYPE_FP16] = matmul_FP16,
            GGML_QUANTIZED_ENTRIES,
        },
    .sparse = {GGML_COLUMNS_ENTRIES, GGML_CODES_ENTRIES},
    .add_low_rank = add_low_rank,
    .layer_norm = layer_norm,
    .lerp = lerp,
    .exp = exp_vector,
    .relu2 = relu2,
    .add = add,
    .sigmoid_mul = sigmoid_mul,
    .sigmoid_mul_add = sigmoid_mul_add,
    .wkv = wkv,
    .linear_attention = linear_attention,
    .read = read_all,
    .fma = fma_all,
    .dot = dot_all,
};
