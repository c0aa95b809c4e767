// rwkv.cpp: RWKV models, from a file to logits. It reads from top to bottom:
//
//     errors             one exception, one place where it ends
//     the file           header and records -> a table of tensors, everything checked
//     RWKV-4: tensors    THE table: names, shapes and kinds of a model's tensors
//     the model          tensors -> matrices in memory
//     RWKV-4: evaluation tokens and states -> logits and states, as in the paper
//     evaluation         many sequences, in chunks, outputs last
//     quantizing a file
//     the C API          each function of rwkv.h in a few lines
//
// What is fast and what is exact lies behind ggml/ggml.h, what differs between systems behind
// file.h.

#include "rwkv.h"

#include "rwkv_error.h"
#include "file.h"
#include "ggml/ggml.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

// ==== Errors =====================================================================================

thread_local char last_text[sizeof Error::text];
thread_local int last_flags;  // of this thread's calls without a context
std::atomic<bool> print_by_default{true};

// Keeps the outcome of a context's calls.
struct Reporter {
    std::atomic<int> flags{RWKV_ERROR_NONE};
    std::atomic<bool> print{print_by_default.load()};
};

void report(Reporter * reporter, int flags, const char * text) {
    snprintf(last_text, sizeof last_text, "%s", text);
    if (reporter != nullptr) {
        reporter->flags = flags;
    } else {
        last_flags = flags;
    }
    const bool print = reporter != nullptr ? reporter->print : print_by_default;
    if (print) fprintf(stderr, "rwkv: %s\n", text);
}

// Runs body. An exception ends here: it is reported, and the result is false or NULL.
template <class F> auto guard(Reporter * reporter, F body) noexcept -> decltype(body()) {
    try {
        return body();
    } catch (const Error & error) {
        report(reporter, error.flags, error.text);
    } catch (const std::bad_alloc &) {
        report(reporter, RWKV_ERROR_CTX | RWKV_ERROR_ALLOC, "out of memory");
    } catch (const std::exception & error) {
        report(reporter, RWKV_ERROR_CTX, error.what());
    }
    return decltype(body())();
}

RWKV_LIKE_PRINTF(1, 2) std::string text(const char * format, ...) {
    char buffer[sizeof Error::text];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    return buffer;
}

// Bytes of a file as they may be shown on a terminal.
std::string escaped(const std::string & bytes) {
    std::string result;
    for (const char c : bytes) {
        const bool plain = c >= ' ' && c <= '~' && c != '\\' && c != '\'';
        result += plain ? std::string(1, c) : text("\\x%02x", (unsigned char)c);
    }
    return result;
}

void need(bool given, const char * what) {
    if (!given) fail(RWKV_ERROR_ARGS, "%s is NULL", what);
}

// Checks a struct of the caller that may be as short as in its first version (`oldest` bytes), or
// longer than ours: what we don't know must be zero.
void check_struct(const void * given, size_t size, size_t oldest, size_t known, const char * type) {
    if (size < oldest || size > 4096) {
        fail(RWKV_ERROR_ARGS, "%s: size is %zu, expected %zu", type, size, known);
    }
    for (size_t i = known; i < size; i++) {
        if (((const char *)given)[i] == 0) continue;
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED,
             "%s: the member at byte %zu is not known to this library (its API version is %d)",
             type, i, RWKV_API_VERSION);
    }
}

// ==== The file ===================================================================================

constexpr size_t max_vocab = 1 << 20;
constexpr size_t max_embed = 1 << 16;
constexpr size_t max_layers = 1 << 10;
constexpr size_t max_ffn = 1 << 20;
constexpr size_t max_dims = 3;
constexpr size_t max_name = 255;
constexpr size_t header_size = 6 * sizeof(int32_t);

struct Slot;  // what a model uses a tensor for: see the table below

struct Tensor {
    std::string name;
    ggml_type type;
    std::vector<size_t> dims;  // (rows, cols) or (n): the contiguous one last
    size_t rows, cols;
    uint64_t offset, size;  // of the data in the file, in bytes
    const Slot * slot;
    size_t layer;
};

struct Shape {
    size_t n_vocab, n_embed, n_layer, n_ffn;
};

// What a file holds, or would hold.
struct Index {
    std::string path;
    uint64_t size = 0;
    uint32_t version = 0;
    ggml_type type = GGML_TYPE_COUNT;  // of most matrices, says the header; each tensor has its own
    Shape shape = {};
    std::vector<Tensor> tensors;
    std::unordered_set<std::string> names;  // of the tensors
};

const char * type_name(ggml_type type) {
    return ggml_type_traits(type)->name;
}

// Names what `head`, the beginning of a file, belongs to, and says what to do with it.
const char * recognise(const std::string & head) {
    static const struct {
        size_t offset;
        const char * bytes;
        const char * advice;
    } known[] = {
        {0, "ggmf", "a ggmf file of a big-endian machine, with its bytes swapped"},
        {0, "GGUF", "a GGUF file, which llama.cpp reads"},
        {0, "lmgg", "a 'ggml' file of llama.cpp or whisper.cpp"},
        {0, "tjgg", "a 'ggjt' file of llama.cpp"},
        {0, "PK\x03\x04", "a zip archive, as PyTorch checkpoints are: run `rwkv convert` first"},
        {0, "\x80\x02", "an old PyTorch checkpoint or another pickle: run `rwkv convert` first"},
        {0, "version https://git-lfs", "a git-lfs pointer: the model itself was not downloaded"},
        {0, "<", "a page of HTML: download the model again"},
        {0, "\x1f\x8b", "a gzip archive: unpack it first"},
        {0, "{", "JSON text"},
        {8, "{\"", "a safetensors file: run `rwkv convert` first"},
    };
    for (const auto & k : known) {
        const size_t n = std::strlen(k.bytes);
        if (head.size() >= k.offset + n && head.compare(k.offset, n, k.bytes) == 0) return k.advice;
    }
    return "of an unknown format";
}

// The type that a file of `version` means by `id`.
ggml_type read_type(const std::string & where, uint32_t version, int32_t id) {
    static const char * const later[] = {"Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"};
    const ggml_type type = id < 0 ? GGML_TYPE_COUNT : ggml_type_of_file(version, (uint32_t)id);
    if (type != GGML_TYPE_COUNT) return type;
    const char * name = id < 0 ? nullptr : rwkv_get_format_name((uint32_t)id);
    const int flags = RWKV_ERROR_FILE | RWKV_ERROR_DATA_TYPE;
    if (name != nullptr) {
        fail(flags, "%s: data type %s is not in files of version %u (quantize the original again)",
             where.c_str(), name, version);
    }
    if (id >= 10 && id <= 16) {
        fail(flags,
             "%s: data type %d is %s, one of the K-quants of 2025, which are not supported "
             "(quantize the original to Q5_1 or another format)",
             where.c_str(), id, later[id - 10]);
    }
    fail(flags, "%s: data type %d, expected 0 to 9", where.c_str(), id);
}

void check_row(int category, const std::string & where, size_t cols, ggml_type type) {
    if (!ggml_type_traits(type)->quantized || cols % GGML_ROW_UNIT == 0) return;
    fail(category | RWKV_ERROR_DIMENSION, "%s: rows of %zu weights, but %s needs a multiple of %d",
         where.c_str(), cols, type_name(type), GGML_ROW_UNIT);
}

size_t check_dimension(int category, const std::string & where, const char * name, size_t value,
                       size_t limit) {
    if (value >= 1 && value <= limit) return value;
    fail(category | RWKV_ERROR_DIMENSION, "%s: %s is %lld, expected 1 to %zu", where.c_str(), name,
         (long long)value, limit);
}

