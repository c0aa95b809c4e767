/* ggml: matrices in many formats, one arithmetic.
 *
 * The door of this library: types, matrices, activations, the kernels of an instruction set, a
 * thread pool. What the kernels compute is defined to the bit in README.md. Nothing here prints,
 * exits or asserts; functions trust their arguments (rwkv.cpp validates) unless a comment says
 * otherwise. */
#ifndef GGML_H
#define GGML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Types ---------------------------------------------------------------------------------- */

/* One entry per block layout. Where both file versions have a format but pack it differently, the
 * plain name is version 101's and _V100 the older one. */
enum ggml_type {
    GGML_TYPE_FP32,
    GGML_TYPE_FP16,
    GGML_TYPE_Q4_0_V100,
    GGML_TYPE_Q4_1_V100,
    GGML_TYPE_Q4_1_O,
    GGML_TYPE_Q4_2,
    GGML_TYPE_Q4_3,
    GGML_TYPE_Q5_0_V100,
    GGML_TYPE_Q5_1_V100,
    GGML_TYPE_Q8_0_V100,
    GGML_TYPE_Q4_0,
    GGML_TYPE_Q4_1,
    GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1,
    GGML_TYPE_Q8_0,
    GGML_FILE_TYPES,                  /* so many are found in files; */
    GGML_TYPE_BF16 = GGML_FILE_TYPES, /* this one is what FP32 and FP16 can be made in memory */
    GGML_TYPE_COUNT
};

/* A quantized row is a whole number of these, whatever its blocks: activations are cut so. */
#define GGML_ROW_UNIT 32

struct ggml_type_info {
    const char * name;      /* "Q4_1_O": the format's name, the same in both versions */
    uint32_t file_id;       /* data_type in a file */
    uint32_t first_version; /* file versions that hold this layout, from … */
    uint32_t last_version;  /* … to */
    uint32_t block_size;    /* weights per block; 1 for FP32, FP16 and BF16 */
    uint32_t block_bytes;
    bool quantized;
};

const struct ggml_type_info * ggml_type_traits(enum ggml_type type);

/* The layout of data type `file_id` in a file of `version`, or GGML_TYPE_COUNT. */
enum ggml_type ggml_type_of_file(uint32_t version, uint32_t file_id);

/* Bytes of a row of n weights; n is at most 2^32 and, for quantized types, a multiple of
 * GGML_ROW_UNIT. */
size_t ggml_row_size(enum ggml_type type, size_t n);

/* The definition of each format of files (README.md, quantize.c). n as in ggml_row_size; the packed
 * row needs no alignment. Quantizing follows the rules of the layout's own time, byte for byte. */
void ggml_quantize_row(enum ggml_type type, const float * x, void * row, size_t n);
void ggml_dequantize_row(enum ggml_type type, const void * row, float * x, size_t n);

/* The same bytes' worth with less error: scales are searched (quantize_search.c). importances: how
 * much an error in each column counts, n finite numbers that are not negative, of which those of a
 * block are seen in proportion and as equal if all are zero; NULL: all are equal. */
void ggml_search_row(enum ggml_type type, const float * x, const float * importances, void * row,
                     size_t n);

/* A row of `from` as one of `to`. Between two layouts of one format the codes stay and the scales
 * are rounded; between formats the weights are dequantized and quantized. Returns false if a Q4_1_O
 * block has an outlier index that no writer makes; *bad_block is then its number in the row. */
bool ggml_convert_row(enum ggml_type from, const void * row, enum ggml_type to, void * out,
                      size_t n, size_t * bad_block);

/* ---- Matrices ------------------------------------------------------------------------------- */

#define GGML_STRIPE 16 /* rows that are interleaved in a stripe */

/* rows × cols weights, y = W·x. FP32 and FP16: rows as they lie in the file, at any address.
 * Quantized and BF16: stripes made by ggml_pack_stripes or ggml_pack_bf16, at a multiple of 64
 * bytes. */
struct ggml_matrix {
    enum ggml_type type;
    size_t rows;
    size_t cols;
    const void * data;
    const void * columns; /* the same weights made by ggml_pack_columns, at a multiple of 64 bytes;
                             NULL: there is no such copy */
};

/* Bytes of one stripe (a multiple of 64), and of the ceil(rows / 16) stripes of a matrix; 0: this
 * type has none. */
size_t ggml_stripe_size(enum ggml_type type, size_t cols);
size_t ggml_stripes_size(enum ggml_type type, size_t rows, size_t cols);

/* Repacks rows [first, last) of a matrix of `rows` rows; first is a multiple of 16, last too or
 * rows. `src` is the matrix's first row in the file, `dst` its first stripe. Rows past the end are
 * zero. Returns false if a Q4_1_O block has an outlier index that no writer makes (32..65534, or
 * 0xFFFF with a value that is not zero); *bad_block is then its number, counted through the matrix.
 */
bool ggml_pack_stripes(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last, size_t * bad_block);

