"""The `rwkv` command: its subcommands, and what becomes of errors and signals.

Exit codes: 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 after Ctrl-C, 143 after
SIGTERM. A subcommand's module is imported when it is run: `rwkv --help` stays quick.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from . import __version__
from .errors import RWKVError

# Name, module with the click command `command`, first line of its help.
COMMANDS = {
    "generate": (".generate", "Continue a text, token by token."),
    "chat": (".chat", "Chat with a model."),
    "pull": (".pull", "Download a model, convert it and keep it for all commands."),
    "convert": (".convert", "Convert a checkpoint of RWKV-4 or 4a to a model file, or back."),
    "quantize": (".quantize", "Write a quantized copy of a model."),
    "rescale": (".rescale", "Level the outliers of a model, before it is quantized."),
    "importance": (".importance", "Measure which weights of a model matter, for quantizing."),
    "upgrade": (".upgrade", "Bring a model file of version 100 to version 101."),
    "merge-lora": (".merge_lora", "Merge what a LoRA has learned into a model."),
    "perplexity": (".perplexity", "Measure how well a model predicts a text."),
    "compare": (".compare", "Make a table of what a model loses and gains in each format."),
    "embed": (".embed", "Turn texts into vectors for other tasks: what a model remembers of them."),
    "bench": (".bench", "Measure how fast a model runs, beside this machine's limits."),
    "info": (".info", "Show what a model file holds, the memory it takes and this library."),
    "prepare-data": (".prepare_data", "Write texts as tokens, for training."),
    "train": (
        ".train",
        "Train an RWKV-4 on texts: a new one, BASE further, a LoRA or a state for BASE.",
    ),
}
_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return subcommand(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def subcommand(name: str) -> click.Command:
    command: click.Command = importlib.import_module(COMMANDS[name][0], __package__).command
    return command


@click.command(cls=_Commands)
@click.version_option(__version__, prog_name="rwkv", message="%(prog)s %(version)s")
def group() -> None:
    """RWKV language models on a CPU.

    \b
    rwkv generate "ROMEO:"
    rwkv COMMAND --help
    """


def main() -> NoReturn:
    """The console command."""
    run(group)


def main_as(name: str, *positional: str, **defaults: object) -> NoReturn:
    """Run one subcommand as a script of its own, as the scripts of 2023 are called.

    positional: names of the options and arguments that are arguments there, in their order; those
    that end in "?" may be left out; "?=WORD" for the last one: WORD in its place says so, too.
    defaults: of options and arguments, where the subcommand has others.
    """
    command = subcommand(name)
    for parameter in command.params:
        parameter.default = defaults.get(parameter.name or "", parameter.default)
    arguments = []
    for word in positional:
        name, is_optional, nothing = word.partition("?")
        if nothing and sys.argv[-1] == nothing.removeprefix("="):
            del sys.argv[-1]
        parameter = next(p for p in command.params if p.name == name)
        command.params.remove(parameter)
        if not is_optional:
            argument = click.Argument([name], type=parameter.type)
        else:
            argument = click.Argument(
                [name], type=parameter.type, required=False, default=parameter.default
            )
        arguments.append(argument)
    command.params[:0] = arguments
    run(command)


def run(command: click.Command) -> NoReturn:
    """Run a command on the process's arguments and exit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as `>&-` does
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a character of the text
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _note
    try:
        code = command.main(prog_name=_program(command), standalone_mode=False, **_SETTINGS)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        sys.exit(1)
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # it was stdout that failed
            _drop_output()
        text = error.strerror or str(error)
        _fail(f"{error.filename}: {text}" if error.filename else text)
    except (RWKVError, ValueError) as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(str(error) or "out of memory")


def _program(command: click.Command) -> str:
    return "rwkv" if command is group else Path(sys.argv[0]).name


def _fail(message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(1)


def _note(message: Warning | str, *where: Any, **more: Any) -> None:
    click.echo(f"note: {message}", err=True)


def _drop_output() -> None:
    """Let what is left in stdout's buffer vanish, or its failure would end the program at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