void read_header(const InputFile & file, Index & index) {
    std::string head(std::min<size_t>(512, file.size()), '\0');
    file.read(0, head.data(), head.size());
    int32_t numbers[6] = {};
    std::memcpy(numbers, head.data(), std::min(head.size(), sizeof numbers));
    if (head.size() >= 4 && numbers[0] != RWKV_FILE_MAGIC) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_MAGIC,
             "%s: expected a ggmf model file (magic 0x%08x), but magic is 0x%08x: this is %s",
             file.path(), RWKV_FILE_MAGIC, (uint32_t)numbers[0], recognise(head));
    }
    if (head.size() < header_size) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_READ,
             "%s: truncated header, got %zu of %zu bytes (truncated download?)", file.path(),
             head.size(), header_size);
    }
    index.version = (uint32_t)numbers[1];
    if (index.version < RWKV_FILE_VERSION_MIN || index.version > RWKV_FILE_VERSION_MAX) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_VERSION,
             "%s: version of the file is %d, expected %d to %d (a newer library may read it)",
             file.path(), numbers[1], RWKV_FILE_VERSION_MIN, RWKV_FILE_VERSION_MAX);
    }
    const auto size = [&](const char * name, int32_t value, size_t limit) {
        // A negative number is a size beyond all limits.
        return check_dimension(RWKV_ERROR_FILE, index.path, name, (size_t)value, limit);
    };
    index.shape.n_vocab = size("n_vocab", numbers[2], max_vocab);
    index.shape.n_embed = size("n_embed", numbers[3], max_embed);
    index.shape.n_layer = size("n_layer", numbers[4], max_layers);
    index.type = read_type(index.path + ": header", index.version, numbers[5]);
}

// Takes the next bytes of a file, never more than it has.
struct Cursor {
    const InputFile & file;
    uint64_t at;

    uint64_t left() const { return file.size() - at; }

    void take(void * data, size_t n, const std::string & where, const char * what) {
        if (n > left()) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_READ,
                 "%s: the %s takes %zu bytes, but only %llu bytes are left "
                 "(truncated download, or bytes after the last tensor?)",
                 where.c_str(), what, n, (unsigned long long)left());
        }
        file.read(at, data, n);
        at += n;
    }
};

Tensor read_record(Cursor & cursor, const Index & index) {
    const std::string at =
        text("%s: at byte %llu", index.path.c_str(), (unsigned long long)cursor.at);
    int32_t head[3];  // number of dimensions, length of the name, type
    cursor.take(head, sizeof head, at, "record of a tensor");
    if (head[0] < 1 || head[0] > (int)max_dims) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_SHAPE, "%s: a tensor of %d dimensions, expected 1 to %zu",
             at.c_str(), head[0], max_dims);
    }
    if (head[1] < 1 || head[1] > (int)max_name) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_KEY, "%s: a name of %d bytes, expected 1 to %zu",
             at.c_str(), head[1], max_name);
    }
    int32_t dims[max_dims];  // contiguous one first
    cursor.take(dims, (size_t)head[0] * sizeof dims[0], at, "shape of a tensor");
    std::string name((size_t)head[1], '\0');
    cursor.take(name.data(), name.size(), at, "name of a tensor");
    const char * const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.";
    if (name.find_first_not_of(allowed) != std::string::npos) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_KEY,
             "%s: name '%s': expected letters, digits, '_' and '.' only", at.c_str(),
             escaped(name).c_str());
    }

    const std::string where = at + ": tensor '" + name + "'";
    Tensor tensor = {name, read_type(where, index.version, head[2]), {}, 1, 0, 0, 0, nullptr, 0};
    for (int i = head[0] - 1; i >= 0; i--) {
        if (dims[i] < 1) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_DIMENSION,
                 "%s: a dimension is %d, expected at least 1", where.c_str(), dims[i]);
        }
        tensor.dims.push_back((size_t)dims[i]);
    }
    tensor.cols = tensor.dims.back();
    check_row(RWKV_ERROR_FILE, where, tensor.cols, tensor.type);
    // Three factors below 2^31 can pass 2^64: divide what is left instead of multiplying.
    const uint64_t row_size = ggml_row_size(tensor.type, tensor.cols);
    uint64_t rows_left = cursor.left() / row_size;
    for (int i = 1; i < head[0] && rows_left > 0; i++) {
        tensor.rows *= (size_t)dims[i];
        rows_left /= (uint64_t)dims[i];
    }
    if (rows_left == 0) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_FILE_READ,
             "%s: the data takes more than the %llu bytes that are left (truncated download?)",
             where.c_str(), (unsigned long long)cursor.left());
    }
    tensor.offset = cursor.at;
    tensor.size = tensor.rows * row_size;
    cursor.at += tensor.size;
    return tensor;
}

void check_tensors(Index & index);

// Reads a file's table of tensors and checks all of it; nothing of the size of the data is
// allocated.
Index read_index(const InputFile & file) {
    Index index;
    index.path = file.path();
    index.size = file.size();
    read_header(file, index);
    const size_t max_tensors = 64 * index.shape.n_layer + 64;
    for (Cursor cursor{file, header_size}; cursor.left() > 0;) {
        const uint64_t start = cursor.at;
        Tensor tensor = read_record(cursor, index);
        if (!index.names.insert(tensor.name).second) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_KEY, "%s: at byte %llu: tensor '%s' occurs twice",
                 file.path(), (unsigned long long)start, tensor.name.c_str());
        }
        if (index.tensors.size() == max_tensors) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA,
                 "%s: at byte %llu: more than %zu tensors, too many for a model of %zu layers",
                 file.path(), (unsigned long long)start, max_tensors, index.shape.n_layer);
        }
        index.tensors.push_back(std::move(tensor));
    }
    check_tensors(index);
    return index;
}

// ==== RWKV-4: tensors ============================================================================

// A tensor in memory. A vector is FP32 and is used as floats.
struct Weight : ggml_matrix {
    operator const float *() const { return (const float *)data; }
};

struct Layer {
    Weight ln0_weight, ln0_bias;  // used in the first layer only
    Weight ln1_weight, ln1_bias, ln2_weight, ln2_bias;
    Weight att_time_mix_k, att_time_mix_v, att_time_mix_r, att_time_first, att_time_decay;
    Weight att_key, att_value, att_receptance, att_output;
    Weight ffn_time_mix_k, ffn_time_mix_r;
    Weight ffn_key, ffn_value, ffn_receptance;
};

struct Weights {
    Weight emb, ln_out_weight, ln_out_bias, head;
    std::vector<Layer> layers;
};

enum Kind {
    VECTOR,        // always FP32
    FIRST_VECTOR,  // one that only the first layer needs
    MATRIX,        // any type; what quantizing is for
    EMBEDDING,     // rows are looked up; keeps its type when a file is quantized
    HEAD,          // a matrix that keeps its type: quantizing it saves little and costs quality
};

// A dimension, by the member of Shape that says how long it is.
using Dim = size_t Shape::*;
constexpr Dim VOCAB = &Shape::n_vocab, EMBED = &Shape::n_embed, FFN = &Shape::n_ffn;

struct Slot {
    const char * name;           // of a layer's tensor: what follows "blocks.N."
    Weight Weights::* of_model;  // where it goes: one of these two
    Weight Layer::* of_layer;
    Kind kind;
    Dim rows, cols;  // a vector has cols only

    constexpr Slot(const char * n, Weight Weights::* to, Kind k = VECTOR, Dim r = nullptr)
        : name(n), of_model(to), of_layer(nullptr), kind(k), rows(r), cols(EMBED) {}
    constexpr Slot(const char * n, Weight Layer::* to, Kind k = VECTOR, Dim r = nullptr,
                   Dim c = EMBED)
        : name(n), of_model(nullptr), of_layer(to), kind(k), rows(r), cols(c) {}
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
    {"ln_out.weight", &Weights::ln_out_weight},
    {"ln_out.bias", &Weights::ln_out_bias},
    {"head.weight", &Weights::head, HEAD, VOCAB},
};

bool is_vector(const Tensor & tensor) {
    return tensor.slot->rows == nullptr;
}

bool is_needed(const Tensor & tensor) {
    return tensor.slot->kind != FIRST_VECTOR || tensor.layer == 0;
}

std::string tensor_name(const Slot & slot, size_t layer) {
    return slot.of_model != nullptr ? slot.name : text("blocks.%zu.%s", layer, slot.name);
}

