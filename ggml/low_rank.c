/* Low-rank products beside matrices. A is an FP32 matrix like others. Of B, sums over few columns,
 * 16 rows lie side by side: so no sum crosses lanes. */
#include <string.h>

#include "kernels.h"

size_t ggml_low_rank_size(size_t rows, size_t rank) {
    return (rows + GGML_STRIPE - 1) / GGML_STRIPE * GGML_STRIPE * rank * sizeof(float);
}

void ggml_pack_low_rank(size_t rows, size_t rank, const void * src, size_t first, size_t n,
                        float scale, float * dst) {
    for (size_t row = 0; row < rows; row++) {
        float * to = dst + row / GGML_STRIPE * GGML_STRIPE * rank + row % GGML_STRIPE;
        for (size_t i = 0; i < n; i++) {
            float weight;
            memcpy(&weight, (const uint8_t *)src + (row * n + i) * sizeof weight, sizeof weight);
            to[(first + i) * GGML_STRIPE] = weight * scale;
        }
    }
}

void ggml_narrow(const struct ggml_kernels * kernels, const struct ggml_low_rank * w,
                 const struct ggml_input * in, float * y, size_t ldy, size_t first, size_t last) {
    const struct ggml_matrix rows = {
        GGML_TYPE_FP32, last - first, w->cols, w->a + first * w->cols, NULL,
    };
    kernels->matmul[GGML_TYPE_FP32](&rows, in, y + first, ldy, 0, rows.rows);
}
