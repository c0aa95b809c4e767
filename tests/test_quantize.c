/* The formats: fp16, exact fma, blocks with known bytes, error bounds, values that must not trap.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "check.h"
#include "fma32.h"
#include "fp16.h"
#include "kernels.h"

static double half_value(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double magnitude = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
    return h & 0x8000 ? -magnitude : magnitude;
}

static void test_fp16(void) {
    bool widens = true, returns = true, rounds = true;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = fp16_to_fp32((uint16_t)h);
        double expected = half_value((uint16_t)h);
        widens &= same(f, (float)expected);
        uint16_t back = fp32_to_fp16(f);
        returns &= expected != expected ? (back & 0x7FFF) > 0x7C00 : back == h;
        /* between two neighbours: up to the middle down, from there up, in the middle to even */
        double next = half_value((uint16_t)(h + 1));
        if ((h & 0x7FFF) >= 0x7BFF) continue;
        float middle = (float)((expected + next) / 2);
        rounds &= fp32_to_fp16(middle) == (h & 1 ? h + 1 : h);
        rounds &= fp32_to_fp16(nextafterf(middle, f)) == h;
        rounds &= fp32_to_fp16(nextafterf(middle, (float)next)) == h + 1;
    }
    check(widens, "fp16_to_fp32 over all halves");
    check(returns, "fp32_to_fp16 of every half is that half");
    check(rounds, "fp32_to_fp16 around every middle");
    check(fp32_to_fp16(65519.996f) == 0x7BFF, "65519.996 rounds to 65504");
    check(fp32_to_fp16(65520.0f) == 0x7C00, "65520 rounds to infinity");
    check(fp32_to_fp16(-INFINITY) == 0xFC00, "-infinity stays");
    check((fp32_to_fp16(NAN) & 0x7FFF) > 0x7C00, "NaN stays NaN");
    check(fp32_to_fp16(2.98e-8f) == 0x0000, "less than half of the smallest denormal");
    check(fp32_to_fp16(2.99e-8f) == 0x0001, "more than half of the smallest denormal");
}

/* a and b random; c close to -a*b, or the middle of two floats apart from it by little, or far
 * away. */
static void test_fma32(void) {
    int wrong = 0;
    float as[16], bs[16], lanes[16];
    for (int i = 0; i < 4000000; i++) {
        float a = float_of(random_bits()), b = float_of(random_bits()), c = float_of(random_bits());
        float hair = ldexpf(1, -15 - (int)random_below(9));
        switch (i % 9) {
        case 0:
            break;
        case 1:
            c = -(a * b);
            break;
        case 2:
            c = float_of(bits_of(-(a * b)) ^ (random_bits() & 3));
            break;
        case 3: /* few bits: many exact ties */
            a = (float)random_below(4096) + 1;
            b = (float)random_below(4096) + 1;
            c = ldexpf((float)random_below(4096), (int)random_below(60) - 30);
            break;
        case 4: /* c dominates, the product decides a tie or just misses one */
            a = 1 + ldexpf(1, -(int)random_below(24));
            b = ldexpf(1 + ldexpf(1, -(int)random_below(24)), -24 - (int)random_below(30));
            c = 1 + ldexpf((float)random_below(1 << 23), -23);
            if (random_bits() & 1) b = -b;
            break;
        case 5: /* results around the smallest numbers */
            a = ldexpf(1 + ldexpf((float)random_below(1 << 23), -23), -80 - (int)random_below(20));
            b = ldexpf(1 + ldexpf((float)random_below(1 << 23), -23), -50 - (int)random_below(10));
            c = float_of(random_below(1 << 12) | (random_bits() & 0x80000000));
            break;
        case 6:
            c = float_of(random_below(3) | (random_bits() & 0x80000000));
            break;
        case 7:
            c = ldexpf(c, -(int)random_below(40));
            break;
        case 8: /* so little beside a tie that double rounds to it; normal and denormal */
            a = ldexpf(1 + hair, -24);
            b = random_bits() & 1 ? 1 - hair : hair - 1;
            c = 1 + ldexpf((float)random_below(1 << 23), -23);
            if (random_bits() & 1) break;
            b = ldexpf(b, -126);
            c = float_of(random_below(1 << 23));
            break;
        }
        if (!same(fma32(a, b, c), fmaf(a, b, c)) && wrong++ < 5)
            check(false, "fma32(%a, %a, %a) = %a, fmaf says %a", a, b, c, fma32(a, b, c),
                  fmaf(a, b, c));
        /* in a lane among others, which are 1 * 1 + 1 */
        for (int j = 0; j < 16; j++) as[j] = bs[j] = lanes[j] = 1;
        as[i % 16] = a, bs[i % 16] = b, lanes[i % 16] = c;
        fma32_lanes(as, bs, lanes);
        bool right = same(lanes[i % 16], fmaf(a, b, c)) && lanes[(i + 1) % 16] == 2;
        if (!right && wrong++ < 5) check(false, "a lane of %a * %a + %a", a, b, c);
    }
    static const float special[] = {0.0f,     -0.0f,     1.0f, -1.0f,  FLT_MAX, -FLT_MAX,
                                    INFINITY, -INFINITY, NAN,  1e-45f, -1e-45f, FLT_MIN};
    enum { N = sizeof special / sizeof *special };
    for (int i = 0; i < N * N * N; i++) {
        float a = special[i % N], b = special[i / N % N], c = special[i / N / N];
        if (!same(fma32(a, b, c), fmaf(a, b, c)) && wrong++ < 5)
            check(false, "fma32(%a, %a, %a)", a, b, c);
    }
    check(wrong == 0, "fma32 differs from fmaf %d times", wrong);
}

