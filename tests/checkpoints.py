"""Checkpoints for tests, made without torch: pickles, archives, safetensors put together by hand.

    path.write_bytes(torch_zip({"emb.weight": weights}))
    path.write_bytes(torch_legacy({"emb.weight": weights}))
    path.write_bytes(safetensors({"emb.weight": ("F32", weights)}))

Pickles are assembled opcode by opcode, so that wrong ones can be made as well:

    pickled(Call("os", "system", ("true",)))        # what pickle.dumps would make of such an object
"""

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage"}
STORAGES |= {"int64": "LongStorage", "bfloat16": "BFloat16Storage"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass
class Global:
    module: str
    name: str


@dataclass
class Call:
    """An object that unpickling makes by calling module.name(*arguments)."""

    module: str
    name: str
    arguments: tuple


@dataclass
class Persistent:
    identity: Any


@dataclass
class Raw:
    """Opcodes as they stand."""

    code: bytes


def opcodes(value: Any) -> bytes:
    match value:
        case Raw(code):
            return code
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            items = (opcodes(key) + opcodes(item) for key, item in value.items())
            return b"}(" + b"".join(items) + b"u"
        case Global(module, name):
            return b"c" + f"{module}\n{name}\n".encode()
        case Call(module, name, arguments):
            return opcodes(Global(module, name)) + opcodes(arguments) + b"R"
        case Persistent(identity):
            return opcodes(identity) + b"Q"
    raise TypeError(value)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def storage(key: str, numel: int, kind: str = "float32", *more: Any) -> Persistent:
    return Persistent(("storage", Global("torch", STORAGES[kind]), key, "cpu", numel, *more))


def tensor(
    base: Any,
    shape: Any,
    strides: Any = None,
    offset: Any = 0,
    function: str = "_rebuild_tensor_v2",
) -> Call:
    """A view of a storage; contiguous if no strides are given."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    hooks = Call("collections", "OrderedDict", ())
    return Call("torch._utils", function, (base, offset, shape, strides, False, hooks))


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves (uint16) of float32 numbers, cut off."""
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def split(tensors: Mapping[str, np.ndarray], *more: Any) -> tuple[dict[str, Call], list[bytes]]:
    """Each tensor with a storage of its own: what the pickle holds, what the storages hold.
    uint16 arrays stand for bfloat16."""
    root = {}
    for i, (key, values) in enumerate(tensors.items()):
        kind = {"uint16": "bfloat16"}.get(values.dtype.name, values.dtype.name)
        root[key] = tensor(storage(str(i), values.size, kind, *more), values.shape)
    return root, [np.ascontiguousarray(values).tobytes() for values in tensors.values()]


def archive(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", compression) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return result.getvalue()


def zip_files(root: Any, data: Mapping[str, bytes] | list[bytes] = ()) -> dict[str, bytes]:
    """The files in an archive of torch.save; `root` may be an object or a finished pickle."""
    storages = data if isinstance(data, Mapping) else {str(i): each for i, each in enumerate(data)}
    files = {
        "archive/data.pkl": root if isinstance(root, bytes) else pickled(root),
        "archive/byteorder": b"little",
        **{f"archive/data/{key}": each for key, each in storages.items()},
        "archive/version": b"3\n",
    }
    return files


def torch_zip(tensors: Mapping[str, np.ndarray]) -> bytes:
    return archive(zip_files(*split(tensors)))


def legacy(
    root: Any,
    data: Mapping[str, tuple[int, bytes]],
    magic: Any = LEGACY_MAGIC,
    version: Any = 1001,
    little_endian: Any = True,
) -> bytes:
    """The old format; `data` maps the key of each storage to its number of elements and bytes."""
    system = {"protocol_version": 1001, "little_endian": little_endian}
    pickles = b"".join(map(pickled, (magic, version, system, root, list(data))))
    return pickles + b"".join(struct.pack("<q", numel) + each for numel, each in data.values())


def torch_legacy(tensors: Mapping[str, np.ndarray]) -> bytes:
    root, data = split(tensors, None)
    numels = [values.size for values in tensors.values()]
    return legacy(root, {str(i): pair for i, pair in enumerate(zip(numels, data, strict=True))})


def safetensors(
    tensors: Mapping[str, tuple[str, np.ndarray]],
    header: Mapping[str, Any] | bytes | None = None,
    length: int | None = None,
    tail: bytes = b"",
) -> bytes:
    """`header` replaces entries of the right header, or all of it if it is bytes."""
    right: dict[str, Any] = {}
    end = 0
    for key, (dtype, values) in tensors.items():
        offsets = [end, end := end + values.nbytes]
        right[key] = {"dtype": dtype, "shape": values.shape, "data_offsets": offsets}
    text = header
    if not isinstance(text, bytes):
        text = json.dumps(right | dict(header or {})).encode()
    data = b"".join(np.ascontiguousarray(values).tobytes() for _, values in tensors.values())
    return struct.pack("<Q", len(text) if length is None else length) + text + data + tail
