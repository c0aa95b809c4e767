#include "arch/rwkv4.h"

#include "rwkv_error.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>

namespace rwkv {

// ---- Tensors ------------------------------------------------------------------------------------

// A dimension, by the member of Shape that says how long it is.
using Dim = size_t Shape::*;
constexpr Dim VOCAB = &Shape::n_vocab, EMBED = &Shape::n_embed, FFN = &Shape::n_ffn,
              TINY = &Shape::n_tiny;

struct Slot {
    const char * name;                     // of a layer's tensor: what follows "blocks.N."
    Weight Weights::* of_model = nullptr;  // where it goes: one of these three
    Weight Layer::* of_layer = nullptr;
    Weight TinyAttention::* of_tiny = nullptr;
    Kind kind;
    Dim rows, cols;  // a vector has cols only

    constexpr Slot(const char * n, Weight Weights::* to, Kind k = VECTOR, Dim r = nullptr)
        : name(n), of_model(to), kind(k), rows(r), cols(EMBED) {}
    constexpr Slot(const char * n, Weight Layer::* to, Kind k = VECTOR, Dim r = nullptr,
                   Dim c = EMBED)
        : name(n), of_layer(to), kind(k), rows(r), cols(c) {}
    constexpr Slot(const char * n, Weight TinyAttention::* to, Kind k = VECTOR, Dim r = nullptr)
        : name(n), of_tiny(to), kind(k), rows(r), cols(EMBED) {}
};

// THE table of tensors: loading, checking, messages and quantizing all go by it.
const Slot slots[] = {
    {"emb.weight", &Weights::emb, EMBEDDING, VOCAB},
    {"ln0.weight", &Layer::ln0_weight, FIRST_VECTOR},
    {"ln0.bias", &Layer::ln0_bias, FIRST_VECTOR},
    {"ln1.weight", &Layer::ln1_weight},
    {"ln1.bias", &Layer::ln1_bias},
    {"ln2.weight", &Layer::ln2_weight},
    {"ln2.bias", &Layer::ln2_bias},
    {"att.time_mix_k", &Layer::att_time_mix_k},
    {"att.time_mix_v", &Layer::att_time_mix_v},
    {"att.time_mix_r", &Layer::att_time_mix_r},
    {"att.time_first", &Layer::att_time_first},
    {"att.time_decay", &Layer::att_time_decay},
    {"att.key.weight", &Layer::att_key, MATRIX, EMBED},
    {"att.value.weight", &Layer::att_value, MATRIX, EMBED},
    {"att.receptance.weight", &Layer::att_receptance, MATRIX, EMBED},
    {"att.output.weight", &Layer::att_output, MATRIX, EMBED},
    {"ffn.time_mix_k", &Layer::ffn_time_mix_k},
    {"ffn.time_mix_r", &Layer::ffn_time_mix_r},
    {"ffn.key.weight", &Layer::ffn_key, MATRIX, FFN},
    {"ffn.value.weight", &Layer::ffn_value, MATRIX, EMBED, FFN},
    {"ffn.receptance.weight", &Layer::ffn_receptance, MATRIX, EMBED},
    {"tiny_ln.weight", &TinyAttention::ln_weight},
    {"tiny_ln.bias", &TinyAttention::ln_bias},
    {"tiny_q.weight", &TinyAttention::q, MATRIX, TINY},
    {"tiny_k.weight", &TinyAttention::k, MATRIX, TINY},
    {"tiny_v.weight", &TinyAttention::v, MATRIX, EMBED},
    {"ln_out.weight", &Weights::ln_out_weight},
    {"ln_out.bias", &Weights::ln_out_bias},
    {"head.weight", &Weights::head, HEAD, VOCAB},
};

Kind kind_of(const Tensor & tensor) {
    return tensor.slot->kind;
}

bool is_vector(const Tensor & tensor) {
    return tensor.slot->rows == nullptr;
}

bool meets_zeros(const Tensor & tensor) {
    return tensor.slot->cols == FFN;
}

bool is_needed(const Tensor & tensor) {
    return tensor.slot->kind != FIRST_VECTOR || tensor.layer == 0;
}

Weight & weight_of(Weights & weights, const Tensor & tensor) {
    const Slot & slot = *tensor.slot;
    if (slot.of_model != nullptr) return weights.*slot.of_model;
    if (slot.of_tiny != nullptr) return weights.tiny.*slot.of_tiny;
    return weights.layers[tensor.layer].*slot.of_layer;
}

static std::string tensor_name(const Slot & slot, size_t layer) {
    return slot.of_model != nullptr ? slot.name : text("blocks.%zu.%s", layer, slot.name);
}

// Finds what a tensor is for by its name; false: a model of this kind has no such tensor.
static bool find_slot(Tensor & tensor) {
    size_t skip = 0;
    unsigned layer = 0;
    int length = 0;
    if (std::sscanf(tensor.name.c_str(), "blocks.%9u.%n", &layer, &length) == 1 && length > 0) {
        skip = (size_t)length;
    }
    for (const Slot & slot : slots) {
        if ((slot.of_model != nullptr) != (skip == 0)) continue;
        if (tensor.name.compare(skip, std::string::npos, slot.name) != 0) continue;
        tensor.slot = &slot;
        tensor.layer = layer;
        return tensor_name(slot, layer) == tensor.name;  // "blocks.07." is not "blocks.7."
    }
    return false;
}

// Calls f(slot, layer) for each tensor that a model must have.
template <class F> static void each_needed(const Shape & shape, F f) {
    for (const Slot & slot : slots) {
        const bool once = slot.of_model != nullptr || slot.kind == FIRST_VECTOR;
        for (size_t layer = 0; layer < (once ? 1 : shape.n_layer); layer++) {
            if (slot.of_tiny == nullptr || layer == shape.tiny_layer) f(slot, layer);
        }
    }
}

// What a model with a tensor that RWKV-4 does not know seems to be.
static const char * guess_architecture(Index & index) {
    // A later architecture has the tensors of earlier ones too, so it comes first.
    static const struct {
        const char * part;
        const char * architecture;
    } signs[] = {
        {".lora_", "an RWKV-4 LoRA; merge it into its model first"},
        {"ffn.s_emb", "RWKV-7 with DeepEmbed, which is not supported"},
        {"att.r_k", "RWKV-7, which is not supported yet"},
        {"att.x_", "RWKV-7, which is not supported yet"},
        {"time_maa", "RWKV-6, which is not supported yet"},
        {"time_faaaa", "RWKV-5.2, which is not supported yet"},
        {"att.gate", "RWKV-5.2, which is not supported yet"},
        {"att.ln_x", "RWKV-5, which is not supported yet"},
        {"tiny_mask", "RWKV-4a with a mask that only training uses; convert its checkpoint again"},
        {"att.qq", "RWKV-4 with a softmax attention in each layer, which is not supported"},
        {"pos_emb", "RWKV-4 with positional embeddings, which are not supported"},
        {"ffnPre",
         "RWKV-4 with a feed-forward layer in place of attention, which is not supported"},
        {".time_mix", "RWKV-2, which is not supported"},
        {".time_w", "RWKV-1, which is not supported"},
        {"head_", "RWKV-4 (or RWKV-2 or 3) with head_qk, which is not supported"},
    };
    for (const auto & sign : signs) {
        for (Tensor & tensor : index.tensors) {
            if (tensor.name.find(sign.part) == std::string::npos) continue;
            if (!find_slot(tensor)) return sign.architecture;
        }
    }
    return "of an unknown architecture";
}

static std::string dims_text(const std::vector<size_t> & dims) {
    std::string result;
    for (const size_t n : dims) result += (result.empty() ? "" : " x ") + std::to_string(n);
    return result;
}

static std::vector<size_t> expected_dims(const Slot & slot, const Shape & shape) {
    if (slot.rows == nullptr) return {shape.*slot.cols};
    return {shape.*slot.rows, shape.*slot.cols};
}

// Takes what the header does not say from a tensor, and checks it.
static void learn_shape(const Index & index, const Tensor & tensor, Shape & shape) {
    const char * path = index.path.c_str();
    const char * name = tensor.name.c_str();
    const Slot & slot = *tensor.slot;
    const auto rows = [&](size_t limit) {
        return check_dimension(RWKV_ERROR_MODEL_PARAMS, index.path, name, tensor.dims[0], limit);
    };
    if (slot.rows == FFN && tensor.layer == 0) shape.n_ffn = rows(max_ffn);
    if (slot.rows == TINY) shape.n_tiny = rows(max_tiny);
    if (slot.of_tiny == nullptr || tensor.layer == shape.tiny_layer) return;
    if (shape.tiny_layer < shape.n_layer) {
        fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_UNSUPPORTED,
             "%s: unexpected tensor '%s': layer %zu has a tiny attention already, expected one in "
             "RWKV-4a",
             path, name, shape.tiny_layer);
    }
    shape.tiny_layer = tensor.layer;
}

