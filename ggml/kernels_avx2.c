/* The arithmetic in AVX2, FMA and F16C; matrices in stripes are in kernels_stripes_avx2.c. */
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "columns.h"
#include "cpu.h"
#include "kernels.h"

/* ---- FP32 and FP16 matrices ----------------------------------------------------------------- */

/* The first n lanes of 8, all if n is more. */
GGML_INLINE __m256i lanes(size_t n) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? (int)n : 8), lane);
}

/* The first n lanes from memory, zero in the others; nothing is read beyond them. */
GGML_INLINE __m256 load(const float * from, size_t n) {
    return n >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, lanes(n));
}

GGML_INLINE void store(float * to, size_t n, __m256 value) {
    if (n >= 8) {
        _mm256_storeu_ps(to, value);
    } else {
        _mm256_maskstore_ps(to, lanes(n), value);
    }
}

/* The tree at the end of a sum over 16 lanes, low and high half. */
GGML_INLINE float sum_lanes(__m256 low, __m256 high) {
    __m256 eight = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Weights [k, k + 8) of a row, of which n exist. The others are -0: times 0 that leaves a sum as it
 * is, even the sign of its zero. */
GGML_INLINE __m256 load_weights(const uint8_t * row, size_t k, size_t n, bool wide) {
    const uint8_t * from = row + k * (wide ? 4 : 2);
    if (wide) {
        const __m256 weights = load((const float *)(const void *)from, n);
        if (n >= 8) return weights;
        return _mm256_blendv_ps(_mm256_set1_ps(-0.0f), weights, _mm256_castsi256_ps(lanes(n)));
    }
    if (n >= 8) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from));
    uint16_t rest[8] = {0x8000, 0x8000, 0x8000, 0x8000, 0x8000, 0x8000, 0x8000, 0x8000};
    memcpy(rest, from, 2 * n);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)rest));
}

/* How many of n numbers lie behind the first k. */
GGML_INLINE size_t beyond(size_t n, size_t k) {
    return n > k ? n - k : 0;
}

/* One vector is as fast as memory: threads read STREAMS places side by side, a few cache lines of
 * each in turn. (Figures are at the AVX-512 kernel.) */
enum { STREAMS = 6, TURN = 128 /* weights */ };

/* n rows, a constant, that lie `distance` rows apart. */
GGML_INLINE void streams_times(bool wide, int n, const struct ggml_matrix * w, const float * x,
                               float * y, size_t row, size_t distance) {
    const size_t row_size = w->cols * (wide ? 4 : 2);
    const uint8_t * data = (const uint8_t *)w->data + row * row_size;
    __m256 acc[STREAMS][2];
    for (int s = 0; s < n; s++) acc[s][0] = acc[s][1] = _mm256_setzero_ps();
    size_t k = 0;
    for (; w->cols - k >= TURN; k += TURN) {
#pragma GCC unroll 8
        for (int s = 0; s < n; s++) {
            const uint8_t * from = data + (size_t)s * distance * row_size;
#pragma GCC unroll 16
            for (size_t j = 0; j < TURN; j += 8)
                acc[s][j / 8 % 2] = _mm256_fmadd_ps(load_weights(from, k + j, 8, wide),
                                                    _mm256_loadu_ps(x + k + j), acc[s][j / 8 % 2]);
        }
    }
    for (; k < w->cols; k += 16) {
        for (size_t half = 0; half < 2; half++) {
            const size_t at = k + 8 * half, rest = beyond(w->cols, at);
            const __m256 xs = load(x + at, rest);
#pragma GCC unroll 8
            for (int s = 0; s < n; s++) {
                const uint8_t * from = data + (size_t)s * distance * row_size;
                acc[s][half] =
                    _mm256_fmadd_ps(load_weights(from, at, rest, wide), xs, acc[s][half]);
            }
        }
    }
    for (int s = 0; s < n; s++) y[row + (size_t)s * distance] = sum_lanes(acc[s][0], acc[s][1]);
}

