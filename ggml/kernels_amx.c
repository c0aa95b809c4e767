/* The arithmetic in AMX, for many vectors: tiles multiply the bytes of 16 vectors with those of a
 * stripe's 16 rows; AVX-512 scales the sums. All that is not here is left to AVX-512.
 *
 * Work for 16 vectors × 16 rows × 32 columns, the count behind this plan (cycles of a core that
 * starts one tile product every 16 cycles and two vector operations, two loads and one store of 64
 * bytes in each):
 *
 *     tile products    2                                                              32 cycles
 *     vector ports     16 × (shift, add, convert, times d, fma; one more with m)      40 to 48
 *     loads            16 × (hi, lo, d, s) and three tiles of 16, 16 and 8 rows       52
 *     stores           16 × 2 of sums; accumulators 4, copies of activations 5        41
 *
 * that is 16·16·32 multiply-adds in about 52 cycles, 5 times what two FMA units do. With GGML_A8
 * half of the products and stores fall away. Formats with blocks of 16 fill a quarter of a tile
 * product instead of half and scale twice as often. So that all this is done side by side, the
 * sums are stored to memory one step before they are scaled, and the panels stay in the first-level
 * cache. */
#include <immintrin.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"
#include "stripes_avx512.h"
#include "tiles.h"

enum {
    GROUP = 16,   /* vectors in a tile */
    VECTORS = 64, /* that share unpacked codes */
    STRIPES = 8,  /* whose codes are unpacked together, */
    BLOCKS = 4,   /* so many blocks of each */
    FEWEST = 32,  /* vectors that tiles are taken for; by the count above 8 would do */
};

/* Two pairs of sums, so that a step need not wait until the one before has been stored. */
enum tile { HI_0, LO_0, HI_1, LO_1, ACT_HI, ACT_LO, CODES };

struct sums { /* of a step: [vector][row] */
    _Alignas(64) int32_t hi[GROUP][GGML_STRIPE];
    _Alignas(64) int32_t lo[GROUP][GGML_STRIPE];
};

/* For steps of `size` columns, 32 or 16. */
static void configure_tiles(unsigned size) {
    struct tile_config config = {.palette = 1};
    for (int tile = HI_0; tile <= LO_1; tile++) {
        config.rows[tile] = GROUP;
        config.colsb[tile] = 4 * GGML_STRIPE;
    }
    for (int tile = ACT_HI; tile <= ACT_LO; tile++) {
        config.rows[tile] = GROUP;
        config.colsb[tile] = (uint16_t)size;
    }
    config.rows[CODES] = (uint8_t)(size / 4);
    config.colsb[CODES] = 4 * GGML_STRIPE;
    tile_configure(&config);
}

#define MULTIPLY(sums_tile, act_tile, to)                                                          \
    do {                                                                                           \
        tile_zero(sums_tile);                                                                      \
        tile_dot(sums_tile, act_tile, CODES);                                                      \
        tile_store(sums_tile, to, 4 * GGML_STRIPE);                                                \
    } while (0)

/* Columns [k, k + size) of a block of 16 vectors times as many of a stripe. */
GGML_INLINE void multiply(enum ggml_activations activations, bool odd, const struct ggml_act * acts,
                          size_t k, const int8_t * codes, struct sums * sums) {
    tile_load(CODES, codes, 4 * GGML_STRIPE);
    tile_load(ACT_HI, acts->hi + k, sizeof *acts);
    if (activations == GGML_A16) tile_load(ACT_LO, acts->lo + k, sizeof *acts);
    if (odd) {
        MULTIPLY(HI_1, ACT_HI, sums->hi);
        if (activations == GGML_A16) MULTIPLY(LO_1, ACT_LO, sums->lo);
    } else {
        MULTIPLY(HI_0, ACT_HI, sums->hi);
        if (activations == GGML_A16) MULTIPLY(LO_0, ACT_LO, sums->lo);
    }
}