// Sets what read_index leaves open, and checks that this is a model.
static void check_tensors(Index & index) {
    Shape & shape = index.shape;
    shape.tiny_layer = shape.n_layer;
    const char * path = index.path.c_str();
    for (Tensor & tensor : index.tensors) {
        const char * name = tensor.name.c_str();
        if (!find_slot(tensor)) {
            fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_UNSUPPORTED,
                 "%s: unknown tensor '%s': the model seems to be %s", path, name,
                 guess_architecture(index));
        }
        if (tensor.layer >= shape.n_layer) {
            fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_KEY,
                 "%s: unexpected tensor '%s': n_layer is %zu, says the header", path, name,
                 shape.n_layer);
        }
        learn_shape(index, tensor, shape);
    }
    each_needed(shape, [&](const Slot & slot, size_t layer) {
        const std::string name = tensor_name(slot, layer);
        if (index.names.count(name) != 0) return;
        fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_PARAM_MISSING,
             "%s: tensor '%s' is missing: found %zu tensors, n_layer is %zu (truncated download?)",
             path, name.c_str(), index.tensors.size(), shape.n_layer);
    });
    for (const Tensor & tensor : index.tensors) {
        const std::vector<size_t> expected = expected_dims(*tensor.slot, shape);
        if (tensor.dims != expected) {
            fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_SHAPE,
                 "%s: tensor '%s': expected shape %s, file has %s", path, tensor.name.c_str(),
                 dims_text(expected).c_str(), dims_text(tensor.dims).c_str());
        }
        if (is_vector(tensor) && tensor.type != GGML_TYPE_FP32) {
            fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_DATA_TYPE,
                 "%s: tensor '%s': expected FP32 as for all vectors, file has %s", path,
                 tensor.name.c_str(), type_name(tensor.type));
        }
    }
}

