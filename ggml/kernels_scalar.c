/* The definition of the arithmetic (README.md), in plain C and complete: what every other level
 * must equal bit for bit. The inner loops run over the 16 rows of a stripe, or over the 16 lanes of
 * a sum, so that a compiler can use whatever vectors the baseline has. */
#include <math.h>

#include "bf16.h"
#include "columns.h"
#include "fma32.h"
#include "fp16.h"
#include "kernels.h"

enum { LANES = 16, TILE = 4 /* input vectors that share an unpacked block */ };

/* ---- Matrices ------------------------------------------------------------------------------- */

/* 16 floats from floats or halves at any address. */
GGML_INLINE void load_scales(const uint8_t * from, bool wide, float * to) {
    uint16_t h[LANES];
    if (wide) {
        memcpy(to, from, LANES * sizeof *to);
        return;
    }
    memcpy(h, from, sizeof h);
    for (int j = 0; j < LANES; j++) to[j] = fp16_to_fp32(h[j]);
}

/* q[k][row] of a stripe's block, less the code that means 0. */
GGML_INLINE void unpack(enum ggml_type type, const uint8_t * block, int16_t q[32][LANES]) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    uint32_t codes[LANES], fifths[LANES];
    memcpy(fifths, block + at.qh, layout->bits == 5 ? sizeof fifths : 0);
    for (int k = 0; k < 32; k++) {
        const int byte = 8 * (k % 4), low = byte + (layout->bits == 8 ? 0 : k % 8 / 4 * 4);
        memcpy(codes, block + at.qs + k / (layout->bits == 8 ? 4 : 8) * sizeof codes, sizeof codes);
        for (int row = 0; row < LANES; row++) {
            if (layout->bits == 8) {
                q[k][row] = (int8_t)(codes[row] >> low);
                continue;
            }
            uint32_t code = codes[row] >> low & 15;
            if (layout->bits == 5) code |= (fifths[row] >> (byte + k / 4) & 1) << 4;
            q[k][row] = (int16_t)((int)code - layout->zero);
        }
    }
}

/* t = float(sum of q * a) * d over weights [first, last) of a block, one per row. */
GGML_INLINE void dot(int16_t q[32][LANES], const struct ggml_act * act, int first, int last,
                     float * t) {
    int32_t sum[LANES] = {0};
    for (int k = first; k < last; k++) {
        int16_t a = act->a[ggml_slot(k)];
#pragma GCC unroll 1 /* else 16 numbers, for which gcc finds no vectors */
        for (int row = 0; row < LANES; row++) sum[row] += (int32_t)q[k][row] * a;
    }
    for (int row = 0; row < LANES; row++) t[row] = (float)sum[row] * act->d;
}

static void add_outliers(const uint8_t * index, const float * outlier, const float * m,
                         const float * x, const struct ggml_act * act, float * acc) {
    for (int row = 0; row < LANES; row++) {
        uint16_t slot;
        memcpy(&slot, index + 2 * row, sizeof slot);
        if (slot == GGML_NO_OUTLIER) continue;
        acc[row] = fma32(outlier[row], x[ggml_slot(slot)], acc[row]);
        acc[row] = fma32(-m[row], (float)act->a[slot] * act->d, acc[row]);
    }
}

