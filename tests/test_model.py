"""model.py: RWKVModel's arguments, threads, lifetime. What it computes is in test_bits.py."""

import copy
import gc
import os
import pickle
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import rwkv_cpp.model
from models import random_model, write_model
from reference import rwkv_v4
from rwkv_cpp import RWKVFileError, RWKVModel, RWKVSequence, load_rwkv_shared_library

N_VOCAB, N_EMBED, N_LAYER = 50, 32, 2
N_STATE = N_LAYER * 5 * N_EMBED


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.bin"
    write_model(path, random_model(1, N_VOCAB, N_EMBED, N_LAYER), "Q5_1")
    return path


@pytest.fixture
def model(path):
    with RWKVModel(None, path, 1) as model:
        yield model


@pytest.fixture
def state(model):
    return model.eval(7, None)[1]


# ---- the plain way ----


def test_sizes(model):
    assert model.n_vocab == N_VOCAB
    assert model.n_embed == N_EMBED
    assert model.n_layer == N_LAYER
    assert model.n_state == N_STATE


def test_library_and_path_may_have_any_type(path, tmp_path):
    for given in (str(path), os.fsencode(path), path):
        with RWKVModel(load_rwkv_shared_library(), given, 1) as model:
            assert model.n_vocab == N_VOCAB


def test_no_state_is_the_initial_state(model):
    state = model.init_state()
    assert state.shape == (N_STATE,)
    assert state.dtype == np.float32
    for a, b in zip(model.eval(3, None), model.eval(3, state), strict=True):
        assert np.array_equal(a, b)


def test_inputs_are_not_changed_and_outputs_are_new(model, state):
    before = state.copy()
    logits, after = model.eval(3, state)
    assert np.array_equal(state, before)
    assert not np.array_equal(after, before)
    assert logits.shape == (N_VOCAB,)
    assert logits.dtype == after.dtype == np.float32


def test_given_outputs_are_filled_and_returned(model, state):
    logits, after = model.eval(3, state)
    state_out, logits_out = np.empty(N_STATE, np.float32), np.empty(N_VOCAB, np.float32)
    result = model.eval(3, state, state_out, logits_out)
    assert result[0] is logits_out
    assert result[1] is state_out
    assert np.array_equal(logits_out, logits)
    assert np.array_equal(state_out, after)
    model.eval(3, state, state)  # in place
    assert np.array_equal(state, after)


def test_batch_results(model, state):
    hidden_wanted = RWKVSequence([1, 2, 3], state, n_logits=2, want_hidden=True)
    nothing_wanted = RWKVSequence([4], n_logits=0)
    logits_out, state_out = np.empty((3, N_VOCAB), np.float32), np.empty(N_STATE, np.float32)
    given = RWKVSequence([5, 6, 7], None, state_out, logits_out, n_logits=3)
    first, second, third = model.eval_batch([hidden_wanted, nothing_wanted, given])
    assert first.logits.shape == (2, N_VOCAB)
    assert first.hidden.shape == (N_EMBED,)
    assert second.logits is None
    assert second.hidden is None
    assert second.state.shape == (N_STATE,)
    assert third.logits is logits_out
    assert third.state is state_out
    assert np.array_equal(first.logits[1], model.eval_sequence([1, 2, 3], state)[0])
    assert np.array_equal(logits_out[0], model.eval(5, None)[0])
    assert model.eval_batch([]) == []


# ---- importances ----


class Recording(dict):
    """Weights for the reference, whose matrices add up the squares of what they multiply."""

    class Matrix(np.ndarray):
        squares: np.ndarray

        def __matmul__(self, x):
            self.squares += np.asarray(x) ** 2
            return np.asarray(self) @ x

    def __init__(self, tensors, names):
        super().__init__({key: values.astype(np.float64) for key, values in tensors.items()})
        for name in names:
            self[name] = self[name].view(self.Matrix)
            self[name].squares = np.zeros(self[name].shape[1])


