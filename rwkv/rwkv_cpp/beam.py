"""Beam search: the likeliest texts, followed several at a time. Nothing is left to chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .errors import NonFiniteLogits
from .generation import (
    Answered,
    Generation,
    Prompt,
    Rules,
    new_sampler,
    read_until,
    text_of,
)
from .model import RWKVAdapter, RWKVResult, RWKVSequence
from .reading import Evaluate, advanced
from .sampling import Sampler, Sampling, TokenLogprob, log_softmax, top_logprobs
from .state import State
from .stopping import StopFinder
from .tokenizer import StreamDecoder, Tokenizer


class BeamSearch(Generation):
    """The n likeliest of the texts that num_beams beams meet.

    A beam is the beginning of a text, with the sum of its tokens' log-probabilities: those of the
    model after penalties, biases, bans and the grammar, without the cuts and the temperature of
    sampling. In each step every beam may end with a stop token, and of all continuations the
    num_beams likeliest go on, but for those that a stop string ends. A text counts as its sum
    divided by the number of its tokens, the stop token included, to the power of length_penalty.
    The search is over when no beam can come before the n best texts any more.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        rules: Rules,
        sampling: Sampling,
    ) -> None:
        super().__init__(evaluate, tokenizer, prompts, rules)
        if rules.n > sampling.num_beams:
            raise ValueError(f"n: expected at most num_beams {sampling.num_beams}, found {rules.n}")
        self._samplers = [new_sampler(prompt, sampling, tokenizer) for prompt in prompts]
        self._answered: list[Answered] = []

    def _answers(self) -> list[Answered]:
        return self._answered  # none before the end

    def _write(self, states: list[State]) -> Iterator[tuple[int, str]]:
        searches = [
            _Search(state, sampler, self._tokenizer, self._rules)
            for state, sampler in zip(states, self._samplers, strict=True)
        ]
        reason = None
        while active := [search for search in searches if search.beams]:
            if (reason := self._over()) is not None:
                break
            found = [search.step() for search in active]
            beams = [beam for each in found for beam in each]
            results = self._evaluate([beam.next() for beam in beams]) if beams else []
            for beam, result in zip(beams, results, strict=True):
                beam.take(result)
            for search, each in zip(active, found, strict=True):
                search.follow(each)
        self._answered = [
            answer for search in searches for answer in search.best(self._evaluate, reason)
        ]
        for number, (text, *_) in enumerate(self._answered):
            if text:
                yield number, text


@dataclass
class _Beam:
    """tokens: written. total: the sum of their log-probabilities. values, logits: after them, once
    the last one is evaluated. sampler: has accepted them."""

    tokens: list[int]
    total: float
    values: np.ndarray
    logits: np.ndarray
    sampler: Sampler
    logprobs: list[TokenLogprob]
    adapter: RWKVAdapter | None

    def next(self) -> RWKVSequence:
        return RWKVSequence(self.tokens[-1:], self.values, adapter=self.adapter)

    def take(self, result: RWKVResult) -> None:
        self.values, self.logits = result.state, result.logits[0]  # type: ignore[index]


@dataclass
class _Text:
    """A text that has ended. n_characters: before the stop string, if one ended it."""

    score: float
    beam: _Beam
    reason: str
    stop: str | int | None = None
    n_characters: int | None = None


