"""lm-eval, EleutherAI's evaluation harness: a model class for its tasks.

    from lm_eval import simple_evaluate
    from rwkv_cpp.compat.lm_eval import RWKVLM

    simple_evaluate(RWKVLM("model.bin"), tasks=["lambada_openai"])

or, with its own command line: `python -m rwkv_cpp.compat.lm_eval run --model rwkv-ggml …`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

from tqdm import tqdm

from ...rwkv import RWKV

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(f"{error}; pip install 'rwkv-ggml[eval]'") from None

T = TypeVar("T")


@register_model("rwkv-ggml")
class RWKVLM(LM):
    """A model of this library as lm-eval asks it.

    pretrained: an RWKV, or what it opens; None: the embedded model. batch_size: prompts that are
    continued together. options: of RWKV. max_batch_size, device: given by lm-eval whatever the
    model is ("cuda:0", even where there is none), and of no use here.

    A context and its continuation are cut into tokens each on its own, spaces between them going to
    the continuation. The choices of a question are scored in one batch, their context is read once.
    Contexts may be of any length: nothing is cut off.
    """

    def __init__(
        self,
        pretrained: RWKV | str | None = None,
        batch_size: int | str = 8,
        max_batch_size: object = None,
        device: object = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size!r}: expected a number from 1 on")
        self.batch_size = int(batch_size)
        self.model = pretrained if isinstance(pretrained, RWKV) else RWKV(pretrained, **options)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation."""
        pairs = [_split(*request.args) for request in requests]

        def scored() -> Iterator[tuple[float, bool]]:
            for context, group in groupby(pairs, key=lambda pair: pair[0]):
                texts = [continuation for _, continuation in group]
                choice = self.model.choose(context, [text for text in texts if text] or [" "])
                found = zip(choice.logprobs, choice.greedy, strict=True)
                yield from (next(found) if text else (0.0, True) for text in texts)

        return self._answers("loglikelihood", requests, scored, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, read as a whole from the beginning."""

        def scored() -> Iterator[float]:
            for request in requests:
                yield self.model.score(request.args[0]).total

        return self._answers("loglikelihood_rolling", requests, scored, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string; greedily unless the
        task says otherwise. Arguments of the task that are fields of Sampling go there."""

        def written() -> Iterator[str]:
            for task, group in groupby(requests, key=lambda request: request.args[1]):
                prompts = [request.args[0] for request in group]
                for first in range(0, len(prompts), self.batch_size):
                    batch = prompts[first : first + self.batch_size]
                    for completion in self.model.generate(batch, **_generation(task)):
                        yield completion.text

        return self._answers("generate_until", requests, written, disable_tqdm)

    def _answers(
        self,
        kind: str,
        requests: Sequence[Any],
        answers: Callable[[], Iterator[T]],
        disable_tqdm: bool,
    ) -> list[T]:
        """All answers in order, each kept by lm-eval's cache as soon as it is there."""
        results = []
        bar = tqdm(requests, desc=f"Running {kind} requests", disable=disable_tqdm)
        for request, answer in zip(bar, answers(), strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
            results.append(answer)
        return results


def _split(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of the context go to the continuation: tokens begin with them."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _generation(task: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `RWKV.generate` from those of a task."""
    options = dict(task)
    until = options.pop("until", None) or ()
    does_sample = options.pop("do_sample", options.get("temperature", 0) > 0)
    temperature = options.pop("temperature", 1.0)
    return {
        "stop": until,
        "max_tokens": options.pop("max_gen_toks", 256),
        "temperature": temperature if does_sample else 0.0,
        **options,
    }
