"""`tokenizer_util`: the tokenizer of a model as two functions."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterable

from ...tokenizer import load_tokenizer

N_VOCAB = {"20B": 50277, "world": 65536}


def add_tokenizer_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "tokenizer", nargs="?", default="auto", help=f"auto (by the model), {', '.join(N_VOCAB)}"
    )


def get_tokenizer(
    tokenizer_name: str, n_vocab: int
) -> tuple[Callable[[Iterable[int]], str], Callable[[str], list[int]]]:
    """Return (decode, encode). tokenizer_name: "auto", "20B" or "world"."""
    if tokenizer_name != "auto" and tokenizer_name not in N_VOCAB:
        raise ValueError(
            f"unknown tokenizer {tokenizer_name!r} (choose from auto, {', '.join(N_VOCAB)})"
        )
    tokenizer = load_tokenizer(N_VOCAB.get(tokenizer_name, n_vocab))
    return tokenizer.decode, tokenizer.encode
