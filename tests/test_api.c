/* rwkv.h from the outside: arguments, buffers, threads, files, failures. What the numbers are is
 * tested elsewhere (test_model.py); here they must be the same bits whichever way they are asked
 * for. */
#define _GNU_SOURCE

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <dirent.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "check.h"
#include "fault_injection.h"
#include "rwkv.h"

enum { N_VOCAB = 40, N_EMBED = 32, N_LAYER = 2, N_FFN = 96 };
enum { STATE = 5 * N_EMBED * N_LAYER, N_TOKENS = 600 };

static char folder[] = "/tmp/rwkv-test-XXXXXX";
static char model_path[64], output_path[64];
static uint32_t tokens[N_TOKENS];

/* The results of all of `tokens`, one by one: what every other way must give. */
static float wanted_logits[N_TOKENS][N_VOCAB];
static float wanted_states[N_TOKENS][STATE];

/* ---- A model ------------------------------------------------------------------------------------
 */

static void write_tensor(FILE * file, const char * name, int rows, int cols, float mean,
                         float deviation) {
    const int32_t record[] = {rows ? 2 : 1, (int32_t)strlen(name), 0, cols, rows};
    fwrite(record, sizeof *record, rows ? 5 : 4, file);
    fwrite(name, 1, strlen(name), file);
    for (int i = 0; i < (rows ? rows : 1) * cols; i++) {
        const float weight = mean + deviation * random_normal();
        fwrite(&weight, sizeof weight, 1, file);
    }
}

static void write_model(const char * path) {
    static const struct {
        const char * name;
        int rows, cols;
        float mean, deviation;
    } layer[] = {
        {"ln1.weight", 0, N_EMBED, 1, 0.1f},
        {"ln1.bias", 0, N_EMBED, 0, 0.1f},
        {"ln2.weight", 0, N_EMBED, 1, 0.1f},
        {"ln2.bias", 0, N_EMBED, 0, 0.1f},
        {"att.time_mix_k", 0, N_EMBED, 0.5f, 0.2f},
        {"att.time_mix_v", 0, N_EMBED, 0.5f, 0.2f},
        {"att.time_mix_r", 0, N_EMBED, 0.5f, 0.2f},
        {"att.time_first", 0, N_EMBED, 0, 1},
        {"att.time_decay", 0, N_EMBED, -1, 0.2f},
        {"att.key.weight", N_EMBED, N_EMBED, 0, 0.3f},
        {"att.value.weight", N_EMBED, N_EMBED, 0, 0.3f},
        {"att.receptance.weight", N_EMBED, N_EMBED, 0, 0.3f},
        {"att.output.weight", N_EMBED, N_EMBED, 0, 0.3f},
        {"ffn.time_mix_k", 0, N_EMBED, 0.5f, 0.2f},
        {"ffn.time_mix_r", 0, N_EMBED, 0.5f, 0.2f},
        {"ffn.key.weight", N_FFN, N_EMBED, 0, 0.3f},
        {"ffn.value.weight", N_EMBED, N_FFN, 0, 0.3f},
        {"ffn.receptance.weight", N_EMBED, N_EMBED, 0, 0.3f},
    };
    FILE * file = fopen(path, "wb");
    const int32_t header[] = {RWKV_FILE_MAGIC, RWKV_FILE_VERSION, N_VOCAB, N_EMBED, N_LAYER, 0};
    fwrite(header, sizeof header, 1, file);
    write_tensor(file, "emb.weight", N_VOCAB, N_EMBED, 0, 1);
    write_tensor(file, "blocks.0.ln0.weight", 0, N_EMBED, 1, 0.1f);
    write_tensor(file, "blocks.0.ln0.bias", 0, N_EMBED, 0, 0.1f);
    for (int i = 0; i < N_LAYER; i++) {
        for (size_t j = 0; j < sizeof layer / sizeof *layer; j++) {
            char name[64];
            snprintf(name, sizeof name, "blocks.%d.%s", i, layer[j].name);
            write_tensor(file, name, layer[j].rows, layer[j].cols, layer[j].mean,
                         layer[j].deviation);
        }
    }
    write_tensor(file, "ln_out.weight", 0, N_EMBED, 1, 0.1f);
    write_tensor(file, "ln_out.bias", 0, N_EMBED, 0, 0.1f);
    write_tensor(file, "head.weight", N_VOCAB, N_EMBED, 0, 0.5f);
    fclose(file);
}

static struct rwkv_context * load(uint32_t n_threads) {
    struct rwkv_context * ctx = rwkv_init_from_file(model_path, n_threads);
    if (!check(ctx != NULL, "load: %s", rwkv_get_last_error_message())) exit(finish());
    rwkv_set_print_errors(ctx, false);
    return ctx;
}

/* ---- Checks -------------------------------------------------------------------------------------
 */

