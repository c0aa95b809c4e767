"""Texts as tokens, in the files that RWKV-4 is trained from.

    .bin and .idx   "binidx", Megatron's memory-mapped data set, as GPT-NeoX writes it and RWKV-LM
                    reads it: the tokens, and where each document is
    .npy            the tokens alone, as numpy writes an array
    .jsonl          JSON Lines, a document `{"text": "…"}` a line
    any other       a text in UTF-8

A `.bin` holds nothing but tokens. Its `.idx` is, all little-endian: the magic `MMIDIDX\\0\\0`, the
version 1 (uint64), a code for the type of the tokens (uint8), the number of items and that of
document bounds (uint64 each); then of each item its number of tokens (int32), of each item its
offset in the `.bin` in bytes (int64), and the document bounds (int64): the items that documents
begin with, and the number of items at the end. An item is a document here, as in RWKV-LM.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .atomic import replacing
from .errors import RWKVFileError
from .ggmf import open_regular
from .texts import read_pieces
from .tokenizer import ByteTokenizer, Tokenizer, ends_text

SUFFIXES = (".bin", ".npy")  # of what is written

_MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
_VERSION = 1
# Codes 6 and 7 are floats, which no tokens are.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_MAX_ITEM = 2**31 - 1
_NPY_HEAD_BYTES = 128
_SCAN = 1 << 24  # tokens that are looked at together


@dataclass(frozen=True, eq=False)
class TokenData:
    """tokens: one dimension, of any integer type, not to be written to: often a mapped file.

    documents: where they begin, int64, ascending, the first at 0.
    """

    tokens: np.ndarray
    documents: np.ndarray


# ---- Reading -------------------------------------------------------------------------------------


def open_tokens(path: Path, tokenizer: Tokenizer) -> TokenData:
    """The tokens of a file, of which the suffix says what it is.

    binidx, `.npy` and texts of which every byte is a token are mapped, other texts encoded into
    memory. In a `.npy` a document ends with the token that ends a text, if the tokenizer has one.

    Raises RWKVFileError for files that are damaged, empty or hold tokens that the tokenizer lacks.
    """
    if path.suffix in (".bin", ".idx"):
        data = _open_binidx(path)
    elif path.suffix == ".npy":
        data = _open_npy(path, tokenizer)
    else:
        data = _open_text(path, tokenizer)
    if not data.tokens.size:
        raise RWKVFileError(f"{path}: has no tokens")
    _check_range(path, data.tokens, tokenizer.n_vocab)
    return data


def _open_text(path: Path, tokenizer: Tokenizer) -> TokenData:
    if isinstance(tokenizer, ByteTokenizer) and path.suffix != ".jsonl":
        for _ in read_pieces(path):  # it must be UTF-8
            pass
        return TokenData(_map(path, "u1"), np.zeros(1, np.int64))
    memory = io.BytesIO()
    writer = TokenWriter(memory, tokenizer)
    writer.write_file(path)
    return TokenData(np.frombuffer(memory.getbuffer(), writer.dtype), _starts(writer.sizes))


def _open_npy(path: Path, tokenizer: Tokenizer) -> TokenData:
    with open_regular(path):
        pass
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RWKVFileError(f"{path}: not an array of numpy: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RWKVFileError(
            f"{path}: expected integers in one dimension, found {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    starts = [np.zeros(1, np.int64)]
    if ends_text(tokenizer, 0):
        for first in range(0, tokens.size, _SCAN):
            starts.append(np.flatnonzero(tokens[first : first + _SCAN] == 0) + first + 1)
    documents = np.concatenate(starts)
    return TokenData(tokens, documents[documents < max(tokens.size, 1)])


def _open_binidx(path: Path) -> TokenData:
    data_path, index_path = path.with_suffix(".bin"), path.with_suffix(".idx")
    with open_regular(index_path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        if not head.startswith(_MAGIC) or len(head) < _HEAD.size:
            raise RWKVFileError(f"{index_path}: not the index of binidx data (no MMIDIDX)")
        _, version, code, n_items, n_bounds = _HEAD.unpack(head)
        if version != _VERSION or code not in _DTYPES:
            raise RWKVFileError(
                f"{index_path}: version {version} with tokens of type {code}, expected version "
                f"{_VERSION} and one of the types {', '.join(map(str, _DTYPES))}"
            )
        expected = _HEAD.size + 12 * n_items + 8 * n_bounds
        if size != expected:
            raise RWKVFileError(
                f"{index_path}: {size} bytes, expected {expected} for {n_items} items and "
                f"{n_bounds} document bounds (truncated?)"
            )
        sizes = np.fromfile(file, "<i4", n_items).astype(np.int64)
        offsets = np.fromfile(file, "<i8", n_items)
        bounds = np.fromfile(file, "<i8", n_bounds)
    tokens = _map(data_path, _DTYPES[code])
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    if (sizes < 0).any() or (offsets != begins[:-1] * tokens.itemsize).any():
        raise RWKVFileError(f"{index_path}: its items do not follow one another in the .bin")
    if begins[-1] != tokens.size:
        raise RWKVFileError(
            f"{data_path}: {tokens.size} tokens, its index is for {begins[-1]} (from another run?)"
        )
    if (np.diff(bounds, prepend=0, append=n_items) < 0).any():
        raise RWKVFileError(f"{index_path}: its document bounds do not ascend from 0 to {n_items}")
    # Some writers leave the last bound out, or the first; empty documents are none here.
    documents = np.unique(np.append(begins[bounds], 0))
    return TokenData(tokens, documents[documents < max(tokens.size, 1)])


def _map(path: Path, dtype: str) -> np.ndarray:
    """A file of nothing but numbers, mapped."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        width = np.dtype(dtype).itemsize
        if size % width:
            raise RWKVFileError(f"{path}: {size} bytes, expected a multiple of {width}")
        if not size:  # which cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(file, dtype, "r")


