/* What kernels_avx2.c is for FP32 and FP16, this is for matrices that lie in stripes. A stripe's 16
 * rows are two registers of 8 lanes. */
#include <immintrin.h>
#include <string.h>

#include "columns.h"
#include "cpu.h"
#include "kernels.h"

/* ---- Quantized matrices --------------------------------------------------------------------- */

/* Codes of 4 and 5 bits are multiplied as bytes with an activation's high and low part (vpmaddubsw,
 * u8 × s8): 16 products of 4 bits (15 * 127 * 16 < 2^15) or 8 of 5 bits fit in an int16, so the
 * sums are exact. Codes of 8 bits are multiplied as 16-bit numbers with the whole activation
 * (vpmaddwd).
 */

enum {
    MOST = 16,        /* vectors that share an unpacked block */
    AHEAD = 1024,     /* bytes from what is read to what is prefetched */
    BF16_VECTORS = 4, /* so many vectors' sums of bf16 fit in registers */
};

/* A block of a stripe, unpacked for several vectors. */
struct unpacked {
    __m256i codes[16][2]; /* [step][half]: a lane has 4 bytes of its row, or 2 words */
    __m256 d[2][2];       /* [part][half] */
    __m256 m[2][2];
};

/* 32 bytes of a block, at register i of a field. */
GGML_INLINE __m256i load_bytes(const uint8_t * field, int i) {
    return _mm256_loadu_si256((const __m256i *)(const void *)field + i);
}

/* 8 scales, rows [8 * half, 8 * half + 8) of the stripe. */
GGML_INLINE __m256 load_scales(const uint8_t * from, int half, bool wide) {
    if (wide) return _mm256_loadu_ps((const float *)(const void *)from + 8 * half);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from + half));
}

/* Codes of 8 rows, one row per 32-bit lane. A step is four bytes, weights 4 * step .. 4 * step + 3;
 * of 8-bit codes it is two words, weights 4u and 4u + 2 if step = 2u, 4u + 1 and 4u + 3 if it is
 * 2u + 1. `step` is even and `odd` a constant; bit 4 + odd of `fifth` is the step's. */
GGML_INLINE __m256i load_codes(enum ggml_type type, const uint8_t * block, __m256i fifth, int step,
                               int odd, int half) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    __m256i codes = load_bytes(block + ggml_stripe_block(type).qs, step + half);
    if (layout->bits == 8) return _mm256_srai_epi16(odd ? codes : _mm256_slli_epi16(codes, 8), 8);
    if (odd) codes = _mm256_srli_epi16(codes, 4);
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    if (layout->bits == 4) return codes;
    if (odd) fifth = _mm256_srli_epi16(fifth, 1);
    return _mm256_or_si256(codes, _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
}

/* The fifth bits as load_codes wants them for steps first (0 or 4) and first + 1; shifted to the
 * right by 2, for the next two. */
GGML_INLINE __m256i load_fifth(enum ggml_type type, const uint8_t * block, int first, int half) {
    if (ggml_layouts[type].bits != 5) return _mm256_setzero_si256();
    const __m256i bits = load_bytes(block + ggml_stripe_block(type).qh, half);
    return first == 0 ? _mm256_slli_epi16(bits, 4) : bits;
}

GGML_INLINE void unpack(enum ggml_type type, const uint8_t * block, struct unpacked * to) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    for (int half = 0; half < 2; half++) {
        for (int first = 0; first < (layout->bits == 8 ? 16 : 8); first += 4) {
            __m256i fifth = load_fifth(type, block, first, half);
            for (int step = first; step < first + 4; step += 2) {
                to->codes[step][half] = load_codes(type, block, fifth, step, 0, half);
                to->codes[step + 1][half] = load_codes(type, block, fifth, step, 1, half);
                fifth = _mm256_srli_epi16(fifth, 2);
            }
        }
        for (int part = 0; part < 32 / layout->size; part++) {
            const size_t scale = (size_t)part * GGML_STRIPE * (layout->wide ? 4 : 2);
            to->d[part][half] = load_scales(block + at.d + scale, half, layout->wide);
            if (layout->min)
                to->m[part][half] = load_scales(block + at.m + scale, half, layout->wide);
        }
    }
}

/* Four bytes in every lane. */
GGML_INLINE __m256i broadcast(const void * from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
}

