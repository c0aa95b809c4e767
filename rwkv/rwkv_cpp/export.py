"""Turns a model file back into a checkpoint: `rwkv convert MODEL.bin DEST.pth`.

Names are the same in both; vectors get the shapes of released checkpoints and time_decay is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .atomic import refuse_same_file
from .checkpoint import SUFFIXES, write_checkpoint
from .errors import RWKVFileError
from .formats import Format
from .ggmf import DATA_TYPES, DTYPES, FP16, FP32, Header, read_model, read_rows
from .weights import check_finite, half, restore, shape_in_checkpoint


def export(
    source: Path,
    target: Path,
    data_type: str = "FP16",
    *,
    clamp: bool = False,
    allow_nan: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Header:
    """Write the weights of a model file as a checkpoint; `target` appears only when complete.

    target:    its suffix says what it becomes: a `.pth` for torch.load, or `.safetensors`.
    data_type: of matrices, "FP16" or "FP32", which quantized ones are dequantized to. Vectors are
               FP32 in either case.
    clamp, allow_nan, progress: as in `convert`.

    From an FP32 or FP16 file of version 101 that `convert` made, it makes the same file again, in
    the same data type. Returns the header of `source`. Raises RWKVFileError if that is no model or
    holds such values, ValueError for wrong arguments, OSError for the disk's failures.
    """
    if data_type not in DATA_TYPES:
        raise ValueError(f"unknown data type {data_type!r} (choose FP16 or FP32)")
    if target.suffix not in SUFFIXES:
        raise ValueError(
            f"{target}: expected a name that ends in {' or '.join(SUFFIXES)}, "
            f"because '{source}' is a model file already"
        )
    refuse_same_file(source, target)
    header, index = read_model(source)
    records = {record.key: record for record in index}
    types = {
        key: FP32 if len(record.shape) == 1 else DATA_TYPES[data_type]
        for key, record in records.items()
    }
    total = sum(math.prod(record.shape) for record in index)
    done = 0

    def read(key: str) -> np.ndarray:
        nonlocal done
        where = f"{source}: {key}"
        record = records[key]
        (data,) = read_rows(source, record, record.nbytes)
        n = math.prod(record.shape)
        try:
            array = Format(header.version, record.data_type).weights(data, n)
        except RWKVFileError as error:
            raise RWKVFileError(f"{where}: {error}") from None
        if not allow_nan:
            check_finite(where, array, " (--allow-nan keeps them)")
        array = restore(where, key, array.reshape(record.shape))
        if types[key] == FP16:
            array = half(where, array, clamp)
        done += n
        if progress:
            progress(done, total)
        return array

    layout = {
        key: (DTYPES[types[key]], shape_in_checkpoint(key, record.shape))
        for key, record in records.items()
    }
    write_checkpoint(target, layout, read)
    return header
