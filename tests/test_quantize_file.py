"""Quantizing a file: what is refused, and that outputs appear whole or not at all.

Ids are those of the catalogue of faults; wrong input files are in test_model_file.py, the bytes of
formats in test_quants.py, calls that fail one by one in test_api.c.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from models import random_model, read_model, write_model
from reference import quants
from rwkv_cpp import RWKVModel
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.library import load_rwkv_shared_library

TENSORS = random_model(seed=6, n_vocab=8, n_embed=32, n_layer=2)
ALL_FORMATS = "(choose from Q4_0, Q4_1, Q4_1_O, Q4_2, Q4_3, Q5_0, Q5_1, Q8_0)"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.bin"
    write_model(path, TENSORS)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.bin"


def quantize(source: Path, target: Path, name: str = "Q5_1", **options: object) -> None:
    load_rwkv_shared_library().rwkv_quantize_file(source, target, name, **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is refused ----


@pytest.mark.parametrize("kind", ["same", "dotted", "symlink", "hard link", "linked folder"])
def test_q01_in_place(source: Path, tmp_path: Path, kind: str) -> None:
    before = digest(source)
    target = tmp_path / "other.bin"
    if kind == "same":
        target = source
    elif kind == "dotted":
        target = Path(f"{tmp_path}/./in.bin")
    elif kind == "symlink":
        target.symlink_to(source)
    elif kind == "hard link":
        os.link(source, target)
    else:
        (tmp_path / "folder").symlink_to(tmp_path)
        target = tmp_path / "folder" / "in.bin"
    with pytest.raises(ValueError, match="is the same file as the input"):
        quantize(source, target)
    assert digest(source) == before


def test_q02_failure_keeps_the_old_output(source: Path, target: Path, tmp_path: Path) -> None:
    quantize(source, target)
    before = digest(target)
    bad = {key: values.copy() for key, values in TENSORS.items()}
    bad["blocks.1.ffn.receptance.weight"][31, 31] = np.nan  # near the end of the file
    write_model(tmp_path / "bad.bin", bad)
    with pytest.raises(RWKVFileError, match=r"weight \[31, 31\] is NaN or infinite"):
        quantize(tmp_path / "bad.bin", target)
    assert digest(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.bin", "in.bin", "out.bin"]


FULL = """
import resource, signal, sys
from pathlib import Path
from rwkv_cpp.library import load_rwkv_shared_library
source, target, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
library = load_rwkv_shared_library()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in {0, 1, 23, 24, 25, 4096, size // 2, size - 4096, size - 1} | set(range(0, size, 1237)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        library.rwkv_quantize_file(source, target, "Q4_0")
        print("no error at", limit)
    except Exception as error:
        if "cannot write" not in str(error):
            print(repr(error))
    if len(list(Path(target).parent.iterdir())) != 1:
        print("files left at", limit)
"""


def test_q03_full_disk(source: Path, target: Path) -> None:
    """A limit on the size of files fails as a full disk does, at a place of our choice."""
    quantize(source, target, "Q4_0")
    size = target.stat().st_size
    target.unlink()
    command = [sys.executable, "-c", FULL, source, target, f"{size}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


KILLED = """
import sys
from rwkv_cpp.library import load_rwkv_shared_library
library = load_rwkv_shared_library()
print("ready", flush=True)
while True:
    library.rwkv_quantize_file(sys.argv[1], sys.argv[2], "Q4_2")
"""


@pytest.mark.parametrize(
    "kills", [pytest.param(8, id="8"), pytest.param(200, id="200", marks=pytest.mark.slow)]
)
def test_q04_killed(tmp_path: Path, kills: int) -> None:
    """Whenever a process dies: the output is as it was or complete, and what it left is removed."""
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    write_model(source, random_model(seed=7, n_vocab=8, n_embed=128, n_layer=4))
    quantize(source, target, "Q4_2")
    complete = digest(target)
    draw = random.Random(4)
    left_over = 0
    for _ in range(kills):
        target.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, source, target],
            stdout=subprocess.PIPE,
            env=environment(),
        )
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not target.exists() or digest(target) == complete
        names = {path.name for path in tmp_path.iterdir()} - {"in.bin", "out.bin"}
        assert all(re.fullmatch(r"\.out\.bin\.\d+-[0-9a-f]{8}\.tmp", name) for name in names)
        left_over += len(names)
        quantize(source, target, "Q4_2")
        assert {path.name for path in tmp_path.iterdir()} == {"in.bin", "out.bin"}
    assert left_over > 0


def test_q06_already_quantized(source: Path, target: Path, tmp_path: Path) -> None:
    quantize(source, target, "Q4_0")
    for name in ("Q4_0", "Q8_0"):
        with pytest.raises(RWKVFileError, match="the file is already Q4_0"):
            quantize(target, tmp_path / "again.bin", name)
    key = "blocks.1.att.key.weight"
    write_model(source, TENSORS, "FP16", types={key: "Q8_0"})
    with pytest.raises(RWKVFileError, match=f"tensor '{key}' is already Q8_0"):
        quantize(source, tmp_path / "again.bin")
    assert not (tmp_path / "again.bin").exists()


@pytest.mark.parametrize("name", ["", "q4_0", "Q4", "Q6_K", "Q4_0 ", "FP16", "FP32", "2", "é\x1b"])
def test_q07_unknown_format(source: Path, target: Path, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(ALL_FORMATS)) as caught:
        quantize(source, target, name)
    assert str(caught.value).isprintable()
    assert not target.exists()


@pytest.mark.parametrize("name", ["Q4_1_O", "Q4_2", "Q4_3"])
def test_q07_format_of_another_version(source: Path, target: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"files of version 101 have no {name}"):
        quantize(source, target, name, file_version=101)
    with pytest.raises(ValueError, match="file_version is 102"):
        quantize(source, target, name, file_version=102)


# ---- types of single tensors ----


def types_of(source: Path, target: Path, types: str, **options: object) -> dict[str, str]:
    quantize(source, target, types=types, **options)
    return {key: tensor.name for key, tensor in read_model(target).items()}


def test_types(source: Path, target: Path) -> None:
    """Whole parts of names; the last pattern that matches wins; vectors stay FP32."""
    types = "blocks.1=Q8_0,ffn.value=Q4_0,blocks.1.ffn.value.weight=FP16,head=Q5_0,emb=FP16"
    found = types_of(source, target, types, head="Q4_1")
    for key, values in TENSORS.items():
        wanted = "FP32" if values.ndim == 1 else "Q8_0" if "blocks.1." in key else "Q5_1"
        if "ffn.value" in key:
            wanted = "FP16" if "blocks.1." in key else "Q4_0"
        wanted = {"head.weight": "Q5_0", "emb.weight": "FP16"}.get(key, wanted)
        assert found[key] == wanted, key
    assert types_of(source, target, "weight=Q8_0")["emb.weight"] == "Q8_0"
    with RWKVModel(None, target, 1) as model:
        model.eval(1, None)


def test_types_of_a_tensor_have_its_formats_bytes(source: Path, target: Path) -> None:
    key = "blocks.0.att.key.weight"
    for version, name in ((101, "Q4_0"), (100, "Q4_0"), (100, "Q4_1_O"), (100, "Q4_2")):
        quantize(source, target, types=f"{key}={name}", file_version=version)
        wanted = quants.quantize(version, name, TENSORS[key])
        np.testing.assert_array_equal(read_model(target)[key].data, wanted)


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ("", "types: '' is not PATTERN=FORMAT"),
        ("ffn.value", "types: 'ffn.value' is not PATTERN=FORMAT"),
        ("=Q4_0", "types: '=Q4_0' is not PATTERN=FORMAT"),
        ("ffn.value=Q4_0,", "types: '' is not PATTERN=FORMAT"),
        ("ffn.value=", "unknown format ''"),
        ("ffn.value=Q6_K", "unknown format 'Q6_K' (choose from FP32, FP16, Q4_0"),
        ("ffn.value=Q4_0=Q5_0", "unknown format 'Q4_0=Q5_0'"),
        ("ffn.val=Q4_0", "types: 'ffn.val' matches no tensor of"),
        ("blocks.2=Q4_0", "types: 'blocks.2' matches no tensor of"),
        ("f*\x1b=Q4_0", "types: 'f*\\x1b' matches no tensor of"),
        ("ln1=Q8_0", "types: 'ln1' matches vectors only, such as blocks."),
        ("att.time_decay=FP16", "types: 'att.time_decay' matches vectors only"),
        ("ffn.key=Q4_2", "files of version 101 have no Q4_2 (choose 100)"),
    ],
)
def test_types_that_are_refused(source: Path, target: Path, types: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        quantize(source, target, types=types)
    assert str(caught.value).isprintable()
    assert not target.exists()


def test_types_of_rows_that_are_no_blocks(tmp_path: Path, target: Path) -> None:
    tensors = random_model(seed=8, n_vocab=8, n_embed=32, n_layer=1, n_ffn=48)
    write_model(tmp_path / "in.bin", tensors)
    with pytest.raises(RWKVFileError, match=r"'blocks\.0\.ffn\.value\.weight': rows of 48"):
        quantize(tmp_path / "in.bin", target)
    assert types_of(tmp_path / "in.bin", target, "ffn.value=FP16")["head.weight"] == "FP32"


# ---- weights ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["emb.weight", "blocks.0.ln0.bias", "blocks.1.att.output.weight"])
@pytest.mark.parametrize("source_type", ["FP32", "FP16"])
def test_q09_not_finite(
    tmp_path: Path, target: Path, value: float, key: str, source_type: str
) -> None:
    tensors = {name: values.copy() for name, values in TENSORS.items()}
    tensors[key].reshape(-1)[-3] = value
    source = tmp_path / "in.bin"
    write_model(source, tensors, source_type)
    place = "[7, 29]" if key == "emb.weight" else "[0, 29]" if "ln0" in key else "[31, 29]"
    with pytest.raises(RWKVFileError, match=re.escape(f"'{key}': weight {place} is NaN or inf")):
        quantize(source, target)
    assert not target.exists()
    for name in ("Q4_0", "Q4_1", "Q4_1_O", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0"):
        quantize(source, target, name, allow_nan=True)


def test_q10_rows_of_blocks(tmp_path: Path, target: Path) -> None:
    write_model(tmp_path / "in.bin", random_model(seed=8, n_vocab=8, n_embed=48, n_layer=1))
    with pytest.raises(
        RWKVFileError, match=r"'blocks\.0\.att\.key\.weight': rows of 48 weights, but Q5_1 needs"
    ):
        quantize(tmp_path / "in.bin", target)
    assert not target.exists()


# ---- always the same bytes ----

ONE_PROCESSOR = """
import os, sys
from rwkv_cpp.library import load_rwkv_shared_library
if len(sys.argv) > 4:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
load_rwkv_shared_library().rwkv_quantize_file(*sys.argv[1:4])
"""


@pytest.mark.parametrize("name", ["Q4_0", "Q4_2", "Q8_0"])
def test_q11_same_bytes(source: Path, target: Path, tmp_path: Path, name: str) -> None:
    """From FP32 and FP16 sources of the same values, on one processor and on all, on any ISA."""
    halves = {
        key: values if values.ndim == 1 else values.astype(np.float16).astype(np.float32)
        for key, values in TENSORS.items()
    }
    write_model(source, halves, "FP16", types={"emb.weight": "FP32", "head.weight": "FP32"})
    quantize(source, target, name)
    wanted = digest(target)
    write_model(source, halves)
    quantize(source, target, name)
    assert digest(target) == wanted
    if not hasattr(os, "sched_setaffinity"):
        return
    for arguments, isa in (([], "scalar"), (["one"], "scalar"), (["one"], None)):
        variables = environment() if isa is None else environment(RWKV_ISA=isa)
        command = [
            sys.executable,
            "-c",
            ONE_PROCESSOR,
            source,
            tmp_path / "2.bin",
            name,
            *arguments,
        ]
        subprocess.run(command, check=True, env=variables, timeout=60)
        assert digest(tmp_path / "2.bin") == wanted


# ---- where it is written ----


def test_q12_targets(source: Path, target: Path, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "missing" / "out.bin", "cannot create a file beside it: No such file"),
        (tmp_path / ("x" * 250), "cannot create a file beside it: File name too long"),
        (tmp_path, "is not the path of a regular file"),
        (Path("/dev/full"), "is not the path of a regular file"),
    ):
        with pytest.raises(RWKVFileError, match=re.escape(f"{path}: {words}")):
            quantize(source, path)
    before = os.umask(0o027)
    try:
        quantize(source, target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "out.bin"]


def test_q12_relative_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(Path("in.bin"), Path("out.bin"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "out.bin"]


def test_q13_two_at_once(source: Path, target: Path, tmp_path: Path) -> None:
    quantize(source, target)
    wanted = digest(target)
    errors = []

    def work() -> None:
        try:
            for _ in range(20):
                quantize(source, target)
                assert digest(target) == wanted
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "out.bin"]


def test_progress(source: Path, target: Path) -> None:
    steps = []
    quantize(source, target, progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1] == (source.stat().st_size, source.stat().st_size)


def test_progress_cancels(source: Path, target: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in.bin"]