// Finds what a tensor is for by its name; false: a model of this kind has no such tensor.
bool find_slot(Tensor & tensor) {
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
template <class F> void each_needed(size_t n_layer, F f) {
    for (const Slot & slot : slots) {
        const bool once = slot.of_model != nullptr || slot.kind == FIRST_VECTOR;
        for (size_t layer = 0; layer < (once ? 1 : n_layer); layer++) f(slot, layer);
    }
}

// What a model with a tensor that RWKV-4 does not know seems to be.
const char * guess_architecture(const Index & index) {
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
        {"tiny_", "RWKV-4a (with tiny attention), which is not supported yet"},
        {"pos_emb", "RWKV-4 with positional embeddings, which are not supported"},
        {"ffnPre",
         "RWKV-4 with a feed-forward layer in place of attention, which is not supported"},
        {"head_", "RWKV-4 with head_qk, which is not supported"},
    };
    for (const auto & sign : signs) {
        for (const Tensor & tensor : index.tensors) {
            if (tensor.name.find(sign.part) != std::string::npos) return sign.architecture;
        }
    }
    return "of an unknown architecture";
}

std::string dims_text(const std::vector<size_t> & dims) {
    std::string result;
    for (const size_t n : dims) result += (result.empty() ? "" : " x ") + std::to_string(n);
    return result;
}

std::vector<size_t> expected_dims(const Slot & slot, const Shape & shape) {
    if (slot.rows == nullptr) return {shape.*slot.cols};
    return {shape.*slot.rows, shape.*slot.cols};
}

