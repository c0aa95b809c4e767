/* The arithmetic in SSE2, which every x86-64 CPU has: for those without AVX2. A stripe's 16 rows
 * are four groups of four, a register each; codes are widened to 16 bits and multiplied with whole
 * activations (pmaddwd). There is no instruction for fma: it is a product and a sum in double, as
 * in fma32.h, which has the rare cases. */
#include <emmintrin.h>

#include "columns.h"
#include "cpu.h"
#include "fma32.h"
#include "kernels.h"

enum { GROUPS = 4, AHEAD = 1024 /* bytes from what is read to what is prefetched */ };

/* ---- fma ------------------------------------------------------------------------------------ */

/* acc = fma(a, b, acc), lane by lane. */
static void fma_exactly(const __m128 a[GROUPS], const __m128 b[GROUPS], __m128 acc[GROUPS]) {
    float x[GGML_STRIPE], y[GGML_STRIPE], z[GGML_STRIPE];
    memcpy(x, a, sizeof x);
    memcpy(y, b, sizeof y);
    memcpy(z, acc, sizeof z);
    for (int j = 0; j < GGML_STRIPE; j++) z[j] = fma32(x[j], y[j], z[j]);
    memcpy(acc, z, sizeof z);
}

/* fma in 4 lanes, unless `rare` says that a lane's double must not be rounded to float just so: it
 * is the middle of two floats, or less than the smallest normal one. */
GGML_INLINE __m128 fma4(__m128 a, __m128 b, __m128 c, __m128i * rare) {
    const __m128d low = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), _mm_cvtps_pd(c));
    a = _mm_movehl_ps(a, a);
    b = _mm_movehl_ps(b, b);
    c = _mm_movehl_ps(c, c);
    const __m128d high = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b)), _mm_cvtps_pd(c));
    const __m128 low_words = _mm_castpd_ps(low), high_words = _mm_castpd_ps(high);
    __m128i ends = _mm_castps_si128(_mm_shuffle_ps(low_words, high_words, 0x88));
    ends = _mm_and_si128(ends, _mm_set1_epi32(0x1FFFFFFF)); /* bits that float has not */
    const __m128 sums = _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
    const __m128i magnitudes = _mm_and_si128(_mm_castps_si128(sums), _mm_set1_epi32(0x7FFFFFFF));
    *rare = _mm_or_si128(*rare, _mm_cmpeq_epi32(ends, _mm_set1_epi32(0x10000000)));
    *rare = _mm_or_si128(*rare, _mm_cmplt_epi32(magnitudes, _mm_set1_epi32(0x00800001)));
    return sums;
}

/* acc = fma(a, b, acc) in 16 lanes. */
GGML_INLINE void fma16(const __m128 a[GROUPS], const __m128 b[GROUPS], __m128 acc[GROUPS]) {
    __m128i rare = _mm_setzero_si128();
    __m128 sums[GROUPS];
    for (int group = 0; group < GROUPS; group++)
        sums[group] = fma4(a[group], b[group], acc[group], &rare);
    if (_mm_movemask_epi8(rare)) {
        __m128 exact[GROUPS]; /* so that only this needs memory */
        memcpy(exact, acc, sizeof exact);
        fma_exactly(a, b, exact);
        memcpy(acc, exact, sizeof exact);
    } else {
        memcpy(acc, sums, sizeof sums);
    }
}

/* ---- Quantized matrices --------------------------------------------------------------------- */

/* A block of a stripe, unpacked for several vectors. */
struct unpacked {
    __m128i words[16][GROUPS];
    __m128 d[2][GROUPS]; /* [part] */
    __m128 m[2][GROUPS];
};

GGML_INLINE __m128i load_bytes(const uint8_t * from) {
    return _mm_loadu_si128((const __m128i *)(const void *)from);
}

