"""perplexity.py against losses that are computed one token at a time in float64."""

import json
import math

import numpy as np
import pytest
from commands import rwkv
from models import file_weights, random_model, write_model
from reference import rwkv_v4
from rwkv_cpp import RWKVFileError, RWKVModel, load_tokenizer
from rwkv_cpp.perplexity import (
    first_tokens,
    measure,
    refuse_another_model,
)

TEXT = ("The quick brown fox jumps over the lazy dog. " * 9)[:400]
TOKENIZER = load_tokenizer(256)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Of one model, and of another one."""
    folder = tmp_path_factory.mktemp("perplexity")
    tensors = random_model(2, n_embed=32, n_layer=2)
    for name in ("FP32", "Q4_0"):
        write_model(folder / f"{name}.bin", tensors, name)
    write_model(folder / "other.bin", random_model(3, n_embed=32, n_layer=2))
    return folder


@pytest.fixture(scope="module")
def path(paths):
    return paths / "FP32.bin"


@pytest.fixture(scope="module")
def model(path):
    with RWKVModel(None, path, 1) as model:
        yield model


def log_probabilities(path, text):
    """(n, n_vocab) after each byte of a text."""
    logits, _ = rwkv_v4.forward(file_weights(path), text.encode())
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def losses_of(path, text):
    """Of the tokens 1, 2, … of a text."""
    targets = list(text.encode()[1:])
    return -log_probabilities(path, text)[np.arange(len(targets)), targets]


@pytest.fixture(scope="module")
def losses(path):
    return losses_of(path, TEXT)


def error_of_blocks(values, size):
    """What equal blocks of neighbours say about their mean."""
    blocks = np.reshape(values, (-1, size)).mean(axis=1)
    return np.std(blocks, ddof=1) / math.sqrt(len(blocks))


# ---- one text, many, two models ----


@pytest.mark.parametrize("skip", [0, 1, 2, 250, 399])
def test_loss(model, losses, skip):
    calls = []
    result = measure(
        model,
        TOKENIZER,
        [list(TEXT.encode())],
        skip=skip,
        progress=lambda *call: calls.append(call),
    )
    scored = losses[max(skip, 1) - 1 :]
    assert (result.n_documents, result.n_tokens) == (1, 400)
    assert (result.n_scored, result.n_bytes) == (len(scored), len(scored))
    # Logits are within 1e-5 of the largest, about 20, of the reference's.
    assert result.loss_per_token.value == pytest.approx(scored.mean(), abs=5e-4)
    assert result.loss_per_byte == pytest.approx(result.loss_per_token, nan_ok=True)
    assert result.bits_per_byte.value == pytest.approx(result.loss_per_byte.value / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(result.loss_per_token.value))
    assert result.comparison is None
    assert calls[-1] == (400, pytest.approx(result.loss_per_token.value))


def test_error_of_one_text(model, losses):
    result = measure(model, TOKENIZER, [list(TEXT[:325].encode())])
    error = error_of_blocks(losses[:324], 18)
    assert result.loss_per_token.error == pytest.approx(error, rel=1e-2)
    assert result.bits_per_byte.error == pytest.approx(error / math.log(2), rel=1e-2)


def test_documents(model, path):
    texts = [TEXT[i : i + 20] for i in range(0, 400, 20)]
    result = measure(model, TOKENIZER, [list(text.encode()) for text in texts], skip=5)
    scored = np.array([losses_of(path, text)[4:] for text in texts])
    assert (result.n_documents, result.n_tokens, result.n_scored) == (20, 400, 300)
    assert result.loss_per_token.value == pytest.approx(scored.mean(), abs=5e-4)
    assert result.loss_per_token.error == pytest.approx(error_of_blocks(scored, 15), rel=1e-2)


def test_tokens_of_several_bytes(model):
    class Pairs:
        def token_bytes(self, token):
            return b"xx" if token else b""

    result = measure(model, Pairs(), [[1, 2, 0, 3]])
    assert result.n_bytes == 4
    assert result.loss_per_byte.value == pytest.approx(result.loss_per_token.value * 3 / 4)
    nothing = measure(model, Pairs(), [[1, 0, 0]])
    assert nothing.n_bytes == 0
    assert math.isnan(nothing.bits_per_byte.value)


def test_comparison(model, paths):
    text = TEXT[:325]
    with RWKVModel(None, paths / "Q4_0.bin", 1) as other:
        result = measure(other, TOKENIZER, [list(text.encode())], base=model)
    log_q, log_p = (
        log_probabilities(paths / f"{name}.bin", text)[:-1] for name in ("Q4_0", "FP32")
    )
    rows, targets = np.arange(324), list(text.encode()[1:])
    found = result.comparison
    assert found.base_loss.value == pytest.approx(-log_p[rows, targets].mean(), abs=1e-3)
    difference = (log_p - log_q)[rows, targets]
    assert found.loss_difference == pytest.approx(
        (difference.mean(), error_of_blocks(difference, 18)), abs=2e-3
    )
    assert found.loss_difference.value == pytest.approx(
        result.loss_per_token.value - found.base_loss.value
    )
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert found.divergence == pytest.approx(
        (divergence.mean(), error_of_blocks(divergence, 18)), rel=1e-2
    )
    assert found.max_divergence == pytest.approx(divergence.max(), rel=1e-2)
    agreement = log_q.argmax(axis=1) == log_p.argmax(axis=1)
    assert found.agreement.value == pytest.approx(agreement.mean(), abs=0.01)


# ---- bad input ----


@pytest.mark.parametrize("n_tokens", range(10))
@pytest.mark.parametrize("skip", [0, 1, 2, 9])
def test_few_tokens(model, n_tokens, skip):
    """I-11"""
    tokens = [65] * n_tokens
    if n_tokens <= max(skip, 1):
        with pytest.raises(ValueError, match=f"text has {n_tokens} tokens, expected at least"):
            measure(model, TOKENIZER, [tokens], skip=skip)
        with pytest.raises(ValueError, match=f"longest of the documents has {n_tokens} tokens"):
            measure(model, TOKENIZER, [[], tokens], skip=skip)
    else:
        result = measure(model, TOKENIZER, [tokens, [65]], skip=skip)
        assert result.n_scored == n_tokens - max(skip, 1)
        assert math.isnan(result.loss_per_token.error) == (result.n_scored == 1)


def test_no_documents(model):
    with pytest.raises(ValueError, match="longest of the documents has 0 tokens"):
        measure(model, TOKENIZER, [])


def test_bases_that_do_not_fit(model, paths, tmp_path):
    write_model(tmp_path / "small.bin", random_model(2, n_vocab=100, n_embed=32, n_layer=1))
    with RWKVModel(None, tmp_path / "small.bin", 1) as base, pytest.raises(ValueError, match="100"):
        measure(model, TOKENIZER, [[1, 2]], base=base)
    refuse_another_model(paths / "Q4_0.bin", paths / "FP32.bin")
    with pytest.raises(RWKVFileError, match=r"other\.bin: is another model than .*FP32\.bin"):
        refuse_another_model(paths / "FP32.bin", paths / "other.bin")


def test_limit():
    documents = [[1, 2, 3], [], [4, 5], [6]]
    assert first_tokens(documents, None) == documents
    for limit, kept in (
        (1, [[1]]),
        (3, [[1, 2, 3]]),
        (4, [[1, 2, 3], [], [4]]),
        (99, documents),
    ):
        assert first_tokens(documents, limit) == kept


# ---- the command ----


def shown(output):
    return dict(line.split("  ", 1) for line in output.splitlines())


def test_command(path, tmp_path, losses):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = rwkv("perplexity", text, "-m", path, "--skip", 10, "--limit", 200, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert (figures["documents"], figures["tokens"], figures["scored_tokens"]) == (1, 200, 190)
    assert figures["loss_per_token"] == pytest.approx(losses[9:199].mean(), abs=5e-4)
    assert figures["loss_per_token_error"] > 0
    done = rwkv("perplexity", "-", "-m", path, "--threads", 1, input=TEXT.encode())
    lines = shown(done.stdout.decode())
    assert lines["tokens"].strip() == "400"
    value, error = lines["loss per token"].split(" ± ")
    assert float(value) == pytest.approx(losses.mean(), abs=5e-4)
    assert 0 < float(error) < 1
    two = json.loads(rwkv("perplexity", "-", "-m", path, "--json", input=b"ab").stdout)
    assert two["loss_per_token_error"] is None
    for arguments in (["missing.txt"], [tmp_path], ["-"], ["-", "--compare", "missing.bin"]):
        done = rwkv("perplexity", *arguments, "-m", path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_command_with_documents(path, tmp_path):
    texts = [TEXT[:90], "", TEXT[5:50], TEXT[7:40]]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--documents", "--limit", 140, "--skip", 3]
    figures = json.loads(rwkv("perplexity", lines, "-m", path, "--json", *arguments).stdout)
    scored = [losses_of(path, text)[2:] for text in (texts[0], texts[2], texts[3][:5])]
    assert (figures["documents"], figures["tokens"]) == (4, 140)
    assert figures["scored_tokens"] == sum(map(len, scored))
    assert figures["loss_per_token"] == pytest.approx(np.concatenate(scored).mean(), abs=5e-4)


def test_command_with_a_base(paths, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    exact, quantized, other = (paths / f"{name}.bin" for name in ("FP32", "Q4_0", "other"))
    lines = shown(rwkv("perplexity", text, "-m", quantized, "--compare", exact).stdout)
    assert float(lines["KL divergence"].split(" ± ")[0]) > 0.01
    assert 0.5 < float(lines["top-1 agreement"].split(" ± ")[0]) < 1
    # A base is loaded as it is: what an option costs is seen beside the same file.
    for option, is_same in (([], True), (["--activations", "int8"], False)):
        done = rwkv("perplexity", text, "-m", quantized, "--compare", quantized, "--json", *option)
        figures = json.loads(done.stdout)
        assert (figures["kl_divergence"] == 0) == is_same
        assert (figures["largest_logit_difference"] == 0) == is_same
    done = rwkv("perplexity", text, "-m", quantized, "--compare", other)
    assert done.returncode == 1
    assert "is another model than" in done.stderr
