"""The `rwkv generate` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from .library import MAX_THREADS
from .load_options import load_options, model_option
from .model import RWKVModel, embedded_model
from .sampling import sample_logits
from .tokenizer import StreamDecoder, Tokenizer, load_tokenizer

# What moves a terminal's cursor or worse, shown as the escape that Python would write.
_CONTROL_CHARACTERS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def generate(
    model: RWKVModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_p: float = 0.8,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the text that the model continues `prompt` with, whole characters as they come.

    Ends after `max_tokens` tokens or with the end-of-text token. An empty prompt stands for what
    `first_token` says. Sampling options as for `sample_logits`; the same seed gives the same text.
    """
    random = np.random.default_rng(seed)
    decoder = StreamDecoder(tokenizer)
    logits, state = model.eval_sequence(
        tokenizer.encode(prompt) or [first_token(tokenizer)], state_in=None
    )
    for left in reversed(range(max_tokens)):
        token = sample_logits(logits, temperature, top_p, logit_bias, random)
        if ends_text(tokenizer, token):
            break
        if text := decoder.feed(token):
            yield text
        if left > 0:
            model.eval(token, state, state, logits)
    if text := decoder.flush():
        yield text


def ends_text(tokenizer: Tokenizer, token: int) -> bool:
    """Whether `token` ends a text: token 0 of 20B and World, which has no bytes."""
    return token == 0 and tokenizer.token_bytes(0) == b""


def first_token(tokenizer: Tokenizer) -> int:
    """What a text begins after: token 0 (end of text) where the vocabulary has it, or a newline."""
    return 0 if ends_text(tokenizer, 0) else tokenizer.encode("\n")[0]


class _Bias(click.ParamType):
    name = "ID=VALUE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not a token's number, '=' and a number", param, ctx)


@click.command()
@click.argument("prompt", default="")
@model_option
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Stop after so many tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="0 always takes the likeliest token, higher is wilder.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="Sample from the likeliest tokens of this probability in all.",
)
@click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same text.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="[default: physical cores]")
@click.option(
    "--vocab",
    "vocabulary",
    type=click.Path(path_type=Path),
    help="Vocabulary file.  [default: looked for]",
)
@click.option(
    "--logit-bias",
    type=_Bias(),
    multiple=True,
    help="Add VALUE to the logit of token ID; -inf bans it. May be repeated.",
)
@load_options
def command(
    prompt: str,
    model_path: Path | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    threads: int | None,
    vocabulary: Path | None,
    logit_bias: tuple[tuple[int, float], ...],
    options: dict[str, Any],
) -> None:
    """Continue a text, token by token.

    PROMPT is the text, or - to read it from stdin. It is printed, then what the model writes.

    A model of 50277 tokens needs the file 20B_tokenizer.json, one of 65536 tokens
    rwkv_vocab_v20230424.txt. They are looked for beside the model, in $RWKV_HOME (by default the
    user's cache folder), in an installed package rwkv or pyrwkv-tokenizer, and then downloaded.

    \b
    rwkv generate "ROMEO:"
    rwkv generate "In a shocking finding," -m model.bin -n 100 --seed 1
    """
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="replace")
    else:  # arguments that are not UTF-8 arrive as surrogates
        prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")
    path = model_path or embedded_model()
    with RWKVModel(None, path, threads, **options) as model:
        tokenizer = load_tokenizer(model.n_vocab, vocabulary, path)
        if not prompt:
            token = first_token(tokenizer)
            what = "token 0 (end of text)" if token == 0 else "a newline"
            click.echo(f"the prompt is empty: starting after {what}", err=True)
        _write(prompt)
        for text in generate(
            model,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            logit_bias=dict(logit_bias),
            seed=seed,
        ):
            _write(text)
        click.echo()


def _write(text: str) -> None:
    if sys.stdout.isatty():
        text = text.translate(_CONTROL_CHARACTERS)
    sys.stdout.write(text)
    sys.stdout.flush()