/* Floats at any address: 4 of them, or of as many halves. */
GGML_INLINE __m128 load_floats(const uint8_t * from, bool wide) {
    if (wide) return _mm_loadu_ps((const float *)(const void *)from);
    const __m128i halves = _mm_loadl_epi64((const __m128i *)(const void *)from);
    const __m128i bits = _mm_unpacklo_epi16(_mm_setzero_si128(), halves);
    const __m128i sign = _mm_and_si128(bits, _mm_set1_epi32((int)0x80000000));
    const __m128i magnitude = _mm_srli_epi32(_mm_xor_si128(bits, sign), 3);
    /* the exponent grows by 127 - 15; that of infinity and NaN to the largest there is */
    __m128 value = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112f));
    __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32((0x7C00 << 13) - 1));
    special = _mm_and_si128(special, _mm_set1_epi32(0x7F800000));
    return _mm_or_ps(value, _mm_castsi128_ps(_mm_or_si128(special, sign)));
}

/* Weights 4u and 4u + 2 of 4 rows if pair = 2u, 4u + 1 and 4u + 3 if pair = 2u + 1: two words in
 * each row's lane, as the activations' `a` has them. */
GGML_INLINE __m128i load_words(enum ggml_type type, const uint8_t * block, int pair, int group) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const int unit = pair / 2, odd = pair % 2;
    const uint8_t * qs = block + at.qs + 16 * group;
    if (layout->bits == 8) {
        const __m128i codes = load_bytes(qs + 64 * unit);
        return _mm_srai_epi16(odd ? codes : _mm_slli_epi16(codes, 8), 8);
    }
    __m128i codes = load_bytes(qs + 64 * (unit / 2));
    codes = _mm_srli_epi16(codes, 8 * odd + 4 * (unit % 2));
    codes = _mm_and_si128(codes, _mm_set1_epi16(15));
    if (layout->bits == 4) return codes;
    __m128i fifth = load_bytes(block + at.qh + 16 * group);
    const int bit = 8 * odd + unit;
    fifth = bit < 4 ? _mm_slli_epi16(fifth, 4 - bit) : _mm_srli_epi16(fifth, bit - 4);
    return _mm_or_si128(codes, _mm_and_si128(fifth, _mm_set1_epi16(16)));
}

GGML_INLINE void load_scales(const uint8_t * from, bool wide, __m128 to[GROUPS]) {
    for (int group = 0; group < GROUPS; group++)
        to[group] = load_floats(from + (wide ? 16 : 8) * group, wide);
}

GGML_INLINE void unpack(enum ggml_type type, const uint8_t * block, struct unpacked * to) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; pair++)
        for (int group = 0; group < GROUPS; group++)
            to->words[pair][group] = load_words(type, block, pair, group);
    for (int part = 0; part < 32 / layout->size; part++) {
        const size_t scale = (size_t)part * GGML_STRIPE * (layout->wide ? 4 : 2);
        load_scales(block + at.d + scale, layout->wide, to->d[part]);
        if (layout->min) load_scales(block + at.m + scale, layout->wide, to->m[part]);
    }
}

/* Two activations in every lane. */
GGML_INLINE __m128i broadcast(const int16_t * from) {
    int32_t two;
    memcpy(&two, from, sizeof two);
    return _mm_set1_epi32(two);
}

/* t = float(sum of (q - z) * a) * d over part `part` of a block. The codes come from `unpacked` or,
 * if that is NULL, from the block. */
GGML_INLINE void dot(enum ggml_type type, const uint8_t * block, const struct unpacked * unpacked,
                     const struct ggml_act * act, int part, __m128 t[GROUPS]) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const int pairs = layout->size / 2, step = layout->bits == 8 ? 2 : 4; /* a register's pairs */
    const int32_t z = layout->zero * (layout->size == 16 ? act->sum_half[part] : act->sum);
    __m128i sum[GROUPS];
    for (int group = 0; group < GROUPS; group++) sum[group] = _mm_set1_epi32(-z);
#pragma GCC unroll 8
    for (int first = part * pairs; first < (part + 1) * pairs; first += step) {
        __m128i a[4];
        for (int i = 0; i < step; i++) a[i] = broadcast(act->a + 2 * (first + i));
        for (int group = 0; group < GROUPS; group++) {
            for (int i = 0; i < step; i++) {
                const __m128i words = unpacked ? unpacked->words[first + i][group]
                                               : load_words(type, block, first + i, group);
                sum[group] = _mm_add_epi32(sum[group], _mm_madd_epi16(words, a[i]));
            }
        }
    }
    for (int group = 0; group < GROUPS; group++)
        t[group] = _mm_mul_ps(_mm_cvtepi32_ps(sum[group]), _mm_set1_ps(act->d));
}