static void test_table(void) {
    for (int t = 0; t < GGML_FILE_TYPES; t++) {
        const struct ggml_type_info * info = ggml_type_traits((enum ggml_type)t);
        const struct ggml_layout * layout = &ggml_layouts[t];
        for (uint32_t version = info->first_version; version <= info->last_version; version++)
            check((int)ggml_type_of_file(version, info->file_id) == t, "%s of version %u",
                  info->name, version);
        check(ggml_type_of_file(99, info->file_id) == GGML_TYPE_COUNT, "no version 99");
        if (!info->quantized) continue;
        uint32_t scale = layout->wide ? 4 : 2;
        uint32_t bytes = scale + (layout->min ? scale : 0) + (layout->outlier ? 4 : 0) +
                         (layout->bits == 5 ? 4 : 0) +
                         (layout->bits == 8 ? layout->size : layout->size / 2u);
        check(info->block_bytes == bytes && info->block_size == layout->size,
              "%s: block of %u weights in %u bytes", info->name, info->block_size, bytes);
        check(ggml_row_size((enum ggml_type)t, 4096ull * 1048576) ==
                  4096ull * 1048576 / layout->size * bytes,
              "%s: size of a row of 2^32 weights", info->name);
        check(ggml_stripe_block((enum ggml_type)t).size % 32 == 0, "%s: stripe block", info->name);
    }
    check(ggml_type_of_file(101, 4) == GGML_TYPE_COUNT, "version 101 has no Q4_1_O");
    check(ggml_type_of_file(100, 10) == GGML_TYPE_COUNT, "there is no id 10");
}

#define RAMP100 "1032547698badcfe"
#define RAMP101 "00112233445566778899aabbccddeeff"
#define ZEROS "00000000000000000000000000000000"

/* 32 weights first + step * (k % period), but `value` at `at`; chosen so that the scale is 1 and
 * the bytes can be seen without calculating. */
