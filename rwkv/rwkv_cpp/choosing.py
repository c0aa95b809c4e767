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

import numpy as np
import numpy.typing as npt

from .errors import NonFiniteLogits

Scores = npt.NDArray[np.floating]  # (n_vocab) float32 or float64; -inf bans a token
Row = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

# A token whose score is lower than the best one's by this has at most 1e-7 of its probability.
NEAR = 16.0
# Below this size a sort is cheaper than narrowing the candidates further.
SMALL_ENOUGH_TO_SORT = 1024
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
    cut = top_k > 0 or top_p < 1 or min_p > 0
    needs_all = tail_free < 1 or (typical_p < 1 and not cut)
    with np.errstate(all="ignore"):  # to -inf and to 0: what they should become
        margin = math.inf if needs_all else NEAR if cut else NEAR * temperature
        ids, row = _near(scores, highest, margin)
        rest = 0.0
        if cut or tail_free < 1:
            lowest = -math.inf
            if ids.size < scores.size and not needs_all:
                outside = _rest(scores, highest, ids, 1.0) if top_p < 1 else 0.0
                lowest = _lowest(row, outside, -NEAR, top_k, top_p, top_px, min_p, 1.0)
                if lowest == -math.inf:  # beyond those near the best one
                    ids, row = _near(scores, highest, math.inf)
            if lowest == -math.inf:
                lowest = _lowest(row, 0.0, -math.inf, top_k, top_p, top_px, min_p, tail_free)
            kept = np.flatnonzero(row >= lowest)
            ids, row = ids[kept], row[kept]
        elif not needs_all:
            rest = _rest(scores, highest, ids, temperature)
        if typical_p < 1:
            kept = _typical(row, typical_p)
            ids, row = ids[kept], row[kept]
        cumulative = np.cumsum(np.exp(row / temperature))
        place = point() * (cumulative[-1] + rest)
        if rest > 0 and place >= cumulative[-1]:
            place -= cumulative[-1]
            others = np.ones(scores.size, bool)
            others[ids] = False
            ids = np.flatnonzero(others)
            cumulative = np.cumsum(np.exp(_relative(scores, highest, ids) / temperature))
    return _at(ids, cumulative, place)


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
            count = _zipf_count(row, limit)
            kept = np.flatnonzero(row >= np.partition(row, row.size - count)[row.size - count])
        else:
            kept = np.flatnonzero(surprises <= limit)
            if not kept.size:
                kept = np.flatnonzero(row == 0)
        cumulative = np.cumsum(weights[kept])
    token = _at(kept, cumulative, point() * cumulative[-1])
    return int(ids[token]), float(surprises[token])


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
        ids = np.flatnonzero(scores >= highest - margin)
        if ids.size <= scores.size // 4:
            return ids, _relative(scores, highest, ids)
    ids = np.flatnonzero(scores > -np.inf)
    return ids, _relative(scores, highest, ids)


def _relative(scores: Scores, highest: float, ids: Ids) -> Row:
    row = scores[ids].astype(np.float64)
    row -= highest
    return row


def _rest(scores: Scores, highest: float, ids: Ids, temperature: float) -> float:
    """The sum of the weights of all tokens but `ids`, in the scores' own precision: where that is
    float32, the error is 1e-7 of less than a hundredth."""
    if ids.size == scores.size:
        return 0.0
    weights = scores - highest
    if temperature != 1:
        weights /= temperature
    np.exp(weights, out=weights)
    weights[ids] = 0
    return float(weights.sum())


def _lowest(
    row: Row,
    rest: float,
    floor: float,
    top_k: int,
    top_p: float,
    top_px: float,
    min_p: float,
    tail_free: float,
) -> float:
    """The score that a token needs to pass all cuts; -inf if none of them ends within the row.

    The row holds all tokens with a score of at least `floor`; those of the others add up to `rest`.
    """
    lowest = -math.inf
    if 0 < top_k <= row.size:
        lowest = float(np.partition(row, row.size - top_k)[row.size - top_k])
    if min_p > 0 and math.log(min_p) >= floor:
        lowest = max(lowest, math.log(min_p))
    if top_p < 1:
        weights = np.exp(row)
        mass = float(weights.sum())
        total = mass + rest
        if mass > top_p * total:
            cutoff = _cutoff(row, weights, top_p * total)
            if top_px < 1:
                if top_px * total < math.exp(floor):
                    cutoff = -math.inf
                else:
                    cutoff = float(row[weights > top_px * total].min(initial=cutoff))
            lowest = max(lowest, cutoff)
    if tail_free < 1:
        lowest = max(lowest, _tail(row, tail_free))
    return lowest


