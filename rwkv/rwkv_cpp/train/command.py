"""The `rwkv train` command."""

import importlib.util
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from tqdm import tqdm

from ..errors import RWKVError

if TYPE_CHECKING:
    from .loop import Progress

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
FRACTION = click.FloatRange(0, 1, max_open=True)


# Options that say nothing without another one, and pairs of which only one can be meant.
NEEDS = {"--lora-rank": "--from", "--tune-state": "--from"}
NEEDS |= {"--tiny-dim": "--arch", "--tiny-layer": "--arch"}
NEEDS |= {"--lora-alpha": "--lora-rank", "--lora-parts": "--lora-rank"}
CONTRADICTIONS = [
    ("--lora-rank", "--tune-state"),
    ("--from", "--n-layer"),
    ("--from", "--n-embed"),
    ("--from", "--arch"),
    ("--tune-state", "--carry"),
    ("--optimizer", "--lora-rank"),
    ("--optimizer", "--tune-state"),
]


@click.command(context_settings={"show_default": True})
@click.argument("text", metavar="DATA", type=FILE)
@click.argument("target", metavar="OUT.pth", type=FILE)
@click.option("--from", "base", type=FILE, metavar="BASE.pth", help="Checkpoint to begin from.")
@click.option(
    "--lora-rank",
    type=COUNT,
    metavar="R",
    help="Learn only a LoRA for BASE: pairs of matrices of this rank.",
)
@click.option(
    "--lora-alpha",
    type=click.FloatRange(min=0, min_open=True),
    default=32.0,
    metavar="A",
    help="The pairs weigh A / R. merge-lora needs the same A: no file holds it.",
)
@click.option(
    "--lora-parts",
    default="att,ffn,time,ln",
    metavar="PARTS",
    help="What learns: pairs in att and ffn, the vectors of time and ln as a whole.",
)
@click.option(
    "--tune-state", is_flag=True, help="Learn only the state that sequences of BASE begin with."
)
@click.option(
    "--tokenizer",
    metavar="NAME",
    help="bytes, 20B, world, or a vocabulary file.  [default: BASE's, else bytes]",
)
@click.option("--n-layer", type=COUNT, default=5, help="Layers of the model.")
@click.option("--n-embed", type=COUNT, default=256, help="Channels of a layer.")
@click.option(
    "--arch",
    type=click.Choice(["4", "4a"]),
    default="4",
    help="RWKV-4, or 4a, which has a tiny attention.",
)
@click.option(
    "--tiny-dim", type=COUNT, help="Width of the attention.  [default: half the channels]"
)
@click.option(
    "--tiny-layer",
    type=click.IntRange(min=0),
    help="Layer that it follows, from 0.  [default: after three quarters]",
)
@click.option("--sequence", type=COUNT, default=256, help="Tokens of a training window.")
@click.option("--batch", type=COUNT, default=32, help="Windows of a step.")
@click.option(
    "--carry",
    type=COUNT,
    metavar="N",
    help="Read documents from their beginnings, the state going on over N windows.  "
    "[default: windows from anywhere, each from an empty state]",
)
@click.option("--steps", type=COUNT, default=900, help="Steps of the whole run.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Rate after the warm-up; falls to zero along a cosine.  "
    "[default: 0.0015, with --tune-state 0.1]",
)
@click.option(
    "--final-learning-rate",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Where the cosine ends.",
)
@click.option(
    "--accumulate",
    type=COUNT,
    default=1,
    help="Parts that a batch goes through in, one after the other: less memory.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["muon", "adamw"]),
    default="muon",
    help="Muon learns faster; it takes the matrices of the layers, AdamW the rest.",
)
@click.option("--warmup", type=click.IntRange(min=0), default=50, help="Steps of warm-up.")
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    default=0.1,
    help="Of the matrices of layers; nothing else decays.",
)
@click.option("--dropout", type=FRACTION, default=0.15, help="Part of each branch set to zero.")
@click.option("--average", type=FRACTION, default=0.99, help="What averaged weights keep a step.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Decides every draw.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Of the matrix products; auto: bfloat16 where the device is faster with it.",
)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Keep less of the layers in memory and compute it again: a third slower.",
)
@click.option("--device", default="cpu", help="Where to compute: cpu, cuda, cuda:1.")
@click.option("--threads", type=COUNT, help="CPU threads.  [default: all cores]")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of an unfinished run.")
@click.pass_context
def command(
    context: click.Context,
    /,
    text: Path,
    target: Path,
    base: Path | None,
    threads: int | None,
    resume: bool,
    device: str,
    gradient_checkpointing: bool,
    **options: Any,
) -> None:
    """Train an RWKV-4 on texts: a new one, BASE further, a LoRA or a state for BASE.

    DATA is a text, a .jsonl whose lines are documents, {"text": "…"}, or tokens as prepare-data
    writes them (.bin with .idx, .npy). The last tenth of it is held out and measures the model.
    OUT.pth has the tensor names of the released checkpoints; the losses are drawn in OUT.png.
    Ctrl-C leaves a checkpoint that --resume goes on from.

    \b
    rwkv train shakespeare.txt shakespeare.pth
    rwkv convert shakespeare.pth shakespeare.bin float16
    rwkv train code.txt lora.pth --from shakespeare.pth --lora-rank 16
    rwkv merge-lora shakespeare.bin lora.pth 32 code.bin
    rwkv train shouts.txt shouting.pth --from shakespeare.pth --tune-state
    rwkv generate "ROMEO:" -m shakespeare.bin --load-state shouting.pth
    """
    _refuse_contradictions(context)
    for package in ("torch", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise RWKVError(
                f"training needs the package {package} (pip install 'rwkv-ggml[train]')"
            )
    import torch

    from .curve import draw_curve
    from .loop import Settings, train

    if threads:
        torch.set_num_threads(threads)
    if options["learning_rate"] is None:
        options["learning_rate"] = 0.1 if options["tune_state"] else Settings.learning_rate
    settings = Settings(**options)
    stopped_by: list[int] = []

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        stopped_by.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=settings.steps, unit="step", disable=None)
    try:
        for progress in train(
            text,
            target,
            settings,
            base=base,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            resume=resume,
            should_stop=lambda: bool(stopped_by),
        ):
            bar.update(progress.step - bar.n)
            bar.set_postfix(loss=f"{progress.train[progress.step - 1]:.3f}")
            if progress.step in progress.held_out:
                with bar.external_write_mode():
                    click.echo(
                        f"step {progress.step}: held-out loss {_loss(progress)}, "
                        f"{progress.seconds:.0f} s ({progress.cpu_seconds:.0f} s of CPU)"
                    )
        if not progress.finished:
            bar.close()
            click.echo("stopped, --resume goes on", err=True)
            context.exit(128 + stopped_by[0])
        draw_curve(target.with_suffix(".png"), progress, settings.sequence)
        if settings.lora_rank:
            click.echo(f"rwkv merge-lora MODEL {target} {settings.lora_alpha:g} MERGED")
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _loss(progress: "Progress") -> str:
    """The latest held-out loss."""
    per_token, per_byte = progress.held_out[progress.step], progress.bytes_per_token
    if per_byte == 1:
        return f"{per_token:.4f} nats per byte"
    result = f"{per_token:.4f} nats per token"
    return result + (f", {per_token / per_byte:.4f} per byte" if per_byte else "")


def _refuse_contradictions(context: click.Context) -> None:
    given = {
        option.opts[0]
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    }
    for option, needed in NEEDS.items():
        if option in given and needed not in given:
            raise click.UsageError(f"{option} needs {needed}")
    for one, other in CONTRADICTIONS:
        if one in given and other in given:
            raise click.UsageError(f"{one} and {other} cannot be used together")
