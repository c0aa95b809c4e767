/* See tile_emulator.h. The instructions, their encodings and conditions are those of Intel's SDM,
 * volume 2 (LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBSSD, TDPBF16PS), as far as
 * ggml/tiles.h uses them. */
#define _GNU_SOURCE
#include "tile_emulator.h"

#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, CONFIG_BYTES = 64 };

/* ---- Tiles ---------------------------------------------------------------------------------- */

/* Each thread has its own. No rows: not configured. */
static _Thread_local struct {
    int rows[TILES];
    int colsb[TILES];
    uint8_t data[TILES][ROWS][ROW_BYTES];
} state;

/* Each returns false where the CPU would raise an exception. */

static bool load_config(const uint8_t * config) {
    memset(&state, 0, sizeof state);
    uint8_t rest[CONFIG_BYTES];
    memcpy(rest, config, sizeof rest);
    rest[0] = 0;
    for (int i = 0; i < TILES; i++) {
        const int rows = config[48 + i], colsb = config[16 + 2 * i] | config[17 + 2 * i] << 8;
        if (rows > ROWS || colsb > ROW_BYTES || (rows == 0) != (colsb == 0)) return false;
        state.rows[i] = rows;
        state.colsb[i] = colsb;
        rest[48 + i] = rest[16 + 2 * i] = rest[17 + 2 * i] = 0;
    }
    for (int i = 0; i < CONFIG_BYTES; i++)
        if (rest[i] != 0) return false;
    return config[0] == 1;
}

static bool zero(int tile) {
    memset(state.data[tile], 0, sizeof state.data[tile]);
    return state.rows[tile] > 0;
}

static bool load(int tile, const uint8_t * from, int64_t stride) {
    if (!zero(tile)) return false; /* and so all beyond rows and colsb */
    for (int i = 0; i < state.rows[tile]; i++)
        memcpy(state.data[tile][i], from + i * stride, (size_t)state.colsb[tile]);
    return true;
}

static bool store(int tile, uint8_t * to, int64_t stride) {
    for (int i = 0; i < state.rows[tile]; i++)
        memcpy(to + i * stride, state.data[tile][i], (size_t)state.colsb[tile]);
    return state.rows[tile] > 0;
}

/* Whether the shapes go together. */
static bool can_multiply(int c, int a, int b) {
    const int *rows = state.rows, *colsb = state.colsb;
    if (c == a || c == b || a == b || rows[c] == 0 || rows[a] == 0 || rows[b] == 0) return false;
    if (rows[c] != rows[a] || colsb[c] != colsb[b] || colsb[a] != 4 * rows[b]) return false;
    return colsb[c] % 4 == 0;
}

static bool dot(int c, int a, int b) {
    const int *rows = state.rows, *colsb = state.colsb;
    if (!can_multiply(c, a, b)) return false;
    for (int i = 0; i < rows[c]; i++) {
        int32_t sums[ROW_BYTES / 4];
        memcpy(sums, state.data[c][i], sizeof sums);
        for (int k = 0; k < colsb[a]; k++)
            for (int j = 0; j < colsb[c] / 4; j++)
                sums[j] +=
                    (int8_t)state.data[a][i][k] * (int8_t)state.data[b][k / 4][4 * j + k % 4];
        memcpy(state.data[c][i], sums, sizeof sums);
    }
    return true;
}

/* A sum as a float; what is less than 2^-126 after rounding to 24 bits is flushed. */
static float flushed(double sum) {
    int exponent;
    const double rounded = rint(ldexp(frexp(sum, &exponent), 24));
    return fabs(ldexp(rounded, exponent - 24)) < FLT_MIN ? copysignf(0, (float)sum) : (float)sum;
}

