"""Prompt styles: the words around what a user and a model say, as data.

    style = find("raven")        # one of styles/*.json, or the path of such a file

A model has seen conversations in a certain form, and answers well in that form only. With the
names and the separator of a style, a conversation is this text, begun by a newline:

    PROMPT

    USER: what the user says

    BOT: what the model answers

Two newlines stand only between turns. Each turn is read together with the newlines before it, so
that they become the tokens they were in training: two single newlines in the 20B vocabulary, where
a text that merely ends in two gets one token for both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import RWKVFileError
from .sampling import Sampling

STYLES = Path(__file__).parent / "styles"
MAX_FILE_BYTES = 1 << 20  # the published ones have a few kilobytes


@dataclass(frozen=True)
class Style:
    """What a file of a style holds; all but `user` and `bot` may be left out there.

    - about: what it is for, in a line.
    - user, bot: the two names.
    - separator: what follows a name.
    - gap: what stands between that and the words: a space, which is left to the model where it
      begins an answer since words are tokens together with it, or a newline.
    - prompt: the start text, a string or a list of its lines.
    - stop: what ends an answer, besides the end-of-text token.
    - ban_first: an answer does not begin with these.
    - sampling: fields of `Sampling`.
    """

    name: str
    user: str
    bot: str
    about: str = ""
    separator: str = ":"
    gap: str = " "
    prompt: str = ""
    stop: tuple[str, ...] = ("\n\n",)
    ban_first: tuple[str, ...] = ("\n", "\n\n")
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The text before the first turn."""
        return "\n" + self.prompt if self.prompt else ""

    def turn(self, text: str) -> str:
        """A turn up to where the answer begins, without the newlines before it."""
        return (
            f"{self.user}{self.separator}{self.gap}{fold(text)}"
            f"\n\n{self.bot}{self.separator}{self.gap.rstrip(' ')}"
        )

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes this style of again."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def fold(text: str) -> str:
    """A message without empty lines: these end a turn, and no message may forge the next one."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return re.sub(r"\n\s*\n", "\n", text)


def find(name: str | Path) -> Style:
    """The style of that name, in any case, or in that file. Raises ValueError or RWKVFileError."""
    ours = str(name).casefold()
    if ours in names():
        return read(STYLES / f"{ours}.json")
    if not Path(name).suffix and not Path(name).exists():
        raise ValueError(f"no style '{name}' (choose from {', '.join(names())}, or give a file)")
    return read(Path(name))


def names() -> list[str]:
    """Those of our own styles."""
    return sorted(path.stem for path in STYLES.glob("*.json"))


def read(path: Path) -> Style:
    """A style from a file: ours, or one of 2023 with user, bot, separator and prompt."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RWKVFileError(f"style '{path}': {error.strerror}") from error
    if path.suffix == ".py":
        raise RWKVFileError(
            f"style '{path}' is a program, which is not run: write its user, bot, interface (as"
            " separator) and init_prompt (as prompt) into a .json file"
        )
    if len(content) > MAX_FILE_BYTES:
        raise RWKVFileError(f"style '{path}' has more than {MAX_FILE_BYTES} bytes")
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RWKVFileError(f"style '{path}' is not a JSON file: {error}") from None
    try:
        return from_json(values, path.stem)
    except (TypeError, ValueError) as error:
        raise RWKVFileError(f"style '{path}': {error}") from None


def from_json(values: Any, name: str) -> Style:
    """A style from what a JSON file holds. Raises ValueError or TypeError, naming the field."""
    if not isinstance(values, dict):
        raise TypeError("expected an object with user and bot")
    values = {"name": name} | values
    if "assistant" in values:  # some files of 2023 call it so
        values.setdefault("bot", values.pop("assistant"))
    if isinstance(prompt := values.get("prompt"), list) and all(
        isinstance(line, str) for line in prompt
    ):
        values["prompt"] = "\n".join(prompt)
    known = {part.name for part in fields(Style)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown field '{unknown[0]}' (there are {', '.join(sorted(known))})")
    for key in ("user", "bot"):
        if not isinstance(values.get(key), str) or not values[key].strip() or "\n" in values[key]:
            raise ValueError(f"{key}: expected a name, found {values.get(key)!r}")
    for key in ("name", "about", "separator", "gap", "prompt"):
        if not isinstance(values.get(key, ""), str):
            raise TypeError(f"{key}: expected a text, found {values[key]!r}")
    for key in ("stop", "ban_first"):
        texts = values.get(key, ())
        if not isinstance(texts, (list, tuple)) or not all(
            isinstance(text, str) and text for text in texts
        ):
            raise TypeError(f"{key}: expected a list of texts, found {texts!r}")
        if key in values:
            values[key] = tuple(texts)
    sampling = values.get("sampling", {})
    if not isinstance(sampling, dict):
        raise TypeError(f"sampling: expected an object, found {sampling!r}")
    try:
        Sampling(**sampling)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampling: {error}") from None
    values["prompt"] = values.get("prompt", "").strip("\n")
    return Style(**values)
