"""docs/troubleshooting.md quotes errors that the code really has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
SHORT = 8  # characters; what is shorter proves nothing


def sources() -> str:
    """All code, with strings that go over several lines joined."""
    files = [*ROOT.glob("*.cpp"), *ROOT.glob("ggml/*.c"), *ROOT.glob("rwkv/rwkv_cpp/**/*.py")]
    text = "\n".join(path.read_text("utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


QUOTED = re.findall(r"^\*\*`(.*?)`\*\*", PAGE, flags=re.MULTILINE)


def test_there_are_quotes():
    assert len(QUOTED) > 15


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_has_this_error(quoted):
    code = sources()
    pieces = [piece.strip(" '") for piece in quoted.split("…")]
    assert any(len(piece) >= SHORT for piece in pieces)
    for piece in pieces:
        assert len(piece) < SHORT or piece in code, piece
