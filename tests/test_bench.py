"""bench.py: the arithmetic of shares, what counts as quiet, and each option once."""

import json
import os
import time

import pytest
from click.testing import CliRunner
from models import random_model, read_model, write_model
from reference import quants
from rwkv_cpp import RWKVModel, bench, load_rwkv_shared_library
from rwkv_cpp.bench import Loading, Machine, Noise, Result, Round
from rwkv_cpp.info import inspect
from rwkv_cpp.library import Limits, Memory
from rwkv_cpp.model import EMBEDDED_MODEL

# ---- arithmetic ----


def test_shares():
    assert bench.reading_share(2_000_000_000, 0.1, 40e9) == pytest.approx(0.5)
    assert bench.operations(1_000_000, 256, 0.5) == pytest.approx(2 * 1e6 * 256 / 0.5)


def hand_made(decode, read, noise=None):
    """A round with one thread, whose limits are `read` bytes and 1000 and 4000 operations."""
    batch = {1: decode, 2: decode, 4: 2 * decode, 8: 2 * decode, 16: 4 * decode}
    return Round(Limits(1, read, 1000.0, 4000.0), decode, 256.0, batch, noise)


def test_figures_are_medians_of_the_rounds_that_count():
    memory = Memory(file=999, mapped=100, weights=200, scratch=30, state=4, token=250)
    # Reads 250, 125, …: of 500 that is 1/2, 1/4, 1/5, 1/8; of 2000, in the round of 0.25 s, 1/2.
    seconds = [1.0, 2.0, 2.5, 4.0]
    rounds = [{1: hand_made(s, 500.0)} for s in seconds] + [{1: hand_made(0.25, 2000.0)}]
    ignored = {1: hand_made(100.0, 1.0, Noise(0.0, 0.3))}
    loadings = [Loading(s, 10 * s, 300 if s == 1 else None) for s in (1, 2, 3, 4, 5)]
    result = Result("name", memory, 100, "DRAM", loadings, [*rounds, ignored])
    figures = result.figures()
    assert figures["load"]["seconds"] == 2  # of the first three
    assert figures["load"]["first_token_seconds"] == 20
    assert figures["memory"] == {"estimate": 334, "growth": 300}
    speed = figures["threads"]["1"]
    assert (speed["rounds"], speed["rounds_discarded"], speed["noise"]) == (5, 1, 0)
    assert speed["limits"] == {"read": 500, "read_from": "DRAM", "fp32": 1000, "int8": 4000}
    assert speed["decode"]["seconds"] == 2
    assert speed["decode"]["bytes"] == 125
    assert speed["decode"]["share"] == 0.25
    assert speed["prompt"]["tokens"] == 1
    assert speed["prompt"]["operations"] == 200
    assert speed["prompt"]["share_of_fp32"] == pytest.approx(0.2)
    assert speed["prompt"]["share_of_int8"] == pytest.approx(0.05)
    assert {n: row["ratio"] for n, row in speed["batch"].items()} == {
        "1": 1,
        "2": 2,
        "4": 2,
        "8": 4,
        "16": 4,
    }
    assert speed["batch"]["8"]["tokens"] == pytest.approx(8 / (2 * 2.0))


def test_limit_that_applies():
    machine = Machine("cpu", "avx2", 32 << 20, 1 << 30, {})
    assert machine.limit_name(32 << 20) == "LLC"
    assert machine.limit_name((32 << 20) + 1) == "DRAM"
    assert Machine("cpu", "avx2", None, 1 << 30, {}).limit_name(1) == "DRAM"


# ---- noise ----


@pytest.mark.parametrize(
    ("levels", "n_measured", "kept"),
    [
        ([0, 0.01, 0, 0, 0, 0], 5, [0, 0, 0, 0, 0.01]),
        ([0.5, 0, 0.02, 0, 0, 0, 0], 7, [0, 0, 0, 0, 0, 0.02, 0.5]),
        ([0.5, 0.3, 0.4] + 20 * [0.6], 10, [0.3, 0.4, 0.5] + 7 * [0.6]),
    ],
)
def test_noisy_repetitions_are_done_again(levels, n_measured, kept):
    left = iter(levels)
    results = bench.repeat(lambda: Noise(0.0, next(left)), lambda noise: [noise], 5)
    assert [noise.others for noise in results] == kept
    assert len(list(left)) == len(levels) - n_measured


def test_loudest():
    assert bench.loudest([]) == 0
    assert bench.loudest([None, Noise(0.2, 0.1), Noise(0.0, 0.15)]) == 0.2


def test_watch_does_not_count_this_process():
    watch = bench.Watch()
    before = time.process_time()
    while time.process_time() - before < 0.2:
        pass
    noise = watch.read()
    if noise is None:
        pytest.skip("this system does not say what other programs do")
    assert 0 <= noise.steal <= 1
    assert 0 <= noise.others <= 1


