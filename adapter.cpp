#include "adapter.h"

#include "arch/rwkv4.h"
#include "rwkv_error.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <unordered_map>

namespace rwkv {

constexpr size_t max_rank = max_embed;

// ---- Checks -------------------------------------------------------------------------------------

// All of n numbers times `scale` must be finite.
static void check_finite(const std::string & where, const char * name, const float * numbers,
                         uint64_t n, float scale = 1) {
    for (uint64_t i = 0; i < n; i++) {
        float number;
        std::memcpy(&number, (const char *)numbers + i * sizeof number, sizeof number);
        if (std::isfinite(number * scale)) continue;
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_DATA, "%s: %s[%llu] is %g%s, expected a finite number",
             where.c_str(), name, (unsigned long long)i, (double)number,
             std::isfinite(number) ? ", too large for the scale" : "");
    }
}

static void check_part(const std::string & where, const Tensor & tensor,
                       const rwkv_adapter_part & part) {
    if (kind_of(tensor) == EMBEDDING) {
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED,
             "%s: an adapter cannot change the embedding (merge it into the model)", where.c_str());
    }
    if (part.rows != tensor.rows || part.cols != tensor.cols) {
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_SHAPE, "%s: is for %zu x %zu, the model has %zu x %zu",
             where.c_str(), part.rows, part.cols, tensor.rows, tensor.cols);
    }
    if (is_vector(tensor)) {
        if (part.values == nullptr || part.rank != 0 || part.a != nullptr || part.b != nullptr) {
            fail(RWKV_ERROR_ARGS, "%s: is a vector, expected values, rank 0 and neither a nor b",
                 where.c_str());
        }
        check_finite(where, "values", part.values, part.cols);
        return;
    }
    if (part.a == nullptr || part.b == nullptr || part.values != nullptr) {
        fail(RWKV_ERROR_ARGS, "%s: is a matrix, expected a and b, and no values", where.c_str());
    }
    check_dimension(RWKV_ERROR_ARGS, where, "rank", part.rank, max_rank);
    check_finite(where, "scale", &part.scale, 1);
    check_finite(where, "a", part.a, part.rank * (uint64_t)part.cols);
    check_finite(where, "b", part.b, part.rank * (uint64_t)part.rows, part.scale);
}

// ---- Making -------------------------------------------------------------------------------------

// Where the changes of tensors lie in memory at `base`; NULL just counts. Returns the number of
// bytes. Products know their rank already.
static uint64_t lay_out(std::vector<Change> & changes, const std::vector<Tensor> & tensors,
                        const std::vector<bool> & has_values, uint8_t * base) {
    uint64_t used = 0;
    const auto take = [&](uint64_t n) {
        uint8_t * p = base == nullptr ? nullptr : base + used;
        used += aligned(n);
        return (float *)p;
    };
    for (size_t i = 0; i < tensors.size(); i++) {
        const Tensor & tensor = tensors[i];
        ggml_low_rank & product = changes[i].product;
        if (has_values[i]) changes[i].values = take(tensor.cols * sizeof(float));
        if (product.rank == 0) continue;
        product.cols = tensor.cols;
        product.a = take(product.rank * (uint64_t)product.cols * sizeof(float));
        product.b = take(ggml_low_rank_size(tensor.rows, product.rank));
    }
    return used;
}

Buffer build_adapter(const std::vector<Tensor> & tensors,
                     const std::vector<rwkv_adapter_part> & parts, Adapter & adapter) {
    std::unordered_map<std::string, size_t> numbers;
    for (size_t i = 0; i < tensors.size(); i++) numbers[tensors[i].name] = i;
    std::vector<size_t> targets;
    std::vector<bool> has_values(tensors.size());
    adapter.changes.resize(tensors.size());
    for (size_t i = 0; i < parts.size(); i++) {
        const rwkv_adapter_part & part = parts[i];
        const std::string number = "part " + std::to_string(i);
        if (part.name == nullptr) fail(RWKV_ERROR_ARGS, "%s: name is NULL", number.c_str());
        const std::string where = number + ": '" + escaped(part.name) + "'";
        const auto found = numbers.find(part.name);
        if (found == numbers.end()) {
            fail(RWKV_ERROR_ARGS | RWKV_ERROR_KEY, "%s: the model has no tensor of this name",
                 where.c_str());
        }
        check_part(where, tensors[found->second], part);
        Change & change = adapter.changes[found->second];
        change.product.rank += part.rank;
        adapter.rank = std::max(adapter.rank, change.product.rank);
        if (part.rank == 0) has_values[found->second] = true;
        targets.push_back(found->second);
    }

    Buffer memory;
    memory.allocate(lay_out(adapter.changes, tensors, has_values, nullptr), "the adapter");
    std::memset(memory.data(), 0, (size_t)memory.size());
    lay_out(adapter.changes, tensors, has_values, memory.data());
    std::vector<size_t> filled(tensors.size());  // of each rank
    for (size_t i = 0; i < parts.size(); i++) {
        const rwkv_adapter_part & part = parts[i];
        const Change & change = adapter.changes[targets[i]];
        if (part.rank == 0) {
            std::memcpy((void *)change.values, (const void *)part.values,
                        part.cols * sizeof(float));
            continue;
        }
        size_t & first = filled[targets[i]];
        const ggml_low_rank & product = change.product;
        std::memcpy((void *)(product.a + first * part.cols), (const void *)part.a,
                    part.rank * part.cols * sizeof(float));
        ggml_pack_low_rank(part.rows, product.rank, part.b, first, part.rank, part.scale,
                           (float *)product.b);
        first += part.rank;
    }
    return memory;
}

}  // namespace rwkv
