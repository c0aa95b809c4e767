"""LoRA files: what they change in a model, checked against it.

A LoRA, in the format of Blealtan's RWKV-LM-LoRA, is a checkpoint with two thin matrices for each
matrix W that it changes, A (rank, columns) and B (rows, rank): W + alpha / rank * B @ A is what was
learned. It may also hold whole tensors, which replace those of the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, open_checkpoint
from .errors import RWKVFileError
from .weights import check_finite, shape_in_file, some, transform

# 'blocks.0.att.key.lora_A', or with '.weight' as it was until March 2023.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(\.weight)?")

Shapes = Mapping[str, tuple[int, ...]]
"""Of a model's tensors, as its file has them."""


@dataclass(frozen=True)
class Replacement:
    """A whole tensor in place of the model's."""

    lora: Checkpoint
    name: str

    def values(self) -> np.ndarray:
        """float32, as model files hold it. Raises RWKVFileError for values that are not finite."""
        where = f"{self.lora.path}: {self.name}"
        array = self.lora.read(self.name)
        check_finite(where, array)
        return transform(where, self.name, array)


@dataclass(frozen=True)
class Product:
    """scale * B @ A, which is added to a matrix."""

    lora: Checkpoint
    a: str
    b: str
    scale: float

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A (rank, columns) and B (rows, rank), float32. Raises RWKVFileError for values that are
        not finite."""
        a, b = (self._factor(key) for key in (self.a, self.b))
        return a, b

    def _factor(self, key: str) -> np.ndarray:
        array = self.lora.read(key)
        check_finite(f"{self.lora.path}: {key}", array)
        return array


Step = Replacement | Product


@dataclass(frozen=True)
class Part:
    """What LoRAs change in one tensor of a model, in memory: a product or the values of a vector.

    shape: of the tensor. a (rank, columns), b (rows, rank), values (n): float32, C-contiguous.
    """

    name: str
    shape: tuple[int, ...]
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    scale: float = 0.0
    values: np.ndarray | None = None


def read_parts(
    loras: Sequence[tuple[Path, float]],
    shapes: Shapes,
    *,
    key: str | None = None,
    ignore_unused: bool = False,
) -> list[Part]:
    """What LoRAs, each with its alpha, change beside the weights of a model that stay as they are.

    key, ignore_unused: as of `plan`. Raises what that does, and RWKVFileError for a LoRA that
    replaces a matrix, and for values that are not finite.
    """
    parts = []
    with contextlib.ExitStack() as stack:
        steps, _ = plan(stack, loras, shapes, key=key, ignore_unused=ignore_unused)
        for name, shape in shapes.items():
            for step in steps[name]:
                if isinstance(step, Product):
                    a, b = step.factors()
                    parts.append(Part(name, shape, a, b, step.scale))
                elif len(shape) == 1:
                    parts.append(Part(name, shape, values=step.values()))
                else:
                    raise RWKVFileError(
                        f"{step.lora.path}: replaces the matrix '{name}', which a model that is "
                        "loaded keeps; merge the LoRA into the model instead (rwkv merge-lora)"
                    )
    return parts


def content_id(parts: Sequence[Part]) -> str:
    """32 hexadecimal digits, the same for the same numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        rank = 0 if part.a is None else len(part.a)
        head = f"{part.name} {part.shape} {rank} {float(np.float32(part.scale)).hex()}\n"
        digest.update(head.encode())
        for array in (part.a, part.b, part.values):
            if array is not None:
                digest.update(array.astype("<f4", copy=False).data)
    return digest.hexdigest()


