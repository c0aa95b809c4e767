"""A checkpoint becomes a model file, or a text that says why not (faults.md C-07..C-20)."""

import hashlib
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import checkpoints as make
import models
import numpy as np
import pytest
from rwkv_cpp import RWKVModel
from rwkv_cpp.convert import BLOCK_TENSORS, TENSORS, check_tensors, convert
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.ggmf import read_index

RUN = "from rwkv_cpp.cli import main_as; main_as('convert')"
LAYERS = 3
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, links and limits")


def trained(seed: int = 1, **sizes: int) -> dict[str, np.ndarray]:
    """What torch holds after training: time_decay before -exp, time_mix as (1, 1, n_embed)."""
    tensors = models.random_model(seed, **({"n_vocab": 50, "n_embed": 32} | sizes))
    for key, values in tensors.items():
        if key.endswith("time_decay"):
            tensors[key] = np.log(-values)
        if "time_mix" in key:
            tensors[key] = values.reshape(1, 1, -1)
    return tensors


def converted(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a model file holds of them, before the matrices are rounded."""
    result = {}
    for key, values in tensors.items():
        result[key] = values.astype(np.float32)
        if "time_" in key:
            result[key] = result[key].reshape(-1)
        if key.endswith("time_decay"):
            decays = [-math.exp(w) for w in result[key].tolist()]
            result[key] = np.frombuffer(struct.pack(f"<{len(decays)}f", *decays), "<f4")
    return result


TRAINED = trained()
KEYS = list(TRAINED)


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.write_bytes(make.torch_zip(tensors))
    return path


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "model.pth", TRAINED)


@pytest.fixture
def refused(tmp_path):
    """Such tensors are refused with a text that matches; a previous model stays."""

    def check(tensors: dict[str, np.ndarray], match: str, **options: object) -> None:
        target = tmp_path / "out" / "model.bin"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"old")
        with pytest.raises(RWKVFileError, match=match):
            convert(save(tmp_path / "model.pth", tensors), target, **options)
        assert target.read_bytes() == b"old"
        assert [entry.name for entry in target.parent.iterdir()] == ["model.bin"]

    return check


def without(*keys: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in TRAINED.items() if key not in keys}


def with_value(key: str, value: float, count: int = 1, dtype: type = np.float32) -> dict:
    values = TRAINED[key].astype(dtype)
    values.reshape(-1)[3 : 3 + count] = value
    return TRAINED | {key: values}


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_bytes(tmp_path, data_type, dtype, form):
    if dtype == "bfloat16":
        stored = {key: make.bfloat16_bits(values) for key, values in TRAINED.items()}
        values = {
            key: (bits.astype("<u4") << 16).view("<f4").astype(np.float64)
            for key, bits in stored.items()
        }
    else:
        stored = values = {key: each.astype(dtype) for key, each in TRAINED.items()}
    codes = {"float32": "F32", "float16": "F16", "float64": "F64", "bfloat16": "BF16"}
    data = {
        "zip": make.torch_zip,
        "legacy": make.torch_legacy,
        "safetensors": lambda tensors: make.safetensors(
            {key: (codes[dtype], each) for key, each in tensors.items()}
        ),
    }[form](stored)
    (tmp_path / "checkpoint").write_bytes(data)

    calls = []
    header = convert(
        tmp_path / "checkpoint",
        tmp_path / "model.bin",
        data_type,
        progress=lambda done, total: calls.append((done, total)),
    )

    assert (header.version, header.n_vocab, header.n_embed, header.n_layer) == (101, 50, 32, 3)
    models.write_model(tmp_path / "expected.bin", converted(values), data_type)
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()
    total = sum(each.size for each in TRAINED.values())
    assert len(calls) == len(TRAINED)
    assert calls[-1] == (total, total)


def test_the_table_is_that_of_the_specification():
    sizes = {"V": 50, "C": 32, "F": 96}
    names = TENSORS | {
        f"blocks.{i}.{name}": kind for i in range(LAYERS) for name, kind in BLOCK_TENSORS.items()
    }
    shapes = {name: tuple(sizes[letter] for letter in kind) for name, kind in names.items()}
    assert shapes == {key: values.shape for key, values in converted(TRAINED).items()}
    assert check_tensors(shapes) == (50, 32, 3)


def test_any_width_and_order(tmp_path):
    tensors = trained(2, n_embed=7, n_ffn=11, n_layer=1, n_vocab=1)
    shuffled = dict(random.Random(1).sample(list(tensors.items()), len(tensors)))
    convert(save(tmp_path / "a.pth", shuffled), tmp_path / "a.bin", "FP32")
    _, records = read_index(tmp_path / "a.bin")
    assert [record.key for record in records] == list(shuffled)
    models.write_model(tmp_path / "b.bin", converted(shuffled))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_one_embedding_channel(tmp_path):
    tensors = trained(3, n_embed=1, n_layer=1)
    convert(save(tmp_path / "a.pth", tensors), tmp_path / "a.bin", "FP32")
    assert read_index(tmp_path / "a.bin")[0].n_embed == 1


def test_vectors_of_one_dimension_are_accepted(tmp_path, source):  # C-09
    flat = {
        key: values.reshape(-1) if "time_" in key else values for key, values in TRAINED.items()
    }
    convert(source, tmp_path / "a.bin")
    convert(save(tmp_path / "flat.pth", flat), tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_by_way_of_safetensors(tmp_path, source, data_type):
    between = tmp_path / "model.safetensors"
    convert(source, between, data_type)
    convert(between, tmp_path / "a.bin", data_type)
    convert(source, tmp_path / "b.bin", data_type)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    package = pytest.importorskip("safetensors.numpy")
    for key, values in package.load_file(between).items():
        half = data_type == "FP16" and values.ndim == 2
        np.testing.assert_array_equal(values, TRAINED[key].astype("f2" if half else "f4"))


def test_twice_gives_the_same_bytes(tmp_path, source):  # C-18
    for name in "a.bin", "b.bin", "a.safetensors", "b.safetensors":
        convert(source, tmp_path / name)
    for suffix in ".bin", ".safetensors":
        first, second = (tmp_path / f"{stem}{suffix}" for stem in "ab")
        assert first.read_bytes() == second.read_bytes()


def test_against_torch(tmp_path):
    torch = pytest.importorskip("torch")
    state = {}
    for key, values in TRAINED.items():
        tensor = torch.tensor(values).bfloat16()
        state[key] = torch.nn.Parameter(tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
    torch.save(state, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "model.bin")
    expected = {}
    for key, tensor in state.items():
        values = tensor.detach().float()
        values = values.squeeze() if ".time_" in key else values
        values = -values.double().exp() if key.endswith("time_decay") else values
        expected[key] = (values.half() if values.ndim > 1 else values.float()).numpy()
    models.write_model(tmp_path / "expected.bin", expected, "FP16")
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_tensor(refused, key):  # C-08
    refused(without(key), f"missing.*{key}|'{key}' is missing")


def test_missing_layers(refused):  # C-08
    second = [key for key in KEYS if key.startswith("blocks.1.")]
    refused(without(*second), r"of a model of 3 layers are missing: blocks\.1\.\*$")
    blocks = [key for key in KEYS if key.startswith("blocks.")]
    refused(without(*blocks), r"are missing: blocks\.0\.\*")
    renamed = {key.replace("blocks.2.", "blocks.999999999."): TRAINED[key] for key in KEYS}
    refused(renamed, "1000000000 layers, expected at most 1024")
    renamed = {key.replace("blocks.2.", "blocks.02."): TRAINED[key] for key in KEYS}
    refused(renamed, r"missing: blocks\.2\.")


def test_unknown_tensors(refused):
    extra = np.zeros(3, np.float32)
    refused(
        TRAINED | {"blocks.0.att.surprise": extra}, r"no such tensors: blocks\.0\.att\.surprise"
    )
    refused(TRAINED | {f"x{i}": extra for i in range(20)}, "x5 and 14 more")


def test_names_with_a_prefix(refused, tmp_path):  # C-07
    prefixed = {f"_forward_module.{key}": values for key, values in TRAINED.items()}
    refused(prefixed, "names begin with '_forward_module.', which --key _forward_module")
    refused({"a": TRAINED["head.weight"]}, "'emb.weight' is missing; there are a$")
    path = save(tmp_path / "prefixed.pth", prefixed)
    convert(path, tmp_path / "a.bin", key="_forward_module")
    convert(save(tmp_path / "plain.pth", TRAINED), tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("key", KEYS)
def test_another_shape(key):  # C-09
    right = {name: values.shape for name, values in TRAINED.items()}
    assert check_tensors(right) == (50, 32, 3)
    shape = right[key]
    last = shape[-1]
    wrong = [(*shape[:-1], last + 1), (1, *shape), (*shape, 1), (0,), (), (*shape[:-1], 0)]
    if len(shape) == 2:
        wrong += [(shape[0] - 1, last), (shape[0] * last,), (1, 1, last)]
        wrong += [(last, shape[0])] if last != shape[0] else []
    for other in wrong:
        with pytest.raises(ValueError, match=r"'[a-z0-9_.]+' is .*, expected "):
            check_tensors(right | {key: other})


def test_a_wrong_shape_in_a_file(refused):  # C-09
    refused(
        TRAINED | {"head.weight": TRAINED["head.weight"].T}, "'head.weight' is 32 x 50, expected 50"
    )


def test_widths_of_channel_mixing_that_differ(refused):  # C-09
    key, value = "blocks.1.ffn.key.weight", "blocks.1.ffn.value.weight"
    narrow = TRAINED | {key: TRAINED[key][:-1], value: TRAINED[value][:, :-1]}
    refused(narrow, r"'blocks\.1\.ffn\.key\.weight' is 95 x 32, expected 96 x 32")


@pytest.mark.parametrize(
    ("key", "name"),
    {
        "blocks.0.att.ln_x.weight": "RWKV-5.1",
        "blocks.0.att.gate.weight": "RWKV-5.2",
        "blocks.0.att.time_maa_x": "RWKV-6",
        "blocks.0.att.k_k": "RWKV-7",
        "blocks.0.att.r_k": "RWKV-7",
        "blocks.0.ffn.s_emb.weight": "RWKV-7 with DeepEmbed",
        "blocks.0.att.qq.weight": "softmax attention",
        "blocks.0.att.time_mix": "RWKV-2",
        "blocks.0.att.time_w": "RWKV-1",
        "pos_emb_x": "my_pos_emb",
        "blocks.0.ffnPre.key.weight": "pre_ffn",
        "head_q.weight": "head_qk",
        "blocks.0.att.key.lora_A": "LoRA",
        "blocks.0.att.key.lora_B.weight": "LoRA",
    }.items(),
)
def test_other_architectures(refused, key, name):  # C-11
    extra = np.zeros((2, 2), np.float32)
    refused(TRAINED | {key: extra}, name)
    refused({key: extra}, name)


@pytest.mark.parametrize("key", ["emb.weight", "blocks.1.ffn.key.weight"])
def test_values_beyond_fp16(refused, tmp_path, key):  # C-10
    # 65520 lies half way between the largest number and the power of two that follows it.
    refused(with_value(key, 65520.0, 5), rf"{key}: 5 of \d+ values are beyond 65504.*--clamp")
    refused(with_value(key, -1e30), "1 of")
    for value in 65519.0, -65519.0:
        convert(save(tmp_path / "a.pth", with_value(key, value)), tmp_path / "a.bin")
    for value, clamped in (1e30, 65504), (-65520.0, -65504):
        path = save(tmp_path / "a.pth", with_value(key, value))
        convert(path, tmp_path / "a.bin", clamp=True)
        expected = converted(with_value(key, clamped))
        models.write_model(tmp_path / "b.bin", expected, "FP16")
        assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
        convert(path, tmp_path / "a.bin", "FP32")


def test_vectors_stay_fp32(tmp_path):  # C-10: their range is that of FP32
    convert(save(tmp_path / "a.pth", with_value("ln_out.weight", 1e30)), tmp_path / "a.bin")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["emb.weight", "ln_out.bias", "blocks.0.att.time_decay"])
@pytest.mark.parametrize("data_type", ["FP32", "FP16"])
def test_values_that_are_not_finite(refused, tmp_path, value, key, data_type):  # C-10
    tensors = with_value(key, value, 2)
    refused(tensors, rf"{key}: 2 of \d+ values are NaN or infinite", data_type=data_type)
    refused(tensors, "NaN or infinite", data_type=data_type, clamp=True)
    convert(tmp_path / "model.pth", tmp_path / "a.bin", data_type, allow_nan=True)
    _, records = read_index(tmp_path / "a.bin")
    offset = next(record.offset for record in records if record.key == key)
    size = 2 if data_type == "FP16" and key == "emb.weight" else 4
    first = (tmp_path / "a.bin").read_bytes()[offset + 3 * size :][:size]
    (number,) = struct.unpack("<e" if size == 2 else "<f", first)
    if key.endswith("decay") and not math.isnan(value):
        value = -math.inf if value > 0 else 0.0
    assert number == value or math.isnan(number) and math.isnan(value)  # noqa: RUF021


def test_what_becomes_infinite(refused):  # C-10
    refused(with_value("blocks.0.att.time_decay", 89.0), r"-exp\(w\): 1 of 32 values")
    refused(with_value("emb.weight", 1e39, dtype=np.float64), "emb.weight: 1 of 1600 values")


def test_types_that_are_no_weights(refused):  # C-10
    refused(TRAINED | {"ln_out.bias": np.arange(32)}, r"ln_out\.bias: is int64, expected float32")


def test_a_source_that_changes(tmp_path, source):  # C-16
    def change(done: int, total: int) -> None:
        os.utime(source, (1, 1))

    for name in "model.bin", "model.safetensors":
        source.touch()
        with pytest.raises(RWKVFileError, match="the file changed while it was read"):
            convert(source, tmp_path / name, progress=change)
        assert not (tmp_path / name).exists()


def test_wrong_arguments(tmp_path, source):
    with pytest.raises(ValueError, match=r"unknown data type 'Q4_0' \(choose FP16 or FP32\)"):
        convert(source, tmp_path / "model.bin", "Q4_0")


@posix
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_source_and_target_must_differ(tmp_path, source, link):  # C-14
    before = source.read_bytes()
    link(source, tmp_path / "link.bin")
    for target in source, tmp_path / "link.bin":
        with pytest.raises(ValueError, match="same file"):
            convert(source, target)
    assert source.read_bytes() == before


def test_targets_that_cannot_be_written(tmp_path, source):  # C-14
    with pytest.raises(IsADirectoryError):
        convert(source, tmp_path)
    with pytest.raises(FileNotFoundError):
        convert(source, tmp_path / "absent" / "model.bin")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


# ---- the command --------------------------------------------------------------------------------


def process(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **options)


def run(*arguments: object) -> tuple[int, str, str]:
    child = process(RUN, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = child.communicate()
    return child.returncode, stdout, stderr


@pytest.mark.parametrize(
    ("word", "data_type"),
    [
        (None, "FP16"),
        ("float16", "FP16"),
        ("FP16", "FP16"),
        ("Float32", "FP32"),
        ("fp32", "FP32"),
    ],
)
def test_command(tmp_path, source, word, data_type):
    status, stdout, stderr = run(source, tmp_path / "a.bin", *([word] if word else []))
    assert (status, stderr) == (0, "")
    size = (tmp_path / "a.bin").stat().st_size
    assert stdout == f"{tmp_path / 'a.bin'}: {size:,} bytes, 3 layers of 32, vocabulary of 50\n"
    convert(source, tmp_path / "b.bin", data_type)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_command_options(tmp_path):
    hot = with_value("emb.weight", math.nan) | with_value("head.weight", 1e30)
    hot["emb.weight"] = with_value("emb.weight", math.nan)["emb.weight"]
    path = save(tmp_path / "a.pth", {f"model.{key}": values for key, values in hot.items()})
    target = tmp_path / "a.bin"
    assert "--key model" in run(path, target)[2]
    assert "--allow-nan" in run(path, target, "--key", "model")[2]
    assert "--clamp" in run(path, target, "--key", "model", "--allow-nan")[2]
    assert not target.exists()
    assert run(path, target, "--key", "model", "--allow-nan", "--clamp")[0] == 0
    assert target.exists()


def test_command_errors(tmp_path, source):
    for arguments, code, text in (
        ((tmp_path / "absent", tmp_path / "a.bin"), 1, f"error: {tmp_path / 'absent'}: No such"),
        ((source, source), 1, "error: "),
        ((source, tmp_path), 1, f"error: {tmp_path}: is a folder"),
        ((source, tmp_path / "a.bin", "Q4_0"), 2, "Usage: "),
        ((source,), 2, "Usage: "),
    ):
        status, stdout, stderr = run(*arguments)
        assert (status, stdout) == (code, "")
        assert stderr.startswith(text)
        assert code == 2 or stderr.count("\n") == 1


def test_help_has_an_example():
    status, stdout, _ = run("--help")
    assert status == 0
    assert "rwkv convert RWKV-4-Pile-169M-20220807-8023.pth rwkv-169M.bin float16\n" in stdout


# ---- in a process of its own --------------------------------------------------------------------


def test_without_torch(tmp_path, source):  # C-19
    code = "import sys; sys.modules['torch'] = None; " + RUN
    assert process(code, source, tmp_path / "a.bin").wait() == 0


@posix
@pytest.mark.parametrize(
    ("shell", "code"),
    [(">&-", 0), ("2>&-", 0), ("</dev/null >&- 2>&-", 0), ("2>/dev/full", 0), (">/dev/full", 1)],
)
def test_closed_outputs(tmp_path, source, shell, code):  # C-20
    line = f'LC_ALL=C exec "$0" -c "$1" "$2" "$3" {shell}'
    arguments = [sys.executable, RUN, source, tmp_path / "a.bin"]
    assert subprocess.run(["sh", "-c", line, *map(str, arguments)]).returncode == code
    convert(source, tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@posix
@pytest.mark.parametrize("limit", [10, 5_000, 60_000])
def test_a_full_disk(tmp_path, source, limit):  # C-15: a file size limit stands for the full disk
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "model.bin"
    target.write_bytes(b"old")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1)); {RUN}"
    result = process(code, source, target, stderr=subprocess.PIPE, text=True)
    _, stderr = result.communicate()
    assert (result.returncode, stderr) == (1, f"error: {target}: File too large\n")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in target.parent.iterdir()] == ["model.bin"]


# Stops before the file is complete, until a signal comes.
WAIT = (
    """
import time
from rwkv_cpp import convert
from pathlib import Path
import sys
def pause(array, *more, half=convert.half):
    if array.startswith(sys.argv[1] + ": head"):
        Path(sys.argv[2] + ".ready").touch()
        time.sleep(60)
    return half(array, *more)
convert.half = pause
"""
    + RUN
)


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path, source, number, code):  # C-15
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "model.bin"
    child = process(WAIT, source, target, stderr=subprocess.PIPE)
    ready = tmp_path / "out" / "model.bin.ready"
    while not ready.exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    assert child.communicate(timeout=10)[1].strip() == b""
    assert child.returncode == code
    assert [entry.name for entry in target.parent.iterdir()] == ["model.bin.ready"]


@posix
@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):  # C-15, K3
    source = save(tmp_path / "model.pth", trained(4, n_embed=256, n_vocab=2000, n_layer=6))
    out = tmp_path / "out"
    out.mkdir()
    target = out / "model.bin"
    start = time.perf_counter()
    convert(source, target)
    whole = hashlib.sha256(target.read_bytes()).digest()
    child = process(RUN, source, target)
    assert child.wait() == 0
    longest = 1.5 * (time.perf_counter() - start)
    target.unlink()
    moments = random.Random(1)
    for _ in range(60):
        child = process(RUN, source, target)
        time.sleep(moments.uniform(0, longest))
        child.kill()
        child.wait()
        if target.exists():
            assert hashlib.sha256(target.read_bytes()).digest() == whole
            target.unlink()
        # Each run removes what the one before it left behind.
        assert len(list(out.iterdir())) <= 1
    convert(source, target)
    assert [entry.name for entry in out.iterdir()] == ["model.bin"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_memory_stays_at_the_largest_tensor(tmp_path, dtype):  # C-17
    n_embed, n_vocab, n_layer = 512, 32768, 24
    shapes = {key: values.shape for key, values in trained(5, n_embed=8, n_layer=n_layer).items()}
    sizes = {8: n_embed, 50: n_vocab, 48: 4 * n_embed}
    item = {"F32": 4, "BF16": 2}[dtype]
    # Zeros, in a file with holes: it takes no room on the disk.
    header, end = {}, 0
    for key, shape in shapes.items():
        shape = [sizes.get(n, n) for n in shape]
        begin, end = end, end + item * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    source = tmp_path / "model.safetensors"
    source.write_bytes(make.safetensors({}, header))
    os.truncate(source, source.stat().st_size + end)
    code = f"""
import re
from pathlib import Path
try:
    {RUN}
finally:
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    child = process(code, source, tmp_path / "a.bin", stdout=subprocess.PIPE)
    peak = int(child.communicate()[0].split()[-1]) << 10
    assert child.returncode == 0
    largest = item * n_vocab * n_embed
    assert peak <= 3 * largest + (80 << 20)  # the interpreter and numpy take 40 MiB
    assert end > 6 * largest


# ---- RWKV-4a ----


TRAINED_4A = trained(n_tiny=5, tiny_layer=1)
TINY = [key for key in TRAINED_4A if ".tiny_" in key]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_4a_is_converted_without_its_mask(tmp_path, suffix):
    mask = {"blocks.1.tiny_mask": np.tril(np.ones((7, 7), np.float32))}
    convert(save(tmp_path / "a.pth", TRAINED_4A | mask), tmp_path / f"a{suffix}", "FP32")
    if suffix == ".safetensors":
        convert(tmp_path / "a.safetensors", tmp_path / "a.bin", "FP32")
    models.write_model(tmp_path / "b.bin", converted(TRAINED_4A))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    with RWKVModel(None, tmp_path / "a.bin", 1) as model:
        assert model.n_state == (5 * LAYERS + 5) * 32


@pytest.mark.parametrize("key", TINY)
def test_4a_needs_all_of_its_tiny_attention(refused, key):
    tensors = TRAINED_4A
    refused({name: tensors[name] for name in tensors if name != key}, f"are missing: {key}")
    refused(tensors | {key: tensors[key][..., :-1]}, rf"'{key}' is .*, expected ")
    other = key.replace("blocks.1", "blocks.2")
    refused(tensors | {other: tensors[key]}, "blocks 1, 2 have a tiny attention, RWKV-4a has one")


def test_widths_of_tiny_attention(refused):
    key = "blocks.1.tiny_k.weight"
    refused(TRAINED_4A | {key: TRAINED_4A[key][:-1]}, f"'{key}' is 4 x 32, expected 5 x 32")
    refused(trained(n_tiny=4097), "tiny attention is 4097 wide, expected at most 4096")
    right = {name: values.shape for name, values in TRAINED_4A.items()}
    assert check_tensors(right) == (50, 32, 3)
    with pytest.raises(ValueError, match=r"tiny_q\.weight' is 0 x 32, expected "):
        check_tensors(right | {"blocks.1.tiny_q.weight": (0, 32)})


def test_rwkv_3_is_known_by_its_shapes(refused):
    columns = {key: TRAINED[key][:, None] for key in TRAINED if key.endswith("time_decay")}
    refused(TRAINED | columns, r"time_decay' is 32 x 1, expected 32: this is RWKV-3, only")
