// rwkv.cpp: models and contexts, from a file to logits, and the C API. It reads from top to bottom:
//
//     errors             one place where exceptions end
//     the model          tensors of a file -> matrices in memory
//     evaluation         many sequences, in chunks, outputs last
//     the C API          each function of rwkv.h in a few lines
//
// What a file holds is in model_file.cpp, what an architecture makes of it in arch/, what differs
// between systems in file.cpp, what is fast and what is exact behind ggml/ggml.h.

#include "rwkv.h"

#include "adapter.h"
#include "arch/rwkv4.h"
#include "buffer.h"
#include "file.h"
#include "model_file.h"
#include "quantize_file.h"
#include "rwkv_error.h"
#include "team.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

using namespace rwkv;

namespace {

// ==== Errors =====================================================================================

thread_local char last_text[sizeof Error::text];
thread_local int last_flags;  // of this thread's calls without a context
std::atomic<bool> print_by_default{true};

// Keeps the outcome of a context's calls.
struct Reporter {
    std::atomic<int> flags{RWKV_ERROR_NONE};
    std::atomic<bool> print{print_by_default.load()};
};

void report(Reporter * reporter, int flags, const char * text) {
    snprintf(last_text, sizeof last_text, "%s", text);
    if (reporter != nullptr) {
        reporter->flags = flags;
    } else {
        last_flags = flags;
    }
    const bool print = reporter != nullptr ? reporter->print : print_by_default;
    if (print) fprintf(stderr, "rwkv: %s\n", text);
}

// Runs body. An exception ends here: it is reported, and the result is false or NULL.
template <class F> auto guard(Reporter * reporter, F body) noexcept -> decltype(body()) {
    try {
        return body();
    } catch (const Error & error) {
        report(reporter, error.flags, error.text);
    } catch (const std::bad_alloc &) {
        report(reporter, RWKV_ERROR_CTX | RWKV_ERROR_ALLOC, "out of memory");
    } catch (const std::exception & error) {
        report(reporter, RWKV_ERROR_CTX, error.what());
    } catch (...) {  // of a callback
        report(reporter, RWKV_ERROR_CTX, "unknown exception");
    }
    return decltype(body())();
}

// Checks the size of a struct of the caller: it may be as short as in its first version (`oldest`
// bytes), or longer than ours.
void check_size(size_t size, size_t oldest, size_t known, const char * type) {
    if (size >= oldest && size <= 4096) return;
    fail(RWKV_ERROR_ARGS, "%s: size is %zu, expected %zu", type, size, known);
}

// What we don't know of a struct of the caller must be zero.
void check_tail(const void * given, size_t size, size_t known, const char * type) {
    for (size_t i = known; i < size; i++) {
        if (((const char *)given)[i] == 0) continue;
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED,
             "%s: the member at byte %zu is not known to this library (its API version is %d)",
             type, i, RWKV_API_VERSION);
    }
}

// ==== The model ==================================================================================

struct Model {
    Shape shape = {};
    std::vector<Tensor> tensors;
    const ggml_kernels * kernels = nullptr;
    Weights weights;
    size_t n_inputs = 0;  // columns of all matrices
    Mapping mapping;
    Buffer arena;  // all of the model that is private memory
    Pool pool;
    bool bf16 = false;  // its FP32 and FP16 matrices have become BF16
};

// What the option `activations` asks for.
struct Activations {
    ggml_activations of_quantized;
    bool bf16;  // of FP32 and FP16 matrices: they are multiplied as BF16
};

Activations find_activations(const char * name) {
    if (name == nullptr || std::strcmp(name, "A16") == 0) return {GGML_A16, false};
    if (std::strcmp(name, "int8") == 0) return {GGML_A8, false};
    if (std::strcmp(name, "bf16") == 0) return {GGML_A16, true};
    fail(RWKV_ERROR_ARGS, "unknown activations '%s' (choose A16, int8 or bf16)",
         escaped(name).c_str());
}

// The type that the head is to be quantized in while it is loaded.
ggml_type head_type(const Index & index, const Tensor & tensor, const char * head) {
    const ggml_type type = find_format(head, 0, FIRST_QUANTIZED).type;
    if (ggml_type_traits(tensor.type)->file_id == ggml_type_traits(type)->file_id) {
        return tensor.type;
    }
    const std::string where = index.path + ": tensor '" + tensor.name + "'";
    if (ggml_type_traits(tensor.type)->quantized) {
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE,
             "%s is %s already, head is %s (leave head out, or quantize the original again)",
             where.c_str(), type_name(tensor.type), type_name(type));
    }
    check_row(RWKV_ERROR_ARGS, where, tensor.cols, type);
    return type;
}

// The type that a tensor is evaluated in: the file's, unless options say otherwise.
ggml_type memory_type(const Index & index, const Tensor & tensor,
                      const rwkv_load_options & options) {
    const Kind kind = kind_of(tensor);
    if (kind == HEAD && options.head != nullptr) return head_type(index, tensor, options.head);
    const bool plain = !ggml_type_traits(tensor.type)->quantized;
    const bool bf16 = plain && find_activations(options.activations).bf16;
    return bf16 && (kind == MATRIX || kind == HEAD) ? GGML_TYPE_BF16 : tensor.type;
}

