"""The `rwkv merge-lora` command. What a LoRA is, is in lora.py."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from .atomic import refuse_same_file
from .ggmf import FP16, Record, Writer, read_plain_model, read_tensor
from .lora import Product, Replacement, Step, plan
from .progress import Progress, progress_bar
from .weights import check_finite, half, some


@dataclass(frozen=True)
class Merged:
    """The tensors of the model that were changed, in its order, and the keys that found none."""

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    unused: tuple[str, ...]


def merge_lora(
    source: Path,
    loras: Sequence[tuple[Path, float]],
    target: Path,
    *,
    key: str | None = None,
    clamp: bool = False,
    ignore_unused: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write the FP32 or FP16 model `source` with LoRAs in it, each tensor in the type that it has.

    loras:         checkpoints, each with its alpha, merged one after the other in float32: of whole
                   tensors the last one counts. A warning says where that undoes something.
    key:           which dictionary of the LoRAs, see `open_checkpoint`.
    clamp:         values beyond the range of FP16 become its largest value; otherwise an error.
    ignore_unused: go on where a LoRA has tensors that the model does not have.
    progress:      called with the bytes done and the bytes in all.

    `target` appears, or replaces an older file, only when it is complete. Raises RWKVFileError for
    a source that is quantized or no model, for LoRAs that do not fit it and for values that are not
    finite, ValueError for wrong arguments, OSError for the disk's failures.
    """
    if not loras:
        raise ValueError("no LoRA to merge")
    for path, _ in loras:
        refuse_same_file(path, target)
    refuse_same_file(source, target)
    header, records = read_plain_model(
        source, "merge into the model before it was quantized, and quantize the result"
    )
    with contextlib.ExitStack() as stack:
        shapes = {record.key: record.shape for record in records}
        steps, unused = plan(stack, loras, shapes, key=key, ignore_unused=ignore_unused)
        total = sum(record.nbytes for record in records)
        done = 0
        with Writer(target, header) as writer:
            for record in records:
                array: np.ndarray = read_tensor(source, record)
                if steps[record.key]:
                    array = _merged(source, record, array, steps[record.key], clamp)
                writer.write(record.key, record.data_type, array)
                done += record.nbytes
                if progress:
                    progress("merging", done, total)
    return Merged(
        tuple(name for name in steps if any(isinstance(s, Product) for s in steps[name])),
        tuple(name for name in steps if any(isinstance(s, Replacement) for s in steps[name])),
        tuple(unused),
    )


def _merged(
    source: Path,
    record: Record,
    array: np.ndarray,
    steps: Sequence[Step],
    clamp: bool,
) -> np.ndarray:
    where = f"{source}: {record.key}"
    array = array.astype(np.float32)
    check_finite(where, array)
    for step in steps:
        if isinstance(step, Product):
            _add(array, step)
        else:
            array = step.values()
    check_finite(f"{where} with the LoRA", array)
    return half(f"{where} with the LoRA", array, clamp) if record.data_type == FP16 else array


def _add(weights: np.ndarray, product: Product) -> None:
    a, b = product.factors()
    with np.errstate(over="ignore", invalid="ignore"):  # the sum is checked
        delta = np.matmul(b, a)
        delta *= np.float32(product.scale)
        # Where nothing is added, a weight of -0 stays one.
        np.add(weights, delta, out=weights, where=delta != 0)


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("lora", metavar="LORA", type=click.Path(path_type=Path))
@click.argument("alpha", metavar="ALPHA", type=float)
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
@click.option(
    "--also",
    metavar="LORA ALPHA",
    type=(click.Path(path_type=Path), float),
    multiple=True,
    help="Merge this one then, too; may be given several times.",
)
@click.option("--key", metavar="NAME", help="Which dictionary or prefix of a LoRA has the weights.")
@click.option("--ignore-unused", is_flag=True, help="Leave out what SRC has no tensors for.")
@click.option("--clamp", is_flag=True, help="Clamp values beyond the range of FP16.")
def command(
    source: Path,
    lora: Path,
    alpha: float,
    target: Path,
    also: tuple[tuple[Path, float], ...],
    key: str | None,
    ignore_unused: bool,
    clamp: bool,
) -> None:
    """Merge what a LoRA has learned into a model.

    SRC is an FP32 or FP16 model file, LORA a checkpoint of RWKV-LM-LoRA (.pth, or its tensors as
    .safetensors), ALPHA the number that it was trained with (--lora_alpha); another one makes it
    weaker or stronger, a negative one (with -- before SRC) takes it away again. DEST has the types
    of SRC; it appears, or replaces an older file, only when it is complete.

    \b
    rwkv merge-lora model.bin lora.pth 32 merged.bin
    rwkv merge-lora model.bin lora.pth 32 merged.bin --also poems.pth 16
    """
    with progress_bar() as progress:
        merged = merge_lora(
            source,
            [(lora, alpha), *also],
            target,
            key=key,
            clamp=clamp,
            ignore_unused=ignore_unused,
            progress=progress,
        )
    for what, names in (("added to", merged.added), ("replaced", merged.replaced)):
        kinds = Counter(re.sub(r"^blocks\.\d+\.", "", name) for name in names)
        for kind, count in kinds.items():
            click.echo(f"{what:<10}{count:>4} x {kind}")
    if merged.unused:
        click.echo(f"left out  {some(merged.unused)}")
    click.echo(f"{target}: {target.stat().st_size:,} bytes")
