/* The arithmetic in AVX2, FMA and F16C. */
#include "cpu.h"
#include "kernels.h"

const struct ggml_kernels ggml_kernels_avx2 = {
    .isa = "avx2",
    .requires = CPU_AVX | CPU_AVX2 | CPU_FMA | CPU_F16C,
};
