"""Runs the package's commands and scripts the way a shell does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import rwkv_cpp

PACKAGE_ROOT = str(Path(rwkv_cpp.__file__).parents[1])
CONSOLE = [sys.executable, "-c", "from rwkv_cpp.cli import main; main()"]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which the tested package is found from any folder."""
    return os.environ | {"PYTHONPATH": PACKAGE_ROOT, "PYTHONIOENCODING": "utf-8"} | variables


def rwkv(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run `rwkv …`; options as for subprocess.run."""
    return run([*CONSOLE, *arguments], **options)


def run(command: list[object], **options: object) -> subprocess.CompletedProcess:
    defaults = {"capture_output": True, "timeout": 120, "env": environment()}
    if "input" not in options and "stdin" not in options:
        defaults["stdin"] = subprocess.DEVNULL
    if not isinstance(options.get("input"), bytes):
        defaults |= {"encoding": "utf-8"}
    return subprocess.run([str(part) for part in command], **(defaults | options))
