"""Model files, right and wrong, through the C library. Ids are those of the catalogue of faults.

Whoever reads a file goes through the same checks, so each wrong file is given to all three of them:
loading, estimating and quantizing must refuse it with the same words.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from models import (
    Header,
    Record,
    encode,
    int32s,
    make_file,
    random_model,
    write_model,
    write_records,
)
from reference import canonical, quants
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.library import load_rwkv_shared_library
from rwkv_cpp.model import RWKVModel, RWKVSequence

TENSORS = random_model(seed=5, n_vocab=8, n_embed=32, n_layer=2, n_ffn=64)
TOKENS = [1, 7, 0, 3, 3, 5, 2, 6, 4, 1]
MATRICES = [key for key, values in TENSORS.items() if values.ndim == 2]
VECTORS = [key for key, values in TENSORS.items() if values.ndim == 1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def refused(path: Path, words: str, error: type[Exception] = RWKVFileError) -> str:
    """The text with which every reader of files refuses this one; `words` is a part of it."""
    library = load_rwkv_shared_library()
    target = path.with_name("target.bin")
    texts = set()
    for read in (
        lambda: library.rwkv_load(path, 1),
        lambda: library.rwkv_estimate(path),
        lambda: library.rwkv_quantize_file(path, target, "Q8_0"),
    ):
        with pytest.raises(error, match=re.escape(words) or None) as caught:
            read()
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert not target.exists()
    text = texts.pop()
    assert os.fspath(path) in text
    assert text.isprintable()
    return text


def changed(path: Path, which: str | None = None, /, **members: object) -> None:
    """Write the model with one record, or the header, changed."""
    header, records = make_file(TENSORS)
    if which is None:
        header = replace(header, **members)
    else:
        records[which] = replace(records[which], **members)
    write_records(path, header, records.values())


def logits(path: Path, **options: object) -> np.ndarray:
    with RWKVModel(None, path, 1, **options) as model:
        return model.eval_batch([RWKVSequence(TOKENS, n_logits=len(TOKENS))])[0].logits


def wanted(tensors: dict[str, quants.Tensor]) -> np.ndarray:
    return canonical.forward(tensors, TOKENS)[0]


# ---- header ----


@pytest.mark.parametrize("n", range(24))
def test_m01_truncated_header(path: Path, n: int) -> None:
    path.write_bytes(Header(8, 32, 2).to_bytes()[:n])
    text = refused(path, f"got {n} of 24 bytes" if n < 4 else "")
    assert "truncated header" in text


def test_m01_header_only(path: Path) -> None:
    write_records(path, Header(8, 32, 2), [])
    refused(path, "'emb.weight' is missing")


FOREIGN = {
    "GGUF": (b"GGUF\3\0\0\0" + bytes(40), "a GGUF file, which llama.cpp reads"),
    "ggml": (b"lmgg" + bytes(40), "a 'ggml' file"),
    "ggjt": (b"tjgg\1\0\0\0" + bytes(40), "a 'ggjt' file"),
    "zip": (b"PK\3\4" + bytes(40), "`rwkv convert`"),
    "pickle": (b"\x80\2\x8a\nl\xfc\x9cF" + bytes(40), "`rwkv convert`"),
    "safetensors": (struct.pack("<Q", 900) + b'{"emb.weight":{' + bytes(900), "`rwkv convert`"),
    "html": (b"<!DOCTYPE html><html>" + bytes(40), "HTML"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git-lfs pointer"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    "json": (b'{"a": 1, "b": [1, 2, 3, 4, 5, 6]}', "JSON"),
    "swapped": (struct.pack(">6i", 0x67676D66, 101, 8, 32, 2, 0), "big-endian"),
    "noise": (bytes(range(200, 240)), "unknown format"),
    "short": (b"PK\3\4", "`rwkv convert`"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_m02_foreign_format(path: Path, kind: str) -> None:
    data, words = FOREIGN[kind]
    path.write_bytes(data)
    refused(path, words)


@pytest.mark.parametrize("version", [-1, 0, 99, 102, 2**31])
def test_m03_version(path: Path, version: int) -> None:
    changed(path, version=version)
    refused(path, "expected 100 to 101")


@pytest.mark.parametrize("type_id", [4, 5, 6])
def test_m03_type_of_another_version(path: Path, type_id: int) -> None:
    name = quants.TYPE_NAMES[type_id]
    changed(path, data_type=type_id)
    refused(path, f"data type {name} is not in files of version 101")
    changed(path, "blocks.1.att.key.weight", type_id=type_id)
    refused(path, f"data type {name} is not in files of version 101")


@pytest.mark.parametrize(
    ("member", "limit"), [("n_vocab", 1 << 20), ("n_embed", 1 << 16), ("n_layer", 1 << 10)]
)
def test_m04_sizes(path: Path, member: str, limit: int) -> None:
    for value in (0, -1, 2**31 - 1, 2**31, limit + 1):
        changed(path, **{member: value})
        refused(path, f"{member} is {struct.unpack('<i', int32s(value))[0]}, expected 1 to {limit}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    changed(path, **{member: limit})
    refused(path, "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


@pytest.mark.parametrize("type_id", [-1, *range(10, 18), 255, 2**31 - 1])
def test_m05_data_type(path: Path, type_id: int) -> None:
    words = "K-quants" if 10 <= type_id <= 16 else f"data type {type_id}, expected 0 to 9"
    changed(path, data_type=type_id)
    refused(path, words)
    changed(path, "blocks.0.ffn.value.weight", type_id=type_id)
    assert "blocks.0.ffn.value.weight" in refused(path, words)


def test_m06_layers(path: Path) -> None:
    changed(path, n_layer=1)
    refused(path, "unexpected tensor 'blocks.1.")
    for n_layer in (3, 1000):
        changed(path, n_layer=n_layer)
        refused(path, "'blocks.2.ln1.weight' is missing")


# ---- records ----


@pytest.mark.parametrize("dim_count", [0, -1, 4, 5, 64, 2**31 - 1, 2**31])
def test_m07_dimensions(path: Path, dim_count: int) -> None:
    changed(path, "head.weight", dim_count=dim_count)
    refused(path, "dimensions, expected 1 to 3")


@pytest.mark.parametrize("key_length", [0, -1, 256, 2**31 - 1, 2**31])
def test_m08_length_of_a_name(path: Path, key_length: int) -> None:
    changed(path, "head.weight", key_length=key_length)
    refused(path, "bytes, expected 1 to 255")


def test_m08_name_past_the_end(path: Path) -> None:
    header, _ = make_file(TENSORS)
    write_records(path, header, [Record("x", 0, (4,), b"", key_length=200)])
    refused(path, "the name of a tensor takes 200 bytes, but only 1 bytes are left")


@pytest.mark.parametrize(
    "key",
    [
        b"head\0weight",
        b"head.weight\n",
        b"\x1b[2Jweight",
        b"head.w\xffight",
        "köpfe.weight".encode(),
        b"head weight",
        b"head.weight ",
        b"head-weight",
        b"../head.weight",
        b"%s%n",
    ],
)
def test_m09_name(path: Path, key: bytes) -> None:
    changed(path, "head.weight", key=key)
    refused(path, "expected letters, digits, '_' and '.' only")


@pytest.mark.parametrize("dims", [(0, 8), (32, 0), (-1, 8), (32, -8), (-32, -8), (-(2**31), 8)])
def test_m10_dimension(path: Path, dims: tuple[int, int]) -> None:
    changed(path, "head.weight", dims=dims)
    refused(path, f"a dimension is {next(n for n in dims[::-1] if n < 1)}, expected at least 1")


@pytest.mark.parametrize(
    "dims",
    [
        (3193269536, 1444189401),  # FP32: 2^64 + 128 bytes, were they unsigned
        (3748559, 2434567, 1515985),  # FP32: -28 modulo 2^64
        (65536, 65537),
        (65536, 65536),
        (2**31 - 1, 2**31 - 1),
        (2**31 - 1, 2**31 - 1, 2**31 - 1),
        (2**30, 2**30, 4),
        (2**31 - 1,),
    ],
)
@pytest.mark.parametrize("type_id", [0, 1, 2, 9])
def test_m11_size_that_wraps(path: Path, dims: tuple[int, ...], type_id: int) -> None:
    changed(path, "head.weight", dims=dims, type_id=type_id)
    refused(path, "tensor 'head.weight'")


@pytest.mark.parametrize("version", [100, 101])
@pytest.mark.parametrize("cols", [1, 16, 31, 33, 48])
def test_m12_row_of_blocks(path: Path, version: int, cols: int) -> None:
    header, records = make_file(TENSORS, version=version)
    for name in quants.formats(version):
        record = replace(records["head.weight"], dims=(cols, 8), type_id=quants.TYPE_IDS[name])
        write_records(path, header, [record])
        refused(path, f"rows of {cols} weights, but {name} needs a multiple of 32")


@pytest.mark.parametrize("key", ["head.weight", "emb.weight"])
@pytest.mark.parametrize("rows", [7, 9, 16])
def test_m13_rows(path: Path, key: str, rows: int) -> None:
    changed(path, key, dims=(32, rows), data=bytes(rows * 32 * 4))
    refused(path, f"tensor '{key}': expected shape 8 x 32, file has {rows} x 32")


@pytest.mark.parametrize("key", [key for key in MATRICES if len(set(TENSORS[key].shape)) > 1])
def test_m13_transposed(path: Path, key: str) -> None:
    rows, cols = TENSORS[key].shape
    changed(path, key, dims=(rows, cols))
    text = refused(path, "")
    assert "expected shape" in text or "expected 1 to" in text


@pytest.mark.parametrize("key", VECTORS)
def test_m13_vector(path: Path, key: str) -> None:
    changed(path, key, dims=(31,), data=bytes(31 * 4))
    refused(path, f"tensor '{key}': expected shape 32, file has 31")
    changed(path, key, dims=(32, 1))
    refused(path, f"tensor '{key}': expected shape 32, file has 1 x 32")


def test_m13_layers_of_different_width(path: Path) -> None:
    changed(path, "blocks.1.ffn.key.weight", dims=(32, 96), data=bytes(32 * 96 * 4))
    refused(path, "'blocks.1.ffn.key.weight': expected shape 64 x 32, file has 96 x 32")


@pytest.mark.parametrize("key", TENSORS)
def test_m14_missing(path: Path, key: str) -> None:
    header, records = make_file(TENSORS)
    del records[key]
    write_records(path, header, records.values())
    refused(path, f"tensor '{key}' is missing")


@pytest.mark.parametrize("key", TENSORS)
def test_m15_twice(path: Path, key: str) -> None:
    header, records = make_file(TENSORS)
    record = records[key]
    others = [
        record,
        replace(record, data=bytes(len(record.data))),
        replace(record, dims=(4,), data=bytes(16)),
    ]
    for other in others:
        write_records(path, header, [*records.values(), other])
        refused(path, f"tensor '{key}' occurs twice")


UNKNOWN = {
    "blocks.0.att.ln_x.weight": "RWKV-5, ",
    "blocks.0.att.gate.weight": "RWKV-5.2",
    "blocks.0.att.time_faaaa": "RWKV-5.2",
    "blocks.0.att.time_maa_x": "RWKV-6",
    "blocks.0.att.r_k": "RWKV-7",
    "blocks.0.att.x_rwkvag": "RWKV-7",
    "blocks.1.tiny_mask": "convert its checkpoint again",
    "blocks.1.att.qq.weight": "softmax attention",
    "blocks.0.att.time_mix": "RWKV-2",
    "blocks.0.att.time_w": "RWKV-1",
    "pos_emb_x": "positional embeddings",
    "blocks.0.ffnPre.key.weight": "in place of attention",
    "head_q.weight": "head_qk",
    "blocks.0.att.key.lora_A": "merge it into its model first",
    "blocks.00.ln1.weight": "unknown architecture",
    "blocks.-1.ln1.weight": "",
    "blocks.0.ln1.weight.weight": "unknown architecture",
    "blocks.4294967296.ln1.weight": "unknown architecture",
    "blocks.0.emb.weight": "unknown architecture",
    "ln1.weight": "unknown architecture",
    "zzz": "unknown architecture",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_m16_unknown(path: Path, key: str) -> None:
    header, records = make_file(TENSORS)
    extra = Record(key, 0, (32,), bytes(128))
    for order in ([*records.values(), extra], [extra, *records.values()]):
        write_records(path, header, order)
        text = refused(path, UNKNOWN[key])
        assert key in text


def test_m16_later_architecture_is_told_by_all_its_tensors(path: Path) -> None:
    header, records = make_file(TENSORS)
    names = ["blocks.0.att.ln_x.weight", "blocks.0.att.gate.weight", "blocks.1.att.time_maa_x"]
    extra = [Record(name, 0, (32,), bytes(128)) for name in names]
    write_records(path, header, [*records.values(), *extra])
    refused(path, "RWKV-6")


def test_m16_known_but_not_needed(path: Path) -> None:
    """ln0 belongs to the first layer; another layer's does no harm."""
    header, records = make_file(TENSORS)
    extra = Record("blocks.1.ln0.weight", 0, (32,), bytes(128))
    write_records(path, header, [*records.values(), extra])
    np.testing.assert_array_equal(logits(path), wanted(encode(TENSORS)))
    write_records(path, header, [*records.values(), replace(extra, dims=(16,), data=bytes(64))])
    refused(path, "tensor 'blocks.1.ln0.weight': expected shape 32, file has 16")


