/* What the kernels of all instruction sets share: the levels, stripes, quantized activations. */
#ifndef GGML_KERNELS_H
#define GGML_KERNELS_H

#include "blocks.h"

#if defined(_MSC_VER) && !defined(__clang__)
#define GGML_INLINE static __forceinline
#else
#define GGML_INLINE static inline __attribute__((always_inline))
#endif

/* The levels, weakest first. A NULL entry means that a level below does it; scalar has none. */
extern const struct ggml_kernels ggml_kernels_scalar;
extern const struct ggml_kernels ggml_kernels_sse2;
extern const struct ggml_kernels ggml_kernels_avx2;
extern const struct ggml_kernels ggml_kernels_stripes_avx2;
extern const struct ggml_kernels ggml_kernels_avx512;
extern const struct ggml_kernels ggml_kernels_avx512bf16;
extern const struct ggml_kernels ggml_kernels_amx;
extern const struct ggml_kernels ggml_kernels_neon;

/* ---- Stripes -------------------------------------------------------------------------------- */

/* A stripe is 16 rows; for every 32 weights of them it has one of these, at the byte offsets given.
 * Each field holds the rows side by side, so that a vector register has one row per lane. Formats
 * with blocks of 16 have two of d and m, first halves first; scales are as wide as in the file. */
struct ggml_stripe_block {
    size_t d;       /* [1 or 2][16] float or half */
    size_t m;       /* [1 or 2][16] float or half, if the format has a minimum */
    size_t index;   /* [16] uint16: slot of the outlier (ggml_slot), GGML_NO_OUTLIER: none */
    size_t outlier; /* [16] half */
    size_t qh;      /* [16] uint32: bit 8 * (k % 4) + k / 4 is the fifth bit of weight k */
    size_t qs;      /* nibbles: [4][16][4], low ones are weights 8j..8j+3, high ones 8j+4..8j+7;
                       bytes: [8][16][4], weights 4j..4j+3 */
    size_t size;    /* of all this, a multiple of 32 */
};

GGML_INLINE struct ggml_stripe_block ggml_stripe_block(enum ggml_type type) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    size_t scales = GGML_STRIPE * (layout->wide ? 4u : 2u) * (32u / layout->size);
    struct ggml_stripe_block at = {0};
    at.m = at.d + scales;
    at.index = at.m + (layout->min ? scales : 0);
    at.outlier = at.index + (layout->outlier ? 2 * GGML_STRIPE : 0);
    at.qh = at.outlier + (layout->outlier ? 2 * GGML_STRIPE : 0);
    at.qs = at.qh + (layout->bits == 5 ? 4 * GGML_STRIPE : 0);
    at.size = at.qs + (layout->bits == 8 ? 32 : 16) * GGML_STRIPE;
    return at;
}

/* Of a level's table: F(TYPE) for each kind of stripe, to define matmul_TYPE, and the entries that
 * these are. Q5_0 and Q5_1 have the same stripes in both versions. */
#define GGML_QUANTIZED(F)                                                                          \
    F(Q4_0_V100)                                                                                   \
    F(Q4_1_V100)                                                                                   \
    F(Q4_1_O)                                                                                      \
    F(Q4_2) F(Q4_3) F(Q4_0) F(Q4_1) F(Q5_0) F(Q5_1) F(Q8_0_V100) F(Q8_0)

#define GGML_QUANTIZED_ENTRIES                                                                     \
    [GGML_TYPE_Q4_0_V100] = matmul_Q4_0_V100, [GGML_TYPE_Q4_1_V100] = matmul_Q4_1_V100,            \
    [GGML_TYPE_Q4_1_O] = matmul_Q4_1_O, [GGML_TYPE_Q4_2] = matmul_Q4_2,                            \
    [GGML_TYPE_Q4_3] = matmul_Q4_3, [GGML_TYPE_Q5_0_V100] = matmul_Q5_0,                           \
    [GGML_TYPE_Q5_1_V100] = matmul_Q5_1, [GGML_TYPE_Q8_0_V100] = matmul_Q8_0_V100,                 \
    [GGML_TYPE_Q4_0] = matmul_Q4_0, [GGML_TYPE_Q4_1] = matmul_Q4_1,                                \
    [GGML_TYPE_Q5_0] = matmul_Q5_0, [GGML_TYPE_Q5_1] = matmul_Q5_1, [GGML_TYPE_Q8_0] = matmul_Q8_0

/* Of GGML_TYPE_BF16 a stripe has [16][16] words for every 32 columns, the last ones filled up with
 * zeros: word p of each row side by side. Its high half is the weight of column
 * ggml_bf16_column(p), the low one that of two columns further. So are the words of a vector, [16]
 * for 32 columns. The first eight hold the even columns, the others the odd ones: vdpbf16ps, which
 * takes first the high halves and then the low ones, comes by all of them in ascending order. */
enum { GGML_BF16_WORDS = 16, GGML_BF16_BLOCK = GGML_BF16_WORDS * GGML_STRIPE * 4 /* bytes */ };

GGML_INLINE int ggml_bf16_column(int p) {
    return p % 8 * 4 + p / 8;
}

/* ---- Blocks of rows ------------------------------------------------------------------------- */

/* How many rows of a mapped matrix should meet all n vectors, in groups of up to `group`, before
 * the next rows are read: what half a megabyte of cache holds, in whole tiles, at most `most`. A
 * single group meets each row once, and nothing has to stay. */
GGML_INLINE size_t ggml_cached_rows(size_t n, size_t group, size_t row_size, size_t tile,
                                    size_t most) {
    const size_t rows = ((size_t)512 << 10) / row_size / tile * tile;
    if (n <= group || rows > most) return most;
    return rows < tile ? tile : rows;
}

/* ---- Activations ---------------------------------------------------------------------------- */

/* 32 activations, a_k * d. Whoever multiplies 16-bit numbers takes `a`: within each group of four
 * the order is 0, 2, 1, 3, so that a 32-bit lane of four weights' bytes meets its pairs when its
 * even and its odd bytes are taken apart. Whoever multiplies bytes takes hi and lo: with GGML_A16
 * a_k = 128 * hi + lo; with GGML_A8 a_k = hi, and lo is 0. */
struct ggml_act {
    int16_t a[32];
    int8_t hi[32];
    int8_t lo[32];
    float d;
    float s;         /* d * sum */
    float s_half[2]; /* of weights 0..15 and 16..31 */
    int32_t sum;     /* of all a_k */
    int32_t sum_half[2];
    int32_t unused;
};

/* Where activation k (0..31) lies in `a`, and which one lies at slot k: the same map both ways. */
GGML_INLINE int ggml_slot(int k) {
    return (k & ~3) | (k & 1) << 1 | (k >> 1 & 1);
}

/* The largest |a_k|: of A16, 127 * 127 + 126, so that hi and lo both fit in bytes. */
GGML_INLINE float ggml_act_steps(enum ggml_activations activations) {
    return activations == GGML_A8 ? 127 : 16255;
}

/* Vector t of the input, quantized; `stride` is ggml_act_size(cols). */
GGML_INLINE const struct ggml_act * ggml_act_of(const struct ggml_input * in, size_t t,
                                                size_t stride) {
    return (const struct ggml_act *)(const void *)(in->act + t * stride);
}

/* Until ggml_fp_leave(what this returned), denormals count as zeros, as BF16 wants it; x86. */
uint64_t ggml_fp_flush(void);

#endif
