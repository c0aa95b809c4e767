/* The arithmetic in AVX2, FMA and F16C. A stripe's 16 rows are two registers of 8 lanes; integers
 * are multiplied as 16-bit numbers (vpmaddwd), so that one pass takes an activation's 15 bits
 * whole. */
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "columns.h"
#include "cpu.h"
#include "kernels.h"

/* ---- Quantized matrices --------------------------------------------------------------------- */

/* 8 scales, rows [8 * half, 8 * half + 8) of the stripe. */
GGML_INLINE __m256 load_scales(const uint8_t * from, int half, bool wide) {
    if (wide) return _mm256_loadu_ps((const float *)(const void *)from + 8 * half);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from + half));
}

/* Bytes of weights 4u..4u+3, u in 0..7, of 8 rows: one row per 32-bit lane. */
GGML_INLINE __m256i load_codes(const struct ggml_layout * layout, const uint8_t * qs, __m256i qh,
                               int u, int half) {
    const __m256i * from = (const __m256i *)(const void *)qs;
    if (layout->bits == 8) return _mm256_loadu_si256(from + 2 * u + half);
    __m256i codes = _mm256_loadu_si256(from + 2 * (u / 2) + half);
    if (u % 2) codes = _mm256_srli_epi16(codes, 4);
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    if (layout->bits == 5) {
        __m256i fifth = u < 4 ? _mm256_slli_epi16(qh, 4 - u) : _mm256_srli_epi16(qh, u - 4);
        codes = _mm256_or_si256(codes, _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
    }
    return codes;
}

/* Bytes 0 and 2, or 1 and 3, of each lane as 16-bit numbers. */
GGML_INLINE __m256i even_bytes(const struct ggml_layout * layout, __m256i codes) {
    if (layout->bits == 8) return _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8);
    return _mm256_and_si256(codes, _mm256_set1_epi16(255));
}

GGML_INLINE __m256i odd_bytes(const struct ggml_layout * layout, __m256i codes) {
    return layout->bits == 8 ? _mm256_srai_epi16(codes, 8) : _mm256_srli_epi16(codes, 8);
}

/* Two neighbours of an activation block's `a`, in every lane. */
GGML_INLINE __m256i broadcast_pair(const struct ggml_act * act, int pair) {
    int32_t two;
    memcpy(&two, act->a + 2 * pair, sizeof two);
    return _mm256_set1_epi32(two);
}

/* Of each lane's 32 floats, the one in slot `index`; only the low 5 bits of an index count. */
GGML_INLINE __m256 pick(const __m256 from[4], __m256i index) {
    __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
    __m256 low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(from[0], index),
                                  _mm256_permutevar8x32_ps(from[1], index), bit3);
    __m256 high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(from[2], index),
                                   _mm256_permutevar8x32_ps(from[3], index), bit3);
    return _mm256_blendv_ps(low, high, bit4);
}

/* acc = fma(v, x_i, acc), acc = fma(-m, a_i * d, acc) in the rows that have an outlier. */
GGML_INLINE void add_outliers(const uint8_t * block, const struct ggml_stripe_block * at,
                              const float * x, const struct ggml_act * act, const __m256 m[2],
                              __m256 acc[2]) {
    __m256i index[2];
    __m256 from[4], x_picked[2];
    for (int half = 0; half < 2; half++)
        index[half] = _mm256_cvtepi16_epi32(
            _mm_loadu_si128((const __m128i *)(const void *)(block + at->index) + half));
    /* in slot order, as the indices count */
    for (int i = 0; i < 4; i++)
        from[i] = _mm256_permute_ps(_mm256_loadu_ps(x + 8 * i), _MM_SHUFFLE(3, 1, 2, 0));
    for (int half = 0; half < 2; half++) x_picked[half] = pick(from, index[half]);
    for (int i = 0; i < 4; i++) {
        __m128i a = _mm_load_si128((const __m128i *)(const void *)act->a + i);
        from[i] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(a));
    }
    for (int half = 0; half < 2; half++) {
        __m256 v = load_scales(block + at->outlier, half, false);
        __m256 a = _mm256_mul_ps(pick(from, index[half]), _mm256_set1_ps(act->d));
        __m256 with = _mm256_fmadd_ps(v, x_picked[half], acc[half]);
        with = _mm256_fnmadd_ps(m[half], a, with);
        __m256 none = _mm256_castsi256_ps(index[half]); /* negative: GGML_NO_OUTLIER */
        acc[half] = _mm256_blendv_ps(with, acc[half], none);
    }
}

