"""What a run trains: a network, and which of its parameters learn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..atomic import replacing
from ..checkpoint import open_checkpoint
from ..convert import check_tensors
from ..errors import RWKVFileError
from ..weights import check_finite
from .network import Network, Past


class Learner(nn.Module):
    """A network all of whose parameters learn. Others learn less and override what differs.

    A parameter that needs no gradient stays as it is; it is neither averaged nor in checkpoints of
    the run.
    """

    carries_past = True  # over the windows of the held-out text, or does each begin anew?

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, tokens: Tensor, past: list[Past], precision: torch.dtype | None = None
    ) -> tuple[Tensor, list[Past]]:
        """As `Network.forward`."""
        return self.network(tokens, past, precision)

    def past(self, batch: int) -> list[Past]:
        """What `batch` sequences begin with."""
        return self.network.empty_past(batch)

    def learning(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def rotated(self) -> set[str]:
        """The names of the matrices that Muon may train: they map activations to activations."""
        return {name for name, p in self.learning().items() if ".blocks." in name and p.dim() == 2}

    def tensors(self) -> dict[str, Tensor]:
        """What was learned, here the whole network as released checkpoints hold one."""
        return self.network.state_dict()

    def save(self, path: Path) -> None:
        with replacing(path) as file:
            torch.save({name: t.cpu() for name, t in self.tensors().items()}, file)


def read_network(path: Path, dropout: float) -> Network:
    """The network of a released checkpoint, .pth or .safetensors, in float32.

    Raises RWKVFileError if it is not a sound one of RWKV-4.
    """
    with open_checkpoint(path) as checkpoint:
        names = [name for name in checkpoint if not name.endswith(".tiny_mask")]  # no weights
        shapes = {name: checkpoint.shape(name) for name in names}
        try:
            n_vocab, n_embed, n_layer = check_tensors(shapes)
        except ValueError as error:
            raise RWKVFileError(f"{path}: {error}") from None
        tiny = {"tiny_dim": 0}
        for i in range(n_layer):
            if query := shapes.get(f"blocks.{i}.tiny_q.weight"):
                tiny = {"tiny_dim": query[0], "tiny_layer": i}
        n_ffn = shapes["blocks.0.ffn.key.weight"][0]
        with torch.device("meta"):
            network = Network(n_vocab, n_layer, n_embed, dropout, n_ffn=n_ffn, **tiny)
        weights = {}
        for name, parameter in network.state_dict().items():
            array = checkpoint.read(name)
            check_finite(f"{path}: {name}", array)
            weights[name] = torch.from_numpy(array.reshape(parameter.shape))
    network.load_state_dict(weights, assign=True)
    return network
