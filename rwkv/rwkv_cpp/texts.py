"""Texts in files: UTF-8, or JSON Lines, a document `{"text": "…"}` a line."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import RWKVFileError
from .ggmf import open_regular

_CHUNK = 1 << 20  # bytes of a text that are read at once
# Where 20B and World begin a new token anyway: after a single line end between two words.
_CUT = re.compile(r".*\S\n(?=\S)", re.DOTALL)


class Piece(NamedTuple):
    """A part of a document that can be cut into tokens by itself."""

    text: str
    ends_document: bool
    where: str  # it was read, for messages
    n_bytes: int  # of the file, read since the piece before


def read_pieces(path: Path) -> Iterator[Piece]:
    """The documents of a file, read as they are asked for: a `.jsonl` has one in each line that is
    not empty, any other file is one.

    Raises RWKVFileError, with the line or offset, for what is not UTF-8 or no document.
    """
    return _pieces_of_lines(path) if path.suffix == ".jsonl" else _pieces_of_text(path)


def _pieces_of_lines(path: Path) -> Iterator[Piece]:
    n_bytes = 0
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            n_bytes += len(line)
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise RWKVFileError(f"{where}: not UTF-8 at byte {error.start}") from None
            yield Piece(_document(where, text), True, where, n_bytes)
            n_bytes = 0


def _pieces_of_text(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    offset = n_bytes = 0
    with open_regular(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            start = offset - len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise RWKVFileError(f"{path}: not UTF-8 at offset {start + error.start}") from None
            offset += len(chunk)
            n_bytes += len(chunk)
            if not chunk:
                break
            if cut := _CUT.match(text):
                yield Piece("".join([*parts, cut[0]]), False, str(path), n_bytes)
                parts, n_bytes = [text[cut.end() :]], 0
            else:
                parts.append(text)
    yield Piece("".join(parts), True, str(path), n_bytes)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, - for stdin. Raises RWKVFileError for other encodings."""
    is_stdin = str(path) == "-"
    data = sys.stdin.buffer.read() if is_stdin else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RWKVFileError(f"{_name(path)}: not UTF-8 at offset {error.start}") from None


def read_texts(path: Path, is_documents: bool) -> list[str]:
    """The file as one text, or as documents."""
    return read_documents(path) if is_documents else [read_text(path)]


def read_documents(path: Path) -> list[str]:
    """The texts of a file of JSON Lines, - for stdin; empty lines count for nothing. Raises
    RWKVFileError, with the line."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [_document(f"{_name(path)}: line {n}", line) for n, line in lines if line.strip()]


def _document(where: str, line: str) -> str:
    """The text of one line."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RWKVFileError(f"{where} is not JSON: {error}") from None
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise RWKVFileError(f'{where}: expected {{"text": "…"}}, found {line.strip()[:60]!r}')
    return text


def _name(path: Path) -> str:
    return "stdin" if str(path) == "-" else str(path)
