"""The `rwkv chat` command: a chat on a terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import styles
from .chat_commands import MAX_MESSAGE_CHARACTERS, Chat, completions, told_notices
from .conversation import MAX_TOKENS, Conversation
from .conversation_store import ConversationStore
from .library import MAX_THREADS
from .load_options import load_options, lora_option, model_option
from .progress import Progress, progress_bar
from .sampling_options import sampling_options
from .terminal import harmless
from .tokenizer import vocabulary_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from .prefix_cache import PrefixCache

# A Ctrl-C so soon after one that stopped an answer was meant for that answer.
SECOND_CTRL_C_SECONDS = 1.0


class ReadingBar:
    """A bar on stderr while a text is read that takes more than a moment."""

    def __init__(self) -> None:
        self._bar = contextlib.ExitStack()
        self._report: Progress | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if done >= total:
            self.close()
            return
        if self._report is None:
            self._report = self._bar.enter_context(progress_bar())
        self._report(what, done, total)

    def close(self) -> None:
        self._bar.close()
        self._report = None


class PipeScreen:
    """Lines come from stdin, answers go to stdout, each ended by a newline, notes to stderr."""

    def __init__(self) -> None:
        self.progress = ReadingBar()
        self._filter = harmless if sys.stdout.isatty() else str

    def read(self, prompt: str) -> str:
        """The next line. Raises EOFError."""
        line = sys.stdin.buffer.readline(4 * MAX_MESSAGE_CHARACTERS + 2)
        part = line
        while part and not part.endswith(b"\n"):  # a longer line than any message may be
            part = sys.stdin.buffer.readline(1 << 20)
        if not line:
            raise EOFError
        return line.decode(errors="replace").rstrip("\r\n")

    def begin(self, name: str) -> None:
        pass

    def write(self, text: str) -> None:
        click.echo(self._filter(text), nl=False)

    def end(self) -> None:
        click.echo()

    def note(self, text: str) -> None:
        self.progress.close()
        click.echo(harmless(text), err=True)


class TerminalScreen:
    """A terminal: lines are edited with prompt_toolkit, and kept in a file of their own."""

    def __init__(self, store: ConversationStore) -> None:
        self.progress = ReadingBar()
        self._session = _session(store)
        self._has_styles = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def read(self, prompt: str) -> str:
        """The next message. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        click.echo()
        return self._session.prompt(
            harmless(prompt), prompt_continuation=lambda width, line, wrapped: " " * width
        )

    def begin(self, name: str) -> None:
        click.echo("\n" + (harmless(name) + " " if name else ""), nl=False)

    def write(self, text: str) -> None:
        click.echo(harmless(text), nl=False)

    def end(self) -> None:
        click.echo()

    def note(self, text: str) -> None:
        self.progress.close()
        text = harmless(text)
        click.echo(click.style(text, dim=True) if self._has_styles else text)


def _session(store: ConversationStore) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            line = document.text_before_cursor
            for word, text in completions(line, store).items():
                typed = next(n for n in range(len(word), -1, -1) if line.endswith(word[:n]))
                yield Completion(word, start_position=-typed, display_meta=text)

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk
                super().store_string(string)

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    history: Any = InMemoryHistory()
    path = store.folder / "history"
    with contextlib.suppress(OSError):
        store.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        history = History(str(path))
    return PromptSession(
        history=history, completer=Commands(), key_bindings=keys, reserve_space_for_menu=6
    )


def converse(chat: Chat, screen: PipeScreen | TerminalScreen) -> None:
    """Carry out line after line until there are no more. KeyboardInterrupt ends it as well."""
    if isinstance(screen, PipeScreen):
        with contextlib.suppress(EOFError):
            while True:
                chat.enter(screen.read(""))
        return
    stopped = -SECOND_CTRL_C_SECONDS

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = time.monotonic()
        chat.conversation.cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        while True:
            style = chat.conversation.style
            try:
                line = screen.read(f"{style.user}{style.separator} ")
            except EOFError:
                return
            except KeyboardInterrupt:
                if time.monotonic() - stopped < SECOND_CTRL_C_SECONDS:
                    continue
                raise
            chat.conversation.cancel.clear()
            try:
                chat.enter(line)
            except KeyboardInterrupt:
                screen.note("stopped before an answer")
    finally:
        signal.signal(signal.SIGINT, before)


def _starts() -> PrefixCache:
    """What was read of styles, on disk unless that cannot be written to."""
    from .prefix_cache import PrefixCache

    try:
        return PrefixCache(folder=vocabulary_folder() / "prefixes")
    except OSError:
        return PrefixCache()


@click.command()
@model_option
@click.option(
    "--style",
    metavar="NAME|FILE",
    help=f"The form of the conversation: {', '.join(styles.names())}, or a file.  "
    "[default: the model's]",
)
@click.option(
    "--resume",
    metavar="[NAME]",
    is_flag=False,
    flag_value="",
    help="Go on with a saved conversation.  [without NAME: the latest]",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    help=f"Stop an answer after so many tokens.  [default: {MAX_TOKENS}]",
)
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="[default: physical cores]")
@click.option(
    "--vocab",
    "vocabulary",
    type=click.Path(path_type=Path),
    help="Vocabulary file.  [default: looked for]",
)
@functools.partial(sampling_options, as_changes=True)
@lora_option
@load_options
def command(
    model_path: Path | None,
    style: str | None,
    resume: str | None,
    max_tokens: int | None,
    threads: int | None,
    vocabulary: Path | None,
    sampling: dict[str, Any],
    lora: tuple[tuple[Path, float], ...],
    options: dict[str, Any],
) -> None:
    """Chat with a model.

    Lines are messages or commands: /help lists these. Each conversation is saved as it goes, in
    $RWKV_HOME or the user's data folder. Where stdin or stdout is no terminal, each line of stdin
    is answered on stdout.

    \b
    rwkv chat -m model.bin --style raven
    rwkv chat --resume
    echo "Good morrow, my love!" | rwkv chat
    """
    from .rwkv import RWKV

    form = styles.find(style) if style else None
    store = ConversationStore()
    saved = None
    if resume is not None:
        if form:
            raise click.UsageError("--resume keeps the style: leave out --style")
        saved = store.load(resume) if resume else store.latest()
        model_path = model_path or saved.model_path
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = TerminalScreen(store) if on_terminal else PipeScreen()
    starts = _starts()
    with RWKV(model_path, vocabulary=vocabulary, n_threads=threads, lora=lora, **options) as model:
        with told_notices(screen):
            if saved is not None:
                conversation = saved.open(model, screen.progress, starts)
            else:
                form = form or styles.find(model.style)
                conversation = Conversation(model, form, progress=screen.progress, starts=starts)
            conversation.state  # noqa: B018 - read before the first message is asked for
        conversation.sampling = conversation.sampling.changed(**sampling)
        conversation.max_tokens = max_tokens or conversation.max_tokens
        chat = Chat(conversation, saved.name if saved else store.new_name(), store, screen)
        if on_terminal:
            screen.note(
                f"{Path(model.path).name}, style {conversation.style.name}: /help lists the"
                " commands, Ctrl-D leaves"
            )
            if saved is not None:
                chat.show_end()
        converse(chat, screen)