// Checks that the file holds a model: each tensor known, all there, of the right shape and type.
void check_tensors(Index & index) {
    Shape & shape = index.shape;
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
        if (tensor.slot->rows == FFN && tensor.layer == 0) {
            shape.n_ffn =
                check_dimension(RWKV_ERROR_MODEL_PARAMS, index.path, name, tensor.dims[0], max_ffn);
        }
    }
    each_needed(shape.n_layer, [&](const Slot & slot, size_t layer) {
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

// The table of a file that does not exist: matrices in `type`, embedding and head in FP16 (or FP32
// if that is the type).
Index imagine_index(const Shape & shape, ggml_type type) {
    const std::string where = "a model of this shape";
    check_dimension(RWKV_ERROR_ARGS, where, "n_vocab", shape.n_vocab, max_vocab);
    check_dimension(RWKV_ERROR_ARGS, where, "n_embed", shape.n_embed, max_embed);
    check_dimension(RWKV_ERROR_ARGS, where, "n_layer", shape.n_layer, max_layers);
    check_row(RWKV_ERROR_ARGS, where, shape.n_embed, type);
    Index index;
    index.size = header_size;
    index.shape = shape;
    each_needed(shape.n_layer, [&](const Slot & slot, size_t layer) {
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
        index.size += (3 + tensor.dims.size()) * sizeof(int32_t) + tensor.name.size() + tensor.size;
        index.tensors.push_back(std::move(tensor));
    });
    return index;
}

// ==== The model ==================================================================================

uint64_t aligned(uint64_t n) {
    return (n + 63) / 64 * 64;
}

// Memory that is not initialised, at a multiple of 64 bytes.
class Buffer {
  public:
    void allocate(uint64_t n, const char * what) {
        data_.reset();
        size_ = 0;
        try {
            if (n > std::numeric_limits<size_t>::max() / 2) throw std::bad_alloc();
            data_.reset((uint8_t *)operator new((size_t)n, std::align_val_t{64}));
        } catch (const std::bad_alloc &) {
            fail(RWKV_ERROR_MODEL | RWKV_ERROR_ALLOC, "out of memory: %s needs %llu bytes", what,
                 (unsigned long long)n);
        }
        size_ = n;
    }
    uint8_t * data() const { return data_.get(); }
    uint64_t size() const { return size_; }

  private:
    struct Free {
        void operator()(uint8_t * p) const { operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    uint64_t size_ = 0;
};

struct FreePool {
    void operator()(ggml_pool * pool) const { ggml_pool_free(pool); }
};
using Pool = std::unique_ptr<ggml_pool, FreePool>;

Pool create_pool() {
    Pool pool(ggml_pool_create());
    if (pool == nullptr) throw std::bad_alloc();
    return pool;
}

// The threads of a call, its own one among them; one alone never waits for others. Meanwhile the
// caller's floating-point environment gives way to that in which results are defined.
class Team {
  public:
    Team(const Pool & pool, unsigned n_threads)
        : pool_(n_threads > 1 ? pool.get() : nullptr), saved_(ggml_fp_enter()) {
        if (pool_ != nullptr) ggml_pool_acquire(pool_, n_threads);
    }
    ~Team() {
        if (pool_ != nullptr) ggml_pool_release(pool_);
        ggml_fp_leave(saved_);
    }
    Team(const Team &) = delete;
    Team & operator=(const Team &) = delete;

    // Calls f(first, last) for pieces of [0, n) that are multiples of `unit`; f throws nothing.
    template <class F> void run(size_t n, size_t unit, F f) const {
        const auto work = [](void * arg, size_t first, size_t last) { (*(F *)arg)(first, last); };
        ggml_pool_run(pool_, work, &f, n, unit);
    }

  private:
    ggml_pool * pool_;
    uint64_t saved_;
};

// The smallest number that any thread has found.
class Least {
  public:
    static constexpr uint64_t none = std::numeric_limits<uint64_t>::max();
    void offer(uint64_t n) {
        uint64_t least = value_;
        while (n < least && !value_.compare_exchange_weak(least, n)) {}
    }
    uint64_t get() const { return value_; }

  private:
    std::atomic<uint64_t> value_{none};
};

struct Progress {
    rwkv_progress callback;
    void * user;
    uint64_t total;

    void operator()(uint64_t done) const {
        if (callback != nullptr && !callback(user, done, total)) {
            fail(RWKV_ERROR_CTX, "cancelled by the progress callback");
        }
    }
};

// Reads the rows of a tensor a few MiB at a time and calls f(first_row, rows, bytes) for each slab,
// which is a multiple of `unit` rows (the last may be shorter).
template <class F>
void each_slab(const InputFile & file, const Tensor & tensor, size_t unit,
               const Progress & progress, F f) {
    const size_t row_size = ggml_row_size(tensor.type, tensor.cols);
    const size_t slab = std::max<size_t>((4 << 20) / row_size / unit, 1) * unit;
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[std::min(slab, tensor.rows) * row_size]);
    for (size_t first = 0; first < tensor.rows; first += slab) {
        const size_t rows = std::min(slab, tensor.rows - first);
        const uint64_t offset = tensor.offset + first * (uint64_t)row_size;
        file.read(offset, bytes.get(), rows * row_size);
        f(first, rows, bytes.get());
        progress(offset + rows * row_size);
    }
}

struct Model {
    Shape shape = {};
    const ggml_kernels * kernels = nullptr;
    Weights weights;
    Mapping mapping;
    Buffer arena;  // all of the model that is private memory
    Pool pool;
};

// Quantized matrices are evaluated from stripes; embeddings are looked up row by row.
bool is_packed(const Tensor & tensor) {
    return ggml_type_traits(tensor.type)->quantized && tensor.slot->kind != EMBEDDING;
}

// Bytes that a tensor takes in private memory; 0: it stays in the mapped file.
uint64_t private_size(const Tensor & tensor, bool mmap) {
    if (is_packed(tensor)) return ggml_stripes_size(tensor.type, tensor.rows, tensor.cols);
    return is_vector(tensor) || !mmap ? tensor.size : 0;
}

struct Sizes {
    uint64_t arena, mapped;
    uint64_t token;  // of both, what every token reads
};

Sizes sizes_of(const Index & index, bool mmap) {
    Sizes sizes = {};
    for (const Tensor & tensor : index.tensors) {
        if (!is_needed(tensor)) continue;
        const uint64_t size = private_size(tensor, mmap);
        sizes.arena += aligned(size);
        if (size == 0) sizes.mapped += tensor.size;
        if (tensor.slot->kind != EMBEDDING) sizes.token += size > 0 ? size : tensor.size;
    }
    return sizes;
}

// Repacks a tensor slab by slab, each as a matrix of its own.
void pack(const InputFile & file, const Tensor & tensor, const Team & team,
          const Progress & progress, uint8_t * stripes) {
    const size_t stripe_size = ggml_stripe_size(tensor.type, tensor.cols);
    const auto pack_slab = [&](size_t first_row, size_t rows, const uint8_t * bytes) {
        uint8_t * to = stripes + first_row / GGML_STRIPE * stripe_size;
        Least bad_block;
        team.run(rows, GGML_STRIPE, [&](size_t first, size_t last) {
            size_t bad;
            const bool good =
                ggml_pack_stripes(tensor.type, rows, tensor.cols, bytes, to, first, last, &bad);
            if (!good) bad_block.offer(bad);
        });
        if (bad_block.get() == Least::none) return;
        const size_t blocks_before =
            first_row * tensor.cols / ggml_type_traits(tensor.type)->block_size;
        fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_DATA,
             "%s: tensor '%s': block %llu of %s has an outlier where none can be "
             "(the file is damaged)",
             file.path(), tensor.name.c_str(),
             (unsigned long long)(blocks_before + bad_block.get()), type_name(tensor.type));
    };
    each_slab(file, tensor, GGML_STRIPE, progress, pack_slab);
}

const ggml_kernels * select_kernels() {
    const char * isa = std::getenv("RWKV_ISA");
    const char * reason = nullptr;
    const ggml_kernels * kernels = ggml_kernels_select(isa, &reason);
    if (kernels == nullptr) {
        fail(RWKV_ERROR_CTX | RWKV_ERROR_UNSUPPORTED, "RWKV_ISA=%s: %s", isa, reason);
    }
    return kernels;
}

std::shared_ptr<Model> load_model(const char * path, const rwkv_load_options & options,
                                  unsigned n_threads) {
    const auto model = std::make_shared<Model>();
    model->kernels = select_kernels();
    model->pool = create_pool();

    const InputFile file(path);
    const Index index = read_index(file);
    const Sizes sizes = sizes_of(index, options.mmap);
    model->shape = index.shape;
    model->weights.layers.resize(index.shape.n_layer);
    model->arena.allocate(sizes.arena, "the model");
    if (sizes.mapped > 0) model->mapping.open(file);

    const Team team(model->pool, n_threads);
    const Progress progress = {options.progress, options.progress_user, file.size()};
    uint8_t * next = model->arena.data();
    for (const Tensor & tensor : index.tensors) {
        if (!is_needed(tensor)) continue;
        const Slot & slot = *tensor.slot;
        Weight & weight = slot.of_model != nullptr
                              ? model->weights.*slot.of_model
                              : model->weights.layers[tensor.layer].*slot.of_layer;
        const uint64_t size = private_size(tensor, options.mmap);
        const uint8_t * data = size > 0 ? next : model->mapping.data() + tensor.offset;
        weight = {{tensor.type, tensor.rows, tensor.cols, data}};
        if (is_packed(tensor)) {
            pack(file, tensor, team, progress, next);
        } else if (size > 0) {
            file.read(tensor.offset, next, (size_t)size);
        } else if (options.prefault) {
            model->mapping.prefault(tensor.offset, tensor.size);
        }
        next += aligned(size);
        progress(tensor.offset + tensor.size);
    }
    return model;
}

// ==== RWKV-4: evaluation =========================================================================

// The state of a layer: n_embed floats of each, in this order.
enum StateVector {
    FFN_XX,  // input of channel mixing for the token before
    ATT_XX,  // input of time mixing for the token before
    AA,      // sum of e^(k - pp)·v over the tokens so far, decaying
    BB,      // sum of e^(k - pp)
    PP,      // the largest exponent, kept apart so that neither sum overflows
    STATE_VECTORS
};

size_t state_length(const Shape & shape) {
    return STATE_VECTORS * shape.n_embed * shape.n_layer;
}

// state: may be misaligned.
void initial_state(const Shape & shape, float * state) {
    for (size_t i = 0; i < state_length(shape); i++) {
        const float value = i / shape.n_embed % STATE_VECTORS == PP ? -1e30f : 0.0f;
        std::memcpy((char *)state + i * sizeof value, &value, sizeof value);
    }
}

constexpr size_t max_rows = 256;  // tokens that are evaluated in one pass over the weights

// Vectors of one length, one per token, and their quantized form.
struct Rows {
    float * x = nullptr;
    size_t n = 0;
    uint8_t * act = nullptr;
    size_t act_size = 0;

    float * operator[](size_t t) const { return x + t * n; }
};

struct Scratch {
    Rows x;           // the residual stream
    Rows xx;          // its layer norm
    Rows xk, xv, xr;  // xx mixed with that of the token before
    Rows k, v, r;     // what the matrices make of them
    Rows y;           // weighted average of values; output of a mixing
    Rows ffn;         // hidden layer of channel mixing
    Rows logits;
};

constexpr size_t max_logit_rows = 32;

// Divides memory at `base` among the vectors; NULL just counts. Returns the number of bytes.
uint64_t lay_out(Scratch & s, const Shape & shape, uint8_t * base) {
    uint64_t used = 0;
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
    };
    for (Rows * r : {&s.xk, &s.xv, &s.xr, &s.y}) rows(*r, max_rows, shape.n_embed, true);
    for (Rows * r : {&s.x, &s.xx, &s.k, &s.v, &s.r}) rows(*r, max_rows, shape.n_embed, false);
    rows(s.ffn, max_rows, shape.n_ffn, true);
    rows(s.logits, max_logit_rows, shape.n_vocab, false);
    return used;
}

// One sequence on its way through an evaluation.
struct Run {
    rwkv_sequence sequence;
    float * state;    // in the context's memory, advanced chunk by chunk
    float * hidden;   // the head's inputs for the last tokens: for logits and hidden_out …
    size_t n_hidden;  // … and for how many
};

// Rows of a chunk that are consecutive tokens of one sequence.
struct Segment {
    const Run * run;
    size_t first, last;  // rows
    size_t token;        // of the first row: its place in the sequence
};

struct Chunk {
    size_t n_rows = 0, n_segments = 0;
    Segment segments[max_rows];
    uint16_t segment_of[max_rows];  // by row
};

uint32_t token_at(const rwkv_sequence & s, size_t i) {  // s.tokens: may be misaligned
    uint32_t token;
    std::memcpy(&token, (const char *)s.tokens + i * sizeof token, sizeof token);
    return token;
}

// One pass over the weights: a chunk of tokens through all layers.
struct Forward {
    const Model & model;
    const Scratch & s;
    const Team & team;
    const Chunk & chunk;
    const size_t n = model.shape.n_embed;
    const ggml_kernels & kernels = *model.kernels;

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

    void quantize(const Weight & w, const Rows & in, size_t t) const {
        if (!ggml_type_traits(w.type)->quantized) return;
        kernels.quantize_act(in.n, in[t], in.act + t * in.act_size);
    }

    // Mixes xx with that of the token before, as input of w.
    void shift(size_t t, size_t layer, StateVector carried, const Weight & mix, const Weight & w,
               const Rows & out) const {
        const Segment & in = segment(t);
        const float * before = t > in.first ? s.xx[t - 1] : state(in, layer, carried);
        kernels.lerp(n, s.xx[t], before, mix, out[t]);
        quantize(w, out, t);
    }

    // Keeps xx of the last token for the next one.
    void carry(size_t layer, StateVector carried) const {
        for (size_t i = 0; i < chunk.n_segments; i++) {
            const Segment & segment = chunk.segments[i];
            float * to = state(segment, layer, carried);
            std::memcpy(to, s.xx[segment.last - 1], n * sizeof(float));
        }
    }

    struct Product {
        const Weight & w;
        const Rows & in;
        const Rows & out;
    };

    // out = w·in for products that do not depend on each other, as one piece of work.
    void multiply(std::initializer_list<Product> products) const {
        multiply(products, chunk.n_rows);
    }

    void multiply(std::initializer_list<Product> products, size_t n_rows) const {
        const auto stripes = [](const Weight & w) {
            return (w.rows + GGML_STRIPE - 1) / GGML_STRIPE;
        };
        size_t total = 0;
        for (const Product & p : products) total += stripes(p.w);
        team.run(total, 1, [&](size_t first, size_t last) {
            for (const Product & p : products) {
                const size_t count = stripes(p.w);
                if (first < count && first < last) {
                    const ggml_input in = {p.in.x, p.in.n, p.in.act, n_rows};
                    kernels.matmul[p.w.type](&p.w, &in, p.out.x, p.out.n, first * GGML_STRIPE,
                                             std::min(last * GGML_STRIPE, p.w.rows));
                }
                first -= std::min(first, count);
                last -= std::min(last, count);
            }
        });
    }

    void embed() const {
        const Weight & emb = model.weights.emb;
        const Layer & l = model.weights.layers[0];
        const size_t row_size = ggml_row_size(emb.type, n);
        each_row([&](size_t t) {
            const Segment & in = segment(t);
            const uint32_t token = token_at(in.run->sequence, in.token + t - in.first);
            ggml_dequantize_row(emb.type, (const uint8_t *)emb.data + token * row_size, s.x[t], n);
            kernels.layer_norm(n, s.x[t], l.ln0_weight, l.ln0_bias, s.x[t]);
        });
    }

    // x += O·(σ(r)·wkv)
    void time_mixing(size_t layer) const {
        const Layer & l = model.weights.layers[layer];
        each_row(
            [&](size_t t) { kernels.layer_norm(n, s.x[t], l.ln1_weight, l.ln1_bias, s.xx[t]); });
        each_row([&](size_t t) {
            shift(t, layer, ATT_XX, l.att_time_mix_k, l.att_key, s.xk);
            shift(t, layer, ATT_XX, l.att_time_mix_v, l.att_value, s.xv);
            shift(t, layer, ATT_XX, l.att_time_mix_r, l.att_receptance, s.xr);
        });
        carry(layer, ATT_XX);
        multiply({{l.att_key, s.xk, s.k}, {l.att_value, s.xv, s.v}, {l.att_receptance, s.xr, s.r}});
        team.run(n, 16, [&](size_t first, size_t last) { average(layer, first, last); });
        each_row([&](size_t t) { quantize(l.att_output, s.y, t); });
        multiply({{l.att_output, s.y, s.v}});
        each_row([&](size_t t) { kernels.add(n, s.v[t], s.x[t]); });
    }

    // y = σ(r)·wkv for some channels: token after token, the sum over all before it.
    void average(size_t layer, size_t first, size_t last) const {
        const Layer & l = model.weights.layers[layer];
        for (size_t i = 0; i < chunk.n_segments; i++) {
            const Segment & segment = chunk.segments[i];
            float * aa = state(segment, layer, AA) + first;
            float * bb = state(segment, layer, BB) + first;
            float * pp = state(segment, layer, PP) + first;
            for (size_t t = segment.first; t < segment.last; t++) {
                float * y = s.y[t] + first;
                kernels.wkv(last - first, l.att_time_first + first, l.att_time_decay + first,
                            s.k[t] + first, s.v[t] + first, aa, bb, pp, y);
                kernels.sigmoid_mul(last - first, s.r[t] + first, y, y);
            }
        }
    }

    // x += σ(r)·(V·relu(k)²)
    void channel_mixing(size_t layer) const {
        const Layer & l = model.weights.layers[layer];
        each_row(
            [&](size_t t) { kernels.layer_norm(n, s.x[t], l.ln2_weight, l.ln2_bias, s.xx[t]); });
        each_row([&](size_t t) {
            shift(t, layer, FFN_XX, l.ffn_time_mix_k, l.ffn_key, s.xk);
            shift(t, layer, FFN_XX, l.ffn_time_mix_r, l.ffn_receptance, s.xr);
        });
        carry(layer, FFN_XX);
        multiply({{l.ffn_key, s.xk, s.ffn}, {l.ffn_receptance, s.xr, s.r}});
        each_row([&](size_t t) {
            kernels.relu2(s.ffn.n, s.ffn[t], s.ffn[t]);
            quantize(l.ffn_value, s.ffn, t);
        });
        multiply({{l.ffn_value, s.ffn, s.v}});
        each_row([&](size_t t) { kernels.sigmoid_mul_add(n, s.r[t], s.v[t], s.x[t]); });
    }

    // What the head sees of the last tokens, of as many as each sequence wants.
    void keep_hidden() const {
        const Weights & w = model.weights;
        each_row([&](size_t t) {
            const Segment & in = segment(t);
            const Run & run = *in.run;
            const size_t until_end = run.sequence.n_tokens - (in.token + t - in.first);
            if (until_end > run.n_hidden) return;
            float * hidden = run.hidden + (run.n_hidden - until_end) * n;
            kernels.layer_norm(n, s.x[t], w.ln_out_weight, w.ln_out_bias, hidden);
        });
    }

    // Logits of up to max_logit_rows rows, into s.logits.
    void head(float * hidden, size_t n_rows) const {
        const Rows in = {hidden, n, s.xk.act, s.xk.act_size};
        team.run(n_rows, 1, [&](size_t first, size_t last) {
            for (size_t t = first; t < last; t++) quantize(model.weights.head, in, t);
        });
        multiply({{model.weights.head, in, s.logits}}, n_rows);
    }
};

// ==== Evaluation =================================================================================

struct Span {
    uintptr_t first, last;
    bool output;
};

enum Phase { IDLE, RUNNING, INTERRUPTED, WRITING };

// A context's turn to evaluate: one at a time.
class Turn {
  public:
    explicit Turn(std::atomic<Phase> & phase) : phase_(phase) {
        Phase idle = IDLE;
        if (phase_.compare_exchange_strong(idle, RUNNING)) return;
        fail(RWKV_ERROR_CTX, "the context is busy with another evaluation "
                             "(make one context per thread with rwkv_clone_context)");
    }
    ~Turn() { phase_ = IDLE; }
    Turn(const Turn &) = delete;
    Turn & operator=(const Turn &) = delete;

    void check() const {
        if (phase_ == INTERRUPTED) fail(RWKV_ERROR_CTX, "interrupted");
    }

    // From here on nothing fails and nothing interrupts.
    void begin_writing() const {
        Phase running = RUNNING;
        if (!phase_.compare_exchange_strong(running, WRITING)) check();
    }

  private:
    std::atomic<Phase> & phase_;
};

}  // namespace

