"""Quantize random FP16 weights: megabytes of source per second of one core's time, by method.

python benchmarks/quantizing.py [FORMAT …]
"""

import sys
import tempfile
import time
from pathlib import Path

from rwkv_cpp.bench import write_random_model
from rwkv_cpp.formats import file_formats
from rwkv_cpp.library import load_rwkv_shared_library

ROUNDS = 3


def main(formats: list[str]) -> None:
    library = load_rwkv_shared_library()
    print("format    rtn    mse    MB/s, best of", ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.bin", Path(folder) / "out.bin"
        write_random_model(source, "FP16", n_vocab=256, n_embed=512, n_layer=2)
        size = source.stat().st_size / 1e6
        for name in formats or file_formats()[2:]:
            speeds = []
            for method in ("rtn", "mse"):
                seconds = []
                for _ in range(ROUNDS):
                    start = time.process_time()  # of all threads
                    library.rwkv_quantize_file(source, target, name, method=method)
                    seconds.append(time.process_time() - start)
                speeds.append(size / min(seconds))
            print(f"{name:6}", *(f"{speed:6.0f}" for speed in speeds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
