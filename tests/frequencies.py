"""Whether tokens were drawn as often as they should be."""

import math
from collections.abc import Iterable, Sequence

import numpy as np


def chi_square_bound(freedom: int) -> float:
    """What chi square exceeds with a probability of 1e-6, by Wilson and Hilferty's cube of a
    normal variable; 4.7534 is the point that this exceeds with that probability."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.7534 * math.sqrt(spread)) ** 3


def check_frequencies(tokens: Iterable[int], probabilities: Sequence[float]) -> None:
    counts = np.bincount(list(tokens), minlength=len(probabilities))
    expected = np.array(probabilities) * counts.sum()
    assert not counts[expected == 0].any()
    used = expected > 0
    assert expected[used].min() >= 5, "the test itself: too few draws for chi square"
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi_square < chi_square_bound(max(1, used.sum() - 1))
