/* Every level that this CPU can run gives the bits of the scalar one; the scalar one is as close to
 * exact arithmetic as its definition says. `--bench` prints times and bandwidths instead. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "bf16.h"
#include "check.h"
#include "kernels.h"

static const char * const isas[] = {"scalar",     "sse2", "avx2", "avx512",
                                    "avx512bf16", "amx",  "neon"};
enum { ISAS = sizeof isas / sizeof *isas };

static const struct ggml_kernels * scalar;

static void * allocate(size_t size) {
    void * memory = malloc(size ? size : 1);
    if (!memory) {
        printf("out of memory\n");
        exit(2);
    }
    return memory;
}

/* Aligned as activations and stripes must be, and not one byte longer than asked for. */
static uint8_t * allocate_aligned(size_t size) {
    return (uint8_t *)aligned_alloc(64, (size + 63) / 64 * 64);
}

/* ---- Matrices ------------------------------------------------------------------------------- */

enum weights { NORMAL_WEIGHTS, RANDOM_BYTES, SMALL_WEIGHTS };
enum input { NORMAL_INPUT, OUTLIERS, SPECIALS, SMALL_INPUT };

/* Products of two of them are about the smallest normal number, often just that, or far below. */
static float random_small(void) {
    const float x = random_below(4) ? 1 : 1 + (float)random_below(128) / 128;
    const int exponent = random_below(2) ? -63 : -60 - (int)random_below(40);
    return ldexpf(random_below(2) ? x : -x, exponent);
}

static float random_input(enum input kind) {
    static const float specials[] = {NAN,     INFINITY, -INFINITY, 1e-45f,
                                     -1e-40f, 0.0f,     -0.0f,     FLT_MAX};
    float x = random_normal();
    if (kind == SMALL_INPUT) return random_small();
    if (kind == OUTLIERS && random_below(20) == 0) x *= 40;
    if (kind == SPECIALS && random_below(100) == 0) x = specials[random_below(8)];
    if (kind == SPECIALS && random_below(3) == 0) x *= 1e-38f;
    return x;
}

struct problem {
    struct ggml_matrix w;
    struct ggml_input in;
    enum ggml_type file_type;
    uint8_t * file; /* rows as in a file */
    float * x;
    uint8_t * act;
    uint8_t * stripes;
};

static struct problem make_problem(enum ggml_type type, size_t rows, size_t cols, size_t n,
                                   enum weights weights, enum input input) {
    struct problem p;
    p.file_type = type;
    if (type == GGML_TYPE_BF16)
        p.file_type = weights != SMALL_WEIGHTS && random_below(2) ? GGML_TYPE_FP16 : GGML_TYPE_FP32;
    const struct ggml_type_info * info = ggml_type_traits(p.file_type);
    size_t row_size = ggml_row_size(p.file_type, cols);
    /* FP32 and FP16 rows are used as they lie: at an odd address, with nothing after them */
    p.file = (uint8_t *)allocate(rows * row_size + 1) + 1;
    p.stripes = NULL;
    float * row = (float *)allocate(cols * sizeof *row);
    for (size_t r = 0; r < rows; r++) {
        for (size_t k = 0; k < cols; k++)
            row[k] = weights == SMALL_WEIGHTS ? random_small() : random_normal() * 0.1f;
        ggml_quantize_row(p.file_type, row, p.file + r * row_size, cols);
    }
    free(row);
    if (weights == RANDOM_BYTES) {
        for (size_t i = 0; i < rows * row_size; i++) p.file[i] = (uint8_t)random_bits();
        if (type == GGML_TYPE_Q4_1_O)
            for (size_t i = 4; i < rows * row_size; i += info->block_bytes) {
                p.file[i] %= 32;
                p.file[i + 1] = 0;
                if (random_below(4) == 0) memcpy(p.file + i, "\xFF\xFF\0\0", 4);
            }
    }
    p.w.type = type;
    p.w.rows = rows;
    p.w.cols = cols;
    p.w.data = p.file;
    p.w.columns = NULL;
    const size_t size = ggml_stripes_size(type, rows, cols), middle = rows / 2 / 16 * 16;
    if (size > 0) p.w.data = p.stripes = allocate_aligned(size);
    if (type == GGML_TYPE_BF16) {
        ggml_pack_bf16(p.file_type, rows, cols, p.file, p.stripes, 0, middle);
        ggml_pack_bf16(p.file_type, rows, cols, p.file, p.stripes, middle, rows);
    } else if (size > 0) {
        size_t bad = 0;
        check(ggml_pack_stripes(type, rows, cols, p.file, p.stripes, 0, middle, &bad) &&
                  ggml_pack_stripes(type, rows, cols, p.file, p.stripes, middle, rows, &bad),
              "%s: packing", info->name);
    }
    p.in.n = n;
    p.in.ldx = cols + 3;
    p.x = (float *)allocate(((n - 1) * p.in.ldx + cols) * sizeof *p.x);
    for (size_t i = 0; i < (n - 1) * p.in.ldx + cols; i++) p.x[i] = random_input(input);
    p.in.x = p.x;
    p.in.activations = random_below(3) == 0 ? GGML_A8 : GGML_A16;
    p.act = NULL;
    if (size > 0) {
        p.act = allocate_aligned(n * ggml_act_size(cols));
        for (size_t t = 0; t < n; t++)
            ggml_make_act(scalar, type, p.in.activations, p.x + t * p.in.ldx, 0, cols,
                          p.act + t * ggml_act_size(cols));
    }
    p.in.act = p.act;
    return p;
}

