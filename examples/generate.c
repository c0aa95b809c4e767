/* generate.c: a byte-level model writes text.
 *
 *     generate MODEL PROMPT N [TEMPERATURE [SEED]]
 *
 * Prints PROMPT and N more bytes; temperature 0, the default, always takes the likeliest. Tokens
 * are bytes here (n_vocab 256): a larger vocabulary needs a tokenizer, all else is the same. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rwkv.h"

/* A number of [0, 1) from a generator that fits into a line: Knuth's, 64 bits. */
static double next_random(uint64_t * seed) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(*seed >> 11) / 9007199254740992.0;
}

static uint32_t likeliest(const float * logits, size_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

/* Draws a token with probability proportional to exp(logit / temperature). */
static uint32_t sample(const float * logits, size_t n, double temperature, uint64_t * seed) {
    const uint32_t best = likeliest(logits, n);
    if (temperature <= 0) return best;
    double total = 0;
    for (size_t i = 0; i < n; i++) total += exp((logits[i] - logits[best]) / temperature);
    double left = next_random(seed) * total;
    for (uint32_t i = 0; i < n; i++) {
        left -= exp((logits[i] - logits[best]) / temperature);
        if (left < 0) return i;
    }
    return best;
}

/* Reads the prompt as one sequence, then writes token after token. The state is all that the model
 * remembers; it is ours, so it could be copied, kept in a file, or taken up again later. */
static bool generate(struct rwkv_context * ctx, const char * prompt, long count, double temperature,
                     uint64_t seed) {
    const size_t n_tokens = strlen(prompt), n_vocab = rwkv_get_n_vocab(ctx);
    float * state = malloc(rwkv_get_state_len(ctx) * sizeof *state);
    float * logits = malloc(rwkv_get_logits_len(ctx) * sizeof *logits);
    uint32_t * tokens = malloc(n_tokens * sizeof *tokens);
    bool good = state && logits && tokens;
    for (size_t i = 0; good && i < n_tokens; i++) tokens[i] = (unsigned char)prompt[i];
    good = good && rwkv_eval_sequence(ctx, tokens, n_tokens, NULL, state, logits);
    if (good) printf("%s", prompt);
    for (long i = 0; good && i < count; i++) {
        const uint32_t token = sample(logits, n_vocab, temperature, &seed);
        good = putchar((int)token) != EOF && fflush(stdout) == 0 &&
               rwkv_eval(ctx, token, state, state, logits);
    }
    free(tokens);
    free(logits);
    free(state);
    return good && putchar('\n') != EOF;
}

int main(int argc, char ** argv) {
    if (argc < 4 || argc > 6 || argv[2][0] == '\0') {
        fprintf(stderr, "usage: %s MODEL PROMPT N [TEMPERATURE [SEED]]\n", argv[0]);
        return 2;
    }
    const double temperature = argc > 4 ? atof(argv[4]) : 0;
    const uint64_t seed = argc > 5 ? strtoull(argv[5], NULL, 10) : 0;
    struct rwkv_context * ctx = rwkv_init_from_file(argv[1], 0);
    if (ctx == NULL) return 1; /* what was wrong stands on stderr already */
    if (rwkv_get_n_vocab(ctx) != 256) {
        fprintf(stderr, "%s: not a byte-level model: n_vocab is %zu\n", argv[1],
                rwkv_get_n_vocab(ctx));
        rwkv_free(ctx);
        return 1;
    }
    const bool good = generate(ctx, argv[2], atol(argv[3]), temperature, seed);
    rwkv_free(ctx);
    return good ? 0 : 1;
}
