"""Random RWKV-4 models for tests, and a writer of ggmf files, good ones and deliberately bad ones.

    tensors = random_model(seed=1)                       # {key: float32}, shapes as torch has them
    model = write_model(path, tensors, "Q5_1")           # {key: Tensor}, what now lies in the file
    reference.canonical.forward(model, tokens)           # the bits that the core must give
    reference.rwkv_v4.forward(file_weights(model), tokens)

A broken file is a good one with something changed before it is written:

    header, records = make_file(tensors)
    records["head.weight"].dims = (32, -1)
    write_records(path, header, records.values(), tail=b"junk")
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from reference import quants
from reference.quants import Tensor

MAGIC = 0x67676D66
TABLES = ("emb.weight", "head.weight")  # never quantized unless asked for by key

Types = Mapping[str, str] | Callable[[str, np.ndarray], str | None]


# ---- random models ----


def random_model(
    seed: int,
    n_vocab: int = 256,
    n_embed: int = 64,
    n_layer: int = 3,
    n_ffn: int | None = None,
    n_tiny: int = 0,
    tiny_layer: int = 0,
) -> dict[str, np.ndarray]:
    """The tensors of an RWKV-4 model in which every weight matters.

    Logits are of order 1..10, relu² is active, and wkv depends on time_first and on decays that
    reach from 1 to 500 tokens. float32, (rows, cols), time_decay already -exp(...); keys in the
    order of a checkpoint. n_ffn is 2 * n_embed + 32 by default. With n_tiny it is one of RWKV-4a:
    tiny_layer has a tiny attention of this width.
    """
    random = np.random.default_rng(seed)
    n_ffn = n_ffn or 2 * n_embed + 32

    def normal(*shape: int, gain: float) -> np.ndarray:
        return gain * random.standard_normal(shape)

    def matrix(rows: int, cols: int, gain: float) -> np.ndarray:
        return normal(rows, cols, gain=gain / np.sqrt(cols))

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": 1 + normal(n_embed, gain=0.2),
            f"{name}.bias": normal(n_embed, gain=0.1),
        }

    tensors = {"emb.weight": normal(n_vocab, n_embed, gain=0.5)}
    for i in range(n_layer):
        block = f"blocks.{i}"
        tensors |= norm(f"{block}.ln1") | norm(f"{block}.ln2")
        if i == 0:
            tensors |= norm(f"{block}.ln0")
        tensors |= {
            f"{block}.att.time_decay": -np.exp(random.uniform(-6, 1, n_embed)),
            f"{block}.att.time_first": normal(n_embed, gain=1.5),
            f"{block}.att.time_mix_k": random.uniform(0, 1, n_embed),
            f"{block}.att.time_mix_v": random.uniform(0, 1, n_embed),
            f"{block}.att.time_mix_r": random.uniform(0, 1, n_embed),
            f"{block}.att.key.weight": matrix(n_embed, n_embed, gain=1.5),
            f"{block}.att.value.weight": matrix(n_embed, n_embed, gain=1.5),
            f"{block}.att.receptance.weight": matrix(n_embed, n_embed, gain=1.5),
            f"{block}.att.output.weight": matrix(n_embed, n_embed, gain=2.0),
            f"{block}.ffn.time_mix_k": random.uniform(0, 1, n_embed),
            f"{block}.ffn.time_mix_r": random.uniform(0, 1, n_embed),
            f"{block}.ffn.key.weight": matrix(n_ffn, n_embed, gain=1.0),
            f"{block}.ffn.receptance.weight": matrix(n_embed, n_embed, gain=1.5),
            f"{block}.ffn.value.weight": matrix(n_embed, n_ffn, gain=1.0),
        }
        if n_tiny and i == tiny_layer:
            tensors |= norm(f"{block}.tiny_ln") | {
                f"{block}.tiny_q.weight": matrix(n_tiny, n_embed, gain=0.5),
                f"{block}.tiny_k.weight": matrix(n_tiny, n_embed, gain=0.5),
                f"{block}.tiny_v.weight": matrix(n_embed, n_embed, gain=1.0),
            }
    tensors |= norm("ln_out") | {"head.weight": matrix(n_vocab, n_embed, gain=3.0)}
    return {key: value.astype(np.float32) for key, value in tensors.items()}


# ---- a model in a file ----


def encode(
    tensors: Mapping[str, np.ndarray],
    data_type: str = "FP32",
    version: int = 101,
    types: Types | None = None,
    table_type: str = "FP32",
) -> dict[str, Tensor]:
    """What a file of this type holds: FP32 vectors, matrices in `data_type`, and, if that is a
    quantized format, emb.weight and head.weight in `table_type`.

    `types` overrules this per tensor: a mapping {key: type} or a function (key, values) -> type
    or None.
    """
    choose = types if callable(types) else (lambda key, values: (types or {}).get(key))

    def rule(key: str, values: np.ndarray) -> str:
        if values.ndim == 1:
            return "FP32"
        return table_type if key in TABLES and data_type not in quants.PLAIN else data_type

    return {
        key: Tensor.of(version, choose(key, values) or rule(key, values), values)
        for key, values in tensors.items()
    }


def write_model(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    data_type: str = "FP32",
    version: int = 101,
    types: Types | None = None,
    table_type: str = "FP32",
    order: Iterable[str] | None = None,
    **header: int,
) -> dict[str, Tensor]:
    """Write a model file and return what it holds.

    `order`: the keys in the order of their records. Other arguments replace members of the header.
    """
    model = encode(tensors, data_type, version, types, table_type)
    records = [make_record(key, model[key]) for key in order or model]
    write_records(path, replace(make_header(model, data_type), **header), records)
    return model


def read_model(path: Path) -> dict[str, Tensor]:
    """The tensors of a well-formed file."""
    data = path.read_bytes()
    version = struct.unpack_from("<6i", data)[1]
    tensors = {}
    at = 24
    while at < len(data):
        dim_count, key_length, type_id = struct.unpack_from("<3i", data, at)
        dims = struct.unpack_from(f"<{dim_count}i", data, at + 12)
        at += 12 + 4 * dim_count
        key = data[at : at + key_length].decode()
        at += key_length
        name = quants.TYPE_NAMES[type_id]
        rows = int(np.prod(dims[1:]))
        size = rows * quants.row_bytes(version, name, dims[0])
        body = np.frombuffer(data, np.uint8, size, at).reshape(rows, -1)
        tensors[key] = Tensor(version, name, dims[::-1], body)
        at += size
    return tensors


def file_weights(model: Path | Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The weights that the bytes of a model stand for, in float64, for `reference.rwkv_v4`."""
    tensors = read_model(model) if isinstance(model, Path) else model
    return {key: tensor.values().astype(np.float64) for key, tensor in tensors.items()}


