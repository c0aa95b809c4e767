"""The canonical arithmetic in numpy: RWKV-4 and 4a to the last bit.

`ggml/README.md` defines every result of the core bit by bit; this module is that page in another
language, and what the core computes must equal it. Outside `fma` all is plain float32, and numpy
rounds each operation once, to nearest even, as IEEE-754 has it. Vectors are the rows of a matrix,
one per token, because that is fast; the order of operations within a row is the page's.

Dot products of integers are computed in float64, where their partial sums, below 2^53, are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from . import quants
from .quants import F32, Tensor


@dataclass(eq=False)
class Adapted(Tensor):
    """A matrix with an adapter beside it: B·A, both FP32, the scale in B already."""

    a: Tensor
    b: np.ndarray

    @staticmethod
    def of_parts(weight: Tensor, parts: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> Adapted:
        """parts: A (rank, cols), B (rows, rank) and its scale, of LoRAs one after the other."""
        a = np.concatenate([a for a, _, _ in parts])
        b = np.concatenate([b * F32(scale) for _, b, scale in parts], axis=1)
        fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
        return Adapted(**fields, a=Tensor.of(101, "FP32", a), b=b)


Model = Mapping[str, Tensor]
Product = Callable[[Tensor, np.ndarray], np.ndarray]

FFN_XX, ATT_XX, AA, BB, PP = range(5)

STEPS = {"A16": 16255, "int8": 127}  # from zero to the largest activation of a block


# ---- RWKV-4 ----


@np.errstate(all="ignore")
def forward(
    model: Model,
    tokens: Sequence[int],
    state: np.ndarray | None = None,
    activations: str = "A16",
) -> tuple[np.ndarray, np.ndarray]:
    """The logits (tokens, n_vocab) after every token, and the state after the last, in float32.

    There is at least one token. `state`, (n_layer, 5, n_embed) or flat, is where to go on from;
    None is the beginning of a text. It is not changed. That of RWKV-4a is flat, and M follows the
    layers. `activations` is a key of STEPS, or
    "bf16": A16, and FP32 and FP16 matrices are multiplied as bfloat16.
    """
    n_layer = sum(key.endswith(".ln1.weight") for key in model)
    n_embed = model["emb.weight"].shape[1]
    if state is None:
        state = np.zeros((n_layer, 5, n_embed), F32)
        state[:, PP] = -1e30
    state, m = np.split(np.array(state, F32).ravel(), [n_layer * 5 * n_embed])
    state = state.reshape(n_layer, 5, n_embed)

    product = partial(matmul, activations=activations)
    x = embed(model["emb.weight"], tokens)
    x = layer_norm(x, model, "blocks.0.ln0")
    for i in range(n_layer):
        x = x + time_mixing(layer_norm(x, model, f"blocks.{i}.ln1"), model, i, state[i], product)
        x = x + channel_mixing(layer_norm(x, model, f"blocks.{i}.ln2"), model, i, state[i], product)
        if f"blocks.{i}.tiny_q.weight" in model:
            x, m = tiny_attention(x, model, f"blocks.{i}", tokens, m, product)
    logits = product(model["head.weight"], layer_norm(x, model, "ln_out"))
    return logits, np.concatenate([state.ravel(), m.ravel()]) if m.size else state


def embed(table: Tensor, tokens: Sequence[int]) -> np.ndarray:
    rows = table.data[np.asarray(tokens, np.int64)]
    return quants.dequantize(table.version, table.name, rows, table.shape[1])


def time_mixing(
    x: np.ndarray, model: Model, i: int, state: np.ndarray, product: Product
) -> np.ndarray:
    att = f"blocks.{i}.att"
    r, k, v = (
        product(
            model[f"{att}.{matrix}.weight"],
            shift(x, state[ATT_XX], model[f"{att}.time_mix_{z}"].values()),
        )
        for z, matrix in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    state[ATT_XX] = x[-1]
    first = model[f"{att}.time_first"].values()
    decay = model[f"{att}.time_decay"].values()
    memory = np.stack([wkv(k[t], v[t], first, decay, state) for t in range(len(x))])
    return product(model[f"{att}.output.weight"], sigmoid(r) * memory)


def wkv(
    k: np.ndarray, v: np.ndarray, first: np.ndarray, decay: np.ndarray, state: np.ndarray
) -> np.ndarray:
    aa, bb, pp = state[AA], state[BB], state[PP]

    ww = first + k
    q = maximum(pp, ww)
    e1, e2 = exp(pp - q), exp(ww - q)
    y = (e1 * aa + e2 * v) / (e1 * bb + e2)

    ww = pp + decay
    q = maximum(ww, k)
    e1, e2 = exp(ww - q), exp(k - q)
    state[AA], state[BB], state[PP] = e1 * aa + e2 * v, e1 * bb + e2, q
    return y


def channel_mixing(
    x: np.ndarray, model: Model, i: int, state: np.ndarray, product: Product
) -> np.ndarray:
    ffn = f"blocks.{i}.ffn"
    xk = shift(x, state[FFN_XX], model[f"{ffn}.time_mix_k"].values())
    xr = shift(x, state[FFN_XX], model[f"{ffn}.time_mix_r"].values())
    state[FFN_XX] = x[-1]
    k = relu2(product(model[f"{ffn}.key.weight"], xk))
    gate = sigmoid(product(model[f"{ffn}.receptance.weight"], xr))
    return gate * product(model[f"{ffn}.value.weight"], k)


def tiny_attention(
    x: np.ndarray,
    model: Model,
    block: str,
    tokens: Sequence[int],
    m: np.ndarray,
    product: Product,
) -> tuple[np.ndarray, np.ndarray]:
    z = layer_norm(x, model, f"{block}.tiny_ln")
    q, k = product(model[f"{block}.tiny_q.weight"], z), product(model[f"{block}.tiny_k.weight"], z)
    v = product(model[f"{block}.tiny_v.weight"], embed(model["emb.weight"], tokens))
    m = m.reshape(-1, x.shape[1]) if m.size else np.zeros((q.shape[1], x.shape[1]), F32)
    y = np.empty_like(x)
    for t in range(len(x)):
        m = m + k[t][:, None] * v[t]
        y[t] = 0
        for row, query in zip(m, q[t], strict=True):
            y[t] += query * row
    return x + y * (F32(1) / np.sqrt(F32(q.shape[1]))), m


# ---- vectors ----


def layer_norm(x: np.ndarray, model: Model, name: str) -> np.ndarray:
    n = F32(x.shape[1])
    centred = x - total(x) / n
    variance = total(centred * centred) / n
    scale = F32(1) / np.sqrt(variance + F32(1e-5))
    return centred * scale * model[f"{name}.weight"].values() + model[f"{name}.bias"].values()


def total(x: np.ndarray) -> np.ndarray:
    """The sum of each row, (rows, 1): sixteen lanes and the tree."""
    lanes = np.zeros((16, len(x)), F32)
    for start in range(0, x.shape[1], 16):
        part = x[:, start : start + 16].T
        lanes[: len(part)] += part
    return tree(lanes)[:, None]


def tree(lanes: np.ndarray) -> np.ndarray:
    """The sum of sixteen lanes: halves are added until one is left."""
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def shift(x: np.ndarray, previous: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Token shift: row t meets row t - 1, the first row the one kept in the state."""
    before = np.concatenate([previous[None], x[:-1]])
    return x * mix + before * (F32(1) - mix)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Not numpy's: if either is NaN, this is b."""
    return np.where(a > b, a, b)