// Whether a tensor is one of those that rwkv_get_matrix counts.
bool can_be_quantized(const Tensor & tensor) {
    const Kind kind = kind_of(tensor);
    return is_needed(tensor) && (kind == MATRIX || kind == HEAD);
}

// Quantized and BF16 matrices are evaluated from stripes; embeddings are looked up row by row.
bool is_packed(const Tensor & tensor, ggml_type type) {
    return ggml_stripe_size(type, tensor.cols) > 0 && kind_of(tensor) != EMBEDDING;
}

// Bytes that a tensor takes in private memory; 0: it stays in the mapped file.
uint64_t private_size(const Tensor & tensor, ggml_type type, bool mmap) {
    if (is_packed(tensor, type)) return ggml_stripes_size(type, tensor.rows, tensor.cols);
    return is_vector(tensor) || !mmap ? tensor.size : 0;
}

// Bytes of a tensor's copy by columns; 0: it has none.
uint64_t columns_size(const Index & index, const Tensor & tensor,
                      const rwkv_load_options & options) {
    if (!options.sparse_ffn || !meets_zeros(tensor)) return 0;
    const ggml_type type = memory_type(index, tensor, options);
    const uint64_t size = ggml_columns_size(type, tensor.rows, tensor.cols);
    if (size > 0) return size;
    fail(RWKV_ERROR_ARGS | RWKV_ERROR_UNSUPPORTED,
         "%s: tensor '%s' is %s%s, sparse_ffn is for FP32, FP16 and Q8_0 (leave it out)",
         index.path.c_str(), tensor.name.c_str(), type == GGML_TYPE_BF16 ? "multiplied as " : "",
         type_name(type));
}

struct Sizes {
    uint64_t arena, mapped;
    uint64_t token;  // of both, what every token reads if no zeros are left out
};

Sizes sizes_of(const Index & index, const rwkv_load_options & options) {
    Sizes sizes = {};
    for (const Tensor & tensor : index.tensors) {
        if (!is_needed(tensor)) continue;
        const ggml_type type = memory_type(index, tensor, options);
        const uint64_t size = private_size(tensor, type, options.mmap);
        sizes.arena += aligned(size) + aligned(columns_size(index, tensor, options));
        if (size == 0) sizes.mapped += tensor.size;
        if (kind_of(tensor) != EMBEDDING) sizes.token += size > 0 ? size : tensor.size;
    }
    return sizes;
}

// Repacks a tensor, in this type, slab by slab, each as a matrix of its own.
void pack(const InputFile & file, const Tensor & tensor, ggml_type type, const Team & team,
          const Progress & progress, uint8_t * stripes) {
    const size_t stripe_size = ggml_stripe_size(type, tensor.cols);
    RowConverter convert(file, tensor, type, team, "load the head as it is");
    const auto pack_slab = [&](size_t first_row, size_t rows, const uint8_t * bytes) {
        if (type != tensor.type) bytes = convert(first_row, rows, bytes);
        uint8_t * to = stripes + first_row / GGML_STRIPE * stripe_size;
        Least bad_block;
        team.run(rows, GGML_STRIPE, [&](size_t first, size_t last) {
            size_t bad;
            const bool good =
                ggml_pack_stripes(type, rows, tensor.cols, bytes, to, first, last, &bad);
            if (!good) bad_block.offer(bad);
        });
        if (bad_block.get() == Least::none) return;
        const size_t blocks_before =
            first_row * tensor.cols / ggml_type_traits(tensor.type)->block_size;
        fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_DATA,
             "%s: tensor '%s': block %llu of %s has an outlier where none can be "
             "(the file is damaged)",
             file.path(), tensor.name.c_str(),
             (unsigned long long)(blocks_before + bad_block.get()), type_name(tensor.type));
    };
    each_slab(file, tensor, GGML_STRIPE, progress, pack_slab);
}

// Repacks an FP32 or FP16 tensor as BF16, the same way.
void pack_bf16(const InputFile & file, const Tensor & tensor, const Team & team,
               const Progress & progress, uint8_t * stripes) {
    const size_t stripe_size = ggml_stripe_size(GGML_TYPE_BF16, tensor.cols);
    const auto pack_slab = [&](size_t first_row, size_t rows, const uint8_t * bytes) {
        uint8_t * to = stripes + first_row / GGML_STRIPE * stripe_size;
        team.run(rows, GGML_STRIPE, [&](size_t first, size_t last) {
            ggml_pack_bf16(tensor.type, rows, tensor.cols, bytes, to, first, last);
        });
    };
    each_slab(file, tensor, GGML_STRIPE, progress, pack_slab);
}

