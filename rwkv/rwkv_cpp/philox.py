"""Random numbers that depend on nothing but where they are drawn.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as 1, 2, 3; 2011) is
a function of a key and a counter. There is no generator whose state a break, a batch or another
thread could disturb, and integers alone are computed with: the same numbers everywhere.
"""

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words of 32 bits; counter and key are such words too."""
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b = right >> 32 ^ b ^ first, right & _WORD
        c, d = left >> 32 ^ d ^ second, left & _WORD
        first = first + _KEY_STEPS[0] & _WORD
        second = second + _KEY_STEPS[1] & _WORD
    return a, b, c, d


def uniform(seed: int, stream: int, position: int) -> float:
    """A multiple of 2**-53 in 0..1, 1 excluded.

    seed and position: 0..2**64-1; stream: 0..2**32-1, told apart draws of one seed and position.
    """
    counter = (position & _WORD, position >> 32, stream, 0)
    high, low, _, _ = philox(counter, (seed & _WORD, seed >> 32))
    return (high >> 5 << 26 | low >> 6) * 2.0**-53
