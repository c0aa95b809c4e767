"""A run: batches, the optimizers' steps, held-out losses, checkpoints.

A batch is drawn and torch seeded from (seed, step), so a step depends on nothing but the weights,
what a text before it has left where that is carried, and its own number; a resumed run repeats an
uninterrupted one to the bit.
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
from ..token_data import TokenData, open_tokens
from ..tokenizer import Tokenizer, load_tokenizer, tokenizer_named
from .data import IGNORED, Batch, Streams, Windows, split
from .evaluation import HeldOutLoss, held_out_loss
from .learner import Learner, read_network
from .lora import PARTS, LoRA
from .network import Network, Past
from .optimizers import learning_rate, make_optimizers
from .state import InitialState

HELD_OUT = 0.1  # the last part of the text, never trained on
EVALUATIONS = 20  # held-out losses in a run, evenly spread
PIECES = 32  # the held-out text is read as so many at once (the last loss: as one)
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; a checkpoint can only be resumed with the same."""

    tokenizer: str | None = None  # None: the base's, or bytes
    n_layer: int = 5
    n_embed: int = 256
    arch: str = "4"
    tiny_dim: int | None = None
    tiny_layer: int | None = None
    sequence: int = 256
    batch: int = 32
    accumulate: int = 1
    carry: int | None = None  # windows; None: each from anywhere, and from an empty state
    steps: int = 900
    learning_rate: float = 1.5e-3
    final_learning_rate: float = 0.0
    warmup: int = 50
    optimizer: str = "muon"
    weight_decay: float = 0.1
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
    """Where a run stands; losses are in nats per token, keyed by the steps done before."""

    step: int
    train: dict[int, float]
    held_out: dict[int, float]
    seconds: float  # of work, over all the pieces of an interrupted run
    cpu_seconds: float
    bytes_per_token: float  # of the held-out part; 0 if no token has bytes
    finished: bool = False
    by_position: dict[int, float] | None = None  # see HeldOutLoss, when finished


def bfloat16_is_faster(settings: Settings, device: torch.device) -> bool:
    """Whether the device multiplies matrices of the model's shape clearly faster in bfloat16."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
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


def find_device(name: str) -> torch.device:
    """Raises RWKVError for one that this torch or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RWKVError(f"--device {name}: cannot be used ({reason})") from None
    return device


