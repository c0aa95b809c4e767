"""token_data.py: its files, against a reader and a writer made from the format's description."""

import itertools
import json
import struct

import numpy as np
import pytest
from rwkv_cpp import RWKVFileError, load_tokenizer, token_data
from rwkv_cpp.token_data import TokenWriter, open_tokens, writing_tokens
from rwkv_cpp.tokenizer import WorldTokenizer
from seeds import WORLD, needs_vocabulary

BYTES = load_tokenizer(256)
# Token 0 ends a text, the bytes follow, and the last one is beyond uint8.
SMALL = WorldTokenizer(300, [bytes([value]) for value in range(256)] + [b"the "])
LARGE = WorldTokenizer(70_000, [bytes([value]) for value in range(256)])

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}


def read_binidx(path):
    """(type, [document, …]) of a .bin and its .idx, as the tools of the format go about it: an
    item's offset and size come from the index, a document's items from its bounds."""
    index = path.with_suffix(".idx").read_bytes()
    magic, version, code, n_items, n_bounds = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    place = 34
    sizes = struct.unpack_from(f"<{n_items}i", index, place)
    place += 4 * n_items
    pointers = struct.unpack_from(f"<{n_items}q", index, place)
    place += 8 * n_items
    bounds = struct.unpack_from(f"<{n_bounds}q", index, place)
    assert place + 8 * n_bounds == len(index)
    data = path.read_bytes()
    letter = CODES[code]
    items = [
        struct.unpack_from(f"<{size}{letter}", data, pointer)
        for size, pointer in zip(sizes, pointers, strict=True)
    ]
    # RWKV-LM reads across items, from the first one's offset on.
    assert sum(items, ()) == struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data)
    assert bounds[0] == 0
    assert bounds[-1] == n_items
    documents = [sum(items[a:b], ()) for a, b in itertools.pairwise(bounds)]
    return letter, documents


def write_binidx(path, items, bounds, code=8, **wrong):
    letter = CODES[code]
    data = b"".join(struct.pack(f"<{len(item)}{letter}", *item) for item in items)
    pointers, place = [], 0
    for item in items:
        pointers.append(place)
        place += len(item) * struct.calcsize(letter)
    sizes = wrong.get("sizes", [len(item) for item in items])
    pointers = wrong.get("pointers", pointers)
    version = wrong.get("version", 1)
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, len(items), len(bounds))
    for letter, values in (("i", sizes), ("q", pointers), ("q", bounds)):
        index += struct.pack(f"<{len(values)}{letter}", *values)
    path.with_suffix(".bin").write_bytes(data)
    path.with_suffix(".idx").write_bytes(index)
    return path.with_suffix(".bin")


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# ---- binidx ----


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize(("tokenizer", "letter"), [(SMALL, "H"), (LARGE, "i")])
def test_what_is_written(tmp_path, tokenizer, letter, append_eod):
    source = write_texts(tmp_path / "a.jsonl", ["the end", "", "é"])
    (tmp_path / "b.txt").write_bytes(b"x\ny\n")
    with writing_tokens(tmp_path / "o.bin", tokenizer, append_eod=append_eod) as writer:
        writer.write_file(source)
        writer.write_file(tmp_path / "b.txt")
    end = (0,) if append_eod else ()
    expected = [(*tokenizer.encode(text), *end) for text in ("the end", "é", "x\ny\n")]
    assert read_binidx(tmp_path / "o.bin") == (letter, expected)
    assert (writer.n_tokens, writer.n_empty) == (sum(map(len, expected)), 1)
    for name in ("o.bin", "o.idx"):
        data = open_tokens(tmp_path / name, tokenizer)
        assert isinstance(data.tokens, np.memmap)
        assert data.tokens.tolist() == list(sum(expected, ()))
        assert data.documents.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
        assert data.documents.dtype == np.int64


