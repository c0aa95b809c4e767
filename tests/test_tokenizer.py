"""Tokenizers against the plain rules, vocabulary files of every kind of damage, and their search.

Most tests use small vocabularies made here. Those with "published" in their name read the files of
`../shared/data` and are skipped where that folder is absent.
"""

import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.tokenizers import Slow20B, SlowWorld
from rwkv_cpp import tokenizer as module
from rwkv_cpp.errors import RWKVFileError, VocabularyNotFound
from rwkv_cpp.tokenizer import (
    ByteTokenizer,
    PublishedVocabulary,
    StreamDecoder,
    Tokenizer,
    WorldTokenizer,
    ends_text,
    first_token,
    load_tokenizer,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAME_20B = "20B_tokenizer.json"
NAME_WORLD = "rwkv_vocab_v20230424.txt"

SENTENCES = [
    "The river was still when the first boats left, and nobody spoke.\n\n",
    "Der Fluss lag still, als die ersten Boote ausliefen; niemand sprach – außer Jürgen.\r\n",
    "La rivière était calme quand les premiers bateaux sont partis : « Personne n’a parlé. »\n",
    "El río estaba tranquilo cuando salieron los primeros barcos… ¿y nadie habló?\t",
    "Река была спокойна, когда ушли первые лодки, и никто не говорил. 12345 ",
    "第一批船离开的时候，河面很平静，没有人说话。",
    "最初の舟が出たとき、川は静かで、誰も話さなかった。カタカナﾊﾝｶｸ",
    "첫 배들이 떠날 때 강은 고요했고 아무도 말하지 않았다. ",
    "كان النهر هادئًا عندما غادرت القوارب الأولى ولم يتكلم أحد. ",
    "הנהר היה שקט כשהסירות הראשונות יצאו, ואיש לא דיבר. ",
    "जब पहली नावें निकलीं तो नदी शांत थी और कोई नहीं बोला। ",
    "แม่น้ำนิ่งสงบเมื่อเรือลำแรกออกไป และไม่มีใครพูด ",
    "Ο ποταμός ήταν ήρεμος όταν έφυγαν οι πρώτες βάρκες. ½ ² Ⅷ ",
    "for (int i = 0; i < n; i++) {\n        sum += x[i] * 0.5f;  /* don't, we'll, I'M */\n    }\n",
    "👩‍👩‍👧 👍🏽 é é Å ﬁ 𠀀𠀁 \x00\ufeff\u200f\u2028\x85\xa0\u3000 ",
    "   \n \n\n\n    \t\t" + " " * 40,
]


def multilingual_text(size: int, seed: int = 0) -> str:
    """Sentences and fragments of them in random order, `size` bytes or a little more."""
    rng = random.Random(seed)
    parts = []
    while size > 0:
        sentence = rng.choice(SENTENCES)
        if rng.random() < 0.3:
            start = rng.randrange(len(sentence))
            sentence = sentence[start : start + rng.randrange(20)]
        parts.append(sentence)
        size -= len(sentence.encode())
    return "".join(parts)


def world_lines(*tokens: str | bytes) -> list[str]:
    """The lines of a vocabulary of all bytes and these tokens."""
    entries: list[str | bytes] = [chr(i) if i < 128 else bytes([i]) for i in range(256)]
    entries += tokens
    return [
        f"{index} {entry!r} {len(entry if isinstance(entry, bytes) else entry.encode())}"
        for index, entry in enumerate(entries, start=1)
    ]


@pytest.fixture(scope="module")
def world_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A World vocabulary with tokens that begin, contain and overlap each other."""
    tokens = [
        "ab",
        "abc",
        "abcdef",
        "bcd",
        "cd",
        "de",
        " a",
        "  ",
        "    ",
        "\n\n",
        "\r\n",
        "'\"",
        "é",
    ]
    tokens += ["日本", "日本語", "語", "\u2028", "a b c", "aaaaaaaa", b"\xe6\x97", b"\xff\xfe\x00"]
    path = tmp_path_factory.mktemp("world") / "small.txt"
    path.write_text("\n".join(world_lines(*tokens)) + "\n", encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as 20B is, learned from the sentences above."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = tokenizers.processors.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    path = tmp_path_factory.mktemp("bpe") / "small.json"
    bpe.save(str(path))
    return path


def published(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="module")
def published_world() -> tuple[Tokenizer, SlowWorld]:
    path = published(NAME_WORLD)
    return load_tokenizer(65536, path), SlowWorld(path)


@pytest.fixture(scope="module")
def published_20b() -> tuple[Tokenizer, Slow20B]:
    path = published(NAME_20B)
    return load_tokenizer(50277, path), Slow20B(path)


@pytest.fixture(scope="module")
def world(world_path: Path) -> tuple[Tokenizer, SlowWorld]:
    return load_tokenizer(300, world_path), SlowWorld(world_path)


@pytest.fixture(scope="module")
def bpe(bpe_path: Path) -> tuple[Tokenizer, Slow20B]:
    return load_tokenizer(700, bpe_path), Slow20B(bpe_path)


@pytest.fixture(scope="module", params=["bytes", "world", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the three; those read from files with some unused ids at the end."""
    if request.param == "bytes":
        return load_tokenizer(256)
    return request.getfixturevalue(request.param)[0]


# What comes out


def test_bytes() -> None:
    tokenizer = load_tokenizer(256)
    assert tokenizer.encode("aé") == [0x61, 0xC3, 0xA9]
    assert tokenizer.decode([0, 0x61, 0xFF]) == "\0a\ufffd"
    assert tokenizer.encode_bytes(bytes(range(256))) == list(range(256))


def test_world_takes_the_longest(world: tuple[Tokenizer, SlowWorld]) -> None:
    tokenizer, slow = world
    ids = slow.ids
    assert tokenizer.encode("abcdefabcde") == [ids[b"abcdef"], ids[b"abc"], ids[b"de"]]
    assert tokenizer.encode("日本語日本") == [ids["日本語".encode()], ids["日本".encode()]]
    assert tokenizer.decode([ids[b"ab"], 0, ids[b"cd"]]) == "abcd"
    assert tokenizer.decode([0]) == ""


@settings(max_examples=300, deadline=None)
@given(data=st.binary() | st.text(" abcdef\n日本語é").map(str.encode))
def test_world_is_the_rule(world: tuple[Tokenizer, SlowWorld], data: bytes) -> None:
    tokenizer, slow = world
    tokens = tokenizer.encode_bytes(data)
    assert tokens == slow.encode_bytes(data)
    assert tokenizer.decode_bytes(tokens) == data
    assert tokenizer.encode_bytes(bytearray(data)) == tokens


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(" \n'stabé日①"))
def test_bpe_is_the_rule(bpe: tuple[Tokenizer, Slow20B], text: str) -> None:
    tokenizer, slow = bpe
    if all(unicodedata.category(character) != "Cn" for character in text):  # Unicode versions vary
        assert tokenizer.encode(text) == slow.encode(text)
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_published_world_is_the_rule(published_world: tuple[Tokenizer, SlowWorld]) -> None:
    tokenizer, slow = published_world
    rng = random.Random(1)
    shuffled = b"".join(rng.choices(list(slow.ids), k=5_000))
    text = multilingual_text(200_000).encode()
    for data in (text, shuffled, rng.randbytes(20_000), *(s.encode() for s in SENTENCES)):
        assert tokenizer.encode_bytes(data) == slow.encode_bytes(data)
    assert tokenizer.encode("\n") == [11]
    assert tokenizer.encode("\n\n") == [261]
    assert tokenizer.decode(tokenizer.encode(text.decode())) == text.decode()
    assert [tokenizer.token_bytes(token) for token in slow.bytes] == list(slow.bytes.values())


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_published_world_on_any_text(
    published_world: tuple[Tokenizer, SlowWorld], text: str
) -> None:
    tokenizer, slow = published_world
    assert tokenizer.encode(text) == slow.encode_bytes(text.encode())


