"""The losses of a run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from ..atomic import replacing
from .loop import Progress


def draw_curve(path: Path, progress: Progress, sequence: int) -> None:
    """Write a PNG to `path`: losses by step, and the held-out loss by how much was read before.

    sequence: the length of the windows that were trained on, which is marked. Losses are per byte
    where the bytes of tokens are known.
    """
    unit, scale = "token", 1.0
    if progress.bytes_per_token:
        unit, scale = "byte", 1 / progress.bytes_per_token
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    steps, positions = figure.subplots(1, 2, width_ratios=(3, 2))
    train, held_out, by_position = (
        (list(losses), [scale * loss for loss in losses.values()])
        for losses in (progress.train, progress.held_out, progress.by_position or {})
    )
    steps.plot(*train, linewidth=0.6, alpha=0.6, label="training")
    steps.plot(*held_out, marker="o", markersize=3, label="held out")
    steps.set(xlabel="step", ylabel=f"loss, nats per {unit}")
    steps.set_ylim(0.95 * min(train[1] + held_out[1]), 1.1 * max(held_out[1]))
    steps.legend()
    positions.plot(*by_position, marker="o", markersize=3, color="C1")
    positions.axvline(sequence, color="gray", linestyle=":", label="training window")
    positions.set_xscale("log", base=2)
    positions.set(xlabel="tokens read before, up to", ylabel=f"held-out loss, nats per {unit}")
    positions.legend()
    for axes in (steps, positions):
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