def relu2(x: np.ndarray) -> np.ndarray:
    z = np.where(x < 0, F32(0), x)
    return z * z


def sigmoid(x: np.ndarray) -> np.ndarray:
    return F32(1) / (F32(1) + exp(-x))


LOG2_E = F32(1.44269504)
LN2_HIGH = F32(0.693359375)
LN2_LOW = F32(-2.12194440e-4)
EXP_COEFFICIENTS = [
    F32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
]


@np.errstate(all="ignore")
def exp(x: np.ndarray) -> np.ndarray:
    clamped = np.where(x < 89, x, F32(89))
    clamped = np.where(clamped > -104, clamped, F32(-104))
    n = np.rint(clamped * LOG2_E)
    r = (clamped - n * LN2_HIGH) - n * LN2_LOW
    p = EXP_COEFFICIENTS[0]
    for c in EXP_COEFFICIENTS[1:]:
        p = p * r + c
    y = (p * (r * r) + r) + F32(1)
    exponent = n.astype(np.int32)
    half = exponent >> 1  # 2^exponent itself may be beyond float32
    y = y * np.ldexp(F32(1), half) * np.ldexp(F32(1), exponent - half)
    return np.where(np.isnan(x), x, y)


# ---- matrices ----


@np.errstate(all="ignore")
def matmul(weight: Tensor, x: np.ndarray, activations: str) -> np.ndarray:
    """(tokens, rows): each row of x, (tokens, cols) float32, times the weight (rows, cols)."""
    if weight.name not in quants.PLAIN:
        y = quantized_matmul(weight, x, STEPS["A16" if activations == "bf16" else activations])
    elif activations == "bf16":
        y = bf16_matmul(weight, x)
    else:
        y = plain_matmul(weight, x)
    if isinstance(weight, Adapted):
        narrow = plain_matmul(weight.a, x)
        for i in range(narrow.shape[1]):
            y = fma(narrow[:, i, None], weight.b[:, i], y)
    return y


