"""`rwkvstic.load`: a model from a path or an address."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from ...errors import RWKVFileError
from ...rwkv import RWKV as Model
from ..opening import model_file
from ..rwkv.strategy import format_of
from .agnostic.backends import BACKENDS
from .rwkvMaster import RWKVMaster

# Files with weights that were made ready for one engine.
PREPARED = (".pqth", ".jax.npy", ".tflite", ".onnx", ".ort", ".rwkv")

# By the name of a type, numpy's or torch's.
FORMATS = {"float64": "FP32", "float32": "FP32", "float16": "FP16", "bfloat16": "FP16"}


def RWKV(
    path: str | os.PathLike[str] | None = None,
    mode: str | None = None,
    *,
    backend: str | None = None,
    tokenizer: str | Path | None = None,
    strategy: str | None = None,
    dtype: Any = None,
    runtimedtype: Any = None,
    useGPU: bool = False,
    target: float | None = None,
    pinMem: bool = False,
    chunksize: int | None = None,
) -> RWKVMaster:
    """Load a model.

    path: a checkpoint or a model file, the address of one, or a name that `rwkv pull` knows; None:
    the embedded model.
    mode, backend: the same, one of `agnostic.backends`. dtype: of the weights, torch's, numpy's or
    its name. strategy: as ChatRWKV writes it. tokenizer: a vocabulary file.
    target, chunksize: have no effect; matrices stay in the mapped file.

    Warns once of all that is not done on a CPU. Raises ValueError for an unknown backend, dtype or
    strategy, RWKVFileError for a file that was prepared for another engine.
    """
    for suffix in PREPARED:
        if path is not None and os.fspath(path).endswith(suffix):
            raise RWKVFileError(
                f"'{path}': a {suffix} file holds weights that were prepared for another engine:"
                " load the .pth that it was made from (`rwkv quantize` makes its 8 bits)"
            )
    format, refused = None, []
    if dtype is not None:
        format = _format_of_type(dtype)
    if name := mode or backend:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r} (choose from {', '.join(BACKENDS)})")
        of_backend, is_done = BACKENDS[name]
        format = of_backend or format
        if not is_done:
            refused.append(name)
    if strategy is not None:
        format = format_of(strategy)
    if runtimedtype is not None and _type_name(runtimedtype) != "float32":
        refused.append(f"runtimedtype={_type_name(runtimedtype)}")
    refused += [what for what, asked in (("useGPU", useGPU), ("pinMem", pinMem)) if asked]
    if refused:
        warnings.warn(
            f"{', '.join(refused)}: this engine computes on the CPU, in float32", stacklevel=2
        )
    return RWKVMaster(Model(model_file(path, format), vocabulary=tokenizer))


def _type_name(dtype: Any) -> str:
    """torch.float32, numpy.float32, numpy.dtype("float32") and "float32": all are "float32"."""
    return getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")


def _format_of_type(dtype: Any) -> str:
    name = _type_name(dtype)
    if name not in FORMATS:
        raise ValueError(f"dtype {name}: choose from {', '.join(FORMATS)}")
    return FORMATS[name]
