"""Where the random numbers of the old homes come from."""

from __future__ import annotations

import numpy as np


def fresh_seed() -> int:
    """A seed for one call, drawn from numpy's global generator.

    None of these packages took a seed; `numpy.random.seed(…)` before a call makes it repeatable.
    """
    return int(np.random.randint(2**31))
