"""The World tokenizer as two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .tokenizer_util import get_tokenizer


def get_world_tokenizer_v20230424() -> tuple[
    Callable[[Iterable[int]], str], Callable[[str], list[int]]
]:
    """Return (decode, encode)."""
    return get_tokenizer("world", 65536)