static float bf16_at(const uint8_t * row, int number) {
    uint16_t half;
    memcpy(&half, row + 2 * number, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

static bool dot_bf16(int c, int a, int b) {
    if (!can_multiply(c, a, b)) return false;
    for (int i = 0; i < state.rows[c]; i++) {
        float sums[ROW_BYTES / 4];
        memcpy(sums, state.data[c][i], sizeof sums);
        for (int j = 0; j < state.colsb[c] / 4; j++) {
            float of_pair[2] = {0, 0};
            for (int k = 0; k < 2 * state.rows[b]; k++) {
                const double product = (double)bf16_at(state.data[a][i], k) *
                                       bf16_at(state.data[b][k / 2], 2 * j + k % 2);
                of_pair[k % 2] = flushed(product + of_pair[k % 2]);
            }
            const float sum = flushed((double)of_pair[0] + of_pair[1]);
            sums[j] = flushed((double)flushed(sums[j]) + sum);
        }
        memcpy(state.data[c][i], sums, sizeof sums);
    }
    return true;
}

/* ---- Instructions --------------------------------------------------------------------------- */

struct operand { /* in memory: base + displacement, and the scaled index as the rows' distance */
    int64_t base;
    int64_t index;
    size_t size; /* bytes of ModRM and what follows */
};

static int64_t value_of(const greg_t * registers, int number) {
    static const int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[order[number]];
}

/* The operand whose ModRM byte is code[4]; `x` and `b` extend the register numbers. */
static struct operand memory_operand(const uint8_t * code, const greg_t * registers, int x, int b) {
    const int mod = code[4] >> 6, rm = code[4] & 7;
    struct operand operand = {0, 0, 1};
    int base = rm;
    if (rm == 4) {
        const int sib = code[5], index = (sib >> 3 & 7) | x << 3;
        if (index != 4) operand.index = value_of(registers, index) * (1 << (sib >> 6));
        base = sib & 7;
        operand.size++;
    }
    int32_t displacement = 0;
    const size_t bytes = mod == 1 ? 1 : mod == 2 || (mod == 0 && base == 5) ? 4 : 0;
    memcpy(&displacement, code + 4 + operand.size, bytes);
    if (bytes == 1) displacement = (int8_t)displacement;
    operand.size += bytes;
    if (mod != 0 || base != 5) {
        operand.base = value_of(registers, base | b << 3);
    } else if (rm == 5) {
        operand.base = (int64_t)(intptr_t)(code + 4 + operand.size); /* relative to what follows */
    }
    operand.base += displacement;
    return operand;
}

/* Does what the instruction at `code` means; returns its length, or 0 if that can't be done. */
static size_t execute(const uint8_t * code, const greg_t * registers) {
    enum { PLAIN, P66, PF3, PF2 }; /* VEX.pp */
    /* VEX with three bytes, map 0F38, W0, 128 bits */
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return 0;
    const int prefix = code[2] & 3, opcode = code[3], third = ~(code[2] >> 3) & 15;
    const int reg = code[4] >> 3 & 7, rm = code[4] & 7;
    if (code[4] >> 6 == 3) {
        bool done = false;
        if (opcode == 0x49 && prefix == PLAIN && code[4] == 0xC0) {
            memset(&state, 0, sizeof state);
            done = true;
        } else if (opcode == 0x49 && prefix == PF2 && rm == 0) {
            done = zero(reg);
        } else if (opcode == 0x5E && prefix == PF2 && third < TILES) {
            done = dot(reg, rm, third);
        } else if (opcode == 0x5C && prefix == PF3 && third < TILES) {
            done = dot_bf16(reg, rm, third);
        }
        return done ? 5 : 0;
    }
    const struct operand operand =
        memory_operand(code, registers, !(code[1] & 0x40), !(code[1] & 0x20));
    uint8_t * memory = (uint8_t *)(intptr_t)operand.base;
    bool done = false;
    if (opcode == 0x49 && prefix == PLAIN && reg == 0) {
        done = load_config(memory + operand.index);
    } else if (opcode == 0x4B && prefix == PF2 && rm == 4) {
        done = load(reg, memory, operand.index);
    } else if (opcode == 0x4B && prefix == PF3 && rm == 4) {
        done = store(reg, memory, operand.index);
    }
    return done ? 4 + operand.size : 0;
}

static struct sigaction before;

static void on_illegal_instruction(int number, siginfo_t * info, void * context) {
    greg_t * registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)info;
    size_t length = execute((const uint8_t *)registers[REG_RIP], registers);
    registers[REG_RIP] += (greg_t)length;
    if (length == 0) sigaction(number, &before, NULL); /* let it happen again */
}

void emulate_tiles(void) {
    struct sigaction action = {0};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before);
}
