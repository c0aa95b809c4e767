"""What Python adds to a token: `python benchmarks/python_overhead.py`

A small random model with the vocabulary of 20B, so that the core takes little and the sampler has
all its tokens. Its head is scaled so that logits spread as a trained model's do, to a perplexity of
about 20. RWKV.stream and the bare rwkv_eval of the C library, called with prepared addresses, take
turns; each figure is a median over rounds.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rwkv_cpp import RWKV, RWKVModel, load_rwkv_shared_library
from rwkv_cpp.bench import write_random_model
from rwkv_cpp.ggmf import read_index
from rwkv_cpp.tokenizer import WorldTokenizer

N_VOCAB, N_EMBED, N_LAYER = 50277, 256, 4
SPREAD = 4.0  # standard deviation of the logits
ROUNDS, TOKENS = 15, 60
CASES = {
    "greedy": {"temperature": 0},
    "default sampling": {},
    "top_k, penalties": {"top_k": 40, "presence_penalty": 0.2, "frequency_penalty": 0.2},
    "stop strings": {"stop": ["\n\n", "User:", "<|endoftext|>"]},
}


def tokenizer() -> WorldTokenizer:
    """Of single bytes and made-up words."""
    words = [f" word{i}".encode() for i in range(N_VOCAB - 300)]
    return WorldTokenizer(N_VOCAB, [bytes([value]) for value in range(256)] + words)


def spread_logits(path: Path) -> None:
    with RWKVModel(None, path) as model:
        logits, _ = model.eval(1000, None)
    _, records = read_index(path)
    (head,) = (record for record in records if record.key == "head.weight")
    weights = np.memmap(path, "<f2", "r+", head.offset, head.shape)
    weights *= np.float16(SPREAD / logits.std())
    weights.flush()


def core(path: Path) -> Callable[[], float]:
    library = load_rwkv_shared_library()
    context = library.rwkv_load(path)
    state = np.empty(library.rwkv_get_state_len(context), np.float32)
    logits = np.empty(N_VOCAB, np.float32)
    library.rwkv_init_state(context, state.ctypes.data)

    def run() -> float:
        arguments = (state.ctypes.data, state.ctypes.data, logits.ctypes.data)
        began = time.perf_counter()
        for token in range(1000, 1000 + TOKENS):
            library.rwkv_eval(context, token, *arguments)
        return (time.perf_counter() - began) / TOKENS

    return run


def stream(model: RWKV, options: dict) -> Callable[[], float]:
    start = model.read([1000])

    def run() -> float:
        pieces = model.stream(state=start, max_tokens=TOKENS, seed=1, **options)
        began = time.perf_counter()
        for _ in pieces:
            pass
        return (time.perf_counter() - began) / pieces.completion.timings.tokens

    return run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        write_random_model(path, "FP16", N_VOCAB, N_EMBED, N_LAYER)
        spread_logits(path)
        with RWKV(path, vocabulary=tokenizer()) as model:
            runs = {"core": core(path)} | {
                name: stream(model, options) for name, options in CASES.items()
            }
            times = [{name: run() for name, run in runs.items()} for _ in range(ROUNDS + 1)][1:]
    print(f"{N_VOCAB} tokens, milliseconds for one:")
    for name in runs:
        whole = statistics.median(each[name] for each in times)
        added = statistics.median(each[name] - each["core"] for each in times)
        print(
            f"{name:<18} {1000 * whole:.3f}" + ("" if name == "core" else f"  + {1000 * added:.3f}")
        )


if __name__ == "__main__":
    main()