@pytest.mark.parametrize("n_tiny", [0, 7])
def test_importances_are_those_of_the_reference(tmp_path, n_tiny):
    tensors = random_model(3, N_VOCAB, N_EMBED, N_LAYER, n_tiny=n_tiny)
    write_model(tmp_path / "model.bin", tensors)
    texts = [list(np.random.default_rng(n).integers(0, N_VOCAB, n)) for n in (1, 300, 40)]
    with RWKVModel(None, tmp_path / "model.bin", 2) as model:
        importances = model.importances()
        model.eval_batch([RWKVSequence(text, n_logits=0) for text in texts], importances)
    matrices = {key for key, values in tensors.items() if values.ndim == 2} - {"emb.weight"}
    assert set(importances.squares) == matrices
    assert importances.n_tokens == 341
    recording = Recording(tensors, matrices)
    for text in texts:
        rwkv_v4.forward(recording, text)
    for name, squares in importances.squares.items():
        np.testing.assert_allclose(squares, recording[name].squares, rtol=1e-3, err_msg=name)
        np.testing.assert_array_equal(importances.means()[name], squares / 341)


@pytest.mark.parametrize("options", [{}, {"sparse_ffn": True}, {"head": "Q4_0"}])
def test_importances_do_not_depend_on_grouping(tmp_path, options):
    """Nor on threads, nor on whose logits are asked for; and what is evaluated stays the same."""
    write_model(tmp_path / "model.bin", random_model(4, N_VOCAB, N_EMBED, N_LAYER), "Q8_0")
    tokens = np.random.default_rng(5).integers(0, N_VOCAB, 600)
    found = []
    for n_threads, step, n_logits in ((1, 600, 0), (3, 600, 600), (2, 1, 1), (3, 123, 2)):
        with RWKVModel(None, tmp_path / "model.bin", n_threads, **options) as model:
            importances, state = model.importances(), None
            for first in range(0, 600, step):
                piece = tokens[first : first + step]
                sequence = RWKVSequence(piece, state, n_logits=n_logits)
                (plain,) = model.eval_batch([sequence])
                (result,) = model.eval_batch([sequence], importances)
                np.testing.assert_array_equal(result.state, plain.state)
                if n_logits:
                    np.testing.assert_array_equal(result.logits, plain.logits)
                state = result.state
            found.append(importances.flat)
    for squares in found[1:]:
        np.testing.assert_array_equal(squares, found[0])


def test_importances_of_what_fails(model, tmp_path):
    importances = model.importances()
    with pytest.raises(ValueError, match="no token has been evaluated"):
        importances.means()
    model.eval_batch([], importances)
    model.eval_batch([RWKVSequence([1, 2])], importances)
    before = importances.flat.copy()
    state = np.zeros(N_STATE, np.float32)
    with pytest.raises(ValueError, match="overlap"):
        model.eval_batch([RWKVSequence([1], state_out=state)] * 2, importances)
    same = random_model(1, N_VOCAB, N_EMBED, N_LAYER)
    for tensors in (random_model(1, N_VOCAB, 64, N_LAYER), dict(reversed(same.items()))):
        write_model(tmp_path / "other.bin", tensors)
        with (
            RWKVModel(None, tmp_path / "other.bin", 1) as other,
            pytest.raises(ValueError, match="another model"),
        ):
            other.eval_batch([RWKVSequence([1])], importances)
    np.testing.assert_array_equal(importances.flat, before)
    assert importances.n_tokens == 2


# ---- adapters ----


def test_what_is_no_adapter(model):
    words = "adapter must be an RWKVAdapter, not str"
    with pytest.raises(TypeError, match=words):
        model.eval(1, None, adapter="poems.pth")
    with pytest.raises(TypeError, match=words):
        model.eval_batch([RWKVSequence([1], adapter="poems.pth")])


# ---- P-01: closed ----


