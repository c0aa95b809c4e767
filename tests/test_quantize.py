"""quantize.py: the command over rwkv_quantize_file. Blocks by themselves are in test_quantize.c."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import CONSOLE, environment, rwkv
from models import random_model, read_model, write_model
from reference import quants
from rwkv_cpp import RWKVFileError, RWKVModel
from rwkv_cpp.importance import collect, write_importances
from rwkv_cpp.quantize import METHODS, quantize_file

NAMES = [name for name in quants.TYPE_IDS if name not in quants.PLAIN]
NEWEST = {name: 101 if (101, name) in quants.LAYOUTS else 100 for name in NAMES}


@pytest.fixture(scope="module")
def tensors():
    return random_model(3, n_vocab=50, n_embed=64, n_layer=2, n_ffn=160)


@pytest.fixture
def source(tmp_path, tensors):
    path = tmp_path / "source.bin"
    write_model(path, tensors, "FP32")
    return path


@pytest.mark.parametrize("plain", quants.PLAIN)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_references(tmp_path, tensors, plain, name):
    source, target, expected = tmp_path / "source", tmp_path / "target", tmp_path / "expected"
    write_model(source, tensors, plain)
    if plain == "FP16":
        tensors = {
            key: value if value.ndim == 1 else value.astype(np.float16).astype(np.float32)
            for key, value in tensors.items()
        }
    for version in (0, 100, 101):
        if (version or NEWEST[name], name) not in quants.LAYOUTS:
            with pytest.raises(ValueError, match=name):
                quantize_file(source, target, name, file_version=version)
            continue
        quantize_file(source, target, name, file_version=version)
        write_model(expected, tensors, name, version or NEWEST[name], table_type=plain)
        assert target.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", ["Q4_1_O", "Q5_1"])
def test_tiny_attention_is_quantized_whatever_its_width(tmp_path, name):
    source, target, expected = tmp_path / "source", tmp_path / "target", tmp_path / "expected"
    tensors = random_model(3, n_vocab=50, n_embed=64, n_layer=2, n_tiny=7, tiny_layer=1)
    write_model(source, tensors)
    quantize_file(source, target, name)
    file = write_model(expected, tensors, name, NEWEST[name])
    assert {file[f"blocks.1.tiny_{matrix}.weight"].name for matrix in "qkv"} == {name}
    assert target.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("plain", quants.PLAIN)
@pytest.mark.parametrize(("version", "name"), quants.LAYOUTS)
def test_bytes_with_a_head_are_the_references(tmp_path, tensors, plain, version, name):
    source, target, expected = tmp_path / "source", tmp_path / "target", tmp_path / "expected"
    file = write_model(source, tensors, plain)
    tensors = {key: tensor.values() for key, tensor in file.items()}
    matrices = "Q4_2" if version == 100 else "Q4_1"
    quantize_file(source, target, matrices, file_version=version, head=name.lower())
    write_model(expected, tensors, matrices, version, types={"head.weight": name}, table_type=plain)
    assert target.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", [name for version, name in quants.LAYOUTS if version == 101])
def test_head_of_the_file_is_the_head_of_the_option(tmp_path, tensors, name):
    source, plain, target = (tmp_path / name for name in ("source", "plain", "target"))
    write_model(source, tensors, "FP16")
    quantize_file(source, plain, "Q4_0")
    quantize_file(source, target, "Q4_0", head=name)
    results = []
    for path, head in ((plain, name), (target, None)):
        with RWKVModel(None, path, 2, head=head) as model:
            logits, state = model.eval_sequence(range(50), None)
        results.append((logits.tobytes(), state.tobytes()))
    assert results[0] == results[1]


def test_head_that_cannot_be(tmp_path, source):
    target = tmp_path / "target.bin"
    for head, text in (("Q9_9", "unknown format 'Q9_9'"), ("Q4_1_O", "version 101 have no Q4_1_O")):
        with pytest.raises(ValueError, match=text):
            quantize_file(source, target, "Q4_0", head=head)
    assert os.listdir(tmp_path) == ["source.bin"]


@pytest.mark.parametrize("number", range(2, 10))
def test_formats_by_number_and_in_any_case(tmp_path, source, number):
    name = quants.TYPE_NAMES[number]
    for text in (name, name.lower(), str(number)):
        quantize_file(source, tmp_path / text, text)
        assert (tmp_path / text).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "text", ["", "Q9_9", "0", "1", "10", "16", "-1", "2147483648", "²", "FP16"]
)
def test_unknown_format(tmp_path, source, text):
    """Q-07"""
    with pytest.raises(ValueError, match="Q4_1_O"):
        quantize_file(source, tmp_path / "target.bin", text)
    assert os.listdir(tmp_path) == ["source.bin"]


def test_same_file(tmp_path, source):
    """Q-01"""
    before = source.read_bytes()
    (tmp_path / "symbolic.bin").symlink_to(source)
    os.link(source, tmp_path / "hard.bin")
    for target in ("source.bin", "../" + tmp_path.name + "/source.bin", "symbolic.bin", "hard.bin"):
        with pytest.raises(ValueError, match="same file"):
            quantize_file(source, tmp_path / target, "Q8_0")
    assert source.read_bytes() == before


def test_older_file_survives_a_failure(tmp_path, source, tensors):
    """Q-02, Q-06, Q-08, Q-09"""
    target = tmp_path / "target.bin"
    target.write_bytes(b"precious")
    quantized, truncated, infinite = (tmp_path / name for name in ("q.bin", "t.bin", "i.bin"))
    quantize_file(source, quantized, "Q5_1")
    truncated.write_bytes(source.read_bytes()[:-100])
    tensors = {key: value.copy() for key, value in tensors.items()}
    tensors["blocks.1.ffn.key.weight"][3, 5] = np.inf
    write_model(infinite, tensors)
    for path, text in (
        (quantized, "already Q5_1"),
        (truncated, "head.weight"),
        (infinite, r"blocks\.1\.ffn\.key\.weight"),
        (tmp_path / "missing.bin", "missing.bin"),
        (tmp_path, str(tmp_path)),
    ):
        with pytest.raises(RWKVFileError, match=text):
            quantize_file(path, target, "Q5_1")
        assert target.read_bytes() == b"precious"
    assert len(os.listdir(tmp_path)) == 5  # and no temporary file
    quantize_file(infinite, target, "Q8_0", allow_nan=True)
    assert read_model(target).keys() == tensors.keys()


def test_target_that_cannot_be_written(tmp_path, source):
    """Q-12"""
    for target in (tmp_path, tmp_path / "missing" / "target.bin", tmp_path / ("x" * 300)):
        with pytest.raises(RWKVFileError):
            quantize_file(source, target, "Q8_0")
    assert os.listdir(tmp_path) == ["source.bin"]


def test_progress_is_over_the_source(tmp_path, source):
    calls = []
    quantize_file(source, tmp_path / "t", "Q8_0", progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert calls[-1] == (source.stat().st_size,) * 2


def test_command(tmp_path, source):
    target = tmp_path / "target.bin"
    done = rwkv("quantize", source, target, "q4_1", "--file-version", "100")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{target.stat().st_size:,} bytes" in done.stdout
    assert read_model(target)["blocks.0.att.key.weight"].version == 100
    assert rwkv("quantize", source, target, "Q4_0", "--head", "q8_0").returncode == 0
    assert read_model(target)["head.weight"].name == "Q8_0"
    done = rwkv("quantize", source, target, "Q4_9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown format 'Q4_9' (choose from Q4_0, ")
    assert done.stderr.count("\n") == 1
    help_text = " ".join(rwkv("quantize", "--help").stdout.split())
    assert ", ".join(NAMES[:-1]) + f" or {NAMES[-1]}" in help_text


# ---- methods and types; what C makes of them is tested in test_quantize_search.py ----


@pytest.fixture
def importances(tmp_path, source):
    path = tmp_path / "importances.bin"
    with RWKVModel(None, source, 1) as model:
        write_importances(path, model, collect(model, [range(50)]))
    return path


def squared_error(path, tensors, columns=1.0):
    found = read_model(path)["blocks.0.ffn.value.weight"].values()
    return float((columns * (found - tensors["blocks.0.ffn.value.weight"]) ** 2).sum())


def test_methods(tmp_path, source, tensors, importances):
    columns = read_model(importances)["blocks.0.ffn.value.weight"].values()
    paths = {}
    for method in (None, *METHODS):
        paths[method] = tmp_path / f"{method}.bin"
        given = importances if method in (None, "importance") else None
        quantize_file(source, paths[method], "Q4_0", method=method, importances=given)
    rtn, mse, importance = (paths[method] for method in METHODS)
    assert paths[None].read_bytes() == importance.read_bytes()  # where they are given
    assert squared_error(mse, tensors) < squared_error(rtn, tensors)
    assert squared_error(importance, tensors, columns) < squared_error(mse, tensors, columns)


def test_types_in_any_case_and_by_number(tmp_path, source):
    target = tmp_path / "target.bin"
    quantize_file(source, target, "Q4_0", types="blocks.1=q8_0, ffn.value=8,emb=fp16")
    found = {key: tensor.name for key, tensor in read_model(target).items()}
    for key, name in {
        "emb": "FP16",
        "blocks.0.att.key": "Q4_0",
        "blocks.0.ffn.value": "Q5_1",
        "blocks.1.att.key": "Q8_0",
        "blocks.1.ffn.value": "Q5_1",
        "head": "FP32",
    }.items():
        assert found[f"{key}.weight"] == name


def test_command_with_methods_and_types(tmp_path, source, importances):
    target, expected = tmp_path / "target.bin", tmp_path / "expected.bin"
    options = {"types": "att=Q5_0", "head": "Q8_0"}
    arguments = ["--types", "att=q5_0", "--head", "q8_0"]
    done = rwkv("quantize", source, target, "Q4_1", "--importances", importances, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    quantize_file(source, expected, "Q4_1", importances=importances, **options)
    assert target.read_bytes() == expected.read_bytes()
    assert rwkv("quantize", source, target, "Q4_1", "--method", "mse").returncode == 0
    quantize_file(source, expected, "Q4_1", method="mse")
    assert target.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "importance"], "method importance needs importances"),
        (["--method", "mse", "--importances", "{importances}"], "but method is mse"),
        (["--importances", "{source}"], "is no FP32 vector, as importances are"),
        (["--importances", "missing.bin"], "missing.bin"),
        (["--types", "ffn.values=Q5_1"], "'ffn.values' matches no tensor"),
        (["--types", "ffn.value"], "'ffn.value' is not PATTERN=FORMAT"),
        (["--types", "ffn.value=Q9"], "unknown format 'Q9'"),
        (["--types", "ffn.value=Q4_2"], "version 101 have no Q4_2"),
    ],
)
def test_methods_and_types_that_cannot_be(tmp_path, source, importances, arguments, message):
    target = tmp_path / "target.bin"
    words = [word.format(importances=importances, source=source) for word in arguments]
    done = rwkv("quantize", source, target, "Q4_0", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(tmp_path, number, code):
    """Q-05"""
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    write_model(source, random_model(1, n_vocab=50, n_embed=1024, n_layer=5, n_ffn=4096), "FP16")
    process = subprocess.Popen(
        [*CONSOLE, "quantize", source, target, "Q4_2"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while len(os.listdir(tmp_path)) == 1:
        time.sleep(0.001)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 1
    assert process.returncode == code
    assert (out.strip(), err.strip()) == (b"", b"")
    assert os.listdir(tmp_path) == ["source.bin"]