GGML_INLINE void matmul_vector(bool wide, const struct ggml_matrix * w, const float * x, float * y,
                               size_t first, size_t last) {
    const size_t part = (last - first) / STREAMS;
    size_t row = first;
    for (; row < first + part; row++) streams_times(wide, STREAMS, w, x, y, row, part);
    for (row += part * (STREAMS - 1); row < last; row++) streams_times(wide, 1, w, x, y, row, 0);
}

/* Several vectors: as fast as the units multiply. A tile is TILE rows × up to 4 vectors, one half
 * of the sums' lanes after the other. Its weights are widened once for a GROUP of vectors; they and
 * the vectors lie in panels of DEPTH columns, halves apart, interleaved in the order of use: loads
 * 64 bytes apart would wait for each other, and so do loads that cross a cache line. The rows come
 * from TILE places, each next row prefetched. From panel to panel, the sums of BLOCK rows wait in
 * memory. (FP16, 256 vectors, share of the peak: 57 % without panels, 80 % is what a tile can reach
 * beside the widening. Groups of 8 make 63 %, 16 73 %, 32 72 %; blocks of 48 rows 70 %.) */
enum { TILE = 3, GROUP = 16, DEPTH = 256, BLOCK = 48 };

/* Columns [k, k + depth) of n vectors from t on: [half][depth / 16][n][8], 0 past the end. */
GGML_INLINE void fill_panel(const struct ggml_input * in, size_t t, size_t n, size_t k,
                            size_t depth, float * panel) {
    const size_t half = (depth + 15) / 16 * n * 8;
    for (size_t i = 0; i < n; i++) {
        const float * x = in->x + (t + i) * in->ldx + k;
        float * to = panel + 8 * i;
        size_t j = 0;
        for (; depth - j >= 16; j += 16, to += 8 * n) {
            _mm256_store_ps(to, _mm256_loadu_ps(x + j));
            _mm256_store_ps(to + half, _mm256_loadu_ps(x + j + 8));
        }
        if (j == depth) continue;
        _mm256_store_ps(to, load(x + j, depth - j));
        _mm256_store_ps(to + half, load(x + j + 8, beyond(depth, j + 8)));
    }
}

/* Weights [k, k + 16) of a row, of which `left` exist, as two halves. */
GGML_INLINE void widen(bool wide, const uint8_t * row, size_t k, size_t left, float * low,
                       float * high) {
    _mm256_store_ps(low, load_weights(row, k, left, wide));
    _mm256_store_ps(high, load_weights(row, k + 8, beyond(left, 8), wide));
}

/* The same of `rows` rows, a constant: [half][depth / 16][rows][8]. */
GGML_INLINE void widen_rows(bool wide, int rows, const uint8_t * w, size_t distance,
                            size_t row_size, size_t depth, float * weights) {
    const size_t half = (depth + 15) / 16 * (size_t)rows * 8;
    for (int r = 0; r < rows; r++, w += distance) {
        float * to = weights + 8 * r;
        size_t k = 0;
        for (; depth - k >= 16; k += 16, to += 8 * rows) {
            _mm_prefetch((const char *)w + row_size + k * (wide ? 4 : 2), _MM_HINT_T0);
            widen(wide, w, k, 16, to, to + half);
        }
        if (k < depth) widen(wide, w, k, depth - k, to, to + half);
    }
}

/* Adds `steps` times 8 columns to half of a tile's sums; rows and n are constants. */
GGML_INLINE void half_tile(int rows, int n, size_t steps, const float * weights,
                           const float * panel, size_t panel_step, float (*sums)[GROUP][16],
                           size_t part) {
    __m256 acc[TILE][4];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) acc[r][i] = _mm256_loadu_ps(sums[(size_t)r * part][i]);
    for (size_t j = 0; j < steps; j++, weights += 8 * rows, panel += panel_step) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const __m256 x = _mm256_load_ps(panel + 8 * i);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++)
                acc[r][i] = _mm256_fmadd_ps(_mm256_load_ps(weights + 8 * r), x, acc[r][i]);
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) _mm256_storeu_ps(sums[(size_t)r * part][i], acc[r][i]);
}

