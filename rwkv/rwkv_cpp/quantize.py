"""The `rwkv quantize` command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from .atomic import refuse_same_file
from .ggmf import read_index
from .library import Progress, RWKVSharedLibrary, load_rwkv_shared_library
from .progress import counting_bar, progress_bar
from .target_size import quantize_to_size, table
from .texts import read_text
from .tokenizer import load_tokenizer

METHODS = ("rtn", "mse", "importance")


def quantize_file(
    source: Path,
    target: Path,
    format_name: str,
    *,
    file_version: int = 0,
    allow_nan: bool = False,
    head: str | None = None,
    types: str | None = None,
    method: str | None = None,
    importances: Path | None = None,
    progress: Progress | None = None,
    library: RWKVSharedLibrary | None = None,
) -> None:
    """Write a copy of `source` with its matrices quantized; the embedding stays as it is.

    format_name: "Q4_0" to "Q8_0" in any case, or the number of its data type, "2" to "9".
    file_version: 100 or 101; 0: 101 where that has the format, otherwise 100.
    allow_nan: pass weights that are not finite on, rather than refuse them.
    head: the head's format, given as format_name is; None: it stays as it is.
    types: formats of some tensors, "ffn.value=Q5_1,blocks.0=Q8_0" for example: of those that have
    the pattern as whole parts of their name, the embedding and FP16 included; the last one counts.
    method: "rtn", rounded to nearest; "mse", scales searched for the least squared error;
    "importance", the same with errors that count as the file `importances` says, which `rwkv
    importance` writes. None: "importance" where that file is given, otherwise "rtn".
    `target` appears, or replaces an older file, only when it is complete.

    Raises RWKVFileError for a source that is no FP32 or FP16 model, ValueError for other arguments.
    """
    library = library or load_rwkv_shared_library()
    library.rwkv_quantize_file(
        source,
        target,
        format_name_of(library, format_name),
        file_version=file_version,
        allow_nan=allow_nan,
        head=head and format_name_of(library, head),
        types=types and _types(library, types),
        method=method,
        importances=importances,
        progress=progress,
    )


def _types(library: RWKVSharedLibrary, text: str) -> str:
    """With the names of formats that C knows."""
    rules = [part.strip().partition("=") for part in text.split(",")]
    return ",".join(
        f"{pattern}{sign}{format_name_of(library, name)}" for pattern, sign, name in rules
    )


def format_name_of(library: RWKVSharedLibrary, text: str) -> str:
    """The name that C knows."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else None
    name = text.upper() if number is None else library.rwkv_get_format_name(number)
    return name or text


def bytes_of(text: str, source: Path) -> int:
    """What a size means: "2500000", "2.5MB", "1.2 GiB", or "60%" of a file.

    Raises ValueError for any other text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|[KMG]?i?B)?", text.strip(), re.IGNORECASE)
    unit = (match[2] or "B").upper() if match else ""
    if match is None or unit == "IB":
        raise ValueError(
            f"'{text}' is no size, expected one such as 2.5MB, 1.2GiB or 60% (of the source)"
        )
    if unit == "%":
        return int(float(match[1]) / 100 * source.stat().st_size)
    base = 1024 if "I" in unit else 1000
    return int(float(match[1]) * base ** " KMG".index(unit[0] if len(unit) > 1 else " "))


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
@click.argument("format_name", metavar="[FORMAT]", required=False)
@click.option(
    "--file-version",
    type=click.Choice(["100", "101"]),
    help="Of DEST.  [default: 101; 100 for Q4_1_O, Q4_2 and Q4_3, which only that has]",
)
@click.option("--allow-nan", is_flag=True, help="Pass NaN and infinite weights on.")
@click.option(
    "--head", metavar="FORMAT", help="Also quantize the head, to this format.  [default: as it is]"
)
@click.option(
    "--types",
    metavar="PATTERN=FORMAT,…",
    help="Other formats, FP16 too, for tensors that have PATTERN in their names, such as "
    "ffn.value, blocks.0 or emb; the last one that fits counts.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="Round to nearest, or search scales: for the least squared error, or for the least error "
    "by importances.  [default: importance with --importances, otherwise rtn]",
)
@click.option(
    "--importances",
    type=click.Path(path_type=Path),
    help="What `rwkv importance` wrote of this model.",
)
@click.option(
    "--target-size",
    metavar="SIZE",
    help="Instead of FORMAT: the mix of formats that fits into 2.5MB, 1.2GiB or 60% of SRC and "
    "loses least, by measurement, which takes minutes or, for large models, hours.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A text to measure that on, of which 2048 tokens are read.  [default: texts that the "
    "model writes]",
)
@click.option(
    "--vocab",
    "vocabulary",
    type=click.Path(path_type=Path),
    help="Vocabulary file for --text.  [default: looked for, see `rwkv generate --help`]",
)
def command(
    source: Path,
    target: Path,
    format_name: str | None,
    head: str | None,
    types: str | None,
    target_size: str | None,
    text: Path | None,
    vocabulary: Path | None,
    file_version: str | None,
    **options: Any,
) -> None:
    """Write a quantized copy of a model.

    SRC is an FP32 or FP16 model file. FORMAT is Q4_0, Q4_1, Q4_1_O, Q4_2, Q4_3, Q5_0, Q5_1 or Q8_0,
    in any case, or its number in files, 2 to 9 in this order. DEST appears, or replaces an older
    file, only when it is complete.

    \b
    rwkv quantize model.bin model-Q5_1.bin Q5_1
    rwkv quantize model.bin model-Q4_0.bin Q4_0 --importances model.importances
    rwkv quantize model.bin model-small.bin --target-size 30%
    """
    options["file_version"] = int(file_version or 0)
    if target_size is None:
        if format_name is None:
            raise click.UsageError("FORMAT is missing, or --target-size")
        if text or vocabulary:
            raise click.UsageError("--text and --vocab go with --target-size")
        with counting_bar("B") as progress:
            quantize_file(
                source, target, format_name, head=head, types=types, progress=progress, **options
            )
    else:
        if format_name or head or types:
            raise click.UsageError(
                "--target-size chooses formats: leave out FORMAT, --head, --types"
            )
        _quantize_to_size(source, target, target_size, text, vocabulary, options)
    click.echo(f"{target}: {target.stat().st_size:,} bytes, {source}: {source.stat().st_size:,}")


def _quantize_to_size(
    source: Path,
    target: Path,
    size: str,
    text: Path | None,
    vocabulary: Path | None,
    options: dict[str, Any],
) -> None:
    n_bytes = bytes_of(size, source)
    tokens = None
    if text is not None:
        refuse_same_file(text, target)
        header, _ = read_index(source)
        tokens = load_tokenizer(header.n_vocab, vocabulary, source).encode(read_text(text))
    with progress_bar() as report:
        mix = quantize_to_size(source, target, n_bytes, tokens=tokens, progress=report, **options)
    click.echo(f"{table(mix)}\n")
