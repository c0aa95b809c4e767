"""Text for a terminal."""

from __future__ import annotations

# What moves a terminal's cursor or worse, shown as the escape that Python would write.
_CONTROL_CHARACTERS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def harmless(text: str) -> str:
    """The text with its control characters, but for tabs and newlines, written out."""
    return text.translate(_CONTROL_CHARACTERS)
