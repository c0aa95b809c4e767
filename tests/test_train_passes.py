"""The gradients written by hand against numerical ones and autograd's."""

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp.train.passes import dropout, squared_relu, token_mixes  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


@pytest.mark.parametrize("length", [1, 5])
def test_token_mixes(length: int) -> None:
    torch.manual_seed(length)
    x, before, *mixes = arguments = [
        torch.rand(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, length, 3), (2, 3), (1, 1, 3), (1, 1, 3))
    ]
    last = torch.cat((before[:, None], x[:, :-1]), 1)
    for result, mix in zip(token_mixes(*arguments), mixes, strict=True):
        torch.testing.assert_close(result, mix * x + (1 - mix) * last)
    assert torch.autograd.gradcheck(token_mixes, arguments)


def test_squared_relu() -> None:
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).requires_grad_()
    assert squared_relu(x).tolist() == [max(value, 0) ** 2 for value in x.tolist()]
    assert torch.autograd.gradcheck(squared_relu, [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 333, dtype=dtype).requires_grad_()  # not a multiple of eight
    result = dropout(x, 0.25)
    kept = 1 / 0.75
    assert set(result.unique().tolist()) == {0.0, torch.tensor(kept, dtype=dtype).item()}
    share = (result == 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=6 * (0.25 * 0.75 / x.numel()) ** 0.5)
    rows, columns = ((result == 0).double().mean(side) for side in (1, 0))
    assert rows.std() < 2 * (0.25 * 0.75 / 333) ** 0.5  # no stripes
    assert columns.std() < 2 * (0.25 * 0.75 / 1000) ** 0.5
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(gradient, result)
