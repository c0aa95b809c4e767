"""Scoring: each token of some documents by the probability that a model gives it after the tokens
before it, and what two models make of the same tokens.

Documents are read one after the other, in calls of up to `chunk_size` tokens: a call takes as many
short ones as fit, and a long one goes on in the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import NonFiniteLogits
from .model import RWKVAdapter, RWKVModel, RWKVSequence

Floats = npt.NDArray[np.float64]

_CHUNK_LOGITS = 1 << 22  # floats of logits that one call may return: 16 MB
_BLOCK_LOGITS = 1 << 16  # floats that are worked on at once: they stay in the cache

# ---- Means ---------------------------------------------------------------------------------------


class Mean(NamedTuple):
    """error: the standard error; NaN where the text is too short for one."""

    value: float
    error: float

    def times(self, factor: float) -> Mean:
        return Mean(self.value * factor, self.error * factor)


def independent_blocks(documents: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Where the blocks start that a standard error takes for independent of each other.

    documents: (n) the document of each scored token, ascending. Losses of neighbours go together:
    a hard sentence has many surprises. So the blocks are the documents; a text that is one document
    is cut into √n blocks of √n tokens.
    """
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    if len(starts) > 1:
        return starts
    size = math.isqrt(len(documents))
    return np.arange(len(documents) // size) * size


def mean(values: Floats, blocks: npt.NDArray[np.intp], weights: Floats | None = None) -> Mean:
    """The sum of values over the sum of weights, by default one each; NaN where these are zero.

    values, weights: (n). blocks: where they start, the first at 0. The error is that of a ratio of
    sums over blocks.
    """
    sums = np.add.reduceat(values, blocks)
    sizes = np.add.reduceat(np.ones_like(values) if weights is None else weights, blocks)
    total, n = float(sizes.sum()), len(blocks)
    if not total:
        return Mean(math.nan, math.nan)
    value = float(sums.sum()) / total
    if n < 2:
        return Mean(value, math.nan)
    deviation = sums - value * sizes
    return Mean(value, math.sqrt(n / (n - 1) * float(deviation @ deviation)) / total)


# ---- Logits --------------------------------------------------------------------------------------


def cross_entropies(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.intp]) -> Floats:
    """(n) -log of the probabilities that rows of logits, (n, n_vocab), give their targets."""
    losses = np.empty(len(targets))
    for rows in _blocks(logits):
        values = _below_highest(logits[rows])
        own = values[np.arange(len(values)), targets[rows]]
        losses[rows] = np.log(np.exp(values, out=values).sum(axis=1)) - own
    return losses


class Comparisons(NamedTuple):
    """Two models token by token, each (n). Losses are in nats, and so is the divergence of the
    model from the base: the sum of p log(p/q) over all tokens, p being the base's probabilities.
    agreement: 1 where both find the same token likeliest. difference: the largest between logits.
    """

    loss: Floats
    base_loss: Floats
    divergence: Floats
    agreement: Floats
    difference: Floats


def compare_logits(
    logits: npt.NDArray[np.float32],
    base: npt.NDArray[np.float32],
    targets: npt.NDArray[np.intp],
) -> Comparisons:
    """logits, base: (n, n_vocab). targets: (n)"""
    result = Comparisons(*np.empty((5, len(targets))))
    for rows in _blocks(logits):
        own, other = logits[rows], base[rows]
        log_q, log_p = _log_probabilities(own), _log_probabilities(other)
        at_target = np.arange(len(log_q)), targets[rows]
        result.loss[rows] = -log_q[at_target]
        result.base_loss[rows] = -log_p[at_target]
        with np.errstate(invalid="ignore"):
            result.difference[rows] = np.abs(own - other).max(axis=1)
            divergence = np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q)
        result.divergence[rows] = np.maximum(divergence, 0)  # rounding may go below
        result.agreement[rows] = own.argmax(axis=1) == other.argmax(axis=1)
    return result


