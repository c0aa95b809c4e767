"""LoRA training: what learns, what the file holds, and that merging it gives what was trained."""

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from rwkv_cpp import RWKVModel  # noqa: E402
from rwkv_cpp.convert import convert  # noqa: E402
from rwkv_cpp.merge_lora import merge_lora  # noqa: E402
from rwkv_cpp.scoring import score  # noqa: E402
from rwkv_cpp.train.learner import Learner  # noqa: E402
from rwkv_cpp.train.lora import LoRA  # noqa: E402
from rwkv_cpp.train.network import Network  # noqa: E402
from torch.nn import functional as F  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")

RANK, ALPHA = 3, 12.0
LAYERS, CHANNELS = 2, 16
SIDES = {  # (columns, rows) of the matrices that Blealtan's trainer gives a pair
    "att.key": (CHANNELS, CHANNELS),
    "att.value": (CHANNELS, CHANNELS),
    "att.receptance": (CHANNELS, CHANNELS),
    "ffn.key": (CHANNELS, 4 * CHANNELS),
    "ffn.receptance": (CHANNELS, CHANNELS),
    "ffn.value": (4 * CHANNELS, CHANNELS),
}


def network(seed: int) -> Network:
    """One in which every weight matters."""
    torch.manual_seed(seed)
    result = Network(256, LAYERS, CHANNELS)
    for parameter in result.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return result


def loss_of(model: Learner, tokens: torch.Tensor) -> torch.Tensor:
    logits, _ = model(tokens[:, :-1], model.past(len(tokens)))
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    ("parts", "pattern"),
    [
        (["att"], r"att\..*\.lora_[AB]"),
        (["ffn"], r"ffn\..*\.lora_[AB]"),
        (["time"], r"(att|ffn)\.time_(mix_[kvr]|decay|first)"),
        (["ln"], r"ln[012]\.(weight|bias)"),
        (["att", "ln"], r"att\..*\.lora_[AB]|ln[012]\.(weight|bias)"),
    ],
)
def test_only_the_chosen_parts_learn(parts: list[str], pattern: str) -> None:
    names = list(network(1).state_dict())
    names += [f"blocks.{i}.{name}.lora_{x}" for i in range(LAYERS) for name in SIDES for x in "AB"]
    expected = {name for name in names if re.fullmatch(rf"blocks\.\d\.({pattern})", name)}
    assert set(LoRA(network(1), RANK, ALPHA, parts).tensors()) == expected


def test_shapes_and_beginning() -> None:
    model, plain = LoRA(network(1), RANK, ALPHA), Learner(network(1))
    pairs = {name: p for name, p in model.tensors().items() if "lora" in name}
    assert len(pairs) == LAYERS * len(SIDES) * 2
    for name, pair in pairs.items():
        columns, rows = SIDES[re.match(r"blocks\.\d\.(.*)\.lora", name)[1]]
        assert pair.shape == ((RANK, columns) if name.endswith("A") else (rows, RANK))
        if name.endswith("A"):
            assert 0.5 < pair.abs().max() * columns**0.5 <= 1
    tokens = torch.randint(256, (2, 20))
    assert torch.equal(loss_of(model, tokens), loss_of(plain, tokens))  # B is zero


def few_tokens(length: int) -> torch.Tensor:
    """What a network can learn in a few steps: only four of the tokens come."""
    return torch.randint(100, 104, (4, length))


def trained(seed: int) -> LoRA:
    model = LoRA(network(seed), RANK, ALPHA)
    optimizer = torch.optim.AdamW(model.learning().values(), lr=0.01)
    for _ in range(8):
        loss_of(model, few_tokens(20)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_merged_model_has_the_loss_of_the_trained_one(tmp_path: Path) -> None:
    model = trained(2)
    before = network(2).state_dict()
    torch.save(before, tmp_path / "base.pth")
    model.save(tmp_path / "lora.pth")
    for name, tensor in before.items():  # nothing else has changed
        if name not in model.tensors():
            assert torch.equal(tensor, model.network.state_dict()[name]), name
    convert(tmp_path / "base.pth", tmp_path / "base.bin", "FP32")
    merge_lora(tmp_path / "base.bin", [(tmp_path / "lora.pth", ALPHA)], tmp_path / "merged.bin")
    tokens = few_tokens(200)
    models = {"base": Learner(network(2)), "merged": model}
    expected = {path: loss_of(model, tokens).item() for path, model in models.items()}
    assert expected["merged"] < expected["base"] - 1
    for path, loss in expected.items():
        with RWKVModel(None, tmp_path / f"{path}.bin", 1) as core:
            losses = [s.losses for _, scores in score(core, tokens.tolist()) for s in scores]
        # float32 in another order: 1e-6 of a loss of 5
        assert np.concatenate(losses).mean() == pytest.approx(loss, abs=2e-5), path


def test_the_other_merger_reads_the_file() -> None:
    """What Blealtan's merge_lora.py does with it, in the base's bfloat16."""
    model = trained(3)
    weights = {name: w.bfloat16() for name, w in network(3).state_dict().items()}
    lora = model.tensors()
    assert {p.dtype for p in lora.values()} == {torch.float32}
    for name in lora.keys() & weights.keys():
        weights[name] = lora[name]
    for name in weights:
        pair = [name.replace(".weight", f".lora_{x}") for x in "BA"]
        if name.endswith(".weight") and pair[1] in lora:
            b, a = (lora[key] for key in pair)
            weights[name] += b @ a * (ALPHA / b.shape[1])
    merged = Learner(network(3))
    merged.network.load_state_dict(weights)
    tokens = few_tokens(50)
    losses = [loss_of(each, tokens).item() for each in (Learner(network(3)), merged, model)]
    assert losses[1] == pytest.approx(losses[2], rel=0.01)
    assert losses[1] < losses[0] - 1
