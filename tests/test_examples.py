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
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path):
    """What a script prints, run in an empty folder that all runs of a test share."""

    def run(code: Path | str, *arguments: str) -> str:
        command = ["-c", code] if isinstance(code, str) else [str(code)]
        done = subprocess.run(
            [sys.executable, *command, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": PACKAGES},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
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