static bool equal(const float * a, const float * b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

static void refused(bool succeeded, int flags, const char * part, const char * what) {
    const char * text = rwkv_get_last_error_message();
    check(!succeeded && strstr(text, part), "%s: expected an error with '%s', got '%s'", what, part,
          text);
    check(!succeeded && (int)rwkv_get_last_error(NULL) == flags, "%s: code of the error", what);
}

/* The same for a call with a context. */
static void ctx_refused(struct rwkv_context * ctx, bool succeeded, int flags, const char * part,
                        const char * what) {
    const char * text = rwkv_get_last_error_message();
    check(!succeeded && strstr(text, part), "%s: expected an error with '%s', got '%s'", what, part,
          text);
    check((int)rwkv_get_last_error(ctx) == flags, "%s: code of the error", what);
    check(rwkv_get_last_error(ctx) == RWKV_ERROR_NONE, "%s: reading the code clears it", what);
}

/* Buffers with a margin on both sides that nobody may touch. */
enum { MARGIN = 64 };
static float guarded[MARGIN + STATE + MARGIN + N_VOCAB + MARGIN];
static float * const state_out = guarded + MARGIN;
static float * const logits_out = guarded + MARGIN + STATE + MARGIN;

static void fill_guarded(void) {
    for (size_t i = 0; i < sizeof guarded / sizeof *guarded; i++) guarded[i] = 12345.0f + (float)i;
}

static bool margins_intact(void) {
    for (size_t i = 0; i < sizeof guarded / sizeof *guarded; i++) {
        const bool state = i >= MARGIN && i < MARGIN + STATE;
        const bool logits = i >= 2 * MARGIN + STATE && i < 2 * MARGIN + STATE + N_VOCAB;
        if (!state && !logits && guarded[i] != 12345.0f + (float)i) return false;
    }
    return true;
}

static bool all_intact(void) {
    for (size_t i = 0; i < sizeof guarded / sizeof *guarded; i++) {
        if (guarded[i] != 12345.0f + (float)i) return false;
    }
    return true;
}

static void compute_wanted(void) {
    struct rwkv_context * ctx = load(1);
    for (int i = 0; i < N_TOKENS; i++) {
        tokens[i] = random_below(N_VOCAB);
        const float * before = i > 0 ? wanted_states[i - 1] : NULL;
        check(rwkv_eval(ctx, tokens[i], before, wanted_states[i], wanted_logits[i]), "eval");
    }
    check(!equal(wanted_logits[10], wanted_logits[11], N_VOCAB),
          "logits differ from token to token");
    rwkv_free(ctx);
}

/* ---- Tests: arguments ---------------------------------------------------------------------------
 */

static void test_null(void) { /* */
    struct rwkv_memory memory = {.size = sizeof memory};
    struct rwkv_quantize_options quantize = rwkv_default_quantize_options();
    quantize.format_name = "Q8_0";
    float floats[STATE];
    refused(rwkv_load(NULL, NULL), RWKV_ERROR_ARGS, "NULL", "load");
    refused(rwkv_init_from_file(NULL, 1), RWKV_ERROR_ARGS, "NULL", "init_from_file");
    refused(rwkv_clone_context(NULL, 1), RWKV_ERROR_ARGS, "NULL", "clone_context");
    refused(rwkv_clone_context_with(NULL, NULL), RWKV_ERROR_ARGS, "NULL", "clone_context_with");
    refused(rwkv_estimate(NULL, NULL, &memory), RWKV_ERROR_ARGS, "NULL", "estimate");
    refused(rwkv_estimate(model_path, NULL, NULL), RWKV_ERROR_ARGS, "NULL", "estimate");
    refused(rwkv_estimate_shape(40, 32, 2, NULL, NULL, &memory), RWKV_ERROR_ARGS, "NULL",
            "estimate_shape");
    refused(rwkv_estimate_shape(40, 32, 2, "FP16", NULL, NULL), RWKV_ERROR_ARGS, "NULL",
            "estimate_shape");
    refused(rwkv_eval(NULL, 1, NULL, floats, floats), RWKV_ERROR_ARGS, "NULL", "eval");
    refused(rwkv_eval_sequence(NULL, tokens, 1, NULL, NULL, NULL), RWKV_ERROR_ARGS, "NULL",
            "eval_sequence");
    refused(rwkv_eval_sequence(NULL, NULL, 1, NULL, NULL, NULL), RWKV_ERROR_ARGS, "NULL",
            "eval_sequence");
    refused(rwkv_eval_sequence_in_chunks(NULL, tokens, 1, 1, NULL, NULL, NULL), RWKV_ERROR_ARGS,
            "NULL", "eval_sequence_in_chunks");
    refused(rwkv_eval_batch(NULL, NULL, 1, sizeof(struct rwkv_sequence)), RWKV_ERROR_ARGS, "NULL",
            "eval_batch");
    refused(rwkv_quantize_file(NULL, output_path, &quantize), RWKV_ERROR_ARGS, "NULL",
            "quantize_file");
    refused(rwkv_quantize_file(model_path, NULL, &quantize), RWKV_ERROR_ARGS, "NULL",
            "quantize_file");
    refused(rwkv_quantize_file(model_path, output_path, NULL), RWKV_ERROR_ARGS, "NULL",
            "quantize_file");
    refused(rwkv_quantize_model_file(NULL, output_path, "Q8_0"), RWKV_ERROR_ARGS, "NULL",
            "quantize_model_file");
    refused(rwkv_quantize_model_file(model_path, NULL, "Q8_0"), RWKV_ERROR_ARGS, "NULL",
            "quantize_model_file");
    refused(rwkv_quantize_model_file(model_path, output_path, NULL), RWKV_ERROR_ARGS, "NULL",
            "quantize_model_file");
    rwkv_free(NULL);
    rwkv_interrupt(NULL);
    rwkv_init_state(NULL, floats);
    check(rwkv_get_n_vocab(NULL) == 0 && rwkv_get_n_embed(NULL) == 0 &&
              rwkv_get_n_layer(NULL) == 0 && rwkv_get_state_len(NULL) == 0 &&
              rwkv_get_logits_len(NULL) == 0 && rwkv_get_state_buffer_element_count(NULL) == 0 &&
              rwkv_get_logits_buffer_element_count(NULL) == 0,
          "sizes of no context are 0");

    struct rwkv_context * ctx = load(1);
    rwkv_init_state(ctx, NULL);
    const struct rwkv_sequence empty = {0};
    ctx_refused(ctx, rwkv_eval_batch(ctx, NULL, 1, sizeof empty), RWKV_ERROR_ARGS, "NULL",
                "no sequences");
    ctx_refused(ctx, rwkv_eval_batch(ctx, &empty, 1, sizeof empty), RWKV_ERROR_ARGS, "NULL",
                "no tokens");
    ctx_refused(ctx, rwkv_eval_batch(ctx, &empty, 1, 0), RWKV_ERROR_ARGS, "size is 0",
                "structs of no size");
    check(rwkv_eval_batch(ctx, NULL, 0, 0), "a batch of none");
    const char * const matrix = rwkv_get_matrix(ctx, 0, NULL);
    check(matrix != NULL && strstr(matrix, ".weight") != NULL, "the first matrix");
    check(rwkv_get_matrix(ctx, SIZE_MAX, NULL) == NULL, "there are not that many");
    check(rwkv_get_matrix(NULL, 0, NULL) == NULL, "no context, no matrices");
    ctx_refused(ctx, rwkv_eval_importances(ctx, &empty, 1, sizeof empty, NULL), RWKV_ERROR_ARGS,
                "squares is NULL", "no sums");
    double squares[8192]; /* more than all columns of the model */
    check(rwkv_eval_importances(ctx, NULL, 0, 0, squares), "importances of no tokens");
    const struct rwkv_sequence inside = {tokens, 1, NULL, NULL, (float *)squares, 1, NULL, NULL};
    ctx_refused(ctx, rwkv_eval_importances(ctx, &inside, 1, sizeof inside, squares),
                RWKV_ERROR_ARGS, "overlap", "logits among the sums");
    check(rwkv_eval_sequence(ctx, NULL, 5, NULL, NULL, NULL), "NULL tokens do nothing");
    check(rwkv_eval_sequence_in_chunks(ctx, NULL, 5, 2, NULL, NULL, NULL),
          "NULL tokens do nothing");
    check(rwkv_eval(ctx, 1, NULL, NULL, NULL), "no outputs");
    rwkv_free(ctx);
}

static void test_tokens(void) { /* */
    struct rwkv_context * ctx = load(2);
    const uint32_t bad[] = {N_VOCAB, N_VOCAB + 1, INT32_MAX, (uint32_t)INT32_MIN, UINT32_MAX};
    fill_guarded();
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint32_t sequence[] = {1, 2, bad[i], 3};
        ctx_refused(ctx, rwkv_eval(ctx, bad[i], NULL, state_out, logits_out), RWKV_ERROR_ARGS,
                    "n_vocab = 40", "token out of range");
        ctx_refused(ctx, rwkv_eval_sequence(ctx, sequence, 4, NULL, state_out, logits_out),
                    RWKV_ERROR_ARGS, "token 2 is", "token out of range");
    }
    ctx_refused(ctx, rwkv_eval_sequence(ctx, tokens, 0, NULL, state_out, logits_out),
                RWKV_ERROR_ARGS, "no tokens", "empty sequence");
    ctx_refused(ctx, rwkv_eval_sequence_in_chunks(ctx, tokens, 1, 0, NULL, state_out, logits_out),
                RWKV_ERROR_ARGS, "chunk_size", "chunks of nothing");
    check(all_intact(), "refused calls write nothing");
    rwkv_free(ctx);
}

