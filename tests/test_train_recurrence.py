"""The recurrences of training against plain loops, gradients too."""

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp.train.network import NO_WEIGHT  # noqa: E402
from rwkv_cpp.train.recurrence import (  # noqa: E402
    ATTENTION_CHUNK,
    CHUNK,
    linear_attention,
    wkv,
)

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def wkv_loop(decay, first, k, v, key, value):
    """The recurrence as the papers write it: one token after another, running maximum and all."""
    aa, bb, pp = value, torch.ones_like(value), key
    averages = []
    for t in range(k.shape[1]):
        q = torch.maximum(pp, first + k[:, t])
        e1, e2 = torch.exp(pp - q), torch.exp(first + k[:, t] - q)
        averages.append((e1 * aa + e2 * v[:, t]) / (e1 * bb + e2))
        faded = pp - torch.exp(decay)
        q = torch.maximum(faded, k[:, t])
        e1, e2 = torch.exp(faded - q), torch.exp(k[:, t] - q)
        aa, bb, pp = e1 * aa + e2 * v[:, t], e1 * bb + e2, q
    return torch.stack(averages, 1), pp + bb.log(), aa / bb


def wkv_arguments(length: int, spread: float, offset: float, dtype=torch.float64):
    draw = torch.Generator().manual_seed(length)
    channels, batch = 8, 3

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    arguments = [
        torch.linspace(-8, 3, channels, dtype=dtype),  # forgets in 3000 steps … in a twentieth
        2 * normal(channels),
        spread * normal(batch, length, channels) + offset,
        normal(batch, length, channels),
        spread * normal(batch, channels) + offset,
        normal(batch, channels),
    ]
    return [a.requires_grad_() for a in arguments]


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize(("spread", "offset"), [(1, 0), (60, 0), (3, 5000), (3, -5000)])
def test_recurrence_equals_the_plain_loop(length: int, spread: float, offset: float) -> None:
    arguments = wkv_arguments(length, spread, offset)
    results = wkv(*arguments)
    expected = wkv_loop(*arguments)
    # A weight is exp() of a number up to 5000 + 60 * 5 with 53 bits: 6e-13 off, relatively, and
    # a gradient sums fewer than 1000 of them.
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
    cotangents = [torch.sin(1.0 + torch.arange(r.numel())).view(r.shape).to(r) for r in results]
    names = ("time_decay", "time_first", "k", "v", "key", "value")
    gradients = torch.autograd.grad(results, arguments, cotangents)
    expected_gradients = torch.autograd.grad(expected, arguments, cotangents)
    for name, result, right in zip(names, gradients, expected_gradients, strict=True):
        bound = 1e-9 * max(1.0, right.abs().max().item())
        assert (result - right).abs().max() <= bound, name


def test_recurrence_from_nothing_equals_the_plain_loop() -> None:
    *arguments, key, value = wkv_arguments(CHUNK + 3, 1, 0)
    past = (torch.full_like(key, NO_WEIGHT), torch.zeros_like(value))
    for result, right in zip(wkv(*arguments, *past), wkv_loop(*arguments, *past), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)


def test_recurrence_stays_finite_with_keys_far_apart() -> None:
    arguments = wkv_arguments(2 * CHUNK, 1e4, 0, torch.float32)
    results = wkv(*arguments)
    gradients = torch.autograd.grad([r.sum() for r in results], arguments)
    assert all(x.isfinite().all() for x in (*results, *gradients))


def quadratic_attention(q, k, v, memory):
    """Each token meets every one up to itself, and the memory of those before."""
    products = torch.tril(q @ k.transpose(1, 2))
    return products @ v + q @ memory, memory + k.transpose(1, 2) @ v


@pytest.mark.parametrize("length", [1, ATTENTION_CHUNK, 300])
def test_linear_attention_equals_the_quadratic_form(length: int) -> None:
    torch.manual_seed(length)
    batch, width, channels = 2, 6, 10
    shapes = [(batch, length, width)] * 2 + [(batch, length, channels), (batch, width, channels)]
    arguments = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    results, expected = linear_attention(*arguments), quadratic_attention(*arguments)
    cotangents = [torch.randn_like(result) for result in results]
    gradients = torch.autograd.grad(results, arguments, cotangents)
    expected_gradients = torch.autograd.grad(expected, arguments, cotangents)
    for result, right in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-11, atol=1e-11)
