/* Damaged model files: loads each, evaluates a token of those that are accepted, quantizes it.
 * Nothing may crash, hang or leak; run it under the sanitizers.
 *
 * As a test: fuzz_model [runs = 3000] [seed = 1] damages small valid files at random, the same on
 * every machine. With clang, `cmake --preset fuzz` makes a libFuzzer target of the same code. */
#include "rwkv.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The damaged file and the one quantizing it would write. */
static const char * path = "fuzz_model.bin";
static const char * path_out = "fuzz_model_out.bin";

/* Returns whether the file was accepted. */
static bool try_file(const uint8_t * data, size_t size) {
    FILE * file = fopen(path, "wb");
    if (file == NULL) return false;
    size_t written = fwrite(data, 1, size, file);
    if (fclose(file) != 0 || written != size) return false;

    rwkv_set_print_errors(NULL, false);
    struct rwkv_load_options options = rwkv_default_load_options();
    options.n_threads = 1;
    options.mmap = size % 2 == 0;
    struct rwkv_context * ctx = rwkv_load(path, &options);
    if (ctx != NULL) {
        float * state = calloc(rwkv_get_state_len(ctx), sizeof *state);
        float * logits = calloc(rwkv_get_logits_len(ctx), sizeof *logits);
        if (state != NULL && logits != NULL) rwkv_eval(ctx, 0, NULL, state, logits);
        free(state);
        free(logits);
        rwkv_free(ctx);
        rwkv_quantize_model_file(path, path_out, "Q4_1_O");
        remove(path_out);
    }
    remove(path);
    return ctx != NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    try_file(data, size);
    return 0;
}

#ifndef RWKV_LIBFUZZER

enum { N_VOCAB = 8, N_EMBED = 32, N_LAYER = 2, N_FFN = 64, CAPACITY = 1 << 17 };

static uint64_t random_state = 1;

static uint32_t random_below(uint32_t n) { /* Marsaglia's xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 0x2545F4914F6CDD1Dull) >> 33) % n;
}

struct buffer {
    uint8_t * data;
    size_t size;
};

static void put(struct buffer * b, const void * data, size_t size) {
    if (b->size + size > CAPACITY) return;
    memcpy(b->data + b->size, data, size);
    b->size += size;
}

static void put_int32s(struct buffer * b, size_t n, const int32_t * values) {
    put(b, values, n * sizeof *values);
}

/* A tensor of small random numbers; data type 0 (FP32), 1 (FP16) or 4 (Q4_1_O, 24 bytes per 32). */
static void put_tensor(struct buffer * b, const char * key, int32_t type, int32_t cols,
                       int32_t rows) {
    int32_t n_dims = rows == 0 ? 1 : 2;
    put_int32s(b, 5 - (rows == 0), (int32_t[]){n_dims, (int32_t)strlen(key), type, cols, rows});
    put(b, key, strlen(key));
    int32_t n = cols * (rows == 0 ? 1 : rows);
    for (int32_t i = 0; i < n; i++) {
        float value = (float)random_below(2000) / 1000.0f - 1.0f;
        uint16_t half = (uint16_t)(0x3000 + random_below(1000)); /* 0.125 and up */
        if (type == 0) put(b, &value, sizeof value);
        if (type == 1) put(b, &half, sizeof half);
        if (type == 4 && i % 32 == 0) {
            uint16_t index = (uint16_t)random_below(32);
            put(b, (uint16_t[]){half, half, index, half}, 8);
            for (int k = 0; k < 16; k++) put(b, &(uint8_t){(uint8_t)random_below(256)}, 1);
        }
    }
}

static void put_model(struct buffer * b, int32_t version, int32_t type) {
    static const char * const vectors[] = {"ln1.weight",     "ln1.bias",       "ln2.weight",
                                           "ln2.bias",       "att.time_mix_k", "att.time_mix_v",
                                           "att.time_mix_r", "att.time_first", "att.time_decay",
                                           "ffn.time_mix_k", "ffn.time_mix_r"};
    static const struct {
        const char * key;
        int32_t cols, rows;
    } matrices[] = {
        {"att.key.weight", N_EMBED, N_EMBED},        {"att.value.weight", N_EMBED, N_EMBED},
        {"att.receptance.weight", N_EMBED, N_EMBED}, {"att.output.weight", N_EMBED, N_EMBED},
        {"ffn.key.weight", N_EMBED, N_FFN},          {"ffn.value.weight", N_FFN, N_EMBED},
        {"ffn.receptance.weight", N_EMBED, N_EMBED}};
    b->size = 0;
    put_int32s(b, 6, (int32_t[]){RWKV_FILE_MAGIC, version, N_VOCAB, N_EMBED, N_LAYER, type});
    put_tensor(b, "emb.weight", type == 4 ? 1 : type, N_EMBED, N_VOCAB);
    put_tensor(b, "blocks.0.ln0.weight", 0, N_EMBED, 0);
    put_tensor(b, "blocks.0.ln0.bias", 0, N_EMBED, 0);
    for (int layer = 0; layer < N_LAYER; layer++) {
        char key[64];
        for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
            snprintf(key, sizeof key, "blocks.%d.%s", layer, vectors[i]);
            put_tensor(b, key, 0, N_EMBED, 0);
        }
        for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
            snprintf(key, sizeof key, "blocks.%d.%s", layer, matrices[i].key);
            put_tensor(b, key, type, matrices[i].cols, matrices[i].rows);
        }
    }
    put_tensor(b, "ln_out.weight", 0, N_EMBED, 0);
    put_tensor(b, "ln_out.bias", 0, N_EMBED, 0);
    put_tensor(b, "head.weight", type == 4 ? 1 : type, N_EMBED, N_VOCAB);
}

