"""Prints docs/cli.md, the help texts of all commands."""

import click
from rwkv_cpp import cli

_WIDTH = 88
_HEAD = """# The command line

What `rwkv --help` and `rwkv COMMAND --help` show. Exit codes: 0; 1 for an error, one line on
stderr; 2 for wrong usage; 130 after Ctrl-C; 143 after SIGTERM.

The scripts of a checkout take the same options: `python rwkv/quantize.py …` is `rwkv quantize …`.
"""


def page() -> str:
    commands = {"rwkv": cli.group} | {f"rwkv {name}": cli.subcommand(name) for name in cli.COMMANDS}
    return _HEAD + "".join(
        f"\n## {name}\n\n```\n{_help(name, command)}\n```\n" for name, command in commands.items()
    )


def _help(name: str, command: click.Command) -> str:
    settings = {"help_option_names": ["-h", "--help"], "terminal_width": _WIDTH}
    with click.Context(command, info_name=name, **settings) as context:
        return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


if __name__ == "__main__":
    click.echo(page(), nl=False)
