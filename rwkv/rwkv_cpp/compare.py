"""The `rwkv compare` command: one model in many formats, what each takes and what each loses."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from . import bench
from .atomic import replacing
from .errors import RWKVFileError
from .formats import file_formats
from .ggmf import DATA_TYPES, read_index
from .info import megabytes
from .library import RWKVSharedLibrary, load_rwkv_shared_library
from .load_options import load_options
from .model import RWKVModel
from .models import find_model, known_format
from .perplexity import (
    Comparison,
    Perplexity,
    figures,
    first_tokens,
    measure,
    members,
    text_options,
)
from .progress import Progress, progress_bar
from .quantize import format_name_of
from .scoring import Mean
from .texts import read_texts
from .tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Row:
    """A format. n_bytes: of the file. memory: bytes that `rwkv_estimate` tells. seconds: for a
    token alone. noise: the share of the CPUs that others had meanwhile, at worst."""

    format_name: str
    n_bytes: int
    memory: int
    seconds: float
    noise: float
    perplexity: Perplexity

    @property
    def comparison(self) -> Comparison:
        if self.perplexity.comparison is None:
            raise ValueError(f"{self.format_name} was not compared")
        return self.perplexity.comparison


def compare(
    path: Path,
    tokenizer: Tokenizer,
    documents: Sequence[Sequence[int]],
    formats: Sequence[str],
    *,
    skip: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    library: RWKVSharedLibrary | None = None,
    **options: Any,
) -> Iterator[Row]:
    """Yield a row for each of some formats of a model, as `formats_of` has them.

    What the model is quantized to lies in a temporary folder until it is measured. Each format is
    compared, token by token, with the model as it is at `path`. options: of loading the formats, as
    for RWKVModel; the model that they are compared with has none.
    Raises as `measure` does.
    """
    library = library or load_rwkv_shared_library()
    report = progress or (lambda what, done, total: None)
    n_tokens = sum(map(len, documents))
    with RWKVModel(library, path, threads) as base:
        models = bench.file_models(library, path, formats, lambda what: report(what, 0, 0))
        for name, (_, file) in zip(formats, models, strict=True):
            memory = library.rwkv_estimate(file, **options)

            def reading(done: int, loss: float, name: str = name) -> None:
                report(f"{name}: reading", done, n_tokens)

            with RWKVModel(library, file, threads, **options) as model:
                quality = measure(
                    model, tokenizer, documents, skip=skip, base=base, progress=reading
                )
                report(f"{name}: decoding", 0, 0)
                seconds, noise = decoding(model)
            yield Row(name, memory.file, memory.total, seconds, noise, quality)


def decoding(model: RWKVModel) -> tuple[float, float]:
    """Seconds for a token alone, the median of some measurements, and how loud others were in the
    loudest of these."""
    tokens = bench.random_tokens(model.n_vocab)
    logits, state = model.eval(0, None)

    def step() -> None:
        model.eval(next(tokens), state, state, logits)

    def timed() -> tuple[float, bench.Noise | None]:
        watch = bench.Watch()
        return bench.seconds_of(step), watch.read()

    results = bench.repeat(timed, lambda result: [result[1]], bench.REPETITIONS)
    results = results[: bench.REPETITIONS]
    noise = bench.loudest(noise for _, noise in results)
    return statistics.median(seconds for seconds, _ in results), noise


def formats_of(path: Path, text: str, library: RWKVSharedLibrary) -> list[str]:
    """The formats that are meant by "all" or a list with commas: those that a model can have, the
    one that it has first.

    Raises ValueError for others, RWKVFileError for a model that is quantized already.
    """
    header, _ = read_index(path)
    own = format_name_of(library, str(header.data_type))
    if own not in DATA_TYPES:
        raise RWKVFileError(
            f"{path}: is quantized, in {own}: expected an FP32 or FP16 model, or a checkpoint, "
            "which the formats can be made of"
        )
    possible = [own, *(name for name in file_formats() if name not in DATA_TYPES)]
    if text.lower() == "all":
        return possible
    wanted = {known_format(word.strip()) for word in text.split(",")}
    if impossible := wanted.difference(possible):
        raise ValueError(
            f"{path} is in {own} and cannot be turned into {', '.join(sorted(impossible))} "
            f"(choose from {', '.join(possible)})"
        )
    return [name for name in possible if name in wanted]


# ---- What is shown -------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], base_format: str) -> str:
    """A table, and below it what it was measured on."""
    lines = [
        f"| format | bytes | loss | change from {base_format} | KL divergence | largest KL | "
        "top-1 | tokens/s | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        other = row.comparison
        cells = [
            row.format_name,
            f"{row.n_bytes:,}",
            _with_error(row.perplexity.loss_per_token),
            _with_error(other.loss_difference, sign="+"),
            _with_error(other.divergence),
            f"{other.max_divergence:.2g}",
            f"{other.agreement.value:.2%}",
            f"{1 / row.seconds:,.0f}" if row.seconds < 0.1 else f"{1 / row.seconds:.1f}",
            megabytes(row.memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    quality = rows[0].perplexity
    lines += [
        "",
        f"{quality.n_scored:,} tokens ({quality.n_bytes:,} bytes); loss in nats per token, "
        f"± one standard error; decoding on {bench.cpu_name()}.",
    ]
    lines += [
        f"{row.format_name}: disturbed, others had up to {row.noise:.1%} of the CPUs' time."
        for row in rows
        if row.noise > bench.QUIET
    ]
    return "\n".join(lines)


def _with_error(mean: Mean, sign: str = "") -> str:
    """As many digits as the error is worth."""
    if math.isnan(mean.error):
        return f"{mean.value:{sign}.5f}"
    if mean.error == 0:
        return f"{mean.value:.5g}"
    digits = max(1 - math.floor(math.log10(mean.error)), 0)
    if digits > 6:
        return f"{mean.value:{sign}.2e} ± {mean.error:.1e}"
    return f"{mean.value:{sign}.{digits}f} ± {mean.error:.{digits}f}"


def for_json(rows: Sequence[Row], base_format: str) -> dict[str, Any]:
    return {
        "cpu": bench.cpu_name(),
        "base": base_format,
        "formats": [
            {
                "format": row.format_name,
                "file_bytes": row.n_bytes,
                "memory": row.memory,
                "decoded_tokens_per_second": 1 / row.seconds,
                "noise": row.noise,
            }
            | members(figures(row.perplexity))
            for row in rows
        ],
    }


def draw(path: Path, rows: Sequence[Row], base_format: str) -> None:
    """Write a PNG: divergence and change of the loss against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, row in enumerate(rows):
        look = {"color": f"C{number % 10}", "marker": "osD^v"[number % 5], "label": row.format_name}
        other = row.comparison
        for axes, mean in ((upper, other.divergence), (lower, other.loss_difference)):
            if axes is upper and mean.value <= 0:  # has no place on a logarithmic axis
                continue
            error = 0 if math.isnan(mean.error) else mean.error
            axes.errorbar(
                row.n_bytes / 1e6,
                mean.value,
                error,
                linestyle="none",
                markersize=5,
                capsize=3,
                **look,
            )
    upper.set(yscale="log", ylabel=f"KL divergence from {base_format}, nats")
    lower.set(ylabel="change of the loss, nats per token", xlabel="file, MB")
    lower.axhline(0, color="gray", linewidth=0.8)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.margins(0.1)
    lower.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- The command ---------------------------------------------------------------------------------


