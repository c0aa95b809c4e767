/* adapter.h: adapters, from the parts that a caller describes to what an evaluation looks up. */
#ifndef RWKV_ADAPTER_H
#define RWKV_ADAPTER_H

#include "arch/arch.h"
#include "buffer.h"
#include "model_file.h"
#include "rwkv.h"

#include <vector>

namespace rwkv {

/* Checks that the parts fit a model of these tensors, and then makes of them what the adapter
 * points to. */
Buffer build_adapter(const std::vector<Tensor> & tensors,
                     const std::vector<rwkv_adapter_part> & parts, Adapter & adapter);

}  // namespace rwkv

#endif