static void free_problem(struct problem * p) {
    free(p->file - 1);
    free(p->stripes);
    free(p->x);
    free(p->act);
}

static void test_matmul(const struct ggml_kernels * k, enum ggml_type type, size_t rows,
                        size_t cols, size_t n, enum weights weights, enum input input) {
    struct problem p = make_problem(type, rows, cols, n, weights, input);
    size_t ldy = rows + 2, size = n * ldy;
    float * expected = (float *)allocate(size * sizeof *expected);
    float * y = (float *)allocate(size * sizeof *y);
    for (size_t i = 0; i < size; i++) y[i] = expected[i] = 12345;
    /* one token at a time, all rows; then all tokens, rows in two parts */
    for (size_t t = 0; t < n; t++) {
        struct ggml_input one = {p.in.x + t * p.in.ldx, p.in.ldx,
                                 p.in.act ? p.in.act + t * ggml_act_size(cols) : NULL,
                                 p.in.activations, 1};
        scalar->matmul[type](&p.w, &one, expected + t * ldy, ldy, 0, rows);
    }
    size_t middle = rows / 2 / 16 * 16;
    k->matmul[type](&p.w, &p.in, y, ldy, 0, middle);
    k->matmul[type](&p.w, &p.in, y, ldy, middle, rows);
    size_t wrong = 0;
    while (wrong < size && same(y[wrong], expected[wrong])) wrong++;
    check(wrong == size,
          "%s: %s %zu x %zu, %zu vectors, weights %d, input %d, A%d: token %zu row %zu is %a, "
          "expected %a",
          k->isa, ggml_type_traits(type)->name, rows, cols, n, (int)weights, (int)input,
          p.in.activations == GGML_A8 ? 8 : 16, wrong / ldy, wrong % ldy,
          wrong < size ? y[wrong] : 0, wrong < size ? expected[wrong] : 0);
    free(expected);
    free(y);
    free_problem(&p);
}

static void test_matmuls(const struct ggml_kernels * k) {
    static const size_t row_counts[] = {1, 15, 16, 17, 50};
    static const size_t quantized_cols[] = {32, 64, 96, 416};
    static const size_t float_cols[] = {1, 7, 8, 15, 16, 17, 31, 33, 100, 773};
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        enum ggml_type type = (enum ggml_type)t;
        bool quantized = ggml_type_traits(type)->quantized;
        for (size_t r = 0; r < sizeof row_counts / sizeof *row_counts; r++) {
            for (size_t n = 1; n <= 9; n++) {
                const size_t * cols = quantized ? quantized_cols : float_cols;
                size_t count = quantized ? 4 : 10;
                for (size_t c = 0; c < count; c++) {
                    size_t variant = r + n + c;
                    test_matmul(k, type, row_counts[r], cols[c], n,
                                variant % 4 == 3 ? RANDOM_BYTES : NORMAL_WEIGHTS,
                                (enum input)(variant % 3));
                }
            }
        }
    }
}

/* So many vectors that they are evaluated in groups and panels; rows of several panels. */
static void test_many_vectors(const struct ggml_kernels * k) {
    static const size_t row_counts[] = {1, 16, 50, 170}, col_counts[] = {32, 128, 160, 416};
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        for (size_t n = 31; n <= 70 && k->matmul[t]; n++) {
            for (size_t i = 0; i < 3; i++) {
                test_matmul(k, (enum ggml_type)t, row_counts[(n + i) % 4],
                            col_counts[(n / 4 + i) % 4], n,
                            n % 4 == 3 ? RANDOM_BYTES : NORMAL_WEIGHTS, (enum input)i);
            }
        }
    }
}

/* Columns of several panels, rows of several blocks, groups of vectors. */
static void test_large_float_matrices(const struct ggml_kernels * k) {
    static const size_t counts[] = {1, 2, 5, 9, 19};
    static const enum ggml_type types[] = {GGML_TYPE_FP32, GGML_TYPE_FP16, GGML_TYPE_BF16};
    for (size_t i = 0; i < 5; i++) {
        for (int t = 0; t < 3; t++) {
            test_matmul(k, types[t], 250, 4117, counts[i], i == 2 ? RANDOM_BYTES : NORMAL_WEIGHTS,
                        (enum input)(i % 3));
        }
    }
}

/* Products and sums that are flushed to zero, or only just not. */
static void test_underflow(const struct ggml_kernels * k) {
    static const size_t counts[] = {1, 2, 3, 5, 8, 33};
    for (size_t cols = 1; cols <= 100; cols++)
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
            test_matmul(k, GGML_TYPE_BF16, 50, cols, counts[i], SMALL_WEIGHTS, SMALL_INPUT);
}

#ifdef GGML_ISA_amx
#include "cpu.h"
#include "tile_emulator.h"

