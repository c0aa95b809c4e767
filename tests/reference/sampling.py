"""The sampling rule, slowly: sorted lists and decimal numbers of 60 digits, step by step as it is
stated. Gives every token's probability, so that both the draws and their frequencies can be judged.
"""

from collections.abc import Mapping, Sequence
from decimal import Context, Decimal, localcontext


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