struct rwkv_context : Reporter {
    std::shared_ptr<const Model> model;
    unsigned n_threads;
    std::atomic<Phase> phase{IDLE};
    Scratch scratch;
    Buffer scratch_memory;
    Buffer run_memory;  // states and hidden rows of the runs
    Chunk chunk;
    std::vector<Run> runs;
    std::vector<Span> spans;
};

namespace {

uint64_t run_memory_size(const Shape & shape, size_t n_sequences, size_t n_hidden) {
    return (n_sequences * (uint64_t)state_length(shape) + n_hidden * (uint64_t)shape.n_embed) *
           sizeof(float);
}

unsigned checked_threads(uint32_t n_threads) {
    if (n_threads > 1024)
        fail(RWKV_ERROR_ARGS, "n_threads is %u, expected at most 1024", n_threads);
    return n_threads > 0 ? n_threads : std::min(ggml_default_threads(), 1024u);
}

rwkv_context * create_context(std::shared_ptr<const Model> model, unsigned n_threads) {
    auto ctx = std::make_unique<rwkv_context>();
    const Shape & shape = model->shape;
    ctx->scratch_memory.allocate(lay_out(ctx->scratch, shape, nullptr), "a context");
    lay_out(ctx->scratch, shape, ctx->scratch_memory.data());
    ctx->run_memory.allocate(run_memory_size(shape, 1, 1), "a context");
    ctx->model = std::move(model);
    ctx->n_threads = n_threads;
    return ctx.release();
}

void check_sequence(const Model & model, const rwkv_sequence & s, size_t number) {
    const std::string who = "sequence " + std::to_string(number);
    if (s.tokens == nullptr) fail(RWKV_ERROR_ARGS, "%s: tokens is NULL", who.c_str());
    if (s.n_tokens == 0) fail(RWKV_ERROR_ARGS, "%s: has no tokens", who.c_str());
    if (s.adapter != nullptr) {
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED, "%s: adapter is not offered yet, pass NULL",
             who.c_str());
    }
    if (s.n_logits > s.n_tokens) {
        fail(RWKV_ERROR_ARGS, "%s: n_logits is %zu, but it has %zu tokens only", who.c_str(),
             s.n_logits, s.n_tokens);
    }
    for (size_t i = 0; i < s.n_tokens; i++) {
        const uint32_t token = token_at(s, i);
        if (token < model.shape.n_vocab) continue;
        fail(RWKV_ERROR_ARGS, "%s: token %zu is %u, expected less than n_vocab = %zu", who.c_str(),
             i, token, model.shape.n_vocab);
    }
}

void add_span(std::vector<Span> & spans, const void * p, size_t n, size_t size, bool output) {
    const uintptr_t first = (uintptr_t)p;
    if (p == nullptr || n == 0) return;
    if (n > (std::numeric_limits<uintptr_t>::max() - first) / size) {
        fail(RWKV_ERROR_ARGS, "a buffer of %zu elements passes the end of memory", n);
    }
    spans.push_back({first, first + n * size, output});
}

