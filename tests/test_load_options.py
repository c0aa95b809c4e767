"""load_options.py: the options reach the model from every command that has one."""

import json

import pytest
from click.testing import CliRunner
from commands import rwkv
from models import random_model, write_model
from rwkv_cpp import RWKVModel, load_rwkv_shared_library
from rwkv_cpp.cli import subcommand
from rwkv_cpp.info import megabytes
from rwkv_cpp.perplexity import measure
from rwkv_cpp.tokenizer import load_tokenizer

TEXT = "To be, or not to be, that is the question:\n" * 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.bin"
    write_model(path, random_model(2, n_vocab=256, n_embed=64, n_layer=2), "Q5_1")
    return path


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--head", "q8_0"], {"head": "Q8_0"}),
        (["--activations", "int8"], {"activations": "int8"}),
        (["--activations", "bf16"], {"activations": "bf16"}),
        (["--head", "Q4_0", "--activations", "int8"], {"head": "Q4_0", "activations": "int8"}),
    ],
)
def test_perplexity(tmp_path, path, arguments, options):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.encode())
    done = rwkv("perplexity", text, "-m", path, "--json", *arguments)
    tokenizer = load_tokenizer(256)
    with RWKVModel(None, path, **options) as model:
        expected = measure(model, tokenizer, [tokenizer.encode(TEXT)])
    loss = expected.loss_per_token
    assert json.loads(done.stdout)["loss_per_token"] == loss.value
    if options:
        with RWKVModel(None, path) as model:
            assert measure(model, tokenizer, [tokenizer.encode(TEXT)]).loss_per_token != loss


def test_info(path):
    total = megabytes(load_rwkv_shared_library().rwkv_estimate(path, head="Q8_0").total)
    assert f"memory   {total}: " in rwkv("info", "-m", path, "--head", "Q8_0").stdout
    plain, quantized = (
        rwkv("info", "--sizes", *arguments).stdout.splitlines()
        for arguments in ([], ["--head", "Q8_0"])
    )
    assert plain[0] == quantized[0]
    assert all(a != b for a, b in zip(plain[2:], quantized[2:], strict=True))


@pytest.mark.parametrize("command", ["generate", "perplexity /dev/null", "info", "bench"])
def test_every_command_has_them(path, command):
    name, *arguments = command.split()
    wrong = CliRunner().invoke(
        subcommand(name), [*arguments, "-m", str(path), "--head", "Q8_0", "--activations", "A8"]
    )
    assert wrong.exit_code == 2
    assert "'A8' is not one of 'A16', 'int8', 'bf16'" in wrong.stderr


@pytest.mark.parametrize("name", ["generate", "info"])
def test_unknown_head(path, name):
    done = rwkv(name, "-m", path, "--head", "q9_9")
    assert done.returncode == 1
    assert "unknown format 'Q9_9' (choose from Q4_0, " in done.stderr


def test_sparse_ffn(tmp_path, path):
    plain, text = tmp_path / "FP16.bin", tmp_path / "text.txt"
    write_model(plain, random_model(2, n_vocab=256, n_embed=64, n_layer=2), "FP16")
    text.write_bytes(TEXT.encode())
    losses = [
        json.loads(rwkv("perplexity", text, "-m", plain, "--json", *option).stdout)
        for option in ([], ["--sparse-ffn"])
    ]
    assert losses[0]["loss_per_token"] == losses[1]["loss_per_token"]
    library = load_rwkv_shared_library()
    total = megabytes(library.rwkv_estimate(plain, sparse_ffn=True).total)
    assert total != megabytes(library.rwkv_estimate(plain).total)
    assert f"memory   {total}: " in rwkv("info", "-m", plain, "--sparse-ffn").stdout
    assert "Q5_1" in rwkv("info", "-m", path, "--sparse-ffn").stderr
    assert "all formats" in rwkv("info", "--sizes", "--sparse-ffn").stderr