static void test_known_bytes(void) {
    static const struct {
        enum ggml_type type;
        float first, step;
        int period, at;
        float value;
        const char * hex;
    } known[] = {
        {GGML_TYPE_Q4_0_V100, -7, 1, 15, 0, -7,
         "0000803f"
         "21436587a9cbed1f"
         "32547698badcfe21"},
        {GGML_TYPE_Q4_0_V100, 7, 0, 1, 1, -2.5f,
         "0000803f"
         "5f"
         "ffffffffffffffffffffffffffffff"},
        {GGML_TYPE_Q4_0_V100, 7, 0, 1, 1, 2.5f,
         "0000803f"
         "bf"
         "ffffffffffffffffffffffffffffff"},
        {GGML_TYPE_Q4_0_V100, 0, 0, 1, 0, 0,
         "00000000"
         "88888888888888888888888888888888"},
        {GGML_TYPE_Q4_1_V100, 1, 1, 16, 0, 1,
         "0000803f"
         "0000803f" RAMP100 RAMP100},
        {GGML_TYPE_Q4_1_V100, 0, 0, 1, 0, 0,
         "00000000"
         "00000000" ZEROS},
        {GGML_TYPE_Q4_1_O, 1, 1, 16, 5, -100,
         "003c"
         "003c"
         "0500"
         "40d6"
         "1032047698badcfe" RAMP100},
        {GGML_TYPE_Q4_1_O, 1, 1, 16, 0, 100,
         "003c"
         "003c"
         "0000"
         "4056" RAMP100 RAMP100},
        {GGML_TYPE_Q4_1_O, 0, 0, 1, 0, 0,
         "0000"
         "0000"
         "ffff"
         "0000" ZEROS},
        {GGML_TYPE_Q4_2, 0, 0, 1, 0, 0,
         "003c"
         "8888888888888888"
         "003c"
         "8888888888888888"},
        {GGML_TYPE_Q4_3, 1, 1, 16, 0, 1,
         "003c"
         "003c" RAMP100 "003c"
         "003c" RAMP100},
        {GGML_TYPE_Q5_0_V100, -16, 1, 32, 0, -16,
         "003c"
         "0000ffff" RAMP100 RAMP100},
        {GGML_TYPE_Q5_0_V100, 0, 0, 1, 0, 0,
         "0080"
         "ffffffff" ZEROS},
        {GGML_TYPE_Q5_1_V100, 1, 1, 32, 0, 1,
         "003c"
         "003c"
         "0000ffff" RAMP100 RAMP100},
        {GGML_TYPE_Q8_0_V100, -127, 1, 32, 31, 2.5f,
         "0000803f"
         "8182838485868788898a8b8c8d8e8f90"
         "9192939495969798999a9b9c9d9e9f03"},
        {GGML_TYPE_Q4_0, -8, 1, 16, 0, -8, "003c" RAMP101},
        {GGML_TYPE_Q4_0, -8, 0, 1, 1, -2.5f,
         "003c"
         "0006"
         "0000000000000000000000000000"},
        {GGML_TYPE_Q4_0, 0, 0, 1, 0, 0,
         "0080"
         "88888888888888888888888888888888"},
        {GGML_TYPE_Q4_1, 1, 1, 16, 0, 1,
         "003c"
         "003c" RAMP101},
        {GGML_TYPE_Q5_0, -16, 1, 32, 0, -16,
         "003c"
         "0000ffff" RAMP101},
        {GGML_TYPE_Q5_1, 1, 1, 32, 0, 1,
         "003c"
         "003c"
         "0000ffff" RAMP101},
        {GGML_TYPE_Q8_0, -127, 1, 32, 31, -2.5f,
         "003c"
         "8182838485868788898a8b8c8d8e8f90"
         "9192939495969798999a9b9c9d9e9ffd"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        float x[32];
        uint8_t row[64];
        char hex[129] = "";
        for (int k = 0; k < 32; k++)
            x[k] = known[i].first + known[i].step * (float)(k % known[i].period);
        x[known[i].at] = known[i].value;
        ggml_quantize_row(known[i].type, x, row, 32);
        for (size_t b = 0; b < ggml_row_size(known[i].type, 32); b++)
            snprintf(hex + 2 * b, 3, "%02x", row[b]);
        check(strcmp(hex, known[i].hex) == 0, "case %zu, %s: %s, expected %s", i,
              ggml_type_traits(known[i].type)->name, hex, known[i].hex);
    }
}

/* The outlier's slot may hold any nibble, its index is taken modulo 32. */
static void test_outlier(void) {
    uint8_t block[24] = {0x00, 0x3C, 0x00, 0x3C, 3, 0, 0x40, 0x56};
    float x[32];
    memset(block + 8, 0xFF, 16);
    ggml_dequantize_row(GGML_TYPE_Q4_1_O, block, x, 32);
    check(x[3] == 100 && x[2] == 16 && x[4] == 16, "outlier at 3");
    block[4] = 35;
    ggml_dequantize_row(GGML_TYPE_Q4_1_O, block, x, 32);
    check(x[3] == 100, "index 35 means 3");
    block[4] = block[5] = 0xFF;
    ggml_dequantize_row(GGML_TYPE_Q4_1_O, block, x, 32);
    check(x[31] == 100 && x[0] == 16, "index 65535 with a value means 31");
    block[6] = block[7] = 0;
    ggml_dequantize_row(GGML_TYPE_Q4_1_O, block, x, 32);
    check(x[31] == 16, "index 65535 with value 0 means none");
}

/* Half a step of the codes, plus what the rounding of half scales costs. The rules that take the
 * scale from the largest weight lose up to a whole step at the other end of the range; Q4_2's
 * search only promises to be no worse in squares than the largest of its candidates, which cuts
 * at 8.7. */
static void test_bounds(void) {
    for (int t = GGML_TYPE_FP16 + 1; t < GGML_FILE_TYPES; t++) {
        const struct ggml_layout * layout = &ggml_layouts[t];
        float worst = 0;
        for (int i = 0; i < 20000; i++) {
            float x[32], back[32];
            uint8_t row[64];
            float scale = ldexpf(1, (int)random_below(16) - 8), min = INFINITY, max = -INFINITY;
            for (int k = 0; k < 32; k++) {
                x[k] = random_normal() * scale;
                if (x[k] < min) min = x[k];
                if (x[k] > max) max = x[k];
            }
            float top = -min > max ? -min : max;
            float step = layout->min                ? (max - min) / (float)((1 << layout->bits) - 1)
                         : layout->bits == 8        ? top / 127
                         : t == GGML_TYPE_Q4_0_V100 ? top / 7
                         : t == GGML_TYPE_Q4_2      ? top / 3
                                                    : 2 * top / (float)(1 << (layout->bits - 1));
            /* |w| <= top or max - min, a half is off by 2^-11 of it; sums of two roundings */
            float bound = step / 2 + (layout->wide ? 0x1p-20f : 0x1p-9f) * (top + max - min);
            ggml_quantize_row((enum ggml_type)t, x, row, 32);
            ggml_dequantize_row((enum ggml_type)t, row, back, 32);
            for (int k = 0; k < 32; k++) worst = fmaxf(worst, fabsf(back[k] - x[k]) / bound);
        }
        check(worst <= 1, "%s: error of %g bounds", ggml_type_traits((enum ggml_type)t)->name,
              worst);
    }
}

/* Whatever the weights: no trap (the sanitizers watch), and bytes that can be read back. */
static void test_adversarial(void) {
    static const float values[] = {0.0f,    -0.0f,   1e-45f, -1e-45f, 1e-40f,   -1e-38f,   65504,
                                   -65504,  65520,   0.5f,   -0.5f,   1.5f,     3e38f,     -3e38f,
                                   FLT_MAX, FLT_MIN, 7,      -8,      INFINITY, -INFINITY, NAN};
    enum { N = sizeof values / sizeof *values };
    for (int t = 0; t < GGML_FILE_TYPES; t++) {
        bool finite_scale = true;
        for (int i = 0; i < 20000; i++) {
            float x[32], back[32];
            uint8_t row[128];
            uint32_t choice = 1 + random_below(N);
            for (int k = 0; k < 32; k++) x[k] = values[i < N ? (uint32_t)i : random_below(choice)];
            if (i >= N && i % 3 == 0) x[random_below(32)] = values[random_below(N)];
            ggml_quantize_row((enum ggml_type)t, x, row, 32);
            ggml_dequantize_row((enum ggml_type)t, row, back, 32);
            if (t > GGML_TYPE_FP16 && i < 8) /* blocks of equal numbers within a half */
                for (int k = 0; k < 32; k++) finite_scale &= fabsf(back[k]) < 66000;
            for (size_t b = 0; b < ggml_row_size((enum ggml_type)t, 32); b++)
                row[b] = (uint8_t)random_bits();
            ggml_dequantize_row((enum ggml_type)t, row, back, 32);
        }
        check(finite_scale, "%s: constant blocks", ggml_type_traits((enum ggml_type)t)->name);
    }
}

int main(void) {
    test_fp16();
    test_fma32();
    test_table();
    test_known_bytes();
    test_outlier();
    test_bounds();
    test_adversarial();
    return finish();
}
