"""Write a model of a released size with random weights, for the other scripts here:

python benchmarks/random_model.py 1B5 Q4_0 model.bin
"""

import sys
import tempfile
from pathlib import Path

from rwkv_cpp.bench import write_random_model
from rwkv_cpp.ggmf import FP16, FP32
from rwkv_cpp.info import SIZES
from rwkv_cpp.quantize import quantize_file

N_VOCAB = 50277


def main(size: str, format_name: str, path: Path) -> None:
    n_layer, n_embed = SIZES[size]
    plain = {"FP16": FP16, "FP32": FP32}.get(format_name)
    if plain is not None:
        write_random_model(path, plain, N_VOCAB, n_embed, n_layer)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "FP16.bin"
        write_random_model(source, FP16, N_VOCAB, n_embed, n_layer)
        quantize_file(source, path, format_name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
