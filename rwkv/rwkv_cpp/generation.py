"""Answers: written token by token, several at once, each with its own sampler and state."""

from __future__ import annotations

import abc
import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Real

import numpy as np

from .library import as_integer
from .model import RWKVSequence
from .progress import Progress
from .reading import Evaluate, advanced, read
from .sampling import Sampler, Sampling, TokenLogprob, top_logprobs
from .state import State
from .stopping import StopFinder, stop_strings, tokens_before
from .tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Timings:
    """What an answer took. Those of one batch are written together and share the times."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, read by the prefix cache
    prompt_seconds: float
    tokens: int  # written
    seconds: float  # to write them


@dataclass(frozen=True, eq=False)
class Completion:
    """An answer. `str(completion)` is its text.

    text: without the stop string that ended it. tokens: those of the text.
    logprobs: for each token its log-probability and the likeliest alternatives; None if not asked.
    finish_reason: "stop" (a stop string or token, the end of the text, or of the grammar), "length"
    (max_tokens), "time" (time_limit) or "cancelled".
    stop: the stop string or token that ended it, if one did.
    state: the model's after prompt and text, to go on from; what ended the answer is not in it. If
    the prompt could not be read to its end, the state before it.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stop: str | int | None
    state: State
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Rules:
    """How many answers each prompt gets, what ends them and what is told of them.

    The arguments of `RWKV.generate`. Raises ValueError or TypeError, naming the field, for a value
    that has no meaning.
    """

    max_tokens: int = 200
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    time_limit: float | None = None
    cancel: Callable[[], object] | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        as_integer(self.max_tokens, "max_tokens", 0, 1 << 62)
        as_integer(self.n, "n", 1, 1 << 16)
        limit = self.time_limit
        if limit is not None and not (isinstance(limit, Real) and limit >= 0):
            raise ValueError(f"time_limit: expected seconds >= 0, found {limit!r}")
        for name in ("cancel", "progress"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name}: expected a function, found {value!r}")
        if not isinstance(self.stop_tokens, Iterable):
            raise TypeError(f"stop_tokens: expected tokens, found {self.stop_tokens!r}")
        object.__setattr__(self, "stop", stop_strings(self.stop))
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))


RULES = tuple(field.name for field in fields(Rules))


@dataclass
class Prompt:
    """Tokens that are to be read after a state.

    n_cached: those of the prompt that the state has read already. store: called with the states
    that are worth keeping.
    """

    start: State
    tokens: Sequence[int]
    n_cached: int = 0
    store: Callable[[State], object] | None = None


class _Over(Exception):
    """Ends the reading of a prompt. The text is the finish reason."""


