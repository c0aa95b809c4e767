"""The C library: find it, load it, call it. The only module that knows ctypes.

`RWKVSharedLibrary` has one method per function of rwkv.h, with the C name. Buffers are passed as
addresses; whoever passes one vouches for its size. `RWKVModel` is the safe way in.

Every failure is raised as an exception that carries the C library's text:

    RWKVFileError   a file cannot be read or written, or is not a model
    ValueError      an argument is wrong
    MemoryError     memory ran out
    RuntimeError    the context is busy or closed
"""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_bool, c_char_p, c_double, c_float, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import RWKVFileError, RWKVLibraryNotFound

T = TypeVar("T")
FilePath = str | bytes | os.PathLike[Any]
Progress = Callable[[int, int], object]
"""Called as (bytes done, bytes in all), possibly from another thread; an exception cancels."""

API_VERSION = 1002  # of the rwkv.h that this module mirrors: major * 1000 + minor
FILE_NAME = {"win32": "rwkv.dll", "cygwin": "rwkv.dll", "darwin": "librwkv.dylib"}.get(
    sys.platform, "librwkv.so"
)
MAX_THREADS = 1024

# ---- rwkv.h, mirrored ----------------------------------------------------------------------------

_PROGRESS = ctypes.CFUNCTYPE(c_bool, c_void_p, c_uint64, c_uint64)


