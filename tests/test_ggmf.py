"""The model file in Python, against the writer of the tests (faults.md M-00..M-20, M-26, M-30)."""

import os
import struct
from pathlib import Path

import models
import numpy as np
import pytest
from rwkv_cpp.errors import RWKVFileError, RWKVLibraryNotFound
from rwkv_cpp.ggmf import FP16, FP32, Header, Record, Writer, read_index, read_tensor

TENSORS = models.random_model(1, n_vocab=5, n_embed=32, n_layer=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.bin"


@pytest.fixture
def library():
    from rwkv_cpp.library import load_rwkv_shared_library

    try:
        return load_rwkv_shared_library()
    except RWKVLibraryNotFound:
        pytest.skip("the C library is not built")


@pytest.fixture
def refused(path):
    def check(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(RWKVFileError, match=match) as caught:
            read_index(path)
        assert str(caught.value).startswith(str(path))
        assert str(caught.value).isprintable()

    return check


def damaged(**members: object) -> bytes:
    """A file in which members of one record, a matrix of 96 rows of 32, are replaced."""
    header, records = models.make_file(TENSORS)
    for name, value in members.items():
        setattr(records["blocks.0.ffn.key.weight"], name, value)
    return header.to_bytes() + b"".join(record.to_bytes() for record in records.values())


def with_header(**members: int) -> bytes:
    header, records = models.make_file(TENSORS)
    for name, value in members.items():
        setattr(header, name, value)
    return header.to_bytes() + b"".join(record.to_bytes() for record in records.values())


WHOLE = with_header()


# ---- what is read and written -------------------------------------------------------------------


@pytest.mark.parametrize("version", [100, 101])
@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_read(path, version, data_type):
    model = models.write_model(path, TENSORS, data_type, version)
    header, records = read_index(path)
    type_id = {"FP32": FP32, "FP16": FP16}[data_type]
    assert header == Header(version, n_vocab=5, n_embed=32, n_layer=2, data_type=type_id)
    assert [record.key for record in records] == list(model)
    data = path.read_bytes()
    for record in records:
        tensor = model[record.key]
        assert record.shape == tensor.shape == TENSORS[record.key].shape
        assert data[record.offset :][: record.nbytes] == tensor.data.tobytes()
        values = read_tensor(path, record)
        assert not values.flags.writeable
        assert values.shape == record.shape
        np.testing.assert_array_equal(values.astype(np.float64), tensor.values())


@pytest.mark.parametrize(
    "data_type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_1_O", "Q4_2", "Q4_3"]
)
@pytest.mark.parametrize("version", [100, 101])
def test_read_quantized(path, library, version, data_type):
    if version == 101 and data_type in ("Q4_1_O", "Q4_2", "Q4_3"):  # M-03
        header, records = models.make_file(TENSORS, data_type, 100)
        header.version = 101
        models.write_records(path, header, records.values())
        with pytest.raises(RWKVFileError, match="version 101"):
            read_index(path)
        return
    model = models.write_model(path, TENSORS, data_type, version)
    header, records = read_index(path)
    data = path.read_bytes()
    assert header.version == version
    for record in records:
        assert data[record.offset :][: record.nbytes] == model[record.key].data.tobytes()
    quantized = next(record for record in records if record.data_type not in (FP32, FP16))
    with pytest.raises(ValueError, match="only FP32 and FP16"):
        read_tensor(path, quantized)


def test_rows_of_part_of_a_block(refused, library):  # M-12
    refused(damaged(type_id=2, dims=(31, 96)), r"tensor 'blocks\.0\.ffn\.key\.weight': .* 31 ")


@pytest.mark.parametrize("version", [100, 101])
@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_write(path, tmp_path, version, data_type):
    expected = tmp_path / "expected.bin"
    models.write_model(expected, TENSORS, data_type, version)
    type_id = {"FP32": FP32, "FP16": FP16}[data_type]
    with Writer(path, Header(version, 5, 32, 2, type_id)) as writer:
        for key, values in TENSORS.items():
            if values.ndim == 2 and type_id == FP16:
                writer.write(key, FP16, values.astype(np.float16))
            else:
                writer.write(key, FP32, np.asfortranarray(values))
        assert not path.exists()
    assert path.read_bytes() == expected.read_bytes()


def test_writer_refuses(path):
    values = np.zeros((2, 3), np.float32)
    path.write_bytes(b"old")

    def write_two(key: str, data_type: int, array: np.ndarray) -> None:
        with Writer(path, Header(101, 5, 32, 2, FP32)) as writer:
            writer.write("twice", FP32, values)
            writer.write(key, data_type, array)

    for key, data_type, array in (
        ("", FP32, values),
        ("a b", FP32, values),
        ("a" * 256, FP32, values),
        ("twice", FP32, values),
        ("a", FP16, values),
        ("a", FP32, values.astype(np.float64)),
        ("a", 2, values),
        ("a", FP32, values[None]),
        ("a", FP32, values[0, 0]),
        ("a", FP32, values[:0]),
        ("a", FP32, np.zeros((1 << 20) + 1, np.float32)),
    ):
        with pytest.raises(ValueError, match=r"key|dimensions|written"):
            write_two(key, data_type, array)
        assert path.read_bytes() == b"old"
    for wrong in Header(99, 5, 32, 2, 0), Header(101, 0, 32, 2, 0), Header(101, 5, 32, 2, 77):
        with pytest.raises(ValueError, match="expected"):
            Writer(path, wrong)


# ---- what is refused ----------------------------------------------------------------------------


def test_short_headers(refused):  # M-01
    for length in range(24):
        refused(WHOLE[:length], f"truncated header, got {length} of 24 bytes")
    refused(WHOLE[:24], "ends after its header")


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (b"GGUF\3\0\0\0", "GGUF file of llama.cpp"),
        (b"lmgg", "'ggml'"),
        (b"tjgg", "'ggjt'"),
        (b"PK\3\4", r"zip archive.*\.pth.*'rwkv convert'"),
        (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46", r"checkpoint.*'rwkv convert'"),
        (b"\x10\0\0\0\0\0\0\0{}", "safetensors file; convert it first"),
        (b"<!doctype html>", "HTML page"),
        (b"version https://git-lfs", "git-lfs pointer"),
        (struct.pack(">2i", models.MAGIC, 101), "byte-swapped"),  # M-30
        (b"\x1b[31mred", "unknown format"),
    ],
)
def test_foreign_files(refused, head, match):  # M-02
    refused(head, match)
    refused(head + bytes(1000), match)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"version": 0}, "version 0 of the file, expected 100 or 101"),
        ({"version": 99}, "version 99"),
        ({"version": 102}, "version 102"),
        ({"version": 1 << 31}, "version -2147483648"),
        ({"data_type": -1}, "data type -1, expected 0 to 9"),  # M-05
        ({"data_type": 12}, "data type 12, a K-quant of 2025"),
        ({"data_type": 17}, "data type 17, expected"),
    ],
)
def test_headers(refused, members, match):  # M-03, M-05
    refused(with_header(**members), match)