/* acc = fma(v, x_i, acc), acc = fma(-m, a_i * d, acc) in the rows that have an outlier. */
GGML_INLINE void add_outliers(const uint8_t * block, const struct ggml_stripe_block * at,
                              const float * x, const struct ggml_act * act, const __m128 m[GROUPS],
                              __m128 acc[GROUPS]) {
    uint16_t slots[GGML_STRIPE];
    float x_i[GGML_STRIPE], a_i[GGML_STRIPE];
    __m128 v[GROUPS], xs[GROUPS], minus_m[GROUPS], as[GROUPS], sums[GROUPS];
    memcpy(slots, block + at->index, sizeof slots);
    for (int row = 0; row < GGML_STRIPE; row++) {
        const int slot = slots[row] & 31; /* any, if there is none */
        x_i[row] = x[ggml_slot(slot)];
        a_i[row] = (float)act->a[slot];
    }
    load_scales(block + at->outlier, false, v);
    for (int group = 0; group < GROUPS; group++) {
        xs[group] = _mm_loadu_ps(x_i + 4 * group);
        as[group] = _mm_mul_ps(_mm_loadu_ps(a_i + 4 * group), _mm_set1_ps(act->d));
        minus_m[group] = _mm_xor_ps(m[group], _mm_set1_ps(-0.0f));
        sums[group] = acc[group];
    }
    fma16(v, xs, sums);
    fma16(minus_m, as, sums);
    for (int group = 0; group < GROUPS; group++) {
        const __m128i index = _mm_loadl_epi64((const __m128i *)(const void *)(slots + 4 * group));
        const __m128i words = _mm_unpacklo_epi16(index, index);
        const __m128 none = _mm_castsi128_ps(_mm_cmpeq_epi32(words, _mm_set1_epi32(-1)));
        acc[group] = _mm_or_ps(_mm_and_ps(none, acc[group]), _mm_andnot_ps(none, sums[group]));
    }
}

/* acc: block b of a stripe times a vector. */
GGML_INLINE void block_times(enum ggml_type type, const uint8_t * block,
                             const struct unpacked * unpacked, const struct ggml_act * act,
                             const float * x, __m128 acc[GROUPS]) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const int parts = 32 / layout->size;
    for (int part = 0; part < parts; part++) {
        const size_t scale = (size_t)part * GGML_STRIPE * (layout->wide ? 4 : 2);
        __m128 t[GROUPS], d[GROUPS], m[GROUPS], s[GROUPS];
        dot(type, block, unpacked, act, part, t);
        load_scales(block + at.d + scale, layout->wide, d);
        fma16(unpacked ? unpacked->d[part] : d, t, acc);
        if (!layout->min) continue;
        load_scales(block + at.m + scale, layout->wide, m);
        for (int group = 0; group < GROUPS; group++)
            s[group] = _mm_set1_ps(parts == 2 ? act->s_half[part] : act->s);
        fma16(unpacked ? unpacked->m[part] : m, s, acc);
        if (layout->outlier)
            add_outliers(block, &at, x, act, unpacked ? unpacked->m[part] : m, acc);
    }
}

GGML_INLINE void store_rows(float * y, size_t rows, const __m128 acc[GROUPS]) {
    memcpy(y, acc, (rows < GGML_STRIPE ? rows : GGML_STRIPE) * sizeof *y);
}

GGML_INLINE void prefetch(const uint8_t * block, size_t size) {
    for (size_t i = 0; i < size; i += 64)
        _mm_prefetch((const char *)block + AHEAD + i, _MM_HINT_T0);
}

enum { MOST = 8 /* vectors that share an unpacked block */ };

