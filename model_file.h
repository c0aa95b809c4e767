/* model_file.h: "ggmf" files: a header and records, one per tensor. What the tensors mean is known
 * to arch/ alone. */
#ifndef RWKV_MODEL_FILE_H
#define RWKV_MODEL_FILE_H

#include "file.h"
#include "ggml/ggml.h"
#include "rwkv.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

namespace rwkv {

constexpr size_t max_vocab = 1 << 20;
constexpr size_t max_embed = 1 << 16;
constexpr size_t max_layers = 1 << 10;
constexpr size_t max_ffn = 1 << 20;
constexpr size_t max_tiny = 1 << 12;

struct Slot; /* what a model uses a tensor for: its arch knows */

struct Tensor {
    std::string name;
    ggml_type type;
    std::vector<size_t> dims; /* (rows, cols) or (n): the contiguous one last */
    size_t rows, cols;
    uint64_t offset, size; /* of the data in the file, in bytes */
    const Slot * slot;     /* this and the layer are set by the arch */
    size_t layer;
};

struct Shape {
    size_t n_vocab, n_embed, n_layer;
    /* Set by the arch, from the tensors: the header does not say them. */
    size_t n_ffn;
    size_t n_tiny, tiny_layer; /* RWKV-4a's tiny attention; RWKV-4: 0 and n_layer */
};

/* What a file holds, or would hold. */
struct Index {
    std::string path;
    uint64_t size = 0;
    uint32_t version = 0;
    ggml_type type =
        GGML_TYPE_COUNT; /* of most matrices, says the header; each tensor has its own */
    Shape shape = {};
    std::vector<Tensor> tensors;
    std::unordered_set<std::string> names; /* of the tensors */
};

/* ---- Reading -------------------------------------------------------------------------------- */

/* Reads a file's table of tensors and checks it as far as the format goes; nothing of the size of
 * the data is allocated. */
Index read_index(const InputFile & file);

struct Progress {
    rwkv_progress callback;
    void * user;
    uint64_t total;

    void operator()(uint64_t done) const; /* an Error if the callback cancels */
};

/* Reads the rows of a tensor a few MiB at a time and calls f(first_row, rows, bytes) for each slab,
 * which is a multiple of `unit` rows (the last may be shorter). */
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

/* ---- Writing -------------------------------------------------------------------------------- */

void write_header(OutputFile & out, uint32_t version, const Shape & shape, ggml_type type);
void write_record(OutputFile & out, const Tensor & tensor, ggml_type type); /* all but the data */

constexpr size_t header_size = 6 * sizeof(int32_t);
uint64_t record_size(const Tensor & tensor);

/* ---- Types and checks ----------------------------------------------------------------------- */

const char * type_name(ggml_type type);
const char * format_name(uint32_t data_type); /* in a file; NULL: there is none */

struct Format {
    uint32_t version;
    ggml_type type;
};

constexpr uint32_t FIRST_QUANTIZED = 2; /* data types of a file: FP32, FP16, and then these */

/* The format called `name` in files of `version`; 0 is the newest version that has it. `first`: the
 * first data type that will do. */
Format find_format(const char * name, uint32_t version, uint32_t first);

/* An Error of this category unless rows of `cols` weights can be of this type. */
void check_row(int category, const std::string & where, size_t cols, ggml_type type);

/* value, or an Error of this category unless it is 1 to limit. */
size_t check_dimension(int category, const std::string & where, const char * name, size_t value,
                       size_t limit);

}  // namespace rwkv

#endif
