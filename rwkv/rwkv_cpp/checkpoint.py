"""Checkpoints: PyTorch's `.pth` (zip and legacy) and `.safetensors`, without torch.

`open_checkpoint` tells the formats apart by content. It reads where the tensors lie and checks that
against the file; the data of a tensor is read when asked for, so memory stays at the largest one.
Nothing in a file can run: pickles go through `pickles`, which only knows plain data.

A PyTorch file holds storages (flat arrays) and tensors, which are views of storages with a start,
a shape and strides; several may share a storage. All three formats are brought to that form.
"""

import io
import itertools
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from . import pickles
from .archive import Extent, checksum, read_directory, unpack, write_entry
from .atomic import replacing
from .errors import RWKVFileError
from .ggmf import open_regular, recognise
from .pickles import shorten


class _Type(NamedTuple):
    name: str
    size: int  # bytes
    torch_storage: str
    safetensors: str
    numpy: np.dtype
    is_weight: bool = False


_TYPES = (
    _Type("float32", 4, "FloatStorage", "F32", np.dtype("<f4"), True),
    _Type("float16", 2, "HalfStorage", "F16", np.dtype("<f2"), True),
    # bfloat16, the upper half of a float32, is unknown to numpy
    _Type("bfloat16", 2, "BFloat16Storage", "BF16", np.dtype("<u2"), True),
    _Type("float64", 8, "DoubleStorage", "F64", np.dtype("<f8"), True),
    _Type("int8", 1, "CharStorage", "I8", np.dtype("i1")),
    _Type("uint8", 1, "ByteStorage", "U8", np.dtype("u1")),
    _Type("int16", 2, "ShortStorage", "I16", np.dtype("<i2")),
    _Type("int32", 4, "IntStorage", "I32", np.dtype("<i4")),
    _Type("int64", 8, "LongStorage", "I64", np.dtype("<i8")),
    _Type("bool", 1, "BoolStorage", "BOOL", np.dtype("?")),
    _Type("complex64", 8, "ComplexFloatStorage", "C64", np.dtype("<c8")),
)


@dataclass(frozen=True)
class _Tensor:
    type: _Type
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    start: int  # in elements of its storage
    storage: str


class _Foreign(ValueError):
    """What a file is, where it is a sound file of the wrong kind."""


