"""State tuning: only the state before the first token learns, the network stays as it is."""

import torch
from torch import Tensor, nn

from .network import Past


class InitialState(nn.Module):
    """What a network remembers before it has read anything, as one parameter.

    An empty past cannot learn: it weighs nothing, and its gradient is nothing. So learning begins
    at `past`, what some sequences (batch, …) have left in each layer, or the mean of it.
    """

    def __init__(self, past: list[Past]) -> None:
        super().__init__()
        means = [torch.stack([part.mean(0) for part in layer]) for layer in past]
        self.rows = nn.Parameter(torch.stack(means).detach())  # (n_layer, as of a Past, n_embed)

    def past(self, batch: int) -> list[Past]:
        """The same start for each of `batch` sequences."""
        return [Past(*(row.expand(batch, -1) for row in layer)) for layer in self.rows]

    def tensors(self) -> dict[str, Tensor]:
        """As in a file of layout "state-tuned", see docs/states.md.

        One token of key k and value v is aa = v, bb = 1, pp = k.
        """
        result = {}
        for i, layer in enumerate(self.rows.detach()):
            past = Past(*layer)
            state = (past.att_input, past.value, torch.ones_like(past.value), past.key)
            result[f"blocks.{i}.att.time_state"] = torch.stack(state)
            result[f"blocks.{i}.ffn.time_state"] = past.ffn_input.clone()
        return result
