"""The `rwkv merge-lora` command.

A LoRA, in the format of Blealtan's RWKV-LM-LoRA, is a checkpoint with two thin matrices for each
matrix W that it changes, A (rank, columns) and B (rows, rank): W + alpha / rank * B @ A is what was
learned. It may also hold whole tensors, which replace those of the same name.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from .atomic import refuse_same_file
from .checkpoint import Checkpoint, open_checkpoint
from .errors import RWKVFileError
from .ggmf import DTYPES, FP16, Record, Writer, read_index, read_tensor
from .library import load_rwkv_shared_library
from .progress import Progress, progress_bar
from .weights import check_finite, half, shape_in_file, some, transform

# 'blocks.0.att.key.lora_A', or with '.weight' as it was until March 2023.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(\.weight)?")


@dataclass(frozen=True)
class Merged:
    """The tensors of the model that were changed, in its order, and the keys that found none."""

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class _Replacement:
    lora: Checkpoint
    name: str

    def apply(self, weights: np.ndarray) -> None:
        where = f"{self.lora.path}: {self.name}"
        array = self.lora.read(self.name)
        check_finite(where, array)
        weights[...] = transform(where, self.name, array)


@dataclass(frozen=True)
class _Product:
    lora: Checkpoint
    a: str
    b: str
    scale: float

    def apply(self, weights: np.ndarray) -> None:
        factors = []
        for key in (self.b, self.a):
            factors.append(self.lora.read(key))
            check_finite(f"{self.lora.path}: {key}", factors[-1])
        with np.errstate(over="ignore", invalid="ignore"):  # the sum is checked
            delta = np.matmul(*factors)
            delta *= np.float32(self.scale)
            # Where nothing is added, a weight of -0 stays one.
            np.add(weights, delta, out=weights, where=delta != 0)


def merge_lora(
    source: Path,
    loras: Sequence[tuple[Path, float]],
    target: Path,
    *,
    key: str | None = None,
    clamp: bool = False,
    ignore_unused: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write the FP32 or FP16 model `source` with LoRAs in it, each tensor in the type that it has.

    loras:         checkpoints, each with its alpha, merged one after the other in float32: of whole
                   tensors the last one counts. A warning says where that undoes something.
    key:           which dictionary of the LoRAs, see `open_checkpoint`.
    clamp:         values beyond the range of FP16 become its largest value; otherwise an error.
    ignore_unused: go on where a LoRA has tensors that the model does not have.
    progress:      called with the bytes done and the bytes in all.

    `target` appears, or replaces an older file, only when it is complete. Raises RWKVFileError for
    a source that is quantized or no model, for LoRAs that do not fit it and for values that are not
    finite, ValueError for wrong arguments, OSError for the disk's failures.
    """
    if not loras:
        raise ValueError("no LoRA to merge")
    for path, alpha in loras:
        if not math.isfinite(alpha):
            raise ValueError(f"{path}: alpha is {alpha}, expected a finite number")
        refuse_same_file(path, target)
    refuse_same_file(source, target)
    library = load_rwkv_shared_library()
    library.rwkv_estimate(source)  # checks the file as loading does
    header, records = read_index(source)
    for record in records:
        if record.data_type not in DTYPES:
            name = library.rwkv_get_format_name(record.data_type)
            raise RWKVFileError(
                f"{source}: {record.key} is {name}, expected FP32 or FP16; merge into the model "
                "before it was quantized, and quantize the result"
            )

    with contextlib.ExitStack() as stack:
        steps: dict[str, list[_Replacement | _Product]] = {record.key: [] for record in records}
        shapes = {record.key: record.shape for record in records}
        unused: list[str] = []
        for path, alpha in loras:
            lora = stack.enter_context(open_checkpoint(path, key))
            unused += _plan(lora, alpha, shapes, steps, ignore_unused)
        total = sum(record.nbytes for record in records)
        done = 0
        with Writer(target, header) as writer:
            for record in records:
                array: np.ndarray = read_tensor(source, record)
                if steps[record.key]:
                    array = _merged(source, record, array, steps[record.key], clamp)
                writer.write(record.key, record.data_type, array)
                done += record.nbytes
                if progress:
                    progress("merging", done, total)
    return Merged(
        tuple(name for name in steps if any(isinstance(s, _Product) for s in steps[name])),
        tuple(name for name in steps if any(isinstance(s, _Replacement) for s in steps[name])),
        tuple(unused),
    )


def _plan(
    lora: Checkpoint,
    alpha: float,
    shapes: Mapping[str, tuple[int, ...]],
    steps: dict[str, list[_Replacement | _Product]],
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
            "is the LoRA for another model? --ignore-unused leaves them out"
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
            stacklevel=3,
        )
    if factors and alpha == 0:
        warnings.warn(f"{lora.path}: with alpha 0 its products change nothing", stacklevel=3)
    for name in replaced:  # before products: a LoRA that has both means their sum
        steps[name].append(_Replacement(lora, name))
    for name, keys in factors.items():
        rank = lora.shape(keys["A"])[0]
        steps[name].append(_Product(lora, keys["A"], keys["B"], alpha / rank))
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


def _merged(
    source: Path,
    record: Record,
    array: np.ndarray,
    steps: Sequence[_Replacement | _Product],
    clamp: bool,
) -> np.ndarray:
    where = f"{source}: {record.key}"
    array = array.astype(np.float32)
    check_finite(where, array)
    for step in steps:
        step.apply(array)
    check_finite(f"{where} with the LoRA", array)
    return half(f"{where} with the LoRA", array, clamp) if record.data_type == FP16 else array


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("lora", metavar="LORA", type=click.Path(path_type=Path))
@click.argument("alpha", metavar="ALPHA", type=float)
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
@click.option(
    "--also",
    metavar="LORA ALPHA",
    type=(click.Path(path_type=Path), float),
    multiple=True,
    help="Merge this one then, too; may be given several times.",
)
@click.option("--key", metavar="NAME", help="Which dictionary or prefix of a LoRA has the weights.")
@click.option("--ignore-unused", is_flag=True, help="Leave out what SRC has no tensors for.")
@click.option("--clamp", is_flag=True, help="Clamp values beyond the range of FP16.")
def command(
    source: Path,
    lora: Path,
    alpha: float,
    target: Path,
    also: tuple[tuple[Path, float], ...],
    key: str | None,
    ignore_unused: bool,
    clamp: bool,
) -> None:
    """Merge what a LoRA has learned into a model.

    SRC is an FP32 or FP16 model file, LORA a checkpoint of RWKV-LM-LoRA (.pth, or its tensors as
    .safetensors), ALPHA the number that it was trained with (--lora_alpha); another one makes it
    weaker or stronger, a negative one (with -- before SRC) takes it away again. DEST has the types
    of SRC; it appears, or replaces an older file, only when it is complete.

    \b
    rwkv merge-lora model.bin lora.pth 32 merged.bin
    rwkv merge-lora model.bin lora.pth 32 merged.bin --also poems.pth 16
    """
    with progress_bar() as progress:
        merged = merge_lora(
            source,
            [(lora, alpha), *also],
            target,
            key=key,
            clamp=clamp,
            ignore_unused=ignore_unused,
            progress=progress,
        )
    for what, names in (("added to", merged.added), ("replaced", merged.replaced)):
        kinds = Counter(re.sub(r"^blocks\.\d+\.", "", name) for name in names)
        for kind, count in kinds.items():
            click.echo(f"{what:<10}{count:>4} x {kind}")
    if merged.unused:
        click.echo(f"left out  {some(merged.unused)}")
    click.echo(f"{target}: {target.stat().st_size:,} bytes")
