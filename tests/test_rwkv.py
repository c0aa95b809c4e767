"""rwkv.py and generation.py: what users call, on a small random model."""

import asyncio
import copy
import gc
import pickle
import signal
import threading
import time

import numpy as np
import pytest
from models import random_model, write_model
from rwkv_cpp import RWKV, ForeignState, PrefixCache, RWKVModel, Sampling, State
from rwkv_cpp.reading import CHUNK
from rwkv_cpp.sampling import Sampler, log_softmax
from rwkv_cpp.tokenizer import WorldTokenizer

WORDS = [b"the", b"cat", b"sat", b"\n\n", b"at\n\n", b"lo\n\nUs", "é€".encode(), b"User:"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rwkv")


@pytest.fixture(scope="module")
def bytes_path(folder):
    path = folder / "bytes.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "Q8_0")
    return path


@pytest.fixture(scope="module")
def model(bytes_path):
    with RWKV(bytes_path, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def low(bytes_path):
    with RWKVModel(None, bytes_path, 1) as low:
        yield low


@pytest.fixture(scope="module")
def world(folder):
    """A model of 300 tokens: end of text, the bytes, a few longer ones, and unused ids."""
    path = folder / "world.bin"
    write_model(path, random_model(3, n_vocab=300, n_embed=32, n_layer=2))
    words = [bytes([value]) for value in range(256)] + WORDS
    with RWKV(path, n_threads=1, vocabulary=WorldTokenizer(300, words)) as world:
        yield world


def word(text):
    return 257 + WORDS.index(text)


def by_hand(low, prompt, n, sampling, stream=0):
    """The tokens that RWKVModel and Sampler give one by one."""
    logits, state = low.eval_sequence(prompt, None)
    sampler = Sampler(sampling, low.n_vocab, stream=stream)
    tokens = []
    for position in range(len(prompt), len(prompt) + n):
        tokens.append(sampler.sample(logits, position))
        sampler.accept(tokens[-1])
        logits, state = low.eval(tokens[-1], state)
    return tokens, logits, state


def same(state, other):
    """Everything, to the bit."""
    return (
        state == other
        and np.array_equal(state.logits, other.logits)
        and state.n_generated == other.n_generated
    )


# ---- answers ----


def test_an_answer_is_what_its_parts_give(model, low):
    sampling = Sampling(temperature=0.9, top_p=0.7, presence_penalty=0.3, seed=7)
    tokens, logits, state = by_hand(low, b"Hello", 40, sampling)
    done = model.generate("Hello", sampling=sampling, max_tokens=40, logprobs=3)
    assert done.tokens == tokens
    assert done.text == str(done) == bytes(tokens).decode(errors="replace")
    assert (done.finish_reason, done.stop) == ("length", None)
    assert np.array_equal(done.state.values, state)
    assert np.array_equal(done.state.logits, logits)
    assert list(done.state.tokens) == [*b"Hello", *tokens]
    assert done.state.n_generated == 40
    assert (done.timings.prompt_tokens, done.timings.tokens) == (5, 40)
    assert done.timings.seconds > 0
    logits, state = low.eval_sequence(b"Hello", None)
    for told, token in zip(done.logprobs, tokens, strict=True):
        expected = log_softmax(logits)
        assert told.token == token
        assert told.logprob == pytest.approx(expected[token])
        assert [index for index, _ in told.top] == list(np.argsort(-expected)[:3])
        logits, state = low.eval(token, state)


def test_fields_of_sampling_are_arguments(model):
    sampling = Sampling(temperature=0.5, seed=1)
    expected = model.generate("a", sampling=Sampling(temperature=0.5, seed=2), max_tokens=20)
    assert model.generate("a", sampling=sampling, seed=2, max_tokens=20).text == expected.text
    assert model.generate("a", temperature=0.5, seed=2, max_tokens=20).text == expected.text
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        model.generate("a", temprature=1)
    with pytest.raises(ValueError, match="temperature"):
        model.generate("a", temperature=-1)


def test_without_a_seed_answers_differ(model):
    answers = model.generate("a", n=3, max_tokens=30)
    assert len({answer.text for answer in answers}) == 3


def test_tokens_may_be_given(model):
    expected = model.generate("Hello", seed=1, max_tokens=20).text
    for kind in (list, tuple, iter, lambda text: np.frombuffer(text, np.uint8)):
        assert model.generate(kind(b"Hello"), seed=1, max_tokens=20).text == expected
        assert "".join(model.stream(kind(b"Hello"), seed=1, max_tokens=20)) == expected
    (answer,) = model.generate((text for text in ["Hello"]), seed=1, max_tokens=20)
    assert answer.text == expected


def test_max_tokens(model):
    nothing = model.generate("Hello", max_tokens=0)
    assert (nothing.text, nothing.tokens, nothing.finish_reason) == ("", [], "length")
    assert nothing.state == model.read("Hello")
    ascii_only = dict.fromkeys(range(128, 256), -np.inf)
    with model.stream("a", max_tokens=3, logit_bias=ascii_only) as stream:
        assert [len(piece) for piece in stream] == [1, 1, 1]


def test_whole_characters_only(model):
    cycle = tuple({*range(256)} - {0xE2, 0x82, 0xAC})  # the bytes of a euro sign, in any order
    stream = model.stream("a", max_tokens=60, banned_tokens=cycle, seed=1)
    pieces = list(stream)
    assert set("".join(pieces)) <= {"€", "\ufffd"}
    assert all(pieces)
    assert stream.completion.text == "".join(pieces)
    assert model.generate("a", max_tokens=1, forced_tokens=(0xE2,)).text == "\ufffd"


# ---- many at once ----


def test_a_list_gives_what_each_gives_alone(model):
    prompts = ["Hello", "", "x" * 200, [1, 2, 3], "Hello"]
    options = {"seed": 5, "max_tokens": 30, "stop": ["e", "\x05"], "temperature": 1.5}
    together = model.generate(prompts, **options)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = model.generate(prompt, **options)
        assert answer.tokens == alone.tokens
        assert answer.finish_reason == alone.finish_reason
        assert same(answer.state, alone.state)


def test_n_answers_read_the_prompt_once(model, low, monkeypatch):
    read = []
    evaluate = model._evaluate

    def counted(sequences):
        read.extend(len(sequence.tokens) for sequence in sequences)
        return evaluate(sequences)

    monkeypatch.setattr(model, "_evaluate", counted)
    answers = model.generate("x" * 50, n=3, seed=4, max_tokens=10)
    assert sum(read) == 50 + 3 * 10
    for number, answer in enumerate(answers):
        expected, _, _ = by_hand(low, b"x" * 50, 10, Sampling(seed=4), stream=number)
        assert answer.tokens == expected
    assert answers[0].tokens == model.generate("x" * 50, seed=4, max_tokens=10).tokens


def test_finished_answers_leave_the_batch(model, monkeypatch):
    sizes = []
    evaluate = model._evaluate
    monkeypatch.setattr(
        model, "_evaluate", lambda batch: sizes.append(len(batch)) or evaluate(batch)
    )
    answers = model.generate("a", n=4, seed=3, max_tokens=40, stop_tokens=range(0, 256, 9))
    lengths = sorted(len(answer.tokens) for answer in answers)
    assert lengths[0] < lengths[-1]
    assert sizes[1:] == [sum(n > step for n in lengths) for step in range(lengths[-1])]


def test_several_prompts_and_answers_and_states(model):
    states = [model.read("one"), model.read("two")]
    answers = model.generate(["x", ""], state=states, n=2, seed=1, max_tokens=8)
    alone = [
        *model.generate("x", state=states[0], n=2, seed=1, max_tokens=8),
        *model.generate("", state=states[1], n=2, seed=1, max_tokens=8),
    ]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    with pytest.raises(ValueError, match="state: expected one, or 3, found 2"):
        model.generate(["a", "b", "c"], state=states)


# ---- states ----


def test_going_on_gives_what_one_go_gives(model):
    options = {"seed": 9, "frequency_penalty": 0.5, "presence_penalty": 0.2, "temperature": 2}
    whole = model.generate("Hello", max_tokens=40, **options)
    state, text = model.read("Hello"), ""
    for _ in range(4):
        part = model.generate(state=state, max_tokens=10, **options)
        state, text = pickle.loads(pickle.dumps(part.state)), text + part.text
    assert state == whole.state
    assert list(state.tokens[5:]) == whole.tokens
    # A new prompt begins a new completion: the penalties count from there.
    assert model.read("more", state).n_generated == 0


def test_states_that_were_given_stay_as_they_were(model):
    state = model.read("Hello")
    before = state.copy()
    model.generate(" world", state=state, n=2, max_tokens=5)
    model.score("x", " world", state)
    model.read("x", state)
    assert same(state, before)


def test_state_of_another_model(model, world):
    with pytest.raises(ForeignState):
        model.generate("a", state=world.read([1, 2]))
    with pytest.raises(TypeError, match="State"):
        model.generate("a", state=np.zeros(3, np.float32))


def test_empty_state(model):
    start = model.empty_state()
    assert (len(start.tokens), start.logits) == (0, None)
    assert model.read("Hello", start) == model.read("Hello")
    start.values[:] = 0  # a copy
    assert model.read("Hello", model.empty_state()) == model.read("Hello")
    with pytest.raises(ValueError, match="no logits"):
        model.generate(state=model.empty_state())


def test_empty_prompts(model, world):
    newline = model.generate("\n", seed=3, max_tokens=20)
    assert model.generate("", seed=3, max_tokens=20).tokens == newline.tokens
    assert list(world.generate("", max_tokens=0).state.tokens) == [0]
    state = model.read("Hello")
    imported = State(state.values, n_layer=state.n_layer)
    with pytest.raises(ValueError, match="no logits"):
        model.generate(state=imported)
    after = model.generate("a", state=imported, max_tokens=0).state
    assert np.array_equal(after.values, model.read("a", state).values)


# ---- stopping ----


def test_stop_string_ends_the_answer_before_it(model):
    whole = model.generate("Hello", seed=1, max_tokens=100, banned_tokens=range(128, 256))
    stop = whole.text[40:43]
    cut = whole.text.index(stop)
    done = model.generate(
        "Hello", seed=1, max_tokens=100, banned_tokens=range(128, 256), stop=["never ever", stop]
    )
    assert done.text == whole.text[:cut]
    assert (done.finish_reason, done.stop) == ("stop", stop)
    assert done.tokens == whole.tokens[:cut]
    fresh = model.read(list(b"Hello") + done.tokens)
    assert np.array_equal(done.state.values, fresh.values)
    assert np.array_equal(done.state.logits, fresh.logits)
    assert done.state.n_generated == cut


def forced(world, *tokens, **options):
    return world.generate("the", forced_tokens=tokens, max_tokens=len(tokens) + 5, **options)


def test_state_is_rolled_back_across_tokens(world):
    """The stop string begins inside one token and ends inside another."""
    inside = word(b"lo\n\nUs")
    done = forced(
        world, word(b"cat"), 1 + ord("H"), inside, 1 + ord("e"), stop="\n\nUse", logprobs=1
    )
    assert done.text == "catHlo"
    tail = world.tokenizer.encode("lo")
    assert done.tokens == [word(b"cat"), 1 + ord("H"), *tail]
    fresh = world.read([*world.tokenizer.encode("the"), *done.tokens])
    assert np.array_equal(done.state.values, fresh.values)
    assert np.array_equal(done.state.logits, fresh.logits)
    assert list(done.state.tokens) == list(fresh.tokens)
    scored = world.score(done.tokens, "the")
    assert [told.token for told in done.logprobs] == done.tokens
    assert [told.logprob for told in done.logprobs] == pytest.approx(scored.logprobs)
    # Where the tokens agree, the same text follows as after a fresh reading.
    again = world.generate(state=done.state, max_tokens=20, seed=1)
    assert again.tokens == world.generate(state=fresh, max_tokens=20, seed=1).tokens


def test_false_alarms_are_let_out(world):
    tokens = [word(b"\n\n"), word(b"\n\n"), word(b"User:"), word(b"sat")]
    done = forced(world, *tokens, stop=["\n\nUsher", "User!"])
    assert done.text.startswith("\n\n\n\nUser:sat")
    assert done.tokens[:4] == tokens
    assert done.finish_reason == "length"
    done = forced(world, *tokens, stop="\n\nUser")
    assert done.text == "\n\n"
    assert done.tokens == tokens[:1]
    done = forced(world, *tokens, stop="\n")
    assert (done.text, done.tokens) == ("", [])
    assert same(done.state, world.read("the"))


def test_stop_string_of_many_bytes(world):
    e_acute, euro = [1 + byte for byte in "é".encode()], [1 + byte for byte in "€".encode()]
    done = forced(world, *e_acute, *euro, stop="€")
    assert (done.text, done.tokens) == ("é", e_acute)
    done = forced(world, word(b"cat"), *e_acute, *euro, stop="é€")
    assert (done.text, done.tokens) == ("cat", [word(b"cat")])


def test_streamed_text_never_holds_the_stop_string(world):
    tokens = [word(b"cat"), word(b"at\n\n"), word(b"User:")]
    stream = world.stream("the", forced_tokens=tokens, max_tokens=9, stop="\n\nUser:")
    assert list(stream) == ["cat", "at"]
    assert stream.completion.text == "catat"


def test_end_of_text(world):
    ends = world.generate("the", logit_bias={0: 1000})
    assert (ends.text, ends.finish_reason, ends.stop) == ("", "stop", 0)
    assert same(ends.state, world.read("the"))
    goes_on = world.generate("the", logit_bias={0: 1000}, ignore_eos=True, max_tokens=9)
    assert goes_on.finish_reason == "length"
    assert 0 not in goes_on.tokens
    other = world.generate("the", forced_tokens=[5, 6], stop_tokens=[6], max_tokens=9)
    assert (other.tokens, other.stop) == ([5], 6)


def test_text_that_was_held_back_comes_in_the_end(world):
    held = world.generate("the", forced_tokens=[word(b"\n\n")], max_tokens=1, stop="\n\nUser")
    assert (held.text, held.finish_reason) == ("\n\n", "length")


def test_time_limit(model):
    began = time.monotonic()
    done = model.generate("Hello", max_tokens=10**9, time_limit=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert done.finish_reason == "time"
    assert len(done.tokens) == done.timings.tokens > 0
    never = model.generate("Hello", time_limit=0)
    assert (never.finish_reason, never.text, len(never.state.tokens)) == ("time", "", 0)


def test_cancelling(model):
    asked = []
    done = model.generate("Hello", max_tokens=50, cancel=lambda: asked.append(1) or len(asked) > 9)
    assert done.finish_reason == "cancelled"
    assert len(done.tokens) == 8  # asked once for the prompt, then before each token
    state = model.read("Hello")
    unread = model.generate("x" * 1000, state=state, cancel=lambda: True)
    assert unread.finish_reason == "cancelled"
    assert same(unread.state, state)


def test_progress_of_a_long_prompt(model):
    told = []
    model.read("x" * (2 * CHUNK + 5), progress=lambda *what: told.append(what))
    total = 2 * CHUNK + 5
    assert told == [("reading", n, total) for n in (CHUNK, 2 * CHUNK, total)]
    told.clear()
    model.generate(["x" * CHUNK, "x"], max_tokens=0, progress=lambda *what: told.append(what))
    assert told[-1] == ("reading", CHUNK + 1, CHUNK + 1)

    def stop(*what):
        raise KeyError(what)

    state = model.read("a")
    before = state.copy()
    with pytest.raises(KeyError):
        model.generate("x" * 1000, state=state, progress=stop)
    assert same(state, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no such timer there")
def test_ctrl_c_in_a_stream_leaves_a_sound_state(model, low):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in np.linspace(0.002, 0.03, 15):
            stream = model.stream("Hello", max_tokens=10**6, seed=1)
            pieces = []
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                for piece in stream:
                    pieces.append(piece)
            except KeyboardInterrupt:
                stream.close()
            done = stream.completion
            assert done.finish_reason == "cancelled"
            assert done.text.startswith("".join(pieces)[:-2])
            if done.state.tokens:  # the prompt had been read
                _, state = low.eval_sequence(done.state.tokens, None)
                assert np.array_equal(done.state.values, state)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# ---- streams ----


def test_stream(model):
    options = {"seed": 1, "max_tokens": 30}
    expected = model.generate("Hello", **options)
    stream = model.stream("Hello", **options)
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = stream.completion
    assert "".join(stream) == expected.text
    assert stream.completion.text == expected.text
    assert same(stream.completion.state, expected.state)
    assert stream.completion is stream.completion
    with pytest.raises(ValueError, match="one prompt"):
        model.stream(["a", "b"])
    with pytest.raises(ValueError, match="one answer"):
        model.stream("a", n=2)


def test_a_stream_tells_how_far_it_is(model):
    stream = model.stream("Hello", seed=1, max_tokens=30)
    text = ""
    for piece in stream:
        text += piece
        so_far = stream.so_far
        assert so_far.text.startswith(text)
        expected = model.read(so_far.tokens, model.read("Hello"))
        assert so_far.state == expected
        assert np.array_equal(so_far.state.logits, expected.logits)
    assert so_far.tokens == stream.completion.tokens


def test_closing_a_stream_cancels_the_answer(model):
    stream = model.stream("Hello", seed=1)
    pieces = [next(stream), next(stream)]
    stream.close()
    assert list(stream) == []
    done = stream.completion
    assert done.finish_reason == "cancelled"
    assert done.text.startswith("".join(pieces))
    expected = model.generate("Hello", seed=1, max_tokens=len(done.tokens) + 10)
    rest = model.generate(state=done.state, seed=1, max_tokens=10)
    assert done.tokens + rest.tokens == expected.tokens
    with model.stream("Hello") as never:
        pass
    assert (never.completion.text, len(never.completion.state.tokens)) == ("", 0)


def test_another_thread_cancels_a_stream(model):
    stream = model.stream("Hello", max_tokens=10**9)
    timer = threading.Timer(0.1, stream.cancel)
    timer.start()
    for _ in stream:
        pass
    timer.join()
    assert stream.completion.finish_reason == "cancelled"


def test_async_stream(model):
    expected = model.generate("Hello", seed=1, max_tokens=30).text

    async def main():
        stream = model.astream("Hello", seed=1, max_tokens=30)
        text = "".join([piece async for piece in stream])
        both = await asyncio.gather(*(collect(seed) for seed in (1, 2)))
        return text, stream.completion.text, both

    async def collect(seed):
        return "".join([piece async for piece in model.astream("Hello", seed=seed, max_tokens=30)])

    text, told, both = asyncio.run(main())
    assert text == told == both[0] == expected != both[1]


def test_cancelling_an_async_task_ends_the_answer(model):
    async def main():
        stream = model.astream("Hello", max_tokens=10**9)

        async def consume():
            async for _ in stream:
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stream.aclose()
        return stream.completion

    assert asyncio.run(main()).finish_reason == "cancelled"


# ---- reading, scoring ----


def test_score(model, low):
    score = model.score("world", "Hello ")
    logits, state = low.eval_sequence(b"Hello ", None)
    expected = []
    for token in b"world":
        expected.append(log_softmax(logits)[token])
        logits, state = low.eval(token, state)
    assert score.tokens == list(b"world")
    assert score.logprobs == pytest.approx(expected)
    assert score.total == pytest.approx(sum(expected))
    after = model.score("world", state=model.read("Hello "))
    assert after.logprobs == score.logprobs
    assert model.score("world").logprobs == model.score("world", "\n").logprobs
    assert model.score("").total == 0
    long = "abc" * CHUNK
    assert model.score(long, "x").total == pytest.approx(
        model.score(long[:100], "x").total + model.score(long[100:], "x" + long[:100]).total
    )


def test_choose(model):
    choices = ["a", "bb", "c", "é"]
    choice = model.choose("Hello ", choices)
    expected = [model.score(text, "Hello ").total for text in choices]
    assert choice.logprobs == expected
    assert choice.index == int(np.argmax(expected))
    assert choice.text == choices[choice.index]
    for bad in ([], ["a", ""], "ab"):
        with pytest.raises(ValueError, match="choices"):
            model.choose("x", bad)


# ---- the prefix cache ----


def test_cached_and_uncached_answers_are_the_same(bytes_path):
    cache = PrefixCache()
    plain = RWKV(bytes_path, n_threads=1)
    cached = RWKV(bytes_path, n_threads=1, prefix_cache=cache)
    prompt = "x" * 100
    options = {"seed": 1, "max_tokens": 20}
    with plain, cached:
        for text, known in (
            (prompt, 0),
            (prompt, 100),  # all of it
            (prompt + "yz", 100),
            (prompt[:50], 0),
            (prompt[:70], 50),
        ):
            expected = plain.generate(text, **options)
            answer = cached.generate(text, **options)
            assert answer.timings.cached_tokens == known
            assert answer.timings.prompt_tokens == len(text)
            assert answer.tokens == expected.tokens
            assert same(answer.state, expected.state)
            assert same(cached.read(text), plain.read(text))
        # The end of an answer is kept too, and serves a conversation that goes on as text.
        turn = list(prompt.encode()) + plain.generate(prompt, **options).tokens
        answer = cached.generate([*turn, 5], **options)
        assert answer.timings.cached_tokens == len(turn)
        assert same(answer.state, plain.generate([*turn, 5], **options).state)
        # All of it is a prompt then: penalties count nothing of it.
        options |= {"presence_penalty": 5.0}
        answer = cached.generate(turn, **options)
        assert answer.timings.cached_tokens == len(turn)
        assert answer.tokens == plain.generate(turn, **options).tokens
        # From a state that the model made, but not from an imported one.
        state = plain.read(prompt)
        assert cached.generate("yz", state=state).timings.cached_tokens == 2
        state = State(state.values, state.logits, state.tokens, n_layer=state.n_layer)
        assert cached.generate("yz", state=state).timings.cached_tokens == 0


def test_cache_keys_tell_arithmetics_apart(bytes_path):
    with RWKV(bytes_path) as one, RWKV(bytes_path, activations="int8") as other:
        assert one.cache_key != other.cache_key
        assert one.exact == other.exact
    with RWKV(bytes_path, activations="A16", n_threads=2) as same_one:
        assert same_one.cache_key == one.cache_key


# ---- the model ----


def test_embedded_model():
    with RWKV() as model:
        assert (model.n_vocab, model.style) == (256, "plain")
        assert len(model.generate("ROMEO:", max_tokens=5).tokens) == 5


def test_sizes_and_names(model, low):
    assert (model.n_vocab, model.n_embed) == (low.n_vocab, low.n_embed)
    assert (model.n_layer, model.n_state) == (low.n_layer, low.n_state)
    assert model.family in model.cache_key or model.exact in model.cache_key
    assert "bytes.bin" in repr(model)


def test_pickles_by_path(model, bytes_path):
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with twin:
            assert twin.path == bytes_path
            assert same(twin.read("Hello"), model.read("Hello"))


def test_closed_model(bytes_path):
    model = RWKV(bytes_path, n_threads=1)
    state = model.read("a")
    stream = model.stream("a")
    next(stream)
    model.free()
    model.free()
    for use in (
        lambda: next(stream),
        lambda: model.read("a"),
        lambda: model.generate("a"),
        lambda: model.generate(state=state),
        lambda: model.score("a"),
        lambda: model.choose("a", ["b"]),
    ):
        with pytest.raises(RuntimeError, match="model is closed"):
            use()


def test_many_threads_share_one_model(bytes_path):
    with RWKV(bytes_path, n_threads=1) as model:
        expected = [model.generate("Hello", seed=seed, max_tokens=60).tokens for seed in range(8)]
        found = {}

        def work(seed):
            for _ in range(3):
                found.setdefault(seed, []).append(
                    model.generate("Hello", seed=seed, max_tokens=60).tokens
                )

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {seed: [expected[seed]] * 3 for seed in range(8)}


def test_freeing_while_other_threads_evaluate(bytes_path):
    model = RWKV(bytes_path, n_threads=1)
    ends = []

    def work():
        try:
            model.generate("Hello", max_tokens=10**9)
        except RuntimeError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    model.free()
    for thread in threads:
        thread.join()
    assert ends == ["model is closed"] * 4
    gc.collect()


@pytest.mark.parametrize(
    ("kind", "text", "arguments"),
    [
        (ValueError, "max_tokens", {"max_tokens": -1}),
        (TypeError, "max_tokens", {"max_tokens": 1.5}),
        (ValueError, "n must", {"n": 0}),
        (ValueError, "logprobs", {"logprobs": -1}),
        (ValueError, "logprobs", {"logprobs": 257}),
        (TypeError, "sampling", {"sampling": {"seed": 1}}),
        (ValueError, "time_limit", {"time_limit": -1}),
        (ValueError, "time_limit", {"time_limit": float("nan")}),
        (ValueError, "time_limit", {"time_limit": "1"}),
        (TypeError, "cancel", {"cancel": 5}),
        (TypeError, "progress", {"progress": "bar"}),
        (ValueError, "stop", {"stop": [""]}),
        (ValueError, "stop", {"stop": "x" * 10_000}),
        (TypeError, "stop: ", {"stop": None}),
        (TypeError, "stop_tokens: ", {"stop_tokens": 5}),
        (ValueError, "stop_tokens", {"stop_tokens": [256]}),
        (ValueError, "stop_tokens", {"stop_tokens": [-1]}),
        (TypeError, "stop_tokens", {"stop_tokens": [True]}),
        (TypeError, "stop_tokens", {"stop_tokens": 5}),
        (TypeError, "stop", {"stop": 5}),
        (ValueError, r"prompt\[1\]", {"prompt": [1, 256]}),
        (TypeError, r"prompt\[0\]", {"prompt": [1.5]}),
        (TypeError, "bytes", {"prompt": b"Hello"}),
        (TypeError, "prompt", {"prompt": None}),
        (TypeError, "prompt", {"prompt": 5}),
        (ValueError, "surrogate", {"prompt": "a\ud800"}),
        (ValueError, "n: ", {"n": 3, "num_beams": 2}),
        (ValueError, "banned_tokens", {"banned_tokens": [256]}),
    ],
)
def test_bad_arguments(model, kind, text, arguments):
    with pytest.raises(kind, match=text):
        model.generate(**({"prompt": "a"} | arguments))


def test_tokenizer_that_does_not_fit(bytes_path):
    with (
        RWKV(bytes_path, vocabulary=WorldTokenizer(300, [bytes([v]) for v in range(256)])) as model,
        pytest.raises(ValueError, match="300"),
    ):
        model.generate("a")


# ---- RWKV-4a ----


def test_a_model_with_tiny_attention(tmp_path):
    """Its state in every hand that a state goes through: branches, files, the prefix cache."""
    path = tmp_path / "4a.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2, n_tiny=6, tiny_layer=1), "Q5_1")
    cache = PrefixCache(folder=tmp_path / "cache")
    with RWKV(path, n_threads=1, prefix_cache=cache) as model, RWKVModel(None, path, 1) as low:
        assert model.n_state == (2 * 5 + 6) * 32
        tokens, _, values = by_hand(low, b"Once upon", 20, Sampling(seed=1))
        written = model.generate("Once upon", seed=1, max_tokens=20)
        assert written.tokens == tokens
        assert written.state.values.tobytes() == values.tobytes()

        state = model.read("Once")
        assert np.any(state.tiny)
        state.save(tmp_path / "state")
        again = State.load(tmp_path / "state", model)
        assert model.generate(" upon", state=again, seed=1, max_tokens=20).tokens == tokens
        assert model.generate("Once upon", seed=1, max_tokens=20).tokens == tokens
    with RWKV(path, n_threads=1, prefix_cache=PrefixCache(folder=tmp_path / "cache")) as model:
        assert model.generate("Once upon", seed=1, max_tokens=20).tokens == tokens
