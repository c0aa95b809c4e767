/* Chooses kernels: lays the levels that this CPU can run over each other, weakest first. */
#include "columns.h"

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "once.h"

static const struct ggml_kernels * const levels[] = {
    &ggml_kernels_scalar,
#ifdef GGML_ISA_sse2
    &ggml_kernels_sse2,
#endif
#ifdef GGML_ISA_avx2
    &ggml_kernels_avx2,       &ggml_kernels_stripes_avx2, /* the same level, in two files */
#endif
#ifdef GGML_ISA_avx512
    &ggml_kernels_avx512,
#endif
#ifdef GGML_ISA_avx512bf16
    &ggml_kernels_avx512bf16,
#endif
#ifdef GGML_ISA_amx
    &ggml_kernels_amx,
#endif
#ifdef GGML_ISA_neon
    &ggml_kernels_neon,
#endif
};

enum { LEVELS = sizeof levels / sizeof *levels };

/* tables[i] is levels[i] completed by those below; isa is NULL if this CPU can't run it. */
static struct ggml_kernels tables[LEVELS];
static char features_text[160];

#define TAKE(entry)                                                                                \
    if (level->entry) table->entry = level->entry

static void lay_over(struct ggml_kernels * table, const struct ggml_kernels * level) {
    table->isa = level->isa;
    table->needs |= level->needs;
    for (int type = 0; type < GGML_TYPE_COUNT; type++) TAKE(matmul[type]);
    for (int type = 0; type < GGML_TYPE_COUNT; type++) TAKE(sparse[type]);
    TAKE(add_low_rank);
    TAKE(quantize_act);
    TAKE(bf16_act);
    TAKE(layer_norm);
    TAKE(lerp);
    TAKE(exp);
    TAKE(relu2);
    TAKE(add);
    TAKE(sigmoid_mul);
    TAKE(sigmoid_mul_add);
    TAKE(wkv);
    TAKE(linear_attention);
    TAKE(read);
    TAKE(fma);
    TAKE(dot);
}

static void init(void) {
    uint32_t features = ggml_cpu_detect();
    ggml_cpu_describe(features, features_text, sizeof features_text);
    struct ggml_kernels table = {0};
    for (int i = 0; i < LEVELS; i++) {
        if (levels[i]->needs & ~features) continue;
        lay_over(&table, levels[i]);
        tables[i] = table;
    }
}

const struct ggml_kernels * ggml_kernels_select(const char * isa, const char ** reason) {
    ggml_once(init);
    for (int i = LEVELS; i-- > 0;) {
        if (isa && strcmp(isa, levels[i]->isa) != 0) continue;
        if (tables[i].isa) return &tables[i];
        if (!isa) continue;
        if (reason) *reason = "this CPU or its operating system does not support it";
        return NULL;
    }
    if (reason) *reason = "this build has no such instruction set level";
    return NULL;
}

const char * ggml_cpu_features(void) {
    ggml_once(init);
    return features_text;
}

void ggml_make_act(const struct ggml_kernels * kernels, enum ggml_type type,
                   enum ggml_activations activations, const float * x, size_t first, size_t last,
                   uint8_t * act) {
    if (type == GGML_TYPE_BF16) {
        kernels->bf16_act(last - first, x + first, act + first / 32 * GGML_BF16_WORDS * 4);
    } else if (ggml_type_traits(type)->quantized) {
        kernels->quantize_act(activations, last - first, x + first,
                              act + first / 32 * sizeof(struct ggml_act));
    }
}

static bool is_minus_zero(float y) {
    return y == 0 && signbit(y);
}

void ggml_multiply(const struct ggml_kernels * kernels, const struct ggml_matrix * w,
                   const struct ggml_input * in, float * y, size_t ldy, size_t first, size_t last) {
    if (!w->columns || in->n != 1) {
        kernels->matmul[w->type](w, in, y, ldy, first, last);
        return;
    }
    kernels->sparse[w->type](w, in, y, first, last);
    for (size_t row = first; row < last; row += GGML_STRIPE) {
        const size_t end = last - row < GGML_STRIPE ? last : row + GGML_STRIPE;
        for (size_t r = row; r < end; r++) {
            if (!is_minus_zero(y[r])) continue;
            kernels->matmul[w->type](w, in, y, ldy, row, end);
            break;
        }
    }
}

size_t ggml_row_unit(const struct ggml_matrix * w, size_t n, size_t n_threads) {
    if (!w->columns || n != 1) return GGML_ROW_UNIT;
    const size_t share = (w->rows + n_threads - 1) / n_threads; /* long pieces of columns */
    return (share + GGML_COLUMN_UNIT - 1) / GGML_COLUMN_UNIT * GGML_COLUMN_UNIT;
}
