"""cli.py: the table of commands, exit codes, one line per error."""

import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import rwkv_cpp
from commands import CONSOLE, environment, run, rwkv
from rwkv_cpp import cli

DOCS = Path(__file__).parents[1] / "docs"


def test_help_is_quick_because_it_imports_little():
    code = """
import sys
sys.argv = ["rwkv", "--help"]
from rwkv_cpp import cli
try:
    cli.main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
    shown = run([sys.executable, "-c", code]).stdout
    imported = set(shown.rpartition("imported: ")[2].split())
    assert "click" in imported
    assert not imported & {"numpy", "tokenizers", "huggingface_hub", "tqdm", "torch", "ctypes"}
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_table_has_the_commands_own_words(name):
    command = cli.subcommand(name)
    assert command.help.strip().splitlines()[0] == cli.COMMANDS[name][1]
    assert "\b\n" in command.help  # an example
    assert f"rwkv {name} " in command.help
    with click.Context(command, info_name=name) as ctx:
        assert len(command.get_help(ctx)) > 200


def test_page_of_help_texts():
    done = run([sys.executable, DOCS / "cli.py"])
    assert done.stderr == ""
    if done.stdout != (DOCS / "cli.md").read_text("utf-8"):
        pytest.fail("renew the page: PYTHONPATH=rwkv python docs/cli.py > docs/cli.md")


def test_help_and_version():
    for flag in ("-h", "--help"):
        for arguments in ([flag], ["quantize", flag]):
            done = rwkv(*arguments)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith("Usage: rwkv ")
    done = rwkv("--version")
    assert (done.returncode, done.stdout) == (0, f"rwkv {rwkv_cpp.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["quantize", "one"],
        ["generate", "--nonsense"],
        ["generate", "x", "--threads", "0"],
        ["generate", "x", "--threads", "1025"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--top-p", "2"],
        ["generate", "x", "-n", "many"],
        ["quantize", "a", "b", "Q4_0", "--file-version", "102"],
        ["pull"],
    ],
)
def test_wrong_usage(arguments):
    """I-13"""
    done = rwkv(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: rwkv ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "-m", "missing.bin"],
        ["generate", "x", "-m", "."],
        ["perplexity", "missing.txt"],
        ["info", "-m", "missing.bin"],
        ["pull", "nonsense"],
        ["quantize", "missing.bin", "target.bin", "Q4_0"],
        ["convert", "missing.pth", "target.bin"],
    ],
)
def test_errors_are_one_line(arguments, tmp_path):
    """I-10"""
    done = rwkv(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        ("KeyboardInterrupt", 130, ""),
        ("BrokenPipeError", 1, ""),
        ("MemoryError", 1, "error: out of memory\n"),
        ("MemoryError('needs 5 bytes')", 1, "error: needs 5 bytes\n"),
        ("ValueError('a, b')", 1, "error: a, b\n"),
        ("FileNotFoundError(2, 'No such file', 'x.bin')", 1, "error: x.bin: No such file\n"),
        ("OSError(28, 'No space left')", 1, "error: No space left\n"),
        ("OSError('odd')", 1, "error: odd\n"),
        ("rwkv_cpp.NonFiniteLogits('NaN')", 1, "error: NaN\n"),
        ("click.ClickException('so')", 1, "error: so\n"),
        ("SystemExit(7)", 7, ""),
    ],
)
def test_what_becomes_of_exceptions(raised, code, text):
    program = f"""
import click, rwkv_cpp
from rwkv_cpp import cli
@click.command()
def fail():
    raise {raised}
cli.run(fail)
"""
    done = run([sys.executable, "-c", program])
    assert done.returncode == code
    assert done.stderr.removeprefix("\n") == text  # click ends an interrupted line


def test_faults_of_our_own_show_where():
    program = """
import click
from rwkv_cpp import cli
@click.command()
def fail():
    {}["key"]
cli.run(fail)
"""
    done = run([sys.executable, "-c", program])
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert "Traceback" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(closed):
    command = [shlex.quote(word) for word in [*CONSOLE, "generate", "-", "-n", "1"]]
    done = run(["sh", "-c", " ".join([*command, closed])])
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_output_to_a_closed_pipe():
    process = subprocess.Popen(
        [sys.executable, "-c", "from rwkv_cpp.cli import main; main()", "--help"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 1