/* The step that `sums` belong to, part `part` of a stripe's block, into the accumulators. */
GGML_INLINE void scale(enum ggml_type type, enum ggml_activations activations,
                       const struct sums * sums, const uint8_t * block, size_t part,
                       const struct ggml_act * acts, const float * const * xs, size_t column,
                       __m512 * acc) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const size_t offset = part * GGML_STRIPE * (layout->wide ? 4 : 2);
    const __m512 d = load_scales(block + at.d + offset, layout->wide);
    __m512 m = _mm512_setzero_ps();
    struct outliers outliers;
    if (layout->min) m = load_scales(block + at.m + offset, layout->wide);
    if (layout->outlier) outliers = load_outliers(block, &at);
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; i++) {
        __m512i sum = _mm512_load_si512(sums->hi[i]);
        if (activations == GGML_A16)
            sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), _mm512_load_si512(sums->lo[i]));
        __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(acts[i].d));
        acc[i] = _mm512_fmadd_ps(d, t, acc[i]);
        if (!layout->min) continue;
        acc[i] = _mm512_fmadd_ps(
            m, _mm512_set1_ps(layout->size == 16 ? acts[i].s_half[part] : acts[i].s), acc[i]);
        if (layout->outlier) acc[i] = add_outliers(&outliers, xs[i] + column, acts + i, m, acc[i]);
    }
}

/* Up to BLOCKS blocks of up to STRIPES stripes. */
struct panel {
    const uint8_t * stripes; /* those blocks of the first one */
    size_t stripe_size;
    size_t n_stripes;
    size_t column; /* of the first block */
    size_t n_blocks;
    _Alignas(64) int8_t codes[STRIPES * BLOCKS * 32 * GGML_STRIPE]; /* without gaps */
};

/* The same blocks of 16 vectors, close together: rows of a tile that lie 4096 bytes apart push each
 * other out of the cache. */
struct group {
    _Alignas(64) struct ggml_act acts[BLOCKS][GROUP];
    const float * xs[GROUP];
};

struct accumulators {
    _Alignas(64) float of[STRIPES][GROUP][GGML_STRIPE];
};

/* Codes become signed bytes, less what means zero. */
GGML_INLINE void unpack(enum ggml_type type, struct panel * panel) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const struct ggml_stripe_block at = ggml_stripe_block(type);
    const __m512i zero = _mm512_set1_epi8((char)(layout->bits == 8 ? 128 : layout->zero));
    int8_t * codes = panel->codes;
    for (size_t s = 0; s < panel->n_stripes; s++) {
        for (size_t b = 0; b < panel->n_blocks; b++, codes += 32 * GGML_STRIPE) {
            const uint8_t * block = panel->stripes + s * panel->stripe_size + b * at.size;
            __m512i qh = _mm512_setzero_si512();
            if (layout->bits == 5) qh = _mm512_loadu_si512(block + at.qh);
#pragma GCC unroll 8
            for (int u = 0; u < 8; u++) {
                const __m512i q = load_codes(layout, block + at.qs, qh, u);
                _mm512_store_si512(codes + 64 * u, _mm512_sub_epi8(q, zero));
            }
        }
    }
}

/* Vectors [t, t + 16); the last one stands in for those that do not exist. */
GGML_INLINE void gather(const struct ggml_matrix * w, const struct ggml_input * in, size_t t,
                        const struct panel * panel, struct group * group) {
    for (size_t i = 0; i < GROUP; i++) {
        const size_t vector = t + i < in->n ? t + i : in->n - 1;
        const struct ggml_act * act = ggml_act_of(in, vector, ggml_act_size(w->cols));
        act += panel->column / 32;
        for (size_t b = 0; b < panel->n_blocks; b++) group->acts[b][i] = act[b];
        group->xs[i] = in->x + vector * in->ldx;
    }
}

/* The tiles work on the next step while the sums of this one are scaled. Meanwhile one of `shares`
 * parts of the next panel is prefetched. */
