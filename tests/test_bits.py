"""The contract on numbers: logits and state are the bits that ggml/README.md defines.

The oracle is `reference.canonical`, numpy without a line in common with the core. The models have
50 tokens and 160 rows of ffn, so that stripes of 16 rows are left incomplete, and 3 layers.
"""

import ctypes
import ctypes.util
import platform
from pathlib import Path

import numpy as np
import pytest
from models import file_weights, random_model, write_model
from reference import canonical, quants, rwkv_v4
from rwkv_cpp import RWKVModel, RWKVSequence

N_VOCAB = 50
FORMATS = [(version, name) for version in (100, 101) for name in quants.PLAIN] + [
    layout for layout in quants.LAYOUTS if layout[1] not in quants.PLAIN
]
QUANTIZED = [layout for layout in FORMATS if layout[1] not in quants.PLAIN]
MODES = [
    *[(version, name, "A16") for version, name in FORMATS[2:]],  # FP32 and FP16 in one version only
    *[(version, name, "int8") for version, name in QUANTIZED],
    *[(101, name, "bf16") for name in (*quants.PLAIN, "Q5_1")],
]
ACTIVATIONS = tuple(canonical.STEPS)
LEVELS = ("scalar", "sse2", "avx2", "avx512", "avx512bf16", "amx", "neon")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, N_VOCAB, 300)]


@pytest.fixture(scope="module")
def tensors():
    return random_model(5, N_VOCAB, n_embed=64, n_layer=3, n_ffn=160)


@pytest.fixture(scope="module")
def tiny_tensors():
    """RWKV-4a, with as many rows of tiny_q as leave a stripe incomplete."""
    return random_model(5, N_VOCAB, n_embed=96, n_layer=3, n_ffn=160, n_tiny=40, tiny_layer=1)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    differs = actual.ravel().view(np.int32) != expected.ravel().view(np.int32)
    assert not differs.any(), (
        f"{differs.sum()} of {differs.size} differ, by at most "
        f"{np.nanmax(np.abs(actual.ravel() - expected.ravel()))}"
    )


def evaluate(model, tokens, state=None):
    """(logits of every token, state)"""
    (result,) = model.eval_batch([RWKVSequence(tokens, state, n_logits=len(tokens))])
    return result.logits, result.state


@pytest.mark.parametrize(("version", "name"), FORMATS)
def test_core_equals_the_reference(tmp_path, tensors, version, name):
    path, tokens = tmp_path / "model.bin", TOKENS[:20]
    file = write_model(path, tensors, name, version)
    logits, state = canonical.forward(file, tokens)
    with RWKVModel(None, path, 2) as model:
        core_logits, core_state = evaluate(model, tokens)
        assert_same_bits(core_logits, logits)
        assert_same_bits(core_state, state.ravel())

        logits, state = canonical.forward(file, TOKENS[20:24], state)
        core_logits, core_state = evaluate(model, TOKENS[20:24], core_state)
        assert_same_bits(core_logits, logits)
        assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize(("version", "name"), QUANTIZED)
def test_8_bit_activations_equal_the_reference(tmp_path, tensors, version, name):
    path, tokens = tmp_path / "model.bin", TOKENS[:20]
    file = write_model(path, tensors, name, version, types={"head.weight": name})
    logits, state = canonical.forward(file, tokens, activations="int8")
    with RWKVModel(None, path, 2, activations="int8") as model:
        core_logits, core_state = evaluate(model, tokens)
    assert_same_bits(core_logits, logits)
    assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize("name", [*quants.PLAIN, "Q5_1"])