/* Adds a panel's columns to the sums of `rows` rows, a constant, `part` rows apart. */
GGML_INLINE void rows_times(bool wide, int rows, const uint8_t * w, size_t row_size, size_t depth,
                            const float * panel, size_t n, float (*sums)[GROUP][16], size_t part) {
    _Alignas(64) float weights[TILE * DEPTH];
    const size_t steps = (depth + 15) / 16;
    widen_rows(wide, rows, w, part * row_size, row_size, depth, weights);
    size_t count;
    for (size_t i = 0; i < n; i += count) {
        const size_t tiles = (n - i + 3) / 4;
        count = (n - i + tiles - 1) / tiles;
        for (size_t half = 0; half < 2; half++) {
            const float * ws = weights + half * steps * (size_t)rows * 8;
            const float * xs = panel + (half * steps * n + i) * 8;
            float (*to)[GROUP][16] = (float (*)[GROUP][16])(void *)&sums[0][i][8 * half];
            switch (count) {
            case 4:
                half_tile(rows, 4, steps, ws, xs, 8 * n, to, part);
                break;
            case 3:
                half_tile(rows, 3, steps, ws, xs, 8 * n, to, part);
                break;
            default:
                half_tile(rows, 2, steps, ws, xs, 8 * n, to, part);
            }
        }
    }
}

/* Rows [first, last), at most BLOCK, times vectors [t, t + n). */
GGML_INLINE void float_block_times(bool wide, const struct ggml_matrix * w,
                                   const struct ggml_input * in, size_t t, size_t n, float * y,
                                   size_t ldy, size_t first, size_t last) {
    _Alignas(64) float panel[DEPTH * GROUP];
    _Alignas(64) float sums[BLOCK][GROUP][16];
    const size_t rows = last - first, part = rows / TILE, row_size = w->cols * (wide ? 4 : 2);
    memset(sums, 0, rows * sizeof *sums);
    for (size_t k = 0; k < w->cols; k += DEPTH) {
        const size_t depth = w->cols - k < DEPTH ? w->cols - k : DEPTH;
        const uint8_t * data = (const uint8_t *)w->data + first * row_size + k * (wide ? 4 : 2);
        fill_panel(in, t, n, k, depth, panel);
        for (size_t r = 0; r < part; r++)
            rows_times(wide, TILE, data + r * row_size, row_size, depth, panel, n, sums + r, part);
        for (size_t r = part * TILE; r < rows; r++)
            rows_times(wide, 1, data + r * row_size, row_size, depth, panel, n, sums + r, 0);
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < n; i++)
            y[(t + i) * ldy + first + r] =
                sum_lanes(_mm256_load_ps(sums[r][i]), _mm256_load_ps(sums[r][i] + 8));
}

/* Rows in blocks that stay in the cache while all vectors pass, in groups of about the same size,
 * so that no odd number is much slower. */
