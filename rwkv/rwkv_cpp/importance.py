"""The `rwkv importance` command: which columns of a model's matrices matter, for quantizing.

A rounded weight does harm in proportion to what it is multiplied with. The mean square of that,
over the tokens of a text, is the importance of its column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from .atomic import refuse_same_file
from .ggmf import FP32, Header, Writer
from .load_options import model_option
from .model import Importances, RWKVModel, RWKVSequence, embedded_model
from .perplexity import first_tokens, text_options
from .scoring import chunks
from .texts import read_texts
from .tokenizer import load_tokenizer
from .weights import check_finite

_CHUNK = 1024  # tokens in one call


def collect(
    model: RWKVModel,
    documents: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], object] | None = None,
) -> Importances:
    """The importances of a model over some documents, each read from its beginning.

    progress: called with the tokens read so far.

    Raises ValueError if there is no token.
    """
    if not any(map(len, documents)):
        raise ValueError("the text is empty: importances need at least one token")
    importances = model.importances()
    state: Any = None
    for pieces in chunks([len(tokens) for tokens in documents], _CHUNK):
        sequences = [
            RWKVSequence(documents[number][start:end], state if start else None, n_logits=0)
            for number, start, end in pieces
        ]
        state = model.eval_batch(sequences, importances)[-1].state
        if progress is not None:
            progress(importances.n_tokens)
    return importances


def write_importances(path: Path, model: RWKVModel, importances: Importances) -> None:
    """Write a model file that has the importances of each matrix, under the matrix's name.

    The file appears, or replaces an older one, only when it is complete. Raises RWKVFileError for
    importances that are NaN or infinite.
    """
    header = Header(101, model.n_vocab, model.n_embed, model.n_layer, FP32)
    with Writer(path, header) as writer:
        for name, values in importances.means().items():
            with np.errstate(over="ignore"):
                array = values.astype(np.float32)
            check_finite(f"{path}: {name}", array, " (is the model damaged?)")
            writer.write(name, FP32, array)


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@model_option
@functools.partial(text_options, scores=False)
def command(
    text: Path,
    target: Path,
    model_path: Path | None,
    is_documents: bool,
    limit: int | None,
    threads: int | None,
    vocabulary: Path | None,
) -> None:
    """Measure which weights of a model matter, for quantizing.

    TEXT is a file in UTF-8, or - for stdin, of the kind that the model is for, and none that it is
    to be judged by. 10,000 tokens are plenty. The file OUT is for `rwkv quantize --importances`: of
    each column of each matrix the mean square of what it is multiplied with.

    \b
    rwkv importance book.txt model.importances -m model.bin --limit 20000
    rwkv quantize model.bin model-Q4_0.bin Q4_0 --importances model.importances
    """
    path = model_path or embedded_model()
    refuse_same_file(path, target)
    refuse_same_file(text, target)
    texts = read_texts(text, is_documents)
    with RWKVModel(None, path, threads) as model:
        tokenizer = load_tokenizer(model.n_vocab, vocabulary, path)
        documents = first_tokens([tokenizer.encode(part) for part in texts], limit)
        with tqdm(total=sum(map(len, documents)), unit="token", disable=None) as bar:
            importances = collect(model, documents, progress=lambda done: bar.update(done - bar.n))
        write_importances(target, model, importances)
    click.echo(
        f"{target}: {len(importances.squares)} matrices over {importances.n_tokens:,} tokens"
    )
