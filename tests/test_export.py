"""export.py: model files become checkpoints, from which the same model files come again."""

import math
import os
import re
from pathlib import Path

import checkpoints as make
import numpy as np
import pytest
from commands import rwkv
from models import make_file, random_model, read_model, write_model, write_records
from reference import quants
from rwkv_cpp.checkpoint import open_checkpoint
from rwkv_cpp.convert import convert
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.export import export
from rwkv_cpp.weights import restore, transform

MODEL = random_model(1, n_vocab=50, n_embed=32, n_layer=2, n_ffn=96)
MATRICES = [key for key, values in MODEL.items() if values.ndim == 2 and key.startswith("blocks")]
SUFFIXES = [".pth", ".safetensors"]
FORMATS = [(100, "FP32"), (101, "FP16"), *quants.LAYOUTS]


def trained(decays: np.ndarray) -> dict[str, np.ndarray]:
    """What a checkpoint holds; `decays` (float32) stand in for w."""
    tensors = dict(MODEL)
    for key, values in tensors.items():
        if key.endswith("time_decay"):
            tensors[key] = np.resize(decays, values.shape).astype(np.float32)
        if "time_mix" in key:
            tensors[key] = values.reshape(1, 1, -1)
    return tensors


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
@pytest.mark.parametrize("source", FORMATS)
def test_tensors(tmp_path, source, data_type, suffix):
    version, name = source
    model = write_model(tmp_path / "model.bin", MODEL, name, version)
    target = tmp_path / f"model{suffix}"
    calls = []
    header = export(
        tmp_path / "model.bin", target, data_type, progress=lambda *call: calls.append(call)
    )
    assert (header.version, header.n_vocab, header.n_embed, header.n_layer) == (version, 50, 32, 2)
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.keys() == list(model)
        for key, tensor in model.items():
            expected = tensor.values()
            if expected.ndim == 2 and data_type == "FP16":
                expected = expected.astype(np.float16)
            if key.endswith("time_decay"):
                expected = np.float32([math.log(-x) for x in expected.tolist()])
            assert checkpoint.dtype(key) == expected.dtype.name
            mixes = ".time_mix_" in key
            assert checkpoint.shape(key) == ((1, 1, 32) if mixes else tensor.shape), key
            assert np.array_equal(checkpoint.read(key).reshape(tensor.shape), expected), key
    total = sum(values.size for values in MODEL.values())
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_the_same_file_again(tmp_path, data_type, suffix):
    random = np.random.default_rng(1)
    decays = random.uniform(-9, 2, 64).astype(np.float32)
    (tmp_path / "a.pth").write_bytes(make.torch_zip(trained(decays)))
    convert(tmp_path / "a.pth", tmp_path / "a.bin", data_type)
    export(tmp_path / "a.bin", tmp_path / f"b{suffix}", data_type)
    convert(tmp_path / f"b{suffix}", tmp_path / "b.bin", data_type)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_a_tiny_attention_passes_through(tmp_path):
    sizes = {"n_vocab": 50, "n_embed": 32, "n_layer": 2, "n_tiny": 16, "tiny_layer": 1}
    write_model(tmp_path / "a.bin", random_model(1, **sizes), "FP16")
    export(tmp_path / "a.bin", tmp_path / "a.pth")
    with open_checkpoint(tmp_path / "a.pth") as checkpoint:
        assert checkpoint.shape("blocks.1.tiny_q.weight") == (16, 32)
    convert(tmp_path / "a.pth", tmp_path / "b.bin")
    tensors = [read_model(tmp_path / name) for name in ("a.bin", "b.bin")]
    assert list(tensors[0]) == list(tensors[1])
    for key in tensors[0]:
        if not key.endswith("time_decay"):
            assert np.array_equal(tensors[0][key].data, tensors[1][key].data), key


def test_decays_of_every_size(tmp_path):
    """-exp(w) comes back to the bit for whatever float32 w; w itself too, where it is beyond 1, and
    elsewhere within the rounding of exp(w)."""
    random = np.random.default_rng(2)
    pieces = [random.uniform(-104, 88, 20000), random.uniform(-12, 3, 60000)]
    pieces += [random.uniform(-1, 1, 20000), 10.0 ** random.uniform(-30, 0, 5000)]
    w = np.concatenate([*pieces, [0.0, -0.0, -200.0, -103.9, -104.0, 88.7]]).astype(np.float32)
    name = "blocks.0.att.time_decay"
    in_file = transform("w", name, w)
    again = restore("w", name, in_file)
    assert np.array_equal(transform("w", name, again), in_file)
    assert again.shape == w.shape
    beyond = (np.abs(w) >= 1) & (w > -87)  # where exp(w) has all its bits
    assert np.array_equal(again[beyond], w[beyond])
    near = np.abs(w) < 1
    assert np.max(np.abs(again[near] - w[near])) <= 2.0**-23


