"""What a line does that a user enters in a chat: one table of commands, and no terminal."""

from __future__ import annotations

import contextlib
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import styles
from .conversation import Conversation, Turn
from .conversation_store import ConversationStore
from .errors import RWKVError
from .sampling import FIELDS
from .sampling_options import value_of
from .state import StateNotice

MAX_MESSAGE_CHARACTERS = 1 << 20
INSTRUCT_STYLE = "raven-instruct"  # of +i


class Screen(Protocol):
    """Where a chat writes to."""

    def begin(self, name: str) -> None:
        """What comes next is said by the model; its name is "" for a free text."""

    def write(self, text: str) -> None:
        """A piece of what the model says."""

    def end(self) -> None:
        """It has ended."""

    def note(self, text: str) -> None:
        """Something that the chat itself has to say, in one line or several."""


@contextlib.contextmanager
def told_notices(screen: Screen) -> Iterator[None]:
    """Tell the notices about states as notes, once the block has ended."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StateNotice)
        yield
    for warning in caught:
        if issubclass(warning.category, StateNotice):
            screen.note(str(warning.message))


class Chat:
    """A conversation that a user holds line by line, saved after each.

    enter() carries out a line; whatever is wrong with it is told by a note. Only KeyboardInterrupt
    comes out, when the conversation was cancelled while a text was being read.
    """

    def __init__(
        self, conversation: Conversation, name: str, store: ConversationStore, screen: Screen
    ) -> None:
        self.conversation = conversation
        self.name = name
        self._store = store
        self._screen = screen
        self._save_failed = False

    def enter(self, line: str) -> None:
        line = _sound(line)
        if len(line) > MAX_MESSAGE_CHARACTERS:
            self._screen.note(
                f"the message has {len(line):,} characters, at most {MAX_MESSAGE_CHARACTERS:,}"
                " are read: nothing was sent"
            )
            return
        try:
            with told_notices(self._screen):
                self._enter(line)
        except (RWKVError, ValueError, TypeError, MemoryError) as error:
            self._screen.note(str(error) or "out of memory")
        except OSError as error:
            if error.filename is None:  # it is the screen that failed
                raise
            self._screen.note(f"{error.filename}: {error.strerror}")

    def _enter(self, line: str) -> None:
        if not line.strip():
            return
        if line[0] not in "+/":
            text, options = self._message(line)
            self._answer(self.conversation.say(text, **options))
            return
        word, *rest = line.split(maxsplit=1)
        argument = "".join(rest).strip()
        command = next((c for c in COMMANDS if c.word == word.lower()), None)
        if command is None:
            raise ValueError(
                f"unknown command {word}: /help lists all; to say it, begin with a space"
            )
        options = {}
        if command.writes:
            argument, options = self._message(argument)
            argument = argument.strip()
        if argument and not command.argument:
            raise ValueError(f"{word} takes nothing after it; to say it, begin with a space")
        if not argument and command.argument and not command.argument.startswith("["):
            raise ValueError(f"expected {word} {command.argument}: {command.help}")
        command.run(self, argument, **options)

    def _message(self, text: str) -> tuple[str, dict[str, float]]:
        """The text without its options, with its line breaks; fields of Sampling."""
        sampling: dict[str, float] = {}
        for match in reversed(list(_OPTION.finditer(text))):
            word, (field, low, high) = match[0].strip(), _OPTIONS[match[1]]
            value = _number(match[2])
            if not value >= 0:
                self._screen.note(f"{word} is no number in {low:g}..{high:g}: sent as text")
                continue
            clamped = min(max(value, low), high)
            if clamped != value:
                self._screen.note(f"{word}: taken as {clamped:g}, of {low:g}..{high:g}")
            sampling.setdefault(field, clamped)
            text = text[: match.start()] + text[match.end() :]
        return _LINE_BREAK.sub(lambda match: "\n" if match[0] == "\\n" else "\\n", text), sampling

    # ---- What the model writes -------------------------------------------------------------------

    def _answer(self, pieces: Iterator[str]) -> None:
        """Write out the answer of a turn, and save the conversation."""
        style = self.conversation.style
        if self._show(pieces, f"{style.bot}{style.separator}"):
            self._save()

    def _free(self, pieces: Iterator[str]) -> None:
        self._show(pieces, "")

    def _show(self, pieces: Iterator[str], name: str) -> bool:
        """Whether anything was written."""
        begun = False
        try:
            for piece in pieces:
                text = piece if begun or not name else piece.lstrip()
                if text and not begun:
                    self._screen.begin(name)
                    begun = True
                if text:
                    self._screen.write(text)
        finally:
            if begun:
                self._screen.end()
        completion = self.conversation.last
        reason = completion.finish_reason if completion else ""
        if not begun:
            self._screen.note("no answer" if reason == "cancelled" else "the model has no answer")
        elif reason == "length":
            self._screen.note(f"stopped after {self.conversation.max_tokens} tokens (max_tokens)")
        elif reason == "cancelled":
            self._screen.note("stopped")
        return begun

    def retry(self, argument: str, **sampling: float) -> None:
        self._answer(self.conversation.retry(**sampling))

    def write_again(self, argument: str, **sampling: float) -> None:
        self._free(self.conversation.write_again(**sampling))

    def write_on(self, argument: str, **sampling: float) -> None:
        self._free(self.conversation.write_on(**sampling))

    def write(self, text: str, **sampling: float) -> None:
        self._free(self.conversation.write("\n" + text, None, (), **sampling))

    def instruct(self, text: str, **sampling: float) -> None:
        style = styles.find(INSTRUCT_STYLE)
        prompt = f"{style.start}\n\n{style.turn(text)}"
        self._free(self.conversation.write(prompt, None, style.stop, **sampling))

    def ask_anew(self, text: str, **sampling: float) -> None:
        prompt = f"\nQ: {styles.fold(text)}\nA:"
        self._free(self.conversation.write(prompt, None, ("\nQ:",), **sampling))

    def ask_aside(self, text: str, **sampling: float) -> None:
        self._free(self.conversation.aside(text, **sampling))

    # ---- The conversation ------------------------------------------------------------------------

    def reset(self, argument: str) -> None:
        self._begin(self.conversation.fresh())

    def prompt(self, name: str) -> None:
        old = self.conversation
        style = styles.find(name)
        conversation = Conversation(
            old.model,
            style,
            max_tokens=old.max_tokens,
            progress=old.progress,
            starts=old.starts,
        )
        conversation.cancel = old.cancel
        conversation.start  # noqa: B018 - read now: if that fails or is stopped, all stays as it was
        self._begin(conversation)

    def back(self, argument: str) -> None:
        number = _number(argument or "1")
        if number != number // 1:
            raise ValueError(f"expected a number of turns, found '{argument}'")
        undone = self.conversation.back(int(number))
        self._save()
        self._screen.note(f"took back {_turns(undone)}. The conversation now ends with:")
        self.show_end()

    def branch(self, name: str) -> None:
        old = self.name
        conversation = self.conversation.copy()
        self._save_as(name or self._store.new_name(), conversation)
        self._screen.note(f"now in '{self.name}', a copy of '{old}', which stays as it is")

    def save(self, name: str) -> None:
        if name != self.name and self._store.exists(name):
            raise ValueError(f"there is a conversation '{name}' already: choose another name")
        self._store.save(name, self.conversation)
        self._screen.note(f"saved as '{name}': /load {name}, or rwkv chat --resume {name}")

    def load(self, name: str) -> None:
        if not name:
            self._list()
            return
        old = self.conversation
        conversation = self._store.load(name).open(old.model, old.progress, old.starts)
        conversation.cancel = old.cancel
        self.conversation, self.name = conversation, name
        self._screen.note(f"in '{name}', which ends with:")
        self.show_end()

    def show_end(self) -> None:
        """Tell the last turn."""
        style = self.conversation.style
        if not self.conversation.turns:
            self._screen.note("(nothing has been said yet)")
        for turn in self.conversation.turns[-1:]:
            self._screen.note(f"{style.user}{style.separator} {turn.user}")
            self._screen.note(f"{style.bot}{style.separator} {turn.answer}")

    def tokens(self, argument: str) -> None:
        turns = self.conversation.turns
        state = self.conversation.state
        n_start = turns[0].start if turns else len(state.tokens) if state else 0
        rows = [("start text", n_start)]
        rows += [(f"turn {i}", turn.end - turn.start) for i, turn in enumerate(turns, start=1)]
        rows += [("in all", turns[-1].end if turns else n_start)]
        if len(rows) > 12:
            rows[1:-10] = [("earlier turns", sum(number for _, number in rows[1:-10]))]
        lines = [f"{name:<14}{number:>8,} tokens" for name, number in rows]
        if state is not None:
            lines.append(f"the state that remembers them has {state.values.nbytes:,} bytes")
        if (last := self.conversation.last) and last.timings.seconds > 0:
            rate = last.timings.tokens / last.timings.seconds
            lines.append(f"the last answer: {last.timings.tokens} tokens, {rate:.1f} a second")
        self._screen.note("\n".join(lines))

    def settings(self, argument: str) -> None:
        conversation = self.conversation
        changes: dict[str, Any] = {}
        for word in argument.split():
            name, equals, text = word.partition("=")
            if name not in FIELDS and name != "max_tokens":
                raise ValueError(f"there is no setting '{name}': /settings shows all")
            if not equals:
                self._screen.note(f"{name} = {self._setting(name)}: {_help(name)}")
            elif name == "max_tokens":
                changes[name] = _count(text)
            else:
                changes[name] = value_of(name, text)
        max_tokens = changes.pop("max_tokens", conversation.max_tokens)
        conversation.sampling = conversation.sampling.changed(**changes)
        conversation.max_tokens = max_tokens
        if not argument:
            width = max(map(len, FIELDS))
            rows = [f"{name:<{width}}  {self._setting(name)}" for name in (*FIELDS, "max_tokens")]
            self._screen.note("\n".join([*rows, "/settings NAME=VALUE changes, NAME explains one"]))
        self._save()

    def help(self, argument: str) -> None:
        self._screen.note(help_text())

    # ---- Names -----------------------------------------------------------------------------------

    def _begin(self, conversation: Conversation) -> None:
        """Go on in a conversation without turns."""
        old = self.name if self.conversation.turns else None
        self.conversation, self.name = conversation, self._store.new_name()
        kept = f"; the last one is kept: /load {old}" if old else ""
        self._screen.note(f"a new conversation, style {conversation.style.name}{kept}")

    def _save_as(self, name: str, conversation: Conversation) -> None:
        if self._store.exists(name):
            raise ValueError(f"there is a conversation '{name}' already: choose another name")
        self._store.save(name, conversation)
        self.conversation, self.name = conversation, name

    def _save(self) -> None:
        """Save what there is. A disk that fails is no reason to stop talking."""
        if not self.conversation.turns and not self._store.exists(self.name):
            return
        try:
            self._store.save(self.name, self.conversation)
        except OSError as error:
            if not self._save_failed:
                self._screen.note(f"the conversation is not saved: {error.strerror or error}")
            self._save_failed = True

    def _list(self) -> None:
        rows = [
            f"{saved.name:<24}{time.strftime('%Y-%m-%d %H:%M', time.localtime(saved.when))}"
            f"  {_turns(saved.turns):<10}{_excerpt(saved.turns)}"
            for saved in self._store.all()
        ]
        self._screen.note("\n".join(rows) if rows else "no conversation is saved yet")

    def _setting(self, name: str) -> Any:
        is_sampling = name in FIELDS
        return getattr(self.conversation.sampling if is_sampling else self.conversation, name)


# ---- The table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """argument: what follows the word, in brackets if it may be left out. run: a method of Chat,
    called with the argument. writes: the model does, so that the options of messages are taken, and
    given to `run` as fields of Sampling."""

    word: str
    argument: str
    help: str
    run: Callable[..., None]
    writes: bool = False


COMMANDS = (
    Command("+", "", "another answer to the last message", Chat.retry, True),
    Command("/back", "[N]", "take back the last N turns (1)", Chat.back),
    Command("/branch", "[NAME]", "go on in a copy; what was said so far stays", Chat.branch),
    Command("/save", "NAME", "keep the conversation as it is now under a name", Chat.save),
    Command("/load", "[NAME]", "go on with a saved one; without NAME, list them", Chat.load),
    Command("+reset", "", "a new conversation", Chat.reset),
    Command("+prompt", "STYLE|FILE", "a new conversation in another style", Chat.prompt),
    Command("+gen", "TEXT", "continue TEXT alone, apart from the conversation", Chat.write, True),
    Command("+i", "TEXT", "carry out the instruction TEXT, apart from it", Chat.instruct, True),
    Command("+qq", "TEXT", "answer the question TEXT, apart from it", Chat.ask_anew, True),
    Command("+qa", "TEXT", "answer TEXT as if it were the first message", Chat.ask_aside, True),
    Command("++", "", "write the last of +gen, +i, +qq, +qa, +++ anew", Chat.write_again, True),
    Command("+++", "", "go on where that ended", Chat.write_on, True),
    Command("/tokens", "", "how many tokens were read", Chat.tokens),
    Command("/settings", "[NAME=VALUE …]", "show or change how answers are sampled", Chat.settings),
    Command("/help", "", "this table", Chat.help),
)
IN_MESSAGES = {
    "-temp=X": "temperature of this answer, 0.2 to 5",
    "-top_p=X": "top_p of this answer, 0 to 1",
    "\\n": "a line break; a second backslash keeps it as it is",
}
KEYS = {
    "Alt-Enter": "a line break (also Esc, then Enter)",
    "Ctrl-C": "stop the answer, clear the line, or leave",
    "Ctrl-D": "leave",
}


def help_text() -> str:
    rows = {f"{command.word} {command.argument}": command.help for command in COMMANDS}
    rows |= IN_MESSAGES | KEYS
    return "\n".join(f"{word:<26}{text}" for word, text in rows.items())


def completions(line: str, store: ConversationStore) -> dict[str, str]:
    """What the last word of a line that is being typed may become: word -> explanation."""
    word, space, rest = line.partition(" ")
    if not space:
        return {c.word: c.help for c in COMMANDS if line and c.word.startswith(word)}
    if word == "/load":
        choices = {saved.name: _excerpt(saved.turns) for saved in store.all()}
    elif word == "+prompt":
        choices = {name: styles.find(name).about for name in styles.names()}
    elif word == "/settings":
        choices = {f"{name}=": _help(name) for name in (*FIELDS, "max_tokens")}
        rest = rest.rpartition(" ")[2]
    else:
        choices = {}
    return {name: text for name, text in choices.items() if name.startswith(rest)}


# ---- Words ---------------------------------------------------------------------------------------

# Options within a message, with the white space before them: field of Sampling, range.
_OPTIONS = {"temp": ("temperature", 0.2, 5.0), "top_p": ("top_p", 0.0, 1.0)}
_OPTION = re.compile(r"(?:^|\s)-(temp|top_p)=(\S*)(?!\S)")
_LINE_BREAK = re.compile(r"\\\\n|\\n")


def _sound(line: str) -> str:
    """The line with U+FFFD in place of what is no character. Bytes that the terminal's encoding
    does not know arrive as surrogates; they may be UTF-8 nevertheless."""
    try:
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _number(text: str) -> float:
    """NaN for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"max_tokens: expected a number of tokens, found '{text}'")
    return int(text)


def _help(name: str) -> str:
    if name == "max_tokens":
        return "Stop an answer after so many tokens."
    info = FIELDS[name]
    return f"{info.help} ({info.range})" if info.range else info.help


def _turns(turns: Sequence[Turn]) -> str:
    return f"{len(turns)} turn" + "s" * (len(turns) != 1)


def _excerpt(turns: tuple[Turn, ...]) -> str:
    text = " ".join(turns[-1].user.split()) if turns else ""
    return text if len(text) <= 40 else text[:39] + "…"
