"""Reading: texts that are given, as many as there are at once, in chunks.

Nothing is changed in place: what was read before an error, Ctrl-C or a cancellation is given up,
and the states that a caller holds stay as they were.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import NonFiniteLogits
from .model import RWKVResult, RWKVSequence
from .progress import Progress
from .sampling import log_softmax
from .state import State

# Tokens in one call: more are hardly faster, and end late when they are cancelled.
CHUNK = 64

Evaluate = Callable[[list[RWKVSequence]], list[RWKVResult]]


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text. logprobs: natural logarithms, of each of its tokens.
    greedy: whether each of them is the likeliest in its place."""

    tokens: list[int]
    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class Choice:
    """The likeliest of some texts. logprobs, greedy (see Score): of each, in their order."""

    index: int
    text: str
    logprobs: list[float]
    greedy: list[bool]


class Reading:
    """A text on its way into a state.

    logprobs: of the tokens read so far, the natural logarithm of the probability that the model
    gave each; empty unless they are wanted. greedy: whether each of these was the likeliest.
    """

    def __init__(self, start: State, tokens: Sequence[int]) -> None:
        self._start = start
        self._tokens = array("I", tokens)
        self._done = 0
        self._values: Any = start.values
        self._logits: Any = start.logits
        self.logprobs: list[float] = []
        self.greedy = True

    @property
    def left(self) -> int:
        return len(self._tokens) - self._done

    def next(self, n_tokens: int, score: bool) -> RWKVSequence:
        chunk = self._tokens[self._done : self._done + n_tokens]
        is_last = len(chunk) == self.left
        n_logits = len(chunk) if score else int(is_last)
        adapter = self._start.adapter
        return RWKVSequence(chunk, self._values, n_logits=n_logits, adapter=adapter)

    def take(self, sequence: RWKVSequence, result: RWKVResult, score: bool) -> None:
        chunk = sequence.tokens
        if score:  # each token by the logits before it
            rows = [self._logits, *result.logits[:-1]]  # type: ignore[index]
            pairs = [*zip(rows, chunk, strict=True)]
            logprobs = [float(log_softmax(row)[token]) for row, token in pairs]
            self.greedy = self.greedy and all(row.argmax() == token for row, token in pairs)
            if not math.isfinite(sum(logprobs)):
                raise NonFiniteLogits("logits hold NaN or infinity: is the model damaged?")
            self.logprobs += logprobs
        self._values = result.state
        self._logits = None if result.logits is None else result.logits[-1]
        self._done += len(chunk)  # type: ignore[arg-type]

    def state(self) -> State:
        """After the whole text. Its logits are its own, not a row of a larger array."""
        if self._done == 0:
            return self._start.copy()
        return advanced(self._start, self._tokens, self._values, self._logits.copy())


def read(
    evaluate: Evaluate,
    starts: Sequence[State],
    texts: Sequence[Sequence[int]],
    *,
    chunk: int = CHUNK,
    score: bool = False,
    progress: Progress | None = None,
    check: Callable[[], object] | None = None,
) -> list[Reading]:
    """Read each text from its own start, all in one batch.

    chunk: tokens of one call, of all texts together. score: collect log-probabilities; then every
    start has logits. progress: called after each chunk. check: called before each; what it raises
    ends the reading and comes out here.
    """
    readings = [Reading(*pair) for pair in zip(starts, texts, strict=True)]
    total = sum(reading.left for reading in readings)
    while unread := [reading for reading in readings if reading.left]:
        if check is not None:
            check()
        size = max(chunk // len(unread), 1)
        batch = [reading.next(size, score) for reading in unread]
        for reading, sequence, result in zip(unread, batch, evaluate(batch), strict=True):
            reading.take(sequence, result, score)
        if progress is not None:
            progress("reading", total - sum(reading.left for reading in readings), total)
    return readings


def advanced(
    start: State,
    tokens: Sequence[int],
    values: np.ndarray,
    logits: np.ndarray,
    n_generated: int = 0,
) -> State:
    """The state of the model of `start` after some more tokens. The arrays become its own."""
    return State(
        values,
        logits,
        start.tokens + array("I", tokens),
        n_layer=start.n_layer,
        n_embed=start.n_embed,
        n_generated=n_generated,
        fingerprint=start.fingerprint,
        arithmetic=start.arithmetic,
        adapter=start.adapter,
    )
