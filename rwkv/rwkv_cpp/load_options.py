"""The options that every command with a model takes: which one, how it is loaded and evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from .models import find_model
from .progress import progress_bar
from .registry import ROWS

Command = Callable[..., Any]


class _Model(click.ParamType):  # type: ignore[type-arg]  # older ones take no argument
    name = "MODEL"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = [row.name for row in ROWS if row.name.startswith(incomplete)]
        return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def model_option(command: Command, *, quantize: bool = True) -> Command:
    """Adds -m to a command, which gets `model_path`, a model file, or None where -m is left out.

    quantize: also add --format, of which the command sees nothing more.
    """

    @functools.wraps(command)
    def with_model(*arguments: Any, model_path: str | None, **given: Any) -> Any:
        format_name = given.pop("format_name") if quantize else None
        path = None
        if model_path is not None or format_name is not None:
            with progress_bar() as progress:
                path = find_model(model_path, format_name, progress)
        return command(*arguments, model_path=path, **given)

    if quantize:
        with_model = click.option(
            "--format",
            "format_name",
            metavar="FORMAT",
            help="The model in this format, Q5_1 for example, made once from a checkpoint or an "
            "FP16 model and kept.  [default: as it is]",
        )(with_model)
    return click.option(
        "-m",
        "--model",
        "model_path",
        type=_Model(),
        help="A model file, a .pth or .safetensors checkpoint, or a name from `rwkv pull --list`.  "
        "[default: embedded]",
    )(with_model)


def _upper(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value and value.upper()


# By keyword of RWKVModel.
_OPTIONS = {
    "sparse_ffn": click.option(
        "--sparse-ffn",
        is_flag=True,
        help="Leave out weights that meet zeros, of FP32, FP16 and Q8_0 models, token by token: "
        "faster, with more memory.",
    ),
    "head": click.option(
        "--head",
        metavar="FORMAT",
        callback=_upper,
        help="Quantize an FP16 or FP32 head to this format, Q8_0 for example.  [default: as it is]",
    ),
    "activations": click.option(
        "--activations",
        type=click.Choice(["A16", "int8", "bf16"]),
        help="What quantized matrices are multiplied with: 15 bits, or 8, faster in prompts and "
        "less exact. bf16: FP16 and FP32 matrices are multiplied as bfloat16, for the same reason, "
        "with more memory.  [default: A16]",
    ),
}


def lora_option(command: Command) -> Command:
    """Adds --lora to a command, which gets `lora`, pairs of a file and its alpha, as RWKV does."""
    return click.option(
        "--lora",
        metavar="LORA ALPHA",
        type=(click.Path(path_type=Path), float),
        multiple=True,
        help="A LoRA beside the model, in any format, and the alpha that it was trained with; may "
        "be given several times.",
    )(command)


def load_options(command: Command) -> Command:
    """Adds the options to a command, which gets them together as `options`, for RWKVModel."""

    @functools.wraps(command)
    def with_options(*arguments: Any, **given: Any) -> Any:
        options = {name: given.pop(name) for name in _OPTIONS}
        return command(*arguments, options=options, **given)

    for option in reversed(_OPTIONS.values()):
        with_options = option(with_options)
    return with_options
