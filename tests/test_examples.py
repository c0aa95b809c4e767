"""The scripts of examples/ do what they say, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rwkv_cpp
from rwkv_cpp import RWKV, State

ROOT = Path(__file__).parents[1]
PACKAGES = str(Path(rwkv_cpp.__file__).resolve().parents[1])  # where the tested one is
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path):
    """What a script prints, run in an empty folder that all runs of a test share."""

    def run(code: Path | str, *arguments: str) -> str:
        command = ["-c", code] if isinstance(code, str) else [str(code)]
        done = subprocess.run(
            [sys.executable, *command, *arguments],
            cwd=tmp_path,
            # Threads that wait for one another make a small product slow on a busy machine.
            env=os.environ | {"PYTHONPATH": PACKAGES, "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )
        assert done.stderr == ""
        assert done.returncode == 0
        return done.stdout

    return run


def test_every_script_is_tested():
    tests = Path(__file__).read_text("utf-8")
    assert all(f'"{path.name}"' in tests for path in SCRIPTS)


def test_resume(run):
    """Two processes write what one call does."""
    script = ROOT / "examples" / "resume.py"
    with RWKV() as rwkv:
        whole = rwkv.generate("ROMEO:", max_tokens=80, seed=1).text
    assert run(script) + run(script) == whole


def test_readme(run):
    """The five lines of the README, with a new process where they say so."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.S | re.M
    )
    (block,) = [block for block in blocks if "State.load" in block]
    first, then = re.split(r"^# .*new process.*\n", block, flags=re.M)
    with RWKV() as rwkv:
        whole = rwkv.generate("ROMEO:", max_tokens=80, seed=1).text
    assert run(first) + run("from rwkv_cpp import RWKV, State\n" + then) == whole


def test_ask_a_book(run, tmp_path):
    (tmp_path / "book.txt").write_text("To be, or not to be. " * 200, "utf-8")
    out = run(ROOT / "examples" / "ask_a_book.py", "book.txt")
    assert out.count("? (") == 4
    assert out.endswith("same as with the whole text in the prompt: True\n")
    assert len(State.load(tmp_path / "book.safetensors").tokens) > 500


def test_undo_and_branch(run):
    out = run(ROOT / "examples" / "undo_and_branch.py")
    assert out.count("\n...") == 3
    assert out.endswith("unchanged: True\n")


def test_thousand_conversations(run, tmp_path):
    out = run(ROOT / "examples" / "thousand_conversations.py", "120")
    assert "120 conversations began" in out
    assert "\n60: 'ROMEO:\\nI am number 60." in out
    assert len(list((tmp_path / "conversations").iterdir())) == 120


needs_text = pytest.mark.skipif(not TEXT.is_file(), reason=f"{TEXT} is absent")


@needs_text
def test_questions(run, tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "text").write_text(TEXT.read_text("utf-8")[-100_000:], "utf-8")
    lines = run(ROOT / "examples" / "questions.py", "text").splitlines()
    assert re.fullmatch(r"\d+ sentences to learn from, \d+ to ask about", lines[0])
    assert [line.count("all: 0.") for line in lines[1:6]] == [1] * 5
    assert [line.count("layer ") for line in lines[6:]] == [5] * 3


@pytest.mark.slow
@needs_text
def test_embeddings_beat_counts_of_bytes(run):
    """The table of docs/embeddings.md."""
    pytest.importorskip("sklearn")
    lines = run(ROOT / "examples" / "questions.py", str(TEXT)).splitlines()
    found = {line[:24].strip(): [*map(float, re.findall(r"0\.\d+", line))] for line in lines[1:6]}
    assert found.keys() >= {"bytes", "pairs of bytes"}
    for few in zip(*(found[name] for name in found), strict=True):
        by_name = dict(zip(found, few, strict=True))
        counted = max(by_name["bytes"], by_name["pairs of bytes"])
        assert by_name["aa/bb of all layers"] > counted + 0.03