class _Sized(ctypes.Structure):
    """A struct that starts with its own size; what is not given is zero."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(size=ctypes.sizeof(self), **fields)


class _LoadOptions(_Sized):
    _fields_ = [
        ("size", c_uint32),
        ("n_threads", c_uint32),
        ("mmap", c_bool),
        ("prefault", c_bool),
        ("sparse_ffn", c_bool),
        ("head", c_char_p),
        ("activations", c_char_p),
        ("progress", _PROGRESS),
        ("progress_user", c_void_p),
    ]


class _ContextOptions(_Sized):
    _fields_ = [("size", c_uint32), ("n_threads", c_uint32), ("activations", c_char_p)]


class _Memory(_Sized):
    _fields_ = [
        ("size", c_uint32),
        ("file", c_uint64),
        ("mapped", c_uint64),
        ("weights", c_uint64),
        ("scratch", c_uint64),
        ("state", c_uint64),
        ("token", c_uint64),
    ]


class _Limits(_Sized):
    _fields_ = [
        ("size", c_uint32),
        ("n_threads", c_uint32),
        ("read", c_double),
        ("fp32", c_double),
        ("int8", c_double),
    ]


class _QuantizeOptions(_Sized):
    _fields_ = [
        ("size", c_uint32),
        ("format_name", c_char_p),
        ("file_version", c_uint32),
        ("allow_nan", c_bool),
        ("head", c_char_p),
        ("types", c_char_p),
        ("method", c_char_p),
        ("importances", c_char_p),
        ("progress", _PROGRESS),
        ("progress_user", c_void_p),
    ]


class SequenceStruct(ctypes.Structure):
    """struct rwkv_sequence; pointers are addresses, None where nothing is wanted."""

    _fields_ = [
        ("tokens", c_void_p),
        ("n_tokens", c_size_t),
        ("state_in", c_void_p),
        ("state_out", c_void_p),
        ("logits_out", c_void_p),
        ("n_logits", c_size_t),
        ("hidden_out", c_void_p),
        ("adapter", c_void_p),
    ]


class AdapterPartStruct(ctypes.Structure):
    """struct rwkv_adapter_part; name is bytes, pointers are addresses or None."""

    _fields_ = [
        ("name", c_char_p),
        ("rows", c_size_t),
        ("cols", c_size_t),
        ("rank", c_size_t),
        ("a", c_void_p),
        ("b", c_void_p),
        ("scale", c_float),
        ("values", c_void_p),
    ]


_PROTOTYPES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "rwkv_get_last_error_message": (c_char_p,),
    "rwkv_set_print_errors": (None, c_void_p, c_bool),
    "rwkv_get_print_errors": (c_bool, c_void_p),
    "rwkv_get_last_error": (ctypes.c_int, c_void_p),
    "rwkv_load": (c_void_p, c_char_p, ctypes.POINTER(_LoadOptions)),
    "rwkv_init_from_file": (c_void_p, c_char_p, c_uint32),
    "rwkv_clone_context": (c_void_p, c_void_p, c_uint32),
    "rwkv_clone_context_with": (c_void_p, c_void_p, ctypes.POINTER(_ContextOptions)),
    "rwkv_free": (None, c_void_p),
    "rwkv_estimate": (c_bool, c_char_p, ctypes.POINTER(_LoadOptions), ctypes.POINTER(_Memory)),
    "rwkv_estimate_shape": (
        c_bool,
        c_size_t,
        c_size_t,
        c_size_t,
        c_char_p,
        ctypes.POINTER(_LoadOptions),
        ctypes.POINTER(_Memory),
    ),
    "rwkv_create_adapter": (
        c_void_p,
        c_void_p,
        ctypes.POINTER(AdapterPartStruct),
        c_size_t,
        c_size_t,
    ),
    "rwkv_free_adapter": (None, c_void_p),
    "rwkv_get_n_vocab": (c_size_t, c_void_p),
    "rwkv_get_n_embed": (c_size_t, c_void_p),
    "rwkv_get_n_layer": (c_size_t, c_void_p),
    "rwkv_get_state_len": (c_size_t, c_void_p),
    "rwkv_get_logits_len": (c_size_t, c_void_p),
    "rwkv_get_state_buffer_element_count": (c_uint32, c_void_p),
    "rwkv_get_logits_buffer_element_count": (c_uint32, c_void_p),
    "rwkv_init_state": (None, c_void_p, c_void_p),
    "rwkv_eval": (c_bool, c_void_p, c_uint32, c_void_p, c_void_p, c_void_p),
    "rwkv_eval_sequence": (
        c_bool,
        c_void_p,
        c_void_p,
        c_size_t,
        c_void_p,
        c_void_p,
        c_void_p,
    ),
    "rwkv_eval_sequence_in_chunks": (
        c_bool,
        c_void_p,
        c_void_p,
        c_size_t,
        c_size_t,
        c_void_p,
        c_void_p,
        c_void_p,
    ),
    "rwkv_eval_batch": (c_bool, c_void_p, ctypes.POINTER(SequenceStruct), c_size_t, c_size_t),
    "rwkv_get_matrix": (c_char_p, c_void_p, c_size_t, ctypes.POINTER(c_size_t)),
    "rwkv_eval_importances": (
        c_bool,
        c_void_p,
        ctypes.POINTER(SequenceStruct),
        c_size_t,
        c_size_t,
        c_void_p,
    ),
    "rwkv_interrupt": (None, c_void_p),
    "rwkv_quantize_file": (c_bool, c_char_p, c_char_p, ctypes.POINTER(_QuantizeOptions)),
    "rwkv_quantize_model_file": (c_bool, c_char_p, c_char_p, c_void_p),
    "rwkv_get_format_name": (c_char_p, c_uint32),
    "rwkv_get_row_size": (c_size_t, c_uint32, c_uint32, c_size_t),
    "rwkv_convert_row": (
        c_bool,
        c_uint32,
        c_uint32,
        c_void_p,
        c_uint32,
        c_uint32,
        c_void_p,
        c_size_t,
    ),
    "rwkv_get_api_version": (c_uint32,),
    "rwkv_get_system_info_string": (c_char_p,),
    "rwkv_measure": (c_bool, c_uint32, c_uint64, ctypes.POINTER(_Limits)),
}

# enum rwkv_error_flags: a category, or-ed with a detail.
_DETAIL = 0xFF
_ALLOC = 1
_CATEGORIES: dict[int, type[Exception]] = {
    1 << 8: ValueError,  # ARGS
    2 << 8: RWKVFileError,  # FILE
    3 << 8: RWKVFileError,  # MODEL
    4 << 8: RWKVFileError,  # MODEL_PARAMS
}

# ---- Arguments -----------------------------------------------------------------------------------


def as_integer(value: object, name: str, low: int, high: int) -> int:
    """`value` as an int. Raises TypeError for bools and what is no integer, ValueError outside
    low..high."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not a bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {number}")
    return number


