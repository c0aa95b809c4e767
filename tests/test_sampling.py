"""Sampling against the rule in decimal numbers, and on everything that logits should not be."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from frequencies import check_frequencies
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sampling import (
    cut_probabilities,
    mirostat_probabilities,
    token_at,
    token_probabilities,
)
from rwkv_cpp.errors import NonFiniteLogits
from rwkv_cpp.philox import uniform
from rwkv_cpp.sampling import FIELDS, Sampler, Sampling, log_softmax, sample_logits, top_logprobs

INF = math.inf
NAN = math.nan


def draw(logits: np.ndarray, count: int, seed: int = 0, **options: object) -> list[int]:
    rng = np.random.default_rng(seed)
    return [sample_logits(logits, rng=rng, **options) for _ in range(count)]


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
    tokens = draw(logits, 10_000, temperature=temperature, top_p=top_p, logit_bias=bias)
    check_frequencies(tokens, token_probabilities(logits, temperature, top_p, bias))


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_frequencies_of_a_million(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(8).standard_normal(100)
    tokens = draw(logits, 1_000_000, temperature=temperature, top_p=top_p)
    check_frequencies(tokens, token_probabilities(logits, temperature, top_p))


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
    point = uniform(seed, 0, 0)
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
                point = uniform(seed, 0, 0) * cumulative[-1]
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
    logits = np.array([0.0, -INF, 0.0, -INF])
    assert set(draw(logits, 200, temperature=1e6, top_p=1.0)) == {0, 2}


# S-02


def test_temperature_zero_is_the_first_of_the_most_likely() -> None:
    assert sample_logits([0.0, 3.0, 1.0, 3.0], temperature=0) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_tiny_temperatures_do_not_underflow(temperature: float) -> None:
    logits = np.array([1.0, 2.0, 1.999])
    assert set(draw(logits, 50, temperature=temperature, top_p=1.0)) == {1}


def test_a_huge_temperature_does_not_revive_what_top_p_dropped() -> None:
    tokens = draw(np.array([5.0, 4.9, 0.0, -1.0]), 500, temperature=1e300, top_p=0.9)
    check_frequencies(tokens, [0.5, 0.5, 0, 0])


def test_probabilities_that_underflow_still_count_at_a_high_temperature() -> None:
    tokens = draw(np.array([0.0, -1000.0]), 500, temperature=1e6, top_p=1.0)
    check_frequencies(tokens, token_probabilities([0.0, -1000.0], 1e6, 1.0))


@pytest.mark.parametrize("temperature", [-1.0, -1e-300, INF, NAN])
def test_temperatures_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        sample_logits([0.0, 1.0], temperature)


# S-03


def test_top_p_zero_keeps_the_top_token_alone() -> None:
    assert set(draw(np.array([1.0, 2.0, 2.0, 0.0]), 50, temperature=5.0, top_p=0)) == {1}


def test_a_sum_of_just_top_p_takes_one_more() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])  # whose powers are exact again
    for top_p, kept in ((0.5, {0, 1}), (0.75, {0, 1, 2, 3})):
        assert {sample_logits(logits, 1, top_p, rng=seed) for seed in range(99)} == kept


def test_a_tiny_top_p_keeps_ties_of_the_top_token() -> None:
    tokens = draw(np.array([1.0, 2.0, 2.0, 0.0]), 300, top_p=1e-9)
    check_frequencies(tokens, [0, 0.5, 0.5, 0])


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
    series = [draw(logits, 50, seed=4) for _ in range(2)]
    assert series[0] == series[1] != draw(logits, 50, seed=5)
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
        assert set(draw(np.array([1e30, 1e30, 0.0]), 300, top_p=1.0)) == {0, 1}


def test_ties_at_the_cutoff_all_stay() -> None:
    check_frequencies(draw(np.zeros(10), 1000, top_p=0.3), [0.1] * 10)
    logits = np.array([1.0, 0.0, 0.0, 0.0, -1.0])
    tokens = draw(logits, 1000, top_p=0.5)
    check_frequencies(tokens, token_probabilities(logits, 1.0, 0.5))
    assert set(tokens) == {0, 1, 2, 3}


# ---- Sampling ----


WRONG = [
    ("temperature", [-1, NAN, INF, 10**400], ["1", None, True, 1j]),
    ("top_k", [-1], [1.0, "1", None, True]),
    ("top_p", [-0.1, 1.1, NAN], ["1", None, False]),
    ("top_px", [-0.1, 1.1, NAN], [None]),
    ("min_p", [-0.1, 1.1, NAN], [None]),
    ("tail_free", [-0.1, 1.1, NAN], [None]),
    ("typical_p", [-0.1, 1.1, NAN], [None]),
    ("mirostat", [-1, 3], [1.0, True, None]),
    ("mirostat_tau", [-1, INF], [None]),
    ("mirostat_eta", [-1, INF], [None]),
    ("repetition_penalty", [0, -1, NAN, INF], [None]),
    ("presence_penalty", [NAN, INF, -INF], [None]),
    ("frequency_penalty", [NAN, INF], [None]),
    ("penalty_decay", [-0.1, 1.1], [None]),
    ("logit_bias", [{-1: 1.0}, {1: NAN}, {1: INF}, {2**40: 1.0}], [{1.5: 0}, {1: "x"}, [1], 5]),
    ("banned_tokens", [[-1], [2**40]], [5, "12", [1.0], [True], {1: 2}, None]),
    ("forced_tokens", [[-1]], [5, b"12", ["a"], None]),
    ("seed", [-1, 2**64], [1.0, "1", True]),
    ("num_beams", [0, -1], [1.0, None]),
    ("length_penalty", [NAN, INF], [None]),
    ("json_schema", ["", "{", "[]", "5", {"a": {1}}], [5, b"{}", ["a"]]),
    ("regex", [""], [5, b"a"]),
    ("grammar", [""], [5, b"a"]),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (name, value, error)
        for name, values, types in WRONG
        for error, wrong in ((ValueError, values), (TypeError, types))
        for value in wrong
    ],
)
def test_wrong_fields(name, value, error):
    with pytest.raises(error, match=f"^{name}: "):
        Sampling(**{name: value})


def test_every_field_is_in_the_table_of_wrong_values():
    assert [name for name, _, _ in WRONG] == list(FIELDS)


def test_defaults_are_valid_and_plain():
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 0.8, None)
    assert replace(sampling) == sampling
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert hash(Sampling(logit_bias={1: 2.0})) == hash(Sampling(logit_bias={1: 2.0}))
    with pytest.raises(AttributeError):
        sampling.temperature = 2.0


def test_fields_are_brought_to_plain_types():
    sampling = Sampling(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        logit_bias={np.int32(3): np.float32(1.5)},
        banned_tokens=iter(np.array([1, 2])),
        json_schema={"type": "object"},
    )
    assert type(sampling.temperature) is float
    assert type(sampling.top_k) is int
    assert sampling.logit_bias == {3: 1.5}
    assert sampling.banned_tokens == (1, 2)
    assert sampling.json_schema == '{"type": "object"}'
    bias = {1: 1.0}
    kept = Sampling(logit_bias=bias)
    bias[1] = 2.0
    assert kept.logit_bias == {1: 1.0}


def test_switching_mirostat_on_lets_go_of_the_cuts():
    cut = Sampling(top_p=0.5, top_k=5, seed=1)
    assert cut.changed(mirostat=2, seed=3) == Sampling(mirostat=2, seed=3)
    assert cut.changed(mirostat=0, top_k=6) == Sampling(top_p=0.5, top_k=6, seed=1)
    with pytest.raises(ValueError, match="top_k: mirostat takes its place"):
        cut.changed(mirostat=2, top_k=5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"regex": "a", "grammar": "start: x"}, "grammar: only one of .*, found regex too"),
        ({"json_schema": {}, "regex": "a"}, "regex: only one of"),
        ({"banned_tokens": [1, 2], "forced_tokens": [3, 2]}, "forced_tokens: token 2 is one of"),
        ({"mirostat": 1, "top_k": 5}, "top_k: mirostat takes its place"),
        ({"mirostat": 2, "top_p": 0.5}, "top_p: mirostat takes its place"),
        ({"mirostat": 2, "typical_p": 0.5}, "typical_p: mirostat takes its place"),
    ],
)
def test_fields_that_contradict_each_other(fields, text):
    with pytest.raises(ValueError, match=text):
        Sampling(**fields)
    Sampling(mirostat=1, top_p=1.0)


# ---- Sampler ----


def series(sampler: Sampler, logits: np.ndarray, count: int, start: int = 0) -> list[int]:
    tokens = []
    for position in range(start, start + count):
        tokens.append(sampler.sample(logits, position))
        sampler.accept(tokens[-1])
    return tokens


LOGITS = np.random.default_rng(7).standard_normal(20).astype(np.float32)


@pytest.mark.parametrize(
    "cuts",
    [
        {"top_p": 1.0},
        {"top_p": 0.8},
        {"top_k": 5, "temperature": 2.0},
        {"min_p": 0.2},
        {"tail_free": 0.9, "top_p": 1.0},
        {"typical_p": 0.6, "top_p": 1.0},
        {"top_px": 0.05, "top_p": 0.3},
    ],
)
def test_frequencies_of_the_sampler(cuts):
    sampling = Sampling(seed=3, **cuts)
    tokens = series(Sampler(sampling, 20), LOGITS, 5000)
    check_frequencies(tokens, cut_probabilities(LOGITS, **{"top_p": 0.8, **cuts}))


def test_draws_never_change():
    """Written down: a seeded text must be the same with every version of this package too."""
    logits = np.zeros(1000, np.float32)
    assert series(Sampler(Sampling(seed=1, top_p=1.0), 1000), logits, 6) == [
        int(uniform(1, 0, position) * 1000) for position in range(6)
    ]
    tokens = series(Sampler(Sampling(seed=42, top_p=1.0), 1000, stream=5), logits, 4, start=2**40)
    assert tokens == [239, 517, 656, 839]


def test_draws_depend_on_seed_stream_and_position_alone():
    logits = np.zeros(10_000, np.float32)
    sampling = Sampling(seed=9, top_p=1.0)
    whole = series(Sampler(sampling, 10_000), logits, 20)
    resumed = Sampler(sampling, 10_000, history=whole[:7])
    assert series(resumed, logits, 13, start=7) == whole[7:]
    assert series(Sampler(sampling, 10_000, stream=1), logits, 20) != whole
    assert series(Sampler(Sampling(seed=10, top_p=1.0), 10_000), logits, 20) != whole
    unseeded = Sampling(top_p=1.0)
    assert series(Sampler(unseeded, 10_000), logits, 5) != series(
        Sampler(unseeded, 10_000), logits, 5
    )
    sampler = Sampler(unseeded, 10_000)
    assert (
        sampler.sample(logits, 3) == sampler.sample(logits, 3) == sampler.copy().sample(logits, 3)
    )


def penalized(logits: np.ndarray, history: list[int], sampling: Sampling) -> np.ndarray:
    """The rules as ChatRWKV and CTRL write them down, token by token."""
    logits = logits.astype(np.float64)
    occurrence: dict[int, float] = {}
    for token in history:
        occurrence = {key: count * sampling.penalty_decay for key, count in occurrence.items()}
        occurrence[token] = occurrence.get(token, 0.0) + 1
    for token, count in occurrence.items():
        if logits[token] > 0:
            logits[token] /= sampling.repetition_penalty
        else:
            logits[token] *= sampling.repetition_penalty
        logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    return logits


@settings(max_examples=100, deadline=None)
@given(
    history=st.lists(st.integers(0, 39), max_size=100),
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    decay=st.floats(0, 1),
)
def test_penalties(history, repetition, presence, frequency, decay):
    """Read off from the biases at which the likeliest token changes."""
    sampling = Sampling(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        penalty_decay=decay,
        temperature=0,
    )
    logits = np.random.default_rng(1).standard_normal(40)
    expected = penalized(logits, history, sampling)
    best = int(np.argmax(expected))
    given_whole = Sampler(sampling, 40, history=history)
    one_by_one = Sampler(sampling, 40)
    for token in history:
        one_by_one.accept(token)
    assert given_whole.sample(logits, 0) == one_by_one.sample(logits, 0)
    gap = np.sort(expected)[-1] - np.sort(expected)[-2]
    if gap > 1e-9:
        assert given_whole.sample(logits, 0) == best
    for other in (3, 17):
        if other != best:
            for e, winner in ((-1e-9, best), (1e-9, other)):
                bias = {other: expected[best] - expected[other] + e}
                biased = replace(sampling, logit_bias=bias)
                if abs(bias[other]) < 1e3 and gap > 1e-8:
                    assert Sampler(biased, 40, history=history).sample(logits, 0) == winner


def test_frequencies_with_penalties():
    sampling = Sampling(
        seed=1, top_p=1.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2
    )
    history = [3, 5, 3, 9, 3, 5]
    sampler = Sampler(sampling, 20, history=history)
    tokens = [sampler.sample(LOGITS, position) for position in range(5000)]
    check_frequencies(tokens, cut_probabilities(penalized(LOGITS, history, sampling)))


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_its_rule(version):
    sampling = Sampling(mirostat=version, mirostat_tau=2.5, mirostat_eta=0.2, seed=6)
    sampler = Sampler(sampling, 20)
    limit = 2 * 2.5
    for position in range(200):
        probabilities, surprises = mirostat_probabilities(LOGITS, version, limit)
        token = sampler.sample(LOGITS, position)
        assert token == token_at(probabilities, uniform(6, 0, position))
        sampler.accept(token)
        limit -= 0.2 * (surprises[token] - 2.5)


def test_mirostat_counts_only_its_own_tokens():
    sampler = Sampler(Sampling(mirostat=2, seed=1, forced_tokens=(4,)), 20)
    twin = sampler.copy()
    sampler.accept(sampler.sample(LOGITS, 0))
    twin.accept(4)
    assert series(sampler, LOGITS, 20, start=1) == series(twin, LOGITS, 20, start=1)
    assert Sampler(Sampling(mirostat=1, temperature=0), 20).sample(LOGITS, 0) == np.argmax(LOGITS)


def test_bans_and_forced_tokens():
    best, second = (int(token) for token in np.argsort(-LOGITS)[:2])
    sampling = Sampling(banned_tokens=(best,), forced_tokens=(8, 8, 2), temperature=0)
    assert series(Sampler(sampling, 20), LOGITS, 4) == [8, 8, 2, second]
    assert Sampler(sampling, 20, history=[8, 8]).sample(LOGITS, 0) == 2
    assert Sampler(sampling, 20, history=[8, 8, 2]).sample(LOGITS, 0) == second
    assert Sampler(Sampling(logit_bias={5: 100.0}), 20).sample(LOGITS, 0) == 5
    everything = Sampler(Sampling(banned_tokens=range(20)), 20)
    with pytest.raises(NonFiniteLogits, match="every token is banned"):
        everything.sample(LOGITS, 0)


def test_what_a_sampler_refuses():
    for name, value in (
        ("logit_bias", {20: 1.0}),
        ("banned_tokens", [20]),
        ("forced_tokens", [20]),
    ):
        with pytest.raises(ValueError, match=f"{name}: token 20 is not in 0..19"):
            Sampler(Sampling(**{name: value}), 20)
    with pytest.raises(ValueError, match=r"history: token 20 is not in 0..19"):
        Sampler(Sampling(), 20, history=[1, 20])
    for stream in (-1, 2**32):
        with pytest.raises(ValueError, match="stream: expected"):
            Sampler(Sampling(), 20, stream=stream)
    sampler = Sampler(Sampling(), 20)
    for position in (-1, 2**64):
        with pytest.raises(ValueError, match="position: expected"):
            sampler.sample(LOGITS, position)
    with pytest.raises(ValueError, match="logits: expected 20, found 21"):
        sampler.sample(np.zeros(21), 0)
    with pytest.raises(ValueError, match="token: token -1"):
        sampler.accept(-1)
    with pytest.raises(ValueError, match="regex: needs the tokenizer"):
        Sampler(Sampling(regex="a"), 20)
    assert not sampler.finished


def test_a_sampler_never_changes_logits():
    sampling = Sampling(
        seed=1,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        logit_bias={3: 2.0},
        banned_tokens=[4],
    )
    for dtype in (np.float16, np.float32, np.float64):
        logits = LOGITS.astype(dtype)
        before = logits.tobytes()
        logits.flags.writeable = False
        series(Sampler(sampling, 20), logits, 10)
        assert logits.tobytes() == before


def test_a_copy_goes_on_alone():
    sampling = Sampling(seed=1, presence_penalty=3.0, mirostat=2)
    sampler = Sampler(sampling, 20)
    series(sampler, LOGITS, 5)
    twin = sampler.copy()
    expected = series(sampler.copy(), LOGITS, 30, start=5)
    series(sampler, LOGITS, 30, start=100)
    assert series(twin, LOGITS, 30, start=5) == expected


def test_a_million_tokens_of_history():
    """S-07"""
    history = np.random.default_rng(0).integers(0, 500, 1_000_000).tolist()
    sampler = Sampler(Sampling(frequency_penalty=0.1, seed=1), 1000, history=history)
    assert 0 <= sampler.sample(np.zeros(1000, np.float32), 10**6) < 1000


# ---- log probabilities ----


def test_log_softmax():
    logits = np.array([0.5, -1.25, 3.0, 3.0, -INF], np.float32)
    with np.errstate(all="raise"):
        logprobs = log_softmax(logits)
    exact = token_probabilities(logits[:4], 1.0, 1.0)
    np.testing.assert_allclose(logprobs[:4], np.log(exact), rtol=1e-14)
    assert logprobs[4] == -INF
    assert logprobs.dtype == np.float64
    assert log_softmax(np.array([2.0**100, 0.0], np.float32)).tolist() == [0.0, -(2.0**100)]
    assert log_softmax([1.0, INF]).tolist() == [-INF, 0.0]
    for wrong in ([NAN, 0.0], [-INF, -INF]):
        with pytest.raises(NonFiniteLogits):
            log_softmax(wrong)
    for wrong in (np.zeros((2, 2)), []):
        with pytest.raises(ValueError, match="logits: expected"):
            log_softmax(wrong)


def test_top_logprobs():
    logits = np.array([0.5, -1.25, 3.0, 3.0, 1.0], np.float32)
    logprobs = log_softmax(logits)
    found = top_logprobs(logits, 1, 3)
    assert found.token == 1
    assert found.logprob == logprobs[1]
    assert found.top == ((2, logprobs[2]), (3, logprobs[3]), (4, logprobs[4]))
    assert top_logprobs(logits, 1, 1).top == ((2, logprobs[2]),)
    assert top_logprobs(logits, 1, 0).top == ()
    assert [token for token, _ in top_logprobs(logits, 1, 5).top] == [2, 3, 4, 0, 1]
    for n in (-1, 6):
        with pytest.raises(ValueError, match=f"n: expected 0..5, found {n}"):
            top_logprobs(logits, 1, n)
    with pytest.raises(ValueError, match="token: token 5"):
        top_logprobs(logits, 5, 1)
