"""Read a long text once, ask many questions about it.

    python examples/ask_a_book.py [TEXT [MODEL]]

Every question starts from the same state, after the last word of the text, and costs its own words
only. Without MODEL the embedded one answers, which has seen nothing but Shakespeare.
"""

import sys
import time
from pathlib import Path

from rwkv_cpp import RWKV, State

DOCS = Path(__file__).parents[1] / "docs"
QUESTIONS = "what is a state", "which kernels are there", "how fast is it", "who wrote this"

text = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "performance.md").read_text("utf-8")
rwkv = RWKV(sys.argv[2] if len(sys.argv) > 2 else None)

start = time.perf_counter()
rwkv.read(text).save("book.safetensors")
reading = time.perf_counter() - start

book = State.load("book.safetensors", rwkv)
print(f"read {len(book.tokens)} tokens in {reading:.1f} s, kept in {book.nbytes / 1e6:.1f} MB")
for question in QUESTIONS:
    start = time.perf_counter()
    answer = rwkv.generate(f"\n\nQ: {question}?\n\nA:", state=book, max_tokens=30, temperature=0)
    print(f"{question}? ({time.perf_counter() - start:.2f} s) {' '.join(answer.text.split())}")

# The last answer again, with everything read once more.
again = rwkv.generate(f"{text}\n\nQ: {question}?\n\nA:", max_tokens=30, temperature=0)
print("same as with the whole text in the prompt:", again.text == answer.text)
