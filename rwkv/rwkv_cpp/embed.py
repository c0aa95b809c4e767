"""The `rwkv embed` command."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from .atomic import refuse_same_file, replacing
from .embedding import PARTS, Normalizer
from .library import MAX_THREADS
from .load_options import load_options, lora_option, model_option
from .progress import progress_bar
from .rwkv import RWKV
from .texts import read_documents, read_text

_FILE = click.Path(path_type=Path)


def texts_of(paths: Sequence[Path], whole: bool) -> list[str]:
    """The texts of some files, - for stdin: their lines, empty ones too; the documents of a
    `.jsonl`; or each file as one text. Raises RWKVFileError for what is not UTF-8 or no document.
    """
    texts = []
    for path in paths:
        if path.suffix == ".jsonl":
            texts += read_documents(path)
        elif whole:
            texts.append(read_text(path))
        else:
            lines = re.split("\r?\n", read_text(path))
            texts += lines if lines[-1] else lines[:-1]
    return texts


def _layers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """The numbers of "0,2-4,-1"."""
    if value is None:
        return None
    layers: list[int] = []
    for word in value.split(","):
        match = re.fullmatch(r"(-?\d{1,4})(?:-(\d{1,4}))?", word.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise click.BadParameter(f"expected numbers and ranges as in 0,2-4,-1, found {value!r}")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def _parts(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    parts = [word.strip() for word in value.split(",")]
    for part in parts:
        if part not in PARTS:
            raise click.BadParameter(f"expected some of {', '.join(PARTS)}, found {part!r}")
    return parts


@click.command()
@click.argument("paths", metavar="[TEXT]...", type=_FILE, nargs=-1)
@model_option
@lora_option
@click.option("--whole", is_flag=True, help="Each file is one text, rather than each line.")
@click.option(
    "--layers",
    metavar="LIST",
    callback=_layers,
    help="0,2-4 for example; -1 is the last.  [default: all]",
)
@click.option(
    "--parts",
    metavar="LIST",
    callback=_parts,
    help=f"Of what a layer remembers: {', '.join(PARTS)}.  [default: all]",
)
@click.option(
    "--normalizer",
    "normalizer_path",
    metavar="FILE",
    type=_FILE,
    help="Bring each channel to mean 0 and deviation 1, by this file of --fit.",
)
@click.option(
    "--fit",
    "is_fit",
    is_flag=True,
    help="Write the normalizer that fits the texts to --normalizer FILE, and no embeddings.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE.npy",
    type=_FILE,
    help="Write an array (texts, values) of float32.  [default: JSON Lines on stdout]",
)
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="[default: physical cores]")
@click.option(
    "--vocab",
    "vocabulary",
    type=_FILE,
    help="Vocabulary file.  [default: looked for, see `rwkv generate --help`]",
)
@load_options
def command(
    paths: tuple[Path, ...],
    model_path: Path | None,
    lora: tuple[tuple[Path, float], ...],
    whole: bool,
    layers: list[int] | None,
    parts: list[str] | None,
    normalizer_path: Path | None,
    is_fit: bool,
    output: Path | None,
    threads: int | None,
    vocabulary: Path | None,
    options: dict[str, Any],
) -> None:
    """Turn texts into vectors for other tasks: what a model remembers of them.

    A text is a line of TEXT, or of stdin; an empty one has its vector, too, that of an empty text.
    A file that ends in .jsonl has a text, {"text": "…"}, in each line that is not empty. A vector
    is a JSON array on a line of stdout, or a row of FILE.npy: of each layer one part after the
    other, n_embed values each. docs/embeddings.md tells which layers and parts are good for what.

    \b
    rwkv embed --fit many.txt -m model.bin --normalizer model.normalizer
    rwkv embed lines.txt -m model.bin --normalizer model.normalizer -o lines.npy
    """
    if is_fit and normalizer_path is None:
        raise click.UsageError("--fit needs --normalizer FILE to write to")
    if is_fit and any(given is not None for given in (layers, parts, output)):
        raise click.UsageError("--fit takes all layers and parts, and writes no embeddings")
    if output is not None and output.suffix != ".npy":
        raise click.BadParameter(f"{output}: expected a name that ends in .npy")
    paths = paths or (Path("-"),)
    target = normalizer_path if is_fit else output
    if target is not None:
        read = None if is_fit else normalizer_path
        for path in (*paths, model_path, *(path for path, _ in lora), read):
            if path is not None:
                refuse_same_file(path, target)
    texts = texts_of(paths, whole)
    given = None if is_fit or normalizer_path is None else Normalizer.load(normalizer_path)
    with (
        progress_bar() as progress,
        RWKV(model_path, vocabulary=vocabulary, n_threads=threads, lora=lora, **options) as model,
    ):
        if is_fit and normalizer_path is not None:
            model.fit_normalizer(texts, progress).save(normalizer_path)
            click.echo(f"{normalizer_path}: fitted on {len(texts):,} texts")
            return
        rows = model.embed(texts, layers=layers, parts=parts, normalizer=given, progress=progress)
    if output is None:
        for row in rows:
            click.echo(json.dumps([float(str(value)) for value in row]))
    else:
        with replacing(output) as file:
            np.save(file, rows)
        click.echo(f"{output}: {len(rows):,} texts, {rows.shape[1]:,} values each")