// Copies a tensor by columns, the same way; FP32 and FP16 weights have to be finite.
void pack_columns(const InputFile & file, const Tensor & tensor, const Team & team,
                  const Progress & progress, uint8_t * columns) {
    const size_t row_size = ggml_row_size(tensor.type, tensor.cols);
    RowConverter check(file, tensor, tensor.type, team, "load without sparse_ffn");
    const auto pack_slab = [&](size_t first_row, size_t rows, const uint8_t * bytes) {
        if (!ggml_type_traits(tensor.type)->quantized) check(first_row, rows, bytes);
        team.run(rows, GGML_ROW_UNIT, [&](size_t first, size_t last) {
            ggml_pack_columns(tensor.type, tensor.rows, tensor.cols, bytes + first * row_size,
                              columns, first_row + first, first_row + last);
        });
    };
    each_slab(file, tensor, GGML_ROW_UNIT, progress, pack_slab);
}

const ggml_kernels * select_kernels() {
    const char * isa = std::getenv("RWKV_ISA");
    const char * reason = nullptr;
    const ggml_kernels * kernels = ggml_kernels_select(isa, &reason);
    if (kernels == nullptr) {
        fail(RWKV_ERROR_CTX | RWKV_ERROR_UNSUPPORTED, "RWKV_ISA=%s: %s", isa, reason);
    }
    return kernels;
}

std::shared_ptr<Model> load_model(const char * path, const rwkv_load_options & options,
                                  unsigned n_threads) {
    const auto model = std::make_shared<Model>();
    model->kernels = select_kernels();
    model->pool = create_pool();

    const InputFile file(path);
    Index index = read_model_index(file);
    const Sizes sizes = sizes_of(index, options);
    model->shape = index.shape;
    model->bf16 = find_activations(options.activations).bf16;
    model->weights.layers.resize(index.shape.n_layer);
    model->arena.allocate(sizes.arena, "the model");
    if (sizes.mapped > 0) model->mapping.open(file);

    const Team team(model->pool, n_threads);
    const Progress progress = {options.progress, options.progress_user, file.size()};
    uint8_t * next = model->arena.data();
    for (size_t number = 0; number < index.tensors.size(); number++) {
        const Tensor & tensor = index.tensors[number];
        if (!is_needed(tensor)) continue;
        const ggml_type type = memory_type(index, tensor, options);
        const uint64_t size = private_size(tensor, type, options.mmap);
        const uint8_t * data = size > 0 ? next : model->mapping.data() + tensor.offset;
        Weight & weight = weight_of(model->weights, tensor);
        weight = {{type, tensor.rows, tensor.cols, data, nullptr}, number, model->n_inputs};
        if (can_be_quantized(tensor)) model->n_inputs += tensor.cols;
        if (type == GGML_TYPE_BF16) {
            pack_bf16(file, tensor, team, progress, next);
        } else if (is_packed(tensor, type)) {
            pack(file, tensor, type, team, progress, next);
        } else if (size > 0) {
            file.read(tensor.offset, next, (size_t)size);
        } else if (options.prefault) {
            model->mapping.prefault(tensor.offset, tensor.size);
        }
        next += aligned(size);
        if (const uint64_t extra = columns_size(index, tensor, options)) {
            pack_columns(file, tensor, team, progress, next);
            weight.columns = next;
            next += aligned(extra);
        }
        progress(tensor.offset + tensor.size);
    }
    model->tensors = std::move(index.tensors);
    return model;
}

// ==== Evaluation =================================================================================

struct Span {
    uintptr_t first, last;
    bool output;
};

enum Phase { IDLE, RUNNING, INTERRUPTED, WRITING };

// A context's turn to evaluate: one at a time.
class Turn {
  public:
    explicit Turn(std::atomic<Phase> & phase) : phase_(phase) {
        Phase idle = IDLE;
        if (phase_.compare_exchange_strong(idle, RUNNING)) return;
        fail(RWKV_ERROR_CTX, "the context is busy with another evaluation "
                             "(make one context per thread with rwkv_clone_context)");
    }
    ~Turn() { phase_ = IDLE; }
    Turn(const Turn &) = delete;
    Turn & operator=(const Turn &) = delete;

    void check() const {
        if (phase_ == INTERRUPTED) fail(RWKV_ERROR_CTX, "interrupted");
    }

    // From here on nothing fails and nothing interrupts.
    void begin_writing() const {
        Phase running = RUNNING;
        if (!phase_.compare_exchange_strong(running, WRITING)) check();
    }

  private:
    std::atomic<Phase> & phase_;
};

}  // namespace

struct rwkv_adapter : Adapter {
    std::weak_ptr<const Model> model;  // the only one that it fits
    Buffer memory;
};

struct rwkv_context : Reporter {
    std::shared_ptr<const Model> model;
    unsigned n_threads;
    ggml_activations activations;
    std::atomic<Phase> phase{IDLE};
    Scratch scratch;
    Buffer scratch_memory;
    Buffer run_memory;  // states and hidden rows of the runs
    Chunk chunk;
    std::vector<Run> runs;
    std::vector<Span> spans;
    std::vector<double> squares;
};