/* One stripe times n vectors, n a constant: acc[i][half]. */
GGML_INLINE void stripe_times(enum ggml_type type, int n, const uint8_t * stripe, size_t blocks,
                              const struct ggml_act * const * acts, const float * const * xs,
                              __m256 (*acc)[2]) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const int parts = 32 / layout->size, units = layout->size / 4;
    for (size_t b = 0; b < blocks; b++) {
        const uint8_t * block = stripe + b * at.size;
        const __m256i * fifth = (const __m256i *)(const void *)(block + at.qh);
        for (int part = 0; part < parts; part++) {
            const size_t scale = (size_t)part * GGML_STRIPE * (layout->wide ? 4 : 2);
            __m256i sum[4][2];
            for (int i = 0; i < n; i++) {
                int32_t z = parts == 2 ? acts[i][b].sum_half[part] : acts[i][b].sum;
                sum[i][0] = sum[i][1] = _mm256_set1_epi32(-layout->zero * z);
            }
            __m256i qh[2] = {sum[0][0], sum[0][0]};
            if (layout->bits == 5) {
                qh[0] = _mm256_loadu_si256(fifth);
                qh[1] = _mm256_loadu_si256(fifth + 1);
            }
#pragma GCC unroll 8
            for (int u = part * units; u < (part + 1) * units; u++) {
                __m256i even[2], odd[2];
                for (int half = 0; half < 2; half++) {
                    __m256i codes = load_codes(layout, block + at.qs, qh[half], u, half);
                    even[half] = even_bytes(layout, codes);
                    odd[half] = odd_bytes(layout, codes);
                }
                for (int i = 0; i < n; i++) {
                    const __m256i a02 = broadcast_pair(acts[i] + b, 2 * u);
                    const __m256i a13 = broadcast_pair(acts[i] + b, 2 * u + 1);
                    for (int half = 0; half < 2; half++) {
                        sum[i][half] =
                            _mm256_add_epi32(sum[i][half], _mm256_madd_epi16(even[half], a02));
                        sum[i][half] =
                            _mm256_add_epi32(sum[i][half], _mm256_madd_epi16(odd[half], a13));
                    }
                }
            }
            __m256 m[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int half = 0; half < 2; half++) {
                __m256 d = load_scales(block + at.d + scale, half, layout->wide);
                if (layout->min) m[half] = load_scales(block + at.m + scale, half, layout->wide);
                for (int i = 0; i < n; i++) {
                    const struct ggml_act * act = acts[i] + b;
                    __m256 t =
                        _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][half]), _mm256_set1_ps(act->d));
                    acc[i][half] = _mm256_fmadd_ps(d, t, acc[i][half]);
                    if (!layout->min) continue;
                    __m256 s = _mm256_set1_ps(parts == 2 ? act->s_half[part] : act->s);
                    acc[i][half] = _mm256_fmadd_ps(m[half], s, acc[i][half]);
                }
            }
            if (!layout->outlier) continue;
            for (int i = 0; i < n; i++)
                add_outliers(block, &at, xs[i] + 32 * b, acts[i] + b, m, acc[i]);
        }
    }
}