def test_closed_model(path):
    model = RWKVModel(None, path, 1)
    model.free()
    model.free()
    uses = [
        lambda: model.eval(1, None),
        lambda: model.eval_sequence([1], None),
        lambda: model.eval_sequence_in_chunks([1], None),
        lambda: model.eval_batch([]),
        lambda: model.eval_batch([RWKVSequence([1])]),
        lambda: model.init_state(),
        lambda: model.clone(),
        lambda: model.n_vocab,
        lambda: model.n_embed,
        lambda: model.n_layer,
        lambda: model.n_state,
        lambda: model.__enter__(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="model is closed"):
            use()
    with RWKVModel(None, path, 1) as model:
        pass
    with pytest.raises(RuntimeError, match="model is closed"):
        model.eval(1, None)


# ---- P-02 .. P-06: arrays ----


def floats(*shape):
    return np.zeros(shape, np.float32)


def read_only(n):
    array = floats(n)
    array.setflags(write=False)
    return array


BAD_STATES = [
    (ValueError, "shape", floats(N_STATE - 1)),
    (ValueError, "shape", floats(N_STATE + 1)),
    (ValueError, "shape", floats(0)),
    (ValueError, "shape", floats(1, N_STATE)),
    (ValueError, "shape", floats(N_LAYER, 5, N_EMBED)),
    (ValueError, "shape", floats()),
    (ValueError, "f8", floats(N_STATE).astype(np.float64)),
    (ValueError, "f2", floats(N_STATE).astype(np.float16)),
    (ValueError, "i4", floats(N_STATE).astype(np.int32)),
    (ValueError, ">f4|<f4", floats(N_STATE).astype(np.dtype(np.float32).newbyteorder())),
    (TypeError, "MaskedArray", np.ma.masked_array(floats(N_STATE))),
    (TypeError, "list", [0.0] * N_STATE),
    (TypeError, "str", "state"),
    (TypeError, "int", 0),
    (TypeError, "bytes", bytes(4 * N_STATE)),
]
BAD_OUTPUTS = [
    (ValueError, "contiguous", floats(2 * N_STATE)[::2]),
    (ValueError, "contiguous", floats(N_STATE)[::-1]),
    (ValueError, "contiguous", np.broadcast_to(np.float32(0), N_STATE)),
    (ValueError, "aligned", floats(N_STATE + 1).view(np.uint8)[1:-3].view(np.float32)),
    (ValueError, "read-only", read_only(N_STATE)),
    (ValueError, "read-only", np.frombuffer(bytes(4 * N_STATE), np.float32)),
]


@pytest.mark.parametrize(("kind", "text", "bad"), BAD_STATES)
def test_bad_state_in(model, kind, text, bad):
    for call in (
        lambda: model.eval(1, bad),
        lambda: model.eval_sequence([1], bad),
        lambda: model.eval_sequence_in_chunks([1], bad),
        lambda: model.eval_batch([RWKVSequence([2]), RWKVSequence([1], bad)]),
    ):
        with pytest.raises(kind, match=f"state_in.*({text})"):
            call()


@pytest.mark.parametrize(("kind", "text", "bad"), BAD_STATES + BAD_OUTPUTS)
def test_bad_outputs(model, state, kind, text, bad):
    logits = floats(N_VOCAB)
    before = copy.deepcopy(bad)
    for call in (
        lambda: model.eval(1, state, bad, logits),
        lambda: model.eval_sequence([1], state, bad, logits),
        lambda: model.eval_sequence_in_chunks([1], state, bad, logits),
        lambda: model.eval_batch([RWKVSequence([1], state, bad, logits[None])]),
    ):
        with pytest.raises(kind, match=f"state_out.*({text})"):
            call()
    with pytest.raises(kind, match="logits_out"):
        model.eval(1, state, None, bad)
    assert not logits.any()
    assert np.array_equal(bad, before)


def test_bad_batches(model):
    with pytest.raises(ValueError, match="logits_out"):
        model.eval_batch([RWKVSequence([1, 2], logits_out=floats(2, N_VOCAB), n_logits=1)])
    with pytest.raises(ValueError, match="n_logits"):
        model.eval_batch([RWKVSequence([1, 2], logits_out=floats(1, N_VOCAB), n_logits=0)])
    for n_logits in (3, -1):
        with pytest.raises(ValueError, match="n_logits"):
            model.eval_batch([RWKVSequence([1, 2], n_logits=n_logits)])


def test_strided_inputs_are_copied(model, state):
    expected = model.eval(3, state)
    unaligned = np.empty(4 * N_STATE + 1, np.uint8)[1:].view(np.float32)
    unaligned[:] = state
    for strided in (
        np.repeat(state, 2)[::2],
        np.ascontiguousarray(state[::-1])[::-1],
        np.tile(state[:, None], 3)[:, 1],
        unaligned,
    ):
        assert not (strided.flags.c_contiguous and strided.flags.aligned)
        for a, b in zip(model.eval(3, strided), expected, strict=True):
            assert np.array_equal(a, b)


def test_row_of_a_batch(model, state):
    """P-04: a contiguous row of a larger array is used where it lies."""
    expected = model.eval(3, state)
    states, logits = floats(4, N_STATE), floats(4, N_VOCAB)
    states[1] = state
    model.eval(3, states[1], states[2], logits[2])
    assert np.array_equal(states[1], state)
    assert np.array_equal(states[2], expected[1])
    assert np.array_equal(logits[2], expected[0])
    assert not states[[0, 3]].any()
    assert not logits[[0, 1, 3]].any()


def test_read_only_state_in(model, state):
    expected = model.eval(3, state)
    state.setflags(write=False)
    assert np.array_equal(model.eval(3, state)[0], expected[0])


def test_overlapping_arrays(model):
    """P-06: all alike, but a state may be written over itself."""
    memory = floats(3 * N_STATE)
    memory[:N_STATE] = model.eval(7, None)[1]
    before = memory.copy()
    state = memory[:N_STATE]
    shifted = memory[8 : N_STATE + 8]
    bad = [
        {"state_in": state, "state_out": shifted},
        {"state_in": shifted, "state_out": state},
        {"state_in": state, "logits_out": memory[N_STATE - 1 :][:N_VOCAB]},
        {"state_in": None, "state_out": state, "logits_out": memory[:N_VOCAB]},
    ]
    for arrays in bad:
        with pytest.raises(ValueError, match="overlap"):
            model.eval(1, **({"state_in": None} | arrays))
        with pytest.raises(ValueError, match="overlap"):
            model.eval_sequence([1, 2], **({"state_in": None} | arrays))
        arrays = {k: v[None] if k == "logits_out" else v for k, v in arrays.items()}
        with pytest.raises(ValueError, match="overlap"):
            model.eval_batch([RWKVSequence([1], **arrays)])
    shared = floats(N_STATE)
    with pytest.raises(ValueError, match="overlap"):
        model.eval_batch([RWKVSequence([1], None, shared), RWKVSequence([1], None, shared)])
    assert np.array_equal(memory, before)
    assert not shared.any()


# ---- P-07: torch ----


def test_tensors(model, state):
    torch = pytest.importorskip("torch")
    expected_logits, expected_state = model.eval(3, state)
    tensor = torch.from_numpy(state.copy())
    logits, after = model.eval(3, tensor)
    assert isinstance(logits, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    assert np.array_equal(logits.numpy(), expected_logits)
    assert np.array_equal(after.numpy(), expected_state)
    assert np.array_equal(tensor.numpy(), state)

    rows = torch.zeros(3, N_STATE)
    result = model.eval(3, tensor, rows[1])
    assert result[1].data_ptr() == rows[1].data_ptr()
    assert np.array_equal(rows[1].numpy(), expected_state)
    assert not rows[[0, 2]].any()

    assert isinstance(model.eval(3, None, use_numpy=False)[0], torch.Tensor)
    assert isinstance(model.eval_sequence(torch.tensor([1, 2]), None)[0], np.ndarray)
    parameter = torch.nn.Parameter(tensor)
    assert np.array_equal(model.eval(3, parameter)[1].numpy(), expected_state)
    (result,) = model.eval_batch([RWKVSequence([3], tensor)])
    assert np.array_equal(result.logits[0].numpy(), expected_logits)

    for bad in (
        tensor.double(),
        tensor.bfloat16(),
        tensor[:-1],
        tensor.to("meta"),
        tensor.to_sparse(),
    ):
        with pytest.raises(ValueError, match="state_in"):
            model.eval(3, bad)
    for bad in (torch.zeros(2 * N_STATE)[::2], parameter, torch.zeros(()).expand(N_STATE)):
        with pytest.raises(ValueError, match="state_out"):
            model.eval(3, tensor, bad)


def test_torch_is_not_imported(path):
    code = f"""
import sys
from rwkv_cpp import RWKVModel
with RWKVModel(None, {str(path)!r}, 1) as model:
    model.eval(1, None)
    try:
        model.eval(1, None, use_numpy=False)
    except ValueError as error:
        print(error)
print('torch' in sys.modules)
"""
    assert run(code).splitlines() == [
        "use_numpy=False asks for torch tensors: import torch first",
        "False",
    ]


# ---- P-08, P-09, P-11: numbers ----


@pytest.mark.parametrize("token", [True, np.True_, 3.0, np.float32(3), "3", None, b"3", [3], 3j])
def test_tokens_of_wrong_type(model, token):
    with pytest.raises(TypeError, match="token"):
        model.eval(token, None)
    with pytest.raises(TypeError, match=r"tokens\[1\]"):
        model.eval_sequence([1, token], None)


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**31, 2**32 + 5, 2**64, np.uint64(2**63)])
def test_tokens_out_of_range(model, token):
    with pytest.raises(ValueError, match=f"token must be 0 to 49, not {token}"):
        model.eval(token, None)
    with pytest.raises(ValueError, match=rf"tokens\[1\] must be 0 to 49, not {token}"):
        model.eval_sequence([1, token], None)


