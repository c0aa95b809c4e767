"""Count the exact zeros in what ffn.value is multiplied with, layer by layer, where --sparse-ffn
finds its speed. The model is evaluated by the tests' float64 reference, so a small one is best:

python benchmarks/zeros.py model.bin text.txt [TOKENS]        the last 2000 tokens of the text
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import file_weights
from reference import rwkv_v4
from rwkv_cpp.texts import read_text
from rwkv_cpp.tokenizer import load_tokenizer


class CountingMatrix:
    """A matrix that remembers the share of zeros in each vector it is applied to."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights
        self.shares: list[float] = []

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        self.shares.append(float(np.mean(x == 0)))
        return self.weights @ x


def main(path: Path, text: Path, n_tokens: int = 2000) -> None:
    weights = file_weights(path)
    tokens = load_tokenizer(len(weights["emb.weight"]), None, path).encode(read_text(text))
    values = [key for key in weights if key.endswith(".ffn.value.weight")]
    counting = {key: CountingMatrix(weights[key]) for key in values}
    rwkv_v4.forward(weights | counting, tokens[-n_tokens:])
    for key in values:
        low, median, high = np.percentile(counting[key].shares, [5, 50, 95]) * 100
        print(f"{key:28} {median:5.1f} % zeros, 90 % of tokens {low:.1f} to {high:.1f} %")
    mean = np.mean([counting[key].shares for key in values]) * 100
    print(f"{'all layers':28} {mean:5.1f} % in the mean of {min(n_tokens, len(tokens))} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
