/* The arithmetic in NEON with dot products (Armv8.2). A stripe's 16 rows are four groups of four,
 * a register each; a group's codes are taken apart once and stay in registers while they meet the
 * activations of all vectors: sdot multiplies the bytes of four weights with a lane of four
 * activations, which are 128 * hi + lo, or hi alone. */
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"

/* ---- Quantized matrices --------------------------------------------------------------------- */

/* Floats at any address: 4 of them, or of as many halves. */
GGML_INLINE float32x4_t load_floats(const uint8_t * from, bool wide) {
    if (wide) return vreinterpretq_f32_u8(vld1q_u8(from));
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
}

/* Weights [16 * half, 16 * half + 16) of 4 rows: codes[u] holds four of them, a row per lane. */
GGML_INLINE void load_codes(const struct ggml_layout * layout, const struct ggml_stripe_block * at,
                            const uint8_t * block, int group, int half, int8x16_t codes[4]) {
    const uint8_t * qs = block + at->qs + 16 * group;
    if (layout->bits == 8) {
        for (int u = 0; u < 4; u++)
            codes[u] = vreinterpretq_s8_u8(vld1q_u8(qs + 64 * (4 * half + u)));
        return;
    }
    uint8x16_t fifths = vdupq_n_u8(0);
    if (layout->bits == 5) fifths = vld1q_u8(block + at->qh + 16 * group);
    for (int u = 0; u < 4; u++) {
        uint8x16_t pair = vld1q_u8(qs + 64 * (2 * half + u / 2));
        uint8x16_t code = u % 2 ? vshrq_n_u8(pair, 4) : vandq_u8(pair, vdupq_n_u8(15));
        if (layout->bits == 5) {
            /* bit 4 * half + u of each byte goes to bit 4 */
            uint8x16_t fifth = vshlq_u8(fifths, vdupq_n_s8((int8_t)(4 - 4 * half - u)));
            code = vorrq_u8(code, vandq_u8(fifth, vdupq_n_u8(16)));
        }
        codes[u] = vreinterpretq_s8_u8(code);
    }
}

/* sum + 16 weights of 4 rows times 16 activations. */
GGML_INLINE int32x4_t add_dot(int32x4_t sum, const int8x16_t codes[4], const int8_t * a) {
    const int8x16_t activations = vld1q_s8(a);
    sum = vdotq_laneq_s32(sum, codes[0], activations, 0);
    sum = vdotq_laneq_s32(sum, codes[1], activations, 1);
    sum = vdotq_laneq_s32(sum, codes[2], activations, 2);
    return vdotq_laneq_s32(sum, codes[3], activations, 3);
}

/* acc = fma(v, x_i, acc), acc = fma(-m, a_i * d, acc) in the rows that have an outlier. Tables are
 * looked up byte by byte; an index beyond the 64 bytes of a table gives 0. */
