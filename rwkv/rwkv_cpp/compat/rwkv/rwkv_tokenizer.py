"""The World tokenizer under its name of `rwkv.rwkv_tokenizer`."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from ...tokenizer import load_tokenizer


class TRIE_TOKENIZER:
    """file_name: a World vocabulary, such as rwkv_vocab_v20230424.txt."""

    def __init__(self, file_name: str | PathLike[str]) -> None:
        self._tokenizer = load_tokenizer(65536, Path(file_name))

    def encode(self, src: str) -> list[int]:
        return self._tokenizer.encode(src)

    def encodeBytes(self, src: bytes) -> list[int]:
        return self._tokenizer.encode_bytes(src)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(tokens)

    def decodeBytes(self, tokens: Iterable[int]) -> bytes:
        return self._tokenizer.decode_bytes(tokens)