class Generation(abc.ABC):
    """The answers to some prompts, from reading these to the last token.

    `run` does it, once. At any time then `completions` tells how far it has come.
    """

    def __init__(
        self, evaluate: Evaluate, tokenizer: Tokenizer, prompts: list[Prompt], rules: Rules
    ) -> None:
        self._evaluate = evaluate
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._rules = rules
        self._reason = "cancelled"  # why an answer ended that says nothing else
        self._cancelled = False
        self._began = self._read = self._wrote = 0.0  # seconds of the clock

    def cancel(self) -> None:
        """End it before the next token; from any thread."""
        self._cancelled = True

    def run(self) -> Generator[tuple[int, str], None, None]:
        """Yield (number of the answer, its next piece of text): whole characters, never "".

        The answers to the first prompt come first.
        """
        rules = self._rules
        self._began = time.monotonic()
        try:
            readings = read(
                self._evaluate,
                [prompt.start for prompt in self._prompts],
                [prompt.tokens for prompt in self._prompts],
                progress=rules.progress,
                check=self._check,
            )
        except _Over as over:
            self._reason = str(over)
            return
        finally:
            self._read = self._wrote = time.monotonic()
        states = [reading.state() for reading in readings]
        self._store(range(len(states)), states)
        try:
            yield from self._write(states)
        finally:
            self._wrote = time.monotonic()
        if any(prompt.store for prompt in self._prompts):
            ended = self.completions()
            self._store([i // rules.n for i in range(len(ended))], [one.state for one in ended])

    def completions(self) -> list[Completion]:
        answers = self._answers() or [
            ("", [], [], self._reason, None, prompt.start.copy())
            for prompt in self._prompts
            for _ in range(self._rules.n)
        ]
        return [self._completion(i // self._rules.n, *answer) for i, answer in enumerate(answers)]

    def _completion(
        self,
        prompt_index: int,
        text: str,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish_reason: str,
        stop: str | int | None,
        state: State,
    ) -> Completion:
        prompt = self._prompts[prompt_index]
        timings = Timings(
            prompt_tokens=prompt.n_cached + len(prompt.tokens),
            cached_tokens=prompt.n_cached,
            prompt_seconds=self._read - self._began,
            tokens=len(tokens),
            seconds=self._wrote - self._read,
        )
        told = None if self._rules.logprobs is None else logprobs
        return Completion(text, tokens, told, finish_reason, stop, state, timings)

    @abc.abstractmethod
    def _write(self, states: list[State]) -> Iterator[tuple[int, str]]:
        """Write the answers that follow these states, which are not to be changed."""

    @abc.abstractmethod
    def _answers(self) -> list[Answered]:
        """All answers as far as they have come; none before they have begun."""

    def _over(self) -> str | None:
        """The finish reason if all has to end now."""
        rules = self._rules
        if self._cancelled or (rules.cancel is not None and rules.cancel()):
            return "cancelled"
        if rules.time_limit is not None and time.monotonic() - self._began >= rules.time_limit:
            return "time"
        return None

    def _check(self) -> None:
        if reason := self._over():
            raise _Over(reason)

    def _store(self, prompt_indices: Sequence[int], states: list[State]) -> None:
        for index, state in zip(prompt_indices, states, strict=True):
            if (store := self._prompts[index].store) is not None:
                store(state)


Answered = tuple[str, list[int], list[TokenLogprob], str, str | int | None, State]
"""text, tokens, logprobs, finish_reason, stop and state of a Completion."""


# ---- Sampling ------------------------------------------------------------------------------------


class SampledAnswers(Generation):
    """Each answer draws its tokens on its own. One call of the core evaluates those of all."""

    def __init__(
        self,
        evaluate: Evaluate,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        rules: Rules,
        sampling: Sampling,
    ) -> None:
        super().__init__(evaluate, tokenizer, prompts, rules)
        self._samplers = [
            new_sampler(prompt, sampling, tokenizer, number)
            for prompt in prompts
            for number in range(rules.n)
        ]
        self._list: list[_Answer] = []

    def _answers(self) -> list[Answered]:
        return [answer.answered(self._reason) for answer in self._list]

    def _write(self, states: list[State]) -> Iterator[tuple[int, str]]:
        self._list = [
            _Answer(states[i // self._rules.n], sampler, self._tokenizer, self._rules)
            for i, sampler in enumerate(self._samplers)
        ]
        active = list(enumerate(self._list))
        while active:
            reason = self._over()
            stepping, batch = [], []
            for _, answer in active:
                if reason is not None:
                    answer.finish(reason)
                elif (sequence := answer.choose(self._evaluate)) is not None:
                    stepping.append(answer)
                    batch.append(sequence)
            if batch:
                self._evaluate(batch)
                for answer in stepping:
                    answer.advance()
            for number, answer in active:
                if answer.piece:
                    yield number, answer.piece
            active = [(number, answer) for number, answer in active if not answer.finish_reason]


def new_sampler(
    prompt: Prompt, sampling: Sampling, tokenizer: Tokenizer, stream: int = 0
) -> Sampler:
    """For an answer; where there is nothing to read, for the rest of one that was interrupted."""
    start = prompt.start
    first = len(start.tokens) - (0 if prompt.tokens else start.n_generated)
    history = start.tokens[first:]
    n_vocab = tokenizer.n_vocab
    return Sampler(sampling, n_vocab, tokenizer=tokenizer, history=history, stream=stream)


class _Track:
    """The tokens that a sequence has read since a start, and the state and the logits after them.

    Two sets of buffers take turns, and a single assignment passes from one to the other. So
    whatever interrupts an evaluation, Ctrl-C just after it too, the three belong together.
    """

    def __init__(self, start: State) -> None:
        self._start = start
        self._tokens: list[int] = []
        values, logits = start.values.copy(), np.array(start.logits, np.float32)
        self._buffers = (values, logits), (np.empty_like(values), np.empty_like(logits))
        self._at = 0, 0  # the buffers in use, the tokens read

    @property
    def logits(self) -> np.ndarray:
        return self._buffers[self._at[0]][1]

    @property
    def n_tokens(self) -> int:
        return self._at[1]

    @property
    def position(self) -> int:
        """How many tokens were read, with those before the start."""
        return len(self._start.tokens) + self._at[1]

    def tokens(self) -> list[int]:
        return self._tokens[: self.n_tokens]

    def next(self, token: int) -> RWKVSequence:
        """What has to be evaluated to read a token; then `advance`."""
        which, n_tokens = self._at
        values, _ = self._buffers[which]
        values_out, logits_out = self._buffers[1 - which]
        self._tokens[n_tokens:] = [token]
        adapter = self._start.adapter
        return RWKVSequence((token,), values, values_out, logits_out[None], adapter=adapter)

    def advance(self) -> None:
        which, n_tokens = self._at
        self._at = 1 - which, n_tokens + 1

    def state(self) -> State:
        which, n_tokens = self._at
        values, logits = self._buffers[which]
        n_generated = self._start.n_generated + n_tokens
        tokens = self._tokens[:n_tokens]
        return advanced(self._start, tokens, values.copy(), logits.copy(), n_generated)


class _Answer:
    """One answer on its way. finish_reason: None until it has ended. piece: its newest text."""

    def __init__(self, start: State, sampler: Sampler, tokenizer: Tokenizer, rules: Rules) -> None:
        self.finish_reason: str | None = None
        self.piece = ""
        self._stop: str | int | None = None
        self._start = start
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._rules = rules
        self._track = _Track(start)
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._decoder = StreamDecoder(tokenizer)
        self._finder = StopFinder(rules.stop)
        # Where text began to be held back that still is: the state and the tokens written there,
        # and how much text was let out since.
        self._mark: State | None = None
        self._n_marked = 0
        self._let_out = 0
        self._rolled_back: State | None = None

    def choose(self, evaluate: Evaluate) -> RWKVSequence | None:
        """Choose a token; return what has to be evaluated, None if the answer has ended."""
        track, rules = self._track, self._rules
        if track.n_tokens >= rules.max_tokens:
            self.finish("length")
            return None
        if self._sampler.finished:
            self.finish("stop")
            return None
        token = self._sampler.sample(track.logits, track.position)
        if token in rules.stop_tokens:
            self.finish("stop", token)
            return None
        self._sampler.accept(token)
        if rules.logprobs is not None:
            self._logprobs.append(top_logprobs(track.logits, token, rules.logprobs))
        if not self._holds_back():
            self._mark, self._n_marked, self._let_out = None, track.n_tokens, 0
        self._let_out += len(self._let(self._finder.feed(self._decoder.feed(token))))
        if self._finder.found is not None:
            self._roll_back(token, evaluate)
            return None
        if rules.stop and self._mark is None and self._holds_back():
            self._mark = track.state()
        return track.next(token)

    def advance(self) -> None:
        """What was to be evaluated has been."""
        self._track.advance()

    def finish(self, reason: str, stop: int | None = None) -> None:
        """End here, with what text was held back."""
        self._let(self._finder.flush() + self._decoder.flush())
        self.finish_reason, self._stop = reason, stop

    def answered(self, reason: str) -> Answered:
        """reason: why it has ended if it has not."""
        state = self._rolled_back or self._track.state()
        tokens = state.tokens[len(self._start.tokens) :].tolist()
        if self.finish_reason is None:
            text = text_of(self._tokenizer, tokens)
        else:
            text = "".join(self._text)
        logprobs = self._logprobs[: len(tokens)]
        return text, tokens, logprobs, self.finish_reason or reason, self._stop, state

    def _let(self, text: str) -> str:
        self.piece = text
        self._text.append(text)
        return text

    def _holds_back(self) -> bool:
        return bool(self._finder.held) or self._decoder.pending

    def _roll_back(self, token: int, evaluate: Evaluate) -> None:
        """Bring the state to just before the stop string, which `token` completes."""
        since = [*self._track.tokens()[self._n_marked :], token]
        mark = self._mark or self._track.state()
        alternatives = self._rules.logprobs
        self._rolled_back, told = read_until(
            evaluate, self._tokenizer, mark, since, self._let_out, alternatives
        )
        self._logprobs[self._n_marked :] = told
        self.finish_reason, self._stop = "stop", self._finder.found


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """What a stream of these tokens shows."""
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.feed, tokens)) + decoder.flush()


def read_until(
    evaluate: Evaluate,
    tokenizer: Tokenizer,
    start: State,
    tokens: Sequence[int],
    n_characters: int,
    alternatives: int | None,
) -> tuple[State, list[TokenLogprob]]:
    """The state after the first characters of a text that the model wrote from `start` on, and the
    log-probabilities of their tokens, if they are wanted.

    If a token holds text of both sides of the end, its part is read as the tokenizer cuts it.
    """
    whole, rest = tokens_before(tokenizer, tokens, n_characters)
    state, told = start, []
    pieces = [whole, tokenizer.encode(rest)]
    if alternatives is not None:
        pieces = [[token] for piece in pieces for token in piece]
    for piece in filter(None, pieces):
        if alternatives is not None:
            told.append(top_logprobs(np.asarray(state.logits), piece[0], alternatives))
        (reading,) = read(evaluate, [state], [piece])
        state = reading.state()
    state.n_generated = start.n_generated + len(state.tokens) - len(start.tokens)
    return state, told


# ---- Streaming -----------------------------------------------------------------------------------


class Stream(Iterator[str]):
    """The text of one answer, piece by piece, while it is written: whole characters.

    It begins with the first `next`. `close` ends it early, as leaving a `with` block does; other
    threads, and callbacks, use `cancel`, which does not wait.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._pieces = generation.run()
        self._ended = False
        self._completion: Completion | None = None
        self._lock = threading.RLock()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._lock:
            try:
                return next(self._pieces)[1]
            except BaseException:
                self._ended = True
                raise

    def cancel(self) -> None:
        """End the answer before the next token."""
        self._generation.cancel()

    def close(self) -> None:
        """End the answer now. Waits for the token that another thread is evaluating."""
        self.cancel()
        with self._lock:
            self._pieces.close()
            self._ended = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def so_far(self) -> Completion:
        """The answer so far, between two pieces, as if it were cancelled there; a copy."""
        with self._lock:
            (completion,) = self._generation.completions()
        return completion

    @property
    def completion(self) -> Completion:
        """The whole answer, once the stream has ended or was closed.

        After an exception, Ctrl-C for example, it holds what was written until then.
        """
        if not self._ended:
            raise RuntimeError("the stream has not ended: read it to its end, or close() it")
        if self._completion is None:
            (self._completion,) = self._generation.completions()
        return self._completion


class AsyncStream(AsyncIterator[str]):
    """The same for asyncio: `async for piece in stream`. A thread evaluates; cancelling the task
    ends the answer."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.to_thread(next, self._stream, None)
        except asyncio.CancelledError:
            self._stream.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """End the answer now."""
        self._stream.cancel()
        await asyncio.to_thread(self._stream.close)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    @property
    def completion(self) -> Completion:
        """As of `Stream`."""
        return self._stream.completion
