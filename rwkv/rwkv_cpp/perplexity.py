"""The `rwkv perplexity` command."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from .errors import RWKVFileError
from .fingerprint import family_id
from .library import MAX_THREADS
from .load_options import Command, load_options, lora_option, model_option
from .model import RWKVAdapter, RWKVModel, embedded_model
from .models import find_model
from .progress import progress_bar
from .scoring import Comparisons, Mean, Scores, independent_blocks, mean, score
from .texts import read_texts
from .tokenizer import Tokenizer, load_tokenizer

Figure = int | float | Mean


@dataclass(frozen=True)
class Comparison:
    """A model beside a base, over the same tokens; see `scoring.Comparisons`.

    loss_difference: the model's loss per token less the base's, with the error of the differences
    of each token, which is smaller than that of the losses. agreement: a share of 1.
    """

    base_loss: Mean
    loss_difference: Mean
    divergence: Mean
    max_divergence: float
    agreement: Mean
    max_logit_difference: float


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on some documents, in nats, over the tokens that were scored."""

    n_documents: int
    n_tokens: int  # read, the first and the skipped ones included
    n_scored: int
    n_bytes: int  # of the scored tokens
    loss_per_token: Mean
    loss_per_byte: Mean
    seconds: float
    comparison: Comparison | None = None

    @property
    def bits_per_byte(self) -> Mean:
        return self.loss_per_byte.times(1 / math.log(2))

    @property
    def perplexity(self) -> float:
        loss = self.loss_per_token.value
        return math.exp(loss) if loss < 700 else math.inf


def measure(
    model: RWKVModel,
    tokenizer: Tokenizer,
    documents: Sequence[Sequence[int]],
    *,
    skip: int = 0,
    base: RWKVModel | None = None,
    adapter: RWKVAdapter | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> Perplexity:
    """Score each token of some documents by the probability that the model gives it after the
    tokens before it.

    Each document begins with the empty state. Its first token, which nothing comes before, and its
    first `skip` ones are not scored. base: another file of the same model to compare with.
    adapter: of `model`.
    progress: called with the tokens read so far and the loss per scored token, NaN before there is
    one.

    Raises ValueError if no token is left to score, NonFiniteLogits if logits hold NaN or infinity.
    """
    first = max(skip, 1)
    longest = max(map(len, documents), default=0)
    if longest <= first:
        what = "the text has" if len(documents) == 1 else "the longest of the documents has"
        raise ValueError(
            f"{what} {longest} tokens, expected at least {first + 1}: the first"
            f"{f' {first} are' if first > 1 else ' is'} not scored"
        )
    if base is not None and base.n_vocab != model.n_vocab:
        raise ValueError(f"base: expected a model of {model.n_vocab} tokens, found {base.n_vocab}")
    began = time.perf_counter()
    scores: list[Scores] = []
    loss, n_scored = 0.0, 0
    for done, new in score(model, documents, skip=skip, base=base, adapter=adapter):
        scores += new
        loss = math.fsum([loss, *(part.losses.sum() for part in new)])
        n_scored += sum(len(part.tokens) for part in new)
        if progress is not None:
            progress(done, loss / n_scored if n_scored else math.nan)
    seconds = time.perf_counter() - began
    blocks = independent_blocks(
        np.repeat([part.document for part in scores], [len(part.tokens) for part in scores])
    )
    tokens = itertools.chain.from_iterable(part.tokens for part in scores)
    n_bytes = np.array([len(tokenizer.token_bytes(token) or b"") for token in tokens], np.float64)
    losses = np.concatenate([part.losses for part in scores])
    return Perplexity(
        len(documents),
        sum(map(len, documents)),
        n_scored,
        int(n_bytes.sum()),
        mean(losses, blocks),
        mean(losses, blocks, n_bytes),
        seconds,
        None if base is None else _comparison(scores, blocks),
    )


def _comparison(scores: Sequence[Scores], blocks: np.ndarray) -> Comparison:
    parts = [part.values for part in scores if isinstance(part.values, Comparisons)]
    all_ = Comparisons(*map(np.concatenate, zip(*parts, strict=True)))
    return Comparison(
        mean(all_.base_loss, blocks),
        mean(all_.loss - all_.base_loss, blocks),
        mean(all_.divergence, blocks),
        float(all_.divergence.max()),
        mean(all_.agreement, blocks),
        float(all_.difference.max()),
    )


def refuse_another_model(path: Path, base: Path) -> None:
    """Raises RWKVFileError unless both files hold the same model, in any formats."""
    if family_id(path) != family_id(base):
        raise RWKVFileError(
            f"{base}: is another model than {path}: expected a file of the same one, in another "
            "format for example (`rwkv info` shows what a file holds)"
        )


# ---- Texts ---------------------------------------------------------------------------------------


def first_tokens(documents: Sequence[list[int]], limit: int | None) -> list[list[int]]:
    """So many tokens of the documents together, in their order; None: all."""
    if limit is None:
        return [*documents]
    kept: list[list[int]] = []
    for tokens in documents:
        if limit <= 0:
            break
        kept.append(tokens[:limit])
        limit -= len(tokens)
    return kept


def text_options(command: Command, *, scores: bool = True) -> Command:
    """Adds the options of what is read of TEXT, and how, to a command, which gets `is_documents`,
    `limit`, `threads`, `vocabulary` and, if it scores what it reads, `skip`."""
    for name, option in reversed(_TEXT_OPTIONS.items()):
        if scores or name != "skip":
            command = option(command)
    return command


_TEXT_OPTIONS = {
    "documents": click.option(
        "--documents",
        "is_documents",
        is_flag=True,
        help='TEXT is JSON Lines: a document, {"text": "…"}, a line. Each is read from its '
        "beginning.",
    ),
    "skip": click.option(
        "--skip",
        type=click.IntRange(min=0),
        default=0,
        help="Do not score the first tokens, of each document, which have little to go by.",
    ),
    "limit": click.option("--limit", type=click.IntRange(min=1), help="Read so many tokens only."),
    "threads": click.option(
        "--threads", type=click.IntRange(1, MAX_THREADS), help="[default: physical cores]"
    ),
    "vocabulary": click.option(
        "--vocab",
        "vocabulary",
        type=click.Path(path_type=Path),
        help="Vocabulary file.  [default: looked for, see `rwkv generate --help`]",
    ),
}


# ---- The command ---------------------------------------------------------------------------------


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--compare",
    "base",
    metavar="BASE",
    help="Also tell how far the model is from BASE, another file of the same model, which is "
    "loaded as it is.",
)
@text_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@lora_option
@load_options
def command(
    text: Path,
    model_path: Path | None,
    base: str | None,
    is_documents: bool,
    skip: int,
    limit: int | None,
    threads: int | None,
    vocabulary: Path | None,
    as_json: bool,
    lora: tuple[tuple[Path, float], ...],
    options: dict[str, Any],
) -> None:
    """Measure how well a model predicts a text.

    TEXT is a file in UTF-8, or - for stdin. Every token is scored by the probability that the model
    gives it after all tokens before it; lower is better. Only losses per byte can be compared
    between models of different vocabularies. ± is one standard error.

    \b
    rwkv perplexity book.txt -m model.bin --limit 10000
    rwkv perplexity book.txt -m model-Q5_1.bin --compare model.bin
    """
    path = model_path or embedded_model()
    base_path = None
    if base is not None:
        with progress_bar() as report:
            base_path = find_model(base, None, report)
        refuse_another_model(path, base_path)
    texts = read_texts(text, is_documents)
    with RWKVModel(None, path, threads, **options) as model:
        tokenizer = load_tokenizer(model.n_vocab, vocabulary, path)
        documents = first_tokens([tokenizer.encode(part) for part in texts], limit)
        adapter = model.adapter(lora) if lora else None
        if base_path is None:
            result = _measure(model, tokenizer, documents, skip, adapter)
        else:
            with RWKVModel(None, base_path, threads) as base_model:
                result = _measure(model, tokenizer, documents, skip, adapter, base_model)
    shown = figures(result)
    click.echo(json.dumps(members(shown)) if as_json else _table(shown))


