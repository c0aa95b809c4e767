"""conversation.py: turns, and the states between them."""

from pathlib import Path

import numpy as np
import pytest
from models import random_model, write_model
from rwkv_cpp import RWKVModel, conversation, styles
from rwkv_cpp.conversation import Conversation
from rwkv_cpp.model import embedded_model
from rwkv_cpp.prefix_cache import PrefixCache
from rwkv_cpp.rwkv import RWKV
from rwkv_cpp.sampling import Sampling

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def model():
    with RWKV(n_threads=1) as model:
        yield model


@pytest.fixture
def talk(model):
    talk = Conversation(model, styles.find("plain"), sampling=Sampling(seed=1), max_tokens=60)
    "".join(talk.say("Good morrow, my love!"))
    "".join(talk.say("What news?"))
    return talk


def reference(text):
    """The state after a text, by the low level."""
    with RWKVModel(None, embedded_model(), 1) as model:
        return model.eval_sequence(text, None)[1]


def text_of(state):
    return bytes(state.tokens.tolist())


def test_a_conversation_is_one_text(model):
    style = styles.find("plain")
    talk = Conversation(model, style, sampling=Sampling(seed=3))
    text = style.start
    for message in ("Good morrow, my love!", "two\nlines"):
        answer = "".join(talk.say(message))
        text += f"\n\nROMEO:\n{message}\n\nJULIET:\n{answer}"
        assert answer.strip() == talk.turns[-1].answer
        assert not answer.startswith("\n")
        assert "\n\n" not in answer
    assert text_of(talk.state) == text.encode()
    assert talk.state.values.tobytes() == reference(text.encode()).tobytes()
    assert np.isfinite(talk.state.logits).all()
    first, second = talk.turns
    assert (first.start, first.end) == (len(style.start), second.start)
    assert second.end == len(text)


def test_same_seed_same_conversation(model, talk):
    again = Conversation(model, talk.style, sampling=Sampling(seed=1), max_tokens=60)
    for turn in talk.turns:
        "".join(again.say(turn.user))
    assert [turn.answer for turn in again.turns] == [turn.answer for turn in talk.turns]
    assert again.state == talk.state


def test_empty_messages(talk):
    for text in ("", " \n\n"):
        with pytest.raises(ValueError, match="empty"):
            next(talk.say(text))
    assert len(talk.turns) == 2


