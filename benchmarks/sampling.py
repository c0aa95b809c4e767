"""How long choosing a token takes, at 65,536 tokens: `python benchmarks/sampling.py`

Two kinds of logits. Peaked ones are made to be like a language model's: 300 tokens that fit, whose
probabilities fall with rank**-1.2, over all others with normal logits, 18 lower on average, with a
spread of 3. So the likeliest token has a quarter of the probability, and the unlikely ones 2 %
together. Flat ones are normal with a spread of 0.01.

A process with such a model has read a vocabulary of some 2 MB and dropped its text; so does this
one, since glibc keeps the memory of later arrays from then on, where it would give it back and get
new pages for each of them (which takes three times as long as computing, with flat logits).
"""

import statistics
import time

import numpy as np
from rwkv_cpp import Sampler, Sampling, top_logprobs

N_VOCAB = 65536
VOCABULARY_BYTES = 2_000_000
CALLS = 200

CASES = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8, "top_p": 1.0},
    "top_k": {"top_k": 40, "top_p": 1.0},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05, "top_p": 1.0},
    "penalties": {
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
    },
    "all of these": {
        "temperature": 1.2,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
    },
    "logit_bias": {"logit_bias": dict.fromkeys(range(100), -1.0)},
    "top_px": {"top_p": 0.8, "top_px": 0.01},
    "typical_p": {"typical_p": 0.9, "top_p": 1.0},
    "tail_free": {"tail_free": 0.95, "top_p": 1.0},
    "mirostat 1": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
}


def peaked_logits() -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = rng.normal(-18, 3, N_VOCAB)
    logits[rng.choice(N_VOCAB, 300, replace=False)] = -1.2 * np.log(np.arange(1, 301))
    return logits.astype(np.float32)


def flat_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.01, N_VOCAB).astype(np.float32)


def milliseconds(function) -> float:
    """The median of many calls, each with another argument."""
    seconds = []
    for call in range(CALLS):
        start = time.perf_counter()
        function(call)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def main() -> None:
    bytes(VOCABULARY_BYTES)
    rows = {"peaked": peaked_logits(), "flat": flat_logits()}
    history = np.random.default_rng(1).integers(0, N_VOCAB, 1000).tolist()
    print("| | " + " | ".join(f"{name}, ms" for name in rows) + " |\n|---|---|---|")
    for name, fields in CASES.items():
        sampler = Sampler(Sampling(seed=1, **fields), N_VOCAB, history=history)
        times = [
            milliseconds(lambda call, row=row, sampler=sampler: sampler.sample(row, call))
            for row in rows.values()
        ]
        print(f"| {name} | " + " | ".join(f"{time:.3f}" for time in times) + " |")
    times = [milliseconds(lambda call, row=row: top_logprobs(row, 5, 10)) for row in rows.values()]
    print("| top_logprobs, 10 | " + " | ".join(f"{time:.3f}" for time in times) + " |")


if __name__ == "__main__":
    main()
