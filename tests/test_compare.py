"""compare.py: each row against `rwkv perplexity --compare` on files that `rwkv quantize` writes."""

import json
import math

import pytest
from click.testing import CliRunner
from commands import rwkv
from models import random_model, write_model
from reference import quants
from rwkv_cpp import RWKVFileError, RWKVModel, bench, load_rwkv_shared_library, load_tokenizer
from rwkv_cpp import compare as module
from rwkv_cpp.bench import Noise
from rwkv_cpp.perplexity import measure
from rwkv_cpp.quantize import quantize_file
from rwkv_cpp.scoring import Mean

TEXT = "To be, or not to be, that is the question:\n" * 3
QUANTIZED = [name for name in quants.TYPE_IDS if name not in ("FP32", "FP16")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "FP16", table_type="FP16")
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "_SECONDS", 0.001)
    monkeypatch.setattr(bench, "QUIET", 2.0)


def run(*arguments):
    done = CliRunner().invoke(
        module.command, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout


def test_all_formats(path, text, quick, tmp_path):
    library = load_rwkv_shared_library()
    found = json.loads(run(path, text, "--json", "--skip", 3, "--limit", 100, "--threads", 1))
    assert (found["base"], bool(found["cpu"])) == ("FP16", True)
    rows = {row["format"]: row for row in found["formats"]}
    assert list(rows) == ["FP16", *QUANTIZED]
    tokens = [list(TEXT.encode()[:100])]
    with RWKVModel(None, path, 1) as base:
        for name, row in rows.items():
            file = path
            if name != "FP16":
                file = tmp_path / "quantized.bin"
                quantize_file(path, file, name)
            with RWKVModel(None, file, 1) as model:
                expected = measure(model, load_tokenizer(256), tokens, skip=3, base=base)
            assert row["file_bytes"] == file.stat().st_size
            assert row["memory"] == library.rwkv_estimate(file).total
            assert row["loss_per_token"] == expected.loss_per_token.value
            assert row["kl_divergence"] == expected.comparison.divergence.value
            assert row["kl_divergence_error"] == expected.comparison.divergence.error
            assert row["top_1_agreement"] == expected.comparison.agreement.value
            assert 100 < row["decoded_tokens_per_second"] < 1e7
            assert (row["kl_divergence"] == 0) == (name == "FP16")
    assert rows["Q8_0"]["kl_divergence"] < rows["Q5_1"]["kl_divergence"]
    assert rows["Q5_1"]["kl_divergence"] < rows["Q4_0"]["kl_divergence"]


def test_markdown(path, text, quick):
    lines = run(path, text, "--formats", "q8_0, FP16,Q4_0").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert {len(row) for row in cells} == {9}
    assert [row[0] for row in cells] == ["format", "---", "FP16", "Q4_0", "Q8_0"]
    assert cells[0][3] == "change from FP16"
    assert cells[2][3:7] == ["0", "0", "0", "100.00%"]
    assert cells[2][1] == f"{path.stat().st_size:,}"
    assert " ± " in cells[3][4]
    assert lines[5] == ""
    assert lines[6].startswith(f"{len(TEXT) - 1:,} tokens ({len(TEXT) - 1:,} bytes); loss in nats")


def test_options_are_of_the_formats(path, text, quick):
    """The model that they are compared with is as exact as it can be."""
    (row,) = json.loads(run(path, text, "--json", "--formats", "FP16", "--head", "Q8_0"))["formats"]
    assert row["kl_divergence"] > 0


def test_plot(path, text, quick, tmp_path):
    pytest.importorskip("matplotlib")
    run(path, text, "--formats", "Q4_0,FP16", "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_noise_is_told(path, text, quick, monkeypatch):
    monkeypatch.setattr(bench.Watch, "read", lambda self: Noise(0.25, 3.0))
    last = run(path, text, "--formats", "Q4_0").splitlines()[-1]
    assert last == "Q4_0: disturbed, others had up to 300.0% of the CPUs' time."


def test_digits():
    assert module._with_error(Mean(1.23456, 0.0321)) == "1.235 ± 0.032"
    assert module._with_error(Mean(0.0027, 0.00084), sign="+") == "+0.00270 ± 0.00084"
    assert module._with_error(Mean(-0.0027, 0.00084), sign="+") == "-0.00270 ± 0.00084"
    assert module._with_error(Mean(1.244e-5, 5e-7)) == "1.24e-05 ± 5.0e-07"
    assert module._with_error(Mean(123.4, 30)) == "123 ± 30"
    assert module._with_error(Mean(0.5, math.nan)) == "0.50000"
    assert module._with_error(Mean(0, 0), sign="+") == "0"


# ---- bad input ----


def test_formats(path, tmp_path):
    library = load_rwkv_shared_library()
    assert module.formats_of(path, "ALL", library) == ["FP16", *QUANTIZED]
    assert module.formats_of(path, "3,q4_0,2", library) == ["Q4_0", "Q4_1"]
    with pytest.raises(ValueError, match="unknown format 'Q9'"):
        module.formats_of(path, "Q4_0,Q9", library)
    with pytest.raises(ValueError, match=r"is in FP16 and cannot be turned into FP32 \(choose"):
        module.formats_of(path, "FP32,Q4_0", library)
    write_model(tmp_path / "model.bin", random_model(2, n_embed=32, n_layer=1), "Q5_1")
    with pytest.raises(RWKVFileError, match="is quantized, in Q5_1: expected an FP32 or FP16"):
        module.formats_of(tmp_path / "model.bin", "all", library)


def test_errors_are_one_line(path, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for arguments, message in (
        (["missing.bin", text], "missing.bin"),
        ([path, "missing.txt"], "missing.txt"),
        ([path, text, "--formats", "Q9_9"], "unknown format 'Q9_9'"),
        ([path, text, "--formats", ""], "unknown format ''"),
        ([path, empty], "the text has 0 tokens"),
        ([path, text, "--skip", 999], "expected at least 1000"),
    ):
        done = rwkv("compare", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
