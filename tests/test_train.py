"""`rwkv train`: its recurrence against a plain loop, its runs, its files and its errors."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference.rwkv_v4

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from rwkv_cpp import cli  # noqa: E402
from rwkv_cpp.errors import RWKVError, RWKVFileError  # noqa: E402
from rwkv_cpp.train.loop import Progress, Settings, Trainer, train  # noqa: E402
from rwkv_cpp.train.network import NO_WEIGHT, Network  # noqa: E402
from rwkv_cpp.train.recurrence import CHUNK, wkv  # noqa: E402

TINY = Settings(n_layer=2, n_embed=16, sequence=24, batch=4, steps=8, warmup=2, precision="float32")


pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 40)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    network = Network(256, TINY.n_layer, TINY.n_embed)
    torch.save(network.state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


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


def test_network_is_rwkv_4_and_carries_its_past_over_any_cut() -> None:
    torch.manual_seed(1)
    network = Network(256, 3, 16).double()
    for parameter in network.parameters():  # also those that start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(256, (2, 70))
    past, pieces = network.empty_past(2), []
    with torch.no_grad():
        for piece in tokens.split([1, 40, 29], 1):
            logits, past = network(piece, past)
            pieces.append(logits)
    weights = {name: w.squeeze().numpy() for name, w in network.state_dict().items()}
    for name in weights:
        if name.endswith("time_decay"):
            weights[name] = -np.exp(weights[name])
    for row, logits in zip(tokens, torch.cat(pieces, 1), strict=True):
        expected, _ = reference.rwkv_v4.forward(weights, row.tolist())
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-10)


def trainer(text: Path, settings: Settings, base: Path | None = None) -> Trainer:
    return Trainer(text, settings, base)


def run(text: Path, target: Path, settings: Settings, stop_at: int = -1, **options) -> Progress:
    """A run to its end, or to a stop after `stop_at` steps of it."""
    steps = []
    for progress in train(
        text, target, settings, should_stop=lambda: len(steps) == stop_at, **options
    ):
        steps.append(progress.step)
    return progress


def test_tiny_run_lowers_the_loss(text: Path, tmp_path: Path) -> None:
    settings = replace(TINY, steps=40, learning_rate=0.01)
    progress = run(text, tmp_path / "out.pth", settings)
    assert (progress.step, progress.finished) == (40, True)
    assert progress.train[0] == pytest.approx(math.log(256), rel=0.1)  # it knows nothing yet
    assert progress.train[39] < 0.7 * progress.train[0]
    # 40 steps of an average that keeps 97 % at most still remember the beginning a little.
    assert progress.held_out[40] < 0.8 * progress.held_out[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32"},
        {"precision": "bfloat16"},
        {"lora_rank": 2, "precision": "bfloat16"},
        {"tune_state": True, "learning_rate": 0.1},
    ],
)
def test_resumed_run_repeats_an_uninterrupted_one(
    text: Path, tmp_path: Path, base: Path, changes: dict
) -> None:
    settings = replace(TINY, **changes)
    options = {"base": base if settings.lora_rank or settings.tune_state else None}
    whole = run(text, tmp_path / "whole.pth", settings, **options)
    stopped = run(text, tmp_path / "pieces.pth", settings, stop_at=2, **options)
    assert (stopped.step, stopped.finished) == (3, False)
    assert not (tmp_path / "pieces.pth").exists()
    resumed = run(text, tmp_path / "pieces.pth", settings, resume=True, **options)
    assert resumed.train == whole.train
    assert resumed.held_out == whole.held_out
    expected = torch.load(tmp_path / "whole.pth")
    for name, tensor in torch.load(tmp_path / "pieces.pth").items():
        assert torch.equal(tensor, expected[name]), name
    assert not (tmp_path / "pieces.checkpoint").exists()


def names_in(saved: object) -> set[str]:
    """The names of all tensors in a checkpoint of a run."""
    if not isinstance(saved, dict):
        return set()
    own = {key for key, value in saved.items() if isinstance(value, torch.Tensor)}
    return own.union(*map(names_in, saved.values()))


def test_checkpoint_of_a_lora_has_no_weights_of_the_base(
    text: Path, tmp_path: Path, base: Path
) -> None:
    settings = replace(TINY, lora_rank=2, lora_parts="att,ln")
    run(text, tmp_path / "out.pth", settings, stop_at=0, base=base)
    names = names_in(torch.load(tmp_path / "out.checkpoint", weights_only=True))
    assert len([name for name in names if ".lora_" in name]) == 2 * 2 * 3
    assert {name for name in names if name.endswith(".weight")} == {
        f"network.blocks.{name}.weight" for name in ("0.ln0", "0.ln1", "0.ln2", "1.ln1", "1.ln2")
    }
    with pytest.raises(RWKVFileError, match="trained with --lora-rank 2, asked for is 3"):
        run(text, tmp_path / "out.pth", replace(settings, lora_rank=3), resume=True, base=base)
    weights = torch.load(base)
    weights["head.weight"][3, 3] += 1
    torch.save(weights, base)
    with pytest.raises(RWKVFileError, match=r"trained from another base .*--from"):
        run(text, tmp_path / "out.pth", settings, resume=True, base=base)


def test_held_out_loss_of_a_state_is_that_of_windows_that_begin_with_it(
    text: Path, base: Path
) -> None:
    one = trainer(text, replace(TINY, tune_state=True), base)
    held_out = torch.from_numpy(one.held_out.tokens.astype(np.int64))
    total = 0.0
    for x, y in zip(
        held_out[:-1].split(TINY.sequence), held_out[1:].split(TINY.sequence), strict=True
    ):
        with torch.no_grad():
            logits, _ = one.averaged(x[None], one.averaged.past(1))
        total += torch.nn.functional.cross_entropy(logits[0], y, reduction="sum").item()
    assert one.evaluate(pieces=1).mean == pytest.approx(total / (len(held_out) - 1), rel=1e-5)


def test_seeds_differ(text: Path) -> None:
    first, again, other = (trainer(text, replace(TINY, seed=seed)).step() for seed in (1, 1, 2))
    assert first == again != other


def test_model_file_has_the_released_names_and_shapes(text: Path, tmp_path: Path) -> None:
    c, target = TINY.n_embed, tmp_path / "out.pth"
    trainer(text, TINY).averaged.save(target)
    expected = {"emb.weight": (256, c), "head.weight": (256, c)}
    for name in ("blocks.0.ln0", "ln_out", *(f"blocks.{i}.ln{j}" for i in (0, 1) for j in (1, 2))):
        expected |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    for i in range(2):
        expected |= {f"blocks.{i}.att.time_{name}": (c,) for name in ("decay", "first")}
        expected |= {f"blocks.{i}.att.time_mix_{name}": (1, 1, c) for name in "kvr"}
        expected |= {f"blocks.{i}.ffn.time_mix_{name}": (1, 1, c) for name in "kr"}
        for name in ("key", "receptance", "value", "output"):
            expected[f"blocks.{i}.att.{name}.weight"] = (c, c)
        expected[f"blocks.{i}.ffn.key.weight"] = (4 * c, c)
        expected[f"blocks.{i}.ffn.receptance.weight"] = (c, c)
        expected[f"blocks.{i}.ffn.value.weight"] = (c, 4 * c)
    tensors = torch.load(target, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_checkpoints_of_another_run_are_refused(text: Path, tmp_path: Path) -> None:
    target, checkpoint = tmp_path / "out.pth", tmp_path / "out.checkpoint"
    run(text, target, TINY, stop_at=0)
    with pytest.raises(RWKVFileError, match=r"unfinished run .*--resume"):
        run(text, target, TINY)
    with pytest.raises(RWKVFileError, match="trained with --batch 4, asked for is 5"):
        run(text, target, replace(TINY, batch=5), resume=True)
    text.write_bytes(text.read_bytes() + b"!")
    with pytest.raises(RWKVFileError, match="another text"):
        run(text, target, TINY, resume=True)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RWKVFileError, match="not a checkpoint"):
        run(text, target, TINY, resume=True)


def test_infinite_loss_is_an_error(text: Path) -> None:
    run = trainer(text, TINY)
    torch.nn.init.constant_(run.learner.network.head.weight, float("inf"))
    with pytest.raises(RWKVError, match="the loss is nan at step 0"):
        run.step()


TINY_OPTIONS = ["--n-layer=1", "--n-embed=8", "--sequence=16", "--batch=2", "--steps=4"]


@pytest.fixture
def rwkv_train(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `rwkv train` with the arguments given: its exit code and all that it wrote."""

    def invoke(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rwkv", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return exit_info.value.code, "".join(capfd.readouterr())

    before = signal.getsignal(signal.SIGTERM)
    yield invoke
    signal.signal(signal.SIGTERM, before)


def test_command_writes_model_and_curve(text: Path, tmp_path: Path, rwkv_train) -> None:
    code, output = rwkv_train(text, tmp_path / "out.pth", *TINY_OPTIONS)
    assert code == 0, output
    assert "step 4: held-out loss" in output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["out.png", "out.pth", "text.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint(
    text: Path,
    tmp_path: Path,
    rwkv_train,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    real_step = Trainer.step

    def step_with_signal(trainer: Trainer) -> float:
        if trainer.progress.step == 1:
            signal.raise_signal(number)
        return real_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_with_signal)
        code, output = rwkv_train(text, tmp_path / "out.pth", *TINY_OPTIONS)
    assert code == 128 + number
    assert "--resume" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.checkpoint", "text.txt"]
    code, output = rwkv_train(text, tmp_path / "out.pth", *TINY_OPTIONS, "--resume")
    assert code == 0, output
    assert (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "text.txt: has no tokens"),
        (b"x" * 200, [], "the data to train on has 180 tokens, a window needs 257"),
        (b"x" * 19, ["--sequence", "4"], "its held-out tenth has no two tokens"),
        (b"x" * 3000, ["--resume"], "out.checkpoint: No such file or directory"),
        (b"x" * 3000, ["--steps", "0"], "--steps"),
        (b"x" * 3000, ["--learning-rate", "0"], "--learning-rate"),
        (b"x" * 3000, ["--dropout", "1"], "--dropout"),
        (b"x" * 3000, ["--precision", "int8"], "--precision"),
        (None, [], "text.txt: No such file or directory"),
    ],
)
def test_command_errors(
    tmp_path: Path, rwkv_train, content: bytes | None, options: list[str], message: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    code, output = rwkv_train(text, tmp_path / "out.pth", *options)
    assert code == (2 if message.startswith("--") else 1)
    assert "Traceback" not in output
    error = output.splitlines()[-1]
    assert error.lower().startswith("error: ")
    assert message in error
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-rank", "4"], "--lora-rank needs --from"),
        (["--tune-state"], "--tune-state needs --from"),
        (["--from", "base.pth", "--lora-alpha", "8"], "--lora-alpha needs --lora-rank"),
        (["--from", "base.pth", "--lora-parts", "att"], "--lora-parts needs --lora-rank"),
        (["--from", "base.pth", "--lora-rank", "4", "--tune-state"], "--lora-rank and --tune-st"),
        (["--from", "base.pth", "--n-layer", "4"], "--from and --n-layer cannot be used together"),
        (["--from", "base.pth", "--tune-state", "--optimizer", "adamw"], "--optimizer and --tune"),
        (["--from", "base.pth", "--lora-rank", "0"], "--lora-rank"),
    ],
)
def test_command_refuses_contradictions(text: Path, rwkv_train, options, message) -> None:
    code, output = rwkv_train(text, "out.pth", *options)
    assert code == 2
    assert message in output.splitlines()[-1]