/* sum[i][half] of steps [first, first + steps) times n vectors, as words. The codes come from
 * `unpacked` or, if that is NULL, from the block. */
GGML_INLINE void multiply_words(enum ggml_type type, const uint8_t * block,
                                const struct unpacked * unpacked, int n,
                                const struct ggml_act * const * acts, size_t b, int first,
                                int steps, __m256i (*sum)[2]) {
    for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int step = first; step < first + steps; step += 2) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            __m256i codes[2];
            for (int half = 0; half < 2; half++)
                codes[half] =
                    unpacked ? unpacked->codes[step + odd][half]
                             : load_codes(type, block, _mm256_setzero_si256(), step, odd, half);
            for (int i = 0; i < n; i++) {
                const __m256i a = broadcast(acts[i][b].a + 2 * (step + odd));
                for (int half = 0; half < 2; half++)
                    sum[i][half] =
                        _mm256_add_epi32(sum[i][half], _mm256_madd_epi16(codes[half], a));
            }
        }
    }
}

/* The same as bytes, as many steps as an int16 can take; an activation is hi * high + lo, or hi
 * alone if not `low`. */
GGML_INLINE void multiply_bytes(enum ggml_type type, const uint8_t * block,
                                const struct unpacked * unpacked, int n, bool low, __m256i high,
                                const struct ggml_act * const * acts, size_t b, int first,
                                int steps, __m256i (*sum)[2]) {
    __m256i hi[4][2], lo[4][2], fifth[2];
    for (int half = 0; half < 2; half++) {
        if (!unpacked) fifth[half] = load_fifth(type, block, first, half);
        for (int i = 0; i < n; i++) hi[i][half] = lo[i][half] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int step = first; step < first + steps; step += 2) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            __m256i codes[2];
            for (int half = 0; half < 2; half++)
                codes[half] = unpacked ? unpacked->codes[step + odd][half]
                                       : load_codes(type, block, fifth[half], step, odd, half);
            for (int i = 0; i < n; i++) {
                const __m256i a_hi = broadcast(acts[i][b].hi + 4 * (step + odd));
                for (int half = 0; half < 2; half++)
                    hi[i][half] =
                        _mm256_add_epi16(hi[i][half], _mm256_maddubs_epi16(codes[half], a_hi));
                if (!low) continue;
                const __m256i a_lo = broadcast(acts[i][b].lo + 4 * (step + odd));
                for (int half = 0; half < 2; half++)
                    lo[i][half] =
                        _mm256_add_epi16(lo[i][half], _mm256_maddubs_epi16(codes[half], a_lo));
            }
        }
        if (!unpacked)
            for (int half = 0; half < 2; half++) fifth[half] = _mm256_srli_epi16(fifth[half], 2);
    }
    for (int i = 0; i < n; i++) {
        for (int half = 0; half < 2; half++) {
            sum[i][half] = _mm256_madd_epi16(hi[i][half], high);
            if (!low) continue;
            const __m256i rest = _mm256_madd_epi16(lo[i][half], _mm256_set1_epi16(1));
            sum[i][half] = _mm256_add_epi32(sum[i][half], rest);
        }
    }
}

/* Of each lane's 32 floats, the one at `index`, whose bits 3 and 4 are the masks' signs. */
GGML_INLINE __m256 pick(const __m256 from[4], __m256i index, __m256 bit3, __m256 bit4) {
    __m256 low = _mm256_blendv_ps(_mm256_permutevar8x32_ps(from[0], index),
                                  _mm256_permutevar8x32_ps(from[1], index), bit3);
    __m256 high = _mm256_blendv_ps(_mm256_permutevar8x32_ps(from[2], index),
                                   _mm256_permutevar8x32_ps(from[3], index), bit3);
    return _mm256_blendv_ps(low, high, bit4);
}