static void test_tiles_are_described(void) {
    static const struct {
        uint32_t features;
        const char * text;
    } cases[] = {{0, "AMX_INT8=0"},
                 {CPU_AVX512F | CPU_AMX_INT8, "AMX_INT8=1"},
                 {CPU_AVX512F | CPU_AMX_REFUSED, "AMX_INT8=refused"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[200];
        ggml_cpu_describe(cases[i].features, text, sizeof text);
        check(strstr(text, cases[i].text) != NULL, "%s, expected %s", text, cases[i].text);
    }
}

/* Where the CPU has no tiles: nothing of kernels_amx.c needs more than them and AVX-512. */
static void test_emulated_amx(void) {
    struct ggml_kernels kernels = ggml_kernels_amx;
    int before = passed + failed;
    kernels.isa = "amx, emulated";
    emulate_tiles();
    test_many_vectors(&kernels);
    test_matmul(&kernels, GGML_TYPE_BF16, 90, 300, 150, NORMAL_WEIGHTS, NORMAL_INPUT);
    test_underflow(&kernels);
    printf("%s: %d checks\n", kernels.isa, passed + failed - before);
}
#else
static void test_tiles_are_described(void) {}
static void test_emulated_amx(void) {}
#endif

/* B·h against its definition, number by number; B is packed in two parts with a scale. */
static void test_low_rank(const struct ggml_kernels * k, size_t rows, size_t rank, size_t n) {
    enum { COLS = 100 };
    const size_t left = rank / 2, ldh = rank + 1, ldy = rows + 2, middle = rows / 2 / 16 * 16;
    uint8_t * odd = (uint8_t *)allocate(rows * rank * 4 + 1) + 1; /* B as a caller may have it */
    float * b = (float *)(void *)allocate_aligned(ggml_low_rank_size(rows, rank));
    float * a = (float *)allocate(rank * COLS * sizeof *a);
    float * x = (float *)allocate(n * COLS * sizeof *x);
    float * h = (float *)allocate(n * ldh * sizeof *h);
    float * y = (float *)allocate(n * ldy * sizeof *y);
    float * expected = (float *)allocate(n * ldy * sizeof *expected);
    for (size_t i = 0; i < rows * rank; i++) {
        const float weight = random_normal();
        memcpy(odd + 4 * i, &weight, sizeof weight);
    }
    for (size_t i = 0; i < rank * COLS; i++) a[i] = random_normal();
    for (size_t i = 0; i < n * COLS; i++) x[i] = random_input((enum input)(i % 3));
    for (size_t i = 0; i < n * ldy; i++) y[i] = expected[i] = random_normal();
    memset(b, 0, ggml_low_rank_size(rows, rank));
    ggml_pack_low_rank(rows, rank, odd, 0, left, 0.3f, b);
    ggml_pack_low_rank(rows, rank, odd + rows * left * 4, left, rank - left, -2, b);

    const struct ggml_low_rank product = {rank, COLS, a, b};
    const struct ggml_matrix as_matrix = {GGML_TYPE_FP32, rank, COLS, a, NULL};
    const struct ggml_input in = {x, COLS, NULL, GGML_A16, n}, narrow = {h, ldh, NULL, GGML_A16, n};
    for (size_t first = 0; first < rank; first += 5) {
        const size_t last = rank - first < 5 ? rank : first + 5;
        ggml_narrow(k, &product, &in, h, ldh, first, last);
    }
    float * whole = (float *)allocate(n * ldh * sizeof *whole);
    scalar->matmul[GGML_TYPE_FP32](&as_matrix, &in, whole, ldh, 0, rank);
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < rank; i++)
            check(same(h[t * ldh + i], whole[t * ldh + i]), "%s: narrow, rank %zu", k->isa, rank);

    for (size_t t = 0; t < n; t++) {
        for (size_t row = 0; row < rows; row++) {
            for (size_t i = 0; i < rank; i++) {
                const size_t part = i < left ? left : rank - left;
                float weight, *to = expected + t * ldy + row;
                memcpy(&weight,
                       odd + 4 * (i < left ? row * part + i : rows * left + row * part + i - left),
                       sizeof weight);
                *to = fmaf(weight * (i < left ? 0.3f : -2.0f), h[t * ldh + i], *to);
            }
        }
    }
    k->add_low_rank(&product, &narrow, y, ldy, 0, middle);
    k->add_low_rank(&product, &narrow, y, ldy, middle, rows);
    size_t wrong = 0;
    while (wrong < n * ldy && same(y[wrong], expected[wrong])) wrong++;
    check(wrong == n * ldy, "%s: low rank %zu, %zu rows, %zu vectors: %zu", k->isa, rank, rows, n,
          wrong);
    free(odd - 1), free(b), free(a), free(x), free(h), free(y), free(expected), free(whole);
}

static void test_low_ranks(const struct ggml_kernels * k) {
    static const size_t ranks[] = {1, 2, 7, 16, 33};
    for (size_t rows = 1; rows <= 70; rows += rows < 34 ? 1 : 6)
        for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++)
            test_low_rank(k, rows, ranks[i], rows % 5 + 1);
}

/* A row against float64 over the weights as the file holds them. An activation is off by at most
 * d/2, a block costs one rounding per step of its definition, at most of what has been summed up so
 * far. */
