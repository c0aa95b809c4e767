/* One number per format, and one for RWKV-4a with an adapter: a hash of logits and state after some
 * tokens of the model given. It is the same for one token at a time, a sequence, a batch, and for
 * 1, 2 and 3 threads, which is checked here; and on every CPU and level, for which emulated.sh
 * compares what this prints. */
#define _GNU_SOURCE

#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "fp16.h"
#include "rwkv.h"

enum { MOST_TOKENS = 64, MOST_WEIGHTS = 1 << 20, TINY = 24, RANK = 5 };

static uint32_t tokens[MOST_TOKENS];
static size_t n_tokens = 16;
static int n_layers = 1000;
static float *logits, *state, *other;
static struct rwkv_adapter * adapter; /* NULL: none */

static void stop(const char * what) {
    printf("error: %s: %s\n", what, rwkv_get_last_error_message());
    exit(2);
}

/* ---- Models --------------------------------------------------------------------------------- */

static float random_weights[MOST_WEIGHTS];

/* Layer 0's, in FP32. */
static void write_tiny_attention(FILE * out, int32_t n_embed) {
    static const struct {
        const char * name;
        int32_t rows; /* 0: a vector; -1: n_embed */
    } tensors[] = {{"blocks.0.tiny_ln.weight", 0},
                   {"blocks.0.tiny_ln.bias", 0},
                   {"blocks.0.tiny_q.weight", TINY},
                   {"blocks.0.tiny_k.weight", TINY},
                   {"blocks.0.tiny_v.weight", -1}};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const int32_t dimensions = tensors[i].rows == 0 ? 1 : 2;
        const int32_t rows = tensors[i].rows < 0 ? n_embed : tensors[i].rows;
        const size_t length = strlen(tensors[i].name);
        const size_t n = (size_t)n_embed * (size_t)(dimensions == 2 ? rows : 1);
        const int32_t record[5] = {dimensions, (int32_t)length, 0, n_embed, rows};
        fwrite(record, 4, 3 + (size_t)dimensions, out);
        fwrite(tensors[i].name, length, 1, out);
        fwrite(random_weights, sizeof(float), n, out);
    }
}

/* A copy of a model, of its first layers only, with matrices in FP32 or FP16, so that it can be
 * quantized; as RWKV-4a if wanted. */
static void widen_model(const char * from, const char * to, int32_t type, bool tiny) {
    static uint8_t bytes[4 * MOST_WEIGHTS];
    static float x[MOST_WEIGHTS];
    static uint16_t halves[MOST_WEIGHTS];
    char name[256];
    int32_t header[6], record[5] = {0};
    FILE *in = fopen(from, "rb"), *out = fopen(to, "wb");
    if (!in || !out || fread(header, sizeof header, 1, in) != 1) stop(from);
    if (header[4] > n_layers) header[4] = n_layers;
    header[5] = type;
    fwrite(header, sizeof header, 1, out);
    while (fread(record, 12, 1, in) == 1) { /* dimensions, length of the name, type */
        const size_t dimensions = (size_t)record[0], length = (size_t)record[1];
        if (dimensions > 2 || length > sizeof name || fread(record + 3, 4, dimensions, in) == 0 ||
            fread(name, length, 1, in) != 1)
            stop(from);
        const size_t n = (size_t)record[3] * (dimensions == 2 ? (size_t)record[4] : 1);
        const size_t size =
            n / (size_t)record[3] *
            rwkv_get_row_size(RWKV_FILE_VERSION, (uint32_t)record[2], (size_t)record[3]);
        if (n > MOST_WEIGHTS || fread(bytes, size, 1, in) != 1) stop(from);
        if (strncmp(name, "blocks.", 7) == 0 && atoi(name + 7) >= n_layers) continue;
        for (size_t i = 0; i < n; i++) {
            uint16_t half;
            switch (record[2]) {
            case 0:
                memcpy(&x[i], bytes + 4 * i, 4);
                break;
            case 1:
                memcpy(&half, bytes + 2 * i, 2);
                x[i] = fp16_to_fp32(half);
                break;
            case 9: /* half d, int8 q[32] */
                memcpy(&half, bytes + i / 32 * 34, 2);
                x[i] = fp16_to_fp32(half) * (float)(int8_t)bytes[i / 32 * 34 + 2 + i % 32];
                break;
            default:
                stop("only FP32, FP16 and Q8_0 are widened");
            }
            halves[i] = fp32_to_fp16(x[i]);
        }
        record[2] = dimensions == 2 ? type : 0;
        fwrite(record, 4, 3 + dimensions, out);
        fwrite(name, length, 1, out);
        if (record[2] == 0) {
            fwrite(x, sizeof *x, n, out);
        } else {
            fwrite(halves, sizeof *halves, n, out);
        }
    }
    if (tiny) write_tiny_attention(out, header[3]);
    fclose(in);
    fclose(out);
}

