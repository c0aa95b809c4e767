"""Which tokens may follow, so that a text matches a JSON schema, a regular expression or a grammar.

The package llguidance does the work (`pip install 'rwkv-ggml[grammar]'`). It is given the bytes of
every token, so that it works with all three tokenizers, and also inside a character.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import RWKVError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

# As Python writes JSON. With spaces allowed everywhere, a model may write them for ever.
JSON_SPACING: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class Grammar:
    """What a text may go on with, token after token."""

    def __init__(self, tokenizer: Tokenizer, kind: str, text: str) -> None:
        """
        - kind: "json_schema", "regex", or "grammar", which is one in the notation of Lark.
        - text: the rule itself.

        Raises ValueError for a text that is no such rule, RWKVError if the package is missing.
        """
        self._n_vocab = tokenizer.n_vocab
        self._kind = kind
        self._matcher = _matcher(tokenizer, kind, text).deep_copy()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """(n_vocab) whether each token may come next. Token 0 of 20B and World, which ends a text,
        may where the rule is fulfilled. Raises RWKVError where the rule is too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._refuse_error()
        return np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(bool)

    def accept(self, token: int, what: str) -> None:
        """Go on with a token. Raises ValueError, which begins with `what`, if it is not allowed;
        then nothing has changed."""
        if self._matcher.is_stopped() or not self._matcher.validate_tokens([token]):
            self._refuse_error()
            raise ValueError(f"{what} is not what the {self._kind} goes on with")
        self._matcher.consume_token(token)
        self._refuse_error()

    @property
    def finished(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Grammar:
        twin = object.__new__(Grammar)
        twin._n_vocab, twin._kind = self._n_vocab, self._kind
        twin._matcher = self._matcher.deep_copy()
        return twin

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            raise RWKVError(f"{self._kind}: {_gist(self._matcher.get_error())}")


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """What llguidance knows of a tokenizer."""
    try:
        import llguidance
    except ImportError:
        raise RWKVError(
            "json_schema, regex and grammar need the package llguidance:"
            " pip install 'rwkv-ggml[grammar]'"
        ) from None
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(tokenizer)))


class _Tokens:
    """A tokenizer as llguidance asks for one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.token_bytes(token) or b"" for token in range(tokenizer.n_vocab)]
        self.eos_token_id = 0
        if self.tokens[0]:  # bytes have no token that ends a text: one more, which the model lacks
            self.eos_token_id = len(self.tokens)
            self.tokens.append(b"")
        self.special_token_ids = [self.eos_token_id]
        self._encode = tokenizer.encode_bytes

    def __call__(self, data: bytes) -> list[int]:
        return self._encode(data)


@functools.lru_cache(maxsize=16)
def _matcher(tokenizer: Tokenizer, kind: str, text: str) -> Any:
    """A matcher at its start, to be copied: making one takes up to seconds."""
    vocabulary = _vocabulary(tokenizer)
    from llguidance import LLMatcher

    if kind == "json_schema":
        rule = LLMatcher.grammar_from_json_schema(text, defaults=JSON_SPACING)
    elif kind == "regex":
        rule = LLMatcher.grammar_from_regex(text)
    else:
        rule = LLMatcher.grammar_from_lark(text)
    matcher = LLMatcher(vocabulary, rule, log_level=0)
    if matcher.is_error():
        raise ValueError(f"{kind}: {_gist(matcher.get_error())}")
    return matcher


def _gist(message: str) -> str:
    """The line that matters: a regular expression's is the last of several."""
    lines = message.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[0].removeprefix("error: ") if errors else lines[0]
