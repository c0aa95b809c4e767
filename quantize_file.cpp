#include "quantize_file.h"

#include "arch/rwkv4.h"
#include "rwkv_error.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <unordered_map>
#include <vector>

namespace rwkv {

// ---- Types --------------------------------------------------------------------------------------

// One PATTERN=FORMAT of the option `types`.
struct Rule {
    std::string pattern;
    ggml_type type;

    bool matches(const std::string & name) const {
        return ("." + name + ".").find("." + pattern + ".") != std::string::npos;
    }
};

static std::vector<Rule> parse_types(const char * types, uint32_t version) {
    std::vector<Rule> rules;
    const std::string all = types;
    for (size_t first = 0, comma = 0; comma != std::string::npos; first = comma + 1) {
        comma = all.find(',', first);
        const std::string part = all.substr(first, comma - first);
        const size_t equals = part.find('=');
        if (equals == 0 || equals == std::string::npos) {
            fail(RWKV_ERROR_ARGS, "types: '%s' is not PATTERN=FORMAT, as in ffn.value=Q5_1",
                 escaped(part).c_str());
        }
        const std::string name = part.substr(equals + 1);
        rules.push_back({part.substr(0, equals), find_format(name.c_str(), version, 0).type});
    }
    return rules;
}

// The types that tensors are to have, one after the other.
static std::vector<ggml_type> new_types(const Index & index, const Format & format,
                                        const rwkv_quantize_options & options) {
    std::vector<ggml_type> types;
    for (const Tensor & tensor : index.tensors) {
        types.push_back(kind_of(tensor) == MATRIX ? format.type : tensor.type);
        if (kind_of(tensor) == HEAD && options.head != nullptr) {
            types.back() = find_format(options.head, format.version, FIRST_QUANTIZED).type;
        }
    }
    if (options.types == nullptr) return types;
    for (const Rule & rule : parse_types(options.types, format.version)) {
        const Tensor * vector = nullptr;
        bool found = false;
        for (size_t i = 0; i < types.size(); i++) {
            const Tensor & tensor = index.tensors[i];
            if (!rule.matches(tensor.name)) continue;
            if (is_vector(tensor)) {
                vector = &tensor;
            } else {
                types[i] = rule.type;
                found = true;
            }
        }
        if (found) continue;
        const std::string pattern = escaped(rule.pattern);
        if (vector != nullptr) {
            fail(RWKV_ERROR_ARGS, "types: '%s' matches vectors only, such as %s: they stay FP32",
                 pattern.c_str(), vector->name.c_str());
        }
        fail(RWKV_ERROR_ARGS,
             "types: '%s' matches no tensor of %s (give a whole part of a name, as ffn.value is "
             "of blocks.0.ffn.value.weight)",
             pattern.c_str(), index.path.c_str());
    }
    return types;
}

// Checks, before anything is written, that all of the file can be quantized.
static void check_source(const Index & index, const std::vector<ggml_type> & types) {
    const auto refuse_quantized = [&](const std::string & what, ggml_type type) {
        if (!ggml_type_traits(type)->quantized) return;
        fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA_TYPE,
             "%s: %s is already %s (quantize the original FP16 or FP32 file)", index.path.c_str(),
             what.c_str(), type_name(type));
    };
    refuse_quantized("the file", index.type);
    for (size_t i = 0; i < types.size(); i++) {
        const Tensor & tensor = index.tensors[i];
        const std::string what = "tensor '" + tensor.name + "'";
        refuse_quantized(what, tensor.type);
        check_row(RWKV_ERROR_FILE, index.path + ": " + what, tensor.cols, types[i]);
    }
}

// ---- Methods ------------------------------------------------------------------------------------

enum Method { RTN, MSE, IMPORTANCE };

static Method find_method(const rwkv_quantize_options & options) {
    const std::string name = options.method != nullptr        ? options.method
                             : options.importances != nullptr ? "importance"
                                                              : "rtn";
    const bool importance = name == "importance";
    if (!importance && name != "mse" && name != "rtn") {
        fail(RWKV_ERROR_ARGS, "unknown method '%s' (choose rtn, mse or importance)",
             escaped(name).c_str());
    }
    if (importance && options.importances == nullptr) {
        fail(RWKV_ERROR_ARGS, "method importance needs importances, the path of a file of them "
                              "(`rwkv importance` makes one)");
    }
    if (!importance && options.importances != nullptr) {
        fail(RWKV_ERROR_ARGS, "importances are given, but method is %s (choose importance)",
             name.c_str());
    }
    return importance ? IMPORTANCE : name == "mse" ? MSE : RTN;
}

// A matrix's importances, by its name: a number for each column.
using Importances = std::unordered_map<std::string, std::vector<float>>;

