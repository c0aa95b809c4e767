"""Every weight format of a ggmf file, in numpy: the oracle for the quantizers and dequantizers.

A row of weights is a chain of blocks. Two steps lead from weights to bytes, and two back:

    encode   weights -> Blocks    the rules of the format: scales, minima, codes
    pack     Blocks -> bytes      where each number lies in the block
    unpack   bytes -> Blocks
    decode   Blocks -> weights

`quantize` is the first two of them, `dequantize` the others.

Which bytes a name means depends on the file's version: 100 (interleaved nibbles, mostly float
scales) or 101 (split halves, fp16 scales). Version 100 follows the quantizers of April 2023, except
for Q5_0, Q5_1 and Q8_0, which came in May.

Every float operation below is one IEEE-754 float32 operation in the order of the rules, never
fused.

Where the rules leave a result open, this module decides:
- a code is clamped into the range that its bits can hold, NaN (0 * inf) becomes the lowest code;
  this happens only where 1/d is infinite, |d| < 2^-128, or where d overflows;
- a Q4_2 block so small that every squared sum underflows to 0, so that no candidate wins, is
  stored like a block of zeros (d = 1, all codes 8): the rules would store the scale 0/0;
- weights must be finite: for NaN and infinity no bytes are promised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

F32 = np.float32

TYPE_IDS = {
    "FP32": 0,
    "FP16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q4_1_O": 4,
    "Q4_2": 5,
    "Q4_3": 6,
    "Q5_0": 7,
    "Q5_1": 8,
    "Q8_0": 9,
}
TYPE_NAMES = {number: name for name, number in TYPE_IDS.items()}

# The members of one block, in file order.
LAYOUTS = {
    (100, "Q4_0"): np.dtype([("d", "<f4"), ("qs", "u1", 16)]),
    (100, "Q4_1"): np.dtype([("d", "<f4"), ("m", "<f4"), ("qs", "u1", 16)]),
    (100, "Q4_1_O"): np.dtype(
        [("d", "<f2"), ("m", "<f2"), ("index", "<u2"), ("outlier", "<f2"), ("qs", "u1", 16)]
    ),
    (100, "Q4_2"): np.dtype([("d", "<f2"), ("qs", "u1", 8)]),
    (100, "Q4_3"): np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 8)]),
    (100, "Q5_0"): np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    (100, "Q5_1"): np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    (100, "Q8_0"): np.dtype([("d", "<f4"), ("qs", "i1", 32)]),
    (101, "Q4_0"): np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    (101, "Q4_1"): np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
    (101, "Q5_0"): np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    (101, "Q5_1"): np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    (101, "Q8_0"): np.dtype([("d", "<f2"), ("qs", "i1", 32)]),
}

PLAIN = {"FP32": np.dtype("<f4"), "FP16": np.dtype("<f2")}

# The code that stands for zero; formats with a minimum and Q8_0 have none.
ZERO = {"Q4_0": 8, "Q4_2": 8, "Q5_0": 16}

NO_OUTLIER = 0xFFFF


@dataclass
class Blocks:
    """Unpacked blocks of a matrix: what the bytes say, each number still apart.

    A weight is d * (q - zero), or d * q + m where the format has a minimum; `outlier` replaces the
    weight at `index`.
    """

    q: np.ndarray  # (rows, blocks, n) int32: the codes as stored, n = 16 or 32
    d: np.ndarray  # (rows, blocks) float32
    m: np.ndarray | None = None  # (rows, blocks) float32
    index: np.ndarray | None = None  # (rows, blocks) int32: 0..31, or NO_OUTLIER
    outlier: np.ndarray | None = None  # (rows, blocks) float32


@dataclass
class Tensor:
    """A tensor as it lies in a file."""

    version: int
    name: str  # of its type
    shape: tuple[int, ...]  # (rows, cols), or (n,) for a vector
    data: np.ndarray  # (rows, row_bytes) uint8; a vector is one row

    @classmethod
    def of(cls, version: int, name: str, values: np.ndarray) -> Tensor:
        """Quantize, or round, the values."""
        rows = values.reshape(-1, values.shape[-1])
        return cls(version, name, values.shape, quantize(version, name, rows))

    def values(self) -> np.ndarray:
        """What the bytes stand for, float32 of this shape."""
        rows = dequantize(self.version, self.name, self.data, self.shape[-1])
        return rows.reshape(self.shape)


def formats(version: int) -> list[str]:
    """The names of the quantized formats that files of this version may hold."""
    return [name for known, name in LAYOUTS if known == version]


def block_size(name: str) -> int:
    """Weights per block; 1 for FP32 and FP16."""
    if name in PLAIN:
        return 1
    return 16 if name in ("Q4_2", "Q4_3") else 32


def block_bytes(version: int, name: str) -> int:
    return PLAIN[name].itemsize if name in PLAIN else layout(version, name).itemsize


def row_bytes(version: int, name: str, cols: int) -> int:
    """Bytes of a row. A quantized row is a multiple of 32 weights, whatever its blocks."""
    if name not in PLAIN and cols % 32 != 0:
        raise ValueError(f"a row of {name} has a multiple of 32 weights, not {cols}")
    return cols // block_size(name) * block_bytes(version, name)


def layout(version: int, name: str) -> np.dtype:
    if (version, name) not in LAYOUTS:
        raise ValueError(f"version {version} has no format {name!r}")
    return LAYOUTS[version, name]


def quantize(version: int, name: str, x: np.ndarray) -> np.ndarray:
    """The bytes (rows, row_bytes) uint8 of weights (rows, cols) float32."""
    x = np.ascontiguousarray(x, F32)
    if name in PLAIN:
        with np.errstate(over="ignore"):
            return x.astype(PLAIN[name]).view(np.uint8)
    row_bytes(version, name, x.shape[1])
    with np.errstate(all="ignore"):
        return pack(version, name, encode(version, name, x))


def dequantize(version: int, name: str, data: np.ndarray, cols: int) -> np.ndarray:
    """The weights (rows, cols) float32 that the bytes (rows, row_bytes) uint8 stand for.

    A product is rounded to float32 before a minimum is added.
    """
    data = np.ascontiguousarray(data, np.uint8).reshape(-1, row_bytes(version, name, cols))
    if name in PLAIN:
        return data.view(PLAIN[name]).astype(F32)
    return decode(name, unpack(version, name, data))


# ---- bytes <-> Blocks ----


def pack(version: int, name: str, blocks: Blocks) -> np.ndarray:
    """The bytes (rows, row_bytes) uint8 of the blocks; scales are rounded as the layout says."""
    out = np.zeros(blocks.d.shape, layout(version, name))
    out["d"] = blocks.d
    if "m" in out.dtype.names:
        out["m"] = blocks.m
    if "index" in out.dtype.names:
        out["index"] = blocks.index
        out["outlier"] = blocks.outlier
    if "qh" in out.dtype.names:
        out["qh"] = np.packbits((blocks.q >> 4).astype(np.uint8), axis=-1, bitorder="little")
    if name == "Q8_0":
        out["qs"] = blocks.q
    else:
        low, high = nibble_slots(version, blocks.q & 15)
        out["qs"] = low | high << 4
    return out.view(np.uint8)


def unpack(version: int, name: str, data: np.ndarray) -> Blocks:
    """The blocks in the bytes (rows, row_bytes) uint8."""
    raw = np.ascontiguousarray(data).view(layout(version, name))
    members = raw.dtype.names
    if name == "Q8_0":
        q = raw["qs"].astype(np.int32)
    else:
        q = np.empty((*raw.shape, block_size(name)), np.int32)
        low, high = nibble_slots(version, q)
        low[...] = raw["qs"] & 15
        high[...] = raw["qs"] >> 4
    if "qh" in members:
        q |= np.unpackbits(raw["qh"], axis=-1, bitorder="little").astype(np.int32) << 4
    blocks = Blocks(q, raw["d"].astype(F32))
    if "m" in members:
        blocks.m = raw["m"].astype(F32)
    if "index" in members:
        blocks.outlier = raw["outlier"].astype(F32)
        absent = (raw["index"] == NO_OUTLIER) & (blocks.outlier == 0)
        blocks.index = np.where(absent, NO_OUTLIER, raw["index"] & 31).astype(np.int32)
    return blocks


def nibble_slots(version: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of the codes that lie in the low and in the high nibbles of bytes 0, 1, ..."""
    if version == 100:
        return q[..., 0::2], q[..., 1::2]
    half = q.shape[-1] // 2
    return q[..., :half], q[..., half:]


