"""Go back to any word, and on from there in another way.

    python examples/undo_and_branch.py

A state is small, so one is kept after every word: going back is taking an older one. A state that
was gone on from stays as it was, so that any number of branches leave it.
"""

from rwkv_cpp import RWKV, State

OPENING = "KING HENRY:\nMy lord, I pray you tell me where you go"

rwkv = RWKV()
words = OPENING.split(" ")
states: list[State] = []
for i, word in enumerate(words):
    states.append(rwkv.read(word if i == 0 else f" {word}", states[-1] if states else None))
print(f"{len(states)} words, a state after each: {sum(s.nbytes for s in states) / 1e6:.2f} MB\n")

for n, instead in (11, ""), (8, " who I am"), (5, " and thank you"):
    print(" ".join(words[:n]), end=f"[{instead}]")
    for piece in rwkv.stream(instead, state=states[n - 1], max_tokens=30, seed=n):
        print(piece, end="", flush=True)
    print("\n")

# Three ways on from one point, as one batch.
point = states[-1]
for answer in rwkv.generate(state=point, n=3, max_tokens=20, seed=3):
    print("...", repr(answer.text))
print("the point they left:", point, "unchanged:", point == rwkv.read(" go", states[-2]))