GGML_INLINE void add_outliers(const uint8_t * block, const struct ggml_stripe_block * at,
                              const float * x, const struct ggml_act * act, float32x4_t acc[4]) {
    uint8x16x4_t low, high, a_table;
    for (int i = 0; i < 4; i++) {
        low.val[i] = vreinterpretq_u8_f32(vld1q_f32(x + 4 * i));
        high.val[i] = vreinterpretq_u8_f32(vld1q_f32(x + 16 + 4 * i));
        a_table.val[i] = vreinterpretq_u8_s16(vld1q_s16(act->a + 8 * i));
    }
#pragma GCC unroll 1
    for (int group = 0; group < 4; group++) {
        uint32x4_t slot = vmovl_u16(vreinterpret_u16_u8(vld1_u8(block + at->index + 8 * group)));
        float32x4_t v = load_floats(block + at->outlier + 8 * group, false);
        float32x4_t m = load_floats(block + at->m + 8 * group, false);
        /* a slot is an index with its two low bits exchanged: if they differ, both are flipped */
        uint32x4_t differ = vandq_u32(veorq_u32(slot, vshrq_n_u32(slot, 1)), vdupq_n_u32(1));
        uint32x4_t k = veorq_u32(slot, vmulq_n_u32(differ, 3));
        uint8x16_t from = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), k, 0x04040404));
        uint8x16_t picked = vqtbl4q_u8(low, from);
        picked = vqtbx4q_u8(picked, high, vsubq_u8(from, vdupq_n_u8(64)));
        float32x4_t with = vfmaq_f32(acc[group], v, vreinterpretq_f32_u8(picked));
        /* 16 bits, in the upper half of a lane */
        from = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x0100FFFF), slot, 0x02020000));
        int32x4_t a = vshrq_n_s32(vreinterpretq_s32_u8(vqtbl4q_u8(a_table, from)), 16);
        with = vfmsq_f32(with, m, vmulq_n_f32(vcvtq_f32_s32(a), act->d));
        uint32x4_t none = vceqq_u32(slot, vdupq_n_u32(GGML_NO_OUTLIER));
        acc[group] = vbslq_f32(none, acc[group], with);
    }
}

/* One stripe times n vectors, n a constant: acc[i][group]. */
GGML_INLINE void stripe_times(enum ggml_type type, enum ggml_activations activations, int n,
                              const uint8_t * stripe, size_t blocks,
                              const struct ggml_act * const * acts, const float * const * xs,
                              float32x4_t (*acc)[4]) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const int parts = 32 / layout->size, halves = 2 / parts, width = layout->wide ? 4 : 2;
    for (size_t b = 0; b < blocks; b++) {
        const uint8_t * block = stripe + b * at.size;
#pragma GCC unroll 1 /* else registers are spilled */
        for (int group = 0; group < 4; group++) {
            for (int part = 0; part < parts; part++) {
                const size_t scale = (size_t)(width * (GGML_STRIPE * part + 4 * group));
                float32x4_t d = load_floats(block + at.d + scale, layout->wide);
                float32x4_t m = d;
                if (layout->min) m = load_floats(block + at.m + scale, layout->wide);
                int8x16_t codes[2][4];
                for (int half = 0; half < halves; half++)
                    load_codes(layout, &at, block, group, part + half, codes[half]);
                for (int i = 0; i < n; i++) {
                    const struct ggml_act * act = acts[i] + b;
                    int32_t z = layout->zero * (parts == 2 ? act->sum_half[part] : act->sum);
                    int32x4_t high = vdupq_n_s32(0), sum = vdupq_n_s32(-z);
                    for (int half = 0; half < halves; half++) {
                        const int8_t * hi = act->hi + 16 * (part + half);
                        const int8_t * lo = act->lo + 16 * (part + half);
                        if (activations == GGML_A16) {
                            high = add_dot(high, codes[half], hi);
                            sum = add_dot(sum, codes[half], lo);
                        } else {
                            sum = add_dot(sum, codes[half], hi);
                        }
                    }
                    sum = vaddq_s32(sum, vshlq_n_s32(high, 7));
                    float32x4_t t = vmulq_n_f32(vcvtq_f32_s32(sum), act->d);
                    acc[i][group] = vfmaq_f32(acc[i][group], d, t);
                    if (!layout->min) continue;
                    float s = parts == 2 ? act->s_half[part] : act->s;
                    acc[i][group] = vfmaq_n_f32(acc[i][group], m, s);
                }
            }
        }
        if (!layout->outlier) continue;
        for (int i = 0; i < n; i++) add_outliers(block, &at, xs[i] + 32 * b, acts[i] + b, acc[i]);
    }
}

