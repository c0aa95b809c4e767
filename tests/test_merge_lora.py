"""merge_lora.py: merged files against a float64 reference; LoRAs that do not fit (faults.md L-)."""

import math
import os
import re
import sys
from pathlib import Path

import checkpoints as make
import numpy as np
import pytest
from commands import environment, run, rwkv
from models import random_model, read_model, write_model
from reference import lora as reference
from rwkv_cpp import RWKVFileError, RWKVModel
from rwkv_cpp.convert import convert
from rwkv_cpp.merge_lora import merge_lora

ROOT = Path(__file__).parents[1]
SIZES = {"n_vocab": 50, "n_embed": 32, "n_layer": 2, "n_ffn": 96}
MODEL = random_model(1, **SIZES)
MATRICES = [name for name in MODEL if re.search(r"\.(key|value|receptance)\.", name)]
KEY = "blocks.1.att.key"


def random_lora(
    seed: int, rank: int = 4, spelling: str = "", parts: tuple[str, ...] = ("ln", "time")
) -> dict[str, np.ndarray]:
    """What Blealtan's trainer saves of a model like MODEL: float32."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, values in MODEL.items():
        if name in MATRICES:
            rows, columns = values.shape
            module = name.removesuffix(".weight")
            tensors[f"{module}.lora_A{spelling}"] = random.standard_normal((rank, columns)) / 4
            tensors[f"{module}.lora_B{spelling}"] = random.standard_normal((rows, rank)) / 4
        elif ("time" in parts and ".time_" in name) or ("ln" in parts and ".ln" in name):
            shape = (1, 1, *values.shape) if "time_mix" in name else values.shape
            tensors[name] = random.uniform(-6, 1, shape)
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".safetensors":
        path.write_bytes(make.safetensors({key: ("F32", each) for key, each in tensors.items()}))
    else:
        path.write_bytes(make.torch_zip(tensors))
    return path


def check(path: Path, model: dict[str, np.ndarray], *loras: tuple[dict, float]) -> None:
    """A merged file holds what the reference says, within the rounding of its arithmetic.

    Each term of W + sum of scale * B @ A is rounded at most rank times in its product and sum,
    twice by the scale and once per addition to W; -exp(w) is rounded once.
    """
    expected, magnitudes = reference.merge(model, loras)
    ranks = [values.shape[0] for lora, _ in loras for key, values in lora.items() if "_A" in key]
    roundings = max(ranks, default=0) + 2 + len(loras)
    merged = read_model(path)
    assert list(merged) == list(expected)
    for name, values in expected.items():
        bound = roundings * 2.0**-24 * magnitudes[name]
        if merged[name].name == "FP16":
            bound = bound * (1 + 2**-11) + 2.0**-11 * np.abs(values) + 2.0**-25
        error = np.abs(merged[name].values().astype(np.float64) - values)
        assert np.all(error <= bound), name


@pytest.fixture(params=["FP32", "FP16"])
def source(request, tmp_path):
    """A model file; `stored(source)` is what it holds."""
    write_model(tmp_path / "model.bin", MODEL, request.param)
    return tmp_path / "model.bin"


def stored(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.values() for name, tensor in read_model(path).items()}


@pytest.fixture
def refused(tmp_path):
    """Such a LoRA is refused with a text that matches; a previous file stays."""
    source, target = tmp_path / "model.bin", tmp_path / "out" / "merged.bin"

    def check(tensors: dict[str, np.ndarray], match: str, alpha: float = 8, **options) -> None:
        if not source.exists():
            write_model(source, MODEL, "FP32")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"old")
        with pytest.raises(RWKVFileError, match=match):
            merge_lora(source, [(save(tmp_path / "lora.pth", tensors), alpha)], target, **options)
        assert target.read_bytes() == b"old"
        assert os.listdir(target.parent) == ["merged.bin"]

    return check


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora.pth", "lora.safetensors"])
@pytest.mark.parametrize("spelling", ["", ".weight"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 32), (4, 6.5), (40, -16)])
def test_against_the_reference(tmp_path, source, name, spelling, rank, alpha):
    lora = random_lora(2, rank, spelling)
    target = tmp_path / "merged.bin"
    calls = []
    merged = merge_lora(
        source,
        [(save(tmp_path / name, lora), alpha)],
        target,
        progress=lambda *call: calls.append(call),
    )
    check(target, stored(source), (lora, alpha))
    before, after = read_model(source), read_model(target)
    assert [each.name for each in after.values()] == [each.name for each in before.values()]
    assert target.stat().st_size == source.stat().st_size
    assert list(merged.added) == MATRICES
    assert list(merged.replaced) == [name for name in MODEL if re.search(r"\.(time_|ln)", name)]
    assert merged.unused == ()
    total = calls[-1][2]
    assert len(calls) == len(MODEL)
    assert calls[-1] == ("merging", total, total)


def test_bfloat16_is_multiplied_in_float32(tmp_path, source):
    bits = {key: make.bfloat16_bits(values) for key, values in random_lora(3, rank=16).items()}
    lora = {key: (each.astype("<u4") << 16).view("<f4") for key, each in bits.items()}
    merge_lora(source, [(save(tmp_path / "lora.pth", bits), 32)], tmp_path / "merged.bin")
    check(tmp_path / "merged.bin", stored(source), (lora, 32))


def test_several(tmp_path, source):
    """L-12: each with a rank and an alpha of its own, and in two runs the same."""
    first, second = random_lora(4, 2, parts=("time",)), random_lora(5, 8, ".weight", parts=("ln",))
    paths = save(tmp_path / "a.pth", first), save(tmp_path / "b.pth", second)
    target, between, twice = (tmp_path / name for name in ("ab.bin", "a.bin", "a-b.bin"))
    merge_lora(source, [(paths[0], 3), (paths[1], 5)], target)
    check(target, stored(source), (first, 3), (second, 5))
    merge_lora(source, [(paths[0], 3)], between)
    merge_lora(between, [(paths[1], 5)], twice)
    check(twice, stored(between), (second, 5))
    if read_model(target)["emb.weight"].name == "FP32":
        assert target.read_bytes() == twice.read_bytes()
    # away again
    merge_lora(twice, [(paths[1], -5)], target)
    for name in MATRICES:
        difference = stored(target)[name] - stored(between)[name]
        assert np.abs(difference).max() < 1e-2


def test_the_last_replacement_counts(tmp_path, source):
    """L-10: -exp(w) is of the checkpoint's number, however often it was replaced before."""
    loras = random_lora(6), random_lora(7)
    paths = [save(tmp_path / f"{i}.pth", lora) for i, lora in enumerate(loras)]
    with pytest.warns(UserWarning, match=r"1\.pth: replaces what a LoRA before.*ln1\.weight.*more"):
        merge_lora(source, [(path, 8) for path in paths], tmp_path / "merged.bin")
    check(tmp_path / "merged.bin", stored(source), (loras[0], 8), (loras[1], 8))
    decay = read_model(tmp_path / "merged.bin")["blocks.1.att.time_decay"].values()
    raw = loras[1]["blocks.1.att.time_decay"].tolist()
    assert decay.tolist() == [np.float32(-math.exp(w)) for w in raw]


