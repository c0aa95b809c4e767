"""info.py: what a file holds, counted from its tensors."""

import re

import pytest
from commands import rwkv
from models import random_model, write_model
from reference import quants
from rwkv_cpp import RWKVFileError, load_rwkv_shared_library
from rwkv_cpp.info import SIZES, inspect, megabytes, sizes


@pytest.fixture(scope="module")
def tensors():
    return random_model(4, n_vocab=50, n_embed=32, n_layer=2)


def test_inspect(tmp_path, tensors):
    path = tmp_path / "model.bin"
    file = write_model(path, tensors, "Q5_1", 100, types={"head.weight": "FP16"})
    info = inspect(path)
    assert (info.header.version, info.header.n_vocab, info.header.n_layer) == (100, 50, 2)
    assert info.n_weights == sum(array.size for array in tensors.values())
    assert info.memory.file == path.stat().st_size
    for name in ("FP32", "FP16", "Q5_1"):
        held = [tensor.data.nbytes for tensor in file.values() if tensor.name == name]
        assert info.types[name] == (len(held), sum(held))
    assert len(info.types) == 3


def test_tiny_attention(tmp_path, tensors):
    path = tmp_path / "model.bin"
    write_model(path, tensors)
    plain = inspect(path)
    tiny = random_model(4, n_vocab=50, n_embed=32, n_layer=2, n_tiny=7, tiny_layer=1)
    write_model(path, tiny)
    info = inspect(path)
    assert plain.arch == "RWKV-4"
    assert info.arch == "RWKV-4a, a tiny attention of 7 after layer 1"
    assert info.memory.state == plain.memory.state + 7 * 32 * 4
    assert info.memory.scratch - plain.memory.scratch >= 2 * 256 * 7 * 4 + 7 * 32 * 4
    assert info.memory.token - plain.memory.token == (2 * 7 + 32 + 2) * 32 * 4
    assert info.arch in rwkv("info", "-m", path).stdout


def test_bad_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(RWKVFileError, match=r"model\.bin.*zip|model\.bin.*PyTorch"):
        inspect(tmp_path / "model.bin")


def test_sizes_are_those_of_such_models():
    library = load_rwkv_shared_library()
    table = sizes()
    assert list(table) == list(quants.TYPE_IDS)
    for name, row in table.items():
        assert list(row) == list(SIZES)
        version = 101 if (101, name) in quants.LAYOUTS or name in quants.PLAIN else 100
        for size, (n_layer, n_embed) in SIZES.items():
            blocks = 13 * n_embed * n_layer  # rows of n_embed weights
            plain = "FP32" if name == "FP32" else "FP16"
            weights = blocks * quants.row_bytes(version, name, n_embed)
            weights += 2 * 50277 * quants.row_bytes(version, plain, n_embed)
            assert weights <= row[size].file <= 1.01 * weights
            assert row[size].state == 4 * 5 * n_layer * n_embed
            assert row[size].total < 1.3 * row[size].file + 256e6
    one = library.rwkv_estimate_shape(50277, 768, 12, "Q4_0")
    assert table["Q4_0"]["169M"] == one


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0.00 MB"),
        (4_184_000, "4.18 MB"),
        (71_349_000, "71.3 MB"),
        (713_490_000, "713 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (28_314_000_000, "28.3 GB"),
    ],
)
def test_megabytes(n_bytes, text):
    assert megabytes(n_bytes) == text


def test_command(tmp_path, tensors):
    path = tmp_path / "model.bin"
    write_model(path, tensors, "Q4_0")
    done = rwkv("info", "-m", path)
    assert (done.returncode, done.stderr) == (0, "")
    for text in (str(path), "n_layer 2", "Q4_0", "FP32", "scratch", "ISA="):
        assert text in done.stdout
    assert "ISA=" in rwkv("info").stdout
    done = rwkv("info", "--sizes")
    assert re.search(r"\n +169M +430M +1B5 +3B +7B +14B\n", done.stdout)
    assert re.search(r"\nQ4_1_O( +[\d.]+ [MG]B){6}\n", done.stdout)
    assert rwkv("info", "--sizes", "-m", path).returncode == 2  # nothing is passed over in silence
    done = rwkv("info", "-m", tmp_path / "missing.bin")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
