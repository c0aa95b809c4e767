"""models.py: what a user names, and the model file that is meant."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import safetensors, torch_zip
from commands import environment, rwkv
from models import random_model, read_model, write_model
from rwkv_cpp import ModelNotFound, RWKVFileError, find_model, models
from rwkv_cpp.convert import convert
from rwkv_cpp.model import EMBEDDED_MODEL
from rwkv_cpp.quantize import quantize_file
from rwkv_cpp.tokenizer import PUBLISHED

DATA = Path(__file__).parents[2] / "shared" / "data"
TENSORS = random_model(1, n_embed=32, n_layer=2)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("RWKV_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny.pth"
    path.write_bytes(torch_zip(TENSORS))
    return path


def converted(checkpoint: Path, format: str = "FP16") -> bytes:
    """What the commands make of a checkpoint."""
    plain = checkpoint.with_name("expected.bin")
    convert(checkpoint, plain, "FP32" if format == "FP32" else "FP16")
    if format in ("FP32", "FP16"):
        return plain.read_bytes()
    quantize_file(plain, checkpoint.with_name("quantized.bin"), format)
    return checkpoint.with_name("quantized.bin").read_bytes()


def in_cache(home: Path) -> list[str]:
    """The names of all files in the cache but the locks."""
    return sorted(
        path.name for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


# ---- Files ----


def test_nothing_named(home):
    assert find_model() == EMBEDDED_MODEL
    assert not home.exists()


def test_model_file(tmp_path, home):
    write_model(tmp_path / "model.bin", TENSORS, "Q5_1")
    for name in ("model.bin", "model", Path("model.bin"), tmp_path / "model"):
        assert find_model(name).samefile(tmp_path / "model.bin")
    assert find_model("model", "q5_1") == Path("model.bin")
    assert not home.exists()


@pytest.mark.parametrize("format", [None, "FP16", "FP32", "Q5_1", "q4_0", "9"])
def test_checkpoint(checkpoint, home, format):
    done = []
    path = find_model(checkpoint, format, lambda *numbers: done.append(numbers))
    name = {None: "FP16", "9": "Q8_0"}.get(format, format).upper()
    assert path.read_bytes() == converted(checkpoint, name)
    assert path.name.startswith("tiny.")
    assert in_cache(home) == [path.name]  # nothing unfinished is left
    assert {what for what, _, _ in done} == {"converting"} | (
        set() if name.startswith("FP") else {f"quantizing to {name}"}
    )
    assert all(0 <= part <= total for _, part, total in done)

    before = path.stat().st_mtime_ns
    done.clear()
    assert find_model(str(checkpoint.with_suffix("")), format, done.append) == path
    assert path.stat().st_mtime_ns == before
    assert done == []


def test_safetensors(tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(safetensors({key: ("F32", values) for key, values in TENSORS.items()}))
    assert find_model("tiny").read_bytes() == converted(path)


def test_quantized_from_what_is_there(checkpoint, home, monkeypatch):
    plain = find_model(checkpoint)
    monkeypatch.delattr(models, "convert")
    assert find_model(checkpoint, "Q4_0").read_bytes() == converted(checkpoint, "Q4_0")
    assert find_model(checkpoint) == plain
    assert len(in_cache(home)) == 2


def test_checkpoint_is_FP16_unless_asked(checkpoint):
    find_model(checkpoint, "Q4_0")
    find_model(checkpoint, "FP32")
    assert find_model(checkpoint).read_bytes() == converted(checkpoint)


def test_changed_checkpoint(checkpoint, home):
    old = find_model(checkpoint, "Q8_0"), find_model(checkpoint)
    status = checkpoint.stat()
    changed = {key: values + np.float32(0.01) for key, values in TENSORS.items()}
    checkpoint.write_bytes(torch_zip(changed))
    os.utime(checkpoint, ns=(status.st_atime_ns, status.st_mtime_ns))  # same time and size
    assert checkpoint.stat().st_size == status.st_size
    new = find_model(checkpoint)
    assert new.read_bytes() == converted(checkpoint)
    assert not any(path.exists() for path in old)
    assert in_cache(home) == [new.name]


def test_same_name_elsewhere(checkpoint, tmp_path):
    (tmp_path / "sub").mkdir()
    other = tmp_path / "sub" / "tiny.pth"
    other.write_bytes(torch_zip(random_model(2, n_embed=32, n_layer=2)))
    one, two = find_model(checkpoint), find_model(other)
    assert one != two
    assert one.read_bytes() == converted(checkpoint)
    assert two.read_bytes() == converted(other)
    assert find_model(checkpoint) == one


def test_model_files_are_quantized(tmp_path, home):
    path = tmp_path / "model.bin"
    write_model(path, TENSORS, "FP16")
    assert find_model(path, "FP16") == path
    made = find_model(path, "Q5_0")
    quantize_file(path, tmp_path / "expected.bin", "Q5_0")
    assert made.read_bytes() == (tmp_path / "expected.bin").read_bytes()
    with pytest.raises(RWKVFileError, match=r"model\.bin: is a model file of FP16; only a check"):
        find_model(path, "FP32")
    with pytest.raises(RWKVFileError, match="Q5_0"):
        find_model(made, "Q4_0")
    assert in_cache(home) == [made.name]


def test_unknown_format(checkpoint):
    with pytest.raises(ValueError, match=r"unknown format 'Q9' \(choose from FP32, FP16, Q4_0, "):
        find_model(checkpoint, "Q9")


def test_not_rwkv_4(tmp_path, home):
    foreign = TENSORS | {"blocks.0.att.gate.weight": TENSORS["blocks.0.att.key.weight"]}
    (tmp_path / "five.pth").write_bytes(torch_zip(foreign))
    with pytest.raises(RWKVFileError, match=r"RWKV-5\.2"):
        find_model("five", "Q5_1")
    assert in_cache(home) == []


def test_what_an_earlier_run_left(checkpoint, home, monkeypatch):
    """A run that was killed between converting and quantizing: the next one goes on from there."""
    with monkeypatch.context() as patch:
        patch.setattr(models, "quantize_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(OSError):
            find_model(checkpoint, "Q5_1")
    (left,) = in_cache(home)
    monkeypatch.delattr(models, "convert")
    path = find_model(checkpoint, "Q5_1")
    assert path.read_bytes() == converted(checkpoint, "Q5_1")
    assert left.endswith("-FP16.bin")
    assert in_cache(home) == [path.name]


def test_two_at_once(checkpoint, home):
    program = "import sys; from rwkv_cpp import find_model; print(find_model(sys.argv[1], 'Q5_1'))"
    command = [sys.executable, "-c", program, checkpoint]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        for _ in range(3)
    ]
    found = {run.communicate(timeout=60) for run in runs}
    ((out, err),) = found
    assert err == b""
    assert Path(out.decode().strip()).read_bytes() == converted(checkpoint, "Q5_1")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a POSIX user, not root")
def test_cache_that_cannot_be_written(checkpoint, home):
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(models.RWKVError, match=r"cannot be written to .*: set RWKV_HOME"):
        find_model(checkpoint)


def test_cache_that_is_a_file(checkpoint, home):
    """R-04"""
    home.touch()
    with pytest.raises(models.RWKVError, match=r"cannot be written to .*: set RWKV_HOME"):
        find_model(checkpoint)
    assert find_model() == EMBEDDED_MODEL


@pytest.mark.parametrize("vocabulary", PUBLISHED, ids=lambda vocabulary: vocabulary.name)
def test_vocabulary_beside_a_checkpoint(checkpoint, home, vocabulary):
    source = DATA / vocabulary.name
    if not source.is_file():
        pytest.skip(f"needs {vocabulary.name}")
    (checkpoint.parent / vocabulary.name).write_bytes(source.read_bytes())
    find_model(checkpoint)
    assert (home / vocabulary.name).read_bytes() == source.read_bytes()


def test_damaged_vocabulary_beside_a_checkpoint(checkpoint, home):
    (checkpoint.parent / PUBLISHED[0].name).write_bytes(b"{}")
    find_model(checkpoint)
    assert not (home / PUBLISHED[0].name).exists()


# ---- Names ----


@pytest.fixture
def pulled(home):
    """A model in the cache as `rwkv pull RWKV-4-169M` leaves it there."""
    folder = home / "models"
    folder.mkdir(parents=True)
    write_model(folder / "RWKV-4-169M-FP16.bin", TENSORS, "FP16")
    return folder


def test_name(pulled):
    for name in ("RWKV-4-169M", "169m", "BlinkDL/rwkv-4-pile-169m"):
        assert find_model(name) == pulled / "RWKV-4-169M-FP16.bin"
    quantized = find_model("RWKV-4-169M", "Q5_1")
    assert quantized == pulled / "RWKV-4-169M-Q5_1.bin"
    assert read_model(quantized)["blocks.0.att.key.weight"].name == "Q5_1"
    assert find_model("RWKV-4-169M") == pulled / "RWKV-4-169M-FP16.bin"  # the most exact
    (pulled / "RWKV-4-169M-FP16.bin").unlink()
    assert find_model("RWKV-4-169M") == quantized
    with pytest.raises(
        ModelNotFound,
        match="169M is at hand as Q5_1, not as Q8_0: 'rwkv pull 169M --format Q8_0' fetches it",
    ):
        find_model("169M", "Q8_0")
    with pytest.raises(ModelNotFound, match="not as FP32"):
        find_model("169M", "FP32")


def test_file_before_name(pulled, tmp_path):
    write_model(tmp_path / "169M", TENSORS, "Q4_0")
    assert find_model("169M") == Path("169M")
    assert find_model("RWKV-4-169M") == pulled / "RWKV-4-169M-FP16.bin"


@pytest.mark.parametrize(
    "name", ["RWKV-4-430M", "hf:someone/models/x.pth", "https://example.com/x.pth"]
)
def test_name_of_what_is_not_here(pulled, name):
    """N-05: nothing is asked of the network."""
    began = time.monotonic()
    with pytest.raises(
        ModelNotFound,
        match=f"{name} is not on this machine: 'rwkv pull {name}' fetches it; "
        r"at hand: RWKV-4-169M \(FP16\)",
    ):
        find_model(name)
    assert time.monotonic() - began < 1
    assert [path.name for path in pulled.iterdir()] == ["RWKV-4-169M-FP16.bin"]


def test_what_is_at_hand(pulled, tmp_path, checkpoint):
    write_model(tmp_path / "model.bin", TENSORS, "Q5_1")
    (tmp_path / "other.bin").write_bytes(b"something else")
    (tmp_path / "page.pth").write_bytes(b"<html>")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(ModelNotFound) as raised:
        find_model("mode1.bin")
    assert str(raised.value) == (
        "'mode1.bin' is no model; at hand: RWKV-4-169M (FP16), 'model.bin', 'tiny.pth'; "
        "'rwkv pull --list' shows what can be fetched"
    )


def test_folder(pulled, tmp_path, checkpoint):
    with pytest.raises(ModelNotFound, match=r"is a folder; at hand: RWKV-4-169M.*tiny\.pth'"):
        find_model(tmp_path)
    (tmp_path / "empty" / "169M").mkdir(parents=True)
    with pytest.raises(ModelNotFound, match="is a folder"):
        find_model(tmp_path / "empty" / "169M")


def test_long_lists_are_cut(tmp_path):
    for i in range(12):
        write_model(tmp_path / f"{i:02}.bin", TENSORS, "Q4_0")
    with pytest.raises(ModelNotFound, match=r"'07.bin' and 4 more; "):
        find_model("missing")


def test_ambiguous(checkpoint, tmp_path):
    write_model(tmp_path / "tiny.bin", TENSORS)
    with pytest.raises(ModelNotFound, match=r"may be one of 'tiny\.bin', 'tiny\.pth': add the su"):
        find_model("tiny")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "none/such/model", "~"])
def test_odd_names(name):
    with pytest.raises(
        ModelNotFound, match=r"is (no model|a folder); none is at hand; 'rwkv pull "
    ):
        find_model(name)


def test_every_command_finds_them(checkpoint, tmp_path, home):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    for arguments in (["generate", "A", "-n", 3], ["perplexity", text], ["info"]):
        done = rwkv(*arguments, "-m", "tiny", "--format", "q8_0")
        assert (done.returncode, done.stderr) == (0, "")
    assert "Q8_0" in done.stdout
    assert len(in_cache(home)) == 1
    done = rwkv("generate", "A", "-m", "tinny")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'tinny' is no model; at hand: 'tiny.pth'; ")
    assert done.stderr.count("\n") == 1
    done = rwkv("bench", "-m", "tinny")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'tinny' is no model; at hand: ")
