"""`rwkvstic.rwkvMaster`: a model that keeps one state, which text is read into and written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...rwkv import RWKV
from ...state import State
from ...tokenizer import first_token
from ..repeatable import fresh_seed


class RWKVMaster:
    """What `load.RWKV` returns. model: the `rwkv_cpp.RWKV` that does it."""

    def __init__(self, model: RWKV) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self._state = self.emptyState()

    # ---- The state -------------------------------------------------------------------------------

    def emptyState(self) -> State:
        """The state before any text."""
        return self.model.empty_state()

    def getState(self) -> State:
        """A copy of the state."""
        return self._state.copy()

    def setState(self, state: State) -> None:
        """Go on from a copy of `state`. Raises ForeignState for that of another model."""
        self._state = state.for_model(self.model)

    def resetState(self) -> None:
        self._state = self.emptyState()

    # ---- Text ------------------------------------------------------------------------------------

    def encode(self, x: str) -> list[int]:
        return self.tokenizer.encode(x)

    def decode(self, x: Iterable[int]) -> str:
        return self.tokenizer.decode(x)

    def loadContext(
        self,
        newctx: str = "",
        ctx: str = "\n\n",
        statex: State | None = None,
        progressCallBack: Callable[[list[int]], object] | None = None,
        batch: int = 20,
    ) -> tuple[list[int], State]:
        """Read a text; return its tokens and the state after it.

        statex: read it after this state. progressCallBack: gets the tokens that were read since it
        was called last. ctx, batch: have no effect.
        """
        tokens = self.encode(newctx)
        done = 0

        def progress(what: str, read: int, total: int) -> None:
            nonlocal done
            if progressCallBack is not None:
                progressCallBack(tokens[done:read])
            done = read

        self._state = self.model.read(tokens, statex or self._state, progress=progress)
        return tokens, self.getState()

    def forward(
        self,
        state: State | None = None,
        number: int = 1,
        stopStrings: Sequence[str] = ("<|endoftext|>",),
        stopTokens: Sequence[int] = (0,),
        progressLambda: Callable[[dict[str, Any]], object] | None = None,
        end_adj: float = 0.0,
        temp: float = 1.0,
        top_p_usual: float = 0.8,
        *,
        top_p: float | None = None,
        tau: float = 1.0,
    ) -> dict[str, Any]:
        """Write `number` tokens; return what was written.

        output: the text, without what stopped it. state: after it. logits: (n_vocab), what the next
        token would be drawn from.

        state: go on from this one. stopStrings, stopTokens: end the text. progressLambda: called
        with output, state and logits so far, tokens (all ids), current (the newest text), progress
        (how many tokens) and total (number), whenever there is new text. end_adj: is added to the
        logit of token 0. top_p: the same as top_p_usual. tau: of typical sampling, 1 for none.
        """
        start = state or self._state
        stream = self.model.stream(
            () if start.logits is not None else [first_token(self.tokenizer)],
            state=start,
            max_tokens=number,
            stop=stopStrings,
            stop_tokens=stopTokens,
            ignore_eos=0 not in stopTokens,
            temperature=temp,
            top_p=top_p_usual if top_p is None else top_p,
            typical_p=tau,
            logit_bias={0: end_adj} if end_adj else {},
            seed=fresh_seed(),
        )
        output = ""
        for piece in stream:
            output += piece
            if progressLambda is not None:
                so_far = stream.so_far
                progress = {"tokens": so_far.tokens, "progress": len(so_far.tokens)}
                progress |= {"current": piece, "total": number}
                progressLambda(_result(output, so_far.state) | progress)
        self._state = stream.completion.state
        return _result(stream.completion.text, self.getState())


def _result(output: str, state: State) -> dict[str, Any]:
    return {"output": output, "state": state, "logits": state.logits}
