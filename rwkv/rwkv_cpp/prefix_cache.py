"""PrefixCache: states of what was read already, so that no prefix of tokens is read twice.

States are found by a key (what they depend on besides the tokens) and their tokens, through a
BLAKE2b of both at each length that is stored; a hit is compared token by token. In a folder each
state is one file of State.save, named `KEY-LENGTH-DIGEST.safetensors`; the names are the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from .atomic import replacing
from .errors import RWKVFileError
from .library import as_integer
from .state import State, StateNotice, token_array

_LOCK_SECONDS = 10
_NAME = re.compile(r"([0-9a-f]{16})-(\d{1,9})-([0-9a-f]{64})\.safetensors")


class _Place(NamedTuple):
    """Where a state is found."""

    key: str  # hashed
    length: int  # tokens
    digest: str  # of key and tokens

    @property
    def file_name(self) -> str:
        return f"{self.key}-{self.length}-{self.digest}.safetensors"


class PrefixCache:
    """States by the tokens that were read, in memory and, if `folder` is given, on disk.

    max_bytes: of states in memory; the least recently used ones go first.
    folder: made if it is missing, for this user only. It serves several processes at once and
    later ones; damaged files in it are removed.
    max_disk_bytes: of files in the folder; the least recently used ones go first.

    Thread safe. States are copied on the way in and out. What fails on the disk costs a
    StateNotice (a warning), never the work of the caller.
    """

    def __init__(
        self,
        max_bytes: int = 1 << 30,
        folder: Path | None = None,
        max_disk_bytes: int = 1 << 32,
    ) -> None:
        self.max_bytes = as_integer(max_bytes, "max_bytes", 0, 1 << 62)
        self._lock = threading.Lock()
        self._states: OrderedDict[_Place, State] = OrderedDict()
        self._nbytes = 0
        self._disk = None if folder is None else _Folder(folder, max_disk_bytes)

    @property
    def nbytes(self) -> int:
        """Of the states in memory."""
        return self._nbytes

    def __len__(self) -> int:
        """States in memory."""
        return len(self._states)

    def longest(self, key: str, tokens: Iterable[int]) -> State | None:
        """A copy of the state after the longest prefix of `tokens`, or all of them, that is stored.

        key: states of one key are never found by another; see RWKV.cache_key.
        """
        ids = token_array(tokens)
        with self._lock:
            known = set(self._states)
        on_disk = self._disk.places() if self._disk else set()
        for place in _prefixes(key, ids, known | on_disk):
            with self._lock:
                state = self._states.get(place)
                if state is not None:
                    self._states.move_to_end(place)
                    state = state.copy()
            if state is None and self._disk:
                state = self._disk.load(place)
                if state is not None:
                    self._keep(place, state.copy())
            elif self._disk and place in on_disk:
                self._disk.touch(place)
            if state is not None and state.tokens == ids[: place.length]:
                return state
        return None

    def store(self, key: str, state: State) -> None:
        """Keep a copy of a state, to be found by its tokens.

        Does nothing for a state whose tokens do not tell its bits (`State.arithmetic` is None), nor
        for one without tokens or logits, from which nothing could go on.
        """
        if state.arithmetic is None or state.logits is None or not state.tokens:
            return
        place = _place(key, state.tokens)
        self._keep(place, state.copy())
        if self._disk:
            self._disk.store(place, state)

    def clear(self) -> None:
        """Forget the states in memory; those on disk stay."""
        with self._lock:
            self._states.clear()
            self._nbytes = 0

    def _keep(self, place: _Place, state: State) -> None:
        with self._lock:
            old = self._states.pop(place, None)
            self._nbytes -= old.nbytes if old else 0
            if state.nbytes > self.max_bytes:
                return
            while self._nbytes + state.nbytes > self.max_bytes:
                _, oldest = self._states.popitem(last=False)
                self._nbytes -= oldest.nbytes
            self._states[place] = state
            self._nbytes += state.nbytes


class _Folder:
    """The files of a cache."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = Path(path)
        self._max_bytes = as_integer(max_bytes, "max_disk_bytes", 0, 1 << 62)
        self._make()
        self._lock = FileLock(self._path / ".lock", timeout=_LOCK_SECONDS, mode=0o600)

    def _make(self) -> None:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def places(self) -> set[_Place]:
        with contextlib.suppress(OSError):
            return {
                _Place(match[1], int(match[2]), match[3])
                for name in os.listdir(self._path)
                if (match := _NAME.fullmatch(name))
            }
        return set()

    def load(self, place: _Place) -> State | None:
        path = self._path / place.file_name
        try:
            state = State.load(path)
        except RWKVFileError:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        except OSError:  # gone meanwhile
            return None
        self.touch(place)
        return state

    def touch(self, place: _Place) -> None:
        """Make it the most recently used one."""
        with contextlib.suppress(OSError):
            os.utime(self._path / place.file_name)

    def store(self, place: _Place, state: State) -> None:
        path = self._path / place.file_name
        try:
            if path.exists():
                self.touch(place)
                return
            data = state.to_bytes()
            if len(data) > self._max_bytes:
                return
            self._make()  # somebody may have tidied up
            with self._lock:
                with replacing(path, mode=0o600) as file:
                    file.write(data)
                self._evict()
        except (OSError, ValueError) as error:
            warnings.warn(f"{self._path}: a state was not kept: {error}", StateNotice, stacklevel=3)

    def _evict(self) -> None:
        """Remove the oldest files, and what killed writers left: whoever writes has the lock."""
        files = []
        for entry in os.scandir(self._path):
            if entry.name.endswith(".tmp"):
                os.unlink(entry)
            elif _NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self._max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            left -= size


def _place(key: str, tokens: array[int]) -> _Place:
    digest = _start(key)
    digest.update(tokens.tobytes())
    return _Place(_key_digest(key), len(tokens), digest.hexdigest())


def _prefixes(key: str, tokens: array[int], known: set[_Place]) -> Iterator[_Place]:
    """The known places of prefixes of `tokens`, the longest one first."""
    name = _key_digest(key)
    lengths = {place.length for place in known if place.key == name}
    data = memoryview(tokens.tobytes())
    found = []
    digest = _start(key)
    done = 0
    for length in sorted(lengths):
        if length > len(tokens):
            break
        digest.update(data[done * tokens.itemsize : length * tokens.itemsize])
        done = length
        place = _Place(name, length, digest.hexdigest())
        if place in known:
            found.append(place)
    return reversed(found)


def _start(key: str) -> hashlib.blake2b:
    """Of a key, with its length so that no other key and tokens make the same bytes."""
    data = key.encode()
    return hashlib.blake2b(len(data).to_bytes(8, "little") + data, digest_size=32)


def _key_digest(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