GGML_INLINE void matmul_stripes(enum ggml_type type, const struct ggml_matrix * w,
                                const struct ggml_input * in, float * y, size_t ldy, size_t first,
                                size_t last) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const size_t stripe_size = ggml_stripe_size(type, w->cols);
    const size_t act_size = ggml_act_size(w->cols);
    const int halves = 32 / layout->size;
    for (size_t stripe = first; stripe < last; stripe += GGML_STRIPE) {
        const uint8_t * data = (const uint8_t *)w->data + stripe / GGML_STRIPE * stripe_size;
        size_t rows = last - stripe < GGML_STRIPE ? last - stripe : GGML_STRIPE;
        for (size_t t0 = 0; t0 < in->n; t0 += TILE) {
            size_t n = in->n - t0 < TILE ? in->n - t0 : TILE;
            float acc[TILE][LANES] = {{0}};
            for (size_t b = 0; b < w->cols / 32; b++) {
                const uint8_t * block = data + b * at.size;
                int16_t q[32][LANES];
                float d[LANES], m[LANES], outlier[LANES], t[LANES], s[LANES];
                unpack(type, block, q);
                for (size_t i = 0; i < n; i++) {
                    const struct ggml_act * act = ggml_act_of(in, t0 + i, act_size) + b;
                    for (int h = 0; h < halves; h++) {
                        size_t scale = (size_t)h * LANES * (layout->wide ? 4u : 2u);
                        load_scales(block + at.d + scale, layout->wide, d);
                        dot(q, act, h * layout->size, (h + 1) * layout->size, t);
                        fma32_lanes(d, t, acc[i]);
                        if (!layout->min) continue;
                        load_scales(block + at.m + scale, layout->wide, m);
                        float sum = halves == 2 ? act->s_half[h] : act->s;
                        for (int row = 0; row < LANES; row++) s[row] = sum;
                        fma32_lanes(m, s, acc[i]);
                    }
                    if (!layout->outlier) continue;
                    load_scales(block + at.outlier, false, outlier);
                    add_outliers(block + at.index, outlier, m, in->x + (t0 + i) * in->ldx + b * 32,
                                 act, acc[i]);
                }
            }
            for (size_t i = 0; i < n; i++) memcpy(y + (t0 + i) * ldy + stripe, acc[i], rows * 4);
        }
    }
}

/* The tree at the end of every sum over 16 lanes. */
static float sum_lanes(float * acc) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; j++) acc[j] += acc[j + width];
    return acc[0];
}

