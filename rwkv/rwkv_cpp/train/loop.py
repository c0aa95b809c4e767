"""Training from scratch: batches, the optimizer's steps, held-out loss, checkpoints.

Every step seeds torch with (seed, step) before it draws its batch and its dropout, so a step
depends on nothing but the weights and its own number, and a resumed run repeats an uninterrupted
one to the bit.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..atomic import refuse_same_file, replacing
from ..errors import RWKVError, RWKVFileError
from .network import Network

N_VOCAB = 256  # tokens are bytes
HELD_OUT = 0.1  # the last part of the text, never trained on
EVALUATIONS = 20  # held-out losses in a run, evenly spread
STREAMS = 32  # the held-out text is read as that many texts at once (the last loss: as one)
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; a checkpoint can only be resumed with the same."""

    n_layer: int = 5
    n_embed: int = 256
    sequence: int = 256
    batch: int = 32
    steps: int = 900
    learning_rate: float = 1.5e-3
    warmup: int = 50
    dropout: float = 0.15
    average: float = 0.99
    seed: int = 0
    precision: str = "auto"


@dataclass
class Progress:
    """Where a run stands; losses are in nats per byte, keyed by the steps done before."""

    step: int
    train: dict[int, float]
    held_out: dict[int, float]
    seconds: float  # of work, over all the pieces of an interrupted run
    cpu_seconds: float
    finished: bool = False


def read_text(path: Path, sequence: int) -> tuple[Tensor, Tensor]:
    """The bytes of `path` as (train, held-out) tensors, each at least one sequence and a byte."""
    data = torch.from_numpy(np.fromfile(path, np.uint8))
    cut = len(data) - int(len(data) * HELD_OUT)
    for name, part in (("training", data[:cut]), ("held-out", data[cut:])):
        if len(part) <= sequence:
            raise RWKVFileError(
                f"{path}: its {name} part has {len(part)} bytes, one sequence needs {sequence + 1}"
                " (use a longer text or a smaller --sequence)"
            )
    return data[:cut], data[cut:]


