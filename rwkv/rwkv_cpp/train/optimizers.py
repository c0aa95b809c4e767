"""What turns gradients into steps, and how fast."""

from __future__ import annotations

import math

import torch

from .learner import Learner

MUON_SHARE = 4.0  # Muon's learning rate; AdamW's is 1


def make_optimizers(
    learner: Learner, kind: str, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for all that learns, or Muon ("muon") for matrices between activations and AdamW for
    the rest. The matrices of layers decay. Vectors are gates, rates and scales with no pull to
    zero; in the embedding and the head, tokens that do not occur would lose what tells them apart.

    A group's "share" is its part of the learning rate.
    """
    learning = learner.learning()
    rotated = learner.rotated() if kind == "muon" else set()
    by_adamw = {name: p for name, p in learning.items() if name not in rotated}
    decaying = [name for name, p in by_adamw.items() if ".blocks." in name and p.dim() == 2]
    others = [p for name, p in by_adamw.items() if name not in decaying]
    groups = [
        {"params": [by_adamw[name] for name in decaying], "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group | {"share": 1.0} for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    ]
    if rotated:
        group = {"params": [learning[name] for name in sorted(rotated)], "share": MUON_SHARE}
        optimizers.append(
            torch.optim.Muon(
                [group], weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def learning_rate(step: int, steps: int, warmup: int, highest: float, last: float) -> float:
    """A line from zero to `highest` at the end of the warm-up, then a cosine to `last`."""
    warm = min(1.0, (step + 1) / max(warmup, 1))
    done = min(max(step - warmup, 0) / max(steps - warmup, 1), 1.0)
    return warm * (last + (highest - last) * 0.5 * (1 + math.cos(math.pi * done)))