/* ---- Hashes --------------------------------------------------------------------------------- */

/* FNV-1a of `logits` and `state`. */
static uint64_t hash(const struct rwkv_context * ctx) {
    uint64_t h = 0xCBF29CE484222325;
    for (size_t i = 0; i < rwkv_get_logits_len(ctx) + rwkv_get_state_len(ctx); i++) {
        const size_t n = rwkv_get_logits_len(ctx);
        h = (h ^ bits_of(i < n ? logits[i] : state[i - n])) * 0x100000001B3;
    }
    return h;
}

/* One sequence, with the adapter if there is one. */
static void evaluate(struct rwkv_context * ctx, size_t first, size_t n, const float * state_in) {
    const struct rwkv_sequence one = {.tokens = tokens + first,
                                      .n_tokens = n,
                                      .state_in = state_in,
                                      .state_out = state,
                                      .logits_out = logits,
                                      .n_logits = 1,
                                      .adapter = adapter};
    const bool fine = adapter ? rwkv_eval_batch(ctx, &one, 1, sizeof one)
                      : n == 1
                          ? rwkv_eval(ctx, tokens[first], state_in, state, logits)
                          : rwkv_eval_sequence(ctx, tokens + first, n, state_in, state, logits);
    if (!fine) stop("evaluation");
}

static uint64_t decode(struct rwkv_context * ctx) {
    rwkv_init_state(ctx, state);
    for (size_t i = 0; i < n_tokens; i++) evaluate(ctx, i, 1, state);
    return hash(ctx);
}

static uint64_t sequence(struct rwkv_context * ctx) {
    evaluate(ctx, 0, n_tokens, NULL);
    return hash(ctx);
}

/* First the beginning, together with a sequence that goes on elsewhere and has no adapter; then the
 * rest. */
static uint64_t batch(struct rwkv_context * ctx) {
    const size_t middle = n_tokens / 2;
    struct rwkv_sequence both[2] = {
        {.tokens = tokens, .n_tokens = middle, .state_out = state, .adapter = adapter},
        {.tokens = tokens + 1, .n_tokens = 1, .state_out = other},
    };
    if (!rwkv_eval_batch(ctx, both, 2, sizeof *both)) stop("batch");
    both[0] = (struct rwkv_sequence){.tokens = tokens + middle,
                                     .n_tokens = n_tokens - middle,
                                     .state_in = state,
                                     .state_out = state,
                                     .logits_out = logits,
                                     .n_logits = 1,
                                     .adapter = adapter};
    both[1].state_in = other;
    if (!rwkv_eval_batch(ctx, both, 2, sizeof *both)) stop("batch");
    return hash(ctx);
}

/* Of three tensors of the first layer, those of RWKV-4a among them. */
static struct rwkv_adapter * create_adapter(struct rwkv_context * model) {
    const size_t n = rwkv_get_n_embed(model);
    const struct rwkv_adapter_part parts[] = {
        {"blocks.0.ffn.value.weight", n, 4 * n, RANK, random_weights, random_weights, 0.5f, NULL},
        {"blocks.0.tiny_v.weight", n, n, RANK, random_weights, random_weights, 0.5f, NULL},
        {.name = "blocks.0.ln1.bias", .rows = 1, .cols = n, .values = random_weights},
    };
    struct rwkv_adapter * created =
        rwkv_create_adapter(model, parts, sizeof parts / sizeof *parts, sizeof *parts);
    if (!created) stop("adapter");
    return created;
}

