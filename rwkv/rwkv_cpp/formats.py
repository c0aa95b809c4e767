"""The formats of weights in model files, and rows from one to another.

How a block of weights lies in a file is known to the C library alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .library import load_rwkv_shared_library

_DATA_TYPES = range(16)


class Format(NamedTuple):
    """A data type of the files of one version: the same number may be other bytes in another."""

    version: int
    data_type: int

    def __str__(self) -> str:
        return load_rwkv_shared_library().rwkv_get_format_name(self.data_type) or "unknown"

    def row_size(self, n: int) -> int:
        """Bytes of a row of n weights; 0 if files of this version have no such row."""
        library = load_rwkv_shared_library()
        return library.rwkv_get_row_size(self.version, self.data_type, n)

    def convert(self, data: np.ndarray, n: int, target: Format) -> np.ndarray:
        """The bytes in `target` of the n weights whose bytes in this format are `data` (uint8).

        Between the versions of one format codes stay and scales are rounded; between formats the
        weights are dequantized and quantized. Several rows in one piece are fine. Raises
        RWKVFileError for bytes that mean nothing.
        """
        if data.dtype != np.uint8 or data.size != self.row_size(n) or data.ndim != 1:
            raise ValueError(
                f"{n} weights in {self} take {self.row_size(n)} bytes, "
                f"got {data.dtype} of shape {data.shape}"
            )
        result = np.empty(target.row_size(n), np.uint8)
        data = np.ascontiguousarray(data)
        load_rwkv_shared_library().rwkv_convert_row(
            *self, data.ctypes.data, *target, result.ctypes.data, n
        )
        return result

    def weights(self, data: np.ndarray, n: int) -> np.ndarray:
        """The n float32 weights that these bytes of this format stand for."""
        return self.convert(data, n, Format(self.version, 0)).view(np.float32)


def file_formats() -> list[str]:
    """The names of all formats that files may have, plain ones first."""
    return list(dict.fromkeys(str(each) for version in (100, 101) for each in formats_of(version)))


def formats_of(version: int) -> Iterator[Format]:
    """All formats that files of a version may have, plain ones first."""
    for data_type in _DATA_TYPES:
        if (each := Format(version, data_type)).row_size(32):
            yield each