def test_tokens_of_many_types(model):
    expected = model.eval_sequence([1, 2, 3], None)
    for tokens in (
        (1, 2, 3),
        range(1, 4),
        iter([1, 2, 3]),
        np.array([1, 2, 3]),
        np.array([9, 1, 9, 2, 9, 3], np.uint16)[1::2],
        [np.int64(1), np.uint8(2), np.int16(3)],
        bytes([1, 2, 3]),
    ):
        assert np.array_equal(model.eval_sequence(tokens, None)[0], expected[0])
    assert np.array_equal(model.eval(np.int32(1), None)[0], model.eval(1, None)[0])


@pytest.mark.parametrize("tokens", [[], (), np.array([], np.int64), iter([])])
def test_no_tokens(model, tokens):
    with pytest.raises(ValueError, match="empty"):
        model.eval_sequence(tokens, None)


@pytest.mark.parametrize("tokens", [np.ones((2, 2), int), np.ones(2), "12", 5, None, np.array(5)])
def test_what_is_no_sequence_of_tokens(model, tokens):
    with pytest.raises(TypeError):
        model.eval_sequence(tokens, None)


def test_chunk_size(model):
    for chunk_size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size"):
            model.eval_sequence_in_chunks([1], None, chunk_size=chunk_size)


@pytest.mark.parametrize("count", [0, -1, 1025, 2**32 + 1])
def test_thread_count_out_of_range(path, model, count):
    with pytest.raises(ValueError, match="thread_count"):
        RWKVModel(None, path, count)
    with pytest.raises(ValueError, match="thread_count"):
        model.clone(count)