@pytest.mark.parametrize("name", ["n_vocab", "n_embed", "n_layer"])
def test_sizes_in_the_header(refused, path, name):  # M-04
    limit = {"n_vocab": 1 << 20, "n_embed": 1 << 16, "n_layer": 1 << 10}[name]
    for value in 0, -1, (1 << 31) - 1, 1 << 31, limit + 1:
        refused(with_header(**{name: value}), f"{name} is -?[0-9]+, expected 1 to {limit}")
    path.write_bytes(with_header(**{name: limit}))
    assert getattr(read_index(path)[0], name) == limit


@pytest.mark.parametrize(
    ("members", "match"),
    [
        # M-05, M-07, M-08, M-10: each number of a record.
        *(({"type_id": n}, f"data type {n}") for n in (-1, 10, 16, 17, 255)),
        *(({"dim_count": n}, f"of {n} dimensions") for n in (0, -1, 3, 5, 64, (1 << 31) - 1)),
        *(({"key_length": n}, f"key of {n} bytes") for n in (0, -1, 256, (1 << 31) - 1)),
        *(({"dims": (n, 96)}, "expected 1 to") for n in (0, -1, -8, 1 << 31, (1 << 20) + 1)),
        ({"dims": (32, -96)}, "shape .-96, 32., expected 1 to"),
        # M-11: products that wrap in 32 or 64 bits.
        ({"dims": (3193269536, 1444189401)}, "expected 1 to"),
        ({"dims": (65536, 65537)}, "needs 17180131328 bytes, the file has"),
        ({"dims": ((1 << 31) - 1,) * 2}, "expected 1 to"),
        ({"dims": (1 << 20, 1 << 20)}, "needs 4398046511104 bytes"),
    ],
)  # fmt: skip
def test_records(refused, members, match):
    refused(damaged(**members), match)


