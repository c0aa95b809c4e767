"""A story that goes on: each run writes 40 tokens more and keeps the state for the next one.

    python examples/resume.py && python examples/resume.py

Run twice, it writes what one run of 80 tokens would have written, letter by letter: the state is
all that the model remembers, and a draw depends only on the seed and on how much was read.
"""

from pathlib import Path

from rwkv_cpp import RWKV, State

KEPT = Path("story.safetensors")

rwkv = RWKV()
if KEPT.exists():
    stream = rwkv.stream(state=State.load(KEPT, rwkv), max_tokens=40, seed=1)
else:
    stream = rwkv.stream("ROMEO:", max_tokens=40, seed=1)
for piece in stream:
    print(piece, end="", flush=True)
stream.completion.state.save(KEPT)