class Checkpoint:
    """The tensors of an open checkpoint by their names; a context manager."""

    def __init__(
        self,
        path: Path,
        file: io.BufferedReader,
        tensors: dict[str, _Tensor],
        storages: dict[str, Extent],
    ) -> None:
        self.path = path
        self._file = file
        self._tensors = tensors
        self._storages = storages
        self._verified: set[str] = set()
        self._status = _status(file)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> list[str]:
        """The names in the order of the file."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> str:
        """The type in the file by its name in torch, such as 'bfloat16'."""
        return self._tensors[key].type.name

    def read(self, key: str) -> np.ndarray:
        """A tensor as a new C-contiguous float32 array, rounded once where the file has float64.

        Raises RWKVFileError if it is of a type that weights do not have, if it is damaged, or if
        the file was written to since it was opened.
        """
        tensor = self._tensors[key]
        kind = tensor.type.numpy
        if not tensor.type.is_weight:
            raise RWKVFileError(
                f"{self.path}: {key}: is {tensor.type.name}, "
                "expected float32, float16, bfloat16 or float64"
            )
        if 0 in tensor.shape:
            return np.empty(tensor.shape, np.float32)
        span = np.empty(1 + _last_element(tensor.shape, tensor.strides), kind)
        try:
            self._verify(tensor.storage)
            self._file.seek(self._storages[tensor.storage].offset + tensor.start * kind.itemsize)
            count = self._file.readinto(span.view(np.uint8).data)
        except (OSError, ValueError) as error:
            raise RWKVFileError(f"{self.path}: {key}: {error}") from None
        if count != span.nbytes or _status(self._file) != self._status:
            raise RWKVFileError(f"{self.path}: {key}: the file changed while it was read")
        view = np.lib.stride_tricks.as_strided(
            span, tensor.shape, [stride * kind.itemsize for stride in tensor.strides]
        )
        if tensor.type.name == "bfloat16":
            wide = np.empty(tensor.shape, np.uint32)
            np.left_shift(view, 16, out=wide, dtype=np.uint32)
            return wide.view(np.float32)
        with np.errstate(over="ignore"):  # a float64 above the range becomes an infinity
            return np.ascontiguousarray(view, np.float32).reshape(tensor.shape)

    def _verify(self, name: str) -> None:
        """Compare a storage with its checksum, the first time that it is used."""
        storage = self._storages[name]
        if storage.crc is None or name in self._verified:
            return
        if checksum(self._file, storage) != storage.crc:
            raise ValueError(_damaged(name))
        self._verified.add(name)


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as a checkpoint does."""
    with open_regular(path) as file:
        return _reader(file.read(512)) is not None


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Open a checkpoint and check its structure.

    key: which dictionary of the file holds the weights, if that is not the outermost one; the
    prefix of the weights' names, without its last dot, works too. 'a/b' takes one step after the
    other. Raises RWKVFileError for a file that is not a sound checkpoint, saying what it is.
    """
    file = open_regular(path)
    try:
        head = file.read(512)
        size = os.fstat(file.fileno()).st_size
        read = _reader(head)
        if read is None:
            raise _Foreign(recognise(head))
        root, storages = read(file, size)
        return Checkpoint(path, file, _flat(_select(root, key)), storages)
    except _Foreign as error:
        file.close()
        raise RWKVFileError(
            f"{path}: expected a PyTorch checkpoint (.pth) or a safetensors file, this is {error}"
        ) from None
    except ValueError as error:
        file.close()
        raise RWKVFileError(f"{path}: {error}") from None
    except BaseException:
        file.close()
        raise


_Reader = Callable[[BinaryIO, int], tuple[Any, dict[str, Extent]]]


def _reader(head: bytes) -> _Reader | None:
    """Who reads a checkpoint that begins so."""
    if head[:4] == b"PK\x03\x04":
        return _read_zip_checkpoint
    if head[4:9] == b"\0\0\0\0{":  # the length before may begin with a pickle's byte
        return lambda file, size: _read_safetensors(file, size)[1:]
    return _read_legacy_checkpoint if head[:1] == b"\x80" else None


SUFFIXES = (".pth", ".safetensors")
Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


def write_checkpoint(path: Path, layout: Layout, read: Callable[[str], np.ndarray]) -> None:
    """Write a safetensors file if that is the suffix, otherwise a PyTorch checkpoint, which
    torch.load reads with weights_only=True; `path` appears only when complete.

    layout: the type (float32 or float16) and the shape of each tensor, in their order.
    read:   gives the array of a tensor, called once for each.
    """

    def data(key: str) -> memoryview:
        array = read(key)
        if (array.dtype, array.shape) != layout[key]:
            raise ValueError(f"{key}: {array.dtype} {array.shape}, declared as {layout[key]}")
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    with replacing(path) as file:
        if path.suffix == ".safetensors":
            head, order = _safetensors_head(layout, {"format": "pt"})
            file.write(head)
            for key in order:
                file.write(data(key))
            return
        with zipfile.ZipFile(file, "w") as archive:
            write_entry(archive, "archive/data.pkl", _torch_pickle(layout))
            write_entry(archive, "archive/byteorder", b"little")
            for i, key in enumerate(layout):
                write_entry(archive, f"archive/data/{i}", data(key))
            write_entry(archive, "archive/version", b"3\n")


def pack_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with these arrays, for files that fit into memory."""
    layout = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    head, order = _safetensors_head(layout, metadata)
    return head + b"".join(arrays[key].tobytes() for key in order)


