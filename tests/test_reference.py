"""The references against each other, against exact rationals and against blocks made by hand.

Everything else in these tests believes `reference/`; here it has to earn that.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import models
import numpy as np
import pytest
from reference import canonical, quants, rwkv_v4

F32 = np.float32
FORMATS = [(version, name) for version in (100, 101) for name in quants.formats(version)]

each_precision = pytest.mark.parametrize("activations", canonical.STEPS)
each_format = pytest.mark.parametrize(("version", "name"), FORMATS)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


# ---- exactly rounded multiply-add ----


def nearest_float(value: Fraction) -> np.float32:
    """The float32 nearest to a rational, ties to even; 0 becomes +0."""
    if value == 0:
        return F32(0)
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    steps = round(value / unit)  # Python rounds a tie to even
    if abs(steps * unit) >= 2**128:
        return F32(np.copysign(np.inf, float(steps)))
    return F32(np.copysign(float(abs(steps) * unit), -1 if value < 0 else 1))


def exact_fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    a, b, c = (Fraction(float(x)) for x in (a, b, c))
    return nearest_float(a * b + c)


def adversarial_triples() -> list[tuple[float, float, float]]:
    """Sums that lie on, or by a hair beside, the middle between two floats."""
    tie = 1 + 2.0**-12  # its square is 1 + 2^-11 + 2^-24, the middle of two floats
    least, most = 2.0**-149, float(np.finfo(F32).max)
    triples = []
    for sign in (1.0, -1.0):
        for k in range(-149, 127):
            triples += [(tie, tie, sign * 2.0**k), (tie, -tie, sign * 2.0**k)]
            triples += [(1.0, 1.0, sign * 2.0**k), (2.0**k, 2.0**-24, sign * 2.0**k)]
            triples += [(most, 1.0, sign * 2.0**k), (2.0**k, 2.0**-75, sign * least)]
        for odd in (1, 3, 5, 7, 2**23 + 1, 2**24 - 1):  # results that are denormal or just not
            for k in range(-30, 2):
                triples.append((sign * odd * 2.0**-75, 2.0 ** (k - 75), sign * least))
                triples.append((odd * 2.0**-100, sign * 2.0 ** (k - 26), 2.0**-126))
    return triples


def random_floats(random: np.random.Generator, n: int) -> np.ndarray:
    """Finite floats of every exponent, denormals among them."""
    x = random.integers(0, 2**32, n, dtype=np.uint32).view(F32)
    return np.where(np.isfinite(x), x, F32(1))


def test_fma_rounds_the_exact_result_once() -> None:
    random = np.random.default_rng(1)
    a, b, c = np.array(adversarial_triples(), F32).T
    wild = [random_floats(random, 2000) for _ in range(3)]
    tame = random.standard_normal((2, 2000)).astype(F32)
    product = tame[0].astype(np.float64) * tame[1]  # c that cancels the product, or nearly
    nudge = random.integers(-2, 3, 2000)
    cancel = -(product.astype(F32).view(np.int32) + nudge.astype(np.int32)).view(F32)
    a = np.concatenate([a, wild[0], tame[0]])
    b = np.concatenate([b, wild[1], tame[1]])
    c = np.concatenate([c, wild[2], cancel])
    expected = np.array([exact_fma(*triple) for triple in zip(a, b, c, strict=True)])
    assert same_bits(canonical.fma(a, b, c), expected)


def test_fma_is_not_a_product_and_a_sum() -> None:
    """The triples tell a fused operation, rounding to odd included, from both usual mistakes."""
    a, b, c = np.array(adversarial_triples(), F32).T
    with np.errstate(all="ignore"):
        twice = a * b + c
        through_double = (a.astype(np.float64) * b + c).astype(F32)
    assert not same_bits(canonical.fma(a, b, c), twice)
    assert not same_bits(canonical.fma(a, b, c), through_double)


def test_fma_of_zeros_infinities_and_nan() -> None:
    inf, nan = np.inf, np.nan
    a = np.array([0, -0.0, 1, 1, inf, inf, -inf, 1, nan, 2.0**100, 2.0**-100], F32)
    b = np.array([5, 5, -1, 1, 0, 1, 1, 1, 1, 2.0**100, -(2.0**-100)], F32)
    c = np.array([-0.0, -0.0, 1, inf, 1, -inf, 1, nan, 1, 1, 0], F32)
    expected = np.array([0, -0.0, 0, inf, nan, nan, -inf, nan, nan, inf, -0.0], F32)
    got = canonical.fma(a, b, c)
    assert np.array_equal(got, expected, equal_nan=True)
    known = ~np.isnan(expected)
    assert np.array_equal(np.signbit(got[known]), np.signbit(expected[known]))


# ---- exp ----


def test_exp_is_within_two_ulp_of_the_truth() -> None:
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    near = np.linspace(-105, 90, 1 << 20, dtype=F32)
    x = np.concatenate([bits.view(F32), near])
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore", under="ignore"):
        truth = np.exp(x.astype(np.float64))
        rounded = truth.astype(F32)
    y = canonical.exp(x)
    finite = np.isfinite(rounded)
    ulp = np.spacing(rounded[finite]).astype(np.float64)
    assert np.max(np.abs(y[finite] - truth[finite]) / ulp) <= 2
    assert np.all(np.isinf(y[~finite]))


def test_exp_of_special_values() -> None:
    x = np.array([0, -0.0, np.inf, -np.inf, 1e30, -1e30, np.nan, 1e-45], F32)
    expected = np.array([1, 1, np.inf, 0, np.inf, 0, np.nan, 1], F32)
    assert np.array_equal(canonical.exp(x), expected, equal_nan=True)
    assert canonical.sigmoid(np.array([0, -np.inf, np.inf], F32)).tolist() == [0.5, 0, 1]


def test_constants_of_exp_have_the_written_bits() -> None:
    constants = np.array([canonical.LOG2_E, canonical.LN2_HIGH, canonical.LN2_LOW])
    assert constants.view(np.uint32).tolist() == [0x3FB8AA3B, 0x3F318000, 0xB95E8083]


# ---- blocks made by hand ----


def half(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


def single(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


RAMP = [float(k % 16) for k in range(32)]
# codes 0..15, 0..15: pairs of neighbours share a byte in version 100, k and k + 16 in version 101
NEIGHBOURS = bytes.fromhex("1032547698badcfe" * 2)
HALVES = bytes.fromhex("00112233445566778899aabbccddeeff")
TOP_BITS = bytes.fromhex("0000ffff")  # the codes from 16 on, in the upper half of the block


def changed(values: list[float], **changes: float) -> list[float]:
    """The values with others at some places: changed(RAMP, k5=-100)."""
    out = list(values)
    for place, value in changes.items():
        out[int(place[1:])] = value
    return out


def shifted(values: list[float], by: float) -> list[float]:
    return [value + by for value in values]


EIGHTS = b"\x88" * 16
BELOW_HALF = float(np.nextafter(F32(0.5), F32(0)))  # + 0.5 is 1 in float32, yet it rounds to 0
STEPS = [0.0, 15.0, 0.5, 1.5, 2.5, BELOW_HALF, 7.49, 14.75] + [0.0] * 24
BIG = [127.0, 0.5, -0.5, 2.5, -2.5, BELOW_HALF, -126.5, 0.0] + [0.0] * 24

HAND_MADE = {
    # every code once or twice, in its place
    "Q4_0 codes, 100": (
        (100, "Q4_0"),
        changed(shifted(RAMP, -8), k0=-7, k16=-7),
        single(1) + b"\x11" + NEIGHBOURS[1:8] + b"\x11" + NEIGHBOURS[9:],
    ),
    "Q4_0 codes, 101": ((101, "Q4_0"), shifted(RAMP, -8), half(1) + HALVES),
    "Q4_1 codes, 100": ((100, "Q4_1"), shifted(RAMP, -3), single(1, -3) + NEIGHBOURS),
    "Q4_1 codes, 101": ((101, "Q4_1"), shifted(RAMP, -3), half(1, -3) + HALVES),
    "Q4_1_O codes": (
        (100, "Q4_1_O"),
        changed(shifted(RAMP, -3), k5=-100),
        half(1, -3) + struct.pack("<H", 5) + half(-100) + b"\x10\x32\x04" + NEIGHBOURS[3:],
    ),
    "Q4_2 codes": ((100, "Q4_2"), shifted(RAMP, -8), 2 * (half(1) + NEIGHBOURS[:8])),
    "Q4_3 codes": ((100, "Q4_3"), shifted(RAMP, -3), 2 * (half(1, -3) + NEIGHBOURS[:8])),
    "Q5_0 codes, 100": (
        (100, "Q5_0"),
        [k - 16.0 for k in range(32)],
        half(1) + TOP_BITS + NEIGHBOURS,
    ),
    "Q5_0 codes, 101": ((101, "Q5_0"), [k - 16.0 for k in range(32)], half(1) + TOP_BITS + HALVES),
    "Q5_1 codes, 100": (
        (100, "Q5_1"),
        [k - 3.0 for k in range(32)],
        half(1, -3) + TOP_BITS + NEIGHBOURS,
    ),
    "Q5_1 codes, 101": (
        (101, "Q5_1"),
        [k - 3.0 for k in range(32)],
        half(1, -3) + TOP_BITS + HALVES,
    ),
    # ties
    "Q4_0 ties, 100: halves away from zero": (
        (100, "Q4_0"),
        [7.0, -7.0, 0.5, -0.5, 1.5, -1.5, BELOW_HALF, -BELOW_HALF] + [0.0] * 24,
        single(1) + b"\x1f\x79\x6a\x88" + EIGHTS[4:],
    ),
    "Q4_0 ties, 101: halves up": (
        (101, "Q4_0"),
        [-8.0, 7.75, 0.5, -0.5, 1.5, -1.5, -7.75, 8.0] + [0.0] * 24,
        half(1) + b"\x80\x8f\x89\x88\x8a\x87\x80\x8f" + EIGHTS[8:],
    ),
    "Q4_1 ties, 100": (
        (100, "Q4_1"),
        STEPS,
        single(1, 0) + b"\xf0\x21\x03\xf7" + bytes(12),
    ),
    "Q4_1 ties, 101: just below a half is rounded up": (
        (101, "Q4_1"),
        STEPS,
        half(1, 0) + b"\x00\x0f\x01\x02\x03\x01\x07\x0f" + bytes(8),
    ),
    "Q4_3 ties": (
        (100, "Q4_3"),
        STEPS,
        half(1, 0) + b"\xf0\x21\x13\xf7" + bytes(4) + half(0, 0) + bytes(8),
    ),
    "Q5_0 ties": (
        (101, "Q5_0"),
        [-16.0, 15.75, 0.5, -0.5] + [0.0] * 28,
        half(1) + b"\xfe\xff\xff\xff" + b"\x00\x0f\x01" + bytes(13),
    ),
    "Q5_1 ties": (
        (101, "Q5_1"),
        [0.0, 31.0, 0.5, 30.5, 16.5, BELOW_HALF] + [0.0] * 26,
        half(1, 0) + b"\x1a\x00\x00\x00" + b"\x00\x0f\x01\x0f\x01\x01" + bytes(10),
    ),
    "Q8_0 ties, 100": (
        (100, "Q8_0"),
        BIG,
        single(1) + struct.pack("<8b", 127, 1, -1, 3, -3, 0, -127, 0) + bytes(24),
    ),
    "Q8_0 ties, 101": (
        (101, "Q8_0"),
        BIG,
        half(1) + struct.pack("<8b", 127, 1, -1, 3, -3, 0, -127, 0) + bytes(24),
    ),
    # of two equal magnitudes the first counts
    "Q4_0 first +": (
        (101, "Q4_0"),
        [4.0, -4.0] + [0.0] * 30,
        half(-0.5) + b"\x80\x8f" + EIGHTS[2:],
    ),
    "Q4_0 first -": (
        (101, "Q4_0"),
        [-4.0, 4.0] + [0.0] * 30,
        half(0.5) + b"\x80\x8f" + EIGHTS[2:],
    ),
    "Q4_1_O first": (
        (100, "Q4_1_O"),
        [0.0, -9.0, 9.0] + [0.0] * 29,
        half(np.float16(0.6), 0) + struct.pack("<H", 1) + half(-9) + b"\x00\x0f" + bytes(14),
    ),
    # scales in fp16 are rounded to even
    "fp16 down": ((101, "Q8_0"), [127 * (1 + 2**-11)] + [0.0] * 31, half(1) + b"\x7f" + bytes(31)),
    "fp16 up": (
        (101, "Q8_0"),
        [127 * (1 + 3 * 2**-11)] + [0.0] * 31,
        half(1 + 2**-9) + b"\x7f" + bytes(31),
    ),
    "fp16 overflow": (
        (101, "Q8_0"),
        [65520.0 * 127] + [0.0] * 31,
        half(np.inf) + b"\x7f" + bytes(31),
    ),
    # blocks of zeros
    "Q4_0 zeros, 100": ((100, "Q4_0"), [0.0] * 32, single(0) + EIGHTS),
    "Q4_0 zeros, 101": ((101, "Q4_0"), [0.0] * 32, half(-0.0) + EIGHTS),
    "Q4_1 zeros, 100": ((100, "Q4_1"), [0.0] * 32, bytes(24)),
    "Q4_1 zeros, 101": ((101, "Q4_1"), [0.0] * 32, bytes(20)),
    "Q4_1_O zeros": ((100, "Q4_1_O"), [0.0] * 32, bytes(4) + b"\xff\xff" + bytes(18)),
    "Q4_2 zeros": ((100, "Q4_2"), [0.0] * 32, 2 * (half(1) + EIGHTS[:8])),
    "Q4_3 zeros": ((100, "Q4_3"), [0.0] * 32, bytes(24)),
    "Q5_0 zeros": ((101, "Q5_0"), [0.0] * 32, half(-0.0) + b"\xff" * 4 + bytes(16)),
    "Q5_1 zeros": ((101, "Q5_1"), [0.0] * 32, bytes(24)),
    "Q8_0 zeros": ((101, "Q8_0"), [0.0] * 32, bytes(34)),
    "Q4_0 negative zeros": ((101, "Q4_0"), [-0.0] * 32, half(-0.0) + EIGHTS),
    "Q4_1 negative zero first": ((101, "Q4_1"), [-0.0] + [0.0] * 31, half(0, -0.0) + bytes(16)),
    "Q4_1 negative zero later": ((101, "Q4_1"), [0.0] + [-0.0] * 31, bytes(20)),
    # decided here: a code is clamped where 1/d is infinite, and a hopeless Q4_2 block is zeros
    "Q8_0 tiny, 100": (
        (100, "Q8_0"),
        [127 * 2.0**-149, -(2.0**-149), 0.0] + [2.0**-149] * 29,
        single(2.0**-149) + b"\x7f\x80\x80" + b"\x7f" * 29,
    ),
    "Q4_2 tiny": ((100, "Q4_2"), [1e-25] * 32, 2 * (half(1) + EIGHTS[:8])),
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made_block(case: str) -> None:
    (version, name), weights, expected = HAND_MADE[case]
    got = quants.quantize(version, name, np.array([weights], F32))
    assert got.tobytes().hex() == expected.hex()


@pytest.mark.parametrize("case", [case for case in HAND_MADE if "codes" in case])
def test_hand_made_block_decodes_to_its_weights(case: str) -> None:
    (version, name), weights, data = HAND_MADE[case]
    got = quants.dequantize(version, name, np.frombuffer(data, np.uint8), 32)
    assert got.tolist() == [weights]


def test_first_of_equals_holds_wherever_the_zeros_are() -> None:
    """numpy's argmin is vectorised: it must still name the first of equal elements, -0 = +0."""
    random = np.random.default_rng(2)
    x = np.copysign(F32(0), random.standard_normal((200, 32))).astype(F32)
    for name in ("Q4_1", "Q5_1"):
        minimum = quants.unpack(101, name, quants.quantize(101, name, x)).m
        assert np.array_equal(np.signbit(minimum[:, 0]), np.signbit(x[:, 0]))