def plan(
    stack: contextlib.ExitStack,
    loras: Sequence[tuple[Path, float]],
    shapes: Shapes,
    *,
    key: str | None = None,
    ignore_unused: bool = False,
) -> tuple[dict[str, list[Step]], list[str]]:
    """What LoRAs, each with its alpha, do to each tensor of a model, and the keys without a use.

    stack:         keeps the files open.
    key:           which dictionary of the LoRAs, see `open_checkpoint`.
    ignore_unused: go on where a LoRA has tensors that the model does not have.

    Raises RWKVFileError for LoRAs that do not fit, ValueError for an alpha that is not finite,
    OSError for files that cannot be opened. Warns where a LoRA undoes something.
    """
    for path, alpha in loras:
        if not math.isfinite(alpha):
            raise ValueError(f"{path}: alpha is {alpha}, expected a finite number")
    steps: dict[str, list[Step]] = {name: [] for name in shapes}
    unused: list[str] = []
    for path, alpha in loras:
        lora = stack.enter_context(open_checkpoint(path, key))
        unused += _plan(lora, alpha, shapes, steps, ignore_unused)
    return steps, unused


def _plan(
    lora: Checkpoint,
    alpha: float,
    shapes: Shapes,
    steps: dict[str, list[Step]],
    ignore_unused: bool,
) -> list[str]:
    """Append what one LoRA does to each tensor of a model and return the keys that it has no use
    for; raises RWKVFileError if it does not fit."""
    factors: dict[str, dict[str, str]] = {}
    replaced: list[str] = []
    unused: list[str] = []
    for key in lora:
        match = _FACTOR.fullmatch(key)
        name = f"{match[1]}.weight" if match else key
        if name not in shapes:
            unused.append(key)
        elif not match:
            replaced.append(key)
        else:
            twin = factors.setdefault(name, {}).setdefault(match[2], key)
            if twin != key:
                raise RWKVFileError(f"{lora.path}: has both '{twin}' and '{key}'")
    if len(unused) == len(lora):
        raise RWKVFileError(
            f"{lora.path}: the model has none of its tensors, which are {some(unused)}"
        )
    if unused and not ignore_unused:
        raise RWKVFileError(
            f"{lora.path}: the model has no tensors for {some(unused)}; "
            "is the LoRA for another model? (merge-lora --ignore-unused leaves them out)"
        )
    misfits = {name: _replacement_misfit(lora, name, shapes[name]) for name in replaced}
    misfits |= {name: _factors_misfit(lora, keys, shapes[name]) for name, keys in factors.items()}
    wrong = [name for name, text in misfits.items() if text]
    if wrong:
        more = f"; nor does what it has for {some(wrong[1:])} fit" if wrong[1:] else ""
        raise RWKVFileError(f"{lora.path}: {misfits[wrong[0]]}{more}")

    undone = [name for name in replaced if steps[name]]
    if undone:
        warnings.warn(
            f"{lora.path}: replaces what a LoRA before it has changed: {some(undone)}",
            stacklevel=4,
        )
    if factors and alpha == 0:
        warnings.warn(f"{lora.path}: with alpha 0 its products change nothing", stacklevel=4)
    for name in replaced:  # before products: a LoRA that has both means their sum
        steps[name].append(Replacement(lora, name))
    for name, keys in factors.items():
        rank = lora.shape(keys["A"])[0]
        steps[name].append(Product(lora, keys["A"], keys["B"], alpha / rank))
    return unused


def _replacement_misfit(lora: Checkpoint, name: str, expected: tuple[int, ...]) -> str:
    """Why a whole tensor cannot replace one of this shape; empty if it can."""
    shape = lora.shape(name)
    if shape_in_file(name, shape) == expected:
        return ""
    return f"'{name}' is {_by(shape)}, in the model it is {_by(expected)}"


def _factors_misfit(lora: Checkpoint, keys: Mapping[str, str], shape: tuple[int, ...]) -> str:
    """Why a product cannot be added to a tensor of this shape; empty if it can."""
    if len(keys) < 2:
        (letter,) = keys
        return f"'{keys[letter]}' is without its lora_{'B' if letter == 'A' else 'A'}"
    if len(shape) != 2:
        return f"'{keys['A']}' is for a matrix, in the model that is a vector"
    a, b = lora.shape(keys["A"]), lora.shape(keys["B"])
    rows, columns = shape
    rank = a[0] if a else 0
    if rank > 0 and a == (rank, columns) and b == (rows, rank):
        return ""
    return (
        f"'{keys['A']}' is {_by(a)} and '{keys['B']}' {_by(b)}, "
        f"expected rank x {columns} and {rows} x rank"
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
