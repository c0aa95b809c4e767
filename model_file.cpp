#include "model_file.h"

#include "rwkv_error.h"

#include <cstring>
#include <utility>

namespace rwkv {

constexpr size_t max_dims = 3;
constexpr size_t max_name = 255;

// ---- Types and checks ---------------------------------------------------------------------------

const char * type_name(ggml_type type) {
    return ggml_type_traits(type)->name;
}

const char * format_name(uint32_t data_type) {
    for (int i = 0; i < GGML_FILE_TYPES; i++) {
        const ggml_type_info & traits = *ggml_type_traits((ggml_type)i);
        if (traits.file_id == data_type) return traits.name;
    }
    return nullptr;
}

// The names of all formats from data type `first` on.
static std::string format_names(uint32_t first) {
    std::string names;
    for (uint32_t id = first; const char * name = format_name(id); id++) {
        names += (names.empty() ? "" : ", ") + std::string(name);
    }
    return names;
}

Format find_format(const char * name, uint32_t version, uint32_t first) {
    Format found = {0, GGML_TYPE_COUNT};
    bool known = false;
    for (int i = 0; i < GGML_FILE_TYPES; i++) {
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

// ---- Reading ------------------------------------------------------------------------------------

// The type that a file of `version` means by `id`.
static ggml_type read_type(const std::string & where, uint32_t version, int32_t id) {
    static const char * const later[] = {"Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"};
    const ggml_type type = id < 0 ? GGML_TYPE_COUNT : ggml_type_of_file(version, (uint32_t)id);
    if (type != GGML_TYPE_COUNT) return type;
    const char * name = id < 0 ? nullptr : format_name((uint32_t)id);
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

// Names what `head`, the beginning of a file, belongs to, and says what to do with it.
static const char * recognise(const std::string & head) {
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

static void read_header(const InputFile & file, Index & index) {
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

static Tensor read_record(Cursor & cursor, const Index & index) {
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
    return index;
}

void Progress::operator()(uint64_t done) const {
    if (callback != nullptr && !callback(user, done, total)) {
        fail(RWKV_ERROR_CTX, "cancelled by the progress callback");
    }
}

// ---- Writing ------------------------------------------------------------------------------------

void write_header(OutputFile & out, uint32_t version, const Shape & shape, ggml_type type) {
    const int32_t header[] = {
        RWKV_FILE_MAGIC,        (int32_t)version,       (int32_t)shape.n_vocab,
        (int32_t)shape.n_embed, (int32_t)shape.n_layer, (int32_t)ggml_type_traits(type)->file_id,
    };
    static_assert(sizeof header == header_size, "a header is six numbers");
    out.write(header, sizeof header);
}

void write_record(OutputFile & out, const Tensor & tensor, ggml_type type) {
    std::vector<int32_t> numbers = {(int32_t)tensor.dims.size(), (int32_t)tensor.name.size(),
                                    (int32_t)ggml_type_traits(type)->file_id};
    numbers.insert(numbers.end(), tensor.dims.rbegin(), tensor.dims.rend());
    out.write(numbers.data(), numbers.size() * sizeof(int32_t));
    out.write(tensor.name.data(), tensor.name.size());
}

uint64_t record_size(const Tensor & tensor) {
    return (3 + tensor.dims.size()) * sizeof(int32_t) + tensor.name.size();
}

}  // namespace rwkv
