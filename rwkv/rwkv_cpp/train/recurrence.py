"""The recurrences of RWKV-4 and of 4a's attention, parallel over chunks of a sequence.

The gradient of the first is written by hand. In its state, `sums` of a channel are a weighted sum
of values and the sum of the weights. A step multiplies both by exp(-exp(decay)) and adds the
token's exp(k) v and exp(k). All chunks take their steps side by side as if each came first; then
what the earlier ones leave is carried along them.
"""

import math
from typing import Any

import torch
from torch import Tensor

CHUNK = 16  # near the square root of usual lengths: as many steps in a chunk as chunks


def wkv(
    decay: Tensor, first: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted averages of RWKV-4 for a whole sequence: (averages, new key, new value).

    decay (C,) is the checkpoint's time_decay w, a step multiplies weights by exp(-exp(w));
    first (C,) is time_first; k, v and the averages are (B, T, C); key, value (B, C) stand for all
    that came before, which weighs like one token of that key and value.

    Exact while the keys of a chunk lie within 75 of the largest weight (float64: 600); a lower
    key counts as that low. exp() then neither overflows nor leaves a denominator of zero.
    Computed in the precision of `decay`: bfloat16 would round what the past weighs.
    """
    averages = []
    length = k.shape[1]
    whole = length - length % CHUNK
    for k_part, v_part in zip(
        k.split([whole, length - whole], 1), v.split([whole, length - whole], 1), strict=True
    ):
        if k_part.shape[1]:
            average, key, value = _Chunks.apply(decay, first, k_part, v_part, key, value)
            averages.append(average)
    return averages[0] if len(averages) == 1 else torch.cat(averages, 1), key, value


class _Chunks(torch.autograd.Function):
    """`wkv` of one short chunk, or of any number of whole ones."""

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, first: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, channels = k.shape
        steps = min(CHUNK, length)
        chunks = (batch, length // steps, steps, channels)
        keys, values = k.to(decay.dtype).view(chunks), v.to(decay.dtype).view(chunks)
        fade = torch.exp(-torch.exp(decay))
        fades = _powers(decay, steps)

        # The largest key of a chunk, that of its past included, is span / 2 above its scale.
        # Averages do not depend on scales, so no gradient has to pass through them.
        span = 0.85 * math.log(torch.finfo(decay.dtype).max)
        tops = keys.amax(2)
        scales = torch.empty_like(tops)
        highest = key
        for top, scale in zip(tops.unbind(1), scales.unbind(1), strict=True):
            torch.maximum(highest, top, out=scale)
            faded = torch.maximum(highest - steps * torch.exp(decay), scale - span)
            highest = torch.maximum(faded, top)
        scales -= span / 2
        # What turns sums of one chunk's scale into the next one's; the last keeps its own.
        rescale = torch.exp(torch.diff(scales, dim=1, append=scales[:, -1:]).neg_())

        added = keys.new_empty(2, *chunks)
        torch.sub(keys, scales.unsqueeze(2), out=added[1]).clamp_(min=-span / 2).exp_()
        torch.mul(added[1], values, out=added[0])

        sums = _scan(added, fade)  # of each chunk alone
        past = torch.exp(key - scales[:, 0])
        past = torch.stack((past * value, past))
        pasts = sums.new_empty(*sums.shape[:3], channels)  # what each chunk begins with
        for chunk in range(chunks[1]):
            pasts[:, :, chunk] = past
            past = (sums[:, :, chunk, -1] + fades[-1] * past) * rescale[:, chunk]
        sums = sums[..., :-1, :]
        sums.addcmul_(fades[:-1], pasts.unsqueeze(3))

        numerator, denominator = torch.addcmul(sums, added, torch.exp(first))
        average = numerator.div_(denominator)
        ctx.save_for_backward(decay, first, added, sums, pasts, rescale, past, average, denominator)
        ctx.dtype = k.dtype
        return (
            average.view(k.shape).to(k.dtype),
            torch.log(past[1]) + scales[:, -1],
            past[0] / past[1],
        )

    @staticmethod
    def backward(
        ctx: Any, grad_average: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor, ...]:
        decay, first, added, sums, pasts, rescale, past, average, denominator = ctx.saved_tensors
        steps = added.shape[3]
        fade = torch.exp(-torch.exp(decay))
        fades = _powers(decay, steps)
        bonus = torch.exp(first)

        # Of the sum that each token's average was made of.
        grad_total = torch.empty_like(added)
        grad_average = grad_average.to(average.dtype).view(average.shape)
        torch.div(grad_average, denominator, out=grad_total[0])
        torch.mul(grad_total[0], average, out=grad_total[1]).neg_()
        # Of what is added to the sums at a token: by the later tokens of its own chunk, then by
        # what the chunk leaves to the next ones.
        grad_sums = _scan(grad_total, fade, backwards=True)
        grad_past = torch.stack((grad_value, grad_key - grad_value * past[0] / past[1])) / past[1]
        grad_left = torch.empty_like(pasts)
        for chunk in reversed(range(added.shape[2])):
            grad_left[:, :, chunk] = grad_past * rescale[:, chunk]
            grad_past = grad_sums[:, :, chunk, 0] + fades[-1] * grad_left[:, :, chunk]
        grad_sums = grad_sums[..., 1:, :].addcmul_(fades[:-1].flip(0), grad_left.unsqueeze(3))

        every = tuple(range(added.dim() - 1))
        grad_fade = torch.mul(grad_sums, sums).sum(every)
        grad_bonus = torch.mul(grad_total, added).sum(every)
        grad_added = grad_sums.addcmul_(grad_total, bonus)
        grad_v = grad_added[0] * added[1]
        grad_k = torch.addcmul(grad_added[1] * added[1], grad_added[0], added[0])
        weight = pasts[1, :, 0]
        return (
            -grad_fade * fade * torch.exp(decay),
            grad_bonus * bonus,
            grad_k.flatten(1, 2).to(ctx.dtype),
            grad_v.flatten(1, 2).to(ctx.dtype),
            grad_past[0] * pasts[0, :, 0] + grad_past[1] * weight,
            grad_past[0] * weight,
        )


def _powers(decay: Tensor, steps: int) -> Tensor:
    """(steps + 1, C): what a weight is multiplied by in 0, 1, … `steps` steps."""
    return torch.exp(-torch.arange(steps + 1, device=decay.device)[:, None] * torch.exp(decay))


def _scan(added: Tensor, fade: Tensor, backwards: bool = False) -> Tensor:
    """added (..., T, C) -> sums (..., T + 1, C): the sum before each token and after the last."""
    sums = added.new_empty(*added.shape[:-2], added.shape[-2] + 1, added.shape[-1])
    steps, slots = added.unbind(-2), sums.unbind(-2)
    if backwards:
        steps, slots = steps[::-1], slots[::-1]
    slots[0].zero_()
    for step, before, after in zip(steps, slots, slots[1:], strict=False):
        torch.addcmul(step, before, fade, out=after)
    return sums


ATTENTION_CHUNK = 64


def linear_attention(q: Tensor, k: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over all tokens u up to t of (q_t · k_u) v_u, and the new memory.

    q, k (B, T, D); v and the sums (B, T, C); memory (B, D, C) is the sum of k_u v_u of the tokens
    before. Sums are of the memory's precision.
    """
    results = []
    for q_chunk, k_chunk, v_chunk in zip(
        *(x.split(ATTENTION_CHUNK, 1) for x in (q, k, v)), strict=True
    ):
        inside = torch.tril(q_chunk @ k_chunk.mT) @ v_chunk
        results.append(inside.to(memory.dtype) + q_chunk.to(memory.dtype) @ memory)
        memory = memory + k_chunk.mT @ v_chunk
    return torch.cat(results, 1), memory
