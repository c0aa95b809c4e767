"""Files appear complete or not at all (faults.md K3; Q-01..Q-05, Q-12, Q-13, C-14, C-15)."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rwkv_cpp.atomic import refuse_same_file, replacing

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, links and permissions")


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def test_the_target_appears_at_the_end(tmp_path):
    target = tmp_path / "model.bin"
    with replacing(target) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == {"model.bin"}


def test_what_is_brought_to_the_disk(tmp_path, monkeypatch):
    """The file before it gets its name, then the name."""
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(*paths: object) -> None:
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with replacing(tmp_path / "model.bin") as file:
        file.write(b"new")
    assert events == ["file", "rename", *([] if os.name == "nt" else ["folder"])]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_under_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_cpp.atomic.secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f".model.bin.{os.getpid()}-00000000.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError), replacing(tmp_path / "model.bin"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("fail", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file(tmp_path, fail):
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")

    def write() -> None:
        with replacing(target) as file:
            file.write(b"new")
            raise fail

    with pytest.raises(fail):
        write()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == {"model.bin"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_system_call_leaves_the_old_file(tmp_path, monkeypatch, call):
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"no space.*model\.bin"), replacing(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == {"model.bin"}


@posix
@pytest.mark.parametrize("limit", [0, 10, 8191, 99_999])
def test_a_full_disk(tmp_path, limit):  # Q-03, C-15: a file size limit stands for the full disk
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    code = """
import resource, sys
from pathlib import Path
from rwkv_cpp.atomic import replacing
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with replacing(Path(sys.argv[1])) as file:
        for _ in range(100):
            file.write(bytes(1000))
except OSError as error:
    sys.exit(0 if error.filename == sys.argv[1] else 2)
sys.exit(1)
"""
    assert python(code, target, limit).wait() == 0
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == {"model.bin"}


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_remove_the_temporary_file(tmp_path, number):
    code = """
import sys, time
from pathlib import Path
from rwkv_cpp.atomic import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(bytes(100_000))
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""
    (tmp_path / "out").mkdir()
    target, ready = tmp_path / "out" / "model.bin", tmp_path / "ready"
    process = python(code, target, ready)
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert len(names(target.parent)) == 1
    process.send_signal(number)
    expected = 143 if number == signal.SIGTERM else -signal.SIGINT
    assert process.wait(timeout=10) == expected
    assert names(target.parent) == set()


@posix
def test_the_handler_of_the_program_stays(tmp_path):
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with replacing(tmp_path / "model.bin"):
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    with replacing(tmp_path / "model.bin"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@posix
def test_leftovers_of_dead_runs_are_removed(tmp_path):
    dead = python("")
    dead.wait()
    leftover = f".model.bin.{dead.pid}-0123abcd.tmp"
    running = f".model.bin.{os.getppid()}-0123abcd.tmp"
    others = {f".other.bin.{dead.pid}-0123abcd.tmp", ".model.bin.tmp", f"model.bin.{dead.pid}.tmp"}
    for name in {leftover, running} | others:
        (tmp_path / name).write_bytes(b"part")
    with replacing(tmp_path / "model.bin") as file:
        file.write(b"new")
    assert names(tmp_path) == {"model.bin", running} | others


@posix
def test_permissions_are_those_of_the_umask(tmp_path):
    for umask in 0o022, 0o077:
        before = os.umask(umask)
        try:
            with replacing(tmp_path / "model.bin"):
                pass
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "model.bin").stat().st_mode) == 0o666 & ~umask


def test_a_folder_is_refused(tmp_path):  # C-14
    with pytest.raises(IsADirectoryError, match="is a folder"), replacing(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "model.bin"):
        pass
    assert names(tmp_path) == set()


@posix
def test_devices_and_pipes_are_refused(tmp_path):  # C-14: a rename would take them away
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path / "pipe", Path("/dev/null"):
        before = path.stat().st_mode
        with pytest.raises(OSError, match="not a regular file"), replacing(path):
            pass
        assert path.stat().st_mode == before


@posix
@pytest.mark.skipif(os.name != "nt" and os.getuid() == 0, reason="root may write everywhere")
def test_protected_targets_are_refused(tmp_path):  # C-14, Q-12
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    target.chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"), replacing(target):
        pass
    target.chmod(0o644)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError), replacing(target):
            pass
    finally:
        tmp_path.chmod(0o755)
    assert target.read_bytes() == b"old"


def test_two_writers_at_once(tmp_path):
    target = tmp_path / "model.bin"
    barrier = threading.Barrier(2)

    def write(byte: bytes) -> None:
        with replacing(target) as file:
            file.write(byte * 100_000)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(byte,)) for byte in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert names(tmp_path) == {"model.bin"}


@posix
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_source_and_target_must_differ(tmp_path, link):  # Q-01, C-14
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    refuse_same_file(source, tmp_path / "absent")
    (tmp_path / "other").touch()
    refuse_same_file(source, tmp_path / "other")
    link(source, tmp_path / "link")
    for target in source, tmp_path / "." / "source", tmp_path / "link":
        with pytest.raises(ValueError, match="same file"):
            refuse_same_file(source, target)