# ---- Blocks <-> weights ----


def decode(name: str, blocks: Blocks) -> np.ndarray:
    """The weights (rows, cols) float32 of the blocks."""
    with np.errstate(all="ignore"):
        w = (blocks.q - ZERO.get(name, 0)).astype(F32) * blocks.d[..., None]
        if blocks.m is not None:
            w = w + blocks.m[..., None]
    if blocks.index is not None:
        slot = np.arange(w.shape[-1]) == blocks.index[..., None]
        w = np.where(slot, blocks.outlier[..., None], w)
    return w.reshape(len(w), -1)


def encode(version: int, name: str, x: np.ndarray) -> Blocks:
    """The blocks of weights (rows, cols) by the rules of the format, scales still in float32."""
    rule = RULES.get((version, name)) or RULES[None, name]
    return rule(x.reshape(len(x), -1, block_size(name)))


def encode_q4_0_seed(x: np.ndarray) -> Blocks:
    d = np.max(np.abs(x), axis=-1) / F32(7)
    return Blocks(code(round_half_away(x * reciprocal(d)) + F32(8), 0, 15), d)


def encode_signed(x: np.ndarray, half: int) -> Blocks:
    """Q4_0 of version 101 (half = 8) and Q5_0 (16): the largest weight gets the code 0 exactly."""
    largest = at(x, np.argmax(np.abs(x), axis=-1))
    largest = np.where(largest == 0, F32(0), largest)  # -0 is no larger than the 0 to start from
    d = largest / F32(-half)
    return Blocks(code(x * reciprocal(d) + F32(half + 0.5), 0, 2 * half - 1), d)


