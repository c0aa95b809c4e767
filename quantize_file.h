/* quantize_file.h: a copy of a model file with its matrices quantized. */
#ifndef RWKV_QUANTIZE_FILE_H
#define RWKV_QUANTIZE_FILE_H

#include "file.h"
#include "model_file.h"
#include "rwkv.h"
#include "team.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace rwkv {

/* The rows of a tensor in another type, by that type's rule; in its own, they are checked only. */
class RowConverter {
  public:
    /* advice: how to get around the Error about weights that are not finite, or too large for the
     * type's scales; NULL: there is none, they are passed on. */
    RowConverter(const InputFile & file, const Tensor & tensor, ggml_type type, const Team & team,
                 const char * advice)
        : file_(file), tensor_(tensor), type_(type), team_(team), advice_(advice) {}

    /* From now on scales are searched. importances: of the columns; NULL: all matter alike. */
    void search(const float * importances) {
        search_ = true;
        importances_ = importances;
    }

    /* For each_slab. The result is valid until the next call. */
    const uint8_t * operator()(size_t first_row, size_t rows, const uint8_t * bytes);

  private:
    const InputFile & file_;
    const Tensor & tensor_;
    const ggml_type type_;
    const Team & team_;
    const char * const advice_;
    bool search_ = false;
    const float * importances_ = nullptr;
    size_t capacity_ = 0; /* rows */
    std::unique_ptr<float[]> weights_;
    std::unique_ptr<uint8_t[]> result_;
};

/* As rwkv_quantize_file, for options that are offered; throws Error. */
void quantize_file(const char * path_in, const char * path_out,
                   const rwkv_quantize_options & options);

}  // namespace rwkv

#endif