@pytest.mark.parametrize("count", ["4", 2.0, True])
def test_thread_count_of_wrong_type(path, count):
    with pytest.raises(TypeError, match="thread_count"):
        RWKVModel(None, path, count)


# ---- P-12: interpreter flags ----

MISUSE = """
import sys
import numpy as np
from rwkv_cpp import RWKVModel
model = RWKVModel(None, sys.argv[1], 1)
calls = [
    lambda: model.eval(50, None),
    lambda: model.eval(True, None),
    lambda: model.eval(1, np.zeros(3)),
    lambda: model.eval_sequence([], None),
    lambda: model.eval(1, None, np.zeros(5, np.float32)),
    lambda: RWKVModel(None, 'nothing.bin'),
    lambda: RWKVModel(None, sys.argv[1], 0),
]
print(model.eval_sequence([1, 2, 3], None)[0].tobytes().hex())
for call in calls:
    try:
        call()
    except Exception as error:
        print(repr(error))
model.free()
try:
    model.eval(1, None)
except Exception as error:
    print(repr(error))
"""


def run(code, *arguments, flags=()):
    """What a fresh interpreter prints; it must end well and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(rwkv_cpp.model.__file__).parents[1])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_checks_do_not_depend_on_flags(path):
    plain = run(MISUSE, path)
    assert len(plain.splitlines()) == 9
    for flags in (["-O"], ["-OO"], ["-W", "error", "-X", "dev"]):
        assert run(MISUSE, path, flags=flags) == plain


# ---- P-13: copies ----


def test_model_is_not_copied(model):
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="clone"):
            act(model)
    assert model.eval(1, None)


def test_clones_share_weights_and_outlive_each_other(path):
    model = RWKVModel(None, path, 1)
    expected = model.eval(3, None)[0]
    clone = model.clone(2)
    clone_of_clone = clone.clone()
    model.free()
    assert np.array_equal(clone.eval(3, None)[0], expected)
    clone.free()
    assert np.array_equal(clone_of_clone.eval(3, None)[0], expected)
    clone_of_clone.free()


# ---- P-14, P-16, P-17: threads ----


def long_sequence(model, seconds):
    """Tokens that take this long, roughly."""
    began = time.perf_counter()
    model.eval_sequence([1] * 2000, None)
    return [1, 2, 3, 4] * round(500 * seconds / (time.perf_counter() - began))


def start_evaluation(model, tokens, results):
    def work():
        try:
            results.append(model.eval_sequence(tokens, None))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not model._lock.locked() and thread.is_alive():
        time.sleep(0.001)
    return thread


def test_busy_model(model):
    tokens = long_sequence(model, 0.5)
    results = []
    thread = start_evaluation(model, tokens, results)
    refused = []
    while thread.is_alive():
        try:
            model.eval(1, None)
        except RuntimeError as error:
            refused.append(str(error))
    assert refused
    assert all(text.startswith("model is busy") for text in refused)
    assert np.array_equal(results[0][0], model.eval_sequence(tokens, None)[0])


def test_clones_in_threads(model):
    inputs = [[(7 * i + j) % N_VOCAB for j in range(20 + i)] for i in range(4)]
    expected = [model.eval_sequence(tokens, None)[0] for tokens in inputs]
    clones = [model.clone(i % 2 + 1) for i in range(4)]
    equal = []

    def work(clone, tokens, logits):
        equal.append(
            all(np.array_equal(clone.eval_sequence(tokens, None)[0], logits) for _ in range(50))
        )

    threads = [
        threading.Thread(target=work, args=each)
        for each in zip(clones, inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 4


def test_evaluation_releases_the_gil(model):
    tokens = long_sequence(model, 0.5)
    thread = start_evaluation(model, tokens, [])
    turns = 0
    while thread.is_alive():
        turns += 1
    assert turns > 1000


def test_free_waits_for_a_running_evaluation(path):
    with RWKVModel(None, path, 1) as other:
        tokens = long_sequence(other, 0.3)
        expected = other.eval_sequence(tokens, None)[0]
    model = RWKVModel(None, path, 1)
    results = []
    thread = start_evaluation(model, tokens, results)
    model.free()
    thread.join()
    assert np.array_equal(results[0][0], expected)
    with pytest.raises(RuntimeError, match="model is closed"):
        model.eval(1, None)


def signal_the_evaluation(model, number):
    """Send a signal to this process soon after the model has begun to evaluate."""

    def work():
        while not model._lock.locked():
            time.sleep(0.001)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT there")
def test_keyboard_interrupt_ends_a_long_prompt(model, state):
    tokens = long_sequence(model, 5)
    state_out, logits_out = state.copy(), floats(N_VOCAB)
    began = time.perf_counter()
    thread = signal_the_evaluation(model, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        model.eval_sequence(tokens, state_out, state_out, logits_out)
    assert time.perf_counter() - began < 2
    thread.join()
    assert np.array_equal(state_out, state)
    assert not logits_out.any()
    model.eval(1, state)  # and the model is free for the next


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGUSR1 there")
def test_free_in_a_signal_handler_during_an_evaluation(model):
    def handler(number, frame):
        model.free()

    tokens = long_sequence(model, 1)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        thread = signal_the_evaluation(model, signal.SIGUSR1)
        with pytest.raises(RuntimeError, match="model is busy"):
            model.eval_sequence(tokens, None)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    model.eval(1, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork(path):
    """P-15: a pool is made anew in the child."""
    code = """