TENSORS_4A = random_model(7, n_vocab=8, n_embed=32, n_layer=3, n_tiny=6, tiny_layer=1)


@pytest.mark.parametrize("key", [key for key in TENSORS_4A if ".tiny_" in key])
def test_4a_needs_all_of_one_tiny_attention(path: Path, key: str) -> None:
    header, records = make_file(TENSORS_4A)
    write_records(path, header, [record for record in records.values() if record.key != key])
    refused(path, f"tensor '{key}' is missing")

    second = replace(records[key], key=key.replace("blocks.1", "blocks.2"))
    write_records(path, header, [*records.values(), second])
    refused(path, f"'{second.key}': layer 1 has a tiny attention already, expected one")
    write_records(path, header, [replace(records[key], key=key.replace("blocks.1", "blocks.3"))])
    refused(path, "n_layer is 3, says the header")

    narrow = TENSORS_4A | {key: TENSORS_4A[key][..., :-1]}
    write_model(path, narrow)
    refused(path, f"tensor '{key}': expected shape ")


def test_widths_of_tiny_attention(path: Path) -> None:
    key = "blocks.1.tiny_k.weight"
    write_model(path, TENSORS_4A | {key: TENSORS_4A[key][1:]})
    refused(path, "file has 6 x 32")
    wide = random_model(7, n_vocab=8, n_embed=32, n_layer=3, n_tiny=4097, tiny_layer=1)
    write_model(path, wide)
    refused(path, "tiny_q.weight is 4097, expected 1 to 4096")
    header, records = make_file(TENSORS_4A)
    records[key] = replace(records[key], dims=(32, 0))
    write_records(path, header, records.values())
    refused(path, "a dimension is 0, expected at least 1")