/* acc = fma(v, x_i, acc), acc = fma(-m, a_i * d, acc) in the rows that have an outlier. */
GGML_INLINE void add_outliers(enum ggml_type type, const uint8_t * block, const float * x,
                              const struct ggml_act * act, const __m256 m[2], __m256 acc[2]) {
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    /* from slots, as `a` counts, to weights, as x does: bits 0 and 1 of the index change places */
    const __m256i places = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0,
                                            2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __m256 xs[4], as[4];
    for (int i = 0; i < 4; i++) {
        __m128i a = _mm_load_si128((const __m128i *)(const void *)act->a + i);
        as[i] = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(a));
        xs[i] = _mm256_loadu_ps(x + 8 * i);
    }
    for (int half = 0; half < 2; half++) {
        const __m256i slot = _mm256_cvtepi16_epi32(
            _mm_loadu_si128((const __m128i *)(const void *)(block + at.index) + half));
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(slot, 28));
        const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(slot, 27));
        __m256 x_i = pick(xs, _mm256_shuffle_epi8(places, slot), bit3, bit4);
        __m256 a_i = _mm256_mul_ps(pick(as, slot, bit3, bit4), _mm256_set1_ps(act->d));
        __m256 with = _mm256_fmadd_ps(load_scales(block + at.outlier, half, false), x_i, acc[half]);
        with = _mm256_fnmadd_ps(m[half], a_i, with);
        const __m256 none = _mm256_castsi256_ps(slot); /* negative: GGML_NO_OUTLIER */
        acc[half] = _mm256_blendv_ps(with, acc[half], none);
    }
}

/* acc[i][half]: block b of a stripe times n vectors; type, n and low are constants. */
GGML_INLINE void block_times(enum ggml_type type, const uint8_t * block,
                             const struct unpacked * unpacked, int n, bool low, __m256i high,
                             const struct ggml_act * const * acts, const float * const * xs,
                             size_t b, __m256 (*acc)[2]) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const int parts = 32 / layout->size;
    for (int part = 0; part < parts; part++) {
        __m256i sum[4][2];
        if (layout->bits == 8) {
            multiply_words(type, block, unpacked, n, acts, b, 0, 16, sum);
        } else if (layout->bits == 4 && parts == 1) {
            multiply_bytes(type, block, unpacked, n, low, high, acts, b, 0, 8, sum);
        } else {
            multiply_bytes(type, block, unpacked, n, low, high, acts, b, 4 * part, 4, sum);
        }
        if (layout->bits == 5) {
            __m256i more[4][2];
            multiply_bytes(type, block, unpacked, n, low, high, acts, b, 4, 4, more);
            for (int i = 0; i < n; i++)
                for (int half = 0; half < 2; half++)
                    sum[i][half] = _mm256_add_epi32(sum[i][half], more[i][half]);
        }
        const size_t scale = (size_t)part * GGML_STRIPE * (layout->wide ? 4 : 2);
        __m256 d[2], m[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int half = 0; half < 2; half++) {
            d[half] = unpacked ? unpacked->d[part][half]
                               : load_scales(block + at.d + scale, half, layout->wide);
            if (layout->min)
                m[half] = unpacked ? unpacked->m[part][half]
                                   : load_scales(block + at.m + scale, half, layout->wide);
        }
        for (int i = 0; i < n; i++) {
            const struct ggml_act * act = acts[i] + b;
            const __m256i z =
                _mm256_set1_epi32(layout->zero * (parts == 2 ? act->sum_half[part] : act->sum));
            const __m256 s = _mm256_set1_ps(parts == 2 ? act->s_half[part] : act->s);
            for (int half = 0; half < 2; half++) {
                if (layout->zero) sum[i][half] = _mm256_sub_epi32(sum[i][half], z);
                __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][half]), _mm256_set1_ps(act->d));
                acc[i][half] = _mm256_fmadd_ps(d[half], t, acc[i][half]);
                if (layout->min) acc[i][half] = _mm256_fmadd_ps(m[half], s, acc[i][half]);
            }
            if (layout->outlier) add_outliers(type, block, xs[i] + 32 * b, act, m, acc[i]);
        }
    }
}

GGML_INLINE void prefetch(const uint8_t * block, size_t size) {
    for (size_t i = 0; i < size; i += 64)
        _mm_prefetch((const char *)block + AHEAD + i, _MM_HINT_T0);
}

/* How much hi counts in an activation. */
GGML_INLINE __m256i high_step(const struct ggml_input * in) {
    return _mm256_set1_epi16(in->activations == GGML_A8 ? 1 : 128);
}

GGML_INLINE void store_rows(float * y, size_t rows, const __m256 acc[2]) {
    float out[GGML_STRIPE];
    _mm256_storeu_ps(out, acc[0]);
    _mm256_storeu_ps(out + 8, acc[1]);
    memcpy(y, out, (rows < GGML_STRIPE ? rows : GGML_STRIPE) * sizeof *out);
}

