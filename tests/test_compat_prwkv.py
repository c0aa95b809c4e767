"""prwkv: its README, its calls, and that what was broken there is not."""

import re

import numpy as np
import pytest
from rwkv_cpp import RWKV, RWKVFileError, Sampler, Sampling, load_tokenizer
from rwkv_cpp.compat.prwkv import rwkvrnnmodel
from rwkv_cpp.compat.prwkv.rwkvrnnmodel import RWKVRNN4NeoForCausalLM
from rwkv_cpp.compat.prwkv.rwkvtokenizer import RWKVTokenizer
from seeds import (
    VOCABULARY,
    block,
    checkpoint,
    home_with_vocabularies,
    needs_seeds,
    needs_vocabulary,
    run_example,
    seeds,
)

CONTEXT = list(b"Tell me a story")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("prwkv") / "RWKV-4-Tiny.pth", n_vocab=256)


@pytest.fixture
def model(path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(path.parent / "home"))
    return RWKVRNN4NeoForCausalLM.from_pretrained(str(path.with_suffix("")))


def greedy(model, tokens, n):
    """What the model writes after some tokens, by our own API."""
    return model.rwkv.generate(tokens, max_tokens=n, temperature=0).tokens


def test_sizes_are_the_files(path, model):
    assert (model.number_of_layers, model.embedding_dim) == (2, 32)
    assert model.file_name == "RWKV-4-Tiny"
    with pytest.warns(UserWarning, match="number_of_layers|cache_folder") as caught:
        RWKVRNN4NeoForCausalLM.from_pretrained(path, 24, 32, 1024, ".")
    assert [str(warning.message) for warning in caught] == [
        "number_of_layers 24: the file has 2",
        "cache_folder_path is not used: models are kept where RWKV_HOME says",
    ]


def test_generate_after_a_warm_up(model):
    model.warmup_with_context(context=CONTEXT)
    told = []
    written = model.generate([], told.append, max_length=9, temperature=0)
    assert written == told == greedy(model, CONTEXT, 9)  # the first of them too
    assert model.generate([], max_length=9, temperature=0) == written  # from the same context
    assert bytes(CONTEXT) == b"Tell me a story"


def test_generate_from_tokens(model):
    told, tokens = [], list(CONTEXT)
    written = model.generate(tokens, told.append, max_length=5, temperature=0)
    assert tokens == CONTEXT  # not appended to
    assert written == told == CONTEXT + greedy(model, CONTEXT, 5)
    model.warmup_with_context(CONTEXT[:4])
    assert model.generate(CONTEXT[4:], max_length=5, temperature=0) == written[4:]
    assert model.generate([7], max_length=0) == [7]


def test_every_token_is_read_once(model, monkeypatch):
    read = []
    own = model.rwkv.read

    def noting(tokens, state=None):
        read.append(list(tokens))
        return own(tokens, state)

    monkeypatch.setattr(model.rwkv, "read", noting)
    written = model.generate([1, 2, 3], max_length=4)
    assert read == [[1, 2, 3], *([token] for token in written[3:])]


def test_update_state_after_generation(model):
    model.update_state_after_generation(True)
    model.warmup_with_context(CONTEXT)
    parts = [model.generate([], max_length=n, temperature=0) for n in (1, 3, 2)]
    assert [token for part in parts for token in part] == greedy(model, CONTEXT, 6)


def test_full_context(model):
    model.warmup_with_context([1])
    model.warmup_with_context(CONTEXT)  # in its place, not behind it
    model.update_state_after_generation(True)
    model.should_return_full_context()
    first = model.generate([], max_length=2, temperature=0)
    assert first == CONTEXT + greedy(model, CONTEXT, 2)
    model.should_return_full_context(False)
    second = model.generate([9], max_length=2, temperature=0)
    assert second == [9, *greedy(model, [*first, 9], 2)]
    model.should_return_full_context(True)
    assert model.generate([], max_length=0) == first + second


def test_sampling(model):
    """temperature, top_k, top_p, penalties and word lists as our own Sampler has them."""
    model.warmup_with_context(CONTEXT)
    for own, theirs in [
        ({"temperature": 3.0}, {"temperature": 3.0, "top_p": 0, "top_k": 0}),
        ({"temperature": 0.85, "top_p": 0.9, "top_k": 20}, {}),
        ({"top_k": 3, "repetition_penalty": 1.5},
         {"temperature": 1, "top_p": 0, "top_k": 3, "repetition_penalty": 1.5}),
        ({"banned_tokens": (5, 6), "forced_tokens": (7, 8)},
         {"temperature": 1, "top_p": 0, "top_k": 0, "bad_words_ids": [5, 6],
          "force_words_ids": [7, 8]}),
    ]:  # fmt: skip
        np.random.seed(0)
        found = model.generate([], max_length=12, **theirs)
        sampling = Sampling(**{"top_p": 1.0, **own, "seed": seeds(1)[0]})
        sampler, state = Sampler(sampling, 256), model.rwkv.read(CONTEXT)
        for token in found:
            assert token == sampler.sample(state.logits, len(state.tokens))
            sampler.accept(token)
            state = model.rwkv.read([token], state)


