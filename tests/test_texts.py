"""texts.py: what is a text, what is a document, and where a long one may be cut."""

import pytest
from commands import rwkv
from rwkv_cpp import RWKVFileError, load_tokenizer, texts
from rwkv_cpp.texts import read_documents, read_pieces, read_text
from seeds import VOCABULARY, WORLD, needs_vocabulary

NO_DOCUMENTS = [
    (b"{", "line 2 is not JSON"),
    (b"[" * 100_000, "line 2 is not JSON"),
    (b"[]", r"line 2: expected {\"text\": \"…\"}, found '\[\]'"),
    (b'{"text": 3}', "line 2: expected"),
    (b'"text"', "line 2: expected"),
]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(texts, "_CHUNK", 16)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff")
    with pytest.raises(RWKVFileError, match="not UTF-8 at offset 3"):
        read_text(tmp_path / "text")
    assert rwkv("perplexity", "-", input=b"\xff").stderr == b"error: stdin: not UTF-8 at offset 0\n"


@pytest.mark.parametrize("n_before", [0, 1, 14, 15, 16, 31, 50])
@pytest.mark.parametrize("wrong", [b"\xff", b"\xe2\x82", b"\xe2\x82x", b"\xed\xa0\x80"])
def test_pieces_that_are_not_utf8(tmp_path, small_chunks, n_before, wrong):
    (tmp_path / "text").write_bytes(b"a" * n_before + wrong)
    with pytest.raises(RWKVFileError, match=f"text: not UTF-8 at offset {n_before}$"):
        list(read_pieces(tmp_path / "text"))


def test_json_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a\\nb", "id": 1}\n\n{"text": "é\u2028"}\r\n', "utf-8")
    assert read_documents(path) == ["a\nb", "é\u2028"]
    pieces = list(read_pieces(path))
    assert [(piece.text, piece.ends_document) for piece in pieces] == [
        ("a\nb", True),
        ("é\u2028", True),
    ]
    assert [piece.where for piece in pieces] == [f"{path}: line 1", f"{path}: line 3"]
    assert sum(piece.n_bytes for piece in pieces) == path.stat().st_size


@pytest.mark.parametrize(("line", "message"), NO_DOCUMENTS)
def test_lines_that_are_no_documents(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": ""}\n' + line + b"\n")
    for read in (read_documents, lambda path: list(read_pieces(path))):
        with pytest.raises(RWKVFileError, match=f"{path.name}: {message}"):
            read(path)


def test_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": ""}\n{"text": "\xff"}\n')
    with pytest.raises(RWKVFileError, match="line 2: not UTF-8 at byte 10"):
        list(read_pieces(path))


@needs_vocabulary
@pytest.mark.parametrize("vocabulary", [VOCABULARY, WORLD])
def test_pieces_have_the_tokens_of_the_whole(tmp_path, small_chunks, vocabulary):
    tokenizer = load_tokenizer(1 << 17, vocabulary)
    text = (
        "A line,\nanother\n\nnew one\n  indented\r\nend\n\n\nﬁ 1\n2 e\n\u0301 日本\n語\u3000\nx \n"
        "a_long_line_without_any_spaces_or_line_ends_in_it\n\tif (x) {\n}\n"
    ) * 9
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    pieces = list(read_pieces(path))
    assert len(pieces) > 20
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.n_bytes for piece in pieces) == len(text.encode())
    tokens = [token for piece in pieces for token in tokenizer.encode(piece.text)]
    assert tokens == tokenizer.encode(text)


def test_an_empty_text_is_a_document(tmp_path):
    (tmp_path / "text").touch()
    assert [piece.text for piece in read_pieces(tmp_path / "text")] == [""]
