"""Turns a checkpoint of RWKV-4 or RWKV-4a into a model file: `rwkv convert SRC DEST [FORMAT]`.

The way back, which the command has too, is `export`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from .atomic import refuse_same_file
from .checkpoint import SUFFIXES, open_checkpoint, write_checkpoint
from .errors import RWKVFileError
from .export import export
from .ggmf import DATA_TYPES, DTYPES, FP16, FP32, LIMITS, Header, Writer, is_model_file
from .progress import counting_bar
from .weights import check_finite, half, shape_in_file, some, transform

FILE_VERSION = 101

# The tensors of RWKV-4 and their shapes: V = n_vocab, C = n_embed, F = width of channel mixing.
TENSORS = {
    "emb.weight": "VC",
    "blocks.0.ln0.weight": "C",
    "blocks.0.ln0.bias": "C",
    "ln_out.weight": "C",
    "ln_out.bias": "C",
    "head.weight": "VC",
}
BLOCK_TENSORS = {
    "ln1.weight": "C",
    "ln1.bias": "C",
    "ln2.weight": "C",
    "ln2.bias": "C",
    "att.time_decay": "C",
    "att.time_first": "C",
    "att.time_mix_k": "C",
    "att.time_mix_v": "C",
    "att.time_mix_r": "C",
    "att.key.weight": "CC",
    "att.value.weight": "CC",
    "att.receptance.weight": "CC",
    "att.output.weight": "CC",
    "ffn.time_mix_k": "C",
    "ffn.time_mix_r": "C",
    "ffn.key.weight": "FC",
    "ffn.receptance.weight": "CC",
    "ffn.value.weight": "CF",
}

# RWKV-4a has these too, of one of its blocks: D = width of its tiny attention.
TINY_TENSORS = {
    "tiny_ln.weight": "C",
    "tiny_ln.bias": "C",
    "tiny_q.weight": "DC",
    "tiny_k.weight": "DC",
    "tiny_v.weight": "CC",
}
MAX_TINY = 1 << 12  # of D
_TINY = re.compile(r"blocks\.(\d{1,9})\.tiny_")
_TINY_MASK = re.compile(r"blocks\.\d+\.tiny_mask")  # training's alone: no weights

# What names that RWKV-4 does not have say about a checkpoint; the first that is found counts.
_FOREIGN = (
    (r"\.lora_[AB]\b", "a LoRA, which 'rwkv merge-lora' merges into a model"),
    (r"\.ffn\.s_emb", "RWKV-7 with DeepEmbed"),
    (r"\.att\.(k_k|r_k|x_r)$", "RWKV-7"),
    (r"\.att\.time_maa_", "RWKV-6"),
    (r"\.att\.gate\.", "RWKV-5.2"),
    (r"\.att\.ln_x\.", "RWKV-5.1"),
    (r"\.att\.(qq|kk|vv|oo)\.", "RWKV-4 with a softmax attention in each block (my_testing a)"),
    (r"\.time_mix$", "RWKV-2"),
    (r"\.time_(w|ww|alpha|beta|gamma)$", "RWKV-1"),
    (r"\bpos_emb", "RWKV-4 with position embeddings (my_pos_emb)"),
    (r"\.ffnPre\.", "RWKV-4 with a feed-forward first block (pre_ffn)"),
    (r"\bhead_[qk]\b", "RWKV-4, RWKV-3 or RWKV-2 with a copying head (head_qk)"),
)
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")


def convert(
    source: Path,
    target: Path,
    data_type: str = "FP16",
    *,
    key: str | None = None,
    clamp: bool = False,
    allow_nan: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Header:
    """Write the weights of a checkpoint as "FP16" or "FP32"; `target` appears only when complete.

    Vectors are FP32 in either case. A target named `.pth` or `.safetensors` is such a checkpoint,
    with the names and shapes that the tensors have in `source`; any other name gets a model file.

    key:       which dictionary of the checkpoint, see `open_checkpoint`.
    clamp:     values beyond the range of FP16 become its largest value; otherwise an error.
    allow_nan: NaN and infinities are written as they are; otherwise an error.
    progress:  called with the elements done and the elements in all.

    Returns the header of the model file. Raises RWKVFileError if the checkpoint is not one of
    RWKV-4 or holds such values, ValueError for wrong arguments, OSError for the disk's failures.
    """
    if data_type not in DATA_TYPES:
        raise ValueError(f"unknown data type {data_type!r} (choose FP16 or FP32)")
    refuse_same_file(source, target)
    with open_checkpoint(source, key) as checkpoint:
        names = [name for name in checkpoint if not _TINY_MASK.fullmatch(name)]
        shapes = {name: checkpoint.shape(name) for name in names}
        try:
            sizes = check_tensors(shapes)
        except ValueError as error:
            raise RWKVFileError(f"{source}: {error}") from None
        header = Header(FILE_VERSION, *sizes, DATA_TYPES[data_type])
        types = {
            name: FP32 if _is_vector(name, shape) else header.data_type
            for name, shape in shapes.items()
        }
        total = sum(math.prod(shape) for shape in shapes.values())
        done = 0

        def read(name: str, transformed: bool = False) -> np.ndarray:
            nonlocal done
            where = f"{source}: {name}"
            array = checkpoint.read(name)
            if not allow_nan:
                check_finite(where, array, " (--allow-nan keeps them)")
            if transformed:
                array = transform(where, name, array, allow_nan)
            if types[name] == FP16:
                array = half(where, array, clamp)
            done += array.size
            if progress:
                progress(done, total)
            return array

        if target.suffix in SUFFIXES:
            layout = {name: (DTYPES[types[name]], shape) for name, shape in shapes.items()}
            write_checkpoint(target, layout, read)
        else:
            with Writer(target, header) as writer:
                for name in names:
                    writer.write(name, types[name], read(name, transformed=True))
    return header


def check_tensors(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Return n_vocab, n_embed and n_layer of the RWKV-4 or 4a model with tensors of these shapes.

    Raises ValueError, naming the tensors, if they belong to another architecture, if some are
    missing or unknown, or if they do not fit together.
    """
    for pattern, what in _FOREIGN:
        foreign = next((name for name in shapes if re.search(pattern, name)), None)
        if foreign:
            raise ValueError(f"'{foreign}' belongs to {what}; only RWKV-4 and 4a can be converted")
    if "emb.weight" not in shapes:
        raise ValueError(f"'emb.weight' is missing; {_what_there_is(shapes)}")
    present = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    n_layer = max(present, default=0) + 1
    if n_layer > LIMITS["n_layer"]:
        raise ValueError(f"{n_layer} layers, expected at most {LIMITS['n_layer']}")

    tensors = TENSORS | {
        f"blocks.{i}.{name}": letters
        for i in range(n_layer)
        for name, letters in BLOCK_TENSORS.items()
    }
    tiny = sorted({int(match[1]) for name in shapes if (match := _TINY.match(name))})
    if len(tiny) > 1:
        raise ValueError(f"blocks {some([*map(str, tiny)])} have a tiny attention, RWKV-4a has one")
    tensors |= {
        f"blocks.{i}.{name}": letters for i in tiny for name, letters in TINY_TENSORS.items()
    }
    missing = [name for name in tensors if name not in shapes]
    if missing:
        gaps = tuple(f"blocks.{i}." for i in range(n_layer) if i not in present)
        names = [f"{gap}*" for gap in gaps] + [n for n in missing if not n.startswith(gaps)]
        raise ValueError(f"of a model of {n_layer} layers are missing: {some(names)}")
    unknown = [name for name in shapes if name not in tensors]
    if unknown:
        raise ValueError(f"RWKV-4 has no such tensors: {some(unknown)}")
    decay = shapes["blocks.0.att.time_decay"]
    if len(decay) == 2 and decay[0] > 1 == decay[1]:
        raise ValueError(
            f"'blocks.0.att.time_decay' is {decay[0]} x 1, expected {decay[0]}: this is RWKV-3, "
            "only RWKV-4 and 4a can be converted"
        )

    sizes: dict[str, int] = {}
    for name, letters in tensors.items():
        _check_shape(name, shapes[name], letters, sizes)
    if sizes.get("D", 0) > MAX_TINY:
        raise ValueError(f"the tiny attention is {sizes['D']} wide, expected at most {MAX_TINY}")
    return sizes["V"], sizes["C"], n_layer