namespace {

uint64_t run_memory_size(const Shape & shape, size_t n_sequences, size_t n_hidden) {
    return (n_sequences * (uint64_t)state_length(shape) + n_hidden * (uint64_t)shape.n_embed) *
           sizeof(float);
}

unsigned checked_threads(uint32_t n_threads) {
    if (n_threads > max_threads) {
        fail(RWKV_ERROR_ARGS, "n_threads is %u, expected at most %u", n_threads, max_threads);
    }
    return n_threads > 0 ? n_threads : default_threads();
}

rwkv_context * create_context(std::shared_ptr<const Model> model, unsigned n_threads,
                              ggml_activations activations) {
    auto ctx = std::make_unique<rwkv_context>();
    const Shape & shape = model->shape;
    ctx->scratch_memory.allocate(lay_out(ctx->scratch, shape, 0, nullptr), "a context");
    lay_out(ctx->scratch, shape, 0, ctx->scratch_memory.data());
    ctx->run_memory.allocate(run_memory_size(shape, 1, 1), "a context");
    ctx->model = std::move(model);
    ctx->n_threads = n_threads;
    ctx->activations = activations;
    return ctx.release();
}

void check_sequence(const Model & model, const rwkv_sequence & s, size_t number) {
    const std::string who = "sequence " + std::to_string(number);
    if (s.tokens == nullptr) fail(RWKV_ERROR_ARGS, "%s: tokens is NULL", who.c_str());
    if (s.n_tokens == 0) fail(RWKV_ERROR_ARGS, "%s: has no tokens", who.c_str());
    if (s.adapter != nullptr && s.adapter->model.lock().get() != &model) {
        fail(RWKV_ERROR_ARGS, "%s: its adapter was made for another model", who.c_str());
    }
    if (s.n_logits > s.n_tokens) {
        fail(RWKV_ERROR_ARGS, "%s: n_logits is %zu, but it has %zu tokens only", who.c_str(),
             s.n_logits, s.n_tokens);
    }
    for (size_t i = 0; i < s.n_tokens; i++) {
        const uint32_t token = token_at(s, i);
        if (token < model.shape.n_vocab) continue;
        fail(RWKV_ERROR_ARGS, "%s: token %zu is %u, expected less than n_vocab = %zu", who.c_str(),
             i, token, model.shape.n_vocab);
    }
}

void add_span(std::vector<Span> & spans, const void * p, size_t n, size_t size, bool output) {
    const uintptr_t first = (uintptr_t)p;
    if (p == nullptr || n == 0) return;
    if (n > (std::numeric_limits<uintptr_t>::max() - first) / size) {
        fail(RWKV_ERROR_ARGS, "a buffer of %zu elements passes the end of memory", n);
    }
    spans.push_back({first, first + n * size, output});
}

// Outputs overlap nothing, but a state_out may be the state_in of its own sequence.
void check_overlaps(rwkv_context & ctx) {
    const Shape & shape = ctx.model->shape;
    std::vector<Span> & spans = ctx.spans;
    for (const Run & run : ctx.runs) {
        const rwkv_sequence & s = run.sequence;
        add_span(spans, s.tokens, s.n_tokens, sizeof *s.tokens, false);
        if (s.state_in != s.state_out) {
            add_span(spans, s.state_in, state_length(shape), sizeof(float), false);
        }
        add_span(spans, s.state_out, state_length(shape), sizeof(float), true);
        add_span(spans, s.logits_out, s.n_logits, shape.n_vocab * sizeof(float), true);
        add_span(spans, s.hidden_out, shape.n_embed, sizeof(float), true);
    }
    std::sort(spans.begin(), spans.end(),
              [](const Span & a, const Span & b) { return a.first < b.first; });
    uintptr_t end = 0, end_of_outputs = 0;
    for (const Span & span : spans) {
        if (span.first < (span.output ? end : end_of_outputs)) {
            fail(RWKV_ERROR_ARGS, "buffers overlap: an output may not share memory with anything, "
                                  "except state_out with all of its own sequence's state_in");
        }
        end = std::max(end, span.last);
        if (span.output) end_of_outputs = std::max(end_of_outputs, span.last);
    }
}

// Lets a context evaluate adapters of this rank.
void make_room(rwkv_context & ctx, size_t rank) {
    const Shape & shape = ctx.model->shape;
    if (rank <= ctx.scratch.rank) return;
    Scratch scratch;
    Buffer memory;
    memory.allocate(lay_out(scratch, shape, rank, nullptr), "a context for adapters");
    lay_out(scratch, shape, rank, memory.data());
    ctx.scratch = scratch;
    ctx.scratch_memory = std::move(memory);
}

// Checks the sequences and gives each its state and its place for hidden rows. Rows that become
// logits come first, in the order of the sequences. squares: as for rwkv_eval_importances, or NULL.
void start_runs(rwkv_context & ctx, const rwkv_sequence * sequences, size_t n_sequences,
                size_t sizeof_sequence, const double * squares) {
    const Shape & shape = ctx.model->shape;
    ctx.runs.clear();
    ctx.spans.clear();
    add_span(ctx.spans, squares, ctx.model->n_inputs, sizeof *squares, true);
    check_size(sizeof_sequence, sizeof(rwkv_sequence), sizeof(rwkv_sequence), "rwkv_sequence");
    add_span(ctx.spans, sequences, n_sequences, sizeof_sequence, false);
    size_t n_logits = 0, n_hidden = 0, rank = 0;
    for (size_t i = 0; i < n_sequences; i++) {
        Run run = {};
        rwkv_sequence & s = run.sequence;
        const char * given = (const char *)sequences + i * sizeof_sequence;
        check_tail(given, sizeof_sequence, sizeof s, "rwkv_sequence");
        std::memcpy(&s, given, sizeof s);
        check_sequence(*ctx.model, s, i);
        run.adapter = s.adapter;
        if (run.adapter != nullptr) rank = std::max(rank, run.adapter->rank);
        if (s.logits_out == nullptr) s.n_logits = 0;
        run.n_hidden = s.n_logits > 0 ? s.n_logits : s.hidden_out != nullptr ? 1 : 0;
        n_logits += s.n_logits;
        n_hidden += run.n_hidden;
        ctx.runs.push_back(run);
    }
    check_overlaps(ctx);

    make_room(ctx, rank);
    const uint64_t size = run_memory_size(shape, n_sequences, n_hidden);
    if (size > ctx.run_memory.size()) ctx.run_memory.allocate(size, "the batch");
    float * state = (float *)ctx.run_memory.data();
    float * hidden = state + n_sequences * state_length(shape);
    float * hidden_only = hidden + n_logits * shape.n_embed;
    for (Run & run : ctx.runs) {
        float *& place = run.sequence.n_logits > 0 ? hidden : hidden_only;
        run.hidden = place;
        place += run.n_hidden * shape.n_embed;
        run.state = state;
        state += state_length(shape);
        if (run.sequence.state_in == nullptr) {
            initial_state(shape, run.state);
        } else {
            std::memcpy(run.state, (const void *)run.sequence.state_in,
                        state_length(shape) * sizeof(float));
        }
    }
}

// Fills a chunk with up to max_n of the next tokens, or rows of logits, sequence after sequence:
// `count` is how many of them each has, `next` the first one of runs[run].
void next_chunk(Chunk & chunk, const std::vector<Run> & runs, size_t rwkv_sequence::* count,
                size_t max_n, size_t & run, size_t & next) {
    chunk.n_rows = chunk.n_segments = chunk.rank = 0;
    while (run < runs.size() && chunk.n_rows < max_n) {
        const Run & from = runs[run];
        const size_t left = from.sequence.*count - next;
        const size_t first = chunk.n_rows, last = std::min(first + left, max_n);
        if (first < last) {
            std::fill(chunk.segment_of + first, chunk.segment_of + last,
                      (uint16_t)chunk.n_segments);
            chunk.segments[chunk.n_segments++] = {&from, first, last, next};
            if (from.adapter != nullptr) chunk.rank = std::max(chunk.rank, from.adapter->rank);
        }
        chunk.n_rows = last;
        next += last - first;
        if (next == from.sequence.*count) {
            run++;
            next = 0;
        }
    }
}

// Copies states and hidden vectors out and computes logits: nothing here fails.
void write_results(rwkv_context & ctx, const Pass & pass) {
    const Shape & shape = ctx.model->shape;
    const auto write = [](float * to, const float * from, size_t n) {  // to: may be misaligned
        if (to != nullptr) std::memcpy((char *)to, from, n * sizeof(float));
    };
    for (const Run & run : ctx.runs) {
        write(run.sequence.state_out, run.state, state_length(shape));
        if (run.n_hidden == 0) continue;
        write(run.sequence.hidden_out, run.hidden + (run.n_hidden - 1) * shape.n_embed,
              shape.n_embed);
    }
    float * hidden = (float *)ctx.run_memory.data() + ctx.runs.size() * state_length(shape);
    const Chunk & chunk = ctx.chunk;
    for (size_t run = 0, row = 0; run < ctx.runs.size(); hidden += chunk.n_rows * shape.n_embed) {
        next_chunk(ctx.chunk, ctx.runs, &rwkv_sequence::n_logits, max_logit_rows, run, row);
        if (chunk.n_rows > 0) evaluate_head(pass, hidden);
        for (size_t i = 0; i < chunk.n_segments; i++) {
            const Segment & segment = chunk.segments[i];
            write(segment.run->sequence.logits_out + segment.token * shape.n_vocab,
                  ctx.scratch.logits[segment.first],
                  (segment.last - segment.first) * shape.n_vocab);
        }
    }
}

void evaluate(rwkv_context & ctx, const rwkv_sequence * sequences, size_t n_sequences,
              size_t sizeof_sequence, double * squares) {
    const Turn turn(ctx.phase);
    start_runs(ctx, sequences, n_sequences, sizeof_sequence, squares);
    const Team team(ctx.model->pool, ctx.n_threads, [&] { turn.check(); });
    const Model & model = *ctx.model;
    const size_t squares_size = squares == nullptr ? 0 : model.n_inputs * sizeof *squares;
    ctx.squares.resize(squares_size / sizeof *squares);
    if (squares != nullptr) std::memcpy(ctx.squares.data(), squares, squares_size);
    Pass pass = {model.shape,    model.weights,
                 *model.kernels, ctx.activations,
                 ctx.scratch,    team,
                 ctx.chunk,      squares == nullptr ? nullptr : ctx.squares.data()};
    for (size_t run = 0, token = 0; run < ctx.runs.size();) {
        next_chunk(ctx.chunk, ctx.runs, &rwkv_sequence::n_tokens, max_rows, run, token);
        embed(pass);
        for (size_t layer = 0; layer < model.shape.n_layer; layer++) {
            turn.check();
            evaluate_layer(pass, layer);
        }
        keep_hidden(pass);
    }
    turn.begin_writing();
    if (squares != nullptr) std::memcpy((void *)squares, ctx.squares.data(), squares_size);
    pass.squares = nullptr;  // they are complete: the head's inputs have been added already
    write_results(ctx, pass);
}

// ==== The C API ==================================================================================

// A copy of the caller's options, as far as we know them.
template <class T> T known_options(const T * given, const T & defaults, const char * type) {
    if (given == nullptr) return defaults;
    uint32_t size;
    std::memcpy(&size, given, sizeof size);
    check_size(size, sizeof(T), sizeof(T), type);
    check_tail(given, size, sizeof(T), type);
    T options;
    std::memcpy(&options, given, sizeof options);
    return options;
}

// Fills a struct of the caller as far as the caller knows it; its first version had `oldest` bytes.
template <class T> void give(T * to, const T & result, size_t oldest, const char * type) {
    check_size(to->size, oldest, sizeof result, type);
    check_tail(to, to->size, sizeof result, type);
    std::memcpy((void *)to, &result, std::min<size_t>(to->size, sizeof result));
}

// Those of another context of the model: weights are bf16 for all of them or for none.
ggml_activations activations_of(const Model & model, const char * name) {
    const Activations activations = find_activations(name);
    if (activations.bf16 != model.bf16) {
        fail(RWKV_ERROR_ARGS,
             "activations are %s, but the model was loaded %s bf16, and its weights "
             "are shared (load it again)",
             name, model.bf16 ? "with" : "without");
    }
    return activations.of_quantized;
}

rwkv_load_options checked_options(const rwkv_load_options * given) {
    const auto options = known_options(given, rwkv_default_load_options(), "rwkv_load_options");
    checked_threads(options.n_threads);
    find_activations(options.activations);
    return options;
}

rwkv_quantize_options checked_options(const rwkv_quantize_options * given) {
    need(given != nullptr, "options");
    const auto options =
        known_options(given, rwkv_default_quantize_options(), "rwkv_quantize_options");
    if (options.file_version != 0 && (options.file_version < RWKV_FILE_VERSION_MIN ||
                                      options.file_version > RWKV_FILE_VERSION_MAX)) {
        fail(RWKV_ERROR_ARGS | RWKV_ERROR_FILE_VERSION, "file_version is %u, expected 0, %d or %d",
             options.file_version, RWKV_FILE_VERSION_0, RWKV_FILE_VERSION_1);
    }
    return options;
}

void fill_memory(rwkv_memory * memory, const Index & index, const rwkv_load_options & options) {
    need(memory != nullptr, "memory");
    const Sizes sizes = sizes_of(index, options);
    Scratch scratch;
    rwkv_memory result = {};
    result.size = memory->size;
    result.file = index.size;
    result.mapped = sizes.mapped;
    result.weights = sizes.arena;
    result.scratch = lay_out(scratch, index.shape, 0, nullptr) + run_memory_size(index.shape, 1, 1);
    result.state = state_length(index.shape) * sizeof(float);
    result.token = sizes.token;
    give(memory, result, offsetof(rwkv_memory, token), "rwkv_memory");
}

// f(shape of the model), or 0 without a context.
size_t size_of(const rwkv_context * ctx, size_t (*f)(const Shape &)) {
    return ctx == nullptr ? 0 : f(ctx->model->shape);
}

}  // namespace

