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

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from rwkv_cpp import cli  # noqa: E402
from rwkv_cpp.errors import RWKVError, RWKVFileError  # noqa: E402
from rwkv_cpp.train.loop import Progress, Settings, Trainer, train  # noqa: E402
from rwkv_cpp.train.network import Network  # noqa: E402

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
        {"carry": 3, "precision": "bfloat16"},
        {"carry": 3, "accumulate": 2, "arch": "4a", "dropout": 0.0},
        {"optimizer": "adamw"},
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


def test_checkpointing_changes_no_loss(text: Path, tmp_path: Path) -> None:
    kept = run(text, tmp_path / "kept.pth", TINY)
    recomputed = run(text, tmp_path / "recomputed.pth", TINY, gradient_checkpointing=True)
    assert recomputed.train == kept.train


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.01},
        {"final_learning_rate": 1e-3},
        {"warmup": 0},
        {"weight_decay": 0.5},
        {"dropout": 0.5},
        {"optimizer": "adamw"},
        {"arch": "4a"},
        {"sequence": 23},
        {"carry": 2},
        {"average": 0.2},
    ],
)
def test_options_change_what_is_learned(text: Path, tmp_path: Path, changes: dict) -> None:
    losses = [
        run(text, tmp_path / f"{number}.pth", replace(settings, batch=2)).held_out[8]
        for number, settings in enumerate((TINY, replace(TINY, **changes)))
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay(text: Path, optimizer: str) -> None:
    """Of the matrices of layers; what tells tokens apart that do not occur stays as it was."""
    settings = replace(TINY, optimizer=optimizer, weight_decay=20.0, learning_rate=0.01)
    one = trainer(text, settings)
    network = one.learner.network
    absent = [token for token in range(256) if token not in text.read_bytes()]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(4):
        one.step()
    for name, p in network.named_parameters():
        if name == "emb.weight":
            torch.testing.assert_close(p[absent], before[name][absent], rtol=0, atol=0)
        elif name == "head.weight":
            after, first = (
                (rows[absent] - rows[absent].mean(0)).norm() for rows in (p, before[name])
            )
            assert after > 0.9 * first
        elif p.dim() == 2 and before[name].any():
            assert p.norm() < 0.8 * before[name].norm(), name


def test_parts_of_a_batch_add_up_to_its_gradient(text: Path) -> None:
    whole, parts = (
        trainer(text, replace(TINY, dropout=0.0, accumulate=number, carry=2)) for number in (1, 3)
    )
    for number in range(3):  # in the third, the carried past begins anew
        losses = [one.backward(one.batches.draw(number)) for one in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for name, parameter in whole.learning.items():
            gradient = parts.learning[name].grad
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_carried_past_is_that_of_the_text_before(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 20)
    one = trainer(text, replace(TINY, carry=1000, batch=1, dropout=0.0))
    torch.nn.init.normal_(one.learner.network.head.weight)
    read, losses = [], []
    for number in range(4):
        batch = one.batches.draw(number)
        assert bool(batch.continues[0]) == (number > 0)
        losses.append(one.backward(batch))
        read.append(batch.inputs)
    tokens = torch.cat([*read, batch.targets[:, -1:]], 1)
    logits, _ = one.learner(tokens[:, :-1], one.learner.past(1))
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
    assert losses == pytest.approx(expected.view(4, -1).mean(1).tolist(), rel=1e-5)
    assert not any(part.requires_grad for layer in one.past for part in layer)


def test_documents_and_losses_per_byte(tmp_path: Path) -> None:
    vocabulary = tmp_path / "words.txt"
    words = [bytes([value]) for value in range(256)] + [b"fox ", b"lazy dog "]
    lines = (f"{i} {word!r} {len(word)}\n" for i, word in enumerate(words, 1))
    vocabulary.write_text("".join(lines))
    text = tmp_path / "documents.jsonl"
    text.write_text('{"text": "fox lazy dog fox lazy dog ."}\n' * 40)
    settings = replace(TINY, tokenizer=str(vocabulary), sequence=3, carry=2)
    one = trainer(text, settings)
    assert one.learner.network.emb.num_embeddings == 259
    assert len(one.held_out.documents) == 4
    assert one.progress.bytes_per_token == pytest.approx(27 / 5)
    progress = run(text, tmp_path / "out.pth", replace(settings, steps=2))
    assert 0 < progress.held_out[2] < math.log(259)
    assert list(progress.by_position) == [1, 2, 4]
    again = trainer(text, settings, tmp_path / "out.pth")  # any vocabulary, if its file is named
    assert again.learner.network.emb.num_embeddings == 259
    with pytest.raises(RWKVError, match="no tokenizer is known for 259 tokens"):
        trainer(text, replace(settings, tokenizer=None), tmp_path / "out.pth")


def test_tokenizer_of_another_model_is_refused(text: Path, tmp_path: Path, base: Path) -> None:
    vocabulary = tmp_path / "words.txt"
    lines = [f"{i} {bytes([i - 1])!r} 1\n" for i in range(1, 257)]
    vocabulary.write_text("".join(lines))
    with pytest.raises(RWKVFileError, match=r"base.pth: has 256 tokens, --tokenizer .* 257"):
        trainer(text, replace(TINY, tokenizer=str(vocabulary)), base)


def test_run_from_a_checkpoint_begins_with_its_loss(text: Path, tmp_path: Path) -> None:
    settings = replace(TINY, arch="4a", steps=20, learning_rate=0.01)
    before = run(text, tmp_path / "base.pth", settings)
    one = trainer(text, TINY, tmp_path / "base.pth")  # its sizes are the file's
    assert one.evaluate(pieces=1).mean == before.held_out[20]


@pytest.mark.parametrize("device", ["cuda:77", "toaster"])
def test_devices_that_are_not_there(text: Path, device: str) -> None:
    with pytest.raises(RWKVError, match=f"--device {device}: cannot be used"):
        Trainer(text, TINY, device=device)


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
        (b"x" * 3000, ["--carry", "0"], "--carry"),
        (b"x" * 3000, ["--arch", "5"], "--arch"),
        (b"x" * 3000, ["--tiny-dim", "4"], "--tiny-dim needs --arch"),
        (b"x" * 3000, ["--arch", "4", "--tiny-dim", "4"], "need --arch 4a"),
        (b"x" * 3000, ["--arch", "4a", "--tiny-layer", "5"], "the model has layers 0 to 4"),
        (b"x" * 3000, ["--device", "toaster"], "device toaster: cannot be used"),
        (b"x" * 3000, ["--tokenizer", "words"], "unknown tokenizer 'words'"),
        (b"\xff" * 3000, [], "text.txt: not UTF-8"),
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


def test_command_refuses_to_overwrite_its_base(text: Path, rwkv_train) -> None:
    base = text.with_name("base.pth")
    base.write_bytes(b"precious")
    code, output = rwkv_train(text, base, "--from", base)
    assert code == 1
    assert "same file" in output
    assert base.read_bytes() == b"precious"


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
