"""scoring.py: calls of many documents against one token at a time in float64, and standard errors
against texts that are drawn again and again."""

import math

import numpy as np
import pytest
from models import file_weights, random_model, write_model
from reference import rwkv_v4
from rwkv_cpp import NonFiniteLogits, RWKVModel
from rwkv_cpp import scoring as module
from rwkv_cpp.scoring import (
    Comparisons,
    compare_logits,
    cross_entropies,
    independent_blocks,
    mean,
    score,
)

LENGTHS = [0, 1, 2, 40, 3, 0, 17, 33, 16, 1, 100]


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(7)
    return [random.integers(256, size=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Of one model, exact and not."""
    folder = tmp_path_factory.mktemp("scoring")
    tensors = random_model(2, n_embed=32, n_layer=2)
    for name in ("FP32", "Q4_0"):
        write_model(folder / name, tensors, name)
    return folder / "FP32", folder / "Q4_0"


@pytest.fixture(scope="module")
def models(paths):
    with RWKVModel(None, paths[0], 1) as exact, RWKVModel(None, paths[1], 2) as other:
        yield exact, other


def log_probabilities(path, tokens):
    """After each token, (n, n_vocab), and the logits."""
    logits, _ = rwkv_v4.forward(file_weights(path), tokens)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), logits


# ---- documents ----


@pytest.mark.parametrize("chunk_tokens", [16, 40, 1024])
@pytest.mark.parametrize("skip", [0, 1, 2, 15, 16, 17, 99, 100])
def test_documents(models, paths, documents, monkeypatch, chunk_tokens, skip):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk_tokens * 256)
    n_read, found = [], [[] for _ in documents]
    for done, scores in score(models[0], documents, skip=skip):
        n_read.append(done)
        for part in scores:
            assert len(part.tokens) == len(part.values) > 0
            found[part.document] += zip(part.tokens, part.values, strict=True)
    assert n_read == [*range(chunk_tokens, sum(LENGTHS), chunk_tokens), sum(LENGTHS)]
    first = max(skip, 1)
    for tokens, pairs in zip(documents, found, strict=True):
        assert [token for token, _ in pairs] == tokens[first:]
        if pairs:
            likely, _ = log_probabilities(paths[0], tokens)
            expected = -likely[np.arange(first - 1, len(tokens) - 1), tokens[first:]]
            # Logits are within 1e-5 of the largest, about 20, of the reference's.
            assert [loss for _, loss in pairs] == pytest.approx(expected, abs=1e-3)


def test_calls_do_not_change_bits(models, documents, monkeypatch):
    def losses():
        calls = score(models[0], documents)
        return np.concatenate([part.losses for _, scores in calls for part in scores])

    whole = losses()
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 16 * 256)
    assert (losses() == whole).all()


def test_two_models(models, paths, documents):
    tokens = documents[-1]
    ((_, (part,)),) = score(models[1], [tokens], base=models[0])
    (log_q, logits), (log_p, base_logits) = (log_probabilities(paths[i], tokens) for i in (1, 0))
    rows = np.arange(len(tokens) - 1)
    log_q, log_p = log_q[:-1], log_p[:-1]
    assert isinstance(part.values, Comparisons)
    found = part.values
    assert found.loss == pytest.approx(
        -log_q[rows, tokens[1:]], abs=5e-3
    )  # activations have 15 bits
    assert found.base_loss == pytest.approx(-log_p[rows, tokens[1:]], abs=1e-3)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert found.divergence == pytest.approx(divergence, abs=2e-3)
    assert divergence.mean() > 0.05  # so that the bound says something
    difference = np.abs(logits - base_logits).max(axis=1)[:-1]
    assert found.difference == pytest.approx(difference, abs=5e-3)
    same = (logits.argmax(axis=1) == base_logits.argmax(axis=1))[:-1]
    assert 0.2 < same.mean() < 0.95
    assert (found.agreement == same).mean() > 0.97  # near ties may fall on either side


def test_a_model_with_itself(models, documents):
    with models[0].clone(1) as same:
        for _, scores in score(models[0], documents, base=same):
            for part in scores:
                assert (part.values.loss == part.values.base_loss).all()
                assert (part.values.divergence == 0).all()
                assert (part.values.agreement == 1).all()
                assert (part.values.difference == 0).all()


@pytest.mark.parametrize("broken", [0, 1])
def test_nan(tmp_path, models, broken):
    tensors = random_model(2, n_embed=32, n_layer=1)
    tensors["head.weight"][5, 5] = np.nan
    write_model(tmp_path / "model.bin", tensors)
    with RWKVModel(None, tmp_path / "model.bin", 1) as model:
        with pytest.raises(NonFiniteLogits, match="in the 2 tokens from 1 on: is the model damag"):
            list(score(model, [[1, 2, 3]]))
        pair = [models[0], models[0].clone(1)]
        pair[broken] = model
        with pytest.raises(NonFiniteLogits, match="from 1 on of document 2: is the model or the"):
            list(score(pair[0], [[], [1, 2, 3]], base=pair[1]))


# ---- logits ----


def test_cross_entropies_are_stable():
    logits = np.array(
        [[1e30, 0, -1e30], [1e30, 0, -1e30], [0, 0, 0], [-200, -200, -300]], np.float32
    )
    given = logits.copy()
    losses = cross_entropies(logits, np.array([0, 1, 1, 2]))
    assert losses == pytest.approx([0, 1e30, math.log(3), 100 + math.log(2)])
    assert (logits == given).all()
    assert (compare_logits(logits, given, np.array([0, 1, 1, 2])).loss == losses).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 256), (3, 70000)])
def test_logits_in_blocks(shape):
    random = np.random.default_rng(1)
    logits, base = 5 * random.standard_normal((2, *shape)).astype(np.float32)
    targets = random.integers(shape[1], size=shape[0])
    q, p = (np.exp(x - x.max(axis=1, keepdims=True)) for x in (logits, base.astype(np.float64)))
    q, p = (x / x.sum(axis=1, keepdims=True, dtype=np.float64) for x in (q, p))
    losses = -np.log(q[np.arange(shape[0]), targets])
    assert cross_entropies(logits, targets) == pytest.approx(losses, abs=1e-5)
    found = compare_logits(logits, base, targets)
    assert found.loss == pytest.approx(losses, abs=1e-5)
    assert found.divergence == pytest.approx((p * np.log(p / q)).sum(axis=1), abs=1e-4)
    assert (found.agreement == (q.argmax(axis=1) == p.argmax(axis=1))).all()
    assert (found.difference == np.abs(logits - base).max(axis=1)).all()


# ---- means ----


def test_blocks():
    assert independent_blocks(np.array([0, 0, 2, 5, 5, 5])).tolist() == [0, 2, 3]
    assert independent_blocks(np.zeros(1, int)).tolist() == [0]
    assert independent_blocks(np.full(3, 4)).tolist() == [0, 1, 2]
    assert independent_blocks(np.zeros(12, int)).tolist() == [0, 3, 6, 9]
    assert independent_blocks(np.zeros(11, int)).tolist() == [0, 3, 6]


def test_mean_by_hand():
    values, blocks = np.array([1.0, 3.0, 5.0, 9.0]), np.arange(4)
    assert mean(values, blocks) == pytest.approx((4.5, np.std(values, ddof=1) / 2))
    assert mean(values, blocks[:1])[0] == 4.5
    assert math.isnan(mean(values, blocks[:1]).error)
    # (4 + 14) over (3 + 6): blocks are off by 4 - 2·3 and 14 - 2·6.
    weights = np.array([2.0, 1.0, 3.0, 3.0])
    assert mean(values, np.array([0, 2]), weights) == pytest.approx((2, math.sqrt(2 * 8) / 9))
    assert math.isnan(mean(values, blocks, 0 * values).value)


@pytest.mark.parametrize("kind", ["independent", "neighbours", "documents"])
def test_errors_are_what_means_scatter_by(kind):
    """Draw many texts: the error that each tells is, on average, how much their means differ."""
    random = np.random.default_rng(3)
    means, errors = [], []
    for _ in range(400):
        noise = random.standard_normal(2600)
        documents = np.zeros(2500, int)
        if kind == "independent":
            values = noise[:2500]
        elif kind == "neighbours":  # a moving average, whose mean scatters √10 times as much
            values = np.convolve(noise, np.ones(10) / math.sqrt(10))[50:2550]
        else:
            documents = np.sort(random.integers(100, size=2500))
            values = noise[:2500] + random.standard_normal(100)[documents]
        result = mean(values, independent_blocks(documents))
        means.append(result.value)
        errors.append(result.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