static void test_exactness(enum ggml_type type) {
    enum { ROWS = 20, COLS = 512 };
    const struct ggml_type_info * info = ggml_type_traits(type);
    const struct ggml_layout * layout = &ggml_layouts[type];
    struct problem p = make_problem(type, ROWS, COLS, 1, NORMAL_WEIGHTS, OUTLIERS);
    float y[ROWS], w[COLS];
    scalar->matmul[type](&p.w, &p.in, y, ROWS, 0, ROWS);
    const struct ggml_act * act = (const struct ggml_act *)(const void *)p.act;
    double worst = 0;
    for (int r = 0; r < ROWS; r++) {
        const uint8_t * row = p.file + (size_t)r * ggml_row_size(p.file_type, COLS);
        double exact = 0, from_act = 0, magnitude = 0, steps = COLS / 16 + 4;
        ggml_dequantize_row(p.file_type, row, w, COLS);
        if (info->quantized) {
            /* per 32 weights: convert, times d and fma; the minimum and s; the outlier's two */
            steps = COLS / layout->size * (3 + 2 * layout->min) + COLS / 32 * 3 * layout->outlier;
        }
        for (int k = 0; k < COLS; k++) {
            exact += (double)w[k] * p.x[k];
            double parts = fabs(w[k]);
            if (type == GGML_TYPE_BF16) from_act += 0x1.01p-8 * fabs((double)w[k] * p.x[k]);
            if (info->quantized) {
                struct ggml_block block;
                ggml_block_unpack(type, row + k / layout->size * info->block_bytes, &block);
                from_act += act[k / 32].d / 2.0 * fabs(w[k]);
                /* w = dq + m: the two may be much larger than w */
                parts += 2 * fabs((double)block.m);
            }
            magnitude += parts * fabs(p.x[k]);
        }
        double bound = from_act + (steps + 8) * 0x1p-24 * magnitude;
        worst = fmax(worst, fabs(y[r] - exact) / bound);
    }
    check(worst <= 1, "%s: error of %g bounds", info->name, worst);
    free_problem(&p);
}

static void test_bad_outlier(void) {
    enum { ROWS = 20, COLS = 64, BLOCKS = ROWS * COLS / 32 };
    static const uint16_t bad_indices[] = {32, 100, 65534, 0xFFFF};
    uint8_t file[BLOCKS * 24] = {0};
    uint8_t * stripes = allocate_aligned(ggml_stripes_size(GGML_TYPE_Q4_1_O, ROWS, COLS));
    size_t bad;
    for (size_t b = 0; b < BLOCKS; b++) memset(file + b * 24 + 4, 0xFF, 2);
    check(ggml_pack_stripes(GGML_TYPE_Q4_1_O, ROWS, COLS, file, stripes, 0, ROWS, &bad),
          "blocks without outliers");
    for (size_t i = 0; i < 4; i++) {
        size_t b = random_below(BLOCKS);
        memcpy(file + b * 24 + 4, &bad_indices[i], 2);
        file[b * 24 + 7] = 0x3C;
        check(!ggml_pack_stripes(GGML_TYPE_Q4_1_O, ROWS, COLS, file, stripes, 0, ROWS, &bad) &&
                  bad == b,
              "outlier index %u in block %zu, reported %zu", bad_indices[i], b, bad);
        memset(file + b * 24 + 4, 0xFF, 2);
        file[b * 24 + 7] = 0;
    }
    free(stripes);
}

/* ---- Columns -------------------------------------------------------------------------------- */

static uint8_t * make_columns(struct problem * p) {
    const size_t rows = p->w.rows, cols = p->w.cols;
    uint8_t * columns = allocate_aligned(ggml_columns_size(p->w.type, rows, cols));
    const size_t middle = rows / 2 / 32 * 32;
    ggml_pack_columns(p->w.type, rows, cols, p->file, columns, 0, middle);
    ggml_pack_columns(p->w.type, rows, cols, p->file + middle * ggml_row_size(p->w.type, cols),
                      columns, middle, rows);
    p->w.columns = columns;
    return columns;
}

/* Leaving zeros out gives the bits of the whole sum, all rows or in two parts. */
static void check_sparse(const struct ggml_kernels * k, struct problem * p, size_t middle,
                         const char * what) {
    const size_t rows = p->w.rows;
    float * expected = (float *)allocate(rows * sizeof *expected);
    float * y = (float *)allocate(rows * sizeof *y);
    scalar->matmul[p->w.type](&p->w, &p->in, expected, rows, 0, rows);
    ggml_multiply(k, &p->w, &p->in, y, rows, 0, middle);
    ggml_multiply(k, &p->w, &p->in, y, rows, middle, rows);
    size_t wrong = 0;
    while (wrong < rows && same(y[wrong], expected[wrong])) wrong++;
    check(wrong == rows, "%s: sparse %s %zu x %zu, %s: row %zu is %a, expected %a", k->isa,
          ggml_type_traits(p->w.type)->name, rows, p->w.cols, what, wrong,
          wrong < rows ? y[wrong] : 0, wrong < rows ? expected[wrong] : 0);
    free(expected);
    free(y);
}

