"""`rwkv prepare-data`: many inputs, its files, its errors."""

import json

import numpy as np
import pytest
from commands import rwkv
from rwkv_cpp import load_tokenizer
from rwkv_cpp.prepare_data import Prepared, prepare_data
from rwkv_cpp.token_data import open_tokens
from rwkv_cpp.tokenizer import tokenizer_named
from seeds import VOCABULARY, WORLD, needs_vocabulary

BYTES = load_tokenizer(256)


@pytest.fixture
def sources(tmp_path):
    """Three documents in two files, and an empty one."""
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "", "é")))
    text = tmp_path / "b.txt"
    text.write_bytes(b"c\nd\n")
    return [lines, text]


def test_function(tmp_path, sources):
    calls = []
    done = prepare_data(
        sources, tmp_path / "o.bin", BYTES, progress=lambda *call: calls.append(call)
    )
    n_bytes = sum(source.stat().st_size for source in sources)
    assert done == Prepared(3, 1, 8, n_bytes)
    assert calls[-1] == ("encoding", n_bytes, n_bytes)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    data = open_tokens(tmp_path / "o.bin", BYTES)
    assert data.tokens.tobytes() == np.array([*"abéc\nd\n".encode()], np.uint16).tobytes()
    assert data.documents.tolist() == [0, 2, 4]


@needs_vocabulary
@pytest.mark.parametrize("vocabulary", [VOCABULARY, WORLD])
@pytest.mark.parametrize("name", ["o.bin", "o.npy"])
def test_command(tmp_path, sources, vocabulary, name):
    done = rwkv(
        "prepare-data", *sources, tmp_path / name, "--tokenizer", vocabulary, "--append-eod"
    )
    assert (done.returncode, done.stderr) == (0, "")
    tokenizer = tokenizer_named(str(vocabulary))
    documents = [[*tokenizer.encode(text), 0] for text in ("ab", "é", "c\nd\n")]
    tokens = [token for document in documents for token in document]
    assert done.stdout.startswith(
        f"{tmp_path / name}: {len(tokens)} tokens in 3 documents (1 left out: empty), "
    )
    data = open_tokens(tmp_path / name, tokenizer)
    assert data.tokens.tolist() == tokens
    assert data.documents.tolist() == [0, *np.cumsum([*map(len, documents[:-1])])]


def test_what_is_refused(tmp_path, sources):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.bin").symlink_to(sources[1])
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "text.idx.txt").write_text("x")
    names = {path.name for path in tmp_path.iterdir()}
    for arguments, message in (
        ([sources[1], "link.bin"], "is the same file as the source"),
        ([sources[0], "empty.jsonl", "o.bin"], "empty.jsonl: has no text"),
        ([sources[0], "latin1.txt", "o.bin"], "latin1.txt: not UTF-8 at offset 3"),
        ([sources[0], "other.jsonl", "o.bin"], 'other.jsonl: line 2: expected {"text": "…"}'),
        ([sources[0], "missing.txt", "o.bin"], "missing.txt: No such file"),
        ([sources[0], ".", "o.bin"], "not a regular file"),
        ([sources[0], "x.npy", "o.bin"], "x.npy: holds tokens by its name"),
        ([sources[0], "o.txt"], "o.txt: expected a name that ends in .bin or .npy"),
        ([sources[0], "no/o.bin"], "No such file"),
        ([sources[0], "o.bin", "--append-eod"], "has no token that ends a text"),
        ([sources[0], "o.bin", "--tokenizer", "40B"], "unknown tokenizer '40B' (choose bytes"),
        ([sources[0], "o.bin", "--tokenizer", sources[1]], "b.txt': line 1: expected an id"),
    ):
        done = rwkv("prepare-data", *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == names
    assert {path: path.read_bytes() for path in before} == before


def test_an_input_that_the_index_would_replace(tmp_path):
    (tmp_path / "text").write_text("x")
    (tmp_path / "o.idx").hardlink_to(tmp_path / "text")
    with pytest.raises(ValueError, match="same file"):
        prepare_data([tmp_path / "text"], tmp_path / "o.bin", BYTES)
    with pytest.raises(ValueError, match="no text to prepare"):
        prepare_data([], tmp_path / "o.bin", BYTES)


def test_old_files_stay_after_a_failure(tmp_path, sources):
    prepare_data(sources, tmp_path / "o.bin", BYTES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with sources[1].open("ab") as file:
        file.write(b"\xff")
    assert rwkv("prepare-data", *sources, tmp_path / "o.bin").returncode == 1
    sources[1].write_bytes(before["b.txt"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_of_tokenizers():
    assert tokenizer_named("BYTES").n_vocab == 256
    with pytest.raises(ValueError, match="unknown tokenizer '20'"):
        tokenizer_named("20")