class _Search:
    """The beams after one prompt, and the texts that have ended, the n best of them."""

    def __init__(self, start: State, sampler: Sampler, tokenizer: Tokenizer, rules: Rules) -> None:
        self.beams: list[_Beam] = []
        self._start = start
        self._tokenizer = tokenizer
        self._rules = rules
        self._num_beams = sampler.sampling.num_beams
        self._length_penalty = sampler.sampling.length_penalty
        self._texts: list[_Text] = []
        logits = np.array(start.logits)
        self.follow([_Beam([], 0.0, start.values, logits, sampler, [], start.adapter)])

    def step(self) -> list[_Beam]:
        """The beams that go on from those there are, each still to be evaluated."""
        stop_tokens = sorted(self._rules.stop_tokens)
        totals = np.empty((len(self.beams), self.beams[0].logits.size))
        for row, beam in zip(totals, self.beams, strict=True):
            np.add(_logprobs(beam), beam.total, out=row)
            for token in stop_tokens:
                score = self._score(float(row[token]), len(beam.tokens) + 1)
                self._end(_Text(score, beam, "stop", token))
            row[stop_tokens] = -np.inf
        going: list[_Beam] = []
        for place in _descending(totals.reshape(-1), 2 * self._num_beams):
            number, token = divmod(place, totals.shape[1])
            beam = self._extended(self.beams[number], token, float(totals[number, token]))
            if not self._is_stopped(beam):
                going.append(beam)
            if len(going) == self._num_beams:
                break
        return going

    def follow(self, beams: list[_Beam]) -> None:
        """Go on with these beams, all of one length; with none where none can be of the best."""
        self.beams = []
        for beam in beams:
            if len(beam.tokens) == self._rules.max_tokens:
                self._end(_Text(self._score(beam.total, len(beam.tokens)), beam, "length"))
            elif beam.sampler.finished:
                self._end(_Text(self._score(beam.total, len(beam.tokens)), beam, "stop"))
            else:
                self.beams.append(beam)
        if len(self._texts) == self._rules.n and not any(map(self._is_promising, self.beams)):
            self.beams = []

    def best(self, evaluate: Evaluate, reason: str | None) -> list[Answered]:
        """The n best texts, the best first. reason: why the beams that are left end here.

        Where there are fewer texts than n, the last one is given several times.
        """
        for beam in self.beams:
            score = self._score(beam.total, len(beam.tokens))
            self._end(_Text(score, beam, reason or "stop"))
        answers = [self._answered(text, evaluate) for text in self._texts]
        return answers + answers[-1:] * (self._rules.n - len(answers))

    def _answered(self, text: _Text, evaluate: Evaluate) -> Answered:
        beam = text.beam
        characters = text_of(self._tokenizer, beam.tokens)
        if text.n_characters is None:
            n_generated = self._start.n_generated + len(beam.tokens)
            logits = beam.logits.copy()
            state = advanced(self._start, beam.tokens, beam.values.copy(), logits, n_generated)
            return characters, beam.tokens, beam.logprobs, text.reason, text.stop, state
        state, logprobs = read_until(
            evaluate,
            self._tokenizer,
            self._start,
            beam.tokens,
            text.n_characters,
            self._rules.logprobs,
        )
        tokens = state.tokens[len(self._start.tokens) :].tolist()
        return characters[: text.n_characters], tokens, logprobs, text.reason, text.stop, state

    def _score(self, total: float, n_tokens: int) -> float:
        return float(total / max(n_tokens, 1) ** self._length_penalty)

    def _is_promising(self, beam: _Beam) -> bool:
        """Whether a text that begins so may come before the worst of the n best."""
        lengths = len(beam.tokens) + 1, self._rules.max_tokens
        return max(self._score(beam.total, n) for n in lengths) > self._texts[-1].score

    def _end(self, text: _Text) -> None:
        if text.score > -np.inf:
            self._texts.append(text)
            self._texts.sort(key=lambda text: -text.score)  # equal ones stay in their order
            del self._texts[self._rules.n :]

    def _extended(self, beam: _Beam, token: int, total: float) -> _Beam:
        sampler = beam.sampler.copy()
        sampler.accept(token)
        logprobs = beam.logprobs
        if self._rules.logprobs is not None:
            logprobs = [*logprobs, top_logprobs(beam.logits, token, self._rules.logprobs)]
        tokens = [*beam.tokens, token]
        return replace(beam, tokens=tokens, total=total, sampler=sampler, logprobs=logprobs)

    def _is_stopped(self, beam: _Beam) -> bool:
        """Whether a stop string has ended it, as one of the texts."""
        if not self._rules.stop:
            return False
        finder, decoder = StopFinder(self._rules.stop), StreamDecoder(self._tokenizer)
        before = finder.feed("".join(map(decoder.feed, beam.tokens)))
        if finder.found is None:
            return False
        score = self._score(beam.total, len(beam.tokens))
        self._end(_Text(score, beam, "stop", finder.found, len(before)))
        return True


def _logprobs(beam: _Beam) -> np.ndarray:
    """(n_vocab) of the tokens that may follow."""
    logprobs = log_softmax(beam.sampler.scores(beam.logits))
    if np.isnan(logprobs).any():
        raise NonFiniteLogits("logits: NaN, infinite, or no token is left to choose")
    return logprobs


def _descending(scores: np.ndarray, n_first: int) -> Iterator[int]:
    """The places of finite scores from the highest down, equal ones in their order.

    The first ones are found without sorting all.
    """
    n_first = min(n_first, scores.size)
    lowest = np.partition(scores, scores.size - n_first)[scores.size - n_first]
    high = np.flatnonzero(scores >= lowest)
    first = high[np.argsort(-scores[high], kind="stable")][:n_first]
    yield from (int(place) for place in first if scores[place] > -np.inf)
    rest = np.argsort(-scores, kind="stable")[n_first:]
    yield from (int(place) for place in rest if scores[place] > -np.inf)
