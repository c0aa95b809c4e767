"""Quantizing by searched scales: no block worse than by its format's rule, and nearly the best.

The oracle is `reference.quants`: the error of what the bytes stand for, in float64, and the least
error that thousands of scales reach.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from models import random_model, read_model, write_model
from reference import quants
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.ggmf import Header, Writer
from rwkv_cpp.library import load_rwkv_shared_library
from test_quants import LAYOUTS, adversarial_model

ONE_PROCESSOR = """
import os, sys
from rwkv_cpp.library import load_rwkv_shared_library
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
load_rwkv_shared_library().rwkv_quantize_file(*sys.argv[1:4], method="mse")
"""

EMBED, FFN = 32, 1024
KEY = "blocks.0.ffn.value.weight"  # (EMBED, FFN)


def write_importances(path: Path, tensors: dict, importances: dict[str, np.ndarray]) -> Path:
    """A file of importances of a model: as given, otherwise 1."""
    n_layer = sum(key.endswith(".ln1.weight") for key in tensors)
    with Writer(path, Header(101, *tensors["emb.weight"].shape, n_layer, 0)) as writer:
        for key, values in tensors.items():
            if values.ndim == 2 and key != "emb.weight":
                ones = np.ones(values.shape[1], np.float32)
                writer.write(key, 0, importances.get(key, ones))
    return path


def random_blocks(random: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Rows of weights as trained ones look, and worse."""
    normal = random.standard_normal
    makers = [
        lambda: normal(cols) * 0.05,
        lambda: normal(cols) ** 3,
        lambda: normal(cols) * 0.01 + np.where(random.random(cols) < 1 / 40, 2.0, 0),
        lambda: normal(cols) + 30,
        lambda: random.uniform(-1, 1, cols),
        lambda: np.exp(normal(cols)) * random.choice([-1, 1]),
    ]
    return np.array([makers[row % len(makers)]() for row in range(rows)], np.float32)


def weighted_errors(x: np.ndarray, w: np.ndarray, tensor: quants.Tensor, size: int) -> np.ndarray:
    """(blocks): what the bytes of a tensor get wrong of the weights x."""
    missed = (x.astype(np.float64) - tensor.values()) ** 2 * w
    return missed.reshape(-1, size).sum(axis=1)


def stretched(errors: np.ndarray, x: np.ndarray, w: np.ndarray, size: int) -> np.ndarray:
    """(blocks): errors of least squares, once what they found is as long as the weights again.

    What least squares miss, e of a block's squares, is orthogonal to what they find, 1 - e. Times
    1 / (1 - e) that misses e + (e / (1 - e))² (1 - e) = e / (1 - e). The file's digits of scales,
    and Q4_1_O's outlier, which is not stretched, are worth two percent.
    """
    squares = (x.astype(np.float64) ** 2 * w).reshape(-1, size).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.02 * np.where(errors < squares, errors / (1 - errors / squares), np.inf)


