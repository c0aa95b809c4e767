"""Steps of the network with gradients written by hand: a third of the passes over memory that
autograd's own take, and no tensor kept that can be had again.
"""

from typing import Any

import torch
from torch import Tensor


class _TokenMixes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
        last = torch.cat((before.to(x.dtype).unsqueeze(1), x[:, :-1]), 1)
        ctx.dtype = mixes[0].dtype
        mixes = tuple(mix.to(x.dtype) for mix in mixes)
        ctx.save_for_backward(x - last, *mixes)
        return tuple(torch.lerp(last, x, mix) for mix in mixes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        change, *mixes = ctx.saved_tensors
        grad_x = grads[0] * mixes[0]
        total = grads[0]
        for grad, mix in zip(grads[1:], mixes[1:], strict=True):
            grad_x.addcmul_(grad, mix)
            total = total + grad
        grad_last = total - grad_x
        grad_x[:, :-1] += grad_last[:, 1:]
        grad_mixes = ((grad * change).sum((0, 1), keepdim=True) for grad in grads)
        return grad_x, grad_last[:, 0].to(ctx.dtype), *(grad.to(ctx.dtype) for grad in grad_mixes)


def token_mixes(x: Tensor, before: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    """For each of `mixes` (1, 1, C): x (B, T, C) where it is 1, the token before where it is 0.

    `before` (B, C) comes before the first token.
    """
    return _TokenMixes.apply(x, before, *mixes)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    return _SquaredRelu.apply(x)


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with a part of its elements (`rate`, in 256ths) zero and the others as much larger."""
    keep = max(256 - round(256 * rate), 1)
    noise = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    noise = noise.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
    return noise.to(x.dtype).lt_(keep).mul_(256 / keep) * x
