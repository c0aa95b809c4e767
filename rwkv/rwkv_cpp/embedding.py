"""Embeddings: what a model remembers of a text, as one vector for other tasks.

Each layer remembers three vectors of n_embed values (PARTS), as RWKV-LM's README advises to take
them from the state:

    att_xx   what time mixing got of the last token
    ffn_xx   what channel mixing got of the last token
    aa/bb    the average of the values of all tokens, weighted by key and age

Their ranges differ from layer to layer and from channel to channel: a `Normalizer`, fitted on many
texts, brings each channel to mean 0 and deviation 1.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .atomic import replacing
from .checkpoint import pack_safetensors, unpack_safetensors
from .errors import ForeignState, RWKVError, RWKVFileError
from .ggmf import open_regular, recognise
from .library import FilePath
from .progress import Progress
from .reading import Evaluate, read
from .state import State
from .state_layouts import PARTS as STATE_PARTS

PARTS = ("att_xx", "ffn_xx", "aa/bb")

_BATCH = 64  # texts that are read together
_CHUNK = 1024  # tokens in one call: half as fast again with a small model as 64, which end sooner
_FORMAT, _VERSION = "rwkv-normalizer", "1"
_MAX_FILE_BYTES = 1 << 28
_ROUNDING = 1e-6  # a deviation that is no larger a share of the mean is none


@dataclass(frozen=True, eq=False)
class Normalizer:
    """How each channel of a model is distributed: mean and deviation are (n_layer, len(PARTS),
    n_embed) float32, no deviation 0; family is the model's, the same for all of its formats."""

    mean: np.ndarray
    deviation: np.ndarray
    family: str

    def check(self, family: str) -> None:
        """Raises ForeignState if it was fitted on another model."""
        if self.family != family:
            raise ForeignState(
                f"the normalizer was fitted on another model, of family {self.family}, this model "
                f"is of family {family} (fit one with it)"
            )

    def save(self, path: FilePath) -> None:
        """Write a safetensors file; `path` appears, or is replaced, only when complete."""
        data = pack_safetensors(
            {"mean": self.mean, "deviation": self.deviation},
            {"format": _FORMAT, "version": _VERSION, "family": self.family},
        )
        with replacing(Path(os.fsdecode(path))) as file:
            file.write(data)

    @classmethod
    def load(cls, path: FilePath) -> Normalizer:
        """Raises RWKVFileError if the file is no normalizer or is damaged."""
        path = Path(os.fsdecode(path))
        with open_regular(path) as file:
            data = file.read(_MAX_FILE_BYTES)
        if data[4:9] != b"\0\0\0\0{":
            raise RWKVFileError(f"{path}: expected a normalizer, this is {recognise(data[:512])}")
        try:
            metadata, arrays = unpack_safetensors(data)
        except ValueError as error:
            raise RWKVFileError(f"{path}: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise RWKVFileError(f"{path}: a safetensors file, but not of a normalizer")
        if metadata.get("version") != _VERSION:
            raise RWKVFileError(
                f"{path}: a normalizer in version {metadata.get('version')!r} of the format, "
                f"expected {_VERSION!r}: a newer release may read it"
            )
        family = metadata.get("family", "")
        shapes = {array.shape for array in arrays.values()}
        is_sound = (
            set(arrays) == {"mean", "deviation"}
            and len(shapes) == 1
            and len(arrays["mean"].shape) == 3
            and arrays["mean"].shape[1] == len(PARTS)
            and all(a.dtype == "<f4" and np.isfinite(a).all() for a in arrays.values())
            and bool((arrays["deviation"] > 0).all())
            and re.fullmatch("[0-9a-f]{32}", family)
        )
        if not is_sound:
            raise RWKVFileError(f"{path}: the normalizer is damaged")
        return cls(arrays["mean"], arrays["deviation"], family)


@dataclass(frozen=True)
class Selection:
    """Which of a model's vectors make an embedding: of each layer, in the order that they are
    given in, each part."""

    layers: tuple[int, ...]
    parts: tuple[str, ...]

    @classmethod
    def of(
        cls, n_layer: int, layers: Iterable[int] | None, parts: Iterable[str] | None
    ) -> Selection:
        """layers: 0 to n_layer - 1, or from the end, -1 for the last one; None: all. parts: some
        of PARTS; None: all. Raises ValueError for others, and for none."""
        chosen = []
        for layer in range(n_layer) if layers is None else layers:
            index = operator.index(layer)
            if not -n_layer <= index < n_layer:
                raise ValueError(
                    f"layers: expected 0 to {n_layer - 1}, or -1 to {-n_layer}, found {layer}"
                )
            chosen.append(index % n_layer)
        kinds = tuple(PARTS if parts is None else parts)
        for part in kinds:
            if part not in PARTS:
                raise ValueError(f"parts: expected some of {', '.join(PARTS)}, found {part!r}")
        if not chosen or not kinds:
            raise ValueError(f"{'parts' if chosen else 'layers'}: expected at least one")
        return cls(tuple(chosen), kinds)

    def take(self, vectors: np.ndarray) -> np.ndarray:
        """(n, layers * parts * n_embed) of (n, n_layer, len(PARTS), n_embed)."""
        places = [PARTS.index(part) for part in self.parts]
        return vectors[:, self.layers][:, :, places].reshape(len(vectors), -1)


def read_vectors(
    evaluate: Evaluate,
    empty: State,
    texts: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """All vectors of some texts, each read from `empty` and not empty itself: batch by batch the
    places of texts and their (n, n_layer, len(PARTS), n_embed) float32.

    progress: called as ("embedding", tokens done, tokens in all).
    Raises RWKVError where a state is not finite.
    """
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    total, before = sum(map(len, texts)), 0

    def report(_what: str, done: int, _total: int) -> None:
        if progress is not None:
            progress("embedding", before + done, total)

    for first in range(0, len(order), _BATCH):
        places = order[first : first + _BATCH]
        batch = [texts[place] for place in places]
        readings = read(evaluate, [empty] * len(batch), batch, chunk=_CHUNK, progress=report)
        states = [reading.state() for reading in readings]
        yield places, np.stack([_vectors(state) for state in states])
        before += sum(map(len, batch))


def _vectors(state: State) -> np.ndarray:
    """(n_layer, len(PARTS), n_embed)"""
    parts = state.layers
    if not np.isfinite(parts).all():
        raise RWKVError("the state holds NaN or infinity: is the model damaged?")
    found = {name: parts[:, i] for i, name in enumerate(STATE_PARTS)}
    found["aa/bb"] = found["aa"] / found["bb"]  # bb is 1 or more once a token was read
    return np.stack([found[name] for name in PARTS], axis=1)


def fit(batches: Iterable[tuple[list[int], np.ndarray]], family: str) -> Normalizer:
    """The normalizer of what `read_vectors` gives. Raises ValueError for less than two texts."""
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for _, vectors in batches:  # joined as Chan, Golub and LeVeque do: no sums of large squares
        new = len(vectors)
        part = vectors.mean(axis=0, dtype=np.float64)
        apart = part - mean
        scatter = scatter + ((vectors - part) ** 2).sum(axis=0)
        scatter = scatter + apart**2 * (count * new / (count + new))
        mean = mean + apart * (new / (count + new))
        count += new
    if count < 2:
        raise ValueError(f"a normalizer is fitted on at least two texts, found {count}")
    deviation = np.sqrt(scatter / count).astype(np.float32)
    deviation[deviation <= _ROUNDING * np.abs(mean)] = 1  # a channel that never changes
    return Normalizer(mean.astype(np.float32), deviation, family)
