"""ChatRWKV's pip package: strategies, the state as a list, PIPELINE's rule, its README."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from models import random_model, write_model
from rwkv_cpp import RWKVModel, State, load_tokenizer
from rwkv_cpp.compat.rwkv.model import RWKV
from rwkv_cpp.compat.rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from rwkv_cpp.compat.rwkv.strategy import format_of
from rwkv_cpp.compat.rwkv.utils import PIPELINE, PIPELINE_ARGS
from seeds import (
    VOCABULARY,
    WORLD,
    block,
    checkpoint,
    home_with_vocabularies,
    needs_seeds,
    needs_vocabulary,
    run_example,
)

TOKENS = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rwkv") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2))
    return path


@pytest.fixture(scope="module")
def model(path):
    return RWKV(str(path), "cpu fp32")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# ---- strategies ----


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("cpu fp32", "FP32"),
        ("cpu bf16", "FP16"),
        ("cpu fp32i8", "Q8_0"),
        ("cpu fp16i4", "Q4_1"),
        ("cpu bf16i3 *3+", "Q4_0"),
        (" cpu  fp32 *4 -> cpu fp32i8 *2+ -> cpu fp32 ", "Q8_0"),
    ],
)
def test_strategy(strategy, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert format_of(strategy) == expected


@pytest.mark.parametrize(
    ("strategy", "expected", "devices"),
    [
        ("cuda fp16", "FP16", "cuda"),
        ("cuda:1 fp16i8 *20+ -> cuda:0 fp16 -> cpu fp32", "Q8_0", "cuda"),
        ("mps fp32 *2 -> dml fp16i4->cpu fp32", "Q4_1", "mps, dml"),
    ],
)
def test_strategy_of_other_devices_warns_once(strategy, expected, devices):
    with pytest.warns(UserWarning, match="strategy") as caught:
        assert format_of(strategy) == expected
    (warning,) = caught
    assert str(warning.message).endswith(f"all layers are on the CPU, none on {devices}")


@pytest.mark.parametrize(
    "strategy",
    ["", "cpu", "fp32", "cpu fp64", "cpu fp32i2", "cpu fp32 20", "cpu fp32 ->", "cuda:x fp16",
     "cpu fp32 *2 *3", "CPU fp32", "cpu fp32 *"],
)  # fmt: skip
def test_strategy_that_is_none(strategy, path):
    with pytest.raises(ValueError, match="expected 'cpu fp32' or the like"):
        RWKV(str(path), strategy)


def test_checkpoint_becomes_the_format_of_the_strategy(home, tmp_path):
    checkpoint(tmp_path / "model.pth", n_vocab=256)
    for strategy, name in (("cpu fp32", "FP32"), ("cpu fp16i8", "Q8_0")):
        made = RWKV(str(tmp_path / "model"), strategy).args.MODEL_NAME  # without its suffix
        assert made.startswith(str(home))
        assert made.endswith(f"-{name}.bin")


def test_refused(path):
    with pytest.raises(ValueError, match="rwkv convert"):
        RWKV(str(path), "cpu fp32", convert_and_save_and_exit="out.pth")


# ---- forward ----


def test_forward(model, path):
    with RWKVModel(None, path) as ours:
        expected, values = ours.eval_sequence(TOKENS, None)
    out, state = model.forward(TOKENS, None)
    assert np.array_equal(out, expected)
    assert [part.shape for part in state] == [(32,)] * 10
    layers = values.reshape(2, 5, 32)  # ffn_xx, att_xx, aa, bb, pp
    for i, part in enumerate(state):
        assert np.array_equal(part, layers[i // 5, (i % 5 + 1) % 5])
    assert (model.args.n_layer, model.args.n_embd, model.args.vocab_size) == (2, 32, 256)


def test_forward_goes_on_from_a_state_and_leaves_it_alone(model):
    whole, end = model.forward(TOKENS, None)
    _, state = model.forward(TOKENS[:2], None)
    before = copy.deepcopy(state)
    for given in (state, pickle.loads(pickle.dumps(state)), [np.array(part) for part in state]):
        out, after = model.forward(TOKENS[2:], given)
        assert np.array_equal(out, whole)
        assert all(map(np.array_equal, after, end))
    assert all(map(np.array_equal, state, before))


def test_full_output(model):
    rows, state = model.forward(TOKENS, None, full_output=True)
    assert rows.shape == (5, 256)
    for i, row in enumerate(rows):
        assert np.array_equal(row, model.forward(TOKENS[: i + 1], None)[0])
    out, _ = model.forward([1], state, full_output=True)
    assert out.shape == (256,)  # as there: one token is no sequence


def test_what_a_tensor_can(model):
    out, state = model.forward(TOKENS, None)
    for tensor in (out, *state):
        array = tensor.detach().float().cpu().numpy()
        assert type(array) is np.ndarray
        assert np.array_equal(array, tensor)
    twin = out.clone()
    twin[0] += 1
    assert twin[0] != out[0]


def test_torch_tensors_are_taken(model, pipeline):
    torch = pytest.importorskip("torch")
    whole, _ = model.forward(TOKENS, None)
    _, state = model.forward(TOKENS[:2], None)
    out, _ = model.forward(torch.tensor(TOKENS[2:]), [torch.tensor(part) for part in state])
    assert np.array_equal(out, whole)
    assert pipeline.sample_logits(torch.tensor(out), temperature=0) == out.argmax()


def test_wrong_calls(model):
    _, state = model.forward([1], None)
    with pytest.raises(ValueError, match="tokens is empty"):
        model.forward([], None)
    with pytest.raises(ValueError, match=r"tokens\[0\]"):
        model.forward([256], None)
    with pytest.raises(ValueError, match="state"):
        model.forward([1], state[:5])
    with pytest.raises(ValueError, match="state"):
        model.forward([1], [part[:16] for part in state])
    with pytest.raises(TypeError, match="arrays"):
        model.forward([1], np.float32(0))


# ---- PIPELINE ----


class Script:
    """A model whose logits are given: those of the same call are always the same."""

    def __init__(self, logits):
        self.logits = np.asarray(logits, np.float32)
        self.read = []

    def forward(self, tokens, state):
        self.read.append((list(tokens), state))
        return self.logits[(state or 0) % len(self.logits)].copy(), (state or 0) + 1


@pytest.fixture
def pipeline(model, monkeypatch):
    monkeypatch.setattr(
        "rwkv_cpp.compat.rwkv.utils._tokenizer", lambda model, path: load_tokenizer(256)
    )
    return PIPELINE(model, "bytes")


def test_generate_is_its_penalized_greedy_text(pipeline):
    """Against the rule written down plainly: digits and blanks are counted with 0 times."""
    random = np.random.default_rng(5)
    logits = random.standard_normal((7, 256)) / 4
    logits[:, list(b"abc 19\t")] += 3
    args = PIPELINE_ARGS(
        temperature=0, alpha_frequency=0.3, alpha_presence=0.4, alpha_decay=0.9,
        token_ban=[ord("b")],
    )  # fmt: skip
    pipeline.model = Script(logits)
    expected, counts = [], {}
    for i in range(60):
        row = logits[i % 7].astype(np.float32).astype(float)
        row[ord("b")] = -np.inf
        for token, count in counts.items():
            row[token] -= 0.4 + count * 0.3
        token = int(row.argmax())
        counts = {other: count * 0.9 for other, count in counts.items()}
        counts[token] = counts.get(token, 0) + (chr(token) not in " \t0123456789")
        expected.append(token)
    pieces = []
    text = pipeline.generate("Hi", 60, args, pieces.append)
    assert text == bytes(expected).decode(errors="replace") == "".join(pieces)
    assert pipeline.model.read[:2] == [([72, 105], None), ([expected[0]], 1)]
    assert len(pipeline.model.read) == 60
    assert set(text) >= set("ac 19")


def test_generate_ends_before_a_stop_token(pipeline):
    pipeline.model = Script(np.eye(256)[list("né.".encode())])
    args = PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0, token_stop=[ord(".")])
    pieces = []
    assert pipeline.generate("x", 99, args, pieces.append, state=4) == "né"
    assert pieces == ["n", "é"]  # no half character
    assert pipeline.model.read[0] == ([ord("x")], 4)


def test_generate_is_repeatable(pipeline):
    texts = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        texts.append(pipeline.generate("Hello", 20, PIPELINE_ARGS(top_p=1.0)))
    assert texts[0] == texts[1] != texts[2]


def test_sample_logits_keeps_what_the_rule_keeps(pipeline):
    """The likeliest tokens until they reach top_p, the first top_k of them; then p^(1/T)."""
    probabilities = np.array([0.1, 0.4, 0.2, 0.05, 0.25])
    logits = np.log(probabilities)
    for temperature, top_p, top_k, kept in [
        (1.0, 0.7, 0, [1, 2, 4]),
        (1.0, 0.7, 2, [1, 4]),
        (0.5, 0.99, 4, [0, 1, 2, 4]),
        (2.0, 1.0, 0, [0, 1, 2, 3, 4]),
    ]:
        np.random.seed(7)
        drawn = [pipeline.sample_logits(logits, temperature, top_p, top_k) for _ in range(3000)]
        found = np.bincount(drawn, minlength=5)
        expected = np.zeros(5)
        expected[kept] = probabilities[kept] ** (1 / temperature)
        expected *= 3000 / expected.sum()
        assert np.array_equal(np.flatnonzero(found), kept)
        assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < 20  # chi^2, 1 in 2000
    assert pipeline.sample_logits(logits, temperature=0) == 1
    assert pipeline.sample_logits(logits, top_p=0) == 1


def test_refine_context(pipeline):
    assert pipeline.refine_context("  a \r\n\n\u3000b\n \n") == "\na\nb"
    assert pipeline.refine_context(" ") == "\n"


def test_defaults_are_theirs():
    assert vars(PIPELINE_ARGS()) == {
        "temperature": 1.0, "top_p": 0.85, "top_k": 0, "alpha_frequency": 0.2,
        "alpha_presence": 0.2, "alpha_decay": 0.996, "token_ban": (), "token_stop": (),
        "chunk_len": 256,
    }  # fmt: skip


@needs_vocabulary
def test_published_vocabularies(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(home_with_vocabularies(tmp_path)))
    model = RWKV(str(checkpoint(tmp_path / "model.pth")), "cpu fp32")
    text = "In a shocking finding, 12  dragons"
    expected = load_tokenizer(50277).encode(text)
    for name in ("20B_tokenizer.json", VOCABULARY):  # found by its name, and as a path
        pipeline = PIPELINE(model, name)
        assert pipeline.encode(text) == expected
        assert pipeline.decode(expected) == text
    world = TRIE_TOKENIZER(WORLD)
    assert world.encode("日本 a") == PIPELINE(model, "rwkv_vocab_v20230424").encode("日本 a")
    assert world.decode(world.encodeBytes("né".encode())) == "né"
    assert world.decodeBytes(world.encode("né")) == "né".encode()


# ---- README ----


@needs_seeds
def test_readme(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "model.pth")
    out = run_example(
        block("rwkv", "from rwkv.model import RWKV"),
        {
            "from rwkv.model": "from rwkv_cpp.compat.rwkv.model",
            "/fsx/BlinkDL/HF-MODEL/rwkv-4-pile-1b5/RWKV-4-Pile-1B5-20220903-8040": str(
                path.with_suffix("")
            ),
        },
        tmp_path,
        before="import os",  # which the README takes for granted
    )
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    with pytest.warns(UserWarning, match="cuda"):
        file = RWKV(str(path), "cuda fp16").args.MODEL_NAME
    with RWKVModel(None, file) as ours:
        logits, _ = ours.eval_sequence([187, 510, 1563, 310, 247], None)
    assert out == f"{logits}\n{logits}\n"


def test_4a_is_refused(tmp_path):
    write_model(tmp_path / "a.bin", random_model(2, n_embed=32, n_layer=2, n_tiny=8))
    with pytest.raises(ValueError, match="ChatRWKV has no place for the tiny attention of RWKV-4a"):
        RWKV(str(tmp_path / "a.bin"), "cpu fp32")


def test_state_of_chatrwkv_is_a_state_of_ours(model):
    _, state = model.forward(TOKENS, None)
    assert np.array_equal(
        State.from_layout("ChatRWKV", state).export("rwkv.cpp"),
        model.model.eval_sequence(TOKENS, None)[1],
    )