def encode_minimum(x: np.ndarray, levels: int, rounded: bool) -> Blocks:
    """Q4_1 and Q4_3 (levels = 15), Q5_1 (31): from the minimum to the maximum in equal steps.

    `rounded`: by roundf; otherwise by adding a half and cutting off the fraction.
    """
    m = at(x, np.argmin(x, axis=-1))
    d = (at(x, np.argmax(x, axis=-1)) - m) / F32(levels)
    return Blocks(codes_above(x, m, d, levels, rounded), d, m)


def encode_q4_1_o(x: np.ndarray) -> Blocks:
    """The largest weight is stored apart and the others as Q4_1, by float32 scales."""
    index = np.argmax(np.abs(x), axis=-1)
    outlier = at(x, index)
    index = np.where(outlier == 0, NO_OUTLIER, index)
    outlier = np.where(outlier == 0, F32(0), outlier)
    slot = np.arange(32) == index[..., None]
    m = at(x, np.argmin(np.where(slot, F32(np.inf), x), axis=-1))
    top = at(x, np.argmax(np.where(slot, F32(-np.inf), x), axis=-1))
    d = (top - m) / F32(15)
    q = np.where(slot, 0, codes_above(x, m, d, 15, rounded=True))
    return Blocks(q, d, m, index, outlier)


CANDIDATES = [F32(c) for c in (8.7, 8.3, 8.1, 7.8, 7.3, 7.0, 6.3, 5.7)]


def encode_q4_2(x: np.ndarray) -> Blocks:
    """Tries eight scales of either sign and keeps the one that fits best in least squares."""
    shape = x.shape
    x = np.ascontiguousarray(x.reshape(-1, 16).T)  # (16, blocks): faster by far
    largest = np.max(np.abs(x), axis=0)
    best = np.zeros_like(largest)
    best_scale = np.zeros_like(largest)
    for candidate in CANDIDATES:
        scale = candidate / largest
        nearest = round_half_even(x * scale)
        plus, plus2 = fit(x, np.clip(nearest, -8, 7))
        minus, minus2 = fit(x, np.clip(-nearest, -8, 7))
        plus_wins = plus * plus * minus2 > minus * minus * plus2
        top = np.where(plus_wins, plus * plus, minus * minus)
        sum2 = np.where(plus_wins, plus2, minus2)
        better = top > best * sum2
        best = np.where(better, top / sum2, best)
        best_scale = np.where(better, np.where(plus_wins, scale, -scale), best_scale)
    found = best_scale != 0
    levels = np.where(found, np.clip(round_half_even(x * best_scale), -8, 7), F32(0))
    numerator, denominator = fit(x, levels)
    d = np.where(found, numerator / denominator, F32(1))
    return Blocks((levels.T.reshape(shape) + 8).astype(np.int32), d.reshape(shape[:-1]))