/* One vector times the stripes (1 or 2, a constant) that start at `row` and, beside it, `apart`
 * rows further: two streams that are read at a time reach more of the bandwidth than one. */
GGML_INLINE void stripes_times_one(enum ggml_type type, int stripes, const struct ggml_matrix * w,
                                   const struct ggml_input * in, float * y, size_t row,
                                   size_t apart, size_t last) {
    const size_t stripe_size = ggml_stripe_size(type, w->cols);
    const size_t size = ggml_stripe_block(type).size;
    const uint8_t * from = (const uint8_t *)w->data + row / GGML_STRIPE * stripe_size;
    const size_t gap = apart / GGML_STRIPE * stripe_size;
    const struct ggml_act * act = ggml_act_of(in, 0, 0);
    const __m256i high = high_step(in);
    __m256 acc[2][1][2];
    for (int s = 0; s < stripes; s++) acc[s][0][0] = acc[s][0][1] = _mm256_setzero_ps();
    for (size_t b = 0; b < w->cols / 32; b++) {
        for (int s = 0; s < stripes; s++) {
            const uint8_t * block = from + (size_t)s * gap + b * size;
            prefetch(block, size);
            block_times(type, block, NULL, 1, true, high, &act, &in->x, b, acc[s]);
        }
    }
    for (int s = 0; s < stripes; s++) {
        const size_t r = row + (size_t)s * apart;
        store_rows(y + r, last - r, acc[s][0]);
    }
}

/* A stripe times n <= MOST vectors. */
GGML_INLINE void stripe_times_many(enum ggml_type type, bool low, const uint8_t * stripe,
                                   size_t blocks, size_t n, __m256i high,
                                   const struct ggml_act * const * acts, const float * const * xs,
                                   __m256 (*acc)[2]) {
    const size_t size = ggml_stripe_block(type).size;
    struct unpacked unpacked;
    for (size_t b = 0; b < blocks; b++) {
        const uint8_t * block = stripe + b * size;
        prefetch(block, size);
        unpack(type, block, &unpacked);
        size_t i = 0;
        if (ggml_layouts[type].bits == 8 || !low) /* one sum a vector and half: room for 4 */
            for (; n - i >= 4; i += 4)
                block_times(type, block, &unpacked, 4, low, high, acts + i, xs + i, b, acc + i);
        for (; n - i >= 2; i += 2)
            block_times(type, block, &unpacked, 2, low, high, acts + i, xs + i, b, acc + i);
        if (i < n) block_times(type, block, &unpacked, 1, low, high, acts + i, xs + i, b, acc + i);
    }
}

