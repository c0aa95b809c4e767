"""rwkv.cpp's own names: the flat modules of the checkout, and the package's."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment, run
from models import random_model, write_model
from rwkv_cpp import (
    RWKVModel,
    load_rwkv_shared_library,
    load_tokenizer,
    rwkv_cpp_model,
    rwkv_cpp_shared_library,
    rwkv_world_tokenizer,
    sample_logits,
)
from rwkv_cpp.compat.rwkv_cpp.tokenizer_util import add_tokenizer_argument, get_tokenizer
from seeds import block, home_with_vocabularies, needs_seeds, needs_vocabulary

SCRIPTS = Path(__file__).parents[1] / "rwkv"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rwkv.cpp") / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "FP16")
    return path


def from_the_checkout(code):
    """What a program prints that lies beside the flat modules."""
    variables = environment(RWKV_LIBRARY_PATH=str(load_rwkv_shared_library().path))
    del variables["PYTHONPATH"]
    done = run([sys.executable, "-c", code], cwd=SCRIPTS, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_seeds
def test_readme_of_2023(path):
    code = block("rwkv.cpp", "import rwkv_cpp_model")
    assert r"C:\rwkv.cpp-169M.bin" in code
    out = from_the_checkout(code.replace(r"C:\rwkv.cpp-169M.bin", str(path)))
    with RWKVModel(None, path) as model:
        logits, state = None, None
        expected = ""
        for token in [1, 2, 3]:
            logits, state = model.eval(token, state)
            expected += f"Output logits: {logits}\n"
    assert out == expected


def test_a_flat_program_of_later(path):
    """Sampling and tokenizers in modules of their own; a sequence; buffers used again."""
    code = f"""
import rwkv_cpp_model, rwkv_cpp_shared_library, sampling, tokenizer_util

library = rwkv_cpp_shared_library.load_rwkv_shared_library()
model = rwkv_cpp_model.RWKVModel(library, {str(path)!r}, thread_count=1)
decode, encode = tokenizer_util.get_tokenizer("auto", model.n_vocab)
logits, state = model.eval_sequence_in_chunks(encode("One upon"), None, None, None, use_numpy=True)
text = ""
for i in range(8):
    token = sampling.sample_logits(logits, temperature=0.0, top_p=0.5)
    text += decode([token])
    logits, state = model.eval(token, state, state, logits, use_numpy=True)
model.free()
print(ascii(text))
"""
    with RWKVModel(None, path) as model:
        tokens = []
        logits, state = model.eval_sequence(b"One upon", None)
        for _ in range(8):
            tokens.append(sample_logits(logits, 0.0))
            logits, state = model.eval(tokens[-1], state)
    text = "".join(load_tokenizer(256).decode([token]) for token in tokens)
    assert from_the_checkout(code) == f"{text!a}\n"


def test_package_calls(path):
    library = rwkv_cpp_shared_library.load_rwkv_shared_library()
    assert isinstance(library, rwkv_cpp_shared_library.RWKVSharedLibrary)
    with pytest.warns(UserWarning, match="all layers are on the CPU"):
        model = rwkv_cpp_model.RWKVModel(library, str(path), thread_count=2, gpu_layers_count=5)
    with pytest.warns(UserWarning, match="all layers are on the CPU"):
        rwkv_cpp_model.RWKVModel(library, str(path), 2, 5).free()
    with RWKVModel(None, path) as ours:
        assert np.array_equal(model.eval(7, None)[0], ours.eval(7, None)[0])
    twin = model.clone()
    model.free()
    assert twin.n_vocab == 256
    twin.free()


def test_torch_tensors_come_back_where_they_are_given(path):
    torch = pytest.importorskip("torch")
    with rwkv_cpp_model.RWKVModel(None, path) as model:
        logits, state = model.eval(1, None, use_numpy=False)
        assert isinstance(logits, torch.Tensor)
        again, after = model.eval(2, state, state, logits)
        assert again is logits
        assert after is state
        assert np.array_equal(logits.numpy(), model.eval_sequence([1, 2], None)[0])


def test_tokenizers():
    parser = argparse.ArgumentParser()
    add_tokenizer_argument(parser)
    assert parser.parse_args([]).tokenizer == "auto"
    decode, encode = get_tokenizer(parser.parse_args(["auto"]).tokenizer, 256)
    assert decode(encode("né")) == "né"
    with pytest.raises(ValueError, match="choose from auto, 20B, world"):
        get_tokenizer("22B", 50277)


@needs_vocabulary
def test_published_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(home_with_vocabularies(tmp_path)))
    for name, n_vocab in (("20B", 50277), ("world", 65536)):
        decode, encode = get_tokenizer(name, n_vocab)
        assert encode("né") == load_tokenizer(n_vocab).encode("né")
        assert decode(encode("né")) == "né"
    decode, encode = rwkv_world_tokenizer.get_world_tokenizer_v20230424()
    assert decode(encode("日本 a")) == "日本 a"