def test_watch_counts_cpus_of_this_process_only(monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("needs affinity")
    stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 {} 0 0 0 0 0 0 {} 0 0\ncpu1 {} 0 0 5 5 0 0 0 0 0\n"
    files = iter([stat.format(0, 0, 0), stat.format(150, 100, 900)])
    clocks = iter([0.0, 10.0])
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clocks))
    monkeypatch.setattr(bench.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(bench.Path, "read_text", lambda path, encoding: next(files))
    noise = bench.Watch().read()
    # 1.5 s busy and 1 s stolen of 10 s, less what a tick of 0.01 s may be off by
    assert noise == pytest.approx((0.099, 0.149))


# ---- models ----


@pytest.mark.parametrize("name", quants.TYPE_IDS)
def test_random_model_is_one(tmp_path, name):
    path = tmp_path / "model.bin"
    bench.write_random_model(path, name, 300, 64, 2)
    library = load_rwkv_shared_library()
    assert inspect(path).memory == library.rwkv_estimate_shape(300, 64, 2, name)
    with RWKVModel(None, path, 1) as model:
        logits, _ = model.eval_sequence([1, 2, 3], None)
        assert abs(logits).max() < 1e3
        assert logits.std() > 0
    weights = read_model(path)["blocks.1.ffn.value.weight"].values()
    assert weights.std() == pytest.approx(0.02, rel=0.05)


def test_repeated():
    data = bytes(range(10))
    pieces = bench._repeated(data, 7, 25)
    assert b"".join(pieces) == data[7:] + data + data + data[:2]
    assert b"".join(bench._repeated(data, 2, 5)) == data[2:7]


def test_disk_that_is_too_small(monkeypatch):
    with pytest.raises(OSError, match="TMPDIR"), bench._temporary_folder(1 << 60):
        pass


# ---- the command ----


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs `rwkv bench` on small things, in this process."""
    for name, value in {
        "REPETITIONS": 2,
        "LOADINGS": 1,
        "_PATIENCE": 1,
        "_SECONDS": 1e-3,
        "_N_VOCAB": 300,
    }.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "_SAMPLE", 1 << 20)
    monkeypatch.setattr(bench, "cache_size", lambda: 1 << 20)
    monkeypatch.setitem(bench.SIZES, "169M", (2, 64))
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def run(*arguments):
        result = CliRunner().invoke(bench.command, [str(a) for a in arguments])
        assert not list((tmp_path / "temporary").iterdir())
        return result

    return run


def test_shape_json_and_plot(quick, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "roofline.png"
    done = quick(
        "--shape", "169M", "--format", "fp16", "--format", "Q4_1_O", "--format", "FP32",
        "--threads", "1,2", "--json", "--plot", picture,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert set(figures) == {
        "cpu", "kernels", "llc_bytes", "noise_known", "limits", "options", "models",
    }  # fmt: skip
    assert list(figures["limits"]) == ["1", "2"]
    assert [model["name"] for model in figures["models"]] == [
        "169M FP16",
        "169M Q4_1_O",
        "169M FP32",
    ]
    for model in figures["models"]:
        library = load_rwkv_shared_library()
        memory = library.rwkv_estimate_shape(300, 64, 2, model["name"].split()[1])
        assert model["file_bytes"] == memory.file
        assert model["token_bytes"] == memory.token
        assert model["layer_weights"] == 2 * 13 * 64 * 64
        assert list(model["threads"]) == ["1", "2"]
        for speed in model["threads"].values():
            assert speed["rounds"] == 2
            assert speed["limits"]["read_from"] == "LLC"
            assert 0 < speed["decode"]["share"] < 1.5
            assert 0 < speed["prompt"]["share_of_int8"] < 1
            assert list(speed["batch"]) == ["1", "2", "4", "8", "16"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_model_and_table(quick, tmp_path):
    path = tmp_path / "small.bin"
    write_model(path, random_model(1, n_embed=32, n_layer=1))
    done = quick("-m", path, "--format", "FP32", "--format", "q5_1", "--threads", "2")
    assert done.exit_code == 0, done.output
    for text in ("small FP32, 2 thr.", "small Q5_1, 2 thr.", "decode", "prompt of 256", "8 over 1"):
        assert text in done.stdout
    assert path.is_file()


def test_model_as_it_is(quick, tmp_path):
    path = tmp_path / "small.bin"
    write_model(path, random_model(1, n_embed=32, n_layer=1), "Q4_0")
    done = quick("-m", path, "--threads", "1", "--json")
    (model,) = json.loads(done.stdout)["models"]
    assert model["name"] == "small Q4_0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", str(EMBEDDED_MODEL), "--shape", "3B"], "exclude"),
        (["--shape", "5B"], "5B"),
        (["--threads", "1,x"], "no list of numbers"),
        (["--threads", "1,0"], "1 to 1024"),
    ],
)
def test_wrong_usage(quick, arguments, message):
    done = quick(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_plot_without_matplotlib(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    done = quick("--shape", "169M", "--plot", tmp_path / "x.png")
    assert done.exit_code == 2
    assert "rwkv-ggml[plot]" in done.stderr


def test_unknown_format(quick):
    done = quick("--shape", "169M", "--format", "Q9_9")
    assert isinstance(done.exception, ValueError)
    assert "unknown format 'Q9_9'" in str(done.exception)
