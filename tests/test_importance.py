"""importance.py: the file that the command writes against tokens evaluated one at a time."""

import numpy as np
import pytest
from commands import rwkv
from models import random_model, read_model, write_model
from rwkv_cpp import RWKVFileError, RWKVModel, RWKVSequence
from rwkv_cpp.importance import collect, write_importances

N_LAYER = 2


@pytest.fixture(scope="module")
def tensors():
    return random_model(5, n_embed=32, n_layer=N_LAYER)


@pytest.fixture(scope="module")
def path(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("importance") / "model.bin"
    write_model(path, tensors)
    return path


def one_by_one(path, documents):
    """Mean squares of what the head sees, from the hidden rows of single tokens."""
    squares = []
    with RWKVModel(None, path, 1) as model:
        for tokens in documents:
            state = None
            for token in tokens:
                sequence = RWKVSequence([token], state, n_logits=0, want_hidden=True)
                (result,) = model.eval_batch([sequence])
                state = result.state
                squares.append(result.hidden.astype(np.float64) ** 2)
    return np.mean(squares, axis=0)


def test_documents_of_any_length(path):
    random = np.random.default_rng(1)
    documents = [list(random.integers(0, 256, n)) for n in (1500, 0, 1, 700)]
    done = []
    with RWKVModel(None, path, 2) as model:
        importances = collect(model, documents, progress=done.append)
        apart = model.importances()  # each document as one call
        for tokens in filter(None, documents):
            model.eval_batch([RWKVSequence(tokens, n_logits=0)], apart)
    assert done == [1024, 2048, 2201]
    assert importances.n_tokens == 2201
    np.testing.assert_array_equal(importances.flat, apart.flat)
    means = importances.means()["head.weight"]
    np.testing.assert_allclose(means, one_by_one(path, documents), rtol=1e-5)


def test_command(tmp_path, path, tensors):
    text, target = tmp_path / "text.txt", tmp_path / "out.bin"
    text.write_text("O for a Muse of fire, " * 20)
    done = rwkv("importance", text, target, "-m", path, "--limit", 100, "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: 15 matrices over 100 tokens\n"
    found = read_model(target)
    columns = {key: values.shape[1] for key, values in tensors.items() if values.ndim == 2}
    del columns["emb.weight"]
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: (n,) for key, n in columns.items()
    }
    assert {(tensor.version, tensor.name) for tensor in found.values()} == {(101, "FP32")}
    expected = one_by_one(path, [text.read_bytes()[:100]])
    np.testing.assert_allclose(found["head.weight"].values(), expected, rtol=1e-5)


def test_documents_of_a_file(tmp_path, path):
    text, target = tmp_path / "text.jsonl", tmp_path / "out.bin"
    text.write_text('{"text": "To be,"}\n{"text": "or not"}\n')
    done = rwkv("importance", text, target, "-m", path, "--documents", "--limit", 9)
    assert "over 9 tokens" in done.stdout
    expected = one_by_one(path, [b"To be,", b"or "])
    np.testing.assert_allclose(read_model(target)["head.weight"].values(), expected, rtol=1e-5)


def test_errors(tmp_path, path):
    text, target = tmp_path / "text.txt", tmp_path / "out.bin"
    before = path.read_bytes()
    for content, arguments, message in (
        (b"", (target,), "the text is empty: importances need at least one token"),
        (b"\xff", (target,), "not UTF-8 at offset 0"),
        (b"a", (path,), "same file as the source"),
        (b"a", (text,), "same file as the source"),
        (b"a", (tmp_path,), "is a folder"),
    ):
        text.write_bytes(content)
        done = rwkv("importance", text, *arguments, "-m", path)
        assert done.returncode == 1
        assert message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert path.read_bytes() == before
    assert not target.exists()


def test_model_that_is_damaged(tmp_path, tensors):
    broken = {key: values.copy() for key, values in tensors.items()}
    broken["blocks.1.ln2.weight"][3] = np.nan
    write_model(tmp_path / "broken.bin", broken)
    with (
        RWKVModel(None, tmp_path / "broken.bin", 1) as model,
        pytest.raises(RWKVFileError, match=r"blocks\.1\.ffn\.\w+\.weight: .*NaN or infinite"),
    ):
        write_importances(tmp_path / "out.bin", model, collect(model, [[1, 2, 3]]))
    assert not (tmp_path / "out.bin").exists()
