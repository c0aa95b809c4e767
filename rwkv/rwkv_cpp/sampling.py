"""Choosing the next token from a model's logits.

The order of the steps is that of the RWKV scripts of 2023: bias, softmax, top_p, and only then the
temperature. All of it in float64 and, where powers are taken, in log space; the caller's arrays are
never written to.
"""

import math
import operator
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .errors import NonFiniteLogits

# Below this size a sort is cheaper than narrowing the candidates further.
SMALL_ENOUGH_TO_SORT = 1024


def sample_logits(
    logits: npt.ArrayLike,
    temperature: float = 1.0,
    top_p: float = 0.8,
    logit_bias: Mapping[int, float] | None = None,
    rng: np.random.Generator | int | None = None,
) -> int:
    """Choose a token.

    - logits: (n_vocab) floating point numbers; a torch tensor in the CPU's memory is fine. -inf
      means that the token is banned, a single +inf that the token is chosen.
    - temperature: >= 0; 0 chooses the most likely token, the lowest id among equals.
    - top_p: 0..1; tokens are taken from the most likely one down until their probabilities sum up
      to more than top_p, the others are dropped. Tokens as likely as the last one taken stay; a sum
      that never exceeds top_p keeps all tokens; 0 keeps the most likely token alone.
    - logit_bias: id -> what is added to its logit; -inf bans the token.
    - rng: a generator, a seed, or None for a fresh random one. A seed gives the same token each
      time: to draw a series, pass the same generator to every call.

    A token is chosen with one `rng.random()` as the point on the cumulative sum of the kept tokens'
    probabilities in the order of their ids: the same on every version of numpy. Nothing is drawn
    where nothing is left to chance.

    Raises NonFiniteLogits if the logits hold NaN, more than one +inf, or nothing but -inf;
    ValueError or TypeError for wrong arguments.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number >= 0, found {temperature}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a number in 0..1, found {top_p}")
    if not isinstance(rng, np.random.Generator):
        rng = _seeded(rng)
    scores = _biased(logits, logit_bias or {})

    best = int(np.argmax(scores))  # of NaN if there is one, of the first among equals
    highest = scores[best]
    if np.isnan(highest):
        raise NonFiniteLogits(f"logits: the one of token {best} is NaN")
    if highest == -np.inf:
        raise NonFiniteLogits("logits: all are -inf, so every token is banned")
    if highest == np.inf and np.count_nonzero(scores == np.inf) > 1:
        raise NonFiniteLogits("logits: more than one is +inf")
    if highest == np.inf or temperature == 0 or top_p == 0:
        return best

    with np.errstate(over="ignore", under="ignore"):  # to -inf and to 0: what they should become
        scores -= highest
        kept = None
        if top_p < 1:
            weights = np.exp(scores)
            kept = np.flatnonzero(weights >= _cutoff(weights, top_p))
            scores = scores[kept]
        # p^(1/T) = exp(log(p)/T): the best token's score is 0, so the sum is at least 1.
        scores /= temperature
        np.exp(scores, out=scores)
        cumulative = np.cumsum(scores, out=scores)
    point = rng.random() * cumulative[-1]
    place = np.searchsorted(cumulative, point, side="right")
    return int(place if kept is None else kept[place])


def _seeded(seed: int | None) -> np.random.Generator:
    if isinstance(seed, bool) or not (seed is None or isinstance(seed, (int, np.integer))):
        raise TypeError(f"rng: expected a numpy Generator, an integer or None, found {seed!r}")
    if seed is not None and seed < 0:
        raise ValueError(f"rng: expected a seed >= 0, found {seed}")
    return np.random.default_rng(seed)


def _biased(logits: npt.ArrayLike, logit_bias: Mapping[int, float]) -> np.ndarray:
    """A float64 copy of the logits with the bias added."""
    logits = np.asarray(logits)
    if logits.dtype.kind != "f":
        raise TypeError(f"logits: expected floating point numbers, found {logits.dtype}")
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits: expected one non-empty row, found shape {logits.shape}")
    scores = logits.astype(np.float64)
    for token, bias in logit_bias.items():
        if isinstance(token, bool):
            raise TypeError(f"logit_bias: expected a token's id, found {token}")
        if not 0 <= operator.index(token) < scores.size:
            raise ValueError(f"logit_bias: token {token} is not in 0..{scores.size - 1}")
        if math.isnan(bias) or bias == math.inf:
            raise ValueError(f"logit_bias: token {token} has bias {bias}")
        # A ban holds even for a logit of +inf, where a sum would be NaN.
        scores[token] = -math.inf if bias == -math.inf else scores[token] + bias
    return scores


def _cutoff(weights: np.ndarray, top_p: float) -> float:
    """The smallest weight that top_p keeps: with the weights in descending order, the one at which
    their cumulative sum first exceeds top_p of the whole; the smallest of all if it never does.

    Sorting tens of thousands of weights takes longer than all else together, so that the range
    where the cutoff lies is first narrowed by comparing with its mean.
    """
    target = top_p * weights.sum()
    while weights.size > SMALL_ENOUGH_TO_SORT:
        is_large = weights >= weights.mean()
        large = weights[np.flatnonzero(is_large)]  # several times faster than weights[is_large]
        if not 0 < large.size < weights.size:  # all are equal, but for the rounding of the mean
            break
        mass = large.sum()
        if mass > target:
            weights = large
        else:
            weights = weights[np.flatnonzero(~is_large)]
            target -= mass
    descending = np.sort(weights)[::-1]
    position = np.searchsorted(np.cumsum(descending), target, side="right")
    return descending[min(position, descending.size - 1)]