def test_bf16_equals_the_reference(tmp_path, tensors, name):
    path, tokens = tmp_path / "model.bin", TOKENS[:20]
    file = write_model(path, tensors, name, table_type="FP16")  # Q5_1: the head alone is bf16
    logits, state = canonical.forward(file, tokens, activations="bf16")
    assert (logits != canonical.forward(file, tokens)[0]).mean() > 0.9
    for mmap in (True, False):
        with RWKVModel(None, path, 2, mmap=mmap, activations="bf16") as model:
            core_logits, core_state = evaluate(model, tokens)
        assert_same_bits(core_logits, logits)
        assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (17, 33, 2, 70), (50, 100, 1, 31)])
@pytest.mark.parametrize("name", quants.PLAIN)
def test_bf16_in_odd_sizes(tmp_path, sizes, name):
    path = tmp_path / "model.bin"
    n_vocab, n_embed, n_layer, n_ffn = sizes
    file = write_model(path, random_model(6, n_vocab, n_embed, n_layer, n_ffn), name)
    tokens = [token % n_vocab for token in TOKENS[:40]]
    logits, state = canonical.forward(file, tokens, activations="bf16")
    with RWKVModel(None, path, 3, activations="bf16") as model:
        core_logits, core_state = evaluate(model, tokens)
    assert_same_bits(core_logits, logits)
    assert_same_bits(core_state, state.ravel())


def test_quantized_head_beside_bf16(tmp_path, tensors):
    path, tokens = tmp_path / "model.bin", TOKENS[:20]
    file = write_model(path, tensors, "FP16")
    file["head.weight"] = quants.Tensor.of(101, "Q8_0", file["head.weight"].values())
    logits, state = canonical.forward(file, tokens, activations="bf16")
    with RWKVModel(None, path, 2, activations="bf16", head="Q8_0") as model:
        core_logits, core_state = evaluate(model, tokens)
    assert_same_bits(core_logits, logits)
    assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize("name", sorted({name for _, name in QUANTIZED}))
@pytest.mark.parametrize("plain", quants.PLAIN)
def test_head_quantized_while_loading(tmp_path, tensors, plain, name):
    path = tmp_path / "model.bin"
    file = write_model(path, tensors, "Q5_1", table_type=plain)
    version = 101 if (101, name) in quants.LAYOUTS else 100
    file["head.weight"] = quants.Tensor.of(version, name, file["head.weight"].values())
    expected = canonical.forward(file, TOKENS[:20])
    for mmap in (True, False):
        with RWKVModel(None, path, 2, mmap=mmap, head=name) as model:
            logits, state = evaluate(model, TOKENS[:20])
        assert_same_bits(logits, expected[0])
        assert_same_bits(state, expected[1].ravel())


@pytest.mark.parametrize(
    ("version", "name"), [(101, "FP32"), (101, "FP16"), (100, "Q4_1_O"), (101, "Q5_1")]
)
def test_300_tokens(tmp_path, tensors, version, name):
    path = tmp_path / "model.bin"
    logits, state = canonical.forward(write_model(path, tensors, name, version), TOKENS)
    with RWKVModel(None, path, 2) as model:
        core_logits, core_state = evaluate(model, TOKENS)
        assert_same_bits(core_logits, logits)
        assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize("sizes", [(1, 32, 1, 32), (17, 96, 2, 32), (33, 32, 2, 352)])
@pytest.mark.parametrize(("version", "name"), [(101, "FP32"), (100, "Q4_3"), (101, "Q4_0")])
def test_odd_sizes(tmp_path, sizes, version, name):
    path = tmp_path / "model.bin"
    n_vocab, n_embed, n_layer, n_ffn = sizes
    file = write_model(path, random_model(6, n_vocab, n_embed, n_layer, n_ffn), name, version)
    tokens = [token % n_vocab for token in TOKENS[:7]]
    logits, state = canonical.forward(file, tokens)
    with RWKVModel(None, path, 3) as model:
        core_logits, core_state = evaluate(model, tokens)
    assert_same_bits(core_logits, logits)
    assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize("version", [100, 101])
