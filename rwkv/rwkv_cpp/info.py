"""The `rwkv info` command."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .formats import file_formats
from .ggmf import Header, Record, read_index
from .library import Memory, RWKVSharedLibrary, load_rwkv_shared_library
from .load_options import load_options, model_option
from .model import EMBEDDED_MODEL
from .registry import PILE, SIZES


@dataclass(frozen=True)
class ModelInfo:
    """types: format -> (tensors, bytes in the file), the largest first.

    arch: "RWKV-4", or what the model has beside that.
    """

    header: Header
    types: dict[str, tuple[int, int]]
    n_weights: int
    arch: str
    memory: Memory


def inspect(path: Path, library: RWKVSharedLibrary | None = None, **options: Any) -> ModelInfo:
    """Read what a model file holds from its table of tensors. Raises RWKVFileError.

    options: those of loading that change the memory, as for RWKVModel.
    """
    library = library or load_rwkv_shared_library()
    memory = library.rwkv_estimate(path, **options)  # checks the file as loading does
    header, records = read_index(path)
    tensors: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    n_weights = 0
    for record in records:
        name = library.rwkv_get_format_name(record.data_type) or str(record.data_type)
        tensors[name] += 1
        n_bytes[name] += record.nbytes
        rows = record.shape[0] if len(record.shape) == 2 else 1
        n_weights += rows * record.shape[-1]
    types = {name: (tensors[name], size) for name, size in n_bytes.most_common()}
    return ModelInfo(header, types, n_weights, _arch(records), memory)


def _arch(records: list[Record]) -> str:
    for record in records:
        if record.key.endswith(".tiny_q.weight"):
            layer = record.key.split(".")[1]
            return f"RWKV-4a, a tiny attention of {record.shape[0]} after layer {layer}"
    return "RWKV-4"


def sizes(library: RWKVSharedLibrary | None = None, **options: Any) -> dict[str, dict[str, Memory]]:
    """Format -> released size -> the memory that such a model takes. options: as for `inspect`."""
    library = library or load_rwkv_shared_library()
    return {
        name: {
            size: library.rwkv_estimate_shape(PILE, n_embed, n_layer, name, **options)
            for size, (n_layer, n_embed) in SIZES.items()
        }
        for name in file_formats()
    }


@click.command()
@model_option
@click.option("--sizes", "show_sizes", is_flag=True, help="The memory that released models take.")
@load_options
def command(model_path: Path | None, show_sizes: bool, options: dict[str, Any]) -> None:
    """Show what a model file holds, the memory it takes and this library.

    \b
    rwkv info -m model.bin
    rwkv info --sizes
    """
    library = load_rwkv_shared_library()
    if show_sizes:
        if options["sparse_ffn"]:
            raise click.UsageError("--sizes shows all formats, --sparse-ffn is not for all")
        if model_path:
            raise click.UsageError("--sizes shows released models, leave out --model")
        _print_sizes(sizes(library, **options))
        return
    if model_path or EMBEDDED_MODEL.is_file():
        path = model_path or EMBEDDED_MODEL
        _print_model(path, inspect(path, library, **options))
        click.echo()
    _print_rows(
        {
            "library": str(library.path),
            "kernels": library.rwkv_get_system_info_string(),
        }
    )


def _print_model(path: Path, model: ModelInfo) -> None:
    header, memory = model.header, model.memory
    _print_rows(
        {
            "model": str(path),
            "arch": model.arch,
            "file": f"{memory.file:,} bytes, version {header.version}",
            "sizes": f"n_vocab {header.n_vocab}, n_embed {header.n_embed}, "
            f"n_layer {header.n_layer}: {model.n_weights:,} weights",
        }
        | {
            name: f"{n_tensors} tensors, {n_bytes:,} bytes"
            for name, (n_tensors, n_bytes) in model.types.items()
        }
        | {
            "memory": f"{megabytes(memory.total)}: {megabytes(memory.mapped)} mapped file, "
            f"{megabytes(memory.weights)} weights, {megabytes(memory.scratch)} scratch, "
            f"{megabytes(memory.state)} a state",
        }
    )


def _print_rows(rows: dict[str, str]) -> None:
    for name, text in rows.items():
        click.echo(f"{name:<8} {text}")


def _print_sizes(table: dict[str, dict[str, Memory]]) -> None:
    click.echo("memory while one context runs, prompts of 256 tokens included")
    click.echo("        " + "".join(f"{size:>10}" for size in SIZES))
    for name, row in table.items():
        click.echo(f"{name:<8}" + "".join(f"{megabytes(row[size].total):>10}" for size in SIZES))


def megabytes(n_bytes: int) -> str:
    """A size for people, with three digits or so: "4.18 MB", "713 MB", "14.3 GB"."""
    value, unit = (n_bytes / 1e6, "MB") if n_bytes < 999.5e6 else (n_bytes / 1e9, "GB")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
