"""conversation_store.py: conversations in files, good, foreign and damaged."""

import json
import shutil
import sys

import pytest
from models import random_model, write_model
from rwkv_cpp import RWKVFileError, styles
from rwkv_cpp.conversation import Conversation
from rwkv_cpp.conversation_store import (
    STATES_IN_FILES,
    ConversationStore,
    conversations_folder,
)
from rwkv_cpp.errors import ForeignState
from rwkv_cpp.quantize import quantize_file
from rwkv_cpp.rwkv import RWKV
from rwkv_cpp.sampling import Sampling
from rwkv_cpp.state import StateNotice


@pytest.fixture(scope="module")
def model():
    with RWKV(n_threads=1) as model:
        yield model


@pytest.fixture
def store(tmp_path):
    return ConversationStore(tmp_path / "conversations")


@pytest.fixture
def talk(model):
    talk = Conversation(model, styles.find("plain"), sampling=Sampling(seed=1), max_tokens=20)
    for message in ("Good morrow, my love!", "What news?", "And then?"):
        "".join(talk.say(message))
    return talk


def test_a_conversation_goes_on_as_without_the_break(model, store, talk):
    store.save("mine", talk)
    again = store.load("mine").open(model, None)
    assert again.style == talk.style
    assert (again.sampling, again.max_tokens) == (talk.sampling, 20)
    assert again.state == talk.state
    for turn, old in zip(again.turns, talk.turns, strict=True):
        assert (turn.user, turn.answer, turn.start, turn.end) == (
            *(old.user, old.answer, old.start, old.end),
        )
    assert "".join(again.say("Go on.")) == "".join(talk.say("Go on."))
    assert again.state == talk.state
    again.back(4)
    assert again.state == talk.start


def test_only_the_latest_states_are_in_files(model, store, talk):
    for message in ("a", "b", "c"):
        "".join(talk.say(message))
        store.save("mine", talk)
    files = {path.name for path in (store.folder / "mine").iterdir()}
    kept = {f"{turn.key}.state" for turn in talk.turns[-STATES_IN_FILES:]}
    assert files == {"conversation.json"} | kept
    again = store.load("mine").open(model, None)
    again.back(5)
    assert again.state == talk.turns[0].state
    store.save("mine", again)
    files = {path.name for path in (store.folder / "mine").iterdir()}
    assert files == {"conversation.json", f"{talk.turns[0].key}.state"}


def test_all_settings_are_kept(model, store, talk):
    sampling = Sampling(
        temperature=0.5,
        logit_bias={5: -float("inf"), 6: 1.5},
        banned_tokens=(7,),
        regex="[a-z]*",
        seed=2**63,
    )
    talk.sampling = sampling
    store.save("mine", talk)
    assert store.load("mine").sampling == sampling


def test_other_files_are_of_this_user_only(store, talk):
    store.save("mine", talk)
    if sys.platform != "win32":
        assert store.folder.stat().st_mode & 0o077 == 0
        assert (store.folder / "mine").stat().st_mode & 0o077 == 0


def test_names(store, talk):
    assert store.all() == []
    with pytest.raises(ValueError, match="no conversation is saved"):
        store.latest()
    names = ("first", "zweites Gespräch", "对话", "v1.2-b_c", store.new_name())
    for name in names:
        store.save(name, talk)
    assert {saved.name for saved in store.all()} == set(names)
    assert store.latest().name == names[-1] or len({saved.when for saved in store.all()}) < 5
    assert store.new_name() not in names
    for bad in ("", ".", "..", "../x", "a/b", "a\\b", ".hidden", "x.", " x", "x\n", "x" * 65):
        with pytest.raises(ValueError, match="cannot be a name"):
            store.save(bad, talk)
        with pytest.raises(ValueError, match="cannot be a name"):
            store.load(bad)
    with pytest.raises(ValueError, match="no conversation is called 'other'"):
        store.load("other")