static void test_sparse(const struct ggml_kernels * k, enum ggml_type type) {
    static const size_t sizes[][2] = {{1, 1},   {16, 16},   {17, 15},   {50, 33},
                                      {96, 64}, {530, 100}, {1100, 48}, {20, 8225}};
    static const uint32_t percents[] = {0, 30, 75, 95, 100};
    const bool quantized = ggml_type_traits(type)->quantized;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (size_t j = 0; j < sizeof percents / sizeof *percents; j++) {
            for (int input = NORMAL_INPUT; input <= SPECIALS; input++) {
                const size_t rows = sizes[i][0];
                const size_t cols = quantized ? (sizes[i][1] + 31) / 32 * 32 : sizes[i][1];
                struct problem p =
                    make_problem(type, rows, cols, 1, NORMAL_WEIGHTS, (enum input)input);
                for (size_t c = 0; c < cols; c++)
                    if (random_below(100) < percents[j]) p.x[c] = random_below(2) ? 0.0f : -0.0f;
                if (quantized) scalar->quantize_act(p.in.activations, cols, p.x, p.act);
                uint8_t * columns = make_columns(&p);
                check_sparse(k, &p, rows / 2 / 64 * 64, "random");
                free(columns);
                free_problem(&p);
            }
        }
    }
    check(ggml_columns_size(GGML_TYPE_Q4_0, 32, 32) == 0, "no columns of Q4_0");
}

/* Products that underflow to -0 before zeros that would make it +0, or would not. */
static void test_sparse_minus_zero(const struct ggml_kernels * k) {
    enum { ROWS = 40, COLS = 32 };
    struct problem p = make_problem(GGML_TYPE_FP32, ROWS, COLS, 1, NORMAL_WEIGHTS, NORMAL_INPUT);
    for (int r = 0; r < ROWS; r++) {
        for (int c = 0; c < COLS; c++) {
            float w = c < 16 || r % 2 ? -0.1f : 0.1f;
            memcpy(p.file + 4 * (r * COLS + c), &w, sizeof w);
        }
    }
    for (int c = 0; c < COLS; c++) p.x[c] = c < 16 ? 1e-45f : 0;
    uint8_t * columns = make_columns(&p);
    check_sparse(k, &p, 0, "minus zero");
    free(columns);
    free_problem(&p);
}

/* ---- Vectors -------------------------------------------------------------------------------- */

enum { VECTORS = 9 };