@pytest.mark.parametrize(("version", "name"), LAYOUTS)
@pytest.mark.parametrize("method", ["mse", "importance"])
def test_blocks(tmp_path: Path, version: int, name: str, method: str) -> None:
    random = np.random.default_rng(version + len(name))
    tensors = random_model(1, n_vocab=8, n_embed=EMBED, n_layer=1, n_ffn=FFN)
    x = tensors[KEY] = random_blocks(random, EMBED, FFN)
    w = np.ones(FFN, np.float32)
    if method == "importance":
        w = np.exp(1.5 * random.standard_normal(FFN)).astype(np.float32)
        w[random.random(FFN) < 0.1] = 0
        w[32:64] = 0
    write_model(tmp_path / "in.bin", tensors)
    options = {"method": method, "file_version": version}
    if method == "importance":
        path = write_importances(tmp_path / "importances.bin", tensors, {KEY: w})
        options["importances"] = path
    library = load_rwkv_shared_library()
    library.rwkv_quantize_file(tmp_path / "in.bin", tmp_path / "out.bin", name, **options)
    written = read_model(tmp_path / "out.bin")[KEY]
    assert written.name == name

    size = quants.block_size(name)
    w = np.tile(np.where(np.arange(FFN) // 32 == 1, 1, w), (EMBED, 1))  # all zero: all equal
    found = weighted_errors(x, w, written, size)
    by_rule = weighted_errors(x, w, quants.Tensor.of(version, name, x), size)
    assert np.all(found <= stretched(by_rule, x, w, size))
    assert found.sum() < by_rule.sum()
    lengths = [(values * x * w).reshape(-1, size).sum(axis=1) for values in (written.values(), x)]
    assert np.median(np.abs(lengths[0] / lengths[1] - 1)) < 2**-11
    some = random.permutation(len(found))[:24]
    blocks, weights = (values.reshape(-1, size)[some] for values in (x, w))
    ratio = found[some] / quants.least_errors(version, name, blocks, weights)
    mild = method == "mse"
    assert ratio.max() < (2 if mild else 6)
    assert np.exp(np.mean(np.log(ratio))) < (1.12 if mild else 1.4)


@pytest.mark.parametrize(("version", "name"), LAYOUTS)
def test_adversarial_blocks(tmp_path: Path, version: int, name: str) -> None:
    """Zeros, ties, denormals, fp16's limits: never worse than the rule, whose bytes stand where
    they are exact."""
    tensors = adversarial_model(seed=len(name))
    write_model(tmp_path / "in.bin", tensors)
    library = load_rwkv_shared_library()
    library.rwkv_quantize_file(
        tmp_path / "in.bin", tmp_path / "out.bin", name, method="mse", file_version=version
    )
    written = read_model(tmp_path / "out.bin")
    size = quants.block_size(name)
    for key, values in tensors.items():
        if written[key].name != name:
            continue
        by_rule = quants.Tensor.of(version, name, values)
        ones = np.ones_like(values)
        found, wanted = (weighted_errors(values, ones, t, size) for t in (written[key], by_rule))
        # Squares below float's range are nothing to a search in float.
        bound = stretched(wanted, values, ones, size) + 1e-37
        assert np.all(found <= bound)
        blocks = [t.data.reshape(len(found), -1) for t in (written[key], by_rule)]
        np.testing.assert_array_equal(blocks[0][wanted == 0], blocks[1][wanted == 0])


def test_not_finite(tmp_path: Path) -> None:
    """Refused as by the rules; allowed, a block that holds them is left to the rule."""
    tensors = random_model(2, n_vocab=8, n_embed=64, n_layer=1)
    key = "blocks.0.att.key.weight"
    tensors[key][5, 3], tensors[key][7, 40] = np.nan, np.inf
    write_model(tmp_path / "in.bin", tensors)
    library = load_rwkv_shared_library()
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    with pytest.raises(RWKVFileError, match=r"weight \[5, 3\] is NaN or infinite"):
        library.rwkv_quantize_file(source, target, "Q5_1", method="mse")
    for version, name in quants.LAYOUTS:
        size = quants.block_size(name)
        found = []
        for method in ("rtn", "mse"):
            library.rwkv_quantize_file(
                source, target, name, file_version=version, method=method, allow_nan=True
            )
            found.append(read_model(target)[key].data.reshape(64 * 64 // size, -1))
        for block in (5 * 64 // size, (7 * 64 + 40) // size):
            np.testing.assert_array_equal(found[0][block], found[1][block])
        assert name == "Q4_2" or not np.array_equal(*found)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1_O", "Q8_0"])
def test_same_bytes(tmp_path: Path, name: str) -> None:
    """On one processor and on all, on any ISA, from FP32 and FP16."""
    tensors = random_model(3, n_vocab=8, n_embed=96, n_layer=2)
    halves = {
        key: values if values.ndim == 1 else values.astype(np.float16).astype(np.float32)
        for key, values in tensors.items()
    }
    write_model(tmp_path / "FP32.bin", halves)
    write_model(
        tmp_path / "FP16.bin", halves, "FP16", types={"emb.weight": "FP32", "head.weight": "FP32"}
    )
    library = load_rwkv_shared_library()
    target = tmp_path / "out.bin"
    found = set()
    for source in ("FP32.bin", "FP16.bin"):
        library.rwkv_quantize_file(tmp_path / source, target, name, method="mse")
        found.add(target.read_bytes())
    for isa in ("scalar", None):
        variables = environment() if isa is None else environment(RWKV_ISA=isa)
        command = [sys.executable, "-c", ONE_PROCESSOR, tmp_path / "FP32.bin", target, name]
        subprocess.run(command, check=True, env=variables, timeout=60)
        found.add(target.read_bytes())
    assert len(found) == 1


# ---- importances ----


@pytest.fixture
def model(tmp_path: Path) -> dict[str, np.ndarray]:
    tensors = random_model(4, n_vocab=8, n_embed=32, n_layer=2)
    write_model(tmp_path / "in.bin", tensors)
    return tensors


def quantize(folder: Path, name: str = "Q5_1", **options: object) -> dict[str, quants.Tensor]:
    library = load_rwkv_shared_library()
    library.rwkv_quantize_file(folder / "in.bin", folder / "out.bin", name, **options)
    return read_model(folder / "out.bin")


def test_equal_importances_are_none(model: dict, tmp_path: Path) -> None:
    """A matrix whose importances are all equal, or all zero, is that of mse; each has its own."""
    equal, zero, other = (f"blocks.0.att.{part}.weight" for part in ("key", "value", "output"))
    random = np.random.default_rng(5)
    importances = {
        equal: np.full(32, 1e-30, np.float32),
        zero: np.zeros(32, np.float32),
        other: np.exp(2 * random.standard_normal(32)).astype(np.float32),
    }
    path = write_importances(tmp_path / "importances.bin", model, importances)
    mse = quantize(tmp_path, method="mse")
    found = quantize(tmp_path, method="importance", importances=path)
    for key, tensor in found.items():
        assert np.array_equal(tensor.data, mse[key].data) == (key != other), key


def refused(folder: Path, words: str, error: type = RWKVFileError, **options: object) -> None:
    with pytest.raises(error, match=words):
        quantize(folder, **options)
    assert not (folder / "out.bin").exists()


def test_options_that_do_not_fit(model: dict, tmp_path: Path) -> None:
    path = write_importances(tmp_path / "importances.bin", model, {})
    refused(tmp_path, r"'gptq' \(choose rtn, mse or importance\)", ValueError, method="gptq")
    refused(tmp_path, "needs importances", ValueError, method="importance")
    refused(tmp_path, "but method is mse", ValueError, method="mse", importances=path)
    refused(tmp_path, "but method is rtn", ValueError, method="rtn", importances=path)


def test_bad_importances(model: dict, tmp_path: Path) -> None:
    path = tmp_path / "importances.bin"
    key = "blocks.1.ffn.value.weight"
    options = {"method": "importance", "importances": path}
    refused(tmp_path, "importances.bin", **options)
    for value, word in ((np.nan, "nan"), (-1.0, "-1"), (np.inf, "inf")):
        values = np.ones(96, np.float32)
        values[77] = value
        write_importances(path, model, {key: values})
        refused(tmp_path, f"'{key}': importance 77 is {word}, expected a finite number", **options)
    write_importances(path, model, {key: np.ones(95, np.float32)})
    refused(tmp_path, f"'{key}' has 95 importances, expected 96", **options)
    write_importances(path, random_model(4, n_vocab=9, n_embed=32, n_layer=2), {})
    refused(tmp_path, "importances of another model, of n_vocab 9, .* are 8, 32, 2", **options)
    write_importances(path, {name: model[name] for name in model if name != key}, {})
    refused(tmp_path, f"has no importances of '{key}'", **options)
    write_importances(path, model | {"blocks.0.att.gate.weight": np.ones((32, 32))}, {})
    refused(tmp_path, "another model: .* has no tensor 'blocks.0.att.gate.weight'", **options)
    write_model(path, model)
    refused(tmp_path, "'emb.weight' is no FP32 vector", **options)
    write_importances(path, model, {})
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, "truncated", **options)


def test_importances_are_not_overwritten(model: dict, tmp_path: Path) -> None:
    path = write_importances(tmp_path / "out.bin", model, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="same file as the input"):
        quantize(tmp_path, method="importance", importances=path)
    assert path.read_bytes() == before


def test_importances_that_are_not_needed(model: dict, tmp_path: Path) -> None:
    """The head's only if the head is quantized; the embedding has none, and is searched by mse."""
    some = {name: values for name, values in model.items() if name != "head.weight"}
    path = write_importances(tmp_path / "importances.bin", some, {})
    options = {"method": "importance", "importances": path}
    refused(tmp_path, "has no importances of 'head.weight'", head="Q8_0", **options)
    found = quantize(tmp_path, types="emb=Q4_0", **options)
    wanted = quantize(tmp_path, types="emb=Q4_0", method="mse")
    assert found["head.weight"].name == "FP32"
    np.testing.assert_array_equal(found["emb.weight"].data, wanted["emb.weight"].data)
