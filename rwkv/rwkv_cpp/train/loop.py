"""Training from scratch: batches, the optimizer's steps, held-out loss, checkpoints.

Every step seeds torch with (seed, step) before it draws its batch and its dropout, so a step
depends on nothing but the weights and its own number, and a resumed run repeats an uninterrupted
one to the bit.
"""

import copy
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
from .learner import Learner, read_network
from .lora import PARTS, LoRA
from .network import Network
from .state import InitialState

N_VOCAB = 256  # tokens are bytes
HELD_OUT = 0.1  # the last part of the text, never trained on
EVALUATIONS = 20  # held-out losses in a run, evenly spread
STREAMS = 32  # the held-out text is read as that many texts at once (the last loss: as one)
CHECKPOINT_SECONDS = 60
MUON_SHARE = 4.0  # Muon's learning rate; AdamW's is 1


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; a checkpoint can only be resumed with the same."""

    n_layer: int = 5
    n_embed: int = 256
    sequence: int = 256
    batch: int = 32
    accumulate: int = 1
    steps: int = 900
    learning_rate: float = 1.5e-3
    warmup: int = 50
    optimizer: str = "muon"
    dropout: float = 0.15
    average: float = 0.99
    seed: int = 0
    precision: str = "auto"
    lora_rank: int | None = None  # learn a LoRA of this rank …
    lora_alpha: float = 32.0
    lora_parts: str = ",".join(PARTS)
    tune_state: bool = False  # … or the state before the first token


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


def make_optimizers(learner: Learner, kind: str) -> list[torch.optim.Optimizer]:
    """AdamW for all that learns, or Muon ("muon") for matrices between activations and AdamW for
    the rest. Matrices decay; vectors are gates, rates and scales with no pull to zero.

    A group's "share" is its part of the learning rate.
    """
    learning = learner.learning()
    rotated = learner.rotated() if kind == "muon" else set()
    by_adamw = [p for name, p in learning.items() if name not in rotated]
    groups = [
        {"params": [p for p in by_adamw if p.dim() == 2], "weight_decay": 0.1, "share": 1.0},
        {"params": [p for p in by_adamw if p.dim() != 2], "weight_decay": 0.0, "share": 1.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), fused=True)
    ]
    if rotated:
        group = {"params": [learning[name] for name in sorted(rotated)], "share": MUON_SHARE}
        optimizers.append(
            torch.optim.Muon(
                [group], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


@torch.no_grad()
def held_out_loss(learner: Learner, data: Tensor, streams: int, sequence: int) -> float:
    """Mean loss in nats per byte over `data`, read as `streams` texts in windows of `sequence`.

    The state is carried from one window to the next, except where that is not what is learned.
    """
    length = (len(data) - 1) // streams
    inputs = data[: streams * length].view(streams, length).long()
    targets = data[1 : streams * length + 1].view(streams, length).long()
    learner.eval()
    past = learner.past(streams)
    total = 0.0
    for x, y in zip(inputs.split(sequence, 1), targets.split(sequence, 1), strict=True):
        logits, past = learner(x, past if learner.carries_past else learner.past(streams))
        total += F.cross_entropy(logits.float().transpose(1, 2), y, reduction="sum").item()
    learner.train()
    return total / inputs.numel()


def make_learner(settings: Settings, base: Path | None, text: Path) -> Learner:
    """What the run trains, as it is before the first step."""
    torch.manual_seed(settings.seed)
    if base is None:
        return Learner(Network(N_VOCAB, settings.n_layer, settings.n_embed, settings.dropout))
    network = read_network(base, settings.dropout)
    if settings.lora_rank:
        parts = settings.lora_parts.split(",")
        return LoRA(network, settings.lora_rank, settings.lora_alpha, parts)
    if settings.tune_state:
        data, _ = read_text(text, settings.sequence)
        return InitialState(network, draw_windows(data, settings)[:, :-1])
    return Learner(network)


def draw_windows(data: Tensor, settings: Settings) -> Tensor:
    """(batch, sequence + 1) tokens from anywhere in `data`."""
    starts = torch.randint(len(data) - settings.sequence, (settings.batch, 1))
    return data[starts + torch.arange(settings.sequence + 1)].long()


def hash_of(*tensors: Tensor) -> str:
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(tensor.detach().numpy())
    return result.hexdigest()


class Trainer:
    """One run: what learns, its averaged twin, the optimizer and what has been seen so far."""

    def __init__(self, learner: Learner, text: Path, settings: Settings) -> None:
        self.settings = settings
        self.train_data, self.held_out_data = read_text(text, settings.sequence)
        self.text_hash = hash_of(self.train_data, self.held_out_data)
        self.learner = learner
        frozen = {id(p): p for p in learner.parameters() if not p.requires_grad}
        self.frozen_hash = hash_of(*frozen.values())
        self.averaged = copy.deepcopy(learner, frozen)  # they share what does not learn
        self.learning, self.averages = learner.learning(), self.averaged.learning()
        self.optimizers = make_optimizers(learner, settings.optimizer)
        self.progress = Progress(0, {}, {}, 0.0, 0.0)
        self.precision = settings.precision
        if self.precision == "auto":
            self.precision = "bfloat16" if bfloat16_is_faster(settings) else "float32"

    def step(self) -> float:
        """One step of the optimizer; the batch's loss before it, in nats per byte."""
        settings, number = self.settings, self.progress.step
        torch.manual_seed(settings.seed * 1_000_003 + number + 1)
        window = draw_windows(self.train_data, settings)
        rate = learning_rate(settings, number)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
        loss = sum(self.backward(part) for part in window.chunk(settings.accumulate))
        if not math.isfinite(loss):
            raise RWKVError(f"the loss is {loss} at step {number} (try a smaller --learning-rate)")
        torch.nn.utils.clip_grad_norm_(self.learning.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # A young average forgets faster, or it would remember the first random weights.
        keep = min(settings.average, (number + 1) / (number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averages.values()), list(self.learning.values()), 1 - keep
            )
        self.progress.train[number] = loss
        self.progress.step += 1
        return loss

    def backward(self, window: Tensor) -> float:
        """Add the gradient of a part (b, sequence + 1) of the batch; its share of the loss."""
        past = self.learner.past(len(window))
        logits, _ = self.learner(window[:, :-1], past, getattr(torch, self.precision))
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / (self.settings.batch * self.settings.sequence)
        loss.backward()
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
                    "frozen": self.frozen_hash,
                    "progress": asdict(self.progress),
                    "learning": self.learning,
                    "averages": self.averages,
                    "optimizers": [each.state_dict() for each in self.optimizers],
                },
                file,
            )

    def load_checkpoint(self, path: Path) -> None:
        try:
            saved = torch.load(path, weights_only=True)
            settings, text, frozen = saved["settings"], saved["text"], saved["frozen"]
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
        if frozen != self.frozen_hash:
            raise RWKVFileError(f"{path}: was trained from another base (resume with its --from)")
        self.precision = saved["precision"]
        self.progress = Progress(**saved["progress"])
        with torch.no_grad():
            for key, tensors in (("learning", self.learning), ("averages", self.averages)):
                for name, tensor in tensors.items():
                    tensor.copy_(saved[key][name])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def train(
    text: Path,
    target: Path,
    settings: Settings,
    *,
    base: Path | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Train on `text` and write `target`, a name that ends in .pth, yielding after each step.

    It begins from the checkpoint `base`, of any size, or with random weights.

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
    trainer = Trainer(make_learner(settings, base, text), text, settings)
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
    trainer.averaged.save(target)
    checkpoint.unlink(missing_ok=True)
    yield progress
