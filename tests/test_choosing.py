"""choosing.py: every cut and mirostat against their rules, in small and large vocabularies."""

import math

import numpy as np
import pytest
from frequencies import check_frequencies
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.sampling import cut_probabilities, mirostat_probabilities, token_at
from rwkv_cpp.choosing import NEAR, choose, choose_mirostat
from rwkv_cpp.philox import uniform

CUTS = [
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 20},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 0.3, "top_px": 0.03},
    {"top_p": 0.9, "top_px": 0.2},
    {"top_p": 0.9, "top_px": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"tail_free": 0.0},
    {"tail_free": 0.5},
    {"tail_free": 0.95},
    {"typical_p": 0.0},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"tail_free": 0.9999, "top_k": 15},
    {"top_k": 10, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    {"top_p": 0.95, "tail_free": 0.9, "typical_p": 0.7, "temperature": 0.5},
]


def label(value: object) -> str | None:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def points(count: int) -> list[float]:
    return [uniform(1, 0, position) for position in range(count)]


def logits_like_a_model(n_vocab: int, seed: int = 0) -> np.ndarray:
    """Normal scores of spread 3, and a peak: a few tokens hold most of the probability."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(n_vocab) * 3 - 8
    logits[rng.choice(n_vocab, 40, replace=False)] += rng.exponential(4, 40) + 10
    return logits.astype(np.float32)


@pytest.mark.parametrize("cuts", CUTS, ids=label)
def test_frequencies(cuts):
    logits = np.random.default_rng(7).standard_normal(20).astype(np.float32)
    tokens = [choose(logits, lambda point=point: point, **cuts) for point in points(5000)]
    check_frequencies(tokens, cut_probabilities(logits, **cuts))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_of_mirostat(version, limit, temperature):
    logits = np.random.default_rng(9).standard_normal(12).astype(np.float32)
    probabilities, surprises = mirostat_probabilities(logits, version, limit, temperature)
    tokens = []
    for point in points(5000):
        token, surprise = choose_mirostat(
            logits, lambda point=point: point, version, temperature=temperature, limit=limit
        )
        assert surprise == pytest.approx(surprises[token], rel=1e-12)
        tokens.append(token)
    check_frequencies(tokens, probabilities)


@pytest.mark.parametrize("cuts", CUTS, ids=label)
@pytest.mark.parametrize("kind", ["peaked", "flat", "steps"])
def test_large_vocabularies(cuts, kind):
    """Narrowing changes nothing: of 5000 tokens just those are kept that the rules say."""
    logits = logits_like_a_model(5000)
    if kind == "flat":
        logits *= 0.01
    elif kind == "steps":  # many of the same score at every cut
        logits = np.round(logits / 4) * 4
    kept = np.flatnonzero(cut_probabilities(logits, **cuts))
    # At an endless temperature, those that are kept stand in a row and are equally likely.
    for rank in {0, kept.size - 1, *range(0, kept.size, max(1, kept.size // 50))}:
        point = (rank + 0.5) / kept.size
        assert (
            choose(logits, lambda point=point: point, **{**cuts, "temperature": 1e9}) == kept[rank]
        )


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.integers(-2000, 2000).map(lambda n: n / 64), min_size=1, max_size=40),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    top_px=st.floats(0, 1),
    min_p=st.floats(0, 1),
    tail_free=st.floats(0, 1),
    typical_p=st.floats(0, 1),
    position=st.integers(0, 2**32),
)
def test_each_draw(logits, position, **cuts):
    """A draw is the token at its point, unless rounding decides, here or in the rule."""
    point = uniform(5, 0, position)
    logits = np.array(logits)
    probabilities = cut_probabilities(logits, **cuts)
    for name in ("top_p", "top_px", "min_p", "tail_free", "typical_p"):
        for e in (-1e-11, 1e-11):
            near = {**cuts, name: min(max(cuts[name] + e, 0.0), 1.0)}
            if cuts[name] in (0.0, 1.0) and near[name] != cuts[name]:
                continue  # off, or an end of the range
            assume((cut_probabilities(logits, **near) == probabilities).all())
    near = {token_at(probabilities, min(max(point + e, 0.0), 1 - 1e-11)) for e in (-1e-11, 1e-11)}
    assert choose(logits, lambda: point, **cuts) in near


def test_tokens_that_are_not_near_the_best_are_drawn_too():
    """5000 tokens, each within 1e-8 of the best one's probability, hold 2e-5 of it together."""
    logits = np.full(5000, -NEAR - 1, np.float32)
    logits[4321] = 0
    outside = 4999 * math.exp(-NEAR - 1)
    border = 1 / (1 + outside)
    assert choose(logits, lambda: border * (1 - 1e-9)) == 4321
    assert choose(logits, lambda: border + 1e-9) == 0
    assert choose(logits, lambda: 1 - 2**-53) == 4999
    ids = {choose(logits, lambda e=e: border + (1 - border) * e) for e in np.linspace(0.1, 0.9, 9)}
    assert len(ids) == 9
    assert choose(logits, lambda: 0.999, temperature=50.0) not in (0, 4321)


