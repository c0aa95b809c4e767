"""smolrsrwkv: what its command line can be told, `rwkv generate` can."""

import pytest
from commands import environment, rwkv
from seeds import VOCABULARY, checkpoint, needs_seeds, needs_vocabulary, readme

# By option of smolrsrwkv, of its first release and its last: how it is said to `rwkv generate`.
OPTIONS = {
    "--max-eval-threads 2": ["--max-eval-threads", "2"],
    "--temperature 0.8": ["--temperature", "0.8"],
    "--top-k 40": ["--top-k", "40"],
    "--top-p 0.95": ["--top-p", "0.95"],
    "--seed 1": ["--seed", "1"],
    "--max-tokens 4": ["--max-tokens", "4"],
    "--repetition-penalty 1.3": ["--repetition-penalty", "1.3"],
    "--forever": ["--forever"],
    "-n 4": ["-n", "4"],
    "--eval-mode ndf32": ["--format", "FP32"],
    "--eval-mode ndq8": ["--format", "Q8_0"],
    "--eval-mode ggmlq4_0": ["--format", "Q4_0"],
    "-s freq_presence:frequency_penalty=0.2:presence_penalty=0.1": [
        "--frequency-penalty", "0.2", "--presence-penalty", "0.1"
    ],
    "-s locally_typical:p=0.9": ["--typical-p", "0.9"],
    "-s tail_free:z=0.9": ["--tail-free", "0.9"],
    "-s mirostat1:tau=4:eta=0.2": [
        "--mirostat", "1", "--mirostat-tau", "4", "--mirostat-eta", "0.2"
    ],
    "-s mirostat2": ["--mirostat", "2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("smolrs") / "model.pth", n_vocab=256)


def generate(model, *options):
    done = rwkv(
        "generate", "-p", "Hello", "-m", model, "--max-tokens", 2, *options,
        env=environment(RWKV_HOME=str(model.parent / "home")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")
    return done.stdout


@pytest.mark.parametrize("option", OPTIONS)
def test_option(path, option):
    generate(path, *OPTIONS[option])


def test_8_bits_on_the_fly_from_safetensors(path):
    """As their two steps: pth_to_safetensors.py, then the program."""
    target = path.with_suffix(".safetensors")
    assert rwkv("convert", path, target).returncode == 0
    options = "--format", "Q8_0", "--seed", 1, "-n", 9
    assert generate(target, *options) == generate(path, *options)


@needs_vocabulary
def test_tokenizer(path):
    for option in ("-t", "--tokenizer"):
        done = rwkv("generate", "-p", "Hello", option, VOCABULARY, "-n", 1)
        assert done.returncode == 1
        assert f"vocabulary '{VOCABULARY}': holds ids up to 50276" in done.stderr


@needs_seeds
def test_readme_names_no_other():
    """It leaves the options to a help text; what it says of them is there too."""
    text = readme("smolrsrwkv")
    assert "Supports float32 and 8bit inference." in text
    assert "The default is to use all logical cores, see the commandline options." in text