Index read_model_index(const InputFile & file) {
    Index index = read_index(file);
    check_tensors(index);
    return index;
}

Index imagine_index(size_t n_vocab, size_t n_embed, size_t n_layer, ggml_type type) {
    const std::string where = "a model of this shape";
    check_dimension(RWKV_ERROR_ARGS, where, "n_vocab", n_vocab, max_vocab);
    check_dimension(RWKV_ERROR_ARGS, where, "n_embed", n_embed, max_embed);
    check_dimension(RWKV_ERROR_ARGS, where, "n_layer", n_layer, max_layers);
    check_row(RWKV_ERROR_ARGS, where, n_embed, type);
    const Shape shape = {n_vocab, n_embed, n_layer, 4 * n_embed, 0, n_layer};
    Index index;
    index.path = where;
    index.size = header_size;
    index.shape = shape;
    each_needed(shape, [&](const Slot & slot, size_t layer) {
        Tensor tensor = {tensor_name(slot, layer),
                         GGML_TYPE_FP32,
                         expected_dims(slot, shape),
                         1,
                         shape.*slot.cols,
                         0,
                         0,
                         &slot,
                         layer};
        if (!is_vector(tensor)) {
            tensor.rows = shape.*slot.rows;
            const bool table = slot.kind != MATRIX && type != GGML_TYPE_FP32;
            tensor.type = table ? GGML_TYPE_FP16 : type;
        }
        tensor.size = tensor.rows * (uint64_t)ggml_row_size(tensor.type, tensor.cols);
        index.size += record_size(tensor) + tensor.size;
        index.tensors.push_back(std::move(tensor));
    });
    return index;
}

