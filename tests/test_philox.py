"""philox.py: its authors' own test vectors, and points that must never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_cpp.philox import philox, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # digits of pi
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    assert philox(counter, key) == words


def test_points_are_53_bits_of_two_words():
    """0x6627E8D5 and 0xE169C58D, the first words of the zero vector above, without 5 and 6 bits."""
    assert uniform(0, 0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**64 - 1))
def test_points_are_in_range_and_depend_on_each_argument(seed, position):
    point = uniform(seed, 0, position)
    assert 0 <= point < 1
    assert point * 2**53 == int(point * 2**53)
    assert point == uniform(seed, 0, position)
    others = {
        uniform(seed ^ 1, 0, position),
        uniform(seed ^ 1 << 63, 0, position),
        uniform(seed, 1, position),
        uniform(seed, 0, position ^ 1),
        uniform(seed, 0, position ^ 1 << 63),
    }
    assert len(others - {point}) == 5


def test_points_are_even():
    """Each hundredth of 0..1 as often, and neighbours without a correlation: 5 sigma at most."""
    points = np.array([uniform(7, 3, position) for position in range(20_000)])
    counts = np.bincount((points * 100).astype(int), minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * np.sqrt(2 * 99)
    assert abs(np.corrcoef(points[1:], points[:-1])[0, 1]) < 5 / np.sqrt(20_000)