const char * rwkv_get_last_error_message(void) {
    return last_text;
}

void rwkv_set_print_errors(rwkv_context * ctx, bool print_errors) {
    (ctx != nullptr ? ctx->print : print_by_default) = print_errors;
}

bool rwkv_get_print_errors(rwkv_context * ctx) {
    return ctx != nullptr ? ctx->print : print_by_default;
}

rwkv_error_flags rwkv_get_last_error(rwkv_context * ctx) {
    if (ctx != nullptr) return (rwkv_error_flags)ctx->flags.exchange(RWKV_ERROR_NONE);
    return (rwkv_error_flags)std::exchange(last_flags, RWKV_ERROR_NONE);
}

rwkv_context * rwkv_load(const char * path, const rwkv_load_options * given) {
    return guard(nullptr, [&] {
        need(path != nullptr, "the path of the model");
        const rwkv_load_options options = checked_options(given);
        const unsigned n_threads = checked_threads(options.n_threads);
        return create_context(load_model(path, options, n_threads), n_threads,
                              find_activations(options.activations).of_quantized);
    });
}

rwkv_context * rwkv_init_from_file(const char * model_file_path, uint32_t n_threads) {
    rwkv_load_options options = rwkv_default_load_options();
    options.n_threads = n_threads;
    return rwkv_load(model_file_path, &options);
}

