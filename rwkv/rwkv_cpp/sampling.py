"""Sampling: what decides the next token, in the order in which it does.

0. forced_tokens: the completion begins with them, whatever the logits are.
1. repetition_penalty, then presence_penalty and frequency_penalty, of the tokens written so far.
2. logit_bias, banned_tokens, and what a json_schema, regex or grammar does not allow.
3. top_k, top_p (with top_px), min_p and tail_free, each judged on the softmax of what stands now,
   and then typical_p on what they leave.
4. temperature; 0 takes the likeliest token, the lowest id among equals.
5. The draw; with mirostat, which takes the place of step 3, from the tokens that it lets through.

Cutting before the temperature is RWKV's order. `choosing` holds steps 3 to 5. No array of the
caller is ever written to.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .choosing import Scores, choose, choose_mirostat, likeliest
from .philox import uniform

if TYPE_CHECKING:
    from .grammar import Grammar
    from .tokenizer import Tokenizer

SEEDS = 2**64
STREAMS = 2**32
MAX_TOKENS = 2**31  # in any vocabulary; Sampler knows how many there are


@dataclass(frozen=True)
class FieldInfo:
    """What a field of Sampling means, for its check, the command line and the documentation."""

    help: str
    kind: str  # which values there are: a name in _CHECKS
    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    option: str | None = None  # if it is not the field's name

    @property
    def range(self) -> str:
        """What values there are, in words; empty where any will do."""
        if self.high < math.inf:
            high = "2**64 - 1" if self.high == SEEDS - 1 else f"{self.high:g}"
            return f"{self.low:g}..{high}"
        if self.low > -math.inf:
            return f"{'>' if self.without_low else '>='} {self.low:g}"
        return ""


def _field(default: Any, kind: str, help: str, **info: Any) -> Any:
    metadata = {"info": FieldInfo(help, kind, **info)}
    if default is dict:
        return field(default_factory=dict, hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: immutable; every value is checked when it is made.

    Raises ValueError or TypeError, naming the field, for a value that has no meaning.
    """

    temperature: float = _field(
        1.0, "float", "0 always takes the likeliest token, higher is wilder.", low=0
    )
    top_k: int = _field(0, "int", "Keep so many of the likeliest tokens; 0 keeps all.", low=0)
    top_p: float = _field(
        0.8,
        "float",
        "Keep the likeliest tokens until their probabilities sum up to more than this.",
        low=0,
        high=1,
    )
    top_px: float = _field(
        1.0,
        "float",
        "Beside what top_p keeps, keep every token of a higher probability than this (top-p-x).",
        low=0,
        high=1,
    )
    min_p: float = _field(
        0.0,
        "float",
        "Drop tokens with less than this share of the likeliest token's probability.",
        low=0,
        high=1,
    )
    tail_free: float = _field(
        1.0,
        "float",
        "Drop the flat tail of the sorted probabilities, which begins where this share of their "
        "bends is passed; 1 keeps all.",
        low=0,
        high=1,
    )
    typical_p: float = _field(
        1.0,
        "float",
        "Keep the tokens whose surprise is closest to the expected one, until their probabilities "
        "sum up to more than this; 1 keeps all.",
        low=0,
        high=1,
    )
    mirostat: int = _field(
        0,
        "int",
        "Steer the surprise of the text instead of cutting: Mirostat, version 1 or 2; 0 is off.",
        low=0,
        high=2,
    )
    mirostat_tau: float = _field(
        5.0, "float", "The surprise that Mirostat steers to, in bits per token.", low=0
    )
    mirostat_eta: float = _field(0.1, "float", "How quickly Mirostat corrects its course.", low=0)
    repetition_penalty: float = _field(
        1.0,
        "float",
        "Divide the positive logits of tokens already written by this, multiply negative ones.",
        low=0,
        without_low=True,
    )
    presence_penalty: float = _field(
        0.0, "float", "Lower the logits of tokens already written by this."
    )
    frequency_penalty: float = _field(
        0.0, "float", "Lower the logits of tokens already written by this for each time."
    )
    penalty_decay: float = _field(
        0.996,
        "float",
        "What a time counts for frequency_penalty fades by this factor with each token.",
        low=0,
        high=1,
    )
    logit_bias: Mapping[int, float] = _field(
        dict, "biases", "Add a value to the logit of a token; -inf bans it."
    )
    banned_tokens: tuple[int, ...] = _field(
        (), "tokens", "Tokens that are never written.", option="--ban"
    )
    forced_tokens: tuple[int, ...] = _field(
        (), "tokens", "Tokens that the completion begins with.", option="--force"
    )
    seed: int | None = _field(
        None, "seed", "The same seed gives the same text.", low=0, high=SEEDS - 1
    )
    num_beams: int = _field(
        1, "int", "Follow so many beginnings at once and keep the likeliest text.", low=1
    )
    length_penalty: float = _field(
        1.0, "float", "Divide a beam's log-likelihood by its length to this power."
    )
    json_schema: str | Mapping[str, Any] | None = _field(
        None, "json", "Write JSON of this schema only (needs the extra `grammar`)."
    )
    regex: str | None = _field(
        None, "regex", "Write what this regular expression matches only (extra `grammar`)."
    )
    grammar: str | None = _field(
        None, "lark", "Write what this Lark grammar produces only (extra `grammar`)."
    )

    def __post_init__(self) -> None:
        for name, info in FIELDS.items():
            check = _CHECKS[info.kind]
            object.__setattr__(self, name, check(name, getattr(self, name), info))
        self._check_together()

    def changed(self, **values: Any) -> Sampling:
        """The same with other values in some fields. Switching mirostat on lets go of the cuts."""
        if values.get("mirostat"):
            values = {name: getattr(Sampling, name) for name in CUTS} | values
        return replace(self, **values)

    def _check_together(self) -> None:
        if both := set(self.banned_tokens) & set(self.forced_tokens):
            raise ValueError(f"forced_tokens: token {min(both)} is one of banned_tokens too")
        rules = [name for name in RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            raise ValueError(f"{rules[1]}: only one of {', '.join(RULES)}, found {rules[0]} too")
        if self.mirostat:
            for name, off in CUTS.items():
                if getattr(self, name) not in (off, getattr(Sampling, name)):
                    raise ValueError(f"{name}: mirostat takes its place, use one of the two")


FIELDS: dict[str, FieldInfo] = {field.name: field.metadata["info"] for field in fields(Sampling)}
# Each with the value that keeps all tokens.
CUTS = {"top_k": 0, "top_p": 1, "top_px": 1, "min_p": 0, "tail_free": 1, "typical_p": 1}
RULES = ("json_schema", "regex", "grammar")


class Sampler:
    """Chooses the tokens of one sequence, one after another.

        token = sampler.sample(logits, position)
        sampler.accept(token)

    A draw depends on the logits, what was accepted, the seed, the stream and the position only. So
    a text that is interrupted goes on as it would have, given the same seed and the tokens written
    so far as history; but for mirostat, which finds its course anew.
    """

    def __init__(
        self,
        sampling: Sampling,
        n_vocab: int,
        *,
        tokenizer: Tokenizer | None = None,
        history: Sequence[int] = (),
        stream: int = 0,
    ) -> None:
        """
        - tokenizer: needed for json_schema, regex and grammar only.
        - history: the tokens of this completion so far, which penalties count, forced_tokens are
          among, and a grammar has read.
        - stream: tells several completions of one seed apart, 0..2**32-1. Without a seed each
          Sampler has its own randomness.

        Raises ValueError for a token that is not in 0..n_vocab-1 or that the grammar does not
        allow, and for a grammar that is none; RWKVError if the package for grammars is missing.
        """
        if not 0 <= operator.index(stream) < STREAMS:
            raise ValueError(f"stream: expected 0..2**32-1, found {stream}")
        for name in ("logit_bias", "banned_tokens", "forced_tokens"):
            for token in getattr(sampling, name):
                _check_token(name, token, n_vocab)
        self.sampling = sampling
        self.n_vocab = n_vocab
        self._stream = operator.index(stream)
        self._seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed
        self._cuts = {name: getattr(sampling, name) for name in ("temperature", *CUTS)}
        self._bias = _Bias(sampling.logit_bias, sampling.banned_tokens)
        self._written = _Written() if _has_penalties(sampling) else None
        self._grammar = _grammar(sampling, n_vocab, tokenizer)
        self._count = 0
        self._surprise_limit = 2 * sampling.mirostat_tau  # where the paper starts
        self._last: tuple[int, float] | None = None  # mirostat's token and its surprise
        for place, token in enumerate(history):
            _check_token("history", token, n_vocab)
            self._accept(token, f"history: token {token} at {place}")
        if self._grammar is not None and self._count < len(sampling.forced_tokens):
            ahead = self._grammar.copy()
            for token in sampling.forced_tokens[self._count :]:
                ahead.accept(token, f"forced_tokens: token {token}")

    def sample(self, logits: npt.ArrayLike, position: int) -> int:
        """The next token. It is not accepted yet: the same call gives the same token again.

        - logits: (n_vocab) floating point numbers; -inf bans a token, a single +inf chooses it.
        - position: how many tokens the sequence has read, 0..2**64-1.

        Raises NonFiniteLogits if the logits hold NaN, more than one +inf, or if no token is left;
        ValueError or TypeError for anything but a row of n_vocab logits.
        """
        if not 0 <= operator.index(position) < SEEDS:
            raise ValueError(f"position: expected 0..2**64-1, found {position}")
        row = _row(logits)
        if row.size != self.n_vocab:
            raise ValueError(f"logits: expected {self.n_vocab}, found {row.size}")
        if self._count < len(self.sampling.forced_tokens):
            self._last = None
            return self.sampling.forced_tokens[self._count]
        scores = self._scores(row)
        point = partial(uniform, self._seed, self._stream, operator.index(position))
        if not self.sampling.mirostat or self.sampling.temperature == 0:
            return choose(scores, point, **self._cuts)
        token, surprise = choose_mirostat(
            scores,
            point,
            self.sampling.mirostat,
            temperature=self.sampling.temperature,
            limit=self._surprise_limit,
        )
        self._last = token, surprise
        return token

    def accept(self, token: int) -> None:
        """Take a token as written. Raises ValueError for one that is not in 0..n_vocab-1 or that
        the grammar does not allow, and then nothing has changed."""
        _check_token("token", token, self.n_vocab)
        self._accept(token, f"token {token}")

    def copy(self) -> Sampler:
        """A sampler that goes on from here on its own, with the same draws."""
        twin = copy.copy(self)
        twin._written = self._written and self._written.copy()
        twin._grammar = self._grammar and self._grammar.copy()
        return twin

    @property
    def finished(self) -> bool:
        """Whether the grammar has come to its end, so that no token may follow."""
        return self._grammar is not None and self._grammar.finished

    def scores(self, logits: npt.ArrayLike) -> Scores:
        """(n_vocab) the logits as they stand before the cuts, for a search of one's own. Where a
        token is forced, all others are banned."""
        row = _row(logits)
        if self._count < len(self.sampling.forced_tokens):
            forced = self.sampling.forced_tokens[self._count]
            return np.where(np.arange(row.size) == forced, row, -np.inf)
        return self._scores(row)

    def _scores(self, row: Scores) -> Scores:
        """The logits after penalties, biases and bans: a copy, or themselves."""
        if self._written is not None:
            row = self._written.penalized(row, self.sampling)
        row = self._bias.added_to(row)
        if self._grammar is not None:
            row = np.where(self._grammar.allowed(), row, -np.inf)
        return row

    def _accept(self, token: int, what: str) -> None:
        token = operator.index(token)
        if self._grammar is not None:
            self._grammar.accept(token, what)
        if self._written is not None:
            self._written.add(token, self.sampling.penalty_decay)
        if self._last is not None and self._last[0] == token:
            error = self._last[1] - self.sampling.mirostat_tau
            self._surprise_limit -= self.sampling.mirostat_eta * error
        self._last = None
        self._count += 1


class TokenLogprob(NamedTuple):
    """How likely the model found a token, as natural logarithms."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens: id and logprob


def log_softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """(n_vocab) the logarithms of the probabilities. Raises as sample_logits() does."""
    row = _row(logits)
    highest = float(row[likeliest(row)])
    if highest == math.inf:
        return np.where(row == math.inf, 0.0, -math.inf)
    logprobs = row.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        logprobs -= highest
        logprobs -= math.log(np.exp(logprobs).sum())
    return logprobs


def top_logprobs(logits: npt.ArrayLike, token: int, n: int) -> TokenLogprob:
    """The logprob of a token, and those of the n likeliest ones, before any sampling.

    n: 0..n_vocab; among equals the lower id comes first.
    """
    logprobs = log_softmax(logits)
    _check_token("token", token, logprobs.size)
    if not 0 <= operator.index(n) <= logprobs.size:
        raise ValueError(f"n: expected 0..{logprobs.size}, found {n}")
    top: tuple[tuple[int, float], ...] = ()
    if n > 0:
        lowest = np.partition(logprobs, logprobs.size - n)[logprobs.size - n]
        ids = np.flatnonzero(logprobs >= lowest)
        ids = ids[np.argsort(-logprobs[ids], kind="stable")][:n]
        top = tuple((int(index), float(logprobs[index])) for index in ids)
    return TokenLogprob(operator.index(token), float(logprobs[token]), top)


def sample_logits(
    logits: npt.ArrayLike,
    temperature: float = 1.0,
    top_p: float = 0.8,
    logit_bias: Mapping[int, float] | None = None,
    rng: np.random.Generator | int | None = None,
) -> int:
    """Choose a token: what Sampler does, for a single one.

    - logits: (n_vocab) floating point numbers; a torch tensor in the CPU's memory is fine. -inf
      means that the token is banned, a single +inf that the token is chosen.
    - temperature: >= 0; 0 chooses the most likely token, the lowest id among equals.
    - top_p: 0..1; tokens are taken from the most likely one down until their probabilities sum up
      to more than top_p, the others are dropped. Tokens as likely as the last one taken stay; a sum
      that never exceeds top_p keeps all tokens; 0 keeps the most likely token alone.
    - logit_bias: id -> what is added to its logit; -inf bans the token.
    - rng: a generator, a seed, or None for a fresh random one. A seed gives the same token each
      time: to draw a series, pass the same generator to every call, or use Sampler.

    One `rng.random()` is drawn, and nothing where nothing is left to chance.

    Raises NonFiniteLogits if the logits hold NaN, more than one +inf, or nothing but -inf;
    ValueError or TypeError for wrong arguments.
    """
    generator = rng if isinstance(rng, np.random.Generator) else None
    seed = None if generator is not None else _check_seed("rng", rng, FIELDS["seed"])
    sampling = Sampling(temperature=temperature, top_p=top_p, logit_bias=logit_bias or {})
    row = _row(logits)
    for token in sampling.logit_bias:
        _check_token("logit_bias", token, row.size)
    point: Callable[[], float]
    if generator is not None:
        point = generator.random
    else:
        point = partial(uniform, secrets.randbelow(SEEDS) if seed is None else seed, 0, 0)
    scores = _Bias(sampling.logit_bias, ()).added_to(row)
    return choose(scores, point, temperature=sampling.temperature, top_p=sampling.top_p)


class _Bias:
    """logit_bias and banned_tokens, as arrays."""

    def __init__(self, biases: Mapping[int, float], banned: Iterable[int]) -> None:
        finite = {token: bias for token, bias in biases.items() if bias > -math.inf}
        self._ids = np.array(list(finite), np.intp)
        self._values = np.array(list(finite.values()), np.float64)
        self._banned = np.array([*(biases.keys() - finite.keys()), *banned], np.intp)

    def added_to(self, row: Scores) -> Scores:
        """A copy of the row with them, or the row itself if there are none."""
        if self._ids.size or self._banned.size:
            row = row.copy()
            row[self._ids] += self._values
            row[self._banned] = -np.inf  # even a logit of +inf
        return row


class _Written:
    """The tokens written so far, and what each one's times count, faded with every token since."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(16, np.intp)
        self._counts = np.empty(16)  # when the token was last written
        self._since = np.empty(16)  # which token that was
        self._now = 0

    def add(self, token: int, decay: float) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == self._ids.size:
                for name in ("_ids", "_counts", "_since"):
                    array = getattr(self, name)
                    setattr(self, name, np.concatenate([array, np.empty_like(array)]))
            self._ids[place], self._counts[place], self._since[place] = token, 0, self._now
        faded = self._counts[place] * decay ** (self._now - self._since[place])
        self._counts[place], self._since[place] = faded + 1, self._now
        self._now += 1

    def penalized(self, row: Scores, sampling: Sampling) -> Scores:
        """A copy of the row with the scores of these tokens lowered."""
        row = row.copy()
        count = len(self._place)
        ids = self._ids[:count]
        scores = row[ids].astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            if (penalty := sampling.repetition_penalty) != 1:
                scores = np.where(scores > 0, scores / penalty, scores * penalty)
            ages = self._now - 1 - self._since[:count]
            counts = self._counts[:count] * sampling.penalty_decay**ages
            scores -= sampling.presence_penalty + sampling.frequency_penalty * counts
        row[ids] = scores
        return row

    def copy(self) -> _Written:
        twin = copy.copy(self)
        twin._place = self._place.copy()
        for name in ("_ids", "_counts", "_since"):
            setattr(twin, name, getattr(self, name).copy())
        return twin


def _has_penalties(sampling: Sampling) -> bool:
    return bool(
        sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    )


def _grammar(sampling: Sampling, n_vocab: int, tokenizer: Tokenizer | None) -> Grammar | None:
    for name in RULES:
        rule = getattr(sampling, name)
        if rule is not None:
            from .grammar import Grammar

            if tokenizer is None:
                raise ValueError(f"{name}: needs the tokenizer, to know what tokens spell")
            if tokenizer.n_vocab != n_vocab:
                raise ValueError(
                    f"{name}: the tokenizer has {tokenizer.n_vocab} tokens, the model {n_vocab}"
                )
            return Grammar(tokenizer, name, rule)
    return None


def _row(logits: npt.ArrayLike) -> Scores:
    """The logits as one row of float32 or float64, a copy only where they are neither."""
    row = np.asarray(logits)
    if row.dtype.kind != "f":
        raise TypeError(f"logits: expected floating point numbers, found {row.dtype}")
    if row.ndim != 1 or row.size == 0:
        raise ValueError(f"logits: expected one non-empty row, found shape {row.shape}")
    if row.dtype not in (np.float32, np.float64):
        row = row.astype(np.float32 if row.dtype.itemsize < 4 else np.float64)
    return row


def _check_token(name: str, token: Any, n_vocab: int) -> None:
    if isinstance(token, bool) or not isinstance(token, Integral):
        raise TypeError(f"{name}: expected a token's id, found {token!r}")
    if not 0 <= int(token) < n_vocab:
        raise ValueError(f"{name}: token {token} is not in 0..{n_vocab - 1}")


# ---- the checks of Sampling's fields, by their kind: each gives back the value to keep ----


def _check_float(name: str, value: Any, info: FieldInfo) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, found {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _check_range(name, number, info, "a finite number")
    return number


def _check_int(name: str, value: Any, info: FieldInfo) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, found {value!r}")
    number = int(value)
    _check_range(name, number, info, "an integer")
    return number


def _check_range(name: str, value: float, info: FieldInfo, what: str) -> None:
    inside = info.low < value if info.without_low else info.low <= value
    if not (inside and value <= info.high and abs(value) < math.inf):
        where = f" in {info.range}" if ".." in info.range else f" {info.range}"
        raise ValueError(f"{name}: expected {what}{where.rstrip()}, found {value}")


def _check_seed(name: str, value: Any, info: FieldInfo) -> int | None:
    return None if value is None else _check_int(name, value, info)


def _check_biases(name: str, value: Any, info: FieldInfo) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping of tokens to numbers, found {value!r}")
    biases = {}
    for token, bias in value.items():
        _check_token(name, token, MAX_TOKENS)
        if isinstance(bias, bool) or not isinstance(bias, Real):
            raise TypeError(f"{name}: token {token} has bias {bias!r}, expected a number")
        if math.isnan(bias) or bias == math.inf:
            raise ValueError(f"{name}: token {token} has bias {bias}, expected a number or -inf")
        biases[operator.index(token)] = float(bias)
    return biases


def _check_tokens(name: str, value: Any, info: FieldInfo) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a sequence of tokens, found {value!r}")
    tokens = tuple(value)
    for token in tokens:
        _check_token(name, token, MAX_TOKENS)
    return tuple(map(operator.index, tokens))


def _check_text(name: str, value: Any, info: FieldInfo) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, found {value!r}")
    if not value:
        raise ValueError(f"{name}: is empty")
    return value


def _check_json(name: str, value: Any, info: FieldInfo) -> str | None:
    if isinstance(value, Mapping):
        try:
            return json.dumps(dict(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON: {error}") from None
    text = _check_text(name, value, info)
    if text is not None:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise ValueError(f"{name}: expected an object, found {text[:80]}")
    return text


_CHECKS: dict[str, Callable[[str, Any, FieldInfo], Any]] = {
    "float": _check_float,
    "int": _check_int,
    "seed": _check_seed,
    "biases": _check_biases,
    "tokens": _check_tokens,
    "json": _check_json,
    "lark": _check_text,
    "regex": _check_text,
}