/* Vectors [t, t + n) of the input, n a constant. */
GGML_INLINE void stripes_times(enum ggml_type type, enum ggml_activations activations, int n,
                               const struct ggml_matrix * w, const struct ggml_input * in, size_t t,
                               float * y, size_t ldy, size_t first, size_t last) {
    const size_t stripe_size = ggml_stripe_size(type, w->cols);
    const struct ggml_act * acts[4];
    const float * xs[4];
    for (int i = 0; i < n; i++) {
        acts[i] = ggml_act_of(in, t + (size_t)i, ggml_act_size(w->cols));
        xs[i] = in->x + (t + (size_t)i) * in->ldx;
    }
    for (size_t row = first; row < last; row += GGML_STRIPE) {
        float32x4_t acc[4][4];
        for (int i = 0; i < n; i++)
            for (int group = 0; group < 4; group++) acc[i][group] = vdupq_n_f32(0);
        stripe_times(type, activations, n,
                     (const uint8_t *)w->data + row / GGML_STRIPE * stripe_size, w->cols / 32, acts,
                     xs, acc);
        size_t rows = last - row < GGML_STRIPE ? last - row : GGML_STRIPE;
        for (int i = 0; i < n; i++) memcpy(y + (t + (size_t)i) * ldy + row, acc[i], rows * 4);
    }
}

