#include "quantize_file.h"

#include "arch/rwkv4.h"
#include "file.h"
#include "model_file.h"
#include "rwkv_error.h"
#include "team.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace rwkv {

// Checks, before anything is written, that all of the file can be quantized.
static void check_source(const Index & index, const Format & format) {
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
        if (kind_of(tensor) != MATRIX) continue;
        check_row(RWKV_ERROR_FILE, index.path + ": " + what, tensor.cols, format.type);
    }
}

// The number of the first weight that is NaN or infinite, or n.
static size_t first_bad(const float * x, size_t n) {
    return (size_t)(std::find_if_not(x, x + n, [](float v) { return std::isfinite(v); }) - x);
}

// Copies a tensor, its rows in `type`.
static void write_tensor(OutputFile & out, const InputFile & file, const Tensor & tensor,
                         ggml_type type, bool allow_nan, const Team & team,
                         const Progress & progress) {
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
    const Index index = read_model_index(file);
    check_source(index, format);

    const Pool pool = create_pool();
    const Team team(pool, default_threads());
    const Progress progress = {options.progress, options.progress_user, file.size()};
    OutputFile out(path_out, path_in);
    write_header(out, format.version, index.shape, format.type);
    for (const Tensor & tensor : index.tensors) {
        const ggml_type type = kind_of(tensor) == MATRIX ? format.type : tensor.type;
        write_record(out, tensor, type);
        write_tensor(out, file, tensor, type, options.allow_nan, team, progress);
    }
    out.commit();
}

}  // namespace rwkv
