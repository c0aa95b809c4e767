"""The held-out loss: every token counts once, after what its document says before it."""

import numpy as np
import pytest
from rwkv_cpp.token_data import TokenData

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp.train.evaluation import held_out_loss  # noqa: E402
from rwkv_cpp.train.learner import Learner  # noqa: E402
from rwkv_cpp.train.network import Network  # noqa: E402
from torch.nn import functional as F  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def learner() -> Learner:
    torch.manual_seed(1)
    network = Network(256, 2, 8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Learner(network)


def data_of(*sizes: int) -> TokenData:
    draws = np.random.default_rng(2)
    tokens = draws.integers(256, size=sum(sizes)).astype(np.uint8)
    return TokenData(tokens, np.cumsum([0, *sizes[:-1]]))


def losses_alone(one: Learner, tokens: np.ndarray) -> np.ndarray:
    """Of each token but the first, read as one text."""
    text = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits, _ = one(text[None, :-1], one.past(1))
    return F.cross_entropy(logits[0], text[1:], reduction="none").double().numpy()


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(50,), (9, 1, 30, 10), (2, 2, 2)])
def test_documents_are_read_each_by_itself(rows: int, sizes: tuple[int, ...]) -> None:
    one, data = learner(), data_of(*sizes)
    result = held_out_loss(one, data, 7, rows=rows, pieces=1)
    documents = np.split(data.tokens, data.documents[1:])
    expected = [losses_alone(one, document) for document in documents if len(document) > 1]
    assert result.mean == pytest.approx(np.concatenate(expected).mean(), rel=1e-6)
    for position in range(max(sizes) - 1):
        there = [losses[position] for losses in expected if len(losses) > position]
        assert result.counts[position] == len(there)
        assert result.sums[position] == pytest.approx(sum(there), rel=1e-5)
    assert one.training


def test_a_long_text_is_cut_in_pieces() -> None:
    one, data = learner(), data_of(41)
    result = held_out_loss(one, data, 7, rows=3, pieces=4)
    assert result.counts.tolist() == [4] * 7 + [3] * 4
    pieces = [data.tokens[first : first + 12] for first in range(0, 40, 11)]
    expected = np.concatenate([losses_alone(one, piece) for piece in pieces])
    assert len(expected) == 40
    assert result.mean == pytest.approx(expected.mean(), rel=1e-6)


def test_losses_by_position() -> None:
    one, data = learner(), data_of(12)
    losses = losses_alone(one, data.tokens)
    result = held_out_loss(one, data, 7, rows=1, pieces=1).by_position()
    expected = {1: losses[0], 2: losses[1], 4: losses[2:4].mean(), 8: losses[4:8].mean()}
    assert result == pytest.approx(expected | {11: losses[8:].mean()}, rel=1e-6)