def test_command_refuses_unknown_parts(text: Path, base: Path, rwkv_train) -> None:
    for parts, shown in (("att,head", "'head'"), ("", "''")):
        arguments = ("--from", base, "--lora-rank", 2, "--lora-parts", parts, "--sequence", 16)
        code, output = rwkv_train(text, base.with_name("out.pth"), *arguments)
        assert (code, output.count("\n")) == (1, 1)
        assert f"{shown}, expected some of att, ffn, time, ln" in output


def test_command_refuses_to_overwrite_its_text(text: Path, rwkv_train) -> None:
    named_like_a_model = text.rename(text.with_suffix(".pth"))
    content = named_like_a_model.read_bytes()
    code, output = rwkv_train(named_like_a_model, named_like_a_model)
    assert code == 1
    assert "same file" in output
    assert named_like_a_model.read_bytes() == content


def test_command_wants_a_pth_file(text: Path, rwkv_train) -> None:
    code, output = rwkv_train(text, text.with_suffix(".checkpoint"))
    assert code == 1
    assert "expected a name that ends in .pth" in output


def test_missing_torch_is_named(text: Path, rwkv_train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, output = rwkv_train(text, text.with_suffix(".pth"))
    assert code == 1
    assert output == "error: training needs the package torch (pip install 'rwkv-ggml[train]')\n"


def test_help_works_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None\n"
        "sys.argv = ['rwkv', 'train', '--help']; import rwkv_cpp.cli; rwkv_cpp.cli.main()"
    )
    folder = Path(cli.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rwkv train shakespeare.txt" in done.stdout