/* In memory that ends with it. */
static float * random_vector(size_t n, int kind) {
    float * x = (float *)allocate(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_input((enum input)kind);
    return x;
}

static float * copy_of(const float * x, size_t n) {
    float * copy = (float *)allocate(n * sizeof *x);
    memcpy(copy, x, n * sizeof *x);
    return copy;
}

/* `count` vectors of n floats, each in memory of its own that ends with it. */
static void make_vectors(size_t n, enum input kind, float * vectors[VECTORS]) {
    for (int i = 0; i < VECTORS; i++) {
        vectors[i] = (float *)allocate(n * sizeof(float));
        for (size_t k = 0; k < n; k++)
            vectors[i][k] = random_input(kind) * (kind == NORMAL_INPUT || i % 3 ? 1 : 30);
    }
}

/* Runs operation `op`; the results are among the vectors. */
static const char * run_operation(const struct ggml_kernels * k, int op, size_t n,
                                  float * v[VECTORS]) {
    switch (op) {
    case 0:
        k->layer_norm(n, v[0], v[1], v[2], v[3]);
        return "layer_norm";
    case 1:
        k->layer_norm(n, v[0], v[1], v[2], v[0]);
        return "layer_norm in place";
    case 2:
        k->lerp(n, v[0], v[1], v[2], v[3]);
        return "lerp";
    case 3:
        k->exp(n, v[0], v[3]);
        return "exp";
    case 4:
        k->exp(n, v[0], v[0]);
        return "exp in place";
    case 5:
        k->relu2(n, v[0], v[0]);
        return "relu2 in place";
    case 6:
        k->add(n, v[0], v[3]);
        return "add";
    case 7:
        k->sigmoid_mul(n, v[0], v[1], v[3]);
        return "sigmoid_mul";
    case 8:
        k->sigmoid_mul(n, v[0], v[1], v[1]);
        return "sigmoid_mul in place";
    case 9:
        k->sigmoid_mul_add(n, v[0], v[1], v[3]);
        return "sigmoid_mul_add";
    case 10:
        k->wkv(n, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
        return "wkv";
    case 11:
        k->wkv(n, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[3]);
        return "wkv in place";
    default:
        return NULL;
    }
}

static void test_vectors(const struct ggml_kernels * k) {
    for (size_t n = 1; n <= 70; n++) {
        for (int kind = NORMAL_INPUT; kind <= SPECIALS; kind++) {
            for (int op = 0;; op++) {
                float *v[VECTORS], *expected[VECTORS];
                make_vectors(n, (enum input)kind, expected);
                for (int i = 0; i < VECTORS; i++) {
                    v[i] = (float *)allocate(n * sizeof(float));
                    memcpy(v[i], expected[i], n * sizeof(float));
                }
                const char * name = run_operation(k, op, n, v);
                run_operation(scalar, op, n, expected);
                bool equal = true;
                for (int i = 0; i < VECTORS; i++) {
                    for (size_t j = 0; j < n; j++) equal &= same(v[i][j], expected[i][j]);
                    free(v[i]);
                    free(expected[i]);
                }
                if (!name) break;
                check(equal, "%s: %s of %zu, input %d", k->isa, name, n, kind);
            }
        }
    }
}

/* n columns of a matrix that has three more, which are left alone. */
static void test_linear_attention(const struct ggml_kernels * k) {
    for (size_t n = 1; n <= 150; n++) {
        for (int kind = NORMAL_INPUT; kind <= SPECIALS; kind++) {
            const size_t d = 1 + random_below(20), ldm = n + 3, size = d * ldm - 3;
            float *q = random_vector(d, kind), *key = random_vector(d, kind);
            float *v = random_vector(n, kind), *m = random_vector(size, kind);
            float *y = random_vector(n, kind), *expected_m = copy_of(m, size);
            float *expected_y = copy_of(y, n), scale = random_normal();
            k->linear_attention(d, n, q, key, v, scale, m, ldm, y);
            scalar->linear_attention(d, n, q, key, v, scale, expected_m, ldm, expected_y);
            bool equal = true;
            for (size_t i = 0; i < size; i++) equal &= same(m[i], expected_m[i]);
            for (size_t i = 0; i < n; i++) equal &= same(y[i], expected_y[i]);
            check(equal, "%s: linear_attention, %zu x %zu, input %d", k->isa, d, n, kind);
            float * all[] = {q, key, v, m, y, expected_m, expected_y};
            for (int i = 0; i < 7; i++) free(all[i]);
        }
    }
}

static void test_quantize_act(const struct ggml_kernels * k, enum ggml_activations activations) {
    const int steps = activations == GGML_A8 ? 127 : 16255, base = steps == 127 ? 1 : 128;
    for (int i = 0; i < 3000; i++) {
        enum { N = 96 };
        float x[N];
        float scale = ldexpf(1, (int)random_below(250) - 125);
        for (int j = 0; j < N; j++) {
            x[j] = random_input((enum input)(i % 3)) * (i % 5 ? 1 : scale);
            if (i % 7 == 0)
                x[j] = (float)((int)random_below(65) - 32) / 2 * (float)steps / 16; /* ties */
        }
        uint8_t * act = allocate_aligned(ggml_act_size(N));
        uint8_t * expected = allocate_aligned(ggml_act_size(N));
        k->quantize_act(activations, N, x, act);
        scalar->quantize_act(activations, N, x, expected);
        const struct ggml_act * a = (const struct ggml_act *)(const void *)act;
        const struct ggml_act * e = (const struct ggml_act *)(const void *)expected;
        bool equal = true, defined = true;
        for (int b = 0; b < N / 32; b++) {
            equal &= memcmp(a[b].a, e[b].a, sizeof a->a) == 0;
            equal &= memcmp(a[b].hi, e[b].hi, sizeof a->hi) == 0;
            equal &= memcmp(a[b].lo, e[b].lo, sizeof a->lo) == 0;
            equal &= same(a[b].d, e[b].d) && same(a[b].s, e[b].s);
            equal &= same(a[b].s_half[0], e[b].s_half[0]) && same(a[b].s_half[1], e[b].s_half[1]);
            equal &= a[b].sum == e[b].sum && a[b].sum_half[0] == e[b].sum_half[0] &&
                     a[b].sum_half[1] == e[b].sum_half[1];
            /* and the scalar one is what README.md says */
            for (int j = 0; j < 32; j++) {
                int v = e[b].a[ggml_slot(j)];
                defined &= v == base * e[b].hi[j] + e[b].lo[j] && abs(v) <= steps;
                defined &= base == 1 ? e[b].lo[j] == 0 : e[b].lo[j] >= -64 && e[b].lo[j] <= 63;
                if (!(e[b].d > 0)) defined &= v == 0;
                if (e[b].d > 0) defined &= (float)v == rintf(x[32 * b + j] * (1 / e[b].d));
            }
        }
        check(equal, "%s: quantize_act", k->isa);
        check(defined, "quantize_act as defined");
        free(act);
        free(expected);
    }
}

static void test_bf16_act(const struct ggml_kernels * k) {
    for (int i = 0; i < 3000; i++) {
        enum { N = 96 };
        const size_t n = 1 + random_below(N);
        float * x = (float *)allocate(n * sizeof *x);
        for (size_t j = 0; j < n; j++)
            x[j] = i % 4 == 3 ? float_of(random_bits()) : random_input((enum input)(i % 4));
        uint32_t act[2][N / 32][GGML_BF16_WORDS];
        memset(act, 0xAA, sizeof act);
        k->bf16_act(n, x, (uint8_t *)act[0]);
        scalar->bf16_act(n, x, (uint8_t *)act[1]);
        check(memcmp(act[0], act[1], sizeof act[0]) == 0, "%s: bf16_act of %zu", k->isa, n);
        bool defined = true; /* as README.md says */
        for (size_t j = 0; j < (n + 31) / 32 * 32; j++) {
            const size_t in_four = j % 4;
            const uint32_t word = act[1][j / 32][j % 32 / 4 + 8 * (in_four % 2)];
            const float got = in_four < 2 ? bf16_high(word) : bf16_low(word);
            const float from = j < n ? x[j] : 0;
            int exponent;
            const double mantissa = frexp(from, &exponent);
            double expected = ldexp(rint(mantissa * 256), exponent - 8);
            if (fabsf(from) < FLT_MIN) expected = copysign(0, from);
            defined &= same(got, from != from || isinf(from) ? from : (float)expected);
        }
        check(defined, "bf16_act as defined");
        free(x);
    }
}

/* The scalar vector operations against float64. */
static void test_accuracy(void) {
    double worst = 0;
    for (int i = 0; i < 3000000; i++) {
        float x =
            i % 2 ? float_of(random_bits()) : ((float)random_bits() / 4294967296.0f - 0.5f) * 210;
        float y;
        scalar->exp(1, &x, &y);
        double exact = exp((double)x);
        if (x != x || exact > FLT_MAX) {
            check(same(y, x != x ? x : INFINITY) || exact < 1.0000002 * FLT_MAX, "exp(%a) = %a", x,
                  y);
            continue;
        }
        int exponent;
        frexp(exact, &exponent);
        double ulp = ldexp(1, exponent - 24 < -149 ? -149 : exponent - 24);
        worst = fmax(worst, fabs(y - exact) / ulp);
    }
    check(worst <= 2, "exp is off by %g ulp", worst);
    printf("exp: at most %.3f ulp\n", worst);
    static const struct {
        float x, y;
    } exact[] = {{0, 1},     {-0.0f, 1},     {INFINITY, INFINITY}, {-INFINITY, 0},
                 {-104, 0},  {89, INFINITY}, {FLT_MAX, INFINITY},  {-FLT_MAX, 0},
                 {1e-45f, 1}};
    for (size_t i = 0; i < sizeof exact / sizeof *exact; i++) {
        float y;
        scalar->exp(1, &exact[i].x, &y);
        check(bits_of(y) == bits_of(exact[i].y), "exp(%a) = %a", exact[i].x, y);
    }

    enum { N = 1000 };
    static float x[N], w[N], b[N], y[N];
    for (int i = 0; i < N; i++) {
        x[i] = random_normal() * 3 + 1;
        w[i] = random_normal();
        b[i] = random_normal();
    }
    double mean = 0, var = 0, off = 0;
    for (int i = 0; i < N; i++) mean += x[i];
    mean /= N;
    for (int i = 0; i < N; i++) var += (x[i] - mean) * (x[i] - mean);
    var /= N;
    scalar->layer_norm(N, x, w, b, y);
    for (int i = 0; i < N; i++) { /* not fmax: as a reduction for Arm it crashes gcc 12 */
        double error = fabs(y[i] - ((x[i] - mean) / sqrt(var + 1e-5) * w[i] + b[i]));
        if (error > off) off = error;
    }
    check(off < 5e-6, "layer_norm is off by %g", off); /* values up to 10, some 10 roundings */
}

/* ---- Bench ---------------------------------------------------------------------------------- */

/* Seconds of processor time, so that other programs disturb less. */
static double now(void) {
    return (double)clock() / CLOCKS_PER_SEC;
}

/* Many matrices in turn, 256 MB together, so that no cache holds them. */
static void bench(const struct ggml_kernels * k, enum ggml_type type, size_t n) {
    enum { ROWS = 2048, COLS = 2048 };
    struct problem p = make_problem(type, ROWS, COLS, n, NORMAL_WEIGHTS, NORMAL_INPUT);
    size_t size = ggml_stripes_size(type, ROWS, COLS);
    if (size == 0) size = ROWS * ggml_row_size(type, COLS);
    size_t copies = ((size_t)256 << 20) / size + 1;
    uint8_t * data = allocate_aligned(copies * size);
    float * y = (float *)allocate(n * ROWS * sizeof *y);
    for (size_t i = 0; i < copies; i++) memcpy(data + i * size, p.w.data, size);
    double best = 1e9;
    double begin = now();
    for (int repetition = 0; repetition < 7 && now() - begin < 2; repetition++) {
        double start = now();
        for (size_t i = 0; i < copies; i++) {
            p.w.data = data + i * size;
            k->matmul[type](&p.w, &p.in, y, ROWS, 0, ROWS);
        }
        best = fmin(best, (now() - start) / (double)copies);
    }
    printf("%-7s %-9s N=%-3zu %10.0f ns  %7.2f GB/s  %7.1f GOP/s\n", k->isa,
           ggml_type_traits(type)->name, n, best * 1e9, (double)size / best * 1e-9,
           2.0 * ROWS * COLS * (double)n / best * 1e-9);
    fflush(stdout);
    free(data);
    free(y);
    free_problem(&p);
}

static void bench_pack(enum ggml_type type) {
    enum { ROWS = 2048, COLS = 2048 };
    struct problem p = make_problem(type, ROWS, COLS, 1, NORMAL_WEIGHTS, NORMAL_INPUT);
    double best = 1e9;
    for (int repetition = 0; repetition < 7; repetition++) {
        size_t bad;
        double start = now();
        ggml_pack_stripes(type, ROWS, COLS, p.file, p.stripes, 0, ROWS, &bad);
        best = fmin(best, now() - start);
    }
    printf("pack    %-9s %7.2f GB/s\n", ggml_type_traits(type)->name,
           (double)(ROWS * ggml_row_size(type, COLS)) / best * 1e-9);
    free_problem(&p);
}

static void bench_vectors(const struct ggml_kernels * k) {
    enum { N = 4096 };
    uint8_t * act = allocate_aligned(ggml_act_size(N));
    for (int op = -1;; op++) {
        double best = 1e9;
        const char * name = "quantize_act";
        for (int repetition = 0; repetition < 20 && name; repetition++) {
            enum { CALLS = 100 };
            float * v[VECTORS];
            make_vectors(N, NORMAL_INPUT, v);
            double start = now();
            for (int call = 0; call < CALLS && name; call++) {
                if (op < 0) {
                    k->quantize_act(GGML_A16, N, v[8], act);
                } else {
                    name = run_operation(k, op, N, v);
                }
            }
            best = fmin(best, (now() - start) / CALLS);
            for (int i = 0; i < VECTORS; i++) free(v[i]);
        }
        if (!name) break;
        printf("%-7s %-24s of %d: %6.0f ns\n", k->isa, name, N, best * 1e9);
    }
    free(act);
}

/* Of a model of 2048 channels, 64 of them at a time, as many tokens as a chunk has. */
static void bench_linear_attention(const struct ggml_kernels * k, size_t d) {
    enum { N = 2048, FEW = 64, TOKENS = 256 };
    float *q = random_vector(d, NORMAL_INPUT), *v = random_vector(N, NORMAL_INPUT);
    float *m = random_vector(d * N, NORMAL_INPUT), *y = random_vector(N, NORMAL_INPUT);
    double best = 1e9;
    for (int repetition = 0; repetition < 5; repetition++) {
        double start = now();
        for (size_t c = 0; c < N; c += FEW)
            for (size_t t = 0; t < TOKENS; t++)
                k->linear_attention(d, FEW, q, q, v + c, 1e-9f, m + c, N, y + c);
        best = fmin(best, (now() - start) / TOKENS);
    }
    printf("%-7s linear_attention of %4zu x %d: %7.0f ns a token\n", k->isa, d, N, best * 1e9);
    float * all[] = {q, v, m, y};
    for (int i = 0; i < 4; i++) free(all[i]);
}

/* All bytes are read, each once, whichever way. */
static void test_read(const struct ggml_kernels * k) {
    enum { N = 3 * 1024 };
    uint8_t data[N];
    uint64_t sum = 0;
    for (size_t i = 0; i < N; i++) data[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < N; i += 8) {
        uint64_t word;
        memcpy(&word, data + i, sizeof word);
        sum += word;
    }
    for (size_t streams = 1; streams <= 4; streams *= 2)
        for (size_t ahead = 0; ahead <= 1024; ahead += 1024)
            check(k->read(data, N, streams, ahead) == sum, "%s: read in %d streams", k->isa,
                  (int)streams);
}

int main(int argc, char ** argv) {
    bool benchmark = argc > 1 && strcmp(argv[1], "--bench") == 0;
    const char * only = argc > 2 ? argv[2] : NULL;
    const char * reason = NULL;
    scalar = ggml_kernels_select("scalar", &reason);
    check(ggml_kernels_select("sse9", &reason) == NULL && reason, "unknown levels are refused");
    printf("%s\n", ggml_cpu_features());
    if (!benchmark) {
        test_accuracy();
        test_bad_outlier();
        test_tiles_are_described();
        for (int t = 0; t < GGML_TYPE_COUNT; t++) test_exactness((enum ggml_type)t);
    }
    for (int t = 0; benchmark && t < GGML_TYPE_COUNT; t++)
        if (ggml_type_traits((enum ggml_type)t)->quantized) bench_pack((enum ggml_type)t);
    for (int i = 0; i < ISAS; i++) {
        const struct ggml_kernels * k = ggml_kernels_select(isas[i], &reason);
        if (!k) {
            printf("%s: skipped, %s\n", isas[i], reason);
            continue;
        }
        if (only && strcmp(only, isas[i]) != 0) continue;
        if (benchmark) {
            for (int t = 0; t < GGML_TYPE_COUNT; t++)
                for (size_t n = 1; n <= 16; n *= 4) bench(k, (enum ggml_type)t, n);
            bench_vectors(k);
            bench_linear_attention(k, 64);
            bench_linear_attention(k, 256);
            continue;
        }
        int before = passed + failed;
        test_matmuls(k);
        test_many_vectors(k);
        for (int t = 0; t < GGML_TYPE_COUNT; t++)
            if (ggml_columns_size((enum ggml_type)t, 1, 32) > 0) test_sparse(k, (enum ggml_type)t);
        test_sparse_minus_zero(k);
        test_large_float_matrices(k);
        test_low_ranks(k);
        test_vectors(k);
        test_linear_attention(k);
        test_quantize_act(k, GGML_A16);
        test_quantize_act(k, GGML_A8);
        test_bf16_act(k);
        test_underflow(k);
        test_read(k);
        printf("%s: %d checks\n", isas[i], passed + failed - before);
    }
    if (!benchmark && ggml_kernels_select("avx512bf16", &reason) &&
        !ggml_kernels_select("amx", &reason))
        test_emulated_amx();
    return benchmark ? 0 : finish();
}
