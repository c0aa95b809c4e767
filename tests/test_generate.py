"""generate.py: what the command takes and what it writes; the texts are those of test_rwkv.py."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CONSOLE, environment, rwkv
from models import random_model, write_model
from rwkv_cpp import RWKV, Sampling, State

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "Q8_0")
    return path


def test_command(path):
    """I-15 among others: the same seed gives the same text."""
    first = rwkv("generate", "Hello", "-m", path, "-n", 50, "--seed", 5, encoding=None)
    again = rwkv("generate", "-", "-m", path, "-n", 50, "--seed", 5, "--threads", 2, input=b"Hello")
    other = rwkv("generate", "Hello", "-m", path, "-n", 50, "--seed", 6, encoding=None)
    assert (first.returncode, first.stderr) == (0, b"")
    assert first.stdout == again.stdout != other.stdout
    assert first.stdout.startswith(b"Hello")
    assert first.stdout.endswith(b"\n")


def test_command_takes_biases(path):
    bans = [f"--logit-bias={token}=-inf" for token in range(256) if token != 33]
    done = rwkv("generate", "Hello", "-m", path, "-n", 5, *bans)
    assert done.stdout == "Hello!!!!!\n"
    for bad in ("5", "a=1", "5=b"):
        assert rwkv("generate", "Hello", "-m", path, "--logit-bias", bad).returncode == 2
    done = rwkv("generate", "Hello", "-m", path, "--logit-bias", "256=1")
    assert done.returncode == 1
    assert "error: logit_bias: token 256" in done.stderr


def test_options_reach_the_model(path):
    with RWKV(path) as model:
        sampling = Sampling(temperature=0.9, top_k=30, typical_p=0.9, seed=4)
        expected = model.generate(
            "Hello", sampling=sampling, max_tokens=40, stop=["e\n", "\\"], stop_tokens=[7]
        )
    done = rwkv(
        *("generate", "Hello", "-m", path, "--max-tokens", 40, "--temperature", 0.9, "--top-k", 30),
        *("--typical-p", 0.9, "--seed", 4, "--stop", r"e\n", "--stop", r"\\", "--stop-token", 7),
        encoding=None,
    )
    assert done.stderr == b""
    assert done.stdout.decode() == f"Hello{expected}\n"


def test_stop_strings_with_escapes(path):
    force = ["--force", 97, "--force", 10, "--force", 98]
    done = rwkv("generate", "Hello", "-m", path, "-n", 3, *force, "--stop", r"\nb")
    assert done.stdout == "Helloa\n"
    done = rwkv("generate", "Hello", "-m", path, "-n", 3, *force, "--stop", r"\\nb")
    assert done.stdout == "Helloa\nb\n"
    done = rwkv("generate", "Hello", "-m", path, "--stop", "")
    assert done.returncode == 1
    assert done.stderr.startswith("error: stop: a stop string is empty")


def test_json(path):
    arguments = ["generate", "Hello", "-m", path, "-n", 5, "--seed", 1, "--json"]
    done = rwkv(*arguments, "--logprobs", 2, "--count", 2)
    with RWKV(path) as model:
        answers = model.generate("Hello", max_tokens=5, seed=1, n=2, logprobs=2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == [answer.text for answer in answers]
    assert [line["tokens"] for line in lines] == [answer.tokens for answer in answers]
    assert lines[0]["finish_reason"] == "length"
    assert lines[0]["timings"]["prompt_tokens"] == 5
    told = lines[1]["logprobs"][0]
    assert (told["token"], told["logprob"]) == answers[1].logprobs[0][:2]
    assert len(told["top"]) == 2
    assert "logprobs" not in json.loads(rwkv(*arguments).stdout)
    assert "goes with --json" in rwkv("generate", "-m", path, "--logprobs", 2).stderr


def test_several_answers(path):
    done = rwkv("generate", "Hello", "-m", path, "-n", 5, "--num-beams", 3, "--count", 2)
    assert done.stdout.count("--- Generation") == 2
    done = rwkv("generate", "Hello", "-m", path, "--num-beams", 3, "--count", 4)
    assert done.returncode == 1
    assert done.stderr == "error: n: expected at most num_beams 3, found 4\n"


def test_states_do_not_replace_what_is_read(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for arguments in (["-m", precious], ["--lora", precious, "1"]):
        done = rwkv("generate", "a", *arguments, "--save-state", precious)
        assert done.returncode == 1
        assert "same file" in done.stderr
    assert precious.read_bytes() == b"precious"


def test_states(path, tmp_path):
    """Two processes write what one writes."""
    saved = tmp_path / "half.state"
    ascii_only = [f"--ban={token}" for token in range(128, 256)]
    base = ["generate", "-m", path, "-n", 20, "--seed", 5, *ascii_only]
    whole = rwkv(*base, "Hello", "-n", 40, encoding=None).stdout
    first = rwkv(*base, "Hello", "--save-state", saved, encoding=None).stdout
    second = rwkv(*base, "--load-state", saved, encoding=None)
    assert second.stderr == b""
    assert first[:-1] + second.stdout == whole
    assert len(State.load(saved).tokens) == 25
    assert rwkv(*base, "--load-state", path).stderr.startswith(f"error: {path}: expected a state")
    done = rwkv(*base, "--save-state", tmp_path / "missing" / "a.state")
    assert (done.returncode, done.stdout, "there is no folder" in done.stderr) == (2, "", True)
    done = rwkv(*base, "--count", 2, "--save-state", saved)
    assert (done.returncode, "--save-state goes with one answer" in done.stderr) == (2, True)


def test_prompt_from_a_file(path, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Hello", "utf-8")
    expected = rwkv("generate", "Hello", "-m", path, "-n", 5, "--seed", 1, encoding=None).stdout
    for given in (["--file", file], ["-p", "Hello"], ["--prompt", "Hello"]):
        done = rwkv("generate", *given, "-m", path, "-n", 5, "--seed", 1, encoding=None)
        assert done.stdout == expected
    done = rwkv("generate", "Hello", "--file", file, "-m", path)
    assert (done.returncode, "the prompt is given twice" in done.stderr) == (2, True)
    done = rwkv("generate", "--file", tmp_path, "-m", path)
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path}: Is a directory\n")


def test_options_of_smolrsrwkv(path):
    options = "--max-eval-threads 1 --max-load-threads 4 --temperature 1 --top-k 40 --top-p 0.85"
    options += " --seed 1 --repetition-penalty 1.3 --forever --max-tokens 5 --prompt Hello"
    done = rwkv("generate", "-m", path, *options.split())
    assert (done.returncode, done.stderr) == (0, "")
    for more in ("--mirostat 2 --top-p 1", "--typical-p 0.9", "--tail-free 0.9"):
        assert rwkv("generate", "a", "-m", path, "-n", 5, *more.split()).returncode == 0


def test_empty_stdin(path):
    """I-01"""
    done = rwkv("generate", "-", "-m", path, "-n", 0, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "\n")
    assert done.stderr == "the prompt is empty: starting after a newline\n"


def test_bytes_that_are_not_utf8(path):
    """I-04"""
    done = rwkv("generate", "-", "-m", path, "-n", 0, input=b"caf\xe9")
    assert done.stdout == "caf\ufffd\n".encode()
    if sys.platform != "win32":
        done = rwkv("generate", os.fsdecode(b"caf\xe9"), "-m", path, "-n", 0)
        assert done.stdout == "caf\ufffd\n"
    ascii_only = environment(PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C")
    done = rwkv("generate", "-", "-m", path, "-n", 99, input="café".encode(), env=ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"caf?")


def test_control_characters_do_not_reach_a_terminal(path):
    """I-05"""
    pty = pytest.importorskip("pty")
    prompt = "a\x1b[2Jb\rc\x9bd\te"
    leader, follower = pty.openpty()
    done = rwkv(
        "generate", prompt, "-m", path, "-n", 0, stdout=follower, stderr=None, capture_output=False
    )
    os.close(follower)
    shown = os.read(leader, 1000)
    os.close(leader)
    assert done.returncode == 0
    assert shown == b"a\\x1b[2Jb\\x0dc\\x9bd\te\r\n"
    assert rwkv("generate", prompt, "-m", path, "-n", 0).stdout == prompt.replace("\r", "\n") + "\n"


def test_reader_that_goes_away(path):
    """I-03"""
    process = subprocess.Popen(
        [*CONSOLE, "generate", "Hello", "-m", path, "-n", "100000"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 1


@needs_signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["prompt", "generation"])
def test_signals(path, number, code, when):
    """I-02, I-03"""
    prompt, n = ("x" * 5_000_000, "1") if when == "prompt" else ("Hello", "10000000")
    process = subprocess.Popen(
        [*CONSOLE, "generate", "-", "-m", path, "-n", n],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(prompt.encode())
    process.stdin.close()
    process.stdout.read(20)
    process.send_signal(number)
    process.stdout.read()
    assert process.stderr.read().strip() == b""
    assert process.wait(20) == code
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("n_vocab", [50277, 65536])
def test_published_vocabularies(tmp_path, n_vocab):
    folder = Path(__file__).parents[2] / "shared" / "data"
    name = {50277: "20B_tokenizer.json", 65536: "rwkv_vocab_v20230424.txt"}[n_vocab]
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is absent")
    path = tmp_path / "model.bin"
    write_model(path, random_model(3, n_vocab, n_embed=32, n_layer=1))
    found = environment(RWKV_HOME=str(folder))
    done = rwkv("generate", "Hello world", "-m", path, "-n", 5, "--seed", 1, env=found)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Hello world")
    given = rwkv(
        *("generate", "Hello world", "-m", path, "-n", 5, "--seed", 1, "--vocab", folder / name)
    )
    assert given.stdout == done.stdout
    done = rwkv("generate", "-m", path, "-n", 1, env=found)
    assert done.stderr == "the prompt is empty: starting after token 0 (end of text)\n"


def test_missing_vocabulary(tmp_path):
    path = tmp_path / "model.bin"
    write_model(path, random_model(3, n_vocab=300, n_embed=32, n_layer=1))
    done = rwkv("generate", "Hello", "-m", path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no tokenizer is known for 300 tokens")