def test_any_type_per_tensor_and_any_order(tmp_path, tensors, version):
    names = [*quants.PLAIN, *(name for v, name in quants.LAYOUTS if v == version)]
    matrices = [key for key, tensor in tensors.items() if tensor.ndim == 2]
    types = {key: names[i % len(names)] for i, key in enumerate(matrices)}
    assert types["emb.weight"] != types["head.weight"]
    order = list(np.random.default_rng(7).permutation(list(tensors)))
    path = tmp_path / "model.bin"
    file = write_model(path, tensors, "FP16", version, types=types, order=order)
    logits, state = canonical.forward(file, TOKENS[:20])
    with RWKVModel(None, path, 2) as model:
        core_logits, core_state = evaluate(model, TOKENS[:20])
    assert_same_bits(core_logits, logits)
    assert_same_bits(core_state, state.ravel())


@pytest.mark.parametrize(("version", "name", "activations"), MODES)
def test_every_way_gives_the_same_bits(tmp_path, tensors, monkeypatch, version, name, activations):
    """eval, eval_sequence, in chunks, in a batch; 1 to 3 threads; mapped or copied; every level."""
    path, tokens = tmp_path / "model.bin", TOKENS[:40]
    write_model(path, tensors, name, version)
    with RWKVModel(None, path, 1, activations=activations) as model:
        expected = evaluate(model, tokens)
    levels_run = set()
    for level in (None, *LEVELS):
        if level is None:
            monkeypatch.delenv("RWKV_ISA", raising=False)
        else:
            monkeypatch.setenv("RWKV_ISA", level)
        for threads, mmap in ((1, True), (2, False), (3, True)):
            try:
                model = RWKVModel(None, path, threads, mmap=mmap, activations=activations)
            except RuntimeError:
                break  # this CPU has no such level
            with model:
                check_all_ways(model, tokens, *expected)
            levels_run.add(level)
    assert {None, "scalar"} <= levels_run


@pytest.mark.parametrize("sparse_ffn", [False, True])
@pytest.mark.parametrize("name", ["FP32", "Q8_0"])
def test_tiny_attention_leaving_zeros_out(tmp_path, tiny_tensors, name, sparse_ffn):
    path = tmp_path / "model.bin"
    file = write_model(path, tiny_tensors, name)
    logits, state = canonical.forward(file, TOKENS[:40])
    with RWKVModel(None, path, 2, sparse_ffn=sparse_ffn) as model:
        check_all_ways(model, TOKENS[:40], logits, state)


@pytest.mark.parametrize(("version", "name", "activations"), MODES)
def test_tiny_attention(tmp_path, tiny_tensors, monkeypatch, version, name, activations):
    """RWKV-4a: the reference's bits in every format, on every level, every way."""
    path, tokens = tmp_path / "model.bin", TOKENS[:40]
    file = write_model(path, tiny_tensors, name, version)
    logits, state = canonical.forward(file, tokens, activations=activations)
    assert state.size == (5 * 3 + 40) * 96
    for level in LEVELS:
        monkeypatch.setenv("RWKV_ISA", level)
        for threads, mmap in ((1, True), (3, False)):
            try:
                model = RWKVModel(None, path, threads, mmap=mmap, activations=activations)
            except RuntimeError:
                break  # this CPU has no such level
            with model:
                check_all_ways(model, tokens, logits, state)


@pytest.mark.parametrize("n_tiny", [1, 16, 33, 100])
def test_tiny_attention_of_any_width_and_300_tokens(tmp_path, n_tiny):
    path = tmp_path / "model.bin"
    tensors = random_model(6, 17, n_embed=68, n_layer=2, n_tiny=n_tiny, tiny_layer=n_tiny % 2)
    tokens = [token % 17 for token in TOKENS]
    file = write_model(path, tensors)
    logits, state = canonical.forward(file, tokens)
    with RWKVModel(None, path, 2) as model:
        core_logits, core_state = evaluate(model, tokens[:270])
        assert_same_bits(core_logits, logits[:270])
        core_logits, core_state = evaluate(model, tokens[270:], core_state)
    assert_same_bits(core_logits, logits[270:])
    assert_same_bits(core_state, state)
    resumed = canonical.forward(file, tokens[270:], canonical.forward(file, tokens[:270])[1])
    assert_same_bits(resumed[1], state)


