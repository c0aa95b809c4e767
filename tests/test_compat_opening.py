"""What the old homes may be given as a model; addresses and names against a hub on this machine."""

import numpy as np
import pytest
from hub_server import Hub
from models import random_model, write_model
from rwkv_cpp import RWKV, ModelNotFound
from rwkv_cpp.compat import opening
from rwkv_cpp.compat.opening import model_file
from rwkv_cpp.compat.repeatable import fresh_seed
from rwkv_cpp.compat.rwkvstic import load
from rwkv_cpp.model import embedded_model
from seeds import checkpoint, seeds


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_model_file_is_taken_as_it_is(home, tmp_path):
    path = tmp_path / "model.bin"
    write_model(path, random_model(2, n_embed=32, n_layer=2), "Q5_1")
    for given in (path, f" {path} ", path.with_suffix("")):
        assert model_file(given, "FP32") == model_file(given) == path
    assert not home.exists()


def test_checkpoint_is_converted(home, tmp_path):
    checkpoint(tmp_path / "model.pth", n_vocab=256)
    for given in (tmp_path / "model.pth", str(tmp_path / "model")):
        made = model_file(given, "Q4_0")
        assert made.name.endswith("-Q4_0.bin")
        assert home in made.parents


def test_embedded():
    assert model_file(None) == embedded_model()


def test_name_is_fetched_where_it_is_not_at_hand(home, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(opening, "pull", lambda *call: asked.append(call) or tmp_path)
    assert model_file("RWKV-4-430M", "Q8_0") == tmp_path
    assert asked == [("RWKV-4-430M", "Q8_0")]
    with pytest.raises(ModelNotFound, match="no-such-model"):
        model_file("no-such-model.pth")
    assert len(asked) == 1


def test_address(home, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    path = checkpoint(tmp_path / "tiny.pth", n_vocab=256)
    with Hub({"": {"tiny.pth": path.read_bytes()}}) as hub:
        url = f"{hub.endpoint}/tiny.pth"
        master = load.RWKV(url)
    np.random.seed(0)
    with RWKV(path) as rwkv:
        expected = rwkv.generate("Hello", max_tokens=9, seed=seeds(1)[0]).text
    master.loadContext(newctx="Hello")
    assert master.forward(number=9)["output"] == expected
    load.RWKV(url)  # the server is gone: it was kept


def test_seeds():
    np.random.seed(0)
    assert [fresh_seed(), fresh_seed()] == seeds(2)
