"""The `rwkv rescale` command: the same model with the outliers of its hidden layers levelled.

The hidden layer of channel mixing is relu(key x)², which value multiplies. Where a row of key is
divided by s, and the column of value that meets it multiplied by s², the model computes what it did
before. Large models have rows of key that are many times as long as others, and columns of value
that are as much too small: next to others in a block they are rounded to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from .atomic import refuse_same_file
from .ggmf import FP16, Record, Writer, read_plain_model, read_tensor
from .progress import Progress, progress_bar
from .weights import check_finite, half

_KEY, _VALUE = ".ffn.key.weight", ".ffn.value.weight"
_LARGEST_EXPONENT = 12  # of a factor: beyond it numbers would leave the range of floats
_ROWS = 256  # that are worked on at once


@dataclass(frozen=True)
class Rescaled:
    """Of one layer: how many of its hidden channels were changed, and the largest factor, of a row
    of key, up or down."""

    layer: int
    n_changed: int
    n_channels: int
    largest: float


def rescale(source: Path, target: Path, *, progress: Progress | None = None) -> list[Rescaled]:
    """Write the FP32 or FP16 model `source` with the columns of each ffn.value made about equally
    long, each tensor in the type that it has.

    Factors are powers of two, so that the new model gives the same logits and states to the bit; in
    FP16, weights that leave its range of full precision, below 2^-14, are rounded. Columns within a
    factor of 2 of the layer's median stay as they are.
    progress: called with the bytes done and the bytes in all.

    `target` appears, or replaces an older file, only when it is complete. Raises RWKVFileError for
    a source that is quantized or no model and for values that are not finite, ValueError for the
    same file twice, OSError for the disk's failures.
    """
    refuse_same_file(source, target)
    header, records = read_plain_model(source, "rescale the model before it is quantized")
    by_key = {record.key: record for record in records}
    exponents: dict[str, np.ndarray] = {}  # of the factors of both matrices of a layer
    rescaled = []
    for record in records:
        if record.key.endswith(_VALUE):
            layer = record.key.removesuffix(_VALUE)
            n = exponents[layer] = _exponents(source, by_key[layer + _KEY], record)
            rescaled.append(
                Rescaled(
                    int(re.sub(r"\D", "", layer)),
                    int(np.count_nonzero(n)),
                    len(n),
                    float(2.0 ** np.abs(n).max()),
                )
            )
    total = sum(record.nbytes for record in records)
    done = 0
    with Writer(target, header) as writer:
        for record in records:
            array = _rescaled(source, record, exponents)
            writer.write(record.key, record.data_type, array)
            done += record.nbytes
            if progress is not None:
                progress("rescaling", done, total)
    return sorted(rescaled, key=lambda row: row.layer)


def _exponents(source: Path, key: Record, value: Record) -> np.ndarray:
    """(hidden channels) n: rows of key become 2^n times, columns of value 4^-n times as large."""
    matrix = read_tensor(source, value)
    squares = np.zeros(value.shape[1])
    for start in range(0, len(matrix), _ROWS):
        squares += np.square(matrix[start : start + _ROWS], dtype=np.float64).sum(axis=0)
    check_finite(f"{source}: {value.key}", squares)
    lengths = np.sqrt(squares)
    used = lengths > 0
    exponents = np.zeros(len(lengths), np.int64)
    if used.any():
        octaves = np.log2(lengths[used] / np.median(lengths[used]))
        exponents[used] = np.clip(np.rint(octaves / 2), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    if key.data_type == FP16:  # no row of key may overflow
        rows = read_tensor(source, key)
        largest = np.abs(rows).max(axis=1).astype(np.float64)
        with np.errstate(divide="ignore"):
            room = np.floor(np.log2(65504 / largest))
        exponents = np.minimum(exponents, np.maximum(room, 0)).astype(np.int64)
    return exponents


def _rescaled(source: Path, record: Record, exponents: Mapping[str, np.ndarray]) -> np.ndarray:
    array = read_tensor(source, record)
    layer = record.key.removesuffix(_KEY).removesuffix(_VALUE)
    n = exponents.get(layer)
    if n is None or not n.any():
        return array
    is_key = record.key.endswith(_KEY)
    wide = np.ldexp(array.astype(np.float32), n[:, None] if is_key else -2 * n)
    where = f"{source}: {record.key}"
    return half(where, wide, clamp=False) if record.data_type == FP16 else wide


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
def command(source: Path, target: Path) -> None:
    """Level the outliers of a model, before it is quantized.

    SRC is an FP32 or FP16 model file. DEST is the same model: it gives the same answers, and states
    go from one to the other. Rows of its matrices ffn.key that stand out, as they do in large
    models, are scaled down, and the columns of ffn.value that go with them up, so that quantizing
    does not lose these. DEST has the types of SRC; it appears, or replaces an older file, only when
    it is complete. Importances are to be measured on DEST.

    \b
    rwkv rescale model.bin level.bin
    rwkv quantize level.bin model-Q4_1.bin Q4_1
    """
    with progress_bar() as progress:
        rescaled = rescale(source, target, progress=progress)
    for row in rescaled:
        if row.n_changed:
            click.echo(
                f"layer {row.layer:<4} {row.n_changed:>6,} of {row.n_channels:,} channels, "
                f"by up to {row.largest:g}"
            )
    if not any(row.n_changed for row in rescaled):
        click.echo("no channel stands out: the weights stay as they are")
    click.echo(f"{target}: {target.stat().st_size:,} bytes")
