"""RWKV: a model, its tokenizer and its sampler, as one object.

    from rwkv_cpp import RWKV

    model = RWKV()                                   # the embedded model; or RWKV("model.bin")
    print(model.generate("ROMEO:", max_tokens=100))
    for piece in model.stream("JULIET:", stop="\\n\\n", seed=1):
        print(piece, end="", flush=True)

docs/python.md shows all of it.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from .beam import BeamSearch
from .embedding import Normalizer, Selection, fit, read_vectors
from .fingerprint import Fingerprint
from .generation import (
    RULES,
    AsyncStream,
    Completion,
    Generation,
    Prompt,
    Rules,
    SampledAnswers,
    Stream,
)
from .library import FilePath, as_integer
from .model import RWKVModel, RWKVResult, RWKVSequence
from .models import find_model
from .prefix_cache import PrefixCache
from .progress import Progress
from .pull import pull
from .reading import Choice, Reading, Score, read
from .registry import style_of
from .sampling import FIELDS, Sampling
from .state import State
from .tokenizer import Tokenizer, ends_text, first_token, load_tokenizer

Text = str | Sequence[int]
"""A text, or the tokens of one."""


class RWKV:
    """A language model that reads, writes and scores text.

    path: what `find_model` understands: a model file, a checkpoint, a name that `rwkv pull`
    fetched; None: the embedded model. format: the model in this format, see there.
    vocabulary: a file or a Tokenizer; None: as `load_tokenizer` finds it, when text is first used.
    n_threads: 1..1024; None: all physical cores that this process may use.
    prefix_cache: of what was read already. It serves all calls whose state, if any, is not foreign.
    progress: called as (what is being done, done, in all) while the model is made and loaded.
    lora: LoRA files, each with its alpha, beside the weights: see `RWKVModel.adapter`.
    options: of RWKVModel.

    Safe to use from several threads: each call evaluates on a context of its own, and all share the
    weights. Whatever ends a call, the states that it was given stay as they were. Pickled, it is
    its path and its options, without the cache: it is loaded again elsewhere.

    After `free`, or the end of a `with` block, everything that evaluates raises
    RuntimeError("model is closed").
    """

    def __init__(
        self,
        path: FilePath | None = None,
        *,
        vocabulary: str | Path | Tokenizer | None = None,
        n_threads: int | None = None,
        format: str | None = None,
        prefix_cache: PrefixCache | None = None,
        progress: Progress | None = None,
        lora: Iterable[tuple[FilePath, float]] = (),
        **options: Any,
    ) -> None:
        named = None if path is None else Path(os.fsdecode(path))
        self.path = find_model(named, format, progress).absolute()
        self._given = {"vocabulary": vocabulary, "n_threads": n_threads, **options}
        self._vocabulary = vocabulary
        self._prefix_cache = prefix_cache
        loading = None if progress is None else partial(progress, "loading")
        model = RWKVModel(None, self.path, n_threads, progress=loading, **options)
        self._contexts = _Contexts(model, n_threads)
        self._set_lora(lora)
        self.n_vocab = model.n_vocab
        self.n_embed = model.n_embed
        self.n_layer = model.n_layer
        self.n_state = model.n_state
        self.arithmetic = ", ".join(
            f"{name} {options.get(name) or default}"
            for name, default in (("activations", "A16"), ("head", "as in the file"))
        )

    def _set_lora(self, lora: Iterable[tuple[FilePath, float]]) -> None:
        model = self._contexts.model
        self.lora = tuple((Path(os.fsdecode(path)), alpha) for path, alpha in lora)
        self.adapter = model.adapter(self.lora) if self.lora else None
        self.fingerprint = Fingerprint(self.path, None if self.adapter is None else self.adapter.id)

    def with_lora(self, lora: Iterable[tuple[FilePath, float]]) -> RWKV:
        """The same weights in memory with other LoRAs beside them, each with its alpha, or none.

        Both models may be used at the same time, and each is freed on its own. A state belongs to
        one of them. Raises what `RWKVModel.adapter` does.
        """
        model = object.__new__(type(self))
        model.__dict__.update(self.__dict__)
        model.__dict__.pop("_empty", None)
        model._contexts = self._contexts.copy()
        try:
            model._set_lora(lora)
        except BaseException:
            model._contexts.close()
            raise
        return model

    @classmethod
    def from_pretrained(cls, name: str, format: str | None = None, **options: Any) -> RWKV:
        """The model of a name, such as "RWKV-4-169M" or "BlinkDL/rwkv-4-pile-169m".

        What is not on this machine is fetched and made as by `rwkv pull`. Options as of RWKV.
        """
        return cls(pull(name, format, options.get("progress")), **options)

    def __reduce__(self) -> Any:
        return _load, (self.path, self._given | {"lora": self.lora})

    def free(self) -> None:
        """Free the model, once running evaluations have ended. Freeing again does nothing."""
        self._contexts.close()
        if self.adapter is not None:
            self.adapter.free()

    def __enter__(self) -> RWKV:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    def __repr__(self) -> str:
        loras = "".join(f", {path.name} alpha {alpha:g}" for path, alpha in self.lora)
        return f"<RWKV {self.path.name}: {self.n_layer} layers of {self.n_embed}{loras}>"

    # ---- What it is ------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises VocabularyNotFound, or RWKVFileError for a vocabulary that does not fit."""
        if isinstance(self._vocabulary, Tokenizer):
            if self._vocabulary.n_vocab != self.n_vocab:
                raise ValueError(
                    f"vocabulary: is for {self._vocabulary.n_vocab} tokens, the model has "
                    f"{self.n_vocab}"
                )
            return self._vocabulary
        return load_tokenizer(self.n_vocab, self._vocabulary, self.path)

    @property
    def family(self) -> str:
        """The same for every format of one model."""
        return self.fingerprint.family

    @property
    def exact(self) -> str:
        """The same for these very weights only."""
        return self.fingerprint.exact

    @property
    def cache_key(self) -> str:
        """What the bits of a state depend on, beside the tokens."""
        return f"{self.exact}, {self.arithmetic}"

    @property
    def style(self) -> str:
        """The name of the style in which a chat with this model is written."""
        return style_of(self.path, self.n_vocab)

    def empty_state(self) -> State:
        """The state before the first token; a prompt has to follow."""
        return self._empty.copy()

    # ---- Reading ---------------------------------------------------------------------------------

    def read(
        self, prompt: Text, state: State | None = None, progress: Progress | None = None
    ) -> State:
        """The state after a prompt, which is not empty unless there is a state.

        progress: called as ("reading", tokens read, in all) after each chunk.
        """
        start = self._prompt(prompt, state)
        (reading,) = read(self._evaluate, [start.start], [start.tokens], progress=progress)
        result = reading.state()
        if start.store is not None:
            start.store(result)
        return result

    def score(self, text: Text, context: Text = "", state: State | None = None) -> Score:
        """How likely the text is after the context, and a state before that.

        Text and context are cut into tokens each on its own. Without context and state the text is
        at the beginning: after `first_token`.
        """
        (reading,), (tokens,) = self._score([text], context, state)
        return Score(tokens, reading.logprobs, reading.greedy)

    def choose(self, context: Text, choices: Sequence[str], state: State | None = None) -> Choice:
        """Which of the choices is likeliest to go on with. The context is read once.

        Log-probabilities of whole texts are compared: a longer one is less likely by its length.
        Raises ValueError for an empty choice, and for none.
        """
        choices = choices if isinstance(choices, str) else [*choices]
        if isinstance(choices, str) or not choices or not all(choices):
            raise ValueError(f"choices: expected texts, none of them empty, found {choices!r}")
        readings, _ = self._score(choices, context, state)
        totals = [math.fsum(reading.logprobs) for reading in readings]
        best = max(range(len(totals)), key=totals.__getitem__)
        return Choice(best, choices[best], totals, [reading.greedy for reading in readings])

    def _score(
        self, texts: Sequence[Text], context: Text, state: State | None
    ) -> tuple[list[Reading], list[list[int]]]:
        tokens = [self._tokens(text, "text") for text in texts]
        start = self.read(context, state)
        return read(self._evaluate, [start] * len(texts), tokens, score=True), tokens

    # ---- Embeddings ------------------------------------------------------------------------------

    def embed(
        self,
        texts: str | Sequence[Text],
        *,
        layers: Iterable[int] | None = None,
        parts: Iterable[str] | None = None,
        normalizer: Normalizer | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """What the model remembers of each text after reading it alone, float32.

        - texts: one, or a list; the list is evaluated in batches, and each text gets the bits that
          it would get alone. An empty one stands for `first_token`.
        - layers: 0 to n_layer - 1, or from the end: -1 is the last; None: all.
        - parts: of `embedding.PARTS`, "att_xx", "ffn_xx" and "aa/bb"; None: all.
        - normalizer: of this model, in any format; without one the values are as they are.
        - progress: called as ("embedding", tokens read, in all) after each chunk.

        Returns (n, layers * parts * n_embed), of each layer part after part, in the order in which
        they were asked for; of a single text one row.
        Raises ForeignState for a normalizer of another model, ValueError for wrong arguments.
        """
        selection = Selection.of(self.n_layer, layers, parts)
        if normalizer is not None:
            normalizer.check(self.family)
        tokens = self._texts([texts] if isinstance(texts, str) else texts)
        width = len(selection.layers) * len(selection.parts) * self.n_embed
        rows = np.empty((len(tokens), width), np.float32)
        for places, vectors in self._vectors(tokens, progress):
            if normalizer is not None:
                vectors = (vectors - normalizer.mean) / normalizer.deviation
            rows[places] = selection.take(vectors)
        return rows[0] if isinstance(texts, str) else rows

    def fit_normalizer(self, texts: Sequence[Text], progress: Progress | None = None) -> Normalizer:
        """The mean and deviation of each channel over the embeddings of texts, two or more."""
        return fit(self._vectors(self._texts(texts), progress), self.family)

    def _texts(self, texts: Sequence[Text]) -> list[list[int]]:
        tokens = [self._tokens(text, f"texts[{i}]") for i, text in enumerate(texts)]
        return [each or [first_token(self.tokenizer)] for each in tokens]

    def _vectors(
        self, texts: list[list[int]], progress: Progress | None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        return read_vectors(self._evaluate, self._empty, texts, progress)

    # ---- Writing ---------------------------------------------------------------------------------

    @overload
    def generate(
        self, prompt: Text = ..., *, n: Literal[1] = ..., **options: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Text | list[str] | list[list[int]] = ..., **options: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Text | Sequence[Text] = "",
        *,
        state: State | Sequence[State] | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 200,
        stop: str | Iterable[str] = (),
        stop_tokens: Iterable[int] = (),
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int | None = None,
        time_limit: float | None = None,
        cancel: Callable[[], object] | None = None,
        progress: Progress | None = None,
        models: Sequence[RWKV] | None = None,
        **fields: Any,
    ) -> Completion | list[Completion]:
        """Go on with a prompt, or with each of a list of prompts at once.

        - prompt: text or tokens; a list of them is evaluated as one batch, and each gets the answer
          that it would get alone. An empty one, "" or [], goes on from the state; without a state
          it stands for `first_token`.
        - state: what was read before the prompt; one for all prompts, or one for each.
        - sampling, fields: a Sampling, and fields of it that are to be others. A seed gives the
          same answer each time, wherever the text was interrupted.
        - max_tokens: the most that an answer may have.
        - stop, stop_tokens: strings and tokens that end an answer; they are not part of it, and
          `completion.state` is that before them.
        - ignore_eos: never write the end-of-text token, which ends an answer otherwise.
        - n: answers to each prompt, which is read once. With num_beams > 1, the n best.
        - logprobs: tell each token's log-probability and those of so many alternatives.
        - time_limit: seconds after which all ends, prompts too.
        - cancel: called before each token and each chunk of a prompt; if true, all ends.
        - progress: called as ("reading", tokens read, in all) after each chunk of the prompts.
        - models: for each prompt of a list the model that goes on with it: this one, or what
          `with_lora` made of it. All are evaluated together.

        Returns a Completion; for a list of prompts, or n > 1, a list of them: the n answers to the
        first prompt, then those to the next.
        Raises ForeignState for a state of another model, NonFiniteLogits where logits hold NaN,
        ValueError or TypeError for wrong arguments.
        """
        prompt = _lasting(prompt)
        is_single = _is_single(prompt)
        prompts: list[Any] = [prompt] if is_single else [*prompt]
        generation = self._begin(
            prompts,
            state,
            sampling,
            max_tokens=max_tokens,
            stop=stop,
            stop_tokens=stop_tokens,
            ignore_eos=ignore_eos,
            n=n,
            logprobs=logprobs,
            time_limit=time_limit,
            cancel=cancel,
            progress=progress,
            models=models,
            **fields,
        )
        for _ in generation.run():
            pass
        completions = generation.completions()
        return completions[0] if n == 1 and is_single else completions

    def stream(
        self,
        prompt: Text = "",
        *,
        state: State | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Stream:
        """The text of one answer, piece by piece; options as of `generate`, but for n.

        What beam search finds comes as one piece. `stream.completion` has the rest in the end.
        """
        prompt = _lasting(prompt)
        if not _is_single(prompt) or options.get("n", 1) != 1:
            raise ValueError("a stream is of one prompt and one answer: generate() takes several")
        return Stream(self._begin([prompt], state, sampling, **options))

    def astream(
        self,
        prompt: Text = "",
        *,
        state: State | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> AsyncStream:
        """The same for asyncio: `async for piece in model.astream(…)`."""
        return AsyncStream(self.stream(prompt, state=state, sampling=sampling, **options))

    # ---- Inside ----------------------------------------------------------------------------------

    def _begin(
        self,
        prompts: list[Any],
        state: State | Sequence[State] | None,
        sampling: Sampling | None,
        models: Sequence[RWKV] | None = None,
        **options: Any,
    ) -> Generation:
        """Everything checked, nothing evaluated yet."""
        told = {name: options.pop(name) for name in RULES if name in options}
        if unknown := [name for name in options if name not in FIELDS]:
            raise TypeError(
                f"unknown option {unknown[0]!r} (choose from {', '.join([*RULES, *FIELDS])})"
            )
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(f"sampling: expected a Sampling, found {sampling!r}")
        rules = Rules(**told)
        sampling = (sampling or Sampling()).changed(**options)
        if rules.logprobs is not None:
            as_integer(rules.logprobs, "logprobs", 0, self.n_vocab)
        for token in rules.stop_tokens:
            as_integer(token, "stop_tokens", 0, self.n_vocab - 1)
        if ends_text(self.tokenizer, 0):
            if rules.ignore_eos:
                sampling = replace(sampling, banned_tokens=(*sampling.banned_tokens, 0))
            else:
                rules = replace(rules, stop_tokens=rules.stop_tokens | {0})
        states: list[Any] = [*state] if isinstance(state, (list, tuple)) else [state] * len(prompts)
        if len(states) != len(prompts):
            raise ValueError(f"state: expected one, or {len(prompts)}, found {len(states)}")
        models = [self] * len(prompts) if models is None else [*models]
        if len(models) != len(prompts):
            raise ValueError(f"models: expected {len(prompts)}, one a prompt, found {len(models)}")
        for i, model in enumerate(models):
            if (model.path, model.arithmetic) != (self.path, self.arithmetic):
                raise ValueError(
                    f"models[{i}]: {model!r}, expected what with_lora makes of {self!r}"
                )
        starts = [
            model._prompt(prompt, state)
            for model, prompt, state in zip(models, prompts, states, strict=True)
        ]
        kind = BeamSearch if sampling.num_beams > 1 else SampledAnswers
        return kind(self._evaluate, self.tokenizer, starts, rules, sampling)

    def _prompt(self, text: Text, state: State | None) -> Prompt:
        """A prompt after a state, which is this model's own then, as far as nobody has read it."""
        tokens = self._tokens(text, "prompt")
        if state is None:
            start = self._empty
            tokens = tokens or [first_token(self.tokenizer)]
        elif isinstance(state, State):
            start = state.for_model(self)
        else:
            raise TypeError(f"state: expected a State, found {type(state).__name__}")
        if not tokens and start.logits is None:
            raise ValueError("the prompt is empty, and the state has no logits to go on from")
        if self._prefix_cache is None or start.arithmetic is None:
            return Prompt(start, tokens)
        key = self.cache_key
        store = partial(self._prefix_cache.store, key)
        found = self._prefix_cache.longest(key, start.tokens + array("I", tokens))
        if found is None or len(found.tokens) <= len(start.tokens):
            return Prompt(start, tokens, 0, store)
        n_cached = len(found.tokens) - len(start.tokens)
        found = found.for_model(self)
        found.n_generated = 0
        return Prompt(found, tokens[n_cached:], n_cached, store)

    @cached_property
    def _empty(self) -> State:
        """Before the first token."""
        with self._contexts.one() as model:
            values = model.init_state()
        return State(
            values,
            n_layer=self.n_layer,
            n_embed=self.n_embed,
            fingerprint=self.fingerprint,
            arithmetic=self.arithmetic,
            adapter=self.adapter,
        )

    def _tokens(self, text: Text, name: str) -> list[int]:
        if isinstance(text, str):
            return self.tokenizer.encode(text)
        if isinstance(text, (bytes, bytearray)) or not isinstance(text, Iterable):
            raise TypeError(f"{name}: expected text or tokens, found {type(text).__name__}")
        last = self.n_vocab - 1
        return [as_integer(token, f"{name}[{i}]", 0, last) for i, token in enumerate(text)]

    def _evaluate(self, sequences: list[RWKVSequence]) -> list[RWKVResult]:
        with self._contexts.one() as model:
            return model.eval_batch(sequences)


class _Contexts:
    """Contexts on the weights of one model, as many as are in use at once."""

    def __init__(self, model: RWKVModel, n_threads: int | None) -> None:
        self.model = model  # evaluates nothing, so that it can be cloned at any time
        self._n_threads = n_threads
        self._idle: deque[RWKVModel] = deque()  # append() and pop() need no lock
        self._closed = False

    def copy(self) -> _Contexts:
        """Contexts of their own on the same weights."""
        return _Contexts(self.model.clone(self._n_threads), self._n_threads)

    @contextmanager
    def one(self) -> Iterator[RWKVModel]:
        if self._closed:
            raise RuntimeError("model is closed")
        try:
            model = self._idle.pop()
        except IndexError:
            model = self.model.clone(self._n_threads)
        try:
            yield model
        except Exception:
            self._give_back(model)
            raise
        else:
            self._give_back(model)
        # What Ctrl-C interrupted is dropped: it may have been in the midst of taking a lock.

    def _give_back(self, model: RWKVModel) -> None:
        self._idle.append(model)
        if self._closed:
            self.close()

    def close(self) -> None:
        self._closed = True
        self.model.free()
        with suppress(IndexError):
            while True:
                self._idle.pop().free()


def _load(path: Path, given: dict[str, Any]) -> RWKV:
    return RWKV(path, **given)


def _lasting(prompt: Any) -> Any:
    """The prompt; an iterator, which gives its tokens only once, as a list."""
    return [*prompt] if isinstance(prompt, Iterator) else prompt


def _is_single(prompt: object) -> bool:
    """Whether it is one prompt: text, or tokens, even none; not a list of prompts."""
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        return True
    return not any(isinstance(part, Iterable) for part in prompt)