import os, sys
from rwkv_cpp import RWKVModel
model = RWKVModel(None, sys.argv[1], 2)
expected = model.eval_sequence([1, 2, 3] * 10, None)[0].tobytes()
child = os.fork()
same = model.eval_sequence([1, 2, 3] * 10, None)[0].tobytes() == expected
if child == 0:
    os._exit(0 if same else 1)
print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code, path) == "True 0\n"


# ---- P-19, P-23: lifetime ----


def test_model_is_freed_with_its_last_reference(path):
    model = RWKVModel(None, path, 1)
    context = weakref.ref(model._context)
    del model
    gc.collect()
    assert context() is None


def test_failed_load_leaves_nothing(path):
    with pytest.raises(Exception, match="nothing"):
        RWKVModel(None, "nothing.bin")
    with pytest.raises(ValueError, match="activations"):
        RWKVModel(None, path, activations="A8")


def test_head_that_cannot_be_quantized(tmp_path):
    path, tensors = tmp_path / "model.bin", random_model(1, n_vocab=50, n_embed=48, n_layer=1)

    def refused(error, text, head="Q8_0"):
        with pytest.raises(error, match=text):
            RWKVModel(None, path, 1, head=head)

    write_model(path, tensors)
    refused(ValueError, r"model\.bin: tensor 'head\.weight': rows of 48 weights, but Q8_0 needs")
    tensors = random_model(1, n_vocab=50, n_embed=32, n_layer=1)
    write_model(path, tensors, types={"head.weight": "Q5_1"})
    refused(ValueError, "'head.weight' is Q5_1 already, head is Q8_0")
    refused(ValueError, "unknown format 'q8_0'", "q8_0")
    with RWKVModel(None, path, 1, head="Q5_1") as as_asked, RWKVModel(None, path, 1) as as_it_is:
        assert np.array_equal(as_asked.eval(1, None)[0], as_it_is.eval(1, None)[0])
    tensors["head.weight"][49, 3] = np.inf
    write_model(path, tensors)
    refused(RWKVFileError, r"'head.weight': weight \[49, 3\] is NaN or infinite \(load the head as")
    tensors["head.weight"][49, 3] = 3e38
    write_model(path, tensors)
    refused(RWKVFileError, r"row 49 are too large for Q8_0 \(load the head as it is")


