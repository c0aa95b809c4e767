"""RWKVModel: tokens and a state in, logits and the new state out.

Everything that goes to C is checked here: types, shapes, strides and ranges. Arrays are numpy's;
torch CPU tensors are taken and given back where a caller uses them, without importing torch.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RWKVFileError
from .ggmf import read_index
from .library import (
    AdapterPartStruct,
    FilePath,
    Progress,
    RWKVAdapterPointer,
    RWKVContext,
    RWKVSharedLibrary,
    SequenceStruct,
    as_integer,
    load_rwkv_shared_library,
)
from .lora import Part, content_id, read_parts

Array = Any
"""A numpy array, or a torch tensor on the CPU, of native float32."""

Tokens = Iterable[int]

EMBEDDED_MODEL = Path(__file__).with_name("models") / "shakespeare.bin"


def embedded_model() -> Path:
    """Return the path of the small model inside this package. Raises RWKVFileError."""
    if not EMBEDDED_MODEL.is_file():
        raise RWKVFileError(f"no model named, and the embedded model {EMBEDDED_MODEL} is missing")
    return EMBEDDED_MODEL


@dataclass(eq=False)
class RWKVSequence:
    """One of the independent sequences of `RWKVModel.eval_batch`.

    tokens: at least one. state_in: (n_state), None for the state before the first token.
    n_logits: of how many of the last tokens logits are wanted. state_out (n_state) and logits_out
    (n_logits, n_vocab): written to if given, otherwise new arrays are made.
    want_hidden: also return what the head sees of the last token.
    adapter: of this model; None: the model as it is.
    """

    tokens: Tokens
    state_in: Array | None = None
    state_out: Array | None = None
    logits_out: Array | None = None
    n_logits: int = 1
    want_hidden: bool = False
    adapter: RWKVAdapter | None = None


@dataclass(frozen=True, eq=False)
class RWKVResult:
    """state: (n_state). logits: (n_logits, n_vocab), None for n_logits 0. hidden: (n_embed)."""

    state: Array
    logits: Array | None
    hidden: Array | None


class Importances:
    """How much each column of a model's matrices matters: see `RWKVModel.importances`.

    squares: {name of a matrix: (cols) float64} for each matrix that can be quantized, the head
    included: the squares of what its columns were multiplied with, summed over n_tokens tokens.
    """

    def __init__(self, cols: dict[str, int]) -> None:
        self.cols = cols
        self.flat = np.zeros(sum(cols.values()))  # what C adds to
        ends = np.cumsum(list(cols.values()))
        self.squares = dict(zip(cols, np.split(self.flat, ends[:-1]), strict=True))
        self.n_tokens = 0

    def means(self) -> dict[str, np.ndarray]:
        """The mean squares, which quantizing takes. Raises ValueError before the first token."""
        if self.n_tokens == 0:
            raise ValueError("no token has been evaluated with these importances")
        return {name: squares / self.n_tokens for name, squares in self.squares.items()}


class RWKVAdapter:
    """LoRAs beside a model's weights, in memory. `RWKVModel.adapter` makes it for that model and
    its clones; any number of them may be there, and each sequence chooses its own.

    loras: the files, each with its alpha. id: 32 hexadecimal digits, the same for the same numbers.

    After `free`, or the end of a `with` block, evaluating with it raises
    RuntimeError("adapter is closed").
    """

    def __init__(
        self, pointer: RWKVAdapterPointer, loras: tuple[tuple[Path, float], ...], content: str
    ) -> None:
        self._pointer: RWKVAdapterPointer | None = pointer
        self.loras = loras
        self.id = content

    @property
    def pointer(self) -> RWKVAdapterPointer:
        """For C; whoever evaluates holds it meanwhile. Raises RuntimeError after `free`."""
        if self._pointer is None:
            raise RuntimeError("adapter is closed")
        return self._pointer

    def free(self) -> None:
        """Free it, once running evaluations with it have ended. Freeing again does nothing."""
        self._pointer = None

    def __enter__(self) -> RWKVAdapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    def __reduce__(self) -> Any:
        raise TypeError("an RWKVAdapter cannot be copied or pickled: make it again")

    def __repr__(self) -> str:
        loras = ", ".join(f"{path.name} alpha {alpha:g}" for path, alpha in self.loras)
        return f"<RWKVAdapter {self.id[:8]}: {loras}>"


class RWKVModel:
    """A model file, loaded.

    shared_library: from `load_rwkv_shared_library`; None finds it.
    thread_count: 1..1024; None: all physical cores that this process may use.
    mmap: FP32 and FP16 matrices stay in the mapped file, which must not be overwritten meanwhile.
    prefault: read mapped pages now rather than with the first token.
    sparse_ffn: leave out the weights of ffn.value that meet zeros, in FP32, FP16 and Q8_0: the same
    bits sooner, for a second copy of these matrices in memory.
    head: the format that an FP16 or FP32 head is quantized to, such as "Q8_0"; None: as it is.
    activations: what quantized matrices are multiplied with: "A16" (None), 15 bits, or "int8", 8
    bits, which is faster in prompts and less exact; "bf16": FP32 and FP16 matrices are multiplied
    as bfloat16, for the same reason, from a copy in private memory (without sparse_ffn).
    progress: called as (bytes done, bytes in all), possibly from another thread; an exception that
    it raises cancels the loading and comes out here.

    Evaluation is a pure function (tokens, state) -> (logits, new state) and gives the same bits
    for any number of threads and however tokens are grouped into calls. A failed one leaves
    all arrays as they were. It releases the GIL; Ctrl-C ends a long one.

    One model evaluates one thing at a time: a second thread gets RuntimeError("model is busy …"),
    and should use a `clone`. After `free`, or the end of a `with` block, everything raises
    RuntimeError("model is closed").
    """

    def __init__(
        self,
        shared_library: RWKVSharedLibrary | None,
        model_path: FilePath,
        thread_count: int | None = None,
        *,
        mmap: bool = True,
        prefault: bool = False,
        sparse_ffn: bool = False,
        head: str | None = None,
        activations: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        library = shared_library or load_rwkv_shared_library()
        context = library.rwkv_load(
            os.fspath(model_path),
            thread_count,
            mmap=mmap,
            prefault=prefault,
            sparse_ffn=sparse_ffn,
            head=head,
            activations=activations,
            progress=progress,
        )
        self._path = Path(os.fsdecode(model_path)).absolute()
        self._own(library, context)

    def _own(self, library: RWKVSharedLibrary, context: RWKVContext) -> None:
        self._library = library
        self._context = context
        self._n_vocab = library.rwkv_get_n_vocab(context)
        self._n_embed = library.rwkv_get_n_embed(context)
        self._n_layer = library.rwkv_get_n_layer(context)
        self._n_state = library.rwkv_get_state_len(context)
        self._lock = threading.Lock()  # held by whoever uses the context
        self._user: int | None = None  # the thread that holds it

    def clone(self, thread_count: int | None = None) -> RWKVModel:
        """Return another model on the same weights, which can evaluate at the same time.

        Waits for a running evaluation. Each of the two is freed on its own.
        """
        model = object.__new__(type(self))
        model._path = self._path
        with self._using(wait=True) as context:
            model._own(self._library, self._library.rwkv_clone_context(context, thread_count))
        return model

    def free(self) -> None:
        """Free the context, once a running evaluation has ended. Freeing again does nothing."""
        if not self._context.closed:
            with self._using(wait=True) as context:
                self._library.rwkv_free(context)

    def __enter__(self) -> RWKVModel:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    def __reduce__(self) -> Any:
        raise TypeError("an RWKVModel cannot be copied or pickled: use clone(), or load it again")

    # ---- Adapters --------------------------------------------------------------------------------

    def adapter(
        self,
        loras: Iterable[tuple[FilePath, float]],
        *,
        key: str | None = None,
        ignore_unused: bool = False,
    ) -> RWKVAdapter:
        """Read LoRAs, each with its alpha, as what `eval` and sequences take as `adapter`.

        The weights stay as they are, in any format: W·x + alpha / rank · B·(A·x) is computed, and
        vectors that a LoRA replaces are taken from it. What several LoRAs add to a matrix adds up;
        of a vector the last one counts.
        key: which dictionary of the files, see `open_checkpoint`. ignore_unused: go on where a LoRA
        has tensors that the model does not have.

        Raises RWKVFileError for LoRAs that do not fit the model or are damaged, ValueError for
        other wrong numbers, OSError for files that cannot be opened.
        """
        files = tuple((Path(os.fsdecode(path)), float(alpha)) for path, alpha in loras)
        shapes = {record.key: record.shape for record in read_index(self._path)[1]}
        parts = read_parts(files, shapes, key=key, ignore_unused=ignore_unused)
        structs = [_adapter_part(part) for part in parts]
        with self._using(wait=True) as context:
            pointer = self._library.rwkv_create_adapter(context, structs)
        return RWKVAdapter(pointer, files, content_id(parts))

    # ---- Sizes -----------------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        """Number of tokens, and of logits."""
        self._open()
        return self._n_vocab

    @property
    def n_embed(self) -> int:
        self._open()
        return self._n_embed

    @property
    def n_layer(self) -> int:
        self._open()
        return self._n_layer

    @property
    def n_state(self) -> int:
        """Floats in a state."""
        self._open()
        return self._n_state

    # ---- Evaluation ------------------------------------------------------------------------------

    def init_state(self) -> np.ndarray:
        """Return the state before the first token, (n_state) float32."""
        state = np.empty(self.n_state, np.float32)
        with self._using(wait=True) as context:
            self._library.rwkv_init_state(context, state.ctypes.data)
        return state

    def eval(
        self,
        token: int,
        state_in: Array | None,
        state_out: Array | None = None,
        logits_out: Array | None = None,
        use_numpy: bool = True,
        *,
        adapter: RWKVAdapter | None = None,
    ) -> tuple[Array, Array]:
        """Evaluate one token of 0..n_vocab-1; return (logits, state).

        state_in: (n_state) float32, not changed; None for the state before the first token.
        state_out, logits_out: (n_state) and (n_vocab) float32, contiguous and writable: filled and
        returned. state_out may be state_in itself. New arrays are made for those not given:
        tensors if any argument is a tensor, or if use_numpy is False. adapter: of this model.

        Raises ValueError for an array of another shape or type, TypeError for what is no array.
        """
        with self._using() as context:
            arrays = self._arrays((self._n_vocab,), state_in, state_out, logits_out, use_numpy)
            token = as_integer(token, "token", 0, self._n_vocab - 1)
            if adapter is None:
                self._library.rwkv_eval(context, token, *arrays.addresses())
            else:
                self._eval_adapted(context, array("I", [token]), arrays, adapter)
            return arrays.results()

    def eval_sequence(
        self,
        tokens: Tokens,
        state_in: Array | None,
        state_out: Array | None = None,
        logits_out: Array | None = None,
        use_numpy: bool = True,
        *,
        adapter: RWKVAdapter | None = None,
    ) -> tuple[Array, Array]:
        """Evaluate tokens, one or more, in one pass; return (logits of the last, state).

        The same as `eval` for one after the other, to the bit, and faster. Arrays and adapter as
        for `eval`.
        """
        values = self._tokens(tokens)
        with self._using() as context:
            arrays = self._arrays((self._n_vocab,), state_in, state_out, logits_out, use_numpy)
            if adapter is None:
                self._library.rwkv_eval_sequence(context, values, *arrays.addresses())
            else:
                self._eval_adapted(context, values, arrays, adapter)
            return arrays.results()

    def eval_sequence_in_chunks(
        self,
        tokens: Tokens,
        state_in: Array | None,
        state_out: Array | None = None,
        logits_out: Array | None = None,
        chunk_size: int = 16,
        use_numpy: bool = True,
    ) -> tuple[Array, Array]:
        """The same as `eval_sequence`, which needs no chunks; older bindings had it."""
        chunk_size = as_integer(chunk_size, "chunk_size", 1, 2**32 - 1)
        values = self._tokens(tokens)
        with self._using() as context:
            arrays = self._arrays((self._n_vocab,), state_in, state_out, logits_out, use_numpy)
            addresses = arrays.addresses()
            self._library.rwkv_eval_sequence_in_chunks(context, values, chunk_size, *addresses)
            return arrays.results()

    def _eval_adapted(
        self, context: RWKVContext, tokens: array[int], arrays: _Arrays, adapter: RWKVAdapter
    ) -> None:
        pointer = _pointer(adapter)
        self._library.rwkv_eval_batch(context, [_sequence(tokens, arrays, 1, None, pointer)])

    def importances(self) -> Importances:
        """Return importances of this model, all zero so far, for `eval_batch` to add to."""
        with self._using(wait=True) as context:
            return Importances(self._library.rwkv_get_matrices(context))

    def eval_batch(
        self, sequences: Iterable[RWKVSequence], importances: Importances | None = None
    ) -> list[RWKVResult]:
        """Evaluate independent sequences of any lengths together; return their results in order.

        Each gets the bits that it would get alone. Everything is checked before anything is
        written. No sequence: an empty list.

        importances: of this model; all tokens are added to them, in the same bits however they are
        grouped into calls.
        """
        sequences = list(sequences)
        tokens = [self._tokens(sequence.tokens) for sequence in sequences]
        with self._using() as context:
            prepared = [self._prepare(*pair) for pair in zip(sequences, tokens, strict=True)]
            structs = [struct for struct, *_ in prepared]
            if importances is None:
                self._library.rwkv_eval_batch(context, structs)
            else:
                matrices = self._library.rwkv_get_matrices(context)
                if list(matrices.items()) != list(importances.cols.items()):  # in this order
                    raise ValueError("these importances are those of another model")
                address = importances.flat.ctypes.data
                self._library.rwkv_eval_importances(context, structs, address)
                importances.n_tokens += sum(map(len, tokens))
        results = []
        for _, arrays, hidden, _ in prepared:
            logits, state = arrays.results()
            results.append(RWKVResult(state, logits, arrays.given_back(hidden)))
        return results

    def _prepare(
        self, sequence: RWKVSequence, tokens: array[int]
    ) -> tuple[SequenceStruct, _Arrays, np.ndarray | None, RWKVAdapterPointer | None]:
        """What C gets for a sequence, its arrays, that of hidden, and what C needs meanwhile."""
        n_logits = as_integer(sequence.n_logits, "n_logits", 0, len(tokens))
        shape = (n_logits, self._n_vocab) if n_logits else None
        arrays = self._arrays(shape, sequence.state_in, sequence.state_out, sequence.logits_out)
        hidden = np.empty(self._n_embed, np.float32) if sequence.want_hidden else None
        pointer = None if sequence.adapter is None else _pointer(sequence.adapter)
        return _sequence(tokens, arrays, n_logits, hidden, pointer), arrays, hidden, pointer

    def _arrays(
        self,
        logits_shape: tuple[int, ...] | None,
        state_in: Array | None,
        state_out: Array | None,
        logits_out: Array | None,
        use_numpy: bool = True,
    ) -> _Arrays:
        return _Arrays(self._n_state, logits_shape, state_in, state_out, logits_out, use_numpy)

    # ---- Checks ----------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._context.closed:
            raise RuntimeError("model is closed")

    @contextmanager
    def _using(self, wait: bool = False) -> Iterator[RWKVContext]:
        """The context, for this thread alone."""
        # A signal handler or a callback inside an evaluation would wait for itself.
        wait = wait and self._user != threading.get_ident()
        if not self._lock.acquire(blocking=wait):
            raise RuntimeError("model is busy evaluating: give each thread a clone() of it")
        try:
            self._user = threading.get_ident()
            self._open()
            yield self._context
        finally:
            self._user = None
            self._lock.release()

    def _tokens(self, tokens: Tokens) -> array[int]:
        """Tokens as C takes them. Raises ValueError or TypeError with the position."""
        self._open()
        last = self._n_vocab - 1
        values = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if isinstance(values, int):
            raise TypeError("tokens must be a sequence of integers, not one: use eval() for that")
        checked = array(
            "I", (as_integer(token, f"tokens[{i}]", 0, last) for i, token in enumerate(values))
        )
        if not checked:
            raise ValueError("tokens is empty, expected at least one")
        return checked


# ---- Arrays --------------------------------------------------------------------------------------


class _Arrays:
    """The arrays of one sequence: checked for C, and given back in the caller's kind."""

    def __init__(
        self,
        n_state: int,
        logits_shape: tuple[int, ...] | None,
        state_in: Array | None,
        state_out: Array | None,
        logits_out: Array | None,
        use_numpy: bool,
    ) -> None:
        given = state_in, state_out, logits_out
        self._torch = None
        if not use_numpy or any(map(_is_tensor, given)):
            self._torch = sys.modules.get("torch")  # whoever has a tensor has imported it
            if self._torch is None:
                raise ValueError("use_numpy=False asks for torch tensors: import torch first")
        if logits_shape is None and logits_out is not None:
            raise ValueError("logits_out is given, but n_logits is 0")
        self._state_out, self._logits_out = state_out, logits_out
        self._state_in = _source("state_in", state_in, (n_state,))
        self._state = _target("state_out", state_out, (n_state,))
        self._logits = None
        if logits_shape is not None:
            self._logits = _target("logits_out", logits_out, logits_shape)

    def addresses(self) -> tuple[int | None, int | None, int | None]:
        """Of state_in, state_out and logits_out, while this object lives."""
        return _address(self._state_in), _address(self._state), _address(self._logits)

    def results(self) -> tuple[Array | None, Array]:
        """(logits, state)"""
        return (
            self.given_back(self._logits, self._logits_out),
            self.given_back(self._state, self._state_out),
        )

    def given_back(self, array: np.ndarray | None, argument: Array | None = None) -> Array | None:
        """The argument that was written to, if there was one; otherwise the new array."""
        if argument is not None:
            return argument
        return array if self._torch is None or array is None else self._torch.from_numpy(array)


