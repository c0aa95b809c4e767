/* rwkv.h: RWKV language models on a CPU.
 *
 * A model is read from a "ggmf" file; a context evaluates it; the state of a conversation is a flat
 * array of floats that belongs to the caller. Evaluation is a pure function
 *
 *     (tokens, state) -> (logits, new state)
 *
 * whose result is the same to the bit whatever the number of threads, the CPU's instruction set,
 * and however tokens are grouped into calls.
 *
 * Errors: functions return false or NULL and leave their outputs untouched; a text that says what
 * was wrong is kept per thread (rwkv_get_last_error_message). Nothing aborts, exits or throws. The
 * text is also printed to stderr unless rwkv_set_print_errors turned that off.
 *
 * Threads: any number of contexts may share one model and run at the same time. One context runs
 * one evaluation at a time; a second one meanwhile is refused. Using a context after rwkv_free is
 * undefined. */
#ifndef RWKV_H
#define RWKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef RWKV_SHARED
#ifdef _WIN32
#ifdef RWKV_BUILD
#define RWKV_API __declspec(dllexport)
#else
#define RWKV_API __declspec(dllimport)
#endif
#else
#define RWKV_API __attribute__((visibility("default")))
#endif
#else
#define RWKV_API
#endif

/* The API this header describes: major * 1000 + minor. A binding needs the same major and at least
 * its minor from rwkv_get_api_version(). */
#define RWKV_API_VERSION 1002

#define RWKV_FILE_MAGIC 0x67676d66
#define RWKV_FILE_VERSION_0 100
#define RWKV_FILE_VERSION_1 101
#define RWKV_FILE_VERSION_MIN RWKV_FILE_VERSION_0
#define RWKV_FILE_VERSION_MAX RWKV_FILE_VERSION_1
#define RWKV_FILE_VERSION RWKV_FILE_VERSION_MAX