def test_activations(tmp_path):
    path = tmp_path / "model.bin"
    write_model(path, random_model(1, n_vocab=50, n_embed=32, n_layer=1), "Q8_0")
    with RWKVModel(None, path, 1) as exact, RWKVModel(None, path, activations="int8") as fast:
        logits, _ = exact.eval(1, None)
        assert np.array_equal(exact.clone().eval(1, None)[0], logits)
        in_8_bits, _ = fast.eval(1, None)
        assert not np.array_equal(in_8_bits, logits)
        np.testing.assert_allclose(in_8_bits, logits, atol=0.1 * np.abs(logits).max())
        assert np.array_equal(fast.clone(2).eval(1, None)[0], in_8_bits)


@pytest.mark.parametrize("name", ["FP32", "FP16"])
def test_bf16(tmp_path, name):
    path = tmp_path / "model.bin"
    write_model(path, random_model(1, n_vocab=50, n_embed=32, n_layer=1), name)
    with RWKVModel(None, path, 1) as exact, RWKVModel(None, path, activations="bf16") as fast:
        logits, _ = exact.eval(1, None)
        rounded, _ = fast.eval(1, None)
        assert not np.array_equal(rounded, logits)
        np.testing.assert_allclose(rounded, logits, atol=0.03 * np.abs(logits).max())
        assert np.array_equal(fast.clone(2).eval(1, None)[0], rounded)
    options = {"activations": "bf16", "sparse_ffn": True}
    message = r"ffn\.value\.weight' is multiplied as BF16, sparse_ffn is"
    with pytest.raises(ValueError, match=message):
        RWKVModel(None, path, 1, **options)
    write_model(path, random_model(1, n_vocab=50, n_embed=32, n_layer=1), "Q8_0", table_type=name)
    with RWKVModel(None, path, 1, **options) as both, RWKVModel(None, path, 1) as exact:
        assert not np.array_equal(both.eval(1, None)[0], exact.eval(1, None)[0])
        assert np.array_equal(both.eval(1, None)[1], exact.eval(1, None)[1])


