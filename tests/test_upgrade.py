"""upgrade.py: what version 101 holds of a file of version 100, and what it says of the loss."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from commands import rwkv
from models import make_file, random_model, read_model, write_model, write_records
from reference import quants
from rwkv_cpp import RWKVFileError, RWKVModel
from rwkv_cpp.ggmf import read_index, read_rows
from rwkv_cpp.upgrade import upgrade

MODEL = random_model(1, n_vocab=50, n_embed=64, n_layer=2, n_ffn=160)
MATRICES = [key for key, values in MODEL.items() if values.ndim == 2 and key.startswith("blocks")]
KEY = "blocks.1.ffn.key.weight"
KEPT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
GONE = ["Q4_1_O", "Q4_2", "Q4_3"]
TOKENS = list(b"To be, or not to be")


@pytest.fixture
def refused(tmp_path):
    """Such a file is refused with a text that matches; a previous target stays."""
    target = tmp_path / "out" / "new.bin"

    def check(source: Path, match: str, error: type = RWKVFileError, **options) -> None:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"old")
        with pytest.raises(error, match=match):
            upgrade(source, target, **options)
        assert target.read_bytes() == b"old"
        assert os.listdir(target.parent) == ["new.bin"]

    return check


def logits(path: Path) -> np.ndarray:
    with RWKVModel(None, path, thread_count=1) as model:
        return model.eval_sequence([token % 50 for token in TOKENS], None)[0].copy()


def scales(blocks: quants.Blocks) -> np.ndarray:
    parts = [blocks.d] if blocks.m is None else [blocks.d, blocks.m]
    return np.concatenate([part.reshape(-1) for part in parts]).astype(np.float64)


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_formats_of_both_versions(tmp_path, name):
    source, target = tmp_path / "old.bin", tmp_path / "new.bin"
    old = write_model(source, MODEL, name, 100, {"head.weight": "FP16"})
    calls = []
    changes = upgrade(source, target, progress=lambda *call: calls.append(call))

    header, records = read_index(target)
    assert (header.version, header.data_type) == (101, quants.TYPE_IDS[name])
    assert [record.key for record in records] == list(old)
    new = read_model(target)
    roundings = []
    for key, tensor in old.items():
        assert (new[key].name, new[key].shape) == (tensor.name, tensor.shape)
        if key not in MATRICES:
            assert np.array_equal(new[key].data, tensor.data)
            continue
        blocks = quants.unpack(100, name, tensor.data)
        assert np.array_equal(new[key].data, quants.pack(101, name, blocks)), key
        before, after = scales(blocks), scales(quants.unpack(101, name, new[key].data))
        roundings.append(np.abs(after / before - 1)[before != 0])
    changes = {str(change.source): change for change in changes}
    assert {kind: change.tensors for kind, change in changes.items()} == {
        "FP32": len(old) - len(MATRICES) - 1,
        "FP16": 1,
        name: len(MATRICES),
    }
    roundings = np.concatenate(roundings)
    change = changes[name]
    assert str(change.target) == name
    if name in ("Q5_0", "Q5_1"):
        assert np.all(roundings == 0)
        assert change.scales == 0
    else:
        assert change.scales == len(roundings)
        assert change.largest_rounding == roundings.max() > 1e-4
        assert change.mean_rounding == pytest.approx(roundings.mean())
    assert changes["FP32"].scales == changes["FP32"].weights == 0
    total = sum(tensor.data.size for tensor in old.values())
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1"])
def test_the_same_logits_to_the_bit(tmp_path, name):
    write_model(tmp_path / "old.bin", MODEL, name, 100)
    upgrade(tmp_path / "old.bin", tmp_path / "new.bin")
    assert np.array_equal(logits(tmp_path / "old.bin"), logits(tmp_path / "new.bin"))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", *GONE])
def test_nearly_the_same_logits(tmp_path, name):
    """Far closer to the old file than that is to the original: below a tenth, with the Q8_0 that
    takes the place of 4 bits below a half."""
    write_model(tmp_path / "original.bin", MODEL, "FP32")
    write_model(tmp_path / "old.bin", MODEL, name, 100)
    upgrade(tmp_path / "old.bin", tmp_path / "new.bin", lossy=True)
    original, old, new = (logits(tmp_path / f"{each}.bin") for each in ("original", "old", "new"))
    assert not np.array_equal(old, new)
    distance = np.linalg.norm(new - old) / np.linalg.norm(old - original)
    assert distance < (0.5 if name in GONE else 0.1)


@pytest.mark.parametrize("name", GONE)
def test_formats_that_version_101_lacks(tmp_path, name):
    source, target = tmp_path / "old.bin", tmp_path / "new.bin"
    old = write_model(source, MODEL, name, 100)
    change = next(each for each in upgrade(source, target, lossy=True) if each.weights)

    errors = {}
    for choice in quants.formats(101):
        values = [(old[key].values(), old[key].shape) for key in MATRICES]
        pairs = [(a, quants.Tensor.of(101, choice, a).values()) for a, _ in values]
        squares = sum(np.sum((a.astype(np.float64) - b) ** 2) for a, b in pairs)
        total = sum(np.sum(a.astype(np.float64) ** 2) for a, _ in pairs)
        largest = max(np.abs(a.astype(np.float64) - b).max() for a, b in pairs)
        errors[choice] = np.sqrt(squares / total), largest
    best = min(errors, key=errors.__getitem__)
    assert str(change.target) == best
    assert (change.error, change.largest_difference) == pytest.approx(errors[best])
    assert change.weights == sum(MODEL[key].size for key in MATRICES)
    new = read_model(target)
    for key in MATRICES:
        expected = quants.Tensor.of(101, best, old[key].values())
        assert np.array_equal(new[key].data, expected.data), key
    assert read_index(target)[0].data_type == quants.TYPE_IDS[best]


def test_the_choice_depends_on_the_weights(tmp_path):
    """Blocks in which one weight is larger than the others by far: Q8_0 has one scale for them all,
    Q4_1_O keeps the one apart. Nothing fits well, and the measure says so."""
    tensors = dict(MODEL)
    for key in MATRICES:
        tensors[key] = MODEL[key].copy()
        tensors[key][:, ::32] *= 3000
    source = tmp_path / "old.bin"
    old = write_model(source, tensors, "Q4_1_O", 100)
    (change,) = (each for each in upgrade(source, tmp_path / "new.bin", lossy=True) if each.weights)
    values = {key: old[key].values() for key in MATRICES}

    def loss(choice: str) -> float:
        return sum(
            float(np.sum((quants.Tensor.of(101, choice, each).values() - each) ** 2.0))
            for each in values.values()
        )

    assert str(change.target) == min(quants.formats(101), key=loss)


@pytest.mark.parametrize("name", quants.PLAIN)
def test_plain_files_change_their_version_only(tmp_path, name):
    write_model(tmp_path / "old.bin", MODEL, name, 100)
    changes = upgrade(tmp_path / "old.bin", tmp_path / "new.bin")
    old, new = (tmp_path / each for each in ("old.bin", "new.bin"))
    assert new.read_bytes() == old.read_bytes().replace(b"d\0\0\0", b"e\0\0\0", 1)
    assert all(change.scales == change.weights == 0 for change in changes)


def test_a_header_with_another_type(tmp_path):
    """It is information only."""
    source, target = tmp_path / "old.bin", tmp_path / "new.bin"
    header, records = make_file(MODEL, "FP16", 100, dict.fromkeys(MATRICES, "Q5_1"))
    for name, expected in (("Q4_2", "Q5_1"), ("FP16", "FP16")):
        header.data_type = quants.TYPE_IDS[name]
        write_records(source, header, records.values())
        upgrade(source, target)
        assert read_index(target)[0].data_type == quants.TYPE_IDS[expected]


def test_many_slabs(tmp_path, monkeypatch):
    """Rows in pieces give what rows at once give."""
    source = tmp_path / "old.bin"
    write_model(source, MODEL, "Q4_1", 100)
    upgrade(source, tmp_path / "whole.bin")
    monkeypatch.setattr("rwkv_cpp.upgrade.read_rows", lambda *where: read_rows(*where, 99))
    upgrade(source, tmp_path / "pieces.bin")
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "pieces.bin").read_bytes()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FP16", "Q5_1"])
def test_a_file_of_version_101(tmp_path, refused, name):
    write_model(tmp_path / "model.bin", MODEL, name, 101)
    refused(tmp_path / "model.bin", "is of version 101 already")


@pytest.mark.parametrize("name", GONE)
def test_a_loss_has_to_be_accepted(tmp_path, refused, name):
    write_model(tmp_path / "model.bin", MODEL, name, 100)
    refused(
        tmp_path / "model.bin",
        rf"{len(MATRICES)} matrices are in {name}, .*Q8_0 loses least \(.*0\.\d\d%\); --lossy",
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("value", [65520.0, -1e30, np.inf, np.nan])
def test_scales_beyond_half_precision(tmp_path, refused, name, value):
    header, records = make_file(MODEL, name, 100)
    data = bytearray(records[KEY].data)
    size = quants.block_bytes(100, name)
    for block in (0, 5):
        data[block * size : block * size + 4] = struct.pack("<f", value)
    records[KEY].data = bytes(data)
    write_records(tmp_path / "model.bin", header, records.values())
    refused(tmp_path / "model.bin", rf"{KEY}: 2 of \d+ scales are not finite as half-precision")


def test_the_largest_scale(tmp_path):
    header, records = make_file(MODEL, "Q4_0", 100)
    records[KEY].data = struct.pack("<f", 65519.0) + records[KEY].data[4:]
    write_records(tmp_path / "old.bin", header, records.values())
    upgrade(tmp_path / "old.bin", tmp_path / "new.bin")
    assert read_model(tmp_path / "new.bin")[KEY].data.view("<f2")[0, 0] == 65504


def test_scales_that_vanish_are_reported(tmp_path):
    header, records = make_file(MODEL, "Q8_0", 100)
    records[KEY].data = struct.pack("<f", 1e-9) + records[KEY].data[4:]
    write_records(tmp_path / "old.bin", header, records.values())
    changes = upgrade(tmp_path / "old.bin", tmp_path / "new.bin")
    assert max(change.largest_rounding for change in changes) == 1


@pytest.mark.parametrize("lossy", [False, True])
def test_damaged_blocks(tmp_path, refused, lossy):
    header, records = make_file(MODEL, "Q4_1_O", 100)
    good = records[KEY].data
    records[KEY].data = good[:28] + struct.pack("<H", 32) + good[30:]
    write_records(tmp_path / "model.bin", header, records.values())
    refused(tmp_path / "model.bin", rf"{KEY}: block 1 of Q4_1_O has an outlier", lossy=lossy)
    records[KEY].data = struct.pack("<e", np.nan) + good[2:]
    write_records(tmp_path / "model.bin", header, records.values())
    refused(tmp_path / "model.bin", rf"{KEY}: 31 of \d+ values are NaN or infinite", lossy=lossy)


def test_files_that_are_no_models(tmp_path, refused):
    source = tmp_path / "model.bin"
    write_model(source, MODEL, "Q5_1", 100)
    whole = source.read_bytes()
    source.write_bytes(whole[:-1])
    refused(source, "truncated")
    source.write_bytes(b"PK\3\4" + whole)
    refused(source, "rwkv convert")
    refused(tmp_path / "absent", "absent: cannot open for reading: No such file")


def test_a_source_that_shrinks(tmp_path, refused):
    source = tmp_path / "model.bin"
    write_model(source, MODEL, "Q5_1", 100)
    whole = source.stat().st_size

    def shrink(done: int, total: int) -> None:
        os.truncate(source, whole // 2)

    refused(source, "became shorter while it was read", progress=shrink)


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_same_file(tmp_path, link):
    source = tmp_path / "model.bin"
    write_model(source, MODEL, "Q5_1", 100)
    before = source.read_bytes()
    link(source, tmp_path / "link.bin")
    for target in (source, tmp_path / "link.bin"):
        with pytest.raises(ValueError, match="same file"):
            upgrade(source, target)
    assert source.read_bytes() == before


# ---- the command --------------------------------------------------------------------------------


def test_command(tmp_path):
    source, target = tmp_path / "old.bin", tmp_path / "new.bin"
    types = dict(zip(MATRICES, ["Q5_1", "Q4_0", "Q4_2"], strict=False))
    write_model(source, MODEL, "FP16", 100, types)
    done = rwkv("upgrade", source, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*: 1 matrices are in Q4_2, .*--lossy .*\n", done.stderr)
    assert not target.exists()
    done = rwkv("upgrade", source, target, "--lossy")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    expected = [
        r" +\d+ x FP16   unchanged",
        r" +\d+ x FP32   unchanged",
        r" +1 x Q5_1   the same bits in another order",
        r" +1 x Q4_0   scales rounded, by 0\.0\d+% at most and 0\.0\d+% on average",
        r" +1 x Q4_2   quantized again, as Q8_0: weights change by 0\.\d\d% \(root.*",
        rf"{re.escape(str(target))}: [\d,]+ bytes, {re.escape(str(source))}: [\d,]+",
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    done = rwkv("upgrade", target, tmp_path / "again.bin")
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {target}: is of version 101 already, there is nothing to do\n",
    )
    assert "rwkv upgrade model-april.bin model.bin" in rwkv("upgrade", "--help").stdout
