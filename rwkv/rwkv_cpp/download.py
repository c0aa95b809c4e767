"""Fetches a file from the Hugging Face hub or a URL, and checks that what came is it.

What has come is kept when a download ends early, and the next one goes on from there: a checkpoint
may have 28 GB. The hub's client, which knows the hub's protocol, proxies, mirrors (HF_ENDPOINT),
tokens and its own cache (HF_HOME), is used for all requests; its own downloads begin anew in each
process.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DownloadFailed, first_line
from .ggmf import recognise
from .progress import Progress
from .registry import Source

ATTEMPTS = 5  # in a row that bring nothing new
PAUSE_SECONDS = 0.5  # after the first of them, then twice as long each time
_CHUNK_BYTES = 1 << 20

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _Remote:
    """What a server says of a file before it is fetched; None where it does not."""

    url: str
    size: int | None
    etag: str | None
    sha256: str | None
    headers: dict[str, str]


@contextlib.contextmanager
def downloaded(source: Source, folder: Path, reserve: float, progress: Progress) -> Iterator[Path]:
    """Yield the complete and checked file, and remove it when the block ends without an exception.

    A copy in the hub client's own cache is used instead of a new download, and stays.

    folder:  where the download grows; one process at a time may use it for this source.
    reserve: free space that must be left after the download, in sizes of the file.

    Raises DownloadFailed, saying what to do, and OSError for the disk's failures.
    """
    if copy := _in_cache_of_hub(source):
        yield copy
        return
    remote = _ask(source)
    part = folder / f"{source.name}.{_version(remote)}.part"
    for other in folder.glob(f"{glob.escape(source.name)}.*.part"):
        if other != part:  # of what the address led to before
            other.unlink()
    with part.open("ab") as file:
        _check_space(file, remote, reserve)
        _fetch(remote, file, source, progress)
    try:
        _check(part, remote, source, progress)
    except DownloadFailed:
        part.unlink()
        raise
    yield part
    part.unlink()


# ---- Before -------------------------------------------------------------------------------------


def _in_cache_of_hub(source: Source) -> Path | None:
    import huggingface_hub

    if source.repo is None:
        return None
    path = huggingface_hub.try_to_load_from_cache(
        source.repo, source.file, revision=source.revision
    )
    if not isinstance(path, str):
        return None
    real = Path(path).resolve()  # whose name is the hash that the client knows it by
    return real if source.sha256 in (None, real.name) else None


def _ask(source: Source) -> _Remote:
    """Ask what there is at the source's address."""
    try:
        with _failures(source):
            return _ask_hub(source, source.repo) if source.repo else _ask_url(source.file)
    except _Interrupted as interruption:
        raise DownloadFailed(
            f"{interruption} (no network? models that are at hand need none)"
        ) from None


def _ask_hub(source: Source, repo: str) -> _Remote:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = huggingface_hub.hf_hub_url(repo, source.file, revision=source.revision)
    try:
        found = huggingface_hub.get_hf_file_metadata(url)
    except EntryNotFoundError:
        raise DownloadFailed(
            f"the repository {source.repo} has no file '{source.file}', it has "
            + _models_in(repo, source.revision)
        ) from None
    except RepositoryNotFoundError:
        raise DownloadFailed(
            f"there is no repository {source.repo} at {huggingface_hub.constants.ENDPOINT}, "
            "or it is private: 'hf auth login' takes a token"
        ) from None
    sha256 = found.etag if _SHA256.fullmatch(found.etag or "") else None
    if source.sha256 and sha256 and source.sha256 != sha256:
        raise DownloadFailed(
            f"{source.file}: the hub has another file of that name now, of SHA-256 {sha256}, "
            f"expected {source.sha256}"
        )
    return _Remote(url, found.size, None, source.sha256 or sha256, build_hf_headers())


def _models_in(repo: str, revision: str) -> str:
    """The models of a repository, for an error."""
    import huggingface_hub

    files = huggingface_hub.list_repo_files(repo, revision=revision)
    models = [file for file in files if file.endswith((".pth", ".safetensors", ".bin"))]
    more = f" and {len(models) - 8} more" if len(models) > 8 else ""
    return f"{', '.join(models[:8])}{more}" if models else "no models"


def _ask_url(url: str) -> _Remote:
    import huggingface_hub

    headers = {"Accept-Encoding": "identity"}
    response = huggingface_hub.get_session().head(
        url, headers=headers, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
    )
    if response.status_code in (403, 405, 501):  # knows GET only
        return _Remote(url, None, None, None, {})
    response.raise_for_status()
    length = response.headers.get("Content-Length", "")
    etag = response.headers.get("ETag", "")
    is_strong = etag.startswith('"')
    return _Remote(
        url, int(length) if length.isdecimal() else None, etag if is_strong else None, None, {}
    )