def test_a_matrix_whole_and_with_factors(tmp_path, source):
    """A LoRA's training model, saved with all its tensors: the whole one is what is added to."""
    lora = random_lora(8) | random_model(9, **SIZES)
    for i in range(2):
        decay = f"blocks.{i}.att.time_decay"
        lora[decay] = np.log(-lora[decay])
    merged = merge_lora(source, [(save(tmp_path / "lora.pth", lora), 8)], tmp_path / "merged.bin")
    check(tmp_path / "merged.bin", stored(source), (lora, 8))
    assert set(merged.replaced) == set(MODEL)
    assert set(merged.added) == set(MATRICES)


@pytest.mark.parametrize("version", [100, 101])
@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_nothing_learned_changes_no_byte(tmp_path, version, data_type):
    """L-11, with weights of -0, and L-04: alpha 0"""
    tensors = MODEL | {f"{KEY}.weight": -np.zeros_like(MODEL[f"{KEY}.weight"])}
    source, target = tmp_path / "model.bin", tmp_path / "merged.bin"
    write_model(source, tensors, data_type, version)
    lora = random_lora(10, parts=())
    zero = {key: values * ("_A" in key) for key, values in lora.items()}
    merge_lora(source, [(save(tmp_path / "zero.pth", zero), 32)], target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.warns(UserWarning, match=r"lora\.pth: with alpha 0 its products change nothing"):
        merge_lora(source, [(save(tmp_path / "lora.pth", lora), 0)], target)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_equals_a_checkpoint_merged_by_hand(tmp_path, data_type):
    """With numbers that no step rounds, the files are the same, and so are the logits."""
    random = np.random.default_rng(11)

    def exact(*shape: int) -> np.ndarray:
        return (random.integers(-8, 9, shape) / 8).astype(np.float32)

    base = {name: exact(*values.shape) for name, values in MODEL.items()}
    by_hand = dict(base)
    lora = {}
    for name in MATRICES:
        rows, columns = base[name].shape
        a, b = exact(4, columns), exact(rows, 4)
        lora |= {name.replace("weight", "lora_A"): a, name.replace("weight", "lora_B"): b}
        by_hand[name] = base[name] + 0.5 * (b @ a)
    for name in MODEL:
        if ".time_" in name or ".ln" in name:
            lora[name] = by_hand[name] = exact(*MODEL[name].shape)
    source, target, expected = (tmp_path / f"{name}.bin" for name in ("base", "merged", "expected"))
    convert(save(tmp_path / "base.pth", base), source, data_type)
    convert(save(tmp_path / "by_hand.pth", by_hand), expected, data_type)
    merge_lora(source, [(save(tmp_path / "lora.pth", lora), 2)], target)
    assert target.read_bytes() == expected.read_bytes()
    logits = []
    for path in (source, target, expected):
        with RWKVModel(None, path) as model:
            logits.append(model.eval_sequence([1, 2, 3], None)[0])
    assert logits[1].tobytes() == logits[2].tobytes()
    assert not np.allclose(logits[0], logits[1])


# ---- what is refused ----------------------------------------------------------------------------


def without(*keys: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in random_lora(12).items() if key not in keys}


def replaced(key: str, values: np.ndarray) -> dict[str, np.ndarray]:
    return random_lora(12) | {key: values.astype(np.float32)}


def test_another_model(refused):
    """L-01, L-07"""
    renamed = {f"model.{key}": values for key, values in random_lora(1).items()}
    for options in ({}, {"ignore_unused": True}):
        refused(
            renamed, r"lora\.pth: the model has none of its tensors, which are model\.", **options
        )
    deeper = random_lora(1) | {
        key.replace("blocks.1.", "blocks.2."): values for key, values in random_lora(1).items()
    }
    refused(
        deeper,
        r"no tensors for blocks\.2\..* and 17 more; is .* another model\? .merge-lora --ignore",
    )
    wider = {key: np.repeat(each, 2, axis=-1) for key, each in random_lora(1).items()}
    refused(
        wider, r"'blocks\.0\.ln1\.weight' is 64, in the model it is 32; nor does .* and \d+ more"
    )


def test_unused_keys_can_be_left_out(tmp_path, source):
    """L-07"""
    lora = random_lora(1)
    extra = {
        "head_q.weight": np.ones((2, 2), "f4"),
        "blocks.9.att.key.lora_A": np.ones((2, 2), "f4"),
    }
    path = save(tmp_path / "lora.pth", lora | extra)
    merged = merge_lora(source, [(path, 8)], tmp_path / "merged.bin", ignore_unused=True)
    assert merged.unused == tuple(extra)
    check(tmp_path / "merged.bin", stored(source), (lora, 8))


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("ignore_unused", [False, True])
def test_half_of_a_pair(refused, letter, ignore_unused):
    """L-02"""
    other = {"A": "B", "B": "A"}[letter]
    refused(
        without(f"{KEY}.lora_{other}"),
        rf"'{re.escape(KEY)}\.lora_{letter}' is without its lora_{other}$",
        ignore_unused=ignore_unused,
    )


@pytest.mark.parametrize(
    ("module", "a", "b"),
    [
        (KEY, (4, 32), (32, 3)),  # ranks that differ
        (KEY, (32, 4), (4, 32)),  # exchanged
        (KEY, (4, 31), (32, 4)),
        (KEY, (4, 32), (33, 4)),
        (KEY, (0, 32), (32, 0)),
        (KEY, (1, 32), (1, 1)),  # these would be broadcast
        (KEY, (4, 1), (32, 4)),
        (KEY, (32,), (32,)),
        (KEY, (), ()),
        (KEY, (1, 4, 32), (1, 32, 4)),
        ("blocks.1.ffn.key", (4, 96), (32, 4)),
    ],
)
def test_factors_that_do_not_fit(refused, module, a, b):
    """L-03"""
    lora = replaced(f"{module}.lora_A", np.ones(a)) | {f"{module}.lora_B": np.ones(b, np.float32)}
    rows = 96 if "ffn" in module else 32
    refused(lora, rf"'{module}\.lora_A' is .* expected rank x 32 and {rows} x rank$")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("blocks.0.ln1.weight", (1,)),
        ("blocks.0.ln1.weight", (1, 32)),
        ("blocks.0.ln1.weight", ()),
        ("blocks.0.att.time_decay", (33,)),
        ("blocks.0.att.time_mix_k", (1, 32, 1)),
        ("head.weight", (32, 50)),
    ],
)
def test_replacements_that_do_not_fit(refused, key, shape):
    """L-03"""
    refused(replaced(key, np.ones(shape)), rf"'{key}' is .*, in the model it is (50 x )?32$")