def test_options_of_one_answer(model):
    talk = Conversation(model, styles.find("plain"), max_tokens=60)
    greedy = ["".join(talk.aside("Who art thou?", temperature=0)) for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert talk.sampling.temperature > 0


# ---- Retrying and going back ---------------------------------------------------------------------


def test_retry_replaces_the_last_answer(talk):
    before = talk.turns[0]
    answers = {talk.turns[1].answer}
    for _ in range(3):
        written = "".join(talk.retry()).strip()
        assert talk.turns == [before, talk.turns[1]]
        assert talk.turns[1].user == "What news?"
        assert talk.turns[1].answer == written
        answers.add(written)
    assert len(answers) > 2  # one seed, and yet others
    text = text_of(talk.state)
    assert text.endswith(f"\n\nROMEO:\nWhat news?\n\nJULIET:\n{written}".encode())
    assert talk.state.values.tobytes() == reference(text).tobytes()


def test_back_is_as_if_nothing_had_been_said(model, talk):
    alone = Conversation(model, talk.style, sampling=talk.sampling, max_tokens=60)
    "".join(alone.say("Good morrow, my love!"))
    undone = talk.back()
    assert [turn.user for turn in undone] == ["What news?"]
    assert talk.state == alone.state
    assert "".join(talk.say("Who art thou?")) == "".join(alone.say("Who art thou?"))
    assert talk.state == alone.state
    "".join(talk.retry())
    "".join(alone.retry())
    assert talk.state == alone.state
    talk.back(2)
    assert talk.turns == []
    assert talk.state == Conversation(model, talk.style).start


def test_back_and_then_retry(talk):
    answer = talk.turns[0].answer
    talk.back()
    "".join(talk.retry())
    assert len(talk.turns) == 1
    assert talk.turns[0].user == "Good morrow, my love!"
    assert talk.turns[0].answer != answer


@pytest.mark.parametrize("n", [0, -1, 3])
def test_back_too_far(talk, n):
    with pytest.raises(ValueError, match=f"cannot go back {n}: the conversation has 2 turns"):
        talk.back(n)
    assert len(talk.turns) == 2


def test_old_states_are_let_go_and_read_again(talk, monkeypatch):
    monkeypatch.setattr(conversation, "KEPT_STATES", 2)
    states = [turn.state for turn in talk.turns]
    for _ in range(3):
        "".join(talk.say("And then?"))
        states.append(talk.state)
    assert [turn.state is None for turn in talk.turns] == [True, True, True, False, False]
    talk.back(2)
    assert talk.state == states[2]
    talk.back()
    assert talk.state == states[1]


def test_retry_without_a_turn(model):
    with pytest.raises(ValueError, match="no answer yet"):
        next(Conversation(model, styles.find("plain")).retry())


def test_copies_go_their_own_ways(talk):
    twin = talk.copy()
    "".join(twin.retry())
    "".join(twin.say("And then?"))
    assert (len(talk.turns), len(twin.turns)) == (2, 3)
    assert talk.turns[0] == twin.turns[0]
    assert talk.turns[1].answer != twin.turns[1].answer
    fresh = talk.fresh()
    assert fresh.turns == []
    assert fresh.state == talk.start
    assert len(talk.turns) == 2


@pytest.mark.parametrize("n_vocab", [50277, 65536])
def test_turns_have_the_tokens_of_the_whole_text(tmp_path, monkeypatch, n_vocab):
    """Also where an answer's end and a newline are one token, as 。 and a newline in World."""
    monkeypatch.setattr(conversation, "KEPT_STATES", 1)
    vocabulary = DATA / {50277: "20B_tokenizer.json", 65536: "rwkv_vocab_v20230424.txt"}[n_vocab]
    if not vocabulary.is_file():
        pytest.skip(f"{vocabulary} is absent")
    write_model(tmp_path / "model.bin", random_model(1, n_vocab, n_embed=32, n_layer=1))
    with RWKV(tmp_path / "model.bin", vocabulary=vocabulary, n_threads=1) as model:
        talk = Conversation(model, styles.find("world"), max_tokens=20)
        encode = model.tokenizer.encode
        text = talk.style.start
        ends = []
        for answer in (" 你好。", " Fine.", " 是…", " No,"):
            forced = encode(answer + "\n\nUser:")
            assert "".join(talk.say("如何？", forced_tokens=forced)) == answer
            assert talk.turns[-1].finish_reason == "stop"
            text += "\n\nUser: 如何？\n\nAssistant:" + answer
            assert list(talk.state.tokens) == encode(text)
            ends.append(talk.state)
        talk.back(3)
        assert talk.turns[0].answer == "你好。"
        assert talk.state == ends[0]
        "".join(talk.say("如何？", forced_tokens=encode(" Fine.\n\nUser:")))
        assert talk.state == ends[1]


# ---- Stopping ------------------------------------------------------------------------------------


def test_cancelled_answers_are_kept_as_far_as_they_came(model):
    talk = Conversation(model, styles.find("plain"), sampling=Sampling(seed=1))
    pieces = []
    for piece in talk.say("Tell me a long tale."):
        pieces.append(piece)
        if len(pieces) == 5:
            talk.cancel.set()
    talk.cancel.clear()
    (turn,) = talk.turns
    assert turn.finish_reason == "cancelled"
    assert 5 <= len("".join(pieces)) <= 6
    text = text_of(talk.state)
    assert text.endswith(b"JULIET:\n" + "".join(pieces).encode())
    assert talk.state.values.tobytes() == reference(text).tobytes()
    "".join(talk.say("Go on."))
    assert len(talk.turns) == 2


def test_cancelled_while_reading(talk):
    state = talk.state
    talk.cancel.set()
    with pytest.raises(KeyboardInterrupt):
        next(talk.say("What news?"))
    assert len(talk.turns) == 2
    assert talk.state is state
    "".join(talk.retry())  # nothing is to be read: cancelled before the first token
    assert talk.turns[-1].state is state


def test_answers_that_nobody_waits_for(talk):
    state = talk.state
    pieces = talk.say("What news?")
    next(pieces)
    pieces.close()
    assert len(talk.turns) == 2
    assert talk.state is state


def test_an_answer_does_not_begin_with_a_newline(model):
    wish = Sampling(temperature=0, logit_bias={10: 1000})
    talk = Conversation(model, styles.find("plain"), sampling=wish)
    "".join(talk.say("Good morrow!"))
    (turn,) = talk.turns
    assert len(turn.answer) == 1
    assert turn.finish_reason == "stop"
    assert np.isfinite(talk.state.logits).all()


def test_empty_answers(model):
    """Where the first token ends the answer, the state before it stays, with its own logits."""
    talk = Conversation(model, styles.find("plain"), max_tokens=60)
    talk.style = styles.Style("test", "A", "B", stop=("x",), ban_first=("y",), prompt="A: B")
    "".join(talk.say("hello", temperature=0, logit_bias={ord("x"): 1000}))
    (turn,) = talk.turns
    assert (turn.answer, turn.finish_reason) == ("", "stop")
    assert np.isfinite(talk.state.logits).all()
    assert text_of(talk.state) == b"\nA: B\n\nA: hello\n\nB:"


def test_banned_beginnings_do_not_reach_the_prefix_cache():
    cache = PrefixCache()
    with RWKV(n_threads=1, prefix_cache=cache) as model:
        talk = Conversation(model, styles.find("plain"), sampling=Sampling(seed=1), max_tokens=20)
        "".join(talk.say("Good morrow!"))
        asked = talk.style.start + "\n\n" + talk.style.turn("Good morrow!")
        read = model.read(asked)
        with RWKV(n_threads=1) as plain:
            assert read.logits.tobytes() == plain.read(asked).logits.tobytes()
            alone = Conversation(plain, talk.style, sampling=Sampling(seed=1), max_tokens=20)
            "".join(alone.say("Good morrow!"))
        assert talk.state == alone.state


def test_a_start_text_is_read_once(model, monkeypatch):
    starts = PrefixCache()
    first = Conversation(model, styles.find("plain"), starts=starts)
    expected = first.start
    assert expected == Conversation(model, first.style).start
    "".join(first.say("Good morrow!"))
    assert len(starts) == 1
    monkeypatch.setattr(model, "_evaluate", None)
    again = Conversation(model, first.style, starts=starts).start
    assert again == expected
    assert again.logits.tobytes() == expected.logits.tobytes()


# ---- Free texts ----------------------------------------------------------------------------------


def test_free_texts_leave_the_conversation_alone(model, talk):
    state = talk.state
    text = "".join(talk.write("ROMEO:\n"))
    more = "".join(talk.write_on())
    whole = model.generate("ROMEO:\n", sampling=talk.sampling, max_tokens=120).text
    assert text + more == whole
    other = "".join(talk.write_again())
    assert other != more
    other_more = "".join(talk.write_on())
    assert other_more not in (more, other)
    assert talk.state is state
    assert len(talk.turns) == 2


def test_aside_is_a_first_message(model, talk):
    alone = Conversation(model, talk.style, sampling=talk.sampling, max_tokens=60)
    assert "".join(talk.aside("Who art thou?")) == "".join(alone.say("Who art thou?"))
    assert len(talk.turns) == 2


def test_nothing_to_write_on(model):
    talk = Conversation(model, styles.find("plain"))
    with pytest.raises(ValueError, match="no text has been written"):
        next(talk.write_on())
    with pytest.raises(ValueError, match="no text has been written"):
        next(talk.write_again())


def test_a_style_without_a_prompt(model):
    style = styles.Style("test", "ROMEO", "JULIET", gap="\n")
    talk = Conversation(model, style, max_tokens=20)
    assert talk.start is None
    assert talk.state is None
    "".join(talk.say("Hello"))
    "".join(talk.say("Again"))
    text = text_of(talk.state)
    assert text.startswith(b"\nROMEO:\nHello\n\nJULIET:\n")
    assert b"\n\nROMEO:\nAgain\n\nJULIET:\n" in text
    talk.back(2)
    assert talk.state is None
