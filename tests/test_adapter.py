"""Adapters, LoRAs beside the weights: their bits, their error, and what is refused.

The oracle of the bits is `reference.canonical`, that of the error float64 over the merged model.
"""

import numpy as np
import pytest
from checkpoints import safetensors
from models import file_weights, random_model, write_model
from reference import canonical, lora, quants, rwkv_v4
from reference.quants import Tensor
from rwkv_cpp import RWKVModel, RWKVSequence
from test_bits import FORMATS, LEVELS, N_VOCAB, QUANTIZED, TOKENS, assert_same_bits, evaluate

SIZES = {
    "n_vocab": N_VOCAB,
    "n_embed": 64,
    "n_layer": 2,
    "n_ffn": 160,
    "n_tiny": 20,
    "tiny_layer": 1,
}
MODEL = random_model(5, **SIZES)
MATRICES = [name for name, values in MODEL.items() if values.ndim == 2 and name != "emb.weight"]
RANKS = (1, 4, 16, 19)


def random_lora(seed, names=MATRICES, vectors=True, ranks=RANKS):
    """Products for these matrices, of several ranks, and half of the vectors: float32."""
    random = np.random.default_rng(seed)
    tensors = {}
    for i, name in enumerate(names):
        (rows, cols), rank = MODEL[name].shape, ranks[i % len(ranks)]
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_A"] = random.standard_normal((rank, cols)) / np.sqrt(cols)
        tensors[f"{module}.lora_B"] = random.standard_normal((rows, rank)) / 4
    for name, values in MODEL.items():
        if vectors and values.ndim == 1 and random.integers(2):
            decay = "time_decay" in name
            tensors[name] = random.uniform(-6, 1, values.shape) if decay else values + 0.1
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def save(path, tensors):
    path.write_bytes(safetensors({name: ("F32", values) for name, values in tensors.items()}))
    return path


def adapted(file, loras):
    """A model for `canonical.forward`: as `file` has it, with LoRAs, each with its alpha."""
    model = dict(file)
    for name, weight in file.items():
        module, parts = name.removesuffix(".weight"), []
        for tensors, alpha in loras:
            if name in tensors:
                values = lora.in_file(name, tensors[name]).astype(np.float32)
                model[name] = Tensor.of(101, "FP32", values)
            if f"{module}.lora_A" in tensors:
                a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
                parts.append((a, b, alpha / len(a)))
        if parts:
            model[name] = canonical.Adapted.of_parts(weight, parts)
    return model


@pytest.fixture
def poems(tmp_path):
    tensors = random_lora(1)
    return tensors, save(tmp_path / "poems.safetensors", tensors)


@pytest.fixture
def news(tmp_path):
    tensors = random_lora(2, [name for name in MATRICES if "key" in name], ranks=(3,))
    return tensors, save(tmp_path / "news.safetensors", tensors)


def adapted_evaluate(model, tokens, adapter, state=None):
    sequence = RWKVSequence(tokens, state, n_logits=len(tokens), adapter=adapter)
    (result,) = model.eval_batch([sequence])
    return result.logits, result.state


pytestmark = pytest.mark.filterwarnings("ignore:.*replaces what a LoRA")

# ---- bits ----


@pytest.mark.parametrize(
    ("version", "name", "activations"),
    [(version, name, "A16") for version, name in FORMATS]
    + [(version, name, "int8") for version, name in QUANTIZED]
    + [(101, name, "bf16") for name in (*quants.PLAIN, "Q5_1")],
)
def test_core_equals_the_reference(tmp_path, poems, news, version, name, activations):
    path, tokens = tmp_path / "model.bin", TOKENS[:12]
    file = write_model(path, MODEL, name, version)
    loras = [(poems[0], 8.0), (news[0], -2.5)]
    expected = canonical.forward(adapted(file, loras), tokens, activations=activations)
    plain = canonical.forward(file, tokens, activations=activations)
    with RWKVModel(None, path, 2, activations=activations) as model:
        adapter = model.adapter([(poems[1], 8), (news[1], -2.5)])
        logits, state = adapted_evaluate(model, tokens, adapter)
        assert_same_bits(logits, expected[0])
        assert_same_bits(state, expected[1].ravel())
        assert_same_bits(evaluate(model, tokens)[0], plain[0])
        logits, state = adapted_evaluate(model, tokens, model.adapter([]))
        assert_same_bits(logits, plain[0])
        assert_same_bits(state, plain[1].ravel())


