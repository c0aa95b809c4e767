"""How well training uses the CPU: `python benchmarks/training.py TEXT [--precision float32] …`

Steps of `rwkv train` take turns with the matrix products of such a step alone, and with its
recurrences alone, forward and backward, so that whatever else the machine does meets all three.
Each figure is the best of the rounds. Printed are tokens a second and

    6 x parameters x tokens/s against the rate of the bare matrix products
    what part of a step the recurrences take
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rwkv_cpp.train.loop import Settings, Trainer
from rwkv_cpp.train.recurrence import wkv


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def products(trainer: Trainer) -> tuple[Callable[[], None], float]:
    """The matrix products of a step, the three of each matrix, and their floating operations."""
    settings = trainer.settings
    rows = settings.batch // settings.accumulate * settings.sequence
    dtype = getattr(torch, trainer.precision)
    matrices = [
        p.detach().to(dtype)
        for name, p in trainer.learning.items()
        if p.dim() == 2 and "emb." not in name
    ]
    sides = {side: torch.randn(rows, side).to(dtype) for w in matrices for side in w.shape}

    def run() -> None:
        for _ in range(settings.accumulate):
            for w in matrices:
                x, grad = sides[w.shape[1]], sides[w.shape[0]]
                torch.mm(x, w.t())
                torch.mm(grad, w)
                torch.mm(grad.t(), x)

    return run, settings.accumulate * sum(6.0 * rows * w.numel() for w in matrices)


def recurrences(trainer: Trainer) -> Callable[[], None]:
    settings = trainer.settings
    batch, channels = settings.batch // settings.accumulate, settings.n_embed
    dtype = getattr(torch, trainer.precision)
    att = trainer.learner.network.blocks[0].att
    k, v = (torch.randn(batch, settings.sequence, channels).to(dtype) for _ in "kv")
    past = trainer.learner.past(batch)[0]
    arguments = (att.time_decay, att.time_first, k, v)
    inputs = [x.detach().requires_grad_() for x in arguments]

    def run() -> None:
        for _ in range(settings.accumulate * settings.n_layer):
            average, _, _ = wkv(*inputs, past.key, past.value)
            torch.autograd.grad(average, inputs, torch.ones_like(average))

    return run


@click.command(context_settings={"show_default": True})
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--n-layer", default=5)
@click.option("--n-embed", default=256)
@click.option("--sequence", default=256)
@click.option("--batch", default=32)
@click.option("--accumulate", default=1)
@click.option("--optimizer", default="muon")
@click.option("--precision", default="auto")
@click.option("--threads", type=int, help="CPU threads.  [default: all cores]")
@click.option("--rounds", default=4)
def main(text: Path, threads: int | None, rounds: int, **options: object) -> None:
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(**options)
    trainer = Trainer(text, settings)
    run_products, operations = products(trainer)
    runs = {"step": trainer.step, "products": run_products, "recurrences": recurrences(trainer)}
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
    parameters = sum(p.numel() for p in trainer.learning.values())
    rate = settings.batch * settings.sequence / best["step"]
    products_rate = operations / best["products"]
    print(f"{trainer.precision}, {torch.get_num_threads()} threads, {parameters:,} parameters")
    print(f"{rate:,.0f} tokens/s, a step of {best['step']:.2f} s")
    print(
        f"{6 * parameters * rate / 1e9:.0f} GFLOP/s of {products_rate / 1e9:.0f} in bare products: "
        f"{6 * parameters * rate / products_rate:.0%}"
    )
    print(f"recurrences: {best['recurrences'] / best['step']:.0%} of a step")


if __name__ == "__main__":
    main()