static void print_hash(struct rwkv_context * model, const char * name, const char * activations) {
    static const struct {
        const char * name;
        uint64_t (*run)(struct rwkv_context *);
    } ways[] = {{"decode", decode}, {"sequence", sequence}, {"batch", batch}};
    struct rwkv_context_options options = rwkv_default_context_options();
    options.activations = activations;
    adapter = strchr(name, '+') ? create_adapter(model) : NULL;
    uint64_t first = 0;
    for (options.n_threads = 1; options.n_threads <= 3; options.n_threads++) {
        struct rwkv_context * ctx = rwkv_clone_context_with(model, &options);
        if (!ctx) stop(name);
        for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
            const uint64_t h = ways[i].run(ctx);
            if (first == 0) first = h;
            check(h == first, "%s, %s, %s on %u threads: %016llx, but %016llx one by one", name,
                  activations, ways[i].name, options.n_threads, (unsigned long long)h,
                  (unsigned long long)first);
        }
        rwkv_free(ctx);
    }
    rwkv_free_adapter(adapter);
    printf("%-10s %-4s %016llx\n", name, activations, (unsigned long long)first);
    fflush(stdout);
}

static struct rwkv_context * load(const char * path, const char * name, const char * activations) {
    struct rwkv_load_options options = rwkv_default_load_options();
    options.activations = activations;
    struct rwkv_context * model = rwkv_load(path, &options);
    if (!model) stop(name);
    return model;
}

static void print_hashes(const char * path, const char * name) {
    const bool quantized = name[0] == 'Q';
    struct rwkv_context * model = load(path, name, "A16");
    logits = malloc(rwkv_get_logits_len(model) * sizeof *logits);
    state = malloc(rwkv_get_state_len(model) * sizeof *state);
    other = malloc(rwkv_get_state_len(model) * sizeof *other);
    print_hash(model, name, "A16");
    if (!quantized) {
        rwkv_free(model);
        model = load(path, name, "bf16");
    }
    print_hash(model, name, quantized ? "int8" : "bf16");
    free(logits);
    free(state);
    free(other);
    rwkv_free(model);
}

int main(int argc, char ** argv) {
    char folder[] = "/tmp/rwkv-hash-XXXXXX", source[64], target[64], name[32];
    if (argc > 2) n_tokens = (size_t)atoi(argv[2]);
    if (argc > 3) n_layers = atoi(argv[3]);
    if (argc < 2 || n_layers < 1 || n_tokens < 2 || n_tokens > MOST_TOKENS || !mkdtemp(folder)) {
        printf("usage: %s MODEL [TOKENS [LAYERS]]\n", argv[0]);
        return 2;
    }
    fprintf(stderr, "%s\n", rwkv_get_system_info_string());
    for (size_t i = 0; i < MOST_TOKENS; i++) tokens[i] = random_below(256);
    for (size_t i = 0; i < MOST_WEIGHTS; i++) random_weights[i] = random_normal() / 16;
    snprintf(source, sizeof source, "%s/source.bin", folder);
    snprintf(target, sizeof target, "%s/target.bin", folder);
    widen_model(argv[1], source, 1, false);
    print_hashes(source, "FP16");
    widen_model(argv[1], source, 0, false);
    print_hashes(source, "FP32");
    for (uint32_t version = RWKV_FILE_VERSION_MIN; version <= RWKV_FILE_VERSION_MAX; version++) {
        for (uint32_t type = 2; type <= 9; type++) {
            if (rwkv_get_row_size(version, type, 32) == 0) continue;
            struct rwkv_quantize_options options = rwkv_default_quantize_options();
            options.format_name = rwkv_get_format_name(type);
            options.file_version = version;
            snprintf(name, sizeof name, "%s.%u", options.format_name, version);
            if (!rwkv_quantize_file(source, target, &options)) stop(name);
            print_hashes(target, name);
        }
    }
    widen_model(argv[1], source, 0, true);
    print_hashes(source, "4a+LoRA");
    unlink(source);
    unlink(target);
    rmdir(folder);
    return failed != 0;
}
