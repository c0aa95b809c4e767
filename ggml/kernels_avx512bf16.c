/* BF16 matrices with AVX-512's own instructions for them: vdpbf16ps multiplies two pairs of a lane
 * and adds both products, one after the other, each time rounding once and flushing denormals. */
#include <immintrin.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"

/* A tile of stripes × vectors is computed at once: two stripes side by side, two streams from
 * memory, as long as all sums fit in registers, or one. Bytes that are prefetched ahead: 0 is as
 * fast or faster where two streams meet several vectors. (Zen 4, one thread, GFLOP/s with 8
 * vectors: two groups of 4 by two stripes 123, one of 8 by one stripe 107, with prefetching 163.)
 */
enum { STRIPES = 2, VECTORS = 8 };

GGML_INLINE int stripes_with(int n) {
    return n <= 6 ? 2 : 1;
}

GGML_INLINE int bytes_ahead(int n) {
    return n == 1 ? 2048 : n <= 6 ? 0 : 8192;
}

/* Compilers do not agree on whether __m512bh is __m512i and may be cast to it. */
GGML_INLINE __m512bh pairs(__m512i words) {
    __m512bh to;
    memcpy(&to, &words, sizeof to);
    return to;
}

GGML_INLINE __m512bh broadcast_pair(const uint8_t * from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return pairs(_mm512_set1_epi32(pair));
}

/* sum = words [first, first + 8) of stripes times n vectors, which lie `act_size` apart. */
GGML_INLINE void words_times(int stripes, int n, const uint8_t * const * block, const uint8_t * act,
                             size_t act_size, int first, __m512 sum[STRIPES][VECTORS]) {
#pragma GCC unroll 2
    for (int s = 0; s < stripes; s++) {
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) sum[s][i] = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int p = first; p < first + 8; p++) {
        __m512bh words[STRIPES];
#pragma GCC unroll 2
        for (int s = 0; s < stripes; s++) {
            words[s] = pairs(_mm512_loadu_si512(block[s] + 64 * p));
            if (bytes_ahead(n))
                _mm_prefetch((const char *)block[s] + 64 * p + bytes_ahead(n), _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const __m512bh x = broadcast_pair(act + (size_t)i * act_size + 4 * p);
#pragma GCC unroll 2
            for (int s = 0; s < stripes; s++) sum[s][i] = _mm512_dpbf16_ps(sum[s][i], words[s], x);
        }
    }
}

/* Stripes that begin at rows `row` and, if there are two, `row` + `step`, times vectors [t, t + n)
 * of the input; `stripes` and n are constants. */
GGML_INLINE void tile_times(int stripes, int n, const struct ggml_matrix * w,
                            const struct ggml_input * in, size_t t, float * y, size_t ldy,
                            size_t row, size_t step, size_t last) {
    const size_t stripe_size = ggml_stripe_size(GGML_TYPE_BF16, w->cols);
    const size_t act_size = ggml_act_size(w->cols);
    const uint8_t * block[STRIPES];
    const uint8_t * act = in->act + t * act_size;
    __m512 acc[STRIPES][VECTORS];
    for (int s = 0; s < stripes; s++) {
        block[s] = (const uint8_t *)w->data + (row + (size_t)s * step) / GGML_STRIPE * stripe_size;
        for (int i = 0; i < n; i++) acc[s][i] = _mm512_setzero_ps();
    }
    for (size_t k = 0; k < w->cols; k += 32) {
        __m512 even[STRIPES][VECTORS], odd[STRIPES][VECTORS];
        words_times(stripes, n, block, act, act_size, 0, even);
        words_times(stripes, n, block, act, act_size, 8, odd);
#pragma GCC unroll 2
        for (int s = 0; s < stripes; s++) {
#pragma GCC unroll 8
            for (int i = 0; i < n; i++)
                acc[s][i] = _mm512_add_ps(acc[s][i], _mm512_add_ps(even[s][i], odd[s][i]));
            block[s] += GGML_BF16_BLOCK;
        }
        act += GGML_BF16_WORDS * 4;
    }
    for (int s = 0; s < stripes; s++, row += step) {
        const __mmask16 rows = (__mmask16)(last - row < 16 ? (1u << (last - row)) - 1 : 0xFFFF);
        for (int i = 0; i < n; i++)
            _mm512_mask_storeu_ps(y + (t + (size_t)i) * ldy + row, rows, acc[s][i]);
    }
}

/* Rows [first, last), two stripes from their two halves. */
GGML_INLINE void stripes_times(int n, const struct ggml_matrix * w, const struct ggml_input * in,
                               size_t t, float * y, size_t ldy, size_t first, size_t last) {
    const int stripes = stripes_with(n);
    const size_t count = (last - first + GGML_STRIPE - 1) / GGML_STRIPE;
    const size_t step = count / (size_t)stripes * GGML_STRIPE;
    for (size_t row = first; row < first + step; row += GGML_STRIPE)
        tile_times(stripes, n, w, in, t, y, ldy, row, step, last);
    for (size_t row = first + step * (size_t)stripes; row < last; row += GGML_STRIPE)
        tile_times(1, n, w, in, t, y, ldy, row, 0, last);
}

/* Vectors in groups of about the same size. */
static void rows_times(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                       size_t ldy, size_t first, size_t last) {
    for (size_t t = 0, n; t < in->n; t += n) {
        const size_t left = in->n - t, groups = (left + VECTORS - 1) / VECTORS;
        n = (left + groups - 1) / groups;
        switch (n) {
#define GROUP_OF(N)                                                                                \
    case N:                                                                                        \
        stripes_times(N, w, in, t, y, ldy, first, last);                                           \
        break
            GROUP_OF(1);
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

static void matmul_BF16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    const size_t stripe_size = ggml_stripe_size(GGML_TYPE_BF16, w->cols);
    const size_t most = last - first, tile = STRIPES * GGML_STRIPE;
    const size_t rows = ggml_cached_rows(in->n, VECTORS, stripe_size / GGML_STRIPE, tile, most);
    const uint64_t saved = ggml_fp_flush();
    for (size_t row = first; row < last; row += rows)
        rows_times(w, in, y, ldy, row, last - row < rows ? last : row + rows);
    ggml_fp_leave(saved);
}

static void bf16_act(size_t n, const float * x, uint8_t * act) {
    uint16_t columns[32];
    for (int p = 0; p < GGML_BF16_WORDS; p++) {
        columns[2 * p] = (uint16_t)(ggml_bf16_column(p) + 2);
        columns[2 * p + 1] = (uint16_t)ggml_bf16_column(p);
    }
    const __m512i order = _mm512_loadu_si512(columns);
    for (size_t k = 0; k < n; k += 32, act += GGML_BF16_WORDS * 4) {
        const size_t left = n - k;
        const uint32_t lanes = left < 32 ? (1u << left) - 1 : UINT32_MAX;
        const __m512 low = _mm512_maskz_loadu_ps((__mmask16)lanes, x + k);
        const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(lanes >> 16), x + k + 16);
        const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
        const __m512i rounded = _mm512_loadu_si512(&both);
        _mm512_storeu_si512(act, _mm512_permutexvar_epi16(order, rounded));
    }
}

const struct ggml_kernels ggml_kernels_avx512bf16 = {
    .isa = "avx512bf16",
    .needs = CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C | CPU_AVX512F | CPU_AVX512BW | CPU_AVX512DQ |
             CPU_AVX512VL | CPU_AVX512VNNI | CPU_AVX512BF16,
    .bf16_act = bf16_act,
    .matmul = {[GGML_TYPE_BF16] = matmul_BF16},
};