def unpack_safetensors(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays, read-only, of a safetensors file that is in memory.

    bfloat16 comes as uint16. Raises ValueError if the structure is not sound.
    """
    metadata, tensors, storages = _read_safetensors(io.BytesIO(data), len(data))
    arrays = {
        key: np.frombuffer(
            data, tensor.type.numpy, math.prod(tensor.shape), storages[key].offset
        ).reshape(tensor.shape)
        for key, tensor in tensors.items()
    }
    return metadata, arrays


# ---- which tensors of the file ------------------------------------------------------------------


def _select(root: Any, key: str | None) -> Any:
    for step in key.split("/") if key else ():
        if not isinstance(root, dict):
            raise ValueError(f"--key {shorten(step)}: there is no dictionary to look in")
        if step in root:
            root = root[step]
            continue
        prefix = f"{step}."
        below = {
            name[len(prefix) :]: value
            for name, value in root.items()
            if isinstance(name, str) and name.startswith(prefix)
        }
        if not below:
            raise ValueError(f"--key {shorten(step)}: not found among {_listing(root)}")
        root = below
    return root


def _flat(root: Any) -> dict[str, _Tensor]:
    """The dictionary, if it has nothing but names and tensors."""
    if not isinstance(root, dict):
        raise ValueError(
            f"the checkpoint is a {_describe(root)}, expected a dictionary of tensors; "
            "save the state_dict of the model"
        )
    if not root:
        raise ValueError("the checkpoint holds no tensors")
    for name, value in root.items():
        if not isinstance(value, _Tensor):
            raise ValueError(
                f"not a plain dictionary of tensors, it holds {_listing(root)}; "
                "choose the one with the weights by --key NAME"
            )
        if not (isinstance(name, str) and 0 < len(name) < 256 and _is_plain(name)):
            raise ValueError(f"{shorten(name)} is not a name of a tensor")
    return root


def _is_plain(name: str) -> bool:
    return name.isascii() and name.isprintable()


def _listing(root: dict[Any, Any]) -> str:
    shown = [
        f"{shorten(name)} ({_describe(value)})"
        for name, value in itertools.islice(root.items(), 12)
    ]
    more = len(root) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _describe(value: Any) -> str:
    if isinstance(value, _Tensor):
        return f"{value.type.name} tensor {shorten(value.shape)}"
    if isinstance(value, dict):
        return f"dictionary of {len(value)}"
    return type(value).__name__


# ---- PyTorch: what the pickles hold -------------------------------------------------------------


class _StorageReference(NamedTuple):
    type: _Type
    key: str
    numel: int


def _load_storage(identity: Any) -> _StorageReference:
    """('storage', type, key, device, numel), in the legacy format also a view, always None."""
    if not (isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"):
        raise ValueError(f"expected a reference to a storage, got {shorten(identity)}")
    _, kind, key, _, numel, *view = identity
    if not (isinstance(kind, _Type) and isinstance(key, str) and view in ([], [None])):
        raise ValueError(f"expected a reference to a storage, got {shorten(identity)}")
    return _StorageReference(kind, key, _natural(numel, "numel of a storage"))


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any) -> _Tensor:
    if not isinstance(storage, _StorageReference):
        raise ValueError(f"a tensor without a storage: {shorten(storage)}")
    start = _natural(start, "offset of a tensor")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError(f"shape {shorten(shape)} and strides {shorten(strides)} of a tensor")
    if len(shape) != len(strides) or len(shape) > 8:
        raise ValueError(f"shape {shorten(shape)} with strides {shorten(strides)} of a tensor")
    for number in shape + strides:
        _natural(number, "shape or stride of a tensor")
    numel = math.prod(shape)
    end = start + 1 + _last_element(shape, strides) if numel else start
    # A tensor larger than its storage repeats elements (a stride of 0): it could be of any size.
    if max(end, numel) > storage.numel:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} and offset {start} passes the end of "
            f"its storage of {storage.numel} elements"
        )
    return _Tensor(storage.type, shape, strides, start, storage.key)


def _rebuild_tensor_v2(
    storage: Any,
    start: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    backward_hooks: Any,
    metadata: Any = None,
) -> _Tensor:
    if metadata:  # conjugate and negative bits
        raise ValueError(f"a tensor with the property {shorten(metadata)}")
    return _rebuild_tensor(storage, start, shape, strides)


def _rebuild_parameter(data: Any, requires_grad: Any, backward_hooks: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise ValueError(f"a parameter without a tensor: {shorten(data)}")
    return data


def _ordered_dict(items: Any = ()) -> dict[str, Any]:
    if not isinstance(items, list | tuple):
        raise ValueError(f"OrderedDict of {shorten(items)}")
    result = {}
    for item in items:
        if not (isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(f"OrderedDict with the item {shorten(item)}")
        result[item[0]] = item[1]
    return result


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", each.torch_storage): each for each in _TYPES},
}


def _natural(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{what} is {shorten(value)}, expected a number from 0 on")
    return value


def _last_element(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


# ---- PyTorch: the zip format --------------------------------------------------------------------


def _read_zip_checkpoint(file: BinaryIO, size: int) -> tuple[Any, dict[str, Extent]]:
    entries = read_directory(file, size)
    pickled = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickled) != 1:
        raise _Foreign("a zip archive without the data.pkl of a PyTorch checkpoint")
    folder = pickled[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries or any(n.startswith(f"{folder}code/") for n in entries):
        raise _Foreign("a TorchScript archive: load it with torch.jit.load and save its state_dict")

    def record(name: str) -> bytes:
        entry = entries[folder + name]
        if entry.nbytes > pickles.MAX_BYTES:
            raise ValueError(f"{name} has {entry.nbytes} bytes, at most {pickles.MAX_BYTES}")
        if checksum(file, entry) != entry.crc:
            raise ValueError(_damaged(name))
        file.seek(entry.offset)
        return file.read(entry.nbytes)

    order = record("byteorder") if f"{folder}byteorder" in entries else b"little"
    if order != b"little":
        raise ValueError(f"byte order {shorten(order)}, expected b'little'; save it again")
    version = record("version") if f"{folder}version" in entries else b"none"
    if version.strip() not in [b"%d" % n for n in range(1, 11)]:
        raise ValueError(f"version {shorten(version)} of a PyTorch archive, expected 1 to 10")

    storages: dict[str, Extent] = {}

    def load_storage(identity: Any) -> _StorageReference:
        reference = _load_storage(identity)
        entry = entries.get(f"{folder}data/{reference.key}")
        if entry is None:
            raise ValueError(f"storage {shorten(reference.key)} is not in the archive")
        nbytes = reference.numel * reference.type.size
        if entry.nbytes != nbytes:
            raise ValueError(
                f"storage {reference.key} has {entry.nbytes} bytes, data.pkl says {nbytes}"
            )
        storages[reference.key] = entry
        return reference

    return pickles.load(io.BytesIO(record("data.pkl")), _GLOBALS, load_storage), storages


def _torch_pickle(layout: Layout) -> bytes:
    """A dictionary of tensors, each with a contiguous storage of its own: '0', '1', …"""
    torch_storages = {each.numpy: each.torch_storage for each in _TYPES}
    no_hooks = pickles.Call(pickles.Global("collections", "OrderedDict"), ())
    rebuild = pickles.Global("torch._utils", "_rebuild_tensor_v2")
    tensors = {}
    for i, (key, (dtype, shape)) in enumerate(layout.items()):
        kind = pickles.Global("torch", torch_storages[dtype])
        storage = pickles.Reference(("storage", kind, str(i), "cpu", math.prod(shape)))
        strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        tensors[key] = pickles.Call(rebuild, (storage, 0, shape, strides, False, no_hooks))
    return pickles.dump(tensors)


def _damaged(name: str) -> str:
    return (
        f"wrong checksum of record {name}: the file is damaged, or was saved without checksums "
        "(torch.serialization.set_crc32_options)"
    )


def _status(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


# ---- PyTorch: the legacy format -----------------------------------------------------------------

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy_checkpoint(file: BinaryIO, size: int) -> tuple[Any, dict[str, Extent]]:
    """Five pickles (magic number, version, system, the object, names of storages), then for each
    storage its number of elements in eight bytes and its data."""
    file.seek(0)
    stream = io.BytesIO(file.read(pickles.MAX_BYTES))
    references: dict[str, _StorageReference] = {}

    def load_storage(identity: Any) -> _StorageReference:
        reference = _load_storage(identity)
        if references.setdefault(reference.key, reference) != reference:
            raise ValueError(f"storage {shorten(reference.key)} is described in two ways")
        return reference

    def load() -> Any:
        return pickles.load(stream, _GLOBALS, load_storage)

    magic = load()
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise _Foreign("a pickle that torch.save did not write: save the state_dict with it")
    version, system, root, names = load(), load(), load(), load()
    if type(version) is not int or version != 1001:
        raise ValueError(f"version {shorten(version)} of the legacy format, expected 1001")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("was saved on a big-endian machine, save it again on another one")
    if not isinstance(names, list):
        raise ValueError(f"expected the list of storages, got {shorten(names)}")

    storages: dict[str, Extent] = {}
    offset = stream.tell()
    for name in names:
        if not isinstance(name, str) or name not in references or name in storages:
            raise ValueError(f"storage {shorten(name)} is unknown or occurs twice")
        reference = references[name]
        nbytes = reference.numel * reference.type.size
        (numel,) = unpack(struct.Struct("<q"), file, offset)
        offset += 8
        if numel != reference.numel or nbytes > size - offset:
            raise ValueError(
                f"storage {name} at offset {offset}: expected {reference.numel} elements in "
                f"{nbytes} bytes, got {numel} elements with {size - offset} bytes left"
            )
        storages[name] = Extent(offset, nbytes)
        offset += nbytes
    if len(storages) != len(references):
        raise ValueError(f"{len(references) - len(storages)} storages are not in the file")
    if offset != size:
        raise ValueError(f"{size - offset} bytes after the last storage")
    return root, storages


# ---- safetensors --------------------------------------------------------------------------------

_MAX_JSON = 1 << 22


def _safetensors_head(layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """All that stands before the data, and the keys in the order of the data."""
    codes = {each.numpy: each.safetensors for each in _TYPES}
    # The data goes by falling size of the elements, so that every tensor is aligned.
    order = sorted(layout, key=lambda key: -layout[key][0].itemsize)
    offsets = {}
    end = 0
    for key in order:
        dtype, shape = layout[key]
        offsets[key] = [end, end := end + dtype.itemsize * math.prod(shape)]
    header: dict[str, Any] = {"__metadata__": metadata}
    for key, (dtype, shape) in layout.items():
        header[key] = {"dtype": codes[dtype], "shape": shape, "data_offsets": offsets[key]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _read_safetensors(
    file: BinaryIO, size: int
) -> tuple[dict[str, str], dict[str, _Tensor], dict[str, Extent]]:
    """The metadata and the tensors of a file: the length of its header in eight bytes, the header
    in JSON, the data without gaps."""
    (length,) = unpack(struct.Struct("<Q"), file, 0)
    if not 2 <= length <= min(size - 8, _MAX_JSON):
        raise ValueError(
            f"a safetensors header of {length} bytes, expected 2 to {_MAX_JSON} "
            f"and at most the {size - 8} bytes of the file"
        )
    try:
        header = json.loads(
            file.read(length).decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("the safetensors header is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ of the safetensors header must map strings to strings")

    tensors: dict[str, _Tensor] = {}
    storages: dict[str, Extent] = {}
    for name, entry in header.items():
        try:
            tensors[name], storages[name] = _safetensors_entry(name, entry, 8 + length)
        except ValueError as error:
            raise ValueError(f"tensor {shorten(name)}: {error}") from None
    end = 8 + length
    in_order = sorted(storages.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for name, storage in in_order:
        if storage.offset != end:
            raise ValueError(
                f"tensor {shorten(name)} begins at offset {storage.offset}, expected {end}: "
                "a gap or an overlap"
            )
        end += storage.nbytes
    if end != size:
        cut = " (truncated download?)" if size < end else ""
        raise ValueError(f"the tensors end at offset {end}, the file at {size}{cut}")
    return metadata, tensors, storages


def _safetensors_entry(name: str, entry: Any, base: int) -> tuple[_Tensor, Extent]:
    """A tensor of the header whose data begins at `base`; it is its own storage."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets, got {shorten(entry)}")
    kind = next((each for each in _TYPES if each.safetensors == entry["dtype"]), None)
    if kind is None:
        raise ValueError(f"unknown dtype {shorten(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError(f"shape {shorten(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"data_offsets {shorten(offsets)}")
    for number in shape + offsets:
        _natural(number, "a number in shape or data_offsets")
    nbytes = math.prod(shape) * kind.size
    begin, end = offsets
    if end - begin != nbytes:
        raise ValueError(f"shape {shape} needs {nbytes} bytes, data_offsets are {offsets}")
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return _Tensor(kind, tuple(shape), strides, 0, name), Extent(base + begin, nbytes)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in the safetensors header")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} in the safetensors header")