GGML_INLINE void matmul_stripes(enum ggml_type type, enum ggml_activations activations,
                                const struct ggml_matrix * w, const struct ggml_input * in,
                                float * y, size_t ldy, size_t first, size_t last) {
    size_t t = 0;
    for (; in->n - t >= 4; t += 4)
        stripes_times(type, activations, 4, w, in, t, y, ldy, first, last);
    for (; in->n - t >= 2; t += 2)
        stripes_times(type, activations, 2, w, in, t, y, ldy, first, last);
    if (t < in->n) stripes_times(type, activations, 1, w, in, t, y, ldy, first, last);
}

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        if (in->activations == GGML_A16) {                                                         \
            matmul_stripes(GGML_TYPE_##TYPE, GGML_A16, w, in, y, ldy, first, last);                \
        } else {                                                                                   \
            matmul_stripes(GGML_TYPE_##TYPE, GGML_A8, w, in, y, ldy, first, last);                 \
        }                                                                                          \
    }

GGML_QUANTIZED(INSTANCE)

/* ---- FP32 and FP16 matrices ----------------------------------------------------------------- */

/* The tree at the end of a sum over 16 lanes. */
GGML_INLINE float sum_lanes(const float32x4_t acc[4]) {
    float32x4_t four = vaddq_f32(vaddq_f32(acc[0], acc[2]), vaddq_f32(acc[1], acc[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

/* A tile of rows × n vectors, both constants: as many sums in flight as hide the latency. */
GGML_INLINE void rows_times(bool wide, int rows, int n, const struct ggml_matrix * w,
                            const struct ggml_input * in, size_t t, float * y, size_t ldy,
                            size_t row) {
    const size_t width = wide ? 4 : 2, row_size = w->cols * width;
    const uint8_t * data = (const uint8_t *)w->data + row * row_size;
    const float * x = in->x + t * in->ldx;
    float32x4_t acc[4][2][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++)
            for (int j = 0; j < 4; j++) acc[r][i][j] = vdupq_n_f32(0);
    size_t k = 0;
    for (; w->cols - k >= 16; k += 16) {
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            float32x4_t xs[2];
            for (int i = 0; i < n; i++) xs[i] = vld1q_f32(x + (size_t)i * in->ldx + k + 4 * j);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                float32x4_t weights =
                    load_floats(data + (size_t)r * row_size + (k + 4 * j) * width, wide);
                for (int i = 0; i < n; i++) acc[r][i][j] = vfmaq_f32(acc[r][i][j], weights, xs[i]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        float rest[16] = {0};
        ggml_dequantize_row(w->type, data + (size_t)r * row_size + k * width, rest, w->cols - k);
        for (int i = 0; i < n; i++) {
            float sums[16];
            memcpy(sums, acc[r][i], sizeof sums);
            for (size_t j = 0; j < w->cols - k; j++)
                sums[j] = fmaf(rest[j], x[(size_t)i * in->ldx + k + j], sums[j]);
            memcpy(acc[r][i], sums, sizeof sums);
            y[(t + (size_t)i) * ldy + row + (size_t)r] = sum_lanes(acc[r][i]);
        }
    }
}

GGML_INLINE void matmul_rows(bool wide, const struct ggml_matrix * w, const struct ggml_input * in,
                             float * y, size_t ldy, size_t first, size_t last) {
    size_t row = first;
    for (; last - row >= 4; row += 4) {
        size_t t = 0;
        for (; in->n - t >= 2; t += 2) {
            rows_times(wide, 2, 2, w, in, t, y, ldy, row);
            rows_times(wide, 2, 2, w, in, t, y, ldy, row + 2);
        }
        if (t < in->n) rows_times(wide, 4, 1, w, in, t, y, ldy, row);
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

/* ---- Vectors -------------------------------------------------------------------------------- */

static void quantize_act(enum ggml_activations activations, size_t n, const float * x,
                         uint8_t * out) {
    static const uint8_t slots[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    const float steps = ggml_act_steps(activations);
    for (size_t b = 0; b < n / 32; b++, x += 32, out += sizeof(struct ggml_act)) {
        struct ggml_act * act = (struct ggml_act *)(void *)out;
        float32x4_t v[8];
        float32x4_t top = vdupq_n_f32(0);
        for (int i = 0; i < 8; i++) {
            v[i] = vld1q_f32(x + 4 * i);
            top = vmaxq_f32(top, vabsq_f32(v[i])); /* a NaN stays */
        }
        const float amax = vmaxvq_f32(top);
        float d = amax <= FLT_MAX ? amax / steps : NAN;
        if (d < FLT_MIN) d = 0;
        const float id = d > 0 ? 1 / d : 0; /* infinity * 0 and NaN are converted to 0 */
        for (int half = 0; half < 2; half++) {
            int8x8_t hi[2], lo[2];
            int32_t sum = 0;
            for (int i = 0; i < 2; i++) {
                const float32x4_t * from = v + 4 * half + 2 * i;
                int32x4_t a0 = vcvtnq_s32_f32(vmulq_n_f32(from[0], id));
                int32x4_t a1 = vcvtnq_s32_f32(vmulq_n_f32(from[1], id));
                int16x8_t a = vcombine_s16(vmovn_s32(a0), vmovn_s32(a1));
                int16x8_t upper = activations == GGML_A16 ? vrshrq_n_s16(a, 7) : a;
                int16x8_t rest =
                    activations == GGML_A16 ? vsubq_s16(a, vshlq_n_s16(upper, 7)) : vdupq_n_s16(0);
                hi[i] = vmovn_s16(upper);
                lo[i] = vmovn_s16(rest);
                sum += vaddlvq_s16(a);
                vst1q_s16(
                    act->a + 16 * half + 8 * i,
                    vreinterpretq_s16_u8(vqtbl1q_u8(vreinterpretq_u8_s16(a), vld1q_u8(slots))));
            }
            vst1q_s8(act->hi + 16 * half, vcombine_s8(hi[0], hi[1]));
            vst1q_s8(act->lo + 16 * half, vcombine_s8(lo[0], lo[1]));
            act->sum_half[half] = sum;
            act->s_half[half] = d * (float)sum;
        }
        act->d = d;
        act->sum = act->sum_half[0] + act->sum_half[1];
        act->s = d * (float)act->sum;
        act->unused = 0;
    }
}

/* The first n lanes from memory, all if n is more; nothing is read beyond them. */
GGML_INLINE float32x4_t load(const float * from, size_t n) {
    if (n >= 4) return vld1q_f32(from);
    float lanes[4] = {0};
    memcpy(lanes, from, n * sizeof *from);
    return vld1q_f32(lanes);
}

GGML_INLINE void store(float * to, size_t n, float32x4_t value) {
    if (n >= 4) {
        vst1q_f32(to, value);
    } else {
        memcpy(to, &value, n * sizeof *to);
    }
}

/* a > b ? a : b; the instruction for it treats NaN differently. */
GGML_INLINE float32x4_t max4(float32x4_t a, float32x4_t b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}

/* 2^n for n in the range of exponents. */
GGML_INLINE float32x4_t power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}

GGML_INLINE float32x4_t exp4(float32x4_t x) {
    float32x4_t t = vmaxq_f32(vminq_f32(x, vdupq_n_f32(89)), vdupq_n_f32(-104));
    float32x4_t n = vrndnq_f32(vmulq_n_f32(t, 1.44269504f));
    float32x4_t r = vsubq_f32(t, vmulq_n_f32(n, 0.693359375f));
    r = vsubq_f32(r, vmulq_n_f32(n, -2.12194440e-4f));
    static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                         1.6666665459e-1f, 5.0000001201e-1f};
    float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) p = vaddq_f32(vmulq_f32(p, r), vdupq_n_f32(coefficients[i]));
    float32x4_t y = vaddq_f32(vmulq_f32(p, vmulq_f32(r, r)), r);
    y = vaddq_f32(y, vdupq_n_f32(1));
    int32x4_t exponent = vcvtq_s32_f32(n), half = vshrq_n_s32(exponent, 1);
    y = vmulq_f32(vmulq_f32(y, power_of_two(half)), power_of_two(vsubq_s32(exponent, half)));
    return vbslq_f32(vceqq_f32(x, x), y, x);
}

GGML_INLINE float32x4_t sigmoid4(float32x4_t x) {
    const float32x4_t one = vdupq_n_f32(1);
    return vdivq_f32(one, vaddq_f32(one, exp4(vnegq_f32(x))));
}

/* x_k, or (x_k - mean) squared, of 4 lanes. */
GGML_INLINE float32x4_t term(float32x4_t x, float mean, bool squared) {
    if (!squared) return x;
    x = vsubq_f32(x, vdupq_n_f32(mean));
    return vmulq_f32(x, x);
}

GGML_INLINE float sum_terms(size_t n, const float * x, float mean, bool squared) {
    float32x4_t acc[4];
    for (int j = 0; j < 4; j++) acc[j] = vdupq_n_f32(0);
    size_t k = 0;
    for (; n - k >= 16; k += 16)
        for (int j = 0; j < 4; j++)
            acc[j] = vaddq_f32(acc[j], term(vld1q_f32(x + k + 4 * j), mean, squared));
    float sums[16];
    memcpy(sums, acc, sizeof sums);
    for (size_t j = 0; j < n - k; j++)
        sums[j] += vgetq_lane_f32(term(vdupq_n_f32(x[k + j]), mean, squared), 0);
    memcpy(acc, sums, sizeof sums);
    return sum_lanes(acc);
}

static void layer_norm(size_t n, const float * x, const float * w, const float * b, float * y) {
    float mean = sum_terms(n, x, 0, false) / (float)n;
    float r = 1 / sqrtf(sum_terms(n, x, mean, true) / (float)n + 1e-5f);
    for (size_t i = 0; i < n; i += 4) {
        float32x4_t v = vsubq_f32(load(x + i, n - i), vdupq_n_f32(mean));
        v = vmulq_f32(vmulq_n_f32(v, r), load(w + i, n - i));
        store(y + i, n - i, vaddq_f32(v, load(b + i, n - i)));
    }
}

static void lerp(size_t n, const float * x, const float * prev, const float * mix, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        float32x4_t m = load(mix + i, n - i);
        float32x4_t now = vmulq_f32(load(x + i, n - i), m);
        float32x4_t before = vmulq_f32(load(prev + i, n - i), vsubq_f32(vdupq_n_f32(1), m));
        store(y + i, n - i, vaddq_f32(now, before));
    }
}

static void exp_vector(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4) store(y + i, n - i, exp4(load(x + i, n - i)));
}

static void relu2(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        float32x4_t z = vmaxq_f32(load(x + i, n - i), vdupq_n_f32(0)); /* NaN stays NaN */
        store(y + i, n - i, vmulq_f32(z, z));
    }
}

static void add(size_t n, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4)
        store(y + i, n - i, vaddq_f32(load(y + i, n - i), load(x + i, n - i)));
}

static void sigmoid_mul(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4)
        store(y + i, n - i, vmulq_f32(sigmoid4(load(r + i, n - i)), load(x + i, n - i)));
}

static void sigmoid_mul_add(size_t n, const float * r, const float * x, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        float32x4_t gated = vmulq_f32(sigmoid4(load(r + i, n - i)), load(x + i, n - i));
        store(y + i, n - i, vaddq_f32(load(y + i, n - i), gated));
    }
}

