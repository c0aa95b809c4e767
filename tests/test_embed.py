"""`rwkv embed`: what it reads, writes and refuses; test_embedding.py has the numbers."""

import json
import shutil

import numpy as np
import pytest
from commands import rwkv
from models import random_model, write_model
from rwkv_cpp import RWKV, Normalizer
from rwkv_cpp.checkpoint import pack_safetensors

TEXTS = ["To be, or not to be", "", "é", "a\nb", "x" * 300, "To be"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of one model in two formats, and of another one."""
    folder = tmp_path_factory.mktemp("embed")
    tensors = random_model(2, n_embed=32, n_layer=3)
    for name in ("FP32", "Q4_0"):
        write_model(folder / f"{name}.bin", tensors, name)
    write_model(folder / "other.bin", random_model(3, n_embed=32, n_layer=3))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    with RWKV(folder / "FP32.bin", n_threads=1) as model:
        yield model


def test_lines(model, folder, tmp_path):
    (tmp_path / "lines.txt").write_bytes("one\r\n\ntwo é\nlast".encode())
    (tmp_path / "more.jsonl").write_text('{"text": "a\\nb"}\n\n')
    done = rwkv(
        "embed",
        "lines.txt",
        "more.jsonl",
        "-m",
        folder / "FP32.bin",
        "--layers",
        "0,2",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = np.array([json.loads(line) for line in done.stdout.splitlines()], np.float32)
    texts = ["one", "", "two é", "last", "a\nb"]
    assert rows.tobytes() == model.embed(texts, layers=[0, 2]).tobytes()


def test_whole_files_and_stdin(model, folder, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    arguments = ["embed", "-m", folder / "FP32.bin", "--parts", "aa/bb"]
    done = rwkv(*arguments, tmp_path / "a.txt", "--whole", "-o", tmp_path / "o.npy")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'o.npy'}: 1 texts, 96 values each\n")
    found = np.load(tmp_path / "o.npy")
    assert found.tobytes() == model.embed(["one\ntwo\n"], parts=["aa/bb"]).tobytes()
    done = rwkv(*arguments, input=b"one\ntwo\n")
    rows = np.array([json.loads(line) for line in done.stdout.splitlines()], np.float32)
    assert rows.tobytes() == model.embed(["one", "two"], parts=["aa/bb"]).tobytes()
    done = rwkv(*arguments, input=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_normalizer_of_the_rwkv(model, folder, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    arguments = ["embed", "lines.txt", "--normalizer", "n"]
    done = rwkv(*arguments, "--fit", "-m", folder / "Q4_0.bin", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "n: fitted on 7 texts\n")
    done = rwkv(*arguments, "-m", folder / "FP32.bin", "-o", "o.npy", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = "\n".join(TEXTS).split("\n")
    wanted = model.embed(lines, normalizer=Normalizer.load(tmp_path / "n"))
    assert np.load(tmp_path / "o.npy").tobytes() == wanted.tobytes()
    done = rwkv(*arguments, "-m", folder / "other.bin", cwd=tmp_path)
    assert done.returncode == 1
    assert "fitted on another model" in done.stderr


def test_lora(model, folder, tmp_path):
    """A normalizer of the model alone does not fit the model with a LoRA."""
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    (tmp_path / "lora").write_bytes(pack_safetensors({"blocks.1.ln1.bias": bias}, {}))
    arguments = ["embed", "lines.txt", "-m", folder / "FP32.bin", "--lora", "lora", "8"]
    assert rwkv(*arguments, "-o", "o.npy", cwd=tmp_path).returncode == 0
    with RWKV(folder / "FP32.bin", n_threads=1, lora=[(tmp_path / "lora", 8)]) as with_lora:
        wanted = with_lora.embed(["one", "two"])
    assert np.load(tmp_path / "o.npy").tobytes() == wanted.tobytes()
    model.fit_normalizer(TEXTS).save(tmp_path / "n")
    done = rwkv(*arguments, "--normalizer", "n", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "fitted on another model" in done.stderr
    shutil.copy(tmp_path / "lora", tmp_path / "lora.npy")
    done = rwkv(*arguments[:-2], "lora.npy", "8", "-o", "lora.npy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "same file" in done.stderr


def test_errors_of_the_rwkv(folder, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "wrong.txt").write_bytes(b"\xff")
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    names = {path.name for path in tmp_path.iterdir()}
    shutil.copy(folder / "FP32.bin", tmp_path / "model.npy")
    names.add("model.npy")
    for arguments, code, message in (
        (["a.txt", "--fit"], 2, "--fit needs --normalizer"),
        (["a.txt", "--fit", "--normalizer", "n", "--layers", "0"], 2, "all layers and parts"),
        (["a.txt", "-o", "a.txt"], 2, "ends in .npy"),
        (["a.txt", "--layers", "2-1"], 2, "expected numbers and ranges"),
        (["a.txt", "--layers", "x"], 2, "expected numbers and ranges"),
        (["a.txt", "--parts", "pp"], 2, "expected some of att_xx"),
        (["a.txt", "--layers", "7"], 1, "layers: expected 0 to 2"),
        (["a.txt", "--fit", "--normalizer", "a.txt"], 1, "same file"),
        (["a.txt", "-m", "model.npy", "--fit", "--normalizer", "model.npy"], 1, "same file"),
        (["a.txt", "-m", "model.npy", "-o", "model.npy"], 1, "same file"),
        (["a.txt", "-o", "model.npy", "--normalizer", "model.npy"], 1, "same file"),
        (["a.txt", "--normalizer", "a.txt"], 1, "expected a normalizer, this is"),
        (["a.txt", "--normalizer", "missing"], 1, "missing: No such file"),
        (["missing.txt"], 1, "missing.txt: No such file"),
        (["wrong.txt"], 1, "not UTF-8 at offset 0"),
        (["wrong.jsonl"], 1, "line 1: expected"),
        (["wrong.txt", "a.txt", "--fit", "--normalizer", "n"], 1, "not UTF-8"),
    ):
        done = rwkv("embed", "-m", folder / "FP32.bin", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "")
        assert message in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == names