GGML_INLINE void panel_times(enum ggml_type type, enum ggml_activations activations,
                             const struct panel * panel, const struct group * group,
                             struct accumulators * accs, size_t share, size_t shares) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const size_t block_size = ggml_stripe_block(type).size;
    const size_t parts = 32u / layout->size, step_bytes = (size_t)layout->size * GGML_STRIPE;
    const size_t steps = panel->n_blocks * parts;
    struct sums sums[2];
    multiply(activations, false, group->acts[0], 0, panel->codes, &sums[0]);
    for (size_t s = 0, step = 0; s < panel->n_stripes; s++) {
        __m512 acc[GROUP];
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; i++) acc[i] = _mm512_load_ps(accs->of[s][i]);
        for (size_t u = 0; u < steps; u++, step++) {
            const size_t next = u + 1 < steps ? u + 1 : 0;
            const struct ggml_act * acts = group->acts[next / parts];
            const int8_t * codes = panel->codes + (step + 1) * step_bytes;
            if (step + 1 == steps * panel->n_stripes) {
                /* that was the last one */
            } else if (step % 2) {
                multiply(activations, false, acts, next % parts * 16, codes, &sums[0]);
            } else {
                multiply(activations, true, acts, next % parts * 16, codes, &sums[1]);
            }
            const size_t b = u / parts, part = u % parts;
            const uint8_t * block = panel->stripes + s * panel->stripe_size + b * block_size;
            scale(type, activations, &sums[step % 2], block, part, group->acts[b], group->xs,
                  panel->column + 32 * b, acc);
            for (size_t line = share * parts + part; 64 * line < block_size; line += shares * parts)
                _mm_prefetch((const char *)block + BLOCKS * block_size + 64 * line, _MM_HINT_T1);
        }
#pragma GCC unroll 16
        for (int i = 0; i < GROUP; i++) _mm512_store_ps(accs->of[s][i], acc[i]);
    }
}

/* Stripes from row `row` on, as many as a panel takes, times vectors from t on, as many as share
 * it. */
GGML_INLINE void stripes_times(enum ggml_type type, enum ggml_activations activations,
                               const struct ggml_matrix * w, const struct ggml_input * in, size_t t,
                               float * y, size_t ldy, size_t row, size_t last) {
    const size_t n = in->n - t < VECTORS ? in->n - t : VECTORS, groups = (n + GROUP - 1) / GROUP;
    const size_t n_stripes = (last - row + GGML_STRIPE - 1) / GGML_STRIPE;
    struct accumulators accs[VECTORS / GROUP];
    struct panel panel;
    struct group group;
    memset(accs, 0, groups * sizeof *accs);
    panel.stripe_size = ggml_stripe_size(type, w->cols);
    panel.stripes = (const uint8_t *)w->data + row / GGML_STRIPE * panel.stripe_size;
    panel.n_stripes = n_stripes < STRIPES ? n_stripes : STRIPES;
    for (panel.column = 0; panel.column < w->cols; panel.column += 32 * BLOCKS) {
        const size_t blocks = (w->cols - panel.column) / 32;
        panel.n_blocks = blocks < BLOCKS ? blocks : BLOCKS;
        unpack(type, &panel);
        for (size_t g = 0; g < groups; g++) {
            gather(w, in, t + g * GROUP, &panel, &group);
            panel_times(type, activations, &panel, &group, &accs[g], g, groups);
        }
        panel.stripes += BLOCKS * ggml_stripe_block(type).size;
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t s = 0; s < panel.n_stripes; s++) {
            const size_t first = row + s * GGML_STRIPE;
            const __mmask16 rows =
                (__mmask16)(last - first < 16 ? (1u << (last - first)) - 1 : 0xFFFF);
            _mm512_mask_storeu_ps(y + (t + i) * ldy + first, rows,
                                  _mm512_load_ps(accs[i / GROUP].of[s][i % GROUP]));
        }
    }
}

GGML_INLINE void matmul_tiles(enum ggml_type type, enum ggml_activations activations,
                              const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                              size_t ldy, size_t first, size_t last) {
    configure_tiles(ggml_layouts[type].size);
    for (size_t t = 0; t < in->n; t += VECTORS)
        for (size_t row = first; row < last; row += STRIPES * GGML_STRIPE)
            stripes_times(type, activations, w, in, t, y, ldy, row, last);
    tile_release();
}