def test_models_that_zeros_cannot_be_left_out_of(tmp_path):
    path, tensors = tmp_path / "model.bin", random_model(1, n_vocab=50, n_embed=64, n_layer=2)

    def refused(error, text):
        with pytest.raises(error, match=text):
            RWKVModel(None, path, 1, sparse_ffn=True)

    write_model(path, tensors, types={"blocks.1.ffn.value.weight": "Q4_1"})
    refused(
        ValueError,
        r"'blocks\.1\.ffn\.value\.weight' is Q4_1, sparse_ffn is for FP32, FP16 and Q8_0",
    )
    with pytest.raises(ValueError, match="sparse_ffn is for FP32, FP16 and Q8_0"):
        load_rwkv_shared_library().rwkv_estimate(path, sparse_ffn=True)
    tensors["blocks.0.ffn.key.weight"][0, 0] = np.inf
    write_model(path, tensors, "FP16")
    RWKVModel(None, path, 1, sparse_ffn=True).free()
    for bad in (np.inf, np.nan):
        tensors["blocks.1.ffn.value.weight"][63, 5] = bad
        for name in ("FP16", "FP32"):
            write_model(path, tensors, name)
            refused(RWKVFileError, r"'blocks\.1\.ffn\.value\.weight': weight \[63, 5\] is NaN")
            RWKVModel(None, path, 1).free()


def test_exit_with_live_models(path):
    code = """
import sys, threading
from rwkv_cpp import RWKVModel
model = RWKVModel(None, sys.argv[1], 2)
cycle = [RWKVModel(None, sys.argv[1], 1)]
cycle.append(cycle)
model.eval_sequence([1] * 40, None)
def forever():
    clone = model.clone(1)
    while True:
        clone.eval_sequence([1] * 1000, None)
threading.Thread(target=forever, daemon=True).start()
print("done")
"""
    assert run(code, path) == "done\n"


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(action, times):
    """Bytes by which `times` calls grow the process, after it has settled.

    A leak goes on in each fifth of the calls; the kernel puts together a huge page only once.
    """
    for _ in range(max(times // 10, 20)):
        action()
    grown = []
    for _ in range(5):
        gc.collect()
        before = resident_bytes()
        for _ in range(times // 5):
            action()
        gc.collect()
        grown.append(resident_bytes() - before)
    return 5 * statistics.median(grown)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")


@needs_proc
@pytest.mark.parametrize("factor", [1, pytest.param(20, marks=pytest.mark.slow, id="20-slow")])
def test_memory_does_not_grow(path, model, factor):
    """P-23. A leak of one context, or of one state per call, would be far above the limit."""

    def load():
        with RWKVModel(None, path, 2) as other:
            other.eval(1, None)

    def fail():
        with pytest.raises(ValueError):
            model.eval(1, floats(3))

    state, logits = floats(N_STATE), floats(N_VOCAB)
    limit = 1 << 20  # the allocator's own noise
    assert growth(load, 300 * factor) < limit
    assert growth(lambda: model.clone().free(), 1000 * factor) < limit
    assert growth(lambda: model.eval(1, None), 3000 * factor) < limit
    assert growth(lambda: model.eval_sequence([1] * 20, None, state, logits), 300 * factor) < limit
    assert growth(fail, 1000 * factor) < limit


# ---- the embedded model ----


def test_missing_embedded_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rwkv_cpp.model, "EMBEDDED_MODEL", tmp_path / "none.bin")
    with pytest.raises(rwkv_cpp.RWKVFileError, match=r"none\.bin"):
        rwkv_cpp.model.embedded_model()
