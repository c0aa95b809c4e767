"""The `rwkv prepare-data` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from .atomic import refuse_same_file
from .progress import Progress, progress_bar
from .token_data import SUFFIXES, writing_tokens
from .tokenizer import Tokenizer, tokenizer_named


@dataclass(frozen=True)
class Prepared:
    """What was written. n_empty: documents without text, which were left out."""

    n_documents: int
    n_empty: int
    n_tokens: int
    n_bytes: int  # of the sources


def prepare_data(
    sources: Sequence[Path],
    target: Path,
    tokenizer: Tokenizer,
    *,
    append_eod: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Write the tokens of texts, one after the other, as `token_data` has them.

    sources: `.jsonl` files, of which each line is a document, and texts, of which each is one.
    target: its suffix says what is written: `.bin`, with an `.idx` beside it, or `.npy`. It
    appears, or replaces an older file, only when it is complete.
    append_eod: end each document with token 0, the end of a text.
    progress: called with the bytes done and the bytes in all.

    Raises RWKVFileError for a source that is not UTF-8, empty or has a line that is no document,
    ValueError for wrong arguments, OSError for the disk's failures.
    """
    if not sources:
        raise ValueError("no text to prepare")
    for source in sources:
        if source.suffix in (*SUFFIXES, ".idx"):
            raise ValueError(f"{source}: holds tokens by its name, expected a text or a .jsonl")
        for written in (target, target.with_suffix(".idx")):
            refuse_same_file(source, written)
    n_bytes = sum(source.stat().st_size for source in sources)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("encoding", done, n_bytes)

    with writing_tokens(target, tokenizer, append_eod=append_eod) as writer:
        for source in sources:
            writer.write_file(source, advance)
    return Prepared(len(writer.sizes), writer.n_empty, writer.n_tokens, n_bytes)


@click.command()
@click.argument(
    "sources", metavar="TEXT...", type=click.Path(path_type=Path), nargs=-1, required=True
)
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    "tokenizer_name",
    metavar="NAME",
    default="bytes",
    show_default=True,
    help="bytes, 20B, world, or a vocabulary file: the one of the model that is trained.",
)
@click.option(
    "--append-eod",
    is_flag=True,
    help="End each document with token 0, which ends a text (20B and world).",
)
def command(sources: tuple[Path, ...], target: Path, tokenizer_name: str, append_eod: bool) -> None:
    """Write texts as tokens, for training.

    A TEXT that ends in .jsonl has a document, {"text": "…"}, in each line; any other is one
    document in UTF-8. OUT is train.bin, with train.idx beside it, as RWKV-LM and GPT-NeoX read and
    write them, or train.npy, the tokens alone. It appears, or replaces an older file, only when it
    is complete.

    \b
    rwkv prepare-data articles.jsonl book.txt train.bin --tokenizer world --append-eod
    rwkv train train.bin model.pth --tokenizer world
    """
    with progress_bar() as progress:
        done = prepare_data(
            sources,
            target,
            tokenizer_named(tokenizer_name),
            append_eod=append_eod,
            progress=progress,
        )
    documents = "1 document" if done.n_documents == 1 else f"{done.n_documents:,} documents"
    left_out = f" ({done.n_empty:,} left out: empty)" if done.n_empty else ""
    click.echo(
        f"{target}: {done.n_tokens:,} tokens in {documents}{left_out}, "
        f"{done.n_bytes / done.n_tokens:.2f} bytes per token"
    )
