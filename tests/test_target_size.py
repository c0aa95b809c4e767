"""target_size.py: choices against all possible ones, mixes against the files of `rwkv quantize`."""

import itertools
import re

import numpy as np
import pytest
from commands import rwkv
from models import random_model, read_model, write_model
from rwkv_cpp import NonFiniteLogits, RWKVFileError, RWKVModel, load_tokenizer
from rwkv_cpp import target_size as module
from rwkv_cpp.importance import collect, write_importances
from rwkv_cpp.perplexity import measure
from rwkv_cpp.quantize import bytes_of, quantize_file
from rwkv_cpp.target_size import best_choice, own_words, quantize_to_size, table

TEXT = b"To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer\n" * 3
KINDS = 7
FORMATS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture(scope="module")
def tensors():
    return random_model(8, n_embed=32, n_layer=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("source") / "model.bin"
    write_model(path, tensors, "FP16", table_type="FP16")
    return path


# ---- the choice ----


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    options = [
        [
            (int(random.integers(1, 20)), float(random.random()))
            for _ in range(random.integers(1, 5))
        ]
        for _ in range(5)
    ]
    choices = [*itertools.product(*(range(len(row)) for row in options))]

    def cost(choice):
        picked = [row[number] for row, number in zip(options, choice, strict=True)]
        return sum(n for n, _ in picked), sum(loss for _, loss in picked)

    least = min(cost(choice)[0] for choice in choices)
    for room in range(least, 100, 3):
        possible = [cost(choice)[1] for choice in choices if cost(choice)[0] <= room]
        n_bytes, loss = cost(best_choice(options, room))
        assert n_bytes <= room
        assert loss == pytest.approx(min(possible), rel=1e-12)
    with pytest.raises(ValueError, match=f"{least - 1} bytes"):
        best_choice(options, least - 1)


def test_many_groups_are_quick():
    random = np.random.default_rng(0)
    options = [
        [(2 * k, float(loss)) for k, loss in enumerate(random.random(6))] for _ in range(100)
    ]
    assert len(best_choice(options, 350)) == 100


# ---- a model ----


def divergence(path, source, texts):
    with RWKVModel(None, path) as model, RWKVModel(None, source) as base:
        found = measure(model, load_tokenizer(256), texts, base=base)
    return found.comparison.divergence.value


@pytest.mark.parametrize("plain", ["FP16", "FP32"])
def test_mix(tmp_path, tensors, plain):
    source, target, same = (tmp_path / name for name in ("source", "mix", "same"))
    write_model(source, tensors, plain)
    sizes = []
    for name in ("Q5_0", "Q8_0"):
        quantize_file(source, same, name, head=name)
        sizes.append(same.stat().st_size)
    size = sum(sizes) // 2
    calls = []
    mix = quantize_to_size(
        source, target, size, tokens=TEXT, progress=lambda *call: calls.append(call)
    )
    assert target.stat().st_size == mix.measured.n_bytes <= size
    assert len(mix.formats) == 2 * KINDS + 1
    assert len(set(mix.formats.values())) > 1
    quantize_file(source, same, "Q4_0", types=mix.types)
    assert {k: (t.name, t.data.tobytes()) for k, t in read_model(same).items()} == {
        k: (t.name, t.data.tobytes()) for k, t in read_model(target).items()
    }
    # `measure` leaves out the last token, which predicts nothing.
    assert divergence(target, source, [list(TEXT)]) == pytest.approx(
        mix.measured.divergence, rel=0.1
    )
    assert mix.measured.divergence == pytest.approx(mix.expected, rel=0.5)
    assert list(mix.uniform) == FORMATS
    for name, whole in mix.uniform.items():
        quantize_file(source, same, name, head=name)
        assert same.stat().st_size == whole.n_bytes
        assert divergence(same, source, [list(TEXT)]) == pytest.approx(whole.divergence, rel=0.1)
        if whole.n_bytes <= size:
            assert mix.measured.divergence <= whole.divergence
    measuring = [call[1:] for call in calls if call[0] == "measuring"]
    assert measuring == [(n, len(measuring)) for n in range(len(measuring))]


def test_more_room_never_loses_more(tmp_path, source):
    expected = []
    for percent in (60, 80, 100):
        mix = quantize_to_size(
            source, tmp_path / "mix", bytes_of(f"{percent}%", source), tokens=TEXT[:100]
        )
        expected.append(mix.expected)
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == 0
    assert (tmp_path / "mix").read_bytes() == source.read_bytes()  # with room for all of it


def test_sizes_at_both_ends(tmp_path, source):
    least, target = tmp_path / "least.bin", tmp_path / "mix.bin"
    quantize_file(source, least, "Q4_0", head="Q4_0")
    smallest, largest = least.stat().st_size, source.stat().st_size
    quantize_to_size(source, target, smallest, tokens=TEXT[:100])
    assert target.read_bytes() == least.read_bytes()
    target.unlink()
    for size in (smallest - 1, largest + 1, 0):
        with pytest.raises(
            ValueError,
            match=rf"no mix of formats is for {size:,} bytes: expected {smallest:,} \(.* to "
            rf"{largest:,} \(",
        ):
            quantize_to_size(source, target, size, tokens=TEXT)
    assert not target.exists()


def test_formats_of_version_100_by_importance(tmp_path, source):
    target, importances = tmp_path / "mix.bin", tmp_path / "importances.bin"
    with RWKVModel(None, source, 1) as model:
        write_importances(importances, model, collect(model, [list(TEXT)]))
    mix = quantize_to_size(
        source,
        target,
        bytes_of("70%", source),
        tokens=TEXT[:100],
        file_version=100,
        importances=importances,
    )
    options = {"types": mix.types, "file_version": 100, "importances": importances}
    quantize_file(source, tmp_path / "same.bin", "Q4_0", **options)
    same = read_model(tmp_path / "same.bin")
    for key, tensor in read_model(target).items():
        assert tensor.data.tobytes() == same[key].data.tobytes()
    assert list(mix.uniform) == [
        *("Q4_0", "Q4_1", "Q4_1_O", "Q4_2", "Q4_3"),
        *("Q5_0", "Q5_1", "Q8_0"),
    ]
    assert {tensor.version for tensor in read_model(target).values()} == {100}


def test_layers_go_together_where_measuring_takes_long(tmp_path, source, monkeypatch):
    monkeypatch.setattr(module, "_OPERATIONS", 1)
    target = tmp_path / "mix.bin"
    mix = quantize_to_size(source, target, bytes_of("70%", source), tokens=TEXT[:100])
    assert len(mix.formats) == KINDS + 1
    types = {key: tensor.name for key, tensor in read_model(target).items()}
    for kind in ("att.key", "ffn.value"):
        assert types[f"blocks.0.{kind}.weight"] == types[f"blocks.1.{kind}.weight"]
    assert "0-1  " in table(mix)


def test_own_words(source):
    with RWKVModel(None, source, 1) as model:
        texts = own_words(model, 12)
        assert texts == own_words(model, 12)
        logits = model.eval_sequence(b"\n", None)[0].astype(np.float64)
    assert [len(text) for text in texts] == [12] * 8
    assert {text[0] for text in texts} == {10}
    assert len({tuple(text) for text in texts}) == 8
    likely = np.argsort(logits)[-60:]  # drawn, but not from anywhere
    assert np.mean([text[1] in likely for text in texts]) > 0.5


def test_damaged_models(tmp_path, tensors):
    quantized, broken = tmp_path / "quantized.bin", tmp_path / "broken.bin"
    write_model(quantized, tensors, "Q5_1")
    with pytest.raises(RWKVFileError, match="already Q5_1"):
        quantize_to_size(quantized, tmp_path / "mix", 100_000, tokens=TEXT)
    write_model(broken, tensors | {"ln_out.bias": np.full(32, np.nan, np.float32)})
    with pytest.raises(NonFiniteLogits, match="damaged"):
        quantize_to_size(broken, tmp_path / "mix", 100_000, tokens=TEXT)
    write_model(broken, tensors)
    with pytest.raises(ValueError, match="text to measure on is empty"):
        quantize_to_size(broken, tmp_path / "mix", 100_000, tokens=[])
    assert not (tmp_path / "mix").exists()


# ---- the command ----


def test_command(tmp_path, source):
    target, text = tmp_path / "mix.bin", tmp_path / "text.txt"
    text.write_bytes(TEXT[:100])
    done = rwkv("quantize", source, target, "--target-size", "70%", "--text", text)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        *("layer", "att.key", "att.value", "att.receptance", "att.output"),
        *("ffn.key", "ffn.receptance", "ffn.value"),
    ]
    types = {key: tensor.name for key, tensor in read_model(target).items()}
    for layer in (0, 1):
        number, *formats = lines[1 + layer].split()
        assert number == str(layer)
        for kind, name in zip(lines[0].split()[1:], formats, strict=True):
            assert types[f"blocks.{layer}.{kind}.weight"] == name
    assert lines[3].split() == ["head", types["head.weight"]]
    assert "KL divergence, 100 tokens" in lines[5]
    n_bytes = f"{target.stat().st_size:,}"
    assert re.fullmatch(rf"this mix +{n_bytes} +0\.\d{{6}} \(expected 0\.\d{{6}}\)", lines[11])
    assert lines[-1].startswith(f"{target}: {n_bytes} bytes")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target-size", "1kB"], 1, "no mix of formats is for 1,000 bytes"),
        (["--target-size", "much"], 1, "'much' is no size, expected one such as 2.5MB"),
        (["Q4_0", "--target-size", "50%"], 2, "--target-size chooses formats: leave out FORMAT"),
        (["--head", "Q4_0", "--target-size", "50%"], 2, "--target-size chooses formats"),
        (["Q4_0", "--text", "x"], 2, "--text and --vocab go with --target-size"),
        ([], 2, "FORMAT is missing, or --target-size"),
        (["--target-size", "50%", "--text", "missing.txt"], 1, "missing.txt"),
    ],
)
def test_errors_of_the_command(tmp_path, source, arguments, code, message):
    done = rwkv("quantize", source, tmp_path / "mix.bin", *arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "mix.bin").exists()


@pytest.mark.parametrize("option", ["--importances", "--text"])
def test_what_it_reads_is_not_written(tmp_path, source, option):
    read = tmp_path / "read"
    read.write_bytes(TEXT[:100])
    done = rwkv("quantize", source, read, "--target-size", "50%", option, read)
    assert done.returncode == 1
    assert "same file" in done.stderr
    assert read.read_bytes() == TEXT[:100]


def test_sizes(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    for text, expected in {
        "2500000": 2_500_000,
        "2.5MB": 2_500_000,
        "2.5mb": 2_500_000,
        " 3 KB ": 3000,
        "7B": 7,
        "1.5GiB": 3 << 29,
        "1KiB": 1024,
        "60%": 600,
        ".5%": 5,
    }.items():
        assert bytes_of(text, file) == expected
    for text in ("", "x", "-3", "3 bytes", "1e6", "3iB", "%", "1.5.2MB", "5MB2"):
        with pytest.raises(ValueError, match=re.escape(f"'{text}' is no size")):
            bytes_of(text, file)