/* A stripe times n <= MOST vectors from t on; for one, nothing is unpacked to memory. */
GGML_INLINE void stripe_times(enum ggml_type type, bool one, const struct ggml_matrix * w,
                              const struct ggml_input * in, size_t t, size_t n, float * y,
                              size_t ldy, size_t row, size_t last) {
    const size_t size = ggml_stripe_block(type).size, act_size = ggml_act_size(w->cols);
    const uint8_t * block =
        (const uint8_t *)w->data + row / GGML_STRIPE * ggml_stripe_size(type, w->cols);
    __m128 acc[MOST][GROUPS];
    for (size_t i = 0; i < n; i++)
        for (int group = 0; group < GROUPS; group++) acc[i][group] = _mm_setzero_ps();
    for (size_t b = 0; b < w->cols / 32; b++, block += size) {
        struct unpacked unpacked;
        prefetch(block, size);
        if (!one) unpack(type, block, &unpacked);
        for (size_t i = 0; i < n; i++)
            block_times(type, block, one ? NULL : &unpacked, ggml_act_of(in, t + i, act_size) + b,
                        in->x + (t + i) * in->ldx + 32 * b, acc[i]);
    }
    for (size_t i = 0; i < n; i++) store_rows(y + (t + i) * ldy + row, last - row, acc[i]);
}

GGML_INLINE void matmul_stripes(enum ggml_type type, const struct ggml_matrix * w,
                                const struct ggml_input * in, float * y, size_t ldy, size_t first,
                                size_t last) {
    for (size_t row = first; row < last; row += GGML_STRIPE) {
        if (in->n == 1) {
            stripe_times(type, true, w, in, 0, 1, y, ldy, row, last);
            continue;
        }
        for (size_t t = 0; t < in->n; t += MOST)
            stripe_times(type, false, w, in, t, in->n - t < MOST ? in->n - t : MOST, y, ldy, row,
                         last);
    }
}

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        matmul_stripes(GGML_TYPE_##TYPE, w, in, y, ldy, first, last);                              \
    }

GGML_QUANTIZED(INSTANCE)

/* Bytes of four registers side by side: a register's lane has four of one row. */
GGML_INLINE void interleave(const __m128i from[4], __m128i to[4]) {
    const __m128i low[2] = {_mm_unpacklo_epi8(from[0], from[1]),
                            _mm_unpacklo_epi8(from[2], from[3])};
    const __m128i high[2] = {_mm_unpackhi_epi8(from[0], from[1]),
                             _mm_unpackhi_epi8(from[2], from[3])};
    to[0] = _mm_unpacklo_epi16(low[0], low[1]);
    to[1] = _mm_unpackhi_epi16(low[0], low[1]);
    to[2] = _mm_unpacklo_epi16(high[0], high[1]);
    to[3] = _mm_unpackhi_epi16(high[0], high[1]);
}

/* Codes are multiplied as 16-bit numbers, those of even and of odd columns. */
GGML_INLINE void add_codes(bool wide, const struct ggml_nonzero_block * block,
                           const struct ggml_nonzero_block * next, const uint8_t * scales,
                           const uint8_t * ahead, size_t rows, float * sums) {
    const __m128 d = _mm_set1_ps(block->act.d);
    const size_t width = wide ? 4 : 2;
    for (size_t r = 0; r < rows; r += 64) {
        for (size_t i = 0; i < next->n; i++)
            _mm_prefetch((const char *)next->column[i] + r, _MM_HINT_T0);
        for (size_t line = 0; line < 64 * width; line += 64)
            _mm_prefetch((const char *)ahead + r * width + line, _MM_HINT_T0);
        __m128 t[4][GROUPS];
        for (size_t group = 0; group < GROUPS; group++) { /* rows 16q + 4 * group .. + 3 */
            __m128i sum[4];
            for (int q = 0; q < 4; q++) sum[q] = _mm_set1_epi32(-128 * block->act.sum);
            for (size_t i = 0; i < block->n; i += 4) {
                const __m128i even = broadcast(block->act.a + i);
                const __m128i odd = broadcast(block->act.a + i + 2);
                __m128i columns[4], codes[4];
                for (size_t j = 0; j < 4; j++)
                    columns[j] = load_bytes(block->column[i + j] + r + 16 * group);
                interleave(columns, codes);
                for (int q = 0; q < 4; q++) {
                    const __m128i low = _mm_and_si128(codes[q], _mm_set1_epi16(255));
                    const __m128i high = _mm_srli_epi16(codes[q], 8);
                    sum[q] = _mm_add_epi32(sum[q], _mm_madd_epi16(low, even));
                    sum[q] = _mm_add_epi32(sum[q], _mm_madd_epi16(high, odd));
                }
            }
            for (int q = 0; q < 4; q++) t[q][group] = _mm_mul_ps(_mm_cvtepi32_ps(sum[q]), d);
        }
        for (size_t q = 0; q < 4; q++) {
            __m128 acc[GROUPS], scale[GROUPS];
            load_scales((const uint8_t *)(sums + r + 16 * q), true, acc);
            load_scales(scales + (r + 16 * q) * width, wide, scale);
            fma16(scale, t[q], acc);
            memcpy(sums + r + 16 * q, acc, sizeof acc);
        }
    }
}