rwkv_context * rwkv_clone_context(rwkv_context * ctx, uint32_t n_threads) {
    rwkv_context_options options = rwkv_default_context_options();
    options.n_threads = n_threads;
    return rwkv_clone_context_with(ctx, &options);
}

rwkv_context * rwkv_clone_context_with(rwkv_context * ctx, const rwkv_context_options * given) {
    return guard(ctx, [&] {
        need(ctx != nullptr, "ctx");
        const auto options =
            known_options(given, rwkv_default_context_options(), "rwkv_context_options");
        const ggml_activations activations = options.activations == nullptr
                                                 ? ctx->activations
                                                 : activations_of(*ctx->model, options.activations);
        return create_context(ctx->model, checked_threads(options.n_threads), activations);
    });
}

void rwkv_free(rwkv_context * ctx) {
    delete ctx;
}

bool rwkv_estimate(const char * path, const rwkv_load_options * options, rwkv_memory * memory) {
    return guard(nullptr, [&] {
        need(path != nullptr, "the path of the model");
        fill_memory(memory, read_model_index(InputFile(path)), checked_options(options));
        return true;
    });
}

bool rwkv_estimate_shape(size_t n_vocab, size_t n_embed, size_t n_layer, const char * format_name,
                         const rwkv_load_options * options, rwkv_memory * memory) {
    return guard(nullptr, [&] {
        need(format_name != nullptr, "format_name");
        const ggml_type type = find_format(format_name, 0, 0).type;
        fill_memory(memory, imagine_index(n_vocab, n_embed, n_layer, type),
                    checked_options(options));
        return true;
    });
}