def _sequence(
    tokens: array[int],
    arrays: _Arrays,
    n_logits: int,
    hidden: np.ndarray | None,
    adapter: RWKVAdapterPointer | None,
) -> SequenceStruct:
    state_in, state_out, logits_out = arrays.addresses()
    return SequenceStruct(
        tokens=tokens.buffer_info()[0],
        n_tokens=len(tokens),
        state_in=state_in,
        state_out=state_out,
        logits_out=logits_out,
        n_logits=n_logits,
        hidden_out=_address(hidden),
        adapter=None if adapter is None else adapter.ptr,
    )


def _pointer(adapter: RWKVAdapter) -> RWKVAdapterPointer:
    if not isinstance(adapter, RWKVAdapter):
        raise TypeError(f"adapter must be an RWKVAdapter, not {type(adapter).__name__}")
    return adapter.pointer


def _adapter_part(part: Part) -> AdapterPartStruct:
    """What C gets for a part, whose arrays have to live meanwhile."""
    return AdapterPartStruct(
        name=part.name.encode(),
        rows=math.prod(part.shape[:-1]),
        cols=part.shape[-1],
        rank=0 if part.a is None else len(part.a),
        a=_address(part.a),
        b=_address(part.b),
        scale=part.scale,
        values=_address(part.values),
    )


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _source(name: str, value: Array | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """`value` as a contiguous array, copied if it is not one."""
    if value is None:
        return None
    return np.require(_numpy(name, value, shape), requirements=["C", "A"])


def _target(name: str, value: Array | None, shape: tuple[int, ...]) -> np.ndarray:
    """`value` itself, or a new array."""
    if value is None:
        return np.empty(shape, np.float32)
    if _is_tensor(value) and value.requires_grad:
        raise ValueError(f"{name} requires grad, so it cannot be written to: detach() it")
    array = _numpy(name, value, shape)
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{name} must be contiguous and aligned, its strides are {array.strides}")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return array


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _numpy(name: str, value: Array, shape: tuple[int, ...]) -> np.ndarray:
    """A view of `value`, which is of native float32."""
    if _is_tensor(value):
        if value.device.type != "cpu" or str(value.layout) != "torch.strided":
            raise ValueError(
                f"{name} must be a dense tensor on the CPU, not {value.layout} on {value.device}"
            )
        if str(value.dtype) != "torch.float32":
            raise ValueError(f"{name} must be float32, not {value.dtype}")
        value = value.detach().numpy()
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a numpy array, not {type(value).__name__}")
    if value.dtype != np.float32:
        raise ValueError(f"{name} must be native float32, not {value.dtype.str}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {value.shape}")
    return value