def _version(remote: _Remote) -> str:
    """Names what a server holds, so that parts of different files are never joined."""
    identity = remote.sha256 or remote.etag
    return hashlib.sha256(f"{identity} {remote.size}".encode()).hexdigest()[:8]


def _check_space(file: BinaryIO, remote: _Remote, reserve: float) -> None:
    if remote.size is None:
        return
    folder = Path(file.name).parent
    needed = remote.size - file.tell() + int(reserve * remote.size)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadFailed(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed to download "
            "and convert: make room, or set RWKV_HOME to a folder elsewhere"
        )


# ---- The transfer --------------------------------------------------------------------------------


def _fetch(remote: _Remote, file: BinaryIO, source: Source, progress: Progress) -> None:
    """Append to `file` what it lacks, trying again where the connection breaks."""
    can_continue = bool(remote.sha256 or remote.etag)  # tells the beginning of the same file
    failures = 0
    while True:
        if not can_continue:
            _empty(file)
        before = file.tell()
        if before == remote.size:
            return
        try:
            with _failures(source):
                _fetch_once(remote, file, source, progress)
            if remote.size in (None, file.tell()):
                return
            what = f"{source.file}: {file.tell()} bytes came of {remote.size}"
        except _Interrupted as interruption:
            what = str(interruption)
        failures = 1 if can_continue and file.tell() > before else failures + 1
        if failures == ATTEMPTS:
            raise DownloadFailed(f"{what}; what came is kept, try again")
        time.sleep(PAUSE_SECONDS * 2 ** (failures - 1))


class _Interrupted(Exception):
    """The connection failed or broke; another attempt may do better."""


def _fetch_once(remote: _Remote, file: BinaryIO, source: Source, progress: Progress) -> None:
    import huggingface_hub

    start = file.tell()
    headers = remote.headers | {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-"}
        if remote.etag:
            headers |= {"If-Range": remote.etag}
    timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    session = huggingface_hub.get_session()
    with session.stream("GET", remote.url, headers=headers, timeout=timeout) as response:
        _check_response(remote, response, source)
        span = response.headers.get("Content-Range", "")
        if start and not (response.status_code == 206 and span.startswith(f"bytes {start}-")):
            _empty(file)  # the server sends all, or something else than what was asked for
            if response.status_code == 206:
                raise _Interrupted(f"{source.file}: asked for bytes from {start} on, got {span}")
        for chunk in response.iter_bytes():
            file.write(chunk)
            progress(f"fetching {source.name}", file.tell(), remote.size or 0)
            if remote.size is not None and file.tell() > remote.size:
                _empty(file)
                raise DownloadFailed(f"{source.file}: more than its {remote.size} bytes came")


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _check_response(remote: _Remote, response: Any, source: Source) -> None:
    if response.status_code in (408, 416, 429) or response.status_code >= 500:
        raise _Interrupted(f"{source.file}: the server answered {response.status_code}")
    response.raise_for_status()
    if remote.url.startswith("https:") and response.url.scheme != "https":
        raise DownloadFailed(f"{source.file}: was led from https to {response.url}, refused")
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise DownloadFailed(f"{source.file}: came with the encoding {coding}, asked for none")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadFailed(
            f"{source.file}: the server sent an HTML page instead of the file (a login, or a page "
            "about it?): check the address"
        )


# ---- Afterwards ----------------------------------------------------------------------------------


def _check(part: Path, remote: _Remote, source: Source, progress: Progress) -> None:
    """Raise DownloadFailed if what came is not the file."""
    digest = hashlib.sha256()
    total = part.stat().st_size
    with part.open("rb") as file:
        head = file.read(512)
        what = recognise(head)
        if total == 0 or "HTML" in what or "git-lfs" in what:
            raise DownloadFailed(f"{source.file}: what came is {what}")
        if remote.sha256 is None:
            return
        digest.update(head)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(f"checking {source.name}", file.tell(), total)
    if digest.hexdigest() != remote.sha256:
        raise DownloadFailed(
            f"{source.file}: the SHA-256 of what came is {digest.hexdigest()}, expected "
            f"{remote.sha256}; it is removed, try again"
        )


# ---- Failures ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _failures(source: Source) -> Iterator[None]:
    """Turn what the hub's client and its HTTP package raise into our own exceptions."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (DownloadFailed, _Interrupted):
        raise
    except OfflineModeIsEnabled:
        raise DownloadFailed(
            f"{source.file} must be fetched from the network, which HF_HUB_OFFLINE forbids"
        ) from None
    except (HfHubHTTPError, ValueError) as error:
        raise DownloadFailed(f"{source.file}: {first_line(error)}") from None
    except OSError:  # the disk's
        raise
    except Exception as error:  # the HTTP package's own, whose name depends on the client's version
        if (response := getattr(error, "response", None)) is not None:
            raise DownloadFailed(
                f"{source.file}: the server answered {response.status_code}"
            ) from None
        raise _Interrupted(f"{source.file}: {first_line(error)}") from None
