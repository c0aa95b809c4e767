"""Which model file a user means by a path, a name or nothing, and the cache of model files.

The cache is the folder `models` in `$RWKV_HOME` (by default the user's cache folder):

    NAME-FORMAT.bin               models that `rwkv pull` fetched
    converted/FILE.ID-FORMAT.bin  what checkpoints and FP models elsewhere were turned into when
                                  they were first asked for
    unfinished/                   downloads and intermediate files that the next run goes on with

Anything in it may be removed while nothing uses it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from .atomic import replacing
from .checkpoint import is_checkpoint
from .convert import convert
from .errors import ModelNotFound, RWKVError, RWKVFileError
from .formats import file_formats
from .ggmf import DATA_TYPES, is_model_file, open_regular, read_index
from .library import load_rwkv_shared_library
from .model import embedded_model
from .progress import Progress
from .quantize import format_name_of, quantize_file
from .registry import parse_source
from .tokenizer import keep_vocabularies, vocabulary_folder

SUFFIXES = (".bin", ".pth", ".safetensors")

_CACHED = re.compile(r"(?P<name>.+)-(?P<format>[A-Z][A-Z0-9_]*)\.bin")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_MAX_LISTED = 8


def find_model(
    model: str | Path | None = None,
    format: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The model file that is meant. Nothing is asked of the network.

    model: a model file; a `.pth` or `.safetensors` checkpoint, which is converted into the cache
    when it is first asked for; either without its suffix; a name, `hf:REPO/FILE` or URL that
    `rwkv pull` fetched before, of which the most exact format at hand is taken; None: the embedded
    model.
    format: the model in this format, made once from a checkpoint or an FP32 or FP16 model. None:
    the file as it is, a checkpoint as FP16.
    progress: called while something is made, as (what, done, in all).

    Raises ModelNotFound, which lists the models at hand, RWKVFileError for a file that cannot be
    turned into the format, ValueError for an unknown format.
    """
    format = format and known_format(format)
    if model is None:
        return _of_file(embedded_model(), format, progress)
    text = os.fspath(model)
    path = Path(text)
    if file := file_at(text):
        return _of_file(file, format, progress)
    is_folder = os.path.isdir(text)  # which, unlike pathlib's, takes any text
    if not is_folder:
        if text in cached_models():
            return _of_name(text, text, format, progress)
        if source := parse_source(text):
            return _of_name(source.name, text, format, progress)
    raise ModelNotFound(
        f"'{text}' is {'a folder' if is_folder else 'no model'}; "
        f"{at_hand(path if is_folder else path.parent)}; "
        "'rwkv pull --list' shows what can be fetched"
    )


def file_at(text: str) -> Path | None:
    """The file at a path that may lack one of SUFFIXES. Raises ModelNotFound for several."""
    if _is_file(path := Path(text)):
        return path
    siblings = [sibling for suffix in SUFFIXES if _is_file(sibling := Path(f"{text}{suffix}"))]
    if len(siblings) > 1:
        names = ", ".join(f"'{sibling}'" for sibling in siblings)
        raise ModelNotFound(f"'{text}' may be one of {names}: add the suffix")
    return siblings[0] if siblings else None


def known_format(text: str) -> str:
    """The name of a format that files may have, from it in any case or its number in files.

    Raises ValueError for any other text.
    """
    library = load_rwkv_shared_library()
    name = format_name_of(library, text)
    if name not in (known := file_formats()):
        raise ValueError(f"unknown format '{text}' (choose from {', '.join(known)})")
    return name


# ---- The cache -----------------------------------------------------------------------------------


def models_folder() -> Path:
    """The folder of the cache; it need not exist."""
    return vocabulary_folder() / "models"


def cached_models() -> dict[str, dict[str, Path]]:
    """What `rwkv pull` fetched: name -> format -> file, the largest, which is the most exact,
    first."""
    return _models_in(models_folder())


def cached(name: str) -> dict[str, Path]:
    """The files of one model in the cache by format, as in `cached_models`."""
    path = models_folder() / name
    return _models_in(path.parent).get(path.name, {})


def _models_in(folder: Path) -> dict[str, dict[str, Path]]:
    found: dict[str, list[tuple[int, str, Path]]] = {}
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if (match := _CACHED.fullmatch(path.name)) and path.is_file():
                size = path.stat().st_size
                found.setdefault(match["name"], []).append((size, match["format"], path))
    return {
        name: {format: path for _, format, path in sorted(files, reverse=True)}
        for name, files in found.items()
    }


