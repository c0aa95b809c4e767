"""rescale.py: the same function in float64, the same bits through the engine, and what is levelled.

Independent of the module: the outliers are made here, and the forward pass is the reference's.
"""

import numpy as np
import pytest
from commands import rwkv
from models import file_weights, random_model, read_model, write_model
from reference import rwkv_v4
from rwkv_cpp import RWKVFileError, RWKVModel
from rwkv_cpp.fingerprint import family_id
from rwkv_cpp.quantize import quantize_file
from rwkv_cpp.rescale import rescale

N_LAYER, N_FFN = 2, 160
OUTLIERS = {3: 32.0, 77: 8.0, 78: 1 / 16}  # hidden channel: how much longer its row of key is
TOKENS = list(b"To be, or not to be, that is the question: whether")


@pytest.fixture(scope="module")
def plain():
    return random_model(6, n_embed=32, n_layer=N_LAYER, n_ffn=N_FFN)


@pytest.fixture(scope="module")
def tensors(plain):
    """The same function as `plain`, with outliers in the last layer."""
    tensors = {key: values.copy() for key, values in plain.items()}
    for channel, factor in OUTLIERS.items():
        tensors["blocks.1.ffn.key.weight"][channel] *= factor
        tensors["blocks.1.ffn.value.weight"][:, channel] /= factor**2
    return tensors


def run(path, tokens=TOKENS):
    with RWKVModel(None, path, 2) as model:
        logits, state = model.eval_sequence(tokens, None)
    return logits, state


@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_the_same_function(tmp_path, tensors, data_type):
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    write_model(source, tensors, data_type)
    rescaled = rescale(source, target)
    assert [(row.layer, row.n_changed, row.n_channels) for row in rescaled] == [
        (0, 0, N_FFN),
        (1, 3, N_FFN),
    ]
    assert rescaled[1].largest == 32
    before, after = read_model(source), read_model(target)
    changed = {key for key in before if before[key].data.tobytes() != after[key].data.tobytes()}
    assert changed == {"blocks.1.ffn.key.weight", "blocks.1.ffn.value.weight"}
    assert {key: tensor.name for key, tensor in before.items()} == {
        key: tensor.name for key, tensor in after.items()
    }
    assert family_id(source) == family_id(target)
    expected = [rwkv_v4.forward(file_weights(path), TOKENS)[0] for path in (source, target)]
    if data_type == "FP32":
        np.testing.assert_allclose(*expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(run(source), run(target), strict=True):
            assert one.tobytes() == other.tobytes()
    else:  # weights below 2^-14 are rounded
        np.testing.assert_allclose(*expected, atol=2e-4)
        np.testing.assert_allclose(run(source)[0], run(target)[0], atol=2e-4)


def test_outliers_are_gone(tmp_path, plain, tensors):
    source, target, expected = (tmp_path / name for name in ("source", "target", "expected"))
    write_model(source, tensors)
    write_model(expected, plain)
    rescale(source, target)
    assert target.read_bytes() == expected.read_bytes()


def test_quantizing_gains(tmp_path, tensors):
    source, level, quantized = (tmp_path / name for name in ("source", "level", "quantized"))
    write_model(source, tensors)
    rescale(source, level)
    exact = rwkv_v4.forward(file_weights(source), TOKENS)[0]
    errors = []
    for path in (source, level):
        quantize_file(path, quantized, "Q4_1")
        errors.append(np.abs(rwkv_v4.forward(file_weights(quantized), TOKENS)[0] - exact).mean())
    assert errors[1] < 0.7 * errors[0]


def test_columns_of_zeros_and_far_ones(tmp_path, plain):
    tensors = {key: values.copy() for key, values in plain.items()}
    value = tensors["blocks.0.ffn.value.weight"]
    value[:, 5] = 0
    value[:, 6] *= 2.0**-60
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    write_model(source, tensors)
    assert rescale(source, target)[0].n_changed == 1
    found = file_weights(target)["blocks.0.ffn.value.weight"]
    assert not found[:, 5].any()
    np.testing.assert_array_equal(found[:, 6], value[:, 6] * 2.0**24)
    assert run(source)[0].tobytes() == run(target)[0].tobytes()


def test_rows_of_half_precision_do_not_overflow(tmp_path, plain):
    tensors = {key: values.copy() for key, values in plain.items()}
    tensors["blocks.0.ffn.key.weight"][9, 2] = 20000
    tensors["blocks.0.ffn.value.weight"][:, 9] *= 4.0**4
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    write_model(source, tensors, "FP16")
    assert rescale(source, target)[0].largest == 2
    assert file_weights(target)["blocks.0.ffn.key.weight"][9, 2] == 40000


def test_errors(tmp_path, tensors):
    source, quantized, broken = (tmp_path / name for name in ("source", "quantized", "broken"))
    write_model(source, tensors)
    quantize_file(source, quantized, "Q5_1")
    write_model(
        broken, tensors | {"blocks.1.ffn.value.weight": np.full((32, N_FFN), np.inf, np.float32)}
    )
    target = tmp_path / "target.bin"
    with pytest.raises(RWKVFileError, match=r"is Q5_1, expected FP32 or FP16; rescale the model b"):
        rescale(quantized, target)
    with pytest.raises(RWKVFileError, match=r"blocks\.1\.ffn\.value\.weight.* NaN or infinite"):
        rescale(broken, target)
    with pytest.raises(ValueError, match="same file"):
        rescale(source, source)
    assert not target.exists()


def test_command(tmp_path, plain, tensors):
    source, target = tmp_path / "source.bin", tmp_path / "target.bin"
    write_model(source, tensors)
    done = rwkv("rescale", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    size = f"{target}: {target.stat().st_size:,} bytes\n"
    assert done.stdout == f"layer 1         3 of 160 channels, by up to 32\n{size}"
    done = rwkv("rescale", target, source)
    assert done.stdout.startswith("no channel stands out")
    assert source.read_bytes() == target.read_bytes()
    done = rwkv("rescale", tmp_path / "missing", target)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
