"""Which model a file holds: two ids, so that states and caches know where they belong.

    family   the same for every format of one model: FP16, Q5_1, …
    exact    of these very weights

Both are BLAKE2b in 32 hexadecimal digits; docs/format.md defines what is hashed. Little of a file
is read for them: its vectors, and samples of its matrices.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import RWKVFileError
from .ggmf import FP32, Record, open_regular, read_index

SAMPLES = 64
SAMPLE_BYTES = 4096
_DIGEST_BYTES = 16


class Fingerprint:
    """The ids of one model file, computed when they are first asked for.

    adapter_id: of LoRAs beside its weights, which make another family of it; None: there are none.
    Equal for files of the same exact id. Raises RWKVFileError when an id is asked for and the file
    is no model file, or was replaced since this object was made: the model in memory may then be
    another one.
    """

    def __init__(self, path: Path, adapter_id: str | None = None) -> None:
        self._path = path.absolute()
        self._adapter_id = adapter_id
        self._status = _status(self._path)
        self._family_of_file: str | None = None
        self._family: str | None = None
        self._exact: str | None = None

    @classmethod
    def known(cls, family: str, exact: str) -> Fingerprint:
        """Of a model whose file is not at hand."""
        self = cls.__new__(cls)
        self._path, self._status, self._adapter_id = Path(), (), None
        self._family, self._exact = family, exact
        return self

    @property
    def family(self) -> str:
        if self._family is None:
            self._family_of_file = family_id(self._path)
            self._family = self._adapted(self._family_of_file)
        return self._family

    @property
    def exact(self) -> str:
        if self._exact is None:
            known = self._family_of_file or family_id(self._path)
            self._exact = self._adapted(_exact_id(self._path, known))
        return self._exact

    def _adapted(self, value: str) -> str:
        """An id of the file as one of the model with the adapter."""
        if _status(self._path) != self._status:
            raise RWKVFileError(f"{self._path}: the file was replaced since the model was loaded")
        return value if self._adapter_id is None else _joined(value, self._adapter_id)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        same_file = self._status and (self._path, self._status) == (other._path, other._status)
        if same_file and self._adapter_id == other._adapter_id:
            return True
        return self.exact == other.exact

    def __hash__(self) -> int:
        return hash(self.exact)

    def __reduce__(self) -> tuple[object, ...]:
        return Fingerprint.known, (self.family, self.exact)

    def __repr__(self) -> str:
        return f"Fingerprint(family={self.family!r}, exact={self.exact!r})"


def family_id(path: Path) -> str:
    """What the formats of one model have in common: its sizes and its vectors.

    Raises RWKVFileError if it is no model file.
    """
    header, records = read_index(path)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(struct.pack("<3i", header.n_vocab, header.n_embed, header.n_layer))
    with open_regular(path) as file:
        for record in _sorted(records):
            if len(record.shape) == 1 and record.data_type == FP32:
                digest.update(_name(record) + struct.pack("<I", record.shape[0]))
                digest.update(_bytes(path, file, record.offset, record.nbytes))
    return digest.hexdigest()


def exact_id(path: Path) -> str:
    """What tells files of different weights apart: family, types and samples of each tensor.

    Raises RWKVFileError if it is no model file.
    """
    return _exact_id(path, family_id(path))


def _exact_id(path: Path, family: str) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(bytes.fromhex(family))
    _, records = read_index(path)
    with open_regular(path) as file:
        for record in _sorted(records):
            digest.update(_name(record) + struct.pack("<iQ", record.data_type, record.nbytes))
            for start, length in _samples(record.nbytes):
                digest.update(_bytes(path, file, record.offset + start, length))
    return digest.hexdigest()


def _joined(*ids: str) -> str:
    return hashlib.blake2b("+".join(ids).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _sorted(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.key)


def _name(record: Record) -> bytes:
    return struct.pack("<I", len(record.key)) + record.key.encode()


def _samples(nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of evenly spaced samples, the first and the last bytes among them; all of
    it if it is no longer than the samples."""
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        yield 0, nbytes
        return
    for i in range(SAMPLES):
        yield i * (nbytes - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES


def _bytes(path: Path, file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) != length:
        raise RWKVFileError(f"{path}: the file became shorter while it was read")
    return data


def _status(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