static void test_options(void) {
    struct {
        struct rwkv_load_options known;
        uint64_t later;
    } longer = {rwkv_default_load_options(), 0};
    longer.known.size = sizeof longer;
    struct rwkv_context * ctx = rwkv_load(model_path, &longer.known);
    check(ctx != NULL, "longer options, the rest zero");
    rwkv_free(ctx);
    longer.later = 1;
    refused(rwkv_load(model_path, &longer.known), RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED,
            "not known", "longer options, the rest not zero");

    const uint32_t sizes[] = {0, 3, 4, sizeof(struct rwkv_load_options) - 1, 5000, UINT32_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct rwkv_load_options options = rwkv_default_load_options();
        options.size = sizes[i];
        refused(rwkv_load(model_path, &options), RWKV_ERROR_ARGS, "size is", "size of options");
        struct rwkv_memory memory = {.size = sizes[i]};
        refused(rwkv_estimate(model_path, NULL, &memory), RWKV_ERROR_ARGS, "size is",
                "size of memory");
    }

    struct rwkv_load_options options = rwkv_default_load_options();
    check(options.mmap && !options.prefault && options.n_threads == 0, "defaults");
    options.head = "FP16";
    refused(rwkv_load(model_path, &options), RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE,
            "unknown format 'FP16' (choose from Q4_0,", "head");
    options = rwkv_default_load_options();
    options.sparse_ffn = true;
    ctx = rwkv_load(model_path, &options);
    check(ctx != NULL, "sparse_ffn");
    rwkv_free(ctx);
    options = rwkv_default_load_options();
    options.activations = "A17\x1b[2J";
    refused(rwkv_load(model_path, &options), RWKV_ERROR_ARGS, "A17\\x1b[2J", "activations");
    options.activations = "A16";
    options.prefault = true;
    ctx = rwkv_load(model_path, &options);
    check(ctx != NULL, "A16 and prefault");

    struct rwkv_context_options of_context = rwkv_default_context_options();
    of_context.activations = "int8";
    struct rwkv_context * clone = rwkv_clone_context_with(ctx, &of_context);
    check(clone != NULL, "int8 in a clone");
    rwkv_free(clone);
    of_context.activations = "int4";
    rwkv_set_print_errors(ctx, false);
    ctx_refused(ctx, rwkv_clone_context_with(ctx, &of_context), RWKV_ERROR_ARGS,
                "choose A16, int8 or bf16", "int4 in a clone");
    of_context.activations = "bf16";
    ctx_refused(ctx, rwkv_clone_context_with(ctx, &of_context), RWKV_ERROR_ARGS,
                "loaded without bf16", "bf16 in a clone");
    rwkv_free(ctx);

    options.activations = "bf16";
    ctx = rwkv_load(model_path, &options);
    check(ctx != NULL, "bf16");
    clone = rwkv_clone_context_with(ctx, &of_context);
    check(clone != NULL, "bf16 in a clone of bf16");
    rwkv_free(clone);
    clone = rwkv_clone_context(ctx, 1);
    check(clone != NULL, "a clone of bf16");
    rwkv_free(clone);
    rwkv_set_print_errors(ctx, false);
    of_context.activations = "int8";
    ctx_refused(ctx, rwkv_clone_context_with(ctx, &of_context), RWKV_ERROR_ARGS, "loaded with bf16",
                "int8 in a clone of bf16");
    rwkv_free(ctx);
    options.sparse_ffn = true;
    refused(rwkv_load(model_path, &options), RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED,
            "is multiplied as BF16", "sparse_ffn and bf16");
}

static void test_thread_counts(void) { /* */
    const uint32_t counts[] = {0, 1, 2, 3, 17, 1024};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
        if (counts[i] == 1024) continue; /* a shadow stack for each takes minutes */
#endif
        struct rwkv_context * ctx = load(counts[i]);
        fill_guarded();
        check(rwkv_eval_sequence(ctx, tokens, N_TOKENS, NULL, state_out, logits_out) &&
                  equal(state_out, wanted_states[N_TOKENS - 1], STATE) &&
                  equal(logits_out, wanted_logits[N_TOKENS - 1], N_VOCAB) && margins_intact(),
              "%u threads give the same bits", counts[i]);
        rwkv_free(ctx);
    }
    refused(rwkv_init_from_file(model_path, 1025), RWKV_ERROR_ARGS, "at most 1024", "1025 threads");
    refused(rwkv_init_from_file(model_path, 1u << 31), RWKV_ERROR_ARGS, "at most 1024",
            "2^31 threads");
    struct rwkv_context * ctx = load(1);
    ctx_refused(ctx, rwkv_clone_context(ctx, 1025), RWKV_ERROR_ARGS, "at most 1024",
                "clone with 1025 threads");
    rwkv_free(ctx);
}

typedef struct rwkv_context * init_with_three(const char *, uint32_t, uint32_t);

static void test_older_callers(void) {
    union { /* of 2023 and 2024 */
        struct rwkv_context * (*two)(const char *, uint32_t);
        init_with_three * three;
    } init = {rwkv_init_from_file};
    struct rwkv_context * ctx = init.three(model_path, 1, 99);
    check(ctx != NULL, "a third argument of rwkv_init_from_file");
    check(rwkv_get_state_buffer_element_count(ctx) == STATE, "state count");
    check(rwkv_get_logits_buffer_element_count(ctx) == N_VOCAB, "logits count");
    rwkv_free(ctx);
}

/* ---- Tests: buffers -----------------------------------------------------------------------------
 */

static void test_aliases(void) { /* */
    struct rwkv_context * ctx = load(2);
    float state[STATE + 1], logits[N_VOCAB];
    memcpy(state, wanted_states[4], sizeof wanted_states[4]);
    check(rwkv_eval(ctx, tokens[5], state, state, logits) &&
              equal(state, wanted_states[5], STATE) && equal(logits, wanted_logits[5], N_VOCAB),
          "state_out may be state_in");

    float memory[2 * STATE + 2 * N_VOCAB];
    memcpy(memory, wanted_states[4], sizeof wanted_states[4]);
    const struct {
        const char * what;
        float *state_in, *state_out, *logits_out;
    } overlaps[] = {
        {"state_out partly over state_in", memory, memory + 1, NULL},
        {"state_out partly over state_in", memory + STATE - 1, memory, NULL},
        {"logits over state_in", memory, NULL, memory},
        {"logits at the end of state_in", memory, NULL, memory + STATE - 1},
        {"logits over state_out", NULL, memory, memory + STATE - 1},
        {"logits before state_out", memory + STATE, memory + N_VOCAB - 1, memory},
        {"logits over state_out, which is state_in", memory, memory, memory + 7},
    };
    float before[sizeof memory / sizeof *memory];
    memcpy(before, memory, sizeof memory);
    for (size_t i = 0; i < sizeof overlaps / sizeof *overlaps; i++) {
        ctx_refused(
            ctx,
            rwkv_eval(ctx, 1, overlaps[i].state_in, overlaps[i].state_out, overlaps[i].logits_out),
            RWKV_ERROR_ARGS, "overlap", overlaps[i].what);
    }
    check(equal(memory, before, sizeof memory / sizeof *memory), "refused calls write nothing");

    uint32_t numbers[STATE] = {1, 2, 3};
    ctx_refused(ctx, rwkv_eval_sequence(ctx, numbers, 3, NULL, (float *)numbers, NULL),
                RWKV_ERROR_ARGS, "overlap", "state_out over tokens");
    check(rwkv_eval(ctx, 1, memory, memory + STATE, memory + 2 * STATE),
          "neighbours do not overlap");
    rwkv_free(ctx);
}

static void test_misaligned(void) { /* */
    struct rwkv_context * ctx = load(1);
    static char bytes[3][sizeof(float) * STATE + 8];
    for (int shift = 1; shift < 4; shift++) {
        float * in = (float *)(void *)(bytes[0] + shift);
        float * out = (float *)(void *)(bytes[1] + shift);
        float * logits = (float *)(void *)(bytes[2] + shift);
        static char token_bytes[sizeof(uint32_t) * 20 + 4];
        uint32_t * moved = (uint32_t *)(void *)(token_bytes + shift);
        memcpy((char *)moved, tokens + 5, 20 * sizeof *tokens);
        memcpy((char *)in, wanted_states[4], sizeof wanted_states[4]);
        rwkv_init_state(ctx, out);
        check(rwkv_eval(ctx, tokens[0], out, NULL, logits) &&
                  memcmp((char *)logits, wanted_logits[0], sizeof wanted_logits[0]) == 0,
              "the first state at an odd address");
        check(rwkv_eval_sequence(ctx, moved, 20, in, out, logits) &&
                  memcmp((char *)out, wanted_states[24], sizeof wanted_states[24]) == 0 &&
                  memcmp((char *)logits, wanted_logits[24], sizeof wanted_logits[24]) == 0,
              "buffers at odd addresses");
    }
    rwkv_free(ctx);
}