/* Vectors [t, t + n) of the input, n a constant. */
GGML_INLINE void stripes_times(enum ggml_type type, int n, const struct ggml_matrix * w,
                               const struct ggml_input * in, size_t t, float * y, size_t ldy,
                               size_t first, size_t last) {
    const size_t stripe_size = ggml_stripe_size(type, w->cols);
    const struct ggml_act * acts[4];
    const float * xs[4];
    for (int i = 0; i < n; i++) {
        acts[i] = ggml_act_of(in, t + (size_t)i, ggml_act_size(w->cols));
        xs[i] = in->x + (t + (size_t)i) * in->ldx;
    }
    for (size_t row = first; row < last; row += GGML_STRIPE) {
        __m256 acc[4][2];
        for (int i = 0; i < n; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
        stripe_times(type, n, (const uint8_t *)w->data + row / GGML_STRIPE * stripe_size,
                     w->cols / 32, acts, xs, acc);
        size_t rows = last - row < GGML_STRIPE ? last - row : GGML_STRIPE;
        for (int i = 0; i < n; i++) {
            float out[GGML_STRIPE];
            _mm256_storeu_ps(out, acc[i][0]);
            _mm256_storeu_ps(out + 8, acc[i][1]);
            memcpy(y + (t + (size_t)i) * ldy + row, out, rows * sizeof *out);
        }
    }
}

GGML_INLINE void matmul_stripes(enum ggml_type type, const struct ggml_matrix * w,
                                const struct ggml_input * in, float * y, size_t ldy, size_t first,
                                size_t last) {
    size_t t = 0;
    for (; in->n - t >= 4; t += 4) stripes_times(type, 4, w, in, t, y, ldy, first, last);
    for (; in->n - t >= 2; t += 2) stripes_times(type, 2, w, in, t, y, ldy, first, last);
    if (t < in->n) stripes_times(type, 1, w, in, t, y, ldy, first, last);
}

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        matmul_stripes(GGML_TYPE_##TYPE, w, in, y, ldy, first, last);                              \
    }

INSTANCE(Q4_0_V100)
INSTANCE(Q4_1_V100)
INSTANCE(Q4_1_O)
INSTANCE(Q4_2)
INSTANCE(Q4_3)
INSTANCE(Q4_0)
INSTANCE(Q4_1)
INSTANCE(Q5_0)
INSTANCE(Q5_1)
INSTANCE(Q8_0_V100)
INSTANCE(Q8_0)

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

/* Weights [k, k + 8) of a row, of which n exist. */
GGML_INLINE __m256 load_weights(const uint8_t * row, size_t k, size_t n, bool wide) {
    if (wide) return load((const float *)(const void *)row + k, n);
    const __m128i * from = (const __m128i *)(const void *)(row + 2 * k);
    if (n >= 8) return _mm256_cvtph_ps(_mm_loadu_si128(from));
    uint16_t rest[8] = {0};
    memcpy(rest, from, 2 * n);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)rest));
}