// Outputs overlap nothing, but a state_out may be the state_in of its own sequence.
void check_overlaps(rwkv_context & ctx) {
    const Shape & shape = ctx.model->shape;
    std::vector<Span> & spans = ctx.spans;
    for (const Run & run : ctx.runs) {
        const rwkv_sequence & s = run.sequence;
        add_span(spans, s.tokens, s.n_tokens, sizeof *s.tokens, false);
        if (s.state_in != s.state_out) {
            add_span(spans, s.state_in, state_length(shape), sizeof(float), false);
        }
        add_span(spans, s.state_out, state_length(shape), sizeof(float), true);
        add_span(spans, s.logits_out, s.n_logits, shape.n_vocab * sizeof(float), true);
        add_span(spans, s.hidden_out, shape.n_embed, sizeof(float), true);
    }
    std::sort(spans.begin(), spans.end(),
              [](const Span & a, const Span & b) { return a.first < b.first; });
    uintptr_t end = 0, end_of_outputs = 0;
    for (const Span & span : spans) {
        if (span.first < (span.output ? end : end_of_outputs)) {
            fail(RWKV_ERROR_ARGS, "buffers overlap: an output may not share memory with anything, "
                                  "except state_out with all of its own sequence's state_in");
        }
        end = std::max(end, span.last);
        if (span.output) end_of_outputs = std::max(end_of_outputs, span.last);
    }
}

// Checks the sequences and gives each its state and its place for hidden rows. Rows that become
// logits come first, in the order of the sequences. Returns how many those are.
size_t start_runs(rwkv_context & ctx, const rwkv_sequence * sequences, size_t n_sequences,
                  size_t sizeof_sequence) {
    const Shape & shape = ctx.model->shape;
    ctx.runs.clear();
    ctx.spans.clear();
    add_span(ctx.spans, sequences, n_sequences, sizeof_sequence, false);
    size_t n_logits = 0, n_hidden = 0;
    for (size_t i = 0; i < n_sequences; i++) {
        Run run = {};
        rwkv_sequence & s = run.sequence;
        const char * given = (const char *)sequences + i * sizeof_sequence;
        check_struct(given, sizeof_sequence, sizeof s, sizeof s, "rwkv_sequence");
        std::memcpy(&s, given, sizeof s);
        check_sequence(*ctx.model, s, i);
        if (s.logits_out == nullptr) s.n_logits = 0;
        run.n_hidden = s.n_logits > 0 ? s.n_logits : s.hidden_out != nullptr ? 1 : 0;
        n_logits += s.n_logits;
        n_hidden += run.n_hidden;
        ctx.runs.push_back(run);
    }
    check_overlaps(ctx);

    const uint64_t size = run_memory_size(shape, n_sequences, n_hidden);
    if (size > ctx.run_memory.size()) ctx.run_memory.allocate(size, "the batch");
    float * state = (float *)ctx.run_memory.data();
    float * hidden = state + n_sequences * state_length(shape);
    float * hidden_only = hidden + n_logits * shape.n_embed;
    for (Run & run : ctx.runs) {
        float *& place = run.sequence.n_logits > 0 ? hidden : hidden_only;
        run.hidden = place;
        place += run.n_hidden * shape.n_embed;
        run.state = state;
        state += state_length(shape);
        if (run.sequence.state_in == nullptr) {
            initial_state(shape, run.state);
        } else {
            std::memcpy(run.state, (const void *)run.sequence.state_in,
                        state_length(shape) * sizeof(float));
        }
    }
    return n_logits;
}

// Fills a chunk with the next tokens, sequence after sequence: `token` of runs[run] is the first.
void next_chunk(Chunk & chunk, const std::vector<Run> & runs, size_t & run, size_t & token) {
    chunk.n_rows = chunk.n_segments = 0;
    while (run < runs.size() && chunk.n_rows < max_rows) {
        const size_t left = runs[run].sequence.n_tokens - token;
        const size_t first = chunk.n_rows, last = std::min(first + left, max_rows);
        std::fill(chunk.segment_of + first, chunk.segment_of + last, (uint16_t)chunk.n_segments);
        chunk.segments[chunk.n_segments++] = {&runs[run], first, last, token};
        chunk.n_rows = last;
        token += last - first;
        if (token == runs[run].sequence.n_tokens) {
            run++;
            token = 0;
        }
    }
}

// Copies states and hidden vectors out and computes logits: nothing here fails.
void write_results(const rwkv_context & ctx, const Forward & forward, size_t n_logits) {
    const Shape & shape = ctx.model->shape;
    const auto write = [](float * to, const float * from, size_t n) {  // to: may be misaligned
        if (to != nullptr) std::memcpy((char *)to, from, n * sizeof(float));
    };
    for (const Run & run : ctx.runs) {
        write(run.sequence.state_out, run.state, state_length(shape));
        if (run.n_hidden == 0) continue;
        write(run.sequence.hidden_out, run.hidden + (run.n_hidden - 1) * shape.n_embed,
              shape.n_embed);
    }
    float * hidden = (float *)ctx.run_memory.data() + ctx.runs.size() * state_length(shape);
    const Run * run = ctx.runs.data();
    size_t row = 0;  // of the logits of *run
    for (size_t first = 0; first < n_logits; first += max_logit_rows) {
        const size_t rows = std::min(max_logit_rows, n_logits - first);
        forward.head(hidden + first * shape.n_embed, rows);
        for (size_t t = 0; t < rows; t++, row++) {
            for (; row == run->sequence.n_logits; run++) row = 0;
            write(run->sequence.logits_out + row * shape.n_vocab, ctx.scratch.logits[t],
                  shape.n_vocab);
        }
    }
}

void evaluate(rwkv_context & ctx, const rwkv_sequence * sequences, size_t n_sequences,
              size_t sizeof_sequence) {
    const Turn turn(ctx.phase);
    const size_t n_logits = start_runs(ctx, sequences, n_sequences, sizeof_sequence);
    const Team team(ctx.model->pool, ctx.n_threads);
    const Forward forward = {*ctx.model, ctx.scratch, team, ctx.chunk};
    for (size_t run = 0, token = 0; run < ctx.runs.size();) {
        next_chunk(ctx.chunk, ctx.runs, run, token);
        forward.embed();
        for (size_t layer = 0; layer < ctx.model->shape.n_layer; layer++) {
            turn.check();
            forward.time_mixing(layer);
            forward.channel_mixing(layer);
        }
        forward.keep_hidden();
    }
    turn.begin_writing();
    write_results(ctx, forward, n_logits);
}

// ==== Quantizing a file ==========================================================================

constexpr uint32_t FIRST_QUANTIZED = 2;  // data types of a file: FP32, FP16, and then these

struct Format {
    uint32_t version;
    ggml_type type;
};

// The names of all formats from data type `first` on.
std::string format_names(uint32_t first) {
    std::string names;
    for (uint32_t id = first; const char * name = rwkv_get_format_name(id); id++) {
        names += (names.empty() ? "" : ", ") + std::string(name);
    }
    return names;
}

// The format called `name` in files of `version`; 0 is the newest version that has it. `first`: the
// first data type that will do.
Format find_format(const char * name, uint32_t version, uint32_t first) {
    Format found = {0, GGML_TYPE_COUNT};
    bool known = false;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const ggml_type_info & t = *ggml_type_traits((ggml_type)i);
        if (std::strcmp(name, t.name) != 0 || t.file_id < first) continue;
        known = true;
        if (version == 0 || (t.first_version <= version && version <= t.last_version)) {
            found = {version == 0 ? t.last_version : version, (ggml_type)i};
        }
    }
    if (found.type != GGML_TYPE_COUNT) return found;
    const int flags = RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE;
    if (known) fail(flags, "files of version %u have no %s (choose 100)", version, name);
    fail(flags, "unknown format '%s' (choose from %s)", escaped(name).c_str(),
         format_names(first).c_str());
}