/* The same from FP32 or FP16, `type`, to GGML_TYPE_BF16; nothing can be wrong. */
void ggml_pack_bf16(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                    size_t first, size_t last);

/* A copy by columns, from which a vector with many zeros is multiplied faster: the columns that
 * meet zeros are not read. FP32 and FP16 weights have to be finite. Bytes of the copy; 0: not for
 * this type. */
size_t ggml_columns_size(enum ggml_type type, size_t rows, size_t cols);

/* Copies rows [first, last) of a matrix of `rows` rows; first is a multiple of 32, last too or
 * rows. `src` is row `first`, `dst` the whole copy. */
void ggml_pack_columns(enum ggml_type type, size_t rows, size_t cols, const void * src, void * dst,
                       size_t first, size_t last);

/* A low-rank product beside a matrix of rows × cols: y = W·x + B·(A·x). */
struct ggml_low_rank {
    size_t rank;     /* 0: there is none */
    size_t cols;     /* of A, which has `rank` rows */
    const float * a; /* row after row */
    const float * b; /* B, rows × rank, made by ggml_pack_low_rank, at a multiple of 64 bytes */
};

/* Bytes that B takes, a multiple of 64. */
size_t ggml_low_rank_size(size_t rows, size_t rank);

/* Puts n columns of B, rows × n weights row after row, times `scale`, into their place among `rank`
 * columns, from column `first` on. What dst holds elsewhere has to be zero or packed already. */
void ggml_pack_low_rank(size_t rows, size_t rank, const void * src, size_t first, size_t n,
                        float scale, float * dst);

/* ---- Kernels -------------------------------------------------------------------------------- */

/* How finely a vector that meets a quantized matrix is rounded: to 14 bits or 7, and a sign. */
enum ggml_activations { GGML_A16, GGML_A8 };

/* n vectors that matrices are applied to. */
struct ggml_input {
    const float * x; /* vector t at x + t * ldx */
    size_t ldx;
    const uint8_t * act; /* as ggml_make_act leaves them, vector t at act + t * ggml_act_size(cols);
                            may be NULL where only FP32 and FP16 matrices are applied */
    enum ggml_activations activations; /* of quantized matrices */
    size_t n;
};

/* Bytes of the rounded form of a vector of cols floats (a multiple of 64). */
size_t ggml_act_size(size_t cols);

/* Everything that is done fast, once per instruction set. Vectors have any length and alignment
 * (act: 32 bytes); an output may be the very same vector as an input, otherwise they do not
 * overlap. */
struct ggml_kernels {
    const char * isa; /* "scalar", "avx2", … */
    uint32_t needs;   /* CPU features (cpu.h) that it was compiled for */

    /* act := x cut into blocks of 32 and rounded, as quantized matrices take it, n being a multiple
     * of GGML_ROW_UNIT; or as BF16 ones do: the last block is filled up with zeros */
    void (*quantize_act)(enum ggml_activations activations, size_t n, const float * x,
                         uint8_t * act);
    void (*bf16_act)(size_t n, const float * x, uint8_t * act);

    /* y[t * ldy + r] = W[r]·x[t] for rows r in [first, last); first is a multiple of 16, and last
     * too or W's number of rows. One entry per type. */
    void (*matmul[GGML_TYPE_COUNT])(const struct ggml_matrix * w, const struct ggml_input * in,
                                    float * y, size_t ldy, size_t first, size_t last);

    /* y[r] = W[r]·x[0] in the same way, from W's columns where x is not zero; but where that is -0,
     * all columns may be needed to tell. first is a multiple of 64, and last too or W's number of
     * rows. NULL where ggml_columns_size is 0. */
    void (*sparse[GGML_TYPE_COUNT])(const struct ggml_matrix * w, const struct ggml_input * in,
                                    float * y, size_t first, size_t last);

    /* y[t * ldy + r] += B[r]·h[t] for rows r in [first, last), in the same way; h is an input of
     * vectors of `rank` floats: those that ggml_narrow makes. */
    void (*add_low_rank)(const struct ggml_low_rank * w, const struct ggml_input * h, float * y,
                         size_t ldy, size_t first, size_t last);

    void (*layer_norm)(size_t n, const float * x, const float * w, const float * b, float * y);
    void (*lerp)(size_t n, const float * x, const float * prev, const float * mix, float * y);
    void (*exp)(size_t n, const float * x, float * y);
    /* y = max(x, 0)²;  y += x;  y = σ(r)·x;  y += σ(r)·x */
    void (*relu2)(size_t n, const float * x, float * y);
    void (*add)(size_t n, const float * x, float * y);
    void (*sigmoid_mul)(size_t n, const float * r, const float * x, float * y);
    void (*sigmoid_mul_add)(size_t n, const float * r, const float * x, float * y);

    /* One step of RWKV-4's recurrence over n channels: u = time_first, w = time_decay; aa, bb, pp
     * are advanced in place, y is the weighted average. */
    void (*wkv)(size_t n, const float * u, const float * w, const float * k, const float * v,
                float * aa, float * bb, float * pp, float * y);