def plain_matmul(weight: Tensor, x: np.ndarray) -> np.ndarray:
    """FP32 and FP16: sixteen lanes and the tree."""
    rows, cols = weight.shape
    w = weight.values().T.astype(np.float64, order="C")
    out = np.empty((len(x), rows), F32)
    step = max(1, 4096 // rows)  # tokens at a time: the lanes fit into the cache
    for start in range(0, len(x), step):
        part = x[start : start + step].T.astype(np.float64, order="C")
        lanes = np.zeros((16, part.shape[1], rows), F32)
        for k in range(0, cols, 16):
            here = lanes[: cols - k]
            here[...] = fma(w[k : k + 16, None, :], part[k : k + 16, :, None], here)
        out[start : start + step] = tree(lanes)
    return out


def bf16_matmul(weight: Tensor, x: np.ndarray) -> np.ndarray:
    """FP32 and FP16 as bfloat16: even and odd columns of a block summed apart, then added up."""
    rows, cols = weight.shape
    filled = ((0, 0), (0, -cols % 32))
    w = np.pad(to_bf16(weight.values()), filled).T.astype(np.float64, order="C")
    x = np.pad(to_bf16(x), filled).T.astype(np.float64, order="C")
    acc = np.zeros((x.shape[1], rows), F32)
    for start in range(0, len(w), 32):
        sums = np.zeros((2, *acc.shape), F32)
        for k in range(start, start + 32):
            # exact, or one term is too small to matter to float32
            sums[k % 2] = flush(x[k, :, None] * w[k] + sums[k % 2])
        t = flush(np.add(sums[0], sums[1], dtype=np.float64))
        acc = flush(np.add(acc, t, dtype=np.float64))
    return acc


@np.errstate(all="ignore")
def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 8 bits, ties to even; denormals become zeros."""
    return flush(round_to_bits(x.astype(np.float64), 8))


def flush(x: np.ndarray) -> np.ndarray:
    """float64 to float32; what would be denormal, even after rounding, becomes a zero."""
    tiny = np.abs(x) < 2**-125
    if tiny.any():
        tiny = np.abs(round_to_bits(x, 24)) < 2**-126
    return np.where(tiny, np.copysign(0, x), x).astype(F32)


def round_to_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """float64 with this many significant bits, whatever the exponent."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def quantized_matmul(weight: Tensor, x: np.ndarray, steps: int) -> np.ndarray:
    """Integer dots with quantized activations, one accumulator per row, block after block."""
    blocks = quants.unpack(weight.version, weight.name, weight.data)
    q = blocks.q - quants.ZERO.get(weight.name, 0)
    _, n_blocks, n = q.shape
    if blocks.index is not None:
        q[np.arange(n) == blocks.index[..., None]] = 0
    a, scales = quantize_activations(x, steps)
    a = a.reshape(len(x), n_blocks, n)
    dots = a.transpose(1, 0, 2).astype(np.float64) @ q.transpose(1, 2, 0).astype(np.float64)
    sums = a.sum(axis=2)

    acc = np.zeros((len(x), len(q)), F32)
    for b in range(n_blocks):
        d = scales[:, b * n // 32, None]
        acc = fma(blocks.d[:, b], (dots[b] + 0.0).astype(F32) * d, acc)  # + 0.0: never -0
        if blocks.m is not None:
            acc = fma(blocks.m[:, b], sums[:, b, None].astype(F32) * d, acc)
        if blocks.index is not None:
            present = blocks.index[:, b] < 32
            i = np.where(present, blocks.index[:, b], 0)
            with_outlier = fma(blocks.outlier[:, b], x[:, b * 32 + i], acc)
            with_outlier = fma(-blocks.m[:, b], a[:, b, i].astype(F32) * d, with_outlier)
            acc = np.where(present, with_outlier, acc)
    return acc


@np.errstate(all="ignore")
def quantize_activations(x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers (tokens, blocks, 32) int64 and scales (tokens, blocks) float32."""
    x = x.reshape(len(x), -1, 32)
    largest = np.max(np.abs(x), axis=2)
    finite = np.isfinite(largest)
    d = largest / F32(steps)
    d = np.where(d < F32(2**-126), F32(0), d)
    usable = (finite & (d != 0))[..., None]
    a = np.where(usable, np.rint(x * (F32(1) / d)[..., None]), F32(0)).astype(np.int64)
    return a, np.where(finite, d, F32(np.nan))


@np.errstate(all="ignore")
def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once, to float32; a, b and c hold float32 values.

    The product is exact in float64. Rounding its sum with c to 53 bits and then to 24 gives the
    right result unless the first rounding lands exactly between two floats (its last 28 bits are 0
    then): there the sum is rounded to odd instead, so that it stays on its side of the middle.
    """
    product = np.multiply(a, b, dtype=np.float64)
    rounded = np.asarray(product + c)
    between = (rounded.view(np.int64) & 0xFFFFFFF) == 0
    if between.any():
        c = np.broadcast_to(c, rounded.shape)[between].astype(np.float64)
        rounded[between] = add_to_odd(np.broadcast_to(product, rounded.shape)[between], c)
    return rounded.astype(F32)


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64; if inexact, the neighbour of the exact sum whose last bit is 1."""
    rounded = a + b
    part = rounded - a
    error = (a - (rounded - part)) + (b - part)
    bits = rounded.view(np.int64)
    inexact = np.isfinite(error) & (error != 0)
    outward = np.where((error > 0) == (rounded > 0), 1, -1)
    return np.where(inexact & (bits % 2 == 0), bits + outward, bits).view(np.float64)