static void test_sequences(void) { /* chunks of 256 rows begin at 256 and 512 */
    struct rwkv_context * ctx = load(2);
    const size_t lengths[] = {1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 513, N_TOKENS};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const size_t n = lengths[i];
        fill_guarded();
        check(rwkv_eval_sequence(ctx, tokens, n, NULL, state_out, logits_out) && margins_intact() &&
                  equal(state_out, wanted_states[n - 1], STATE) &&
                  equal(logits_out, wanted_logits[n - 1], N_VOCAB),
              "a sequence of %zu", n);
        const size_t chunks[] = {1, 3, 16, 300, SIZE_MAX};
        for (size_t j = 0; j < sizeof chunks / sizeof *chunks; j++) {
            fill_guarded();
            check(rwkv_eval_sequence_in_chunks(ctx, tokens, n, chunks[j], NULL, state_out,
                                               logits_out) &&
                      equal(state_out, wanted_states[n - 1], STATE) &&
                      equal(logits_out, wanted_logits[n - 1], N_VOCAB),
                  "a sequence of %zu in chunks of %zu", n, chunks[j]);
        }
    }
    float state[STATE];
    rwkv_init_state(ctx, state);
    fill_guarded();
    check(rwkv_eval(ctx, tokens[0], state, state_out, NULL) &&
              equal(state_out, wanted_states[0], STATE),
          "rwkv_init_state is what NULL stands for");
    for (int i = 0; i < STATE; i++)
        state[i] = i % 3 ? float_of(random_bits()) : float_of(0x7FC00000);
    check(rwkv_eval_sequence(ctx, tokens, 3, state, state_out, logits_out),
          "any state is evaluated"); /* */
    rwkv_free(ctx);
}

static void test_batches(void) {
    enum { SEQUENCES = 70 };
    struct rwkv_context * ctx = load(3);
    static float states[SEQUENCES][STATE], logits[N_TOKENS * 8][N_VOCAB],
        hidden[SEQUENCES][N_EMBED];
    struct rwkv_sequence batch[SEQUENCES];
    size_t starts[SEQUENCES], rows[SEQUENCES], n_rows = 0;
    for (int round = 0; round < 8; round++) {
        n_rows = 0;
        for (int i = 0; i < SEQUENCES; i++) {
            const size_t limit = i % 10 == round % 10 ? 290 : 5;
            const size_t n = 1 + random_below((uint32_t)limit),
                         start = random_below(N_TOKENS - 290);
            const bool fresh = random_below(4) == 0;
            starts[i] = fresh ? 0 : start;
            rows[i] = n_rows;
            batch[i] = (struct rwkv_sequence){
                .tokens = tokens + starts[i],
                .n_tokens = n,
                .state_in = starts[i] == 0 ? NULL : wanted_states[starts[i] - 1],
                .state_out = random_below(5) == 0 ? NULL : states[i],
                .logits_out = random_below(3) == 0 ? NULL : logits[n_rows],
                .n_logits = random_below((uint32_t)n + 1),
                .hidden_out = random_below(2) ? NULL : hidden[i],
            };
            if (batch[i].state_out && batch[i].state_in && random_below(2)) {
                memcpy(states[i], batch[i].state_in, sizeof states[i]);
                batch[i].state_in = states[i];
            }
            n_rows += batch[i].n_logits;
        }
        memset(logits, 0xA5, sizeof logits);
        if (!check(rwkv_eval_batch(ctx, batch, SEQUENCES, sizeof *batch), "batch: %s",
                   rwkv_get_last_error_message()))
            break;
        for (int i = 0; i < SEQUENCES; i++) {
            const size_t end = starts[i] + batch[i].n_tokens;
            if (batch[i].state_out)
                check(equal(states[i], wanted_states[end - 1], STATE), "state %d of a batch", i);
            for (size_t j = 0; batch[i].logits_out && j < batch[i].n_logits; j++) {
                check(
                    equal(logits[rows[i] + j], wanted_logits[end - batch[i].n_logits + j], N_VOCAB),
                    "logits %zu of sequence %d", j, i);
            }
            if (!batch[i].hidden_out) continue;
            float alone[N_EMBED];
            struct rwkv_sequence single = batch[i];
            single.state_in = starts[i] == 0 ? NULL : wanted_states[starts[i] - 1];
            single.state_out = single.logits_out = NULL;
            single.hidden_out = alone;
            check(rwkv_eval_batch(ctx, &single, 1, sizeof single) &&
                      equal(hidden[i], alone, N_EMBED),
                  "hidden vector of sequence %d", i);
        }
    }
    rwkv_free(ctx);
}

