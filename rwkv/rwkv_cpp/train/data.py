"""What a run learns from: the held-out part, and the batch of each step.

A batch depends on nothing but the data, the seed and the step's number, so that a resumed run
repeats an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import RWKVFileError
from ..token_data import TokenData

IGNORED = -100  # a target that counts for nothing; what torch's cross_entropy takes it to be


class Batch(NamedTuple):
    inputs: Tensor  # (batch, length) int64
    targets: Tensor  # (batch, length) int64: the token after each input, or IGNORED
    continues: Tensor  # (batch,) bool: whether a row goes on from its state after the step before


def split(data: TokenData, held_out: float) -> tuple[TokenData, TokenData]:
    """(training, held-out): the share `held_out` at the end of the data is never trained on.

    They are cut where a document begins, if one does within half of the held-out part.
    """
    documents = data.documents
    n_held_out = int(data.tokens.size * held_out)
    cut = data.tokens.size - n_held_out
    nearest = int(documents[np.abs(documents - cut).argmin()])
    if nearest and 2 * abs(nearest - cut) <= n_held_out:
        cut = nearest
    later = documents[documents > cut] - cut
    return (
        TokenData(data.tokens[:cut], documents[documents < cut]),
        TokenData(data.tokens[cut:], np.concatenate([np.zeros(1, np.int64), later])),
    )


class Windows:
    """Windows from anywhere in the data, across the bounds of documents, as RWKV-LM draws them."""

    def __init__(self, data: TokenData, batch: int, length: int, seed: int) -> None:
        """Raises RWKVFileError for data of less than a window and the token after it."""
        if data.tokens.size <= length:
            raise RWKVFileError(
                f"the data to train on has {data.tokens.size} tokens, a window needs {length + 1} "
                "(use a longer text or a smaller --sequence)"
            )
        self._tokens = data.tokens
        self._shape = (batch, length)
        self._seed = seed

    def draw(self, step: int) -> Batch:
        batch, length = self._shape
        draws = np.random.default_rng([self._seed, step])
        starts = draws.integers(self._tokens.size - length, size=(batch, 1))
        tokens = torch.from_numpy(self._tokens[starts + np.arange(length + 1)].astype(np.int64))
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(batch, dtype=torch.bool))


class Streams:
    """Documents in windows that follow one another, so that the state goes on over long ones.

    A row reads a document from its first token on, and then another one, in an order that each pass
    over the data draws anew. A document of more than `n_windows` windows is cut into parts of so
    many, at places that each pass draws anew, too. Every part begins with the empty state; what is
    left of its last window is IGNORED. So every token but the first of a document is a target once
    in a pass. For documents much shorter than a window, `Windows` wastes less.
    """

    def __init__(self, data: TokenData, batch: int, length: int, seed: int, n_windows: int) -> None:
        """Raises RWKVFileError where no document has two tokens."""
        # Of each document the tokens that are read: its last one is nothing but a target.
        starts, stops = data.documents, np.append(data.documents[1:], data.tokens.size) - 1
        self._documents = np.stack([starts, stops], axis=1)[starts < stops]
        if not len(self._documents):
            raise RWKVFileError("the data to train on has no document of two tokens")
        self._tokens = data.tokens
        self._shape = (batch, length)
        self._seed = seed
        self._part = n_windows * length
        self._rewind()

    def draw(self, step: int) -> Batch:
        """Quickest for one step after the other."""
        if step < self._step:
            self._rewind()
        while self._step < step:
            self._advance()
        starts, continues = self._advance()
        places = starts[:, None] + np.arange(self._shape[1] + 1)
        read = torch.from_numpy(places[:, :-1] < self._stops[:, None])
        window = self._tokens[np.minimum(places, self._tokens.size - 1)].astype(np.int64)
        tokens = torch.from_numpy(window)
        return Batch(
            tokens[:, :-1], tokens[:, 1:].masked_fill(~read, IGNORED), torch.from_numpy(continues)
        )

    def _rewind(self) -> None:
        self._step = 0
        self._parts = self._all_parts()
        self._starts = np.zeros(self._shape[0], np.int64)  # of each row's next window
        self._stops = np.zeros(self._shape[0], np.int64)  # of each row's part

    def _advance(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows of a step begin, and which rows go on."""
        continues = self._starts < self._stops
        for row in np.flatnonzero(~continues):
            self._starts[row], self._stops[row] = next(self._parts)
        starts = self._starts.copy()
        self._starts += self._shape[1]
        self._step += 1
        return starts, continues

    def _all_parts(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the tokens that are read, pass after pass, without an end."""
        n_pass = 0
        while True:
            draws = np.random.default_rng([self._seed, n_pass])
            parts: list[tuple[int, int]] = []
            for start, stop in self._documents.tolist():
                cuts: list[int] = []
                if stop - start > self._part:
                    first = start + int(draws.integers(1, self._part + 1))
                    cuts = [*range(first, stop, self._part)]
                parts += zip([start, *cuts], [*cuts, stop], strict=True)
            for place in draws.permutation(len(parts)):
                yield parts[place]
            n_pass += 1