@pytest.mark.parametrize("type_name", ["FP16", "Q4_0", "Q8_0"])
def test_m17_vectors_are_fp32(path: Path, type_name: str) -> None:
    for key in VECTORS[::5]:
        write_model(path, TENSORS, types={key: type_name})
        refused(path, f"tensor '{key}': expected FP32 as for all vectors, file has {type_name}")


@pytest.mark.parametrize("version", [100, 101])
def test_m17_any_type_per_matrix(path: Path, version: int) -> None:
    """Types drawn at random for each matrix, embedding and head included, and a header that says
    something else: the reference's bits."""
    names = ["FP32", "FP16", *quants.formats(version)]
    draw = random.Random(version)
    for _ in range(6):
        types = {key: draw.choice(names) for key in MATRICES}
        header_type = quants.TYPE_IDS[draw.choice(names)]
        header, records = make_file(TENSORS, version=version, types=types)
        write_records(path, replace(header, data_type=header_type), records.values())
        model = encode(TENSORS, version=version, types=types)
        np.testing.assert_array_equal(logits(path), wanted(model))
        np.testing.assert_array_equal(logits(path, mmap=False), wanted(model))


def boundaries(path: Path) -> list[int]:
    header, records = make_file(TENSORS)
    write_records(path, header, records.values())
    ends = [24]
    for record in records.values():
        ends.append(ends[-1] + len(record.to_bytes()))
    assert ends[-1] == path.stat().st_size
    return ends


