"""`rwkv.utils`: text from a model of `rwkv.model`, by ChatRWKV's own rule of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...sampling import Sampler, Sampling
from ...tokenizer import PUBLISHED, StreamDecoder, Tokenizer, load_tokenizer
from ..repeatable import fresh_seed
from .model import RWKV


@dataclass
class PIPELINE_ARGS:
    """How `PIPELINE.generate` samples.

    alpha_frequency, alpha_presence: a token that was generated n times loses n times the first and
    once the second. alpha_decay: n shrinks by this factor with every token.
    token_ban: never generated. token_stop: end the text, and are no part of it.
    chunk_len: in how many tokens a prompt is read at a time; without effect, none is needed.
    """

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    alpha_frequency: float = 0.2
    alpha_presence: float = 0.2
    alpha_decay: float = 0.996
    token_ban: Sequence[int] = ()
    token_stop: Sequence[int] = ()
    chunk_len: int = 256


class PIPELINE:
    """model: a `rwkv.model.RWKV`. WORD_NAME: a vocabulary file, or the name of a published one
    (20B_tokenizer.json, rwkv_vocab_v20230424), which is looked for."""

    def __init__(self, model: RWKV, WORD_NAME: str | PathLike[str]) -> None:
        self.model = model
        self.tokenizer = _tokenizer(model, Path(WORD_NAME))

    def refine_context(self, context: str) -> str:
        """The lines that hold something, without blanks around them, after a line end."""
        lines = (line.strip().strip("\u3000") for line in context.strip().split("\n"))
        return "\n" + "\n".join(filter(None, lines))

    def encode(self, x: str) -> list[int]:
        return self.tokenizer.encode(x)

    def decode(self, x: Iterable[int]) -> str:
        return self.tokenizer.decode(x)

    def sample_logits(
        self,
        logits: Any,
        temperature: float = 1.0,
        top_p: float = 0.85,
        top_k: int = 0,
    ) -> int:
        """Choose a token: as Sampling says, which has this rule. temperature 0: the likeliest."""
        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=int(top_k), seed=fresh_seed()
        )
        return Sampler(sampling, len(logits)).sample(logits, 0)

    def generate(
        self,
        ctx: str,
        token_count: int = 100,
        args: PIPELINE_ARGS | None = None,
        callback: Callable[[str], object] | None = None,
        state: Sequence[Any] | None = None,
    ) -> str:
        """Continue `ctx`, read after `state`, by up to token_count tokens; return their text.

        callback: gets the text as it comes, whole characters at a time.
        """
        args = args or PIPELINE_ARGS()
        decoder = StreamDecoder(self.tokenizer)
        tokens = self.encode(ctx)
        counts: dict[int, float] = {}
        text = ""
        for _ in range(token_count):
            out, state = self.model.forward(tokens, state)
            out[list(args.token_ban)] = -np.inf
            for token, count in counts.items():
                out[token] -= args.alpha_presence + count * args.alpha_frequency
            token = self.sample_logits(out, args.temperature, args.top_p, args.top_k)
            if token in args.token_stop:
                break
            counts = {other: count * args.alpha_decay for other, count in counts.items()}
            counts[token] = counts.get(token, 0) + self._weight(token)
            if piece := decoder.feed(token):
                text += piece
                if callback:
                    callback(piece)
            tokens = [token]
        return text

    def _weight(self, token: int) -> int:
        """What a token adds to its count: blanks and digits are free to come back."""
        return int(self.decode([token]) not in " \t0123456789")


def _tokenizer(model: RWKV, path: Path) -> Tokenizer:
    if not path.is_file():
        for vocabulary in PUBLISHED:
            if path.name in (vocabulary.name, Path(vocabulary.name).stem):
                return load_tokenizer(vocabulary.n_vocab, model_path=model.args.MODEL_NAME)
    return load_tokenizer(model.args.vocab_size, path)
