"""The model file of rwkv.cpp ("ggmf") in Python: its index, its plain tensors, a writer.

A file is a header of six little-endian int32 (magic, version, n_vocab, n_embed, n_layer, data type)
and then one record after another until it ends: number of dimensions, length of the key, data type,
the dimensions (contiguous one first), the key, the data. Shapes here are in the order of torch and
numpy, (rows, columns) or (n,). Which tensors a model has is not looked at here.
"""

import io
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .atomic import replacing
from .errors import RWKVFileError
from .library import load_rwkv_shared_library

Buffer = bytes | memoryview

MAGIC = 0x67676D66
VERSIONS = (100, 101)
FP32, FP16 = 0, 1
DATA_TYPES = {"FP32": FP32, "FP16": FP16}
DTYPES: dict[int, np.dtype[Any]] = {FP32: np.dtype("<f4"), FP16: np.dtype("<f2")}

_HEADER = struct.Struct("<6i")
_RECORD = struct.Struct("<3i")
_KEY = re.compile(rb"[A-Za-z0-9_.]{1,255}")
_MAX_DIMENSION = 1 << 20
LIMITS = {"n_vocab": 1 << 20, "n_embed": 1 << 16, "n_layer": 1 << 10}

# What a file that is not the expected one may be: (offset, bytes that stand there, its name).
_SIGNATURES = (
    (0, struct.pack("<i", MAGIC), "a ggmf model file"),
    (0, struct.pack(">i", MAGIC), "a byte-swapped (big-endian) ggmf model file"),
    (0, b"GGUF", "a GGUF file of llama.cpp"),
    (0, b"lmgg", "a 'ggml' model file of llama.cpp or whisper.cpp"),
    (0, b"tjgg", "a 'ggjt' model file of llama.cpp"),
    (0, b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint (.pth)"),
    (0, b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46", "a PyTorch checkpoint (.pth) in its old format"),
    (0, b"version https://git-lfs", "a git-lfs pointer: the file itself was never downloaded"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a numpy array file"),
    (257, b"ustar", "a tar archive"),
    (4, b"\0\0\0\0{", "a safetensors file"),
    (0, b"{", "a JSON text; a model that is split over several files must be joined first"),
)


def recognise(head: bytes) -> str:
    """Name what a file is by its first 512 bytes."""
    if re.match(rb"\s*(<!doctype|<html|<\?xml)", head, re.IGNORECASE):
        return "an HTML page: the download went wrong"
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name
    return f"of an unknown format (begins with {head[:8]!r})" if head else "empty"


@dataclass(frozen=True)
class Header:
    """`data_type` is the type of most matrices; what counts is the type of each record."""

    version: int
    n_vocab: int
    n_embed: int
    n_layer: int
    data_type: int


@dataclass(frozen=True)
class Record:
    """One tensor of a file: `nbytes` bytes from `offset` on; `shape` is (rows, columns) or (n,)."""

    key: str
    data_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def is_model_file(path: Path) -> bool:
    """Whether a file begins as a model file does."""
    with open_regular(path) as file:
        return file.read(4) == _SIGNATURES[0][1]


def read_index(path: Path) -> tuple[Header, list[Record]]:
    """Read the header and where each tensor lies, in file order, without reading the data.

    Every length is checked against the bytes that remain, and the records must cover the file
    exactly. Raises RWKVFileError naming the file, the offset, the tensor and the numbers.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(path, file)
        records: list[Record] = []
        keys: set[str] = set()
        while file.tell() < size:
            if len(records) == 64 * header.n_layer + 64:
                raise RWKVFileError(
                    f"{path}: more than {len(records)} tensors, too many for n_layer "
                    f"{header.n_layer}"
                )
            record = _read_record(path, file, size, header.version)
            if record.key in keys:
                raise RWKVFileError(f"{path}: tensor '{record.key}' occurs twice")
            keys.add(record.key)
            records.append(record)
            file.seek(record.offset + record.nbytes)
    if not records:
        raise RWKVFileError(f"{path}: the file ends after its header (truncated download?)")
    return header, records


def read_model(path: Path) -> tuple[Header, list[Record]]:
    """`read_index` of a file that the library would load: RWKVFileError if it would not."""
    load_rwkv_shared_library().rwkv_estimate(path)
    return read_index(path)


def read_plain_model(path: Path, advice: str) -> tuple[Header, list[Record]]:
    """The same for a model in FP32 or FP16; RWKVFileError, which ends with `advice`, for others."""
    header, records = read_model(path)
    for record in records:
        if record.data_type not in DTYPES:
            name = load_rwkv_shared_library().rwkv_get_format_name(record.data_type)
            raise RWKVFileError(f"{path}: {record.key} is {name}, expected FP32 or FP16; {advice}")
    return header, records


def read_tensor(path: Path, record: Record) -> np.ndarray:
    """The FP32 or FP16 tensor of a record, as a read-only view of the mapped file."""
    if record.data_type not in DTYPES:
        raise ValueError(
            f"{record.key}: data type {record.data_type} cannot be read, only FP32 and FP16 can"
        )
    dtype = DTYPES[record.data_type]
    return np.memmap(path, dtype, mode="r", offset=record.offset, shape=record.shape)


def read_rows(path: Path, record: Record, nbytes: int = 4 << 20) -> Iterator[np.ndarray]:
    """The data of a record, whatever its type, as arrays of bytes (uint8) with whole rows: as many
    as fit into `nbytes`, at least one."""
    rows = record.shape[0] if len(record.shape) == 2 else 1
    size = record.nbytes // rows
    step = max(nbytes // size, 1)
    with open_regular(path) as file:
        file.seek(record.offset)
        for first in range(0, rows, step):
            data = np.empty(min(step, rows - first) * size, np.uint8)
            if file.readinto(data.data) != data.size:
                raise RWKVFileError(
                    f"{path}: {record.key}: the file became shorter while it was read"
                )
            yield data


class Writer:
    """Writes a file of tensors; a context manager.

    The file appears under its name when the block ends, or not at all if it raises.
    """

    def __init__(self, path: Path, header: Header) -> None:
        _check_header(f"{path}", header)
        self._header = header
        self._replacing = replacing(path)
        self._keys: set[str] = set()

    def __enter__(self) -> "Writer":
        header = self._header
        self._file = self._replacing.__enter__()
        self._file.write(
            _HEADER.pack(
                MAGIC,
                header.version,
                header.n_vocab,
                header.n_embed,
                header.n_layer,
                header.data_type,
            )
        )
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._replacing.__exit__(*exception)

    def write(self, key: str, data_type: int, array: np.ndarray) -> None:
        """Append a tensor of one or two dimensions: float32 as FP32, float16 as FP16."""
        if DTYPES.get(data_type) != array.dtype:
            raise ValueError(f"{key}: {array.dtype} cannot be written as data type {data_type}")
        self.write_pieces(key, data_type, array.shape, [np.ascontiguousarray(array).data])

    def write_pieces(
        self, key: str, data_type: int, shape: tuple[int, ...], pieces: Iterable[Buffer]
    ) -> None:
        """Append a tensor of this type and shape, whose bytes the pieces are."""
        name = key.encode()
        if not _KEY.fullmatch(name) or key in self._keys:
            raise ValueError(f"invalid or repeated key {key!r}")
        if len(shape) not in (1, 2) or not all(0 < n <= _MAX_DIMENSION for n in shape):
            raise ValueError(
                f"{key}: expected one or two dimensions of at most {_MAX_DIMENSION}, "
                f"got shape {shape}"
            )
        self._keys.add(key)
        self._file.write(_RECORD.pack(len(shape), len(name), data_type))
        self._file.write(struct.pack(f"<{len(shape)}i", *shape[::-1]) + name)
        for piece in pieces:
            self._file.write(piece)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; a folder, a pipe or a device raises RWKVFileError at once."""
    # Without O_NONBLOCK the mere opening of a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        if Path(path).is_dir():  # how Windows answers for a folder
            raise RWKVFileError(f"{path}: is not a regular file") from None
        raise
    except ValueError as error:  # a NUL in the path
        raise RWKVFileError(f"{os.fspath(path)!r}: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RWKVFileError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def _read_header(path: Path, file: BinaryIO) -> Header:
    head = file.read(512)
    if len(head) >= 4 and head[:4] != _SIGNATURES[0][1]:
        what = recognise(head)
        is_checkpoint = "PyTorch" in what or "safetensors" in what
        advice = "; convert it first with 'rwkv convert'" if is_checkpoint else ""
        raise RWKVFileError(f"{path}: expected a ggmf model file, this is {what}{advice}")
    if len(head) < _HEADER.size:
        raise RWKVFileError(f"{path}: truncated header, got {len(head)} of {_HEADER.size} bytes")
    header = Header(*_HEADER.unpack_from(head)[1:])
    try:
        _check_header(f"{path}", header)
    except ValueError as error:
        raise RWKVFileError(str(error)) from None
    file.seek(_HEADER.size)
    return header


def _check_header(where: str, header: Header) -> None:
    """Raise ValueError for a version or a size that no model has."""
    if header.version not in VERSIONS:
        raise ValueError(f"{where}: version {header.version} of the file, expected 100 or 101")
    for name, limit in LIMITS.items():
        value = getattr(header, name)
        if not 1 <= value <= limit:
            raise ValueError(f"{where}: {name} is {value}, expected 1 to {limit}")
    _row_size(where, header.version, header.data_type, 32)


def _read_record(path: Path, file: BinaryIO, size: int, version: int) -> Record:
    start = file.tell()
    where = f"{path}: offset {start}"

    def read(length: int, what: str) -> bytes:
        if length > size - file.tell():
            raise RWKVFileError(
                f"{where}: the {what} of a tensor needs {length} bytes, the file has "
                f"{size - file.tell()} left (truncated download, or bytes after the last tensor?)"
            )
        data = file.read(length)
        if len(data) != length:
            raise RWKVFileError(f"{where}: the file became shorter while it was read")
        return data

    dim_count, key_length, data_type = _RECORD.unpack(read(_RECORD.size, "header"))
    if dim_count not in (1, 2):
        raise RWKVFileError(f"{where}: a tensor of {dim_count} dimensions, expected 1 or 2")
    if not 1 <= key_length <= 255:
        raise RWKVFileError(f"{where}: a key of {key_length} bytes, expected 1 to 255")
    shape = struct.unpack(f"<{dim_count}i", read(4 * dim_count, "shape"))[::-1]
    name = read(key_length, "key")
    if not _KEY.fullmatch(name):
        raise RWKVFileError(
            f"{where}: a key may hold letters, digits, '_' and '.' only, got {name!r}"
        )
    key = name.decode()
    where = f"{where}: tensor '{key}'"
    if not all(1 <= n <= _MAX_DIMENSION for n in shape):
        raise RWKVFileError(f"{where}: shape {shape}, expected 1 to {_MAX_DIMENSION} each")
    try:
        nbytes = _row_size(where, version, data_type, shape[-1])
    except ValueError as error:
        raise RWKVFileError(str(error)) from None
    nbytes *= shape[0] if dim_count == 2 else 1
    offset = file.tell()
    if nbytes > size - offset:
        raise RWKVFileError(
            f"{where}: needs {nbytes} bytes, the file has {size - offset} left "
            "(truncated download?)"
        )
    return Record(key, data_type, shape, offset, nbytes)


def _row_size(where: str, version: int, data_type: int, n_elements: int) -> int:
    """Bytes of a row; raises ValueError for a type that the version does not have."""
    if data_type in DTYPES:
        return n_elements * DTYPES[data_type].itemsize
    if not 0 <= data_type < 10:
        hint = ", a K-quant of 2025" if 10 <= data_type <= 16 else ""
        raise ValueError(f"{where}: data type {data_type}{hint}, expected 0 to 9")
    size = load_rwkv_shared_library().rwkv_get_row_size(version, data_type, n_elements)
    if size == 0:
        raise ValueError(
            f"{where}: files of version {version} have no rows of {n_elements} weights in data "
            f"type {data_type}"
        )
    return size
