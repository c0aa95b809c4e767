"""Write a model of a released size with random weights, for the other scripts here:

python benchmarks/random_model.py 1B5 Q4_0 model.bin
"""

import sys
from pathlib import Path

from rwkv_cpp.bench import write_random_model
from rwkv_cpp.info import SIZES

N_VOCAB = 50277


def main(size: str, format_name: str, path: Path) -> None:
    n_layer, n_embed = SIZES[size]
    write_random_model(path, format_name, N_VOCAB, n_embed, n_layer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