@pytest.mark.parametrize(
    ("bounds", "starts"),
    [
        ([0, 1, 2, 4], [0, 3, 4]),
        ([0, 1, 2], [0, 3, 4]),  # without the last
        ([0, 4], [0]),  # several items are one document
        ([0], [0]),
        ([], [0]),
        ([2, 4], [0, 4]),  # without the first
        ([0, 1, 1, 4], [0, 3]),  # an empty document
        ([0, 2, 3, 4], [0, 4]),  # one of an empty item
    ],
)
def test_bounds_that_others_write(tmp_path, bounds, starts):
    path = write_binidx(tmp_path / "o", [(1, 2, 3), (4,), (), (5, 6)], bounds)
    data = open_tokens(path, SMALL)
    assert data.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert data.documents.tolist() == starts


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_types_that_others_write(tmp_path, code):
    path = write_binidx(tmp_path / "o", [(1, 127), (3,)], [0, 1, 2], code)
    data = open_tokens(path, SMALL)
    assert data.tokens.tolist() == [1, 127, 3]
    assert data.tokens.dtype.char == CODES[code] or code == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"code": 6}, "tokens of type 6, expected version 1 and one of the types 1, 2, 3"),
        ({"version": 2}, "version 2"),
        ({"pointers": [0, 2]}, "do not follow one another"),
        ({"sizes": [2, -1]}, "do not follow one another"),
        ({"sizes": [2, 2]}, r"o\.bin: 3 tokens, its index is for 4"),
        ({"bounds": [0, 3]}, "do not ascend from 0 to 2"),
        ({"bounds": [0, 2, 1]}, "do not ascend"),
        ({"bounds": [-1, 2]}, "do not ascend"),
        ({"items": [], "bounds": [0]}, "has no tokens"),
    ],
)
def test_damaged_indexes(tmp_path, wrong, message):
    wrong = {"items": [(1, 2), (3,)], "bounds": [0, 1, 2]} | wrong
    path = write_binidx(tmp_path / "o", **wrong)
    with pytest.raises(RWKVFileError, match=message):
        open_tokens(path, SMALL)


def test_damaged_files(tmp_path):
    path = write_binidx(tmp_path / "o", [(1, 2), (3,)], [0, 1, 2])
    index, data = path.with_suffix(".idx").read_bytes(), path.read_bytes()
    for length in range(len(index)):
        path.with_suffix(".idx").write_bytes(index[:length])
        with pytest.raises(RWKVFileError, match=r"o\.idx: (not the index|.*truncated)"):
            open_tokens(path, SMALL)
    path.with_suffix(".idx").write_bytes(index + b"\0")
    with pytest.raises(RWKVFileError, match=f"{len(index) + 1} bytes, expected {len(index)}"):
        open_tokens(path, SMALL)
    huge = index[:18] + struct.pack("<Q", 1 << 60) + index[26:]  # nothing so large is allocated
    path.with_suffix(".idx").write_bytes(huge)
    with pytest.raises(RWKVFileError, match="truncated"):
        open_tokens(path, SMALL)
    path.with_suffix(".idx").write_bytes(index)
    path.write_bytes(data[:-1])
    with pytest.raises(RWKVFileError, match="5 bytes, expected a multiple of 2"):
        open_tokens(path, SMALL)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_tokens(path, SMALL)


def test_documents_too_long_for_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(token_data, "_MAX_ITEM", 3)
    (tmp_path / "a").write_bytes(b"abcd")
    with (
        pytest.raises(ValueError, match=r"a document of 4 tokens, an \.idx has room for 3"),
        writing_tokens(tmp_path / "o.bin", BYTES) as writer,
    ):
        writer.write_file(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- .npy ----


@pytest.mark.parametrize(("tokenizer", "dtype"), [(SMALL, "<u2"), (LARGE, "<i4")])
def test_npy(tmp_path, tokenizer, dtype):
    source = write_texts(tmp_path / "a.jsonl", ["the end", "", "é"])
    with writing_tokens(tmp_path / "o.npy", tokenizer, append_eod=True) as writer:
        writer.write_file(source)
    expected = [*tokenizer.encode("the end"), 0, *tokenizer.encode("é"), 0]
    content = (tmp_path / "o.npy").read_bytes()
    magic, length = struct.unpack_from("<8sH", content)
    assert (magic, (10 + length) % 64) == (b"\x93NUMPY\1\0", 0)
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({len(expected)},)}}"
    assert content[10 : 10 + length] == head.encode().ljust(length - 1) + b"\n"
    assert np.frombuffer(content[10 + length :], dtype).tolist() == expected
    assert np.load(tmp_path / "o.npy").tolist() == expected
    data = open_tokens(tmp_path / "o.npy", tokenizer)
    assert isinstance(data.tokens, np.memmap)
    assert data.tokens.tolist() == expected
    assert data.documents.tolist() == [0, len(tokenizer.encode("the end")) + 1]