def _blocks(logits: npt.NDArray[np.float32]) -> Iterator[slice]:
    n_rows, n_vocab = logits.shape
    size = max(_BLOCK_LOGITS // n_vocab, 1)
    return (slice(start, start + size) for start in range(0, n_rows, size))


def _below_highest(logits: npt.NDArray[np.float32]) -> Floats:
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities become NaN
        values -= values.max(axis=1, keepdims=True)
    return values


def _log_probabilities(logits: npt.NDArray[np.float32]) -> Floats:
    values = _below_highest(logits)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


# ---- Documents -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Tokens start..end-1 of a document."""

    document: int
    start: int
    end: int


class Scores(NamedTuple):
    """Of consecutive tokens of one document: (n) losses, or Comparisons with a base."""

    document: int
    tokens: Sequence[int]
    values: Floats | Comparisons

    @property
    def losses(self) -> Floats:
        return self.values.loss if isinstance(self.values, Comparisons) else self.values


def score(
    model: RWKVModel,
    documents: Sequence[Sequence[int]],
    *,
    skip: int = 0,
    base: RWKVModel | None = None,
    adapter: RWKVAdapter | None = None,
) -> Iterator[tuple[int, list[Scores]]]:
    """Yield, call by call, the number of tokens read so far and what was scored in the call.

    Each document begins with the empty state. Its first token, which nothing comes before, and its
    first `skip` ones are read and not scored. base: a model of the same vocabulary to compare with.
    adapter: of `model`.

    Raises NonFiniteLogits if logits hold NaN or infinity.
    """
    first = max(skip, 1)
    readers = [_Reader(model, adapter), *([] if base is None else [_Reader(base)])]
    done = 0
    for pieces in chunks([len(tokens) for tokens in documents], chunk_size(model.n_vocab)):
        rows = [reader.read(documents, pieces, first) for reader in readers]
        scores = []
        for piece, *logits in zip(pieces, *rows, strict=True):
            if logits[0] is None:
                continue
            begin = max(piece.start + 1, first)
            tokens = documents[piece.document][begin : piece.end + 1]
            # The last logits of a document have no token to predict.
            own, *other = [part[: len(tokens)] for part in logits]
            targets = np.asarray(tokens, np.intp)
            values = (
                compare_logits(own, other[0], targets) if other else cross_entropies(own, targets)
            )
            if not np.isfinite(values).all():
                raise NonFiniteLogits(
                    f"logits hold NaN or infinity in the {len(tokens)} tokens from {begin} on"
                    f"{f' of document {piece.document + 1}' if len(documents) > 1 else ''}: is "
                    f"the model{'' if base is None else ' or the base'} damaged?"
                )
            scores.append(Scores(piece.document, tokens, values))
        done += sum(piece.end - piece.start for piece in pieces)
        yield done, scores


def chunk_size(n_vocab: int) -> int:
    """Tokens in one call: many, as long as their logits take little memory."""
    return min(max(_CHUNK_LOGITS // n_vocab, 16), 1024)


def chunks(lengths: Sequence[int], size: int) -> Iterator[list[Piece]]:
    """The documents in pieces, so many tokens together. Only the last piece of a chunk may end
    before its document does."""
    chunk: list[Piece] = []
    room = size
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(start + room, length)
            chunk.append(Piece(document, start, end))
            room -= end - start
            start = end
            if not room:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


class _Reader:
    """A model, and its state where the last chunk ended."""

    def __init__(self, model: RWKVModel, adapter: RWKVAdapter | None = None) -> None:
        self._model = model
        self._adapter = adapter
        self._state: Any = None

    def read(
        self, documents: Sequence[Sequence[int]], pieces: Sequence[Piece], first: int
    ) -> list[npt.NDArray[np.float32] | None]:
        """Of each piece the logits that predict tokens from `first` on; None where none does."""
        sequences = []
        for document, start, end in pieces:
            tokens = documents[document]
            last = min(end, len(tokens) - 1)  # logits of `end - 1` predict `end`
            n_logits = end - max(start, first - 1) if last >= max(start + 1, first) else 0
            state = self._state if start else None
            sequence = RWKVSequence(
                tokens[start:end], state, n_logits=n_logits, adapter=self._adapter
            )
            sequences.append(sequence)
        results = self._model.eval_batch(sequences)
        self._state = results[-1].state
        return [result.logits for result in results]