# ---- records, right or wrong ----


@dataclass
class Header:
    """The first 24 bytes of a file. Any number is written modulo 2^32."""

    n_vocab: int
    n_embed: int
    n_layer: int
    data_type: int = 0
    version: int = 101
    magic: int = MAGIC

    def to_bytes(self) -> bytes:
        return int32s(
            self.magic, self.version, self.n_vocab, self.n_embed, self.n_layer, self.data_type
        )


@dataclass
class Record:
    """One tensor of a file. Nothing need fit together: each member is written as it stands."""

    key: str | bytes
    type_id: int
    dims: tuple[int, ...]  # as in the file: cols, rows
    data: bytes = field(repr=False)
    dim_count: int | None = None  # None: what dims has
    key_length: int | None = None  # None: what key has

    def to_bytes(self) -> bytes:
        key = self.key.encode() if isinstance(self.key, str) else self.key
        dim_count = len(self.dims) if self.dim_count is None else self.dim_count
        key_length = len(key) if self.key_length is None else self.key_length
        return int32s(dim_count, key_length, self.type_id, *self.dims) + key + self.data


def make_file(
    tensors: Mapping[str, np.ndarray],
    data_type: str = "FP32",
    version: int = 101,
    types: Types | None = None,
    table_type: str = "FP32",
) -> tuple[Header, dict[str, Record]]:
    """The header and the records of a model file, to be changed and written."""
    model = encode(tensors, data_type, version, types, table_type)
    records = {key: make_record(key, tensor) for key, tensor in model.items()}
    return make_header(model, data_type), records


def make_header(model: Mapping[str, Tensor], data_type: str) -> Header:
    table = model["emb.weight"]
    n_layer = sum(key.endswith(".ln1.weight") for key in model)
    return Header(*table.shape, n_layer, quants.TYPE_IDS[data_type], table.version)


def make_record(key: str, tensor: Tensor) -> Record:
    return Record(key, quants.TYPE_IDS[tensor.name], tensor.shape[::-1], tensor.data.tobytes())


def write_records(
    path: Path, header: Header | bytes, records: Iterable[Record], tail: bytes = b""
) -> None:
    start = header if isinstance(header, bytes) else header.to_bytes()
    path.write_bytes(start + b"".join(record.to_bytes() for record in records) + tail)


def int32s(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *(number % 2**32 for number in numbers))