def test_what_cannot_be_told_apart_or_added(refused):
    both = replaced(f"{KEY}.lora_A.weight", np.ones((4, 32)))
    refused(both, rf"has both '{KEY}\.lora_A' and '{KEY}\.lora_A\.weight'")
    vector = replaced("ln_out.lora_A", np.ones((1, 32))) | replaced(
        "ln_out.lora_B", np.ones((1, 1))
    )
    refused(vector, r"'ln_out\.lora_A' is for a matrix, in the model that is a vector")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "key", [f"{KEY}.lora_A", f"{KEY}.lora_B", "blocks.0.ln1.bias", "blocks.1.att.time_decay"]
)
def test_values_that_are_not_finite(refused, key, value):
    values = random_lora(12)[key].copy()
    values.flat[3] = value
    refused(replaced(key, values), rf"lora\.pth: {key}: 1 of {values.size} values are NaN or inf")


def test_values_that_become_infinite(refused, tmp_path):
    """L-04, L-08"""
    refused(random_lora(1), r"model\.bin: blocks\..* with the LoRA: \d+ of 1024 .* infinite", 1e300)
    refused(replaced(f"{KEY}.lora_A", np.full((4, 32), 3e38)), f"{KEY}.* infinite", alpha=1e9)
    refused(replaced("blocks.0.att.time_decay", np.full(32, 89)), r"as -exp\(w\): 32 of 32")
    write_model(tmp_path / "model.bin", MODEL, "FP16")
    one = without(f"{KEY}.lora_A", f"{KEY}.lora_B")
    one |= {f"{KEY}.lora_A": np.eye(2, 32, dtype="f4"), f"{KEY}.lora_B": np.zeros((32, 2), "f4")}
    one[f"{KEY}.lora_B"][:2] = [[1e6, 0], [0, -1e6]]
    refused(one, rf"{KEY}\.weight with the LoRA: 2 of 1024 values are beyond 65504.*--clamp", 2)
    target = tmp_path / "clamped.bin"
    merge_lora(tmp_path / "model.bin", [(tmp_path / "lora.pth", 2)], target, clamp=True)
    values = read_model(target)[f"{KEY}.weight"].values()
    assert (values[0, 0], values[1, 1]) == (65504, -65504)
    before = stored(tmp_path / "model.bin")[f"{KEY}.weight"]
    assert np.count_nonzero(values != before) == 2


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_that_is_not_finite(tmp_path, source, alpha):
    """L-04"""
    path = save(tmp_path / "lora.pth", random_lora(1))
    with pytest.raises(ValueError, match=f"alpha is {alpha}, expected a finite number"):
        merge_lora(source, [(path, 1), (path, alpha)], tmp_path / "merged.bin")
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(source, [], tmp_path / "merged.bin")