def test_tiny_attention_of_mixed_types(tmp_path, tiny_tensors):
    path, block = tmp_path / "model.bin", "blocks.1."
    types = {"tiny_q.weight": "Q8_0", "tiny_k.weight": "FP16", "tiny_v.weight": "Q5_1"}
    types = {block + key: name for key, name in types.items()} | {"emb.weight": "Q4_0"}
    file = write_model(path, tiny_tensors, "FP32", types=types)
    for activations in (*ACTIVATIONS, "bf16"):
        logits, state = canonical.forward(file, TOKENS[:20], activations=activations)
        with RWKVModel(None, path, 2, activations=activations) as model:
            core_logits, core_state = evaluate(model, TOKENS[:20])
        assert_same_bits(core_logits, logits)
        assert_same_bits(core_state, state)


@pytest.mark.parametrize(
    ("version", "name"), [(101, "FP32"), (101, "FP16"), (100, "Q8_0"), (101, "Q8_0")]
)
def test_leaving_zeros_out_changes_no_bits(tmp_path, tensors, monkeypatch, version, name):
    path, wide = tmp_path / "model.bin", tmp_path / "wide.bin"
    write_model(path, tensors, name, version)
    wide_tensors = random_model(5, N_VOCAB, n_embed=1088, n_layer=1, n_ffn=96)
    write_model(wide, wide_tensors, name, version)
    with RWKVModel(None, path, 1) as model, RWKVModel(None, wide, 1) as wide_model:
        expected, wide_expected = evaluate(model, TOKENS[:40]), evaluate(wide_model, TOKENS[:1])
    for level in LEVELS:
        monkeypatch.setenv("RWKV_ISA", level)
        for threads, mmap in ((1, True), (2, False), (3, True)):
            options = {"mmap": mmap, "sparse_ffn": True}
            try:
                model = RWKVModel(None, path, threads, **options)
            except RuntimeError:
                break  # this CPU has no such level
            with model, RWKVModel(None, wide, threads, **options) as wide_model:
                check_all_ways(model, TOKENS[:40], *expected)
                assert_same_bits(wide_model.eval(TOKENS[0], None)[0], wide_expected[0][0])


def check_all_ways(model, tokens, all_logits, last_state):
    state = None
    for token, expected in zip(tokens[:9], all_logits, strict=False):
        logits, state = model.eval(token, state)
        assert_same_bits(logits, expected)
    for last_logits, after in (
        model.eval_sequence(tokens, None),
        model.eval_sequence(tokens[9:], state),
        model.eval_sequence_in_chunks(tokens, None, chunk_size=7),
        model.eval_sequence_in_chunks(tokens, None, chunk_size=1000),
    ):
        assert_same_bits(last_logits, all_logits[-1])
        assert_same_bits(after, last_state)

    # A batch of sequences of many lengths, among them pieces that go on from another's end.
    ends = [1, 2, 15, 16, 17, 40]
    results = model.eval_batch(
        [RWKVSequence(tokens[:end], n_logits=i % end + 1) for i, end in enumerate(ends)]
    )
    for i, (end, result) in enumerate(zip(ends, results, strict=True)):
        assert_same_bits(result.logits, all_logits[end - i % end - 1 : end])
    results = model.eval_batch(
        [
            RWKVSequence(tokens[end:], result.state)
            for end, result in zip(ends, results, strict=True)
            if end < len(tokens)
        ]
    )
    for result in results:
        assert_same_bits(result.logits, all_logits[-1:])
        assert_same_bits(result.state, last_state)