static void wkv(size_t n, const float * u, const float * w, const float * k, const float * v,
                float * aa, float * bb, float * pp, float * y) {
    for (size_t i = 0; i < n; i += 4) {
        const size_t rest = n - i;
        float32x4_t key = load(k + i, rest), value = load(v + i, rest), p = load(pp + i, rest);
        float32x4_t a = load(aa + i, rest), b = load(bb + i, rest);
        float32x4_t ww = vaddq_f32(load(u + i, rest), key);
        float32x4_t q = max4(p, ww);
        float32x4_t e1 = exp4(vsubq_f32(p, q)), e2 = exp4(vsubq_f32(ww, q));
        float32x4_t numerator = vaddq_f32(vmulq_f32(e1, a), vmulq_f32(e2, value));
        float32x4_t denominator = vaddq_f32(vmulq_f32(e1, b), e2);
        ww = vaddq_f32(p, load(w + i, rest));
        q = max4(ww, key);
        e1 = exp4(vsubq_f32(ww, q));
        e2 = exp4(vsubq_f32(key, q));
        store(aa + i, rest, vaddq_f32(vmulq_f32(e1, a), vmulq_f32(e2, value)));
        store(bb + i, rest, vaddq_f32(vmulq_f32(e1, b), e2));
        store(pp + i, rest, q);
        store(y + i, rest, vdivq_f32(numerator, denominator));
    }
}

