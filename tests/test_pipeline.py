"""A checkpoint becomes text: convert, quantize, generate, one command after the other."""

import sys

import checkpoints
import numpy as np
import pytest
from commands import environment, run
from models import random_model, read_model
from reference import canonical, quants

PROMPT = "Hello"
# The commands as on a machine without torch.
RUN = "import sys; sys.modules['torch'] = None; from rwkv_cpp.cli import main; main()"


def rwkv(*arguments):
    done = run([sys.executable, "-c", RUN, *arguments], env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    tensors = random_model(11, n_vocab=256, n_embed=64, n_layer=2)
    for key, values in tensors.items():
        if key.endswith("time_decay"):
            tensors[key] = np.log(-values)
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "x.pth").write_bytes(checkpoints.torch_zip(tensors))
    rwkv("convert", folder / "x.pth", folder / "x.bin", "float16")
    return folder / "x.bin"


def likeliest_text(path, n_tokens):
    """What the reference makes of the file, the likeliest token each time."""
    model = read_model(path)
    logits, state = canonical.forward(model, list(PROMPT.encode()))
    text = bytearray(PROMPT.encode())
    for _ in range(n_tokens):
        text.append(int(np.argmax(logits[-1])))
        logits, state = canonical.forward(model, [text[-1]], state)
    return text.decode(errors="replace")


@pytest.mark.parametrize("name", [name for name in quants.TYPE_IDS if name not in quants.PLAIN])
def test_checkpoint_to_text(tmp_path, converted, name):
    rwkv("quantize", converted, tmp_path / "y.bin", name)
    options = ["--temperature", 0, "-n", 12, "-m", tmp_path / "y.bin"]
    text = rwkv("generate", PROMPT, *options)
    # Universal newlines are the subprocess module's, not the command's.
    expected = likeliest_text(tmp_path / "y.bin", 12) + "\n"
    assert text == expected.replace("\r\n", "\n").replace("\r", "\n")