rwkv_adapter * rwkv_create_adapter(rwkv_context * ctx, const rwkv_adapter_part * parts,
                                   size_t n_parts, size_t sizeof_part) {
    return guard(ctx, [&] {
        need(ctx != nullptr, "ctx");
        need(parts != nullptr || n_parts == 0, "parts");
        check_size(sizeof_part, sizeof *parts, sizeof *parts, "rwkv_adapter_part");
        std::vector<rwkv_adapter_part> known(n_parts);
        for (size_t i = 0; i < n_parts; i++) {
            const char * given = (const char *)parts + i * sizeof_part;
            check_tail(given, sizeof_part, sizeof *parts, "rwkv_adapter_part");
            std::memcpy(&known[i], given, sizeof *parts);
        }
        const Model & model = *ctx->model;
        const Team alone(model.pool, 1);  // floats as they are defined
        auto adapter = std::make_unique<rwkv_adapter>();
        adapter->memory = build_adapter(model.tensors, known, *adapter);
        adapter->model = ctx->model;
        return adapter.release();
    });
}

void rwkv_free_adapter(rwkv_adapter * adapter) {
    delete adapter;
}

size_t rwkv_get_n_vocab(const rwkv_context * ctx) {
    return size_of(ctx, [](const Shape & shape) { return shape.n_vocab; });
}

size_t rwkv_get_n_embed(const rwkv_context * ctx) {
    return size_of(ctx, [](const Shape & shape) { return shape.n_embed; });
}

size_t rwkv_get_n_layer(const rwkv_context * ctx) {
    return size_of(ctx, [](const Shape & shape) { return shape.n_layer; });
}

size_t rwkv_get_state_len(const rwkv_context * ctx) {
    return size_of(ctx, state_length);
}
size_t rwkv_get_logits_len(const rwkv_context * ctx) {
    return rwkv_get_n_vocab(ctx);
}

uint32_t rwkv_get_state_buffer_element_count(const rwkv_context * ctx) {
    return (uint32_t)rwkv_get_state_len(ctx);
}

uint32_t rwkv_get_logits_buffer_element_count(const rwkv_context * ctx) {
    return (uint32_t)rwkv_get_logits_len(ctx);
}

void rwkv_init_state(const rwkv_context * ctx, float * state) {
    guard(nullptr, [&] {
        need(ctx != nullptr, "ctx");
        need(state != nullptr, "state");
        initial_state(ctx->model->shape, state);
        return true;
    });
}

bool rwkv_eval(rwkv_context * ctx, uint32_t token, const float * state_in, float * state_out,
               float * logits_out) {
    return rwkv_eval_sequence(ctx, &token, 1, state_in, state_out, logits_out);
}

bool rwkv_eval_sequence(rwkv_context * ctx, const uint32_t * tokens, size_t sequence_len,
                        const float * state_in, float * state_out, float * logits_out) {
    if (ctx != nullptr && tokens == nullptr) return true;
    const rwkv_sequence sequence = {tokens, sequence_len, state_in, state_out, logits_out,
                                    1,      nullptr,      nullptr};
    return rwkv_eval_batch(ctx, &sequence, 1, sizeof sequence);
}

bool rwkv_eval_sequence_in_chunks(rwkv_context * ctx, const uint32_t * tokens, size_t sequence_len,
                                  size_t chunk_size, const float * state_in, float * state_out,
                                  float * logits_out) {
    const bool valid = guard(ctx, [&] {
        if (chunk_size == 0) fail(RWKV_ERROR_ARGS, "chunk_size is 0, expected at least 1");
        return true;
    });
    return valid && rwkv_eval_sequence(ctx, tokens, sequence_len, state_in, state_out, logits_out);
}