#ifdef __cplusplus
extern "C" {
#endif

struct rwkv_context;
struct rwkv_adapter;

/* ---- Errors --------------------------------------------------------------------------------- */

/* A code is one category, or-ed with one detail. */
enum rwkv_error_flags {
    RWKV_ERROR_NONE = 0,

    RWKV_ERROR_ARGS = 1 << 8,
    RWKV_ERROR_FILE = 2 << 8,
    RWKV_ERROR_MODEL = 3 << 8,
    RWKV_ERROR_MODEL_PARAMS = 4 << 8,
    RWKV_ERROR_GRAPH = 5 << 8,
    RWKV_ERROR_CTX = 6 << 8,

    RWKV_ERROR_ALLOC = 1,
    RWKV_ERROR_FILE_OPEN = 2,
    RWKV_ERROR_FILE_STAT = 3,
    RWKV_ERROR_FILE_READ = 4,
    RWKV_ERROR_FILE_WRITE = 5,
    RWKV_ERROR_FILE_MAGIC = 6,
    RWKV_ERROR_FILE_VERSION = 7,
    RWKV_ERROR_DATA_TYPE = 8,
    RWKV_ERROR_UNSUPPORTED = 9,
    RWKV_ERROR_SHAPE = 10,
    RWKV_ERROR_DIMENSION = 11,
    RWKV_ERROR_KEY = 12,
    RWKV_ERROR_DATA = 13,
    RWKV_ERROR_PARAM_MISSING = 14
};

/* The text of this thread's last error, "" if there was none; valid until its next call. */
RWKV_API const char * rwkv_get_last_error_message(void);

/* Whether errors are also printed to stderr: per context, or with NULL for calls that have no
 * context and as the default of contexts made later. On at first. */
RWKV_API void rwkv_set_print_errors(struct rwkv_context * ctx, bool print_errors);
RWKV_API bool rwkv_get_print_errors(struct rwkv_context * ctx);

/* Returns and clears the code of the last error of a context; NULL: of this thread's calls that had
 * no context. */
RWKV_API enum rwkv_error_flags rwkv_get_last_error(struct rwkv_context * ctx);

/* ---- Loading -------------------------------------------------------------------------------- */

/* Called on the calling thread with done <= total; returning false cancels, which is an error. */
typedef bool (*rwkv_progress)(void * user, uint64_t done, uint64_t total);

/* Option structs start with their size as the caller knows it and grow only at the end; bytes that
 * this library does not know must be zero. rwkv_default_*() fills them; it is compiled into the
 * caller, whose structs may be shorter than the library's. */
struct rwkv_load_options {
    uint32_t size;
    uint32_t n_threads; /* of the context; 0: physical cores this process may use; at most 1024 */
    bool mmap;          /* FP32 and FP16 matrices stay in the mapped file (do not overwrite it while
                           it is loaded); false: all is read into private memory. Default true */
    bool prefault;      /* read mapped pages now rather than with the first token. Default false */
    bool sparse_ffn;    /* FP32, FP16, Q8_0: a second copy of each ffn.value.weight, by columns, so
                           that a token alone does not read those that its hidden layer has zeros
                           for; same bits. FP32 and FP16 weights have to be finite there; an error
                           in other formats. Default false */
    const char * head;  /* "Q4_0" … "Q8_0": an FP32 or FP16 head is quantized while it is loaded, as
                           rwkv_quantize_file does it, in the newest version's layout; an error if
                           the file has it in another quantized format. NULL: as it is in the file */
    const char * activations; /* of the context: how vectors are rounded that meet quantized
                                 matrices. NULL or "A16": to 14 bits and a sign. "int8": to 7, which
                                 reads prompts faster and is less exact. "bf16": as A16, and FP32
                                 and FP16 matrices and what they are multiplied with are rounded to
                                 bfloat16, for the same reason: a copy in private memory, which
                                 takes 2 bytes a weight and no sparse_ffn */
    rwkv_progress progress;   /* bytes of the file; may be NULL */
    void * progress_user;
};
static inline struct rwkv_load_options rwkv_default_load_options(void) {
    struct rwkv_load_options options = {sizeof options, 0,    true, false, false,
                                        NULL,           NULL, NULL, NULL};
    return options;
}

struct rwkv_context_options {
    uint32_t size;
    uint32_t n_threads;       /* as above */
    const char * activations; /* as above; NULL: those of ctx; an error if these are bf16 and those
                                 of ctx are not, or the other way round */
};
static inline struct rwkv_context_options rwkv_default_context_options(void) {
    struct rwkv_context_options options = {sizeof options, 0, NULL};
    return options;
}

/* Loads a model and makes a context for it. options NULL: the defaults. NULL on error. */
RWKV_API struct rwkv_context * rwkv_load(const char * path,
                                         const struct rwkv_load_options * options);

/* The same with default options; n_threads 0: as above. */
RWKV_API struct rwkv_context * rwkv_init_from_file(const char * model_file_path,
                                                   uint32_t n_threads);

/* Another context for the model of ctx: weights and thread pool are shared, scratch memory is not.
 * Free contexts in any order, from any thread; the model goes with the last one. NULL on error. */
RWKV_API struct rwkv_context * rwkv_clone_context(struct rwkv_context * ctx, uint32_t n_threads);
RWKV_API struct rwkv_context * rwkv_clone_context_with(struct rwkv_context * ctx,
                                                       const struct rwkv_context_options * options);

RWKV_API void rwkv_free(struct rwkv_context * ctx); /* NULL is fine */

/* What loading takes, in bytes. */
struct rwkv_memory {
    uint32_t size;
    uint64_t file;    /* size of the file */
    uint64_t mapped;  /* of which stays mapped and is read with each token or row */
    uint64_t weights; /* private memory of the model: vectors, repacked or copied matrices */
    uint64_t scratch; /* private memory of one context, once prompts of 256 tokens have been read */
    uint64_t state;   /* one state */
    uint64_t token;   /* what every token reads of the weights (sparse_ffn: at most); since 1001 */
};

/* Fills *memory (size set by the caller) from the file's table of tensors, without the weights. */
RWKV_API bool rwkv_estimate(const char * path, const struct rwkv_load_options * options,
                            struct rwkv_memory * memory);

/* The same for a model that is not there: RWKV-4 of n_layer blocks with all matrices in the format
 * `format_name` as rwkv_quantize_file writes it (embedding and head in FP16; all in FP32 for
 * "FP32"). */
RWKV_API bool rwkv_estimate_shape(size_t n_vocab, size_t n_embed, size_t n_layer,
                                  const char * format_name,
                                  const struct rwkv_load_options * options,
                                  struct rwkv_memory * memory);

/* ---- Adapters ------------------------------------------------------------------------------- */

/* What an adapter changes in one tensor of a model. */
struct rwkv_adapter_part {
    const char * name;    /* as in the model's file: "blocks.0.att.key.weight" */
    size_t rows, cols;    /* of the tensor, for a check; rows of a vector: 1 */
    size_t rank;          /* of a matrix W, which becomes W + scale·B·A: 1 or more */
    const float * a;      /* A, rank × cols */
    const float * b;      /* B, rows × rank */
    float scale;          /* of a LoRA: alpha / rank */
    const float * values; /* of a vector: cols values in place of the model's, as its file has them
                             (time_decay: -exp(w)); then rank is 0, a and b are NULL */
};

/* Makes what differs for some sequences of the model of ctx, a LoRA for example; W and B·A stay
 * apart, whatever the format of W, and the embedding cannot change. Of several parts for one
 * tensor, products add up and the last values count. The adapter serves all contexts of this model
 * and is copied: the parts may go. It does not keep the model in memory. sizeof_part: sizeof(struct
 * rwkv_adapter_part) as the caller has it. NULL on error. Since 1002. */
RWKV_API struct rwkv_adapter * rwkv_create_adapter(struct rwkv_context * ctx,
                                                   const struct rwkv_adapter_part * parts,
                                                   size_t n_parts, size_t sizeof_part);

/* Not while an evaluation uses it; NULL is fine. Since 1002. */
RWKV_API void rwkv_free_adapter(struct rwkv_adapter * adapter);

/* ---- Sizes ---------------------------------------------------------------------------------- */

RWKV_API size_t rwkv_get_n_vocab(const struct rwkv_context * ctx);
RWKV_API size_t rwkv_get_n_embed(const struct rwkv_context * ctx);
RWKV_API size_t rwkv_get_n_layer(const struct rwkv_context * ctx);
/* Floats in a state: of each layer 5 * n_embed and, in RWKV-4a, the tiny attention's
 * n_tiny * n_embed at the end. */
RWKV_API size_t rwkv_get_state_len(const struct rwkv_context * ctx);
RWKV_API size_t rwkv_get_logits_len(const struct rwkv_context * ctx); /* floats, of a token */
RWKV_API uint32_t rwkv_get_state_buffer_element_count(const struct rwkv_context * ctx);
RWKV_API uint32_t rwkv_get_logits_buffer_element_count(const struct rwkv_context * ctx);

/* ---- Evaluation ----------------------------------------------------------------------------- */

/* Writes the state before the first token: rwkv_get_state_len(ctx) floats. */
RWKV_API void rwkv_init_state(const struct rwkv_context * ctx, float * state);

/* Evaluates one token.
 * - token:      less than rwkv_get_n_vocab(ctx).
 * - state_in:   rwkv_get_state_len(ctx) floats, or NULL for the state before the first token.
 * - state_out:  as many floats, or NULL; may be state_in itself, but not overlap it otherwise.
 * - logits_out: rwkv_get_logits_len(ctx) floats, or NULL, which saves the time of the head. */
RWKV_API bool rwkv_eval(struct rwkv_context * ctx, uint32_t token, const float * state_in,
                        float * state_out, float * logits_out);

/* Evaluates tokens one after the other in one pass over the weights; logits_out is the last
 * token's. tokens NULL: returns true and does nothing. sequence_len 0 with tokens is an error. */
RWKV_API bool rwkv_eval_sequence(struct rwkv_context * ctx, const uint32_t * tokens,
                                 size_t sequence_len, const float * state_in, float * state_out,
                                 float * logits_out);

/* The same: sequences of any length are cut into suitable chunks anyway, so chunk_size (1 or more)
 * is not needed for speed or memory. */
RWKV_API bool rwkv_eval_sequence_in_chunks(struct rwkv_context * ctx, const uint32_t * tokens,
                                           size_t sequence_len, size_t chunk_size,
                                           const float * state_in, float * state_out,
                                           float * logits_out);

/* One of the independent sequences of a batch. NULL or 0: not wanted. */
struct rwkv_sequence {
    const uint32_t * tokens; /* n_tokens of them, at least 1 */
    size_t n_tokens;
    const float * state_in;
    float * state_out;
    float * logits_out; /* n_logits rows of logits: the LAST n_logits tokens */
    size_t n_logits;    /* at most n_tokens */
    float * hidden_out; /* rwkv_get_n_embed(ctx) floats: what the head sees of the last token */
    const struct rwkv_adapter * adapter; /* NULL: the model as it is; since 1002 */
};

/* Evaluates sequences of any lengths together; each gets the bits that it would get alone. Outputs
 * may not overlap anything, but a state_out may be the state_in of its own sequence. Everything is
 * checked before the first write: false means that no buffer of any sequence has changed.
 * sizeof_sequence: sizeof(struct rwkv_sequence) as the caller has it. n_sequences may be 0. */
RWKV_API bool rwkv_eval_batch(struct rwkv_context * ctx, const struct rwkv_sequence * sequences,
                              size_t n_sequences, size_t sizeof_sequence);

/* Number 0, 1, … of the matrices that rwkv_quantize_file can quantize, the head among them: its
 * name, which lives as long as ctx, and how many columns it has (cols may be NULL). NULL: there are
 * no more. Since 1002. */
RWKV_API const char * rwkv_get_matrix(const struct rwkv_context * ctx, size_t number,
                                      size_t * cols);

/* rwkv_eval_batch, which also adds the square of everything that a column of a matrix is multiplied
 * with, token after token, to squares: a number for each column of the first matrix, then those of
 * the second, and so on. Divided by the number of tokens they are the importances that
 * rwkv_quantize_file takes. However tokens are grouped into calls, the same ones in the same order
 * give the same bits. Since 1002. */
RWKV_API bool rwkv_eval_importances(struct rwkv_context * ctx,
                                    const struct rwkv_sequence * sequences, size_t n_sequences,
                                    size_t sizeof_sequence, double * squares);

/* From any thread: makes the evaluation that ctx is running fail soon, outputs unchanged. Does
 * nothing if none is running, or if the one running has begun to write its results. */
RWKV_API void rwkv_interrupt(struct rwkv_context * ctx);

/* ---- Files ---------------------------------------------------------------------------------- */

struct rwkv_quantize_options {
    uint32_t size;
    const char * format_name; /* "Q4_0" … "Q8_0"; required */
    uint32_t file_version;    /* 0: 101 where that has the format, otherwise 100 */
    bool allow_nan;      /* weights that are not finite: false is an error, true passes them on */
    const char * head;   /* "Q4_0" … "Q8_0", in that version. NULL: the source's format, which the
                            embedding keeps anyway */
    const char * types;  /* "PATTERN=FORMAT,…": matrices in formats of their own, in that version,
                            "FP16" and "FP32" included, the head's and the embedding's too. A
                            pattern is one or more whole parts of names ("ffn.value", "blocks.0",
                            "head"); the last one that matches wins. NULL: none. Since 1002 */
    const char * method; /* "rtn": round to nearest by the format's own rule. "mse": scales are
                            searched for the least squared error. "importance": the same, an error
                            counting as much as its column matters. NULL: "importance" where
                            importances are given, otherwise "rtn". Since 1002 */
    const char * importances; /* for that: path of a ggmf file of the model's sizes with an FP32
                                 vector for each matrix, of its name: for each of its columns the
                                 mean square of what it is multiplied with (rwkv_eval_importances).
                                 An embedding has none: mse. Since 1002 */
    rwkv_progress progress;   /* bytes of the source; may be NULL */
    void * progress_user;
};
static inline struct rwkv_quantize_options rwkv_default_quantize_options(void) {
    struct rwkv_quantize_options options = {
        sizeof options, NULL, 0, false, NULL, NULL, NULL, NULL, NULL, NULL,
    };
    return options;
}

/* Writes a quantized copy of an FP32 or FP16 model. The output appears, or replaces an older file,
 * only when it is complete; on failure nothing is left behind. Output and input may not be the same
 * file. */
RWKV_API bool rwkv_quantize_file(const char * path_in, const char * path_out,
                                 const struct rwkv_quantize_options * options);

/* The same with default options. format_name may also be a number of 2..9 cast to a pointer (2:
 * Q4_0, 3: Q4_1, 4: Q4_1_O, 5: Q4_2, 6: Q4_3, 7: Q5_0, 8: Q5_1, 9: Q8_0), as callers of April 2023
 * pass it. */
RWKV_API bool rwkv_quantize_model_file(const char * model_file_path_in,
                                       const char * model_file_path_out, const char * format_name);

/* The name of a data type in a file ("FP16" for 1), or NULL. */
RWKV_API const char * rwkv_get_format_name(uint32_t data_type);

/* Bytes of a row of n weights, or 0 if files of that version have no such type, if n is not a
 * multiple of 32 and the type is quantized, or if n is 2^32 or more. */
RWKV_API size_t rwkv_get_row_size(uint32_t file_version, uint32_t data_type, size_t n);

/* Writes a row of n weights, as files of version_in hold it in type_in, the way that files of
 * version_out hold it in type_out. Between the versions of one format the codes stay and only the
 * scales are rounded; between formats the weights are dequantized and quantized by the rule of the
 * other, and a Q4_1_O block without sense is an error. A scale or a weight may become infinite.
 * Rows of multiples of 32 weights that lie one after the other may be given as one. `in` and `out`:
 * rwkv_get_row_size(…, n) bytes, apart from each other. Since 1002. */
RWKV_API bool rwkv_convert_row(uint32_t version_in, uint32_t type_in, const void * in,
                               uint32_t version_out, uint32_t type_out, void * out, size_t n);

/* ---- This library --------------------------------------------------------------------------- */

RWKV_API uint32_t rwkv_get_api_version(void);

/* What the CPU offers and which kernels run ("AVX=1 AVX2=1 … ISA=avx2"); valid until this thread's
 * next call. The environment variable RWKV_ISA (scalar, sse2, …) chooses another level for models
 * loaded after it is set. */
RWKV_API const char * rwkv_get_system_info_string(void);

/* What this CPU's kernels can reach at most, per second. Since 1001. */
struct rwkv_limits {
    uint32_t size;
    uint32_t n_threads; /* that were measured */
    double read;        /* bytes read */
    double fp32;        /* FP32 operations, two per multiply-add */
    double int8;        /* operations of int8 dot products, two per multiply-add */
};

/* Measures the limits with n_threads threads (0: as above) in about half a second. `read` is for a
 * buffer of n_bytes that is read again and again: a GiB shows the memory, half of the last cache
 * shows that cache. */
RWKV_API bool rwkv_measure(uint32_t n_threads, uint64_t n_bytes, struct rwkv_limits * limits);

#ifdef __cplusplus
}
#endif

#endif