// ---- Evaluation ---------------------------------------------------------------------------------

static size_t length_of_layers(const Shape & shape) {
    return STATE_VECTORS * shape.n_embed * shape.n_layer;
}

size_t state_length(const Shape & shape) {
    return length_of_layers(shape) + shape.n_tiny * shape.n_embed;
}

void initial_state(const Shape & shape, float * state) {
    for (size_t i = 0; i < state_length(shape); i++) {
        const bool pp = i < length_of_layers(shape) && i / shape.n_embed % STATE_VECTORS == PP;
        const float value = pp ? -1e30f : 0.0f;
        std::memcpy((char *)state + i * sizeof value, &value, sizeof value);
    }
}

uint64_t lay_out(Scratch & s, const Shape & shape, size_t rank, uint8_t * base) {
    uint64_t used = 0;
    s.rank = rank;
    const auto take = [&](uint64_t n) {
        uint8_t * p = base == nullptr ? nullptr : base + used;
        used += aligned(n);
        return p;
    };
    const auto rows = [&](Rows & r, size_t count, size_t n, bool input) {
        r.n = n;
        r.x = (float *)take(count * (uint64_t)n * sizeof(float));
        r.act_size = input ? ggml_act_size(n) : 0;
        r.act = take(count * (uint64_t)r.act_size);
        r.narrow = (float *)take(input ? count * (uint64_t)rank * sizeof(float) : 0);
    };
    for (Rows * r : {&s.xk, &s.xv, &s.xr, &s.y}) rows(*r, max_rows, shape.n_embed, true);
    for (Rows * r : {&s.x, &s.xx, &s.k, &s.v, &s.r}) rows(*r, max_rows, shape.n_embed, false);
    rows(s.ffn, max_rows, shape.n_ffn, true);
    for (Rows * r : {&s.tiny_q, &s.tiny_k}) rows(*r, max_rows, shape.n_tiny, false);
    s.tiny_m = (float *)take(shape.n_tiny * (uint64_t)shape.n_embed * sizeof(float));
    rows(s.logits, max_logit_rows, shape.n_vocab, false);
    return used;
}

namespace {

constexpr size_t padded(size_t n) {
    return (n + GGML_ROW_UNIT - 1) / GGML_ROW_UNIT * GGML_ROW_UNIT;
}

struct Forward : Pass {
    const size_t n = shape.n_embed;

    // Calls f(t) for each row of the chunk.
    template <class F> void each_row(F f) const {
        team.run(chunk.n_rows, 1, [&](size_t first, size_t last) {
            for (size_t t = first; t < last; t++) f(t);
        });
    }

    const Segment & segment(size_t t) const { return chunk.segments[chunk.segment_of[t]]; }

    float * state(const Segment & segment, size_t layer, StateVector v) const {
        return segment.run->state + (layer * STATE_VECTORS + v) * n;
    }

    // Calls f(first, last) for pieces of [0, count) that start where activations' blocks do.
    template <class F> void each_piece(size_t count, F f) const {
        team.run(count, GGML_ROW_UNIT, f);
    }

    // Rounds elements [first, last) of a row as w takes them.
    void prepare(const Weight & w, const Rows & in, size_t t, size_t first, size_t last) const {
        ggml_make_act(&kernels, w.type, activations, in[t], first, last, in.act + t * in.act_size);
    }

    // What the adapter of a segment changes in w.
    const Change & change(const Segment & segment, const Weight & w) const {
        static const Change none;
        const Adapter * adapter = segment.run->adapter;
        return adapter == nullptr ? none : adapter->changes[w.number];
    }

    // A vector as the sequence of a segment has it.
    const float * vector(const Segment & segment, const Weight & w) const {
        const float * values = change(segment, w).values;
        return values != nullptr ? values : w;
    }