GGML_CODES_INSTANCES

/* ---- FP32 and FP16 matrices ----------------------------------------------------------------- */

/* The tree at the end of a sum over 16 lanes. */
GGML_INLINE float sum_lanes(const __m128 acc[GROUPS]) {
    __m128 four = _mm_add_ps(_mm_add_ps(acc[0], acc[2]), _mm_add_ps(acc[1], acc[3]));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

GGML_INLINE void matmul_rows(bool wide, const struct ggml_matrix * w, const struct ggml_input * in,
                             float * y, size_t ldy, size_t first, size_t last) {
    const size_t width = wide ? 4 : 2, row_size = w->cols * width;
    const size_t whole = w->cols / 16 * 16, rest = w->cols - whole;
    for (size_t row = first; row < last; row++) {
        const uint8_t * data = (const uint8_t *)w->data + row * row_size;
        for (size_t t = 0; t < in->n; t++) {
            const float * x = in->x + t * in->ldx;
            __m128 acc[GROUPS], weights[GROUPS], xs[GROUPS];
            for (int group = 0; group < GROUPS; group++) acc[group] = _mm_setzero_ps();
            for (size_t k = 0; k < whole; k += 16) {
                load_scales(data + k * width, wide, weights);
                load_scales((const uint8_t *)(x + k), true, xs);
                fma16(weights, xs, acc);
            }
            if (rest > 0) {
                float last_weights[16], last_x[16] = {0};
                for (int j = 0; j < 16; j++) last_weights[j] = -0.0f; /* leaves sums as they are */
                ggml_dequantize_row(w->type, data + whole * width, last_weights, rest);
                memcpy(last_x, x + whole, rest * sizeof *x);
                load_scales((const uint8_t *)last_weights, true, weights);
                load_scales((const uint8_t *)last_x, true, xs);
                fma16(weights, xs, acc);
            }
            y[t * ldy + row] = sum_lanes(acc);
        }
    }
}

static void matmul_FP32(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    matmul_rows(true, w, in, y, ldy, first, last);
}

static void matmul_FP16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    matmul_rows(false, w, in, y, ldy, first, last);
}

GGML_INLINE void add_columns(bool wide, int n, const uint8_t * const * columns,
                             const uint8_t * const * ahead, const float * x, size_t rows,
                             float * sums) {
    const size_t width = wide ? 4 : 2;
    for (size_t r = 0; r < rows; r += 16) {
        __m128 acc[GROUPS];
        load_scales((const uint8_t *)(sums + r), true, acc);
        for (int i = 0; i < n; i++) {
            __m128 weights[GROUPS], xs[GROUPS];
            _mm_prefetch((const char *)ahead[i] + r * width, _MM_HINT_T0);
            load_scales(columns[i] + r * width, wide, weights);
            for (int group = 0; group < GROUPS; group++) xs[group] = _mm_set1_ps(x[i]);
            fma16(weights, xs, acc);
        }
        memcpy(sums + r, acc, sizeof acc);
    }
}

GGML_COLUMNS_INSTANCES

/* ---- Vectors -------------------------------------------------------------------------------- */

/* 8 words in the order of slots: 0, 2, 1, 3, 4, 6, 5, 7. */
GGML_INLINE __m128i to_slots(__m128i words) {
    return _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xD8), 0xD8);
}

