"""The `rwkv pull` command: download, convert, quantize, keep."""

from __future__ import annotations

from pathlib import Path

import click

from .download import downloaded
from .errors import ModelNotFound, VocabularyNotFound
from .ggmf import DATA_TYPES, read_index
from .info import megabytes
from .models import cache_model, cached_models, known_format, models_folder, unfinished_folder
from .progress import Progress, progress_bar
from .registry import ROWS, parse_source
from .tokenizer import load_tokenizer


def pull(name: str, format: str | None = None, progress: Progress | None = None) -> Path:
    """The model file of a name, fetched and made where the cache does not have it.

    name: of a row of the registry, as `registry.lookup` takes it, `hf:OWNER/REPOSITORY/FILE` or a
    URL; the file is a checkpoint or a model file.
    format: of the model file; None: what the cache has, or else FP16 of a checkpoint and a model
    file as it is.
    progress: called as (what, done, in all).

    Raises ModelNotFound for an unknown name, DownloadFailed, RWKVFileError for a file that is no
    model of RWKV-4, ValueError for an unknown format.
    """
    format = format and known_format(format)
    source = parse_source(name)
    if source is None:
        raise ModelNotFound(
            f"'{name}' is no name of a model: 'rwkv pull --list' shows them; others are fetched as "
            "hf:OWNER/REPOSITORY/FILE or by their https address"
        )
    report = progress or (lambda what, done, total: None)
    # The download is there until the conversion is complete.
    reserve = 2 if format == "FP32" else 1
    return cache_model(
        source.name,
        format,
        lambda: downloaded(source, unfinished_folder(), reserve, report),
        report,
    )


@click.command()
@click.argument("name", required=False)
@click.option(
    "--format",
    "format_name",
    metavar="FORMAT",
    help=f"Of the model file: {', '.join(DATA_TYPES)}, Q4_0, Q5_1, Q8_0 …  [default: FP16]",
)
@click.option("--list", "show_list", is_flag=True, help="Show the names, and what is at hand.")
def command(name: str | None, format_name: str | None, show_list: bool) -> None:
    """Download a model, convert it and keep it for all commands.

    NAME is one that --list shows, hf:OWNER/REPOSITORY/FILE for any checkpoint or model file of
    RWKV-4 on the Hugging Face hub, or an https address. Afterwards NAME works wherever a model is
    asked for. An interrupted download goes on with the same command.

    Models are kept in the folder `models` of $RWKV_HOME, by default the user's cache folder, where
    files may be removed at any time. HF_ENDPOINT, HF_HOME and HF_TOKEN have their usual meaning.

    \b
    rwkv pull RWKV-4-169M --format Q5_1
    rwkv generate "In a shocking finding," -m RWKV-4-169M
    """
    if show_list:
        if name or format_name:
            raise click.UsageError("--list goes without other arguments")
        _print_list()
        return
    if not name:
        raise click.UsageError("missing argument NAME, or --list for the names")
    with progress_bar() as progress:
        path = pull(name, format_name, progress)
    header, _ = read_index(path)
    click.echo(f"{path}: {path.stat().st_size:,} bytes; use it by -m {name}")
    try:
        load_tokenizer(header.n_vocab, model_path=path)
    except VocabularyNotFound as error:
        click.echo(f"note: {error}", err=True)


def _print_list() -> None:
    models = cached_models()
    rows = [
        (row.name, row.size, f"{row.n_vocab}", megabytes(row.nbytes), models.pop(row.name, {}))
        for row in ROWS
    ]
    rows += [(name, "", "", "", files) for name, files in models.items()]
    width = max(len(name) for name, *_ in rows)
    click.echo(f"{'name':<{width}}  {'size':<5} {'vocabulary':>10} {'download':>9}  at hand")
    for name, size, n_vocab, download, files in rows:
        line = f"{name:<{width}}  {size:<5} {n_vocab:>10} {download:>9}  {', '.join(files)}"
        click.echo(line.rstrip())
    click.echo(f"\nkept in {models_folder()}")
