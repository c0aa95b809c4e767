"""The sampling rules, slowly, step by step as they are stated: that of 2023 with sorted lists and
decimal numbers of 60 digits, the others in float64 over all tokens. They give every token's
probability, so that both the draws and their frequencies can be judged.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal, localcontext

import numpy as np


def token_probabilities(
    logits: Sequence[float],
    temperature: float,
    top_p: float,
    logit_bias: Mapping[int, float] | None = None,
) -> list[float]:
    """The probability of each token, for finite logits and biases (or -inf); temperature > 0."""
    with localcontext(Context(prec=60, Emin=-(10**9), Emax=10**9)):
        scores = [Decimal(float(logit)) for logit in logits]
        for token, bias in (logit_bias or {}).items():
            scores[token] += Decimal(bias)
        highest = max(scores)
        weights = [(score - highest).exp() for score in scores]
        total = sum(weights)
        probabilities = [weight / total for weight in weights]

        descending = sorted(range(len(scores)), key=lambda token: (-probabilities[token], token))
        if top_p == 0:
            kept = descending[:1]
        else:
            kept = list(descending)
            running = Decimal(0)
            for token in descending:
                running += probabilities[token]
                if running > Decimal(top_p):
                    cutoff = probabilities[token]
                    kept = [token for token in descending if probabilities[token] >= cutoff]
                    break
        powers = {token: ((scores[token] - highest) / Decimal(temperature)).exp() for token in kept}
        total = sum(powers.values())
        return [float(powers.get(token, Decimal(0)) / total) for token in range(len(scores))]


def token_at(probabilities: Sequence[float], point: float) -> int:
    """The token whose stretch of 0..1 holds the point, the tokens laid out by their ids."""
    running = 0.0
    for token, probability in enumerate(probabilities):
        running += probability
        if point < running:
            return token
    raise AssertionError("the probabilities sum up to less than the point")


def cut_probabilities(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    top_px: float = 1.0,
    min_p: float = 0.0,
    tail_free: float = 1.0,
    typical_p: float = 1.0,
) -> np.ndarray:
    """The probability of each token after all cuts and the temperature, in float64."""
    p = softmax(logits)
    ranked = sorted(range(p.size), key=lambda token: -p[token])
    kept = set(ranked)
    if top_k:
        kept &= down_to(p, ranked[:top_k][-1])
    if top_p < 1:
        nucleus = ranked[: sums_above(p[ranked], top_p)]
        kept &= down_to(p, nucleus[-1]) | {token for token in ranked if p[token] > top_px}
    if min_p:
        kept &= {token for token in ranked if p[token] >= min_p * p.max()}
    if tail_free < 1 and p.size >= 3:
        bends = [
            abs(p[left] - 2 * p[token] + p[right])
            for left, token, right in zip(ranked, ranked[1:], ranked[2:], strict=False)
        ]
        if sum(bends) > 0:
            head = ranked[: sums_above(np.array(bends) / sum(bends), tail_free)]
            kept &= down_to(p, head[-1])
    if typical_p < 1:
        tokens = sorted(kept)
        q = p[tokens] / p[tokens].sum()
        entropy = -sum(x * math.log(x) for x in q)
        distance = np.array([abs(-math.log(x) - entropy) for x in q])
        order = np.argsort(distance)
        last = order[sums_above(q[order], typical_p) - 1]
        kept = {tokens[place] for place in np.flatnonzero(distance <= distance[last])}
    return tempered(logits, kept, temperature)


def mirostat_probabilities(
    logits: np.ndarray, version: int, limit: float, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's probability, and its surprise in bits."""
    p = softmax(logits.astype(np.float64) / temperature)
    surprise = -np.log2(p)
    if version == 2:
        kept = set(np.flatnonzero(surprise <= limit)) or {int(np.argmax(p))}
    else:
        ranked = sorted(p, reverse=True)
        products = squares = 0.0
        for i in range(1, min(100, p.size)):
            t, b = math.log((i + 1) / i), math.log(ranked[i - 1] / ranked[i])
            products += t * b
            squares += t * t
        s = products / squares
        k = ((s - 1) * 2**limit / (1 - p.size ** (1 - s))) ** (1 / s)
        k = min(max(1, round(k)), p.size)
        kept = set(np.flatnonzero(p >= ranked[k - 1]))
    return tempered(logits, kept, temperature), surprise


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def sums_above(probabilities: np.ndarray, threshold: float) -> int:
    """How many from the front it takes to sum up to more than the threshold; all, if none do."""
    running = 0.0
    for count, probability in enumerate(probabilities, start=1):
        running += probability
        if running > threshold:
            return count
    return len(probabilities)


def down_to(p: np.ndarray, last: int) -> set[int]:
    return set(np.flatnonzero(p >= p[last]))


def tempered(logits: np.ndarray, kept: set[int], temperature: float) -> np.ndarray:
    tokens = sorted(kept)
    result = np.zeros(logits.size)
    result[tokens] = softmax(logits[tokens].astype(np.float64) / temperature)
    return result
