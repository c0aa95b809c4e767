"""Conversations: turns of a user and a model, and the states between them.

    conversation = Conversation(model, styles.find("plain"))
    for text in conversation.say("Good morrow, my love!"):
        …                                # pieces of the answer
    for text in conversation.retry():
        …                                # another one
    conversation.back()                  # as if nothing had been said

A conversation is text that the model has read and written, and RWKV's memory of it is one small
state. So every turn keeps the state after it: going back takes no time, and nothing is ever read
twice. Of long conversations only the latest states are kept: further back the tokens are re-read,
which gives the same bits.
"""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .progress import Progress
from .sampling import SEEDS, Sampling
from .styles import Style, fold

if TYPE_CHECKING:
    from .generation import Completion
    from .prefix_cache import PrefixCache
    from .rwkv import RWKV
    from .state import State

MAX_TOKENS = 250  # of an answer, as the chat of 2023
KEPT_STATES = 64  # in memory: 0.3 GB of the largest model's


@dataclass
class Turn:
    """What a user said and the model answered.

    - start, end: how many tokens had been read before it, and after it.
    - finish_reason: as of a Completion.
    - state: after it; None: it was let go, the tokens tell it.
    - key: names the state in files.
    """

    user: str
    answer: str
    start: int
    end: int
    finish_reason: str
    state: State | None
    key: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass
class _Attempt:
    """Something that the model wrote, ready to be written anew.

    asked: the state before it. number: of attempts so far, which tells one seed's answers apart.
    """

    asked: State
    sampling: Sampling
    stop: tuple[str, ...] = ()
    number: int = 0

    def again(self, sampling: Sampling) -> _Attempt:
        return replace(self, sampling=sampling, number=self.number + 1)


