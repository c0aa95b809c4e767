"""The options that every command with a model takes: how it is loaded and evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def _upper(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value and value.upper()


# By keyword of RWKVModel.
_OPTIONS = {
    "sparse_ffn": click.option(
        "--sparse-ffn",
        is_flag=True,
        help="Leave out weights that meet zeros, of FP16 and FP32 models, token by token: faster, "
        "with more memory.",
    ),
    "head": click.option(
        "--head",
        metavar="FORMAT",
        callback=_upper,
        help="Quantize an FP16 or FP32 head to this format, Q8_0 for example.  [default: as it is]",
    ),
    "activations": click.option(
        "--activations",
        type=click.Choice(["A16", "int8"]),
        help="What quantized matrices are multiplied with: 15 bits, or 8, faster in prompts and "
        "less exact.  [default: A16]",
    ),
}


def load_options(command: Command) -> Command:
    """Adds the options to a command, which gets them together as `options`, for RWKVModel."""

    @functools.wraps(command)
    def with_options(*arguments: Any, **given: Any) -> Any:
        options = {name: given.pop(name) for name in _OPTIONS}
        return command(*arguments, options=options, **given)

    for option in reversed(_OPTIONS.values()):
        with_options = option(with_options)
    return with_options