GGML_INLINE void matmul_floats(bool wide, const struct ggml_matrix * w,
                               const struct ggml_input * in, float * y, size_t ldy, size_t first,
                               size_t last) {
    if (in->n == 1) {
        matmul_vector(wide, w, in->x, y, first, last);
        return;
    }
    const size_t block = ggml_cached_rows(in->n, GROUP, w->cols * (wide ? 4 : 2), TILE, BLOCK);
    for (size_t row = first; row < last; row += block) {
        const size_t end = last - row < block ? last : row + block;
        size_t n;
        for (size_t t = 0; t < in->n; t += n) {
            const size_t left = in->n - t, groups = (left + GROUP - 1) / GROUP;
            n = (left + groups - 1) / groups;
            float_block_times(wide, w, in, t, n, y, ldy, row, end);
        }
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
    __m256 xs[4];
    for (int i = 0; i < n; i++) xs[i] = _mm256_set1_ps(x[i]);
    for (size_t r = 0; r < rows; r += 8) {
        __m256 acc = _mm256_load_ps(sums + r);
        for (int i = 0; i < n; i++) {
            if (r % (wide ? 16 : 32) == 0)
                _mm_prefetch((const char *)ahead[i] + r * (wide ? 4 : 2), _MM_HINT_T0);
            acc = _mm256_fmadd_ps(load_weights(columns[i], r, 8, wide), xs[i], acc);
        }
        _mm256_store_ps(sums + r, acc);
    }
}

GGML_COLUMNS_INSTANCES

/* ---- Low-rank products ---------------------------------------------------------------------- */

static void add_low_rank(const struct ggml_low_rank * w, const struct ggml_input * h, float * y,
                         size_t ldy, size_t first, size_t last) {
    for (size_t row = first; row < last; row += 8) {
        const size_t lane = row % GGML_STRIPE;
        const float * b = w->b + (row - lane) * w->rank + lane;
        for (size_t t = 0; t < h->n; t++) {
            const float * x = h->x + t * h->ldx;
            __m256 acc = load(y + t * ldy + row, last - row);
            for (size_t i = 0; i < w->rank; i++)
                acc = _mm256_fmadd_ps(_mm256_loadu_ps(b + i * GGML_STRIPE), _mm256_set1_ps(x[i]),
                                      acc);
            store(y + t * ldy + row, last - row, acc);
        }
    }
}

/* ---- Vectors -------------------------------------------------------------------------------- */

GGML_INLINE __m256i sum_pairs(__m256i a) {
    return _mm256_madd_epi16(a, _mm256_set1_epi16(1));
}

GGML_INLINE int32_t sum_int_lanes(__m256i v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
    __m128i one = _mm_add_epi32(two, _mm_shuffle_epi32(two, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(one);
}

/* 16-bit numbers [0, 16) and [16, 32), which fit in 8 bits, as bytes in order. */
GGML_INLINE __m256i bytes(__m256i low, __m256i high) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), _MM_SHUFFLE(3, 1, 2, 0));
}

static void quantize_act(enum ggml_activations activations, size_t n, const float * x,
                         uint8_t * out) {
    const float steps = ggml_act_steps(activations);
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256i slots = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0,
                                           1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    for (size_t b = 0; b < n / 32; b++, x += 32, out += sizeof(struct ggml_act)) {
        struct ggml_act * act = (struct ggml_act *)(void *)out;
        __m256 v[4];
        __m256i top = _mm256_setzero_si256(); /* the bits of magnitudes are ordered like them */
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        __m128i top4 = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        top4 = _mm_max_epi32(top4, _mm_shuffle_epi32(top4, _MM_SHUFFLE(1, 0, 3, 2)));
        top4 = _mm_max_epi32(top4, _mm_shuffle_epi32(top4, _MM_SHUFFLE(2, 3, 0, 1)));
        float amax = _mm_cvtss_f32(_mm_castsi128_ps(top4));
        float d = _mm_cvtsi128_si32(top4) < 0x7F800000 ? amax / steps : amax - amax;
        if (d < FLT_MIN) d = 0;

        __m256i a[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        if (d > 0) {
            __m256 id = _mm256_set1_ps(1 / d);
            for (int i = 0; i < 2; i++) {
                __m256i packed =
                    _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v[2 * i], id)),
                                       _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * i + 1], id)));
                a[i] = _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
            }
        }
        __m256i hi[2], lo[2];
        for (int i = 0; i < 2; i++) {
            _mm256_store_si256((__m256i *)(void *)act->a + i, _mm256_shuffle_epi8(a[i], slots));
            hi[i] = a[i];
            lo[i] = _mm256_setzero_si256();
            if (activations == GGML_A16) {
                hi[i] = _mm256_srai_epi16(_mm256_add_epi16(a[i], _mm256_set1_epi16(64)), 7);
                lo[i] = _mm256_sub_epi16(a[i], _mm256_slli_epi16(hi[i], 7));
            }
            act->sum_half[i] = sum_int_lanes(sum_pairs(a[i]));
            act->s_half[i] = d * (float)act->sum_half[i];
        }
        _mm256_store_si256((__m256i *)(void *)act->hi, bytes(hi[0], hi[1]));
        _mm256_store_si256((__m256i *)(void *)act->lo, bytes(lo[0], lo[1]));
        act->d = d;
        act->sum = act->sum_half[0] + act->sum_half[1];
        act->s = d * (float)act->sum;
        act->unused = 0;
    }
}

