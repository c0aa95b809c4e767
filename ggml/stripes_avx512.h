/* How AVX-512 reads a stripe: its 16 rows are one register. For kernels_avx512.c and kernels_amx.c,
 * each of which compiles a copy of its own. */
#ifndef GGML_STRIPES_AVX512_H
#define GGML_STRIPES_AVX512_H

#include <immintrin.h>

#include "kernels.h"

GGML_INLINE __m512 load_scales(const uint8_t * from, bool wide) {
    if (wide) return _mm512_loadu_ps(from);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)from));
}

/* Bytes of weights 4u..4u+3, u in 0..7, one row per 32-bit lane; signed codes are raised by 128. */
GGML_INLINE __m512i load_codes(const struct ggml_layout * layout, const uint8_t * qs, __m512i qh,
                               int u) {
    if (layout->bits == 8)
        return _mm512_xor_si512(_mm512_loadu_si512(qs + 64 * u), _mm512_set1_epi8(-128));
    __m512i codes = _mm512_loadu_si512(qs + 64 * (u / 2));
    if (u % 2) codes = _mm512_srli_epi16(codes, 4);
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    if (layout->bits == 5) {
        __m512i fifth = u < 4 ? _mm512_slli_epi16(qh, (unsigned)(4 - u))
                              : _mm512_srli_epi16(qh, (unsigned)(u - 4));
        codes = _mm512_or_si512(codes, _mm512_and_si512(fifth, _mm512_set1_epi8(16)));
    }
    return codes;
}

/* The outliers of a block of a stripe. */
struct outliers {
    __m512i column; /* 0..31 */
    __m512i slot;   /* of the column in ggml_act.a, in the high half of a lane */
    __m512 value;
    __mmask16 rows; /* that have one */
};

GGML_INLINE struct outliers load_outliers(const uint8_t * block,
                                          const struct ggml_stripe_block * at) {
    const __m512i columns = /* ggml_slot */
        _mm512_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m512i slot = _mm512_cvtepi16_epi32(
        _mm256_loadu_si256((const __m256i *)(const void *)(block + at->index)));
    struct outliers o;
    o.column =
        _mm512_permutex2var_epi32(columns, slot, _mm512_add_epi32(columns, _mm512_set1_epi32(16)));
    o.slot = _mm512_slli_epi32(slot, 16);
    o.value = load_scales(block + at->outlier, false);
    o.rows = _mm512_cmpge_epi32_mask(slot, _mm512_setzero_si512());
    return o;
}

/* acc = fma(v, x_i, acc), acc = fma(-m, a_i * d, acc) in the rows that have an outlier. */
GGML_INLINE __m512 add_outliers(const struct outliers * o, const float * x,
                                const struct ggml_act * act, __m512 m, __m512 acc) {
    __m512 x_i = _mm512_permutex2var_ps(_mm512_loadu_ps(x), o->column, _mm512_loadu_ps(x + 16));
    __m512i a_i = _mm512_permutexvar_epi16(o->slot, _mm512_loadu_si512(act->a));
    __m512 a_d =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(a_i, 16)), _mm512_set1_ps(act->d));
    acc = _mm512_mask3_fmadd_ps(o->value, x_i, acc, o->rows);
    return _mm512_mask3_fnmadd_ps(m, a_d, acc, o->rows);
}

#endif