def test_sources_that_cannot_be_merged_into(tmp_path):
    """L-05"""
    lora, target = save(tmp_path / "lora.pth", random_lora(1)), tmp_path / "merged.bin"
    source = tmp_path / "model.bin"
    for name in ("Q4_1_O", "Q8_0"):
        write_model(source, MODEL, name, 100)
        text = rf"blocks\.0\.att\.key\.weight is {name}, expected FP32 or FP16; .* before it was q"
        with pytest.raises(RWKVFileError, match=text):
            merge_lora(source, [(lora, 8)], target)
    with pytest.raises(RWKVFileError, match="PyTorch"):
        merge_lora(lora, [(lora, 8)], target)
    write_model(source, MODEL)
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(RWKVFileError, match=r"head\.weight"):
        merge_lora(source, [(lora, 8)], target)
    write_model(source, MODEL)
    with pytest.raises(RWKVFileError, match="expected a PyTorch checkpoint"):
        merge_lora(source, [(source, 8)], target)
    assert not target.exists()


def test_a_source_with_nan_in_a_matrix(refused, tmp_path):
    tensors = MODEL | {f"{KEY}.weight": np.full((32, 32), math.nan)}
    write_model(tmp_path / "model.bin", tensors)
    refused(random_lora(1), rf"model\.bin: {KEY}\.weight: 1024 of 1024 values are NaN")


