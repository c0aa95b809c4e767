"""perplexity.py against losses that are computed one token at a time in float64."""

import json
import math

import numpy as np
import pytest
from commands import rwkv
from models import file_weights, random_model, write_model
from reference import rwkv_v4
from rwkv_cpp import NonFiniteLogits, RWKVFileError, RWKVModel, load_tokenizer
from rwkv_cpp import perplexity as module
from rwkv_cpp.perplexity import cross_entropy, measure, read_text

TEXT = ("The quick brown fox jumps over the lazy dog. " * 9)[:400]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("perplexity") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2))
    return path


@pytest.fixture(scope="module")
def model(path):
    with RWKVModel(None, path, 1) as model:
        yield model


@pytest.fixture(scope="module")
def losses(path):
    """Of the tokens 1, 2, … of TEXT."""
    logits, _ = rwkv_v4.forward(file_weights(path), TEXT.encode())
    likely = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return -likely[np.arange(len(TEXT) - 1), list(TEXT.encode()[1:])]


@pytest.mark.parametrize("chunk_logits", [1 << 22, 16 * 256, 100 * 256])
@pytest.mark.parametrize("skip", [0, 1, 2, 15, 16, 17, 250, 399])
def test_loss(model, losses, monkeypatch, chunk_logits, skip):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk_logits)
    calls = []
    result = measure(
        model,
        load_tokenizer(256),
        list(TEXT.encode()),
        skip=skip,
        progress=lambda *call: calls.append(call),
    )
    scored = losses[max(skip, 1) - 1 :]
    assert (result.n_tokens, result.n_scored, result.n_bytes) == (400, len(scored), len(scored))
    # Logits are within 1e-5 of the largest, about 20, of the reference's.
    assert result.loss_per_token == pytest.approx(scored.mean(), abs=5e-4)
    assert result.loss_per_byte == result.loss_per_token
    assert result.bits_per_byte == pytest.approx(result.loss_per_byte / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(result.loss_per_token))
    assert calls[-1] == (400, result.loss_per_token)


def test_tokens_of_several_bytes(model):
    class Pairs:
        def token_bytes(self, token):
            return b"xx" if token else b""

    result = measure(model, Pairs(), [1, 2, 0, 3])
    assert result.n_bytes == 4
    assert result.loss_per_byte == pytest.approx(result.loss_per_token * 3 / 4)


@pytest.mark.parametrize("n_tokens", range(10))
@pytest.mark.parametrize("skip", [0, 1, 2, 9])
def test_few_tokens(model, n_tokens, skip):
    """I-11"""
    tokens = [65] * n_tokens
    if n_tokens <= max(skip, 1):
        with pytest.raises(ValueError, match=f"has {n_tokens} tokens"):
            measure(model, load_tokenizer(256), tokens, skip=skip)
    else:
        result = measure(model, load_tokenizer(256), tokens, skip=skip)
        assert result.n_scored == n_tokens - max(skip, 1)


def test_cross_entropy_is_stable():
    large, flat, small = np.array([[1e30, 0, -1e30], [0, 0, 0], [-200, -200, -300]], np.float32)
    assert cross_entropy(large, 0) == 0
    assert cross_entropy(large, 1) == pytest.approx(1e30)
    assert cross_entropy(flat, 1) == pytest.approx(math.log(3))
    assert cross_entropy(small, 2) == pytest.approx(100 + math.log(2))
    assert small.tolist() == [-200, -200, -300]


def test_model_of_nan(tmp_path):
    tensors = random_model(2, n_embed=32, n_layer=1)
    tensors["head.weight"][5, 5] = np.nan
    write_model(tmp_path / "model.bin", tensors)
    with RWKVModel(None, tmp_path / "model.bin", 1) as model, pytest.raises(NonFiniteLogits):
        measure(model, load_tokenizer(256), [1, 2, 3])


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff")
    with pytest.raises(RWKVFileError, match="not UTF-8 at offset 3"):
        read_text(tmp_path / "text")
    assert rwkv("perplexity", "-", input=b"\xff").stderr == b"error: stdin: not UTF-8 at offset 0\n"


# ---- the command ----


def test_command(path, tmp_path, losses):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = rwkv("perplexity", text, "-m", path, "--skip", 10, "--limit", 200, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["tokens"] == 200
    assert figures["scored_tokens"] == 190
    assert figures["loss_per_token"] == pytest.approx(losses[9:199].mean(), abs=5e-4)
    done = rwkv("perplexity", "-", "-m", path, "--threads", 1, input=TEXT.encode())
    lines = dict(line.rsplit(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert lines["tokens"] == "400"
    assert float(lines["loss per token"]) == pytest.approx(losses.mean(), abs=5e-4)
    for arguments in (["missing.txt"], [tmp_path], ["-"]):
        done = rwkv("perplexity", *arguments, "-m", path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