def test_q4_1_o_reads_every_index() -> None:
    def decode(index: int, value: float) -> list[float]:
        block = half(2, 1) + struct.pack("<H", index) + half(value) + b"\x33" * 16
        return quants.dequantize(100, "Q4_1_O", np.frombuffer(block, np.uint8), 32)[0].tolist()

    plain = [7.0] * 32
    assert decode(0xFFFF, 0) == plain
    assert decode(0xFFFF, -0.0) == plain
    assert decode(3, 0) == changed(plain, k3=0.0)  # the nibble there says 7, and does not count
    assert decode(31, 100) == changed(plain, k31=100.0)
    assert decode(32 + 4, 100) == changed(plain, k4=100.0)


def q4_2_by_the_book(x: list[np.float32]) -> bytes:
    """One block of 16, number by number: the search of Q4_2 read a second time."""

    def nearest(value: np.float32) -> int:
        bits = int((value + F32(12582912)).view(np.int32))
        return (bits & 0x7FFFFF) - 0x400000

    def fit(scale: np.float32) -> tuple[np.float32, int, list[int]]:
        levels = [max(-8, min(7, nearest(scale * value))) for value in x]
        sum_lx, sum_l2 = F32(0), 0
        for value, level in zip(x, levels, strict=True):
            sum_lx = sum_lx + value * F32(level)
            sum_l2 += level * level
        return sum_lx, sum_l2, levels

    largest = max(abs(value) for value in x)
    if largest == 0:
        return half(1) + EIGHTS[:8]
    best, best_scale = F32(0), F32(0)
    for candidate in (8.7, 8.3, 8.1, 7.8, 7.3, 7.0, 6.3, 5.7):
        scale = F32(candidate) / largest
        plus, plus2, _ = fit(scale)
        minus, minus2, _ = fit(-scale)
        if plus * plus * F32(minus2) > minus * minus * F32(plus2):
            top, below, signed = plus * plus, F32(plus2), scale
        else:
            top, below, signed = minus * minus, F32(minus2), -scale
        if top > best * below:
            best, best_scale = top / below, signed
    sum_lx, sum_l2, levels = fit(best_scale)
    codes = [level + 8 for level in levels]
    nibbles = bytes(codes[2 * j] | codes[2 * j + 1] << 4 for j in range(8))
    return np.float16(sum_lx / F32(sum_l2)).tobytes() + nibbles