/* Words of columns [0, 8) of x: two even ones and, 8 words further, two odd ones. */
GGML_INLINE void make_words(const float * x, uint8_t * words) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i last_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), magnitude);
    __m256i v = _mm256_add_epi32(bits, _mm256_add_epi32(last_bit, _mm256_set1_epi32(0x7FFF)));
    v = _mm256_blendv_epi8(v, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    v = _mm256_blendv_epi8(v, _mm256_xor_si256(bits, magnitude), tiny);
    v = _mm256_and_si256(v, _mm256_set1_epi32((int)0xFFFF0000));
    /* of each four columns, the last two go below the first two */
    v = _mm256_or_si256(v, _mm256_srli_epi32(_mm256_shuffle_epi32(v, 0xEE), 16));
    v = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
    const __m128i both = _mm256_castsi256_si128(v);
    _mm_storel_epi64((__m128i *)(void *)words, both);
    _mm_storel_epi64((__m128i *)(void *)(words + 32), _mm_unpackhi_epi64(both, both));
}

static void bf16_act(size_t n, const float * x, uint8_t * act) {
    for (size_t k = 0; k < n; k += 32, act += GGML_BF16_WORDS * 4) {
        float rest[32] = {0};
        const float * block = x + k;
        if (n - k < 32) block = memcpy(rest, block, (n - k) * sizeof *x);
        for (int i = 0; i < 4; i++) make_words(block + 8 * i, act + 8 * i);
    }
}

GGML_INLINE __m256 exp8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1);
    __m256 t = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(89)), _mm256_set1_ps(-104));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(t, _mm256_set1_ps(1.44269504f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_sub_ps(t, _mm256_mul_ps(n, _mm256_set1_ps(0.693359375f)));
    r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(-2.12194440e-4f)));
    static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                         1.6666665459e-1f, 5.0000001201e-1f};
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++)
        p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(coefficients[i]));
    __m256 y = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), one);
    __m256i exponent = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
    __m256i half = _mm256_srai_epi32(exponent, 1), rest = _mm256_sub_epi32(exponent, half);
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

GGML_INLINE __m256 sigmoid8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1);
    __m256 negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_div_ps(one, _mm256_add_ps(one, exp8(negated)));
}

/* x_k, or (x_k - mean) squared, of 8 lanes. */
GGML_INLINE __m256 term(__m256 x, __m256 mean, bool squared) {
    if (!squared) return x;
    x = _mm256_sub_ps(x, mean);
    return _mm256_mul_ps(x, x);
}

/* The sum of terms; lanes past the end stay as they are. */
GGML_INLINE float sum_terms(size_t n, const float * x, float mean, bool squared) {
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps(), means = _mm256_set1_ps(mean);
    size_t k = 0;
    for (; n - k >= 16; k += 16) {
        low = _mm256_add_ps(low, term(_mm256_loadu_ps(x + k), means, squared));
        high = _mm256_add_ps(high, term(_mm256_loadu_ps(x + k + 8), means, squared));
    }
    const size_t rest = n - k, rest_high = rest > 8 ? rest - 8 : 0;
    __m256 sum = _mm256_add_ps(low, term(load(x + k, rest), means, squared));
    low = _mm256_blendv_ps(low, sum, _mm256_castsi256_ps(lanes(rest)));
    if (rest_high) {
        sum = _mm256_add_ps(high, term(load(x + k + 8, rest_high), means, squared));
        high = _mm256_blendv_ps(high, sum, _mm256_castsi256_ps(lanes(rest_high)));
    }
    return sum_lanes(low, high);
}

