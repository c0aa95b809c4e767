"""grammar.py: with each of the tokenizers, only texts that match are written, and all of them."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from rwkv_cpp.errors import NonFiniteLogits, RWKVError
from rwkv_cpp.sampling import Sampler, Sampling
from rwkv_cpp.tokenizer import Tokenizer, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
VOCABULARIES = {
    256: None,
    50277: SHARED / "20B_tokenizer.json",
    65536: SHARED / "rwkv_vocab_v20230424.txt",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["é", "猫", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ARITHMETIC = """
start: sum
sum: product ("+" product)*
product: NUMBER ("*" NUMBER)*
NUMBER: /[0-9]{1,3}/
"""

needs_llguidance = pytest.mark.usefixtures("llguidance")


@pytest.fixture
def llguidance():
    return pytest.importorskip("llguidance")


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request) -> Tokenizer:
    path = VOCABULARIES[request.param]
    if path is not None and not path.exists():
        pytest.skip(f"{path.name} is not in shared/data beside the checkout")
    return load_tokenizer(request.param, path)


def write(tokenizer: Tokenizer, sampling: Sampling, seed: int, most: int = 300) -> str | None:
    """What comes out with random logits; None if the end is not reached."""
    sampler = Sampler(sampling, tokenizer.n_vocab, tokenizer=tokenizer)
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(tokenizer.n_vocab).astype(np.float32)
    tokens: list[int] = []
    for position in range(most):
        if sampler.finished:
            return tokenizer.decode_bytes(tokens).decode("utf-8")
        token = sampler.sample(rng.permutation(logits), position)
        sampler.accept(token)
        if tokenizer.token_bytes(token) == b"":  # the end of the text
            return tokenizer.decode_bytes(tokens).decode("utf-8")
        tokens.append(token)
    return None


@needs_llguidance
@pytest.mark.parametrize("seed", range(5))
def test_json(tokenizer, seed):
    text = write(tokenizer, Sampling(json_schema=SCHEMA, seed=seed, top_p=1.0), seed)
    value = json.loads(text)
    assert value.keys() == SCHEMA["properties"].keys()
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"é", "猫", "c"}
    assert len(value["tags"]) <= 3
    assert text == json.dumps(value, ensure_ascii=False) or "\\" in text


@needs_llguidance
@pytest.mark.parametrize("seed", range(5))
def test_regex(tokenizer, seed):
    rule = "(yes|no|peut-être|猫){2,3}[0-9]{3}"
    text = write(tokenizer, Sampling(regex=rule, seed=seed, top_p=1.0), seed)
    assert re.fullmatch(rule, text)


@needs_llguidance
def test_grammar(tokenizer):
    texts = [
        write(tokenizer, Sampling(grammar=ARITHMETIC, seed=seed, top_p=1.0), seed, most=40)
        for seed in range(5)
    ]
    for text in filter(None, texts):
        assert re.fullmatch(r"\d{1,3}([+*]\d{1,3})*", text)
    if tokenizer.n_vocab > 256:  # with bytes nothing says that a sum ends here
        assert any(texts)
    else:
        assert not any(texts)


@needs_llguidance
def test_every_matching_text_is_allowed(tokenizer):
    for text in ("pâté 猫", "pâté 👍🏽"):
        tokens = tokenizer.encode(text)
        sampling = Sampling(regex=r"pâté (猫|👍🏽)", forced_tokens=tokens)
        sampler = Sampler(sampling, tokenizer.n_vocab, tokenizer=tokenizer)
        for position in range(len(tokens)):
            assert not sampler.finished
            token = sampler.sample(np.zeros(tokenizer.n_vocab, np.float32), position)
            sampler.accept(token)
        assert sampler.finished


@needs_llguidance
def test_the_end_may_come_only_where_the_rule_is_fulfilled():
    path = VOCABULARIES[65536]
    if not path.exists():
        pytest.skip(f"{path.name} is not in shared/data beside the checkout")
    tokenizer = load_tokenizer(65536, path)
    logits = np.zeros(65536, np.float32)
    logits[0] = 50
    sampler = Sampler(Sampling(regex="[ab]{2,4}", temperature=0), 65536, tokenizer=tokenizer)
    tokens = []
    while not sampler.finished:
        tokens.append(sampler.sample(logits, 0))
        sampler.accept(tokens[-1])
    assert tokens[-1] == 0
    assert 2 <= len(tokenizer.decode(tokens)) <= 4
    with pytest.raises(ValueError, match="token 66 is not what the regex goes on with"):
        sampler.accept(66)


def byte_sampler(history: bytes = b"", **fields: object) -> Sampler:
    tokenizer = load_tokenizer(256)
    return Sampler(Sampling(**fields), 256, tokenizer=tokenizer, history=list(history))


@needs_llguidance
def test_masks_are_those_of_each_sequence():
    logits = np.zeros(256, np.float32)
    sampler = byte_sampler(regex="ab|cd", temperature=0)
    assert sampler.sample(logits, 0) == ord("a")
    twin = sampler.copy()
    sampler.accept(ord("a"))
    twin.accept(ord("c"))
    assert (sampler.sample(logits, 1), twin.sample(logits, 1)) == (ord("b"), ord("d"))
    assert byte_sampler(b"c", regex="ab|cd", temperature=0).sample(logits, 1) == ord("d")


@needs_llguidance
def test_what_the_rule_does_not_allow():
    sampler = byte_sampler(regex="ab")
    with pytest.raises(ValueError, match=r"^token 120 is not what the regex goes on with"):
        sampler.accept(ord("x"))
    assert sampler.sample(np.zeros(256, np.float32), 0) == ord("a")  # as if nothing had been
    with pytest.raises(ValueError, match=r"^history: token 120 at 1 is not what the regex"):
        byte_sampler(b"ax", regex="ab")
    with pytest.raises(ValueError, match=r"^forced_tokens: token 98 is not what the regex"):
        byte_sampler(regex="ab", forced_tokens=[98])
    banned = byte_sampler(regex="ab", banned_tokens=[ord("a")])
    with pytest.raises(NonFiniteLogits, match="every token is banned"):
        banned.sample(np.zeros(256, np.float32), 0)


@needs_llguidance
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
        ({"grammar": "no rule"}, "Expected token ':'"),
        ({"json_schema": {"type": "nonsense"}}, "Invalid type: nonsense"),
        ({"json_schema": {"$ref": "http://localhost/x"}}, "not present in a registry"),
    ],
)
def test_rules_that_are_none(fields, text, capfd):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: .*{text}") as caught:
        byte_sampler(**fields)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_llguidance
def test_spaces_in_json():
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2}
    byte_sampler(b"[1, 1]", json_schema=schema)
    with pytest.raises(ValueError, match=r"^history: token 49 at 3 is not what the json_schema"):
        byte_sampler(b"[1,1]", json_schema=schema)
    byte_sampler(b"[1,1]", json_schema={**schema, "x-guidance": {"item_separator": ","}})
    flexible = {"whitespace_flexible": True, "item_separator": ","}
    byte_sampler(b"[ 1\n,1\n", json_schema={**schema, "x-guidance": flexible})


@needs_llguidance
def test_a_tokenizer_of_another_size():
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model 300"):
        Sampler(Sampling(regex="a"), 300, tokenizer=load_tokenizer(256))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RWKVError, match=r"pip install 'rwkv-ggml\[grammar\]'"):
        byte_sampler(regex="never compiled before")