def _check_shape(name: str, shape: tuple[int, ...], letters: str, sizes: dict[str, int]) -> None:
    """Compare a shape with its letters; the first tensor that has a letter says what it means."""
    shape = shape_in_file(name, shape)
    fits = len(shape) == len(letters)
    for letter, n in zip(letters, shape, strict=False):
        fits = fits and n > 0 and sizes.setdefault(letter, n) == n
    if not fits:
        expected = " x ".join(str(sizes.get(letter, letter)) for letter in letters)
        found = " x ".join(map(str, shape)) or "a scalar"
        raise ValueError(f"'{name}' is {found}, expected {expected}")


def _is_vector(name: str, shape: tuple[int, ...]) -> bool:
    return ".time_" in name or len(shape) == 1


def _what_there_is(names: Iterable[str]) -> str:
    """Where the weights may be, for a checkpoint that has none of them under the right name."""
    for name in names:
        prefix = name.removesuffix(".emb.weight")
        if prefix != name:
            return (
                f"the names begin with '{prefix}.', "
                f"which --key {prefix} (or NAME/{prefix}) takes away"
            )
    return f"there are {some(list(names))}"


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
@click.argument(
    "data_type",
    metavar="[FORMAT]",
    default="float16",
    type=click.Choice(["float16", "float32", "FP16", "FP32"], case_sensitive=False),
)
@click.option("--key", metavar="NAME", help="Which dictionary or prefix of SRC has the weights.")
@click.option("--clamp", is_flag=True, help="Clamp values beyond the range of FP16.")
@click.option("--allow-nan", is_flag=True, help="Pass NaN and infinite weights on.")
def command(
    source: Path, target: Path, data_type: str, key: str | None, clamp: bool, allow_nan: bool
) -> None:
    """Convert a checkpoint of RWKV-4 or 4a to a model file, or back.

    What SRC is, is seen from its content: a PyTorch (.pth) or safetensors checkpoint, or a model
    file. What DEST becomes is said by its name: a checkpoint if that ends in .pth or .safetensors,
    otherwise a model file. A quantized model file is dequantized. FORMAT is float16 (the default)
    or float32. DEST appears, or replaces an older file, only when it is complete.

    \b
    rwkv convert RWKV-4-Pile-169M-20220807-8023.pth rwkv-169M.bin float16
    rwkv convert rwkv-169M.bin rwkv-169M.pth
    """
    with counting_bar(" weights") as progress:
        name = data_type.upper().replace("FLOAT", "FP")
        options: dict[str, Any] = {"clamp": clamp, "allow_nan": allow_nan, "progress": progress}
        if not is_model_file(source):
            header = convert(source, target, name, key=key, **options)
        elif key is None:
            header = export(source, target, name, **options)
        else:
            raise ValueError(f"--key {key}: '{source}' is a model file, which has no dictionaries")
    click.echo(
        f"{target}: {target.stat().st_size:,} bytes, {header.n_layer} layers of {header.n_embed}, "
        f"vocabulary of {header.n_vocab}"
    )