static void layer_norm(size_t n, const float * x, const float * w, const float * b, float * y) {
    float mean = sum_terms(n, x, 0, false) / (float)n;
    float var = sum_terms(n, x, mean, true) / (float)n;
    __m128 root = _mm_sqrt_ss(_mm_set_ss(var + 1e-5f));
    __m256 means = _mm256_set1_ps(mean), r = _mm256_set1_ps(1 / _mm_cvtss_f32(root));
    for (size_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_sub_ps(load(x + i, n - i), means), r);
        v = _mm256_mul_ps(v, load(w + i, n - i));
        store(y + i, n - i, _mm256_add_ps(v, load(b + i, n - i)));
    }
}

static void lerp(size_t n, const float * x, const float * prev, const float * mix, float * y) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 m = load(mix + i, n - i);
        __m256 now = _mm256_mul_ps(load(x + i, n - i), m);
        __m256 before = _mm256_mul_ps(load(prev + i, n - i), _mm256_sub_ps(_mm256_set1_ps(1), m));
        store(y + i, n - i, _mm256_add_ps(now, before));
    }
}

static void exp_vector(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 8) store(y + i, n - i, exp8(load(x + i, n - i)));
}

static void relu2(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 z = _mm256_max_ps(_mm256_setzero_ps(), load(x + i, n - i)); /* NaN stays NaN */
        store(y + i, n - i, _mm256_mul_ps(z, z));
    }
}

static void add(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 8)
        store(y + i, n - i, _mm256_add_ps(load(y + i, n - i), load(x + i, n - i)));
}

static void sigmoid_mul(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 8)
        store(y + i, n - i, _mm256_mul_ps(sigmoid8(load(r + i, n - i)), load(x + i, n - i)));
}

static void sigmoid_mul_add(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 gated = _mm256_mul_ps(sigmoid8(load(r + i, n - i)), load(x + i, n - i));
        store(y + i, n - i, _mm256_add_ps(load(y + i, n - i), gated));
    }
}

static void wkv(size_t n, const float * u, const float * w, const float * k, const float * v,
                float * aa, float * bb, float * pp, float * y) {
    for (size_t i = 0; i < n; i += 8) {
        const size_t rest = n - i;
        __m256 key = load(k + i, rest), value = load(v + i, rest), p = load(pp + i, rest);
        __m256 a = load(aa + i, rest), b = load(bb + i, rest);
        __m256 ww = _mm256_add_ps(load(u + i, rest), key);
        __m256 q = _mm256_max_ps(p, ww);
        __m256 e1 = exp8(_mm256_sub_ps(p, q)), e2 = exp8(_mm256_sub_ps(ww, q));
        __m256 numerator = _mm256_add_ps(_mm256_mul_ps(e1, a), _mm256_mul_ps(e2, value));
        __m256 denominator = _mm256_add_ps(_mm256_mul_ps(e1, b), e2);
        ww = _mm256_add_ps(p, load(w + i, rest));
        q = _mm256_max_ps(ww, key);
        e1 = exp8(_mm256_sub_ps(ww, q));
        e2 = exp8(_mm256_sub_ps(key, q));
        store(aa + i, rest, _mm256_add_ps(_mm256_mul_ps(e1, a), _mm256_mul_ps(e2, value)));
        store(bb + i, rest, _mm256_add_ps(_mm256_mul_ps(e1, b), e2));
        store(pp + i, rest, q);
        store(y + i, rest, _mm256_div_ps(numerator, denominator));
    }
}

/* `count` registers of columns, the last of them perhaps in part. */
GGML_INLINE void attend(size_t count, size_t d, size_t n, const float * q, const float * k,
                        const float * v, float scale, float * m, size_t ldm, float * y) {
    __m256 value[4], acc[4];
    for (size_t j = 0; j < count; j++) {
        value[j] = load(v + 8 * j, n - 8 * j);
        acc[j] = _mm256_setzero_ps();
    }
    for (size_t i = 0; i < d; i++, m += ldm) {
        const __m256 qi = _mm256_set1_ps(q[i]), ki = _mm256_set1_ps(k[i]);
        for (size_t j = 0; j < count; j++) {
            __m256 row = load(m + 8 * j, n - 8 * j);
            row = _mm256_add_ps(row, _mm256_mul_ps(ki, value[j]));
            store(m + 8 * j, n - 8 * j, row);
            acc[j] = _mm256_add_ps(acc[j], _mm256_mul_ps(qi, row));
        }
    }
    for (size_t j = 0; j < count; j++) {
        __m256 sum = load(y + 8 * j, n - 8 * j);
        store(y + 8 * j, n - 8 * j,
              _mm256_add_ps(sum, _mm256_mul_ps(acc[j], _mm256_set1_ps(scale))));
    }
}

