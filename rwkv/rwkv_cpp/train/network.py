"""RWKV-4 as a torch module: the same function as the C core's, parallel over a sequence.

Read from the bottom: `Network` is the model, a `Block` one layer of it, `wkv` the recurrence that
makes it an RNN. Attribute names are chosen so that `state_dict()` is a released checkpoint.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 32  # steps of the recurrence in one product; the matrices grow with the square of it
NO_WEIGHT = -1e30  # the log weight of an empty past; exp() of it is 0 and its gradient too


class Past(NamedTuple):
    """What one layer remembers, each (batch, channels).

    The core keeps a running numerator, denominator and exponent (aa, bb, pp). Here the same three
    numbers are two: all that came before weighs like one token of key `key` = pp + log bb and
    value `value` = aa / bb.
    """

    att_input: Tensor
    ffn_input: Tensor
    key: Tensor
    value: Tensor


@torch.autocast("cpu", enabled=False)
def wkv(
    decay: Tensor, first: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted averages of RWKV-4 for a whole sequence: (averages, new key, new value).

    decay (C,) is the checkpoint's time_decay w, a step multiplies weights by exp(-exp(w));
    first (C,) is time_first; k, v and the averages are (B, T, C); key, value as in `Past`, (B, C).

    Exact while the keys of a chunk lie within 75 of the largest weight (float64: 600); a lower
    key counts as that low. exp() then neither overflows nor leaves a denominator of zero.
    Always in the precision of its arguments: bfloat16 would round what the past weighs.
    """
    span = 0.85 * math.log(torch.finfo(k.dtype).max)
    k, v = (x.permute(2, 1, 0) for x in (k, v))  # one matrix per channel: (C, T, B)
    key, value = (x.t().unsqueeze(1) for x in (key, value))  # (C, 1, B)
    length = min(CHUNK, k.shape[1])
    matrix = decay_matrix(decay, first, length)
    averages = []
    for k_chunk, v_chunk in zip(k.split(length, 1), v.split(length, 1), strict=True):
        if k_chunk.shape[1] != length:
            matrix = decay_matrix(decay, first, k_chunk.shape[1])
        # The ratio does not depend on `top`, so no gradient has to pass through it.
        top = torch.maximum(k_chunk.amax(1, keepdim=True), key).detach()
        keys = torch.cat((key, torch.maximum(k_chunk, top - span)), 1)
        weights = torch.exp(keys - (top - span / 2))
        weighted = weights * torch.cat((value, v_chunk), 1)
        numerator, denominator = (matrix @ torch.cat((weighted, weights), 2)).chunk(2, 2)
        average = numerator / denominator
        averages.append(average[:, :-1])
        value = average[:, -1:]
        key = denominator[:, -1:].log() + (top - span / 2)
    return torch.cat(averages, 1).permute(2, 1, 0), key[:, 0].t(), value[:, 0].t()


def decay_matrix(decay: Tensor, first: Tensor, length: int) -> Tensor:
    """(C, length + 1, length + 1): how much column j weighs in row t.

    Column 0 is the past, column j the token j - 1. Row t is the output at token t, the last row
    what the next chunk finds as its past. A token weighs exp(first) in its own output and
    exp(-exp(decay)) less with every step after the next one; what lies ahead weighs nothing.
    """
    steps = torch.arange(length + 1, device=decay.device)
    lag = (steps[:, None] - steps[None, :]).to(decay.dtype)
    past = torch.exp(-torch.exp(decay)[:, None, None] * lag.clamp(min=0)) * (lag >= 0)
    return past + torch.exp(first)[:, None, None] * (lag == -1)


def shifted(x: Tensor, before: Tensor) -> Tensor:
    """x (B, T, C) one token later: `before` (B, C) comes first and the last token drops out."""
    return torch.cat((before.unsqueeze(1), x[:, :-1]), 1)


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
        last = shifted(x, before)
        k = self.key(torch.lerp(last, x, self.time_mix_k)).to(x.dtype)
        v = self.value(torch.lerp(last, x, self.time_mix_v)).to(x.dtype)
        r = torch.sigmoid(self.receptance(torch.lerp(last, x, self.time_mix_r)))
        average, key, value = wkv(self.time_decay, self.time_first, k, v, key, value)
        return self.output(r * average), key, value


class ChannelMix(nn.Module):
    def __init__(self, layer: int, n_layer: int, n_embed: int) -> None:
        super().__init__()
        ramp = (torch.arange(n_embed) / n_embed).view(1, 1, -1) ** (1 - layer / n_layer)
        self.time_mix_k = nn.Parameter(ramp.clone())
        self.time_mix_r = nn.Parameter(ramp.clone())
        self.key = matrix(n_embed, 4 * n_embed)
        self.receptance = matrix(n_embed, n_embed, 0)
        self.value = matrix(4 * n_embed, n_embed, 0)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        last = shifted(x, before)
        k = torch.relu(self.key(torch.lerp(last, x, self.time_mix_k))).square()
        r = torch.sigmoid(self.receptance(torch.lerp(last, x, self.time_mix_r)))
        return r * self.value(k)


def matrix(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """A linear map without bias, orthogonal and `scale` long; zero where a branch starts silent."""
    linear = nn.Linear(inputs, outputs, bias=False)
    if scale:
        nn.init.orthogonal_(linear.weight, scale * math.sqrt(max(outputs / inputs, 1)))
    else:
        nn.init.zeros_(linear.weight)
    return linear


class Block(nn.Module):
    def __init__(self, layer: int, n_layer: int, n_embed: int, dropout: float) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(n_embed)
        self.ln1 = nn.LayerNorm(n_embed)
        self.ln2 = nn.LayerNorm(n_embed)
        self.att = TimeMix(layer, n_layer, n_embed)
        self.ffn = ChannelMix(layer, n_layer, n_embed)
        self.dropout = dropout

    def forward(self, x: Tensor, past: Past) -> tuple[Tensor, Past]:
        a = self.ln1(x)
        mixed, key, value = self.att(a, past.att_input, past.key, past.value)
        x = x + F.dropout(mixed, self.dropout, self.training)
        f = self.ln2(x)
        x = x + F.dropout(self.ffn(f, past.ffn_input), self.dropout, self.training)
        return x, Past(a[:, -1], f[:, -1], key, value)


class Network(nn.Module):
    """RWKV-4 of `n_layer` layers of `n_embed` channels over `n_vocab` tokens."""

    def __init__(self, n_vocab: int, n_layer: int, n_embed: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.emb = nn.Embedding(n_vocab, n_embed)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)  # ln0 scales it up: words part quickly
        self.blocks = nn.ModuleList(Block(i, n_layer, n_embed, dropout) for i in range(n_layer))
        self.ln_out = nn.LayerNorm(n_embed)
        self.head = matrix(n_embed, n_vocab, 0.5)

    def empty_past(self, batch: int) -> list[Past]:
        zero = self.emb.weight.new_zeros(batch, self.emb.embedding_dim)
        return [Past(zero, zero, zero + NO_WEIGHT, zero) for _ in self.blocks]

    def forward(self, tokens: Tensor, past: list[Past]) -> tuple[Tensor, list[Past]]:
        """Logits (B, T, n_vocab) after each of `tokens` (B, T), and what to go on from."""
        x = self.blocks[0].ln0(self.emb(tokens))
        after = []
        for block, block_past in zip(self.blocks, past, strict=True):
            x, block_past = block(x, block_past)
            after.append(block_past)
        return self.head(self.ln_out(x)), after