def test_m18_truncated(path: Path) -> None:
    """At each boundary, one byte beside it, and at 2000 random places."""
    ends = boundaries(path)
    draw = random.Random(18)
    places = {end + delta for end in ends for delta in (-1, 0, 1)}
    places |= {draw.randrange(ends[-1]) for _ in range(2000)}
    library = load_rwkv_shared_library()
    for size in sorted(places, reverse=True):
        if size >= ends[-1]:
            continue
        os.truncate(path, size)
        with pytest.raises(RWKVFileError, match="truncated"):
            library.rwkv_load(path, 1)


def test_m19_bytes_after_the_last_tensor(path: Path) -> None:
    header, records = make_file(TENSORS)
    write_records(path, header, records.values())
    model = path.read_bytes()
    for tail in (b"\0", b"\1\0\0", bytes(24), bytes(4096), model):
        path.write_bytes(model + tail)
        refused(path, f"at byte {len(model)}")


def test_m20_too_many_tensors(path: Path) -> None:
    header, records = make_file(TENSORS)
    tiny = [Record(f"t{i}", 0, (1,), bytes(4)) for i in range(100_000)]
    write_records(path, header, [*records.values(), *tiny])
    refused(path, "more than 192 tensors, too many for a model of 2 layers")


# ---- data ----