static void test_bad_batches(void) {
    struct rwkv_context * ctx = load(1);
    float in[STATE] = {0}, other[STATE] = {0};
    const uint32_t bad_tokens[] = {1, N_VOCAB};
    struct rwkv_context * another = load(1); /* another model, of the same file */
    struct rwkv_adapter * adapter =
        rwkv_create_adapter(another, NULL, 0, sizeof(struct rwkv_adapter_part));
    const struct {
        const char *what, *part;
        struct rwkv_sequence second;
    } cases[] = {
        {"bad token", "sequence 1: token 1 is 40", {.tokens = bad_tokens, .n_tokens = 2}},
        {"no tokens", "sequence 1: tokens is NULL", {.n_tokens = 2}},
        {"empty", "sequence 1: has no tokens", {.tokens = tokens}},
        {"too many logits", "n_logits is 3", {.tokens = tokens, .n_tokens = 2, .n_logits = 3}},
        {"adapter", "another model", {.tokens = tokens, .n_tokens = 2, .adapter = adapter}},
        {"same state_out twice",
         "overlap",
         {.tokens = tokens, .n_tokens = 2, .state_out = state_out}},
        {"state_in of another",
         "overlap",
         {.tokens = tokens, .n_tokens = 2, .state_in = state_out}},
        {"hidden over logits",
         "overlap",
         {.tokens = tokens, .n_tokens = 2, .hidden_out = logits_out + 1}},
        {"many logits over a state",
         "overlap",
         {.tokens = tokens,
          .n_tokens = N_TOKENS,
          .logits_out = state_out - N_VOCAB - 1,
          .n_logits = 2}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct rwkv_sequence first = {tokens, 3, in, state_out, logits_out, 1, NULL, NULL};
        const struct rwkv_sequence batch[] = {first, cases[i].second};
        fill_guarded();
        const bool succeeded = rwkv_eval_batch(ctx, batch, 2, sizeof *batch);
        check(!succeeded && strstr(rwkv_get_last_error_message(), cases[i].part), "%s: got '%s'",
              cases[i].what, rwkv_get_last_error_message());
        check(all_intact(), "%s: nothing is written", cases[i].what);
    }
    const struct rwkv_sequence shared[] = {{tokens, 3, in, state_out, NULL, 0, NULL, NULL},
                                           {tokens, 3, in, other, NULL, 0, NULL, NULL}};
    check(rwkv_eval_batch(ctx, shared, 2, sizeof *shared),
          "two sequences may start from one state");

    struct {
        struct rwkv_sequence known;
        uint64_t later;
    } longer[2] = {{shared[0], 0}, {shared[1], 0}};
    check(rwkv_eval_batch(ctx, &longer[0].known, 2, sizeof *longer), "longer structs");
    longer[1].later = 1;
    check(!rwkv_eval_batch(ctx, &longer[0].known, 2, sizeof *longer),
          "longer structs, the rest not zero");
    check(!rwkv_eval_batch(ctx, shared, 2, sizeof *shared - 8), "shorter structs");
    rwkv_free(another);
    const struct rwkv_sequence orphan = {tokens, 3, in, other, NULL, 0, NULL, adapter};
    check(!rwkv_eval_batch(ctx, &orphan, 1, sizeof orphan), "an adapter whose model is gone");
    rwkv_free_adapter(adapter);
    rwkv_free(ctx);
}

/* ---- Tests: adapters ----------------------------------------------------------------------------
 */

enum { RANK = 3 };
static float a_weights[RANK * N_FFN], b_weights[N_FFN * RANK], vector[N_EMBED];

static struct rwkv_adapter_part key_part(void) {
    const struct rwkv_adapter_part part = {
        "blocks.1.att.key.weight", N_EMBED, N_EMBED, RANK, a_weights, b_weights, 2, NULL,
    };
    return part;
}

static struct rwkv_adapter_part vector_part(void) {
    const struct rwkv_adapter_part part = {
        "blocks.1.att.time_mix_k", 1, N_EMBED, 0, NULL, NULL, 0, vector,
    };
    return part;
}

static struct rwkv_adapter * create_adapter(struct rwkv_context * ctx) {
    const struct rwkv_adapter_part parts[] = {key_part(), vector_part()};
    return rwkv_create_adapter(ctx, parts, 2, sizeof *parts);
}

static void fill_adapter(void) {
    for (size_t i = 0; i < RANK * N_FFN; i++) a_weights[i] = random_normal() / 4;
    for (size_t i = 0; i < RANK * N_FFN; i++) b_weights[i] = random_normal() / 4;
    for (size_t i = 0; i < N_EMBED; i++) vector[i] = 0.5f + random_normal() / 4;
}

static bool evaluate_with(struct rwkv_context * ctx, const struct rwkv_adapter * adapter,
                          float * logits) {
    const struct rwkv_sequence sequence = {tokens, 300, NULL, NULL, logits, 1, NULL, adapter};
    return rwkv_eval_batch(ctx, &sequence, 1, sizeof sequence);
}

static void test_adapters(void) {
    struct rwkv_context *ctx = load(2), *clone = rwkv_clone_context(ctx, 1);
    float expected[N_VOCAB], logits[N_VOCAB];
    fill_adapter();
    struct rwkv_adapter * adapter = create_adapter(ctx);
    check(adapter != NULL, "create: %s", rwkv_get_last_error_message());
    check(evaluate_with(ctx, adapter, expected), "eval: %s", rwkv_get_last_error_message());
    check(!equal(expected, wanted_logits[299], N_VOCAB), "the adapter changes something");
    memset(a_weights, 0, sizeof a_weights); /* it has its own copy */
    check(evaluate_with(clone, adapter, logits) && equal(logits, expected, N_VOCAB), "in a clone");
    check(evaluate_with(ctx, NULL, logits) && equal(logits, wanted_logits[299], N_VOCAB),
          "without it, the model is as before");
    rwkv_free(ctx);
    check(evaluate_with(clone, adapter, logits) && equal(logits, expected, N_VOCAB),
          "after the context that made it");
    rwkv_free(clone);
    rwkv_free_adapter(adapter);
    rwkv_free_adapter(NULL);
}

static void test_bad_adapters(void) {
    struct rwkv_context * ctx = load(1);
    fill_adapter();
    struct rwkv_adapter_part key = key_part(), mix = vector_part();
    const int args = RWKV_ERROR_ARGS;
#define REFUSED(PART, FLAGS, TEXT, WHAT)                                                           \
    ctx_refused(ctx, rwkv_create_adapter(ctx, &PART, 1, sizeof PART), args | FLAGS, TEXT, WHAT);   \
    key = key_part(), mix = vector_part()
    key.name = NULL;
    REFUSED(key, 0, "part 0: name is NULL", "no name");
    key.name = "blocks.2.att.key.weight";
    REFUSED(key, RWKV_ERROR_KEY, "'blocks.2.att.key.weight': the model has no", "unknown name");
    key.name = "emb.weight", key.rows = N_VOCAB;
    REFUSED(key, RWKV_ERROR_UNSUPPORTED, "the embedding", "embedding");
    key.cols++;
    REFUSED(key, RWKV_ERROR_SHAPE, "is for 32 x 33, the model has 32 x 32", "columns");
    key.rows = 1;
    REFUSED(key, RWKV_ERROR_SHAPE, "is for 1 x 32", "rows");
    key.rank = 0;
    REFUSED(key, RWKV_ERROR_DIMENSION, "rank is 0, expected 1 to", "rank 0");
    key.rank = SIZE_MAX;
    REFUSED(key, RWKV_ERROR_DIMENSION, "rank is", "rank too large");
    key.a = NULL;
    REFUSED(key, 0, "is a matrix", "no a");
    key.b = NULL;
    REFUSED(key, 0, "is a matrix", "no b");
    key.values = vector;
    REFUSED(key, 0, "is a matrix", "values of a matrix");
    key.scale = NAN;
    REFUSED(key, RWKV_ERROR_DATA, "scale[0] is nan", "scale");
    mix.values = NULL;
    REFUSED(mix, 0, "is a vector", "no values");
    mix.rank = 1;
    REFUSED(mix, 0, "is a vector", "rank of a vector");
    mix.a = a_weights;
    REFUSED(mix, 0, "is a vector", "a of a vector");
    a_weights[7] = INFINITY;
    REFUSED(key, RWKV_ERROR_DATA, "a[7] is inf", "infinity in a");
    a_weights[7] = 0, b_weights[8] = 3e38f;
    REFUSED(key, RWKV_ERROR_DATA, "b[8] is 3e+38, too large for the scale", "too large");
    vector[9] = NAN;
    REFUSED(mix, RWKV_ERROR_DATA, "values[9] is nan", "NaN in a vector");
#undef REFUSED
    ctx_refused(ctx, rwkv_create_adapter(ctx, NULL, 1, sizeof key), args, "parts is NULL", "NULL");
    ctx_refused(ctx, rwkv_create_adapter(ctx, &key, 1, sizeof key - 8), args, "size is", "size");
    refused(rwkv_create_adapter(NULL, NULL, 0, sizeof key), args, "ctx is NULL", "no context");
    rwkv_free(ctx);
}

/* ---- Tests: threads -----------------------------------------------------------------------------
 */

struct job {
    struct rwkv_context * ctx;
    size_t n;
    float *state, *logits;
    bool good;
    volatile bool done;
    char text[256];
};

static void * evaluate_often(void * argument) {
    struct job * job = argument;
    float state[STATE], logits[N_VOCAB];
    job->good = true;
    for (int i = 0; i < 20; i++) {
        job->good &= rwkv_eval_sequence(job->ctx, tokens, job->n, NULL, state, logits) &&
                     equal(state, wanted_states[job->n - 1], STATE) &&
                     equal(logits, wanted_logits[job->n - 1], N_VOCAB);
    }
    rwkv_free(job->ctx);
    return NULL;
}

static void test_contexts(void) { /* */
    enum { THREADS = 6 };
    struct rwkv_context * first = load(2);
    struct job jobs[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){.ctx = rwkv_clone_context(first, (uint32_t)(1 + i % 3)),
                               .n = (size_t)(3 + 37 * i)};
        check(jobs[i].ctx != NULL, "clone");
    }
    rwkv_free(first); /* the clones keep the model */
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, evaluate_often, &jobs[i]);
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        check(jobs[i].good, "context %d beside others", i);
    }
}

