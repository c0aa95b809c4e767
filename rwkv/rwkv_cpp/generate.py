"""The `rwkv generate` command."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from .atomic import refuse_same_file
from .generation import Completion
from .library import MAX_THREADS
from .load_options import load_options, lora_option, model_option
from .progress import progress_bar
from .rwkv import RWKV
from .sampling import Sampling
from .sampling_options import sampling_options
from .state import State
from .terminal import harmless
from .tokenizer import first_token

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def _unescaped(text: str) -> str:
    """Text in which \\n is a line's end, so that a shell needs no tricks."""
    return re.sub(r"\\[nrt\\]", lambda match: _ESCAPES[match[0]], text)


@click.command()
@click.argument("prompt", default="")
@click.option("-p", "--prompt", "prompt_option", hidden=True)  # as other programs have it
@click.option("--file", type=click.Path(path_type=Path), help="Read the prompt from this file.")
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
    "--count",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Write so many answers; with --num-beams the best ones, at most as many as beams.",
)
@click.option(
    "--stop",
    type=_unescaped,
    metavar="TEXT",
    multiple=True,
    help=r"Stop before this text, in which \n is a new line. May be repeated.",
)
@click.option(
    "--stop-token",
    "stop_tokens",
    type=click.IntRange(min=0),
    multiple=True,
    help="Stop before this token. May be repeated.",
)
@click.option(
    "--ignore-eos", "--forever", is_flag=True, help="Never write the token that ends a text."
)
@click.option(
    "--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop after this time."
)
@click.option(
    "--load-state",
    type=click.Path(path_type=Path),
    help="Go on from a state that was saved; PROMPT, if there is one, comes after it.",
)
@click.option(
    "--save-state", type=click.Path(path_type=Path), help="Save the state at the end to this file."
)
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --json: each token's log-probability, and those of N alternatives.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each answer.")
@sampling_options
@click.option(
    "--threads",
    "--max-eval-threads",
    "threads",
    type=click.IntRange(1, MAX_THREADS),
    help="[default: physical cores]",
)
@click.option("--max-load-threads", hidden=True, expose_value=False)  # one number serves both
@click.option(
    "-t",
    "--vocab",
    "--tokenizer",
    "vocabulary",
    type=click.Path(path_type=Path),
    help="Vocabulary file.  [default: looked for]",
)
@lora_option
@load_options
def command(
    prompt: str,
    prompt_option: str | None,
    file: Path | None,
    model_path: Path | None,
    max_tokens: int,
    count: int,
    stop: tuple[str, ...],
    stop_tokens: tuple[int, ...],
    ignore_eos: bool,
    time_limit: float | None,
    load_state: Path | None,
    save_state: Path | None,
    logprobs: int | None,
    as_json: bool,
    sampling: Sampling,
    threads: int | None,
    vocabulary: Path | None,
    lora: tuple[tuple[Path, float], ...],
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
    rwkv generate "ROMEO:" --stop "\\n\\n" --save-state romeo.state
    rwkv generate "JULIET:" --load-state romeo.state
    """
    text = _prompt(prompt, prompt_option, file)
    if count > 1 and save_state is not None:
        raise click.UsageError("--save-state goes with one answer, --count 1")
    if save_state is not None and not save_state.absolute().parent.is_dir():
        raise click.UsageError(f"--save-state: there is no folder '{save_state.parent}'")
    for path in (model_path, *(path for path, _ in lora)):
        if save_state is not None and path is not None:
            refuse_same_file(path, save_state)
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs goes with --json")
    state = None if load_state is None else State.load(load_state)
    with RWKV(model_path, vocabulary=vocabulary, n_threads=threads, lora=lora, **options) as model:
        if not text and state is None:
            token = first_token(model.tokenizer)
            what = "token 0 (end of text)" if token == 0 else "a newline"
            click.echo(f"the prompt is empty: starting after {what}", err=True)
        arguments: dict[str, Any] = {
            "state": state,
            "sampling": sampling,
            "max_tokens": max_tokens,
            "stop": stop,
            "stop_tokens": stop_tokens,
            "ignore_eos": ignore_eos,
            "logprobs": logprobs,
            "time_limit": time_limit,
        }
        if as_json or count > 1:
            with progress_bar() as progress:
                answers = model.generate([text], n=count, progress=progress, **arguments)
            for number, answer in enumerate(answers, start=1):
                if as_json:
                    click.echo(json.dumps(_as_json(answer)))
                else:
                    _write(f"--- Generation {number} ---\n{text}[{answer}]\n\n")
            if not as_json:
                click.echo(_took(answers))
        else:
            with progress_bar() as progress:
                stream = model.stream(text, progress=progress, **arguments)
                piece = next(stream, "")  # the prompt is read, its bar is over
            _write(text + piece)
            for piece in stream:
                _write(piece)
            click.echo()
            answers = [stream.completion]
    if save_state is not None:
        answers[0].state.save(save_state)


def _prompt(argument: str, option: str | None, file: Path | None) -> str:
    given = [text for text in (argument, option) if text]
    if len(given) + (file is not None) > 1:
        raise click.UsageError("the prompt is given twice: PROMPT, or --file")
    if file is not None:
        data = file.read_bytes()
    elif given == ["-"]:
        data = sys.stdin.buffer.read()
    else:  # arguments that are not UTF-8 arrive as surrogates
        data = "".join(given).encode(errors="surrogateescape")
    return data.decode(errors="replace")


def _as_json(answer: Completion) -> dict[str, Any]:
    members = {name: getattr(answer, name) for name in ("text", "tokens", "finish_reason", "stop")}
    if answer.logprobs is not None:
        members["logprobs"] = [told._asdict() for told in answer.logprobs]
    return members | {"timings": dataclasses.asdict(answer.timings)}


def _took(answers: list[Completion]) -> str:
    """How long answers took that were written together."""
    seconds = answers[0].timings.seconds
    n_tokens = sum(answer.timings.tokens for answer in answers)
    return f"Took {seconds:.3f} sec, {1000 * seconds / max(n_tokens, 1):.0f} ms per token"


def _write(text: str) -> None:
    if sys.stdout.isatty():
        text = harmless(text)
    sys.stdout.write(text)
    sys.stdout.flush()