GGML_INLINE void matmul_rows(bool wide, const struct ggml_matrix * w, const struct ggml_input * in,
                             float * y, size_t ldy, size_t first, size_t last) {
    const size_t row_size = ggml_row_size(w->type, w->cols);
    const size_t whole = w->cols - w->cols % LANES;
    for (size_t row = first; row < last; row++) {
        const uint8_t * data = (const uint8_t *)w->data + row * row_size;
        for (size_t t = 0; t < in->n; t++) {
            const float * x = in->x + t * in->ldx;
            float acc[LANES] = {0};
            float weights[LANES];
            for (size_t k = 0; k < whole; k += LANES) {
                load_scales(data + k * (wide ? 4 : 2), wide, weights);
                fma32_lanes(weights, x + k, acc);
            }
            ggml_dequantize_row(w->type, data + whole * (wide ? 4 : 2), weights, w->cols - whole);
            for (size_t j = 0; j < w->cols - whole; j++)
                acc[j] = fma32(weights[j], x[whole + j], acc[j]);
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

/* To float; a number that is less than the smallest normal one, even when rounded to as many bits,
 * becomes a zero. */
GGML_INLINE float flush(double x) {
    return fabs(x) < 0x1.FFFFFFp-127 ? (float)copysign(0, x) : (float)x;
}

/* A sum in double is rounded twice here, which does no harm: unless it is exact, one of its terms
 * is too small to matter to a float. */
static void matmul_BF16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    const size_t stripe_size = ggml_stripe_size(w->type, w->cols);
    const size_t act_size = ggml_act_size(w->cols);
    for (size_t stripe = first; stripe < last; stripe += GGML_STRIPE) {
        const size_t rows = last - stripe < GGML_STRIPE ? last - stripe : GGML_STRIPE;
        for (size_t t = 0; t < in->n; t++) {
            const uint8_t * from = (const uint8_t *)w->data + stripe / GGML_STRIPE * stripe_size;
            const uint8_t * act = in->act + t * act_size;
            float acc[LANES] = {0};
            for (size_t k = 0; k < w->cols; k += 32) {
                float sum[2][LANES] = {{0}}; /* of even and of odd columns */
                for (int p = 0; p < GGML_BF16_WORDS; p++) {
                    float * to = sum[p / 8];
                    uint32_t words[LANES], x;
                    memcpy(words, from, sizeof words);
                    memcpy(&x, act, sizeof x);
                    from += sizeof words;
                    act += sizeof x;
                    for (int row = 0; row < LANES; row++) {
                        to[row] = flush((double)bf16_high(words[row]) * bf16_high(x) + to[row]);
                        to[row] = flush((double)bf16_low(words[row]) * bf16_low(x) + to[row]);
                    }
                }
                for (int row = 0; row < LANES; row++)
                    acc[row] = flush((double)acc[row] + flush((double)sum[0][row] + sum[1][row]));
            }
            memcpy(y + t * ldy + stripe, acc, rows * sizeof *acc);
        }
    }
}

GGML_INLINE void add_columns(bool wide, int n, const uint8_t * const * columns,
                             const uint8_t * const * ahead, const float * x, size_t rows,
                             float * sums) {
    (void)ahead; /* plain C has no prefetch */
    for (size_t r = 0; r < rows; r += LANES) {
        for (int i = 0; i < n; i++) {
            float weights[LANES], xs[LANES];
            load_scales(columns[i] + r * (wide ? 4 : 2), wide, weights);
            for (int j = 0; j < LANES; j++) xs[j] = x[i];
            fma32_lanes(weights, xs, sums + r);
        }
    }
}

GGML_COLUMNS_INSTANCES

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        matmul_stripes(GGML_TYPE_##TYPE, w, in, y, ldy, first, last);                              \
    }

GGML_QUANTIZED(INSTANCE)

GGML_INLINE void add_codes(bool wide, const struct ggml_nonzero_block * block,
                           const struct ggml_nonzero_block * next, const uint8_t * scales,
                           const uint8_t * ahead, size_t rows, float * sums) {
    (void)next, (void)ahead; /* plain C has no prefetch */
    for (size_t r = 0; r < rows; r += 64) {
        int32_t sum[64] = {0};
        for (size_t i = 0; i < block->n; i++) {
            const int16_t a = block->act.a[ggml_slot((int)i)];
            for (int j = 0; j < 64; j++) sum[j] += (block->column[i][r + (size_t)j] - 128) * a;
        }
        for (size_t q = 0; q < 4; q++) {
            float t[LANES], d[LANES];
            for (size_t j = 0; j < LANES; j++)
                t[j] = (float)sum[ggml_code_place(LANES * q + j)] * block->act.d;
            load_scales(scales + (r + LANES * q) * (wide ? 4 : 2), wide, d);
            fma32_lanes(d, t, sums + r + LANES * q);
        }
    }
}

GGML_CODES_INSTANCES

static void add_low_rank(const struct ggml_low_rank * w, const struct ggml_input * h, float * y,
                         size_t ldy, size_t first, size_t last) {
    for (size_t row = first; row < last; row += LANES) {
        const size_t rows = last - row < LANES ? last - row : LANES;
        for (size_t t = 0; t < h->n; t++) {
            const float * from = w->b + row * w->rank;
            float acc[LANES] = {0}, x[LANES];
            memcpy(acc, y + t * ldy + row, rows * sizeof *acc);
            for (size_t i = 0; i < w->rank; i++, from += LANES) {
                for (int j = 0; j < LANES; j++) x[j] = h->x[t * h->ldx + i];
                fma32_lanes(from, x, acc);
            }
            memcpy(y + t * ldy + row, acc, rows * sizeof *acc);
        }
    }
}

/* ---- Vectors -------------------------------------------------------------------------------- */

static void quantize_act(enum ggml_activations activations, size_t n, const float * x,
                         uint8_t * act) {
    const float steps = ggml_act_steps(activations);
    for (size_t b = 0; b < n / 32; b++, x += 32, act += sizeof(struct ggml_act)) {
        struct ggml_act block = {0};
        float amax = 0;
        bool finite = true;
        for (int k = 0; k < 32; k++) {
            float magnitude = fabsf(x[k]);
            finite &= magnitude <= FLT_MAX;
            amax = magnitude > amax ? magnitude : amax;
        }
        block.d = finite ? amax / steps : NAN;
        if (block.d < FLT_MIN) block.d = 0;
        if (block.d > 0) {
            float id = 1 / block.d;
            for (int k = 0; k < 32; k++) {
                /* adding 1.5 * 2^23 rounds to an integer, ties to even */
                int a = (int)((x[k] * id + 12582912.0f) - 12582912.0f);
                int hi = activations == GGML_A8 ? a : (a + 64) >> 7;
                block.a[ggml_slot(k)] = (int16_t)a;
                block.hi[k] = (int8_t)hi;
                block.lo[k] = (int8_t)(activations == GGML_A8 ? 0 : a - hi * 128);
                block.sum_half[k / 16] += a;
            }
        }
        block.sum = block.sum_half[0] + block.sum_half[1];
        block.s = block.d * (float)block.sum;
        block.s_half[0] = block.d * (float)block.sum_half[0];
        block.s_half[1] = block.d * (float)block.sum_half[1];
        memcpy(act, &block, sizeof block);
    }
}

static void bf16_act(size_t n, const float * x, uint8_t * act) {
    for (size_t k = 0; k < n; k += 32, act += GGML_BF16_WORDS * 4) {
        float block[32] = {0};
        uint32_t words[GGML_BF16_WORDS];
        memcpy(block, x + k, (n - k < 32 ? n - k : 32) * sizeof *x);
        for (int p = 0; p < GGML_BF16_WORDS; p++) {
            const float * at = block + ggml_bf16_column(p);
            words[p] = (uint32_t)fp32_to_bf16(at[0]) << 16 | fp32_to_bf16(at[2]);
        }
        memcpy(act, words, sizeof words);
    }
}

static float exp1(float x) {
    float t = x < 89.0f ? x : 89.0f;
    t = t > -104.0f ? t : -104.0f;
    float n = (t * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * (r * r) + r) + 1;
    int exponent = (int)n;
    int half = exponent >> 1;
    uint32_t bits1 = (uint32_t)(half + 127) << 23;
    uint32_t bits2 = (uint32_t)(exponent - half + 127) << 23;
    float scale1, scale2;
    memcpy(&scale1, &bits1, sizeof bits1);
    memcpy(&scale2, &bits2, sizeof bits2);
    return x == x ? (y * scale1) * scale2 : x;
}

static float sigmoid(float x) {
    return 1 / (1 + exp1(-x));
}

static void layer_norm(size_t n, const float * x, const float * w, const float * b, float * y) {
    float acc[LANES] = {0};
    for (size_t k = 0; k < n; k++) acc[k % LANES] += x[k];
    float mean = sum_lanes(acc) / (float)n;
    memset(acc, 0, sizeof acc);
    for (size_t k = 0; k < n; k++) acc[k % LANES] += (x[k] - mean) * (x[k] - mean);
    float r = 1 / sqrtf(sum_lanes(acc) / (float)n + 1e-5f);
    for (size_t k = 0; k < n; k++) y[k] = ((x[k] - mean) * r) * w[k] + b[k];
}

static void lerp(size_t n, const float * x, const float * prev, const float * mix, float * y) {
    for (size_t k = 0; k < n; k++) y[k] = x[k] * mix[k] + prev[k] * (1 - mix[k]);
}

static void exp_vector(size_t n, const float * x, float * y) {
    for (size_t k = 0; k < n; k++) y[k] = exp1(x[k]);
}

static void relu2(size_t n, const float * x, float * y) {
    for (size_t k = 0; k < n; k++) {
        float z = x[k] < 0 ? 0 : x[k];
        y[k] = z * z;
    }
}

static void add(size_t n, const float * x, float * y) {
    for (size_t k = 0; k < n; k++) y[k] += x[k];
}

static void sigmoid_mul(size_t n, const float * r, const float * x, float * y) {
    for (size_t k = 0; k < n; k++) y[k] = sigmoid(r[k]) * x[k];
}

static void sigmoid_mul_add(size_t n, const float * r, const float * x, float * y) {
    for (size_t k = 0; k < n; k++) y[k] += sigmoid(r[k]) * x[k];
}

static void wkv(size_t n, const float * u, const float * w, const float * k, const float * v,
                float * aa, float * bb, float * pp, float * y) {
    for (size_t i = 0; i < n; i++) {
        float ww = u[i] + k[i];
        float q = pp[i] > ww ? pp[i] : ww;
        float e1 = exp1(pp[i] - q);
        float e2 = exp1(ww - q);
        float average = (e1 * aa[i] + e2 * v[i]) / (e1 * bb[i] + e2);
        ww = pp[i] + w[i];
        q = ww > k[i] ? ww : k[i];
        e1 = exp1(ww - q);
        e2 = exp1(k[i] - q);
        aa[i] = e1 * aa[i] + e2 * v[i];
        bb[i] = e1 * bb[i] + e2;
        pp[i] = q;
        y[i] = average;
    }
}

static void linear_attention(size_t d, size_t n, const float * q, const float * k, const float * v,
                             float scale, float * m, size_t ldm, float * y) {
    for (size_t c = 0; c < n; c += LANES) {
        const size_t lanes = n - c < LANES ? n - c : LANES;
        float acc[LANES] = {0};
        for (size_t i = 0; i < d; i++) {
            float * row = m + i * ldm + c;
            for (size_t j = 0; j < lanes; j++) {
                row[j] += k[i] * v[c + j];
                acc[j] += q[i] * row[j];
            }
        }
        for (size_t j = 0; j < lanes; j++) y[c + j] += acc[j] * scale;
    }
}

/* ---- Limits --------------------------------------------------------------------------------- */

GGML_INLINE uint64_t read_streams(const uint8_t * data, size_t n, size_t streams) {
    uint64_t sum[LANES] = {0};
    for (size_t i = 0; i < n / streams; i += sizeof sum) {
        for (size_t s = 0; s < streams; s++) {
            for (size_t j = 0; j < LANES; j++) {
                uint64_t word;
                memcpy(&word, data + s * (n / streams) + i + 8 * j, sizeof word);
                sum[j] += word;
            }
        }
    }
    for (int j = 1; j < LANES; j++) sum[0] += sum[j];
    return sum[0];
}

static uint64_t read_all(const uint8_t * data, size_t n, size_t streams, size_t ahead) {
    (void)ahead; /* plain C has no prefetch */
    switch (streams) {
    case 4:
        return read_streams(data, n, 4);
    case 2:
        return read_streams(data, n, 2);
    default:
        return read_streams(data, n, 1);
    }
}

enum { MANY = 3 * LANES }; /* as registers hold of sums that don't wait for each other */

/* Here a multiply-add is two operations: fma32 would only show what its emulation costs. */
static float fma_all(size_t n) {
    float sum[MANY] = {0};
    for (size_t i = 0; i < n; i += MANY)
        for (int j = 0; j < MANY; j++) sum[j] = sum[j] * 0.999f + 1.0f;
    return sum_lanes(sum);
}

static int32_t dot_all(size_t n) {
    uint32_t sum[MANY];                 /* unsigned: they overflow */
    const int16_t x = (int16_t)(n | 3); /* not a constant, or shifts would do */
    for (int j = 0; j < MANY; j++) sum[j] = (uint32_t)j;
    for (size_t i = 0; i < n; i += MANY)
        for (int j = 0; j < MANY; j++) sum[j] += (uint32_t)((int16_t)sum[j] * x);
    return (int32_t)sum[0];
}

const struct ggml_kernels ggml_kernels_scalar = {
    .isa = "scalar",
    .needs = 0,
    .quantize_act = quantize_act,
    .bf16_act = bf16_act,
    .matmul =
        {
            [GGML_TYPE_FP32] = matmul_FP32,
            [GGML_TYPE_FP16] = matmul_FP16,
            [GGML_TYPE_BF16] = matmul_BF16,
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