/* Damages the file the way files are damaged and forged: numbers that wrap, cuts, doublings, bits.
 */
static void damage(struct buffer * b) {
    static const int32_t nasty[] = {0,  -1,         -8,        1,     2,           3,
                                    31, 33,         64,        99,    4,           10,
                                    9,  0x7FFFFFFF, INT32_MIN, 65536, -1101697760, 1444189401};
    size_t at = random_below((uint32_t)b->size);
    if (random_below(2) != 0) at %= 512; /* half of the blows go to headers */
    size_t length = 1 + random_below(64);
    switch (random_below(6)) {
    case 0:
        b->data[at] ^= (uint8_t)(1u << random_below(8));
        break;
    case 1:
        b->size = at;
        break;
    case 2:
        if (at + 4 <= b->size)
            memcpy(b->data + at, &nasty[random_below(sizeof nasty / sizeof *nasty)], 4);
        break;
    case 3: /* a piece is lost */
        if (at + length <= b->size) {
            memmove(b->data + at, b->data + at + length, b->size - at - length);
            b->size -= length;
        }
        break;
    case 4: /* a piece is there twice */
        if (b->size + length <= CAPACITY && at + length <= b->size) {
            memmove(b->data + at + length, b->data + at, b->size - at);
            b->size += length;
        }
        break;
    default:
        b->data[at] = (uint8_t)random_below(256);
        break;
    }
    if (b->size == 0) b->size = 1;
}

int main(int argc, char ** argv) {
    long runs = argc > 1 ? strtol(argv[1], NULL, 10) : 3000;
    random_state = argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 1;
    static const int32_t kinds[][2] = {{100, 0}, {101, 0}, {101, 1}, {100, 4}}; /* version, type */
    struct buffer b = {malloc(CAPACITY), 0};
    if (b.data == NULL) return 1;
    for (long run = 0; run < runs; run++) {
        const int32_t * kind = kinds[run % 4];
        put_model(&b, kind[0], kind[1]);
        if (run < 4 && !try_file(b.data, b.size)) {
            fprintf(stderr, "a valid file was refused: %s\n", rwkv_get_last_error_message());
            return 1;
        }
        for (uint32_t blows = 1 + random_below(3); blows > 0; blows--) damage(&b);
        try_file(b.data, b.size);
    }
    free(b.data);
    printf("%ld passed, 0 failed\n", runs);
    return 0;
}

#endif
