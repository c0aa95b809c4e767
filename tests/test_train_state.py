"""State tuning: the learned start, its file, and that the core finds the loss that torch finds."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp import RWKV, State  # noqa: E402
from rwkv_cpp.convert import convert  # noqa: E402
from rwkv_cpp.train.learner import Learner  # noqa: E402
from rwkv_cpp.train.loop import Settings, Trainer  # noqa: E402
from rwkv_cpp.train.network import Network  # noqa: E402
from rwkv_cpp.train.state import InitialState  # noqa: E402
from torch.nn import functional as F  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

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


def loss_of(learner: Learner, tokens: torch.Tensor) -> torch.Tensor:
    logits, _ = learner(tokens[:, :-1], learner.past(len(tokens)))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def few_tokens(length: int) -> torch.Tensor:
    """What a state can teach: only four of the tokens come."""
    return torch.randint(100, 104, (4, length))


def tuned(network: Network) -> InitialState:
    state = InitialState(network, few_tokens(20))
    optimizer = torch.optim.AdamW(state.learning().values(), lr=0.1, weight_decay=0)
    for _ in range(20):
        loss_of(state, few_tokens(20)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state


def test_core_goes_on_from_a_tuned_state_with_the_loss_of_torch(
    network: Network, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state, tokens = tuned(network), few_tokens(40)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    torch.save(network.state_dict(), tmp_path / "base.pth")
    state.save(tmp_path / "tuned.pth")
    convert(tmp_path / "base.pth", tmp_path / "base.bin", "FP32")
    starts = {
        "empty": (Learner(network), None),
        "tuned": (state, State.load(tmp_path / "tuned.pth")),
    }
    losses = {}
    with RWKV(tmp_path / "base.bin", n_threads=1) as model:
        for name, (learner, start) in starts.items():
            # The first token of a text is only read, as in loss_of.
            scores = [model.score(row[1:], row[:1], start) for row in tokens.tolist()]
            losses[name] = -np.mean([score.logprobs for score in scores])
            expected = loss_of(learner, tokens).item()
            assert losses[name] == pytest.approx(expected, abs=2e-5), name
    assert losses["tuned"] < losses["empty"] - 0.1


def test_every_number_of_a_state_has_a_gradient(network: Network) -> None:
    state = InitialState(network, few_tokens(20))
    loss_of(state, torch.randint(256, (2, 20))).backward()
    assert list(state.learning()) == ["rows"]
    assert (state.rows.grad != 0).all()


def test_learning_begins_where_documents_do(network: Network, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "base.pth")
    documents = [f"{chr(65 + i)} is the first letter of line {i}" for i in range(20)]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines), "utf-8")
    settings = Settings(sequence=24, batch=5, tune_state=True, precision="float32")
    run = Trainer(tmp_path / "lines.jsonl", settings, tmp_path / "base.pth")
    batches = [run.batches.draw(step) for step in range(8)]
    assert not any(batch.continues.any() for batch in batches)
    firsts = {chr(row[0]) for batch in batches for row in batch.inputs}
    # All of the documents to train on, 18 of 20, and ends of documents longer than a window.
    assert {text[0] for text in documents[:18]} <= firsts
    run.step()
