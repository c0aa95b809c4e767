"""embedding.py and RWKV.embed against states that are taken apart here."""

import numpy as np
import pytest
from models import random_model, write_model
from rwkv_cpp import (
    RWKV,
    ForeignState,
    Normalizer,
    RWKVError,
    RWKVFileError,
    RWKVModel,
    RWKVSequence,
)
from rwkv_cpp.checkpoint import pack_safetensors
from rwkv_cpp.embedding import PARTS, Selection, fit, read_vectors
from rwkv_cpp.state import State

N_LAYER, N_EMBED = 3, 32
TEXTS = ["To be, or not to be", "", "é", "a\nb", "x" * 300, "To be"] * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of one model in two formats, and of another one."""
    folder = tmp_path_factory.mktemp("embedding")
    tensors = random_model(2, n_embed=N_EMBED, n_layer=N_LAYER)
    for name in ("FP32", "Q4_0"):
        write_model(folder / f"{name}.bin", tensors, name)
    write_model(folder / "other.bin", random_model(3, n_embed=N_EMBED, n_layer=N_LAYER))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    with RWKV(folder / "FP32.bin", n_threads=1) as model:
        yield model


def expected(path, texts):
    """(texts, layers, parts, n_embed): one text after the other, each alone."""
    rows = []
    with RWKVModel(None, path, 1) as model:
        for text in texts:
            _, state = model.eval_sequence(text.encode() or b"\n", None)
            parts = state[: N_LAYER * 5 * N_EMBED].reshape(N_LAYER, 5, N_EMBED)
            ffn_xx, att_xx, aa, bb, _ = parts.transpose(1, 0, 2)
            rows.append(np.stack([att_xx, ffn_xx, aa / bb], axis=1))
    return np.array(rows)


def test_parts_of_the_state(model, folder):
    found = model.embed(TEXTS)
    assert found.dtype == np.float32
    wanted = expected(folder / "FP32.bin", TEXTS[:6])
    assert found.tobytes() == np.concatenate([wanted] * 30).tobytes()  # the bits of each one alone


def test_one_text_and_none(model):
    rows = model.embed(TEXTS[:3])
    assert model.embed(TEXTS[2]).tobytes() == rows[2].tobytes()
    assert model.embed("").tobytes() == rows[1].tobytes() == model.embed("\n").tobytes()
    assert model.embed([[*"é".encode()], []]).tobytes() == rows[[2, 1]].tobytes()  # of tokens
    assert model.embed([]).shape == (0, N_LAYER * len(PARTS) * N_EMBED)


@pytest.mark.parametrize(
    ("layers", "parts"),
    [([1], ["aa/bb"]), ([2, 0], None), ([-1], ["aa/bb", "att_xx"]), (None, ["ffn_xx"])],
)
def test_selection(model, layers, parts):
    whole = model.embed(TEXTS[:4]).reshape(4, N_LAYER, len(PARTS), N_EMBED)
    found = model.embed(TEXTS[:4], layers=layers, parts=parts)
    pieces = [
        whole[:, layer, PARTS.index(part)]
        for layer in (range(N_LAYER) if layers is None else layers)
        for part in parts or PARTS
    ]
    assert found.tobytes() == np.concatenate(pieces, axis=1).tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layers: expected 0 to 2, or -1 to -3, found 3"),
        ({"layers": [-4]}, "found -4"),
        ({"layers": []}, "layers: expected at least one"),
        ({"parts": []}, "parts: expected at least one"),
        ({"parts": ["pp"]}, "parts: expected some of att_xx, ffn_xx, aa/bb, found 'pp'"),
        ({"texts": ["a", "\ud800"]}, "lone surrogate"),
        ({"texts": [[256]]}, r"texts\[0\]\[0\]"),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.embed(**({"texts": ["a"]} | arguments))


def test_progress(model):
    calls = []
    model.embed(TEXTS, progress=lambda *call: calls.append(call))
    n_tokens = sum(len(text.encode()) or 1 for text in TEXTS)
    assert calls[-1] == ("embedding", n_tokens, n_tokens)
    assert [call[1] for call in calls] == sorted({call[1] for call in calls})


# ---- what a state may hold ----


def states_of(n_layer, n_embed, extra=0):
    """An evaluation that answers with a state of known numbers, and the state to begin with."""
    values = np.arange(n_layer * 5 * n_embed + extra, dtype=np.float32) + 1

    def evaluate(sequences):
        assert all(isinstance(sequence, RWKVSequence) for sequence in sequences)
        logits = np.zeros((1, 4), np.float32)
        return [type("Result", (), {"state": values, "logits": logits}) for _ in sequences]

    return values, evaluate


def test_what_follows_the_layers_is_left_out():
    """RWKV-4a remembers a matrix after its layers."""
    values, evaluate = states_of(2, 4, extra=3 * 4)
    empty = State(values, n_layer=2, n_embed=4)
    ((places, vectors),) = read_vectors(evaluate, empty, [[1], [2]])
    assert sorted(places) == [0, 1]
    parts = values[:40].reshape(2, 5, 4)
    assert vectors[0].tolist() == vectors[1].tolist()
    assert vectors[0][:, 0].tolist() == parts[:, 1].tolist()
    assert vectors[0][:, 1].tolist() == parts[:, 0].tolist()
    assert vectors[0][:, 2].tolist() == (parts[:, 2] / parts[:, 3]).tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_states_that_are_not_finite(wrong):
    values, evaluate = states_of(2, 4)
    empty = State(values.copy(), n_layer=2)
    values[13] = wrong
    with pytest.raises(RWKVError, match="NaN or infinity"):
        list(read_vectors(evaluate, empty, [[1]]))


def test_a_model_with_tiny_attention(tmp_path):
    tensors = random_model(2, n_embed=N_EMBED, n_layer=N_LAYER, n_tiny=7, tiny_layer=1)
    write_model(tmp_path / "4a.bin", tensors)
    with RWKV(tmp_path / "4a.bin", n_threads=1) as model:
        assert model.n_state == (N_LAYER * 5 + 7) * N_EMBED
        found = model.embed(TEXTS[:6])
        model.embed("a", normalizer=model.fit_normalizer(TEXTS))
    assert found.tobytes() == expected(tmp_path / "4a.bin", TEXTS[:6]).tobytes()


# ---- normalizers ----


def test_fit(model):
    normalizer = model.fit_normalizer(TEXTS[:6] * 20 + TEXTS[:1])
    rows = model.embed(TEXTS[:6] * 20 + TEXTS[:1]).astype(np.float64)
    shape = (N_LAYER, len(PARTS), N_EMBED)
    assert normalizer.mean.shape == normalizer.deviation.shape == shape
    np.testing.assert_allclose(normalizer.mean.reshape(-1), rows.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalizer.deviation.reshape(-1), rows.std(axis=0), rtol=1e-5)
    found = model.embed(TEXTS[:4], normalizer=normalizer, layers=[1])
    wanted = (rows[:4] - rows.mean(axis=0)) / rows.std(axis=0)
    np.testing.assert_allclose(found, wanted.reshape(4, *shape)[:, 1].reshape(4, -1), atol=1e-3)


def test_far_from_zero():
    """A sum of squares in float32, or even float64, would lose the deviation."""
    draws = np.random.default_rng(0)
    vectors = (1e5 + draws.normal(size=(1000, 1, 3, 4))).astype(np.float32)
    vectors[:, :, 0] = 5.1  # never changes
    normalizer = fit([([], vectors[:1]), ([], vectors[1:400]), ([], vectors[400:])], "0" * 32)
    exact = vectors.astype(np.float64).std(axis=0)
    np.testing.assert_allclose(normalizer.deviation[:, 1:], exact[:, 1:], rtol=1e-6)
    assert (normalizer.deviation[:, 0] == 1).all()


def test_too_few_texts(model):
    for texts in ([], ["a"]):
        with pytest.raises(ValueError, match=f"at least two texts, found {len(texts)}"):
            model.fit_normalizer(texts)


def test_file_of_a_normalizer(model, folder, tmp_path):
    path = tmp_path / "normalizer"
    normalizer = model.fit_normalizer(TEXTS)
    normalizer.save(path)
    again = Normalizer.load(path)
    assert again.family == normalizer.family == model.family
    assert again.mean.tobytes() == normalizer.mean.tobytes()
    assert again.deviation.tobytes() == normalizer.deviation.tobytes()
    with RWKV(folder / "Q4_0.bin", n_threads=1) as same:
        same.embed("a", normalizer=again)  # another format of the model
    with (
        RWKV(folder / "other.bin", n_threads=1) as other,
        pytest.raises(ForeignState, match="fitted on another model"),
    ):
        other.embed("a", normalizer=again)


def test_files_that_are_no_normalizer(model, tmp_path):
    path = tmp_path / "file"
    model.fit_normalizer(TEXTS).save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(RWKVFileError):
            Normalizer.load(path)
    model.read("a").save(path)
    with pytest.raises(RWKVFileError, match="not of a normalizer"):
        Normalizer.load(path)
    metadata = {"format": "rwkv-normalizer", "version": "1", "family": "0" * 32}
    one = np.ones((2, 3, 4), np.float32)
    for arrays, more in (
        ({"mean": one, "deviation": one}, {"version": "2"}),
        ({"mean": one, "deviation": one}, {"family": "no"}),
        ({"mean": one}, {}),
        ({"mean": one, "deviation": one[:1]}, {}),
        ({"mean": one, "deviation": 0 * one}, {}),
        ({"mean": one * np.float32(np.nan), "deviation": one}, {}),
        ({"mean": one[:, :2], "deviation": one[:, :2]}, {}),
        ({"mean": one.astype(np.float16), "deviation": one.astype(np.float16)}, {}),
    ):
        path.write_bytes(pack_safetensors(arrays, metadata | more))
        with pytest.raises(RWKVFileError, match=r"damaged|in version '2'"):
            Normalizer.load(path)


def test_selection_of_numpy_numbers():
    assert Selection.of(3, np.array([0, -1]), None).layers == (0, 2)