enum { LONG = 40000 };

static void * evaluate_long(void * argument) {
    struct job * job = argument;
    uint32_t * sequence = malloc(LONG * sizeof *sequence);
    for (size_t i = 0; i < LONG; i++) sequence[i] = tokens[i % N_TOKENS];
    do { /* the other thread may be the one that is busy */
        job->good = rwkv_eval_sequence(job->ctx, sequence, LONG, NULL, job->state, job->logits);
    } while (!job->good && strstr(rwkv_get_last_error_message(), "busy"));
    snprintf(job->text, sizeof job->text, "%s", rwkv_get_last_error_message());
    free(sequence);
    __atomic_store_n(&job->done, true, __ATOMIC_SEQ_CST);
    return NULL;
}

static bool is_done(struct job * job) {
    return __atomic_load_n(&job->done, __ATOMIC_SEQ_CST);
}

/* Waits until the job runs; false if it ended before. */
static bool is_busy(struct job * job) {
    bool busy = false;
    while (!busy && !is_done(job)) busy = !rwkv_eval(job->ctx, 1, NULL, NULL, NULL);
    return busy && strstr(rwkv_get_last_error_message(), "busy");
}

static void test_busy_and_interrupt(void) { /* */
    for (int n_threads = 1; n_threads <= 2; n_threads++) {
        struct job job = {
            .ctx = load((uint32_t)n_threads), .state = state_out, .logits = logits_out};
        pthread_t thread;
        fill_guarded();
        rwkv_interrupt(job.ctx); /* nothing runs: no effect */
        pthread_create(&thread, NULL, evaluate_long, &job);
        check(is_busy(&job), "a context does one thing at a time");
        while (!is_done(&job)) rwkv_interrupt(job.ctx);
        pthread_join(thread, NULL);
        check(!job.good && strcmp(job.text, "interrupted") == 0, "interrupted: '%s'", job.text);
        check(strstr(rwkv_get_last_error_message(), "busy"), "each thread has its own text");
        check(all_intact(), "an interrupted evaluation writes nothing");
        check(rwkv_eval_sequence(job.ctx, tokens, 20, NULL, state_out, logits_out) &&
                  equal(logits_out, wanted_logits[19], N_VOCAB),
              "after an interruption all is as before");
        rwkv_free(job.ctx);
    }
}

static void test_interrupt_in_the_queue(void) {
    struct job first = {.ctx = load(2)}, second = {.ctx = rwkv_clone_context(first.ctx, 2)};
    pthread_t threads[2];
    pthread_create(&threads[0], NULL, evaluate_long, &first);
    check(is_busy(&first), "the first context evaluates");
    pthread_create(&threads[1], NULL, evaluate_long, &second);
    while (!is_done(&second)) rwkv_interrupt(second.ctx);
    check(!is_done(&first) && strcmp(second.text, "interrupted") == 0,
          "interrupted while another context has the threads: '%s'", second.text);
    while (!is_done(&first)) rwkv_interrupt(first.ctx);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    rwkv_free(first.ctx);
    rwkv_free(second.ctx);
}

