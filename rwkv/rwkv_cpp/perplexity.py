"""The `rwkv perplexity` command."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from .errors import NonFiniteLogits, RWKVFileError
from .library import MAX_THREADS
from .load_options import load_options, model_option
from .model import RWKVModel, RWKVSequence, embedded_model
from .tokenizer import Tokenizer, load_tokenizer

_CHUNK_LOGITS = 1 << 22  # floats of logits that one call may return: 16 MB


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on a text, in nats, over the tokens that were scored."""

    n_tokens: int  # read, the first and the skipped ones included
    n_scored: int
    n_bytes: int  # of the scored tokens
    loss: float  # the sum
    seconds: float

    @property
    def loss_per_token(self) -> float:
        return self.loss / self.n_scored

    @property
    def loss_per_byte(self) -> float:
        return self.loss / self.n_bytes if self.n_bytes else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.loss_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss_per_token) if self.loss_per_token < 700 else math.inf


def measure(
    model: RWKVModel,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    *,
    skip: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> Perplexity:
    """Score each token by the probability that the model gives it after the tokens before it.

    The first token, which nothing comes before, and the first `skip` ones are not scored.
    progress: called with the tokens read so far and the loss per scored token, NaN before there is
    one.

    Raises ValueError if no token is left to score, NonFiniteLogits if the model yields NaN.
    """
    first = max(skip, 1)
    if len(tokens) <= first:
        raise ValueError(
            f"the text has {len(tokens)} tokens, expected at least {first + 1}: the first"
            f"{f' {first} are' if first > 1 else ' is'} not scored"
        )
    began = time.perf_counter()
    chunk_size = min(max(_CHUNK_LOGITS // model.n_vocab, 16), 1024)
    loss, n_scored, state = 0.0, 0, None
    for start in range(0, len(tokens), chunk_size):
        chunk = tokens[start : start + chunk_size]
        following = tokens[start + 1 : start + 1 + len(chunk)]
        # Row i of the logits predicts token start + i + 1, which is scored from `first` on.
        unscored = min(max(first - start - 1, 0), len(following))
        n_logits = len(chunk) - unscored
        (result,) = model.eval_batch([RWKVSequence(chunk, state, n_logits=n_logits)])
        state = result.state
        if result.logits is not None:
            # One row at a time stays in the cache. The last logits of all have no token to predict.
            pairs = zip(result.logits, following[unscored:], strict=False)
            losses = [cross_entropy(row, token) for row, token in pairs]
            loss += math.fsum(losses)
            n_scored += len(losses)
            if not math.isfinite(loss):
                raise NonFiniteLogits(
                    f"logits hold NaN or infinity in the {len(chunk)} tokens from {start} on"
                )
        if progress is not None:
            progress(start + len(chunk), loss / n_scored if n_scored else math.nan)
    n_bytes = sum(len(tokenizer.token_bytes(token) or b"") for token in tokens[first:])
    return Perplexity(len(tokens), n_scored, n_bytes, loss, time.perf_counter() - began)


def cross_entropy(logits: np.ndarray, target: int) -> float:
    """-log of the probability that a row of logits gives the target, in float64."""
    row = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities become NaN
        row -= row.max()
    own = row[target]
    return float(np.log(np.exp(row, out=row).sum()) - own)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, - for stdin. Raises RWKVFileError for other encodings."""
    is_stdin = str(path) == "-"
    data = sys.stdin.buffer.read() if is_stdin else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        name = "stdin" if is_stdin else path
        raise RWKVFileError(f"{name}: not UTF-8 at offset {error.start}") from None


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--skip",
    type=click.IntRange(min=0),
    default=0,
    help="Do not score the first tokens, which have little to go by.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Read so many tokens only.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="[default: physical cores]")
@click.option(
    "--vocab",
    "vocabulary",
    type=click.Path(path_type=Path),
    help="Vocabulary file.  [default: looked for, see `rwkv generate --help`]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@load_options
def command(
    text: Path,
    model_path: Path | None,
    skip: int,
    limit: int | None,
    threads: int | None,
    vocabulary: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Measure how well a model predicts a text.

    TEXT is a file in UTF-8, or - for stdin. Every token is scored by the probability that the model
    gives it after all tokens before it; lower is better. Only losses per byte can be compared
    between models of different vocabularies.

    \b
    rwkv perplexity book.txt -m model.bin --limit 10000
    """
    path = model_path or embedded_model()
    content = read_text(text)
    with RWKVModel(None, path, threads, **options) as model:
        tokenizer = load_tokenizer(model.n_vocab, vocabulary, path)
        tokens = tokenizer.encode(content)[:limit]
        with tqdm(total=len(tokens), unit="token", disable=None) as bar:

            def progress(done: int, loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(done - bar.n)

            result = measure(model, tokenizer, tokens, skip=skip, progress=progress)
    figures = {
        "tokens": result.n_tokens,
        "scored tokens": result.n_scored,
        "scored bytes": result.n_bytes,
        "loss per token": result.loss_per_token,
        "loss per byte": result.loss_per_byte,
        "bits per byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "ms per token": 1000 * result.seconds / result.n_tokens,
    }
    if as_json:
        click.echo(json.dumps({key.replace(" ", "_"): value for key, value in figures.items()}))
        return
    for key, value in figures.items():
        click.echo(
            f"{key:<15} {value:,.6g}" if isinstance(value, float) else f"{key:<15} {value:,}"
        )
