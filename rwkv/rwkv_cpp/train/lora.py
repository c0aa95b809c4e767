"""LoRA: thin matrices learn beside those of a network, which stay as they are.

For a matrix W the tuned one is W + alpha / rank · B A, where A is (rank, columns) and B
(rows, rank). Which tensors learn, what they are called and how they begin is as in Blealtan's
RWKV-LM-LoRA, so that a file of the learned ones is one that its tools and `rwkv merge-lora` read.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .learner import Learner
from .network import Network

# att and ffn: matrices that get a pair A, B (not att.output). time and ln: a part of the names of
# tensors that learn as a whole; ln_out is not among them, no file of that format has it.
MATRICES = {"att": ("key", "value", "receptance"), "ffn": ("key", "receptance", "value")}
WHOLE = {"time": ".time_", "ln": ".ln"}
PARTS = (*MATRICES, *WHOLE)


class LowRank(nn.Module):
    """A matrix with a pair A, B beside it, in the place and under the name of an nn.Linear."""

    def __init__(self, matrix: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = matrix.weight
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, matrix.in_features))
        self.lora_B = nn.Parameter(torch.zeros(matrix.out_features, rank))  # changes nothing yet
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """In the precision of x, as a Matrix."""
        rows = x.flatten(0, -2)
        wide = F.linear(rows, self.weight.to(x.dtype))
        narrow = F.linear(rows, self.lora_A.to(x.dtype))
        result = torch.addmm(wide, narrow, self.lora_B.to(x.dtype).t(), alpha=self.scale)
        return result.view(*x.shape[:-1], -1)


class LoRA(Learner):
    """A network of which nothing learns but pairs beside its matrices, and tensors as a whole.

    parts: some of PARTS; ValueError for others.
    """

    def __init__(
        self, network: Network, rank: int, alpha: float, parts: Collection[str] = PARTS
    ) -> None:
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise ValueError(
                f"--lora-parts: {', '.join(unknown)!r}, expected some of {', '.join(PARTS)}"
            )
        super().__init__(network.requires_grad_(False))
        for block in network.blocks:
            for part, names in MATRICES.items():
                if part in parts:
                    module = getattr(block, part)
                    for name in names:
                        setattr(module, name, LowRank(getattr(module, name), rank, alpha))
        marks = [mark for part, mark in WHOLE.items() if part in parts]
        for name, parameter in network.named_parameters():
            if any(mark in name for mark in marks):
                parameter.requires_grad_(True)

    def rotated(self) -> set[str]:
        return set()

    def tensors(self) -> dict[str, Tensor]:
        """What was learned, under the names of Blealtan's format."""
        prefix = "network."
        return {name.removeprefix(prefix): p.detach() for name, p in self.learning().items()}