// Checks, before anything is written, that all of the file can be quantized.
void check_source(const Index & index, const Format & format) {
    const auto refuse_quantized = [&](const std::string & what, ggml_type type) {
        if (!ggml_type_traits(type)->quantized) return;
        fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA_TYPE,
             "%s: %s is already %s (quantize the original FP16 or FP32 file)", index.path.c_str(),
             what.c_str(), type_name(type));
    };
    refuse_quantized("the file", index.type);
    for (const Tensor & tensor : index.tensors) {
        const std::string what = "tensor '" + tensor.name + "'";
        refuse_quantized(what, tensor.type);
        if (tensor.slot->kind != MATRIX) continue;
        check_row(RWKV_ERROR_FILE, index.path + ": " + what, tensor.cols, format.type);
    }
}

void write_record(OutputFile & out, const Tensor & tensor, ggml_type type) {
    std::vector<int32_t> numbers = {(int32_t)tensor.dims.size(), (int32_t)tensor.name.size(),
                                    (int32_t)ggml_type_traits(type)->file_id};
    numbers.insert(numbers.end(), tensor.dims.rbegin(), tensor.dims.rend());
    out.write(numbers.data(), numbers.size() * sizeof(int32_t));
    out.write(tensor.name.data(), tensor.name.size());
}

// The number of the first weight that is NaN or infinite, or n.
size_t first_bad(const float * x, size_t n) {
    return (size_t)(std::find_if_not(x, x + n, [](float v) { return std::isfinite(v); }) - x);
}

// Copies a tensor, its rows in `type`.
void write_tensor(OutputFile & out, const InputFile & file, const Tensor & tensor, ggml_type type,
                  bool allow_nan, const Team & team, const Progress & progress) {
    const size_t cols = tensor.cols;
    const size_t in_size = ggml_row_size(tensor.type, cols), out_size = ggml_row_size(type, cols);
    std::vector<float> weights;
    std::vector<uint8_t> rows_out;
    const auto write_slab = [&](size_t first_row, size_t rows, const uint8_t * bytes) {
        weights.resize(rows * cols);
        rows_out.resize(rows * out_size);
        Least bad_weight, overflow;
        team.run(rows, 1, [&](size_t first, size_t last) {
            for (size_t r = first; r < last; r++) {
                const uint8_t * in = bytes + r * in_size;
                uint8_t * to = rows_out.data() + r * out_size;
                float * x = weights.data() + r * cols;
                ggml_dequantize_row(tensor.type, in, x, cols);
                const size_t bad = first_bad(x, cols);
                if (bad < cols) bad_weight.offer((first_row + r) * cols + bad);
                if (type == tensor.type) {
                    std::memcpy(to, in, out_size);
                } else {
                    ggml_quantize_row(type, x, to, cols);
                    ggml_dequantize_row(type, to, x, cols);
                    if (first_bad(x, cols) < cols) overflow.offer(first_row + r);
                }
            }
        });
        if (!allow_nan && bad_weight.get() != Least::none) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA,
                 "%s: tensor '%s': weight [%zu, %zu] is NaN or infinite (allow_nan passes it on)",
                 file.path(), tensor.name.c_str(), (size_t)(bad_weight.get() / cols),
                 (size_t)(bad_weight.get() % cols));
        }
        if (!allow_nan && overflow.get() != Least::none) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA,
                 "%s: tensor '%s': the weights of row %zu are too large for the scales of %s "
                 "(allow_nan writes infinity)",
                 file.path(), tensor.name.c_str(), (size_t)overflow.get(), type_name(type));
        }
        out.write(rows_out.data(), rows * out_size);
    };
    each_slab(file, tensor, 1, progress, write_slab);
}

void quantize_file(const char * path_in, const char * path_out,
                   const rwkv_quantize_options & options) {
    need(path_in != nullptr, "the path of the input");
    need(path_out != nullptr, "the path of the output");
    need(options.format_name != nullptr, "format_name");
    const Format format = find_format(options.format_name, options.file_version, FIRST_QUANTIZED);
    const InputFile file(path_in);
    const Index index = read_index(file);
    check_source(index, format);

    const Pool pool = create_pool();
    const Team team(pool, checked_threads(0));
    const Progress progress = {options.progress, options.progress_user, file.size()};
    OutputFile out(path_out, path_in);
    const int32_t header[] = {
        RWKV_FILE_MAGIC,
        (int32_t)format.version,
        (int32_t)index.shape.n_vocab,
        (int32_t)index.shape.n_embed,
        (int32_t)index.shape.n_layer,
        (int32_t)ggml_type_traits(format.type)->file_id,
    };
    static_assert(sizeof header == header_size, "a header is six numbers");
    out.write(header, sizeof header);
    for (const Tensor & tensor : index.tensors) {
        const ggml_type type = tensor.slot->kind == MATRIX ? format.type : tensor.type;
        write_record(out, tensor, type);
        write_tensor(out, file, tensor, type, options.allow_nan, team, progress);
    }
    out.commit();
}

// ==== The C API ==================================================================================

// A copy of the caller's options, as far as we know them.
template <class T> T known_options(const T * given, const T & defaults, const char * type) {
    if (given == nullptr) return defaults;
    uint32_t size;
    std::memcpy(&size, given, sizeof size);
    check_struct(given, size, sizeof(T), sizeof(T), type);
    T options;
    std::memcpy(&options, given, sizeof options);
    return options;
}

// Fills a struct of the caller as far as the caller knows it; its first version had `oldest` bytes.
template <class T> void give(T * to, const T & result, size_t oldest, const char * type) {
    check_struct(to, to->size, oldest, sizeof result, type);
    std::memcpy((void *)to, &result, std::min<size_t>(to->size, sizeof result));
}

void refuse(bool asked, const char * what) {
    if (asked) fail(RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED, "%s: not offered yet", what);
}

void check_activations(const char * activations) {
    if (activations == nullptr || std::strcmp(activations, "A16") == 0) return;
    refuse(std::strcmp(activations, "int8") == 0, "activations = int8");
    fail(RWKV_ERROR_ARGS, "unknown activations '%s' (choose A16)", escaped(activations).c_str());
}

rwkv_load_options checked_options(const rwkv_load_options * given) {
    const auto options = known_options(given, rwkv_default_load_options(), "rwkv_load_options");
    checked_threads(options.n_threads);
    refuse(options.sparse_ffn, "sparse_ffn");
    refuse(options.head != nullptr, "another format for the head");
    check_activations(options.activations);
    return options;
}

rwkv_quantize_options checked_options(const rwkv_quantize_options * given) {
    need(given != nullptr, "options");
    const auto options =
        known_options(given, rwkv_default_quantize_options(), "rwkv_quantize_options");
    refuse(options.head != nullptr, "another format for embedding and head");
    refuse(options.types != nullptr, "types of single tensors");
    refuse(options.importances != nullptr, "importances");
    if (options.method != nullptr && std::strcmp(options.method, "rtn") != 0) {
        fail(RWKV_ERROR_ARGS, "unknown method '%s' (choose rtn)", escaped(options.method).c_str());
    }
    if (options.file_version != 0 && (options.file_version < RWKV_FILE_VERSION_MIN ||
                                      options.file_version > RWKV_FILE_VERSION_MAX)) {
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_FILE_VERSION, "file_version is %u, expected 0, %d or %d",
             options.file_version, RWKV_FILE_VERSION_0, RWKV_FILE_VERSION_1);
    }
    return options;
}

void fill_memory(rwkv_memory * memory, const Index & index, const rwkv_load_options & options) {
    need(memory != nullptr, "memory");
    const Sizes sizes = sizes_of(index, options.mmap);
    Scratch scratch;
    rwkv_memory result;
    result.size = memory->size;
    result.file = index.size;
    result.mapped = sizes.mapped;
    result.weights = sizes.arena;
    result.scratch = lay_out(scratch, index.shape, nullptr) + run_memory_size(index.shape, 1, 1);
    result.state = state_length(index.shape) * sizeof(float);
    result.token = sizes.token;
    give(memory, result, offsetof(rwkv_memory, token), "rwkv_memory");
}

// f(shape of the model), or 0 without a context.
size_t size_of(const rwkv_context * ctx, size_t (*f)(const Shape &)) {
    return ctx == nullptr ? 0 : f(ctx->model->shape);
}

}  // namespace

const char * rwkv_get_last_error_message(void) {
    return last_text;
}

void rwkv_set_print_errors(rwkv_context * ctx, bool print_errors) {
    (ctx != nullptr ? ctx->print : print_by_default) = print_errors;
}