GGML_INLINE int32_t sum_int_lanes(__m128i four) {
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

static void quantize_act(enum ggml_activations activations, size_t n, const float * x,
                         uint8_t * out) {
    const float steps = ggml_act_steps(activations);
    const __m128 magnitude = _mm_castsi128_ps(_mm_set1_epi32(0x7FFFFFFF));
    for (size_t b = 0; b < n / 32; b++, x += 32, out += sizeof(struct ggml_act)) {
        struct ggml_act * act = (struct ggml_act *)(void *)out;
        __m128 v[8], top = _mm_setzero_ps(), finite = magnitude;
        for (int i = 0; i < 8; i++) {
            v[i] = _mm_loadu_ps(x + 4 * i);
            const __m128 size = _mm_and_ps(v[i], magnitude);
            finite = _mm_and_ps(finite, _mm_cmple_ps(size, _mm_set1_ps(FLT_MAX)));
            top = _mm_max_ps(size, top);
        }
        top = _mm_max_ps(top, _mm_movehl_ps(top, top));
        top = _mm_max_ss(top, _mm_shuffle_ps(top, top, 1));
        const bool all = _mm_movemask_epi8(_mm_cmpeq_epi32(_mm_castps_si128(finite),
                                                           _mm_castps_si128(magnitude))) == 0xFFFF;
        float d = all ? _mm_cvtss_f32(top) / steps : NAN;
        if (d < FLT_MIN) d = 0;
        const __m128 id = _mm_set1_ps(d > 0 ? 1 / d : 0);
        for (int half = 0; half < 2; half++) {
            __m128i hi[2], lo[2], sum = _mm_setzero_si128();
            for (int i = 0; i < 2; i++) {
                const __m128 * from = v + 4 * half + 2 * i;
                __m128i a = _mm_setzero_si128();
                if (d > 0)
                    a = _mm_packs_epi32(_mm_cvtps_epi32(_mm_mul_ps(from[0], id)),
                                        _mm_cvtps_epi32(_mm_mul_ps(from[1], id)));
                sum = _mm_add_epi32(sum, _mm_madd_epi16(a, _mm_set1_epi16(1)));
                _mm_storeu_si128((__m128i *)(void *)act->a + 2 * half + i, to_slots(a));
                hi[i] = a;
                lo[i] = _mm_setzero_si128();
                if (activations == GGML_A16) {
                    hi[i] = _mm_srai_epi16(_mm_add_epi16(a, _mm_set1_epi16(64)), 7);
                    lo[i] = _mm_sub_epi16(a, _mm_slli_epi16(hi[i], 7));
                }
            }
            _mm_storeu_si128((__m128i *)(void *)act->hi + half, _mm_packs_epi16(hi[0], hi[1]));
            _mm_storeu_si128((__m128i *)(void *)act->lo + half, _mm_packs_epi16(lo[0], lo[1]));
            act->sum_half[half] = sum_int_lanes(sum);
            act->s_half[half] = d * (float)act->sum_half[half];
        }
        act->d = d;
        act->sum = act->sum_half[0] + act->sum_half[1];
        act->s = d * (float)act->sum;
        act->unused = 0;
    }
}

/* The first n lanes from memory, all if n is more; nothing is read beyond them. */
GGML_INLINE __m128 load(const float * from, size_t n) {
    if (n >= 4) return _mm_loadu_ps(from);
    float lanes[4] = {0};
    memcpy(lanes, from, n * sizeof *from);
    return _mm_loadu_ps(lanes);
}

GGML_INLINE void store(float * to, size_t n, __m128 value) {
    if (n >= 4) {
        _mm_storeu_ps(to, value);
    } else {
        memcpy(to, &value, n * sizeof *to);
    }
}

/* 2^n for n in the range of exponents. */
GGML_INLINE __m128 power_of_two(__m128i n) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23));
}

