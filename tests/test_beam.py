"""beam.py, held against a search that keeps all texts in lists and reads each from its start."""

import math

import numpy as np
import pytest
from models import random_model, write_model
from rwkv_cpp import RWKV, RWKVModel
from rwkv_cpp.sampling import log_softmax
from rwkv_cpp.tokenizer import WorldTokenizer

N_VOCAB = 260
FEW = (1 + ord("a"), 1 + ord("b"), 1 + ord("c"), 1 + ord("d"), 257)  # 257: "\n\n"
BIAS = {0: 3.0}  # texts that end early are among the best, until longer ones come before them
OTHERS = tuple(token for token in range(1, N_VOCAB) if token not in FEW)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("beam") / "model.bin"
    write_model(path, random_model(5, N_VOCAB, n_embed=32, n_layer=2))
    return path


@pytest.fixture(scope="module")
def model(path):
    words = [bytes([value]) for value in range(256)] + [b"\n\n"]
    with RWKV(path, n_threads=1, vocabulary=WorldTokenizer(N_VOCAB, words)) as model:
        yield model


@pytest.fixture(scope="module")
def logprobs(path):
    """(n_vocab) after a prompt and some tokens, those but FEW and the end of text banned."""
    known = {}
    with RWKVModel(None, path, 1) as low:

        def after(tokens):
            if tokens not in known:
                logits = low.eval_sequence(tokens, None)[0].astype(float)
                logits[0] += BIAS[0]
                logits[list(OTHERS)] = -math.inf
                known[tokens] = log_softmax(logits)
            return known[tokens]

        yield after


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_with_enough_beams_every_text_is_compared(model, logprobs, penalty):
    """All texts of up to 4 of 5 tokens, and of the end of text."""
    prompt = tuple(model.tokenizer.encode("ab"))
    scores = {}

    def walk(tokens, total):
        if len(tokens) == 4:
            scores[tokens, "length"] = total / len(tokens) ** penalty
            return
        row = logprobs(prompt + tokens)
        scores[tokens, "stop"] = (total + row[0]) / (len(tokens) + 1) ** penalty
        for token in FEW:
            walk((*tokens, token), total + row[token])

    walk((), 0.0)
    best = sorted(scores, key=scores.get, reverse=True)[:7]
    answers = model.generate(
        "ab",
        num_beams=5**4,
        n=7,
        max_tokens=4,
        length_penalty=penalty,
        banned_tokens=OTHERS,
        logit_bias=BIAS,
    )
    assert [(tuple(one.tokens), one.finish_reason) for one in answers] == best


def beams_by_hand(logprobs, prompt, num_beams, n, max_tokens, penalty, stop=None, text=None):
    """The rule of BeamSearch's docstring, with nothing spared and nothing ended early."""
    beams, ended = [((), 0.0)], []
    for _ in range(max_tokens):
        candidates = []
        for tokens, total in beams:
            row = total + logprobs(prompt + tokens)
            ended.append((row[0] / (len(tokens) + 1) ** penalty, tokens, "stop"))
            candidates += [(row[token], (*tokens, token)) for token in range(1, N_VOCAB)]
        candidates = [one for one in candidates if one[0] > -math.inf]
        candidates.sort(key=lambda one: -one[0])
        beams = []
        for total, tokens in candidates:
            if len(beams) == num_beams:
                break
            if stop is not None and stop in text(tokens):
                ended.append((total / len(tokens) ** penalty, tokens, "stop"))
            else:
                beams.append((tokens, total))
    ended += [(total / len(tokens) ** penalty, tokens, "length") for tokens, total in beams]
    ended.sort(key=lambda one: -one[0])
    return ended[:n]