static void linear_attention(size_t d, size_t n, const float * q, const float * k, const float * v,
                             float scale, float * m, size_t ldm, float * y) {
    size_t c = 0;
    for (; n - c >= 32; c += 32) attend(4, d, 32, q, k, v + c, scale, m + c, ldm, y + c);
    for (; c < n; c += 8) attend(1, d, n - c, q, k, v + c, scale, m + c, ldm, y + c);
}

/* ---- Limits --------------------------------------------------------------------------------- */

GGML_INLINE uint64_t read_streams(const uint8_t * data, size_t n, size_t streams, size_t ahead) {
    const size_t part = n / streams;
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                      _mm256_setzero_si256()};
    for (size_t i = 0; i < part; i += 128) {
        for (size_t s = 0; s < streams; s++) {
            const uint8_t * p = data + s * part + i;
            if (ahead) {
                _mm_prefetch((const char *)p + ahead, _MM_HINT_T0);
                _mm_prefetch((const char *)p + ahead + 64, _MM_HINT_T0);
            }
            for (int j = 0; j < 4; j++) {
                const __m256i * from = (const __m256i *)(const void *)p + j;
                sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256(from));
            }
        }
    }
    sum[0] = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    uint64_t words[4];
    _mm256_storeu_si256((__m256i *)(void *)words, sum[0]);
    return words[0] + words[1] + words[2] + words[3];
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

/* Sums that don't wait for each other: enough to keep the units busy, and all in registers. */
enum { FMA_CHAINS = 12, DOT_CHAINS = 8 };

static float fma_all(size_t n) {
    __m256 sum[FMA_CHAINS], x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1);
    for (int j = 0; j < FMA_CHAINS; j++) sum[j] = _mm256_set1_ps((float)j);
    for (size_t i = 0; i < n; i += FMA_CHAINS * 8) {
#pragma GCC unroll 12
        for (int j = 0; j < FMA_CHAINS; j++) sum[j] = _mm256_fmadd_ps(sum[j], x, y);
    }
    for (int j = 1; j < FMA_CHAINS; j++) sum[0] = _mm256_add_ps(sum[0], sum[j]);
    return _mm256_cvtss_f32(sum[0]);
}

/* One factor is the sum itself: a product of constants would be computed once. */
static int32_t dot_all(size_t n) {
    __m256i sum[DOT_CHAINS], x = _mm256_set1_epi8(3);
    for (int j = 0; j < DOT_CHAINS; j++) sum[j] = _mm256_set1_epi32(j);
    for (size_t i = 0; i < n; i += DOT_CHAINS * 32) {
#pragma GCC unroll 8
        for (int j = 0; j < DOT_CHAINS; j++) {
            __m256i product = _mm256_madd_epi16(_mm256_maddubs_epi16(sum[j], x), x);
            sum[j] = _mm256_add_epi32(sum[j], product);
        }
    }
    for (int j = 1; j < DOT_CHAINS; j++) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
    return _mm256_cvtsi256_si32(sum[0]);
}

const struct ggml_kernels ggml_kernels_avx2 = {
    .isa = "avx2",
    .needs = CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C,
    .quantize_act = quantize_act,
    .bf16_act = bf16_act,
    .matmul = {[GGML_TYPE_FP32] = matmul_FP32, [GGML_TYPE_FP16] = matmul_FP16},
    .sparse = {GGML_COLUMNS_ENTRIES},
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
