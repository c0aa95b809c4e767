"""The checkout's entry points, from another folder and from their own; the example of 2023."""

import re
import sys
from pathlib import Path

import pytest
from commands import environment, run, rwkv
from models import random_model, read_model, write_model
from rwkv_cpp import RWKVModel, load_rwkv_shared_library

SCRIPTS = Path(__file__).parents[1] / "rwkv"
EXAMPLE = """
import rwkv_cpp_model
import rwkv_cpp_shared_library

model_path = r'C:\\rwkv.cpp-169M.bin'


model = rwkv_cpp_model.RWKVModel(
    rwkv_cpp_shared_library.load_rwkv_shared_library(),
    model_path
)

logits, state = None, None

for token in [1, 2, 3]:
    logits, state = model.eval(token, state)

    print(f'Output logits: {logits}')

model.free()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "FP16")
    return path


@pytest.fixture(params=["from another folder", "from its own"])
def script(request, tmp_path):
    """Runs a script of the checkout, which finds the package beside itself."""
    variables = environment(
        RWKV_LIBRARY_PATH=str(load_rwkv_shared_library().path), RWKV_HOME=str(tmp_path / "home")
    )
    del variables["PYTHONPATH"]

    def call(name, *arguments, **options):
        if request.param == "from its own":
            command, cwd = [sys.executable, f"{name}.py"], SCRIPTS
        else:
            command, cwd = [sys.executable, SCRIPTS / f"{name}.py"], tmp_path
        return run([*command, *arguments], **({"cwd": cwd, "env": variables} | options))

    return call


def test_chat(script, path):
    done = script("chat_with_bot", path, "-n", "3", input="hello\n/tokens\n")
    assert done.returncode == 0
    assert "turn 1" in done.stderr


def test_quantize(script, path, tmp_path):
    done = script("quantize", path, tmp_path / "q.bin", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_model(tmp_path / "q.bin")["blocks.0.att.key.weight"].name == "Q4_1_O"


def test_generate_completions(script, path):
    done = script("generate_completions", path, "Hello", "--max-tokens", 9, "--seed", 3)
    assert (done.returncode, done.stderr) == (0, "")
    same = ["Hello", "-n", 9, "--count", 3, "--temperature", 0.8, "--top-p", 0.5, "--seed", 3]
    expected = rwkv("generate", "-m", path, *same).stdout
    assert done.stdout.splitlines()[:-1] == expected.splitlines()[:-1]  # the last is the time
    assert [f"--- Generation {i} ---" in done.stdout for i in range(5)] == [0, 1, 1, 1, 0]
    assert re.fullmatch(r"Took \d+\.\d{3} sec, \d+ ms per token", done.stdout.splitlines()[-1])
    done = script("generate_completions", path, "-n", 0)
    assert "\n# rwkv-ggml" in done.stdout  # a prompt of its own
    assert script("generate_completions").returncode == 2


@pytest.mark.parametrize("name", ["measure_perplexity", "measure_pexplexity"])
def test_measure_perplexity(script, path, tmp_path, name):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.")
    done = script(name, path, text, 5, 30)
    assert (done.returncode, done.stderr) == (0, "")
    expected = rwkv("perplexity", text, "-m", path, "--skip", 5, "--limit", 30).stdout
    assert done.stdout.splitlines()[:-1] == expected.splitlines()[:-1]  # the last is the time
    assert "tokens          30\n" in done.stdout
    assert "tokens          44\n" in script(name, path, text, 5).stdout
    assert "tokens          44\n" in script(name, path, text, 5, -1).stdout  # the default of 2023
    assert "0 is not in the range x>=1" in script(name, path, text, 5, 0).stderr
    done = script(name, path, text)
    assert done.returncode == 2
    assert f"Usage: {name}.py [OPTIONS] MODEL_PATH TEXT SKIP [LIMIT]" in done.stderr


def test_convert_pytorch_to_ggml(script, tmp_path):
    done = script("convert_pytorch_to_ggml", "missing.pth", tmp_path / "model.bin", "float16")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "missing.pth" in done.stderr


@pytest.mark.parametrize(
    "name", [path.stem for path in SCRIPTS.glob("*.py") if "main_as" in path.read_text("utf-8")]
)
def test_help(script, name):
    done = script(name, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {name}.py ")


def test_example_of_2023(path):
    variables = environment(RWKV_LIBRARY_PATH=str(load_rwkv_shared_library().path))
    del variables["PYTHONPATH"]
    code = EXAMPLE.replace(r"C:\rwkv.cpp-169M.bin", str(path))
    done = run([sys.executable, "-c", code], cwd=SCRIPTS, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    with RWKVModel(None, path) as model:
        logits, state = None, None
        expected = ""
        for token in [1, 2, 3]:
            logits, state = model.eval(token, state)
            expected += f"Output logits: {logits}\n"
    assert done.stdout == expected
