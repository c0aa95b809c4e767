"""States as objects and as files (faults.md D-05, D-06)."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import struct
import warnings
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import random_model, write_model
from rwkv_cpp import ForeignState, RWKVFileError, RWKVModel, State, StateNotice
from rwkv_cpp.fingerprint import Fingerprint

FAMILY, EXACT, OTHER = "f" * 32, "e" * 32, "0" * 31 + "1"
FINGERPRINT = Fingerprint.known(FAMILY, EXACT)


@dataclasses.dataclass
class Model:
    n_vocab: int = 6
    n_layer: int = 2
    n_embed: int = 4
    n_state: int = 40
    fingerprint: Fingerprint = FINGERPRINT
    arithmetic: str = "A16"
    adapter: None = None


def make_state(seed: int = 0, **options) -> State:
    random = np.random.default_rng(seed)
    options = {
        "tokens": [3, 5, 0, 1],
        "n_layer": 2,
        "n_generated": 2,
        "fingerprint": FINGERPRINT,
        "arithmetic": "A16",
    } | options
    values, logits = random.normal(size=40), random.normal(size=6)
    return State(values.astype(np.float32), logits.astype(np.float32), **options)


def same(a: State, b: State) -> bool:
    """Everything, not only what == compares."""
    logits = [None if each.logits is None else each.logits.tobytes() for each in (a, b)]
    names = "tokens", "n_generated", "n_layer", "family", "exact", "arithmetic"
    return (
        a == b
        and logits[0] == logits[1]
        and all(getattr(a, name) == getattr(b, name) for name in names)
    )


# ---- the object ----


def test_what_it_holds():
    state = make_state()
    assert state.tokens == array("I", [3, 5, 0, 1])
    assert (state.family, state.exact) == (FAMILY, EXACT)
    assert state.nbytes == 40 * 4 + 6 * 4 + 4 * 4
    assert repr(state) == "<State of 40 values after 4 tokens, model ffffffff>"
    empty = State(np.zeros(10, np.float32), n_layer=1)
    assert (empty.logits, len(empty.tokens), empty.family, empty.exact) == (None, 0, None, None)
    assert repr(empty) == "<State of 10 values after 0 tokens, model unknown>"


def test_numpy_view():
    state = make_state()
    assert np.asarray(state) is state.values
    assert np.shares_memory(np.asarray(state), state.values)
    assert np.asarray(state, np.float64).dtype == np.float64
    copied = np.array(state)
    copied[0] = 99
    assert state.values[0] != 99


def test_arrays_become_its_own():
    values = np.zeros(10, np.float32)
    assert State(values, n_layer=1).values is values
    values.flags.writeable = False
    State(values, n_layer=1).values[0] = 1
    State(np.zeros((10, 2), np.float32)[:, 0], n_layer=1).values.data.cast("B")


@pytest.mark.parametrize("duplicate", [State.copy, copy.copy, copy.deepcopy])
def test_copies_share_nothing(duplicate):
    state = make_state()
    other = duplicate(state)
    assert same(state, other)
    other.values[0] += 1
    other.logits[0] += 1
    other.tokens.append(7)
    assert same(state, make_state())


def test_equality_is_of_bits_and_tokens():
    state = make_state()
    assert state == make_state()
    assert state != make_state(seed=1)
    assert state != make_state(tokens=[3, 5, 0, 2])
    other = state.copy()
    state.values[0], other.values[0] = 0.0, -0.0
    assert state != other
    assert state != 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(state)


def test_pickle():
    state = make_state()
    assert same(pickle.loads(pickle.dumps(state)), state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"values": np.zeros(40)}, "values must be native float32 .* not <f8"),
        ({"values": np.zeros((2, 20), np.float32)}, r"shape \(2, 20\)"),
        ({"values": np.zeros(40, ">f4")}, "native float32"),
        ({"values": [0.0] * 40}, "values must be a numpy array, not list"),
        ({"values": np.ma.zeros(40, np.float32)}, "not MaskedArray"),
        ({"values": np.zeros(41, np.float32)}, "values are 41, expected a multiple of 2 layers"),
        ({"logits": np.zeros(6)}, "logits must be native float32"),
        ({"n_layer": 0}, "n_layer must be 1 to"),
        ({"n_layer": True}, "n_layer must be an integer, not a bool"),
        ({"n_generated": 5}, "n_generated must be 0 to 4, not 5"),
        ({"tokens": [1, -1]}, r"tokens\[1\] must be 0 to"),
        ({"tokens": [1, 2**31]}, r"tokens\[1\] must be 0 to"),
        ({"tokens": ["1"]}, r"tokens\[0\] must be an integer, not str"),
        ({"tokens": [1.0]}, r"tokens\[0\] must be an integer, not float"),
        ({"tokens": [True]}, r"tokens\[0\] must be an integer, not a bool"),
    ],
)
def test_wrong_arguments(change, match):
    right = {
        "values": np.zeros(40, np.float32),
        "logits": np.zeros(6, np.float32),
        "tokens": [1, 2, 3, 4],
        "n_layer": 2,
    }
    with pytest.raises((ValueError, TypeError), match=match):
        State(**right | change)


# ---- whose it is ----


def test_a_state_for_its_own_model():
    state, model = make_state(), Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = state.for_model(model)
    assert same(mine, state)
    assert mine.values is not state.values
    assert mine.fingerprint is model.fingerprint


def test_another_format_of_the_model_costs_a_notice():
    state, model = make_state(), Model(fingerprint=Fingerprint.known(FAMILY, OTHER))
    with pytest.warns(StateNotice, match=f"another format.*{EXACT}.*{OTHER}") as caught:
        moved = state.for_model(model)
    assert caught[0].filename == __file__
    assert (moved.exact, moved.arithmetic) == (OTHER, None)
    assert moved == state
    assert (state.exact, state.arithmetic) == (EXACT, "A16")


def test_another_arithmetic_is_remembered():
    assert make_state().for_model(Model(arithmetic="int8")).arithmetic is None


def test_a_state_of_unknown_origin():
    state = make_state(fingerprint=None).for_model(Model())
    assert (state.exact, state.arithmetic) == (EXACT, None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fingerprint": Fingerprint.known(OTHER, OTHER)}, f"family {FAMILY}.* family {OTHER}"),
        ({"n_layer": 4}, "2 layers of 4 and 40 values, this model has 4 layers of 4 and 40 "),
        ({"n_state": 80}, "40 values, this model has 2 layers of 4 and 80 values"),
        ({"n_vocab": 7}, "of 6 tokens, this model has 7"),
        ({"n_vocab": 5}, "of 6 tokens, this model has 5"),
    ],
)
def test_a_state_of_another_model_is_refused(change, match, tmp_path):  # D-05
    model = dataclasses.replace(Model(), **change)
    with pytest.raises(ForeignState, match=match):
        make_state().for_model(model)
    make_state().save(tmp_path / "state")
    with pytest.raises(ForeignState, match=match):
        State.load(tmp_path / "state", model)


def test_tokens_that_a_model_does_not_have():
    state = State(np.zeros(40, np.float32), tokens=[6], n_layer=2)
    with pytest.raises(ForeignState, match="of 7 tokens, this model has 6"):
        state.for_model(Model())


# ---- files ----


def changed(state: State, metadata=None, arrays=None, seal: bool = True) -> bytes:
    """A file with something changed, under a right checksum; None removes it."""
    data = state.to_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "F64": "<f8", "BF16": "<u2"}
    own = {
        key: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for key, entry in header.items()
        if key != "__metadata__"
    }
    for key, value in (arrays or {}).items():
        kind, values = value or ("F32", None)
        own[key] = value and (kind, np.shape(values), np.asarray(values, kinds[kind]).tobytes())
    own = {key: value for key, value in own.items() if value}
    texts = {
        key: text
        for key, text in (header["__metadata__"] | (metadata or {})).items()
        if text is not None
    }
    if seal and "checksum" in texts:
        texts["checksum"] = "0" * 64
    new, end = {"__metadata__": texts}, 0
    for key, (kind, shape, values) in own.items():
        new[key] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(values)]}
        end += len(values)
    text = json.dumps(new).encode()
    data = struct.pack("<Q", len(text)) + text + b"".join(value[2] for value in own.values())
    if seal:
        data = data.replace(
            b"0" * 64, hashlib.blake2b(data, digest_size=32).hexdigest().encode(), 1
        )
    return data


@pytest.mark.parametrize(
    "state",
    [
        make_state(),
        make_state(fingerprint=None, arithmetic=None),
        make_state(tokens=[], n_generated=0),
        State(np.full(10, -1e30, np.float32), n_layer=1),  # D-06
    ],
)
def test_save_and_load(state, tmp_path):
    state.save(tmp_path / "state.safetensors")
    assert same(State.load(tmp_path / "state.safetensors"), state)
    assert same(State.load(os.fsencode(tmp_path / "state.safetensors")), state)
    assert os.listdir(tmp_path) == ["state.safetensors"]
    assert same(State.from_bytes(changed(state)), state)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=10, max_size=10),
    st.lists(st.integers(0, 2**31 - 1)),
)
def test_every_bit_is_kept(values, tokens):
    state = State(np.array(values, np.float32), tokens=tokens, n_layer=1)
    assert same(State.from_bytes(state.to_bytes()), state)
    if not any(abs(value) > 65504 for value in values):
        half = State.from_bytes(state.to_bytes("float16"))
        np.testing.assert_array_equal(half.values[:8], state.values[:8].astype(np.float16))
        np.testing.assert_array_equal(half.values[8:], state.values[8:])
    assert np.isfinite(State.from_bytes(state.to_bytes("float16")).values).all()


def test_half_precision():
    state = make_state()
    state.values[3] = 65505.0  # of ffn_xx, which stays as it is
    half = State.from_bytes(state.to_bytes("float16"))
    parts, rounded = (each.values.reshape(2, 5, 4) for each in (state, half))
    for kept in 0, 4:
        np.testing.assert_array_equal(rounded[:, kept], parts[:, kept])
    np.testing.assert_array_equal(
        rounded[:, 1:4], parts[:, 1:4].astype(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(half.logits, state.logits.astype(np.float16))
    assert half.arithmetic is None  # these are not the bits that the tokens give
    large = State(np.ones(50_000, np.float32), n_layer=1)
    assert len(large.to_bytes("float16")) < 0.61 * len(large.to_bytes())


def test_other_libraries_read_it(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    state = make_state()
    state.save(tmp_path / "state.safetensors")
    with safetensors.safe_open(tmp_path / "state.safetensors", "numpy") as file:
        metadata = file.metadata()
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["format"] == "rwkv-state"
    assert (metadata["family"], metadata["n_generated"]) == (FAMILY, "2")
    assert arrays["tokens"].tolist() == state.tokens.tolist()
    np.testing.assert_array_equal(arrays["logits"], state.logits)
    parts = state.values.reshape(2, 5, 4)
    for i, part in enumerate(("ffn_xx", "att_xx", "aa", "bb", "pp")):
        np.testing.assert_array_equal(arrays[part], parts[:, i])
    State(state.values, n_layer=2).save(tmp_path / "state.safetensors")
    with safetensors.safe_open(tmp_path / "state.safetensors", "numpy") as file:
        assert file.get_tensor("tokens").shape == (0,)


def test_every_damaged_byte_is_noticed():  # D-05
    data = State(np.ones(10, np.float32), np.ones(2, np.float32), [1], n_layer=1).to_bytes()
    for i in range(len(data)):
        for mask in 0x01, 0x20, 0x80, 0xFF:
            damaged = bytearray(data)
            damaged[i] ^= mask
            with pytest.raises(ValueError):
                State.from_bytes(bytes(damaged))


def test_every_truncation_is_noticed(tmp_path):  # D-05
    data = make_state().to_bytes()
    for length in range(len(data)):
        with pytest.raises(ValueError):
            State.from_bytes(data[:length])
    with pytest.raises(ValueError):
        State.from_bytes(data + b"\0")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "this is empty"),
        (b"no state", "this is of an unknown format"),
        (b"PK\x03\x04" + bytes(600), "this is a zip archive"),
        (struct.pack("<Q", 1 << 32) + b"{" + bytes(100), "4294967296 bytes|unknown format"),
        (struct.pack("<Q", 1 << 23) + b'{"', "header of 8388608 bytes"),
        (struct.pack("<Q", 2) + b"{}", "not of a state"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (changed(make_state(), {"format": "pt"}), "not of a state"),
        (changed(make_state(), {"format": None}), "not of a state"),
        (changed(make_state(), {"version": "2"}), "version '2' .* expected '1': a newer release"),
        (changed(make_state(), {"arch": "rwkv7"}), "a state of 'rwkv7', expected 'rwkv4'"),
        (changed(make_state(), {"checksum": None}), "checksum '' in the metadata"),
        (changed(make_state(), {"checksum": "1" * 64}, seal=False), "wrong checksum"),
        (changed(make_state(), {"n_generated": "-1"}), "n_generated '-1'"),
        (changed(make_state(), {"n_generated": "9"}), "n_generated must be 0 to 4"),
        (changed(make_state(), {"family": None}), "family '' in the metadata"),
        (changed(make_state(), {"exact": "x"}), "exact 'x'"),
        (changed(make_state(), arrays={"aa": None}), "missing or unknown arrays: aa"),
        (changed(make_state(), arrays={"xx": ("F32", [1])}), "missing or unknown arrays: xx"),
        (changed(make_state(), arrays={"aa": ("F32", np.ones((2, 5)))}), "aa: float32 of shape"),
        (changed(make_state(), arrays={"aa": ("F64", np.ones((2, 4)))}), "aa: float64"),
        (changed(make_state(), arrays={"aa": ("BF16", np.ones((2, 4)))}), "aa: uint16"),
        (changed(make_state(), arrays={"bb": ("F32", np.full((2, 4), np.nan))}), "bb: .* finite"),
        (changed(make_state(), arrays={"logits": ("F32", [np.inf])}), "logits: .* finite"),
        (changed(make_state(), arrays={"logits": ("F32", [[1.0]])}), "logits: "),
        (changed(make_state(), arrays={"pp": ("F32", [1.0])}), "of a state whose pp is"),
        (changed(make_state(), arrays={"tokens": ("F32", [1.0])}), "tokens: float32"),
        (changed(make_state(), arrays={"tokens": ("I32", [1, -1])}), "tokens: int32"),
        (changed(make_state(), arrays={"tokens": ("I32", [[1]])}), "tokens: int32"),
    ],
)
def test_files_that_are_refused(data, match, tmp_path):  # D-05
    path = tmp_path / "state.safetensors"
    path.write_bytes(data)
    with pytest.raises(RWKVFileError, match=match) as caught:
        State.load(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        State.load(tmp_path / "missing")
    with pytest.raises(RWKVFileError, match="not a regular file"):
        State.load(tmp_path)
    make_state().save(tmp_path / "state")
    monkeypatch.setattr("rwkv_cpp.state.MAX_FILE_BYTES", 100)
    with pytest.raises(RWKVFileError, match="a state has at most 100"):
        State.load(tmp_path / "state")


def test_what_is_not_saved(tmp_path):
    (tmp_path / "state").write_bytes(b"old")
    for name, index in ("values", 7), ("logits", 1):
        for bad in np.nan, np.inf:
            state = make_state()
            getattr(state, name)[index] = bad
            with pytest.raises(ValueError, match="holds NaN or infinities"):
                state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="choose float32 or float16"):
        make_state().save(tmp_path / "state", "bfloat16")
    assert (tmp_path / "state").read_bytes() == b"old"


# ---- with the core ----


def test_a_loaded_state_goes_on_with_the_same_bits(tmp_path):
    write_model(tmp_path / "model.bin", random_model(3, n_vocab=40, n_embed=32, n_layer=2))
    fingerprint = Fingerprint(tmp_path / "model.bin")
    with RWKVModel(None, tmp_path / "model.bin") as model:
        whole, _ = model.eval_sequence([1, 2, 3, 4, 5], None)
        logits, values = model.eval_sequence([1, 2, 3], None)
        State(values, logits, [1, 2, 3], n_layer=2, fingerprint=fingerprint).save(tmp_path / "s")
        state = State.load(tmp_path / "s")
        model.eval_sequence([4, 5], state.values, state.values, state.logits)
    assert state.logits.tobytes() == whole.tobytes()
    assert state.fingerprint == fingerprint


# ---- RWKV-4a ----


def make_4a_state(**options) -> State:
    """Of two layers and a tiny attention of three."""
    values = np.random.default_rng(1).normal(size=(2 * 5 + 3) * 4).astype(np.float32)
    return State(values, tokens=[3, 5], n_layer=2, n_embed=4, fingerprint=FINGERPRINT, **options)


def test_parts_of_a_state():
    state = make_4a_state()
    assert (state.layers.shape, state.tiny.shape) == ((2, 5, 4), (3, 4))
    assert np.array_equal(np.concatenate([state.layers.ravel(), state.tiny.ravel()]), state.values)
    assert np.shares_memory(state.layers, state.values)
    assert np.shares_memory(state.tiny, state.values)
    assert make_state().tiny.shape == (0, 4)
    for size in 36, 41, 0:
        with pytest.raises(ValueError, match=f"values are {size}, expected 2 layers x 5 x 4, and"):
            State(np.zeros(size, np.float32), n_layer=2, n_embed=4)


@pytest.mark.parametrize("duplicate", [State.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_have_the_tiny_attention(duplicate):
    state = make_4a_state(arithmetic="A16")
    assert same(duplicate(state), state)
    assert duplicate(state).n_embed == 4


def test_a_file_has_the_tiny_attention(tmp_path):
    state = make_4a_state(arithmetic="A16")
    state.save(tmp_path / "state")
    assert same(State.load(tmp_path / "state", Model(n_state=52)), state)
    half = State.from_bytes(state.to_bytes("float16"))
    assert np.array_equal(half.tiny, state.tiny.astype(np.float16).astype(np.float32))
    for model in Model(), Model(n_state=56):
        with pytest.raises(ForeignState, match="2 layers of 4 and 52 values, this model has 2"):
            State.load(tmp_path / "state", model)
    with pytest.raises(ForeignState, match="and 40 values, this model has 2 layers of 4 and 52"):
        make_state().for_model(Model(n_state=52))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arrays": {"tiny": None}}, "missing or unknown arrays: tiny"),
        ({"metadata": {"arch": "rwkv4"}}, "missing or unknown arrays: tiny"),
        ({"arrays": {"tiny": ("F32", np.ones((3, 5)))}}, r"tiny: float32 of shape \(3, 5\)"),
        ({"arrays": {"tiny": ("F32", np.ones(12))}}, r"tiny: float32 of shape \(12,\)"),
        ({"arrays": {"tiny": ("F32", np.full((3, 4), np.inf))}}, "tiny: .* finite"),
    ],
)
def test_files_of_4a_that_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        State.from_bytes(changed(make_4a_state(), **change))


def test_a_tuned_start_has_no_tiny_attention_yet():
    tuned = State(np.ones(40, np.float32), n_layer=2)
    start = tuned.for_model(Model(n_state=52))
    assert np.array_equal(start.values, np.pad(tuned.values, (0, 12)))
    assert tuned.values.size == 40
    for read in State(np.ones(40, np.float32), tokens=[1], n_layer=2), make_state():
        with pytest.raises(ForeignState, match="40 values, this model has 2 layers of 4 and 52"):
            read.for_model(Model(n_state=52))