def test_q4_2_search() -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((40, 16))
    x[:8] = np.round(x[:8] * 4) / 4  # ties
    x[8:16] *= random.uniform(0, 1, (8, 16)) ** 8  # a few large ones
    x[16:24, 1:] = 0
    x[24:28] *= 1e-12
    x[28:32] *= 60000
    x[32] = 0
    x[33] = -8.0 * (np.arange(16) == 3)
    x[34] = np.abs(x[34])
    x = x.astype(F32)
    expected = b"".join(q4_2_by_the_book(list(block)) for block in x)
    assert quants.quantize(100, "Q4_2", x.reshape(-1, 32)).tobytes() == expected


# ---- every format ----


def adversarial_rows() -> np.ndarray:
    random = np.random.default_rng(4)
    x = random.standard_normal((64, 128))
    x[8:16] *= 10.0 ** random.integers(-30, 5, (8, 1))
    x[16:24, ::32] = 65504
    x[24:32, 5::32] *= 1000
    x[32:40] = np.round(x[32:40] * 8) / 8
    x[40:44] = np.abs(x[40:44]) + 100
    x[44:48] = 0.125
    x[48:52] = 0
    x[52:56] *= 2.0**-140
    return x.astype(F32)


@each_format
def test_codes_survive_packing(version: int, name: str) -> None:
    data = quants.quantize(version, name, adversarial_rows())
    assert data.shape == (64, quants.row_bytes(version, name, 128))
    again = quants.pack(version, name, quants.unpack(version, name, data))
    assert np.array_equal(again, data)