def test_m21_weights_that_are_not_finite(path: Path) -> None:
    """They load, and what becomes of them in evaluation is at least no crash."""
    for value in (np.nan, np.inf, 1e-42):
        for type_name in ("FP32", "FP16"):
            tensors = {key: values.copy() for key, values in TENSORS.items()}
            for key in MATRICES:
                tensors[key][::2, 3] = value
            model = write_model(path, tensors, type_name)
            np.testing.assert_array_equal(logits(path), wanted(model))


@pytest.mark.parametrize(
    "key", ["blocks.1.att.output.weight", "blocks.0.ffn.value.weight", "head.weight"]
)
@pytest.mark.parametrize(("row", "block"), [(0, 0), (7, 0), (5, -1)])
@pytest.mark.parametrize(
    ("index", "value"), [(32, 1.0), (65534, 0.0), (0x8000, 0.0), (0xFFFF, 0.5)]
)
def test_m22_outlier_that_cannot_be(
    path: Path, key: str, row: int, block: int, index: int, value: float
) -> None:
    header, records = make_file(TENSORS, "Q4_1_O", 100, table_type="Q4_1_O")
    blocks = np.frombuffer(records[key].data, quants.layout(100, "Q4_1_O")).copy()
    blocks = blocks.reshape(TENSORS[key].shape[0], -1)
    blocks["index"][row, block] = index
    blocks["outlier"][row, block] = value
    records[key] = replace(records[key], data=blocks.tobytes())
    write_records(path, header, records.values())
    number = row * blocks.shape[1] + block % blocks.shape[1]
    with pytest.raises(RWKVFileError, match=f"'{key}': block {number} of Q4_1_O"):
        load_rwkv_shared_library().rwkv_load(path, 2)


def test_m22_no_outlier(path: Path) -> None:
    """A block of zeros has index 0xFFFF; a nibble in the slot of an outlier means nothing."""
    tensors = {key: values.copy() for key, values in TENSORS.items()}
    for key in MATRICES:
        tensors[key][3] = 0
    model = write_model(path, tensors, "Q4_1_O", 100, table_type="Q4_1_O")
    np.testing.assert_array_equal(logits(path), wanted(model))

    header, records = make_file(tensors, "Q4_1_O", 100, table_type="Q4_1_O")
    for key in MATRICES:
        blocks = np.frombuffer(records[key].data, quants.layout(100, "Q4_1_O")).copy()
        taken = blocks["index"] < 32
        slots = blocks["index"][taken]
        bytes_of_slots = blocks["qs"][taken]
        bytes_of_slots[np.arange(len(slots)), slots // 2] |= np.where(slots % 2, 0xB0, 0x0B).astype(
            np.uint8
        )
        blocks["qs"][taken] = bytes_of_slots
        records[key] = replace(records[key], data=blocks.tobytes())
    write_records(path, header, records.values())
    np.testing.assert_array_equal(logits(path), wanted(model))