#define INSTANCE(TYPE)                                                                             \
    static void matmul_##TYPE(const struct ggml_matrix * w, const struct ggml_input * in,          \
                              float * y, size_t ldy, size_t first, size_t last) {                  \
        if (in->n < FEWEST) {                                                                      \
            ggml_kernels_avx512.matmul[GGML_TYPE_##TYPE](w, in, y, ldy, first, last);              \
        } else if (in->activations == GGML_A8) {                                                   \
            matmul_tiles(GGML_TYPE_##TYPE, GGML_A8, w, in, y, ldy, first, last);                   \
        } else {                                                                                   \
            matmul_tiles(GGML_TYPE_##TYPE, GGML_A16, w, in, y, ldy, first, last);                  \
        }                                                                                          \
    }

GGML_QUANTIZED(INSTANCE)

/* ---- BF16 matrices -------------------------------------------------------------------------- */

/* A tile product is a step of the definition, so sums stay in tiles while a panel lasts: squares of
 * two groups of vectors by two stripes. Tiles want columns 2r and 2r + 1 as a pair. */
enum {
    BF16_VECTORS = 128, /* that share weights in this order, */
    BF16_STRIPES = 4,   /* so many stripes of them, */
    BF16_BLOCKS = 8     /* 32 columns each */
};

enum bf16_tile { SUMS_00, SUMS_01, SUMS_10, SUMS_11, ACTS_0, ACTS_1, WEIGHTS_0, WEIGHTS_1 };

struct bf16_panel {
    _Alignas(64) uint32_t weights[BF16_STRIPES][BF16_BLOCKS][GGML_BF16_WORDS][GGML_STRIPE];
    _Alignas(64) uint32_t acts[BF16_BLOCKS][2 * GROUP][GGML_BF16_WORDS];
    _Alignas(64) float sums[BF16_VECTORS / GROUP][BF16_STRIPES][GROUP][GGML_STRIPE];
};

/* Blocks from column k on of the stripes; the last stripe stands in for those that do not exist. */
GGML_INLINE void order_weights(const uint8_t * stripes, size_t stripe_size, size_t n_stripes,
                               size_t n_blocks, struct bf16_panel * panel) {
    const __mmask32 high = 0xAAAAAAAA; /* halves of words */
    for (size_t s = 0; s < (n_stripes + 1) / 2 * 2; s++) {
        const uint8_t * words = stripes + (s < n_stripes ? s : n_stripes - 1) * stripe_size;
        for (size_t b = 0; b < n_blocks; b++, words += GGML_BF16_BLOCK) {
            for (int p = 0; p < 8; p++) {
                const __m512i even = _mm512_loadu_si512(words + 64 * p);
                const __m512i odd = _mm512_loadu_si512(words + 64 * (p + 8));
                uint32_t (*to)[GGML_STRIPE] = panel->weights[s][b] + 2 * p;
                _mm512_store_si512(to[0],
                                   _mm512_mask_blend_epi16(high, _mm512_srli_epi32(even, 16), odd));
                _mm512_store_si512(to[1],
                                   _mm512_mask_blend_epi16(high, even, _mm512_slli_epi32(odd, 16)));
            }
        }
    }
}

/* The same of vectors [t, t + 2 * GROUP). */
GGML_INLINE void order_acts(const struct ggml_matrix * w, const struct ggml_input * in, size_t t,
                            size_t k, size_t n_blocks, struct bf16_panel * panel) {
    uint16_t places[32];
    for (int p = 0; p < GGML_BF16_WORDS; p++) {
        places[ggml_bf16_column(p)] = (uint16_t)(2 * p + 1);
        places[ggml_bf16_column(p) + 2] = (uint16_t)(2 * p);
    }
    const __m512i order = _mm512_loadu_si512(places);
    for (size_t i = 0; i < 2 * GROUP; i++) {
        const size_t vector = t + i < in->n ? t + i : in->n - 1;
        const uint8_t * words = in->act + vector * ggml_act_size(w->cols) + k / 32 * 64;
        for (size_t b = 0; b < n_blocks; b++)
            _mm512_store_si512(panel->acts[b][i],
                               _mm512_permutexvar_epi16(order, _mm512_loadu_si512(words + 64 * b)));
    }
}

/* Adds a panel to the sums of groups g and g + 1 in stripes s and s + 1. */
GGML_INLINE void square_times(struct bf16_panel * panel, size_t n_blocks, size_t g, size_t s) {
    tile_load(SUMS_00, panel->sums[g][s], 64);
    tile_load(SUMS_01, panel->sums[g][s + 1], 64);
    tile_load(SUMS_10, panel->sums[g + 1][s], 64);
    tile_load(SUMS_11, panel->sums[g + 1][s + 1], 64);
    for (size_t b = 0; b < n_blocks; b++) {
        tile_load(ACTS_0, panel->acts[b], 64);
        tile_load(WEIGHTS_0, panel->weights[s][b], 64);
        tile_dot_bf16(SUMS_00, ACTS_0, WEIGHTS_0);
        tile_load(WEIGHTS_1, panel->weights[s + 1][b], 64);
        tile_dot_bf16(SUMS_01, ACTS_0, WEIGHTS_1);
        tile_load(ACTS_1, panel->acts[b] + GROUP, 64);
        tile_dot_bf16(SUMS_10, ACTS_1, WEIGHTS_0);
        tile_dot_bf16(SUMS_11, ACTS_1, WEIGHTS_1);
    }
    tile_store(SUMS_00, panel->sums[g][s], 64);
    tile_store(SUMS_01, panel->sums[g][s + 1], 64);
    tile_store(SUMS_10, panel->sums[g + 1][s], 64);
    tile_store(SUMS_11, panel->sums[g + 1][s + 1], 64);
}

/* Stripes from row `row` on, as many as a panel takes or there are, times up to BF16_VECTORS
 * vectors. */
static void bf16_rows_times(const struct ggml_matrix * w, const struct ggml_input * in, size_t t,
                            float * y, size_t ldy, size_t row, size_t last) {
    const size_t n = in->n - t < BF16_VECTORS ? in->n - t : BF16_VECTORS;
    const size_t stripe_size = ggml_stripe_size(GGML_TYPE_BF16, w->cols);
    const size_t all_blocks = stripe_size / GGML_BF16_BLOCK;
    const size_t left = (last - row + GGML_STRIPE - 1) / GGML_STRIPE;
    const size_t n_stripes = left < BF16_STRIPES ? left : BF16_STRIPES;
    const uint8_t * stripes = (const uint8_t *)w->data + row / GGML_STRIPE * stripe_size;
    struct bf16_panel panel;
    memset(panel.sums, 0, sizeof panel.sums);
    for (size_t b = 0; b < all_blocks; b += BF16_BLOCKS) {
        const size_t n_blocks = all_blocks - b < BF16_BLOCKS ? all_blocks - b : BF16_BLOCKS;
        order_weights(stripes + b * GGML_BF16_BLOCK, stripe_size, n_stripes, n_blocks, &panel);
        for (size_t g = 0; g * GROUP < n; g += 2) {
            order_acts(w, in, t + g * GROUP, 32 * b, n_blocks, &panel);
            for (size_t s = 0; s < n_stripes; s += 2) square_times(&panel, n_blocks, g, s);
        }
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t s = 0; s < n_stripes; s++) {
            const size_t first = row + s * GGML_STRIPE;
            const __mmask16 rows =
                (__mmask16)(last - first < 16 ? (1u << (last - first)) - 1 : 0xFFFF);
            _mm512_mask_storeu_ps(y + (t + i) * ldy + first, rows,
                                  _mm512_load_ps(panel.sums[i / GROUP][s][i % GROUP]));
        }
    }
}

static void matmul_BF16(const struct ggml_matrix * w, const struct ggml_input * in, float * y,
                        size_t ldy, size_t first, size_t last) {
    if (in->n < FEWEST) {
        ggml_kernels_avx512bf16.matmul[GGML_TYPE_BF16](w, in, y, ldy, first, last);
        return;
    }
    struct tile_config config = {.palette = 1};
    for (int tile = SUMS_00; tile <= WEIGHTS_1; tile++) {
        config.rows[tile] = 16;
        config.colsb[tile] = 64;
    }
    tile_configure(&config);
    for (size_t row = first; row < last; row += BF16_STRIPES * GGML_STRIPE)
        for (size_t t = 0; t < in->n; t += BF16_VECTORS)
            bf16_rows_times(w, in, t, y, ldy, row, last);
    tile_release();
}

const struct ggml_kernels ggml_kernels_amx = {
    .isa = "amx",
    .needs = CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C | CPU_AVX512F | CPU_AVX512BW | CPU_AVX512DQ |
             CPU_AVX512VL | CPU_AVX512VNNI | CPU_AVX512BF16 | CPU_AMX_INT8 | CPU_AMX_BF16,
    .matmul =
        {
            [GGML_TYPE_BF16] = matmul_BF16,
            GGML_QUANTIZED_ENTRIES,
        },
};