def fit(x: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per block: the sum of x * level, one after another in float32, and that of level squared."""
    total = np.zeros_like(x[0])
    for weight, level in zip(x, levels, strict=True):
        total = total + weight * level
    return total, np.sum(levels * levels, axis=0)  # at most 16 * 64: exact


def encode_q8_0(x: np.ndarray) -> Blocks:
    d = np.max(np.abs(x), axis=-1) / F32(127)
    return Blocks(code(round_half_away(x * reciprocal(d)), -128, 127), d)


# (version, name), or (None, name) where both versions quantize alike and differ in the packing only
RULES: dict[tuple[int | None, str], Callable[[np.ndarray], Blocks]] = {
    (100, "Q4_0"): encode_q4_0_seed,
    (101, "Q4_0"): lambda x: encode_signed(x, 8),
    (100, "Q4_1"): lambda x: encode_minimum(x, 15, rounded=True),
    (101, "Q4_1"): lambda x: encode_minimum(x, 15, rounded=False),
    (100, "Q4_1_O"): encode_q4_1_o,
    (100, "Q4_2"): encode_q4_2,
    (100, "Q4_3"): lambda x: encode_minimum(x, 15, rounded=False),
    (None, "Q5_0"): lambda x: encode_signed(x, 16),
    (None, "Q5_1"): lambda x: encode_minimum(x, 31, rounded=False),
    (None, "Q8_0"): encode_q8_0,
}


def codes_above(
    x: np.ndarray, m: np.ndarray, d: np.ndarray, levels: int, rounded: bool
) -> np.ndarray:
    steps = (x - m[..., None]) * reciprocal(d)
    return code(round_half_away(steps) if rounded else steps + F32(0.5), 0, levels)


def at(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The weight at the index of each block. argmin and argmax name the first of equal weights, and
    -0 equals 0."""
    return np.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def reciprocal(d: np.ndarray) -> np.ndarray:
    """1 / d, one per block, with 0 for 0: from the float32 scale, even if an fp16 is stored."""
    return np.where(d != 0, F32(1) / d, F32(0))[..., None]


def code(value: np.ndarray, low: int, high: int) -> np.ndarray:
    """The fraction cut off, the rest clamped into low..high."""
    return np.where(value > low, np.minimum(value, F32(high)), F32(low)).astype(np.int32)


def round_half_away(value: np.ndarray) -> np.ndarray:
    """C's roundf."""
    whole = np.trunc(value)
    return np.where(np.abs(value - whole) >= 0.5, whole + np.copysign(F32(1), value), whole)


def round_half_even(value: np.ndarray) -> np.ndarray:
    """Adding 1.5 * 2^23 leaves no room for a fraction; right for |value| < 2^22."""
    return np.rint(value)


# ---- the best scales ----


def errors(x: np.ndarray, w: np.ndarray, q: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """(blocks): the sum of w * (x - (d * q + m))²; x, w, q: (blocks, n)."""
    return np.sum(w * (x - (d[:, None] * q + m[:, None])) ** 2, axis=1)


def least_errors(version: int, name: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(blocks): about the least weighted error that blocks (blocks, n) can have in this format,
    found by trying thousands of scales; x is not all zero."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    members = layout(version, name).names
    stored = layout(version, name)["d"]
    if "index" in members:
        least = np.full(len(x), np.inf)
        for slot in range(x.shape[1]):
            others = np.where(np.arange(x.shape[1]) == slot, 0, w)
            rest = w[:, slot] * (x[:, slot] - x[:, slot].astype("<f2").astype(float)) ** 2
            without = np.where(others > 0, x, x[:, [slot - 1]])  # its size is of no account
            least = np.minimum(least, least_range_errors(without, others, 15, stored, 9) + rest)
        return least
    if "m" in members:
        return least_range_errors(x, w, 31 if "qh" in members else 15, stored, 24)
    low, high = (-127, 127) if name == "Q8_0" else (-ZERO[name], ZERO[name] - 1)
    return least_scale_errors(x, w, low, high, stored)


def least_scale_errors(
    x: np.ndarray, w: np.ndarray, low: int, high: int, stored: np.dtype
) -> np.ndarray:
    """All scales, 1 / 500 apart, from those that leave room to four times as fine."""
    least = np.full(len(x), np.inf)
    top = np.max(np.abs(x), axis=1)
    for part in np.geomspace(0.25, 1.5, 900):
        for sign in (-1, 1):
            d = (sign * top * part / high).astype(stored).astype(float)
            q = np.clip(np.rint(x / d[:, None]), low, high)
            least = np.fmin(least, errors(x, w, q, d, np.zeros(len(x))))
    return least


def least_range_errors(
    x: np.ndarray, w: np.ndarray, levels: int, stored: np.dtype, n: int
) -> np.ndarray:
    """n * n ranges that cut more and more off either end, and what least squares make of them."""
    least = np.full(len(x), np.inf)
    bottom, top = np.min(x, axis=1), np.max(x, axis=1)
    cuts = np.linspace(-0.04, 0.5, n)
    for low, high in ((low, high) for low in cuts for high in cuts if low + high < 0.7):
        m = bottom + low * (top - bottom)
        d = (1 - low - high) * (top - bottom) / levels
        for _ in range(5):
            d, m = d.astype(stored).astype(float), m.astype(stored).astype(float)
            with np.errstate(all="ignore"):
                q = np.clip(np.rint((x - m[:, None]) / d[:, None]), 0, levels)
            q = np.nan_to_num(q)
            least = np.fmin(least, errors(x, w, q, d, m))
            mean_q, mean_x = (np.average(values, axis=1, weights=w) for values in (q, x))
            q_, x_ = q - mean_q[:, None], x - mean_x[:, None]
            spread = np.sum(w * q_ * q_, axis=1)
            d = np.where(spread > 0, np.sum(w * q_ * x_, axis=1) / np.maximum(spread, 1e-300), d)
            m = mean_x - d * mean_q
    return least