def test_end_of_text(model):
    model.warmup_with_context(CONTEXT)
    for stop_on_eos, n in ((True, 3), (False, 6)):
        written = model.generate(
            [], max_length=6, force_words_ids=[4, 5, 0, 6, 7, 8], stop_on_eos=stop_on_eos
        )
        assert written == [4, 5, 0, 6, 7, 8][:n]


def test_nothing_to_go_on_from(model):
    for call in (lambda: model.generate([]), lambda: model.save_context("x")):
        with pytest.raises(rwkvrnnmodel.InputsNeeded, match="warmup_with_context"):
            call()
    model.warmup_with_context(CONTEXT)
    with pytest.raises(rwkvrnnmodel.FilePathError):
        model.save_context(None)
    model.clear_memory()
    with pytest.raises(rwkvrnnmodel.InputsNeeded):
        model.generate([])


def test_contexts_in_files(model, tmp_path):
    model.warmup_with_context(CONTEXT)
    expected = model.generate([], max_length=5, temperature=0)
    model.save_context(tmp_path / "story", "Tell me a story")
    assert [path.name for path in tmp_path.iterdir()] == ["story.safetensors"]
    model.clear_memory()
    assert model.load_context(tmp_path / "story") == ("Tell me a story", "RWKV-4-Tiny")
    assert model.generate([], max_length=5, temperature=0) == expected
    model.should_return_full_context()
    assert model.generate([], max_length=0) == CONTEXT + expected

    other = RWKVRNN4NeoForCausalLM.from_pretrained(checkpoint(tmp_path / "b.pth", 2, n_vocab=256))
    with pytest.raises(rwkvrnnmodel.IncompatibleCompatibleModel, match="another model"):
        other.load_context(tmp_path / "story")
    other.load_context(tmp_path / "story", ignore_model_check=True)
    assert len(other.generate([], max_length=3)) == 3
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(RWKVFileError):
        model.load_context(tmp_path / "bad")
    assert model.generate([], max_length=5, temperature=0)[-5:] == expected  # still the old one


@pytest.mark.parametrize("call", ["half", "full", "cuda", "cpu"])
def test_devices_and_types_warn(model, call):
    with pytest.warns(UserWarning, match=rf"^{call}\(\) has no effect: the model is on the CPU"):
        getattr(model, call)()


@needs_vocabulary
def test_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(home_with_vocabularies(tmp_path)))
    own = load_tokenizer(50277)
    text = "In a shocking  finding: né 日本 <|endoftext|>"
    for tokenizer in (RWKVTokenizer.default(), RWKVTokenizer.from_file(str(VOCABULARY))):
        ids = tokenizer.encode(text).ids
        assert ids == own.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode([0, 187, 1]) == "\n"
        shown = tokenizer.decode([0, 187, 1], skip_special_tokens=False)
        assert shown == "<|endoftext|>\n<|padding|>"
    with pytest.raises(RWKVFileError):
        RWKVTokenizer.from_file("missing.json")


@needs_seeds
@needs_vocabulary
def test_readme(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "RWKV-4-Pile-430M-20220808-8066.pth")
    out = run_example(
        block("prwkv", "warmup_with_context"),
        {
            "from prwkv.": "from rwkv_cpp.compat.prwkv.",
            "/Users/michaelchung/Code/Production-RWKV/RWKV-4-Pile-430M-20220808-8066": str(
                path.with_suffix("")
            ),
        },
        tmp_path,
    )
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    context = re.search(r'^context = "(.*)"$', block("prwkv", "context ="), re.M)[1]
    with RWKV(path) as rwkv:
        decode = rwkv.tokenizer.decode
        completion = rwkv.generate(
            context.replace("\\n", "\n"),
            max_tokens=32,
            temperature=0.8,
            top_p=0.9,
            top_k=20,
            seed=seeds(1)[0],
        )
    assert len(completion.tokens) == 32
    streamed = "".join(decode([token]) for token in completion.tokens)
    start, end = re.fullmatch(r"(.*?)[\d.e-]+ seconds \n(.*)", out, re.S).groups()
    assert start == streamed
    assert end == f"\n\n---Result---:\n{decode(completion.tokens)}\n"
