/* What this CPU and its operating system offer. */
#ifndef GGML_CPU_H
#define GGML_CPU_H

#include <stddef.h>
#include <stdint.h>

enum {
    CPU_SSE2 = 1 << 0,
    CPU_AVX = 1 << 1,
    CPU_AVX2 = 1 << 2,
    CPU_FMA = 1 << 3,
    CPU_F16C = 1 << 4,
    CPU_AVX512F = 1 << 5,
    CPU_AVX512BW = 1 << 6,
    CPU_AVX512DQ = 1 << 7,
    CPU_AVX512VL = 1 << 8,
    CPU_AVX512VNNI = 1 << 9,
    CPU_NEON = 1 << 10,
    CPU_DOTPROD = 1 << 11,
    CPU_I8MM = 1 << 12,
    CPU_AMX_INT8 = 1 << 13,    /* and its tiles */
    CPU_AMX_REFUSED = 1 << 14, /* the CPU has it, the operating system does not let us use it */
    CPU_AVX512BF16 = 1 << 15,
    CPU_AMX_BF16 = 1 << 16,
};

/* Asks the CPU, which is slow under a hypervisor, and where it has tiles asks the system to let
 * this process use them; so kernels.c asks once. */
uint32_t ggml_cpu_detect(void);

/* Writes "AVX=1 AVX2=1 …", the features of this architecture, to text: 1, 0 or, if the operating
 * system keeps tiles from us, "refused". */
void ggml_cpu_describe(uint32_t features, char * text, size_t size);

#endif