    /* M += k ⊗ v;  y += (qᵀM)·scale, for n columns of M, which has d rows: row i at m + i * ldm.
     * The vectors q and k have d elements, v and y have n. */
    void (*linear_attention)(size_t d, size_t n, const float * q, const float * k, const float * v,
                             float scale, float * m, size_t ldm, float * y);

    /* Work for ggml_measure; what they return only keeps compilers from leaving it out. read: sums
     * up n bytes at `streams` (1, 2 or 4) places side by side, prefetching `ahead` bytes if that is
     * not 0; n is a multiple of 1024. fma, dot: n multiply-adds in registers, of floats and of
     * int8 into int32; n is a multiple of 1024 * 12. */
    uint64_t (*read)(const uint8_t * data, size_t n, size_t streams, size_t ahead);
    float (*fma)(size_t n);
    int32_t (*dot)(size_t n);
};

/* The strongest level this CPU and its operating system allow, or the one called `isa` if that is
 * not NULL. NULL if there is no such level here; *reason (static text) then says why. */
const struct ggml_kernels * ggml_kernels_select(const char * isa, const char ** reason);

/* Rounds elements [first, last) of x as matrices of this type take them, into their place in act,
 * ggml_act_size(cols) bytes at a multiple of 64; nothing for FP32 and FP16. first is a multiple of
 * GGML_ROW_UNIT, last too or cols. */
void ggml_make_act(const struct ggml_kernels * kernels, enum ggml_type type,
                   enum ggml_activations activations, const float * x, size_t first, size_t last,
                   uint8_t * act);

/* What kernels->matmul is for; skips columns where the matrix and the input allow it. first and
 * last as there or, if the matrix has a copy by columns, as ggml_row_unit makes them. */
void ggml_multiply(const struct ggml_kernels * kernels, const struct ggml_matrix * w,
                   const struct ggml_input * in, float * y, size_t ldy, size_t first, size_t last);

/* y[t * ldy + i] = A[i]·x[t] for any rows i in [first, last) of a low-rank product. */
void ggml_narrow(const struct ggml_kernels * kernels, const struct ggml_low_rank * w,
                 const struct ggml_input * in, float * y, size_t ldy, size_t first, size_t last);

/* Of how many rows the parts should be that n_threads multiply a matrix with n vectors in. */
size_t ggml_row_unit(const struct ggml_matrix * w, size_t n, size_t n_threads);

/* "AVX=1 AVX2=1 …": what this CPU offers, static text. */
const char * ggml_cpu_features(void);

/* ---- Threads -------------------------------------------------------------------------------- */

struct ggml_pool;

/* Physical cores this process may use: affinity mask and cgroup quota respected; at least 1. */
unsigned ggml_default_threads(void);

/* A pool starts its threads when they are first needed and keeps them. NULL if out of memory. */
struct ggml_pool * ggml_pool_create(void);
void ggml_pool_free(struct ggml_pool * pool); /* NULL is fine; waits for its threads */

/* An evaluation takes the pool whole; others wait here. Returns how many threads will work, the
 * caller included: n_threads, or fewer if the system refuses to start them. After a fork the
 * child's first call starts threads of its own. */
unsigned ggml_pool_acquire(struct ggml_pool * pool, unsigned n_threads);
void ggml_pool_release(struct ggml_pool * pool);

/* The same, but 0 if another one still has the pool after so many milliseconds. */
unsigned ggml_pool_try_acquire(struct ggml_pool * pool, unsigned n_threads, unsigned patience);

/* Calls work(arg, first, last) for pieces of [0, n), each a multiple of `unit` long (the last may
 * be shorter), until all are done, on the caller and on the threads it has acquired; without any,
 * or with pool NULL, the caller does everything. Threads run with the default floating-point
 * environment. */
typedef void ggml_work(void * arg, size_t first, size_t last);
void ggml_pool_run(struct ggml_pool * pool, ggml_work * work, void * arg, size_t n, size_t unit);

/* ---- Limits --------------------------------------------------------------------------------- */

/* What kernels could reach at most, per second: bytes read, operations (two per multiply-add). */
struct ggml_limits {
    double read;
    double fp32;
    double int8;
};

/* Measures the limits of `kernels` with n_threads threads, reading a buffer of about n_bytes again
 * and again; the best of several ways of reading counts. Returns false if out of memory. */
bool ggml_measure(const struct ggml_kernels * kernels, unsigned n_threads, uint64_t n_bytes,
                  struct ggml_limits * limits);

/* ---- Floating-point environment ------------------------------------------------------------- */

/* Rounds to nearest and keeps denormals until ggml_fp_leave(what enter returned). */
uint64_t ggml_fp_enter(void);
void ggml_fp_leave(uint64_t saved);

#ifdef __cplusplus
}
#endif

#endif