/* Vectors [t, t + n) of the input, n <= MOST. */
GGML_INLINE void stripes_times_many(enum ggml_type type, const struct ggml_matrix * w,
                                    const struct ggml_input * in, size_t t, size_t n, float * y,
                                    size_t ldy, size_t first, size_t last) {
    const size_t stripe_size = ggml_stripe_size(type, w->cols), blocks = w->cols / 32;
    const bool low = in->activations == GGML_A16 || ggml_layouts[type].bits == 8;
    const struct ggml_act * acts[MOST];
    const float * xs[MOST];
    for (size_t i = 0; i < n; i++) {
        acts[i] = ggml_act_of(in, t + i, ggml_act_size(w->cols));
        xs[i] = in->x + (t + i) * in->ldx;
    }
    for (size_t row = first; row < last; row += GGML_STRIPE) {
        const uint8_t * stripe = (const uint8_t *)w->data + row / GGML_STRIPE * stripe_size;
        __m256 acc[MOST][2];
        for (size_t i = 0; i < n; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
        if (low) {
            stripe_times_many(type, true, stripe, blocks, n, high_step(in), acts, xs, acc);
        } else {
            stripe_times_many(type, false, stripe, blocks, n, high_step(in), acts, xs, acc);
        }
        for (size_t i = 0; i < n; i++) store_rows(y + (t + i) * ldy + row, last - row, acc[i]);
    }
}

GGML_INLINE void matmul_stripes(enum ggml_type type, const struct ggml_matrix * w,
                                const struct ggml_input * in, float * y, size_t ldy, size_t first,
                                size_t last) {
    if (in->n == 1) {
        const size_t part = (last - first) / (2 * GGML_STRIPE) * GGML_STRIPE;
        for (size_t row = first; row < first + part; row += GGML_STRIPE)
            stripes_times_one(type, 2, w, in, y, row, part, last);
        for (size_t row = first + 2 * part; row < last; row += GGML_STRIPE)
            stripes_times_one(type, 1, w, in, y, row, 0, last);
        return;
    }
    for (size_t t = 0, n; t < in->n; t += n) {
        const size_t rest = in->n - t;
        n = rest / ((rest + MOST - 1) / MOST); /* nearly equal shares */
        stripes_times_many(type, w, in, t, n, y, ldy, first, last);
    }
}

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        matmul_stripes(GGML_TYPE_##TYPE, w, in, y, ldy, first, last);                              \
    }

GGML_QUANTIZED(INSTANCE)

/* Bytes of four registers side by side: a register's lane has four of one row. */
GGML_INLINE void interleave(const __m256i from[4], __m256i to[4]) {
    const __m256i low[2] = {_mm256_unpacklo_epi8(from[0], from[1]),
                            _mm256_unpacklo_epi8(from[2], from[3])};
    const __m256i high[2] = {_mm256_unpackhi_epi8(from[0], from[1]),
                             _mm256_unpackhi_epi8(from[2], from[3])};
    to[0] = _mm256_unpacklo_epi16(low[0], low[1]);
    to[1] = _mm256_unpackhi_epi16(low[0], low[1]);
    to[2] = _mm256_unpacklo_epi16(high[0], high[1]);
    to[3] = _mm256_unpackhi_epi16(high[0], high[1]);
}

/* Codes are multiplied as 16-bit numbers, those of even and of odd columns. */
GGML_INLINE void add_codes(bool wide, const struct ggml_nonzero_block * block,
                           const struct ggml_nonzero_block * next, const uint8_t * scales,
                           const uint8_t * ahead, size_t rows, float * sums) {
    const __m256 d = _mm256_set1_ps(block->act.d);
    const size_t width = wide ? 4 : 2;
    for (size_t r = 0; r < rows; r += 32) {
        const size_t half = r % 64 / 4, piece = r / 64 * 64; /* rows 16q + half .. 16q + half + 7 */
        if (half == 0) {
            for (size_t i = 0; i < next->n; i++)
                _mm_prefetch((const char *)next->column[i] + r, _MM_HINT_T0);
            for (size_t line = 0; line < 64 * width; line += 64)
                _mm_prefetch((const char *)ahead + r * width + line, _MM_HINT_T0);
        }
        __m256i sum[4];
        for (int q = 0; q < 4; q++) sum[q] = _mm256_set1_epi32(-128 * block->act.sum);
        for (size_t i = 0; i < block->n; i += 4) {
            const __m256i even = broadcast(block->act.a + i), odd = broadcast(block->act.a + i + 2);
            __m256i columns[4], codes[4];
            for (size_t j = 0; j < 4; j++) columns[j] = load_bytes(block->column[i + j] + r, 0);
            interleave(columns, codes);
            for (int q = 0; q < 4; q++) {
                const __m256i low = _mm256_and_si256(codes[q], _mm256_set1_epi16(255));
                const __m256i high = _mm256_srli_epi16(codes[q], 8);
                sum[q] = _mm256_add_epi32(sum[q], _mm256_madd_epi16(low, even));
                sum[q] = _mm256_add_epi32(sum[q], _mm256_madd_epi16(high, odd));
            }
        }
        for (size_t q = 0; q < 4; q++) {
            const size_t row = piece + 16 * q + half;
            const __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[q]), d);
            const __m256 scale = load_scales(scales + row * width, 0, wide);
            float * to = sums + row;
            _mm256_store_ps(to, _mm256_fmadd_ps(scale, t, _mm256_load_ps(to)));
        }
    }
}

GGML_CODES_INSTANCES

/* ---- BF16 matrices -------------------------------------------------------------------------- */

/* A tile, as of quantized matrices: stripes that begin at rows `row` and, if there are two, `row` +
 * `apart`, times vectors [t, t + n) of the input; both numbers are constants. */