def test_published_20b_is_the_rule(published_20b: tuple[Tokenizer, Slow20B]) -> None:
    tokenizer, slow = published_20b
    for text in (multilingual_text(150_000), *SENTENCES):
        assert tokenizer.encode(text) == slow.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    assert tokenizer.encode("\n") == [187]
    assert tokenizer.encode("\n\n") == [535]
    assert tokenizer.encode("a" + " " * 24 + "b") == [66, 50254, 67]
    assert tokenizer.decode([0, 66, 1]) == "a"


@pytest.fixture(scope="module")
def package_20b() -> object:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(published(NAME_20B)))


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 50276), max_size=30))
def test_published_20b_decodes_as_the_package_does(
    published_20b: tuple[Tokenizer, Slow20B], package_20b: object, tokens: list[int]
) -> None:
    assert published_20b[0].decode(tokens) == package_20b.decode(tokens)


@pytest.mark.slow
def test_published_vocabularies_on_megabytes(
    published_world: tuple[Tokenizer, SlowWorld], published_20b: tuple[Tokenizer, Slow20B]
) -> None:
    text = multilingual_text(5_000_000, seed=2) + published("tinyshakespeare.txt").read_text()
    assert published_world[0].encode(text) == published_world[1].encode_bytes(text.encode())
    assert published_20b[0].encode(text) == published_20b[1].encode(text)


