"""The `rwkv quantize` command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm

from .library import Progress, RWKVSharedLibrary, load_rwkv_shared_library


def quantize_file(
    source: Path,
    target: Path,
    format_name: str,
    *,
    file_version: int = 0,
    allow_nan: bool = False,
    head: str | None = None,
    progress: Progress | None = None,
    library: RWKVSharedLibrary | None = None,
) -> None:
    """Write a copy of `source` with its matrices quantized; the embedding stays as it is.

    format_name: "Q4_0" to "Q8_0" in any case, or the number of its data type, "2" to "9".
    file_version: 100 or 101; 0: 101 where that has the format, otherwise 100.
    allow_nan: pass weights that are not finite on, rather than refuse them.
    head: the head's format, given as format_name is; None: it stays as it is.
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
        progress=progress,
    )


def file_formats(library: RWKVSharedLibrary) -> Iterator[str]:
    """The names of all formats that files may have."""
    for data_type in range(16):
        if any(library.rwkv_get_row_size(version, data_type, 32) for version in (100, 101)):
            yield library.rwkv_get_format_name(data_type) or str(data_type)


def format_name_of(library: RWKVSharedLibrary, text: str) -> str:
    """The name that C knows."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else None
    name = text.upper() if number is None else library.rwkv_get_format_name(number)
    return name or text


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
@click.argument("format_name", metavar="FORMAT")
@click.option(
    "--file-version",
    type=click.Choice(["100", "101"]),
    help="Of DEST.  [default: 101; 100 for Q4_1_O, Q4_2 and Q4_3, which only that has]",
)
@click.option("--allow-nan", is_flag=True, help="Pass NaN and infinite weights on.")
@click.option(
    "--head", metavar="FORMAT", help="Also quantize the head, to this format.  [default: as it is]"
)
def command(
    source: Path,
    target: Path,
    format_name: str,
    file_version: str | None,
    allow_nan: bool,
    head: str | None,
) -> None:
    """Write a quantized copy of a model.

    SRC is an FP32 or FP16 model file. FORMAT is Q4_0, Q4_1, Q4_1_O, Q4_2, Q4_3, Q5_0, Q5_1 or Q8_0,
    in any case, or its number in files, 2 to 9 in this order. DEST appears, or replaces an older
    file, only when it is complete.

    \b
    rwkv quantize model.bin model-Q5_1.bin Q5_1
    """
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantize_file(
            source,
            target,
            format_name,
            file_version=int(file_version or 0),
            allow_nan=allow_nan,
            head=head,
            progress=progress,
        )
    click.echo(f"{target}: {target.stat().st_size:,} bytes, {source}: {source.stat().st_size:,}")
