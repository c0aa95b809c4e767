"""generate.py: what is sampled and what is written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import CONSOLE, environment, rwkv
from models import random_model, write_model
from rwkv_cpp import RWKVModel, load_tokenizer, sample_logits
from rwkv_cpp.generate import ends_text, first_token, generate
from rwkv_cpp.tokenizer import WorldTokenizer

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "Q8_0")
    return path


@pytest.fixture(scope="module")
def model(path):
    with RWKVModel(None, path, 1) as model:
        yield model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(256)


def test_text_is_the_sampled_tokens(model, tokenizer):
    random = np.random.default_rng(7)
    logits, state = model.eval_sequence(b"Hello", None)
    tokens = []
    for _ in range(40):
        tokens.append(sample_logits(logits, 0.9, 0.7, {65: 2.0}, random))
        logits, state = model.eval(tokens[-1], state)
    text = "".join(
        generate(
            model,
            tokenizer,
            "Hello",
            max_tokens=40,
            temperature=0.9,
            top_p=0.7,
            logit_bias={65: 2.0},
            seed=7,
        )
    )
    assert text == bytes(tokens).decode("utf-8", errors="replace")


def test_max_tokens(model, tokenizer):
    assert list(generate(model, tokenizer, "a", max_tokens=0)) == []
    ascii_only = dict.fromkeys(range(128, 256), -np.inf)
    pieces = list(generate(model, tokenizer, "a", max_tokens=3, logit_bias=ascii_only, seed=1))
    assert [len(piece) for piece in pieces] == [1, 1, 1]


def test_whole_characters_only(model, tokenizer):
    only = dict.fromkeys(range(256), -np.inf)
    cycle = {0xE2: 0.0, 0x82: 0.0, 0xAC: 0.0}  # the bytes of a euro sign, in any order
    pieces = list(generate(model, tokenizer, "a", max_tokens=60, logit_bias=only | cycle, seed=1))
    assert set("".join(pieces)) <= {"€", "\ufffd"}
    assert all(pieces)
    first = only | {0xE2: 0.0}
    assert list(generate(model, tokenizer, "a", max_tokens=1, logit_bias=first)) == ["\ufffd"]


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer(300, [bytes([value]) for value in range(256)] + [b"\n\n"])


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "model.bin"
    write_model(path, random_model(3, n_vocab=300, n_embed=32, n_layer=1))
    with RWKVModel(None, path, 1) as model:
        yield model


def test_end_of_text_ends_the_text(world_model, world, tokenizer):
    assert ends_text(world, 0)
    assert not ends_text(world, 1)
    assert not ends_text(tokenizer, 0)
    assert list(generate(world_model, world, "a", logit_bias={0: 1000})) == []


def test_empty_prompt(world_model, world, model, tokenizer):
    assert first_token(world) == 0
    assert first_token(tokenizer) == 10
    logits, _ = world_model.eval(0, None)
    expected = world.decode([sample_logits(logits, 0)])
    assert "".join(generate(world_model, world, "", max_tokens=1, temperature=0)) == expected
    newline = "".join(generate(model, tokenizer, "\n", seed=3))
    assert "".join(generate(model, tokenizer, "", seed=3)) == newline


# ---- the command ----


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