/* A tile of rows × n vectors, both constants: as many sums in flight as hide the latency. */
GGML_INLINE void rows_times(bool wide, int rows, int n, const struct ggml_matrix * w,
                            const struct ggml_input * in, size_t t, float * y, size_t ldy,
                            size_t row) {
    const size_t row_size = w->cols * (wide ? 4 : 2);
    const uint8_t * data = (const uint8_t *)w->data + row * row_size;
    const float * x = in->x + t * in->ldx;
    __m256 acc[4][4][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) acc[r][i][0] = acc[r][i][1] = _mm256_setzero_ps();
    const size_t whole = w->cols - w->cols % 16;
    for (size_t k = 0; k < whole; k += 16) {
        for (int half = 0; half < 2; half++) {
            __m256 xs[4];
            for (int i = 0; i < n; i++)
                xs[i] = _mm256_loadu_ps(x + (size_t)i * in->ldx + k + 8 * (size_t)half);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                __m256 weights =
                    load_weights(data + (size_t)r * row_size, k + 8 * (size_t)half, 8, wide);
                for (int i = 0; i < n; i++)
                    acc[r][i][half] = _mm256_fmadd_ps(weights, xs[i], acc[r][i][half]);
            }
        }
    }
    for (int half = 0; half < 2; half++) {
        const size_t k = whole + 8 * (size_t)half;
        if (k >= w->cols) break;
        const size_t rest = w->cols - k;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m256 weights = load_weights(data + (size_t)r * row_size, k, rest, wide);
            for (int i = 0; i < n; i++) {
                __m256 sum = _mm256_fmadd_ps(weights, load(x + (size_t)i * in->ldx + k, rest),
                                             acc[r][i][half]);
                /* lanes without a weight stay as they are, even their zeros' signs */
                acc[r][i][half] =
                    _mm256_blendv_ps(acc[r][i][half], sum, _mm256_castsi256_ps(lanes(rest)));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++)
            y[(t + (size_t)i) * ldy + row + (size_t)r] = sum_lanes(acc[r][i][0], acc[r][i][1]);
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
        for (size_t j = 0; j < 16 && j < w->cols - k; j += 8) {
            const size_t rest = w->cols - k - j;
            const __m256 xs = load(x + k + j, rest);
            const __m256 exist = _mm256_castsi256_ps(lanes(rest));
#pragma GCC unroll 8
            for (int s = 0; s < n; s++) {
                const __m256 weights =
                    load_weights(data + (size_t)s * distance * row_size, k + j, rest, wide);
                const __m256 sum = _mm256_fmadd_ps(weights, xs, acc[s][j / 8]);
                acc[s][j / 8] = _mm256_blendv_ps(acc[s][j / 8], sum, exist);
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

GGML_INLINE void matmul_rows(bool wide, const struct ggml_matrix * w, const struct ggml_input * in,
                             float * y, size_t ldy, size_t first, size_t last) {
    if (in->n == 1) {
        matmul_vector(wide, w, in->x, y, first, last);
        return;
    }
    size_t row = first;
    for (; last - row >= 4; row += 4) {
        size_t t = 0;
        for (; in->n - t >= 3; t += 3) {
            rows_times(wide, 2, 3, w, in, t, y, ldy, row);
            rows_times(wide, 2, 3, w, in, t, y, ldy, row + 2);
        }
        if (in->n - t == 2) {
            rows_times(wide, 2, 2, w, in, t, y, ldy, row);
            rows_times(wide, 2, 2, w, in, t, y, ldy, row + 2);
        } else if (in->n - t == 1) {
            rows_times(wide, 4, 1, w, in, t, y, ldy, row);
        }
    }
    for (; row < last; row++)
        for (size_t t = 0; t < in->n; t++) rows_times(wide, 1, 1, w, in, t, y, ldy, row);
}

static void matmul_FP32(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    matmul_rows(true, w, in, y, ldy, first, last);
}

static void matmul_FP16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    matmul_rows(false, w, in, y, ldy, first, last);
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
    .matmul =
        {
            [GGML_TYPE_FP32] = matmul_FP32,
            [GGML_TYPE_FP16] = matmul_FP16,
            [GGML_TYPE_Q4_0_V100] = matmul_Q4_0_V100,
            [GGML_TYPE_Q4_1_V100] = matmul_Q4_1_V100,
            [GGML_TYPE_Q4_1_O] = matmul_Q4_1_O,
            [GGML_TYPE_Q4_2] = matmul_Q4_2,
            [GGML_TYPE_Q4_3] = matmul_Q4_3,
            [GGML_TYPE_Q5_0_V100] = matmul_Q5_0,
            [GGML_TYPE_Q5_1_V100] = matmul_Q5_1,
            [GGML_TYPE_Q8_0_V100] = matmul_Q8_0_V100,
            [GGML_TYPE_Q4_0] = matmul_Q4_0,
            [GGML_TYPE_Q4_1] = matmul_Q4_1,
            [GGML_TYPE_Q5_0] = matmul_Q5_0,
            [GGML_TYPE_Q5_1] = matmul_Q5_1,
            [GGML_TYPE_Q8_0] = matmul_Q8_0,
        },
    .sparse = {[GGML_TYPE_FP32] = sparse_FP32, [GGML_TYPE_FP16] = sparse_FP16},
    .layer_norm = layer_norm,
    .lerp = lerp,
    .exp = exp_vector,
    .relu2 = relu2,
    .add = add,
    .sigmoid_mul = sigmoid_mul,
    .sigmoid_mul_add = sigmoid_mul_add,
    .wkv = wkv,
    .read = read_all,
    .fma = fma_all,
    .dot = dot_all,
};
