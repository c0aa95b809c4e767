/* quantize_file.h: a copy of a model file with its matrices quantized. */
#ifndef RWKV_QUANTIZE_FILE_H
#define RWKV_QUANTIZE_FILE_H

#include "rwkv.h"

namespace rwkv {

/* As rwkv_quantize_file, for options that are offered; throws Error. */
void quantize_file(const char * path_in, const char * path_out,
                   const rwkv_quantize_options & options);

}  // namespace rwkv

#endif
