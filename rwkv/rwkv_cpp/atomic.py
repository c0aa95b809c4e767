"""Files that appear complete or not at all.

A new file is written under a name of its own beside the target, `.NAME.PID-RANDOM.tmp`, brought to
the disk and then renamed. A failure or a signal leaves what was there before.
"""

import contextlib
import errno
import os
import re
import secrets
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a binary file, readable and seekable, that takes the place of `path` at the end.

    mode: its permissions, of which the umask takes away some.
    On an exception (SIGINT and SIGTERM raise one) the temporary file is removed and `path` stays
    as it was. Temporary files that killed runs left for the same target are removed first.
    Raises OSError where `path` cannot be written or is something else than a regular file.
    """
    _refuse_target(path)
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _termination_as_exception():
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(temporary, flags, mode), "w+b")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):  # closing flushes, which may fail once more
                file.close()
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # as of a full disk
                error.filename = str(path)
            raise
        _sync_folder(path.parent)


def refuse_same_file(source: Path, target: Path) -> None:
    """Raise ValueError if both paths lead to one file, be it by a symbolic or a hard link."""
    if source.exists() and target.exists() and os.path.samefile(source, target):
        raise ValueError(
            f"'{target}' is the same file as the source '{source}', choose another target"
        )


def _refuse_target(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected the name of a file", str(path))
    if not stat.S_ISREG(mode):  # a rename would take away the device or the pipe itself
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "exists and is write-protected", str(path))


def _remove_stale(path: Path) -> None:
    name = re.compile(re.escape(f".{path.name}.") + r"(\d+)-[0-9a-f]{8}\.tmp")
    for entry in path.parent.iterdir():
        match = name.fullmatch(entry.name)
        if match and not _is_running(int(match[1])):
            # On Windows the file of a running process cannot be removed, nor can it on a folder
            # that others share: neither is a reason to fail here.
            with contextlib.suppress(OSError):
                entry.unlink()


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would reach the process there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync_folder(path: Path) -> None:
    """Bring a rename to the disk, where the system lets folders be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143) meanwhile, unless the program handles it itself."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