@pytest.mark.parametrize("type_name", ["FP32", "FP16", "Q5_1"])
def test_m23_any_order_and_alignment(path: Path, type_name: str) -> None:
    """Data of tensors lies at odd addresses as a rule; each order makes others."""
    draw = random.Random(23)
    model = encode(TENSORS, type_name)
    for _ in range(4):
        order = list(TENSORS)
        draw.shuffle(order)
        write_model(path, TENSORS, type_name, order=order)
        for mmap in (True, False):
            np.testing.assert_array_equal(logits(path, mmap=mmap), wanted(model))


def test_m24_truncated_after_loading(path: Path) -> None:
    write_model(path, TENSORS)
    with RWKVModel(None, path, 1, mmap=False) as model:
        before, _ = model.eval_sequence(TOKENS, None)
        os.truncate(path, 0)
        after, _ = model.eval_sequence(TOKENS, None)
    np.testing.assert_array_equal(before, after)


def test_m25_file_that_shrinks_while_it_is_read(path: Path) -> None:
    """Loading ends well or with an error, whatever moment the other side chooses."""
    write_model(path, TENSORS)
    data = path.read_bytes()
    stop = threading.Event()

    def shrink_and_grow() -> None:
        while not stop.is_set():
            os.truncate(path, len(data) // 2)
            path.write_bytes(data)

    thread = threading.Thread(target=shrink_and_grow)
    thread.start()
    try:
        for _ in range(200):
            with contextlib.suppress(RWKVFileError):
                load_rwkv_shared_library().rwkv_load(path, 1, mmap=False).free()
    finally:
        stop.set()
        thread.join()


# ---- the file itself ----


def test_m26_not_a_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(tmp_path, "is a folder, not a file")
    refused(fifo, "is not a regular file")
    refused(loop, "cannot open for reading")
    refused(tmp_path / "missing", "cannot open for reading: No such file or directory")
    refused(tmp_path / ("x" * 256), "cannot open for reading: File name too long")


def test_m26_names_of_any_bytes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xffl \xe2\x82\xac.bin"))
    write_model(path, TENSORS)
    np.testing.assert_array_equal(logits(path), wanted(encode(TENSORS)))


def test_m27_sparse_terabyte(path: Path) -> None:
    header, records = make_file(TENSORS)
    write_records(path, header, records.values())
    size = path.stat().st_size
    try:
        os.truncate(path, 1 << 40)
    except OSError:
        pytest.skip("the file system has no files of a terabyte")
    refused(path, f"at byte {size}")


LIMITED = """
import resource, sys
from rwkv_cpp.library import load_rwkv_shared_library
library = load_rwkv_shared_library()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (32 << 20), resource.RLIM_INFINITY))
for mmap in (True, False):
    try:
        library.rwkv_load(sys.argv[1], 1, mmap=mmap)
    except MemoryError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_m28_not_enough_memory(path: Path) -> None:
    """A model of 128 MiB, most of them a hole in the file, in a process that may have 32 more."""
    n_vocab = 1 << 19
    header, records = make_file(TENSORS)
    with path.open("wb") as file:
        file.write(replace(header, n_vocab=n_vocab).to_bytes())
        for key, record in records.items():
            if key in ("emb.weight", "head.weight"):
                hole = replace(record, dims=(32, n_vocab), data=b"")
                file.write(hole.to_bytes())
                file.seek(n_vocab * 32 * 4, os.SEEK_CUR)
            else:
                file.write(record.to_bytes())
        file.truncate()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert "cannot map" in lines[0]
    assert "out of memory: the model needs" in lines[1]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_m28_failing_loads_leave_nothing(path: Path) -> None:
    changed(path, "head.weight", dims=(32, 9), data=bytes(9 * 32 * 4))
    refused(path, "expected shape")
    files = open_files()
    for _ in range(100):
        refused(path, "expected shape")
    assert open_files() == files


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "cycles",
    [pytest.param(300, id="300"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)],
)
def test_m28_loads_and_frees_leave_nothing(path: Path, cycles: int) -> None:
    write_model(path, TENSORS, "Q4_0")
    library = load_rwkv_shared_library()

    def cycle() -> None:
        for _ in range(cycles):
            with RWKVModel(library, path, 2) as model:
                model.eval(1, None)

    cycle()
    files, memory = open_files(), resident()
    cycle()
    assert open_files() == files
    assert resident() - memory < 4 << 20