/* `count` registers of columns, the last of them perhaps in part. */
GGML_INLINE void attend(size_t count, size_t d, size_t n, const float * q, const float * k,
                        const float * v, float scale, float * m, size_t ldm, float * y) {
    float32x4_t value[4], acc[4];
    for (size_t j = 0; j < count; j++) {
        value[j] = load(v + 4 * j, n - 4 * j);
        acc[j] = vdupq_n_f32(0);
    }
    for (size_t i = 0; i < d; i++, m += ldm) {
        const float32x4_t qi = vdupq_n_f32(q[i]), ki = vdupq_n_f32(k[i]);
        for (size_t j = 0; j < count; j++) {
            float32x4_t row = load(m + 4 * j, n - 4 * j);
            row = vaddq_f32(row, vmulq_f32(ki, value[j]));
            store(m + 4 * j, n - 4 * j, row);
            acc[j] = vaddq_f32(acc[j], vmulq_f32(qi, row));
        }
    }
    for (size_t j = 0; j < count; j++) {
        float32x4_t sum = load(y + 4 * j, n - 4 * j);
        store(y + 4 * j, n - 4 * j, vaddq_f32(sum, vmulq_f32(acc[j], vdupq_n_f32(scale))));
    }
}

static void linear_attention(size_t d, size_t n, const float * q, const float * k, const float * v,
                             float scale, float * m, size_t ldm, float * y) {
    size_t c = 0;
    for (; n - c >= 16; c += 16) attend(4, d, 16, q, k, v + c, scale, m + c, ldm, y + c);
    for (; c < n; c += 4) attend(1, d, n - c, q, k, v + c, scale, m + c, ldm, y + c);
}