def test_same_file(tmp_path, source):
    """L-06"""
    path = save(tmp_path / "lora.pth", random_lora(1))
    other = save(tmp_path / "other.pth", random_lora(2))
    os.link(other, tmp_path / "link.bin")
    for target in (source, path, tmp_path / "link.bin"):
        before = target.read_bytes()
        with pytest.raises(ValueError, match="same file"):
            merge_lora(source, [(path, 8), (other, 8)], target)
        assert target.read_bytes() == before


def test_a_pickle_that_would_run_something(tmp_path, source):
    """L-09"""
    bad = make.zip_files(make.Call("os", "system", (f"touch {tmp_path / 'ran'}",)))
    (tmp_path / "lora.pth").write_bytes(make.archive(bad))
    with pytest.raises(RWKVFileError, match=r"os\.system|system"):
        merge_lora(source, [(tmp_path / "lora.pth", 8)], tmp_path / "merged.bin")
    assert not (tmp_path / "ran").exists()


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """A file of 34 MB, mostly its two tables, which no LoRA changes: nothing of them is copied."""
    import tracemalloc

    sizes = {"n_vocab": 60000, "n_embed": 64, "n_layer": 2, "n_ffn": 256}
    write_model(tmp_path / "model.bin", random_model(1, **sizes), "FP32")
    lora = {
        f"blocks.0.ffn.key.lora_{letter}": np.ones(shape, np.float32)
        for letter, shape in (("A", (8, 64)), ("B", (256, 8)))
    }
    path = save(tmp_path / "lora.pth", lora)
    merge_lora(tmp_path / "model.bin", [(path, 8)], tmp_path / "merged.bin")  # imports, caches
    tracemalloc.start()
    try:
        merge_lora(tmp_path / "model.bin", [(path, 8)], tmp_path / "merged.bin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 256 * 64 * 4 + 300_000


# ---- the command --------------------------------------------------------------------------------


def test_command(tmp_path, source):
    lora, other = random_lora(1), random_lora(2, parts=())
    paths = save(tmp_path / "lora.pth", lora), save(tmp_path / "b.safetensors", other)
    target, expected = tmp_path / "merged.bin", tmp_path / "expected.bin"
    done = rwkv("merge-lora", source, paths[0], "16", target, "--also", paths[1], "-0.5")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "added to     2 x att.key.weight" in lines
    assert "replaced     2 x att.time_decay" in lines
    assert "replaced     1 x ln0.weight" in [line.replace("blocks.0.", "") for line in lines]
    assert lines[-1] == f"{target}: {target.stat().st_size:,} bytes"
    merge_lora(source, [(paths[0], 16), (paths[1], -0.5)], expected)
    assert target.read_bytes() == expected.read_bytes()

    script = [sys.executable, ROOT / "rwkv" / "merge_lora_into_ggml.py"]
    for arguments in (("--", source, paths[0], "-16"), (source, paths[0], "1.5e1")):
        done = run([*script, *arguments, target])
        assert (done.returncode, done.stderr) == (0, "")
        merge_lora(source, [(paths[0], float(arguments[-1]))], expected)
        assert target.read_bytes() == expected.read_bytes()


def test_command_options(tmp_path, source):
    tensors = random_lora(1) | {f"x{i}": np.ones(2, "f4") for i in range(9)}
    prefixed = {f"model.{key}": values for key, values in tensors.items()}
    path, target = save(tmp_path / "lora.pth", prefixed), tmp_path / "merged.bin"
    command = ["merge-lora", source, path, 0, target]
    assert "none of its tensors" in rwkv(*command).stderr
    done = rwkv(*command, "--key", "model")
    assert (done.returncode, done.stdout) == (1, "")
    assert "x0, x1, x2, x3, x4, x5 and 3 more" in done.stderr
    assert not target.exists()
    done = rwkv(*command, "--key", "model", "--ignore-unused")
    assert done.returncode == 0
    assert "left out  x0, x1, x2, x3, x4, x5 and 3 more\n" in done.stdout
    assert done.stderr == f"note: {path}: with alpha 0 its products change nothing\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["lora.pth", "merged.bin"], 2, "'merged.bin' is not a valid float"),
        (["lora.pth", "16"], 2, "Missing argument 'DEST'"),
        (["lora.pth", "nan", "merged.bin"], 1, "alpha is nan"),
        (["absent.pth", "16", "merged.bin"], 1, "error: absent.pth: No such file"),
        (["lora.pth", "16", "merged.bin", "--also", "lora.pth"], 2, "requires 2 arguments"),
    ],
)
def test_command_errors(tmp_path, source, arguments, code, text):
    """L-04"""
    save(tmp_path / "lora.pth", random_lora(1))
    done = rwkv("merge-lora", source, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert not (tmp_path / "merged.bin").exists()


def test_page(tmp_path):
    """docs/lora.md shows what its commands print."""
    page = (ROOT / "docs" / "lora.md").read_text("utf-8")
    code, beside = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (session,) = re.findall(r"^```\n(\$.*?)^```", page, re.M | re.S)
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    shown = ""
    for line in re.findall(r"^\$ (.*)\n", session, re.M):
        words = line.split()
        assert words[0] == "rwkv"
        done = rwkv(*words[1:], cwd=tmp_path, env=environment(COLUMNS="100"))
        shown += f"$ {line}\n{done.stdout}{done.stderr}"
    assert shown == session
    done = run([sys.executable, "-c", beside], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