@click.command()
@click.argument("model")
@click.argument("text", type=click.Path(path_type=Path))
@click.option(
    "--formats",
    "wanted",
    metavar="FORMAT,…",
    default="all",
    show_default=True,
    help="Those to compare.",
)
@text_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@bench.plot_option("Also draw quality against bytes to this PNG file.")
@load_options
def command(
    model: str,
    text: Path,
    wanted: str,
    is_documents: bool,
    skip: int,
    limit: int | None,
    threads: int | None,
    vocabulary: Path | None,
    as_json: bool,
    picture: Path | None,
    options: dict[str, Any],
) -> None:
    """Make a table of what a model loses and gains in each format.

    MODEL is an FP32 or FP16 model, a checkpoint, which is taken as FP16, or a name from `rwkv pull
    --list`. TEXT is a file in UTF-8, or - for stdin: see `rwkv perplexity --help`. The formats are
    written to a temporary folder (TMPDIR), compared with MODEL token by token, and removed.

    \b
    rwkv compare model.bin book.txt --limit 10000
    rwkv compare model.bin book.txt --formats Q4_0,Q5_1,Q8_0 --plot formats.png
    """
    library = load_rwkv_shared_library()
    with progress_bar() as progress:
        path = find_model(model, None, progress)
        formats = formats_of(path, wanted, library)
        texts = read_texts(text, is_documents)
        header, _ = read_index(path)
        tokenizer = load_tokenizer(header.n_vocab, vocabulary, path)
        documents = first_tokens([tokenizer.encode(part) for part in texts], limit)
        rows = list(
            compare(
                path,
                tokenizer,
                documents,
                formats,
                skip=skip,
                threads=threads,
                progress=progress,
                library=library,
                **options,
            )
        )
    base_format = format_name_of(library, str(header.data_type))
    if picture is not None:
        draw(picture, rows, base_format)
    shown = for_json(rows, base_format)
    click.echo(json.dumps(shown) if as_json else markdown(rows, base_format))