@pytest.mark.parametrize("num_beams", [2, 3, 8])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize(("text", "n"), [("cab", 2), ("abb", 1), ("dda", 1)])
def test_few_beams_follow_the_rule(model, logprobs, num_beams, penalty, text, n):
    prompt = tuple(model.tokenizer.encode(text))
    expected = beams_by_hand(logprobs, prompt, num_beams, n, 8, penalty)
    answers = model.generate(
        [text],
        num_beams=num_beams,
        n=n,
        max_tokens=8,
        length_penalty=penalty,
        banned_tokens=OTHERS,
        logit_bias=BIAS,
        logprobs=1,
    )
    assert [(tuple(one.tokens), one.finish_reason) for one in answers] == [
        (tokens, reason) for _, tokens, reason in expected
    ]
    for answer in answers:
        assert answer.stop == (0 if answer.finish_reason == "stop" else None)
        fresh = model.read([*prompt, *answer.tokens])
        assert answer.state == fresh
        assert np.array_equal(answer.state.logits, fresh.logits)
        assert answer.state.n_generated == len(answer.tokens)
        scored = model.score(answer.tokens, text)  # logprobs are the model's own
        assert [told.logprob for told in answer.logprobs] == pytest.approx(scored.logprobs)


def test_stop_strings_end_texts(model, logprobs):
    prompt = tuple(model.tokenizer.encode("da"))
    options = {"max_tokens": 6, "banned_tokens": OTHERS, "ignore_eos": True}
    likeliest = model.generate("da", num_beams=4, **options)
    stop = likeliest.text[2:4]

    def without_eos(tokens):
        row = logprobs(tokens).copy()
        row[0] = -math.inf
        return row - math.log(np.exp(row).sum())

    expected = beams_by_hand(without_eos, prompt, 4, 3, 6, 1.0, stop, model.tokenizer.decode)
    assert any(reason == "stop" for _, _, reason in expected)
    answers = model.generate("da", num_beams=4, n=3, stop=stop, **options)
    for answer, (_, tokens, reason) in zip(answers, expected, strict=True):
        text = model.tokenizer.decode(tokens)
        assert answer.text == text.partition(stop)[0]
        assert answer.finish_reason == reason
        assert answer.stop == (stop if reason == "stop" else None)
        assert answer.state == model.read([*prompt, *answer.tokens])


def test_one_batch_per_step_and_one_prompt(model, monkeypatch):
    sizes = []
    evaluate = model._evaluate
    monkeypatch.setattr(
        model, "_evaluate", lambda batch: sizes.append(len(batch)) or evaluate(batch)
    )
    model.generate(["ab", "cd"], num_beams=3, max_tokens=5, ignore_eos=True)
    assert sizes == [2] + [6] * 5
    together = model.generate(["ab", "cd"], num_beams=3, n=2, max_tokens=5)
    alone = [*model.generate("ab", num_beams=3, n=2, max_tokens=5)]
    alone += model.generate("cd", num_beams=3, n=2, max_tokens=5)
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_what_sampling_has_counts_for_beams_too(model):
    forced = model.generate("ab", num_beams=2, max_tokens=4, forced_tokens=FEW[:2])
    assert forced.text.startswith("ab")
    assert model.generate("ab", num_beams=2, max_tokens=4, logit_bias={70: 100}).tokens == [70] * 4
    penalized = model.generate(
        "ab", num_beams=2, max_tokens=4, banned_tokens=OTHERS, presence_penalty=100
    )
    assert len(set(penalized.tokens)) == len(penalized.tokens)


def test_fewer_texts_than_asked_for(model):
    answers = model.generate("ab", num_beams=4, n=4, max_tokens=0)
    assert [answer.text for answer in answers] == [""] * 4
    only = tuple(token for token in range(N_VOCAB) if token != 98)
    answers = model.generate("ab", num_beams=3, n=2, max_tokens=2, banned_tokens=only)
    assert [answer.text for answer in answers] == ["aa", "aa"]
    with pytest.raises(ValueError, match="n: expected at most num_beams 2, found 3"):
        model.generate("ab", num_beams=2, n=3)


def test_cancelling_and_streaming(model):
    asked = []
    done = model.generate(
        "ab", num_beams=2, max_tokens=9, cancel=lambda: asked.append(1) or len(asked) > 4
    )
    assert done.finish_reason == "cancelled"
    assert len(done.tokens) == 3
    stream = model.stream("ab", num_beams=3, max_tokens=5)
    assert list(stream) == [model.generate("ab", num_beams=3, max_tokens=5).text]