bool rwkv_eval_batch(rwkv_context * ctx, const rwkv_sequence * sequences, size_t n_sequences,
                     size_t sizeof_sequence) {
    return guard(ctx, [&] {
        need(ctx != nullptr, "ctx");
        if (n_sequences == 0) return true;
        need(sequences != nullptr, "sequences");
        evaluate(*ctx, sequences, n_sequences, sizeof_sequence, nullptr);
        return true;
    });
}

const char * rwkv_get_matrix(const rwkv_context * ctx, size_t number, size_t * cols) {
    if (ctx == nullptr) return nullptr;
    for (const Tensor & tensor : ctx->model->tensors) {
        if (!can_be_quantized(tensor) || number-- > 0) continue;
        if (cols != nullptr) *cols = tensor.cols;
        return tensor.name.c_str();
    }
    return nullptr;
}

bool rwkv_eval_importances(rwkv_context * ctx, const rwkv_sequence * sequences, size_t n_sequences,
                           size_t sizeof_sequence, double * squares) {
    return guard(ctx, [&] {
        need(ctx != nullptr, "ctx");
        need(squares != nullptr, "squares");
        if (n_sequences == 0) return true;
        need(sequences != nullptr, "sequences");
        evaluate(*ctx, sequences, n_sequences, sizeof_sequence, squares);
        return true;
    });
}

void rwkv_interrupt(rwkv_context * ctx) {
    Phase running = RUNNING;
    if (ctx != nullptr) ctx->phase.compare_exchange_strong(running, INTERRUPTED);
}

bool rwkv_quantize_file(const char * path_in, const char * path_out,
                        const rwkv_quantize_options * options) {
    return guard(nullptr, [&] {
        quantize_file(path_in, path_out, checked_options(options));
        return true;
    });
}

bool rwkv_quantize_model_file(const char * model_file_path_in, const char * model_file_path_out,
                              const char * format_name) {
    rwkv_quantize_options options = rwkv_default_quantize_options();
    const uintptr_t number = (uintptr_t)format_name;
    const char * name = number <= 16 ? rwkv_get_format_name((uint32_t)number) : format_name;
    options.format_name = number == 0 ? nullptr : name != nullptr ? name : "a number above 9";
    return rwkv_quantize_file(model_file_path_in, model_file_path_out, &options);
}

const char * rwkv_get_format_name(uint32_t data_type) {
    return format_name(data_type);
}

size_t rwkv_get_row_size(uint32_t file_version, uint32_t data_type, size_t n) {
    const ggml_type type = ggml_type_of_file(file_version, data_type);
    if (type == GGML_TYPE_COUNT || n > UINT32_MAX) return 0;
    if (ggml_type_traits(type)->quantized && n % GGML_ROW_UNIT != 0) return 0;
    return ggml_row_size(type, n);
}

bool rwkv_convert_row(uint32_t version_in, uint32_t type_in, const void * in, uint32_t version_out,
                      uint32_t type_out, void * out, size_t n) {
    return guard(nullptr, [&] {
        need(in != nullptr, "in");
        need(out != nullptr, "out");
        const std::pair<uint32_t, uint32_t> formats[] = {{version_in, type_in},
                                                         {version_out, type_out}};
        for (const auto & [version, type] : formats) {
            if (rwkv_get_row_size(version, type, n) != 0) continue;
            fail(RWKV_ERROR_ARGS | RWKV_ERROR_DATA_TYPE,
                 "files of version %u have no rows of %zu weights in data type %u", version, n,
                 type);
        }
        const Team alone(Pool(), 1);  // for its floating-point environment
        size_t bad_block;
        if (ggml_convert_row(ggml_type_of_file(version_in, type_in), in,
                             ggml_type_of_file(version_out, type_out), out, n, &bad_block))
            return true;
        fail(RWKV_ERROR_MODEL_PARAMS | RWKV_ERROR_DATA,
             "block %zu of %s has an outlier where none can be (the file is damaged)", bad_block,
             format_name(type_in));
    });
}

uint32_t rwkv_get_api_version(void) {
    return RWKV_API_VERSION;
}

const char * rwkv_get_system_info_string(void) {
    thread_local char info[1024];
    const char * reason = "";
    const ggml_kernels * kernels = ggml_kernels_select(std::getenv("RWKV_ISA"), &reason);
    snprintf(info, sizeof info, "%s ISA=%s", ggml_cpu_features(),
             kernels != nullptr ? kernels->isa : "none");
    return info;
}

bool rwkv_measure(uint32_t n_threads, uint64_t n_bytes, rwkv_limits * limits) {
    return guard(nullptr, [&] {
        need(limits != nullptr, "limits");
        const uint32_t n = checked_threads(n_threads);
        ggml_limits measured;
        if (!ggml_measure(select_kernels(), n, n_bytes, &measured)) {
            fail(RWKV_ERROR_ARGS | RWKV_ERROR_ALLOC, "out of memory: measuring takes %llu bytes",
                 (unsigned long long)n_bytes);
        }
        const rwkv_limits result = {limits->size, n, measured.read, measured.fp32, measured.int8};
        give(limits, result, sizeof result, "rwkv_limits");
        return true;
    });
}