# T-01, T-03, T-04


@pytest.mark.parametrize(
    "text", ["", " " * 1000, "\n" * 1000, "a" * 300_000, " " * 300_000, "\0", *SENTENCES]
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # which one of them brings it to
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode_bytes(tokens) == text.encode()
    assert all(type(token) is int and 0 <= token < tokenizer.n_vocab for token in tokens)


def test_normal_forms_are_kept_apart_but_by_bpe(
    world: tuple[Tokenizer, SlowWorld], bpe: tuple[Tokenizer, Slow20B]
) -> None:
    decomposed = "e\u0301"
    assert world[0].decode(world[0].encode(decomposed)) == decomposed
    assert bpe[0].decode(bpe[0].encode(decomposed)) == "\xe9"


def test_all_pairs_of_bytes(world: tuple[Tokenizer, SlowWorld]) -> None:
    for tokenizer in (world[0], load_tokenizer(256)):
        for pair in range(65536):
            data = pair.to_bytes(2, "little")
            assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_bpe_takes_text_only(bpe: tuple[Tokenizer, Slow20B]) -> None:
    with pytest.raises(ValueError, match="0xff in position 1"):
        bpe[0].encode_bytes(b"a\xff")


@pytest.mark.parametrize("data", ["text", 5, None, [1, 2]])
def test_encode_bytes_takes_bytes(tokenizer: Tokenizer, data: object) -> None:
    with pytest.raises(TypeError):
        tokenizer.encode_bytes(data)


@pytest.mark.parametrize("text", [b"text", 5, None, ["text"]])
def test_encode_takes_text(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(TypeError):
        tokenizer.encode(text)


# T-02, T-05


def test_lone_surrogates(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"U\+D83D at position 3 "):
        tokenizer.encode("aé日\ud83d!")


@pytest.mark.parametrize("token", [-1, 2**31, 2**63, np.int64(-5)])
def test_ids_out_of_range(tokenizer: Tokenizer, token: int) -> None:
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(
            ValueError, match=f"token {token} is not in 0\\.\\.{tokenizer.n_vocab - 1}"
        ):
            decode([1, token])
    with pytest.raises(ValueError, match=f"token {token} "):
        StreamDecoder(tokenizer).feed(token)


def test_unused_ids(world: tuple[Tokenizer, SlowWorld], bpe: tuple[Tokenizer, Slow20B]) -> None:
    for tokenizer in (world[0], bpe[0]):
        unused = tokenizer.n_vocab - 1
        assert tokenizer.token_bytes(unused) is None
        with pytest.raises(ValueError, match=f"token {unused} is not in the vocabulary"):
            tokenizer.decode([unused])
        stream = StreamDecoder(tokenizer)
        assert [stream.feed(unused), stream.feed(0), stream.flush()] == ["\ufffd", "", ""]


def test_published_world_ends_at_65529(published_world: tuple[Tokenizer, SlowWorld]) -> None:
    tokenizer, _ = published_world
    assert tokenizer.decode([0]) == ""
    tokenizer.decode([65529])
    for token in range(65530, 65536):
        with pytest.raises(ValueError, match=str(token)):
            tokenizer.decode([token])


@pytest.mark.parametrize("token", [True, np.True_, 1.0, "1", None, b"a"])
def test_ids_are_integers(tokenizer: Tokenizer, token: object) -> None:
    with pytest.raises(TypeError):
        tokenizer.decode([token])


def test_ids_from_numpy(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("river")
    for dtype in (np.int32, np.uint16, np.uint64):
        assert tokenizer.decode(np.array(tokens, dtype)) == "river"


# T-07


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_equals_decoding_at_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = [t for t in range(tokenizer.n_vocab) if tokenizer.token_bytes(t) is not None]
    written = st.text().map(tokenizer.encode) | st.just(tokenizer.encode("日本語é👍🏽\ufffd"))
    tokens = data.draw(st.lists(st.sampled_from(ids)) | written)
    tokens = tokens[: data.draw(st.integers(0, len(tokens)))]  # cut characters, too
    stream = StreamDecoder(tokenizer)
    pieces = [stream.feed(token) for token in tokens] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert stream.flush() == ""


def test_stream_holds_back_unfinished_characters() -> None:
    stream = StreamDecoder(load_tokenizer(256))
    assert [stream.feed(byte) for byte in "é日👍".encode()] == [
        "",
        "é",
        "",
        "",
        "日",
        "",
        "",
        "",
        "👍",
    ]
    assert stream.feed(0xE6) == ""
    assert stream.feed(0x41) == "\ufffdA"
    assert stream.feed(0xE6) == ""
    assert stream.flush() == "\ufffd"
    assert stream.feed(0x41) == "A"


# T-10


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|padding|>", "a<|endoftext|> <|padding|>b"])
def test_text_is_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert not {0, 1} & set(tokens)
    assert tokenizer.decode(tokens) == text


def test_published_20b_has_no_control_tokens_in_text(
    published_20b: tuple[Tokenizer, Slow20B],
) -> None:
    tokens = published_20b[0].encode("Hello<|endoftext|>")
    assert tokens[0] != 0
    assert len(tokens) > 2
    assert not {0, 1} & set(tokens)
    assert tokens == published_20b[1].encode("Hello<|endoftext|>")


# T-08: files


def edited(change: Callable[[list[str]], object]) -> bytes:
    lines = world_lines("ab", "abc")
    change(lines)
    return ("\n".join(lines) + "\n").encode()


DAMAGED_WORLD = {
    "empty": (b"", "no token for the byte 0x00"),
    "only a line end": (b"\n", "line 1: expected an id"),
    "truncated between lines": (edited(lambda x: x.__delitem__(slice(200, None))), "byte 0xc8"),
    "truncated in a line": (edited(lambda x: x)[:-8], "line 258: expected an id"),
    "code": (
        edited(lambda x: x.__setitem__(256, "257 __import__('os').system('echo') 2")),
        "line 257: expected an id",
    ),
    "code after text": (edited(lambda x: x.__setitem__(256, "257 'ab'.upper() 2")), "line 257"),
    "sum of literals": (edited(lambda x: x.__setitem__(256, "257 'a'+'b' 2")), "line 257"),
    "nested": (edited(lambda x: x.__setitem__(256, "257 'a'" + "[" * 4000 + " 2")), "line 257"),
    "number": (edited(lambda x: x.__setitem__(256, "257 12 2")), "line 257: expected an id"),
    "open quote": (edited(lambda x: x.__setitem__(256, "257 'ab 2")), "line 257: expected an id"),
    "bad escape": (edited(lambda x: x.__setitem__(256, r"257 '\x4' 2")), "line 257: expected"),
    "surrogate": (edited(lambda x: x.__setitem__(256, r"257 '\ud800' 3")), "line 257: expected"),
    "no length": (edited(lambda x: x.__setitem__(256, "257 'ab'")), "line 257: expected an id"),
    "wrong length": (
        edited(lambda x: x.__setitem__(256, "257 'ab' 3")),
        "line 257: .* 2 bytes.* 3",
    ),
    "negative length": (edited(lambda x: x.__setitem__(256, "257 'ab' -2")), "line 257: expected"),
    "empty token": (edited(lambda x: x.__setitem__(256, "257 '' 0")), "line 257: .* 0 bytes"),
    "id twice": (edited(lambda x: x.__setitem__(257, "257 'abc' 3")), "line 258: expected id 258"),
    "gap": (edited(lambda x: x.__delitem__(256)), "line 257: expected id 257, found 258"),
    "id of end of text": (edited(lambda x: x.insert(0, "0 '<end>' 5")), "line 1: expected id 1"),
    "token twice": (edited(lambda x: x.__setitem__(257, "258 'ab' 2")), "258: .* as in line 257"),
    "blank line": (edited(lambda x: x.insert(5, "")), "line 6: expected an id"),
    "long line": (edited(lambda x: x.append("259 '" + "x" * 10**6 + "' 1000000")), "line 259"),
    "not UTF-8": (edited(lambda x: x)[:-10] + b"\xff\n", "line 258: not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + edited(lambda x: x), "line 1: expected an id"),
}


@pytest.mark.parametrize("case", DAMAGED_WORLD)
def test_damaged_world_vocabularies(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED_WORLD[case]
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    with pytest.raises(RWKVFileError, match=message) as caught:
        load_tokenizer(65536, path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_world_vocabulary_with_windows_line_ends(world_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(world_path.read_bytes().replace(b"\n", b"\r\n"))
    text = "abcdef\r\n日本語\n\n"
    assert load_tokenizer(300, path).encode(text) == load_tokenizer(300, world_path).encode(text)
    path.write_bytes(path.read_bytes().rstrip())  # no line end in the last line
    assert load_tokenizer(300, path).encode(text) == load_tokenizer(300, world_path).encode(text)


def damaged_json(definition: dict, case: str) -> bytes:
    if case == "merges of unknown tokens":
        definition["model"]["merges"] = [["a", "never seen"]]
    elif case == "a merge without its result":
        definition["model"]["merges"].append(["Ġ", "Ġ"])
        definition["model"]["vocab"].pop("ĠĠ", None)
    elif case == "a panic":
        definition["model"]["continuing_subword_prefix"] = "x"
        definition["model"]["merges"] = [["a", ""]]
        definition["model"]["vocab"] |= {"": 0}
    elif case == "no token for a byte":
        definition["model"]["vocab"]["AAA"] = definition["model"]["vocab"].pop("A")
        definition["model"]["merges"] = []
    elif case == "a huge id":
        definition["model"]["vocab"]["a"] = 2**32 - 1
    elif case == "another decoder":
        definition["decoder"] = None
    elif case == "another version":
        definition["version"] = "7.0"
    elif case == "no model":
        del definition["model"]
    text = json.dumps(definition).encode()
    return text[:-50] if case == "truncated" else text


@pytest.mark.parametrize(
    "case",
    [
        "merges of unknown tokens",
        "a merge without its result",
        "a panic",
        "no token for a byte",
        "a huge id",
        "another decoder",
        "another version",
        "no model",
        "truncated",
    ],
)
def test_damaged_json(case: str, bpe_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damaged_json(json.loads(bpe_path.read_bytes()), case))
    with pytest.raises(RWKVFileError, match=r"tokenizer\.json"):
        load_tokenizer(50277, path)


def test_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (b"{", b"{}", b'{"model": {}}', b"{\xff}", b"[1]", b"null"):
        path.write_bytes(content)
        with pytest.raises(RWKVFileError, match=r"tokenizer\.json"):
            load_tokenizer(50277, path)


def test_files_too_large_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    with path.open("wb") as file:
        file.truncate(1 << 32)  # sparse
    with pytest.raises(RWKVFileError, match="4294967296 bytes"):
        load_tokenizer(65536, path)


# The search


@pytest.fixture
def vocabulary(
    world_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PublishedVocabulary:
    """The small World vocabulary in place of the published ones, and an empty folder of ours."""
    digest = hashlib.sha256(world_path.read_bytes()).hexdigest()
    sources = (("someone/first", "model"), ("someone/second", "space"))
    vocabulary = PublishedVocabulary(300, "small.txt", digest, sources)
    monkeypatch.setattr(module, "PUBLISHED", (vocabulary,))
    monkeypatch.setenv("RWKV_HOME", str(tmp_path / "home"))
    return vocabulary


def test_places_in_order(
    vocabulary: PublishedVocabulary,
    world_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged file in a place hides all places behind it, so that damage shows the order."""
    package = tmp_path / "site" / "rwkv"
    places = [tmp_path / "model", tmp_path / "home", package]
    model_path = places[0] / "model.bin"
    for folder in places:
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    for folder in reversed(places):
        path = folder / "small.txt"
        path.write_bytes(world_path.read_bytes().replace(b"\n", b"\r\n"))
        assert load_tokenizer(300, model_path=model_path, download=False).encode("ab") == [257]
        path.write_text("damaged")
        with pytest.raises(RWKVFileError, match="not the published") as caught:
            load_tokenizer(300, model_path=str(model_path), download=False)
        assert str(path) in str(caught.value)
    # A path comes before all, and may lead to any vocabulary.
    own = tmp_path / "own.txt"
    own.write_text("\n".join(world_lines("ab", "abc")))
    assert load_tokenizer(300, own, model_path).encode("abc") == [258]


def test_the_package_pyrwkv_tokenizer(
    vocabulary: PublishedVocabulary,
    world_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "pyrwkv_tokenizer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small.txt").write_bytes(world_path.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert load_tokenizer(300, download=False).encode("abc") == [258]


def test_nothing_found(vocabulary: PublishedVocabulary, tmp_path: Path) -> None:
    with pytest.raises(VocabularyNotFound) as caught:
        load_tokenizer(300, model_path=tmp_path / "model.bin", download=False)
    text = str(caught.value)
    for part in (
        "300 tokens",
        str(tmp_path / "small.txt"),
        str(tmp_path / "home" / "small.txt"),
        "rwkv or pyrwkv-tokenizer",
        "no download",
        "pass its path",
    ):
        assert part in text
    assert not (tmp_path / "home").exists()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_HOME", "")
    assert module.vocabulary_folder().is_absolute()
    assert "rwkv-ggml" in module.vocabulary_folder().parts


def test_unknown_sizes() -> None:
    with pytest.raises(
        VocabularyNotFound, match=r"20096 tokens .*256, 50277, 65536.*pass the path"
    ):
        load_tokenizer(20096)


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(RWKVFileError, match=re.escape(str(path))):
            load_tokenizer(256, path)


def test_vocabulary_of_another_model(world_path: Path, bpe_path: Path) -> None:
    for path in (world_path, bpe_path):
        large = load_tokenizer(1000, path)
        size = next(n for n in range(1000, 0, -1) if large.token_bytes(n - 1) is not None)
        assert load_tokenizer(size, path).n_vocab == size
        with pytest.raises(
            RWKVFileError, match=f"ids up to {size - 1}, the model only {size - 1} "
        ):
            load_tokenizer(size - 1, path)


def test_published_hashes() -> None:
    for vocabulary in module.PUBLISHED:
        content = published(vocabulary.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == vocabulary.sha256


# The download, from a hub on this machine


@pytest.fixture
def hub(world_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """Lacks the first repository's file and redirects for the second's, as the real one does.

    `requests` holds the paths asked for; `content` is the file.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.requests.append(self.path)
            if self.path == "/spaces/someone/second/resolve/main/small.txt":
                self.send_response(302)
                self.send_header("Location", "/storage")
                self.end_headers()
            elif self.path == "/storage":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.server.content)
            else:
                self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.content = world_path.read_bytes()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load_elsewhere(vocabulary: PublishedVocabulary, port: int, **environment: str) -> str:
    """What `abc` is encoded to, or the error, in a process that takes a port here for the hub."""
    program = f"""
from rwkv_cpp import tokenizer
tokenizer.PUBLISHED = (tokenizer.{vocabulary!r},)
try:
    print(tokenizer.load_tokenizer(300).encode("abc"))
except tokenizer.VocabularyNotFound as error:
    print(error)
"""
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout


def test_download(
    vocabulary: PublishedVocabulary,
    hub: http.server.ThreadingHTTPServer,
    world_path: Path,
    tmp_path: Path,
) -> None:
    for _ in range(2):  # the second time from the folder
        assert load_elsewhere(vocabulary, hub.server_port) == "[258]\n"
        assert hub.requests == [
            "/someone/first/resolve/main/small.txt",
            "/spaces/someone/second/resolve/main/small.txt",
            "/storage",
        ]
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["small.txt"]
    assert (tmp_path / "home" / "small.txt").read_bytes() == world_path.read_bytes()


def test_download_of_something_else(
    vocabulary: PublishedVocabulary, hub: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    hub.content += b"259 'x y' 3\n"
    text = load_elsewhere(vocabulary, hub.server_port)
    assert "model someone/first of the Hugging Face hub: " in text
    assert "404" in text
    assert "space someone/second of the Hugging Face hub: its file is not the published" in text
    assert not (tmp_path / "home").exists()


def test_download_without_a_folder_to_keep_it(
    vocabulary: PublishedVocabulary, hub: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    (tmp_path / "home").touch()
    assert load_elsewhere(vocabulary, hub.server_port) == "[258]\n"


def test_download_offline(
    vocabulary: PublishedVocabulary, hub: http.server.ThreadingHTTPServer
) -> None:
    text = load_elsewhere(vocabulary, hub.server_port, HF_HUB_OFFLINE="1")
    assert text.count("offline mode is enabled") == 2
    assert hub.requests == []
    hub.shutdown()
    hub.server_close()
    text = load_elsewhere(vocabulary, hub.server_port)
    assert text.count("of the Hugging Face hub: ") == 2


def test_where_texts_begin_and_end():
    world = WorldTokenizer(300, [bytes([value]) for value in range(256)])
    assert ends_text(world, 0)
    assert not ends_text(world, 1)
    assert first_token(world) == 0
    assert not ends_text(ByteTokenizer(), 0)
    assert first_token(ByteTokenizer()) == 10