def test_decays_that_are_0_or_above(tmp_path):
    header, records = make_file(MODEL)
    name = "blocks.1.att.time_decay"
    values = np.frombuffer(records[name].data, "<f4").copy()
    values[:2] = 0.0, -0.0
    records[name].data = values.tobytes()
    write_records(tmp_path / "a.bin", header, records.values())
    export(tmp_path / "a.bin", tmp_path / "a.pth", "FP32")
    with open_checkpoint(tmp_path / "a.pth") as checkpoint:
        assert np.all(checkpoint.read(name)[:2] == -104)
    values[3] = 1e-9
    records[name].data = values.tobytes()
    write_records(tmp_path / "a.bin", header, records.values())
    with pytest.raises(RWKVFileError, match=rf"{name}: 1 of 32 values are above 0, expected -exp"):
        export(tmp_path / "a.bin", tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


def test_torch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    write_model(tmp_path / "a.bin", MODEL, "Q5_1")
    export(tmp_path / "a.bin", tmp_path / "a.pth")
    tensors = torch.load(tmp_path / "a.pth", weights_only=True)
    assert tensors["emb.weight"].dtype == torch.float16
    assert tensors["blocks.0.ln0.bias"].dtype == torch.float32
    assert tensors["blocks.1.att.time_mix_k"].shape == (1, 1, 32)
    values = read_model(tmp_path / "a.bin")["blocks.1.ffn.value.weight"].values()
    found = tensors["blocks.1.ffn.value.weight"].numpy()
    assert np.array_equal(found, values.astype(np.float16))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    target = tmp_path / "out" / "model.pth"

    def check(source: Path, match: str, error: type = RWKVFileError, **options) -> None:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"old")
        with pytest.raises(error, match=match):
            export(source, target, **options)
        assert target.read_bytes() == b"old"
        assert os.listdir(target.parent) == ["model.pth"]

    return check


def test_values_without_a_place(tmp_path, refused):
    source, key = tmp_path / "model.bin", "blocks.1.ffn.key.weight"
    hot = MODEL[key].copy()
    hot[0, :3] = 70000, -1e30, 65520
    write_model(source, MODEL | {key: hot})
    refused(source, rf"{key}: 3 of \d+ values are beyond 65504.*--clamp")
    export(source, tmp_path / "clamped.pth", clamp=True)
    with open_checkpoint(tmp_path / "clamped.pth") as checkpoint:
        assert checkpoint.read(key)[0, :3].tolist() == [65504, -65504, 65504]
    export(source, tmp_path / "a.pth", "FP32")
    hot[0, 0] = np.nan
    write_model(source, MODEL | {key: hot})
    refused(source, rf"{key}: 1 of \d+ values are NaN or infinite \(--allow-nan", clamp=True)
    export(source, tmp_path / "a.pth", "FP32", allow_nan=True)


def test_damaged_files(tmp_path, refused):
    source = tmp_path / "model.bin"
    write_model(source, MODEL, "Q5_1")
    whole = source.read_bytes()
    source.write_bytes(whole[:-1])
    refused(source, "truncated")
    header, records = make_file(MODEL, "Q4_1_O", 100)
    record = records[MATRICES[-1]]
    record.data = record.data[:4] + b"\x20\0" + record.data[6:]
    write_records(source, header, records.values())
    refused(source, rf"{MATRICES[-1]}: block 0 of Q4_1_O has an outlier")


def test_wrong_arguments(tmp_path):
    source = tmp_path / "model.bin"
    write_model(source, MODEL)
    with pytest.raises(
        ValueError, match=r"other\.bin: expected a name that ends in \.pth or \.saf"
    ):
        export(source, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="unknown data type 'Q4_0'"):
        export(source, tmp_path / "other.pth", "Q4_0")
    os.link(source, tmp_path / "link.pth")
    with pytest.raises(ValueError, match="same file"):
        export(source, tmp_path / "link.pth")


# ---- the command --------------------------------------------------------------------------------


def test_command(tmp_path):
    model, target = tmp_path / "model.bin", tmp_path / "model.pth"
    write_model(model, MODEL, "FP16")
    done = rwkv("convert", model, target)
    size = f"{target.stat().st_size:,}"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: {size} bytes, 2 layers of 32, vocabulary of 50\n"
    assert rwkv("convert", target, tmp_path / "again.bin").returncode == 0
    done = rwkv("convert", model, tmp_path / "other.bin")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"error: .*other\.bin: expected a name that ends in \.pth or ", done.stderr)
    done = rwkv("convert", model, target, "--key", "model")
    assert "--key model: " in done.stderr
    # From one kind of checkpoint to the other.
    assert rwkv("convert", target, tmp_path / "a.safetensors").returncode == 0
    assert rwkv("convert", tmp_path / "a.safetensors", tmp_path / "b.pth").returncode == 0
    assert (tmp_path / "b.pth").read_bytes() == target.read_bytes()
