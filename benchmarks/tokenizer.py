"""How fast the tokenizers are, in MB/s of UTF-8: `python benchmarks/tokenizer.py [TEXT]...`

Without a file, random Chinese, Japanese, Korean, Cyrillic and English. Vocabularies are looked for
as usual (none is downloaded); those that are not found are left out.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rwkv_cpp.errors import VocabularyNotFound
from rwkv_cpp.tokenizer import load_tokenizer


def mixed_text(characters: int) -> str:
    rng = random.Random(0)
    blocks = [(0x4E00, 0x9FA5), (0x3041, 0x30FF), (0xAC00, 0xD7A3), (0x0410, 0x044F), (0x61, 0x7A)]
    words = ("".join(chr(rng.randint(*block)) for _ in range(6)) for block in blocks * characters)
    return " ".join(word for word, _ in zip(words, range(characters // 7), strict=False))


def megabytes_per_second(size: int, function: Callable, argument: object) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        function(argument)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds) / 1e6


def main() -> None:
    texts = {name: Path(name).read_text("utf-8") for name in sys.argv[1:]}
    texts = texts or {"mixed": mixed_text(500_000)}
    for n_vocab in (256, 50277, 65536):
        try:
            tokenizer = load_tokenizer(n_vocab, download=False)
        except VocabularyNotFound:
            print(f"{n_vocab:6}  no vocabulary file")
            continue
        for name, text in texts.items():
            size = len(text.encode())
            tokens = tokenizer.encode(text)
            encode = megabytes_per_second(size, tokenizer.encode, text)
            decode = megabytes_per_second(size, tokenizer.decode, tokens)
            print(
                f"{n_vocab:6}  {name}: {size / len(tokens):.2f} bytes per token,"
                f" encode {encode:.1f} MB/s, decode {decode:.1f} MB/s"
            )


if __name__ == "__main__":
    main()
