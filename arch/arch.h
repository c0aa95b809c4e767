/* arch/arch.h: what every architecture is given: weights, and tokens in chunks. */
#ifndef RWKV_ARCH_ARCH_H
#define RWKV_ARCH_ARCH_H

#include "ggml/ggml.h"
#include "rwkv.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rwkv {

/* Places in memory are multiples of 64 bytes. */
inline uint64_t aligned(uint64_t n) {
    return (n + 63) / 64 * 64;
}

/* A tensor in memory. A vector is FP32 and is used as floats. */
struct Weight : ggml_matrix {
    size_t number;      /* of the tensor in its model */
    size_t first_input; /* of a matrix: where its columns begin among those of all matrices */

    operator const float *() const { return (const float *)data; }
};

/* What an adapter changes in a tensor: the values of a vector, or a product beside a matrix. */
struct Change {
    const float * values = nullptr;
    ggml_low_rank product = {};
};

/* What is different for some sequences of a model. */
struct Adapter {
    std::vector<Change> changes; /* by the number of the tensor */
    size_t rank = 0;             /* the largest of all products */
};

/* What a tensor is used for. */
enum Kind {
    VECTOR,       /* always FP32 */
    FIRST_VECTOR, /* one that only the first layer needs */
    MATRIX,       /* any type; what quantizing is for */
    EMBEDDING,    /* rows are looked up; keeps its type when a file is quantized */
    HEAD,         /* a matrix that keeps its type unless asked */
};

constexpr size_t max_rows = 256; /* tokens that are evaluated in one pass over the weights */
constexpr size_t max_logit_rows = 32;

/* Vectors of one length, one per token, and their rounded form (ggml_make_act). */
struct Rows {
    float * x = nullptr;
    size_t n = 0;
    uint8_t * act = nullptr;
    size_t act_size = 0;
    float * narrow = nullptr; /* as A of adapters makes them of it, chunk.rank floats each */

    float * operator[](size_t t) const { return x + t * n; }
};

/* One sequence on its way through an evaluation. */
struct Run {
    rwkv_sequence sequence;
    const Adapter * adapter; /* or NULL */
    float * state;           /* in the context's memory, advanced chunk by chunk */
    float * hidden;  /* the head's inputs for the last tokens: for logits and hidden_out … */
    size_t n_hidden; /* … and for how many */
};

/* Rows of a chunk that are consecutive tokens of one sequence. */
struct Segment {
    const Run * run;
    size_t first, last; /* rows */
    size_t token;       /* of the first row: its place in the sequence */
};

struct Chunk {
    size_t n_rows = 0, n_segments = 0;
    size_t rank = 0; /* the largest of its adapters */
    Segment segments[max_rows];
    uint16_t segment_of[max_rows]; /* by row */
};

inline uint32_t token_at(const rwkv_sequence & s, size_t i) { /* s.tokens: may be misaligned */
    uint32_t token;
    std::memcpy(&token, (const char *)s.tokens + i * sizeof token, sizeof token);
    return token;
}

}  // namespace rwkv

#endif
