"""lora.py and what is built on it: LoRAs beside a model in RWKV, states, caches and commands."""

import copy
import pickle
import shutil

import numpy as np
import pytest
from commands import rwkv
from models import random_model, write_model
from rwkv_cpp import RWKV, ForeignState, PrefixCache, RWKVFileError, RWKVModel, RWKVSequence
from test_adapter import save

SIZES = {"n_vocab": 256, "n_embed": 64, "n_layer": 2}
MODEL = random_model(7, **SIZES)


def random_lora(seed, rank=4, parts=("key", "value", "receptance"), vectors=("time_mix", "ln1")):
    random = np.random.default_rng(seed)
    tensors = {}
    for name, values in MODEL.items():
        if any(f".{part}." in name for part in parts):
            module, (rows, cols) = name.removesuffix(".weight"), values.shape
            tensors[f"{module}.lora_A"] = random.standard_normal((rank, cols)) / 4
            tensors[f"{module}.lora_B"] = random.standard_normal((rows, rank)) / 4
        elif any(part in name for part in vectors):
            tensors[name] = values + random.standard_normal(values.shape) / 8
    return {name: values.astype(np.float32) for name, values in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_model(folder / "model.bin", MODEL, "Q5_1")
    write_model(folder / "other.bin", random_model(8, **SIZES), "Q5_1")
    for number, name in enumerate(("poems", "news")):
        save(folder / f"{name}.safetensors", random_lora(number))
    return folder


@pytest.fixture
def poems(folder):
    return [(folder / "poems.safetensors", 8.0)]


@pytest.fixture
def news(folder):
    return [(folder / "news.safetensors", 8.0)]


@pytest.fixture
def model(folder):
    with RWKV(folder / "model.bin", n_threads=2) as model:
        yield model


def logits_of(model, text):
    return model.read(text).logits


# ---- RWKV ----


def test_loading_and_swapping_are_the_same(folder, model, poems, news):
    plain = logits_of(model, "to be")
    with RWKV(folder / "model.bin", lora=poems) as loaded, model.with_lora(poems) as swapped:
        expected = logits_of(loaded, "to be")
        assert not np.array_equal(plain, expected)
        assert np.array_equal(logits_of(swapped, "to be"), expected)
        assert np.array_equal(logits_of(model, "to be"), plain)
        assert swapped.lora == loaded.lora == tuple(poems)
        assert model.lora == ()
        assert (swapped.family, swapped.exact) == (loaded.family, loaded.exact)
        with swapped.with_lora(news) as again, again.with_lora([]) as bare:
            assert not np.array_equal(logits_of(again, "to be"), expected)
            assert np.array_equal(logits_of(bare, "to be"), plain)
            assert (bare.family, bare.cache_key) == (model.family, model.cache_key)
        assert np.array_equal(logits_of(swapped, "to be"), expected)


@pytest.mark.filterwarnings("ignore:.*replaces what a LoRA")
def test_one_per_sequence(model, poems, news):
    options = {"max_tokens": 12, "seed": 3}
    with model.with_lora(poems) as first, model.with_lora(news + poems) as second:
        models = [model, first, second, first]
        prompts = ["to be", "or", "not", "to be, that is"]
        expected = [
            each.generate(prompt, **options) for each, prompt in zip(models, prompts, strict=True)
        ]
        for evaluating in (model, first):
            together = evaluating.generate(prompts, models=models, **options)
            for one, alone in zip(together, expected, strict=True):
                assert (one.tokens, one.state) == (alone.tokens, alone.state)
        assert expected[1].state.family == first.family != model.family
        beams = {"max_tokens": 4, "num_beams": 3}
        (alone,) = first.generate(["to"], **beams)
        assert model.generate(["to"], models=[first], **beams)[0].tokens == alone.tokens
        with pytest.raises(ValueError, match="models: expected 2, one a prompt, found 1"):
            model.generate(["a", "b"], models=[first])
    with pytest.raises(RuntimeError, match="closed"):
        model.generate(["a"], models=[first])


def test_a_lora_of_another_model_in_memory(folder, model, poems):
    with (
        RWKV(folder / "model.bin", lora=poems) as same_file,
        pytest.raises(ValueError, match="adapter was made for another model"),
    ):
        model.generate(["a"], models=[same_file])
    other = folder / "other.bin"
    shutil.copy(folder / "model.bin", other)
    with RWKV(other) as plain, pytest.raises(ValueError, match=r"models\[0\].*with_lora"):
        model.generate(["a"], models=[plain])


def test_states_belong_to_their_loras(folder, tmp_path, model, poems, news):
    with model.with_lora(poems) as first, model.with_lora(news) as second:
        state, plain = first.read("to be"), model.read("to be")
        for other, foreign in ((second, state), (model, state), (first, plain)):
            with pytest.raises(ForeignState, match="other LoRAs make another one"):
                other.read(" or", foreign)
        expected = first.read(" or", state)
        state.save(tmp_path / "state.safetensors")
    with RWKV(folder / "model.bin", lora=poems) as again:
        loaded = type(state).load(tmp_path / "state.safetensors", again)
        assert again.read(" or", loaded) == expected
        assert copy.copy(expected).adapter is expected.adapter
    stronger = [(path, 2 * alpha) for path, alpha in poems]
    with model.with_lora(stronger) as other, pytest.raises(ForeignState):
        other.read(" or", state)


def test_prefix_cache(folder, poems):
    cache = PrefixCache()
    with RWKV(folder / "model.bin", prefix_cache=cache) as model, model.with_lora(poems) as tuned:
        plain = model.read("to be or not")
        assert tuned.generate("to be or not", max_tokens=1).timings.cached_tokens == 0
        warm = tuned.generate("to be or not", max_tokens=5, seed=1)
        assert warm.timings.cached_tokens > 0
        assert model.read("to be or not") == plain
    with RWKV(folder / "model.bin", lora=poems) as cold:
        assert cold.generate("to be or not", max_tokens=5, seed=1).tokens == warm.tokens


def test_pickle_and_repr(folder, model, poems):
    with model.with_lora(poems) as tuned:
        assert repr(tuned) == "<RWKV model.bin: 2 layers of 64, poems.safetensors alpha 8>"
        with pickle.loads(pickle.dumps(tuned)) as other:
            assert other.family == tuned.family
            assert np.array_equal(logits_of(other, "to"), logits_of(tuned, "to"))
        assert repr(tuned.adapter).endswith(": poems.safetensors alpha 8>")
        with pytest.raises(TypeError, match="make it again"):
            pickle.dumps(tuned.adapter)


# ---- RWKVModel ----


def test_freed_adapter(folder, poems):
    with RWKVModel(None, folder / "model.bin") as model:
        adapter = model.adapter(poems)
        clone = model.clone()
        expected, _ = model.eval(1, None, adapter=adapter)
        assert np.array_equal(clone.eval(1, None, adapter=adapter)[0], expected)
        adapter.free()
        adapter.free()
        state = np.zeros(model.n_state, np.float32)
        for call in (
            lambda: model.eval(1, None, state, adapter=adapter),
            lambda: model.eval_sequence([1, 2], None, state, adapter=adapter),
            lambda: model.eval_batch([RWKVSequence([1], None, state, adapter=adapter)]),
        ):
            with pytest.raises(RuntimeError, match="adapter is closed"):
                call()
        assert not state.any()
        with (
            model.adapter(poems) as adapter,
            RWKVModel(None, folder / "other.bin") as other,
            pytest.raises(ValueError, match="sequence 0: its adapter was made for another"),
        ):
            other.eval(1, None, adapter=adapter)
        clone.free()
    with pytest.raises(RuntimeError, match="model is closed"):
        model.adapter(poems)


def changed(tensors, **changes):
    """With tensors in place of those of the last part of their names; None: without it."""
    result = dict(tensors)
    for last, values in changes.items():
        name = f"blocks.0.att.key.{last}"
        result.pop(name, None)
        if values is not None:
            result[name] = values
    return result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_A": np.zeros((4, 63), np.float32)}, "expected rank x 64 and 64 x rank"),
        ({"lora_A": np.zeros((5, 64), np.float32)}, "expected rank x 64 and 64 x rank"),
        (
            {
                "lora_A": np.zeros((0, 64), np.float32),
                "lora_B": np.zeros((64, 0), np.float32),
            },
            "'blocks.0.att.key.lora_A' is 0 x 64",
        ),
        ({"lora_B": None}, "'blocks.0.att.key.lora_A' is without its lora_B"),
        ({"lora_A": np.full((4, 64), np.nan, np.float32)}, "256 of 256 values are NaN or infinite"),
        ({"weight": np.zeros((64, 64), np.float32)}, "replaces the matrix .* merge the LoRA"),
        ({"unknown": np.zeros(64, np.float32)}, "the model has no tensors for blocks.0.att.key.un"),
    ],
)
def test_misfits(folder, tmp_path, changes, message):
    path = save(tmp_path / "wrong.safetensors", changed(random_lora(1), **changes))
    with RWKVModel(None, folder / "model.bin") as model:
        with pytest.raises(RWKVFileError, match=message):
            model.adapter([(path, 8)])
        if "unknown" in changes:
            model.adapter([(path, 8)], ignore_unused=True).free()