def cache_model(
    name: str,
    format: str | None,
    source: Callable[[], AbstractContextManager[Path]],
    progress: Progress | None = None,
) -> Path:
    """The file of a model in the cache, made if it is not there; safe with several processes.

    format: None: what is there, or else a checkpoint as FP16 and a model file as it is.
    source: gives a checkpoint or a model file, called only if the cache has nothing to start from.
    """
    if present := _present(name, format):
        return present
    report = progress or (lambda what, done, total: None)
    work = unfinished_folder()
    path = models_folder() / name
    path.parent.mkdir(exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock"), path.name, report):
        if present := _present(name, format):  # another process has made it meanwhile
            return present
        target = path.with_name(f"{path.name}-{format or 'FP16'}.bin")
        is_plain = format in (None, *DATA_TYPES)
        if not is_plain and (plain := _plain(cached(name))):
            return _quantized(plain, target, report)
        # A quantized model is made from an FP16 one, which is not kept. It is found here where an
        # earlier run did not come to its end.
        half = work / f"{path.name}-FP16.bin"
        if half.is_file() and format in (None, "FP16"):
            return half.replace(target)
        if is_plain or not half.is_file():
            with source() as given:
                if not is_checkpoint(given):
                    own = _format_of(given)
                    if format in (None, own):
                        return _linked(given, path.with_name(f"{path.name}-{own}.bin"))
                    return _quantized(given, target, report)
                if is_plain:
                    return _converted(given, target, report)
                _converted(given, half, report)
        _quantized(half, target, report)
        half.unlink()
        return target


def unfinished_folder() -> Path:
    """Where downloads and intermediate files grow. Raises RWKVError if it cannot be made."""
    folder = models_folder() / "unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RWKVError(
            f"the cache {models_folder()} cannot be written to ({error.strerror}): set RWKV_HOME "
            "to a folder that can, or use 'rwkv convert' and 'rwkv quantize'"
        ) from None
    return folder


def _present(name: str, format: str | None) -> Path | None:
    files = cached(name)
    return next(iter(files.values()), None) if format is None else files.get(format)


@contextlib.contextmanager
def _locked(path: Path, name: str, report: Progress) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(f"waiting for another process that makes {name}", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _converted(source: Path, target: Path, report: Progress) -> Path:
    format = target.stem.rpartition("-")[2]
    convert(source, target, format, progress=lambda *numbers: report("converting", *numbers))
    return target


def _quantized(source: Path, target: Path, report: Progress) -> Path:
    format = target.stem.rpartition("-")[2]
    if format in DATA_TYPES:
        raise RWKVFileError(
            f"{source}: is a model file of {_format_of(source)}; only a checkpoint can be turned "
            f"into {format}"
        )
    quantize_file(
        source,
        target,
        format,
        progress=lambda *numbers: report(f"quantizing to {format}", *numbers),
    )
    return target


def _linked(source: Path, target: Path) -> Path:
    """The file under another name, which stays when the first is removed."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        with source.open("rb") as file, replacing(target) as copy:
            shutil.copyfileobj(file, copy)
    return target


# ---- Files and names -----------------------------------------------------------------------------


def _of_name(name: str, text: str, format: str | None, progress: Progress | None) -> Path:
    files = cached(name)
    option = f" --format {format}" if format else ""
    fetch = f"'rwkv pull {text}{option}' fetches it"
    if not files:
        raise ModelNotFound(f"{text} is not on this machine: {fetch}; {at_hand(Path())}")
    plain = _plain(files)
    if format is not None and format not in files and (plain is None or format in DATA_TYPES):
        raise ModelNotFound(f"{text} is at hand as {', '.join(files)}, not as {format}: {fetch}")
    source = plain or next(iter(files.values()))
    return cache_model(name, format, lambda: contextlib.nullcontext(source), progress)


def _plain(files: dict[str, Path]) -> Path | None:
    """What other formats can be made of."""
    return next((files[format] for format in DATA_TYPES if format in files), None)


def _of_file(path: Path, format: str | None, progress: Progress | None) -> Path:
    if is_checkpoint(path):
        format = format or "FP16"
    elif format is None or _format_of(path) == format:
        return path
    # Of the same source there is one content in the cache: what it had before is removed.
    where = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    stem = re.sub(r"[^\w.%-]", "_", path.stem)[:100]
    name = f"{stem}.{where}.{_content_id(path)}"
    made = cache_model(f"converted/{name}", format, lambda: contextlib.nullcontext(path), progress)
    for other, files in _models_in(made.parent).items():
        if other.startswith(f"{stem}.{where}.") and other != name:
            for file in files.values():
                with contextlib.suppress(OSError):
                    file.unlink()
    keep_vocabularies(path.parent)
    return made


def _content_id(path: Path) -> str:
    """Changes with the size, the time or 64 evenly spaced samples of a file."""
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        digest = hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=8)
        last = max(status.st_size - _SAMPLE_BYTES, 0)
        for i in range(_SAMPLES):
            file.seek(last * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _format_of(path: Path) -> str:
    """The format of a model file."""
    header, _ = read_index(path)
    return format_name_of(load_rwkv_shared_library(), str(header.data_type))


def _is_file(path: Path) -> bool:
    """Whether something is there that may be opened: also a pipe, to be refused by its name."""
    return os.path.exists(path) and not os.path.isdir(path)


def at_hand(folder: Path) -> str:
    """What there is in the cache and in a folder, in a line."""
    names = [f"{name} ({', '.join(files)})" for name, files in cached_models().items()]
    with contextlib.suppress(OSError):
        names += [f"'{path}'" for path in sorted(folder.iterdir()) if _looks_like_model(path)]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"at hand: {', '.join(names[:_MAX_LISTED])}{more}" if names else "none is at hand"


def _looks_like_model(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        return False
    try:
        return is_model_file(path) or is_checkpoint(path)
    except (OSError, RWKVFileError):
        return False