def _path(path: FilePath) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError(f"path {path!r} holds a NUL character")
    return encoded


def _n_threads(thread_count: int | None) -> int:
    """What C is told: 0 lets the library choose."""
    return 0 if thread_count is None else as_integer(thread_count, "thread_count", 1, MAX_THREADS)


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _token_array(tokens: Sequence[int]) -> array[int]:
    return tokens if isinstance(tokens, array) and tokens.typecode == "I" else array("I", tokens)


# ---- Interrupting --------------------------------------------------------------------------------

# Evaluations of fewer tokens are called directly: they end soon, and starting a thread takes time.
_LONG = 16


def _interruptible(call: Callable[[], T], interrupt: Callable[[], object]) -> T:
    """Return `call()`, a long call of the C library, so that Ctrl-C ends it.

    Python runs signal handlers in the main thread and only between its own instructions, so there
    the call goes to another thread. If a handler raises something, `interrupt()` ends the call.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    results: list[T] = []
    errors: list[BaseException] = []
    first = threading.Lock()  # taken by the call when it begins, or by an exception before that
    ended = threading.Event()

    def work() -> None:
        if first.acquire(blocking=False):
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)
            finally:
                ended.set()

    try:
        threading.Thread(target=work, name="rwkv call").start()
        while not ended.wait(0.1):  # with a limit, because Windows can't be interrupted without one
            pass
    except BaseException:
        if not first.acquire(blocking=False):
            while not ended.is_set():  # the call still uses its buffers, whatever else is raised
                try:
                    interrupt()
                    ended.wait(0.1)
                except BaseException:
                    continue
        raise
    if errors:
        raise errors[0]
    return results[0]


class _Monitor:
    """The progress callback of one C call. Keeps what `progress` raises, and cancels the call."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._cancelled = False
        self._error: BaseException | None = None
        self.callback = _PROGRESS(self._call)

    def cancel(self) -> None:
        self._cancelled = True

    def _call(self, user: object, done: int, total: int) -> bool:
        try:
            if self._progress is not None and not self._cancelled:
                self._progress(done, total)
        except BaseException as error:  # an exception must not enter C
            self._error = error
            self._cancelled = True
        return not self._cancelled

    def run(self, call: Callable[[], T]) -> T:
        def checked() -> T:
            try:
                return call()
            finally:
                if self._error is not None:
                    raise self._error from None

        return _interruptible(checked, self.cancel)


# ---- The library ---------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What a model takes, in bytes: see struct rwkv_memory in rwkv.h."""

    file: int
    mapped: int
    weights: int
    scratch: int
    state: int
    token: int

    @property
    def total(self) -> int:
        """Memory while one context evaluates at full speed, mapped pages included."""
        return self.mapped + self.weights + self.scratch + self.state


class Limits(NamedTuple):
    """What n_threads threads can reach at most, per second: see struct rwkv_limits in rwkv.h."""

    n_threads: int
    read: float
    fp32: float
    int8: float


class RWKVContext:
    """A context of the C library, freed with this object at the latest."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self._address = address
        self._free = weakref.finalize(self, library.rwkv_free, address)
        # At exit a daemon thread may still be evaluating; the system frees everything anyway.
        self._free.atexit = False

    @property
    def closed(self) -> bool:
        return not self._free.alive

    @property
    def ptr(self) -> int:
        """The address for C. Raises RuntimeError after `free`."""
        if self.closed:
            raise RuntimeError("model is closed")
        return self._address

    def free(self) -> None:
        self._free()


class RWKVAdapterPointer:
    """An adapter of the C library, freed with this object: whoever evaluates with it holds it."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self.ptr = address
        weakref.finalize(self, library.rwkv_free_adapter, address).atexit = False