GGML_INLINE __m128 exp4(__m128 x) {
    const __m128 t = _mm_max_ps(_mm_min_ps(x, _mm_set1_ps(89)), _mm_set1_ps(-104));
    const __m128i exponent = _mm_cvtps_epi32(_mm_mul_ps(t, _mm_set1_ps(1.44269504f)));
    const __m128 n = _mm_cvtepi32_ps(exponent);
    __m128 r = _mm_sub_ps(t, _mm_mul_ps(n, _mm_set1_ps(0.693359375f)));
    r = _mm_sub_ps(r, _mm_mul_ps(n, _mm_set1_ps(-2.12194440e-4f)));
    static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                         1.6666665459e-1f, 5.0000001201e-1f};
    __m128 p = _mm_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) p = _mm_add_ps(_mm_mul_ps(p, r), _mm_set1_ps(coefficients[i]));
    __m128 y = _mm_add_ps(_mm_mul_ps(p, _mm_mul_ps(r, r)), r);
    y = _mm_add_ps(y, _mm_set1_ps(1));
    const __m128i half = _mm_srai_epi32(exponent, 1);
    y = _mm_mul_ps(y, power_of_two(half));
    y = _mm_mul_ps(y, power_of_two(_mm_sub_epi32(exponent, half)));
    const __m128 nan = _mm_cmpunord_ps(x, x);
    return _mm_or_ps(_mm_and_ps(nan, x), _mm_andnot_ps(nan, y));
}

GGML_INLINE __m128 sigmoid4(__m128 x) {
    const __m128 one = _mm_set1_ps(1);
    const __m128 negated = _mm_xor_ps(x, _mm_set1_ps(-0.0f));
    return _mm_div_ps(one, _mm_add_ps(one, exp4(negated)));
}

/* x_k, or (x_k - mean) squared, of 4 lanes. */
GGML_INLINE __m128 term(__m128 x, float mean, bool squared) {
    if (!squared) return x;
    x = _mm_sub_ps(x, _mm_set1_ps(mean));
    return _mm_mul_ps(x, x);
}

GGML_INLINE float sum_terms(size_t n, const float * x, float mean, bool squared) {
    __m128 acc[GROUPS];
    for (int j = 0; j < GROUPS; j++) acc[j] = _mm_setzero_ps();
    size_t k = 0;
    for (; n - k >= 16; k += 16)
        for (int j = 0; j < GROUPS; j++)
            acc[j] = _mm_add_ps(acc[j], term(_mm_loadu_ps(x + k + 4 * j), mean, squared));
    float sums[16];
    memcpy(sums, acc, sizeof sums);
    for (size_t j = 0; j < n - k; j++)
        sums[j] += _mm_cvtss_f32(term(_mm_set1_ps(x[k + j]), mean, squared));
    memcpy(acc, sums, sizeof sums);
    return sum_lanes(acc);
}

static void layer_norm(size_t n, const float * x, const float * w, const float * b, float * y) {
    float mean = sum_terms(n, x, 0, false) / (float)n;
    float r = 1 / sqrtf(sum_terms(n, x, mean, true) / (float)n + 1e-5f);
    for (size_t i = 0; i < n; i += 4) {
        __m128 v = _mm_mul_ps(_mm_sub_ps(load(x + i, n - i), _mm_set1_ps(mean)), _mm_set1_ps(r));
        v = _mm_mul_ps(v, load(w + i, n - i));
        store(y + i, n - i, _mm_add_ps(v, load(b + i, n - i)));
    }
}

static void exp_vector(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4) store(y + i, n - i, exp4(load(x + i, n - i)));
}

static void relu2(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        __m128 z = _mm_max_ps(_mm_setzero_ps(), load(x + i, n - i)); /* NaN stays NaN */
        store(y + i, n - i, _mm_mul_ps(z, z));
    }
}

static void sigmoid_mul(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4)
        store(y + i, n - i, _mm_mul_ps(sigmoid4(load(r + i, n - i)), load(x + i, n - i)));
}

static void sigmoid_mul_add(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        __m128 gated = _mm_mul_ps(sigmoid4(load(r + i, n - i)), load(x + i, n - i));
        store(y + i, n - i, _mm_add_ps(load(y + i, n - i), gated));
    }
}

