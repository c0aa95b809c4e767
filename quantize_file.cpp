#include "quantize_file.h"

#include "arch/rwkv4.h"
#include "rwkv_error.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace rwkv {

// The type that a tensor is to have: matrices `format`, the head `head` (NULL: it keeps its own).
static ggml_type new_type(const Tensor & tensor, const Format & format, const char * head) {
    if (kind_of(tensor) == MATRIX) return format.type;
    if (kind_of(tensor) != HEAD || head == nullptr) return tensor.type;
    return find_format(head, format.version, FIRST_QUANTIZED).type;
}

// Checks, before anything is written, that all of the file can be quantized.
static void check_source(const Index & index, const Format & format, const char * head) {
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
        check_row(RWKV_ERROR_FILE, index.path + ": " + what, tensor.cols,
                  new_type(tensor, format, head));
    }
}

// The number of the first weight that is NaN or infinite, or n.
static size_t first_bad(const float * x, size_t n) {
    return (size_t)(std::find_if_not(x, x + n, [](float v) { return std::isfinite(v); }) - x);
}

const uint8_t * RowConverter::operator()(size_t first_row, size_t rows, const uint8_t * bytes) {
    const size_t cols = tensor_.cols;
    const size_t in_size = ggml_row_size(tensor_.type, cols), out_size = ggml_row_size(type_, cols);
    const bool keep = type_ == tensor_.type;  // the rows are only checked
    if (rows > capacity_) {
        weights_.reset(new float[rows * cols]);
        if (!keep) result_.reset(new uint8_t[rows * out_size]);
        capacity_ = rows;
    }
    Least bad_weight, overflow;
    team_.run(rows, 1, [&](size_t first, size_t last) {
        for (size_t r = first; r < last; r++) {
            const uint8_t * in = bytes + r * in_size;
            float * x = weights_.get() + r * cols;
            ggml_dequantize_row(tensor_.type, in, x, cols);
            const size_t bad = first_bad(x, cols);
            if (bad < cols) bad_weight.offer((first_row + r) * cols + bad);
            if (keep) continue;
            uint8_t * to = result_.get() + r * out_size;
            ggml_quantize_row(type_, x, to, cols);
            ggml_dequantize_row(type_, to, x, cols);
            if (first_bad(x, cols) < cols) overflow.offer(first_row + r);
        }
    });
    if (advice_ != nullptr && bad_weight.get() != Least::none) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA,
             "%s: tensor '%s': weight [%zu, %zu] is NaN or infinite (%s)", file_.path(),
             tensor_.name.c_str(), (size_t)(bad_weight.get() / cols),
             (size_t)(bad_weight.get() % cols), advice_);
    }
    if (advice_ != nullptr && overflow.get() != Least::none) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA,
             "%s: tensor '%s': the weights of row %zu are too large for the scales of %s (%s)",
             file_.path(), tensor_.name.c_str(), (size_t)overflow.get(), type_name(type_), advice_);
    }
    return keep ? bytes : result_.get();
}

void quantize_file(const char * path_in, const char * path_out,
                   const rwkv_quantize_options & options) {
    need(path_in != nullptr, "the path of the input");
    need(path_out != nullptr, "the path of the output");
    need(options.format_name != nullptr, "format_name");
    const Format format = find_format(options.format_name, options.file_version, FIRST_QUANTIZED);
    const InputFile file(path_in);
    const Index index = read_model_index(file);
    check_source(index, format, options.head);

    const Pool pool = create_pool();
    const Team team(pool, default_threads());
    const Progress progress = {options.progress, options.progress_user, file.size()};
    OutputFile out(path_out, path_in);
    write_header(out, format.version, index.shape, format.type);
    for (const Tensor & tensor : index.tensors) {
        const ggml_type type = new_type(tensor, format, options.head);
        write_record(out, tensor, type);
        RowConverter convert(file, tensor, type, team,
                             options.allow_nan ? nullptr : "allow_nan passes it on");
        each_slab(file, tensor, 1, progress, [&](size_t first, size_t rows, const uint8_t * bytes) {
            out.write(convert(first, rows, bytes), rows * ggml_row_size(type, tensor.cols));
        });
    }
    out.commit();
}

}  // namespace rwkv
