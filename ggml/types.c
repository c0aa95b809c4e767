/* The table of types: names and numbers as files know them. How blocks lie in a file is in
 * blocks.h. */
#include "blocks.h"
#include "fp16.h"

struct type {
    struct ggml_type_info traits;
    ggml_encode * encode; /* NULL: FP32, FP16 and BF16, which have no blocks */
};

static const struct type types[GGML_TYPE_COUNT] = {
    [GGML_TYPE_FP32] = {{"FP32", 0, 100, 101, 1, 4, false}, NULL},
    [GGML_TYPE_FP16] = {{"FP16", 1, 100, 101, 1, 2, false}, NULL},
    [GGML_TYPE_Q4_0_V100] = {{"Q4_0", 2, 100, 100, 32, 20, true}, ggml_encode_q4_0_v100},
    [GGML_TYPE_Q4_1_V100] = {{"Q4_1", 3, 100, 100, 32, 24, true}, ggml_encode_q4_1_v100},
    [GGML_TYPE_Q4_1_O] = {{"Q4_1_O", 4, 100, 100, 32, 24, true}, ggml_encode_q4_1_o},
    [GGML_TYPE_Q4_2] = {{"Q4_2", 5, 100, 100, 16, 10, true}, ggml_encode_q4_2},
    [GGML_TYPE_Q4_3] = {{"Q4_3", 6, 100, 100, 16, 12, true}, ggml_encode_q4_3},
    [GGML_TYPE_Q5_0_V100] = {{"Q5_0", 7, 100, 100, 32, 22, true}, ggml_encode_q5_0},
    [GGML_TYPE_Q5_1_V100] = {{"Q5_1", 8, 100, 100, 32, 24, true}, ggml_encode_q5_1},
    [GGML_TYPE_Q8_0_V100] = {{"Q8_0", 9, 100, 100, 32, 36, true}, ggml_encode_q8_0},
    [GGML_TYPE_Q4_0] = {{"Q4_0", 2, 101, 101, 32, 18, true}, ggml_encode_q4_0},
    [GGML_TYPE_Q4_1] = {{"Q4_1", 3, 101, 101, 32, 20, true}, ggml_encode_q4_1},
    [GGML_TYPE_Q5_0] = {{"Q5_0", 7, 101, 101, 32, 22, true}, ggml_encode_q5_0},
    [GGML_TYPE_Q5_1] = {{"Q5_1", 8, 101, 101, 32, 24, true}, ggml_encode_q5_1},
    [GGML_TYPE_Q8_0] = {{"Q8_0", 9, 101, 101, 32, 34, true}, ggml_encode_q8_0},
    [GGML_TYPE_BF16] = {{"BF16", 0, 0, 0, 1, 2, false}, NULL},
};

const struct ggml_type_info * ggml_type_traits(enum ggml_type type) {
    return &types[type].traits;
}

enum ggml_type ggml_type_of_file(uint32_t version, uint32_t file_id) {
    for (int type = 0; type < GGML_FILE_TYPES; type++) {
        const struct ggml_type_info * t = &types[type].traits;
        if (t->file_id == file_id && t->first_version <= version && version <= t->last_version)
            return (enum ggml_type)type;
    }
    return GGML_TYPE_COUNT;
}

size_t ggml_row_size(enum ggml_type type, size_t n) {
    return n / types[type].traits.block_size * types[type].traits.block_bytes;
}

void ggml_quantize_row(enum ggml_type type, const float * x, void * row, size_t n) {
    const struct type * t = &types[type];
    uint8_t * bytes = row;
    if (type == GGML_TYPE_FP32) {
        memcpy(bytes, x, n * sizeof *x);
    } else if (type == GGML_TYPE_FP16) {
        for (size_t i = 0; i < n; i++) {
            uint16_t h = fp32_to_fp16(x[i]);
            memcpy(bytes + i * sizeof h, &h, sizeof h);
        }
    } else {
        for (size_t i = 0; i < n; i += t->traits.block_size) {
            struct ggml_block block;
            t->encode(x + i, &block);
            ggml_block_pack(type, &block, bytes);
            bytes += t->traits.block_bytes;
        }
    }
}

void ggml_dequantize_row(enum ggml_type type, const void * row, float * x, size_t n) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    const uint8_t * bytes = row;
    if (type == GGML_TYPE_FP32) {
        memcpy(x, bytes, n * sizeof *x);
        return;
    }
    if (type == GGML_TYPE_FP16) {
        for (size_t i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, bytes + i * sizeof h, sizeof h);
            x[i] = fp16_to_fp32(h);
        }
        return;
    }
    for (size_t i = 0; i < n; i += layout->size) {
        struct ggml_block block;
        ggml_block_unpack(type, bytes, &block);
        bytes += types[type].traits.block_bytes;
        for (int k = 0; k < layout->size; k++) {
            int q = layout->bits == 8 ? (int8_t)block.q[k] : block.q[k] - layout->zero;
            x[i + k] = (float)q * block.d;
            if (layout->min) x[i + k] += block.m;
        }
        if (ggml_block_has_outlier(&block)) x[i + block.index % 32] = block.outlier;
    }
}

static bool has_misplaced_outlier(enum ggml_type type, const uint8_t * bytes) {
    if (!ggml_layouts[type].outlier) return false;
    struct ggml_block block;
    ggml_block_unpack(type, bytes, &block);
    return ggml_block_has_outlier(&block) && block.index >= GGML_ROW_UNIT;
}

bool ggml_convert_row(enum ggml_type from, const void * row, enum ggml_type to, void * out,
                      size_t n, size_t * bad_block) {
    const uint8_t * in = row;
    uint8_t * bytes = out;
    if (from == to) {
        memcpy(out, row, ggml_row_size(to, n));
    } else if (types[from].traits.file_id == types[to].traits.file_id) {
        for (size_t i = 0; i < n; i += types[from].traits.block_size) {
            struct ggml_block block;
            ggml_block_unpack(from, in, &block);
            ggml_block_pack(to, &block, bytes);
            in += types[from].traits.block_bytes;
            bytes += types[to].traits.block_bytes;
        }
    } else {
        for (size_t i = 0; i < n; i += GGML_ROW_UNIT) {
            float x[GGML_ROW_UNIT];
            const size_t count = n - i < GGML_ROW_UNIT ? n - i : GGML_ROW_UNIT;
            if (has_misplaced_outlier(from, in)) {
                *bad_block = i / GGML_ROW_UNIT;
                return false;
            }
            ggml_dequantize_row(from, in, x, count);
            ggml_quantize_row(to, x, bytes, count);
            in += ggml_row_size(from, count);
            bytes += ggml_row_size(to, count);
        }
    }
    return true;
}
