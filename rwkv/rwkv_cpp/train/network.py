"""RWKV-4 and 4a as a torch module: the same function as the C core's, parallel over a sequence.

Read from the bottom: `Network` is the model, a `Block` one layer of it, `wkv` (recurrence.py) what
makes it an RNN. Attribute names are chosen so that `state_dict()` is a released checkpoint.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .passes import dropout, squared_relu, token_mixes
from .recurrence import linear_attention, wkv

NO_WEIGHT = -1e30  # the log weight of an empty past; exp() of it is 0 and its gradient too


class Past(NamedTuple):
    """What one layer remembers, each (batch, channels) but the last.

    The core keeps a running numerator, denominator and exponent (aa, bb, pp). Here the same three
    numbers are two: all that came before weighs like one token of key `key` = pp + log bb and
    value `value` = aa / bb.
    """

    att_input: Tensor
    ffn_input: Tensor
    key: Tensor
    value: Tensor
    tiny: Tensor  # (batch, width, channels), of RWKV-4a's attention; of width 0 in other layers


class TimeMix(nn.Module):
    def __init__(self, layer: int, n_layer: int, n_embed: int) -> None:
        super().__init__()
        depth = layer / max(n_layer - 1, 1)  # 0 in the first layer, 1 in the last
        channel = torch.arange(n_embed)
        ramp = (channel / n_embed).view(1, 1, -1)
        height = 1 - layer / n_layer
        spread = channel / max(n_embed - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * spread ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.time_mix_k = nn.Parameter(ramp**height)
        self.time_mix_v = nn.Parameter(ramp**height + 0.3 * depth)
        self.time_mix_r = nn.Parameter(ramp ** (0.5 * height))
        self.key = matrix(n_embed, n_embed, 0)
        self.receptance = matrix(n_embed, n_embed, 0)
        self.value = matrix(n_embed, n_embed)
        self.output = matrix(n_embed, n_embed, 0)

    def forward(self, x: Tensor, before: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        mixes = (self.time_mix_k, self.time_mix_v, self.time_mix_r)
        x_k, x_v, x_r = token_mixes(x, before, *mixes)
        k, v, r = self.key(x_k), self.value(x_v), torch.sigmoid(self.receptance(x_r))
        average, key, value = wkv(self.time_decay, self.time_first, k, v, key, value)
        return self.output(r * average), key, value


class ChannelMix(nn.Module):
    def __init__(self, layer: int, n_layer: int, n_embed: int, n_ffn: int) -> None:
        super().__init__()
        ramp = (torch.arange(n_embed) / n_embed).view(1, 1, -1) ** (1 - layer / n_layer)
        self.time_mix_k = nn.Parameter(ramp.clone())
        self.time_mix_r = nn.Parameter(ramp.clone())
        self.key = matrix(n_embed, n_ffn)
        self.receptance = matrix(n_embed, n_embed, 0)
        self.value = matrix(n_ffn, n_embed, 0)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        x_k, x_r = token_mixes(x, before, self.time_mix_k, self.time_mix_r)
        return torch.sigmoid(self.receptance(x_r)) * self.value(squared_relu(self.key(x_k)))


class Matrix(nn.Linear):
    """A linear map in the precision of its input; its weights are kept in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def matrix(inputs: int, outputs: int, scale: float = 1.0) -> Matrix:
    """A linear map without bias, orthogonal and `scale` long; zero where a branch starts silent."""
    linear = Matrix(inputs, outputs, bias=False)
    if scale:
        nn.init.orthogonal_(linear.weight, scale * math.sqrt(max(outputs / inputs, 1)))
    else:
        nn.init.zeros_(linear.weight)
    return linear