def _check_range(path: Path, tokens: np.ndarray, n_vocab: int) -> None:
    limits = np.iinfo(tokens.dtype)
    if limits.min == 0 and limits.max < n_vocab:
        return
    for first in range(0, tokens.size, _SCAN):
        part = tokens[first : first + _SCAN]
        wrong = np.flatnonzero((part < 0) | (part >= n_vocab))
        if wrong.size:
            raise RWKVFileError(
                f"{path}: token {part[wrong[0]]} at position {first + wrong[0]}, the tokenizer has "
                f"{n_vocab} (name the one that the file was made with)"
            )


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Of documents of so many tokens, one after the other."""
    return np.cumsum([0, *sizes], dtype=np.int64)[: max(len(sizes), 1)]


# ---- Writing -------------------------------------------------------------------------------------


class TokenWriter:
    """Appends tokens to a file, document by document, and counts them.

    dtype: uint16, or int32 where the vocabulary is larger. sizes: the tokens of each document.
    n_empty: documents without any, which are left out.
    """

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, *, append_eod: bool = False) -> None:
        """append_eod: end each document with the token that ends a text. Raises ValueError where
        the tokenizer has none."""
        if append_eod and not ends_text(tokenizer, 0):
            raise ValueError(
                "append_eod: this tokenizer has no token that ends a text, as 20B and world have"
            )
        self._file = file
        self._tokenizer = tokenizer
        self._append_eod = append_eod
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<i4")
        self.sizes = array("q")
        self.n_tokens = 0
        self.n_empty = 0
        self._size = 0  # of the document so far

    def write_file(self, path: Path, progress: Callable[[int], object] | None = None) -> None:
        """Append the documents of a text or `.jsonl`.

        progress: called with the bytes of it that were read since the last time.
        Raises RWKVFileError for what is not UTF-8, no document, or nothing but empty ones.
        """
        before = self.n_tokens
        for piece in read_pieces(path):
            try:
                self._append(self._tokenizer.encode(piece.text))
            except ValueError as error:  # a lone surrogate, which JSON can write
                raise RWKVFileError(f"{piece.where}: {error}") from None
            if piece.ends_document:
                self._end_document()
            if progress:
                progress(piece.n_bytes)
        if self.n_tokens == before:
            raise RWKVFileError(f"{path}: has no text")

    def _append(self, tokens: Sequence[int]) -> None:
        self._file.write(np.array(tokens, self.dtype).tobytes())
        self._size += len(tokens)
        self.n_tokens += len(tokens)

    def _end_document(self) -> None:
        if not self._size:
            self.n_empty += 1
            return
        if self._append_eod:
            self._append([0])
        self.sizes.append(self._size)
        self._size = 0


@contextlib.contextmanager
def writing_tokens(
    path: Path, tokenizer: Tokenizer, *, append_eod: bool = False
) -> Iterator[TokenWriter]:
    """A writer of a `.npy`, or of a `.bin` and the `.idx` beside it. They appear, or replace older
    files, only when they are complete.

    Raises ValueError for another suffix, and for a document that is too long for an `.idx`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    with contextlib.ExitStack() as stack:
        index = None
        if path.suffix == ".bin":
            index = stack.enter_context(replacing(path.with_suffix(".idx")))
        file = stack.enter_context(replacing(path))
        writer = TokenWriter(file, tokenizer, append_eod=append_eod)
        if index is None:
            file.write(_npy_head(writer))
        yield writer
        if index is None:
            file.seek(0)
            file.write(_npy_head(writer))
        else:
            index.write(_index(path, writer))


def _index(path: Path, writer: TokenWriter) -> bytes:
    sizes = np.array(writer.sizes, np.int64)
    if sizes.max(initial=0) > _MAX_ITEM:
        raise ValueError(
            f"{path}: a document of {sizes.max()} tokens, an .idx has room for {_MAX_ITEM} "
            "(cut it, or write a .npy)"
        )
    n_items = len(sizes)
    head = _HEAD.pack(_MAGIC, _VERSION, _CODES[writer.dtype], n_items, n_items + 1)
    offsets = _starts(writer.sizes) * writer.dtype.itemsize
    bounds = np.arange(n_items + 1)
    numbers = sizes.astype("<i4"), offsets.astype("<i8"), bounds.astype("<i8")
    return b"".join([head, *(part.tobytes() for part in numbers)])


def _npy_head(writer: TokenWriter) -> bytes:
    """Version 1.0 of numpy's format, always of the same length: that of the array comes last."""
    shape = (writer.n_tokens,)
    head = repr({"descr": writer.dtype.str, "fortran_order": False, "shape": shape})
    start = b"\x93NUMPY\1\0" + struct.pack("<H", _NPY_HEAD_BYTES - 10)
    return start + head.ljust(_NPY_HEAD_BYTES - 11).encode() + b"\n"
