"""What becomes of the weights of RWKV-4 between a checkpoint and a model file.

`where` in these functions is what an error names: the file and the tensor.
"""

import math
from collections.abc import Sequence

import numpy as np

from .errors import RWKVFileError

_LARGEST_HALF = 65504
_SMALLEST_DECAY = -104.0  # from here on down exp(w) is 0 in float32


def shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Vectors that checkpoints hold as (1, 1, C), which time_mix_* are in every one, are (C,)."""
    return shape[-1:] if ".time_" in name and shape[:-1] == (1, 1) else shape


def transform(where: str, name: str, array: np.ndarray, allow_nan: bool = False) -> np.ndarray:
    """A float32 tensor of a checkpoint as model files hold it: time_decay is -exp(w) there."""
    array = array.reshape(shape_in_file(name, array.shape))
    if not name.endswith(".time_decay"):
        return array
    with np.errstate(over="ignore"):
        array = (-np.exp(array.astype(np.float64))).astype(np.float32)  # rounded once
    if not allow_nan:
        check_finite(f"{where} as -exp(w)", array)
    return array


def shape_in_checkpoint(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that released checkpoints have for a tensor of a model file."""
    return (1, 1, *shape) if ".time_mix_" in name else shape


def restore(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """A float32 tensor of a model file as checkpoints hold it: time_decay is w there, not -exp(w).

    Where the file was made from a float32 w, `transform` gives the same file again; w itself may
    differ in its last bits if it lies between -1 and 1, where -exp(w) has fewer of them.
    """
    array = array.reshape(shape_in_checkpoint(name, array.shape))
    if not name.endswith(".time_decay"):
        return array
    positive = np.count_nonzero(array > 0)
    if positive:
        raise RWKVFileError(
            f"{where}: {positive} of {array.size} values are above 0, expected -exp(w)"
        )
    with np.errstate(divide="ignore"):
        w = np.log(-array.astype(np.float64))
    return np.where(array == 0, _SMALLEST_DECAY, w).astype(np.float32)  # rounded once


def check_finite(where: str, array: np.ndarray, advice: str = "") -> None:
    """Raise RWKVFileError if a value is NaN or infinite. advice: what its text ends with."""
    if math.isfinite(array.min()) and math.isfinite(array.max()):  # both are NaN if one value is
        return
    count = array.size - np.count_nonzero(np.isfinite(array))
    raise RWKVFileError(f"{where}: {count} of {array.size} values are NaN or infinite{advice}")


def half(where: str, array: np.ndarray, clamp: bool) -> np.ndarray:
    """Round to float16, to nearest even.

    clamp: finite values beyond its range become its largest; otherwise they raise RWKVFileError.
    """
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16)
    # From 65520 on, half way to the next power of two, numbers round to infinity.
    if array.min() > -65520 and array.max() < 65520:
        return rounded
    beyond = np.isinf(rounded) & np.isfinite(array)
    count = np.count_nonzero(beyond)
    if count and not clamp:
        raise RWKVFileError(
            f"{where}: {count} of {array.size} values are beyond {_LARGEST_HALF}, the largest of "
            "FP16; keep the model in FP32, or --clamp them"
        )
    rounded[beyond] = np.copysign(_LARGEST_HALF, rounded[beyond])
    return rounded


def some(names: Sequence[str]) -> str:
    """The first names of tensors and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