def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RWKV_HOME", str(tmp_path))
    assert conversations_folder() == tmp_path / "conversations"
    monkeypatch.delenv("RWKV_HOME")
    assert conversations_folder().name == "conversations"


# ---- Other models --------------------------------------------------------------------------------


def test_other_models(store, tmp_path):
    """I-14, D-05"""
    style = styles.Style("test", "A", "B")
    tensors = random_model(1, n_embed=64, n_layer=2)
    write_model(tmp_path / "a.bin", tensors, "FP16")
    quantize_file(tmp_path / "a.bin", tmp_path / "a-Q8_0.bin", "Q8_0")
    write_model(tmp_path / "b.bin", random_model(2, n_embed=64, n_layer=2), "FP16")
    write_model(tmp_path / "c.bin", random_model(2, n_embed=64, n_layer=3), "FP16")
    with RWKV(tmp_path / "a.bin", n_threads=1) as model:
        talk = Conversation(model, style, max_tokens=5)
        "".join(talk.say("hello"))
        store.save("mine", talk)
    assert store.load("mine").model_path == tmp_path / "a.bin"
    for name in ("b.bin", "c.bin"):
        with RWKV(tmp_path / name, n_threads=1) as model, pytest.raises(ForeignState):
            store.load("mine").open(model, None)
    with RWKV(tmp_path / "a-Q8_0.bin", n_threads=1) as model:
        with pytest.warns(StateNotice, match="another format"):
            again = store.load("mine").open(model, None)
        "".join(again.say("and on"))
        assert len(again.turns) == 2


def test_the_embedded_model_has_no_path(store, talk):
    store.save("mine", talk)
    assert store.load("mine").model_path is None


# ---- Damage --------------------------------------------------------------------------------------


def change(store, change):
    path = store.folder / "mine" / "conversation.json"
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("turns"),
        lambda values: values.update(format="other"),
        lambda values: values.update(version=2),
        lambda values: values.update(turns=5),
        lambda values: values.update(max_tokens="many"),
        lambda values: values.update(model=5),
        lambda values: values.update(sampling={"heat": 1}),
        lambda values: values.update(sampling={"top_p": 2}),
        lambda values: values.update(style={"user": "A"}),
        lambda values: values["turns"][0].update(key="../../../x"),
        lambda values: values["turns"][0].update(user=5),
        lambda values: values["turns"][0].update(end=True),
        lambda values: values["turns"][0].update(start=-1),
        lambda values: values["turns"][0].pop("answer"),
    ],
)
def test_damaged_files(store, talk, damage):
    store.save("mine", talk)
    change(store, damage)
    with pytest.raises(RWKVFileError, match=r"conversation\.json is not a conversation"):
        store.load("mine")
    assert store.all() == []


def test_what_is_no_json(store, talk):
    store.save("mine", talk)
    path = store.folder / "mine" / "conversation.json"
    for content in (b"", b"\xff\xff", b"[" * 100_000, b"[]", b'{"format": 5}'):
        path.write_bytes(content)
        with pytest.raises(RWKVFileError, match="is not a conversation"):
            store.load("mine")


def test_damaged_states(model, store, talk):
    store.save("mine", talk)
    folder = store.folder / "mine"
    first, _, last = talk.turns
    (folder / f"{first.key}.state").unlink()  # re-read when it is needed
    again = store.load("mine").open(model, None)
    again.back(2)
    assert again.state == first.state
    path = folder / f"{last.key}.state"
    shutil.copy(folder / f"{talk.turns[1].key}.state", path)
    with pytest.raises(RWKVFileError, match=f"expected {last.end}"):
        store.load("mine").open(model, None)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RWKVFileError, match=last.key):
        store.load("mine").open(model, None)
    path.unlink()
    with pytest.raises(RWKVFileError, match="after the last turn is missing"):
        store.load("mine").open(model, None)
    change(store, lambda values: values.update(turns=[]))
    assert store.load("mine").open(model, None).state == talk.start
