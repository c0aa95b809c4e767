"""Sampling against the rule in decimal numbers, and on everything that logits should not be."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampling import token_at, token_probabilities
from rwkv_cpp.errors import NonFiniteLogits
from rwkv_cpp.sampling import sample_logits

INF = math.inf
NAN = math.nan


def draw(logits: np.ndarray, count: int, seed: int = 0, **options: object) -> np.ndarray:
    """How often each token came out of `count` draws."""
    rng = np.random.default_rng(seed)
    tokens = [sample_logits(logits, rng=rng, **options) for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits))


def chi_square_bound(freedom: int) -> float:
    """What chi square exceeds with a probability of 1e-6, by Wilson and Hilferty's cube of a
    normal variable; 4.7534 is the point that this exceeds with that probability."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.7534 * math.sqrt(spread)) ** 3


def check_frequencies(counts: np.ndarray, probabilities: list[float]) -> None:
    expected = np.array(probabilities) * counts.sum()
    assert not counts[expected == 0].any()
    used = expected > 0
    assert expected[used].min() >= 5, "the test itself: too few draws for chi square"
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi_square < chi_square_bound(max(1, used.sum() - 1))


@pytest.mark.parametrize(
    ("temperature", "top_p", "bias"),
    [
        (1.0, 1.0, {}),
        (1.0, 0.8, {}),
        (0.5, 1.0, {}),
        (2.0, 0.9, {}),
        (0.8, 0.5, {3: 2.0, 5: -1.0}),
        (1.0, 1.0, {0: -INF, 7: 0.5}),
        (3.0, 0.7, {1: 1.5}),
    ],
)
def test_frequencies(temperature: float, top_p: float, bias: dict[int, float]) -> None:
    logits = np.random.default_rng(7).standard_normal(20).astype(np.float32)
    counts = draw(logits, 10_000, temperature=temperature, top_p=top_p, logit_bias=bias)
    check_frequencies(counts, token_probabilities(logits, temperature, top_p, bias))


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_frequencies_of_a_million(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(8).standard_normal(100)
    counts = draw(logits, 1_000_000, temperature=temperature, top_p=top_p)
    check_frequencies(counts, token_probabilities(logits, temperature, top_p))


@settings(max_examples=200, deadline=None)
@given(
    # Multiples of 1/64: logits closer than 1e-16 have the same probability in float64.
    logits=st.lists(st.integers(-2000, 2000).map(lambda n: n / 64), min_size=1, max_size=40),
    temperature=st.floats(0.05, 20),
    top_p=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_each_draw(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    """A seeded draw is the token at that generator's first point."""
    probabilities = token_probabilities(logits, temperature, top_p)
    # Rounding may move a boundary by some 1e-15, so a little to each side has to give the same;
    # likewise a sum that meets top_p exactly in decimal numbers is left out.
    point = np.random.default_rng(seed).random()
    near = {token_at(probabilities, min(max(point + e, 0.0), 1 - 1e-12)) for e in (-1e-12, 1e-12)}
    edges = (
        token_probabilities(logits, temperature, min(max(top_p + e, 0), 1)) for e in (-1e-12, 1e-12)
    )
    if len(near) == 1 and (top_p == 0 or all(edge == probabilities for edge in edges)):
        assert sample_logits(np.array(logits), temperature, top_p, rng=seed) in near


def test_top_p_narrows_large_vocabularies_to_the_same_tokens() -> None:
    """The cutoff is found without sorting everything: compare with sorting everything."""
    rng = np.random.default_rng(3)
    for spread in (0.0, 0.01, 1.0, 3.0, 30.0):
        logits = np.round(rng.standard_normal(20_000) * spread, 2)  # many ties
        weights = np.exp(logits - logits.max())
        descending = np.sort(weights)[::-1]
        for top_p in (0.001, 0.3, 0.8, 0.99, 0.9999999):
            place = np.searchsorted(np.cumsum(descending), top_p * weights.sum(), side="right")
            kept = np.flatnonzero(weights >= descending[min(place, descending.size - 1)])
            cumulative = np.cumsum(weights[kept])
            for seed in range(3):
                point = np.random.default_rng(seed).random() * cumulative[-1]
                expected = kept[np.searchsorted(cumulative, point, side="right")]
                assert sample_logits(logits, 1.0, top_p, rng=seed) == expected, (spread, top_p)


# S-01


@pytest.mark.parametrize(
    "logits",
    [[0.0, NAN, 1.0], [NAN] * 3, [-INF] * 3, [INF, 0.0, INF], [INF, NAN], [-INF, NAN, -INF]],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_from_logits_that_name_none(logits: list[float], temperature: float) -> None:
    with pytest.raises(NonFiniteLogits):
        sample_logits(logits, temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_one_infinite_logit_wins(temperature: float, top_p: float) -> None:
    assert sample_logits([5.0, INF, -INF], temperature, top_p) == 1


def test_minus_infinity_is_never_drawn() -> None:
    counts = draw(np.array([0.0, -INF, 0.0, -INF]), 200, temperature=1e6, top_p=1.0)
    assert counts[1] == counts[3] == 0
    assert counts[0] > 0
    assert counts[2] > 0


# S-02


def test_temperature_zero_is_the_first_of_the_most_likely() -> None:
    assert sample_logits([0.0, 3.0, 1.0, 3.0], temperature=0) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_tiny_temperatures_do_not_underflow(temperature: float) -> None:
    assert draw(np.array([1.0, 2.0, 1.999]), 50, temperature=temperature, top_p=1.0)[1] == 50


def test_a_huge_temperature_does_not_revive_what_top_p_dropped() -> None:
    counts = draw(np.array([5.0, 4.9, 0.0, -1.0]), 500, temperature=1e300, top_p=0.9)
    assert counts[2:].sum() == 0
    check_frequencies(counts, [0.5, 0.5, 0, 0])


def test_probabilities_that_underflow_still_count_at_a_high_temperature() -> None:
    counts = draw(np.array([0.0, -1000.0]), 500, temperature=1e6, top_p=1.0)
    check_frequencies(counts, token_probabilities([0.0, -1000.0], 1e6, 1.0))


@pytest.mark.parametrize("temperature", [-1.0, -1e-300, INF, NAN])
def test_temperatures_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        sample_logits([0.0, 1.0], temperature)


# S-03


def test_top_p_zero_keeps_the_top_token_alone() -> None:
    assert draw(np.array([1.0, 2.0, 2.0, 0.0]), 50, temperature=5.0, top_p=0)[1] == 50


def test_a_sum_of_just_top_p_takes_one_more() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])  # whose powers are exact again
    for top_p, kept in ((0.5, {0, 1}), (0.75, {0, 1, 2, 3})):
        assert {sample_logits(logits, 1, top_p, rng=seed) for seed in range(99)} == kept


def test_a_tiny_top_p_keeps_ties_of_the_top_token() -> None:
    counts = draw(np.array([1.0, 2.0, 2.0, 0.0]), 300, top_p=1e-9)
    check_frequencies(counts, [0, 0.5, 0.5, 0])


@pytest.mark.parametrize("top_p", [0.999, 0.9999999, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_flat_tail_does_not_collapse(top_p: float, dtype: type) -> None:
    """In float32 the sum of such a tail never reaches 0.9999, so that no cutoff was found and the
    most likely token came out each time."""
    logits = np.zeros(50_277, dtype)
    logits[17] = 1e-3
    tokens = {sample_logits(logits, 1.0, top_p, rng=seed) for seed in range(20)}
    assert len(tokens) >= 19


@pytest.mark.parametrize("top_p", [-0.1, 1.0001, NAN, INF])
def test_top_p_out_of_range(top_p: float) -> None:
    with pytest.raises(ValueError, match=f"top_p.*{top_p}"):
        sample_logits([0.0, 1.0], top_p=top_p)


# S-05


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        ([], ValueError),
        (np.zeros((2, 2)), ValueError),
        (np.float32(1.0), ValueError),
        (np.array([1, 2]), TypeError),
        (np.array([True]), TypeError),
        (np.array([1j]), TypeError),
        (np.array(["a"]), TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_row_of_logits(logits: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="logits: expected"):
        sample_logits(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_input_stays_as_it_was(temperature: float, top_p: float, dtype: type) -> None:
    logits = np.random.default_rng(5).standard_normal(3000).astype(dtype)
    bias = {5: 2.0, 9: -INF}
    before = logits.tobytes()
    token = sample_logits(logits, temperature, top_p, bias, rng=1)
    assert logits.tobytes() == before
    assert bias == {5: 2.0, 9: -INF}

    read_only = logits.copy()
    read_only.flags.writeable = False
    strided = np.repeat(logits, 2)[::2]
    for same in (read_only, strided, list(logits.astype(float)), logits.astype(np.float64)):
        assert sample_logits(same, temperature, top_p, bias, rng=1) == token


def test_one_token() -> None:
    assert sample_logits([-3.5]) == 0
    assert type(sample_logits(np.zeros(3, np.float32))) is int


def test_torch_tensor() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert sample_logits(logits, rng=3) == sample_logits(logits.numpy(), rng=3)


# S-06


@pytest.mark.parametrize("token", [-1, 4, 2**63])
def test_biases_of_unknown_tokens(token: int) -> None:
    with pytest.raises(ValueError, match=f"logit_bias: token {token} "):
        sample_logits(np.zeros(4), logit_bias={token: 1.0})


@pytest.mark.parametrize("bias", [NAN, INF])
def test_biases_without_a_meaning(bias: float) -> None:
    with pytest.raises(ValueError, match=f"logit_bias: token 2 has bias {bias}"):
        sample_logits(np.zeros(4), logit_bias={2: bias})


@pytest.mark.parametrize("token", [True, 1.0, "1", None])
def test_bias_ids_are_integers(token: object) -> None:
    with pytest.raises(TypeError):
        sample_logits(np.zeros(4), logit_bias={token: 1.0})


def test_bias_comes_before_top_p() -> None:
    assert sample_logits([0.0, 1.0, 0.5], 1.0, 0.5, {np.int64(0): 50.0}) == 0
    assert sample_logits([0.0, INF, 0.5], 0.0, 1.0, {1: -INF}) == 2


def test_all_banned() -> None:
    with pytest.raises(NonFiniteLogits, match="banned"):
        sample_logits(np.zeros(3), logit_bias=dict.fromkeys(range(3), -INF))


# S-08


def test_seeds() -> None:
    logits = np.random.default_rng(2).standard_normal(500)
    assert sample_logits(logits, rng=11) == sample_logits(logits, rng=np.int64(11))
    assert sample_logits(logits, rng=11) == sample_logits(logits, rng=np.random.default_rng(11))
    series = [draw(logits, 50, seed=4).tolist() for _ in range(2)]
    assert series[0] == series[1] != draw(logits, 50, seed=5).tolist()
    assert len({sample_logits(np.zeros(2**16), top_p=1.0) for _ in range(10)}) > 1


def test_draws_are_written_down() -> None:
    """Seeded text has to stay the same with every version of numpy and on every machine: ids found
    by hand from PCG64's first points, 0.6369…, 0.2697…, 0.0409… for seed 0."""
    rng = np.random.default_rng(0)
    quarters = np.zeros(4)
    assert [sample_logits(quarters, top_p=1.0, rng=rng) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize(("rng", "error"), [(-1, ValueError), (True, TypeError), (0.5, TypeError)])
def test_what_is_no_seed(rng: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="rng: expected"):
        sample_logits([0.0, 1.0], rng=rng)


def test_nothing_is_drawn_where_nothing_is_left_to_chance() -> None:
    rng = np.random.default_rng(0)
    for options in ({"temperature": 0}, {"top_p": 0}):
        sample_logits([0.0, 1.0], rng=rng, **options)
    assert rng.random() == np.random.default_rng(0).random()


# S-10, S-11


def test_huge_logits() -> None:
    with np.errstate(all="raise"):
        assert sample_logits([1e30, -1e30, 0.0], 1.0, 1.0) == 0
        assert sample_logits(np.array([-3e38, 3e38, 0], np.float32), 100.0, 1.0) == 1
        assert sample_logits([1.7e308, -1.7e308], 1e-300, 1.0) == 0
        assert draw(np.array([1e30, 1e30, 0.0]), 300, top_p=1.0)[2] == 0


def test_ties_at_the_cutoff_all_stay() -> None:
    counts = draw(np.zeros(10), 1000, top_p=0.3)
    check_frequencies(counts, [0.1] * 10)
    counts = draw(np.array([1.0, 0.0, 0.0, 0.0, -1.0]), 1000, top_p=0.5)
    check_frequencies(counts, token_probabilities([1.0, 0.0, 0.0, 0.0, -1.0], 1.0, 0.5))
    assert counts[4] == 0
    assert counts[1:4].all()