def test_wrong_numbers(folder, tmp_path, model, poems):
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is"):
            model.with_lora([(poems[0][0], alpha)])
    with pytest.raises(ValueError, match=r"scale\[0\] is inf"):
        model.with_lora([(poems[0][0], 1e300)])
    with pytest.raises(FileNotFoundError):
        model.with_lora([(tmp_path / "none.pth", 8)])
    with pytest.raises(RWKVFileError):
        model.with_lora([(folder / "model.bin", 8)])
    embedding = {
        "emb.lora_A": np.ones((1, 64), np.float32),
        "emb.lora_B": np.ones((256, 1), np.float32),
    }
    path = save(tmp_path / "emb.safetensors", embedding)
    with pytest.raises(ValueError, match="cannot change the embedding"):
        model.with_lora([(path, 8)])
    assert logits_of(model, "to be") is not None


# ---- commands ----


def test_commands(folder, tmp_path, model, poems):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question")
    lora = ("--lora", poems[0][0], "8")
    arguments = ("-m", folder / "model.bin", "--seed", "1", "--max-tokens", "8")
    with model.with_lora(poems) as tuned:
        expected = tuned.generate("to be", max_tokens=8, seed=1)
    plain = rwkv("generate", "to be", *arguments).stdout
    done = rwkv("generate", "to be", *arguments, *lora).stdout
    assert done != plain
    assert str(expected).strip() in done
    losses = [
        rwkv("perplexity", text, "-m", folder / "model.bin", "--json", *given).stdout
        for given in ((), lora)
    ]
    assert losses[0] != losses[1]
    wrong = rwkv("generate", "to be", *arguments, "--lora", tmp_path / "none.pth", "8")
    assert wrong.returncode == 1
    assert "none.pth" in wrong.stderr
    assert rwkv("generate", "to be", *arguments, "--lora", poems[0][0], "x").returncode == 2