@each_format
def test_quantized_weights_stay_near(version: int, name: str) -> None:
    """Per block, by the steps of the format: half a step where codes reach both ends, a whole one
    where the far end is cut off (the largest weight has code 0, the opposite one would need a code
    more than there is). The stored scale and minimum may be off by half a unit of fp16."""
    x = adversarial_rows()
    n = quants.block_size(name)
    y = quants.dequantize(version, name, quants.quantize(version, name, x), 128)
    x, y = x.reshape(64, -1, n).astype(np.float64), y.reshape(64, -1, n).astype(np.float64)
    error = np.abs(y - x)
    largest = np.max(np.abs(x), axis=2)
    spread = np.max(x, axis=2) - np.min(x, axis=2)
    if name == "Q4_2":
        # the search is no worse in least squares than its candidate 7: half of a step of largest/7
        error = np.sqrt(np.mean(error**2, axis=2, keepdims=True))
    step = {
        (100, "Q4_0"): largest / 14,
        (101, "Q4_0"): largest / 8,
        (100, "Q4_1_O"): spread / 30,  # generous: the spread without the outlier is less
        (100, "Q4_2"): largest / 14,
        (100, "Q5_0"): largest / 16,
        (101, "Q5_0"): largest / 16,
        (100, "Q5_1"): spread / 62,
        (101, "Q5_1"): spread / 62,
        (100, "Q8_0"): largest / 254,
        (101, "Q8_0"): largest / 254,
    }.get((version, name), spread / 30)
    # a denormal fp16 is off by up to 2^-25, times the largest code; float32 rounding is below 2^-20
    slack = (largest + spread) * (2**-11 + 2**-20) + 32 * 2.0**-25 * (name != "Q8_0")
    slack += 127 * 2.0**-25 * (name == "Q8_0")
    assert np.all(error <= (step + slack)[..., None])