static void wkv(size_t n, const float * u, const float * w, const float * k, const float * v,
                float * aa, float * bb, float * pp, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        const size_t rest = n - i;
        __m128 key = load(k + i, rest), value = load(v + i, rest), p = load(pp + i, rest);
        __m128 a = load(aa + i, rest), b = load(bb + i, rest);
        __m128 ww = _mm_add_ps(load(u + i, rest), key);
        __m128 q = _mm_max_ps(p, ww);
        __m128 e1 = exp4(_mm_sub_ps(p, q)), e2 = exp4(_mm_sub_ps(ww, q));
        __m128 numerator = _mm_add_ps(_mm_mul_ps(e1, a), _mm_mul_ps(e2, value));
        __m128 denominator = _mm_add_ps(_mm_mul_ps(e1, b), e2);
        ww = _mm_add_ps(p, load(w + i, rest));
        q = _mm_max_ps(ww, key);
        e1 = exp4(_mm_sub_ps(ww, q));
        e2 = exp4(_mm_sub_ps(key, q));
        store(aa + i, rest, _mm_add_ps(_mm_mul_ps(e1, a), _mm_mul_ps(e2, value)));
        store(bb + i, rest, _mm_add_ps(_mm_mul_ps(e1, b), e2));
        store(pp + i, rest, q);
        store(y + i, rest, _mm_div_ps(numerator, denominator));
    }
}

/* `count` registers of columns, the last of them perhaps in part. */
GGML_INLINE void attend(size_t count, size_t d, size_t n, const float * q, const float * k,
                        const float * v, float scale, float * m, size_t ldm, float * y) {
    __m128 value[4], acc[4];
    for (size_t j = 0; j < count; j++) {
        value[j] = load(v + 4 * j, n - 4 * j);
        acc[j] = _mm_setzero_ps();
    }
    for (size_t i = 0; i < d; i++, m += ldm) {
        const __m128 qi = _mm_set1_ps(q[i]), ki = _mm_set1_ps(k[i]);
        for (size_t j = 0; j < count; j++) {
            __m128 row = load(m + 4 * j, n - 4 * j);
            row = _mm_add_ps(row, _mm_mul_ps(ki, value[j]));
            store(m + 4 * j, n - 4 * j, row);
            acc[j] = _mm_add_ps(acc[j], _mm_mul_ps(qi, row));
        }
    }
    for (size_t j = 0; j < count; j++) {
        __m128 sum = load(y + 4 * j, n - 4 * j);
        store(y + 4 * j, n - 4 * j, _mm_add_ps(sum, _mm_mul_ps(acc[j], _mm_set1_ps(scale))));
    }
}

static void linear_attention(size_t d, size_t n, const float * q, const float * k, const float * v,
                             float scale, float * m, size_t ldm, float * y) {
    size_t c = 0;
    for (; n - c >= 16; c += 16) attend(4, d, 16, q, k, v + c, scale, m + c, ldm, y + c);
    for (; c < n; c += 4) attend(1, d, n - c, q, k, v + c, scale, m + c, ldm, y + c);
}

/* ---- Limits --------------------------------------------------------------------------------- */

enum { CHAINS = 12 }; /* sums that don't wait for each other: enough to keep the units busy */

/* One factor is the sum itself: a product of constants would be computed once. */
static int32_t dot_all(size_t n) {
    __m128i sum[CHAINS], x = _mm_set1_epi16(3);
    for (int j = 0; j < CHAINS; j++) sum[j] = _mm_set1_epi32(j);
    for (size_t i = 0; i < n; i += CHAINS * 8) {
#pragma GCC unroll 12
        for (int j = 0; j < CHAINS; j++) sum[j] = _mm_add_epi32(sum[j], _mm_madd_epi16(sum[j], x));
    }
    for (int j = 1; j < CHAINS; j++) sum[0] = _mm_add_epi32(sum[0], sum[j]);
    return _mm_cvtsi128_si32(sum[0]);
}

const struct ggml_kernels ggml_kernels_sse2 = {
    .isa = "sse2",
    .needs = CPU_SSE2,
    .quantize_act = quantize_act,
    .matmul =
        {
            [GGML_TYPE_FP32] = matmul_FP32,
            [GGML_TYPE_FP16] = matmul_FP16,
            GGML_QUANTIZED_ENTRIES,
        },
    .sparse = {GGML_COLUMNS_ENTRIES, GGML_CODES_ENTRIES},
    .layer_norm = layer_norm,
    .exp = exp_vector,
    .relu2 = relu2,
    .sigmoid_mul = sigmoid_mul,
    .sigmoid_mul_add = sigmoid_mul_add,
    .wkv = wkv,
    .linear_attention = linear_attention,
    .dot = dot_all,
};
