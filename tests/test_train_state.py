"""State tuning: the learned start, its file, and that the core finds the loss that torch finds."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp import RWKV, State  # noqa: E402
from rwkv_cpp.convert import convert  # noqa: E402
from rwkv_cpp.train.network import Network  # noqa: E402
from rwkv_cpp.train.state import InitialState  # noqa: E402
from torch.nn import functional as F  # noqa: E402

LAYERS, CHANNELS = 2, 16


@pytest.fixture
def network() -> Network:
    """One in which every weight matters."""
    torch.manual_seed(1)
    result = Network(256, LAYERS, CHANNELS)
    for parameter in result.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return result.requires_grad_(False)


def loss_of(network: Network, past: list, tokens: torch.Tensor) -> torch.Tensor:
    logits, _ = network(tokens[:, :-1], past)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def few_tokens(length: int) -> torch.Tensor:
    """What a state can teach: only four of the tokens come."""
    return torch.randint(100, 104, (4, length))


def tuned(network: Network) -> InitialState:
    with torch.no_grad():
        _, past = network(few_tokens(20), network.empty_past(4))
    state = InitialState(past)
    optimizer = torch.optim.AdamW(state.parameters(), lr=0.1, weight_decay=0)
    for _ in range(20):
        loss_of(network, state.past(4), few_tokens(20)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state


def test_core_goes_on_from_a_tuned_state_with_the_loss_of_torch(
    network: Network, tmp_path: Path
) -> None:
    state, tokens = tuned(network), few_tokens(40)
    torch.save(network.state_dict(), tmp_path / "base.pth")
    torch.save(state.tensors(), tmp_path / "tuned.pth")
    convert(tmp_path / "base.pth", tmp_path / "base.bin", "FP32")
    with RWKV(tmp_path / "base.bin", n_threads=1) as model:
        start = State.from_layout("state-tuned", tmp_path / "tuned.pth")
        losses = {}
        for name, past, begin in (
            ("empty", network.empty_past(4), None),
            ("tuned", state.past(4), start),
        ):
            # The first token of a text is only read, as in loss_of.
            scores = [model.score(row[1:], row[:1], begin) for row in tokens.tolist()]
            losses[name] = -np.mean([score.logprobs for score in scores])
            with torch.no_grad():
                expected = loss_of(network, past, tokens).item()
            assert losses[name] == pytest.approx(expected, abs=2e-5), name
    assert losses["tuned"] < losses["empty"] - 0.1


def test_every_number_of_a_state_has_a_gradient(network: Network) -> None:
    with torch.no_grad():
        _, past = network(few_tokens(20), network.empty_past(4))
    state = InitialState(past)
    loss_of(network, state.past(2), torch.randint(256, (2, 20))).backward()
    assert (state.rows.grad != 0).all()
