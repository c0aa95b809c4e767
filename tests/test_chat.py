"""chat.py: the command on a terminal and through a pipe."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import CONSOLE, environment, rwkv
from rwkv_cpp import State, styles
from rwkv_cpp.conversation_store import ConversationStore

on_terminals = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")

PROMPT = r"ROMEO:$"


@pytest.fixture
def home(tmp_path):
    return environment(RWKV_HOME=str(tmp_path / "home"))


@pytest.fixture
def store(tmp_path):
    return ConversationStore(tmp_path / "home" / "conversations")


@pytest.fixture
def start(home):
    """Start `rwkv chat` on a terminal and wait for its first prompt."""
    terminals = []

    def start(*arguments, wait_for=PROMPT, env=None, **size):
        from terminals import Terminal

        command = [*CONSOLE, "chat", "--threads", "1", *arguments]
        terminals.append(Terminal(command, home | (env or {}), **size))
        if wait_for:
            terminals[-1].wait_for(wait_for)
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def answered(terminal, line, n):
    """Enter a line, and wait for the n-th prompt after it."""
    before = len(re.findall("^ROMEO:", terminal.screen, re.MULTILINE))
    terminal.press(line + "\r")
    return terminal.wait_until(
        lambda: len(re.findall("^ROMEO:", terminal.screen, re.MULTILINE)) >= before + n,
        what=f"an answer to {line!r}",
    )


# ---- A terminal ----------------------------------------------------------------------------------


@on_terminals
def test_a_talk(start, store):
    terminal = start("--seed", "1")
    assert "shakespeare.bin, style plain: /help lists" in terminal.screen
    screen = answered(terminal, "Good morrow, my love!", 1)
    first = re.search(r"^JULIET: (\S.*)$", screen, re.MULTILINE)[1]
    answered(terminal, "What news?", 1)
    answered(terminal, "+", 1)
    (saved,) = store.all()
    assert [turn.user for turn in saved.turns] == ["Good morrow, my love!", "What news?"]
    assert saved.turns[0].answer.startswith(first)
    screen = answered(terminal, "/back", 2)
    assert "took back 1 turn" in screen
    assert len(store.latest().turns) == 1
    assert "now in 'other'" in answered(terminal, "/branch other", 1)
    terminal.press("\x04")
    assert terminal.ended() == 0
    assert terminal.has_its_modes_back()
    assert terminal.screen.endswith("ROMEO:")
    assert {saved.name for saved in store.all()} == {"other", saved.name}


@on_terminals
def test_resume(start, store):
    terminal = start("--seed", "1")
    answered(terminal, "Good morrow, my love!", 1)
    assert "saved as 'talk'" in answered(terminal, "/save talk", 1)
    answered(terminal, "What news?", 1)
    terminal.press("\x04")
    assert terminal.ended() == 0
    whole = store.latest()
    assert whole.name != "talk"
    terminal = start("--resume", "talk")
    assert "ROMEO: Good morrow, my love!" in terminal.screen
    answered(terminal, "What news?", 1)
    terminal.press("\x04")
    assert terminal.ended() == 0
    assert store.load("talk").turns[1].answer == whole.turns[1].answer
    terminal = start("--resume")
    assert "ROMEO: What news?" in terminal.screen  # the latest one


@on_terminals
def test_ctrl_c_stops_the_answer_only(start, store):
    """I-02"""
    terminal = start("-n", "1000000", "--ban", "10", "--style", "plain")
    terminal.press("Tell me a tale.\r")
    terminal.wait_for(r"JULIET: \S+")
    terminal.press("\x03")
    terminal.wait_for("stopped\n")  # where this is not read yet, the next Ctrl-C discards it
    terminal.press("\x03")  # twice fast
    terminal.wait_for(PROMPT)
    answered(terminal, "/tokens", 1)
    assert terminal.process.poll() is None
    (turn,) = store.latest().turns
    assert turn.finish_reason == "cancelled"
    time.sleep(1)
    terminal.press("typed")
    terminal.wait_for("ROMEO: typed$")
    terminal.press("\x03")  # clears the line
    terminal.wait_for(PROMPT)
    terminal.press("\x03")
    assert terminal.ended() == 130
    assert terminal.has_its_modes_back()


@on_terminals
def test_ctrl_c_while_a_message_is_read(start, store, tmp_path):
    """I-02"""
    terminal = start()
    text = "word " * 60_000
    terminal.press(f"\x1b[200~{text}\x1b[201~\r")
    terminal.wait_for("reading")
    terminal.press("\x03")
    terminal.wait_for(r"stopped before an answer\s+ROMEO:$")
    assert store.all() == []
    answered(terminal, "hello", 1)
    assert len(store.latest().turns) == 1


@on_terminals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_at_the_prompt(start, number):
    """I-03"""
    terminal = start()
    terminal.process.send_signal(number)
    code = terminal.ended()
    assert code == (-number if number == signal.SIGHUP else 128 + number)
    assert "Traceback" not in terminal.screen
    if number != signal.SIGHUP:
        assert terminal.has_its_modes_back()


@on_terminals
def test_keys(start, store):
    terminal = start("--seed", "1")
    terminal.press("/br")
    terminal.wait_for("/branch +go on in a copy")
    terminal.press("\t other")
    terminal.wait_for("ROMEO: /branch other")
    terminal.press("\x03")
    answered(terminal, "two\x1b\rlines", 1)
    assert store.latest().turns[0].user == "two\nlines"
    terminal.press("\x1b[A")  # up: the last message
    terminal.wait_for(r"ROMEO: two\n +lines$")
    terminal.press("\x03")
    answered(terminal, "\x1b[200~pasted\n\nlines\x1b[201~", 1)
    assert store.latest().turns[-1].user == "pasted\nlines"
    terminal.press("\x04")
    terminal.ended()
    terminal = start()
    terminal.press("\x1b[A")  # of the last time
    terminal.wait_for(r"ROMEO: pasted")


@on_terminals
@pytest.mark.parametrize(
    ("env", "size"),
    [
        ({"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {}),
        ({"TERM": "dumb"}, {}),
        ({"NO_COLOR": "1"}, {"rows": 0, "columns": 0}),
        ({}, {"rows": 12, "columns": 20}),
    ],
)
def test_odd_terminals(start, store, env, size):
    """I-04"""
    terminal = start("-n", "20", wait_for="", env=env, **size)
    terminal.wait_until(lambda: b"ROMEO:" in terminal.raw, what="a prompt")
    terminal.press("h\u00e9llo\r")
    terminal.wait_until(lambda: store.all(), what="a saved turn")
    terminal.wait_until(
        lambda: b"ROMEO:" in terminal.raw.rpartition(b"JULIET:")[2], what="the next prompt"
    )
    assert store.latest().turns[0].user == "h\u00e9llo"
    while terminal.process.poll() is None:  # one that comes before the line is edited is lost
        terminal.press("\x04")
        time.sleep(0.2)
    assert terminal.ended() == 0
    assert b"Traceback" not in terminal.raw
    if env.get("NO_COLOR") or env.get("TERM") == "dumb":
        assert b"\x1b[2m" not in terminal.raw


@on_terminals
def test_no_control_character_of_the_model_reaches_the_terminal(start):
    """I-05"""
    terminal = start("-n", "4", "--logit-bias", "27=1000", "--style", "plain")
    terminal.press("hello\r")
    terminal.wait_for(re.escape(r"JULIET: \x1b\x1b\x1b\x1b"))
    terminal.wait_for(PROMPT)


# ---- A pipe --------------------------------------------------------------------------------------


def test_pipe(home, store):
    lines = "Good morrow, my love!\n/back\n/nonsense\nWhat news?\n"
    done = rwkv("chat", "--seed", "1", "-n", "30", input=lines, env=home)
    assert done.returncode == 0
    assert "took back 1 turn" in done.stderr
    assert "unknown command /nonsense" in done.stderr
    again = rwkv("chat", "--seed", "1", "-n", "30", input="What news?\n", env=home)
    assert done.stdout.endswith(again.stdout)
    assert done.stdout.count("\n") > again.stdout.count("\n") > 0
    assert "\x1b" not in done.stdout
    assert len(store.all()) == 2


def test_end_of_input(home):
    """I-01"""
    for nothing in ({"stdin": subprocess.DEVNULL}, {"input": ""}, {"input": "\n\n"}):
        done = rwkv("chat", env=home, **nothing)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pipe_with_anything_in_it(home, store):
    """I-04, I-05"""
    data = b"caf\xe9 \x00\x1b[2J\r\n" + b"x" * 4_300_000 + b"\nlast"
    done = rwkv("chat", "-n", "5", input=data, env=home)
    assert done.returncode == 0
    assert done.stderr.count(b"nothing was sent") == 1
    assert [turn.user for turn in store.latest().turns] == ["caf\ufffd \x00\x1b[2J", "last"]
    ascii_only = home | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = rwkv("chat", "-n", "5", input="你好\n/load\n".encode(), env=ascii_only)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def endless_answer(home):
    """A chat that was asked through a pipe and does not come to an end."""
    process = subprocess.Popen(
        [*CONSOLE, "chat", "-n", "1000000", "--ban", "10"],
        env=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Tell me a tale.\n")
    return process


def test_reader_that_goes_away(home):
    """I-03"""
    process = endless_answer(home)
    process.stdin.close()
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_ctrl_c_ends_a_pipe(home):
    process = endless_answer(home)
    process.stdin.flush()
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in error


def test_a_folder_that_cannot_be_written(home, tmp_path):
    """R-04"""
    (tmp_path / "home").write_text("a file")
    done = rwkv("chat", "-n", "5", input="hello\nagain\n", env=home)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr.count("is not saved") == 1


# ---- Options -------------------------------------------------------------------------------------


def test_options(home, store, tmp_path):
    style = tmp_path / "mine.json"
    style.write_text(json.dumps({"user": "X", "bot": "Y", "sampling": {"top_p": 0.25}}))
    arguments = ("--style", style, "-n", 3, "--temperature", 0)
    assert rwkv("chat", *arguments, input="hello\n", env=home).returncode == 0
    saved = store.latest()
    assert (saved.style.user, saved.max_tokens) == ("X", 3)
    assert (saved.sampling.temperature, saved.sampling.top_p) == (0, 0.25)
    done = rwkv("chat", "--resume", saved.name, "--top-p", 1, input="more\n", env=home)
    assert done.returncode == 0
    saved = store.latest()
    assert [turn.user for turn in saved.turns] == ["hello", "more"]
    assert (saved.sampling.temperature, saved.sampling.top_p, saved.max_tokens) == (0, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["--resume", "none"], 1, "error: no conversation is called 'none'"),
        (["--resume"], 1, "error: no conversation is saved yet in"),
        (["--style", "none"], 1, "error: no style 'none'"),
        (["--style", "missing.json"], 1, "error: style 'missing.json': No such file"),
        (["-m", "missing.bin"], 1, "error: "),
        (["--resume", "x", "--style", "qa"], 2, "Usage: "),
        (["--top-p", "2"], 2, "Usage: "),
        (["-n", "0"], 2, "Usage: "),
    ],
)
def test_wrong_options(home, tmp_path, arguments, code, error):
    """I-10, I-13"""
    done = rwkv("chat", *arguments, env=home, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(error)
    assert code == 2 or done.stderr.count("\n") == 1


def test_mirostat_takes_the_place_of_the_style_s_cuts(home):
    done = rwkv("chat", "-n", "5", "--mirostat", "2", input="hello\n", env=home)
    assert (done.returncode, len(done.stdout.strip()) > 0) == (0, True), done.stderr


def test_only_the_start_text_is_kept_beside_the_conversation(home, tmp_path):
    for _ in range(2):
        rwkv("chat", "-n", "1", input="a secret\n+gen a secret\n+qa a secret\n", env=home)
    (path,) = (tmp_path / "home" / "prefixes").glob("*.safetensors")
    assert bytes(State.load(path).tokens.tolist()).decode() == styles.find("plain").start