class Block(nn.Module):
    """One layer. tiny_dim: the width of RWKV-4a's attention, 0 where there is none."""

    def __init__(
        self, layer: int, n_layer: int, n_embed: int, n_ffn: int, tiny_dim: int, dropout: float
    ) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(n_embed)
        self.ln1 = nn.LayerNorm(n_embed)
        self.ln2 = nn.LayerNorm(n_embed)
        self.att = TimeMix(layer, n_layer, n_embed)
        self.ffn = ChannelMix(layer, n_layer, n_embed, n_ffn)
        self.tiny_dim = tiny_dim
        if tiny_dim:
            self.tiny_ln = nn.LayerNorm(n_embed)
            self.tiny_q = matrix(n_embed, tiny_dim, 0)
            self.tiny_k = matrix(n_embed, tiny_dim)
            self.tiny_v = matrix(n_embed, n_embed)
        self.dropout = dropout

    def forward(
        self, x: Tensor, embedding: Tensor, past: Past, precision: torch.dtype
    ) -> tuple[Tensor, Past]:
        a = self.ln1(x).to(precision)
        mixed, key, value = self.att(a, past.att_input, past.key, past.value)
        x = x + self.dropped(mixed).to(x.dtype)
        f = self.ln2(x).to(precision)
        x = x + self.dropped(self.ffn(f, past.ffn_input)).to(x.dtype)
        tiny = past.tiny
        if self.tiny_dim:
            z = self.tiny_ln(x).to(precision)
            q, k, v = self.tiny_q(z), self.tiny_k(z), self.tiny_v(embedding.to(precision))
            looked_up, tiny = linear_attention(q / math.sqrt(self.tiny_dim), k, v, tiny)
            x = x + looked_up
        return x, Past(a[:, -1], f[:, -1], key, value, tiny)

    def dropped(self, branch: Tensor) -> Tensor:
        return dropout(branch, self.dropout) if self.training and self.dropout else branch


class Network(nn.Module):
    """RWKV-4 of `n_layer` layers of `n_embed` channels over `n_vocab` tokens.

    n_ffn: the channels inside of channel mixing, 4 n_embed unless given.
    tiny_dim, tiny_layer: RWKV-4a has an attention of this width after this layer.
    """

    def __init__(
        self,
        n_vocab: int,
        n_layer: int,
        n_embed: int,
        dropout: float = 0.0,
        *,
        n_ffn: int | None = None,
        tiny_dim: int = 0,
        tiny_layer: int = 0,
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(n_vocab, n_embed)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # ln0 scales it up: words part quickly
        self.blocks = nn.ModuleList()
        for i in range(n_layer):
            tiny = tiny_dim if i == tiny_layer else 0
            self.blocks.append(Block(i, n_layer, n_embed, n_ffn or 4 * n_embed, tiny, dropout))
        self.ln_out = nn.LayerNorm(n_embed)
        self.head = matrix(n_embed, n_vocab, 0.5)
        self.recomputes = False  # whether a layer's inside is computed again for its gradient

    def empty_past(self, batch: int) -> list[Past]:
        zero = self.emb.weight.new_zeros(batch, self.emb.embedding_dim)
        tiny = [zero.new_zeros(batch, block.tiny_dim, zero.shape[1]) for block in self.blocks]
        return [Past(zero, zero, zero + NO_WEIGHT, zero, memory) for memory in tiny]

    def forward(
        self, tokens: Tensor, past: list[Past], precision: torch.dtype | None = None
    ) -> tuple[Tensor, list[Past]]:
        """Logits (B, T, n_vocab) after each of `tokens` (B, T), and what to go on from.

        precision: of the matrix products and what stands between them; that of the weights if None.
        Sums over layers, norms and the recurrence are as precise as the weights in any case.
        """
        embedding = self.emb(tokens)
        x = self.blocks[0].ln0(embedding)
        precision = precision or x.dtype
        after = []
        for block, block_past in zip(self.blocks, past, strict=True):
            arguments = (x, embedding, block_past, precision)
            if self.recomputes and torch.is_grad_enabled():
                x, block_past = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, block_past = block(*arguments)
            after.append(block_past)
        return self.head(self.ln_out(x).to(precision)), after