@pytest.mark.parametrize(
    ("version", "name", "options"),
    [
        (101, "FP32", {"sparse_ffn": True}),
        (101, "FP16", {"activations": "bf16"}),
        (100, "Q8_0", {"sparse_ffn": True}),
        (100, "Q4_1_O", {}),
        (101, "Q4_0", {"activations": "int8"}),
        (101, "Q5_1", {"head": None}),
    ],
)
def test_every_way_gives_the_same_bits(tmp_path, poems, news, monkeypatch, version, name, options):
    """Token by token, as a sequence, in batches of several adapters; 1 to 3 threads; each level."""
    path = tmp_path / "model.bin"
    file = write_model(path, MODEL, name, version)
    tokens = TOKENS[:40]
    activations = options.get("activations", "A16")
    chosen = ([], [(poems, 8.0)], [(news, 4.0)], [(news, 4.0), (poems, 8.0)])
    expected = [
        canonical.forward(
            adapted(file, [(each[0], alpha) for each, alpha in loras]),
            tokens,
            activations=activations,
        )
        for loras in chosen
    ]
    levels_run = set()
    for level in (None, *LEVELS):
        if level is None:
            monkeypatch.delenv("RWKV_ISA", raising=False)
        else:
            monkeypatch.setenv("RWKV_ISA", level)
        for threads in (1, 2, 3):
            try:
                model = RWKVModel(None, path, threads, **options)
            except RuntimeError:
                break  # this CPU has no such level
            with model:
                adapters = [
                    model.adapter([(each[1], alpha) for each, alpha in loras]) for loras in chosen
                ]
                check_all_ways(model, adapters, tokens, expected)
            levels_run.add(level)
    assert {None, "scalar"} <= levels_run


def check_all_ways(model, adapters, tokens, expected):
    for adapter, (logits, last_state) in zip(adapters, expected, strict=True):
        state = None
        for token, row in zip(tokens[:5], logits, strict=False):
            core, state = model.eval(token, state, state, adapter=adapter)
            assert_same_bits(core, row)
        core, state = model.eval_sequence(tokens[5:], state, adapter=adapter)
        assert_same_bits(core, logits[-1])
        assert_same_bits(state, last_state.ravel())
    ends = (1, 15, 16, 33, 40)
    pairs = [(end, i) for end in ends for i in range(len(adapters))]
    results = model.eval_batch(
        RWKVSequence(tokens[:end], n_logits=end, adapter=adapters[i]) for end, i in pairs
    )
    for (end, i), result in zip(pairs, results, strict=True):
        assert_same_bits(result.logits, expected[i][0][:end])


def test_300_tokens(tmp_path, poems):
    path = tmp_path / "model.bin"
    file = write_model(path, MODEL, "Q5_0")
    logits, state = canonical.forward(adapted(file, [(poems[0], 4.0)]), TOKENS)
    with RWKVModel(None, path, 2) as model, model.adapter([(poems[1], 4)]) as adapter:
        core_logits, core_state = adapted_evaluate(model, TOKENS, adapter)
    assert_same_bits(core_logits, logits)
    assert_same_bits(core_state, state.ravel())


# ---- error ----


@pytest.mark.parametrize("activations", ["A16", "int8"])
@pytest.mark.parametrize(("version", "name"), FORMATS)
def test_error_of_a_row(tmp_path, poems, version, name, activations):
    """Rows of the head against exact products (docs/lora.md, Accuracy)."""
    path, alpha = tmp_path / "model.bin", 8.0
    file = write_model(path, MODEL, "FP32", version, types={"head.weight": name})
    a, b = (poems[0][f"head.lora_{letter}"].astype(np.float64) for letter in "AB")
    rank, k = a.shape
    weights, delta = file_weights(file)["head.weight"], alpha / rank * b
    with RWKVModel(None, path, 1, activations=activations) as model:
        adapter = model.adapter([(poems[1], alpha)])
        sequences = [RWKVSequence([t], want_hidden=True, adapter=adapter) for t in TOKENS[:20]]
        for result in model.eval_batch(sequences):
            x = result.hidden.astype(np.float64)
            base = np.abs(weights) @ np.abs(x)
            product = np.abs(delta) @ (np.abs(a) @ np.abs(x))
            step, roundings = 0.0, k / 16 + 4
            if name not in quants.PLAIN:
                d = np.abs(x).reshape(-1, 32).max(axis=1) / canonical.STEPS[activations]
                blocks = np.abs(weights).reshape(len(weights), -1, 32).sum(axis=2)
                step, roundings = (d / 2 * blocks).sum(axis=1), k / 32 + 8
            bound = step + 2**-24 * (roundings * base + (k / 16 + 6) * product)
            bound += 2**-24 * rank * (base + product)
            error = np.abs(result.logits[0] - (weights @ x + delta @ (a @ x)))
            assert (error <= bound).all()


def test_close_to_the_merged_model(tmp_path, poems, news):
    path = tmp_path / "model.bin"
    write_model(path, MODEL, "FP32")
    merged, _ = lora.merge(MODEL, [(poems[0], 8.0), (news[0], -2.5)])
    expected, _ = rwkv_v4.forward(merged, TOKENS)
    with RWKVModel(None, path, 2) as model:
        adapter = model.adapter([(poems[1], 8), (news[1], -2.5)])
        logits, _ = adapted_evaluate(model, TOKENS, adapter)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