static void check_importances(const Index & index, const Index & model) {
    const char * path = index.path.c_str();
    const Shape & found = index.shape;
    const Shape & expected = model.shape;
    if (found.n_vocab != expected.n_vocab || found.n_embed != expected.n_embed ||
        found.n_layer != expected.n_layer) {
        fail(RWKV_ERROR_FILE | RWKV_ERROR_SHAPE,
             "%s: importances of another model, of n_vocab %zu, n_embed %zu, n_layer %zu; those of "
             "%s are %zu, %zu, %zu",
             path, found.n_vocab, found.n_embed, found.n_layer, model.path.c_str(),
             expected.n_vocab, expected.n_embed, expected.n_layer);
    }
    for (const Tensor & tensor : index.tensors) {
        const char * name = tensor.name.c_str();
        if (tensor.dims.size() != 1 || tensor.type != GGML_TYPE_FP32) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_SHAPE,
                 "%s: tensor '%s' is no FP32 vector, as importances are (`rwkv importance` makes "
                 "such a file)",
                 path, name);
        }
        if (model.names.count(tensor.name) == 0) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_KEY,
                 "%s: importances of another model: %s has no tensor '%s'", path,
                 model.path.c_str(), name);
        }
    }
}

// The importances of those matrices that are to be quantized, from a file that has a vector for
// each, of the same name.
static Importances read_importances(const char * path, const Index & model,
                                    const std::vector<ggml_type> & types) {
    const InputFile file(path);
    const Index index = read_index(file);
    check_importances(index, model);
    Importances importances;
    for (size_t i = 0; i < types.size(); i++) {
        const Tensor & matrix = model.tensors[i];
        const Kind kind = kind_of(matrix);
        if ((kind != MATRIX && kind != HEAD) || !ggml_type_traits(types[i])->quantized) continue;
        const char * name = matrix.name.c_str();
        const auto found = std::find_if(index.tensors.begin(), index.tensors.end(),
                                        [&](const Tensor & t) { return t.name == matrix.name; });
        if (found == index.tensors.end()) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_PARAM_MISSING, "%s: has no importances of '%s'", path,
                 name);
        }
        if (found->cols != matrix.cols) {
            fail(RWKV_ERROR_FILE | RWKV_ERROR_SHAPE,
                 "%s: tensor '%s' has %zu importances, expected %zu, the columns of the matrix",
                 path, name, found->cols, matrix.cols);
        }
        std::vector<float> & values = importances[matrix.name];
        values.resize(matrix.cols);
        file.read(found->offset, values.data(), values.size() * sizeof(float));
        for (size_t k = 0; k < values.size(); k++) {
            if (values[k] >= 0 && std::isfinite(values[k])) continue;
            fail(RWKV_ERROR_FILE | RWKV_ERROR_DATA,
                 "%s: tensor '%s': importance %zu is %g, expected a finite number, 0 or more", path,
                 name, k, (double)values[k]);
        }
    }
    return importances;
}

// ---- Rows ---------------------------------------------------------------------------------------

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
            if (search_) {
                ggml_search_row(type_, x, importances_, to, cols);
            } else {
                ggml_quantize_row(type_, x, to, cols);
            }
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
             "%s: tensor '%s': the weights of row %zu are too large for %s (%s)", file_.path(),
             tensor_.name.c_str(), (size_t)overflow.get(), type_name(type_), advice_);
    }
    return keep ? bytes : result_.get();
}

// ---- The file -----------------------------------------------------------------------------------

void quantize_file(const char * path_in, const char * path_out,
                   const rwkv_quantize_options & options) {
    need(path_in != nullptr, "the path of the input");
    need(path_out != nullptr, "the path of the output");
    need(options.format_name != nullptr, "format_name");
    const Format format = find_format(options.format_name, options.file_version, FIRST_QUANTIZED);
    const Method method = find_method(options);
    const InputFile file(path_in);
    const Index index = read_model_index(file);
    const std::vector<ggml_type> types = new_types(index, format, options);
    check_source(index, types);
    Importances importances;
    if (method == IMPORTANCE) importances = read_importances(options.importances, index, types);

    const Pool pool = create_pool();
    const Team team(pool, default_threads());
    const Progress progress = {options.progress, options.progress_user, file.size()};
    OutputFile out(path_out, {path_in, options.importances});
    write_header(out, format.version, index.shape, format.type);
    for (size_t i = 0; i < types.size(); i++) {
        const Tensor & tensor = index.tensors[i];
        write_record(out, tensor, types[i]);
        RowConverter convert(file, tensor, types[i], team,
                             options.allow_nan ? nullptr : "allow_nan passes it on");
        const auto found = importances.find(tensor.name);
        if (method != RTN) {
            convert.search(found == importances.end() ? nullptr : found->second.data());
        }
        each_slab(file, tensor, 1, progress, [&](size_t first, size_t rows, const uint8_t * bytes) {
            out.write(convert(first, rows, bytes), rows * ggml_row_size(types[i], tensor.cols));
        });
    }
    out.commit();
}

}  // namespace rwkv