def test_documents_of_a_npy(tmp_path, monkeypatch):
    monkeypatch.setattr(token_data, "_SCAN", 2)
    path = tmp_path / "o.npy"
    np.save(path, np.array([0, 5, 6, 0, 7, 0], np.int64))
    assert open_tokens(path, SMALL).documents.tolist() == [0, 1, 4]
    assert open_tokens(path, BYTES).documents.tolist() == [0]  # where 0 is a byte


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.uint16), r"found uint16 of shape \(2, 2\)"),
        (np.zeros(2, np.float32), "found float32"),
        (np.array(["a"]), "found <U1"),
        (np.array([{}]), "not an array of numpy"),
        (np.zeros(0, np.uint16), "has no tokens"),
    ],
)
def test_other_arrays(tmp_path, array, message):
    np.save(tmp_path / "o.npy", array)
    with pytest.raises(RWKVFileError, match=message):
        open_tokens(tmp_path / "o.npy", SMALL)


def test_damaged_npy(tmp_path):
    path = tmp_path / "o.npy"
    np.save(path, np.zeros(9, np.uint16))
    content = path.read_bytes()
    for length in (0, 5, 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(RWKVFileError, match=r"o\.npy: not an array of numpy"):
            open_tokens(path, SMALL)


# ---- texts ----


def test_bytes_of_a_text_are_mapped(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("née\r\n".encode())
    data = open_tokens(path, BYTES)
    assert isinstance(data.tokens, np.memmap)
    assert data.tokens.tobytes() == path.read_bytes()
    assert data.documents.tolist() == [0]


def test_texts_that_are_encoded(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"in the end\n")
    data = open_tokens(tmp_path / "text.txt", SMALL)
    assert (data.tokens.tolist(), data.documents.tolist()) == (SMALL.encode("in the end\n"), [0])
    lines = write_texts(tmp_path / "texts.jsonl", ["ab", "", "c"])
    data = open_tokens(lines, BYTES)
    assert (data.tokens.tolist(), data.documents.tolist()) == ([*b"abc"], [0, 2])


@needs_vocabulary
def test_world(tmp_path):
    tokenizer = load_tokenizer(65536, WORLD)
    (tmp_path / "text").write_text("Hello, 世界\n")
    data = open_tokens(tmp_path / "text", tokenizer)
    assert data.tokens.dtype == np.uint16
    assert data.tokens.tolist() == tokenizer.encode("Hello, 世界\n")


@pytest.mark.parametrize("name", ["text", "text.jsonl"])
@pytest.mark.parametrize("tokenizer", [BYTES, SMALL])
def test_bad_texts(tmp_path, name, tokenizer):
    path = tmp_path / name
    path.touch()
    with pytest.raises(RWKVFileError, match=r"has no (text|tokens)"):
        open_tokens(path, tokenizer)
    path.write_bytes(b"\xff")
    with pytest.raises(RWKVFileError, match="not UTF-8"):
        open_tokens(path, tokenizer)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_tokens(path, tokenizer)
    path.mkdir()
    with pytest.raises(RWKVFileError, match="not a regular file"):
        open_tokens(path, tokenizer)


def test_half_a_character_in_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\\ud800"}\n')
    with pytest.raises(RWKVFileError, match=r"a\.jsonl: line 2: lone surrogate"):
        open_tokens(path, BYTES)


# ---- tokens that do not fit ----


def test_tokens_of_another_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(token_data, "_SCAN", 3)
    path = write_binidx(tmp_path / "o", [(1, 2, 255), (3, 256)], [0, 1, 2])
    with pytest.raises(RWKVFileError, match="token 256 at position 4, the tokenizer has 256"):
        open_tokens(path, BYTES)
    open_tokens(path, SMALL)
    np.save(tmp_path / "o.npy", np.array([1, -2], np.int32))
    with pytest.raises(RWKVFileError, match="token -2 at position 1"):
        open_tokens(tmp_path / "o.npy", BYTES)


def test_no_token_ends_a_text_of_bytes(tmp_path):
    with pytest.raises(ValueError, match="no token that ends a text"):
        TokenWriter(None, BYTES, append_eod=True)


def test_other_suffixes(tmp_path):
    for name in ("o", "o.idx", "o.txt"):
        with (
            pytest.raises(ValueError, match=r"ends in \.bin or \.npy"),
            writing_tokens(tmp_path / name, BYTES),
        ):
            pass