bool rwkv_get_print_errors(rwkv_context * ctx) {
    return ctx != nullptr ? ctx->print : print_by_default;
}

rwkv_error_flags rwkv_get_last_error(rwkv_context * ctx) {
    if (ctx != nullptr) return (rwkv_error_flags)ctx->flags.exchange(RWKV_ERROR_NONE);
    return (rwkv_error_flags)std::exchange(last_flags, RWKV_ERROR_NONE);
}

rwkv_context * rwkv_load(const char * path, const rwkv_load_options * given) {
    return guard(nullptr, [&] {
        need(path != nullptr, "the path of the model");
        const rwkv_load_options options = checked_options(given);
        const unsigned n_threads = checked_threads(options.n_threads);
        return create_context(load_model(path, options, n_threads), n_threads);
    });
}

rwkv_context * rwkv_init_from_file(const char * model_file_path, uint32_t n_threads) {
    rwkv_load_options options = rwkv_default_load_options();
    options.n_threads = n_threads;
    return rwkv_load(model_file_path, &options);
}

rwkv_context * rwkv_clone_context(rwkv_context * ctx, uint32_t n_threads) {
    rwkv_context_options options = rwkv_default_context_options();
    options.n_threads = n_threads;
    return rwkv_clone_context_with(ctx, &options);
}

rwkv_context * rwkv_clone_context_with(rwkv_context * ctx, const rwkv_context_options * given) {
    return guard(ctx, [&] {
        need(ctx != nullptr, "ctx");
        const auto options =
            known_options(given, rwkv_default_context_options(), "rwkv_context_options");
        check_activations(options.activations);
        return create_context(ctx->model, checked_threads(options.n_threads));
    });
}

void rwkv_free(rwkv_context * ctx) {
    delete ctx;
}

bool rwkv_estimate(const char * path, const rwkv_load_options * options, rwkv_memory * memory) {
    return guard(nullptr, [&] {
        need(path != nullptr, "the path of the model");
        fill_memory(memory, read_index(InputFile(path)), checked_options(options));
        return true;
    });
}

bool rwkv_estimate_shape(size_t n_vocab, size_t n_embed, size_t n_layer, const char * format_name,
                         const rwkv_load_options * options, rwkv_memory * memory) {
    return guard(nullptr, [&] {
        need(format_name != nullptr, "format_name");
        const ggml_type type = find_format(format_name, 0, 0).type;
        const Shape shape = {n_vocab, n_embed, n_layer, 4 * n_embed};
        fill_memory(memory, imagine_index(shape, type), checked_options(options));
        return true;
    });
}

size_t rwkv_get_n_vocab(const rwkv_context * ctx) {
    return size_of(ctx, [](const Shape & shape) { return shape.n_vocab; });
}

size_t rwkv_get_n_embed(const rwkv_context * ctx) {
    return size_of(ctx, [](const Shape & shape) { return shape.n_embed; });
}

size_t rwkv_get_n_layer(const rwkv_context * ctx) {
    return size_of(ctx, [](const Shape & shape) { return shape.n_layer; });
}

size_t rwkv_get_state_len(const rwkv_context * ctx) {
    return size_of(ctx, state_length);
}
size_t rwkv_get_logits_len(const rwkv_context * ctx) {
    return rwkv_get_n_vocab(ctx);
}

uint32_t rwkv_get_state_buffer_element_count(const rwkv_context * ctx) {
    return (uint32_t)rwkv_get_state_len(ctx);
}

uint32_t rwkv_get_logits_buffer_element_count(const rwkv_context * ctx) {
    return (uint32_t)rwkv_get_logits_len(ctx);
}

void rwkv_init_state(const rwkv_context * ctx, float * state) {
    guard(nullptr, [&] {
        need(ctx != nullptr, "ctx");
        need(state != nullptr, "state");
        initial_state(ctx->model->shape, state);
        return true;
    });
}

bool rwkv_eval(rwkv_context * ctx, uint32_t token, const float * state_in, float * state_out,
               float * logits_out) {
    return rwkv_eval_sequence(ctx, &token, 1, state_in, state_out, logits_out);
}

bool rwkv_eval_sequence(rwkv_context * ctx, const uint32_t * tokens, size_t sequence_len,
                        const float * state_in, float * state_out, float * logits_out) {
    if (ctx != nullptr && tokens == nullptr) return true;
    const rwkv_sequence sequence = {tokens, sequence_len, state_in, state_out, logits_out,
                                    1,      nullptr,      nullptr};
    return rwkv_eval_batch(ctx, &sequence, 1, sizeof sequence);
}

bool rwkv_eval_sequence_in_chunks(rwkv_context * ctx, const uint32_t * tokens, size_t sequence_len,
                                  size_t chunk_size, const float * state_in, float * state_out,
                                  float * logits_out) {
    const bool valid = guard(ctx, [&] {
        if (chunk_size == 0) fail(RWKV_ERROR_ARGS, "chunk_size is 0, expected at least 1");
        return true;
    });
    return valid && rwkv_eval_sequence(ctx, tokens, sequence_len, state_in, state_out, logits_out);
}

bool rwkv_eval_batch(rwkv_context * ctx, const rwkv_sequence * sequences, size_t n_sequences,
                     size_t sizeof_sequence) {
    return guard(ctx, [&] {
        need(ctx != nullptr, "ctx");
        if (n_sequences == 0) return true;
        need(sequences != nullptr, "sequences");
        evaluate(*ctx, sequences, n_sequences, sizeof_sequence);
        return true;
    });
}

void rwkv_interrupt(rwkv_context * ctx) {
    Phase running = RUNNING;
    if (ctx != nullptr) ctx->phase.compare_exchange_strong(running, INTERRUPTED);
}

bool rwkv_quantize_file(const char * path_in, const char * path_out,
                        const rwkv_quantize_options * options) {
    return guard(nullptr, [&] {
        quantize_file(path_in, path_out, checked_options(options));
        return true;
    });
}

bool rwkv_quantize_model_file(const char * model_file_path_in, const char * model_file_path_out,
                              const char * format_name) {
    rwkv_quantize_options options = rwkv_default_quantize_options();
    const uintptr_t number = (uintptr_t)format_name;
    const char * name = number <= 16 ? rwkv_get_format_name((uint32_t)number) : format_name;
    options.format_name = number == 0 ? nullptr : name != nullptr ? name : "a number above 9";
    return rwkv_quantize_file(model_file_path_in, model_file_path_out, &options);
}

const char * rwkv_get_format_name(uint32_t data_type) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const ggml_type_info & traits = *ggml_type_traits((ggml_type)i);
        if (traits.file_id == data_type) return traits.name;
    }
    return nullptr;
}

size_t rwkv_get_row_size(uint32_t file_version, uint32_t data_type, size_t n) {
    const ggml_type type = ggml_type_of_file(file_version, data_type);
    if (type == GGML_TYPE_COUNT || n > UINT32_MAX) return 0;
    if (ggml_type_traits(type)->quantized && n % GGML_ROW_UNIT != 0) return 0;
    return ggml_row_size(type, n);
}

uint32_t rwkv_get_api_version(void) {
    return RWKV_API_VERSION;
}

const char * rwkv_get_system_info_string(void) {
    thread_local char info[1024];
    const char * reason = "";
    const ggml_kernels * kernels = ggml_kernels_select(std::getenv("RWKV_ISA"), &reason);
    snprintf(info, sizeof info, "%s ISA=%s", ggml_cpu_features(),
             kernels != nullptr ? kernels->isa : "none");
    return info;
}

bool rwkv_measure(uint32_t n_threads, uint64_t n_bytes, rwkv_limits * limits) {
    return guard(nullptr, [&] {
        need(limits != nullptr, "limits");
        const uint32_t n = checked_threads(n_threads);
        ggml_limits measured;
        if (!ggml_measure(select_kernels(), n, n_bytes, &measured)) {
            fail(RWKV_ERROR_ARGS | RWKV_ERROR_ALLOC, "out of memory: measuring takes %llu bytes",
                 (unsigned long long)n_bytes);
        }
        const rwkv_limits result = {limits->size, n, measured.read, measured.fp32, measured.int8};
        give(limits, result, sizeof result, "rwkv_limits");
        return true;
    });
}
