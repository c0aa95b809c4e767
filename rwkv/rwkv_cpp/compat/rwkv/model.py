"""`rwkv.model`: a model whose state is a list of arrays, in ChatRWKV's order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...model import RWKVModel, RWKVSequence
from ...state import State
from ..opening import model_file
from .strategy import format_of


class Tensor(np.ndarray):
    """An array that answers the calls with which code gets from a tensor to an array."""

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return self

    def clone(self) -> Tensor:
        return self.copy()

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)


class RWKV:
    """model: a file, with or without its suffix, or a name that `rwkv pull` knows.

    strategy: see `strategy`; it says what format a checkpoint is converted to, once.
    args: MODEL_NAME, strategy_string, n_embd, n_layer and vocab_size, as of the original.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        strategy: str,
        verbose: bool = True,
        convert_and_save_and_exit: str | None = None,
    ) -> None:
        """verbose: nothing is printed either way. Raises ValueError for an unknown strategy."""
        if convert_and_save_and_exit is not None:
            raise ValueError(
                "convert_and_save_and_exit: no file is needed, since a checkpoint is converted once"
                " and kept; `rwkv convert` and `rwkv quantize` write files"
            )
        path = model_file(model, format_of(strategy))
        self.model = RWKVModel(None, path)
        self.args = SimpleNamespace(
            MODEL_NAME=os.fspath(path),
            strategy_string=strategy,
            n_embd=self.model.n_embed,
            n_layer=self.model.n_layer,
            vocab_size=self.model.n_vocab,
        )
        self._vectors(self.model.init_state())  # RWKV-4a is refused here

    def forward(
        self, tokens: Iterable[int], state: Sequence[Any] | None, full_output: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Read tokens; return (logits, state).

        state: what the call before returned, or None; it is not changed, so no deepcopy is needed.
        logits: (n_vocab) after the last token; (n_tokens, n_vocab) if full_output is true and there
        are several tokens. state: five arrays of (n_embed) for each layer: att_xx, aa, bb, pp,
        ffn_xx.
        """
        tokens, n_layer = list(tokens), self.args.n_layer
        values = None
        if state is not None:
            values = State.from_layout("ChatRWKV", state, n_layer=n_layer).values
        n_logits = max(len(tokens), 1) if full_output else 1
        (result,) = self.model.eval_batch([RWKVSequence(tokens, values, n_logits=n_logits)])
        logits = np.asarray(result.logits).view(Tensor)
        return logits if n_logits > 1 else logits[0], self._vectors(result.state)

    def _vectors(self, values: np.ndarray) -> list[Tensor]:
        """Values of a state as ChatRWKV has them."""
        state = State(values, n_layer=self.args.n_layer, n_embed=self.args.n_embd)
        return [part.view(Tensor) for part in state.export("ChatRWKV")]
