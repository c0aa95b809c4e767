"""A model with LoRAs in it, in float64: for each matrix W of (rows, cols) that a LoRA has two
factors for, A (rank, cols) and B (rows, rank), it is W + alpha / rank * B @ A. A tensor that a LoRA
has whole comes in place of the model's.

Written down as Blealtan's merge_lora.py goes, from the model's side: for each tensor of the model,
what has the LoRA for it?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Tensors = Mapping[str, np.ndarray]


def merge(
    model: Tensors, loras: Sequence[tuple[Tensors, float]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors as model files hold them, and the sums of the magnitudes of all that went into
    each number: rounding errors are in proportion to those."""
    values, magnitudes = {}, {}
    for name, tensor in model.items():
        total = tensor.astype(np.float64)
        magnitude = np.abs(total)
        for lora, alpha in loras:
            if name in lora:
                total = in_file(name, lora[name])
                magnitude = np.abs(total)
            module = name.removesuffix(".weight")
            for suffix in ("", ".weight"):
                if f"{module}.lora_A{suffix}" in lora:
                    a = lora[f"{module}.lora_A{suffix}"].astype(np.float64)
                    b = lora[f"{module}.lora_B{suffix}"].astype(np.float64)
                    scale = alpha / b.shape[1]
                    total = total + scale * (b @ a)
                    magnitude = magnitude + abs(scale) * (np.abs(b) @ np.abs(a))
        values[name], magnitudes[name] = total, magnitude
    return values, magnitudes


def in_file(name: str, tensor: np.ndarray) -> np.ndarray:
    tensor = tensor.astype(np.float64)
    if ".time_" in name:
        tensor = tensor.ravel()
    return -np.exp(tensor) if "time_decay" in name else tensor