class RWKVSharedLibrary:
    """The functions of rwkv.h in the library file at `shared_library_path`.

    Raises RWKVLibraryNotFound if that file cannot be loaded or has another API version.
    """

    def __init__(self, shared_library_path: FilePath) -> None:
        self.path = Path(os.fsdecode(shared_library_path))
        try:
            # winmode=0: Windows looks for what the library needs along the usual paths.
            self._c = ctypes.CDLL(str(self.path), winmode=0)
        except OSError as error:
            raise RWKVLibraryNotFound(f"{self.path}: cannot be loaded: {error}") from error
        self._declare("rwkv_get_api_version")
        version = self._c.rwkv_get_api_version()
        if version // 1000 != API_VERSION // 1000 or version < API_VERSION:
            raise RWKVLibraryNotFound(
                f"{self.path}: has API version {_dotted(version)}, expected {_dotted(API_VERSION)}"
                f" or a later {API_VERSION // 1000}.x: build it again"
            )
        for name in _PROTOTYPES:
            self._declare(name)
        self._c.rwkv_set_print_errors(None, False)

    def _declare(self, name: str) -> None:
        try:
            function = getattr(self._c, name)
        except AttributeError:
            raise RWKVLibraryNotFound(
                f"{self.path}: has no function {name}: not this project's library, or an old one"
            ) from None
        function.restype, *function.argtypes = _PROTOTYPES[name]

    def _check(self, succeeded: object, ctx: int | None = None) -> None:
        """Raise what the C library's last error of this thread says, unless `succeeded`."""
        if succeeded:
            return
        flags = self._c.rwkv_get_last_error(ctx)
        text = self._c.rwkv_get_last_error_message().decode(errors="replace")
        if flags & _DETAIL == _ALLOC:
            raise MemoryError(text)
        raise _CATEGORIES.get(flags & ~_DETAIL, RuntimeError)(text)

    def _context(self, address: int | None, parent: int | None = None) -> RWKVContext:
        self._check(address, parent)
        return RWKVContext(self._c, address)  # type: ignore[arg-type]

    # Loading

    def rwkv_load(
        self,
        path: FilePath,
        thread_count: int | None = None,
        *,
        mmap: bool = True,
        prefault: bool = False,
        sparse_ffn: bool = False,
        head: str | None = None,
        activations: str | None = None,
        progress: Progress | None = None,
    ) -> RWKVContext:
        """Load a model and make a context. `thread_count` None: all physical cores allowed."""
        monitor = _Monitor(progress)
        encoded = _path(path)
        options = _LoadOptions(
            n_threads=_n_threads(thread_count),
            mmap=mmap,
            prefault=prefault,
            sparse_ffn=sparse_ffn,
            head=_text(head),
            activations=_text(activations),
            progress=monitor.callback,
        )
        return monitor.run(lambda: self._context(self._c.rwkv_load(encoded, ctypes.byref(options))))

    def rwkv_init_from_file(
        self, model_file_path: FilePath, thread_count: int | None = None
    ) -> RWKVContext:
        encoded, n_threads = _path(model_file_path), _n_threads(thread_count)
        return self._context(self._c.rwkv_init_from_file(encoded, n_threads))

    def rwkv_clone_context(
        self, ctx: RWKVContext, thread_count: int | None = None, *, activations: str | None = None
    ) -> RWKVContext:
        """Make another context that shares the weights of `ctx`."""
        options = _ContextOptions(
            n_threads=_n_threads(thread_count), activations=_text(activations)
        )
        address = self._c.rwkv_clone_context_with(ctx.ptr, ctypes.byref(options))
        return self._context(address, ctx.ptr)

    def rwkv_free(self, ctx: RWKVContext) -> None:
        """Free `ctx`; freeing it again does nothing."""
        ctx.free()

    def rwkv_estimate(
        self,
        path: FilePath,
        *,
        mmap: bool = True,
        sparse_ffn: bool = False,
        head: str | None = None,
        activations: str | None = None,
    ) -> Memory:
        """What loading the model at `path` takes, from its table of tensors."""
        memory = _Memory()
        options = _LoadOptions(
            mmap=mmap, sparse_ffn=sparse_ffn, head=_text(head), activations=_text(activations)
        )
        encoded = _path(path)
        self._check(self._c.rwkv_estimate(encoded, ctypes.byref(options), ctypes.byref(memory)))
        return Memory(*(getattr(memory, name) for name in Memory._fields))

    def rwkv_estimate_shape(
        self,
        n_vocab: int,
        n_embed: int,
        n_layer: int,
        format_name: str,
        *,
        mmap: bool = True,
        sparse_ffn: bool = False,
        head: str | None = None,
        activations: str | None = None,
    ) -> Memory:
        """The same for a model of these sizes that is not there."""
        memory = _Memory()
        options = _LoadOptions(
            mmap=mmap, sparse_ffn=sparse_ffn, head=_text(head), activations=_text(activations)
        )
        self._check(
            self._c.rwkv_estimate_shape(
                n_vocab,
                n_embed,
                n_layer,
                format_name.encode(),
                ctypes.byref(options),
                ctypes.byref(memory),
            )
        )
        return Memory(*(getattr(memory, name) for name in Memory._fields))

    # Adapters

    def rwkv_create_adapter(
        self, ctx: RWKVContext, parts: Sequence[AdapterPartStruct]
    ) -> RWKVAdapterPointer:
        """Make an adapter for the model of `ctx`; it is freed with what this returns."""
        address = self._c.rwkv_create_adapter(
            ctx.ptr,
            (AdapterPartStruct * len(parts))(*parts),
            len(parts),
            ctypes.sizeof(AdapterPartStruct),
        )
        self._check(address, ctx.ptr)
        return RWKVAdapterPointer(self._c, address)

    # Sizes

    def rwkv_get_n_vocab(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_n_vocab(ctx.ptr)

    def rwkv_get_n_embed(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_n_embed(ctx.ptr)

    def rwkv_get_n_layer(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_n_layer(ctx.ptr)

    def rwkv_get_state_len(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_state_len(ctx.ptr)

    def rwkv_get_logits_len(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_logits_len(ctx.ptr)

    def rwkv_get_state_buffer_element_count(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_state_buffer_element_count(ctx.ptr)

    def rwkv_get_logits_buffer_element_count(self, ctx: RWKVContext) -> int:
        return self._c.rwkv_get_logits_buffer_element_count(ctx.ptr)

    # Evaluation

    def rwkv_init_state(self, ctx: RWKVContext, state_address: int) -> None:
        self._c.rwkv_init_state(ctx.ptr, state_address)

    def _evaluate(self, ctx: RWKVContext, n_tokens: int, function: Any, *arguments: Any) -> None:
        def call() -> None:
            self._check(function(ctx.ptr, *arguments), ctx.ptr)

        if n_tokens < _LONG:
            call()
        else:
            _interruptible(call, lambda: self._c.rwkv_interrupt(ctx.ptr))

    def rwkv_eval(
        self,
        ctx: RWKVContext,
        token: int,
        state_in_address: int | None,
        state_out_address: int | None,
        logits_out_address: int | None,
    ) -> None:
        token = as_integer(token, "token", 0, 2**32 - 1)  # ctypes would cut higher bits off
        self._evaluate(
            ctx,
            1,
            self._c.rwkv_eval,
            token,
            state_in_address,
            state_out_address,
            logits_out_address,
        )

    def rwkv_eval_sequence(
        self,
        ctx: RWKVContext,
        tokens: Sequence[int],
        state_in_address: int | None,
        state_out_address: int | None,
        logits_out_address: int | None,
    ) -> None:
        values = _token_array(tokens)
        self._evaluate(
            ctx,
            len(values),
            self._c.rwkv_eval_sequence,
            values.buffer_info()[0],
            len(values),
            state_in_address,
            state_out_address,
            logits_out_address,
        )

    def rwkv_eval_sequence_in_chunks(
        self,
        ctx: RWKVContext,
        tokens: Sequence[int],
        chunk_size: int,
        state_in_address: int | None,
        state_out_address: int | None,
        logits_out_address: int | None,
    ) -> None:
        values = _token_array(tokens)
        self._evaluate(
            ctx,
            len(values),
            self._c.rwkv_eval_sequence_in_chunks,
            values.buffer_info()[0],
            len(values),
            as_integer(chunk_size, "chunk_size", 1, 2**32 - 1),
            state_in_address,
            state_out_address,
            logits_out_address,
        )

    def rwkv_eval_batch(self, ctx: RWKVContext, sequences: Sequence[SequenceStruct]) -> None:
        batch = (SequenceStruct * len(sequences))(*sequences)
        self._evaluate(
            ctx,
            sum(sequence.n_tokens for sequence in sequences),
            self._c.rwkv_eval_batch,
            batch,
            len(sequences),
            ctypes.sizeof(SequenceStruct),
        )

    def rwkv_get_matrices(self, ctx: RWKVContext) -> dict[str, int]:
        """The columns of each matrix that can be quantized, in the library's order."""
        matrices: dict[str, int] = {}
        cols = c_size_t()
        while name := self._c.rwkv_get_matrix(ctx.ptr, len(matrices), ctypes.byref(cols)):
            matrices[name.decode()] = cols.value
        return matrices

    def rwkv_eval_importances(
        self, ctx: RWKVContext, sequences: Sequence[SequenceStruct], squares_address: int
    ) -> None:
        """squares: one float64 for each column of `rwkv_get_matrices`."""
        batch = (SequenceStruct * len(sequences))(*sequences)
        self._evaluate(
            ctx,
            sum(sequence.n_tokens for sequence in sequences),
            self._c.rwkv_eval_importances,
            batch,
            len(sequences),
            ctypes.sizeof(SequenceStruct),
            squares_address,
        )

    def rwkv_interrupt(self, ctx: RWKVContext) -> None:
        """From any thread: make the evaluation that `ctx` is running fail soon."""
        self._c.rwkv_interrupt(ctx.ptr)

    # Files

    def rwkv_quantize_file(
        self,
        path_in: FilePath,
        path_out: FilePath,
        format_name: str,
        *,
        file_version: int = 0,
        allow_nan: bool = False,
        head: str | None = None,
        types: str | None = None,
        method: str | None = None,
        importances: FilePath | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write a quantized copy; see rwkv_quantize_options in rwkv.h for the options."""
        monitor = _Monitor(progress)
        source, target = _path(path_in), _path(path_out)
        options = _QuantizeOptions(
            format_name=format_name.encode(),
            file_version=as_integer(file_version, "file_version", 0, 2**32 - 1),
            allow_nan=allow_nan,
            head=_text(head),
            types=_text(types),
            method=_text(method),
            importances=None if importances is None else _path(importances),
            progress=monitor.callback,
        )
        monitor.run(
            lambda: self._check(self._c.rwkv_quantize_file(source, target, ctypes.byref(options)))
        )

    def rwkv_quantize_model_file(
        self,
        model_file_path_in: FilePath,
        model_file_path_out: FilePath,
        format_name: str | int,
    ) -> None:
        """The same with default options; `format_name` may be a number of 2..9 as of April 2023."""
        source, target = _path(model_file_path_in), _path(model_file_path_out)
        if isinstance(format_name, str):
            text = ctypes.create_string_buffer(format_name.encode())
            which = ctypes.cast(text, c_void_p)
        else:
            which = c_void_p(as_integer(format_name, "format_name", 2, 9))
        self._check(self._c.rwkv_quantize_model_file(source, target, which))

    def rwkv_get_format_name(self, data_type: int) -> str | None:
        name = self._c.rwkv_get_format_name(as_integer(data_type, "data_type", 0, 2**32 - 1))
        return None if name is None else name.decode()

    def rwkv_get_row_size(self, file_version: int, data_type: int, n: int) -> int:
        """Bytes of a row of `n` weights, or 0 if files of that version have no such row."""
        return self._c.rwkv_get_row_size(
            as_integer(file_version, "file_version", 0, 2**32 - 1),
            as_integer(data_type, "data_type", 0, 2**32 - 1),
            as_integer(n, "n", 0, sys.maxsize),
        )

    def rwkv_convert_row(
        self,
        version_in: int,
        type_in: int,
        in_address: int,
        version_out: int,
        type_out: int,
        out_address: int,
        n: int,
    ) -> None:
        """Write a row of `n` weights of one format in another one; see rwkv.h."""
        numbers = (version_in, type_in, version_out, type_out)
        version_in, type_in, version_out, type_out = (
            as_integer(number, "a version or type", 0, 2**32 - 1) for number in numbers
        )
        n = as_integer(n, "n", 0, sys.maxsize)
        self._check(
            self._c.rwkv_convert_row(
                version_in, type_in, in_address, version_out, type_out, out_address, n
            )
        )

    # This library

    def rwkv_get_api_version(self) -> int:
        return self._c.rwkv_get_api_version()

    def rwkv_get_system_info_string(self) -> str:
        return self._c.rwkv_get_system_info_string().decode()

    def rwkv_measure(self, thread_count: int | None, n_bytes: int) -> Limits:
        """Measure how fast the CPU reads a buffer of `n_bytes` and multiplies."""
        limits = _Limits()
        n_threads = _n_threads(thread_count)
        n_bytes = as_integer(n_bytes, "n_bytes", 0, 2**64 - 1)
        self._check(self._c.rwkv_measure(n_threads, n_bytes, ctypes.byref(limits)))
        return Limits(*(getattr(limits, name) for name in Limits._fields))


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000}"


# ---- Finding it ----------------------------------------------------------------------------------


def _candidates() -> Iterator[Path]:
    """Where the library may lie, in order. Never the working directory."""
    for folder in sys.modules[__package__].__path__:  # an editable install has several
        yield Path(folder) / FILE_NAME
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "rwkv.h").is_file():
        for folder in (".", "build", "bin/Release"):
            yield checkout / folder / FILE_NAME
    yield from _installed()


def _installed() -> Iterator[Path]:
    """The library of an installed distribution, for a checkout that has not built its own."""
    from importlib import metadata  # slow to import, seldom needed

    try:
        files: Iterable[metadata.PackagePath] = metadata.files("rwkv-ggml") or ()
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == FILE_NAME:
            yield Path(os.fspath(file.locate()))


def load_rwkv_shared_library(path: FilePath | None = None) -> RWKVSharedLibrary:
    """Return the library at `path`, or find it.

    It is looked for: in the environment variable RWKV_LIBRARY_PATH, and only there if that is set;
    inside this package; in the checkout that this file lies in (its root, build/, bin/Release/); in
    an installed rwkv-ggml. Raises RWKVLibraryNotFound with every path that was tried.
    """
    chosen = path or os.environ.get("RWKV_LIBRARY_PATH")
    return _load(os.fsdecode(chosen) if chosen else None)


@functools.cache
def _load(path: str | None) -> RWKVSharedLibrary:
    if path is not None:
        # An absolute path, because a bare name would be looked for along the system's paths.
        return RWKVSharedLibrary(Path(path).absolute())
    tried = []
    for candidate in dict.fromkeys(_candidates()):
        if not candidate.is_file():
            tried.append(f"{candidate}: no such file")
            continue
        try:
            return RWKVSharedLibrary(candidate)
        except RWKVLibraryNotFound as error:
            tried.append(str(error))
    raise RWKVLibraryNotFound(
        "\n  ".join([f"the C library {FILE_NAME} was not found; tried", *tried])
        + "\nin the checkout, either of these builds it:"
        + "\n  pip install ."
        + "\n  cmake -DBUILD_SHARED_LIBS=ON . && cmake --build . --config Release"
        + "\nor set RWKV_LIBRARY_PATH to the file"
    )