@pytest.mark.parametrize(
    "key",
    [b"a\0b", b"a\nb", b"a\x1b[2J", b"\xff\xfe", "schlüssel".encode(), b"a ", b"a/b", b"a" * 300],
)
def test_keys(refused, key):  # M-08, M-09
    refused(damaged(key=key), "a key ")


def test_tensors_that_occur_twice(refused):  # M-15
    header, records = models.make_file(TENSORS)
    for key, record in records.items():
        data = b"".join(each.to_bytes() for each in [*records.values(), record])
        refused(header.to_bytes() + data, f"tensor '{key}' occurs twice")


def test_truncated_at_every_byte_of_the_structure(path):  # M-18
    lengths: set[int] = set()
    end = 24
    for record in models.make_file(TENSORS)[1].values():
        # After a whole record the structure is sound: that a tensor is missing, the core will say.
        start, end = end, end + len(record.to_bytes())
        lengths |= {*range(start + 1, end - len(record.data) + 2), end - 1}
    assert end == len(WHOLE)
    path.write_bytes(WHOLE)
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        with pytest.raises(RWKVFileError, match="truncated download"):
            read_index(path)


@pytest.mark.parametrize("count", [1, 3, 4096])
def test_trailing_bytes(refused, count):  # M-19
    refused(WHOLE + b"\1" * count, "bytes after the last tensor|dimensions")


def test_two_models_in_one_file(refused):  # M-19
    refused(WHOLE + WHOLE, f"of {models.MAGIC} dimensions")


def test_too_many_tensors(refused):  # M-20
    records = (
        models.Record(f"t{i}", FP32, (1,), bytes(4)).to_bytes() for i in range(64 * 2 + 64 + 1)
    )
    refused(WHOLE[:24] + b"".join(records), "more than 192 tensors")


def test_files_that_are_none(path, tmp_path):  # M-26, M-27
    with pytest.raises(RWKVFileError, match="not a regular file"):
        read_index(tmp_path)
    with pytest.raises(RWKVFileError, match="null"):
        read_index(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        read_index(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        for special in path, Path("/dev/zero"):
            with pytest.raises(RWKVFileError, match="not a regular file"):
                read_index(special)


def test_a_file_of_a_terabyte(path):  # M-27
    path.write_bytes(WHOLE)
    os.truncate(path, 1 << 40)
    with pytest.raises(RWKVFileError, match="a tensor of 0 dimensions"):
        read_index(path)


def test_a_tensor_at_any_offset(path):  # M-23
    odd = {"a": np.arange(3, dtype=np.float32), "ab": np.arange(6, dtype=np.float32).reshape(2, 3)}
    with Writer(path, Header(101, 1, 1, 1, FP32)) as writer:
        for key, values in odd.items():
            writer.write(key, FP32, values)
    _, records = read_index(path)
    assert records[0] == Record("a", FP32, (3,), 24 + 12 + 4 + 1, 12)
    for record in records:
        np.testing.assert_array_equal(read_tensor(path, record), odd[record.key])
