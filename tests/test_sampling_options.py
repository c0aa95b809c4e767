"""sampling_options.py and docs/sampling.md: both are made from the table of fields."""

import functools
import re
import runpy
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rwkv_cpp.sampling import FIELDS, Sampling
from rwkv_cpp.sampling_options import option_name, sampling_options, value_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "sampling.md"


@click.command()
@sampling_options
@click.option("--other", default=1)
def command(sampling: Sampling, other: int) -> None:
    click.echo(repr((sampling, other)))


def parsed(*arguments: str) -> str:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    return done.output.rstrip("\n")


def test_without_options():
    assert parsed() == repr((Sampling(), 1))


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["--temperature", "0.5"], {"temperature": 0.5}),
        (["--top-k", "40"], {"top_k": 40}),
        (["--top-p", "1"], {"top_p": 1.0}),
        (["--top-px", "0.01"], {"top_px": 0.01}),
        (["--min-p", "0.05"], {"min_p": 0.05}),
        (["--tail-free", "0.95"], {"tail_free": 0.95}),
        (["--typical-p", "0.9"], {"typical_p": 0.9}),
        (["--mirostat", "2"], {"mirostat": 2}),
        (["--mirostat-tau", "3"], {"mirostat_tau": 3.0}),
        (["--mirostat-eta", "0.2"], {"mirostat_eta": 0.2}),
        (["--repetition-penalty", "1.1"], {"repetition_penalty": 1.1}),
        (["--presence-penalty", "-0.5"], {"presence_penalty": -0.5}),
        (["--frequency-penalty", "0.5"], {"frequency_penalty": 0.5}),
        (["--penalty-decay", "0.9"], {"penalty_decay": 0.9}),
        (
            ["--logit-bias", "5=-inf", "--logit-bias", "6=1.5"],
            {"logit_bias": {5: -float("inf"), 6: 1.5}},
        ),
        (["--ban", "5", "--ban", "6"], {"banned_tokens": (5, 6)}),
        (["--force", "5"], {"forced_tokens": (5,)}),
        (["--seed", str(2**64 - 1)], {"seed": 2**64 - 1}),
        (["--num-beams", "4"], {"num_beams": 4}),
        (["--length-penalty", "0.6"], {"length_penalty": 0.6}),
        (["--json-schema", '{"type": "object"}'], {"json_schema": '{"type": "object"}'}),
        (["--regex", "@[ab]+"], {"regex": "@[ab]+"}),
        (["--grammar", "start: /a/"], {"grammar": "start: /a/"}),
    ],
)
def test_each_option(arguments, fields):
    assert parsed(*arguments, "--other", "2") == repr((Sampling(**fields), 2))


def test_files(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "array"}', "utf-8")
    assert parsed("--json-schema", f"@{path}") == repr(
        (Sampling(json_schema='{"type": "array"}'), 1)
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--temperature", "-1"], "-1.0 is not in the range x>=0"),
        (["--repetition-penalty", "0"], "0.0 is not in the range x>0"),
        (["--top-p", "nan"], "top_p: expected a finite number in 0..1, found nan"),
        (["--mirostat", "3"], "3 is not in the range 0<=x<=2"),
        (["--seed", str(2**64)], "is not in the range"),
        (["--logit-bias", "x=1"], "'x=1' is not a token's id, '=' and a number"),
        (["--logit-bias", "1=nan"], "logit_bias: token 1 has bias nan"),
        (["--ban", "-1"], "-1 is not in the range x>=0"),
        (["--mirostat", "1", "--top-k", "4"], "top_k: mirostat takes its place"),
        (["--regex", "a", "--grammar", "start: /a/"], "only one of"),
        (["--json-schema", "{"], "json_schema: not JSON"),
        (["--json-schema", "@missing.json"], "'missing.json': No such file"),
    ],
)
def test_wrong_values(arguments, text):
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert text in done.stderr


def test_help_says_what_the_table_says():
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for name, info in FIELDS.items():
        assert option_name(name, info) in text
        assert info.help in text, name


def test_the_document_has_the_table():
    assert table() in DOCUMENT.read_text("utf-8")


def test_the_documents_programs_run(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        path = tmp_path / "program.py"
        path.write_text(program, "utf-8")
        runpy.run_path(str(path))


def table() -> str:
    """The table of docs/sampling.md."""
    rows = ["| field | option | values | default | |", "|---|---|---|---|---|"]
    for name, info in FIELDS.items():
        default = getattr(Sampling, name, {})
        shown = "" if default in (None, (), {}) else f"{default:g}"
        rows.append(
            f"| `{name}` | `{option_name(name, info)}` | {info.range} | {shown} | {info.help} |"
        )
    return "\n".join(rows)


@click.command()
@functools.partial(sampling_options, as_changes=True)
def changing(sampling: dict[str, object]) -> None:
    click.echo(repr(sampling))


def test_changes_are_what_was_given():
    for arguments, fields in (
        ([], {}),
        (["--temperature", "1", "--top-k", "0"], {"temperature": 1.0, "top_k": 0}),
        (["--ban", "5", "--logit-bias", "5=1"], {"logit_bias": {5: 1.0}, "banned_tokens": (5,)}),
    ):
        assert CliRunner().invoke(changing, arguments).output == f"{fields!r}\n"
    assert "[default" not in CliRunner().invoke(changing, ["--help"]).output
    assert CliRunner().invoke(changing, ["--regex", "a", "--grammar", "b"]).exit_code == 2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "40", 40),
        ("seed", "7", 7),
        ("seed", "none", None),
        ("regex", "[ab]=1,", "[ab]=1,"),
        ("logit_bias", "5=-inf,6=1.5", {5: -float("inf"), 6: 1.5}),
        ("logit_bias", "none", {}),
        ("banned_tokens", "5,6", (5, 6)),
        ("forced_tokens", "none", ()),
    ],
)
def test_values_of_texts(name, text, value):
    assert value_of(name, text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "hot"),
        ("temperature", "-1"),
        ("temperature", "none"),
        ("top_k", "1.5"),
        ("mirostat", "3"),
        ("logit_bias", "5"),
        ("banned_tokens", "5,,6"),
        ("json_schema", "@missing"),
    ],
)
def test_texts_that_are_no_values(name, text):
    with pytest.raises(ValueError, match=f"{name}: "):
        value_of(name, text)
