"""The options of every command that samples: one for each field of Sampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .sampling import FIELDS, FieldInfo, Sampling

Command = Callable[..., Any]


def sampling_options(command: Command, *, as_changes: bool = False) -> Command:
    """Adds the options to a command, which gets them together as `sampling`, a Sampling.

    as_changes: the command has defaults of its own and gets a dict of the fields that were given.
    """

    def with_options(*arguments: Any, **given: Any) -> Any:
        values = {name: given.pop(name) for name in FIELDS}
        if as_changes:
            values = {name: value for name, value in values.items() if value not in (None, ())}
        if "logit_bias" in values:
            values["logit_bias"] = dict(values["logit_bias"])
        try:
            sampling = Sampling(**values)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        return command(*arguments, sampling=values if as_changes else sampling, **given)

    decorated: Command = functools.wraps(command)(with_options)
    for name, info in reversed(FIELDS.items()):
        decorated = _option(name, info, not as_changes)(decorated)
    return decorated


def value_of(name: str, text: str) -> Any:
    """The value of a field as its option reads it, several separated by commas; "none" for none.

    Raises ValueError, naming the field.
    """
    info = FIELDS[name]
    parameter = click.types.convert_type(_KINDS[info.kind][0](info))
    repeated = info.kind in _REPEATED
    if text == "none" and (repeated or getattr(Sampling, name) is None):
        return _REPEATED[info.kind](()) if repeated else None
    try:
        parts = text.split(",") if repeated else [text]
        values = [parameter.convert(part, None, None) for part in parts]
    except click.BadParameter as error:
        raise ValueError(f"{name}: {error.message}") from None
    return _REPEATED[info.kind](values) if repeated else values[0]


def option_name(name: str, info: FieldInfo) -> str:
    """How a field is written on the command line."""
    return info.option or "--" + name.replace("_", "-")


def _option(name: str, info: FieldInfo, has_default: bool) -> Callable[[Command], Command]:
    repeated = info.kind in _REPEATED
    default = None if repeated or not has_default else getattr(Sampling, name)
    kind, metavar = _KINDS[info.kind]
    return click.option(
        option_name(name, info),
        name,
        type=kind(info),
        metavar=metavar,
        multiple=repeated,
        default=default,
        show_default=default is not None,
        help=info.help + (" May be repeated." if repeated else ""),
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a token's id, '=' and a number") from None


def _text_or_file(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text("utf-8")
    except OSError as error:
        raise click.BadParameter(f"'{text[1:]}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.BadParameter(f"'{text[1:]}': not UTF-8") from None


# What a field's kind is on the command line: how a value is read, and what it is called in the help
# where click does not know.
_KINDS: dict[str, tuple[Callable[[FieldInfo], Any], str | None]] = {
    "float": (lambda info: _number(click.FloatRange, info), None),
    "int": (lambda info: _number(click.IntRange, info), None),
    "seed": (lambda info: _number(click.IntRange, info), None),
    "biases": (lambda info: _bias, "ID=VALUE"),
    "tokens": (lambda info: click.IntRange(min=0), "ID"),
    "json": (lambda info: _text_or_file, "TEXT|@FILE"),
    "lark": (lambda info: _text_or_file, "TEXT|@FILE"),
    "regex": (lambda info: str, "TEXT"),
}

# Of the kinds that may be given several times: what becomes of the values.
_REPEATED: dict[str, Callable[[Any], Any]] = {"biases": dict, "tokens": tuple}


def _number(kind: Callable[..., Any], info: FieldInfo) -> Any:
    low, high = (None if math.isinf(end) else end for end in (info.low, info.high))
    if low is None:
        return click.FLOAT
    return kind(low, high, min_open=info.without_low)
