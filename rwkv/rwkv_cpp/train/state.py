"""State tuning: only the state before the first token learns, the network stays as it is."""

import torch
from torch import Tensor, nn

from .learner import Learner
from .network import Network, Past


class InitialState(Learner):
    """A network of which nothing learns but what it remembers before it has read anything.

    An empty past cannot learn: it weighs nothing, and its gradient is nothing. So learning begins
    at the mean of what the sequences `tokens`, (batch, length), leave in each layer.
    """

    carries_past = False

    def __init__(self, network: Network, tokens: Tensor) -> None:
        super().__init__(network.requires_grad_(False))
        with torch.no_grad():
            _, past = network(tokens, network.empty_past(len(tokens)))
        means = [torch.stack([part.mean(0) for part in layer[:-1]]) for layer in past]
        self.rows = nn.Parameter(torch.stack(means))  # (n_layer, vectors of a Past, n_embed)

    def past(self, batch: int) -> list[Past]:
        return [
            Past(*[*(row.expand(batch, -1) for row in layer), empty.tiny])
            for layer, empty in zip(self.rows, super().past(batch), strict=True)
        ]

    def rotated(self) -> set[str]:
        return set()

    def tensors(self) -> dict[str, Tensor]:
        """As in a file of the layout "state-tuned", see docs/states.md.

        A past that weighs like one token of key k and value v is aa = v, bb = 1, pp = k.
        """
        result = {}
        for i, layer in enumerate(self.rows.detach()):
            att_input, ffn_input, key, value = layer
            state = (att_input, value, torch.ones_like(value), key)
            result[f"blocks.{i}.att.time_state"] = torch.stack(state)
            result[f"blocks.{i}.ffn.time_state"] = ffn_input.clone()
        return result
