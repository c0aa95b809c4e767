"""The bytes that quantizing a file writes, against the rules of the formats in `reference.quants`.

The weights are blocks that try the rules: zeros of both signs, ties, single large values, the
limits of fp16, denormals, equal weights, and plain random ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import random_model, read_model, write_model
from reference import quants
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.library import load_rwkv_shared_library

LAYOUTS = [pytest.param(*layout, id=f"{layout[1]}-{layout[0]}") for layout in quants.LAYOUTS]
EMBED, FFN = 64, 1024


def adversarial_blocks(random: np.random.Generator, n: int) -> np.ndarray:
    """(n, 32) float32, finite, and small enough for every format's fp16 scales."""
    normal = random.standard_normal
    makers = [
        lambda: np.zeros(32),
        lambda: np.full(32, -0.0),
        lambda: np.where(random.random(32) < 0.5, 0.0, -0.0),
        lambda: np.full(32, normal()),
        lambda: np.where(np.arange(32) == random.integers(32), 65504.0 * random.choice([-1, 1]), 0),
        lambda: np.where(np.arange(32) == random.integers(32), normal() * 1e4, normal(32) * 1e-3),
        lambda: random.choice([-65504.0, 65504.0], 32),
        lambda: random.choice([-1.0, 1.0], 32) * abs(normal()),  # equal magnitudes
        lambda: random.integers(-7, 8, 32) * 0.125,  # exact levels
        lambda: (random.integers(-15, 15, 32) + 0.5) * 0.25,  # ties
        lambda: (random.integers(0, 31, 32) + 0.5) / 31,
        lambda: np.r_[7.0, (random.integers(-7, 7, 31) + 0.5)],
        lambda: np.r_[-8.0, (random.integers(-8, 7, 31) + 0.5)],
        lambda: np.r_[127.0, random.integers(-127, 127, 31) + 0.5],
        lambda: normal(32) * 1e-6,  # scales that fp16 has as denormals, or not at all
        lambda: normal(32) * 1e-9,
        lambda: normal(32) * 1e-30,
        lambda: normal(32) * 1e-37,
        lambda: random.integers(-9, 9, 32) * 1.4e-45,  # denormals of float
        lambda: normal(32) * 1e-41,
        lambda: np.r_[normal(16), normal(16) * 1e-4],  # halves of different size
        lambda: normal(32) + 100,
        lambda: np.abs(normal(32)),
        lambda: -np.abs(normal(32)),
        lambda: normal(32) ** 3 * 0.02,
        lambda: np.sort(normal(32))[:: random.choice([-1, 1])],
    ]
    blocks = [makers[i % len(makers)]() for i in range(n)]
    return np.array(blocks, np.float32)


def adversarial_model(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = random_model(seed, n_vocab=8, n_embed=EMBED, n_layer=2, n_ffn=FFN)
    for key, values in tensors.items():
        if values.ndim == 2 and key != "emb.weight" and key != "head.weight":
            blocks = adversarial_blocks(random, values.size // 32)
            tensors[key] = random.permutation(blocks).reshape(values.shape)
    return tensors


def quantize(source: Path, target: Path, version: int, name: str, **options: object) -> None:
    library = load_rwkv_shared_library()
    library.rwkv_quantize_file(source, target, name, file_version=version, **options)


@pytest.mark.parametrize(("version", "name"), LAYOUTS)
@pytest.mark.parametrize("source_type", ["FP32", "FP16"])
def test_bytes(tmp_path: Path, version: int, name: str, source_type: str) -> None:
    """Matrices by the rules from the values that the source holds; all else byte for byte."""
    tensors = adversarial_model(seed=len(name) + version)
    before = write_model(tmp_path / "in.bin", tensors, source_type)
    quantize(tmp_path / "in.bin", tmp_path / "out.bin", version, name)
    after = read_model(tmp_path / "out.bin")
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape
        if tensor.values().ndim == 1 or key in ("emb.weight", "head.weight"):
            assert after[key].name == tensor.name
            np.testing.assert_array_equal(after[key].data, tensor.data)
        else:
            assert after[key].name == name
            wanted = quants.quantize(version, name, tensor.values())
            np.testing.assert_array_equal(after[key].data, wanted, err_msg=key)


@pytest.mark.parametrize(("version", "name"), LAYOUTS)
def test_header(tmp_path: Path, version: int, name: str) -> None:
    write_model(tmp_path / "in.bin", random_model(1, n_vocab=8, n_embed=32, n_layer=1), "FP16", 100)
    quantize(tmp_path / "in.bin", tmp_path / "out.bin", version, name)
    header = np.frombuffer((tmp_path / "out.bin").read_bytes(), "<i4", 6)
    assert header.tolist() == [0x67676D66, version, 8, 32, 1, quants.TYPE_IDS[name]]


@pytest.mark.parametrize(("version", "name"), LAYOUTS)
def test_scale_too_large(tmp_path: Path, version: int, name: str) -> None:
    """Where scales are fp16, weights beyond its range are refused; float scales take them."""
    for largest in (1e7, 3e38):
        tensors = random_model(2, n_vocab=8, n_embed=32, n_layer=1)
        tensors["blocks.0.att.value.weight"][5, :2] = largest, -largest
        write_model(tmp_path / "in.bin", tensors)
        has_float_scale = quants.layout(version, name)["d"] == np.dtype("<f4")
        fits = has_float_scale and not (name == "Q4_1" and largest > 1e38)  # max - min
        if fits:
            quantize(tmp_path / "in.bin", tmp_path / "out.bin", version, name)
            written = read_model(tmp_path / "out.bin")["blocks.0.att.value.weight"]
            wanted = quants.quantize(version, name, tensors["blocks.0.att.value.weight"])
            np.testing.assert_array_equal(written.data, wanted)
            continue
        with pytest.raises(RWKVFileError, match=r"'blocks\.0\.att\.value\.weight'.* row 5 .*large"):
            quantize(tmp_path / "in.bin", tmp_path / "out2.bin", version, name)
        assert not (tmp_path / "out2.bin").exists()
        quantize(tmp_path / "in.bin", tmp_path / "out2.bin", version, name, allow_nan=True)
        (tmp_path / "out2.bin").unlink()