def _measure(
    model: RWKVModel,
    tokenizer: Tokenizer,
    documents: list[list[int]],
    skip: int,
    adapter: RWKVAdapter | None,
    base: RWKVModel | None = None,
) -> Perplexity:
    """With a bar: time left, loss so far."""
    with tqdm(total=sum(map(len, documents)), unit="token", disable=None) as bar:

        def progress(done: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        return measure(
            model, tokenizer, documents, skip=skip, base=base, adapter=adapter, progress=progress
        )


def figures(result: Perplexity) -> dict[str, Figure]:
    """By name, in the order in which they are shown."""
    shown: dict[str, Figure] = {
        "documents": result.n_documents,
        "tokens": result.n_tokens,
        "scored tokens": result.n_scored,
        "scored bytes": result.n_bytes,
        "loss per token": result.loss_per_token,
        "loss per byte": result.loss_per_byte,
        "bits per byte": result.bits_per_byte,
        "perplexity": result.perplexity,
    }
    if other := result.comparison:
        shown |= {
            "base loss": other.base_loss,
            "loss difference": other.loss_difference,
            "KL divergence": other.divergence,
            "largest KL": other.max_divergence,
            "top-1 agreement": other.agreement,
            "largest logit difference": other.max_logit_difference,
        }
    return shown | {"ms per token": 1000 * result.seconds / result.n_tokens}


def members(figures: dict[str, Figure]) -> dict[str, int | float | None]:
    """For JSON: means as two of them, null for what is no number."""
    found: dict[str, int | float | None] = {}
    for name, value in figures.items():
        key = name.lower().replace(" ", "_").replace("-", "_")
        if isinstance(value, Mean):
            found |= {key: value.value, f"{key}_error": value.error}
        else:
            found[key] = value
    return {key: value if _is_finite(value) else None for key, value in found.items()}


def _is_finite(value: int | float | None) -> bool:
    return value is not None and math.isfinite(value)


def _table(figures: dict[str, Figure]) -> str:
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in figures.items())


def _shown(value: Figure) -> str:
    if isinstance(value, Mean):
        error = "" if math.isnan(value.error) else f" ± {value.error:.2g}"
        return f"{value.value:,.6g}{error}"
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