def bfloat16_is_faster(settings: Settings) -> bool:
    """Whether this CPU multiplies matrices of the model's shape clearly faster in bfloat16."""
    rows, columns = settings.batch * settings.sequence, settings.n_embed
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(5):
        for dtype in best:
            x = torch.ones(min(rows, 4096), columns, dtype=dtype)
            w = torch.ones(4 * columns, columns, dtype=dtype)
            start = time.perf_counter()
            F.linear(x, w)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine from the full rate to zero at the last step."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    rest = max(step - settings.warmup, 0) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def make_optimizer(network: Network) -> torch.optim.AdamW:
    """AdamW that decays matrices only: vectors are gates, rates and scales with no pull to zero."""
    matrices = [p for p in network.parameters() if p.dim() == 2]
    vectors = [p for p in network.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


@torch.no_grad()
def held_out_loss(network: Network, data: Tensor, streams: int, sequence: int) -> float:
    """Mean loss in nats per byte over `data`, read as `streams` texts with the state carried."""
    length = (len(data) - 1) // streams
    inputs = data[: streams * length].view(streams, length).long()
    targets = data[1 : streams * length + 1].view(streams, length).long()
    network.eval()
    past = network.empty_past(streams)
    total = 0.0
    for x, y in zip(inputs.split(sequence, 1), targets.split(sequence, 1), strict=True):
        logits, past = network(x, past)
        total += F.cross_entropy(logits.float().transpose(1, 2), y, reduction="sum").item()
    network.train()
    return total / inputs.numel()


class Trainer:
    """One run: the network, its averaged twin, the optimizer and what has been seen so far."""

    def __init__(self, text: Path, settings: Settings) -> None:
        self.settings = settings
        self.train_data, self.held_out_data = read_text(text, settings.sequence)
        text_hash = hashlib.sha256(self.train_data.numpy())
        text_hash.update(self.held_out_data.numpy())
        self.text_hash = text_hash.hexdigest()
        torch.manual_seed(settings.seed)
        shape = (N_VOCAB, settings.n_layer, settings.n_embed)
        self.network = Network(*shape, settings.dropout)
        self.averaged = Network(*shape)
        self.averaged.load_state_dict(self.network.state_dict())
        self.averaged.requires_grad_(False)
        self.optimizer = make_optimizer(self.network)
        self.progress = Progress(0, {}, {}, 0.0, 0.0)
        self.precision = settings.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if bfloat16_is_faster(settings) else "float32"

    def step(self) -> float:
        """One step of the optimizer; the batch's loss before it, in nats per byte."""
        settings, number = self.settings, self.progress.step
        torch.manual_seed(settings.seed * 1_000_003 + number + 1)
        starts = torch.randint(len(self.train_data) - settings.sequence, (settings.batch, 1))
        window = self.train_data[starts + torch.arange(settings.sequence + 1)].long()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, number)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits, _ = self.network(window[:, :-1], self.network.empty_past(settings.batch))
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        if not loss.isfinite():
            raise RWKVError(
                f"the loss is {loss.item()} at step {number} (try a smaller --learning-rate)"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A young average forgets faster, or it would remember the first random weights.
        keep = min(settings.average, (number + 1) / (number + 10))
        with torch.no_grad():
            for mean, now in zip(
                self.averaged.parameters(), self.network.parameters(), strict=True
            ):
                mean.lerp_(now, 1 - keep)
        self.progress.train[number] = loss.item()
        self.progress.step += 1
        return loss.item()

    def evaluate(self, streams: int = STREAMS) -> float:
        """Held-out loss of the averaged weights, in float32."""
        sequence = self.settings.sequence
        streams = min(streams, len(self.held_out_data) // (sequence + 1))
        loss = held_out_loss(self.averaged, self.held_out_data, streams, sequence)
        self.progress.held_out[self.progress.step] = loss
        return loss

    def save_checkpoint(self, path: Path) -> None:
        with replacing(path) as file:
            torch.save(
                {
                    "settings": asdict(self.settings),
                    "precision": self.precision,
                    "text": self.text_hash,
                    "progress": asdict(self.progress),
                    "network": self.network.state_dict(),
                    "averaged": self.averaged.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                file,
            )

    def load_checkpoint(self, path: Path) -> None:
        try:
            saved = torch.load(path, weights_only=True)
            settings, text = saved["settings"], saved["text"]
        except OSError:
            raise
        except Exception as error:  # torch has many for a file that is damaged or of another kind
            raise RWKVFileError(f"{path}: not a checkpoint of a training run") from error
        for name, value in asdict(self.settings).items():
            if settings.get(name) != value:
                raise RWKVFileError(
                    f"{path}: was trained with --{name.replace('_', '-')} {settings.get(name)}, "
                    f"asked for is {value} (resume with the same options)"
                )
        if text != self.text_hash:
            raise RWKVFileError(f"{path}: was trained on another text (resume with the same text)")
        self.precision = saved["precision"]
        self.progress = Progress(**saved["progress"])
        self.network.load_state_dict(saved["network"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def save_model(self, path: Path) -> None:
        """Write the averaged weights as a released checkpoint has them."""
        with replacing(path) as file:
            torch.save(self.averaged.state_dict(), file)


def train(
    text: Path,
    target: Path,
    settings: Settings,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train on `text` and write `target`, a name that ends in .pth, yielding after each step.

    A checkpoint beside `target`, with the suffix .checkpoint, is written every minute and when
    `should_stop()` says so, and removed when `target` is complete. With `resume` the run goes on
    from it.

    Raises RWKVFileError for a text that is too short or a checkpoint of another run, ValueError for
    another suffix, RWKVError when the loss is not finite any more.
    """
    if target.suffix != ".pth":
        raise ValueError(f"{target}: expected a name that ends in .pth")
    refuse_same_file(text, target)
    checkpoint = target.with_suffix(".checkpoint")
    trainer = Trainer(text, settings)
    if resume:
        trainer.load_checkpoint(checkpoint)
    elif checkpoint.exists():
        raise RWKVFileError(f"{checkpoint}: an unfinished run (go on with --resume, or delete it)")
    trainer.save_checkpoint(checkpoint)  # a folder that cannot be written to shows at once
    progress = trainer.progress
    every = max(settings.steps // EVALUATIONS, 1)
    clock, cpu_clock, saved = time.monotonic(), time.process_time(), time.monotonic()
    while progress.step < settings.steps:
        trainer.step()
        if progress.step % every == 0 and progress.step < settings.steps:
            trainer.evaluate()
        now, cpu_now = time.monotonic(), time.process_time()
        progress.seconds += now - clock
        progress.cpu_seconds += cpu_now - cpu_clock
        clock, cpu_clock = now, cpu_now
        stop = should_stop()
        if stop or now - saved > CHECKPOINT_SECONDS:
            trainer.save_checkpoint(checkpoint)
            saved = now
        yield progress
        if stop:
            return
    trainer.evaluate(streams=1)  # as the core's perplexity reads it
    progress.finished = True
    trainer.save_model(target)
    checkpoint.unlink(missing_ok=True)
    yield progress