GGML_INLINE void bf16_tile_times(int stripes, int n, const struct ggml_matrix * w,
                                 const struct ggml_input * in, size_t t, float * y, size_t ldy,
                                 size_t row, size_t apart, size_t last) {
    const size_t stripe_size = ggml_stripe_size(GGML_TYPE_BF16, w->cols);
    const size_t act_size = ggml_act_size(w->cols);
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    const uint8_t * from = (const uint8_t *)w->data + row / GGML_STRIPE * stripe_size;
    const size_t gap = apart / GGML_STRIPE * stripe_size;
    const uint8_t * act = in->act + t * act_size;
    __m256 acc[2][BF16_VECTORS][2];
    for (int s = 0; s < stripes; s++)
        for (int i = 0; i < n; i++) acc[s][i][0] = acc[s][i][1] = _mm256_setzero_ps();
    for (size_t k = 0; k < w->cols; k += 32) {
        for (int s = 0; s < stripes; s++) {
            __m256 sum[2][BF16_VECTORS][2];
            for (int odd = 0; odd < 2; odd++) {
                for (int i = 0; i < n; i++) sum[odd][i][0] = sum[odd][i][1] = _mm256_setzero_ps();
#pragma GCC unroll 8
                for (int p = 8 * odd; p < 8 * odd + 8; p++) {
                    const uint8_t * words = from + (size_t)s * gap + 64 * p;
                    __m256 high[2], low[2];
                    _mm_prefetch((const char *)words + AHEAD, _MM_HINT_T0);
                    for (int half = 0; half < 2; half++) {
                        const __m256i word = load_bytes(words, half);
                        high[half] = _mm256_castsi256_ps(_mm256_and_si256(word, upper));
                        low[half] = _mm256_castsi256_ps(_mm256_slli_epi32(word, 16));
                    }
                    for (int i = 0; i < n; i++) {
                        const __m256i x = broadcast(act + (size_t)i * act_size + 4 * p);
                        const __m256 x_high = _mm256_castsi256_ps(_mm256_and_si256(x, upper));
                        const __m256 x_low = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
                        __m256 * to = sum[odd][i];
                        for (int half = 0; half < 2; half++) {
                            to[half] = _mm256_fmadd_ps(high[half], x_high, to[half]);
                            to[half] = _mm256_fmadd_ps(low[half], x_low, to[half]);
                        }
                    }
                }
            }
            for (int i = 0; i < n; i++)
                for (int half = 0; half < 2; half++)
                    acc[s][i][half] = _mm256_add_ps(
                        acc[s][i][half], _mm256_add_ps(sum[0][i][half], sum[1][i][half]));
        }
        from += GGML_BF16_BLOCK;
        act += GGML_BF16_WORDS * 4;
    }
    for (int s = 0; s < stripes; s++) {
        const size_t r = row + (size_t)s * apart;
        for (int i = 0; i < n; i++) store_rows(y + (t + (size_t)i) * ldy + r, last - r, acc[s][i]);
    }
}

static void matmul_BF16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    const uint64_t saved = ggml_fp_flush();
    if (in->n == 1) {
        const size_t part = (last - first) / (2 * GGML_STRIPE) * GGML_STRIPE;
        for (size_t row = first; row < first + part; row += GGML_STRIPE)
            bf16_tile_times(2, 1, w, in, 0, y, ldy, row, part, last);
        for (size_t row = first + 2 * part; row < last; row += GGML_STRIPE)
            bf16_tile_times(1, 1, w, in, 0, y, ldy, row, 0, last);
    } else {
        for (size_t row = first; row < last; row += GGML_STRIPE) {
            for (size_t t = 0, n; t < in->n; t += n) {
                const size_t rest = in->n - t;
                n = rest / ((rest + BF16_VECTORS - 1) / BF16_VECTORS);
                switch (n) {
                case 1:
                    bf16_tile_times(1, 1, w, in, t, y, ldy, row, 0, last);
                    break;
                case 2:
                    bf16_tile_times(1, 2, w, in, t, y, ldy, row, 0, last);
                    break;
                case 3:
                    bf16_tile_times(1, 3, w, in, t, y, ldy, row, 0, last);
                    break;
                default:
                    bf16_tile_times(1, BF16_VECTORS, w, in, t, y, ldy, row, 0, last);
                }
            }
        }
    }
    ggml_fp_leave(saved);
}

const struct ggml_kernels ggml_kernels_stripes_avx2 = {
    .isa = "avx2",
    .needs = CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C,
    .matmul = {[GGML_TYPE_BF16] = matmul_BF16, GGML_QUANTIZED_ENTRIES},
    .sparse = {GGML_CODES_ENTRIES},
};