@pytest.mark.parametrize("name", quants.PLAIN)
def test_close_to_float64(tmp_path, tensors, name):
    path = tmp_path / "model.bin"
    file = write_model(path, tensors, name)
    expected, _ = rwkv_v4.forward(file_weights(file), TOKENS)
    with RWKVModel(None, path, 2) as model:
        logits, _ = evaluate(model, TOKENS)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", quants.PLAIN)
def test_tiny_attention_is_close_to_float64(tmp_path, tiny_tensors, name):
    """300 tokens, each of which meets all before it in the float64 reference."""
    path = tmp_path / "model.bin"
    file = write_model(path, tiny_tensors, name)
    expected, state = rwkv_v4.forward(file_weights(file), TOKENS)
    without = {key: value for key, value in file_weights(file).items() if "tiny" not in key}
    plain, _ = rwkv_v4.forward(without, TOKENS)
    assert np.abs(plain - expected).max() > 0.5 * np.abs(expected).max()
    with RWKVModel(None, path, 2) as model:
        core_logits, core_state = evaluate(model, TOKENS)
    assert np.abs(core_logits - expected).max() <= 1e-5 * np.abs(expected).max()
    m = slice(5 * 3 * 96, None)
    assert np.abs(core_state[m] - state[m]).max() <= 1e-5 * np.abs(state[m]).max()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("version", "name"), QUANTIZED)
def test_error_of_a_quantized_row(tmp_path, tensors, version, name, activations):
    """Rows of the head against exact products: an activation is at most half a step d off, and the
    K/32 blocks are rounded a few times each."""
    path = tmp_path / "model.bin"
    file = write_model(path, tensors, "FP32", version, types={"head.weight": name})
    weights = file_weights(file)["head.weight"]
    with RWKVModel(None, path, 1, activations=activations) as model:
        sequences = [RWKVSequence([token], want_hidden=True) for token in TOKENS[:20]]
        for result in model.eval_batch(sequences):
            x = result.hidden.astype(np.float64)
            d = np.abs(x).reshape(-1, 32).max(axis=1) / canonical.STEPS[activations]
            step = (d / 2 * np.abs(weights).reshape(len(weights), -1, 32).sum(axis=2)).sum(axis=1)
            rounding = (len(x) / 32 + 8) * 2**-24 * np.abs(weights * x).sum(axis=1)
            error = np.abs(result.logits[0] - weights @ x)
            assert (error <= step + rounding).all()


def test_rounding_mode_of_the_caller_has_no_effect(tmp_path, tensors):
    modes = {  # upward, downward, to zero
        "x86_64": (0x800, 0x400, 0xC00),
        "aarch64": (0x400000, 0x800000, 0xC00000),
    }.get(platform.machine())
    libm = ctypes.util.find_library("m")
    if modes is None or libm is None:
        pytest.skip("fesetround is not known here")
    libm = ctypes.CDLL(libm)
    path, target = tmp_path / "model.bin", tmp_path / "quantized.bin"
    write_model(path, tensors, "FP32")
    library = RWKVModel(None, path, 1)._library
    library.rwkv_quantize_file(path, target, "Q4_1")
    file = target.read_bytes()
    for source in (path, target):
        for threads in (1, 2):
            with RWKVModel(None, source, threads) as model:
                expected = evaluate(model, TOKENS[:40])
                for mode in modes:
                    before = libm.fegetround()
                    libm.fesetround(mode)
                    try:
                        logits, state = model.eval(TOKENS[0], None)
                        results = evaluate(model, TOKENS[1:40], state)  # in another thread
                        library.rwkv_quantize_model_file(path, target.with_suffix(".2"), "Q4_1")
                        assert libm.fegetround() == mode
                    finally:
                        libm.fesetround(before)
                    assert_same_bits(logits, expected[0][0])
                    assert_same_bits(results[0], expected[0][1:])
                    assert_same_bits(results[1], expected[1])
                    assert Path(target.with_suffix(".2")).read_bytes() == file