    void layer_norm(size_t t, const Weight & w, const Weight & b, float * out) const {
        const Segment & in = segment(t);
        kernels.layer_norm(n, s.x[t], vector(in, w), vector(in, b), out);
    }

    struct Meeting {
        const Weight & w;
        const Rows & in;
    };

    // What the products of adapters, beside each w, need of the whole of its input.
    void narrow(std::initializer_list<Meeting> meetings) const {
        const size_t unit = 8, parts = (chunk.rank + unit - 1) / unit;
        team.run(meetings.size() * chunk.n_segments * parts, 1, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; i++) {
                const Meeting & meeting = meetings.begin()[i / parts / chunk.n_segments];
                const Segment & segment = chunk.segments[i / parts % chunk.n_segments];
                const ggml_low_rank & product = change(segment, meeting.w).product;
                const size_t first = i % parts * unit, last = std::min(first + unit, product.rank);
                if (first >= last) continue;
                const Rows & in = meeting.in;
                const ggml_input input = {in[segment.first], in.n, nullptr, activations,
                                          segment.last - segment.first};
                ggml_narrow(&kernels, &product, &input, in.narrow + segment.first * chunk.rank,
                            chunk.rank, first, last);
            }
        });
    }

    // out = w·in, elements [first, last) of each row; narrow({{w, in}}) comes before.
    void multiply(const Weight & w, const Rows & in, const Rows & out, size_t first,
                  size_t last) const {
        const ggml_input input = {in.x, in.n, in.act, activations, chunk.n_rows};
        if (squares != nullptr && first == 0) add_squares(w, in);
        ggml_multiply(&kernels, &w, &input, out.x, out.n, first, last);
        if (chunk.rank == 0) return;
        for (size_t i = 0; i < chunk.n_segments; i++) {
            const Segment & segment = chunk.segments[i];
            const ggml_low_rank & product = change(segment, w).product;
            const ggml_input narrow = {in.narrow + segment.first * chunk.rank, chunk.rank, nullptr,
                                       activations, segment.last - segment.first};
            if (product.rank > 0) {
                kernels.add_low_rank(&product, &narrow, out[segment.first], out.n, first, last);
            }
        }
    }

    // One thread does this for a matrix, row after row: the sums are always the same.
    void add_squares(const Weight & w, const Rows & in) const {
        double * sums = squares + w.first_input;
        for (size_t t = 0; t < chunk.n_rows; t++) {
            for (size_t k = 0; k < w.cols; k++) sums[k] += (double)in[t][k] * in[t][k];
        }
    }

    // Mixes xx with that of the token before, as input of w.
    void shift(size_t t, size_t layer, StateVector carried, const Weight & mix, const Weight & w,
               const Rows & out) const {
        const Segment & in = segment(t);
        const float * before = t > in.first ? s.xx[t - 1] : state(in, layer, carried);
        kernels.lerp(n, s.xx[t], before, vector(in, mix), out[t]);
        prepare(w, out, t, 0, n);
    }

    // Keeps xx of the last token for the next one.
    void carry(size_t layer, StateVector carried) const {
        for (size_t i = 0; i < chunk.n_segments; i++) {
            const Segment & segment = chunk.segments[i];
            float * to = state(segment, layer, carried);
            std::memcpy(to, s.xx[segment.last - 1], n * sizeof(float));
        }
    }

    void look_up(size_t t, float * embedding) const {
        const Weight & emb = weights.emb;
        const Segment & in = segment(t);
        const uint32_t token = token_at(in.run->sequence, in.token + t - in.first);
        const uint8_t * row = (const uint8_t *)emb.data + token * ggml_row_size(emb.type, n);
        ggml_dequantize_row(emb.type, row, embedding, n);
    }

    void embed() const {
        const Layer & l = weights.layers[0];
        each_row([&](size_t t) {
            look_up(t, s.x[t]);
            layer_norm(t, l.ln0_weight, l.ln0_bias, s.x[t]);
        });
    }

    // x += O·(σ(r)·wkv)
    void time_mixing(size_t layer) const {
        const Layer & l = weights.layers[layer];
        each_row([&](size_t t) { layer_norm(t, l.ln1_weight, l.ln1_bias, s.xx[t]); });
        each_row([&](size_t t) {
            shift(t, layer, ATT_XX, l.att_time_mix_k, l.att_key, s.xk);
            shift(t, layer, ATT_XX, l.att_time_mix_v, l.att_value, s.xv);
            shift(t, layer, ATT_XX, l.att_time_mix_r, l.att_receptance, s.xr);
        });
        carry(layer, ATT_XX);
        narrow({{l.att_key, s.xk}, {l.att_value, s.xv}, {l.att_receptance, s.xr}});
        each_piece(n, [&](size_t first, size_t last) {
            multiply(l.att_key, s.xk, s.k, first, last);
            multiply(l.att_value, s.xv, s.v, first, last);
            multiply(l.att_receptance, s.xr, s.r, first, last);
            average(layer, first, last);
            for (size_t t = 0; t < chunk.n_rows; t++) prepare(l.att_output, s.y, t, first, last);
        });
        narrow({{l.att_output, s.y}});
        each_piece(n, [&](size_t first, size_t last) {
            multiply(l.att_output, s.y, s.v, first, last);
            for (size_t t = 0; t < chunk.n_rows; t++) {
                kernels.add(last - first, s.v[t] + first, s.x[t] + first);
            }
        });
    }

    // y = σ(r)·wkv for some channels: token after token, the sum over all before it.
    void average(size_t layer, size_t first, size_t last) const {
        const Layer & l = weights.layers[layer];
        for (size_t i = 0; i < chunk.n_segments; i++) {
            const Segment & segment = chunk.segments[i];
            float * aa = state(segment, layer, AA) + first;
            float * bb = state(segment, layer, BB) + first;
            float * pp = state(segment, layer, PP) + first;
            const float * u = vector(segment, l.att_time_first) + first;
            const float * w = vector(segment, l.att_time_decay) + first;
            for (size_t t = segment.first; t < segment.last; t++) {
                float * y = s.y[t] + first;
                kernels.wkv(last - first, u, w, s.k[t] + first, s.v[t] + first, aa, bb, pp, y);
                kernels.sigmoid_mul(last - first, s.r[t] + first, y, y);
            }
        }
    }

    // x += σ(r)·(V·relu(k)²)
    void channel_mixing(size_t layer) const {
        const Layer & l = weights.layers[layer];
        each_row([&](size_t t) { layer_norm(t, l.ln2_weight, l.ln2_bias, s.xx[t]); });
        each_row([&](size_t t) {
            shift(t, layer, FFN_XX, l.ffn_time_mix_k, l.ffn_key, s.xk);
            shift(t, layer, FFN_XX, l.ffn_time_mix_r, l.ffn_receptance, s.xr);
        });
        carry(layer, FFN_XX);
        narrow({{l.ffn_key, s.xk}, {l.ffn_receptance, s.xr}});
        const size_t n_ffn = shape.n_ffn, keys = padded(n_ffn);
        each_piece(keys + n, [&](size_t first, size_t last) {
            if (first < n_ffn) hidden(l, first, std::min(last, n_ffn));
            if (last > keys) {
                multiply(l.ffn_receptance, s.xr, s.r, std::max(first, keys) - keys, last - keys);
            }
        });
        narrow({{l.ffn_value, s.ffn}});
        const size_t unit = ggml_row_unit(&l.ffn_value, chunk.n_rows, team.size());
        team.run(n, unit, [&](size_t first, size_t last) {
            multiply(l.ffn_value, s.ffn, s.v, first, last);
            for (size_t t = 0; t < chunk.n_rows; t++) {
                kernels.sigmoid_mul_add(last - first, s.r[t] + first, s.v[t] + first,
                                        s.x[t] + first);
            }
        });
    }

    // relu(k)² for some k
    void hidden(const Layer & l, size_t first, size_t last) const {
        multiply(l.ffn_key, s.xk, s.ffn, first, last);
        for (size_t t = 0; t < chunk.n_rows; t++) {
            float * k = s.ffn[t] + first;
            kernels.relu2(last - first, k, k);
            prepare(l.ffn_value, s.ffn, t, first, last);
        }
    }

    // x += qᵀM / √n_tiny with M += k ⊗ v: attention to all tokens so far, without a softmax.
    void tiny_attention() const {
        const TinyAttention & l = weights.tiny;
        each_row([&](size_t t) {
            layer_norm(t, l.ln_weight, l.ln_bias, s.xr[t]);
            std::memcpy(s.xk[t], s.xr[t], n * sizeof(float));  // their types may differ
            look_up(t, s.xv[t]);
            prepare(l.q, s.xr, t, 0, n);
            prepare(l.k, s.xk, t, 0, n);
            prepare(l.v, s.xv, t, 0, n);
        });
        narrow({{l.q, s.xr}, {l.k, s.xk}, {l.v, s.xv}});
        each_piece(shape.n_tiny, [&](size_t first, size_t last) {
            multiply(l.q, s.xr, s.tiny_q, first, last);
            multiply(l.k, s.xk, s.tiny_k, first, last);
        });
        each_piece(n, [&](size_t first, size_t last) {
            multiply(l.v, s.xv, s.v, first, last);
            for (size_t i = 0; i < chunk.n_segments; i++) {
                attend(chunk.segments[i], first, last);
            }
        });
    }

    // The recurrence for some channels, few at a time: their columns of M are brought together,
    // since rows of M that are a power of two apart would meet in one place of the cache.
    void attend(const Segment & segment, size_t first, size_t last) const {
        constexpr size_t few = 2 * GGML_ROW_UNIT;
        const size_t d = shape.n_tiny;
        const float scale = 1 / std::sqrt((float)d);
        float * part = s.tiny_m + first * d;
        for (size_t c = first; c < last; c += few) {
            const size_t width = std::min(few, last - c), size = width * sizeof(float);
            float * m = segment.run->state + length_of_layers(shape) + c;
            for (size_t i = 0; i < d; i++) std::memcpy(part + i * width, m + i * n, size);
            for (size_t t = segment.first; t < segment.last; t++) {
                kernels.linear_attention(d, width, s.tiny_q[t], s.tiny_k[t], s.v[t] + c, scale,
                                         part, width, s.x[t] + c);
            }
            for (size_t i = 0; i < d; i++) std::memcpy(m + i * n, part + i * width, size);
        }
    }

    void keep_hidden() const {
        each_row([&](size_t t) {
            const Segment & in = segment(t);
            const Run & run = *in.run;
            const size_t until_end = run.sequence.n_tokens - (in.token + t - in.first);
            if (until_end > run.n_hidden) return;
            float * hidden = run.hidden + (run.n_hidden - until_end) * n;
            layer_norm(t, weights.ln_out_weight, weights.ln_out_bias, hidden);
        });
        if (squares == nullptr) return;
        each_row([&](size_t t) {  // what the head would see of every token
            layer_norm(t, weights.ln_out_weight, weights.ln_out_bias, s.xx[t]);
        });
        add_squares(weights.head, s.xx);
    }

    void head(float * hidden) const {
        const Rows in = {hidden, n, s.xk.act, s.xk.act_size, s.xk.narrow};
        each_row([&](size_t t) { prepare(weights.head, in, t, 0, n); });
        narrow({{weights.head, in}});
        each_piece(shape.n_vocab, [&](size_t first, size_t last) {
            multiply(weights.head, in, s.logits, first, last);
        });
    }
};

}  // namespace

void embed(const Pass & pass) {
    Forward{pass}.embed();
}

void evaluate_layer(const Pass & pass, size_t layer) {
    const Forward forward{pass};
    forward.time_mixing(layer);
    forward.channel_mixing(layer);
    if (layer == pass.shape.tiny_layer) forward.tiny_attention();
}

void keep_hidden(const Pass & pass) {
    Forward{pass}.keep_hidden();
}

void evaluate_head(const Pass & pass, float * hidden) {
    Forward{pass}.head(hidden);
}

}  // namespace rwkv
