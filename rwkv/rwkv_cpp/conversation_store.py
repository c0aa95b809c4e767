"""Conversations in files: saved as they go, found again by name.

Each is a folder in `conversations_folder()`:

    NAME/conversation.json   what was said, the style and the settings
    NAME/KEY.state           the state after a turn, of the latest turns

A state is written before the file that speaks of it and removed after that no longer does: whatever
happens in between, the conversation is whole.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import replacing
from .conversation import Conversation, Turn
from .errors import RWKVFileError
from .model import EMBEDDED_MODEL
from .progress import Progress
from .sampling import Sampling
from .state import State
from .styles import Style, from_json

if TYPE_CHECKING:
    from .prefix_cache import PrefixCache
    from .rwkv import RWKV

FORMAT, VERSION = "rwkv-conversation", 1
STATES_IN_FILES = 4  # of each conversation: so many turns back nothing is re-read
MAX_FILE_BYTES = 1 << 28

_FILE = "conversation.json"
_NAME = re.compile(r"\w([\w .-]{0,62}\w)?")


def conversations_folder() -> Path:
    """In `$RWKV_HOME`, by default in the user's data folder; it need not exist."""
    if home := os.environ.get("RWKV_HOME"):
        return Path(home) / "conversations"
    import platformdirs

    return platformdirs.user_data_path("rwkv-ggml", appauthor=False) / "conversations"


@dataclass(frozen=True)
class Saved:
    """A conversation as its file tells it. model_path: None for the embedded one."""

    folder: Path
    when: float  # of the last turn, seconds since 1970
    model_path: Path | None
    style: Style
    sampling: Sampling
    max_tokens: int
    turns: tuple[Turn, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def open(
        self, model: RWKV, progress: Progress | None, starts: PrefixCache | None = None
    ) -> Conversation:
        """The conversation, to go on with a model. progress, starts: as for Conversation.

        Raises ForeignState if it was held with another model; the same in another format goes on
        with a StateNotice. Raises RWKVFileError if the last state is missing or damaged.
        """
        conversation = Conversation(
            model,
            self.style,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            progress=progress,
            starts=starts,
        )
        for turn in self.turns[-STATES_IN_FILES:]:
            path = self.folder / f"{turn.key}.state"
            if path.exists():
                turn.state = State.load(path, model)
                if len(turn.state.tokens) != turn.end:
                    raise RWKVFileError(
                        f"{path}: the state is after {len(turn.state.tokens)} tokens, expected"
                        f" {turn.end}"
                    )
        if self.turns and self.turns[-1].state is None:
            raise RWKVFileError(f"'{self.folder}': the state after the last turn is missing")
        conversation.turns = list(self.turns)
        return conversation


class ConversationStore:
    """The saved conversations of a folder, by default `conversations_folder()`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = conversations_folder() if folder is None else folder

    def save(self, name: str, conversation: Conversation) -> None:
        """Write a conversation, or what is new in it. Raises OSError."""
        folder = self._of(name)
        for path in (self.folder, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        stored = set()
        for turn in conversation.turns[-STATES_IN_FILES:]:
            if turn.state is not None:
                path = folder / f"{turn.key}.state"
                stored.add(path.name)
                if not path.exists():
                    turn.state.save(path)
        model = Path(conversation.model.path)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": None if model == EMBEDDED_MODEL else str(model.absolute()),
            "style": conversation.style.as_json(),
            "sampling": {
                field.name: getattr(conversation.sampling, field.name)
                for field in fields(Sampling)
                if getattr(conversation.sampling, field.name) != getattr(Sampling(), field.name)
            },
            "max_tokens": conversation.max_tokens,
            "turns": [{name: getattr(turn, name) for name in _TURN} for turn in conversation.turns],
        }
        with replacing(folder / _FILE) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
        for path in folder.glob("*.state"):
            if path.name not in stored:
                path.unlink(missing_ok=True)

    def load(self, name: str) -> Saved:
        """The conversation of that name. Raises ValueError, or RWKVFileError if it is damaged."""
        folder = self._of(name)
        path = folder / _FILE
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES)
            when = path.stat().st_mtime
        except FileNotFoundError:
            raise ValueError(f"no conversation is called '{name}'") from None
        try:
            values = json.loads(content)
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"version {values['version']!r}, expected {VERSION}")
            return Saved(
                folder,
                when,
                None if values["model"] is None else Path(_checked(values["model"], (str,))),
                from_json(values["style"], "saved"),
                Sampling(**_sampling(values["sampling"])),
                _checked(values["max_tokens"], (int,)),
                tuple(map(_turn, values["turns"])),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise RWKVFileError(f"{path} is not a conversation, or damaged: {error}") from None

    def all(self) -> list[Saved]:
        """All that can be read, the one with the latest turn first."""
        found = []
        for path in self.folder.glob(f"*/{_FILE}"):
            try:
                found.append(self.load(path.parent.name))
            except (RWKVFileError, ValueError, OSError):
                continue
        return sorted(found, key=lambda saved: saved.when, reverse=True)

    def latest(self) -> Saved:
        """The one with the latest turn. Raises ValueError if there is none."""
        for saved in self.all():
            return saved
        raise ValueError(f"no conversation is saved yet in '{self.folder}'")

    def exists(self, name: str) -> bool:
        """Whether the name is taken. Raises ValueError for what cannot be a name."""
        return self._of(name).exists()

    def new_name(self) -> str:
        """A name that none has: today's date and the time."""
        name = time.strftime("%Y-%m-%d-%H%M%S")
        taken = (f"{name}-{number}" for number in range(2, 1000))
        while self.exists(name):
            name = next(taken)
        return name

    def _of(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"'{name}' cannot be a name: use up to 64 letters, digits, spaces and any of . _ -"
            )
        return self.folder / name


_TURN = {"user": str, "answer": str, "start": int, "end": int, "finish_reason": str, "key": str}


def _turn(values: dict[str, Any]) -> Turn:
    members = {name: _checked(values[name], (kind,)) for name, kind in _TURN.items()}
    turn = Turn(**members, state=None)
    if not re.fullmatch("[0-9a-f]{16}", turn.key):  # it becomes the name of a file
        raise ValueError(f"key {turn.key!r}")
    if not 0 <= turn.start < turn.end:
        raise ValueError(f"a turn of tokens {turn.start} to {turn.end}")
    return turn


def _checked(value: Any, kinds: tuple[type, ...]) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"found {value!r:.50}, expected {kinds[0].__name__}")
    return value


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of Sampling from JSON, which has no tuples and no numbers as keys."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if "logit_bias" in values:
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    return values