def new_network(settings: Settings, n_vocab: int) -> Network:
    """One of random weights. RWKV-4a's attention is half as wide as the layers and stands after
    three quarters of them unless the settings say otherwise."""
    n_layer, tiny = settings.n_layer, {}
    if settings.arch != "4a" and (settings.tiny_dim, settings.tiny_layer) != (None, None):
        raise ValueError("--tiny-dim and --tiny-layer need --arch 4a")
    if settings.arch == "4a":
        layer = 3 * n_layer // 4 if settings.tiny_layer is None else settings.tiny_layer
        if layer >= n_layer:
            raise ValueError(f"--tiny-layer {layer}: the model has layers 0 to {n_layer - 1}")
        tiny = {"tiny_dim": settings.tiny_dim or -(-settings.n_embed // 2), "tiny_layer": layer}
    return Network(n_vocab, n_layer, settings.n_embed, settings.dropout, **tiny)


def make_learner(settings: Settings, network: Network, tokens: Tensor) -> Learner:
    """What the run trains, before the first step. tokens: some of the text, (batch, sequence)."""
    if settings.lora_rank:
        parts = settings.lora_parts.split(",")
        return LoRA(network, settings.lora_rank, settings.lora_alpha, parts)
    return InitialState(network, tokens) if settings.tune_state else Learner(network)


def hash_of(*arrays: np.ndarray | Tensor) -> str:
    result = hashlib.sha256()
    for array in arrays:
        result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()


class Trainer:
    """One run: what learns, its averaged twin, the optimizers and what has been seen so far."""

    def __init__(
        self, text: Path, settings: Settings, base: Path | None = None, device: str = "cpu"
    ) -> None:
        self.settings = settings
        self.device = find_device(device)
        torch.manual_seed(settings.seed)
        if base:
            network = read_network(base, settings.dropout)
            tokenizer = _tokenizer_for(base, network, settings.tokenizer)
        else:
            tokenizer = tokenizer_named(settings.tokenizer or "bytes")
            network = new_network(settings, tokenizer.n_vocab)
        data = open_tokens(text, tokenizer)
        self.text_hash = hash_of(data.tokens, data.documents)
        train, self.held_out = split(data, HELD_OUT)
        shape = (settings.batch, settings.sequence, settings.seed)
        # A state is learned where documents begin; each window of a long one counts as one.
        if n_windows := 1 if settings.tune_state else settings.carry:
            self.batches: Windows | Streams = Streams(train, *shape, n_windows)
        else:
            self.batches = Windows(train, *shape)
        if self.held_out.tokens.size < 2:
            raise RWKVFileError(f"{text}: its held-out tenth has no two tokens (use a longer text)")
        learner = make_learner(settings, network, self.batches.draw(0).inputs)
        self.learner = learner.to(self.device)
        self.past: list[Past] | None = None  # what the batch before has left, where it is carried
        frozen = {id(p): p for p in learner.parameters() if not p.requires_grad}
        self.frozen_hash = hash_of(*(p.detach().cpu() for p in frozen.values()))
        self.averaged = copy.deepcopy(learner, frozen)  # they share what does not learn
        self.learning, self.averages = learner.learning(), self.averaged.learning()
        self.optimizers = make_optimizers(learner, settings.optimizer, settings.weight_decay)
        self.progress = Progress(0, {}, {}, 0.0, 0.0, _bytes_per_token(tokenizer, self.held_out))
        self.precision = settings.precision
        if self.precision == "auto":
            faster = bfloat16_is_faster(settings, self.device)
            self.precision = "bfloat16" if faster else "float32"

    def step(self) -> float:
        """One step of the optimizers; the batch's loss before it, in nats per token."""
        settings, number = self.settings, self.progress.step
        torch.manual_seed(settings.seed * 1_000_003 + number + 1)
        loss = self.backward(self.batches.draw(number))
        if not math.isfinite(loss):
            raise RWKVError(f"the loss is {loss} at step {number} (try a smaller --learning-rate)")
        torch.nn.utils.clip_grad_norm_(self.learning.values(), 1.0)
        rate = learning_rate(
            number,
            settings.steps,
            settings.warmup,
            settings.learning_rate,
            settings.final_learning_rate,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
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

    def backward(self, batch: Batch) -> float:
        """Add the gradients of a batch, part by part; its loss."""
        n_targets = int((batch.targets != IGNORED).sum())
        total, left = 0.0, []
        for rows in torch.arange(len(batch.inputs)).chunk(self.settings.accumulate):
            inputs, targets = (x[rows].to(self.device) for x in (batch.inputs, batch.targets))
            past = self.past_of(rows, batch.continues[rows].to(self.device))
            logits, after = self.learner(inputs, past, getattr(torch, self.precision))
            loss = F.cross_entropy(
                logits.float().flatten(0, 1),
                targets.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            (loss / n_targets).backward()
            total += loss.item()
            left.append([Past(*(part.detach() for part in layer)) for layer in after])
        if self.settings.carry:
            self.past = [
                Past(*map(torch.cat, zip(*layers, strict=True)))
                for layers in zip(*left, strict=True)
            ]
        return total / n_targets

    def past_of(self, rows: Tensor, continues: Tensor) -> list[Past]:
        """What `rows` of the batch begin with; those that continue do where they stopped."""
        fresh = self.learner.past(len(rows))
        if self.past is None:
            return fresh
        return [
            Past(
                *(
                    torch.where(continues.view(-1, *[1] * (new.dim() - 1)), old[rows], new)
                    for old, new in zip(old_layer, new_layer, strict=True)
                )
            )
            for old_layer, new_layer in zip(self.past, fresh, strict=True)
        ]

    def evaluate(self, pieces: int = PIECES) -> HeldOutLoss:
        """Held-out loss of the averaged weights, in float32."""
        settings = self.settings
        rows = max(settings.batch // settings.accumulate, 1)
        pieces = max(min(pieces, self.held_out.tokens.size // (settings.sequence + 1)), 1)
        loss = held_out_loss(
            self.averaged, self.held_out, settings.sequence, rows=rows, pieces=pieces
        )
        self.progress.held_out[self.progress.step] = loss.mean
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
                    "past": None if self.past is None else [tuple(layer) for layer in self.past],
                    "learning": self.learning,
                    "averages": self.averages,
                    "optimizers": [each.state_dict() for each in self.optimizers],
                },
                file,
            )

    def load_checkpoint(self, path: Path) -> None:
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
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
        self.past = saved["past"] and [Past(*layer) for layer in saved["past"]]
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
    device: str = "cpu",
    gradient_checkpointing: bool = False,
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
    for source in (text, base):
        if source is not None:
            refuse_same_file(source, target)
    checkpoint = target.with_suffix(".checkpoint")
    trainer = Trainer(text, settings, base, device)
    trainer.learner.network.recomputes = gradient_checkpointing
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
    progress.by_position = trainer.evaluate().by_position()
    trainer.evaluate(pieces=1)  # as the core's perplexity reads it
    progress.finished = True
    trainer.averaged.save(target)
    checkpoint.unlink(missing_ok=True)
    yield progress


def _tokenizer_for(base: Path, network: Network, name: str | None) -> Tokenizer:
    n_vocab = network.emb.num_embeddings
    if name is None:
        return load_tokenizer(n_vocab)
    tokenizer = tokenizer_named(name)
    if tokenizer.n_vocab > n_vocab:
        raise RWKVFileError(
            f"{base}: has {n_vocab} tokens, --tokenizer {name} {tokenizer.n_vocab} (leave it out, "
            "or name the one that the model was trained with)"
        )
    return tokenizer


def _bytes_per_token(tokenizer: Tokenizer, data: TokenData) -> float:
    counts = np.bincount(data.tokens, minlength=tokenizer.n_vocab)
    n_bytes = sum(
        int(counts[token]) * len(tokenizer.token_bytes(int(token)) or b"")
        for token in np.flatnonzero(counts)
    )
    return n_bytes / data.tokens.size