/* ---- Low-rank products ---------------------------------------------------------------------- */

static void add_low_rank(const struct ggml_low_rank * w, const struct ggml_input * h, float * y,
                         size_t ldy, size_t first, size_t last) {
    for (size_t row = first; row < last; row += 4) {
        const size_t lane = row % GGML_STRIPE;
        const float * b = w->b + (row - lane) * w->rank + lane;
        for (size_t t = 0; t < h->n; t++) {
            const float * x = h->x + t * h->ldx;
            float32x4_t acc = load(y + t * ldy + row, last - row);
            for (size_t i = 0; i < w->rank; i++)
                acc = vfmaq_n_f32(acc, vld1q_f32(b + i * GGML_STRIPE), x[i]);
            store(y + t * ldy + row, last - row, acc);
        }
    }
}

/* ---- Limits --------------------------------------------------------------------------------- */

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define PREFETCH(p) __prefetch(p)
#else
#define PREFETCH(p) __builtin_prefetch(p)
#endif

GGML_INLINE uint64_t read_streams(const uint8_t * data, size_t n, size_t streams, size_t ahead) {
    const size_t part = n / streams;
    uint64x2_t sum[4];
    for (int j = 0; j < 4; j++) sum[j] = vdupq_n_u64(0);
    for (size_t i = 0; i < part; i += 64) {
        for (size_t s = 0; s < streams; s++) {
            const uint8_t * p = data + s * part + i;
            if (ahead) PREFETCH(p + ahead);
            for (int j = 0; j < 4; j++)
                sum[j] = vaddq_u64(sum[j], vreinterpretq_u64_u8(vld1q_u8(p + 16 * j)));
        }
    }
    sum[0] = vaddq_u64(vaddq_u64(sum[0], sum[1]), vaddq_u64(sum[2], sum[3]));
    return vaddvq_u64(sum[0]);
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
enum { CHAINS = 24 };

static float fma_all(size_t n) {
    float32x4_t sum[CHAINS], x = vdupq_n_f32(0.999f), y = vdupq_n_f32(1);
    for (int j = 0; j < CHAINS; j++) sum[j] = vdupq_n_f32((float)j);
    for (size_t i = 0; i < n; i += CHAINS * 4) {
#pragma GCC unroll 24
        for (int j = 0; j < CHAINS; j++) sum[j] = vfmaq_f32(y, sum[j], x);
    }
    for (int j = 1; j < CHAINS; j++) sum[0] = vaddq_f32(sum[0], sum[j]);
    return vgetq_lane_f32(sum[0], 0);
}

/* One factor is the sum itself: a product of constants would be computed once. */
static int32_t dot_all(size_t n) {
    int32x4_t sum[CHAINS];
    int8x16_t x = vdupq_n_s8(3);
    for (int j = 0; j < CHAINS; j++) sum[j] = vdupq_n_s32(j);
    for (size_t i = 0; i < n; i += CHAINS * 16) {
#pragma GCC unroll 24
        for (int j = 0; j < CHAINS; j++)
            sum[j] = vdotq_s32(sum[j], vreinterpretq_s8_s32(sum[j]), x);
    }
    for (int j = 1; j < CHAINS; j++) sum[0] = vaddq_s32(sum[0], sum[j]);
    return vgetq_lane_s32(sum[0], 0);
}

const struct ggml_kernels ggml_kernels_neon = {
    .isa = "neon",
    .needs = CPU_NEON | CPU_DOTPROD,
    .quantize_act = quantize_act,
    .matmul =
        {
            [GGML_TYPE_FP32] = matmul_FP32,
            [GGML_TYPE_FP16] = matmul_FP16,
            GGML_QUANTIZED_ENTRIES,
        },
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
