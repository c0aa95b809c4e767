"""The `rwkv upgrade` command: model files of version 100 become files of version 101.

In Q5_0 and Q5_1 the new version has the same bits in another order. In Q4_0, Q4_1 and Q8_0 it has
half-precision scales where the old one has floats. Q4_1_O, Q4_2 and Q4_3 it does not have: such
matrices can only be quantized once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from .atomic import refuse_same_file
from .errors import RWKVFileError
from .formats import Format, formats_of
from .ggmf import DTYPES, Record, Writer, read_model, read_rows
from .progress import counting_bar
from .weights import check_finite

OLD, NEW = 100, 101
_SAMPLED_ROWS = 64  # of each matrix, to find the format that loses least


@dataclass
class Change:
    """What became of the tensors of one format. Changes of numbers are relative ones."""

    source: Format
    target: Format
    tensors: int = 0
    scales: int = 0
    """How many scales and minima were rounded; 0 where they stay as they are."""
    largest_rounding: float = 0.0
    _roundings: float = 0.0
    weights: int = 0
    """How many weights were quantized again."""
    largest_difference: float = 0.0
    """Of a weight quantized again, absolute."""
    _squares: float = 0.0
    _squared_differences: float = 0.0

    @property
    def mean_rounding(self) -> float:
        """Of a scale."""
        return self._roundings / max(self.scales, 1)

    @property
    def error(self) -> float:
        """Of the weights quantized again: root mean square, relative to theirs."""
        return math.sqrt(self._squared_differences / (self._squares or 1))

    def add_scales(self, old: np.ndarray, new: np.ndarray) -> None:
        """old: float32, not 0; new: float16, finite."""
        roundings = np.abs(new.astype(np.float64) / old - 1)
        self.scales += old.size
        self.largest_rounding = max(self.largest_rounding, roundings.max(initial=0))
        self._roundings += roundings.sum()

    def add_weights(self, old: np.ndarray, new: np.ndarray) -> None:
        """float32, finite."""
        difference = new.astype(np.float64) - old
        self.weights += old.size
        self.largest_difference = max(self.largest_difference, np.abs(difference).max(initial=0))
        self._squared_differences += np.square(difference).sum()
        self._squares += np.square(old, dtype=np.float64).sum()


def upgrade(
    source: Path,
    target: Path,
    *,
    lossy: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[Change]:
    """Write the version 100 model `source` as version 101 and say what became of each format.

    lossy:    matrices in a format that version 101 does not have are quantized again, in the one
              that loses least, measured on a sample of their rows; otherwise they are an error.
    progress: called with the bytes done and the bytes in all.

    `target` appears, or replaces an older file, only when it is complete. Raises RWKVFileError for
    a source that is of version 101 already, is no model, or cannot be held by version 101;
    ValueError for wrong arguments, OSError for the disk's failures.
    """
    refuse_same_file(source, target)
    header, records = read_model(source)
    if header.version == NEW:
        raise RWKVFileError(f"{source}: is of version {NEW} already, there is nothing to do")
    changes = _plan(source, records, lossy)
    total = sum(record.nbytes for record in records)
    done = 0

    def upgraded(record: Record) -> Iterator[memoryview]:
        nonlocal done
        for rows in read_rows(source, record):
            yield _upgrade_rows(source, record, rows, changes[record.data_type]).data
            done += rows.size
            if progress:
                progress(done, total)

    header_type = header.data_type  # information only, it need not be right
    if header_type not in changes:
        header_type = max(records, key=lambda record: record.nbytes).data_type
    new_header = replace(header, version=NEW, data_type=changes[header_type].target.data_type)
    with Writer(target, new_header) as writer:
        for record in records:
            change = changes[record.data_type]
            writer.write_pieces(record.key, change.target.data_type, record.shape, upgraded(record))
            change.tensors += 1
    return list(changes.values())


def _plan(source: Path, records: Sequence[Record], lossy: bool) -> dict[int, Change]:
    """What the tensors of each data type become."""
    changes = {}
    refused = []
    for data_type in dict.fromkeys(record.data_type for record in records):
        old, new = Format(OLD, data_type), Format(NEW, data_type)
        if new.row_size(32) == 0:
            those = [record for record in records if record.data_type == data_type]
            errors = _sampled_errors(source, those, old)
            new = min(errors, key=errors.__getitem__)
            refused.append(
                f"{len(those)} matrices are in {old}, which version {NEW} does not have; "
                f"of its formats {new} loses least (changes of {errors[new]:.2%})"
            )
        changes[data_type] = Change(old, new)
    if refused and not lossy:
        raise RWKVFileError(
            f"{source}: {'; '.join(refused)}; --lossy accepts that, "
            "but quantizing the original model again loses less"
        )
    return changes


def _weights(source: Path, record: Record, data: np.ndarray, n: int, old: Format) -> np.ndarray:
    """The n weights of these bytes, which have to be finite."""
    try:
        weights = old.weights(data, n)
    except RWKVFileError as error:
        raise RWKVFileError(f"{source}: {record.key}: {error}") from None
    check_finite(f"{source}: {record.key}", weights)
    return weights


def _sampled_errors(source: Path, records: Sequence[Record], old: Format) -> dict[Format, float]:
    """What each quantized format of the new version loses of some rows of these matrices."""
    changes = [Change(old, new) for new in formats_of(NEW) if new.data_type not in DTYPES]
    for record in records:
        rows, columns = record.shape
        data = np.memmap(source, np.uint8, "r", record.offset, (rows, record.nbytes // rows))
        sample = data[:: max(rows // _SAMPLED_ROWS, 1)].reshape(-1)
        n = sample.size // data.shape[1] * columns
        before = _weights(source, record, sample, n, old)
        for change in changes:
            after = change.target.weights(old.convert(sample, n, change.target), n)
            change.add_weights(before, after)
    return {change.target: change.error for change in changes}


def _upgrade_rows(source: Path, record: Record, rows: np.ndarray, change: Change) -> np.ndarray:
    """The bytes of whole rows in the new version."""
    old, new = change.source, change.target
    n = rows.size * math.prod(record.shape) // record.nbytes
    if old.data_type != new.data_type:
        before = _weights(source, record, rows, n, old)
        result = old.convert(rows, n, new)
        change.add_weights(before, new.weights(result, n))
        return result
    result = old.convert(rows, n, new)
    # The versions differ in the size of a block where scales and minima, which stand at its
    # beginning, are floats in the one and halves in the other.
    sizes = old.row_size(32), new.row_size(32)
    if halves := (sizes[0] - sizes[1]) // 2:
        floats = rows.reshape(-1, sizes[0])[:, : 4 * halves].copy().view("<f4")
        rounded = result.reshape(-1, sizes[1])[:, : 2 * halves].copy().view("<f2")
        infinite = floats.size - np.count_nonzero(np.isfinite(rounded))
        if infinite:
            raise RWKVFileError(
                f"{source}: {record.key}: {infinite} of {floats.size} scales are not finite as "
                "half-precision numbers, which version 101 has for them; quantize the original "
                "model again"
            )
        change.add_scales(floats[floats != 0], rounded[floats != 0])
    return result


@click.command()
@click.argument("source", metavar="OLD", type=click.Path(path_type=Path))
@click.argument("target", metavar="NEW", type=click.Path(path_type=Path))
@click.option(
    "--lossy",
    is_flag=True,
    help="Quantize matrices in Q4_1_O, Q4_2 and Q4_3 again, in the format that loses least.",
)
def command(source: Path, target: Path, lossy: bool) -> None:
    """Bring a model file of version 100 to version 101.

    Such files are of April and May 2023 and work as they are: upgrade one for its smaller size, or
    for other programs. Q5_0 and Q5_1 keep their bits, FP32 and FP16 their bytes. In Q4_0, Q4_1 and
    Q8_0 the scales are rounded to half precision; it is shown by how much. Q4_1_O, Q4_2 and Q4_3
    have no place in version 101, see --lossy. NEW appears, or replaces an older file, only when it
    is complete.

    \b
    rwkv upgrade model-april.bin model.bin
    """
    with counting_bar("B") as progress:
        changes = upgrade(source, target, lossy=lossy, progress=progress)
    for change in changes:
        click.echo(f"{change.tensors:>5} x {change.source!s:<7}{_described(change)}")
    click.echo(f"{target}: {target.stat().st_size:,} bytes, {source}: {source.stat().st_size:,}")


def _described(change: Change) -> str:
    if change.weights:
        return (
            f"quantized again, as {change.target}: weights change by {change.error:.2%} "
            f"(root mean square), one by at most {change.largest_difference:.3g}"
        )
    if change.scales:
        return (
            f"scales rounded, by {change.largest_rounding:.4%} at most "
            f"and {change.mean_rounding:.4%} on average"
        )
    return "unchanged" if change.source.data_type in DTYPES else "the same bits in another order"
