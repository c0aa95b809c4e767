/* AMX's tiles: eight registers of up to 16 rows of 64 bytes, and the few instructions on them that
 * kernels_amx.c needs (Intel SDM, volume 1 chapter 18; volume 2, the instructions' own pages).
 *
 * These are not the compilers' intrinsics: those of gcc 12 do not say what they read in memory (8
 * bytes of the configuration, nothing of a tile), so that what was to be written there before may
 * come too late. */
#ifndef GGML_TILES_H
#define GGML_TILES_H

#include <stddef.h>
#include <stdint.h>

/* The 64 bytes that LDTILECFG reads (SDM, volume 2: LDTILECFG, memory area layout). Of palette 1
 * are tiles 0..7, each with up to 16 rows of up to 64 bytes (colsb), or none of either. All else is
 * 0. */
struct tile_config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};

/* Sets the shapes of this thread's tiles, and zeroes them. */
static inline void tile_configure(const struct tile_config * config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*config));
}

/* Done with them: the system need not keep them any more when it switches threads. */
static inline void tile_release(void) {
    __asm__ volatile("tilerelease");
}

#define tile_zero(tile) __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile))

/* Row i is colsb bytes at `from` + i * stride; so with tile_store. */
#define tile_load(tile, from, stride)                                                              \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"                                               \
                     :                                                                             \
                     : "r"(from), "r"((size_t)(stride)), "i"(tile)                                 \
                     : "memory")

#define tile_store(tile, to, stride)                                                               \
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"                                              \
                     :                                                                             \
                     : "r"(to), "r"((size_t)(stride)), "i"(tile)                                   \
                     : "memory")

/* c[i][j] += the sum over k of a[i][4k..4k+3] · b[k][4j..4j+3]: signed bytes, 32-bit sums. c has
 * a's rows and b's colsb; b has as many rows as a has groups of four bytes. */
#define tile_dot(c, a, b)                                                                          \
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b))

/* The same of pairs of bf16: c[i][j] += e + o, e the sum of products of first members in ascending
 * order, o that of the second ones; floats, all as README.md defines it. */
#define tile_dot_bf16(c, a, b)                                                                     \
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b))

#endif