@each_format
def test_any_bytes_decode(version: int, name: str) -> None:
    random = np.random.default_rng(5)
    size = quants.row_bytes(version, name, 96)
    data = random.integers(0, 256, (100, size), dtype=np.uint8)
    weights = quants.dequantize(version, name, data, 96)
    assert weights.shape == (100, 96)
    assert weights.dtype == F32


def test_half_precision_is_rounded_once_and_widened_exactly() -> None:
    x = adversarial_rows().astype(np.float16).astype(F32)
    halves = quants.quantize(101, "FP16", x)
    assert halves.tobytes() == x.astype("<f2").tobytes()
    assert same_bits(quants.dequantize(101, "FP16", halves, 128), x)


def test_unknown_formats_and_ragged_rows_are_refused() -> None:
    x = np.zeros((1, 48), F32)
    with pytest.raises(ValueError, match="multiple of 32 weights, not 48"):
        quants.quantize(100, "Q4_2", x)
    with pytest.raises(ValueError, match="version 101 has no format 'Q4_2'"):
        quants.quantize(101, "Q4_2", x[:, :32])


# ---- matrices, number by number ----


def dot_by_the_book(tensor: quants.Tensor, row: int, x: np.ndarray, steps: int) -> np.float32:
    """One row times one vector, in scalars and rationals, as the page on the arithmetic says."""
    if tensor.name in quants.PLAIN:
        lanes = [F32(0)] * 16
        for k, w in enumerate(tensor.values()[row]):
            lanes[k % 16] = exact_fma(w, x[k], lanes[k % 16])
        for count in (8, 4, 2, 1):
            lanes = [lanes[j] + lanes[j + count] for j in range(count)]
        return lanes[0]

    blocks = quants.unpack(tensor.version, tensor.name, tensor.data[row : row + 1])
    _, n_blocks, n = blocks.q.shape
    acc = F32(0)
    for b in range(n_blocks):
        start = b * n
        part = x[start // 32 * 32 :][:32]
        d = max(abs(part)) / F32(steps)
        if d < F32(2.0**-126):
            d, a = F32(0), [0] * 32
        else:
            a = [round(float(value * (F32(1) / d))) for value in part]
        a = a[start % 32 :][:n]
        q = [int(code) - quants.ZERO.get(tensor.name, 0) for code in blocks.q[0, b]]
        i = None if blocks.index is None else int(blocks.index[0, b])
        if i == quants.NO_OUTLIER:
            i = None
        if i is not None:
            q[i] = 0
        t = nearest_float(Fraction(sum(u * v for u, v in zip(q, a, strict=True)))) * d
        acc = exact_fma(blocks.d[0, b], t, acc)
        if blocks.m is not None:
            acc = exact_fma(blocks.m[0, b], F32(sum(a)) * d, acc)
        if i is not None:
            acc = exact_fma(blocks.outlier[0, b], x[start + i], acc)
            acc = exact_fma(-blocks.m[0, b], F32(a[i]) * d, acc)
    return acc


@each_precision
@pytest.mark.parametrize(("version", "name"), [*FORMATS, (101, "FP32"), (101, "FP16")])
def test_matmul_by_the_book(version: int, name: str, activations: str) -> None:
    random = np.random.default_rng(6)
    cols = 128 if (version, name) in FORMATS else 45
    w = random.standard_normal((5, cols)).astype(F32)
    w[1, 32:64] = 0  # in Q4_1_O a block without an outlier
    x = random.standard_normal((3, cols)).astype(F32)
    x[1, :32] = 0
    x[2, :16] *= 1e-42  # a block whose scale would be denormal, were it not for the other half
    x[2, 16:32] *= 1e-40
    tensor = quants.Tensor.of(version, name, w)
    steps = canonical.STEPS[activations]
    expected = np.array([[dot_by_the_book(tensor, row, v, steps) for row in range(5)] for v in x])
    assert same_bits(canonical.matmul(tensor, x, activations), expected)


@each_precision
@each_format
def test_quantized_dot_is_as_near_as_its_activations_allow(
    version: int, name: str, activations: str
) -> None:
    """Against float64 over the weights that the file stands for. The first term is the rounding of
    activations to integers, half a step of d_a each; the second that of float32."""
    random = np.random.default_rng(7)
    rows, cols, tokens = 48, 256, 6
    w = random.standard_normal((rows, cols)) * np.exp(random.standard_normal((rows, cols)))
    x = random.standard_normal((tokens, cols)) * 10.0 ** random.integers(-3, 3, (tokens, cols))
    x = x.astype(F32)
    tensor = quants.Tensor.of(version, name, w.astype(F32))
    weights, exact_x = tensor.values().astype(np.float64), x.astype(np.float64)
    error = np.abs(canonical.matmul(tensor, x, activations) - exact_x @ weights.T)

    blocks = np.abs(exact_x).reshape(tokens, -1, 32)
    d_a = np.max(blocks, axis=2) / canonical.STEPS[activations]
    sums = np.abs(weights).reshape(rows, -1, 32).sum(axis=2)
    bound = d_a / 2 @ sums.T
    bound += (cols / 32 + 8) * 2.0**-24 * (np.abs(exact_x) @ np.abs(weights).T)
    assert np.all(error <= bound)


def test_bf16_by_the_book() -> None:
    """Roundings at ties and at both ends of the range; sums in the order of the page, where another
    order would show."""
    max_bf16, tie = 2.0**128 - 2.0**120, 1 + 2.0**-8
    cases = [(1.0, 1.0), (tie, 1.0), (tie + 2.0**-20, 1 + 2.0**-7), (tie + 2.0**-7, 1 + 2.0**-6)]
    cases += [(max_bf16, max_bf16), (max_bf16 + 2.0**118, max_bf16), (2.0**128 - 2.0**104, np.inf)]
    cases += [(np.inf, np.inf), (-0.0, -0.0), (2.0**-126, 2.0**-126), (-(2.0**-127), -0.0)]
    x, rounded = (np.array(column, F32) for column in zip(*cases, strict=True))
    assert same_bits(canonical.to_bf16(x), rounded)
    assert same_bits(canonical.to_bf16(-x), -rounded)
    assert np.isnan(canonical.to_bf16(np.array([np.nan], F32)))

    smallest = 2.0**-126
    sums = [smallest - 2.0**-151, smallest - 2.0**-150, -smallest + 2.0**-150, 3 * 2.0**-127]
    expected = np.array([smallest, 0, -0.0, 3 * 2.0**-127], F32)
    assert same_bits(canonical.flush(np.array(sums)), expected)

    big = 2.0**24  # a 1 that is added to it is lost
    x = np.ones(64, F32)
    for places, result in [
        ({0: big, 2: 1, 4: -big}, 0),
        ({0: big, 1: 1, 2: -big}, 1),
        ({0: 1, 2: big, 3: -big}, 0),
        ({0: big, 31: 1, 32: -big}, 0),
        ({0: big, 2: -big, 32: 1, 63: 1}, 2),
    ]:
        w = np.zeros((1, 64), F32)
        w[0, list(places)] = list(places.values())
        tensor = quants.Tensor.of(101, "FP32", w)
        assert canonical.matmul(tensor, x[None], "bf16") == result


@each_precision
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_activation_spoils_its_token_and_no_other(bad: float, activations: str) -> None:
    random = np.random.default_rng(8)
    x = random.standard_normal((3, 64)).astype(F32)
    tensor = quants.Tensor.of(101, "Q5_1", random.standard_normal((4, 64)).astype(F32))
    good = canonical.matmul(tensor, x, activations)
    x[1, 40] = bad
    spoilt = canonical.matmul(tensor, x, activations)
    assert np.all(np.isnan(spoilt[1]))
    assert same_bits(spoilt[[0, 2]], good[[0, 2]])


# ---- the model ----

TOKENS = np.random.default_rng(9).integers(0, 100, 300).tolist()
SIZES = {"n_vocab": 100, "n_embed": 64, "n_layer": 3, "n_ffn": 160}


def test_canonical_is_near_the_paper() -> None:
    model = models.encode(models.random_model(1, **SIZES))
    logits, state = canonical.forward(model, TOKENS)
    truth, true_state = rwkv_v4.forward(models.file_weights(model), TOKENS)
    assert np.max(np.abs(logits - truth)) <= 1e-5 * np.max(np.abs(truth))
    scale = np.max(np.abs(true_state), axis=2, keepdims=True)
    assert np.all(np.abs(state - true_state) <= 1e-4 * scale)


@each_format
def test_quantized_canonical_is_near_the_paper(version: int, name: str) -> None:
    """The activations of a row are off by 2^-15 of their largest at most; three layers of random
    weights were seen to make 1.4e-4 of the largest logit of it."""
    model = models.encode(models.random_model(1, **SIZES), name, version)
    logits, _ = canonical.forward(model, TOKENS[:100])
    truth, _ = rwkv_v4.forward(models.file_weights(model), TOKENS[:100])
    assert np.max(np.abs(logits - truth)) <= 5e-4 * np.max(np.abs(truth))


@pytest.mark.parametrize("name", ["FP32", "Q5_1"])
def test_a_sequence_is_its_tokens_one_by_one(name: str) -> None:
    model = models.encode(models.random_model(2, **SIZES), name)
    tokens = TOKENS[:20]
    whole, end = canonical.forward(model, tokens)
    head, state = canonical.forward(model, tokens[:13])
    kept = state.copy()
    tail, last = canonical.forward(model, tokens[13:14], state.ravel())
    assert same_bits(state, kept)
    rest, last = canonical.forward(model, tokens[14:], last)
    assert same_bits(np.concatenate([head, tail, rest]), whole)
    assert same_bits(last, end)


def test_canonical_state_starts_as_the_papers() -> None:
    model = models.encode(models.random_model(3, **SIZES))
    start = rwkv_v4.initial_state(3, 64).astype(F32)
    given, _ = canonical.forward(model, [5, 6], start)
    assert same_bits(given, canonical.forward(model, [5, 6])[0])


def test_every_weight_of_a_random_model_matters() -> None:
    """A core that forgot a tensor, or a layer, must not pass."""
    tensors = models.random_model(4, **SIZES)
    tokens = TOKENS[:30]
    weights = {key: value.astype(np.float64) for key, value in tensors.items()}
    logits, _ = rwkv_v4.forward(weights, tokens)
    assert 1 <= np.max(np.abs(logits)) <= 30
    random = np.random.default_rng(10)
    for key, value in weights.items():
        noisy = value * (1 + 0.05 * random.standard_normal(value.shape))
        other, _ = rwkv_v4.forward({**weights, key: noisy}, tokens)
        assert np.max(np.abs(other - logits)) > 1e-2, key


# ---- files ----


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    tensors = models.random_model(5, n_vocab=20, n_embed=32, n_layer=1, n_ffn=64)
    types = {"blocks.0.att.key.weight": "Q5_1", "emb.weight": "FP16", "head.weight": "Q4_3"}
    path = tmp_path / "mixed.bin"
    written = models.write_model(path, tensors, "Q4_1_O", 100, types, order=reversed(tensors))
    read = models.read_model(path)
    assert list(read) == list(reversed(tensors))
    assert read["blocks.0.ffn.value.weight"].name == "Q4_1_O"
    assert read["blocks.0.att.time_decay"].name == "FP32"
    for key, tensor in written.items():
        assert read[key].name == types.get(key, tensor.name)
        assert read[key].shape == tensors[key].shape
        assert np.array_equal(read[key].data, tensor.data)


def test_a_file_has_the_bytes_that_the_format_says(tmp_path: Path) -> None:
    path = tmp_path / "two.bin"
    matrix = models.make_record("w", quants.Tensor.of(101, "FP16", np.ones((2, 3), F32)))
    broken = models.Record(b"\xff", -1, (7,), b"data", dim_count=5, key_length=2**31)
    header = models.Header(n_vocab=-1, n_embed=2, n_layer=2**31, data_type=9, version=100)
    models.write_records(path, header, [matrix, broken], tail=b"!")
    assert path.read_bytes() == (
        b"fmgg\x64\0\0\0\xff\xff\xff\xff\2\0\0\0\0\0\0\x80\x09\0\0\0"
        b"\2\0\0\0\1\0\0\0\1\0\0\0\3\0\0\0\2\0\0\0w" + b"\x00\x3c" * 6 + b"\5\0\0\0"
        b"\0\0\0\x80\xff\xff\xff\xff\7\0\0\0\xffdata!"
    )