class Conversation:
    """A model, a style, settings and the turns so far.

    say, retry, write, aside, write_again and write_on yield the pieces of what the model writes;
    leave one early and it is as if it had not been called. `cancel`, when it is set by another
    thread or a signal's handler, ends an answer where it is, which is then kept; while a text is
    still being read, KeyboardInterrupt is raised, and nothing is changed.

    - sampling, max_tokens: of the answers; by default those of the style, and MAX_TOKENS.
    - progress: called while texts are read.
    - starts: where the state after the style's start text is looked for, and kept; no words of a
      user come there.
    """

    def __init__(
        self,
        model: RWKV,
        style: Style,
        *,
        sampling: Sampling | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: Progress | None = None,
        starts: PrefixCache | None = None,
    ) -> None:
        self.model = model
        self.style = style
        self.sampling = Sampling(**style.sampling) if sampling is None else sampling
        self.max_tokens = max_tokens
        self.turns: list[Turn] = []
        self.cancel = threading.Event()
        self.last: Completion | None = None  # what the model wrote last
        self.progress = progress
        self.starts = starts
        self._started: State | None = None
        self._chat: _Attempt | None = None  # at the last turn
        self._free: _Attempt | None = None
        self._written: State | None = None  # after the last free text

    # ---- Turns -----------------------------------------------------------------------------------

    def say(self, text: str, **sampling: Any) -> Iterator[str]:
        """Add a turn; yield the pieces of its answer. sampling: fields that differ for this one.

        The text is folded, see `styles.fold`. Raises ValueError if nothing is left of it.
        """
        text = fold(text)
        if not text:
            raise ValueError("the message is empty")
        changed = replace(self.sampling, **sampling)
        attempt = _Attempt(self._ask(text, self.turns), changed, self.style.stop)
        yield from self._answer(text, attempt, self.turns)

    def retry(self, **sampling: Any) -> Iterator[str]:
        """Answer the last turn anew; yield the pieces. Raises ValueError if there is none."""
        if not self.turns:
            raise ValueError("there is no answer yet that could be tried again")
        turn, earlier = self.turns[-1], self.turns[:-1]
        changed = replace(self.sampling, **sampling)
        if self._chat is None:  # the conversation was loaded, or went back
            asked = self._ask(turn.user, earlier)
            self._chat = _Attempt(asked, changed, self.style.stop)
        yield from self._answer(turn.user, self._chat.again(changed), earlier)

    def back(self, n: int = 1) -> list[Turn]:
        """Undo the last n turns and return them. Raises ValueError if there are not so many."""
        if not 1 <= n <= len(self.turns):
            turns = f"{len(self.turns)} turn" + "s" * (len(self.turns) != 1)
            raise ValueError(f"cannot go back {n}: the conversation has {turns}")
        left = self.turns[:-n]
        self._after(left)  # read again now, where it has to be: that may be interrupted
        undone, self.turns = self.turns[-n:], left
        self._chat = None
        return undone

    def copy(self) -> Conversation:
        """The same conversation: from here on the two go their own ways."""
        twin = copy.copy(self)
        twin.turns = [replace(turn) for turn in self.turns]
        return twin

    def fresh(self) -> Conversation:
        """A conversation without turns that has all else of this one."""
        twin = copy.copy(self)
        twin.turns, twin._chat = [], None
        return twin

    @property
    def start(self) -> State | None:
        """The state before the first turn, None for a style without a prompt."""
        if self._started is None and self.style.start:
            self._started = self._read_start()
        return self._started

    @property
    def state(self) -> State | None:
        """The state after the last turn."""
        return self._after(self.turns)

    # ---- Free texts, which are no part of the conversation ---------------------------------------

    def write(
        self, text: str, state: State | None = None, stop: tuple[str, ...] = (), **sampling: Any
    ) -> Iterator[str]:
        """Continue a text from a state, by default from nothing; yield the pieces."""
        asked = self._read(text, state)
        yield from self._write(_Attempt(asked, replace(self.sampling, **sampling), stop))

    def aside(self, text: str, **sampling: Any) -> Iterator[str]:
        """Answer a message as if it were the first one; yield the pieces."""
        newlines = "\n" if self.start is None else "\n\n"
        return self.write(newlines + self.style.turn(text), self.start, self.style.stop, **sampling)

    def write_again(self, **sampling: Any) -> Iterator[str]:
        """Write another text in place of the last. Raises ValueError if there is none."""
        if self._free is None:
            raise ValueError("no text has been written yet that could be written anew")
        yield from self._write(self._free.again(replace(self.sampling, **sampling)))

    def write_on(self, **sampling: Any) -> Iterator[str]:
        """Go on where the last text ended. Raises ValueError if there is none."""
        if self._written is None:
            raise ValueError("no text has been written yet that could go on")
        yield from self._write(_Attempt(self._written, replace(self.sampling, **sampling)))

    # ---- Reading and writing ---------------------------------------------------------------------

    def _ask(self, text: str, turns: list[Turn]) -> State:
        """The state where the answer to a message begins that follows the given first turns."""
        state = self._after(turns)
        if state is None:
            return self._read("\n" + self.style.turn(text), None)
        addition = "\n\n" + self.style.turn(text)
        # World has tokens such as an ideographic full stop with a newline. Training saw them here.
        tokenizer = self.model.tokenizer
        last = tokenizer.token_bytes(state.tokens[-1]) or b""
        joined = tokenizer.encode(last.decode(errors="replace") + addition)
        if not last or tokenizer.token_bytes(joined[0]) != last + b"\n":
            return self._read(addition, state)
        if self._chat is not None and turns == self.turns:
            known: State | None = self._chat.asked
        else:
            known = self._after(turns[:-1]) if turns else None
        begin = len(known.tokens) if known else 0
        return self._read([*state.tokens[begin:-1], *joined], known)

    def _answer(self, user: str, attempt: _Attempt, earlier: list[Turn]) -> Iterator[str]:
        """Write an answer; then the turns are the earlier ones and this one."""
        completion = yield from self._stream(attempt, self._without_banned(attempt.asked))
        if completion.finish_reason == "cancelled" and not completion.tokens:
            return
        # Of an empty answer, the state is the one whose logits were changed.
        state = completion.state if completion.tokens else attempt.asked
        turn = Turn(
            user,
            completion.text.strip(),
            start=earlier[-1].end if earlier else len(self.start.tokens if self.start else ()),
            end=len(state.tokens),
            finish_reason=completion.finish_reason,
            state=state,
        )
        self.turns = [*earlier, turn]
        self._chat = attempt
        for turn in self.turns[:-KEPT_STATES]:
            turn.state = None

    def _write(self, attempt: _Attempt) -> Iterator[str]:
        completion = yield from self._stream(attempt, attempt.asked)
        self._free, self._written = attempt, completion.state

    def _stream(self, attempt: _Attempt, state: State) -> Generator[str, None, Completion]:
        """Yield the pieces that the model writes after a state; return the Completion."""
        sampling = attempt.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + attempt.number) % SEEDS)
        stream = self.model.stream(
            "",
            state=state,
            sampling=sampling,
            max_tokens=self.max_tokens,
            stop=attempt.stop,
            cancel=self.cancel.is_set,
        )
        try:
            yield from stream
        finally:
            stream.close()
        self.last = stream.completion
        return stream.completion

    def _read(self, prompt: Any, state: State | None) -> State:
        return self.model.read(prompt, state, progress=self._report)

    def _read_start(self) -> State:
        tokens = self.model.tokenizer.encode(self.style.start)
        if self.starts is None:
            return self._read(tokens, None)
        known = self.starts.longest(self.model.cache_key, tokens)
        state = self._read(tokens[len(known.tokens) :] if known else tokens, known)
        self.starts.store(self.model.cache_key, state)
        return state

    def _report(self, what: str, done: int, total: int) -> None:
        if self.cancel.is_set():
            raise KeyboardInterrupt
        if self.progress is not None:
            self.progress(what, done, total)

    def _without_banned(self, state: State) -> State:
        """A copy whose logits rule out what an answer does not begin with."""
        encode = self.model.tokenizer.encode
        banned = [encode(text)[0] for text in self.style.ban_first]
        state = state.copy()
        if banned and state.logits is not None:
            state.logits[banned] = -np.inf
            state.arithmetic = None  # no prefix cache may take it for the model's own
        return state

    def _after(self, turns: list[Turn]) -> State | None:
        """The state after these, the first turns of the conversation."""
        if not turns:
            return self.start
        last = turns[-1]
        if last.state is None:
            tokens = next(turn.state.tokens for turn in reversed(self.turns) if turn.state)
            kept = [turn for turn in turns if turn.state]
            known = kept[-1].state if kept else None
            begin = len(known.tokens) if known else 0
            unread = list(tokens[begin : last.end])
            # What came next may have made its newline part of the last token, see _ask.
            piece = self.model.tokenizer.token_bytes(unread[-1]) or b""
            if piece.strip(b"\n") and piece.endswith(b"\n"):
                unread[-1:] = self.model.tokenizer.encode_bytes(piece.rstrip(b"\n"))
            last.state = self._read(unread, known)
        return last.state