def test_cuts_beyond_those_near_the_best():
    logits = np.linspace(0, -60, 5000).astype(np.float32)
    for cuts in ({"top_k": 4000}, {"min_p": math.exp(-40)}, {"top_p": 1 - 1e-9}):
        expected = cut_probabilities(logits, **cuts)
        kept = int((expected > 0).sum())
        assert kept > (logits >= -NEAR).sum()
        last = choose(logits, lambda: 1 - 2**-53, temperature=1e9, **cuts)
        assert abs(last - (kept - 1)) <= (cuts.get("top_p") is not None)


def test_tails_that_begin_where_the_near_ones_end():
    """Bends far from the best token count too: here most of those but the first are there."""
    rng = np.random.default_rng(4)
    weights = np.full(5000, 1e-6)
    weights[:2000] = 4e-5  # just not near the best one
    weights[2000:2030] = np.linspace(6e-5, 4.6e-5, 30) + rng.random(30) * 1e-6
    weights[2030] = 1
    logits = np.log(rng.permutation(weights))
    assert (logits > -NEAR).sum() == 31
    found = set()
    for tail_free in (*np.linspace(0.9997, 1 - 1e-9, 40), 0.5):
        for top_k in (0, 25, 2500):
            cuts = {"tail_free": tail_free, "top_k": top_k}
            kept = np.flatnonzero(cut_probabilities(logits, **cuts))
            for rank in (0, kept.size // 2, kept.size - 1):
                point = (rank + 0.5) / kept.size
                token = choose(logits, lambda point=point: point, temperature=1e9, **cuts)
                assert token == kept[rank], cuts
            found.add(kept.size)
    assert len(found) > 5


def test_nothing_is_drawn_where_nothing_is_left_to_chance():
    def fail() -> float:
        raise AssertionError

    logits = np.array([0.0, 2.0, 2.0])
    assert choose(logits, fail, temperature=0) == 1
    assert choose(logits, fail, top_p=0) == 1
    assert choose(np.array([0.0, np.inf]), fail) == 1
    assert choose_mirostat(np.array([0.0, np.inf]), fail, 1, temperature=1, limit=3) == (1, 0.0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "logits",
    [[1.0], [0.0] * 300, [0.0, -math.inf], [1e308, -1e308, 0.0], list(range(0, -2000, -1))],
)
@pytest.mark.parametrize("limit", [-50.0, 0.0, 5.0, 1000.0])
def test_mirostat_on_odd_rows(version, logits, limit):
    with np.errstate(all="raise"):
        for point in (0.0, 0.5, 1 - 2**-53):
            token, surprise = choose_mirostat(
                np.array(logits), lambda point=point: point, version, temperature=1.0, limit=limit
            )
            assert logits[token] > -math.inf
            assert surprise >= -1e-12


def test_mirostat_steers():
    """The surprise averages out at the target."""
    logits = logits_like_a_model(3000) * np.float32(0.4)
    for version in (1, 2):
        limit, surprises = 8.0, []
        for point in points(600):
            _, surprise = choose_mirostat(
                logits, lambda point=point: point, version, temperature=1.0, limit=limit
            )
            limit -= 0.1 * (surprise - 4.0)
            surprises.append(surprise)
        assert np.mean(surprises[100:]) == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize("cuts", CUTS, ids=label)
@pytest.mark.parametrize("n_vocab", [30, 5000])
def test_scores_stay_as_they_were(cuts, n_vocab):
    logits = logits_like_a_model(n_vocab + 40)
    before = logits.tobytes()
    logits.flags.writeable = False
    choose(logits, lambda: 0.7, **cuts)
    for version in (1, 2):
        choose_mirostat(logits, lambda: 0.7, version, temperature=0.7, limit=4.0)
    assert logits.tobytes() == before
