"""A thousand conversations, parked on disk, any of which goes on at once.

    python examples/thousand_conversations.py [NUMBER]

All share an opening, which is read once. A turn evaluates many conversations as one batch: each
weight of the model is fetched once for all of them. Between turns a conversation is a file.
"""

import sys
import time
from pathlib import Path

from rwkv_cpp import RWKV, State

N = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
BATCH = 50
NAMES = "ROMEO", "JULIET", "HAMLET", "OPHELIA", "BRUTUS"
FOLDER = Path("conversations")

rwkv = RWKV()
FOLDER.mkdir(exist_ok=True)
opening = rwkv.read("Verona. A public place. Enter two players.\n\n")

start = time.perf_counter()
for first in range(0, N, BATCH):
    lines = [
        f"{NAMES[i % len(NAMES)]}:\nI am number {i}." for i in range(first, min(first + BATCH, N))
    ]
    for i, answer in enumerate(
        rwkv.generate(lines, state=opening, max_tokens=5, seed=1), start=first
    ):
        answer.state.save(FOLDER / f"{i}.safetensors", "float16")
seconds = time.perf_counter() - start
size = sum(path.stat().st_size for path in FOLDER.iterdir())
print(f"{N} conversations began and were parked in {seconds:.1f} s: {size / 1e6:.0f} MB")

chosen = 0, N // 2, N - 1
states = [State.load(FOLDER / f"{i}.safetensors", rwkv) for i in chosen]
answers = rwkv.generate(["\n\nJULIET:\n"] * len(chosen), state=states, max_tokens=20, seed=2)
for i, state, answer in zip(chosen, states, answers, strict=True):
    before = rwkv.tokenizer.decode(state.tokens[len(opening.tokens) :].tolist())
    print(f"{i}: {before!r} + {answer.text!r}")
