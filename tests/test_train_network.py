"""The network of training: the function that the reference computes, in every form."""

import numpy as np
import pytest
import reference.rwkv_v4

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp.train.learner import read_network  # noqa: E402
from rwkv_cpp.train.network import Network  # noqa: E402
from torch.nn import functional as F  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

TINY = {"tiny_dim": 6, "tiny_layer": 1}


def network(dropout=0.0, **shape) -> Network:
    """One in which every weight matters."""
    torch.manual_seed(1)
    result = Network(256, 3, 16, dropout, **shape)
    for parameter in result.parameters():  # also those that start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return result


@pytest.mark.parametrize("shape", [{}, {"n_ffn": 40}, TINY])
def test_network_is_the_reference_and_carries_its_past_over_any_cut(shape: dict) -> None:
    double = network(**shape).double()
    tokens = torch.randint(256, (2, 300))
    past, pieces = double.empty_past(2), []
    with torch.no_grad():
        for piece in tokens.split([1, 40, 29, 230], 1):
            logits, past = double(piece, past)
            pieces.append(logits)
    weights = {name: w.squeeze().numpy() for name, w in double.state_dict().items()}
    for name in weights:
        if name.endswith("time_decay"):
            weights[name] = -np.exp(weights[name])
    for row, logits in zip(tokens, torch.cat(pieces, 1), strict=True):
        expected, _ = reference.rwkv_v4.forward(weights, row.tolist())
        # Unlike averages, the attention's sums grow with the text.
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(dropout: float) -> None:
    one = network(dropout, **TINY)
    tokens = torch.randint(256, (2, 21))
    gradients = []
    for one.recomputes in (False, True):
        torch.manual_seed(2)
        logits, _ = one(tokens[:, :-1], one.empty_past(2))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, list(one.parameters())))
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_bfloat16_computes_nearly_the_same() -> None:
    one = network(**TINY)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(256, (2, 50))
    with torch.no_grad():
        exact, _ = one(tokens, one.empty_past(2))
        rounded, past = one(tokens, one.empty_past(2), torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert {layer.key.dtype for layer in past} == {torch.float32}
    difference = (rounded - exact).abs().max() / exact.std()
    assert 0 < difference < 0.1  # bfloat16 has eight bits: some roundings of 0.004 add up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [{"n_ffn": 40}, TINY])
def test_released_checkpoint_becomes_the_network_again(tmp_path, dtype, shape: dict) -> None:
    one = network(**shape)
    weights = {name: w.to(dtype) for name, w in one.state_dict().items()}
    if "tiny_dim" in shape:
        weights["blocks.1.tiny_mask"] = torch.tril(torch.ones(8, 8))  # released files have it
    torch.save(weights, tmp_path / "base.pth")
    again = read_network(tmp_path / "base.pth", 0.25)
    assert again.blocks[0].dropout == 0.25
    for name, parameter in again.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, weights[name].float()), name
    tokens = torch.randint(256, (1, 9))
    logits, _ = again.eval()(tokens, again.empty_past(1))
    assert logits.shape == (1, 9, 256)
