"""The best mix of formats that fits into a size.

Groups of matrices (one kind in one layer, or in some layers of a large model) are quantized one at
a time, to each format, and the KL divergence from the model as it was is measured. The divergences
of small errors add up, so the best mix for a size is a knapsack, which is solved exactly; the mix
is then measured itself.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import refuse_same_file
from .errors import NonFiniteLogits, RWKVFileError
from .formats import formats_of
from .ggmf import DTYPES, Record, Writer, read_index
from .library import RWKVSharedLibrary, load_rwkv_shared_library
from .model import RWKVModel, RWKVSequence
from .progress import Progress
from .scoring import compare_logits

_TOKENS = 2048  # that a mix is measured on
_LOGITS = 1 << 26  # but no more of them than that many logits: 256 MB
_STREAMS = 8  # texts that a model writes at once
_OPERATIONS = 1e14  # that measuring may take: where it would be more, layers go together

Types = Mapping[str, str]
"""The format of a matrix by its name; one that is not there stays as it is in the source."""


@dataclass(frozen=True)
class Group:
    """Matrices that get the same format: those of `kind` ("ffn.value") in layers first..last. Where
    these are None: the one matrix of that name ("head")."""

    kind: str
    first: int | None
    last: int | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """Bytes of a file, and its KL divergence from the source in nats per token."""

    n_bytes: int
    divergence: float


@dataclass(frozen=True)
class Mix:
    """What was chosen: a format for each group, which may be the source's.

    expected: the sum of the divergences that the groups have alone. uniform: each format by itself,
    the head included. n_tokens: that all was measured on.
    """

    formats: dict[Group, str]
    measured: Measured
    expected: float
    uniform: dict[str, Measured]
    n_tokens: int

    @property
    def types(self) -> str:
        """The same choice for `quantize_file`."""
        return ",".join(
            f"{name.removesuffix('.weight')}={format_name}"
            for group, format_name in self.formats.items()
            for name in group.names
        )


def quantize_to_size(
    source: Path,
    target: Path,
    size: int,
    *,
    tokens: Sequence[int] | None = None,
    file_version: int = 0,
    allow_nan: bool = False,
    method: str | None = None,
    importances: Path | None = None,
    progress: Progress | None = None,
    library: RWKVSharedLibrary | None = None,
) -> Mix:
    """Write a copy of an FP32 or FP16 model of at most `size` bytes that is as close to it as
    possible, its matrices in formats of their own.

    tokens:  what is measured on, of which 2048 are read at most; None: texts that the model writes.
    file_version: 100 or 101, whose formats may be used; 0: 101.
    Other arguments are those of `quantize_file`. A file of each format, and mixes that are being
    measured, lie in a temporary folder meanwhile. `target` appears, or replaces an older file, only
    when it is complete.

    Raises ValueError for a size that no mix can meet, RWKVFileError for a source that is quantized
    or no model, NonFiniteLogits if it is damaged.
    """
    refuse_same_file(source, target)
    if importances is not None:
        refuse_same_file(importances, target)
    library = library or load_rwkv_shared_library()
    report = progress or (lambda what, done, total: None)
    with RWKVModel(library, source) as model:
        mixer = _Mixer(library, source, [*model.importances().squares], file_version or 101)
        mixer.check_size(size)
        judge = _Judge(library, model, tokens, report)
        groups = mixer.groups(model.n_layer, judge.n_tokens)
    with tempfile.TemporaryDirectory(prefix="rwkv-") as folder:
        trial = Path(folder, "trial.bin")
        for name in mixer.formats:
            report(f"quantizing to {name}", 0, 0)
            mixer.add(
                Path(folder, name),
                name,
                allow_nan=allow_nan,
                method=method,
                importances=importances,
            )
        total = (len(groups) + 1) * len(mixer.formats) + 1
        done = 0

        def measure(types: Types) -> Measured:
            nonlocal done
            report("measuring", done, total)
            done += 1
            mixer.write(trial, types)
            return Measured(trial.stat().st_size, judge.divergence(trial))

        uniform = {name: measure(dict.fromkeys(mixer.matrices, name)) for name in mixer.formats}
        names = [mixer.own_format, *mixer.formats]
        options = [
            [
                (
                    mixer.bytes_of(group.names, name),
                    0.0
                    if name == mixer.own_format
                    else measure(dict.fromkeys(group.names, name)).divergence,
                )
                for name in names
            ]
            for group in groups
        ]
        choice = best_choice(options, size - mixer.other_bytes)
        formats = {group: names[number] for group, number in zip(groups, choice, strict=True)}
        expected = sum(row[number][1] for row, number in zip(options, choice, strict=True))
        measured = measure({name: formats[group] for group in groups for name in group.names})
        for name, whole in uniform.items():  # sums are not the whole truth
            if whole.n_bytes <= size and whole.divergence < measured.divergence:
                formats, measured, expected = dict.fromkeys(groups, name), whole, whole.divergence
        mixer.write(target, {name: formats[group] for group in groups for name in group.names})
    return Mix(formats, measured, expected, uniform, judge.n_tokens)


def best_choice(options: Sequence[Sequence[tuple[int, float]]], room: int) -> list[int]:
    """Of each row of options, (bytes, loss), the number of one, so that their bytes are at most
    `room` together and their losses as small as possible.

    Raises ValueError if there is no such choice.
    """
    # Of all beginnings of a choice, those that no other beats in both bytes and loss.
    least = [min(n for n, _ in row) for row in options]
    rest = [sum(least), *(sum(least) - done for done in accumulate(least))]
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for row, needed in zip(options, rest[1:], strict=True):
        longer = sorted(
            (n + more, loss + harm, (*choice, number))
            for n, loss, choice in front
            for number, (more, harm) in enumerate(row)
            if n + more + needed <= room
        )
        front = []
        for entry in longer:
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    if not front:
        raise ValueError(f"no choice takes {room} bytes or less")
    return list(front[-1][2])


class _Judge:
    """The logits of a model over some tokens, which other files are compared with."""

    def __init__(
        self,
        library: RWKVSharedLibrary,
        model: RWKVModel,
        tokens: Sequence[int] | None,
        report: Progress,
    ) -> None:
        self._library = library
        limit = min(_TOKENS, _LOGITS // model.n_vocab)
        if tokens is None:
            report("writing a text to measure on", 0, 0)
            self._texts = own_words(model, limit // _STREAMS)
        else:
            self._texts = [list(tokens[:limit])]
        self.n_tokens = sum(map(len, self._texts))
        if not self.n_tokens:
            raise ValueError("the text to measure on is empty")
        self._targets = np.zeros(self.n_tokens, np.intp)  # losses are not asked for
        self._logits = self._read(model)
        if not np.isfinite(self._logits).all():
            raise NonFiniteLogits("logits hold NaN or infinity: is the model damaged?")

    def divergence(self, path: Path) -> float:
        with RWKVModel(self._library, path) as model:
            logits = self._read(model)
        found = float(compare_logits(logits, self._logits, self._targets).divergence.mean())
        if not np.isfinite(found):
            raise NonFiniteLogits("logits hold NaN or infinity where matrices are quantized")
        return found

    def _read(self, model: RWKVModel) -> np.ndarray:
        sequences = [RWKVSequence(text, n_logits=len(text)) for text in self._texts]
        results = model.eval_batch(sequences)
        return np.concatenate([result.logits for result in results if result.logits is not None])


def own_words(model: RWKVModel, length: int) -> list[list[int]]:
    """Texts of so many tokens that a model writes at temperature 1, always the same ones."""
    random = np.random.default_rng(0)
    first = ord("\n") if model.n_vocab == 256 else 0  # of bytes; elsewhere 0 ends a text
    texts = [[first] for _ in range(_STREAMS)]
    states = [None] * _STREAMS
    for _ in range(length - 1):
        results = model.eval_batch(
            RWKVSequence(text[-1:], state) for text, state in zip(texts, states, strict=True)
        )
        states = [result.state for result in results]
        # The largest logit with Gumbel noise is a draw from their softmax.
        noise = random.gumbel(size=(_STREAMS, model.n_vocab))
        for text, result, row in zip(texts, results, noise, strict=True):
            if result.logits is not None:
                text.append(int((result.logits[0] + row).argmax()))
    return texts


class _Mixer:
    """A model in each of the formats that a file version has, of which mixes are made."""

    def __init__(
        self, library: RWKVSharedLibrary, source: Path, matrices: Sequence[str], version: int
    ) -> None:
        self._library = library
        self._source = source
        self._version = version
        self._header, self._records = read_index(source)
        records = {record.key: record for record in self._records}
        self.matrices = {name: records[name] for name in matrices}
        names = {each.data_type: str(each) for each in formats_of(version)}
        self._numbers = {name: number for number, name in names.items()}
        self.formats = [name for number, name in names.items() if number not in DTYPES]
        self.own_format = names[self._header.data_type]
        if self.own_format in self.formats:
            raise RWKVFileError(
                f"{source}: is already {self.own_format} (take the original FP16 or FP32 file)"
            )
        self._source_bytes = np.memmap(source, np.uint8, "r")
        self._files: dict[str, tuple[np.ndarray, dict[str, Record]]] = {}
        self._total = source.stat().st_size
        self.other_bytes = self._total - self.bytes_of(matrices, self.own_format)

    def _row_size(self, data_type: int, columns: int = 32) -> int:
        return self._library.rwkv_get_row_size(self._version, data_type, columns)

    def bytes_of(self, names: Sequence[str], format_name: str) -> int:
        """Of some matrices in a format."""
        if format_name == self.own_format:
            return sum(self.matrices[name].nbytes for name in names)
        number = self._numbers[format_name]
        shapes = [self.matrices[name].shape for name in names]
        return sum(rows * self._row_size(number, columns) for rows, columns in shapes)

    def check_size(self, size: int) -> None:
        """Raises ValueError if no mix has at most so many bytes, or every one has."""
        least = min(self.bytes_of([*self.matrices], name) for name in self.formats)
        smallest = self.other_bytes + least
        if not smallest <= size <= self._total:
            raise ValueError(
                f"{self._source}: no mix of formats is for {size:,} bytes: expected {smallest:,} "
                f"(all matrices as small as can be) to {self._total:,} (all as they are)"
            )

    def groups(self, n_layer: int, n_tokens: int) -> list[Group]:
        """The matrices, as finely divided as can be measured in a reasonable time."""
        parts = {name: re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name) for name in self.matrices}
        kinds = {match[2] for match in parts.values() if match}
        weights = sum(record.shape[0] * record.shape[1] for record in self.matrices.values())
        n_groups = _OPERATIONS / (2 * weights * n_tokens * len(self.formats))
        n_bands = min(max(int(n_groups / len(kinds)), 1), n_layer)
        found: dict[tuple[str, int | None], list[str]] = {}
        for name, match in parts.items():
            band = None if match is None else int(match[1]) * n_bands // n_layer
            kind = name.removesuffix(".weight") if match is None else match[2]
            found.setdefault((kind, band), []).append(name)
        groups = []
        for (kind, _), names in found.items():
            layers = [int(match[1]) for name in names if (match := parts[name])]
            first, last = (layers[0], layers[-1]) if layers else (None, None)
            groups.append(Group(kind, first, last, tuple(names)))
        return groups

    def add(self, path: Path, format_name: str, **options: Any) -> None:
        """Quantize all matrices to a format, in a file of their own."""
        self._library.rwkv_quantize_file(
            self._source,
            path,
            format_name,
            file_version=self._version,
            head=format_name,
            **options,
        )
        _, records = read_index(path)
        by_key = {record.key: record for record in records}
        self._files[format_name] = np.memmap(path, np.uint8, "r"), by_key

    def write(self, path: Path, types: Types) -> None:
        """Write a file of the model with these formats."""
        chosen: list[tuple[np.ndarray, Record]] = []
        for record in self._records:
            name = types.get(record.key, self.own_format)
            if name == self.own_format:
                chosen.append((self._source_bytes, record))
            else:
                file, records = self._files[name]
                chosen.append((file, records[record.key]))
        weights = Counter[int]()  # by type
        for _, record in chosen:
            if record.key in self.matrices:
                weights[record.data_type] += record.shape[0] * record.shape[1]
        ((most, _),) = weights.most_common(1)
        header = replace(self._header, version=self._version, data_type=most)
        with Writer(path, header) as writer:
            for file, record in chosen:
                data = file[record.offset : record.offset + record.nbytes].data
                writer.write_pieces(record.key, record.data_type, record.shape, [data])


def table(mix: Mix) -> str:
    """The formats that were chosen, layer by layer, and what they and others lose."""
    kinds = dict.fromkeys(group.kind for group in mix.formats if group.first is not None)
    rows = [["layer", *kinds]]
    for first, last in dict.fromkeys((group.first, group.last) for group in mix.formats):
        if first is None:
            continue
        cells = {g.kind: name for g, name in mix.formats.items() if g.first == first}
        layers = str(first) if first == last else f"{first}-{last}"
        rows.append([layers, *(cells.get(kind, "") for kind in kinds)])
    rows += [[group.kind, name] for group, name in mix.formats.items() if group.first is None]
    files = [["", "bytes", f"KL divergence, {mix.n_tokens:,} tokens"]]
    for name, measured in mix.uniform.items():
        files.append([name, f"{measured.n_bytes:,}", f"{measured.divergence:.6f}"])
    found = mix.measured
    text = f"{found.divergence:.6f} (expected {mix.expected:.6f})"
    files.append(["this mix", f"{found.n_bytes:,}", text])
    return f"{_aligned(rows)}\n\n{_aligned(files)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