def _cutoff(keys: Row, weights: Row, target: float) -> float:
    """The key at which the sum of the weights, taken from the largest key down, first exceeds
    target; the smallest of all if it never does.

    Sorting tens of thousands of them takes longer than all else together, so that the range where
    the cutoff lies is first narrowed by comparing with its mean.
    """
    while keys.size > SMALL_ENOUGH_TO_SORT:
        is_large = keys >= keys.mean()
        large = np.flatnonzero(is_large)
        if not 0 < large.size < keys.size:  # all are equal, but for the rounding of the mean
            if keys.min() == keys.max():
                return float(keys[0])
            break
        mass = weights[large].sum()
        if mass > target:
            keys, weights = keys[large], weights[large]
        else:
            small = np.flatnonzero(~is_large)
            keys, weights = keys[small], weights[small]
            target -= mass
    descending = np.argsort(-keys, kind="stable")
    place = np.searchsorted(np.cumsum(weights[descending]), target, side="right")
    return float(keys[descending[min(place, keys.size - 1)]])


def _tail(row: Row, tail_free: float) -> float:
    """The lowest score before the tail (tail free sampling, Phénix and Egan 2019): with the
    probabilities p in descending order, the bends |p[i-1] - 2 p[i] + p[i+1]| scaled to a sum of 1,
    the tail begins where their running sum exceeds tail_free; and the last token belongs to it."""
    descending = np.sort(row)[::-1]
    if descending.size < 3:
        return -math.inf
    bends = np.abs(np.diff(np.exp(descending), 2))
    running = np.cumsum(bends)
    if running[-1] == 0:
        return -math.inf
    begin = 1 + np.searchsorted(running, tail_free * running[-1], side="right")
    return float(descending[begin - 1])


def _typical(row: Row, typical_p: float) -> Ids:
    """The places of the typical tokens (Meister et al. 2022): those whose surprise is closest to
    the expected one, until their probabilities sum up to more than typical_p."""
    weights = np.exp(row)
    total = float(weights.sum())
    expected = -float(weights @ np.where(weights > 0, row, 0)) / total
    closeness = -np.abs(row + expected)  # surprise and entropy both lack the same log(total)
    return np.flatnonzero(closeness >= _cutoff(closeness, weights, typical_p * total))


def _zipf_count(row: Row, limit: float) -> int:
    """How many of the likeliest tokens mirostat 1 keeps: Zipf's exponent s is estimated by least
    squares, and then k = (e 2**limit / (1 - N**-e))**(1/s) with e = s - 1, N tokens in all."""
    count = min(ZIPF_TOKENS, row.size)
    if count < 2:
        return 1
    top = np.sort(np.partition(row, row.size - count)[row.size - count :])[::-1]
    ratios = np.log1p(1 / np.arange(1, count))  # log((i + 1) / i)
    drops = -np.diff(np.maximum(top, -1e6))  # finite, whatever the scores are
    exponent = float((ratios @ drops) / (ratios @ ratios))
    e = exponent - 1
    size = math.log(row.size)
    share = 1 / size if abs(e) < 1e-9 else e / -math.expm1(-e * size)
    bits = (math.log(share) + limit * math.log(2)) / max(exponent, 1e-9)
    return max(1, round(math.exp(min(bits, size))))


def _at(ids: Ids, cumulative: Row, place: float) -> int:
    """The token whose stretch of the cumulative weights holds the place; rounding may have put it
    just behind the last one."""
    found = np.searchsorted(cumulative, place, side="right")
    last = np.searchsorted(cumulative, cumulative[-1])
    return int(ids[min(found, last)])