static void test_fork(void) {     /* */
#if !defined(__SANITIZE_THREAD__) /* which has no threads after a fork */
    struct rwkv_context * ctx = load(3);
    check(rwkv_eval_sequence(ctx, tokens, 30, NULL, state_out, logits_out), "before the fork");
    fflush(stdout);
    const pid_t child = fork();
    const bool good = rwkv_eval_sequence(ctx, tokens, 40, NULL, state_out, logits_out) &&
                      equal(logits_out, wanted_logits[39], N_VOCAB);
    if (child == 0) {
        rwkv_free(ctx);
        _exit(good ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(good, "the parent after a fork");
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child after a fork: status %d",
          status);
    rwkv_free(ctx);
#endif
}

static void test_floating_point_environment(void) { /* */
    struct rwkv_context * ctx = load(2);
    const int modes[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    for (int i = 0; i < 3; i++) {
        fesetround(modes[i]);
#if defined(__x86_64__)
        const unsigned flags = _mm_getcsr() | 0x8040; /* denormals to zero, in and out */
        _mm_setcsr(flags);
#endif
        const bool good = rwkv_eval_sequence(ctx, tokens, 300, NULL, state_out, logits_out);
        const bool quantized = rwkv_quantize_model_file(model_path, output_path, "Q5_1");
        const int mode = fegetround();
#if defined(__x86_64__)
        check((_mm_getcsr() & ~0x3Fu) == (flags & ~0x3Fu), "the caller's control word is kept");
        _mm_setcsr(0x1F80);
#endif
        fesetround(FE_TONEAREST);
        check(mode == modes[i], "the caller's rounding mode is kept");
        check(good && equal(state_out, wanted_states[299], STATE) &&
                  equal(logits_out, wanted_logits[299], N_VOCAB),
              "the caller's rounding mode has no effect");
        check(quantized, "quantize: %s", rwkv_get_last_error_message());
    }
    rwkv_free(ctx);
}

/* ---- Tests: files and memory --------------------------------------------------------------------
 */

/* The number of files in the test's folder: none may be left behind. */
static int count_files(void) {
    int n = 0;
    DIR * dir = opendir(folder);
    while (readdir(dir) != NULL) n++;
    closedir(dir);
    return n - 2;
}

static size_t read_all(const char * path, char * data, size_t size) {
    FILE * file = fopen(path, "rb");
    if (file == NULL) return 0;
    const size_t n = fread(data, 1, size, file);
    fclose(file);
    return n;
}

static bool cancel_at_half(void * user, uint64_t done, uint64_t total) {
    (*(int *)user)++;
    return done <= total && done < total / 2;
}

static void test_quantize(void) {
    struct rwkv_quantize_options options = rwkv_default_quantize_options();
    static char by_name[200000], by_number[200000];
    for (uint32_t type = 2; type <= 9; type++) {
        const char * name = rwkv_get_format_name(type);
        options.format_name = name;
        check(rwkv_quantize_file(model_path, output_path, &options), "%s: %s", name,
              rwkv_get_last_error_message());
        const size_t n = read_all(output_path, by_name, sizeof by_name);
        int32_t version;
        memcpy(&version, by_name + 4, sizeof version);
        check(version == (rwkv_get_row_size(101, type, 32) > 0 ? 101 : 100), "%s: version %d", name,
              version);
        check(rwkv_quantize_model_file(model_path, output_path, (const char *)(uintptr_t)type) &&
                  read_all(output_path, by_number, sizeof by_number) == n &&
                  memcmp(by_name, by_number, n) == 0,
              "format %u by its number", type);
        struct rwkv_context * ctx = rwkv_init_from_file(output_path, 2);
        check(ctx && rwkv_eval_sequence(ctx, tokens, 300, NULL, state_out, logits_out),
              "evaluate %s", name);
        rwkv_free(ctx);
        refused(rwkv_quantize_model_file(output_path, model_path, "Q8_0"),
                RWKV_ERROR_FILE | RWKV_ERROR_DATA_TYPE, "is already Q", "quantize twice");
    }
    const char * const unknown[] = {"q8_0",          "",     "FP16",          "Q8",
                                    "Q8_00",         "\x1b", (const char *)1, (const char *)10,
                                    (const char *)16};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        refused(rwkv_quantize_model_file(model_path, output_path, unknown[i]),
                RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE,
                "(choose from Q4_0, Q4_1, Q4_1_O, Q4_2, Q4_3, Q5_0, Q5_1, Q8_0)", "unknown format");
    }
    options.format_name = "Q4_2";
    options.file_version = 101;
    refused(rwkv_quantize_file(model_path, output_path, &options),
            RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE, "version 101 have no Q4_2",
            "a format of another version");
    options.file_version = 102;
    refused(rwkv_quantize_file(model_path, output_path, &options),
            RWKV_ERROR_ARGS | RWKV_ERROR_FILE_VERSION, "file_version is 102", "an unknown version");

    options = rwkv_default_quantize_options();
    options.format_name = "Q4_0";
    const char ** const texts[] = {&options.types, &options.importances, &options.method};
    for (int i = 0; i < 3; i++) {
        *texts[i] = "Q8_0";
        check(!rwkv_quantize_file(model_path, output_path, &options),
              "an option that does not fit");
        *texts[i] = NULL;
    }
    options.method = "rtn";
    int calls = 0;
    options.progress = cancel_at_half;
    options.progress_user = &calls;
    refused(rwkv_quantize_file(model_path, output_path, &options), RWKV_ERROR_CTX, "cancelled",
            "cancel");
    check(calls > 1, "progress is reported");
    refused(rwkv_quantize_model_file(model_path, model_path, "Q4_0"), RWKV_ERROR_ARGS, "same file",
            "in place");
    check(count_files() == 2, "%d files instead of 2", count_files());
    unlink(output_path);
}

static void test_progress_of_loading(void) {
    int calls = 0;
    struct rwkv_load_options options = rwkv_default_load_options();
    options.progress = cancel_at_half;
    options.progress_user = &calls;
    for (int i = 0; i < 2; i++) {
        options.mmap = i;
        refused(rwkv_load(model_path, &options), RWKV_ERROR_CTX, "cancelled", "cancel");
    }
    check(calls > 10, "progress is reported");
    options.progress = fault_throw;
    refused(rwkv_load(model_path, &options), RWKV_ERROR_CTX, "unknown exception",
            "a callback that throws");
}

static void test_estimate(void) {
    for (int i = 0; i < 10; i++) {
        struct rwkv_load_options options = rwkv_default_load_options();
        options.mmap = i % 2;
        options.head = i / 2 == 2 ? "Q8_0" : NULL;
        if (i == 2) check(rwkv_quantize_model_file(model_path, output_path, "Q4_1_O"), "quantize");
        if (i / 2 == 4) options.activations = "bf16";
        const char * path = i / 2 % 3 == 0 || options.activations ? model_path : output_path;
        struct rwkv_memory memory = {.size = sizeof memory}, dense = memory;
        check(rwkv_estimate(path, &options, &dense), "estimate");
        options.sparse_ffn = i / 2 == 3;
        check(rwkv_estimate(path, &options, &memory), "estimate: %s",
              rwkv_get_last_error_message());
        struct stat status;
        stat(path, &status);
        check(memory.file == (uint64_t)status.st_size, "size of the file");
        check(memory.state == STATE * sizeof(float), "size of a state");
        const size_t before = fault_aligned_bytes();
        struct rwkv_context * ctx = rwkv_load(path, &options);
        check(rwkv_eval_sequence(ctx, tokens, N_TOKENS, NULL, state_out, logits_out), "eval");
        const size_t taken = fault_aligned_bytes() - before;
        check(taken == memory.weights + memory.scratch, "%zu bytes taken, %zu and %zu estimated",
              taken, (size_t)memory.weights, (size_t)memory.scratch);
        check((memory.mapped > 0) == options.mmap, "%zu bytes mapped", (size_t)memory.mapped);
        const size_t columns = options.sparse_ffn ? N_LAYER * N_FFN * N_EMBED * 4 : 0;
        check(memory.weights == dense.weights + columns, "%zu bytes of columns",
              (size_t)(memory.weights - dense.weights));
        const size_t loaded = memory.mapped + dense.weights, embedding = N_VOCAB * N_EMBED * 4;
        const size_t padding = 64 * 100; /* of its tensors */
        check(memory.token <= loaded - embedding && memory.token >= loaded - embedding - padding,
              "%zu bytes read by a token", (size_t)memory.token);
        rwkv_free(ctx);
    }
    unlink(output_path);

    const struct {
        size_t n_embed, n_layer;
        double parameters;
    } released[] = {{768, 12, 169e6}, {1024, 24, 430e6}, {2048, 24, 1.5e9},
                    {2560, 32, 3e9},  {4096, 32, 7.4e9}, {5120, 40, 14e9}};
    for (size_t i = 0; i < sizeof released / sizeof *released; i++) {
        struct rwkv_memory memory = {.size = sizeof memory};
        check(rwkv_estimate_shape(50277, released[i].n_embed, released[i].n_layer, "FP16", NULL,
                                  &memory) &&
                  (double)memory.file > 1.98 * released[i].parameters &&
                  (double)memory.file < 2.04 * released[i].parameters,
              "a model of %g parameters takes %g bytes", released[i].parameters,
              (double)memory.file);
    }
    struct rwkv_memory memory = {.size = offsetof(struct rwkv_memory, token), .token = 1234};
    check(rwkv_estimate(model_path, NULL, &memory) && memory.state == STATE * sizeof(float) &&
              memory.token == 1234,
          "the struct of version 1000");
    memory.size = sizeof memory;
    refused(rwkv_estimate_shape(50277, 100, 3, "Q4_0", NULL, &memory),
            RWKV_ERROR_ARGS | RWKV_ERROR_DIMENSION, "multiple of 32", "an odd shape");
    refused(rwkv_estimate_shape(0, 96, 3, "Q4_0", NULL, &memory),
            RWKV_ERROR_ARGS | RWKV_ERROR_DIMENSION, "n_vocab", "no vocabulary");
    refused(rwkv_estimate_shape(9, 96, SIZE_MAX, "Q4_0", NULL, &memory),
            RWKV_ERROR_ARGS | RWKV_ERROR_DIMENSION, "n_layer", "too deep");
    refused(rwkv_estimate_shape(9, 96, 2, "Q9", NULL, &memory),
            RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE, "FP32, FP16, Q4_0", "format");
}

static void test_measure(void) {
    for (uint32_t n = 0; n < 3; n++) {
        struct rwkv_limits limits = {.size = sizeof limits};
        check(rwkv_measure(n, 100000, &limits), "%s", rwkv_get_last_error_message());
        check(limits.n_threads == n || (n == 0 && limits.n_threads > 0), "threads measured");
        check(limits.read > 1e8 && limits.read < 1e13, "reads %g bytes a second", limits.read);
        check(limits.fp32 > 1e8 && limits.fp32 < 1e15, "%g FP32 operations", limits.fp32);
        check(limits.int8 > 1e8 && limits.int8 < 1e15, "%g int8 operations", limits.int8);
    }
    struct rwkv_limits limits = {.size = sizeof limits - 1};
    refused(rwkv_measure(1, 0, &limits), RWKV_ERROR_ARGS, "size is", "size of limits");
    limits.size = sizeof limits;
    refused(rwkv_measure(1, 0, NULL), RWKV_ERROR_ARGS, "limits is NULL", "no limits");
    refused(rwkv_measure(2000, 0, &limits), RWKV_ERROR_ARGS, "at most 1024", "2000 threads");
    refused(rwkv_measure(1, UINT64_MAX, &limits), RWKV_ERROR_ARGS | RWKV_ERROR_ALLOC,
            "out of memory", "all memory");
    check(limits.read == 0, "a failed call writes nothing");
}

static bool load_and_evaluate(void) {
    struct rwkv_load_options options = rwkv_default_load_options();
    options.n_threads = 2;
    struct rwkv_context * ctx = rwkv_load(model_path, &options);
    struct rwkv_context * clone = ctx ? rwkv_clone_context(ctx, 1) : NULL;
    const struct rwkv_sequence sequences[] = {
        {tokens, 300, NULL, state_out, logits_out, 1, NULL, NULL},
        {tokens, 3, NULL, NULL, NULL, 0, NULL, NULL}};
    const bool good = clone && rwkv_eval_batch(clone, sequences, 2, sizeof *sequences);
    if (good)
        check(equal(logits_out, wanted_logits[299], N_VOCAB), "the right logits after failures");
    if (!good) check(all_intact(), "a failed call writes nothing");
    rwkv_free(ctx);
    rwkv_free(clone);
    return good;
}

static bool adapt_and_evaluate(void) {
    fill_adapter();
    struct rwkv_context * ctx = rwkv_init_from_file(model_path, 2);
    struct rwkv_adapter * adapter = ctx ? create_adapter(ctx) : NULL;
    const bool good = adapter && evaluate_with(ctx, adapter, logits_out);
    if (ctx && adapter && !good) { /* a context whose memory could not grow goes on */
        check(rwkv_eval_sequence(ctx, tokens, 300, NULL, NULL, logits_out) &&
                  equal(logits_out, wanted_logits[299], N_VOCAB),
              "without the adapter after a failure with it");
    }
    rwkv_free_adapter(adapter);
    rwkv_free(ctx);
    return good;
}

static bool quantize(void) {
    return rwkv_quantize_model_file(model_path, output_path, "Q4_0");
}

/* Lets every call of a kind fail in turn, until there are no more. */
static void fail_each(enum fault kind, bool (*operation)(void),
                      const char * what) { /* */
    static char good[200000], now[200000];
    check(quantize(), "quantize");
    const size_t size = read_all(output_path, good, sizeof good);
    long nth = 1;
    for (;; nth++) {
        fill_guarded();
        fault_arm(kind, nth);
        const bool succeeded = operation();
        if (!fault_disarm()) {
            check(succeeded, "%s: %s", what, rwkv_get_last_error_message());
            break;
        }
        /* A thread that could not be started is no failure. */
        check(succeeded || rwkv_get_last_error_message()[0], "%s: call %ld fails without a text",
              what, nth);
        check(read_all(output_path, now, sizeof now) == size && memcmp(now, good, size) == 0,
              "%s: call %ld fails and harms the output", what, nth);
        check(count_files() == 2, "%s: call %ld fails and leaves a file", what, nth);
    }
    check(nth > 1, "%s: never failed", what);
}

static void test_failing_calls(void) {
    fail_each(FAULT_NEW, load_and_evaluate, "allocations of load and eval");
    fail_each(FAULT_NEW, adapt_and_evaluate, "allocations of adapters");
    fail_each(FAULT_READ, load_and_evaluate, "reads of load");
    fail_each(FAULT_NEW, quantize, "allocations of quantize");
    fail_each(FAULT_READ, quantize, "reads of quantize");
    fail_each(FAULT_WRITE, quantize, "writes of quantize");
    fail_each(FAULT_CLOSE, quantize, "closes of quantize");
    fail_each(FAULT_RENAME, quantize, "renames of quantize");
    unlink(output_path);
}

static void test_stale_temporaries(void) { /* */
    char stale[128], alive[128], foreign[128];
    const pid_t child = fork();
    if (child == 0) _exit(0);
    waitpid(child, NULL, 0); /* so this id is free */
    snprintf(stale, sizeof stale, "%s/.out.bin.%d-0badcafe.tmp", folder, (int)child);
    snprintf(alive, sizeof alive, "%s/.out.bin.%d-0badcafe.tmp", folder, (int)getpid());
    snprintf(foreign, sizeof foreign, "%s/.other.bin.%d-0badcafe.tmp", folder, (int)child);
    fclose(fopen(stale, "w"));
    fclose(fopen(alive, "w"));
    fclose(fopen(foreign, "w"));
    check(quantize(), "quantize");
    check(access(stale, F_OK) != 0, "what a dead process left is removed");
    check(access(alive, F_OK) == 0 && access(foreign, F_OK) == 0,
          "what others write is left alone");
    unlink(alive);
    unlink(foreign);
    unlink(output_path);
}

static void test_information(void) {
    const char * const names[] = {"FP32", "FP16", "Q4_0", "Q4_1", "Q4_1_O",
                                  "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0"};
    for (uint32_t i = 0; i < 10; i++)
        check(strcmp(rwkv_get_format_name(i), names[i]) == 0, "name of %u", i);
    check(rwkv_get_format_name(10) == NULL && rwkv_get_format_name(UINT32_MAX) == NULL,
          "names end");
    check(rwkv_get_row_size(100, 2, 64) == 40 && rwkv_get_row_size(101, 2, 64) == 36,
          "rows of Q4_0");
    check(rwkv_get_row_size(101, 0, 7) == 28 && rwkv_get_row_size(100, 1, 7) == 14,
          "rows of floats");
    check(rwkv_get_row_size(100, 5, 64) == 40 && rwkv_get_row_size(101, 5, 64) == 0,
          "rows of Q4_2");
    check(rwkv_get_row_size(101, 2, 33) == 0 && rwkv_get_row_size(102, 2, 64) == 0 &&
              rwkv_get_row_size(101, 10, 64) == 0,
          "rows that do not exist");
    check(rwkv_get_api_version() == RWKV_API_VERSION, "API version");
    check(strstr(rwkv_get_system_info_string(), "ISA=") != NULL, "system info");
    setenv("RWKV_ISA", "scalar", 1);
    check(strstr(rwkv_get_system_info_string(), "ISA=scalar") != NULL, "system info");
    struct rwkv_context * ctx = load(1);
    check(rwkv_eval_sequence(ctx, tokens, 300, NULL, NULL, logits_out) &&
              equal(logits_out, wanted_logits[299], N_VOCAB),
          "RWKV_ISA=scalar gives the same bits");
    rwkv_free(ctx);
    setenv("RWKV_ISA", "sse9", 1);
    refused(rwkv_init_from_file(model_path, 1), RWKV_ERROR_CTX | RWKV_ERROR_UNSUPPORTED,
            "RWKV_ISA=sse9", "unknown level");
    unsetenv("RWKV_ISA");
    check(rwkv_get_print_errors(NULL) == false, "printing is off");
}

int main(void) {
    if (mkdtemp(folder) == NULL) return 1;
    snprintf(model_path, sizeof model_path, "%s/model.bin", folder);
    snprintf(output_path, sizeof output_path, "%s/out.bin", folder);
    check(rwkv_get_print_errors(NULL), "errors are printed at first");
    check(rwkv_get_last_error_message()[0] == '\0', "no error at first");
    rwkv_set_print_errors(NULL, false);
    write_model(model_path);
    compute_wanted();

    test_null();
    test_tokens();
    test_options();
    test_thread_counts();
    test_older_callers();
    test_aliases();
    test_misaligned();
    test_sequences();
    test_batches();
    test_bad_batches();
    test_adapters();
    test_bad_adapters();
    test_contexts();
    test_busy_and_interrupt();
    test_interrupt_in_the_queue();
    if (!getenv("TEST_WITHOUT_FORK")) test_fork();
    test_floating_point_environment();
    test_quantize();
    test_progress_of_loading();
    test_estimate();
    test_measure();
    test_failing_calls();
    test_stale_temporaries();
    test_information();

    unlink(model_path);
    rmdir(folder);
    return finish();
}
