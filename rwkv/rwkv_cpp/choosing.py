"""Choosing a token from a row of scores: the cuts, the temperature and the draw.

The order is that of RWKV's scripts of 2023, where the temperature comes last:

1. top_k, top_p (with top_px), min_p and tail_free are each judged on the whole distribution, the
   softmax of the scores; a token has to pass all of them. Each keeps the tokens down to some
   probability, so that tokens of the same probability stay or go together.
2. typical_p is judged on what they leave.
3. What is left is brought to the power of 1 / temperature, and a token is drawn from it.

Mirostat takes the place of the cuts, and comes after the temperature.

Most of a large vocabulary is far too unlikely to be drawn or to move a cut. So the tokens are first
narrowed down in the scores' own float32 to those near the best one, and only these are worked on,
in float64; where they do not settle the matter, all tokens are.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .errors import NonFiniteLogits

Scores = npt.NDArray[np.floating]  # (n_vocab) float32 or float64; -inf bans a token
Row = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
AnyRow = TypeVar("AnyRow", Ids, Row)

# A token whose score is lower than the best one's by this has 5e-5 of its probability.
NEAR = 10.0
# Below this size a sort is cheaper than narrowing the candidates further.
SMALL_ENOUGH_TO_SORT = 1024
BLOCK = 256
BUCKETS = 1024
MAX = float(np.finfo(np.float64).max)
# How many of the likeliest tokens mirostat 1 estimates the exponent of Zipf's law from.
ZIPF_TOKENS = 100


def choose(
    scores: Scores,
    point: Callable[[], float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    top_px: float = 1.0,
    min_p: float = 0.0,
    tail_free: float = 1.0,
    typical_p: float = 1.0,
) -> int:
    """The token at a random point of 0..1 on the cumulative probabilities of the tokens left.

    They lie there in the order of their ids; but in a large vocabulary without cuts, those near the
    best one come first. point is called once, and only where something is left to chance.

    Raises NonFiniteLogits if the scores hold NaN, more than one +inf, or nothing but -inf.
    """
    best = likeliest(scores)
    highest = float(scores[best])
    if highest == math.inf or temperature == 0 or top_p == 0:
        return best
    cut = top_k > 0 or top_p < 1 or min_p > 0 or tail_free < 1
    with np.errstate(all="ignore"):  # to -inf and to 0: what they should become
        margin = NEAR if cut else math.inf if typical_p < 1 else NEAR * temperature
        ids, row = _near(scores, highest, margin)
        rest = 0.0
        if cut:
            limits = top_k, top_p, top_px, min_p, tail_free
            lowest = -math.inf
            if ids.size < scores.size:
                outside = _rest(scores, highest, ids, 1.0) if top_p < 1 else 0.0
                lowest = _lowest(scores[ids], row, -margin, outside, *limits)
                if lowest == -math.inf:  # beyond those near the best one
                    ids, row = _near(scores, highest, math.inf)
            if lowest == -math.inf:
                allowed = scores if ids.size == scores.size else scores[ids]
                lowest = _lowest(allowed, row, -math.inf, 0.0, *limits)
            ids, row = _keep(ids, row, row >= lowest)
        elif typical_p == 1:
            rest = _rest(scores, highest, ids, temperature)
        if typical_p < 1:
            ids, row = _keep(ids, row, _typical(row, typical_p))
        weights = _powers(row, temperature)
        mass = float(weights.sum())
        place = point() * (mass + rest)
        if rest > 0 and place >= mass:
            place -= mass
            others = np.ones(scores.size, bool)
            others[ids] = False
            ids = np.flatnonzero(others)
            weights = _powers(_relative(scores[ids], highest), temperature)
        return int(ids[_at(weights, place)])


def choose_mirostat(
    scores: Scores,
    point: Callable[[], float],
    version: int,
    *,
    temperature: float,
    limit: float,
) -> tuple[int, float]:
    """The token, and its surprise in bits, after Basu et al.: Mirostat (2021).

    limit: the largest surprise that is let through at the moment (mu in the paper). Version 1 takes
    as many of the likeliest tokens as Zipf's law gives for it, version 2 all tokens of at most that
    surprise. The surprise is that under the whole distribution. temperature > 0.
    """
    best = likeliest(scores)
    highest = float(scores[best])
    if highest == math.inf:
        return best, 0.0
    with np.errstate(all="ignore"):
        ids, row = _near(scores, highest, math.inf)
        row /= temperature
        weights = np.exp(row)
        surprises = (math.log(weights.sum()) - row) / math.log(2)
        if version == 1:
            kept = row >= _largest(row, _zipf_count(row, limit))
        else:
            kept = surprises <= limit
            if not kept.any():
                kept = row == 0
        ids, weights, surprises = ids[kept], weights[kept], surprises[kept]
        found = _at(weights, point() * float(weights.sum()))
        return int(ids[found]), float(surprises[found])


def likeliest(scores: Scores) -> int:
    """The token with the highest score, the first among equals. Raises NonFiniteLogits."""
    best = int(np.argmax(scores))  # of NaN if there is one
    highest = scores[best]
    if np.isnan(highest):
        raise NonFiniteLogits(f"logits: the one of token {best} is NaN")
    if highest == -np.inf:
        raise NonFiniteLogits("logits: all are -inf, so every token is banned")
    if highest == np.inf and np.count_nonzero(scores == np.inf) > 1:
        raise NonFiniteLogits("logits: more than one is +inf")
    return best


def _near(scores: Scores, highest: float, margin: float) -> tuple[Ids, Row]:
    """The tokens within `margin` of the best one, and their scores relative to it. All that are not
    banned if the vocabulary is small or many are near."""
    if margin < math.inf and scores.size > SMALL_ENOUGH_TO_SORT:
        near = scores >= highest - margin
        if np.count_nonzero(near) <= scores.size // 4:
            ids = np.flatnonzero(near)
            return ids, _relative(scores[ids], highest)
    return _keep(np.arange(scores.size), _relative(scores, highest), scores > -np.inf)


def _keep(one: AnyRow, other: Row, kept: npt.NDArray[np.bool_]) -> tuple[AnyRow, Row]:
    """What is kept of two arrays."""
    if kept.all():
        return one, other
    places = np.flatnonzero(kept)  # several times faster than by the mask itself
    return one[places], other[places]


def _relative(scores: Scores, highest: float) -> Row:
    row = scores.astype(np.float64)
    row -= highest
    return np.maximum(row, -MAX, out=row)  # finite where float64 overflows


def _powers(row: Row, temperature: float) -> Row:
    """The weights of scores, in their place: a new large array costs more than its numbers."""
    row /= temperature
    return np.exp(row, out=row)


def _rest(scores: Scores, highest: float, ids: Ids, temperature: float) -> float:
    """The sum of the weights of all tokens but `ids`, in the scores' own precision: in float32 the
    error is some 1e-7 of it, and there is little of it."""
    if ids.size == scores.size:
        return 0.0
    weights = scores - highest
    if temperature != 1:
        weights /= temperature
    np.exp(weights, out=weights)
    weights[ids] = 0
    return float(weights.sum())


def _lowest(
    scores: Scores,
    row: Row,
    floor: float,
    rest: float,
    top_k: int,
    top_p: float,
    top_px: float,
    min_p: float,
    tail_free: float,
) -> float:
    """The score, relative to the best one's, that a token needs to pass all cuts; -inf if the row
    does not tell, or holds no token that fails.

    scores and row, relative to the best one's, are those of all tokens down to `floor`; the weights
    of the others add up to `rest`.
    """
    lowest = -math.inf
    if 0 < top_k <= row.size:
        lowest = _largest(row, top_k)
    if min_p > 0 and math.log(min_p) >= floor:
        lowest = max(lowest, math.log(min_p))
    if tail_free < 1:
        tail = _tail(scores, tail_free, floor)
        if math.isnan(tail):
            return -math.inf
        lowest = max(lowest, tail)
    if top_p < 1:
        weights = np.exp(row)
        total = float(weights.sum()) + rest
        if lowest > -math.inf:  # what the others drop matters to the sum only
            row, weights = _keep(row, weights, row >= lowest)
        if weights.sum() > top_p * total:
            cutoff = _cutoff(row, weights, top_p * total)
            if top_px * total < math.exp(floor):
                cutoff = -math.inf
            elif top_px < 1:
                cutoff = float(row[weights > top_px * total].min(initial=cutoff))
            lowest = max(lowest, cutoff)
    return lowest


def _largest(row: Row, count: int) -> float:
    """The count-th largest score."""
    while row.size > SMALL_ENOUGH_TO_SORT:
        large = row[np.flatnonzero(row >= row.mean())]
        if not count <= large.size < row.size:
            break
        row = large
    return float(np.partition(row, row.size - count)[row.size - count])


def _cutoff(keys: Row, weights: Row, target: float) -> float:
    """The key at which the sum of the weights, taken from the largest key down, first exceeds
    target; the smallest that has a weight if it never does.

    Sorting tens of thousands of them takes longer than all else together, so that they are first
    put into buckets, and all but the one where the cutoff lies are dropped.
    """
    while keys.size > SMALL_ENOUGH_TO_SORT:
        highest = keys.max()
        scale = BUCKETS / (highest - keys.min())
        if scale == np.inf:  # all are equal
            return float(highest)
        depths = highest - keys
        depths *= scale
        buckets = depths.astype(np.intp)
        sums = np.cumsum(np.bincount(buckets, weights), dtype=np.float64)
        bucket = _holding(sums, target)
        if bucket > 0:
            target -= float(sums[bucket - 1])
        keys, weights = _keep(keys, weights, buckets == bucket)
    descending = np.argsort(-keys, kind="stable")
    return float(keys[descending[_holding(np.cumsum(weights[descending]), target)]])


def _tail(scores: Scores, tail_free: float, floor: float) -> float:
    """The score before the tail (tail free sampling, Phénix and Egan 2019), relative to the best:
    with the probabilities p in descending order, the bends |p[i-1] - 2 p[i] + p[i+1]| scaled to a
    sum of 1, the tail begins where their running sum exceeds tail_free; the last token is in it.

    -inf if nothing bends; NaN if tokens below the floor, which are not here, could move the tail.
    """
    if scores.size < 3:
        return -math.inf if floor == -math.inf else math.nan
    descending = np.sort(scores)[::-1]  # twice as fast in float32
    row = _relative(descending, float(descending[0]))
    weights = np.exp(row)
    bends = np.diff(weights, 2)
    np.abs(bends, out=bends)
    total = float(bends.sum())
    before = _at(bends, tail_free * total)
    if floor > -math.inf:
        # Where p only falls, all bends from a place on are at most twice its value before there.
        most = tail_free * (total + 2 * float(weights[-2]))
        if most >= total or _at(bends, most) != before:
            return math.nan
    elif total == 0:
        return -math.inf
    return float(row[before])


def _typical(row: Row, typical_p: float) -> npt.NDArray[np.bool_]:
    """Whether tokens are typical (Meister et al. 2022): those whose surprise is closest to
    the expected one, until their probabilities sum up to more than typical_p."""
    weights = np.exp(row)
    total = float(weights.sum())
    # Surprise and entropy both lack the same log(total).
    closeness = row - float((weights * row).sum()) / total
    np.negative(np.abs(closeness, out=closeness), out=closeness)
    return np.asarray(closeness >= _cutoff(closeness, weights, typical_p * total))


def _zipf_count(row: Row, limit: float) -> int:
    """How many of the likeliest tokens mirostat 1 keeps: Zipf's exponent s is estimated by least
    squares, and then k = (e 2**limit / (1 - N**-e))**(1/s) with e = s - 1, N tokens in all."""
    count = min(ZIPF_TOKENS, row.size)
    if count < 2:
        return 1
    top = np.sort(row[row >= _largest(row, count)])[: -count - 1 : -1]
    ratios = np.log1p(1 / np.arange(1, count))  # log((i + 1) / i)
    drops = top[:-1] - top[1:]
    exponent = float((ratios * drops).sum() / (ratios * ratios).sum())
    e = exponent - 1
    size = math.log(row.size)
    share = 1 / size if abs(e) < 1e-9 else e / -math.expm1(-e * size)
    bits = (math.log(share) + limit * math.log(2)) / max(exponent, 1e-9)
    return max(1, round(math.exp(min(bits, size))))


def _at(weights: Row, place: float) -> int:
    """The index whose stretch of the cumulative weights holds the place; rounding may have put it
    just behind the last one. Large rows are summed up in blocks first: four times as fast."""
    begin = 0
    if weights.size > SMALL_ENOUGH_TO_SORT:
        sums = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)))
        block = _holding(sums, place)
        if block > 0:
            place -= float(sums[block - 1])
        begin = block * BLOCK
        weights = weights[begin : begin + BLOCK]
    return begin + _holding(np.cumsum(weights), place)


def _holding(sums: Row, place: float) -> int:
    found = np.searchsorted(sums, place, side="right")
    last = np.searchsorted(sums, sums[-1])  # that adds anything
    return int(min(found, last))
