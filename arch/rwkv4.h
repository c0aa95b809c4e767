/* arch/rwkv4.h: RWKV-4 and RWKV-4a, which adds a tiny attention to one layer: their tensors, their
 * state, and a chunk of tokens on its way to logits. */
#ifndef RWKV_ARCH_RWKV4_H
#define RWKV_ARCH_RWKV4_H

#include "arch/arch.h"
#include "model_file.h"
#include "team.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rwkv {

/* ---- Tensors -------------------------------------------------------------------------------- */

struct Layer {
    Weight ln0_weight, ln0_bias; /* used in the first layer only */
    Weight ln1_weight, ln1_bias, ln2_weight, ln2_bias;
    Weight att_time_mix_k, att_time_mix_v, att_time_mix_r, att_time_first, att_time_decay;
    Weight att_key, att_value, att_receptance, att_output;
    Weight ffn_time_mix_k, ffn_time_mix_r;
    Weight ffn_key, ffn_value, ffn_receptance;
};

/* Of RWKV-4a, after one of the layers. */
struct TinyAttention {
    Weight ln_weight, ln_bias;
    Weight q, k, v;
};

struct Weights {
    Weight emb, ln_out_weight, ln_out_bias, head;
    TinyAttention tiny;
    std::vector<Layer> layers;
};

/* Reads a file's table of tensors and checks that they make a model: each tensor known, all there,
 * of the right shape and type. */
Index read_model_index(const InputFile & file);

/* The index of a file that does not exist: matrices in `type`, embedding and head in FP16 (or FP32
 * if that is the type). */
Index imagine_index(size_t n_vocab, size_t n_embed, size_t n_layer, ggml_type type);

/* Of a tensor of those: */
Kind kind_of(const Tensor & tensor);
bool is_vector(const Tensor & tensor);
bool meets_zeros(const Tensor & tensor); /* a matrix that is applied to relu(k)² */
bool is_needed(const Tensor & tensor);
Weight & weight_of(Weights & weights, const Tensor & tensor); /* weights.layers: there already */

/* ---- Evaluation ----------------------------------------------------------------------------- */

/* The state of a layer: n_embed floats of each, in this order. After the last layer follows, in
 * RWKV-4a, M of the tiny attention: n_tiny rows of n_embed floats, zero at first. */
enum StateVector {
    FFN_XX, /* input of channel mixing for the token before */
    ATT_XX, /* input of time mixing for the token before */
    AA,     /* sum of e^(k - pp)·v over the tokens so far, decaying */
    BB,     /* sum of e^(k - pp) */
    PP,     /* the largest exponent, kept apart so that neither sum overflows */
    STATE_VECTORS
};

size_t state_length(const Shape & shape);
void initial_state(const Shape & shape, float * state); /* state: may be misaligned */

struct Scratch {
    Rows x;          /* the residual stream */
    Rows xx;         /* its layer norm */
    Rows xk, xv, xr; /* xx mixed with that of the token before */
    Rows k, v, r;    /* what the matrices make of them */
    Rows y;          /* weighted average of values; output of a mixing */
    Rows ffn;        /* hidden layer of channel mixing */
    Rows tiny_q, tiny_k;
    float * tiny_m; /* columns of M */
    Rows logits;
    size_t rank; /* of the adapters that there is room for */
};

/* Divides memory at `base` among the vectors; NULL just counts. Returns the number of bytes. */
uint64_t lay_out(Scratch & scratch, const Shape & shape, size_t rank, uint8_t * base);

/* A chunk of tokens on its one pass over the weights. */
struct Pass {
    const Shape & shape;
    const Weights & weights;
    const ggml_kernels & kernels;
    ggml_activations activations;
    const Scratch & s;
    const Team & team;
    const Chunk & chunk;
    double * squares; /* of the inputs of all matrices, added up over the rows; NULL: not wanted */
};

/* The steps of a pass, in this order. */
void embed(const Pass & pass);
void evaluate_layer(const Pass & pass, size_t layer);
void keep_hidden(const Pass & pass); /* the last tokens' inputs of the head, where runs want them */

/* Logits of vectors that passes have kept, to s.logits; the chunk, of up to max_logit_rows, says
 * whose they are. */
void evaluate_head(const Pass & pass, float * hidden);

}  // namespace rwkv

#endif
